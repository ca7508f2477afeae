"""Tables and figures of the experiments: results/*.jsonl -> RESULTS.md and results/*.png.

python -m data.results  # a few seconds
"""

import textwrap
from itertools import product

from matplotlib.figure import Figure

from minipeft.files import write_text
from minipeft.lab import report

from .choosing import edges, equal_score, operating_points, points
from .experiments import RESULTS, load

PAGE = RESULTS.parent / "RESULTS.md"
SCORES = (0.8, 0.9, 0.95)  # at which methods are compared
NAMES = report.NAMES | {"adalora, no penalty": "AdaLoRA, no penalty"}
COLORS = report.COLORS | {"adalora, no penalty": "#b2653f"}


def order(point: dict) -> tuple:
    """The place of a method in tables; variants follow their method."""
    method, *variant = point["method"].split(", ")
    return list(COLORS).index(method), variant


# --- score against forgetting ---

CIRCLE = {"marker": "o", "ls": "", "ms": 14, "mfc": "none", "color": "black"}
CROSS = {"marker": "+", "ls": "", "ms": 16, "mew": 2, "color": COLORS["full"]}


def cells(name: str, point: dict, edge: dict) -> list:
    """A line of a table: a point, with a star at settings that are at an edge."""
    rate, decay = (f"{point[n]:g}{'*' * (n in edge)}" for n in ("learning_rate", "decay"))
    spread = f" ± {point['score_spread']:.3f}" if point["seeds"] > 1 else ""
    return [
        name, rate, decay, point["seeds"], f"{point['score']:.3f}{spread}",
        f"{point['forgetting']:+.2f}",
        *(f"{point[n]:.1f}" if point["update_norm"] else "–" for n in ("update_norm", "intruders")),
    ]  # fmt: skip


HEAD = ["method", "η", "ηλ", "seeds", "score", "forgetting", "update norm", "intruders"]


def forgetting_table(found: list[dict]) -> str:
    """Two lines per method: the operating point without decay, and with it."""
    plain, decayed = operating_points(found, False), operating_points(found, True)
    lines = []
    for pair in sorted(zip(plain, decayed, strict=True), key=lambda pair: order(pair[0])):
        for name, point in zip((NAMES[pair[0]["method"]], "… with any decay"), pair, strict=True):
            lines.append(cells(name, point, edges(point, found)))
    return report.markdown_table(HEAD, lines)


def equal_score_table(found: list[dict]) -> str:
    """The least forgetting at equal scores, without decay -> with it."""

    def show(point: dict | None) -> str:
        return f"{point['forgetting']:+.2f}" if point else "–"

    columns = [equal_score(found, score) for score in SCORES]
    lines = [
        [NAMES[method], *(" → ".join(map(show, column[method])) for column in columns)]
        for method in sorted(columns[0], key=lambda method: order({"method": method}))
    ]
    return report.markdown_table(["method", *(f"score at least {s:g}" for s in SCORES)], lines)


def what_decay_does(found: list[dict]) -> str:
    """The least forgetting at equal scores in words: what decay divides it by, and how far methods
    are apart."""
    pairs = [pair for pair in equal_score(found, 0.9).values() if all(pair)]
    plain, decayed = ([p["forgetting"] for p in column] for column in zip(*pairs, strict=True))
    ratios = sorted(a / b for a, b in zip(plain, decayed, strict=True))
    text = (
        f"{len(pairs)} methods reach a score of 0.9 without decay and with it. At that score decay "
        f"divides forgetting by {', '.join(f'{ratio:.1f}' for ratio in ratios)}. Without decay "
        f"these methods differ by a factor of {max(plain) / min(plain):.1f}, and with it by "
        f"{max(decayed) / min(decayed):.1f}. At the scores of the table, LoRA and QLoRA forget "
    )
    low, high = to_full(found, "lora", "qlora")
    text += f"{low[0]:.1f} to {low[1]:.1f} times as much as full fine-tuning without decay, and "
    text += f"{high[0]:.1f} to {high[1]:.1f} times with it; AdaLoRA, which has a penalty, "
    low, high = to_full(found, "adalora")
    text += (
        f"{low[0]:.1f} to {low[1]:.1f} times without, and {high[0]:.1f} to {high[1]:.1f} with it."
    )
    return text


def to_full(found: list[dict], *methods: str) -> list[tuple[float, float]]:
    """The smallest and largest ratio of least forgetting to full fine-tuning's, over methods and
    scores: without decay, and with it."""
    ratios = [[], []]
    for best, method, i in product(
        [equal_score(found, score) for score in SCORES], methods, range(2)
    ):
        if best[method][i] and best["full"][i]:
            ratios[i].append(best[method][i]["forgetting"] / best["full"][i]["forgetting"])
    return [(min(found), max(found)) for found in ratios]


def forgetting_figure(found: list[dict]) -> Figure:
    """A panel per method: score against forgetting, a line per decay. The circle is the operating
    point; the cross is full fine-tuning's."""
    best = {point["method"]: point for point in sorted(operating_points(found, True), key=order)}
    figure, axes = report.panels(13, 6.2, 2, 4)
    decays = sorted({p["decay"] for p in found})
    for axis, method in zip(axes, best, strict=False):
        for i, decay in enumerate(decays):
            line = [p for p in found if (p["method"], p["decay"]) == (method, decay)]
            line.sort(key=lambda p: p["learning_rate"])
            if not line:
                continue
            strength = 0.4 + 0.6 * i / max(len(decays) - 1, 1)
            axis.plot(line[0]["forgetting"], line[0]["score"], "s", color=COLORS[method],
                      alpha=strength, ms=4 + 4 * strength, mew=0)  # fmt: skip
            axis.plot([p["forgetting"] for p in line], [p["score"] for p in line], "o-",
                      color=COLORS[method], alpha=strength, ms=2 + 4 * strength, mew=0)  # fmt: skip
            axes[-1].plot([], [], "o-", color="black", alpha=strength, ms=2 + 4 * strength, mew=0,
                          label=f"ηλ = {decay:g}")  # fmt: skip
        for point, style, name in (
            (best[method], CIRCLE, "the operating point (any decay)"),
            (best["full"], CROSS, "that of full fine-tuning"),
        ):
            axis.plot(point["forgetting"], point["score"], label=name, **style)
        axis.set(title=NAMES[method], xscale="log", ylim=(0, 1.05), xlim=(0.04, 10))
        axis.xaxis.set_major_formatter("{x:g}")
    for axis in axes[len(best) :]:
        axis.set_axis_off()
    marks = [
        m
        for axis in (axes[-1], axes[0])
        for m in zip(*axis.get_legend_handles_labels(), strict=True)
    ]
    legend = {label: handle for handle, label in marks}  # each label once
    axes[-1].legend(legend.values(), legend, loc="center", frameon=False)
    figure.supxlabel("forgetting (nats per token on pretraining text; logarithmic)")
    figure.supylabel("score on validation examples")
    return figure


# --- the page ---


def page() -> str:
    """RESULTS.md."""
    found = points(load("forgetting"))
    return f"""# Results

Written by `python -m data.results` from the runs of `python -m data.experiments`.
[PROTOCOL.md](PROTOCOL.md) says how everything was measured: read it first. All results are for
models of 0.3M to 3M parameters, and for two tasks that we made: they may not generalise to others.
So far, only the first experiment has been run, on one base and one task.

## Score against forgetting

The 1M base on `describe`, 100 steps, validation examples. The question: does the method decide how
much is forgotten, or the regularizer?

![Score against forgetting, a panel per method](results/forgetting.png)

Each line connects the learning rates that were tried with one weight decay, from the smallest one,
the square. Up and left is better: a high score, and little forgetting. Darker lines have more
decay. Prompt methods have not been run yet.

The first table has two operating points per method. First row: the best setting without weight
decay. Second row: the best of all settings. The learning rate is tuned in both. The score is the
mean over seeds ± their standard deviation. A star marks a setting at the edge of the grid: there, a
wider grid has not been run yet. A dash: the method changes no weights of linear layers.

{forgetting_table(found)}

The second table compares methods at the same score: the least forgetting of the settings that
reach it. Left of the arrow, only ηλ = 0 is allowed; on the right, any ηλ. A dash: no setting
reaches it.

{equal_score_table(found)}

{textwrap.fill(what_decay_does(found), 100, break_on_hyphens=False)}

So at equal score most methods forget several times less with weight decay, and they come closer
together. LoRA still forgets more than full fine-tuning at each of these scores.
<!-- claim: decay-decides -->

This is preliminary. The right side of an arrow is the best of about twenty settings, the left side
the best of five, with rates a factor of two apart. Points were chosen and measured on the same
validation examples. Some are at the edge of the grid, and some have one seed. Training for fewer
steps, another way to forget less, was not tried. The finals will compare the methods on the test
examples, with ten seeds.

In the literature, LoRA learns less and forgets less than full fine-tuning
([arXiv 2405.09673](https://arxiv.org/abs/2405.09673)), and it forgets more if it has more intruder
dimensions ([arXiv 2410.21228](https://arxiv.org/abs/2410.21228)). Here, within each method that
changes linear weights, settings that forget little have few intruders, but also small updates. The
two go together, so these runs do not show which one matters.
"""


if __name__ == "__main__":
    figure = forgetting_figure(points(load("forgetting")))
    report.save_figure(figure, RESULTS / "forgetting.png", dpi=80)
    write_text(PAGE, page())
    print(f"wrote {PAGE} and its figures")
