r"""BitFit: train the biases alone.

A layer has one bias an output, and hundreds of weights. BitFit freezes all but the biases, which
teach a model little that is new but can bring out what it knows, and cost no more than before.
Paper: Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models", arXiv 2106.10199.

    y = W x + b',    b' = b + Δb                                         (1)  section 3

Shapes: b and Δb (out,), x (…, in), y (…, out). Trainable parameters: out, summed over the layers.
Where we differ. From the paper: Δb is trained, from 0, and b never written to, so that the base
comes back to the bit. From peft: it has no BitFit; our file's keys are `base_model.model.….delta`.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class BitFitConfig:
    """Whose biases to train."""

    target_modules: list[str] | str | None = None  # names, endings or a regex; None: all with one
    task_type: str | None = None
    inference_mode: bool = False  # True: the adapter is frozen as well
    peft_type: str = field(default="BITFIT", init=False)


class BitFitLayer(nn.Module):
    """A layer with a change of its bias, equation (1): a linear one, a LayerNorm, or any other."""

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)
    in_features = property(lambda self: self.base_layer.in_features)  # where the base has them
    out_features = property(lambda self: self.base_layer.out_features)
    changed_bias = property(lambda self: (self.bias + self.delta).to(self.bias.dtype))  # b', (out,)

    def __init__(self, base_layer: nn.Module, trainable: bool = True):
        super().__init__()
        self.base_layer, b = base_layer, base_layer.bias
        zeros = torch.zeros_like(b, dtype=torch.promote_types(b.dtype, torch.float32))
        self.delta = nn.Parameter(zeros, trainable)  # Δb, (out,)
        self.register_buffer("merged_bias", None, persistent=False)  # b', while merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_bias is not None and self.training and torch.is_grad_enabled():
            raise RuntimeError("this layer is merged: unmerge it before training")
        bias = self.changed_bias if self.merged_bias is None else self.merged_bias
        return torch.func.functional_call(self.base_layer, {"bias": bias}, (x,))  # base, with b'

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with b' from now on. b itself stays untouched."""
        self.merged_bias = self.changed_bias

    def unmerge(self) -> None:
        """Drop b'. The layer is what it was, to the bit."""
        self.merged_bias = None

    @torch.no_grad()
    def merge_into_base(self) -> nn.Module:
        """Write b' into the base layer and return it. Not reversible."""
        self.bias.copy_(self.changed_bias)
        return self.base_layer


def bitfit_layers(model: nn.Module, config: BitFitConfig) -> dict[str, BitFitLayer]:
    """A BitFitLayer for each target, by name. The model is not changed. Raises as `choose` does."""
    targets = choose(model, ".*" if (t := config.target_modules) is None else t, "bias")
    return {name: BitFitLayer(m, not config.inference_mode) for name, m in targets.items()}


def add_bitfit(model: nn.Module, config: BitFitConfig) -> dict[str, BitFitLayer]:
    """Freeze the model and put a BitFitLayer in the place of each target. Returns them by name."""
    layers = bitfit_layers(model, config)
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
    model, x = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30)).eval(), torch.randn(5, 20)
    y, layers = model(x), add_bitfit(model, BitFitConfig())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 30 + 30
    assert torch.equal(model(x), y), "Δb is zero, so nothing has changed yet"
    nn.init.ones_(layers["1"].delta)
    for change in (layers["1"].merge, layers["1"].unmerge, layers["1"].merge_into_base):
        assert torch.allclose(model(x), y + 1)
        change()
    print("bitfit.py: 60 trainable parameters, one a bias; merging changes nothing")


if __name__ == "__main__":
    _check()
