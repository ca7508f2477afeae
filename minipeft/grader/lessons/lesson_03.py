"""Lesson 03: AdaLoRA."""

import torch
from torch import Tensor, nn

from . import (
    a_pair,
    answered,
    call,
    compare,
    ensure,
    exercise,
    expect,
    is_close,
    show,
)


@exercise(
    "03.lora_rank",
    "The update is B A. B has 8 columns.",
    "A matrix of rank r has r singular values that are not zero.",
)
def lora_rank(lora_rank, draw):
    mistakes = {
        128: "W may have 128, but the update is a product of an 8-column and an 8-row matrix.",
        384: "No matrix of this shape has more than 128.",
        16: "That is α. It multiplies the update and does not change its rank.",
        4096: "That is the number of trained parameters.",
    }
    answered(lora_rank, 8, mistakes, "What is the rank of B A?")


@exercise(
    "03.forgets_less",
    "Look at the last figure of lesson 02. In what do its upper and lower bars differ?",
    "It pulls the trained weights towards their values at the start.",
)
def forgets_less(forgets_less, draw):
    mistakes = {
        "rank": "The rank of LoRA was 8 in all runs.",
        "steps": "All of these runs had 100 steps.",
    }
    answered(forgets_less, "weight decay", mistakes, "Choose one of the three texts.")


def _update(P, E, Q, s):
    return s * P @ torch.diag(E) @ Q


@exercise(
    "03.update",
    "P times a diagonal matrix scales the columns of P.",
    "torch.diag(E) makes a diagonal matrix. Multiply four things.",
)
def update(update, draw):
    for n_out, r, n_in, s in ((6, 3, 4, 2.0), (5, 1, 3, 0.5), (4, 4, 4, 3.0), (2, 3, 7, 1.5)):
        P, E, Q = draw.normal(n_out, r), draw.normal(r), draw.normal(r, n_in)
        right = _update(P, E, Q, s)
        mistakes = {
            "the scaling s is missing": P @ torch.diag(E) @ Q,
            "Λ is missing": s * P @ Q,
            "Λ is used twice": s * P @ torch.diag(E * E) @ Q,
            "the absolute values of Λ are used: its entries may be negative": (
                s * P @ torch.diag(E.abs()) @ Q
            ),
        }
        if n_out == r == n_in:
            mistakes["Λ scales the rows of P: it must scale the columns"] = s * E[:, None] * P @ Q
            mistakes["Λ scales the columns of Q: it must scale the rows"] = s * P @ (Q * E)
            mistakes["P and Q are in the wrong order"] = s * Q @ torch.diag(E) @ P
        expect(update, (P, E, Q, s), right, mistakes)


@exercise(
    "03.stays",
    "Write one triplet's part of y: p · e · (q · x). Take the derivative by p, by e, and by q.",
    "Each derivative is a product that contains the other two. Which are not zero?",
)
def stays(only_e_zero, all_zero, draw):
    for what, got, right in (("only_e_zero", only_e_zero, ["e"]), ("all_zero", all_zero, [])):
        try:
            names = sorted(str(name).lower() for name in got)
        except TypeError:
            names = got
        ensure(isinstance(names, list), f"{what} must be a list of names, got {got!r}")
        ensure(set(names) <= set("peq"), f"{what} may only have the names p, e and q, got {got}")
        likely = "The gradient of each of the three is a product that contains the other two."
        if what == "only_e_zero" and names == ["p", "q"]:
            likely += " So p's gradient contains e, and e's does not."
        ensure(names == right, f"{what} = {got}. {likely}")


@exercise(
    "03.importance",
    "Loop over the values. First update the average, and then the uncertainty.",
    "mean = beta * mean + (1 - beta) * value. The other line has abs(value - mean), mean updated.",
)
def importance(importance, draw):
    for values, beta in (
        ([1.0, 3.0, 1.0], 0.5),
        ([2.0], 0.85),
        ([0.0, 2.0, 0.0, 2.0, 1.0], 0.85),
        (draw.normal(9).abs().tolist(), 0.6),
        (draw.normal(4).abs().tolist(), 0.0),
        (list(draw.normal(6, 2, 3).abs()), 0.85),
    ):
        if isinstance(values[0], Tensor):
            inputs = f"values: {len(values)} tensors of the shape 2×3, beta {beta}"
        else:
            inputs = f"values [{', '.join(f'{v:.3g}' for v in values)}], beta {beta}"
        got = a_pair(call(importance, values, beta))
        mean, jumps = _importance(values, beta)
        first = values[0]
        mistakes = {
            "the averages start at the first value: let both start at 0": _importance(
                values, beta, mean=first
            )[0],
            "beta weighs the new value: it must weigh the old average": (
                _importance(values, 1 - beta)[0]
            ),
            "that is the plain mean: recent values must count more": sum(values) / len(values),
            "that is the last value: no average was taken": values[-1],
        }
        compare("the first, Ī", _like(got[0], mean), mean, inputs, mistakes)
        mistakes = {
            "the deviation is taken from the average before this value: update Ī first": (
                _importance(values, beta, late=True)[1]
            ),
            "abs() is missing": _importance(values, beta, sign=True)[1],
            "the last deviation only: it must be smoothed like Ī": abs(values[-1] - mean),
            "that is Ī again": mean,
            "beta and 1 - beta are swapped": _importance(values, beta, swapped=True)[1],
        }
        compare("the second, Ū", _like(got[1], jumps), jumps, inputs, mistakes)


def _like(got, right):
    """A number that is right may also be an int, or a tensor of one entry."""
    return got.item() if isinstance(right, float) and _is_scalar(got) else got


def _is_scalar(got) -> bool:
    return isinstance(got, Tensor) and got.numel() == 1


def _importance(values, beta, mean=0.0, late=False, sign=False, swapped=False):
    jumps = 0.0 * values[0]
    mean = mean + 0.0 * values[0]
    for value in values:
        before = mean
        mean = beta * mean + (1 - beta) * value
        deviation = value - (before if late else mean)
        deviation = deviation if sign else abs(deviation)
        old, new = (1 - beta, beta) if swapped else (beta, 1 - beta)
        jumps = old * jumps + new * deviation
    return mean, jumps


def _scores(smooth, jumps):
    p, e, q = (smooth[k] * jumps[k] for k in "PEQ")
    return e + p.mean(0) + q.mean(1)


@exercise(
    "03.scores",
    "Multiply Ī and Ū entry by entry, for each of the three. Then take means over q's and p's.",
    "In Q a triplet is a row, so take the mean over dimension 1. In P it is a column.",
)
def scores(triplet_scores, draw):
    for n_out, r, n_in in ((3, 3, 3), (6, 2, 4), (5, 1, 3), (2, 4, 7)):
        shapes = {"P": (n_out, r), "E": (r,), "Q": (r, n_in)}
        smooth = {key: draw.normal(*shape).abs() for key, shape in shapes.items()}
        jumps = {key: draw.normal(*shape).abs() for key, shape in shapes.items()}
        inputs = f"P ({n_out}×{r}), E ({r}), Q ({r}×{n_in})"
        got = _numbers(call(triplet_scores, dict(smooth), dict(jumps)), r, inputs)
        p, e, q = (smooth[k] * jumps[k] for k in "PEQ")
        means = smooth["P"].mean(0) * jumps["P"].mean(0) + smooth["Q"].mean(1) * jumps["Q"].mean(1)
        mistakes = {
            "sums instead of means: a triplet of a wide matrix would win": e + p.sum(0) + q.sum(1),
            "that is E only: the row of Q and the column of P count too": e,
            "E is missing": p.mean(0) + q.mean(1),
            "Q is missing": e + p.mean(0),
            "P is missing": e + q.mean(1),
            "that is Ī only: multiply it by Ū": (
                smooth["E"] + smooth["P"].mean(0) + smooth["Q"].mean(1)
            ),
            "that is Ū only: multiply it by Ī": (
                jumps["E"] + jumps["P"].mean(0) + jumps["Q"].mean(1)
            ),
            "multiply Ī and Ū entry by entry first, and then take the mean": e + means,
        }
        if n_out == r == n_in:
            mistakes |= {
                "a triplet is a column of P: take the mean over dimension 0": (
                    e + p.mean(1) + q.mean(1)
                ),
                "a triplet is a row of Q: take the mean over dimension 1": (
                    e + p.mean(0) + q.mean(0)
                ),
                "a triplet is a column of P and a row of Q: yours is the other way round": (
                    e + p.mean(1) + q.mean(0)
                ),
            }
        compare("the scores", got, _scores(smooth, jumps), inputs, mistakes)


def _numbers(got, count: int, inputs: str) -> Tensor:
    """A list of numbers, or a tensor, as a tensor (count,)."""
    if isinstance(got, list | tuple):
        ensure(
            all(isinstance(x, int | float) or _is_scalar(x) for x in got),
            f"expected one number per triplet, got {show(got)}\n  input     {inputs}",
        )
        got = torch.tensor([float(x) for x in got])
    ensure(isinstance(got, Tensor), f"expected {count} scores, got {show(got)}")
    ensure(
        tuple(got.shape) == (count,),
        f"the scores have the shape {tuple(got.shape)}, expected ({count},): one per triplet"
        f"\n  input     {inputs}",
    )
    return got


@exercise(
    "03.ranks",
    "Put the scores of all matrices into one list, and sort it. Where is the threshold?",
    "The last score that stays is sorted(all_scores, reverse=True)[budget - 1].",
)
def ranks(ranks, draw):
    for sizes, budget in (((3, 3), 2), ((4, 2, 3), 5), ((2, 2), 4), ((3, 1), 1), ((2, 5, 1), 7)):
        names = "abc"[: len(sizes)]
        scores = {k: draw.normal(n).abs() for k, n in zip(names, sizes, strict=True)}
        scores["a"] = scores["a"] / 50 if budget < 4 else scores["a"] + 1
        right = _ranks(scores, budget)
        inputs = ", ".join(f"{k}: {[round(v, 3) for v in s.tolist()]}" for k, s in scores.items())
        inputs = f"{{{inputs}}}, budget {budget}"
        got = call(ranks, {k: s.clone() for k, s in scores.items()}, budget)
        ensure(isinstance(got, dict), f"it must return a dict, got {show(got)}")
        missing = [k for k in names if k not in got]
        ensure(
            not missing,
            f"{missing} is missing: a matrix that loses all its triplets has the rank 0"
            f"\n  input     {inputs}\n  got       {show(dict(got))}",
        )
        lowest = _ranks({k: -s for k, s in scores.items()}, budget)
        mistakes = {
            "those are the lowest scores: keep the highest": lowest,
            "one too many": _ranks(scores, budget + 1),
            "one too few: the score at the threshold stays": _ranks(scores, budget - 1),
            "budget is how many stay, not how many are pruned": (
                _ranks(scores, sum(sizes) - budget)
            ),
            "every matrix keeps as many: compare the scores of all matrices": (
                dict.fromkeys(names, budget // len(sizes))
            ),
            "the budget holds for all matrices together, not for each": {
                k: min(budget, n) for k, n in zip(names, sizes, strict=True)
            },
        }
        compare("the ranks", dict(got), right, inputs, mistakes)


def _ranks(scores: dict, budget: int) -> dict[str, int]:
    everything = sorted(((float(s), k) for k in scores for s in scores[k]), reverse=True)
    kept = [k for _, k in everything[: max(budget, 0)]]
    return {k: kept.count(k) for k in scores}


# what the lesson uses for a function that is not right yet
FINISHED = {
    "update": _update,
    "importance": _importance,
    "triplet_scores": _scores,
    "ranks": _ranks,
}


@exercise(
    "03.budget",
    "Halfway, t is a half. Put it into (1 - t)³.",
    "64 triplets, times (1 - 1/2) three times.",
)
def budget(still_to_prune, draw):
    mistakes = {
        32: "That would be a straight line. The curve is cubic.",
        16: "That is the square. The exponent is 3.",
        56: "Those are pruned already. How many are left to be pruned?",
        136: "That is the budget: how many triplets may be there. How many above the target?",
        128: "That is the target.",
        64: "Those are all that will be pruned.",
    }
    answered(still_to_prune, 8, mistakes, "64 · (1 - t)³, with t at a half.")


@exercise(
    "03.gpt2",
    "A triplet is a column of P, an entry of Λ and a row of Q. How many are there at the start?",
    "init_r · (in + out + 1) per layer, for 12 layers.",
)
def gpt2(gpt2, draw):
    mistakes = {
        12 * 8 * (4 * 768 + 1): "8 is the mean rank at the end. Training starts with 16.",
        12 * 16 * 4 * 768: "Λ is trained too: one more number per triplet.",
        16 * (4 * 768 + 1): "That is one layer.",
        12 * (4 * 768 + 1): "That is one triplet per layer.",
        12 * 16 * (2 * 768 + 1): "The output of c_attn has 3 · 768 numbers.",
    }
    if is_close(gpt2, 590_016, 1e-7):  # without Λ it is less than 0.1 % smaller
        return
    ensure(
        not isinstance(gpt2, str), f"{gpt2!r} is a text: give a number, without quotation marks."
    )
    texts = [text for value, text in mistakes.items() if is_close(gpt2, value, 1e-7)]
    ensure(False, f"got {gpt2}. {''.join(texts)}".strip())


@exercise(
    "03.angles",
    "m @ m.T has the squared lengths of the rows of m on its diagonal. The rest is about angles.",
    "square - torch.diag(square.diagonal()) has a zero diagonal. lora_B.T turns columns into rows.",
)
def angles(angles, draw):
    for count, n_out, r, n_in in ((1, 3, 3, 3), (2, 6, 2, 4), (3, 5, 3, 7)):
        layers = {
            str(i): Factors(draw.normal(n_out, r), draw.normal(r, n_in)) for i in range(count)
        }
        inputs = f"{count} layer(s), lora_A ({r}×{n_in}), lora_B ({n_out}×{r})"
        got = call(angles, layers)
        ensure(isinstance(got, Tensor), f"it must return a tensor, got {show(got)}")
        ensure(got.numel() == 1, f"it must return one number, got {show(got)}")
        ensure(got.requires_grad, "the result has no gradient. Was something detached?")
        parts = [
            (_off(s.lora_A), _off(s.lora_B.T), _full(s.lora_A) + _full(s.lora_B.T))
            for s in layers.values()
        ]
        total = sum(a + b for a, b, _ in parts)
        right = (total / (2 * count)).detach()
        mistakes = {
            "the mean over all matrices: one layer has two": total / count,
            "that is the sum: divide by the number of matrices": total,
            "each pair counts twice, as in Q Qᵀ": right / 2**0.5,
            "the lengths count too: leave out the diagonal": sum(f for *_, f in parts)
            / (2 * count),
            "columns of P are vectors, not its rows": sum(
                a + _off(s.lora_B) for (a, *_), s in zip(parts, layers.values(), strict=True)
            )
            / (2 * count),
            "lora_B is missing": sum(a for a, *_ in parts) / count,
        }
        mistakes = {text: torch.as_tensor(value).detach() for text, value in mistakes.items()}
        compare("the result", got.detach().reshape(()), right, inputs, mistakes, 1e-4)
        for name, s in layers.items():
            for letter in "AB":
                what, matrix = f"lora_{letter} of layer {name}", getattr(s, f"lora_{letter}")
                expected = torch.autograd.grad(total / (2 * count), matrix, retain_graph=True)[0]
                grad = torch.autograd.grad(got.sum(), matrix, retain_graph=True, allow_unused=True)[
                    0
                ]
                ensure(grad is not None, f"{what} gets no gradient. Was it detached?")
                compare(
                    f"the gradient of {what}", grad, expected, inputs,
                    {"a part of the product was detached": expected / 2}, 1e-4,
                )  # fmt: skip
    eye = 3 * torch.eye(4)  # right angles, wrong lengths
    exact = {"toy": Factors(eye[:, :2].clone(), eye[:2].clone())}
    got = call(angles, exact)
    ensure(
        is_close(got.item() + 1, 1.0, 1e-3),
        f"at right angles it must be 0 for any length, got {show(got)}",
    )
    got.sum().backward()
    ensure(
        all(bool(p.grad.isfinite().all()) for p in (exact["toy"].lora_A, exact["toy"].lora_B)),
        "at right angles the gradient is NaN, because the slope of a square root at 0 is infinite: "
        "use .norm(), or add 1e-12 before .sqrt()",
    )


class Factors:
    """The parts of an SVDLinear that a penalty needs."""

    def __init__(self, p: Tensor, q: Tensor):
        self.lora_A, self.lora_B = nn.Parameter(q), nn.Parameter(p)

    def __eq__(self, other):  # for `call`, which checks that inputs do not change
        same_A = torch.equal(self.lora_A, other.lora_A)
        return same_A and torch.equal(self.lora_B, other.lora_B)

    __hash__ = None


def _off(m: Tensor) -> Tensor:
    square = m @ m.T
    return (square - torch.diag(square.diagonal())).norm()


def _full(m: Tensor) -> Tensor:
    return (m @ m.T - torch.eye(len(m))).norm()
