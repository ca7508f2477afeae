"""Reading files that may come from a stranger, and writing files in one piece.

Every file from outside goes through these functions. They check before they take memory: a
file must be a plain file of limited size, JSON must not be nested deeply, and tensors must be
floating point. Their names and shapes are known before any of them is loaded. An error is one
ValueError with one line: the file, what is wrong, the value. Pickles are never read.
"""

import hashlib
import json
import math
import os
import tempfile
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MEBIBYTE = 2**20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
STATE_DTYPES = DTYPES | {"I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}


def show(value, limit: int = 200) -> str:
    """A value from a file as one short line of an error message."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def one_line(error: BaseException) -> str:
    """An error's message as one short line."""
    printable = (c if c.isprintable() else " " for c in str(error)[:1000])
    return " ".join("".join(printable).split())[:400]


def read_start(file: Path, n: int) -> bytes:
    """The first n bytes of a plain file, or all of it."""
    try:
        if not file.is_file():  # a folder, pipe or device
            raise ValueError(f"{file} is {'not a plain file' if file.exists() else 'missing'}")
        with file.open("rb") as opened:
            return opened.read(min(n, os.fstat(opened.fileno()).st_size))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def read_text(file: Path, limit: int) -> str:
    """The text of a UTF-8 file of at most `limit` bytes, with or without a byte order mark."""
    if os.path.isfile(file) and file.stat().st_size > limit:
        raise ValueError(f"{file} is larger than {limit // MEBIBYTE} MiB")
    try:
        return read_start(file, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def read_json(file: Path, kind: type = dict, limit: int = 4 * MEBIBYTE, largest: int = 2**63):
    """The object (or other kind of value) in a JSON file."""
    return parse_json(read_text(file, limit), kind, str(file), largest=largest)


def parse_json(text: str, kind: type, where: str, depth: int = 20, largest: int = 2**63):
    """A JSON text of this kind, nested at most `depth` levels deep, with finite numbers, and
    integers below `largest`."""
    limits = {int: largest, float: math.inf}
    try:
        found = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {one_line(error)}") from error
    if not isinstance(found, kind):
        wanted = "object" if kind is dict else "array"
        raise ValueError(f"{where} must be a JSON {wanted}, got {show(found)}")
    level: list = [found]
    while level:  # one level of nesting after the other
        numbers = [value for value in level if type(value) in limits]
        if not all(abs(n) < limits[type(n)] for n in numbers):  # NaN is not below infinity
            raise ValueError(f"{where} has a number that is not finite, or too large")
        if depth == 0:
            raise ValueError(f"{where} is nested too deeply")
        depth -= 1
        level = [inner for value in level for inner in members(value)]
    return found


def unique(pairs: list[tuple]) -> dict:
    """A JSON object as a dictionary. Raises ValueError for a key that is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def members(value) -> Iterable:
    """The values in a JSON object or array."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def has_type(value, kind) -> bool:
    """Whether a value from JSON has an annotated type, such as `dict[str, list[bool]] | None`."""
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(has_type(value, one) for one in inner)
    if isinstance(value, dict | list) and inner:
        right = isinstance(value, typing.get_origin(kind))
        return right and all(has_type(item, inner[-1]) for item in members(value))
    return type(value) is kind or (type(value) is int and kind is float)


def check_types(settings: dict, config: type, file: Path) -> dict:
    """The settings that are fields of a config's class. Raises ValueError for one of another
    type."""
    kinds = {field.name: field.type for field in fields(config) if field.init}
    found = {name: settings[name] for name in kinds if name in settings}
    for name, value in found.items():
        if not has_type(value, kinds[name]):
            wanted = getattr(kinds[name], "__name__", kinds[name])
            raise ValueError(f"{file}: {name} must be of type {wanted}, got {show(value)}")
    return found


def digest(config, ignored: Iterable[str]) -> dict[str, str]:
    """A checksum of the settings that change a model's output, for the header of its weights.

    It ties weights and config together: a folder with the weights of one model and the config of
    another is refused. Settings that have their default are left out, so that a new one does not
    change the checksums of old folders.
    """
    settings = {f.name: getattr(config, f.name) for f in fields(config)}
    changed = {f.name: settings[f.name] for f in fields(config) if settings[f.name] != f.default}
    for name in ignored:
        changed.pop(name, None)
    text = json.dumps(changed, sort_keys=True, default=sorted)  # sorts a set
    return {"minipeft_config": hashlib.sha256(text.encode()).hexdigest()[:16]}


def check_digest(header: dict[str, str], wanted: dict[str, str], file: Path, config: Path) -> None:
    """Raises ValueError if weights were written together with another config. Weights that peft or
    transformers wrote have no digest."""
    if any(header.get(key, value) != value for key, value in wanted.items()):
        raise ValueError(
            f"{file} was written with other settings than those in {config.name}: the two files do "
            "not belong together, or a setting was changed"
        )


def read_header(
    file: Path, dtypes: dict = DTYPES, ignored: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file on the meta device, where they take no memory, and the
    strings in its header. Leaves out names with an ignored ending."""
    from safetensors import safe_open

    length = int.from_bytes(read_start(file, 8), "little")  # of the header
    if not 2 <= length <= 8 * MEBIBYTE:
        raise ValueError(f"{file} cannot be read as safetensors: a header of {length} bytes")
    found = {}
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            pieces = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            for name, piece in pieces.items():
                if name.endswith(ignored):
                    continue
                kind = piece.get_dtype()
                if len(name) > 300 or not name.isprintable():
                    raise ValueError(f"{show(name)} is not the name of a tensor")
                if kind not in dtypes:
                    raise ValueError(f"{name} has dtype {kind}, expected {', '.join(dtypes)}")
                found[name] = torch.empty(piece.get_shape(), dtype=dtypes[kind], device="meta")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except Exception as error:  # safetensors raises a class of its own
        raise ValueError(f"{file} cannot be read as safetensors: {one_line(error)}") from error
    return found, header


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: call it after the names and shapes were checked. Raises
    ValueError for values that are not finite."""
    from safetensors.torch import load_file

    found = load_file(file)
    for name, tensor in found.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{file}: {name} has values that are NaN or infinite")
    return found


def mismatch(found: dict[str, Tensor], wanted: dict[str, Tensor], same_dtype: bool = False) -> str:
    """How tensors differ from wanted ones in name and shape, and in dtype: one is floating point
    and the other is not, or, with same_dtype, in any way. Empty if they match."""
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    for name, tensor in found.items():
        if name not in wanted:
            wrong.append(f"{name} has no place in this model")
            continue
        fits = tensor.is_floating_point() == wanted[name].is_floating_point()
        fits &= tensor.dtype == wanted[name].dtype or not same_dtype
        if tensor.shape != wanted[name].shape or not fits:
            is_, should = (f"{tuple(t.shape)} of {t.dtype}" for t in (tensor, wanted[name]))
            wrong.append(f"{name} is {is_}, not {should}")
    more = f" ({len(wrong)} in all)" if len(wrong) > 3 else ""
    return "; ".join(each[:250] for each in wrong[:3]) + more


class empty_tensors(TorchFunctionMode):
    """A context in which new tensors are on the meta device: they have a shape, but take no memory,
    and no initial values are drawn."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        with torch.device("meta"):
            return func(*args, **(kwargs or {}))


def write_tensors(file: Path, tensors: dict[str, Tensor], strings: dict[str, str]) -> None:
    """Write a safetensors file with strings in its header. Equal contents give equal files."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(to: str) -> None:
        save_file(tensors, to, metadata={"format": "pt"} | strings)
        with open(to, "r+b") as opened:  # safetensors writes the strings in random order
            n = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(n))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
            opened.seek(8)
            opened.write(text.encode().ljust(n))

    write_file(file, write)


def write_text(file: Path, text: str) -> None:
    write_file(file, lambda to: Path(to).write_text(text, encoding="utf-8"))


def write_file(file: Path, write: Callable[[str], object]) -> None:
    """Call `write` with a temporary file next to `file`, then rename it: never half a file.

    Raises OSError if it cannot be written: the disk is full, for example.
    """
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException as error:
        os.unlink(temporary)
        if type(error).__name__ == "SafetensorError":  # which is no OSError
            raise OSError(f"{file} cannot be written: {error}") from error
        raise
