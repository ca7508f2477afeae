r"""P-tuning: virtual tokens that a small network computes while they are trained.

As in prompt tuning, p vectors are put in front of the input of a frozen model. Here they are not
trained directly: a network with an embedding of its own computes them, so that they move together,
which should make the optimization easier. Once training is done the network always computes
the same vectors, so it can be thrown away and its output kept (`keep_output`).

Paper: Liu et al. 2021, "GPT Understands, Too", arXiv 2103.10385.

    P = MLP(H),  or  P = MLP(BiLSTM(H)),    H and the network are trained      (1)  section 3
    logits = model([P; E(x)])                                                  (2)

The first MLP has three linear layers of hidden width w with ReLU between them. The LSTM has two
layers of width w in each direction, and its MLP has two linear layers.

Shapes: b batch, t tokens, p virtual tokens, d width, v vocabulary; H, P (p, d), logits (b, t, v).
Trainable parameters, with w = encoder_hidden_size (d by default):
    MLP   p d + (d w + w) + (w² + w) + (w d + d)
    LSTM  p d + 8 w (d + w + 2) + 8 w (3 w + 2) + (4 w² + 2 w) + (2 w d + d)

Differences from the paper: it mixes virtual tokens with the words of a template; here, as in peft,
they all come first. Differences from peft: logits are those of the t real tokens, and the network
is saved next to the prompt, so that training can continue. P-tuning v2 (arXiv 2110.07602) is
another method: keys and values in every layer, no network; see prefix_tuning.py.

>>> model.requires_grad_(False)
>>> encoder = PromptEncoder(model, PromptEncoderConfig(num_virtual_tokens=20))
>>> loss = encoder(model, input_ids, labels=labels).loss  # train encoder.parameters()
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class PromptEncoderConfig:
    """How many virtual tokens, and the network. Fields and defaults are peft's."""

    num_virtual_tokens: int | None = None  # p
    encoder_reparameterization_type: str = "MLP"  # or "LSTM"
    encoder_hidden_size: int | None = None  # w; None: the model's width d
    encoder_num_layers: int = 2  # of the LSTM; the MLP always has three
    encoder_dropout: float = 0.0  # between the layers of the LSTM
    token_dim: int | None = None  # d, filled in when an adapter is saved
    task_type: str | None = None  # as in peft, for example "CAUSAL_LM"
    inference_mode: bool = False  # no network: load the prompt itself, frozen
    peft_type: str = field(default="P_TUNING", init=False)

    def __post_init__(self):
        for name in ("num_virtual_tokens", "encoder_num_layers", "encoder_hidden_size"):
            n = getattr(self, name)
            optional = name == "encoder_hidden_size" and n is None
            if not optional and (type(n) is not int or n < 1):
                raise ValueError(f"{name} must be a positive integer, got {n!r}")
        kind = self.encoder_reparameterization_type
        if kind not in ("MLP", "LSTM"):
            raise ValueError(f"encoder_reparameterization_type must be MLP or LSTM, got {kind!r}")
        if kind == "MLP" and (self.encoder_dropout or self.encoder_num_layers != 2):
            raise ValueError("encoder_dropout and encoder_num_layers are for the LSTM, not the MLP")
        if not 0 <= self.encoder_dropout < 1:
            raise ValueError(f"encoder_dropout must be in [0, 1), got {self.encoder_dropout!r}")


class PromptEncoder(nn.Module):
    """The network that computes P. Call it with the frozen model to run the model on [P; E(x)]."""

    def __init__(self, model: nn.Module, config: PromptEncoderConfig):
        super().__init__()
        embedding = model.get_input_embeddings().weight  # (v, d)
        d = embedding.shape[1]
        w = config.encoder_hidden_size or d
        self.embedding = nn.Embedding(config.num_virtual_tokens, d)  # H, or P without a network
        self.lstm_head = self.mlp_head = None
        if config.inference_mode:
            pass
        elif config.encoder_reparameterization_type == "LSTM":
            shape = {"num_layers": config.encoder_num_layers, "dropout": config.encoder_dropout}
            self.lstm_head = nn.LSTM(d, w, bidirectional=True, batch_first=True, **shape)
            self.mlp_head = nn.Sequential(nn.Linear(2 * w, 2 * w), nn.ReLU(), nn.Linear(2 * w, d))
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)
            )
        self.to(embedding.device)

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
        h = self.embedding.weight[None]  # (1, p, d)
        if self.lstm_head is not None:
            with torch.autocast("cpu", enabled=False):  # not every CPU has a bfloat16 LSTM
                h = self.lstm_head(h)[0]  # (1, p, 2 w)
        return (h if self.mlp_head is None else self.mlp_head(h))[0]  # (1)

    def prepend(
        self, model: nn.Module, input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None, labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None, position_ids: Tensor | None = None, **others,
    ) -> dict:  # fmt: skip
        """The model's inputs with P in front: every input becomes p positions longer."""
        x = model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        prompt = self.prompt().to(x.dtype).expand(len(x), -1, -1)  # (b, p, d)
        p = prompt.shape[1]
        inputs = others | {"inputs_embeds": torch.cat((prompt, x), dim=1)}  # (2)
        if attention_mask is not None:
            inputs["attention_mask"] = F.pad(attention_mask, (p, 0), value=1)  # (b, p + t)
        if labels is not None:
            inputs["labels"] = F.pad(labels, (p, 0), value=-100)  # (b, p + t)
        if position_ids is not None:
            first = torch.arange(p, device=x.device).expand(*position_ids.shape[:-1], p)
            inputs["position_ids"] = torch.cat((first, position_ids + p), dim=-1)  # (b, p + t)
        return inputs

    @torch.no_grad()
    def keep_output(self) -> None:
        """Throw the network away and keep the prompt it computes, frozen.

        Logits computed without gradients stay identical. (With gradients, PyTorch runs another
        LSTM kernel, which rounds differently.)
        """
        self.eval()
        self.embedding.weight = nn.Parameter(self.prompt().clone(), requires_grad=False)
        self.lstm_head = self.mlp_head = None


if __name__ == "__main__":  # steer a frozen random model towards token 3, then drop the network
    torch.manual_seed(0)
    words = nn.Embedding(11, 8).requires_grad_(False)
    head = nn.Linear(8, 11).requires_grad_(False)

    def model(inputs_embeds):  # causal: each position sums the embeddings up to its own
        return SimpleNamespace(logits=head(inputs_embeds.cumsum(1)))

    model.get_input_embeddings = lambda: words
    encoder = PromptEncoder(model, PromptEncoderConfig(num_virtual_tokens=3))
    optimizer, ids = torch.optim.Adam(encoder.parameters(), lr=0.02), torch.randint(11, (64, 6))
    for _ in range(200):
        logits = encoder(model, ids).logits  # (b, t, v)
        F.cross_entropy(logits.mT, torch.full_like(ids, 3)).backward()
        optimizer.step()
        optimizer.zero_grad()
    n, trained = sum(p.numel() for p in encoder.parameters()), encoder(model, ids).logits
    encoder.keep_output()
    assert torch.equal(encoder(model, ids).logits, trained)
    share = (trained.argmax(-1) == 3).float().mean().item()
    assert share > 0.95
    print(f"p_tuning.py: token 3 wins {share:.0%} of places; of {n} numbers, 24 are kept")
