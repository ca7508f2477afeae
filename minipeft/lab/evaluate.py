"""What is measured on a model: losses, completions, and bytes."""

import os
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.lab import tasks
from minipeft.lab.base import Base
from minipeft.lab.tasks import Example
from minipeft.lab.train import autocast


@contextmanager
def evaluating(model: nn.Module):
    """Evaluation mode without gradients, on the device that is returned; restores the mode."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device):
            yield device
    finally:
        model.train(was_training)


def text_loss(model: nn.Module, rows: Tensor, batch_size: int = 32) -> float:
    """Mean loss per token on windows of plain text (n, t), in nats.

    Each window's tokens 1 … t - 1 are predicted, for every method: the first one is not, although
    a virtual token in front of it could.
    """
    losses = []
    with evaluating(model) as device:
        for ids in rows.to(device).split(batch_size):
            logits = model(ids).logits[:, :-1].float()  # (b, t - 1, v)
            losses.append(F.cross_entropy(logits.mT, ids[:, 1:], reduction="none"))  # (b, t - 1)
    return torch.cat(losses).mean().item()


def task_loss(model: nn.Module, examples: list[Example], end: int, batch_size: int = 64) -> dict:
    """Mean loss per token of the completions: loss, and slot_loss and template_loss if there are
    slots."""
    losses = []
    with evaluating(model) as device:
        for i in range(0, len(examples), batch_size):
            batch = tasks.collate(examples[i : i + batch_size], end, device)
            labels = batch.pop("labels")[:, 1:]  # (b, t - 1)
            logits = model(**batch).logits[:, :-1].float()  # (b, t - 1, v)
            each = F.cross_entropy(logits.mT, labels, reduction="none")  # (b, t - 1)
            losses.append(each[labels != -100].cpu())
    loss, slot = torch.cat(losses), torch.tensor([s for e in examples for s in e.is_slot])
    found = {"loss": loss.mean().item()}
    if slot.any():
        found["slot_loss"] = loss[slot].mean().item()
        found["template_loss"] = loss[~slot].mean().item()
    return found


def complete(model: nn.Module, base: Base, examples: list[Example], batch_size: int = 64):
    """Greedy completions of the examples' prompts, as texts."""
    texts = []
    longest = max(len(e.completion_ids) for e in examples) + 8
    with evaluating(model) as device:
        for i in range(0, len(examples), batch_size):
            prompts = [e.prompt_ids for e in examples[i : i + batch_size]]
            ids, mask = tasks.pad_left(prompts, base.end, device)
            room = model.config.n_positions - virtual_tokens(model) - ids.shape[1]
            limit = min(longest, room)
            out = model.generate(ids, mask, max_new_tokens=limit, eos_token_id=base.end)
            texts += base.tokenizer.decode_batch(out[:, ids.shape[1] :].tolist())
    return texts


def virtual_tokens(model: nn.Module) -> int:
    """How many positions of the context a prompt method's adapter takes."""
    configs = getattr(model, "peft_config", {}).values()
    return max((getattr(config, "num_virtual_tokens", 0) for config in configs), default=0)


def activation_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that one forward pass keeps for the backward pass, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        autocast(next(model.parameters()).device),
    ):
        loss = model(**batch).loss  # alive until here, so that no address is used twice
    del loss
    return sum(kept.values())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers in memory."""
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def disk_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a task needs on disk: an adapter's, or the whole model's."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(os.path.getsize(file) for file in Path(folder).rglob("*.safetensors"))


def checkpoint_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict:
    """Turn gradient checkpointing on: only the blocks' inputs are kept, the rest is recomputed.

    Returns how many bytes that saves, and how many seconds a forward and backward pass of this
    batch takes longer (medians of three).
    """
    state, found = torch.get_rng_state(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        kept, seconds = activation_bytes(model, batch), []
        for _ in range(4):
            began = time.perf_counter()
            with autocast(next(model.parameters()).device):
                loss = model(**batch).loss
            loss.backward()
            seconds.append(time.perf_counter() - began)
        found.append((kept, statistics.median(seconds[1:])))
    model.zero_grad()
    torch.set_rng_state(state)  # as if nothing had been tried
    (kept, quick), (fewer, slow) = found
    return {"bytes_saved": kept - fewer, "seconds_lost": slow - quick}
