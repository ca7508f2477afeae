"""What is graded in training.py."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from minipeft.lab import DATA
from minipeft.lab.base import load_base
from minipeft.lab.tasks import load_task, shuffled

from .. import skeleton
from ..judge import Checks, load
from ..symptoms import Draw, Wrong, ensure, same, show, unchanged
from .common import STEPS, compare_losses

CHECKS = Checks("training")
END = 7  # the token that ends a completion; it is the padding too, as in the lab
values, task, reference = {}, None, None


def prepare(level: str, given: dict | None) -> None:
    """Read what the checks of a level need, as long as minipeft can be imported."""
    global task, reference
    if level == "values":
        values.update(given or skeleton.stored("training"))
    if level == "losses":
        base = load_base(DATA / "base" / "0.3m")
        batches = shuffled(load_task(base, "describe").train, 8, 0)
        pairs = [[(e.prompt_ids, e.completion_ids) for e in next(batches)] for _ in range(STEPS)]
        task = base.model(), pairs, base.end
        reference = load("reference", skeleton.reference("training").read_text(), "reference")


def first_difference(
    what: str, cases: Sequence[str], got: Sequence, expected: Sequence[float],
    guesses: dict[str, list[float]], tolerance: float = 1e-5,
) -> None:  # fmt: skip
    """Raise Wrong at the first case with a wrong number. A guess must explain all cases."""

    def close(a: float, b: float) -> bool:
        near = math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
        return near or (math.isnan(a) and math.isnan(b))

    wrong = [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if not close(a, b)]
    if wrong:
        mistakes = [k for k, v in guesses.items() if all(map(close, got, v))]
        text = f"{what} is {got[wrong[0]]:.5g}, expected {expected[wrong[0]]:.5g}"
        mistake = f": {mistakes[0]}" if mistakes else ""
        raise Wrong(f"{text}{mistake} ({cases[wrong[0]]})")


def compare(
    what: str, cases: list[str], got: list, expected: list[Tensor],
    guesses: list[dict[str, Tensor]], tolerance: float = 1e-5,
) -> None:  # fmt: skip
    """Like first_difference, for tensors."""

    def explains(mistake: str) -> bool:
        return all(
            isinstance(a, Tensor) and a.shape == g[mistake].shape
            and torch.allclose(a.double(), g[mistake].double(), rtol=0, atol=tolerance * size(b))
            for a, b, g in zip(got, expected, guesses, strict=True)
        )  # fmt: skip

    def size(x: Tensor) -> float:
        return x.abs().max().item()

    mistakes = [mistake for mistake in guesses[0] if explains(mistake)]
    for text, a, b, g in zip(cases, got, expected, guesses, strict=True):
        same(what, a, b, tolerance, guesses={k: g[k] for k in mistakes}, case=text)


def rows_of(draw: Draw, *lengths: int) -> list[list[int]]:
    return [draw.tokens(50, length).tolist() for length in lengths]


@CHECKS.add("pieces", "pad_right")
def pad_right(m: ModuleType, draw: Draw) -> None:
    drawn = rows_of(draw, *(draw.integer(1, 6) for _ in range(4)), 8)
    for rows, value in (
        ([[3]], 9), ([[3, 4]], 9), ([[1], [2, 3]], 9), ([[2, 3], [1]], 0), ([[5, 6], [7, 8]], 9),
        ([[4, 5, 6, 8], [3], [2, 1]], -100), (drawn, draw.integer(60, 99)),
    ):  # fmt: skip
        before, t = copy.deepcopy(rows), max(map(len, rows))
        found = m.pad_right(rows, value)
        text = f"pad_right({before}, {value})" if len(rows) < 4 else "random rows"
        ensure(rows == before, f"{text} has changed the rows, and it must not")
        guesses = {
            "the padding is on the left": [[value] * (t - len(r)) + r for r in rows],
            "the padding is 0, not `value`": [r + [0] * (t - len(r)) for r in rows],
        }
        same(text, found, torch.tensor([r + [value] * (t - len(r)) for r in rows]),
             guesses={k: torch.tensor(v) for k, v in guesses.items()})  # fmt: skip


Examples = list[tuple[list[int], list[int]]]


def table(examples: Examples, row: list[list[int]], value: int, left: bool = False) -> Tensor:
    """Rows that are as long as the examples, padded."""
    t = max(len(prompt) + len(completion) for prompt, completion in examples)
    fill = [[value] * (t - len(r)) for r in row]
    return torch.tensor([f + r if left else r + f for r, f in zip(row, fill, strict=True)])


def batch_of(examples: Examples, pad: int) -> dict[str, Tensor]:
    """What collate should return."""
    return {
        "input_ids": table(examples, [p + c for p, c in examples], pad),
        "attention_mask": table(examples, [[1] * len(p + c) for p, c in examples], 0),
        "labels": table(examples, [[-100] * len(p) + c for p, c in examples], -100),
    }


def wrong_batches(examples: Examples, pad: int) -> dict[str, dict[str, Tensor]]:
    """Wrong batches, by the mistake that leads to each."""
    rows = [p + c for p, c in examples]
    masks, labels = [[1] * len(r) for r in rows], [[-100] * len(p) + c for p, c in examples]
    ids, mask, right = batch_of(examples, pad).values()
    shifted = right.roll(-1, 1)
    shifted[:, -1] = -100
    return {
        "input_ids": {
            "the padding is on the left": table(examples, rows, pad, left=True),
            "the completion comes before the prompt": table(
                examples, [c + p for p, c in examples], pad),
            "the padding is 0, not `pad`": table(examples, rows, 0),
            "the padding is -100, which is for labels only": table(examples, rows, -100),
        },
        "attention_mask": {
            "it is 1 for the padding too": torch.ones_like(mask),
            "it is 1 for the padding and 0 for tokens": 1 - mask,
            "the padding is on the left": table(examples, masks, 0, left=True),
            "tokens equal to `pad` are not all padding: a completion may end with one":
                (ids != pad).long(),
            "it is 0 for the prompt, which the model must see": (right != -100).long(),
        },
        "labels": {
            "the prompt must be -100: no loss is taken there": ids.where(mask == 1, -100),
            "the padding must be -100, not `pad`": table(examples, labels, pad),
            "the padding must be -100, not 0": table(examples, labels, 0),
            "neither the prompt nor the padding is -100": ids,
            "the padding is on the left": table(examples, labels, -100, left=True),
            "the completion's end token is masked away, and the model would never stop":
                right.where(ids != pad, -100),
            "the last token of each completion is masked away": table(
                examples, [r[:-1] + [-100] for r in labels], -100),
            "the first token of each completion is masked away":
                right.where(right.roll(1, 1) != -100, -100),
            "they are shifted here already, and summed_loss shifts them again": shifted,
            "the last token of each prompt is not masked": table(
                examples, [[-100] * (len(p) - 1) + p[-1:] + c for p, c in examples], -100),
            "prompt and completion are swapped": table(
                examples, [p + [-100] * len(c) for p, c in examples], -100),
            "the prompt is 0, not -100": table(
                examples, [[0] * len(p) + c for p, c in examples], -100),
        },
    }  # fmt: skip


@CHECKS.add("pieces", "collate")
def collate(m: ModuleType, draw: Draw) -> None:
    texts, batches, expected, guesses = [], [], [], []
    drawn = [(rows_of(draw, draw.integer(1, 5))[0], [*rows_of(draw, draw.integer(1, 4))[0], END])
             for _ in range(4)]  # fmt: skip
    for examples, pad in (
        ([([1, 2], [3, END])], END), ([([1, 2, 3], [4, 5, END]), ([6], [8, END])], END),
        ([([6], [8, 9]), ([1, 2, 3], [4, 5, END])], 40), (drawn, END),
    ):  # fmt: skip
        before = copy.deepcopy(examples)
        found = m.collate(examples, pad)
        ensure(isinstance(found, dict), f"collate must return a dict, got {type(found).__name__}")
        ensure(examples == before, "collate has changed the examples, and it must not")
        wanted = batch_of(examples, pad)
        ensure(set(found) == set(wanted), f"the batch must have the keys {', '.join(wanted)}, "
               f"got {', '.join(map(str, found))}")  # fmt: skip
        if isinstance(found["attention_mask"], Tensor):  # booleans are as good as 0 and 1
            found["attention_mask"] = found["attention_mask"].long()
        texts.append(f"examples {before}, pad {pad}")
        batches.append(found)
        expected.append(wanted)
        guesses.append(wrong_batches(examples, pad))
    for name in wanted:
        found, right, wrong = ([b[name] for b in list] for list in (batches, expected, guesses))
        compare(f'batch["{name}"]', texts, found, right, wrong)


def nll(logits: Tensor, labels: Tensor, shift: int = 1) -> Tensor:
    """-log p of each label that is not -100, given the logits `shift` positions before it."""
    labels = labels[:, shift:] if shift >= 0 else labels[:, :shift]
    logits = logits[:, : logits.shape[1] - shift] if shift >= 0 else logits[:, -shift:]
    row, column = (labels != -100).nonzero(as_tuple=True)
    return -logits.log_softmax(-1)[row, column, labels[row, column]]


def some_logits(draw: Draw) -> list[tuple[Tensor, Tensor]]:
    """Logits (b, t, v) and labels (b, t), from the smallest case to larger ones."""
    cases = []
    drawn = (draw.integer(2, 4), draw.integer(5, 9), 13, 2)
    fixed = ((1, 2, 3, 1), (1, 4, 3, 1), (2, 5, 4, 1), (3, 6, 11, 1), (2, 3, 5, 300))
    for b, t, v, scale in (*fixed, drawn):
        labels = draw.tokens(v, b, t)
        if t > 2:
            labels[:, 2] = -100  # also in the middle
            labels[-1, -2:] = 0  # token 0 is a token
            labels[0, 1 : draw.integer(1, t - 2)] = -100
        cases.append((scale * draw.normal(b, t, v), labels))
    return [*cases, (draw.normal(2, 3, 4), torch.full((2, 3), -100))]


@CHECKS.add("pieces", "summed_loss")
def summed_loss(m: ModuleType, draw: Draw) -> None:
    texts, got, expected, gradients = [], [], [], []

    def reshaped(x: Tensor) -> Tensor:
        b, t, v = x.shape
        return x.reshape(b, v, t).mT

    names = {
        "it is the mean, not the sum": lambda x, y: nll(x, y).mean(),
        "the labels are not shifted: the logits at i predict the token at i + 1":
            lambda x, y: nll(x, y, 0).sum(),
        "the labels are shifted twice": lambda x, y: nll(x, y, 2).sum(),
        "it is shifted the wrong way: the logits at i predict the token at i + 1":
            lambda x, y: nll(x, y, -1).sum(),
        "-100 counts as token 0": lambda x, y: nll(x, y.clamp(min=0)).sum(),
        "token 0 is ignored, and it is a token like the others":
            lambda x, y: nll(x, y.where(y != 0, -100)).sum(),
        "token 0 is ignored, and -100 counts as another one":
            lambda x, y: nll(x, y.where(y != 0, -100).clamp(min=0)).sum(),
        "it has the opposite sign": lambda x, y: -nll(x, y).sum(),
        "it is the mean, and the labels are not shifted": lambda x, y: nll(x, y, 0).mean(),
        "F.cross_entropy takes logits, and there is a softmax before it":
            lambda x, y: nll(x.softmax(-1), y).sum(),
        "(b, t, v) must be transposed to (b, v, t), not reshaped":
            lambda x, y: nll(reshaped(x[:, :-1]), y[:, 1:], 0).sum(),
        "it is divided by the number of rows": lambda x, y: nll(x, y).sum() / len(y),
        "shift before you flatten: the end of a row does not predict the start of the next one":
            lambda x, y: nll(x.flatten(0, 1)[None], y.flatten()[None]).sum(),
    }  # fmt: skip
    guesses = {name: [] for name in names}
    for logits, labels in some_logits(draw):
        x, before, shape = logits.clone().requires_grad_(), labels.clone(), tuple(logits.shape)
        found = m.summed_loss(x, labels)
        ensure(isinstance(found, Tensor), f"the loss must be a tensor, got {type(found).__name__}")
        ensure(found.dim() == 0, f"the loss must be a scalar, got the shape {tuple(found.shape)}")
        unchanged("labels", before, labels)
        unchanged("logits", logits, x.detach())
        y = logits.clone().requires_grad_()
        loss = nll(y, labels).sum()
        texts.append(f"logits {shape} up to {logits.max():.0f}, labels {labels.tolist()}")
        got.append(found.item())
        expected.append(loss.item())
        for name, values in guesses.items():
            values.append(names[name](logits, labels).item())
        gradients.append((x, found, torch.autograd.grad(loss, y)[0]))
    first_difference("the loss", texts, got, expected, guesses)
    for (x, loss, gradient), text in zip(gradients, texts, strict=True):
        if gradient.any():
            ensure(loss.requires_grad, "the loss has no graph: backward() would not work")
            (found,) = torch.autograd.grad(loss, x)
            same("the gradient of the logits", found, gradient, case=text)


def rate(s: int, steps: int, peak: float, w: int) -> float:
    """Equation (2)."""
    return peak * s / w if s <= w else peak * math.cos(math.pi / 2 * (s - 1 - w) / (steps - w)) ** 2


def wrong_rates() -> dict:
    """Wrong formulas, by the mistake that leads to each."""

    def after(wrong):
        """Only what follows the warm-up is wrong."""
        return lambda s, S, peak, w: rate(s, S, peak, w) if s <= w else peak * wrong(s, S, w)

    def curve(wrong):
        """Only the curve is wrong, as a function of the share that is done."""
        return after(lambda s, S, w: wrong((s - 1 - w) / (S - w)))

    def before(wrong):
        return lambda s, S, peak, w: peak * wrong(s, w) if s <= w else rate(s, S, peak, w)

    def cosine(done: float) -> float:
        return (1 + math.cos(math.pi * done)) / 2

    return {
        "the warm-up starts at 0, so that the first step changes nothing: steps count from 1":
            before(lambda s, w: (s - 1) / w),
        "the warm-up reaches the peak one step too late": before(lambda s, w: s / (w + 1)),
        "step w belongs to the warm-up":
            lambda s, S, peak, w: peak * (s / w if s < w else cosine((s - 1 - w) / max(S - w, 1))),
        "there is no warm-up": before(lambda s, w: 1),
        "the warm-up must rise to the peak in w steps, not in S":
            lambda s, S, peak, w: peak * s / S if s <= w else rate(s, S, peak, w),
        "the cosine is one step ahead: the first step after the warm-up has the peak":
            after(lambda s, S, w: cosine((s - w) / (S - w))),
        "the cosine is one step behind: the first step after the warm-up has done 0":
            after(lambda s, S, w: cosine((s - 2 - w) / (S - w))),
        "the cosine must reach its end after S - w steps, not after S":
            after(lambda s, S, w: cosine((s - 1 - w) / S)),
        "the cosine counts from step 0: it begins after the warm-up":
            after(lambda s, S, w: cosine(s / S)),
        "the cosine counts from step 1: it begins after the warm-up":
            after(lambda s, S, w: cosine((s - 1) / S)),
        "the warm-up must not count in the cosine":
            after(lambda s, S, w: cosine((s - 1) / (S - w))),
        "there is no decay after the warm-up": after(lambda s, S, w: 1),
        "the decay is linear, not a cosine": curve(lambda done: 1 - done),
        "1 + cos is between 0 and 2: half of it": curve(lambda done: 2 * cosine(done)),
        "it is only a quarter of a cosine's period: it needs π and 1 + cos":
            curve(lambda done: math.cos(math.pi / 2 * done)),
        "the cosine rises: is it 1 - cos?": curve(lambda done: 1 - cosine(done)),
        "π is missing": curve(lambda done: cosine(done / math.pi)),
        "1 + is missing": curve(lambda done: math.cos(math.pi * done)),
        "the peak is missing in the cosine":
            lambda s, S, peak, w: rate(s, S, peak if s <= w else 1, w),
        "the peak is missing": lambda s, S, peak, w: rate(s, S, 1.0, w),
    }  # fmt: skip


@CHECKS.add("pieces", "learning_rate")
def learning_rate(m: ModuleType, draw: Draw) -> None:
    w = draw.integer(3, 6)
    cases = [
        (s, *case)
        for case in ((2, 0.5, 0), (4, 0.5, 2), (7, 0.25, 3), (6, 2.0, 0),
                     (w + draw.integer(5, 9), draw.integer(1, 9) / 16, w),
                     (1, 0.5, 0), (1, 0.5, 1), (3, 0.5, 3))
        for s in range(1, case[0] + 1)
    ]  # fmt: skip
    texts = ["step {}, steps {}, peak {}, warmup {}".format(*case) for case in cases]
    found, error = [], None
    for case in cases:
        try:
            found.append(m.learning_rate(*case))
        except ArithmeticError as raised:
            error = raised
            break
        ensure(isinstance(found[-1], int | float),
               f"the rate must be a number, got {type(found[-1]).__name__}")  # fmt: skip
    n = len(found)
    guesses = {k: [wrong(*c) for c in cases[:n]] for k, wrong in wrong_rates().items()}
    expected = [rate(*case) for case in cases[:n]]
    first_difference("the learning rate", texts[:n], found, expected, guesses)
    ensure(error is None, f"{type(error).__name__}: {error} ({texts[min(n, len(texts) - 1)]})")


class Toy(nn.Module):
    """Logits from each token, and from the mean of all that the mask shows. It logs its calls."""

    def __init__(self, draw: Draw, v: int = 9, d: int = 3):
        super().__init__()
        self.table, self.head = nn.Parameter(draw.normal(v, d)), nn.Parameter(draw.normal(d, v))
        self.bias = nn.Parameter(draw.normal(v), requires_grad=False)
        self.inputs, self.modes = [], []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels=None):
        self.inputs.append((input_ids, attention_mask))
        self.modes.append(self.training)
        shown = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.table[input_ids]  # (b, t, d)
        mean = (x * shown[..., None]).sum(1, keepdim=True) / shown.sum(1)[:, None, None]
        return SimpleNamespace(logits=(x + mean) @ self.head + self.bias)

    def trained(self) -> list[nn.Parameter]:
        return [self.table, self.head]

    def vector(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.trained()])


Step = list[dict[str, Tensor]]  # the micro-batches of a step


def step_of(draw: Draw, *sizes: int) -> Step:
    """Micro-batches with so many examples, of unequal length; a prompt may be empty."""
    step = []
    for size in sizes:
        prompts = [draw.integer(0, 3) if i else 2 * (len(step) == 0) for i in range(size)]
        pairs = [(draw.tokens(9, p).tolist(), draw.tokens(9, draw.integer(1, 3)).tolist() + [END])
                 for p in prompts]  # fmt: skip
        step.append(batch_of(pairs, END))
    return step


def nlls(model: Toy, step: Step) -> list[Tensor]:
    """The micro-batches' losses of all labels."""
    return [nll(model(b["input_ids"], b["attention_mask"]).logits, b["labels"]) for b in step]


def gradient(model: Toy, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.trained())])


def clipped(g: Tensor, norm: float) -> Tensor:
    return g * min(1.0, norm / (g.norm().item() + 1e-6))


def by_mistake(model: Toy, step: Step, norm: float) -> dict[str, Tensor]:
    """Gradients at the time of the step. The right one is under ""."""
    parts = nlls(model, step)
    n, sums = sum(map(len, parts)), [gradient(model, part.sum()) for part in parts]
    g = torch.stack(sums).sum(0) / n
    means = torch.stack([s / len(part) for s, part in zip(sums, parts, strict=True)])
    labels = [batch["labels"] for batch in step]
    accumulated = torch.zeros_like(g)
    for s in sums:
        accumulated = clipped(accumulated + s / n, norm)
    each = [x.norm() for x in g.split([p.numel() for p in model.trained()])]
    pieces = zip(g.split([p.numel() for p in model.trained()]), each, strict=True)
    found = {
        "": g,
        "each micro-batch's mean counts the same: divide by the labelled tokens of the whole step":
            means.mean(0),
        "the means of the micro-batches are added: divide by the labelled tokens of the whole step":
            means.sum(0),
        "the loss is not divided by the number of labelled tokens": g * n,
        "only the last micro-batch counts: does zero_grad() come between micro-batches?":
            sums[-1] / n,
        "only the first micro-batch counts": sums[0] / n,
        "the labels of the first position count in n, and nothing predicts them":
            g * n / sum((x != -100).sum() for x in labels),
        "n counts all tokens: only those with a label count":
            g * n / sum(b["attention_mask"].sum() for b in step),
        "n counts the prompt and the padding too": g * n / sum(x.numel() for x in labels),
        "n counts the prompt and the padding too, without the first column":
            g * n / sum(x[:, 1:].numel() for x in labels),
        "n must be the number of labelled tokens, not of micro-batches": g * n / len(step),
        "it is divided by the number of micro-batches once more": g / len(step),
        "n must be the number of labelled tokens, not of examples": g * n / sum(map(len, labels)),
    }  # fmt: skip
    return {mistake: clipped(v, norm) for mistake, v in found.items()} | {
        "the gradient is not clipped": g,
        "each entry is clipped, not the norm of the whole gradient": g.clamp(-norm, norm),
        "it is clipped per micro-batch: clip once, after the last backward()": accumulated,
        "the micro-batches are clipped one by one: clip once, after the last backward()":
            torch.stack([clipped(s / n, norm) for s in sums]).sum(0),
        "each parameter is clipped by itself, and not all together":
            torch.cat([x * min(1.0, norm / y.item()) for x, y in pieces]),
        "a gradient below max_norm must stay as it is": g * norm / g.norm(),
        "max_norm is not used: it is clipped to 1": clipped(g, 1.0),
        "the gradient is the opposite one": -clipped(g, norm),
    }  # fmt: skip


def logged(optimizer, model: Toy) -> list[str]:
    """A list to which backward() and step() are added, when they are called."""
    log = []
    for p in model.trained():
        p.register_hook(lambda g: log.append("backward") if log[-1:] != ["backward"] else None)
    optimizer.register_step_pre_hook(lambda *_: log.append("step"))
    optimizer.register_step_pre_hook(
        lambda *_: log.append("empty") if all(p.grad is None or not p.grad.any()
                                              for p in model.trained()) else None
    )  # fmt: skip
    return log


def in_order(log: list[str], model: Toy, step: Step) -> None:
    """Raise Wrong unless backward() comes before step(), and nothing is lost between them."""
    steps = log.count("step")
    ensure("step" in log, "optimizer.step() is not called")
    ensure(steps == 1, f"optimizer.step() is called {steps} times for {len(step)} micro-batches: "
           "once per step, after the last backward()")  # fmt: skip
    ensure("backward" in log, "backward() is not called")
    ensure(log.index("step") > log.index("backward"), "optimizer.step() comes before backward()")
    ensure("empty" not in log, "there is no gradient any more when optimizer.step() is called: "
           "does zero_grad() come between backward() and step()?")  # fmt: skip
    for ids, mask in model.inputs:
        batch = next((b for b in step if torch.equal(b["input_ids"], ids)), None)
        ensure(batch, "the model does not get the input_ids of a micro-batch")
        ensure(mask is not None, "the model is called without the attention_mask")
        ensure(torch.equal(mask.long(), batch["attention_mask"]),
               "the model must get the batch's attention_mask")  # fmt: skip


@CHECKS.add("pieces", "training_step")
def training_step(m: ModuleType, draw: Draw) -> None:
    texts, changes, gradients, guesses, losses = [], [], [], [], []
    for sizes, norm in (
        ((1,), 50.0), ((2,), 50.0), ((1, 3), 50.0), ((3, 1, 2), 50.0), ((2,), 0.2),
        ((3, 1, 2), 0.2), ((2, 3), 0.05), ((2,), None),
    ):  # fmt: skip
        model, step = Toy(draw).train(), step_of(draw, *sizes)
        if norm is None:  # the default, and a gradient that is larger
            model.head.data *= 6
        twin, start, bias = copy.deepcopy(model), model.vector(), model.bias.clone()
        optimizer = torch.optim.SGD(model.trained(), lr=0.5)
        log, before = logged(optimizer, model), copy.deepcopy(step)
        options = {} if norm is None else {"max_norm": norm}
        found = m.training_step(model, optimizer, step, **options)
        text = f"{len(sizes)} micro-batches, max_norm {norm or 1.0:g}"
        in_order(log, model, before)
        for batch, copied in zip(step, before, strict=True):
            for name, tensor in copied.items():
                unchanged(f'batch["{name}"]', tensor, batch[name])
        unchanged("a frozen parameter", bias, model.bias)
        texts.append(text)
        changes.append(-2 * (model.vector() - start))
        wrong = by_mistake(twin, step, norm or 1.0)
        gradients.append(wrong.pop(""))
        guesses.append(wrong)
        losses.append((text, found, *losses_of(twin, model, step)))
    compare("the gradient at optimizer.step()", texts, changes, gradients, guesses, 1e-3)
    compare_returned(losses)
    _twice(m, draw)


def losses_of(before: Toy, after: Toy, step: Step) -> tuple[float, dict[str, float]]:
    """The loss (1), and wrong ones."""
    with torch.no_grad():
        parts, later = nlls(before, step), nlls(after, step)
    n = sum(map(len, parts))
    means, total = [p.mean().item() for p in parts], sum(p.sum().item() for p in parts)
    return total / n, {
        "it is the loss after the update": sum(p.sum().item() for p in later) / n,
        "each micro-batch's mean counts the same": sum(means) / len(means),
        "the means of the micro-batches are added": sum(means),
        "it is not divided by the number of labelled tokens": total,
        "it is the loss of the last micro-batch alone": means[-1],
        "it is the share of the last micro-batch alone": parts[-1].sum().item() / n,
        "it is divided by the number of micro-batches once more": total / n / len(parts),
    }


def compare_returned(losses: list[tuple]) -> None:
    """Compare what training_step returned."""
    texts, found, expected, wrong = zip(*losses, strict=True)
    for value in found:
        number("training_step must return", value)
    guesses = {name: [w[name] for w in wrong] for name in wrong[0]}
    first_difference("the returned loss", texts, found, expected, guesses, 1e-4)


def number(what: str, value) -> None:
    graph = isinstance(value, Tensor) and value.requires_grad
    why = ": it keeps the whole graph in memory" if graph else ""
    ensure(isinstance(value, float), f"{what} a float, got {type(value).__name__}{why}")


def _twice(m: ModuleType, draw: Draw) -> None:
    """A second step must not see the gradients of the first one."""
    model, steps = Toy(draw), [step_of(draw, 2), step_of(draw, 2, 1)]
    optimizer = torch.optim.SGD(model.trained(), lr=0.5)
    first = by_mistake(model, steps[0], 50.0)[""]
    m.training_step(model, optimizer, steps[0], 50.0)
    start, second = model.vector(), by_mistake(model, steps[1], 50.0)[""]
    m.training_step(model, optimizer, steps[1], 50.0)
    guesses = {"the first step's gradient is still in it: zero_grad() is missing": first + second}
    same("the gradient of the second step", -2 * (model.vector() - start), second, 1e-3, guesses)


@contextmanager
def watched() -> Iterator[list]:
    """Optimizers and their learning rates, at each call of step()."""
    seen = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append(
            (optimizer, [float(group["lr"]) for group in optimizer.param_groups])
        )
    )
    try:
        yield seen
    finally:
        handle.remove()


def endless(steps: list[Step]) -> Iterator[Step]:
    """The steps, and some more."""
    yield from steps
    yield steps[0]
    raise Wrong(f"train takes more than n = {len(steps)} steps")


def simulated(
    model: Toy, steps: list[Step], rates: list[float], decay: float = 0.0, kind: str = "Adam",
    norm: float = 1.0,
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """The change of the parameters, and the losses, in float64."""
    model = copy.deepcopy(model).double()
    start, losses = model.vector(), []
    first = second = torch.zeros_like(start)
    for s, (step, lr) in enumerate(zip(steps, rates, strict=True), 1):
        loss = torch.cat(nlls(model, step)).mean()
        g, at = clipped(gradient(model, loss), norm), model.vector()
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        by = first / (1 - 0.9**s) / ((second / (1 - 0.999**s)).sqrt() + 1e-8)
        by = g if kind == "SGD" else by
        nn.utils.vector_to_parameters(at - lr * (by + decay * at), model.trained())
        losses.append(loss.item())
    return model.vector() - start, losses


@CHECKS.add("pieces", "train")
def train(m: ModuleType, draw: Draw) -> None:
    for n, w in ((3, 1), (2, 0), (1, 0), (1, 1), (6, 2), (draw.integer(5, 8), 0)):
        model, peak = Toy(draw), draw.integer(2, 9) / 64
        model.head.data *= 4  # the gradients must be clipped
        twin, bias = copy.deepcopy(model), model.bias.clone()
        steps = [step_of(draw, 2, 1) for _ in range(n)]
        text = f"{n} steps, peak {peak:g}, {w} of warm-up"
        with watched() as seen:
            found = m.train(model.eval(), endless(steps), n, peak, w)
        ensure(isinstance(found, list), f"train must return a list, got {type(found).__name__}")
        ensure(len(found) == n, f"train must return n = {n} losses, got {len(found)}")
        for value in found:
            number("each loss must be", value)
        rates = [rate(s, n, peak, w) for s in range(1, n + 1)]
        compare_rates([lr for _, lr in seen], rates, text)
        number_of = len({id(optimizer) for optimizer, _ in seen})
        ensure(number_of == 1, f"{number_of} optimizers are used: a new one has lost AdamW's state")
        given = {id(p) for o, _ in seen for group in o.param_groups for p in group["params"]}
        ensure(id(model.bias) not in given, "a frozen parameter is given to the optimizer: only "
               "those that require a gradient belong there")  # fmt: skip
        ensure(given == {id(p) for p in model.trained()},
               "the optimizer must get all parameters that require a gradient")  # fmt: skip
        ensure(
            all(model.modes), "the model is trained in evaluation mode: model.train() is missing"
        )
        unchanged("a frozen parameter", bias, model.bias)
        after = [0.001, *rates[:-1]]
        guesses = {
            "AdamW's weight decay is left at 0.01": simulated(twin, steps, rates, 0.01),
            "it is SGD, not AdamW": simulated(twin, steps, rates, kind="SGD"),
            "the learning rate is set after the step": simulated(twin, steps, after),
            "the gradient is not clipped": simulated(twin, steps, rates, norm=1e9),
        }
        expected, losses = simulated(twin, steps, rates)
        same("the change of the parameters", (model.vector() - twin.vector()).double(), expected,
             2e-3, guesses={k: v[0] for k, v in guesses.items()}, case=text)  # fmt: skip
        texts = [f"step {s} of {text}" for s in range(1, n + 1)]
        first_difference("a loss", texts, found, losses, {}, 1e-3)


def compare_rates(found: list[list[float]], expected: list[float], text: str) -> None:
    """Compare the learning rates that the optimizer had at each step."""
    ensure(found, "no optimizer of torch.optim is used")
    n, rates = len(expected), [group[0] for group in found]
    ensure(len(found) == n, f"optimizer.step() is called {len(found)} times in n = {n} steps")

    def close(a: float, b: float) -> bool:
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9)

    mistake = ""
    if n > 1 and all(close(lr, rates[0]) for lr in rates):
        mistake = ": it is the same in all steps"
    elif n > 1 and all(map(close, rates[1:], expected)) and close(rates[0], 0.001):
        mistake = ": it is set after the step, and must be set before"
    elif n > 1 and all(map(close, rates[1:], expected)) and rates[0] == 0:
        mistake = ": it is one step behind, and steps count from 1"
    for s, group in enumerate(found):
        for lr in group:
            ensure(close(lr, expected[s]), f"the learning rate of step {s + 1} is {lr:.5g}, "
                   f"expected {expected[s]:.5g}{mistake} ({text})")  # fmt: skip


@CHECKS.add("layer", "micro-batches give the same as one batch")
def micro_batches(m: ModuleType, draw: Draw) -> None:
    pairs = [
        (rows_of(draw, p)[0], [*rows_of(draw, c)[0], END]) for p, c in ((3, 1), (1, 5), (2, 2))
    ]
    pairs = [([t % 9 for t in p], [t % 9 for t in c]) for p, c in pairs]
    model = Toy(draw)
    found = []
    for parts in ([pairs], [pairs[:1], pairs[1:]], [[pair] for pair in pairs]):
        net = copy.deepcopy(model)
        losses = m.train(net, [[m.collate(part, END) for part in parts]] * 5, 5, 0.05, 1)
        found.append((torch.tensor(losses), net.vector()))
    for losses, vector in found[1:]:
        same("the losses with micro-batches", losses, found[0][0], 1e-4)
        same("the parameters after training with micro-batches", vector, found[0][1], 1e-3)


@CHECKS.add("layer", "frozen parameters: no change and no state")
def frozen(m: ModuleType, draw: Draw) -> None:
    model, steps = Toy(draw), [step_of(draw, 2) for _ in range(3)]
    model.table.requires_grad_(False)
    table, bias, head = (p.detach().clone() for p in (model.table, model.bias, model.head))
    with watched() as seen:
        m.train(model, steps, 3, 0.05, 1)
    unchanged("a frozen parameter", table, model.table)
    unchanged("a frozen parameter", bias, model.bias)
    ensure(not torch.equal(head, model.head), "the trainable parameter has not changed")
    ensure(seen, "no optimizer of torch.optim is used")
    states = [id(p) for optimizer, _ in seen for p in optimizer.state]
    ensure(set(states) == {id(model.head)}, "the optimizer has a state for a frozen parameter")
    ensure(model.table.grad is None, "a frozen parameter has a gradient")


@CHECKS.add("layer", "the learning rate rises, then falls to zero")
def schedule(m: ModuleType, draw: Draw) -> None:
    n, w = draw.integer(20, 40), draw.integer(4, 8)
    rates = [m.learning_rate(s, n, 0.5, w) for s in range(1, n + 2)]
    ensure(max(rates) == rates[w - 1], f"the peak must be at step w = {w}")
    falling = all(a > b for a, b in zip(rates[w:], rates[w + 1 :], strict=False))
    ensure(falling, "after the warm-up, the learning rate must fall with each step")
    ensure(abs(rates[n]) < 1e-6, f"after the last step it must be zero, and it is {rates[n]:.4g}")
    model, steps = Toy(draw), [step_of(draw, 1)] * n
    with watched() as seen:
        m.train(model, steps, n, 0.5, w)
    compare_rates([lr for _, lr in seen], rates[:n], f"{n} steps, {w} of warm-up")


@CHECKS.add("layer", "losses are those before the update")
def before_update(m: ModuleType, draw: Draw) -> None:
    model, steps = Toy(draw), [step_of(draw, 2, 1)] * 2
    expected = torch.cat(nlls(model, steps[0])).mean().item()
    first, second = m.train(model, steps, 2, 0.05, 0)
    text = f"the first loss is {first:.4f}, but the untrained model has {expected:.4f}"
    ensure(abs(first - expected) < 1e-4, text)
    ensure(second < first, f"the same batch again has the loss {second:.4f}, after {first:.4f}")


@CHECKS.add("layer", "learns which token follows")
def learns(m: ModuleType, draw: Draw) -> None:
    first, second, third = draw.random.sample(range(1, 9), 3)
    model = Toy(draw)
    batch = m.collate([([first], [second, third, END]), ([second], [third, END])], END)
    losses = m.train(model, [[batch]] * 150, 150, 0.1, 10)
    ensure(losses[-1] < 0.05, f"the loss fell from {losses[0]:.2f} to {losses[-1]:.2f} only")


@CHECKS.add("values", "the loss of transformers")
def transformers_loss(m: ModuleType, draw: Draw) -> None:
    logits, labels = torch.tensor(values["logits"]), torch.tensor(values["labels"])
    same(
        "summed_loss / n", m.summed_loss(logits, labels) / values["n"], torch.tensor(values["loss"])
    )


@CHECKS.add("values", "the cosine of transformers' schedule")
def transformers_schedule(m: ModuleType, draw: Draw) -> None:
    s, n, peak, w = (values[name] for name in ("first_step", "steps", "peak", "warmup"))
    found = [m.learning_rate(step, n, peak, w) for step in range(s, n + 1)]
    same(f"the learning rates from step {s} on", torch.tensor(found), torch.tensor(values["rates"]))


@CHECKS.add("losses", "the first ten losses on describe")
def ten_losses(m: ModuleType, draw: Draw) -> None:
    model, pairs, end = task
    found = []
    for module in (reference, m):
        steps = [[module.collate(step[:3], end), module.collate(step[3:], end)] for step in pairs]
        found.append(module.train(copy.deepcopy(model), steps, STEPS, 0.003, 2))
    if found[0][0] - found[0][-1] < 0.05:
        raise Wrong(f"the reference did not learn: {show(torch.tensor(found[0]))}")  # see the tests
    compare_losses(found[1], found[0])
