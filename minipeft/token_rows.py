"""Trainable token rows: alongside a LoRA, train the embeddings of a few tokens.

A token that pretraining never saw has an untrained row in the embedding, and no adapter in the
layers can change that row. Here the rows of the chosen tokens are replaced by trained ones, E:

    W'[ids[j]] = E[j]; all other rows of W' are those of W
    embedding: W'[x]
    tied head: h W'ᵀ

Shapes: W, W' (v, d), E (chosen tokens, d), x (b, t), h (b, t, d). E starts as the rows it replaces.
Trainable parameters: chosen tokens times d. A tied embedding and head share E; a head with its own
weight is not changed. In peft's configs and files, this is called `trainable_token_indices`.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minipeft.targets import memory_key


class TokenRows(nn.Module):
    """An embedding with trained rows, (b, t) -> (b, t, d).

    With `source`, it is the head that is tied to that embedding, (b, t, d) -> (b, t, v).
    """

    def __init__(self, base_layer: nn.Module, ids: Tensor, source: "TokenRows | None" = None):
        super().__init__()
        self.base_layer = base_layer
        self.__dict__["source"] = source or self  # not a submodule: the rows are counted once
        self.register_buffer("ids", ids, persistent=False)
        if source is None:
            rows = base_layer.weight.detach()[ids]
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            # E itself, not a difference, in spite of peft's name:
            self.token_adapter = nn.ParameterDict({"trainable_tokens_delta": rows})

    @property
    def weight(self) -> Tensor:
        """W', (v, d)."""
        w, rows = self.base_layer.weight, self.source.token_adapter["trainable_tokens_delta"]
        return w.index_copy(0, self.ids, rows.to(w.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's own forward pass, with W' instead of W. (Some embedding classes do more
        than a look-up.)"""
        return functional_call(self.base_layer, {"weight": self.weight}, (x,))

    def merge(self) -> None:
        """Nothing to do: every forward pass uses W'."""

    def unmerge(self) -> None:
        """Nothing to do."""


def token_rows(model: nn.Module, ids: list[int]) -> dict[str, TokenRows]:
    """Return the layers that replace a model's embedding, and a head tied to it, by name.

    Raises ValueError for tokens that do not exist or are given twice, and for models in which
    another module uses the embedding's weight too, because that module would keep the old rows.
    """
    kind = type(model).__name__
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"trainable_token_indices: {kind} has no get_output_embeddings()")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = memory_key(embedding.weight)
    users = {}  # the modules that use the embedding's weight, by name
    for name, module in model.named_modules(remove_duplicate=False):
        if any(memory_key(p) == shared for p in module.parameters(recurse=False)):
            users[name] = module
    names = {module: name for name, module in users.items()}
    # one module with two names, or a third module
    if len(names) < len(users) or not names.keys() <= {embedding, head}:
        raise ValueError(f"trainable_token_indices: in {kind}, {', '.join(users)} share one weight")
    if getattr(embedding, "max_norm", None):
        raise ValueError("trainable_token_indices: not supported for an embedding with max_norm")
    v = len(embedding.weight)
    if not ids or len(set(ids)) < len(ids) or not all(type(i) is int and 0 <= i < v for i in ids):
        raise ValueError(f"trainable_token_indices must be distinct, from 0 to {v - 1}, got {ids}")
    chosen = torch.tensor(ids, device=embedding.weight.device)
    layers = {names[embedding]: TokenRows(embedding, chosen)}
    if head in names:
        layers[names[head]] = TokenRows(head, chosen, layers[names[embedding]])
    return layers
