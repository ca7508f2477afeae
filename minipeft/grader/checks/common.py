"""What the checks of several methods need: a task to train on, and a layer with W transposed."""

from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor, nn

from minipeft.gpt import GPT
from minipeft.lab import DATA
from minipeft.lab.base import load_base
from minipeft.lab.tasks import load_task, shuffled

from .. import training
from ..symptoms import Wrong

STEPS = 10


class Conv1D(nn.Module):
    """Like transformers' layer of this name: W is stored as (in, out)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


@cache
def describe() -> tuple[GPT, list[dict[str, Tensor]], int]:
    """The 0.3M base, ten batches of the task `describe`, and the end token."""
    base = load_base(DATA / "base" / "0.3m")
    examples = load_task(base, "describe").train
    batches = []
    for _, batch in zip(range(STEPS), shuffled(examples, 8, 0), strict=False):
        pairs = [(example.prompt_ids, example.completion_ids) for example in batch]
        batches.append(training.collate(pairs, base.end))
    return base.model(), batches, base.end


def losses(parameters: Iterable[nn.Parameter], logits: Callable, peak: float) -> list[float]:
    """Ten training losses on `describe`: AdamW on these parameters."""
    batches = describe()[1]
    optimizer = torch.optim.AdamW(list(parameters), weight_decay=0.0)
    found = []
    for step, batch in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, STEPS, peak, 2)
        counted = (batch["labels"][:, 1:] != -100).sum()
        loss = training.summed_loss(logits(batch), batch["labels"]) / counted
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def compare_losses(found: list[float], expected: list[float], tolerance: float = 2e-3) -> None:
    """Raise Wrong at the first step whose loss differs."""
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True), 1):
        if not abs(mine - theirs) <= tolerance:
            first = "before anything was trained" if step == 1 else f"equal up to step {step - 1}"
            raise Wrong(f"the loss of step {step} is {mine:.4f}, expected {theirs:.4f} ({first})")
