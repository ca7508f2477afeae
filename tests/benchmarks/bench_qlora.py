"""The quantizer, the 4-bit layer and the paged optimizer against bitsandbytes and torch.

    python tests/benchmarks/bench_qlora.py [--width 4096] [--rounds 9] [--threads 1]

One process; both sides take their turns one after the other; ratios of medians, ours by theirs.
A 4-bit layer of width x width on 4 x 128 tokens, forward and backward; AdamW on four million
parameters in small and in large matrices, and on those of the 3M base, half of whose state fits the
budget. Needs the extra `conformance`.
"""

import argparse
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


def parameters(width: int | None) -> list[nn.Parameter]:
    """Four million of them in square matrices, or those of a GPT of the 3M base's shape."""
    torch.manual_seed(0)
    if width is None:
        config = GPTConfig(vocab_size=2048, n_positions=256, n_embd=192, n_layer=6, n_head=6)
        found = list(GPT(config).parameters())
    else:
        found = [nn.Parameter(torch.randn(width, width)) for _ in range(2**22 // width**2)]
    for p in found:
        p.grad = torch.randn_like(p)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
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
    for n, of in ((256, "256 x 256"), (1024, "1024 x 1024"), (None, "the 3M base")):
        half = sum(4 * p.numel() for p in parameters(n))
        pairs[f"PagedAdamW at half its state, by AdamW, matrices of {of}"] = (
            PagedAdamW(parameters(n), device_budget_bytes=half).step,
            torch.optim.AdamW(parameters(n), foreach=False, fused=False).step,
        )
    print("| | ours / theirs |\n|---|---|")
    for name, (our_run, their_run) in pairs.items():
        print(f"| {name} | {ratio(our_run, their_run, args.rounds):.2f} |", flush=True)


if __name__ == "__main__":
    main()
