r"""Bottleneck adapters: a small network after the layers that end attention and MLP.

The adapter maps a layer's output down to r numbers, applies a nonlinearity, maps it back up and
adds the result, before the sum with the residual stream. Only the adapter is trained. It is not
linear, so it cannot be merged into a weight.

Paper: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751.

    y = h + W_up f(W_down h + b_down) + b_up,    h = W x + b             (1)  section 2.1

Shapes: W_down (r, d), b_down (r,), W_up (d, r), b_up (d,), h and y (…, d), x (…, in).
Trainable parameters: 2 r d + r + d, summed over the adapted layers.

Differences from the paper: W_up and b_up start at 0, so training begins exactly at the base model;
norms stay frozen. peft has no such method; the keys of our files are
`base_model.model.<layer>.down.weight` and so on.

>>> layers = add_bottleneck(model, BottleneckConfig(["attn.c_proj", "mlp.c_proj"]))
"""

import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class BottleneckConfig:
    """After which layers to put adapters, and how wide they are."""

    target_modules: list[str] | str | None = None  # a list of names or endings of names, a
    # regex for the full name, or "all-linear"
    bottleneck_size: int = 16  # r
    non_linearity: str = "gelu"  # f: "gelu" or "relu"
    task_type: str | None = None  # as in peft, for example "CAUSAL_LM"
    inference_mode: bool = False  # load the adapter frozen
    peft_type: str = field(default="BOTTLENECK", init=False)

    def __post_init__(self):
        r = self.bottleneck_size
        if type(r) is not int or r < 1:
            raise ValueError(f"bottleneck_size must be a positive integer, got {r!r}")
        if self.non_linearity not in ("gelu", "relu"):
            raise ValueError(f"non_linearity must be gelu or relu, got {self.non_linearity!r}")


class BottleneckLayer(nn.Module):
    """A frozen linear layer followed by a trainable bottleneck, equation (1)."""

    def __init__(self, base_layer: nn.Module, config: BottleneckConfig):
        super().__init__()
        self.base_layer, w, r = base_layer, base_layer.weight, config.bottleneck_size
        transposed = type(base_layer).__name__ == "Conv1D"  # transformers'; its weight is (in, out)
        self.out_features, self.in_features = reversed(w.shape) if transposed else w.shape
        self.f = getattr(F, config.non_linearity)
        self.down, self.up = nn.Linear(self.out_features, r), nn.Linear(r, self.out_features)
        for layer in (self.down, self.up):  # at least float32: small steps need precision
            layer.to(w.device, torch.promote_types(w.dtype, torch.float32))
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base_layer(x)  # (…, d)
        return h + self.up(self.f(self.down(h.to(self.down.weight.dtype)))).to(h.dtype)  # (1)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)


def add_bottleneck(model: nn.Module, config: BottleneckConfig) -> dict[str, BottleneckLayer]:
    """Freeze the model and replace each target with a BottleneckLayer. Return them by name.

    Raises ValueError if no linear layer matches `config.target_modules`.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model already has an adapter: remove it before adding another")
    layers = {
        name: BottleneckLayer(layer, config)
        for name, layer in model.named_modules()
        if is_target(model, name, config.target_modules)
    }
    if not layers:
        raise ValueError(f"target_modules={config.target_modules!r} matches no linear layer")
    model.requires_grad_(False)  # the new layers, which stay trainable, are not in it yet
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.training))
    return layers


def is_target(model: nn.Module, name: str, targets: list[str] | str | None) -> bool:
    """Whether this module is a linear layer and `targets` selects it."""
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear) and type(layer).__name__ != "Conv1D":
        return False
    if targets == "all-linear":  # every linear layer except the output head
        return layer is not getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{ending}") for ending in targets or [])


if __name__ == "__main__":  # learn |x| on top of a frozen identity, which no bias or LoRA could
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(256, 4)
    nn.init.eye_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    add_bottleneck(model, BottleneckConfig(["0"], bottleneck_size=8, non_linearity="relu"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(500):
        loss = F.mse_loss(model(x), x.abs())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    error, before = loss.item(), F.mse_loss(x, x.abs()).item()
    assert error < 0.05 * before
    print(f"bottleneck.py: the adapter turned x into |x|, error {error:.4f}, {before:.2f} before")
