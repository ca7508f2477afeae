"""Tables and figures of the experiments: results/*.jsonl -> RESULTS.md and results/*.png.

python -m data.results  # a few seconds
"""

import textwrap

from matplotlib.figure import Figure

from minipeft.files import write_text
from minipeft.lab import report

from .choosing import edges, equal_score, operating_points, points
from .experiments import RESULTS, load

PAGE = RESULTS.parent / "RESULTS.md"
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
        f"{point['forgetting']:+.2f}", f"{point['update_norm']:.1f}", f"{point['intruders']:.1f}",
    ]  # fmt: skip


HEAD = ["method", "η", "ηλ", "seeds", "score", "forgetting", "update norm", "intruders"]


def forgetting_table(found: list[dict]) -> str:
    """Two lines per method: the operating point without decay, and with it."""
    plain, decayed = operating_points(found, False), operating_points(found, True)
    lines = []
    for pair in sorted(zip(plain, decayed, strict=True), key=lambda pair: order(pair[0])):
        for name, point in zip((NAMES[pair[0]["method"]], "… with decay"), pair, strict=True):
            lines.append(cells(name, point, edges(point, found)))
    return report.markdown_table(HEAD, lines)


def equal_score_table(found: list[dict], scores: tuple[float, ...]) -> str:
    """The least forgetting at equal scores, without decay -> with it."""

    def show(point: dict | None) -> str:
        return f"{point['forgetting']:+.2f}" if point else "–"

    columns = [equal_score(found, score) for score in scores]
    lines = [
        [NAMES[method], *(" → ".join(map(show, column[method])) for column in columns)]
        for method in sorted(columns[0], key=lambda method: order({"method": method}))
    ]
    return report.markdown_table(["method", *(f"score at least {s:g}" for s in scores)], lines)


def what_decay_does(found: list[dict], score: float = 0.9) -> str:
    """The ranges of least forgetting at a score, over the methods that reach it both ways."""
    pairs = [pair for pair in equal_score(found, score).values() if all(pair)]
    plain, decayed = ([p["forgetting"] for p in column] for column in zip(*pairs, strict=True))
    ratios = [a / b for a, b in zip(plain, decayed, strict=True)]
    low, high = (min(plain), min(decayed)), (max(plain), max(decayed))
    return (
        f"{len(pairs)} methods reach a score of {score:g} without decay and with it. At that score "
        f"they forget {low[0]:.2f} to {high[0]:.2f} nats per token without decay, and {low[1]:.2f} "
        f"to {high[1]:.2f} with it: each of them {min(ratios):.1f} to {max(ratios):.1f} times less."
    )


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
            strength = 0.4 + 0.6 * i / max(len(decays) - 1, 1)
            axis.plot([p["forgetting"] for p in line], [p["score"] for p in line], "o-",
                      color=COLORS[method], alpha=strength, ms=2 + 4 * strength, mew=0)  # fmt: skip
            axes[-1].plot([], [], "o-", color="black", alpha=strength, ms=2 + 4 * strength, mew=0,
                          label=f"ηλ = {decay:g}")  # fmt: skip
        for point, style, name in (
            (best[method], CIRCLE, "the operating point"),
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

Each line connects the learning rates that were tried with one weight decay, small rates on the
left. Up and left is better: a high score, and little forgetting. Darker lines have more decay.

The first table has two operating points per method: chosen among the runs without weight decay, and
among all runs, those included. The score is the mean over seeds ± their standard deviation. A star
marks a setting at the edge of the grid: there, a wider grid has not been run yet. (*Intruders* and
*update norm*: see the protocol.)

{forgetting_table(found)}

The second table compares methods at the same score: the least forgetting of the settings that reach
it. Left of the arrow, among those without weight decay; right of it, among all. A dash: no setting
reaches the score.

{equal_score_table(found, (0.8, 0.9, 0.95))}

{textwrap.fill(what_decay_does(found), 100)}

So weight decay changes forgetting more than the choice of method does, and in nats the methods
come much closer together. As a ratio, they do not: at the same score LoRA and QLoRA forget about
twice as much as full fine-tuning, without decay and with it. AdaLoRA's lead over full fine-tuning,
which came from its penalty, is gone when both have decay. <!-- claim: decay-decides -->

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
