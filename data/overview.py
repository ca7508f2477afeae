"""The README's table and figure: what each method learns and forgets on the 1M base."""

import statistics

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from minipeft.lab import DATA, report
from minipeft.lab.base import load_base
from minipeft.lab.finetune import build_model
from minipeft.lab.recipes import RunConfig

from .choosing import operating_point, points
from .experiments import METHODS as METHODS_OF_RUNS
from .experiments import load
from .sections import at, two_points, where

README = DATA.parent / "README.md"
BEGIN, END = "<!-- made by: python -m data.results -->", "<!-- end -->"
METHODS = ("full", "lora", "qlora", "adalora", "bottleneck", "bitfit")
PROMPTS = {  # the better start of each
    "prefix_tuning": "prefix_tuning", "prompt_tuning": "prompt_tuning", "p_tuning": "p_tuning",
}  # fmt: skip


def runs() -> dict[str, list[list[dict]]]:
    """Each method's final runs: at its operating point without decay, and with any decay. Prompt
    methods have none with decay."""
    finals, pairs = load("finals"), two_points(load("forgetting"))
    found = {method: [at(finals, point) for point in pairs[method]] for method in METHODS}
    rows, finals = points(load("prompts")), load("finals-prompts")
    return found | {m: [at(finals, operating_point(where(rows, method=m)))] for m in PROMPTS}


def table() -> str:
    """A line per method."""
    base, lines = load_base(DATA / "base" / "1m"), []
    everything = sum(p.numel() for p in base.pretrained.parameters())
    for method, pair in runs().items():
        model = build_model(base, METHODS_OF_RUNS[method], RunConfig())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        scores, forgetting = (
            [statistics.mean(row[key] for row in rows) for rows in pair]
            for key in ("score", "forgetting")
        )
        cells = [
            f"{score:.2f} | {forgot:.2f}" for score, forgot in zip(scores, forgetting, strict=True)
        ]
        cells += ["– | –"] * (2 - len(cells))
        share = f"{trained / everything:.1%}".replace("%", " %")
        lines.append([report.NAMES[method], f"{trained:,} ({share})", *cells])
    head = ["method", "trained parameters", "test score, no decay", "forgets, no decay",
            "test score, with decay", "forgets, with decay"]  # fmt: skip
    return report.markdown_table(head, lines)


def figure() -> Figure:
    """Test score, and forgetting: hollow without weight decay, filled with it."""
    drawn, (left, right) = report.panels(10, 3.8, 1, 2)
    found = runs()
    for i, (method, pair) in enumerate(found.items()):
        color = report.COLORS[method]
        for rows, fill in zip(pair, ("none", color), strict=False):
            for axis, key in ((left, "score"), (right, "forgetting")):
                if axis is left and rows is not pair[-1]:
                    continue  # of two scores, the one with decay
                values = [row[key] for row in rows]
                mean, half = statistics.mean(values), report.interval(values)
                axis.errorbar(mean, i, xerr=half, fmt="o", color=color, mfc=fill, capsize=3)
    names = [report.NAMES[method] for method in found]
    left.set(yticks=range(len(found)), yticklabels=names, xlim=(-0.05, 1.05))
    left.set(xlabel="test score (facts stated correctly)")
    right.set(yticks=range(len(found)), yticklabels=[], xscale="log", xlim=(0.08, 5))
    right.set(xlabel="forgetting (rise of the loss in nats per token; logarithmic)")
    right.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5]))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_locator(NullLocator())
    for axis in (left, right):
        axis.set_ylim(len(found) - 0.5, -0.5)
        axis.grid(axis="x", color="#eeeeee")
        axis.set_axisbelow(True)
    for fill, name in (("none", "no weight decay"), ("black", "with weight decay")):
        right.plot([], [], "o", color="black", mfc=fill, label=name)
    right.legend(loc="lower left", frameon=False)
    return drawn


def readme() -> str:
    """The README with this table in its place."""
    before, rest = README.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"
