"""Which learning rate suits a method: a grid over it and over the adapter's size, or Optuna.

Every run is judged on the validation examples (slot loss where the task has slots, else the loss),
with seeds that no reported run uses. The best rate of each size goes to the committed file of
results, which `compare` reads. An optimum at the edge of its grid is none, and is refused.
"""

import json
import math
import statistics
from dataclasses import replace
from datetime import date
from itertools import product
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from tqdm import tqdm

from minipeft.lab.finetune import METHODS, SWEEPS, Base, finetune
from minipeft.lab.tasks import Task
from minipeft.peft_model import write_file

FIRST_SEED = 100
SAME = ("method", "random_base", "base", "task", "steps", "examples", "size")  # what an entry is of


def sweep(
    base: Base,
    task: Task,
    method: str,
    learning_rates: list[float],
    sizes: list[int],
    steps: int,
    seeds: int = 1,
    trials: int | None = None,
    random_base: bool = False,
    **options,
) -> list[dict]:
    """An entry for each size: its points, by learning rate, and the best of them.

    With `trials`, Optuna looks between the smallest and the largest rate instead of on the grid.
    """
    judged = replace(task, test=task.validation)
    of = {
        "method": method, "random_base": random_base, "base": Path(base.folder).name,
        "task": task.name, "steps": steps, "examples": len(task.train),
    }  # fmt: skip
    sizes = sizes or [METHODS[method].get("size")]
    points = {size: [] for size in sizes}

    def loss(learning_rate: float, size: int | None) -> float:
        point = {"learning_rate": learning_rate}
        try:
            runs = [
                finetune(
                    base, judged, method, steps, seed, learning_rate, size, validations=1,
                    random_base=random_base, quiet=True, **options,
                )
                for seed in range(FIRST_SEED, FIRST_SEED + seeds)
            ]  # fmt: skip
        except FloatingPointError:  # not finite: the point stays without a loss
            runs = []
        for name in ("loss", "slot_loss", "frame_loss"):
            values = [r["validation"][-1][name] for r in runs if name in r["validation"][-1]]
            point |= {name: statistics.mean(values)} if values else {}
        if runs:
            point["score"] = statistics.mean(r["score"] for r in runs)
        if base.held_out is not None and runs:
            forgotten = [r["forgetting"]["on"] - r["forgetting"]["base"] for r in runs]
            point["forgetting"] = statistics.mean(forgotten)
        points[size].append(point)
        return judge(point)

    if trials:
        import optuna

        low, high = min(learning_rates), max(learning_rates)
        optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0)).optimize(
            lambda trial: loss(
                trial.suggest_float("learning_rate", low, high, log=True),
                trial.suggest_categorical("size", sizes),
            ),
            n_trials=trials,
        )
    else:
        for size, learning_rate in tqdm(list(product(sizes, learning_rates)), desc="sweep"):
            loss(learning_rate, size)
    entries = []
    for size, tried in points.items():
        if not tried:  # Optuna may never choose a size
            continue
        tried.sort(key=lambda point: point["learning_rate"])
        best = min(tried, key=judge)
        entries.append(
            {"date": date.today().isoformat(), **of, "size": size, "seeds": seeds}
            | {"best": best["learning_rate"], "points": tried}
        )
    return entries


def judge(point: dict) -> float:
    """The loss by which points are compared; a run that did not end finite is the worst."""
    return point.get("slot_loss", point.get("loss", math.inf))


def check(entries: list[dict]) -> None:
    """Raises ValueError where a best rate is the smallest or the largest that was tried."""
    for entry in entries:
        rates = [point["learning_rate"] for point in entry["points"]]
        if entry["best"] in (rates[0], rates[-1]):
            raise ValueError(
                f"{entry['method']}, size {entry['size']}: the best learning rate, "
                f"{entry['best']:g}, is at the edge of {', '.join(f'{r:g}' for r in rates)}. "
                f"An optimum at an edge is none: widen the grid there. No result was written"
            )


def save(entries: list[dict], file: str | Path = SWEEPS) -> None:
    """Put the entries into the file of results, in the place of older ones of the same runs."""
    check(entries)
    file = Path(file)
    old = json.loads(file.read_text()) if file.is_file() else []
    new = {tuple(e[name] for name in SAME) for e in entries}
    kept = [e for e in old if tuple(e[name] for name in SAME) not in new]
    text = json.dumps(kept + entries, indent=1) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, lambda path: Path(path).write_text(text))


def table(entries: list[dict]) -> str:
    """A Markdown table: a line a size, the judged loss by learning rate, the best one bold."""
    rates = sorted({point["learning_rate"] for entry in entries for point in entry["points"]})
    lines = ["| size | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("|" + "---|" * (len(rates) + 1))
    for entry in entries:
        cells = dict.fromkeys(rates, "")
        for point in entry["points"]:
            bold = "**" if point["learning_rate"] == entry["best"] else ""
            cells[point["learning_rate"]] = f"{bold}{judge(point):.3g}{bold}"
        lines.append(f"| {entry['size'] or '–'} | " + " | ".join(cells.values()) + " |")
    return "\n".join(lines)


def picture(entries: list[dict]) -> Figure:
    """Left: the loss by learning rate, a curve a size. Right, with several sizes: a heat map."""
    first, several = entries[0], len(entries) > 1
    what = "slot loss" if "slot_loss" in first["points"][0] else "loss"
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(10 if several else 5.5, 4.2), layout="constrained")
        axes = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
        shades = matplotlib.colormaps["viridis"].resampled(len(entries) + 1)
        for i, entry in enumerate(entries):
            finite = [point for point in entry["points"] if math.isfinite(judge(point))]
            rates, losses = [p["learning_rate"] for p in finite], [judge(p) for p in finite]
            title = entry["method"] if entry["size"] is None else f"size {entry['size']}"
            axes[0].plot(rates, losses, "o-", color=shades(i), label=title)
            axes[0].plot(
                entry["best"], min(losses), "o", markersize=13, mfc="none", color=shades(i)
            )
        axes[0].set(xscale="log", yscale="log", xlabel="learning rate")
        axes[0].set(ylabel=f"validation {what} (nats a token)")
        axes[0].set_xticks(rates, [f"{rate:.2g}" for rate in rates], minor=False)
        axes[0].xaxis.set_minor_locator(NullLocator())
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_formatter("")
        axes[0].spines[["top", "right"]].set_visible(False)
        axes[0].legend(frameon=False)
        rates = [point["learning_rate"] for point in first["points"]]
        if several and all([p["learning_rate"] for p in e["points"]] == rates for e in entries):
            losses = [[judge(point) for point in entry["points"]] for entry in entries]
            image = axes[1].imshow(losses, cmap="Greys", norm="log", aspect="auto")
            for row, column in product(range(len(entries)), range(len(rates))):
                value = losses[row][column]
                color = "white" if image.norm(value) > 0.5 else "black"
                axes[1].text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
            axes[1].set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
            axes[1].set_yticks(range(len(entries)), [entry["size"] for entry in entries])
            axes[1].set(xlabel="learning rate", ylabel="size (rank, width or virtual tokens)")
            axes[1].set_title(f"validation {what}")
        elif several:
            axes[1].set_axis_off()
        figure.suptitle(
            f"{first['method']}{', random base' if first['random_base'] else ''}: {first['task']}, "
            f"{first['base']} base, {first['steps']} steps, {first['examples']} examples"
        )
    return figure
