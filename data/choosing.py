"""How PROTOCOL.md chooses a setting from rows of runs: means, operating points, and wider grids."""

import math
import statistics
from collections.abc import Iterable
from itertools import groupby

from minipeft.lab.report import T_95

AVERAGED = ("score", "forgetting", "loss", "update_norm", "intruders")
SLACK = 0.02  # by how much an operating point's score may be below the best


def points(rows: list[dict]) -> list[dict]:
    """Means over seeds: a point per method, learning rate and decay. A setting with a run that
    diverged is left out."""

    def where(row: dict) -> tuple:
        return row["method"], row["learning_rate"], row["decay"]

    found = []
    for (method, rate, decay), group in groupby(sorted(rows, key=where), where):
        runs = list(group)
        if all("score" in run for run in runs):
            means = {name: statistics.mean(run[name] for run in runs) for name in AVERAGED}
            spread = statistics.stdev(run["score"] for run in runs) if len(runs) > 1 else 0.0
            found.append({"method": method, "learning_rate": rate, "decay": decay, **means,
                          "score_spread": spread, "seeds": len(runs)})  # fmt: skip
    return found


def tied(candidates: Iterable[dict]) -> list[dict]:
    """The points with the least forgetting, up to 0.01, among those with nearly the best score."""
    candidates = list(candidates)
    best = max(point["score"] for point in candidates)
    good = [point for point in candidates if point["score"] >= best - SLACK]
    least = min(round(point["forgetting"], 2) for point in good)
    return [point for point in good if round(point["forgetting"], 2) == least]


def operating_point(candidates: Iterable[dict]) -> dict:
    """The point with the lowest loss among those that are tied."""
    return min(tied(candidates), key=lambda point: point["loss"])


def operating_points(found: list[dict], decayed: bool) -> list[dict]:
    """Each method's operating point, among all its points or among those without decay."""
    return [
        operating_point(p for p in found if p["method"] == method and (decayed or not p["decay"]))
        for method in dict.fromkeys(p["method"] for p in found)
    ]


def equal_score(found: list[dict], score: float) -> dict[str, tuple[dict | None, dict | None]]:
    """For each method, the point that forgets least among those that reach a score, without decay
    and among all; None if no point reaches it."""
    best = {}
    for method in dict.fromkeys(point["method"] for point in found):
        reached = [p for p in found if p["method"] == method and p["score"] >= score]
        best[method] = tuple(
            min(points, key=lambda point: point["forgetting"], default=None)
            for points in ([p for p in reached if not p["decay"]], reached)
        )
    return best


def edges(point: dict, candidates: Iterable[dict]) -> dict[str, float]:
    """The settings of a point that are the smallest or largest of its method, each with the value
    to try next. A decay of zero is no edge."""
    found, mine = {}, [p for p in candidates if p["method"] == point["method"]]
    for name in ("learning_rate", "decay"):
        tried = {p[name] for p in mine if p[name]}
        if point[name] and point[name] == max(tried):
            found[name] = 2 * point[name]
        elif name == "learning_rate" and point[name] == min(tried):
            found[name] = point[name] / 2
    return found


def prediction_interval(values: list[float]) -> tuple[float, float]:
    """Where 95 % of new values should lie, if all are drawn from one normal distribution:
    mean ± t s √(1 + 1/n)."""
    n, mean = len(values), statistics.mean(values)
    half = T_95[n - 2] * statistics.stdev(values) * math.sqrt(1 + 1 / n) if n > 1 else math.inf
    return mean - half, mean + half
