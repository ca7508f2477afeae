"""Lesson 07: QLoRA."""

import gc
from contextlib import contextmanager
from statistics import NormalDist

import torch
from torch import Tensor

from ...methods.qlora import dequantize_nf4, quantize_nf4
from . import (
    Wrong,
    a_pair,
    answered,
    call,
    compare,
    done,
    ensure,
    exercise,
    has_shape,
)

NF4_P_MAX = 0.9677083


@exercise(
    "07.largest",
    "How many parameters have gradients and optimizer state? How many have a weight?",
    "The base has 7 billion weights of 2 bytes. The adapter has 20 million parameters.",
)
def largest(largest, draw):
    mistakes = {
        "gradients": "Only the adapter has gradients: 20 million numbers.",
        "optimizer state": "AdamW keeps two numbers per trained parameter: 40 million numbers.",
    }
    answered(largest, "weights", mistakes, "Choose one of the three texts.")


@exercise(
    "07.gradients",
    "Which of the four does the optimizer update? And how do earlier layers get their gradients?",
    "A and B are trained. x is the output of the layer before, whose adapter is trained too.",
)
def gradients(gradients, draw):
    try:
        names = {str(name).strip() for name in gradients}
    except TypeError:
        names = {gradients}
    ensure(names <= {"W", "A", "B", "x"}, f"use only the names 'W', 'A', 'B', 'x', got {names}")
    ensure("W" not in names, "One matrix in your list is frozen, and needs no gradient.")
    ensure(names >= {"A", "B"}, "What does the optimizer update? All of it needs a gradient.")
    ensure("x" in names, "How do the adapters of the layers before this one get gradients?")


# --- quantizing ---


@exercise(
    "07.by_hand",
    "Divide by the absmax. Which level is nearest to each of the four results?",
    "The absmax is 0.8. The scaled weights are 0.25, -1, 0.75 and 0.125.",
)
def by_hand(by_hand, draw):
    got = by_hand.tolist() if isinstance(by_hand, Tensor) else by_hand
    ensure(isinstance(got, list | tuple), f"it must be a list of four numbers, got {got!r}")
    ensure(len(got) == 4, f"it must have four numbers, got {len(got)}")
    mistakes = {
        "Those are the nearest levels. Multiply them by the absmax.": [0.0, -1.0, 1.0, 0.0],
        "Those are codes. A code names a level; multiply the level by the absmax.": [1, 0, 2, 1],
        "The absmax is a largest absolute value, so it is positive.": [0.0, 0.8, -0.8, 0.0],
        "Those are the scaled weights: they are not rounded.": [0.25, -1.0, 0.75, 0.125],
        "The absmax is the largest absolute value; 0.6 is the largest value.": [
            0.0,
            -0.6,
            0.6,
            0.0,
        ],
        "Those are the weights themselves.": [0.2, -0.8, 0.6, 0.1],
    }
    for text, value in mistakes.items():
        ensure(not torch.allclose(torch.tensor(got).float(), torch.tensor(value).float()), text)
    right = torch.allclose(
        torch.tensor(got).float(), torch.tensor([0.0, -0.8, 0.8, 0.0]), atol=1e-4
    )
    ensure(right, f"{list(got)} is not right. The scaled weights must be rounded to -1, 0 or 1.")


@exercise(
    "07.quantize",
    "View w as (blocks, blocksize). The absmax is .abs().amax(dim=1, keepdim=True).",
    "The distances ((blocks / absmax)[..., None] - levels).abs() have one entry per level.",
)
def quantize(quantize, draw):
    nf4 = formula_levels(7, 8, NF4_P_MAX)
    for levels, blocksize, blocks in (
        (nf4, 64, 3), (torch.tensor([-1.0, 0.0, 1.0]), 4, 5), (torch.tensor([-1.0, 1.0]), 2, 1),
        (torch.linspace(-1, 1, 7), 1, 6), (nf4, 8, 4),
    ):  # fmt: skip
        w = draw.normal(blocks, blocksize) * 10 ** draw.normal(blocks, 1)  # blocks of many sizes
        check_quantized(quantize, w.view(-1), levels, blocksize)
    w = draw.normal(3, 4)
    w[1] = 0
    w[2] = -w[2].abs()  # only negative weights
    check_quantized(quantize, w.view(-1), nf4, 4)


def check_quantized(quantize, w: Tensor, levels: Tensor, blocksize: int) -> None:
    blocks = w.view(-1, blocksize)
    inputs = f"{len(blocks)} blocks of {blocksize} weights, {len(levels)} levels"
    codes, absmax = a_pair(call(quantize, w, levels, blocksize))
    has_shape("codes", codes, tuple(blocks.shape), inputs)
    has_shape("absmax", absmax, (len(blocks), 1), inputs)
    true = blocks.abs().amax(dim=1, keepdim=True)
    mistakes = {
        "the largest value, not the largest absolute value": blocks.amax(dim=1, keepdim=True),
        "one absmax for all blocks": w.abs().max().expand_as(true),
        "the mean of the absolute values": blocks.abs().mean(dim=1, keepdim=True),
    }
    compare("absmax", absmax, true, inputs, mistakes)
    whole = not codes.is_floating_point() and codes.dtype != torch.bool
    ensure(whole, f"codes must be integers, got {codes.dtype}: they are indexes of levels")
    codes = codes.long()
    inside = bool(((codes >= 0) & (codes < len(levels))).all())
    zero = "" if true.all() else " A block has only zeros."
    ensure(
        inside, f"codes must be from 0 to {len(levels) - 1}, got {codes.unique().tolist()}.{zero}"
    )
    error = (levels[codes] * true - blocks).abs()
    best = (levels * true[..., None] - blocks[..., None]).abs().amin(-1)
    wrong = (error - best) > 1e-5 * true
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        scaled = (blocks / true.clamp(min=1e-38))[at].item()
        level = levels[codes[at]].item()
        raise Wrong(
            f"a code is not that of the nearest level\n  input     {inputs}\n"
            f"  a weight  {scaled:.3f} times the absmax\n  got       level {level:.3f}\n"
            f"  expected  level {levels[(levels - scaled).abs().argmin()].item():.3f}"
        )


def formula_levels(n_negative: int, n_positive: int, p_max: float) -> Tensor:
    def quantiles(n: int) -> list[float]:
        return [NormalDist().inv_cdf(p_max - i * (p_max - 0.5) / n) for i in range(n)]

    largest = NormalDist().inv_cdf(p_max)
    values = [-q for q in quantiles(n_negative)] + [0.0] + quantiles(n_positive)
    return torch.tensor(sorted(values)) / largest


@exercise(
    "07.levels",
    "torch.linspace(p_max, 1 / 2, n + 1)[:-1] gives the values of p. What is Φ⁻¹ of each?",
    "Join the negative quantiles, 0 and the positive ones. Divide by the largest, and sort.",
)
def levels(make_levels, draw):
    def even(n_negative, n_positive, _):
        parts = torch.linspace(-1, 0, n_negative + 1), torch.linspace(0, 1, n_positive + 1)[1:]
        return torch.cat(parts)

    for inputs in ((1, 2, 0.9), (7, 8, NF4_P_MAX), (3, 4, 0.95), (1, 1, 0.8), (2, 5, 0.99)):
        got = call(make_levels, *inputs)
        if not isinstance(got, Tensor):
            try:
                got = torch.tensor([float(x) for x in got])
            except (TypeError, ValueError):
                raise Wrong(f"it must return the levels as a tensor, got {got!r:.100}") from None
        right = formula_levels(*inputs)
        text = "n_negative {}, n_positive {}, p_max {}".format(*inputs)
        mistakes = {
            "they are not divided by the largest": right * NormalDist().inv_cdf(inputs[2]),
            "they must ascend, and these descend": right.flip(0),
            "the numbers of negative and positive levels are swapped": -right.flip(0),
            "equal steps of the level, not of p": even(*inputs),
        }
        if got.dim() == 1 and len(got) > len(right):
            likely = (
                "p = 1/2 is included: that is zero once more"
                if (got.abs() < 1e-6).sum() > 1
                else "the number of levels does not follow n_negative and n_positive"
            )
            raise Wrong(
                f"there are {len(got)} levels, expected {len(right)}\n  input     {text}\n"
                f"  likely    {likely}"
            )
        compare("the levels", got.float(), right, text, mistakes)


@exercise(
    "07.bits",
    "The code of a weight has 4 bits. A float32 number has 32 bits, and 32 weights share it.",
    "4 bits, and the share of each weight in the absmax: 32 bits / 32 weights.",
)
def bits(bits, draw):
    mistakes = {
        4: "The absmax must be stored too.",
        4.5: "That is right for blocks of 64.",
        36: "The 32 weights of a block share one absmax.",
        8: "That is as if a float32 had 4 · 32 bits.",
        4.125: "float32 has 4 bytes, which are 32 bits.",
        6: "That is for blocks of 16.",
    }
    answered(bits, 5, mistakes, "4 bits, plus the bits of the absmax divided by its weights.")


# --- the 4-bit layer ---


@contextmanager
def explained(text: str):
    """What a student's code raises, as Wrong."""
    try:
        yield
    except Wrong:
        raise
    except Exception as error:
        if type(error).__name__ == "NotDone":
            raise
        raise Wrong(f"{text} raises {type(error).__name__}: {error}") from None


@exercise(
    "07.backward",
    "forward: ctx.q = q, and x @ dequantize_nf4(q).T. Which product gives the gradient of x?",
    "backward computes W again: grad @ dequantize_nf4(ctx.q). It returns two values; q's is None.",
)
def backward(Frozen4bit, draw):
    ensure(
        isinstance(Frozen4bit, type) and issubclass(Frozen4bit, torch.autograd.Function),
        "Frozen4bit must be a class that inherits from torch.autograd.Function",
    )
    for n_out, n_in, batch in (
        (3, 8, (2,)), (5, 7, (2, 3)), (4, 1, (1,)), (6, 6, (4,)), (48, 64, (2,)),
    ):  # fmt: skip
        q = quantize_nf4(draw.normal(n_out, n_in), 4, double_quant=False)
        x = draw.normal(*batch, n_in).requires_grad_()
        grad, W = draw.normal(*batch, n_out), dequantize_nf4(q)
        inputs = f"x {tuple(x.shape)}, W {(n_out, n_in)}"
        y, saved = run_forward(Frozen4bit, x, q, W)
        mistakes = {"W is not transposed: y = x Wᵀ": x @ W} if n_in == n_out else {}
        compare("the output", y, (x @ W.T).detach(), inputs, mistakes)
        ensure(
            y.requires_grad,
            "the output has no gradient: call the function with .apply, and do not detach x",
        )
        # The codes are all that may be kept. So if they change, the gradient must follow.
        q.scales.data.mul_(2)
        with explained("backward"):
            y.backward(grad)
        ensure(x.grad is not None, "backward gives no gradient for x")
        mistakes = {
            "W, or a copy, was kept from the forward pass: compute it again": grad @ W,
        }
        if n_in == n_out:
            mistakes["W is transposed: if y = x Wᵀ, the gradient of x is grad W"] = 2 * grad @ W.T
        compare("the gradient of x", x.grad, 2 * grad @ W, inputs, mistakes)
        if saved:
            raise Wrong(f"forward keeps {saved:,} numbers for backward, as many as W has or more")


def run_forward(Frozen4bit, x: Tensor, q, W: Tensor) -> tuple[Tensor, int]:
    """The output, and the numbers of the largest tensor that is kept, if it is as large as W.

    Searched: what `save_for_backward` gets, and all other tensors that are still alive. Only for a
    large W, because x and y may be as large as a small one.
    """
    large, sizes, saved = W.numel() >= 1024, [], lambda t: sizes.append(t.numel()) or t
    before = {id(t) for t in tensors()} if large else set()
    with explained("forward"), torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
        y = done(Frozen4bit.apply(x, q))
    ensure(isinstance(y, Tensor), f"forward must return a tensor, got {y!r:.100}")
    if large:
        gc.collect()
        sizes += [t.numel() for t in tensors() if id(t) not in before]
    return y, max([n for n in sizes if large and n >= W.numel()], default=0)


def tensors() -> list[Tensor]:
    """All tensors of the process that Python can see."""
    return [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]


@exercise(
    "07.gigabytes",
    "7 billion times the bits per weight gives bits. How many bits has a byte?",
    "7e9 · bits / 8 gives bytes. A GB has 1e9 bytes.",
)
def gigabytes(gigabytes, draw):
    number = gigabytes.item() if isinstance(gigabytes, Tensor) else gigabytes
    ensure(isinstance(number, int | float), f"it must be a number, got {number!r:.100}")
    right = 7 * 4.127 / 8
    for value, text in (
        (3.5, "Those are the codes only. The scales take bits too."),
        (14, "That is bfloat16: 16 bits per weight."),
        (28.9, "Those are gigabits. A byte has 8 bits."),
        (3.61e9, "Those are bytes. A GB has 1e9 of them."),
        (3.9375, "That is without double quantization."),
    ):
        ensure(abs(number / value - 1) > 0.004, f"{number:.4g}. {text}")
    close = abs(number / right - 1) < 0.01
    ensure(close, f"{number:.4g}. Multiply the weights by their bits, and divide by 8 and by 1e9.")


# --- going further ---


@exercise(
    "07.double",
    "Three parts: the code, the 8-bit scale of the block, and the float32 that 256 scales share.",
    "32 · 256 weights share one float32.",
)
def double(double, draw):
    mistakes = {
        4 + 32 / 32: "That is with scales in float32: double quantization makes them 8 bits.",
        4 + 8 / 32: "The scales have a scale too: a float32 for every 256 of them.",
        4 + 8 / 64 + 32 / (64 * 256): "That is for blocks of 64.",
        4 + 8 / 32 + 32 / (64 * 256): "256 scales belong to 32 · 256 weights, not 64 · 256.",
        4 + 8 / 32 + 32 / 256: "256 scales belong to 32 · 256 weights.",
        4 + 8 / 32 + 8 / (32 * 256): "The scale of the scales is a float32, with 32 bits.",
    }
    for value, text in mistakes.items():
        ensure(not _near(double, value), f"{double}. {text}")
    ensure(
        _near(double, 4 + 8 / 32 + 32 / (32 * 256)),
        f"{double!r}. Code, scale, and scale of scales: divide each by the weights that share it.",
    )


def _near(got, value: float) -> bool:
    got = got.item() if isinstance(got, Tensor) else got
    return isinstance(got, int | float) and abs(got - value) < 1e-4


@exercise(
    "07.paged",
    "The adapter of the widest layer has the largest matrix: A is r × 11,008.",
    "r · 11,008 must be at least 100,000. r is an integer.",
)
def paged(paged, draw):
    mistakes = {
        25: "That is for a side of 4,096. The MLP's matrices have a longer side.",
        9: "9 · 11,008 is less than 100,000.",
        8: "8 · 11,008 is less than 100,000.",
        7: "A and B are two tensors: each is stored, and paged or not, by itself.",
        16: "There is a smaller one.",
    }
    answered(paged, 10, mistakes, "The smallest r for which r · 11,008 is at least 100,000.")


@exercise(
    "07.merges",
    "The trained model computes with the dequantized weight plus scaling · B A.",
    "Both merges add scaling · B @ A: one to dequantize_nf4(q), the other to W.",
)
def merges(two_merges, draw):
    for n_out, n_in, r, scaling in ((4, 6, 2, 2.0), (5, 3, 1, 1.0), (8, 8, 3, 0.5)):
        W, A, B = draw.normal(n_out, n_in), draw.normal(r, n_in), draw.normal(n_out, r)
        q = quantize_nf4(W, 4, double_quant=False)
        Q, update = dequantize_nf4(q), scaling * B @ A
        inputs = f"W {(n_out, n_in)}, r {r}, scaling {scaling}"
        kept = [t.clone() for t in (W, A, B, q.codes, q.scales)]
        got = a_pair(call(two_merges, W, q, A, B, scaling))
        for before, after in zip(kept, (W, A, B, q.codes, q.scales), strict=True):
            ensure(torch.equal(before, after), "an input was changed: work on a copy")
        for name, merged, start in (("first", got[0], Q), ("second", got[1], W)):
            mistakes = {
                "the two are swapped": (W if start is Q else Q) + update,
                "the scaling is missing": start + B @ A,
                "that is only the update": update,
                "the update is missing": start,
                "it is quantized again": dequantize_nf4(quantize_nf4(start + update, 4, False)),
            }
            compare(f"the {name} merge", merged, start + update, inputs, mistakes)


def _correct(W, Q, r: int, alpha: float) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(W - Q, full_matrices=False)
    return vh[:r], u[:, :r] * s[:r] * r / alpha


# what the lesson uses for a function that is not right yet
FINISHED = {"correct": _correct}


@exercise(
    "07.correct",
    "Take the SVD of the error W - Q. The product (α/r) B A must be its r largest parts.",
    "B = u[:, :r] * s[:r] * r / alpha and A = vh[:r].",
)
def correct(correct, draw):
    for n_out, n_in, r, alpha in ((6, 4, 2, 3.0), (3, 7, 1, 1.0), (5, 5, 5, 2.0), (4, 9, 3, 12.0)):
        W = draw.normal(n_out, n_in)
        Q = W.sign() * W.abs().max()  # a coarse quantization
        A, B = a_pair(call(correct, W, Q, r, alpha))
        inputs = f"W {(n_out, n_in)}, r {r}, alpha {alpha:g}"
        has_shape("A", A, (r, n_in), inputs)
        has_shape("B", B, (n_out, r), inputs)

        def largest(matrix, r=r):
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            return u[:, :r] * s[:r] @ vh[:r]

        mistakes = {
            "the sign: the error is W - Q": -largest(W - Q),
            "the product is scaled by α/r: divide by it": alpha / r * largest(W - Q),
            "α/r is upside down": (alpha / r) ** 2 * largest(W - Q),
            "that is nearest to W, not to the error W - Q": largest(W),
        }
        compare("(α/r) B A", alpha / r * (B @ A), largest(W - Q), inputs, mistakes, 1e-4)
