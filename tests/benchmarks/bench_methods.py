"""Seconds a training step: full fine-tuning, our LoRA, peft's LoRA; as ratios to full fine-tuning.

    python tests/benchmarks/bench_lora.py [--widths 192 384 768] [--rounds 15]

One process; the rivals take their steps in turn, so that a busy machine slows all alike; medians.
Peft's LoRA sits on our own GPT, so that all three compute with the very same base.
"""

import argparse
import statistics
import time

import torch

from minipeft import GPT, GPTConfig, LoraConfig, get_peft_model

TARGETS = ["c_attn", "c_proj", "c_fc"]


def stepper(model, ids):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> float:
        start = time.perf_counter()
        model(input_ids=ids, labels=ids)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def peft_lora(gpt):
    try:
        import peft
    except ImportError:
        return None
    return peft.get_peft_model(gpt, peft.LoraConfig(r=8, target_modules=TARGETS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 384, 768])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    for width in args.widths:
        torch.manual_seed(0)
        layers = 6 if width < 768 else 3
        config = GPTConfig(
            2048, 128, width, layers, width // 32, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
        )
        ids = torch.randint(2048, (8, 128))
        models = {
            "full": GPT(config),
            "lora": get_peft_model(GPT(config), LoraConfig(r=8, target_modules=TARGETS)),
            "peft": peft_lora(GPT(config)),
        }
        steps = {name: stepper(model, ids) for name, model in models.items() if model is not None}
        seconds = {name: [] for name in steps}
        for i in range(args.rounds + 3):
            for name, step in steps.items():
                taken = step()
                if i >= 3:  # the first rounds warm up
                    seconds[name].append(taken)
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        ratios = ", ".join(f"{n} {m / medians['full']:.2f}" for n, m in medians.items())
        print(f"width {width}, {layers} layers: full {medians['full']:.3f} s; ratios: {ratios}")


if __name__ == "__main__":
    main()
