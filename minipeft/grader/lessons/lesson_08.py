"""Lesson 08: adapters as files."""

import math

from torch import Tensor

from . import a_pair, answered, call, compare, done, ensure, exercise, has_shape


@exercise(
    "08.copies",
    "Each customer gets a copy of all 7 billion parameters.",
    "A bfloat16 number has 2 bytes, so one copy takes 14 GB.",
)
def copies(copies, draw):
    mistakes = {
        14: "That is one copy.",
        7: "That counts parameters, in billions. How many bytes has a bfloat16 number?",
        140: "A bfloat16 number has two bytes.",
        560: "A bfloat16 number has two bytes. Four is float32.",
        0.8: "Those are twenty adapters. Here every customer has a whole model.",
        280e9: "That is in bytes. Answer in GB.",
    }
    answered(copies, 280, mistakes, "Parameters, times bytes per parameter, times customers.")


@exercise(
    "08.scaling",
    "The scaling is made of two settings of LoRA: r and α.",
    "It is α divided by r.",
)
def scaling(scaling, draw):
    mistakes = {
        0.25: "That is r/α.",
        32: "That is α. Divide it by something.",
        256: "That is r times α.",
        8: "That is r.",
        32 / math.sqrt(8): "That is rsLoRA's α/√r. The question is about plain LoRA.",
    }
    answered(scaling, 4, mistakes, "Look at the equation of lesson 02 again.")


@exercise(
    "08.bytes",
    "First one layer: how many numbers do A and B have?",
    "There are 4 such layers, and a float32 number has 4 bytes.",
)
def count(count, draw):
    mistakes = {
        # also the numbers in all layers, the bytes of one layer, and the bytes of all A
        4 * 4 * (128 + 384): "Too few. Are these all 4 blocks, A and B, and 4 bytes per number?",
        4 * (128 + 384): "Those are the numbers in one layer.",
        4 * 4 * 4 * 128 * 384: "That is r · in · out. A and B are separate: add in and out.",
        4 * 4 * 128 * 384: "Those are the bytes of W, which is not in the file.",
        4 * 4 * 4 * 384: "That is B only.",
        2 * 4 * 4 * (128 + 384): "A float32 number has four bytes.",
    }
    answered(
        count, 32768, mistakes, "4 blocks, r · (in + out) numbers in each, 4 bytes per number."
    )


@exercise(
    "08.update",
    "First make the two keys: f'base_model.model.{name}.lora_A.weight', and the same with lora_B.",
    "B has the shape (out, r) and A (r, in). The scaling is config['lora_alpha'] / config['r'].",
)
def update(update, draw):
    for n_in, n_out, r, alpha in ((4, 6, 2, 9.0), (5, 5, 1, 1), (3, 7, 3, 16), (6, 6, 4, 2)):
        names = [f"transformer.h.{draw.integer(2, 30)}.attn.c_attn", "transformer.h.0.mlp.c_fc"]
        names += ["layers.10", "layers.1"]  # of another model: one name begins with the other
        tensors = {}
        for name in names:
            tensors[f"base_model.model.{name}.lora_A.weight"] = draw.normal(r, n_in)
            tensors[f"base_model.model.{name}.lora_B.weight"] = draw.normal(n_out, r)
        config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "use_rslora": False}
        pairs = [
            [tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB"] for name in names
        ]
        others = [pairs[i] for i in (1, 0, 3, 2)]
        for name, (A, B), other in zip(names, pairs, others, strict=True):
            right = alpha / r * B @ A
            mistakes = {
                "the scaling α / r is missing": B @ A,
                "scaled by α, not by α / r": alpha * B @ A,
                "scaled by r / α": r / alpha * B @ A,
                "α / r is rounded to an integer": alpha // r * B @ A,
                "that is the update of another layer": alpha / r * other[1] @ other[0],
                "it is transposed": right.T,
            }
            inputs = f"{name!r}, A ({r}×{n_in}), B ({n_out}×{r}), α {alpha:g}, r {r}"
            got = call(update, tensors, config, name)
            compare("update(…)", got, right, inputs, mistakes)


@exercise(
    "08.serve",
    "For each customer, collect the places (indices) of their requests in the list.",
    "Make a list [None] * len(requests). For each customer, switch, answer all their prompts at "
    "once, and put each answer where its request stood.",
)
def serve(serve, draw):
    names = ["ann", "bo", "cy", "di"]
    mixed = [(names[draw.integer(0, 3)], f"prompt {draw.integer(0, 5)}") for _ in range(17)]
    for requests in (
        [("ann", "hello"), ("bo", "hello"), ("ann", "bye"), ("bo", "hello"), ("ann", "hello")],
        mixed,
        [("cy", "hello")],
        [("bo", "one"), ("bo", "two"), ("ann", "three")],
        [],
    ):
        active: list[str] = []
        asked: list[tuple[str, list[str]]] = []  # customer, prompts

        def switch(customer, active=active):
            active.append(customer)

        def answer(prompts, active=active, asked=asked):
            ensure(
                isinstance(prompts, list | tuple),
                f"answer(…) takes a list of prompts, got {prompts!r}",
            )
            ensure(bool(active), "answer(…) is called before any switch(…): no adapter is active")
            asked.append((active[-1], list(prompts)))
            return [f"{active[-1]} answers {prompt}" for prompt in prompts]

        right = [f"{customer} answers {prompt}" for customer, prompt in requests]
        got = list(done(call(serve, requests, switch, answer)))
        inputs = f"requests = {requests}"
        text = "all answers are there, but not in the order of the requests"
        likely = {text: got} if sorted(map(str, got)) == sorted(right) else {}
        compare("serve(…)", got, right, inputs, likely)
        often = {name for name in active if active.count(name) > 1}
        ensure(
            not often,
            f"switch was called {len(active)} times for {len(set(active))} customers\n"
            f"  input     {inputs}\n  calls     {active}",
        )
        for customer in {customer for customer, _ in asked}:
            batches = [prompts for name, prompts in asked if name == customer]
            ensure(
                len(batches) == 1,
                f"answer was called {len(batches)} times for {customer!r}: give it all prompts of "
                f"a customer in one list\n  input     {inputs}\n  calls     {batches}",
            )
            own = [prompt for name, prompt in requests if name == customer]
            ensure(
                sorted(batches[0]) == sorted(own),
                f"answer got other prompts than those of {customer!r}\n  input     {inputs}\n"
                f"  got       {batches[0]}\n  expected  {own}",
            )


@exercise(
    "08.back",
    "Which of the three write into W, or compute with it? Floating-point numbers are rounded.",
    "minipeft keeps W and stores W' next to it. peft overwrites W, and later subtracts.",
)
def back(back, draw):
    ensure(
        isinstance(back, dict) and set(back) == {"disable", "minipeft", "peft"},
        f"back must have the keys 'disable', 'minipeft' and 'peft', got {back!r}",
    )
    if any(value is None for value in back.values()):
        done(None)
    right = {"disable": True, "minipeft": True, "peft": False}
    why = {
        "disable": "Disabling an adapter replaces layers. Does it write into W?",
        "minipeft": "What does minipeft do with W when it merges? See the table above.",
        "peft": "W + ΔW is rounded. Does subtracting ΔW undo the rounding?",
    }
    for key, value in right.items():
        got = back[key]
        ensure(got is True or got is False, f"back[{key!r}] must be True or False, got {got!r}")
        ensure(got is value, f"back[{key!r}] = {got}. {why[key]}")


@exercise(
    "08.cross",
    "Multiply out (B₁ + B₂ + B₃)(A₁ + A₂ + A₃). How many products are there?",
    "There are 9 products Bᵢ Aⱼ. Those with i = j are wanted.",
)
def cross(cross, draw):
    mistakes = {
        9: "Those are all products Bᵢ Aⱼ. Some of them are wanted.",
        3: "Bᵢ Aⱼ and Bⱼ Aᵢ are two different terms. Or did you count the wanted ones?",
        2: "That is right for two adapters.",
        27: "There are two sums, so three times three products.",
    }
    answered(cross, 6, mistakes, "Count the products Bᵢ Aⱼ with i ≠ j.")


def _loras(draw, weights, ranks, n_in=5, n_out=6):
    """Pairs (w, s, A, B)."""
    return [
        (w, draw.integer(1, 9) / 2, draw.normal(r, n_in), draw.normal(n_out, r))
        for w, r in zip(weights, ranks, strict=True)
    ]


def _sum(pairs, factor=lambda w, s: w * s) -> Tensor:
    return sum(factor(w, s) * (B @ A) for w, s, A, B in pairs)


def _inputs(pairs) -> str:
    return "; ".join(
        f"w {w:g}, s {s:g}, A {tuple(A.shape)}, B {tuple(B.shape)}" for w, s, A, B in pairs
    )


def _ensure_real(A: Tensor, B: Tensor, inputs: str) -> None:
    for what, x in (("A", A), ("B", B)):
        ensure(
            not x.is_complex() and bool(x.isfinite().all()),
            f"{what} has entries that are complex or NaN: a root of a negative number?\n"
            f"  input     {inputs}",
        )


@exercise(
    "08.add",
    "Stack the A below each other, and the B next to each other: torch.cat has an argument dim.",
    "The product of the stacks is the sum of the Bᵢ Aᵢ. Multiply each Aᵢ by w · s before.",
)
def add(add, draw):
    for weights, ranks, size in (
        ((0.5, 1.5), (2, 2), (5, 6)),
        ((1.0, 1.0, 1.0), (2, 2, 2), (7, 3)),
        ((0.7, 1.2), (1, 3), (5, 6)),
        ((0.75,), (2,), (4, 4)),
        ((1.0, -0.5), (2, 2), (6, 5)),
        ((-1.0, 0.3, 2.0, 0.0, -0.2), (1, 2, 3, 1, 2), (8, 9)),
    ):
        pairs = _loras(draw, weights, ranks, *size)
        A, B = a_pair(call(add, pairs))
        inputs, total = _inputs(pairs), sum(ranks)
        if isinstance(A, Tensor) and len(pairs) > 1:
            ensure(
                tuple(A.shape) != (ranks[0], size[0]) or len(set(ranks)) > 1,
                "A has the shape of one Aᵢ. Adding A to A gives cross terms: stack them instead",
            )
        has_shape("A", A, (total, size[0]), inputs)
        has_shape("B", B, (size[1], total), inputs)
        mistakes = {
            "the scaling s is missing": _sum(pairs, lambda w, s: w),
            "the weight w is missing": _sum(pairs, lambda w, s: s),
            "w is used on A and on B": _sum(pairs, lambda w, s: w * w * s),
            "s is used on A and on B": _sum(pairs, lambda w, s: w * s * s),
            "w · s is used on A and on B": _sum(pairs, lambda w, s: (w * s) ** 2),
            "the sign of a negative weight is lost": _sum(pairs, lambda w, s: abs(w * s)),
            "a negative weight counts as zero": _sum(pairs, lambda w, s: max(w * s, 0)),
        }
        _ensure_real(A, B, inputs)
        compare("B A", B @ A, _sum(pairs), inputs, mistakes)


@exercise(
    "08.linear",
    "math.copysign(root, w * s) is the root with the sign of w · s.",
    "Of two signs on both sides, nothing is left. So the sign goes to A only.",
)
def linear(linear, draw):
    for weights, size in (
        ((0.5, 1.5), (5, 6)),
        ((-1.0,), (4, 3)),
        ((1.0, -0.5), (6, 5)),
        ((-0.3, 0.0, 2.0, -1.0), (8, 9)),
    ):
        r = draw.integer(1, 3)
        pairs = _loras(draw, weights, [r] * len(weights), *size)
        A, B = a_pair(call(linear, pairs))
        inputs = _inputs(pairs)
        has_shape("A", A, (r, size[0]), inputs)
        has_shape("B", B, (size[1], r), inputs)
        roots = [math.sqrt(abs(w * s)) for w, s, *_ in pairs]
        signs = [math.copysign(1, w * s) for w, s, *_ in pairs]
        bare_A, right_B, signed_B = (
            sum(f * x for f, x in zip(factors, matrices, strict=True))
            for factors, matrices in (
                (roots, [A for _, _, A, _ in pairs]),
                (roots, [B for *_, B in pairs]),
                ([a * b for a, b in zip(roots, signs, strict=True)], [B for *_, B in pairs]),
            )
        )
        signed = zip(roots, signs, pairs, strict=True)
        right_A = sum(root * sign * A for root, sign, (_, _, A, _) in signed)
        _ensure_real(A, B, inputs)
        mistakes = {
            "the sign of the weight is lost: it goes to A": bare_A,
            "A and B each get √|w · s|, not w · s": sum(w * s * A for w, s, A, _ in pairs),
        }
        compare("A", A, right_A, inputs, mistakes)
        mistakes = {
            "the sign goes to A only, not to B": signed_B,
            "B gets the factors √|w · s| too": sum(B for *_, B in pairs),
        }
        compare("B", B, right_B, inputs, mistakes)
