"""Grade every known mistake and every right solution.

python -m tests.mistakes                  # the table of lessons/README.md
python -m tests.mistakes lora --messages  # what the grader says of each mistake in lora.py
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from minipeft.grader import METHODS
from minipeft.grader.grading import Result, grade_method
from minipeft.lab.report import markdown_table

from . import Variant, variants


def graded(method: str, variant: Variant) -> list[Result]:
    """The results of a variant's file."""
    with TemporaryDirectory() as folder:
        Path(folder, f"{method}.py").write_text(variant.source(method), encoding="utf-8")
        return grade_method(method, Path(folder), live=False)


def verdict(variant: Variant, results: list[Result]) -> tuple[bool, bool, Result | None]:
    """Whether a mistake was caught in its task (or a right solution accepted), whether the words
    name it, and the first wrong task."""
    first = next((r for r in results if r.status != "done"), None)
    if variant.task is None or first is None:
        return variant.task is None and first is None, False, first
    caught = first.status == "wrong" and first.task == variant.task
    return caught, caught and bool(variant.says) and variant.says in first.message, first


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", choices=[[], *METHODS])
    parser.add_argument("--messages", action="store_true", help="print every diagnosis")
    parser.add_argument("--only", default="", metavar="TEXT", help="those with this in their name")
    arguments = parser.parse_args()
    lines = []
    for method in arguments.methods or METHODS:
        counts = dict.fromkeys(("mistakes", "caught", "named", "right", "accepted"), 0)
        chosen = [v for v in variants(method) if arguments.only in v.name]
        for variant in tqdm(chosen, method, leave=False):
            ok, named, first = verdict(variant, graded(method, variant))
            kinds = ("right", "accepted") if variant.task is None else ("mistakes", "caught")
            counts[kinds[0]] += 1
            counts[kinds[1]] += ok
            counts["named"] += named
            if arguments.messages or not ok:
                said = f"{first.task}: {first.status} {first.message}" if first else "all done"
                print(f"{'' if ok else 'FAILED '}{variant.name}\n    {said}")
        lines.append([f"`{method}.py`", *counts.values()])
    head = ["file", "mistakes", "caught", "mistake named", "right solutions", "accepted"]
    print(markdown_table(head, lines))


if __name__ == "__main__":
    main()
