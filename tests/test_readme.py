"""What the README says of the repository is so."""

import re

from minipeft.lab import tasks


def test_what_the_table_of_claims_names_exists():
    """Each test, file, lesson and command that the README's table of claims points to."""
    root = tasks.DATA.parent
    table = (root / "README.md").read_text().split("## Claims and systems")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 30
    tests = "".join(path.read_text() for path in (root / "tests").glob("test_*.py"))
    lessons = {path.name[:2] for path in (root / "lessons" / "src").glob("*.py")}
    for line in lines:
        shown = line.split("|")[3]
        assert shown.strip()
        for name in re.findall(r"`([^` ]+)`", line):
            if name.startswith("test_"):
                assert f"def {name}(" in tests, name
            elif "/" in name:
                assert (root / name).exists(), name
        for first, last in re.findall(r"lessons? (\d\d)(?: to (\d\d))?", shown):
            assert {first, last or first} <= lessons, line
