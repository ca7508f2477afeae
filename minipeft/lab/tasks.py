"""Text in, batches out: tokenizers, pretraining text, tasks, and how a task is scored.

A task is three JSONL files of `{"prompt": …, "completion": …}` (TRL's format); the loss is taken on
the completion and the end-of-text token after it. A `task.json` beside them may say how to find
the facts of a prompt and which phrases may state them: then slots are scored, and otherwise whether
the greedy completion is the reference.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from minipeft.peft_model import write_file

END = "<|endoftext|>"  # ends every document and every completion; also the padding
DATA = Path(__file__).resolve().parents[2] / "data"


# --- tokenizers and plain text ---


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE as GPT-2's: any text can be encoded, a word keeps the space before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The `tokenizer.json` of a base's folder. Raises ValueError if it cannot be read."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"there is no {file}: a base needs its tokenizer beside it")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file} cannot be read: {error}") from error
    tokenizer.no_padding()  # a file may ask for both, and lengths are the lab's own work
    tokenizer.no_truncation()
    return tokenizer


def find_end(folder: str | Path, tokenizer: Tokenizer, eos: int | None) -> int:
    """The id of the end-of-text token: the model's own, or else the one that the tokenizer names.

    (A GPT2Config made without one has GPT-2's 50256, which a small vocabulary does not have.)
    Raises ValueError where neither is a token.
    """
    if isinstance(eos, int) and tokenizer.id_to_token(eos) is not None:
        return eos
    try:
        named = json.loads((Path(folder) / "tokenizer_config.json").read_text())["eos_token"]
        end = tokenizer.token_to_id(named["content"] if isinstance(named, dict) else named)
    except (OSError, ValueError, KeyError, TypeError):
        end = None
    if end is None:
        raise ValueError(
            f"{folder}/config.json: eos_token_id is {eos!r}, which is no token of tokenizer.json, "
            "and tokenizer_config.json names no eos_token: a completion needs one to end in"
        )
    return end


def copy_tokenizer(base: str | Path, folder: str | Path) -> None:
    """Put a base's tokenizer beside a model made from it, with what transformers reads of it."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (file := Path(base) / name).is_file():
            whole = file.read_bytes()
            write_file(Path(folder) / name, lambda to, whole=whole: Path(to).write_bytes(whole))


def read_text(file: str | Path) -> list[str]:
    """The documents of a plain text file, which <|endoftext|> divides; without it, one document."""
    documents = [part.strip() for part in Path(file).read_text(encoding="utf-8").split(END)]
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"{file} holds no text")
    return documents


def windows(documents: Iterable[list[int]], length: int, end: int) -> Tensor:
    """Token ids as windows (n, length), each beginning with a document where it can.

    Documents follow each other, the end token behind each. What a short document has too much for
    its window is dropped; a document longer than a window goes on in the next.
    """
    rows, row = [], []
    for document in documents:
        row += document + [end]
        while len(row) >= length:
            rows.append(row[:length])
            row = row[length:] if len(row) >= 2 * length else []
    if not rows:
        raise ValueError(
            f"the text has fewer than {length} tokens: give more, or a smaller context"
        )
    return torch.tensor(rows)


# --- tasks ---


@dataclass
class Example:
    """One line of a task, in words and in tokens."""

    prompt: str
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]  # the end token included
    is_slot: list[bool]  # a completion token each: does it belong to a fact's value?


@dataclass
class Task:
    """Train, validation and test examples, and how they are scored."""

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    fact: str | None = None  # a regular expression that finds (key, value) in a prompt
    phrasings: dict[str, list[str]] = field(default_factory=dict)  # a key: "… {v} …"

    @property
    def metric(self) -> str:
        return "slot accuracy" if self.fact else "exact match"

    def facts(self, prompt: str) -> list[tuple[str, str]]:
        return re.findall(self.fact, prompt) if self.fact else []

    def score(self, examples: list[Example], generated: list[str]) -> dict[str, float]:
        """Slot accuracy (the share of facts stated by one of the phrasings with the right value) or
        exact match, and corpus BLEU-4, of texts generated for `examples`."""
        scores = {"bleu": bleu(generated, [example.completion for example in examples])}
        if not self.fact:
            same = [
                g.strip() == e.completion.strip() for g, e in zip(generated, examples, strict=True)
            ]
            return {"score": sum(same) / len(same)} | scores
        hits = [
            any(phrase.format(v=value).lower() in text.lower() for phrase in self.phrasings[key])
            for example, text in zip(examples, generated, strict=True)
            for key, value in self.facts(example.prompt)
        ]
        return {"score": sum(hits) / len(hits)} | scores


def load_jsonl(
    file: str | Path, tokenizer: Tokenizer, end: int, limit: int, fact: str | None = None
) -> list[Example]:
    """Read and encode a task file. Raises ValueError naming file, line and fault."""
    examples = []
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        for name in ("prompt", "completion"):
            if not isinstance(row, dict) or not isinstance(row.get(name), str) or not row[name]:
                raise ValueError(f'{where} needs a "{name}" that is a text and not empty')
        prompt_ids = tokenizer.encode(row["prompt"]).ids
        encoded = tokenizer.encode(row["completion"], add_special_tokens=False)
        if not prompt_ids or not encoded.ids:
            raise ValueError(f"{where}: the base's tokenizer finds no token in a text of it")
        if len(prompt_ids) + len(encoded.ids) + 1 > limit:
            raise ValueError(
                f"{where} has {len(prompt_ids)} + {len(encoded.ids)} + 1 tokens (prompt, text,"
                f" end), and the context holds {limit}"
            )
        spans = []
        for _, value in re.findall(fact, row["prompt"]) if fact else []:
            spans += [m.span() for m in re.finditer(re.escape(value), row["completion"])]
        slots = [any(a < e and s < b for a, b in spans) for s, e in encoded.offsets] + [False]
        ids = encoded.ids + [end]
        examples.append(Example(row["prompt"], row["completion"], prompt_ids, ids, slots))
    if not examples:
        raise ValueError(f"{file} holds no examples")
    return examples


def load_task(
    tokenizer: Tokenizer,
    end: int,
    limit: int,
    name: str | None = None,
    train: str | Path | None = None,
    validation: str | Path | None = None,
) -> Task:
    """A shipped task by name, or one's own train and validation files (validated = tested)."""
    if name is None:
        if train is None or validation is None:
            raise ValueError("give --task NAME, or both --train FILE and --validation FILE")
        read = [load_jsonl(file, tokenizer, end, limit) for file in (train, validation)]
        return Task(Path(train).stem, read[0], read[1], read[1])
    folder = DATA / "tasks" / name
    if not folder.is_dir():
        known = ", ".join(sorted(path.name for path in (DATA / "tasks").glob("*")))
        raise ValueError(f"there is no task {name!r}; there are: {known}")
    how = json.loads((folder / "task.json").read_text())
    fact = how.get("fact")
    parts = ("train", "validation", "test")
    read = [load_jsonl(folder / f"{p}.jsonl", tokenizer, end, limit, fact) for p in parts]
    return Task(name, *read, fact, how.get("phrasings", {}))


# --- batches ---


def collate(examples: list[Example], end: int, device) -> dict[str, Tensor]:
    """Prompt and completion, padded on the right: input_ids, attention_mask, labels (b, t)."""
    length = max(len(e.prompt_ids) + len(e.completion_ids) for e in examples)
    ids = torch.full((len(examples), length), end)
    labels = torch.full((len(examples), length), -100)
    mask = torch.zeros(len(examples), length, dtype=torch.long)
    for i, e in enumerate(examples):
        n, total = len(e.prompt_ids), len(e.prompt_ids) + len(e.completion_ids)
        ids[i, :total] = torch.tensor(e.prompt_ids + e.completion_ids)
        labels[i, n:total] = ids[i, n:total]
        mask[i, :total] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def shuffled(items: list, batch_size: int, seed: int) -> Iterator[list]:
    """Batches without end; every item comes once before any comes again."""
    rng, queue = random.Random(seed), []
    while True:
        while len(queue) < batch_size:
            queue += rng.sample(items, len(items))
        yield queue[:batch_size]
        queue = queue[batch_size:]


def pad_left(prompts: list[list[int]], end: int, device) -> tuple[Tensor, Tensor]:
    """Prompts for `generate`: input_ids and attention_mask, (b, t)."""
    length = max(len(prompt) for prompt in prompts)
    ids = [[end] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def bleu(texts: list[str], references: list[str]) -> float:
    """Corpus BLEU-4 (Papineni et al. 2002), 0 to 1: split on spaces, no smoothing."""
    match, total, length, wanted = [0] * 4, [0] * 4, 0, 0
    for text, reference in zip(texts, references, strict=True):
        words, truth = text.split(), reference.split()
        length, wanted = length + len(words), wanted + len(truth)
        for n in range(4):
            found, known = (
                Counter(tuple(w[i : i + n + 1]) for i in range(len(w) - n)) for w in (words, truth)
            )
            match[n] += sum((found & known).values())
            total[n] += max(len(words) - n, 0)
    if not all(match):
        return 0.0
    precision = sum(math.log(m / t) for m, t in zip(match, total, strict=True)) / 4
    return math.exp(precision + min(0.0, 1 - wanted / length))
