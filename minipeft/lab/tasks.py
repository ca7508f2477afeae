"""Tasks: JSONL files in, batches out, and how completions are scored.

A task is three JSONL files of `{"prompt": …, "completion": …}` (TRL's format). The loss is taken on
the completion and the end-of-text token after it. A `task.json` next to them may say how to find
the facts in a prompt and which phrasings may state them: then slots are scored, and otherwise
whether the greedy completion equals the reference.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minipeft.files import MEBIBYTE, one_line, parse_json, read_json, read_text
from minipeft.lab import DATA
from minipeft.lab.base import Base, encode_prompt


@dataclass
class Example:
    """One line of a task, as text and as tokens."""

    prompt: str
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]  # the end token included
    is_slot: list[bool]  # per completion token: is it part of a fact's value?


@dataclass
class Task:
    """Train, validation and test examples, and how they are scored."""

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    fact: str | None = None  # a regular expression that finds (key, value) in a prompt
    phrasings: dict[str, list[str]] = field(default_factory=dict)  # per key: "… {v} …"
    split: str | None = None  # how test examples were split off, if they were

    @property
    def metric(self) -> str:
        return "slot accuracy" if self.fact else "exact match"

    def facts(self, prompt: str) -> list[tuple[str, str]]:
        return re.findall(self.fact, prompt) if self.fact else []

    def score(self, examples: list[Example], generated: list[str]) -> float:
        """Slot accuracy (the share of facts that a phrasing states with the right value), or the
        share of exact matches."""
        hits = []
        for example, text in zip(examples, generated, strict=True):
            if not self.fact:
                hits.append(text.strip() == example.completion.strip())
            for key, value in self.facts(example.prompt):
                stated = (phrase.format(v=value).lower() for phrase in self.phrasings[key])
                hits.append(any(phrase in text.lower() for phrase in stated))
        return sum(hits) / len(hits)


def load_jsonl(file: str | Path, base: Base, fact: str | None = None) -> list[Example]:
    """Read and encode a task file. Raises ValueError naming file, line and fault."""
    examples = []
    lines = read_text(Path(file), 256 * MEBIBYTE).split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            examples.append(_encode(f"{file}, line {number}", line, base, fact))
    if not examples:
        raise ValueError(f"{file} contains no examples")
    return examples


def _encode(where: str, line: str, base: Base, fact: str | None) -> Example:
    row = parse_json(line, dict, where)
    for name in ("prompt", "completion"):
        if not (isinstance(row.get(name), str) and row[name]):
            raise ValueError(f'{where} needs a "{name}": a string that is not empty')
    prompt, completion = row["prompt"], row["completion"]
    try:
        prompt_ids = encode_prompt(base.tokenizer, prompt)
        encoded = base.tokenizer.encode(completion, add_special_tokens=False)
    except Exception as error:  # half of a surrogate pair, for one
        raise ValueError(f"{where} has text that cannot be encoded: {one_line(error)}") from error
    if not prompt_ids or not encoded.ids:
        raise ValueError(f"{where}: the tokenizer finds no token in the prompt or completion")
    limit = base.pretrained.config.n_positions
    if len(prompt_ids) + len(encoded.ids) + 1 > limit:
        raise ValueError(
            f"{where} has {len(prompt_ids)} + {len(encoded.ids)} + 1 tokens (prompt, completion, "
            f"end), but the context holds {limit}"
        )
    spans = []
    for _, value in re.findall(fact, prompt) if fact else []:
        spans += [m.span() for m in re.finditer(re.escape(value), completion)]
    slots = [any(a < e and s < b for a, b in spans) for s, e in encoded.offsets] + [False]
    return Example(prompt, completion, prompt_ids, [*encoded.ids, base.end], slots)


def load_task(base: Base, name: str) -> Task:
    """A shipped task."""
    folder = DATA / "tasks" / name
    if not (folder / "task.json").is_file():
        known = ", ".join(sorted(path.parent.name for path in DATA.glob("tasks/*/task.json")))
        raise ValueError(f"there is no task {name!r}; known tasks: {known}")
    how = read_json(folder / "task.json")
    fact, parts = how.get("fact"), ("train", "validation", "test")
    examples = [load_jsonl(folder / f"{part}.jsonl", base, fact) for part in parts]
    return Task(name, *examples, fact, how.get("phrasings", {}))


def load_files(base: Base, train: str, validation: str, test: str | None = None) -> Task:
    """A task from your own files. Without a test file, every second validation example becomes a
    test example, so that nothing is chosen and reported on the same data."""
    parts = [load_jsonl(file, base) for file in (train, validation, test) if file]
    if test:
        return Task(Path(train).stem, *parts)
    trained, held = parts
    if len(held) < 2:
        raise ValueError(f"{validation} has one example, too few to split: give --test FILE too")
    split = f"{len(held[1::2])} of the {len(held)} examples in {validation} are kept for the test"
    return Task(Path(train).stem, trained, held[::2], held[1::2], split=split)


# --- batches ---


def collate(examples: list[Example], end: int, device) -> dict[str, Tensor]:
    """Prompts and completions, padded on the right: input_ids, attention_mask, labels (b, t).

    The prompt's labels are -100: no loss is taken there.
    """
    ids = [e.prompt_ids + e.completion_ids for e in examples]
    labels = [[-100] * len(e.prompt_ids) + e.completion_ids for e in examples]
    mask = [[1] * len(row) for row in ids]
    return {
        "input_ids": pad(ids, end, device),
        "attention_mask": pad(mask, 0, device),
        "labels": pad(labels, -100, device),
    }


def shuffled(items: Sequence, batch_size: int, seed: int) -> Iterator[list]:
    """Endless batches; every item comes once before any comes again."""
    rng, queue = random.Random(seed), []
    while True:
        while len(queue) < batch_size:
            queue += rng.sample(items, len(items))
        yield queue[:batch_size]
        queue = queue[batch_size:]


def pad_left(prompts: list[list[int]], end: int, device) -> tuple[Tensor, Tensor]:
    """Prompts for `generate`: input_ids and attention_mask, (b, t)."""
    mask = [[1] * len(prompt) for prompt in prompts]
    return pad(prompts, end, device, "left"), pad(mask, 0, device, "left")


def pad(rows: list[list[int]], value: int, device, side: str = "right") -> Tensor:
    """Rows of unequal lengths as one tensor (b, t)."""
    tensors = [torch.tensor(row) for row in rows]
    padded = pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
    return padded.to(device)
