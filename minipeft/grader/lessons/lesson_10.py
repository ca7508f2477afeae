"""Lesson 10: real models."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from . import (
    NotDone,
    Wrong,
    answered,
    call,
    compare,
    done,
    ensure,
    exercise,
    expect,
    has_shape,
    is_close,
)

PARTS = {"weights", "gradients", "optimizer state"}


def names_of(what: str, got, known: set[str]) -> set[str]:
    """A list of names as a set. Raises Wrong for anything else, or an unknown name."""
    got = [got] if isinstance(got, str) else got
    try:
        names = {str(name).strip().lower() for name in got}
    except TypeError:
        raise Wrong(f"{what} must be a list of names, got {got!r}") from None
    ensure(names <= known, f"{what} has {sorted(names - known)}; use only {sorted(known)}")
    return names


def number(what: str, got) -> float:
    got = got.item() if isinstance(got, Tensor) and got.numel() == 1 else got
    is_number = isinstance(got, int | float) and not isinstance(got, bool)
    ensure(is_number, f"{what} must be a number, got {got!r:.100}")
    return float(got)


@exercise(
    "10.shrinks",
    "Gradients and optimizer state are kept for trained parameters. Are frozen weights kept?",
    "LoRA trains few parameters, next to all weights of the base. QLoRA stores these in 4 bits.",
)
def shrinks(lora_shrinks, qlora_shrinks, draw):
    lora = names_of("lora_shrinks", lora_shrinks, PARTS)
    qlora = names_of("qlora_shrinks", qlora_shrinks, PARTS)
    ensure("weights" not in lora, "LoRA keeps all weights of the base, and adds a few.")
    ensure(
        lora == PARTS - {"weights"},
        f"lora_shrinks = {sorted(lora)}: what is kept for each trained parameter?",
    )
    ensure("weights" in qlora, "What does QLoRA store in 4 bits?")
    ensure(
        qlora == {"weights"},
        "QLoRA trains the same adapter as LoRA, so its gradients and optimizer state are as large.",
    )


@exercise(
    "10.label",
    "It is the value that PyTorch's cross-entropy ignores (`ignore_index`).",
    "It is negative, and no token has this number: minus one hundred.",
)
def label(label, draw):
    mistakes = {
        0: "0 is the number of a token. The model would learn to write it.",
        -1: "PyTorch raises an error for this label.",
        100: "That is the number of a token. What about the sign?",
        1: "1 is the number of a token.",
    }
    answered(label, -100, mistakes, "Which label does PyTorch's cross-entropy ignore?")


@exercise(
    "10.bytes",
    "All 3 billion weights are kept, with 2 bytes each. The adapter comes on top.",
    "Each of the 10 million parameters has a weight, a gradient and two averages, 4 bytes each.",
)
def bytes_of_lora(lora_bytes, draw):
    p, a = 3e9, 10e6
    mistakes = {
        2 * p: "Those are the base's weights only.",
        16 * p: "That is full fine-tuning.",
        16 * a: "The frozen weights are kept too.",
        2 * p + 4 * a: "The adapter has gradients and optimizer state too.",
        2 * p + 8 * a: "What does AdamW keep for each parameter of the adapter?",
        2 * p + 12 * a: "AdamW keeps two numbers per parameter. Are the weights counted?",
        4 * p + 16 * a: "The base is bfloat16: 2 bytes per weight.",
        (2 * p + 16 * a) / 1e9: "Write the number of bytes, not of GB.",
        (2 * p + 16 * a) / 2**30: "Write the number of bytes, not of GiB.",
    }
    answered(lora_bytes, 2 * p + 16 * a, mistakes, "Add the base and the adapter.")


@exercise(
    "10.blocks",
    "The backward pass starts at the loss. How far down must the gradient go?",
    "Below the lowest adapter there is nothing to train, so no gradient is needed there.",
)
def blocks(blocks, draw):
    mistakes = {
        32: "Nothing is trained below the lowest adapter, so the gradient stops there.",
        24: "Those are the blocks below the adapters.",
        0: "The gradient must reach the adapters.",
        1: "That is about right with checkpointing: one block at a time.",
    }
    answered(blocks, 8, mistakes, "Through how many blocks does the gradient pass?")


LAYERS = {
    "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
}  # fmt: skip


@exercise(
    "10.matched",
    "Cut each layer's name after its dot. Which of these last parts is equal to an entry?",
    "`dense_h_to_4h` is not equal to `dense`. And no last part is `q_proj` or `v_proj`.",
)
def matched(matched, draw):
    names = names_of("matched", matched, LAYERS | {"dense"})
    names = {"attention.dense" if name == "dense" else name for name in names}
    ensure(
        "attention.query_key_value" not in names,
        "query_key_value is neither q_proj nor v_proj. Names are compared, not what layers do.",
    )
    ensure(
        not any(name.startswith("mlp") for name in names),
        "the last part must be equal to an entry; it is not enough that it begins with it.",
    )
    ensure(names == {"attention.dense"}, "one layer is matched. Which last part is an entry?")


ROLES = {"s": "system", "u": "user", "a": "assistant"}


@exercise(
    "10.examples",
    "Go through the messages with `enumerate`. What comes before message i is `messages[:i]`.",
    'For each m with m["role"] == "assistant", the pair is (messages[:i], m["content"]).',
)
def examples(examples, draw):
    for roles in ("ua", "uaua", "suauaua", "su", "sua", "uaua"):
        messages = [
            {"role": ROLES[role], "content": f"text {draw.integer(1, 999)}"} for role in roles
        ]
        at = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        right = [(messages[:i], messages[i]["content"]) for i in at]
        got = call(examples, messages)
        if isinstance(got, tuple):
            got = list(got)
        inputs = "roles " + ", ".join(m["role"] for m in messages)
        ensure(isinstance(got, list), f"it must return a list of pairs, got {got!r:.100}")
        ensure(
            len(got) == len(right),
            f"there are {len(got)} examples, expected {len(right)}: one per answer\n"
            f"  input     {inputs}",
        )
        for pair, (before, answer) in zip(got, right, strict=True):
            is_pair = isinstance(pair, tuple | list) and len(pair) == 2
            ensure(is_pair, f"each example must be a pair, got {pair!r:.100}\n  input     {inputs}")
            compare("the content of an answer", pair[1], answer, inputs)
            mistakes = {
                "the message before the answer only": before[-1:],
                "the messages of the user only": [m for m in before if m["role"] == "user"],
                "earlier answers are part of the prompt too": [
                    m for m in before if m["role"] != "assistant"
                ],
                "the system message is part of the prompt too": [
                    m for m in before if m["role"] != "system"
                ],
                "the answer itself is in the prompt": [
                    *before,
                    {"role": "assistant", "content": answer},
                ],
            }
            got_before = list(pair[0]) if isinstance(pair[0], tuple) else pair[0]
            compare("the messages before an answer", got_before, before, inputs, mistakes)


REMEDIES = {"check the template", "lower the rate", "stop earlier"}


@exercise(
    "10.remedies",
    "Which run starts far above a few nats? Which one jumps up? Which two losses part?",
    "B starts near 11 nats and stays. In C both losses jump. In A only the validation loss rises.",
)
def remedies(remedies, draw):
    right = ["stop earlier", "check the template", "lower the rate"]
    if isinstance(remedies, dict):
        remedies = [remedies.get(key) for key in "ABC"]
    is_list = isinstance(remedies, list | tuple) and len(remedies) == 3
    ensure(is_list, f"it must be a list of three texts, for A, B and C, got {remedies!r:.100}")
    got = [str(text).strip().lower() for text in remedies]
    for text in got:
        ensure(text in REMEDIES, f"{text!r} is not one of the three: {sorted(REMEDIES)}")
    reasons = (
        "A: the training loss falls all the time. Only the validation loss rises.",
        "B: the first loss is that of a model that knows nothing, and it does not fall.",
        "C: it starts well, and then both losses jump up.",
    )
    for text, expected, reason in zip(got, right, reasons, strict=True):
        ensure(text == expected, f"{text!r} does not fit.\n  {reason}")


@exercise(
    "10.error",
    "p is 8/20, and n is 20.",
    "Divide 8/20 · 12/20 by 20, and take the square root.",
)
def error(error, draw):
    got, p = number("it", error), 8 / 20
    for value, text in (
        (p * (1 - p) / 20, "Take the square root."),
        ((p * (1 - p)) ** 0.5, "Divide by n before the square root."),
        ((p / 20) ** 0.5, "1 - p is missing."),
        (p / 20**0.5, "The square root is over the whole fraction, and 1 - p is missing."),
        ((p * (1 - p)) ** 0.5 / 20, "n is under the square root too."),
        (20 * (p * (1 - p) / 20) ** 0.5, "That is in answers. The question is about the share."),
        (100 * (p * (1 - p) / 20) ** 0.5, "That is in percent. Write it as a share."),
    ):
        ensure(not math.isclose(got, value, rel_tol=0.01), f"{got:.4g}. {text}")
    right = (p * (1 - p) / 20) ** 0.5
    ensure(math.isclose(got, right, rel_tol=0.03), f"{got:.4g}. Put p and n into the formula.")


@exercise(
    "10.serve",
    "A merged model has all weights of the base. How many merged models are there?",
    "20 times 14 GB; and 14 GB plus 20 adapters of 40 MB. A GB has 1,000 MB.",
)
def serve(as_merged, as_adapters, draw):
    merged, adapters = number("as_merged", as_merged), number("as_adapters", as_adapters)
    for got, value, text in (
        (merged, 14, "as_merged: each of the twenty customers has a merged model."),
        (merged, 14.8, "as_merged: that is one base with adapters."),
        (merged, 280.8, "as_merged: the adapters are part of the merged weights."),
        (merged, 20 * 0.04, "as_merged: those are the adapters."),
        (adapters, 14 + 20 * 40, "as_adapters: an adapter has 40 MB, not 40 GB."),
        (adapters, 0.8, "as_adapters: the base is stored too, once."),
        (adapters, 14.04, "as_adapters: there are twenty adapters."),
        (adapters, 280.8, "as_adapters: the base is stored once."),
        (adapters, 22, "as_adapters: a GB has 1,000 MB, so 40 MB are less than a tenth of a GB."),
    ):
        ensure(not math.isclose(got, value, rel_tol=1e-3), f"{got:.5g}. {text}")
    ensure(math.isclose(merged, 280, rel_tol=5e-3), f"as_merged = {merged:.5g}: count the models")
    ensure(
        math.isclose(adapters, 14.8, rel_tol=5e-3),
        f"as_adapters = {adapters:.5g}: one base, and twenty adapters",
    )


# --- going further ---


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor of floats has that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        made_here = [t for t in tree_flatten(made)[0] if isinstance(t, Tensor)]
        sizes = [t.numel() for t in made_here if t.is_floating_point()]
        self.numel = max(self.numel, *sizes) if sizes else self.numel
        return made


def blocks_of(draw, width: int, frozen: bool) -> list[nn.Module]:
    """Two blocks, with random weights. In the second, the first layer may be frozen."""
    made = []
    for activation in (nn.GELU, nn.Tanh):
        block = nn.Sequential(
            nn.Linear(width, 3 * width), activation(), nn.Linear(3 * width, width)
        )
        with torch.no_grad():
            for p in block.parameters():
                p.copy_(draw.normal(*p.shape) / width**0.5)
        made.append(block)
    made[1][0].requires_grad_(not frozen)
    return made


def through(Again, blocks: list[nn.Module], x: Tensor, grad: Tensor, text: str):
    """Gradients of x and of all parameters, and the numbers kept; Again is None: plain PyTorch."""
    x, sizes = x.clone().requires_grad_(), []
    own = {p.data_ptr() for block in blocks for p in block.parameters()}
    for block in blocks:
        block.zero_grad()

    def note(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            sizes.append(t.numel())
        return t

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = x
            for block in blocks:
                y = block(y) if Again is None else done(Again.apply(y, block))
        y.backward(grad)
    except NotDone:
        raise
    except Exception as raised:
        likely = ""
        if "does not require grad" in str(raised):
            likely = "nothing was recorded: compute the block again under torch.enable_grad()"
        if "second time" in str(raised):
            likely = "the saved x has a history: cut it off with detach()"
        raise Wrong(
            f"the backward pass raises {type(raised).__name__}: {raised}\n  input     {text}"
            + (f"\n  likely    {likely}" if likely else "")
        ) from None
    return x.grad, [p.grad for block in blocks for p in block.parameters()], sum(sizes)


@exercise(
    "10.again",
    "x = ctx.saved_tensors[0].detach().requires_grad_() is a copy without a history.",
    "Under torch.enable_grad(): y = ctx.block(x). Then y.backward(grad), and x.grad is the result.",
)
def again(Again, draw):
    is_function = isinstance(Again, type) and issubclass(Again, torch.autograd.Function)
    ensure(is_function, "Again must be a class that inherits from torch.autograd.Function")
    for width, batch, frozen in ((4, (3,), False), (5, (2, 3), True), (1, (1,), False)):
        a, b = blocks_of(draw, width, frozen)
        x, grad = draw.normal(*batch, width), draw.normal(*batch, width)
        for chain, name in (
            ([a], "one block"), ([b], "one block"), ([a, b], "a chain of two blocks"),
            ([a, b, a], "a chain of three blocks, of which the first is also the last"),
        ):  # fmt: skip
            if chain == [b] and frozen:
                name += ", its first layer frozen"
            check_chain(Again, chain, x, grad, f"{name}, x {tuple(x.shape)}")
    a, _ = blocks_of(draw, 6, False)
    check_recomputed(Again, a, draw.normal(3, 6), draw.normal(3, 6))


def check_chain(Again, chain: list[nn.Module], x: Tensor, grad: Tensor, text: str) -> None:
    goal, goals, _ = through(None, chain, x, grad, text)
    goals = [g if g is None else g.clone() for g in goals]
    got, own, kept = through(Again, chain, x, grad, text)
    if got is None and not any(g is not None for g in own):
        raise NotDone
    ensure(got is not None, f"backward gives no gradient for x\n  input     {text}")
    mistakes = {"x gets its gradient twice: the saved x is x itself. Use detach()": 2 * goal}
    compare("the gradient of x", got, goal, text, mistakes)
    for i, (mine, right) in enumerate(zip(own, goals, strict=True)):
        what = f"the gradient of parameter {i % 4} of a block"
        if right is None:
            ensure(mine is None, f"a frozen parameter has a gradient\n  input     {text}")
            continue
        ensure(
            mine is not None,
            "the block's parameters have no gradient: call backward on the output, do not ask for "
            f"the gradient of x only\n  input     {text}",
        )
        compare(what, mine, right, text, {"it is added twice": 2 * right})
    most = len(chain) * x.numel()
    ensure(kept <= most, f"{kept} numbers are kept, expected {most}: the inputs of the blocks only")


def check_recomputed(Again, block: nn.Module, x: Tensor, grad: Tensor) -> None:
    """If the weights change after the forward pass, what is computed again follows."""
    other, x = copy.deepcopy(block), x.clone().requires_grad_()
    y = Again.apply(x, block)
    for p in (*block.parameters(), *other.parameters()):
        p.data.mul_(1.5)
    y.backward(grad)
    leaf = x.detach().clone().requires_grad_()
    other(leaf).backward(grad)
    ensure(
        is_close(x.grad, leaf.grad, 1e-4),
        "results of the forward pass were kept: backward must compute the whole block again from x",
    )


@exercise(
    "10.cards",
    "Each card has divided / n + activations. When is that at most card?",
    "If activations < card, n is divided / (card - activations), rounded up. Otherwise it is 0.",
)
def cards(cards, draw):
    size, activations = draw.integer(1, 9) * 10**9, draw.integer(1, 9) * 10**8
    cases = []
    for _ in range(6):
        full = draw.integer(2 * 10**9, 9 * 10**9)
        cases.append((draw.integer(10**9, 10**12), draw.integer(1, full - 10**9), full))
    cases += [
        (6 * (size - activations), activations, size),  # six cards, exactly full
        (6 * (size - activations) + 1, activations, size),  # one byte too many for six
        (5 * 10**8, 10**8, 10**9),  # one card
        (10**9, 10**9, 10**9), (10**9, 2 * 10**9, 10**9),  # activations alone fill a card
    ]  # fmt: skip
    for divided, activations, card in cases:
        free = card - activations
        mistakes = {}
        if free > 0:
            mistakes = {
                "it is rounded down, so it does not fit": divided // free,
                "it is rounded to the nearest": round(divided / free),
                "exactly full still fits": divided // free + 1,
                "activations are not divided": -(-(divided + activations) // card),
                "activations are missing": -(-divided // card),
                "there may be any number of cards, not only powers of two": 2
                ** math.ceil(math.log2(max(divided / free, 1))),
            }
        right = -(-divided // free) if free > 0 else 0
        expect(cards, (divided, activations, card), right, mistakes, 1e-9)


@exercise(
    "10.pieces",
    "Write a function that computes the summed loss of one piece, and call it through checkpoint.",
    'F.cross_entropy(h @ head.T, y, reduction="sum") for each piece; divide once, by all labels.',
)
def pieces(loss_in_pieces, draw):
    for t, v, d, n, skipped in (
        (60, 500, 4, 6, 7), (60, 500, 4, 1, 0), (7, 400, 2, 3, 3), (40, 300, 3, 40, 5),
        (50, 600, 4, 4, 0), (48, 500, 4, 2, 24),
    ):  # fmt: skip
        hidden, head = draw.normal(t, d), draw.normal(v, d)
        labels = draw.tokens(v, t)
        labels[:skipped] = -100  # a prompt
        check_pieces(loss_in_pieces, hidden, head, labels, n)


def check_pieces(loss_in_pieces, hidden: Tensor, head: Tensor, labels: Tensor, n: int) -> None:
    (t, d), v = hidden.shape, len(head)
    inputs = f"hidden ({t}, {d}), head ({v}, {d}), {(labels != -100).sum()} labels, n {n}"
    goal, goals = loss_and_gradients(hidden, head, labels)
    h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    given, sizes = {x.untyped_storage().data_ptr() for x in (h, w, labels)}, {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            sizes[storage.data_ptr()] = storage.nbytes() // 4
        return x

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            got = call(loss_in_pieces, h, w, labels, n)
        has_shape("the loss", got, (), inputs)
        cut = zip(hidden.chunk(n), labels.chunk(n), strict=True)
        parts = [F.cross_entropy(a @ head.T, b) for a, b in cut if (b != -100).any()]
        summed = goal * (labels != -100).sum()
        mistakes = {
            "the mean of the pieces' means: they have different numbers of labels": sum(parts) / n,
            "that is the sum, not the mean": summed,
            "labels of -100 are counted": summed / t,
        }
        compare("the loss", got, goal, inputs, mistakes)
        ensure(got.requires_grad, "the loss has no gradient. Was it detached?")
        call_backward(got, inputs)
    for name, x, right in (("hidden", h, goals[0]), ("head", w, goals[1])):
        ensure(x.grad is not None, f"{name} has no gradient\n  input     {inputs}")
        compare(f"the gradient of {name}", x.grad, 3 * right, inputs, tolerance=1e-4)
    most = max(-(-t // n) * v, v * d, t * d)
    ensure(
        largest.numel <= most,
        f"a tensor of {largest.numel:,} numbers is made, and the logits of one piece are {most:,}\n"
        f"  input     {inputs}\n  likely    there are fewer than n pieces",
    )
    if n > 1:
        kept = sum(sizes.values())
        ensure(
            kept < max(t * v / 3, 2 * v * d),
            f"{kept:,} numbers are kept until the backward pass, and all logits are {t * v:,}\n"
            f"  input     {inputs}\n"
            "  likely    checkpoint is missing, or the logits are made outside it",
        )


def call_backward(loss: Tensor, inputs: str) -> None:
    try:
        (3 * loss).backward()
    except Exception as raised:
        raise Wrong(
            f"backward() raises {type(raised).__name__}: {raised}\n  input     {inputs}"
        ) from None


def loss_and_gradients(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss = F.cross_entropy(h @ w.T, labels)
    loss.backward()
    return loss.detach(), [h.grad, w.grad]
