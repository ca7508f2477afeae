# %% [markdown]
# # 00 · A small GPT: what does a model know after ten million tokens?
#
# After this lesson you can
# - name the parts of a GPT, count their parameters, and compute an attention by hand;
# - say what our shipped bases can do, and what they cannot, with the score of pure chance beside it;
# - watch a tiny GPT learn to copy, on your own computer, in less than a minute;
# - show what the text must have, and what the model must have, for that to happen.
#
# **Papers.** Vaswani et al. 2017, *Attention Is All You Need*, arXiv 1706.03762; Radford et al. 2019, *Language Models are
# Unsupervised Multitask Learners* (GPT-2).
#
# **Time.** Twenty minutes to read, two to run, forty for the exercises.

# %%
import inspect
import json
import math
from random import Random

import matplotlib.pyplot as plt
import torch

from minipeft import GPT, GPTConfig, gpt
from minipeft.data import card, text  # the probes, and the generator of the text
from minipeft.data.words import NEW_PEOPLE, PEOPLE
from minipeft.lab import DATA, evaluate, report, tasks
from minipeft.lab.base import load_base, windows
from minipeft.lab.recipes import RunConfig
from minipeft.lab.train import train

BLUE, GREY = report.COLORS["full"], report.COLORS["frozen"]
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
base = load_base(DATA / "base" / "1m")
model = base.model().eval()
for seed in (13, 34, 20):
    print(text.document(Random(seed)), "\n")

# %% [markdown]
# Those are three of the documents that our bases were pretrained on: ten million tokens about a little world, made by
# `data/text.py`. All fine-tuning in this course starts from what such a base knows, so let us find that out first.
#
# Names have two parts, and one pair in eight is held out: its parts are common, the pair stands nowhere in the
# text. What a model says of such a name it cannot have learned by heart.
#
# ## Questions first
#
# **First.** A list of three names that the model has never seen, then "Again:" and the first of them. For how many of a hundred such
# lists does our small base give the second name right?
#
# **Second.** Later you will train a tiny GPT on nothing but lists that are read back, for 600 steps. After how many does it copy half of
# the names? And what share will its twin copy, trained as long on lists in which no name comes back?

# %%
guess_lists = 30  # of 100: put your own numbers here before you go on
guess_step, guess_twin = 300, 0.3  # steps; share of names copied

# %% [markdown]
# ## The parts
#
# A token becomes a vector, and so does its position. Then a stack of blocks, each adding to the vectors what an *attention*
# and an *MLP* have to say. At the end every vector is compared with all token vectors, and that gives the chances of the next token.
#
# $$ x \leftarrow x + \mathrm{Attention}(\mathrm{LN}(x)), \qquad x \leftarrow x + \mathrm{MLP}(\mathrm{LN}(x)), \qquad
# \mathrm{Attention} = \mathrm{softmax}\!\left(\frac{q k^\top}{\sqrt{d_k}} + \mathrm{mask}\right) v $$
#
# The attention is the only part in which one position can look at another. The rest works on each position alone.

# %%
parts = {
    "tokens (wte)": "wte",
    "positions (wpe)": "wpe",
    "attention": ".attn.",
    "MLP": ".mlp.",
    "norms": "ln_",
}
counts = {
    title: sum(p.numel() for name, p in model.named_parameters() if part in name)
    for title, part in parts.items()
}
for title, count in counts.items():
    print(f"{title:16} {count:9,}")
total, c = sum(counts.values()), model.config
d = c.n_embd
assert total == sum(p.numel() for p in model.parameters())
assert total == (c.vocab_size + c.n_positions) * d + c.n_layer * (12 * d * d + 13 * d) + 2 * d
print(f"{'together':16} {total:9,}; the output head is the token table once more")

# %% [markdown]
# ## By hand: one attention
#
# Each position asks (q), each offers a key (k) and a value (v). The weights say who listens to whom. A position may look
# at itself and back, never ahead.


# %%
def attend(attention, x):
    """What an attention says of x (1, t, d), and its weights, (h, t, t)."""
    t, d = x.shape[1:]
    heads = attention.n_head
    q, k, v = attention.c_attn(x)[0].split(d, dim=-1)  # each (t, d)
    q, k, v = (z.view(t, heads, d // heads).transpose(0, 1) for z in (q, k, v))  # (h, t, k)
    scores = q @ k.transpose(1, 2) / math.sqrt(d // heads)  # (h, t, t)
    ahead = torch.ones(t, t, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)  # each row sums to 1
    y = (weights @ v).transpose(0, 1).reshape(t, d)  # the heads side by side
    return attention.c_proj(y), weights


sentence = "The names: Ada Bell, Carl Cook, Dora Ash. Again: Ada Bell, Carl Cook,"
encoded = base.tokenizer.encode(sentence)
ids = torch.tensor([encoded.ids])
block = model.transformer.h[0]
with torch.no_grad():
    x = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(ids.shape[1]))
    mine, weights = attend(block.attn, block.ln_1(x))
    theirs, _ = block.attn(block.ln_1(x), None, None)
assert torch.allclose(mine, theirs[0], atol=1e-4)
print("the first layer's attention by hand: the same numbers as minipeft's")

# %% [markdown]
# ## The real file
#
# `minipeft/gpt.py` does the same in one fused call, and knows two things more: a cache of earlier keys and values, so that
# writing a text does not compute everything again, and dropout.

# %%
print(inspect.getsource(gpt.Attention))
print(inspect.getsource(gpt.Block))

# %% [markdown]
# ## Who listens to whom
#
# The list is being read back. To go on, a model could look for the *first* time of what it has just read, and at the token that came
# next there. Do any of the base's heads do that? For every place after "Again" where a name must come next, take the weight on that
# name in the list.


# %%
@torch.no_grad()
def all_weights(model, ids):
    """The attention weights of every layer: a list of (h, t, t)."""
    x = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(ids.shape[1]))
    found = []
    for block in model.transformer.h:
        found.append(attend(block.attn, block.ln_1(x))[1])
        x, _ = block(x, None, None)
    return found


# pairs of a position j where a name comes next, and the place i of that name in the list
again = encoded.tokens.index("ĠAgain")
following = [*encoded.ids[again + 2 :], base.tokenizer.encode(" Dora").ids[0]]
signs = [base.tokenizer.encode(sign).ids[0] for sign in (":", ",", ".")]
pairs = [
    (j, ids[0].tolist().index(t)) for j, t in enumerate(following, again + 1) if t not in signs
]


def copying_scores(model):
    """For each layer and head, the mean weight on the name that must come next."""
    layers = all_weights(model, ids)
    return torch.stack([sum(w[:, j, i] for j, i in pairs) / len(pairs) for w in layers])


scores = copying_scores(model)
layer, head = divmod(int(scores.argmax()), c.n_head)
uniform = sum(1 / (j + 1) for j, _ in pairs) / len(pairs)
print(
    f"layer {layer}, head {head}: {scores.max():.2f}; the median head {scores.median():.2f}; looking everywhere alike {uniform:.2f}"
)
torch.manual_seed(0)
untrained = copying_scores(GPT(c)).max()
print(f"the best head of a GPT that was never trained: {untrained:.2f}")
assert scores.max() > 3 * untrained

# %%
figure, axis = plt.subplots(figsize=(6.5, 5.5), layout="constrained")
shown = [token.replace("Ġ", " ") for token in encoded.tokens]
image = axis.imshow(all_weights(model, ids)[layer][head], cmap="Greys", vmin=0, vmax=1)
for j, i in pairs:
    axis.add_patch(plt.Rectangle((i - 0.5, j - 0.5), 1, 1, fill=False, edgecolor=BLUE, linewidth=2))
axis.set_xticks(range(len(shown)), shown, rotation=90)
axis.set_yticks(range(len(shown)), shown)
axis.set(
    xlabel="looks at",
    ylabel="position",
    title=f"layer {layer}, head {head} (boxes: the name that comes next)",
)
figure.colorbar(image, label="weight", shrink=0.7)
plt.show()

# %% [markdown]
# Such a head is called an *induction head* (Olsson et al. 2022, arXiv 2209.11895). Nobody put it there.
#
# ## What the bases can do
#
# First the loss, for the whole of held-out text. A loss means little without the loss of somebody who knows less:

# %%
known = json.loads((DATA / "results" / "bases.json").read_text())
print(f"all tokens alike       {math.log(c.vocab_size):.2f} nats per token")
print(f"counting tokens        {known['unigram']:.2f}")
print(f"counting five in a row {known['5-gram']:.2f}")
for name, row in known["bases"].items():
    print(f"the {name:4} base          {row['loss']:.2f}")
live = evaluate.text_loss(model, base.held_out)
assert abs(live - known["bases"]["1m"]["loss"]) < 1e-3
assert live < 0.6 * known["5-gram"]

# %% [markdown]
# Counting cannot look back further than four tokens; a GPT can, and that is most of the difference. Now ask it directly. The *probes* of
# `data/card.py` are prompts with one right continuation; the names are held out, but for the first row.

# %%
for title, (held_out, probe) in card.PROBES.items():
    values = text.VALUES | card.HELD_OUT if held_out else text.VALUES
    prompt, wanted = probe(text.Writer(Random(3), values))
    print(f"[{title}]\n{prompt} ->{wanted}")

# %%
torch.manual_seed(0)
lists = card.probe(model, base.tokenizer, card.copying, text.VALUES | card.HELD_OUT, n=100)
nothing = card.probe(
    GPT(c).eval(), base.tokenizer, card.copying, text.VALUES | card.HELD_OUT, n=100
)
print(f"lists of names never seen, read back: {lists:.2f}; you guessed {guess_lists / 100:.2f}")
print(f"a model that was never trained: {nothing:.2f}")
assert lists > 0.95
assert nothing < 0.05

# %%
titles = [
    "reads a list back",
    "second mention",
    "one place",
    "one place,\nall values people",
    "one of three places",
]
rows = list(card.PROBES)[1:]  # all with held-out names
figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
for n, (name, color, hatch) in enumerate(
    [("0.3m", "#b9b9b9", "//"), ("1m", BLUE, ""), ("3m", "#444444", "..")]
):
    values = [known["bases"][name]["probes"][row] for row in rows]
    where = [i + 0.26 * (n - 1) for i in range(len(rows))]
    axis.bar(where, values, 0.24, color=color, hatch=hatch, edgecolor="white", label=f"{name} base")
axis.plot([-0.4, 0.4], [guess_lists / 100] * 2, "k:", label="your guess")
axis.plot([2.6, 3.4], [1 / 3] * 2, "k-", label="chance: one of three people")
axis.set_xticks(range(len(rows)), titles)
axis.set(ylabel="share of 200 prompts continued rightly", ylim=(0, 1.05))
figure.legend(loc="outside lower center", ncols=5, frameon=False)
plt.show()

# %% [markdown]
# Copying: perfect, even for the smallest. Looking things up: good, but mind the fourth group. Asked about one place, a model
# may find the answer by its *kind*: there is one person in the text, so a "who" must be that one. Only where all three values are people must
# it read the relation, and there the bases differ, with chance at one third. And outside their little world they know nothing:

# %%
for prompt in (
    "The capital of France is",
    "Two and two is",
    "Clara Stone lost a golden key. What was lost?",
):
    out = model.generate(torch.tensor([base.tokenizer.encode(prompt).ids]), max_new_tokens=14)
    print(base.tokenizer.decode(out[0].tolist()))

# %% [markdown]
# ## Watch it learn to copy
#
# Where does the skill come from? Take the smallest text and model in which we saw it appear within a minute: lists of two to four names,
# read back, and nothing else; names from a few parts; two layers, width 64. That is *not* how the bases were trained (they needed
# an hour, on the whole text, and copying came late there too: `data/LOG.md`). The twin's text differs in one thing: after "Again:" come other names.

# %%
PARTS = 24  # first and family names in use


def few(names):
    firsts = sorted({name.split()[0] for name in PEOPLE})[:PARTS]
    lasts = sorted({name.split()[1] for name in PEOPLE})[:PARTS]
    return [name for name in names if name.split()[0] in firsts and name.split()[1] in lasts]


def a_list(writer, names, returning):
    n = writer.rng.randint(2, 4)
    told = writer.some(names, 2 * n)
    again = told[:n] if returning else told[n:]
    return f"The names: {', '.join(told[:n])}. Again: {', '.join(again)}."


def list_windows(names, returning, n, seed):
    writer = text.Writer(Random(seed))
    lists = [a_list(writer, names, returning) for _ in range(n)]
    encoded = [e.ids for e in base.tokenizer.encode_batch(lists)]
    return windows(encoded, 64, base.end)  # lists follow each other, so places vary


seen, new = few(PEOPLE), few(NEW_PEOPLE)
print(f"{len(seen)} names to train on, {len(new)} held out")
for returning in (True, False):
    print(a_list(text.Writer(Random(1)), seen, returning))
lengths = {
    len(base.tokenizer.encode(a_list(text.Writer(Random(i)), seen, True)).ids) + 1
    for i in range(99)
}
print("tokens in a list, its end included:", sorted(lengths))

# %% [markdown]
# We measure on lists of held-out names: at every token of a name after "Again:", is the right one the likeliest?

# %%
AGAIN = base.tokenizer.encode(" Again").ids[0]


def names_again(rows):
    """True at the tokens of names after "Again:", (n, t)."""
    mask = torch.zeros_like(rows, dtype=torch.bool)
    for row, marks in zip(rows.tolist(), mask, strict=True):
        after = False
        for j, token in enumerate(row):
            marks[j] = after and token not in signs and token != base.end
            after = token == AGAIN or (after and token != base.end)
    return mask


test = list_windows(new, True, n=150, seed=99)
where = names_again(test)


def copied(model, shift=0):
    """The share of names copied, with every position pushed along by `shift` places."""
    rows, marks = test[:, : 64 - shift], where[:, 1 : 64 - shift]
    with evaluate.evaluating(model):
        logits = model(rows, position_ids=torch.arange(shift, 64)[None]).logits
    return (logits[:, :-1].argmax(-1) == rows[:, 1:])[marks].float().mean().item()


# %%
def learn(returning, layers=2, steps=600, seed=0):
    """A tiny GPT trained on lists, and how much it copied, by step."""
    rows = list_windows(seen, returning, n=9000, seed=seed)
    torch.manual_seed(seed)
    config = GPTConfig(
        vocab_size=c.vocab_size, n_positions=64, n_embd=64, n_layer=layers, n_head=4, initializer_range=0.08,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model, points = GPT(config), []

    def look(row):
        if row["step"] % 25 == 0:
            points.append((row["step"], copied(model)))

    look({"step": 0})
    order = tasks.shuffled(list(range(len(rows))), 16, seed)
    batches = ([{"input_ids": rows[i], "labels": rows[i]}] for i in order)
    title = f"{layers} layers, names {'return' if returning else 'never return'}"
    run = RunConfig(
        steps=steps, learning_rate=6e-3, warmup=60, lr_end=0.05, weight_decay=0.1, beta2=0.95
    )
    train(model, batches, run, after_step=look, title=title)
    return model, points


tiny, points = learn(returning=True)

# %%
twin, twin_points = learn(returning=False)

# %% [markdown]
# And one with a single layer, for a reason that comes below. **Guess:** will it learn to copy?

# %%
flat, flat_points = learn(returning=True, layers=1)

# %%
figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
for found, color, style, label in [
    (points, BLUE, "o-", "two layers, names return"),
    (flat_points, GREY, "s:", "one layer, names return"),
    (twin_points, "black", "x--", "two layers, names never return"),
]:
    axis.plot(*zip(*found, strict=True), style, color=color, markersize=4, label=label)
axis.axvline(guess_step, color="black", linewidth=1, linestyle="-.", label="your guesses")
axis.axhline(guess_twin, color="black", linewidth=1, linestyle="-.")
axis.set(xlabel="step", ylabel="share of names copied (held-out pairs)", ylim=(-0.03, 1.03))
figure.legend(loc="outside lower center", ncols=2, frameon=False)
plt.show()


# %%
def passed(points, level):
    return next((step for step, share in points if share >= level), None)


first, half, most = (passed(points, level) for level in (0.1, 0.5, 0.6))
print(f"two layers: a tenth copied after {first} steps, half after {half}, six tenths after {most}")
print(f"(expect 150 to 350); you guessed {guess_step}")
print(f"at the end {points[-1][1]:.2f}, one layer {flat_points[-1][1]:.2f} (expect above 0.6)")
print(
    f"names never return: {twin_points[-1][1]:.2f}, you guessed {guess_twin}; by chance {1 / PARTS:.2f}"
)
assert most - first <= 125
assert points[-1][1] > 0.6
assert flat_points[-1][1] > 0.6
assert max(share for _, share in twin_points) < 0.15

# %% [markdown]
# It jumps: for many steps nothing, then most of it within a few dozen. And without recurring names it is never learned: the twin saw
# the same names as often, in the same form, for as many steps. A model learns to look back only where looking back pays.
#
# ## What breaks it
#
# But be suspicious. Olsson et al. find that copying by looking for the first time takes *two* layers: one to tell each token what stands before
# it, one to find it. Our single layer copies as well as the two. So perhaps they learned something else. Our lists are all of one
# form: in a list of three, each name comes back eleven places later. That can be learned from the *positions* alone.
#
# So push the text along: the same lists, and the first token at position one, or two, or three, in place of zero. Nothing that a reader would
# notice.

# %%
shifts = range(8)
pushed = {
    title: [copied(found, shift) for shift in shifts]
    for title, found in (("the 1m base", model), ("two layers", tiny), ("one layer", flat))
}
figure, axis = plt.subplots(figsize=(8, 3.8), layout="constrained")
for (title, values), color, style in zip(
    pushed.items(), ("black", BLUE, GREY), ("^-", "o-", "s:"), strict=True
):
    axis.plot(shifts, values, style, color=color, label=title)
axis.set(xlabel="places pushed along", ylabel="share of names copied", ylim=(-0.03, 1.03))
figure.legend(loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %%
for title, values in pushed.items():
    print(f"{title:12} in place {values[0]:.2f}, one place further {values[1]:.2f}")
print(
    f"best copying head: base {copying_scores(model).max():.2f}, two layers {copying_scores(tiny).max():.2f}"
)
assert pushed["the 1m base"][1] > 0.8
assert pushed["two layers"][1] < 0.5
assert pushed["one layer"][1] < 0.5

# %% [markdown]
# One place further, and the tiny models have lost it, one layer and two alike. They copied by place, and the score could not tell. (Three
# and six places hurt less: our lists have lengths that are multiples of six.) The base hardly minds. Its text had names
# coming back at all distances and in many forms, where places are of no use, and so it had to learn the real thing. What a model
# learns is what its text makes pay, and a score says only what it was made to ask. That holds for every score in this course.
#
# ## Exercises
#
# Each has a cell that checks your answer. The solutions are in `solutions/00_a_small_gpt.ipynb`.
#
# **1 · Warm-up.** A model that knows nothing gives each of 2048 tokens the same chance. What is its loss, in nats a token? And what is
# the loss of a model that knows that the next token is one of 24 first names, and no more?

# %% tags=["exercise"]
nothing, a_name = None, None  # two numbers, or expressions

# %% tags=["wrong"]
nothing, a_name = math.log2(2048), math.log2(24)

# %% tags=["wrong"]
nothing, a_name = 1 / 2048, 1 / 24

# %% tags=["wrong"]
nothing, a_name = math.log(2048), math.log(2048) - math.log(24)

# %% tags=["solution"]
nothing, a_name = math.log(2048), math.log(24)

# %% tags=["check"]
if nothing is None or a_name is None:
    print("not done yet")
else:
    assert nothing >= 0 and a_name >= 0, "a loss is MINUS a logarithm: never negative"  # noqa: PT018
    assert not math.isclose(nothing, 11, abs_tol=0.01), "in bits: nats use the natural logarithm"
    assert nothing > 1 / 2048, "that is the chance; the loss is minus its logarithm"
    assert math.isclose(nothing, math.log(2048), abs_tol=0.01), "minus the logarithm of 1/2048"
    assert not math.isclose(a_name, math.log(2048 / 24), abs_tol=0.01), (
        "that is what the knowledge gains; the loss that is left is minus the logarithm of 1/24"
    )
    assert math.isclose(a_name, math.log(24), abs_tol=0.01), "minus the logarithm of 1/24, in nats"
    print(f"right: {nothing:.2f} and {a_name:.2f}")

# %% [markdown]
# **2 · The head before the head.** To find what *followed* a first time, an earlier layer must have told each token who stands
# before it. In large models single heads do that. In ours? Write `looks_back(weights)`: for weights (h, t, t), each head's mean weight on the position just before, over all
# positions but the first; the result has shape (h,).


# %% tags=["exercise"]
def looks_back(weights): ...  # (h,)


# %% tags=["wrong"]
def looks_back(weights):
    return weights.diagonal(dim1=1, dim2=2).mean(-1)


# %% tags=["wrong"]
def looks_back(weights):
    return weights.diagonal(1, dim1=1, dim2=2).mean(-1)


# %% tags=["wrong"]
def looks_back(weights):
    return weights.diagonal(-1, dim1=1, dim2=2).sum(-1) / weights.shape[1]


# %% tags=["solution"]
def looks_back(weights):
    return weights.diagonal(-1, dim1=1, dim2=2).mean(-1)


# %% tags=["check"]
toy = torch.zeros(2, 4, 4)
toy[0] = torch.eye(4)  # looks at itself
toy[1, 1:, :3], toy[1, 0, 0] = torch.eye(3), 1.0  # looks at the one before
answer = looks_back(toy)
if answer is None:
    print("not done yet")
else:
    answer = torch.as_tensor(answer).float()  # a list will do as well
    assert answer.shape == (2,), (
        f"one number a head: the shape must be (2,), not {tuple(answer.shape)}"
    )
    for said, value in {
        "that is the weight on ITSELF: one place further left": [1, 0.25],
        "that is the weight on the place AHEAD: the row is who looks, the column at whom": [0, 0],
        "the first position has none before it: divide by t - 1": [0, 0.75],
        "the mean over the positions, not the sum": [0, 3],
    }.items():
        assert not torch.allclose(answer, torch.tensor(value).float()), said
    assert torch.allclose(answer, torch.tensor([0.0, 1])), "weights[:, j, j - 1], for j from 1"
    best = [max(map(float, looks_back(w))) for w in all_weights(model, ids)]
    alike = float(looks_back(torch.ones(1, 20, 20).tril() / torch.arange(1, 21)[:, None])[0])
    assert max(best) < 0.6  # the copying head above is surer than that
    print(f"right. The base's best head in each layer: {[round(b, 2) for b in best]};")
    print(f"looking everywhere alike would give {alike:.2f}. No single head does it for sure:")
    print("it must be spread over several heads, or done otherwise.")

# %% [markdown]
# **3 · Hard: a copier without learning.** Write the rule itself. `follow(tokens)` takes a list of token ids and says which comes next:
# find the longest run of tokens at the end that also stands somewhere earlier, and return what followed it there (the latest such place, if there
# are several); `None` if even the last token is new. (It will err where another list stands before, in the same window.)


# %% tags=["exercise"]
def follow(tokens): ...  # a token, or None; the stub returns None


# %% tags=["wrong"]
def follow(tokens):
    for start in range(len(tokens) - 2, -1, -1):
        if tokens[start] == tokens[-1]:
            return tokens[start + 1]
    return None


# %% tags=["wrong"]
def follow(tokens):
    for length in range(len(tokens) - 1, 0, -1):
        for start in range(len(tokens) - length):
            if tokens[start : start + length] == tokens[-length:]:
                return tokens[start + length]
    return None


# %% tags=["wrong"]
def follow(tokens):
    for length in range(len(tokens), 0, -1):
        for start in range(len(tokens) - length, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                return tokens[start + length]
    return None


# %% tags=["solution"]
def follow(tokens):
    for length in range(len(tokens) - 1, 0, -1):
        end = tokens[-length:]
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == end:
                return tokens[start + length]
    return None


# %% tags=["check"]
def ask(*tokens):
    try:
        return follow(list(tokens))
    except IndexError:
        return "an index beyond the list: has the end found itself?"


if ask(1, 2, 3, 1) is None and ask(1, 2, 1, 3, 1) is None:
    print("not done yet")
else:
    said = ask(1, 2, 3, 1)
    assert said == 2, f"after 1, 2, 3, 1: 1 stood there before, and 2 followed; you say {said}"
    said = ask(1, 2, 3)
    assert said is None, f"3 is new: the end is no EARLIER place; you say {said}, not None"
    said = ask(1, 2, 5, 3, 2, 6, 1, 2)
    assert said == 5, f"the LONGEST run: 1, 2 was followed by 5; you say {said}"
    said = ask(1, 2, 1, 3, 1)
    assert said == 3, f"the LATEST place, where several are as long, not the first: you say {said}"
    hits = [
        follow(row[:j]) == row[j]
        for row, marks in zip(test[:40].tolist(), names_again(test[:40]).tolist(), strict=True)
        for j in range(len(row))
        if marks[j]
    ]
    print(
        f"right: your rule copies {sum(hits) / len(hits):.2f} of the names, the tiny GPT {points[-1][1]:.2f}"
    )

# %% [markdown]
# ## Summary, at this size
#
# - A GPT is token and position vectors, blocks of attention and MLP, and the token table once more; only attention looks elsewhere.
# - At this size our bases copy names that they never saw, and answer questions about them; told apart by relation alone, they fail more the smaller they are.
# - At this size copying comes suddenly, after many steps without a trace of it; a text whose names never return teaches none at all.
# - At this size a tiny model on lists of one form copies by place: pushed along by one position, it is lost. The base is not.
# - A score at this size, as at any, is worth as much as what a model that learned something else would get.
#
# **To read:** Olsson et al. 2022, *In-context Learning and Induction Heads*, arXiv 2209.11895; `data/README.md`, the data card, and
# `data/LOG.md` on what failed. Then lesson 01: what does changing everything cost?
