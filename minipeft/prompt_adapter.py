"""Prompt methods in a model: the checks, the forward pass and generation with virtual tokens.

The encoders themselves are in methods/: prompt_tuning.py, p_tuning.py and prefix_tuning.py.
"""

import copy
import functools
import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.adapter import Adapter
from minipeft.base_model import context_length

# The inputs with one value per token that virtual tokens can be put in front of
PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "labels", "position_ids")
# Names under which models take a cache
CACHES = ("past_key_values", "cache", "cache_params", "state")
# Options of transformers' `generate` that give wrong results, because virtual tokens are cached too
NOT_WITH_PROMPTS = (
    "past_key_values", "cache_implementation", "prompt_lookup_num_tokens", "assistant_model",
    "assistant_early_exit",
)  # fmt: skip


class PromptAdapter(Adapter):
    """An encoder that computes virtual tokens, or keys and values for each layer (a prefix)."""

    def __init__(self, model: nn.Module, config, encoder_class: type[nn.Module]):
        check_prompt_model(model, config)
        self.config, self.encoder = config, encoder_class(model, config)
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
        twin = copy.copy(model)  # other threads may use the model itself
        signature, p = inspect.signature(model.forward), self.config.num_virtual_tokens
        started = False

        @functools.wraps(model.forward)
        def forward(*args, **inputs):
            nonlocal started
            inputs |= signature.bind_partial(*args).arguments
            cached = any(is_filled(inputs.get(name)) for name in CACHES)
            in_cache = started and cached and inputs.get("use_cache") is not False
            started = True
            self.check_inputs(inputs)
            if in_cache:
                return model.forward(**after_prompt(p, **inputs))
            return model.forward(**self.encoder.prepend(model, **inputs))

        twin.forward = forward
        out = twin.generate(*args, **kwargs)
        if not started:
            raise RuntimeError(f"{type(model).__name__}.generate does not call its forward pass")
        return out

    def generate_batch(self, model: nn.Module, *args, **kwargs):
        raise ValueError("generate_batch cannot be used with a prompt method: call generate()")

    def check_generate(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Raises ValueError for options that cannot be combined with a prompt, and if the tokens
        exceed the context."""
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

    def places(self) -> dict[str, Tensor]:
        return self.network() or {"prompt_embeddings": self.encoder.embedding.weight.detach()}


def after_prompt(p: int, attention_mask=None, position_ids=None, **inputs) -> dict:
    """Inputs (b, t) that follow p virtual tokens in the cache: the mask becomes (b, p + t)."""
    if attention_mask is not None:
        inputs["attention_mask"] = F.pad(attention_mask, (p, 0), value=1)
    if position_ids is not None:
        inputs["position_ids"] = position_ids + p
    return inputs


def is_filled(cache) -> bool:
    """Whether a cache holds anything. transformers gives an empty one to models that use none."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return cache is not None
    return any(getattr(layer, "is_initialized", True) for layer in layers)


def check_prompt_model(model: nn.Module, config) -> None:
    """Raises ValueError for a model that cannot take these virtual tokens."""
    settings, kind = getattr(model, "config", None), type(model).__name__
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model already has an adapter: remove it before adding another")
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
    context = context_length(model)
    if context <= config.num_virtual_tokens:
        p = config.num_virtual_tokens
        raise ValueError(f"{p} virtual tokens leave no room in a context of {context}")
