"""The ledger of claims: it is complete, and no page states a measured number without a claim."""

import re
import statistics
from pathlib import Path

import pytest

from minipeft.data import claims
from minipeft.lab import DATA, compare, report

ROOT = DATA.parent
LEDGER = {claim["id"]: claim for claim in claims.load()}
RUNS = {
    task: compare.rows(compare.load(DATA / "results" / folder / "compare.json"))
    for task, folder in (("describe", "."), ("sentiment", "sentiment"))
}
# PROTOCOL.md has settings, LOG.md is a diary of dated entries, the other two are generated
TAGGED = ("README.md", "data/README.md", "data/results/README.md", "lessons/COMMANDS.md")
PAGES = [*(ROOT / page for page in TAGGED), *sorted((ROOT / "lessons" / "src").glob("*.py"))]


def prose(page: Path) -> list[str]:
    """The paragraphs of a page, or of the Markdown cells of a lesson's source."""
    text = page.read_text()
    if page.suffix == ".py":
        cells = re.split(r"^# %%", text, flags=re.M)
        cells = [cell.partition("\n")[2] for cell in cells if cell.startswith(" [markdown]")]
        text = "\n\n".join(re.sub(r"^# ?", "", cell, flags=re.M) for cell in cells)
        text = re.sub(r"\$[^$]*\$", "", text)  # formulas
        text = text.replace("90 %", "")  # a threshold, not a result: the score to be reached
    return list(claims.paragraphs(text))


def untold(paragraph: str) -> list[str]:
    """The measured numbers of a paragraph that none of its claims has."""
    told = [LEDGER[i]["claim"] + str(LEDGER[i]["interval"]) for i in claims.tags(paragraph)]
    return [n for n in claims.numbers(paragraph) if not any(n in text for text in told)]


def test_every_claim_is_complete():
    assert len(LEDGER) == len(claims.load()) >= 40
    for claim in LEDGER.values():
        assert claim["verdict"] in claims.VERDICTS, claim["id"]
        assert claim["claim"].endswith("."), claim["id"]
        assert claim["command"] or claim["verdict"] == "not tested", claim["id"]
        random = claim["verdict"] in ("differs", "no difference seen")
        assert not random or (claim["seeds"] >= 3 and claim["interval"]), claim["id"]


def paired(more: list, less: list, form: str = "+.2f") -> str:
    """The mean difference of scores and its 95 % t interval, as the ledger writes them."""
    gaps = [a.score - b.score for a, b in zip(more, less, strict=True)]
    middle, half = statistics.mean(gaps), report.interval(gaps)
    return "{} [{}, {}]".format(*(format(x, form) for x in (middle, middle - half, middle + half)))


def test_the_intervals_of_the_first_editions_claims_come_from_its_records():
    full, lora, adalora, qlora = (RUNS["describe"][m] for m in ("full", "lora", "adalora", "qlora"))
    assert f"LoRA {paired(lora, full)}" in LEDGER["lora-gap"]["interval"]
    assert f"AdaLoRA {paired(adalora, full)}" in LEDGER["lora-gap"]["interval"]
    assert paired(qlora, lora) in LEDGER["qlora-score"]["interval"]
    verdicts = RUNS["sentiment"]
    gap = paired(verdicts["p_tuning"], verdicts["prompt_tuning"])
    assert gap in LEDGER["p-tuning-sentiment"]["interval"]
    study = compare.load(DATA / "results" / "study.json")
    for name, steps, examples, form in (
        ("few-steps", 33, 400, "+.2f"),
        ("many-steps", 300, 400, "+.3f"),
        ("few-examples", 100, 50, "+.2f"),
    ):
        pair = [
            [r for r in study if (r.steps, r.n_train, r.method) == (steps, examples, method)]
            for method in ("lora", "full")
        ]
        assert paired(*pair, form) in LEDGER[name]["interval"], name


@pytest.mark.parametrize("check", sorted({c["check"] for c in LEDGER.values() if c["check"]}))
def test_the_test_that_checks_a_claim_exists(check):
    file, _, name = check.partition("::")
    assert f"\ndef {name}(" in (ROOT / file).read_text()


def test_the_page_of_claims_is_made_from_the_ledger():
    assert claims.page(claims.load()) == claims.PAGE.read_text(), "run python -m data.claims"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_states_no_measured_number_without_a_claim(page):
    for paragraph in prose(page):
        assert not untold(paragraph), f"no claim has this number: {paragraph[:200]}"


def test_every_claim_that_names_a_page_is_tagged_there():
    for page in TAGGED:
        tagged = {i for paragraph in prose(ROOT / page) for i in claims.tags(paragraph)}
        missing = {i for i, claim in LEDGER.items() if claim["where"] == page} - tagged
        assert not missing, f"{page} does not tag {missing}"


@pytest.mark.parametrize(
    "planted",
    [
        "LoRA forgets 0.42 more.",
        "It closes 97 % of it.",
        "It takes 1.5 times as long.",
        "- a gap of -0.3",
    ],
)
def test_a_planted_number_is_found(planted):
    assert untold(planted)
    assert not untold(f"`{planted}`"), "code is no claim"


def test_a_planted_number_is_found_in_a_tagged_paragraph_too():
    assert not untold("It ends 0.04 below LoRA. <!-- claim: qlora-score -->")
    assert untold("It ends 0.05 below LoRA. <!-- claim: qlora-score -->") == ["0.05"]
    assert untold("In arXiv 2405.09673 and with Python 3.10, as [here](a/0.5)") == []
