# %% [markdown]
# # 10 · Real models: what changes at 7B?
#
# After this lesson you can
# - compute the memory of fine-tuning from a model's shape, before you rent anything;
# - say what LoRA and QLoRA do *not* make smaller, and name three things that do;
# - open GPT-2, list what an adapter could be put on, and count what would be trained;
# - say what a GPU and bfloat16 change, what two processes send each other, and what breaks in 16 bits;
# - go the whole way with your own data: train, generate, merge, and load the result elsewhere.
#
# **Papers.** Chen et al. 2016, *Training Deep Nets with Sublinear Memory Cost* (gradient checkpointing), arXiv 1604.06174;
# Dettmers et al. 2023, *QLoRA*, arXiv 2305.14314.
#
# **Time.** Thirty minutes to read, two and a half to run, fifty for the exercises.

# %%
import inspect
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from torch.utils.checkpoint import checkpoint

from minipeft import GPT, GPTConfig, LoraConfig, PromptTuningConfig, get_peft_model
from minipeft.lab import DATA, cli, compare, memory, parallel, report, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import activation_bytes, task_loss
from minipeft.lab.finetune import build_model, finetune
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.lab.train import autocast, pick_device, train
from minipeft.targets import find_targets, list_targets

MODEL = None  # None: GPT-2's shape with random weights. "gpt2": the real one, half a gigabyte from the hub. Or a folder.

BLUE, ORANGE, PINK = (report.COLORS[name] for name in ("full", "lora", "qlora"))
PARTS = ("#1b4f8f", "#d1741f", "#6a3d9a", "#b9b9b9")  # as in lesson 01
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
OUT = Path(os.path.relpath(DATA.parent / "out" / "10"))  # git does not look there
shutil.rmtree(OUT, ignore_errors=True)
base = load_base(DATA / "base" / "1m")
task = tasks.load_task(base, "describe")

# %% [markdown]
# All lessons so far ran on models of a few million parameters. This one asks what stays true of models a thousand times as
# large. We cannot train those here. But what they *take* can be computed, and the computation can be checked on
# models that fit.
#
# ## A question first
#
# A model of the shape of Llama-2-7B, with weights of 16 bits. A batch of four texts of 1,024 tokens. Nothing clever is done
# about memory.
#
# **Your guess:** how many gigabytes does fine-tuning take, with each method?

# %%
guess = {"full": 28, "lora": 14, "qlora": 4}  # GB: put your own numbers here before you go on

# %% [markdown]
# ## The idea: four parts
#
# $$ \text{bytes} = \text{weights} + \text{gradients} + \text{optimizer} +
#    \underbrace{\text{tokens} \times \text{what a token leaves behind}}_{\text{activations}} $$
#
# The first three depend on the *method*: which weights are stored in how many bits, and how many are trained. The last one
# depends on the *batch*. In the backward pass each layer needs what it was given in the forward pass, so all of that is
# kept until then.
#
# ## By hand
#
# Four numbers from a model's shape. Llama's block has seven linear layers: queries, keys, values and output, then a gated MLP
# of three. (At 70B, eight query heads share one head of keys and values, so these are narrower.)


# %%
def by_hand(layers, d, f, keys, heads, vocabulary, method, tokens, checkpointing, r=8):
    """Bytes of weights, gradients, optimizer state and activations."""
    linears = [(d, d), (d, keys), (d, keys), (d, d), (d, f), (d, f), (f, d)]  # (in, out)
    n = layers * sum(i * o for i, o in linears)  # weights of linear layers
    p = n + 2 * vocabulary * d + (2 * layers + 1) * d  # and embedding, head, norms
    a = layers * sum(r * (i + o) for i, o in linears)  # LoRA on each linear layer
    weights = 2 * p  # bfloat16
    if method == "qlora":  # NF4 with double quantization; the rest in float32
        weights = round(n * (4 + 8 / 64 + 32 / (64 * 256)) / 8) + 4 * (p - n)
    if method == "full":
        gradients, optimizer = 2 * p, 8 * p  # AdamW: two averages in float32
    else:
        weights, gradients, optimizer = weights + 4 * a, 4 * a, 8 * a  # adapters in float32
    block = 6 * d + 2 * keys + 4 * f + heads + 2  # what a token leaves behind in a block
    block += 0 if method == "full" else r * len(linears)  # and A x
    kept = layers * d + block if checkpointing else layers * block
    kept += 2 * d if method == "full" else 0  # the inputs of the last norm and of the head
    return weights, gradients, optimizer, tokens * (2 * kept + 4 * vocabulary)


LARGE = {
    "llama-2-7b": (32, 4096, 11008, 4096, 32, 32000),
    "llama-2-13b": (40, 5120, 13824, 5120, 40, 32000),
    "llama-2-70b": (80, 8192, 28672, 1024, 64, 32000),
}
TOKENS = 4 * 1024
found = {}
for name, numbers in LARGE.items():
    for checkpointing in (False, True):
        label = name + (", checkpointing" if checkpointing else "")
        found[label] = {}
        for method in memory.MEASURED:
            hand = by_hand(*numbers, method, TOKENS, checkpointing)
            ours = memory.memory(
                memory.SHAPES[name], method, tokens=TOKENS, checkpointing=checkpointing
            )
            assert hand == tuple(ours.values())
            found[label][method] = ours
print("by hand and minipeft: the same bytes, three shapes, three methods, both ways")
display(Markdown(memory.table(found)))

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 3.8), layout="constrained")
shown = ("llama-2-7b", "llama-2-7b, checkpointing", "llama-2-70b, checkpointing")
for axis, label in zip(axes, shown, strict=True):
    frozen = {"weights": 2 * memory.SHAPES[label.split(",")[0]].parameters}
    bars = {"frozen": frozen} | found[label]
    bottom = [0.0] * len(bars)
    for part, color, hatch in zip(memory.PARTS, PARTS, ("", "//", "..", ""), strict=True):
        heights = [parts.get(part, 0) / 1e9 for parts in bars.values()]
        axis.bar(
            list(bars), heights, 0.65, bottom, color=color, hatch=hatch, ec="white", label=part
        )
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    over = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axis.bar_label(axis.containers[-1], [f"{b:.3g}" for b in bottom], padding=3, bbox=over)
    axis.axhline(24, color="black", linewidth=0.7, linestyle="--", label="a card of 24 GB")
    axis.axhline(80, color="black", linewidth=0.7, label="a card of 80 GB")
    axis.set(title=label, ylim=(0, 1.12 * max(*bottom, 85)))
axes[0].plot(list(guess), list(guess.values()), "k*", ms=12, label="your guess")
axes[0].set_ylabel("GB")
figure.legend(
    *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False
)
plt.show()
parts = found["llama-2-7b"]
for method, each in parts.items():
    total = sum(each.values())
    print(
        f"{method:5} {total / 1e9:6.1f} GB (you guessed {guess[method]}),"
        f" {each['activations'] / total:.0%} of it activations"
    )
with_checkpointing = found["llama-2-7b, checkpointing"]["qlora"]
print(f"qlora with checkpointing: {sum(with_checkpointing.values()) / 1e9:.1f} GB")
assert parts["qlora"]["activations"] > 0.99 * parts["full"]["activations"]
assert parts["qlora"]["activations"] > sum(parts["qlora"].values()) / 2
assert sum(with_checkpointing.values()) < sum(parts["qlora"].values()) / 3
print("trained with rank 8 on all linear layers:")
for name in ("1m", "3m", "gpt2", *LARGE):
    shape = memory.SHAPES[name]
    print(f"{name:12} {shape.adapter(8) / (shape.parameters + shape.adapter(8)):.2%}")

# %% [markdown]
# **This is the surprise: the activations remain.** Look at the grey part of the left panel. LoRA took away gradients and
# optimizer state; QLoRA took away three quarters of the weights; the grey is as tall as before. With four texts it is most of
# what QLoRA needs. *Checkpointing*, in the middle, is the answer to it. We come to it below.
#
# Two more things change with size. The share that LoRA trains falls, because a matrix grows with the square of the width and
# a thin one with the width alone. And on the right even the frozen base has no room on one card.
#
# Not counted here: what a framework takes for itself, fragments, and the full-size weight of the one 4-bit layer that is being
# multiplied (lesson 07: four bits are storage, not arithmetic).
#
# ## A real model: GPT-2
#
# Can such a table be trusted? The smallest GPT-2 fits on a laptop, so there we can look. If you set `MODEL` in the first cell, the
# real weights are opened. Otherwise, and where the hub cannot be reached, the shape is the real one and the weights are random.
# Bytes do not ask what the numbers are. Sentences do, so we ask for the loss of one.


# %%
def open_gpt2():
    """GPT-2, and whether it is the real one; dropout is off."""
    if MODEL is not None:
        os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")  # seconds, then it is not there
        try:
            model = GPT.from_pretrained(MODEL)
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "attn_pdrop"):
                    module.attn_pdrop = 0.0
            return model, True
        except ValueError as error:
            print(f"no {MODEL}: {str(error).splitlines()[0]}")
    torch.manual_seed(0)
    return GPT(GPTConfig(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)), False


gpt2, real = open_gpt2()
c = gpt2.config
shape = memory.Shape(c.n_layer, c.n_embd, c.n_head, c.vocab_size, c.n_positions, ours=True)
fox = torch.tensor([[464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290]])  # GPT-2's token ids
loss = gpt2(fox, labels=fox).loss.item()
print(
    "real weights"
    if real
    else "RANDOM weights: this model has the shape of GPT-2 and knows nothing"
)
print(
    f'"The quick brown fox jumps over the lazy dog": {loss:.1f} nats a token;'
    f" choosing blindly among {c.vocab_size:,} tokens costs {math.log(c.vocab_size):.1f}"
)
assert real or abs(loss - math.log(c.vocab_size)) < 1

# %% [markdown]
# What could an adapter be put on? `python -m minipeft targets --base FOLDER` prints this list for any model. Each name is an entry for
# `target_modules`. *Rank 1 adapters* is what rank 1 costs; multiply by your rank.
#
# Note `c_attn`: GPT-2 makes queries, keys and values in one matrix, so a LoRA there has one A for all three. The LoRA paper adapts
# queries and values, each with its own. The model decides what you can choose.

# %%
kinds = list_targets(gpt2)
cells = [[f"{v:,}" if isinstance(v, int) else v for v in kind.values()] for kind in kinds]
display(Markdown(report.markdown_table(kinds[0], cells)))
CAUSAL = {"task_type": "CAUSAL_LM"}
NAMES = ["c_attn", "c_proj", "c_fc"]
for title, config in {
    "c_attn alone": LoraConfig(r=8, target_modules=["c_attn"], **CAUSAL),
    "all linear layers": LoraConfig(r=8, target_modules=NAMES, **CAUSAL),
    "twenty soft tokens": PromptTuningConfig(num_virtual_tokens=20, **CAUSAL),
}.items():
    with torch.device("meta"):  # shapes without memory: counting is free
        counted = get_peft_model(GPT(GPTConfig()), config)
    print(f"{title:18}", end=" ")
    counted.print_trainable_parameters()
    if title == "all linear layers":  # Hugging Face's peft prints the same for its GPT-2
        assert counted.get_nb_trainable_parameters() == (1_179_648, 125_619_456)

# %%
# the three promises: starts as the base, only its own tensors get gradients, the formula's count
plain = gpt2(fox).logits
model = get_peft_model(gpt2, LoraConfig(r=8, target_modules=NAMES, **CAUSAL))
assert torch.equal(model(fox).logits, plain)
model(fox, labels=fox).loss.backward()
assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())
formula = sum(8 * row["rank 1 adapters"] for row in list_targets(model.unload()))
assert formula == shape.adapter(8)
print(f"starts as the base, to the bit; gradients for the adapter alone; {formula:,} numbers")

# %% [markdown]
# Now one real training step of it, 64 tokens, beside the calculator. Our training keeps everything in float32, so here each 2 of
# the formulas is a 4.


# %%
class Gpt2:  # all that `memory.measure` wants of a base
    def model(self):
        return open_gpt2()[0]


step = {}
for method in memory.MEASURED:
    print(f"{method:5}", end=" ", flush=True)
    step[method] = memory.measure(Gpt2(), method, r=8, batch_size=1, length=64)
    computed = memory.memory(shape, method, r=8, tokens=64)
    for part, count in step[method].items():
        print(f"{part} {memory.size(count)} ({memory.size(computed[part])})", end="  ")
        assert abs(count / computed[part] - 1) < 0.01
    print()
print("measured, and in brackets what was computed: less than a hundredth apart")

# %% [markdown]
# ## "LoRA shrinks activations"
#
# The lines above say no, to three digits. Why not? To reach the lowest adapter the gradient must come down through *every*
# layer, frozen or not, and on its way it needs what each norm, each GELU and each attention was given.
#
# So what does help? Three things that touch the grey part itself:
# - **checkpointing**: keep each block's input alone, and compute the rest again when the backward pass gets there;
# - **adapters in the top layers alone**: the gradient stops at the lowest one, and nothing below has to be kept;
# - **the logits**: the loss keeps a float for each token and each word of the vocabulary. Exercise 3 takes them apart.
#
# **Guess:** what share of full fine-tuning's activations is left with checkpointing?

# %%
guess_left = 0.1  # put your own number here


def leaves(model, checkpointing=False):
    """Bytes of activations that one token leaves behind."""
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(c.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    return activation_bytes(model.train(), {"input_ids": ids, "labels": ids}) / 64


def top(n, layers):
    """The linear layers of the top n blocks, as an entry for `target_modules`."""
    return rf".*\.h\.({'|'.join(map(str, range(layers - n, layers)))})\..*\.c_\w+"


a_quarter = LoraConfig(r=8, target_modules=top(c.n_layer // 4, c.n_layer), **CAUSAL)
left = {name: step[name]["activations"] / 64 for name in memory.MEASURED}
model = get_peft_model(gpt2, a_quarter)
left["lora, top\nquarter"] = leaves(model)
model = get_peft_model(model.unload(), LoraConfig(r=8, target_modules=NAMES, **CAUSAL))
left["lora, check-\npointing"] = leaves(model, checkpointing=True)
logits = 4 * c.vocab_size
for name, size in left.items():
    print(
        f"{name.replace(chr(10), ' '):20} {size / 1e3:4.0f} kB a token, {size / left['full']:4.0%},"
        f" of it {logits / 1e3:.0f} kB for the logits"
    )
share = left["lora, check-\npointing"] / left["full"]
print(f"with checkpointing {share:.0%} are left; you guessed {guess_left:.0%}")
assert left["lora"] > 0.97 * left["full"]
assert left["lora, top\nquarter"] < 0.6 * left["full"]
assert share < 0.45
assert logits > left["lora, check-\npointing"] / 2 or real

records = compare.load(DATA / "results" / "1m" / "compare.json")
rows = compare.rows(records)
figure, (one, two) = plt.subplots(1, 2, figsize=(9.2, 3.5), layout="constrained")
colors = [BLUE, ORANGE, PINK, ORANGE, ORANGE]
one.bar(
    list(left), [(size - logits) / 1e3 for size in left.values()], 0.65, logits / 1e3, color=colors
)
one.bar(
    list(left), logits / 1e3, 0.65, color="white", edgecolor="black", hatch="//", label="logits"
)
one.axhline(guess_left * left["full"] / 1e3, color="black", linestyle=":", label="your guess")
one.set(ylabel="kB that a token leaves behind", title="GPT-2, one step, measured")
one.legend(frameon=False)
markers = list("oX*^vDs<>P")
for name, row in rows.items():
    if name not in ("frozen", compare.RANDOM):
        at = row[0].trainable, row[0].activation_bytes / 1e6
        two.plot(*at, markers.pop(), ms=9, color=report.color_of(name), label=name, alpha=0.8)
two.legend(frameon=False, loc="lower right", ncols=2)
two.set(xscale="log", xlabel="trained numbers", ylim=(0, 52), xlim=(1e3, 3e6))
two.set(ylabel="MB of activations, 16 texts", title="our 1M base, all methods")
plt.show()
spread = [row[0].activation_bytes for name, row in rows.items() if name != "frozen"]
print(
    f"all methods, from the fewest to the most: {min(spread) / max(spread):.2f} (expect 0.6 to 0.8)"
)
assert min(spread) / max(spread) > 0.6

# %% [markdown]
# The right panel has the methods of this course, from a few thousand trained numbers to a million. The line they make is
# far from steep: **few trained numbers do not mean few activations.** (BitFit, bottleneck adapters and prefix tuning are lower: a frozen
# linear layer need not keep its input, which LoRA's A asks for. Prompt tuning saves the same, and pays with twenty more tokens in each text.) On the left, checkpointing takes away most of the blocks' part, and then the logits
# are the largest thing left. The guess was not silly: with a small vocabulary and many layers, less is left.
#
# ## The real file
#
# This is what minipeft computes activations with, then how `gpt.py` uses checkpointing: a block is called through
# PyTorch's `checkpoint`. In exercise 2 you write that function yourself.

# %%
print(inspect.getsource(memory.activations))
print(inspect.getsource(GPT.forward).split("presents = []")[1].split("logits =")[0])

# %% [markdown]
# ## Against full fine-tuning and the frozen base
#
# Does it cost anything in what is learned? LoRA on the 1M base twice: with checkpointing on all layers, and on the top half alone,
# at twice the rank, so that it trains as many numbers. Same data, order, steps and learning rate (nobody swept one for the top half).
# Full fine-tuning, the frozen base and plain LoRA are the shipped runs of
# `python -m minipeft compare --base data/base/1m --task describe --seeds 4 --output data/results/1m`.
#
# **Guess** before you run it: which slot accuracy does the top half reach?

# %%
guess_top = 0.5  # slot accuracy, from 0 to 1: put your own number here
run = RunConfig(steps=100, seed=0)
kept_less = finetune(base, task, RECIPES["lora"], replace(run, gradient_checkpointing=True))
plain = rows["lora"]
print(f"{task.metric} with checkpointing {kept_less.score:.2f}; without, four seeds", end=" ")
print([f"{record.score:.2f}" for record in plain], "(the first is this one's seed)")
off = max(abs(a - b) for a, b in zip(kept_less.losses, plain[0].losses, strict=True))
print(f"largest difference from the first one's training losses, of a hundred: {off:.0e}")
assert compare.in_spread(kept_less, plain)

# %%
halved = finetune(base, task, RECIPES["lora"].placed(top(2, 4)), run)
print(f"{task.metric} with the top half {halved.score:.2f}   (expect above 0.8)")
activations = {
    "full": rows["full"][0].activation_bytes,
    "lora": plain[0].activation_bytes,
    "lora, top half": halved.activation_bytes,
    "lora, checkpointing": kept_less.activation_bytes,
}
print({name: memory.size(count) for name, count in activations.items()})
assert halved.trainable == plain[0].trainable
assert halved.score > 0.75
assert halved.activation_bytes < 0.7 * plain[0].activation_bytes
assert kept_less.activation_bytes < 0.4 * plain[0].activation_bytes

# %% tags=["timing"]
kept_less.targets, halved.targets = "checkpointing", "top half"  # the names of their rows
shown = [*rows["frozen"], *rows["full"], *plain, kept_less, halved]
display(Markdown(compare.table(shown, task)))
price = kept_less.gradient_checkpointing["seconds_lost"]
print(f"checkpointing costs {1000 * price:.0f} ms a step here (expect a tenth to a half of one)")

# %%
figure, (one, two) = plt.subplots(1, 2, figsize=(9.2, 3.5), layout="constrained")
styles = {"full": "o-", "lora": "s-", "lora, checkpointing": "x:", "lora, top half": "^--"}
for name, row in compare.rows(shown).items():
    color, scores = report.color_of(name), [record.score for record in row]
    if name in styles:
        points = row[0].validation
        losses = [p["slot_loss"] for p in points]
        one.plot([p["step"] for p in points], losses, styles[name], color=color, label=name)
    at = (row[0].activation_bytes or 0) / 1e6
    two.errorbar(
        at, mean(scores), stdev(scores) if len(scores) > 1 else 0, fmt=styles.get(name, "o")[0],
        color=color, ms=9, capsize=4,
    )  # fmt: skip
    offset = {"full": (0, 14), "lora": (0, -24), "lora, top half": (0, -20)}.get(name, (0, 12))
    two.annotate(name, (at, mean(scores)), offset, textcoords="offset points", ha="center")
two.plot(halved.activation_bytes / 1e6, guess_top, "k*", ms=12)
two.annotate("your guess, top half", (halved.activation_bytes / 1e6, guess_top - 0.1), ha="center")
one.set(xlabel="step", ylabel="validation loss of slot tokens (nats)", yscale="log")
two.set(xlabel="MB of activations, 16 texts", ylabel=task.metric, ylim=(-0.08, 1.15), xlim=(-4, 52))
one.legend(frameon=False)
plt.show()

# %% [markdown]
# Checkpointing changes no number that matters: the same operations are done again. It costs time, about one more forward pass. (The
# seconds of the shipped rows were taken on another day; compare those of the two live rows.) The top half is a different model to
# train, and at this size a good one: it keeps less *and* is faster, and what it loses is about the spread between seeds.
# Our base can copy before we begin, so the layers that read names need no change. With a new skill lower down it may not do.
#
# ## What breaks it: sixteen bits everywhere
#
# The calculator gives each weight of a large model sixteen bits. For a frozen weight that is fine. Can a weight also be *trained* so?
# A bfloat16 has eight significant bits: after 1 comes 1 + 1/128. AdamW moves a weight by about the learning rate, so a step
# that is small beside the weight is rounded away, and the weight stays. Large models are fine-tuned at rates near 2e-5 (so was Llama 2
# into a chat model, arXiv 2307.09288).
#
# **Guess:** at that rate, what share of the base's weights moves at all in a step?

# %%
guess_moves = 0.9  # put your own number here
targets = find_targets(base.model(), "all-linear").values()
w = torch.cat([layer.weight.detach().flatten() for layer in targets]).bfloat16()
rates = torch.logspace(-6, -2, 41).tolist()
moves = [((w.float() + rate).bfloat16() != w).float().mean().item() for rate in rates]
usual = ((w.float() + 2e-5).bfloat16() != w).float().mean()
print(f"at 2e-5 {usual:.1%} of the weights move; you guessed {guess_moves:.0%}")
assert usual < 0.2


def train_rounded(method, rate, sixteen_bits):
    """Train, and after each step round what was trained to bfloat16, or not."""
    settings = RunConfig(steps=100, learning_rate=rate, warmup=10, seed=0)
    model, points = build_model(base, RECIPES[method], settings), []
    free = [p for p in model.parameters() if p.requires_grad]
    for p in model.parameters():
        p.data = p.data.bfloat16().float()

    def each(row):
        for p in free if sixteen_bits else ():
            p.data = p.data.bfloat16().float()
        if row["step"] % 20 == 0:
            losses = task_loss(model, task.validation, base.end)
            points.append(losses["loss"])

    each({"step": 0})
    order = tasks.shuffled(task.train, 16, 0)
    batches = ([tasks.collate(part, base.end, model.device)] for part in order)
    train(model, batches, settings, after_step=each, title=method)
    print(
        f"{method:5} at {rate:g}, trained in {16 if sixteen_bits else 32} bits: loss {points[-1]:.2f}"
    )
    return points


runs = {bits: train_rounded("full", 1e-4, bits == 16) for bits in (32, 16)}
thin = train_rounded("lora", plain[0].learning_rate, True)
assert runs[16][-1] > 2 * runs[32][-1]
assert thin[-1] < 0.25

figure, (one, two) = plt.subplots(1, 2, figsize=(9.2, 3.5), layout="constrained")
one.plot(rates, moves, color=BLUE, label="weights of the base, in bfloat16")
one.plot(2e-5, guess_moves, "k*", ms=12, label="your guess")
one.axvline(2e-5, color="black", linewidth=0.7, linestyle="--")
one.set(
    xscale="log", xlabel="size of the step (learning rate)", ylabel="share of weights that move"
)
one.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
for points, color, style, label in (
    (runs[32], BLUE, "o-", "full at 1e-4, weights in float32"),
    (runs[16], BLUE, "s--", "full at 1e-4, weights in bfloat16"),
    (thin, ORANGE, "^-", "LoRA at its own rate, all in bfloat16"),
):
    two.plot(range(0, 101, 20), points, style, color=color, label=label)
two.set(xlabel="step", ylabel="validation loss (nats a token)", ylim=(0, None))
two.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

# %% [markdown]
# Full fine-tuning in pure bfloat16 at a small rate hardly moves. That is why the usual recipe keeps a second copy of the weights
# in float32, four more bytes a weight, which the calculator's line for full fine-tuning does *not* count: it is the
# QLoRA paper's sum. LoRA came out well even in sixteen bits: its rate is larger, its numbers start at zero or small, and a small number
# has small steps. minipeft keeps adapters in float32 all the same. They are few.
#
# ## What a GPU changes
#
# In minipeft it is one place: `pick_device` takes the GPU where there is one, and `autocast` computes there in bfloat16, while the
# weights stay in float32. No other line of yours changes. Expect the same losses within rounding, and not the same bits.
# A small model gains little, because each step is many small calls; a large one gains more than you will wait for on a CPU.

# %%
print(inspect.getsource(pick_device))
print(inspect.getsource(autocast))
if torch.cuda.is_available():
    peak = kept_less.max_memory_allocated
    print(
        f"on {torch.cuda.get_device_name()}: {memory.size(peak)} at the peak of the first run above"
    )
else:
    print(
        "There is no CUDA GPU here: all of the above ran on the CPU, and nothing of this was measured."
    )

# %% [markdown]
# ## Several processes
#
# `torchrun` starts the same command several times. Each process has the whole model and its share of every batch, and after the
# backward pass they average the gradients. Only what is trained has a gradient, so only that is sent.
# Here are two processes on this computer, four steps each on our smallest base.


# %%
def two_processes(method):
    """Train with two processes; the record that the first one wrote, or None."""
    print(f"torchrun --nproc_per_node=2 -m minipeft finetune --method {method} …", flush=True)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = f"-m minipeft finetune --method {method} --steps 4 --n-generate 2 --device cpu"
    folder = OUT / f"two-{method}"
    words += (
        f" --base {shlex.quote(str(DATA / 'base' / '0.3m'))} --output {shlex.quote(str(folder))}"
    )
    quiet = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    if sys.platform != "linux":
        del quiet["GLOO_SOCKET_IFNAME"]  # the name of the loopback there differs
    try:
        subprocess.run(
            [*start, *shlex.split(words)], env=os.environ | quiet, check=True,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"could not be done here, so nothing is measured: {str(error.stderr)[-300:]}")
        return None
    return json.loads((folder / "record.json").read_text())


small = load_base(DATA / "base" / "0.3m")
together = {method: two_processes(method) for method in ("full", "lora")}
for method, record in together.items():
    if record is None:
        continue
    settings = RunConfig(steps=4, n_generate=2, device="cpu")  # the default seed, as there
    alone = finetune(small, task, RECIPES[method], settings)
    off = max(abs(a - b) for a, b in zip(record["losses"], alone.losses, strict=True))
    sent = record["bytes_sent_per_step"]
    print(f"{method:5} {sent:9,} bytes of gradients a step; losses as of one process within 1e-5")
    assert off < 1e-5
    assert sent == 4 * record["trainable"]
for name in ("gpt2", *LARGE):
    full, lora = (memory.memory(memory.SHAPES[name], m)["gradients"] for m in ("full", "lora"))
    print(
        f"{name:12} full {memory.size(full):>8}, LoRA {memory.size(lora):>8}, {full / lora:.0f} times less"
    )
    assert full > 40 * lora
print()
print(inspect.getsource(parallel.Replicas._average))

# %% [markdown]
# Between two computers on a slow line that is the difference between waiting and working. But this way each process holds the
# whole model. For a model that has no room on one card, `--shard` cuts every tensor into a part for each process
# and puts a block together just while it is computed. Weights, gradients and moments are then divided by the number of processes,
# the activations are not. Exercise 1 computes with it.
#
# ## The whole way, with your own data
#
# A task is a file of JSON lines with a `prompt` and a `completion`. We make a small one: an answer to a letter. Then the four commands
# that you would type, with a few steps.


# %%
def letters(examples, n, answer=" Hello, {cook}. How is {place}?"):
    """The first n examples that have a cook, as lines of our own task."""
    lines = []
    for example in examples:
        place = example.prompt.removeprefix("The name is ").split(".")[0]
        cook = dict(task.facts(example.prompt)).get("cook")
        if cook:
            prompt = f"The cook at {place} is {cook}. Answer:"
            lines.append({"prompt": prompt, "completion": answer.format(cook=cook, place=place)})
    return lines[:n]


def command(words):
    """What a shell does with `python -m minipeft …`, in this Python."""
    print("$ python -m minipeft", words)
    args = cli.parser().parse_args(shlex.split(words))
    getattr(cli, args.command)(args)


def train_on(folder, **how):
    """Write the three files of a task, and train on them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (
        ("train", letters(task.train, 96, **how)),
        ("validation", letters(task.validation, 16, **how)),
        ("test", letters(task.test, 16, **how)),
    ):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    print(text.splitlines()[0])
    command(
        f"finetune --base {BASE} --train {folder}/train.jsonl --validation {folder}/validation.jsonl"
        f" --test {folder}/test.jsonl --steps 30 --output {folder}/adapter"
    )


BASE = shlex.quote(os.path.relpath(base.folder))
train_on(OUT / "mine")
prompt = letters(task.test, 1)[0]["prompt"]
for folder in ("", f" --adapter {OUT}/mine/adapter"):
    command(f'generate --base {BASE}{folder} --max-new-tokens 20 --prompt "{prompt}"')
command(f"merge --base {BASE} --adapter {OUT}/mine/adapter --output {OUT}/merged")
command(f'generate --base {OUT}/merged --max-new-tokens 20 --prompt "{prompt}"')
print({file.name: memory.size(file.stat().st_size) for file in sorted((OUT / "merged").iterdir())})

# %% [markdown]
# The merged folder is a plain GPT-2 folder. Other programs read it without knowing of minipeft:
#
# ```python
# from transformers import AutoModelForCausalLM
# model = AutoModelForCausalLM.from_pretrained("out/10/merged")
# ```
#
# And any GPT-2 folder can be the base. With a network, the real one, then adapters on a base of four bits:
#
# ```bash
# hf download openai-community/gpt2 config.json tokenizer.json model.safetensors --local-dir my_gpt2
# python -m minipeft finetune --base my_gpt2 --train my_train.jsonl --validation my_validation.jsonl \
#     --method qlora --learning-rate 2e-4 --gradient-checkpointing --output out/mine
# python -m minipeft generate --base my_gpt2 --4bit --adapter out/mine --prompt "…"
# ```
#
# Give a learning rate: ours were swept on small models, and are too large there. 2e-4 is what the LoRA paper used for GPT-2; sweep around it.
#
# One more thing can go wrong with your own data, and it did when we wrote this lesson. Our first answer began with "Come to".
# **Guess** before you run it: how many of sixteen letters come out right?

# %%
train_on(OUT / "come", answer=" Come to {place}, {cook}.")
prompt = letters(task.test, 1)[0]["prompt"]
command(
    f'generate --base {BASE} --adapter {OUT}/come/adapter --max-new-tokens 12 --prompt "{prompt}"'
)
seen = set(base.held_out.flatten().tolist())
for answer in (" Hello,", " Come to"):
    encoded = base.tokenizer.encode(answer)
    rare = [t for t, i in zip(encoded.tokens, encoded.ids, strict=True) if i not in seen]
    print(f"{encoded.tokens}, never in the held-out text: {rare or 'none'}")
scores = [
    json.loads((OUT / name / "adapter" / "record.json").read_text())["score"]
    for name in ("mine", "come")
]
assert scores[0] > 0.8 > 0.2 > scores[1]

# %% [markdown]
# A word that pretraining hardly had falls into pieces, and one of them is a token whose embedding was hardly trained. An adapter leaves the
# embeddings as they are, so it can train as long as it likes. On a vocabulary of the web this is rare; names of products, chemistry or another
# language can do it. Look at your tokens before you train. (The cure is to train the rows of these tokens as well: `minipeft/token_rows.py`.)
#
# ## Exercises
#
# Each has a cell that checks your answer. The solutions are in `solutions/10_real_models.ipynb`.
#
# **1 · Warm-up.** Full fine-tuning of the 13B shape, `--shard` over 2, 4, 8 or 16 cards of 80 GB, checkpointing on, and each process
# has its own four texts of 1,024 tokens. Use `found["llama-2-13b, checkpointing"]["full"]`. What is the smallest number that fits?

# %% tags=["exercise"]
cards = None  # 2, 4, 8 or 16

# %% tags=["wrong"]
cards = 2

# %% tags=["wrong"]
cards = 8

# %% tags=["solution"]
cards = 4  # two have room for weights, gradients and moments, but not for the activations as well

# %% tags=["check"]
if cards is None:
    print("not done yet")
else:
    parts = found["llama-2-13b, checkpointing"]["full"]
    each = (sum(parts.values()) - parts["activations"]) / cards + parts["activations"]
    assert cards != 2, "weights, gradients and moments have room on two, and the activations?"
    assert each < 80e9, f"{each / 1e9:.1f} GB have no room on a card of 80"
    assert cards == 4, "it fits, but fewer do as well: all but the activations is divided"
    print(f"right: {each / 1e9:.1f} GB on each of {cards} cards")

# %% [markdown]
# **2 · Checkpointing by hand.** The forward pass below runs a block without keeping anything but its input (inside such a function PyTorch
# records nothing). Write the backward pass: compute the block again, with recording, and send `grad` through it. The block's own parameters must get
# their gradients as well.


# %% tags=["exercise"]
class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):  # (x,) = ctx.saved_tensors; ctx.block; torch.enable_grad()
        return None, None  # in place of the first None: the gradient of x


# %% tags=["wrong"]
class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        return torch.autograd.grad(y, x, grad)[0], None


# %% tags=["wrong"]
class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        ctx.block(x).backward(grad)
        return x.grad, None


# %% tags=["solution"]
class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        y.backward(grad)
        return x.grad, None


# %% tags=["check"]
block = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
given = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def through(call):
    """Gradients of the input and of the parameters, and the bytes kept."""
    block.zero_grad()
    x, sizes = given.clone().requires_grad_(), []
    own = {p.data_ptr() for p in block.parameters()}

    def note(t):
        if t.data_ptr() not in own:
            sizes.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = call(x)
    try:
        y.square().sum().backward()
    except RuntimeError as error:
        raise AssertionError(
            "nothing was recorded: compute again under torch.enable_grad()"
        ) from error
    return x.grad, [p.grad for p in block.parameters()], sum(sizes)


goal, grads, bytes_kept = through(block)
x_grad, own_grads, fewer = through(lambda x: Again.apply(x, block))
if x_grad is None:
    print("not done yet")
else:
    assert torch.allclose(x_grad, goal, atol=1e-6), (
        "the gradient of x is another: is `grad` sent in?"
    )
    assert all(g is not None for g in own_grads), (
        "the block's parameters got nothing: call backward on the output, do not ask for x alone"
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(own_grads, grads, strict=True))
    assert fewer == given.nbytes, "more than the input was kept"
    print(f"right: the same gradients, {fewer} bytes kept and not {bytes_kept}")

# %% [markdown]
# **3 · Hard: the logits.** After checkpointing they were the largest part of GPT-2's activations. But the loss is a sum over tokens, so it can be computed in pieces, each
# piece's logits made again in the backward pass. Write `loss_in_pieces(hidden, head, labels, n)`: the mean loss over all labels that are not −100, from
# `hidden` (t, d), `head` (v, d) and `labels` (t,), in n pieces of tokens. Call a function of your own through
# `checkpoint(function, …, use_reentrant=False)`. The pieces need not have equally many labels.


# %% tags=["exercise"]
def loss_in_pieces(hidden, head, labels, n): ...  # hidden.chunk(n), labels.chunk(n)


# %% tags=["wrong"]
def loss_in_pieces(hidden, head, labels, n):
    def mean_of(h, y):
        return F.cross_entropy(h @ head.T, y)

    pieces = zip(hidden.chunk(n), labels.chunk(n), strict=True)
    return sum(checkpoint(mean_of, h, y, use_reentrant=False) for h, y in pieces) / n


# %% tags=["wrong"]
def loss_in_pieces(hidden, head, labels, n):
    pieces = zip(hidden.chunk(n), labels.chunk(n), strict=True)
    total = sum(F.cross_entropy(h @ head.T, y, reduction="sum") for h, y in pieces)
    return total / (labels != -100).sum()


# %% tags=["solution"]
def loss_in_pieces(hidden, head, labels, n):
    def sum_of(h, y):
        return F.cross_entropy(h @ head.T, y, reduction="sum")

    pieces = zip(hidden.chunk(n), labels.chunk(n), strict=True)
    total = sum(checkpoint(sum_of, h, y, use_reentrant=False) for h, y in pieces)
    return total / (labels != -100).sum()


# %% tags=["check"]
draw = torch.Generator().manual_seed(0)
hidden, head = torch.randn(64, 16, generator=draw), torch.randn(1000, 16, generator=draw)
labels = torch.randint(1000, (64,), generator=draw)
labels[:10] = -100  # a prompt: no loss there


def of(loss):
    """The loss, the gradient of hidden, and the bytes kept beside what was given."""
    h, sizes = hidden.clone().requires_grad_(), {}
    given = {t.untyped_storage().data_ptr() for t in (h, head, labels)}

    def note(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in given:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        value = loss(h)
    if value is not None:
        value.backward()
    return value, h.grad, sum(sizes.values())


goal, goal_grad, at_once = of(lambda h: F.cross_entropy(h @ head.T, labels))
answer, grad, fewer = of(lambda h: loss_in_pieces(h, head, labels, 4))
if answer is None:
    print("not done yet")
else:
    assert torch.allclose(answer, goal, rtol=1e-5), (
        "another loss: sum over each piece, and divide once by the number of labels in all"
    )
    assert torch.allclose(grad, goal_grad, atol=1e-6), "the loss is right, its gradient is not"
    assert fewer < at_once / 10, (
        f"{fewer:,} bytes kept: the logits of all pieces wait for the backward pass"
    )
    print(f"right: {fewer:,} bytes kept and not {at_once:,}")

# %% [markdown]
# ## Summary, at this size
#
# - At this size, measured to a hundredth: four parts make the bytes of fine-tuning, so the sum for larger shapes can be believed.
# - LoRA takes away gradients and moments, QLoRA weights too; activations remain, at this size under every method, and computed at 7B they are most of QLoRA.
# - Checkpointing answers that, at this size for less than half as much time again and no change in what is learned; adapters in the top half do too, with a small loss.
# - Weights that are trained in bfloat16 at small rates do not move, at this size as at any; adapters in float32 do.
# - Two processes send each other the gradients of what is trained: at this size a tenth for LoRA, and computed at 7B far less.
#
# **To read:** Chen et al. 2016, sections 3 and 4; Rajbhandari et al. 2020, *ZeRO*, arXiv 1910.02054, on cutting a model over processes;
# Micikevicius et al. 2018, *Mixed Precision Training*, arXiv 1710.03740; Dettmers et al. 2023, the end of section 2, on the memory of
# activations beside that of adapters.
