"""A base: a pretrained model, read once, with its tokenizer and text to measure forgetting on."""

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from minipeft import files, pretrained
from minipeft.base_model import context_length
from minipeft.gpt import GPT
from minipeft.lab import DATA, chat, real

END = "<|endoftext|>"  # ends every document and every completion; also used as padding
ADDED = ("content", "prepend")  # settings of a normalizer: text that it puts into every text
NOT_CONFIG = ("transformers_version", "dtype", "architectures")  # where and when it was saved
WINDOW = 100  # tokens per window of held-out text, so that virtual tokens fit in front of it


@dataclass
class Base:
    """A pretrained model, opened: our GPT, or any causal model of transformers (real.py)."""

    folder: str  # or a GGUF file
    pretrained: nn.Module  # not trained itself: `model()` makes copies, unless `given_away`
    tokenizer: Tokenizer
    end: int  # the id of the end-of-text token
    held_out: Tensor | None  # windows (n, t) of held-out pretraining text
    template: str | None = None  # the chat template of the tokenizer
    special_tokens: dict[str, str] = field(default_factory=dict)  # bos_token, …: for the template
    hf_tokenizer: Any = None  # the tokenizer as transformers knows it
    given_away: bool = False  # `model()` returns the pretrained model itself: for a single use

    @property
    def name(self) -> str:
        return Path(getattr(self.pretrained, "name_or_path", None) or self.folder).name

    @property
    def is_shipped(self) -> bool:
        """Whether this is one of the bases that come with minipeft."""
        return Path(self.folder).resolve().parent == (DATA / "base").resolve()

    def model(self) -> nn.Module:
        """A fresh copy of the pretrained model."""
        if self.given_away:
            self._digest = self.digest()  # while it is as it was
            return self.pretrained
        return copy.deepcopy(self.pretrained)

    def new_model(self) -> nn.Module:
        """A model of the same shape with random weights."""
        return type(self.pretrained)(copy.deepcopy(self.pretrained.config))

    def digest(self) -> str:
        """A checksum of the weights and the config."""
        if self._digest is not None:
            return self._digest
        config = self.pretrained.config
        settings = repr(config)
        if hasattr(config, "to_dict"):
            kept = {k: v for k, v in config.to_dict().items() if k not in NOT_CONFIG}
            settings = str(sorted((k, v) for k, v in kept.items() if k[0] != "_"))
        found = hashlib.sha256(settings.encode())
        for name, tensor in self.pretrained.state_dict().items():
            found.update(name.encode())
            found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return found.hexdigest()[:16]

    def __post_init__(self):
        self._digest = None


def find(name: str | Path) -> Path:
    """The folder or GGUF file of a base. A name on the Hugging Face Hub is downloaded."""
    path = Path(name)
    if str(name) == "smollm2" and not path.exists():
        return real.smollm2()
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not path.parent.exists()
    return pretrained.download(str(name)) if on_hub else path


def load_base(name: str | Path, dtype: str = "float32") -> Base:
    """Open a GPT-2 folder; or, with transformers, a folder or GGUF file of another causal model. A
    name on the Hugging Face Hub does too. A `held_out.txt` in the folder, or next to it, serves to
    measure forgetting.

    dtype: of the weights of transformers' models; our GPT always has float32.
    """
    folder = find(name)
    base = load_real(folder, dtype) if real.is_for_transformers(folder) else load_gpt(folder)
    if folder != Path(name) and folder.is_dir():  # from the Hub: adapters record the name there
        base.pretrained.name_or_path = real.SMOLLM2 if name == "smollm2" else str(name)
    return base


def load_gpt(folder: Path) -> Base:
    """A GPT-2 folder."""
    tokenizer, model = load_tokenizer(folder), GPT.from_pretrained(folder)
    check_vocabulary(tokenizer, model.config.vocab_size, folder)
    end = model.config.eos_token_id = find_end(folder, tokenizer, model.config.eos_token_id)
    special_tokens = {"bos_token": "", "eos_token": tokenizer.id_to_token(end)}
    held_out = read_held_out(folder, tokenizer, model, end)
    template = chat.find_template(folder)
    return Base(str(folder), model, tokenizer, end, held_out, template, special_tokens)


def load_model(name: str | Path) -> nn.Module:
    """A base's model to look at: transformers' models without their weights, where possible."""
    folder = find(name)
    if folder.is_dir() and real.is_for_transformers(folder):
        return real.empty(folder)
    return load_base(folder).pretrained if folder.suffix == ".gguf" else GPT.from_pretrained(folder)


def load_real(path: Path, dtype: str) -> Base:
    """A model that transformers loads."""
    if (path / "tokenizer.json").is_file():
        load_tokenizer(path)  # raises for patterns that could take forever
    model, hf_tokenizer = real.load(path, dtype)
    tokenizer, end = hf_tokenizer.backend_tokenizer, hf_tokenizer.eos_token_id
    tokenizer.no_padding()
    tokenizer.no_truncation()
    check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings, path)
    if end is None:
        raise ValueError(f"the tokenizer of {path} has no eos_token: completions need an end")
    held_out = read_held_out(path if path.is_dir() else path.parent, tokenizer, model, end)
    template, special = hf_tokenizer.chat_template, hf_tokenizer.special_tokens_map
    if isinstance(template, dict):  # several, each with a name
        template = template.get("default")
    special = {name: token for name, token in special.items() if isinstance(token, str)}
    return Base(str(path), model, tokenizer, end, held_out, template, special, hf_tokenizer)


def check_vocabulary(tokenizer: Tokenizer, size: int, folder: str | Path) -> None:
    """Raises ValueError if a token has no embedding."""
    trial = tokenizer.encode("Some text").ids  # post-processing may add tokens of its own
    highest = max((*tokenizer.get_vocab().values(), *trial), default=0)
    if highest >= size:
        raise ValueError(
            f"{folder}/tokenizer.json: there is a token with id {highest}, "
            f"but the model has only {size} tokens"
        )


def read_held_out(folder: str | Path, tokenizer: Tokenizer, model: nn.Module, end: int):
    """Windows of the `held_out.txt` in a folder or next to it; None if there is none."""
    texts = [path / "held_out.txt" for path in (Path(folder), Path(folder).resolve().parent)]
    text = next((text for text in texts if text.is_file()), None)
    return None if text is None else read_windows(text, tokenizer, model, end)


def read_windows(file: Path, tokenizer: Tokenizer, model: nn.Module, end: int) -> Tensor:
    """A text file in windows of at most 100 tokens, (n, t)."""
    documents = read_text(file, 16)
    try:
        encoded = [e.ids for e in tokenizer.encode_batch(documents)]
        return windows(encoded, min(WINDOW, context_length(model)), end)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file}: {files.one_line(error)}") from error


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The `tokenizer.json` of a base's folder. Raises ValueError if it cannot be read or used."""
    file = Path(folder) / "tokenizer.json"
    text = files.read_text(file, 256 * files.MEBIBYTE)
    check_tokenizer(files.parse_json(text, dict, str(file)), file)
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_padding()  # the file may ask for both; here the lab pads and checks lengths
        tokenizer.no_truncation()
        added = len(tokenizer.encode("").ids)
        tokenizer.encode("Some text, and 1 number.")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # tokenizers raises Exception, and its panics are not even that
        raise ValueError(f"{file} cannot be used: {files.one_line(error)}") from error
    if added > 8:
        raise ValueError(f"{file} adds {added} tokens to every text")
    return tokenizer


def check_tokenizer(found: dict, file: Path) -> None:
    """Raises ValueError for settings with which encoding could take forever or be random."""
    if isinstance(found.get("model"), dict) and found["model"].get("dropout"):
        raise ValueError(f"{file}: with dropout, a text would get other tokens every time")
    added = [part.get(key) for part in objects(found.get("normalizer")) for key in ADDED]
    if sum(len(text) for text in added if isinstance(text, str)) > 20:
        raise ValueError(f"{file}: its normalizer makes texts longer: {files.show(added)}")
    for part in objects({name: found[name] for name in found if name != "model"}):
        pattern = part.get("Regex")
        if isinstance(pattern, str) and may_hang(pattern):
            raise ValueError(f"{file}: the pattern {files.show(pattern)} may take too long")


def objects(found) -> Iterator[dict]:
    """All JSON objects in a value from a JSON file."""
    if isinstance(found, dict):
        yield found
    for inner in files.members(found):
        yield from objects(inner)


def may_hang(pattern: str) -> bool:
    """Whether a pattern repeats a group, or has more than three repetitions in one alternative.
    Then the time for a match may grow exponentially, or with a high power of a text's length."""
    plain = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "x", pattern)  # escapes and classes of characters
    most = max(len(re.findall(r"[*+]|\{\d", part)) for part in plain.split("|"))
    return most > 3 or bool(re.search(r"\)[*+{]", plain))


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a prompt, with the tokens that the tokenizer puts in front of a text, but without
    those that it puts behind: no end token may stand between a prompt and its completion."""
    encoded = tokenizer.encode(text)
    n = len(encoded.ids)
    while n and encoded.special_tokens_mask[n - 1]:
        n -= 1
    return encoded.ids[:n]


def find_end(folder: str | Path, tokenizer: Tokenizer, eos: int | None) -> int:
    """The id of the end-of-text token: the model's own, else the one that the tokenizer names.

    (A GPT2Config made without one has GPT-2's 50256, which a small vocabulary does not have.)
    Raises ValueError if neither is a token.
    """
    if eos is not None and 0 <= eos < 2**31 and tokenizer.id_to_token(eos) is not None:
        return eos
    try:
        # transformers writes a model_max_length of 10³⁰ there, which means: no limit
        settings = files.read_json(Path(folder) / "tokenizer_config.json", largest=10**40)
        named = settings["eos_token"]
        end = tokenizer.token_to_id(named["content"] if isinstance(named, dict) else named)
    except (ValueError, KeyError, TypeError):
        end = None
    if end is None:
        raise ValueError(
            f"{folder}/config.json: eos_token_id is {eos!r}, which is not a token of "
            "tokenizer.json, and tokenizer_config.json has no eos_token: completions need an end"
        )
    return end


def copy_tokenizer(base: Base, folder: str | Path) -> None:
    """Copy a base's tokenizer, and what transformers reads next to it, to a model made from it."""
    if base.hf_tokenizer is not None:
        base.hf_tokenizer.save_pretrained(folder)
        return
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for name in (*tokenizer, "chat_template.jinja"):
        if (file := Path(base.folder) / name).is_file():
            files.write_text(Path(folder) / name, files.read_text(file, 256 * files.MEBIBYTE))
    if (file := Path(base.folder) / "generation_config.json").is_file():
        settings = files.read_json(file)
        ends = settings.get("eos_token_id")
        if base.end not in (ends if isinstance(ends, list) else [ends]):
            settings["eos_token_id"] = base.end
        files.write_text(Path(folder) / file.name, json.dumps(settings, indent=2) + "\n")


def read_text(file: str | Path, mebibytes: int = 1024) -> list[str]:
    """The documents of a plain text file of limited size, separated by <|endoftext|>."""
    text = files.read_text(Path(file), mebibytes * files.MEBIBYTE)
    documents = [part.strip() for part in text.split(END)]
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"{file} contains no text")
    return documents


def windows(documents: Iterable[list[int]], length: int, end: int) -> Tensor:
    """Token ids as windows (n, length), each starting with a document where possible.

    Documents follow each other, each with an end token. What is left of a document after a full
    window is dropped, unless it fills the next window too.
    """
    rows, row = [], []
    for document in documents:
        row += document + [end]
        while len(row) >= length:
            rows.append(row[:length])
            row = row[length:] if len(row) >= 2 * length else []
    if not rows:
        raise ValueError(f"the text has fewer than {length} tokens")
    return torch.tensor(rows)
