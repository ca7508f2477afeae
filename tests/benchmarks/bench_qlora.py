"""The quantizer, the 4-bit layer and the paged optimizer against bitsandbytes and torch.

    python tests/benchmarks/bench_qlora.py [--width 4096] [--rounds 15] [--threads 1]

One process; both sides take their turns one after the other; ratios of medians, ours by theirs,
and what we allow. A 4-bit layer of width x width on 4 x 128 tokens, forward and backward; AdamW on
what LoRA trains, on four million parameters in small and in large matrices, and on a whole base,
with half of the state in the budget. Needs the extra `conformance`.
"""

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from torch import nn

from minipeft import GPT, GPTConfig
from minipeft.paged_adamw import PagedAdamW
from minipeft.qlora import Linear4bit, dequantize_nf4, quantize_nf4


def ratio(ours: Callable, theirs: Callable, rounds: int) -> float:
    seconds = {ours: [], theirs: []}
    for i in range(rounds + 2):
        for run, taken in seconds.items():
            start = time.perf_counter()
            run()
            if i >= 2:  # the first two warm up
                taken.append(time.perf_counter() - start)
    return statistics.median(seconds[ours]) / statistics.median(seconds[theirs])


def linear(layer: nn.Module, x: torch.Tensor) -> Callable:
    def run() -> None:
        layer(x.clone().requires_grad_()).sum().backward()

    return run


def lora(width: int, layers: int, r: int) -> list[tuple[int, int]]:
    """The shapes that LoRA trains in a GPT-2: A and B at each of a block's four linear layers."""
    linear = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    return [shape for i, o in linear * layers for shape in ((r, i), (o, r))]


def base() -> list[torch.Size]:
    """The shapes of the 3M base, for full fine-tuning."""
    config = GPTConfig(vocab_size=2048, n_positions=256, n_embd=192, n_layer=6, n_head=6)
    return [p.shape for p in GPT(config).parameters()]


LIMITS = {"quantize": 0.5, "dequantize": 1.4, "4-bit layer, forward and backward": 1.15}

TRAINED = {
    "LoRA on the 3M base, r = 8": lora(192, 6, 8),
    "LoRA on GPT-2 small, r = 8": lora(768, 12, 8),
    "LoRA on GPT-2 small, r = 64": lora(768, 12, 64),
    "matrices of 256 x 256": [(256, 256)] * 64,
    "matrices of 1024 x 1024": [(1024, 1024)] * 4,
    "all of the 3M base": base(),
}


def parameters(shapes: list) -> list[nn.Parameter]:
    torch.manual_seed(0)
    found = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in found:
        p.grad = torch.randn_like(p)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    layer = nn.Linear(args.width, args.width, bias=False)
    w = layer.weight.detach()
    theirs = bnb.nn.Linear4bit(args.width, args.width, bias=False, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    theirs.compute_dtype, theirs.support_avx512bf16_for_cpu = torch.float32, False
    ours, x = Linear4bit(layer), torch.randn(4, 128, args.width)
    codes, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    q = quantize_nf4(w)
    pairs = {
        "quantize": (
            lambda: quantize_nf4(w),
            lambda: F.quantize_4bit(w, quant_type="nf4", compress_statistics=True),
        ),
        "dequantize": (lambda: dequantize_nf4(q), lambda: F.dequantize_4bit(codes, state)),
        "4-bit layer, forward and backward": (linear(ours, x), linear(theirs, x)),
    }
    for name, shapes in TRAINED.items():
        elements = sum(math.prod(shape) for shape in shapes)
        pages = max(8, elements // 2**19 * 2)  # an even number, of 2 MiB or a little more
        page = 8 * math.ceil(elements / pages)
        budget = pages // 2 * page
        pairs[f"PagedAdamW at half its state, by AdamW: {name}"] = (
            PagedAdamW(parameters(shapes), page_bytes=page, device_budget_bytes=budget).step,
            torch.optim.AdamW(parameters(shapes), foreach=False, fused=False).step,
        )
    print("| | ours / theirs | at most |\n|---|---|---|")
    for name, (our_run, their_run) in pairs.items():
        taken, limit = ratio(our_run, their_run, args.rounds), LIMITS.get(name, 1.3)
        print(f"| {name} | {taken:.2f} | {limit} |", flush=True)


if __name__ == "__main__":
    main()
