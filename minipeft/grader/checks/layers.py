"""What the checks of dora.py, vera.py, ia3.py and pissa.py share.

Layers with known numbers, a model to adapt, and the tasks about a whole adapter.
"""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import skeleton
from ..judge import Checks, load
from ..symptoms import (
    Draw,
    Wrong,
    ensure,
    factor_of,
    same,
    set_factor,
    show,
    trainable,
    unchanged,
    with_case,
)
from .common import Conv1D, compare_losses, describe, losses

# in, out, r, α, bias, rslora. A square comes first: a wrong side is named before it is an error.
SIZES = (
    (3, 3, 2, 7.0, True, False), (2, 1, 1, 1.0, False, False), (4, 3, 2, 6.0, True, False),
    (6, 5, 4, 6.0, True, False), (5, 6, 3, 8.0, False, True),
)  # fmt: skip
TARGETS = ["proj", "project"]  # of Net: two Linear layers and a Conv1D
GPT_TARGETS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]  # all layers of the GPT


class Net(nn.Module):
    """A model with names that a careless search confuses."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 6)
        self.block = nn.ModuleDict({"proj": nn.Linear(6, 4), "q_proj": nn.Linear(4, 4)})
        self.norm, self.project = nn.LayerNorm(4), Conv1D(nn.Linear(4, 4))
        self.deep = nn.ModuleDict({"block": nn.ModuleDict({"out": nn.Linear(4, 4)})})

    def forward(self, x: Tensor) -> Tensor:
        x = self.block["proj"](self.proj(x))
        return self.project(self.norm(self.block["q_proj"](x)))


class Case:
    """A layer, the numbers that its adapter gets, and what it should compute with them.

    The subclass of a method has its formulas.
    """

    formula = ""  # of the number of trainable parameters
    kinds: tuple = (False,)  # with (False, True), there are feed-forward layers, which differ
    dropout = 0.0

    def __init__(self, draw: Draw, size: tuple, conv1d: bool = False, feedforward: bool = False):
        self.n_in, self.n_out, self.r, self.alpha, bias, self.rslora = size
        self.s = self.alpha / (math.sqrt(self.r) if self.rslora else self.r)
        self.feedforward = feedforward
        linear = nn.Linear(self.n_in, self.n_out, bias=bias)
        self.w = self.weight(draw)
        linear.weight.data = self.w.clone()
        self.b = draw.normal(self.n_out) if bias else None
        if self.b is not None:
            linear.bias.data = self.b.clone()
        self.base = Conv1D(linear) if conv1d else linear
        self.kind = type(self.base).__name__
        self.x = draw.normal(2, 3, self.n_in)
        shapes = self.shapes(self.n_in, self.n_out, self.r, feedforward)
        self.numbers = {name: draw.normal(*shape) for name, shape in shapes.items()}
        self.text = f"{self.kind}, in {self.n_in}, out {self.n_out}, x {show(self.x)}"

    def to(self, dtype: torch.dtype):
        """Convert the layers and all numbers."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor | nn.Module):
                setattr(self, name, value.to(dtype))
        self.numbers = {name: value.to(dtype) for name, value in self.numbers.items()}
        return self

    def weight(self, draw: Draw) -> Tensor:
        return draw.normal(self.n_out, self.n_in)

    @staticmethod
    def shapes(n_in: int, n_out: int, r: int, feedforward: bool) -> dict[str, tuple]:
        """The trained parameters of a layer."""
        raise NotImplementedError

    def make(self, m: ModuleType) -> nn.Module:
        """A new layer of the student's."""
        raise NotImplementedError

    def parts(self, numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """W' as the sum of two: what multiplies x, and what multiplies dropout(x); and b'."""
        raise NotImplementedError

    @staticmethod
    def add(m: ModuleType, net: nn.Module, targets: list[str], r: int) -> dict:
        """Adapt a model."""
        raise NotImplementedError

    def wrong_dropout(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The two parts of W' if dropout acts in a wrong place."""
        merged = self.merged
        return {"dropout is applied to the input of W too: only the update has it":
                (0 * merged, merged)}  # fmt: skip

    def layer(self, m: ModuleType) -> nn.Module:
        """A layer of the student's with the case's numbers."""
        layer = self.make(m)
        for name, value in self.numbers.items():
            set_factor(layer, name, value)
        return layer

    @property
    def merged(self) -> Tensor:
        """W'."""
        keep, update, _ = self.parts(self.numbers)
        return keep + update

    def output(self, x: Tensor) -> Tensor:
        """W' x + b'."""
        return F.linear(x, self.merged, self.parts(self.numbers)[2])

    def plain(self, x: Tensor) -> Tensor:
        """W x + b."""
        return F.linear(x, self.w, self.b)

    def scalings(self) -> dict[str, tuple[float, str]]:
        """Wrong factors of an update with the scaling s, and the mistake that leads to each."""
        return {
            "1 / s": (1 / self.s, "is the scaling s missing?"),
            "s": (self.s, "is the scaling s applied twice?"),
        }


def cases(case_type: type[Case], draw: Draw, dtype: torch.dtype = torch.float64) -> Iterator:
    """Cases of all sizes, and of a random one, each with a Linear and with a Conv1D.

    In float64: in float32, large terms that nearly cancel would leave a wrong difference.
    """
    drawn = (draw.integer(5, 9), draw.integer(10, 14), draw.integer(2, 4),
             draw.integer(5, 30) + 0.5, True, False)  # fmt: skip
    for conv1d, kind, size in product((False, True), case_type.kinds, (*SIZES, drawn)):
        yield case_type(draw, size, conv1d, kind).to(dtype)


def known(guesses: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Without those that a case does not have."""
    return {mistake: value for mistake, value in guesses.items() if value is not None}


def check_start(what: str, got, expected: Tensor, guesses: dict[str, Tensor], case: Case) -> None:
    """The start of a trained parameter."""
    ensure(isinstance(got, nn.Parameter), f"{what} must be an nn.Parameter, got {type(got)}")
    same(what, got, expected, guesses=guesses, case=case.text)
    ensure(got.requires_grad, f"{what} is not trainable")


def check_kind(m: ModuleType, draw: Draw, case_type: type[Case], *names: str) -> None:
    """Trained parameters are on the device of W, and have its dtype, but at least float32."""
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        case = case_type(draw, SIZES[0])
        case.base = nn.Linear(case.n_in, case.n_out, dtype=dtype, device="meta")
        with with_case(f"with a {dtype} base"):
            layer = case.make(m)
        for name in names:
            got = getattr(getattr(layer, name), "weight", getattr(layer, name))
            ensure(got.dtype == expected, f"{name} of a {dtype} base is in {got.dtype}, not in "
                   f"{expected}")  # fmt: skip
            ensure(got.device.type == "meta", f"{name} must be on the device of the base: it is "
                   f"on {got.device}")  # fmt: skip


def check_output(m: ModuleType, case: Case, guesses: dict[str, Tensor | None]) -> None:
    """The output of a layer with the case's numbers."""
    with with_case(f"with a {case.kind}"):
        y = case.layer(m)(case.x)
    same("the output", y, case.output(case.x), guesses=known(guesses), case=case.text)


def check_merged(m: ModuleType, case: Case, guesses: dict[str, Tensor | None]) -> None:
    """W', and that W stays."""
    layer, before = case.layer(m), case.base.weight.detach().clone()
    with with_case(f"with a {case.kind}"):
        found = layer.merged()
    what = "merged()" + " of a Conv1D" * (case.kind == "Conv1D")
    same(what, found, case.merged, guesses=known(guesses), case=case.text, start=case.w)
    unchanged("merged() returns a new tensor, but W", before, case.base.weight)


def check_dropout(m: ModuleType, draw: Draw, case_type: type[Case]) -> None:
    """Dropout acts on the input of the update. The base path, and evaluation, have none."""
    case = case_type(draw, (2, 3, 1, 1.0, True, False)).to(torch.float64)
    case.dropout = 0.5
    layer, x = case.layer(m), draw.normal(1, 2).double().expand(200, 2)
    y, plain = layer.train()(x), case.output(x)
    ensure(y.std(0).max() > 1e-4, "dropout has no effect in training mode")
    keep, update, bias = case.parts(case.numbers)
    dropped = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]]) * x[0]

    def nearest(keep: Tensor, update: Tensor) -> tuple[float, set[int]]:
        """How far outputs are from those with dropout in its place, and which of these occur."""
        allowed = F.linear(x[0], keep, bias) + dropped @ update.T  # (4, out)
        distance = (y[:, None] - allowed).abs().amax(2)  # (200, 4)
        return distance.amin(1).max().item(), set(distance.argmin(1).tolist())

    for mistake, parts in case.wrong_dropout().items():
        ensure(nearest(*parts)[0] > 1e-4, mistake)
    far, kinds = nearest(keep, update)
    ensure(far < 1e-4, "dropout must act on the input of the update, and keep its expected value")
    ensure(kinds == {0, 1, 2, 3}, "dropout acts on the output of a factor: it must act on x")
    same("in evaluation mode, the output", layer.eval()(x), plain,
         case="is dropout active in evaluation mode?")  # fmt: skip


class Whole:
    """The tasks about a whole adapter, its values from a library, and the reference to compare
    losses with. Making one registers the tasks of the level "layer"."""

    def __init__(self, checks: Checks, case_type: type[Case]):
        self.method, self.case_type, self.values = checks.method, case_type, {}
        for name, task in (
            ("starts out identical to the base", identity),
            ("gradients reach what is trained, and nothing else", gradients),
            ("merging keeps the output, unmerging restores it", merging),
            (f"trainable parameters: {case_type.formula}", count),
            ("a base in bfloat16 or float64", dtypes),
        ):
            checks.add("layer", name)(partial(task, case_type))

    def prepare(self, level: str, given: dict | None) -> None:
        """Read what the checks of a level need, as long as minipeft can be imported."""
        if level == "values":
            self.values.update(given or skeleton.stored(self.method))
        if level == "losses":
            describe()
            source = skeleton.reference(self.method).read_text(encoding="utf-8")
            self.reference = load("reference", source, "reference")

    def tensors(self, names: str) -> list[Tensor]:
        return [torch.tensor(self.values[name]) for name in names.split()]

    def ten_losses(self, m: ModuleType, peak: float, start: Callable | None = None) -> None:
        """Compare losses with the reference's. start: gives layers the same random numbers."""
        found = []
        for module in (self.reference, m):
            net = copy.deepcopy(describe()[0])
            layers = self.case_type.add(module, net, GPT_TARGETS, 4)
            generator = torch.Generator().manual_seed(0)
            for layer in layers.values():
                if start is not None:
                    start(layer, generator)

            def logits(batch, net=net):
                return net(batch["input_ids"], attention_mask=batch["attention_mask"]).logits

            found.append(losses([p for p in net.parameters() if p.requires_grad], logits, peak))
        if abs(found[0][0] - found[0][-1]) < 0.05:
            raise Wrong("the reference did not learn")  # cannot happen: see the tests
        compare_losses(found[1], found[0])


def identity(case_type: type[Case], m: ModuleType, draw: Draw) -> None:
    torch.manual_seed(1)
    net, x = Net(), draw.normal(3, 4)
    plain, before = copy.deepcopy(net), net(x).detach()
    layers = case_type.add(m, net, TARGETS, 2)
    same("the output of a model with a new adapter", net(x), before,
         case="the model must start out as the base model")  # fmt: skip
    for name, layer in layers.items():
        unchanged(f"the base weight of {name}", plain.get_submodule(name).weight,
                  layer.base_layer.weight)  # fmt: skip


def gradients(case_type: type[Case], m: ModuleType, draw: Draw) -> None:
    for case in cases(case_type, draw):
        layer, x = case.layer(m), case.x.clone().requires_grad_()
        case.base.requires_grad_(False)
        y = layer(x)
        weights = draw.normal(*y.shape)
        (y * weights).sum().backward()
        numbers = {name: v.clone().requires_grad_() for name, v in case.numbers.items()}
        wanted_x = case.x.clone().requires_grad_()
        keep, update, bias = case.parts(numbers)
        (F.linear(wanted_x, keep + update, bias) * weights).sum().backward()
        trained = set()
        for name, wanted in numbers.items():
            parameter = getattr(getattr(layer, name), "weight", getattr(layer, name))
            ensure(parameter.grad is not None, f"{name} gets no gradient")
            got = parameter.grad if parameter.shape == wanted.shape else parameter.grad.T
            same(f"the gradient of {name}", got, wanted.grad, 1e-4, case=case.text)
            trained.add(parameter)
        same("the gradient of x", x.grad, wanted_x.grad, 1e-4, case=case.text)
        more = [n for n, p in layer.named_parameters() if p.grad is not None and p not in trained]
        ensure(not more, f"{', '.join(more)} gets a gradient, and must be frozen")


@torch.no_grad()
def merging(case_type: type[Case], m: ModuleType, draw: Draw) -> None:
    torch.manual_seed(1)
    net = Net().double()
    layers, x = case_type.add(m, net, TARGETS, 2), draw.normal(3, 4).double()
    for parameter in trainable(net).values():
        parameter.copy_(draw.normal(*parameter.shape))
    before = net.eval()(x)
    for _ in range(3):
        for layer in layers.values():
            layer.merge()
        same("the output after merging", net(x), before)
        for layer in layers.values():
            layer.unmerge()
        ensure(torch.equal(net(x), before), "unmerging must restore the output exactly")


def count(case_type: type[Case], m: ModuleType, draw: Draw) -> None:
    net = Net()
    layers = case_type.add(m, net, TARGETS, 2)
    expected = 0
    for layer in layers.values():
        shapes = case_type.shapes(layer.in_features, layer.out_features, 2,
                                  getattr(layer, "is_feedforward", False))  # fmt: skip
        expected += sum(map(math.prod, shapes.values()))
    found = sum(p.numel() for p in trainable(net).values())
    ensure(found == expected, f"{case_type.formula}: {expected} for {len(layers)} layers, but "
           f"there are {found}")  # fmt: skip


def dtypes(case_type: type[Case], m: ModuleType, draw: Draw) -> None:
    """Trained numbers have at least float32; outputs have the dtype of the base."""
    kinds = ((torch.bfloat16, torch.float32, 0.03), (torch.float64, torch.float64, 1e-5))
    for (dtype, trained, tolerance), kind in product(kinds, case_type.kinds):
        case = case_type(draw, SIZES[0], feedforward=kind)
        case.w, case.b = case.w.to(dtype).float(), case.b.to(dtype).float()
        case.base.to(dtype)
        with with_case(f"with a {dtype} base"):
            layer = case.layer(m)
            y, w = layer(case.x.to(dtype)), layer.merged()
        for name in case.numbers:
            got = factor_of(layer, name, tuple(case.numbers[name].shape)).dtype
            ensure(got == trained, f"{name} of a {dtype} base is in {got}, not in {trained}")
        for what, value in (("the output", y), ("merged()", w)):
            ensure(value.dtype == dtype, f"{what} of a {dtype} base is in {value.dtype}")
        same(f"the output of a {dtype} base", y.float(), case.output(case.x), tolerance)
