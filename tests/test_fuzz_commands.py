"""Random command lines: each ends with status 0, 1 or 2, one line if it fails, and does no harm.

By default, small stand-ins train, and the command lines are the same in every run; with
MINIPEFT_SEED=random, they are new. The slow tests really train: `python test_fuzz_commands.py lines
N` runs N command lines in processes of their own, and `stops N` stops N commands at random moments.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from stat import S_ISREG
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from minipeft import GPT, LoraConfig, __main__, get_peft_model
from minipeft.files import write_text
from minipeft.lab import DATA, cli, compare, finetune, memory, pretrain, report, sweep, tasks
from minipeft.lab.finetune import Record
from minipeft.lab.train import TrainingResult, pick_device

load_task = tasks.load_task
IS_RANDOM = os.environ.get("MINIPEFT_SEED") == "random"
COMMANDS = ("compare", "finetune", "sweep", "pretrain", "generate", "memory", "targets", "merge")
REQUIRED = {
    "finetune": ["--output"], "generate": ["--prompt"], "pretrain": ["--text", "--output"],
    "merge": ["--adapter", "--output"],
}  # fmt: skip
NUMBERS = ["1", "2", "4", "1e-3", "0", "-1", "nan", "inf", "1e400", "9" * 400, "1.5", "ten"]
TEXTS = ["", " ", ",", "-", "--", "--base", "é\n\x1b[2J", "\udcff", "\u2028", "x" * 5000, "$a_b$"]
PATHS = [
    "base", "link", "base/.", "adapter", "folder", "folder/new", "file.txt", "file.txt/new",
    "pipe", "closed", "missing", "out", "/dev/null", "/dev/full", "base/config.json",
    "train.jsonl", "../world/base", "empty.jsonl", "broken.jsonl", "zero",
]  # fmt: skip
GOOD = {  # values with which a command can succeed
    "--base": ["base", "link", "base/."],
    "--adapter": ["adapter"],
    "--output": ["out", "out/deep", "folder", "é"],
    "--results": ["out/more.json", "results.json"],
    "--task": ["describe", "sentiment"],
    "--train": ["train.jsonl"],
    "--validation": ["valid.jsonl"],
    "--test": ["valid.jsonl"],
    "--text": ["text.txt"],
    "--method": ["full", "lora", "adalora", "prompt_tuning", "qlora", "bitfit"],
    "--methods": ["frozen", "full", "lora", "lora,frozen", "full,lora", "prompt_tuning"],
    "--targets": ["attention", "mlp", "all-linear"],
    "--learning-rates": ["1e-3,1e-2,1e-1"],
    "--sizes": ["1", "2,4"],
    "--shapes": ["0.3m", "gpt2", "llama-2-7b,0.3m"],
    "--prompt": ["The name", "é ☃", "\n"],
    "--device": ["cpu"],
    "--decay-to": ["zero", "start"],
    "--vocab-size": ["257", "300"],
    "--n-embd": ["8", "32"],
    "--n-head": ["2", "4"],
    "--n-positions": ["16", "64"],
    "--max-new-tokens": ["0", "3"],
    "--length": ["2", "16"],
    "--temperature": ["0", "0.5", "1000"],
    "--lr-end": ["0", "1"],
    "--beta2": ["0", "0.9"],
}


def options(command: str) -> dict[str, bool]:
    """The flags of a command, and whether they take a value."""
    subcommand = cli.parser()._subparsers._group_actions[0].choices[command]
    return {a.option_strings[-1]: a.nargs != 0 for a in subcommand._actions}


OPTIONS = {command: options(command) for command in COMMANDS}


@st.composite
def command_lines(draw) -> list[str]:
    """A command with some of its flags, most of them with values that are right."""
    command = draw(st.sampled_from(COMMANDS))
    flags = draw(st.lists(st.sampled_from(sorted(OPTIONS[command])), max_size=5))
    if draw(st.integers(0, 9)):
        flags = REQUIRED.get(command, []) + flags
        quick = ["--base", "--steps", "--methods", "--n-generate", "--shapes"]
        flags += [flag for flag in quick if flag in OPTIONS[command]]
    words = [command]
    for flag in flags:
        if not OPTIONS[command][flag]:
            words.append(flag)
            continue
        good = GOOD.get(flag, ["1", "2"])
        bad = draw(st.sampled_from([NUMBERS, TEXTS, PATHS])) if draw(st.integers(0, 9)) == 0 else []
        value = draw(st.sampled_from(bad or good))
        words += [f"{flag}={value}"] if draw(st.booleans()) else [flag, value]
    if draw(st.integers(0, 19)) == 0:
        stray = ["stray", "--stpes", "--help", "--version", "--", "-x", "--seed", *TEXTS]
        words.insert(draw(st.integers(0, len(words))), draw(st.sampled_from(stray)))
    return words


def make_world(folder: Path) -> Path:
    """A folder with everything that the values above name."""
    world = folder / "world"
    world.mkdir()
    shutil.copytree(DATA / "base" / "0.3m", world / "base")
    (world / "link").symlink_to("base")
    for name in ("folder", "closed"):
        (world / name).mkdir()
    (world / "closed").chmod(0o500)
    line = json.dumps({"prompt": "The names: Ann, Bob.", "completion": " Ann"}) + "\n"
    files = {
        "train.jsonl": line * 4,
        "valid.jsonl": line * 3,
        "empty.jsonl": "",
        "file.txt": "mine",
    }
    files |= {"broken.jsonl": line + "{"}
    files |= dict.fromkeys(("text.txt", "held_out.txt"), "Ann is here. <|endoftext|>" * 200)
    for name, text in files.items():
        (world / name).write_text(text)
    os.mkfifo(world / "pipe")
    (world / "zero").symlink_to("/dev/zero")
    model = GPT.from_pretrained(world / "base")
    model = get_peft_model(model, LoraConfig(r=1, target_modules=["c_attn"]))
    model.save_pretrained(world / "adapter")
    return world


def state(folder: Path) -> dict[str, tuple]:
    """All files of a folder, and whether they were written to."""
    found = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {
        name: (
            s.st_mode,
            s.st_ino,
            s.st_size * S_ISREG(s.st_mode),
            s.st_mtime_ns * S_ISREG(s.st_mode),
        )
        for name, s in found.items()
    }


def check(world: Path, before: dict, status: int, error: str, written: set[str] = frozenset()):
    """Whether a command has ended as it should."""
    shown = re.split(r"[\r\n]+", re.sub(r"[^\r\n]*\d+/\d+ \[[^\r\n\]]*\]", "", error))
    lines = [line for line in shown if line.strip()]
    assert "Traceback" not in error, error
    assert "it hangs" not in error
    assert len(lines) == (status != 0), error
    assert status in (0, 1, 2), status
    prefix = {0: "", 1: "error: |stopped", 2: "minipeft.*: error: .*--help.$"}[status]
    assert re.match(prefix, "".join(lines)), error
    after = state(world)
    assert {name: after.get(name) for name in before} == before
    for file in (world / name for name in after.keys() - before.keys()):
        assert not file.name.startswith("."), f"half written: {file}"
        if file.suffix == ".json":
            json.loads(file.read_text())
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                assert list(opened.keys())


def clean(world: Path, before: dict) -> None:
    """Remove what a command has written."""
    for path in sorted(world.rglob("*"), reverse=True):
        if str(path.relative_to(world)) not in before:
            path.rmdir() if path.is_dir() else path.unlink()


# --- stand-ins ---


def trained(base, task, recipe, run) -> Record:
    """A record as if a run had trained; the best learning rate is 1e-2."""
    pick_device(run.device)
    loss = 1 + abs((run.learning_rate or 1e-2) - 1e-2)
    if run.output is not None:
        Path(run.output).mkdir(parents=True, exist_ok=True)
        write_text(Path(run.output) / "adapter_config.json", "{}")
    return Record(
        recipe.method, base.name, task.name, run.seed, run.steps, len(task.train), score=0.5,
        trainable=1, weight_bytes=1, validation=[{"step": 0, "loss": loss}], examples=[],
        forgetting={"base": 1.0, "on": 1.5}, random_base=run.random_base,
    )  # fmt: skip


def small_task(base, name):
    """Four examples instead of a shipped task's 700."""
    if name in GOOD["--task"]:
        return tasks.load_files(base, "train.jsonl", "valid.jsonl")
    return load_task(base, name)


def draw(figure, path) -> None:
    write_text(path, "drawn")


@pytest.fixture(scope="module")
def stand_ins():
    with contextlib.ExitStack() as stack:
        for module in (finetune, compare, sweep):
            stack.enter_context(mock.patch.object(module, "finetune", trained))
        result = TrainingResult([1.0], 0.1, 1, 1, None, None)
        parts = dict.fromkeys(memory.PARTS, 1)
        stack.enter_context(mock.patch.object(pretrain, "train", return_value=result))
        stack.enter_context(mock.patch.object(memory, "measure", return_value=parts))
        stack.enter_context(mock.patch.object(report, "save_figure", draw))
        stack.enter_context(mock.patch.object(tasks, "load_task", small_task))
        stack.enter_context(mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True))
        yield


def hangs(*_) -> None:
    raise AssertionError("it hangs")


def end_of(words: list[str]) -> tuple[int, str]:
    """The exit status of a command in this process, and what it writes to standard error."""
    error = io.StringIO()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}

    def leave(line: str) -> None:
        error.write(f"{line}\n")
        sys.exit(1)

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    try:
        with (
            mock.patch.object(sys, "argv", ["minipeft", *words]),
            mock.patch.object(sys, "unraisablehook", sys.unraisablehook),
            mock.patch.object(__main__, "leave", leave),
            contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")),
            contextlib.redirect_stderr(error),
        ):
            __main__.main()
        return 0, error.getvalue()
    except SystemExit as ended:
        return ended.code or 0, error.getvalue()
    finally:
        signal.alarm(0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def fuzz(run, world: Path, n: int) -> None:
    """Run n random command lines in a folder, and check how each ends."""
    before, shipped = state(world), state(DATA / "base")

    @settings(
        max_examples=n, deadline=None, database=None, derandomize=not IS_RANDOM,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(command_lines())
    def ends_well(words):
        try:
            check(world, before, *run(words))
        finally:
            clean(world, before)

    os.chdir(world)
    ends_well()
    assert state(DATA / "base") == shipped


@pytest.mark.slow
def test_a_random_command_line_ends_well(monkeypatch, tmp_path, stand_ins):
    monkeypatch.chdir(tmp_path)  # and back, in the end
    fuzz(end_of, make_world(tmp_path), 50)


# --- in processes of their own ---

STOPS = (signal.SIGINT, signal.SIGTERM)
SHAPE = "--vocab-size 300 --n-embd 32 --n-layer 1 --n-head 2 --n-positions 64"
JOBS = [
    "finetune --base base --batch-size 4 --steps 90 --checkpoint-every 30 --output out",
    "finetune --base base --batch-size 4 --steps 4 --n-generate 4 --method full --output out",
    "compare --base base --batch-size 4 --steps 2 --methods frozen,lora --output out",
    "sweep --base base --batch-size 4 --steps 1 --n-generate 1 --method bitfit --output out",
    "generate --base base --adapter adapter --prompt The --max-new-tokens 150",
    f"pretrain --text text.txt --output out --steps 40 {SHAPE}",
    "merge --base base --adapter adapter --output out",
    "memory --shapes 0.3m,gpt2 --length 16 --output out",
]


def in_a_fork(words: list[str], stop=lambda pid: None) -> tuple[int, str]:
    """The exit status of a command in a child process, and what it writes to standard error."""
    with tempfile.TemporaryFile() as error:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(error.fileno(), 2)
            signal.alarm(300)
            __main__.on_stop(__main__.leave)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            sys.argv = ["minipeft", *words]
            try:
                __main__.main()
            except SystemExit as ended:  # a usage error, or --help
                os._exit(ended.code)
            os._exit(0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        stop(pid)
        _, status = os.waitpid(pid, 0)
        error.seek(0)
        return os.waitstatus_to_exitcode(status), error.read().decode()


def stop_at_random(world: Path, n: int) -> None:
    """Stop commands with one to three signals; runs that can be continued are, half of the time."""
    rng = random.Random(None if IS_RANDOM else 0)
    before, seconds, ends = state(world), {}, Counter()
    for job in [*JOBS, *(rng.choice(JOBS) for _ in range(n))]:
        checkpoint, words = world / "out" / "checkpoint.safetensors", job.split()
        if checkpoint.exists() and job == JOBS[0] and rng.random() < 0.5:
            words.append("--resume")
        else:
            clean(world, before)

        def stop(pid: int) -> None:
            if job not in seconds:  # noqa: B023  (the first time, it is only timed)
                return
            time.sleep(rng.uniform(0, seconds[job]))  # noqa: B023
            for _ in range(rng.choice([1, 1, 2, 3])):
                os.kill(pid, rng.choice(STOPS))
                time.sleep(rng.choice([0, 1e-4, 1e-2, 0.2]))

        began = time.perf_counter()
        status, error = in_a_fork(words, stop)
        seconds.setdefault(job, time.perf_counter() - began)
        check(world, before, status, error)
        assert checkpoint.exists() or "resume" not in error
        said = re.sub(r"\d+", "N", error.strip().splitlines()[-1]) if status else "finished"
        ends[f"{words[0]}: {said}"] += 1
    print(*ends.items(), sep="\n")


def main() -> None:
    """Do what the words on the command line say, in a new folder."""
    torch.set_num_threads(1)  # threads do not survive a fork
    os.environ["MINIPEFT_STEPS"] = "2"
    what, n = sys.argv[1], int(sys.argv[2])
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(tasks, "load_task", small_task),
        mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
    ):
        world = make_world(Path(folder))
        os.chdir(world)
        fuzz(in_a_fork, world, n) if what == "lines" else stop_at_random(world, n)
    print(f"{n} {what}")


@pytest.mark.slow
@pytest.mark.parametrize(("what", "n"), [("lines", 100), ("stops", 50)])
def test_commands_in_processes_of_their_own_end_well(what, n):
    command, paths = [sys.executable, __file__, what, str(n)], {"PYTHONPATH": str(DATA.parent)}
    done = subprocess.run(
        command, env=os.environ | paths, capture_output=True, text=True, timeout=1200
    )
    assert done.stdout.endswith(f"{n} {what}\n"), done.stdout + done.stderr


if __name__ == "__main__":
    main()
