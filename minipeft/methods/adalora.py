r"""AdaLoRA: LoRA that gives more rank to the layers that need it.

LoRA gives every layer the same rank. AdaLoRA writes the update of a weight in the form of an SVD,
B diag(E) A, and starts with more rank than it will keep. Column i of B, entry i of E and row i of A
are a triplet. During training, the triplets of all layers are compared with each other, and the
least important are pruned: their entry of E is set to zero. A penalty keeps the columns of B and
the rows of A orthogonal, so that triplets do not overlap and can be pruned one by one. A triplet's
score comes from the smoothed |weight · gradient|, times its fluctuation between batches: the size
of E alone does not decide. Until the end, a pruned triplet may grow back: E still gets gradients.

Paper: Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
arXiv 2303.10512. The paper's P, Λ, Q are B, diag(E), A here and in peft.

Shapes: A (r, in), E (r, 1), B (out, r), x (…, in), y (…, out); E ∘ A scales row i of A by E_i.

    y = W x + b + B (E ∘ A) x · α / (init_r + 1e-5), as in peft                    (1)  eq. 3
    loss = task loss + γ · mean over all A and B of ‖A Aᵀ - 1‖_F and ‖Bᵀ B - 1‖_F  (2)  eq. 4
    I = |w ∂loss/∂w|,  Ī ← β₁ Ī + (1 - β₁) I,  Ū ← β₂ Ū + (1 - β₂) |I - Ī|         (3)  eq. 8-10
    score of triplet i = (Ī Ū)(E_i) + mean (Ī Ū)(row i of A) + mean (Ī Ū)(column i of B)   (4)
    budget(t) = target + (initial - target) (1 - (t - tinit) / (T - tfinal - tinit))³  (5)  eq. 12

1 in (2) is the identity matrix. I is the sensitivity, Ī the importance, Ū its uncertainty. Budgets
count the triplets of all layers: initial = init_r · layers, target = target_r · layers. Until tinit
nothing is pruned; after T - tfinal (T: total_step) the ranks are fixed.
Trainable parameters: init_r · (in + out + 1), summed over the adapted layers.

Differences from the paper, shared with peft: the scale in (1) stays when ranks shrink; the norms in
(2) are averaged and not squared; (3) includes the penalty's gradient, and runs after the
optimizer step, so w is new and its gradient old; the numerator in (5) is t - tinit.
"""

import copy
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class AdaLoraConfig:
    """Which layers to adapt, and the schedule. Names and defaults are those of peft's config."""

    target_r: int = 8  # average rank at the end
    init_r: int = 12  # rank of every layer's update at the start
    tinit: int = 0  # steps before the budget starts to fall
    tfinal: int = 0  # steps at the end during which the ranks are fixed
    deltaT: int = 1  # prune every deltaT steps
    beta1: float = 0.85  # β₁, smoothing of the importance
    beta2: float = 0.85  # β₂, smoothing of its uncertainty
    orth_reg_weight: float = 0.5  # γ, weight of the penalty
    total_step: int | None = None  # T, the number of training steps; required, as in peft
    lora_alpha: float = 8  # α, scale of the update
    lora_dropout: float = 0.0  # applied to the adapter's input during training
    target_modules: list[str] | str | None = None  # a list of names or endings of names, a
    # regex for the full name, or "all-linear"
    # Not used in this file, but by get_peft_model and in adapter_config.json:
    rank_pattern: dict[str, list[bool]] | None = None  # by layer: which triplets were kept
    bias: str = "none"  # biases stay frozen; bitfit.py trains them
    task_type: str | None = None  # for example "CAUSAL_LM"
    inference_mode: bool = False  # load the adapter frozen
    peft_type: str = field(default="ADALORA", init=False)

    def __post_init__(self):
        minima = {"target_r": 1, "init_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
        if self.target_r >= self.init_r:
            raise ValueError(f"target_r {self.target_r} must be below init_r {self.init_r}")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit {self.tinit} and tfinal {self.tfinal} leave no step of total_step "
                f"{self.total_step} for pruning"
            )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if self.bias != "none":
            raise ValueError(f"bias must be 'none', got {self.bias!r}; BitFit trains biases")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            betas = f"{self.beta1!r} and {self.beta2!r}"
            raise ValueError(f"beta1 and beta2 must be between 0 and 1, got {betas}")
        if not (0 < self.lora_alpha < float("inf") and 0 <= self.orth_reg_weight < float("inf")):
            raise ValueError("lora_alpha must be positive, and orth_reg_weight not negative")


class SVDLinear(nn.Module):
    """A frozen linear layer plus a trainable update in SVD form, equation (1).

    base_layer: `nn.Linear`, or transformers' `Conv1D`. r: the rank, config.init_r by default; less
    for layers read from a file. Maps x (…, in) to y (…, out). While merged, `forward` raises
    RuntimeError in training mode.
    """

    def __init__(self, base_layer: nn.Module, config: AdaLoraConfig, r: int | None = None):
        super().__init__()
        r = config.init_r if r is None else r
        w = matrix(base_layer)  # (out, in)
        self.base_layer = base_layer
        self.out_features, self.in_features = w.shape
        self.lora_alpha, self.divisor = config.lora_alpha, config.init_r + 1e-5
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        dtype = torch.promote_types(w.dtype, torch.float32)  # at least float32
        options = {"device": w.device, "dtype": dtype}
        self.lora_A = nn.Parameter(0.02 * torch.randn(r, self.in_features, **options))
        self.lora_E = nn.Parameter(torch.zeros(r, 1, **options))  # so the update starts at zero
        self.lora_B = nn.Parameter(0.02 * torch.randn(self.out_features, r, **options))
        self.register_buffer("merged_weight", None, persistent=False)  # W' while merged; not saved

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this layer is merged: call unmerge() to train, or model.eval()")
            return F.linear(x, self.merged_weight, self.base_layer.bias)
        y = self.base_layer(x)  # (…, out)
        x = self.lora_dropout(x.to(self.lora_A.dtype))  # (…, in)
        update = x @ (self.lora_A * self.lora_E).T @ self.lora_B.T  # (…, in) -> (…, r) -> (…, out)
        return y + (update * self.lora_alpha / self.divisor).to(y.dtype)  # (1)

    bias = property(lambda self: self.base_layer.bias)

    @property
    def weight(self) -> Tensor:
        """W', stored as W is, for code that reads a layer's weight instead of calling the layer."""
        return self.merged().t() if type(self.base_layer).__name__ == "Conv1D" else self.merged()

    def delta(self) -> Tensor:
        """The update, (out, in)."""
        return self.lora_B @ (self.lora_A * self.lora_E) * self.lora_alpha / self.divisor

    def merged(self) -> Tensor:
        """The merged weight W' = W + update, (out, in), in the dtype of W."""
        w = matrix(self.base_layer)
        return (w + self.delta()).to(w.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Store W'; from now on `forward` uses it. W does not change."""
        self.merged_weight = self.merged().contiguous()

    def unmerge(self) -> None:
        """Discard W'. Outputs are again exactly those of W plus the adapter."""
        self.merged_weight = None


def orthogonality(layers: dict[str, SVDLinear]) -> Tensor:
    """The mean in equation (2), without γ: 0 if all rows of A and columns of B are orthonormal."""
    matrices = [m for layer in layers.values() for m in (layer.lora_A, layer.lora_B.T)]
    total = 0.0
    for m in matrices:
        eye = torch.eye(len(m), dtype=m.dtype, device=m.device)
        total = total + torch.norm(m @ m.T - eye, p="fro")  # (r, n) @ (n, r), n = in or out
    return total / len(matrices)


class RankAllocator:
    """Prunes triplets by equations (3) to (5); see `update_and_allocate`."""

    def __init__(self, layers: dict[str, SVDLinear], config: AdaLoraConfig):
        self.layers, self.config = layers, config
        self.initial = config.init_r * len(layers)  # budget at the start
        self.target = config.target_r * len(layers)  # budget at the end
        self.step: int | None = None  # the last step seen
        self.importance: dict[tuple[str, str], Tensor] = {}  # Ī, by layer and "A", "E" or "B"
        self.uncertainty: dict[tuple[str, str], Tensor] = {}  # Ū
        self.kept: dict[str, Tensor] = {}  # by layer: which triplets are left, bool (r,)

    def update_and_allocate(self, step: int) -> None:
        """Update the importance and, where the schedule says so, prune.

        Call it after the optimizer step and before the gradients are cleared; steps count from 1.
        Raises RuntimeError if gradients are needed and there are none.
        """
        c = self.config
        last = c.total_step - c.tfinal  # the last pruning; it uses the importance of step last - 1
        self.step = step
        if step < last or not self.importance:
            self.update_importance()
        prunes = step == last or (c.tinit < step < last and step % c.deltaT == 0)
        if prunes:
            self.prune(self.budget(step))
        if prunes or step > last:  # not between two prunings: E may grow back there
            self.reapply_mask()

    def budget(self, step: int) -> int:
        """The number of triplets allowed at a step, over all layers."""
        c = self.config
        if step <= c.tinit:
            return self.initial
        if step > c.total_step - c.tfinal:
            return self.target
        remaining = 1 - (step - c.tinit) / (c.total_step - c.tfinal - c.tinit)
        return int((self.initial - self.target) * remaining**3 + self.target)  # (5)

    @torch.no_grad()
    def update_importance(self) -> None:
        """Equation (3), for every A, E and B. A step with a non-finite gradient does not count."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        sensitivity = {}  # I
        for name, layer in self.layers.items():
            for letter in "AEB":
                w = getattr(layer, f"lora_{letter}")
                if w.grad is None:
                    raise RuntimeError(
                        f"{name} has no gradient: call update_and_allocate after backward and the "
                        "optimizer's step, and before zero_grad"
                    )
                sensitivity[name, letter] = (w * w.grad).abs()
        finite = torch.stack([s.sum() for s in sensitivity.values()]).isfinite().all()
        for key, s in sensitivity.items():
            importance = self.importance.setdefault(key, torch.zeros_like(s))
            uncertainty = self.uncertainty.setdefault(key, torch.zeros_like(s))
            new = beta1 * importance + (1 - beta1) * s  # Ī
            importance.copy_(torch.where(finite, new, importance))
            new = beta2 * uncertainty + (1 - beta2) * (s - new).abs()  # Ū
            uncertainty.copy_(torch.where(finite, new, uncertainty))

    def scores(self) -> dict[str, Tensor]:
        """The score of every triplet, (r,) by layer."""
        scores = {}
        for name in self.layers:
            a, e, b = (self.importance[name, k] * self.uncertainty[name, k] for k in "AEB")
            scores[name] = e.view(-1) + (a.mean(1) + b.mean(0))  # (4)
        return scores

    @torch.no_grad()
    def prune(self, budget: int) -> None:
        """Choose the triplets to keep: over all layers, the `budget` with the highest scores.

        Ties at the threshold are pruned too. Nothing is pruned by scores that are NaN or all 0.
        """
        scores, n_pruned = self.scores(), self.initial - budget
        if n_pruned > 0:
            everything = torch.cat(list(scores.values()))
            threshold = everything.kthvalue(n_pruned).values  # the highest score that is pruned
            unknown = everything.max() == 0  # as long as no gradient was finite
            self.kept = {name: ~(s <= threshold) | unknown for name, s in scores.items()}

    @torch.no_grad()
    def reapply_mask(self) -> None:
        """Set E to zero for the pruned triplets."""
        for name, kept in self.kept.items():
            self.layers[name].lora_E.masked_fill_(~kept[:, None], 0.0)

    def ranks(self) -> dict[str, int]:
        """How many triplets each layer has after the last pruning."""
        return {
            name: int(self.kept[name].sum()) if name in self.kept else len(layer.lora_E)
            for name, layer in self.layers.items()
        }


def add_adalora(model: nn.Module, config: AdaLoraConfig) -> dict[str, SVDLinear]:
    """Freeze the model and replace each target with an SVDLinear. Return the new layers by name.

    Raises ValueError if no linear layer matches `config.target_modules`, and for a model that
    already has an adapter.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model already has an adapter: remove it before adding another")
    targets = find_targets(model, config.target_modules)
    if not targets:
        raise ValueError(f"target_modules={config.target_modules!r} matches no linear layer")
    model.requires_grad_(False)  # first freeze: the layers made next stay trainable
    layers = {name: SVDLinear(layer, config) for name, layer in targets.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.training))
    return layers


def find_targets(model: nn.Module, targets: list[str] | str | None) -> dict[str, nn.Module]:
    """The linear layers that `targets` selects, by name."""
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
    ends = tuple(f".{ending}" for ending in targets or [])  # ".proj" does not match "q_proj"
    return {name: module for name, module in linear.items() if f".{name}".endswith(ends)}


def matrix(layer: nn.Module) -> Tensor:
    """The weight as (out, in); a view, not a copy. transformers' `Conv1D` stores (in, out)."""
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


if __name__ == "__main__":  # learn a goal that differs in the second layer, by rank 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20))
    goal = copy.deepcopy(model).requires_grad_(False)
    goal[2].weight += 0.3 * torch.randn(20, 3) @ torch.randn(3, 20)
    settings: dict = {"init_r": 4, "target_r": 2, "tinit": 100, "tfinal": 100, "total_step": 500}
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
