"""Adapters: the common interface of all methods, one class per family, and the table of methods.

An adapter is what a method adds to a model. Weight methods (LoRA, AdaLoRA, BitFit, bottleneck) wrap
layers of the model. Prompt methods (prompt, P- and prefix tuning) have an encoder that computes
extra inputs. QLoRA has no entry of its own: it is LoRA on 4-bit layers. The base is frozen by
`PeftModel`, not here. A new method is one file in methods/ and one line in METHODS, if one of the
families here fits it.
"""

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.base_model import guard_saving
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

# The inputs with one value per token that virtual tokens can be put in front of
PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "labels", "position_ids")
# Names under which models take a cache
CACHES = ("past_key_values", "cache", "cache_params", "state")
# Options of transformers' `generate` that go wrong because the virtual tokens are cached too
NOT_WITH_PROMPTS = (
    "past_key_values", "cache_implementation", "prompt_lookup_num_tokens", "assistant_model",
    "assistant_early_exit",
)  # fmt: skip


class Adapter:
    """Interface of an adapter. This base class is the null adapter: it changes nothing."""

    config = None  # the method's config
    encoder: nn.Module | None = None  # prompt methods only
    layers: Mapping[str, nn.Module] = MappingProxyType({})  # weight methods only, by layer name
    allocator: RankAllocator | None = None  # AdaLoRA only, while its ranks can still move

    def modules(self) -> Mapping[str, nn.Module]:
        """The adapter's own modules by name: its layers, or its encoder."""
        return self.layers if self.encoder is None else {"prompt_encoder": self.encoder}

    def attach(self, model: nn.Module) -> None:
        """Replace the layers of the base that this adapter adapts.

        Raises RuntimeError if the base has other layers by now than those it was made for.
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
    """A method that wraps layers of the base. A wrapping layer has the attributes `base_layer`,
    `weight` (W') and `bias`, and, unless it is a bottleneck, `merge`, `unmerge` and
    `merge_into_base`."""

    def __init__(self, model: nn.Module, config):
        self.config = config
        part = "bias" if config.peft_type == "BITFIT" else "weight"  # what is adapted of a layer
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
        layer = super().new_layer(name, base_layer)
        kept = (self.config.rank_pattern or {}).get(f"{name}.lora_E")  # from a file
        return layer if kept is None else SVDLinear(base_layer, self.config, sum(kept))

    def penalty(self) -> Tensor:
        return self.config.orth_reg_weight * orthogonality(self.layers)

    def run(self, model: nn.Module, *args, **kwargs):
        """In training mode, add the penalty to the loss. Warn if the output has no loss.

        With num_items_in_batch, several batches make up a step, and each one adds
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
        self.check_mergeable()  # a file cannot hold the middle of a schedule either
        found = super().tensors()
        for name, kept in (self.allocator.kept if self.allocator else {}).items():
            start = f"base_model.model.{name}.lora_"
            found |= {f"{start}{letter}": found[f"{start}{letter}"][kept] for letter in "AE"}
            found[f"{start}B"] = found[f"{start}B"][:, kept]
        return found

    def allocator_tensors(self, allocator: RankAllocator) -> dict[str, Tensor]:
        """An allocator's state by name: its own tensors, and initial ones where it has none yet."""
        found = {"allocator.step": torch.tensor(allocator.step or 0)}
        for name, layer in self.layers.items():
            all_kept = torch.ones_like(layer.lora_E[:, 0], dtype=torch.bool)  # (r,)
            found[f"allocator.kept.{name}"] = allocator.kept.setdefault(name, all_kept)
            for letter in "AEB":
                zeros = torch.zeros_like(getattr(layer, f"lora_{letter}"))
                for kind in ("importance", "uncertainty"):
                    smoothed = getattr(allocator, kind).setdefault((name, letter), zeros.clone())
                    found[f"allocator.{kind}.{name}.{letter}"] = smoothed
        return found

    def state(self) -> dict[str, Tensor]:
        if self.allocator is None or self.allocator.step is None:
            return self.parameters()
        return self.parameters() | self.allocator_tensors(self.allocator)

    def check_state(self, state: dict[str, Tensor]) -> None:
        wanted = self.parameters()
        if self.allocator is not None and any(key.startswith("allocator.") for key in state):
            wanted |= self.allocator_tensors(RankAllocator(self.layers, self.config))
        check_match(state, wanted)

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        if self.allocator is None:
            return
        self.allocator = RankAllocator(self.layers, self.config)
        if "allocator.step" in state:  # without it, the state is from before step 1
            copy_tensors(state, self.allocator_tensors(self.allocator))
            self.allocator.step = int(state["allocator.step"])
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
        positional = inspect.signature(model.forward).bind_partial(*args).arguments  # by name
        inputs = dict(**positional, **kwargs)
        for name in ("past_key_values", "cache", "use_cache"):
            if inputs.pop(name, None):
                raise ValueError(f"{name} cannot be used with a prompt method: call generate()")
        if inputs.get("return_dict", True) is False:
            raise ValueError("return_dict=False cannot be used with a prompt method")
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if positions is not None and mask is None and (positions.diff() <= 0).any():
            raise ValueError("position_ids that restart (packing) cannot follow one prompt")
        self.check_inputs(inputs)
        self.check_checkpointing(model)
        return self.encoder(model, **inputs)

    def check_inputs(self, inputs: dict) -> None:
        """Raises ValueError for inputs that virtual tokens cannot be put in front of."""
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"attention_mask must be (b, t), got {tuple(mask.shape)}")
        texts = ("input_ids", "inputs_embeds")
        given = [inputs[name] for name in texts if inputs.get(name) is not None]
        if self.config.peft_type != "PREFIX_TUNING" and given:
            text = given[0]
            for name, value in inputs.items():
                per_token = torch.is_tensor(value) and value.shape[:2] == text.shape[:2]
                if per_token and name not in PER_TOKEN:
                    raise ValueError(f"{name} cannot be used with virtual tokens")

    def check_checkpointing(self, model: nn.Module) -> None:
        """Raises RuntimeError if gradient checkpointing would drop a prefix."""
        # The names in transformers, the older one last:
        names = ("is_activation_checkpointing", "is_gradient_checkpointing")
        checkpointing = next((getattr(model, n) for n in names if hasattr(model, n)), False)
        if self.config.peft_type == "PREFIX_TUNING" and model.training and checkpointing:
            raise RuntimeError(
                "this model drops its cache, and the prefix with it, during gradient "
                "checkpointing: call gradient_checkpointing_disable()"
            )

    @torch.no_grad()
    def generate(self, model: nn.Module, *args, **kwargs):
        """The model's own `generate`, which sees and counts only real tokens.

        It runs on a copy of the model that shares its weights. The copy's forward pass puts the
        prompt in front: in the first pass, or, without a cache, in each. Padding on the left ends
        up between the prompt and the text. For a model with a sliding window, a padded row can
        therefore get other tokens than the same row alone.
        """
        self.check_generate(model, args, kwargs)
        shell = copy.copy(model)  # other threads may use the model itself
        signature, p = inspect.signature(model.forward), self.config.num_virtual_tokens
        started = False

        @functools.wraps(model.forward)
        def forward(*args, **inputs):
            nonlocal started
            inputs |= signature.bind_partial(*args).arguments
            cached = any(inputs.get(name) is not None for name in CACHES)
            in_cache = started and cached and inputs.get("use_cache") is not False
            started = True
            self.check_inputs(inputs)
            if in_cache:
                return model.forward(**after_prompt(p, **inputs))
            return model.forward(**self.encoder.prepend(model, **inputs))

        shell.forward = forward
        out = shell.generate(*args, **kwargs)
        if not started:
            raise RuntimeError(f"{type(model).__name__}.generate does not call its forward pass")
        return out

    def generate_batch(self, model: nn.Module, *args, **kwargs):
        raise ValueError("generate_batch cannot be used with a prompt method: call generate()")

    def check_generate(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Raises ValueError for options that are wrong with a prompt, and too many tokens."""
        self.check_checkpointing(model)
        named = (kwargs.get("generation_config"), getattr(model, "generation_config", None))
        configs = [config for config in (*args[1:2], *named) if config is not None]
        settings = [kwargs, *map(vars, configs)]
        for name in NOT_WITH_PROMPTS:
            if any(found.get(name) is not None for found in settings):
                raise ValueError(f"generate: {name} cannot be used with a prompt method")
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        t, new = 0 if ids is None else ids.shape[1], kwargs.get("max_new_tokens") or 0
        p, config = self.config.num_virtual_tokens, getattr(model, "config", None)
        limit = getattr(config, "n_positions", math.inf)
        if p + t + new > limit:
            raise ValueError(
                f"{p} virtual tokens, {t} tokens of input and {new} new tokens exceed the context "
                f"of {limit}: shorten the input or lower max_new_tokens"
            )

    def check_mergeable(self) -> None:
        kind = self.config.peft_type
        raise ValueError(f"cannot merge {kind}: it changes the input, not the weights")

    def network(self) -> dict[str, Tensor]:
        """The encoder's tensors if a network computes the prompt. Empty if the only tensor is the
        prompt itself."""
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


def predicted_labels(model: nn.Module, labels: Tensor) -> Tensor:
    """The labels that transformers' Trainer counts in num_items_in_batch. For a causal language
    model it leaves out the first label of each text, which is never predicted."""
    seq2seq = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    causal = getattr(model, "loss_type", None) == "ForCausalLM" and not seq2seq
    return labels[..., 1:] if causal else labels


def after_prompt(p: int, attention_mask=None, position_ids=None, **inputs) -> dict:
    """Inputs (b, t) that follow p virtual tokens in the cache: the mask becomes (b, p + t)."""
    if attention_mask is not None:
        inputs["attention_mask"] = F.pad(attention_mask, (p, 0), value=1)
    if position_ids is not None:
        inputs["position_ids"] = position_ids + p
    return inputs


def check_prompt_model(model: nn.Module, config) -> None:
    """Raises ValueError for a model that cannot take these virtual tokens."""
    settings, kind = getattr(model, "config", None), type(model).__name__
    if getattr(settings, "is_encoder_decoder", False):
        raise ValueError("prompt methods need a decoder; this is an encoder-decoder model")
    if not hasattr(model, "get_input_embeddings"):
        raise ValueError(f"{kind} has no get_input_embeddings()")
    if not hasattr(model.get_input_embeddings(), "weight"):
        raise ValueError(f"{kind} has no token embedding, which prompt methods need")
    if hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is None:
        raise ValueError(f"{kind} has no logits per token, which prompt methods need")
    text = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    if getattr(text, "hidden_size_per_layer_input", None):
        raise ValueError(f"{kind} embeds tokens in every layer: virtual tokens are not supported")
    names = ("n_positions", "max_position_embeddings")
    context = next((getattr(text, n) for n in names if hasattr(text, n)), math.inf)
    if 0 < context <= config.num_virtual_tokens:
        p = config.num_virtual_tokens
        raise ValueError(f"{p} virtual tokens leave no room in a context of {context}")


def check_match(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Raises ValueError if names or shapes differ, or if numbers are not of the same kind."""
    wrong = [f"{key} is missing" for key in target if key not in source]
    for key, tensor in source.items():
        if key not in target:
            wrong.append(f"{key} has no place in this model")
            continue
        found, wanted = (f"{tuple(t.shape)} of {t.dtype}" for t in (tensor, target[key]))
        same_kind = tensor.is_floating_point() == target[key].is_floating_point()
        if tensor.shape != target[key].shape or not same_kind:
            wrong.append(f"{key} is {found}, not {wanted}")
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


def make_adapter(model: nn.Module, config) -> Adapter:
    """Create an adapter for a bare model, which changes only when the adapter is attached.

    The adapter keeps the config and may write to it. Raises TypeError for anything but a method's
    config, ValueError if the model does not support the method.
    """
    if getattr(config, "peft_type", None) not in METHODS:
        raise TypeError(f"{config!r} is not a config of a method: {', '.join(METHODS)}")
    if config.task_type not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        raise ValueError(
            f"task_type={config.task_type!r} is not implemented: a new head would be neither "
            "trained nor saved"
        )
    return METHODS[config.peft_type].adapter(model, config)
