"""What is measured on a model: losses, completions, and bytes."""

import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minipeft.base_model import checkpoint_activations, context_length
from minipeft.lab import tasks
from minipeft.lab.base import Base
from minipeft.lab.tasks import Example
from minipeft.lab.train import autocast, bar_options


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


def rows_per_batch(model: nn.Module, length: int, most: int) -> int:
    """How many rows of this length: at most 2^24 logits, which take 64 MB. With a vocabulary of
    50,000 they need more memory than anything else."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 1)
    return max(1, min(most, 2**24 // (length * vocabulary)))


def text_loss(model: nn.Module, rows: Tensor, batch_size: int = 32) -> float:
    """Mean loss per token on windows of plain text (n, t), in nats.

    Each window's tokens 1 … t - 1 are predicted, for every method: the first one is not, although
    a virtual token in front of it could.
    """
    losses, size = [], rows_per_batch(model, rows.shape[1], batch_size)
    with evaluating(model) as device:
        for ids in rows.to(device).split(size):
            logits = model(ids).logits[:, :-1].float()  # (b, t - 1, v)
            losses.append(F.cross_entropy(logits.mT, ids[:, 1:], reduction="none"))  # (b, t - 1)
    return torch.cat(losses).mean().item()


def task_loss(model: nn.Module, examples: list[Example], end: int, batch_size: int = 64) -> dict:
    """Mean loss per token of the completions: loss, and slot_loss and template_loss if there are
    slots."""
    longest = max(len(e.prompt_ids) + len(e.completion_ids) for e in examples)
    losses, size = [], rows_per_batch(model, longest, batch_size)
    with evaluating(model) as device:
        for i in progress(range(0, len(examples), size), "loss"):
            batch = tasks.collate(examples[i : i + size], end, device)
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
        for i in progress(range(0, len(examples), batch_size), "completions"):
            prompts = [e.prompt_ids for e in examples[i : i + batch_size]]
            ids, mask = tasks.pad_left(prompts, base.end, device)
            room = context_length(model) - virtual_tokens(model) - ids.shape[1]
            new = continue_ids(model, base, ids, mask, max_new_tokens=min(longest, room))
            texts += base.tokenizer.decode_batch(new.tolist())
    return texts


def continue_ids(model: nn.Module, base: Base, ids: Tensor, mask: Tensor, **options) -> Tensor:
    """The tokens with which a model continues prompts (b, t), until the base's end token."""
    if base.hf_tokenizer is not None:  # else transformers takes what generation_config.json says
        options = {"do_sample": False, "pad_token_id": base.end} | options
        for name in ("temperature", "top_k", "top_p") if not options["do_sample"] else ():
            options[name] = None
    out = model.generate(input_ids=ids, attention_mask=mask, eos_token_id=base.end, **options)
    return out[:, ids.shape[1] :]


def progress(items, title: str):
    """A progress bar, once something has taken three seconds."""
    return tqdm(items, title, delay=3, leave=False, **bar_options())


def virtual_tokens(model: nn.Module) -> int:
    """How many positions of the context a prompt method's adapter takes."""
    configs = getattr(model, "peft_config", {}).values()
    return max((getattr(config, "num_virtual_tokens", 0) for config in configs), default=0)


def activation_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that one forward pass keeps for the backward pass, without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
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


def disk_bytes(model: nn.Module, saved: str | None = None) -> int:
    """Bytes of the weights that a task needs on disk: an adapter's, or the whole model's. saved:
    the folder that it is saved in already, if it is."""
    with tempfile.TemporaryDirectory() as folder:
        if saved is None:
            model.save_pretrained(folder)
        files = Path(saved or folder).rglob("*.safetensors")
        return sum(f.stat().st_size for f in files if f.name != "checkpoint.safetensors")


def checkpoint_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict:
    """Turn gradient checkpointing on: only the blocks' inputs are kept, the rest is recomputed.

    Returns how many bytes that saves, and how many seconds a forward and backward pass of this
    batch takes longer (medians of three).
    """
    state, found = torch.get_rng_state(), []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model)
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
