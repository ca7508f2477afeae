r"""AdaLoRA: a low-rank update in SVD form whose ranks move to where they matter.

LoRA gives every matrix the same rank. AdaLoRA writes the update as P Λ Q with a diagonal Λ and
starts with more rank than it will keep. During training it prunes triplets (a column of P, an entry
of Λ, a row of Q): over all matrices at once, it zeroes those Λ entries that matter least to the
loss. A penalty keeps P and Q close to orthogonal, so that each triplet has a meaning of its own.
Importance is |parameter x gradient|, smoothed, times its uncertainty; size alone does not count.

Paper: Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
arXiv 2303.10512. In code, as in peft: Q = lora_A, Λ = lora_E, P = lora_B.

    y = W x + b + B (E ∘ A) x · α / (init_r + 1e-5)                                (1)  eq. 3
    loss = task loss + γ · mean over all A, B of ‖A Aᵀ - I‖_F, ‖Bᵀ B - I‖_F        (2)  eq. 4
    I = |w ∂loss/∂w|,  Ī ← β₁ Ī + (1 - β₁) I,  Ū ← β₂ Ū + (1 - β₂) |I - Ī|         (3)  eq. 8-10
    score of triplet i = (Ī Ū)(E_i) + mean (Ī Ū)(row i of A) + mean (Ī Ū)(column i of B)   (4)
    budget(t) = target + (init - target) (1 - (t - tinit) / (T - tfinal - tinit))³  (5)  eq. 12

Budgets count triplets over all matrices. Up to tinit nothing is pruned; after T - tfinal the ranks
are fixed and training goes on; T = total_step.
Shapes: A (r, in), E (r, 1), B (out, r), x (…, in), y (…, out).
Trainable parameters: init_r (in + out + 1), summed over the adapted layers.

Differences from the paper, shared with peft: the update is scaled by α / (init_r + 1e-5) and keeps
that scale when ranks shrink; the penalty is a mean, and its gradient enters the importance, which
pairs the updated weight with the gradient from before the update.
"""

import copy
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class AdaLoraConfig:
    """Which layers to adapt, and the schedule. Fields and defaults are peft's."""

    target_r: int = 8  # average rank at the end
    init_r: int = 12  # rank of every matrix at the start
    tinit: int = 0  # steps before the budget starts to fall
    tfinal: int = 0  # steps at the end during which the ranks are fixed
    deltaT: int = 1  # steps between two allocations
    beta1: float = 0.85  # β₁, smoothing of the importance
    beta2: float = 0.85  # β₂, smoothing of its uncertainty
    orth_reg_weight: float = 0.5  # γ, weight of the penalty
    total_step: int | None = None  # T, the number of training steps
    lora_alpha: float = 8  # α
    lora_dropout: float = 0.0  # applied to the adapter's input during training
    target_modules: list[str] | str | None = None  # names or endings, a regex, or "all-linear"
    rank_pattern: dict[str, list[bool]] | None = None  # read from a file: the triplets kept
    task_type: str | None = None  # as in peft, for example "CAUSAL_LM"
    inference_mode: bool = False  # load the adapter frozen
    peft_type: str = field(default="ADALORA", init=False)

    def __post_init__(self):
        least = {"target_r": 1, "init_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}
        for name, smallest in least.items():
            n = getattr(self, name)
            if not isinstance(n, int) or isinstance(n, bool) or n < smallest:
                raise ValueError(f"{name} must be an integer of at least {smallest}, got {n!r}")
        if self.target_r >= self.init_r:
            raise ValueError(f"target_r {self.target_r} must be below init_r {self.init_r}")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit {self.tinit} and tfinal {self.tfinal} leave no step of total_step "
                f"{self.total_step} for allocating ranks"
            )
        for name, low in (("lora_dropout", 0), ("beta1", 1e-9), ("beta2", 1e-9)):
            if not low <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be below 1, got {getattr(self, name)!r}")
        if not (self.lora_alpha > 0 and self.orth_reg_weight >= 0):
            raise ValueError("lora_alpha must be positive, and orth_reg_weight not negative")


class SVDLinear(nn.Module):
    """A frozen linear layer plus a trainable update in SVD form, equation (1).

    base_layer: `nn.Linear`, or transformers' `Conv1D`. r: the rank, if it is not config.init_r (in
    layers read from a file). Maps x (…, in) to y (…, out). Raises RuntimeError when trained while
    merged.
    """

    def __init__(self, base_layer: nn.Module, config: AdaLoraConfig, r: int | None = None):
        super().__init__()
        w, r = matrix(base_layer), config.init_r if r is None else r
        self.base_layer = base_layer
        self.out_features, self.in_features = w.shape
        self.lora_alpha, self.divisor = config.lora_alpha, config.init_r + 1e-5
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        kind = {"device": w.device, "dtype": torch.promote_types(w.dtype, torch.float32)}
        self.lora_A = nn.Parameter(0.02 * torch.randn(r, self.in_features, **kind))
        self.lora_E = nn.Parameter(torch.zeros(r, 1, **kind))
        self.lora_B = nn.Parameter(0.02 * torch.randn(self.out_features, r, **kind))
        self.register_buffer("merged_weight", None, persistent=False)  # W' (out, in) while merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this layer is merged: call unmerge before training")
            return F.linear(x, self.merged_weight, self.bias)
        y = self.base_layer(x)  # (…, out)
        x = self.lora_dropout(x.to(self.lora_A.dtype))  # (…, in)
        update = x @ (self.lora_A * self.lora_E).T @ self.lora_B.T  # (…, in) -> (…, r) -> (…, out)
        return y + (update * self.lora_alpha / self.divisor).to(y.dtype)  # (1)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def delta(self) -> Tensor:
        """The update, (out, in)."""
        return self.lora_B @ (self.lora_A * self.lora_E) * self.lora_alpha / self.divisor

    def merged(self) -> Tensor:
        """W' = W + update, (out, in), in the dtype of W."""
        w = matrix(self.base_layer)
        return (w + self.delta()).to(w.dtype)

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


def orthogonality(layers: dict[str, SVDLinear]) -> Tensor:
    """The mean of equation (2): 0 if all rows of A and all columns of B are orthonormal."""
    matrices = [m for layer in layers.values() for m in (layer.lora_A, layer.lora_B.T)]
    total = 0.0
    for m in matrices:
        eye = torch.eye(len(m), dtype=m.dtype, device=m.device)
        total = total + torch.norm(m @ m.T - eye, p="fro")  # (r, in) @ (in, r)
    return total / len(matrices)


class RankAllocator:
    """Prunes triplets by equations (3) to (5). Call `update_and_allocate` after every step."""

    def __init__(self, layers: dict[str, SVDLinear], config: AdaLoraConfig):
        self.layers, self.config = layers, config
        self.initial = config.init_r * len(layers)  # budgets, in triplets
        self.target = config.target_r * len(layers)
        self.step: int | None = None  # the last step seen
        self.importance: dict[tuple[str, str], Tensor] = {}  # Ī, by layer and letter
        self.uncertainty: dict[tuple[str, str], Tensor] = {}  # Ū
        self.kept: dict[str, Tensor] = {}  # by layer: which triplets are left, bool (r,)

    def update_and_allocate(self, step: int) -> None:
        """Update the importance and, where the schedule says so, prune.

        Call it after the optimizer's step and before the gradients are cleared; `step` counts from
        1 (or 0). Raises RuntimeError if there are no gradients.
        """
        c, last = self.config, self.config.total_step - self.config.tfinal
        self.step = step
        if step < last or not self.importance:
            self.update_importance()
        allocates = step == last or (c.tinit < step < last and step % c.deltaT == 0)
        if allocates:
            self.prune(self.budget(step))
        if allocates or step > last:  # in between, the optimizer may revive a pruned triplet
            self.reapply_mask()

    def budget(self, step: int) -> int:
        """The number of triplets allowed at a step, over all layers."""
        c = self.config
        if step <= c.tinit:
            return self.initial
        if step > c.total_step - c.tfinal:
            return self.target
        left = 1 - (step - c.tinit) / (c.total_step - c.tfinal - c.tinit)
        return int((self.initial - self.target) * left**3 + self.target)  # (5)

    @torch.no_grad()
    def update_importance(self) -> None:
        beta1, beta2 = self.config.beta1, self.config.beta2
        for name, layer in self.layers.items():
            for letter in "AEB":
                w = getattr(layer, f"lora_{letter}")
                if w.grad is None:
                    raise RuntimeError(
                        f"{name} has no gradient: call update_and_allocate after backward and the "
                        "optimizer's step, and before zero_grad"
                    )
                sensitivity, key = (w * w.grad).abs(), (name, letter)
                mean = self.importance.setdefault(key, torch.zeros_like(w))
                spread = self.uncertainty.setdefault(key, torch.zeros_like(w))
                mean.mul_(beta1).add_((1 - beta1) * sensitivity)  # (3), Ī
                deviation = (sensitivity - mean).abs_()
                spread.mul_(beta2).add_(deviation.mul_(1 - beta2))  # (3), Ū

    def scores(self) -> dict[str, Tensor]:
        """The score of every triplet, (r,) by layer."""
        found = {}
        for name in self.layers:
            a, e, b = (self.importance[name, x] * self.uncertainty[name, x] for x in "AEB")
            found[name] = e.view(-1) + torch.stack((a.mean(1), b.mean(0)), 1).sum(1)  # (4)
        return found

    @torch.no_grad()
    def prune(self, budget: int) -> None:
        """Keep the `budget` triplets with the highest scores, over all layers."""
        scores, n_pruned = self.scores(), self.initial - budget
        if n_pruned > 0:
            threshold = torch.cat(list(scores.values())).kthvalue(n_pruned).values
            self.kept = {name: score > threshold for name, score in scores.items()}

    @torch.no_grad()
    def reapply_mask(self) -> None:
        """Set E to zero for the pruned triplets."""
        for name, kept in self.kept.items():
            self.layers[name].lora_E.masked_fill_(~kept[:, None], 0.0)

    def ranks(self) -> dict[str, int]:
        """How many triplets each layer has left."""
        everything = {name: torch.ones(len(s.lora_E)) for name, s in self.layers.items()}
        return {name: int(kept.sum()) for name, kept in (everything | self.kept).items()}


def add_adalora(model: nn.Module, config: AdaLoraConfig) -> dict[str, SVDLinear]:
    """Freeze the model and replace each target by an SVDLinear. Returns the new layers by name.

    Raises ValueError if no linear layer matches `config.target_modules`.
    """
    targets = {n: m for n, m in model.named_modules() if is_target(model, n, config.target_modules)}
    if not targets:
        raise ValueError(f"target_modules={config.target_modules!r} matches no linear layer")
    model.requires_grad_(False)
    layers = {name: SVDLinear(layer, config) for name, layer in targets.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.training))
    return layers


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


if __name__ == "__main__":  # only the second layer has to change: where do the ranks go?
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20))
    goal = copy.deepcopy(model).requires_grad_(False)
    goal[2].weight += 0.3 * torch.randn(20, 3) @ torch.randn(3, 20)
    settings = {"init_r": 4, "target_r": 2, "tinit": 100, "tfinal": 100, "total_step": 500}
    config = AdaLoraConfig(target_modules="all-linear", orth_reg_weight=0.1, **settings)
    layers = add_adalora(model, config)
    allocator = RankAllocator(layers, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(1, 501):
        x = torch.randn(64, 20)
        loss = F.mse_loss(model(x), goal(x)) + config.orth_reg_weight * orthogonality(layers)  # (2)
        loss.backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
    ranks = allocator.ranks()
    assert ranks["2"] > ranks["0"]
    assert sum(ranks.values()) == 4
    print(f"adalora.py: the first layer kept rank {ranks['0']}, the second rank {ranks['2']}")
