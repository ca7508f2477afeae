r"""BitFit: train only the biases.

A layer has one bias per output and hundreds of weights. BitFit freezes everything except the
biases. That teaches a model little that is new, but it can bring out what the model already knows,
and the adapted model is exactly as fast as before.

Paper: Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models", arXiv 2106.10199.

    y = W x + b',    b' = b + Δb                                         (1)  section 3

Shapes: b and Δb (out,), x (…, in), y (…, out).
Trainable parameters: out, summed over the adapted layers.

Difference from the paper: Δb is trained, starting at 0, and b is never written to, so the base can
be restored exactly. peft has no BitFit; the keys of our files are `base_model.model.<layer>.delta`.

>>> layers = add_bitfit(model, BitFitConfig())
"""

import copy
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class BitFitConfig:
    """Which biases to train."""

    target_modules: list[str] | str | None = None  # names or endings, a regex, "all-linear";
    # None: every layer that has a bias
    task_type: str | None = None  # as in peft, for example "CAUSAL_LM"
    inference_mode: bool = False  # load the adapter frozen
    peft_type: str = field(default="BITFIT", init=False)


class BitFitLayer(nn.Module):
    """A frozen layer with a trainable change of its bias, equation (1).

    base_layer: any layer with a parameter `bias` and one input. Raises RuntimeError when trained
    while merged.
    """

    def __init__(self, base_layer: nn.Module, config: BitFitConfig):
        super().__init__()
        self.base_layer, b = base_layer, base_layer.bias
        dtype = torch.promote_types(b.dtype, torch.float32)  # float32 even for a half base
        self.delta = nn.Parameter(torch.zeros_like(b, dtype=dtype))  # Δb
        self.register_buffer("merged_bias", None, persistent=False)  # b' while merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_bias is not None and self.training and torch.is_grad_enabled():
            raise RuntimeError("this layer is merged: call unmerge() to train, or model.eval()")
        bias = self.new_bias() if self.merged_bias is None else self.merged_bias
        layer = copy.copy(self.base_layer)  # shares everything else; the base is not touched
        layer._parameters = layer._parameters | {"bias": bias}
        return layer(x)  # (1)

    bias = property(lambda self: self.new_bias())  # b', for code that reads it

    def __getattr__(self, name: str):
        """Everything else that the layer has: its weight, its sizes, and so on."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def new_bias(self) -> Tensor:
        """b' = b + Δb, (out,), in the dtype of b."""
        b = self.base_layer.bias
        return (b + self.delta).to(b.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Store b'; from now on `forward` uses it. b does not change."""
        self.merged_bias = self.new_bias()

    def unmerge(self) -> None:
        """Discard b'."""
        self.merged_bias = None


def add_bitfit(model: nn.Module, config: BitFitConfig) -> dict[str, BitFitLayer]:
    """Freeze the model and replace each target with a BitFitLayer. Return the new layers by name.

    Raises ValueError if no layer with a bias matches `config.target_modules`.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model already has an adapter: remove it before adding another")
    targets = {n: m for n, m in model.named_modules() if is_target(model, n, config.target_modules)}
    if not targets:
        raise ValueError(f"target_modules={config.target_modules!r} matches no layer with a bias")
    model.requires_grad_(False)
    layers = {name: BitFitLayer(layer, config) for name, layer in targets.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.training))
    return layers


def is_target(model: nn.Module, name: str, targets: list[str] | str | None) -> bool:
    """Whether this module has a bias of its own, and is named by `targets`."""
    module = model.get_submodule(name)
    if list(module.children()) or not isinstance(getattr(module, "bias", None), nn.Parameter):
        return False
    if targets == "all-linear":  # every linear layer except the output head
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        return linear and module is not getattr(model, "get_output_embeddings", lambda: None)()
    if targets is None or isinstance(targets, str):
        return targets is None or re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{ending}") for ending in targets)


if __name__ == "__main__":  # recover a shifted bias
    torch.manual_seed(0)
    model, shift = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30)), torch.randn(30)
    x = torch.randn(64, 20)
    target = model(x).detach() + shift
    layers = add_bitfit(model, BitFitConfig(["1"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(300):
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    error = (layers["1"].delta - shift).norm() / shift.norm()
    assert error < 1e-2
    print(f"bitfit.py: 30 parameters recovered a shift of 30 biases, error {error:.1e}")
