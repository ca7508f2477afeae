r"""P-tuning: soft tokens before the input, written by a small network while they are trained.

As in prompt tuning, p vectors stand before the input of a frozen model. But they are not trained
themselves: a network with an embedding of its own writes them, so that they move together, which
is meant to make the optimization easier. After training, the network has done its work: what it
writes is always the same, so it can be thrown away and its output kept (`keep_output`), and the
model answers with the very same logits.

Paper: Liu et al. 2021, "GPT Understands, Too", arXiv 2103.10385.

    P = MLP(H),  or  P = MLP(BiLSTM(H)),    H (p, d) and the network are trained      (1)  section 3
    logits = model([P; E(x)])                                                        (2)

The MLP of the first kind has three linear layers of hidden width w with ReLU between; the second
kind's LSTM has two layers of hidden width w in each direction, and an MLP of two linear layers.

Shapes: b batch, t tokens, p virtual tokens, d width, v vocabulary; P (p, d), logits (b, t, v).
Trainable parameters, with w = encoder_hidden_size (d by default):
    MLP   p d + (d w + w) + (w² + w) + (w d + d)
    LSTM  p d + 8 w (d + w + 2) + 8 w (3 w + 2) + (4 w² + 2 w) + (2 w d + d)

Where we differ. From the paper: it mixes soft tokens with words of a template; here, as in peft,
they all stand first. From peft: logits are those of the t real tokens, and the network is kept in
the file beside the prompt, so that training can go on (peft drops it). P-tuning v2 (arXiv
2110.07602) is something else: soft keys and values in every layer, no network; that is prefix
tuning without a projection, see prefix_tuning.py.

>>> model.requires_grad_(False)
>>> encoder = PromptEncoder(PromptEncoderConfig(num_virtual_tokens=20), model)
>>> loss = encoder(model, input_ids, labels=labels).loss  # train encoder.parameters()
>>> encoder.keep_output()
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass
class PromptEncoderConfig:
    """How many virtual tokens, and what writes them. Fields, defaults and meaning are peft's."""

    num_virtual_tokens: int | None = None  # p
    encoder_reparameterization_type: str = "MLP"  # or "LSTM"
    encoder_hidden_size: int | None = None  # w; None is the model's width d
    encoder_num_layers: int = 2  # of the LSTM; the MLP has three, whatever this says
    encoder_dropout: float = 0.0  # between the layers of the LSTM
    token_dim: int | None = None  # d, filled in from the model
    task_type: str | None = None
    inference_mode: bool = False  # True: no network, the prompt alone, frozen
    peft_type: str = field(default="P_TUNING", init=False)

    def __post_init__(self):
        numbers = {"num_virtual_tokens": self.num_virtual_tokens}
        numbers["encoder_num_layers"] = self.encoder_num_layers
        if self.encoder_hidden_size is not None:
            numbers["encoder_hidden_size"] = self.encoder_hidden_size
        for name, n in numbers.items():
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise ValueError(f"{name} is {n!r}: give a whole number from 1 up")
        if self.encoder_reparameterization_type not in ("MLP", "LSTM"):
            kind = self.encoder_reparameterization_type
            raise ValueError(f"encoder_reparameterization_type is {kind!r}: give MLP or LSTM")
        if not 0 <= self.encoder_dropout < 1:
            raise ValueError(f"encoder_dropout is {self.encoder_dropout!r}: give one in [0, 1)")


class Output(NamedTuple):
    """What a run returns; logits (b, t, v) are those of the real tokens."""

    loss: Tensor | None
    logits: Tensor


class PromptEncoder(nn.Module):
    """The network of equation (1); a model runs behind it. The model is not changed."""

    def __init__(self, config: PromptEncoderConfig, model: nn.Module):
        super().__init__()
        words = check_model(model, config)  # (v, d)
        d = config.token_dim
        w = config.encoder_hidden_size = config.encoder_hidden_size or d
        self.embedding = nn.Embedding(config.num_virtual_tokens, d)  # H, or P without a network
        self.lstm_head = self.mlp_head = None
        if not config.inference_mode and config.encoder_reparameterization_type == "LSTM":
            layers, dropout = config.encoder_num_layers, config.encoder_dropout
            both = {"bidirectional": True, "batch_first": True}
            self.lstm_head = nn.LSTM(d, w, layers, dropout=dropout, **both)
            self.mlp_head = nn.Sequential(nn.Linear(2 * w, 2 * w), nn.ReLU(), nn.Linear(2 * w, d))
        elif not config.inference_mode:
            self.mlp_head = nn.Sequential(
                nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)
            )
        self.to(words.device).requires_grad_(not config.inference_mode)

    def prompt(self) -> Tensor:
        """P, (p, d)."""
        h = self.embedding.weight[None]  # (1, p, d)
        if self.lstm_head is not None:
            with torch.autocast("cpu", enabled=False):  # not every CPU has a bfloat16 LSTM
                h = self.lstm_head(h)[0]  # (1, p, 2 w)
        return (h if self.mlp_head is None else self.mlp_head(h))[0]

    @torch.no_grad()
    def keep_output(self) -> None:
        """Throw the network away and keep what it writes, frozen.

        Logits without gradients are the same to the bit. (With gradients, PyTorch's LSTM takes
        another kernel, which rounds differently.)
        """
        self.eval()
        self.embedding.weight = nn.Parameter(self.prompt().clone(), requires_grad=False)
        self.lstm_head = self.mlp_head = None

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
    for kind, numbers in (
        ("MLP", 3 * 8 + (8 * 5 + 5) + (25 + 5) + (40 + 8)),
        ("LSTM", 3 * 8 + 40 * (8 + 5 + 2) + 40 * (15 + 2) + (100 + 10) + (80 + 8)),
    ):
        settings = {"encoder_reparameterization_type": kind, "encoder_hidden_size": 5}
        encoder = PromptEncoder(PromptEncoderConfig(num_virtual_tokens=3, **settings), model)
        trainable = [p for m in (model, encoder) for p in m.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trainable) == numbers
        first = encoder(model, ids, labels=ids)
        assert first.logits.shape == (4, 6, 11)
        optimizer = torch.optim.Adam(trainable, lr=0.02)
        for _ in range(20):
            loss = encoder(model, ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < first.loss
        with torch.no_grad():
            trained = encoder(model, ids).logits
        encoder.keep_output()
        assert torch.equal(encoder(model, ids).logits, trained)
        assert sum(p.numel() for p in encoder.parameters()) == 3 * 8
    print("p_tuning.py: counts as the formulas say; without the network the same logits")


if __name__ == "__main__":
    _check()
