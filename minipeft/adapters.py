"""Adapters: what a method adds to a model, behind one interface, and the table of all methods.

A weight method (LoRA, AdaLoRA, BitFit, bottleneck) has layers, each around a layer of the model. A
prompt method (prompt, P- and prefix tuning) has an encoder that computes extra inputs.
A new method is one file in methods/ and one line in METHODS.
"""

import inspect
import math
from collections.abc import Mapping
from itertools import product
from types import MappingProxyType

import torch
from torch import Tensor, nn

from minipeft.methods.adalora import AdaLoraConfig, RankAllocator, SVDLinear, orthogonality
from minipeft.methods.bitfit import BitFitConfig, BitFitLayer
from minipeft.methods.bottleneck import BottleneckConfig, BottleneckLayer
from minipeft.methods.lora import LoraConfig, LoraLinear
from minipeft.methods.p_tuning import PromptEncoder, PromptEncoderConfig
from minipeft.methods.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from minipeft.methods.prompt_tuning import PromptEmbedding, PromptTuningConfig
from minipeft.methods.qlora import Linear4bit, QLoraLinear, QuantizedLinear
from minipeft.targets import find_targets
from minipeft.token_rows import token_rows


class Adapter:
    """Interface of an adapter; this base class is the null adapter."""

    config = None  # the method's config
    encoder: nn.Module | None = None  # of a prompt method
    layers: Mapping[str, nn.Module] = MappingProxyType({})  # of a weight method, by layer name

    def modules(self) -> list[nn.Module]:
        """What is moved, cast and switched between training and evaluation."""
        return [self.encoder] if self.encoder is not None else list(self.layers.values())

    def state(self) -> dict[str, Tensor]:
        """Every tensor needed to continue training, and nothing of the base."""
        named = self.layers if self.encoder is None else {"prompt_encoder": self.encoder}
        return {
            f"{name}.{key}": tensor
            for name, module in named.items()
            for key, tensor in module.state_dict(keep_vars=True).items()
            if not key.startswith("base_layer.")
        }

    def attach(self, model: nn.Module) -> None:
        """Replace the layers of the base that this adapter adapts."""
        for name, layer in self.layers.items():
            model.set_submodule(name, layer)

    def detach(self, model: nn.Module) -> None:
        """Put the original layers back."""
        for name, layer in self.layers.items():
            model.set_submodule(name, layer.base_layer)

    def run(self, model: nn.Module, *args, **kwargs):
        return model(*args, **kwargs)

    def generate(self, model: nn.Module, *args, **kwargs):
        return model.generate(*args, **kwargs)

    def penalty(self) -> Tensor | None:
        """What the method adds to the training loss, if anything."""
        return None

    def ranks(self) -> dict[str, int]:
        """The rank of each layer, for methods that move ranks."""
        return {}

    def update_and_allocate(self, step: int) -> None:
        """AdaLoRA's work after an optimizer step; nothing for other methods."""

    def check_mergeable(self) -> None:
        """Raises ValueError if the method has no layers, RuntimeError if training is unfinished."""


NO_ADAPTER = Adapter()


class WeightAdapter(Adapter):
    """Layers around layers of the base."""

    def __init__(self, model: nn.Module, config):
        self.config = config
        part = "bias" if config.peft_type == "BITFIT" else "weight"
        targets = find_targets(model, config.target_modules, part)
        self.layers = {name: self.new_layer(name, base) for name, base in targets.items()}
        if getattr(config, "trainable_token_indices", None) is not None:
            self.layers |= token_rows(model, config.trainable_token_indices)
        for parameter in self.state().values():
            if isinstance(parameter, nn.Parameter):
                parameter.requires_grad_(not config.inference_mode)

    def new_layer(self, name: str, base_layer: nn.Module) -> nn.Module:
        kind = self.config.peft_type
        if isinstance(base_layer, QuantizedLinear) and kind != "BITFIT":
            if kind != "LORA" or not isinstance(base_layer, Linear4bit):
                raise ValueError(
                    f"target {name} is a {type(base_layer).__name__}: only LoRA works on quantized "
                    "layers, and only on 4-bit ones"
                )
            return QLoraLinear(base_layer, self.config)
        return METHODS[kind][2](base_layer, self.config)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, under peft's keys."""
        return {f"base_model.model.{key}": t.detach() for key, t in self.state().items()}

    def load(self, found: dict[str, Tensor]) -> None:
        """Load saved tensors. Raises ValueError for missing, surplus or misshapen ones."""
        copy_strictly(found, self.tensors())

    def check_mergeable(self) -> None:
        if self.config.peft_type == "BOTTLENECK":
            raise ValueError("cannot merge BOTTLENECK: a bottleneck is not linear")


class AdaLoraAdapter(WeightAdapter):
    """AdaLoRA's layers with the allocator of their ranks."""

    def __init__(self, model: nn.Module, config):
        super().__init__(model, config)
        fresh = config.rank_pattern is None and not config.inference_mode
        self.allocator = RankAllocator(self.layers, config) if fresh else None
        known = {f"{name}.lora_E" for name in self.layers}
        for key in set(config.rank_pattern or {}) - known:
            raise ValueError(f"rank_pattern: {key!r} is not a target of this adapter")

    def new_layer(self, name: str, base_layer: nn.Module) -> nn.Module:
        if isinstance(base_layer, QuantizedLinear):
            return super().new_layer(name, base_layer)  # raises
        kept = (self.config.rank_pattern or {}).get(f"{name}.lora_E")
        return SVDLinear(base_layer, self.config, None if kept is None else sum(kept))

    def penalty(self) -> Tensor:
        return self.config.orth_reg_weight * orthogonality(self.layers)

    def ranks(self) -> dict[str, int]:
        if self.allocator is not None:
            return self.allocator.ranks()
        return {name: len(layer.lora_E) for name, layer in self.layers.items()}

    def update_and_allocate(self, step: int) -> None:
        if self.allocator is not None:  # ranks that were read from a file do not move
            self.allocator.update_and_allocate(step)
            self.write_rank_pattern()

    def write_rank_pattern(self) -> None:
        kept = self.allocator.kept.items()
        self.config.rank_pattern = {f"{n}.lora_E": mask.tolist() for n, mask in kept} or None

    def check_mergeable(self) -> None:
        """Raises RuntimeError for trained layers whose ranks are still above the target."""
        c, allocator, total = self.config, self.allocator, sum(self.ranks().values())
        trained = any(layer.lora_E.any() for layer in self.layers.values())
        if allocator is None or not trained or total <= allocator.target:
            return
        step, last = allocator.step, c.total_step - c.tfinal
        last_call = "never called" if step is None else f"last called with step {step}"
        raise RuntimeError(
            f"AdaLoRA's ranks add up to {total}: they reach the target of {allocator.target} at "
            f"step {last} (total_step {c.total_step} - tfinal {c.tfinal}), and update_and_allocate "
            f"was {last_call}. Call it after every optimizer step, with a total_step as long as "
            f"the run; update_and_allocate({last}) prunes what is trained so far"
        )

    def tensors(self) -> dict[str, Tensor]:
        """The triplets that were kept."""
        self.check_mergeable()
        found = {f"base_model.model.{key}": t.detach() for key, t in super().state().items()}
        for name, kept in (self.allocator.kept if self.allocator else {}).items():
            start = f"base_model.model.{name}.lora_"
            found |= {f"{start}{letter}": found[f"{start}{letter}"][kept] for letter in "AE"}
            found[f"{start}B"] = found[f"{start}B"][:, kept]
        return found

    def state(self) -> dict[str, Tensor]:
        """The layers' tensors, and the allocator's statistics and mask."""
        found, allocator = super().state(), getattr(self, "allocator", None)
        if allocator is not None and allocator.step is not None:
            found["allocator.step"] = torch.tensor(allocator.step)
            for kind in ("importance", "uncertainty"):
                for (name, letter), tensor in getattr(allocator, kind).items():
                    found[f"allocator.{kind}.{name}.{letter}"] = tensor
            found |= {f"allocator.kept.{name}": mask for name, mask in allocator.kept.items()}
        return found

    def check_allocator(self, found: dict[str, Tensor]) -> None:
        """Raises ValueError for an allocator's state that does not match this one's shapes."""
        wanted = {"step": ()} if found else {}
        for name, layer in self.layers.items() if found else ():
            for letter, kind in product("AEB", ("importance", "uncertainty")):
                wanted[f"{kind}.{name}.{letter}"] = getattr(layer, f"lora_{letter}").shape
            if any(key.startswith("kept.") for key in found):
                wanted[f"kept.{name}"] = layer.lora_E.shape[:1]
        differ = {key: t.shape for key, t in found.items()}.items() ^ wanted.items()
        if differ or (found and self.allocator is None):
            keys = ", ".join(sorted({key for key, _ in differ})[:3])
            raise ValueError(f"the state of AdaLoRA's allocator does not match this model: {keys}")

    def load_allocator(self, found: dict[str, Tensor]) -> None:
        """Restore the allocator from a state, which is empty before the first step."""
        if self.allocator is None:
            return
        device = next(iter(self.layers.values())).lora_E.device
        self.allocator = RankAllocator(self.layers, self.config)
        for key, tensor in found.items():
            kind, _, name = key.partition(".")
            tensor = tensor.to(device, copy=True)
            if kind == "step":
                self.allocator.step = int(tensor)
            elif kind == "kept":
                self.allocator.kept[name] = tensor
            else:
                layer, _, letter = name.rpartition(".")
                getattr(self.allocator, kind)[layer, letter] = tensor
        self.write_rank_pattern()


class PromptAdapter(Adapter):
    """An encoder that computes virtual tokens, or their keys and values."""

    def __init__(self, model: nn.Module, config):
        check_prompt_model(model, config)
        self.config, self.encoder = config, METHODS[config.peft_type][2](model, config)
        self.encoder.requires_grad_(not config.inference_mode)
        config.token_dim = model.get_input_embeddings().weight.shape[1]
        if hasattr(config, "num_layers"):  # a prefix
            config.num_layers, config.num_attention_heads, width = self.encoder.shape
            config.token_dim = config.num_attention_heads * width
        if hasattr(config, "encoder_hidden_size"):
            config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim

    def run(self, model: nn.Module, *args, **kwargs):
        signature = inspect.signature(model.forward)
        inputs = signature.bind_partial(*args, **kwargs).arguments
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                inputs |= inputs.pop(name, {})
        for name in ("past_key_values", "use_cache"):
            if inputs.pop(name, None):
                raise ValueError(f"{name} cannot be used with a prompt method: call generate()")
        names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # new and old
        drops = next((getattr(model, name) for name in names if hasattr(model, name)), False)
        if self.config.peft_type == "PREFIX_TUNING" and model.training and drops:
            raise RuntimeError(
                "this model drops its cache, and the prefix with it, during gradient "
                "checkpointing: call gradient_checkpointing_disable()"
            )
        return self.encoder(model, **inputs)

    def generate(self, model: nn.Module, *args, **kwargs):
        return self.encoder.generate(model, *args, **kwargs)

    def check_mergeable(self) -> None:
        kind = self.config.peft_type
        raise ValueError(f"cannot merge {kind}: it changes the input, not the weights")

    def network(self) -> dict[str, Tensor]:
        """The tensors of an encoder that is more than the prompt itself."""
        return {key: t.detach() for key, t in self.state().items()} if len(self.state()) > 1 else {}

    def tensors(self) -> dict[str, Tensor]:
        """The prompt, which is all that peft reads, and the network that wrote it."""
        with torch.no_grad():
            prompt = self.encoder.prompt()  # (p, d), or (1, p, 2 l d)
        return {"prompt_embeddings": prompt.detach().view(prompt.shape[-2:])} | self.network()

    def load(self, found: dict[str, Tensor]) -> None:
        """Load a saved prompt, or the network if this encoder has one."""
        wanted = self.network() or {"prompt_embeddings": self.encoder.embedding.weight.data}
        extra = {key for key in found if key.startswith("prompt_encoder.")}
        spare = {"prompt_embeddings"} if self.network() else extra
        copy_strictly({k: v for k, v in found.items() if k not in spare}, wanted)


def check_prompt_model(model: nn.Module, config) -> None:
    """Raises ValueError for a model that cannot take these virtual tokens."""
    settings = getattr(model, "config", None)
    if getattr(settings, "is_encoder_decoder", False):
        raise ValueError("prompt methods need a decoder; this is an encoder-decoder model")
    if not hasattr(model, "get_input_embeddings"):
        raise ValueError(f"{type(model).__name__} has no get_input_embeddings()")
    names = ("n_positions", "max_position_embeddings")
    room = next((getattr(settings, name) for name in names if hasattr(settings, name)), math.inf)
    if config.num_virtual_tokens >= room:
        p = config.num_virtual_tokens
        raise ValueError(f"{p} virtual tokens leave no room in a context of {room}")


def copy_strictly(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Copy tensors into others of the same names. Raises ValueError first if any differ."""
    wrong = [f"{key} is missing" for key in wanted if key not in found]
    wrong += [f"{key} has no place in this model" for key in found if key not in wanted]
    wrong += [
        f"{key} is {tuple(t.shape)} of {t.dtype}, not {tuple(wanted[key].shape)} floats"
        for key, t in found.items()
        if key in wanted and not (t.shape == wanted[key].shape and t.is_floating_point())
    ]
    if wrong:
        raise ValueError(
            f"adapter does not match this model: {'; '.join(wrong[:3])} ({len(wrong)} in all)"
        )
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(found[key])


# peft_type: the config's class, the kind of adapter, the class of its layers or its encoder.
METHODS = {
    "LORA": (LoraConfig, WeightAdapter, LoraLinear),  # on 4-bit layers QLoraLinear
    "ADALORA": (AdaLoraConfig, AdaLoraAdapter, SVDLinear),
    "BITFIT": (BitFitConfig, WeightAdapter, BitFitLayer),
    "BOTTLENECK": (BottleneckConfig, WeightAdapter, BottleneckLayer),
    "PROMPT_TUNING": (PromptTuningConfig, PromptAdapter, PromptEmbedding),
    "P_TUNING": (PromptEncoderConfig, PromptAdapter, PromptEncoder),
    "PREFIX_TUNING": (PrefixTuningConfig, PromptAdapter, PrefixEncoder),
}


def make_adapter(model: nn.Module, config) -> WeightAdapter | PromptAdapter:
    """A new adapter for a bare model, which does not change. The config becomes the adapter's own.

    Raises TypeError for anything but a method's config, ValueError for what the model cannot take.
    """
    if getattr(config, "peft_type", None) not in METHODS:
        raise TypeError(f"{config!r} is not a config of a method: {', '.join(METHODS)}")
    return METHODS[config.peft_type][1](model, config)
