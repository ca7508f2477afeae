"""Where the memory of fine-tuning goes: by model shape, computed, and measured on our bases.

Four parts, in bytes: the weights; a gradient for each trainable parameter; AdamW's two moments for
each; and the activations, which the forward pass keeps for the backward pass. With p parameters, n
of them in linear layers, and a in adapters of rank r:

                weights                       gradients    moments
    full        2 p  (bfloat16)               2 p          8 p
    LoRA        2 p + 4 a                     4 a          8 a
    QLoRA       (0.5 + 1/64 + 1/4096) n       4 a          8 a
                + 4 (p - n) + 4 a

Our own bases are trained in float32, where every 2 is a 4. "Over 780 GB" for a model of 65B
parameters (Dettmers et al. 2023, arXiv 2305.14314) is the first line: 12 bytes per parameter.
Not counted: the framework itself, the brief peak of a 4-bit layer's dequantized weight, and
fragmentation.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from minipeft.files import write_text
from minipeft.lab import DATA, report
from minipeft.lab.base import Base, load_base
from minipeft.lab.evaluate import activation_bytes, weight_bytes
from minipeft.lab.finetune import build_model
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.lab.train import train

PARTS = ("weights", "gradients", "optimizer", "activations")
METHODS = ("full", "lora", "qlora")
MEASURED_TOKENS = 2**14  # in a step on one of our own bases: up to 2 GB
Found = dict[str, dict[str, dict[str, int]]]  # by shape, method and part: bytes


@dataclass(frozen=True)
class Shape:
    """A model's shape: GPT-2's family, or Llama's (gated MLP, no biases, head not tied)."""

    n_layer: int
    width: int
    heads: int
    vocabulary: int
    positions: int = 0  # learned position embeddings
    mlp: int = 0  # 0 is GPT-2's: 4 d
    keys: int = 0  # Llama only: width of the keys, below d if heads share them
    ours: bool = False  # trained as in the lab: float32, no gradient checkpointing

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of a block."""
        d, f = self.width, self.mlp or 4 * self.width
        if not self.keys:
            return [(d, 3 * d), (d, d), (d, f), (f, d)]
        return [(d, d), (d, self.keys), (d, self.keys), (d, d), (d, f), (d, f), (f, d)]

    @property
    def linear(self) -> int:
        """Parameters in the weights of linear layers, without the head: what is quantized."""
        return self.n_layer * sum(i * o for i, o in self.linears)

    @property
    def parameters(self) -> int:
        d, v = self.width, self.vocabulary
        if self.keys:  # embedding and head; two norms per layer and a last one
            return self.linear + 2 * v * d + (2 * self.n_layer + 1) * d
        biases = sum(o for _, o in self.linears)  # a norm has a bias too
        return self.linear + (v + self.positions) * d + self.n_layer * (biases + 4 * d) + 2 * d

    def adapter(self, r: int) -> int:
        """Parameters of LoRA of rank r on every linear layer."""
        return self.n_layer * sum(r * (i + o) for i, o in self.linears)


SHAPES = {
    "0.3m": Shape(3, 72, 3, 2048, 128, ours=True),
    "1m": Shape(4, 128, 4, 2048, 128, ours=True),
    "3m": Shape(6, 192, 6, 2048, 128, ours=True),
    "gpt2": Shape(12, 768, 12, 50257, 1024),
    "gpt2-medium": Shape(24, 1024, 16, 50257, 1024),
    "gpt2-large": Shape(36, 1280, 20, 50257, 1024),
    "gpt2-xl": Shape(48, 1600, 25, 50257, 1024),
    "llama-2-7b": Shape(32, 4096, 32, 32000, mlp=11008, keys=4096),
    "llama-2-13b": Shape(40, 5120, 40, 32000, mlp=13824, keys=5120),
    "llama-65b": Shape(80, 8192, 64, 32000, mlp=22016, keys=8192),
    "llama-2-70b": Shape(80, 8192, 64, 32000, mlp=28672, keys=1024),
}


def activations(shape: Shape, method: str, r: int, tokens: int, checkpointing: bool) -> int:
    """Bytes kept between forward and backward pass for `tokens` tokens.

    Per block: the inputs of its norms and linear layers, queries, keys and values, what the
    activation function needs, and a few numbers per token. With checkpointing: each block's input,
    plus everything of the one block that is being recomputed.
    """
    d, f, size = shape.width, shape.mlp or 4 * shape.width, 4 if shape.ours else 2
    if shape.keys:  # two norms, three inputs, q, k, v; gate, its activation, up, their product
        block = 6 * d + 2 * shape.keys + 4 * f + shape.heads + 2
    else:  # two norms, three inputs (attention's output is one), q, k, v; before and after GELU
        block = 8 * d + 2 * f + shape.heads + 4
    block += 0 if method == "full" else r * len(shape.linears)  # A x
    kept = block + shape.n_layer * d if checkpointing else shape.n_layer * block
    kept += 2 * d if method == "full" else 0  # inputs of the last norm and the head (LoRA: of
    return tokens * (size * kept + 4 * shape.vocabulary)  # the first norm, none is needed)


def memory(
    shape: Shape, method: str, r: int = 8, tokens: int = 512, checkpointing: bool = True
) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer state and activations while fine-tuning.

    Raises ValueError for a method that is not full, lora or qlora.
    """
    if method not in METHODS:
        raise ValueError(f"memory is computed for {', '.join(METHODS)}, not for {method!r}")
    p, n, a = shape.parameters, shape.linear, shape.adapter(r)
    size = 4 if shape.ours else 2
    weights = {
        "full": size * p,
        "lora": size * p + 4 * a,
        "qlora": round(n * (1 / 2 + 1 / 64 + 4 / (64 * 256))) + 4 * (p - n) + 4 * a,
    }[method]
    trained, gradient = (p, size) if method == "full" else (a, 4)
    kept = activations(shape, method, r, tokens, checkpointing and not shape.ours)
    return dict(zip(PARTS, (weights, gradient * trained, 8 * trained, kept), strict=True))


def measure(base: Base, method: str, r: int, batch_size: int, length: int) -> dict[str, int]:
    """The same four figures, from the tensors of one training step on a base."""
    recipe, run = RECIPES[method], RunConfig(steps=1, learning_rate=1e-4, quiet=True)
    model = build_model(base, recipe if method == "full" else recipe.with_size(r), run).train()
    ids = torch.randint(model.config.vocab_size, (batch_size, length))
    batch = {"input_ids": ids, "labels": ids}
    kept = activation_bytes(model, batch)
    training = train(model, [[batch]], run, recipe.optimizer)
    sizes = weight_bytes(model), training.gradient_bytes, training.optimizer_bytes, kept
    return dict(zip(PARTS, sizes, strict=True))


def of(
    shapes: list[str], methods: list[str], r: int, batch_size: int, length: int, checkpointing: bool
) -> tuple[Found, Found]:
    """Computed figures for shapes and methods, and measured ones for our own bases.

    Raises ValueError for unknown names, for sequences that are longer than a shape's context, and
    for batches that are too large to be measured.
    """
    found, measured = {}, {}
    tokens = batch_size * length
    for name in shapes:
        if name not in SHAPES:
            raise ValueError(f"there is no shape {name!r}; known shapes: {', '.join(SHAPES)}")
        shape = SHAPES[name]
        if 0 < shape.positions < length:
            raise ValueError(
                f"the context of {name} holds {shape.positions} tokens, got {length}: choose "
                "other shapes, or a smaller length"
            )
        if shape.ours and tokens > MEASURED_TOKENS:
            raise ValueError(
                f"{name} is measured with at most {MEASURED_TOKENS:,} tokens in a batch, got "
                f"{tokens:,}: choose other shapes, or a smaller batch"
            )
        found[name] = {m: memory(shape, m, r, tokens, checkpointing) for m in methods}
    for name in [name for name in shapes if SHAPES[name].ours]:
        base = load_base(DATA / "base" / name)
        measured[name] = {m: measure(base, m, r, batch_size, length) for m in methods}
    return found, measured


def size(count: float) -> str:
    """Bytes with three digits and a unit."""
    unit, factor = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{count / factor:.3g} {unit}"


def table(found: Found) -> str:
    """A Markdown table with one line per shape and method."""
    lines = [
        [name, report.NAMES[method], *(size(n) for n in (*parts.values(), sum(parts.values())))]
        for name, methods in found.items()
        for method, parts in methods.items()
    ]
    return report.markdown_table(["shape", "method", *PARTS, "total"], lines)


def save(found: Found, measured: Found, folder: str | Path) -> None:
    """Write memory.json and memory.png."""
    text = json.dumps({"computed": found, "measured": measured}, indent=1) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "memory.json", text)
    report.save_figure(report.memory_figure(found), folder / "memory.png")
