"""Build it yourself: skeletons of the method files, and a grader for what students write in them.

>>> from minipeft import grader
>>> grader.start("lora", "my")  # writes my/lora.py, with holes
>>> grader.check("my", "lora")  # a line per task

The same on the command line: `python -m minipeft build start lora my`, `… build check my lora`.
"""

from pathlib import Path

# In the order of the lessons.
METHODS = (
    "training", "lora", "prompt_tuning", "prefix_tuning", "qlora", "dora", "vera", "ia3", "pissa"
)  # fmt: skip
TASKS = (*METHODS, "catch")  # the second track: tests that catch a fault


def start(method: str, folder: str | Path) -> Path:
    """Write the student's file of a method into a folder; for "catch", faulty files and tests.

    Raises ValueError if it exists.
    """
    from . import faults, skeleton

    return faults.start(Path(folder)) if method == "catch" else skeleton.start(method, Path(folder))


def hint(method: str, task: str | int, number: int = 1) -> str:
    """One of three hints for a task, which is given by its name or by its number."""
    from . import skeleton

    return skeleton.hint(method, str(task), number)


def check(folder: str | Path, *methods: str, **options) -> list:
    """Grade the files in a folder, print a line per task, and return the results."""
    from . import grading

    return grading.check(Path(folder), methods, **options)
