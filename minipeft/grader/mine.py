"""`pytest --mine FOLDER` runs this file: every task of the grader is a test."""

from pathlib import Path

import pytest

from . import TASKS, grading


def pytest_generate_tests(metafunc):
    """Grade what is in the folder."""
    folder = Path(metafunc.config.option.mine)
    there = [task for task in TASKS if (folder / grading.file_of(task)).exists()]
    if not there:
        raise pytest.UsageError(f"{folder} has none of {', '.join(map(grading.file_of, TASKS))}")
    results = [result for task in there for result in grading.grade_method(task, folder)]
    ids = [f"{result.method}: {result.task}" for result in results]
    metafunc.parametrize("result", results, ids=ids)


def test_mine(result):
    if result.status != "done":
        pytest.fail(result.text(), pytrace=False)
