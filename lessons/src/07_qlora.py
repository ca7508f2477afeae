# %% [markdown]
# # 07 · QLoRA
#
# With LoRA, gradients and optimizer state are small. The frozen weights still take all their memory: 26 GB in bfloat16 for
# 13 billion parameters. Your card has 24 GB. But a frozen weight is only read, never updated, so perhaps it need not be precise.
# QLoRA stores each frozen weight in a few bits, and trains a LoRA on top.
#
# After this lesson you can
# - round a weight matrix to a few levels, block by block;
# - choose levels, and count the bits per weight;
# - write a layer that stores codes instead of its weight;
# - train a LoRA on a quantized model, and compute the memory saved;
# - measure what fewer bits cost.
#
# **Time.** About an hour, and 45 minutes more for "Going further". Results are for a GPT with 1 million parameters.
# [Glossary](README.md#glossary).

# %%
import inspect
import json
from dataclasses import replace
from statistics import NormalDist, mean

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

from minipeft import LoraConfig, PagedAdamW, PeftModel, get_peft_model, qlora, quantize_model
from minipeft.data import bits  # rounding to other levels
from minipeft.grader.lessons import check, claim, hint, lesson_07, solution, solved
from minipeft.lab import DATA, compare, memory, report, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import complete, task_loss, text_loss
from minipeft.lab.finetune import finetune
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.methods.qlora import NF4_CODEBOOK, Linear4bit, dequantize_nf4, quantize_nf4
from minipeft.targets import find_targets

PINK, GREY = report.COLORS["qlora"], report.COLORS["frozen"]
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
OUT = DATA.parent / "out" / "07"  # what this lesson saves; git ignores it
base = load_base(DATA / "base" / "1m")
task = tasks.load_task(base, "describe")

# %% [markdown]
# ## Before you start
#
# About lesson 02:
#
# **1.** LoRA on a model with 7 billion parameters, all in bfloat16. The adapter has 20 million parameters. Leave activations aside: what takes
# the most memory, `"weights"`, `"gradients"` or `"optimizer state"`?

# %% tags=["exercise"]
largest = None

# %% tags=["solution"]
largest = "weights"  # 14 GB; the others are only for 20 million parameters

# %% tags=["check"]
check("07.largest", largest)

# %% [markdown]
# **2.** A LoRA layer in the middle of the model computes y = W x + (α/r) B A x. Of which of W, A, B and x does the backward
# pass compute the gradient? Answer with a list, like `["W", "x"]`.

# %% tags=["exercise"]
gradients = None

# %% tags=["solution"]
gradients = ["A", "B", "x"]  # x, because the layers before have adapters too

# %% tags=["check"]
check("07.gradients", gradients)

# %% [markdown]
# The gradient of x is Wᵀ times the gradient of y, plus the adapter's part. So the backward pass needs W too.
#
# ## How few bits?
#
# We round all weights of the GPT's linear layers to fewer and fewer bits, without training. At each position of held-out text, we look at the most
# likely next token, the *top token*.
#
# **Your guess:** with how many bits per weight does the top token change at one position in ten? And why?

# %%
guess = None  # bits per weight, 1 to 16
reason = ""

# %% [markdown]
# ## Blocks with a scale
#
# Four bits can tell 16 values apart. So choose 16 *levels* from −1 to 1, and replace each weight by the *code* of a level, a number from 0 to 15.
# First scale the weights to lie between −1 and 1: divide by the *absmax*, the largest absolute value among them.
# To *quantize* is to compute codes and absmax; to *dequantize* is to compute the approximate weight again:
#
# $$ \text{code} = \text{index of the level nearest to } w / \text{absmax}, \qquad w \approx \text{absmax} \cdot \text{level}[\text{code}] $$
#
# **Exercise 1.** By hand, with three levels. Quantize the four weights, and then dequantize. Write the four values that come back.

# %% tags=["exercise"]
# weights [0.2, -0.8, 0.6, 0.1]
# levels  [-1, 0, 1]
by_hand = None  # a list of four numbers

# %% tags=["solution"]
by_hand = [0, -0.8, 0.8, 0]  # scaled by 0.8: 0.25, -1, 0.75, 0.125

# %% tags=["check"]
check("07.by_hand", by_hand)

# %% [markdown]
# One absmax for a whole matrix is a bad idea. A single large weight makes the other scaled weights small, and they fall on the few levels near zero.
# So the weights are cut into *blocks*, usually of 64 weights (the *block size*), and each block has its own absmax.

# %%
torch.manual_seed(0)
w = torch.randn(64, 64)
w[3, 5] = 20.0  # one large weight
zeros = {}
for blocksize, name in ((None, "one absmax for the matrix"), (64, "one per block of 64")):
    rough = bits.rounded(w, bits.CODES["int4"][1], blocksize)  # 4 bits, evenly spaced levels
    zeros[blocksize] = (rough == 0).float().mean()
    print(f"{name:26} {zeros[blocksize]:.0%} of the weights become zero")
claim(zeros[None] > 3 * zeros[64], "without blocks, one large weight turns most others into zero")

# %% [markdown]
# **Exercise 2.** Write `quantize(w, levels, blocksize)`. `w` is flat, and its length is a multiple of the block size. `levels` ascend. A block may have only zeros. Return a pair:
# the codes, integers of the shape (blocks, blocksize), and the absmax of each block, of the shape (blocks, 1).


# %% tags=["exercise"]
def quantize(w, levels, blocksize): ...  # return codes, absmax


# %% tags=["solution"]
def quantize(w, levels, blocksize):
    blocks = w.view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    distance = ((blocks / absmax)[..., None] - levels).abs()  # (blocks, blocksize, levels)
    return distance.argmin(dim=-1), absmax


# %% tags=["check"]
check("07.quantize", quantize)

# %% [markdown]
# ## Which levels?
#
# Most weights are small, and a few are large. Roughly, they follow a normal distribution. So put many levels near zero, and few
# near ±1. *NF4* (4-bit normal float) takes *quantiles*. The quantile Φ⁻¹(p) is the value below which a share p of normally
# distributed numbers (mean 0, variance 1) lies.
#
# To make n positive levels, start at a share p_max and go down to ½ in n equal steps. Of these n + 1 shares, take Φ⁻¹ of all but ½. Zero is added separately. (p_max is below one because Φ⁻¹(1) is infinite.) Negative levels are made in the same way, with a minus sign. At the end, divide all levels by Φ⁻¹(p_max): they
# then lie between −1 and 1. NF4 has 7 negative levels, zero, and 8 positive ones.
#
# **Exercise 3.** Write `make_levels(n_negative, n_positive, p_max)`. It returns all levels in a tensor, in ascending order.
# `NormalDist().inv_cdf(p)` is Φ⁻¹(p), for a number p.


# %% tags=["exercise"]
# For 2 positive levels and p_max = 0.9, p is 0.9 and 0.7: two steps of 0.2 lead down to 0.5.
def make_levels(
    n_negative, n_positive, p_max
): ...  # return a tensor (n_negative + 1 + n_positive,)


# %% tags=["solution"]
def make_levels(n_negative, n_positive, p_max):
    def quantiles(n):
        p = torch.linspace(p_max, 0.5, n + 1)[:-1]
        return torch.tensor([NormalDist().inv_cdf(q) for q in p.tolist()])

    levels = torch.cat((-quantiles(n_negative), torch.zeros(1), quantiles(n_positive)))
    return levels.sort().values / levels.max()


# %% tags=["check"]
check("07.levels", make_levels)

# %% [markdown]
# Your two functions make minipeft's NF4. Here are its levels, and the weights of our GPT, scaled block by block.

# %%
levels = NF4_CODEBOOK
if solved("07.levels"):
    levels = make_levels(7, 8, 0.9677083)  # this p_max is in the authors' code
assert torch.allclose(torch.as_tensor(levels), NF4_CODEBOOK, atol=1e-6)
toy = torch.randn(4 * 64)
rounded = bits.rounded(toy, NF4_CODEBOOK, 64)  # until your function is right
if solved("07.quantize"):
    codes, absmax = quantize(toy, NF4_CODEBOOK, 64)
    rounded = (NF4_CODEBOOK[codes.long()] * absmax).view(-1)
assert torch.allclose(rounded, dequantize_nf4(quantize_nf4(toy, double_quant=False)), atol=1e-6)
print(*(f"{level:.2f}" for level in NF4_CODEBOOK.tolist()))

# %%
weights = [layer.weight.detach() for layer in find_targets(base.pretrained, "all-linear").values()]
blocks = torch.cat([weight.reshape(-1, 64) for weight in weights])
scaled = (blocks / blocks.abs().amax(dim=1, keepdim=True)).view(-1)
figure, (top, low) = plt.subplots(2, 1, figsize=(7, 3.6), sharex=True, height_ratios=[2, 1])
top.hist(scaled.numpy(), bins=101, color=GREY)
top.set_ylabel("weights")
for row, (name, color) in enumerate([("int4", "black"), ("NF4", PINK)]):
    places = bits.CODES[name][1]
    low.plot(places, [row] * len(places), "|", markersize=18, markeredgewidth=2, color=color)
low.set(yticks=[0, 1], yticklabels=["int4: even steps", "NF4"], ylim=(-0.6, 1.6))
low.set_xlabel("weight / absmax of its block")
report.show(
    figure,
    "Histogram of scaled weights, a bell around zero with small peaks at -1 and 1; the levels of NF4 are dense near zero.",
)

# %% [markdown]
# The peaks at the ends are the largest weights of the blocks: they are −1 or 1 by definition.
#
# ## Count the bits
#
# **Exercise 4.** Each absmax is stored too. With codes of 4 bits, blocks of 32 weights and a float32 absmax, how many bits does a weight take in all?

# %% tags=["exercise"]
bits_of_32 = None  # a number, or an expression

# %% tags=["solution"]
bits_of_32 = 4 + 32 / 32

# %% tags=["check"]
check("07.bits", bits_of_32)

# %% [markdown]
# With blocks of 64, the absmax adds half a bit per weight. *Double quantization* stores the absmax values in 8 bits (details in "Going further"). Does it cost precision?

# %%
torch.manual_seed(0)
w, errors = torch.randn(1024, 1024), []
for double in (False, True):
    q = quantize_nf4(w, double_quant=double)
    errors.append(((dequantize_nf4(q) - w).norm() / w.norm()).item())
    print(f"double quantization {double}: {q.bits():.3f} bits per weight, error {errors[-1]:.2%}")
claim(errors[1] < 1.01 * errors[0], "double quantization hardly adds to the error")

# %% [markdown]
# ## The answer to your guess
#
# Here we measure NF4 and int2; the figure shows stored runs. The formats int4, int3 and int2 have evenly spaced levels around zero: 15, 7 and 3 of them.


# %%
@torch.no_grad()
def log_probabilities(model, rows=base.held_out[:64]):
    return bits.log_probabilities(model.eval(), rows)


def coarse(code, model=None):
    """A model with its linear weights rounded, in blocks of 64; the base if none is given."""
    model = model or base.model()
    for layer in find_targets(model, "all-linear").values():
        layer.weight.data = bits.rounded(layer.weight.detach(), bits.CODES[code][1], 64)
    return model


def changed(one, other):
    """The share of positions with another most likely token."""
    return (one.argmax(-1) != other.argmax(-1)).float().mean().item()


# %%
truth = log_probabilities(base.model())
models = {"NF4": quantize_model(base.model()), "int2": coarse("int2")}
live = {code: changed(truth, log_probabilities(model)) for code, model in models.items()}
records = [r for r in json.loads(bits.RESULTS.read_text()) if r["base"] == "1m"]
stored_runs = {(r["code"], r["blocksize"]): (r["bits"], 1 - r["agreement"]) for r in records}
share = {key: changes for key, (_, changes) in stored_runs.items()}
for code, value in live.items():
    print(f"{code}: changed at {value:.1%} of the positions; in stored runs {share[code, 64]:.1%}")
    claim(abs(value - share[code, 64]) < 0.02, f"{code} changes as many tokens as in stored runs")
print(f"int3, stored: {share['int3', 64]:.1%}. Your guess: {guess} bits")
claim(share["NF4", 64] < share["int4", 64] < 0.1 < share["int3", 64], "between 3 and 4 bits")
claim(share["int3", 64] < share["int4", None], "3 bits in blocks are better than 4 without")

# %%
figure, axis = plt.subplots(figsize=(7, 3.8))
for code, marker, color in (("NF4", "o", PINK), ("int", "s", "black")):
    for size in (64, None):
        places = [at for (c, b), at in stored_runs.items() if c.startswith(code) and b == size]
        label = f"{code}, {'blocks of 64' if size else 'one absmax per matrix'}"
        style = {"color": color, "mfc": color if size else "white", "label": label}
        axis.plot(*zip(*places, strict=True), marker + ("-" if size else ":"), **style)
        for place in places:
            to = (9, 3) if not size else (-32, -10) if code == "int" else (9, -10)
            axis.annotate(f"{place[1]:.0%}", place, to, textcoords="offset points")
axis.axhline(0.1, color=GREY, linewidth=1)
axis.text(0.01, 0.095, "one in ten", va="top", transform=axis.get_yaxis_transform())
if guess is not None:
    axis.plot(guess, 0.1, "k*", markersize=12, label="your guess")
limits = (min(1.8, (guess or 4) - 0.7), max(5, (guess or 4) + 0.5))
axis.set(xlim=limits, yscale="log", ylim=(0.04, 1.3))
axis.set_xlabel("bits per weight (absmax counted as with double quantization)")
axis.set_ylabel("positions with another top token")
axis.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["5 %", "10 %", "20 %", "50 %", "100 %"])
axis.minorticks_off()
axis.legend(frameon=False, fontsize=9)
alt = "Changed tokens by bits, log axis: with blocks, 6 % for NF4, 16 % for int3, 78 % for int2."
report.show(figure, alt)

# %% [markdown]
# One token in ten changes somewhere between three and four bits. And int4 *without* blocks (hollow) is worse than int3 *with* them.
#
# ## A layer that stores codes
#
# The layer dequantizes W, multiplies by it, and drops it. But the backward pass needs W too. Keeping W until then would save no memory.
# So the backward pass dequantizes *again*.
#
# **Exercise 5.** In PyTorch, inputs and gradients are rows: y = x Wᵀ. Write this function. `q` holds the codes and absmax values of W, and `dequantize_nf4(q)` returns W, of the shape (out, in).
# You may keep `q`, but nothing as large as W. `backward` returns two values: the gradient of x, and `None` for `q`.


# %% tags=["exercise"]
class Frozen4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q): ...  # x (…, in) -> y (…, out); backward can read what you set on ctx

    @staticmethod
    def backward(ctx, grad): ...  # grad (…, out) is the gradient of y


# %% tags=["solution"]
class Frozen4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return x @ dequantize_nf4(q).T

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantize_nf4(ctx.q), None


# %% tags=["check"]
check("07.backward", Frozen4bit)

# %% [markdown]
# minipeft's layer does the same, and adds a bias. How much does PyTorch keep for the backward pass, with this layer and without?


# %%
def kept_bytes(function):
    """The bytes that autograd keeps for the backward pass, and the gradient of x."""
    sizes, x = [], torch.ones(4, 1024, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks  # they do not see what is set on ctx
    with hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        y = function(x)
    return sum(sizes), torch.autograd.grad(y.square().sum(), x)[0]


layer = Linear4bit(torch.nn.Linear(1024, 1024, bias=False))
kept, wanted = kept_bytes(lambda x: torch.nn.functional.linear(x, dequantize_nf4(layer.quantized)))
ours, found = kept_bytes(layer)
assert torch.allclose(found, wanted, rtol=1e-4)
if solved("07.backward"):
    yours = kept_bytes(lambda x: Frozen4bit.apply(x, layer.quantized))[1]
    assert torch.allclose(yours, found, rtol=1e-4)
assert kept >= 4 * 1024 * 1024
assert ours == 0
stored = sum(buffer.nbytes for buffer in layer.buffers())
print(f"kept for the backward pass: F.linear {kept:,} bytes, 4-bit layer {ours}")
print(f"(beside the codes, {stored:,} bytes, which the layer stores in any case)")
print(inspect.getsource(qlora._Linear4bitFunction))

# %% [markdown]
# So "4-bit" says how a weight is *stored*; products are computed in floating point.
#
# ## QLoRA on the GPT
#
# Quantize the base, and then add a LoRA, which stays in full precision. Embeddings, norms and the output head are not quantized. One linear layer after both steps:

# %%
ids = torch.tensor([task.test[0].prompt_ids])
four_bits = quantize_model(base.model())
before = four_bits(ids).logits
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(four_bits, config)
assert torch.equal(model(ids).logits, before)  # B is zero: it starts as the 4-bit model
model(ids, labels=ids).loss.backward()
assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())
print(next(m for m in model.modules() if isinstance(m, qlora.QLoraLinear)))
print(inspect.getsource(qlora.QLoraLinear.forward))

# %% [markdown]
# **Exercise 6.** How many GB (10⁹ bytes) do 7 billion weights take as NF4, with double quantization?

# %% tags=["exercise"]
gigabytes = None  # a number, or an expression

# %% tags=["solution"]
gigabytes = 7e9 * 4.127 / 8 / 1e9

# %% tags=["check"]
check("07.gigabytes", gigabytes)

# %% [markdown]
# This table is computed, in GiB (2³⁰ bytes), with rank 8, 512 tokens, and gradient checkpointing, which recomputes
# activations instead of keeping them. For full fine-tuning (with its gradients) and LoRA, the base is in bfloat16. For QLoRA, it is in NF4, but embeddings and head are in float32:
# so it takes more than in exercise 6. Adapters and optimizer states are in float32.

# %%
rows, totals = [], {}
for name in ("full", "lora", "qlora"):
    parts = memory.memory(memory.SHAPES["llama-2-7b"], name, r=8)
    totals[name] = sum(parts.values()) / 2**30
    sizes = [f"{size / 2**30:.1f}" for size in parts.values()]
    rows.append([report.NAMES[name], *sizes, f"{totals[name]:.1f}"])
display(Markdown(report.markdown_table(["Llama-2-7B, GiB", *memory.PARTS, "total"], rows)))
assert totals["qlora"] < totals["lora"] / 2

# %% [markdown]
# ## Train it
#
# Train the same LoRA on three bases: float32, NF4, and int2, where most top tokens have changed (simulated: rounded, but stored as float32). Examples, order,
# steps and learning rate are the same.
#
# **Guess again:** which slot accuracy does LoRA reach on int2?

# %%
guess_score = None  # from 0 to 1
run = RunConfig(seed=0, steps=100, learning_rate=0.01, n_evaluations=4)
print(f"{run.steps} steps, batches of {run.batch_size}, rate {run.learning_rate}, r 8, α 16")
int2 = replace(base, pretrained=coarse("int2"))
runs = {
    "LoRA on float32": finetune(base, task, RECIPES["lora"], replace(run, output=OUT / "float32")),
    "LoRA on NF4": finetune(base, task, RECIPES["qlora"], replace(run, output=OUT / "nf4")),
    "LoRA on int2": finetune(int2, task, RECIPES["lora"], replace(run, output=OUT / "int2")),
}

# %%
records = compare.load(DATA / "results" / "1m" / "compare.json")
shown = {
    f"{r.method} on float32": r
    for r in records
    if r.method in ("frozen", "full") and r.seed == 0 and not r.random_base
} | runs
display(Markdown(report.markdown_table(
    ["method", "kB, with adapter", "slot accuracy", "loss on pretraining text"],
    [[name, f"{r.weight_bytes / 1e3:,.0f}", f"{r.score:.2f}",
      f"{r.forgetting.get('on', r.forgetting['base']):.2f}"] for name, r in shown.items()],
)))  # fmt: skip
print("prompt:    ", task.test[0].prompt)
for name, r in runs.items():
    print(f"{name:15}", r.examples[0]["generated"])
print("reference: ", task.test[0].completion)
claim(runs["LoRA on NF4"].score > 0.8, "LoRA learns the task on NF4")
claim(runs["LoRA on int2"].score > 0.6, "LoRA learns most of the task on int2")

# %% [markdown]
# (The first two are stored runs. Embeddings and head stay in float32, so NF4 saves less than on a large model.)
#
# One run each is too few to compare. The figure has ten seeds per point, on validation examples,
# without weight decay and with decay towards the values at step 0 (lesson 02).
# Forgetting is measured against the float32 base, so it contains what rounding destroyed (triangles in the figure) and what training changed.

# %%
lines = (DATA / "results" / "bits.jsonl").read_text().splitlines()
records = [json.loads(line) for line in lines]
names = {"float32": "lora", "NF4": "qlora", "int3": "lora, int3 base", "int2": "lora, int2 base"}


def values(name, decay, key):
    """What was measured on this base, with seeds in order."""
    found = [r for r in records if (r["method"], r["decay"]) == (names[name], decay)]
    return torch.tensor([r[key] for r in sorted(found, key=lambda r: r["seed"])])


print("runs with the same seed: mean difference, with a 95 % interval as ±")
print("in brackets: what the rounded base has lost before training (not a difference of runs)")
for decay in (0, 0.04):
    for name in ("NF4", "int3", "int2"):
        text = f"{name} minus float32, {'with' if decay else 'no'} decay:"
        for key in ("score", "forgetting"):
            difference = (values(name, decay, key) - values("float32", decay, key)).tolist()
            half = report.interval(difference)
            text += f"  {key} {mean(difference):+.2f} ± {half:.2f}"
        start = values(name, decay, "forgetting_at_start").mean().item()
        print(text, f"(before: {start:+.2f})")
        if name == "int3":  # difference: how much more it forgets than on float32
            claim(mean(difference) - start > half, "on int3, training too makes it forget more")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
for axis, key in zip(axes, ("score", "forgetting"), strict=True):
    for decay, style, color, to in ((0, "o-", "black", (-12, 10)), (0.04, "s--", GREY, (5, -17))):
        found = [values(name, decay, key).tolist() for name in names]
        means, halves = [mean(v) for v in found], [report.interval(v) for v in found]
        label = "with weight decay" if decay else "no weight decay"
        axis.errorbar(range(4), means, halves, fmt=style, color=color, capsize=4, label=label)
        for place in enumerate(means):
            axis.annotate(f"{place[1]:.2f}", place, to, textcoords="offset points", color=color)
    axis.set(xticks=range(4), xticklabels=names, xlabel="base", xlim=(-0.4, 3.8))
start = [values(name, 0, "forgetting_at_start").mean().item() for name in names]
axes[1].plot([1.2, 2.2, 3.2], start[1:], "k^", mfc="none", ms=10, label="before training")
for i, value in enumerate(start[1:], 1):
    axes[1].annotate(f"{value:.3f}", (i + 0.2, value), (8, -4), textcoords="offset points")
if guess_score is not None:
    axes[0].plot(3, guess_score, "k*", markersize=12, label="your guess")
axes[0].set(ylabel="slot accuracy, 95 % interval", ylim=(0, 1.12))
axes[1].set(ylabel="forgetting (nats per token)", yscale="log", ylim=(0.002, 15))
for axis, place in zip(axes, ("lower left", "lower right"), strict=True):
    axis.legend(frameon=False, loc=place)
alt = "By base: on int2 the score is a little lower, and forgetting is far higher, before training too."
report.show(figure, alt)
claim(values("int2", 0, "score").mean() > 0.8 and start[3] > 3, "int2 is damaged, and still learns")
ahead = [values("int3", d, "score") > values("NF4", d, "score") for d in (0, 0.04)]
claim(all(0.2 < a.float().mean() < 0.8 for a in ahead), "NF4 or int3: it changes from seed to seed")

# %% [markdown]
# On NF4, LoRA scores a little lower than on float32, and with decay it forgets a little more. On int3 we see no difference in the score, but LoRA
# forgets more. Rounding alone explains only a part of this. Whether NF4 or int3 scores higher changes from seed to seed. <!-- claim: few-bits -->
#
# On int2, rounding destroyed most of what the base knew, and still LoRA learned most of the task. The base did not come back: on text like that
# of pretraining, the model is as bad as before training, or worse. So a good score on your task does not show that the model is good at anything else. Measure both.
#
# ## Summary
#
# - Quantizing stores a code per weight, and an absmax per block. Blocks limit the harm of large weights.
# - NF4 puts its levels at quantiles of the normal distribution. With double quantization, a weight takes a little over four bits.
# - The layer dequantizes W in the forward pass, and again in the backward pass. Products are computed in floating point.
# - QLoRA is LoRA on such a base. Here four bits cost little, three cost some forgetting, and two damage the base.
# - LoRA can learn a task on a damaged base, without repairing it.
#
# **Do you remember?** Answer first, then open.
#
# <details><summary>1. Why does each block have an absmax of its own?</summary>A large weight then spoils only its own block. With one absmax, most weights would fall on the levels near zero.</details>
#
# <details><summary>2. W is frozen. Why does the backward pass dequantize it?</summary>The gradient of x contains W, and layers before this one need it.</details>
#
# <details><summary>3. Is a 4-bit layer faster, because it multiplies 4-bit numbers?</summary>Not for this reason: it multiplies floats, and dequantizing comes on top. Four bits save memory.</details>
#
# **To read:** the paper, [Dettmers et al. 2023](https://arxiv.org/abs/2305.14314), sections 2 and 3.
#
# # Going further
#
# **Build it yourself.** Write the whole file and have it graded: `python -m minipeft build start qlora my` ([BUILD.md](BUILD.md)).
#
# ## Double quantization
#
# The absmax values are numbers like any others, so they can be quantized too. First their mean is subtracted. Then 256 of them form a block: each gets an 8-bit code, and the block one float32
# scale. One more float32 per matrix holds the mean.
#
# **Exercise 7.** NF4 with double quantization, but in blocks of 32 weights. As before, 256 absmax values share a float32 scale. How many bits does
# a weight take? Leave out the mean.

# %% tags=["exercise"]
double = None  # a number, or an expression

# %% tags=["solution"]
double = 4 + 8 / 32 + 32 / (32 * 256)

# %% tags=["check"]
check("07.double", double)

# %%
q = quantize_nf4(torch.randn(1024, 1024))  # blocks of 64
for name in ("codes", "scales", "scale_scales", "offset"):
    print(f"{name:13} {8 * getattr(q, name).nbytes / 1024**2:.5f} bits per weight")
print(f"{'together':13} {q.bits():.5f}")
assert abs(q.bits() - (4 + 8 / 64 + 32 / (64 * 256))) < 1e-4

# %% [markdown]
# ## Is NF4 the best format? And on larger models?
#
# Newer GPUs also multiply 4-bit floats directly (formats such as MXFP4 and NVFP4, with a scale per 16 or 32 values); they cannot do this with NF4 codes.
#
# The paper calls NF4 optimal: its levels are chosen so that all are used equally often. In our GPT they are not used equally often, as the next cell shows. A block's weights are divided by the largest of
# them, which changes their distribution ([Yoshida 2023](https://arxiv.org/abs/2306.06965)). Still, NF4 changes fewer top tokens than int4 and FP4 (a 4-bit float), on each of our
# three bases. (NF4 has 16 levels and the others 15, which may be part of the reason.) And in every format, the larger bases change less. If that goes on, it is good news for 7B models, but three bases are not a law.
# [Dettmers and Zettlemoyer 2022](https://arxiv.org/abs/2212.09720) asks how many bits are best for a given amount of memory.
# <!-- claim: bits-order -->

# %%
middles = (NF4_CODEBOOK[1:] + NF4_CODEBOOK[:-1]) / 2
used = torch.bucketize(scaled, middles).bincount(minlength=16) / len(scaled)
print(f"rarest level {used.min():.1%}, most frequent {used.max():.1%}; equal would be {1 / 16:.1%}")
claim(used.max() > 2 * used.min(), "the levels are not used equally often")
by_base = {}
for name in ("0.3m", "1m", "3m"):
    found = json.loads(bits.RESULTS.read_text())
    found = [r for r in found if (r["base"], r["blocksize"]) == (name, 64)]
    by_base[name] = {r["code"]: 1 - r["agreement"] for r in found}
    print(name, ", ".join(f"{code} {value:.1%}" for code, value in by_base[name].items()))
    claim(by_base[name]["NF4"] < min(by_base[name]["FP4"], by_base[name]["int4"]), "NF4 is best")
for code in bits.CODES:
    small, middle, large = (by_base[name][code] for name in by_base)
    claim(small > middle > large, f"with {code}, a larger base changes less")

# %% [markdown]
# ## Paged optimizers
#
# AdamW keeps two numbers per trained parameter. On a batch of long texts, the GPU's memory may not be enough for them too, and training stops with an error. A *paged* optimizer keeps the two numbers in CPU memory instead, cut into *pages* of equal size. Only a part of the pages fits on the GPU:
#
# - To update a parameter, the optimizer needs its page on the GPU. If the page is there already, that is a *hit*. If not, it is copied.
# - When there is no room for another page, the one that was used least recently goes back to the CPU.
#
# The copies cost time, but they change no number: our `PagedAdamW` gives exactly the weights of torch's AdamW.
#
# Every training step needs every page once. **Guess:** half of the pages fit. If all steps visit the pages in the same order, what share of
# the requests are hits?

# %%
guess_pages = None  # from 0 to 1


def walk(n_fit, alternate, steps=20, pages=16):
    """Train a tensor of 16 pages, of which n_fit fit: the share of requests that hit, the result."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(pages * 128))  # 1,024 bytes: 128 elements, two numbers each
    size = {"page_bytes": 1024, "device_budget_bytes": n_fit * 1024}
    optimizer = PagedAdamW([p], alternate=alternate, **size)
    for _ in range(steps):
        p.grad = p.detach() ** 2
        optimizer.step()
    return optimizer.counters["hits"] / (steps * pages), p.detach()


torch.manual_seed(0)
p = torch.nn.Parameter(torch.randn(16 * 128))
adamw = torch.optim.AdamW([p], foreach=False, fused=False)
for _ in range(20):
    p.grad = p.detach() ** 2
    adamw.step()
assert torch.equal(walk(8, True)[1], p)
assert torch.equal(walk(8, False)[1], p)

# %%
figure, axis = plt.subplots(figsize=(6.5, 3))
fits = [2, 4, 6, 8, 10, 12, 14, 15, 16]
for alternate, style, color in ((False, "o--", "black"), (True, "s-", PINK)):
    hits = [walk(n, alternate)[0] for n in fits]
    label = "alternating order" if alternate else "same order in each step"
    axis.plot([n / 16 for n in fits], hits, style, color=color, label=label)
    below = (9, -11 if alternate else 7)  # the guess has room above
    axis.annotate(f"{hits[3]:.0%}", (0.5, hits[3]), below, textcoords="offset points")
    assert alternate or not any(hits[:-1])  # in the same order: no hit, until all pages fit
if guess_pages is not None:
    axis.plot(0.5, guess_pages, "k*", markersize=12, label="your guess")
axis.set(xlabel="share of the pages that fit", ylabel="share of hits", ylim=(-0.05, 1.05))
axis.legend(frameon=False)
report.show(
    figure, "Share of hits by share of pages that fit: zero in the same order until all fit; it rises steadily if the order alternates."
)  # fmt: skip

# %% [markdown]
# In the same order, *no* request hits until all pages fit: each page is dropped before its next turn. If the order alternates,
# a step begins with the pages that the last step ended with. In the first step no page is there yet, so the share stays below one. (This ran without a GPU: we only counted which pages the optimizer asks for.)
#
# **bitsandbytes**, the library of the paper's authors, leaves the work to CUDA's *unified memory*. CPU and GPU can both read this memory, and the GPU's driver moves its pages between them when they are needed.
# bitsandbytes puts the optimizer state of a tensor there if the tensor has at least 100,000 elements. The state of smaller tensors stays on the GPU.
#
# **Exercise 8.** The linear layers of Llama-2-7B have sides of 4,096 and 11,008. A and B are separate tensors. What is the smallest rank at which bitsandbytes
# pages any tensor of a LoRA adapter?

# %% tags=["exercise"]
paged = None  # an integer

# %% tags=["solution"]
paged = -(-100_000 // 11_008)  # rounded up

# %% tags=["check"]
check("07.paged", paged)

# %% [markdown]
# So bitsandbytes never pages the state of an adapter of rank 8 on these layers. It is small anyway.
#
# ## Which weights do you merge into?
#
# A QLoRA was trained next to dequantized weights. You also have the original weights, which are more precise. Into which do you merge? **Guess first**, on paper: which one will score higher, with four bits and with two?
#
# **Exercise 9.** Write `two_merges(W, q, A, B, scaling)`. It returns a pair: the update merged into the dequantized weight, and into the
# original weight W. `q` is the quantized W. Change no input.


# %% tags=["exercise"]
def two_merges(W, q, A, B, scaling): ...  # return into_dequantized, into_original


# %% tags=["solution"]
def two_merges(W, q, A, B, scaling):
    update = scaling * B @ A
    return dequantize_nf4(q) + update, W + update


# %% tags=["check"]
check("07.merges", two_merges)


# %%
def measure(model, trained):
    """Slot accuracy, losses on the task and on pretraining text, distance to the trained model."""
    logs, wanted = log_probabilities(model), log_probabilities(trained)
    examples = task.test[:100]
    score = task.score(examples, complete(model, base, examples))
    loss = task_loss(model, task.test, base.end)["loss"]
    distance = abs((wanted.exp() * (wanted - logs)).sum(-1).mean().item())  # KL, nats per token
    return score, loss, text_loss(model, base.held_out[:64]), distance


found = {}
for name, rounded_base in (("nf4", quantize_model(base.model())), ("int2", coarse("int2"))):
    trained = PeftModel.from_pretrained(rounded_base, OUT / name).eval()
    original = PeftModel.from_pretrained(base.model(), OUT / name)
    for into, model in (("dequantized", trained), ("original", original)):
        merged = model.merge_and_unload()  # a copy: `trained` itself still has its adapter
        found[name, into] = measure(merged, trained)
rows = [[*k, *(f"{x:.3f}" for x in row[:3]), f"{row[3]:.2g}"] for k, row in found.items()]
head = ["trained on", "merged into", "slot accuracy", "task loss", "pretraining text", "KL"]
display(Markdown(report.markdown_table(head, rows)))
same, other = found["nf4", "dequantized"], found["nf4", "original"]
claim(same[3] < 1e-4 < other[3], "only the dequantized weights give the model that was trained")
claim(abs(same[0] - other[0]) < 0.06, "with 4 bits, both merges score about the same")
claim(same[1] < other[1] and other[2] < same[2], "dequantized: lower loss on the task only")
claim(found["int2", "original"][0] < 0.1, "with 2 bits, the merge into the original weights fails")

# %% [markdown]
# The last column compares with the model that was trained: the Kullback-Leibler divergence (KL) of the next-token probabilities is zero, up to rounding, if they are equal.
# Only the merge into the dequantized weights gives the model that was trained. With four bits, both work. In this run, the dequantized weights have a slightly
# lower loss on the task, and the original weights on text like that of pretraining. Slot accuracy cannot tell them apart.
#
# With two bits, the merge into the original weights fails at the task. (On text like that of pretraining its loss is lower: the original weights were made for this text.) The two bases differ too much, and the adapter fits only the one that it was trained on. So merge into the weights that
# the adapter was trained on. If you merge into others, measure again.
#
# ## Round the merged weights again?
#
# A merged model is in float again. What if you round it, to have few bits once more? In QLoRA, rounding comes before training. Here it comes last:
# take the LoRA of the float32 base, merge it, and round the result.

# %%
again, examples = {}, task.test[:100]
for code in ("NF4", "int3", "int2"):
    merged = PeftModel.from_pretrained(base.model(), OUT / "float32").merge_and_unload()
    again[code] = task.score(examples, complete(coarse(code, merged), base, examples))
print(f"trained on float32: {runs['LoRA on float32'].score:.2f}")
print("merged, then rounded:", ", ".join(f"{code} {score:.2f}" for code, score in again.items()))
print("rounded, then trained:", f"NF4 {runs['LoRA on NF4'].score:.2f},", end=" ")
print(f"int2 {runs['LoRA on int2'].score:.2f}")
claim(again["NF4"] > 0.7, "rounding a merged model to 4 bits keeps most of what was learned")
claim(again["int2"] < 0.2 < 0.5 < runs["LoRA on int2"].score, "at 2 bits the order decides")

# %%
model = PeftModel.from_pretrained(base.model(), OUT / "float32").eval()
layers = [m for m in model.modules() if hasattr(m, "lora_A")]
lost = []
for divide_by in (1, 10, 100):  # the update that was learned, and smaller ones
    sizes, errors = [], []
    for layer in layers:
        W, update = layer.base_layer.weight.detach(), layer.delta().detach() / divide_by
        error = bits.rounded(W + update, NF4_CODEBOOK, 64) - (W + update)
        sizes.append((update.norm() / W.norm()).item())
        errors.append((error.norm() / update.norm()).item())
    lost.append(mean(errors))
    print(
        f"update: {mean(sizes):5.1%} of W; error of rounding to NF4: {lost[-1]:.0%} of the update"
    )
claim(lost[0] < 0.6 < 1 < min(lost[1:]), "rounding is small only next to a large update")

# %% [markdown]
# At two bits the order decides: trained last, it works; rounded last, all is lost. At four bits, rounding last costs little *here*. A possible reason is in the last
# three lines. The error of rounding depends on the size of the weights, and hardly on the update. Our update is larger than this error. An update ten times smaller
# would be smaller than the error, and might be lost in it. So measure before you round a merged model.
#
# ## Start closer to the base
#
# LoRA starts with B A = 0, so a QLoRA starts with all of the rounding error. It could start with the B A that is nearest to the error W − Q, as far as
# rank r allows. This is the idea of [LoftQ](https://arxiv.org/abs/2310.08659).
#
# **Exercise 10, harder.** Write `correct(W, Q, r, alpha)`: it returns `(A, B)` such that Q + (α/r) B A is as close to W as
# possible (in Frobenius norm: see exercise 7 of lesson 02).


# %% tags=["exercise"]
def correct(W, Q, r, alpha): ...  # return A (r, in), B (out, r)


# %% tags=["solution"]
def correct(W, Q, r, alpha):
    u, s, vh = torch.linalg.svd(W - Q, full_matrices=False)
    return vh[:r], u[:, :r] * s[:r] * r / alpha


# %% tags=["check"]
check("07.correct", correct)
if not solved("07.correct"):
    correct = lesson_07.FINISHED["correct"]

# %%
torch.manual_seed(0)
corrected, squares, noise = coarse("int2"), [], []
for layer, W in zip(find_targets(corrected, "all-linear").values(), weights, strict=True):
    Q = layer.weight.detach().clone()
    A, B = correct(W, Q, 8, 16)
    layer.weight.data += 16 / 8 * B @ A
    for shares, matrix in ((squares, W - Q), (noise, torch.randn_like(W))):
        s = torch.linalg.svdvals(matrix)
        shares.append((s[:8].square().sum() / s.square().sum()).item())
left = changed(truth, log_probabilities(corrected))
print(f"int2: changed top tokens {live['int2']:.1%}, corrected with rank 8 {left:.1%}")
print(f"rank 8 corrects {mean(squares):.0%} of the squared error", end="; ")
print(f"in random matrices, it would be {mean(noise):.0%}")
claim(left < live["int2"], "the correction helps")
claim(mean(squares) < 1.5 * mean(noise), "the error lies in almost all directions")

# %% [markdown]
# Rank 8 corrects only a small part of the rounding error, hardly more than it would correct of a random matrix. And no other A and B of rank 8 correct more of the squared error.
# So the LoRA that learned the task on int2 *cannot* have repaired the weights.
