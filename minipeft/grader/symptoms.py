"""How a result is wrong: its symptom first, and then the likely mistake, if there is one.

A check compares what a student's code gives with what it should give. `same` describes the
difference: another shape, a constant factor, the opposite sign, the value of a known wrong formula.
"""

import math
import random
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Wrong(AssertionError):
    """A check failed. The text is the symptom and, after it, the likely mistake."""


class Draw:
    """Random sizes and numbers of a grading. A student's seed makes a variant: other numbers, but
    the same edge cases."""

    def __init__(self, seed: int = 0):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return self.random.randint(low, high)

    def normal(self, *shape: int | tuple) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def tokens(self, vocab_size: int, *shape: int) -> Tensor:
        return torch.randint(1, vocab_size, shape, generator=self.generator)


def ensure(condition, symptom: str) -> None:
    """Raise Wrong unless a condition holds."""
    if not condition:
        raise Wrong(symptom)


@contextmanager
def with_case(text: str):
    """Name the inputs if a student's code raises an error: "with a bfloat16 layer"."""
    try:
        yield
    except Exception as error:
        error.case = text  # type: ignore
        raise


def show(value) -> str:
    """A number, or the few first numbers of a tensor."""
    if not isinstance(value, Tensor):
        return f"{value:.5g}" if isinstance(value, float) else repr(value)[:100]
    numbers = [f"{x:.4g}" for x in value.detach().flatten()[:6].tolist()]
    return f"[{', '.join(numbers)}{', …' if value.numel() > 6 else ''}]"


def same(
    what: str, got, expected: Tensor, tolerance: float = 1e-5,
    guesses: dict[str, Tensor] | None = None, factors: dict[str, tuple[float, str]] | None = None,
    case: str = "", start: Tensor | None = None,
) -> None:  # fmt: skip
    """Raise Wrong unless two tensors are equal, up to rounding.

    what: names the value. tolerance: relative to the largest entry. guesses: wrong values, each
    under the mistake that leads to it. factors: wrong factors by their names, each with its value
    and mistake. case: the inputs, printed if no guess matches. start: the difference to it must be
    equal, as for the output of a layer without its adapter.
    """
    like(what, got, expected)
    got, expected = got.detach().double(), expected.detach().double()
    largest = max(expected.abs().max().item() if expected.numel() else 0.0, 1e-6)

    def close(a: Tensor, b: Tensor) -> bool:
        return bool(torch.allclose(a, b, rtol=0, atol=tolerance * largest))

    if close(got, expected):
        return
    ensure(got.isfinite().all(), f"{what} has entries that are not finite (NaN or infinity)")
    for mistake, value in (guesses or {}).items():
        if value.shape == got.shape and close(got, value.double()):
            raise Wrong(f"{what} is wrong: {mistake}")
    origin = torch.zeros_like(got) if start is None else start.detach().double()
    text = _difference(got - origin, expected - origin, close, factors or {})
    named = text.endswith("?") or not case
    raise Wrong(f"{what} {text}" + ("" if named else f" ({case})"))


def like(what: str, got, expected: Tensor) -> None:
    """Raise Wrong unless this is a tensor with the expected shape and dtype."""
    ensure(isinstance(got, Tensor), f"{what} must be a tensor, got {type(got).__name__}")
    if got.shape != expected.shape:
        text = f"{what} has the shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        transposed = got.dim() == 2 and got.T.shape == expected.shape
        raise Wrong(text + (": it is transposed" if transposed else ""))
    ensure(got.dtype == expected.dtype, f"{what} has the dtype {got.dtype}, not {expected.dtype}")


def _difference(
    got: Tensor, expected: Tensor, close: Callable, factors: dict[str, tuple[float, str]]
) -> str:
    """The symptom in words."""
    if not expected.any():
        return f"must be zero, but is {show(got)}"
    if close(got, torch.zeros_like(got)):
        return "is zero everywhere: the result of the computation is not used"
    factor = ((got * expected).sum() / (expected * expected).sum()).item()
    if close(got, factor * expected):
        if math.isclose(factor, -1, rel_tol=1e-3):
            return "has the opposite sign"
        size = f"{factor:.3g} times too large" if factor > 1 else f"{factor:.3g} of what it must be"
        for name, (value, mistake) in factors.items():
            if math.isclose(factor, value, rel_tol=1e-3):
                return f"is {size}, and {name} is {value:.3g}: {mistake}"
        return f"is {size}"
    for dim in range(got.dim()):
        if got.shape[dim] > 1:
            if close(got, expected.flip(dim)):
                return f"has its entries in reverse order along dimension {dim}"
            for by in range(1, got.shape[dim]):
                if close(got, expected.roll(by, dim)):
                    return f"is shifted by {by} along dimension {dim}"
    if got.dim() == 2 and got.shape[0] == got.shape[1] and close(got, expected.T):
        return "is transposed"
    wrong = [tuple(i) for i in (got - expected).abs().gt(0).nonzero().tolist()
             if not close(got[tuple(i)], expected[tuple(i)])]  # fmt: skip
    at = wrong[0]
    share = f"{len(wrong)} of {got.numel()} entries" if len(wrong) < got.numel() else "every entry"
    where = f"entry {list(at)} is {got[at]:.5g}, expected {expected[at]:.5g}"
    return f"is wrong in {share}: {where}"


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def unchanged(what: str, before: Tensor, after: Tensor) -> None:
    ensure(torch.equal(before, after), f"{what} has changed, and it must not")


def factor_of(layer: nn.Module, name: str, shape: tuple[int, ...]) -> Tensor:
    """A trained matrix of a layer as a tensor (out, in): a Linear's weight or a Parameter."""
    value = getattr(layer, name, None)
    ensure(value is not None, f"the layer has no attribute {name}")
    value = getattr(value, "weight", value)
    ensure(isinstance(value, Tensor), f"{name} must be a Linear or a Parameter")
    ensure(
        tuple(value.shape) in (shape, shape[::-1]),
        f"{name} has the shape {tuple(value.shape)}, expected {shape}",
    )
    return value if tuple(value.shape) == shape else value.T


@torch.no_grad()
def set_factor(layer: nn.Module, name: str, value: Tensor) -> None:
    """Set a trained matrix, as the shape that the student's file gives it."""
    target = factor_of(layer, name, tuple(value.shape))
    target.copy_(value)
