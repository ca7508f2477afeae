"""Lesson 09: choosing a method."""

import math
import statistics
from collections import Counter

import torch
from torch import nn

from minipeft.lab.report import interval

from . import answered, call, compare, done, ensure, exercise, is_close, show


@exercise(
    "09.scaling",
    "LoRA computes W x + b + (α/r) B A x.",
    "Divide α by r.",
)
def scaling(scaling, draw):
    mistakes = {
        0.5: "That is r/α.",
        16: "That is α. LoRA divides it by r.",
        128: "That is α · r. LoRA divides.",
        8: "That is r.",
    }
    answered(scaling, 2, mistakes, "It is α/r.")


@exercise(
    "09.split",
    "Which examples may you look at many times, without training on them?",
    "The test examples are used once, at the end.",
)
def split(split, draw):
    mistakes = {
        "training": "A rate that is too high may have the lowest training loss by overfitting.",
        "train": "A rate that is too high may have the lowest training loss by overfitting.",
        "test": "Then the best test score would be the luckiest one. Use the test examples once.",
    }
    got = split.strip().lower() if isinstance(split, str) else split
    answered(got, "validation", mistakes, "Choose one of the three texts.")


@exercise(
    "09.best_rate",
    "First find the rate with the lowest loss. Which rates are at the edge of the list?",
    "min(losses, key=losses.get) is the best rate. Compare it with min(losses) and max(losses).",
)
def best_rate(best_rate, draw):
    cases = [
        ({0.001: 0.9, 0.002: 0.4, 0.004: 0.6}, 0.002),
        ({0.004: 0.6, 0.001: 0.9, 0.002: 0.4}, 0.002),  # in another order
        ({0.001: 0.3, 0.002: 0.4, 0.004: 0.6}, None),
        ({0.001: 0.9, 0.002: 0.6, 0.004: 0.4}, None),
        ({0.004: 0.4, 0.002: 0.6, 0.001: 0.9}, None),  # the last of the list is not an edge
        ({0.01: 0.5, 0.02: 0.2, 0.04: math.inf}, 0.02),
        ({0.01: 0.5}, None),
        ({0.01: 0.5, 0.02: 0.2}, None),
    ]
    rates = [2.0**-i for i in range(10, 3, -1)]
    for best in (0, 3, 5, 6):
        losses = [0.2 + abs(i - best) + draw.random.random() / 2 for i in range(len(rates))]
        losses[best] = 0.1
        pairs = list(zip(rates, losses, strict=True))
        draw.random.shuffle(pairs)
        cases.append((dict(pairs), rates[best] if best not in (0, 6) else None))
    for i, (losses, right) in enumerate(cases):
        got = call(best_rate, losses, may_be_none=i > 0)
        mistakes = {
            "that is the loss, not the rate": min(losses.values()),
            "that rate is at the edge of the list: expected None": min(losses, key=losses.get),
            "that is the rate with the highest loss": max(losses, key=losses.get),
        }
        if right is not None:
            mistakes["this rate is not at the edge of the list"] = None
        compare("best_rate(…)", got, right, show(losses), mistakes)


@exercise(
    "09.front",
    "For each point p, look for a point q that beats it: q ≠ p, at least as good in both.",
    "At least as good means q[0] >= p[0] and q[1] <= p[1].",
)
def front(front, draw):
    cases = [
        [(0.9, 1.0), (0.8, 0.5), (0.9, 2.0), (0.7, 0.6), (0.95, 3.0), (0.2, 0.5)],
        [(0.5, 0.5)],
        [],
        [(0.5, 0.5), (0.5, 0.5), (0.4, 0.5), (0.5, 0.6)],
        [(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)],
    ]
    for n in (4, 12, 30):
        cases.append([(draw.integer(0, 9) / 10, draw.integer(0, 9) / 4) for _ in range(n)])
    for points in cases:
        got = call(front, list(points))
        right = {p for p in points if not any(_beats(q, p) for q in points)}
        try:
            pairs = [tuple(float(x) for x in pair) for pair in got]
        except (TypeError, ValueError):
            pairs = None
        inputs = f"\n  input     {show(points)}\n  got       {show(got)}"
        ensure(pairs is not None, f"front(…) must return a list of the pairs{inputs}")
        expected = f"{inputs}\n  expected  {sorted(right)}"
        for missing in right - set(pairs):
            ensure(False, f"{missing} is missing, and no point beats it{expected}")
        for p in pairs:
            by = next((q for q in points if _beats(q, p)), None)
            ensure(p in points, f"{p} is not one of the points{expected}")
            ensure(by is None, f"{p} is beaten by {by}{expected}")
        most = Counter(points)
        for p, n in Counter(pairs).items():
            ensure(n <= most[p], f"{p} comes {n} times{expected}")


def _beats(q: tuple, p: tuple) -> bool:
    return q != p and q[0] >= p[0] and q[1] <= p[1]


def _front(points: list[tuple]) -> list[tuple]:
    return [p for p in points if not any(_beats(q, p) for q in points)]


# what the lesson uses for a function that is not right yet
FINISHED = {"front": _front}


@exercise(
    "09.choose",
    "Only one of the two dictionaries may decide which setting you take.",
    "setting = max(validation, key=validation.get). Its test score is test[setting].",
)
def choose(choose, draw):
    cases = [
        ({"A": 0.9, "B": 0.8}, {"A": 0.7, "B": 0.85}),
        ({"A": 0.5}, {"A": 0.6}),
        ({"A": 0.91, "B": 0.93, "C": 0.92}, {"A": 0.92, "B": 0.90, "C": 0.95}),
        ({"A": 0.91, "B": 0.93}, {"B": 0.90, "A": 0.92}),  # in another order
    ]
    for n in (3, 6):
        names = [f"setting {i}" for i in range(n)]
        validation, test = (dict(zip(names, draw.random.sample(range(50, 99), n), strict=True))
                            for _ in range(2))  # fmt: skip
        cases.append(({k: v / 100 for k, v in validation.items()},
                      {k: v / 100 for k, v in test.items()}))  # fmt: skip
    for validation, test in cases:
        best = max(validation, key=validation.get)
        lucky = max(test, key=test.get)
        got = call(choose, validation, test)
        compare(
            "choose(…)", got, (best, test[best]), f"validation {validation}, test {test}",
            {
                "that setting was chosen on the test scores": (lucky, test[lucky]),
                "the score must be the test score": (best, validation[best]),
                "the best test score belongs to another setting": (best, test[lucky]),
                "first the setting, then its test score": (test[best], best),
                "return the setting and its test score": test[best],
            },
        )  # fmt: skip


@exercise(
    "09.differs",
    "First compute the differences, one per seed. Then use report.interval on them.",
    "The interval is mean ± report.interval(differences). When does it leave out zero?",
)
def differs(differs, draw):
    seeds = [0.3 * i for i in range(6)]  # what a seed adds for both methods
    cases = [
        ([0.9 + s for s in seeds], [0.8 + s + 0.01 * (i % 2) for i, s in enumerate(seeds)], True),
        ([0.8 + s + 0.01 * (i % 2) for i, s in enumerate(seeds)], [0.9 + s for s in seeds], True),
        ([0.9, 0.5, 0.8, 0.7], [0.6, 0.8, 0.5, 0.9], False),
        ([0.2, 0.9], [0.1, 0.3], False),  # two seeds
        ([0.90, 0.99, 0.95], [0.89, 0.86, 0.93], False),  # ahead with every seed
        ([0.91, 0.92, 0.91], [0.85, 0.85, 0.86], True),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], False),
    ]
    for n, shift in ((5, 0.0), (10, 1.0), (10, -1.0), (8, 0.0), (10, 0.085), (3, 0.15)):
        noise = draw.normal(n)
        noise = 0.1 * (noise - noise.mean()) / noise.std()
        b = draw.normal(n).tolist()
        a = [x + shift + e for x, e in zip(b, noise.tolist(), strict=True)]
        cases.append((a, b, bool(shift) and n == 10))  # 3 seeds need more than 2.5 deviations
    said = []
    for a, b, _ in cases:
        got = call(differs, a, b)
        truth = got in (True, False) if not isinstance(got, list | tuple | str) else False
        ensure(truth, f"differs(…) must return True or False, got {show(got)}")
        said.append(bool(got))
    mistakes = {
        "use one difference per seed, not two separate intervals": _apart,
        "a negative difference is a difference too": lambda a, b: _mean(a, b) > _half(a, b),
        "the standard deviation is not the interval of a mean": lambda a, b: (
            abs(_mean(a, b)) > statistics.stdev(_differences(a, b))
        ),
        "two means are never exactly equal: use the interval": lambda a, b: _mean(a, b) != 0,
        "that is the wrong way round": lambda a, b: abs(_mean(a, b)) <= _half(a, b),
    }
    likely = [  # mistakes that explain every answer, not only the first wrong one
        f"\n  likely    {text}"
        for text, rule in mistakes.items()
        if said == [rule(a, b) for a, b, _ in cases]
    ]
    for (a, b, right), got in zip(cases, said, strict=True):
        inputs = "; ".join(str([round(x, 3) for x in values]) for values in (a, b))
        verb = "leaves out" if right else "contains"
        ensure(
            got == right,
            f"differs(…)\n  input     {inputs}\n  got       {got}\n  expected  {right}: "
            f"the interval of the paired differences {verb} zero{''.join(likely[:1])}",
        )


def _differences(a: list, b: list) -> list:
    return [x - y for x, y in zip(a, b, strict=True)]


def _mean(a: list, b: list) -> float:
    return statistics.mean(_differences(a, b))


def _half(a: list, b: list) -> float:
    return interval(_differences(a, b))


def _apart(a: list, b: list) -> bool:
    """Whether two separate intervals do not overlap."""
    return abs(statistics.mean(a) - statistics.mean(b)) > interval(a) + interval(b)


@exercise(
    "09.alpha",
    "Compute the scaling at r = 8 for both. Then ask which α gives the same number at r = 32.",
    "For rsLoRA: α/√32 = 16/√8, and √32 is twice √8.",
)
def alpha(alpha_lora, alpha_rslora, draw):
    mistakes = {
        16: "With α/r, the scaling would be a quarter of what it was.",
        4: "The scaling is α/r: a larger r needs a larger α.",
        32: "That doubles α, but r is four times as large.",
        128: "That is 16 · 8.",
        2: "That is the scaling, not α.",
    }
    answered(alpha_lora, 64, mistakes, "alpha_lora: solve α/32 = 16/8.")
    mistakes = {
        16: "With α/√r, the scaling would be half of what it was.",
        64: "That is right for α/r. rsLoRA divides by √r.",
        8: "A larger r needs a larger α.",
        256: "√32 is twice √8, not 16 times.",
    }
    answered(alpha_rslora, 32, mistakes, "alpha_rslora: solve α/√32 = 16/√8.")


@exercise(
    "09.intruders",
    "svd(W, full_matrices=False)[0] has the left singular vectors as columns. Take old.T @ new.",
    "Take absolute values, then the largest cosine of each new vector: .abs().amax(0). Count.",
)
def intruders(intruders, draw):
    cases = []
    for n_out, n_in, k, planted in (
        (12, 9, 4, (0,)), (9, 12, 3, (1, 2)), (10, 10, 5, ()), (8, 6, 10, (0, 3)),
        (6, 20, 2, (0, 1)), (12, 9, 1, (0,)),
    ):  # fmt: skip
        before, after = _weights(draw, n_out, n_in, planted)
        cases += [(before, after, k, below) for below in (0.3, 0.6)]
    said = [call(intruders, *case) for case in cases]
    likely = {  # mistakes that explain every answer, not only the first wrong one
        text: rule
        for text, rule in MISTAKES.items()
        if all(is_close(got, rule(*case), 0) for got, case in zip(said, cases, strict=True))
    }
    for got, case in zip(said, cases, strict=True):
        before, _, k, below = case
        inputs = f"two weights {before.shape[0]} × {before.shape[1]}, k = {k}, below = {below}"
        mistakes = {text: rule(*case) for text, rule in likely.items()}
        compare("intruders(…)", got, _count(*case), inputs, mistakes)


def _cosines(before, after, k: int, full: bool = False):
    """Of every left singular vector of a weight (rows) with the first k of another (columns)."""
    old = torch.linalg.svd(before, full_matrices=full)[0]
    return old.T @ torch.linalg.svd(after, full_matrices=full)[0][:, :k]


def _count(before, after, k: int, below: float) -> int:
    return int((_cosines(before, after, k).abs().amax(0) < below).sum())


MISTAKES = {
    "those are not intruders: count the others":
        lambda b, a, k, c: int((_cosines(b, a, k).abs().amax(0) >= c).sum()),
    "only the first k directions of the new weight count":
        lambda b, a, k, c: _count(b, a, min(b.shape), c),
    "use `below`, not a fixed number": lambda b, a, k, c: _count(b, a, k, 0.6),
    "the sign of a singular vector is arbitrary: take absolute values":
        lambda b, a, k, c: int((_cosines(b, a, k).amax(0) < c).sum()),
    "use full_matrices=False: the other vectors are no directions of W":
        lambda b, a, k, c: int((_cosines(b, a, k, full=True).abs().amax(0) < c).sum()),
    "use full_matrices=False, and take absolute values":
        lambda b, a, k, c: int((_cosines(b, a, k, full=True).amax(0) < c).sum()),
    "compare each vector with all vectors of W, not only with that of equal number":
        lambda b, a, k, c: int((_cosines(b, a, k).diagonal().abs() < c).sum()),
    "compare with all singular vectors of W, not only with the first k":
        lambda b, a, k, c: int((_cosines(b, a, k)[:k].abs().amax(0) < c).sum()),
    "take the largest cosine of each new vector, not of each old one":
        lambda b, a, k, c: int((_cosines(b, a, k).abs().amax(1) < c).sum()),
    "those are the right singular vectors": lambda b, a, k, c: _count(b.T, a.T, k, c),
}  # fmt: skip


def _weights(draw, n_out: int, n_in: int, planted: tuple[int, ...]):
    """A weight, and one whose directions of these numbers are new; the others change places."""
    n = min(n_out, n_in)
    u = torch.linalg.qr(draw.normal(n_out, n_out))[0]
    v = torch.linalg.qr(draw.normal(n_in, n_in))[0]
    rows = torch.linspace(2.0, 1.0, n)
    before = u[:, :n] * rows @ v[:, :n].T
    order = list(range(n))[::-1]
    signs = torch.tensor([(-1.0) ** i for i in range(n)])
    new_u = u[:, order] * signs
    for i in planted:  # a mixture of all directions, each with a small cosine
        fresh = draw.normal(n_out)
        others = torch.cat([new_u[:, :i], new_u[:, i + 1 :]], dim=1)
        fresh = fresh - 0.9 * others @ (others.T @ fresh)
        new_u[:, i] = u.sum(1) / n_out**0.5 if i == planted[0] else fresh / fresh.norm()
    after = new_u * rows @ torch.linalg.qr(draw.normal(n_in, n_in))[0][:, :n].T
    return before, after


@exercise(
    "09.floor",
    "Full fine-tuning: 16 layers, three units each. Which unit does a frozen layer not need?",
    "The forward pass always takes 16 units. Through how many layers must the gradient go back?",
)
def floor(everywhere, at_the_top, draw):
    mistakes = {
        16 / 48: "(a) The gradient must still go back through every layer to reach the first one.",
        31 / 48: "(a) Count the gradient of the first layer's input, too.",
        1.0: "(a) A frozen weight needs no gradient of its own.",
        0.0: "(a) The forward pass is still there.",
        32: "(a) Answer with a share of 48.",
    }
    answered(
        _exact(everywhere, 32 / 48),
        32 / 48,
        mistakes,
        "(a) Which of the three units does freezing save?",
    )
    mistakes = {
        4 / 48: "(b) The forward pass goes through all sixteen layers.",
        8 / 48: "(b) The forward pass goes through all sixteen layers.",
        32 / 48: "(b) The gradient need not go further back than to the thirteenth layer.",
        19 / 48: "(b) Count the gradient of the thirteenth layer's input, too.",
        24 / 48: "(b) The weights of the last four layers are frozen too.",
        20: "(b) Answer with a share of 48.",
    }
    answered(
        _exact(at_the_top, 20 / 48),
        20 / 48,
        mistakes,
        "(b) Forward through all, back through four.",
    )


def _exact(got, share: float):
    """The share itself, if an answer is the share rounded to two decimals."""
    is_number = isinstance(got, float) or (isinstance(got, torch.Tensor) and got.numel() == 1)
    return share if is_number and abs(float(got) - share) <= 0.005 else got


class _Toy(nn.Module):
    """A model with adapters whose names are those of minipeft."""

    def __init__(self, n: int):
        super().__init__()
        self.wte = nn.Embedding(5, 4).requires_grad_(False)
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "base_layer": nn.Linear(4, 4).requires_grad_(False),
                "lora_A": nn.Linear(4, 2, bias=False),
                "lora_B": nn.Linear(2, 4, bias=False),
            })
            for _ in range(n)
        )  # fmt: skip


@exercise(
    "09.groups",
    'model.named_parameters() has names such as "….lora_A.weight".',
    'First group: [p for n, p in model.named_parameters() if "lora_A" in n], with "lr": rate.',
)
def groups(groups, draw):
    for n, rate, ratio in ((1, 0.01, 16), (3, 0.002, 4.0), (2, 1.0, 1)):
        model = _Toy(n)
        names = {id(p): name.split(".")[-2] for name, p in model.named_parameters()}
        got = call(groups, model, rate, ratio)
        inputs = f"a model with {n} adapter{'s' * (n > 1)}, rate {rate}, ratio {ratio}"
        found = []
        ensure(isinstance(got, list | tuple) and len(got) == 2,
               f"groups(…) must return two groups, got {show(got)}")  # fmt: skip
        for group in got:
            is_group = isinstance(group, dict) and {"params", "lr"} <= group.keys()
            ensure(is_group, f'a group is a dictionary with "params" and "lr", got {show(group)}')
            params = group["params"]
            params = [params] if isinstance(params, torch.Tensor) else list(params)
            kinds = Counter(names.get(id(p), "no parameter of the model") for p in params)
            found.append((dict(kinds), group["lr"]))
        kinds = [kind for kind, _ in found]
        if kinds == [{"lora_B": n}, {"lora_A": n}]:
            ensure(False, f"the group of lora_A comes first\n  input     {inputs}")
        for kind, right in zip(kinds, ({"lora_A": n}, {"lora_B": n}), strict=True):
            ensure(kind == right, f"a group has the parameters {kind}, expected {right}\n"
                   f"  input     {inputs}")  # fmt: skip
        for (kind, lr), right in zip(found, (rate, ratio * rate), strict=True):
            compare(f"the learning rate of {next(iter(kind))}", lr, right, inputs, {
                "the rate of B is ratio · rate": rate if right != rate else None,
                "A learns at `rate` itself": rate / ratio if right == rate else None,
            })  # fmt: skip


@exercise(
    "09.dora",
    "V = W + (α/r) B A. Its norm is taken per row: V.norm(dim=1, keepdim=True).",
    "W' = m[:, None] · V / norm, and the output is x W'ᵀ + b. At the start B is 0 and m = ‖W‖.",
)
def dora(MyDora, draw):
    for n_in, n_out, r, alpha, bias in ((10, 7, 3, 5.0, True), (4, 4, 1, 1.0, True),
                                        (3, 9, 2, 8.0, False)):  # fmt: skip
        linear = nn.Linear(n_in, n_out, bias=bias)
        before = {name: p.detach().clone() for name, p in linear.named_parameters()}
        inputs = f"MyDora(nn.Linear({n_in}, {n_out}, bias={bias}), r={r}, alpha={alpha:g})"
        layer = call(MyDora, linear, r, alpha)
        x = draw.normal(2, 5, n_in)
        y = done(layer(x))
        trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        shapes = {name: tuple(p.shape) for name, p in trained.items()}
        right = {"A": (r, n_in), "B": (n_out, r), "m": (n_out,)}
        ensure(shapes == right, f"trained are {shapes}, expected {right}\n  input     {inputs}")
        A, B, m = (trained[name] for name in "ABm")
        ensure(bool(A.any()) or bool(B.any()), "A and B are both zero, so neither gets a gradient "
               "and nothing would ever train. Start A with random numbers.")  # fmt: skip
        ensure(not (bool(A.any()) and bool(B.any())), "A and B are both random, so B A is not zero "
               "and the layer does not start as it was. Start B with zeros.")  # fmt: skip
        start = A if bool(A.any()) else B
        ensure(int(torch.linalg.matrix_rank(start)) == r, "the rows of A are multiples of each "
               "other at the start, so the update would stay at a lower rank than r. Start A "
               "with random numbers.")  # fmt: skip
        W, b = before["weight"], before.get("bias", torch.zeros(n_out))
        norms = W.norm(dim=1)
        mistakes = {
            "m must start at the norms of W's rows": torch.ones(n_out),
            "that is one norm for the whole W: take one per row": W.norm().expand(n_out),
        }
        compare("m at the start", m.detach(), norms, inputs, mistakes)
        one_norm = x @ (norms[:, None] * W / W.norm()).T + b
        mistakes = {
            "the bias is missing": x @ W.T,
            "divide each row by its own norm, not by that of the whole matrix": one_norm,
        }
        compare("the output at the start", y, x @ W.T + b, inputs, mistakes, tolerance=1e-4)
        with torch.no_grad():
            A.copy_(draw.normal(r, n_in))
            B.copy_(draw.normal(n_out, r))
            m.mul_(torch.linspace(0.5, 2, n_out))

        def output(s, divide_by=None, W=W, A=A, B=B, m=m, x=x, b=b):
            v = W + s * B @ A
            norm = v.norm(dim=1, keepdim=True) if divide_by is None else divide_by
            return x @ (m[:, None] * v / norm).T + b

        y = layer(x)
        compare(
            "the output, once B is not zero", y, output(alpha / r), inputs,
            {
                "the scaling α / r is missing": output(1),
                "scaled by α, not by α / r": output(alpha),
                "divide by the norm of W + (α/r) B A, not of W": output(
                    alpha / r, W.norm(dim=1, keepdim=True)),
                "the direction must have norm 1: divide by the norm": output(alpha / r, 1.0),
                "the bias is missing": output(alpha / r) - b,
                "m is not used": output(alpha / r) * 0 + _plain(W, A, B, alpha / r, x, b),
            },
            tolerance=1e-4,
        )  # fmt: skip
        y.square().sum().backward()
        for name, p in trained.items():
            ensure(p.grad is not None and bool(p.grad.any()),
                   f"self.{name} gets no gradient. Was it detached, or copied?")  # fmt: skip
        for name, value in before.items():
            now = dict(linear.named_parameters()).get(name, value)
            ensure(torch.equal(now, value), f"the layer's {name} has changed")


def _plain(W, A, B, s, x, b):
    return x @ (W + s * B @ A).T + b
