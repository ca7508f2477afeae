"""The training loop: what every method in this repository has in common.

A language model is fine-tuned on pairs of a prompt and a completion. Both are tokens of one row,
but the loss is taken on the completion alone: the labels of the prompt and of the padding are -100,
which the loss ignores. The logits at position i predict the token at position i + 1. A large batch
can be cut into micro-batches that fit into memory: their gradients add up. They have unequal
numbers of labelled tokens, so each loss is divided by the number of the whole step.

    loss = -1/n Σ_i log softmax(logits_i)[labels_{i+1}]                                (1)
    η_s = η s / w  while s ≤ w,   then  η (1 + cos(π (s - 1 - w) / (S - w))) / 2       (2)

The sum is over the n positions whose next label is not -100, in all micro-batches of the step.
Steps s count from 1 to S; w of them are warm-up; η is the peak of the learning rate, which
would be zero at step S + 1.
Shapes: b batch, t tokens, v vocabulary; input_ids, attention_mask, labels (b, t), logits (b, t, v).
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pad_right(rows: list[list[int]], value: int) -> Tensor:
    """Rows of unequal length as one tensor (b, t): the end of short rows is filled with a value."""
    t = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (t - len(row)) for row in rows])  # (b, t)


def collate(examples: list[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """(prompt, completion) pairs of tokens as a batch, padded on the right with `pad`.

    Returns input_ids, attention_mask (1 for tokens, 0 for padding) and labels, each (b, t).
    """
    rows = [prompt + completion for prompt, completion in examples]
    labels = [[-100] * len(prompt) + completion for prompt, completion in examples]
    return {
        "input_ids": pad_right(rows, pad),
        "attention_mask": pad_right([[1] * len(row) for row in rows], 0),
        "labels": pad_right(labels, -100),
    }


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum in equation (1) for one micro-batch, a scalar."""
    logits, labels = logits[:, :-1], labels[:, 1:]  # position i predicts token i + 1
    logits, labels = logits.flatten(0, 1), labels.flatten()  # (b (t - 1), v), (b (t - 1))
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Equation (2): linear warm-up, then a cosine down to zero. Steps count from 1."""
    if step <= warmup:
        return peak * step / warmup
    done = (step - 1 - warmup) / (steps - warmup)
    return peak * (1 + math.cos(math.pi * done)) / 2  # (2)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[dict[str, Tensor]],
    max_norm: float = 1.0,
) -> float:  # fmt: skip
    """One step: the gradients of all micro-batches together, clipped to a norm.

    The model is called with input_ids and attention_mask, and returns an object with the logits.
    Returns the loss (1) before the update, as a number.
    """
    n = sum((batch["labels"][:, 1:] != -100).sum().item() for batch in micro_batches)
    optimizer.zero_grad()
    total = 0.0
    for batch in micro_batches:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = summed_loss(logits, batch["labels"]) / n  # (1)
        loss.backward()  # gradients add up
        total += loss.item()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)
    optimizer.step()
    return total


def train(
    model: nn.Module, steps: Iterable[list[dict[str, Tensor]]], n: int, peak: float, warmup: int
) -> list[float]:
    """Train the parameters that require a gradient, for n steps, with AdamW without weight decay.

    steps: the micro-batches of each step; there may be more than n. Returns the losses.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=0.0)
    model.train()
    losses = []
    for step, micro_batches in zip(range(1, n + 1), steps, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n, peak, warmup)
        losses.append(training_step(model, optimizer, micro_batches))
    return losses


if __name__ == "__main__":  # learn which token follows the prompt
    from types import SimpleNamespace

    torch.manual_seed(0)

    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 7)  # the logits of the next token, by token

        def forward(self, input_ids, attention_mask=None):
            return SimpleNamespace(logits=self.table(input_ids))

    batch = collate([([1, 2], [3, 4]), ([5], [6])], pad=0)
    losses = train(Bigram(), [[batch]] * 100, n=100, peak=0.3, warmup=10)
    assert losses[-1] < 0.01, "it must learn 2 -> 3, 3 -> 4 and 5 -> 6"
    print(f"training.py: the loss fell from {losses[0]:.2f} to {losses[-1]:.4f}")
