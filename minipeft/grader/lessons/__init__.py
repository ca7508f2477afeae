"""Check the exercises of the lessons, in a notebook: check("02.merge", merge).

Then hint(1), hint(2) and solution() are about the exercise that was checked last. Each lesson has a
module here, and each exercise of it a function that gets the answers and a source of random inputs
(`Draw`), and raises `Wrong`. On the command line:
python -m minipeft.grader.lessons 02.merge my_answers.py
"""

import copy
import importlib.util
import itertools
import json
import math
import os
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..symptoms import Draw, Wrong, ensure, same

__all__ = ["check", "claim", "ensure", "hint", "solution", "solved"]


@dataclass
class Exercise:
    """How an answer is checked, and the hints."""

    check: Callable
    hints: tuple[str, ...]


FILES = (os.__file__, 0), (torch.__file__, 1), (__file__, 2)  # and how far up the folder is
LIBRARIES = tuple(str(Path(file).parents[up]) for file, up in FILES)
CLASSES = "cross_entropy wants the classes second: flatten batch and positions first"


class NotDone(Exception):
    """The answer is still the one that the lesson came with."""


EXERCISES: dict[str, Exercise] = {}
last: list[str] = []  # the exercise that was checked last
right: set[str] = set()  # the exercises that were right when they were checked last


def exercise(name: str, *hints: str):
    """A decorator: this function checks the answers of the exercise of that name, "02.merge"."""

    def register(function: Callable) -> Callable:
        EXERCISES[name] = Exercise(function, hints)
        return function

    return register


def find(name: str) -> Exercise:
    """The exercise of that name. Raises ValueError if there is none."""
    module = f"{__name__}.lesson_{name[:2]}"
    if importlib.util.find_spec(module):
        importlib.import_module(module)
    if name not in EXERCISES:
        raise ValueError(f"there is no exercise {name!r}")
    return EXERCISES[name]


# --- for the notebooks ---


def check(name: str, *answers) -> None:
    """Print whether an answer is right. A wrong answer is explained."""
    found = find(name)
    last[:] = [name]
    right.discard(name)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for answer in answers:
                done(answer)
            found.check(*answers, Draw())
        except NotDone:
            print("not done yet")
            return
        except Wrong as wrong:
            print(f"wrong: {wrong}\nTry again, or run {', '.join(after(found))}.")
            return
    right.add(name)
    print("right")


def solved(name: str) -> bool:
    """Whether the exercise was right when it was checked last."""
    return name in right


def after(found: Exercise) -> list[str]:
    return [*(f"hint({i})" for i in range(1, len(found.hints) + 1)), "solution()"]


def hint(n: int = 1) -> None:
    """Print the n-th hint for the exercise that was checked last."""
    hints = find(name_of_last()).hints
    if not 1 <= n <= len(hints):
        raise ValueError(f"{last[0]} has hints 1 to {len(hints)}, not {n}")
    print(hints[n - 1])


def solution() -> None:
    """Print a solution of the exercise that was checked last."""
    name = name_of_last()
    for file in sorted(Path("solutions").glob(f"{name[:2]}_*.ipynb")):  # next to the notebooks
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        for cell, then in itertools.pairwise(cells):
            is_solution = "solution" in cell["metadata"].get("tags", [])
            if is_solution and f'check("{name}"' in "".join(then["source"]):
                print("".join(cell["source"]))
                return
    print("The solutions are not in this folder: ask your teacher.")


def name_of_last() -> str:
    if not last:
        raise ValueError("first run a cell with check(…): hints are about its exercise")
    return last[0]


def claim(holds: bool, text: str) -> None:
    """Check a measured statement of the lesson.

    The build of the lessons raises AssertionError if it does not hold. In your copy, it is only a
    note, because another setting, seed or processor may change what is measured.
    """
    if not holds and os.environ.get("MINIPEFT_BUILD") == "1":
        raise AssertionError(text)
    if not holds:
        print(f"Note: the lesson says “{text}”. That does not hold in this run.")


# --- for the checks ---


def done(value):
    """A value that a student has given. Raises NotDone for None and for `...`."""
    if value is None or value is ...:
        raise NotDone
    return value


def call(function: Callable, *inputs, may_be_none: bool = False):
    """What a student's function returns for these inputs, which must not change."""
    kept = copy.deepcopy(inputs)
    try:
        got = function(*inputs)
        got = list(got) if hasattr(got, "__next__") else got
    except NotDone:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        # the last line of the student's own, and not of a library that it calls
        where = ([f for f in frames if not f.filename.startswith(LIBRARIES)] or frames)[-1]
        likely = f"\n  likely    {CLASSES}" if "target size" in str(error) else ""
        raise Wrong(
            f"{named(function)} raises {type(error).__name__}: {error}\n"
            f"  input     {show(kept)}\n  in line   {where.line or where.lineno}{likely}"
        ) from None
    for value, before in zip(inputs, kept, strict=True):
        if isinstance(value, Tensor | list | dict) and not is_close(value, before, 0):
            raise Wrong(f"{named(function)} changes its input {show(before)}: work on a copy")
    if got is None and not may_be_none and not is_stub(function):
        raise Wrong(f"{named(function)} returns None: is a `return` missing?")
    return got if may_be_none else done(got)


def is_stub(function: Callable) -> bool:
    """Whether the body of a function is still `...`."""

    def stub(): ...

    return getattr(function, "__code__", stub.__code__).co_code == stub.__code__.co_code


def expect(
    function: Callable, inputs: Iterable, expected, mistakes: dict | None = None,
    tolerance: float = 1e-5, may_be_none: bool = False,
) -> None:  # fmt: skip
    """Raise Wrong unless function(*inputs) is what is expected.

    mistakes: what a likely mistake would return, by the text that names it.
    """
    inputs = tuple(inputs)
    text = show(inputs)
    got = call(function, *inputs, may_be_none=may_be_none)
    compare(f"{named(function)}(…)", got, expected, text, mistakes, tolerance)


def compare(
    what: str, got, expected, inputs: str = "", mistakes: dict | None = None,
    tolerance: float = 1e-5,
) -> None:  # fmt: skip
    """Raise Wrong, with both values and the likely mistake, unless a value is as expected."""
    if is_close(got, expected, tolerance):
        return
    lines = [
        f"\n  likely    {text}"
        for text, value in (mistakes or {}).items()
        if is_close(got, value, tolerance)
    ]
    if not lines and isinstance(got, Tensor) and isinstance(expected, Tensor):
        try:
            same("it", got, expected, tolerance)
        except Wrong as symptom:  # a factor, another shape, transposed, …
            lines = [f"\n  symptom   {symptom}"]
    raise Wrong(
        what
        + (f"\n  input     {inputs}" if inputs else "")
        + f"\n  got       {show(got)}\n  expected  {show(expected)}"
        + "".join(lines[:1])
    )


def has_shape(what: str, got, expected: tuple[int, ...], inputs: str = "") -> None:
    """Raise Wrong unless a value is a tensor of this shape."""
    ensure(isinstance(got, Tensor), f"{what} must be a tensor, got {show(got)}")
    ensure(
        tuple(got.shape) == expected,
        f"{what} has the shape {tuple(got.shape)}, expected {expected}"
        + (f"\n  input     {inputs}" if inputs else ""),
    )


def a_pair(got) -> tuple:
    """Two values that a function returned together. Raises Wrong for anything else."""
    ensure(isinstance(got, tuple | list) and len(got) == 2, f"it must return two, got {show(got)}")
    return tuple(got)


def answered(got, right, mistakes: dict | None = None, otherwise: str = "") -> None:
    """Raise Wrong unless a single value is right. The right one is not printed.

    mistakes: texts by the wrong values that they explain.
    """
    if is_close(got, right, 1e-3):
        return
    if isinstance(got, str) and not isinstance(right, str):
        raise Wrong(f"{got!r} is a text: give a number, without quotation marks.")
    texts = [text for value, text in (mistakes or {}).items() if is_close(got, value, 1e-3)]
    raise Wrong(f"{show(got)}. {(texts or [otherwise])[0]}".strip())


def is_close(got, expected, tolerance: float) -> bool:
    """Whether two values are equal, numbers and tensors up to a relative tolerance. A list may be
    any sequence, and a number a tensor of one entry."""
    if isinstance(expected, Tensor):
        if not isinstance(got, Tensor) or got.shape != expected.shape:
            return False
        got, expected = got.detach().double(), expected.detach().double()
        largest = max(expected.abs().max().item() if expected.numel() else 0.0, 1e-6)
        return torch.allclose(got, expected, rtol=0, atol=tolerance * largest)
    if isinstance(got, Tensor):
        got = got.tolist()
    if isinstance(expected, str):
        return isinstance(got, str) and got.strip().lower() == expected.lower()
    if isinstance(expected, bool) or expected is None:
        return got is expected
    if isinstance(expected, int | float):
        is_number = isinstance(got, int | float) and not isinstance(got, bool)
        return is_number and math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance / 1e3)
    if isinstance(expected, dict):
        return (
            isinstance(got, dict)
            and got.keys() == expected.keys()
            and all(is_close(got[key], expected[key], tolerance) for key in expected)
        )
    if isinstance(expected, list | tuple):
        return (
            isinstance(got, list | tuple)
            and len(got) == len(expected)
            and all(is_close(a, b, tolerance) for a, b in zip(got, expected, strict=True))
        )
    return got == expected


def show(value) -> str:
    """A value in at most a line or so."""
    if isinstance(value, Tensor):
        numbers = [f"{x:.3g}" for x in value.detach().double().flatten()[:4].tolist()]
        shape = "×".join(str(n) for n in value.shape) or "scalar"
        return f"({shape}) [{', '.join(numbers)}{', …' if value.numel() > 4 else ''}]"
    if isinstance(value, tuple):
        return ", ".join(show(part) for part in value)
    if isinstance(value, float):
        return f"{value:.5g}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def named(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)
