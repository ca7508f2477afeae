r"""Bottleneck adapters: a small network after the layers that end attention and MLP.

An adapter squeezes what a layer gives through r numbers and adds what comes out, before the sum
with the residual. It alone is trained. It is not linear, so it is merged into no weight.
Paper: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751.

    y = h + W_up f(W_down h + b_down) + b_up,    h = W x + b             (1)  section 2.1

Shapes: W_down (r, d), b_down (r,), W_up (d, r), b_up (d,), h and y (…, d), x (…, in).
Trainable parameters: the sum over the adapted layers of 2 r d + r + d.
Where we differ. From the paper: W_up and b_up start at 0 and W_down as nn.Linear does, so at first
it is the base, to the bit; norms stay frozen. peft has none; our keys: `base_model.model.….up.bias`
"""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class BottleneckConfig:
    """After which layers, and how wide."""

    target_modules: list[str] | str  # names, endings or a regex, as ["attn.c_proj", "mlp.c_proj"]
    bottleneck_size: int = 16  # r
    non_linearity: str = "gelu"  # f: "gelu" or "relu"
    task_type: str | None = None
    inference_mode: bool = False  # True: the adapter is frozen as well
    peft_type: str = field(default="BOTTLENECK", init=False)

    def __post_init__(self):
        if type(self.bottleneck_size) is not int or self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size is {self.bottleneck_size!r}: give 1, 2, 3 or more")
        if self.non_linearity not in ("gelu", "relu"):
            raise ValueError(f"non_linearity is {self.non_linearity!r}: give gelu or relu")


class BottleneckLayer(nn.Module):
    """A linear layer and the adapter after it, equation (1). It still looks like a linear layer."""

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def __init__(self, base_layer: nn.Module, config: BottleneckConfig):
        super().__init__()
        self.base_layer, w, r = base_layer, base_layer.weight, config.bottleneck_size
        d, self.in_features = w.t().shape if type(base_layer).__name__ == "Conv1D" else w.shape
        self.out_features, self.f = d, getattr(nn.functional, config.non_linearity)
        self.down, self.up = nn.Linear(d, r), nn.Linear(r, d)
        for layer in (self.down, self.up):
            layer.to(w.device, torch.promote_types(w.dtype, torch.float32))
            layer.requires_grad_(not config.inference_mode)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base_layer(x)  # (…, d)
        inner = self.f(self.down(h.to(self.down.weight.dtype)))  # (…, r)
        return h + self.up(inner).to(h.dtype)

    def merge(self) -> None:
        raise ValueError("a bottleneck is not linear, so it cannot be merged into a weight")

    unmerge = merge_into_base = merge


def bottleneck_layers(model: nn.Module, config: BottleneckConfig) -> dict[str, BottleneckLayer]:
    """A BottleneckLayer for each target, by name. The model is not changed. Raises as `choose`."""
    targets = choose(model, config.target_modules, "weight")
    for name, m in targets.items():
        if not isinstance(m, nn.Linear) and type(m).__name__ != "Conv1D":
            raise ValueError(f"target {name} is a {type(m).__name__}, not a linear layer")
    return {name: BottleneckLayer(m, config) for name, m in targets.items()}


def add_bottleneck(model: nn.Module, config: BottleneckConfig) -> dict[str, BottleneckLayer]:
    """Freeze the model and put a BottleneckLayer in the place of each target; returned by name."""
    layers = bottleneck_layers(model, config)
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.training))
    return layers


# --- choose: the same lines stand in bitfit.py and bottleneck.py
def choose(model: nn.Module, targets: list[str] | str, part: str) -> dict[str, nn.Module]:
    """The layers with a `part` that are named, by name. ValueError for what cannot be right."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if any(hasattr(m, "base_layer") for m in modules.values()):
        raise ValueError("an adapter is in place already: remove it before adding another")
    leaves = {n: m for n, m in modules.items() if n and not list(m.children())}
    fit = {n: p for n, m in leaves.items() if isinstance(p := getattr(m, part, 0), nn.Parameter)}
    entries = [targets] if isinstance(targets, str) else targets or [""]
    hits = {t: [n for n in fit if re.fullmatch(rf"(.*\.)?({t})", n)] for t in entries}
    for t in [t for t in hits if not hits[t]]:
        have = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in fit})) or "none"
        raise ValueError(f"target_modules: {t!r} matches no layer with a {part}; those are: {have}")
    inside = nn.MultiheadAttention | nn.TransformerEncoderLayer  # their fast path skips adapters
    users = [id(p) for m in modules.values() for p in m.parameters(isinstance(m, inside))]
    for n in [n for names in hits.values() for n in names if users.count(id(fit[n])) > 1]:
        raise ValueError(f"target {n}: another module reads its {part} as well, past an adapter")
    return {n: modules[n] for n in fit if any(n in names for names in hits.values())}
    # --- end of choose


def _check() -> None:
    model, x = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10)), torch.randn(5, 20)
    y, layers = model(x), add_bottleneck(model, BottleneckConfig(["0"], bottleneck_size=4))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * 30 + 4 + 30
    assert torch.equal(model(x), y), "W_up and b_up are zero, so nothing has changed yet"
    nn.init.ones_(layers["0"].up.bias)
    assert torch.allclose(model(x), model[1](layers["0"].base_layer(x) + 1))
    print("bottleneck.py: 274 trainable parameters, 2 r d + r + d a layer")


if __name__ == "__main__":
    _check()
