"""LoRA+: a higher learning rate for B than for A.

LoRA multiplies two factors. At the start B is zero and A is not, and with one learning rate for
both, a wide layer learns too little from each step. LoRA+ gives B a rate that is λ times the rate
of A. Nothing else changes: it is LoRA, trained with other parameter groups.

Paper: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354.

    A ← A - η Adam(∂L/∂A),    B ← B - λ η Adam(∂L/∂B)          (1)  section 4; the paper uses λ = 16

As in Hugging Face peft's `create_loraplus_optimizer`, vectors (such as biases, and DoRA's lengths)
get the higher rate too.

>>> groups = lora_plus_groups(model, lr=1e-4)
>>> optimizer = torch.optim.AdamW(groups)
"""

from torch import nn


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16) -> list[dict]:
    """Parameter groups for an optimizer: A with the rate `lr`, B with `ratio` times that.

    Raises ValueError for a ratio below 1, and for a model without a trainable `lora_B`.
    """
    if not ratio >= 1:
        raise ValueError(f"ratio must be at least 1, got {ratio!r}")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any("lora_B" in name for name in trained):
        raise ValueError("LoRA+ needs a LoRA: no trainable parameter is called lora_B")
    faster = [p for name, p in trained.items() if "lora_B" in name or p.dim() == 1]
    slower = [p for name, p in trained.items() if not ("lora_B" in name or p.dim() == 1)]
    return [{"params": slower, "lr": lr}, {"params": faster, "lr": ratio * lr}]  # (1)


if __name__ == "__main__":  # one step of Adam moves each number by its learning rate
    import torch

    torch.manual_seed(0)
    model = nn.Sequential()
    for name, sizes in {"lora_A": (20, 2), "lora_B": (2, 30)}.items():
        model.add_module(name, nn.Linear(*sizes, bias=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(lora_plus_groups(model, lr=1e-3))
    model(torch.randn(64, 20)).square().mean().backward()
    optimizer.step()
    a, b = ((p - before[name]).abs().mean().item() for name, p in model.named_parameters())
    assert abs(b / a - 16) < 0.01
    print(f"lora_plus.py: A moved by {a:.4f} and B by {b:.4f}")
