r"""Trainable token rows: beside an adapter, some tokens' own embeddings are trained as well.

A token that pretraining never saw has a row of noise in the embedding, and no adapter in the layers
can give it another. Here the rows of a few tokens are replaced by trained ones, E, and others stay:

    W' = W, but W'_i = E_i for the chosen tokens i;    embedding: W'_x,    tied head: h W'^T

Shapes: W, W' (v, d), E (chosen tokens, d), x (b, t), h (b, t, d). At first E is what it replaces.
Trainable parameters: chosen tokens times d. Where embedding and head share W, they share E.
In peft, and in its files, this is `trainable_token_indices` of a LoraConfig.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenRows(nn.Module):
    """An embedding (b, t) -> (b, t, d) with trained rows, or the head (b, t, d) -> (b, t, v) tied
    to one: that takes the rows from its `source`, and has none of its own."""

    def __init__(self, base_layer: nn.Module, ids: Tensor, source: "TokenRows | None" = None):
        super().__init__()
        self.base_layer = base_layer
        self.source = [source or self]  # in a list: it is no part of this layer
        self.register_buffer("ids", ids, persistent=False)
        if source is None:
            rows = base_layer.weight.detach()[ids]
            self.token_adapter = nn.ParameterDict({"trainable_tokens_delta": rows})

    @property
    def weight(self) -> Tensor:
        """W', made anew."""
        rows = self.source[0].token_adapter["trainable_tokens_delta"]
        return self.base_layer.weight.index_copy(0, self.ids, rows.to(self.base_layer.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base_layer, nn.Embedding):
            return F.embedding(x, self.weight, self.base_layer.padding_idx)
        return F.linear(x, self.weight, self.base_layer.bias)

    def merge(self) -> None:
        """Nothing to do: every forward computes with W'."""

    unmerge = merge

    @torch.no_grad()
    def merge_into_base(self) -> nn.Module:
        self.base_layer.weight.copy_(self.weight)
        return self.base_layer


def token_rows(model: nn.Module, ids: list[int], trainable: bool = True) -> dict[str, TokenRows]:
    """By name, what takes the place of a model's embedding, and of the head if that is tied to it.

    Raises ValueError for tokens that the embedding does not have, or that are named twice.
    """
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"{type(model).__name__} has no get_output_embeddings(): it has no tokens")
    embedding, names = model.get_input_embeddings(), {m: n for n, m in model.named_modules()}
    v = embedding.num_embeddings
    if len(set(ids)) < len(ids) or not all(0 <= i < v for i in ids):
        raise ValueError(
            f"trainable_token_indices are {ids}: give different ones from 0 to {v - 1}"
        )
    chosen = torch.tensor(ids, device=embedding.weight.device)
    layers = {names[embedding]: TokenRows(embedding, chosen)}
    layers[names[embedding]].token_adapter.requires_grad_(trainable)
    head = model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        layers[names[head]] = TokenRows(head, chosen, layers[names[embedding]])
    return layers
