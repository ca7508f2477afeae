"""(IA)³: multiply activations by trained vectors.

(IA)³ multiplies each output of a layer by a trained number, or each input. The numbers start at 1,
so the adapted model starts out identical to the base model. There are far fewer of them than
LoRA's numbers, and they can be merged into the weight.

Paper: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning", arXiv 2205.05638.

    y = l · (W x + b)            W' = diag(l) W,   b' = l b    (1)  keys and values, section 3.3
    y = W (l · x) + b            W' = W diag(l),   b' = b      (2)  targets in `feedforward_modules`

Shapes: W (out, in), b (out,), x (…, in), y (…, out). l is stored as (out, 1) for (1) and as (1, in)
for (2), so that W' is W times l. Trainable parameters: `out` per layer with (1), `in` with (2).

The paper adapts keys, values, and the input of the MLP's last layer. In GPT-2 one layer makes
queries, keys and values: with "attn.c_attn", the queries are multiplied too, as in Hugging Face
peft. Difference from peft: both lists must be given; the second may be [].

>>> names = {"target_modules": ["attn.c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}
>>> layers = add_ia3(model, IA3Config(**names))
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class IA3Config:
    """Which layers to adapt. Names are those of peft's IA3Config."""

    target_modules: list[str] | str | None = None  # add_ia3: a list; get_peft_model: also a string
    feedforward_modules: list[str] | None = None  # the targets whose input is multiplied
    task_type: str | None = None  # for example "CAUSAL_LM"
    inference_mode: bool = False  # with get_peft_model: load the adapter frozen
    peft_type: str = field(default="IA3", init=False)

    def __post_init__(self):
        if not isinstance(self.feedforward_modules, list | set):
            got = repr(self.feedforward_modules)
            raise ValueError(f"feedforward_modules must be a list of names (or []), got {got}")


class IA3Linear(nn.Module):
    """A frozen linear layer whose outputs (1), or inputs (2), are multiplied by a vector.

    base_layer: `nn.Linear`, or transformers' `Conv1D`, which stores W transposed. config: not used.
    """

    def __init__(self, base_layer: nn.Module, config: IA3Config, is_feedforward: bool = False):
        super().__init__()
        w = matrix(base_layer)  # (out, in)
        self.base_layer, self.is_feedforward = base_layer, is_feedforward
        self.out_features, self.in_features = w.shape
        shape = (1, self.in_features) if is_feedforward else (self.out_features, 1)
        dtype = torch.promote_types(w.dtype, torch.float32)  # float32 even for a half base
        self.ia3_l = nn.Parameter(torch.ones(shape, dtype=dtype, device=w.device))
        self.register_buffer("merged_weight", None, persistent=False)  # W' while merged; not saved
        self.register_buffer("merged_bias", None, persistent=False)  # b' while merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this layer is merged: call unmerge() to train, or model.eval()")
            return F.linear(x, self.merged_weight, self.merged_bias)
        if self.is_feedforward:
            return self.base_layer((x * self.ia3_l[0]).to(x.dtype))  # (2)
        y = self.base_layer(x)
        return (y * self.ia3_l[:, 0]).to(y.dtype)  # (1)

    @property
    def weight(self) -> Tensor:
        """W', stored as W is, for code that reads a layer's weight instead of calling the layer."""
        return self.merged().t() if type(self.base_layer).__name__ == "Conv1D" else self.merged()

    @property
    def bias(self) -> Tensor | None:
        """b', (out,)."""
        b = self.base_layer.bias
        return b if b is None or self.is_feedforward else (b * self.ia3_l[:, 0]).to(b.dtype)

    def merged(self) -> Tensor:
        """The merged weight W', (out, in), in the dtype of W."""
        w = matrix(self.base_layer)
        return (w * self.ia3_l).to(w.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Store W' and b': `forward` uses them until unmerge(). W and b do not change."""
        self.merged_weight = self.merged().contiguous()
        self.merged_bias = None if self.bias is None else self.bias.detach()  # may be a Parameter

    def unmerge(self) -> None:
        """Discard W' and b'."""
        self.merged_weight = self.merged_bias = None


def add_ia3(model: nn.Module, config: IA3Config) -> dict[str, IA3Linear]:
    """Freeze the model, replace each target with an IA3Linear, and return the new layers by name.
    Targets are the linear layers whose name, or the end of it ("mlp.c_proj"), is in the list."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model already has an adapter: remove it before adding another")
    names = config.target_modules
    ends = tuple(f".{name}" for name in names) if isinstance(names, list) else ()
    feedforward = tuple(f".{name}" for name in config.feedforward_modules)
    layers = {
        name: IA3Linear(layer, config, f".{name}".endswith(feedforward))
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


if __name__ == "__main__":  # recover numbers that the outputs were multiplied by
    torch.manual_seed(0)
    model, factors = nn.Sequential(nn.Linear(20, 30)), torch.rand(30) + 0.5
    x = torch.randn(256, 20)
    target = model(x).detach() * factors
    (layer,) = add_ia3(model, IA3Config(["0"], feedforward_modules=[])).values()
    optimizer = torch.optim.Adam([layer.ia3_l], lr=0.02)
    for _ in range(300):
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    error = (layer.ia3_l[:, 0] - factors).abs().max().item()
    assert error < 1e-3
    print(f"ia3.py: 30 parameters recovered the 30 factors, error {error:.1e}")
