r"""QLoRA: keep the frozen base in four bits, and train a LoRA on top of it.

A frozen weight is only read, so it can be stored coarsely: each block of 64 weights as one scale,
the block's largest absolute value, and a 4-bit code a weight, the nearest of 16 levels. The levels
of NF4 are quantiles of the normal distribution, because weights are roughly normal, with an exact
zero and ends at -1 and 1. The scales themselves are quantized once more to 8 bits (double
quantization). In every forward and backward pass a layer's weight is computed again from its
codes, used and dropped.

Paper: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.

    levels: Φ⁻¹ at 8 even steps from 0.9677 down to 0.5, -Φ⁻¹ at 7, and 0, all / the largest (1)
    code_i = nearest level to w_i / absmax,    w_i ≈ absmax · level[code_i]          (2)  section 3
    absmax ≈ offset + absmax₂ · map[code₈],    in blocks of 256 scales               (3)

Shapes: W (out, in), codes (ceil(n / 2),) of n = out · in weights, two a byte, the first in the high
half; scales (ceil(n / 64),).
Bits a parameter: 4 + 8/64 + 32/(64 · 256) = 4.127; without double quantization 4 + 32/64 = 4.5.

Where we differ. From the paper: eq. 4 taken literally has infinite ends; the levels above are those
of its code, bitsandbytes. From bitsandbytes: the same bits, but for the 8-bit codes of the scales
on a CPU, where it takes a neighbour of the nearest value in a few of a thousand. A merged layer is
a plain one that holds W', and is not rounded to 4 bits again; `lost_by_rounding` tells why.

>>> quantize_model(model)  # in place, not reversible: from here on the base is the 4-bit model
>>> layers = add_qlora(model, QLoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
>>> optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
"""

import math
import re
from collections import Counter, OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def nf4_levels() -> Tensor:
    """The 16 levels of equation (1), computed; (16,) float32."""

    def quantiles(n: int) -> Tensor:
        p = torch.linspace(0.9677083, 0.5, n + 1, dtype=torch.float32)[:-1]
        return torch.tensor([NormalDist().inv_cdf(q) for q in p.tolist()], dtype=torch.float32)

    levels = torch.cat((-quantiles(7), torch.zeros(1), quantiles(8))).sort().values
    return levels / levels.max()


def dynamic_map() -> Tensor:
    """The 256 values of the signed 8-bit code of the scales, sorted; (256,) float32.

    Dettmers 2015 (arXiv 1511.04561): seven decades, the e-th below 1 cut into ever fewer equal
    steps (64, 32, … 1), of which the middles are taken, with either sign; and 0 and 1.
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
PAIRS = torch.stack(  # what a byte stands for: the levels of its high and its low half, (256, 2),
    (NF4_CODEBOOK.repeat_interleave(16), NF4_CODEBOOK.repeat(16)), dim=1
).view(torch.float64)[:, 0]  # seen as one number of 8 bytes, (256,): that is looked up faster


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

    def tensors(self) -> list[Tensor]:
        kept = (self.codes, self.scales, self.scale_scales, self.offset)
        return [t for t in kept if t is not None]

    def bits(self) -> float:
        """Bits a parameter, counted from the tensors."""
        return 8 * sum(t.nbytes for t in self.tensors()) / math.prod(self.shape)


def blocks_at_once(codes: Tensor, blocksize: int) -> int:
    """How many blocks to work on at once: what stays in a processor's cache; more on a GPU."""
    return max((2**17 if codes.device.type == "cpu" else 2**22) // blocksize, 1)


def in_blocks(x: Tensor, blocksize: int) -> Tensor:
    """A flat tensor as (blocks, blocksize), filled up with zeros."""
    return F.pad(x, (0, -len(x) % blocksize)).view(-1, blocksize)


@torch.no_grad()
def quantize_nf4(weight: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4:
    """A float tensor of any shape in NF4, equations (2) and (3).

    Raises ValueError for a weight that is not finite or no float, and a blocksize that is not a
    positive even number.
    """
    if not isinstance(blocksize, int) or blocksize < 2 or blocksize % 2:
        raise ValueError(f"blocksize is {blocksize!r}: give a positive even number")
    if not weight.is_floating_point():
        raise ValueError(f"a weight of {weight.dtype} cannot be quantized: give floats")
    n = weight.numel()
    rows = in_blocks(weight.reshape(-1), blocksize)  # (blocks, blocksize)
    scales, packed = [], []
    for part in rows.split(blocks_at_once(rows, blocksize)):
        part = part.float()
        absmax = part.abs().amax(dim=1)
        x = (part * (1 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
        code = torch.zeros_like(x, dtype=torch.uint8)
        for midpoint in NF4_MIDPOINTS:  # on a midpoint the lower level wins
            code += x > midpoint
        code = code.view(-1)
        packed.append((code[0::2] << 4) | code[1::2])
        scales.append(absmax)
    codes, absmax = torch.cat(packed)[: (n + 1) // 2].clone(), torch.cat(scales)
    check_finite(absmax)  # what is not finite in a block is in its absmax
    if not double_quant:
        return NF4(codes, absmax, None, None, weight.shape, weight.dtype, blocksize)
    offset = absmax.mean()
    rows = in_blocks(absmax - offset, 256)
    scale_scales = rows.abs().amax(dim=1)
    x = rows / scale_scales.clamp(min=1e-38)[:, None]
    table = DYNAMIC_MAP.to(x.device)
    middles = (table[1:] + table[:-1]) / 2
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


# --- layers that hold quantized weights ---


class _Linear4bitFunction(torch.autograd.Function):
    """x W^T + b with W computed from its codes in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, q: NF4) -> Tensor:
        ctx.q = q  # the codes alone are kept, not W
        return F.linear(x, dequantize_nf4(q, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize_nf4(ctx.q, grad.dtype)  # (…, out) (out, in)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_bias, None


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
        for name, buffer in floats.items():
            self._buffers[name] = (
                fn(buffer.reshape(-1).view(torch.uint8)).view(buffer.dtype).view(buffer.shape)
            )
        return self


class Linear4bit(_Quantized):
    """A frozen linear layer in NF4. x (…, in) -> y (…, out), in x's dtype or `compute_dtype`.

    Takes the weight of `nn.Linear` or transformers' `Conv1D`. The state dict holds the 4-bit form.
    """

    def __init__(
        self,
        layer: nn.Module,
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ):
        super().__init__(layer)
        q = quantize_nf4(matrix(layer).detach().contiguous(), blocksize, double_quant)
        for name in ("codes", "scales", "scale_scales", "offset"):
            self.register_buffer(name, getattr(q, name))
        self.dtype, self.blocksize, self.compute_dtype = q.dtype, blocksize, compute_dtype

    @property
    def quantized(self) -> NF4:
        shape = torch.Size((self.out_features, self.in_features))
        parts = (self.codes, self.scales, self.scale_scales, self.offset)
        return NF4(*parts, shape, self.dtype, self.blocksize)

    @property
    def weight(self) -> Tensor:
        """W (out, in) as the codes have it, computed anew."""
        return dequantize_nf4(self.quantized)

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
        scales = w.abs().amax(dim=1) / 127  # (out,)
        codes = (w / scales.clamp(min=1e-38)[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.dtype = layer.weight.dtype

    @property
    def weight(self) -> Tensor:
        """W (out, in) as the codes have it, computed anew."""
        return (self.codes * self.scales[:, None]).to(self.dtype)

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
    make = (lambda layer: Linear4bit(layer, **options)) if bits == 4 else Linear8bit
    found = find_targets(model, "all-linear")
    layers = {name: make(layer) for name, layer in found.items()}
    for name, layer in layers.items():
        layer.requires_grad_(False).train(model.training)
        model.set_submodule(name, layer)
    return layers


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """A model's quantized layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _Quantized)}


def bits_per_weight(model: nn.Module) -> float | None:
    """Bits a weight of the quantized layers, counted from their tensors; None without any."""
    layers = quantized_layers(model).values()
    held = sum(8 * buffer.nbytes for layer in layers for buffer in layer.buffers())
    return held / sum(q.in_features * q.out_features for q in layers) if layers else None


def prepare_model_for_kbit_training(
    model: nn.Module, use_gradient_checkpointing: bool = True
) -> nn.Module:
    """Ready a quantized model for training, as peft's function of this name does; in place.

    It is frozen; what is not quantized (norms, head, embeddings) goes to float32, since half
    precision is too coarse for norms and for the loss; and only the blocks' inputs are kept for
    the backward pass, for which the first block's input has to need a gradient.
    """
    model.requires_grad_(False)
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.float()
    if use_gradient_checkpointing:
        model.get_input_embeddings().register_forward_hook(lambda _, x, y: y.requires_grad_())
        model.gradient_checkpointing_enable()
    return model


# --- LoRA on a 4-bit layer ---


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
        self.base_layer, r = base_layer, config.r
        self.out_features, self.in_features = base_layer.out_features, base_layer.in_features
        self.scaling = config.lora_alpha / r
        self.lora_dropout = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        )
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

    def merged(self) -> Tensor:
        """W' = W₄ + (α / r) B A, (out, in), in float32: exact, because it is not rounded back."""
        return self.weight.float() + self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with W', in full size, from now on. The codes stay untouched."""
        self.merged_weight = self.merged()

    def unmerge(self) -> None:
        """Drop W'. The layer is what it was, to the bit."""
        self.merged_weight = None

    @torch.no_grad()
    def merge_into_base(self) -> nn.Linear:
        """A plain float32 linear layer that holds W'. The 4-bit layer stays as it was."""
        return plain_linear(self.merged(), self.bias)

    @torch.no_grad()
    def lost_by_rounding(self) -> float:
        """What storing W' in 4 bits again would lose: ‖Q(W') - W'‖ / ‖W' - W₄‖.

        Above 1, the rounding is larger than all that was learned.
        """
        w, merged = self.weight.float(), self.merged()
        again = dequantize_nf4(quantize_nf4(merged, self.base_layer.blocksize))
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
    model.requires_grad_(False)
    layers = qlora_layers(model, config)
    for name, layer in layers.items():
        layer.train(model.training)
        model.set_submodule(name, layer)
    return layers


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with this weight (out, in), and a copy of the bias in its dtype."""
    layer = nn.Linear(*reversed(weight.shape), bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype).clone(), requires_grad=False)
    return layer


def dequantize_model(model: nn.Module) -> nn.Module:
    """Put plain linear layers in the place of the quantized ones. Rounding is not undone."""
    for name, layer in quantized_layers(model).items():
        model.set_submodule(name, plain_linear(layer.weight, layer.bias))
    return model


# --- an optimizer whose state is paged ---


MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Page:
    """A piece of the optimizer's state: first and second moments of some runs of parameters."""

    home: Tensor  # (2, elements) in host memory
    device: torch.device
    runs: list[tuple[nn.Parameter, int, int]] = field(default_factory=list)  # parameter, from, to

    @property
    def room(self) -> int:
        return self.home.shape[1] - sum(end - start for _, start, end in self.runs)

    def parts(self, memory: Tensor):
        """For each run (parameter, from, to, its first moment, its second moment) in `memory`."""
        sizes = [end - start for _, start, end in self.runs] + [self.room]
        for run, *moments in zip(self.runs, *(row.split(sizes) for row in memory), strict=False):
            yield *run, *moments


class PagedAdamW(torch.optim.Optimizer):
    """AdamW whose moments live in host memory, in pages, with a few of them on the device.

    A page that is needed and not there is fetched (a fault); where that exceeds the budget, the
    page that was used longest ago is written back and dropped (an eviction). Walking the pages in
    the same order every step never finds one that stayed, however large the budget, as long as it
    is below the state: the next page needed is always the one just dropped. `alternate` turns round
    after every step, and finds what was used last.

    Numbers and state dict are those of `torch.optim.AdamW(foreach=False, fused=False)`, to the bit.
    `counters` has hits, faults, evictions, bytes_in and bytes_out. Raises ValueError for a budget
    below one page, or a page that holds no element. Section 3, "Paged Optimizers".
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        page_bytes: int = 2**20,
        device_budget_bytes: int = 2**24,
        alternate: bool = True,
    ):
        if page_bytes < 16:
            raise ValueError(f"page_bytes is {page_bytes}: an element takes up to 16")
        if device_budget_bytes < page_bytes:
            raise ValueError(
                f"a budget of {device_budget_bytes} bytes is below one page of {page_bytes}"
            )
        self.page_bytes, self.budget, self.alternate = page_bytes, device_budget_bytes, alternate
        self.pages: list[Page] = []
        self.resident: OrderedDict[int, Tensor] = OrderedDict()  # the least recently used first
        self.streams: dict[torch.device, torch.cuda.Stream] = {}  # for copies, a GPU each
        self.counters = dict.fromkeys(("hits", "faults", "evictions", "bytes_in", "bytes_out"), 0)
        self.steps = 0
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, group: dict) -> None:
        """Add parameters; small ones share pages, large ones take several."""
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_contiguous():
                raise ValueError("a parameter that is not contiguous cannot be paged")
            at, kind = 0, (p.dtype, p.device)
            while at < p.numel():
                like = [page for page in self.pages if (page.home.dtype, page.device) == kind]
                if not like or not like[-1].room:
                    size = self.page_bytes // (2 * p.element_size())
                    home = torch.zeros(2, size, dtype=p.dtype, device="cpu")
                    home = home.pin_memory() if p.device.type == "cuda" else home
                    like = [Page(home, p.device)]
                    self.pages += like
                end = min(at + like[-1].room, p.numel())
                like[-1].runs.append((p, at, end))
                at = end

    def beside(self, device: torch.device):
        """Copies made in this context run beside the arithmetic, where a GPU has a second stream.

        They wait for the arithmetic that was asked for before.
        """
        if device.type != "cuda":
            return nullcontext()
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        self.streams[device].wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self.streams[device])

    def fetch(self, index: int) -> None:
        """See to it that a page is on its device, where `resident` has it: (2, elements)."""
        page, count = self.pages[index], self.counters
        if index in self.resident:
            count["hits"] += 1
            self.resident.move_to_end(index)
            return
        count["faults"] += 1
        memory = None
        with self.beside(page.device):
            while self.resident and (len(self.resident) + 1) * self.page_bytes > self.budget:
                memory = self.evict(next(iter(self.resident)))
            if memory is None or (memory.dtype, memory.device) != (page.home.dtype, page.device):
                memory = torch.empty_like(page.home, device=page.device)
            self.resident[index] = memory.copy_(page.home, non_blocking=True)
        count["bytes_in"] += page.home.nbytes

    def evict(self, index: int) -> Tensor:
        """Write a page back and drop it from the device; returns its memory for another."""
        memory = self.resident.pop(index)
        self.pages[index].home.copy_(memory, non_blocking=True)
        self.counters["evictions"] += 1
        self.counters["bytes_out"] += memory.nbytes
        return memory

    @torch.no_grad()
    def step(self, closure=None):
        """One step of AdamW, page by page."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        stepped = {p for p in group_of if p.grad is not None}
        for p in stepped:
            if p not in self.state:
                self.state[p]["step"] = torch.zeros((), device="cpu")
            self.state[p]["step"] += 1
        order = [i for i, page in enumerate(self.pages) if any(p in stepped for p, *_ in page.runs)]
        if self.alternate and self.steps % 2:
            order.reverse()
        ahead = self.budget >= 2 * self.page_bytes
        for n, index in enumerate(order):
            page = self.pages[index]
            if n == 0 or not ahead:
                self.fetch(index)
            if page.device in self.streams:  # this page's copy has to be there, not the next one's
                torch.cuda.current_stream(page.device).wait_stream(self.streams[page.device])
            if ahead and n + 1 < len(order):
                self.fetch(order[n + 1])
            for p, start, end, first, second in page.parts(self.resident[index]):
                if p not in stepped:
                    continue
                group, t = group_of[p], self.state[p]["step"].item()
                lr, (beta1, beta2) = group["lr"], group["betas"]
                part, grad = p.view(-1)[start:end], p.grad.reshape(-1)[start:end]
                part.mul_(1 - lr * group["weight_decay"])
                first.lerp_(grad, 1 - beta1)
                second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                root = second.sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
                part.addcdiv_(first, root, value=-lr / (1 - beta1**t))
        self.steps += 1
        return loss

    def wait(self) -> None:
        """Until all copies have arrived."""
        for stream in self.streams.values():
            stream.synchronize()

    def state_dict(self) -> dict:
        """As AdamW's: step, exp_avg and exp_avg_sq of every parameter that has been stepped."""
        self.wait()
        packed = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        moments = {p: torch.empty(2, p.numel(), dtype=p.dtype, device="cpu") for p in parameters}
        for index, page in enumerate(self.pages):
            for p, start, end, *both in page.parts(self.resident.get(index, page.home)):
                for whole, part in zip(moments[p], both, strict=True):
                    whole[start:end] = part
        for i, state in packed["state"].items():
            exp_avg, exp_avg_sq = (m.view_as(parameters[i]) for m in moments[parameters[i]])
            packed["state"][i] = state | {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return packed

    def load_state_dict(self, state_dict: dict) -> None:
        """Take AdamW's or our own state over. Raises ValueError for a state of another shape."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, state in state_dict["state"].items():
            if state["exp_avg"].shape != parameters[i].shape:
                raise ValueError(
                    f"the state of parameter {i} has the shape {tuple(state['exp_avg'].shape)}, "
                    f"the parameter {tuple(parameters[i].shape)}"
                )
        self.wait()
        super().load_state_dict(state_dict)
        self.resident.clear()
        for page in self.pages:
            page.home.zero_()
            for p, start, end, *both in page.parts(page.home):
                for name, part in zip(MOMENTS, both, strict=True):
                    if p in self.state:
                        part.copy_(self.state[p][name].reshape(-1)[start:end])
        for state in self.state.values():
            for name in MOMENTS:
                del state[name]


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
        hits = {
            t: [n for n in modules if f".{n}".endswith(f".{t}")] for t in target_modules or [""]
        }
    kinds = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in linear}))
    for entry in [t for t, names in hits.items() if not names]:
        raise ValueError(f"target_modules: {entry!r} matches no module; linear ones are: {kinds}")
    users = Counter(id(w) for m in modules.values() for w in m.parameters(recurse=False))
    for name in (names := [n for n in modules if any(n in found for found in hits.values())]):
        inside = [model] + [modules[name[:i]] for i, c in enumerate(name) if c == "."]
        if not is_linear(modules[name]):
            raise ValueError(
                f"target {name} is a {type(modules[name]).__name__}, not a linear layer"
            )
        if any(isinstance(m, nn.MultiheadAttention | nn.TransformerEncoderLayer) for m in inside):
            raise ValueError(
                f"target {name}: PyTorch reads this weight itself and skips an adapter"
            )
        if users[id(modules[name].weight)] > 1:
            raise ValueError(f"target {name} shares its weight with another module: untie it first")
    return {name: modules[name] for name in names}


# --- end of find_targets


# --- matrix: the same lines stand in every weight method
def matrix(layer: nn.Module) -> Tensor:
    """The weight as (out, in). `Conv1D` stores (in, out): its name tells, its shape cannot."""
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


# --- end of matrix


def _check() -> None:
    torch.manual_seed(0)
    w = torch.randn(256, 192)
    q = quantize_nf4(w)
    error = (dequantize_nf4(q) - w).norm() / w.norm()
    assert abs(q.bits() - 4.127) < 0.01
    assert 0.09 < error < 0.095, "NF4 on normal weights is off by 9.2 % (root mean square)"
    model = nn.Sequential(nn.Linear(192, 256), nn.Tanh(), nn.Linear(256, 64))
    layers = quantize_model(model)
    x = torch.randn(32, 192)
    plain = model(x)
    by_hand = layers["2"](torch.tanh(F.linear(x, layers["0"].weight, layers["0"].bias)))
    assert torch.equal(plain, by_hand)
    adapted = add_qlora(model, QLoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    assert torch.equal(model(x), plain), "B is zero, so nothing has changed yet"
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 4 * (192 + 256) + 4 * (256 + 64)
    optimizer, goal = torch.optim.AdamW(trainable, lr=1e-2), torch.randn(32, 64)
    for _ in range(20):
        loss = F.mse_loss(model(x), goal)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < F.mse_loss(plain, goal)
    trained = model.eval()(x)
    for name, layer in adapted.items():
        model.set_submodule(name, layer.merge_into_base())
    assert torch.allclose(model(x), trained, atol=1e-5)
    print(f"qlora.py: {q.bits():.3f} bits a weight, off by {error:.1%}; merging is exact")


if __name__ == "__main__":
    _check()
