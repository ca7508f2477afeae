"""Prompt tuning: freeze the model, and learn a few virtual tokens to put in front of the input.

A text prompt steers a language model. Its words enter the model as vectors: rows of the embedding
matrix. Prompt tuning puts p new vectors in front of the input's vectors and trains only these, by
gradient descent through the frozen model. They need not belong to any word (the paper calls them
soft tokens). No weight changes, so there is nothing to merge. The cost: every sequence is p
positions longer, in training and in inference.

Paper: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv
2104.08691. The paper uses T5, an encoder-decoder; this file is for decoder-only models.

    logits = model([P; E(x)])                               (1)  section 2 of the paper

P is trained, E embeds the tokens x, and [;] joins the two along the token dimension.
Shapes: b batch, t tokens, p virtual tokens, d width, v vocabulary; P (p, d), logits (b, t, v).
Trainable parameters: p d.

Difference from peft: only the logits of the t real tokens are returned (peft returns p + t).
As in peft, positions are 0 … p + t - 1, and virtual tokens have the label -100, which the loss
ignores. If the first real token has a label, the loss also counts its prediction from the last
virtual token.

>>> model.requires_grad_(False)
>>> prompt = PromptEmbedding(model, PromptTuningConfig(num_virtual_tokens=20))
>>> loss = prompt(model, input_ids, labels=labels).loss  # train prompt.parameters()
>>> prompt(model, input_ids).logits[:, -1].argmax(-1)  # the next token
"""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class PromptTuningConfig:
    """How many virtual tokens, and their initial values. Fields and defaults are peft's."""

    num_virtual_tokens: int | None = None  # p
    prompt_tuning_init: str = "RANDOM"  # initial values: "RANDOM" draws from N(0, 1), "TEXT" takes
    # the embeddings of a text, "SAMPLE_VOCAB" takes those of random tokens
    prompt_tuning_init_text: str | None = None  # for "TEXT"; truncated or repeated to p tokens
    tokenizer_name_or_path: str | None = None  # for "TEXT"; a folder with a tokenizer.json
    token_dim: int | None = None  # d; get_peft_model fills it in, because peft saves it
    task_type: str | None = None  # as in peft, for example "CAUSAL_LM"
    inference_mode: bool = False  # load the adapter frozen
    peft_type: str = field(default="PROMPT_TUNING", init=False)

    def __post_init__(self):
        p, init = self.num_virtual_tokens, self.prompt_tuning_init
        if type(p) is not int or p < 1:
            raise ValueError(f"num_virtual_tokens must be a positive integer, got {p!r}")
        if init not in ("RANDOM", "SAMPLE_VOCAB", "TEXT"):
            raise ValueError(f"prompt_tuning_init must be RANDOM, SAMPLE_VOCAB or TEXT, got {init}")
        if init == "TEXT" and not (self.prompt_tuning_init_text and self.tokenizer_name_or_path):
            raise ValueError("TEXT needs prompt_tuning_init_text and tokenizer_name_or_path")
        if init != "TEXT" and self.prompt_tuning_init_text:
            raise ValueError(
                f"prompt_tuning_init_text has no effect with prompt_tuning_init={init}"
            )


class PromptEmbedding(nn.Module):
    """The virtual tokens P. Call it with the frozen model to run the model on [P; E(x)]."""

    def __init__(self, model: nn.Module, config: PromptTuningConfig):
        super().__init__()
        embed = model.get_input_embeddings()  # E
        v, d = embed.weight.shape
        self.embedding = nn.Embedding(config.num_virtual_tokens, d)  # P, initialized from N(0, 1)
        if config.prompt_tuning_init != "RANDOM" and not config.inference_mode:
            ids = initial_tokens(config, v).to(embed.weight.device)  # (p,)
            start = embed(ids).detach().float().clone()  # float32: small steps need precision
            self.embedding.weight = nn.Parameter(start)
        self.to(embed.weight.device)

    def forward(self, model: nn.Module, input_ids: Tensor | None = None, **inputs):
        """Run a causal model on P and then on input_ids (b, t) or inputs_embeds (b, t, d).

        Other inputs are attention_mask, labels and position_ids, each (b, t). Returns the model's
        own output, with the logits of the real tokens.
        """
        inputs = self.prepend(model, input_ids, **inputs)
        out = model(**inputs)
        t = inputs["inputs_embeds"].shape[1] - self.embedding.num_embeddings
        out.logits = out.logits[:, -t:]  # (b, t, v)
        return out

    def prompt(self) -> Tensor:
        """P, (p, d)."""
        return self.embedding.weight

    def prepend(
        self, model: nn.Module, input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None, labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None, position_ids: Tensor | None = None, **others,
    ) -> dict:  # fmt: skip
        """The model's inputs with P in front: every input becomes p positions longer."""
        x = model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        prompt = self.prompt().to(x.dtype).expand(len(x), -1, -1)  # (b, p, d)
        p = prompt.shape[1]
        inputs = others | {"inputs_embeds": torch.cat((prompt, x), dim=1)}  # (1)
        if attention_mask is not None:
            inputs["attention_mask"] = F.pad(attention_mask, (p, 0), value=1)  # (b, p + t)
        if labels is not None:
            inputs["labels"] = F.pad(labels, (p, 0), value=-100)  # (b, p + t)
        if position_ids is not None:
            first = torch.arange(p, device=x.device).expand(*position_ids.shape[:-1], p)
            inputs["position_ids"] = torch.cat((first, position_ids + p), dim=-1)  # (b, p + t)
        return inputs


def initial_tokens(config: PromptTuningConfig, vocab_size: int) -> Tensor:
    """The tokens (p,) whose embeddings the virtual tokens start from."""
    p = config.num_virtual_tokens
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        return torch.randint(0, vocab_size, (p,))
    from tokenizers import Tokenizer

    file = f"{config.tokenizer_name_or_path}/tokenizer.json"
    try:
        ids = Tokenizer.from_file(file).encode(config.prompt_tuning_init_text).ids
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file} cannot be read: {error}") from error
    return torch.tensor(ids).repeat(math.ceil(p / len(ids)))[:p]


if __name__ == "__main__":  # steer a frozen random model towards token 3
    torch.manual_seed(0)
    words = nn.Embedding(11, 8).requires_grad_(False)
    head = nn.Linear(8, 11).requires_grad_(False)

    def model(inputs_embeds):  # causal: each position sums the embeddings up to its own
        return SimpleNamespace(logits=head(inputs_embeds.cumsum(1)))

    model.get_input_embeddings = lambda: words
    prompt = PromptEmbedding(model, PromptTuningConfig(num_virtual_tokens=3))
    optimizer = torch.optim.Adam(prompt.parameters(), lr=0.3)
    ids = torch.randint(11, (64, 6))
    before = (head(words(ids).cumsum(1)).argmax(-1) == 3).float().mean().item()
    for _ in range(100):
        logits = prompt(model, ids).logits  # (b, t, v)
        F.cross_entropy(logits.mT, torch.full_like(ids, 3)).backward()  # wants (b, v, t)
        optimizer.step()
        optimizer.zero_grad()
    after = (prompt(model, ids).logits.argmax(-1) == 3).float().mean().item()
    assert after > 0.95
    print(f"prompt_tuning.py: token 3 is predicted at {before:.0%}, then {after:.0%} of positions")
