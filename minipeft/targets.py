"""Which layers get an adapter: the strict search that `get_peft_model` uses for every method.

Targets are given in one language. A list holds names or endings of names ("attn.c_proj"); a string
is a regular expression for the whole name, or "all-linear": every linear layer but the output head.
"""

import re
from collections import Counter

from torch import nn

from minipeft.methods.qlora import QuantizedLinear

FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # they read weights directly


def find_targets(
    model: nn.Module, target_modules: list[str] | str | None, part: str = "weight"
) -> dict[str, nn.Module]:
    """The layers to adapt, by name, in the model's order.

    part: "weight" accepts linear layers, "bias" any layer with a bias of its own; None for
    target_modules then means all of them. Raises ValueError for an entry that matches nothing, a
    match of another kind, a parameter that two modules share, a layer that PyTorch's fast path
    would read past the adapter, and a model that already has an adapter.
    """
    modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
    if any(hasattr(m, "base_layer") for m in modules.values()):
        raise ValueError("the model already has an adapter: remove it before adding another")
    fits = is_linear if part == "weight" else has_bias
    fitting = [n for n, m in modules.items() if fits(m)]
    if target_modules == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        linear = [n for n in fitting if is_linear(modules[n]) and modules[n] is not head]
        hits = {"all-linear": linear}
    elif target_modules is None and part == "bias":
        hits = {"None": fitting}
    elif isinstance(target_modules, str):
        hits = {target_modules: [n for n in modules if re.fullmatch(target_modules, n)]}
    else:
        ends = target_modules or [""]
        hits = {end: [n for n in modules if f".{n}".endswith(f".{end}")] for end in ends}
    what = "linear layers" if part == "weight" else "layers with a bias"
    known = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in fitting})) or "none"
    for entry, names in hits.items():
        if not names:
            raise ValueError(f"target_modules: {entry!r} matches no module; {what}: {known}")
    users = Counter(id(p) for m in modules.values() for p in m.parameters(recurse=False))
    fast = {inner for m in model.modules() if isinstance(m, FAST_PATH) for inner in m.modules()}
    found = {n: m for n, m in modules.items() if any(n in names for names in hits.values())}
    for name, layer in found.items():
        if name not in fitting:
            kind = type(layer).__name__
            raise ValueError(f"target {name} is a {kind}; this method adapts {what}: {known}")
        if layer in fast:
            raise ValueError(f"target {name}: PyTorch reads its {part} itself and skips an adapter")
        if users[id(layer._parameters.get(part))] > 1:
            raise ValueError(f"target {name} shares its {part} with another module: untie it first")
    return found


def is_linear(layer: nn.Module) -> bool:
    linear = isinstance(layer, nn.Linear | QuantizedLinear)
    return linear or type(layer).__name__ == "Conv1D"  # transformers' GPT-2


def has_bias(layer: nn.Module) -> bool:
    return not list(layer.children()) and isinstance(layer._parameters.get("bias"), nn.Parameter)


def list_targets(model: nn.Module) -> list[dict]:
    """A row per kind of linear layer: name, count, in, out, parameters, rank 1 adapters.

    A name is the last two parts of a module's name. As an entry of `target_modules` it matches all
    layers of its row.
    """
    counts = Counter()
    for name, layer in find_targets(model, "all-linear").items():
        shape = layer.weight.shape
        n_in, n_out = shape if type(layer).__name__ == "Conv1D" else reversed(shape)
        counts[".".join(name.split(".")[-2:]), n_in, n_out] += 1
    return [
        {
            "name": name, "count": count, "in": n_in, "out": n_out,
            "parameters": count * n_in * n_out, "rank 1 adapters": count * (n_in + n_out),
        }
        for (name, n_in, n_out), count in counts.items()
    ]  # fmt: skip
