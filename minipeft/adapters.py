"""What an adapter is to a model: three families of methods behind one interface, and their table.

A weight method (LoRA, AdaLoRA) makes layers, each around the one it adapts. A prompt method
(prompt, P- and prefix tuning) makes an encoder that writes what the model is fed besides its
input. An adapter is such a set, or such an encoder, with its config.

A new method is one file beside this one and one line in METHODS.
"""

from collections.abc import Callable
from dataclasses import asdict, fields

import torch
from torch import Tensor, nn

from minipeft.adalora import AdaLoraConfig, RankAllocator, adalora_layers, orthogonality
from minipeft.bitfit import BitFitConfig, bitfit_layers
from minipeft.bottleneck import BottleneckConfig, bottleneck_layers
from minipeft.lora import LoraConfig, lora_layers
from minipeft.p_tuning import PromptEncoder, PromptEncoderConfig
from minipeft.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from minipeft.prompt_tuning import PromptEmbedding, PromptTuningConfig
from minipeft.qlora import Linear4bit, QLoraConfig, qlora_layers
from minipeft.token_rows import token_rows


class Adapter:
    """What a model asks of an adapter. As it stands here it does nothing: the model is bare."""

    config = None  # the method's own dataclass
    allocator: RankAllocator | None = None  # what moves AdaLoRA's ranks, while they move

    def modules(self) -> list[nn.Module]:
        """What is moved, cast and trained."""
        return []

    def put_in(self, owner: nn.Module) -> None:
        """Take the place in a PeftModel."""

    def take_out(self, owner: nn.Module) -> None:
        """Leave it: the model is as it was before."""

    def run(self, model: nn.Module, inputs: dict):
        first = (inputs.pop("input_ids"),) if "input_ids" in inputs else ()
        return model(*first, **inputs)

    def generate(self, model: nn.Module, *args, **options) -> Tensor:
        return model.generate(*args, **options)

    def penalized(self, out):
        """A model's output with what training adds to the loss, if anything."""
        return out

    def ranks(self) -> dict[str, int]:
        """The rank that is left to each layer, where a method moves ranks."""
        return {}

    def check_mergeable(self) -> None:
        """Raises ValueError where there are no layers to merge, RuntimeError where not yet."""
        kind = self.config.peft_type
        raise ValueError(f"{kind} changes what the model is fed: there is nothing to merge")


class LayerAdapter(Adapter):
    """A weight method's config and layers, in place or not."""

    def __init__(self, config, model: nn.Module, make: Callable):
        self.config = config
        self.layers: dict[str, nn.Module] = make(model, config)  # by the name of what each adapts
        if getattr(config, "trainable_token_indices", None) is not None:
            ids, trainable = config.trainable_token_indices, not config.inference_mode
            self.layers |= token_rows(model, ids, trainable)

    def modules(self) -> list[nn.Module]:
        return list(self.layers.values())

    def put_in(self, owner: nn.Module) -> None:
        for name, layer in self.layers.items():
            layer.train(owner.training)
            owner.base_model.set_submodule(name, layer)

    def take_out(self, owner: nn.Module) -> None:
        for name, layer in self.layers.items():
            owner.base_model.set_submodule(name, layer.base_layer)

    def check_mergeable(self) -> None:
        pass

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

    def __init__(self, config, model: nn.Module, make: Callable):
        super().__init__(config, model, make)
        fresh = config.rank_pattern is None and not config.inference_mode
        self.allocator = RankAllocator(self.layers, config) if fresh else None

    def penalized(self, out):
        loss = out[0] + self.config.orth_reg_weight * orthogonality(self.layers)
        if hasattr(out, "_replace"):  # a named tuple
            return out._replace(loss=loss)
        out["loss"] = loss  # transformers' ModelOutput
        return out

    def ranks(self) -> dict[str, int]:
        if self.allocator is not None:
            return self.allocator.ranks()
        return {name: len(layer.lora_E) for name, layer in self.layers.items()}

    def check_mergeable(self) -> None:
        self.check_allocated()

    def check_allocated(self) -> None:
        """Raises RuntimeError for layers that were trained and whose ranks are above the target."""
        c, allocator, total = self.config, self.allocator, sum(self.ranks().values())
        trained = any(layer.lora_E.any() for layer in self.layers.values())
        if not (allocator and trained and total > allocator.target):
            return
        step, last = allocator.step, c.total_step - c.tfinal
        raise RuntimeError(
            f"AdaLoRA's ranks add up to {total}: they reach their target "
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


class PromptAdapter(Adapter):
    """A prompt method's config and encoder, in place or not."""

    def __init__(self, config, model: nn.Module, make: Callable):
        self.config, self.encoder = config, make(config, model)

    def modules(self) -> list[nn.Module]:
        return [self.encoder]

    def put_in(self, owner: nn.Module) -> None:
        self.encoder.train(owner.training)
        owner.prompt_encoder = self.encoder  # a submodule from here on: counted, moved, trained

    def take_out(self, owner: nn.Module) -> None:
        owner.prompt_encoder = None

    def run(self, model: nn.Module, inputs: dict):
        for name in ("past_key_values", "use_cache"):
            if inputs.pop(name, None):
                raise ValueError(f"{name} cannot be used with a prompt method: call generate()")
        return self.encoder(model, **inputs)

    def generate(self, model: nn.Module, *args, **options) -> Tensor:
        return self.encoder.generate(model, *args, **options)

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


def as_qlora(config: LoraConfig) -> QLoraConfig:
    """A LoRA's config for a 4-bit model. Raises ValueError for what QLoRA does not have."""
    own = {field.name for field in fields(QLoraConfig) if field.init}
    others = {k: v for k, v in asdict(config).items() if k not in own and k != "peft_type" and v}
    if others:
        raise ValueError(f"on a 4-bit model these are not implemented: {', '.join(others)}")
    return QLoraConfig(**{name: getattr(config, name) for name in own})


def make_adapter(model: nn.Module, config) -> Adapter:
    """A new adapter for a bare model, which is not changed. On 4-bit layers LoRA is QLoRA."""
    if getattr(config, "peft_type", None) not in METHODS:
        raise TypeError(f"{config!r} is not a config of a method; those are: {', '.join(METHODS)}")
    if isinstance(config, LoraConfig) and any(isinstance(m, Linear4bit) for m in model.modules()):
        config = as_qlora(config)
    _, family, make = METHODS[config.peft_type]
    return family(config, model, make)
