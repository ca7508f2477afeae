"""The interface of an adapter: what PeftModel, saving.py and combine.py ask of every method."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.base_model import guard_saving
from minipeft.files import mismatch
from minipeft.methods.adalora import RankAllocator


class Adapter:
    """Interface of an adapter. This base class is the null adapter, which changes nothing and
    cannot be saved. It is no nn.Module: its `modules` and `parameters` return dictionaries."""

    config: Any = None  # the method's config
    encoder: nn.Module | None = None  # prompt methods only
    layers: Mapping[str, nn.Module] = MappingProxyType({})  # weight methods only, by layer name
    allocator: RankAllocator | None = None  # AdaLoRA only, while its ranks can still move

    def modules(self) -> Mapping[str, nn.Module]:
        """The adapter's own modules by name: its layers, or its encoder."""
        return self.layers if self.encoder is None else {"prompt_encoder": self.encoder}

    def attach(self, model: nn.Module) -> None:
        """Replace the layers of the base that this adapter adapts.

        Raises RuntimeError if a layer of the base was replaced since the adapter was made.
        """
        for name, layer in self.layers.items():
            if model.get_submodule(name) is not layer.base_layer:
                raise RuntimeError(
                    f"{name} of the base was replaced while its adapter was detached"
                )
        for name, layer in self.layers.items():
            model.set_submodule(name, layer)
        guard_saving(model)

    def detach(self, model: nn.Module) -> None:
        """Put the original layers back."""
        for name, layer in self.layers.items():
            model.set_submodule(name, layer.base_layer)
        guard_saving(model)

    def run(self, model: nn.Module, *args, **kwargs):
        """The model's forward pass with this adapter. It must be attached."""
        return model(*args, **kwargs)

    def generate(self, model: nn.Module, *args, **kwargs):
        """The model's own `generate` with this adapter."""
        return model.generate(*args, **kwargs)

    def generate_batch(self, model: nn.Module, *args, **kwargs):
        """transformers' continuous batching."""
        return model.generate_batch(*args, **kwargs)

    def penalty(self) -> Tensor | float:
        """What the method adds to the training loss."""
        return 0.0

    def update_and_allocate(self, step: int) -> None:
        """Called after every optimizer step, before the gradients are cleared (AdaLoRA)."""

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move tensors that are in no module to the device that `fn` moves to (AdaLoRA)."""

    def ranks(self) -> dict[str, int]:
        """The rank of each layer, for methods that change ranks (AdaLoRA)."""
        return {}

    def check_mergeable(self) -> None:
        """Raises ValueError if the method cannot be merged, RuntimeError if it cannot yet."""

    def parameters(self) -> dict[str, Tensor]:
        """The adapter's own tensors by name, as Parameters; nothing of the base."""
        return {
            f"{name}.{key}": tensor
            for name, module in self.modules().items()
            for key, tensor in module.state_dict(keep_vars=True).items()
            if not key.startswith("base_layer.")
        }

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, under peft's keys."""
        raise NotImplementedError

    def places(self) -> dict[str, Tensor]:
        """The tensors of a new adapter that saved ones are copied to, under peft's keys."""
        raise NotImplementedError

    def saved_config(self):
        """The config that is saved with `tensors`."""
        return self.config

    def state(self) -> dict[str, Tensor]:
        """All tensors needed to continue training."""
        return self.parameters()

    def check_state(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError for a state that `load_state` could not load."""
        check_match(state, self.state())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load a checked state. Merged layers are unmerged, which discards a W' made from the old
        tensors."""
        copy_tensors(state, self.parameters())
        for layer in self.layers.values():
            if hasattr(layer, "unmerge"):
                layer.unmerge()


def check_match(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Raises ValueError if names or shapes differ, or if one tensor is floating point and the other
    is not."""
    if wrong := mismatch(source, target):
        raise ValueError(f"adapter does not match this model: {wrong}")


@torch.no_grad()
def copy_tensors(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for key, tensor in target.items():
        tensor.copy_(source[key])
