"""Grade one level of one file. This runs in a process of its own: the file is a student's.

The process reports over a pipe: the names of its tasks, that the file was imported, and then each
result. Nothing counts that was not reported.
"""

import ast
import importlib
import io
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from . import skeleton
from .symptoms import Draw, Wrong

LEVELS = ("pieces", "layer", "values", "losses")
BLOCKED = ("minipeft", "peft", "bitsandbytes")  # what a student's file must not import


@dataclass
class Checks:
    """The checks of a method by level, from easy to hard."""

    method: str
    found: dict[str, dict[str, Callable]] = field(default_factory=lambda: {n: {} for n in LEVELS})

    def add(self, level: str, name: str):
        """A decorator: this function is the check of that name. It takes the module, and raises
        Wrong. A piece is named after its hole."""

        def register(function: Callable) -> Callable:
            self.found[level][name] = function
            return function

        return register


def checks_of(method: str) -> ModuleType:
    """The module with a method's CHECKS, and `prepare`."""
    return importlib.import_module(f"minipeft.grader.checks.check_{method}")


class NoImport:
    """Refuses to import the packages that have the answer."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"importing {name} is blocked: the file must not need it")


def block_imports() -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in BLOCKED:
            del sys.modules[name]
    sys.meta_path.insert(0, NoImport)


def load(name: str, code: str | ast.Module, file: str) -> ModuleType:
    """Run source text as a module."""
    module = ModuleType(name)
    module.__file__ = file
    sys.modules[name] = module  # dataclasses look there
    exec(compile(code, file, "exec"), module.__dict__)
    return module


def attempt(check: Callable, module: ModuleType, seed: int) -> tuple[BaseException | None, str]:
    """What a check raises on a module, and what was printed."""
    printed = io.StringIO()
    torch.manual_seed(seed)
    try:
        with redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch: what counts is the result
            check(module, Draw(seed))
    except (Exception, SystemExit) as error:
        return error, printed.getvalue()
    return None, printed.getvalue()


def describe(error: BaseException, file: str) -> str:
    """An error in a line, with the last line of the student's file that led to it."""
    if isinstance(error, Wrong):
        return str(error)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines, text = [error.lineno], error.msg
    where = f" (line {lines[-1]} of {Path(file).name})" if lines else ""
    case = f", {error.case}" if hasattr(error, "case") else ""
    return f"{type(error).__name__}{case}: {text[:300]}{where}"


class Judge:
    """A student's file, and the checks of a method."""

    def __init__(self, method: str, folder: Path, seed: int):
        self.method, self.seed, self.wrong = method, seed, []
        self.file = str(folder / f"{method}.py")
        self.holes = {hole.name: hole for hole in skeleton.load(method)[0]}
        with open(self.file, encoding="utf-8") as opened:
            self.source = opened.read()

    def open(self) -> None:
        """Import the file. Raises whatever it raises."""
        self.tree = ast.parse(self.source, self.file)
        self.student = load(self.method, self.source, self.file)

    def whose(self, error: BaseException | None) -> str | None:
        """The hole that raised this NotImplementedError."""
        if isinstance(error, NotImplementedError):
            return next((n for n, h in self.holes.items() if h.equation in str(error)), None)
        return None

    def result(self, name: str, check: Callable) -> dict:
        """Grade with the whole file, and then, for a piece, inside the reference."""
        error, printed = attempt(check, self.student, self.seed)
        if error is not None and name in self.holes:
            status, message = self.piece(name, check, error)
        elif error is None:
            status, message = "done", ""
        elif blocker := self.whose(error):
            status, message = "blocked", f"by {blocker}"
        else:
            status, message = "wrong", describe(error, self.file)
        if status == "wrong":
            self.wrong.append(name)
        return {"status": status, "message": message, "printed": printed}

    def piece(self, name: str, check: Callable, outer: BaseException) -> tuple[str, str]:
        """Status and message of a piece that fails in the student's file."""
        tree = skeleton.tree_with(self.method, self.tree, self.holes[name].symbol)
        if tree is None:
            return "wrong", f"there is no {self.holes[name].symbol}"
        try:
            inner, _ = attempt(check, load(f"{self.method}_inside", tree, self.file), self.seed)
        except Exception as error:
            inner = error
        if inner is None:
            return "done", ""
        if self.whose(inner) == name:
            return "not done yet", ""
        if isinstance(inner, Wrong):
            return "wrong", describe(inner, self.file)
        # It does not fit into the reference, which may keep its matrices in another way: what
        # counts is the student's own file, once the other pieces are right.
        if blocker := self.whose(outer) or next(iter(self.wrong), None):
            return "blocked", f"by {blocker}"
        return "wrong", describe(outer, self.file)


def grade(pipe, method: str, folder: str, level: str, seed: int, skip: list[str], given) -> None:
    """The work of a process: grade a level except some tasks, and report each result."""
    torch.set_num_threads(1)
    module = checks_of(method)
    checks = module.CHECKS.found[level]
    pipe.send(list(checks))
    module.prepare(level, given)
    judge = Judge(method, Path(folder), seed)
    block_imports()
    try:
        with redirect_stdout(io.StringIO()):
            judge.open()
    except (Exception, SystemExit) as error:
        pipe.send(describe(error, judge.file))
        return
    pipe.send("")
    for name, check in checks.items():
        if name not in skip:
            pipe.send((name, judge.result(name, check)))
    pipe.send(None)
