"""Seconds per training step of every method, as a ratio to full fine-tuning's.

    python tests/benchmarks/bench_methods.py [--widths 192 384 768] [--rounds 15] [--methods lora …]
                                             [--first FOLDER]

One process; all models take their steps in turn, so that a busy machine slows all of them equally;
medians. Three columns: minipeft on its GPT, minipeft on transformers' GPT-2 of the same shape, and
peft on that GPT-2 (the last two need the extra `conformance`). AdaLoRA allocates ranks in every
step. With --first, another checkout of minipeft is measured on its own GPT, and a last column gives
the ratio of the two checkouts' steps.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import minipeft

TARGETS = ["c_attn", "c_proj", "c_fc"]
TASK = {"task_type": "CAUSAL_LM"}
METHODS = {
    "lora": ("LoraConfig", {"r": 8, "target_modules": TARGETS}),
    "lora, dropout": ("LoraConfig", {"r": 8, "target_modules": TARGETS, "lora_dropout": 0.1}),
    "adalora": ("AdaLoraConfig", {"target_modules": TARGETS, "total_step": 10_000}),
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 20}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 20}),
    "prefix_tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 20}),
}
COLUMNS = {  # column: the models whose seconds are divided
    "ours": ("ours", "ours full"),
    "ours on GPT-2": ("ours on gpt2", "gpt2 full"),
    "peft on GPT-2": ("peft on gpt2", "gpt2 full"),
    "first": ("first", "first full"),
    "ours / first": ("ours", "first"),
}


def load_another(folder: Path) -> ModuleType:
    """The minipeft of another checkout, next to the one that is already imported."""

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == "minipeft"]

    aside = {name: sys.modules.pop(name) for name in loaded()}
    sys.path.insert(0, str(folder.resolve()))
    try:
        package = importlib.import_module("minipeft")
        for name in package.__all__:  # now, if it loads its modules late
            getattr(package, name)
        if not Path(package.__file__).is_relative_to(folder.resolve()):
            raise SystemExit(f"there is no minipeft in {folder}")
    finally:
        sys.path.remove(str(folder.resolve()))
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(aside)
    return package


def stepper(model: nn.Module, ids: Tensor) -> Callable[[], float]:
    """A function that takes a training step and returns its seconds."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, count = torch.optim.AdamW(parameters, lr=1e-4), iter(range(1, 10**9))
    inner = getattr(model, "base_model", None)  # has the allocator of peft's AdaLoRA
    owner = next((m for m in (model, inner) if hasattr(m, "update_and_allocate")), None)

    def step() -> float:
        start = time.perf_counter()
        model(input_ids=ids, labels=ids)[0].backward()
        optimizer.step()
        if owner is not None:
            owner.update_and_allocate(next(count))
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def build_models(shape: dict, method: str, first: ModuleType | None) -> dict[str, nn.Module]:
    """Models with the method, and for full fine-tuning (`… full`)."""
    kind, settings = METHODS[method]
    off = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    models = {}
    for name, package in {"ours": minipeft, "first": first}.items():
        if package is not None:
            config = package.GPTConfig(**shape, **off)
            models[f"{name} full"], base = package.GPT(config), package.GPT(config)
            models[name] = package.get_peft_model(base, getattr(package, kind)(**settings, **TASK))
    try:
        import peft
        import transformers
    except ImportError:
        return models
    theirs = transformers.GPT2Config(**shape, **off)
    bases = [transformers.GPT2LMHeadModel(theirs) for _ in range(3)]
    models["gpt2 full"] = bases[0]
    for name, package, base in (("ours", minipeft, bases[1]), ("peft", peft, bases[2])):
        config = getattr(package, kind)(**settings, **TASK)
        models[f"{name} on gpt2"] = package.get_peft_model(base, config)
    return {name: model.train() for name, model in models.items()}


def measure(models: dict[str, nn.Module], ids: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds per training step."""
    steps = {name: stepper(model, ids) for name, model in models.items()}
    seconds = {name: [] for name in steps}
    for i in range(rounds + 3):
        for name, step in steps.items():
            taken = step()
            if i >= 3:  # the first rounds warm up
                seconds[name].append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 384, 768])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--first", type=Path, help="another checkout of minipeft to compare with")
    args = parser.parse_args()
    first = load_another(args.first) if args.first else None
    columns = [name for name in COLUMNS if first or "first" not in name]
    print(f"| width | method | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    for width in args.widths:
        for method in args.methods:
            torch.manual_seed(0)
            shape = {"vocab_size": 2048, "n_positions": 256, "n_embd": width}
            shape |= {"n_layer": 6 if width < 768 else 3, "n_head": width // 32}
            ids = torch.randint(2048, (8, 128))
            seconds = measure(build_models(shape, method, first), ids, args.rounds)
            pairs = [COLUMNS[name] for name in columns]
            cells = [f"{seconds[a] / seconds[b]:.2f}" if a in seconds else "–" for a, b in pairs]
            print(f"| {width} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
