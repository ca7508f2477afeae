"""The quantizer, the 4-bit layer and the paged optimizer against bitsandbytes and torch.

    python tests/benchmarks/bench_qlora.py [--width 4096] [--rounds 15] [--threads 1]
                                           [--first FOLDER]

One process; all sides take turns; ratios of medians, ours divided by theirs, next to the largest
ratio allowed. A 4-bit layer of width x width on 4 x 128 tokens, forward and backward; AdamW on the
weights that LoRA trains, on four million weights in small and in large matrices, and on a whole
base model, with a budget of half the state. Needs the extra `conformance`. With --first, another
checkout of minipeft is measured too (also divided by theirs), and then the ratio of both checkouts.
"""

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from bench_methods import load_another
from torch import Tensor, nn

import minipeft

Run = Callable[[], object]


def medians(runs: list[Run], rounds: int) -> list[float]:
    """Median seconds of each function, called in turn."""
    seconds = [[] for _ in runs]
    for i in range(rounds + 2):
        for run, taken in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if i >= 2:  # the first two rounds warm up
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def forward_and_backward(layer: nn.Module, x: Tensor) -> Run:
    def run() -> None:
        layer(x.clone().requires_grad_()).sum().backward()

    return run


def lora_shapes(width: int, layers: int, r: int) -> list[tuple[int, int]]:
    """What LoRA trains in a GPT-2: A and B at each of a block's four linear layers."""
    linear = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    return [shape for i, o in linear * layers for shape in ((r, i), (o, r))]


def base_shapes() -> list[torch.Size]:
    """What full fine-tuning trains in the 3M base."""
    shape = {"vocab_size": 2048, "n_positions": 256, "n_embd": 192, "n_layer": 6, "n_head": 6}
    return [p.shape for p in minipeft.GPT(minipeft.GPTConfig(**shape)).parameters()]


LIMITS = {"quantize": 0.5, "dequantize": 1.4, "4-bit layer, forward and backward": 1.15}
ADAMW_LIMIT = 1.3

TRAINED = {
    "LoRA on the 3M base, r = 8": lora_shapes(192, 6, 8),
    "LoRA on GPT-2 small, r = 8": lora_shapes(768, 12, 8),
    "LoRA on GPT-2 small, r = 64": lora_shapes(768, 12, 64),
    "matrices of 256 x 256": [(256, 256)] * 64,
    "matrices of 1024 x 1024": [(1024, 1024)] * 4,
    "all of the 3M base": base_shapes(),
}


def parameters(shapes: list) -> list[nn.Parameter]:
    torch.manual_seed(0)
    found = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in found:
        p.grad = torch.randn_like(p)
    return found


def our_runs(package: ModuleType, layer: nn.Linear, x: Tensor) -> dict[str, Run]:
    """What is measured of a minipeft, by the row of the table."""
    qlora, w = package.qlora, layer.weight.detach()
    q, layer = qlora.quantize_nf4(w), qlora.Linear4bit(layer)
    runs = {
        "quantize": lambda: qlora.quantize_nf4(w),
        "dequantize": lambda: qlora.dequantize_nf4(q),
        "4-bit layer, forward and backward": forward_and_backward(layer, x),
    }
    for name, shapes in TRAINED.items():
        elements = sum(math.prod(shape) for shape in shapes)
        pages = max(8, elements // 2**19 * 2)  # an even number, of 2 MiB or a little more
        page = 8 * math.ceil(elements / pages)
        half = {"page_bytes": page, "device_budget_bytes": pages // 2 * page}
        runs[name] = package.PagedAdamW(parameters(shapes), **half).step
    return runs


def their_runs(layer: nn.Linear, x: Tensor) -> dict[str, Run]:
    """The same from bitsandbytes and torch."""
    w, options = layer.weight.detach(), {"quant_type": "nf4", "compress_statistics": True}
    codes, state = F.quantize_4bit(w, **options)
    theirs = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    theirs.compute_dtype, theirs.support_avx512bf16_for_cpu = torch.float32, False
    runs = {
        "quantize": lambda: F.quantize_4bit(w, **options),
        "dequantize": lambda: F.dequantize_4bit(codes, state),
        "4-bit layer, forward and backward": forward_and_backward(theirs, x),
    }
    for name, shapes in TRAINED.items():
        adamw = torch.optim.AdamW(parameters(shapes), foreach=False, fused=False)
        runs[name] = adamw.step
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--first", type=Path, help="another checkout of minipeft to compare with")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    layer = nn.Linear(args.width, args.width, bias=False)
    x = torch.randn(4, 128, args.width)
    packages = [minipeft] + ([load_another(args.first)] if args.first else [])
    ours, theirs = [our_runs(package, layer, x) for package in packages], their_runs(layer, x)
    names = ["ours / theirs", "at most"] + ["first / theirs", "ours / first"] * bool(args.first)
    print(f"| | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
    for name, their_run in theirs.items():
        *taken, their = medians([*(runs[name] for runs in ours), their_run], args.rounds)
        cells = [f"{taken[0] / their:.2f}", str(LIMITS.get(name, ADAMW_LIMIT))]
        if args.first:
            cells += [f"{taken[1] / their:.2f}", f"{taken[0] / taken[1]:.2f}"]
        row = name if name in LIMITS else f"PagedAdamW at half its state, by AdamW: {name}"
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
