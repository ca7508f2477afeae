"""What is graded in prompt_tuning.py."""

import copy
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from minipeft.gpt import GPT, GPTConfig
from minipeft.lab import DATA

from .. import skeleton
from ..judge import Checks, load
from ..symptoms import Draw, Wrong, ensure, same, show, unchanged
from .common import compare_losses, describe, losses

CHECKS = Checks("prompt_tuning")
# b, t, p, d: from the smallest case to larger ones.
CASES = ((1, 1, 3, 2), (1, 2, 3, 4), (2, 4, 3, 5), (3, 2, 5, 4))
VOCAB = 11
TOKENIZER = DATA / "base" / "0.3m"
values, reference = {}, None


def prepare(level: str, given: dict | None) -> None:
    """Read what the checks of a level need, as long as minipeft can be imported."""
    global reference
    if level == "values":
        values.update(given or skeleton.stored("prompt_tuning"))
    if level == "losses":
        describe()
        reference = load("reference", skeleton.reference("prompt_tuning").read_text(), "reference")


class Toy(nn.Module):
    """A causal model: the logits of a position are computed from the sum of x up to it."""

    def __init__(self, draw: Draw, d: int):
        super().__init__()
        self.words = nn.Embedding.from_pretrained(draw.normal(VOCAB, d))
        self.head = draw.normal(VOCAB, d)
        self.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, inputs_embeds: Tensor, **others) -> SimpleNamespace:
        return SimpleNamespace(logits=inputs_embeds.cumsum(1) @ self.head.T, loss="the loss")


class Case:
    """Virtual tokens with known values, and the inputs of a model."""

    def __init__(self, m: ModuleType, draw: Draw, sizes: tuple[int, int, int, int]):
        self.b, self.t, self.p, self.d = sizes
        self.model = Toy(draw, self.d)
        self.ids = draw.tokens(VOCAB, self.b, self.t)
        self.x = self.model.words(self.ids)
        self.prompt = embedding_of(m, self.model, self.p)
        self.P = draw.normal(self.p, self.d)
        set_prompt(self.prompt, self.P)
        self.text = f"b {self.b}, t {self.t}, p {self.p}, d {self.d}"

    def front(self) -> Tensor:
        """P for each example, (b, p, d)."""
        return torch.stack([self.P] * self.b)

    def entry(self, name: str, value: Tensor) -> Tensor:
        """What prepend makes of an input. The input itself must not change."""
        before = value.clone()
        inputs = self.prompt.prepend(self.model, self.ids, **{name: value})
        got = inputs.get(name)
        ensure(isinstance(got, Tensor), f"{name} is missing in the inputs ({self.text})")
        unchanged(f"the {name} that was passed", before, value)
        rows, length = value.shape[0], self.p + self.t
        ensure(got.dim() == 2 and got.shape[1] == length, f"{name} has the shape "
               f"{tuple(got.shape)}, expected {(rows, length)}: the input has p + t positions "
               f"({self.text})")  # fmt: skip
        return got


def cases(m: ModuleType, draw: Draw) -> list[Case]:
    drawn = (draw.integer(2, 4), draw.integer(6, 8), draw.integer(9, 12), draw.integer(3, 5))
    return [Case(m, draw, sizes) for sizes in (*CASES, drawn)]


def embedding_of(m: ModuleType, model: nn.Module, p: int) -> nn.Module:
    return m.PromptEmbedding(model, m.PromptTuningConfig(num_virtual_tokens=p))


def only_parameter(prompt: nn.Module) -> nn.Parameter:
    """P, however it is stored."""
    found = dict(prompt.named_parameters())
    ensure(found, "there is no parameter: P must be one, or an nn.Embedding")
    ensure(len(found) == 1, f"P must be the only parameter, but there are {', '.join(found)}")
    return next(iter(found.values()))


@torch.no_grad()
def set_prompt(prompt: nn.Module, value: Tensor) -> None:
    target = only_parameter(prompt)
    ensure(target.numel() == value.numel(), f"P has the shape {tuple(target.shape)}, expected "
           f"{tuple(value.shape)}")  # fmt: skip
    target.copy_(value.view_as(target))


@CHECKS.add("pieces", "embedding")
def embedding(m: ModuleType, draw: Draw) -> None:
    for p, d in ((1, 2), (3, 4), (5, 4), (draw.integer(12, 20), draw.integer(6, 9))):
        model = Toy(draw, d)
        prompt = embedding_of(m, model, p)
        P = only_parameter(prompt)
        ensure(tuple(prompt.prompt().shape) == (p, d), f"P has the shape "
               f"{tuple(prompt.prompt().shape)}, expected (p, d) = {(p, d)}")  # fmt: skip
        ensure(P.requires_grad, "P is not trainable: it must require a gradient")
        ensure(P.isfinite().all(), "P has entries that are not finite: was it initialized?")
        ensure(P.any(), "P starts at zero: it must be random")
        ensure(P.unique().numel() > P.numel() // 2, f"P is not random: {show(P)}")
        if P.numel() > 60:
            ensure(1e-5 < P.std() < 5, f"P starts with a standard deviation of {P.std():.2g}")
            again = only_parameter(embedding_of(m, model, p))
            ensure(not torch.equal(P, again), "P starts with the same values every time")
    half = embedding_of(m, Toy(draw, 4).to(torch.bfloat16), 2)
    dtype = only_parameter(half).dtype
    ensure(dtype == torch.float32, f"P of a bfloat16 model is {dtype}, not float32")


@CHECKS.add("pieces", "prepend")
def prepend(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        before = case.x.clone()
        expected = torch.cat((case.front(), case.x), 1)
        inputs = prepended(case, input_ids=case.ids, use_cache=True)
        compare_embeddings(case, inputs, expected)
        ensure(inputs.get("use_cache") is True, "inputs must also have the other arguments, for "
               "example use_cache: they are in `others`")  # fmt: skip
        ensure(inputs.get("input_ids") is None, "inputs must not have input_ids: a model takes "
               "either these or inputs_embeds")  # fmt: skip
        compare_embeddings(case, prepended(case, inputs_embeds=case.x), expected)
        unchanged("x", before, case.x)
        unchanged("P", case.P, only_parameter(case.prompt).view(case.p, case.d))
        gradient_of_prompt(draw, case)
    half = Toy(draw, 4).to(torch.bfloat16)
    got = embedding_of(m, half, 3).prepend(half, torch.ones(2, 5, dtype=torch.long))
    dtype = got["inputs_embeds"].dtype
    ensure(dtype == torch.bfloat16, f"inputs_embeds of a bfloat16 model are {dtype}")


def prepended(case: Case, **inputs) -> dict:
    """What prepend returns. An error that only a batch causes says so."""
    try:
        return case.prompt.prepend(case.model, **inputs)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if case.b == 1:
            raise Wrong(f"P and x cannot be joined ({case.text}): {text}") from error
        raise Wrong(f"a batch of {case.b} fails, and one example does not: P must be expanded to "
                    f"(b, p, d) ({text})") from error  # fmt: skip


def compare_embeddings(case: Case, inputs: dict, expected: Tensor) -> None:
    P, front, x = case.P, case.front(), case.x
    ensure(isinstance(inputs, dict), f"prepend must return a dict, got {type(inputs).__name__}")
    got = inputs.get("inputs_embeds")
    ensure(got is not None, "inputs_embeds is missing in the inputs")
    if isinstance(got, Tensor) and got.shape == x.shape and got.shape != expected.shape:
        raise Wrong(f"inputs_embeds has only t positions, expected p + t: P is not in front of x "
                    f"({case.text})")  # fmt: skip
    first = torch.zeros_like(front)
    first[0] = P
    guesses = {
        "P is after the text: it must be in front": torch.cat((x, front), 1),
        "only the first example has P": torch.cat((first, x), 1),
        "the rows of P are in reverse order": torch.cat((front.flip(1), x), 1),
        "each example has other rows of P, and every example must have all of it": torch.cat(
            (P.repeat_interleave(case.b, 0).view(front.shape), x), 1
        ),
        "P is reshaped, and must not be": torch.cat((P.T.reshape(P.shape).expand_as(front), x), 1),
        "every virtual token is the first row of P": torch.cat((P[:1].expand_as(front), x), 1),
        "every virtual token is the last row of P": torch.cat((P[-1:].expand_as(front), x), 1),
        "P is zero in it": torch.cat((0 * front, x), 1),
        "x is zero in it": torch.cat((front, 0 * x), 1),
    }
    same("inputs['inputs_embeds']", got, expected, guesses=guesses, case=case.text)


def gradient_of_prompt(draw: Draw, case: Case) -> None:
    P, x = only_parameter(case.prompt), case.x.clone().requires_grad_()
    P.grad = None
    got = prepended(case, inputs_embeds=x)["inputs_embeds"]
    weights = draw.normal(*got.shape)
    if got.requires_grad:
        (got * weights).sum().backward()
    ensure(P.grad is not None, "P gets no gradient: is it detached, or its .data used?")
    front = weights[:, : case.p]
    guesses = {"only the first example adds to it": front[0],
               "only the last example adds to it": front[-1],
               "it is the mean over the batch": front.mean(0)}  # fmt: skip
    same("the gradient of P", P.grad.view(case.p, case.d), front.sum(0), 1e-4, guesses=guesses,
         case=case.text)  # fmt: skip
    ensure(x.grad is not None, "x gets no gradient: inputs_embeds may come from another module")
    same("the gradient of x", x.grad, weights[:, case.p :], 1e-4, case=case.text)


def padded(case) -> list[Tensor]:
    """Masks without padding, with padding on the right, and on the left."""
    right = torch.ones(case.b, case.t, dtype=torch.long)
    right[-1, -1] = 0
    return [torch.ones_like(right), right, right.flip(1)]


@CHECKS.add("pieces", "attention_mask")
def attention_mask(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        for mask in padded(case):
            got = case.entry("attention_mask", mask)
            one = torch.ones(case.b, case.p, dtype=torch.long)
            guesses = {
                "nothing attends to the virtual tokens: they need a 1": torch.cat(
                    (0 * one, mask), 1
                ),
                "the p new entries are on the right: virtual tokens come first": torch.cat(
                    (mask, one), 1
                ),
                "there are p zeros on the right: virtual tokens come first, and need a 1": (
                    torch.cat((mask, 0 * one), 1)
                ),
                "padding is lost: every entry is 1": torch.ones(case.b, case.p + case.t),
            }
            same("inputs['attention_mask']", got.double(), torch.cat((one, mask), 1).double(),
                 guesses=guesses, case=f"{case.text}, mask {mask.tolist()}")  # fmt: skip


@CHECKS.add("pieces", "labels")
def labels(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        given = case.ids.clone()
        given[0, 0] = -100
        for label in (case.ids, given):
            got = case.entry("labels", label)
            ignored = torch.full((case.b, case.p), -100)
            guesses = {
                "0 is a token: the loss ignores -100": torch.cat((0 * ignored, label), 1),
                "the p new entries are on the right: virtual tokens come first": torch.cat(
                    (label, ignored), 1
                ),
                "-1 is not ignored: the loss ignores -100": torch.cat((ignored // 100, label), 1),
                "1 is a token: the loss ignores -100": torch.cat((ignored // -100, label), 1),
                "100 is a token: the loss ignores -100": torch.cat((-ignored, label), 1),
                "the labels of the text are lost": torch.full_like(got, -100),
            }
            same("inputs['labels']", got, torch.cat((ignored, label), 1), guesses=guesses,
                 tolerance=1e-4, case=f"{case.text}, labels {label.tolist()}")  # fmt: skip


@CHECKS.add("pieces", "position_ids")
def position_ids(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        p, t = case.p, case.t
        rows = torch.stack([(torch.arange(t) - i).clamp(min=0) for i in range(case.b)])
        for positions in (rows, torch.arange(t)[None], rows + 20):
            got = case.entry("position_ids", positions)
            front = torch.arange(p).expand(len(positions), p)
            expected = torch.cat((front, positions + p), 1)
            if len(positions) == 1 and got.shape[0] == case.b:
                expected = expected.expand(case.b, -1)  # one row per example is the same
            guesses = {
                "p must be added to the positions of the text": torch.cat((front, positions), 1),
                "the virtual tokens come first": torch.cat((positions, front + t), 1),
                "all virtual tokens have position 0, and must have 0 … p - 1": torch.cat(
                    (0 * front, positions + p), 1
                ),
                "the virtual tokens must have 0 … p - 1, and not 1 … p": torch.cat(
                    (front + 1, positions + p), 1
                ),
                "p must be added to the positions of the text, and not t": torch.cat(
                    (front, positions + t), 1
                ),
                "p must be added to the positions of the text, and not p - 1": torch.cat(
                    (front, positions + p - 1), 1
                ),
                "p must be added to the positions of the text, and not p + 1": torch.cat(
                    (front, positions + p + 1), 1
                ),
                "the positions of the text are ignored": torch.arange(p + t).expand_as(expected),
            }
            same("inputs['position_ids']", got, expected, guesses=guesses,
                 case=f"{case.text}, position_ids {positions.tolist()}")  # fmt: skip


@CHECKS.add("pieces", "logits")
def logits(m: ModuleType, draw: Draw) -> None:
    for case in cases(m, draw):
        p, t = case.p, case.t
        full = torch.cat((case.front(), case.x), 1).cumsum(1) @ case.model.head.T
        for inputs in ({"input_ids": case.ids}, {"inputs_embeds": case.x}):
            out = outputs(case, inputs)
            got = getattr(out, "logits", None)
            ensure(isinstance(got, Tensor), "the result must be the model's output, with logits")
            ensure(getattr(out, "loss", 0) == "the loss", "the result must be the model's own "
                   "output: its other entries, as the loss, are missing")  # fmt: skip
            count = got.shape[1] if got.dim() == 3 else 0
            ensure(count != p + t, "the logits include those of the virtual tokens: return only "
                   f"those of the t real tokens ({case.text})")  # fmt: skip
            guesses = {
                "they are those of the first t positions, and the virtual tokens come first": (
                    full[:, :t]
                ),
                "they are one position too early": full[:, p - 1 : -1],
            }
            same("out.logits", got, full[:, p:], guesses=guesses, case=case.text)
            ensure(got.requires_grad, "P gets no gradient through the logits: are they detached?")


def outputs(case: Case, inputs: dict):
    try:
        return case.prompt(case.model, **inputs)
    except (AttributeError, TypeError) as error:
        if "NoneType" not in str(error) or "input_ids" in inputs:
            raise
        raise Wrong(f"the call fails with inputs_embeds: then input_ids is None ({error})") from (
            error
        )


@CHECKS.add("pieces", "sample_vocab")
def sample_vocab(m: ModuleType, draw: Draw) -> None:
    for p, v in ((60, 5), (3, 50), (1, 50), (draw.integer(30, 50), draw.integer(200, 300))):
        config = m.PromptTuningConfig(num_virtual_tokens=p, prompt_tuning_init="SAMPLE_VOCAB")
        draws = [m.initial_tokens(config, v) for _ in range(200)]
        ids, text = draws[0], f"p {p}, vocabulary {v}"
        ensure(isinstance(ids, Tensor), f"the tokens must be a tensor, got {type(ids).__name__}")
        ensure(tuple(ids.shape) == (p,), f"the tokens have the shape {tuple(ids.shape)}, expected "
               f"(p,) = {(p,)} ({text})")  # fmt: skip
        ensure(ids.dtype in (torch.int64, torch.int32), f"tokens are integers, not {ids.dtype}")
        every = torch.stack(draws)  # (200, p)
        low, high = int(every.min()), int(every.max())
        ensure(low >= 0 and high < v, f"tokens are 0 … {v - 1}, and not {low} … {high} ({text})")
        ensure(p == 1 or (every != every[:, :1]).any(), "all p virtual tokens start from the same "
               f"token: draw p of them ({text})")  # fmt: skip
        ensure((every != ids).any(), f"the tokens are the same every time: {show(ids)} ({text})")
        steps = every.diff(dim=1) % v
        ensure(p < 3 or (steps != steps[:, :1]).any(), f"the tokens are not drawn independently: "
               f"{show(ids)} ({text})")  # fmt: skip
        if v == 5:
            shares = every.flatten().bincount(minlength=v) / every.numel()
            missing = (shares == 0).nonzero().flatten().tolist()
            ensure(not missing, f"of the tokens 0 … {v - 1}, {missing} are never drawn")
            ensure((shares - 0.2).abs().max() < 0.05, "the tokens must be equally likely, but "
                   f"their shares are {show(shares)}")  # fmt: skip
        mean, std = every.double().mean() / v, every.double().std() / v
        ensure(abs(mean - 0.5) < 0.15 and std > 0.2, f"the tokens are not spread evenly over 0 … "
               f"{v - 1}: they are {low} … {high}, and their mean is {mean * v:.1f}")  # fmt: skip
    repeats = [row.unique().numel() < p for row in every]  # of more than 20, p²/2v are expected
    ensure(any(repeats), "no token is ever drawn twice: the draws are independent")


@CHECKS.add("pieces", "initial_values")
def initial_values(m: ModuleType, draw: Draw) -> None:
    tokenizer = Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json")
    text = "The red cat is in the old house."
    ids = tokenizer.encode(text).ids
    for p, dtype in ((1, torch.float32), (4, torch.float32), (3, torch.bfloat16)):
        model = Toy(draw, 5)
        model.words = nn.Embedding.from_pretrained(
            draw.normal(tokenizer.get_vocab_size(), 5).to(dtype), freeze=False
        )
        E = model.words.weight
        before = E.detach().clone()
        options = {"prompt_tuning_init_text": text, "tokenizer_name_or_path": str(TOKENIZER)}
        prompt = m.PromptEmbedding(model, m.PromptTuningConfig(p, "TEXT", **options))
        P = only_parameter(prompt)
        ensure(P is not E, "P is E itself: training P would change the vocabulary")
        ensure(P.numel() == p * 5, f"P has the shape {tuple(P.shape)}, expected {(p, 5)}")
        ensure(P.dtype == torch.float32, f"P of a {dtype} model is {P.dtype}, not float32")
        ensure(P.requires_grad and P.is_leaf, "P must be a trainable parameter")
        expected = before.float()[torch.tensor(ids)[:p]]
        guesses = {
            "it is the first p rows of E, and not those of the tokens": before.float()[:p],
            "every virtual token starts from the first one": expected[:1].expand(p, -1),
        }
        same("P at the start", P.view(p, 5), expected, guesses=guesses,
             case=f"the rows {ids[:p]} of E")  # fmt: skip
        with torch.no_grad():
            P.add_(1)
        ensure(torch.equal(E, before), "P shares its memory with E: training P would change the "
               "vocabulary")  # fmt: skip
        prompt.prepend(model, torch.ones(1, 2, dtype=torch.long))["inputs_embeds"].sum().backward()
        ensure(P.grad is not None, "P gets no gradient: is it a parameter of its own?")
        E.grad = None


# The layer: with a GPT.


def tiny_gpt(draw: Draw, n_embd: int = 12, n_layer: int = 2, n_head: int = 3) -> GPT:
    """A frozen GPT with weights that are large enough for every part to matter."""
    config = GPTConfig(VOCAB, n_positions=24, n_embd=n_embd, n_layer=n_layer, n_head=n_head)
    model = GPT(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        noise = draw.normal(*parameter.shape) * (1.0 if "wpe" in name or "wte" in name else 0.4)
        parameter.copy_(noise + (1 if "ln_" in name and "weight" in name else 0))
    return model


def with_prompt(model: GPT, ids: Tensor, P: Tensor, **inputs):
    """Equation (1): the model on [P; E(x)]."""
    x = model.transformer["wte"].weight[ids]
    return model(inputs_embeds=torch.cat((torch.stack([P] * len(ids)), x), 1), **inputs)


def gpt_case(m: ModuleType, draw: Draw, p: int) -> tuple[GPT, nn.Module, Tensor]:
    model = tiny_gpt(draw)
    prompt, P = embedding_of(m, model, p), draw.normal(p, 12)
    set_prompt(prompt, P)
    return model, prompt, P


@CHECKS.add("layer", "the logits and the loss of a GPT on [P; E(x)]")
def gpt_logits(m: ModuleType, draw: Draw) -> None:
    for b, t, p in ((1, 2, 1), (3, 4, 6), (2, 7, draw.integer(3, 5))):
        model, prompt, P = gpt_case(m, draw, p)
        ids = draw.tokens(VOCAB, b, t)
        with torch.no_grad():
            same("out.logits", prompt(model, ids).logits, with_prompt(model, ids, P).logits[:, p:])
            mask = torch.ones(b, p + t)
            mask[0, p] = 0  # a row with padding on the left
            out = prompt(model, ids, attention_mask=mask[:, p:].long(), labels=ids)
            label = torch.cat((torch.full((b, p), -100), ids), 1)
            expected = with_prompt(model, ids, P, attention_mask=mask, labels=label)
            same("out.logits with padding", out.logits, expected.logits[:, p:])
            same("the loss", out.loss, expected.loss)


@CHECKS.add("layer", "virtual tokens equal to words act like these words")
def like_words(m: ModuleType, draw: Draw) -> None:
    model, prompt, _ = gpt_case(m, draw, 4)
    words, ids = draw.tokens(VOCAB, 4), draw.tokens(VOCAB, 2, 5)
    set_prompt(prompt, model.transformer["wte"].weight[words])
    with torch.no_grad():
        expected = model(torch.cat((words.expand(2, -1), ids), 1)).logits[:, 4:]
        same("out.logits", prompt(model, ids).logits, expected)
        positions = torch.arange(5).expand(2, -1)
        got = prompt(model, ids, position_ids=positions).logits
        same("out.logits with position_ids", got, expected)


@CHECKS.add("layer", "gradients reach P, and nothing else")
def gradients(m: ModuleType, draw: Draw) -> None:
    model, prompt, P = gpt_case(m, draw, 3)
    before = copy.deepcopy(model.state_dict())
    ids, weights = draw.tokens(VOCAB, 2, 4), draw.normal(2, 4, VOCAB)
    (prompt(model, ids).logits * weights).sum().backward()
    P.requires_grad_()
    (with_prompt(model, ids, P).logits[:, 3:] * weights).sum().backward()
    mine = only_parameter(prompt)
    ensure(mine.grad is not None, "P gets no gradient")
    same("the gradient of P", mine.grad.view(3, 12), P.grad, 1e-4)
    frozen = [name for name, w in model.named_parameters() if w.requires_grad or w.grad is not None]
    ensure(not frozen, f"the frozen model gets a gradient: {', '.join(frozen[:3])}")
    for name, tensor in before.items():
        unchanged(f"{name} of the model", tensor, model.state_dict()[name])


@CHECKS.add("layer", "trainable parameters: p d")
def count(m: ModuleType, draw: Draw) -> None:
    for p in (1, 7):
        prompt = embedding_of(m, tiny_gpt(draw), p)
        found = sum(w.numel() for w in prompt.parameters() if w.requires_grad)
        ensure(found == p * 12, f"p d = {p} · 12 = {p * 12} parameters, got {found}")


@CHECKS.add("layer", "learns to steer a frozen model")
def learns(m: ModuleType, draw: Draw) -> None:
    model = Toy(draw, 8)
    prompt, ids = embedding_of(m, model, 3), draw.tokens(VOCAB, 64, 6)
    optimizer = torch.optim.Adam(prompt.parameters(), lr=0.3)
    for _ in range(150):
        loss = F.cross_entropy(prompt(model, ids).logits.mT, torch.full_like(ids, 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ensure(loss < 0.2, f"after 150 steps towards token 3, the loss is still {loss:.2f}")


def stored_gpt(found: dict) -> GPT:
    """The GPT-2 of the stored values. Its layers are Conv1D: their weights are transposed."""
    model = GPT(GPTConfig(**found["size"])).eval().requires_grad_(False)
    state = model.state_dict()
    for name, numbers in found["hundredths"].items():
        w = torch.tensor(numbers) / 100
        conv = w.dim() == 2 and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[name].copy_(w.T if conv else w)
    return model


@CHECKS.add("values", "logits and loss of Hugging Face peft's prompt tuning")
def peft_logits(m: ModuleType, draw: Draw) -> None:
    model, P = stored_gpt(values), torch.tensor(values["P"])
    prompt = embedding_of(m, model, len(P))
    set_prompt(prompt, P)
    ids, mask, label = (torch.tensor(values[name]) for name in ("ids", "mask", "labels"))
    with torch.no_grad():
        out = prompt(model, ids, attention_mask=mask, labels=label)
    expected = torch.tensor(values["logits"])  # of the real tokens that are no padding
    same("out.logits", out.logits[mask.bool()], expected, 1e-4)
    same("the loss", out.loss, torch.tensor(values["loss"]), 1e-4)


@CHECKS.add("losses", "the first ten losses on describe")
def ten_losses(m: ModuleType, draw: Draw) -> None:
    model = describe()[0].requires_grad_(False)
    d, found = model.config.n_embd, []
    for module in (reference, m):
        prompt = embedding_of(module, model, 8)
        set_prompt(prompt, torch.randn(8, d, generator=torch.Generator().manual_seed(0)))

        def logits(batch, prompt=prompt):
            return prompt(model, batch["input_ids"], attention_mask=batch["attention_mask"]).logits

        found.append(losses(prompt.parameters(), logits, 0.1))
    if abs(found[0][0] - found[0][-1]) < 0.05:
        raise Wrong("the reference did not learn")  # cannot happen: see the tests
    compare_losses(found[1], found[0])
