# %% [markdown]
# # 01 · Full fine-tuning: what does changing everything cost?
#
# After this lesson you can
# - say where the bytes of training go, and compute them before you train;
# - read a loss: what is template, what is knowledge, and what a model that ignores the question would score;
# - compare two methods fairly: their learning rates, their seeds, a random base as a control;
# - see a model forget, and see it overfit, and say which number tells you.
#
# **Papers.** Kingma and Ba 2015, *Adam*, ICLR; Loshchilov and Hutter 2017, *Decoupled Weight Decay
# Regularization* (AdamW), arXiv 1711.05101.
#
# **Time.** Twenty minutes to read, two to run, forty for the exercises.

# %%
import inspect
import itertools
import math
import re
import statistics
import time
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

from minipeft.lab import DATA, compare, memory, report, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import complete, task_loss, text_loss
from minipeft.lab.finetune import build_model
from minipeft.lab.recipes import RECIPES, RunConfig, load_sweeps
from minipeft.lab.train import train

BLUE, ORANGE = report.COLORS["full"], report.COLORS["lora"]
GREY = report.COLORS[compare.RANDOM]
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
base = load_base(DATA / "base" / "1m")
task = tasks.load_task(base, "describe")
print(task.train[0].prompt, "\n ->", task.train[0].completion)

# %% [markdown]
# Full fine-tuning is the plain way: go on training, on your own examples, with every weight free. All other lessons
# are about changing less, so first we must know what it costs to change everything.
#
# ## Two questions first
#
# **Your first guess.** The weights of our small GPT take some four megabytes. How many times as much does the memory
# hold *while it is trained* on batches of sixteen texts, the weights themselves included?
#
# **Your second guess.** In the example above, most of the answer is *template*: "This is the story of" stands in half of
# all answers. The rest are *values*: the names. Which does the model learn first, and after how many steps of sixteen
# examples does it have each?

# %%
guess_times = 2  # times the weights: put your own numbers here before you go on
guess_template, guess_values = 25, 75  # steps

# %% [markdown]
# ## Where the bytes go
#
# Training holds four things: the weights; a gradient for each weight; what the optimizer remembers, which for
# AdamW is two moving averages for each weight; and the *activations*, all that the forward pass keeps because the
# backward pass will need it:
#
# $$ \text{bytes} = \underbrace{4\,p}_{\text{weights}} + \underbrace{4\,p}_{\text{gradients}}
#  + \underbrace{8\,p}_{\text{optimizer}} + \underbrace{\text{tokens} \times \text{what a token leaves behind}}_{\text{activations}} $$
#
# with p parameters in float32. Measured in one real step, beside what `minipeft/lab/memory.py` computes from
# the shape alone:

# %%
measured = memory.measure(base, "full", r=8, batch_size=16, length=64)
computed = memory.memory(memory.SHAPES["1m"], "full", tokens=16 * 64)
for part, count in measured.items():
    print(f"{part:12} {count / 1e6:6.2f} MB measured, {computed[part] / 1e6:6.2f} MB computed")
    assert abs(count - computed[part]) < 0.02 * computed[part]
times = sum(measured.values()) / measured["weights"]
print(f"together {times:.1f} times the weights; you guessed {guess_times}")

# %%
found = {"our 1M\nfloat32": measured}
for name in ("gpt2", "llama-2-7b"):
    parts = memory.memory(memory.SHAPES[name], "full", tokens=16 * 64, checkpointing=False)
    found[f"{name}\nbfloat16"] = parts
figure, axis = plt.subplots(figsize=(7, 3.6))
bottom = [0.0] * len(found)
styles = zip(
    memory.PARTS, (BLUE, "#d1741f", "#6a3d9a", "#b9b9b9"), ("", "//", "..", ""), strict=True
)
for part, color, hatch in styles:
    heights = [parts[part] / parts["weights"] for parts in found.values()]
    axis.bar(
        list(found), heights, 0.5, bottom, color=color, hatch=hatch, edgecolor="white", label=part
    )
    bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
axis.axhline(guess_times, color="black", linewidth=1, linestyle=":", label="your guess")
axis.bar_label(axis.containers[-1], [f"{height:.1f}" for height in bottom], padding=2)
axis.set(ylabel="times the bytes of the weights", ylim=(0, 1.15 * max(bottom)))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# Two surprises. On a small model the weights hardly count: the activations are most of it, and no method that trains
# *fewer weights* makes them much smaller. On a large model the optimizer is the largest part: it keeps its averages in
# float32 while the weights are in bfloat16. That part is what adapters take away.
#
# Notes on this subject like to say that training needs a GPU. At this size it does not, as you will see.
#
# ## By hand: what AdamW remembers
#
# Two averages for each weight: of the gradient, and of its square. A weight moves by their quotient, so by about one
# learning rate a step, however small its gradient. Ten lines, then the optimizer that minipeft's training loop uses.

# %%
torch.manual_seed(0)
w, goal, rate = torch.randn(5, 3), torch.randn(5, 3), 0.01
theirs = torch.nn.Parameter(w.clone())
optimizer = torch.optim.AdamW([theirs], lr=rate, betas=(0.9, 0.999), weight_decay=0.0)
m, v = torch.zeros_like(w), torch.zeros_like(w)  # what has to be remembered
for step in range(1, 11):
    gradient = 2 * (w - goal)  # of the loss sum (w - goal)²
    m = 0.9 * m + 0.1 * gradient
    v = 0.999 * v + 0.001 * gradient**2
    w = w - rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    optimizer.zero_grad()
    (theirs - goal).square().sum().backward()
    optimizer.step()
assert torch.allclose(w, theirs.detach(), atol=1e-6)
print("ten steps by hand and by torch.optim.AdamW: the same weights")

# %% [markdown]
# ## The real file
#
# This is the loop that trains everything in minipeft, full or adapter. Beyond the ten lines above: the rate warms up and
# then falls along a cosine, large gradients are clipped, and a batch may come in parts.

# %%
print(inspect.getsource(train))
print(inspect.getsource(RunConfig.learning_rate_at))

# %% [markdown]
# ## On the GPT
#
# It starts as the base, every tensor gets a gradient, and the count is the formula of `minipeft/gpt.py`.

# %%
model, c = build_model(base, RECIPES["full"], RunConfig(seed=0)), base.model().config
ids = torch.tensor([base.tokenizer.encode(task.test[0].prompt).ids])
assert torch.equal(model(ids).logits, base.model()(ids).logits)
model(ids, labels=ids).loss.backward()
assert all(p.requires_grad and p.grad is not None for p in model.parameters())
d, layers = c.n_embd, c.n_layer
formula = (c.vocab_size + c.n_positions) * d + layers * (12 * d * d + 13 * d) + 2 * d
assert formula == sum(p.numel() for p in model.parameters())
print(f"{formula:,} parameters, and all of them are free")

# %% [markdown]
# Now train it: a hundred steps of sixteen examples, at the learning rate that was best in a sweep. On the way
# we measure, on examples about names that stand in no training prompt: the loss on template tokens, the loss on value
# tokens (`slot`), and the score: the share of facts that the written text states rightly.


# %%
def watch(examples, seed=0, steps=100, rate=1e-3, title="all examples"):
    """Fine-tune everything; what was measured every five steps, and the model."""
    run = RunConfig(seed=seed, steps=steps, learning_rate=rate, warmup=10)
    model, points = build_model(base, RECIPES["full"], run), []

    def look(row):
        step = row["step"]
        if step % 5 == 0:
            points.append({"step": step} | task_loss(model, task.validation, base.end))
        if step % 10 == 0:
            some = task.validation[:32]
            points[-1]["score"] = task.score(some, complete(model, base, some))

    look({"step": 0})
    order = tasks.shuffled(examples, 16, seed)
    batches = ([tasks.collate(batch, base.end, model.device)] for batch in order)
    train(model, batches, run, after_step=look, title=title)
    return points, model


full, model = watch(task.train)
print({key: round(value, 3) for key, value in full[-1].items()})

# %% [markdown]
# ## What would a model score that ignores every value?
#
# Ask this before you believe any loss. We build such a model: the same training, but each prompt gets the values of
# another example. The names in the answer are then not to be found in the prompt, so reading it is of no use.


# %%
def blinded(examples):
    """The same answers, each under a prompt with other examples' values."""
    known = [dict(task.facts(example.prompt)) for example in examples]
    result = []
    for i, example in enumerate(examples):
        others = known[i + 1 :] + known[:i]

        def swap(match, others=others):
            key, value = match.groups()
            return f"{key} is {next(o[key] for o in others if o.get(key, value) != value)}."

        prompt = re.sub(task.fact, swap, example.prompt)
        ids = base.tokenizer.encode(prompt).ids
        result.append(replace(example, prompt=prompt, prompt_ids=ids))
    return result


blind_examples = blinded(task.train)
print(blind_examples[0].prompt, "\n ->", blind_examples[0].completion)
blind, _ = watch(blind_examples, title="blind")

# %%
start, end, ignoring = (points["loss"] for points in (full[0], full[-1], blind[-1]))
share = (start - ignoring) / (start - end)
print(
    f"loss: {start:.2f} before, {end:.2f} after training, {ignoring:.2f} for the model that ignores values"
)
print(f"so ignoring every value makes {share:.0%} of the improvement (expect 80 to 95 %),")
print(f"and states {blind[-1]['score']:.0%} of the facts; the real one {full[-1]['score']:.0%}")
assert 0.8 < share < 0.95
assert blind[-1]["score"] < 0.1
assert full[-1]["score"] > 0.85

# %% [markdown]
# That is the trap: by the loss alone, a model that has learned nothing but the template looks nearly done. So we report
# template and slot tokens apart, and count facts in written text.
#
# How low can each go? A value stands in the prompt, so a perfect reader has slot loss zero. The template has a floor: each
# fact has two phrasings, chosen by a coin, and nobody can know which will come. That costs ln 2 for each fact.

# %%
facts = sum(len(task.facts(example.prompt)) for example in task.validation)
template_tokens = sum(not slot for example in task.validation for slot in example.is_slot)
floor = facts * math.log(2) / template_tokens
print(f"the floor of the template loss: {floor:.3f}; reached: {full[-1]['template_loss']:.3f}")
assert floor < full[-1]["template_loss"] < 2 * floor

# %%
records = compare.load(DATA / "results" / "1m" / "compare.json")
rows = compare.rows(records)
random_base = [  # the control: the same training on a model that was never pretrained, mean of the seeds
    {key: statistics.mean(p[key] for p in points) for key in points[0]}
    for points in zip(*(record.validation for record in rows[compare.RANDOM]), strict=True)
]
figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
for axis, key, guess in zip(
    axes, ("template_loss", "slot_loss"), (guess_template, guess_values), strict=True
):
    for points, color, style, label in [
        (full, BLUE, "o-", "full fine-tuning"),
        (blind, "black", "x:", "full, ignoring every value"),
        (random_base, GREY, "s--", "full, random base"),
    ]:
        steps = [p["step"] for p in points]
        axis.plot(steps, [p[key] for p in points], style, color=color, markersize=4, label=label)
    axis.axvline(guess, color="black", linewidth=1, linestyle="-.", label="your guess")
    axis.set(xlabel="step", title=f"{key.split('_')[0]} tokens", yscale="log")
axes[0].axhline(floor, color="black", linewidth=0.7)
axes[0].text(40, 0.75 * floor, "nobody can be below this")
axes[0].set_ylabel("validation loss (nats per token, log scale)")
axes[0].legend(frameon=False, loc="upper right")
plt.show()


# %%
def reached(points, key, bottom):
    """The first measured step with 95 % of the way from the start to the bottom behind it."""
    goal = bottom + 0.05 * (points[0][key] - bottom)
    return next((p["step"] for p in points if p[key] <= goal), None)


for title, points in (("full", full), ("blind", blind), ("random base", random_base)):
    steps = reached(points, "template_loss", floor), reached(points, "slot_loss", 0)
    print(f"{title:12} template after {steps[0]} steps, values after {steps[1]}")
long = sum(sum(e.is_slot) for e in task.validation) / facts  # tokens in a value
p = next(p for p in full if p["step"] == 20)
alone, whole = math.exp(-p["slot_loss"]), math.exp(-long * p["slot_loss"])
late = next(p["step"] for p in full if p.get("score", 0) >= 0.9)
print(
    f"you guessed {guess_template} and {guess_values}; nine tenths of the facts stated after {late}"
)
print(
    f"step 20: slot loss {p['slot_loss']:.2f}, so a chance of about {alone:.2f} a token, but a value"
)
print(
    f"has {long:.1f} tokens, and {alone:.2f} to that power is {whole:.2f}; the score was {p['score']:.2f}"
)
assert reached(full, "slot_loss", 0) <= reached(full, "template_loss", floor) + 5
assert all(reached(p, "template_loss", floor) <= 40 for p in (full, blind, random_base))
assert all(reached(p, "slot_loss", 0) is None for p in (blind, random_base))
assert late > reached(full, "slot_loss", 0)

# %% [markdown]
# We expected to tell you: first the template, and the values much later. An earlier base of ours, which could hardly copy, behaved so.
# By the loss, this one does not. It could look names up before we began (lesson 00), so there was nothing to learn about values but
# *where* to put them, and they come together with the template. What comes late, or never, is what pretraining did not bring: the random
# base has the template almost as soon, and no values at all.
#
# One thing does come late: *whole* facts. A value is several tokens, and all must be right. The loss is an average over tokens, and looks nearly
# done when half of the facts still go wrong somewhere.
#
# A random base is the control that tells what the task
# itself teaches from what the base knew.
#
# ## Comparing fairly, 1: seeds
#
# Our run should look like others with another seed. Four were run by
# `python -m minipeft compare --base data/base/1m --task describe --seeds 4 --output data/results/1m`.

# %% tags=["timing"]
shown = [record for name in ("frozen", "full", compare.RANDOM) for record in rows[name]]
display(Markdown(compare.table(shown, task)))

# %%
score = task.score(task.test[:64], complete(model, base, task.test[:64]))
others = [record for record in rows["full"] if record.seed != 0]
print(f"here {score:.2f}; other seeds {[f'{other.score:.2f}' for other in others]}")
assert compare.in_spread(replace(others[0], score=score), others)

# %% [markdown]
# ## Comparing fairly, 2: learning rates
#
# A method is no better than its learning rate. Here are the committed sweeps (`data/results/sweep.json`), one seed a point. LoRA is a
# method of the next lesson; what matters is what you would say about it had you tried one rate alone.

# %%
like = {"base": "1m", "task": "describe", "steps": 100, "examples": 400}
wanted = {("full", False): "full", ("lora", False): "lora", ("full", True): compare.RANDOM}
swept = {}
for entry in load_sweeps():
    name = wanted.get((entry["method"], entry["random_base"]))
    if name and like.items() <= entry.items():
        swept[name] = entry
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
for name, color, style in [
    ("full", BLUE, "o-"), ("lora", ORANGE, "s-"), (compare.RANDOM, GREY, "^--"),
]:  # fmt: skip
    points = swept[name]["points"]
    rates = [p["learning_rate"] for p in points]
    for axis, key in zip(axes, ("slot_loss", "score", "forgetting"), strict=True):
        if key != "forgetting" or name != compare.RANDOM:
            axis.plot(rates, [p[key] for p in points], style, color=color, label=name)
axes[0].set(ylabel="slot loss (nats per token, log scale)", yscale="log")
axes[1].set(ylabel="slot accuracy", ylim=(-0.03, 1.03))
axes[2].set(ylabel="forgetting (nats per token)", ylim=(0, None))
for axis in axes:
    axis.set(xlabel="learning rate", xscale="log")
handles, labels = axes[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %%
by_rate = {p["learning_rate"]: p for p in swept["full"]["points"]}
lora_at = {p["learning_rate"]: p for p in swept["lora"]["points"]}
best = {name: entry["best"] for name, entry in swept.items()}
print("best rate by slot loss:", {name: f"{rate:g}" for name, rate in best.items()})
print(
    f"LoRA at 0.0025: score {lora_at[0.0025]['score']:.2f}; at 0.01: {lora_at[0.01]['score']:.2f}"
)
for rate in (0.001, 0.004):
    found = by_rate[rate]
    print(f"full at {rate:g}: score {found['score']:.2f}, forgetting +{found['forgetting']:.2f}")
assert best["lora"] >= 4 * best["full"]
assert min(by_rate) < best["full"] < max(by_rate)  # an optimum at an edge would not be one
assert all(p["score"] < 0.05 for p in swept[compare.RANDOM]["points"])
assert by_rate[0.004]["forgetting"] > 3 * by_rate[0.001]["forgetting"]

# %% [markdown]
# Read three things. Each method has its own best rate, ten times apart here; at one rate for both, you would only
# measure whose rate you picked. The random base fails at *every* rate, so it does not fail for want of one. And
# look at the right panel: at equal score, a larger rate forgets several times as much.
#
# ## The price: forgetting, and storage
#
# *Forgetting* is how much the loss on held-out pretraining text has risen. After full fine-tuning the old weights
# are gone; there is no switch to bring them back, except to keep the base as well. And each task needs a whole model.

# %%
forgot = text_loss(model, base.held_out) - text_loss(base.pretrained, base.held_out)
print(f"loss on pretraining text: +{forgot:.2f} nats per token (expect 0.8 to 1.3)")
assert 0.6 < forgot < 1.6
on_disk = {name: rows[name][0].disk_bytes for name in ("full", "lora")}
ten = {"full": 10 * on_disk["full"], "lora": on_disk["full"] + 10 * on_disk["lora"]}
print(
    f"ten tasks: {ten['full'] / 1e6:.1f} MB as ten models, {ten['lora'] / 1e6:.1f} MB as a base and ten LoRAs"
)
large, r = memory.SHAPES["llama-2-7b"], 8
ten = 20 * large.parameters, 2 * large.parameters + 10 * 4 * large.adapter(r)
print(f"at the shape of Llama-2-7B: {ten[0] / 1e9:.0f} GB, or {ten[1] / 1e9:.0f} GB")

# %% [markdown]
# And seconds? One step of full fine-tuning, taken apart on this computer. The backward pass does about twice the work
# of the forward pass: half of it for the gradients of the weights, half to pass the gradient on to the layer below. Only the first
# half is saved by training fewer weights.

# %% tags=["timing"]
batch = tasks.collate(task.train[:16], base.end, "cpu")
clone = build_model(base, RECIPES["full"], RunConfig(seed=0)).train()
optimizer, seconds = torch.optim.AdamW(clone.parameters(), lr=1e-5), []
for _ in range(7):
    t = [time.perf_counter()]
    loss = clone(**batch).loss
    t.append(time.perf_counter())
    loss.backward()
    t.append(time.perf_counter())
    optimizer.step()
    t.append(time.perf_counter())
    optimizer.zero_grad()
    seconds.append([b - a for a, b in itertools.pairwise(t)])
for i, name in enumerate(("forward", "backward", "AdamW")):
    print(f"{name:9} {1000 * statistics.median(times[i] for times in seconds):6.1f} ms")

# %% [markdown]
# ## What breaks it: too little data
#
# Take the data away: the first fifty examples, then the first sixteen, which is one batch, seen a hundred times.

# %%
little = {400: full}
for n in (50, 16):
    little[n], _ = watch(task.train[:n], title=f"{n} examples")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for (n, points), style in zip(little.items(), ("o-", "s--", "^:"), strict=True):
    lowest = min(points, key=lambda p: p["loss"])
    for axis, key in zip(axes, ("loss", "score"), strict=True):
        having = [p for p in points if key in p]
        steps, values = [p["step"] for p in having], [p[key] for p in having]
        axis.plot(steps, values, style, color=BLUE, markersize=4, label=f"{n} examples")
        axis.axvline(lowest["step"], color=GREY, linewidth=1, linestyle=style[1:])
axes[0].set(
    xlabel="step (upright: lowest loss)", ylabel="validation loss (nats per token)", ylim=(0, 2)
)
axes[1].set(xlabel="step", ylabel="slot accuracy", ylim=(-0.03, 1.03))
axes[0].legend(frameon=False, loc="upper center")
plt.show()
for n in (50, 16):
    lowest = min((p for p in little[n] if "score" in p), key=lambda p: p["loss"])
    for p in (lowest, little[n][-1]):
        each = {key: f"{p[key]:.2f}" for key in ("loss", "template_loss", "slot_loss", "score")}
        print(f"{n} examples, step {p['step']:3}: {each}")
    assert little[n][-1]["loss"] > 1.1 * lowest["loss"]
    assert little[n][-1]["template_loss"] > lowest["template_loss"]
    assert little[n][-1]["score"] > lowest["score"] - 0.15
assert full[-1]["loss"] < 1.05 * min(p["loss"] for p in full)
assert full[-1]["score"] > little[16][-1]["score"] + 0.1

# %% [markdown]
# With few examples the validation loss turns and climbs: the model grows sure of what it learned by heart. With all
# examples it does not. But look at the right panel: while the loss climbs, the score does *not* fall, with fifty examples it may even
# rise. It is mostly the template that gets worse: the loss punishes being sure of the wrong phrasing. The facts are stated at least as rightly as before. **The loss is not the score.** Stop by what you care about.
#
# ## Exercises
#
# Each has a cell that checks your answer. The solutions are in `solutions/01_full_fine_tuning.ipynb`.
# After them, write the training loop yourself and have it graded: `python -m minipeft build start training my`. The page `lessons/BUILD.md` says how.
#
# **1 · Warm-up.** You fine-tune a GPT with one billion parameters in full, everything in float32, with AdamW. How many
# gigabytes (thousands of millions of bytes) before the first activation?

# %% tags=["exercise"]
gigabytes = None  # your number

# %% tags=["wrong"]
gigabytes = 4

# %% tags=["wrong"]
gigabytes = 4 + 4 + 4

# %% tags=["solution"]
gigabytes = 4 + 4 + 8  # weights, gradients, two averages

# %% tags=["check"]
if gigabytes is None:
    print("not done yet")
else:
    assert gigabytes < 1e6, "in gigabytes, not bytes"
    assert gigabytes != 4, "those are the weights alone"
    assert gigabytes != 8, "weights and gradients; and what does AdamW remember?"
    assert gigabytes != 12, (
        "AdamW remembers TWO numbers for each weight; or did you forget the gradients?"
    )
    assert gigabytes == 16, "four bytes each: a weight, its gradient, two averages"
    print("right: sixteen bytes a parameter")

# %% [markdown]
# **2 · Pick a rate.** Write `pick(points)`: the learning rate with the lowest `slot_loss`, or `None` where it lies at an edge of the
# grid, for then the best may lie outside. The points need not be in order.


# %% tags=["exercise"]
def pick(points): ...  # return the rate, or None


# %% tags=["wrong"]
def pick(points):
    return min(points, key=lambda p: p["slot_loss"])["learning_rate"]


# %% tags=["wrong"]
def pick(points):
    best = min(points, key=lambda p: p["slot_loss"])
    return None if best in (points[0], points[-1]) else best["learning_rate"]


# %% tags=["wrong"]
def pick(points):
    rates = [p["learning_rate"] for p in points]
    best = max(points, key=lambda p: p["score"])["learning_rate"]
    return None if best in (min(rates), max(rates)) else best


# %% tags=["solution"]
def pick(points):
    rates = [p["learning_rate"] for p in points]
    best = min(points, key=lambda p: p["slot_loss"])["learning_rate"]
    return None if best in (min(rates), max(rates)) else best


# %% tags=["check"]
grid = swept["full"]["points"]
mixed = [grid[i] for i in (2, 0, 4, 1, 3)]  # the best one comes first
if all(pick(points) is None for points in (grid, grid[2:], grid[:3], mixed)):
    print("not done yet")
else:
    assert pick(grid) is not None, "the best rate lies inside this grid: return it"
    assert not isinstance(pick(grid), dict), "the rate, not the whole point"
    assert pick(grid) == 0.001, "the lowest slot loss, not the highest score or the lowest loss"
    assert pick(grid[2:]) is None, "here the best rate is the smallest that was tried: an edge"
    assert pick(grid[:3]) is None, "here the best rate is the largest that was tried: an edge"
    assert pick(mixed) == 0.001, (
        "the edges are the smallest and largest RATES, not the first and last points"
    )
    print("right: an optimum at an edge is not one")

# %% [markdown]
# **3 · Hard: is the difference real?** Two methods, four seeds each, and one mean is higher. Had the labels been dealt at random,
# how often would the means lie at least so far apart, to either side? Write `chance(a, b)`: go through *all* ways to split the eight
# scores into two groups of the sizes of a and b, and return the share whose means differ by at least as much (allow 1e-9 for rounding).

# %% tags=["exercise"]


def chance(a, b): ...  # itertools.combinations helps


# %% tags=["wrong"]


def chance(a, b):
    pool, seen = [*a, *b], statistics.mean(b) - statistics.mean(a)
    splits = list(itertools.combinations(range(len(pool)), len(a)))
    count = 0
    for chosen in splits:
        left = statistics.mean(pool[i] for i in chosen)
        right = statistics.mean(pool[i] for i in range(len(pool)) if i not in chosen)
        count += right - left >= seen - 1e-9
    return count / len(splits)


# %% tags=["wrong"]


def chance(a, b):
    pool, seen = [*a, *b], abs(statistics.mean(a) - statistics.mean(b))
    splits = list(itertools.combinations(pool, len(a)))
    count = 0
    for left in splits:
        right = [value for value in pool if value not in left]
        count += abs(statistics.mean(left) - statistics.mean(right)) >= seen - 1e-9
    return count / len(splits)


# %% tags=["wrong"]


def chance(a, b):
    pool, seen = [*a, *b], abs(statistics.mean(a) - statistics.mean(b))
    splits = list(itertools.combinations(range(len(pool)), len(pool) // 2))
    count = 0
    for chosen in splits:
        left = statistics.mean(pool[i] for i in chosen)
        right = statistics.mean(pool[i] for i in range(len(pool)) if i not in chosen)
        count += abs(left - right) >= seen - 1e-9
    return count / len(splits)


# %% tags=["solution"]


def chance(a, b):
    pool = [*a, *b]

    def apart(chosen):
        left = [pool[i] for i in chosen]
        right = [pool[i] for i in range(len(pool)) if i not in chosen]
        return abs(statistics.mean(left) - statistics.mean(right))

    seen = apart(range(len(a)))
    splits = [apart(chosen) for chosen in itertools.combinations(range(len(pool)), len(a))]
    return sum(value >= seen - 1e-9 for value in splits) / len(splits)


# %% tags=["check"]
scores = {
    name: [record.score for record in rows[name]] for name in ("full", "lora", "prefix_tuning")
}
answer = chance([1, 2, 3, 4], [5, 6, 7, 8])
if answer is None:
    print("not done yet")
else:
    assert answer != 0, "the split that was seen counts too: at least as much"
    assert answer != 1 / 70, "to either side: take the absolute difference"
    assert answer <= 1, "the share of the ways, not their number"
    assert math.isclose(answer, 2 / 70), "70 ways to choose four of eight, and two are as extreme"
    assert math.isclose(chance([1], [2, 3, 4]), 2 / 4), (
        "one score against three: keep the sizes of the groups, and compare means"
    )
    assert math.isclose(chance([1, 1], [2, 3]), 2 / 6), (
        "equal scores are still different runs: split the places, not the values"
    )
    assert math.isclose(chance([1, 1, 1], [1, 1, 1]), 1.0), (
        "no difference at all: every split is as far apart"
    )
    found = {name: round(chance(scores["full"], row), 3) for name, row in scores.items()}
    print(f"right. Full against each: {found}")
    print(
        f"with four seeds each it can never be below 2/70 = {2 / 70:.3f}, however far they lie apart"
    )

# %% [markdown]
# ## Summary, at this size
#
# - Training holds weights, gradients, two averages for each weight, and activations; on a small model activations are most, on a large one the optimizer is.
# - At this size a model that ignores every value makes most of the loss's improvement and states no fact: report template and slots apart.
# - At this size values come as soon as the template, because the base could copy; a random base learns the template alone.
# - At this size the learning rate can decide more than the method: each gets its own sweep, and no optimum at an edge.
# - At this size sixteen examples overfit: the loss climbs while the score stays; and every task costs a whole model, and what the base knew.
#
# **To read:** McCloskey and Cohen 1989, *Catastrophic Interference in Connectionist Networks*, for forgetting; Bouthillier et al. 2021,
# *Accounting for Variance in Machine Learning Benchmarks*, arXiv 2103.03098, for seeds. Then lesson 02: how much of the change was needed?
