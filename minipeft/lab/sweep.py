"""Which learning rate suits a method: a grid over it and the adapter's size.

Every run is judged on validation examples (by slot loss if the task has slots, else by loss), with
seeds that no reported run uses. A best rate at the edge of its grid is refused. `compare` reads the
committed file of results; a sweep writes its own file unless that one is named.
"""

import json
import os
import statistics
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path

from tqdm import tqdm

from minipeft.files import MEBIBYTE, has_type, read_json, write_text
from minipeft.lab import report
from minipeft.lab.base import Base
from minipeft.lab.finetune import finetune
from minipeft.lab.recipes import Recipe, RunConfig
from minipeft.lab.report import selection_loss
from minipeft.lab.tasks import Task
from minipeft.lab.train import bar_options

FIRST_SEED = 100
ENTRY = {  # the types of what an entry must have
    "method": str, "random_base": bool, "base": str, "task": str, "steps": int, "examples": int,
    "size": int | None, "best": float, "points": list[dict[str, float]],
}  # fmt: skip
KEY = tuple(ENTRY)[:7]  # identifies an entry


@dataclass
class Grid:
    """What to try."""

    learning_rates: list[float]
    sizes: list[int]  # empty: the recipe's own
    seeds: int = 1


def sweep(base: Base, task: Task, recipe: Recipe, run: RunConfig, grid: Grid) -> list[dict]:
    """An entry per size: its points, by learning rate, and the best of them."""
    judged = replace(task, test=task.validation)  # never the test examples
    run = replace(run, n_evaluations=1, quiet=True)
    points: dict[int | None, list[dict]] = {size: [] for size in grid.sizes or [recipe.size]}
    for size, rate in tqdm(
        list(product(points, sorted(grid.learning_rates))), "sweep", **bar_options()
    ):
        sized = recipe if size == recipe.size else recipe.with_size(size)
        runs = [
            replace(run, learning_rate=rate, seed=FIRST_SEED + seed) for seed in range(grid.seeds)
        ]
        points[size].append({"learning_rate": rate} | measure(base, judged, sized, runs))
    common = {
        "date": date.today().isoformat(), "method": recipe.method, "random_base": run.random_base,
        "base": base.name, "task": task.name, "steps": run.steps, "examples": len(task.train),
        "seeds": grid.seeds,
    }  # fmt: skip
    best = {size: min(tried, key=selection_loss) for size, tried in points.items()}
    return [
        common | {"size": size, "best": best[size]["learning_rate"], "points": tried}
        for size, tried in points.items()
    ]


def measure(base: Base, task: Task, recipe: Recipe, runs: list[RunConfig]) -> dict[str, float]:
    """Means over runs: validation losses, score, forgetting. Empty if a loss is not finite."""
    try:
        records = [finetune(base, task, recipe, run) for run in runs]
    except FloatingPointError:
        return {}
    last = [record.validation[-1] for record in records]
    names = [name for name in last[0] if name != "step"]
    point = {name: statistics.mean(row[name] for row in last) for name in names}
    point["score"] = statistics.mean(record.score for record in records)
    if base.held_out is not None:
        point["forgetting"] = statistics.mean(record.forgot() for record in records)
    return point


def check(entries: list[dict]) -> None:
    """Raises ValueError if a best rate is the smallest or the largest that was tried."""
    for entry in entries:
        rates = [point["learning_rate"] for point in entry["points"]]
        if entry["best"] in (rates[0], rates[-1]):
            tried = ", ".join(f"{rate:g}" for rate in rates)
            raise ValueError(
                f"{entry['method']}, size {entry['size']}: the best learning rate, "
                f"{entry['best']:g}, is at the edge of the grid ({tried}): widen it. Nothing was "
                "written"
            )


def load(file: Path) -> list[dict]:
    """The entries in a file of results; none if it does not exist. Raises ValueError for another
    file."""
    if not os.path.lexists(file):
        return []
    entries = read_json(file, list, 64 * MEBIBYTE)
    right = has_type(entries, list[dict]) and all(
        all(name in entry and has_type(entry[name], kind) for name, kind in ENTRY.items())
        and all("learning_rate" in point for point in entry["points"])
        and entry["best"] in [point["learning_rate"] for point in entry["points"]]
        for entry in entries
    )
    if not right:
        raise ValueError(f"{file} is not a file of a sweep's results: name another file")
    return entries


def save(entries: list[dict], file: str | Path) -> None:
    """Put the entries into a file of results; older ones with the same KEY are replaced."""
    check(entries)
    file = Path(file)
    new = {tuple(e[name] for name in KEY) for e in entries}
    kept = [e for e in load(file) if tuple(e[name] for name in KEY) not in new]
    text = json.dumps(kept + entries, indent=1) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)


def table(entries: list[dict]) -> str:
    """A Markdown table: one line per size, the loss by learning rate, the best one bold."""
    rates = sorted({point["learning_rate"] for entry in entries for point in entry["points"]})
    lines = []
    for entry in entries:
        cells = dict.fromkeys(rates, "")
        for point in entry["points"]:
            bold = "**" if point["learning_rate"] == entry["best"] else ""
            cells[point["learning_rate"]] = f"{bold}{selection_loss(point):.3g}{bold}"
        lines.append([entry["size"] or "–", *cells.values()])
    return report.markdown_table(["size", *(f"{rate:g}" for rate in rates)], lines)
