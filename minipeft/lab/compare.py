"""The main job: methods against full fine-tuning, as a table, a JSON file and a picture."""

import json
import statistics
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from minipeft.lab.finetune import PLACED, Base, finetune
from minipeft.lab.tasks import Task
from minipeft.peft_model import write_file

COLORS = {
    "frozen": "#777777", "full": "#1b4f8f", "lora": "#d1741f", "adalora": "#8c2d04",
    "prompt_tuning": "#2e7d32", "p_tuning": "#7cb342", "prefix_tuning": "#6a3d9a",
    "qlora": "#c2185b", "bitfit": "#00acc1", "bottleneck": "#c9a400", "random": "#b9b9b9",
}  # fmt: skip
RANDOM = "full, random base"


def compare(
    base: Base,
    task: Task,
    methods: list[str],
    steps: int,
    seeds: int,
    control: bool = True,
    targets: list[str] | None = None,
    **options,
) -> list[dict]:
    """A record for every method and seed, all on the same data in the same order, and the control:
    full fine-tuning of a random model of the same shape. With `targets`, weight methods come once
    for each placement."""
    runs = []
    for method in methods:
        places = targets if targets and method in PLACED else [None]
        for place in places:
            runs += [(method, s, False, place) for s in range(1 if method == "frozen" else seeds)]
    if control and "full" in methods:
        runs += [("full", seed, True, None) for seed in range(seeds)]
    return [
        finetune(base, task, method, steps, seed, random_base=random, targets=place, **options)
        for method, seed, random, place in runs
    ]


def rows(records: list[dict]) -> dict[str, list[dict]]:
    """The records by row of the table, in order."""
    grouped = {}
    for record in records:
        place = f", {record['targets']}" if "targets" in record else ""
        name = RANDOM if record["random_base"] else record["method"] + place
        grouped.setdefault(name, []).append(record)
    return grouped


def color_of(name: str) -> str:
    return COLORS["random"] if name == RANDOM else COLORS.get(name.split(",")[0], "black")


def mean(records: list[dict], key: str) -> float:
    return statistics.mean(record[key] for record in records)


def spread(records: list[dict], key: str) -> str:
    values = [record[key] for record in records]
    text = f"{statistics.mean(values):.3f}"
    return text + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def share_of_gap(records: list[dict], row: list[dict]) -> float | None:
    """How far from the frozen base's score (0) to full fine-tuning's (1) a method comes."""
    grouped = rows(records)
    if not {"frozen", "full"} <= set(grouped):
        return None
    low, high = mean(grouped["frozen"], "score"), mean(grouped["full"], "score")
    return (mean(row, "score") - low) / (high - low) if high > low else None


def in_spread(record: dict, others: list[dict], key="score", margin: float = 0.05) -> bool:
    """Whether a run lies within three standard deviations of others' mean, or `margin` beyond."""
    values = [other[key] for other in others]
    far = 3 * statistics.stdev(values) + margin
    return abs(record[key] - statistics.mean(values)) <= far


def table(records: list[dict], task: Task) -> str:
    """A Markdown table, a line a method, means ± standard deviations over the seeds."""
    slots = ["slot loss", "frame loss", "BLEU-4"] if task.fact else []  # of sentences alone
    head = [
        "method", "learning rate", "trainable", "weights", "on disk", "s / step", "validation loss",
        *slots, task.metric, "share of gap", "forgetting on", "off",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in rows(records).items():
        share, forgetting = share_of_gap(records, row), [r.get("forgetting", {}) for r in row]

        def forgot(state: str, forgetting: list[dict] = forgetting) -> str:
            found = [f[state] - f["base"] for f in forgetting if state in f]
            return f"{statistics.mean(found):+.2f}" if found else "–"

        trained = "seconds_per_step" in row[0]
        cells = [
            name,
            f"{row[0]['learning_rate']:g}" if trained else "–",
            f"{row[0]['trainable']:,}",
            f"{row[0]['weight_bytes'] / 1e3:,.0f} kB",
            f"{row[0]['disk_bytes'] / 1e3:,.0f} kB" if trained else "–",
            f"{mean(row, 'seconds_per_step'):.3f}" if trained else "–",
            f"{statistics.mean(r['validation'][-1]['loss'] for r in row):.3f}",
            *(
                f"{mean(row, k):.3f}"
                for k in ("test_slot_loss", "test_frame_loss", "bleu")
                if slots
            ),
            spread(row, "score"),
            "–" if share is None else f"{share:.2f}",
            "–" if row[0]["random_base"] else forgot("on"),
            forgot("off"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(records: list[dict], task: Task) -> Figure:
    """Left: validation loss by step. Right: the score of each row, with the value on the bar."""
    grouped = rows(records)
    with matplotlib.rc_context(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(10, 5.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        key = "slot_loss" if "slot_loss" in records[0]["validation"][0] else "loss"
        for name, row in grouped.items():
            color = color_of(name)
            style = {"frozen": ":", RANDOM: "--"}.get(name, "-")
            points = row[0]["validation"]
            steps = [p["step"] for p in points]
            values = [
                statistics.mean(r["validation"][i][key] for r in row) for i in range(len(points))
            ]
            if name == "frozen":
                left.axhline(values[0], color=color, linestyle=style, label=name)
            else:
                left.plot(steps, values, style, color=color, marker="o", markersize=4, label=name)
        tokens = "slot tokens" if key == "slot_loss" else "completions"
        left.set(xlabel="step", ylabel=f"loss on {tokens} (nats a token)", ylim=(0, None))
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        names = list(grouped)
        scores = [mean(grouped[name], "score") for name in names]
        colors = [color_of(name) for name in names]
        errors = [
            statistics.stdev(r["score"] for r in row) if len(row) > 1 else 0
            for row in grouped.values()
        ]
        bars = right.bar(names, scores, color=colors, yerr=errors, width=0.6)
        right.bar_label(bars, [f"{score:.2f}" for score in scores], padding=3)
        right.set(ylabel=f"{task.metric} on the test examples", ylim=(0, 1.08))
        if len(names) > 5:
            right.tick_params("x", rotation=35)
            for label in right.get_xticklabels():
                label.set_ha("right")
        figure.suptitle(f"Task {task.name}: {records[-1]['steps']} steps")
    return figure


def rank_picture(ranks: dict[str, int]) -> Figure:
    """The rank of each adapted matrix, layers from left to right."""
    kinds = list(dict.fromkeys(".".join(name.split(".")[3:]) for name in ranks))
    layers = sorted({int(name.split(".")[2]) for name in ranks})
    grid = [[ranks[f"transformer.h.{i}.{kind}"] for i in layers] for kind in kinds]
    figure = Figure(figsize=(1.2 + 0.7 * len(layers), 1.2 + 0.5 * len(kinds)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(grid, cmap="Greys", vmin=0, vmax=1.6 * max(map(max, grid)), aspect="auto")
    for row, ranks_of_kind in enumerate(grid):
        for column, rank in enumerate(ranks_of_kind):
            axis.text(column, row, rank, ha="center", va="center")
    axis.set_xticks(range(len(layers)), layers)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set(xlabel="layer", title="rank kept")
    return figure


def save(records: list[dict], task: Task, folder: str | Path) -> None:
    """Write compare.json and compare.png, and ranks.png where ranks were allocated."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    short = json.loads(
        json.dumps(records), parse_float=lambda number: float(f"{float(number):.6g}")
    )
    for record in short:
        if record["seed"]:  # what was written is shown for the first seed alone
            record.pop("examples", None)
    text = "[\n" + ",\n".join(json.dumps(record) for record in short) + "\n]\n"
    write_file(folder / "compare.json", lambda file: Path(file).write_text(text))
    figure = picture(records, task)
    write_file(folder / "compare.png", lambda file: figure.savefig(file, format="png", dpi=80))
    allocated = [record["ranks"] for record in records if "ranks" in record]
    if allocated:
        ranks = rank_picture(allocated[0])
        write_file(folder / "ranks.png", lambda file: ranks.savefig(file, format="png", dpi=100))


def load(file: str | Path) -> list[dict]:
    """The records of a compare.json."""
    return json.loads(Path(file).read_text())


def show_examples(records: list[dict], n: int = 2) -> str:
    """What each method wrote for the first prompts of the test set."""
    lines = []
    for i in range(min(n, len(records[0]["examples"]))):
        lines += ["", f"prompt     {records[0]['examples'][i]['prompt']}"]
        lines += [f"reference {records[0]['examples'][i]['reference']}"]
        for name, row in rows(records).items():
            lines.append(f"  {name:<18}{row[0]['examples'][i]['generated'].strip()}")
    return "\n".join(lines)
