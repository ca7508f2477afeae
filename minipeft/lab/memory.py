"""Where the memory of fine-tuning goes: by model shape, computed, and measured on our bases.

Four parts, in bytes: the weights; a gradient for each trainable parameter; AdamW's two moments for
each; and the activations, which the forward pass keeps for the backward pass. With p parameters, n
of them in linear layers, and a in adapters of rank r:

                weights                       gradients    moments
    full-8      2 p                           2 p          4 p    all in bfloat16
    full        2 p                           2 p          8 p    moments in float32
    full-16     2 p + 4 p                     2 p          8 p    and a float32 copy of the weights
    LoRA        2 p + 4 a                     4 a          8 a
    QLoRA       (0.5 + 1/64 + 1/4096) n       4 a          8 a
                + 4 (p - n) + 4 a

DoRA, PiSSA, VeRA and (IA)³ are as LoRA; a counts what each of them trains. PiSSA also keeps its
start, as large as a, and VeRA its two random matrices.

The name says the bytes per parameter. `full-8` is torch's AdamW on a bfloat16 model: small updates
are rounded away. `full`, 12 bytes, is what "over 780 GB" for a model of 65B parameters counts
(Dettmers et al. 2023, arXiv 2305.14314). `full-16` is mixed precision, which most people train
with. Our own bases are trained in float32: `full` takes 4 p + 4 p + 8 p there.

Activations are a lower bound: what a careful implementation must keep. transformers keeps more: see
`activations`. Not counted: the framework itself, the brief peak of a 4-bit layer's dequantized
weight, and fragmentation. A card of "80 GB" has 80 GiB, so the tables are in GiB, of 2^30 bytes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from minipeft.files import has_type, read_json, show, write_text
from minipeft.lab import DATA, real, report
from minipeft.lab.base import Base, load_base
from minipeft.lab.evaluate import activation_bytes, weight_bytes
from minipeft.lab.finetune import build_model
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.lab.train import train

PARTS = ("weights", "gradients", "optimizer", "activations")
FULL = {"full-8": (2, 2, 4), "full": (2, 2, 8), "full-16": (6, 2, 8)}  # weights, gradients, moments
SUCCESSORS = ("dora", "pissa", "vera", "ia3")  # of LoRA: computed if they are named
MEASURED = ("full", "lora", "qlora", *SUCCESSORS)  # on our own bases
METHODS = (*FULL, "lora", "qlora")
LABELS = {"full-8": "full, 8 bytes", "full": "full, 12 bytes", "full-16": "full, 16 bytes"}
# Model types with a gated MLP; whether the head is the embedding if the config does not say
LLAMAS = {
    "llama": False, "mistral": False, "qwen2": False, "qwen3": False, "smollm3": True,
    "phi3": False, "gemma": True, "gemma2": True, "gemma3_text": True,
}  # fmt: skip
MEASURED_TOKENS = 2**14  # in a step on one of our own bases: up to 2 GB
Found = dict[str, dict[str, dict[str, int]]]  # by shape, method and part: bytes


@dataclass(frozen=True)
class Shape:
    """A model's shape: GPT-2's family, or Llama's (gated MLP; biases only in Qwen)."""

    n_layer: int
    width: int
    heads: int
    vocabulary: int
    positions: int = 0  # learned position embeddings
    mlp: int = 0  # 0 is GPT-2's: 4 d
    keys: int = 0  # Llama only: width of the keys, below that of the queries if heads share them
    queries: int = 0  # Llama only: width of the queries; 0 is d
    bias: bool = False  # Llama only: queries, keys and values have biases (Qwen)
    tied: bool = False  # Llama only: the head is the embedding; GPT-2's always is
    ours: bool = False  # trained as in the lab: float32, no gradient checkpointing

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of a block."""
        d, f = self.width, self.mlp or 4 * self.width
        if not self.keys:
            return [(d, 3 * d), (d, d), (d, f), (f, d)]
        q = self.queries or d
        return [(d, q), (d, self.keys), (d, self.keys), (q, d), (d, f), (d, f), (f, d)]

    @property
    def linear(self) -> int:
        """Parameters in the weights of linear layers, without the head: what is quantized."""
        return self.n_layer * sum(i * o for i, o in self.linears)

    @property
    def parameters(self) -> int:
        d, v = self.width, self.vocabulary
        if self.keys:  # embedding and head; two norms per layer and a last one
            biases = self.n_layer * ((self.queries or d) + 2 * self.keys) if self.bias else 0
            tables = v * d if self.tied else 2 * v * d
            return self.linear + tables + (2 * self.n_layer + 1) * d + biases
        biases = sum(o for _, o in self.linears)  # a norm has a bias too
        return self.linear + (v + self.positions) * d + self.n_layer * (biases + 4 * d) + 2 * d

    def adapter(self, r: int, method: str = "lora") -> int:
        """Trained parameters of LoRA of rank r, or one of its successors, on every linear layer."""
        if method == "vera":
            return self.n_layer * sum(r + o for _, o in self.linears)
        if method == "ia3":  # of the layer that ends the MLP, the input
            return self.n_layer * (sum(o for _, o in self.linears[:-1]) + self.linears[-1][0])
        lengths = sum(o for _, o in self.linears) if method == "dora" else 0
        return self.n_layer * (sum(r * (i + o) for i, o in self.linears) + lengths)

    def kept_beside(self, r: int, method: str) -> int:
        """Numbers of an adapter that are not trained, and take memory all the same."""
        if method == "vera":
            return r * (max(i for i, _ in self.linears) + max(o for _, o in self.linears))
        return self.adapter(r) if method == "pissa" else 0


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
    "mistral-7b": Shape(32, 4096, 32, 32768, mlp=14336, keys=1024),  # v0.3
    "qwen2.5-7b": Shape(28, 3584, 28, 152064, mlp=18944, keys=512, bias=True),
    "llama-3.1-8b": Shape(32, 4096, 32, 128256, mlp=14336, keys=1024),
}


def read_shape(path: str | Path) -> Shape:
    """The shape in a model's `config.json`, in that file of a folder, or in a GGUF file.

    Raises ValueError for a model type other than gpt2 and those in LLAMAS, and for a size that is
    missing or not positive. The norms of some families (Gemma 2, Qwen3) are not all counted: less
    than 0.1 % of their parameters.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    config = real.config_of(file) if file.suffix == ".gguf" else read_json(file)
    kind = config.get("model_type")

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        value = default if value is None and default else value
        if not has_type(value, int) or not 1 <= value <= 10**7:
            raise ValueError(f"{file}: {name} must be an integer from 1 to 10^7, got {show(value)}")
        return value

    if kind == "gpt2":
        width, layers, heads = size("n_embd"), size("n_layer"), size("n_head")
        mlp = size("n_inner", 4 * width)
        return Shape(layers, width, heads, size("vocab_size"), size("n_positions"), mlp)
    if kind not in LLAMAS:
        known = ", ".join(("gpt2", *LLAMAS))
        raise ValueError(f"{file}: model_type must be one of {known}, got {show(kind)}")
    width, heads = size("hidden_size"), size("num_attention_heads")
    head = size("head_dim", max(width // heads, 1))
    return Shape(
        size("num_hidden_layers"), width, heads, size("vocab_size"), mlp=size("intermediate_size"),
        keys=head * size("num_key_value_heads", heads), queries=head * heads,
        bias=kind == "qwen2", tied=config.get("tie_word_embeddings", LLAMAS[kind]) is True,
    )  # fmt: skip


def activations(shape: Shape, method: str, r: int, tokens: int, checkpointing: bool) -> int:
    """Bytes kept between forward and backward pass for `tokens` tokens.

    Per block: the inputs of its norms and linear layers, queries, keys and values, what the
    activation function needs, and a few numbers per token. With checkpointing: each block's input,
    plus everything of the one block that is being recomputed.

    This is a lower bound. In bfloat16 and without checkpointing, transformers' Llama (4 layers of
    width 512) keeps 1.2 times as much in full fine-tuning, and 1.65 times as much with peft's LoRA,
    whose float32 adapters need float32 inputs: see tests/test_conformance_memory.py.
    """
    d, f, size = shape.width, shape.mlp or 4 * shape.width, 4 if shape.ours else 2
    if shape.keys:  # two norms, three inputs, q, k, v; gate, its activation, up, their product
        block = 4 * d + 2 * (shape.queries or d) + 2 * shape.keys + 4 * f + shape.heads + 2
    else:  # two norms, three inputs (attention's output is one), q, k, v; before and after GELU
        block = 8 * d + 2 * f + shape.heads + 4
    outputs = [o for _, o in shape.linears]
    block += {  # LoRA and PiSSA: A x
        "dora": r * len(outputs) + 2 * sum(outputs),  # W x and B A x too
        "vera": r * len(outputs) + sum(outputs) - 2 * d - f,  # A is frozen: it needs no inputs
        "ia3": sum(outputs[:-1]) - 2 * d,  # and of the inputs, one
    }.get(method, 0 if method in FULL else r * len(outputs))
    kept = block + shape.n_layer * d if checkpointing else shape.n_layer * block
    kept += 2 * d if method in FULL else 0  # inputs of the last norm and the head (LoRA: of
    return tokens * (size * kept + 4 * shape.vocabulary)  # the first norm, none is needed)


def memory(
    shape: Shape, method: str, r: int = 8, tokens: int = 512, checkpointing: bool = True
) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer state and activations while fine-tuning.

    Raises ValueError for an unknown method.
    """
    if method not in (*METHODS, *SUCCESSORS):
        known = ", ".join((*METHODS, *SUCCESSORS))
        raise ValueError(f"memory is computed for {known}, not for {method!r}")
    p, n, a = shape.parameters, shape.linear, shape.adapter(r, method)
    kept = activations(shape, method, r, tokens, checkpointing and not shape.ours)
    if method in FULL:
        each = (4, 4, 8) if shape.ours else FULL[method]
        return dict(zip(PARTS, (*(size * p for size in each), kept), strict=True))
    frozen = (4 if shape.ours else 2) * p
    if method == "qlora":
        frozen = round(n * (1 / 2 + 1 / 64 + 4 / (64 * 256))) + 4 * (p - n)
    frozen += 4 * shape.kept_beside(r, method)
    return dict(zip(PARTS, (frozen + 4 * a, 4 * a, 8 * a, kept), strict=True))


def measure(base: Base, method: str, r: int, batch_size: int, length: int) -> dict[str, int]:
    """The same four figures, from the tensors of one training step on a base."""
    recipe, run = RECIPES[method], RunConfig(steps=1, learning_rate=1e-4, quiet=True)
    recipe = recipe if recipe.size is None else recipe.with_size(r)
    model = build_model(base, recipe, run).train()
    ids = torch.randint(model.config.vocab_size, (batch_size, length))
    batch = {"input_ids": ids, "labels": ids}
    kept = activation_bytes(model, batch)
    training = train(model, [[batch]], run, recipe)
    sizes = weight_bytes(model), training.gradient_bytes, training.optimizer_bytes, kept
    return dict(zip(PARTS, sizes, strict=True))


def of(
    shapes: list[str], methods: list[str], r: int, batch_size: int, length: int, checkpointing: bool
) -> tuple[Found, Found]:
    """Computed figures for shapes and methods, and measured ones for our own bases.

    shapes: keys of SHAPES, and paths of config.json files. Raises ValueError for unknown names, for
    sequences that are longer than a shape's context, and for batches that are too large to be
    measured.
    """
    found, measured = {}, {}
    tokens = batch_size * length
    for name in shapes:
        if name not in SHAPES and not Path(name).exists():
            known = ", ".join(SHAPES)
            raise ValueError(
                f"there is no shape {name!r}, and no such file; known shapes: {known}; or name a "
                "config.json"
            )
        shape = SHAPES[name] if name in SHAPES else read_shape(name)
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
        kinds = [m for m in methods if m in MEASURED] if shape.ours else methods
        if not kinds:
            raise ValueError(f"{name} is trained in float32: choose from {', '.join(MEASURED)}")
        found[name] = {m: memory(shape, m, r, tokens, checkpointing) for m in kinds}
        if shape.ours:
            base = load_base(DATA / "base" / name)
            measured[name] = {m: measure(base, m, r, batch_size, length) for m in kinds}
    return found, measured


def label(shape: str, method: str) -> str:
    """A method's name in tables. Of full fine-tuning of a large model, with bytes per parameter."""
    ours = shape in SHAPES and SHAPES[shape].ours
    return report.NAMES[method] if ours or method not in FULL else LABELS[method]


def size(count: float) -> str:
    """Bytes with three digits and a unit."""
    unit, factor = ("GiB", 2**30) if count >= 2**30 else ("MiB", 2**20)
    return f"{count / factor:.3g} {unit}"


def table(found: Found) -> str:
    """A Markdown table with one line per shape and method."""
    lines = [
        [name, label(name, method), *map(size, (*parts.values(), sum(parts.values())))]
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
