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

import torch
import torch.nn.functional as F
from torch import Tensor

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
