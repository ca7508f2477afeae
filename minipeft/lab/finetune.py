"""Fine-tune a base on a task with one method, save what was trained, and measure it."""

import csv
import hashlib
import json
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from minipeft import get_peft_model, quantize_model
from minipeft.base_model import context_length, count_parameters
from minipeft.files import MEBIBYTE, has_type, read_json, read_text, show, write_text
from minipeft.lab import evaluate, parallel, tasks
from minipeft.lab.base import Base, copy_tokenizer
from minipeft.lab.chat import PLAIN
from minipeft.lab.checkpoint import Checkpoint, locked
from minipeft.lab.recipes import COMMON_WARMUP, Recipe, RunConfig, default_learning_rate
from minipeft.lab.tasks import Example, Task
from minipeft.lab.train import pick_device, train
from minipeft.methods.qlora import bits_per_weight
from minipeft.peft_model import PeftModel
from minipeft.targets import find_targets, layers_at

# Fields of RunConfig that may differ between a stopped run and the run that resumes it.
NOT_IDENTITY = {
    "n_generate", "n_evaluations", "gradient_checkpointing", "device", "output", "checkpoint_every",
    "resume", "quiet",
}  # fmt: skip
ORIGIN = "minipeft.json"  # says what an adapter was trained on
LOGGED = (
    "step", "loss", "learning_rate", "seconds",
    "validation_loss", "validation_slot_loss", "validation_template_loss",
)  # fmt: skip


@dataclass
class Record:
    """One run: how it was set up, and what was measured. None: does not apply."""

    method: str
    base: str
    task: str
    seed: int
    steps: int
    n_train: int
    random_base: bool = False
    size: int | None = None
    targets: str | None = None
    learning_rate: float | None = None
    learning_rate_origin: str | None = None  # if it was swept on another base or task
    weight_decay: float = 0.0
    decay_to: str = "zero"
    split: str | None = None  # how test examples were split off, if they were
    trainable: int | None = None
    parameters: int | None = None
    weight_bytes: int | None = None
    bits: float | None = None  # per weight of quantized layers
    losses: list[float] | None = None
    validation: list[dict[str, float]] = field(
        default_factory=list
    )  # step, loss, slot_loss, template_loss
    seconds_per_step: float | None = None
    activation_bytes: int | None = None
    gradient_bytes: int | None = None
    optimizer_bytes: int | None = None
    disk_bytes: int | None = None
    paging: dict[str, int] | None = None
    bytes_sent_per_step: int | None = None
    gradient_checkpointing: dict | None = None  # bytes_saved, seconds_lost
    max_memory_allocated: int | None = None  # on a GPU
    ranks: dict[str, int] | None = None  # AdaLoRA's
    score: float | None = None  # on test examples
    test_loss: float | None = None
    test_slot_loss: float | None = None
    test_template_loss: float | None = None
    examples: list[dict] | None = None  # prompt, reference, generated
    forgetting: dict[str, float] | None = None  # loss on held-out text: base, start, on, off

    def forgot(self, state: str = "on") -> float | None:
        """The rise of the loss on held-out text, in nats per token: with the adapter at step 0
        ("start"), or after training with it "on" or "off"."""
        losses = self.forgetting or {}
        return losses[state] - losses["base"] if state in losses else None

    def to_json(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value is not None}


def build_model(base: Base, recipe: Recipe, run: RunConfig) -> nn.Module:
    """A model ready to be trained: all of it, nothing of it, or an adapter on it."""
    torch.manual_seed(run.seed)
    model = base.new_model() if run.random_base else base.model()
    if recipe.bits is not None:
        quantize_model(model, recipe.bits)
    if recipe.config is None:
        if recipe.method == "full" and any(p.dtype == torch.bfloat16 for p in model.parameters()):
            raise ValueError("bfloat16 weights lose small updates: full needs --dtype float32")
        return model.requires_grad_(recipe.method == "full")
    size, place = recipe.size, recipe.targets or recipe.place
    targets = None if place is None else layers_at(model, place)
    if recipe.same_size:
        everywhere, here = (rank_1_parameters(model, t) for t in ("all-linear", targets))
        size = round(size * everywhere / here)
    config = recipe.config(size, run.steps)
    if targets is not None:
        config.target_modules = targets
    return get_peft_model(model, config)


def rank_1_parameters(model: nn.Module, targets: list[str] | str) -> int:
    """Parameters of adapters of rank 1 on these layers."""
    layers = find_targets(model, targets).values()
    return sum(layer.in_features + layer.out_features for layer in layers)


def check_lengths(model: nn.Module, base: Base, task: Task) -> None:
    """Raises ValueError if text (examples and held-out windows) and virtual tokens exceed the
    context."""
    examples = [*task.train, *task.validation, *task.test]
    lengths = [len(e.prompt_ids) + len(e.completion_ids) for e in examples]
    if base.held_out is not None:
        lengths.append(base.held_out.shape[1])
    longest = max(lengths)
    virtual, limit = evaluate.virtual_tokens(model), context_length(model)
    if longest + virtual > limit:
        raise ValueError(
            f"{longest} tokens of text and {virtual} virtual tokens exceed the context of "
            f"{limit}: shorten the text, or use fewer virtual tokens"
        )


def finetune(base: Base, task: Task, recipe: Recipe, run: RunConfig) -> Record:
    """Fine-tune a base on a task, and measure.

    The learning rate is the committed sweep's if `run` has none. With `run.output`, the adapter (or
    the whole model with its tokenizer) is saved there before it is evaluated. Next to it are
    `log.csv` and, while it trains, a checkpoint. With `run.resume` the run continues from it, to
    exactly the same end; without, it starts over. A sharded run keeps neither log nor checkpoint.
    """
    output = run.output or os.devnull
    if os.path.exists(output) and os.path.samefile(output, base.folder):
        raise ValueError(f"output {output} is the base's own folder: name another one")
    parallel.share([None] * run.batch_size)  # raises if processes would get unequal shares
    model = build_model(base, recipe, run)
    check_lengths(model, base, task)
    model = parallel.shard(model, recipe.method) if run.shard else model.to(pick_device(run.device))
    trains, origin = recipe.method != "frozen", None
    if run.learning_rate is None and trains:
        known = base.name if base.is_shipped else None
        rate, origin = default_learning_rate(recipe, run, known, task.name, len(task.train))
        run = replace(run, learning_rate=rate)
    if run.warmup is None and not base.is_shipped:
        run = replace(run, warmup=max(1, math.ceil(COMMON_WARMUP * run.steps)))
    if not run.quiet and parallel.rank() == 0:
        if origin:
            size = "" if recipe.size is None else f", {recipe.size_name} {recipe.size}"
            print(f"{recipe.method}: learning rate {run.learning_rate:g}{size} ({origin})")
        for said in [task.split, *task.left_out]:
            if said:
                print(f"{task.name}: {said}")
        if task.own and trains:
            print(f"the first example, token by token\n{tasks.show_labels(task.train[0], base)}")
    trainable, parameters = count_parameters(model)
    record = Record(
        method=recipe.method, size=recipe.size, targets=recipe.targets,
        base=base.name, task=task.name, n_train=len(task.train), split=task.split,
        seed=run.seed, steps=run.steps, random_base=run.random_base,
        learning_rate=run.learning_rate, learning_rate_origin=origin,
        weight_decay=run.weight_decay, decay_to=run.decay_to,
        trainable=trainable, parameters=parameters,
        weight_bytes=evaluate.weight_bytes(model), bits=bits_per_weight(model),
    )  # fmt: skip
    if trains:
        writes = run.output is not None and parallel.rank() == 0
        with locked(Path(run.output)) if writes else nullcontext():
            train_and_save(model, base, task, recipe, run, record)
    else:
        validate(record, model, base, task, step=0)
        measure_forgetting(record, model, base, "base", None)
    examples = task.test[: run.n_generate]
    texts = evaluate.complete(model, base, examples)
    record.score = task.score(examples, texts)
    for name, loss in evaluate.task_loss(model, task.test, base.end).items():
        setattr(record, f"test_{name}", loss)
    record.examples = [
        {"prompt": e.prompt, "reference": e.completion, "generated": text}
        for e, text in zip(examples[:3], texts, strict=False)
    ]
    if trains:
        measure_forgetting(record, model, base, "off", "on")
    return record


def train_and_save(
    model: nn.Module, base: Base, task: Task, recipe: Recipe, run: RunConfig, record: Record
) -> None:
    """Train, validate on the way, save; what is measured goes into the record."""
    checkpoint, log = None, None
    if run.output is not None and not run.shard:
        checkpoint = make_checkpoint(base, task, recipe, run)
        checkpoint.lists["validation"] = record.validation

    def after_step(row: dict) -> None:
        nonlocal log
        step = row["step"]
        if step % max(run.steps // run.n_evaluations, 1) == 0 or step == run.steps:
            losses = validate(record, model, base, task, step)
            row |= {f"validation_{name}": loss for name, loss in losses.items()}
        if checkpoint is not None and parallel.rank() == 0:
            log = log or open_log(Path(run.output) / "log.csv", step - 1)  # not if it is refused
            log(row)

    validate(record, model, base, task, step=0)
    measure_forgetting(record, model, base, "base", "start")
    model.train()
    first = tasks.collate(task.train[: run.batch_size], base.end, model.device)
    if run.gradient_checkpointing:
        record.gradient_checkpointing = evaluate.checkpoint_gradients(model, first)
    if not run.shard:
        record.activation_bytes = evaluate.activation_bytes(model, first)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    title = f"{recipe.method}{' on a random base' if run.random_base else ''}, seed {run.seed}"
    batches = micro_batches(task, run, base.end, model.device)
    training = train(model, batches, run, recipe, after_step, checkpoint, title)
    for name, value in vars(training).items():
        setattr(record, name, value)
    record.max_memory_allocated = torch.cuda.max_memory_allocated() if on_gpu else None
    has_adapter = isinstance(model, PeftModel)
    record.ranks = (model.ranks() or None) if has_adapter else None
    with parallel.gathered(model):
        if run.output is not None and parallel.rank() == 0:  # before anything else can fail
            model.save_pretrained(run.output)
            if has_adapter:
                write_origin(Path(run.output), base, recipe.bits, task.train[0].is_chat)
            else:
                copy_tokenizer(base, run.output)
        record.disk_bytes = evaluate.disk_bytes(model, run.output)
    if checkpoint is not None:
        checkpoint.file.unlink(missing_ok=True)


def write_origin(folder: Path, base: Base, bits: int | None, is_chat: bool) -> None:
    """Write next to an adapter what it was trained on: see `check_origin`."""
    template = (base.template or PLAIN) if is_chat else None
    name = str(getattr(base.pretrained, "name_or_path", base.folder))
    found = {"base": name, "checksum": base.digest(), "bits": bits, "chat_template": template}
    write_text(folder / ORIGIN, json.dumps(found, indent=2) + "\n")


def check_origin(folder: Path, base: Base, bits: int | None, is_chat: bool | None) -> list[str]:
    """In what an adapter is used otherwise than it was trained, as sentences; empty if in nothing,
    or if the adapter's folder does not say. is_chat: None if it does not matter.

    Raises ValueError for a damaged file.
    """
    file = folder / ORIGIN
    if not file.is_file():
        return []
    found, said = read_json(file), []
    kinds = {"base": str, "checksum": str, "bits": int | None, "chat_template": str | None}
    for name, kind in kinds.items():
        if name not in found or not has_type(found[name], kind):
            raise ValueError(f"{file}: {name} must be there, got {show(found.get(name))}")
    if found["checksum"] != base.digest():
        said.append(f"it was trained on another base: {show(found['base'])}")
    if found["bits"] != bits:
        names = {None: "that was not quantized", 4: "in 4 bits (--4bit)"}
        other = names.get(found["bits"], f"in {found['bits']} bits")
        said.append(f"it was trained on a base {other}")
    if is_chat is not None and is_chat != (found["chat_template"] is not None):
        said.append(f"it was {'not ' * is_chat}trained on chats{'' if is_chat else ' (--chat)'}")
    elif is_chat and found["chat_template"] != (base.template or PLAIN):
        said.append("it was trained with another chat template")
    return [f"warning: the adapter in {folder} is used in another way: {each}" for each in said]


def validate(record: Record, model: nn.Module, base: Base, task: Task, step: int) -> dict:
    """The losses on the validation examples after a step; they also go into the record."""
    losses = evaluate.task_loss(model, task.validation, base.end)
    record.validation.append({"step": step} | losses)
    return losses


def measure_forgetting(record: Record, model: nn.Module, base: Base, off: str, on: str | None):
    """The loss on held-out text without the adapter and with it, under these names."""
    if base.held_out is None:
        return
    found = record.forgetting = record.forgetting or {}
    has_adapter = isinstance(model, PeftModel)
    if has_adapter or off == "base":
        with model.disable_adapter() if has_adapter else nullcontext():
            found[off] = evaluate.text_loss(model, base.held_out)
    if on == "start" and not evaluate.virtual_tokens(model):
        found[on] = found[off]  # all other methods start exactly at the base
    elif on is not None:
        found[on] = evaluate.text_loss(model, base.held_out)


def micro_batches(task: Task, run: RunConfig, end: int, device):
    """For every step, this process's share of the batch, in `run.accumulation` parts."""
    for batch in tasks.shuffled(task.train, run.batch_size, run.seed):
        share = parallel.share(batch)
        parts = [share[i :: run.accumulation] for i in range(run.accumulation)]
        yield [tasks.collate(part, end, device) for part in parts if part]


def make_checkpoint(base: Base, task: Task, recipe: Recipe, run: RunConfig) -> Checkpoint:
    """The run's checkpoint. Raises ValueError if the run is to be resumed, but has ended."""
    identity = {name: value for name, value in asdict(run).items() if name not in NOT_IDENTITY}
    identity |= {name: getattr(recipe, name) for name in ("method", "size", "targets", "bits")}
    identity |= {"base": base.digest(), "task": task.name, "n_train": len(task.train)}
    identity |= {"data": checksum(task.train), "validation": checksum(task.validation)}
    file = Path(run.output) / "checkpoint.safetensors"
    finished = [n for n in ("adapter_config.json", "config.json") if (file.parent / n).is_file()]
    if run.resume and finished and not file.is_file():
        raise ValueError(f"there is nothing to resume in {file.parent}: this run has ended")
    return Checkpoint(file, run.checkpoint_every, identity, resume=run.resume)


def checksum(examples: list[Example]) -> str:
    tokens = json.dumps([[e.prompt_ids, e.completion_ids] for e in examples])
    return hashlib.sha256(tokens.encode()).hexdigest()[:16]


def open_log(file: Path, start: int) -> Callable[[dict], object]:
    """A function that appends a row to a CSV file, at once.

    Rows after step `start`, which a stopped run has left, are dropped. The old file is replaced,
    not overwritten, in case it is a link.
    """
    lines = [",".join(LOGGED)]
    if start and file.is_file():
        for line in read_text(file, 256 * MEBIBYTE).splitlines():
            step = line.split(",")[0]
            if step.isdecimal() and int(step) <= start:
                lines.append(line)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "\n".join(lines) + "\n")
    opened = file.open("a", newline="", buffering=1)  # each line is written when it is complete
    return csv.DictWriter(opened, LOGGED, lineterminator="\n").writerow
