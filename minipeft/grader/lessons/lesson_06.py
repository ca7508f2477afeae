"""Lesson 06: prefix tuning."""

import torch
from torch import Tensor, nn

from minipeft.gpt import GPT, GPTConfig

from . import (
    Wrong,
    answered,
    call,
    compare,
    ensure,
    exercise,
    expect,
    has_shape,
    show,
)


@exercise(
    "06.prompt",
    "Each virtual token of prompt tuning takes the place of one embedding.",
    "An embedding has 128 numbers, and there are 20 of them.",
)
def prompt(trained, draw):
    mistakes = {
        20: "Each virtual token is a vector, not one number.",
        128: "That is one virtual token.",
        20 * 128 * 4: "Prompt tuning adds vectors at the input only, not in every layer.",
        2 * 20 * 128: "At the input there is one vector per virtual token.",
    }
    answered(trained, 2560, mistakes, "Count the virtual tokens and the numbers in each.")


@exercise(
    "06.causal",
    "The first token sees one key: its own. How many does the second one see?",
    "1 + 2 + 3 + 4 + 5.",
)
def causal(pairs, draw):
    mistakes = {
        25: "That is without a mask. A token does not see the tokens after it.",
        10: "A token sees itself, too.",
        5: "That is one key for each query.",
    }
    answered(pairs, 15, mistakes, "Query number i sees the keys 1 to i.")


@exercise(
    "06.count",
    "How many numbers are the keys of one virtual token in one layer? All heads together.",
    "Keys and values: 2 · 768 numbers per layer and virtual token.",
)
def count(count, draw):
    mistakes = {
        20 * 768: "That is prompt tuning. A prefix has keys and values in every layer.",
        2 * 20 * 768: "That is one layer of twelve.",
        20 * 12 * 768: "Those are the keys only, or the values only.",
        2 * 12 * 768: "That is one virtual token.",
        2 * 20 * 12 * 12 * 768: "The heads share the 768 numbers: do not multiply by 12 again.",
        2 * 20 * 12 * 64: "That is one head: all 12 heads together are 768 wide.",
    }
    answered(count, 368_640, mistakes, "2 · p · (number of layers) · width.")


@exercise(
    "06.mask",
    "Without a prefix the mask is torch.ones(t, t).tril(). What does tril's second argument do?",
    "Query i sees key j where j <= p + i. tril(p) keeps the entries where j - i <= p.",
)
def mask(prefix_mask, draw):
    for p, t in ((3, 5), (1, 4), (4, 1), (20, 7), (1, 1), (2, 2)):
        got = call(prefix_mask, p, t)
        got = torch.tensor(got) if isinstance(got, list | tuple) else got
        inputs = f"p = {p}, t = {t}"
        has_shape("the mask", got, (t, p + t), inputs)
        ensure(
            got.dtype == torch.bool,
            f"the mask must have the dtype torch.bool, got {got.dtype}: torch would add other "
            "numbers to the scores",
        )
        ones = torch.ones(t, p + t, dtype=torch.bool)
        mistakes = {
            "that is is_causal=True: the triangle begins p columns too early": ones.tril(),
            "a token does not see itself": ones.tril(p - 1),
            "a token sees the next one": ones.tril(p + 1),
            "every token sees the whole text": ones,
            "the prefix is hidden": ones.tril(p) & (torch.arange(p + t) >= p),
            "the prefix must come first": ones.tril(p).roll(t, 1),
        }
        mistakes = {text: wrong.float() for text, wrong in mistakes.items()}
        compare("prefix_mask(…)", got.float(), ones.tril(p).float(), inputs, mistakes)


@exercise(
    "06.attend",
    "Join the keys with torch.cat((K_P, k)), and the values. Then the scores are t × (p + t).",
    "scores = q @ keys.T / q.shape[1] ** 0.5; hidden ones are -inf; then softmax(-1) @ values.",
)
def attend(attend, draw):
    for p, t, width in ((3, 5, 4), (1, 4, 2), (4, 1, 3), (2, 2, 9)):
        q, k, v = (draw.normal(t, width) for _ in range(3))
        K_P, V_P = draw.normal(p, width), draw.normal(p, width)
        inputs = (q, k, v, K_P, V_P)
        mistakes = {
            "the scores are not divided by √w": _attention(q * width**0.5, k, v, K_P, V_P),
            "the scores are divided by w, not by √w": _attention(q / width**0.5, k, v, K_P, V_P),
            "the prefix comes after the text": _attention(q, K_P, V_P, k, v, offset=p),
            "the mask is missing": _attention(*inputs, offset=p + t),
            "True and False were added as 1 and 0: set hidden scores to -inf": _unhidden(*inputs),
            "that is the mask of is_causal=True": _attention(*inputs, offset=0),
            "the prefix is missing": _attention(q, k, v, K_P[:0], V_P[:0]),
            "keys and values of the prefix are swapped": _attention(q, k, v, V_P, K_P),
            "the prefix's values are missing": _attention(q, k, v, K_P, 0 * V_P),
            "values were used as keys": _attention(q, v, k, V_P, K_P),
        }
        expected = _attention(*inputs)
        expect(attend, inputs, expected, mistakes)
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = attend(*leaves)
        ensure(y.requires_grad, "the output carries no gradient: was something detached?")
        y.square().sum().backward()
        checks = [x.clone().requires_grad_() for x in inputs]
        _attention(*checks).square().sum().backward()
        for name, leaf, right in zip(("q", "k", "v", "K_P", "V_P"), leaves, checks, strict=True):
            got = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            ensure(
                bool(got.any()) or not bool(right.grad.any()),
                f"{name} gets no gradient. Was it detached?",
            )
            compare(f"the gradient of {name}", got, right.grad, tolerance=1e-4)


def _attention(q, k, v, K_P, V_P, offset: int | None = None) -> Tensor:
    """One head. offset: how far the causal triangle is shifted; None: right."""
    keys, values = torch.cat((K_P, k)), torch.cat((V_P, v))
    sees = torch.ones(len(q), len(keys)).tril(len(K_P) if offset is None else offset).bool()
    scores = q @ keys.T / q.shape[1] ** 0.5
    return scores.masked_fill(~sees, -torch.inf).softmax(-1) @ values


def _unhidden(q, k, v, K_P, V_P) -> Tensor:
    """One head, with the boolean mask added to the scores."""
    keys, values = torch.cat((K_P, k)), torch.cat((V_P, v))
    scores = q @ keys.T / q.shape[1] ** 0.5
    return (scores + torch.ones_like(scores).tril(len(K_P))).softmax(-1) @ values


@exercise(
    "06.my_prefix",
    "Hold one nn.Parameter of random numbers with the shape (layers, 2, heads, p, w).",
    "In past: for k, v in self.P, give (k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)).",
)
def my_prefix(MyPrefix, draw):
    for layers, heads, width, p in ((2, 2, 4, 3), (3, 1, 5, 1), (1, 4, 2, 2)):
        config = GPTConfig(
            vocab_size=11, n_positions=16, n_embd=heads * width, n_layer=layers, n_head=heads,
            initializer_range=0.3,
        )  # fmt: skip
        case = f"n_layer={layers}, n_head={heads}, n_embd={heads * width}, p={p}"
        mine = call(MyPrefix, config, p)
        ensure(isinstance(mine, nn.Module), f"MyPrefix must be an nn.Module, got {show(mine)}")
        for b in (2, 1):
            tensors = _tensors(mine, b, layers, (b, heads, p, width), case)
        numbers = sum(w.numel() for w in mine.parameters() if w.requires_grad)
        n = 2 * p * layers * heads * width
        ensure(
            numbers == n,
            f"2 · p · layers · n_embd is {n} parameters, yours has {numbers}\n  input     {case}"
            + ("\n  likely    use an nn.Parameter (in a list: nn.ParameterList)" * (numbers == 0)),
        )
        _each_has_its_own_parameters(mine, layers, p * heads * width)
        together = torch.cat([x[0].transpose(0, 1).flatten(1) for x in tensors], 1)  # (p, 2 l d)
        ensure(
            p == 1 or not torch.equal(together, together[:1].expand_as(together)),
            f"all {p} virtual tokens start with equal numbers. Then they get equal gradients, and "
            "stay equal: start with random numbers",
        )
        _it_trains(mine, GPT(config).eval(), draw)


def _tensors(mine: nn.Module, b: int, layers: int, shape: tuple, case: str) -> list[Tensor]:
    """Keys and values of each layer in turn, once their shapes are right."""
    pairs, tensors = call(mine.past, b), []
    ensure(
        isinstance(pairs, tuple | list) and len(pairs) == layers,
        f"past({b}) must return a tuple of {layers} pairs, one per layer\n  input     {case}",
    )
    for i, pair in enumerate(pairs):
        ensure(
            isinstance(pair, tuple | list | Tensor) and len(pair) == 2,
            f"layer {i} of past({b}) must be a pair (keys, values), got {show(pair)}",
        )
        for name, value in zip(("keys", "values"), pair, strict=True):
            what = f"the tensor of {name} of layer {i} in past({b})"
            has_shape(what, value, shape, f"{case}; the shape is (b, heads, p, w)")
            ensure(torch.equal(value, value[:1].expand_as(value)), f"{what} differ in the batch")
            ensure(bool(value.isfinite().all()), f"{what} are not finite: torch.empty?")
            ensure(
                value.requires_grad,
                f"{what} get no gradient. Are they a Parameter? Were they detached?",
            )
            tensors.append(value.detach())
    return tensors


def _each_has_its_own_parameters(mine: nn.Module, layers: int, n: int) -> None:
    """Each tensor depends on n parameters, and no two on the same one."""
    parameters = [w for w in mine.parameters() if w.requires_grad]
    used = torch.zeros(sum(w.numel() for w in parameters), dtype=torch.long)
    for i in range(layers):
        for j, name in enumerate(("keys", "values")):
            x = call(mine.past, 1)[i][j]
            grads = torch.autograd.grad(
                (x * (1 + torch.rand_like(x))).sum(), parameters, allow_unused=True
            )
            flat = torch.cat(
                [
                    (torch.zeros_like(w) if g is None else g).flatten()
                    for w, g in zip(parameters, grads, strict=True)
                ]
            )
            used += flat != 0
            ensure(
                int((flat != 0).sum()) == n,
                f"the {name} of layer {i} must depend on {n} parameters, not "
                f"{int((flat != 0).sum())}",
            )
    ensure(
        bool((used == 1).all()),
        "two of the tensors share parameters: each layer has its own keys and its own values",
    )


def _it_trains(mine: nn.Module, gpt: GPT, draw) -> None:
    """A few steps on a toy: the loss falls, and the prefix of the next call has changed."""
    gpt.requires_grad_(False)
    ids, losses = draw.tokens(gpt.config.vocab_size, 2, 5), []
    optimizer = torch.optim.Adam(mine.parameters(), lr=0.05)
    try:
        for _ in range(30):
            loss = gpt(ids, past_key_values=tuple(mine.past(2)), labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    except RuntimeError as error:
        raise Wrong(
            f"a toy GPT cannot be trained with it: {str(error).split('.')[0]}\n"
            "  likely    past must use the parameters anew in every call"
        ) from None
    ensure(
        losses[-1] < losses[0],
        f"30 steps on a toy GPT: the loss goes from {losses[0]:.4f} to {losses[-1]:.4f}",
    )


@exercise(
    "06.share",
    "softmax: the share of one key is exp(its score) / the sum of exp(score) over all keys.",
    "Each of the p zero keys has exp(0) = 1. The sum over all keys is p + scores.exp().sum().",
)
def share(share, draw):
    for p, t in ((20, 6), (1, 1), (3, 1), (1, 8)):
        scores = draw.normal(t)
        inputs, total = (scores, p), scores.exp().sum()
        mistakes = {
            "p keys of p + t: the scores of the text are not used": p / (p + t),
            "that is the share of the text": (total / (p + total)).item(),
            "that is the share of one zero key: there are p": (1 / (p + total)).item(),
            "there is one zero key in the sum, but there are p": (p / (1 + total)).item(),
            "that is with one zero key, but there are p": (1 / (1 + total)).item(),
            "use the exponentials of the scores": (p / (p + scores.sum())).item(),
            "the zero keys belong into the sum, too": (p / total).item(),
            "exp(0) is 1, not 0": 0.0,
        }
        expect(share, inputs, (p / (p + total)).item(), mistakes, tolerance=1e-4)


@exercise(
    "06.equal",
    "Swap two of the virtual tokens before training. Does anything about the model change?",
    "So equal tokens get equal gradients, in every step.",
)
def equal(different, draw):
    mistakes = {
        20: "What could make two of them differ? They have the same numbers, in the same place.",
        0: "They do move away from zero. But do they move away from each other?",
        2: "Keys and values differ. But compare one virtual token with another.",
    }
    answered(different, 1, mistakes, "Compare the gradients of two virtual tokens.")


@exercise(
    "06.first_tokens",
    "Which of the four dimensions (b, heads, t, w) counts the tokens?",
    "For each pair: (k[:, :, :p], v[:, :, :p]).",
)
def first_tokens(first_tokens, draw):
    for layers, shape, p in (
        (2, (4, 5, 9, 6), 3), (1, (2, 3, 4, 4), 1), (3, (1, 1, 2, 6), 2), (2, (3, 2, 7, 2), 2),
    ):  # fmt: skip
        cache = tuple((draw.normal(*shape), draw.normal(*shape)) for _ in range(layers))
        got = call(first_tokens, cache, p)
        case = f"{layers} layers, tensors of the shape {shape}, p = {p}"
        ensure(
            isinstance(got, tuple | list) and len(got) == layers,
            f"it must return one pair for each of {layers} layers, got {show(got)}",
        )
        for i, (pair, right) in enumerate(zip(got, cache, strict=True)):
            ensure(
                isinstance(pair, tuple | list | Tensor) and len(pair) == 2,
                f"layer {i} must be a pair (keys, values), got {show(pair)}",
            )
            for j, name in enumerate(("keys", "values")):
                mistakes = {
                    "that is everything": right[j],
                    "these are the last p tokens": right[j][:, :, -p:],
                    "the first p heads, not tokens": right[j][:, :p],
                    "the first p texts, not tokens": right[j][:p],
                    "the first p numbers of each head, not tokens": right[j][..., :p],
                    "keys and values are swapped": right[1 - j][:, :, :p],
                    "that is only the token with index p": right[j][:, :, p : p + 1],
                }
                compare(f"the {name} of layer {i}", pair[j], right[j][:, :, :p], case, mistakes)


@exercise(
    "06.bytes",
    "First count the numbers, as in exercise 1.",
    "2 · 20 · 32 · 4096 numbers, and each takes 2 bytes.",
)
def n_bytes(cache_bytes, draw):
    n = 2 * 20 * 32 * 4096
    mistakes = {
        n: "That is the number of parameters, and each takes 2 bytes. Or did you forget values?",
        4 * n: "In float16 a number takes 2 bytes.",
        2 * n / 32: "That is one layer.",
        2 * n / 20: "That is one virtual token.",
        2 * n * 32: "32 layers: did you multiply by 32 twice?",
    }
    answered(cache_bytes, 2 * n, mistakes, "Keys and values, tokens, layers, width, bytes.")


def _first_tokens(cache: tuple, p: int) -> tuple:
    return tuple((keys[:, :, :p], values[:, :, :p]) for keys, values in cache)


# what the lesson uses for a function that is not right yet
FINISHED = {"attend": _attention, "first_tokens": _first_tokens}


@exercise(
    "06.gated",
    "a is the prefix's part of the sum of exp(score) over all keys.",
    "a = exp(prefix scores).sum() / (that + exp(text scores).sum()); divide scores by √w first.",
)
def gated(gated, draw):
    for p, t, width in ((3, 6, 4), (1, 1, 2), (2, 1, 3), (1, 5, 9)):
        q, K_P, V_P, K, V = (
            draw.normal(*shape) for shape in ((width,), *[(p, width)] * 2, *[(t, width)] * 2)
        )
        on_prefix, on_text = K_P @ q / width**0.5, K @ q / width**0.5
        a = on_prefix.exp().sum() / (on_prefix.exp().sum() + on_text.exp().sum())
        prefix, text = on_prefix.softmax(0) @ V_P, on_text.softmax(0) @ V
        raw = torch.cat((K_P, K)) @ q
        mistakes = {
            "divide the scores by √w": raw.softmax(0) @ torch.cat((V_P, V)),
            "a and 1 - a are swapped": a * text + (1 - a) * prefix,
            "the two outputs are added: mix them with a and 1 - a": text + prefix,
            "a is a share of exp(score), not a share of the keys": (t * text + p * prefix)
            / (p + t),
            "each softmax is taken alone, so a is always 1/2": (text + prefix) / 2,
            "that is the text only": text,
            "that is the prefix only": prefix,
        }
        expect(gated, (q, K_P, V_P, K, V), (1 - a) * text + a * prefix, mistakes)
        zeros = torch.zeros(p, width)
        expect(gated, (q, zeros, zeros, K, V), (1 - p / (p + on_text.exp().sum())) * text)
