"""The section "Better than LoRA?" of RESULTS.md: LoRA and its successors on one grid."""

import math
import statistics
from itertools import product

from minipeft.lab import report

from .choosing import edges, equal_score, operating_points, points
from .experiments import SUCCESSORS, TRIALS, load, missing
from .sections import at, fill, paired, with_interval

METHODS = ("full", "lora", *SUCCESSORS)
ONE_RATE = 0.0025  # LoRA's in the unfair comparison: a quarter of its best
ENOUGH = 0.9  # the score that the curves are asked for


def grid_points(name: str = "tournament") -> list[dict]:
    """The mean of each setting whose seeds have all been run."""
    return [p for p in points(load(name)) if p["seeds"] == len(TRIALS)]


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


def at_points(rows: list[dict], name: str = "tournament") -> dict[tuple[str, bool], list[dict]]:
    """The runs with each method's chosen settings, without decay and with any."""
    found = grid_points(name)
    return {
        (point["method"], decayed): at(rows, point)
        for decayed in (False, True)
        for point in operating_points(found, decayed)
    }


def finals(name: str = "tournament") -> dict[tuple[str, bool], list[dict]]:
    return at_points(load(f"finals-{name}"), name)


def compared() -> tuple[dict[tuple[str, bool], list[dict]], str]:
    """The final runs, or as long as some are missing, the trials; and where they were measured."""
    if not missing("finals-tournament"):
        return finals(), "test examples, five new seeds"
    trials = at_points(load("tournament"))
    return trials, "validation examples, the three seeds that chose the settings"


def verdict(differences: list[float], t: float) -> str:
    """Whether the t interval of the mean difference lies above 0, below, or around it."""
    mean = statistics.mean(differences)
    half = t * statistics.stdev(differences) / math.sqrt(len(differences))
    return "better" if mean > half else "worse" if mean < -half else "not shown"


def finals_table(name: str = "tournament") -> str:
    """The operating points on test examples, minus LoRA, paired by seed."""
    runs, lines = finals(name), []
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


def verdicts(decayed: bool, key: str) -> dict[str, list[str]]:
    """The methods whose final score or forgetting is higher than LoRA's, lower, or neither, by the
    95 % interval of the paired difference."""
    runs, words = finals(), {"better": "higher", "worse": "lower", "not shown": "neither"}
    found: dict[str, list[str]] = {word: [] for word in words.values()}
    for method in METHODS:
        gap = paired(runs[method, decayed], runs["lora", decayed], key)
        if method != "lora":
            found[words[verdict(gap, report.T_95[len(gap) - 2])]].append(method)
    return found


def equal_table(found: list[dict]) -> str:
    """The least forgetting at equal scores, without decay and with any."""

    def show(point: dict | None) -> str:
        return f"{point['forgetting']:+.2f}" if point else "–"

    scores = (0.9, 0.95, 0.97)
    columns = [equal_score(found, score) for score in scores]
    lines = [
        [report.NAMES[m], *(" → ".join(map(show, column[m])) for column in columns)]
        for m in METHODS
    ]
    return report.markdown_table(["method", *(f"score at least {s:g}" for s in scores)], lines)


def in_words(decayed: bool) -> str:
    parts = []
    for key in ("score", "forgetting"):
        for word, methods in verdicts(decayed, key).items():
            if methods and word != "neither":
                parts.append(
                    f"{word} {key} than LoRA: {', '.join(report.NAMES[m] for m in methods)}"
                )
    start = "With decay" if decayed else "Without decay"
    return f"{start}, the intervals show a {'; a '.join(parts)}." if parts else ""


def steps_table() -> str:
    """After how many steps the final runs without decay reach a score on validation examples."""
    lines = []
    for method in METHODS:
        rows = finals()[method, False]
        reached = [steps_to(ENOUGH, row) for row in rows]
        lines.append(
            [report.NAMES[method], ", ".join("–" if n is None else str(n) for n in reached)]
        )
    return report.markdown_table(["method", f"steps to a score of {ENOUGH}, by seed"], lines)


def on_sentiment() -> str:
    """Empty as long as runs are missing."""
    names = ("tournament-sentiment", "tournament-sentiment-ranks")
    if any(missing(name) or missing(f"finals-{name}") for name in names):
        return ""
    found = []
    for name in names:
        runs = [run for rows in finals(name).values() for run in rows]
        scores, forgot = ([run[key] for run in runs] for key in ("score", "forgetting"))
        found.append(
            f"the {len(runs)} final runs score {min(scores):.3f} at least, and forget "
            f"{max(forgot):.3f} nats or less"
        )
    words = (
        f"On `sentiment`, with rates four times lower and decays of 0.02 and 0.04, {found[0]}. At "
        f"the ranks 1 and 32, and for VeRA also 8, {found[1]}. (LoRA+ at rank 32 without decay "
        "forgets most. Almost all rates solve this task, so many of these settings have the "
        "lowest rate of the grid.) So it is too easy to rank the methods by their score."
    )
    return f"\n{fill(words)}\n"


def ranks_runs() -> dict[tuple[str, int, bool], tuple[dict, list[dict]]]:
    """By method, rank and whether it may decay: the chosen setting, and its final runs."""
    found = {}
    for name in ("tournament", "tournament-ranks"):
        trials, runs = grid_points(name), finals(name)
        for decayed in (False, True):
            for point in operating_points(trials, decayed):
                method, _, r = point["method"].partition(", r ")
                star = "*" * bool(edges(point, trials))
                found[method, int(r or 8), decayed] = (
                    point | {"star": star}, runs[point["method"], decayed]
                )  # fmt: skip
    return found


def on_ranks() -> str:
    """The finals at several ranks; empty as long as runs are missing."""
    if missing("tournament-ranks") or missing("finals-tournament-ranks"):
        return ""
    found, lines, ahead = ranks_runs(), [], []
    for r, method in product((1, 8, 32), ("lora", "rslora", "lora_plus", "pissa", "dora", "vera")):
        line = [str(r), report.NAMES[method]]
        for decayed in (False, True):
            (point, mine), (_, lora) = found[method, r, decayed], found["lora", r, decayed]
            gaps = paired(mine, lora, "score")
            setting = f"{point['learning_rate']:g}"
            line += [
                setting + (f", {point['decay']:g}" if decayed else "") + point["star"],
                f"{statistics.mean(run['score'] for run in mine):.3f}",
                "–" if method == "lora" else with_interval(gaps, "+.3f"),
                f"{statistics.mean(run['forgetting'] for run in mine):+.2f}",
            ]
            if method != "lora" and verdict(gaps, report.T_95[len(gaps) - 2]) == "better":
                how = "with" if decayed else "without"
                ahead.append(f"{report.NAMES[method]} (r = {r}, {how} decay)")
        lines.append(line)
    head = ["r", "method", "η, no decay", "score", "minus LoRA", "forgets",
            "η and ηλ, with decay", "score", "minus LoRA", "forgets"]  # fmt: skip
    words = (
        "At rank 1, rsLoRA is LoRA, as √1 = 1. Of the other 22 intervals of rsLoRA, LoRA+, PiSSA "
        f"and DoRA, {len(ahead)} lie above zero: {', '.join(ahead) or 'none'}. All are "
        "differences to the same five runs of LoRA, which may score low by chance. VeRA trains far "
        "fewer parameters at equal rank, and scores less."
    )
    starred = any(point["star"] for point, _ in found.values())
    star = " A star marks a rate or a decay at the edge of the grid." * starred
    start = (
        "At other ranks, with α = 2 r, LoRA and its successors at their chosen settings: test "
        f"examples, five new seeds, paired by seed with LoRA of equal rank.{star} (At rank 8, the "
        "runs are those above. Only VeRA was run again: above it has r = 256.)"
    )
    return f"""
{fill(start)}

{report.markdown_table(head, lines)}

{fill(words)}
"""


def section() -> str:
    """Empty as long as runs are missing."""
    if missing("tournament") or missing("finals-tournament"):
        return ""
    found = grid_points()
    leads = ", ".join(f"{report.NAMES[m]} {lead:+.2f}" for m, (_, lead) in unfair(found).items())
    unfairly = fill(
        f"An unfair comparison, for the record: LoRA at the one rate {ONE_RATE:g}, a quarter of "
        "the rate chosen above, and each other method at its best rate, without decay. Then the "
        f"leads are: {leads}."
    )
    verdict_words = fill(f"{in_words(False)} {in_words(True)}")
    return f"""
## Better than LoRA?

Six methods that came after LoRA, on the 1M base and `describe`, each with a grid of the same size
((IA)³ has one more rate). Validation examples, three seeds; the last column counts the learning
rates without decay whose score is at most 0.05 below the best one's.

{grid_table(found)}

{unfairly}

The finals: these settings with five new seeds on test examples. Differences to LoRA are paired by
seed.

{finals_table()}

{verdict_words}

A setting that changes the model more may both score higher and forget more. So here
is the least forgetting at equal scores, without decay → with decay allowed (validation examples):

{equal_table(found)}

At a score of 0.95, LoRA, rsLoRA, LoRA+ and DoRA with decay forget about the same. At 0.97, LoRA
forgets more than these three, on this grid. Without decay, rsLoRA forgets less than
LoRA, and we see no difference in the score. At one rank, rsLoRA is LoRA with another α: so a
larger α than 16 may suit LoRA here. We did not tune α. This is one small model, one task
and 100 steps.

{steps_table()}
<!-- claim: tournament -->
{on_sentiment()}{on_ranks()}"""
