"""What is graded in prefix_tuning.py."""

import math
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.gpt import GPT

from .. import skeleton
from ..judge import Checks, load
from ..symptoms import Draw, Wrong, ensure, like, same, show, unchanged
from .check_prompt_tuning import VOCAB, padded, stored_gpt, tiny_gpt
from .common import compare_losses, describe, losses

CHECKS = Checks("prefix_tuning")
# b, t, p, l, h, k: from the smallest case to larger ones.
CASES = ((1, 1, 3, 1, 1, 2), (1, 2, 3, 2, 1, 4), (2, 3, 5, 2, 3, 4), (3, 4, 2, 3, 2, 5))
values, reference = {}, None


def prepare(level: str, given: dict | None) -> None:
    """Read what the checks of a level need, as long as minipeft can be imported."""
    global reference
    if level == "values":
        values.update(given or skeleton.stored("prefix_tuning"))
    if level == "losses":
        describe()
        reference = load("reference", skeleton.reference("prefix_tuning").read_text(), "reference")


class Toy(nn.Module):
    """A model with l layers, h key/value heads of width k, and a cache. It has no attention."""

    def __init__(self, l: int, h: int, k: int):  # noqa: E741
        super().__init__()
        self.words = nn.Embedding(
            VOCAB, h * k + 1
        )  # with grouped queries, d = h k is not its width
        self.shape = l, h, k

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, input_ids=None, past_key_values=None, use_cache=False):
        l, h, k = self.shape  # noqa: E741
        pair = (torch.zeros(*input_ids.shape, h, k).transpose(1, 2),) * 2
        return SimpleNamespace(past_key_values=(pair,) * l)


class RenamedToy(Toy):
    """transformers plans to rename the argument."""

    def forward(self, input_ids=None, cache=None, use_cache=False):
        return SimpleNamespace(cache=super().forward(input_ids).past_key_values)


class Layers:
    """A cache like transformers'."""

    def __init__(self):
        self.layers = []

    def update(self, keys: Tensor, values: Tensor, i: int) -> None:
        ensure(i == len(self.layers), f"layer {i} comes after {len(self.layers)} layers")
        self.layers.append((keys, values))


class Case:
    """A prefix with known values, P or H, W_1, b_1, W_2, b_2, and the inputs of a model."""

    def __init__(self, m: ModuleType, draw: Draw, sizes: tuple, network: bool = False, toy=Toy):
        self.b, self.t, self.p, self.l, self.h, self.k = sizes
        self.d = self.h * self.k
        self.w = 2 * self.l * self.d + self.p + 1  # no other size is equal to it
        self.model = toy(self.l, self.h, self.k)
        self.ids = draw.tokens(VOCAB, self.b, self.t)
        options = {"prefix_projection": True, "encoder_hidden_size": self.w} if network else {}
        self.encoder = encoder_of(m, self.model, self.p, **options)
        shapes = network_shapes(self.p, self.d, self.w, self.l)
        if not network:
            shapes = {"P": (self.p, 2 * self.l * self.d)}
        self.tensors = {name: draw.normal(*shape) for name, shape in shapes.items()}
        set_parameters(self.encoder, self.tensors)
        self.P = prefix_of(self.tensors)
        self.text = f"b {self.b}, p {self.p}, l {self.l}, h {self.h}, k {self.k}"

    def pairs(self, P: Tensor) -> list[tuple[Tensor, Tensor]]:
        """K_i and V_i of each layer, entry by entry."""
        return split(P, self.b, self.l, self.h, self.k)

    def prepended(self, **inputs) -> dict:
        ids = {"input_ids": self.ids} if "inputs_embeds" not in inputs else {}
        got = self.encoder.prepend(self.model, **ids, **inputs)
        ensure(isinstance(got, dict), f"prepend must return a dict, got {type(got).__name__}")
        return got

    def entry(self, name: str, value: Tensor) -> Tensor:
        """What prepend makes of an input. The input itself must not change."""
        before = value.clone()
        got = self.prepended(**{name: value}).get(name)
        ensure(isinstance(got, Tensor), f"{name} is missing in the inputs ({self.text})")
        unchanged(f"the {name} that was passed", before, value)
        return got


def cases(m: ModuleType, draw: Draw, network: bool = False) -> list[Case]:
    drawn = (draw.integer(2, 3), draw.integer(2, 6), draw.integer(7, 8), draw.integer(4, 5),
             draw.integer(2, 3), draw.integer(5, 6))  # fmt: skip
    return [Case(m, draw, sizes, network) for sizes in (*CASES, drawn)]


def encoder_of(m: ModuleType, model: nn.Module, p: int, **options) -> nn.Module:
    return m.PrefixEncoder(model, m.PrefixTuningConfig(num_virtual_tokens=p, **options))


def network_shapes(p: int, d: int, w: int, l: int) -> dict[str, tuple]:  # noqa: E741
    out = 2 * l * d
    return {"H": (p, d), "W_1": (w, d), "b_1": (w,), "W_2": (out, w), "b_2": (out,)}


def prefix_of(tensors: dict[str, Tensor]) -> Tensor:
    """Equation (2), (p, 2 l d)."""
    if "P" in tensors:
        return tensors["P"]
    H, W_1, b_1, W_2, b_2 = tensors.values()
    return torch.tanh(H @ W_1.T + b_1) @ W_2.T + b_2


def split(P: Tensor, b: int, l: int, h: int, k: int) -> list[tuple[Tensor, Tensor]]:  # noqa: E741
    """Keys and values of each layer, both (b, h, p, k), from the columns of P."""
    blocks = []
    for i in range(2 * l):
        heads = [P[:, (i * h + j) * k : (i * h + j + 1) * k] for j in range(h)]  # each (p, k)
        blocks.append(torch.stack([torch.stack(heads)] * b))
    return [(blocks[2 * i], blocks[2 * i + 1]) for i in range(l)]


def parameters_by_shape(encoder: nn.Module, shapes: dict[str, tuple]) -> dict[str, nn.Parameter]:
    """The parameters H, W_1, … or P, however the file names them; a matrix may be transposed."""
    remaining, found = dict(encoder.named_parameters()), {}
    for name, shape in shapes.items():
        sizes = {n: tuple(q.shape[1:] if q.dim() == 3 else q.shape) for n, q in remaining.items()}
        fits = [n for n, size in sizes.items() if size in (shape, shape[::-1])]
        exact = [n for n in fits if sizes[n] == shape] or fits
        there = ", ".join(f"{n} {tuple(q.shape)}" for n, q in encoder.named_parameters())
        ensure(exact, f"there is no parameter {name} of the shape {shape}; there are {there}")
        found[name] = remaining.pop(exact[0])
    ensure(not remaining, f"besides {', '.join(shapes)}, there is {', '.join(remaining)}")
    return found


@torch.no_grad()
def set_parameters(encoder: nn.Module, tensors: dict[str, Tensor]) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    for name, parameter in parameters_by_shape(encoder, shapes).items():
        oriented(parameter, shapes[name]).copy_(tensors[name])


def oriented(tensor: Tensor, shape: tuple) -> Tensor:
    """A parameter, which a file may store as (1, …) or transposed, in this shape."""
    tensor = tensor[0] if tensor.dim() == 3 else tensor
    return tensor if tuple(tensor.shape) == shape else tensor.T


def random_start(name: str, parameter: nn.Parameter, again: nn.Parameter) -> None:
    ensure(parameter.requires_grad, f"{name} is not trainable: it must require a gradient")
    ensure(parameter.isfinite().all(), f"{name} has entries that are not finite")
    ensure(parameter.any(), f"{name} starts at zero: it must be random")
    ensure(parameter.unique().numel() > parameter.numel() // 2, f"{name} is not random: "
           f"{show(parameter)}")  # fmt: skip
    ensure(not torch.equal(parameter, again), f"{name} starts with the same values every time")
    if parameter.numel() > 60:
        std = parameter.std().item()
        ensure(1e-5 < std < 5, f"{name} starts with a standard deviation of {std:.2g}")


@CHECKS.add("pieces", "prefix")
def prefix(m: ModuleType, draw: Draw) -> None:
    for _, _, p, layers, h, k in (*CASES, (1, 1, draw.integer(7, 9), 4, 2, draw.integer(5, 6))):
        model, shape = Toy(layers, h, k), (p, 2 * layers * h * k)
        found = [parameters_by_shape(encoder_of(m, model, p), {"P": shape}) for _ in range(2)]
        random_start("P", found[0]["P"], found[1]["P"])
        prompt = encoder_of(m, model, p).prompt(1)
        like("P for one example", prompt, torch.zeros(1, *shape))


@CHECKS.add("pieces", "network")
def network(m: ModuleType, draw: Draw) -> None:
    for sizes in CASES:
        _, _, p, layers, h, k = sizes
        d = h * k
        for w in (2 * layers * d + p + 1, None):
            shapes = network_shapes(p, d, w or d, layers)
            options = {"prefix_projection": True, "encoder_hidden_size": w}
            made = [encoder_of(m, Toy(layers, h, k), p, **options) for _ in range(2)]
            found = [parameters_by_shape(e, shapes) for e in made]
            for name, parameter in found[0].items():
                if name in ("H", "W_1", "W_2"):
                    random_start(name, parameter, found[1][name])
                ensure(parameter.requires_grad, f"{name} is not trainable")
        compare_prompt(Case(m, draw, sizes, True), 1)


def compare_prompt(case: Case, b: int) -> None:
    """prompt(b) is equation (2), and its gradients are right."""
    got = case.encoder.prompt(b)
    expected, guesses = case.P.expand(b, -1, -1), {}
    if "H" in case.tensors:
        H, W_1, b_1, W_2, b_2 = case.tensors.values()
        hidden = H @ W_1.T + b_1
        wrong = {
            "the tanh is missing": hidden, "it has a ReLU instead of the tanh": F.relu(hidden),
            "it has a GELU instead of the tanh": F.gelu(hidden),
            "it has a sigmoid instead of the tanh": hidden.sigmoid(),
            "the tanh is applied twice": hidden.tanh().tanh(),
            "b_1 is missing": (hidden - b_1).tanh(),
        }  # fmt: skip
        guesses = {name: (x @ W_2.T + b_2).expand(b, -1, -1) for name, x in wrong.items()}
        guesses |= {
            "b_2 is missing": expected - b_2, "a tanh follows W_2, and must not": expected.tanh(),
            "the tanh is after W_2, and must be before it": (
                (hidden @ W_2.T + b_2).tanh().expand(b, -1, -1)
            ),
        }  # fmt: skip
    first = torch.zeros_like(expected)
    first[0] = case.P
    guesses["only the first example has a prefix"] = first
    guesses["its entries are mixed: every example must have all of P"] = case.P.repeat_interleave(
        b, 0
    ).view_as(expected)
    same("prompt(b)", got, expected, guesses=guesses, case=f"prompt({b}), {case.text}")


def compare_gradients(
    what: str, draw: Draw, encoder: nn.Module, tensors: dict[str, Tensor], mine, theirs
) -> None:
    """The gradients of a random sum of `mine()` and of `theirs(P)`, for every parameter."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    found = parameters_by_shape(encoder, shapes)
    got, expected = mine(), theirs(prefix_of(leaves))
    weights = [draw.normal(*y.shape) for y in expected]
    for ys in (got, expected):
        total = sum((y * g).sum() for y, g in zip(ys, weights, strict=True))
        if total.requires_grad:
            total.backward()
    for name, parameter in found.items():
        ensure(parameter.grad is not None, f"{name} gets no gradient from {what}: is it detached?")
        same(f"the gradient of {name} from {what}", oriented(parameter.grad, shapes[name]),
             leaves[name].grad, 1e-4)  # fmt: skip


@CHECKS.add("pieces", "prompt")
def prompt(m: ModuleType, draw: Draw) -> None:
    for has_network in (False, True):
        for case in cases(m, draw, has_network):
            ensure(case.encoder.prompt().dim() == 3, "prompt(b) must be (b, p, 2 l d), also for "
                   "one example")  # fmt: skip
            compare_prompt(case, 1)
            compare_prompt(case, case.b + 1)
            compare_gradients("prompt(b)", draw, case.encoder, case.tensors,
                              lambda e=case.encoder: [e.prompt(3)],
                              lambda P: [P.expand(3, -1, -1)])  # fmt: skip


def wrong_pairs(case: Case) -> dict[str, list]:
    """What likely mistakes make of P. Only those of the right shape say anything."""
    P, (b, p, n, h, k) = case.P, (case.b, case.p, 2 * case.l, case.h, case.k)
    flat = torch.stack([P] * b)  # (b, p, 2 l h k)
    blocks = [block for pair in case.pairs(P) for block in pair]

    def paired(kv: Tensor) -> list:
        return list(zip(kv[0::2], kv[1::2], strict=True))

    return {
        "keys and values are swapped": [(v, key) for key, v in case.pairs(P)],
        "the order is K_0, V_0, K_1, V_1, … and not all keys and then all values": list(
            zip(blocks[: n // 2], blocks[n // 2 :], strict=True)
        ),
        "the layers are in reverse order": case.pairs(P)[::-1],
        "every layer has the prefix of layer 0": [case.pairs(P)[0]] * case.l,
        "every layer has the prefix of the last one": [case.pairs(P)[-1]] * case.l,
        "the values are the keys": [(key, key) for key, _ in case.pairs(P)],
        "the keys are the values": [(v, v) for _, v in case.pairs(P)],
        "heads and width are swapped: a row of P has k numbers of head 0 first": paired(
            flat.view(b, p, n, k, h).permute(2, 0, 4, 1, 3)
        ),
        "the dimensions are only renamed by view: move p and h with permute": paired(
            flat.view(b, p, n, h, k).permute(2, 0, 1, 3, 4).reshape(n, b, h, p, k)
        ),
        "the entries are mixed: view must split the last dimension only": paired(
            flat.reshape(n, b, h, p, k)
        ),
        "the entries are mixed: view must split the last dimension only ": paired(
            flat.reshape(n, b, p, h, k).permute(0, 1, 3, 2, 4)
        ),
        "layers and heads are interleaved: a layer's d numbers are in one piece": paired(
            flat.view(b, p, h, n, k).permute(3, 0, 2, 1, 4)
        ),
        "the last dimension is split into (k, …), and must be split into (2 l, h, k)": paired(
            flat.view(b, p, h, k, n).permute(4, 0, 2, 1, 3)
        ),
        "the rows of P are in reverse order": [(x.flip(2), y.flip(2)) for x, y in case.pairs(P)],
        "a layer has (2, …) after its heads: the order is K_0, V_0 of all heads": paired(
            flat.view(b, p, n // 2, h, 2, k).permute(2, 4, 0, 3, 1, 5).reshape(n, b, h, p, k)
        ),
    }


def compare_pairs(what: str, got, case: Case, P: Tensor, guess: bool = True) -> None:
    """A cache: a pair of keys and values for each layer."""
    expected = case.pairs(P)
    ensure(isinstance(got, tuple | list), f"{what} must be a tuple of pairs, got "
           f"{type(got).__name__}")  # fmt: skip
    ensure(len(got) == case.l, f"{what} has {len(got)} entries, expected a pair for each of the "
           f"{case.l} layers ({case.text})")  # fmt: skip
    ensure(all(len(pair) == 2 for pair in got), f"an entry of {what} is not a pair")
    for i, pair in enumerate(got):
        for part, tensor, right in zip(("keys", "values"), pair, expected[i], strict=True):
            ensure(isinstance(tensor, Tensor), f"the {part} are no tensor")
            swapped = tensor.dim() == 4 and tensor.transpose(1, 2).shape == right.shape
            hint = ": the heads come before the virtual tokens, (b, h, p, k)" * swapped
            if tensor.dim() == 4 and tensor.transpose(1, 3).shape == right.shape != tensor.shape:
                hint = ": heads and width are swapped, expected (b, h, p, k)"
            sizes = f"{tuple(tensor.shape)}, expected {tuple(right.shape)}"
            ensure(tensor.shape == right.shape, f"the {part} of layer {i} have the shape {sizes}"
                   f"{hint} ({case.text})")  # fmt: skip

    def joined(pairs) -> Tensor:
        return torch.stack([torch.stack(tuple(pair)) for pair in pairs])

    guesses = wrong_pairs(case) if guess else {}
    same(what, joined(got), joined(expected), case=case.text,
         guesses={name: joined(pairs) for name, pairs in guesses.items()})  # fmt: skip


@CHECKS.add("pieces", "past")
def past(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        compare_pairs("past", case.encoder.past(case.model, case.b), case, case.P)
        compare_gradients(
            "past", draw, case.encoder, case.tensors,
            lambda c=case: [x for pair in c.encoder.past(c.model, c.b) for x in pair],
            lambda P, c=case: [x for pair in c.pairs(P) for x in pair],
        )  # fmt: skip
        case.encoder.cache_class = Layers  # as with a model of transformers
        cache = case.encoder.past(case.model, case.b)
        ensure(isinstance(cache, Layers), "pairs must not be returned: the lines below do that")
        compare_pairs("a cache of transformers", cache.layers, case, case.P)
    half = Toy(2, 3, 4).to(torch.bfloat16)
    dtype = encoder_of(m, half, 2).past(half, 1)[0][0].dtype
    ensure(dtype == torch.bfloat16, f"the keys for a bfloat16 model are {dtype}")


@CHECKS.add("pieces", "cache")
def cache(m: ModuleType, draw: Draw) -> None:
    for toy, name in ((Toy, "past_key_values"), (RenamedToy, "cache")):
        for sizes in CASES:
            case = Case(m, draw, sizes, toy=toy)
            labels, embeds = case.ids.clone(), draw.normal(case.b, case.t, case.d + 1)
            got = case.prepended(labels=labels, use_cache=True)
            check_cache(case, got, name)
            ids = got.get("input_ids")
            ensure(ids is not None, "input_ids are missing in the inputs")
            same("inputs['input_ids']", ids, case.ids, case="they must stay as they are")
            label = got.get("labels")
            ensure(label is not None, "labels are missing in the inputs")
            ensure(label.shape == labels.shape, f"labels have the shape {tuple(label.shape)}, "
                   f"expected {tuple(labels.shape)}: no token was added, so they stay as they "
                   "are")  # fmt: skip
            same("inputs['labels']", label, labels, case="they must stay as they are")
            ensure(got.get("use_cache") is True, "the other arguments are missing, as use_cache")
            got = case.prepended(inputs_embeds=embeds)
            check_cache(case, got, name)
            ensure(got.get("input_ids") is None, "there must be no input_ids with inputs_embeds")
            ensure(got.get("inputs_embeds") is not None, "inputs_embeds are missing in the inputs")
            same(
                "inputs['inputs_embeds']",
                got["inputs_embeds"],
                embeds,
                case="they must stay as they are",
            )
            compare_gradients(
                "the cache", draw, case.encoder, case.tensors,
                lambda c=case, n=name: [x for pair in c.prepended()[n] for x in pair],
                lambda P, c=case: [x for pair in c.pairs(P) for x in pair],
            )  # fmt: skip
            zero = torch.zeros_like(case.P)
            set_parameters(case.encoder, {"P": zero})
            check_cache(case, case.prepended(), name, zero)


def check_cache(case: Case, inputs: dict, name: str, P: Tensor | None = None) -> None:
    """The prefix is in the inputs under the name of the model's argument."""
    zero = P is not None
    other = next((n for n in ("cache", "past_key_values") if n != name and n in inputs), None)
    ensure(not other, f"the model has an argument {name}, and none with the name {other}")
    text = "a prefix of zeros is not in the inputs: zero keys still take attention"
    ensure(inputs.get(name) is not None, text if zero else f"{name} is missing in the inputs: the "
           "prefix is not passed to the model")  # fmt: skip
    compare_pairs(name, inputs[name], case, P if zero else case.P, guess=False)


@CHECKS.add("pieces", "attention_mask")
def attention_mask(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        for mask in padded(case):
            got = case.entry("attention_mask", mask)
            expected = (case.b, case.p + case.t)
            ensure(tuple(got.shape) == expected, f"attention_mask has the shape "
                   f"{tuple(got.shape)}, expected {expected}: it has an entry for each of the "
                   f"p + t keys ({case.text})")  # fmt: skip
            one = torch.ones(case.b, case.p, dtype=torch.long)
            guesses = {
                "nothing attends to the prefix: it needs a 1": torch.cat((0 * one, mask), 1),
                "the p new entries are on the right: the prefix comes first": torch.cat(
                    (mask, one), 1
                ),
                "there are p zeros on the right: the prefix comes first, and needs a 1": torch.cat(
                    (mask, 0 * one), 1
                ),
                "padding is lost: every entry is 1": torch.ones(expected),
            }
            same("inputs['attention_mask']", got.double(), torch.cat((one, mask), 1).double(),
                 guesses=guesses, case=f"{case.text}, mask {mask.tolist()}")  # fmt: skip


@CHECKS.add("pieces", "position_ids")
def position_ids(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        rows = torch.stack([(torch.arange(case.t) - i).clamp(min=0) for i in range(case.b)])
        for positions in (rows, torch.arange(case.t)[None], rows + 20):
            got = case.entry("position_ids", positions)
            p, t, expected = case.p, case.t, positions + case.p
            ensure(got.shape[-1] != p + t, "position_ids have p + t entries, expected t: the "
                   "prefix has no tokens, so it needs none")  # fmt: skip
            if len(positions) == 1 and len(got) == case.b:
                expected = expected.expand(case.b, -1)  # one row per example is the same
            guesses = {
                "p must be added to them": positions, "p must be added, and not subtracted": (
                    positions - p),
                "p must be added to them, and not t": positions + t,
                "p must be added to them, and not p - 1": positions + p - 1,
                "p must be added to them, and not p + 1": positions + p + 1,
                "p must be added to them, and not 2 p": positions + 2 * p,
                "the positions that were passed are ignored": torch.arange(p, p + t).expand_as(
                    expected),
            }  # fmt: skip
            same("inputs['position_ids']", got, expected, guesses=guesses,
                 case=f"{case.text}, position_ids {positions.tolist()}")  # fmt: skip


@CHECKS.add("pieces", "keep_output")
def keep_output(m: ModuleType, draw: Draw) -> None:
    for has_network in (True, False):
        for case in cases(m, draw, has_network):
            encoder, P = case.encoder, case.P
            encoder.keep_output()
            names = [name for name, q in encoder.named_parameters() if q.requires_grad]
            stored = sum(t.numel() for t in encoder.state_dict().values())
            if has_network:
                H = case.tensors["H"]
                kept = any(t.shape == H.shape and torch.equal(t, H)
                           for t in encoder.state_dict().values())  # fmt: skip
                if kept and stored == H.numel():
                    raise Wrong("self.embedding keeps H, and must keep the network's output P")
            try:
                got = encoder.prompt(2)
            except RuntimeError as error:
                raise Wrong("prompt(b) fails after keep_output(): it must give P without the "
                            f"network ({str(error).splitlines()[0]})") from error  # fmt: skip
            wrong = {}
            if has_network:
                _, W_1, b_1, W_2, b_2 = case.tensors.values()
                if P.shape[1] == W_1.shape[1]:
                    again = prefix_of({"H": P, "W_1": W_1, "b_1": b_1, "W_2": W_2, "b_2": b_2})
                    wrong["the network is applied twice"] = again.expand(2, -1, -1)
            same("prompt(b) after keep_output()", got, P.expand(2, -1, -1), guesses=wrong,
                 case=f"with the network, {case.text}" if has_network else case.text)  # fmt: skip
            ensure(stored == P.numel(), f"{stored} numbers are stored after keep_output(), "
                   f"expected the {P.numel()} of P: the network must go")  # fmt: skip
            ensure(not names, f"{', '.join(names)} is trainable after keep_output(): P is frozen")
            ensure(not got.requires_grad, "P still requires a gradient after keep_output()")


# The layer: with a GPT.


def attend(model: GPT, ids: Tensor, pairs, mask: Tensor | None = None) -> Tensor:
    """The logits of a GPT with equation (1) in every layer; positions p … p + t - 1."""
    net, (b, t), h = model.transformer, ids.shape, model.config.n_head
    p = pairs[0][0].shape[2]
    allowed = torch.ones(b, t, p + t, dtype=torch.bool).tril(p)
    if mask is not None:
        allowed[:, :, p:] &= mask[:, None].bool()
        allowed |= torch.eye(t, p + t, dtype=torch.bool).roll(p, 1)  # padding attends to itself
    x = net["wte"].weight[ids] + net["wpe"].weight[p : p + t]
    for block, (K, V) in zip(net["h"], pairs, strict=True):
        qkv = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (h, -1)).transpose(1, 2) for y in qkv)  # (b, h, t, k)
        score = q @ torch.cat((K, k), 2).mT / math.sqrt(q.shape[-1])  # (b, h, t, p + t)
        share = score.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        y = share @ torch.cat((V, v), 2)  # (1)
        x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return net["ln_f"](x) @ net["wte"].weight.T


def gpt_case(m: ModuleType, draw: Draw, p: int, network: bool):
    """A GPT of 2 layers with 3 heads of width 4, a prefix, and its parameters."""
    model, options = tiny_gpt(draw), {}
    shapes = {"P": (p, 48)}
    if network:
        shapes = network_shapes(p, 12, 7, 2)
        options = {"prefix_projection": True, "encoder_hidden_size": 7}
    tensors = {name: draw.normal(*shape) for name, shape in shapes.items()}
    encoder = encoder_of(m, model, p, **options)
    set_parameters(encoder, tensors)
    return model, encoder, tensors


@CHECKS.add("layer", "logits and loss of a GPT: (1) in every layer")
def gpt_logits(m: ModuleType, draw: Draw) -> None:
    for b, t, p in ((1, 1, 1), (3, 4, 6), (2, 7, draw.integer(3, 5))):
        for network in (False, True):
            model, encoder, tensors = gpt_case(m, draw, p, network)
            ids, pairs = draw.tokens(VOCAB, b, t), split(prefix_of(tensors), b, 2, 3, 4)
            mask = torch.ones(b, t, dtype=torch.long)
            mask[0, 0] = 0  # padding on the left
            with torch.no_grad():
                expected = attend(model, ids, pairs)
                same("out.logits", encoder(model, ids).logits, expected)
                positions = torch.arange(t)[None]
                got = encoder(model, ids, position_ids=positions).logits
                same("out.logits with position_ids", got, expected)
                out = encoder(model, ids, attention_mask=mask, labels=ids)
            expected = attend(model, ids, pairs, mask)
            same("out.logits with padding", out.logits, expected)
            if t > 1:
                loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                same("the loss", out.loss, loss)


@CHECKS.add("layer", "the keys and values of words act like these words")
def like_words(m: ModuleType, draw: Draw) -> None:
    model, encoder, _ = gpt_case(m, draw, 4, False)
    words, ids = draw.tokens(VOCAB, 1, 4), draw.tokens(VOCAB, 2, 5)
    with torch.no_grad():
        pairs = model(words, use_cache=True).past_key_values
        rows = [x[0].transpose(0, 1).flatten(1) for pair in pairs for x in pair]  # each (p, d)
        set_parameters(encoder, {"P": torch.cat(rows, 1)})
        expected = model(torch.cat((words.expand(2, -1), ids), 1)).logits[:, 4:]
        same("out.logits", encoder(model, ids).logits, expected)


@CHECKS.add("layer", "a prefix of zeros differs from no prefix")
def zeros(m: ModuleType, draw: Draw) -> None:
    model, encoder, tensors = gpt_case(m, draw, 3, False)
    set_parameters(encoder, {"P": 0 * tensors["P"]})
    ids = draw.tokens(VOCAB, 2, 5)
    with torch.no_grad():
        got = encoder(model, ids).logits
        positions = torch.arange(3, 8)[None]
        none = model(ids, position_ids=positions).logits
        same("out.logits with a prefix of zeros", got, attend(model, ids, split(
            0 * tensors["P"], 2, 2, 3, 4)), guesses={"they are those without a prefix: a zero key "
            "has the score 0, and exp(0) = 1 takes attention": none})  # fmt: skip


@CHECKS.add("layer", "gradients reach the prefix, and nothing else")
def gradients(m: ModuleType, draw: Draw) -> None:
    for network in (False, True):
        model, encoder, tensors = gpt_case(m, draw, 3, network)
        before = {name: w.clone() for name, w in model.state_dict().items()}
        ids = draw.tokens(VOCAB, 2, 4)
        compare_gradients(
            "out.logits", draw, encoder, tensors,
            lambda e=encoder, g=model, ids=ids: [e(g, ids).logits],
            lambda P, g=model, ids=ids: [attend(g, ids, split(P, 2, 2, 3, 4))],
        )  # fmt: skip
        touched = [n for n, w in model.named_parameters() if w.requires_grad or w.grad is not None]
        ensure(not touched, f"the frozen model gets a gradient: {', '.join(touched[:3])}")
        for name, tensor in before.items():
            unchanged(f"{name} of the model", tensor, model.state_dict()[name])


@CHECKS.add("layer", "trainable parameters: 2 p l d, or those of the network")
def count(m: ModuleType, draw: Draw) -> None:
    for p in (1, 7):
        for network, expected in ((False, 2 * p * 24), (True, p * 12 + 12 * 7 + 7 + 48 * 7 + 48)):
            encoder = gpt_case(m, draw, p, network)[1]
            found = sum(w.numel() for w in encoder.parameters() if w.requires_grad)
            ensure(found == expected, f"{expected} trainable parameters, got {found}")


@CHECKS.add("layer", "keep_output changes no logits")
def keeping(m: ModuleType, draw: Draw) -> None:
    model, encoder, _ = gpt_case(m, draw, 3, True)
    ids = draw.tokens(VOCAB, 2, 5)
    with torch.no_grad():
        before = encoder(model, ids).logits
        encoder.keep_output()
        same("out.logits after keep_output()", encoder(model, ids).logits, before)


@CHECKS.add("layer", "learns to steer a frozen model")
def learns(m: ModuleType, draw: Draw) -> None:
    model, encoder, _ = gpt_case(m, draw, 3, False)
    ids = draw.tokens(VOCAB, 32, 5)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.1)
    found = []
    for _ in range(100):
        loss = F.cross_entropy(encoder(model, ids).logits.mT, torch.full_like(ids, 3))
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ensure(found[-1] < 0.5 * found[0], f"after 100 steps towards token 3, the loss is still "
           f"{found[-1]:.2f}; it was {found[0]:.2f}")  # fmt: skip


def compare_peft(m: ModuleType, end: str, options: dict) -> None:
    model, tensors = stored_gpt(values), {}
    names = (
        "P",
        "transform.0.weight",
        "transform.0.bias",
        "transform.2.weight",
        "transform.2.bias",
    )
    for name, ours in zip(names, ("H", "W_1", "b_1", "W_2", "b_2"), strict=True):
        if name + end in values:
            tensors[ours if end else name] = torch.tensor(values[name + end])
    encoder = encoder_of(m, model, len(values["P"]), **options)
    set_parameters(encoder, tensors)
    ids, mask, label = (torch.tensor(values[name]) for name in ("ids", "mask", "labels"))
    with torch.no_grad():
        out = encoder(model, ids, attention_mask=mask, labels=label)
    expected = torch.tensor(values["logits" + end])  # of the tokens that are no padding
    same("out.logits", out.logits[mask.bool()], expected, 1e-4)
    same("the loss", out.loss, torch.tensor(values["loss" + end]), 1e-4)


@CHECKS.add("values", "logits and loss of Hugging Face peft's prefix tuning")
def peft_prefix(m: ModuleType, draw: Draw) -> None:
    compare_peft(m, "", {})


@CHECKS.add("values", "the same, with the network")
def peft_network(m: ModuleType, draw: Draw) -> None:
    compare_peft(m, "_network", {"prefix_projection": True, "encoder_hidden_size": 5})


@CHECKS.add("losses", "the first ten losses on describe")
def ten_losses(m: ModuleType, draw: Draw) -> None:
    model = describe()[0].requires_grad_(False)
    shape, found = (8, 2 * model.config.n_layer * model.config.n_embd), []
    for module in (reference, m):
        encoder = encoder_of(module, model, 8)
        start = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        set_parameters(encoder, {"P": start})

        def logits(batch, encoder=encoder):
            mask = batch["attention_mask"]
            return encoder(model, batch["input_ids"], attention_mask=mask).logits

        found.append(losses(encoder.parameters(), logits, 0.03))
    if abs(found[0][0] - found[0][-1]) < 0.05:
        raise Wrong("the reference did not learn")  # cannot happen: see the tests
    compare_losses(found[1], found[0])
