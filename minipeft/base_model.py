"""Helpers for the base model: quantize it, count and prepare it, and undo what adapters did."""

import functools
import re
import warnings

import torch
from torch import nn

from minipeft.methods import qlora
from minipeft.methods.qlora import QuantizedLinear, quantized_layers


def quantize_model(model: nn.Module, bits: int = 4, **options) -> nn.Module:
    """Quantize all linear layers except the output head, in place; see `qlora.quantize_model`.

    Warns if 1 % or more of the weights are in no linear layer and keep their dtype, for example
    those of a mixture of experts. From now on, the model's own `save_pretrained` raises ValueError.
    """
    if hasattr(model, "has_adapters"):
        raise ValueError("the model has an adapter: quantize it before adding one")
    qlora.quantize_model(model, bits, **options)
    warn_of_unreached(model, set(quantized_layers(model)), "quantize_model")
    guard_saving(model)
    return model


def warn_of_unreached(model: nn.Module, names: set[str], caller: str) -> None:
    """Warn if the layers in `names`, the embeddings and the output head together leave out 1 % or
    more of a model's weights."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    total, missed = count_parameters(model)[1], {}
    for name, module in model.named_modules():
        if name in names or module is head or isinstance(module, nn.Embedding):
            continue
        for key, p in module.named_parameters(recurse=False):
            if p.dim() > 1:
                kind = re.sub(
                    r"(?<=\.)\d+(?=\.)", "*", f"{name}.{key}"
                )  # layers.0, … are one entry
                missed[kind] = missed.get(kind, 0) + p.numel()
    if sum(missed.values()) >= 0.01 * max(total, 1):
        shares = ", ".join(f"{kind} ({n / total:.1%})" for kind, n in missed.items())
        warnings.warn(f"{caller} does not reach these weights of the model: {shares}", stacklevel=3)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The numbers of (trainable, all) parameters. A shared parameter counts once; the weight of a
    quantized layer counts as out · in."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    quantized = sum(q.in_features * q.out_features for q in quantized_layers(model).values())
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes) + quantized


def prepare_model_for_kbit_training(model: nn.Module, use_gradient_checkpointing: bool = True):
    """Prepare a quantized model for training, in place, like peft's function of this name.

    Freezes it, casts what is not quantized to float32 (half precision is too coarse for norms and
    the loss) and turns on gradient checkpointing, without reentrant autograd: reentrant mode would
    need an input that requires a gradient.
    """
    if hasattr(model, "has_adapters"):
        raise ValueError("this would freeze the adapter too: prepare the base before adding one")
    for p in model.requires_grad_(False).parameters():
        if p.is_floating_point():
            p.data = p.data.float()
    for layer in quantized_layers(model).values():
        layer.dtype = torch.float32  # of the weight that it dequantizes to
    if use_gradient_checkpointing:
        checkpoint_activations(model)
    return model


def checkpoint_activations(model: nn.Module) -> None:
    """Turn gradient checkpointing on, without reentrant autograd."""
    newer = getattr(model, "activation_checkpointing_enable", None)  # transformers' new name
    if newer is not None:
        newer({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable()


def context_length(model: nn.Module) -> int:
    """How many tokens the context of a model holds; 2^31 if its config does not say."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("n_positions", "max_position_embeddings")
    found = next((getattr(text, name) for name in names if hasattr(text, name)), None)
    return found if found and found > 0 else 2**31


def has_statistics(module: nn.Module) -> bool:
    """Whether a layer, such as BatchNorm, updates running statistics while it trains."""
    return getattr(module, "running_mean", None) is not None


def freeze_statistics(model: nn.Module) -> None:
    """Keep running statistics as they are: they belong to the frozen base."""
    for module in filter(has_statistics, model.modules()):
        module.eval()


def guard_saving(model: nn.Module) -> None:
    """Block the model's own `save_pretrained` if it has quantized or adapted layers, or else
    restore it."""
    modules = model.modules()
    changed = any(isinstance(m, QuantizedLinear) or hasattr(m, "base_layer") for m in modules)
    if changed and hasattr(model, "save_pretrained"):
        model.save_pretrained = cannot_save
    elif vars(model).get("save_pretrained") is cannot_save:
        del model.save_pretrained  # the class's own method again


def cannot_save(*args, **kwargs):
    """Replaces a `save_pretrained` whose output could not be loaded."""
    raise ValueError(
        "this model has quantized or adapted layers: save the adapter with "
        "PeftModel.save_pretrained, or call merge_and_unload() and save the model it returns"
    )


def make_plain(model: nn.Module) -> None:
    """Undo what adapters did to a base, except for freezing its parameters."""
    vars(model).pop("has_adapters", None)
    guard_saving(model)
    if getattr(model, "_require_grads_hook", None) is not None:  # the Trainer may have set it
        model.disable_input_require_grads()
    for module in filter(has_statistics, model.modules()):
        module.training = model.training


def restored_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype that each parameter of a quantized model gets when it is dequantized, by name;
    empty if the model is not quantized.

    That is the widest dtype among the parameters outside the quantized layers, except for a layer
    that was even wider before it was quantized. (transformers keeps some layers of half-precision
    models in float32.)
    """
    quantized = quantized_layers(model)
    if not quantized:
        return {}
    others = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] not in quantized}
    found = [p.dtype for p in others.values() if p.is_floating_point()]
    found = found or [layer.dtype for layer in quantized.values()]
    widest = functools.reduce(torch.promote_types, found)
    dtypes = dict.fromkeys(others, widest)
    for name, layer in quantized.items():
        dtype = torch.promote_types(widest, layer.dtype)
        dtypes |= {f"{name}.weight": dtype, f"{name}.bias": dtype}
    return dtypes
