"""More than one process: PyTorch's DistributedDataParallel, started by torchrun.

    torchrun --nproc_per_node=2 -m minipeft finetune --method lora --output out/lora

Each process has the whole model and its share of every batch; the gradients of what is trained are
averaged, and nothing else is sent: for LoRA that is the adapter alone. Losses are weighted by their
tokens over all processes, so they are those of one process with the same batch.

For a base that is too large for one device, `--shard` cuts every tensor into as many parts as there
are processes (PyTorch's fully_shard); a block is put together just while it is computed.
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
    """Join the other processes, if torchrun started any; returns the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if not on_gpu:
        return "cpu"
    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; the first, 0, writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(number: float, device: torch.device) -> float:
    """The sum of a number over all processes."""
    if world() == 1:
        return number
    summed = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.item()


def share(batch: list) -> list:
    """This process' part of a batch. Raises ValueError where the parts would not be equal."""
    if len(batch) % world():
        raise ValueError(
            f"a batch of {len(batch)} cannot be shared by {world()} processes: make it a multiple"
        )
    return batch[rank() :: world()]


def shard(model: nn.Module, method: str) -> nn.Module:
    """Cut a model's tensors into a part a process; in place.

    Raises ValueError for one process, and for a method other than full fine-tuning and LoRA.
    """
    if world() == 1:
        raise ValueError("--shard needs several processes: start them with torchrun")
    if method not in ("full", "lora"):
        raise ValueError(
            f"--shard is for full and lora, not {method}: 4-bit weights are buffers, which are not "
            "sharded, and the other methods read tensors whole"
        )
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for block in base.transformer.h:
        fully_shard(block)
    fully_shard(base)
    return model


def reshard(model: nn.Module) -> None:
    """Take apart what the last forward pass has left together, so that parameters are the parts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def put_together(model: nn.Module) -> Iterator[None]:
    """In this context a sharded model's tensors are whole, to be saved."""
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


class Replicated:
    """A model as all processes run it: `run` computes, and `sent` counts the bytes of gradients."""

    def __init__(self, model: nn.Module):
        self.model, self.run, self.sent = model, model, 0
        self.sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        if world() > 1 and not self.sharded:
            with warnings.catch_warnings():  # from 2.13 on the option has another name
                warnings.simplefilter("ignore", FutureWarning)
                self.run = DistributedDataParallel(model, broadcast_buffers=False)
            self.run.register_comm_hook(None, self._average)

    def _average(self, state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.sent += bucket.buffer().nbytes
        mean = bucket.buffer().div_(world())
        work = dist.all_reduce(mean, async_op=True).get_future()
        return work.then(lambda done: done.value()[0])

    def alone(self, last: bool):
        """Gradients are sent with the last of the micro-batches, and not before."""
        for module in self.sharded:
            module.set_requires_gradient_sync(last, recurse=False)
        return nullcontext() if last or self.run is self.model else self.run.no_sync()
