r"""Prefix tuning: soft keys and values that every attention layer can look at, before the input's.

Soft tokens at the input reach the deeper layers only through what the model makes of them. Prefix
tuning gives every layer p keys and values of its own: no queries, no MLP, nothing in embedding
space, just a few things more to attend to. They are trained, the model is frozen. The prefix can be
trained directly, or written by a small network (`prefix_projection`), which the paper found more
stable and which can be thrown away afterwards. There is nothing to merge.

Paper: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv
2101.00190. Without the projection this is P-tuning v2's deep prompt (arXiv 2110.07602).

    layer i:  softmax(q [K_i; k]^T / sqrt(k_width)) [V_i; v]                          (1)
    [K_0, V_0, K_1, V_1, …] = P,   or  = tanh(H W_1^T + b_1) W_2^T + b_2              (2)

Shapes: b batch, t tokens, p virtual tokens, l layers, h key heads, k head width, d = h k, w hidden;
P (p, 2 l d), H (p, d), K_i and V_i (b, h, p, k), logits (b, t, v).
Trainable parameters: 2 p l d; with the projection p d + (d w + w) + (w 2 l d + 2 l d).

Where we differ. From the paper: its initialisation from words is left out. From peft: it works
under gradient checkpointing, where the model can take it. As in peft, positions of the input run on
from the prefix, p … p + t - 1. A prefix of zeros is not "no prefix": keys of zero take their share
of the attention and add nothing.

>>> model.requires_grad_(False)
>>> prefix = PrefixEncoder(PrefixTuningConfig(num_virtual_tokens=20), model)
>>> loss = prefix(model, input_ids, labels=labels).loss  # train prefix.parameters()
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass
class PrefixTuningConfig:
    """How many virtual tokens, and what writes them. Fields, defaults and meaning are peft's."""

    num_virtual_tokens: int | None = None  # p
    prefix_projection: bool = False  # write the prefix by a network
    encoder_hidden_size: int | None = None  # w, its hidden width; None is d
    init_weights: str | None = None  # "zero" starts with zeros, which is not "no prefix"
    token_dim: int | None = None  # d = h k, and these two, are filled in from the model
    num_layers: int | None = None  # l
    num_attention_heads: int | None = None  # h, those of keys and values
    task_type: str | None = None
    inference_mode: bool = False  # True: no network, the prefix alone, frozen
    peft_type: str = field(default="PREFIX_TUNING", init=False)

    def __post_init__(self):
        numbers = {"num_virtual_tokens": self.num_virtual_tokens}
        if self.encoder_hidden_size is not None:
            numbers["encoder_hidden_size"] = self.encoder_hidden_size
        for name, n in numbers.items():
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise ValueError(f"{name} is {n!r}: give a whole number from 1 up")
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights is {self.init_weights!r}: give None or 'zero'")


class Output(NamedTuple):
    """What a run returns; logits (b, t, v) are those of the real tokens."""

    loss: Tensor | None
    logits: Tensor


class PrefixEncoder(nn.Module):
    """The prefix, equation (2), and how to run a model behind it. The model is not changed."""

    def __init__(self, config: PrefixTuningConfig, model: nn.Module):
        super().__init__()
        words = check_model(model, config)
        self.cache_class, self.shape = probe(model, words.device)  # (l, h, k)
        layers, heads, width = self.shape
        d = config.token_dim = heads * width
        w = config.encoder_hidden_size = config.encoder_hidden_size or d
        config.num_layers, config.num_attention_heads = layers, heads
        p, self.transform = config.num_virtual_tokens, None
        if config.prefix_projection and not config.inference_mode:
            self.embedding = nn.Embedding(p, d)
            self.transform = nn.Sequential(nn.Linear(d, w), nn.Tanh(), nn.Linear(w, 2 * layers * d))
        else:
            self.embedding = nn.Embedding(p, 2 * layers * d)
        if config.init_weights == "zero":
            last = self.embedding if self.transform is None else self.transform[-1]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        self.to(words.device).requires_grad_(not config.inference_mode)

    def prompt(self, b: int = 1) -> Tensor:
        """P for a batch, (b, p, 2 l d)."""
        h = self.embedding.weight.expand(b, -1, -1)
        return h if self.transform is None else self.transform(h)

    def past(self, b: int, dtype: torch.dtype):
        """The cache of a model that has read the prefix: keys and values (b, h, p, k) a layer."""
        layers, heads, width = self.shape
        kv = self.prompt(b).to(dtype).view(b, -1, 2 * layers, heads, width)  # (b, p, 2 l, h, k)
        kv = kv.permute(2, 0, 3, 1, 4)  # (2 l, b, h, p, k)
        pairs = tuple(zip(kv[0::2], kv[1::2], strict=True))
        if self.cache_class is tuple:
            return pairs
        cache = self.cache_class()
        for i, (keys, values) in enumerate(pairs):
            cache.update(keys, values, i)
        return cache

    def inputs(self, model: nn.Module, b: int, mask: Tensor | None) -> dict:
        """What a model is given besides its input: the cache, and a mask p longer."""
        named = {"past_key_values": self.past(b, next(model.parameters()).dtype)}
        if mask is not None:
            named["attention_mask"] = torch.cat(
                (mask.new_ones(b, self.embedding.num_embeddings), mask), dim=1
            )
        return named

    def forward(
        self,
        model: nn.Module,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Output:
        """Run a causal model on input_ids (b, t) or inputs_embeds (b, t, d) behind the prefix.

        Raises RuntimeError for a model that drops its cache, as transformers' do while gradient
        checkpointing is on.
        """
        names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # new and old
        if model.training and next((getattr(model, n) for n in names if hasattr(model, n)), False):
            raise RuntimeError(
                "this model drops its cache, and the prefix with it, while gradient checkpointing "
                "is on: call gradient_checkpointing_disable()"
            )
        x = input_ids if inputs_embeds is None else inputs_embeds
        named = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "labels": labels}
        if position_ids is not None:
            named["position_ids"] = position_ids + self.embedding.num_embeddings
        named |= self.inputs(model, len(x), attention_mask)
        out = model(**{name: value for name, value in named.items() if value is not None})
        return Output(out.loss, out.logits)

    @torch.no_grad()
    def generate(self, model: nn.Module, input_ids: Tensor, attention_mask=None, **options):
        """The model's `generate` behind P: input_ids (b, t), padded on the left, to (b, t + n)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return model.generate(input_ids, **self.inputs(model, len(mask), mask), **options)

    @torch.no_grad()
    def keep_output(self) -> None:
        """Throw the network away and keep what it writes, frozen. Logits stay, but for rounding."""
        self.embedding = nn.Embedding.from_pretrained(self.prompt()[0].clone())
        self.transform = None


@torch.no_grad()
def probe(model: nn.Module, device: torch.device) -> tuple[type, tuple[int, int, int]]:
    """The class of the cache that one token leaves, and (layers, key heads, head width)."""
    was_training = model.training
    model.eval()
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        cache = model(input_ids=ids, use_cache=True).past_key_values
    finally:
        model.train(was_training)
    if cache is None:
        raise ValueError(f"{type(model).__name__} returns no past_key_values: it takes no prefix")
    if isinstance(cache, tuple):
        return tuple, (len(cache), *cache[0][0].shape[1::2])
    return type(cache), (len(cache.layers), *cache.layers[0].keys.shape[1::2])


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


class _Toy(nn.Module):
    """The smallest causal model with a cache: one layer of attention, two heads of width 4."""

    def __init__(self, v: int):
        super().__init__()
        self.words, self.qkv, self.head = nn.Embedding(v, 8), nn.Linear(8, 24), nn.Linear(8, v)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, input_ids, past_key_values=None, labels=None, use_cache=False):
        b, t = input_ids.shape
        q, k, v = self.qkv(self.words(input_ids)).view(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        if past_key_values is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past_key_values[0], (k, v), strict=True))
        mask = torch.ones(t, k.shape[2], dtype=torch.bool).tril(k.shape[2] - t)
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask)  # (b, h, t, k)
        logits, loss = self.head(y.transpose(1, 2).reshape(b, t, 8)), None
        if labels is not None:
            flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            loss = nn.functional.cross_entropy(*flat)
        return _ToyOutput(loss, logits, ((k, v),))


class _ToyOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor
    past_key_values: tuple


def _check() -> None:
    torch.manual_seed(0)
    model, ids = _Toy(11).requires_grad_(False), torch.randint(11, (4, 6))
    plain = model(ids).logits
    for projection, numbers in ((False, 3 * 2 * 8), (True, 3 * 8 + (40 + 5) + (80 + 16))):
        settings = {"prefix_projection": projection, "encoder_hidden_size": 5}
        prefix = PrefixEncoder(PrefixTuningConfig(num_virtual_tokens=3, **settings), model)
        trainable = [p for m in (model, prefix) for p in m.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trainable) == numbers
        first = prefix(model, ids, labels=ids)
        assert first.logits.shape == plain.shape
        assert not torch.allclose(first.logits, plain)
        optimizer = torch.optim.Adam(trainable, lr=0.05)
        for _ in range(20):
            loss = prefix(model, ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < first.loss
        trained = prefix(model, ids).logits
        prefix.keep_output()
        assert torch.allclose(prefix(model, ids).logits, trained, atol=1e-6)
    zero = PrefixEncoder(PrefixTuningConfig(num_virtual_tokens=3, init_weights="zero"), model)
    assert not torch.allclose(zero(model, ids).logits, plain), "zeros take part of the attention"
    assert torch.equal(model(ids).logits, plain)
    print("prefix_tuning.py: counts as the formulas say; a prefix of zeros is not no prefix")


if __name__ == "__main__":
    _check()
