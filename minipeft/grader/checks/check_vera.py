"""What is graded in vera.py."""

import math
from types import ModuleType

import torch
from torch import Tensor, nn

from ..judge import Checks
from ..symptoms import Draw, Wrong, ensure, factor_of, same, set_factor, unchanged
from . import layers
from .common import Conv1D
from .layers import cases, check_dropout, check_kind, check_merged, check_output, check_start

CHECKS = Checks("vera")
D, B = "vera_lambda_d", "vera_lambda_b"


class Case(layers.Case):
    formula = "r + out per layer"

    def __init__(self, draw: Draw, *args, **options):
        super().__init__(draw, *args, **options)
        # The other layer is larger, and A and B are as large as that one needs.
        self.other = nn.Linear(self.n_in + 2, self.n_out + 3)
        self.all_a, self.all_b = (
            draw.normal(self.r, self.n_in + 2),
            draw.normal(self.n_out + 3, self.r),
        )
        self.a, self.b_matrix = self.all_a[:, : self.n_in], self.all_b[: self.n_out]

    @staticmethod
    def shapes(n_in: int, n_out: int, r: int, feedforward: bool) -> dict[str, tuple]:
        return {D: (r,), B: (n_out,)}

    def config(self, m: ModuleType):
        return m.VeraConfig(r=self.r, vera_dropout=self.dropout, d_initial=self.alpha)

    def make(self, m: ModuleType) -> nn.Module:
        config = self.config(m)
        return m.VeraLinear(self.base, config, m.Projections([self.base, self.other], config))

    def layer(self, m: ModuleType) -> nn.Module:
        layer = super().layer(m)
        with torch.no_grad():
            layer.projections.vera_A.copy_(self.all_a)
            layer.projections.vera_B.copy_(self.all_b)
        return layer

    def parts(self, numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        d, b = numbers[D], numbers[B]
        return self.w, b[:, None] * (self.b_matrix * d @ self.a), self.b

    @staticmethod
    def add(m: ModuleType, net: nn.Module, targets: list[str], r: int) -> dict:
        return m.add_vera(net, m.VeraConfig(r=r, target_modules=targets))


WHOLE = layers.Whole(CHECKS, Case)
prepare = WHOLE.prepare


@CHECKS.add("pieces", "projections")
def projections(m: ModuleType, draw: Draw) -> None:
    r = 200 + draw.integer(0, 9)
    found = [nn.Linear(4, 3), nn.Linear(2, 9), Conv1D(nn.Linear(8, 2))]
    for key in (0, draw.integer(1, 99)):
        config = m.VeraConfig(r=r, projection_prng_key=key)
        made = m.Projections(found, config)
        ensure(not list(made.parameters()), "A and B are Parameters: they must be buffers, which "
               "are never trained")  # fmt: skip
        buffers = dict(made.named_buffers())
        for name, shape, small in (("vera_A", (r, 8), (r, 4)), ("vera_B", (9, r), (3, r))):
            ensure(name in buffers, f"{name} must be a buffer: self.register_buffer")
            value = buffers[name]
            text = f"{name} has the shape {tuple(value.shape)}, expected {shape}"
            ensure(value.shape != small, f"{text}: that is the size of the first layer, and not of "
                   "the largest")  # fmt: skip
            ensure(value.shape == shape, text + ": the largest in and out of the layers")
            bound, most = math.sqrt(6 / shape[1]), value.abs().max().item()
            _range(name, value, bound, math.sqrt(6 / shape[0]))
            ensure(value.min() < -0.9 * bound, f"{name} is from {value.min():.2g} to {most:.2g}: "
                   f"expected ±{bound:.2g}")  # fmt: skip
        a, b = buffers["vera_A"].flatten(), buffers["vera_B"].flatten()
        ensure(not torch.allclose(a[:600] / a[0], b[:600] / b[0]), "A and B are made from the same "
               "numbers: draw both with one generator, and seed it once")  # fmt: skip
        torch.manual_seed(draw.integer(1, 999))
        again = m.Projections(found, config).vera_A
        ensure(torch.equal(again, buffers["vera_A"]), "the same projection_prng_key gives another "
               "A: draw with the generator")  # fmt: skip
        other = m.Projections(found, m.VeraConfig(r=r, projection_prng_key=key + 1)).vera_A
        ensure(not torch.equal(other, buffers["vera_A"]), "another projection_prng_key gives the "
               "same A")  # fmt: skip
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        made = m.Projections([nn.Linear(3, 3, dtype=dtype, device="meta")], m.VeraConfig(r=2))
        for name, value in made.named_buffers():
            ensure((value.dtype, value.device.type) == (expected, "meta"), f"{name} of a {dtype} "
                   f"base is in {value.dtype} on {value.device}: use self.to(…)")  # fmt: skip


def _range(name: str, value: Tensor, bound: float, rows: float) -> None:
    """Raise Wrong unless the largest number of a matrix is about what it should be."""
    most = value.abs().max().item()
    if 0.97 * bound < most <= bound * 1.0001:
        return
    text = f"{name} has numbers up to {most:.3g}, expected ±{bound:.3g}"
    for wrong, mistake in (
        (rows, "is the number of rows used, instead of that of columns?"),
        (bound / math.sqrt(6), "is the factor 6 missing?"),
        (math.sqrt(bound), "is a root taken twice?"),
        (bound**2, "is the root missing?"),
        (1.0, "are they in ±1?"),
    ):
        ensure(not 0.97 * wrong < most <= wrong, f"{text}: {mistake}")
    raise Wrong(text)


@CHECKS.add("pieces", "vectors")
def vectors(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw, torch.float32):
        layer = case.make(m)
        for name in (D, B):
            ensure(hasattr(layer, name), f"the layer has no attribute {name}")
        d, b = getattr(layer, D), getattr(layer, B)
        swapped = d.shape == (case.n_out,) and b.shape == (case.r,) and case.r != case.n_out
        ensure(not swapped, f"{D} has a number per output, and {B} has r numbers: they are swapped")
        ensure(d.any() or b.any(), "d and b are both zero: then neither of them gets a gradient")
        check_start(B, b, torch.zeros(case.n_out), {
            "it starts at 1: then the model does not start out as the base": torch.ones(case.n_out),
            "it starts at config.d_initial, which is for d": torch.full((case.n_out,), case.alpha),
        }, case)  # fmt: skip
        check_start(D, d, torch.full((case.r,), case.alpha), {
            "it starts at 1, and not at config.d_initial": torch.ones(case.r),
            "it starts at 0.1, and not at config.d_initial": torch.full((case.r,), 0.1),
            "it starts at 0": torch.zeros(case.r),
        }, case)  # fmt: skip
    check_kind(m, draw, Case, D, B)


@CHECKS.add("pieces", "shared")
def shared(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        found = case.layer(m).shared()
        ensure(isinstance(found, tuple | list) and len(found) == 2, "shared() must return A and B")
        a, b = found
        for name, got, everything in (("A", a, case.all_a), ("B", b, case.all_b)):
            ensure(got.shape != everything.shape, f"it is all of {name}, {tuple(got.shape)}: this "
                   f"layer has {case.n_in} inputs and {case.n_out} outputs")  # fmt: skip
        order = a.shape == case.b_matrix.shape and b.shape == case.a.shape
        ensure(not order or a.shape == b.shape, "first A, and then B: they are swapped")
        last = "these are the last {}: use the first ones"
        same("A", a, case.a, guesses={last.format("columns"): case.all_a[:, -case.n_in :]})
        same("B", b, case.b_matrix, guesses={last.format("rows"): case.all_b[-case.n_out :]})


@CHECKS.add("pieces", "forward")
def forward(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        x, plain, bias = case.x, case.plain(case.x), 0 if case.b is None else case.b
        d, b = case.numbers[D], case.numbers[B]
        h = x @ case.a.T
        without_b = (d * h) @ case.b_matrix.T
        update = b * without_b
        square = case.n_in == case.n_out
        check_output(m, case, {
            "it is the update without W x + c": update,
            "the update is missing": plain,
            "the bias c is missing": plain - bias + update,
            "the bias c is added twice": plain + bias + update,
            "the update is subtracted": plain - update,
            "d is missing": plain + b * (h @ case.b_matrix.T),
            "b is missing": plain + without_b,
            "d and b are missing": plain + h @ case.b_matrix.T,
            "d is applied twice": plain + b * ((d**2 * h) @ case.b_matrix.T),
            "b is applied twice": plain + b * update,
            "b also multiplies W x + c": b * (plain + without_b),
            "b is added, and not multiplied": plain + without_b + b,
            "d is added, and not multiplied": plain + b * ((d + h) @ case.b_matrix.T),
            "d and b are swapped":
                plain + d * ((b * h) @ case.b_matrix.T) if case.r == case.n_out else None,
            "b multiplies x, and not the outputs":
                plain + (d * ((b * x) @ case.a.T)) @ case.b_matrix.T if square else None,
            "a Conv1D stores W transposed: call the base layer instead":
                x @ case.w + bias + update if square else None,
        })  # fmt: skip
    check_dropout(m, draw, Case)


@CHECKS.add("pieces", "merged")
def merged(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        d, b, update = case.numbers[D], case.numbers[B], case.merged - case.w
        square = case.n_in == case.n_out
        check_merged(m, case, {
            "it is the update, without W": update,
            "it is W without the update": case.w,
            "it is W minus the update": case.w - update,
            "d is missing": case.w + b[:, None] * (case.b_matrix @ case.a),
            "b is missing": case.w + case.b_matrix * d @ case.a,
            "d and b are missing": case.w + case.b_matrix @ case.a,
            "b also multiplies W": b[:, None] * (case.w + case.b_matrix * d @ case.a),
            "b multiplies the columns: it must multiply the rows":
                case.w + (case.b_matrix * d @ case.a) * b if square else None,
        })  # fmt: skip


@CHECKS.add("pieces", "add_vera")
def add_vera(m: ModuleType, draw: Draw) -> None:
    targets = {"a": nn.Linear(4, 3), "b": nn.Linear(2, 5), "d": Conv1D(nn.Linear(6, 2))}
    before = {name: layer.weight.detach().clone() for name, layer in targets.items()}
    config = m.VeraConfig(r=3, target_modules=list(targets))
    found = m.add_vera(nn.ModuleDict(targets), config)
    ensure(isinstance(found, dict) and set(found) == set(targets), "add_vera must return a dict "
           "of layers with the names of the targets")  # fmt: skip
    for name, layer in found.items():
        ensure(isinstance(layer, m.VeraLinear), f"{name} must be a VeraLinear")
        ensure(layer.base_layer is targets[name], f"the base_layer of {name} is another layer")
        unchanged(f"W of {name}", before[name], layer.base_layer.weight)
        ensure(layer.projections is found["a"].projections, "each layer has an A and a B of its "
               "own: make Projections once, for all of them")  # fmt: skip
    a = found["a"].projections.vera_A
    ensure(a.shape == (3, 6), f"A is {tuple(a.shape)}, expected (3, 6): Projections needs the list "
           "of all layers")  # fmt: skip
    b = {factor_of(layer, B, (layer.out_features,)).data_ptr() for layer in found.values()}
    ensure(len(b) == 3, "the layers share b: each has its own")


def from_values(m: ModuleType) -> tuple[nn.Module, nn.Module]:
    """Two layers with peft's numbers, and the A and B of the student's."""
    targets = {}
    for i in "01":
        w, bias = WHOLE.tensors(f"W{i} bias{i}")
        targets[i] = nn.Linear(w.shape[1], w.shape[0])
        targets[i].weight.data, targets[i].bias.data = w, bias
    config = m.VeraConfig(r=3, projection_prng_key=WHOLE.values["key"])
    shared = m.Projections(list(targets.values()), config)
    found = {i: m.VeraLinear(layer, config, shared) for i, layer in targets.items()}
    for i, layer in found.items():
        for name, value in zip((D, B), WHOLE.tensors(f"d{i} b{i}"), strict=True):
            set_factor(layer, name, value)
    return found["0"].eval(), found["1"].eval()


@CHECKS.add("values", "the A and B that Hugging Face peft draws")
def peft_draws(m: ModuleType, draw: Draw) -> None:
    found = from_values(m)[0].projections
    for name in "AB":
        (expected,) = WHOLE.tensors(name)
        same(f"vera_{name} of the key {WHOLE.values['key']}", getattr(found, f"vera_{name}"),
             expected, case="draw A, and then B, with uniform_ and this generator")  # fmt: skip


@CHECKS.add("values", "the outputs and merged weights of peft's layers")
def peft_output(m: ModuleType, draw: Draw) -> None:
    for i, layer in enumerate(from_values(m)):
        x, y, w = WHOLE.tensors(f"x{i} y{i} merged{i}")
        same("the output", layer(x), y)
        same("merged()", layer.merged(), w)


@CHECKS.add("losses", "the first ten losses on describe")
def ten_losses(m: ModuleType, draw: Draw) -> None:
    WHOLE.ten_losses(m, 0.05)
