"""How a run is set up: a Recipe per method, and a RunConfig for everything else.

Nothing here imports torch, so that `python -m minipeft --help` answers at once: `minipeft` loads a
method's config class when a recipe calls it.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial

import minipeft
from minipeft.lab import DATA

SWEEPS = DATA / "results" / "sweep.json"
TARGETS = ("attention", "mlp", "all-linear")  # where weight methods put their adapters


@dataclass(frozen=True)
class Recipe:
    """How the laboratory sets up a method. `dataclasses.replace` makes a changed one."""

    method: str  # its name in tables; its learning rate is looked up under this name
    config: Callable | None = None  # (size, steps) -> the method's config; None: no adapter
    size: int | None = None  # rank, width, or number of virtual tokens
    has_rank: bool = False  # the size is a rank, so that adapters can be placed on some layers only
    place: str | None = None  # where the method itself puts its adapters: see targets.layers_at
    targets: str | None = None  # another place, or a regular expression
    same_size: bool = False  # with as many parameters as on all linear layers: another rank
    bits: int | None = None  # quantize the base first
    optimizer: Callable | None = None  # (groups, lr=…, betas=…) -> optimizer; None: AdamW
    groups: Callable | None = None  # (model, lr) -> parameter groups; None: one learning rate

    @property
    def size_name(self) -> str:
        return "rank" if self.has_rank else "width" if self.method == "bottleneck" else "tokens"

    def with_size(self, size: int) -> "Recipe":
        if self.size is None:
            raise ValueError(f"{self.method} has no size, got {size}")
        return replace(self, size=size)

    def placed(self, targets: str, same_size: bool = True) -> "Recipe":
        """With adapters on some layers only. `same_size`: with the rank at which they have as many
        parameters as on all of them."""
        if not self.has_rank:
            raise ValueError(f"{self.method} has no rank, so its layers cannot be chosen")
        return replace(self, targets=targets, same_size=same_size)


def _adalora(r: int, steps: int):
    """Start with half as much rank again; ranks move in the middle two thirds of training."""
    start, sixth = r + (r + 1) // 2, steps // 6
    return minipeft.AdaLoraConfig(
        target_r=r, init_r=start, lora_alpha=2 * start, target_modules="all-linear",
        total_step=steps, tinit=sixth, tfinal=sixth, **CAUSAL,
    )  # fmt: skip


def _lora(r: int, steps: int, **options):
    return minipeft.LoraConfig(
        r=r, lora_alpha=2 * r, target_modules="all-linear", **options, **CAUSAL
    )


def _paged_adamw(groups, **options):
    """Half of the state for rank 8 on the 3M base fits into the budget, so that pages must move."""
    return minipeft.PagedAdamW(groups, page_bytes=2**16, device_budget_bytes=9 * 2**16, **options)


def _lora_plus_groups(model, lr: float):
    return minipeft.lora_plus_groups(model, lr, ratio=16)


CAUSAL = {"task_type": "CAUSAL_LM"}
MLP_ENDS = ["mlp.c_proj", "mlp.down_proj"]  # GPT-2's and Llama's name of the layer
RECIPES = {
    recipe.method: recipe
    for recipe in (
        Recipe("frozen"),
        Recipe("full"),
        Recipe("lora", _lora, 8, has_rank=True),
        Recipe("adalora", _adalora, 8, has_rank=True),
        Recipe("prompt_tuning", lambda p, _: minipeft.PromptTuningConfig(p, **CAUSAL), 20),
        Recipe("p_tuning", lambda p, _: minipeft.PromptEncoderConfig(p, **CAUSAL), 20),
        Recipe("prefix_tuning", lambda p, _: minipeft.PrefixTuningConfig(p, **CAUSAL), 20),
        Recipe("qlora", _lora, 8, has_rank=True, bits=4, optimizer=_paged_adamw),
        Recipe("bitfit", lambda *_: minipeft.BitFitConfig(**CAUSAL)),
        Recipe(
            "bottleneck",
            lambda r, _: minipeft.BottleneckConfig("all-linear", r, **CAUSAL),
            16,
            place="ends",
        ),
        Recipe("rslora", partial(_lora, use_rslora=True), 8, has_rank=True),
        Recipe("lora_plus", _lora, 8, has_rank=True, groups=_lora_plus_groups),
        Recipe("pissa", partial(_lora, init_lora_weights="pissa"), 8, has_rank=True),
        Recipe("dora", partial(_lora, use_dora=True), 8, has_rank=True),
        Recipe("vera", lambda r, _: minipeft.VeraConfig(r, "all-linear", **CAUSAL), 256),
        Recipe("ia3", lambda *_: minipeft.IA3Config("all-linear", MLP_ENDS, **CAUSAL)),
    )
}
SUCCESSORS = ("rslora", "lora_plus", "pissa", "dora", "vera", "ia3")  # of LoRA; lesson 11
# For bases without a sweep: learning rate, and size. lessons/HYPERPARAMETERS.md has the sources.
COMMON = {
    "full": (2e-5, None), "lora": (2e-4, 16), "qlora": (2e-4, 16), "adalora": (1e-3, 8),
    "prompt_tuning": (3e-2, 20), "p_tuning": (1e-3, 20), "prefix_tuning": (1e-2, 20),
    "bitfit": (1e-3, None), "bottleneck": (3e-4, 64), "rslora": (1e-4, 16),
    "lora_plus": (5e-5, 16), "pissa": (2e-5, 16), "dora": (2e-4, 16), "vera": (1e-3, 256),
    "ia3": (3e-3, None),
}  # fmt: skip
COMMON_WARMUP = 0.03  # of the steps
NO_SWEEP = "the common recipe, as no sweep of this base is known"


def common_recipe(method: str) -> Recipe:
    """A method's recipe with the size that is common for real models, and a pager for them."""
    recipe = RECIPES[method]
    recipe = replace(recipe, size=COMMON.get(method, (None, recipe.size))[1])
    return replace(recipe, optimizer=minipeft.PagedAdamW) if method == "qlora" else recipe


class Values:
    """What an option takes: values of a `kind` for which `fault` returns None."""

    kind: Callable
    fault: Callable

    def parse(self, text: str):
        """The value that a text means. Raises ValueError if it has a fault."""
        try:
            value = self.kind(text)
        except ValueError:
            value = text
        if fault := self.fault(value):
            raise ValueError(fault)
        return value


@dataclass(frozen=True)
class Bounds(Values):
    """Integers or other numbers from `low` to `high`."""

    kind: type  # int or float
    low: float
    high: float

    def fault(self, value) -> str | None:
        name, kinds = ("integer", int) if self.kind is int else ("number", (int, float))
        if not isinstance(value, kinds) or type(value) is bool or not value >= self.low:
            what = f"a {'positive' if self.low else 'non-negative'} {name}"
            what = what if self.low <= 1 else f"an {name} of at least {self.low}"
            return f"must be {what}, got {value!r:.200}"
        return f"must be at most {self.high:,}, got {value!r:.200}" if value > self.high else None


@dataclass(frozen=True)
class Choice(Values):
    """One of these names."""

    names: tuple[str, ...]
    kind = str

    def fault(self, value) -> str | None:
        if value in self.names:
            return None
        return f"must be one of {', '.join(self.names)}, got {value!r:.200}"


def option(default, help: str, values: Values | None = None):
    """A field of RunConfig with the help text and the values of its command-line option."""
    return field(default=default, metadata={"help": help, "values": values})


COUNT = Bounds(int, 1, 10_000_000)
COUNT_OR_0 = Bounds(int, 0, 10_000_000)
EXAMPLES = Bounds(int, 1, 4096)  # more in one batch would be a mistake
RATE = Bounds(float, 1e-12, 1000)
SEED = Bounds(int, 0, 2**63 - 1)


@dataclass(frozen=True)
class RunConfig:
    """One run. Every field is also an option of the command line."""

    steps: int = option(100, "training steps", COUNT)
    learning_rate: float | None = option(
        None, "peak learning rate; without it, the swept one", RATE
    )
    batch_size: int = option(16, "examples per step", EXAMPLES)
    accumulation: int = option(1, "micro-batches per step", EXAMPLES)
    weight_decay: float = option(
        0.0, "decoupled weight decay, as in AdamW", Bounds(float, 0, 10_000)
    )
    decay_to: str = option(
        "zero", "what weights decay towards: zero, or start (initial weights)",
        Choice(("zero", "start")),
    )  # fmt: skip
    warmup: int | None = option(
        None, "steps of linear warm-up; without it, a tenth of the steps", COUNT_OR_0
    )
    lr_end: float = option(
        0.0, "share of the learning rate left at the end of the cosine", Bounds(float, 0, 1)
    )
    beta2: float = option(
        0.999, "AdamW's decay rate of the second moment", Bounds(float, 0, 0.999999)
    )
    max_grad_norm: float = option(1.0, "clip gradients to this norm", Bounds(float, 1e-12, 10**12))
    seed: int = option(0, "seed of the initial values and of the order of the examples", SEED)
    n_generate: int = option(64, "test examples to complete and score", COUNT)
    n_evaluations: int = option(8, "how often to compute the validation loss on the way", COUNT)
    random_base: bool = option(False, "train a model of the same shape that was never pretrained")
    gradient_checkpointing: bool = option(
        False, "keep only the blocks' inputs for the backward pass: less memory, more time"
    )
    shard: bool = option(False, "shard the model over torchrun's processes (full, lora)")
    device: str | None = option(None, "cpu, cuda or mps; without it, the best available")
    output: str | None = option(None, "folder for the adapter or model, its log and checkpoints")
    checkpoint_every: int = option(
        100, "steps between two checkpoints in the output folder; 0: only when stopped", COUNT_OR_0
    )
    resume: bool = option(False, "continue the run in the output folder, if it saved anything")
    quiet: bool = option(False, "no progress bars and no announcements")

    def __post_init__(self):
        for f in fields(self):
            value, values = getattr(self, f.name), f.metadata["values"]
            is_set = values is not None and not (value is None and f.default is None)
            if is_set and (fault := values.fault(value)):
                raise ValueError(f"{f.name} {fault}")
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation must be at most the batch size {self.batch_size}, "
                f"got {self.accumulation}"
            )

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `lr_end`; steps count from 1."""
        warmup = max(self.steps // 10, 1) if self.warmup is None else self.warmup
        if step <= warmup:
            return self.learning_rate * (step / warmup)
        done = (step - 1 - warmup) / max(self.steps - warmup, 1)
        scale = self.lr_end + (1 - self.lr_end) * (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * scale


def load_sweeps() -> list[dict]:
    """The entries of the committed sweep."""
    return json.loads(SWEEPS.read_text()) if SWEEPS.is_file() else []


def swept_methods() -> list[str]:
    """The methods that `compare` can run: those with a swept learning rate, and the frozen base."""
    found = {"frozen"} | {entry["method"] for entry in load_sweeps()}
    return [method for method in RECIPES if method in found]


def compared_methods() -> list[str]:
    """The methods that `compare` runs if none are named: the swept ones without LoRA's successors,
    which would take it past three minutes."""
    return [method for method in swept_methods() if method not in SUCCESSORS]


def default_learning_rate(
    recipe: Recipe, run: RunConfig, base: str | None, task: str, n_train: int
) -> tuple[float, str | None]:
    """The learning rate for a run that names none, and where it comes from, if that is not a sweep
    on this base and task. base: the name of a shipped base, or None for any other."""
    if base is not None:
        return swept_learning_rate(recipe, run, base, task, n_train)
    if recipe.method not in COMMON:
        raise ValueError(f"there is no common learning rate for {recipe.method!r}: set one")
    return COMMON[recipe.method][0], NO_SWEEP


def swept_learning_rate(
    recipe: Recipe, run: RunConfig, base: str, task: str, n_train: int
) -> tuple[float, str | None]:
    """The best learning rate of the committed sweep that is most similar to this run.

    Similarity counts in this order: pretrained or not, task, base, size, number of steps, number of
    examples. Also returns where the rate comes from if it was swept on another base or task.
    """
    sweeps = [entry for entry in load_sweeps() if entry["method"] == recipe.method]
    if not sweeps:
        raise ValueError(
            f"no learning rate was swept for {recipe.method!r}: set one, or run the sweep"
        )

    def similarity(entry: dict) -> tuple:
        same = [
            entry["random_base"] == run.random_base,
            entry["task"] == task,
            entry["base"] == base,
            entry["size"] == recipe.size,
        ]
        ratios = [entry["steps"] / run.steps, entry["examples"] / n_train]
        return (*same, *(-abs(math.log(ratio)) for ratio in ratios))

    best = max(sweeps, key=similarity)
    origin = f"swept on the {best['base']} base, task {best['task']}"
    return best["best"], None if (best["base"], best["task"]) == (base, task) else origin
