"""Several processes: PyTorch's DistributedDataParallel and fully_shard, started by torchrun.

    torchrun --nproc_per_node=2 -m minipeft finetune --method lora --output out/lora

Each process has the whole model and its share of every batch. The gradients of trainable parameters
are averaged, and nothing else is sent: for LoRA, only the adapter's. Losses are weighted by their
tokens over all processes, so they equal those of one process with the same batch.

For a base that is too large for one device, `--shard` splits every tensor over the processes; a
block is gathered only while it is computed.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def start(device: str | None) -> str | None:
    """Join the other processes, if torchrun started any; returns this process's device.

    Raises ValueError if torchrun's variables are wrong, and for a device that is not there.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return device
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    found = {name: os.environ.get(name, "") for name in names}
    numbers = [int(text) if text.isdecimal() else -1 for text in found.values()]
    size, rank, local = numbers
    if min(numbers) < 0 or rank >= size or "MASTER_ADDR" not in os.environ:
        given = ", ".join(f"{name}={text!r:.20}" for name, text in found.items())
        raise ValueError(f"start several processes with torchrun, got {given}")
    kind = (device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"several processes need cpu or cuda, got --device {device}")
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"process {local} has no GPU: there are {torch.cuda.device_count()}")
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cpu":
        return "cpu"
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number. Process 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def mean(number: float, device: torch.device) -> float:
    """The mean of a number over all processes."""
    if world_size() == 1:
        return number
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64
    summed = torch.tensor(number, dtype=dtype, device=device)
    dist.all_reduce(summed)
    return summed.item() / world_size()


def share(batch: list) -> list:
    """This process's part of a batch. Raises ValueError if the parts would not be equal."""
    if len(batch) % world_size():
        raise ValueError(
            f"batch_size {len(batch)} must be a multiple of the {world_size()} processes"
        )
    return batch[rank() :: world_size()]


def shard(model: nn.Module, method: str) -> nn.Module:
    """Split a model's tensors over the processes, in place.

    Raises ValueError for a single process, and for methods other than full fine-tuning and LoRA.
    """
    if world_size() == 1:
        raise ValueError("--shard needs several processes: start them with torchrun")
    if method not in ("full", "lora"):
        raise ValueError(
            f"--shard works for full and lora, not for {method}: 4-bit weights are buffers, which "
            "are not sharded, and the other methods read whole tensors"
        )
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    blocks = max((m for m in base.modules() if isinstance(m, nn.ModuleList)), key=len)
    for block in blocks:
        fully_shard(block)
    fully_shard(base)
    return model


def reshard(model: nn.Module) -> None:
    """Split again what the last forward pass left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """In this context a sharded model's tensors are whole, for saving."""
    reshard(model)
    parts = [
        (module, name, p)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if isinstance(p, DTensor)
    ]
    whole = {p: nn.Parameter(p.full_tensor(), requires_grad=p.requires_grad) for *_, p in parts}
    for module, name, p in parts:
        setattr(module, name, whole[p])
    try:
        yield
    finally:
        for module, name, p in parts:
            setattr(module, name, p)


class Replicas:
    """A model as all processes run it: `run` computes, and `sent` counts the bytes of gradients."""

    def __init__(self, model: nn.Module):
        reshard(model)  # each process trains its shards
        self.model, self.run, self.sent = model, model, 0
        self.sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        if world_size() > 1 and not self.sharded:
            with warnings.catch_warnings():  # from torch 2.13 on the option has another name
                warnings.simplefilter("ignore", FutureWarning)
                self.run = DistributedDataParallel(model, broadcast_buffers=False)
            self.run.register_comm_hook(None, self._average)

    def __call__(self, *args, **kwargs):
        return self.run(*args, **kwargs)

    def _average(self, state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.sent += bucket.buffer().nbytes
        mean = bucket.buffer().div_(world_size())
        work = dist.all_reduce(mean, async_op=True).get_future()
        return work.then(lambda done: done.value()[0])

    def sync_gradients_if(self, last: bool):
        """Send gradients only with the last micro-batch of a step."""
        for module in self.sharded:
            module.set_requires_gradient_sync(last, recurse=False)
        return nullcontext() if last or self.run is self.model else self.run.no_sync()
