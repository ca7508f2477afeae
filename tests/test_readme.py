"""The README's statements about the repository are true."""

import re

from minipeft.lab import DATA


def test_everything_in_the_table_of_claims_exists():
    """Every test, file and lesson that the README's table of claims points to."""
    root = DATA.parent
    table = (root / "README.md").read_text().split("## Claims and systems")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 30
    tests = "".join(path.read_text() for path in (root / "tests").glob("test_*.py"))
    lessons = {path.name[:2] for path in (root / "lessons" / "src").glob("*.py")}
    for line in lines:
        evidence = line.split("|")[3]
        assert evidence.strip()
        for name in re.findall(r"`([^` ]+)`", line):
            if name.startswith("test_"):
                assert f"def {name}(" in tests, name
            elif "/" in name:
                assert (root / name).exists(), name
        for first, last in re.findall(r"lessons? (\d\d)(?: to (\d\d))?", evidence):
            assert {first, last or first} <= lessons, line
