# %% [markdown]
# # 06 · Prefix tuning
#
# Your company serves one 7B model to twenty customers, and each customer wants other answers. Twenty merged models would
# take 20 · 14 GB. With prompt tuning (lesson 04), a customer needs only a few virtual tokens, and one batch can serve
# several customers. But in 100 steps it learned hardly anything of `describe`. Prefix tuning
# has the same advantages, and virtual tokens in every layer.
#
# After this lesson you can
# - explain the KV cache, and how a prefix uses it;
# - write prefix tuning with its mask, and count its parameters;
# - choose how a prefix starts;
# - compare it with full fine-tuning: what it learns, and what it forgets.
#
# **Time.** About an hour, and 25 minutes more for "Going further". All results are for a GPT with 1 million parameters.
# [Glossary](README.md#glossary).

# %%
import inspect
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display
from torch import nn

from minipeft import GPT, GPTConfig, PeftModel, PrefixTuningConfig, prefix_tuning
from minipeft.grader.lessons import check, claim, hint, solution, solved
from minipeft.grader.lessons.lesson_06 import FINISHED  # for exercises that you skip
from minipeft.lab import DATA, compare, report, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import complete, task_loss, text_loss
from minipeft.lab.finetune import build_model, finetune, micro_batches
from minipeft.lab.recipes import RECIPES, RunConfig, load_sweeps
from minipeft.lab.train import train

PURPLE, GREY = (report.COLORS[name] for name in ("prefix_tuning", "frozen"))
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
OUT = DATA.parent / "out" / "06"  # what this lesson saves; git ignores it
base = load_base(DATA / "base" / "1m")
task = tasks.load_task(base, "describe")

# %% [markdown]
# ## Before you start
#
# Replace `None`, and run both cells.
#
# **1.** Prompt tuning, with 20 virtual tokens, on a model of width 128 with four layers. How many parameters does it train?

# %% tags=["exercise"]
n_trained = None

# %% tags=["solution"]
n_trained = 20 * 128  # only at the input, whatever the number of layers

# %% tags=["check"]
check("06.prompt", n_trained)

# %% [markdown]
# **2.** A text of 5 tokens goes through causal attention. How many pairs of a query and a key does the mask allow?

# %% tags=["exercise"]
pairs = None

# %% tags=["solution"]
pairs = 1 + 2 + 3 + 4 + 5  # a token sees the tokens before it, and itself

# %% tags=["check"]
check("06.causal", pairs)

# %% [markdown]
# If an answer is wrong, call `hint(1)`, `hint(2)` or `solution()` in a new cell.
#
# ## What do keys and values of zero change?
#
# In attention, a token's *query* is compared with the *keys* of all tokens that it may see. A softmax turns the scores into
# shares, and the output is the sum of the *values*, weighted by these shares.
#
# Now put 20 keys and values in front of the text in every layer, all **zero**. So each new key has the score 0, and
# each new value adds nothing.
#
# **Your guess:** with about 60 tokens of text, what share of attention goes to the 20 zero keys, averaged over all tokens and heads? Write a number from 0 to 1,
# and why.

# %%
guess = None  # a share, 0 to 1
reason = ""

# %% [markdown]
# ## The idea
#
# When a GPT generates text, it stores the keys and values of all tokens so far, in every layer. This is the *KV cache*. For a new token,
# it computes only one query, key and value per head, and reads the earlier keys and values from the cache.
#
# Prefix tuning puts trained keys and values into the cache, in front of those of the text. Nothing else is trained. One
# key and one value per layer and head form a *virtual token*; p virtual tokens form the *prefix*. In each head, attention becomes
#
# $$ y = \mathrm{softmax}\!\left( \frac{q\,[K_P;\, k]^\top}{\sqrt{w}} + \mathrm{mask} \right) [V_P;\, v] $$
#
# where w is the width of a head, and [ ; ] joins rows. The shapes, for a text of t tokens:
#
# | tensor | contents | shape | our GPT, p = 20 |
# |---|---|---|---|
# | q, k, v | queries, keys, values of the text | (t, w) | (t, 32) |
# | K_P, V_P | keys and values of the prefix | (p, w) | (20, 32) |
# | [K_P; k] | all keys | (p + t, w) | (20 + t, 32) |
# | scores, mask | a row per query, a column per key | (t, p + t) | (t, 20 + t) |
# | y | output | (t, w) | (t, 32) |
# | keys in the cache of one layer | all heads and b texts (a second tensor: values) | (b, heads, p, w) | (b, 4, 20, 32) |
# | P | all trained parameters | (p, 2 · layers · width) | (20, 1024) |
#
# Such a virtual token is no embedding: each layer has its own key and value for it. It has no query, and does not pass through the MLPs.
#
# **Exercise 1.** GPT-2 has 12 layers of 12 heads, and w = 64, so its width is 768. How many parameters has a prefix of 20 virtual tokens?

# %% tags=["exercise"]
count = None  # a number, or an expression

# %% tags=["solution"]
count = 2 * 20 * 12 * 768  # keys and values, virtual tokens, layers, width

# %% tags=["check"]
check("06.count", count)

# %% [markdown]
# ## The mask
#
# Each token of the text sees the whole prefix, the tokens before it, and itself. The figure shows this mask, and next to it that of torch's
# `is_causal=True`: its triangle begins in the upper left corner.

# %%
p, t = 3, 5
correct = GPT._mask(None, 1, t, p, "cpu")[0, 0].float()  # minipeft's mask
one_hot = torch.eye(p + t)[None]  # with these values, the output shows where attention goes
wrong = nn.functional.scaled_dot_product_attention(
    torch.zeros(1, t, 4), torch.zeros(1, p + t, 4), one_hot, is_causal=True
)[0].bool()
figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.4), layout="constrained")
for axis, mask, title in zip(
    axes, (correct, wrong.float()), ("correct", "is_causal=True: wrong"), strict=True
):
    axis.imshow(mask, cmap="Purples", vmax=1.4)
    for i, j in mask.nonzero().tolist():
        axis.text(j, i, "×", ha="center", va="center")
    axis.set_xticks(range(p + t), [f"P{j}" for j in range(p)] + [f"t{j}" for j in range(t)])
    axis.set_yticks(range(t), [f"t{i}" for i in range(t)])
    axis.axvline(p - 0.5, color="black")
    axis.set(title=title, xlabel="key (P: prefix, t: text)", ylabel="query")
report.show(
    figure,
    "Two masks. The correct one: each query sees all three prefix keys and the text up to itself. "
    "With is_causal=True, t0 sees only P0, and no query sees its own key.",
)

# %% [markdown]
# The wrong mask gives no error, but no token sees itself.
#
# **Exercise 2.** Write `prefix_mask(p, t)`: a tensor of the shape (t, p + t) and the dtype `torch.bool`, True where a query sees a key.


# %% tags=["exercise"]
def prefix_mask(p, t): ...  # return the mask


# %% tags=["solution"]
def prefix_mask(p, t):
    return torch.ones(t, p + t, dtype=torch.bool).tril(p)


# %% tags=["check"]
check("06.mask", prefix_mask)
if not solved("06.mask"):  # until yours is right, the lesson uses minipeft's mask

    def prefix_mask(p, t):
        return GPT._mask(None, 1, t, p, "cpu")[0, 0]


# %% [markdown]
# **Exercise 3.** Write the equation for one head: `attend(q, k, v, K_P, V_P)` returns y, (t, w). Where `prefix_mask` is False, set
# the score to −∞. (It is boolean, so you cannot add it to the scores.)


# %% tags=["exercise"]
def attend(q, k, v, K_P, V_P): ...  # return y


# %% tags=["solution"]
def attend(q, k, v, K_P, V_P):
    keys, values = torch.cat((K_P, k)), torch.cat((V_P, v))  # (p + t, width)
    scores = q @ keys.T / q.shape[1] ** 0.5  # (t, p + t)
    mask = torch.ones_like(scores).tril(len(K_P)).bool()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values


# %% tags=["check"]
check("06.attend", attend)
if not solved("06.attend"):
    attend = FINISHED["attend"]

# %% [markdown]
# Compare with minipeft, in a GPT with one layer and two heads.

# %%
torch.manual_seed(0)
toy = GPT(GPTConfig(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
encoder = prefix_tuning.PrefixEncoder(toy, PrefixTuningConfig(num_virtual_tokens=3))
attention, seen = toy.transformer.h[0].attn, {}
attention.register_forward_hook(lambda layer, x, out: seen.update(x=x[0][0], y=out[0][0]))
encoder(toy, torch.tensor([[3, 1, 4, 1, 5]]))

K_P, V_P = encoder.embedding.weight.view(3, 2, 2, 4).permute(1, 2, 0, 3)  # (heads, p, width)
q, k, v = attention.c_attn(seen["x"]).view(5, 3, 2, 4).permute(1, 2, 0, 3)  # (heads, t, width)
heads = [attend(q[i], k[i], v[i], K_P[i], V_P[i]) for i in range(2)]
assert torch.allclose(attention.c_proj(torch.cat(heads, dim=-1)), seen["y"], atol=1e-6)
print(f"by hand, the same output: {q.shape[1]} queries, {K_P.shape[1] + k.shape[1]} keys")

# %% [markdown]
# ## Write the module
#
# Our GPT takes a cache as `past_key_values`: a tuple with one pair (keys, values) per layer, each of the shape (b, heads, p, w).
#
# **Exercise 4.** Write the prefix as a module. It has 2 · p · layers · width trained parameters, random at the start. `past(b)` returns
# the cache for b texts.


# %% tags=["exercise"]
class MyPrefix(nn.Module):
    def __init__(self, config, p):  # config has n_layer, n_head and n_embd, the width
        super().__init__()
        # make the parameter, or the parameters

    def past(self, b): ...  # return the pairs (keys, values), one per layer


# %% tags=["solution"]
class MyPrefix(nn.Module):
    def __init__(self, config, p):
        super().__init__()
        width = config.n_embd // config.n_head
        self.P = nn.Parameter(torch.randn(config.n_layer, 2, config.n_head, p, width))

    def past(self, b):
        return tuple((k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)) for k, v in self.P)


# %% tags=["check"]
check("06.my_prefix", MyPrefix)
if not solved("06.my_prefix"):  # until yours is right, the lesson uses minipeft's prefix

    class MyPrefix(prefix_tuning.PrefixEncoder):
        def __init__(self, config, p):
            super().__init__(GPT(config), PrefixTuningConfig(num_virtual_tokens=p))

        def past(self, b):
            return super().past(self, b)


# %% [markdown]
# Here is minipeft's [`past`](../minipeft/methods/prefix_tuning.py). With your module's numbers in it, minipeft's prefix gives the same logits.


# %%
def set_prefix(model, cache):
    """Copy the keys and values of a cache into minipeft's P, (p, 2 · layers · width)."""
    rows = [kv[0].transpose(0, 1).flatten(1) for pair in cache for kv in pair]  # each (p, width)
    model.prompt_encoder.embedding.weight.data = torch.cat(rows, dim=1).detach().clone()


print(inspect.getsource(prefix_tuning.PrefixEncoder.past))
seed_0 = RunConfig(seed=0)
example = task.train[0]
ids = torch.tensor([example.prompt_ids + example.completion_ids])
torch.manual_seed(0)
mine = MyPrefix(base.pretrained.config, 20)
model = build_model(base, RECIPES["prefix_tuning"], seed_0).eval()
set_prefix(model, mine.past(1))
by_mine = base.pretrained(ids, past_key_values=tuple(mine.past(1))).logits
assert torch.allclose(model(ids).logits, by_mine, atol=1e-5)
model.print_trainable_parameters()

# %% [markdown]
# ## What does it start as?
#
# LoRA starts as the base model. Does a prefix? minipeft starts it with random numbers from N(0, 1), as peft does, or with zeros (`init_weights="zero"`). The next
# cell measures the loss on held-out pretraining text with both starts, before training.

# %%
from_zeros = replace(
    RECIPES["prefix_tuning"],
    config=lambda p, steps: PrefixTuningConfig(p, init_weights="zero", task_type="CAUSAL_LM"),
)
starts = {
    "zeros": build_model(base, from_zeros, seed_0).eval(),
    "N(0, 1)": build_model(base, RECIPES["prefix_tuning"], seed_0).eval(),
}
text = base.held_out
places = torch.arange(20, 20 + text.shape[1])[None]  # a prefix shifts the text by 20 positions
with torch.no_grad():
    shifted = base.pretrained(text, labels=text, position_ids=places).loss.item()
loss = {"no prefix": text_loss(base.pretrained, text), "no prefix, shifted positions": shifted}
loss |= {f"prefix of {name}": text_loss(model, text) for name, model in starts.items()}
for name, value in loss.items():
    print(f"{name:28} {value:.2f} nats per token")
before, _, zeros, random = loss.values()
claim(shifted - before < 0.3 < zeros - shifted, "shifted positions explain only a small part")
claim(zeros < random - 0.3, "a random prefix does more damage than zeros")

# %% [markdown]
# Neither start is the base model. A small part of the damage comes from positions: the text now begins at position 20, not at 0 as in pretraining. With zeros, the rest comes from
# attention: the zero keys take a part of it.
#
# **Exercise 5.** Take one query in one head. It sees t keys of the text. `scores`, (t,), has the query's scores, already divided by √w. Add p zero keys, each with
# the score 0. Write `share(scores, p)`: the share of attention that the p zero keys get together.


# %% tags=["exercise"]
def share(scores, p): ...  # return a number from 0 to 1


# %% tags=["solution"]
def share(scores, p):
    return p / (p + scores.exp().sum())  # exp(0) is 1


# %% tags=["check"]
check("06.share", share)


# %%
@torch.no_grad()
def attention_on_prefix(model, examples):
    """The share of attention that goes to the prefix, a mean over tokens: (layers, heads)."""
    gpt, found, kept = model.base_model, [], []
    hooks = [
        block.attn.c_attn.register_forward_hook(lambda layer, x, out: kept.append(out[0]))
        for block in gpt.transformer.h
    ]
    for example in examples:
        kept.clear()
        model(torch.tensor([example.prompt_ids + example.completion_ids]))
        for (K_P, _), qkv in zip(model.prompt_encoder.past(gpt, 1), kept, strict=True):
            _, n_heads, p, width = K_P.shape
            q, k, _ = qkv.view(-1, 3, n_heads, width).permute(1, 2, 0, 3)  # (heads, t, width)
            scores = q @ torch.cat((K_P[0], k), dim=1).mT / width**0.5  # (heads, t, p + t)
            scores = scores.masked_fill(~prefix_mask(p, q.shape[1]), -torch.inf)
            found.append(scores.softmax(-1)[:, :, :p].sum(-1).mean(-1))  # (heads,)
    for hook in hooks:
        hook.remove()
    return torch.stack(found).unflatten(0, (len(examples), -1)).mean(0)


shares = {name: attention_on_prefix(model, task.test[:16]) for name, model in starts.items()}
print({name: f"{found.mean():.2f}" for name, found in shares.items()}, f"your guess: {guess}")
claim(0.4 < shares["zeros"].mean() < 0.65, "zero keys get about half of the attention")

# %% [markdown]
# Here, 20 zero keys get about half of the attention. Equal scores would give them nearly as much: on average, a token sees about 30 keys of the text. A score of 0 does not mean "no attention", since exp(0) is 1: only −∞ means that. The text gets
# a share below 1 and the prefix adds zeros, so each head's output shrinks.
#
# ## How should it start?
#
# Zeros do less damage than random numbers. Should training start there?
#
# **Exercise 6.** All 20 virtual tokens start at zero. You train for 100 steps. How many *different* virtual tokens are there then? Think of their gradients.

# %% tags=["exercise"]
different = None

# %% tags=["solution"]
different = 1  # equal tokens get equal gradients, in every step

# %% tags=["check"]
check("06.equal", different)

# %% [markdown]
# So start with random numbers. Or with **real words**, as [Li and Liang](https://arxiv.org/abs/2101.00190) do: run the base model on a text, and take the keys and values from its KV cache.
#
# **Exercise 7.** Write `first_tokens(cache, p)`. `cache` is a tuple of pairs (keys, values), each of the shape (b, heads, t, w). Return such pairs for the first p tokens.


# %% tags=["exercise"]
def first_tokens(cache, p): ...  # return the pairs, one per layer


# %% tags=["solution"]
def first_tokens(cache, p):
    return tuple((k[:, :, :p], v[:, :, :p]) for k, v in cache)


# %% tags=["check"]
check("06.first_tokens", first_tokens)
if not solved("06.first_tokens"):
    first_tokens = FINISHED["first_tokens"]

# %% [markdown]
# With the first 20 tokens of a training example as its prefix, the model acts as if it had read them. We train this prefix.

# %%
run = replace(seed_0, learning_rate=0.3)  # the swept rate of prefix tuning, for both starts
model = build_model(base, RECIPES["prefix_tuning"], run).eval()
cache = base.pretrained(ids, use_cache=True).past_key_values
set_prefix(model, first_tokens(cache, 20))
whole, rest = base.pretrained(ids).logits, model(ids[:, 20:]).logits
assert torch.allclose(rest, whole[:, 20:], atol=1e-4)
print("prefix:", base.tokenizer.decode(ids[0, :20].tolist()))

real = {"start": text_loss(model, text) - before}
train(model, micro_batches(task, run, base.end, model.device), run)
real["on"] = text_loss(model, text) - before
real["score"] = task.score(task.test[:64], complete(model, base, task.test[:64]))
print(f"forgetting {real['start']:.2f} before training, {real['on']:.2f} after;", end=" ")
print(f"slot accuracy {real['score']:.2f}")

# %% [markdown]
# ## Against full fine-tuning
#
# Now the random start, full fine-tuning and the frozen base, on the same examples. Each method has its swept learning rate, and no
# weight decay. The figure shows this run (hollow) and the mean of four stored runs (filled).

# %%
prefix = finetune(base, task, RECIPES["prefix_tuning"], replace(run, output=OUT / "prefix"))
full = finetune(base, task, RECIPES["full"], seed_0)
frozen = finetune(base, task, RECIPES["frozen"], seed_0)
shipped = compare.load(DATA / "results" / "1m" / "compare.json")
rows = compare.rows([r for r in shipped if not r.random_base])
for r in (prefix, full):
    print(f"{report.NAMES[r.method]}: learning rate {r.learning_rate:g}, {r.steps} steps, AdamW,",
          f"batches of 16, other seeds: {[f'{o.score:.2f}' for o in rows[r.method] if o.seed]}")  # fmt: skip
    claim(compare.in_spread(r, rows[r.method]), f"{r.method} scores like its other seeds")

# %%
gap = max(full.score - frozen.score, 0.01)
lines = [
    [report.NAMES[r.method], f"{r.trainable:,}", f"{r.score:.2f}", f"{(r.score - frozen.score) / gap:.2f}",
     f"{r.forgot('start') or 0:+.2f}", f"{r.forgot() or 0:+.2f}"]
    for r in (frozen, full, prefix)
]  # fmt: skip
lines.append(["prefix tuning, real text", f"{prefix.trainable:,}", f"{real['score']:.2f}",
              f"{(real['score'] - frozen.score) / gap:.2f}", f"{real['start']:+.2f}", f"{real['on']:+.2f}"])  # fmt: skip
head = ("method", "trained", "slot accuracy", "share of gap", "forgetting at step 0", "after")
display(Markdown(report.markdown_table(head, lines)))
trained = PeftModel.from_pretrained(base.model(), OUT / "prefix").eval()
print("prompt:       ", task.test[0].prompt)
print("prefix tuning:", complete(trained, base, task.test[:1])[0].strip())
print("reference:    ", task.test[0].completion.strip())
claim(real["start"] < prefix.forgot("start") / 2, "real text does less damage at step 0")
claim(real["on"] < prefix.forgot(), "real text forgets less at the end")
claim(abs(real["score"] - prefix.score) < 0.3, "the scores of both starts are close")

# %%
names = ["full", "lora", "prompt_tuning", "prefix_tuning"]
found = {name: ([r.score for r in rows[name]], [r.forgot() for r in rows[name]]) for name in names}
live = {0: (full.score, full.forgot()), 3: (prefix.score, prefix.forgot())}
live[4] = (real["score"], real["on"])
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
for axis, i, most in ((axes[0], 0, 1), (axes[1], 1, 9)):
    for y, name in enumerate(names):
        mean, half = sum(found[name][i]) / len(rows[name]), report.interval(found[name][i])
        error = [[min(half, mean)], [min(half, most - mean)]]
        axis.errorbar(mean, y, xerr=error, color=report.COLORS[name], fmt="sD^o"[y], capsize=4)
        axis.annotate(f"{mean:.2f}", (mean, y - 0.2), ha="center")
    for y, values in live.items():
        axis.plot(values[i], y, "o", ms=9, color="black", fillstyle="none")
        axis.annotate(f"{values[i]:.2f}", (values[i], y + 0.42), ha="center")
for y, value in ((3, prefix.forgot("start")), (4, real["start"])):
    axes[1].plot(value, y, "x", color="black")
    axes[1].annotate(f"{value:.2f} at step 0", (value, y - 0.2), ha="center")
labels = [report.NAMES[name] for name in names] + ["prefix, real text"]
axes[0].set(yticks=range(5), yticklabels=labels, xlim=(-0.05, 1.1), xlabel="slot accuracy")
axes[1].set(xlabel="forgetting (nats per token)", xlim=(-0.3, 5), ylim=(4.7, -0.6))
figure.suptitle("filled: four stored runs, 95 % interval; hollow: this run; ×: step 0", fontsize=10)
report.show(figure, "Prefix tuning scores about 0.6, between prompt tuning (0) and LoRA (0.97). "
            "It forgets about 4 nats, of which 1.8 are there at step 0; from real text less.")  # fmt: skip

# %%
scores, forgot = (
    {name: compare.mean(rows[name], "score") for name in names},
    {name: compare.forgetting(rows[name]) for name in names},
)
claim(scores["prompt_tuning"] + 0.2 < scores["prefix_tuning"] < scores["lora"] - 0.1, "in between")
claim(forgot["full"] < forgot["prefix_tuning"], "the prefix forgets more than full fine-tuning")
claim(prefix.forgot("start") > 1, "more than one nat is there at step 0")
with trained.disable_adapter():
    assert torch.equal(trained(ids).logits, base.pretrained(ids).logits)
print("adapter disabled: exactly the logits of the base model")

# %% [markdown]
# In 100 steps, prefix tuning learns much more than prompt tuning, with eight times as many trained numbers. It stays behind full fine-tuning and
# LoRA. (With larger models and longer training, Li and Liang come close to full fine-tuning.) In the generated text, some facts are invented.
#
# Of these methods, prefix tuning forgets the most, and a large part of it before training. In this run, the start from
# real text scores about the same and forgets less. **One seed**, so only a hint.
#
# ## Does training attract attention?

# %%
shares["trained"] = attention_on_prefix(trained, task.test[:16])
figure, axis = plt.subplots(figsize=(7.5, 3.2))
for x, ((name, found), marker) in enumerate(zip(shares.items(), "s^o", strict=True)):
    color, mean = PURPLE if name == "trained" else GREY, found.mean().item()
    offsets = x + torch.linspace(-0.15, 0.15, found.numel())
    axis.plot(offsets, found.flatten(), marker, color=color, fillstyle="none", ms=5)
    axis.plot([x - 0.25, x + 0.25], [mean, mean], color="black", linewidth=2)
    axis.annotate(f"mean {mean:.2f}", (x + 0.28, mean), va="center")
if guess is not None:
    axis.axhline(guess, color="black", linestyle=":")
    axis.annotate("your guess,\nfor zeros", (2.85, guess), va="center", backgroundcolor="white")
axis.set(xticks=range(3), xticklabels=shares, xlim=(-0.4, 3.4), ylim=(0, 1.02))
axis.set(ylabel="share of attention on the prefix\n(one point per head)")
report.show(figure, "Attention on the prefix by head: zeros, random and trained prefixes all have "
            "a mean between 0.5 and 0.65. The heads differ widely, most of all when trained.")  # fmt: skip
claim(abs(shares["trained"].mean() - shares["zeros"].mean()) < 0.25, "the means are close")

values = trained.prompt_encoder.embedding.weight.data.view(20, 4, 2, 128)[:, :, 1]  # (p, l, d)
kept, with_values = values.clone(), prefix.validation[-1]["loss"]
values.zero_()
without = task_loss(trained, task.validation, base.end)["loss"]
values.copy_(kept)
print(f"validation loss {with_values:.2f}; with the prefix's values set to zero {without:.2f}")
claim(without > 5 * with_values, "without its values the loss is far higher")

# %% [markdown]
# Hardly, on average: the trained prefix gets about as much attention as the two starts. But without its values, the loss is many times higher. So the mean does not tell how useful a prefix is.
#
# ## Summary
#
# - A prefix is p trained keys and values per layer, in the KV cache: 2 · p · layers · width parameters.
# - Each token sees the whole prefix, and the text up to itself.
# - A zero prefix changes the output, and equal virtual tokens stay equal: start with random numbers or real text.
# - Here it learns more than prompt tuning and less than LoRA, and it disturbs the base at step 0 already.
# - With the prefix disabled, the base model is back exactly. It cannot be merged, as it changes no weight.
#
# **Do you remember?** Answer first, then open.
#
# <details><summary>1. A text of t tokens, a prefix of p. How many queries and how many keys has each head?</summary>t queries, p + t keys.</details>
#
# <details><summary>2. Why does a prefix of zeros change the output?</summary>Each zero key has the score 0 and takes exp(0) = 1 of the softmax's sum. Less is left for the text.</details>
#
# <details><summary>3. LoRA's B starts at zero. Why should a prefix not start with only zeros?</summary>LoRA's A is random, so the columns of B get different gradients. All virtual tokens of a zero prefix get the same one.</details>
#
# **To read:** the paper, [Li and Liang 2021](https://arxiv.org/abs/2101.00190), sections 4 and 7.
#
# # Going further
#
# **Build it yourself.** Write the whole file and have it graded: `python -m minipeft build start prefix_tuning my` ([BUILD.md](BUILD.md)).
#
# ## The start, the number of tokens, and a network
#
# Three more runs, one seed each. The first starts from zeros. The second has one virtual token. Both use the learning rate that was tuned for 20 tokens with a random start, so another rate may suit them better. In the third, a small network computes
# P (`prefix_projection=True`). Its weights are trained instead of P, at their own learning rate. The paper found this more stable. After training, only the network's output is kept.

# %%
with_network = replace(
    RECIPES["prefix_tuning"],
    config=lambda p, steps: PrefixTuningConfig(p, prefix_projection=True, task_type="CAUSAL_LM"),
)
no_text = replace(base, held_out=None)  # these runs do not measure forgetting
quick = replace(run, n_evaluations=1, n_generate=32, quiet=True)
network_rate = 0.01  # the best of 0.001, 0.003, 0.01 and 0.03, on validation examples
more = {
    "20 tokens, N(0, 1)": prefix,
    "20 tokens, zeros": finetune(no_text, task, from_zeros, replace(quick, output=OUT / "zeros")),
    "1 token": finetune(no_text, task, RECIPES["prefix_tuning"].with_size(1), quick),
    "network": finetune(no_text, task, with_network, replace(quick, learning_rate=network_rate)),
}
for name, r in more.items():
    loss = r.validation[-1]["loss"]
    print(f"{name:18} {r.trainable:8,} trained, loss {loss:.2f}, slot accuracy {r.score:.2f}")
zeros = PeftModel.from_pretrained(base.model(), OUT / "zeros").prompt_encoder.embedding.weight
apart = ((zeros - zeros[0]).norm() / zeros.norm()).item()
print(f"distance between the 20 tokens that started at zero, relative: {apart:g}")
claim(apart < 0.02, "virtual tokens that start equal stay equal")
few = max(more[name].score for name in ("20 tokens, zeros", "1 token"))
claim(few < 0.25 < prefix.score, "equal tokens, or one token, learn little")
claim(abs(more["network"].score - prefix.score) < 0.4, "the network makes no large difference")

# %% [markdown]
# Twenty tokens that start at zero are twenty copies of one token, and learn about as little as one. The network trains several times as many parameters,
# for a similar result here.
#
# ## What breaks it: the learning rate, and the mask
#
# AdamW changes a number by about the learning rate per step, however large the number is. The prefix's numbers start with a size of about 1, and weights are much smaller. So
# we expect that a prefix needs a far larger learning rate than LoRA. The figure shows how much larger, from a sweep that comes with minipeft.

# %%
figure, axis = plt.subplots(figsize=(6.5, 3.2))
for sweep in load_sweeps():
    method = sweep["method"]
    of = [sweep[key] for key in ("base", "task", "steps", "examples", "random_base", "size")]
    same = of == ["1m", "describe", 100, 400, False, RECIPES[method].size]
    if same and method in ("full", "lora", "prefix_tuning"):
        x, y = zip(*((p["learning_rate"], p["slot_loss"]) for p in sweep["points"]), strict=True)
        style = {"full": "s:", "lora": "D--", "prefix_tuning": "o-"}[method]
        axis.plot(x, y, style, color=report.COLORS[method], label=report.NAMES[method])
        axis.annotate(f"{sweep['best']:g}", (sweep["best"], min(y) * 0.5), ha="center")
        if method == "prefix_tuning":
            claim(min(y[0], y[-1]) > 3 * min(y), "ten times off, the loss is far higher")
axis.set(xscale="log", yscale="log", xlabel="learning rate", ylim=(0.01, 9))
axis.set(ylabel="validation loss on slots (nats per token)", title="one seed per point")
axis.legend(frameon=False, loc="upper left")
report.show(figure, "Validation loss on slots by learning rate: the best rates are 0.001 for full "
            "fine-tuning, 0.01 for LoRA, and 0.3 for prefix tuning.")  # fmt: skip

# %% [markdown]
# The best rate is far above LoRA's. Ten times above or below it, the loss is much higher.
#
# Now we load the trained prefix into a GPT with the wrong mask: `is_causal=True`, as in exercise 2, does not know of the prefix.


# %%
class WrongMask(GPT):
    """A GPT that always uses is_causal=True."""

    _mask = staticmethod(lambda *inputs: None)


gpt = WrongMask(base.pretrained.config)
gpt.load_state_dict(base.pretrained.state_dict())
model = PeftModel.from_pretrained(gpt, OUT / "prefix")
masked = task_loss(model, task.validation, base.end)["loss"]
print(f"validation loss of the trained prefix: {with_values:.2f}, with the wrong mask {masked:.2f}")
claim(masked > 3 * with_values, "with the wrong mask, the loss is far higher")

# %% [markdown]
# There is no error, but the loss is many times higher.
#
# ## What it costs
#
# Training a prefix keeps fewer activations than LoRA: no weight gets a gradient, so the inputs of linear layers need not be kept. (LoRA keeps nearly as much as full fine-tuning, because its A needs these inputs.) The price comes later. A prefix cannot be merged into weights, so its keys and
# values lie in the cache of every text that is generated. (A server can share them between texts; ours does not.)
#
# **Exercise 8.** A model with 7B parameters has 32 layers of width 4096, and its cache is in float16. How many bytes does a prefix of 20 virtual tokens add to
# the cache, for each text of a batch? (Each head has its own keys and values.)

# %% tags=["exercise"]
cache_bytes = None

# %% tags=["solution"]
cache_bytes = 2 * 20 * 32 * 4096 * 2  # keys and values, tokens, layers, width, bytes

# %% tags=["check"]
check("06.bytes", cache_bytes)

# %%
past = trained.prompt_encoder.past(trained.base_model, 1)
out = trained.base_model(ids, past_key_values=past, use_cache=True)
in_cache = sum(kv.nbytes for pair in out.past_key_values for kv in pair)
of_text = sum(kv.nbytes for pair in cache for kv in pair)
assert in_cache - of_text == 2 * 20 * 4 * 128 * 4  # float32
print(f"our GPT: {of_text:,} bytes of cache for {ids.shape[1]} tokens, {in_cache - of_text:,} more")
kept = {r.method: r.activation_bytes for r in (full, rows["lora"][0], prefix)}
print("kept for the backward pass:", {name: f"{n / 1e6:.0f} MB" for name, n in kept.items()})
claim(kept["prefix_tuning"] < 0.9 * kept["lora"], "a prefix keeps fewer activations than LoRA")

# %% [markdown]
# ## Steering
#
# `sentiment` needs no new skill: the model must only answer with a word that it knows. Four stored runs:

# %%
records = compare.load(DATA / "results" / "1m" / "sentiment" / "compare.json")
steering = compare.rows([r for r in records if not r.random_base])
for name in ("full", "lora", "prompt_tuning", "prefix_tuning"):
    print(f"{report.NAMES[name]:14}", [f"{r.score:.2f}" for r in steering[name]])
verdicts = [e.completion for e in tasks.load_task(base, "sentiment").test[:64]]
print(f'always "good": {verdicts.count(" good.") / len(verdicts):.2f}')
claim(min(r.score for r in steering["lora"]) > 0.99, "LoRA learns it with every seed")
claim(min(r.score for r in steering["prefix_tuning"]) < 0.95, "prefix tuning does not")

# %% [markdown]
# Always answering "good" is right in about half of the cases. Of the four runs of prefix tuning, one is hardly better, if at all, and so is one of prompt tuning. So do not judge them by one seed.
#
# ## Attention over text and prefix is a mixture
#
# **Exercise 9, harder.** For one query, attention over prefix and text is a mixture of two attentions: (1 - a) times attention over the text only, and a times attention over the prefix
# only, where a is the share of attention that the prefix gets ([He et al. 2021](https://arxiv.org/abs/2110.04366)). Write `gated(q, K_P, V_P, K, V)` in this form. q has the shape (w,), K_P and V_P (p, w), K and V (t, w). Divide scores by √w.


# %% tags=["exercise"]
def gated(q, K_P, V_P, K, V): ...  # return (1 - a) · on the text + a · on the prefix


# %% tags=["solution"]
def gated(q, K_P, V_P, K, V):
    on_prefix, on_text = K_P @ q / len(q) ** 0.5, K @ q / len(q) ** 0.5  # scores: (p,) and (t,)
    a = on_prefix.exp().sum() / (on_prefix.exp().sum() + on_text.exp().sum())
    return (1 - a) * on_text.softmax(0) @ V + a * on_prefix.softmax(0) @ V_P


# %% tags=["check"]
check("06.gated", gated)
