"""Adapters of the weight methods, and the table of all methods.

An adapter is what a method adds to a model (adapter.py). Weight methods (LoRA, AdaLoRA, VeRA,
(IA)³, BitFit, bottleneck) wrap layers of the model. Prompt methods (prompt, P- and prefix tuning)
have an encoder that computes extra inputs (prompt_adapter.py). QLoRA, DoRA and PiSSA have no
entries of their own: they are LoRA with other layers. The base is frozen by `PeftModel`, not here.
A new method is one file in methods/ and one line in METHODS, if it fits one of these families.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minipeft.adapter import Adapter
from minipeft.methods.adalora import AdaLoraConfig, RankAllocator, SVDLinear, orthogonality
from minipeft.methods.bitfit import BitFitConfig, BitFitLayer
from minipeft.methods.bottleneck import BottleneckConfig, BottleneckLayer
from minipeft.methods.dora import DoraLinear
from minipeft.methods.ia3 import IA3Config, IA3Linear
from minipeft.methods.lora import LoraConfig, LoraLinear
from minipeft.methods.p_tuning import PromptEncoder, PromptEncoderConfig
from minipeft.methods.pissa import PissaLinear
from minipeft.methods.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from minipeft.methods.prompt_tuning import PromptEmbedding, PromptTuningConfig
from minipeft.methods.qlora import Linear4bit, QLoraLinear, QuantizedLinear
from minipeft.methods.vera import Projections, VeraConfig, VeraLinear
from minipeft.prompt_adapter import PromptAdapter
from minipeft.targets import find_targets
from minipeft.token_rows import token_rows


class WeightAdapter(Adapter):
    """A method that wraps layers of the base. A wrapping layer has the attributes `base_layer`,
    `weight` (W') and `bias` (b'), and, unless it is a bottleneck, `merge` and `unmerge`."""

    layers: dict[str, nn.Module]

    def __init__(self, model: nn.Module, config, layer_class: type[nn.Module]):
        self.config, self.layer_class = config, layer_class
        part = "bias" if config.peft_type == "BITFIT" else "weight"  # which is adapted
        targets = find_targets(model, config.target_modules, part)
        self.layers = self.new_layers(targets)
        if getattr(config, "trainable_token_indices", None) is not None:
            self.layers |= token_rows(model, config.trainable_token_indices)
        for parameter in self.parameters().values():
            parameter.requires_grad_(not config.inference_mode)

    def new_layers(self, targets: dict[str, nn.Module]) -> dict[str, nn.Module]:
        return {name: self.new_layer(name, base) for name, base in targets.items()}

    def new_layer(self, name: str, base_layer: nn.Module) -> nn.Module:
        self.check_layer(name, base_layer)
        return self.layer_class(base_layer, self.config)

    def check_layer(self, name: str, base_layer: nn.Module) -> None:
        """Raises ValueError for a quantized layer that the method cannot adapt."""
        kind = self.config.peft_type
        if kind != "BITFIT" and isinstance(base_layer, QuantizedLinear):
            raise ValueError(
                f"target {name} is a {type(base_layer).__name__}, which {kind} cannot adapt: LoRA "
                "works on 4-bit layers, BitFit on all quantized layers"
            )

    def check_mergeable(self) -> None:
        if self.config.peft_type == "BOTTLENECK":
            raise ValueError("cannot merge BOTTLENECK: a bottleneck is not linear")

    def tensors(self) -> dict[str, Tensor]:
        found = self.parameters().items()
        return {f"base_model.model.{key}": tensor.detach() for key, tensor in found}

    def places(self) -> dict[str, Tensor]:
        return WeightAdapter.tensors(self)  # they share memory with the layers


@torch.no_grad()
def merge_into_base(layer: nn.Module) -> nn.Module:
    """Overwrite W and b of the base layer with W' and b' for good. Return the base layer, to be
    used in place of this one. 4 bits cannot hold W': then return a layer of the original class."""
    base = layer.base_layer
    if isinstance(layer, QLoraLinear):
        return base.plain(layer.merged())
    for name in ("weight", "bias"):
        if (parameter := base._parameters.get(name)) is not None:
            parameter.copy_(getattr(layer, name))
    return base


class LoraAdapter(WeightAdapter):
    """LoRA; on 4-bit layers QLoRA; DoRA and PiSSA."""

    def new_layer(self, name: str, base_layer: nn.Module) -> nn.Module:
        is_dora, is_pissa = self.config.use_dora, self.config.init_lora_weights == "pissa"
        if isinstance(base_layer, Linear4bit) and not (is_dora or is_pissa):
            return QLoraLinear(base_layer, self.config)
        self.check_layer(name, base_layer)
        layer_class = DoraLinear if is_dora else PissaLinear if is_pissa else LoraLinear
        return layer_class(base_layer, self.config)

    def tensors(self) -> dict[str, Tensor]:
        """PiSSA is saved as an ordinary LoRA of twice the rank."""
        found = super().tensors()
        for name, layer in self.layers.items():
            if isinstance(layer, PissaLinear):
                for letter, tensor in zip("AB", layer.as_lora(), strict=True):
                    found[f"base_model.model.{name}.lora_{letter}.weight"] = tensor.detach()
        return found

    def saved_config(self) -> LoraConfig:
        if self.config.init_lora_weights != "pissa":
            return self.config
        factor = math.sqrt(2) if self.config.use_rslora else 2  # so that s stays the same
        return replace(
            self.config, r=2 * self.config.r, lora_alpha=factor * self.config.lora_alpha,
            init_lora_weights=True,
        )  # fmt: skip


class IA3Adapter(WeightAdapter):
    """(IA)³: some layers have their inputs multiplied, others their outputs."""

    def new_layers(self, targets: dict[str, nn.Module]) -> dict[str, nn.Module]:
        endings = tuple(f".{ending}" for ending in self.config.feedforward_modules)
        if endings and not any(f".{name}".endswith(endings) for name in targets):
            wrong = self.config.feedforward_modules
            raise ValueError(f"feedforward_modules={wrong!r} matches none of target_modules")
        for name, base_layer in targets.items():
            self.check_layer(name, base_layer)
        return {
            name: IA3Linear(base_layer, self.config, f".{name}".endswith(endings))
            for name, base_layer in targets.items()
        }


class VeraAdapter(WeightAdapter):
    """VeRA: all layers share two random matrices."""

    def new_layers(self, targets: dict[str, nn.Module]) -> dict[str, nn.Module]:
        for name, base_layer in targets.items():
            self.check_layer(name, base_layer)
        shared = Projections(list(targets.values()), self.config)
        return {name: VeraLinear(layer, self.config, shared) for name, layer in targets.items()}

    def tensors(self) -> dict[str, Tensor]:
        projections = next(iter(self.layers.values())).projections
        shared = dict(projections.named_buffers()) if self.config.save_projection else {}
        return super().tensors() | {f"base_model.{name}": tensor for name, tensor in shared.items()}

    places = tensors


class AdaLoraAdapter(WeightAdapter):
    """AdaLoRA's layers, and the allocator that prunes their ranks."""

    def __init__(self, model: nn.Module, config, layer_class: type[nn.Module]):
        super().__init__(model, config, layer_class)
        unknown = set(config.rank_pattern or {}) - {f"{name}.lora_E" for name in self.layers}
        if unknown:
            raise ValueError(f"rank_pattern: {min(unknown)!r} is not a target of this adapter")
        if config.rank_pattern is None and not config.inference_mode:
            self.allocator = RankAllocator(self.layers, config)

    def new_layer(self, name: str, base_layer: nn.Module) -> nn.Module:
        layer = super().new_layer(name, base_layer)
        kept = (self.config.rank_pattern or {}).get(f"{name}.lora_E")  # from a file
        return layer if kept is None else SVDLinear(base_layer, self.config, sum(kept))

    def penalty(self) -> Tensor:
        return self.config.orth_reg_weight * orthogonality(self.layers)

    def run(self, model: nn.Module, *args, **kwargs):
        """In training mode, add the penalty to the loss. Warn if the output has no loss.

        With num_items_in_batch, a step consists of several batches, and each adds its share:
        penalty · (labels in the batch / labels in the step).
        """
        out = model(*args, **kwargs)
        if not model.training:
            return out
        penalty, labels, n = self.penalty(), kwargs.get("labels"), kwargs.get("num_items_in_batch")
        if labels is not None and n is not None:
            penalty = penalty * (predicted_labels(model, labels) != -100).sum() / n
        if type(out) is tuple and labels is not None:  # transformers with return_dict=False
            return out[0] + penalty, *out[1:]
        loss = out.get("loss") if isinstance(out, dict) else getattr(out, "loss", None)
        if loss is None:
            warnings.warn("AdaLoRA's penalty is in no loss: add model.penalty()", stacklevel=2)
            return out
        if hasattr(out, "_replace"):  # a named tuple
            return out._replace(loss=loss + penalty)
        if isinstance(out, dict):
            out["loss"] = loss + penalty
        else:
            out.loss = loss + penalty
        return out

    def ranks(self) -> dict[str, int]:
        if self.allocator is not None:
            return self.allocator.ranks()
        return {name: len(layer.lora_E) for name, layer in self.layers.items()}

    def update_and_allocate(self, step: int) -> None:
        if self.allocator is not None:  # ranks that were read from a file do not move
            self.allocator.update_and_allocate(step)
            for layer in self.layers.values():
                layer.unmerge()  # pruning changed E, and W' was made from the old one
            self.write_rank_pattern()

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.allocator is not None:
            a = self.allocator
            found: dict
            for found in (a.importance, a.uncertainty, a.kept):
                found |= {key: t.to(fn(t).device) for key, t in found.items()}  # never cast

    def write_rank_pattern(self) -> None:
        kept = self.allocator.kept.items()
        pattern = {f"{name}.lora_E": mask.tolist() for name, mask in kept}
        pruned = not all(all(mask) for mask in pattern.values())
        self.config.rank_pattern = pattern if pruned else None

    def check_mergeable(self) -> None:
        """Raises RuntimeError if the ranks of trained layers are still above the target, or if all
        ranks are 0. Saving checks this too."""
        c, allocator, total = self.config, self.allocator, sum(self.ranks().values())
        if total == 0:
            raise RuntimeError(
                "AdaLoRA pruned all ranks to 0, because its scores were all equal: nothing that it "
                "learned is left"
            )
        if allocator is None or total <= allocator.target:
            return
        if not any(layer.lora_E.any() for layer in self.layers.values()):  # E starts at 0
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
        self.check_mergeable()  # peft's format cannot store a half-finished schedule
        found = super().tensors()
        for name, kept in (self.allocator.kept if self.allocator else {}).items():
            start = f"base_model.model.{name}.lora_"
            found |= {f"{start}{letter}": found[f"{start}{letter}"][kept] for letter in "AE"}
            found[f"{start}B"] = found[f"{start}B"][:, kept]
        return found

    def allocator_tensors(self) -> dict[str, Tensor]:
        """The allocator's state by name; before its first step, zeros and "all kept"."""
        allocator = self.allocator
        found = {"allocator.step": torch.tensor(allocator.step or 0)}
        for name, layer in self.layers.items():
            all_kept = torch.ones_like(layer.lora_E[:, 0], dtype=torch.bool)  # (r,)
            found[f"allocator.kept.{name}"] = allocator.kept.get(name, all_kept)
            for letter in "AEB":
                w = getattr(layer, f"lora_{letter}").detach()
                for kind in ("importance", "uncertainty"):
                    smoothed = getattr(allocator, kind).get((name, letter), torch.zeros_like(w))
                    found[f"allocator.{kind}.{name}.{letter}"] = smoothed
        return found

    def state(self) -> dict[str, Tensor]:
        return self.parameters() | (self.allocator_tensors() if self.allocator else {})

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        if self.allocator is None:
            return
        allocator = self.allocator = RankAllocator(self.layers, self.config)
        allocator.step = int(state["allocator.step"]) or None
        for key, tensor in self.allocator_tensors().items() if allocator.step else ():
            kind, _, name = key.removeprefix("allocator.").partition(".")
            layer, _, letter = name.rpartition(".")
            if kind == "kept":
                allocator.kept[name] = tensor.copy_(state[key])
            elif kind != "step":
                getattr(allocator, kind)[layer, letter] = tensor.copy_(state[key])
        self.write_rank_pattern()


def predicted_labels(model: nn.Module, labels: Tensor) -> Tensor:
    """The labels that transformers' Trainer counts in num_items_in_batch. For a causal language
    model it leaves out the first label of each text, which is never predicted."""
    seq2seq = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    causal = getattr(model, "loss_type", None) == "ForCausalLM" and not seq2seq
    return labels[..., 1:] if causal else labels


class Method(NamedTuple):
    config: type  # the config's class
    adapter: type[WeightAdapter] | type[PromptAdapter]  # its family
    module: type[nn.Module]  # the class of its layers, or of its encoder


METHODS = {  # by peft_type
    "LORA": Method(LoraConfig, LoraAdapter, LoraLinear),
    "ADALORA": Method(AdaLoraConfig, AdaLoraAdapter, SVDLinear),
    "VERA": Method(VeraConfig, VeraAdapter, VeraLinear),
    "IA3": Method(IA3Config, IA3Adapter, IA3Linear),
    "BITFIT": Method(BitFitConfig, WeightAdapter, BitFitLayer),
    "BOTTLENECK": Method(BottleneckConfig, WeightAdapter, BottleneckLayer),
    "PROMPT_TUNING": Method(PromptTuningConfig, PromptAdapter, PromptEmbedding),
    "P_TUNING": Method(PromptEncoderConfig, PromptAdapter, PromptEncoder),
    "PREFIX_TUNING": Method(PrefixTuningConfig, PromptAdapter, PrefixEncoder),
}


def make_adapter(model: nn.Module, config) -> Adapter:
    """Create an adapter for a bare model, which changes only when the adapter is attached.

    The adapter keeps the config and may write to it. Raises TypeError for anything but a method's
    config, ValueError if the model does not support the method.
    """
    if not any(isinstance(config, method.config) for method in METHODS.values()):
        raise TypeError(f"{config!r} is not a config of a method: {', '.join(METHODS)}")
    if config.task_type not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        raise ValueError(
            f"task_type={config.task_type!r} is not implemented: a new head would be neither "
            "trained nor saved"
        )
    method = METHODS[config.peft_type]
    return method.adapter(model, config, method.module)
