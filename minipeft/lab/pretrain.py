"""Pretraining: a small GPT and its tokenizer from a text file."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minipeft.gpt import GPT, GPTConfig
from minipeft.lab.base import END, windows
from minipeft.lab.evaluate import text_loss
from minipeft.lab.recipes import RunConfig
from minipeft.lab.tasks import shuffled
from minipeft.lab.train import TrainingResult, pick_device, train

# The shipped bases: no dropout, and a wider start than GPT-2's, which is small for a narrow model.
SETTINGS: dict = {
    "initializer_range": 0.06, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE like GPT-2's: any text can be encoded; words keep the space before them."""
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


def pretrain(
    documents: list[str], config: GPTConfig, tokenizer: Tokenizer, run: RunConfig
) -> tuple[GPT, TrainingResult, float | None]:
    """A GPT trained from scratch on documents, in windows as long as the context.

    The first fiftieth of the documents is kept out of training; the last result is the loss on
    them, in nats per token.
    """
    torch.manual_seed(run.seed)
    model = GPT(config).to(pick_device(run.device))
    encoded = [e.ids for e in tokenizer.encode_batch(documents)]
    n_held, end, window = len(encoded) // 50, config.eos_token_id, config.n_positions
    rows = windows(encoded[n_held:], window, end)
    order = shuffled(range(len(rows)), run.batch_size, run.seed)
    texts = (rows[indices].to(model.device) for indices in order)
    batches = ([{"input_ids": ids, "labels": ids}] for ids in texts)
    training = train(model, batches, run, title="pretraining")
    if sum(len(document) + 1 for document in encoded[:n_held]) < window:
        return model.eval(), training, None
    held_out = windows(encoded[:n_held], window, end)[:200]
    return model.eval(), training, text_loss(model, held_out)


def pretraining_run(steps: int, learning_rate: float = 4e-3, **changes) -> RunConfig:
    """The settings that the shipped bases were pretrained with."""
    return RunConfig(
        steps=steps, learning_rate=learning_rate, warmup=min(200, steps // 10), lr_end=0.05,
        weight_decay=0.1, beta2=0.95, **changes,
    )  # fmt: skip
