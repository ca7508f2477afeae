"""python -m minipeft.grader.lessons NAME FILE: check the answers that a Python file defines."""

import inspect
import sys
from pathlib import Path

from . import check, find, solved


def main() -> None:
    """Exits with 0 if the answer is right, and with 1 if not."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m minipeft.grader.lessons NAME FILE   (NAME: 02.merge, …)")
    name, file = sys.argv[1:]
    try:
        *names, _ = inspect.signature(find(name).check).parameters  # the answers, then `draw`
        answers: dict = {}
        exec(compile(Path(file).read_text(encoding="utf-8"), file, "exec"), answers)
    except Exception as error:  # the file is a student's
        sys.exit(f"error: {error}")
    check(name, *(answers.get(answer) for answer in names))
    sys.exit(0 if solved(name) else 1)


if __name__ == "__main__":
    main()
