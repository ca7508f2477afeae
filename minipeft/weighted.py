r"""Weighted sums of LoRAs: one new LoRA that does what several do, each as much as its weight says.

The changes of a weight add up, ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ, but a LoRA holds two thin matrices and not the
change itself. There are three ways to find them, with names and numbers as in Hugging Face peft:

    cat      A = [w₁ s₁ A₁; w₂ s₂ A₂; …],  B = [B₁, B₂, …]       exact; the ranks add up
    svd      B A = the nearest matrix of rank r to ΔW            as good as rank r can be
    linear   A = Σ ±√|wᵢ sᵢ| Aᵢ,  B = Σ √|wᵢ sᵢ| Bᵢ              for LoRAs of one rank

Linear is cheap and, of more than one LoRA, no weighted sum: its B A holds the cross terms Bᵢ Aⱼ of
every pair besides. The sign of a weight goes to A alone.

Shapes: Aᵢ (rᵢ, in), Bᵢ (out, rᵢ), ΔW (out, in); wᵢ is a LoRA's weight, sᵢ = αᵢ / rᵢ its scaling.
The result is made for a scaling of 1. peft uses it with √r where the first LoRA has `use_rslora`.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.adapters import Adapter, LayerAdapter, make_adapter

Lora = tuple[float, float, Tensor, Tensor]  # wᵢ, sᵢ, Aᵢ, Bᵢ


def filled(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with zeros for the ranks that are not used."""
    return F.pad(a, (0, 0, 0, r - len(a))), F.pad(b, (0, r - b.shape[1]))


def svd(loras: list[Lora], r: int) -> tuple[Tensor, Tensor]:
    change = sum(w * (s * (b @ a)) for w, s, a, b in loras)  # (out, in)
    u, size, v = torch.linalg.svd(change, full_matrices=False)  # size (min(out, in),)
    return filled(v[:r], u[:, :r] * size[:r], r)


def linear(loras: list[Lora], r: int) -> tuple[Tensor, Tensor]:
    total_a = total_b = 0.0
    for w, s, *pair in loras:
        (a, b), root = filled(*pair, r), abs(w * s) ** 0.5
        total_a = total_a + (root if w * s >= 0 else -root) * a
        total_b = total_b + root * b
    return total_a, total_b


def cat(loras: list[Lora], r: int) -> tuple[Tensor, Tensor]:
    a = torch.cat([w * a * s for w, s, a, _ in loras])
    b = torch.cat([b for *_, b in loras], dim=1)
    return filled(a, b, r)


COMBINATIONS = {"svd": svd, "linear": linear, "cat": cat}


def weighted_adapter(
    model: nn.Module,
    adapters: list[Adapter],
    weights: list[float],
    combination_type: str,
    svd_rank: int | None,
) -> LayerAdapter:
    """A frozen LoRA for a bare model that is the weighted sum of others.

    Raises ValueError for another method than LoRA, an unknown combination, weights that are no
    numbers or not as many, and different ranks under "linear".
    """
    configs = [adapter.config for adapter in adapters]
    for config in configs:
        if config.peft_type not in ("LORA", "QLORA"):
            raise ValueError(f"{config.peft_type} has no weighted sum: only LoRAs can be added up")
        if getattr(config, "trainable_token_indices", None):
            raise ValueError("trained token rows have no weighted sum")
    if combination_type not in COMBINATIONS:
        known = ", ".join(COMBINATIONS)
        raise ValueError(f"combination_type is {combination_type!r}; there are: {known}")
    finite = all(isinstance(w, int | float) and math.isfinite(w) for w in weights)
    if not (finite and adapters and len(weights) == len(adapters)):
        raise ValueError(f"weights are {weights!r}: give a number for each of the adapters")
    combination_type = "linear" if len(adapters) == 1 else combination_type
    ranks = [max([c.r, *getattr(c, "rank_pattern", {}).values()]) for c in configs]
    if combination_type == "linear" and len(set(ranks)) > 1:
        raise ValueError(f"linear needs LoRAs of one rank, and these have {ranks}: take svd or cat")
    r = {"svd": svd_rank or max(ranks), "linear": ranks[0], "cat": sum(ranks)}[combination_type]
    targets = [config.target_modules for config in configs]
    if any(isinstance(target, str) for target in targets):  # the names of them all, as one regex
        joined = "|".join(dict.fromkeys(re.escape(n) for a in adapters for n in a.layers))
    else:
        joined = sorted({name for target in targets for name in target})
    config = type(configs[0])(
        r=r, lora_alpha=r, target_modules=joined, task_type=configs[0].task_type,
        lora_dropout=configs[0].lora_dropout, inference_mode=True,
    )  # fmt: skip
    summed = make_adapter(model, config)
    with torch.no_grad():
        for name, layer in summed.layers.items():
            pairs = zip(weights, adapters, strict=True)
            found = [(w, adapter.layers[name]) for w, adapter in pairs if name in adapter.layers]
            loras = [(w, x.scaling, x.lora_A.weight, x.lora_B.weight) for w, x in found]
            a, b = COMBINATIONS[combination_type](loras, r)
            layer.lora_A.weight.copy_(a)
            layer.lora_B.weight.copy_(b)
    return summed
