"""One interface for all methods: put an adapter on a model, train it, switch it, save it, merge it.

There are two families. A weight method (LoRA, AdaLoRA) makes layers, each around the one
it adapts. A prompt method (prompt, P- and prefix tuning) makes an encoder that writes what
the model is fed besides its input. An adapter is such a set, or such an encoder, with its config.
One at a time is in place; switching takes it out and puts another in, and with none in place the
model is the base, to the bit. Files are Hugging Face peft's: `adapter_config.json` and
`adapter_model.safetensors` with peft's keys.

A new method is one file beside this one and one line in METHODS.
"""

import abc
import copy
import enum
import json
import math
import os
import re
import tempfile
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minipeft.adalora import AdaLoraConfig, RankAllocator, adalora_layers, orthogonality
from minipeft.bitfit import BitFitConfig, bitfit_layers
from minipeft.bottleneck import BottleneckConfig, bottleneck_layers
from minipeft.lora import LoraConfig, find_targets, lora_layers
from minipeft.p_tuning import PromptEncoder, PromptEncoderConfig
from minipeft.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from minipeft.prompt_tuning import PromptEmbedding, PromptTuningConfig
from minipeft.qlora import (
    Linear4bit,
    PagedAdamW,
    QLoraConfig,
    bits_per_weight,
    dequantize_model,
    qlora_layers,
    quantize_model,
    quantized_layers,
)
from minipeft.weighted import COMBINATIONS

__all__ = [  # what the lab takes from here, besides what is defined below
    "AdaLoraConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "LoraConfig",
    "PagedAdamW",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "QLoraConfig",
    "bits_per_weight",
    "find_targets",
    "quantize_model",
]

# Keys of a peft config that we have no use for: free ones, and those with a default that is not
# empty. Any other key that we do not know has to be null, false or empty, as it is by default.
FREE_KEYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "num_attention_heads",  # these two peft fills in from the model
    "num_layers",
    "peft_version",
    "revision",
}
DEFAULTS = {
    "bias": "none",
    "num_transformer_submodules": 1,
    "r": 8,  # AdaLoRA's file has it, and AdaLoRA does not use it
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}


class TaskType(str, enum.Enum):
    """What a model is used for; peft's names."""

    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"


class PeftConfig(abc.ABC):
    """The class that every method's config belongs to: `isinstance(config, PeftConfig)`."""

    @staticmethod
    def from_pretrained(path: str | Path):
        """The config in a folder that peft or minipeft wrote.

        Raises ValueError for a file that cannot be read, a method that is not here, and a setting
        that we do not implement, by name.
        """
        file = Path(path) / "adapter_config.json"
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        peft_type = found.get("peft_type") if isinstance(found, dict) else None
        if not isinstance(peft_type, str) or peft_type not in METHODS:
            raise ValueError(f"{file}: peft_type is {peft_type!r}; here are {', '.join(METHODS)}")
        config_class = METHODS[peft_type][0]
        kinds = {field.name: field.type for field in fields(config_class) if field.init}
        others = {k: v for k, v in found.items() if k not in kinds and k != "peft_type"}
        for key, value in others.items():
            if (
                key in FREE_KEYS
                or value == DEFAULTS.get(key)
                or (key not in DEFAULTS and not value)
            ):
                continue
            raise ValueError(f"{file}: {key} is {value!r}, and that is not implemented here")
        own = {key: value for key, value in found.items() if key in kinds}
        for key, value in own.items():
            if not fits(value, kinds[key]):
                wanted = getattr(kinds[key], "__name__", kinds[key])
                raise ValueError(f"{file}: {key} is {value!r}, and not {wanted}")
        try:
            config = config_class(**own)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        config.other_keys = others  # written back by save_pretrained
        return config


def fits(value, kind) -> bool:
    """Whether a value read from JSON is what a config's annotation says: `dict[str, int]`, say."""
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(fits(value, one) for one in inner)
    if isinstance(value, dict | list) and inner:
        items = value.values() if isinstance(value, dict) else value
        return isinstance(value, typing.get_origin(kind)) and all(fits(i, inner[-1]) for i in items)
    return type(value) is kind or (type(value) is int and kind is float)


class LayerAdapter:
    """A weight method's config and layers, in place or not."""

    def __init__(self, config: PeftConfig, model: nn.Module, make: Callable):
        self.config = config
        self.layers: dict[str, nn.Module] = make(model, config)  # by the name of what each adapts

    def modules(self) -> list[nn.Module]:
        return list(self.layers.values())

    def put_in(self, model: "PeftModel") -> None:
        for name, layer in self.layers.items():
            layer.train(model.training)
            model.base_model.set_submodule(name, layer)

    def take_out(self, model: "PeftModel") -> None:
        for name, layer in self.layers.items():
            model.base_model.set_submodule(name, layer.base_layer)

    def run(self, model: nn.Module, inputs: dict):
        first = (inputs.pop("input_ids"),) if "input_ids" in inputs else ()
        return model(*first, **inputs)

    def generate(self, model: nn.Module, *args, **options) -> Tensor:
        return model.generate(*args, **options)

    def penalty(self) -> Tensor | None:
        """What training adds to the loss, if anything."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What is trained and saved, under peft's keys; nothing of the base."""
        return {
            f"base_model.model.{name}.{key}": tensor
            for name, layer in self.layers.items()
            for key, tensor in layer.state_dict().items()
            if not key.startswith("base_layer.")
        }

    def load(self, found: dict[str, Tensor]) -> None:
        """Take saved tensors over. Raises ValueError for what is missing, surplus, or misshapen."""
        copy_strictly(found, self.tensors())


class AdaLoraAdapter(LayerAdapter):
    """AdaLoRA's layers with the allocator of their ranks."""

    def __init__(self, config: PeftConfig, model: nn.Module, make: Callable):
        super().__init__(config, model, make)
        fresh = config.rank_pattern is None and not config.inference_mode
        self.allocator = RankAllocator(self.layers, config) if fresh else None

    def penalty(self) -> Tensor:
        return self.config.orth_reg_weight * orthogonality(self.layers)

    def check_allocated(self) -> None:
        """Raises RuntimeError for layers that were trained and whose ranks are above the target."""
        c, allocator = self.config, self.allocator
        trained = any(layer.lora_E.any() for layer in self.layers.values())
        if not (allocator and trained and sum(allocator.ranks().values()) > allocator.target):
            return
        step, last = allocator.step, c.total_step - c.tfinal
        raise RuntimeError(
            f"AdaLoRA's ranks add up to {sum(allocator.ranks().values())}: they reach their target "
            f"of {allocator.target} at step {last} (total_step {c.total_step} - tfinal "
            f"{c.tfinal}), and update_and_allocate was "
            f"{'never called' if step is None else f'last called with step {step}'}. Call it after "
            f"every optimizer step, with a total_step as long as the run; "
            f"update_and_allocate({last}) cuts what is trained so far"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Cut to the triplets that were kept."""
        self.check_allocated()
        found = super().tensors()
        for name, kept in (self.allocator.kept if self.allocator else {}).items():
            for letter, column in (("A", False), ("E", False), ("B", True)):
                key = f"base_model.model.{name}.lora_{letter}"
                found[key] = found[key][:, kept] if column else found[key][kept]
        return found


class PromptAdapter:
    """A prompt method's config and encoder, in place or not."""

    def __init__(self, config: PeftConfig, model: nn.Module, make: Callable):
        self.config, self.encoder = config, make(config, model)

    def modules(self) -> list[nn.Module]:
        return [self.encoder]

    def put_in(self, model: "PeftModel") -> None:
        self.encoder.train(model.training)
        model.prompt_encoder = self.encoder  # a submodule from here on: counted, moved, trained

    def take_out(self, model: "PeftModel") -> None:
        model.prompt_encoder = None

    def run(self, model: nn.Module, inputs: dict):
        for name in ("past_key_values", "use_cache"):
            if inputs.pop(name, None):
                raise ValueError(f"{name} cannot be used with a prompt method: call generate()")
        return self.encoder(model, **inputs)

    def generate(self, model: nn.Module, *args, **options) -> Tensor:
        return self.encoder.generate(model, *args, **options)

    def penalty(self) -> None:
        return None

    def network(self) -> dict[str, Tensor]:
        """The encoder's own tensors, where it is more than the prompt itself."""
        state = self.encoder.state_dict()
        return {f"prompt_encoder.{k}": v for k, v in state.items()} if len(state) > 1 else {}

    def tensors(self) -> dict[str, Tensor]:
        """The prompt, which is all that peft reads, and what writes it, to go on training."""
        with torch.no_grad():
            prompt = self.encoder.prompt()  # (p, d), or (1, p, 2 l d)
            return {"prompt_embeddings": prompt.view(prompt.shape[-2:])} | self.network()

    def load(self, found: dict[str, Tensor]) -> None:
        """Take a saved prompt over, and the network if this encoder has one."""
        wanted = self.network() or {"prompt_embeddings": self.encoder.embedding.weight.data}
        spare = {"prompt_embeddings"}  # what the network writes anew; without it, the network
        if "prompt_embeddings" in wanted:
            spare = {key for key in found if key.startswith("prompt_encoder.")}
        copy_strictly({k: v for k, v in found.items() if k not in spare}, wanted)


def copy_strictly(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Copy tensors into others of the same names. Before that, ValueError for any that differ."""
    wrong = [f"{key} is missing" for key in wanted if key not in found]
    wrong += [f"{key} has no place in this model" for key in found if key not in wanted]
    wrong += [
        f"{key} is {tuple(t.shape)} of {t.dtype}, not {tuple(wanted[key].shape)} floats"
        for key, t in found.items()
        if key in wanted and not (t.shape == wanted[key].shape and t.is_floating_point())
    ]
    if wrong:
        raise ValueError(f"it does not fit: {'; '.join(wrong[:3])} ({len(wrong)} in all)")
    for key, tensor in wanted.items():
        tensor.copy_(found[key])


Adapter = LayerAdapter | PromptAdapter

# peft_type: the config's class, the family, and what makes the layers or the encoder.
METHODS = {
    "LORA": (LoraConfig, LayerAdapter, lora_layers),
    "QLORA": (QLoraConfig, LayerAdapter, qlora_layers),  # a LORA in files
    "ADALORA": (AdaLoraConfig, AdaLoraAdapter, adalora_layers),
    "BITFIT": (BitFitConfig, LayerAdapter, bitfit_layers),
    "BOTTLENECK": (BottleneckConfig, LayerAdapter, bottleneck_layers),
    "PROMPT_TUNING": (PromptTuningConfig, PromptAdapter, PromptEmbedding),
    "P_TUNING": (PromptEncoderConfig, PromptAdapter, PromptEncoder),
    "PREFIX_TUNING": (PrefixTuningConfig, PromptAdapter, PrefixEncoder),
}
for _config_class, *_ in METHODS.values():
    PeftConfig.register(_config_class)


def as_qlora(config: LoraConfig) -> QLoraConfig:
    """A LoRA's config for a 4-bit model. Raises ValueError for what QLoRA does not have."""
    own = {field.name for field in fields(QLoraConfig) if field.init}
    others = {k: v for k, v in asdict(config).items() if k not in own and k != "peft_type" and v}
    if others:
        raise ValueError(f"on a 4-bit model these are not implemented: {', '.join(others)}")
    return QLoraConfig(**{name: getattr(config, name) for name in own})


def make_adapter(model: nn.Module, config: PeftConfig) -> Adapter:
    """A new adapter for a bare model, which is not changed. On 4-bit layers LoRA is QLoRA."""
    if isinstance(config, LoraConfig) and any(isinstance(m, Linear4bit) for m in model.modules()):
        config = as_qlora(config)
    _, family, make = METHODS[config.peft_type]
    return family(config, model, make)


def weighted_adapter(
    model: nn.Module,
    parts: list[tuple[LayerAdapter, float]],
    combination_type: str,
    svd_rank: int | None,
) -> LayerAdapter:
    """A frozen LoRA that is the weighted sum of others.

    Raises ValueError for another method than LoRA, an unknown combination, a weight that is no
    number, and different ranks under "linear".
    """
    configs = [adapter.config for adapter, _ in parts]
    for config in configs:
        if config.peft_type not in ("LORA", "QLORA"):
            raise ValueError(f"{config.peft_type} has no weighted sum: only LoRAs can be added up")
    if combination_type not in COMBINATIONS:
        known = ", ".join(COMBINATIONS)
        raise ValueError(f"combination_type is {combination_type!r}; there are: {known}")
    for _, w in parts:
        if not isinstance(w, int | float) or not math.isfinite(w):
            raise ValueError(f"a weight is {w!r}: give numbers")
    combination_type = "linear" if len(parts) == 1 else combination_type
    ranks = [max([c.r, *getattr(c, "rank_pattern", {}).values()]) for c in configs]
    if combination_type == "linear" and len(set(ranks)) > 1:
        raise ValueError(f"linear needs LoRAs of one rank, and these have {ranks}: take svd or cat")
    r = {"svd": svd_rank or max(ranks), "linear": ranks[0], "cat": sum(ranks)}[combination_type]
    targets = [config.target_modules for config in configs]
    if any(isinstance(target, str) for target in targets):  # the names of them all, as one regex
        joined = "|".join(dict.fromkeys(re.escape(n) for a, _ in parts for n in a.layers))
    else:
        joined = sorted({name for target in targets for name in target})
    config = type(configs[0])(
        r=r, lora_alpha=r, target_modules=joined, task_type=configs[0].task_type,
        lora_dropout=configs[0].lora_dropout, inference_mode=True,
    )  # fmt: skip
    summed = make_adapter(model, config)
    with torch.no_grad():
        for name, layer in summed.layers.items():
            found = [(w, adapter.layers[name]) for adapter, w in parts if name in adapter.layers]
            loras = [(w, x.scaling, x.lora_A.weight, x.lora_B.weight) for w, x in found]
            a, b = COMBINATIONS[combination_type](loras, r)
            layer.lora_A.weight.copy_(a)
            layer.lora_B.weight.copy_(b)
    return summed


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
            penalty = self._current.penalty() if self.training else None
            if penalty is not None:
                out = replace_loss(out, out[0] + penalty)
        return out

    def generate(self, *args, **options) -> Tensor:
        """The base's own `generate`, with the active adapter at work."""
        return self._current.generate(self.base_model, *args, **options)

    @property
    def allocator(self) -> RankAllocator | None:
        """What moves AdaLoRA's ranks; None for every other method, and for ranks from a file."""
        return getattr(self._active, "allocator", None)

    def update_and_allocate(self, step: int) -> None:
        """AdaLoRA's work after the optimizer's step `step` and before the gradients are cleared.

        For every other method, and for ranks that were read from a file, there is nothing to do.
        """
        if self.allocator is not None:
            self.allocator.update_and_allocate(step)

    def ranks(self) -> dict[str, int]:
        """The rank that AdaLoRA has left to each layer; empty for every other method."""
        active = self._active
        if not isinstance(active, AdaLoraAdapter):
            return {}
        if active.allocator is not None:
            return active.allocator.ranks()
        return {name: len(layer.lora_E) for name, layer in active.layers.items()}

    # --- adapters ---

    def add_adapter(self, adapter_name: str, config: PeftConfig) -> None:
        """Make a new adapter. The first is put in place, a later one waits for `set_adapter`."""
        if getattr(config, "peft_type", None) not in METHODS:
            raise TypeError(
                f"{config!r} is not a config of a method; those are: {', '.join(METHODS)}"
            )
        own = copy.copy(config)  # training writes into it: AdaLoRA the ranks it kept
        self._register(adapter_name, lambda: make_adapter(self.base_model, own))

    def load_adapter(self, path: str | Path, adapter_name: str, is_trainable: bool = False) -> None:
        """Read an adapter's folder, ours or peft's; frozen unless `is_trainable`.

        Raises ValueError, before anything is changed, for a damaged file, an adapter of another
        model, tensors that are missing, surplus or of another shape.
        """
        self._register(
            adapter_name, lambda: _read_adapter(self.base_model, Path(path), is_trainable)
        )

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
        if not adapters or len(weights) != len(adapters):
            raise ValueError(f"adapters {adapters} and weights {weights}: give one weight for each")
        parts = [(self.adapters[name], w) for name, w in zip(adapters, weights, strict=True)]
        self._register(
            adapter_name,
            lambda: weighted_adapter(self.base_model, parts, combination_type, svd_rank),
        )

    def set_adapter(self, adapter_name: str) -> None:
        """Put an adapter in the place of the one that is there; where there is none, it waits."""
        self._check_name(adapter_name)
        with self._taken_out():
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
        with self._taken_out():
            yield

    def merge_adapter(self) -> None:
        """Let the active adapter's layers compute with W' = W + ΔW. Nothing of the base changes."""
        for layer in self._mergeable():
            layer.merge()

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`, to the bit."""
        for layer in self._mergeable():
            layer.unmerge()

    def merge_and_unload(self, inplace: bool = False) -> nn.Module:
        """A plain model of the base's class whose layers hold W'.

        It is a copy, and this model stays as it is. `inplace` saves the copy: the base's weights
        are overwritten, and the adapters, made for the old ones, are gone.
        """
        self._mergeable()
        names = list(self._active.layers)
        model = self.base_model if inplace else copy.deepcopy(self.base_model)
        for name in names:
            model.set_submodule(name, model.get_submodule(name).merge_into_base())
        dequantize_model(model)  # where the base is in 4 bits, what was not adapted as well
        if inplace:
            self.adapters, self.active_adapter, self.in_place = {}, None, False
        return model

    def unload(self) -> nn.Module:
        """The base, without any adapter."""
        self._take_out()
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
        for i, (name, adapter) in enumerate(self.adapters.items()):
            folder = Path(path) / name if i else Path(path)
            folder.mkdir(parents=True, exist_ok=True)
            config = asdict(adapter.config) | getattr(adapter.config, "other_keys", {})
            config["peft_type"] = config["peft_type"].removeprefix("Q")
            config["inference_mode"] = True
            text = json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n"  # of a set
            tensors = {key: tensor.contiguous() for key, tensor in found[name].items()}

            def write_tensors(file: str, tensors: dict = tensors) -> None:
                save_file(tensors, file, metadata={"format": "pt"})

            def write_config(file: str, text: str = text) -> None:
                Path(file).write_text(text)

            write_file(folder / "adapter_model.safetensors", write_tensors)
            write_file(folder / "adapter_config.json", write_config)

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

    def _mergeable(self) -> list[nn.Module]:
        if not isinstance(self._active, LayerAdapter):
            kind = self._active.config.peft_type
            raise ValueError(f"{kind} changes what the model is fed: there is nothing to merge")
        if isinstance(self._active, AdaLoraAdapter):
            self._active.check_allocated()
        if not self.in_place:
            raise RuntimeError("the adapter is disabled: merge it outside disable_adapter")
        return self._active.modules()

    def _put_in(self) -> None:
        self._active.put_in(self)
        self.in_place = True

    def _take_out(self) -> None:
        if self.in_place:
            self._active.take_out(self)
        self.in_place = False

    @contextmanager
    def _taken_out(self) -> Iterator[None]:
        was_in_place = self.in_place
        self._take_out()
        try:
            yield
        finally:
            if was_in_place and self.active_adapter is not None:
                self._put_in()

    def _register(self, name: str, make: Callable[[], Adapter]) -> None:
        """Make an adapter for the bare base; put it in place if it is the first."""
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name!r} already")
        with self._taken_out():
            self.adapters[name] = make()
        if self.active_adapter is None:
            self.base_model.requires_grad_(False)
            self.active_adapter = name
            self._put_in()

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


BARE = LayerAdapter(LoraConfig(target_modules=[]), nn.Module(), lambda model, config: {})


def replace_loss(out, loss: Tensor):
    """A model's output with another loss: a named tuple, or transformers' ModelOutput."""
    if hasattr(out, "_replace"):
        return out._replace(loss=loss)
    out["loss"] = loss
    return out


def _read_adapter(model: nn.Module, folder: Path, is_trainable: bool) -> Adapter:
    """An adapter's folder as an Adapter for `model`, which is not changed."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    config = PeftConfig.from_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"there is no {file} (a pickled adapter_model.bin is never read)")
    try:
        found = load_file(file)
    except Exception as error:  # safetensors raises a class of its own for damaged files
        raise ValueError(f"{file} is damaged: {error}") from error
    # without its network a prompt is read as it is, and so it is where nothing will be trained
    bare = "prompt_embeddings" in found and len(found) == 1
    config.inference_mode = bare or not is_trainable
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten: leave no trace
            adapter = make_adapter(model, config)
    except (ValueError, TypeError, RuntimeError, re.error) as error:  # for one, a rank of 10**40
        raise ValueError(f"{folder / 'adapter_config.json'}: {error}") from error
    try:
        adapter.load(found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    adapter.config.inference_mode = not is_trainable
    if bare and is_trainable:
        adapter.encoder.requires_grad_(True)
    return adapter


# --- write_file: the same lines stand in gpt.py and peft_model.py (tests/test_copy_alone.py)
def write_file(path: Path, write: Callable[[str], object]) -> None:
    """Have `write` fill a file beside `path`, then rename it: a crash leaves the old or the new."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(beside)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


# --- end of write_file
