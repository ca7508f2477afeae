"""What is graded in ia3.py."""

import copy
from types import ModuleType

import torch
from torch import Tensor, nn

from ..judge import Checks
from ..symptoms import Draw, ensure, same, set_factor, unchanged
from . import layers
from .layers import cases, check_kind, check_merged, check_output, check_start, known

CHECKS = Checks("ia3")
FEEDFORWARD = ["block.proj", "project", "c_proj"]  # of Net, and of the GPT


class Case(layers.Case):
    formula = "out, or in for a feed-forward layer"
    kinds = (False, True)

    @staticmethod
    def shapes(n_in: int, n_out: int, r: int, feedforward: bool) -> dict[str, tuple]:
        return {"ia3_l": (1, n_in) if feedforward else (n_out, 1)}

    def make(self, m: ModuleType) -> nn.Module:
        return m.IA3Linear(self.base, m.IA3Config(["0"], []), self.feedforward)

    def parts(self, numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        l, b = numbers["ia3_l"], self.b  # noqa: E741, as in the paper
        scaled = b if b is None or self.feedforward else b * l[:, 0]
        return self.w * l, torch.zeros_like(self.w), scaled

    @staticmethod
    def add(m: ModuleType, net: nn.Module, targets: list[str], r: int) -> dict:
        return m.add_ia3(net, m.IA3Config(targets, FEEDFORWARD))

    @property
    def factors(self) -> Tensor:
        """l, (out,) or (in,)."""
        return self.numbers["ia3_l"].flatten()

    @property
    def equation(self) -> str:
        return "(2), for a feed-forward layer," if self.feedforward else "(1)"

    def wrong_outputs(self) -> dict[str, Tensor | None]:
        """Wrong formulas for the output."""
        x, factors, plain = self.x, self.factors, self.plain(self.x)
        square, bias = self.n_in == self.n_out, 0 if self.b is None else self.b
        found = {"l is not used: it is W x + b": plain}
        if self.feedforward:
            wx = (x * factors) @ self.w.T
            return found | {
                "the bias b is missing": wx,
                "the bias b is added twice": wx + 2 * bias,
                "l multiplies the outputs: in a feed-forward layer it multiplies the inputs":
                    factors * plain if square else None,
                "l multiplies the bias b too: in (2) it multiplies only x":
                    wx + factors * bias if square else None,
                "l is added to x, and not multiplied": self.plain(x + factors),
                "x is divided by l": self.plain(x / factors),
                "a Conv1D stores W transposed: call the base layer instead":
                    x * factors @ self.w + bias if square else None,
            }  # fmt: skip
        return found | {
            "the bias b is missing": factors * (x @ self.w.T),
            "the bias b is not multiplied by l": factors * (x @ self.w.T) + bias,
            "l is applied twice": factors**2 * plain,
            "l multiplies W twice": factors * (factors * (x @ self.w.T) + bias),
            "l multiplies the bias twice": factors * (plain + bias * (factors - 1)),
            "W x + b is added to it": (1 + factors) * plain,
            "l multiplies the inputs: only in a feed-forward layer it does":
                self.plain(factors * x) if square else None,
            "l multiplies the tokens, and not the outputs: l is (out, 1), not (out,)":
                self.numbers["ia3_l"] * plain if self.n_out == x.shape[1] else None,
            "l is added to the outputs, and not multiplied": factors + plain,
            "the outputs are divided by l": plain / factors,
            "a Conv1D stores W transposed: call the base layer instead":
                factors * (x @ self.w + bias) if square else None,
        }  # fmt: skip


WHOLE = layers.Whole(CHECKS, Case)
prepare = WHOLE.prepare


@CHECKS.add("pieces", "start")
def start(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw, torch.float32):
        found, expected = getattr(case.make(m), "ia3_l", None), case.numbers["ia3_l"]
        ensure(found is not None, "the layer has no attribute ia3_l")
        swapped = (case.n_out, 1) if case.feedforward else (1, case.n_in)
        ensure(found.shape != swapped or swapped == expected.shape, f"ia3_l is {swapped}: are "
               "feed-forward layers, whose inputs are multiplied, and others swapped?")  # fmt: skip
        ensure(found.dim() == 2, f"ia3_l has the shape {tuple(found.shape)}: it must be "
               f"{tuple(expected.shape)}, two dimensions, as in peft")  # fmt: skip
        check_start("ia3_l", found, torch.ones_like(expected), {
            "it starts at 0: then all outputs are 0, and the model does not start as the base":
                torch.zeros_like(expected)}, case)  # fmt: skip
    check_kind(m, draw, Case, "ia3_l")


@CHECKS.add("pieces", "forward")
def forward(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        check_output(m, case, case.wrong_outputs())


@CHECKS.add("pieces", "bias")
def bias(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        found, b = case.layer(m).bias, case.b
        if b is None:
            ensure(found is None, "bias must be None for a layer without a bias")
            continue
        ensure(found is not None, "bias is None, and the base layer has a bias")
        ensure(found.dim() == 1, f"b' has the shape {tuple(found.shape)}: b is (out,), and l is "
               "(out, 1)")  # fmt: skip
        guesses = {"it is b: in (1), l multiplies the bias too": b}
        if case.feedforward and case.n_in == case.n_out:
            guesses = {"l multiplies b: in (2), l multiplies only x": case.factors * b}
        same(f"b' of {case.equation}", found, case.parts(case.numbers)[2], guesses=guesses,
             case=case.text)  # fmt: skip
        unchanged("b", b, case.base.bias)


@CHECKS.add("pieces", "merged")
def merged(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        guesses = {
            "it is W: l is not used": case.w,
            "W is added to it": case.w + case.merged,
            "it is W / l": case.w / case.numbers["ia3_l"],
        }
        if case.n_in == case.n_out:
            transposed = "a Conv1D stores W transposed: use matrix(self.base_layer)"
            guesses[transposed] = case.w.T * case.numbers["ia3_l"]
        if case.n_in == case.n_out and case.feedforward:
            rows = "l multiplies the rows: in a feed-forward layer it multiplies the columns"
            guesses[rows] = case.factors[:, None] * case.w
        elif case.n_in == case.n_out:
            guesses["l multiplies the columns: it must multiply the rows"] = case.w * case.factors
        check_merged(m, case, guesses)


@CHECKS.add("pieces", "merge")
def merge(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        layer = case.layer(m).eval()
        before, expected = copy.deepcopy(layer.state_dict()), case.output(case.x)
        for again in ("", " after merging again"):
            layer.merge()
            ensure(layer.merged_weight is not None, "merge() must set self.merged_weight")
            for name, tensor in before.items():
                unchanged(f"merge() stores W' and b', but {name}", tensor, layer.state_dict()[name])
            same(f"W' of {case.equation}{again}", layer.merged_weight, case.merged, case=case.text)
            same("the merged layer's output", layer(case.x), expected, case=case.text,
                 guesses=known(case.wrong_outputs()))  # fmt: skip
        names = set(dict(layer.named_parameters())) - set(before)
        ensure(not names, f"{', '.join(names)} is now a parameter of the layer: detach b', which "
               "is the Parameter of the base layer")  # fmt: skip
        ensure(not layer.merged_weight.requires_grad, "W' must not require a gradient")


def from_values(m: ModuleType, i: int) -> tuple[nn.Module, Tensor]:
    """A layer with peft's numbers, and its input. The second is a feed-forward layer."""
    w, b, factors, x = WHOLE.tensors(f"W{i} b{i} l{i} x{i}")
    base = nn.Linear(w.shape[1], w.shape[0])
    base.weight.data, base.bias.data = w, b
    layer = m.IA3Linear(base, m.IA3Config(["0"], []), i == 1)
    set_factor(layer, "ia3_l", factors)
    return layer.eval(), x


@CHECKS.add("values", "the outputs of Hugging Face peft's layers")
def peft_output(m: ModuleType, draw: Draw) -> None:
    for i in (0, 1):
        layer, x = from_values(m, i)
        same("the output", layer(x), *WHOLE.tensors(f"y{i}"))


@CHECKS.add("values", "the weights and biases that peft merges")
def peft_merged(m: ModuleType, draw: Draw) -> None:
    for i in (0, 1):
        layer = from_values(m, i)[0]
        w, b = WHOLE.tensors(f"merged{i} bias{i}")
        same("merged()", layer.merged(), w)
        same("bias", layer.bias, b)


@CHECKS.add("losses", "the first ten losses on describe")
def ten_losses(m: ModuleType, draw: Draw) -> None:
    WHOLE.ten_losses(m, 0.05)
