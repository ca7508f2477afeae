r"""QLoRA: keep the frozen base in four bits, and train a LoRA on top of it.

A frozen weight is only read, so it can be stored coarsely: each block of 64 weights as one scale,
the block's largest absolute value, and a 4-bit code a weight, the nearest of 16 levels. The levels
of NF4 are quantiles of the normal distribution, because weights are roughly normal, with an exact
zero and ends at -1 and 1. The scales themselves are quantized once more to 8 bits (double
quantization). In every forward and backward pass a layer's weight is computed again from its
codes, used and dropped. (The paper's third part, the paged optimizer, is in paged_adamw.py.)

Paper: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.

    levels = {Φ⁻¹ at 8 even steps from 0.9677 down to 0.5, -Φ⁻¹ at 7, 0} / the largest        (1)
    code_i = nearest level to w_i / absmax,    w_i ≈ absmax · level[code_i]        (2)  section 3
    absmax ≈ offset + absmax₂ · map[code₈],    in blocks of 256 scales             (3)

Shapes: W (out, in), of n = out · in weights; codes (ceil(n / 2),), two a byte, the first in the
high half; scales (ceil(n / 64),). Trainable parameters: r (in + out) for each adapted layer.
Bits a parameter: 4 + 8/64 + 32/(64 · 256) = 4.127; without double quantization 4 + 32/64 = 4.5.

Where we differ. From the paper: its eq. 4 has infinite ends; these levels are its authors' code's,
bitsandbytes. From bitsandbytes: no bit differs, but for 8-bit codes on a CPU, where it misses the
nearest a few times in a thousand. A merged layer is not rounded again: see `lost_by_rounding`.

>>> quantize_model(model)  # in place, not reversible: from here on the base is the 4-bit model
>>> layers = add_qlora(model, QLoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def nf4_levels() -> Tensor:
    """The 16 levels of equation (1), computed; (16,) float32."""
    above = torch.linspace(0.9677083, 0.5, 9, dtype=torch.float32)[:-1].tolist()
    below = torch.linspace(0.9677083, 0.5, 8, dtype=torch.float32)[:-1].tolist()
    quantile = NormalDist().inv_cdf
    levels = [-quantile(p) for p in below] + [0.0] + [quantile(p) for p in reversed(above)]
    return torch.tensor(levels, dtype=torch.float32) / quantile(above[0])


def dynamic_map() -> Tensor:
    """The 256 values of the signed 8-bit code of the scales, sorted; (256,) float32.

    Dettmers 2015 (arXiv 1511.04561): the middles of 64, 32, … 1 equal steps of the seven decades
    below 1, with either sign; and 0 and 1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values


NF4_CODEBOOK = nf4_levels()
NF4_MIDPOINTS = ((NF4_CODEBOOK[1:] + NF4_CODEBOOK[:-1]) / 2).tolist()
DYNAMIC_MAP = dynamic_map()
# The two levels that a byte stands for, (256, 2); two floats seen as one double: a faster look-up.
PAIRS = torch.cartesian_prod(NF4_CODEBOOK, NF4_CODEBOOK).view(torch.float64)[:, 0]


@dataclass
class NF4:
    """A quantized tensor: everything that is needed to compute it again."""

    codes: Tensor  # (ceil(n / 2),) uint8, two weights a byte
    scales: Tensor  # (blocks,) float32, or uint8 codes with double quantization
    scale_scales: Tensor | None  # (ceil(blocks / 256),) float32
    offset: Tensor | None  # () float32, the mean of the scales
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int

    def bits(self) -> float:
        """Bits a parameter, counted from the tensors."""
        held = [t.nbytes for t in vars(self).values() if isinstance(t, Tensor)]
        return 8 * sum(held) / math.prod(self.shape)


def blocks_at_once(codes: Tensor, blocksize: int) -> int:
    """How many blocks to work on at once: what stays in a processor's cache; more on a GPU."""
    return max((2**17 if codes.device.type == "cpu" else 2**22) // blocksize, 1)


def in_blocks(x: Tensor, blocksize: int) -> Tensor:
    """A flat tensor as (blocks, blocksize), filled up with zeros."""
    return F.pad(x, (0, -len(x) % blocksize)).view(-1, blocksize)


@torch.no_grad()
def quantize_nf4(weight: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4:
    """A float tensor of any shape in NF4, equations (2) and (3).

    Raises ValueError for weights that are no finite floats, and a blocksize that is odd or below 2.
    """
    if not isinstance(blocksize, int) or blocksize < 2 or blocksize % 2:
        raise ValueError(f"blocksize is {blocksize!r}: give a positive even number")
    if not weight.is_floating_point():
        raise ValueError(f"a weight of {weight.dtype} cannot be quantized: give floats")
    rows = in_blocks(weight.reshape(-1), blocksize)  # (blocks, blocksize)
    scales, packed = [], []
    for part in rows.split(blocks_at_once(rows, blocksize)):
        part = part.float()
        absmax = part.abs().amax(dim=1)
        x = (part * (1 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1)  # zeros stay zeros
        code, above = torch.zeros_like(x), torch.empty_like(x)  # floats: bools take twice as long
        for midpoint in NF4_MIDPOINTS:  # on a midpoint the lower level wins
            code += torch.gt(x, midpoint, out=above)
        packed.append((code[:, 0::2] * 16 + code[:, 1::2]).byte().view(-1))
        scales.append(absmax)
    codes, absmax = torch.cat(packed)[: (weight.numel() + 1) // 2].clone(), torch.cat(scales)
    check_finite(absmax)  # what is not finite in a block is in its absmax
    if not double_quant:
        return NF4(codes, absmax, None, None, weight.shape, weight.dtype, blocksize)
    offset = absmax.mean()
    rows = in_blocks(absmax - offset, 256)
    scale_scales = rows.abs().amax(dim=1)
    x = rows / scale_scales.clamp(min=1e-38)[:, None]
    middles = ((DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / 2).to(x.device)
    scales = torch.bucketize(x, middles).to(torch.uint8).view(-1)[: len(absmax)].clone()
    return NF4(codes, scales, scale_scales, offset, weight.shape, weight.dtype, blocksize)


def check_finite(weight: Tensor) -> None:
    if not weight.isfinite().all():
        raise ValueError("the weight has NaN or infinite entries: it cannot be quantized")


@torch.no_grad()
def dequantize_nf4(q: NF4, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that the codes stand for, in its own shape, and its own dtype if none is given."""
    absmax = q.scales
    if q.offset is not None:
        table = DYNAMIC_MAP.to(q.codes.device)
        rows = in_blocks(table[q.scales.int()], 256) * q.scale_scales[:, None]
        absmax = rows.view(-1)[: len(q.scales)] + q.offset
    pairs, step = PAIRS.to(q.codes.device), blocks_at_once(q.codes, q.blocksize)
    out = absmax.new_empty((len(absmax), q.blocksize), dtype=dtype or q.dtype)
    codes = in_blocks(q.codes, q.blocksize // 2)
    for part, scale, to in zip(codes.split(step), absmax.split(step), out.split(step), strict=True):
        levels = pairs.index_select(0, part.reshape(-1).int()).view(torch.float32)
        torch.mul(levels.view(-1, q.blocksize), scale[:, None], out=to)
    return out.view(-1)[: math.prod(q.shape)].view(q.shape)


class _Linear4bitFunction(torch.autograd.Function):
    """x W^T + b with W computed from its codes in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, q: NF4) -> Tensor:
        ctx.q = q  # the codes alone are kept, not W
        return F.linear(x, dequantize_nf4(q, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        for_x, for_bias, _ = ctx.needs_input_grad
        grad_x = grad @ dequantize_nf4(ctx.q, grad.dtype) if for_x else None  # (…, out) (out, in)
        return grad_x, grad.flatten(0, -2).sum(0) if for_bias else None, None


class _Quantized(nn.Module):
    """What a linear layer with a coarse weight shows: `weight` is computed when asked for."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.out_features, self.in_features = matrix(layer).shape
        self.bias = layer.bias

    def _apply(self, fn, recurse: bool = True):
        """`.to(device)` moves all; `.half()` must not round the scales, so they go as bytes."""
        floats = {n: b for n, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, b in floats.items():
            self._buffers[name] = fn(b.reshape(-1).view(torch.uint8)).view(b.dtype).view(b.shape)
        return self

    def plain(self, weight: Tensor | None = None) -> nn.Linear:
        """A plain linear layer, with this weight (out, in) or with the one that the codes have."""
        weight = self.weight if weight is None else weight
        layer = nn.Linear(*reversed(weight.shape), self.bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            bias = self.bias.detach().to(weight.dtype).clone()
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer


class Linear4bit(_Quantized):
    """A frozen linear layer in NF4. x (…, in) -> y (…, out), computed in `compute_dtype` or x's.

    Takes the weight of `nn.Linear` or transformers' `Conv1D`. The state dict holds the 4-bit form.
    """

    def __init__(self, layer: nn.Module, blocksize=64, double_quant=True, compute_dtype=None):
        super().__init__(layer)
        q = quantize_nf4(matrix(layer).detach().contiguous(), blocksize, double_quant)
        for name in ("codes", "scales", "scale_scales", "offset"):
            self.register_buffer(name, getattr(q, name))
        self.form = {"shape": q.shape, "dtype": q.dtype, "blocksize": blocksize}
        self.compute_dtype = compute_dtype

    quantized = property(lambda self: NF4(**self._buffers, **self.form))  # named as its fields
    weight = property(lambda self: dequantize_nf4(self.quantized))  # W (out, in), computed anew

    def forward(self, x: Tensor) -> Tensor:
        inside = x.to(self.compute_dtype or x.dtype)
        bias = None if self.bias is None else self.bias.to(inside.dtype)
        return _Linear4bitFunction.apply(inside, bias, self.quantized).to(x.dtype)


class Linear8bit(_Quantized):
    """A linear layer for inference with a whole row of W on one scale: W ≈ scale · int8."""

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        w = matrix(layer).detach().float()
        check_finite(w)
        self.register_buffer("scales", w.abs().amax(dim=1) / 127)  # (out,)
        w = (w / self.scales.clamp(min=1e-38)[:, None]).round()  # within ±127
        self.register_buffer("codes", w.to(torch.int8))
        self.dtype = layer.weight.dtype

    weight = property(lambda self: (self.codes * self.scales[:, None]).to(self.dtype))  # (out, in)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.codes.to(x.dtype)) * self.scales.to(x.dtype)  # (…, out)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def quantize_model(model: nn.Module, bits: int = 4, **options) -> dict[str, nn.Module]:
    """Put a quantized layer in the place of every linear one but the output head. Not reversible.

    Embeddings and norms stay. bits is 4 or 8; options are those of `Linear4bit`. Returns the new
    layers by name. Raises ValueError, before anything is changed, for weights that are not finite.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits!r}: give 4 or 8")
    kind, found = {4: Linear4bit, 8: Linear8bit}[bits], find_targets(model, "all-linear")
    layers = {name: kind(layer, **options) for name, layer in found.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer.requires_grad_(False).train(model.training))
    return layers


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """A model's quantized layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _Quantized)}


def bits_per_weight(model: nn.Module) -> float | None:
    """Bits a weight of the quantized layers, counted from their tensors; None without any."""
    layers = quantized_layers(model).values()
    held = sum(8 * buffer.nbytes for layer in layers for buffer in layer.buffers())
    return held / sum(q.in_features * q.out_features for q in layers) if layers else None


def prepare_model_for_kbit_training(model: nn.Module, use_gradient_checkpointing: bool = True):
    """Ready a quantized model for training, in place, as peft's function of this name does.

    Freezes it; casts what is not quantized to float32, since half is too coarse for norms and the
    loss; keeps only the blocks' inputs for the backward pass (the first has to need a gradient).
    """
    for p in model.requires_grad_(False).parameters():
        p.data = p.data.float() if p.is_floating_point() else p.data
    if use_gradient_checkpointing:
        model.get_input_embeddings().register_forward_hook(lambda _, x, y: y.requires_grad_())
        model.gradient_checkpointing_enable()
    return model


@dataclass
class QLoraConfig:
    """What to adapt, and how. Fields, defaults and meaning are those of peft's LoraConfig."""

    r: int = 8  # the rank
    lora_alpha: float = 8  # α: the change is scaled by α / r
    lora_dropout: float = 0.0  # on the adapter's input, in training mode
    target_modules: list[str] | str | None = None  # names or endings; a regex; or "all-linear"
    task_type: str | None = None
    inference_mode: bool = False  # True: the adapter is frozen as well
    peft_type: str = field(default="QLORA", init=False)  # on disk the adapter is a LoRA

    def __post_init__(self):
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r is {self.r!r}: a rank is a whole number from 1 up")
        if not isinstance(self.lora_alpha, int | float) or not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha is {self.lora_alpha!r}: give a number above 0")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}: give a number in [0, 1)")
        if isinstance(self.target_modules, set | tuple):
            self.target_modules = sorted(self.target_modules)


class QLoraLinear(nn.Module):
    """A 4-bit layer with an adapter beside it: y = W₄ x + b + (α / r) B A dropout(x).

    x (…, in) -> y (…, out); A (r, in), B (out, r), drawn as lora.py and peft draw them.
    """

    def __init__(self, base_layer: Linear4bit, config: QLoraConfig):
        super().__init__()
        self.base_layer, r, drop = base_layer, config.r, config.lora_dropout
        self.out_features, self.in_features = base_layer.out_features, base_layer.in_features
        self.scaling = config.lora_alpha / r
        self.lora_dropout = nn.Dropout(drop) if drop else nn.Identity()
        self.lora_A = nn.Linear(self.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, self.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        for adapter in (self.lora_A, self.lora_B):
            adapter.to(base_layer.codes.device).requires_grad_(not config.inference_mode)
        self.register_buffer("merged_weight", None, persistent=False)  # W', (out, in), while merged

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this layer is merged: unmerge it before training")
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.merged_weight.to(x.dtype), bias)
        y = self.base_layer(x)  # (…, out)
        h = self.lora_A(self.lora_dropout(x).to(self.lora_A.weight.dtype))  # (…, r)
        return y + (self.lora_B(h) * self.scaling).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W' = W₄ + (α / r) B A, (out, in), in float32: exact, because it is not rounded back."""
        return self.weight.float() + self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    def merge(self) -> None:
        """Compute with W', in full size, from now on. The codes stay untouched."""
        self.merged_weight = self.merged()

    def unmerge(self) -> None:
        """Drop W'. The layer is what it was, to the bit."""
        self.merged_weight = None

    def merge_into_base(self) -> nn.Linear:
        """A plain float32 linear layer that holds W'. The 4-bit layer stays as it was."""
        return self.base_layer.plain(self.merged())

    def lost_by_rounding(self) -> float:
        """‖Q(W') - W'‖ / ‖W' - W₄‖: above 1, 4 bits for W' would lose more than was learned."""
        w, merged = self.weight.float(), self.merged()
        again = dequantize_nf4(quantize_nf4(merged, self.base_layer.quantized.blocksize))
        return ((again - merged).norm() / (merged - w).norm()).item()


def qlora_layers(model: nn.Module, config: QLoraConfig) -> dict[str, QLoraLinear]:
    """A QLoraLinear for each target, by name. The model is not changed: `add_qlora` places them.

    Raises ValueError for a target that is not quantized: call `quantize_model(model)` first.
    """
    targets = find_targets(model, config.target_modules)
    for name, layer in targets.items():
        if not isinstance(layer, Linear4bit):
            raise ValueError(f"{name} is not in 4 bits: call quantize_model(model) first")
    return {name: QLoraLinear(layer, config) for name, layer in targets.items()}


def add_qlora(model: nn.Module, config: QLoraConfig) -> dict[str, QLoraLinear]:
    """Freeze a quantized model, then put a QLoraLinear in the place of each target."""
    layers = qlora_layers(model, config)
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.training))
    return layers


def is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ in ("Conv1D", "Linear4bit")


# --- find_targets: the same lines stand in every weight method (tests/test_copy_alone.py compares)
def find_targets(model: nn.Module, target_modules: list[str] | str | None) -> dict[str, nn.Module]:
    """The layers to adapt, by name, chosen as peft does. ValueError for what cannot be right."""
    modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
    linear = [n for n, m in modules.items() if is_linear(m)]
    if any(hasattr(m, "base_layer") for m in modules.values()):
        raise ValueError("an adapter is in place already: remove it before adding another")
    if target_modules == "all-linear":  # all but the output head
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        hits = {target_modules: [n for n in linear if modules[n] is not head]}
    elif isinstance(target_modules, str):
        hits = {target_modules: [n for n in modules if re.fullmatch(target_modules, n)]}
    else:
        ends = target_modules or [""]
        hits = {end: [n for n in modules if f".{n}".endswith(f".{end}")] for end in ends}
    kinds = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in linear}))
    for entry in [t for t, names in hits.items() if not names]:
        raise ValueError(f"target_modules: {entry!r} matches no module; linear ones are: {kinds}")
    users = Counter(id(w) for m in modules.values() for w in m.parameters(recurse=False))
    found = {n: m for n, m in modules.items() if any(n in names for names in hits.values())}
    for name, layer in found.items():
        inside = [model] + [modules[name[:i]] for i, c in enumerate(name) if c == "."]
        if not is_linear(layer):
            raise ValueError(f"target {name} is a {type(layer).__name__}, not a linear layer")
        if any(isinstance(m, nn.MultiheadAttention | nn.TransformerEncoderLayer) for m in inside):
            raise ValueError(f"target {name}: PyTorch reads its weight itself and skips an adapter")
        if users[id(layer.weight)] > 1:
            raise ValueError(f"target {name} shares its weight with another module: untie it first")
    return found


def matrix(layer: nn.Module) -> Tensor:
    """The weight as (out, in). `Conv1D` stores (in, out): its name tells, its shape cannot."""
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


# --- end of find_targets


def _check() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(256, 192), torch.randn(32, 192)
    q = quantize_nf4(w)
    error = (dequantize_nf4(q) - w).norm() / w.norm()
    assert abs(q.bits() - 4.127) < 0.01
    assert 0.09 < error < 0.095, "NF4 on normal weights is off by 9.2 % (root mean square)"
    model = nn.Sequential(nn.Linear(192, 256), nn.Tanh(), nn.Linear(256, 64))
    quantize_model(model)
    plain = model(x)
    adapted = add_qlora(model, QLoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    assert torch.equal(model(x), plain), "B is zero, so nothing has changed yet"
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 4 * (192 + 256) + 4 * (256 + 64)
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    trained = model.eval()(x)
    assert trained.square().mean() < plain.square().mean()
    for name, layer in adapted.items():
        model.set_submodule(name, layer.merge_into_base())
    assert torch.allclose(model(x), trained, atol=1e-5)
    print(f"qlora.py: {q.bits():.3f} bits a weight, off by {error:.1%}; merging is exact")


if __name__ == "__main__":
    _check()
