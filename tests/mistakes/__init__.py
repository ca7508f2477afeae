"""Known mistakes and differently written correct solutions, to test the grader with.

Each is a method's reference file with some text replaced. `python -m tests.mistakes` grades all of
them and prints what was caught, and with which words.
"""

import importlib
from dataclasses import dataclass

from minipeft.grader import skeleton


@dataclass(frozen=True)
class Variant:
    """A file: the reference with some texts replaced."""

    name: str
    changes: tuple[tuple[str, str], ...]
    task: str | None = None  # the first one that must be wrong; None: everything is right
    says: str = ""  # a part of the diagnosis

    def source(self, method: str) -> str:
        text = skeleton.reference(method).read_text(encoding="utf-8")
        for old, new in self.changes:
            assert text.count(old) == 1, f"{method}, {self.name}: {text.count(old)} times {old!r}"
            text = text.replace(old, new)
        return text


def mistake(name: str, task: str, says: str, *changes: tuple[str, str]) -> Variant:
    return Variant(name, changes, task, says)


def right(name: str, *changes: tuple[str, str]) -> Variant:
    return Variant(name, changes)


def variants(method: str) -> list[Variant]:
    return importlib.import_module(f"{__name__}.{method}").VARIANTS
