"""Lesson 05: P-tuning."""

import contextlib

import torch
from torch import nn

from minipeft import GPT, GPTConfig

from . import (
    Wrong,
    a_pair,
    answered,
    call,
    compare,
    done,
    ensure,
    exercise,
    expect,
    has_shape,
)


@exercise(
    "05.larger",
    "Which of the two has the larger numbers?",
    "A step of Adam has about the same size for both. To which of them does it matter less?",
)
def larger(larger, draw):
    mistakes = {"embeddings": "Their numbers are small, so small steps already change them."}
    answered(larger, "noise", mistakes, "Choose one of the two texts.")


@exercise(
    "05.mergeable",
    "What does each of the two change: the weights, or the input?",
    "A low-rank update is a matrix of the shape of W. Virtual tokens are more rows of the input.",
)
def mergeable(mergeable, draw):
    names = [mergeable] if isinstance(mergeable, str) and mergeable else mergeable
    ensure(
        isinstance(names, list | tuple | set | frozenset | str),
        f"mergeable must be a list of names, got {mergeable!r}",
    )
    names = {str(name).strip().lower() for name in names}
    known = {"lora", "prompt tuning"}
    ensure(names <= known, f"mergeable may only have the names in the question, got {mergeable!r}")
    ensure("lora" in names, "LoRA's update has the shape of W, so it can be added to W")
    ensure("prompt tuning" not in names, "virtual tokens change the input, not a W")


@exercise(
    "05.count",
    "What is trained: H, and three layers. What does the model need afterwards?",
    "H has 20 · 768 numbers, and so has P. A linear layer has 768 · 768 weights and 768 biases.",
)
def count(trained, kept, draw):
    layer = 768 * 768 + 768
    mistakes = {
        3 * layer: "H is trained as well.",
        20 * 768 + 3 * 768 * 768: "Each linear layer has a bias.",
        20 * 768 + layer: "The MLP has three layers.",
        20 * 768 + 2 * layer: "The MLP has three layers.",
        2 * 20 * 768 + 3 * layer: "P is computed, not trained.",
        20 * (768 + 3 * layer): "All rows of H go through the same network.",
        20 * 768: "That is P. Here P is computed by the network.",
    }
    answered(trained, 20 * 768 + 3 * layer, mistakes, "trained: H and three linear layers.")
    mistakes = {
        20 * 768 + 3 * layer: "The network is removed.",
        3 * layer: "The network is removed.",
        2 * 20 * 768: "H is removed too: only P is kept.",
        768: "That is one virtual token.",
    }
    answered(kept, 20 * 768, mistakes, "kept: P, one row per virtual token.")


@exercise(
    "05.my_p_tuning",
    "self.H = nn.Parameter(torch.randn(p, d)); self.network = nn.Sequential(nn.Linear(d, w), …).",
    "Five modules in self.network: Linear, ReLU, Linear, ReLU, Linear. "
    "forward returns self.network(self.H).",
)
def my_p_tuning(MyPTuning, draw):
    for p, d, w in ((5, 4, 6), (1, 3, 3), (2, 6, 2)):
        inputs = f"MyPTuning(p={p}, d={d}, w={w})"
        with _nan_in_empty_tensors():
            module, other = call(MyPTuning, p, d, w), call(MyPTuning, p, d, w)
        P, H = module(), getattr(module, "H", None)
        ensure(P is not None or H is None, "forward returns None: is a `return` missing?")
        done(P)
        H = getattr(H, "weight", H)
        ensure(isinstance(H, nn.Parameter), "self.H must be a Parameter")
        has_shape("self.H", H, (p, d), inputs)
        _is_noise(H, getattr(other.H, "weight", other.H))
        network = getattr(module, "network", None)
        ensure(isinstance(network, nn.Module), "self.network must be a module")
        linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
        shapes = [(m.in_features, m.out_features) for m in linear]
        expected = [(d, w), (w, w), (w, d)]
        ensure(
            shapes == expected,
            f"the linear layers map {shapes}, expected {expected}\n  input     {inputs}",
        )
        biases = all(m.bias is not None for m in linear)
        ensure(biases, "each linear layer must have a bias")
        has_shape("P", P, (p, d), inputs)
        ensure(
            P.requires_grad,
            "no gradient flows from P back to H: no detach() or no_grad() in forward",
        )
        _values(module, H, linear, draw, inputs)
        _gradients(module, H, linear, draw)


@contextlib.contextmanager
def _nan_in_empty_tensors():
    """In here, torch.empty gives tensors of NaN, so that numbers that were never set show."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _is_noise(H, other):
    """Whether H is random: in each row, and in each module."""
    ensure(bool(H.isfinite().all()), "self.H has numbers that were never set, or are not finite")
    ensure(
        len(H.unique()) == H.numel(), "self.H must start as noise: some of its numbers are equal"
    )
    ensure(
        not torch.equal(H, other),
        "self.H must start as noise: two modules start with the same H. Set no seed in __init__",
    )


def _values(module, H, linear, draw, inputs):
    """P for random weights."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(draw.normal(*parameter.shape))
        got = module()
        one, two, three = linear
        first = one(H)
        hidden = two(first.relu())
        P = three(hidden.relu())
        mistakes = {
            "ReLU is missing": three(two(first)),
            "the first ReLU is missing": three(two(first).relu()),
            "the second ReLU is missing": three(hidden),
            "there is no ReLU after the last layer": P.relu(),
            "that is H: the network is not used": H,
            "H is added to the output": P + H,
            "tanh instead of ReLU": three(two(first.tanh()).tanh()),
        }
        compare("P", got, P, inputs, mistakes)


def _gradients(module, H, linear, draw):
    with torch.no_grad():  # all ReLUs are open, so that every number matters
        for parameter in module.parameters():
            parameter.copy_(draw.normal(*parameter.shape).abs() + 0.1)
    module.zero_grad()
    module().square().sum().backward()
    allowed = {id(H)} | {id(p) for layer in linear for p in layer.parameters()}
    for name, parameter in module.named_parameters():
        ensure(id(parameter) in allowed, f"{name} is one parameter too many")
        ensure(
            parameter.grad is not None and bool(parameter.grad.all()),
            f"{name} gets no gradient. Was something detached or copied in forward?",
        )
    names = {id(parameter) for parameter in module.parameters()}
    ensure(allowed <= names, "H and all three linear layers with biases must be parameters")


@exercise(
    "05.keep",
    "The model needs the output of the network, not what goes in. "
    "Which mode of a module makes dropout inactive?",
    "Call network.eval(), then network(H), and cut the result off the graph with detach().",
)
def keep(keep, draw):
    for p, d, w in ((5, 4, 6), (1, 3, 2)):
        for dropout in (0.0, 0.5):
            layers = nn.Linear(d, w), nn.Dropout(dropout), nn.ReLU(), nn.Linear(w, d)
            network, H = nn.Sequential(*layers), nn.Parameter(draw.normal(p, d))
            inputs = f"H {(p, d)}, a network in training mode with dropout {dropout}"
            network.eval()
            P = network(H).detach()
            network.train()
            got = call(keep, H, network)
            has_shape("P", got, (p, d), inputs)
            mistakes = {
                "that is the input of the network": H.detach(),
                "H is added to the output": P + H.detach(),
            }
            if dropout and not torch.allclose(got, P, atol=1e-5):
                ensure(
                    torch.allclose(got, H, atol=1e-5),
                    "P is random: dropout was active. Set the network to evaluation mode",
                )
            compare("P", got.detach(), P, inputs, mistakes)
            ensure(
                not got.requires_grad,
                "P needs a gradient, or keeps the network in its graph: detach it",
            )


@exercise(
    "05.rows",
    "An MLP maps a row of H to a row of P. Does it see other rows?",
    "An LSTM passes on what it has read. This one goes from the first row to the last, "
    "and from the last to the first.",
)
def rows(mlp_rows, lstm_rows, draw):
    texts = {
        "mlp_rows": "the MLP maps each row separately; change one, and which output changes?",
        "lstm_rows": "the LSTM reads from both ends, so what is in the last row reaches all others",
    }
    for what, got, right in (
        ("mlp_rows", mlp_rows, [4]),
        ("lstm_rows", lstm_rows, [0, 1, 2, 3, 4]),
    ):
        try:
            numbers = sorted(int(i) for i in got)
        except (TypeError, ValueError):
            numbers = None
        ensure(numbers is not None, f"{what} must be a list of rows, got {got!r}")
        ensure(
            set(numbers) <= set(range(5)), f"{what}: rows count from 0, so the last is 4: {got!r}"
        )
        ensure(numbers == right, f"{what} = {got}: {texts[what]}")


@exercise(
    "05.paired",
    "Take the difference of each pair first: a[i] - b[i], for the same seed.",
    "The mean is their sum divided by their number. Then count those that are above 0.",
)
def paired(paired, draw):
    cases = [([1.0, 1.0, 0.5], [0.5, 1.0, 0.875]), ([0.5], [0.25]), ([0.25, 0.25], [0.25, 1.0])]
    for n in (4, 7):
        cases.append((draw.normal(n).tolist(), draw.normal(n).tolist()))
    for a, b in cases:
        differences = [x - y for x, y in zip(a, b, strict=True)]
        mean, ahead = sum(differences) / len(a), sum(x > 0 for x in differences)
        inputs = f"a {[round(x, 3) for x in a]}, b {[round(x, 3) for x in b]}"
        got_mean, got_ahead = a_pair(call(paired, a, b))
        mistakes = {
            "that is b - a": -mean,
            "that is the sum: divide by the number of seeds": sum(differences),
            "these are absolute differences": sum(map(abs, differences)) / len(a),
            "that is the mean of a": sum(a) / len(a),
            "that is the number of seeds: the mean comes first": ahead,
        }
        compare("the mean difference", got_mean, mean, inputs, mistakes)
        mistakes = {
            "ties do not count": sum(x >= 0 for x in differences),
            "these are the seeds in which b is ahead": sum(x < 0 for x in differences),
            "that is a share: return the number": ahead / len(a),
        }
        compare("the number of seeds", got_ahead, ahead, inputs, mistakes)


@exercise(
    "05.deep_prompt",
    "Split d into (h, k) with view, and only then exchange h and p: "
    "(l, 2, p, h, k) becomes (l, 2, h, p, k).",
    "Every layer needs b rows: insert a dimension of 1 for b, and expand it to len(ids). "
    "Then past_key_values is [(k, v) for k, v in past].",
)
def deep_prompt(deep_prompt, draw):
    with torch.no_grad():
        _deep_prompt_values(deep_prompt, draw)
    P = draw.normal(2, 2, 3, 8).requires_grad_()
    model, ids = _small_gpt(2, 2), draw.tokens(19, 2, 4)
    logits = deep_prompt(model, P, ids)
    logits = getattr(logits, "logits", logits)
    ensure(logits.requires_grad, "no gradient reaches P: no detach() or no_grad() here")
    logits.square().sum().backward()
    ensure(
        P.grad is not None and bool(P.grad.flatten(2).any(dim=2).all()),
        "a part of P gets no gradient, so it cannot be trained: no detach() or no_grad() here",
    )


def _deep_prompt_values(deep_prompt, draw):
    for n_layer, n_head, p, b, t in ((2, 2, 3, 2, 4), (1, 1, 1, 1, 1), (3, 4, 2, 3, 2)):
        model = _small_gpt(n_layer, n_head)
        P, ids = draw.normal(n_layer, 2, p, 8), draw.tokens(19, b, t)
        inputs = f"P {tuple(P.shape)}, ids {(b, t)}, {n_head} heads"
        right = _deep(model, P, ids)
        try:
            got = call(deep_prompt, model, P, ids)
        except Wrong as wrong:
            missing = b > 1 and "Sizes of tensors must match" in str(wrong)
            likely = f"\n  likely    expand keys and values to the {b} texts: (b, h, p, k)"
            raise Wrong(f"{wrong}{likely * missing}") from None
        got = getattr(got, "logits", got)
        has_shape("the logits", got, tuple(right.shape), inputs)
        mistakes = {
            "P is not used": model(ids).logits,
            "keys come first, then values": _deep(model, P.flip(1), ids),
            "layer 0 gets P[0], not the last layer": _deep(model, P.flip(0), ids),
            "all layers get P[0]": _deep(model, P[:1].expand_as(P), ids),
            "the virtual tokens are in reverse order": _deep(model, P.flip(2), ids),
            "a view alone mixes up tokens and heads: view as (p, h, k), then transpose": _deep(
                model, P, ids, mixed_up=True
            ),
        }
        if n_layer == 1:  # nothing to mix up
            mistakes = {"P is not used": mistakes["P is not used"]}
        compare("the logits", got, right, inputs, mistakes, tolerance=1e-4)


def _small_gpt(n_layer, n_head):
    config = GPTConfig(vocab_size=19, n_positions=12, n_embd=8, n_layer=n_layer, n_head=n_head)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = GPT(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.mul_(4)  # so that the prompts matter
    return model


def _deep(model, P, ids, mixed_up=False):
    h = model.config.n_head
    past = []
    for keys, values in P:
        p, d = keys.shape
        pair = []
        for each in (keys, values):
            heads = each.reshape(h, p, d // h) if mixed_up else each.view(p, h, -1).transpose(0, 1)
            pair.append(heads.expand(len(ids), -1, -1, -1))
        past.append(tuple(pair))
    return model(ids, past_key_values=past).logits


@exercise(
    "05.smallest_rank",
    "Write down both numbers of parameters. LoRA of rank r on a d × d matrix has r · 2 d.",
    "P-tuning: p · d + 3 (d² + d). LoRA: layers · 4 · 2 d per rank. Divide, and round up.",
)
def smallest_rank(smallest_rank, draw):
    cases = [
        (768, 12, 20),
        (4096, 32, 20),
        (8, 1, 1),
        (8, 1, 5),
        (128, 4, 20),
        (64, 48, 1),
        (4, 1, 4),
    ]
    cases += [(draw.integer(2, 500), draw.integer(1, 30), draw.integer(1, 99)) for _ in range(4)]
    for d, layers, p in cases:
        ours, rank_1 = p * d + 3 * (d * d + d), layers * 8 * d
        rank = -(-ours // rank_1)
        mistakes = {
            "each linear layer of the MLP has a bias": -(-(p * d + 3 * d * d) // rank_1),
            "rounded down: that rank trains fewer": ours // rank_1,
            "H is trained as well": -(-(ours - p * d) // rank_1),
            "there are four matrices in each layer": -(-ours // (layers * 2 * d)),
            "LoRA has A and B": -(-ours // (layers * 4 * d)),
            "LoRA is in every layer": -(-ours // (8 * d)),
            "at equal numbers the rank is large enough": ours // rank_1 + 1,
            "the rank is a whole number: round up": ours / rank_1,
        }
        expect(smallest_rank, (d, layers, p), rank, mistakes)
