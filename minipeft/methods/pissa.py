"""PiSSA: start LoRA's factors at the largest singular directions of the weight.

LoRA starts with an update of zero. PiSSA splits W instead: the part with its r largest singular
values becomes B₀ and A₀, and the rest is frozen. So the first steps already change the main part
of W. The two parts add up to W: without dropout, the model starts out identical to the base.

Paper: Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
Language Models", arXiv 2404.02948.

    W = U S Vᵀ,   B₀ = U_r √(S_r / s),   A₀ = √(S_r / s) V_rᵀ  (1)  equations 2 and 3
    W_res = W - s B₀ A₀                                        (2)  what is left of W
    y = W_res x + s B A dropout(x) + b                         (3)  equation 5
      = W x + s (B A dropout(x) - B₀ A₀ x) + b                 (4)  the same; W stays as it is
    W' = W + s (B A - B₀ A₀)                                   (5)  merging

Shapes: W (out, in), A and A₀ (r, in), B and B₀ (out, r), x (…, in), y (…, out). U_r, S_r and V_r
belong to the r largest singular values. s = α / r, or α / √r with `use_rslora`.
Trainable parameters: r · (in + out), summed over the adapted layers.

Difference from Hugging Face peft, which writes W_res into the model: we compute (4), and W stays as
it is. A₀ and B₀ are not saved: they are computed from W. `as_lora` gives a LoRA with rank 2 r and
the same s (so with 2 α, or √2 α with `use_rslora`). Its factors are [B, -B₀] and [A; A₀].

>>> layers = add_pissa(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PissaLinear(nn.Module):
    """A frozen linear layer with a LoRA that starts at its largest singular directions, (4).

    base_layer: `nn.Linear`, or transformers' `Conv1D`, which stores W transposed.
    config: a LoraConfig (lora.py), or an object with the attributes that are read here.
    Raises ValueError if r is larger than a side of W, RuntimeError if it is trained while merged.
    """

    def __init__(self, base_layer: nn.Module, config):
        super().__init__()
        w = matrix(base_layer)  # (out, in)
        self.base_layer, self.r = base_layer, config.r
        self.out_features, self.in_features = w.shape
        if config.r > min(w.shape):
            raise ValueError(f"a weight of {tuple(w.shape)} has no {config.r} singular values")
        self.scaling = config.lora_alpha / (math.sqrt(self.r) if config.use_rslora else self.r)
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        self.lora_A = nn.Linear(self.in_features, self.r, bias=False)
        self.lora_B = nn.Linear(self.r, self.out_features, bias=False)
        wide = w.detach().to(torch.promote_types(w.dtype, torch.float32))
        u, values, vh = torch.linalg.svd(wide, full_matrices=False)
        root = (values[: self.r] / self.scaling).sqrt()  # (r,)
        self.lora_A.weight = nn.Parameter(root[:, None] * vh[: self.r])  # (1)
        self.lora_B.weight = nn.Parameter(u[:, : self.r] * root)
        self.register_buffer("start_A", self.lora_A.weight.detach().clone(), persistent=False)
        self.register_buffer("start_B", self.lora_B.weight.detach().clone(), persistent=False)
        self.register_buffer("merged_weight", None, persistent=False)  # W' while merged; not saved

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this layer is merged: call unmerge() to train, or model.eval()")
            return F.linear(x, self.merged_weight, self.bias)
        y = self.base_layer(x)  # (…, out)
        x = x.to(self.lora_A.weight.dtype)
        start = F.linear(F.linear(x, self.start_A), self.start_B)  # B₀ A₀ x
        trained = self.lora_B(self.lora_A(self.lora_dropout(x)))  # B A dropout(x)
        return (y + self.scaling * (trained - start)).to(y.dtype)  # (4)

    bias = property(lambda self: self.base_layer.bias)

    @property
    def weight(self) -> Tensor:
        """W', stored as W is, for code that reads a layer's weight instead of calling the layer."""
        return self.merged().t() if type(self.base_layer).__name__ == "Conv1D" else self.merged()

    def as_lora(self) -> tuple[Tensor, Tensor]:
        """The factors of an ordinary LoRA of rank 2 r and the same s: (2 r, in) and (out, 2 r)."""
        a = torch.cat([self.lora_A.weight, self.start_A])
        return a, torch.cat([self.lora_B.weight, -self.start_B], dim=1)

    def merged(self) -> Tensor:
        """The merged weight W', (out, in), in the dtype of W."""
        w, (a, b) = matrix(self.base_layer), self.as_lora()
        return (w + self.scaling * (b @ a)).to(w.dtype)  # (5)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute W' and store it: `forward` uses it until unmerge(). W, A and B do not change."""
        self.merged_weight = self.merged().contiguous()

    def unmerge(self) -> None:
        """Discard W'. Outputs are again exactly those before merging."""
        self.merged_weight = None


def add_pissa(model: nn.Module, config) -> dict[str, PissaLinear]:
    """Freeze the model, replace each target with a PissaLinear, and return the new layers by name.
    Targets are the linear layers whose name, or the end of it ("mlp.c_proj"), is in the list."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model already has an adapter: remove it before adding another")
    names = config.target_modules
    ends = tuple(f".{name}" for name in names) if isinstance(names, list) else ()
    layers = {
        name: PissaLinear(layer, config)
        for name, layer in model.named_modules()
        if f".{name}".endswith(ends) and type(layer).__name__ in ("Linear", "Conv1D")
    }
    if not layers:
        raise ValueError(f"target_modules must be a list that names linear layers, got {names!r}")
    model.requires_grad_(False)  # the new layers stay trainable: they are not in the model yet
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.training))
    return layers


def matrix(layer: nn.Module) -> Tensor:
    """The weight as (out, in); a view, not a copy. transformers' `Conv1D` stores (in, out)."""
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


if __name__ == "__main__":  # double the two largest singular values
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 30, bias=False)), torch.randn(64, 20)
    lora = {"r": 2, "lora_alpha": 2, "lora_dropout": 0.0, "use_rslora": False}
    (layer,) = add_pissa(model, SimpleNamespace(target_modules=["0"], **lora)).values()
    change = layer.scaling * layer.start_B @ layer.start_A
    goal = layer.base_layer.weight + change
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(300):
        F.mse_loss(model(x), x @ goal.T).backward()
        optimizer.step()
        optimizer.zero_grad()
    error = (layer.merged() - goal).norm() / change.norm()
    assert error < 1e-3
    print(f"pissa.py: rank 2 doubled the two largest singular values, error {error:.1e}")
