"""Lesson 11: LoRA's successors."""

import math

import torch
from torch import nn

from . import a_pair, answered, call, compare, ensure, exercise, expect, has_shape, show


@exercise(
    "11.numbers",
    "A has the shape (r, in), and B the shape (out, r).",
    "r · in + out · r.",
)
def numbers(numbers, draw):
    mistakes = {
        8 * 128: "That is A alone.",
        8 * 384: "That is B alone.",
        128 * 384: "Those are the numbers of W.",
        8 * 128 * 384: "A and B are separate: add in and out.",
        128 + 384: "That is rank 1.",
        16 * (128 + 384): "The rank is 8.",
    }
    answered(numbers, 8 * (128 + 384), mistakes, "r times the sum of in and out.")


@exercise(
    "11.alpha",
    "With r = 8 and α = 16, α/r is 2.",
    "Which α, divided by 32, gives 2?",
)
def alpha(alpha, draw):
    mistakes = {
        16: "Then α/r would be a quarter of what it was.",
        4: "That is r / 8. Multiply α by it.",
        2: "That is α/r.",
        32: "Then α/r is 1. (That keeps α/√r, the scaling of rsLoRA.)",
    }
    answered(alpha, 64, mistakes, "α must grow as r does.")


@exercise(
    "11.rslora",
    "Plain LoRA's scaling is α / 8. rsLoRA's is 16 / √8.",
    "Solve α / 8 = 16 / √8 for α.",
)
def same_scaling(same_scaling, draw):
    mistakes = {
        16: "With α = 16, plain LoRA's scaling is 2.",
        16 / math.sqrt(8): "That is the scaling. Which α gives it, divided by 8?",
        16 / 8: "That is the scaling of plain LoRA with α = 16.",
        8 * 16: "That divides by √8 nowhere.",
        math.sqrt(8): "That is √r.",
    }
    answered(same_scaling, 16 * math.sqrt(8), mistakes, "Both scalings must be equal: α/8 = 16/√8.")


@exercise(
    "11.plus_groups",
    'Split the parameters by their names: "lora_B" in name.',
    '[{"params": [the others], "lr": lr}, {"params": [those of B], "lr": ratio * lr}]',
)
def plus_groups(plus_groups, draw):
    for n, lr, ratio in ((1, 0.5, 4), (3, 2e-4, 16), (2, 1e-2, 1)):
        named = []
        for i in range(n):
            for letter, shape in (("A", (2, 3)), ("B", (4, 2))):
                name = f"h.{i}.mlp.lora_{letter}.weight"
                named.append((name, nn.Parameter(draw.normal(*shape))))
        for name in ("h.0.attn.lora_A.Bias_table", "score.bias"):
            named.append((name, nn.Parameter(draw.normal(2))))
        names = {id(p): name for name, p in named}
        first, second = a_pair(call(plus_groups, named, lr, ratio))
        inputs = f"{[name for name, _ in named]}, lr {lr:g}, ratio {ratio}"
        for what, group, is_b, rate in (
            ("the first group", first, False, lr), ("the second group", second, True, ratio * lr)
        ):  # fmt: skip
            ensure(
                isinstance(group, dict) and {"params", "lr"} <= set(group),
                f'{what} must be a dictionary with "params" and "lr", got {show(group)}',
            )
            found = list(group["params"])
            ensure(
                all(isinstance(p, nn.Parameter) and id(p) in names for p in found),
                f'"params" of {what} must be a list of the parameters themselves, without names',
            )
            got = [names[id(p)] for p in found]
            right = [name for name, _ in named if ("lora_B" in name) == is_b]
            text = "both groups are swapped: B comes second"
            swapped = [name for name, _ in named if ("lora_B" in name) != is_b]
            compare(f"{what} has", sorted(got), sorted(right), inputs, {text: sorted(swapped)})
            mistakes = {
                "the ratio is missing: B's rate is ratio · lr": lr if is_b else None,
                "B has the rate lr / ratio": lr / ratio if is_b else None,
                "the ratio belongs to B": ratio * lr if not is_b else None,
                "that is the ratio. The rate is ratio · lr": ratio if is_b else None,
                "A keeps lr: only B's rate is multiplied": lr / ratio if not is_b else None,
            }
            compare(f'"lr" of {what}', group["lr"], rate, inputs,
                    {k: v for k, v in mistakes.items() if v is not None})  # fmt: skip


@exercise(
    "11.pissa_start",
    "torch.linalg.svd(w, full_matrices=False) gives U, the singular values, and Vᵀ (not V).",
    "The root √(S / s) goes into both factors: root[:, None] * vh[:r], and u[:, :r] * root.",
)
def pissa_start(pissa_start, draw):
    for n_out, n_in, r, s in ((4, 6, 2, 2.0), (7, 3, 1, 0.5), (5, 5, 5, 1.0), (8, 9, 3, 3.0)):
        w = draw.normal(n_out, n_in)
        a, b = a_pair(call(pissa_start, w, r, s))
        inputs = f"w {show(w)}, r {r}, s {s:g}"
        has_shape("A", a, (r, n_in), inputs)
        has_shape("B", b, (n_out, r), inputs)
        u, sizes, vh = torch.linalg.svd(w, full_matrices=False)
        part = u[:, :r] * sizes[:r] @ vh[:r]
        last = u[:, -r:] * sizes[-r:] @ vh[-r:]
        mistakes = {
            "S is not divided by s": s * part,
            "S is multiplied by s": s * s * part,
            "the square root is missing: S goes into both factors": u[:, :r]
            * sizes[:r] ** 2
            @ vh[:r],
            "the square root of S / s is missing": u[:, :r] * sizes[:r] ** 2 @ vh[:r] / s,
            "the square root is missing in one factor": (
                u[:, :r] * (sizes[:r] / s) ** 1.5 @ vh[:r] * s
            ),
            "those are the smallest singular values": last,
            "the singular values are missing": s * u[:, :r] @ vh[:r],
            "s is divided out twice: it belongs inside the root": part / s,
        }
        compare("s · B A", s * b @ a, part, inputs, mistakes, 1e-4)
        compare(
            "A Aᵀ, which is as large as Bᵀ B (S is shared between the factors)",
            a @ a.T, b.T @ b, inputs, tolerance=1e-3,
        )  # fmt: skip


@exercise(
    "11.dora_weight",
    "First V = W + s B A, a matrix like W. Then the length of each row: v.norm(dim=1), of the "
    "shape (out,). To divide row by row, it needs a second dimension; so does m.",
    "m[:, None] * v / v.norm(dim=1, keepdim=True)",
)
def dora_weight(dora_weight, draw):
    for n_out, n_in, r, s in ((3, 4, 1, 1.0), (5, 5, 2, 2.0), (6, 3, 2, 0.5)):
        w, m = draw.normal(n_out, n_in), draw.normal(n_out).abs() + 0.5
        a, b = draw.normal(r, n_in), draw.normal(n_out, r)
        v = w + s * b @ a
        right = m[:, None] * v / v.norm(dim=1, keepdim=True)
        mistakes = {
            "the lengths are those of W, and not of V": m[:, None] * v / w.norm(dim=1)[:, None],
            "the rows are not scaled to length 1": m[:, None] * v,
            "s is missing": m[:, None] * (w + b @ a) / (w + b @ a).norm(dim=1)[:, None],
            "W is missing in V": m[:, None] * (s * b @ a) / (s * b @ a).norm(dim=1)[:, None],
            "divided by the norm of the whole matrix": m[:, None] * v / v.norm(),
            "divided by the lengths of the columns": m[:, None] * v / v.norm(dim=0),
            "divided by the squared lengths": m[:, None] * v / v.square().sum(1)[:, None],
            "m is missing": v / v.norm(dim=1, keepdim=True),
            "only W is scaled: s B A must be inside": (
                m[:, None] * w / w.norm(dim=1)[:, None] + s * b @ a
            ),
        }
        if n_out == n_in:
            mistakes["m multiplies the columns"] = m * v / v.norm(dim=1, keepdim=True)
        expect(dora_weight, (w, m, a, b, s), right, mistakes, 1e-4)


@exercise(
    "11.vectors",
    "d has one number for each of the r rows of A. b and l have one for each output.",
    "VeRA: r + out. (IA)³: out.",
)
def vectors(vera_numbers, ia3_numbers, draw):
    mistakes = {
        256 * (128 + 384): "Those are the numbers of A and B, which are frozen.",
        256: "That is d. And b?",
        384: "That is b. And d?",
        256 + 128: "d has r numbers, and b one for each OUTPUT.",
        128 + 384: "d has r numbers, not one for each input.",
        256 * 384: "Two vectors: add their lengths.",
    }
    answered(vera_numbers, 256 + 384, mistakes, "The lengths of d and b.")
    mistakes = {
        128: "That would be on the inputs.",
        128 * 384: "Those are the numbers of W.",
        2 * 384: "One vector, l: b is VeRA's.",
        512: "l has one number for each output.",
    }
    answered(ia3_numbers, 384, mistakes, "One number for each output.")


@exercise(
    "11.unfair",
    "At which rate is LoRA's score lowest?",
    "min(lora, key=lora.get) is the rate with the lowest score.",
)
def unfair(unfair, draw):
    for n in (1, 3, 5, 5):
        rates = [0.001 * 2**i for i in range(n)]
        scores = (draw.normal(n).abs() % 1).tolist()
        lora = dict(zip(rates, scores, strict=True))
        best = 0.9
        worst, top = min(lora, key=lora.get), max(lora, key=lora.get)
        mistakes = {
            "that is LoRA's best rate: a fair comparison": [top, best - lora[top]],
            "the lead has the wrong sign": [worst, lora[worst] - best],
            "the order is: rate, lead": [best - lora[worst], worst],
            "that is LoRA's score, and not the lead": [worst, lora[worst]],
            "that is the smallest rate, and not the lowest score": [
                min(lora), best - lora[min(lora)]],
        }  # fmt: skip
        expect(unfair, (lora, best), [worst, best - lora[worst]], mistakes)


@exercise(
    "11.verdict",
    "The interval is mean ± t · s / √n, with statistics.stdev for s. It excludes 0 if the mean is "
    "farther from 0 than t · s / √n.",
    "half = t * statistics.stdev(differences) / math.sqrt(len(differences)); compare the mean with "
    "half and with -half.",
)
def verdict(verdict, draw):
    for differences, t, right, likely in (
        ([0.02, 0.03, 0.025, 0.02, 0.03], 2.78, "better", {}),
        ([-0.02, -0.03, -0.025, -0.02, -0.03], 2.78, "worse", {}),
        ([0.10, -0.02, 0.03, 0.0, 0.04], 2.78, "not shown",
         {"better": "the mean is above 0, but the interval includes 0"}),
        ([-0.10, 0.02, -0.03, 0.0, -0.04], 2.78, "not shown",
         {"worse": "the mean is below 0, but the interval includes 0"}),
        ([0.01, 0.03, 0.02, 0.0, 0.03], 2.78, "better",
         {"not shown": "is t · s divided by √n?"}),
        ([0.03, 0.0, 0.0, 0.03, 0.03], 2.78, "not shown",
         {"better": "is t missing, or replaced by 1.96?"}),
        ([0.02, 0.04, 0.02], 4.3, "not shown",
         {"better": "is s the sample standard deviation, statistics.stdev? Is t used?"}),
    ):  # fmt: skip
        mistakes = {text: value for value, text in likely.items()}
        expect(verdict, (differences, t), right, mistakes)


class Normed(nn.Module):
    """Two LayerNorms, one of them inside a block, and layers whose names look alike."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"ln_1": nn.LayerNorm(4), "fc": nn.Linear(4, 4)})
        self.ln_head, self.last = nn.Linear(4, 2), nn.LayerNorm(4)
        self.norm_free = nn.Embedding(3, 4)


@exercise(
    "11.ln_tuning",
    "First freeze everything. Then go through model.named_modules().",
    "isinstance(module, nn.LayerNorm) finds them, whatever their names. Then "
    "module.requires_grad_(True).",
)
def add_ln_tuning(add_ln_tuning, draw):
    model = Normed()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    got = call(add_ln_tuning, model)
    names = ["inner.ln_1", "last"]
    mistakes = {
        "those are chosen by name: ln_head is no LayerNorm": ["inner.ln_1", "ln_head"],
        "the LayerNorm in the block is missing: use named_modules": ["last"],
        "return the names of the modules, not of their parameters": [
            f"{name}.{part}" for name in names for part in ("weight", "bias")],
    }  # fmt: skip
    compare("the names", sorted(got) if isinstance(got, list | tuple | set) else got, names,
            "a model with the LayerNorms inner.ln_1 and last", mistakes)  # fmt: skip
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    right = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    ensure(not trained - right, f"{', '.join(sorted(trained - right))} must be frozen")
    ensure(not right - trained, f"{', '.join(sorted(right - trained))} must require a gradient")
    for name, p in model.named_parameters():
        ensure(torch.equal(p, before[name]), f"{name} has changed: only requires_grad should")
