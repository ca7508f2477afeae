"""One interface for all methods: put an adapter on a model, train it, switch it, save it, merge it.

An adapter is what a method adds to a model (adapters.py has the table of methods): layers around
the model's own, or virtual tokens that it is fed. One at a time is in place; switching takes it out
and puts another in, and with none in place the model is the base, to the bit. Adapters are saved
and read in Hugging Face peft's format (files.py), and LoRAs can be added up (weighted.py).
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from minipeft.adalora import AdaLoraConfig, RankAllocator
from minipeft.adapters import Adapter, make_adapter
from minipeft.bitfit import BitFitConfig
from minipeft.bottleneck import BottleneckConfig
from minipeft.files import PeftConfig, TaskType, read_adapter, write_adapter, write_file
from minipeft.lora import LoraConfig, find_targets
from minipeft.p_tuning import PromptEncoderConfig
from minipeft.paged_adamw import PagedAdamW
from minipeft.prefix_tuning import PrefixTuningConfig
from minipeft.prompt_tuning import PromptTuningConfig
from minipeft.qlora import (
    QLoraConfig,
    bits_per_weight,
    quantize_model,
    quantized_layers,
)
from minipeft.weighted import weighted_adapter

__all__ = [  # what the lab takes from here, besides what is defined below
    "AdaLoraConfig", "BitFitConfig", "BottleneckConfig", "LoraConfig", "PagedAdamW", "PeftConfig",
    "PrefixTuningConfig", "PromptEncoderConfig", "PromptTuningConfig", "QLoraConfig", "TaskType",
    "bits_per_weight", "find_targets", "quantize_model", "write_file",
]  # fmt: skip

BARE = Adapter()  # what is at work while none is in place


class PeftModel(nn.Module):
    """A model with adapters, one of them in place. Make it with `get_peft_model`.

    The base's weights are never written to, except by `merge_and_unload(inplace=True)`.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None = None,
        adapter_name: str = "default",
    ):
        super().__init__()
        if isinstance(model, PeftModel):
            raise ValueError("this model is a PeftModel already: use its add_adapter")
        self.base_model = model
        self.prompt_encoder: nn.Module | None = None  # a prompt method's, while it is in place
        self.task_loss: Tensor | None = None  # of the last forward, without any penalty
        self.adapters: dict[str, Adapter] = {}  # a plain dict: sets not in place are not submodules
        self.active_adapter: str | None = None
        self.in_place = False
        self.train(model.training)
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config)

    # --- running ---

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values=None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ):
        """What the base returns, with the active adapter at work. None is not handed on.

        A prompt method returns (loss, logits), the logits those of the real tokens. In training
        mode AdaLoRA's penalty is added to the loss; `task_loss` keeps the loss without it.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "inputs_embeds": inputs_embeds,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
            "use_cache": use_cache,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }
        out = self._current.run(self.base_model, {k: v for k, v in named.items() if v is not None})
        if labels is not None:
            self.task_loss = out[0].detach()
            if self.training:
                out = self._current.penalized(out)
        return out

    def generate(self, *args, **options) -> Tensor:
        """The base's own `generate`, with the active adapter at work."""
        return self._current.generate(self.base_model, *args, **options)

    @property
    def allocator(self) -> RankAllocator | None:
        """What moves AdaLoRA's ranks; None for every other method, and for ranks from a file."""
        return self._active.allocator

    def update_and_allocate(self, step: int) -> None:
        """AdaLoRA's work after the optimizer's step `step` and before the gradients are cleared.

        For every other method, and for ranks that were read from a file, there is nothing to do.
        """
        if self.allocator is not None:
            self.allocator.update_and_allocate(step)

    def ranks(self) -> dict[str, int]:
        """The rank that AdaLoRA has left to each layer; empty for every other method."""
        return self._active.ranks()

    # --- adapters ---

    def add_adapter(self, adapter_name: str, config: PeftConfig) -> None:
        """Make a new adapter. The first is put in place, a later one waits for `set_adapter`."""
        own = copy.copy(config)  # training writes into it: AdaLoRA the ranks it kept
        self._register(adapter_name, make_adapter, own)

    def load_adapter(self, path: str | Path, adapter_name: str, is_trainable: bool = False) -> None:
        """Read an adapter's folder, ours or peft's; frozen unless `is_trainable`.

        Raises ValueError, before anything is changed, for a damaged file, an adapter of another
        model, tensors that are missing, surplus or of another shape.
        """
        self._register(adapter_name, read_adapter, Path(path), is_trainable)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Make a new, frozen LoRA out of several: Σ w ΔW by "svd", "linear" or "cat".

        `weighted.py` says what these are. As in peft, the rank is `svd_rank` or the largest one,
        all ranks' sum for "cat", and one adapter alone is always combined by "linear", which is
        then exact.
        """
        for name in adapters:
            self._check_name(name)
        found = [self.adapters[name] for name in adapters]
        self._register(adapter_name, weighted_adapter, found, weights, combination_type, svd_rank)

    def set_adapter(self, adapter_name: str) -> None:
        """Put an adapter in the place of the one that is there; where there is none, it waits."""
        self._check_name(adapter_name)
        with self.disable_adapter():
            self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Deleting the active one activates the first that is left."""
        self._check_name(adapter_name)
        if len(self.adapters) == 1:
            raise ValueError(f"{adapter_name!r} is the only adapter: use unload() to get the base")
        if adapter_name == self.active_adapter:
            self.set_adapter(next(name for name in self.adapters if name != adapter_name))
        del self.adapters[adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within `with model.disable_adapter():` the model is the base, to the bit."""
        was_in_place = self.in_place
        self._place(False)
        try:
            yield
        finally:
            if was_in_place and self.active_adapter is not None:
                self._place(True)

    def merge_adapter(self) -> None:
        """Let the active adapter's layers compute with W' = W + ΔW. Nothing of the base changes."""
        for layer in self._to_merge():
            layer.merge()

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`, to the bit."""
        for layer in self._to_merge():
            layer.unmerge()

    def merge_and_unload(self, inplace: bool = False) -> nn.Module:
        """A plain model of the base's class whose layers hold W'.

        It is a copy, and this model stays as it is. `inplace` saves the copy: the base's weights
        are overwritten, and the adapters, made for the old ones, are gone.
        """
        self._to_merge()
        model = self.base_model if inplace else copy.deepcopy(self.base_model)
        for name in self._active.layers:
            model.set_submodule(name, model.get_submodule(name).merge_into_base())
        for name, layer in quantized_layers(model).items():  # what was not adapted, of such a base
            model.set_submodule(name, layer.plain())
        if inplace:
            self.adapters, self.active_adapter, self.in_place = {}, None, False
        return model

    def unload(self) -> nn.Module:
        """The base, without any adapter."""
        self._place(False)
        self.adapters, self.active_adapter = {}, None
        return self.base_model

    # --- counting, saving ---

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, the base's and the active adapter's; a shared one once."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the counts in peft's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write every adapter as peft does: the first into the folder, others into subfolders.

        Raises RuntimeError for an AdaLoRA in the middle of its schedule: a file holds the triplets
        that were kept, and the others could not come back. Keep its `state_dict()` instead.
        """
        found = {name: adapter.tensors() for name, adapter in self.adapters.items()}
        for i, (name, tensors) in enumerate(found.items()):
            folder = Path(path) / name if i else Path(path)
            write_adapter(folder, self.adapters[name].config, tensors)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> "PeftModel":
        """Put an adapter from a folder on a model; see `load_adapter`."""
        peft_model = cls(model)
        peft_model.load_adapter(path, adapter_name, is_trainable)
        return peft_model

    # --- what a trainer asks of a model ---

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.get_input_embeddings()

    def gradient_checkpointing_enable(self) -> None:
        self.base_model.gradient_checkpointing_enable()

    @property
    def config(self):
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        return next(self.base_model.parameters()).device

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return {name: adapter.config for name, adapter in self.adapters.items()}

    # --- the machinery ---

    @property
    def _active(self) -> Adapter:
        if self.active_adapter is None:
            raise RuntimeError("there is no adapter any more: it was merged or unloaded")
        return self.adapters[self.active_adapter]

    def _check_name(self, adapter_name: str) -> None:
        if adapter_name not in self.adapters:
            raise ValueError(f"no adapter {adapter_name!r}; there are: {', '.join(self.adapters)}")

    @property
    def _current(self) -> Adapter:
        """The active adapter, or, with none in place, one that does nothing."""
        return self._active if self.in_place else BARE

    def _to_merge(self) -> list[nn.Module]:
        self._active.check_mergeable()
        if not self.in_place:
            raise RuntimeError("the adapter is disabled: merge it outside disable_adapter")
        return self._active.modules()

    def _place(self, in_place: bool) -> None:
        """Put the active adapter in, or take it out."""
        if in_place != self.in_place:
            move = self._active.put_in if in_place else self._active.take_out
            move(self)
            self.in_place = in_place

    def _register(self, name: str, make: Callable[..., Adapter], *what) -> None:
        """Let `make(base, *what)` make an adapter; put it in place if it is the first."""
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name!r} already")
        with self.disable_adapter():
            self.adapters[name] = make(self.base_model, *what)
        if self.active_adapter is None:
            self.base_model.requires_grad_(False)
            self.active_adapter = name
            self._place(True)

    def _apply(self, fn: Callable, recurse: bool = True):
        """`.to()`, `.half()`, … reach the adapters that are not in place as well."""
        for name, adapter in self.adapters.items():
            if recurse and not (self.in_place and name == self.active_adapter):
                for module in adapter.modules():
                    module._apply(fn)
        return super()._apply(fn, recurse)


def get_peft_model(
    model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default"
) -> PeftModel:
    """Freeze a model, put a new adapter on it, and return the two as one.

    >>> config = LoraConfig(target_modules=["c_attn"])
    >>> model = get_peft_model(GPT.from_pretrained("data/base/1m"), config)
    """
    return PeftModel(model, peft_config, adapter_name)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a shared one counts once, a quantized weight in full."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    quantized = sum(q.in_features * q.out_features for q in quantized_layers(model).values())
    return sum(n for n, free in sizes if free), sum(n for n, _ in sizes) + quantized
