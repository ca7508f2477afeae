"""GPT-2 folders: `config.json` and `model.safetensors`, in transformers' format.

`GPT.from_pretrained` and `GPT.save_pretrained` call these functions. Names and shapes in a folder
are compared with a model on the meta device, which takes no memory, before any weight is loaded.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from minipeft.files import (
    check_digest,
    check_types,
    digest,
    empty_tensors,
    has_type,
    mismatch,
    one_line,
    read_header,
    read_json,
    read_tensors,
    show,
    write_tensors,
    write_text,
)
from minipeft.gpt import GPT, GPTConfig

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
SUPPORTED = {  # settings in GPT-2's config.json, with the one value that gpt.py implements
    "model_type": "gpt2", "activation_function": "gelu_new", "add_cross_attention": False,
    "reorder_and_upcast_attn": False, "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True, "tie_word_embeddings": True,
}  # fmt: skip
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers in OpenAI's files
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as (in, out)
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"  # the same tensor
# Settings that do not change what a trained model computes:
TRAINING_ONLY = (
    "embd_pdrop", "attn_pdrop", "resid_pdrop", "initializer_range", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip


def save(model: GPT, folder: Path) -> None:
    """Write a folder. Raises ValueError, before anything is written, for quantized or adapted
    layers."""
    tensors = model.state_dict()
    if mismatch(tensors, empty_model(model.config).state_dict()):
        raise ValueError(
            "this model has quantized or adapted layers; call merge_and_unload() first, or "
            "save the adapter with PeftModel.save_pretrained"
        )
    del tensors[HEAD]
    for name, w in tensors.items():
        tensors[name] = w.t() if name.endswith(TRANSPOSED) else w
    settings = {"architectures": ["GPT2LMHeadModel"]} | asdict(model.config) | SUPPORTED
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors, digest(model.config, TRAINING_ONLY))
    write_text(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def load(path: str | Path) -> GPT:
    """The model in a folder (ours, transformers' or OpenAI's) or on the Hub."""
    folder = Path(path) if Path(path).is_dir() else download(str(path))
    config = read_config(folder / CONFIG)
    found: dict[str, Tensor] = {}  # on the meta device
    places: dict[str, tuple[Path, str]] = {}  # of each tensor: its file, and its name there
    headers: dict[Path, dict[str, str]] = {}
    index = read_index(folder)
    for file in sorted({folder / name for name in index.values()} or {folder / WEIGHTS}):
        shapes, headers[file] = read_header(file, ignored=MASKS)
        for stored, w in shapes.items():
            name = stored if stored.startswith(("transformer.", HEAD)) else f"transformer.{stored}"
            if name in found or index.get(stored, file.name) != file.name:
                raise ValueError(f"{file}: {stored} is in two files, or there under two names")
            found[name] = w.t() if name.endswith(TRANSPOSED) and w.dim() == 2 else w
            places[name] = file, stored
    if 12 * config.n_layer > len(found):  # building them all could take forever
        n = config.n_layer
        raise ValueError(f"{folder / CONFIG}: {n} layers, but there are only {len(found)} tensors")
    try:
        model = empty_model(config)
    except RuntimeError as error:  # more elements than an integer can count
        raise ValueError(f"{folder / CONFIG}: {one_line(error)}") from error
    wanted = model.state_dict()
    if wrong := mismatch({HEAD: wanted[HEAD]} | found, wanted):
        raise ValueError(f"{folder}: weights and {CONFIG} do not match: {wrong}")
    for file, header in headers.items():
        check_digest(header, digest(config, TRAINING_ONLY), file, folder / CONFIG)
    read = {file: read_tensors(file) for file in headers}
    tensors = {}
    for name, (file, stored) in places.items():
        w = read[file].pop(stored).to(torch.float32, copy=True)  # files are mapped into memory
        tensors[name] = w.t().contiguous() if name.endswith(TRANSPOSED) else w
    if not torch.equal(tensors.setdefault(HEAD, tensors[EMBEDDING]), tensors[EMBEDDING]):
        file = places[HEAD][0]
        raise ValueError(f"{file}: an lm_head that differs from wte is not supported")
    model.load_state_dict(tensors, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    model.name_or_path = str(path)
    return model.eval()


def empty_model(config: GPTConfig) -> GPT:
    """A model on the meta device: names and shapes, but no memory."""
    with empty_tensors():
        return GPT(config)


def download(name: str) -> Path:
    """The folder into which huggingface_hub downloads a model."""
    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # it has many exception classes
        raise ValueError(
            f"{name} is neither a local folder nor a model on the Hugging Face Hub: "
            f"{one_line(error)}"
        ) from error


def read_config(file: Path) -> GPTConfig:
    settings = read_json(file)
    for name, value in SUPPORTED.items():
        if repr(settings.get(name, value)) != repr(value):  # 1 is not True
            raise ValueError(f"{file}: {name} must be {value!r}, got {show(settings[name])}")
    try:
        return GPTConfig(**check_types(settings, GPTConfig, file))
    except ValueError as error:
        raise ValueError(f"{file}: {one_line(error)}") from error


def read_index(folder: Path) -> dict[str, str]:
    """The file of every tensor, if a large model is split into several files; else empty."""
    file = folder / INDEX
    if not os.path.lexists(file):
        return {}
    index = read_json(file).get("weight_map")
    if not has_type(index, dict[str, str]) or not index:
        raise ValueError(f"{file}: weight_map must name files, got {show(index)}")
    for name in index.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{file}: {show(name)} is not the name of a weights file")
    return index
