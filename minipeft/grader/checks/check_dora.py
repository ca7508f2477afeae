"""What is graded in dora.py."""

import math
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..judge import Checks
from ..symptoms import Draw, ensure, same, set_factor
from . import layers
from .layers import cases, check_dropout, check_kind, check_merged, check_output, check_start

CHECKS = Checks("dora")
M = "lora_magnitude_vector"


def config(r: int, alpha: float, rslora: bool = False, dropout: float = 0.0, targets=None):
    return SimpleNamespace(r=r, lora_alpha=alpha, use_rslora=rslora, lora_dropout=dropout,
                           target_modules=targets)  # fmt: skip


class Case(layers.Case):
    formula = "r (in + out) + out per layer"

    @staticmethod
    def shapes(n_in: int, n_out: int, r: int, feedforward: bool) -> dict[str, tuple]:
        return {"lora_A": (r, n_in), "lora_B": (n_out, r), M: (n_out,)}

    def make(self, m: ModuleType) -> nn.Module:
        return m.DoraLinear(self.base, config(self.r, self.alpha, self.rslora, self.dropout))

    def parts(self, numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        update = self.s * numbers["lora_B"] @ numbers["lora_A"]
        ratio = (numbers[M] / (self.w + update).norm(dim=1).detach())[:, None]
        return ratio * self.w, ratio * update, self.b

    @staticmethod
    def add(m: ModuleType, net: nn.Module, targets: list[str], r: int) -> dict:
        return m.add_dora(net, config(r, 12.0, targets=targets))

    @property
    def update(self) -> Tensor:
        """s B A."""
        return self.s * self.numbers["lora_B"] @ self.numbers["lora_A"]

    @property
    def v(self) -> Tensor:
        return self.w + self.update

    @property
    def ratio(self) -> Tensor:
        return self.numbers[M] / self.v.norm(dim=1)


WHOLE = layers.Whole(CHECKS, Case)
prepare = WHOLE.prepare


def per_row(what: str, found, case: Case) -> None:
    """Raise Wrong if there is a number per column, and not per row."""
    columns = isinstance(found, Tensor) and found.shape == (case.n_in,) != (case.n_out,)
    ensure(not columns, f"{what} has one number per column, ({case.n_in},): it must be one per "
           f"row, ({case.n_out},)")  # fmt: skip


@CHECKS.add("pieces", "magnitude")
def magnitude(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw, torch.float32):
        found, w = getattr(case.make(m), M, None), case.w
        ensure(found is not None, f"the layer has no attribute {M}")
        per_row(M, found, case)
        check_start(M, found, w.norm(dim=1), {
            "it starts at 1: then the model does not start out as the base": torch.ones(case.n_out),
            "it starts at 0: then the model does not start out as the base": 0 * w[:, 0],
            "it has the norms of the columns, and not of the rows": w.norm(dim=0),
            "these are the squares of the norms": w.square().sum(1),
            "each entry is the norm of all of W": w.norm().expand(case.n_out),
            "these are sums of absolute values, and not the lengths": w.abs().sum(1),
            "these are means, and not the lengths": w.square().mean(1).sqrt(),
        }, case)  # fmt: skip
    check_kind(m, draw, Case, M)


@CHECKS.add("pieces", "directions")
def directions(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        found = case.layer(m).directions()
        guesses = {"it is the update alone, without W": case.update,
                   "it is W without the update": case.w,
                   "it is W - s B A": case.w - case.update,
                   "s also multiplies W": case.s * case.w + case.update,
                   "its rows are divided by their lengths: that is done in (2)":
                       F.normalize(case.v)}  # fmt: skip
        if case.n_in == case.n_out:
            transposed = "a Conv1D stores W transposed: use matrix(self.base_layer)"
            guesses[transposed] = case.w.T + case.update
        same("V", found, case.v, guesses=guesses, factors=case.scalings(), case=case.text,
             start=case.w)  # fmt: skip


@CHECKS.add("pieces", "ratio")
def ratio(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        layer, mag = case.layer(m), case.numbers[M]
        found = layer.ratio()
        guesses = {
            "it is the inverse, ‖V‖ / m": 1 / case.ratio,
            "it is 1 / ‖V‖: m is not used": case.ratio / mag,
            "it is m: ‖V‖ is not used": mag,
            "it is m ‖V‖": mag * case.v.norm(dim=1),
            "the norm is that of W: A and B are not used": mag / case.w.norm(dim=1),
            "the norm is that of s B A, without W": mag / case.update.norm(dim=1),
            "the norm is that of all of V: it must be one per row": mag / case.v.norm(),
            "the norm is squared": mag / case.v.norm(dim=1) ** 2,
        }
        columns = case.v.norm(dim=0)
        if case.n_in == case.n_out:
            guesses["the norms are those of V's columns, and not of its rows"] = mag / columns
        per_row("m / ‖V‖", found, case)
        same("m / ‖V‖", found, case.ratio, 1e-4, guesses=guesses, case=case.text)
        ensure(found.requires_grad, "m gets no gradient through ratio()")
        found.sum().backward()
        for name in ("lora_A", "lora_B"):
            factor = getattr(layer, name)
            grad = getattr(factor, "weight", factor).grad
            ensure(grad is None or not grad.any(), f"{name} gets a gradient through ‖V‖, which "
                   "must count as a constant")  # fmt: skip
        parameter = getattr(layer, M)
        ensure(parameter.grad is not None, "m gets no gradient through ratio()")
        same("the gradient of m through ratio()", parameter.grad, case.ratio / mag, 1e-4)
    case = Case(draw, layers.SIZES[0])
    with torch.no_grad():
        case.base.weight[0] = 0
    layer = case.make(m)  # B starts at zero: a row of V is zero, and its m is zero
    set_factor(layer, "lora_B", torch.zeros(case.n_out, case.r))
    found = layer.ratio()
    ensure(found.isfinite().all(), "the ratio is not finite if a row of V is zero")


@CHECKS.add("pieces", "forward")
def forward(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        x, ratio, bias = case.x, case.ratio, 0 if case.b is None else case.b
        wx, lora = x @ case.w.T, x @ case.update.T
        square = case.n_in == case.n_out
        guesses = {
            "the bias b is missing": ratio * (wx + lora),
            "the bias b is multiplied by m / ‖V‖ too": ratio * (wx + lora + bias),
            "the bias b is added twice": ratio * (wx + lora) + 2 * bias,
            "W x already has the bias: b is multiplied, and added again":
                ratio * (wx + bias + lora) + bias,
            "m / ‖V‖ is not used: this is LoRA": wx + lora + bias,
            "m / ‖V‖ multiplies only W x": ratio * wx + lora + bias,
            "m / ‖V‖ multiplies only the update": wx + ratio * lora + bias,
            "W x is missing": ratio * lora + bias,
            "the update is missing": ratio * wx + bias,
            "W x is added twice, once without m / ‖V‖": (ratio + 1) * wx + ratio * lora + bias,
            "the scaling s is missing": ratio * (wx + lora / case.s) + bias,
            "the scaling s is applied twice": ratio * (wx + lora * case.s) + bias,
            "‖V‖ is not divided by": case.numbers[M] * (wx + lora) + bias,
            "m is not used": F.linear(x, F.normalize(case.v), case.b),
            "a Conv1D stores W transposed: call the base layer instead":
                ratio * (x @ case.w + lora) + bias if square else None,
        }  # fmt: skip
        check_output(m, case, guesses)
    check_dropout(m, draw, Case)


@CHECKS.add("pieces", "merged")
def merged(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        square, ratio = case.n_in == case.n_out, case.ratio
        check_merged(m, case, {
            "it is V: m / ‖V‖ is missing": case.v,
            "it is V / ‖V‖: m is missing": F.normalize(case.v),
            "it is m V: ‖V‖ is missing": case.numbers[M][:, None] * case.v,
            "m / ‖V‖ multiplies W instead of V": ratio[:, None] * case.w,
            "m / ‖V‖ multiplies only W": ratio[:, None] * case.w + case.update,
            "W is added to W'": ratio[:, None] * case.v + case.w,
            "m / ‖V‖ multiplies the columns: it must multiply the rows":
                ratio * case.v if square else None,
        })  # fmt: skip


def from_values(m: ModuleType) -> nn.Module:
    w, bias, a, b, mag = WHOLE.tensors("W b A B m")
    base = nn.Linear(w.shape[1], w.shape[0])
    base.weight.data, base.bias.data = w, bias
    layer = m.DoraLinear(base, config(len(a), WHOLE.values["alpha"]))
    for name, value in (("lora_A", a), ("lora_B", b), (M, mag)):
        set_factor(layer, name, value)
    return layer.eval()


@CHECKS.add("values", "the output of Hugging Face peft's layer")
def peft_output(m: ModuleType, draw: Draw) -> None:
    x, y = WHOLE.tensors("x y")
    same("the output", from_values(m)(x), y)


@CHECKS.add("values", "the weight that peft merges")
def peft_merged(m: ModuleType, draw: Draw) -> None:
    (expected,) = WHOLE.tensors("merged")
    same("merged()", from_values(m).merged(), expected)


@CHECKS.add("losses", "the first ten losses on describe")
def ten_losses(m: ModuleType, draw: Draw) -> None:
    def start(layer: nn.Module, generator: torch.Generator) -> None:
        n_in = layer.in_features
        a = torch.randn(4, n_in, generator=generator) / math.sqrt(n_in)
        set_factor(layer, "lora_A", a)

    WHOLE.ten_losses(m, 0.01, start)
