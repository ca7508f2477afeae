r"""A small GPT: GPT-2's architecture and module names, in plain PyTorch.

The model embeds each token and its position, passes the sum through `n_layer` blocks, and projects
the result back onto the vocabulary with the embedding matrix itself. A block is self-attention
followed by an MLP, each with a layer norm before it and a residual connection around it.

    x₀ = wte[token] + wpe[position]                                                   (1)
    Attention(x) = softmax(q kᵀ / √k_width + mask) v W_oᵀ,   q, k, v = x W_qkvᵀ       (2)
    x ← x + Attention(LN(x)),   x ← x + MLP(LN(x))                                    (3)
    logits = LN(x) wteᵀ,   loss = -mean over t of log p(label_{t+1} | tokens ≤ t)     (4)

Paper: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Module names,
defaults and files follow Hugging Face transformers: GPT-2 folders can be read and written.
Difference: layers are `nn.Linear` with weight (out, in) instead of `Conv1D` with (in, out), so
weights are transposed when they are read and written (pretrained.py).
Parameters: v d + n_positions d + n_layer (12 d² + 13 d) + 2 d, with the default MLP width 4 d.

Shapes: b batch, t new tokens, p tokens in the cache, d width, h heads, k head width, v vocabulary.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KeyValue = tuple[Tensor, Tensor]  # the cached keys and values of one layer, each (b, h, p, k)
KeyValues = tuple[KeyValue, ...]  # the cache: one pair per layer


@dataclass
class GPTConfig:
    """Size and settings of a GPT. Fields and defaults are those of transformers' `GPT2Config`."""

    vocab_size: int = 50257  # v
    n_positions: int = 1024  # the context: the most tokens that the model can process at once
    n_embd: int = 768  # d, the width
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # h, attention heads per block; must divide n_embd
    n_inner: int | None = None  # hidden width of the MLP; None means 4 d
    embd_pdrop: float = 0.1  # dropout probability after the embeddings
    attn_pdrop: float = 0.1  # dropout probability on the attention weights
    resid_pdrop: float = 0.1  # dropout probability before each residual sum
    layer_norm_epsilon: float = 1e-5  # added to the variance in every layer norm
    initializer_range: float = 0.02  # standard deviation of the initial weights
    bos_token_id: int | None = 50256  # starts a text; stored, but not used here
    eos_token_id: int | None = 50256  # ends a text; `generate` stops there
    pad_token_id: int | None = None  # fills up short texts; stored, but not used here

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if self.n_inner is not None and (type(self.n_inner) is not int or self.n_inner < 1):
            raise ValueError(f"n_inner must be None or a positive integer, got {self.n_inner!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head must divide n_embd, got {self.n_head} and {self.n_embd}")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")


class Output(dict):
    """The result of `GPT.forward`: loss if labels were given, logits (b, t, v), and past_key_values
    with use_cache=True.

    As in transformers, entries are attributes too (None if absent), and out[0] is the first one.
    """

    def __getattr__(self, name: str):
        if name not in ("loss", "logits", "past_key_values"):
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name: str, value) -> None:
        self[name] = value

    def __getitem__(self, key):
        if isinstance(key, int | slice):
            return tuple(self.values())[key]
        return super().__getitem__(key)


class Attention(nn.Module):
    """Causal self-attention, equation (2), with one fused call for all heads."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.attn_pdrop = config.n_head, config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one matrix
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, mask: Tensor | None, past: KeyValue | None):
        b, t, d = x.shape
        qkv = self.c_attn(x).view(b, t, 3, self.n_head, d // self.n_head)  # (b, t, 3, h, k)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (b, h, t, k)
        if past is not None:
            k = torch.cat((past[0].to(k.dtype), k), dim=2)  # (b, h, p + t, k)
            v = torch.cat((past[1].to(v.dtype), v), dim=2)  # (b, h, p + t, k)
        dropout = self.attn_pdrop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)  # (2)
        y = y.transpose(1, 2).reshape(b, t, d)  # (b, h, t, k) -> (b, t, d)
        return self.resid_dropout(self.c_proj(y)), (k, v)


class MLP(nn.Module):
    """Two linear layers with the tanh approximation of GELU between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, width)
        self.c_proj = nn.Linear(width, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))  # (b, t, d)


class Block(nn.Module):
    """One layer of the network, equation (3). Also returns its keys and values for the cache."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, past: KeyValue | None):
        y, present = self.attn(self.ln_1(x), mask, past)
        x = x + y  # (3), first half
        return x + self.mlp(self.ln_2(x)), present  # (3), second half


class GPT(nn.Module):
    """A GPT. Its language-model head shares the weight of the token embedding."""

    # For transformers' Trainer: pass num_items_in_batch, and do not count the first labels
    accepts_loss_kwargs, loss_type = True, "ForCausalLM"

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.name_or_path: str | None = None  # the folder or Hub name, set by from_pretrained
        self.gradient_checkpointing = False
        self._require_grads_hook = None
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.n_positions, config.n_embd),
                "drop": nn.Dropout(config.embd_pdrop),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, config.layer_norm_epsilon),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:  # each block adds to x twice: scale down to keep x's variance
                scale = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=config.initializer_range / scale)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        labels: Tensor | None = None, inputs_embeds: Tensor | None = None,
        past_key_values: KeyValues | None = None, position_ids: Tensor | None = None,
        use_cache: bool = False, num_items_in_batch: Tensor | int | None = None,
    ) -> Output:  # fmt: skip
        """Compute the logits of every token, and the mean loss if labels are given.

        Pass input_ids (b, t) or inputs_embeds (b, t, d). attention_mask (b, p + t) is 1 for real
        tokens, 0 for padding on either side. labels (b, t) are shifted inside; -100 is ignored.
        position_ids (b, t) or (1, t) default to p, …, p + t - 1 and do not depend on the mask.
        The loss is a mean over this batch's labels; with num_items_in_batch, the sum of their
        losses is divided by that number: the labels of a step that accumulates several batches.
        Raises ValueError for both inputs or neither, a mask of the wrong shape, or too many tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, and not both")
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        b, t, _ = x.shape
        p = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        pasts = past_key_values or (None,) * len(self.transformer.h)
        if p + t > self.config.n_positions:
            raise ValueError(f"got {p + t} tokens, but the context holds {self.config.n_positions}")
        if position_ids is None:
            position_ids = torch.arange(p, p + t, device=x.device)[None]  # (1, t)
        x = self.transformer.drop(x + self.transformer.wpe(position_ids))  # (b, t, d)   (1)
        mask = self._mask(attention_mask, b, t, p, x.device)
        presents = []
        for block, past in zip(self.transformer.h, pasts, strict=True):
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x, present = checkpoint(block, x, mask, past, use_reentrant=False)
            else:
                x, present = block(x, mask, past)  # (b, t, d)   (3)
            presents.append(present)
        logits = self.lm_head(self.transformer.ln_f(x))  # (b, t, v)   (4)
        out = Output()
        if labels is not None:
            how = "mean" if num_items_in_batch is None else "sum"
            predicted, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            loss = F.cross_entropy(predicted, targets, reduction=how)
            out.loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        out.logits = logits
        if use_cache:
            out.past_key_values = tuple(presents)
        return out

    @staticmethod
    def _mask(attention_mask: Tensor | None, b: int, t: int, p: int, device) -> Tensor | None:
        """True where query i may attend to key j: j <= p + i, and j is not padding.

        Returns (b or 1, 1, t, p + t), or None for plain causal attention. With a cache, the fused
        call's own causal mask would be wrong: it shows query 0 only key 0, not the p cached keys.
        """
        if attention_mask is None and p == 0:
            return None
        causal = torch.ones(t, p + t, dtype=torch.bool, device=device).tril(p)[None, None]
        if attention_mask is None:
            return causal
        if attention_mask.shape != (b, p + t):
            shape = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask must have shape {(b, p + t)}, got {shape}")
        # Padding attends to itself: the softmax of a row without any key would be NaN.
        itself = torch.eye(t, p + t, dtype=torch.bool, device=device).roll(p, dims=1)  # (t, p + t)
        return causal & attention_mask.bool()[:, None, None] | itself  # (b, 1, t, p + t)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 20,
        do_sample: bool = False, temperature: float = 1.0, top_k: int | None = None,
        eos_token_id: int | None = None, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Continue prompts (b, t) greedily or by sampling: (b, t + up to max_new_tokens).

        Pad prompts of unequal length on the LEFT, with 0 in attention_mask (b, t). A row that
        reaches `eos_token_id` (default: the config's) is filled with it until all rows are done.
        Raises ValueError for an empty or right-padded prompt, more tokens than the context holds,
        or bad sampling settings.
        """
        b, t = input_ids.shape
        if t == 0:
            raise ValueError("the prompt is empty: pass at least one token")
        if t + max_new_tokens > self.config.n_positions:
            raise ValueError(
                f"a prompt of {t} tokens and {max_new_tokens} new tokens exceed the context of "
                f"{self.config.n_positions}: shorten the prompt or lower max_new_tokens"
            )
        if do_sample and not (temperature > 0 and (top_k is None or top_k > 0)):
            raise ValueError(f"temperature and top_k must be positive, got {temperature}, {top_k}")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if not attention_mask[:, -1].all():
            raise ValueError("a prompt ends with padding: pad prompts on the left to generate")
        tokens = new = input_ids
        eos = self.config.eos_token_id if eos_token_id is None else eos_token_id
        done = torch.zeros(b, dtype=torch.bool, device=new.device)
        was_training, past = self.training, None
        self.eval()
        try:
            for _ in range(max_new_tokens):
                positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (b, p + t)
                positions = positions[:, -new.shape[1] :]  # (b, t)
                out = self(
                    input_ids=new, attention_mask=attention_mask, past_key_values=past,
                    position_ids=positions, use_cache=True,
                )  # fmt: skip
                past, logits = out.past_key_values, out.logits[:, -1].float()  # (b, v)
                if not do_sample:
                    new = logits.argmax(-1, keepdim=True)  # (b, 1)
                else:
                    if top_k is not None:
                        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                        logits = logits.masked_fill(logits < smallest, -torch.inf)
                    p_next = (logits / temperature).softmax(-1)  # (b, v)
                    new = torch.multinomial(p_next, 1, generator=generator)  # (b, 1)
                if eos is not None:
                    new = new.masked_fill(done[:, None], eos)
                    done |= new[:, 0] == eos
                tokens = torch.cat((tokens, new), dim=1)
                attention_mask = torch.cat((attention_mask, torch.ones_like(new)), dim=1)
                if done.all():
                    break
        finally:
            self.train(was_training)
        return tokens

    def _get_name(self) -> str:
        """For this name of the architecture, transformers' Trainer shifts smoothed labels."""
        return "GPT2LMHeadModel"

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None) -> None:
        """Recompute each block in the backward pass. `gradient_checkpointing_kwargs` is ignored:
        they change how PyTorch recomputes, and not the result."""
        self.gradient_checkpointing = True

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs=None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """transformers' new name for the same thing."""
        if every_n_layers != 1 or offload:
            raise ValueError(f"not implemented: every_n_layers={every_n_layers}, offload={offload}")
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.gradient_checkpointing = False

    def enable_input_require_grads(self) -> None:
        """Let the embedding's output require a gradient, as reentrant checkpointing needs."""
        self.disable_input_require_grads()
        self._require_grads_hook = self.transformer.wte.register_forward_hook(_require_gradient)

    def disable_input_require_grads(self) -> None:
        if self._require_grads_hook is not None:
            self._require_grads_hook.remove()
            self._require_grads_hook = None

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def save_pretrained(self, path: str | Path) -> None:
        """Write `config.json` and `model.safetensors` in transformers' format for GPT-2.

        Raises ValueError, before anything is written, for quantized or adapted layers.
        """
        from minipeft import pretrained  # only these two methods need another file

        pretrained.save(self, Path(path))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "GPT":
        """Load a GPT-2 folder (ours, transformers' or OpenAI's), or download one from the Hub.

        The model is in float32 and in eval mode. Raises ValueError, naming the file, if something
        is damaged, missing or unexpected, or if the architecture is not GPT-2.
        """
        from minipeft import pretrained

        return pretrained.load(path)


def _require_gradient(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    output.requires_grad_()


if __name__ == "__main__":  # memorize a sentence, then recite it from its first five letters
    torch.manual_seed(0)
    text = "To be, or not to be, that is the question:"
    letters = sorted(set(text))
    ids = torch.tensor([[letters.index(letter) for letter in text]])  # (1, t)
    size = {"vocab_size": len(letters), "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT(GPTConfig(**size, eos_token_id=None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    recited = "".join(letters[i] for i in model.generate(ids[:, :5], max_new_tokens=37)[0])
    assert recited == text
    print(f"gpt.py: given {text[:5]!r}, the GPT recites: {recited}")
