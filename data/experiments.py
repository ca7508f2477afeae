"""The experiments of PROTOCOL.md. Each is a list of runs, and can be stopped and started again.

python -m data.experiments                       # the experiments, and how many runs are missing
python -m data.experiments forgetting            # the missing runs of one, in two processes
python -m data.experiments forgetting --limit 60 # … for about an hour
python -m data.experiments forgetting --repeat 3 # three of its runs again, next to what was written

Every run is one line of results/NAME.jsonl. `python -m data.results` makes tables and figures.
"""

import argparse
import copy
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minipeft.lab import DATA, evaluate, tasks
from minipeft.lab.base import WINDOW, Base, load_base, windows
from minipeft.lab.finetune import build_model, check_lengths, micro_batches
from minipeft.lab.recipes import RECIPES, Recipe, RunConfig
from minipeft.lab.tasks import Example
from minipeft.lab.train import train
from minipeft.peft_model import PeftModel
from minipeft.targets import find_targets

from .bits import BLOCK, CODES, rounded
from .choosing import (
    equal_score,
    operating_points,
    points,
    prediction_interval,
)
from .text import document

RESULTS = Path(__file__).parent / "results"
DECAYS = (0.0, 0.01, 0.02, 0.04)  # learning rate x weight decay, towards the initial values
FACTORS = (0.5, 0.0)  # for singular values of intruder dimensions
TRIALS = (100, 101, 102)  # seeds for choosing settings; the finals have others
RANKS = (1, 4, 16, 64)
ROUNDED = ("int3", "int2")  # codes of a base that LoRA is trained on
STEPS = (33, 100, 300)


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
    random_base: bool = False  # train a model of the same shape that was never pretrained
    scaled: bool = False  # also measure the model with intruder dimensions scaled down
    curve: bool = False  # also the score on validation examples after every 20th step


def variant(method: str, name: str, **changes) -> Recipe:
    """A method's recipe under another name, with changes to its config."""
    recipe = RECIPES[method]

    def config(size: int, steps: int):
        return replace(recipe.config(size, steps), **changes)

    return replace(recipe, method=f"{method}, {name}", config=config)


METHODS = RECIPES | {
    recipe.method: recipe
    for recipe in (
        variant("adalora", "no penalty", orth_reg_weight=0.0),
        variant("prompt_tuning", "vocabulary", prompt_tuning_init="SAMPLE_VOCAB"),
        variant("p_tuning", "LSTM", encoder_reparameterization_type="LSTM"),
        variant("prefix_tuning", "real text"),
        *(variant("lora", f"r {r}", r=r, lora_alpha=2 * r) for r in RANKS),
        *(variant("lora", f"r {r}, α 16", r=r) for r in RANKS),
        *(variant("lora", f"r {r}, rsLoRA", r=r, use_rslora=True) for r in RANKS),
        *(variant("lora", f"{code} base") for code in ROUNDED),
        *(
            variant(method, f"r {r}", r=r, lora_alpha=2 * r)
            for method, r in product(("rslora", "lora_plus", "pissa", "dora"), (1, 32))
        ),
        variant("lora", "r 32", r=32, lora_alpha=64),
        *(variant("vera", f"r {r}", r=r) for r in (1, 8, 32)),
        *(
            replace(RECIPES["lora"].placed(place), method=f"lora, {place}")
            for place in ("attention", "mlp")
        ),
    )
}


@dataclass(frozen=True)
class Grid:
    """The settings of an experiment: five rates per method or so, decays, seeds."""

    rates: dict[str, tuple[float, ...]]
    decays: tuple[float, ...] = DECAYS
    seeds: tuple[int, ...] = TRIALS
    common: dict = field(default_factory=dict)  # the other fields of Setting

    def settings(self) -> list[Setting]:
        """One seed of everything first, then the next one."""
        return [
            Setting(method, rate, decay, seed, **self.common)
            for seed in self.seeds
            for method, rates in self.rates.items()
            for rate, decay in product(rates, self.decays)
        ]


@dataclass(frozen=True)
class Chosen:
    """The operating points of another experiment, without decay and with it, and those that forget
    least at an equal score; on other seeds."""

    source: str
    seeds: tuple[int, ...]
    common: dict = field(default_factory=dict)  # changes to fields of Setting
    score: float | None = 0.9

    def settings(self) -> list[Setting]:
        """Empty as long as runs of the other experiment are missing."""
        if missing(self.source):
            return []
        rows, settings = load(self.source), []
        found = points(rows)
        chosen = [*operating_points(found, False), *operating_points(found, True)]
        if self.score is not None:
            equal = equal_score(found, self.score).values()
            chosen += [point for pair in equal for point in pair if point]
        for point, seed in product(chosen, self.seeds):
            names = ("method", "learning_rate", "decay")
            first = next(row for row in rows if all(row[n] == point[n] for n in names))
            settings.append(replace(setting_of(first), seed=seed, **self.common))
        return list(dict.fromkeys(settings))  # several points of a method may be the same


def around(best: float) -> tuple[float, ...]:
    """Five rates, in steps of a factor of 2."""
    return tuple(best * 2.0**i for i in (-2, -1, 0, 1, 2))


@dataclass(frozen=True)
class Several:
    """Grids that are one experiment."""

    grids: tuple[Grid, ...]

    def settings(self) -> list[Setting]:
        settings = [setting for grid in self.grids for setting in grid.settings()]
        return list(dict.fromkeys(settings))  # grids may overlap


# The middle rates were the best ones in a short search without decay.
WEIGHT_METHODS = {
    "full": around(0.001), "lora": around(0.01), "qlora": around(0.01), "adalora": around(0.04),
    "adalora, no penalty": around(0.04), "bitfit": around(0.1), "bottleneck": around(0.01),
}  # fmt: skip
PROMPT_METHODS = {
    "prompt_tuning": around(0.3), "prompt_tuning, vocabulary": around(0.05),
    "p_tuning": around(0.01), "p_tuning, LSTM": around(0.01),
    "prefix_tuning": around(0.2), "prefix_tuning, real text": around(0.05),
}  # fmt: skip
HIGHER_PROMPT_RATES = {  # where the best rate was the highest one
    "prompt_tuning": (2.4,), "p_tuning": (0.08,), "prefix_tuning, real text": (0.4,),
}  # fmt: skip
SENTIMENT = {
    "full": around(0.00025), "lora": around(0.0025), "qlora": around(0.0025),
    "adalora": around(0.01), "adalora, no penalty": around(0.01), "bitfit": around(0.003),
    "bottleneck": around(0.0025),
}  # fmt: skip
SUCCESSORS = {  # of LoRA
    "rslora": around(0.005), "lora_plus": around(0.0025), "pissa": around(0.0025),
    "dora": around(0.01), "vera": around(0.1), "ia3": around(0.1),
}  # fmt: skip
WIDE = (*DECAYS, 0.08, 0.16)  # LOG.md says why
WIDER = {
    "full": around(0.002)[1:4], "lora": around(0.04)[1:4], "qlora": around(0.04)[1:4],
    "adalora": around(0.04)[1:4], "adalora, no penalty": around(0.08)[1:4],
}  # fmt: skip
HIGHEST = {  # the next rate of each method in the tournament
    "full": 0.008, "lora": 0.08, "rslora": 0.04, "lora_plus": 0.02, "pissa": 0.02, "dora": 0.08,
    "vera": 0.8, "ia3": 0.8,
}  # fmt: skip
BY_RANK = {  # LoRA and its successors, for other ranks than 8
    f"{method}, r {r}": rates
    for method, rates in (SUCCESSORS | {"lora": around(0.01)}).items()
    for r in ((1, 8, 32) if method == "vera" else (1, 32))
    if method != "ia3"
}
EDGE_RATES = {  # of tournament-ranks: where the best rate was at an edge
    "lora, r 1": (0.08,), "rslora, r 1": (0.04, 0.08), "pissa, r 1": (0.02, 0.04, 0.08),
    "dora, r 1": (0.08,), "lora_plus, r 1": (0.02,), "rslora, r 32": (0.000625,),
    "lora_plus, r 32": (0.0003125,), "vera, r 32": (0.8, 1.6),
}  # fmt: skip
EDGE_DECAY = {  # and where the best decay was
    "lora, r 32": (0.01, 0.02, 0.04), "rslora, r 32": (0.00125, 0.0025, 0.005),
    "dora, r 32": (0.01, 0.02, 0.04), "lora_plus, r 32": (0.000625, 0.00125, 0.0025),
    "vera, r 32": (0.2, 0.4, 0.8),
}  # fmt: skip
LORA_RATES = around(0.01)[1:4]
PLACES = dict.fromkeys(("lora", "lora, attention", "lora, mlp"), LORA_RATES)
BITS = dict.fromkeys(("lora", "qlora", "lora, int3 base", "lora, int2 base"), (0.01,))
RANKED = {
    f"lora, r {r}{how}": LORA_RATES for r in RANKS for how in ("", ", α 16", ", rsLoRA")
}  # fmt: skip
BY_STEPS = {  # the best rate at 100 steps, and lower ones for longer runs
    "full": (0.001, 0.00025), "lora": (0.01, 0.0025), "bitfit": (0.1, 0.025),
    "prompt_tuning": (0.3, 0.075),
}  # fmt: skip
EXPERIMENTS = {
    "forgetting": Several((
        Grid(WEIGHT_METHODS, WIDE), Grid({"lora": (0.08,)}, WIDE),
        Grid(WIDER, (0.16, 0.32, 0.64)),
    )),
    "intruders": Chosen("forgetting", TRIALS, {"scaled": True}),
    "prompts": Several(tuple(
        Grid(rates, decays=(0.0,), common={"steps": 300})
        for rates in (PROMPT_METHODS, HIGHER_PROMPT_RATES)
    )),
    "sentiment": Grid(SENTIMENT, decays=(0.0, 0.02, 0.04), common={"task": "sentiment"}),
    "tournament": Several((  # with rows of "forgetting", copied
        Grid({m: WEIGHT_METHODS[m] for m in ("full", "lora")} | SUCCESSORS, (0.0, 0.04, 0.16)),
        Grid({method: (rate,) for method, rate in HIGHEST.items()}, (0.0, 0.04, 0.16)),
        Grid({m: (rate / 4, rate / 2, rate) for m, rate in HIGHEST.items()}, (0.32,)),
        Grid({"ia3": (1.6,)}, (0.0, 0.04, 0.16, 0.32)),  # its best rate was the highest
    )),
    "finals-tournament": Chosen(
        "tournament", tuple(range(5)), {"part": "test", "curve": True}, score=None
    ),
    "tournament-ranks": Several((
        Grid(EDGE_RATES, (0.0, 0.04, 0.16)), Grid(EDGE_DECAY, (0.32,)),
        Grid(BY_RANK, (0.0,)), Grid(BY_RANK, (0.04, 0.16)),
    )),
    "finals-tournament-ranks": Chosen(
        "tournament-ranks", tuple(range(5)), {"part": "test"}, score=None
    ),
    "tournament-sentiment": Grid(  # with rows of "sentiment", copied
        {m: SENTIMENT[m] for m in ("full", "lora")}
        | {method: tuple(rate / 4 for rate in rates) for method, rates in SUCCESSORS.items()},
        (0.0, 0.02, 0.04), common={"task": "sentiment"},
    ),
    "finals-tournament-sentiment": Chosen(
        "tournament-sentiment", tuple(range(5)), {"part": "test"}, score=None
    ),
    "tournament-sentiment-ranks": Grid(
        {method: tuple(rate / 4 for rate in rates) for method, rates in BY_RANK.items()},
        (0.0, 0.02, 0.04), common={"task": "sentiment"},
    ),
    "finals-tournament-sentiment-ranks": Chosen(
        "tournament-sentiment-ranks", tuple(range(5)), {"part": "test"}, score=None
    ),
    "finals": Chosen("forgetting", tuple(range(10)), {"part": "test"}),
    "finals-sentiment": Chosen("sentiment", tuple(range(5)), {"part": "test"}),
    "finals-prompts": Chosen("prompts", tuple(range(5)), {"part": "test"}),
    "3m": Grid({method: rates[1:4] for method, rates in WEIGHT_METHODS.items()}, (0.0, 0.04),
               TRIALS[:2], {"base": "3m"}),
    "finals-3m": Chosen("3m", tuple(range(5)), {"part": "test"}),
    "bits": Grid(BITS, (0.0, 0.04), tuple(range(200, 210))),
    "ranks": Grid(RANKED, (0.0,)),
    "placement": Grid(PLACES, (0.0,)),
    "placement-sentiment": Grid(
        {method: around(0.0025)[1:4] for method in PLACES}, (0.0,), common={"task": "sentiment"}
    ),
    "steps": Several(tuple(
        Grid(BY_STEPS, (0.0,), common={"base": "0.3m", "steps": steps, "random_base": random_base})
        for steps in STEPS for random_base in (False, True)
    )),
    "3000-steps": Grid(BY_STEPS, (0.0,), TRIALS[:1], {"steps": 3000}),
}  # fmt: skip


# --- one run ---


@cache
def opened(name: str, part: str) -> tuple[Base, float]:
    """A base, and its loss on held-out text. The finals have text of their own."""
    base = load_base(DATA / "base" / name)
    if part == "test":
        rng = random.Random(3)
        encoded = base.tokenizer.encode_batch([document(rng) for _ in range(300)])
        base.held_out = windows([e.ids for e in encoded], WINDOW, base.end)
    return base, evaluate.text_loss(base.model(), base.held_out)


def measure(setting: Setting) -> dict:
    """Train, and measure: a row. A run whose loss does not stay finite has no measurements."""
    base, before = opened(setting.base, setting.part)
    original = base.pretrained
    if setting.method.endswith(" base"):
        base = replace(base, pretrained=in_few_bits(original, setting.method.split()[1]))
    task, recipe = tasks.load_task(base, setting.task), METHODS[setting.method]
    run = RunConfig(
        steps=setting.steps, learning_rate=setting.learning_rate, seed=setting.seed, quiet=True,
        weight_decay=setting.decay / setting.learning_rate, decay_to="start",
        random_base=setting.random_base,
    )  # fmt: skip
    model = build_model(base, recipe, run)
    check_lengths(model, base, task)
    if setting.method == "prefix_tuning, real text":
        start_from_text(model, base, task.train[setting.seed])
    row = asdict(setting)
    row["forgetting_at_start"] = evaluate.text_loss(model, base.held_out) - before
    curve = []

    def after_step(done: dict) -> None:
        if setting.curve and done["step"] % 20 == 0:
            texts = evaluate.complete(model, base, task.validation)
            curve.append(task.score(task.validation, texts))

    try:
        batches = micro_batches(task, run, base.end, model.device)
        training = train(model, batches, run, recipe, after_step)
        row["training_loss"] = training.losses[-1]
    except FloatingPointError:
        return row
    row |= {"scores": curve} if curve else {}
    examples = getattr(task, setting.part)

    def results(model: nn.Module) -> dict:
        score = task.score(examples, evaluate.complete(model, base, examples))
        return {"score": score, "forgetting": evaluate.text_loss(model, base.held_out) - before}

    row |= evaluate.task_loss(model, examples, base.end)
    row |= results(model) | changes(original, model)
    if setting.scaled and row["intruders"]:
        plain = model.merge_and_unload() if isinstance(model, PeftModel) else model
        row["scalings"] = [
            {"which": which, "factor": factor, **results(scaled(base, plain, which, factor))}
            for which, factor in product(("intruders", "others"), FACTORS)
        ]
    return row


@torch.no_grad()
def in_few_bits(model: nn.Module, code: str) -> nn.Module:
    """A copy of a model whose linear weights are rounded to a code of bits.py, in blocks of 64."""
    model = copy.deepcopy(model)
    for layer in find_targets(model, "all-linear").values():
        layer.weight.copy_(rounded(layer.weight, CODES[code][1], BLOCK))
    return model


@torch.no_grad()
def start_from_text(model: PeftModel, base: Base, example: Example) -> None:
    """Start a prefix from the keys and values of an example's first tokens, as its paper does."""
    prefix = model.prompt_encoder.embedding.weight  # (p, 2 l d)
    ids = torch.tensor([(example.prompt_ids + example.completion_ids)[: len(prefix)]])
    past = base.pretrained(ids, use_cache=True).past_key_values
    rows = [kv[0].transpose(0, 1).flatten(1) for pair in past for kv in pair]  # each (p, d)
    prefix.copy_(torch.cat(rows, dim=1))


@torch.no_grad()
def changes(base: nn.Module, model: nn.Module) -> dict:
    """How large the updates of the linear layers' weights are, and how many intruders they have."""
    updates, found = [], 0
    model = model.base_model if isinstance(model, PeftModel) else model
    for name, layer in find_targets(base, "all-linear").items():
        after = model.get_submodule(name).weight
        updates.append((after - layer.weight).flatten())
        if not torch.equal(after, layer.weight):  # else there are none, and SVDs are slow
            found += int(intruders(layer.weight, after).sum())
    return {"update_norm": torch.cat(updates).norm().item(), "intruders": found}


def intruders(before: Tensor, after: Tensor, k: int = 10, below: float = 0.6) -> Tensor:
    """Which of the k first left singular vectors of a trained weight are intruders, (k,) bool:
    those whose cosine with every left singular vector of the pretrained weight is below `below`
    (Shuttleworth et al. 2024, arXiv 2410.21228, algorithm 1)."""
    old = torch.linalg.svd(before, full_matrices=False)[0]  # (out, n)
    new = torch.linalg.svd(after, full_matrices=False)[0][:, :k]  # (out, k)
    return (old.T @ new).abs().amax(0) < below


@torch.no_grad()
def scaled(base: Base, model: nn.Module, which: str, factor: float) -> nn.Module:
    """A copy of a model with the singular values of some directions multiplied by a factor.

    which: "intruders", or as a control "others": in each layer as many of the ten first directions
    that are no intruders, or as many as there are.
    """
    model = copy.deepcopy(model)
    for name, layer in find_targets(base.pretrained, "all-linear").items():
        weight = model.get_submodule(name).weight
        found = intruders(layer.weight, weight)
        if which == "others":
            others = (~found).nonzero().flatten()[: found.sum()]
            found = torch.zeros_like(found).index_fill(0, others, True)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        s[: len(found)][found] *= factor
        weight.copy_(u * s @ vh)
    return model


# --- all runs ---


def load(name: str) -> list[dict]:
    """The rows of an experiment that exist."""
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def setting_of(row: dict) -> Setting:
    return Setting(**{f.name: row[f.name] for f in fields(Setting) if f.name in row})


def missing(name: str) -> list[Setting]:
    """The runs that remain."""
    done = {setting_of(row) for row in load(name)}
    return [setting for setting in EXPERIMENTS[name].settings() if setting not in done]


def run(name: str, minutes: float, processes: int) -> None:
    """Do the missing runs, and write each down when it is finished."""
    until = time.monotonic() + 60 * minutes
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that start now
    with get_context("spawn").Pool(processes) as pool, (RESULTS / f"{name}.jsonl").open("a") as to:
        todo = missing(name)
        for row in tqdm(pool.imap(measure, todo), name, len(todo)):
            rounded = {k: float(f"{v:.6g}") if type(v) is float else v for k, v in row.items()}
            to.write(json.dumps(rounded) + "\n")
            to.flush()
            if time.monotonic() > until:
                return


def repeat(name: str, n: int, seed: int | None) -> Iterator[tuple[Setting, str, str, float]]:
    """Measure n rows again, drawn at random but always the same ones.

    Yields a setting, the name of a value, what to expect, and the value now. With the same seed, we
    expect the value that was written; with a new one, the other seeds' 95 % prediction interval.
    """
    rows = [row for row in load(name) if "score" in row]
    for row in random.Random(0).sample(rows, n):
        setting = setting_of(row)
        again = measure(setting if seed is None else replace(setting, seed=seed))
        like = [r for r in rows if replace(setting_of(r), seed=setting.seed) == setting]
        for key in ("score", "forgetting", "loss"):
            low, high = prediction_interval([r[key] for r in like])
            expected = f"{low:.3f} to {high:.3f}" if seed is not None else f"{row[key]:.6g}"
            yield setting, key, expected, again[key]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", choices=EXPERIMENTS)
    parser.add_argument("--limit", type=float, default=1e9, metavar="MINUTES", help="stop then")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeat", type=int, metavar="N", help="run N of the runs again")
    parser.add_argument("--seed", type=int, help="with --repeat: a new seed")
    arguments = parser.parse_args()
    if arguments.name and arguments.repeat:
        for setting, key, expected, value in repeat(
            arguments.name, arguments.repeat, arguments.seed
        ):
            rate, decay = setting.learning_rate, setting.decay
            what = f"{setting.method}, η {rate:g}, ηλ {decay:g}, {key}"
            print(f"{what}: {expected}; now {value:.6g}")
    elif arguments.name:
        run(arguments.name, arguments.limit, arguments.processes)
    for name in EXPERIMENTS:
        print(f"{name}: {len(load(name))} runs, {len(missing(name))} are missing")
