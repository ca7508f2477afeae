"""Grade the tests that students write: each must fail on a faulty file and pass on correct ones.

Like judge.py, this runs in a process of its own and reports over a pipe.
"""

import io
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .faults import FAULTS
from .judge import block_imports, load

ASSERTIONS = ("AssertionError", "Failed")  # Failed is what pytest.fail raises


@dataclass
class Outcome:
    """What pytest saw: a plugin of it."""

    broken: str = ""  # why the file could not be imported
    passed: list[str] = field(default_factory=list)
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)  # name: error type, text

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            lines = [line.removeprefix("E").strip() for line in str(report.longrepr).splitlines()]
            found = re.findall(r"line (\d+)", str(report.longrepr))
            self.broken = f"{lines[-1][:200]} (line {found[-1]})" if found else lines[-1][:200]

    def pytest_runtest_makereport(self, item, call) -> None:
        if call.excinfo is not None:
            text = str(call.excinfo.value).strip().splitlines() or [""]
            self.failed[item.name] = call.excinfo.type.__name__, text[0][:200]
        elif call.when == "call":
            self.passed.append(item.name)


def run_tests(file: Path, source: str, seed: int) -> Outcome:
    """Run a test file on a subject."""
    import pytest

    load("subject", source, str(file.with_name("subject.py")))
    for name in [n for n, m in sys.modules.items() if getattr(m, "__file__", None) == str(file)]:
        del sys.modules[name]  # so that it is imported again
    torch.manual_seed(seed)
    found, silent = Outcome(), io.StringIO()
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "--import-mode=importlib"]
    where = ["--rootdir", str(file.parent), "-c", os.devnull]
    with redirect_stdout(silent), redirect_stderr(silent):
        pytest.main([*options, *where, str(file)], plugins=[found])
    return found


def judge(number: str, file: Path) -> tuple[str, str]:
    """The status of a test file, and the message."""
    if not file.is_file():
        return "not done yet", ""
    faulty, *correct = FAULTS[number].sources()
    for i, source in enumerate(correct, 1):
        for seed in (0, 1):
            found = run_tests(file, source, seed)
            if found.broken:
                return "wrong", f"the test file cannot be imported: {found.broken}"
            if any(kind == "NotImplementedError" for kind, _ in found.failed.values()):
                return "not done yet", ""
            for name, (kind, text) in found.failed.items():
                return "wrong", f"{name} fails on correct file {i}: {kind} {text}"
            if not found.passed:
                return "not done yet", ""
    found = run_tests(file, faulty, 0)
    failed = found.failed
    if not failed:
        return "wrong", f"no test fails on faulty_{number}.py: {', '.join(found.passed)} passed"
    if not any(kind in ASSERTIONS for kind, _ in failed.values()):
        name, (kind, text) = next(iter(failed.items()))
        return "wrong", f"{name} fails on faulty_{number}.py, but by {kind} ({text}), not by an " \
               "assertion"  # fmt: skip
    return "done", ""


def grade(pipe, method: str, folder: str, level: str, seed: int, skip: list[str], given) -> None:
    """The work of a process: grade all tests but some, and report each result."""
    torch.set_num_threads(1)
    tasks = {f"fault {n}: {fault.title}": n for n, fault in FAULTS.items()}
    pipe.send(list(tasks))
    import pytest  # noqa: F401

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # one of them imports minipeft
    block_imports()
    pipe.send("")
    for task, number in tasks.items():
        if task not in skip:
            file = Path(folder, "catch", f"test_{number}.py").resolve()
            status, message = judge(number, file)
            pipe.send((task, {"status": status, "message": message}))
    pipe.send(None)
