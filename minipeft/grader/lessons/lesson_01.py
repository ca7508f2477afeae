"""Lesson 01: full fine-tuning."""

import itertools
import math
import statistics

import torch.nn.functional as F

from . import answered, call, compare, ensure, exercise, expect


@exercise(
    "01.target",
    "Is the model asked for the token that it has just read, or for another one?",
    "The output at position i predicts the token at position i + 1.",
)
def target(target, draw):
    mistakes = {
        9: "That is the token at position 1: the model has just read it.",
        5: "That is the token before. A model predicts what comes next.",
        7: "That is two positions further.",
        1: "Give the token, not its position.",
    }
    answered(target, 2, mistakes, "Give one of the four tokens.")


@exercise(
    "01.uniform",
    "The loss of a token is minus the natural logarithm of its probability.",
    "The probability is 1/2048.",
)
def uniform(uniform, draw):
    mistakes = {
        11: "That is in bits: the logarithm to base 2. A nat uses the natural logarithm.",
        2048: "That is the perplexity, the exponential of the loss.",
        -math.log(2048): "The loss is minus the logarithm of the probability, so it is positive.",
        math.log10(2048): "Use the natural logarithm.",
        1 / 2048: "That is the probability.",
    }
    text = "It is minus the natural logarithm of a probability, with at least two decimals."
    answered(uniform, math.log(2048), mistakes, text)


@exercise(
    "01.make_labels",
    "Three parts: the prompt, the completion with its end token, and the padding.",
    "[-100] * len(prompt_ids) + completion_ids + [end], and as many -100 as are missing.",
)
def make_labels(make_labels, draw):
    for n, m, pad in ((3, 2, 4), (1, 1, 0), (5, 7, 1), (4, 0, 2)):
        prompt, completion = draw.tokens(90, n).tolist(), draw.tokens(90, m).tolist()
        right = [-100] * n + completion + [0] + [-100] * pad
        length = len(right)
        mistakes = {
            "the prompt is trained on too": prompt + completion + [0] + [-100] * pad,
            "the end token is missing": [-100] * n + completion + [-100] * (pad + 1),
            "the padding is trained on": [-100] * n + completion + [0] * (pad + 1),
            "the padding is missing": right[: length - pad],
            "the labels are shifted by one: the model does this itself": right[1:] + [-100],
        }
        expect(make_labels, (prompt, completion, 0, length), right, mistakes)


@exercise(
    "01.masked_loss",
    "Compare the output at position i with the label at position i + 1.",
    "logits[:, :-1] and labels[:, 1:]; then keep the positions whose label is not -100.",
)
def masked_loss(masked_loss, draw):
    for b, t, v, n in ((2, 6, 7, 3), (1, 2, 3, 1), (3, 9, 5, 4)):
        logits, labels = draw.normal(b, t, v) * 2, draw.tokens(v, b, t)
        labels[:, :n] = -100
        if t > 6:
            labels[0, -3:] = -100  # padding
            labels[1, 0] = 2  # an example without a prompt
        flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        right = F.cross_entropy(*flat)
        each = F.cross_entropy(*flat, reduction="none")
        mistakes = {
            "the labels are not shifted": F.cross_entropy(
                logits.flatten(0, 1), labels.flatten()
            ),
            "the sum is divided by the number of all positions": each.mean(),
            "it is the sum, not the mean": each.sum(),
            "the shift goes in the wrong direction": F.cross_entropy(
                logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten()
            ),
            "cross_entropy takes logits: do not apply softmax before":
                F.cross_entropy(flat[0].softmax(-1), flat[1]),
            "shift each text by itself: here the last position of a text predicts the next text":
                F.cross_entropy(logits.flatten(0, 1)[:-1], labels.flatten()[1:]),
            "it has the wrong sign": -right,
            "it is the mean of the examples' means": _mean_of_means(each, labels[:, 1:]),
        }  # fmt: skip
        inputs = f"logits ({b}×{t}×{v}), labels {labels.tolist()}"
        got = call(masked_loss, logits, labels)
        compare("masked_loss(…)", float(got), right.item(), inputs,
                {text: value.item() for text, value in mistakes.items()})  # fmt: skip
    logits.requires_grad_()
    got = masked_loss(logits, labels)
    ensure(
        getattr(got, "requires_grad", False),
        "the loss has no gradient: do not use item() or detach()",
    )


def _mean_of_means(each, labels):
    each, keep = each.view_as(labels), labels != -100
    return ((each * keep).sum(1) / keep.sum(1).clamp(min=1)).mean()


@exercise(
    "01.first_move",
    "With m = 0, the first m is (1 - β₁) g. What is m / (1 - β₁)?",
    "The numerator is g, and the denominator is |g|.",
)
def first_move(move_of_5, move_of_5000, draw):
    mistakes = {
        5 / 100: "That is η · g, as plain gradient descent does. AdamW divides by √v.",
        50: "That is η · g, as plain gradient descent does. AdamW divides by √v.",
        1: "You forgot the learning rate η.",
        1 / 1000: "You forgot the corrections 1 - β₁ᵗ and 1 - β₂ᵗ.",
        1 / 500: "Both averages are divided by their correction, 1 - β₁ᵗ and 1 - β₂ᵗ.",
    }
    for move in (move_of_5, move_of_5000):
        ensure(isinstance(move, int | float), f"Give two numbers, got {move!r}")
        answered(abs(move), 1 / 100, mistakes, "Put t = 1 and m = v = 0 into the equations.")
    ensure(move_of_5 * move_of_5000 > 0, "Both gradients are positive: can the signs differ?")


@exercise(
    "01.gigabytes",
    "One billion parameters of one byte take 1 GB.",
    "Billions of parameters times bytes per parameter.",
)
def gigabytes(gigabytes, draw):
    mistakes = {
        14: "Those are the weights only, in bfloat16.",
        28: "Those are four bytes per parameter.",
        56: "Those are eight bytes per parameter: only AdamW's averages.",
        112: "That is 16 bytes per parameter, with a float32 copy of the weights.",
        84e9: "In GB, not in bytes.",
        84 / 1.073741824: "That is in GiB, 2³⁰ bytes. The question asks for 10⁹ bytes.",
    }
    answered(gigabytes, 84, mistakes, "Multiply parameters by bytes per parameter.")


@exercise(
    "01.whole_value",
    "A loss of L nats is a probability of exp(-L) for one token.",
    "Multiply the probabilities of n tokens.",
)
def whole_value(whole_value, draw):
    for loss, n in ((0.5, 3), (0.0, 4), (2.0, 1), (0.13, 2.5)):
        mistakes = {
            "that is the probability of one token": math.exp(-loss),
            "the probability is divided by n": math.exp(-loss) / n,
            "probabilities of tokens are multiplied, so it is a power": n * math.exp(-loss),
            "the sign is wrong": math.exp(loss * n),
            "the loss is in nats: use e and not 2": 2 ** (-loss * n),
            "the loss is divided by n": math.exp(-loss / n),
            "that is the probability that a value is wrong": 1 - math.exp(-loss * n),
            "that is the probability that at least one token is right": (
                1 - (1 - math.exp(-loss)) ** n
            ),
            "a token is right with probability exp(-L), not 1 - L": (1 - loss) ** n,
        }
        expect(whole_value, (loss, n), math.exp(-loss * n), mistakes)


@exercise(
    "01.pick",
    "Find the best point first; then compare its learning rate with all that were tried.",
    "The edges are the smallest and the largest learning rate, in whatever order they come.",
)
def pick(pick, draw):
    def points(rates, losses, order):
        scores = [1 - loss if i else 2.0 for i, loss in enumerate(losses)]
        found = [
            {"learning_rate": rate, "slot_loss": loss, "score": score}
            for rate, loss, score in zip(rates, losses, scores, strict=True)
        ]
        return [found[i] for i in order]

    rates = [2.0**-i for i in range(18 - draw.integer(0, 3), 0, -3)][:5]  # some below 1e-4
    for losses, order, right in (
        ([0.5, 0.4, 0.1, 0.3, 0.6], (0, 1, 2, 3, 4), rates[2]),
        ([0.5, 0.1, 0.4, 0.3, 0.6], (1, 0, 4, 3, 2), rates[1]),
        ([0.5, 0.4, 0.3, 0.2, 0.6], (0, 1, 2, 4, 3), rates[3]),
        ([0.1, 0.4, 0.2, 0.3, 0.6], (2, 0, 1, 3, 4), "edge"),
        ([0.5, 0.4, 0.3, 0.2, 0.1], (0, 4, 1, 3, 2), "edge"),
    ):
        given = points(rates, losses, order)
        best = min(given, key=lambda p: p["slot_loss"])
        mistakes = {
            "that is the whole point, not its learning rate": best,
            "the best rate is at an edge of what was tried": best["learning_rate"],
        }
        if best in (given[0], given[-1]) and right != "edge":
            mistakes[
                "the edges are the smallest and largest rates, not the first and last point"
            ] = "edge"
        expect(pick, (given,), right, {k: v for k, v in mistakes.items() if v != right})


@exercise(
    "01.chance",
    "Split positions, not values: two runs may have the same score.",
    "For each of itertools.combinations(range(len(a) + len(b)), len(a)), compare two means.",
)
def chance(chance, draw):
    for a, b in (
        ([5, 6, 7, 8], [1, 2, 3, 4]), ([1], [2, 3, 4]), ([1, 1], [2, 3]), ([1, 1, 1], [1, 1, 1]),
        ([8.0, 6.5, 9.0], [1.5, 2.0]), ([0.9, 0.7, 0.8], [0.6, 0.75, 0.85, 0.5]),
        ([0.51, 0.502], [0.5, 0.504, 0.503]),
    ):  # fmt: skip
        gaps = [abs(gap) for gap in _gaps(a, b)]
        share = sum(gap >= gaps[0] - 1e-9 for gap in gaps) / len(gaps)
        one_sided = [gap >= _gaps(a, b)[0] - 1e-9 for gap in _gaps(a, b)]
        mistakes = {
            "differences count in both directions: take the absolute value":
                sum(one_sided) / len(gaps),
            "splits that differ exactly as much count too: at least":
                sum(gap > gaps[0] + 1e-9 for gap in gaps) / len(gaps),
            "that is the number of the splits: return their share": share * len(gaps),
        }  # fmt: skip
        expect(chance, (a, b), share, {k: v for k, v in mistakes.items() if v != share})


def _gaps(a: list, b: list) -> list[float]:
    """The difference of the means for every split; the observed one comes first."""
    pool, found = [*a, *b], []
    for chosen in itertools.combinations(range(len(pool)), len(a)):
        rest = [pool[i] for i in range(len(pool)) if i not in chosen]
        found.append(statistics.mean(pool[i] for i in chosen) - statistics.mean(rest))
    return found
