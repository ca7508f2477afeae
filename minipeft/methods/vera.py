"""VeRA: share one pair of random matrices between all layers, and train only two vectors per layer.

LoRA trains A and B in each layer. VeRA draws A and B once, at random, freezes them, and uses them
in every layer: a layer uses as many columns of A as it has inputs, and as many rows of B as it has
outputs. What is trained are two vectors: d multiplies the r numbers between A and B, and b the
outputs. b starts at zero, so the adapted model starts out identical to the base model. Since
nothing but vectors is trained, r is usually much larger than in LoRA.

Paper: Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454.

    y = W x + c + b · B (d · A dropout(x))                     (1)  equation 2 of the paper
    W' = W + diag(b) B diag(d) A                               (2)  merging

Shapes: W (out, in), its bias c (out,), A (r, in), B (out, r), d (r,), b (out,), x (…, in),
y (…, out).
Trainable parameters: r + out, summed over the adapted layers.

A and B come from a generator with a seed of its own, `projection_prng_key`, and are the numbers of
Hugging Face peft. Difference from peft: a layer holds only one adapter.

>>> layers = add_vera(model, VeraConfig(r=256, target_modules="all-linear"))
"""

import math
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class VeraConfig:
    """Which layers to adapt, and how. Names and defaults are those of peft's VeraConfig."""

    r: int = 256  # the rank
    target_modules: list[str] | str | None = None  # a list of names or endings of names, a
    # regex for the full name, or "all-linear"
    projection_prng_key: int = 0  # the seed of A and B
    save_projection: bool = True  # save A and B too, and not only the vectors
    vera_dropout: float = 0.0  # applied to the adapter's input during training
    d_initial: float = 0.1  # d starts as this number
    task_type: str | None = None  # for example "CAUSAL_LM"
    inference_mode: bool = False  # load the adapter frozen
    peft_type: str = field(default="VERA", init=False)

    def __post_init__(self):
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"r must be a positive integer, got {self.r!r}")
        if not 0 <= self.vera_dropout < 1:
            raise ValueError(f"vera_dropout must be in [0, 1), got {self.vera_dropout!r}")


class Projections(nn.Module):
    """A and B for the largest of these layers. They are one module, so that they move to a device
    once and not once per layer."""

    def __init__(self, layers: list[nn.Module], config: VeraConfig):
        super().__init__()
        outs, ins = zip(*(matrix(layer).shape for layer in layers), strict=True)
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        w = matrix(layers[0])
        where = {"device": w.device, "dtype": torch.promote_types(w.dtype, torch.float32)}
        for name, *shape in (("vera_A", config.r, max(ins)), ("vera_B", max(outs), config.r)):
            bound = math.sqrt(6 / shape[1])  # Kaiming uniform
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn.to(**where), persistent=False)


class VeraLinear(nn.Module):
    """A frozen linear layer plus an update with shared random matrices, equation (1).

    base_layer: `nn.Linear`, or transformers' `Conv1D`, which stores W transposed.
    """

    def __init__(self, base_layer: nn.Module, config: VeraConfig, projections: Projections):
        super().__init__()
        w = matrix(base_layer)  # (out, in)
        self.base_layer, self.projections = base_layer, projections
        self.out_features, self.in_features = w.shape
        self.vera_dropout = nn.Dropout(config.vera_dropout)
        like = projections.vera_A  # float32 even for a half base
        self.vera_lambda_d = nn.Parameter(like.new_full((config.r,), config.d_initial))  # d
        self.vera_lambda_b = nn.Parameter(like.new_zeros(self.out_features))  # b
        self.register_buffer("merged_weight", None, persistent=False)  # W' while merged; not saved

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this layer is merged: call unmerge() to train, or model.eval()")
            return F.linear(x, self.merged_weight, self.bias)
        a, b = self.shared()
        y = self.base_layer(x)  # (…, out)
        h = self.vera_lambda_d * F.linear(self.vera_dropout(x.to(a.dtype)), a)  # (…, r)
        return (y + self.vera_lambda_b * F.linear(h, b)).to(y.dtype)  # (1)

    bias = property(lambda self: self.base_layer.bias)

    @property
    def weight(self) -> Tensor:
        """W', stored as W is, for code that reads a layer's weight instead of calling the layer."""
        return self.merged().t() if type(self.base_layer).__name__ == "Conv1D" else self.merged()

    def shared(self) -> tuple[Tensor, Tensor]:
        """This layer's part of A, (r, in), and of B, (out, r)."""
        p = self.projections
        return p.vera_A[:, : self.in_features], p.vera_B[: self.out_features]

    def merged(self) -> Tensor:
        """The merged weight W', (out, in), in the dtype of W."""
        w, (a, b) = matrix(self.base_layer), self.shared()
        update = (self.vera_lambda_b[:, None] * b) @ (self.vera_lambda_d[:, None] * a)
        return (w + update).to(w.dtype)  # (2)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute W' and store it; from now on `forward` uses it. W does not change."""
        self.merged_weight = self.merged().contiguous()

    def unmerge(self) -> None:
        """Discard W'. Outputs are again exactly those before merging."""
        self.merged_weight = None

    @torch.no_grad()
    def merge_into_base(self) -> nn.Module:
        """Overwrite W with W' for good. Return the base layer, to be used in place of this one."""
        matrix(self.base_layer).copy_(self.merged())
        return self.base_layer


def vera_layers(targets: dict[str, nn.Module], config: VeraConfig) -> dict[str, VeraLinear]:
    """A VeraLinear for each layer; all of them share A and B."""
    projections = Projections(list(targets.values()), config)
    return {name: VeraLinear(layer, config, projections) for name, layer in targets.items()}


def add_vera(model: nn.Module, config: VeraConfig) -> dict[str, VeraLinear]:
    """Freeze the model and replace each target with a VeraLinear. Return the new layers by name.

    Raises ValueError if no linear layer matches `config.target_modules`.
    """
    if any(hasattr(m, "base_layer") for m in model.modules()):
        raise ValueError("the model already has an adapter: remove it before adding another")
    targets = find_targets(model, config.target_modules)
    if not targets:
        raise ValueError(f"target_modules={config.target_modules!r} matches no linear layer")
    layers = vera_layers(targets, config)
    model.requires_grad_(False)  # the new layers, which stay trainable, are not in it yet
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.training))
    return layers


def find_targets(model: nn.Module, targets: list[str] | str | None) -> dict[str, nn.Module]:
    """The linear layers that `targets` selects, by name."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = {}
    for name, layer in model.named_modules():
        if isinstance(targets, str):  # "all-linear" is all but the output head
            chosen = layer is not head if targets == "all-linear" else re.fullmatch(targets, name)
        else:
            chosen = any(f".{name}".endswith(f".{ending}") for ending in targets or [])
        if chosen and (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"):
            found[name] = layer
    return found


def matrix(layer: nn.Module) -> Tensor:
    """The weight as (out, in); a view, not a copy. transformers' `Conv1D` stores (in, out)."""
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


if __name__ == "__main__":  # recover an update that was made with the same random matrices
    torch.manual_seed(0)
    model, config = nn.Sequential(nn.Linear(20, 30)), VeraConfig(r=16, target_modules=["0"])
    x, goal = torch.randn(256, 20), vera_layers({"0": model[0]}, config)["0"]
    nn.init.normal_(goal.vera_lambda_b)
    target = goal(x).detach()
    (layer,) = add_vera(model, config).values()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(500):
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    error = (layer.merged() - goal.merged()).norm() / (
        goal.merged() - model[0].base_layer.weight
    ).norm()
    assert error < 0.01
    print(f"vera.py: 46 parameters recovered a change of 600, error {error:.1e}")
