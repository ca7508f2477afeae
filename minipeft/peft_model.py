"""`PeftModel`: add adapters to a model, and train, switch, merge and save them.

An adapter is what LoRA or another PEFT method adds to a model (adapter.py). A model can have
several adapters, and one of them is active. The active adapter is attached: for most methods its
layers replace layers of the base; a prompt method adds virtual tokens to the input. Inside
`disable_adapter()` it is detached, and the model computes exactly what the base computes.
Adapters are saved in Hugging Face peft's format (saving.py). Several LoRAs can be combined into one
(combine.py).
"""

import copy
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minipeft.adapter import Adapter
from minipeft.adapters import make_adapter, merge_into_base
from minipeft.base_model import (
    count_parameters,
    freeze_statistics,
    make_plain,
    restored_dtypes,
)
from minipeft.combine import weighted_adapter
from minipeft.files import show
from minipeft.methods.qlora import quantized_layers
from minipeft.saving import PeftConfig, read_adapter, write_adapter


class signature_of_base:
    """Decorates `PeftModel.forward`, so that a model's `forward` has the base's signature.

    transformers' Trainer reads it: it drops every column of the data that is not named there. The
    signature of the class's own `PeftModel.forward` stays: the Trainer looks for `labels` in it.
    """

    def __init__(self, forward: Callable):
        self.forward = forward

    def __get__(self, model: "PeftModel | None", owner: type) -> Callable:
        if model is None:
            return self.forward
        if "base_model" not in vars(model).get("_modules", {}):  # while it is unpickled
            return types.MethodType(self.forward, model)

        @functools.wraps(self.forward)
        def forward(model, *args, **kwargs):
            return self.forward(model, *args, **kwargs)

        signature = inspect.signature(model.base_model.forward)
        parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
        parameters += signature.parameters.values()
        forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore
        return types.MethodType(forward, model)  # a method: accelerate wraps and unwraps it


class PeftModel(nn.Module):
    """A base model with adapters. Adding the first adapter freezes the base. See `get_peft_model`.

    Attributes and methods that are not defined here are the base model's. Training, switching and
    merging never change the base's weights; only `merge_and_unload(inplace=True)` does.
    """

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig | None = None, adapter_name="default"
    ):
        super().__init__()
        if isinstance(model, PeftModel):
            raise ValueError("this model is already a PeftModel: use its add_adapter")
        # Not a ModuleDict: only what is attached is a submodule.
        self.adapters: dict[str, Adapter] = {}
        self.active_adapter: str | None = None
        self.prompt_encoder: nn.Module | None = None  # the encoder of an attached prompt method
        self._disable_depth = 0  # how many `with disable_adapter()` blocks are open
        self.register_load_state_dict_post_hook(ignore_missing_base)
        self.base_model = model  # last, because of `__setattr__`: the base may have these names too
        self.training = model.training
        freeze_statistics(model)
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config)

    # --- running ---

    @signature_of_base
    def forward(self, *args, labels: Tensor | None = None, **kwargs):
        """The base model's `forward`, with the attached adapter.

        It returns the base's output. Prompt methods drop the logits of the virtual tokens. In
        training mode, AdaLoRA's penalty is added to the loss.
        """
        if labels is not None:
            kwargs["labels"] = labels
        return self._attached.run(self.base_model, *args, **kwargs)

    def generate(self, *args, **kwargs) -> Tensor:
        """The base's own `generate`, with the attached adapter."""
        return self._attached.generate(self.base_model, *args, **kwargs)

    def generate_batch(self, *args, **kwargs):
        """The base's own `generate_batch`; ValueError with a prompt method."""
        return self._attached.generate_batch(self.base_model, *args, **kwargs)

    # --- adding and switching ---

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig) -> None:
        """Create an adapter. If none is active, it becomes active; otherwise call `set_adapter`."""
        self._check_new(adapter_name)
        with self.disable_adapter():  # the new layers must wrap the base's own layers
            self._add(adapter_name, make_adapter(self.base_model, copy.copy(peft_config)))

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Load an adapter from a folder that minipeft or peft saved. If none is active, it becomes
        active. It is frozen unless `is_trainable`.

        Raises ValueError, before anything changes, for a damaged file or an adapter that does not
        fit this model.
        """
        self._check_new(adapter_name)
        with self.disable_adapter():
            self._add(adapter_name, read_adapter(self.base_model, Path(model_id), is_trainable))

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Combine LoRAs with updates ΔWᵢ into a new, frozen one, whose update is Σ wᵢ ΔWᵢ or near
        it (combine.py).

        combination_type:
        - "cat" is exact. Its rank is the sum of the ranks.
        - "svd" has the rank `svd_rank`, by default the largest rank.
        - "linear" needs equal ranks, and keeps them. A single adapter always uses it: then it is
          exact.
        """
        self._check_new(adapter_name)
        loras = [self._get(name) for name in adapters]
        with self.disable_adapter():
            summed = weighted_adapter(self.base_model, loras, weights, combination_type, svd_rank)
            self._add(adapter_name, summed)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make an adapter active and attach it; inside a `disable_adapter()` block, it is attached
        only after the block.

        The trainable parameters change, so make a new optimizer afterwards. As in peft, the name
        may be in a list; raises ValueError for more than one, and for an unknown name.
        """
        if isinstance(adapter_name, list):
            if len(adapter_name) != 1:
                raise ValueError(
                    f"one adapter can be active, not {adapter_name}: see add_weighted_adapter"
                )
            adapter_name = adapter_name[0]
        self._get(adapter_name)  # raises for an unknown name
        with self.disable_adapter():  # on exit, it attaches the adapter that is active by then
            self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, the first remaining one becomes active."""
        self._get(adapter_name)  # raises for an unknown name
        if len(self.adapters) == 1:
            raise ValueError(f"{adapter_name!r} is the only adapter: use unload() to get the base")
        if adapter_name == self.active_adapter:
            self.set_adapter(next(name for name in self.adapters if name != adapter_name))
        del self.adapters[adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the `with` block the model computes exactly what the base computes.

        When the outermost block ends, the adapter that is active by then is attached.
        """
        self._attached.detach(self.base_model)
        self.prompt_encoder = None
        self._disable_depth += 1
        try:
            yield
        finally:
            self._disable_depth -= 1
            adapter = self._attached  # inside another block still `Adapter()`, which does nothing
            try:
                adapter.attach(self.base_model)
            except RuntimeError:  # it does not fit the base any more: no adapter is active
                self.active_adapter = None
                raise
            self.prompt_encoder = adapter.encoder
            for module in adapter.modules().values():
                module.train(self.training)
                freeze_statistics(module)

    # --- AdaLoRA ---

    def penalty(self) -> Tensor | float:
        """The term added to the loss in training mode: AdaLoRA's penalty, or 0."""
        return self._attached.penalty()

    def update_and_allocate(self, step: int) -> None:
        """Let AdaLoRA prune; other methods do nothing.

        Call it after every optimizer step, before the gradients are cleared; steps count from 1.
        """
        self._active.update_and_allocate(step)

    def ranks(self) -> dict[str, int]:
        """The rank of each layer after AdaLoRA's pruning; empty for other methods."""
        return self._active.ranks()

    # --- merging ---

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Make the active adapter's layers use W' = W + ΔW, the weight plus the update. Unlike in
        peft, W itself does not change: the layer keeps W' next to it.

        With safe_merge, raises ValueError, before anything is merged, if a W' has NaN or infinite
        entries. adapter_names, as in peft, can only name the active adapter.
        """
        if adapter_names not in (None, [self.active_adapter]):
            raise ValueError(f"only the active adapter can be merged, not {adapter_names!r}")
        layers = self._mergeable_layers(safe_merge)
        for layer in layers.values():
            layer.merge()

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter` exactly."""
        for layer in self._mergeable_layers().values():
            layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, *, inplace: bool = False
    ) -> nn.Module:
        """Return a plain model of the base's class whose layers hold W'.

        By default it is a copy, and this model keeps its adapters. With `inplace`, it overwrites
        the base's weights, makes no copy, and deletes the adapters. Quantized layers become layers
        of their original class again; for their dtype see `restored_dtypes`.
        """
        names = list(self._mergeable_layers(safe_merge))
        with self.disable_adapter():  # the adapter's own parameters do not count
            dtypes = restored_dtypes(self.base_model)
        model = self.base_model if inplace else copy.deepcopy(self.base_model)
        for name in tqdm(names, "merging", disable=not progressbar):
            model.set_submodule(name, merge_into_base(model.get_submodule(name)))
        for name, layer in quantized_layers(model).items():  # dequantize the remaining layers
            model.set_submodule(name, layer.plain())
        if dtypes:
            for name, p in model.named_parameters():
                if p.is_floating_point():
                    p.data = p.data.to(dtypes[name])
        if inplace:
            self.adapters, self.active_adapter = {}, None
        make_plain(model)
        return model

    def unload(self) -> nn.Module:
        """Detach and delete all adapters, and return the base model."""
        with self.disable_adapter():
            self.adapters, self.active_adapter = {}, None
        make_plain(self.base_model)
        return self.base_model

    # --- counting and saving ---

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters of the base and the attached adapter."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the counts in peft's format."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True) -> None:
        """Write every adapter as peft does: "default" into the folder, others into subfolders.

        Raises RuntimeError for an AdaLoRA in the middle of its schedule, because peft's format has
        no place for the schedule's state: save `model.state_dict()` instead. Raises ValueError for
        safe_serialization=False: a pickle is never written.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle: not supported")
        base_name = getattr(self.base_model, "name_or_path", None)
        tensors = {name: adapter.tensors() for name, adapter in self.adapters.items()}
        for name, adapter in self.adapters.items():  # only now: an error above leaves no files
            folder = Path(save_directory) / ("" if name == "default" else name)
            write_adapter(folder, adapter, tensors[name], base_name)

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, model_id: str | Path, adapter_name="default", is_trainable=False
    ) -> "PeftModel":
        """A model with the adapter from a folder; see `load_adapter`."""
        peft_model = cls(model)
        peft_model.load_adapter(model_id, adapter_name, is_trainable)
        return peft_model

    def state_dict(self, *, destination=None, prefix: str = "", keep_vars: bool = False) -> dict:
        """The tensors of all adapters and nothing of the base, for training checkpoints."""
        found = {} if destination is None else destination
        for name, adapter in self.adapters.items():
            for key, tensor in adapter.state().items():
                found[f"{prefix}{name}.{key}"] = tensor if keep_vars else tensor.detach()
        return found

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """Load what `state_dict` returned. Merged layers are unmerged by this.

        Raises ValueError, before anything changes, for missing, unexpected or misshapen tensors.
        It is always strict; `strict` and `assign` are only there because nn.Module has them.
        """
        states = {name: {} for name in self.adapters}
        for key, tensor in state_dict.items():
            name, _, rest = key.partition(".")  # adapter names have no dots
            if name not in states:
                raise ValueError(f"{key} belongs to no adapter of this model")
            states[name][rest] = tensor
        for name, adapter in self.adapters.items():
            adapter.check_state(states[name])
        for name, adapter in self.adapters.items():
            adapter.load_state(states[name])
        return nn.modules.module._IncompatibleKeys([], [])  # as nn.Module does

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *rest):
        """Called instead of `load_state_dict` for a PeftModel that is part of another module."""
        own = [key for key in state_dict if key.startswith(prefix)]
        if own:
            self.load_state_dict({key.removeprefix(prefix): state_dict[key] for key in own})
        else:
            missing_keys += [f"{prefix}{key}" for key in self.state_dict()]

    # --- for compatibility with peft and with transformers' Trainer ---

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # copy and pickle ask before `__init__` has set it
                raise
            return getattr(self.base_model, name)

    def __setattr__(self, name: str, value) -> None:
        """An attribute that only the base has is set on the base."""
        own = name in self.__dict__ or hasattr(type(self), name) or name in self._modules
        if not own and hasattr(self._modules.get("base_model"), name):
            setattr(self.base_model, name, value)
        else:
            super().__setattr__(name, value)

    def _get_name(self) -> str:
        """The base's class name. For label smoothing, the Trainer shifts the labels if it knows
        this name as that of a causal language model."""
        return self.base_model._get_name()

    def train(self, mode: bool = True) -> "PeftModel":
        """nn.Module's method, but running statistics (BatchNorm) stay frozen, like the weights: in
        training mode too, such layers compute what they compute in eval mode."""
        super().train(mode)
        freeze_statistics(self.base_model)
        return self

    def __setstate__(self, state: dict) -> None:
        """A copy made inside `disable_adapter()` has no active adapter: call its `set_adapter`."""
        super().__setstate__(state)
        if self._disable_depth:
            self._disable_depth, self.active_adapter = 0, None

    def get_base_model(self) -> nn.Module:
        """The base model. Some of its layers are replaced while an adapter is attached; `unload`
        puts them back."""
        return self.base_model

    @property
    def is_attached(self) -> bool:
        """Whether an adapter is active and not disabled."""
        return self.active_adapter is not None and not self._disable_depth

    @property
    def device(self) -> torch.device:
        return next(self.base_model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.base_model.parameters() if p.is_floating_point())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters of the base and the attached adapter."""
        trainable, total = self.get_nb_trainable_parameters()
        if exclude_embeddings and not only_trainable:
            tables = (m for m in self.base_model.modules() if isinstance(m, nn.Embedding))
            total -= sum(table.weight.numel() for table in tables)
        return trainable if only_trainable else total

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return {name: adapter.config for name, adapter in self.adapters.items()}

    # --- internals ---

    @property
    def _active(self) -> Adapter:
        if self.active_adapter is None:
            raise RuntimeError("no adapter is active: add one, or call set_adapter")
        return self.adapters[self.active_adapter]

    @property
    def _attached(self) -> Adapter:
        """The adapter in use. Without one, the null adapter, which changes nothing."""
        return self._active if self.is_attached else Adapter()

    def _get(self, adapter_name: str) -> Adapter:
        if adapter_name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"there is no adapter {adapter_name!r}; known adapters: {known}")
        return self.adapters[adapter_name]

    def _check_new(self, adapter_name: str) -> None:
        if adapter_name in self.adapters:
            raise ValueError(f"there already is an adapter {adapter_name!r}")
        plain = isinstance(adapter_name, str) and adapter_name.isprintable()
        if not (plain and re.fullmatch(r"[^./\\]{1,100}", adapter_name)):  # it names a folder
            got = show(adapter_name)
            raise ValueError(f"adapter_name must have 1 to 100 letters, none of . / \\, got {got}")

    def _add(self, adapter_name: str, adapter: Adapter) -> None:
        """Called while no adapter is attached."""
        self.adapters[adapter_name] = adapter
        self.base_model.has_adapters = True  # even while they are disabled: see quantize_model
        if self.active_adapter is None:
            self.base_model.requires_grad_(False)
            self.active_adapter = adapter_name

    def _mergeable_layers(self, safe_merge: bool = False) -> Mapping[str, nn.Module]:
        self._active.check_mergeable()
        if not self.is_attached:
            raise RuntimeError("the adapter is disabled: call this outside disable_adapter()")
        if safe_merge:
            for name, layer in self._active.layers.items():
                merged = (layer.weight, getattr(layer, "bias", None))  # W' and b'
                if not all(t.isfinite().all() for t in merged if t is not None):
                    raise ValueError(f"{name}: the merged weight has NaN or infinite entries")
        return self._active.layers

    def _apply(self, fn: Callable, recurse: bool = True):
        """Apply `.to()`, `.half()` and so on to the detached adapters as well."""
        attached = self._attached
        for adapter in self.adapters.values():
            adapter.move(fn)
            if recurse and adapter is not attached:
                for module in adapter.modules().values():
                    module._apply(fn)
        return super()._apply(fn, recurse)


def get_peft_model(
    model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default"
) -> PeftModel:
    """Freeze a model and add a new adapter to it.

    >>> config = LoraConfig(target_modules=["c_attn"])
    >>> model = get_peft_model(GPT.from_pretrained("data/base/1m"), config)
    """
    return PeftModel(model, peft_config, adapter_name)


def ignore_missing_base(model: PeftModel, incompatible) -> None:
    """A hook for loading a state dict into a module that contains a PeftModel. Do not report the
    base's tensors as missing: `PeftModel.state_dict` leaves them out."""
    base = tuple(f"base_model.{key}" for key in model.base_model.state_dict())
    encoder = () if model.prompt_encoder is None else model.prompt_encoder.state_dict()
    absent = (*base, *(f"prompt_encoder.{key}" for key in encoder))
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not key.endswith(absent)]
