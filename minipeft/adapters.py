"""Adapters: the common interface of all methods, one class per family, and the table of methods.

An adapter is what a method adds to a model. Weight methods (LoRA, AdaLoRA, BitFit, bottleneck) wrap
layers of the model. Prompt methods (prompt, P- and prefix tuning) have an encoder that computes
extra inputs. QLoRA has no entry of its own: it is LoRA on 4-bit layers. The base is frozen by
`PeftModel`, not here. A new method is one file in methods/ and one line in METHODS.
"""

import inspect
import math
from collections.abc import Mapping
from itertools import product
from types import MappingProxyType
from typing import NamedTuple

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
    """Interface of an adapter. This base class is the null adapter: it changes nothing."""

    config = None  # the method's config
    encoder: nn.Module | None = None  # prompt methods only
    layers: Mapping[str, nn.Module] = MappingProxyType({})  # weight methods only, by layer name
    allocator: RankAllocator | None = None  # AdaLoRA only, while its ranks can still move

    def modules(self) -> list[nn.Module]:
        """The modules that follow the model's `.to()`, `.train()` and `.eval()`."""
        return [self.encoder] if self.encoder is not None else list(self.layers.values())

    def attach(self, model: nn.Module) -> None:
        """Replace the layers of the base that this adapter adapts."""
        for name, layer in self.layers.items():
            model.set_submodule(name, layer)

    def detach(self, model: nn.Module) -> None:
        """Put the original layers back."""
        for name, layer in self.layers.items():
            model.set_submodule(name, layer.base_layer)

    def run(self, model: nn.Module, *args, **kwargs):
        """The model's forward pass with this adapter, which is attached."""
        return model(*args, **kwargs)

    def generate(self, model: nn.Module, *args, **kwargs):
        return model.generate(*args, **kwargs)

    def penalty(self) -> Tensor | float:
        """What the method adds to the training loss."""
        return 0.0

    def update_and_allocate(self, step: int) -> None:
        """Called after every optimizer step, before the gradients are cleared (AdaLoRA)."""

    def ranks(self) -> dict[str, int]:
        """The rank of each layer, for methods that change ranks (AdaLoRA)."""
        return {}

    def check_finished(self) -> None:
        """Raises RuntimeError if the adapter is in the middle of its schedule (AdaLoRA)."""

    def check_mergeable(self) -> None:
        """Raises ValueError if the method cannot be merged, RuntimeError if it cannot yet."""

    def parameters(self) -> dict[str, Tensor]:
        """The adapter's own tensors by name, as Parameters; nothing of the base."""
        named = self.layers if self.encoder is None else {"prompt_encoder": self.encoder}
        return {
            f"{name}.{key}": tensor
            for name, module in named.items()
            for key, tensor in module.state_dict(keep_vars=True).items()
            if not key.startswith("base_layer.")
        }

    def state(self) -> dict[str, Tensor]:
        """All tensors needed to continue training."""
        return self.parameters()

    def check_state(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError for a state that `load_state` could not load."""
        check_match(state, self.parameters())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load a checked state. Merged layers are unmerged: W' was made from the old tensors."""
        copy_tensors(state, self.parameters())
        for layer in self.layers.values():
            if hasattr(layer, "unmerge"):
                layer.unmerge()


class WeightAdapter(Adapter):
    """A method that wraps layers of the base."""

    def __init__(self, model: nn.Module, config):
        self.config = config
        part = "bias" if config.peft_type == "BITFIT" else "weight"
        targets = find_targets(model, config.target_modules, part)
        self.layers = {name: self.new_layer(name, base) for name, base in targets.items()}
        if getattr(config, "trainable_token_indices", None) is not None:
            self.layers |= token_rows(model, config.trainable_token_indices)
        for parameter in self.parameters().values():
            parameter.requires_grad_(not config.inference_mode)

    def new_layer(self, name: str, base_layer: nn.Module) -> nn.Module:
        kind = self.config.peft_type
        if kind == "LORA" and isinstance(base_layer, Linear4bit):
            return QLoraLinear(base_layer, self.config)
        if kind != "BITFIT" and isinstance(base_layer, QuantizedLinear):
            raise ValueError(
                f"target {name} is a {type(base_layer).__name__}, which {kind} cannot adapt: LoRA "
                "works on 4-bit layers, BitFit on all quantized layers"
            )
        return METHODS[kind].module(base_layer, self.config)

    def check_mergeable(self) -> None:
        self.check_finished()
        if self.config.peft_type == "BOTTLENECK":
            raise ValueError("cannot merge BOTTLENECK: a bottleneck is not linear")

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, under peft's keys."""
        found = self.parameters().items()
        return {f"base_model.model.{key}": tensor.detach() for key, tensor in found}

    def load(self, saved: dict[str, Tensor]) -> None:
        """Load saved tensors into a new adapter. Raises ValueError if they do not match it."""
        check_match(saved, self.tensors())
        copy_tensors(saved, self.tensors())  # which share memory with the layers


class AdaLoraAdapter(WeightAdapter):
    """AdaLoRA's layers, and the allocator that prunes their ranks."""

    def __init__(self, model: nn.Module, config):
        super().__init__(model, config)
        unknown = set(config.rank_pattern or {}) - {f"{name}.lora_E" for name in self.layers}
        if unknown:
            raise ValueError(f"rank_pattern: {min(unknown)!r} is not a target of this adapter")
        if config.rank_pattern is None and not config.inference_mode:
            self.allocator = RankAllocator(self.layers, config)

    def new_layer(self, name: str, base_layer: nn.Module) -> nn.Module:
        kept = (self.config.rank_pattern or {}).get(f"{name}.lora_E")  # from a file
        if kept is None or isinstance(base_layer, QuantizedLinear):
            return super().new_layer(name, base_layer)
        return SVDLinear(base_layer, self.config, sum(kept))

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

    def check_finished(self) -> None:
        """Raises RuntimeError for trained layers whose ranks are still above the target."""
        c, allocator, total = self.config, self.allocator, sum(self.ranks().values())
        trained = any(layer.lora_E.any() for layer in self.layers.values())  # E starts at 0
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
        """The triplets that were kept: rows of A and E, columns of B."""
        self.check_finished()
        found = super().tensors()
        for name, kept in (self.allocator.kept if self.allocator else {}).items():
            start = f"base_model.model.{name}.lora_"
            found |= {f"{start}{letter}": found[f"{start}{letter}"][kept] for letter in "AE"}
            found[f"{start}B"] = found[f"{start}B"][:, kept]
        return found

    def statistics(self) -> dict[str, Tensor]:
        """The allocator's state: step, importance, uncertainty and masks; empty before step 1."""
        allocator = self.allocator
        if allocator is None or allocator.step is None:
            return {}
        found = {"allocator.step": torch.tensor(allocator.step)}
        for kind in ("importance", "uncertainty"):
            for (name, letter), tensor in getattr(allocator, kind).items():
                found[f"allocator.{kind}.{name}.{letter}"] = tensor
        return found | {f"allocator.kept.{name}": mask for name, mask in allocator.kept.items()}

    def state(self) -> dict[str, Tensor]:
        return self.parameters() | self.statistics()

    def check_state(self, state: dict[str, Tensor]) -> None:
        found = {key: t.shape for key, t in state.items() if key.startswith("allocator.")}
        super().check_state({key: t for key, t in state.items() if key not in found})
        wanted = {"allocator.step": ()} if found else {}
        for name, layer in self.layers.items() if found else ():
            for letter, kind in product("AEB", ("importance", "uncertainty")):
                shape = getattr(layer, f"lora_{letter}").shape
                wanted[f"allocator.{kind}.{name}.{letter}"] = shape
            if any(key.startswith("allocator.kept.") for key in found):
                wanted[f"allocator.kept.{name}"] = layer.lora_E.shape[:1]
        wrong = sorted({key for key, _ in found.items() ^ wanted.items()})
        if wrong or (found and self.allocator is None):
            raise ValueError(f"the allocator does not match this model: {', '.join(wrong[:3])}")

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state({k: t for k, t in state.items() if not k.startswith("allocator.")})
        if self.allocator is None:
            return
        self.allocator = RankAllocator(self.layers, self.config)
        device = next(iter(self.layers.values())).lora_E.device
        for key, tensor in state.items():
            start, _, rest = key.partition(".")
            kind, _, name = rest.partition(".")
            if start == "allocator" and kind == "step":
                self.allocator.step = int(tensor)
            elif start == "allocator" and kind == "kept":
                self.allocator.kept[name] = tensor.to(device, copy=True)
            elif start == "allocator":
                layer, _, letter = name.rpartition(".")
                getattr(self.allocator, kind)[layer, letter] = tensor.to(device, copy=True)
        self.write_rank_pattern()


class PromptAdapter(Adapter):
    """An encoder that computes virtual tokens, or keys and values for each layer (a prefix)."""

    def __init__(self, model: nn.Module, config):
        check_prompt_model(model, config)
        self.config, self.encoder = config, METHODS[config.peft_type].module(model, config)
        self.encoder.requires_grad_(not config.inference_mode)
        config.token_dim = model.get_input_embeddings().weight.shape[1]  # peft saves these sizes
        if config.peft_type == "PREFIX_TUNING":
            config.num_layers, config.num_attention_heads, width = self.encoder.shape
            config.token_dim = config.num_attention_heads * width
        if hasattr(config, "encoder_hidden_size"):
            config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim

    def run(self, model: nn.Module, *args, **kwargs):
        signature = inspect.signature(model.forward)
        inputs = signature.bind_partial(*args, **kwargs).arguments  # positional ones by name too
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                inputs |= inputs.pop(name, {})
        for name in ("past_key_values", "use_cache"):
            if inputs.pop(name, None):
                raise ValueError(f"{name} cannot be used with a prompt method: call generate()")
        names = (
            "is_activation_checkpointing",
            "is_gradient_checkpointing",
        )  # transformers', by age
        checkpointing = any(getattr(model, name, False) for name in names)
        if self.config.peft_type == "PREFIX_TUNING" and model.training and checkpointing:
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
        """The encoder's tensors if a network computes the prompt; empty if it is the prompt."""
        found = {key: tensor.detach() for key, tensor in self.parameters().items()}
        return found if len(found) > 1 else {}

    def tensors(self) -> dict[str, Tensor]:
        """The prompt, which is all that peft reads, and the network that computes it."""
        prompt = self.encoder.prompt().detach()  # (p, d), or (1, p, 2 l d) for a prefix
        return {"prompt_embeddings": prompt.view(prompt.shape[-2:])} | self.network()

    def load(self, saved: dict[str, Tensor]) -> None:
        """Load a saved prompt, or the network if this encoder has one."""
        if self.network():
            target, ignored = self.network(), "prompt_embeddings"
        else:
            target = {"prompt_embeddings": self.encoder.embedding.weight.detach()}
            ignored = "prompt_encoder."
        saved = {key: tensor for key, tensor in saved.items() if not key.startswith(ignored)}
        check_match(saved, target)
        copy_tensors(saved, target)


def check_prompt_model(model: nn.Module, config) -> None:
    """Raises ValueError for a model that cannot take these virtual tokens."""
    settings = getattr(model, "config", None)
    if getattr(settings, "is_encoder_decoder", False):
        raise ValueError("prompt methods need a decoder; this is an encoder-decoder model")
    if not hasattr(model, "get_input_embeddings"):
        raise ValueError(f"{type(model).__name__} has no get_input_embeddings()")
    names = ("n_positions", "max_position_embeddings")
    context = next((getattr(settings, n) for n in names if hasattr(settings, n)), math.inf)
    if config.num_virtual_tokens >= context:
        p = config.num_virtual_tokens
        raise ValueError(f"{p} virtual tokens leave no room in a context of {context}")


def check_match(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Raises ValueError if names or shapes differ, or if a source is not floating-point."""
    wrong = [f"{key} is missing" for key in target if key not in source]
    wrong += [f"{key} has no place in this model" for key in source if key not in target]
    wrong += [
        f"{key} is {tuple(t.shape)} of {t.dtype}, not {tuple(target[key].shape)} floats"
        for key, t in source.items()
        if key in target and not (t.shape == target[key].shape and t.is_floating_point())
    ]
    if wrong:
        raise ValueError(
            f"adapter does not match this model: {'; '.join(wrong[:3])} ({len(wrong)} in all)"
        )


@torch.no_grad()
def copy_tensors(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for key, tensor in target.items():
        tensor.copy_(source[key])


class Method(NamedTuple):
    config: type  # the config's class
    adapter: type[Adapter]  # its family
    module: type[nn.Module]  # the class of its layers, or of its encoder


METHODS = {  # by peft_type
    "LORA": Method(LoraConfig, WeightAdapter, LoraLinear),
    "ADALORA": Method(AdaLoraConfig, AdaLoraAdapter, SVDLinear),
    "BITFIT": Method(BitFitConfig, WeightAdapter, BitFitLayer),
    "BOTTLENECK": Method(BottleneckConfig, WeightAdapter, BottleneckLayer),
    "PROMPT_TUNING": Method(PromptTuningConfig, PromptAdapter, PromptEmbedding),
    "P_TUNING": Method(PromptEncoderConfig, PromptAdapter, PromptEncoder),
    "PREFIX_TUNING": Method(PrefixTuningConfig, PromptAdapter, PrefixEncoder),
}
NO_ADAPTER = Adapter()


def make_adapter(model: nn.Module, config) -> Adapter:
    """Create an adapter for a bare model, which changes only when the adapter is attached.

    The adapter keeps the config and may write to it. Raises TypeError for anything but a method's
    config, ValueError if the model does not support the method.
    """
    if getattr(config, "peft_type", None) not in METHODS:
        raise TypeError(f"{config!r} is not a config of a method: {', '.join(METHODS)}")
    return METHODS[config.peft_type].adapter(model, config)
