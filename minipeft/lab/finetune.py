"""The training loop, for pretraining and for fine-tuning, and what is measured around it.

What a method is, this file does not know: `build_model` asks `get_peft_model`, and from there on a
model is something that takes a batch and returns a loss.
"""

import hashlib
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from minipeft.gpt import GPT, GPTConfig
from minipeft.lab import parallel, tasks
from minipeft.lab.checkpoint import Checkpoint, finishing_the_step
from minipeft.lab.log import Log
from minipeft.lab.parallel import Replicated
from minipeft.lab.tasks import Example, Task
from minipeft.peft_model import (
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    LoraConfig,
    PagedAdamW,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    QLoraConfig,
    bits_per_weight,
    count_parameters,
    find_targets,
    get_peft_model,
    quantize_model,
)

CAUSAL = {"task_type": "CAUSAL_LM"}


# Where a weight method's adapters go, by GPT-2's names; it is everywhere where nothing is said.
TARGETS = {
    "attention": r".*\.attn\.c_(attn|proj)",
    "mlp": r".*\.mlp\.c_(fc|proj)",
    "all-linear": "all-linear",
}
PLACED = ("lora", "adalora", "qlora")  # the methods that go there: those with a rank


def adalora(r: int, steps: int) -> AdaLoraConfig:
    """Half as much rank again at the start; ranks move in the middle two thirds of training."""
    start = r + (r + 1) // 2
    return AdaLoraConfig(
        target_r=r, init_r=start, lora_alpha=2 * start, target_modules="all-linear",
        total_step=steps, tinit=steps // 6, tfinal=steps // 6, **CAUSAL,
    )  # fmt: skip


# How each method is set up: the config of a size (rank, width or number of virtual tokens) for a
# number of steps, the usual size, what is done to the base before, and an optimizer other than
# AdamW. The learning rates are the sweep's, see SWEEPS.
METHODS = {
    "frozen": {},
    "full": {},
    "lora": {
        "size": 8,
        "config": lambda r, steps: LoraConfig(
            r=r, lora_alpha=2 * r, target_modules="all-linear", **CAUSAL
        ),
    },
    "adalora": {"size": 8, "config": adalora},
    "prompt_tuning": {
        "size": 20,
        "config": lambda p, steps: PromptTuningConfig(num_virtual_tokens=p, **CAUSAL),
    },
    "p_tuning": {
        "size": 20,
        "config": lambda p, steps: PromptEncoderConfig(num_virtual_tokens=p, **CAUSAL),
    },
    "prefix_tuning": {
        "size": 20,
        "config": lambda p, steps: PrefixTuningConfig(num_virtual_tokens=p, **CAUSAL),
    },
    "qlora": {
        "size": 8,
        "prepare": quantize_model,
        "config": lambda r, steps: QLoraConfig(
            r=r, lora_alpha=2 * r, target_modules="all-linear", **CAUSAL
        ),
        # half of the state of rank 8 on the 3M base fits, so that pages have to move
        "optimizer": partial(PagedAdamW, page_bytes=2**16, device_budget_bytes=9 * 2**16),
    },
    "bitfit": {"size": None, "config": lambda size, steps: BitFitConfig(**CAUSAL)},
    "bottleneck": {
        "size": 16,
        "config": lambda r, steps: BottleneckConfig(
            ["attn.c_proj", "mlp.c_proj"], bottleneck_size=r, **CAUSAL
        ),
    },
}
SWEEPS = tasks.DATA / "results" / "sweep.json"


# --- devices ---


def pick_device(name: str | None = None) -> torch.device:
    """The device to compute on: the one named, else cuda, else mps, else cpu."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    return torch.device(name)


def autocast(device: torch.device):
    """bfloat16 arithmetic on CUDA, nothing elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


# --- training ---


def gradients(model: nn.Module, runner: Replicated, micro_batches: list[dict]) -> float:
    """Add up micro-batches' gradients, each weighted by its labelled tokens; the mean loss.

    With several processes: by the tokens of all of them, whose gradients are averaged.
    """
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches]
    device, mean = next(model.parameters()).device, 0.0
    everything = parallel.total(sum(counts), device)
    for n, (batch, count) in enumerate(zip(micro_batches, counts, strict=True), 1):
        with runner.alone(n == len(counts)):
            with autocast(device):
                loss = runner.run(**batch)[0]
            (loss * (count * parallel.world() / everything)).backward()
        if isinstance(model, PeftModel):
            loss = model.task_loss  # reports leave AdaLoRA's penalty out
        mean += loss.item() * count / everything
    return parallel.total(mean, device)


def train(
    model: nn.Module,
    batches: Iterable[list[dict[str, Tensor]]],
    steps: int,
    learning_rate: float,
    warmup: int = 0,
    final: float = 0.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    max_grad_norm: float = 1.0,
    optimizer_class: Callable = torch.optim.AdamW,
    each_step: Callable[[dict], None] = lambda row: None,
    checkpoint: Checkpoint | None = None,
    title: str = "training",
    quiet: bool = False,
) -> dict:
    """AdamW with a linear warm-up, then a cosine down to `final` times the learning rate.

    `batches` yields, for every step, the micro-batches whose gradients are accumulated; each counts
    by its labelled tokens, so the gradient is that of the whole batch. `each_step` is called with
    step (from 1), loss, learning rate and seconds. With a `checkpoint` the run goes on where its
    file says, and Ctrl-C leaves one. Returns the losses by step, the median seconds of a step (the
    first tenth left out), the bytes of gradients and optimizer state, and, of a paged optimizer,
    its counters.
    Raises ValueError where nothing is trainable, FloatingPointError where a loss is not finite.
    """
    parallel.reshard(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("nothing is trainable: every parameter of the model is frozen")
    groups = [  # biases and norms do not decay
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = optimizer_class(groups, lr=learning_rate, betas=betas)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(steps - warmup, 1)
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

    losses, seconds, start = [], [], 0
    gradient_bytes = sum(p.nbytes for p in parameters)
    if checkpoint is not None:
        checkpoint.kept |= {"losses": losses, "seconds": seconds}
        start = checkpoint.load(model, optimizer)
    keeps = checkpoint is not None and parallel.rank() == 0
    model.train()
    runner = Replicated(model)
    hidden = {"disable": True} if quiet or parallel.rank() else {}  # TQDM_DISABLE=1 hides it too
    ahead = islice(batches, start, steps)
    bar = tqdm(ahead, total=steps, initial=start, desc=title, mininterval=0.5, **hidden)
    with finishing_the_step() as asked_to_stop:
        for step, micro_batches in enumerate(bar, start + 1):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * scale(step - 1)
            total = gradients(model, runner, micro_batches)
            if not math.isfinite(total):
                raise FloatingPointError(
                    f"the loss is {total} at step {step}: lower the learning rate ({learning_rate})"
                )
            gradient_bytes = sum(p.grad.nbytes for p in parameters if p.grad is not None)
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
            if isinstance(model, PeftModel):
                model.update_and_allocate(step)
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
            losses.append(total)
            rate = optimizer.param_groups[0]["lr"]
            bar.set_postfix(loss=f"{total:.3f}", lr=f"{rate:.1e}", refresh=False)
            each_step({"step": step, "loss": total, "learning_rate": rate, "seconds": seconds[-1]})
            if keeps and (step % checkpoint.every == 0 or asked_to_stop):
                checkpoint.save(model, optimizer, step)
            if asked_to_stop and step < steps:
                raise KeyboardInterrupt(f"stopped after step {step} of {steps}")
    state = optimizer.state_dict()["state"].values()
    record = {
        "losses": losses,
        "seconds_per_step": statistics.median(seconds[steps // 10 :]),
        "gradient_bytes": gradient_bytes,
        "optimizer_bytes": sum(v.nbytes for s in state for v in s.values() if torch.is_tensor(v)),
    }
    if runner.sent:
        record["bytes_sent_per_step"] = runner.sent // (steps - start)
    return record | ({"paging": optimizer.counters} if hasattr(optimizer, "counters") else {})


def pretrain(
    documents: list[str],
    config: GPTConfig,
    tokenizer: Tokenizer,
    steps: int,
    batch_size: int = 16,
    window: int = 128,
    learning_rate: float = 4e-3,
    seed: int = 0,
    device: str | None = None,
) -> tuple[GPT, dict]:
    """A GPT trained from nothing on documents, in windows of `window` tokens.

    One in fifty documents is held out; the record has their loss, in nats a token.
    """
    torch.manual_seed(seed)
    model = GPT(config).to(pick_device(device))
    encoded = [e.ids for e in tokenizer.encode_batch(documents)]
    end = config.eos_token_id
    n_held = len(encoded) // 50
    rows = tasks.windows(encoded[n_held:], window, end)
    queue = tasks.shuffled(list(range(len(rows))), batch_size, seed)

    def batches():
        for indices in queue:
            ids = rows[indices].to(model.device)
            yield [{"input_ids": ids, "labels": ids}]

    record = train(
        model,
        batches(),
        steps,
        learning_rate,
        warmup=min(200, steps // 10),
        final=0.05,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        title="pretraining",
    )
    if n_held:
        held = tasks.windows(encoded[:n_held], window, end)[:200]
        record["held_out_loss"] = text_loss(model, held)
    return model.eval(), record


# --- bases and models ---


@dataclass
class Base:
    """A pretrained model's folder: where it is, its tokenizer, text that it has not seen."""

    folder: str
    tokenizer: Tokenizer
    end: int  # the id of the end-of-text token
    held_out: Tensor | None  # windows (n, t) of held-out pretraining text, to measure forgetting

    def model(self) -> GPT:
        """A fresh copy of the pretrained model."""
        model = GPT.from_pretrained(self.folder)
        model.config.eos_token_id = self.end
        return model


def load_base(folder: str | Path) -> Base:
    """Open a GPT-2 folder. A `held_out.txt` in it, or beside it, serves to measure forgetting."""
    tokenizer, config = tasks.load_tokenizer(folder), GPT.from_pretrained(folder).config
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, "
            f"the model {config.vocab_size}"
        )
    end = tasks.find_end(folder, tokenizer, config.eos_token_id)
    texts = [path / "held_out.txt" for path in (Path(folder), Path(folder).resolve().parent)]
    text = next((text for text in texts if text.is_file()), None)
    held_out = None
    if text is not None:
        encoded = [e.ids for e in tokenizer.encode_batch(tasks.read_text(text))]
        held_out = tasks.windows(encoded, min(128, config.n_positions), end)
    return Base(str(folder), tokenizer, end, held_out)


def build_model(
    base: Base,
    method: str,
    seed: int,
    steps: int,
    random_base: bool = False,
    size: int | None = None,
    targets: str | None = None,
) -> nn.Module:
    """A model ready to be trained by a method: everything free, nothing, or an adapter on it.

    `random_base` takes a model of the same shape that was never trained: the control. `size` is
    the adapter's rank, width or number of virtual tokens. `targets` puts the adapters of a method
    with a rank on some layers alone, at the rank at which they have as many parameters as on all.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}; there are: {', '.join(METHODS)}")
    if targets is not None and method not in PLACED:
        raise ValueError(f"{method} takes no targets; these do: {', '.join(PLACED)}")
    torch.manual_seed(seed)
    model = base.model()
    if random_base:
        model = GPT(model.config)
    if "prepare" in METHODS[method]:
        METHODS[method]["prepare"](model)
    if "config" in METHODS[method]:
        size = size or METHODS[method]["size"]
        if targets is not None:
            if targets not in TARGETS:
                raise ValueError(f"targets is {targets!r}; there are: {', '.join(TARGETS)}")
            size = round(size * adapter_width(model, "all-linear") / adapter_width(model, targets))
        config = METHODS[method]["config"](size, steps)
        if targets is not None:
            config.target_modules = TARGETS[targets]
        return get_peft_model(model, config)
    return model.requires_grad_(method == "full")


def adapter_width(model: nn.Module, targets: str) -> int:
    """Parameters of adapters of rank 1."""
    layers = find_targets(model, TARGETS[targets]).values()
    return sum(layer.in_features + layer.out_features for layer in layers)


def optimizer_of(method: str) -> Callable:
    """What makes a method's optimizer from parameter groups: AdamW, but for QLoRA."""
    return METHODS[method].get("optimizer", torch.optim.AdamW)


def load_sweeps() -> list[dict]:
    """The entries of the committed sweep."""
    return json.loads(SWEEPS.read_text()) if SWEEPS.is_file() else []


def swept_methods() -> list[str]:
    """The methods that `compare` can run: those with a swept learning rate, and the frozen base."""
    found = {"frozen"} | {entry["method"] for entry in load_sweeps()}
    return [method for method in METHODS if method in found]


def swept_learning_rate(
    base: Base, task: Task, method: str, steps: int, random_base: bool, size: int | None
) -> float:
    """The best learning rate of the committed sweep that is most like this run.

    Likeness counts in this order: pretrained or not, the task, the base, the size, the number of
    steps, the number of training examples.
    """
    size = size or METHODS[method].get("size")
    sweeps = [entry for entry in load_sweeps() if entry["method"] == method]
    if not sweeps:
        raise ValueError(f"no learning rate was swept for {method!r}: give one, or run the sweep")

    def likeness(entry: dict) -> tuple:
        same = [
            entry["random_base"] == random_base,
            entry["task"] == task.name,
            entry["base"] == Path(base.folder).name,
            entry["size"] == size,
        ]
        far = [entry["steps"] / steps, entry["examples"] / len(task.train)]
        return (*same, *(-abs(math.log(ratio)) for ratio in far))

    return max(sweeps, key=likeness)["best"]


# --- measuring ---


@contextmanager
def evaluating(model: nn.Module):
    """Eval mode without gradients; afterwards the mode is what it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(next(model.parameters()).device):
            yield
    finally:
        model.train(was_training)


def text_loss(model: nn.Module, rows: Tensor, batch_size: int = 32) -> float:
    """Mean loss a token on windows of plain text (n, t)."""
    device = next(model.parameters()).device
    with evaluating(model):
        losses = [
            model(ids.to(device), labels=ids.to(device))[0].item() * len(ids)
            for ids in rows.split(batch_size)
        ]
    return sum(losses) / len(rows)


def task_loss(model: nn.Module, examples: list[Example], end: int, batch_size: int = 64) -> dict:
    """Mean loss a token of the completions: over all, over slot tokens, over frame tokens."""
    device, losses, slots = next(model.parameters()).device, [], []
    with evaluating(model):
        for i in range(0, len(examples), batch_size):
            part = examples[i : i + batch_size]
            batch = tasks.collate(part, end, device)
            labels = batch.pop("labels")[:, 1:]  # (b, t - 1)
            logits = model(**batch)[1][:, :-1].float()  # (b, t - 1, v)
            each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (b, t - 1)
            losses.append(each[labels != -100].cpu())
            slots.append(torch.tensor([s for e in part for s in e.is_slot]))
    losses, slots = torch.cat(losses), torch.cat(slots)
    result = {"loss": losses.mean().item()}
    if slots.any():
        result |= {
            "slot_loss": losses[slots].mean().item(),
            "frame_loss": losses[~slots].mean().item(),
        }
    return result


def complete(model: nn.Module, base: Base, examples: list[Example], batch_size: int = 64):
    """Greedy completions of the examples' prompts, as texts."""
    device, texts = next(model.parameters()).device, []
    longest = max(len(e.completion_ids) for e in examples) + 8
    with evaluating(model):
        for i in range(0, len(examples), batch_size):
            prompts = [e.prompt_ids for e in examples[i : i + batch_size]]
            ids, mask = tasks.pad_left(prompts, base.end, device)
            room = model.config.n_positions - virtual_tokens(model) - ids.shape[1]
            out = model.generate(
                ids, mask, max_new_tokens=min(longest, room), eos_token_id=base.end
            )
            new = out[:, ids.shape[1] :].tolist()
            texts += [base.tokenizer.decode(row, skip_special_tokens=True) for row in new]
    return texts


def virtual_tokens(model: nn.Module) -> int:
    """How many places of the context a prompt method's adapter takes for itself."""
    configs = getattr(model, "peft_config", {}).values()
    return max((getattr(config, "num_virtual_tokens", 0) for config in configs), default=0)


def check_lengths(model: nn.Module, task: Task) -> None:
    """Raises ValueError where an example and an adapter's virtual tokens exceed the context."""
    examples = [*task.train, *task.validation, *task.test]
    longest = max(len(e.prompt_ids) + len(e.completion_ids) for e in examples)
    virtual, limit = virtual_tokens(model), model.config.n_positions
    if longest + virtual > limit:
        raise ValueError(
            f"an example of {longest} tokens and {virtual} virtual ones exceed the context of "
            f"{limit}: shorten it, or give fewer virtual tokens"
        )


def activation_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that one forward pass keeps for the backward pass, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        autocast(next(model.parameters()).device),
    ):
        loss = model(**batch)[0]  # alive until here, so no address is used twice
    del loss
    return sum(kept.values())


def disk_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a task needs on disk: an adapter's, or the whole model's."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(os.path.getsize(file) for file in Path(folder).rglob("*.safetensors"))


def checkpoint_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict:
    """Turn gradient checkpointing on: only the blocks' inputs are kept, the rest computed again.

    Returns how many bytes that saves and how many seconds it costs, a forward and backward pass of
    this batch (medians of three).
    """
    state, found = torch.get_rng_state(), []
    for enable in (lambda: None, model.gradient_checkpointing_enable):
        enable()
        kept, seconds = activation_bytes(model, batch), []
        for _ in range(4):
            began = time.perf_counter()
            gradients(model, Replicated(model), [batch])
            seconds.append(time.perf_counter() - began)
        found.append((kept, statistics.median(seconds[1:])))
    model.zero_grad()
    torch.set_rng_state(state)  # as if nothing had been tried
    (kept, quick), (fewer, slow) = found
    return {"bytes_saved": kept - fewer, "seconds_lost": slow - quick}


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def finetune(
    base: Base,
    task: Task,
    method: str,
    steps: int,
    seed: int = 0,
    learning_rate: float | None = None,
    size: int | None = None,
    batch_size: int = 16,
    accumulation: int = 1,
    generated: int = 64,
    validations: int = 8,
    random_base: bool = False,
    targets: str | None = None,
    gradient_checkpointing: bool = False,
    shard: bool = False,
    device: str | None = None,
    output: str | Path | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
    log_dir: str | None = None,
    quiet: bool = False,
) -> dict:
    """Fine-tune a base on a task with one method, measure, and return the record.

    The learning rate is the committed sweep's where none is given. `validations` is how often the
    validation loss is taken on the way. With `output`, the adapter, or the whole model with its
    tokenizer, is saved there, beside `log.csv`; and, every `checkpoint_every` steps, the state of
    the run, from which `resume` goes on to the same end, to the bit. `shard` cuts the model over
    the processes; then neither state nor log is kept.
    """
    # what cannot be done is refused before anything is written
    counts = {"steps": steps, "batch_size": batch_size, "accumulation": accumulation}
    for name, n in (counts | {"generated": generated}).items():
        if n < 1:
            raise ValueError(f"{name} is {n}: give a whole number from 1 up")
    parallel.share([None] * batch_size)
    if size is not None and METHODS[method].get("size") is None:
        raise ValueError(f"{method} has no size: {size} was given")
    model = build_model(base, method, seed, steps, random_base, size, targets)
    check_lengths(model, task)
    model = parallel.shard(model, method) if shard else model.to(pick_device(device))
    if learning_rate is None and method != "frozen":
        learning_rate = swept_learning_rate(base, task, method, steps, random_base, size)
    trainable, total = count_parameters(model)
    setting = {
        "method": method,
        "random_base": random_base,
        "seed": seed,
        "base": Path(base.folder).name,
        "task": task.name,
        "n_train": len(task.train),
        "steps": steps,
        "learning_rate": learning_rate,
        "size": size or METHODS[method].get("size"),
    }
    record = setting | ({"targets": targets} if targets else {})
    record |= {
        "trainable": trainable,
        "parameters": total,
        "weight_bytes": sum(t.nbytes for t in [*model.parameters(), *model.buffers()]),
        "bits": bits_per_weight(model),
        "validation": [],
    }
    checkpoint, log = None, None
    if output is not None and method != "frozen" and not shard:
        data = [json.dumps([e.prompt_ids, e.completion_ids]).encode() for e in task.train]
        weights = (Path(base.folder) / "model.safetensors").read_bytes()
        run = setting | {"targets": targets, "batch_size": batch_size, "accumulation": accumulation}
        run |= {"base": digest(weights), "data": digest(*data)}
        file = Path(output) / "checkpoint.safetensors"
        checkpoint = Checkpoint(file, checkpoint_every or steps + 1, run)
        checkpoint.kept["validation"] = record["validation"]
        if file.is_file() and not resume:
            raise ValueError(
                f"{file} is of a run that was stopped: go on with --resume, or delete it"
            )
        start = checkpoint.read()[0]["step"] if resume else 0
        log = Log(output, log_dir, start) if parallel.rank() == 0 else None

    def validate(row: dict) -> None:
        step = row["step"]
        if step % max(steps // validations, 1) == 0 or step == steps:
            losses = task_loss(model, task.validation, base.end)
            record["validation"].append({"step": step} | losses)
            row |= {f"validation_{name}": loss for name, loss in losses.items()}
        if log is not None and step:
            log(row)

    validate({"step": 0})
    if base.held_out is not None:
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            record["forgetting"] = {"base": text_loss(model, base.held_out)}
    if method != "frozen":
        order = tasks.shuffled(task.train, batch_size, seed)
        batches = (
            [
                tasks.collate(part, base.end, model.device)
                for i in range(accumulation)
                if (part := parallel.share(batch)[i::accumulation])
            ]
            for batch in order
        )
        first = tasks.collate(task.train[:batch_size], base.end, model.device)
        model.train()
        if gradient_checkpointing:
            record["gradient_checkpointing"] = checkpoint_gradients(model, first)
        if not shard:
            record["activation_bytes"] = activation_bytes(model, first)
        title = f"{method}{' on a random base' if random_base else ''}, seed {seed}"
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        record |= train(
            model,
            batches,
            steps,
            learning_rate,
            warmup=max(steps // 10, 1),
            optimizer_class=optimizer_of(method),
            each_step=validate,
            checkpoint=checkpoint,
            title=title,
            quiet=quiet,
        )
        if model.device.type == "cuda":
            record["max_memory_allocated"] = torch.cuda.max_memory_allocated()
        with parallel.put_together(model):
            record["disk_bytes"] = disk_bytes(model)
        if isinstance(model, PeftModel) and model.ranks():
            record["ranks"] = model.ranks()
    examples = task.test[:generated]
    texts = complete(model, base, examples)
    record |= task.score(examples, texts) | {
        f"test_{name}": value for name, value in task_loss(model, task.test, base.end).items()
    }
    record["examples"] = [
        {"prompt": e.prompt, "reference": e.completion, "generated": text}
        for e, text in zip(examples[:3], texts, strict=False)
    ]
    if base.held_out is not None and method != "frozen":
        record["forgetting"]["on"] = text_loss(model, base.held_out)
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                record["forgetting"]["off"] = text_loss(model, base.held_out)
    if output is not None:
        with parallel.put_together(model):
            if parallel.rank() == 0:
                model.save_pretrained(output)
        if parallel.rank() == 0 and not isinstance(model, PeftModel):
            tasks.copy_tokenizer(base.folder, output)
    if log is not None:  # the run has ended, and what it learned is saved
        checkpoint.file.unlink(missing_ok=True)
        log.close()
    return record
