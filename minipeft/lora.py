r"""LoRA: learn the change of a weight as the product of two thin matrices.

A fine-tuned weight is W + ΔW. LoRA freezes W and writes ΔW as B A, where A and B are thin. B starts
at zero, so at first nothing has changed; then A and B alone are trained. Afterwards B A can be
added to W, and the layer costs what it cost before. The whole adaptation is a small file.

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    y = W x + b + s B A dropout(x)        s = α / r            (1)  section 4.1
    s = α / √r  with `use_rslora`                              (2)  arXiv 2312.03732
    W' = W + s B A                                             (3)  merging

Shapes: W (out, in), A (r, in), B (out, r), x (…, in), y (…, out); r is the rank.
Trainable parameters: the sum over the adapted layers of r (in + out).

Where we differ. From the paper: A is drawn as Hugging Face peft draws it (Kaiming uniform, the very
same random numbers), not from a Gaussian. From peft: one layer holds one adapter; merging keeps W'
as a tensor of its own and never writes into W, so unmerging returns W to the bit (peft subtracts,
and rounds); a target that matches nothing, is tied, or sits where PyTorch would skip the adapter is
an error; and `target_modules` has no default, so say what to adapt.

>>> layers = add_lora(model, LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj"]))
>>> ...train the parameters that require a gradient...
>>> merge_lora(layers)
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class LoraConfig:
    """What to adapt, and how. Fields, defaults and meaning are peft's."""

    r: int = 8  # the rank
    lora_alpha: float = 8  # α: the change is scaled by α / r
    lora_dropout: float = 0.0  # on the adapter's input, in training mode
    target_modules: list[str] | str | None = None  # names or endings; a regex; or "all-linear"
    use_rslora: bool = False  # scale by α / √r, equation (2)
    rank_pattern: dict[str, int] = field(default_factory=dict)  # name or regex: another r
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # name or regex: another α
    trainable_token_indices: list[int] | None = None  # token_rows.py's work, and not this file's
    task_type: str | None = None
    inference_mode: bool = False  # True: the adapter is frozen as well
    peft_type: str = field(default="LORA", init=False)

    def __post_init__(self):
        for name, r in [("r", self.r)] + [
            (f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items()
        ]:
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"{name} is {r!r}: a rank is a whole number from 1 up")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise ValueError(f"lora_alpha is {alpha!r}: give a number above 0")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}: give a number in [0, 1)")
        if isinstance(self.target_modules, set | tuple):
            self.target_modules = sorted(self.target_modules)


class LoraLinear(nn.Module):
    """A linear layer with an adapter beside it, equation (1). It still looks like a linear layer.

    base_layer: `nn.Linear`, or transformers' `Conv1D`, which is a linear layer with W transposed.
    x (…, in) -> y (…, out). Training while merged raises RuntimeError.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ):
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = matrix(base_layer).shape
        self.r, self.scaling = r, lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        self.lora_A = nn.Linear(self.in_features, r, bias=False)
        self.lora_B = nn.Linear(
            r, self.out_features, bias=False
        )  # drawn as peft does, then zeroed:
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        w = base_layer.weight  # a half-precision base gets an adapter in float32, as in peft
        dtype = torch.float32 if w.dtype in (torch.float16, torch.bfloat16) else w.dtype
        self.lora_A.to(w.device, dtype)
        self.lora_B.to(w.device, dtype)
        self.register_buffer("merged_weight", None, persistent=False)  # W', (out, in), while merged

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this layer is merged: unmerge it before training")
            return F.linear(x, self.merged_weight, self.bias)
        y = self.base_layer(x)  # (…, out)
        h = self.lora_A(self.lora_dropout(x).to(self.lora_A.weight.dtype))  # (…, r)
        rows = y.reshape(-1, self.out_features).to(h.dtype)  # (n, out)
        # addmm scales, multiplies and adds in one pass: rows + s h B^T
        z = torch.addmm(rows, h.reshape(-1, self.r), self.lora_B.weight.t(), alpha=self.scaling)
        return z.view_as(y).to(y.dtype)

    def delta(self) -> Tensor:
        """s B A, (out, in): what the adapter adds to W."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    def merged(self) -> Tensor:
        """W' = W + s B A, (out, in), equation (3)."""
        w = matrix(self.base_layer)
        return (w + self.delta()).to(w.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with W' from now on. W itself stays untouched."""
        self.merged_weight = self.merged().contiguous()

    def unmerge(self) -> None:
        """Drop W'. The layer is what it was, to the bit."""
        self.merged_weight = None

    @torch.no_grad()
    def merge_into_base(self) -> nn.Module:
        """Write W' into the base layer and return it. Not reversible: `merge` is the gentle way."""
        matrix(self.base_layer).copy_(self.merged())
        return self.base_layer


def lora_layers(model: nn.Module, config: LoraConfig) -> dict[str, LoraLinear]:
    """A LoraLinear for each target, by name. The model is not changed: `add_lora` places them.

    Raises ValueError for targets that cannot be adapted and for patterns that match no target.
    """
    targets = find_targets(model, config.target_modules)

    def matches(key: str, name: str) -> bool:
        return re.match(rf"(.*\.)?({key})$", name) is not None

    for key in (*config.rank_pattern, *config.alpha_pattern):
        if not any(matches(key, name) for name in targets):
            raise ValueError(
                f"the pattern {key!r} matches no target; they are: {', '.join(targets)}"
            )
    layers = {}
    for name, base in targets.items():
        r = next((v for k, v in config.rank_pattern.items() if matches(k, name)), config.r)
        alpha = next(
            (v for k, v in config.alpha_pattern.items() if matches(k, name)), config.lora_alpha
        )
        layers[name] = LoraLinear(base, r, alpha, config.lora_dropout, config.use_rslora)
        layers[name].lora_A.requires_grad_(not config.inference_mode)
        layers[name].lora_B.requires_grad_(not config.inference_mode)
    return layers


def add_lora(model: nn.Module, config: LoraConfig) -> dict[str, LoraLinear]:
    """Freeze the model, then put a LoraLinear in the place of each target. Returns them by name."""
    if config.trainable_token_indices is not None:
        raise ValueError("trainable_token_indices: get_peft_model trains them, add_lora does not")
    layers = lora_layers(model, config)
    model.requires_grad_(False)
    for name, layer in layers.items():
        layer.train(model.training)
        model.set_submodule(name, layer)
    return layers


def merge_lora(layers: dict[str, LoraLinear]) -> None:
    """Let every layer compute with W'. Can be repeated; changes no weight."""
    for layer in layers.values():
        layer.merge()


def unmerge_lora(layers: dict[str, LoraLinear]) -> None:
    """Let every layer compute with W and the adapter again."""
    for layer in layers.values():
        layer.unmerge()


def remove_lora(model: nn.Module, layers: dict[str, LoraLinear]) -> None:
    """Put the original layers back: the model answers with the base's bits."""
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)


def is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


# --- find_targets: the same lines stand in every weight method (tests/test_copy_alone.py compares)
def find_targets(model: nn.Module, target_modules: list[str] | str | None) -> dict[str, nn.Module]:
    """The layers to adapt, by name, chosen as peft does. ValueError for what cannot be right."""
    modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
    linear = [n for n, m in modules.items() if is_linear(m)]
    if any(hasattr(m, "base_layer") for m in modules.values()):
        raise ValueError("an adapter is in place already: remove it before adding another")
    if target_modules == "all-linear":  # all but the output head
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        hits = {target_modules: [n for n in linear if modules[n] is not head]}
    elif isinstance(target_modules, str):
        hits = {target_modules: [n for n in modules if re.fullmatch(target_modules, n)]}
    else:
        ends = target_modules or [""]
        hits = {end: [n for n in modules if f".{n}".endswith(f".{end}")] for end in ends}
    kinds = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in linear}))
    for entry in [t for t, names in hits.items() if not names]:
        raise ValueError(f"target_modules: {entry!r} matches no module; linear ones are: {kinds}")
    users = Counter(id(w) for m in modules.values() for w in m.parameters(recurse=False))
    found = {n: m for n, m in modules.items() if any(n in names for names in hits.values())}
    for name, layer in found.items():
        inside = [model] + [modules[name[:i]] for i, c in enumerate(name) if c == "."]
        if not is_linear(layer):
            raise ValueError(f"target {name} is a {type(layer).__name__}, not a linear layer")
        if any(isinstance(m, nn.MultiheadAttention | nn.TransformerEncoderLayer) for m in inside):
            raise ValueError(f"target {name}: PyTorch reads its weight itself and skips an adapter")
        if users[id(layer.weight)] > 1:
            raise ValueError(f"target {name} shares its weight with another module: untie it first")
    return found


def matrix(layer: nn.Module) -> Tensor:
    """The weight as (out, in). `Conv1D` stores (in, out): its name tells, its shape cannot."""
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


# --- end of find_targets


def _check() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10)).double()
    x, before = torch.randn(5, 20).double(), [p.clone() for p in model.parameters()]
    y = model(x)
    layers = add_lora(model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 3 * (20 + 30) + 3 * (30 + 10)
    assert torch.equal(model(x), y), "B is zero, so nothing has changed yet"
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(x)
    assert not torch.allclose(trained, y)
    merge_lora(layers)
    assert torch.allclose(model.eval()(x), trained, rtol=0, atol=1e-12)
    unmerge_lora(layers)
    assert torch.equal(model(x), trained)
    remove_lora(model, layers)
    assert torch.equal(model(x), y)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    print(
        "lora.py: 270 trainable parameters, r (in + out) a layer; merging and unmerging are exact"
    )


if __name__ == "__main__":
    _check()
