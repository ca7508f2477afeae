"""LoRA: learn a low-rank update of a weight, as the product of two small matrices.

Fine-tuning turns a weight W into W + ΔW. LoRA freezes W and writes ΔW as s B A: A maps the input to
r numbers, and B maps these r numbers to the output. A starts random and B starts at zero, so the
adapted model starts out identical to the base model. Only A and B are trained and saved, so a
saved LoRA is small. After training, s B A can be added to W, and the layer is as fast as before.

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    y = W x + b + s B A dropout(x),   s = α / r                (1)  section 4.1 of the paper
    s = α / √r   with `use_rslora`                             (2)  rsLoRA, arXiv 2312.03732
    W' = W + s B A                                             (3)  merging

Shapes: W (out, in), A (r, in), B (out, r), x (…, in), y (…, out); r is the rank.
Trainable parameters: r · (in + out), summed over the adapted layers.

Difference from the paper: A is initialized as in Hugging Face peft (Kaiming uniform), not from a
Gaussian. Differences from peft: a layer holds only one adapter; `merge` keeps W and stores W' next
to it, which costs memory, but makes unmerging exact; `target_modules` must be given.

>>> layers = add_lora(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
>>> # train the parameters that require a gradient, then:
>>> model.eval()
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
    """Which layers to adapt, and how. Names and defaults are those of peft's LoraConfig."""

    r: int = 8  # the rank
    lora_alpha: float = 8  # α: the update is scaled by α / r
    lora_dropout: float = 0.0  # applied to the adapter's input during training
    target_modules: list[str] | str | None = None  # a list of names or endings of names, a
    # regex for the full name, or "all-linear"
    use_rslora: bool = False  # scale by α / √r instead
    # Only for get_peft_model and adapter_config.json; add_lora refuses the first three:
    use_dora: bool = False  # DoRA (dora.py)
    init_lora_weights: bool | str = True  # "pissa": PiSSA (pissa.py); True: B starts at zero
    trainable_token_indices: list[int] | None = None  # tokens whose embeddings are trained too
    bias: str = "none"  # biases stay frozen; bitfit.py trains them
    task_type: str | None = None  # for example "CAUSAL_LM"
    inference_mode: bool = False  # load the adapter frozen
    peft_type: str = field(default="LORA", init=False)

    def __post_init__(self):
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r must be a positive integer, got {self.r!r}")
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha must be a positive number, got {self.lora_alpha!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if self.init_lora_weights not in (True, "pissa"):
            raise ValueError(
                f"init_lora_weights must be True or 'pissa', got {self.init_lora_weights!r}"
            )
        if self.use_dora and self.init_lora_weights == "pissa":
            raise ValueError("use_dora and init_lora_weights='pissa' cannot be combined")
        if self.bias != "none":
            raise ValueError(f"bias must be 'none', got {self.bias!r}; BitFit trains biases")


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update, equation (1).

    base_layer: `nn.Linear`, or transformers' `Conv1D`, which stores W transposed. Maps x (…, in) to
    y (…, out). While merged, calling it in training mode with gradients raises RuntimeError.
    """

    def __init__(self, base_layer: nn.Module, config: LoraConfig):
        super().__init__()
        w = matrix(base_layer)  # (out, in)
        self.base_layer, self.r = base_layer, config.r
        self.out_features, self.in_features = w.shape
        divisor = math.sqrt(config.r) if config.use_rslora else config.r
        self.scaling = config.lora_alpha / divisor  # s, (1) or (2)
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        self.lora_A = nn.Linear(self.in_features, self.r, bias=False)
        self.lora_B = nn.Linear(self.r, self.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        for factor in (self.lora_A, self.lora_B):  # at least float32: small steps need precision
            factor.to(w.device, torch.promote_types(w.dtype, torch.float32))
        self.register_buffer("merged_weight", None, persistent=False)  # W' while merged; not saved

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this layer is merged: call unmerge() to train, or model.eval()")
            return F.linear(x, self.merged_weight, self.base_layer.bias)
        y = self.base_layer(x)  # (…, out)
        x = self.lora_dropout(x.to(self.lora_A.weight.dtype))  # (…, in)
        return (y + self.lora_B(self.scaling * self.lora_A(x))).to(y.dtype)  # (1)

    bias = property(lambda self: self.base_layer.bias)

    @property
    def weight(self) -> Tensor:
        """W', stored as W is, for code that reads a layer's weight instead of calling the layer."""
        return self.merged().t() if type(self.base_layer).__name__ == "Conv1D" else self.merged()

    def delta(self) -> Tensor:
        """The update s B A, (out, in)."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)  # (out, r) @ (r, in)

    def merged(self) -> Tensor:
        """The merged weight W', (out, in), in the dtype of W."""
        w = matrix(self.base_layer)
        return (w + self.delta()).to(w.dtype)  # (3): W + s B A

    @torch.no_grad()
    def merge(self) -> None:
        """Compute W' and store it; from now on `forward` uses it. W, A and B do not change."""
        self.merged_weight = self.merged().contiguous()

    def unmerge(self) -> None:
        """Discard W'. Outputs are again exactly those of W plus the adapter."""
        self.merged_weight = None


def add_lora(model: nn.Module, config: LoraConfig) -> dict[str, LoraLinear]:
    """Freeze the model and replace each target with a LoraLinear. Return the new layers by name.

    Raises ValueError if no linear layer matches `config.target_modules`, for a model that already
    has an adapter, and for use_dora, init_lora_weights and trainable_token_indices.
    """
    if config.use_dora or config.init_lora_weights == "pissa":
        raise ValueError("add_lora adds plain LoRA: use add_dora, add_pissa, or get_peft_model")
    if config.trainable_token_indices is not None:
        raise ValueError("add_lora does not support trainable_token_indices: use get_peft_model")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model already has an adapter: remove it before adding another")
    targets = find_targets(model, config.target_modules)
    if not targets:
        raise ValueError(f"target_modules={config.target_modules!r} matches no linear layer")
    model.requires_grad_(False)  # first freeze: the LoRA layers made next stay trainable
    layers = {name: LoraLinear(layer, config) for name, layer in targets.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.training))
    return layers


def remove_lora(model: nn.Module, layers: dict[str, LoraLinear]) -> None:
    """Put the original layers back. They have their original weights, and stay frozen."""
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)


def merge_lora(layers: dict[str, LoraLinear]) -> None:
    """Merge every layer. Merging twice is safe, because W is not modified."""
    for layer in layers.values():
        layer.merge()


def unmerge_lora(layers: dict[str, LoraLinear]) -> None:
    """Unmerge every layer."""
    for layer in layers.values():
        layer.unmerge()


def find_targets(model: nn.Module, targets: list[str] | str | None) -> dict[str, nn.Module]:
    """A dict from name to layer: the linear layers that `targets` selects."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    if targets == "all-linear":  # all but the output head, if the model declares one
        return {name: module for name, module in linear.items() if module is not head}
    if isinstance(targets, str):
        return {name: module for name, module in linear.items() if re.fullmatch(targets, name)}
    ends = tuple(f".{ending}" for ending in targets or [])  # "proj" must not match "q_proj"
    return {name: module for name, module in linear.items() if f".{name}".endswith(ends)}


def matrix(layer: nn.Module) -> Tensor:
    """The weight as (out, in); a view, not a copy. transformers' `Conv1D` stores (in, out)."""
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


if __name__ == "__main__":  # recover a rank-2 change of a weight
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30, bias=False))
    w = model[0].weight.detach().clone()
    change = torch.randn(30, 2) @ torch.randn(2, 20)
    (layer,) = add_lora(model, LoraConfig(r=2, lora_alpha=4, target_modules=["0"])).values()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.05)
    for _ in range(500):
        x = torch.randn(64, 20)
        loss = F.mse_loss(model(x), x @ (w + change).T)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    error = (layer.delta() - change).norm() / change.norm()
    assert error < 1e-4, "the update must equal the change"
    assert torch.equal(layer.base_layer.weight, w), "the base weight must not move"
    n = sum(p.numel() for p in trainable)
    print(f"lora.py: {n} parameters recovered a 30 x 20 change of rank 2, error {error:.1e}")
