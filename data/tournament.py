"""The section "Better than LoRA?" of RESULTS.md: LoRA and its successors, each with the same grid.

LoRA's and full fine-tuning's runs are those of the experiment `forgetting` at the same number of
rates, decays and seeds.
"""

import statistics

from minipeft.lab import report

from .choosing import operating_points, points
from .experiments import EXPERIMENTS, WEIGHT_METHODS, load, missing
from .sections import at, fill, paired, with_interval

GRID = EXPERIMENTS["tournament"]
METHODS = ("full", "lora", *GRID.rates)
ONE_RATE = 0.0025  # LoRA's in the unfair comparison: a quarter of its best
ENOUGH = 0.9  # the score that the curves are asked for


def grid_rows() -> list[dict]:
    """The runs on the grid: five rates, three decays and three seeds for every method."""
    old = [
        row
        for row in load("forgetting")
        if row["method"] in ("full", "lora")
        and row["learning_rate"] in WEIGHT_METHODS[row["method"]]
        and row["decay"] in GRID.decays
    ]
    return old + load("tournament")


def grid_points() -> list[dict]:
    """The mean of each setting whose seeds have all been run."""
    return [p for p in points(grid_rows()) if p["seeds"] == len(GRID.seeds)]


def sensitivity(found: list[dict], method: str, slack: float = 0.05) -> tuple[int, int]:
    """Without decay: how many of a method's rates score at most `slack` less than its best one, and
    how many were tried."""
    scores = [p["score"] for p in found if p["method"] == method and not p["decay"]]
    return sum(score >= max(scores) - slack for score in scores), len(scores)


def unfair(found: list[dict]) -> dict[str, tuple[float, float]]:
    """For each successor its best score without decay, and its lead over LoRA at one fixed rate."""
    plain = [p for p in found if not p["decay"]]
    (lora,) = [p for p in plain if p["method"] == "lora" and p["learning_rate"] == ONE_RATE]
    best = {m: max(p["score"] for p in plain if p["method"] == m) for m in GRID.rates}
    return {m: (score, score - lora["score"]) for m, score in best.items()}


def steps_to(score: float, row: dict) -> int | None:
    """The first tenth step after which a run scored this much on validation examples."""
    reached = [10 * i for i, s in enumerate(row["scores"], 1) if s >= score]
    return reached[0] if reached else None


def shown(point: dict) -> list[str]:
    return [f"{point['score']:.3f}", f"{point['forgetting']:+.2f}"]


def grid_table(found: list[dict]) -> str:
    """Each method's operating points on the validation examples."""
    plain, decayed = (
        {p["method"]: p for p in operating_points(found, decay)} for decay in (False, True)
    )
    lines = []
    for method in METHODS:
        near, tried = sensitivity(found, method)
        lines.append([
            report.NAMES[method],
            f"{plain[method]['learning_rate']:g}", *shown(plain[method]),
            f"{decayed[method]['learning_rate']:g}, {decayed[method]['decay']:g}",
            *shown(decayed[method]), f"{near} of {tried}",
        ])  # fmt: skip
    head = ["method", "η, no decay", "score", "forgets", "η and ηλ, with decay", "score", "forgets",
            "rates within 0.05 of the best"]  # fmt: skip
    return report.markdown_table(head, lines)


def finals_table() -> str:
    """The operating points on test examples, minus LoRA, paired by seed."""
    found = grid_points()
    finals = {"lora": load("finals"), "full": load("finals")} | dict.fromkeys(
        GRID.rates, load("finals-tournament")
    )
    lines = []
    for decayed in (False, True):
        chosen = {p["method"]: p for p in operating_points(found, decayed)}
        lora = at(finals["lora"], chosen["lora"])
        for method in METHODS:
            mine = at(finals[method], chosen[method])
            if not mine or not lora:
                continue
            gaps = [
                "–" if method == "lora" else with_interval(paired(mine, lora, key), "+.3f")
                for key in ("score", "forgetting")
            ]
            lines.append([
                report.NAMES[method], "yes" if decayed else "no", len(mine),
                f"{statistics.mean(r['score'] for r in mine):.3f}", gaps[0],
                f"{statistics.mean(r['forgetting'] for r in mine):+.2f}", gaps[1],
            ])  # fmt: skip
    head = ["method", "decay", "seeds", "score", "minus LoRA", "forgets", "minus LoRA"]
    return report.markdown_table(head, lines)


def section() -> str:
    """Empty as long as runs are missing."""
    if missing("tournament"):
        return ""
    found = grid_points()
    text = f"""
## Better than LoRA?

Six methods whose papers report better results than LoRA's, on the 1M base and `describe`: rank 8
(VeRA 256), five learning rates a factor of two apart, three decays and three seeds for every
method, 100 steps, validation examples.

{grid_table(found)}
"""
    leads = ", ".join(f"{report.NAMES[m]} by {lead:+.2f}" for m, (_, lead) in unfair(found).items())
    text += "\n" + fill(
        f"An unfair comparison, for the record: LoRA at the one rate {ONE_RATE:g}, and each other "
        f"method at the best of its five rates. Then these are ahead: {leads}."
    )
    if not missing("finals-tournament"):
        text += f"\n\nOn test examples and new seeds:\n\n{finals_table()}"
    return text + "\n"
