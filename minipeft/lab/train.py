"""The training loop, for pretraining and for fine-tuning.

Each training step: batch, forward, loss, backward, clip the gradients, optimizer step. The rest is
for several processes (parallel.py), checkpoints (checkpoint.py), AdaLoRA and a progress bar.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minipeft.lab import parallel
from minipeft.lab.checkpoint import Checkpoint, Stopped, delayed_interrupt
from minipeft.lab.recipes import Recipe, RunConfig
from minipeft.peft_model import PeftModel


@dataclass
class TrainingResult:
    """The measurements of a training run."""

    losses: list[float]  # per step, without AdaLoRA's penalty
    seconds_per_step: float  # median over the steps after the first 10 %
    gradient_bytes: int
    optimizer_bytes: int
    bytes_sent_per_step: int | None  # by this process; None if it is the only one
    paging: dict[str, int] | None  # counters of a PagedAdamW


def train(
    model: nn.Module,
    batches: Iterable[list[dict[str, Tensor]]],
    run: RunConfig,
    recipe: Recipe | None = None,
    after_step: Callable[[dict], None] = lambda row: None,
    checkpoint: Checkpoint | None = None,
    title: str = "training",
) -> TrainingResult:
    """Train all parameters that require a gradient.

    batches: yields one list per step, from step 1: the micro-batches of that step, on the model's
    device. Each is weighted by its number of labelled tokens, so that the sum of their gradients is
    the gradient of the mean loss per token of the whole batch. recipe: says which optimizer, and
    which parameters have learning rates of their own; without one, AdamW and the run's rate. All
    rates follow the run's schedule. after_step: called with a dict: step, loss, learning_rate,
    seconds. checkpoint: if it has a saved state, training continues from it.
    Raises ValueError if no parameter is trainable, a micro-batch has no labelled tokens, or weights
    would decay by more than what they are;
    FloatingPointError if a loss is not finite; Stopped after Ctrl-C or SIGTERM, once the step is
    finished and the checkpoint (if any) written, unless it was the last step.
    """
    replicas = parallel.Replicas(model)  # called like the model; averages gradients over processes
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no trainable parameters: the whole model is frozen")
    groups: list[dict] = [{"params": parameters}]
    if recipe is not None and recipe.groups is not None:
        groups = recipe.groups(model, run.learning_rate)
    highest = max(group.get("lr", run.learning_rate) for group in groups)
    rate = highest if run.decay_to == "zero" else run.learning_rate
    if rate * run.weight_decay >= 1:
        raise ValueError(
            f"learning rate {rate:g} x weight decay {run.weight_decay:g} is the share "
            "by which weights decay per step: it must be below 1"
        )
    make_optimizer = (recipe and recipe.optimizer) or torch.optim.AdamW
    optimizer = make_optimizer(
        with_decay(groups, run), lr=run.learning_rate, betas=(0.9, run.beta2)
    )
    ratios = [group["lr"] / run.learning_rate for group in optimizer.param_groups]
    initial = [p.detach().clone() for p in parameters] if run.decay_to == "start" else []
    losses: list[float] = []
    seconds: list[float] = []
    done = 0  # steps already done, if a stopped run is resumed
    if checkpoint is not None:
        checkpoint.lists |= {"losses": losses, "seconds": seconds}  # `load` fills them
        done = checkpoint.load(model, optimizer)
    device = parameters[0].device
    no_bar = bar_options(run.quiet or parallel.rank() != 0)
    remaining = islice(batches, done, run.steps)
    bar = tqdm(remaining, title, run.steps, initial=done, mininterval=0.5, **no_bar)
    model.train()
    with delayed_interrupt() as interrupts:
        for step, micro_batches in enumerate(bar, done + 1):
            began = time.perf_counter()
            learning_rate = run.learning_rate_at(step)
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] = ratio * learning_rate
            loss = 0.0  # of the whole batch
            for micro_batch, weight in zip(micro_batches, weights(micro_batches), strict=True):
                with replicas.sync_gradients_if(micro_batch is micro_batches[-1]):
                    with autocast(device):
                        micro_loss = replicas(**micro_batch).loss
                    (micro_loss * weight).backward()
                loss += without_penalty(micro_loss, model) * weight
            loss = parallel.mean(loss, device)  # over the processes
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step}; try a lower learning rate"
                )
            norm = nn.utils.clip_grad_norm_(parameters, run.max_grad_norm)
            if not norm.isfinite():
                raise FloatingPointError(f"the gradient's norm is {norm} at step {step}")
            if run.decay_to == "start":
                decay_to_start(parameters, initial, learning_rate * run.weight_decay)
            optimizer.step()
            if isinstance(model, PeftModel):
                model.update_and_allocate(step)  # for AdaLoRA, which needs the gradients
            optimizer.zero_grad()

            losses.append(loss)
            seconds.append(time.perf_counter() - began)
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{learning_rate:.1e}", refresh=False)
            row = {"step": step, "loss": loss, "learning_rate": learning_rate}
            after_step(row | {"seconds": seconds[-1]})  # the caller may log and validate
            stopping = parallel.mean(len(interrupts), device) > 0  # all processes stop together
            if checkpoint is not None:
                checkpoint.save_if_due(model, optimizer, step, stopping)
            if stopping and step < run.steps:
                where = f"; its state is in {checkpoint.file}" if checkpoint else ""
                raise Stopped(f"stopped after step {step} of {run.steps}{where}", bool(checkpoint))
    state = optimizer.state_dict()["state"].values()
    tensors = [t for entry in state for t in entry.values() if torch.is_tensor(t)]
    return TrainingResult(
        losses=losses,
        seconds_per_step=statistics.median(seconds[run.steps // 10 :]),
        gradient_bytes=sum(p.nbytes for p in parameters),  # as large as the parameters
        optimizer_bytes=sum(t.nbytes for t in tensors),
        bytes_sent_per_step=replicas.sent // (run.steps - done) if replicas.sent else None,
        paging=getattr(optimizer, "counters", None),
    )


def weights(micro_batches: list[dict[str, Tensor]]) -> list[float]:
    """Each micro-batch's share of the labelled tokens of the step: count / total.

    With several processes, the total is the mean over processes and not the sum: averaging the
    gradients divides by the number of processes once more.
    """
    labels = [batch["labels"][:, 1:] for batch in micro_batches]  # the first token is not predicted
    counts = [int((targets != -100).sum()) for targets in labels]
    if not all(counts):
        raise ValueError("a micro-batch has no labelled tokens: all its labels are -100")
    total = parallel.mean(sum(counts), labels[0].device)
    return [count / total for count in counts]


def with_decay(groups: list[dict], run: RunConfig) -> list[dict]:
    """Each parameter group in two. AdamW decays matrices towards zero, but not biases and the
    weights of LayerNorms. Decay towards the initial weights is left to `decay_to_start`."""
    decay = run.weight_decay if run.decay_to == "zero" else 0.0
    split = []
    for group in groups:
        matrices = [p for p in group["params"] if p.dim() > 1]
        vectors = [p for p in group["params"] if p.dim() <= 1]
        split.append(group | {"params": matrices, "weight_decay": decay})
        split.append(group | {"params": vectors, "weight_decay": 0.0})
    return split


@torch.no_grad()
def decay_to_start(parameters: list[nn.Parameter], initial: list[Tensor], amount: float) -> None:
    """Decoupled weight decay towards the initial weights: θ ← θ - ηλ (θ - θ₀)."""
    for p, start in zip(parameters, initial, strict=True):
        p.lerp_(start, amount)


def without_penalty(loss: Tensor, model: nn.Module) -> float:
    """The loss as a number, without AdaLoRA's penalty."""
    return (loss - model.penalty()).item() if isinstance(model, PeftModel) else loss.item()


def pick_device(name: str | None = None) -> torch.device:
    """The named device; without a name, the first of cuda, mps and cpu that works.

    Raises ValueError if a tensor cannot be made and read there.
    """
    for candidate in ("cuda", "mps", "cpu") if name is None else (name,):
        try:
            device = torch.device(candidate)
            torch.ones(1, device=device).item()
            return device
        except Exception as error:  # every kind of device has its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(f"device {name!r} cannot be used: {reason:.200}")


def bar_options(quiet: bool = False) -> dict:
    """For tqdm: no progress bar if it would fill a file or a pipe. (A notebook shows it.)"""
    shown = (sys.stderr and sys.stderr.isatty()) or "ipykernel" in sys.modules
    return {} if shown and not quiet else {"disable": True}


def autocast(device: torch.device):
    """bfloat16 arithmetic on GPUs with native bfloat16; no autocast on other devices."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()
