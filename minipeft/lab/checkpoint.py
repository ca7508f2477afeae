"""A run's state in one file: stopped and gone on with, it ends in the bits of a run never stopped.

The file is safetensors: what is trained, the optimizer's state, AdaLoRA's allocator, the random
state; and, as JSON in its header, the step, the losses so far, and what run it belongs to. It is
written beside its place and renamed, so a kill at any moment leaves the old one or the new one.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT, Handlers, default_int_handler, getsignal, signal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from minipeft.peft_model import write_file


@dataclass
class Checkpoint:
    """Where a run's state is kept, how often, and what has to be the same to go on with it."""

    file: Path
    every: int  # steps
    run: dict  # method, seed, data, …: plain values; they have to be equal on resuming
    kept: dict[str, list] = field(default_factory=dict)  # the run's growing lists, saved with it

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write the state after a step."""
        tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        allocator = getattr(model, "allocator", None)
        if allocator is not None:
            tensors |= {f"allocator.{k}": v for k, v in allocator.state_dict().items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        about = {"run": self.run, "step": step, "kept": self.kept}
        header = {"format": "pt", "minipeft": json.dumps(about)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.file, lambda path: save_file(tensors, path, metadata=header))

    def read(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """What the file says of its run, and its tensors; step 0 and none where there is no file.

        Raises ValueError for a damaged file, and for one of another run.
        """
        if not self.file.is_file():
            return {"step": 0}, {}
        try:
            with safe_open(self.file, "pt") as opened:
                names = list(opened.keys())
                about = json.loads(opened.metadata()["minipeft"])
                found = {name: opened.get_tensor(name) for name in names}
        except Exception as error:  # safetensors has a class of its own for damaged files
            raise ValueError(f"{self.file} is no checkpoint, or is damaged: {error}") from error
        run, then = json.loads(json.dumps(self.run)), about["run"]
        differs = [k for k in sorted({*run, *then}) if run.get(k) != then.get(k)]
        if differs:
            told = "; ".join(f"{k}: {then.get(k)!r}, not {run.get(k)!r}" for k in differs)
            raise ValueError(f"{self.file} is a checkpoint of another run ({told})")
        return about, found

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Put the saved state back, and return its step; 0 where there is no file."""
        about, found = self.read()
        for half in self.file.parent.glob(f".{self.file.name}.*"):  # left by a kill while writing
            half.unlink()
        if not found:
            return 0

        def part(kind: str) -> dict:
            start = f"{kind}."
            return {n.removeprefix(start): t for n, t in found.items() if n.startswith(start)}

        with torch.no_grad():
            trained = dict(model.named_parameters())
            for name, tensor in part("model").items():
                trained[name].copy_(tensor)
        packed = optimizer.state_dict()
        packed["state"] = {}
        for key, tensor in part("optimizer").items():
            i, name = key.split(".", 1)
            packed["state"].setdefault(int(i), {})[name] = tensor
        optimizer.load_state_dict(packed)
        if part("allocator"):
            model.allocator.load_state_dict(part("allocator"))
        for name, values in about["kept"].items():
            self.kept[name][:] = values
        torch.set_rng_state(found["random.cpu"])
        if "random.cuda" in found and torch.cuda.is_available():
            torch.cuda.set_rng_state(found["random.cuda"])
        return about["step"]


@contextmanager
def finishing_the_step() -> Iterator[list]:
    """Ctrl-C ends a run after its step: the list is no longer empty. A second one ends it at once.

    Only in the main thread, and where nobody else handles Ctrl-C.
    """
    asked: list[int] = []

    def once(number: int, frame) -> None:
        asked.append(number)
        signal(SIGINT, default_int_handler)

    before = getsignal(SIGINT)
    try:
        if before in (default_int_handler, Handlers.SIG_DFL):
            signal(SIGINT, once)
    except ValueError:  # not the main thread
        pass
    try:
        yield asked
    finally:
        if asked or getsignal(SIGINT) is once:
            signal(SIGINT, before)
