"""Tables and figures of the experiments: results/*.jsonl -> RESULTS.md and results/*.png.

python -m data.results  # a few seconds
"""

import statistics
from collections.abc import Iterable
from itertools import groupby

from matplotlib.figure import Figure

from minipeft.lab import report

from .experiments import HERE

PAGE = HERE / "RESULTS.md"
AVERAGED = ("score", "forgetting", "loss", "update_norm", "intruders")
SLACK = 0.02  # by how much an operating point's score may be below the best
NAMES = report.NAMES | {"adalora, no penalty": "AdaLoRA, no penalty"}
COLORS = report.COLORS | {"adalora, no penalty": "#b2653f"}


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


def operating_point(candidates: Iterable[dict]) -> dict:
    """The point with the least forgetting among those with nearly the best score."""
    candidates = list(candidates)
    best = max(point["score"] for point in candidates)
    good = [point for point in candidates if point["score"] >= best - SLACK]
    return min(good, key=lambda point: (round(point["forgetting"], 2), point["loss"]))


def at_edge(point: dict, candidates: list[dict]) -> list[str]:
    """Which settings of a point are the smallest or largest of its method. Zero decay is no edge."""
    found = []
    for name in ("learning_rate", "decay"):
        tried = {p[name] for p in candidates if p["method"] == point["method"]}
        if point[name] and point[name] in (min(tried), max(tried)):
            found.append(name)
    return found


# --- score against forgetting ---


def chosen(found: list[dict], regularized: bool) -> dict[str, dict]:
    """Each method's operating point, among all its points or among those without decay."""
    return {
        method: operating_point(
            p for p in found if p["method"] == method and (regularized or not p["decay"])
        )
        for method in dict.fromkeys(p["method"] for p in found)
    }


def forgetting_table(found: list[dict]) -> str:
    """Two lines per method: the operating point without decay, and with it."""
    plain, decayed = chosen(found, False), chosen(found, True)
    lines = []
    for method in sorted(plain, key=list(COLORS).index):
        for name, point in ((NAMES[method], plain[method]), ("… with decay", decayed[method])):
            edge = at_edge(point, found)
            lines.append(
                [
                    name,
                    f"{point['learning_rate']:g}" + ("*" if "learning_rate" in edge else ""),
                    f"{point['decay']:g}" + ("*" if "decay" in edge else ""),
                    f"{point['score']:.3f} ± {point['score_spread']:.3f}",
                    f"{point['forgetting']:+.2f}",
                    f"{point['update_norm']:.1f}",
                    f"{point['intruders']:.1f}",
                ]
            )
    head = ["method", "η", "ηλ", "score", "forgetting", "update norm", "intruders"]
    return report.markdown_table(head, lines)


def forgetting_figure(found: list[dict]) -> Figure:
    """A panel per method: score against forgetting, a line per decay. The circle is the operating
    point; the cross is full fine-tuning's."""
    full = chosen(found, True)["full"]
    methods = sorted({p["method"] for p in found}, key=list(COLORS).index)
    figure, axes = report.panels(13, 6.2, 2, 4)
    for axis, method in zip(axes, methods, strict=False):
        mine = [p for p in found if p["method"] == method]
        decays = sorted({p["decay"] for p in mine})
        for decay, shade in zip(decays, (0.3, 0.5, 0.7, 1, 1, 1), strict=False):
            line = sorted(
                (p for p in mine if p["decay"] == decay), key=lambda p: p["learning_rate"]
            )
            axis.plot([p["forgetting"] for p in line], [p["score"] for p in line], "o-",
                      color=COLORS[method], alpha=shade, ms=3 + 4 * shade, mew=0,
                      label=f"ηλ = {decay:g}")  # fmt: skip
        best = operating_point(mine)
        axis.plot(best["forgetting"], best["score"], "o", ms=14, mfc="none", color="black")
        axis.plot(full["forgetting"], full["score"], "+", ms=14, mew=2, color=COLORS["full"])
        axis.set(title=NAMES[method], xscale="log", ylim=(0, 1.05), xlim=(0.05, 10))
        axis.xaxis.set_major_formatter("{x:g}")
    for axis in axes[len(methods) :]:
        axis.set_axis_off()
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.supxlabel("forgetting (nats per token on pretraining text)")
    figure.supylabel("score on validation examples")
    return figure
