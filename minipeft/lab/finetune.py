"""The training loop, for pretraining and for fine-tuning, and what is measured around it."""

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm


def pick_device(name: str | None = None) -> torch.device:
    """The device to compute on: the one named, else cuda, else mps, else cpu."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    return torch.device(name)


def autocast(device: torch.device):
    """bfloat16 arithmetic on CUDA, nothing elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def train(
    model: nn.Module,
    batches: Iterable[list[dict[str, Tensor]]],
    steps: int,
    learning_rate: float,
    warmup: int,
    final: float = 0.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    max_grad_norm: float = 1.0,
    each_step: Callable[[int, float], None] = lambda step, loss: None,
    title: str = "training",
) -> dict:
    """AdamW with linear warm-up, then a cosine down to `final` times the learning rate.

    `batches` yields a list of micro-batches a step (gradient accumulation); each is weighted by its
    labelled tokens, so the gradient is that of the whole batch. Returns losses by step, the median
    seconds a step (after the first tenth), and the optimizer. `each_step(step, loss)` is called
    after every step. Raises ValueError where nothing is trainable, FloatingPointError where a loss
    is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("nothing is trainable: every parameter of the model is frozen")
    groups = [  # as is usual, biases and norms do not decay
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas)
    span = max(steps - warmup, 1)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        cosine = (
            1 + torch.pi * 0 + float(torch.cos(torch.tensor(torch.pi * (step - warmup) / span)))
        ) / 2
        return final + (1 - final) * cosine

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    losses, seconds = [], []
    model.train()
    bar = tqdm(zip(range(steps), batches), total=steps, desc=title, mininterval=0.5)
    for step, micro in bar:
        start = time.perf_counter()
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in micro]
        total = 0.0
        for batch, count in zip(micro, counts, strict=True):
            with autocast(device):
                loss = model(**batch)[0] * (count / sum(counts))
            loss.backward()
            total += loss.item()
        if not torch.isfinite(torch.tensor(total)):
            raise FloatingPointError(
                f"the loss is {total} at step {step}: lower the learning rate (now {learning_rate})"
            )
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(total)
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
        each_step(step + 1, total)
    return {
        "losses": losses,
        "seconds_per_step": statistics.median(seconds[steps // 10 :]),
        "optimizer": optimizer,
    }
