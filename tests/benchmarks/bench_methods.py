"""Seconds a training step of every method, as a ratio to full fine-tuning's.

    python tests/benchmarks/bench_methods.py [--widths 192 384 768] [--rounds 15] [--methods lora …]

One process; all take their steps in turn, so that a busy machine slows all alike; medians. Three
columns: ours on our GPT; ours on transformers' GPT-2 of the same shape; peft's on that GPT-2
(the last two need the extra `conformance`). AdaLoRA allocates ranks in every step.
"""

import argparse
import statistics
import time

import torch

import minipeft
from minipeft import GPT, GPTConfig, get_peft_model

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


def stepper(model, ids):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, count = torch.optim.AdamW(parameters, lr=1e-4), iter(range(1, 10**9))
    inner = getattr(model, "base_model", None)  # where peft's AdaLoRA has its allocator
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


def columns(shape: dict, method: str) -> dict:
    """Models by column, full fine-tuning (`… full`) and the method."""
    kind, settings = METHODS[method]
    off = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    ours = GPTConfig(**shape, **off)
    models = {"ours full": GPT(ours)}
    models["ours"] = get_peft_model(GPT(ours), getattr(minipeft, kind)(**settings, **TASK))
    try:
        import peft
        import transformers
    except ImportError:
        return models
    theirs = transformers.GPT2Config(**shape, **off)

    def gpt2():
        return transformers.GPT2LMHeadModel(theirs)

    config = getattr(peft, kind)(**settings, **TASK)
    models["gpt2 full"] = gpt2()
    models["ours on gpt2"] = get_peft_model(gpt2(), getattr(minipeft, kind)(**settings, **TASK))
    models["peft on gpt2"] = peft.get_peft_model(gpt2(), config)
    return {name: model.train() for name, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 384, 768])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    print("| width | method | ours | ours on GPT-2 | peft on GPT-2 |\n|---|---|---|---|---|")
    for width in args.widths:
        for method in args.methods:
            torch.manual_seed(0)
            shape = {"vocab_size": 2048, "n_positions": 256, "n_embd": width}
            shape |= {"n_layer": 6 if width < 768 else 3, "n_head": width // 32}
            ids = torch.randint(2048, (8, 128))
            steps = {name: stepper(model, ids) for name, model in columns(shape, method).items()}
            seconds = {name: [] for name in steps}
            for i in range(args.rounds + 3):
                for name, step in steps.items():
                    taken = step()
                    if i >= 3:  # the first rounds warm up
                        seconds[name].append(taken)
            medians = {name: statistics.median(taken) for name, taken in seconds.items()}
            cells = [f"{medians['ours'] / medians['ours full']:.2f}"]
            for name in ("ours on gpt2", "peft on gpt2"):
                cells += (
                    [f"{medians[name] / medians['gpt2 full']:.2f}"] if name in medians else ["–"]
                )
            print(f"| {width} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
