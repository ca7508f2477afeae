r"""A small GPT: GPT-2's architecture and module names, in plain PyTorch.

A token's embedding and its position's are added; `n_layer` blocks follow, each an attention and an
MLP behind a layer norm and a residual sum; a last norm and the transposed embedding give the
logits:

    x_0 = wte[token] + wpe[position]                                (1)
    x  <- x + Attention(LN(x)),   x <- x + MLP(LN(x))               (2)
    logits = LN(x) wte^T,   loss = mean over t of -log p(label_{t+1} | tokens up to t)   (3)
    Attention: softmax(q k^T / sqrt(k_width) + mask) v, one fused call for all heads     (4)

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; names and
numbers as in Hugging Face transformers, whose GPT-2 folders are read and written.
Where we differ: layers are `nn.Linear` with weight (out, in), not `Conv1D` with (in, out), so
weights are transposed on the way in and out.
Parameters: v d + n_positions d + n_layer (12 d^2 + 13 d) + 2 d, with the default MLP width 4 d.

Shapes: b batch, t new tokens, p tokens in the cache (or virtual ones), d width, h heads,
k head width, v vocabulary.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# What GPT-2's config can say and this file cannot do: only these values are accepted.
ONLY = {
    "activation_function": "gelu_new",
    "add_cross_attention": False,
    "reorder_and_upcast_attn": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out) on disk
KeyValues = tuple[tuple[Tensor, Tensor], ...]  # a layer each: keys and values, (b, h, p, k)


@dataclass
class GPTConfig:
    """The shape of a GPT. Fields and defaults are those of transformers' `GPT2Config`."""

    vocab_size: int = 50257
    n_positions: int = 1024  # the context: most tokens that one forward pass can see
    n_embd: int = 768  # d, the width
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None is 4 d
    embd_pdrop: float = 0.1  # dropout after the embeddings,
    attn_pdrop: float = 0.1  # on the attention weights,
    resid_pdrop: float = 0.1  # and before each residual sum
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: give a whole number from 1 up"
                )
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a number in [0, 1)")


class Output(NamedTuple):
    """What `GPT.forward` returns; `past_key_values` is None unless `use_cache` was asked for."""

    loss: Tensor | None
    logits: Tensor  # (b, t, v)
    past_key_values: KeyValues | None


class Attention(nn.Module):
    """Causal self-attention with all heads in one fused call, equation (4)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.attn_pdrop = config.n_head, config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v side by side
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None):
        b, t, d = x.shape
        qkv = self.c_attn(x).view(b, t, 3, self.n_head, d // self.n_head)  # (b, t, 3, h, k)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (b, h, t, k)
        if past is not None:
            k = torch.cat((past[0].to(k.dtype), k), dim=2)  # (b, h, p + t, k)
            v = torch.cat((past[1].to(v.dtype), v), dim=2)  # (b, h, p + t, k)
        dropout = self.attn_pdrop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(b, t, d)  # (b, h, t, k) -> (b, t, d)
        return self.resid_dropout(self.c_proj(y)), (k, v)


class MLP(nn.Module):
    """Two linear layers with GPT-2's tanh form of GELU between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, width)
        self.c_proj = nn.Linear(width, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """One layer, equation (2). Returns its keys and values too, for the cache."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None):
        y, present = self.attn(self.ln_1(x), mask, past)
        x = x + y
        return x + self.mlp(self.ln_2(x)), present


class GPT(nn.Module):
    """A GPT with a language-model head that shares the embedding's weight.

    >>> model = GPT(GPTConfig(vocab_size=2048, n_positions=256, n_embd=128, n_layer=4, n_head=4))
    >>> loss, logits, _ = model(input_ids, labels=input_ids)
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
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
        self.gradient_checkpointing = False
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:  # residual sums grow with depth, so what feeds them shrinks
                shrink = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=config.initializer_range / shrink)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KeyValues | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
    ) -> Output:
        """Logits of every token, and the loss where there are labels.

        input_ids (b, t) or inputs_embeds (b, t, d); attention_mask (b, p + t), 1 for a real token
        and 0 for padding on either side; labels (b, t), shifted inside, -100 ignored;
        past_key_values: (keys, values) a layer, each (b, h, p, k); position_ids (b, t) or (1, t),
        by default p, p + 1, …, whatever the mask. Returns `Output(loss, logits, past_key_values)`.
        Raises ValueError for both inputs or none, a mask of another length, too long a text.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        b, t, _ = x.shape
        p = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        if p + t > self.config.n_positions:
            raise ValueError(f"{p + t} tokens, but the context holds {self.config.n_positions}")
        if position_ids is None:
            position_ids = torch.arange(p, p + t, device=x.device)[None]  # (1, t)
        x = self.transformer.drop(x + self.transformer.wpe(position_ids))  # (b, t, d), eq. (1)
        mask = self._mask(attention_mask, b, t, p, x.device)
        presents = []
        for i, block in enumerate(self.transformer.h):
            past = past_key_values[i] if past_key_values is not None else None
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x, present = checkpoint(block, x, mask, past, use_reentrant=False)
            else:
                x, present = block(x, mask, past)
            presents.append(present)
        logits = self.lm_head(self.transformer.ln_f(x))  # (b, t, v), eq. (3)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return Output(loss, logits, tuple(presents) if use_cache else None)

    @staticmethod
    def _mask(attention_mask: Tensor | None, b: int, t: int, p: int, device) -> Tensor | None:
        """True where token i may look at key j: j <= p + i, and j is no padding.

        Returns (b, 1, t, p + t), or (1, 1, t, p + t) without a mask, or None.
        None stands for the plain causal mask; with p > 0 that would be wrong, since it lets token 0
        see key 0 alone and not the p keys before it. A padding token sees itself, so that no row is
        empty (the softmax of nothing is NaN).
        """
        if attention_mask is None and p == 0:
            return None
        mask = torch.ones(t, p + t, dtype=torch.bool, device=device).tril(p)[None, None]
        if attention_mask is None:
            return mask
        if attention_mask.shape != (b, p + t):
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}, but {p} past and "
                f"{t} new tokens in a batch of {b} need {(b, p + t)}"
            )
        own = torch.eye(t, p + t, dtype=torch.bool, device=device).roll(p, dims=1)  # (t, p + t)
        return mask & attention_mask.bool()[:, None, None] | own  # (b, 1, t, p + t)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KeyValues | None = None,
    ) -> Tensor:
        """Continue prompts (b, t), greedily or by sampling: (b, t + up to max_new_tokens).

        Prompts of unequal length are padded on the LEFT, with 0 in attention_mask (b, p + t). A row
        ends at `eos_token_id` (by default the config's) and is filled with it until all rows have
        ended. `past_key_values` hold p tokens that stand before. Given inputs_embeds (b, t, d), the
        new tokens alone are returned. Raises ValueError for right padding, a temperature not above
        0, text beyond the context.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        b, t = given.shape[:2]
        p = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        eos = self.config.eos_token_id if eos_token_id is None else eos_token_id
        if p + t + max_new_tokens > self.config.n_positions:
            raise ValueError(
                f"a prompt of {p + t} and {max_new_tokens} new tokens exceed the context of "
                f"{self.config.n_positions}: shorten the prompt or lower max_new_tokens"
            )
        if do_sample and not temperature > 0:
            raise ValueError(
                f"temperature is {temperature}: give a number above 0, or do not sample"
            )
        if attention_mask is None:
            attention_mask = torch.ones(b, p + t, dtype=torch.long, device=given.device)
        if not attention_mask[:, -1].all():
            raise ValueError("a prompt ends in padding: pad prompts on the left to generate")
        if inputs_embeds is not None:
            input_ids = given.new_empty(b, 0, dtype=torch.long)
        was_training, past, new = self.training, past_key_values, given
        done = torch.zeros(b, dtype=torch.bool, device=input_ids.device)
        self.eval()
        try:
            for _ in range(max_new_tokens):
                positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[
                    :, -new.shape[1] :
                ]  # (b, t)
                ids, embeds = (None, new) if new.dim() == 3 else (new, None)
                out = self(ids, attention_mask, None, embeds, past, positions, use_cache=True)
                past, logits = out.past_key_values, out.logits[:, -1].float()  # (b, v)
                if not do_sample:
                    new = logits.argmax(-1, keepdim=True)  # (b, 1)
                else:
                    if top_k is not None:
                        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (b, 1)
                        logits = logits.masked_fill(logits < least, -torch.inf)
                    probabilities = (logits / temperature).softmax(-1)  # (b, v)
                    new = torch.multinomial(probabilities, 1, generator=generator)  # (b, 1)
                if eos is not None:
                    new = new.masked_fill(done[:, None], eos)
                    done |= new[:, 0] == eos
                input_ids = torch.cat((input_ids, new), dim=1)
                attention_mask = torch.cat((attention_mask, torch.ones_like(new)), dim=1)
                if done.all():
                    break
        finally:
            self.train(was_training)
        return input_ids

    def gradient_checkpointing_enable(self) -> None:
        """Keep only each block's input and compute the rest again in the backward pass."""
        self.gradient_checkpointing = True

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def save_pretrained(self, path: str | Path) -> None:
        """Write `config.json` and `model.safetensors` as transformers writes them for GPT-2."""
        save_file = _import("safetensors.torch").save_file
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: (w.t() if name.endswith(TRANSPOSED) else w).contiguous()
            for name, w in self.state_dict().items()
            if name != "lm_head.weight"  # it is wte's
        }
        config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"} | asdict(self.config)
        config = json.dumps(config | ONLY, indent=2, sort_keys=True) + "\n"
        write_file(
            folder / "model.safetensors", lambda f: save_file(tensors, f, metadata={"format": "pt"})
        )
        write_file(folder / "config.json", lambda f: Path(f).write_text(config))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "GPT":
        """Read a GPT-2 folder (ours, transformers' or OpenAI's), or fetch one from the hub by name.

        The model comes in float32 and in eval mode. Raises ValueError with the file's name for what
        is damaged, missing, surplus, of another shape, or of an architecture that is not GPT-2's.
        """
        folder = Path(path)
        if not folder.is_dir():
            if folder.is_absolute() or str(path).count("/") > 1:
                raise ValueError(f"there is no folder {path}")
            files = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
            fetch = _import("huggingface_hub").snapshot_download
            try:
                folder = Path(fetch(str(path), allow_patterns=files))
            except Exception as error:
                raise ValueError(
                    f"{path} is no folder here, and the hub did not give it: {error}"
                ) from error
        config = _read_config(folder / "config.json")
        tensors = _read_tensors(folder)
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: w.shape for name, w in model.state_dict().items()}
        tensors.setdefault("lm_head.weight", tensors.get("transformer.wte.weight"))
        wrong = [f"{name} is missing" for name in shapes if tensors.get(name) is None]
        wrong += [f"{name} is not part of a GPT-2" for name in tensors if name not in shapes]
        wrong += [
            f"{name} has the shape {tuple(w.shape)} and not {tuple(shapes[name])}"
            for name, w in tensors.items()
            if w is not None and name in shapes and w.shape != shapes[name]
        ]
        if not wrong and not torch.equal(
            tensors["lm_head.weight"], tensors["transformer.wte.weight"]
        ):
            wrong = ["lm_head.weight differs from wte.weight: an untied head is not supported"]
        if wrong:
            raise ValueError(f"{folder} does not fit: {'; '.join(wrong[:5])} ({len(wrong)} in all)")
        model.load_state_dict({k: w.float() for k, w in tensors.items()}, assign=True)
        model.requires_grad_(True)
        model.lm_head.weight = model.transformer.wte.weight
        return model.eval()


def _read_config(file: Path) -> GPTConfig:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("model_type", "gpt2") != "gpt2":
        raise ValueError(f"{file} does not describe a GPT-2 (model_type 'gpt2')")
    for name, value in ONLY.items():
        if found.get(name, value) != value:
            raise ValueError(f"{file}: {name} is {found[name]!r}, and only {value!r} is supported")
    names = {field.name for field in fields(GPTConfig)}
    try:
        return GPTConfig(**{name: value for name, value in found.items() if name in names})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder under our names and in our layout."""
    load_file = _import("safetensors.torch").load_file
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    tensors = {}
    try:
        if index.exists():  # a large model lies in several files
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for name in names:
            tensors |= load_file(folder / name)
    except Exception as error:  # safetensors raises a class of its own for damaged files
        raise ValueError(
            f"{folder / name} cannot be read (only safetensors are): {error}"
        ) from error
    found = {}
    for name, w in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # OpenAI's mask buffers
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        found[name] = w.t().contiguous() if name.endswith(TRANSPOSED) else w
    return found


def _import(module: str):
    """A package that only reading and writing files needs, imported when they are."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(
            f"reading and writing models needs {package}: pip install {package}"
        ) from error


# --- write_file: the same lines stand in gpt.py and files.py (tests/test_copy_alone.py)
def write_file(path: Path, write: Callable[[str], object]) -> None:
    """Have `write` fill a file beside `path`, then rename it: a crash leaves the old or the new."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(beside)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


# --- end of write_file


def _check() -> None:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4)
    model = GPT(config).double().eval()
    d, n = config.n_embd, sum(p.numel() for p in model.parameters())
    assert n == 97 * d + 32 * d + 3 * (12 * d * d + 13 * d) + 2 * d
    ids = torch.randint(97, (2, 12))
    loss, logits, _ = model(ids, labels=ids)
    assert logits.shape == (2, 12, 97)
    assert abs(loss.item() - math.log(97)) < 0.5
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values).logits
    assert torch.allclose(rest, logits[:, 5:], atol=1e-12)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(15) >= 3).long().expand(2, 15)
    assert torch.equal(model.generate(padded, mask, 9)[:, 3:], model.generate(ids, None, 9))
    print(
        f"gpt.py: {n:,} parameters as the formula says; the cache and left padding change nothing"
    )


if __name__ == "__main__":
    _check()
