"""Which layers get an adapter. The search that `get_peft_model` uses raises ValueError for a target
that cannot be adapted safely; the `add_…` functions of the method files search on their own.

All fine-tuning methods accept targets in the same form. A list holds names or endings of names
("attn.c_proj"). A string is a regular expression for the whole name, or "all-linear": every linear
layer except the output head. `layers_at` makes such a list for attention or the MLPs, which each
family of models names in its own way.
"""

import re
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.base_model import warn_of_unreached
from minipeft.methods.qlora import QuantizedLinear, matrix

PLACES = {  # parts of the name of a block's module in GPT-2, Llama, Mistral, Qwen, Gemma, Phi, NeoX
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "feed_forward", "ffn"),
}  # fmt: skip
# Names of the layers that end an attention or an MLP
ENDS = ("c_proj", "o_proj", "out_proj", "dense", "down_proj", "fc2", "dense_4h_to_h")
# In eval mode, these read the weights of the layers inside them without calling the layers.
FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def find_targets(
    model: nn.Module, target_modules: list[str] | str | None, part: str = "weight"
) -> dict[str, nn.Module]:
    """The layers to adapt, by name, in the model's order.

    part: "weight" accepts linear layers; "bias" accepts any layer with a bias of its own, and then
    target_modules=None selects all of these. Raises ValueError for
    - a model that is compiled, or already has an adapter,
    - an entry that matches nothing, or a layer of the wrong kind,
    - a layer whose parameter PyTorch's fast path reads directly, bypassing the adapter,
    - a parameter that is computed, offloaded, or shared by two modules.
    Warns if "all-linear" leaves out 1 % or more of the weights, such as a mixture's experts.
    """
    modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
    if any(hasattr(m, "base_layer") for m in modules.values()):
        raise ValueError("the model already has an adapter: remove it before adding another")
    if any(hasattr(m, "_orig_mod") for m in model.modules()):
        raise ValueError("the model is compiled: add the adapter first, then call torch.compile")
    fits, what = is_linear, "linear layers"
    if part == "bias":
        fits, what = has_bias, "layers with a bias"
    fitting = [n for n, m in modules.items() if fits(m)]
    known = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in fitting})) or "none"
    found = set()
    if target_modules is None and part == "bias":
        target_modules = fitting
    if not target_modules:
        raise ValueError(f"target_modules names nothing; {what}: {known}")
    for entry, names in match(model, modules, fitting, target_modules).items():
        if not names:
            raise ValueError(f"target_modules: {entry!r} matches no module; {what}: {known}")
        found.update(names)
    if target_modules == "all-linear" and part == "weight":
        warn_of_unreached(model, found, "all-linear")
    # how many modules use a parameter; a module with two names counts twice
    users = Counter(memory_key(p) for m in modules.values() for p in m.parameters(recurse=False))
    fast = {inner for m in model.modules() if isinstance(m, FAST_PATH) for inner in m.modules()}
    targets = {n: m for n, m in modules.items() if n in found}
    for name, layer in targets.items():
        if name not in fitting and isinstance(layer, nn.Linear) and part == "weight":
            raise ValueError(
                f"target {name} is a {type(layer).__name__}: it does not compute W x + b, or W is "
                "not floating point; for a base in 4 bits, call minipeft's quantize_model"
            )
        if name not in fitting:
            kind = type(layer).__name__
            raise ValueError(f"target {name} is a {kind}; this method adapts {what}: {known}")
        if layer in fast:
            raise ValueError(f"target {name}: PyTorch reads its {part} directly, not the adapter")
        check_parameter(name, layer, part, users)
    return targets


def match(
    model: nn.Module, modules: dict[str, nn.Module], fitting: list[str], target_modules
) -> dict[str, list[str]]:
    """For each entry of target_modules, the names of the modules it matches."""
    if target_modules == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        linear = [n for n in fitting if is_linear(modules[n]) and modules[n] is not head]
        return {target_modules: linear}
    if isinstance(target_modules, str):
        try:
            return {target_modules: [n for n in modules if re.fullmatch(target_modules, n)]}
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is no regex: {error}") from error
    return {end: [n for n in modules if f".{n}".endswith(f".{end}")] for end in target_modules}


def check_parameter(name: str, layer: nn.Module, part: str, users: Counter) -> None:
    """Raises ValueError for a weight or bias that an adapter cannot be added to."""
    if isinstance(layer, QuantizedLinear) and part == "weight":
        return
    parameter = layer._parameters.get(part)
    if parameter is None:
        raise ValueError(f"target {name} cannot be adapted: its {part} is computed, not stored")
    if parameter.is_meta and hasattr(layer, "_hf_hook"):
        raise ValueError(f"target {name} cannot be adapted: its {part} is offloaded by accelerate")
    if users[memory_key(parameter)] > 1:
        raise ValueError(f"target {name} shares its {part} with another module: untie it first")


def memory_key(p: Tensor) -> int:
    """A key that is equal for tensors with the same memory, even if they are two Parameters."""
    return p.data_ptr() or id(p)  # data_ptr is 0 on the meta device


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer computes W x + b with a matrix W. A subclass of nn.Linear with a `forward` of
    its own may compute something else, so it is tested on two inputs."""
    plain = type(layer).forward is nn.Linear.forward or type(layer).__name__ == "Conv1D"
    if plain or isinstance(layer, QuantizedLinear):
        return True
    return isinstance(layer, nn.Linear) and computes_wx(layer)


@torch.no_grad()
def computes_wx(layer: nn.Linear) -> bool:
    w = layer.weight
    if w.is_meta:  # nothing can be computed
        return True
    x = torch.linspace(-1, 1, 2 * layer.in_features, device=w.device).view(2, -1)
    try:
        x = x.to(w.dtype)
        return torch.allclose(layer(x), F.linear(x, w, layer.bias), rtol=1e-2, atol=1e-2)
    except Exception:  # any error means that it does not compute W x + b
        return False


def has_bias(layer: nn.Module) -> bool:
    return not list(layer.children()) and isinstance(layer._parameters.get("bias"), nn.Parameter)


def place_of(name: str) -> str:
    """Where a layer is: in the "attention" or the "mlp" of a block, or "other"."""
    parent = name.split(".")[-2:][0].lower()
    return next((p for p, words in PLACES.items() if any(w in parent for w in words)), "other")


def layers_at(model: nn.Module, place: str) -> list[str] | str:
    """`target_modules` for a place in a model, found from the names of its modules.

    place: "attention" or "mlp"; "ends", the last linear layer of each of the two; anything else is
    returned as it is. Raises ValueError if the model has no layer there.
    """
    if place not in (*PLACES, "ends"):
        return place
    endings = [".".join(n.split(".")[-2:]) for n in find_targets(model, "all-linear")]
    found = [
        ending
        for ending in dict.fromkeys(endings)
        if place == place_of(ending)
        or (place == "ends" and place_of(ending) != "other" and ending.split(".")[1] in ENDS)
    ]
    if not found:
        raise ValueError(f"this model has no linear layers that are known to be {place}")
    return found


def list_targets(model: nn.Module) -> list[dict]:
    """A row per kind of linear layer: name, place, count, in, out, parameters, and the parameters
    of LoRAs of rank 1 on these layers ("rank 1 adapters").

    A name is the last two parts of a module's name. As an entry of `target_modules` it matches all
    layers of its row. For the place see `place_of`.
    """
    counts = Counter()
    for name, layer in find_targets(model, "all-linear").items():
        n_out, n_in = matrix(layer).shape
        counts[".".join(name.split(".")[-2:]), n_in, n_out] += 1
    return [
        {
            "name": name, "place": place_of(name), "count": count, "in": n_in, "out": n_out,
            "parameters": count * n_in * n_out, "rank 1 adapters": count * (n_in + n_out),
        }
        for (name, n_in, n_out), count in counts.items()
    ]  # fmt: skip
