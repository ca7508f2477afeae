"""LoRA against full fine-tuning when there are fewer steps, more steps, or fewer examples.

python -m data.study                    # all settings on the 3M base: half an hour on two cores
python -m data.study --settings 300:400 # one of them: 300 steps on 400 examples
python -m data.study --settings         # none: the table and the figure of what was measured

Writes results/study.json and results/study.png. The learning rates are those of results/sweep.json.
"""

import argparse
import json
from dataclasses import replace

from minipeft.files import write_text
from minipeft.lab import DATA, compare, report, tasks
from minipeft.lab.base import load_base
from minipeft.lab.finetune import Record
from minipeft.lab.recipes import RECIPES, RunConfig, load_sweeps

RESULTS = DATA / "results"
STEPS, EXAMPLES = 100, 400  # what `compare` takes
SETTINGS = ["33:400", "300:400", "100:50", "100:150"]  # steps:examples; 100:400 is `compare --full`
METHODS = ["full", "lora"]
KEPT = ["method", "steps", "n_train", "seed", "learning_rate", "score", "forgetting"]


def measure(setting: str) -> list[dict]:
    """Records of one setting: three seeds of each method, all test examples."""
    steps, examples = (int(number) for number in setting.split(":"))
    base = load_base(DATA / "base" / "3m")
    task = tasks.load_task(base, "describe")
    task = replace(task, train=task.train[:examples])
    recipes, run = [RECIPES[method] for method in METHODS], RunConfig(steps=steps, n_generate=200)
    records = compare.compare(base, task, recipes, run, 3, control=False)
    kept = [*KEPT, "base", "task", "test_slot_loss", "test_template_loss"]
    return [{name: getattr(record, name) for name in kept} for record in records]


def chosen(records: list[Record], steps: int, examples: int, method: str) -> list[Record]:
    wanted = (steps, examples, method)
    return [r for r in records if (r.steps, r.n_train, r.method) == wanted]


def table(records: list[Record]) -> str:
    """A line per setting: score (mean ± standard deviation), LoRA's share, forgetting."""
    head = ["steps", "examples", "full", "LoRA r 8", "share of gap", "full forgets", "LoRA forgets"]
    lines, low = [], compare.mean([r for r in records if r.method == "frozen"], "score")
    for steps, examples in sorted({(r.steps, r.n_train) for r in records}):
        full, lora = (chosen(records, steps, examples, method) for method in METHODS)
        share = (compare.mean(lora, "score") - low) / (compare.mean(full, "score") - low)
        lines.append(
            [steps, examples, compare.spread(full, "score"), compare.spread(lora, "score")]
            + [f"{share:.2f}", *(f"{compare.forgetting(rows):+.2f}" for rows in (full, lora))]
        )
    return report.markdown_table(head, lines)


def rate_curves(sweeps: list[dict], methods: list[str] = METHODS) -> list[dict]:
    """The sweeps over learning rates on the 3M base, at the usual steps and examples."""
    wanted = {
        "base": "3m", "task": "describe", "steps": STEPS, "examples": EXAMPLES, "random_base": False
    }  # fmt: skip
    return [e for e in sweeps if wanted.items() <= e.items() and e["method"] in methods]


def equal_score(sweeps: list[dict], score: float = 0.95) -> str:
    """The least that each method forgets among the learning rates that reach a validation score."""
    lines = []
    for entry in rate_curves(sweeps, [*METHODS, "adalora", "qlora"]):
        if entry["size"] in (None, 8):
            reached = [p for p in entry["points"] if p["score"] >= score]
            point = min(reached, key=lambda p: p["forgetting"])
            lines.append([report.NAMES[entry["method"]], f"{point['learning_rate']:g}",
                          f"{point['score']:.3f}", f"{point['forgetting']:+.2f}"])  # fmt: skip
    head = ["method", "learning rate", "validation slot accuracy", "forgetting"]
    return report.markdown_table(head, lines)


def placement_table(records: list[Record]) -> str:
    """LoRA by the layers that it adapts, at equal numbers of parameters."""
    lines = [
        [row[0].targets, f"{row[0].trainable:,}", f"{compare.mean(row, 'test_slot_loss'):.3f}",
         compare.spread(row, "score"), f"{compare.forgetting(row):+.2f}"]
        for row in compare.rows(records).values() if row[0].targets
    ]  # fmt: skip
    head = ["layers", "trainable", "slot loss", "slot accuracy", "forgetting"]
    return report.markdown_table(head, lines)


def rank_table(sweeps: list[dict]) -> str:
    """LoRA by rank, each at its own best learning rate (validation examples, one seed)."""
    lines = []
    lora = [entry for entry in rate_curves(sweeps) if entry["method"] == "lora"]
    for entry in sorted(lora, key=lambda entry: entry["size"]):
        point = next(p for p in entry["points"] if p["learning_rate"] == entry["best"])
        lines.append([entry["size"], f"{entry['best']:g}", f"{point['slot_loss']:.3f}",
                      f"{point['score']:.3f}", f"{point['forgetting']:+.2f}"])  # fmt: skip
    head = ["rank", "learning rate", "slot loss", "validation slot accuracy", "forgetting"]
    return report.markdown_table(head, lines)


def load() -> list[Record]:
    """The study's records, and those of `compare --full` on the pretrained base."""
    usual = compare.load(RESULTS / "compare.json")
    return compare.load(RESULTS / "study.json") + [r for r in usual if not r.random_base]


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
        write_text(file, text)
    records, curves = load(), [e for e in rate_curves(load_sweeps()) if e["size"] in (None, 8)]
    report.save_figure(report.study_figure(records, curves), RESULTS / "study.png", dpi=90)
    print(f"{table(records)}\n\n{equal_score(load_sweeps())}\n\n{rank_table(load_sweeps())}")
