"""Where the memory of fine-tuning goes: by model shape, computed, and measured on our bases.

Four parts, in bytes: the weights; a gradient for each trained parameter; AdamW's two moments for
each; and the activations, which the forward pass keeps for the backward pass. With p parameters, n
of them in linear layers, and a of an adapter of rank r:

                weights                       gradients    moments
    full        2 p  (bfloat16)               2 p          8 p
    LoRA        2 p + 4 a                     4 a          8 a
    QLoRA       (0.5 + 1/64 + 1/4096) n       4 a          8 a
                + 4 (p - n) + 4 a

Our own bases are trained in float32, and there every 2 is a 4. "Over 780 GB" for a model of 65B
parameters (Dettmers et al. 2023, arXiv 2305.14314) is the first line: 12 bytes a parameter.
Not counted: what a framework itself takes, the passing peak of a 4-bit layer's full weight, and
fragmentation.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from minipeft.lab import tasks
from minipeft.lab.finetune import (
    Base,
    activation_bytes,
    build_model,
    load_base,
    optimizer_of,
    train,
)
from minipeft.peft_model import write_file

PARTS = ("weights", "gradients", "optimizer", "activations")
METHODS = ("full", "lora", "qlora")
Found = dict[str, dict[str, dict[str, int]]]  # shape: method: bytes by part


@dataclass(frozen=True)
class Shape:
    """A model's shape; GPT-2's family, or Llama's (gated MLP, no biases, head not tied)."""

    n_layer: int
    width: int
    heads: int
    vocabulary: int
    positions: int = 0  # learned position embeddings
    mlp: int = 0  # 0 is GPT-2's: 4 d
    keys: int = 0  # width of the keys, below d where heads share them; Llama's alone
    ours: bool = False  # trained as the lab does: float32, nothing computed twice

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of a block."""
        d, f = self.width, self.mlp or 4 * self.width
        if not self.keys:
            return [(d, 3 * d), (d, d), (d, f), (f, d)]
        return [(d, d), (d, self.keys), (d, self.keys), (d, d), (d, f), (d, f), (f, d)]

    @property
    def linear(self) -> int:
        """Parameters in the weights of linear layers, the head left out: what is quantized."""
        return self.n_layer * sum(i * o for i, o in self.linears)

    @property
    def parameters(self) -> int:
        d, v = self.width, self.vocabulary
        if self.keys:  # embedding and head; two norms a layer and a last one
            return self.linear + 2 * v * d + (2 * self.n_layer + 1) * d
        biases = sum(o for _, o in self.linears)  # a norm has a bias too
        return self.linear + (v + self.positions) * d + self.n_layer * (biases + 4 * d) + 2 * d

    def adapter(self, r: int) -> int:
        """Parameters of LoRA of rank r on every linear layer."""
        return self.n_layer * sum(r * (i + o) for i, o in self.linears)


SHAPES = {
    "0.3m": Shape(3, 72, 3, 2048, 256, ours=True),
    "1m": Shape(4, 128, 4, 2048, 256, ours=True),
    "3m": Shape(6, 192, 6, 2048, 256, ours=True),
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

    Of a block: the inputs of its norms and linear layers, queries, keys and values, what the
    activation function needs, and some single numbers a token. With checkpointing: each block's
    input, and all of the one block that is being computed again.
    """
    d, f, size = shape.width, shape.mlp or 4 * shape.width, 4 if shape.ours else 2
    if shape.keys:  # two norms, three inputs, q, k, v; gate, its activation, up, their product
        block = 6 * d + 2 * shape.keys + 4 * f + shape.heads + 2
    else:  # two norms, three inputs (attention's output is one), q, k, v; before and after GELU
        block = 8 * d + 2 * f + shape.heads + 4
    block += 0 if method == "full" else r * len(shape.linears)  # A x
    kept = block + shape.n_layer * d if checkpointing else shape.n_layer * block
    kept += 2 * d if method == "full" else 0  # the last norm's input, and the head's; or …
    return tokens * (size * kept + 4 * shape.vocabulary)  # … the first norm needs none


def memory(
    shape: Shape, method: str, r: int = 8, tokens: int = 512, checkpointing: bool = True
) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer state and activations while fine-tuning.

    Raises ValueError for a method that is not full, lora or qlora.
    """
    if method not in METHODS:
        raise ValueError(f"no memory is computed for {method!r}; only for {', '.join(METHODS)}")
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
    model = build_model(base, method, seed=0, steps=1, size=r).train()
    ids = torch.randint(model.config.vocab_size, (batch_size, length))
    batch = {"input_ids": ids, "labels": ids}
    kept = activation_bytes(model, batch)
    record = train(model, [[batch]], 1, 1e-4, optimizer_class=optimizer_of(method), quiet=True)
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    return dict(
        zip(
            PARTS, (weights, record["gradient_bytes"], record["optimizer_bytes"], kept), strict=True
        )
    )


def of(
    shapes: list[str],
    methods: list[str],
    r: int,
    batch_size: int,
    length: int,
    checkpointing: bool,
) -> tuple[Found, Found]:
    """What is computed for shapes and methods, and what is measured for those that are ours."""
    for name in shapes:
        if name not in SHAPES:
            raise ValueError(f"no shape {name!r}; there are: {', '.join(SHAPES)}")
    found = {
        name: {m: memory(SHAPES[name], m, r, batch_size * length, checkpointing) for m in methods}
        for name in shapes
    }
    bases = {name: load_base(tasks.DATA / "base" / name) for name in shapes if SHAPES[name].ours}
    measured = {
        name: {m: measure(base, m, r, batch_size, length) for m in methods}
        for name, base in bases.items()
    }
    return found, measured


# --- shown ---


def size(count: float) -> str:
    """Bytes for people: 3 digits and a unit."""
    unit, factor = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{count / factor:.3g} {unit}"


def table(found: Found) -> str:
    """A Markdown table, a line a shape and method."""
    lines = ["| shape | method | " + " | ".join(PARTS) + " | together |", "|" + "---|" * 7]
    for name, methods in found.items():
        for method, parts in methods.items():
            cells = [size(count) for count in (*parts.values(), sum(parts.values()))]
            lines.append(f"| {name} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(found: Found) -> Figure:
    """A panel a shape, a stacked bar a method; each panel has its own scale."""
    columns = min(len(found), 4)
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.7 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, (name, methods) in zip(axes, found.items(), strict=False):
        totals = [sum(parts.values()) for parts in methods.values()]
        unit, factor = ("GB", 1e9) if max(totals) >= 1e9 else ("MB", 1e6)
        bottom = [0.0] * len(methods)
        for part, color in zip(PARTS, ("#1b4f8f", "#d1741f", "#6a3d9a", "#b9b9b9"), strict=True):
            heights = [parts[part] / factor for parts in methods.values()]
            axis.bar(list(methods), heights, 0.65, bottom, color=color, label=part)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        for i, total in enumerate(bottom):
            axis.annotate(f"{total:.3g}", (i, total), (0, 2), ha="center",
                          textcoords="offset points")  # fmt: skip
        axis.set(title=name, ylabel=unit, ylim=(0, 1.15 * max(bottom)))
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def save(found: Found, measured: Found, folder: str | Path) -> None:
    """Write memory.json and memory.png."""
    folder, figure = Path(folder), picture(found)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"computed": found, "measured": measured}, indent=1) + "\n"
    write_file(folder / "memory.json", lambda file: Path(file).write_text(text))
    write_file(folder / "memory.png", lambda file: figure.savefig(file, format="png", dpi=80))
