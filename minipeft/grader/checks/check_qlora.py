"""What is graded in qlora.py."""

import copy
import math
import re
from collections.abc import Callable
from itertools import pairwise, product
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import skeleton
from ..judge import Checks, load
from ..symptoms import (
    Draw,
    Wrong,
    ensure,
    like,
    same,
    set_factor,
    show,
    trainable,
    unchanged,
    with_case,
)  # fmt: skip
from .common import compare_losses, describe, losses

CHECKS = Checks("qlora")
LEVELS = torch.tensor([  # those of bitsandbytes
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip
# Shape and block size: from the smallest case to larger ones. A block may be incomplete.
SHAPES = (((2,), 2), ((1, 4), 2), ((2, 3), 4), ((3, 8), 4), ((2, 35), 64), ((13, 10), 64))
# in, out, r, α, bias, rslora
CASES = ((2, 2, 1, 1.0, False, False), (4, 3, 2, 6.0, True, False), (5, 7, 4, 8.0, True, True))
values, reference = {}, None


def prepare(level: str, given: dict | None) -> None:
    """Read what the checks of a level need, as long as minipeft can be imported."""
    global reference
    if level == "values":
        values.update(given or skeleton.stored("qlora"))
    if level == "losses":
        describe()
        reference = load("reference", skeleton.reference("qlora").read_text(), "reference")


# --- NF4, by formulas of its own ---


def dynamic_map() -> Tensor:
    """What the codes of scales stand for: ± the midpoints of 2^k intervals per decade, 0 and 1."""
    positive = [
        10.0 ** (k - 6) * (0.1 + 0.9 * (i + 0.5) / 2**k) for k in range(7) for i in range(2**k)
    ]
    return torch.tensor(sorted([0.0, 1.0, *positive, *(-p for p in positive)]))


MAP = dynamic_map()


def per_weight(scales: Tensor, n: int, blocksize: int) -> Tensor:
    """The scale of each weight, (n,)."""
    return scales.repeat_interleave(blocksize)[:n]


def absmax_of(w: Tensor, blocksize: int) -> Tensor:
    return torch.stack([block.abs().max() for block in w.flatten().split(blocksize)])


def nearest(x: Tensor, levels: Tensor = LEVELS) -> Tensor:
    return (x.double()[:, None] - levels.double()).abs().argmin(1)


def pack(codes: Tensor) -> Tensor:
    """Two codes per byte, the first in the high 4 bits."""
    pairs = F.pad(codes, (0, len(codes) % 2), value=7).view(-1, 2)
    return (16 * pairs[:, 0] + pairs[:, 1]).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed.long() // 16 % 16, packed.long() % 16), 1).view(-1)


class Suspects:
    """The known mistakes that explain what a student's code gave in every case so far."""

    def __init__(self):
        self.left, self.symptom = None, ""

    def add(self, got: Tensor, guesses: dict[str, Tensor], symptom: str, x=None) -> None:
        """A case's result, the results of the mistakes, and what is wrong ("" if nothing is).

        x: what was rounded to the result. Where it is ±1 up to rounding, the mistakes do not count.
        """
        inside = torch.ones_like(got).bool() if x is None else x.abs() < 1 - 1e-5
        few = 0.02 * inside.sum()  # rounding may change some more
        close = {k for k, v in guesses.items() if (v != got)[inside].sum() <= few}
        self.left = close if self.left is None else self.left & close
        self.symptom = self.symptom or symptom

    def report(self, what: str) -> None:
        """Raise Wrong with the only mistake that is left, or else with the first symptom."""
        if self.symptom and len(self.left) == 1:
            raise Wrong(f"{what} is wrong: {self.left.pop()}")
        ensure(not self.symptom, self.symptom)


class Quantized:
    """Random codes and scales, the weight that they stand for, and the student's NF4 of them."""

    def __init__(self, m: ModuleType, draw: Draw, shape: tuple, blocksize: int,
                 dtype: torch.dtype = torch.float32):  # fmt: skip
        n = math.prod(shape)
        self.codes = draw.tokens(16, n)
        self.codes[draw.integer(0, n - 1)] = 0
        self.scales = draw.normal(-(-n // blocksize)).abs() + 0.1
        self.each = per_weight(self.scales, n, blocksize)
        self.w = (LEVELS[self.codes] * self.each).view(shape)
        self.q = m.NF4(pack(self.codes), self.scales, None, None, torch.Size(shape), dtype,
                       blocksize)  # fmt: skip
        self.text = f"shape {shape}, blocks of {blocksize}, codes {show(self.codes)}"


def called(function: Callable, *arguments):
    """What a student's function returns; two errors of torch in plainer words."""
    try:
        return function(*arguments)
    except IndexError as error:
        if "mask" in str(error):
            raise Wrong("a uint8 tensor as an index is a mask: convert it with .int()") from None
        raise
    except RuntimeError as error:
        text = str(error)
        if "a gradient different than None at position 2" in text:
            raise Wrong("if the bias is None, its gradient must be None") from None
        found = re.search(r"gradient at index (\d) - got (.*) but expected .* with (.*)", text)
        if found:
            name = ("x", "the bias", "q")[int(found[1])]
            raise Wrong(
                f"the gradient of {name} has the shape {found[2]}, expected {found[3]}"
            ) from None
        raise


# --- the tasks ---


@CHECKS.add("pieces", "levels")
def levels(m: ModuleType, draw: Draw) -> None:
    with patch.object(m, "NF4_CODEBOOK", torch.full((16,), torch.nan)):
        got = m.nf4_levels()
    if isinstance(got, Tensor) and got.shape == LEVELS.shape:
        like("nf4_levels()", got, LEVELS)
        ensure(not got.isnan().all(), "nf4_levels() must compute the levels: it returns the table")
        ensure(got.eq(0).sum() < 2, "0 is in the levels twice: 0.5 is not one of the p's")
        if not torch.allclose(got, LEVELS, atol=1e-4) and got.any():
            ensure(got.eq(0).any(), f"0 is none of the levels: they are {show(got)}")
            ordered = torch.allclose(got.sort().values, LEVELS, atol=1e-4)
            ensure(not ordered, f"the levels are not in ascending order: {show(got)}")
    else:
        ensure(isinstance(got, Tensor), f"the levels must be a tensor, not {type(got).__name__}")
        zero = "" if got.eq(0).any() else ", and 0 is none of them"
        ensure(got.shape == LEVELS.shape, f"there are {got.numel()} levels, expected 16{zero}")
    top = 1.8481308
    same("nf4_levels()", got, LEVELS, 5e-6, guesses={
        "there are 8 negative and 7 positive levels: it must be the other way round":
            -LEVELS.flip(0),
        "the negative levels are mirrored positive ones: their 7 p's are spaced more widely":
            torch.cat((-LEVELS.flip(0)[:7], LEVELS[7:])),
    }, factors={"Φ⁻¹(0.9677)": (top, "are the levels not divided by it?")},
        case="16 levels, from -1 to 1")  # fmt: skip


@CHECKS.add("pieces", "bits")
def bits(m: ModuleType, draw: Draw) -> None:
    for shape, blocksize, double in (
        ((4,), 2, False), ((4,), 2, True), ((5, 3), 4, False), ((5, 3), 4, True),
        ((70, 64), 16, True),
    ):  # fmt: skip
        n = math.prod(shape)
        blocks, halves = -(-n // blocksize), -(-n // 2)
        seconds = -(-blocks // 256)
        codes = torch.zeros(halves, dtype=torch.uint8)
        scales = torch.zeros(blocks, dtype=torch.uint8 if double else torch.float32)
        rest = (torch.zeros(seconds), torch.tensor(0.0)) if double else (None, None)
        sizes = [halves, blocks * (1 if double else 4), 4 * seconds * double, 4 * double]
        q = m.NF4(codes, scales, *rest, torch.Size(shape), torch.float32, blocksize)
        total = sum(sizes)
        text = f"shape {shape}, blocks of {blocksize}, double quantization: {double}"
        same("bits()", torch.tensor(float(q.bits())), torch.tensor(8 * total / n), guesses={
            "it counts bytes: a byte has 8 bits": torch.tensor(total / n),
            "it counts the codes alone": torch.tensor(8 * halves / n),
            "it counts the codes and scales alone, without absmax₂ and the offset":
                torch.tensor(8 * (sizes[0] + sizes[1]) / n),
            "the offset is not counted": torch.tensor(8 * (total - sizes[3]) / n),
            "it is not divided by the number of weights": torch.tensor(8.0 * total),
            "a uint8 scale has 8 bits, and not 32": torch.tensor(
                8 * (total + 3 * blocks * double) / n),
            "it is divided by the number of bytes of codes": torch.tensor(8 * total / halves),
        }, case=text)  # fmt: skip


def weights_of(draw: Draw, shape: tuple, blocksize: int) -> Tensor:
    """Random weights, whose blocks have unequal sizes and either sign of the largest entry."""
    n = math.prod(shape)
    size = 0.02 * (1 + 3 * draw.normal(-(-n // blocksize)).abs())
    return (draw.normal(n) * per_weight(size, n, blocksize)).view(shape)


def check_scales(q, w: Tensor, blocksize: int, text: str) -> None:
    """That the scales are absmax of each block."""
    flat = w.float().flatten()
    blocks = flat.split(blocksize)
    absmax = absmax_of(w.float(), blocksize)
    same("the scale", q.scales, absmax, 1e-6, guesses={
        "it is the largest entry, not the largest absolute value":
            torch.stack([b.max() for b in blocks]),
        "it has the sign of the entry": torch.stack([b[b.abs().argmax()] for b in blocks]),
        "all blocks have the scale of the whole tensor": flat.abs().max().expand(len(blocks)),
        "it is the mean of |w|": torch.stack([b.abs().mean() for b in blocks]),
        "it is the standard deviation of the block":
            torch.stack([b.std() if len(b) > 1 else b[0] for b in blocks]),
        "it is 1 / absmax": 1 / absmax.clamp(min=1e-38),
    }, case=text)  # fmt: skip


@CHECKS.add("pieces", "quantize")
def quantize(m: ModuleType, draw: Draw) -> None:
    suspects = Suspects()
    whole = (((2,), 2), ((1, 4), 2), ((3, 8), 4), ((7, 16), 16), ((3, 128), 64))
    for shape, blocksize in (*whole, ((draw.integer(2, 9), 32), 8)):
        w = weights_of(draw, shape, blocksize)
        add_codes(suspects, m, w, blocksize, f"shape {shape}, blocks of {blocksize}, w {show(w)}")
    suspects.report("the code")
    for shape, blocksize in SHAPES:  # some have an incomplete block
        w = weights_of(draw, shape, blocksize)
        check_scales(
            m.quantize_nf4(w, blocksize, False), w, blocksize, f"shape {shape}, w {show(w)}"
        )
    middle = ((LEVELS[1:] + LEVELS[:-1]) / 2).double()
    x = torch.cat((middle - 2e-5, middle + 2e-5, torch.tensor([1.0, -1.0]).double()))
    zeros = torch.cat((torch.zeros(4), draw.normal(4)))
    half = weights_of(draw, (40, 32), 32).to(torch.bfloat16)
    for w, blocksize, text in (
        ((0.25 * x).float(), 32, "weights next to the midpoints of the levels"),
        (zeros, 4, "a block of zeros"),
        (half, 32, "a bfloat16 weight: is x computed in bfloat16 instead of float32?"),
    ):
        suspects = Suspects()
        add_codes(suspects, m, w, blocksize, text)
        ensure(not suspects.symptom, suspects.symptom)


def add_codes(suspects: Suspects, m: ModuleType, w: Tensor, blocksize: int, text: str) -> None:
    """Compare each block's codes. Their order is the task `pack`: here, they are sorted."""
    before = w.clone()
    q = m.quantize_nf4(w, blocksize, False)
    unchanged("the weight", before, w)
    check_scales(q, w, blocksize, text)
    flat, n = w.float().flatten(), w.numel()
    each = per_weight(absmax_of(w.float(), blocksize), n, blocksize)
    x = flat / each.clamp(min=1e-38)
    packings = mispacked(nearest(x), blocksize).values()
    if q.codes.numel() != n // 2 or any(torch.equal(p, q.codes) for p in packings):
        return  # the codes may be right: these are mistakes in `pack`
    got = in_order(unpack(q.codes), blocksize)
    guesses = {
        "it is the nearest level below x": (x[:, None] >= LEVELS).sum(1) - 1,
        "it is the nearest level above x": (x[:, None] > LEVELS).sum(1),
        "w is not divided by absmax": nearest(flat),
        "w is divided by absmax of the whole tensor": nearest(flat / flat.abs().max()),
        "x is rounded to the nearest of 16 evenly spaced values": ((x + 1) * 7.5).round().long(),
        "the sign of w is lost": nearest(x.abs()),
        "w is multiplied by absmax": nearest(flat * each),
        "the code is too large by 1": nearest(x) + 1,
        "the code is too small by 1": nearest(x) - 1,
    }
    x, each, best = (in_order(t, blocksize) for t in (x, each, nearest(x)))
    wrong = ((x - LEVELS[got]).abs() > (x - LEVELS[best]).abs() + 2e-6).nonzero().flatten()
    symptom = ""
    if len(wrong) and torch.equal(got.sort().values, best.sort().values):
        return  # the codes are right, but not in their blocks: this is for `pack`, too
    if len(wrong):
        i = wrong[0]
        symptom = (f"w / absmax = {x[i]:.5g} has the code {got[i]} (level {LEVELS[got[i]]:.5g}), "
                   f"expected {best[i]} (level {LEVELS[best[i]]:.5g}) ({text})")  # fmt: skip
        if not each[i]:
            symptom = (f"a block of zeros has the code {got[i]}, expected 7, the code of level 0: "
                       "is it 0 / 0?")  # fmt: skip
    guesses = {k: in_order(v.clamp(0, 15), blocksize) for k, v in guesses.items()}
    suspects.add(got, guesses, symptom, x)


def in_order(x: Tensor, blocksize: int) -> Tensor:
    """Sorted within each block."""
    return torch.cat([block.sort().values for block in x.split(blocksize)])


def mispacked(codes: Tensor, blocksize: int) -> dict[str, Tensor]:
    """The bytes of codes that are packed in wrong ways."""
    blocks = F.pad(codes, (0, -len(codes) % blocksize), value=7).view(-1, blocksize)
    a, b = blocks.view(-1, 2).T
    halves = blocks.view(-1, 2, blocksize // 2).mT.reshape(-1, 2).T
    found = {
        "the two codes are swapped: the first one is in the high 4 bits": 16 * b + a,
        "the second code is missing": 16 * a,
        "the first code is missing": b,
        "the first code must be multiplied by 16, not by 15": 15 * a + b,
        "the first code is not moved into the high 4 bits": a + b,
        "the first code is not moved into the high 4 bits, and is combined with |": a | b,
        "it has one code, and must have two": blocks.flatten(),
        "the two halves of a block share bytes: it must be two codes that follow each other":
            16 * halves[0] + halves[1],
    }  # fmt: skip
    if len(blocks) % 2 == 0:
        rows = "two blocks share bytes: it must be two codes of a block that follow each other"
        found[rows] = (16 * blocks[0::2] + blocks[1::2]).flatten()
    return {k: v[: (len(codes) + 1) // 2].to(torch.uint8) for k, v in found.items()}


@CHECKS.add("pieces", "pack")
def packing(m: ModuleType, draw: Draw) -> None:
    chunks = ((2**17 + 130,), 64)  # more than one chunk
    suspects = Suspects()
    for shape, blocksize in (*SHAPES, ((1, 7), 4), ((3, 5), 2), ((7, 11), 16), chunks):
        n = math.prod(shape)
        made = Quantized(m, draw, shape, blocksize)
        codes = made.codes
        codes[::blocksize] = 15  # so that absmax is the scale
        w = (LEVELS[codes] * made.each).view(shape)
        got, expected = m.quantize_nf4(w, blocksize, False).codes, pack(codes)
        text = f"codes {show(codes)}, blocks of {blocksize}"
        ensure(got.dtype == torch.uint8, f"the bytes have the dtype {got.dtype}, not uint8")
        ensure(got.dim() == 1, f"the bytes must be flat, and have the shape {tuple(got.shape)}")
        ensure(len(got) == len(expected),
               f"{n} weights have {len(got)} bytes, expected {len(expected)} ({text})")  # fmt: skip
        wrong = (unpack(got)[:n] != codes).nonzero().flatten()
        i = wrong[0].item() // 2 if len(wrong) else 0
        symptom = f"byte {i} is 0x{got[i]:02x}, expected 0x{expected[i]:02x} ({text})"
        suspects.add(got, mispacked(codes, blocksize), symptom if len(wrong) else "")
    suspects.report("a byte")


@CHECKS.add("pieces", "quantize_scales")
def quantize_scales(m: ModuleType, draw: Draw) -> None:
    suspects = Suspects()
    for size in (2, 5, 6, 70, 256, 300, 512, draw.integer(600, 700), 0):
        scales = draw.normal(size).abs() + 0.2 if size else torch.full((4,), 0.5)
        if size % 2 == 0:
            scales = 6 - scales  # the largest deviation from the mean is negative
        if size > 300:
            scales[260] += 9  # so that the blocks of 256 differ
        before, text = scales.clone(), f"{len(scales)} scales {show(scales)}"
        found = m.quantize_scales(scales)
        unchanged("the tensor of scales", before, scales)
        ensure(isinstance(found, tuple | list) and len(found) == 3,
               "quantize_scales must return three tensors: codes, absmax₂, offset")  # fmt: skip
        mean = scales.double().mean().float()
        same("the offset", found[2], mean, guesses={
            "it is the smallest scale": scales.min(),
            "it is the largest scale": scales.max(), "it is the sum": scales.sum(),
        }, case=text)  # fmt: skip
        check_second(found[1], scales, mean, text)
        add_scale_codes(suspects, found[0], scales, mean, text)
    suspects.report("the 8-bit code")


def check_second(second: Tensor, scales: Tensor, mean: Tensor, text: str) -> None:
    """absmax₂ of each 256 scales."""
    centred, n = scales - mean, len(scales)
    blocks = centred.split(256)
    ensure(isinstance(second, Tensor) and second.shape == (len(blocks),),
           f"absmax₂ must have an entry per 256 scales: {n} scales have {len(blocks)}, and its "
           f"shape is {tuple(getattr(second, 'shape', ()))}")  # fmt: skip
    padded = F.pad(scales, (0, -n % 256)) - mean
    same("absmax₂", second, absmax_of(centred, 256), 1e-5, guesses={
        "the offset is not subtracted": absmax_of(scales, 256),
        "it is the largest scale - offset, not the largest |scale - offset|":
            torch.stack([b.max() for b in blocks]),
        "it is the largest scale - offset, and at least 0: it must be the largest |scale - offset|":
            torch.stack([b.max() for b in blocks]).clamp(min=0),
        "it is the same for all blocks": centred.abs().max().expand(len(blocks)),
        "the scales are padded before the offset is subtracted, so that the padding counts":
            absmax_of(padded, 256),
    }, case=text)  # fmt: skip


def add_scale_codes(
    suspects: Suspects, codes: Tensor, scales: Tensor, mean: Tensor, text: str
) -> None:
    """Compare codes of scales by their error: there may be two that are equally near."""
    n = len(scales)
    ensure(isinstance(codes, Tensor) and codes.dtype == torch.uint8, "the codes must be uint8")
    ensure(codes.shape == (n,), f"the codes have the shape {tuple(codes.shape)}, expected ({n},): "
           "the padding must be cut off")  # fmt: skip
    each = per_weight(absmax_of(scales - mean, 256), n, 256)
    x = (scales - mean) / each.clamp(min=1e-38)
    best = nearest(x, MAP)

    def error(codes: Tensor) -> Tensor:
        return (scales - mean - each * MAP[codes.long()]).abs()

    wrong = (error(codes) > error(best) + 1e-6 * scales.max()).nonzero().flatten()
    symptom = ""
    if len(wrong):
        i = wrong[0]
        symptom = (f"(scale - offset) / absmax₂ = {x[i]:.5g} has the code {codes[i]} (which is "
                   f"{MAP[codes[i].long()]:.5g}), expected {best[i]} ({MAP[best[i]]:.5g}): "
                   f"{text}")  # fmt: skip
    guesses = {
        "it is that of the nearest value below": torch.bucketize(x, MAP, right=True) - 1,
        "it is that of the nearest value above": torch.bucketize(x, MAP),
        "it is the nearest of evenly spaced values, not of DYNAMIC_MAP": ((x + 1) * 127.5).round(),
        "scale - offset is not divided by absmax₂": nearest(scales - mean, MAP),
        "the offset is not subtracted": nearest(scales / each.clamp(min=1e-38), MAP),
    }
    if each.any():
        guesses = {k: v.clamp(0, 255).to(torch.uint8) for k, v in guesses.items()}
        suspects.add(codes, guesses, symptom, x)


@CHECKS.add("pieces", "dequantize")
def dequantize(m: ModuleType, draw: Draw) -> None:
    drawn = (draw.integer(2, 9), draw.integer(5, 40)), 16
    more = ((1, 7), 4), ((3, 5), 2), ((7, 11), 16), ((3, 5, 4), 8), drawn
    for shape, blocksize in (*SHAPES, *more):
        made = Quantized(m, draw, shape, blocksize)
        kept = copy.deepcopy(made.q)
        got = called(m.dequantize_nf4, made.q)
        for name in ("codes", "scales"):
            unchanged(f"q.{name}", getattr(kept, name), getattr(made.q, name))
        n, codes = made.w.numel(), made.codes
        whole = F.pad(codes, (0, n % 2), value=7)
        guesses = {
            "the two codes of a byte are swapped: the first one is in the high 4 bits":
                LEVELS[whole.view(-1, 2).flip(1).reshape(-1)[:n]] * made.each,
            "the levels are not multiplied by absmax": LEVELS[codes],
            "the levels are divided by absmax": LEVELS[codes] / made.each,
            "the codes are multiplied by absmax: look their levels up": codes * made.each,
            "all blocks have the scale of the first one": LEVELS[codes] * made.scales[0],
            "the weights of a block must follow each other, and have the same scale":
                LEVELS[codes] * made.scales.repeat(blocksize)[:n],
            "the levels are evenly spaced: look them up in NF4_CODEBOOK":
                (codes / 7.5 - 1) * made.each,
        }  # fmt: skip
        if n % 2 == 0:
            first_last = torch.cat((codes[0::2], codes[1::2]))
            guesses["the first codes of all bytes come first, and then the second ones: they must "
                    "alternate"] = LEVELS[first_last] * made.each  # fmt: skip
        guesses = {k: v.view(shape) for k, v in guesses.items()}
        same("the weight", got, made.w, 1e-6, guesses=guesses, case=made.text)
    for dtype in (torch.bfloat16, torch.float16):
        made = Quantized(m, draw, (5, 24), 8, dtype)
        check_rounding(called(m.dequantize_nf4, made.q), made, dtype)
        made = Quantized(m, draw, (5, 24), 8)
        check_rounding(called(m.dequantize_nf4, made.q, dtype), made, dtype)
        made = Quantized(m, draw, (2, 4), 2, dtype)
        got = called(m.dequantize_nf4, made.q, torch.float32)
        same(f"with q.dtype {dtype} and dtype float32, the weight", got, made.w)


def check_rounding(got: Tensor, made: Quantized, dtype: torch.dtype) -> None:
    """That a weight is the product, rounded once. A product halfway may go up or down."""
    like(f"the weight in {dtype}", got, made.w.to(dtype))
    exact = LEVELS[made.codes].double() * made.each
    ends = [(exact * (1 + e)).to(dtype).view(made.w.shape) for e in (-1e-6, 1e-6)]
    ok = (got >= torch.minimum(*ends)) & (got <= torch.maximum(*ends))
    rough = (LEVELS[made.codes].to(dtype) * made.each.to(dtype)).view(made.w.shape)
    ensure(ok.all() or not torch.equal(got, rough), f"the product is computed in {dtype}: multiply "
           "in float32, and convert last")  # fmt: skip
    i = (~ok).nonzero().tolist()
    ensure(ok.all(), f"the weight in {dtype} is not the rounded product of level and absmax" + (
        f": entry {i[0]} is {got[tuple(i[0])]:.6g}, and the product is "
        f"{exact.view(made.w.shape)[tuple(i[0])]:.6g}" if i else ""))  # fmt: skip


@CHECKS.add("pieces", "dequantize_scales")
def dequantize_scales(m: ModuleType, draw: Draw) -> None:
    """Every code is 15, which is level 1: the weights are the scales."""
    for blocks, blocksize in ((1, 2), (3, 4), (70, 2), (256, 2), (300, 2), (600, 4)):
        codes = draw.tokens(256, blocks).to(torch.uint8)
        second, offset = draw.normal(-(-blocks // 256)).abs() + 0.1, draw.normal(()).abs() + 1.0
        n = blocks * blocksize
        q = m.NF4(torch.full((n // 2,), 255, dtype=torch.uint8), codes, second, offset,
                  torch.Size((n,)), torch.float32, blocksize)  # fmt: skip
        kept = copy.deepcopy(q)
        got = called(m.dequantize_nf4, q)
        for name in ("codes", "scales", "scale_scales", "offset"):
            unchanged(f"q.{name}", getattr(kept, name), getattr(q, name))
        each, mapped = per_weight(second, blocks, 256), MAP[codes.long()]
        guesses = {
            "the offset is not added": each * mapped,
            "the offset is added twice": each * mapped + 2 * offset,
            "the offset is subtracted": each * mapped - offset,
            "absmax₂ also multiplies the offset": each * (mapped + offset),
            "map[code] is not multiplied by absmax₂": mapped + offset,
            "map[code] is divided by absmax₂": mapped / each + offset,
            "the code itself is used, not map[code]": each * codes + offset,
            "code / 127 - 1 is used instead of map[code]": each * (codes / 127 - 1) + offset,
            "code / 127.5 - 1 is used instead of map[code]": each * (codes / 127.5 - 1) + offset,
            "code / 255 is used instead of map[code]": each * (codes / 255) + offset,
            "the first absmax₂ is used for all blocks of 256": second[0] * mapped + offset,
        }
        guesses = {k: v.repeat_interleave(blocksize) for k, v in guesses.items()}
        expected = (each * mapped + offset).repeat_interleave(blocksize)
        text = f"8-bit codes {show(codes)}, absmax₂ {show(second)}, offset {offset:.4g}"
        same("absmax", got, expected, guesses=guesses, case=text)


@CHECKS.add("pieces", "backward")
def backward(m: ModuleType, draw: Draw) -> None:
    for n_in, n_out, lead, has_bias in (
        (2, 2, (1,), False), (3, 3, (2,), True), (4, 3, (2,), True), (6, 5, (2, 3), True),
        (draw.integer(3, 8), draw.integer(9, 12), (4,), False),
    ):  # fmt: skip
        made = Quantized(m, draw, (n_out, n_in), 2)
        x = draw.normal(*lead, n_in).requires_grad_()
        bias = draw.normal(n_out).requires_grad_() if has_bias else None
        grad = draw.normal(*lead, n_out)
        y = m._Linear4bitFunction.apply(x, bias, made.q)
        called(y.backward, grad)
        guesses = {}
        if n_in == n_out:
            guesses["it is grad @ Wᵀ: W is transposed"] = grad @ made.w.T
        text = f"W {show(made.w)}, grad {show(grad)}"
        ensure(x.grad is not None, "x gets no gradient")
        same("the gradient of x", x.grad, grad @ made.w, guesses=guesses, case=text)
        if bias is not None:
            ensure(bias.grad is not None, "the bias gets no gradient")
            total = grad.reshape(-1, n_out)
            same("the gradient of the bias", bias.grad, total.sum(0), guesses={
                "it is the mean, not the sum": total.mean(0), "it is 1 for each row of x":
                torch.full((n_out,), float(len(total)))}, case=text)  # fmt: skip
    made = Quantized(m, draw, (3, 4), 2, torch.bfloat16)
    x = draw.normal(2, 4).requires_grad_()
    grad = draw.normal(2, 3)
    called(m._Linear4bitFunction.apply(x, None, made.q).backward, grad)
    same("for a bfloat16 weight and a float32 x, the gradient of x", x.grad, grad @ made.w,
         guesses={"W is dequantized to bfloat16, and not to the dtype of grad":
                  grad @ made.w.bfloat16().float()})  # fmt: skip
    bias = draw.normal(3).requires_grad_()
    called(m._Linear4bitFunction.apply(draw.normal(2, 4), bias, made.q).backward, grad)
    same("if only the bias needs a gradient, its gradient", bias.grad, grad.sum(0))


def four_bit(
    m: ModuleType, draw: Draw, n_in: int, n_out: int, bias: bool, dtype=torch.float32, **options
) -> tuple[nn.Module, Tensor, Tensor | None]:
    """A 4-bit layer with random codes and scales; the W (float32) and the b that it must have."""
    linear = nn.Linear(n_in, n_out, bias=bias).to(dtype)
    layer = m.Linear4bit(linear, blocksize=2, double_quant=False, **options).requires_grad_(False)
    made = Quantized(m, draw, (n_out, n_in), 2)
    layer.codes.copy_(made.q.codes)
    layer.scales.copy_(made.scales)
    if bias:
        layer.bias.copy_(draw.normal(n_out))
    return layer, made.w, layer.bias


@CHECKS.add("pieces", "linear4bit")
def linear4bit(m: ModuleType, draw: Draw) -> None:
    for n_in, n_out, _, _, bias, _ in CASES:
        layer, w, b = four_bit(m, draw, n_in, n_out, bias)
        x = draw.normal(2, 3, n_in)
        before, guesses = x.clone(), {}
        if bias:
            guesses = {"the bias is missing": F.linear(x, w), "the bias is added twice":
                       F.linear(x, w, 2 * b)}  # fmt: skip
        same("the output", layer(x), F.linear(x, w, b), guesses=guesses,
             case=f"x {show(x)}, W {show(w)}")  # fmt: skip
        unchanged("x", before, x)
    for name, dtype, options in (
        ("for a bfloat16 x, the output", torch.bfloat16, {}),
        ("for a float64 x, the output", torch.float64, {}),
        (
            "with compute_dtype bfloat16, the output",
            torch.float32,
            {"compute_dtype": torch.bfloat16},
        ),
    ):
        layer, w, b = four_bit(m, draw, 6, 5, True, **options)
        x, kind = draw.normal(40, 6).to(dtype), options.get("compute_dtype", dtype)
        expected = F.linear(x.to(kind), w.to(kind), b.to(kind)).to(dtype)
        with with_case(name.removesuffix(", the output")):
            got = layer(x)
        like(name, got, expected)
        exact = F.linear(x.double(), w.double(), b.double())
        rounded = (expected.double() - exact).abs().max()
        same(name, got, expected, max(torch.finfo(kind).eps, 1e-6) * 4)
        if options:
            ignored = (got.double() - exact).abs().max() <= rounded / 10
            ensure(not ignored, "compute_dtype is ignored: the product is in the dtype of x")
        if dtype == torch.float64:
            same(name, got, expected, 1e-9, case="is the product computed in float32?")
    check_kept(m, draw)


def check_kept(m: ModuleType, draw: Draw) -> None:
    """That W is not kept from the forward pass to the backward pass."""
    layer, w, _ = four_bit(m, draw, 16, 12, True)
    kept, x = [], draw.normal(1, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        y = layer(x)
    ensure(y.requires_grad, "the output does not depend on x: x would get no gradient")
    ensure(sum(kept) < w.numel() > kept_by(y.grad_fn), "the dequantized W is kept for the backward "
           "pass: use _Linear4bitFunction, and keep q in it")  # fmt: skip


class Case:
    """A QLoRA layer with known matrices, and what it should compute."""

    def __init__(self, m: ModuleType, draw: Draw, case: tuple, dtype=torch.float32, dropout=0.0):
        n_in, n_out, self.r, self.alpha, bias, rslora = case
        self.base, self.w, self.b = four_bit(m, draw, n_in, n_out, bias, dtype)
        self.s = self.alpha / (math.sqrt(self.r) if rslora else self.r)
        config = SimpleNamespace(r=self.r, lora_alpha=self.alpha, lora_dropout=dropout,
                                 use_rslora=rslora, target_modules="all-linear")  # fmt: skip
        self.layer = m.QLoraLinear(self.base, config)
        self.a, self.b_factor = draw.normal(self.r, n_in), draw.normal(n_out, self.r)
        set_factor(self.layer, "lora_A", self.a)
        set_factor(self.layer, "lora_B", self.b_factor)
        self.x = draw.normal(2, 3, n_in)
        self.update = self.s * self.b_factor @ self.a
        self.text = f"in {n_in}, out {n_out}, r {self.r}, α {self.alpha:g}, x {show(self.x)}"

    def plain(self, x: Tensor) -> Tensor:
        """W₄ x + b."""
        return F.linear(x, self.w, self.b)

    def factors(self) -> dict[str, tuple[float, str]]:
        return {"1 / s": (1 / self.s, "is the scaling s missing?"),
                "s": (self.s, "is the scaling s applied twice?"),
                "α / s": (self.alpha / self.s, "is it α instead of s?")}  # fmt: skip


def cases(m: ModuleType, draw: Draw, **options) -> list[Case]:
    drawn = (draw.integer(5, 9), draw.integer(10, 14), draw.integer(2, 4),
             draw.integer(5, 30) + 0.5, True, False)  # fmt: skip
    return [Case(m, draw, case, **options) for case in (*CASES, drawn)]


@CHECKS.add("pieces", "forward")
def forward(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        x = case.x
        plain, update, before = case.plain(x), x @ case.update.T, x.clone()
        guesses = {
            "it is the update without W₄ x + b": update,
            "the bias b is missing": x @ case.w.T + update,
            "the bias b is added twice": plain + update + (0 if case.b is None else case.b),
            "the update is subtracted": plain - update,
            "the scaling s also multiplies W₄ x + b": case.s * plain + update,
        }
        if len(case.w) == case.w.shape[1]:
            guesses["A is applied to W₄ x + b, not to x"] = plain + plain @ case.update.T
        same("the update (the output minus W₄ x + b)", case.layer(x), plain + update,
             guesses=guesses, factors=case.factors(), case=case.text, start=plain)  # fmt: skip
        unchanged("x", before, x)
    check_dropout(m, draw)
    for dtype in (torch.bfloat16, torch.float64):
        case = Case(m, draw, CASES[1])
        with with_case(f"with an x in {dtype}"):
            y = case.layer(case.x.to(dtype))
        ensure(y.dtype == dtype, f"the output for an x in {dtype} is in {y.dtype}")


def check_dropout(m: ModuleType, draw: Draw) -> None:
    """Dropout acts on the input of A: the base path, and evaluation, have none."""
    case = Case(m, draw, (2, 3, 1, 1.0, True, False), dropout=0.5)
    layer, x = case.layer.train(), draw.normal(1, 2).expand(200, 2)
    plain, both = case.plain(x), layer(x)
    set_factor(layer, "lora_B", torch.zeros(3, 1))
    same("with B = 0 and dropout, the output", layer(x), plain, case="dropout on the base path?")
    set_factor(layer, "lora_A", torch.ones(1, 2))
    set_factor(layer, "lora_B", torch.ones(3, 1))
    update = (layer(x) - plain)[:, 0]
    a, b = x[0]
    allowed = torch.stack((a * 0, 2 * a, 2 * b, 2 * (a + b)))
    kinds = {int((u - allowed).abs().argmin()) for u in update}
    near = (update[:, None] - allowed).abs().amin(1).max()
    ensure(both.std(0).max() > 0 and update.std() > 1e-6, "dropout has no effect in training mode")
    ensure(near < 1e-4, "dropout must act on the input of A, and keep its expected value")
    ensure(kinds == {0, 1, 2, 3}, "dropout acts on the output of A or B: it must act on x")
    same("in evaluation mode, the output", layer.eval()(x), plain + x @ torch.ones(2, 3),
         case="is dropout active in evaluation mode?")  # fmt: skip


@CHECKS.add("pieces", "merged")
def merged(m: ModuleType, draw: Draw) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases(m, draw, dtype=dtype):
            before = {name: t.clone() for name, t in case.layer.state_dict().items()}
            expected = case.w + case.update
            flat, n = expected.flatten(), expected.numel()
            each = per_weight(absmax_of(expected, 2), n, 2)
            again = (LEVELS[nearest(flat / each)] * each).view(expected.shape)
            half = case.w.to(torch.bfloat16).float()
            one = expected.abs().max()
            guesses = {
                "it is quantized again": again,
                "it is quantized again, in blocks of 64":
                    LEVELS[nearest(flat / one)].view(expected.shape) * one,
                "it is W₄ alone, without the update": case.w,
                "it is the update alone, without W₄": case.update,
                "it is W₄ - s B A": case.w - case.update,
                "W₄ is dequantized to the dtype of the layer instead of float32":
                    half + case.update,
                "it is rounded to bfloat16": expected.to(torch.bfloat16).float(),
            }  # fmt: skip
            same("merged()", case.layer.merged(), expected, 1e-6, guesses, case.factors(),
                 case.text, start=case.w)  # fmt: skip
            for name, tensor in before.items():
                unchanged(f"merged() returns a new tensor, but {name}", tensor,
                          case.layer.state_dict()[name])  # fmt: skip


# --- the whole method ---


def net_of(m: ModuleType, *sizes: int, **options) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(n, k) for n, k in pairwise(sizes)]
    return m.quantize_model(nn.Sequential(*layers), **options)


def adapted(m: ModuleType, net: nn.Module, r: int = 2) -> dict[str, nn.Module]:
    return m.add_qlora(net, SimpleNamespace(
        r=r, lora_alpha=2.0 * r, lora_dropout=0.0, use_rslora=False, target_modules="all-linear",
    ))  # fmt: skip


@CHECKS.add("layer", "quantizing loses 9.2% of normal weights")
def error(m: ModuleType, draw: Draw) -> None:
    for double, size in product((False, True), (1.0, 1e-9)):
        w = size * draw.normal(384, 512)
        q = m.quantize_nf4(w, double_quant=double)
        back = m.dequantize_nf4(q)
        like("the dequantized weight", back, w)
        lost = ((back - w).norm() / w.norm()).item()
        ensure(0.09 < lost < 0.0936, f"the relative error of weights of size {size:g} is "
               f"{lost:.4f}, expected 0.0920 (double quantization: {double})")  # fmt: skip
        bits = 4 + 8 / 64 + 32 / (64 * 256) + 32 / w.numel() if double else 4.5
        same("bits per weight", torch.tensor(float(q.bits())), torch.tensor(bits))
    for shape, blocksize in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            w = weights_of(draw, shape, blocksize).to(dtype)
            w.view(-1)[: blocksize * (w.numel() > blocksize)] = 0  # a block of zeros
            for double in (False, True):
                back = m.dequantize_nf4(m.quantize_nf4(w, blocksize, double))
                like(f"a dequantized weight {shape}", back, w)
                worst = ((back - w).abs().max() / w.abs().max()).item()
                ensure(worst < 0.2, f"a weight {shape} in {dtype} is wrong by {worst:.2f} of its "
                       f"largest entry (double quantization: {double})")  # fmt: skip


@CHECKS.add("layer", "starts out identical to the 4-bit base")
def identity(m: ModuleType, draw: Draw) -> None:
    net, x = net_of(m, 70, 30, 8), draw.normal(3, 70)
    before = net(x)
    adapted(m, net)
    ensure(torch.equal(net(x), before), "the adapted model does not start out as the 4-bit base")


@CHECKS.add("layer", "gradients reach A, B and x, and nothing else")
def gradients(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        case.base.requires_grad_(False)
        x, x2 = (case.x.clone().requires_grad_() for _ in range(2))
        y = case.layer(x)
        weights = draw.normal(*y.shape)
        called((y * weights).sum().backward)
        a, b = case.a.clone().requires_grad_(), case.b_factor.clone().requires_grad_()
        (F.linear(x2, case.w + case.s * b @ a, case.b) * weights).sum().backward()
        for name, wanted in (("lora_A", a), ("lora_B", b)):
            parameter = getattr(getattr(case.layer, name), "weight", getattr(case.layer, name))
            ensure(parameter.grad is not None, f"{name} gets no gradient")
            got = parameter.grad if parameter.shape == wanted.shape else parameter.grad.T
            same(f"the gradient of {name}", got, wanted.grad, 1e-4, factors=case.factors(),
                 case=case.text)  # fmt: skip
        same("the gradient of x", x.grad, x2.grad, 1e-4, case=case.text)
        others = [n for n, p in case.layer.named_parameters() if p.grad is not None]
        ensure(len(others) == 2, f"more than A and B get gradients: {', '.join(others)}")


def kept_by(node) -> int:
    """Numbers in the largest floating-point tensor that an autograd function keeps as ctx.…."""
    own = [t.numel() for t in getattr(node, "__dict__", {}).values()
           if isinstance(t, Tensor) and t.is_floating_point()]  # fmt: skip
    return max([0, *own, *(kept_by(n) for n, _ in getattr(node, "next_functions", ()) if n)])


@CHECKS.add("layer", "W is not kept for the backward pass")
def memory(m: ModuleType, draw: Draw) -> None:
    check_kept(m, draw)


@CHECKS.add("layer", "trainable parameters: r (in + out) per layer")
def count(m: ModuleType, draw: Draw) -> None:
    net = net_of(m, 70, 30, 8)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    adapted(m, net, 3)
    found = sum(p.numel() for p in trainable(net).values())
    ensure(found == 3 * (100 + 38), f"3 (70 + 30) + 3 (30 + 8) = 414 parameters, got {found}")
    after = {n.replace("base_layer.", ""): b for n, b in net.named_buffers()}
    for name, buffer in before.items():
        unchanged(name, buffer, after[name])
    size = m.bits_per_weight(net)
    stored = (1050 + 33 + 8) + (120 + 4 + 8)  # bytes: codes, scales, absmax₂ and the offset
    same("bits_per_weight", torch.tensor(size), torch.tensor(8 * stored / 2340))


@CHECKS.add("layer", "merging keeps the output, unmerging restores it")
def merging(m: ModuleType, draw: Draw) -> None:
    net, x = net_of(m, 70, 30, 8), draw.normal(3, 70)
    layers = adapted(m, net)
    for layer in layers.values():
        set_factor(layer, "lora_B", draw.normal(layer.out_features, 2))
    net.eval()
    with torch.no_grad():
        before = net(x)
        for _ in range(2):
            for layer in layers.values():
                layer.merge()
            same("the output after merge()", net(x), before)
            for layer in layers.values():
                layer.unmerge()
            ensure(torch.equal(net(x), before), "unmerge() must restore the output exactly")


@CHECKS.add("layer", "recovers a change of low rank")
def learns(m: ModuleType, draw: Draw) -> None:
    net = net_of(m, 12, 9)
    base, change = net[0], draw.normal(9, 2) @ draw.normal(2, 12)
    goal, bias = base.dequantize(torch.float32).detach() + change, base.bias.detach()
    (layer,) = adapted(m, net).values()
    optimizer = torch.optim.Adam(list(trainable(net).values()), lr=0.05)
    for _ in range(400):
        x = draw.normal(32, 12)
        optimizer.zero_grad()
        F.mse_loss(net(x), F.linear(x, goal, bias)).backward()
        optimizer.step()
    missing = ((layer.delta() - change).norm() / change.norm()).item()
    ensure(missing < 0.02, f"after 400 steps, {missing:.0%} of the change is still missing")


# --- values of bitsandbytes and peft ---


def tensors(names: str) -> list[Tensor]:
    return [torch.tensor(values[name]) for name in names.split()]


@CHECKS.add("values", "the codes and scales of bitsandbytes")
def bitsandbytes_codes(m: ModuleType, draw: Draw) -> None:
    w, codes, scales = tensors("w codes scales")
    q = m.quantize_nf4(w, 64, False)
    same("the scales", q.scales, scales, 1e-7)
    ensure(q.codes.shape == codes.shape, f"there are {q.codes.numel()} bytes, not {len(codes)}")
    other = (q.codes != codes).nonzero().flatten().tolist()
    ensure(not other, f"{len(other)} of {len(codes)} bytes differ from those of bitsandbytes")


@CHECKS.add("values", "the double quantization of bitsandbytes")
def bitsandbytes_scales(m: ModuleType, draw: Draw) -> None:
    absmax, codes, second, offset = tensors("absmax scale_codes scale_scales offset")
    w = torch.zeros(len(absmax), 64)
    w[:, 0] = absmax
    q = m.quantize_nf4(w)
    same("the offset", q.offset, offset)
    same("absmax₂", q.scale_scales, second)
    off = (q.scales.int() - codes).abs()
    # its CPU kernel takes a neighbouring code for a few in a thousand
    ensure(off.max() <= 1 and off.sum() <= 4, f"{int(off.gt(0).sum())} of {len(codes)} scale codes "
           "differ from those of bitsandbytes")  # fmt: skip


@CHECKS.add("values", "the weights that bitsandbytes dequantizes")
def bitsandbytes_weights(m: ModuleType, draw: Draw) -> None:
    w, codes, scales, back = tensors("w codes scales back")
    q = m.NF4(codes.to(torch.uint8), scales, None, None, w.shape, w.dtype, 64)
    same("the dequantized weight", m.dequantize_nf4(q), back, 1e-5)
    codes, second, offset, back = tensors("scale_codes scale_scales offset scales_back")
    nibbles = torch.full((32 * len(codes),), 255, dtype=torch.uint8)
    q = m.NF4(nibbles, codes.to(torch.uint8), second, offset, torch.Size((len(codes), 64)),
              torch.float32, 64)  # fmt: skip
    same("the dequantized scale", m.dequantize_nf4(q)[:, 0], back, 1e-5)


@CHECKS.add("values", "output and gradient of peft's layer on bitsandbytes")
def peft_output(m: ModuleType, draw: Draw) -> None:
    w, bias, a, b_factor, x, y, grad = tensors("w bias A B x y grad")
    linear = nn.Linear(w.shape[1], w.shape[0])
    linear.weight.data, linear.bias.data = w, bias
    net = m.quantize_model(nn.Sequential(linear), double_quant=False)
    config = SimpleNamespace(r=len(a), lora_alpha=values["alpha"], lora_dropout=0.0,
                             use_rslora=False, target_modules="all-linear")  # fmt: skip
    (layer,) = m.add_qlora(net, config).values()
    set_factor(layer, "lora_A", a)
    set_factor(layer, "lora_B", b_factor)
    x.requires_grad_()
    got = net(x)
    same("the output", got, y)
    got.square().sum().backward()
    same("the gradient of x", x.grad, grad)


@CHECKS.add("losses", "the first ten losses on describe")
def ten_losses(m: ModuleType, draw: Draw) -> None:
    model, _, _ = describe()
    found = []
    for module in (reference, m):
        net = module.quantize_model(copy.deepcopy(model))
        layers = adapted(module, net, 4)
        start = torch.Generator().manual_seed(0)
        for layer in layers.values():
            n_in = layer.in_features
            set_factor(layer, "lora_A", torch.randn(4, n_in, generator=start) / math.sqrt(n_in))

        def logits(batch, net=net):
            return net(batch["input_ids"], attention_mask=batch["attention_mask"]).logits

        found.append(losses([p for p in net.parameters() if p.requires_grad], logits, 0.01))
    if abs(found[0][0] - found[0][-1]) < 0.05:
        raise Wrong("the reference did not learn")  # cannot happen: see the tests
    compare_losses(found[1], found[0])
