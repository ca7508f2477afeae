"""Prefix tuning: learned keys and values that every attention layer can attend to.

The virtual tokens of prompt tuning reach the deeper layers only through the model itself. Prefix
tuning gives every layer p keys and values of its own. They are trained, and the model is frozen.
They are passed as a cache, and gradients flow through it. The prefix has no queries and skips the
model's MLPs. It can be trained directly, or a small network can compute it (`prefix_projection`).
The paper found the network more stable. After training, its output can replace it (`keep_output`).
There is nothing to merge.

Paper: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv
2101.00190. Without the network this is the deep prompt of P-tuning v2 (arXiv 2110.07602).

    attention in layer i:  softmax(Q [K_i; K]ᵀ / √k) [V_i; V]                   (1)
    P = [K_0, V_0, K_1, V_1, …],  or with the network  P = tanh(H W_1ᵀ + b_1) W_2ᵀ + b_2   (2)

Q, K and V are the layer's own, of the real tokens; K_i and V_i are the prefix of layer i. The
causal mask is not shown: every token sees the whole prefix.
Shapes: b batch, t tokens, p virtual tokens, v vocabulary, l layers, h key/value heads, k head
width, d = h k (with grouped queries less than the model's width), w the network's width;
P (p, 2 l d), H (p, d), K_i and V_i (b, h, p, k), logits (b, t, v).
Trainable parameters: 2 p l d. With the network: H p d, W_1 d w + w, W_2 2 l d w + 2 l d.

Difference from the paper: the prefix is not initialized from real words. As in peft, the real
tokens have positions p … p + t - 1. A prefix of zeros differs from no prefix: a zero key has the
score 0, and exp(0) = 1 takes a share of the attention.

>>> model.requires_grad_(False)
>>> prefix = PrefixEncoder(model, PrefixTuningConfig(num_virtual_tokens=20))
>>> loss = prefix(model, input_ids, labels=labels).loss  # train prefix.parameters()
"""

import inspect
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class PrefixTuningConfig:
    """How many virtual tokens, and how they are computed. Fields and defaults are peft's."""

    num_virtual_tokens: int | None = None  # p
    prefix_projection: bool = False  # let a network compute the prefix
    encoder_hidden_size: int | None = None  # w, the network's width; None means d
    init_weights: str | None = None  # "zero": start with zeros
    # Sizes that get_peft_model fills in, because peft saves them:
    token_dim: int | None = None  # d = h k
    num_layers: int | None = None  # l
    num_attention_heads: int | None = None  # h, key/value heads, not the query heads
    task_type: str | None = None  # as in peft, for example "CAUSAL_LM"
    inference_mode: bool = False  # for a prefix that is loaded frozen: no network is built
    peft_type: str = field(default="PREFIX_TUNING", init=False)

    def __post_init__(self):
        p, w = self.num_virtual_tokens, self.encoder_hidden_size
        if type(p) is not int or p < 1:
            raise ValueError(f"num_virtual_tokens must be a positive integer, got {p!r}")
        if w is not None and (type(w) is not int or w < 1):
            raise ValueError(f"encoder_hidden_size must be a positive integer, got {w!r}")
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights must be None or 'zero', got {self.init_weights!r}")


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
            # with a network, only its last layer is zero: the others still get gradients later
            last = self.embedding if isinstance(self.transform, nn.Identity) else self.transform[-1]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        self.to(model.get_input_embeddings().weight.device)

    def forward(
        self, model: nn.Module, input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None, **inputs,
    ):  # fmt: skip
        """Run a causal model with the prefix on input_ids (b, t) or inputs_embeds (b, t, width).

        attention_mask, position_ids and labels are (b, t), without the prefix.
        """
        return model(**self.prepend(model, input_ids, attention_mask, **inputs))

    def prompt(self, b: int = 1) -> Tensor:
        """P for a batch, (b, p, 2 l d)."""
        return self.transform(self.embedding.weight.expand(b, -1, -1))  # (2)

    def prepend(
        self, model: nn.Module, input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None, **inputs,
    ) -> dict:  # fmt: skip
        """The model's inputs, with the prefix as its cache. Labels stay as they are: no token is
        added to the input, so nothing is predicted from the prefix alone."""
        b = len(inputs["inputs_embeds"] if input_ids is None else input_ids)
        p = self.embedding.num_embeddings
        inputs |= {"input_ids": input_ids, cache_name(model): self.past(model, b)}
        if attention_mask is not None:
            inputs["attention_mask"] = F.pad(attention_mask, (p, 0), value=1)  # (b, p + t)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + p
        return inputs

    def past(self, model: nn.Module, b: int):
        """The prefix as a cache for a batch. The model puts its keys and values in front of its
        own: equation (1)."""
        layers, heads, width = self.shape
        kv = self.prompt(b).to(next(model.parameters()).dtype)  # (b, p, 2 l d)
        kv = kv.view(b, -1, 2 * layers, heads, width)  # (b, p, 2 l, h, k)
        kv = kv.permute(2, 0, 3, 1, 4)  # (2 l, b, h, p, k)
        pairs = tuple(zip(kv[0::2], kv[1::2], strict=True))  # keys and values of each layer
        if self.cache_class is tuple:  # our GPT; transformers has cache classes
            return pairs
        cache = self.cache_class()
        for i, (keys, values) in enumerate(pairs):
            cache.update(keys, values, i)
        return cache

    @torch.no_grad()
    def keep_output(self) -> None:
        """Throw the network away and keep the prefix it computes, frozen."""
        self.embedding = nn.Embedding.from_pretrained(self.prompt()[0].clone())
        self.transform = nn.Identity()


def cache_name(model: nn.Module) -> str:
    """The name of the model's argument and output for its cache. transformers plans to rename
    `past_key_values` to `cache`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def probe(model: nn.Module) -> tuple[type, tuple[int, int, int]]:
    """The class of the model's cache and (layers, key heads, head width), from one token.

    Raises ValueError if the layers do not all cache keys and values of the same shape.
    """
    modes = {module: module.training for module in model.modules()}
    device = model.get_input_embeddings().weight.device
    model.eval()  # in training mode, checkpointing could drop the cache
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        cache = getattr(model(input_ids=ids, use_cache=True), cache_name(model), None)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(cache, tuple) and not hasattr(cache, "layers"):
        raise ValueError(f"{type(model).__name__} has no cache of keys and values for a prefix")
    pairs = cache
    if not isinstance(cache, tuple):
        pairs = [(getattr(c, "keys", None), getattr(c, "values", None)) for c in cache.layers]
    shapes = set()  # (heads, head width), of the keys and of the values of every layer
    for pair in pairs:
        for tensor in pair[:2]:
            shapes.add(None if tensor is None else (tensor.shape[1], tensor.shape[3]))
    if len(shapes) != 1 or None in shapes:
        raise ValueError(
            f"a prefix needs keys and values of one shape in all layers; in "
            f"{type(model).__name__}, (heads, width) are {sorted(shapes, key=str)}"
        )
    heads, width = shapes.pop()
    return type(cache), (len(pairs), heads, width)


if __name__ == "__main__":  # steer one frozen attention layer towards token 3
    torch.manual_seed(0)

    class Layer(nn.Embedding):  # one head without a causal mask; q, k and v are the embeddings
        def get_input_embeddings(self):
            return self

        def forward(self, input_ids, past_key_values=None, use_cache=True):
            k = v = x = super().forward(input_ids)[:, None]  # (b, 1, t, d)
            if past_key_values is not None:
                k, v = (torch.cat((old, x), dim=2) for old in past_key_values[0])
            y = F.scaled_dot_product_attention(x, k, v)[:, 0] @ self.weight.T  # (b, t, v)
            return SimpleNamespace(logits=y, past_key_values=((k, v),))

    model, ids = Layer(11, 8).requires_grad_(False), torch.randint(11, (64, 6))
    prefix = PrefixEncoder(model, PrefixTuningConfig(num_virtual_tokens=2))
    optimizer = torch.optim.Adam(prefix.parameters(), lr=0.1)
    for _ in range(200):
        F.cross_entropy(prefix(model, ids).logits.mT, torch.full_like(ids, 3)).backward()
        optimizer.step()
        optimizer.zero_grad()
    share = (prefix(model, ids).logits.argmax(-1) == 3).float().mean().item()
    assert share > 0.9
    print(f"prefix_tuning.py: with the prefix, token 3 is predicted at {share:.0%} of positions")
