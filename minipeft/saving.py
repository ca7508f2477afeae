"""Adapters on disk, in Hugging Face peft's format, in both directions.

A folder holds `adapter_config.json` and `adapter_model.safetensors` with peft's keys. Everything
read is checked before anything is built from it; a pickle is never read. Files are written next to
their place and then renamed.
"""

import abc
import enum
import json
import re
import types
import typing
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minipeft.adapter import Adapter
from minipeft.adapters import METHODS, make_adapter
from minipeft.gpt import write_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Keys of a peft config that have no meaning here: those that may hold anything, and those whose
# default is not empty. Any other unknown key must be null, false or empty, as it is by default.
FREE_KEYS = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "num_attention_heads",
    "num_layers", "peft_version", "revision",
}  # fmt: skip
DEFAULTS = {
    "bias": "none", "num_transformer_submodules": 1, "r": 8, "init_lora_weights": True,
    "megatron_core": "megatron.core", "qalora_group_size": 16,
}  # fmt: skip


class TaskType(str, enum.Enum):
    """The use of a model; peft's names."""

    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftConfig(abc.ABC):
    """The base class of every method's config: `isinstance(config, PeftConfig)`."""

    @staticmethod
    def from_pretrained(path: str | Path):
        """The config in a folder that peft or minipeft wrote.

        Raises ValueError for a file that cannot be read, an unknown method, and a setting that is
        not implemented here, naming it.
        """
        file = Path(path) / CONFIG
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        peft_type = found.get("peft_type") if isinstance(found, dict) else None
        if not isinstance(peft_type, str) or peft_type not in METHODS:
            known = ", ".join(METHODS)
            raise ValueError(f"{file}: peft_type must be one of {known}, got {peft_type!r}")
        new_config = METHODS[peft_type].config
        kinds = {field.name: field.type for field in fields(new_config) if field.init}
        own = {key: found.pop(key) for key in kinds if key in found}
        for key, value in own.items():
            if not has_type(value, kinds[key]):
                wanted = getattr(kinds[key], "__name__", kinds[key])
                raise ValueError(f"{file}: {key} must be of type {wanted}, got {value!r}")
        other = {key: value for key, value in found.items() if key != "peft_type"}
        for key, value in other.items():
            is_default = value == DEFAULTS[key] if key in DEFAULTS else not value
            if not is_default and key not in FREE_KEYS:
                raise ValueError(f"{file}: {key}={value!r} is not implemented here")
        try:
            config = new_config(**own)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        config.other_keys = other  # written back by save_pretrained
        return config


for _method in METHODS.values():
    PeftConfig.register(_method.config)


def has_type(value, kind) -> bool:
    """Whether a value from JSON has an annotated type, such as `dict[str, list[bool]] | None`."""
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(has_type(value, one) for one in inner)
    if isinstance(value, dict | list) and inner:
        items = value.values() if isinstance(value, dict) else value
        right = isinstance(value, typing.get_origin(kind))
        return right and all(has_type(item, inner[-1]) for item in items)
    return type(value) is kind or (type(value) is int and kind is float)


def read_adapter(model: nn.Module, folder: Path, is_trainable: bool) -> Adapter:
    """Build the adapter in a folder for a bare model, which does not change.

    Raises ValueError, naming the file, for what is damaged or does not match the model.
    """
    config, file = PeftConfig.from_pretrained(folder), folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"{file} is missing (a pickled adapter_model.bin is never read)")
    try:
        found = load_file(file)
    except Exception as error:  # safetensors raises a class of its own for damaged files
        raise ValueError(f"{file} is damaged: {error}") from error
    # A prompt without its network is loaded as it is, and so is one that will not be trained.
    bare = "prompt_embeddings" in found and len(found) == 1
    config.inference_mode = bare or not is_trainable
    check_sizes(config, found, folder)
    try:
        with torch.random.fork_rng(devices=[]):  # the initial values drawn here are overwritten
            adapter = make_adapter(model, config)
    except (ValueError, TypeError, RuntimeError, re.error) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    try:
        adapter.load(found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    config.inference_mode = not is_trainable
    if bare and is_trainable:
        adapter.encoder.requires_grad_(True)
    return adapter


def check_sizes(config, found: dict[str, Tensor], folder: Path) -> None:
    """Raises ValueError for a size above any in the tensors, before memory is allocated for it."""
    names = ["r", "init_r", "num_virtual_tokens", "bottleneck_size"]
    if not config.inference_mode:  # the network of a prompt is only built for training
        names += ["encoder_hidden_size", "encoder_num_layers"]
    largest = max((n for tensor in found.values() for n in tensor.shape), default=0)
    for name in names:
        size = getattr(config, name, None) or 0
        if size > largest:
            raise ValueError(
                f"{folder / CONFIG}: {name} is {size}, but no tensor in {WEIGHTS} has a dimension "
                f"above {largest}"
            )


def write_adapter(folder: Path, adapter: Adapter, tensors: dict[str, Tensor], base: str | None):
    """Write an adapter as peft does. base: the name or folder of the model it was trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(adapter.config) | getattr(adapter.config, "other_keys", {})
    settings["base_model_name_or_path"] = base or settings.get("base_model_name_or_path")
    settings["inference_mode"] = True
    text = json.dumps(settings, indent=2, sort_keys=True, default=sorted) + "\n"  # sorts a set
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    write_file(folder / WEIGHTS, lambda to: save_file(tensors, to, metadata={"format": "pt"}))
    write_file(folder / CONFIG, lambda to: Path(to).write_text(text))
