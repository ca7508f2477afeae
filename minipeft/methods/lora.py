r"""LoRA: learn the update of a weight as the product of two low-rank factors.

Fine-tuning turns a weight W into W + ΔW. LoRA freezes W and writes ΔW as B A, where A maps the
input down to r numbers and B maps them back up. A starts random and B starts at zero, so training
begins exactly at the base model. Only A and B are trained. After training, B A can be added to W:
the merged layer is as fast as the original, and the whole adaptation fits into a small file.

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    y = W x + b + s B A dropout(x)        s = α / r            (1)  section 4.1
    s = α / √r  with `use_rslora`                              (2)  arXiv 2312.03732
    W' = W + s B A                                             (3)  merging

Shapes: W (out, in), A (r, in), B (out, r), x (…, in), y (…, out); r is the rank.
Trainable parameters: r (in + out), summed over the adapted layers.

Differences from the paper: A is drawn as in Hugging Face peft (Kaiming uniform), not from a
Gaussian. Differences from peft: a layer holds one adapter; merging stores W' as a separate tensor
and never writes into W, so unmerging is exact; `target_modules` has no default.

>>> layers = add_lora(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
>>> # train the parameters that require a gradient, then:
>>> merge_lora(layers)
"""

import math
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class LoraConfig:
    """Which layers to adapt, and how. Fields and defaults are peft's."""

    r: int = 8  # the rank
    lora_alpha: float = 8  # α: the update is scaled by α / r
    lora_dropout: float = 0.0  # applied to the adapter's input during training
    target_modules: list[str] | str | None = None  # names or endings, a regex, or "all-linear"
    use_rslora: bool = False  # scale by α / √r instead, equation (2)
    trainable_token_indices: list[int] | None = None  # handled by get_peft_model, not by add_lora
    task_type: str | None = None  # as in peft, for example "CAUSAL_LM"
    inference_mode: bool = False  # load the adapter frozen
    peft_type: str = field(default="LORA", init=False)

    def __post_init__(self):
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r must be a positive integer, got {self.r!r}")
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha must be a positive number, got {self.lora_alpha!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update, equation (1).

    base_layer: `nn.Linear`, or transformers' `Conv1D`, which stores W transposed.
    Maps x (…, in) to y (…, out). Raises RuntimeError when trained while merged.
    """

    def __init__(self, base_layer: nn.Module, config: LoraConfig):
        super().__init__()
        w, self.r = matrix(base_layer), config.r
        self.base_layer = base_layer
        self.out_features, self.in_features = w.shape
        root = math.sqrt(self.r)
        self.scaling = config.lora_alpha / (root if config.use_rslora else self.r)  # s, eq. (2)
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        self.lora_A = nn.Linear(self.in_features, self.r, bias=False)
        self.lora_B = nn.Linear(self.r, self.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        for factor in (self.lora_A, self.lora_B):  # float32 even if the base is in half precision
            factor.to(w.device, torch.promote_types(w.dtype, torch.float32))
        self.register_buffer("merged_weight", None, persistent=False)  # W' (out, in) while merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this layer is merged: call unmerge before training")
            return F.linear(x, self.merged_weight, self.bias)
        y = self.base_layer(x)  # (…, out)
        x = self.lora_dropout(x.to(self.lora_A.weight.dtype))  # (…, in)
        return (y + self.lora_B(self.scaling * self.lora_A(x))).to(y.dtype)  # (1)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def delta(self) -> Tensor:
        """The update s B A, (out, in)."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)  # (out, r) @ (r, in)

    def merged(self) -> Tensor:
        """W' (out, in), in the dtype of W."""
        w = matrix(self.base_layer)
        return (w + self.delta()).to(w.dtype)  # (3)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with W' from now on. W does not change."""
        self.merged_weight = self.merged().contiguous()

    def unmerge(self) -> None:
        """Discard W'. Outputs are again exactly those of W plus the adapter."""
        self.merged_weight = None

    @torch.no_grad()
    def merge_into_base(self) -> nn.Module:
        """Write W' into the base layer and return that layer. This cannot be undone."""
        matrix(self.base_layer).copy_(self.merged())
        return self.base_layer


def add_lora(model: nn.Module, config: LoraConfig) -> dict[str, LoraLinear]:
    """Freeze the model and replace each target by a LoraLinear. Returns the new layers by name.

    Raises ValueError if no linear layer matches `config.target_modules`.
    """
    if config.trainable_token_indices is not None:
        raise ValueError("trainable_token_indices needs get_peft_model; add_lora ignores it")
    targets = {n: m for n, m in model.named_modules() if is_target(model, n, config.target_modules)}
    if not targets:
        raise ValueError(f"target_modules={config.target_modules!r} matches no linear layer")
    model.requires_grad_(False)
    layers = {name: LoraLinear(layer, config) for name, layer in targets.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.training))
    return layers


def remove_lora(model: nn.Module, layers: dict[str, LoraLinear]) -> None:
    """Put the original layers back. The model computes exactly what the base computes."""
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)


def merge_lora(layers: dict[str, LoraLinear]) -> None:
    """Merge every layer. May be repeated; no weight changes."""
    for layer in layers.values():
        layer.merge()


def unmerge_lora(layers: dict[str, LoraLinear]) -> None:
    """Unmerge every layer."""
    for layer in layers.values():
        layer.unmerge()


def is_target(model: nn.Module, name: str, targets: list[str] | str | None) -> bool:
    """Whether this module is linear, and named by `targets`."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
        return False
    if targets == "all-linear":  # every linear layer except the output head
        return module is not getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{ending}") for ending in targets or [])


def matrix(layer: nn.Module) -> Tensor:
    """The weight as (out, in). A `Conv1D` stores (in, out); only its class name tells."""
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


if __name__ == "__main__":  # recover a rank-2 change of a weight
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30, bias=False))
    w = model[0].weight.clone()
    change = torch.randn(30, 2) @ torch.randn(2, 20)
    layers = add_lora(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.05)
    for _ in range(500):
        x = torch.randn(64, 20)
        loss = F.mse_loss(model(x), x @ (w + change).T)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    error = (layers["0"].delta() - change).norm() / change.norm()
    assert error < 1e-2
    assert torch.equal(layers["0"].weight, w), "the base weight must not move"
    n = sum(p.numel() for p in trainable)
    print(f"lora.py: {n} parameters recovered a 30 x 20 change of rank 2, error {error:.1e}")
