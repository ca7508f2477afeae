"""Which layers get an adapter: the strict search that `get_peft_model` uses for every method.

Targets are given in one language. A list holds names or endings of names ("attn.c_proj"); a string
is a regular expression for the whole name, or "all-linear": every linear layer but the output head.
"""

import re
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.methods.qlora import QuantizedLinear, warn_of_unreached

FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # they read weights directly


def find_targets(
    model: nn.Module, target_modules: list[str] | str | None, part: str = "weight"
) -> dict[str, nn.Module]:
    """The layers to adapt, by name, in the model's order.

    part: "weight" accepts linear layers, "bias" any layer with a bias of its own; None for
    target_modules then means all of them. Raises ValueError for an entry that matches nothing, a
    match of another kind, a parameter that two modules share, a layer that PyTorch's fast path
    would read past the adapter, and a model that is compiled or already has an adapter. Warns if
    "all-linear" leaves out 1 % or more of the weights.
    """
    modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
    if any(hasattr(m, "base_layer") for m in modules.values()):
        raise ValueError("the model already has an adapter: remove it before adding another")
    if any(hasattr(m, "_orig_mod") for m in model.modules()):
        raise ValueError("the model is compiled: add the adapter first, then call torch.compile")
    fits = is_linear if part == "weight" else has_bias
    fitting = [n for n, m in modules.items() if fits(m)]
    if target_modules == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        linear = [n for n in fitting if is_linear(modules[n]) and modules[n] is not head]
        hits = {"all-linear": linear}
        if part == "weight":
            warn_of_unreached(model, set(linear), "all-linear")
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
    users = Counter(memory(p) for m in modules.values() for p in m.parameters(recurse=False))
    fast = {inner for m in model.modules() if isinstance(m, FAST_PATH) for inner in m.modules()}
    found = {n: m for n, m in modules.items() if any(n in names for names in hits.values())}
    for name, layer in found.items():
        kind = type(layer).__name__
        if name not in fitting and isinstance(layer, nn.Linear) and part == "weight":
            raise ValueError(
                f"target {name} is a {kind} and does not compute W x + b with a floating-point W; "
                "for a base in 4 bits, call minipeft's quantize_model"
            )
        if name not in fitting:
            raise ValueError(f"target {name} is a {kind}; this method adapts {what}: {known}")
        if layer in fast:
            raise ValueError(f"target {name}: PyTorch reads its {part} itself and skips an adapter")
        parameter = layer._parameters.get(part)
        if isinstance(layer, QuantizedLinear) and part == "weight":
            continue
        if parameter is None or (parameter.is_meta and hasattr(layer, "_hf_hook")):
            why = "computed, not stored" if parameter is None else "offloaded by accelerate"
            raise ValueError(f"target {name} cannot be adapted: its {part} is {why}")
        if users[memory(parameter)] > 1:
            raise ValueError(f"target {name} shares its {part} with another module: untie it first")
    return found


def memory(p: Tensor) -> int:
    """The same for tensors that share their memory, even if they are different Parameters."""
    return p.data_ptr() or id(p)  # 0 on the meta device


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer computes W x + b with a matrix W. A subclass of nn.Linear with a `forward` of
    its own may compute something else, as some routers do: try it."""
    plain = type(layer).forward is nn.Linear.forward or type(layer).__name__ == "Conv1D"
    if plain or isinstance(layer, QuantizedLinear):
        return True
    return isinstance(layer, nn.Linear) and computes_wx(layer)


@torch.no_grad()
def computes_wx(layer: nn.Linear) -> bool:
    w = layer.weight
    x = torch.linspace(-1, 1, 2 * layer.in_features, device=w.device).view(2, -1)
    try:
        x = x.to(w.dtype)
        return torch.allclose(layer(x), F.linear(x, w, layer.bias), rtol=1e-2, atol=1e-2)
    except Exception:  # other weights, another output: whatever it raises, it is not W x + b
        return False


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
