"""QLoRA: store the frozen base in four bits, and train a LoRA on top of it.

Weights in 4 bits cannot be trained: small updates would be lost in rounding. But a frozen base is
only read. Its weights are quantized in blocks of 64. A block stores one scale, its largest absolute
value (absmax); a weight stores a 4-bit code, the index of the nearest of 16 levels. Weights are
roughly normal, so the levels of NF4 are zero and 15 quantiles of the normal distribution, scaled to
lie in [-1, 1].
Double quantization stores the scales in 8 bits. Each layer dequantizes its weight in the forward
pass and again in the backward pass, and never keeps it. For paged AdamW, see paged_adamw.py.

Paper: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.

    levels = {Φ⁻¹(p) for 8 values of p, -Φ⁻¹(p) for 7 values, and 0} / Φ⁻¹(0.9677)     (1)
    code_i = index of the level nearest w_i / absmax,  w_i ≈ absmax · levels[code_i]   (2)
    absmax ≈ offset + absmax₂ · map[code₈],            offset = mean absmax            (3)
    y = W₄ x + b + s B A x,                            s = α / r                       (4)

Φ⁻¹ is the normal quantile function. The 8 and the 7 values of p are evenly spaced from 0.9677 down
to 0.5, excluding 0.5. absmax₂ is the largest |absmax - offset| of 256 scales; map has 256 fixed
values (see `dynamic_map`). W₄ is the dequantized W.
Shapes: W (out, in), A (r, in), B (out, r). For n = out · in weights: codes (n / 2,), two per byte,
the first weight in the high 4 bits; scales (n / 64,). Trainable parameters: r · (in + out).
Bits per weight: 4 + 8/64 + 32/(64 · 256) = 4.127; without double quantization 4 + 32/64 = 4.5.

Difference from the paper: its formula for the levels is infinite at the ends; these levels are
those of bitsandbytes, the authors' library. Codes, scales and weights are the same as there, with
one exception: its CPU kernel chooses a neighbouring 8-bit code for a few scales in a thousand.

>>> model = quantize_model(model)  # in place and not reversible: the base is now the 4-bit model
>>> layers = add_qlora(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
"""

import copy
import math
import re
from dataclasses import dataclass
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def nf4_levels() -> Tensor:
    """The levels of NF4 in ascending order: 7 negative, 0, 8 positive; (16,) float32."""
    quantile = NormalDist().inv_cdf  # Φ⁻¹
    p_max = 0.9677083  # 1 - (1/32 + 1/30) / 2, rounded as in bitsandbytes to get the same bits
    p_positive = torch.linspace(p_max, 0.5, 9, dtype=torch.float32)[:-1].tolist()  # without 0.5
    p_negative = torch.linspace(p_max, 0.5, 8, dtype=torch.float32)[:-1].tolist()
    levels = [-quantile(p) for p in p_negative] + [0.0] + [quantile(p) for p in p_positive[::-1]]
    return torch.tensor(levels, dtype=torch.float32) / quantile(p_positive[0])  # (1)


def dynamic_map() -> Tensor:
    """The 256 values that an 8-bit code of a scale stands for, ascending; (256,) float32.

    The decade from 10^(k-7) to 10^(k-6), k = 0 … 6, is cut into 2^k equal intervals. The values are
    ± their midpoints, plus 0 and 1 (Dettmers 2015, arXiv 1511.04561).
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        midpoints = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [midpoints, -midpoints]
    return torch.cat(values).sort().values


NF4_CODEBOOK = nf4_levels()
NF4_MIDPOINTS = ((NF4_CODEBOOK[1:] + NF4_CODEBOOK[:-1]) / 2).tolist()
DYNAMIC_MAP = dynamic_map()
# For each byte, its two float32 levels as one int64, (256,), so that one look-up reads both.
PAIRS = torch.cartesian_prod(NF4_CODEBOOK, NF4_CODEBOOK).view(torch.int64)[:, 0]


@dataclass
class NF4:
    """A quantized tensor, with everything needed to dequantize it."""

    codes: Tensor  # (ceil(n / 2),) uint8, two weights per byte
    scales: Tensor  # (blocks,) float32, or uint8 codes with double quantization
    scale_scales: Tensor | None  # (ceil(blocks / 256),) float32, absmax₂
    offset: Tensor | None  # () float32, the mean of the scales
    shape: torch.Size  # of the original tensor
    dtype: torch.dtype  # of the original tensor
    blocksize: int  # weights per scale

    def bits(self) -> float:
        """Bits per weight, counted from the tensors."""
        sizes = [t.nbytes for t in vars(self).values() if isinstance(t, Tensor)]
        return 8 * sum(sizes) / math.prod(self.shape)


@torch.no_grad()
def quantize_nf4(weight: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4:
    """Quantize a floating-point tensor of any shape.

    Raises ValueError for integer, NaN or infinite weights, and for a blocksize that is not even.
    """
    if not isinstance(blocksize, int) or blocksize < 2 or blocksize % 2:
        raise ValueError(f"blocksize must be a positive even integer, got {blocksize!r}")
    if not weight.is_floating_point():
        raise ValueError(f"only floating-point weights can be quantized, got {weight.dtype}")
    packed = []
    scales = []
    blocks = in_blocks(weight.reshape(-1), blocksize)
    for chunk in blocks.split(chunk_size(blocks.device, blocksize)):  # small enough for the cache
        absmax = chunk.float().abs().amax(dim=1)  # (blocks of this chunk,)
        x = chunk * (1 / absmax.clamp(min=1e-38))[:, None]  # the clamp avoids 1 / 0
        code, above = torch.zeros_like(x), torch.empty_like(x)  # as floats: that is faster
        for midpoint in NF4_MIDPOINTS:  # (2): count the midpoints below x; faster than bucketize
            code += torch.gt(x, midpoint, out=above)
        packed.append((code[:, 0::2] * 16 + code[:, 1::2]).to(torch.uint8).view(-1))
        scales.append(absmax)
    codes = torch.cat(packed)[: (weight.numel() + 1) // 2].clone()  # clone frees the padding
    absmax = torch.cat(scales)
    check_finite(absmax)  # NaN or infinity in a block is also in its absmax
    quantized = quantize_scales(absmax) if double_quant else (absmax, None, None)
    return NF4(codes, *quantized, weight.shape, weight.dtype, blocksize)


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: 8-bit codes of the scales, their own scales, and the offset."""
    offset = absmax.mean()
    blocks = in_blocks(absmax - offset, 256)
    scale_scales = blocks.abs().amax(dim=1)
    midpoints = ((DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / 2).to(blocks.device)
    nearest = torch.bucketize(blocks / scale_scales.clamp(min=1e-38)[:, None], midpoints)  # (3)
    return nearest.to(torch.uint8).view(-1)[: len(absmax)].clone(), scale_scales, offset


@torch.no_grad()
def dequantize_nf4(q: NF4, dtype: torch.dtype | None = None) -> Tensor:
    """Dequantize to the original shape; to the original dtype if none is given."""
    absmax = q.scales
    if q.offset is not None:
        table = DYNAMIC_MAP.to(q.codes.device)
        blocks = in_blocks(table[q.scales.int()], 256) * q.scale_scales[:, None]
        absmax = blocks.view(-1)[: len(q.scales)] + q.offset  # (3)
    pairs, size = PAIRS.to(q.codes.device), chunk_size(q.codes.device, q.blocksize)
    out = absmax.new_empty((len(absmax), q.blocksize), dtype=dtype or q.dtype)
    chunks = in_blocks(q.codes, q.blocksize // 2).split(size), absmax.split(size), out.split(size)
    for codes, scales, part in zip(*chunks, strict=True):
        levels = pairs.index_select(0, codes.reshape(-1).int()).view(torch.float32)
        torch.mul(levels.view(-1, q.blocksize), scales[:, None], out=part)  # (2)
    return out.view(-1)[: math.prod(q.shape)].view(q.shape)


def in_blocks(x: Tensor, blocksize: int) -> Tensor:
    """A flat tensor as (blocks, blocksize), padded with zeros."""
    return F.pad(x, (0, -len(x) % blocksize)).view(-1, blocksize)


def chunk_size(device: torch.device, blocksize: int) -> int:
    """The number of blocks to process at once. On a CPU, 2^17 weights fit into its cache; on a GPU,
    more are faster, but all at once would take much memory."""
    return max((2**17 if device.type == "cpu" else 2**22) // blocksize, 1)


def check_finite(weight: Tensor) -> None:
    if not weight.isfinite().all():
        raise ValueError("the weight has NaN or infinite entries: it cannot be quantized")


class _Linear4bitFunction(torch.autograd.Function):
    """x Wᵀ + b with W dequantized in both passes. `F.linear` alone would keep W in memory from the
    forward pass to the backward pass, where the gradient of x needs it."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, q: NF4) -> Tensor:
        ctx.q = q  # keep the codes, not W
        return F.linear(x, dequantize_nf4(q, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        for_x, for_bias, _ = ctx.needs_input_grad
        grad_x = grad @ dequantize_nf4(ctx.q, grad.dtype) if for_x else None  # (…, out) @ (out, in)
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if for_bias else None  # (out,)
        return grad_x, grad_bias, None


class QuantizedLinear(nn.Module):
    """Base class of quantized linear layers: their `weight` (out, in) is computed on demand.

    A subclass has buffers, among them `codes`, and a method `dequantize(dtype)`.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.out_features, self.in_features = matrix(base_layer).shape
        self.bias, self.dtype = base_layer.bias, base_layer.weight.dtype
        shell = copy.copy(base_layer)  # the original layer without its weight, for `plain`
        shell._parameters = {}
        self.shell = [shell]  # in a list, so that PyTorch does not register it as a submodule

    weight = property(lambda self: self.dequantize(self.dtype))

    def _apply(self, fn, recurse: bool = True):
        """`.to()`, `.half()` and so on move codes and scales to another device, without a cast."""
        buffers = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        device = self.codes.device
        for name, buffer in buffers.items():
            self._buffers[name] = buffer.to(device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # the dtype that fn casts to
        return self

    def plain(self, weight: Tensor | None = None) -> nn.Module:
        """A frozen, unquantized layer of the original class with this weight (out, in), by default
        the layer's own, dequantized to float32 or wider."""
        wide = torch.promote_types(self.dtype, torch.float32)
        w = self.dequantize(wide) if weight is None else weight
        layer = copy.copy(self.shell[0])
        transposed = type(layer).__name__ == "Conv1D"
        bias = None if self.bias is None else nn.Parameter(self.bias.to(w.dtype, copy=True))
        w = nn.Parameter(w.t().contiguous() if transposed else w)
        layer._parameters = {"weight": w, "bias": bias}
        return layer.requires_grad_(False)


class Linear4bit(QuantizedLinear):
    """A frozen linear layer in NF4: x (…, in) -> y (…, out), in compute_dtype or the dtype of x.

    base_layer: `nn.Linear` or transformers' `Conv1D`. The state dict holds codes, scales and bias.
    """

    def __init__(self, base_layer: nn.Module, blocksize=64, double_quant=True, compute_dtype=None):
        super().__init__(base_layer)
        if compute_dtype is not None and not getattr(compute_dtype, "is_floating_point", False):
            raise ValueError(f"compute_dtype must be a floating-point dtype, got {compute_dtype!r}")
        q = quantize_nf4(matrix(base_layer).detach().contiguous(), blocksize, double_quant)
        for name in ("codes", "scales", "scale_scales", "offset"):
            self.register_buffer(name, getattr(q, name))
        self.shape, self.blocksize, self.compute_dtype = q.shape, blocksize, compute_dtype

    @property
    def quantized(self) -> NF4:
        return NF4(**self._buffers, shape=self.shape, dtype=self.dtype, blocksize=self.blocksize)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return dequantize_nf4(self.quantized, dtype)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.to(self.compute_dtype or x.dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return _Linear4bitFunction.apply(inputs, bias, self.quantized).to(x.dtype)


class Linear8bit(QuantizedLinear):
    """A linear layer with one scale per row, W ≈ scale · int8: plain rounding, for inference."""

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        w = matrix(base_layer).detach().float()
        check_finite(w)
        self.register_buffer("scales", w.abs().amax(dim=1) / 127)  # (out,)
        self.register_buffer(
            "codes", (w / self.scales.clamp(min=1e-38)[:, None]).round().to(torch.int8)
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return (self.codes * self.scales[:, None]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantize(x.dtype), bias)


class QLoraLinear(nn.Module):
    """A frozen 4-bit layer plus a trainable low-rank update, equation (4).

    config: a LoraConfig (lora.py), or any object with its r, lora_alpha, lora_dropout, use_rslora.
    """

    def __init__(self, base_layer: Linear4bit, config):
        super().__init__()
        self.base_layer, self.r = base_layer, config.r
        device = base_layer.codes.device
        self.out_features, self.in_features = base_layer.out_features, base_layer.in_features
        divisor = math.sqrt(self.r) if config.use_rslora else self.r  # rsLoRA, see lora.py
        self.scaling = config.lora_alpha / divisor  # s
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        self.lora_A = nn.Linear(self.in_features, self.r, bias=False).to(device)
        self.lora_B = nn.Linear(self.r, self.out_features, bias=False).to(device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.register_buffer("merged_weight", None, persistent=False)  # W' (out, in) while merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("this layer is merged: call unmerge() to train, or model.eval()")
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.merged_weight.to(x.dtype), bias)
        y = self.base_layer(x)  # (…, out)
        x = self.lora_dropout(x.to(self.lora_A.weight.dtype))  # (…, in)
        return y + self.lora_B(self.scaling * self.lora_A(x)).to(y.dtype)  # (4)

    bias = property(lambda self: self.base_layer.bias)

    @property
    def weight(self) -> Tensor:
        """W', for code that reads a layer's weight instead of calling the layer."""
        return self.merged().to(self.base_layer.dtype)

    def delta(self) -> Tensor:
        """The update s B A, (out, in)."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)  # (out, r) @ (r, in)

    def merged(self) -> Tensor:
        """The merged weight W' = W₄ + s B A, (out, in), in float32: not quantized again."""
        return self.base_layer.dequantize(torch.float32) + self.delta()

    @torch.no_grad()
    def merge(self) -> None:
        """Store W' in float32; from now on `forward` uses it. The codes do not change."""
        self.merged_weight = self.merged()

    def unmerge(self) -> None:
        """Discard W'. Outputs are again exactly those of the 4-bit layer plus the adapter."""
        self.merged_weight = None

    @torch.no_grad()
    def lost_by_rounding(self) -> float:
        """Error of quantizing W' again, relative to the update s B A (which must not be zero).

        Above 1, the error of storing W' in 4 bits is larger than what was learned.
        """
        merged, q = self.merged(), self.base_layer.quantized
        again = dequantize_nf4(quantize_nf4(merged, q.blocksize, q.offset is not None))
        return ((again - merged).norm() / self.delta().norm()).item()


def quantize_model(model: nn.Module, bits: int = 4, **options) -> nn.Module:
    """Replace every linear layer except the output head with a quantized one. Return the model.

    In place and not reversible. Embeddings and norms keep their dtype. A model declares its head
    with `get_output_embeddings`; without it, all linear layers are quantized. A subclass of
    nn.Linear that computes something else, with a `forward` of its own, is left as it is. bits is 4
    or 8; for 4, the options are those of `Linear4bit`. Raises ValueError, before anything changes,
    for other bits, for a bad blocksize, for weights that are not finite, and for a model with an
    adapter.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits!r}")
    if any(hasattr(m, "base_layer") for m in model.modules()):
        raise ValueError("the model has an adapter: quantize it before adding one")
    if quantized_layers(model):
        raise ValueError("the model is quantized already")
    layer_class = {4: Linear4bit, 8: Linear8bit}[bits]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    new = {}  # from a layer to its quantized form
    for m in model.modules():
        linear = type(m).forward is nn.Linear.forward or type(m).__name__ == "Conv1D"
        if linear and m is not head:
            new[m] = layer_class(m, **options).requires_grad_(False).train(model.training)
    for name, m in list(model.named_modules(remove_duplicate=False)):  # under each of its names
        if m in new:
            model.set_submodule(name, new[m])
    return model


def add_qlora(model: nn.Module, config) -> dict[str, QLoraLinear]:
    """Freeze a quantized model and replace each target with a QLoraLinear. Return the new layers.

    Raises ValueError if no 4-bit layer matches `config.target_modules`.
    """
    if any(hasattr(m, "base_layer") for m in model.modules()):
        raise ValueError("the model already has an adapter: remove it before adding another")
    layers = {
        name: QLoraLinear(layer, config)
        for name, layer in quantized_layers(model).items()
        if isinstance(layer, Linear4bit) and is_target(name, config.target_modules)
    }
    if not layers:
        raise ValueError(
            f"target_modules={config.target_modules!r} matches no 4-bit layer: check the names, "
            "and call quantize_model(model) first"
        )
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.training))
    return layers


def is_target(name: str, targets: list[str] | str | None) -> bool:
    """Whether `targets` (a list of endings, or a regex, or "all-linear") selects this name."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return f".{name}".endswith(tuple(f".{ending}" for ending in targets or []))


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """A model's quantized layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def bits_per_weight(model: nn.Module) -> float | None:
    """Bits per weight of the quantized layers, counted from their tensors; None without any."""
    layers = quantized_layers(model).values()
    bits = sum(8 * buffer.nbytes for layer in layers for buffer in layer.buffers())
    return bits / sum(q.in_features * q.out_features for q in layers) if layers else None


def matrix(layer: nn.Module) -> Tensor:
    """The weight as (out, in); a view, not a copy. transformers' `Conv1D` stores (in, out)."""
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


if __name__ == "__main__":  # a 4-bit layer, and a LoRA that recovers a change of its weight
    from types import SimpleNamespace

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    w, change = torch.randn(64, 64), torch.randn(64, 2) @ torch.randn(2, 64)
    model[0].weight.data = w
    lora = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "use_rslora": False}
    config = SimpleNamespace(target_modules="all-linear", **lora)
    (layer,) = add_qlora(quantize_model(model), config).values()
    w4 = (
        layer.base_layer.weight
    )  # the goal is w4 + change, so that the LoRA need not correct the rounding too
    error = (w4 - w).norm() / w.norm()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(300):
        x = torch.randn(64, 64)
        F.mse_loss(model(x), x @ (w4 + change).T).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (layer.delta() - change).norm() < 0.01 * change.norm()
    print(f"qlora.py: relative error of the weights {error:.1%}; LoRA recovered the change")
