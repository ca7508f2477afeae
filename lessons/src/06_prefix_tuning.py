# %% [markdown]
# # 06 · Prefix tuning: what if every layer hears it?
#
# After this lesson you can
# - write attention with a prefix by hand, and the mask that belongs to it;
# - say what a prefix is, and what it is not: no queries, no MLP, nothing in embedding space;
# - explain why a prefix of zeros changes the output, and how much attention it gets;
# - count its parameters and its bytes, and say why its step is cheaper than LoRA's;
# - measure how far it comes, and what breaks it.
#
# **Paper.** Li and Liang 2021, *Prefix-Tuning: Optimizing Continuous Prompts for Generation*, arXiv 2101.00190.
#
# **Time.** Twenty minutes to read, three to run, forty for the exercises.

# %%
import inspect
import statistics
import time
from dataclasses import replace
from unittest import mock

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

from minipeft import (
    GPT,
    GPTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    prefix_tuning,
)
from minipeft.lab import DATA, compare, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import task_loss, text_loss
from minipeft.lab.finetune import build_model, finetune
from minipeft.lab.recipes import RECIPES, Recipe, RunConfig, load_sweeps
from minipeft.lab.report import COLORS, compare_figure

PURPLE, GREY = COLORS["prefix_tuning"], COLORS["frozen"]
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
OUT = DATA.parent / "out" / "06"  # what this lesson saves; git does not look there
base = load_base(DATA / "base" / "1m")
task = tasks.load_task(base, "describe")
print(task.train[0].prompt, "\n ->", task.train[0].completion)

# %% [markdown]
# Soft tokens at the input (lesson 04) speak once, and the deeper layers hear what the model makes of it.
# Prefix tuning speaks in every layer: a few extra keys and values there, for the text to attend to.
#
# ## A question first
#
# Put twenty keys and twenty values in front of the text, in every layer, all of them **zero**. A value of zero
# adds nothing, and a key of zero fits no query. One would think that it changes nothing.
#
# **Your guess:** how much of its attention does a token give to those twenty nothings, on average? 0 is none, 1 is all.

# %%
guess = 0.0  # a share between 0 and 1: put your own number here before you go on

# %% [markdown]
# ## The idea
#
# In every layer the queries of the text look at p more keys, and collect from p more values:
#
# $$ \mathrm{softmax}\!\left( \frac{q \, [K_P;\, k]^\top}{\sqrt{k_{width}}} + \mathrm{mask} \right) [V_P;\, v] $$
#
# $K_P$ and $V_P$ are all that is trained. They are *prepended*: every token of the text may look at
# all of them, and at the tokens before it and itself. So the mask is not the usual triangle. Left: the right mask,
# three virtual tokens before five real ones. Right: what `is_causal=True` makes of the same shapes in torch, whose
# triangle starts in the top left corner. We do not trust that sentence: we ask the function itself.

# %%
p, t = 3, 5
right = torch.ones(t, p + t).tril(p).bool()  # query i sees key j where j <= p + i
blank = torch.zeros(1, 1, t, 4), torch.zeros(1, 1, p + t, 4)
wrong = torch.nn.functional.scaled_dot_product_attention(
    *blank, torch.eye(p + t)[None, None], is_causal=True
)[0, 0].bool()  # values that are one-hot show where the attention went
figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
for axis, mask, title in zip(axes, (right, wrong), ("right", "is_causal=True"), strict=True):
    shown = mask.float()
    shown[:, :p] *= 0.6  # the prefix in a lighter shade
    axis.imshow(shown, cmap="Purples", vmin=0, vmax=1.2)
    axis.set_xticks(range(p + t), [f"P{j}" for j in range(p)] + [f"t{j}" for j in range(t)])
    axis.set_yticks(range(t), [f"t{i}" for i in range(t)])
    axis.set(title=title, xlabel="key", ylabel="query")
    axis.set_xticks([j - 0.5 for j in range(1, p + t)], minor=True)
    axis.set_yticks([i - 0.5 for i in range(1, t)], minor=True)
    axis.grid(which="minor", color="white", linewidth=2)
    axis.tick_params(which="both", length=0)
plt.show()
for i in range(t):
    names = [f"P{j}" if j < p else f"t{j - p}" for j in range(p + t) if wrong[i, j]]
    print(f"with is_causal=True, t{i} sees", *names)
assert torch.equal(right, GPT._mask(None, 1, t, p, "cpu")[0, 0]), "minipeft makes the left one"
assert not wrong[:, p:].diagonal().any(), "under the wrong mask no token sees itself"

# %% [markdown]
# With the wrong mask the first token does not see the whole prefix, and every token is blind for the last p
# tokens, itself included. Nothing crashes and no future leaks, so nobody warns you.
#
# ## By hand
#
# A toy GPT of one layer with two heads, and minipeft's prefix before it. Two hooks keep what went into its attention and what
# came out. Then the same by hand.

# %%
torch.manual_seed(0)
h, k = 2, 4  # heads, and the width of each
toy = GPT(GPTConfig(vocab_size=11, n_positions=16, n_embd=h * k, n_layer=1, n_head=h)).eval()
encoder = prefix_tuning.PrefixEncoder(toy, PrefixTuningConfig(num_virtual_tokens=p))
seen = {}
attention = toy.transformer.h[0].attn
attention.register_forward_hook(lambda layer, x, out: seen.update(x=x[0][0], y=out[0][0]))
encoder(toy, torch.tensor([[3, 1, 4, 1, 5]]))

P = encoder.embedding.weight.view(p, 2, h, k)  # one layer: keys, then values
q, keys, values = attention.c_attn(seen["x"]).view(t, 3, h, k).permute(1, 2, 0, 3)  # (h, t, k)
keys = torch.cat((P[:, 0].transpose(0, 1), keys), 1)  # (h, p + t, k)
values = torch.cat((P[:, 1].transpose(0, 1), values), 1)  # (h, p + t, k)
scores = q @ keys.mT / k**0.5  # (h, t, p + t)
y = scores.masked_fill(~right, -torch.inf).softmax(-1) @ values  # (h, t, k)
y = attention.c_proj(y.transpose(0, 1).reshape(t, h * k))
assert torch.allclose(y, seen["y"], atol=1e-6)
print("by hand and minipeft: the same numbers; queries:", q.shape[1], "keys:", keys.shape[1])

# %% [markdown]
# ## The real file
#
# `minipeft/methods/prefix_tuning.py` imports torch and nothing else. A model with a cache already takes keys and values from before
# (that is how it generates), so a prefix is a cache that nobody computed. These two functions write it. Beyond
# the lines above they know batches, every layer at once, padding, and an optional network that writes P (`transform`).

# %%
for function in ("prompt", "past"):
    print(inspect.getsource(getattr(prefix_tuning.PrefixEncoder, function)))

# %% [markdown]
# ## On the GPT
#
# LoRA starts as the base. Does a prefix? minipeft starts it, as peft does, with random numbers from N(0, 1);
# `init_weights="zero"` starts it with zeros. We ask for the loss on held-out text, of the kind that the base was
# pretrained on.


# %%
def with_prefix(p=20, **settings):
    """A fresh base behind a fresh prefix."""
    torch.manual_seed(0)
    settings |= {"num_virtual_tokens": p, "task_type": "CAUSAL_LM"}
    return get_peft_model(base.model(), PrefixTuningConfig(**settings)).eval()


starts = {"zeros": with_prefix(init_weights="zero"), "N(0, 1)": with_prefix()}
text = base.held_out[:64]
loss = {"no prefix": text_loss(base.model(), text)}
places = torch.arange(20, 20 + text.shape[1])[None]  # a prefix moves the text's positions, too
with torch.no_grad():
    loss["moved on"] = base.model()(text, labels=text, position_ids=places).loss.item()
loss |= {name: text_loss(model, text) for name, model in starts.items()}
for name, value in loss.items():
    print(f"{name:10} loss {value:.2f} on held-out text")
assert loss["no prefix"] + 0.05 < loss["moved on"] < loss["zeros"] - 0.2 < loss["N(0, 1)"]

# %% [markdown]
# Neither starts as the base. A small part of the harm comes from the positions: the text's run on from the prefix, here and in
# peft, and "moved on" is the base at those positions without a prefix. But the "nothing" does more. Why? A zero key has the score q · 0 = 0, and
# the softmax takes its exponential, which is **one**, not nothing. So p zero keys add p to the sum below the fraction. With the scores
# $s_j$ of the text's own keys that a query sees, and y what it would collect without a prefix, in one head:
#
# $$ a = \frac{p}{p + \sum_j e^{s_j}} \quad \text{goes to the prefix, and} \quad y' = (1 - a)\, y $$
#
# The zero values add nothing, but the rest is shrunk. Let us measure a. A hook keeps what each layer's `c_attn` gives;
# from there it is the arithmetic of the toy.


# %%
@torch.no_grad()
def prefix_attention(model, examples):
    """The prefix's share of the attention, and what the formula says for zero keys: both (l, h)."""
    kept, found, formula = [], [], []
    layers, heads, width = model.prompt_encoder.shape
    hooks = [
        block.attn.c_attn.register_forward_hook(lambda layer, x, out: kept.append(out[0]))
        for block in model.base_model.transformer.h
    ]
    past = model.prompt_encoder.past(model.base_model, 1)
    prefix = [keys[0] for keys, values in past]
    for example in examples:
        model(torch.tensor([example.prompt_ids + example.completion_ids]))
        for own, out in zip(prefix, kept, strict=True):
            t, p = len(out), own.shape[1]
            q, k, _ = out.view(t, 3, heads, width).permute(1, 2, 0, 3)  # (h, t, k)
            scores = q @ torch.cat((own, k), 1).mT / width**0.5  # (h, t, p + t)
            scores.masked_fill_(~torch.ones(t, p + t).tril(p).bool(), -torch.inf)
            found.append(scores.softmax(-1)[:, :, :p].sum(-1).mean(-1))
            formula.append((p / (p + scores[:, :, p:].exp().sum(-1))).mean(-1))
        kept.clear()
    for hook in hooks:
        hook.remove()
    return [torch.stack(x).view(-1, layers, heads).mean(0) for x in (found, formula)]


shares = {}
for name, model in starts.items():
    shares[name], formula = prefix_attention(model, task.test[:16])
    if name == "zeros":
        assert torch.allclose(shares[name], formula, atol=1e-4), "measured, and by the formula"
for name, share in shares.items():
    print(f"{name:8} {share.mean():.0%} of the attention, on average over heads and tokens")
print(f"for zeros you guessed {guess:.0%}; expect about a half")
assert 0.4 < shares["zeros"].mean() < 0.65
assert shares["N(0, 1)"].mean() > 0.4

# %% [markdown]
# Random keys get even more than zeros (with this seed, and six of seven others that we tried): a random score is as often above as below zero,
# and the exponential makes more of the high ones.
#
# Now the usual promises: only the prefix is trained, and its numbers are the formula's, 2 · p · l · d for l layers of width d. And one about
# what a prefix is *not*. You may read that it is optimised in the embedding space, or that p tokens are
# *appended* and the text becomes p tokens longer. Let us count how many tokens pass through an MLP.

# %%
ids = torch.tensor([base.tokenizer.encode(task.test[0].prompt).ids])
model, p = with_prefix(), 20
layers, d = model.config.n_layer, model.config.n_embd
model(ids, labels=ids).loss.backward()
assert [n for n, w in model.named_parameters() if w.grad is not None] == [
    "prompt_encoder.embedding.weight"
]
assert model.get_nb_trainable_parameters()[0] == 2 * p * layers * d


def through_mlp(model, gpt):
    seen = []
    hook = gpt.transformer.h[0].mlp.register_forward_hook(
        lambda m, x, out: seen.append(out.shape[1])
    )
    model(ids)
    hook.remove()
    return seen[0]


plain = base.model()
prompted = get_peft_model(base.model(), PromptTuningConfig(num_virtual_tokens=p))
pairs = ((plain, plain), (model, model.base_model), (prompted, prompted.base_model))
tokens = [through_mlp(*pair) for pair in pairs]
model.print_trainable_parameters()
print("tokens through the MLP: base {}, prefix tuning {}, prompt tuning {}".format(*tokens))
assert tokens == [ids.shape[1], ids.shape[1], ids.shape[1] + p]

# %% [markdown]
# A prefix asks nothing (no queries), passes through no MLP, and is no row of any embedding: it has 2 · l · d numbers
# a token where an embedding has d. It stands *before* the text, as keys and values only: those become p + t, the queries stay t.
#
# ## Against full fine-tuning
#
# The same examples in the same order, the same number of steps, each method at its own swept rate (`data/results/sweep.json`). One
# seed of full fine-tuning, the frozen base and prefix tuning runs here. LoRA and prompt tuning, and the other seeds, were run by
# `python -m minipeft compare --base data/base/1m --seeds 4 --output data/results/1m`.

# %%
shipped = [r for r in compare.load(DATA / "results/1m/compare.json") if not r.random_base]
others = {m: [r for r in rows if r.seed] for m, rows in compare.rows(shipped).items()}
seed_0 = RunConfig(steps=100, seed=0)
prefix = finetune(base, task, RECIPES["prefix_tuning"], replace(seed_0, output=OUT / "prefix"))
print(f"prefix tuning: {task.metric} {prefix.score:.2f}")
full = finetune(base, task, RECIPES["full"], seed_0)
print(f"full: {task.metric} {full.score:.2f}")
frozen = finetune(base, task, RECIPES["frozen"], seed_0)
print(f"the frozen base: {task.metric} {frozen.score:.2f}")
for live in (prefix, full):
    assert compare.in_spread(live, others[live.method]), "this run is unlike the other seeds"
    print(live.method, "other seeds:", [f"{r.score:.2f}" for r in others[live.method]])

# %% tags=["timing"]
every = [frozen, full, *others["full"]]
every += [r for r in shipped if r.method in ("lora", "prompt_tuning")]
every += [prefix, *others["prefix_tuning"]]
display(Markdown(compare.table(every, task)))

# %%
figure = compare_figure(compare.rows(every), task)
figure.axes[1].tick_params("x", rotation=20)
display(figure)
rows = compare.rows(every)
three = ("lora", "prefix_tuning", "prompt_tuning")
share = {method: compare.share_of_gap(every, rows[method]) for method in three}
on = {m: statistics.mean(r.forgetting["on"] for r in rows[m]) for m in ("full", *three)}
off = prefix.forgetting["off"]
steering = compare.rows(compare.load(DATA / "results/1m/sentiment/compare.json"))
verdicts = tasks.load_task(base, "sentiment").test[:64]
constant = sum(e.completion == " good." for e in verdicts) / len(verdicts)
print("share of the gap:", {m: f"{value:.2f}" for m, value in share.items()})
print("loss on pretraining text, on:", {m: f"{value:.2f}" for m, value in on.items()})
print(f"off: {off:.2f}, the base's own, to the bit")
for method in ("frozen", "full", *three):
    rate, score = steering[method][0].learning_rate, compare.spread(steering[method], "score")
    print(f"sentiment, {method:13} rate {rate}: {score}")
print(f'one who always says "good": {constant:.2f}')
assert compare.mean(steering["full"], "score") == compare.mean(steering["lora"], "score") == 1
assert min(record.score for record in steering["prefix_tuning"]) < 0.95
assert share["prompt_tuning"] + 0.2 < share["prefix_tuning"] < share["lora"] - 0.1
assert off == prefix.forgetting["base"] < on["full"] < on["prefix_tuning"] == max(on.values())

# %% [markdown]
# (The seconds in the table come from different machines; a fair clock follows below.) Prefix tuning learns a skill that
# prompt tuning, at the input alone, does not: speaking in every layer counts. Its paper found it level with full
# fine-tuning on large models and table-to-text. Here it stays well behind, and behind LoRA. And frozen means
# untouched, not unforgetting: while it is on, it has forgotten the most of the four. The last lines are about `sentiment`,
# where the base has only to be steered, from its shipped JSON: what full fine-tuning and LoRA always get, a prefix does not get with every seed.
# Its rate, or the loud random start, may be behind that; we come back to it.
#
# ## Who listens?
#
# Four layers with four heads each. How much of its attention does each head give to the prefix: to zeros, to the random start, to the
# trained one?

# %%
trained = PeftModel.from_pretrained(base.model(), OUT / "prefix").eval()
shares["trained"], _ = prefix_attention(trained, task.test[:16])
figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
for (name, share), style in zip(shares.items(), ("s", "x", "o"), strict=True):
    color = PURPLE if name == "trained" else "black" if name == "N(0, 1)" else GREY
    fill = "white" if name == "zeros" else color
    axis.plot(range(16), share.flatten(), style, color=color, markerfacecolor=fill, label=name)
axis.axhline(guess, color="black", linewidth=1, linestyle=":", label="your guess, for zeros")
for x in (3.5, 7.5, 11.5):
    axis.axvline(x, color="#dddddd", linewidth=1)
axis.set_xticks(
    range(16), [f"head {i % 4}" + f"\nlayer {i // 4}" * (i % 4 == 0) for i in range(16)]
)
axis.tick_params("x", labelsize=8)
axis.set(ylim=(-0.03, 1), ylabel="share of attention on the prefix")
figure.legend(loc="outside upper center", ncols=4, frameon=False)
plt.show()
mute = PeftModel.from_pretrained(base.model(), OUT / "prefix").eval()
mute.prompt_encoder.embedding.weight.data.view(20, 4, 2, 128)[:, :, 1] = 0  # (p, l, 2, d): values
muted = task_loss(mute, task.validation, base.end)["loss"]
for name, share in shares.items():
    print(f"{name:8} mean {share.mean():.2f}, heads from {share.min():.2f} to {share.max():.2f}")
print(f"validation loss {prefix.validation[-1]['loss']:.2f}, with values of zero {muted:.2f}")
assert shares["trained"].mean(1).min() > 0.08, "no layer turns away"
assert abs(shares["trained"].mean() - shares["zeros"].mean()) < 0.25
assert muted > 5 * prefix.validation[-1]["loss"]

# %% [markdown]
# Every layer listens, some heads with nearly all of their attention, some with little. But look at the means: the trained prefix gets about as much attention as nothing at all does. So attention tells
# that a prefix is heard, and not what it says. Take its values away, and its keys are worth nothing.
#
# ## The network, the number of tokens, the start
#
# The paper wrote P by a small network (`prefix_projection`), because training it directly was unstable there. One, five or
# twenty virtual tokens? And a start from zeros, which is quiet: does that help?
#
# **Guess** before you run it: which of the twenty tokens that all start from zero ends up most unlike the others?

# %%
usual = RECIPES["prefix_tuning"]
projection = Recipe(
    "projection",
    config=lambda p, steps: PrefixTuningConfig(num_virtual_tokens=p, prefix_projection=True),
    size=20,
)
from_zeros = Recipe(
    "from zeros",
    config=lambda p, steps: PrefixTuningConfig(num_virtual_tokens=p, init_weights="zero"),
    size=20,
)
quick = replace(base, held_out=None)  # without the measuring of what is forgotten


def run(task, recipe, rate, p=20, **options):
    options = {"n_evaluations": 1, "n_generate": 32} | options
    record = finetune(quick, task, recipe.with_size(p), RunConfig(learning_rate=rate, **options))
    start = f"{task.name}, {recipe.method}, {p} tokens, rate {rate:g}, seed {record.seed}"
    end = f"loss {record.validation[-1]['loss']:.2f}, score {record.score:.2f}"
    print(f"{start}, {record.trainable:,} trained: {end}")
    return record


print(f"twenty tokens, as above: loss {prefix.validation[-1]['loss']:.2f}")
one, five = (run(task, usual, 0.3, p) for p in (1, 5))
five_again = run(task, usual, 0.3, 5, seed=3)
quiet = run(task, from_zeros, 0.3, output=OUT / "zeros")

# %%
network = run(task, projection, 0.01)  # of 0.001, 0.003, 0.01 and 0.03 the best
steer = replace(tasks.load_task(base, "sentiment"), test=verdicts)
steered = {recipe.method: run(steer, recipe, 0.03) for recipe in (usual, from_zeros)}
noisy = [record.score for record in steering["prefix_tuning"]]
print("from N(0, 1), four seeds, shipped, as above:", [f"{score:.2f}" for score in noisy])
print(f'one who always says "good": {constant:.2f}')

# %%
zeros = PeftModel.from_pretrained(base.model(), OUT / "zeros").prompt_encoder.embedding.weight
random = trained.prompt_encoder.embedding.weight
for name, P in (("zeros", zeros), ("N(0, 1)", random)):
    apart = (P - P[0]).norm() / P.norm()
    print(f"how far twenty tokens lie apart that started from {name}: {apart:.4f}")
    assert (apart < 0.02) == (name == "zeros"), "equal voices stay equal"
assert quiet.score < 0.1 < prefix.score
assert steered["from zeros"].score > max(
    0.9, statistics.mean(noisy), steered["prefix_tuning"].score - 0.02
)
tried = (prefix, one, five, five_again, network)
twenty, one, five, again, written = (r.validation[-1]["loss"] for r in tried)
assert one > 1.3 * max(five, again)
assert min(five, again) > twenty
assert abs(written - twenty) < 0.3

# %% [markdown]
# - **The start.** None is unlike: twenty tokens that start equal get equal gradients and stay equal, for ever. They are one voice with
#   the weight of twenty. For a skill that is not enough. (LoRA's B may start from zeros, because the rows of A differ.)
# - **The number.** One token can't do it. Five do a good part with one seed, and little with another (the second line of five). Twenty do better.
# - **The network** trains several times as many numbers, and comes to about the same place. After training it can be thrown away.
#   At this size we see no gain from it.
#
# One voice does for steering, though: on `sentiment`, the start from zeros does as well as the usual one, N(0, 1), at the same rate, or better, and better than that does
# on the mean of its shipped seeds. So the start that fails on one task can be the better one on another.
#
# ## What it costs
#
# Forward and backward pass of each method, in turn, on the same batch. (Times are not compared between machines: look at the ratios.)

# %% tags=["timing"]
batch = tasks.collate(task.train[:16], base.end, "cpu")
seconds = {name: [] for name in ("full", "lora", "prompt_tuning", "prefix_tuning")}
models = {name: build_model(base, RECIPES[name], seed_0) for name in seconds}
for _ in range(8):
    for name, model in models.items():
        begin = time.perf_counter()
        model(**batch)[0].backward()
        seconds[name].append(time.perf_counter() - begin)
for name, found in seconds.items():
    ratios = [a / b for a, b in zip(found[1:], seconds["full"][1:], strict=True)]
    print(
        f"{name:13} {statistics.median(found[1:]):.3f} s, {statistics.median(ratios):.2f} of full"
    )
paired = [a / b for a, b in zip(seconds["prefix_tuning"][1:], seconds["full"][1:], strict=True)]
assert statistics.median(paired) < 1, "a prefix's step is cheaper than full fine-tuning's"

# %% [markdown]
# LoRA adds two thin products to every matrix, forward and backward. A prefix adds p keys to the attention and nothing else, no token more
# passes the MLP, and below the first attention nothing needs a gradient. The price comes later: it cannot be merged.
# Every sequence carries its p keys and values in the cache as long as it is being written.

# %%
cached = {}
past = {"past_key_values": trained.prompt_encoder.past(trained.base_model, 8)}
for name, prepended in (("alone", {}), ("prefix", past)):
    out = trained.base_model(ids.expand(8, -1), use_cache=True, **prepended)
    cached[name] = sum(part.nbytes for pair in out.past_key_values for part in pair)
extra = (cached["prefix"] - cached["alone"]) // 8
print(f"cache of a sequence: {cached['alone'] // 8:,} bytes for the text, {extra:,} for the prefix")
assert extra == 2 * 20 * layers * d * 4, "2 p l d numbers of four bytes"
print(f"file: {prefix.disk_bytes:,} bytes")
held = {r.method: r.activation_bytes for r in (full, rows["lora"][0], prefix)}
print("kept for the backward pass:", {m: f"{n / 1e6:.1f} MB" for m, n in held.items()})
assert held["prefix_tuning"] < held["lora"] < held["full"]

# %% [markdown]
# ## What breaks it
#
# Two things. A learning rate that is ten times off: AdamW moves a number by at most about the rate a step, and a prefix's numbers begin at
# the size of one, so it wants a far larger rate than LoRA. One that was carried over is soon off by ten. And the wrong mask.
#
# **Guess again:** a hundred steps at ten times the swept rate: where does the loss end, compared with the start?

# %%
with mock.patch.object(GPT, "_mask", staticmethod(lambda *args: None)):  # is_causal=True
    masked = task_loss(trained, task.validation, base.end)["loss"]
loud = run(task, usual, 10 * prefix.learning_rate, n_evaluations=8)
right_loss, loud_loss = (r.validation[-1]["loss"] for r in (prefix, loud))
print(
    f"loss at the swept rate {right_loss:.2f}, at ten times {loud_loss:.2f}, wrong mask {masked:.2f}"
)
assert min(loud_loss, masked) > 3 * right_loss
moved = (random - starts["N(0, 1)"].prompt_encoder.embedding.weight).abs().mean()
print(f"at the swept rate a number moved by {moved:.1f} on average")

figure, (left, axis) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
for record, style in ((prefix, "o-"), (loud, "x--")):
    steps, losses = zip(*((p["step"], p["loss"]) for p in record.validation), strict=True)
    left.plot(steps, losses, style, color=PURPLE, label=f"rate {record.learning_rate:g}")
left.axhline(masked, color="black", linestyle=":", label="trained, but the wrong mask")
styles = {"full": "^:", "lora": "s--", "prefix_tuning": "o-"}
for sweep in load_sweeps():
    of = [sweep[key] for key in ("base", "task", "steps", "examples", "random_base")]
    default = sweep["size"] == RECIPES[sweep["method"]].size
    if of != ["1m", "describe", 100, 400, False] or sweep["method"] not in styles or not default:
        continue
    x, y = zip(*((p["learning_rate"], p["loss"]) for p in sweep["points"]), strict=True)
    axis.plot(x, y, styles[sweep["method"]], color=COLORS[sweep["method"]], label=sweep["method"])
    if sweep["method"] == "prefix_tuning":
        assert min(y[0], y[-1]) > 3 * min(y), "ten times off, on either side"
left.set(xlabel="step", ylabel="validation loss (nats a token)", yscale="log", ylim=(0.07, 12))
axis.set(xlabel="learning rate (data/results/sweep.json)", xscale="log")
for each in (left, axis):
    each.legend(frameon=False)
plt.show()

# %% [markdown]
# Ten times too large, and it never learns to copy. A tenth of the right rate (right picture) learns too slowly. The rates
# that suit full fine-tuning and LoRA lie far to the left of a prefix's. And under the wrong mask a well trained prefix
# is of no use, though nothing raised an error.
#
# ## Exercises
#
# Each has a cell that checks your answer. The solutions are in `solutions/06_prefix_tuning.ipynb`.
# After them, write `prefix_tuning.py` yourself and have it graded: `python -m minipeft build start prefix_tuning my`. The page `lessons/BUILD.md` says how.
#
# **1 · Warm-up.** GPT-2 has 12 layers of width 768. How many parameters does a prefix of 20 virtual tokens train, without the network?

# %% tags=["exercise"]
count = None  # your number, or an expression

# %% tags=["wrong"]
count = 20 * 12 * 768

# %% tags=["wrong"]
count = 2 * 20 * 768

# %% tags=["solution"]
count = 2 * 20 * 12 * 768

# %% tags=["check"]
if count is None:
    print("not done yet")
else:
    assert count != 20 * 768, "that is prompt tuning: a prefix stands in every layer"
    assert count != 2 * 20 * 768, "that is one layer of twelve"
    assert count != 20 * 12 * 768, "keys and values: twice as many"
    with torch.device("meta"):  # the full-size GPT-2, without memory for its weights
        large = get_peft_model(GPT(GPTConfig()), PrefixTuningConfig(num_virtual_tokens=20))
    assert count == large.get_nb_trainable_parameters()[0], "2 · p · layers · width"
    print(f"right: {count:,}")

# %% [markdown]
# **2 · The mask.** Write `prefix_mask(p, t)`: a boolean tensor (t, p + t), True where a token of the text may look.


# %% tags=["exercise"]
def prefix_mask(p, t): ...  # return the mask


# %% tags=["wrong"]
def prefix_mask(p, t):
    return torch.ones(t, p + t, dtype=torch.bool).tril()


# %% tags=["wrong"]
def prefix_mask(p, t):
    return torch.ones(t, p + t).tril(p)


# %% tags=["wrong"]
def prefix_mask(p, t):
    return torch.ones(p + t, p + t, dtype=torch.bool).tril()


# %% tags=["solution"]
def prefix_mask(p, t):
    return torch.ones(t, p + t, dtype=torch.bool).tril(p)


# %% tags=["check"]
answer = prefix_mask(3, 5)
if answer is None:
    print("not done yet")
else:
    assert answer.shape == (5, 8), (
        f"a row a query of the text, a column a key: (5, 8), not {tuple(answer.shape)}"
    )
    assert answer.dtype == torch.bool, (
        "a boolean mask, please: numbers would be added to the scores"
    )
    assert not torch.equal(answer, torch.ones(5, 8).tril().bool()), (
        "that is is_causal=True: the triangle starts p columns too early"
    )
    assert not answer[0, 4:].any(), "the first token sees the future"
    assert answer[:, :3].all(), "every token may look at the whole prefix"
    assert answer[:, 3:].diagonal().all(), "a token sees itself"
    for p, t in ((3, 5), (1, 4), (20, 7)):
        assert torch.equal(prefix_mask(p, t), GPT._mask(None, 1, t, p, "cpu")[0, 0]), (
            f"right for 3 and 5, wrong for p = {p} and t = {t}"
        )
    print("right: the whole prefix, and the text up to oneself")

# %% [markdown]
# **3 · A prefix is a gate.** Take one query. Attention over prefix and text together equals *two* attentions, one over the
# prefix alone and one over the text alone, mixed with a share a and 1 - a (He et al. 2021, arXiv 2110.04366). Write
# `gated(q, K_P, V_P, K, V)` so, without joining the keys: q (k,), K_P and V_P (p, k), K and V (t, k).


# %% tags=["exercise"]
def gated(q, K_P, V_P, K, V): ...  # return (1 - a) · on the text + a · on the prefix


# %% tags=["wrong"]
def gated(q, K_P, V_P, K, V):
    on_prefix, on_text = K_P @ q, K @ q
    a = on_prefix.exp().sum() / (on_prefix.exp().sum() + on_text.exp().sum())
    return (1 - a) * on_text.softmax(0) @ V + a * on_prefix.softmax(0) @ V_P


# %% tags=["wrong"]
def gated(q, K_P, V_P, K, V):
    on_prefix, on_text = K_P @ q / len(q) ** 0.5, K @ q / len(q) ** 0.5
    return on_text.softmax(0) @ V + on_prefix.softmax(0) @ V_P


# %% tags=["wrong"]
def gated(q, K_P, V_P, K, V):
    on_prefix, on_text = K_P @ q / len(q) ** 0.5, K @ q / len(q) ** 0.5
    a = len(K_P) / (len(K_P) + len(K))
    return (1 - a) * on_text.softmax(0) @ V + a * on_prefix.softmax(0) @ V_P


# %% tags=["wrong"]
def gated(q, K_P, V_P, K, V):
    on_prefix, on_text = K_P @ q / len(q) ** 0.5, K @ q / len(q) ** 0.5
    a = on_prefix.exp().sum() / (on_prefix.exp().sum() + on_text.exp().sum())
    return a * on_text.softmax(0) @ V + (1 - a) * on_prefix.softmax(0) @ V_P


# %% tags=["solution"]
def gated(q, K_P, V_P, K, V):
    on_prefix, on_text = K_P @ q / len(q) ** 0.5, K @ q / len(q) ** 0.5  # scores (p,), (t,)
    a = on_prefix.exp().sum() / (on_prefix.exp().sum() + on_text.exp().sum())
    return (1 - a) * on_text.softmax(0) @ V + a * on_prefix.softmax(0) @ V_P


# %% tags=["check"]
torch.manual_seed(1)
q, K_P, V_P, K, V = (torch.randn(*shape) for shape in ((4,), (3, 4), (3, 4), (6, 4), (6, 4)))
answer = gated(q, K_P, V_P, K, V)
if answer is None:
    print("not done yet")
else:

    def joined(scale):
        return torch.softmax(torch.cat((K_P, K)) @ q * scale, 0) @ torch.cat((V_P, V))

    def mixed(a):
        parts = [(k @ q / 2).softmax(0) @ v for k, v in ((K, V), (K_P, V_P))]
        return (1 - a) * parts[0] + a * parts[1]

    assert answer.shape == (4,), f"one output of width 4, not {tuple(answer.shape)}"
    assert not torch.allclose(answer, joined(1.0), atol=1e-5), (
        "divide the scores by √k, the root of the width"
    )
    assert not torch.allclose(answer, 2 * mixed(0.5), atol=1e-5), (
        "the two are summed: mix them, a and 1 - a"
    )
    assert not torch.allclose(answer, mixed(3 / 9), atol=1e-5), (
        "a is no count of keys: use exp(scores)"
    )
    a = (K_P @ q / 2).exp().sum() / (torch.cat((K_P, K)) @ q / 2).exp().sum()
    assert not torch.allclose(answer, mixed(1 - a), atol=1e-5), (
        "the prefix gets the share a and the text the rest, not the other way round"
    )
    assert torch.allclose(answer, joined(0.5), atol=1e-5), "a = Σ exp on the prefix / Σ exp on all"
    zero = gated(q, torch.zeros(3, 4), torch.zeros(3, 4), K, V)
    assert torch.allclose(
        zero, (1 - 3 / (3 + (K @ q / 2).exp().sum())) * (K @ q / 2).softmax(0) @ V
    ), "right for one prefix, but not for a prefix of zeros"
    print("right: and with zeros it is the formula of the lesson")

# %% [markdown]
# **4 · A prefix on your own.** Write the module for our GPT: it holds what is trained, and `past(b)` gives a
# tuple with a pair (keys, values) for each layer, each (b, h, p, k), the same for every sequence.


# %% tags=["exercise"]
class MyPrefix(torch.nn.Module):
    def __init__(self, config, p):  # the GPT's config: n_layer, n_head, n_embd
        super().__init__()
        # your parameter, or parameters

    def past(self, b): ...  # a pair (keys, values) a layer


# %% tags=["wrong"]
class MyPrefix(torch.nn.Module):
    def __init__(self, config, p):
        super().__init__()
        self.P = torch.nn.Parameter(torch.zeros(config.n_layer, 2, p, config.n_embd))
        self.heads = config.n_head

    def past(self, b):
        P = self.P.unflatten(3, (self.heads, -1)).transpose(2, 3)
        return tuple((k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)) for k, v in P)


# %% tags=["wrong"]
class MyPrefix(torch.nn.Module):
    def __init__(self, config, p):
        super().__init__()
        self.layers = config.n_layer
        width = config.n_embd // config.n_head
        self.P = torch.nn.Parameter(torch.randn(2, config.n_head, p, width))

    def past(self, b):
        k, v = (part.expand(b, -1, -1, -1) for part in self.P)
        return ((k, v),) * self.layers


# %% tags=["wrong"]
class MyPrefix(torch.nn.Module):
    def __init__(self, config, p):
        super().__init__()
        width = config.n_embd // config.n_head
        self.P = torch.randn(config.n_layer, 2, config.n_head, p, width)

    def past(self, b):
        return tuple((k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)) for k, v in self.P)


# %% tags=["solution"]
class MyPrefix(torch.nn.Module):
    def __init__(self, config, p):
        super().__init__()
        width = config.n_embd // config.n_head
        self.P = torch.nn.Parameter(torch.randn(config.n_layer, 2, config.n_head, p, width))

    def past(self, b):
        return tuple((k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)) for k, v in self.P)


# %% tags=["check"]
torch.manual_seed(0)
toy = GPT(
    GPTConfig(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2, initializer_range=0.3)
)
toy.eval().requires_grad_(False)
mine, words = MyPrefix(toy.config, 3), torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
if mine.past(2) is None:
    print("not done yet")
else:
    pairs = mine.past(2)
    assert len(pairs) == 2, f"a pair for each of the 2 layers, not {len(pairs)}"
    for part in (part for pair in pairs for part in pair):
        assert part.shape == (2, 2, 3, 4), f"(b, h, p, k) is (2, 2, 3, 4), not {tuple(part.shape)}"
        assert torch.equal(part[0], part[1]), "every sequence of the batch has the same prefix"
    assert not torch.equal(*pairs[0]), (
        "keys and values are the same numbers: each needs its own, and none may start from zero"
    )
    assert not torch.equal(pairs[0][0], pairs[1][0]), "each layer has a prefix of its own"
    numbers = sum(w.numel() for w in mine.parameters())
    assert numbers, "nothing can be trained: an nn.Parameter, please (a ParameterList for several)"
    assert numbers == 2 * 3 * 2 * 8, f"2 p l d is 96 trained numbers, yours are {numbers}"
    assert pairs[0][0].requires_grad, "no gradient arrives: was it detached?"
    optimizer, losses = torch.optim.Adam(mine.parameters(), lr=0.1), []
    for _ in range(60):
        losses.append(toy(words, past_key_values=mine.past(2), labels=words).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0], "it does not learn"
    print(f"right: loss from {losses[0]:.2f} to {losses[-1]:.2f}, and the toy was not touched")

# %% [markdown]
# ## Summary, at this size
#
# - A prefix is p trained keys and values before the text in every layer: no queries, no MLP, not in embedding space, and a mask of its own.
# - It does not start as the base: the positions move on, zero keys take about half of the attention, and a start from zeros keeps all p tokens equal.
# - On a new skill it is far ahead of prompt tuning and behind LoRA and full fine-tuning; how much attention it gets does not tell why.
# - Its step is cheap and its file small; it forgets much while it is on, nothing when off, and it stays in every cache, for it can't be merged.
# - One token can't do it, twenty do better than five, the network brought nothing that shows; a rate ten times off, or the wrong mask, ruins it.
#
# **To read:** the paper, sections 4 and 7; He et al. 2021, *Towards a Unified View of Parameter-Efficient Transfer Learning*, arXiv 2110.04366,
# for exercise 3; Liu et al. 2021, *P-Tuning v2*, arXiv 2110.07602, which is this method without the network.
