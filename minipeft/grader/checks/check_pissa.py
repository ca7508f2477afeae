"""What is graded in pissa.py."""

from types import ModuleType

import torch
from torch import Tensor, nn

from ..judge import Checks
from ..symptoms import Draw, ensure, factor_of, same, set_factor, unchanged
from . import layers
from .check_dora import config
from .layers import cases, check_dropout, check_kind, check_merged, check_output

CHECKS = Checks("pissa")


class Case(layers.Case):
    formula = "r (in + out) per layer"

    def weight(self, draw: Draw) -> Tensor:
        """Singular values that are far apart: else the largest r are not well defined."""
        u, s, vh = torch.linalg.svd(draw.normal(self.n_out, self.n_in), full_matrices=False)
        return u * (torch.arange(len(s), 0, -1) + 0.5) @ vh

    @staticmethod
    def shapes(n_in: int, n_out: int, r: int, feedforward: bool) -> dict[str, tuple]:
        return {"lora_A": (r, n_in), "lora_B": (n_out, r)}

    def make(self, m: ModuleType) -> nn.Module:
        return m.PissaLinear(self.base, config(self.r, self.alpha, self.rslora, self.dropout))

    def parts(self, numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.w - self.top, self.s * numbers["lora_B"] @ numbers["lora_A"], self.b

    def wrong_dropout(self) -> dict[str, tuple[Tensor, Tensor]]:
        return super().wrong_dropout() | {
            "dropout is applied to B₀ A₀ x too, which is a part of W_res x: it has none":
                (self.w, self.update - self.top)}  # fmt: skip

    @staticmethod
    def add(m: ModuleType, net: nn.Module, targets: list[str], r: int) -> dict:
        return m.add_pissa(net, config(r, 12.0, targets=targets))

    @property
    def update(self) -> Tensor:
        """s B A."""
        return self.s * self.numbers["lora_B"] @ self.numbers["lora_A"]

    @property
    def top(self) -> Tensor:
        """s B₀ A₀, the largest r parts of W."""
        u, s, vh = torch.linalg.svd(self.w.double(), full_matrices=False)
        return (u[:, : self.r] * s[: self.r] @ vh[: self.r]).to(self.w.dtype)


WHOLE = layers.Whole(CHECKS, Case)
prepare = WHOLE.prepare


@CHECKS.add("pieces", "start")
def start(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw, torch.float32):
        layer, r, square = started(m, case), case.r, case.n_in == case.n_out
        a = factor_of(layer, "lora_A", (r, case.n_in))
        b = factor_of(layer, "lora_B", (case.n_out, r))
        unchanged("W", case.w.T if case.kind == "Conv1D" else case.w, case.base.weight)
        for name in ("lora_A", "lora_B"):
            factor = getattr(getattr(layer, name), "weight", getattr(layer, name))
            trained = isinstance(factor, nn.Parameter) and factor.requires_grad
            ensure(trained, f"{name} is not trainable")
        u, s, vh = torch.linalg.svd(case.w, full_matrices=False)
        guesses = {
            "the root is missing: A₀ and B₀ each have all of S / s":
                u[:, :r] * s[:r] ** 2 / case.s @ vh[:r],
            "the root is missing: A₀ and B₀ each have all of S":
                u[:, :r] * s[:r] ** 2 * case.s @ vh[:r],
            "the singular values are not used": case.s * u[:, :r] @ vh[:r],
            "these are the smallest singular values": u[:, -r:] * s[-r:] @ vh[-r:],
            "it has another sign": -case.top,
            "it is zero, as in LoRA": 0 * case.top,
        }  # fmt: skip
        if square:
            guesses |= {
                "Vᵀ is transposed once more: torch.linalg.svd returns it transposed":
                    u[:, :r] * s[:r] @ vh[:, :r].T,
                "B₀ needs the columns of U, and not its rows": u[:r].T * s[:r] @ vh[:r],
            }  # fmt: skip
        same("s B₀ A₀", case.s * b @ a, case.top, 1e-4, guesses=guesses, case=case.text, factors={
            "s": (case.s, "is S divided by s?"),
            "s²": (case.s**2, "is S divided by s, and not multiplied?"),
            "1 / s": (1 / case.s, "S is divided by s once, not by s²: is the root of S / s taken?"),
            "√s": (case.s**0.5, "is s in only one of the roots?"),
        })  # fmt: skip
        lengths = a.norm(dim=1).sort(descending=True).values
        root = (s[:r] / case.s).sqrt()
        same("the length of A₀'s rows", lengths, root, 1e-4, case=case.text, guesses={
            "A₀ has all of S / s: the roots are missing": root**2,
            "A₀ has all of S, and B₀ is U_r / s: each must have √(S_r / s)": s[:r],
            "A₀ is V_rᵀ: each must have √(S_r / s)": torch.ones(r),
            "A₀ is V_rᵀ / s: each must have √(S_r / s)": torch.full((r,), 1 / case.s),
            "A₀ has √S_r, and B₀ has √S_r / s": s[:r].sqrt(),
        })  # fmt: skip
    check_kind(m, draw, Case, "lora_A", "lora_B")


def started(m: ModuleType, case: Case) -> nn.Module:
    """A layer whose __init__ may stop at a later hole."""
    layer = m.PissaLinear.__new__(m.PissaLinear)
    try:
        layer.__init__(case.base, config(case.r, case.alpha, case.rslora))
    except NotImplementedError as error:
        if "start_A" not in str(error):
            raise
    return layer


@CHECKS.add("pieces", "kept")
def kept(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        layer = case.make(m)
        pairs = {"start_A": ("lora_A", (case.r, case.n_in)),
                 "start_B": ("lora_B", (case.n_out, case.r))}  # fmt: skip
        for name, (trained, shape) in pairs.items():
            ensure(hasattr(layer, name), f"the layer has no attribute {name}")
            value, factor = getattr(layer, name), factor_of(layer, trained, shape)
            turned = value.shape != factor.shape == value.T.shape
            factor = factor.T if turned else factor
            same(name, value, factor.detach(), case=case.text)
            ensure(not value.requires_grad, f"{name} is trained: it must stay as it is")
            with torch.no_grad():
                factor.add_(1)
            ensure(not torch.equal(value, factor), f"{name} changes when "
                   f"{trained} is trained: it is a view of it, so clone it")  # fmt: skip
            ensure(name in dict(layer.named_buffers()), f"{name} must be a buffer: else it stays "
                   "behind when the model moves to another device")  # fmt: skip


@CHECKS.add("pieces", "forward")
def forward(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        x, plain, s, bias = case.x, case.plain(case.x), case.s, 0 if case.b is None else case.b
        update, old = x @ case.update.T, x @ case.top.T
        check_output(m, case, {
            "B₀ A₀ x is not subtracted: W x contains it already": plain + update,
            "B₀ A₀ x is added, and not subtracted": plain + update + old,
            "B₀ A₀ x is subtracted twice": plain + update - 2 * old,
            "B A x is missing": plain - old,
            "it is W x + b: A and B are not used": plain,
            "W x + b is missing": update - old,
            "the signs are swapped": plain - update + old,
            "the bias b is missing": plain - bias + update - old,
            "the bias b is added twice": plain + bias + update - old,
            "the scaling s is missing": plain + (update - old) / s,
            "the scaling s is applied twice": plain + s * (update - old),
            "B₀ A₀ x has no scaling": plain + update - old / s,
            "B A x has no scaling": plain + update / s - old,
            "s also multiplies W x + b": s * plain + update - old,
            "a Conv1D stores W transposed: call the base layer instead":
                x @ case.w + bias + update - old if case.n_in == case.n_out else None,
        })  # fmt: skip
    check_dropout(m, draw, Case)


@CHECKS.add("pieces", "as_lora")
def as_lora(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        layer, r, s = case.layer(m), case.r, case.s
        found = layer.as_lora()
        ensure(isinstance(found, tuple | list) and len(found) == 2, "as_lora() must return A and B")
        for name, got, shape in (("A", found[0], (2 * r, case.n_in)),
                                 ("B", found[1], (case.n_out, 2 * r))):  # fmt: skip
            ensure(got.shape == shape, f"{name} is {tuple(got.shape)}, expected {shape}: a LoRA of "
                   "rank 2 r")  # fmt: skip
        update, old = case.update / s, case.top / s
        same("B A of as_lora()", found[1] @ found[0], update - old, case=case.text, guesses={
            "B₀ A₀ has no minus, or one in each factor": update + old,
            "the minus is at B A": old - update,
            "B A is missing": -old,
            "s is in it: the LoRA has the same scaling": case.update - case.top,
            "s² is in it": s * (case.update - case.top),
            "it is B A twice: is it A₀ and B₀ that are appended?": 2 * update,
            "the parts of A are in another order than those of B":
                case.numbers["lora_B"] @ layer.start_A - layer.start_B @ case.numbers["lora_A"],
        })  # fmt: skip


@CHECKS.add("pieces", "merged")
def merged(m: ModuleType, draw: Draw) -> None:
    for case in cases(Case, draw):
        w, update, old, s = case.w, case.update, case.top, case.s
        check_merged(m, case, {
            "s B₀ A₀ is not subtracted: W contains it already": w + update,
            "s B₀ A₀ is added, and not subtracted": w + update + old,
            "it is W_res: s B A is missing": w - old,
            "W is missing": update - old,
            "it is W: A and B are not used": w,
            "the signs are swapped": w - update + old,
            "the scaling s is missing": w + (update - old) / s,
            "the scaling s is applied twice": w + s * (update - old),
            "s also multiplies W": s * w + update - old,
        })  # fmt: skip


def from_values(m: ModuleType, factors: bool) -> nn.Module:
    w, b, *numbers = WHOLE.tensors("W b A B")
    base = nn.Linear(w.shape[1], w.shape[0])
    base.weight.data, base.bias.data = w, b
    layer = m.PissaLinear(base, config(2, WHOLE.values["alpha"]))
    if factors:
        set_factor(layer, "lora_A", numbers[0])
        set_factor(layer, "lora_B", numbers[1])
    return layer.eval()


@CHECKS.add("values", "what Hugging Face peft leaves of the weight")
def peft_rest(m: ModuleType, draw: Draw) -> None:
    w, expected = WHOLE.tensors("W W_res")
    layer = from_values(m, factors=False)
    a, b = factor_of(layer, "lora_A", (2, 6)), factor_of(layer, "lora_B", (5, 2))
    same("W - s B₀ A₀", w - layer.scaling * b @ a, expected, 1e-4)


@CHECKS.add("values", "the output and the merged weight of peft's layer")
def peft_output(m: ModuleType, draw: Draw) -> None:
    x, y, w = WHOLE.tensors("x y merged")
    layer = from_values(m, factors=True)
    same("the output", layer(x), y, 1e-4)
    same("merged()", layer.merged(), w, 1e-4)


@CHECKS.add("losses", "the first ten losses on describe")
def ten_losses(m: ModuleType, draw: Draw) -> None:
    WHOLE.ten_losses(m, 0.01)
