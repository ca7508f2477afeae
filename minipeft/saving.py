"""Adapters on disk, in Hugging Face peft's format, in both directions.

A folder holds `adapter_config.json` and `adapter_model.safetensors` with peft's keys. Everything
read is checked before anything is built from it; a pickle is never read. Files are written next to
their place and then renamed.
"""

import abc
import copy
import enum
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from minipeft.adapter import Adapter, copy_tensors
from minipeft.adapters import METHODS, make_adapter
from minipeft.files import (
    check_digest,
    check_types,
    digest,
    empty_tensors,
    mismatch,
    one_line,
    read_header,
    read_json,
    read_tensors,
    show,
    write_tensors,
    write_text,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Keys of a peft config that have no meaning here: those that may hold anything, and those whose
# default is not empty. Any other unknown key must be null, false or empty, as it is by default.
FREE_KEYS = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "num_attention_heads",
    "num_layers", "peft_version", "revision",
}  # fmt: skip
DEFAULTS = {
    "bias": "none", "num_transformer_submodules": 1, "r": 8, "init_lora_weights": True,
    "init_ia3_weights": True, "init_weights": True, "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}  # fmt: skip
# Settings that do not change the output of a saved adapter:
TRAINING_ONLY = (
    "task_type", "inference_mode", "lora_dropout", "encoder_dropout", "init_weights",
    "vera_dropout", "d_initial",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "target_r",
    "total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
)  # fmt: skip


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
        found = read_json(file)
        peft_type = found.get("peft_type")
        if not isinstance(peft_type, str) or peft_type not in METHODS:
            known = ", ".join(METHODS)
            raise ValueError(f"{file}: peft_type must be one of {known}, got {show(peft_type)}")
        new_config = METHODS[peft_type].config
        own = check_types(found, new_config, file)
        other = {key: found[key] for key in found if key not in own and key != "peft_type"}
        for key, value in other.items():
            is_default = value == DEFAULTS[key] if key in DEFAULTS else not value
            if not is_default and key not in FREE_KEYS:
                raise ValueError(f"{file}: {show(key)[1:-1]}={show(value)} is not implemented here")
        try:
            config = new_config(**own)
        except ValueError as error:
            raise ValueError(f"{file}: {one_line(error)}") from error
        config.other_keys = other  # written back by save_pretrained
        return config


for _method in METHODS.values():
    PeftConfig.register(_method.config)


def read_adapter(model: nn.Module, folder: Path, is_trainable: bool) -> Adapter:
    """Build the adapter in a folder for a bare model, which does not change.

    Raises ValueError, naming the file, for what is damaged or does not match the model. Names and
    shapes are compared with an adapter on the meta device, before memory is taken for it.
    """
    config, file = PeftConfig.from_pretrained(folder), folder / WEIGHTS
    if not file.exists():
        raise ValueError(f"{file} is missing (a pickled adapter_model.bin is never read)")
    shapes, header = read_header(file)
    wanted = digest(config, TRAINING_ONLY)
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, list) and len(targets) > len(dict(model.named_modules())):
        raise ValueError(f"{folder / CONFIG}: target_modules names more layers than the model has")
    if isinstance(targets, str) and targets != "all-linear":
        config.target_modules = layer_names(model, shapes)  # a stranger's pattern is never run
    is_prompt = "prompt_embeddings" in shapes
    has_network = is_prompt and len(shapes) > 1 and config.peft_type != "PROMPT_TUNING"
    config.inference_mode = not has_network
    try:
        check_sizes(config, shapes)
        with empty_tensors():
            empty = make_adapter(on_meta(model), copy.copy(config))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder / CONFIG}: {one_line(error)}") from error
    if wrong := mismatch(shapes, empty.places() if empty.encoder is None else empty.tensors()):
        raise ValueError(f"{file}: adapter does not match this model: {wrong}")
    check_digest(header, wanted, file, folder / CONFIG)
    tensors = read_tensors(file)
    # A prompt is loaded without its network if it will not be trained, or has none.
    config.inference_mode = not is_trainable or (is_prompt and not has_network)
    with torch.random.fork_rng(devices=[]):  # the initial values drawn here are overwritten
        adapter = make_adapter(model, config)
    copy_tensors(tensors, adapter.places())
    config.inference_mode = not is_trainable
    if isinstance(targets, str):
        config.target_modules = targets
    for tensor in adapter.parameters().values():
        tensor.requires_grad_(is_trainable)
    return adapter


def check_sizes(config, shapes: dict[str, Tensor]) -> None:
    """Raises ValueError for numbers of objects that would take too long to make."""
    largest = max((n for t in shapes.values() if t.numel() for n in t.shape), default=0)
    limits = {"num_virtual_tokens": largest, "encoder_num_layers": max(len(shapes), 2)}
    for name, limit in limits.items():
        size = getattr(config, name, 0)
        if size > limit:
            raise ValueError(
                f"{name} is {size}, but {WEIGHTS} has no tensors for more than {limit}"
            )


def layer_names(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """The layers that an adapter's tensors belong to."""
    modules, found = dict(model.named_modules()), set()
    for key in keys:
        name = key.removeprefix("base_model.model.")
        while name and name not in modules:
            name = name.rpartition(".")[0]
        found.add(name)
    return sorted(n for n in found if n and not isinstance(modules[n], nn.Embedding))


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model whose tensors are on the meta device, where they take no memory."""
    twins: dict[object, object] = {None: None}  # what was copied: shared things stay shared

    def twin(thing):
        if thing in twins:
            return twins[thing]
        if isinstance(thing, nn.Module):
            twins[thing] = copy.copy(thing)  # shares everything; now the tensors are replaced
            for kind in ("_parameters", "_buffers", "_modules"):
                own = {name: twin(inner) for name, inner in vars(thing)[kind].items()}
                vars(twins[thing])[kind] = own
            return twins[thing]
        empty = torch.empty(thing.shape, dtype=thing.dtype, device="meta")
        is_parameter = isinstance(thing, nn.Parameter)
        twins[thing] = nn.Parameter(empty, thing.requires_grad) if is_parameter else empty
        return twins[thing]

    return twin(model)


def write_adapter(folder: Path, adapter: Adapter, tensors: dict[str, Tensor], base: str | None):
    """Write an adapter as peft does. base: the name or folder of the model it was trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    config = adapter.saved_config()
    settings = asdict(config) | getattr(adapter.config, "other_keys", {})
    settings["base_model_name_or_path"] = base or settings.get("base_model_name_or_path")
    settings["inference_mode"] = True
    text = json.dumps(settings, indent=2, sort_keys=True, default=sorted) + "\n"  # sorts a set
    write_tensors(folder / WEIGHTS, tensors, digest(config, TRAINING_ONLY))
    write_text(folder / CONFIG, text)
