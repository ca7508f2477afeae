"""Adapters as files, in Hugging Face peft's format, both ways.

A folder holds `adapter_config.json` and `adapter_model.safetensors` with peft's keys. What is read
is checked before anything is made of it; a pickle is never read. A file is written beside its place
and renamed.
"""

import abc
import enum
import json
import os
import re
import tempfile
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minipeft.adapters import METHODS, Adapter, make_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

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
        file = Path(path) / CONFIG
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


for _config_class, *_ in METHODS.values():
    PeftConfig.register(_config_class)


def fits(value, kind) -> bool:
    """Whether a value read from JSON is what a config's annotation says: `dict[str, int]`, say."""
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(fits(value, one) for one in inner)
    if isinstance(value, dict | list) and inner:
        items = value.values() if isinstance(value, dict) else value
        return isinstance(value, typing.get_origin(kind)) and all(fits(i, inner[-1]) for i in items)
    return type(value) is kind or (type(value) is int and kind is float)


def read_adapter(model: nn.Module, folder: Path, is_trainable: bool) -> Adapter:
    """An adapter's folder as an adapter for a bare model, which is not changed.

    Raises ValueError, naming the file, for what is damaged or does not fit the model.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    config, file = PeftConfig.from_pretrained(folder), folder / WEIGHTS
    if not file.is_file():
        raise ValueError(f"there is no {file} (a pickled adapter_model.bin is never read)")
    try:
        found = load_file(file)
    except Exception as error:  # safetensors raises a class of its own for damaged files
        raise ValueError(f"{file} is damaged: {error}") from error
    # without its network a prompt is read as it is, and so it is where nothing will be trained
    bare = "prompt_embeddings" in found and len(found) == 1
    config.inference_mode = bare or not is_trainable
    check_sizes(config, found, folder)
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten: leave no trace
            adapter = make_adapter(model, config)
    except (ValueError, TypeError, RuntimeError, re.error) as error:  # for one, a rank of 10**40
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    try:
        adapter.load(found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    adapter.config.inference_mode = not is_trainable
    if bare and is_trainable:
        adapter.encoder.requires_grad_(True)
    return adapter


def check_sizes(config, found: dict[str, Tensor], folder: Path) -> None:
    """Raises ValueError for a size above any in the tensors, before memory is taken for it."""
    names = ["r", "init_r", "num_virtual_tokens", "bottleneck_size"]
    if not config.inference_mode:  # a prompt's network is made for training alone
        names += ["encoder_hidden_size", "encoder_num_layers"]
    sizes = {name: getattr(config, name, None) or 0 for name in names}
    if config.peft_type == "LORA":
        sizes |= {f"rank_pattern[{key!r}]": r for key, r in config.rank_pattern.items()}
    largest = max((n for tensor in found.values() for n in tensor.shape), default=0)
    for name, size in sizes.items():
        if size > largest:
            raise ValueError(
                f"{folder / CONFIG}: {name} is {size}, and no tensor of {WEIGHTS} has a dimension "
                f"above {largest}"
            )


def write_adapter(folder: Path, config, tensors: dict[str, Tensor]) -> None:
    """Write a config and tensors as peft does: QLoRA's as a LoRA, all for inference."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(config) | getattr(config, "other_keys", {})
    settings |= {"inference_mode": True, "peft_type": config.peft_type.removeprefix("Q")}
    text = json.dumps(settings, indent=2, sort_keys=True, default=sorted) + "\n"  # of a set
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    write_file(folder / WEIGHTS, lambda to: save_file(tensors, to, metadata={"format": "pt"}))
    write_file(folder / CONFIG, lambda to: Path(to).write_text(text))


# --- write_file: the same lines stand in gpt.py and files.py (tests/test_copy_alone.py)
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
