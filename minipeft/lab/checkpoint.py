"""The state of a run in one file: a stopped run continues, and ends exactly like one never stopped.

The file is safetensors: what is trained, the optimizer's state, AdaLoRA's allocator and the random
state; and, as JSON in its header, the step, the losses so far, and which run it belongs to. It is
written to a temporary file and renamed, so a kill at any moment leaves the old one or the new one.
Before anything is loaded, it is compared with what `save` would write now.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIG_DFL, SIGINT, SIGTERM, default_int_handler, getsignal, signal
from threading import current_thread, main_thread

import torch
from torch import Tensor, nn

from minipeft.files import (
    STATE_DTYPES,
    has_type,
    mismatch,
    parse_json,
    read_header,
    read_tensors,
    write_tensors,
)
from minipeft.lab import parallel
from minipeft.peft_model import PeftModel

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None


class Stopped(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM, at the end of a step."""

    def __init__(self, message: str, saved: bool):
        super().__init__(message)
        self.saved = saved  # whether the run can be resumed from here


@dataclass
class Checkpoint:
    """Where a run's state is kept, how often, and what must be equal to continue with it."""

    file: Path
    every: int  # steps; 0: only when the run is stopped
    identity: dict  # method, seed, data, …: plain values that identify the run
    lists: dict[str, list] = field(default_factory=dict)  # the run's growing lists, saved with it
    resume: bool = True  # False: start over, even if there is a saved state

    def save_if_due(self, model, optimizer, step: int, stopping: bool) -> None:
        if (stopping or (self.every and step % self.every == 0)) and parallel.rank() == 0:
            self.save(model, optimizer, step)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write the state after a step."""
        tensors = {f"model.{name}": tensor.detach() for name, tensor in trained(model).items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        about = {"identity": self.identity, "step": step, "lists": self.lists}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.file, tensors | random_state(), {"minipeft": json.dumps(about)})

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore the saved state and return its step; 0 without a file.

        Raises ValueError, before anything changes, for a damaged file and for one of another run.
        """
        if not (self.resume and os.path.lexists(self.file)):
            return 0
        shapes, header = read_header(self.file, STATE_DTYPES)
        step, lists = self.check_header(header)
        wanted = expected(model, optimizer)
        if "random.cuda" not in shapes.keys() & wanted.keys():  # the device may be another one now
            shapes.pop("random.cuda", None)
            wanted.pop("random.cuda", None)
        if wrong := mismatch(shapes, wanted, same_dtype=True):
            raise ValueError(f"{self.file} is a checkpoint of another run: {wrong}")
        found = read_tensors(self.file)
        steps = {name: int(tensor) for name, tensor in found.items() if name.endswith(".step")}
        if other := [name for name in steps if steps[name] != step]:
            raise ValueError(f"{self.file}: {other[0]} is {steps[other[0]]}, not {step}")
        try:
            torch.Generator().set_state(found["random.cpu"])
        except RuntimeError as error:
            raise ValueError(f"{self.file}: random.cpu is no random state: {error}") from error

        for partial in self.file.parent.glob(f".{self.file.name}.*"):  # left by a kill
            partial.unlink()
        moments: dict[int, dict[str, Tensor]] = {}
        for name in found:
            if name.startswith("optimizer."):
                _, i, kind = name.split(".")
                moments.setdefault(int(i), {})[kind] = found[name]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        saved = {name: found[f"model.{name}"] for name in trained(model)}
        if isinstance(model, PeftModel):
            model.load_state_dict(saved)
        else:
            with torch.no_grad():
                for name, tensor in trained(model).items():
                    tensor.copy_(saved[name])
        for name, values in lists.items():
            self.lists[name][:] = values
        torch.set_rng_state(found["random.cpu"])
        if "random.cuda" in found and torch.cuda.is_available():
            torch.cuda.set_rng_state(found["random.cuda"])
        return step

    def check_header(self, header: dict[str, str]) -> tuple[int, dict[str, list]]:
        """The step and the lists in a checkpoint's header. Raises ValueError if it is damaged or of
        another run."""
        about = parse_json(header.get("minipeft", "null"), dict, f"{self.file}: the header")
        step, then, lists = (about.get(name) for name in ("step", "identity", "lists"))
        right = isinstance(then, dict) and has_type(lists, dict[str, list]) and type(step) is int
        if not right or step < 1:
            raise ValueError(f"{self.file} is not a checkpoint: its header is damaged")
        now = json.loads(json.dumps(self.identity))
        differs = [k for k in sorted({*now, *then}) if now.get(k) != then.get(k)]
        if differs:
            listed = "; ".join(f"{k}: {then.get(k)!r}, not {now.get(k)!r}" for k in differs)
            raise ValueError(f"{self.file} is a checkpoint of another run ({listed[:300]})")
        per_step = [lists.get(name) for name in ("losses", "seconds") if name in self.lists]
        right = all(has_type(values, list[float]) and len(values) == step for values in per_step)
        validation = has_type(lists.get("validation", []), list[dict[str, float]])
        if not (right and validation and lists.keys() == self.lists.keys()):
            raise ValueError(f"{self.file}: the lists in its header do not fit step {step}")
        return step, lists


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: all adapters, or the parameters that require a gradient."""
    if isinstance(model, PeftModel):
        return model.state_dict()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_state() -> dict[str, Tensor]:
    on_gpu = {"random.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"random.cpu": torch.get_rng_state()} | on_gpu


def expected(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors with the names, shapes and dtypes that `save` writes, with AdamW or PagedAdamW."""
    found = {f"model.{name}": tensor for name, tensor in trained(model).items()}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        moments = {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}
        found |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
    return found | random_state()


class Interrupt:
    """A handler of Ctrl-C and SIGTERM that raises KeyboardInterrupt only once: what a command does
    then is not interrupted again."""

    raised = False

    def __call__(self, number: int, frame) -> None:
        if not self.raised:
            self.raised = True
            raise KeyboardInterrupt


@contextmanager
def delayed_interrupt() -> Iterator[list]:
    """Ctrl-C and SIGTERM no longer interrupt a step: they add to the list. A second one interrupts
    at once.

    Only in the main thread, and only if nobody else handles them.
    """
    interrupts: list[int] = []
    before = {number: getsignal(number) for number in (SIGINT, SIGTERM)}
    handled = [
        number
        for number, handler in before.items()
        if handler in (default_int_handler, SIG_DFL) or isinstance(handler, Interrupt)
    ]

    def once(number: int, frame) -> None:
        interrupts.append(number)
        for other in handled:
            signal(other, before[other] if callable(before[other]) else default_int_handler)

    if current_thread() is not main_thread():
        handled = []
    for number in handled:
        signal(number, once)
    try:
        yield interrupts
    finally:
        for number in handled:
            signal(number, before[number])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder, and keep others from writing to it at the same time.

    Raises ValueError if another run does. The operating system releases the lock when the process
    ends, however it ends. A new folder that stays empty is removed again.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder} is in use: another run is writing to it") from None
        yield
    finally:
        os.close(handle)
        if is_new:
            with suppress(OSError):  # not empty
                folder.rmdir()
