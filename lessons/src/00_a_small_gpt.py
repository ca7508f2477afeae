# %% [markdown]
# # 00 · A small GPT
#
# A company trains a language model for one night to answer its customers. In the morning a number called the loss
# is lower, and the answers look good. Did the model learn this now, did it know it before, or did it find a shortcut that will fail next week? This lesson
# looks inside small models, and catches a shortcut. Later lessons are about parameter-efficient fine-tuning (PEFT).
#
# After this lesson you can
# - turn text into tokens and back;
# - compute the loss of a model by hand, and say what its size means;
# - name the parts of a GPT, and compute its attention;
# - test whether a model learned what its score suggests.
#
# **Time.** About an hour, and 25 minutes more for "Going further". All results are for GPTs with at most 3 million parameters.
# [Glossary](README.md#glossary).

# %%
import inspect
import json
import math
from itertools import islice
from random import Random

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display

from minipeft import GPT, GPTConfig, gpt
from minipeft.data import card, text  # questions for a model, and the generator of our texts
from minipeft.data.words import NEW_PEOPLE, PEOPLE
from minipeft.grader.lessons import check, claim, hint, solution, solved
from minipeft.lab import DATA, evaluate, report, tasks
from minipeft.lab.base import load_base, windows
from minipeft.lab.recipes import RunConfig
from minipeft.lab.train import train

BLUE, ORANGE, GREY = (report.COLORS[name] for name in ("full", "lora", "frozen"))
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
base = load_base(DATA / "base" / "1m")
model = base.model().eval()

# %% [markdown]
# ## Before you start
#
# Two questions about PyTorch. Replace `None`, and run both cells.
#
# **1.** `x` has the shape (2, 5, 16), and `w` the shape (16, 48). What is the shape of `x @ w`?

# %% tags=["exercise"]
shape = None  # three numbers in parentheses

# %% tags=["solution"]
shape = (2, 5, 48)  # each of the 2 · 5 vectors of 16 numbers becomes one of 48

# %% tags=["check"]
check("00.matmul", shape)

# %% [markdown]
# **2.** `scores` has the shape (3, 4). What is the sum of all twelve numbers of `scores.softmax(dim=-1)`?

# %% tags=["exercise"]
total = None  # a number

# %% tags=["solution"]
total = 3  # each of the 3 rows sums to 1

# %% tags=["check"]
check("00.softmax", total)

# %% [markdown]
# If an answer is wrong, call `hint(1)`, `hint(2)` or `solution()` in a new cell. They help with the check that you ran last. Skip lines with `claim`: they test the lesson's text.
#
# ## How does a skill appear?
#
# Later you train a tiny GPT from random weights. For 400 steps it sees lists of names that are then repeated: "The names: Ada Bell, Carl Cook. Again: Ada Bell,
# Carl Cook." A name is a pair of words; the test has pairs that it has never seen.
#
# **Your guess:** after how many steps does it copy half of the name tokens? And why?

# %%
guess = None  # steps, 0 to 400
reason = ""

# %% [markdown]
# ## Text becomes tokens
#
# A model reads numbers. A *tokenizer* cuts a text into *tokens*, and gives each its number, the *id*. Ours knows 2,048 tokens: its *vocabulary*.
# Frequent words are one token, and rare words are cut into parts. `Ġ` stands for a space.

# %%
for sentence in ("Clara Stone lost a golden key.", "Hello, PEFT!"):
    encoded = base.tokenizer.encode(sentence)
    print(
        *(f"{token} {id}" for token, id in zip(encoded.tokens, encoded.ids, strict=True)), sep="   "
    )

# %% [markdown]
# **Exercise 1.** Write the reverse. `vocabulary` is a dictionary from token to id. `to_text(ids, vocabulary)` returns the text, with spaces instead of `Ġ`.


# %% tags=["exercise"]
def to_text(ids, vocabulary): ...  # return the text


# %% tags=["solution"]
def to_text(ids, vocabulary):
    tokens = {number: token for token, number in vocabulary.items()}
    return "".join(tokens[number] for number in ids).replace("Ġ", " ")


# %% tags=["check"]
check("00.to_text", to_text)

# %% [markdown]
# Our *base models* were trained on ten million tokens about a small invented world. This is called *pretraining*.
# Here are three documents. Names are pairs of words, and one pair in eight is *held out*: it never occurs in these texts. Its words occur in other pairs.

# %%
for seed in (13, 34, 20):
    print(text.document(Random(seed)), "\n")

# %% [markdown]
# ## The loss
#
# A GPT predicts the next token. At each position it computes one number for each token of the vocabulary, the *logits*, and softmax turns them into
# probabilities. The loss is small if the token that comes next had a high probability p:
#
# $$ \text{loss} = -\frac{1}{T-1} \sum_{t=1}^{T-1} \log p\,(\text{token}_{t+1} \mid \text{token}_1, \dots, \text{token}_t) $$
#
# This mean of −log p is the *cross-entropy*. With the natural logarithm its unit is the *nat*. The *label* is the token that should come
# next, so the labels are the text, *shifted by one position*.

# %%
sentence = "Clara Stone lost a golden key. What was lost? A golden key."
encoded = base.tokenizer.encode(sentence)
ids = torch.tensor([encoded.ids])
with torch.no_grad():
    out = model(ids, labels=ids)  # the model shifts the labels itself
probabilities = out.logits[0].softmax(-1)  # (t, v)
by_hand = []
print(f"{'the model reads':16} {'label':10} {'p':>6} {'-log p':>7}")
for t in range(len(encoded.ids) - 1):
    p = probabilities[t, encoded.ids[t + 1]].item()
    by_hand.append(-math.log(p))
    print(f"{encoded.tokens[t]:16} {encoded.tokens[t + 1]:10} {p:6.3f} {by_hand[-1]:7.3f}")
mean = sum(by_hand) / len(by_hand)
assert math.isclose(mean, out.loss.item(), rel_tol=1e-4)
print(f"the mean is {mean:.3f} nats per token, as the model says")
claim(by_hand[-3] < by_hand[4] / 2, "the second time, “golden” is easier to predict")

# %% [markdown]
# Look at "golden key": the second time, the model can read it. A surprise, such as "What", costs many nats.
#
# **Exercise 2.** A model that knows nothing gives each of the 2,048 tokens the same probability. What is its loss in nats? And if it only knows that
# one of 24 tokens comes next, all equally likely?

# %% tags=["exercise"]
nothing = None  # a number, or an expression
a_name = None

# %% tags=["solution"]
nothing = math.log(2048)  # minus the logarithm of 1/2048
a_name = math.log(24)

# %% tags=["check"]
check("00.nats", nothing, a_name)

# %% [markdown]
# $e^{\text{loss}}$ is called *perplexity*. With 24 equally likely tokens, it is 24.
#
# **Exercise 3.** A text has two labels. The model gives them the probabilities 1/2 and 1/8. What is its perplexity?

# %% tags=["exercise"]
perplexity = None

# %% tags=["solution"]
perplexity = math.exp((math.log(2) + math.log(8)) / 2)  # the loss is the mean of both

# %% tags=["check"]
check("00.perplexity", perplexity)

# %% [markdown]
# **Exercise 4.** Write the loss of a batch. `logits` has the shape (b, t, v): texts, positions, vocabulary. `ids` has (b, t). Do not forget the shift. You may use `F.cross_entropy`.


# %% tags=["exercise"]
def my_loss(logits, ids): ...  # the mean loss per label, in nats


# %% tags=["solution"]
def my_loss(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


# %% tags=["check"]
check("00.my_loss", my_loss)

# %% [markdown]
# ## A loss curve
#
# We pretrain a smaller GPT for 250 steps. A loss means little alone, so we compare with models that only count. One ignores the context: a token's probability is its share of the training text. A *5-gram model* counts which token follows each group of four.
# Their losses are on held-out text, and the curve shows the training loss, so compare roughly.

# %%
known = json.loads((DATA / "results" / "bases.json").read_text())
settings = {"n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.08}
settings |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def batches(rows, seed=0):
    """Batches of 16 texts in random order, forever. The labels are the ids."""
    for i in tasks.shuffled(list(range(len(rows))), 16, seed):
        yield [{"input_ids": rows[i], "labels": rows[i]}]


def run(steps):
    return RunConfig(
        steps=steps, learning_rate=6e-3, warmup=50, lr_end=0.05, weight_decay=0.1, beta2=0.95
    )


rng = Random(5)
documents = base.tokenizer.encode_batch([text.document(rng) for _ in range(4000)])
rows = windows([document.ids for document in documents], 64, base.end)  # 64 tokens per row
torch.manual_seed(0)
small = GPT(GPTConfig(vocab_size=2048, n_positions=64, **settings))
losses = train(small, batches(rows), run(250), title="pretraining").losses

# %%
levels = {
    "all tokens equally likely": math.log(2048),
    "counting tokens": known["unigram"],
    "5-gram model": known["5-gram"],
    "our 1M base": known["bases"]["1m"]["loss"],
}
figure, axis = plt.subplots(figsize=(7, 3.8))
axis.plot(range(1, 251), losses, color=BLUE)
axis.text(252, losses[-1], f"small GPT: {losses[-1]:.1f}", va="center", color=BLUE)
for name, level in levels.items():
    axis.axhline(level, xmax=0.97, color=GREY, linestyle="--", linewidth=1)
    axis.text(252, level, f"{name}: {level:.1f}", va="center")
axis.set(xlabel="step", ylabel="loss (nats per token)", yscale="log", xlim=(0, 255))
axis.set_title("training loss (dashed: models on held-out text)", fontsize=10)
axis.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
axis.minorticks_off()
report.show(
    figure,
    "Training loss by step: it starts near 7.7, passes the model that counts tokens within 50 steps, and ends above the 5-gram model and the 1M base.",
)
claim(known["5-gram"] < losses[-1] < known["unigram"] - 1, "the small GPT ends in between")

# %% [markdown]
# Our base with 1 million parameters (1M) was trained far longer than the small GPT. Both models continue three prompts, always with the most likely token:

# %%
for prompt in (
    "The names: Rita Clay, Pablo Sands, Jana Bell. Again:",
    "We went to Lemon Gate. The",
    "The capital of France is",
):
    prompt_ids = torch.tensor([base.tokenizer.encode(prompt).ids])
    for name, writer in (("small GPT", small), ("1M base", model)):
        out = writer.generate(prompt_ids, max_new_tokens=14)[0, prompt_ids.shape[1] :]
        print(f"{name:10} {prompt} [{base.tokenizer.decode(out.tolist()).strip()}]")

# %% [markdown]
# ## The parts of a GPT
#
# Each token becomes a vector, its *embedding*, and so does its position. Their sum starts the *residual stream*, one vector per token. Every *block* adds to it twice:
#
# $$ x \leftarrow x + \mathrm{Attention}(\mathrm{LN}(x)), \qquad x \leftarrow x + \mathrm{MLP}(\mathrm{LN}(x)) $$
#
# - *LN*, LayerNorm, brings each vector to mean 0 and variance 1, then multiplies it by learned numbers, and adds other learned numbers.
# - The *MLP* works on each position by itself: linear layer, nonlinear function, linear layer.
# - Only *attention* carries information from one position to another.
#
# At the end, after one more LN, the logit of a token is the dot product of x with the token's embedding.

# %%
parts = {"tokens": "wte", "positions": "wpe", "attention": ".attn.", "MLP": ".mlp.", "LN": "ln_"}
names = dict(model.named_parameters())
for title, part in parts.items():
    print(f"{title:10} {sum(p.numel() for name, p in names.items() if part in name):9,}")
print(f"{'all':10} {sum(p.numel() for p in names.values()):9,}")
print(model.transformer.h[0])

# %% [markdown]
# **Exercise 5.** How many parameters does the MLP of one block have? Both of its layers have a bias.

# %% tags=["exercise"]
mlp = None  # a number, or an expression

# %% tags=["solution"]
mlp = 128 * 512 + 512 + 512 * 128 + 128

# %% tags=["check"]
check("00.mlp", mlp)

# %% [markdown]
# ## Attention
#
# Each position computes three vectors: a query q (what am I looking for?), a key k (what do I offer?) and a value v (what do I pass on?). The *weights* say how much each position
# takes from the others (*attends to* them):
#
# $$ \mathrm{weights} = \mathrm{softmax}\!\left(\frac{q\,k^\top}{\sqrt{d_k}} + \mathrm{mask}\right), \qquad y = \mathrm{weights} \cdot v $$
#
# Here a key has $d_k$ numbers. The mask is −∞ where a position would look ahead, and 0 elsewhere. Several *heads* do this, each with its own part of the vectors; a linear layer mixes their results.
#
# **Exercise 6.** Write `attention_weights(q, k)`, for q and k of the shape (h, t, $d_k$), with h heads. It returns the weights, (h, t, t). Row i says where
# position i looks.


# %% tags=["exercise"]
def attention_weights(q, k): ...  # return (h, t, t)


# %% tags=["solution"]
def attention_weights(q, k):
    t = q.shape[-2]
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (h, t, t)
    ahead = torch.ones(t, t, dtype=torch.bool).triu(1)
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)


# %% tags=["check"]
check("00.attention", attention_weights)
if not solved("00.attention"):  # until yours is right, the lesson uses PyTorch's

    def attention_weights(q, k):
        one_hot = torch.eye(q.shape[-2]).expand(*q.shape[:-2], -1, -1)
        return F.scaled_dot_product_attention(q, k, one_hot, is_causal=True)


# %% [markdown]
# Compare with [minipeft's attention](../minipeft/gpt.py). Its shape comments write k for $d_k$, and `past` is for generation (lesson 06).

# %%
sentence = "The names: Rita Clay, Pablo Sands, Jana Bell. Again: Rita Clay, Pablo Sands,"
listed = base.tokenizer.encode(sentence)
listed_ids, t = torch.tensor(listed.ids), len(listed.ids)
block = model.transformer.h[0]
with torch.no_grad():
    x = model.transformer.wte(listed_ids) + model.transformer.wpe(torch.arange(t))  # (t, d)
    qkv = block.attn.c_attn(block.ln_1(x))  # (t, 3 d)
    q, k, v = qkv.view(t, 3, 4, 32).permute(1, 2, 0, 3)  # each (h, t, d_k)
    y = (attention_weights(q, k) @ v).transpose(0, 1).reshape(t, 128)  # heads next to each other
    by_hand = block.attn.c_proj(y)  # (t, d)
    minipefts, _ = block.attn(block.ln_1(x)[None], None, None)
assert torch.allclose(by_hand, minipefts[0], atol=1e-4)
print(inspect.getsource(gpt.Attention.forward))

# %% [markdown]
# ## What can our bases do?
#
# These prompts have one right continuation. All names are from held-out pairs.

# %%
titles = {
    "reads a list of names back, names held out": "reads a list back",
    "second mention of a name, names held out": "completes a name",
    "answers about one place, values held out": "answers about one place",
    "the same, all values people (chance 1/3)": "the same, all answers are people",
}
for key in titles:
    prompt, wanted = card.PROBES[key][1](text.Writer(Random(3), text.VALUES | card.HELD_OUT))
    print(f"{prompt} [{wanted.strip()}]\n")
columns = {f"{name.upper()} base": row["probes"] for name, row in reversed(known["bases"].items())}
table = [[t, *(f"{p[key]:.2f}" for p in columns.values())] for key, t in titles.items()]
display(Markdown(report.markdown_table(["share correct", *columns], table)))
people = [row["the same, all values people (chance 1/3)"] for row in columns.values()]
claim(people[0] < people[1] < people[2], "larger bases tell people apart better")
claim(min(p[key] for p in columns.values() for key in list(titles)[:2]) > 0.95, "all bases copy")

# %% [markdown]
# All bases copy. But look at the last two rows. Row three allows a shortcut: if a text has only one person, the model can answer with that person. Row four has three people: naming one of them is
# right one time in three. All bases do better than that, but none reaches its value in row three.
#
# ## Watch it learn to copy
#
# Now test your guess with two tiny GPTs. One sees such lists. The other, the *twin*, sees lists in which other names follow "Again:".

# %%
firsts, lasts = (sorted({name.split()[i] for name in PEOPLE})[:24] for i in (0, 1))
seen, new = (
    [name for name in names if name.split()[0] in firsts and name.split()[1] in lasts]
    for names in (PEOPLE, NEW_PEOPLE)
)


def a_list(rng, names, returning=True):
    n = rng.randint(2, 4)
    chosen = rng.sample(names, 2 * n)
    again = chosen[:n] if returning else chosen[n:]
    return f"The names: {', '.join(chosen[:n])}. Again: {', '.join(again)}."


def list_rows(names, returning, n, seed):
    """Lists in rows of 64 tokens. An end token follows each list. Each row starts with a list."""
    rng = Random(seed)
    encoded = base.tokenizer.encode_batch([a_list(rng, names, returning) for _ in range(n)])
    return windows([e.ids for e in encoded], 64, base.end)


print(f"{len(seen)} names to train on, {len(new)} held out")
print(*(a_list(Random(1), seen, returning) for returning in (True, False)), sep="\n")

# %%
used = list_rows(seen + new, True, 1000, 1).unique()  # all tokens that lists need
again, *signs = (base.tokenizer.encode(piece).ids[0] for piece in (" Again", ":", ",", "."))
test = list_rows(new, True, 150, seed=99)


def to_small(ids):
    return torch.searchsorted(used, ids)  # the ids of the small vocabulary


def is_name_again(ids):
    """For one text, whether each token belongs to a name after "Again:"."""
    marks, after = [], False
    for token in ids.tolist():
        marks.append(after and token not in [*signs, base.end])
        after = token == again or (after and token != base.end)
    return marks


def copied(model, rows, offset=0):
    """The share of name tokens that are copied, with an offset added to all positions."""
    with evaluate.evaluating(model):
        positions = torch.arange(offset, 64)[None]
        logits = model(rows[:, : 64 - offset], position_ids=positions).logits
    marks = torch.tensor([is_name_again(row) for row in test])[:, 1 : 64 - offset]
    return (logits[:, :-1].argmax(-1) == rows[:, 1 : 64 - offset])[marks].float().mean().item()


# %%
def learn(returning=True, layers=2, seed=0):
    """A tiny GPT trained on lists, and the share of names that it copied, by step."""
    rows, points = to_small(list_rows(seen, returning, 9000, seed)), []
    torch.manual_seed(seed)
    config = GPTConfig(
        vocab_size=len(used), n_positions=64, **settings | {"n_layer": layers}
    )  # fmt: skip
    model = GPT(config)

    def look(row):
        if row["step"] % 20 == 0:
            points.append((row["step"], copied(model, to_small(test))))

    look({"step": 0})
    train(model, batches(rows, seed), run(400), after_step=look)
    return model, points


tiny, points = learn()
twin, twin_points = learn(returning=False)

# %%
half = next((step for step, share in points if share >= 0.5), None)
figure, axis = plt.subplots(figsize=(7, 3.6))
for found, color, style, label in (
    (points, BLUE, "o-", "names return"),
    (twin_points, GREY, "x--", "twin: other names follow"),
):
    axis.plot(*zip(*found, strict=True), style, color=color, markersize=4, label=label)
    axis.text(405, found[-1][1], f"{found[-1][1]:.2f}", va="center", color=color)
axis.plot(
    [half], [dict(points)[half]], "o", color=BLUE, markersize=9, label=f"half copied by step {half}"
)
if guess is not None:
    axis.axvline(guess, color="black", linestyle=":", label="your guess")
axis.set(xlabel="step", ylabel="share of name tokens copied", ylim=(-0.03, 1.03))
axis.legend(frameon=False, loc="center right")
report.show(
    figure,
    "Share of names copied by step: near zero for about 120 steps, then a jump to 0.6 within 40 steps, and above 0.8 at the end. The twin stays at zero.",
)
before = max(share for step, share in points if step <= half - 60)
print(f"up to 60 steps before half: at most {before:.2f}; guessing one of 24 words: {1 / 24:.2f}")
claim(before < 0.25 < 0.6 < points[-1][1], "copying comes suddenly, after many steps without it")
claim(max(share for _, share in twin_points) < 0.15, "the twin never copies")

# %% [markdown]
# In this run, copying comes suddenly. The twin, whose names never return, does not copy.
#
# ## Look inside
#
# How could a model copy? After "Again: Rita", a head could find the earlier "Rita", and attend to the token *after* it: "Clay". Such a head is an *induction head*
# ([Olsson et al. 2022](https://arxiv.org/abs/2209.11895)). A list has several commas: at a comma, it must also use the word before.
#
# When the model is about to copy a word, how much weight does each head put on this word in the original list?


# %%
@torch.no_grad()
def all_weights(model, ids, positions=None):
    """The attention weights of all layers for a text (t,): (layers, h, t, t)."""
    t, found = len(ids), []
    positions = torch.arange(t) if positions is None else positions
    x = (model.transformer.wte(ids) + model.transformer.wpe(positions))[None]  # (1, t, d)
    for block in model.transformer.h:
        qkv = block.attn.c_attn(block.ln_1(x))[0]  # (t, 3 d)
        q, k, _ = qkv.view(t, 3, block.attn.n_head, -1).permute(1, 2, 0, 3)  # each (h, t, d_k)
        found.append(attention_weights(q, k))
        x, _ = block(x, None, None)
    return torch.stack(found)


# %%
def pairs(ids, second=False):
    """(i, j): a name comes after position i, and its place in the list is j.

    second: only from the first to the second word of a name.
    """
    marks = is_name_again(ids)
    wanted = [i for i in range(len(ids)) if marks[i] and (marks[i - 1] or not second)]
    return [(i - 1, ids.tolist().index(ids[i])) for i in wanted]


def head_scores(model, texts, offset=0, gap=0, second=False):
    """For each head, the mean weight on the name that must come next: (layers, h).

    offset: added to all positions. gap: added from "Again" on, so that distances change.
    """
    scores = []
    for ids in texts:
        positions = torch.arange(len(ids)) + offset
        positions[ids.tolist().index(again) :] += gap
        known_ids = ids if model.config.vocab_size == 2048 else to_small(ids)
        weights = all_weights(model, known_ids, positions)
        scores += [weights[:, :, i, j] for i, j in pairs(ids, second)]
    return torch.stack(scores).mean(0)


# %%
rng = Random(7)
lists = [a_list(rng, new) for _ in range(30)]
texts = [torch.tensor(base.tokenizer.encode(one).ids) for one in lists]
torch.manual_seed(0)
untrained = GPT(model.config).eval()
scores = [head_scores(one, texts) for one in (model, tiny, untrained)]
best = [score.max().item() for score in scores]
for name, score in zip(("1M base", "tiny GPT", "never trained"), scores, strict=True):
    print(f"{name:14} best of {score.numel():2} heads: {score.max():.2f}")
claim(min(best[:2]) > 3 * best[2], "both have a head that looks at the next name")

# %%
layer, head = divmod(int(head_scores(model, texts).argmax()), 4)
weights = all_weights(model, listed_ids)[layer, head]
shown = [token.replace("Ġ", " ") for token in listed.tokens]
start = listed.tokens.index("ĠAgain")
figure, axis = plt.subplots(figsize=(7, 3.6))
image = axis.imshow(weights[start:], cmap="Greys", vmin=0, vmax=1)
for i, j in [*pairs(listed_ids), (t - 1, listed.tokens.index("ĠJana"))]:
    box = plt.Rectangle((j - 0.5, i - start - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2)
    axis.add_patch(box)
axis.set_xticks(range(t), shown, rotation=90)
axis.set_yticks(range(t - start), shown[start:])
axis.set(xlabel="looks at", ylabel="has just read", title=f"1M base, layer {layer}, head {head}")
figure.colorbar(image, label="weight", shrink=0.8)
report.show(
    figure,
    "Attention weights of one head while a list is read back: the dark cells are on the names that come next.",
)

# %% [markdown]
# Orange boxes mark the word that must come next. Both models have a head that looks there (the figure shows the base's). Is it an induction head? It could also follow a rule about
# positions, such as "look 10 tokens back". Read a list back in *reverse order*: then such a rule finds the wrong name. (We measure second words only: nothing in the text tells that the order is reversed.)
#
# **Your guess:** in which of the two models does the head still find the right name?

# %%
guess_still = None  # "base", "tiny", "both" or "neither"
reason = ""

# %%
same, reverse = [], []
for one, ids in zip(lists, texts, strict=True):
    names = one.removeprefix("The names: ").split(". Again")[0].split(", ")
    if len(names) != 3:  # of three, the middle name would stay in the middle
        back = f"The names: {', '.join(names)}. Again: {', '.join(names[::-1])}."
        same.append(ids)
        reverse.append(torch.tensor(base.tokenizer.encode(back).ids))
after = {}
for name, one in (("1M base", model), ("tiny GPT", tiny)):
    head = head_scores(one, texts).argmax()  # its best head, on all lists in the same order
    kept = [head_scores(one, ids, second=True).flatten()[head] for ids in (same, reverse)]
    after[name] = kept
    print(f"{name:8}  weight on the second word: same order {kept[0]:.2f}, reverse {kept[1]:.2f}")
claim(after["1M base"][1] > 0.5 * after["1M base"][0], "the base's head looks for the token")
claim(after["tiny GPT"][1] < 0.5 * after["tiny GPT"][0], "the tiny GPT's head does not")

# %% [markdown]
# The base's head keeps most of its weight on the right word, as an induction head does. The tiny GPT's does not. Its lists are much alike, so a simpler
# rule can be enough. ("Going further" looks for it.)
#
# ## Summary
#
# - A tokenizer turns text into ids, and a GPT predicts the next one.
# - The loss is the mean of −log p, in nats per token. The labels are the text, shifted by one.
# - Every block adds to the residual stream. Only attention connects positions.
# - In our run, copying appeared suddenly. It did not appear where names never return.
# - A high score can come from a skill or from a shortcut. Change the test so that the shortcut fails.
#
# **Do you remember?** Answer first, then open.
#
# <details><summary>1. A model has a loss of 0 nats on a text. What are its perplexity and its probability of each next token?</summary>Both are 1.</details>
#
# <details><summary>2. You forgot to shift the labels, and train. The loss quickly falls to nearly 0. What did the model learn?</summary>To repeat the token that it has just read.</details>
#
# <details><summary>3. A head puts a high weight on the name that comes next. Why is this not yet an induction head?</summary>It may follow a rule about positions. In reverse order, an induction head still finds the name.</details>
#
# **To read:** [Olsson et al. 2022](https://arxiv.org/abs/2209.11895) on induction heads, and [data/README.md](../data/README.md) on our texts and bases.
#
# # Going further
#
# ## What did the tiny GPT learn?
#
# Perhaps a rule about positions. Add an *offset* of one to all positions: the same tokens, but the first has position 1 instead of 0.
#
# **Your guess:** what share of the names will the tiny GPT copy then?

# %%
guess_offset = None  # 0 to 1
reason = ""

# %%
models = {"1M base": (model, test), "tiny GPT": (tiny, to_small(test))}
shares, apart = {}, {}
for name, (one, rows) in models.items():
    shares[name] = [copied(one, rows, offset) for offset in range(8)]
    apart[name] = [head_scores(one, texts, gap=gap).max().item() for gap in range(8)]
    moved = head_scores(one, texts, offset=1).max()
    print(f"{name:8} best head with an offset of one: {moved:.2f}")
ours, bases = shares["tiny GPT"], shares["1M base"]
claim(ours[1] < 0.5 * ours[0], "with an offset of one, the tiny GPT copies much less")
claim(apart["tiny GPT"][1] < 0.7 * apart["tiny GPT"][0], "its head looks at positions")
claim(min(ours[3], ours[6]) > ours[1] + 0.1, "offsets of three and six hurt less")
claim(bases[1] > bases[0] - 0.08, "the base copies with an offset of one")
claim(min(bases) > 0.7 and min(apart["1M base"]) > 0.7, "the base copies in all cases")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
titles = ("share of name tokens copied", "weight of the best head on the next name")
labels = ("offset of all positions", "offset from “Again” on")
for axis, found, title, label in zip(axes, (shares, apart), titles, labels, strict=True):
    for (name, values), color, style in zip(
        found.items(), (ORANGE, BLUE), ("^--", "o-"), strict=True
    ):
        axis.plot(range(8), values, style, color=color, label=name)
        for offset in (0, 1):
            axis.text(offset + 0.1, values[offset] + 0.04, f"{values[offset]:.2f}", color=color)
    axis.set(xlabel=label, ylim=(-0.03, 1.1), title=title)
if guess_offset is not None:
    axes[0].plot([1], [guess_offset], "k*", markersize=11, label="your guess")
handles = axes[0].get_legend_handles_labels()
figure.legend(*handles, frameon=False, loc="outside upper center", ncols=3)
report.show(
    figure,
    "With an offset of one position, the tiny GPT falls from above 0.8 to about 0.1, and the weight of its best head falls too; the base stays above 0.8 in both panels.",
)  # fmt: skip

# %% [markdown]
# Left: all positions move by one, so no distance changes, and still the tiny GPT hardly copies. So it learned which absolute positions to read. Such a rule can work here, because
# our lists have only three lengths, and each starts at a multiple of six. (So an offset of six hurts less. Three does too, perhaps because a name and its comma take three tokens.)
#
# The base loses almost nothing at an offset of one, and more at larger ones. On the right, only "Again" and what follows get an offset, so the distance to the original list changes. A head of the base still finds
# the names.
#
# ## Is one layer enough?
#
# Usually, an induction head needs help from an earlier layer, which tells each position the token *before* it. So after "Rita", a later head can look for the position whose previous token was "Rita".
# Olsson et al. find induction heads only in models with two or more layers. **Guess first:** how much will a GPT with one layer copy, without an offset and with an offset of one? (Write it down.)

# %%
flat, _ = learn(layers=1)
in_place, moved = (copied(flat, to_small(test), offset) for offset in (0, 1))
print(f"one layer:  no offset {in_place:.2f}, offset of one {moved:.2f}")
print(f"two layers: no offset {ours[0]:.2f}, offset of one {ours[1]:.2f}")
claim(in_place > 0.6, "a single layer copies, too")
claim(moved < 0.5 * in_place, "it does so by position")

# %% [markdown]
# In these two runs, one layer copies about as well as two. This fits what the offset showed: the task can be done without an induction head.
#
# ## What breaks it: labels that are not shifted
#
# Here is a training loop with a common bug: each position is trained to predict the token that it has just read.

# %%
torch.manual_seed(0)
rows = to_small(list_rows(seen, True, 2000, seed=0))
parrot = GPT(GPTConfig(vocab_size=len(used), n_positions=64, **settings))
optimizer = torch.optim.AdamW(parrot.parameters(), lr=3e-3)
for [batch] in islice(batches(rows), 60):
    logits = parrot(batch["input_ids"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())  # no shift
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
true_loss = parrot(**batch).loss.item()  # shifts
print(f"the loss that the bug shows: {loss.item():.3f}; the true one: {true_loss:.1f}")
out = parrot.generate(rows[:1, :5], max_new_tokens=8)
print(base.tokenizer.decode(used[out[0]].tolist()))
claim(loss.item() < 0.1, "without the shift, the loss falls to nearly zero")
claim(true_loss > math.log(len(used)), "the true loss is above that of a model that knows nothing")

# %% [markdown]
# The loss is nearly zero, and the model is worse than one that was never trained: it repeats its last token. If a loss is too good, check the labels first.
#
# ## More exercises
#
# **Exercise 7.** Does any head look at the position just before? Write `looks_back(weights)`: for weights (h, t, t), each head's mean weight on
# the position just before, over all positions except the first. The result has the shape (h,).


# %% tags=["exercise"]
def looks_back(weights): ...  # return (h,)


# %% tags=["solution"]
def looks_back(weights):
    return weights.diagonal(-1, dim1=1, dim2=2).mean(-1)


# %% tags=["check"]
check("00.looks_back", looks_back)

# %%
if solved("00.looks_back"):
    best = [max(looks_back(weights)) for weights in all_weights(model, listed_ids)]
    print("the base's best head in each layer:", [f"{float(weight):.2f}" for weight in best])
    uniform = torch.ones(1, t, t).tril() / torch.arange(1, t + 1)[:, None]
    print(f"with the same weight on all positions: {float(looks_back(uniform)[0]):.2f}")

# %% [markdown]
# In this one sentence, the best heads of some layers prefer that position, but none gives it nearly all of its weight. Perhaps several heads together pass on the previous token. We did not test this.
#
# **Exercise 8, harder.** Write the rule of an induction head, without learning. `follow(tokens)` gets a list of ids and says which id comes next. Find the longest sequence of tokens at the end of `tokens` that
# also occurs earlier (the two occurrences may overlap), and return the token that followed it there. If there are several such places, take the latest. If even the last token is new, return `None`.


# %% tags=["exercise"]
def follow(tokens): ...  # return an id, or None


# %% tags=["solution"]
def follow(tokens):
    for length in range(len(tokens) - 1, 0, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                return tokens[start + length]
    return None


# %% tags=["check"]
check("00.follow", follow)

# %%
if solved("00.follow"):
    found = [
        (row[i - 1] == signs[0], follow(row[:i]) == row[i])
        for row in test[:40].tolist()
        for i, is_name in enumerate(is_name_again(torch.tensor(row)))
        if is_name
    ]
    errors = [is_first for is_first, hit in found if not hit]
    share = 1 - len(errors) / len(found)
    print(f"your rule copies {share:.2f} of the names, the 1M base {shares['1M base'][0]:.2f}")
    print(f"{sum(errors)} of its {len(errors)} errors are at the first name after “Again:”")
    claim(sum(errors) > 0.8 * len(errors), "the rule fails at the first name")

# %% [markdown]
# At the first name after "Again:", the longest sequence may belong to an earlier list in the same row. There the rule copies from the wrong list.
