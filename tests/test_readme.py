"""What the front page and the pages next to it say about the repository is true."""

import re

import pytest

from minipeft.data import overview
from minipeft.lab import DATA

ROOT = DATA.parent
README = (ROOT / "README.md").read_text()
FOLDERS = (ROOT / "data", ROOT / "data" / "results", ROOT / "lessons")
PAGES = [
    "README.md",
    "README.tr.md",
    *(str(p.relative_to(ROOT)) for f in FOLDERS for p in f.glob("*.md")),
]


def anchors(text: str) -> set[str]:
    """The names of a page's headings in links, as code hosts make them."""
    heads = re.findall(r"^#+ (.+)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = (ROOT / page).parent / file if file else ROOT / page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_no_table_is_wider_than_a_page_of_a_code_host(page):
    """There a page of text has 838 pixels. A column is at least as wide as its longest word."""
    text = re.sub(r"<!--.*?-->", "", (ROOT / page).read_text(), flags=re.S)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        shown = re.sub(r"\]\([^)]*\)|[`*\[]", "", table)
        cells = (re.split(r"(?<!\\)\|", line)[1:-1] for line in shown.splitlines())
        words = [re.split(r"[\s/-]", " ".join(column)) for column in zip(*cells, strict=True)]
        width = sum(27 + 8 * max(map(len, column)) for column in words)
        assert width <= 838, (width, table[:80])


def test_the_readme_is_short_and_its_first_screen_has_the_commands_and_the_lessons():
    lines = README.splitlines()
    assert len(lines) <= 160
    first = "\n".join(lines[:30])
    for needed in ("python -m minipeft compare", "&& pytest", "overview.png", "02_lora.ipynb"):
        assert needed in first


def test_the_readme_counts_the_lines_of_each_file():
    table = README.split("## The methods")[1].split("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if "methods/" in line]
    assert len(rows) == 14
    for row in rows:
        files = re.findall(r"\((minipeft/[^)]+)\)", row[2])
        counted = [len((ROOT / file).read_text().splitlines()) for file in files]
        assert row[3].strip() == ", ".join(map(str, counted)), files


def test_the_readme_shows_the_table_of_the_committed_runs():
    assert overview.readme() == README, "run python -m data.results"


def rows(page: str, heading: str) -> list[tuple[list[str], list[str]]]:
    """The links and the numbers in each row of the table below a heading."""
    table = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    return [
        (re.findall(r"\]\(([^)]+)\)", line), re.findall(r"\b\d+\b", re.sub(r"\([^)]*\)", "", line)))
        for line in lines
    ]


def test_the_turkish_page_has_the_links_and_numbers_of_the_english_one():
    turkish = (ROOT / "README.tr.md").read_text()
    assert rows(turkish, "Yöntemler") == rows(README, "The methods")
    first, theirs = (page.split("\n## ")[0] for page in (README, turkish))
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) for text in (first, theirs)]
    assert links[0] - links[1] == {"README.tr.md", "#use-it-like-peft"}
    assert links[1] - links[0] == {"README.md", "README.md#use-it-like-peft"}
    command = re.compile(r"^pip install.*$", re.M)
    assert command.findall(first) == command.findall(theirs)
    lessons = (ROOT / "lessons" / "README.md").read_text()
    links = [link[0] for link, _ in rows(turkish, "Dersler")]
    assert links == [
        f"lessons/{name}" for name in re.findall(r"^\| \[\d\d\]\((.*?)\)", lessons, re.M)
    ]
    english = {word for line in re.findall(r"^\| ([^|]+) \|", lessons.split("## Glossary")[1], re.M)
               for word in line.split(", ")}  # fmt: skip
    words = re.findall(r"^\| ([^|]+) \|", turkish.split("## Sözlük")[1], re.M)[2:]
    known = {*english, "embedding", "fine-tuning", "gradient checkpointing", "layer", "prompt"}
    known |= {"learning rate", "loss"}
    for word in (part for line in words for part in line.split(", ")):
        assert any(word in e or e.startswith(word[:8]) for e in known), word


def test_everything_in_the_table_of_the_survey_exists():
    """Every test, file and lesson that this table points to."""
    lines = [s for s in (ROOT / "data" / "SURVEY.md").read_text().splitlines() if s[:2] == "| "][1:]
    assert len(lines) > 30
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    lessons = {path.name[:2] for path in (ROOT / "lessons" / "src").glob("*.py")}
    for line in lines:
        evidence = line.split("|")[3]
        assert evidence.strip()
        for name in re.findall(r"[`\"]([^`\" ]+)[`\"]", line):
            if name.startswith("test_"):
                assert f"def {name}(" in tests, name
            elif "/" in name:
                assert (ROOT / name).exists(), name
        for first, last in re.findall(r"lessons? (\d\d)(?: to (\d\d))?", evidence):
            assert {first, last or first} <= lessons, line
