"""Lesson 00: a small GPT."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Wrong, answered, call, compare, ensure, exercise, expect, has_shape, named, show


@exercise(
    "00.matmul",
    "x @ w multiplies the last dimension of x with the first one of w. Which dimensions are left?",
    "Each vector of 16 numbers in x becomes a vector of 48. How many vectors are there in x?",
)
def matmul(shape, draw):
    mistakes = {
        (2, 5, 16, 48): "The dimension of 16 is summed over, so it is gone.",
        (5, 48): "The first dimension of x is kept: each part of the batch is multiplied by w.",
        (10, 48): "No dimensions are joined: the first two of x stay as they are.",
        (2, 48, 5): "The last dimension is the new one.",
        (2, 5, 16): "That is the shape of x.",
        (16, 48): "That is the shape of w.",
    }
    answered(shape, (2, 5, 48), mistakes, "Write three numbers, such as (2, 5, 16).")


@exercise(
    "00.softmax",
    "dim=-1 is the last dimension: softmax looks at each row of 4 numbers by itself.",
    "The numbers of each row sum to 1. How many rows are there?",
)
def softmax(total, draw):
    mistakes = {
        1: "Each row sums to 1, and there are several rows.",
        4: "dim=-1 normalizes the rows, of 4 numbers each. How many rows are there?",
        12: "That is how many numbers there are.",
        0: "Softmax gives positive numbers.",
    }
    answered(total, 3, mistakes, "What is the sum of one row after softmax?")


@exercise(
    "00.to_text",
    "You need the dictionary in the other direction: from id to token.",
    'Join the tokens with "".join(…), and then replace "Ġ" by " ".',
)
def to_text(to_text, draw):
    pieces = ["The", "Ġnames", ":", "ĠAda", "ĠBell", ",", "la", "ra", "Ġa", "a", "C", "Ġlost", "."]
    for n in (8, 1, 20, 0, 5):
        order = draw.random.sample(range(2048), len(pieces))
        vocabulary = dict(zip(draw.random.sample(pieces, len(pieces)), order, strict=True))
        tokens = draw.random.choices(pieces, k=n)
        if n == 5:  # at the start, a space stays a space
            tokens[:2] = ["ĠAda", "a"]
        ids, before = [vocabulary[token] for token in tokens], dict(vocabulary)
        got = call(to_text, list(ids), vocabulary)
        ensure(vocabulary == before, "to_text changes the vocabulary: work on a copy")
        ensure(isinstance(got, str), f"to_text must return a text, got {show(got)}")
        text = "".join(tokens).replace("Ġ", " ")
        mistakes = {
            "the sign Ġ must become a space": "".join(tokens),
            "there is a space after every token, not only where Ġ was": " ".join(tokens),
            "there is a space between all tokens": " ".join(tokens).replace("Ġ", ""),
            "too many spaces: join the tokens without one": " ".join(tokens).replace("Ġ", " "),
            "spaces are missing": "".join(tokens).replace("Ġ", ""),
            "the space at the start is missing": text.strip(),
        }
        if got != text:
            likely = [f"\n  likely    {why}" for why, value in mistakes.items() if got == value]
            raise Wrong(
                f"to_text(…)\n  input     ids of {tokens}\n  got       {got!r}\n"
                f"  expected  {text!r}" + "".join(likely[:1])
            )


@exercise(
    "00.nats",
    "The loss is -log p, with the natural logarithm. How large is p in each case?",
    "p is 1/2048 and 1/24. In Python, the natural logarithm is math.log.",
)
def nats(nothing, a_name, draw):
    for what, got, n in (("nothing", nothing, 2048), ("a_name", a_name, 24)):
        mistakes = {
            math.log2(n): "That is in bits. A nat uses the natural logarithm, math.log.",
            math.log10(n): "That uses the logarithm to base 10. Use math.log.",
            -math.log(n): "The loss is MINUS the logarithm of p, so it is positive.",
            1 / n: "That is the probability p. The loss is -log p.",
            n: "That is the perplexity. The loss is its logarithm.",
            math.log(2048) - math.log(24): "That is what the knowledge gains. What loss is left?",
        }
        if isinstance(got, float) and round(got, 1) == round(math.log(n), 1):
            continue  # rounded
        try:
            answered(got, math.log(n), mistakes, "The loss is -log p. How large is p?")
        except Wrong as wrong:
            raise Wrong(f"{what} = {wrong}") from None


@exercise(
    "00.perplexity",
    "First compute the loss: the mean of -log(1/2) and -log(1/8). Then take e to that power.",
    "log 2 and log 8 are 1 · log 2 and 3 · log 2. Their mean is 2 · log 2.",
)
def perplexity(perplexity, draw):
    mistakes = {
        5: "That is the mean of 2 and 8. First take logarithms, then the mean.",
        3.2: "That uses the mean of the probabilities. First take logarithms.",
        16: "That is e to the sum. The loss is the mean.",
        math.log(4): "That is the loss in nats. Perplexity is e to that power.",
        2: "That is the loss in bits. Perplexity is 2 to that power.",
        math.log(16): "That is the sum of the losses. Take the mean, then e to that power.",
        0.25: "That is e to minus the loss.",
        8: "That is the perplexity of the second label only.",
    }
    answered(perplexity, 4, mistakes, "The perplexity is e to the power of the mean loss.")


@exercise(
    "00.my_loss",
    "The logits of position t belong to the label ids[:, t + 1]. Which position has no label?",
    "Use logits[:, :-1] and ids[:, 1:]. F.cross_entropy wants (n, v) and (n): flatten both.",
)
def my_loss(my_loss, draw):
    for b, t, v in ((2, 5, 7), (1, 2, 3), (3, 9, 4)):
        logits, ids = 2 * draw.normal(b, t, v), draw.tokens(v, b, t)
        expected = _loss(logits[:, :-1], ids[:, 1:])
        got = call(my_loss, logits, ids)
        ensure(
            not isinstance(got, Tensor) or got.numel() == 1,
            f"my_loss must return one number, got {show(got)}: take the mean",
        )
        got = got.item() if isinstance(got, Tensor) else got
        mistakes = {
            "the labels are not shifted": _loss(logits, ids),
            "shifted in the wrong direction": _loss(logits[:, 1:], ids[:, :-1]),
            "the first position is compared with itself": _loss(logits[:, :-1], ids[:, :-1]),
            "shift each text before flattening: here the end of one text must predict the start "
            "of the next": _loss(logits.flatten(0, 1)[None, :-1], ids.flatten()[1:]),
            "the last position has no label: leave it out": _loss(logits, ids.roll(-1, 1)),
            "that is the sum, not the mean": expected * b * (t - 1),
            "the sum is divided by t, but there are only t - 1 labels": expected * (t - 1) / t,
            "that is the sum over each text": expected * (t - 1),
            "that is in bits, not in nats": expected / math.log(2),
            "that is the perplexity": math.exp(expected),
            "the sign is wrong": -expected,
        }
        inputs = f"logits ({b}×{t}×{v}), ids ({b}×{t})"
        compare("my_loss(…)", got, expected, inputs, mistakes, tolerance=1e-4)


def _loss(logits: Tensor, labels: Tensor) -> float:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


@exercise(
    "00.mlp",
    "A linear layer with a bias has in · out + out parameters.",
    "c_fc maps 128 numbers to 512, and c_proj maps 512 to 128. Add both.",
)
def mlp(mlp, draw):
    mistakes = {
        2 * 128 * 512: "The biases are missing.",
        128 * 512 + 512: "That is the first layer only.",
        512 * 128 + 128: "That is the second layer only.",
        2 * (128 * 512 + 512): "The bias of the second layer has 128 numbers.",
        2 * (128 * 512 + 128): "The bias of the first layer has 512 numbers.",
        128 * 512: "That is one weight matrix.",
        526_848: "That is the sum of all four blocks.",
        2 * 128 * 128: "The middle has 512 numbers.",
    }
    answered(mlp, 131_712, mistakes, "in · out + out for each of the two layers.")


@exercise(
    "00.attention",
    "The scores are q @ k.transpose(-2, -1), divided by the square root of the length of a key.",
    "torch.ones(t, t, dtype=torch.bool).triu(1) is True ahead. Fill -inf in there, then softmax.",
)
def attention(attention_weights, draw):
    for h, t, k in ((2, 5, 4), (1, 1, 3), (3, 4, 9), (4, 7, 1)):
        q, keys = 2 * draw.normal(h, t, k), 2 * draw.normal(h, t, k)
        inputs = f"q and k ({h}×{t}×{k})"
        got = call(attention_weights, q, keys)
        has_shape("attention_weights(…)", got, (h, t, t), inputs)
        ensure(
            not got[:, 0].isnan().any() or got[:, -1].isnan().any(),
            f"attention_weights(…)[0, 0]\n  input     {inputs}\n  got       {show(got[0, 0])}\n"
            "  likely    the diagonal is masked too: a position may look at itself",
        )
        _compare_weights(got, _attention(q, keys), inputs, _slips(q, keys))
        if t > 1:
            q.requires_grad_()
            keys.requires_grad_()
            got = call(attention_weights, q, keys)
            ensure(got.requires_grad, "the weights do not depend on q and k: was one detached?")
            (got * draw.normal(h, t, t)).sum().backward()
            for name, tensor in (("q", q), ("k", keys)):
                ensure(
                    tensor.grad is not None and bool(tensor.grad.any()),
                    f"{name} gets no gradient: was it detached, or turned into numbers?",
                )


def _compare_weights(got: Tensor, expected: Tensor, inputs: str, slips: dict) -> None:
    """Raise Wrong, and show the row that differs most: the first row is nearly always right."""
    try:
        compare("attention_weights(…)", got, expected, inputs, slips)
    except Wrong as wrong:
        apart = (got - expected).detach().double().nan_to_num(9, 9, -9).abs().amax(-1)
        head, row = divmod(int(apart.argmax()), apart.shape[1])
        where = f"attention_weights(…)[{head}, {row}]"
        lines = str(wrong).split("\n  ")
        lines[0] = where
        for i, line in enumerate(lines):
            for key, value in (("got ", got), ("expected ", expected)):
                if line.startswith(key):
                    lines[i] = f"{key:10}{show(value[head, row])}"
        raise Wrong("\n  ".join(lines)) from None


def _attention(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
    return scores.masked_fill(_ahead(q), -torch.inf).softmax(-1)


def _ahead(q: Tensor) -> Tensor:
    return torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)


def _slips(q: Tensor, k: Tensor) -> dict[str, Tensor]:
    """The results of likely mistakes."""
    plain, ahead = q @ k.transpose(1, 2), _ahead(q)
    root = math.sqrt(q.shape[2])
    masked = (plain / root).masked_fill(ahead, -torch.inf)
    return {
        "there is no mask: positions look ahead": (plain / root).softmax(-1),
        "masked after softmax, so rows do not sum to 1": (plain / root).softmax(-1).tril(),
        "the division by the square root of the key's length is missing": plain.masked_fill(
            ahead, -torch.inf
        ).softmax(-1),
        "divided by the length of a key, not by its square root": (plain / root**2)
        .masked_fill(ahead, -torch.inf)
        .softmax(-1),
        "divided by the root of the number of positions": (plain / math.sqrt(q.shape[1]))
        .masked_fill(ahead, -torch.inf)
        .softmax(-1),
        "the mask is 0, and must be -inf: 0 is a score like others": (plain / root)
        .tril()
        .softmax(-1),
        "softmax along the wrong dimension: rows must sum to 1": masked.softmax(1),
        "q and k are exchanged": (plain.mT / root).masked_fill(ahead, -torch.inf).softmax(-1),
        "the mask is transposed: positions look only ahead": (plain / root)
        .masked_fill(ahead.T, -torch.inf)
        .softmax(-1),
        "softmax is missing": masked,
    }


@exercise(
    "00.looks_back",
    "Row i says where position i looks. You need the entries weights[:, i, i - 1], for i from 1.",
    "weights.diagonal(-1, dim1=1, dim2=2) has these entries: (h, t - 1). Take their mean.",
)
def looks_back(looks_back, draw):
    for h, t in ((2, 5), (1, 2), (4, 9), (3, 3)):
        weights = _attention(3 * draw.normal(h, t, 6), draw.normal(h, t, 6))
        before = weights.diagonal(-1, dim1=1, dim2=2)  # (h, t - 1)
        hits = (weights.argmax(-1)[:, 1:] == torch.arange(t - 1)).float().mean(-1)
        mistakes = {
            "that is the weight on the position itself": weights.diagonal(dim1=1, dim2=2).mean(-1),
            "that is the position ahead: rows look, and columns are looked at": torch.zeros(h),
            "divide by t - 1: the first position has none before it": before.sum(-1) / t,
            "that is the sum, not the mean": before.sum(-1),
            "that is the median, not the mean": before.median(-1).values,
            "that is how often the weight is the largest one, not the mean weight": hits,
            "that is the mean over all heads": before.mean().expand(h),
        }
        got = call(looks_back, weights)
        try:
            got = got.detach() if isinstance(got, Tensor) else list(got)
            got = torch.as_tensor([float(x) for x in got])
        except (TypeError, ValueError, RuntimeError):
            raise Wrong(f"looks_back must return one number per head, got {show(got)}") from None
        inputs = f"weights ({h}×{t}×{t})"
        has_shape("looks_back(…)", got, (h,), inputs)
        compare("looks_back(…)", got, before.mean(-1), inputs, mistakes)


@exercise(
    "00.follow",
    "Try long sequences first: for length in range(len(tokens) - 1, 0, -1). Where does "
    "tokens[-length:] occur earlier?",
    "For each length, let start go down from len(tokens) - length - 1 to 0. If "
    "tokens[start : start + length] is the sequence, the answer is tokens[start + length].",
)
def follow(follow, draw):
    _follow(follow, [1, 2, 3, 1], done=True)
    fixed = [
        [1, 2, 3], [1, 2, 5, 3, 2, 6, 1, 2], [1, 2, 1, 3, 1], [], [7], [7, 7], [7, 7, 7],
        [1, 2, 1, 2, 1], [0, 5, 0], [1, 1, 1, 5, 1, 1, 1, 1],
    ]  # fmt: skip
    for tokens in fixed:
        _follow(follow, tokens)
    for _ in range(60):
        _follow(follow, draw.random.choices(range(draw.integer(1, 5)), k=draw.integer(2, 14)))
    for n in range(3, 10):  # a sequence of n tokens, and later ones that are a token shorter
        run = draw.random.sample(range(1000, 2000), n)
        shorter = [1, *run[1:], 2, 3, *run[1:], 4, *run[2:], 5]
        _follow(follow, [*run, 9, *shorter, *run])


def _follow(follow, tokens: list[int], done: bool = False) -> None:
    kept = list(tokens)
    given = list(tokens)
    mistakes = {
        "the LONGEST sequence counts": _next_after(tokens, 1),
        "sequences may be longer than two tokens": _next_after(tokens, 2),
        "sequences may be longer than three tokens": _next_after(tokens, 3),
        "the two occurrences may overlap": _next_after(tokens, len(tokens), overlap=False),
        "of several places, the LATEST counts": _next_after(tokens, len(tokens), first=True),
        "the end of the list has found itself": tokens[-1] if tokens else None,
    }
    right = _next_after(tokens, len(tokens))
    mistakes = {why: value for why, value in mistakes.items() if value != right}
    if right is None:
        mistakes["if even the last token is new, return None"] = -1
    expect(follow, (given,), right, mistakes, may_be_none=not done)
    ensure(given == kept, f"{named(follow)} changes its input {kept}: work on a copy")


def _next_after(
    tokens: list[int], longest: int, first: bool = False, overlap: bool = True
) -> int | None:
    """What followed the longest sequence at the end that also occurs earlier."""
    for length in range(min(longest, len(tokens) - 1), 0, -1):
        starts = range(len(tokens) - length * (1 if overlap else 2) + (not overlap))
        for start in starts if first else reversed(starts):
            if tokens[start : start + length] == tokens[-length:]:
                return tokens[start + length]
    return None
