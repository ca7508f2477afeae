r"""Prompt tuning: leave the model alone, and learn a few tokens that stand before the input.

A prompt of words steers a language model; its words enter as vectors, the rows of the embedding.
Prompt tuning puts p vectors of its own before those of the input and trains them alone, by gradient
descent through the frozen model. They need not be the vectors of any words, hence "soft" tokens.
Nothing in the model changes, so there is nothing to merge, and one batch may mix tasks. The price:
p tokens of the context, in training and in use.

Paper: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv
2104.08691. Its model is T5, an encoder and decoder; ours is a decoder, as in peft.

    logits = model([P; E(x)])        P (p, d) is trained, E embeds tokens      (1)  section 2

Shapes: b batch, t tokens, p virtual tokens, d width, v vocabulary; P (p, d), logits (b, t, v).
Trainable parameters: p d.

Where we differ. From peft: logits are those of the t real tokens (peft returns p + t). As in peft,
labels are -100 for the virtual tokens and shifted afterwards, so the last virtual token predicts
the first real one where that has a label; positions run on from the prompt, 0 … p + t - 1.

>>> model.requires_grad_(False)
>>> prompt = PromptEmbedding(PromptTuningConfig(num_virtual_tokens=20), model)
>>> loss = prompt(model, input_ids, labels=labels).loss  # train prompt.parameters()
>>> prompt.generate(model, input_ids, max_new_tokens=20)
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass
class PromptTuningConfig:
    """How many virtual tokens, and where they start. Fields, defaults and meaning are peft's."""

    num_virtual_tokens: int | None = None  # p
    prompt_tuning_init: str = "RANDOM"  # N(0, 1); "SAMPLE_VOCAB": rows of the embedding; "TEXT"
    prompt_tuning_init_text: str | None = None  # for "TEXT": cut, or repeated, to p tokens
    tokenizer_name_or_path: str | None = None  # for "TEXT": a folder with a tokenizer.json
    token_dim: int | None = None  # d, filled in from the model
    task_type: str | None = None
    inference_mode: bool = False  # True: the prompt is frozen as well
    peft_type: str = field(default="PROMPT_TUNING", init=False)

    def __post_init__(self):
        p, start = self.num_virtual_tokens, self.prompt_tuning_init
        if not isinstance(p, int) or isinstance(p, bool) or p < 1:
            raise ValueError(f"num_virtual_tokens is {p!r}: give a whole number from 1 up")
        if start not in ("RANDOM", "SAMPLE_VOCAB", "TEXT"):
            raise ValueError(f"prompt_tuning_init is {start!r}: RANDOM, SAMPLE_VOCAB or TEXT")
        if start == "TEXT" and not (self.prompt_tuning_init_text and self.tokenizer_name_or_path):
            raise ValueError(
                "prompt_tuning_init TEXT needs prompt_tuning_init_text and tokenizer_name_or_path"
            )


class Output(NamedTuple):
    """What a run returns; logits (b, t, v) are those of the real tokens."""

    loss: Tensor | None
    logits: Tensor


class PromptEmbedding(nn.Module):
    """P, equation (1), and how to run a model behind it. The model is not changed."""

    def __init__(self, config: PromptTuningConfig, model: nn.Module):
        super().__init__()
        words = check_model(model, config)  # (v, d)
        p, start = config.num_virtual_tokens, config.prompt_tuning_init
        self.embedding = nn.Embedding(p, config.token_dim)  # drawn from N(0, 1)
        if start != "RANDOM" and not config.inference_mode:
            if start == "TEXT":
                ids = torch.tensor(read_tokens(config))
                ids = ids.repeat(-(-p // len(ids)))[:p]
            else:
                ids = torch.randint(0, len(words), (p,))
            rows = words[ids.to(words.device)].detach().float().clone()
            self.embedding.weight = nn.Parameter(rows)
        self.to(words.device).requires_grad_(not config.inference_mode)

    def prompt(self) -> Tensor:
        """P, (p, d)."""
        return self.embedding.weight

    # --- run: the same lines stand in prompt_tuning.py and p_tuning.py
    def forward(self, model: nn.Module, input_ids: Tensor | None = None, **inputs) -> Output:
        """Run a causal model on P and then input_ids (b, t), or inputs_embeds (b, t, d).

        Other inputs are attention_mask, labels and position_ids, each (b, t).
        """
        prompt = self.prompt()
        out = model(**prepend(model, prompt, input_ids, **inputs))
        return Output(out.loss, out.logits[:, len(prompt) :])

    @torch.no_grad()
    def generate(self, model: nn.Module, input_ids: Tensor, attention_mask=None, **options):
        """The model's `generate` behind P: input_ids (b, t), padded on the left, to (b, t + n)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        new = model.generate(**prepend(model, self.prompt(), input_ids, mask), **options)
        return torch.cat((input_ids, new), dim=1)

    # --- end of run


def read_tokens(config: PromptTuningConfig) -> list[int]:
    """The token ids of the text to start from."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("starting from a text needs tokenizers: pip install it") from error
    file = f"{config.tokenizer_name_or_path}/tokenizer.json"
    try:
        return Tokenizer.from_file(file).encode(config.prompt_tuning_init_text).ids
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file} cannot be read: {error}") from error


# --- prepend: the same lines stand in prompt_tuning.py and p_tuning.py
def prepend(
    model: nn.Module,
    prompt: Tensor,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """A model's inputs with a prompt (p, d) before them, by name: each p longer."""
    x = model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
    b, p = len(x), len(prompt)
    named = {"inputs_embeds": torch.cat((prompt.to(x.dtype).expand(b, -1, -1), x), dim=1)}
    for name, tensor, front in (("attention_mask", attention_mask, 1), ("labels", labels, -100)):
        if tensor is not None:
            named[name] = torch.cat((tensor.new_full((b, p), front), tensor), dim=1)  # (b, p + t)
    if position_ids is not None:
        first = torch.arange(p, device=x.device).expand(len(position_ids), p)
        named["position_ids"] = torch.cat((first, position_ids + p), dim=1)
    return named


# --- end of prepend


# --- check_model: the same lines stand in every prompt method
def check_model(model: nn.Module, config) -> Tensor:
    """The embedding (v, d) of a model that can take virtual tokens; ValueError for another."""
    settings = getattr(model, "config", None)
    if getattr(settings, "is_encoder_decoder", False):
        raise ValueError("an encoder-decoder model: a prompt stands before a decoder's input here")
    if not hasattr(model, "get_input_embeddings"):
        raise ValueError(f"{type(model).__name__} has no get_input_embeddings()")
    names = ("n_positions", "max_position_embeddings")
    room = next((getattr(settings, name) for name in names if hasattr(settings, name)), math.inf)
    if config.num_virtual_tokens >= room:
        p = config.num_virtual_tokens
        raise ValueError(f"{p} virtual tokens leave no room in a context of {room}")
    words = model.get_input_embeddings().weight
    config.token_dim = words.shape[1]
    return words


# --- end of check_model


# --- toy: the same lines stand in prompt_tuning.py and p_tuning.py
class _Toy(nn.Module):
    """The smallest causal model: it sums what it has seen so far."""

    def __init__(self, v: int, d: int):
        super().__init__()
        self.words, self.head = nn.Embedding(v, d), nn.Linear(d, v)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, inputs_embeds: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.head(inputs_embeds.cumsum(1).tanh())
        if labels is None:
            return Output(None, logits)
        flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return Output(nn.functional.cross_entropy(*flat), logits)


# --- end of toy


def _check() -> None:
    torch.manual_seed(0)
    model, ids = _Toy(11, 8).requires_grad_(False), torch.randint(11, (4, 6))
    prompt = PromptEmbedding(PromptTuningConfig(num_virtual_tokens=3), model)
    out = prompt(model, ids, labels=ids)
    assert out.logits.shape == (4, 6, 11)
    trainable = [p for m in (model, prompt) for p in m.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 3 * 8
    by_hand = model(
        torch.cat((prompt.prompt().expand(4, 3, 8), model.words(ids)), 1), ids.new_zeros(4, 9)
    )
    assert torch.equal(out.logits, by_hand.logits[:, 3:])
    optimizer = torch.optim.Adam(trainable, lr=0.1)
    for _ in range(20):
        loss = prompt(model, ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < out.loss
    print("prompt_tuning.py: 24 trainable parameters, p d; the model is untouched")


if __name__ == "__main__":
    _check()
