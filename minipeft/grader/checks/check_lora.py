"""What is graded in lora.py."""

import copy
import math
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
from .layers import Net

CHECKS = Checks("lora")
# in, out, r, α, bias, rslora: from the smallest case to larger ones.
CASES = (
    (2, 1, 1, 1.0, False, False), (4, 3, 2, 6.0, True, False), (6, 5, 4, 7.0, True, False),
    (5, 6, 3, 8.0, False, True),
)  # fmt: skip
values, reference = {}, None


def prepare(level: str, given: dict | None) -> None:
    """Read what the checks of a level need, as long as minipeft can be imported."""
    global reference
    if level == "values":
        values.update(given or skeleton.stored("lora"))
    if level == "losses":
        describe()
        reference = load("reference", skeleton.reference("lora").read_text(), "reference")


class Case:
    """A layer with known matrices, and what it should compute."""

    def __init__(self, m: ModuleType, draw: Draw, case: tuple, transposed: bool = False):
        n_in, n_out, r, alpha, bias, rslora = case
        linear = nn.Linear(n_in, n_out, bias=bias)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.copy_(draw.normal(*parameter.shape))
        self.w, self.b = linear.weight.detach().clone(), linear.bias
        self.base = Conv1D(linear) if transposed else linear
        self.x = draw.normal(2, 3, n_in)
        self.a, self.b_factor = draw.normal(r, n_in), draw.normal(n_out, r)
        self.s = alpha / math.sqrt(r) if rslora else alpha / r
        self.r, self.alpha = r, alpha
        self.config = m.LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora)
        self.text = f"in {n_in}, out {n_out}, r {r}, α {alpha:g}, x {show(self.x)}"

    def layer(self, m: ModuleType) -> nn.Module:
        layer = m.LoraLinear(self.base, self.config)
        set_factor(layer, "lora_A", self.a)
        set_factor(layer, "lora_B", self.b_factor)
        return layer

    @property
    def update(self) -> Tensor:
        """s B A."""
        return self.s * self.b_factor @ self.a

    def plain(self, x: Tensor) -> Tensor:
        """W x + b."""
        return F.linear(x, self.w, self.b)

    def factors(self) -> dict[str, tuple[float, str]]:
        """Wrong factors of the update, and the mistake that leads to each."""
        r, alpha, s = self.r, self.alpha, self.s
        root = math.sqrt(r)
        return {
            "α": (alpha, "is α multiplied in twice?"),
            "1 / s": (1 / s, "is the scaling s missing?"),
            "s": (s, "is the scaling s applied twice?"),
            "r": (alpha / s, "is α divided by r?") if s == alpha / r else (
                alpha / s, "is α divided by √r?"),
            "√r": (root, "with use_rslora, α is divided by √r, and else by r"),
            "1 / √r": (1 / root, "with use_rslora, α is divided by √r, and else by r"),
            "r²": (r**2, "is α multiplied by r instead of divided?"),
            "r / α²": (1 / (s * alpha), "is it r / α instead of α / r?"),
            "r² / α²": (1 / s**2, "is it r / α instead of α / r?"),
        }  # fmt: skip


def cases(m: ModuleType, draw: Draw, transposed: bool = False) -> list[Case]:
    drawn = (draw.integer(5, 9), draw.integer(10, 14), draw.integer(2, 4),
             draw.integer(5, 30) + 0.5, True, False)  # fmt: skip
    return [Case(m, draw, case, transposed) for case in (*CASES, drawn)]


def started(m: ModuleType, case: Case) -> nn.Module:
    """A layer whose __init__ may stop at a later hole."""
    layer = m.LoraLinear.__new__(m.LoraLinear)
    try:
        layer.__init__(case.base, case.config)
    except NotImplementedError:
        if not hasattr(layer, "scaling"):
            raise
    return layer


@CHECKS.add("pieces", "scaling")
def scaling(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        found = started(m, case).scaling
        text = f"r {case.r}, α {case.alpha:g}, use_rslora {case.config.use_rslora}"
        same("self.scaling", torch.as_tensor(float(found)), torch.tensor(case.s),
             factors=case.factors(), case=text)  # fmt: skip


@CHECKS.add("pieces", "factors")
def factors(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        n_out, n_in = case.w.shape
        layer = m.LoraLinear(case.base, case.config)
        a = factor_of(layer, "lora_A", (case.r, n_in))
        b = factor_of(layer, "lora_B", (n_out, case.r))
        ensure(not b.any(), "lora_B must start at zero: else the model does not start as the base")
        ensure(a.any(), "lora_A is zero, as lora_B is: then neither of them ever gets a gradient")
        if a.numel() > 8:
            ensure(a.unique().numel() > a.numel() // 2, f"lora_A is not random: {show(a)}")
            ensure(a.min() < 0 < a.max(), f"all of lora_A has one sign: {show(a)}")
            again = factor_of(m.LoraLinear(case.base, case.config), "lora_A", (case.r, n_in))
            ensure(not torch.equal(a, again), "lora_A starts with the same values in every layer")
            size = a.std().item() * math.sqrt(n_in)
            ensure(0.05 < size < 20, f"lora_A starts with a standard deviation of {a.std():.2g}: "
                   f"1 / √in is {n_in**-0.5:.2g}")  # fmt: skip
        for name in ("lora_A", "lora_B"):
            ensure(any(name in found for found in trainable(layer)), f"{name} is not trainable")
        bias = [n for n, _ in layer.named_parameters() if n.startswith("lora") and "bias" in n]
        ensure(not bias, f"A and B have no bias, but there is {', '.join(bias)}")
    for kind, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        with with_case(f"with a {kind} layer"):
            layer = m.LoraLinear(nn.Linear(4, 4, dtype=kind, device="meta"), m.LoraConfig(r=2))
        for name in ("lora_A", "lora_B"):
            factor = getattr(getattr(layer, name), "weight", getattr(layer, name))
            ensure(factor.dtype == expected, f"{name} of a layer in {kind} is in {factor.dtype}, "
                   f"not in {expected}")  # fmt: skip
            ensure(factor.device.type == "meta", f"{name} must be on the device of the layer: it "
                   f"is on {factor.device}")  # fmt: skip


@CHECKS.add("pieces", "forward")
def forward(m: ModuleType, draw: Draw) -> None:
    square = Case(m, draw, (3, 3, 2, 6.0, True, False), transposed=True)
    for case in (*cases(m, draw), *cases(m, draw, transposed=True), square):
        layer, x = case.layer(m), case.x
        plain, update = case.plain(x), x @ case.update.T
        guesses = {
            "it is the update without W x + b": update,
            "the bias b is missing": x @ case.w.T + update,
            "the bias b is added twice": plain + update + (0 if case.b is None else case.b),
            "the update is subtracted": plain - update,
            "the scaling s also multiplies W x + b": case.s * plain + update,
            "A is applied to the output of the base layer": _chained(case, plain),
        }
        if case is square:
            guesses["a Conv1D stores W transposed: call the base layer instead"] = (
                F.linear(x, case.w.T, case.b) + update
            )
        kind = type(case.base).__name__
        with with_case(f"with a {kind}"):
            y = layer(x)
        same("the update (the output minus W x + b)", y, plain + update,
             guesses={k: v for k, v in guesses.items() if v is not None},
             factors=case.factors(), case=f"{kind}, {case.text}", start=plain)  # fmt: skip
    _dropout(m, draw)
    _half(m, draw)


def _chained(case: Case, plain: Tensor) -> Tensor | None:
    n_out, n_in = case.w.shape
    return plain + plain @ case.update.T if n_out == n_in > 1 else None


def _dropout(m: ModuleType, draw: Draw) -> None:
    """Dropout acts on the input of A: the base path, and evaluation, have none."""
    linear = nn.Linear(2, 3)
    layer = m.LoraLinear(linear, m.LoraConfig(r=1, lora_alpha=1, lora_dropout=0.5))
    x = draw.normal(1, 2).expand(200, 2)
    plain = linear(x)
    same("with B = 0 and dropout, the output", layer.train()(x), plain,
         case="is dropout applied to the input of the base layer?")  # fmt: skip
    set_factor(layer, "lora_A", torch.ones(1, 2))
    set_factor(layer, "lora_B", torch.ones(3, 1))
    update = (layer(x) - plain)[:, 0]
    a, b = x[0]
    allowed = torch.stack((a * 0, 2 * a, 2 * b, 2 * (a + b)))
    kinds = {int((u - allowed).abs().argmin()) for u in update}
    near = (update[:, None] - allowed).abs().amin(1).max()
    ensure(update.std() > 1e-4, "dropout has no effect in training mode")
    ensure(near < 1e-4, "dropout must act on the input of A, and keep its expected value")
    ensure(kinds == {0, 1, 2, 3}, "dropout acts on the output of A or B: it must act on x")
    same("in evaluation mode, the output", layer.eval()(x), plain + x @ torch.ones(2, 3),
         guesses={}, case="is dropout active in evaluation mode?")  # fmt: skip


def _half(m: ModuleType, draw: Draw) -> None:
    """The update is computed in float32, also for a bfloat16 layer, and added in its dtype."""
    half = nn.Linear(2, 3).to(torch.bfloat16)
    for parameter in half.parameters():
        nn.init.zeros_(parameter)
    layer = m.LoraLinear(half, m.LoraConfig(r=1, lora_alpha=1))
    set_factor(layer, "lora_A", torch.tensor([[1 + 2**-9, -1.0]]))  # in bfloat16: 1, -1
    set_factor(layer, "lora_B", torch.ones(3, 1))
    with with_case("with a bfloat16 layer"):
        y = layer(torch.ones(1, 2, dtype=torch.bfloat16))
    ensure(y.dtype == torch.bfloat16, f"the output for a bfloat16 input is {y.dtype}")
    ensure(y.any(), "A and B are rounded to bfloat16: the update must be computed in float32")


@CHECKS.add("pieces", "delta")
def delta(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        found = case.layer(m).delta()
        same("delta()", found, case.update, factors=case.factors(), case=case.text)
        ensure(found.requires_grad, "A and B get no gradient through delta()")


@CHECKS.add("pieces", "merged")
def merged(m: ModuleType, draw: Draw) -> None:
    for transposed in (False, True):
        for case in cases(m, draw, transposed):
            layer = case.layer(m)
            before = case.base.weight.detach().clone()
            guesses = {"it is the update alone, without W": case.update,
                       "it is W - s B A": case.w - case.update}  # fmt: skip
            with with_case("with a Conv1D" if transposed else "with a Linear"):
                found = layer.merged()
            what = "the update in merged()" + " of a Conv1D" * transposed
            same(what, found, case.w + case.update,
                 guesses=guesses, factors=case.factors(), case=case.text, start=case.w)  # fmt: skip
            unchanged("merged() returns a new tensor, but W", before, case.base.weight)
    half = m.LoraLinear(nn.Linear(4, 4).to(torch.bfloat16), m.LoraConfig(r=2))
    ensure(half.merged().dtype == torch.bfloat16, "merged() must have the dtype of W")


@CHECKS.add("pieces", "merge")
def merge(m: ModuleType, draw: Draw) -> None:
    for transposed in (False, True):
        for case in cases(m, draw, transposed):
            layer = case.layer(m).eval()
            before = copy.deepcopy(layer.state_dict())
            layer.merge()
            expected = case.plain(case.x) + case.x @ case.update.T
            twice = expected + case.x @ case.update.T
            same("the update in the merged layer's output", layer(case.x), expected,
                 guesses={"the update is added twice": twice}, factors=case.factors(),
                 case=case.text, start=case.plain(case.x))  # fmt: skip
            for name, tensor in before.items():
                unchanged(f"merge() stores W', but {name}", tensor, layer.state_dict()[name])
            layer.merge()
            same("the output after merging twice", layer(case.x), expected, case=case.text,
                 guesses={"the second merge adds the update again": twice})  # fmt: skip
            ensure(not layer.merged_weight.requires_grad, "W' must not require a gradient")


@CHECKS.add("pieces", "unmerge")
def unmerge(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        layer = case.layer(m).eval()
        layer.unmerge()  # an unmerged layer: nothing happens
        expected, w = layer(case.x), case.base.weight.detach().clone()
        layer.merged_weight = case.w + 1
        layer.unmerge()
        again = layer(case.x)
        same("the output after unmerge()", again, expected, case=case.text)
        ensure(torch.equal(again, expected), "the output after unmerge() is not exactly the same")
        unchanged("W", w, case.base.weight)


@CHECKS.add("pieces", "find_targets")
def find_targets(m: ModuleType, draw: Draw) -> None:
    net = Net()
    for targets, expected in (
        (["proj"], {"proj", "block.proj"}), (["block.proj"], {"block.proj"}), ([], set()),
        (None, set()), (["q_proj", "project"], {"block.q_proj", "project"}), (["norm"], set()),
        (["ock.proj"], set()), (["block.out"], {"deep.block.out"}), (["block"], set()),
    ):  # fmt: skip
        with with_case(f"with targets {targets!r}"):
            found = m.find_targets(net, targets)
        ensure(isinstance(found, dict), "find_targets must return a dict from name to layer")
        more, less = set(found) - expected, expected - set(found)
        text = f"targets {targets!r}"
        ensure(not more, f"{text} must not select {', '.join(sorted(more))}: a name matches as a "
               "whole, or after a dot")  # fmt: skip
        ensure(not less, f"{text} must select {', '.join(sorted(less))}")
        wrong = [name for name, layer in found.items() if layer is not net.get_submodule(name)]
        ensure(not wrong, f"the value of {', '.join(wrong)} must be the layer of that name")


def adapted(m: ModuleType, targets=("proj", "project"), **options):
    torch.manual_seed(1)
    net = Net()
    config = m.LoraConfig(r=2, lora_alpha=6, target_modules=list(targets), **options)
    return net, m.add_lora(net, config)


@CHECKS.add("pieces", "add_lora")
def add_lora(m: ModuleType, draw: Draw) -> None:
    net = Net().eval()
    before = {name: net.get_submodule(name) for name in ("proj", "block.proj", "block.q_proj")}
    layers = m.add_lora(net, m.LoraConfig(r=2, target_modules=["proj"]))
    ensure(isinstance(layers, dict) and set(layers) == {"proj", "block.proj"},
           "add_lora must return a dict of the new layers by name")  # fmt: skip
    for name, layer in layers.items():
        ensure(net.get_submodule(name) is layer, f"{name} of the model was not replaced")
        ensure(isinstance(layer, m.LoraLinear), f"{name} must be a LoraLinear")
        ensure(layer.base_layer is before[name], f"the base_layer of {name} must be the layer "
               "that was there")  # fmt: skip
    ensure(net.block["q_proj"] is before["block.q_proj"], "q_proj was replaced, and is no target")
    found = trainable(net)
    frozen = [name for name in found if "lora_" not in name]
    ensure(not frozen, f"the base is not frozen: {', '.join(frozen[:3])} requires a gradient")
    ensure(len(found) == 4, "A and B of each layer must require a gradient")
    mode = [name for name, module in net.named_modules() if module.training]
    ensure(not mode, "the model is in evaluation mode, and the new layers are in training mode")


@CHECKS.add("layer", "starts out identical to the base")
def identity(m: ModuleType, draw: Draw) -> None:
    torch.manual_seed(1)
    plain, x = Net(), draw.normal(3, 4)
    net, _ = adapted(m)
    ensure(torch.equal(net(x), plain(x)), "the adapted model does not start out as the base model")


@CHECKS.add("layer", "gradients reach A and B, and nothing else")
def gradients(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        layer, x = case.layer(m), case.x.clone().requires_grad_()
        case.base.requires_grad_(False)
        y = layer(x)
        weights = draw.normal(*y.shape)
        (y * weights).sum().backward()
        a, b = case.a.clone().requires_grad_(), case.b_factor.clone().requires_grad_()
        x2 = case.x.clone().requires_grad_()
        (F.linear(x2, case.w + case.s * b @ a, case.b) * weights).sum().backward()
        for name, wanted in (("lora_A", a), ("lora_B", b)):
            parameter = getattr(getattr(layer, name), "weight", getattr(layer, name))
            ensure(parameter.grad is not None, f"{name} gets no gradient")
            got = parameter.grad if parameter.shape == wanted.shape else parameter.grad.T
            same(f"the gradient of {name}", got, wanted.grad, 1e-4, factors=case.factors(),
                 case=case.text)  # fmt: skip
        same("the gradient of x", x.grad, x2.grad, 1e-4, case=case.text)
        ensure(case.base.weight.grad is None, "the base weight gets a gradient")


@CHECKS.add("layer", "merging keeps the output, unmerging restores it")
def merging(m: ModuleType, draw: Draw) -> None:
    net, layers = adapted(m)
    x = draw.normal(3, 4)
    for layer in layers.values():
        set_factor(layer, "lora_B", draw.normal(layer.base_layer.weight.shape[
            1 if type(layer.base_layer).__name__ == "Conv1D" else 0], 2))  # fmt: skip
    net.eval()
    with torch.no_grad():
        before = net(x)
        for _ in range(3):
            m.merge_lora(layers)
            same("the output after merge_lora", net(x), before, 1e-5)
            m.unmerge_lora(layers)
            ensure(torch.equal(net(x), before), "unmerge_lora must restore the output exactly")
        m.remove_lora(net, layers)
    torch.manual_seed(1)
    ensure(torch.equal(net(x), Net()(x)), "remove_lora must give back the base model exactly")


@CHECKS.add("layer", "trainable parameters: r (in + out) per layer")
def count(m: ModuleType, draw: Draw) -> None:
    net, _ = adapted(m, ["proj", "q_proj", "project"])
    found = sum(p.numel() for p in trainable(net).values())
    ensure(found == 2 * (10 + 10 + 8 + 8), f"2 (10 + 10 + 8 + 8) = 72 parameters, got {found}")


@CHECKS.add("layer", "recovers a change of low rank")
def learns(m: ModuleType, draw: Draw) -> None:
    linear = nn.Linear(12, 9)
    net = nn.Sequential(linear)
    change = draw.normal(9, 2) @ draw.normal(2, 12)
    goal = linear.weight.detach() + change
    (layer,) = m.add_lora(net, m.LoraConfig(r=2, lora_alpha=4, target_modules=["0"])).values()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.05)
    for _ in range(400):
        x = draw.normal(32, 12)
        optimizer.zero_grad()
        F.mse_loss(net(x), F.linear(x, goal, linear.bias)).backward()
        optimizer.step()
    error = ((layer.delta() - change).norm() / change.norm()).item()
    ensure(error < 0.02, f"after 400 steps, {error:.0%} of the change is still missing")


def tensors(names: str) -> list[Tensor]:
    return [torch.tensor(values[name]) for name in names.split()]


def from_values(m: ModuleType, rslora: bool = False) -> tuple[nn.Module, nn.Module]:
    w, b, a, b_factor = tensors("W b A B")
    base = nn.Linear(w.shape[1], w.shape[0])
    base.weight.data, base.bias.data = w.clone(), b
    config = m.LoraConfig(r=len(a), lora_alpha=values["alpha"], use_rslora=rslora)
    layer = m.LoraLinear(base, config)
    set_factor(layer, "lora_A", a)
    set_factor(layer, "lora_B", b_factor)
    return base, layer.eval()


@CHECKS.add("values", "the output of Hugging Face peft's layer")
def peft_output(m: ModuleType, draw: Draw) -> None:
    x, y, y_rslora = tensors("x y y_rslora")
    same("the output", from_values(m)[1](x), y, 1e-5)
    same("the output with use_rslora", from_values(m, True)[1](x), y_rslora, 1e-5)


@CHECKS.add("values", "the weight that peft merges")
def peft_merged(m: ModuleType, draw: Draw) -> None:
    (expected,) = tensors("merged")
    same("merged()", from_values(m)[1].merged(), expected, 1e-5)


@CHECKS.add("losses", "the first ten losses on describe")
def ten_losses(m: ModuleType, draw: Draw) -> None:
    model, _, _ = describe()
    found = []
    for module in (reference, m):
        net = copy.deepcopy(model)
        torch.manual_seed(0)
        config = module.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")
        layers = module.add_lora(net, config)
        start = torch.Generator().manual_seed(0)
        for layer in layers.values():
            n_in = layer.base_layer.in_features
            set_factor(layer, "lora_A", torch.randn(4, n_in, generator=start) / math.sqrt(n_in))

        def logits(batch, net=net):
            return net(batch["input_ids"], attention_mask=batch["attention_mask"]).logits

        found.append(losses([p for p in net.parameters() if p.requires_grad], logits, 0.01))
    if abs(found[0][0] - found[0][-1]) < 0.05:
        raise Wrong("the reference did not learn")  # cannot happen: see the tests
    compare_losses(found[1], found[0])
