"""Tables and figures: one Markdown table, and every figure that the project draws."""

import io
import math
import statistics
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minipeft.files import write_file

NAMES = {
    "frozen": "frozen base", "full": "full", "lora": "LoRA", "adalora": "AdaLoRA",
    "prompt_tuning": "prompt tuning", "p_tuning": "P-tuning", "prefix_tuning": "prefix tuning",
    "qlora": "QLoRA", "bitfit": "BitFit", "bottleneck": "bottleneck", "rslora": "rsLoRA",
    "lora_plus": "LoRA+", "pissa": "PiSSA", "dora": "DoRA", "vera": "VeRA", "ia3": "(IA)³",
}  # fmt: skip
COLORS = {
    "frozen": "#777777", "full": "#1b4f8f", "lora": "#d1741f", "adalora": "#8c2d04",
    "prompt_tuning": "#2e7d32", "p_tuning": "#7cb342", "prefix_tuning": "#6a3d9a",
    "qlora": "#c2185b", "bitfit": "#00acc1", "bottleneck": "#c9a400", "rslora": "#a1887f",
    "lora_plus": "#e53935", "pissa": "#00695c", "dora": "#5c6bc0", "vera": "#ad1457",
    "ia3": "#558b2f",
    "full, random base": "#b9b9b9",
}  # fmt: skip
STYLES = {"frozen": ":", "full, random base": "--"}
PART_COLORS = ("#1b4f8f", "#d1741f", "#6a3d9a", "#b9b9b9")
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # t quantiles, 1 to 9 degrees


def markdown_table(head: Iterable[str], rows: Iterable[Iterable]) -> str:
    """A Markdown table."""
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def name_of(row: str) -> str:
    """A row's name as people write it: "lora, attention" -> "LoRA, attention"."""
    method, comma, place = row.partition(",")
    return NAMES.get(method, method) + comma + place


def color_of(row: str) -> str:
    return COLORS.get(row, COLORS.get(row.split(",")[0], "black"))


def interval(values: list[float]) -> float:
    """Half the width of the mean's 95 % t interval; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    t = T_95[min(len(values), 10) - 2]
    return t * statistics.stdev(values) / math.sqrt(len(values))


def save_figure(figure: Figure, path: Path, dpi: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda to: figure.savefig(to, format="png", dpi=dpi))


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook. alt: what it shows, for people who cannot see it."""
    from IPython.display import Image, display
    from matplotlib import pyplot

    to = io.BytesIO()
    figure.savefig(to, format="png", dpi=90, bbox_inches="tight")
    pyplot.close(figure)
    display(Image(to.getvalue(), alt=alt))


def panels(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, in reading order."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


@matplotlib.rc_context({"font.size": 11})
def compare_figure(rows: dict[str, list], task) -> Figure:
    """Left: validation loss by step, on a log axis. Right: each row's score with its interval."""
    figure, (left, right) = panels(10, 5.2, 1, 2)
    records = [record for row in rows.values() for record in row]
    steps = records[-1].steps
    has_slots = "slot_loss" in records[0].validation[0]
    key, tokens = ("slot_loss", "slot tokens") if has_slots else ("loss", "completions")
    for y, (name, row) in enumerate(rows.items()):
        title, color = name_of(name), color_of(name)
        by_step = zip(*(record.validation for record in row), strict=True)
        curve = [(seeds[0]["step"], statistics.mean(p[key] for p in seeds)) for seeds in by_step]
        if name == "frozen":  # measured once, as it does not change
            curve.append((steps, curve[0][1]))
        style = STYLES.get(name, "-")
        left.plot(*zip(*curve, strict=True), style, color=color, marker="o", ms=3, label=title)
        scores = [record.score for record in row]
        score, error = statistics.mean(scores), interval(scores)
        bounds = [[min(error, score)], [min(error, 1 - score)]]
        right.barh(title, score, 0.6, xerr=bounds, capsize=3, color=color, ecolor="#333333")
        right.annotate(f"{score:.2f}", (1.04, y), va="center")
    left.set(xlabel="step", ylabel=f"validation loss on {tokens} (nats per token)", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    several = max(map(len, rows.values()))
    seeds = f"{several} seeds, 95 % t intervals" if several > 1 else "one seed"
    right.set(xlabel=f"{task.metric} on the test examples\n({seeds})", xlim=(0, 1.15))
    right.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Task {task.name}: {steps} steps", parse_math=False)
    return figure


def rank_figure(ranks: dict[str, int]) -> Figure:
    """The rank of each adapted matrix, layers from left to right."""
    kinds = list(dict.fromkeys(".".join(name.split(".")[3:]) for name in ranks))
    layers = sorted({int(name.split(".")[2]) for name in ranks})
    grid = [[ranks[f"transformer.h.{i}.{kind}"] for i in layers] for kind in kinds]
    figure, (axis,) = panels(1.2 + 0.7 * len(layers), 1.2 + 0.5 * len(kinds), 1, 1)
    axis.imshow(grid, cmap="Greys", vmin=0, vmax=1.6 * max(ranks.values()), aspect="auto")
    for row, column in product(range(len(kinds)), range(len(layers))):
        axis.text(column, row, grid[row][column], ha="center", va="center")
    axis.set_xticks(range(len(layers)), layers)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set(xlabel="layer", title="rank kept")
    return figure


def selection_loss(point: dict) -> float:
    """The loss by which a sweep's points are compared; a run that did not stay finite is worst."""
    return point.get("slot_loss", point.get("loss", math.inf))


def sweep_figure(entries: list[dict]) -> Figure:
    """Validation loss by learning rate, one curve per size; the best point has a circle."""
    figure, (axis,) = panels(6.5, 4.2, 1, 1)
    shades = matplotlib.colormaps["viridis"].resampled(len(entries) + 1)
    for i, entry in enumerate(entries):
        losses = {p["learning_rate"]: selection_loss(p) for p in entry["points"]}
        finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        title = name_of(entry["method"]) if entry["size"] is None else f"size {entry['size']}"
        axis.plot(finite.keys(), finite.values(), "o-", color=shades(i), label=title)
        axis.plot(entry["best"], losses[entry["best"]], "o", ms=13, mfc="none", color=shades(i))
    first = entries[0]
    what = "slot loss" if "slot_loss" in first["points"][0] else "loss"
    axis.set(xscale="log", yscale="log", xlabel="learning rate")
    axis.set_ylabel(f"validation {what} (nats per token)")
    tried = sorted({point["learning_rate"] for entry in entries for point in entry["points"]})
    axis.set_xticks(tried, [f"{rate:.2g}" for rate in tried])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False)
    figure.suptitle(
        f"{name_of(first['method'])}{', random base' if first['random_base'] else ''}: "
        f"{first['task']}, {first['base']} base, {first['steps']} steps, "
        f"{first['examples']} examples", fontsize=10, parse_math=False,
    )  # fmt: skip
    return figure


def memory_figure(found: dict[str, dict[str, dict[str, int]]]) -> Figure:
    """A panel per shape and a stacked bar per method; each panel has its own scale. `full-8` and
    so on: see memory.py."""
    columns = min(len(found), 4)
    lines = math.ceil(len(found) / columns)
    figure, axes = panels(2.4 * columns, 2.7 * lines + 0.5, lines, columns)
    for axis, (name, methods) in zip(axes, found.items(), strict=False):
        largest = max(sum(parts.values()) for parts in methods.values())
        unit, factor = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
        names = [name_of(method) for method in methods]
        bottom = [0.0] * len(methods)
        for part, color in zip(next(iter(methods.values())), PART_COLORS, strict=True):
            heights = [parts[part] / factor for parts in methods.values()]
            bars = axis.bar(names, heights, 0.65, bottom, color=color, label=part)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        axis.bar_label(bars, [f"{total:.3g}" for total in bottom], padding=2)
        axis.set(ylabel=unit, ylim=(0, 1.15 * max(bottom)))
        axis.set_title(name[-30:], parse_math=False)
        axis.tick_params(axis="x", labelsize=8)
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    parts = axes[0].get_legend_handles_labels()
    figure.legend(*parts, loc="outside lower center", ncols=4, frameon=False)
    return figure


def study_figure(records: list, curves: list[dict]) -> Figure:
    """Full fine-tuning and LoRA: score by steps, by examples, and against forgetting."""
    figure, axes = panels(9.5, 3.4, 1, 3)
    by_steps, by_examples, by_rate = axes
    plot_scores(by_steps, [r for r in records if r.n_train == 400], "steps")
    by_steps.set(xlabel="steps", title="400 training examples")
    plot_scores(by_examples, [r for r in records if r.steps == 100], "n_train")
    by_examples.set(xlabel="training examples", title="100 steps")
    for entry in curves:
        spots = [(point["forgetting"], point["score"]) for point in entry["points"]]
        name, color = NAMES[entry["method"]], COLORS[entry["method"]]
        by_rate.plot(*zip(*spots, strict=True), "o-", color=color, label=name)
        for point, spot in zip(entry["points"], spots, strict=True):
            above = entry["method"] == "full" or point["score"] < 0.1
            rate, offset = f"{point['learning_rate']:g}".lstrip("0"), (0, 7 if above else -14)
            by_rate.annotate(rate, spot, offset, textcoords="offset points", ha="center")
    by_rate.set(xlabel="forgetting (nats per token)", ylabel="validation slot accuracy")
    by_rate.set(xscale="log", title="by learning rate")
    by_rate.set_xticks([0.3, 1, 3], ["0.3", "1", "3"])
    by_rate.set_xticks([], minor=True)
    by_rate.margins(x=0.2)
    for axis in axes:
        axis.set_ylim(0, 1.1)
        axis.legend(frameon=False)
    return figure


def plot_scores(axis: Axes, records: list, key: str) -> None:
    """Mean scores of full fine-tuning and LoRA with their intervals, by an attribute of records."""
    values = sorted({getattr(record, key) for record in records})
    for method in ("full", "lora"):
        rows = [
            [r.score for r in records if r.method == method and getattr(r, key) == value]
            for value in values
        ]
        axis.errorbar(values, list(map(statistics.mean, rows)), list(map(interval, rows)),
                      color=COLORS[method], marker="o", capsize=3, label=NAMES[method])  # fmt: skip
    axis.set(xscale="log", ylabel="slot accuracy on held-out names")
    axis.set_xticks(values, [str(value) for value in values])
    axis.minorticks_off()


def bits_figure(records: list[dict]) -> Figure:
    """Divergence and agreement by code, one line per base; filled: blocks, hollow: one scale."""
    figure, (left, right) = panels(10, 4.2, 1, 2)
    names = list(dict.fromkeys(r["code"] for r in records))
    colors = {"0.3m": "#2e7d32", "1m": "#d1741f", "3m": "#1b4f8f"}
    sizes = list(dict.fromkeys(r["blocksize"] for r in records))
    for (base, color), size in product(colors.items(), sizes):
        found = [r for r in records if (r["base"], r["blocksize"]) == (base, size)]
        how = f"blocks of {size}" if size else "one scale per matrix"
        style = {"color": color, "mfc": color if size else "white", "label": f"{base}, {how}"}
        for axis, key in ((left, "divergence"), (right, "agreement")):
            axis.plot(names, [r[key] for r in found], "o-" if size else "o:", **style)
    left.set(yscale="log", ylabel="KL(base ‖ quantized), nats per token")
    right.set(ylim=(0, 1.03), ylabel="share of tokens with the same top prediction")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip
    return figure


def successors_figure() -> Figure:
    """What LoRA and six successors change: a drawing each. Orange is trained, grey is frozen."""
    grey, orange = "#b9b9b9", "#d1741f"
    captions = {
        "LoRA": "W + α/r · B A",
        "rsLoRA": "W + α/√r · B A",
        "LoRA+": "learning rates:\nη for A, 16 η for B",
        "PiSSA": "B A starts as the largest\npart of W; the rest is frozen",
        "DoRA": "each row scaled to length 1,\nthen times its entry of m",
        "VeRA": "A and B random, shared by all\nlayers; rows times b and d",
        "(IA)³": "each row times\nits entry of l",
    }
    figure, axes = panels(9, 4.4, 2, 4)
    for axis, (name, caption) in zip(axes, captions.items(), strict=False):
        frozen = r"$W_\mathrm{res}$" if name == "PiSSA" else "W"
        boxes: dict = {frozen: (0, 2, 4, 4, grey)}  # x, y, width, height, color
        if name != "(IA)³":
            boxes |= {"B": (5.4, 2, 1.1, 4, orange), "A": (6.8, 4.9, 4, 1.1, orange)}
            axis.text(4.7, 4, "+", ha="center", va="center")
        added: dict = {
            "DoRA": {"m": (-1.7, 2, 1, 4, orange)},
            "VeRA": {"b": (5.2, 2, 1, 4, orange), "B": (6.3, 2, 1.1, 4, grey),
                     "d": (7.7, 4.9, 1, 1.1, orange), "A": (8.8, 4.9, 2.9, 1.1, grey)},
            "(IA)³": {"l": (-1.7, 2, 1, 4, orange)},
        }  # fmt: skip
        boxes |= added.get(name, {})
        if name == "DoRA":  # m times the whole sum
            axis.text(-0.35, 4, "(", ha="center", va="center", fontsize=22)
            axis.text(11.3, 4, ")", ha="center", va="center", fontsize=22)
        for text, (x, y, width, height, color) in boxes.items():
            axis.add_patch(Rectangle((x, y), width, height, fc=color, ec="black", lw=0.8))
            axis.text(x + width / 2, y + height / 2, text, ha="center", va="center")
        axis.text(4.5, 1.4, caption, ha="center", va="top", fontsize=9)
        axis.set(xlim=(-2, 11.8), ylim=(-0.6, 7.3), aspect="equal")
        axis.set_title(name, fontweight="bold")
    for axis in axes:
        axis.set_axis_off()
    return figure
