"""python -m minipeft.grader.lessons NAME FILE: check the answers that a Python file defines."""

import inspect
import sys
from pathlib import Path

from . import check, find, solved

if len(sys.argv) != 3:
    sys.exit("usage: python -m minipeft.grader.lessons NAME FILE   (NAME: 02.merge, for example)")
name, file = sys.argv[1:]
try:
    *names, _ = inspect.signature(find(name).check).parameters  # of the answers, then `draw`
    answers: dict = {}
    exec(compile(Path(file).read_text(encoding="utf-8"), file, "exec"), answers)
except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
check(name, *(answers.get(answer) for answer in names))
sys.exit(0 if solved(name) else 1)
