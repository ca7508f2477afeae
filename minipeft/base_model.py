"""What is done to a base model: counting, preparing, protecting it, and making it plain again."""

import functools

import torch
from torch import nn

from minipeft.methods.qlora import QuantizedLinear, cannot_save, quantized_layers


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of (trainable, all) parameters. A shared parameter counts once; a 4-bit weight counts
    as out · in, its number of weights."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    quantized = sum(q.in_features * q.out_features for q in quantized_layers(model).values())
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes) + quantized


def prepare_model_for_kbit_training(model: nn.Module, use_gradient_checkpointing: bool = True):
    """Prepare a quantized model for training, in place, as peft's function of this name does.

    Freezes it, casts what is not quantized to float32 (half precision is too coarse for norms and
    the loss) and turns on gradient checkpointing, without reentrant autograd: that would need an
    input that requires a gradient.
    """
    if hasattr(model, "has_adapters"):
        raise ValueError("this would freeze the adapter too: prepare the base before adding one")
    for p in model.requires_grad_(False).parameters():
        if p.is_floating_point():
            p.data = p.data.float()
    for layer in quantized_layers(model).values():
        layer.dtype = torch.float32
    if use_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def freeze_statistics(model: nn.Module) -> None:
    """Keep layers with running statistics, such as BatchNorm, from updating them."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()


def guard_saving(model: nn.Module) -> None:
    """While a base has quantized or adapted layers, its own `save_pretrained` raises."""
    modules = model.modules()
    changed = any(isinstance(m, QuantizedLinear) or hasattr(m, "base_layer") for m in modules)
    if changed and hasattr(model, "save_pretrained"):
        model.save_pretrained = cannot_save
    elif not changed:
        vars(model).pop("save_pretrained", None)  # the class's own method again


def make_plain(model: nn.Module) -> None:
    """Remove what adapters and training left on a base."""
    vars(model).pop("has_adapters", None)
    guard_saving(model)
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.training = model.training


def restored_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """For a model with quantized layers: the dtype that each of them gets when it is dequantized,
    by name, and under "" that of all other parameters; empty for a model without any.

    They get the widest dtype of the parameters that were not quantized, or their own if it is
    wider, as transformers keeps some layers of a half-precision model in float32.
    """
    quantized = quantized_layers(model)
    if not quantized:
        return {}
    others = [p for n, p in model.named_parameters() if n.rpartition(".")[0] not in quantized]
    found = [p.dtype for p in others if p.is_floating_point()]
    found = found or [layer.dtype for layer in quantized.values()]
    dtype = functools.reduce(torch.promote_types, found)
    own = {name: torch.promote_types(dtype, layer.dtype) for name, layer in quantized.items()}
    return {"": dtype} | own
