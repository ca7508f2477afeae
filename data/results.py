"""Tables and figures of the experiments: results/*.jsonl -> RESULTS.md and results/*.png.

python -m data.results  # a few seconds
"""

import statistics
import textwrap
from collections import Counter
from itertools import product

from matplotlib.figure import Figure

from minipeft.files import write_text
from minipeft.lab import report

from . import overview, sections, tournament, transfer
from .choosing import edges, equal_score, operating_points, points
from .experiments import RESULTS, TRIALS, load
from .sections import paired, with_interval

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
    pairs = {m: pair for m, pair in equal_score(found, 0.9).items() if all(pair)}
    ratios = [
        f"{plain['forgetting'] / decayed['forgetting']:.1f} ({NAMES[method]})"
        for method, (plain, decayed) in pairs.items()
    ]
    text = (
        f"{len(pairs)} methods reach a score of 0.9 without decay and with it. At that score decay "
        f"divides forgetting by {', '.join(ratios)}. At the scores of the table, LoRA and QLoRA "
        "forget "
    )
    low, high = to_full(found, "lora", "qlora")
    text += f"{low[0]:.1f} to {low[1]:.1f} times as much as full fine-tuning without decay, and "
    text += f"{high[0]:.1f} to {high[1]:.1f} times with it; AdaLoRA, which has a penalty, "
    low, high = to_full(found, "adalora")
    text += (
        f"{low[0]:.1f} to {low[1]:.1f} times without, and {high[0]:.1f} to {high[1]:.1f} with it."
    )
    return text


def what_weakens_this(found: list[dict]) -> str:
    """How many settings each side of an arrow is the best of, and other caveats."""
    tried = Counter((point["method"], bool(point["decay"])) for point in found)
    plain = [n for (_, decayed), n in tried.items() if not decayed]
    both = [tried[method, False] + n for (method, decayed), n in tried.items() if decayed]
    return (
        f"What weakens this: the right side of an arrow is the best of {min(both)} to {max(both)} "
        f"settings, and the left side the best of {min(plain)} to {max(plain)}; rates and decays "
        "are a factor of two apart. Points were chosen and measured on the same validation "
        "examples. Training for fewer steps, another way to forget less, was not tried. The "
        "finals below measure the chosen points again, on other examples, text and seeds."
    )


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
        axis.set(title=NAMES[method], xscale="log", ylim=(0, 1.05), xlim=(0.015, 10))
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


# --- the finals ---


def finals_of(point: dict) -> list[dict]:
    """The final runs with a point's settings, by seed. A run that diverged is left out."""
    names = ("method", "learning_rate", "decay")
    rows = [row for row in load("finals") if all(row[n] == point[n] for n in names)]
    return sorted((row for row in rows if "score" in row), key=lambda row: row["seed"])


def finals_table(chosen: dict[str, dict | None], found: list[dict]) -> str:
    """A line per method: its setting, and what it scores and forgets in the final runs."""
    lines, full = [], finals_of(chosen["full"])
    for method in sorted(chosen, key=lambda method: order({"method": method})):
        rows = finals_of(chosen[method]) if chosen[method] else []
        if rows:
            point, scores = chosen[method], [row["score"] for row in rows]
            edge = edges(point, found)
            gap = "–" if method == "full" else with_interval(paired(rows, full, "forgetting"))
            lines.append([
                NAMES[method],
                *(f"{point[n]:g}{'*' * (n in edge)}" for n in ("learning_rate", "decay")),
                len(rows),
                f"{statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f}",
                with_interval([row["forgetting"] for row in rows]), gap,
            ])  # fmt: skip
    head = ["method", "η", "ηλ", "seeds", "test score", "forgetting", "minus full, paired"]
    return report.markdown_table(head, lines)


def answer(chosen: dict[str, dict | None]) -> str:
    """Whether these settings forget more than that of full fine-tuning, in words."""
    full, parts = finals_of(chosen["full"]), []
    for method in sorted(chosen, key=lambda method: order({"method": method})):
        rows = finals_of(chosen[method]) if chosen[method] and method != "full" else []
        if len(rows) > 1:
            gaps = paired(rows, full, "forgetting")
            clear = abs(statistics.mean(gaps)) > report.interval(gaps)
            what = "differs" if clear else "no difference seen"
            parts.append(f"{NAMES[method]} {with_interval(gaps)}, {what}")
    return "; ".join(parts)


def best_of_full() -> dict[str, float]:
    """The means of full fine-tuning's final runs at the setting with the highest test score."""
    rows = [row for row in load("finals") if row["method"] == "full"]
    return max(points(rows), key=lambda point: point["score"])


def main_question(chosen: dict[str, dict | None]) -> str:
    rows = finals_of(chosen["qlora"])
    quantized, full = statistics.mean(row["forgetting_at_start"] for row in rows), best_of_full()
    return (
        "The question was whether methods differ in forgetting once each may use weight decay. "
        "In nats per token, minus full fine-tuning, with the 95 % interval of the paired "
        f"difference: {answer(chosen)}. The test scores are not equal, but they do not explain why "
        "full fine-tuning forgets least: at another setting, with "
        f"ηλ = {full['decay']:g}, it scores {full['score']:.3f}, more than every other method in "
        f"the table, and still forgets only {full['forgetting']:+.2f}. Of QLoRA's forgetting, "
        f"{quantized:.2f} was there at step 0: the damage of quantization."
    )


def finals(found: list[dict]) -> str:
    """The section of the finals."""
    if not load("finals"):
        return ""
    at = equal_score(found, 0.9)
    plain, decayed = ({method: pair[i] for method, pair in at.items()} for i in range(2))
    first, best = (
        {point["method"]: point for point in operating_points(found, any_decay)}
        for any_decay in (False, True)
    )
    return f"""
## The finals

The same base and task, on the test examples and on new held-out text, with ten new seeds (0 to 9).
Settings were chosen above, on validation examples. Intervals are 95 % t intervals; differences to
full fine-tuning are paired by seed. They cover the seeds (initial values of adapters and the order
of examples), and not other bases, tasks or choices of settings. The score is the mean ± standard
deviation. A star marks the edge of the grid: a wider grid might have a setting that forgets less.

The settings that forget least among those with a validation score of at least 0.9, **without weight
decay**:

{finals_table(plain, found)}

The same, **with any weight decay**:

{finals_table(decayed, found)}

{textwrap.fill(main_question(decayed), 100, break_on_hyphens=False)}
<!-- claim: finals-forgetting -->

The operating points without weight decay:

{finals_table(first, found)}

The operating points with any weight decay:

{finals_table(best, found)}
"""


# --- intruder dimensions ---


def scaled_runs() -> dict[tuple, list[dict]]:
    """The runs that have intruders, by method, learning rate and decay."""
    groups: dict[tuple, list[dict]] = {}
    rows = [row for row in load("intruders") if row.get("scalings")]
    for row in sorted(rows, key=lambda r: (order(r), r["learning_rate"], r["decay"])):
        groups.setdefault((row["method"], row["learning_rate"], row["decay"]), []).append(row)
    return groups


def change(runs: list[dict], which: str, key: str) -> float:
    """By how much a value changes if the singular values of these directions are halved."""
    return statistics.mean(
        entry[key] - run[key] for run in runs for entry in run["scalings"]
        if (entry["which"], entry["factor"]) == (which, 0.5)
    )  # fmt: skip


def intruders_table() -> str:
    """A line per method and decay: intruders, and what happens when they are scaled down."""
    lines = []
    for (method, rate, decay), runs in scaled_runs().items():
        mean = {n: statistics.mean(run[n] for run in runs) for n in ("intruders", "forgetting")}
        changes = [
            f"{change(runs, which, key):+.2f}"
            for key, which in product(("forgetting", "score"), ("intruders", "others"))
        ]
        lines.append([
            NAMES[method], f"{rate:g}", f"{decay:g}", len(runs), f"{mean['intruders']:.1f}",
            f"{mean['forgetting']:+.2f}", *changes,
        ])  # fmt: skip
    head = ["method", "η", "ηλ", "runs", "intruders", "forgetting",
            "change: intruders halved", "others halved",
            "score, change: intruders halved", "others halved"]  # fmt: skip
    return report.markdown_table(head, lines)


def intruders_figure() -> Figure:
    """The change of forgetting and of the score, if intruders or as many others are halved."""
    groups = {k: runs for k, runs in scaled_runs().items() if len(runs) == len(TRIALS)}
    labels = [f"{NAMES[method]}, η {rate:g}, ηλ {decay:g}" for method, rate, decay in groups]
    figure, axes = report.panels(12, 4.2, 1, 2)
    for axis, (key, title) in zip(
        axes, (("forgetting", "forgetting (nats per token)"), ("score", "score")), strict=True
    ):
        for shift, which, color in ((-0.2, "intruders", "#b2653f"), (0.2, "others", "#b9b9b9")):
            values = [change(runs, which, key) for runs in groups.values()]
            where = [i + shift for i in range(len(values))]
            axis.barh(where, values, 0.4, color=color, label=f"{which} halved")
        axis.axvline(0, color="black", lw=0.8)
        axis.set(xlabel=f"change of {title}", yticks=range(len(labels)), yticklabels=labels)
        axis.invert_yaxis()
    axes[1].set_yticklabels([])
    axes[0].legend(frameon=False)
    return figure


def what_intruders_do() -> str:
    groups = scaled_runs()
    plain, decayed = groups["lora", 0.01, 0.0], groups["lora", 0.04, 0.08]
    count, few = (statistics.mean(run["intruders"] for run in runs) for runs in (plain, decayed))
    return (
        f"LoRA without decay has {count:.0f} intruder dimensions. Halving them changes its "
        f"forgetting by {change(plain, 'intruders', 'forgetting'):+.2f} nats, while halving as "
        f"many others changes it by {change(plain, 'others', 'forgetting'):+.2f}: so they do carry "
        "a part of the forgetting, as the paper says. But here they also carry what was learned: "
        f"the score changes by {change(plain, 'intruders', 'score'):+.2f}. With decay, LoRA has "
        f"{few:.1f} of them, and halving these changes its forgetting by "
        f"{change(decayed, 'intruders', 'forgetting'):+.2f}: what it still forgets is not in its "
        "intruder dimensions. Decay is the better cure: it lowers forgetting and keeps the score."
    )


def intruders() -> str:
    """The section of intruder dimensions."""
    if not load("intruders"):
        return ""
    return f"""
## Intruder dimensions

The runs above that were chosen, trained again with the same seeds. Then the singular values of all
intruder dimensions ([PROTOCOL.md](PROTOCOL.md) has the definition) are halved, and as a control
those of as many other directions among the first ten of the same layers. Means over the runs; runs
without intruders are left out.

![Changes of forgetting and score by method](results/intruders.png)

{intruders_table()}

{textwrap.fill(what_intruders_do(), 100, break_on_hyphens=False)}
<!-- claim: intruders-scaled -->
"""


# --- the page ---


def page() -> str:
    """RESULTS.md."""
    found = points(load("forgetting"))
    return f"""# Results

Written by `python -m data.results` from the runs of `python -m data.experiments`.
[PROTOCOL.md](PROTOCOL.md) says how everything was measured: read it first. Most results are for
one base with 1M parameters and tasks that we made, mostly `describe`: they may not generalise to
others. The last section compares them with a larger base and a real model.

*Weight decay* on this page means decay towards the values at step 0, and not towards zero. It is
the decoupled form of L2-SP ([arXiv 1802.01483](https://arxiv.org/abs/1802.01483)).

## Score against forgetting

The 1M base on `describe`, 100 steps, validation examples. The question: does the method decide how
much is forgotten, or the regularizer?

![Score against forgetting, a panel per method](results/forgetting.png)

Each line connects the learning rates that were tried with one weight decay, from the smallest one,
the square. Up and left is better: a high score, and little forgetting. Darker lines have more
decay. Prompt methods are not part of this comparison.

The first table has two operating points per method. First row: the best setting without weight
decay. Second row: the best of all settings. The learning rate is tuned in both. The score is the
mean over seeds ± their standard deviation. A star marks the edge of the grid; a setting inside the
grid forgets as little. A dash: the method changes no weights of linear layers. BitFit hardly learns
this task, so its forgetting cannot be compared.

{forgetting_table(found)}

The second table compares methods at the same score: the least forgetting of the settings that
reach it. Left of the arrow, only ηλ = 0 is allowed; on the right, any ηλ. A dash: no setting
reaches it.

{equal_score_table(found)}

{textwrap.fill(what_decay_does(found), 100, break_on_hyphens=False)}

So at equal score these methods forget several times less with weight decay, and their differences
in nats become small. LoRA still forgets more than full fine-tuning at each of these scores. AdaLoRA
needs decay least, because its penalty is a regularizer: without the penalty, it forgets about as
much as LoRA.
<!-- claim: decay-decides -->

{textwrap.fill(what_weakens_this(found), 100, break_on_hyphens=False)}

In the literature, LoRA learns less and forgets less than full fine-tuning
([arXiv 2405.09673](https://arxiv.org/abs/2405.09673)). These runs disagree: LoRA forgets more, with
decay and without. They differ from that paper in almost everything (size, data, 100 steps, r = 8,
the comparison at equal score), so they do not refute it. LoRA also forgets more if it has more
intruder dimensions ([arXiv 2410.21228](https://arxiv.org/abs/2410.21228)). In the first table,
settings that forget little have few intruders, but also small updates. The two go together; the
section on intruder dimensions below takes them apart.
{finals(found)}{intruders()}{sections.all_sections()}{transfer.section()}{tournament.section()}"""


if __name__ == "__main__":
    figure = forgetting_figure(points(load("forgetting")))
    report.save_figure(figure, RESULTS / "forgetting.png", dpi=80)
    report.save_figure(intruders_figure(), RESULTS / "intruders.png", dpi=80)
    sections.drawing = True
    write_text(PAGE, page())
    report.save_figure(overview.figure(), RESULTS / "overview.png", dpi=90)
    write_text(overview.README, overview.readme())
    print(f"wrote {PAGE}, its figures, and the table of {overview.README}")
