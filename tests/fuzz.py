"""Seeded mutations of files, and attempts to load the result in child processes."""

import json
import os
import random
import resource
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save

SECONDS, BYTES = 10, 2**30  # what one attempt may take

# --- mutations; each draws from `chance` ---

NAMES = ["../../outside", "a\nb", "\0", "\ud800", "x" * 10**5, "", ".", "a.b", "\x1b[31m", "é"]
VALUES = [  # as JSON text
    "null", "true", "false", "-1", "0", "1", "2.5", "1e999", "-1e999", "NaN", "Infinity", "1e300",
    "1000000000", "-1000000000", "9223372036854775808", "1" * 400, "1" * 5000, '""', '"8"', "[]",
    "{}", "[1]", "[null]", "[[]]", '{"a": 1}', "[" * 200 + "]" * 200, "[" * 10**5 + "]" * 10**5,
    json.dumps(["x"] * 10**5), '"' + "y" * 10**6 + '"', *map(json.dumps, NAMES),
]  # fmt: skip
REGEXES = ["(a+)+$", "(.*)*(.*)*(.*)*x", r"((\w|_|\.)*)*!", "(", "(?P<a>" * 200, "(a{9999}){9999}"]
HOSTILE = {  # values for certain keys
    "target_modules": [*REGEXES, [f"layer{i}" for i in range(10**5)], ["("], [""], ""],
    "rank_pattern": [dict.fromkeys(REGEXES, 10 ** 9), {str(i): 1 for i in range(10**5)}],
    "alpha_pattern": [dict.fromkeys(REGEXES, 8)],
    "trainable_token_indices": [[10**9], [-1], [True], [0] * 10**5, list(range(10**6))],
    "weight_map": [{"wte.weight": name} for name in (*NAMES, "/dev/zero", "../outside/a", "..")],
    "pattern": [{"Regex": r} for r in REGEXES], "vocab_size": [10**12], "n_inner": [10**9, -1, 0],
    "normalizer": [{"type": "Replace", "pattern": {"Regex": r}, "content": ""} for r in REGEXES],
    "padding": [{"strategy": {"Fixed": 10**9}, "direction": "Left", "pad_to_multiple_of": None,
                 "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}],
    "pre_tokenizer": [
        {"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False}
        for r in REGEXES
    ],
    "shape": [[0, 10**9], [10**9, 10**9], [2**63], [-1, 1], []], "data_offsets": [[0, 2**62]],
    "dtype": ["F64", "F8_E4M3", "BOOL", "C64", "I64", "U8", "F4"],
} | {
    name: [10**9, 10**12, -1, 0]
    for name in (
        "r", "init_r", "num_virtual_tokens", "encoder_num_layers", "encoder_hidden_size",
        "bottleneck_size", "n_layer", "n_embd", "n_positions", "n_head", "step", "total_step",
    )
}  # fmt: skip
KINDS = ["missing", "folder", "FIFO", "loop", "/dev/zero", "empty", "no permission", "1 TiB"]


def mutate_file(file: Path, chance: random.Random, others: list[Path]) -> tuple[str, bool]:
    """Change a file. Returns what was done, and whether no reader may accept the result."""
    draw, suffix = chance.random(), file.suffix
    if draw < 0.12:
        return change_kind(file, chance.choice(KINDS))
    data = file.read_bytes()
    if suffix == ".safetensors" and draw < 0.65:
        what, data, must_fail = mutate_tensors(data, chance)
    elif suffix == ".jsonl" and draw < 0.8:
        lines, i = data.decode().splitlines(), 0
        i = chance.randrange(len(lines))
        what, lines[i] = mutate_json(lines[i], chance)
        data, must_fail = "\n".join(lines).encode(), False
    elif suffix == ".json" and draw < 0.8:
        what, text = mutate_json(data.decode(), chance)
        data, must_fail = text.encode(), False
    else:
        what, data = mutate_bytes(data, chance, chance.choice(others).read_bytes())
        must_fail = False
    file.write_bytes(data)
    return what, must_fail


def change_kind(file: Path, kind: str) -> tuple[str, bool]:
    if kind == "no permission":
        file.chmod(0)  # root may read it all the same
        return kind, False
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "FIFO":
        os.mkfifo(file)
    elif kind in ("loop", "/dev/zero"):
        file.symlink_to(file if kind == "loop" else kind)
    elif kind != "missing":
        file.touch()
        os.truncate(file, 2**40 if kind == "1 TiB" else 0)
    return kind, True


def mutate_bytes(data: bytes, chance: random.Random, other: bytes) -> tuple[str, bytes]:
    what = chance.choice(["flip", "delete", "insert", "truncate", "duplicate", "splice", "swap"])
    end = chance.choice([8, 300, len(data)])  # often in the header
    i = chance.randrange(max(1, min(end, len(data))))
    n = chance.choice([1, 2, 8, 100])
    if what == "flip":
        new = bytearray(data)
        for _ in range(n):
            new[chance.randrange(i, min(len(data), i + 100))] ^= 1 << chance.randrange(8)
        return what, bytes(new)
    j = chance.randrange(max(1, len(other)))
    middle = {"delete": b"", "insert": chance.randbytes(n) + data[i : i + n], "truncate": b"",
              "duplicate": data[i : i + n] * 2, "splice": other[j : j + n]}  # fmt: skip
    whole = {"truncate": data[:i], "swap": other}
    return what, whole.get(what, data[:i] + middle.get(what, b"") + data[i + n :])


def mutate_json(text: str, chance: random.Random) -> tuple[str, str]:
    """Change one place in a JSON text: a value, or a key."""
    root = [json.loads(text)]
    parent, key = root, 0
    known = [(d, k) for d in dictionaries(root) for k in d if k in HOSTILE]
    raw = None
    if known and chance.random() < 0.3:
        parent, key = chance.choice(known)
        raw = json.dumps(chance.choice(HOSTILE[key]))
    else:
        while isinstance(parent[key], dict | list) and parent[key] and chance.random() < 0.9:
            parent = parent[key]
            key = chance.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    old, what = parent[key], "replace"
    if isinstance(old, str) and old.startswith("{") and chance.random() < 0.9:  # JSON in JSON
        what, parent[key] = mutate_json(old, chance)
        return f"in {key}: {what}", json.dumps(root[0])
    if raw is None:
        raw = chance.choice(VALUES)
        what = chance.choice(["replace"] * 4 + ["remove", "rename", "duplicate", "add"])
    in_dict, mark = isinstance(parent, dict), "the new value's place"
    if what == "remove" and parent is not root:
        parent.pop(key)
    elif what == "rename" and in_dict:
        parent[raw := chance.choice([*NAMES, *parent])] = parent.pop(key)
    elif what == "duplicate" and in_dict:
        raw = f"{json.dumps(old)}, {json.dumps(key)}: {raw}"
        parent[key] = mark
    elif what == "add" and in_dict:
        parent[key := chance.choice([*NAMES, "unknown"])] = mark
    else:
        parent[key] = mark
    text = json.dumps(root[0]).replace(json.dumps(mark), raw)
    return f"{what} {key!r:.40} {raw[:60]!r}", text


def dictionaries(value) -> Iterable[dict]:
    """All dictionaries inside a value from JSON."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            yield from dictionaries(item)


CHANGES: dict[str, Callable] = {  # of one tensor
    "transpose": lambda t: t.T if t.dim() == 2 else t[None],
    "flatten": torch.Tensor.flatten, "unsqueeze": lambda t: t[None],
    "scalar": lambda t: t.flatten()[0], "one entry": lambda t: t.flatten()[:1],
    "one row": lambda t: t[:1] if t.dim() else t, "cut": lambda t: t[:-1] if t.dim() else t,
    "empty": lambda t: t.new_empty(0, 10**9), "twice": lambda t: torch.cat((t[None], t[None])),
    "nan": lambda t: spoiled(t, torch.nan), "inf": lambda t: spoiled(t, -torch.inf),
}  # fmt: skip
DTYPES = [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn,
          torch.float16, torch.bfloat16, torch.float64]  # fmt: skip


def spoiled(t: torch.Tensor, value: float) -> torch.Tensor:
    t = t.clone()
    if t.is_floating_point():
        t.view(-1)[-1] = value
    return t


def mutate_tensors(data: bytes, chance: random.Random) -> tuple[str, bytes, bool]:
    length = int.from_bytes(data[:8], "little")
    header, body, draw = data[8 : 8 + length], data[8 + length :], chance.random()
    if draw < 0.1:
        lie = chance.choice([0, 1, length - 1, length + 1, 10**8 + 1, 2**31, 2**63, 2**64 - 1])
        return f"header length {lie}", lie.to_bytes(8, "little") + header + body, False
    if draw < 0.5:
        what, text = mutate_json(header.decode(), chance)
        return f"header: {what}", len(text).to_bytes(8, "little") + text.encode() + body, False
    tensors, metadata = load(data), json.loads(header).get("__metadata__")
    name = chance.choice(sorted(tensors))
    old = tensors[name]
    what = chance.choice(["remove", "add", "rename", *CHANGES, *["dtype"] * 4])
    if what in ("remove", "rename"):
        tensors.pop(name)
    if what in ("add", "rename"):
        tensors[f"{chance.choice(['x.', 'base_model.', ''])}{name}_"] = old.clone()
    if what == "dtype":
        what = f"dtype {(dtype := chance.choice(DTYPES))}"
        tensors[name] = old.to(dtype)
    elif what in CHANGES:
        tensors[name] = CHANGES[what](old).contiguous().clone()
    new = tensors.get(name)
    same = new is not None and new.shape == old.shape and f"{name}_" not in tensors
    same &= len(tensors) == len(json.loads(header)) - (metadata is not None)
    if same and new.is_floating_point() and old.is_floating_point():
        wrong = not new.float().isfinite().all()
    else:
        wrong = not same or new.dtype != old.dtype
    return f"{what} of {name}", save(tensors, metadata), wrong


# --- attempts ---


@dataclass
class Attempt:
    """How one mutated folder is read."""

    load: Callable[[], object]
    check: Callable[[object], None]  # raises AssertionError for a result that is no valid object
    state: Callable[[], object]  # all that a refused file must not change
    writes: bool = False


def files(root: Path) -> list:
    """All files below a folder, with what changes when they are written."""
    stats = [(path, path.lstat()) for path in sorted(root.rglob("*"))]
    return [(str(p), s.st_mode, p.is_dir() or (s.st_size, s.st_mtime_ns)) for p, s in stats]


def fault_of(attempt: Attempt, folder: Path, names: list[str], must_fail: bool) -> str | None:
    """Read a folder that should have files of these names; what is wrong, if anything."""
    root = folder.parent
    before = attempt.state(), files(root)
    try:
        result = attempt.load()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        text, kind = str(error), type(error).__name__
        if type(error) is not ValueError and not isinstance(error, OSError):
            return f"{kind}: {text[:300]!r}"
        if not text.isprintable() or len(text) >= 700:
            return f"the message is {len(text)} characters long or not printable: {text[:300]!r}"
        if str(folder) not in text or not any(n in text for n in (f"{folder}/", *names)):
            return f"the message names no file: {text!r}"
        if "memory" in text or "allocate" in text:
            return f"only the memory limit stopped it: {text!r}"
        if (attempt.state(), files(root)) != before:
            return f"refused, but something has changed: {text!r}"
        return None
    if files(root) != before[1] and not attempt.writes:
        return "files have changed"
    try:
        attempt.check(result)
    except Exception as error:
        first = str(error).partition("\n")[0]
        return f"accepted, but not valid: {type(error).__name__} {first[:300]}"
    return "accepted" if must_fail else None


def in_children(numbers: list[int], run_one: Callable) -> dict[int, str]:
    """The faults by number. A child takes one after the other; after a crash, the next child.

    run_one(number, note) calls note(text) first, and then returns what is wrong, or None.
    """
    faults, rest = {}, list(numbers)
    while rest:
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(read)
            work(rest, run_one, write)
        os.close(write)
        with os.fdopen(read) as lines:
            found = [json.loads(line) for line in lines]
        _, status = os.waitpid(pid, 0)
        done = [number for kind, number, _ in found if kind == "done"]
        notes = {number: text for kind, number, text in found if kind == "note"}
        faults |= {n: f"{notes[n]}: {text}" for kind, n, text in found if kind == "done" and text}
        rest = rest[len(done) :]
        if status:
            signalled = os.WIFSIGNALED(status)
            how = signal.Signals(os.WTERMSIG(status)).name if signalled else found[-1][-1]
            number = rest.pop(0)
            faults[number] = f"{notes.get(number)}: the process ended: {how}"
    return faults


def work(numbers: list[int], run_one: Callable, write: int) -> None:
    """In a child: run, with limits, and write lines about every number."""

    def tell(kind: str, number: int, text: str | None) -> None:
        os.write(write, (json.dumps([kind, number, text]) + "\n").encode())

    status = 1
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
    err = tempfile.TemporaryFile()  # noqa: SIM115
    os.dup2(err.fileno(), 2)
    try:
        with warnings.catch_warnings(record=True) as warned:
            for number in numbers:
                now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, resource.RLIM_INFINITY))
                signal.alarm(SECONDS)
                fault = run_one(number, lambda text, number=number: tell("note", number, text))
                signal.alarm(0)
                if warned or err.seek(0, os.SEEK_END):
                    err.seek(0)
                    said = [str(w.message)[:200] for w in warned] + [err.read(300).decode()]
                    fault = f"{fault or ''} said {said}"
                    warned.clear()
                    err.truncate(0)
                tell("done", number, fault)
        status = 0
    except BaseException:
        tell("error", 0, traceback.format_exc())
    finally:
        os._exit(status)
