r"""AdaLoRA: a low-rank change in the form of an SVD, whose ranks are moved to where they matter.

LoRA gives every matrix the same rank. AdaLoRA writes the change as P Λ Q with Λ diagonal, begins
with more rank than it will keep, and during training sets the entries of Λ to zero whose triplets
(a column of P, an entry of Λ, a row of Q) matter least to the loss, over all matrices at once. A
penalty keeps P and Q near orthogonal, so that a triplet means something alone. What matters is
judged by |parameter x gradient|, smoothed, times how much that fluctuates; not by size.

Paper: Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
arXiv 2303.10512. The letters of the files: Q = A, Λ = E, P = B.

    y = W x + b + s B (E ∘ A) x,      s = α / (init_r + 1e-5)                      (1)  eq. 3
    loss = task loss + γ · mean over all A, B of ‖A Aᵀ - I‖_F, ‖Bᵀ B - I‖_F        (2)  eq. 4
    I = |w ∂loss/∂w|,  Ī ← β₁ Ī + (1 - β₁) I,  Ū ← β₂ Ū + (1 - β₂) |I - Ī|         (3)  eq. 8-10
    score of a triplet = (Ī Ū)(E_i) + mean of Ī Ū over A's row i + the same over B's column i  (4)
    budget(t) = target + (init - target) (1 - (t - t_i) / (T - t_f - t_i))³        (5)  eq. 12

with t_i = tinit, t_f = tfinal, T = total_step. Before t_i the budget is whole, after T - t_f the
ranks stay as they are and training goes on.

Shapes: A (r, in), E (r, 1), B (out, r), x (…, in), y (…, out).
Trainable parameters: the sum over the adapted layers of init_r (in + out + 1), while training.

Where we differ. From the paper, with peft: the change is scaled by α / (init_r + 1e-5), and that
stays so when ranks shrink. The penalty is a mean, and its gradient is part of the importance, which
takes the updated weight and the gradient from before the update. From peft: `PeftModel` neither
merges nor saves what was trained while ranks are above the target; init_r must be above target_r;
the penalty is added in training alone; merging never writes into W.

>>> layers = add_adalora(model, config)
>>> allocator = RankAllocator(layers, config)
>>> (loss + config.orth_reg_weight * orthogonality(layers)).backward()
>>> optimizer.step(); allocator.update_and_allocate(step); optimizer.zero_grad()
"""

import re
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class AdaLoraConfig:
    """What to adapt, and the schedule. Fields, defaults and meaning are peft's."""

    target_r: int = 8  # the mean rank at the end
    init_r: int = 12  # the rank of every matrix at the start
    tinit: int = 0  # steps before the budget begins to fall
    tfinal: int = 0  # steps at the end in which ranks stay
    deltaT: int = 1  # steps between two allocations
    beta1: float = 0.85  # smoothing of the importance, β₁
    beta2: float = 0.85  # smoothing of its fluctuation, β₂
    orth_reg_weight: float = 0.5  # γ
    total_step: int | None = None  # T, all steps of training
    lora_alpha: float = 8  # α
    lora_dropout: float = 0.0  # on the adapter's input, in training mode
    target_modules: list[str] | str | None = None  # names or endings; a regex; or "all-linear"
    rank_pattern: dict[str, list[bool]] | None = None  # which triplets are kept, by layer
    task_type: str | None = None
    inference_mode: bool = False  # True: the adapter is frozen as well
    peft_type: str = field(default="ADALORA", init=False)

    def __post_init__(self):
        least = {"target_r": 1, "init_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}
        for name, least_n in least.items():
            n = getattr(self, name)
            if not isinstance(n, int) or isinstance(n, bool) or n < least_n:
                raise ValueError(f"{name} is {n!r}: give a whole number from {least_n} up")
        if self.target_r >= self.init_r:
            raise ValueError(
                f"target_r {self.target_r} must be below init_r {self.init_r}: ranks only shrink"
            )
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit {self.tinit} + tfinal {self.tfinal} leave no step of the {self.total_step} "
                "for allocating ranks"
            )
        for name, n in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 < n < 1:
                raise ValueError(f"{name} is {n!r}: give a number between 0 and 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}: give a number in [0, 1)")
        if not self.lora_alpha > 0 or not self.orth_reg_weight >= 0:
            raise ValueError("lora_alpha must be above 0, orth_reg_weight not below")
        if isinstance(self.target_modules, set | tuple):
            self.target_modules = sorted(self.target_modules)


class SVDLinear(nn.Module):
    """A linear layer with a change in SVD form, equation (1). It still looks like a linear layer.

    base_layer: `nn.Linear`, or transformers' `Conv1D`. x (…, in) -> y (…, out). `r` is the rank
    held, `init_r` the one that scales. Training while merged raises RuntimeError.
    """

    def __init__(self, base_layer: nn.Module, r: int, init_r: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = matrix(base_layer).shape
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        w = base_layer.weight  # a half-precision base gets an adapter in float32
        dtype = torch.float32 if w.dtype in (torch.float16, torch.bfloat16) else w.dtype

        def placed(tensor: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.to(w.device, dtype))

        a, e, b = (torch.randn(*n) for n in ((r, self.in_features), (r, 1), (self.out_features, r)))
        torch.randn(1)  # peft draws all these, and a counter, before it draws again, and then casts
        self.lora_A = placed(nn.init.normal_(a, std=0.02))
        self.lora_B = placed(nn.init.normal_(b, std=0.02))
        self.lora_E = placed(nn.init.zeros_(e))
        self.alpha, divisor = alpha, torch.tensor([init_r + 1e-5], dtype=dtype)
        self.register_buffer("divisor", divisor.to(w.device), persistent=False)
        self.register_buffer("merged_weight", None, persistent=False)  # W', (out, in), while merged

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this layer is merged: unmerge it before training")
            return F.linear(x, self.merged_weight, self.bias)
        y = self.base_layer(x)  # (…, out)
        x = self.lora_dropout(x.to(self.lora_A.dtype))
        h = x @ (self.lora_A * self.lora_E).T  # (…, r)
        return y + (h @ self.lora_B.T * self.alpha / self.divisor).to(y.dtype)

    def delta(self) -> Tensor:
        """s B (E ∘ A), (out, in): what the adapter adds to W."""
        return self.lora_B @ (self.lora_A * self.lora_E) * self.alpha / self.divisor

    def merged(self) -> Tensor:
        """W' = W + s B (E ∘ A), (out, in)."""
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


def orthogonality(layers: dict[str, SVDLinear]) -> Tensor:
    """The mean of equation (2): 0 where all rows of A and columns of B are orthonormal."""
    total, matrices = 0.0, [m for s in layers.values() for m in (s.lora_A, s.lora_B.T)]
    for m in matrices:
        square = m @ m.T  # (r, r)
        one = torch.eye(len(m), dtype=square.dtype, device=square.device)
        total = total + torch.norm(square - one, p="fro")
    return total / len(matrices)


class RankAllocator:
    """Takes ranks away by equations (3) to (5). Call `update_and_allocate` after every step."""

    def __init__(self, layers: dict[str, SVDLinear], config: AdaLoraConfig):
        self.layers, self.config = layers, config
        self.step: int | None = None  # the last that update_and_allocate was called with
        self.initial = config.init_r * len(layers)
        self.target = config.target_r * len(layers)
        self.importance, self.fluctuation = {}, {}  # Ī and Ū, by layer and letter
        self.kept: dict[str, Tensor] = {}  # by layer: a bool for each triplet, (r,)

    def budget(self, step: int) -> int:
        """How many triplets may be left at a step, over all layers: equation (5)."""
        c = self.config
        if step <= c.tinit:
            return self.initial
        if step > c.total_step - c.tfinal:
            return self.target
        left = 1 - (step - c.tinit) / (c.total_step - c.tfinal - c.tinit)
        return int((self.initial - self.target) * left**3 + self.target)

    @torch.no_grad()
    def update_importance(self) -> None:
        """Equation (3) for every entry of every A, E and B."""
        c = self.config
        for name, layer in self.layers.items():
            for letter in "AEB":
                w = getattr(layer, f"lora_{letter}")
                if w.grad is None:
                    raise RuntimeError(
                        f"{name} has no gradient: call update_and_allocate after backward and the "
                        "optimizer's step, and before zero_grad"
                    )
                key, now = (name, letter), (w * w.grad).abs_()
                if key not in self.importance:
                    self.importance[key] = torch.zeros_like(w)
                    self.fluctuation[key] = torch.zeros_like(w)
                smooth = self.importance[key].mul_(c.beta1).add_((1 - c.beta1) * now)
                off = now.sub_(smooth).abs_().mul_(1 - c.beta2)
                self.fluctuation[key].mul_(c.beta2).add_(off)

    def scores(self) -> dict[str, Tensor]:
        """Equation (4): a score for every triplet, (r,), by layer."""
        found = {}
        for name in self.layers:
            a, e, b = (self.importance[name, x] * self.fluctuation[name, x] for x in "AEB")
            found[name] = e.view(-1) + torch.stack((a.mean(1), b.mean(0)), 1).sum(1)
        return found

    @torch.no_grad()
    def mask(self, budget: int) -> None:
        """Set E to zero where the score is among the lowest, over all layers."""
        scores, cut = self.scores(), self.initial - budget
        if cut == 0:
            return
        threshold = torch.cat(list(scores.values())).kthvalue(cut).values
        self.kept = {name: score > threshold for name, score in scores.items()}
        self.mask_again()

    @torch.no_grad()
    def mask_again(self) -> None:
        for name, kept in self.kept.items():
            self.layers[name].lora_E.masked_fill_(~kept[:, None], 0.0)

    def update_and_allocate(self, step: int) -> None:
        """Importance, and where the schedule says so, masks. `step` counts from 1, or from 0."""
        c, last = self.config, self.config.total_step - self.config.tfinal
        self.step = step
        if step < last or not self.importance:
            self.update_importance()
        if step > last:
            self.mask_again()
        elif step == last or (step > c.tinit and step % c.deltaT == 0):
            self.mask(self.budget(step))
        self.config.rank_pattern = {f"{n}.lora_E": kept.tolist() for n, kept in self.kept.items()}

    def ranks(self) -> dict[str, int]:
        """How many triplets each layer has left."""
        return {
            name: int(self.kept[name].sum()) if name in self.kept else len(layer.lora_E)
            for name, layer in self.layers.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """What it takes to go on later: Ī, Ū and the triplets kept, by kind, layer and letter."""
        found = {"step": torch.tensor(-1 if self.step is None else self.step)}
        for kind in ("importance", "fluctuation"):
            found |= {f"{kind}.{n}.{x}": t for (n, x), t in getattr(self, kind).items()}
        return found | {f"kept.{name}": kept for name, kept in self.kept.items()}

    def load_state_dict(self, found: dict[str, Tensor]) -> None:
        """Take such a state over."""
        self.step = None if found["step"] < 0 else int(found["step"])
        for name, layer in self.layers.items():
            device = layer.lora_E.device
            if f"kept.{name}" in found:
                self.kept[name] = found[f"kept.{name}"].to(device)
            for kind in ("importance", "fluctuation"):
                for letter in "AEB":
                    if f"{kind}.{name}.{letter}" in found:
                        tensor = found[f"{kind}.{name}.{letter}"].to(device)
                        getattr(self, kind)[name, letter] = tensor


def adalora_layers(model: nn.Module, config: AdaLoraConfig) -> dict[str, SVDLinear]:
    """An SVDLinear for each target, by name. The model is not changed: `add_adalora` places them.

    A `rank_pattern` in the config, as files have it, makes layers of the ranks that were kept.
    """
    layers, pattern = {}, config.rank_pattern or {}
    targets = find_targets(model, config.target_modules)
    for key in pattern:
        if key.removesuffix(".lora_E") not in targets:
            raise ValueError(f"rank_pattern: {key!r} is no target; they are: {', '.join(targets)}")
    for name, base in targets.items():
        r = sum(pattern.get(f"{name}.lora_E", [True] * config.init_r))
        layers[name] = SVDLinear(base, r, config.init_r, config.lora_alpha, config.lora_dropout)
        for parameter in (layers[name].lora_A, layers[name].lora_E, layers[name].lora_B):
            parameter.requires_grad_(not config.inference_mode)
    return layers


def add_adalora(model: nn.Module, config: AdaLoraConfig) -> dict[str, SVDLinear]:
    """Freeze the model, then put an SVDLinear in the place of each target. Returns them by name."""
    layers = adalora_layers(model, config)
    model.requires_grad_(False)
    for name, layer in layers.items():
        layer.train(model.training)
        model.set_submodule(name, layer)
    return layers


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
    x, y = torch.randn(50, 20).double(), torch.randn(50, 10).double()
    plain = model(x)
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=5, tfinal=10, total_step=40, target_modules="all-linear"
    )
    layers = add_adalora(model, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 4 * (20 + 30 + 1) + 4 * (30 + 10 + 1)
    assert torch.equal(model(x), plain), "E is zero, so nothing has changed yet"
    allocator, optimizer = RankAllocator(layers, config), torch.optim.AdamW(trainable, lr=0.05)
    for step in range(1, 41):
        penalty = config.orth_reg_weight * orthogonality(layers)
        (F.mse_loss(model(x), y) + penalty).backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
    assert sum(allocator.ranks().values()) == 2 * 2
    trained = model(x)
    assert not torch.allclose(trained, plain)
    for layer in layers.values():
        layer.merge()
    assert torch.allclose(model.eval()(x), trained, rtol=0, atol=1e-12)
    for layer in layers.values():
        layer.unmerge()
    assert torch.equal(model(x), trained)
    ranks = ", ".join(str(rank) for rank in allocator.ranks().values())
    print(f"adalora.py: 368 trainable parameters; of the ranks 4, 4 the allocator left {ranks}")


if __name__ == "__main__":
    _check()
