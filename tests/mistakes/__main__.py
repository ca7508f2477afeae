"""Grade every known mistake and every right solution, in one process and with stored values.

python -m tests.mistakes                  # the table of lessons/README.md: about two minutes
python -m tests.mistakes lora --messages  # the diagnosis of each mistake in lora.py
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from minipeft.grader import METHODS, judge
from minipeft.lab.report import markdown_table

from . import Variant, variants


@dataclass
class Verdict:
    """The grader's verdict on a variant."""

    task: str | None  # the first that is not done; None: all are
    status: str
    message: str
    ok: bool  # a mistake is wrong in its task; of a right solution, everything is done
    named: bool  # the message has the words that name the mistake


def prepared(method: str) -> dict:
    """A method's checks by level, ready to be used."""
    module = judge.checks_of(method)
    for level in judge.LEVELS:
        module.prepare(level, None)
    return module.CHECKS.found


def verdict(method: str, variant: Variant, levels: dict) -> Verdict:
    """Grade a variant's file up to the first task that is not done."""
    with TemporaryDirectory() as folder:
        Path(folder, f"{method}.py").write_text(variant.source(method), encoding="utf-8")
        found = judge.Judge(method, Path(folder), 0)
        found.open()
    for level in judge.LEVELS:
        for task, check in levels[level].items():
            result = found.result(task, check)
            if result["status"] != "done":
                status, message = result["status"], result["message"]
                ok = task == variant.task and status == "wrong"
                return Verdict(task, status, message, ok, ok and bool(variant.says)
                               and variant.says in message)  # fmt: skip
    return Verdict(None, "done", "", variant.task is None, False)


def counts(method: str, only: str = "", messages: bool = False) -> list[int]:
    """Mistakes, caught, named, right solutions, accepted. Prints what went wrong."""
    chosen = [variant for variant in variants(method) if only in variant.name]
    levels, found = prepared(method), [0] * 5
    for variant in tqdm(chosen, method, leave=False, disable=None):
        said, first = verdict(method, variant, levels), 0 if variant.task else 3
        found[first] += 1
        found[first + 1] += said.ok
        found[2] += said.named
        if messages or not said.ok:
            print(f"{'' if said.ok else 'FAILED '}{variant.name}")
            print(f"    {said.task}: {said.status} {said.message}" if said.task else "    all done")
    return found


def table(methods=METHODS, only: str = "", messages: bool = False) -> str:
    torch.set_num_threads(1)
    head = ["file", "mistakes", "caught", "mistake named", "right solutions", "accepted"]
    return markdown_table(head, [[f"`{m}.py`", *counts(m, only, messages)] for m in methods])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", help=f"from {', '.join(METHODS)}; or else all")
    parser.add_argument("--messages", action="store_true", help="print every diagnosis")
    parser.add_argument("--only", default="", metavar="TEXT", help="those with this in their name")
    arguments = parser.parse_args()
    if unknown := set(arguments.methods) - set(METHODS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    print(table(arguments.methods or METHODS, arguments.only, arguments.messages))
