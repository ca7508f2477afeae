"""The training loop, for pretraining and for fine-tuning."""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minipeft.lab import parallel
from minipeft.lab.checkpoint import Checkpoint, finishing_the_step
from minipeft.lab.recipes import RunConfig
from minipeft.peft_model import PeftModel


@dataclass
class Training:
    """What a training run leaves behind, besides the trained model."""

    losses: list[float]  # per step, without AdaLoRA's penalty
    seconds_per_step: float  # the median, without the first tenth
    gradient_bytes: int
    optimizer_bytes: int
    bytes_sent_per_step: int | None  # between processes
    paging: dict[str, int] | None  # the counters of a paged optimizer


def train(
    model: nn.Module,
    batches: Iterable[list[dict[str, Tensor]]],
    run: RunConfig,
    optimizer: Callable | None = None,
    after_step: Callable[[dict], None] = lambda row: None,
    checkpoint: Checkpoint | None = None,
    title: str = "training",
) -> Training:
    """Train whatever requires a gradient.

    batches: for every step, the micro-batches whose gradients are accumulated. Each counts by its
    labelled tokens, so the gradient is that of the whole batch. optimizer: makes one from parameter
    groups; by default AdamW. after_step: called with step, loss, learning rate and seconds.
    Raises ValueError if nothing is trainable, FloatingPointError if a loss is not finite.
    """
    parallel.reshard(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no trainable parameters: the whole model is frozen")
    optimizer = (optimizer or torch.optim.AdamW)(
        parameter_groups(parameters, run), lr=run.learning_rate, betas=(0.9, run.beta2)
    )
    initial = [p.detach().clone() for p in parameters] if run.decay_to == "start" else []
    losses: list[float] = []
    seconds: list[float] = []
    first = 0
    if checkpoint is not None:
        checkpoint.lists |= {"losses": losses, "seconds": seconds}
        first = checkpoint.load(model, optimizer)
    replicas, device = parallel.Replicas(model), parameters[0].device
    gradient_bytes = sum(p.nbytes for p in parameters)
    bar = tqdm(
        islice(batches, first, run.steps), total=run.steps, initial=first, desc=title,
        mininterval=0.5, **({"disable": True} if run.quiet or parallel.rank() else {}),
    )  # fmt: skip
    model.train()
    with finishing_the_step() as stop_requested:
        for step, micro_batches in enumerate(bar, first + 1):
            began, loss = time.perf_counter(), 0.0
            rate = run.learning_rate_at(step)
            counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches]
            n_tokens = parallel.total(sum(counts), device)
            for batch, n in zip(micro_batches, counts, strict=True):
                with replicas.sync_gradients_if(batch is micro_batches[-1]):
                    with autocast(device):
                        mean = replicas.run(**batch).loss  # forward
                    (mean * (n * parallel.world() / n_tokens)).backward()  # backward
                loss += without_penalty(mean, model) * n / n_tokens
            loss = parallel.total(loss, device)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step}: lower the learning rate ({rate:.1e})"
                )
            gradient_bytes = sum(p.grad.nbytes for p in parameters if p.grad is not None)
            nn.utils.clip_grad_norm_(parameters, run.max_grad_norm)  # clip
            for p, start in zip(parameters, initial, strict=bool(initial)):
                p.data.lerp_(start, rate * run.weight_decay)  # decay towards the initial weights
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()  # step
            if isinstance(model, PeftModel):
                model.update_and_allocate(step)
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.1e}", refresh=False)
            row = {"step": step, "loss": loss, "learning_rate": rate, "seconds": seconds[-1]}
            after_step(row)
            if checkpoint is not None:
                checkpoint.save_if_due(model, optimizer, step, bool(stop_requested))
            if stop_requested and step < run.steps:
                raise KeyboardInterrupt(f"stopped after step {step} of {run.steps}")
    state = optimizer.state_dict()["state"].values()
    return Training(
        losses=losses,
        seconds_per_step=statistics.median(seconds[run.steps // 10 :]),
        gradient_bytes=gradient_bytes,
        optimizer_bytes=sum(v.nbytes for s in state for v in s.values() if torch.is_tensor(v)),
        bytes_sent_per_step=replicas.sent // (run.steps - first) if replicas.sent else None,
        paging=getattr(optimizer, "counters", None),
    )


def parameter_groups(parameters: list[nn.Parameter], run: RunConfig) -> list[dict]:
    """Matrices decay towards zero; biases and norms do not. Towards the start, the loop does it."""
    decay = run.weight_decay if run.decay_to == "zero" else 0.0
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def without_penalty(loss: Tensor, model: nn.Module) -> float:
    """The task's loss: reports leave AdaLoRA's penalty out."""
    return (loss - model.penalty()).item() if isinstance(model, PeftModel) else loss.item()


def pick_device(name: str | None = None) -> torch.device:
    """The named device, else cuda, else mps, else cpu. Raises ValueError for an unusable one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {error}".splitlines()[0]) from error
    return device


def autocast(device: torch.device):
    """bfloat16 arithmetic on GPUs that compute in it natively; nothing elsewhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()
