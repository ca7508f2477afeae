"""The state of a run in one file: a stopped run continues, and ends exactly like one never stopped.

The file is safetensors: what is trained, the optimizer's state, AdaLoRA's allocator and the random
state; and, as JSON in its header, the step, the losses so far, and which run it belongs to. It is
written to a temporary file and renamed, so a kill at any moment leaves the old one or the new one.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT, default_int_handler, getsignal, signal
from threading import current_thread, main_thread

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from minipeft.gpt import write_file
from minipeft.lab import parallel
from minipeft.peft_model import PeftModel


@dataclass
class Checkpoint:
    """Where a run's state is kept, how often, and what must be equal to continue with it."""

    file: Path
    every: int  # steps; 0: only when the run is stopped
    identity: dict  # method, seed, data, …: plain values that identify the run
    lists: dict[str, list] = field(default_factory=dict)  # the run's growing lists, saved with it

    def save_if_due(self, model, optimizer, step: int, stopping: bool) -> None:
        if (stopping or (self.every and step % self.every == 0)) and parallel.rank() == 0:
            self.save(model, optimizer, step)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write the state after a step."""
        tensors = {f"model.{name}": tensor.detach() for name, tensor in trained(model).items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        about = {"identity": self.identity, "step": step, "lists": self.lists}
        header = {"format": "pt", "minipeft": json.dumps(about)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.file, lambda path: save_file(tensors, path, metadata=header))

    def read(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """The file's description of its run, and its tensors; step 0 and no tensors without a file.

        Raises ValueError for a damaged file and for one of another run.
        """
        if not self.file.is_file():
            return {"step": 0}, {}
        try:
            with safe_open(self.file, "pt") as opened:
                names = list(opened.keys())
                about = json.loads(opened.metadata()["minipeft"])
                then = about["identity"]
                found = {name: opened.get_tensor(name) for name in names}
        except Exception as error:  # safetensors has a class of its own for damaged files
            raise ValueError(f"{self.file} is not a checkpoint, or is damaged: {error}") from error
        now = json.loads(json.dumps(self.identity))
        differs = [k for k in sorted({*now, *then}) if now.get(k) != then.get(k)]
        if differs:
            listed = "; ".join(f"{k}: {then.get(k)!r}, not {now.get(k)!r}" for k in differs)
            raise ValueError(f"{self.file} is a checkpoint of another run ({listed})")
        return about, found

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore the saved state and return its step; 0 without a file."""
        about, found = self.read()
        for partial in self.file.parent.glob(f".{self.file.name}.*"):  # left by a kill
            partial.unlink()
        if not found:
            return 0
        of_model, of_optimizer = {}, {}
        for key, tensor in found.items():
            kind, name = key.split(".", 1)
            if kind == "model":
                of_model[name] = tensor
            elif kind == "optimizer":
                i, name = name.split(".", 1)
                of_optimizer.setdefault(int(i), {})[name] = tensor
        if isinstance(model, PeftModel):
            model.load_state_dict(of_model)
        else:
            with torch.no_grad():
                for name, tensor in trained(model).items():
                    tensor.copy_(of_model[name])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": of_optimizer})
        for name, values in about["lists"].items():
            self.lists[name][:] = values
        torch.set_rng_state(found["random.cpu"])
        if "random.cuda" in found and torch.cuda.is_available():
            torch.cuda.set_rng_state(found["random.cuda"])
        return about["step"]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: all adapters, or the parameters that require a gradient."""
    if isinstance(model, PeftModel):
        return model.state_dict()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def delayed_interrupt() -> Iterator[list]:
    """Ctrl-C no longer interrupts a step: it adds to the list. A second one interrupts at once.

    Only in the main thread, and only if nobody else handles Ctrl-C.
    """
    interrupts: list[int] = []

    def once(number: int, frame) -> None:
        interrupts.append(number)
        signal(SIGINT, default_int_handler)

    if current_thread() is not main_thread() or getsignal(SIGINT) is not default_int_handler:
        yield interrupts
        return
    signal(SIGINT, once)
    try:
        yield interrupts
    finally:
        signal(SIGINT, default_int_handler)
