"""Methods against full fine-tuning, on the same data in the same order."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

from minipeft.files import MEBIBYTE, check_types, has_type, one_line, read_json, show, write_text
from minipeft.lab import report
from minipeft.lab.base import Base
from minipeft.lab.finetune import Record, build_model, check_lengths, finetune
from minipeft.lab.recipes import RECIPES, Recipe, RunConfig
from minipeft.lab.tasks import Task

RANDOM = "full, random base"


def compare(
    base: Base, task: Task, recipes: list[Recipe], run: RunConfig, seeds: int, control: bool = True
) -> list[Record]:
    """A record for every recipe and seed, and for the control: full fine-tuning of a random model
    of the same shape. Raises ValueError, before any training, if a recipe's virtual tokens do not
    fit into the context."""
    for recipe in recipes:
        check_lengths(build_model(base, recipe, run), base, task)
    jobs = [
        (recipe, replace(run, seed=seed))
        for recipe in recipes
        for seed in range(1 if recipe.method == "frozen" else seeds)
    ]
    if control and any(recipe.method == "full" for recipe in recipes):
        jobs += [
            (RECIPES["full"], replace(run, seed=seed, random_base=True)) for seed in range(seeds)
        ]
    return [finetune(base, task, recipe, job) for recipe, job in jobs]


def rows(records: list[Record]) -> dict[str, list[Record]]:
    """The records by row of the table, in order; a row is a method, or a method at a place."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        place = f", {record.targets}" if record.targets else ""
        label = RANDOM if record.random_base else record.method + place
        grouped.setdefault(label, []).append(record)
    return grouped


def mean(records: list[Record], name: str) -> float:
    return statistics.mean(getattr(record, name) for record in records)


def spread(records: list[Record], name: str) -> str:
    """Mean ± standard deviation."""
    values = [getattr(record, name) for record in records]
    text = f"{statistics.mean(values):.3f}"
    return text + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def forgetting(records: list[Record], state: str = "on") -> float | None:
    """The mean rise of the loss on held-out text."""
    found = [rise for record in records if (rise := record.forgot(state)) is not None]
    return statistics.mean(found) if found else None


def last_loss(records: list[Record]) -> float | None:
    """The mean of the last validation losses."""
    found = [record.validation[-1]["loss"] for record in records if record.validation]
    return statistics.mean(found) if found else None


def share_of_gap(records: list[Record], row: list[Record]) -> float | None:
    """How far a method gets from the frozen base's score (0) to full fine-tuning's (1)."""
    grouped = rows(records)
    if not {"frozen", "full"} <= set(grouped):
        return None
    low, high = mean(grouped["frozen"], "score"), mean(grouped["full"], "score")
    return (mean(row, "score") - low) / (high - low) if high > low else None


def in_spread(record: Record, others: list[Record], name="score", margin: float = 0.05) -> bool:
    """Whether a run lies within three standard deviations, plus `margin`, of the others' mean."""
    values = [getattr(other, name) for other in others]
    allowed = 3 * statistics.stdev(values) + margin
    return abs(getattr(record, name) - statistics.mean(values)) <= allowed


NARROW = (  # columns for a terminal, next to the score
    "method", "lr", "trainable", "s / step", "validation loss", "share of gap", "forgetting",
)  # fmt: skip


def table(records: list[Record], task: Task, wide: bool = True) -> str:
    """A Markdown table with one line per method; columns without any value are left out.

    wide: all columns. Otherwise those eight that fit into a terminal.
    """
    lines = [cells(name, row, records, task.metric) for name, row in rows(records).items()]
    used = [column for column in lines[0] if any(line[column] != "–" for line in lines)]
    if not wide:
        used = [column for column in used if column in {*NARROW, task.metric}]
    return report.markdown_table(used, [[line[column] for column in used] for line in lines])


def cells(name: str, row: list[Record], records: list[Record], metric: str) -> dict[str, str]:
    """A row of the table, by column."""

    def show(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    def average(field: str, form: str) -> str:
        known = [record for record in row if getattr(record, field) is not None]
        return format(mean(known, field), form) if known else "–"

    def kilobytes(count: int | None) -> str:
        return f"{count / 1e3:,.0f}" if count else "–"

    def rise(state: str) -> str:
        return "–" if row[0].random_base else show(forgetting(row, state), "+.2f")

    return {
        "method": report.name_of(name),
        "lr": average("learning_rate", "g"),
        "trainable": average("trainable", ",.0f"),
        "weights, kB": kilobytes(row[0].weight_bytes),
        "disk, kB": kilobytes(row[0].disk_bytes),
        "s / step": average("seconds_per_step", ".3f"),
        "validation loss": show(last_loss(row), ".3f"),
        "slot loss": average("test_slot_loss", ".3f"),
        "template loss": average("test_template_loss", ".3f"),
        metric: spread(row, "score"),
        "share of gap": show(share_of_gap(records, row), ".2f"),
        "forgetting at step 0": rise("start"),
        "forgetting": rise("on"),
        "adapter off": rise("off"),
    }


def save(records: list[Record], task: Task, folder: str | Path) -> None:
    """Write compare.json, then the figures compare.png and, if ranks were allocated, ranks.png."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(
        json.dumps([record.to_json() for record in records]),
        parse_float=lambda number: float(f"{float(number):.6g}"),
    )
    for found in rounded:
        if found["seed"]:  # completions are kept for the first seed only
            found.pop("examples", None)
    text = "[\n" + ",\n".join(json.dumps(found) for found in rounded) + "\n]\n"
    write_text(folder / "compare.json", text)
    report.save_figure(report.compare_figure(rows(records), task), folder / "compare.png")
    ranks = [record.ranks for record in records if record.ranks]
    if ranks:
        report.save_figure(report.rank_figure(ranks[0]), folder / "ranks.png")


def load(file: str | Path) -> list[Record]:
    """The records in a compare.json. Raises ValueError for another file."""
    file = Path(file)
    found = read_json(file, list, 64 * MEBIBYTE)
    if not has_type(found, list[dict]) or not found:
        raise ValueError(f"{file} must be a list of records, got {show(found)}")
    try:
        records = [Record(**check_types(record, Record, file)) for record in found]
    except TypeError as error:  # a field is missing
        raise ValueError(f"{file} does not hold records: {one_line(error)}") from error
    for i, record in enumerate(records):
        losses = all({"step", "loss"} <= point.keys() for point in record.validation)
        if record.score is None or not losses or "base" not in (record.forgetting or {"base"}):
            raise ValueError(f"{file}: record {i} lacks a score or losses")
    return records


def show_examples(records: list[Record], n: int = 2) -> str:
    """What each method wrote for the first prompts of the test set."""
    lines = []
    for i in range(min(n, len(records[0].examples))):
        lines += ["", f"prompt     {records[0].examples[i]['prompt']}"]
        lines += [f"reference {records[0].examples[i]['reference']}"]
        for name, row in rows(records).items():
            lines.append(f"  {name:<18}{row[0].examples[i]['generated'].strip()}")
    return "\n".join(lines)
