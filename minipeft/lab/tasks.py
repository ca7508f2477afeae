"""Tasks: JSONL files in, batches out, and how completions are scored.

A task is three JSONL files of `{"prompt": …, "completion": …}` or of `{"messages": […]}` (TRL's
formats; chat.py has the second one). The loss is taken on the completion and the end-of-text token
after it. A `task.json` next to them may say how to find the facts in a prompt and which phrasings
may state them: then slots are scored, and otherwise whether the greedy completion equals the
reference.
"""

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minipeft.files import MEBIBYTE, one_line, parse_json, read_json, read_text
from minipeft.lab import DATA, chat
from minipeft.lab.base import Base, context_length, encode_prompt


@dataclass
class Example:
    """One line of a task, as text and as tokens."""

    prompt: str
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]  # the end token included
    is_slot: list[bool]  # per completion token: is it part of a fact's value?
    is_chat: bool = False


@dataclass
class Task:
    """Train, validation and test examples, and how they are scored."""

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    _: KW_ONLY
    fact: str | None = None  # a regular expression that finds (key, value) in a prompt
    phrasings: dict[str, list[str]] = field(default_factory=dict)  # per key: "… {v} …"
    split: str | None = None  # how test examples were split off, if they were
    left_out: list[str] = field(default_factory=list)  # about examples that are too long
    own: bool = False  # from the user's files

    @property
    def metric(self) -> str:
        return "slot accuracy" if self.fact else "exact match"

    def facts(self, prompt: str) -> list[tuple[str, str]]:
        return re.findall(self.fact, prompt) if self.fact else []

    def score(self, examples: list[Example], generated: list[str]) -> float:
        """Slot accuracy (the share of facts that a phrasing states with the right value), or the
        share of exact matches."""
        if not self.fact:
            return exact_match(examples, generated)
        hits = []
        for example, text in zip(examples, generated, strict=True):
            for key, value in self.facts(example.prompt):
                stated = (phrase.format(v=value).lower() for phrase in self.phrasings[key])
                hits.append(any(phrase in text.lower() for phrase in stated))
        return sum(hits) / len(hits)


def exact_match(examples: list[Example], generated: list[str]) -> float:
    """The share of texts that equal the reference, up to white space around them."""
    pairs = zip(examples, generated, strict=True)
    return sum(text.strip() == e.completion.strip() for e, text in pairs) / len(examples)


def load_jsonl(file: str | Path, base: Base, fact: str | None = None) -> list[Example]:
    """Read and encode a task file. Raises ValueError naming file, line and fault."""
    examples = []
    lines = read_text(Path(file), 256 * MEBIBYTE).split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{file}, line {number}"
            row = parse_json(line, dict, where)
            try:
                examples += _encode(row, base, fact)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    if not examples:
        raise ValueError(f"{file} contains no examples")
    return examples


def _encode(row: dict, base: Base, fact: str | None) -> list[Example]:
    """The examples in a line: one, or one for each answer in a chat."""
    if "messages" in row:
        return [
            _chat_example(base, messages, *texts)
            for messages, *texts in chat.turns(base, row["messages"])
        ]
    for name in ("prompt", "completion"):
        if not (isinstance(row.get(name), str) and row[name]):
            raise ValueError(f'a "{name}" is missing: a text that is not empty')
    prompt, completion = row["prompt"], row["completion"]
    with _encoding():
        prompt_ids = encode_prompt(base.tokenizer, prompt)
        encoded = base.tokenizer.encode(completion, add_special_tokens=False)
    spans = []
    for _, value in re.findall(fact, prompt) if fact else []:
        spans += [m.span() for m in re.finditer(re.escape(value), completion)]
    slots = [any(a < e and s < b for a, b in spans) for s, e in encoded.offsets] + [False]
    return [_example(base, prompt, completion, prompt_ids, encoded.ids, slots)]


def _chat_example(base: Base, messages: list[dict], prompt: str, written: str) -> Example:
    """The last message, an answer, of which the template has written all special tokens. `prompt`
    of the example is the message before it."""
    with _encoding():
        prompt_ids = base.tokenizer.encode(prompt, add_special_tokens=False).ids
        ids = base.tokenizer.encode(written, add_special_tokens=False).ids
    if base.end in ids:  # a template may write more after it
        ids = ids[: len(ids) - 1 - ids[::-1].index(base.end)]
    question, answer = ["", *(message["content"] for message in messages)][-2:]
    example = _example(base, question, answer, prompt_ids, ids, [False] * (len(ids) + 1))
    return replace(example, is_chat=True)


def _example(base: Base, prompt, completion, prompt_ids, ids, slots) -> Example:
    if not prompt_ids or not ids:
        raise ValueError("the tokenizer finds no token in the prompt or completion")
    return Example(prompt, completion, prompt_ids, [*ids, base.end], slots)


@contextmanager
def _encoding():
    """Turns the errors of a tokenizer into ValueErrors."""
    try:
        yield
    except Exception as error:  # half of a surrogate pair, for one
        raise ValueError(f"the text cannot be encoded: {one_line(error)}") from error


def fitting(
    examples: list[Example], limit: float, file: str | Path
) -> tuple[list[Example], str | None]:
    """The examples of at most `limit` tokens, and what to say about the others.

    Raises ValueError if none is left.
    """
    lengths = [len(e.prompt_ids) + len(e.completion_ids) for e in examples]
    kept = [e for e, length in zip(examples, lengths, strict=True) if length <= limit]
    if len(kept) == len(examples):
        return kept, None
    said = f"of the {len(examples)} examples in {file} have more than {limit} tokens"
    longest = f"the longest has {max(lengths)}"
    if not kept:
        raise ValueError(f"all {said}; {longest}")
    return kept, f"{len(examples) - len(kept)} {said} and are left out; {longest}"


def load_task(base: Base, name: str) -> Task:
    """A shipped task."""
    folder = DATA / "tasks" / name
    if not (folder / "task.json").is_file():
        known = ", ".join(sorted(path.parent.name for path in DATA.glob("tasks/*/task.json")))
        raise ValueError(f"there is no task {name!r}; known tasks: {known}")
    how = read_json(folder / "task.json")
    fact, parts = how.get("fact"), ("train", "validation", "test")
    examples = [load_jsonl(folder / f"{part}.jsonl", base, fact) for part in parts]
    return Task(name, *examples, fact=fact, phrasings=how.get("phrasings", {}))


def load_files(
    base: Base, train: str, validation: str, test: str | None = None, max_length: int | None = None
) -> Task:
    """A task from your own files. Without a test file, every second validation example becomes a
    test example, so that nothing is chosen and reported on the same data. Examples with more tokens
    than `max_length`, or than the context holds, are left out."""
    limit = min(max_length or math.inf, context_length(base.pretrained))
    named = [(file, load_jsonl(file, base)) for file in (train, validation, test) if file]
    fitted = [fitting(examples, limit, file) for file, examples in named]
    parts = [examples for examples, _ in fitted]
    left_out = [said for _, said in fitted if said]
    more: dict = {"left_out": left_out, "own": True}
    if test:
        return Task(Path(train).stem, *parts, **more)
    trained, held = parts
    if len(held) < 2:
        raise ValueError(f"{validation} has one example, too few to split: give --test FILE too")
    split = f"{len(held[1::2])} of the {len(held)} examples in {validation} are kept for the test"
    return Task(Path(train).stem, trained, held[::2], held[1::2], split=split, **more)


def show_labels(example: Example, base: Base) -> str:
    """An example, token by token: first what no loss is taken on, then what is trained on."""

    def tokens(ids: list[int]) -> str:
        texts = [base.tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        each = [json.dumps(text, ensure_ascii=False) for text in texts]
        return " ".join(each if len(each) <= 40 else [*each[:20], "…", *each[-20:]])

    prompt, completion = tokens(example.prompt_ids), tokens(example.completion_ids)
    return f"not trained on: {prompt}\ntrained on: {completion}"


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
