"""`python -m minipeft build …`: the options of its commands, and what they do.

torch is imported only to do work: minipeft.files needs it.
"""

import argparse
import hashlib
import hmac
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

from . import METHODS, TASKS, hint, start

COMMANDS = {
    "start": "write a skeleton: a file with holes, to be filled in",
    "check": "grade the files in a folder, a line per task",
    "hint": "hints for a task; they cost nothing",
    "export": "a student's own variant: skeletons, and a seed for other numbers",
}
VARIANT = "variant.json"


def add_parsers(parser: argparse.ArgumentParser) -> None:
    """Add the commands to the parser of `build`."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    add = {
        name: commands.add_parser(name, help=text, description=text.capitalize())
        for name, text in COMMANDS.items()
    }
    add["start"].add_argument("file", choices=TASKS, help="what to write yourself")
    add["start"].add_argument("folder", help="where to write it")
    add["check"].add_argument("folder", help="where the files are")
    add["check"].add_argument("file", nargs="*", help=f"from {', '.join(TASKS)}; or else all")
    add["check"].add_argument("--json", help="write the results in Gradescope's format")
    add["check"].add_argument("--junit", help="write the results as JUnit XML")
    add["check"].add_argument("--stored", action="store_true", help="compare with stored values of "
                              "peft and bitsandbytes, also where they are installed")  # fmt: skip
    add["hint"].add_argument("file", choices=METHODS)
    add["hint"].add_argument("task", help="its number or name")
    add["hint"].add_argument("number", nargs="?", type=int, default=1, choices=(1, 2, 3),
                             help="which of the three hints (default: 1)")  # fmt: skip
    add["export"].add_argument("folder", help="where to write it")
    add["export"].add_argument("file", nargs="*", help=f"from {', '.join(TASKS)}; or else all")
    for name in ("check", "export"):
        required = name == "export"
        add[name].add_argument("--secret", help="the teacher's secret", required=required)
        add[name].add_argument("--student", help="the student's name or number", required=required)


def run(args) -> None:
    """Run a command."""
    globals()[f"_{args.action}"](args)


def seed_of(secret: str, student: str) -> int:
    """A student's seed: nobody can compute it without the secret."""
    return int(hmac.new(secret.encode(), student.encode(), hashlib.sha256).hexdigest()[:12], 16)


def _start(args) -> None:
    file = start(args.file, args.folder)
    what = "Write the tests" if args.file == "catch" else "Fill its holes"
    print(f"wrote {file}. {what}, then: python -m minipeft build check {args.folder} {args.file}")


def _hint(args) -> None:
    print(hint(args.file, args.task, args.number))


def _export(args) -> None:
    from minipeft.files import write_text

    files = args.file or TASKS
    for name in files:
        print(f"wrote {start(name, args.folder)}")
    variant = {"student": args.student, "seed": seed_of(args.secret, args.student)}
    write_text(Path(args.folder) / VARIANT, json.dumps(variant) + "\n")
    print(f"wrote {Path(args.folder) / VARIANT}")


def variant_of(args) -> int:
    """The seed of the grading: from the teacher's secret, or from the folder's variant, or 0."""
    if (args.secret is None) != (args.student is None):
        raise ValueError("--secret and --student must be given together")
    if args.secret is not None:
        return seed_of(args.secret, args.student)
    from minipeft.files import read_json

    file = Path(args.folder) / VARIANT
    seed = read_json(file).get("seed") if file.is_file() else 0
    if not isinstance(seed, int) or not 0 <= seed < 2**48:
        raise ValueError(f"{file} has no valid seed, got {seed!r:.100}")
    return seed


def _check(args) -> None:
    from minipeft.files import write_text

    from .grading import check

    results = check(Path(args.folder), args.file, variant_of(args), live=not args.stored)
    if args.json:
        write_text(Path(args.json), json.dumps(gradescope(results), indent=1) + "\n")
    if args.junit:
        write_text(Path(args.junit), junit(results))
    if any(result.status != "done" for result in results):
        sys.exit(1)


def gradescope(results) -> dict:
    """The results in the format of a Gradescope autograder: a point per task."""
    return {
        "tests": [
            {
                "name": f"{result.method}: {result.task}",
                "score": float(result.status == "done"),
                "max_score": 1.0,
                "status": "passed" if result.status == "done" else "failed",
                "output": result.text(),
            }
            for result in results
        ]
    }


def junit(results) -> str:
    """The results as JUnit XML: a test case per task."""
    failed = [result for result in results if result.status != "done"]
    root = ElementTree.Element(
        "testsuite", name="minipeft build", tests=str(len(results)), failures=str(len(failed))
    )
    for result in results:
        case = ElementTree.SubElement(root, "testcase", classname=result.method, name=result.task)
        if result.status != "done":
            ElementTree.SubElement(case, "failure", message=result.text())
    return ElementTree.tostring(root, encoding="unicode") + "\n"
