"""The section "Better than LoRA?" of RESULTS.md: LoRA and its successors on one grid."""

import math
import statistics

from minipeft.lab import report

from .choosing import operating_points, points
from .experiments import EXPERIMENTS, load, missing
from .sections import at, fill, paired, with_interval

GRID = EXPERIMENTS["tournament"]
METHODS = tuple(GRID.rates)
ONE_RATE = 0.0025  # LoRA's in the unfair comparison: a quarter of its best
ENOUGH = 0.9  # the score that the curves are asked for


def grid_points() -> list[dict]:
    """The mean of each setting whose seeds have all been run."""
    return [p for p in points(load("tournament")) if p["seeds"] == len(GRID.seeds)]


def sensitivity(found: list[dict], method: str, slack: float = 0.05) -> tuple[int, int]:
    """Without decay: how many of a method's rates score at most `slack` less than its best one, and
    how many were tried."""
    scores = [p["score"] for p in found if p["method"] == method and not p["decay"]]
    return sum(score >= max(scores) - slack for score in scores), len(scores)


def unfair(found: list[dict]) -> dict[str, tuple[float, float]]:
    """For each successor its best score without decay, and its lead over LoRA at one fixed rate."""
    plain = [p for p in found if not p["decay"]]
    (lora,) = [p for p in plain if p["method"] == "lora" and p["learning_rate"] == ONE_RATE]
    best = {m: max(p["score"] for p in plain if p["method"] == m) for m in METHODS[2:]}
    return {m: (score, score - lora["score"]) for m, score in best.items()}


def steps_to(score: float, row: dict) -> int | None:
    """After how many steps, in steps of 20, a run scored this much on validation examples."""
    reached = [20 * i for i, s in enumerate(row["scores"], 1) if s >= score]
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


def finals() -> dict[tuple[str, bool], list[dict]]:
    """The final runs of each method, without decay and with any."""
    rows, found = load("finals-tournament"), grid_points()
    return {
        (point["method"], decayed): at(rows, point)
        for decayed in (False, True)
        for point in operating_points(found, decayed)
    }


def compared() -> tuple[dict[tuple[str, bool], list[dict]], str]:
    """The final runs, or as long as some are missing, the trials at the same settings; and where
    they were measured."""
    if not missing("finals-tournament"):
        return finals(), "test examples, five new seeds"
    rows, found = load("tournament"), grid_points()
    trials = {
        (point["method"], decayed): at(rows, point)
        for decayed in (False, True)
        for point in operating_points(found, decayed)
    }
    return trials, "validation examples, the three seeds that chose the settings"


def verdict(differences: list[float], t: float) -> str:
    """Whether the t interval of the mean difference lies above 0, below, or around it."""
    mean = statistics.mean(differences)
    half = t * statistics.stdev(differences) / math.sqrt(len(differences))
    return "better" if mean > half else "worse" if mean < -half else "not shown"


def finals_table() -> str:
    """The operating points on test examples, minus LoRA, paired by seed."""
    runs, lines = finals(), []
    for (method, decayed), mine in runs.items():
        lora = runs["lora", decayed]
        gaps = [
            "–" if method == "lora" else with_interval(paired(mine, lora, key), "+.3f")
            for key in ("score", "forgetting")
        ]
        lines.append([
            report.NAMES[method], "yes" if decayed else "no",
            f"{statistics.mean(r['score'] for r in mine):.3f}", gaps[0],
            f"{statistics.mean(r['forgetting'] for r in mine):+.2f}", gaps[1],
        ])  # fmt: skip
    head = ["method", "decay", "score", "minus LoRA", "forgets", "minus LoRA"]
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
