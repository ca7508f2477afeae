"""Lesson 02: LoRA."""

import torch
from torch import nn

from . import (
    a_pair,
    answered,
    call,
    compare,
    ensure,
    exercise,
    expect,
    has_shape,
)


@exercise(
    "02.bytes",
    "AdamW stores something for each parameter. So does the backward pass.",
    "A float32 number has 4 bytes. Per parameter there are four such numbers.",
)
def bytes_per_parameter(bytes_per_parameter, draw):
    mistakes = {
        4: "Those are the weights only.",
        8: "Weights and gradients. What does AdamW remember?",
        12: "AdamW remembers two numbers per parameter. Did you count the gradient? (With weights "
        "and gradients in bfloat16, 12 is right. Here they are in float32.)",
    }
    answered(bytes_per_parameter, 16, mistakes, "Count the float32 numbers per parameter.")


@exercise(
    "02.clearest",
    "Of the values and the template, which did the blind model learn?",
    "It learned the template as well as the other model, and most tokens are template tokens.",
)
def clearest(clearest, draw):
    mistakes = {
        "loss": "Most tokens belong to the template, so its loss looked nearly as good.",
        "template loss": "It learned the template as well as the other model.",
    }
    answered(clearest, "slot accuracy", mistakes, "Choose one of the three texts.")


@exercise(
    "02.count",
    "Which shapes do A and B have?",
    "A is r × in, and B is r columns wide. Here in is 128, and out is 384.",
)
def count(count, draw):
    mistakes = {
        8 * 128 * 384: "That is r · in · out. Count the numbers in A and in B, and add.",
        128 * 384: "Those are the parameters of W, which is frozen.",
        8 * 128: "That is A only.",
        8 * 384: "That is B only.",
        128 + 384: "That is right for r = 1.",
    }
    answered(count, 4096, mistakes, "Add the number of entries of A and of B.")


@exercise(
    "02.zero",
    "With y = B A x, the gradient of B is (gradient of y) · (A x)ᵀ. Write down that of A.",
    "The gradient of A is Bᵀ · (gradient of y) · xᵀ. Put zero for B, and then for A.",
)
def zero(first_step, both_zero, draw):
    for what, got, right in (
        ("first_step", first_step, ["B"]),
        ("both_zero", both_zero, []),
    ):
        try:
            names = sorted(str(name).upper() for name in got)
        except TypeError:
            names = got
        ensure(isinstance(names, list), f"{what} must be a list of names, got {got!r}")
        ensure(set(names) <= {"A", "B"}, f"{what} may only have the names 'A' and 'B', got {got}")
        ensure(
            names == right,
            f"{what} = {got}. Each matrix's gradient is a product that contains the other matrix.",
        )


@exercise(
    "02.my_lora",
    "self.A = nn.Parameter(torch.randn(r, …) / … ** 0.5), and self.B likewise with torch.zeros.",
    "forward returns self.layer(x) + alpha / r * (x @ self.A.T @ self.B.T).",
)
def my_lora(MyLora, draw):
    for n_in, n_out, r, alpha, bias in (
        (10, 7, 3, 5.0, True), (4, 4, 1, 1.0, True), (3, 9, 2, 8.0, False), (400, 5, 4, 8.0, True),
    ):  # fmt: skip
        linear = nn.Linear(n_in, n_out, bias=bias)
        before = {name: p.detach().clone() for name, p in linear.named_parameters()}
        inputs = f"MyLora(nn.Linear({n_in}, {n_out}, bias={bias}), r={r}, alpha={alpha:g})"
        layer = call(MyLora, linear, r, alpha)
        x, plain = draw.normal(2, 5, n_in), nn.Linear(n_in, n_out, bias=bias)
        plain.load_state_dict(before)
        y = call(layer, x)
        A, B = (_matrix(layer, name) for name in "AB")
        mistakes = {"the layer's bias is missing": x @ plain.weight.T}
        if B.any():
            mistakes["B must be zero at the start"] = y
        compare("the output at the start", y, plain(x), inputs, mistakes)
        for name, matrix, shape in (("A", A, (r, n_in)), ("B", B, (n_out, r))):
            has_shape(f"self.{name}", matrix, shape, inputs)
        both = "A and B are both zero at the start, so nothing would ever train"
        swapped = "A is zero at the start and B is not: here it is the other way round"
        ensure(bool(A.any()), swapped if B.any() else both)
        if n_in == 400:
            spread = A.std().item() * n_in**0.5
            ensure(
                0.2 < spread < 3,
                f"A starts with a standard deviation of {A.std().item():.3g}: it must be about "
                f"1/√in, here {n_in**-0.5:.3g}",
            )
        trained = {id(p) for p in layer.parameters() if p.requires_grad}
        for name in before:
            ensure(id(getattr(linear, name)) not in trained, f"the layer's {name} is not frozen")
        ensure(trained >= {id(A), id(B)}, "A and B must be trainable parameters of the module")
        ensure(len(trained) == 2, f"only A and B may be trained, not {len(trained)} parameters")
        with torch.no_grad():
            B.copy_(draw.normal(n_out, r))
        update = x @ A.T @ B.T
        x.requires_grad_()
        y = call(layer, x)
        compare(
            "the output, once B is not zero", y, plain(x) + alpha / r * update, inputs,
            {
                "the scaling α / r is missing": plain(x) + update,
                "the update is scaled by α, not by α / r": plain(x) + alpha * update,
                "the scaling is r / α": plain(x) + r / alpha * update,
                "the output of the layer itself is missing": alpha / r * update,
                "A and B are used in the wrong order or not at all": plain(x),
            },
        )  # fmt: skip
        ensure(y.requires_grad, "the output has no gradient. Was it detached?")
        y.sum().backward()
        right = (plain.weight + alpha / r * B @ A).sum(0).expand_as(x)
        compare(
            "the gradient of x", x.grad, right.detach(), inputs,
            {"the gradient does not go through the frozen layer: freeze its parameters, but do not "
             "detach its output": (alpha / r * B @ A).detach().sum(0).expand_as(x)},
        )  # fmt: skip
        for name, matrix in (("A", A), ("B", B)):
            ensure(
                matrix.grad is not None and bool(matrix.grad.any()),
                f"self.{name} gets no gradient. Was it detached, or copied in forward?",
            )
        for name, value in before.items():
            ensure(torch.equal(getattr(linear, name), value), f"the layer's {name} has changed")


def _matrix(layer: nn.Module, name: str) -> torch.Tensor:
    value = getattr(layer, name, None)
    value = getattr(value, "weight", value)
    ensure(isinstance(value, nn.Parameter), f"self.{name} must be a Parameter or a Linear")
    return value


@exercise(
    "02.merge",
    "Which matrix has the same output as x ↦ W x + (α/r) B A x?",
    "Take x out: (W + (α/r) B A) x.",
)
def merge(merge, draw):
    for n_in, n_out, r, alpha in ((4, 6, 2, 9.0), (5, 3, 1, 1.0), (4, 4, 4, 2.0), (7, 2, 3, 0.5)):
        W, A, B = draw.normal(n_out, n_in), draw.normal(r, n_in), draw.normal(n_out, r)
        mistakes = {
            "the scaling α / r is missing": W + B @ A,
            "scaled by α, not by α / r": W + alpha * B @ A,
            "that is only the update: W is missing": alpha / r * B @ A,
            "W is scaled too": alpha / r * (W + B @ A),
            "the update is subtracted": W - alpha / r * B @ A,
        }
        expect(merge, (W, A, B, alpha, r), W + alpha / r * B @ A, mistakes)


@exercise(
    "02.gpt2",
    "Count one layer first: what are the shapes of A and B?",
    "A is 4 × 768, and B is (3 · 768) × 4. There are 12 such pairs.",
)
def gpt2(gpt2, draw):
    mistakes = {
        4 * 4 * 768: "That is one layer.",
        12 * 4 * 768 * 3 * 768: "That is r · in · out. Add in and out; do not multiply them.",
        12 * 4 * 2 * 768: "The output has 3 · 768 numbers.",
        12 * 4 * 768: "That is A only.",
        12 * 4 * 768 * 3: "That is B only.",
        12 * 768 * 3 * 768: "Those are the parameters of W.",
    }
    answered(gpt2, 147_456, mistakes, "r · (in + out), for each of the 12 layers.")


@exercise(
    "02.without_alpha",
    "The product of the new matrices must be (α/r) B A.",
    "Multiply one of the two matrices by α/r. Or each by its square root.",
)
def without_alpha(without_alpha, draw):
    for n_in, n_out, r, alpha in ((4, 6, 2, 9.0), (5, 3, 1, 1.0), (6, 4, 4, 2.0)):
        A, B = draw.normal(r, n_in), draw.normal(n_out, r)
        got = call(without_alpha, A, B, alpha, r)
        inputs = f"A ({r}×{n_in}), B ({n_out}×{r}), alpha {alpha:g}, r {r}"
        new_A, new_B = a_pair(got)
        has_shape("the new A", new_A, (r, n_in), inputs)
        has_shape("the new B", new_B, (n_out, r), inputs)
        update = alpha / r * B @ A
        mistakes = {
            "nothing has changed": B @ A,
            "both matrices are scaled by α/r": alpha / r * update,
            "scaled by α, not by α/r": alpha * B @ A,
            "scaled by r/α": r / alpha * B @ A,
        }
        compare("the new B A", new_B @ new_A, update, inputs, mistakes)


@exercise(
    "02.extract",
    "u[:, :r] * s[:r] @ vh[:r] is the nearest matrix of rank r. Cut it into two factors.",
    "One pair is B = u[:, :r] * s[:r] and A = vh[:r].",
)
def extract(extract, draw):
    for n_out, n_in, r in ((6, 4, 2), (3, 7, 1), (5, 5, 5)):
        delta = draw.normal(n_out, n_in)
        got = call(extract, delta, r)
        inputs = f"delta {(n_out, n_in)}, r {r}"
        A, B = a_pair(got)
        has_shape("A", A, (r, n_in), inputs)
        has_shape("B", B, (n_out, r), inputs)
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        mistakes = {
            "the singular values are missing": u[:, :r] @ vh[:r],
            "the singular values are used twice": u[:, :r] * s[:r] ** 2 @ vh[:r],
            "torch.linalg.svd returns V transposed already: take rows of vh": (
                u[:, :r] * s[:r] @ vh.mT[:r] if n_in <= n_out else u
            ),
            "these are the weakest directions": u[:, -r:] * s[-r:] @ vh[-r:],
        }
        compare("B A", B @ A, u[:, :r] * s[:r] @ vh[:r], inputs, mistakes)
