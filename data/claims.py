"""The ledger: every claim with a measured number, where it stands, and what it rests on.

python -m data.claims  # claims.json -> CLAIMS.md

A claim has an id, its wording, the page where it stands, the command that measures it, the number
of seeds (0 if nothing is random), an interval or spread, a verdict, and the test that checks it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from minipeft.files import write_text
from minipeft.lab.report import markdown_table

FILE = Path(__file__).parent / "claims.json"
PAGE = FILE.with_name("CLAIMS.md")
VERDICTS = {
    "exact": "nothing is random: a test compares",
    "holds": "measured, and as claimed",
    "differs": "a difference that the seeds agree on",
    "no difference seen": "within the interval or spread that is given",
    "not tested": "not tested well enough to know",
    "withdrawn": "a claim of the first edition that its evidence does not support",
}
INTRODUCTION = """\
Written by `python -m data.claims` from `claims.json`. A page that states a claim has its id in an
HTML comment, which Markdown does not show. The column *seeds* is 0 where nothing is random, or
nothing was run. The test checks that a page shows what was measured. Only the command measures it
again. Point at a test's file to see the test's name. Claims from `compare`, `sweep` and `study` are
the first edition's: the 3M base, three seeds, learning rates chosen on validation examples, no
weight decay, and a test set of 200 examples that is not used any more."""
# A number with decimals, a share in percent, or a ratio: what a page must not state without a claim
MEASURED = re.compile(
    r"(?<![\w./-])(?<!Python )[-+]?\d+(?:\.\d+(?![\w.])|(?:\.\d+)? (?:%|times\b))"
)


def load() -> list[dict]:
    return json.loads(FILE.read_text())


def evidence(claim: dict) -> str:
    """Where a claim stands, its command, and its test. The test's name, too long for a table, is
    the title of a link to its file."""
    found = [claim["where"], f"`{claim['command']}`" if claim["command"] else "–", "–"]
    if claim["check"]:
        file, _, name = claim["check"].partition("::")
        found[2] = f'[{Path(file).name}](../{file} "{name}")'
    return "; ".join(found)


def page(claims: list[dict]) -> str:
    """CLAIMS.md."""
    parts = [
        "# The ledger of claims",
        INTRODUCTION,
    ]
    for verdict, meaning in VERDICTS.items():
        lines = [
            [f"`{c['id']}`", c["claim"], c["seeds"], c["interval"] or "–", evidence(c)]
            for c in claims
            if c["verdict"] == verdict
        ]
        head = ["id", "claim", "seeds", "interval or spread", "page; command; test"]
        parts += [f"## {verdict.capitalize()}: {meaning}", markdown_table(head, lines)]
    return "\n\n".join(parts) + "\n"


def paragraphs(text: str) -> Iterator[str]:
    """The prose of a Markdown page: no code, no tables, no figures."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for block in re.split(r"\n\s*\n|\n(?=- )", text):  # an item of a list is a paragraph too
        lines = [line for line in block.splitlines() if not line.startswith(("|", "    ", "!["))]
        if lines:
            yield " ".join(lines)


def numbers(paragraph: str) -> list[str]:
    """The measured numbers in a paragraph, without those in code, links and names of papers."""
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->|(arXiv )?\b\d{4}\.\d{5}\b", "", paragraph)
    return [number.lstrip("+") for number in MEASURED.findall(plain)]


def tags(paragraph: str) -> list[str]:
    """The ids of claims in the comments of a paragraph."""
    return [i for found in re.findall(r"<!-- claims?: (.*?) -->", paragraph) for i in found.split()]


if __name__ == "__main__":
    write_text(PAGE, page(load()))
    print(f"wrote {PAGE}")
