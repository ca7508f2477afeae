"""Lesson 04: prompt tuning."""

import torch

from minipeft import GPT, GPTConfig

from . import (
    answered,
    call,
    compare,
    ensure,
    exercise,
    expect,
    has_shape,
)


@exercise(
    "04.label",
    "It is the value that PyTorch's cross-entropy ignores.",
    "It is the default of `ignore_index` in torch.nn.functional.cross_entropy.",
)
def label(label, draw):
    mistakes = {
        0: "0 is a token, so the model would be trained to predict it.",
        -1: "-1 is not the value that the loss ignores.",
        100: "The sign is wrong.",
    }
    answered(label, -100, mistakes, "Look at the labels of a prompt in lesson 01.")


@exercise(
    "04.worse",
    "What do the outputs depend on while the adapter is enabled? And while it is disabled?",
    "Enabled, the low-rank update is added in each layer. Disabled, only frozen weights are used.",
)
def worse(worse, draw):
    names = _a_set("worse", worse, {"enabled", "disabled"})
    ensure("disabled" not in names, "disabled, only the frozen weights are used: the base exactly")
    ensure("enabled" in names, "enabled, the low-rank update changes outputs on old text as well")


def _a_set(what: str, value, known: set[str]) -> set[str]:
    names = [value] if isinstance(value, str) and value else value
    ensure(
        isinstance(names, list | tuple | set | frozenset | str),
        f"{what} must be a list of names, got {value!r}",
    )
    names = {str(name).strip().lower() for name in names}
    ensure(names <= known, f"{what} may only have the names {sorted(known)}, got {value!r}")
    return names


@exercise(
    "04.count",
    "Where does P enter the model: in every layer, or once? Where in the context are its rows?",
    "P has one row of width 768 per virtual token, and each of them takes one position.",
)
def count(trained, room, draw):
    mistakes = {
        12 * 100 * 768: "P is put in front of the input only, not in every layer.",
        768: "That is one virtual token.",
        100: "Each virtual token is a vector of width 768.",
        100 * 1024: "The width is 768; 1,024 is the length of the context.",
    }
    answered(trained, 76_800, mistakes, "trained: P is p × d.")
    mistakes = {
        1024: "Virtual tokens take positions of the context.",
        1124: "Virtual tokens take positions; they do not add any.",
    }
    answered(room, 924, mistakes, "room: positions of the context without the virtual tokens.")


@exercise(
    "04.seen",
    "For each token of the text, ask: are the virtual tokens on its left or on its right?",
    "Between tokens 3 and 4, they are on the left of the tokens 4 and 5 only.",
)
def seen(after, between, draw):
    for what, got, right in (("after", after, []), ("between", between, [4, 5])):
        try:
            places = sorted(int(i) for i in got)
        except (TypeError, ValueError):
            places = None
        ensure(places is not None, f"{what} must be a list of positions, got {got!r}")
        ensure(
            set(places) <= set(range(6)),
            f"{what} may only have the positions 0 to 5 of the text, got {got!r}",
        )
        hidden = [i for i in places if i not in right]
        ensure(not hidden, f"{what}: token {hidden[:1]} cannot attend to tokens on its right")
        ensure(
            places == right,
            f"{what} = {got}: there are more tokens with the virtual tokens on their left",
        )


@exercise(
    "04.prepend",
    "torch.cat joins along dim=1. P.expand(b, -1, -1) gives each row of the batch the same P.",
    "The p new entries of the mask are 1, so that the text can attend to them. "
    "The p new labels keep them out of the loss.",
)
def prepend(prepend, draw):
    for b, t, p, d in ((2, 5, 3, 4), (1, 1, 1, 3), (4, 3, 2, 6), (3, 2, 3, 2)):
        P = draw.normal(p, d).requires_grad_()
        x = draw.normal(b, t, d)
        mask = torch.ones(b, t, dtype=torch.long)
        mask[1:, -1] = 0
        labels = draw.tokens(50, b, t).masked_fill(mask == 0, -100)
        inputs = f"P {(p, d)}, x {(b, t, d)}, mask and labels {(b, t)}"
        got = call(prepend, P, x, mask, labels)
        ensure(
            isinstance(got, tuple | list) and len(got) == 3,
            f"it must return three: x, mask and labels\n  input     {inputs}",
        )
        new_x, new_mask, new_labels = got
        has_shape("x", new_x, (b, p + t, d), inputs)
        every = P.detach().expand(b, -1, -1)
        _x(new_x, every, x, inputs)
        has_shape("the mask", new_mask, (b, p + t), inputs)
        has_shape("the tensor of labels", new_labels, (b, p + t), inputs)
        ones, zeros = mask.new_ones(b, p), mask.new_zeros(b, p)
        mistakes = {
            "0 hides the virtual tokens from the text": torch.cat([zeros, mask], 1),
            "the new entries are at the end, and P is in front": torch.cat([mask, ones], 1),
            "these are the labels: the order is x, mask, labels": new_labels,
            "the padding of the text must stay 0: keep its own mask": mask.new_ones(b, p + t),
        }
        _rows("the mask", new_mask, torch.cat([ones, mask], 1), inputs, mistakes)
        ignored = labels.new_full((b, p), -100)
        mistakes = {
            "0 is a token: use the label that the loss ignores": torch.cat([zeros, labels], 1),
            "the new entries are at the end, and P is in front": torch.cat([labels, ignored], 1),
            "1 is a token: use the label that the loss ignores": torch.cat([ones, labels], 1),
        }
        _rows("labels", new_labels, torch.cat([ignored, labels], 1), inputs, mistakes)
        ensure(not new_labels.is_floating_point(), "labels must stay integers: give the new dtype")
        ensure(new_x.requires_grad, "P gets no gradient: was it detached?")
        weights = draw.normal(b, p + t, d)
        (new_x * weights).sum().backward()
        expected = weights[:, :p].sum(0)
        compare("the gradient of P", P.grad, expected, inputs, tolerance=1e-4)


def _rows(what, got, expected, inputs, mistakes):
    """Compare matrices of integers as lists, so that the message shows all entries."""
    lists = {text: value.tolist() for text, value in mistakes.items()}
    got = got.long() if got.dtype == torch.bool else got
    compare(what, got.tolist(), expected.tolist(), inputs, lists)


def _x(got, every, x, inputs):
    mistakes = {
        "the virtual tokens come after the text, where it cannot attend to them": torch.cat(
            [x, every], 1
        ),
        "the virtual tokens are in reverse order": torch.cat([every.flip(1), x], 1),
        "only the first virtual token is used": torch.cat([every[:, :1].expand_as(every), x], 1),
        "the virtual tokens are zero": torch.cat([torch.zeros_like(every), x], 1),
    }
    compare("x", got.detach(), torch.cat([every, x], 1), inputs, mistakes)


@exercise(
    "04.moves",
    "How far can a number move in 20 steps? Then divide by its size.",
    "20 steps of 10⁻² are 1/5. For noise, divide by 1; for embeddings, by 1/5.",
)
def moves(noise, embeddings, draw):
    mistakes = {
        0.01: "That is one step.",
        20: "Multiply the steps by the learning rate.",
        5: "Divide the movement by the size, not the other way round.",
    }
    answered(noise, 0.2, mistakes, "noise: steps times learning rate, divided by the size 1.")
    mistakes = {
        0.2: "That is the movement. Compare it with the size 1/5.",
        0.04: "Divide by the size 1/5; you have multiplied by it.",
        0.05: "That is one step.",
    }
    answered(embeddings, 1.0, mistakes, "embeddings: the same movement, divided by the size 1/5.")


@exercise(
    "04.mixed",
    "prompts[which] has the shape (b, p, d): one prompt per row.",
    "Put them before the embeddings of ids, run the model with inputs_embeds, "
    "and keep the logits from position p on.",
)
@torch.no_grad()
def mixed(mixed, draw):
    config = GPTConfig(vocab_size=23, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = GPT(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(4)  # so that the prompts matter
    embed = model.get_input_embeddings()
    for which, n, p, t in (([2, 0, 2, 1], 3, 4, 6), ([0], 1, 1, 1), ([1, 0], 3, 2, 2)):
        prompts, which = draw.normal(n, p, 8), torch.tensor(which)
        ids = draw.tokens(23, len(which), t)
        text, own = embed(ids), torch.stack([prompts[i] for i in which.tolist()])

        def logits(front, text=text):
            return model(inputs_embeds=torch.cat([front, text], dim=1)).logits

        whole = logits(own)
        inputs = f"prompts {(n, p, 8)}, which {which.tolist()}, ids {tuple(ids.shape)}"
        got = _logits(call(mixed, model, prompts, which, ids))
        ensure(isinstance(got, torch.Tensor), f"the logits must be a tensor, got {got!r:.100}")
        ensure(
            got.shape != whole.shape,
            f"the logits of the {p} virtual tokens are still there: drop the first p",
        )
        has_shape("the logits", got, tuple(whole[:, p:].shape), inputs)
        mistakes = {
            "the last p are dropped; the virtual tokens are the first p": whole[:, :t],
            "the prompts are not used, or come after the text": model(ids).logits,
            "every row has the first row's prompt": logits(own[:1].expand_as(own))[:, p:],
            "`which` is not used": logits(prompts[torch.arange(len(ids)) % n])[:, p:],
        }
        compare("the logits", got, whole[:, p:], inputs, mistakes, tolerance=1e-4)


def _logits(value):
    return getattr(value, "logits", value)


@exercise(
    "04.fill",
    "Index i of the result is an id of the text. Which one, once i is past its end?",
    "The remainder i % len(ids) starts again at 0.",
)
def fill(fill, draw):
    for n, p in ((3, 7), (5, 2), (4, 4), (1, 3), (2, 1), (3, 6)):
        ids = [draw.integer(0, 5000) * 10 + i for i in range(n)]
        whole = (ids * p)[:p]
        mistakes = {
            "a shorter text must be repeated": ids[:p],
            "a longer text must be cut to p": (ids * p)[: max(p, n)],
            "the text is repeated, but not cut to p": ids * -(-p // n),
            "the last id is repeated, not the whole text": (ids + ids[-1:] * p)[:p],
            "each id is repeated, not the whole text": [i for i in ids for _ in range(p)][:p],
            "this is the end of the text, and not its beginning": (ids * p)[-p:],
        }
        expect(fill, (ids, p), whole, mistakes)


@exercise(
    "04.nearest",
    "Divide each row by its length first. Then products of rows are cosines.",
    "nn.functional.normalize(…, dim=1) does that. Then take the argmax over the rows of E.",
)
def nearest(nearest, draw):
    fixed = torch.tensor([[3.0, 0.2], [0.1, 0.4]]), torch.tensor([[1.0, 0], [9, 9], [0, 30]])
    random = [
        (draw.normal(p, d), draw.normal(v, d) * draw.normal(v, 1).exp())
        for p, v, d in ((4, 6, 3), (1, 9, 5), (6, 5, 4), (5, 5, 2), (3, 1, 4))
    ]
    for P, E in (fixed, *random):
        unit_P, unit_E = (m / m.norm(dim=1, keepdim=True) for m in (P, E))
        cosines = unit_P @ unit_E.T
        mistakes = {
            "long rows of E win: divide each row by its length": (P @ E.T).argmax(1).tolist(),
            "this is the smallest distance, which prefers short rows": torch.cdist(P, E)
            .argmin(1)
            .tolist(),
            "the largest is taken over the rows of P": cosines.argmax(0).tolist(),
            "these are the smallest cosines": cosines.argmin(1).tolist(),
            "these are the cosines: return where they are largest": cosines.amax(1).tolist(),
        }
        got = call(nearest, P, E)
        ensure(
            not isinstance(got, tuple) or len(got) != 2 or not isinstance(got[0], torch.Tensor),
            "`max` returns values and indices: return only the indices",
        )
        got = [int(i) if isinstance(i, torch.Tensor) and i.dim() == 0 and i.dtype == torch.long
               else i for i in got] if isinstance(got, list) else got  # fmt: skip
        inputs = f"P {tuple(P.shape)}, E {tuple(E.shape)}"
        compare("nearest(P, E)", got, cosines.argmax(1).tolist(), inputs, mistakes)
