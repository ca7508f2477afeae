"""Tables and figures: one Markdown table, and every figure that the project draws."""

import math
import statistics
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minipeft.gpt import write_file

NAMES = {
    "frozen": "frozen base", "full": "full", "lora": "LoRA", "adalora": "AdaLoRA",
    "prompt_tuning": "prompt tuning", "p_tuning": "P-tuning", "prefix_tuning": "prefix tuning",
    "qlora": "QLoRA", "bitfit": "BitFit", "bottleneck": "bottleneck",
}  # fmt: skip
COLORS = {
    "frozen": "#777777", "full": "#1b4f8f", "lora": "#d1741f", "adalora": "#8c2d04",
    "prompt_tuning": "#2e7d32", "p_tuning": "#7cb342", "prefix_tuning": "#6a3d9a",
    "qlora": "#c2185b", "bitfit": "#00acc1", "bottleneck": "#c9a400",
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


def plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def compare_figure(rows: dict[str, list], task) -> Figure:
    """Left: validation loss by step, on a log axis. Right: each row's score with its interval."""
    records = [record for row in rows.values() for record in row]
    key = "slot_loss" if "slot_loss" in records[0].validation[0] else "loss"
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(10, 5.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, row in rows.items():
            points = zip(*(record.validation for record in row), strict=True)  # by step
            curve = [(p[0]["step"], statistics.mean(seed[key] for seed in p)) for p in points]
            if name == "frozen":
                curve = [(0, curve[0][1]), (records[-1].steps, curve[0][1])]
            left.plot(*zip(*curve, strict=True), STYLES.get(name, "-"), color=color_of(name),
                      marker="o", markersize=3, label=name_of(name))  # fmt: skip
        tokens = "slot tokens" if key == "slot_loss" else "completions"
        left.set(
            xlabel="step", ylabel=f"validation loss on {tokens} (nats per token)", yscale="log"
        )
        left.yaxis.set_major_formatter("{x:g}")
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        scores = [[record.score for record in row] for row in rows.values()]
        means = [statistics.mean(values) for values in scores]
        errors = [interval(values) for values in scores]
        bounds = [[min(e, m) for m, e in zip(means, errors, strict=True)],
                  [min(e, 1 - m) for m, e in zip(means, errors, strict=True)]]  # fmt: skip
        right.barh([name_of(name) for name in rows], means, 0.6, xerr=bounds, capsize=3,
                   color=[color_of(name) for name in rows], ecolor="#333333")  # fmt: skip
        for y, m in enumerate(means):
            right.annotate(f"{m:.2f}", (1.04, y), va="center")
        several = max(map(len, scores))
        seeds = f"{several} seeds, 95 % t intervals" if several > 1 else "one seed"
        right.set(xlabel=f"{task.metric} on the test examples\n({seeds})", xlim=(0, 1.15))
        right.invert_yaxis()
        for axis in (left, right):
            plain(axis)
        figure.suptitle(f"Task {task.name}: {records[-1].steps} steps")
    return figure


def rank_figure(ranks: dict[str, int]) -> Figure:
    """The rank of each adapted matrix, layers from left to right."""
    kinds = list(dict.fromkeys(".".join(name.split(".")[3:]) for name in ranks))
    layers = sorted({int(name.split(".")[2]) for name in ranks})
    grid = [[ranks[f"transformer.h.{i}.{kind}"] for i in layers] for kind in kinds]
    figure = Figure(figsize=(1.2 + 0.7 * len(layers), 1.2 + 0.5 * len(kinds)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(grid, cmap="Greys", vmin=0, vmax=1.6 * max(map(max, grid)), aspect="auto")
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
    first = entries[0]
    what = "slot loss" if "slot_loss" in first["points"][0] else "loss"
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    shades = matplotlib.colormaps["viridis"].resampled(len(entries) + 1)
    for i, entry in enumerate(entries):
        finite = [point for point in entry["points"] if math.isfinite(selection_loss(point))]
        rates = [point["learning_rate"] for point in finite]
        losses = [selection_loss(point) for point in finite]
        title = name_of(entry["method"]) if entry["size"] is None else f"size {entry['size']}"
        axis.plot(rates, losses, "o-", color=shades(i), label=title)
        axis.plot(
            entry["best"], min(losses, default=math.nan), "o", ms=13, mfc="none", color=shades(i)
        )
    axis.set(xscale="log", yscale="log", xlabel="learning rate")
    axis.set_ylabel(f"validation {what} (nats per token)")
    tried = sorted({point["learning_rate"] for entry in entries for point in entry["points"]})
    axis.set_xticks(tried, [f"{rate:.2g}" for rate in tried])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False)
    plain(axis)
    figure.suptitle(
        f"{name_of(first['method'])}{', random base' if first['random_base'] else ''}: "
        f"{first['task']}, {first['base']} base, {first['steps']} steps, "
        f"{first['examples']} examples", fontsize=10,
    )  # fmt: skip
    return figure


def memory_figure(found: dict[str, dict[str, dict[str, int]]]) -> Figure:
    """A panel per shape and a stacked bar per method; each panel has its own scale."""
    columns = min(len(found), 4)
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.7 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, (name, methods) in zip(axes, found.items(), strict=False):
        largest = max(sum(parts.values()) for parts in methods.values())
        unit, factor = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
        bottom = [0.0] * len(methods)
        for part, color in zip(next(iter(methods.values())), PART_COLORS, strict=True):
            heights = [parts[part] / factor for parts in methods.values()]
            axis.bar([name_of(m) for m in methods], heights, 0.65, bottom, color=color, label=part)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        for i, total in enumerate(bottom):
            axis.annotate(f"{total:.3g}", (i, total), (0, 2), ha="center",
                          textcoords="offset points")  # fmt: skip
        axis.set(title=name, ylabel=unit, ylim=(0, 1.15 * max(bottom)))
        plain(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def study_figure(records: list, curves: list[dict]) -> Figure:
    """Full fine-tuning and LoRA: score by steps, by examples, and against forgetting."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    names = {"steps": "steps", "n_train": "training examples"}
    usual = {"steps": 100, "n_train": 400}
    for axis, key, fixed in ((axes[0], "steps", "n_train"), (axes[1], "n_train", "steps")):
        rows = [r for r in records if getattr(r, fixed) == usual[fixed]]
        for method in ("full", "lora"):
            values = sorted({getattr(r, key) for r in rows if r.method == method})
            scores = [
                [r.score for r in rows if (r.method, getattr(r, key)) == (method, value)]
                for value in values
            ]
            means, errors = [statistics.mean(s) for s in scores], [interval(s) for s in scores]
            axis.errorbar(values, means, errors, color=COLORS[method], marker="o", capsize=3,
                          label=NAMES[method])  # fmt: skip
        axis.set(xscale="log", xlabel=names[key], ylim=(0, 1.05))
        axis.set(ylabel="slot accuracy on held-out names", title=f"{usual[fixed]} {names[fixed]}")
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
    for entry in curves:
        points, color = entry["points"], COLORS[entry["method"]]
        axes[2].plot([p["forgetting"] for p in points], [p["score"] for p in points], "o-",
                     color=color, label=NAMES[entry["method"]])  # fmt: skip
        for p in points:
            axes[2].annotate(f"{p['learning_rate']:g}", (p["forgetting"], p["score"]), fontsize=8,
                             xytext=(4, -10), textcoords="offset points")  # fmt: skip
    axes[2].set(xlabel="forgetting (nats per token on pretraining text)", xscale="log")
    axes[2].set_ylim(0, 1.05)
    axes[2].set(ylabel="validation slot accuracy", title="by learning rate")
    for axis in axes:
        axis.legend(frameon=False)
        plain(axis)
    return figure


def bits_figure(records: list[dict]) -> Figure:
    """Divergence and agreement by code, one line per base; filled: blocks, hollow: one scale."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(r["code"] for r in records))
    colors = {"0.3m": "#2e7d32", "1m": "#d1741f", "3m": "#1b4f8f"}
    sizes = list(dict.fromkeys(r["blocksize"] for r in records))
    for (axis, key), (base, color), size in product(
        ((left, "divergence"), (right, "agreement")), colors.items(), sizes
    ):
        values = [r[key] for r in records if (r["base"], r["blocksize"]) == (base, size)]
        how = f"blocks of {size}" if size else "one scale per matrix"
        style = {"mfc": color if size else "white", "label": f"{base}, {how}"}
        axis.plot(names, values, "o-" if size else "o:", color=color, **style)
        plain(axis)
    left.set(yscale="log", ylabel="KL(base ‖ quantized), nats per token")
    right.set(ylim=(0, 1.03), ylabel="share of tokens with the same top prediction")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip
    return figure
