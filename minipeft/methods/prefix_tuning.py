r"""Prefix tuning: learned keys and values that every attention layer can attend to.

Virtual tokens at the input reach the deeper layers only through the model itself. Prefix tuning
gives every layer p keys and values of its own: no queries, no MLP, nothing in embedding space. They
are trained and the model is frozen. The prefix can be trained directly, or computed by a small
network (`prefix_projection`), which the paper found more stable and which can be thrown away after
training. There is nothing to merge.

Paper: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv
2101.00190. Without the projection this is the deep prompt of P-tuning v2 (arXiv 2110.07602).

    layer i:  softmax(q [K_i; k]ᵀ / √k_width) [V_i; v]                          (1)
    [K_0, V_0, K_1, V_1, …] = P,   or  = W_2 tanh(W_1 H + b_1) + b_2            (2)

Shapes: b batch, t tokens, p virtual tokens, l layers, h key heads, k head width, d = h k, w hidden;
P (p, 2 l d), H (p, d), K_i and V_i (b, h, p, k), logits (b, t, v).
Trainable parameters: 2 p l d; with the projection p d + (d w + w) + (w 2 l d + 2 l d).

Difference from the paper: no initialisation from words. Difference from peft: gradient
checkpointing works if the model keeps its cache then. As in peft, the positions of the input
continue after the prefix, p … p + t - 1. A prefix of zeros is not the same as no prefix: zero keys
still take a share of the attention.

>>> model.requires_grad_(False)
>>> prefix = PrefixEncoder(model, PrefixTuningConfig(num_virtual_tokens=20))
>>> loss = prefix(model, input_ids, labels=labels).loss  # train prefix.parameters()
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class PrefixTuningConfig:
    """How many virtual tokens, and what writes them. Fields and defaults are peft's."""

    num_virtual_tokens: int | None = None  # p
    prefix_projection: bool = False  # let a network compute the prefix
    encoder_hidden_size: int | None = None  # w, the network's hidden width; None: d
    init_weights: str | None = None  # "zero": start with zeros
    token_dim: int | None = None  # d = h k; this and the next two are filled in when saving
    num_layers: int | None = None  # l
    num_attention_heads: int | None = None  # h, key heads
    task_type: str | None = None  # as in peft, for example "CAUSAL_LM"
    inference_mode: bool = False  # no network: load the prefix itself, frozen
    peft_type: str = field(default="PREFIX_TUNING", init=False)

    def __post_init__(self):
        for name in ("num_virtual_tokens", "encoder_hidden_size"):
            n = getattr(self, name)
            optional = name == "encoder_hidden_size" and n is None
            if not optional and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
                raise ValueError(f"{name} must be a positive integer, got {n!r}")
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights must be None or 'zero', got {self.init_weights!r}")


class Output(NamedTuple):
    """The loss, if there are labels, and the logits (b, t, v)."""

    loss: Tensor | None
    logits: Tensor


class PrefixEncoder(nn.Module):
    """The prefix, equation (2). Call it with the frozen model to run the model with the prefix."""

    def __init__(self, model: nn.Module, config: PrefixTuningConfig):
        super().__init__()
        self.cache_class, self.shape = probe(model)  # shape: (l, h, k)
        layers, heads, width = self.shape
        p, d = config.num_virtual_tokens, heads * width
        w = config.encoder_hidden_size or d
        if config.prefix_projection and not config.inference_mode:
            self.embedding = nn.Embedding(p, d)  # H
            self.transform = nn.Sequential(nn.Linear(d, w), nn.Tanh(), nn.Linear(w, 2 * layers * d))
        else:
            self.embedding = nn.Embedding(p, 2 * layers * d)  # P
            self.transform = nn.Identity()
        if config.init_weights == "zero":
            last = self.embedding if isinstance(self.transform, nn.Identity) else self.transform[-1]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        self.to(model.get_input_embeddings().weight.device)

    def forward(
        self,
        model: nn.Module,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others,
    ) -> Output:
        """Run a causal model with the prefix on input_ids (b, t) or inputs_embeds (b, t, d).

        attention_mask, position_ids and labels are (b, t), without the prefix.
        """
        x = input_ids if inputs_embeds is None else inputs_embeds
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, **others}
        if position_ids is not None:
            inputs["position_ids"] = position_ids + self.embedding.num_embeddings
        inputs |= self.past(model, len(x), attention_mask)
        out = model(**{name: value for name, value in inputs.items() if value is not None})
        return Output(out.loss, out.logits)

    def prompt(self, b: int = 1) -> Tensor:
        """P for a batch, (b, p, 2 l d)."""
        return self.transform(self.embedding.weight.expand(b, -1, -1))  # (2)

    def past(self, model: nn.Module, b: int, attention_mask: Tensor | None) -> dict:
        """The cache of a model that has already read the prefix, and the mask, p longer.

        The model concatenates the cache's keys and values with its own: equation (1).
        """
        layers, heads, width = self.shape
        kv = self.prompt(b).to(next(model.parameters()).dtype)  # (b, p, 2 l d)
        kv = kv.view(b, -1, 2 * layers, heads, width).permute(2, 0, 3, 1, 4)  # (2 l, b, h, p, k)
        pairs = tuple(zip(kv[0::2], kv[1::2], strict=True))  # keys and values of each layer
        if self.cache_class is tuple:
            cache = pairs
        else:
            cache = self.cache_class()
            for i, (keys, values) in enumerate(pairs):
                cache.update(keys, values, i)
        if attention_mask is None:
            return {"past_key_values": cache}
        mask = F.pad(attention_mask, (kv.shape[3], 0), value=1)  # (b, p + t)
        return {"past_key_values": cache, "attention_mask": mask}

    @torch.no_grad()
    def generate(self, model: nn.Module, input_ids: Tensor, attention_mask=None, **options):
        """Continue prompts (b, t), padded on the left, with the model's own `generate`."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return model.generate(input_ids, **self.past(model, len(mask), mask), **options)

    @torch.no_grad()
    def keep_output(self) -> None:
        """Throw the network away and keep the prefix it computes, frozen."""
        self.embedding = nn.Embedding.from_pretrained(self.prompt()[0].clone())
        self.transform = nn.Identity()


@torch.no_grad()
def probe(model: nn.Module) -> tuple[type, tuple[int, int, int]]:
    """The class of the model's cache and (layers, key heads, head width), from one token."""
    was_training, device = model.training, model.get_input_embeddings().weight.device
    model.eval()
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        cache = model(input_ids=ids, use_cache=True).past_key_values
    finally:
        model.train(was_training)
    if cache is None:
        raise ValueError(f"{type(model).__name__} returns no past_key_values: it has no cache")
    if isinstance(cache, tuple):
        return tuple, (len(cache), *cache[0][0].shape[1::2])
    return type(cache), (len(cache.layers), *cache.layers[0].keys.shape[1::2])


if __name__ == "__main__":  # steer one frozen attention layer towards token 3
    torch.manual_seed(0)

    class Layer(nn.Embedding):  # one head, whose queries, keys and values are the embeddings
        def get_input_embeddings(self):
            return self

        def forward(self, input_ids, past_key_values=None, use_cache=True):
            k = v = x = super().forward(input_ids)[:, None]  # (b, 1, t, d)
            if past_key_values is not None:
                k, v = (torch.cat((old, x), dim=2) for old in past_key_values[0])
            y = F.scaled_dot_product_attention(x, k, v)[:, 0] @ self.weight.T  # (b, t, v)
            return SimpleNamespace(loss=None, logits=y, past_key_values=((k, v),))

    model, ids = Layer(11, 8).requires_grad_(False), torch.randint(11, (64, 6))
    prefix = PrefixEncoder(model, PrefixTuningConfig(num_virtual_tokens=2))
    optimizer = torch.optim.Adam(prefix.parameters(), lr=0.1)
    for _ in range(200):
        F.cross_entropy(prefix(model, ids).logits.mT, torch.full_like(ids, 3)).backward()
        optimizer.step()
        optimizer.zero_grad()
    plain, behind = model(ids).logits, prefix(model, ids).logits
    before, after = ((x.argmax(-1) == 3).float().mean().item() for x in (plain, behind))
    assert after > 0.9
    print(f"prefix_tuning.py: token 3 wins {before:.0%} of places before, {after:.0%} after")
