r"""Weighted sums of LoRAs: one new LoRA that combines several, each with a weight.

The updates of a weight add up, ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ, but a LoRA stores two factors and not ΔW itself.
There are three ways to choose the new factors; names and numbers are those of Hugging Face peft:

    cat      A = [w₁ s₁ A₁; w₂ s₂ A₂; …],  B = [B₁, B₂, …]       exact; ranks add up       (1)
    svd      B A = the nearest matrix of rank r to ΔW            as good as rank r allows  (2)
    linear   A = Σ ±√|wᵢ sᵢ| Aᵢ,  B = Σ √|wᵢ sᵢ| Bᵢ              for LoRAs of equal rank   (3)

With more than one LoRA, "linear" is not a weighted sum: its B A also holds the cross terms Bᵢ Aⱼ of
every pair. The sign of a weight goes to A.

Shapes: Aᵢ (rᵢ, in), Bᵢ (out, rᵢ), ΔW (out, in); wᵢ is a LoRA's weight, sᵢ = αᵢ / rᵢ its scaling.
The result has a scaling of 1. (peft scales it by √r if the first LoRA has `use_rslora`.)
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.adapter import Adapter
from minipeft.adapters import make_adapter

Lora = tuple[float, float, Tensor, Tensor]  # wᵢ, sᵢ, Aᵢ, Bᵢ


def padded(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), with zeros for unused ranks."""
    return F.pad(a, (0, 0, 0, r - len(a))), F.pad(b, (0, r - b.shape[1]))


def svd(loras: list[Lora], r: int) -> tuple[Tensor, Tensor]:
    update = sum(w * (s * (b @ a)) for w, s, a, b in loras)  # (out, in)
    u, sizes, v = torch.linalg.svd(update, full_matrices=False)  # sizes (min(out, in),)
    return padded(v[:r], u[:, :r] * sizes[:r], r)  # (2)


def linear(loras: list[Lora], r: int) -> tuple[Tensor, Tensor]:
    total_a = total_b = 0.0
    for w, s, a, b in loras:
        a, b = padded(a, b, r)
        root = abs(w * s) ** 0.5
        total_a = total_a + math.copysign(root, w * s) * a  # (3)
        total_b = total_b + root * b
    return total_a, total_b


def cat(loras: list[Lora], r: int) -> tuple[Tensor, Tensor]:
    a = torch.cat([w * a * s for w, s, a, _ in loras])  # (1)
    b = torch.cat([b for *_, b in loras], dim=1)
    return padded(a, b, r)


COMBINATIONS = {"svd": svd, "linear": linear, "cat": cat}


def weighted_adapter(
    model: nn.Module,
    adapters: list[Adapter],
    weights: list[float],
    combination_type: str,
    svd_rank: int | None,
) -> Adapter:
    """A frozen LoRA for a bare model: the weighted sum of other LoRAs.

    Raises ValueError for other methods, an unknown combination, weights that are not numbers or
    not one per adapter, and unequal ranks with "linear".
    """
    configs = [adapter.config for adapter in adapters]
    for config in configs:
        if config.peft_type != "LORA":
            raise ValueError(f"{config.peft_type} has no weighted sum: only LoRAs can be added")
        if config.use_dora or config.init_lora_weights == "pissa":
            what = "DoRA" if config.use_dora else "PiSSA"
            raise ValueError(f"{what} has no weighted sum (a saved PiSSA that is loaded is a LoRA)")
        if config.trainable_token_indices:
            raise ValueError("a LoRA with trained token rows has no weighted sum")
    if combination_type not in COMBINATIONS:
        known = ", ".join(COMBINATIONS)
        raise ValueError(f"combination_type must be one of {known}, got {combination_type!r}")
    finite = all(isinstance(w, int | float) and math.isfinite(w) for w in weights)
    if not (finite and adapters and len(weights) == len(adapters)):
        raise ValueError(f"weights must be one number per adapter, got {weights!r}")
    combination_type = "linear" if len(adapters) == 1 else combination_type  # exact for one
    ranks = [config.r for config in configs]
    if combination_type == "linear" and len(set(ranks)) > 1:
        raise ValueError(f"linear needs LoRAs of equal rank, got {ranks}: use svd or cat")
    r = {"svd": svd_rank or max(ranks), "linear": ranks[0], "cat": sum(ranks)}[combination_type]
    names = set()
    for adapter in adapters:  # instead of a regex, the full names of what it matched
        listed = adapter.config.target_modules
        names |= set(adapter.layers if isinstance(listed, str) else listed)
    config = replace(
        configs[0], r=r, lora_alpha=r, use_rslora=False, target_modules=sorted(names),
        inference_mode=True,
    )  # fmt: skip
    summed = make_adapter(model, config)
    with torch.no_grad():
        for name, layer in summed.layers.items():
            pairs = zip(weights, adapters, strict=True)
            found = [(w, adapter.layers[name]) for w, adapter in pairs if name in adapter.layers]
            wide = layer.lora_A.weight.dtype  # at least float32: PyTorch has no SVD in float16
            loras = [
                (w, x.scaling, x.lora_A.weight.to(wide), x.lora_B.weight.to(wide)) for w, x in found
            ]
            a, b = COMBINATIONS[combination_type](loras, r)
            layer.lora_A.weight.copy_(a)
            layer.lora_B.weight.copy_(b)
    return summed
