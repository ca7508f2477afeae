"""Grade the files in a folder: run each level in a process of its own, and report a line per task.

The processes share one that has imported torch, where the platform can fork. Each has a time limit.
A task whose result does not arrive is wrong: an exit status proves nothing.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

from tqdm import tqdm

from . import TASKS, catching, judge, skeleton, values
from .judge import LEVELS

SECONDS = 30  # that a task may take at least
TITLES = {
    "pieces": "the pieces", "layer": "the whole", "values": "the libraries' numbers",
    "losses": "training", "tests": "tests that catch a fault",
}  # fmt: skip
FACTOR = 10  # how many times as long as the reference needs for the whole level


@dataclass
class Result:
    """What a task's line says."""

    method: str
    level: str
    task: str
    status: str  # "done", "not done yet", "wrong" or "blocked"
    message: str = ""
    printed: str = ""  # by the student's code

    def text(self) -> str:
        return f"{self.status}{': ' if self.status == 'wrong' else ' '}{self.message}".strip()

    def line(self, number: int) -> str:
        lines = [f"{number:4d} {self.task:<54} {self.text()}"]
        if self.status == "wrong":
            lines += [f"      printed: {line}" for line in self.printed.splitlines()[-3:]]
        return "\n".join(lines)


def context():
    """A way to start processes: from one that has imported torch, where the platform can fork."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    found = get_context("forkserver")
    found.set_forkserver_preload(["minipeft.grader.preload"])
    return found


class Level:
    """A level's process."""

    def __init__(self, method: str, folder: Path, level: str, seed: int, skip=(), given=None):
        self.pipe, other = context().Pipe()
        args = other, method, str(folder), level, seed, list(skip), given
        work = catching.grade if method == "catch" else judge.grade
        self.process = context().Process(target=work, args=args, daemon=True)
        self.process.start()
        other.close()

    def receive(self, until: float):
        """The next message. Raises TimeoutError or EOFError if there is none."""
        if not self.pipe.poll(max(until - time.monotonic(), 0)):
            raise TimeoutError
        return self.pipe.recv()

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run_level(
    method: str, folder: Path, level: str, seed: int, given=None, seconds: float = SECONDS
) -> list[Result]:
    """Grade one level. A task that ends its process, or takes too long, is wrong; the others are
    graded in a new process."""
    found: dict[str, Result] = {}
    bar = tqdm(desc=f"{method}, {TITLES[level]}", leave=False, disable=None, unit=" tasks")
    while True:
        run = Level(method, folder, level, seed, found, given)
        until, task = time.monotonic() + 600, ""  # importing torch may take long on a cold disk
        try:
            tasks = run.receive(until)
            until = time.monotonic() + seconds
            fault = run.receive(until)
            if fault:
                return not_imported(method, level, tasks, fault)
            remaining = iter([task for task in tasks if task not in found])
            while (task := next(remaining, None)) is not None:
                name, result = run.receive(until)
                if name != task:
                    raise EOFError
                found[task] = Result(method, level, task, **result)
                until = time.monotonic() + seconds
                bar.update()
            bar.close()
            return list(found.values())
        except (TimeoutError, EOFError, OSError) as error:
            run.process.join(0.5)
            message = f"the process ended before the check did (status {run.process.exitcode})"
            if isinstance(error, TimeoutError):
                message = f"takes longer than {seconds:.0f} s"
            if not task:  # the file did not even finish importing
                return not_imported(method, level, tasks, message)
            found[task] = Result(method, level, task, "wrong", message)
        finally:
            run.close()


def not_imported(method: str, level: str, tasks: list[str], fault: str) -> list[Result]:
    """The results if the file cannot even be imported: the first one says why."""
    rest = [Result(method, level, task, "blocked", "by importing the file") for task in tasks[1:]]
    return [Result(method, level, tasks[0], "wrong", f"importing the file: {fault}"), *rest]


def limit(method: str, level: str, seed: int, given=None) -> float:
    """Seconds for a task: ten times what the reference needs here for all, and at least 30."""
    start = time.monotonic()
    run_level(method, skeleton.reference(method).parent, level, seed, given)
    return max(SECONDS, FACTOR * (time.monotonic() - start))


def file_of(method: str) -> str:
    """What a student writes: a file, or a folder of tests."""
    return method if method == "catch" else f"{method}.py"


def grade_method(method: str, folder: Path, seed: int = 0, live: bool = True) -> list[Result]:
    """The results of all tasks of a method, level by level."""
    if not (folder / file_of(method)).exists():
        raise ValueError(
            f"{folder} has no {file_of(method)}: python -m minipeft build start {method} {folder}"
        )
    if method == "catch":
        return run_level(method, folder, "tests", seed)
    results: list[Result] = []
    for level in LEVELS:
        given = live_values(method, seed) if live and level == "values" else None
        found = run_level(method, folder, level, seed, given)
        if any("takes longer than" in r.message for r in found):
            seconds = limit(method, level, seed, given)
            if seconds > SECONDS:
                found = run_level(method, folder, level, seed, given, seconds)
        results += blocked(found, results)
    return results


def live_values(method: str, seed: int) -> dict | None:
    """Values that the installed libraries compute now, in a process of their own; None if they are
    not installed, or fail: then the stored values are used."""
    if not values.installed(method):
        return None
    pipe, other = context().Pipe()
    process = context().Process(target=values.send, args=(other, method, seed + 1), daemon=True)
    process.start()
    found = pipe.recv() if pipe.poll(120) else "no answer"
    process.kill()
    return found if isinstance(found, dict) else None


def blocked(found: list[Result], earlier: list[Result]) -> list[Result]:
    """A later level's failures do not count as wrong while a piece is missing or wrong."""
    open_pieces = [r for r in earlier if r.level == "pieces" and r.status != "done"]
    for result in found:
        if result.status == "wrong" and open_pieces:
            result.status, result.message = "blocked", f"by {open_pieces[0].task}"
    return found


def check(
    folder: Path, methods: Iterable[str] = (), seed: int = 0, live: bool = True
) -> list[Result]:
    """Grade the files in a folder (all that are there, or these), and print a line per task."""
    chosen = list(methods) or [task for task in TASKS if (folder / file_of(task)).exists()]
    for method in chosen:
        if method not in TASKS:
            raise ValueError(f"there is no {method!r:.100} to check; there are {', '.join(TASKS)}")
    if not chosen:
        raise ValueError(f"{folder} has none of {', '.join(map(file_of, TASKS))}")
    everything = []
    for method in chosen:
        results = grade_method(method, folder, seed, live)
        print(f"{method}: {folder / file_of(method)}")
        for number, result in enumerate(results, 1):
            if number == 1 or result.level != results[number - 2].level:
                print(TITLES[result.level])
            print(result.line(number))
        print(f"{summary(results)}\n")
        everything += results
    return everything


def summary(results: list[Result]) -> str:
    done = sum(r.status == "done" for r in results)
    text = f"{done} of {len(results)} done"
    following = next((r for r in results if r.status in ("wrong", "not done yet")), None)
    if following is None or following.level != "pieces":
        return text
    return f"{text}. A hint: python -m minipeft build hint {following.method} {following.task}"
