"""One interface for all methods: add an adapter to a model, train it, switch, save and merge it.

An adapter is what a method adds to a model (adapters.py). At most one is attached at a time;
switching detaches it and attaches another. With none attached, the model computes exactly what the
base computes. Adapters are saved in Hugging Face peft's format (saving.py), and LoRAs can be added
up (combine.py).
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from minipeft.adapters import NO_ADAPTER, Adapter, copy_strictly, make_adapter
from minipeft.combine import weighted_adapter
from minipeft.methods.adalora import RankAllocator
from minipeft.methods.qlora import quantized_layers
from minipeft.saving import PeftConfig, read_adapter, write_adapter


class _Forward:
    """`PeftModel.forward`, with the signature of the base model's.

    transformers' Trainer reads the signature to choose columns; on the class, it looks for labels.
    """

    def __get__(self, model: "PeftModel | None", owner: type) -> Callable:
        if model is None:
            return owner._forward
        run = functools.partial(owner._forward, model)
        run.__signature__ = inspect.signature(model.base_model.forward)
        return run


class PeftModel(nn.Module):
    """A frozen base model with adapters. Create one with `get_peft_model`.

    Attributes and methods that are not defined here are the base model's. Nothing writes into the
    base's weights except `merge_and_unload(inplace=True)`.
    """

    def __init__(self, model: nn.Module, peft_config=None, adapter_name: str = "default"):
        super().__init__()
        if isinstance(model, PeftModel):
            raise ValueError("this model is already a PeftModel: use its add_adapter")
        self.base_model = model
        self.prompt_encoder: nn.Module | None = None  # the attached prompt method's
        self.adapters: dict[str, Adapter] = {}  # not submodules: only the attached one is
        self.active_adapter: str | None = None
        self._attached: Adapter = NO_ADAPTER
        self._disabled = 0  # how many `with disable_adapter()` are open
        self.train(model.training)
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config)

    # --- running ---

    def _forward(self, *args, labels: Tensor | None = None, **kwargs):
        """The base model's `forward`, with the attached adapter.

        Prompt methods return (loss, logits), the logits of the real tokens. In training mode,
        AdaLoRA's penalty is added to the loss.
        """
        if labels is not None:
            kwargs["labels"] = labels
        out = self._attached.run(self.base_model, *args, **kwargs)
        penalty = self._attached.penalty() if self.training else None
        if penalty is None or getattr(out, "loss", None) is None:
            return out
        if hasattr(out, "_replace"):  # a named tuple
            return out._replace(loss=out.loss + penalty)
        out["loss"] = out.loss + penalty  # transformers' ModelOutput
        return out

    forward = _Forward()

    def generate(self, *args, **kwargs) -> Tensor:
        """The base's own `generate`, with the attached adapter."""
        return self._attached.generate(self.base_model, *args, **kwargs)

    def penalty(self) -> Tensor | float:
        """What training mode adds to the loss: AdaLoRA's penalty, or 0."""
        penalty = self._attached.penalty()
        return 0.0 if penalty is None else penalty

    @property
    def allocator(self) -> RankAllocator | None:
        """What moves AdaLoRA's ranks; None for other methods and for ranks read from a file."""
        return getattr(self._active, "allocator", None)

    def update_and_allocate(self, step: int) -> None:
        """AdaLoRA: move ranks, after optimizer step `step` and before the gradients are cleared."""
        self._active.update_and_allocate(step)

    def ranks(self) -> dict[str, int]:
        """The rank that AdaLoRA has left each layer; empty for other methods."""
        return self._active.ranks()

    # --- adding and switching ---

    def add_adapter(self, adapter_name: str, peft_config) -> None:
        """Create an adapter. The first one becomes active; later ones wait for `set_adapter`."""
        self._check_new(adapter_name)
        with self.disable_adapter():
            adapter = make_adapter(self.base_model, copy.copy(peft_config))
        self._add(adapter_name, adapter)

    def load_adapter(self, model_id: str | Path, adapter_name: str, is_trainable: bool = False):
        """Load an adapter's folder, ours or peft's; frozen unless `is_trainable`.

        Raises ValueError, before anything changes, for a damaged file or an adapter of another
        model.
        """
        self._check_new(adapter_name)
        with self.disable_adapter():
            adapter = read_adapter(self.base_model, Path(model_id), is_trainable)
        self._add(adapter_name, adapter)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Create a frozen LoRA from several: Σ w ΔW, by "svd", "linear" or "cat" (combine.py).

        As in peft, its rank is `svd_rank` or the largest one ("cat": the sum of all), and a single
        adapter is always combined by "linear", which is then exact.
        """
        self._check_new(adapter_name)
        found = [self._named(name) for name in adapters]
        with self.disable_adapter():
            summed = weighted_adapter(self.base_model, found, weights, combination_type, svd_rank)
        self._add(adapter_name, summed)

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter active. Inside `disable_adapter()` it stays detached until the end."""
        adapter = self._named(adapter_name)
        self.active_adapter = adapter_name
        if not self._disabled:
            self._switch_to(adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, the first remaining one becomes active."""
        self._named(adapter_name)
        if len(self.adapters) == 1:
            raise ValueError(f"{adapter_name!r} is the only adapter: use unload() to get the base")
        if adapter_name == self.active_adapter:
            self.set_adapter(next(name for name in self.adapters if name != adapter_name))
        del self.adapters[adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """`with model.disable_adapter():` the model computes exactly what the base computes."""
        self._disabled += 1
        self._switch_to(NO_ADAPTER)
        try:
            yield
        finally:
            self._disabled -= 1
            if not self._disabled and self.active_adapter is not None:
                self._switch_to(self._active)

    # --- merging ---

    def merge_adapter(self) -> None:
        """Let the active adapter's layers compute with W' = W + ΔW. The base does not change."""
        for layer in self._layers_to_merge().values():
            layer.merge()

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter` exactly."""
        for layer in self._layers_to_merge().values():
            layer.unmerge()

    def merge_and_unload(self, inplace: bool = False) -> nn.Module:
        """A plain model of the base's class whose layers hold W'.

        It is a copy, and this model stays as it is. With `inplace` the base's weights are
        overwritten, which saves the copy; the adapters are deleted.
        """
        names = list(self._layers_to_merge())
        model = self.base_model if inplace else copy.deepcopy(self.base_model)
        for name in names:
            model.set_submodule(name, model.get_submodule(name).merge_into_base())
        for name, layer in quantized_layers(model).items():  # those without an adapter
            model.set_submodule(name, layer.plain())
        if inplace:
            self.adapters, self.active_adapter, self._attached = {}, None, NO_ADAPTER
        return model

    def unload(self) -> nn.Module:
        """The base model, without any adapter."""
        self._switch_to(NO_ADAPTER)
        self.adapters, self.active_adapter = {}, None
        return self.base_model

    # --- counting and saving ---

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, of the base and the attached adapter; shared ones once."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the counts in peft's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write every adapter as peft does: "default" into the folder, others into subfolders.

        Raises RuntimeError for an AdaLoRA in the middle of its schedule: a file holds only the
        triplets that are kept. Keep its `state_dict()` instead.
        """
        base = getattr(self.base_model, "name_or_path", None)
        found = {name: adapter.tensors() for name, adapter in self.adapters.items()}
        for name, tensors in found.items():
            folder = Path(save_directory) / ("" if name == "default" else name)
            write_adapter(folder, self.adapters[name], tensors, base)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> "PeftModel":
        """A model with the adapter from a folder; see `load_adapter`."""
        peft_model = cls(model)
        peft_model.load_adapter(model_id, adapter_name, is_trainable)
        return peft_model

    def state_dict(self, *, destination=None, prefix: str = "", keep_vars: bool = False) -> dict:
        """The tensors of all adapters and nothing of the base, for checkpoints of training."""
        found = {} if destination is None else destination
        for name, adapter in self.adapters.items():
            for key, tensor in adapter.state().items():
                found[f"{prefix}{name}.{key}"] = tensor if keep_vars else tensor.detach()
        return found

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """Load what `state_dict` returned; merged layers are unmerged.

        Raises ValueError, before anything changes, for missing, surplus or misshapen tensors.
        """
        statistics = {}  # of AdaLoRA's allocators, by the start of their keys
        for name in [n for n, adapter in self.adapters.items() if hasattr(adapter, "allocator")]:
            start = f"{name}.allocator."
            found = {k[len(start) :]: t for k, t in state_dict.items() if k.startswith(start)}
            self.adapters[name].check_allocator(found)
            statistics[start] = found
        found, wanted = (
            {k: t for k, t in state.items() if not k.startswith(tuple(statistics))}
            for state in (state_dict, self.state_dict())
        )
        copy_strictly(found, wanted)
        for name, adapter in self.adapters.items():
            if hasattr(adapter, "allocator"):
                adapter.load_allocator(statistics[f"{name}.allocator."])
            for layer in adapter.layers.values():
                if hasattr(layer, "unmerge"):
                    layer.unmerge()  # W' was made from the old tensors
        return nn.modules.module._IncompatibleKeys([], [])

    # --- what else a trainer asks of a model ---

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # while it is being copied
                raise
            return getattr(self.base_model, name)

    def get_base_model(self) -> nn.Module:
        return self.base_model

    @property
    def is_active(self) -> bool:
        """Whether an adapter is attached."""
        return type(self._attached) is not Adapter  # a copied model has its own null adapter

    @property
    def device(self) -> torch.device:
        return next(self.base_model.parameters()).device

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return {name: adapter.config for name, adapter in self.adapters.items()}

    # --- internals ---

    @property
    def _active(self) -> Adapter:
        if self.active_adapter is None:
            raise RuntimeError("there is no adapter any more: it was merged or unloaded")
        return self.adapters[self.active_adapter]

    def _named(self, adapter_name: str) -> Adapter:
        if adapter_name not in self.adapters:
            known = ", ".join(self.adapters)
            raise ValueError(f"there is no adapter {adapter_name!r}; known adapters: {known}")
        return self.adapters[adapter_name]

    def _check_new(self, adapter_name: str) -> None:
        if adapter_name in self.adapters:
            raise ValueError(f"there already is an adapter {adapter_name!r}")

    def _add(self, adapter_name: str, adapter: Adapter) -> None:
        self.adapters[adapter_name] = adapter
        if self.active_adapter is None:
            self.base_model.requires_grad_(False)
            self.set_adapter(adapter_name)

    def _switch_to(self, adapter: Adapter) -> None:
        """Detach the attached adapter and attach another, or NO_ADAPTER."""
        self._attached.detach(self.base_model)
        adapter.attach(self.base_model)
        self._attached, self.prompt_encoder = adapter, adapter.encoder
        for module in adapter.modules():
            module.train(self.training)

    def _layers_to_merge(self) -> dict[str, nn.Module]:
        self._active.check_mergeable()
        if not self.is_active:
            raise RuntimeError("the adapter is disabled: merge it outside disable_adapter()")
        return self._active.layers

    def _apply(self, fn: Callable, recurse: bool = True):
        """`.to()`, `.half()` and so on also reach the adapters that are not attached."""
        for adapter in self.adapters.values():
            if recurse and adapter is not self._attached:
                for module in adapter.modules():
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


def prepare_model_for_kbit_training(model: nn.Module, use_gradient_checkpointing: bool = True):
    """Prepare a quantized model for training, in place, as peft's function of this name does.

    Freezes it; casts what is not quantized to float32, because half precision is too coarse for
    norms and the loss; turns on gradient checkpointing, for which the first block's input must
    require a gradient.
    """
    for p in model.requires_grad_(False).parameters():
        p.data = p.data.float() if p.is_floating_point() else p.data
    if use_gradient_checkpointing:
        model.get_input_embeddings().register_forward_hook(_require_gradient)
        model.gradient_checkpointing_enable()
    return model


def _require_gradient(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output.requires_grad_()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; shared ones count once, a quantized weight in full."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    quantized = sum(q.in_features * q.out_features for q in quantized_layers(model).values())
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes) + quantized
