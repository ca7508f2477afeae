"""LoRA against full fine-tuning when there are fewer steps, more steps, or fewer examples.

python data/study.py                    # all settings on the 3M base: half an hour on two cores
python data/study.py --settings 300:400 # one of them: 300 steps on 400 examples
python data/study.py --settings         # none: the table and the picture of what was measured

Writes results/study.json and results/study.png. The learning rates are those of results/sweep.json.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from minipeft.lab import compare, finetune, tasks
from minipeft.peft_model import write_file

RESULTS = tasks.DATA / "results"
STEPS, EXAMPLES = 100, 400  # what `compare` takes
SETTINGS = ["33:400", "300:400", "100:50", "100:150"]  # steps:examples; 100:400 is `compare --full`
METHODS = ["full", "lora"]
KEPT = ["method", "steps", "n_train", "seed", "learning_rate", "score", "bleu", "forgetting"]


def measure(setting: str) -> list[dict]:
    """Records of one setting: three seeds of each method, every test example."""
    steps, examples = (int(number) for number in setting.split(":"))
    base = finetune.load_base(tasks.DATA / "base" / "3m")
    task = tasks.load_task(base.tokenizer, base.end, 256, "describe")
    task = replace(task, train=task.train[:examples])
    records = compare.compare(base, task, METHODS, steps, 3, control=False, generated=200)
    kept = [*KEPT, "test_slot_loss", "test_frame_loss"]
    return [{name: record[name] for name in kept} for record in records]


def chosen(records: list[dict], steps: int, examples: int, method: str) -> list[dict]:
    wanted = {"steps": steps, "n_train": examples, "method": method}
    return [r for r in records if wanted.items() <= r.items()]


def table(records: list[dict]) -> str:
    """A line a setting: score (mean ± standard deviation), LoRA's share, forgetting."""
    head = ["steps", "examples", "full", "LoRA r 8", "share of gap", "full forgets", "LoRA forgets"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    low = compare.mean([r for r in records if r["method"] == "frozen"], "score")
    for steps, examples in sorted({(r["steps"], r["n_train"]) for r in records}):
        full, lora = (chosen(records, steps, examples, method) for method in METHODS)
        share = (compare.mean(lora, "score") - low) / (compare.mean(full, "score") - low)
        cells = [steps, examples, compare.spread(full, "score"), compare.spread(lora, "score")]
        cells += [f"{share:.2f}"] + [
            f"{statistics.mean(r['forgetting']['on'] - r['forgetting']['base'] for r in rows):+.2f}"
            for rows in (full, lora)
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def rate_curves(sweeps: list[dict], methods: list[str] = METHODS) -> list[dict]:
    """The sweeps on the 3M base over learning rate, at the usual steps and examples."""
    wanted = {
        "base": "3m", "task": "describe", "steps": STEPS, "examples": EXAMPLES, "random_base": False
    }  # fmt: skip
    return [e for e in sweeps if wanted.items() <= e.items() and e["method"] in methods]


def equal_score(sweeps: list[dict], score: float = 0.95) -> str:
    """The least that each method forgets among the learning rates that reach a validation score."""
    lines = [
        "| method | learning rate | validation slot accuracy | forgetting |",
        "|---|---|---|---|",
    ]
    for entry in rate_curves(sweeps, [*METHODS, "adalora", "qlora"]):
        if entry["size"] in (None, 8):
            point = min(
                (p for p in entry["points"] if p["score"] >= score), key=lambda p: p["forgetting"]
            )
            cells = [entry["method"], f"{point['learning_rate']:g}", f"{point['score']:.3f}"]
            lines.append(f"| {' | '.join(cells)} | {point['forgetting']:+.2f} |")
    return "\n".join(lines)


def placement_table(records: list[dict]) -> str:
    """LoRA by the layers that it stands beside, at equal numbers of parameters."""
    head = "| beside | trainable | slot loss | slot accuracy | forgetting |"
    lines = [head, "|---|---|---|---|---|"]
    for row in compare.rows(records).values():
        if "targets" in row[0]:
            forgot = [r["forgetting"]["on"] - r["forgetting"]["base"] for r in row]
            cells = [row[0]["targets"], f"{row[0]['trainable']:,}"]
            cells += [f"{compare.mean(row, 'test_slot_loss'):.3f}", compare.spread(row, "score")]
            lines.append(f"| {' | '.join(cells)} | {statistics.mean(forgot):+.2f} |")
    return "\n".join(lines)


def rank_table(sweeps: list[dict]) -> str:
    """LoRA by rank, each at its own best learning rate (validation examples, one seed)."""
    head = "| rank | learning rate | slot loss | validation slot accuracy | forgetting |"
    lines = [head, "|---|---|---|---|---|"]
    lora = [entry for entry in rate_curves(sweeps) if entry["method"] == "lora"]
    for entry in sorted(lora, key=lambda entry: entry["size"]):
        point = next(p for p in entry["points"] if p["learning_rate"] == entry["best"])
        cells = [entry["size"], f"{entry['best']:g}", f"{point['slot_loss']:.3f}"]
        cells += [f"{point['score']:.3f}", f"{point['forgetting']:+.2f}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def picture(records: list[dict], sweeps: list[dict]) -> Figure:
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    names = {"steps": "steps", "n_train": "training examples"}
    for axis, key, fixed in ((axes[0], "steps", "n_train"), (axes[1], "n_train", "steps")):
        usual = {"steps": STEPS, "n_train": EXAMPLES}[fixed]
        for method in METHODS:
            rows = [r for r in records if r["method"] == method and r[fixed] == usual]
            values = sorted({r[key] for r in rows})
            scores = [[r["score"] for r in rows if r[key] == value] for value in values]
            axis.errorbar(
                values, [statistics.mean(s) for s in scores], [statistics.stdev(s) for s in scores],
                color=compare.COLORS[method], marker="o", capsize=3, label=method,
            )  # fmt: skip
        axis.set(
            xscale="log",
            xlabel=names[key],
            ylabel="slot accuracy on held-out names",
            ylim=(0, 1.05),
        )
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.set_title(f"{usual} {names[fixed]}")
        axis.legend(frameon=False)
    for entry in rate_curves(sweeps):
        if entry["size"] in (None, 8):
            points = entry["points"]
            axes[2].plot(
                [p["forgetting"] for p in points], [p["score"] for p in points], "o-",
                color=compare.COLORS[entry["method"]], label=entry["method"],
            )  # fmt: skip
            for p in points:
                axes[2].annotate(
                    f"{p['learning_rate']:g}", (p["forgetting"], p["score"]), fontsize=8,
                    xytext=(4, -10), textcoords="offset points",
                )  # fmt: skip
    axes[2].set(xlabel="forgetting (nats a token on pretraining text)", ylim=(0, 1.05))
    axes[2].set(ylabel="validation slot accuracy", title="by learning rate")
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def load() -> list[dict]:
    """The study's records, and those of `compare --full` on the pretrained base."""
    usual = compare.load(RESULTS / "compare.json")
    return compare.load(RESULTS / "study.json") + [r for r in usual if not r["random_base"]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="*", default=SETTINGS, metavar="STEPS:EXAMPLES")
    file = RESULTS / "study.json"
    for setting in parser.parse_args().settings:
        new = measure(setting)
        old = json.loads(file.read_text()) if file.is_file() else []
        at = (new[0]["steps"], new[0]["n_train"])
        kept = [r for r in old if (r["steps"], r["n_train"]) != at]
        text = json.dumps(kept + new, indent=1) + "\n"
        write_file(file, lambda path, text=text: Path(path).write_text(text))
    records, sweeps = load(), json.loads(finetune.SWEEPS.read_text())
    picture(records, sweeps).savefig(RESULTS / "study.png", dpi=90)
    print(f"{table(records)}\n\n{equal_score(sweeps)}\n\n{rank_table(sweeps)}")
