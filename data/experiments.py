"""The experiments of PROTOCOL.md. Each is a list of runs, and can be stopped and started again.

python -m data.experiments                       # the experiments, and how many runs are missing
python -m data.experiments forgetting            # the missing runs of one, in two processes
python -m data.experiments forgetting --limit 60 # … for about an hour

Every run is one line of results/NAME.jsonl. `python -m data.results` makes tables and figures.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from multiprocessing import get_context

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minipeft import AdaLoraConfig
from minipeft.lab import DATA, evaluate, tasks
from minipeft.lab.base import Base, load_base
from minipeft.lab.finetune import build_model, check_lengths, micro_batches
from minipeft.lab.recipes import RECIPES, Recipe, RunConfig
from minipeft.lab.train import train
from minipeft.peft_model import PeftModel
from minipeft.targets import find_targets

RESULTS = DATA / "results"
DECAYS = (0.0, 0.01, 0.02, 0.04)  # learning rate x weight decay, towards the initial values
TRIALS = (100, 101, 102)  # seeds for choosing settings; the finals have others


@dataclass(frozen=True)
class Setting:
    """What distinguishes one run from the others."""

    method: str  # a key of METHODS
    learning_rate: float
    decay: float
    seed: int
    base: str = "1m"
    task: str = "describe"
    steps: int = 100
    part: str = "validation"  # the examples that are scored, or "test": in the finals alone


def without_penalty(recipe: Recipe) -> Recipe:
    """AdaLoRA without its orthogonality penalty."""

    def config(size: int, steps: int) -> AdaLoraConfig:
        return replace(recipe.config(size, steps), orth_reg_weight=0.0)

    return replace(recipe, method="adalora, no penalty", config=config)


METHODS = RECIPES | {"adalora, no penalty": without_penalty(RECIPES["adalora"])}
# Five rates around the best one of a short search without decay; the factor is 2 everywhere.
RATES = {
    "full": (0.00025, 0.0005, 0.001, 0.002, 0.004),
    "lora": (0.0025, 0.005, 0.01, 0.02, 0.04),
    "qlora": (0.0025, 0.005, 0.01, 0.02, 0.04),
    "adalora": (0.01, 0.02, 0.04, 0.08, 0.16),
    "adalora, no penalty": (0.01, 0.02, 0.04, 0.08, 0.16),
    "bitfit": (0.025, 0.05, 0.1, 0.2, 0.4),
    "bottleneck": (0.0025, 0.005, 0.01, 0.02, 0.04),
}


def forgetting() -> Iterator[Setting]:
    """Score against forgetting: seven methods, five rates, four decays, three seeds."""
    for seed, (method, rates) in product(TRIALS, RATES.items()):
        for rate, decay in product(rates, DECAYS):
            yield Setting(method, rate, decay, seed)


EXPERIMENTS = {"forgetting": forgetting}


# --- one run ---


@cache
def opened(name: str) -> tuple[Base, float]:
    """A base, and its loss on held-out text."""
    base = load_base(DATA / "base" / name)
    return base, evaluate.text_loss(base.model(), base.held_out)


def measure(setting: Setting) -> dict:
    """Train, and measure: a row. A run whose loss does not stay finite has no measurements."""
    base, before = opened(setting.base)
    task, recipe = tasks.load_task(base, setting.task), METHODS[setting.method]
    run = RunConfig(
        steps=setting.steps, learning_rate=setting.learning_rate, seed=setting.seed, quiet=True,
        weight_decay=setting.decay / setting.learning_rate, decay_to="start",
    )  # fmt: skip
    model = build_model(base, recipe, run)
    check_lengths(model, base, task)
    row = asdict(setting)
    row["forgetting_at_start"] = evaluate.text_loss(model, base.held_out) - before
    try:
        batches = micro_batches(task, run, base.end, model.device)
        row["training_loss"] = train(model, batches, run, recipe.optimizer).losses[-1]
    except FloatingPointError:
        return row
    examples = getattr(task, setting.part)
    row |= evaluate.task_loss(model, examples, base.end)
    row["score"] = task.score(examples, evaluate.complete(model, base, examples))
    row["forgetting"] = evaluate.text_loss(model, base.held_out) - before
    return row | changes(base.pretrained, model)


@torch.no_grad()
def changes(base: nn.Module, model: nn.Module) -> dict:
    """How large the updates of the linear layers' weights are, and how many intruders they have."""
    updates, found = [], 0
    model = model.base_model if isinstance(model, PeftModel) else model
    for name, layer in find_targets(base, "all-linear").items():
        after = model.get_submodule(name).weight
        updates.append((after - layer.weight).flatten())
        found += int(intruders(layer.weight, after).sum())
    return {"update_norm": torch.cat(updates).norm().item(), "intruders": found}


def intruders(before: Tensor, after: Tensor, k: int = 10, below: float = 0.6) -> Tensor:
    """Which of the k first left singular vectors of a trained weight are intruders, (k,) bool:
    those whose cosine with every left singular vector of the pretrained weight is below `below`
    (Shuttleworth et al. 2024, arXiv 2410.21228, algorithm 1)."""
    old = torch.linalg.svd(before, full_matrices=False)[0]  # (out, n)
    new = torch.linalg.svd(after, full_matrices=False)[0][:, :k]  # (out, k)
    return (old.T @ new).abs().amax(0) < below


# --- all runs ---


def load(name: str) -> list[dict]:
    """The rows of an experiment that exist."""
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def setting_of(row: dict) -> Setting:
    return Setting(**{f.name: row[f.name] for f in fields(Setting) if f.name in row})


def missing(name: str) -> list[Setting]:
    done = {setting_of(row) for row in load(name)}
    return [setting for setting in EXPERIMENTS[name]() if setting not in done]


def run(name: str, minutes: float, processes: int) -> None:
    """Do the missing runs, and write each down when it is finished."""
    todo, until = missing(name), time.monotonic() + 60 * minutes
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that start now
    with get_context("spawn").Pool(processes) as pool, (RESULTS / f"{name}.jsonl").open("a") as to:
        for row in tqdm(pool.imap(measure, todo), name, len(todo)):
            rounded = {k: float(f"{v:.6g}") if type(v) is float else v for k, v in row.items()}
            to.write(json.dumps(rounded) + "\n")
            to.flush()
            if time.monotonic() > until:
                break


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", choices=EXPERIMENTS)
    parser.add_argument("--limit", type=float, default=1e9, metavar="MINUTES", help="stop then")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.name:
        run(arguments.name, arguments.limit, arguments.processes)
    for name, settings in EXPERIMENTS.items():
        print(f"{name}: {len(missing(name))} of {len(list(settings()))} runs are missing")
