"""VeRA: share one pair of random matrices between all layers, and train two vectors per layer.

VeRA draws A and B once, at random, and freezes them. Their sizes are the largest in and out of all
layers: each layer uses the first columns of A and rows of B. It trains two vectors: d scales the r
numbers between A and B, and b the outputs of B. b starts at 0, so the model starts out unchanged.

Paper: Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454.

    y = W x + c + b · B (d · A dropout(x))                     (1)  equation 2 of the paper
    W' = W + diag(b) B diag(d) A                               (2)  merging

Shapes: W (out, in), A (r, in), B (out, r), d (r,), b and the bias c (out,), x (…, in), y (…, out).
Trainable parameters: r + out, summed over the adapted layers.

>>> layers = add_vera(model, VeraConfig(r=256, target_modules=["q_proj", "v_proj"]))
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class VeraConfig:
    """Which layers to adapt, and how. Names and defaults are those of peft's VeraConfig."""

    r: int = 256  # the rank, usually much larger than LoRA's
    target_modules: list[str] | str | None = None  # add_vera: a list; get_peft_model: also a string
    projection_prng_key: int = 0  # the seed of A and B; peft draws the same numbers
    save_projection: bool = True  # with get_peft_model: save A and B too, not only the vectors
    vera_dropout: float = 0.0  # applied to the adapter's input during training
    d_initial: float = 0.1  # d starts as this number
    task_type: str | None = None  # for example "CAUSAL_LM"
    inference_mode: bool = False  # with get_peft_model: load the adapter frozen
    peft_type: str = field(default="VERA", init=False)


class Projections(nn.Module):
    """A and B for the largest in and out of these layers, in one module that they all share."""

    def __init__(self, layers: list[nn.Module], config: VeraConfig):
        super().__init__()
        if type(config.r) is not int or config.r < 1 or config.vera_dropout >= 1:
            raise ValueError(f"r must be a positive integer, and vera_dropout below 1, in {config}")
        outs, ins = zip(*(matrix(layer).shape for layer in layers), strict=True)
        w, generator = layers[0].weight, torch.Generator().manual_seed(config.projection_prng_key)
        A = nn.init.kaiming_uniform_(torch.empty(config.r, max(ins)), generator=generator)
        B = nn.init.kaiming_uniform_(torch.empty(max(outs), config.r), generator=generator)
        self.vera_A, self.vera_B = nn.Buffer(A, persistent=False), nn.Buffer(B, persistent=False)
        self.to(w.device, torch.promote_types(w.dtype, torch.float32))  # float32 even for half W


class VeraLinear(nn.Module):
    """A frozen `nn.Linear`, or `Conv1D` of transformers, plus an update from A and B, (1)."""

    def __init__(self, base_layer: nn.Module, config: VeraConfig, pair: Projections):
        super().__init__()
        self.base_layer, self.projections = base_layer, pair
        self.transposed = type(base_layer).__name__ == "Conv1D"
        self.out_features, self.in_features = matrix(base_layer).shape
        self.vera_dropout = nn.Dropout(config.vera_dropout)
        self.vera_lambda_d = nn.Parameter(pair.vera_A.new_full((config.r,), config.d_initial))
        self.vera_lambda_b = nn.Parameter(pair.vera_A.new_zeros(self.out_features))  # A's dtype
        self.register_buffer("merged_weight", None, persistent=False)  # W' while merged; not saved

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this layer is merged: call unmerge() to train, or model.eval()")
            return F.linear(x, self.merged_weight, self.bias)
        y, (A, B) = self.base_layer(x), self.shared()  # y (…, out)
        h = self.vera_lambda_d * F.linear(self.vera_dropout(x.to(A.dtype)), A)  # (…, r)
        return (y + self.vera_lambda_b * F.linear(h, B)).to(y.dtype)  # (1)

    bias = property(lambda self: self.base_layer.bias)
    weight = property(lambda self: self.merged().t() if self.transposed else self.merged())  # W'

    def shared(self) -> tuple[Tensor, Tensor]:
        """This layer's part of A, (r, in), and of B, (out, r)."""
        p = self.projections
        return p.vera_A[:, : self.in_features], p.vera_B[: self.out_features]

    def merged(self) -> Tensor:
        """The merged weight W', (out, in), in the dtype of W."""
        w, (A, B) = matrix(self.base_layer), self.shared()
        update = (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)
        return (w + update).to(w.dtype)  # (2)

    def merge(self) -> None:
        """Compute W' and store it: `forward` uses it until unmerge(). W does not change."""
        self.merged_weight = self.merged().detach().contiguous()

    def unmerge(self) -> None:
        """Discard W'. Outputs are again exactly those before merging."""
        self.merged_weight = None


def add_vera(model: nn.Module, config: VeraConfig) -> dict[str, VeraLinear]:
    """Freeze the model, replace each target with a VeraLinear, and return the new layers by name.
    Targets are the linear layers whose name, or the end of it ("mlp.c_proj"), is in the list."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model already has an adapter: remove it before adding another")
    names = config.target_modules
    ends = tuple(f".{name}" for name in names) if isinstance(names, list) else ()
    targets = {
        name: layer
        for name, layer in model.named_modules()
        if f".{name}".endswith(ends) and type(layer).__name__ in ("Linear", "Conv1D")
    }
    if not targets:
        raise ValueError(f"target_modules must be a list that names linear layers, got {names!r}")
    projections = Projections(list(targets.values()), config)  # one pair, shared by all layers
    layers = {name: VeraLinear(layer, config, projections) for name, layer in targets.items()}
    model.requires_grad_(False)  # the new layers stay trainable: they are not in the model yet
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.training))
    return layers


def matrix(layer: nn.Module) -> Tensor:
    """The weight as (out, in); a view, not a copy. transformers' `Conv1D` stores (in, out)."""
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


if __name__ == "__main__":  # recover an update that was made with the same random matrices
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 30)), torch.randn(256, 20)
    (layer,) = add_vera(model, VeraConfig(r=16, target_modules=["0"])).values()
    w, (A, B) = layer.merged().detach(), layer.shared()
    goal = w + (torch.randn(30, 1) * B) @ (0.1 * A)  # another b, and d as it starts
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(500):
        F.mse_loss(model(x), F.linear(x, goal, layer.bias)).backward()
        optimizer.step()
        optimizer.zero_grad()
    error = (layer.merged() - goal).norm() / (goal - w).norm()
    assert error < 0.01
    print(f"vera.py: 46 parameters recovered a change of 600 weights, error {error:.1e}")
