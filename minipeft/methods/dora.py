"""DoRA: train the length of each row of a weight separately from its direction.

LoRA's update changes the lengths and the directions of W's rows together. DoRA writes a weight as
lengths m times directions, V / ‖V‖. It trains m, and changes the directions with a LoRA. At the
start m = ‖W‖ and B = 0, so the adapted model starts out identical to the base model.

Paper: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.

    V = W + s B A,   s = α / r, or α / √r with `use_rslora`    (1)  as in lora.py
    W' = m V / ‖V‖                                             (2)  equation 5 of the paper
    y = m / ‖V‖ · (W x + s B A dropout(x)) + b                 (3)  forward, without making W'

Shapes: W (out, in), A (r, in), B (out, r), m and ‖V‖ (out,), x (…, in), y (…, out). ‖V‖ has one
norm per row of V. (The paper's W is transposed, so there it is one per column.)
Trainable parameters: r · (in + out) + out, summed over the adapted layers.

No gradient flows through ‖V‖ (section 4.3), which saves memory. But each step computes all of V, so
DoRA is slower than LoRA. As in Hugging Face peft, its config is a LoraConfig. Difference from peft:
dropout acts on the input of A alone. In peft, x in (m / ‖V‖ - 1) W x has it too.

>>> layers = add_dora(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoraLinear(nn.Module):
    """A frozen linear layer with a LoRA on its directions and trained lengths, equation (3).

    base_layer: `nn.Linear`, or transformers' `Conv1D`, which stores W transposed.
    config: a LoraConfig (lora.py), or an object with the attributes that are read here.
    While merged, calling it in training mode with gradients raises RuntimeError.
    """

    def __init__(self, base_layer: nn.Module, config):
        super().__init__()
        w = matrix(base_layer)  # (out, in)
        self.base_layer, self.r = base_layer, config.r
        self.out_features, self.in_features = w.shape
        self.scaling = config.lora_alpha / (math.sqrt(self.r) if config.use_rslora else self.r)
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        self.lora_A = nn.Linear(self.in_features, self.r, bias=False)
        self.lora_B = nn.Linear(self.r, self.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        dtype = torch.promote_types(w.dtype, torch.float32)  # small steps need precision
        for factor in (self.lora_A, self.lora_B):
            factor.to(w.device, dtype)
        self.lora_magnitude_vector = nn.Parameter(w.detach().to(dtype).norm(dim=1))  # m
        self.register_buffer("merged_weight", None, persistent=False)  # W' while merged; not saved

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this layer is merged: call unmerge() to train, or model.eval()")
            return F.linear(x, self.merged_weight, self.bias)
        y = self.base_layer(x)  # (…, out)
        wx = y if self.bias is None else y - self.bias
        x = self.lora_dropout(x.to(self.lora_A.weight.dtype))  # (…, in)
        lora = self.lora_B(self.scaling * self.lora_A(x))
        ratio = self.ratio()
        return (y + (ratio - 1) * wx + ratio * lora).to(y.dtype)  # (3); at the start exactly y

    bias = property(lambda self: self.base_layer.bias)

    @property
    def weight(self) -> Tensor:
        """W', stored as W is, for code that reads a layer's weight instead of calling the layer."""
        return self.merged().t() if type(self.base_layer).__name__ == "Conv1D" else self.merged()

    def directions(self) -> Tensor:
        """V = W + s B A, (out, in)."""
        return matrix(self.base_layer) + self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    def ratio(self) -> Tensor:
        """m / ‖V‖, (out,)."""
        norm = self.directions().detach().norm(dim=1)  # counts as a constant
        return self.lora_magnitude_vector / norm.clamp(min=1e-12)  # a row of zeros stays 0

    def merged(self) -> Tensor:
        """The merged weight W', (out, in), in the dtype of W."""
        v = self.directions()
        return (self.ratio()[:, None] * v).to(matrix(self.base_layer).dtype)  # (2)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute W' and store it: `forward` uses it until unmerge(). W, A, B and m stay."""
        self.merged_weight = self.merged().contiguous()

    def unmerge(self) -> None:
        """Discard W'. Outputs are again exactly those before merging."""
        self.merged_weight = None


def add_dora(model: nn.Module, config) -> dict[str, DoraLinear]:
    """Freeze the model, replace each target with a DoraLinear, and return the new layers by name.
    Targets are the linear layers whose name, or the end of it ("mlp.c_proj"), is in the list."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model already has an adapter: remove it before adding another")
    names = config.target_modules
    ends = tuple(f".{name}" for name in names) if isinstance(names, list) else ()
    layers = {
        name: DoraLinear(layer, config)
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


if __name__ == "__main__":  # double the length of every row: W changes at full rank
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30, bias=False))
    goal = 2 * model[0].weight.detach()
    lora = {"r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "use_rslora": False}
    (layer,) = add_dora(model, SimpleNamespace(target_modules=["0"], **lora)).values()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(300):
        x = torch.randn(64, 20)
        F.mse_loss(model(x), x @ goal.T).backward()
        optimizer.step()
        optimizer.zero_grad()
    error = (layer.merged() - goal).norm() / goal.norm()
    assert error < 1e-2, "m must double"
    print(f"dora.py: 30 lengths and a LoRA of rank 1 doubled a 30 x 20 weight, error {error:.1e}")
