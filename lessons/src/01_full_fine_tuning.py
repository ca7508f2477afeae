# %% [markdown]
# # 01 · Full fine-tuning
#
# A pretrained language model knows a lot, but it does not write in the form that your application needs. *Fine-tuning* goes on
# training it on a few hundred examples of your own. *Full* fine-tuning changes every weight, and it is the standard that every
# other method is compared with. It is also expensive: in bfloat16, 7 billion weights take 14 GB. They fit on a card with 24 GB, but training
# there fails with "out of memory". This lesson shows what training does, what it costs, and how to tell whether a model has learned anything.
#
# After this lesson you can
# - say which tokens a model is trained on, and write the training loop;
# - compute the memory of full fine-tuning before you start;
# - tell whether a model has learned the task, or only how answers are worded;
# - measure how much a model forgets.
#
# **Time.** About an hour, and 25 minutes more for "Going further". All results are for a GPT with 1 million parameters.
# Unknown words are in the [glossary](README.md#glossary).

# %%
import inspect
import itertools
import json
import math
import re
import statistics
import time
from dataclasses import replace
from itertools import islice

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display
from torch import nn

from minipeft.grader.lessons import check, claim, hint, solution, solved
from minipeft.lab import DATA, compare, memory, report, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import complete, task_loss, text_loss
from minipeft.lab.recipes import RunConfig, load_sweeps
from minipeft.lab.train import train

# %%
BLUE, ORANGE, GREY = (report.COLORS[name] for name in ("full", "lora", compare.RANDOM))
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
base = load_base(DATA / "base" / "1m")
task = tasks.load_task(base, "describe")
print(task.train[0].prompt, "\n->", task.train[0].completion)

# %% [markdown]
# This is one of 400 training examples of `describe`: turn facts into sentences. The names in the test examples occur nowhere in training.
#
# ## Before you start
#
# Two questions about lesson 00. Replace `None` with your answer, and run both cells.
#
# **1.** The model reads the tokens `[5, 9, 2, 7]`, at positions 0 to 3. With which token is its output at position 1 compared?

# %% tags=["exercise"]
target = None

# %% tags=["solution"]
target = 2  # each position predicts the next token

# %% tags=["check"]
check("01.target", target)

# %% [markdown]
# **2.** A model gives all 2048 tokens of its vocabulary the same probability. What is its loss, in nats per token?

# %% tags=["exercise"]
uniform = None  # a number, or an expression

# %% tags=["solution"]
uniform = math.log(2048)  # minus the logarithm of 1/2048

# %% tags=["check"]
check("01.uniform", uniform)

# %% [markdown]
# If an answer is wrong, call `hint(1)`, `hint(2)` or `solution()` in a new cell.
#
# ## What the model is trained on
#
# An example has a *prompt* and a *completion*. The model reads both, but it should learn to write the completion only. So the loss is
# taken on the completion: the *labels* of the prompt are set to -100, and PyTorch's cross-entropy ignores them. Texts of different lengths are
# padded to one length with end tokens. There, the attention mask is 0, and the labels are -100 too.

# %%
batch = tasks.collate([task.train[0], task.train[4]], base.end, "cpu")
for name, tensor in batch.items():
    print(f"{name:14} {tuple(tensor.shape)}   (batch, tokens)")
print("\nthe first example:  token | id | mask | label")
columns = (batch[name][0].tolist() for name in ("input_ids", "attention_mask", "labels"))
rows = list(zip(*columns, strict=True))
near = len(task.train[0].prompt_ids)  # where the completion begins
for token, mask, label in [*rows[near - 4 : near + 8], *rows[-8:]]:
    text = json.dumps(base.tokenizer.decode([token], skip_special_tokens=False))
    print(f"{text:>14} | {token:4} | {mask} | {label:4}")

# %% [markdown]
# (Rows in the middle are left out.) The completion ends with one *end token* that is trained on, so that the model learns to stop. Labels are *not* shifted here. The model compares its output at one position with the label of the next (lesson 00).
#
# **Exercise 1.** Write `make_labels(prompt_ids, completion_ids, end, length)`. It returns the labels of one example as a list: first -100 for each token of the prompt, then the
# completion and the end token, then -100 up to `length`.


# %% tags=["exercise"]
def make_labels(prompt_ids, completion_ids, end, length): ...


# %% tags=["solution"]
def make_labels(prompt_ids, completion_ids, end, length):
    labels = [-100] * len(prompt_ids) + list(completion_ids) + [end]
    return labels + [-100] * (length - len(labels))


# %% tags=["check"]
check("01.make_labels", make_labels)

# %% [markdown]
# **Exercise 2.** Write `masked_loss(logits, labels)`: the mean cross-entropy over all positions i where the label at i + 1 is not -100. Shapes: logits (batch, tokens, vocabulary), labels (batch, tokens).


# %% tags=["exercise"]
def masked_loss(logits, labels): ...


# %% tags=["solution"]
def masked_loss(logits, labels):
    logits, labels = logits[:, :-1], labels[:, 1:]  # position i predicts token i + 1
    keep = labels != -100
    return nn.functional.cross_entropy(logits[keep], labels[keep])


# %% tags=["check"]
check("01.masked_loss", masked_loss)

# %%
output = base.pretrained(**batch)
keep = batch["labels"][:, 1:] != -100
by_hand = nn.functional.cross_entropy(output.logits[:, :-1][keep], batch["labels"][:, 1:][keep])
assert torch.allclose(output.loss, by_hand)
print(f"loss of the base on these two completions: {output.loss:.2f} nats per token")

# %% [markdown]
# This is more than the loss of a model that gives all tokens the same probability! The base expects something else here, and with confidence. You will see below what it writes.

# %% [markdown]
# ## The training loop
#
# In each step: a batch, its loss, the gradients, and an update of all weights. Two habits make training more stable. The learning rate *warms up* in the first tenth of the steps and then falls
# to zero along a cosine. And if the norm of all gradients together is above 1, they are *clipped*: scaled down to a norm of 1. This lesson trains without weight decay; lesson 02 comes to it.


# %%
def fine_tune(model, batches, run, after_step=lambda step: None):
    """Train, and return the loss of each step."""
    losses, parameters = [], [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0)
    model.train()
    for step, batch in enumerate(islice(batches, run.steps), 1):
        optimizer.param_groups[0]["lr"] = run.learning_rate_at(step)
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after_step(step)
    return losses


def batches(examples, seed=0):
    for chosen in tasks.shuffled(examples, 16, seed):
        yield tasks.collate(chosen, base.end, "cpu")


# %% [markdown]
# minipeft's own loop, `lab.train`, can also continue a run that was stopped, and use several GPUs. Five steps of both:

# %%
short = RunConfig(steps=5, learning_rate=1e-3, quiet=True)
by_hand = fine_tune(base.model(), batches(task.train), short)
library = train(base.model(), ([b] for b in batches(task.train)), short).losses
assert by_hand == library
print([round(loss, 4) for loss in by_hand])

# %% [markdown]
# **AdamW** (here without its weight decay) keeps two running averages for each weight: m of its gradient g, and v of g². With β₁ and β₂ near 1, step t is
#
# $$ m \leftarrow \beta_1 m + (1-\beta_1)\, g, \quad v \leftarrow \beta_2 v + (1-\beta_2)\, g^2, \quad w \leftarrow w - \eta\, \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon} $$
#
# where η is the learning rate, and ϵ is tiny.
#
# **Exercise 3.** In the very first step (t = 1, m = v = 0), one weight has the gradient 5, and another one 5000. η is 1/100. By how much does each of them move? Give two numbers.

# %% tags=["exercise"]
move_of_5 = None
move_of_5000 = None

# %% tags=["solution"]
move_of_5 = 1 / 100  # m / (1 - β₁) is g, and √(v / (1 - β₂)) is |g|: their quotient is 1
move_of_5000 = 1 / 100

# %% tags=["check"]
check("01.first_move", move_of_5, move_of_5000)

# %%
w = nn.Parameter(torch.zeros(2))
optimizer = torch.optim.AdamW([w], lr=0.01, weight_decay=0)
(w * torch.tensor([5.0, 5000.0])).sum().backward()
optimizer.step()
# The first step does not depend on the gradient's size. Later steps depend on how g changes from step to step.
print("torch.optim.AdamW moves them by", [round(value, 4) for value in w.data.tolist()])

# %% [markdown]
# ## Where the memory goes
#
# Training holds four things: the weights, a gradient for each weight, AdamW's two averages, and the *activations*. Activations are all results of
# the forward pass that the backward pass needs. Their size grows with the number of tokens in a batch.
#
# **Your guess:** our GPT, in float32, is trained on 16 texts of 64 tokens. Divide the memory of training by the memory of the weights: what do you get? And for 7 billion parameters, with equally many tokens (weights and gradients in bfloat16, AdamW's averages in float32)?

# %%
guess_small, guess_7b = None, None  # times the weights
reason = ""

# %%
measured = memory.measure(base, "full", r=8, batch_size=16, length=64)
computed = memory.memory(memory.SHAPES["1m"], "full", tokens=16 * 64)
for part, count in measured.items():
    print(f"{part:12} {count / 1e6:6.2f} MB measured, {computed[part] / 1e6:6.2f} MB computed")
    assert abs(count - computed[part]) < 0.02 * computed[part]

# %%
found = {"our GPT\n(float32, measured)": measured}
for name in ("gpt2", "llama-2-7b"):
    parts = memory.memory(memory.SHAPES[name], "full", tokens=16 * 64, checkpointing=False)
    found[f"{name}\n(bfloat16, computed)"] = parts
figure, axis = plt.subplots(figsize=(7, 3.6))
bottom = [0.0] * len(found)
for part, color, hatch in zip(memory.PARTS, report.PART_COLORS, ("", "//", "..", ""), strict=True):
    heights = [parts[part] / parts["weights"] for parts in found.values()]
    axis.bar(
        list(found), heights, 0.5, bottom, color=color, hatch=hatch, edgecolor="white", label=part
    )
    bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
axis.bar_label(axis.containers[-1], [f"{height:.1f}" for height in bottom], padding=2)
drawn = [(x, guess) for x, guess in ((0, guess_small), (2, guess_7b)) if guess is not None]
if drawn:
    x, guess = torch.tensor(drawn).T.numpy()
    axis.hlines(guess, x - 0.4, x + 0.4, color="black", linestyle=":", label="your guess")
axis.set(ylabel="times the memory of the weights", ylim=(0, 1.15 * max(bottom)))
axis.legend(frameon=False)
report.show(
    figure,
    "Memory of training in multiples of the weights: activations dominate our small GPT, the optimizer dominates Llama-2-7B.",
)

# %% [markdown]
# For our small GPT, most of the memory is activations. For a large model with this many tokens, it is the optimizer: two averages of 4 bytes per weight, while
# weights and gradients take 2 bytes each. That makes 12 bytes per parameter, and 16 if a float32 copy of the weights is kept as well.
#
# **Exercise 4.** You fine-tune a model with 7 billion parameters at 12 bytes per parameter. How many GB (10⁹ bytes) does this take, without activations?

# %% tags=["exercise"]
gigabytes = None

# %% tags=["solution"]
gigabytes = 7 * 12  # billions of parameters times bytes per parameter

# %% tags=["check"]
check("01.gigabytes", gigabytes)

# %% [markdown]
# ## Fine-tune it
#
# A prompt states four *facts*. In the fact "near is Black Oven", "Black Oven" is the *value*. In a completion, the tokens of values are *slot tokens*. All others are *template tokens*: for example those of "This is the story of", with which half of all completions begin.
# Each fact has two phrasings. *Slot accuracy* is the share of facts that the generated text states in one of its phrasings, with the right value. To save time, it is measured on 32 of the validation examples here.
#
# **Your guess:** after how many of 100 steps has the loss on template tokens fallen to a tenth? And the loss on slot tokens?

# %%
guess_template, guess_slot = None, None  # steps
reason = ""


# %%
def watch(examples, seed=0):
    """Fine-tune on examples, and measure on the way: the model, the losses, the measurements."""
    model, points = base.model(), []
    run = RunConfig(steps=100, learning_rate=1e-3)

    def measure(step):
        if step % 5 == 0:
            points.append({"step": step} | task_loss(model, task.validation, base.end))
        if step % 10 == 0:
            some = task.validation[:32]
            points[-1]["score"] = task.score(some, complete(model, base, some))

    measure(0)
    losses = fine_tune(model, batches(examples, seed), run, measure)
    return model, losses, points


model, losses, full = watch(task.train)
example = task.test[0]
print("prompt:     ", example.prompt)
print("base:       ", complete(base.pretrained, base, [example])[0])
print("fine-tuned: ", complete(model, base, [example])[0])
print("reference:  ", example.completion)

# %%
figure, axis = plt.subplots(figsize=(6.5, 2.8))
axis.plot(range(1, 101), losses, color=BLUE)
axis.set(xlabel="step", ylabel="training loss (nats per token)", yscale="log")
axis.annotate(f"{losses[-1]:.2f}", (100, losses[-1]), (96, 1.5 * losses[-1]))
report.show(
    figure,
    "Training loss by step on a log axis: it falls steeply for 20 steps, and slowly after that.",
)

# %% [markdown]
# ## Has it learned the task?
#
# A falling loss does not answer this. Suppose a model ignores all values in the prompt. What slot accuracy would it have? We train such a *blind* model: in each training prompt, the values are replaced by those of other examples, and the completion is kept. So
# the prompt's values say nothing about those in the completion, and the model learns to ignore them.


# %%
def blinded(examples):
    """The same completions, each under a prompt with the values of other examples."""
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
print(blind_examples[0].prompt, "\n->", blind_examples[0].completion)
_, _, blind = watch(blind_examples)

# %%
start, end, ignoring = (points["loss"] for points in (full[0], full[-1], blind[-1]))
print(f"validation loss: {start:.2f} at the start, {end:.2f} fine-tuned, {ignoring:.2f} blind")
print(f"the blind model makes {(start - ignoring) / (start - end):.0%} of the improvement")
print(f"slot accuracy: {full[-1]['score']:.2f} fine-tuned, {blind[-1]['score']:.2f} blind")
claim((start - ignoring) / (start - end) > 0.75, "a blind model makes most of the improvement")
claim(blind[-1]["score"] < 0.1, "a blind model states nearly no fact")
claim(full[-1]["score"] > 0.85, "the fine-tuned model states most facts")

# %% [markdown]
# A model that cannot do the task at all makes most of the improvement in the loss. So we report template and slot tokens separately, and count facts in generated text. We compare with
# the *random base*: a model that starts from random weights, trained on the same examples. (Its curve is the mean of four stored runs, at its own best learning rate.) What the random base learns comes from the training examples only.

# %%
records = compare.load(DATA / "results" / "1m" / "compare.json")
rows = compare.rows(records)
random_base = [  # mean over the seeds
    {key: statistics.mean(p[key] for p in points) for key in points[0]}
    for points in zip(*(record.validation for record in rows[compare.RANDOM]), strict=True)
]

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
guesses = {"template_loss": guess_template, "slot_loss": guess_slot}
for axis, (key, guess) in zip(axes, guesses.items(), strict=True):
    for points, color, style, label in [
        (full, BLUE, "o-", "fine-tuned"), (blind, "black", "x:", "blind"),
        (random_base, GREY, "s--", "random base"),
    ]:  # fmt: skip
        steps, values = zip(*((p["step"], p[key]) for p in points), strict=True)
        axis.plot(steps, values, style, color=color, markersize=4, label=label)
    if guess is not None:
        axis.axvline(guess, color="black", linestyle="-.", label="your guess")
    axis.set(xlabel="step", title=f"{key.split('_')[0]} tokens", yscale="log")
    tenth = next((p["step"] for p in full if p[key] <= full[0][key] / 10), None)
    print(f"{key.split('_')[0]} loss, fine-tuned: a tenth of its start by step {tenth}")
axes[0].set_ylabel("validation loss (nats per token)")
axes[0].legend(frameon=False)
report.show(
    figure,
    "The template loss of all three models falls at about the same pace. The slot loss of the fine-tuned model falls as early and below 0.1; that of the others stays at about 4.",
)

# %% [markdown]
# The surprise is on the right: the slot loss falls *as early as* the template loss. The base could already copy names (lesson 00), so it only had to learn where to put them. The random base cannot copy, and does not
# learn it in 100 steps.
#
# But a *whole* value has several tokens, and all must be right.
#
# **Exercise 5.** At some step the slot loss is L nats per token. Assume that all tokens are equally hard. Write `whole_value(loss, n)`: the probability that all n tokens of a value are right.


# %% tags=["exercise"]
def whole_value(loss, n): ...


# %% tags=["solution"]
def whole_value(loss, n):
    return math.exp(-loss * n)  # exp(-loss) per token, n times


# %% tags=["check"]
check("01.whole_value", whole_value)

# %%
facts = sum(len(task.facts(example.prompt)) for example in task.validation)
n = sum(sum(example.is_slot) for example in task.validation) / facts
print(f"a value has {n:.1f} tokens on average")
for point in [*full[2:11:2], full[-1]]:
    expected = math.exp(-n * point["slot_loss"])
    print(
        f"step {point['step']:3}: slot loss {point['slot_loss']:.2f}, "
        f"expected share of right values {expected:.2f}, slot accuracy {point['score']:.2f}"
    )

# %% [markdown]
# The estimate is rough. Tokens are not equally hard. And the loss is measured with the correct text so far, but generation continues the model's own text, with its errors.
#
# ## What it forgets
#
# *Forgetting* is the rise of the loss on held-out text like that of pretraining. After full fine-tuning the old weights are gone: to get them back, you must have kept a copy.

# %%
before, after = text_loss(base.pretrained, base.held_out), text_loss(model, base.held_out)
print(f"loss on text like that of pretraining: {before:.2f} before, {after:.2f} after")
print(f"forgetting: {after - before:+.2f} nats per token")
claim(0.5 < after - before < 1.8, "full fine-tuning without weight decay forgets about a nat")

# %% [markdown]
# ## Summary
#
# - The loss is taken on the completion only: labels of -100 are ignored.
# - A training step is forward, backward, clip, update. AdamW divides the average gradient by its typical size.
# - Training holds weights, gradients, two averages per weight, and activations: 84 GB for 7 billion parameters at 12 bytes each, activations not included.
# - A lower loss can come from the template only. Ask what a blind model and a random base would score.
# - Full fine-tuning forgets, and every task needs a copy of the whole model.
#
# **Do you remember?** Answer first, then open.
#
# <details><summary>1. Why are the labels of the prompt -100?</summary>So that the model is trained to write the completion, and not to write prompts. It still reads the prompt.</details>
#
# <details><summary>2. Your fine-tuned model has a much lower loss than the base. What else must you know before you believe that it does the task?</summary>What a blind model and a random base would reach, and how the generated text scores.</details>
#
# <details><summary>3. Why does training need so much more memory than the weights?</summary>Each weight also has a gradient and two averages of AdamW, often in higher precision, and activations are kept for the backward pass.</details>
#
# **To read:** Loshchilov and Hutter 2017, [*Decoupled Weight Decay Regularization*](https://arxiv.org/abs/1711.05101) (AdamW). McCloskey and Cohen 1989, *Catastrophic Interference in Connectionist Networks*.
#
# # Going further
#
# **Build it yourself.** Write the training loop and have it graded: `python -m minipeft build start training my` ([BUILD.md](BUILD.md)).
#
# ## How low can the loss go?
#
# A value is in the prompt, so a perfect reader has a slot loss of zero. The template has a floor: each fact has two phrasings, chosen at random. Nobody can know which one comes, and
# this costs ln 2 nats per fact.

# %%
template_tokens = sum(not slot for example in task.validation for slot in example.is_slot)
floor = facts * math.log(2) / template_tokens
print(f"template loss: floor {floor:.3f}, fine-tuned {full[-1]['template_loss']:.3f}")
claim(
    floor < full[-1]["template_loss"] < 2 * floor, "the template loss is less than twice its floor"
)

# %% [markdown]
# ## Comparing fairly: learning rates
#
# Two methods may only be compared if each has its own best learning rate. The figure shows sweeps that come with minipeft, one seed per point. LoRA is the subject of the next lesson.

# %%
wanted = {("full", False): "full", ("lora", False): "lora", ("full", True): compare.RANDOM}
like, swept = {"base": "1m", "task": "describe", "steps": 100, "examples": 400}, {}
for entry in load_sweeps():
    name = wanted.get((entry["method"], entry["random_base"]))
    if name and like.items() <= entry.items():
        swept[name] = entry["points"]
best = {
    name: max(points, key=lambda p: p["score"])["learning_rate"] for name, points in swept.items()
}
print(
    "best learning rate by slot accuracy:", {name: f"{best[name]:g}" for name in ("full", "lora")}
)
claim(best["lora"] >= 4 * best["full"], "LoRA needs a higher learning rate")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
styles = {"full": (BLUE, "o-"), "lora": (ORANGE, "s-"), compare.RANDOM: (GREY, "^--")}
for axis, key in zip(axes, ("score", "forgetting"), strict=True):
    for name, (color, style) in styles.items():
        if (name, key) != (compare.RANDOM, "forgetting"):
            rates = [p["learning_rate"] for p in swept[name]]
            values = [p[key] for p in swept[name]]
            axis.plot(rates, values, style, color=color, label=report.NAMES.get(name, name))
    axis.set(xlabel="learning rate", xscale="log")
axes[0].set(ylabel="slot accuracy")
ticks = [0.2, 0.5, 1, 2, 5]
axes[1].set(ylabel="forgetting (nats per token)", yscale="log", yticks=ticks, yticklabels=ticks)
axes[1].minorticks_off()
axes[0].legend(frameon=False)
report.show(
    figure,
    "Slot accuracy and forgetting by learning rate: LoRA needs rates several times as high, and fails at the highest one.",
)

# %% [markdown]
# If both methods had the same learning rate, the result would depend on which method that rate suits. The random base fails at every rate that was tried. For full fine-tuning three rates score about the same, but the highest
# of them forgets several times as much. So this lesson uses the lowest of the three, 10⁻³.
#
# **Exercise 6.** Write `pick(points)`. Each point is a dict with `learning_rate` and `slot_loss`, in any order. Return the learning rate with the lowest slot loss, or `"edge"` if it is the smallest or the largest one that was tried: then
# the best may lie outside.


# %% tags=["exercise"]
def pick(points): ...


# %% tags=["solution"]
def pick(points):
    rates = [p["learning_rate"] for p in points]
    best = min(points, key=lambda p: p["slot_loss"])["learning_rate"]
    return "edge" if best in (min(rates), max(rates)) else best


# %% tags=["check"]
check("01.pick", pick)

# %% [markdown]
# ## Comparing fairly: seeds
#
# Another seed gives another score. Here are four runs per method. (Prefix tuning is the subject of lesson 06.)

# %%
scores = {
    name: [record.score for record in rows[name]] for name in ("full", "lora", "prefix_tuning")
}
for name, values in scores.items():
    print(f"{report.NAMES[name]:14} {[f'{value:.2f}' for value in values]}")

# %% [markdown]
# **Exercise 7, harder.** Two methods have different means. Could that be chance? Suppose that the method makes no difference. Then it does not matter which scores belong to a, and which to b. So put the scores of both together, and go through *all* ways to split them into two groups of the sizes of a and b.
# Write `chance(a, b)`: the share of these splits whose means are at least as far apart as the means of a and b, in either direction (allow 1e-9 for rounding).


# %% tags=["exercise"]
def chance(a, b): ...  # itertools.combinations helps


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
check("01.chance", chance)

# %%
if solved("01.chance"):
    for a, b in itertools.combinations(scores, 2):
        share = float(chance(scores[a], scores[b]))
        print(
            f"{report.NAMES[a]} and {report.NAMES[b]}: {share:.2f} (lowest possible: {2 / 70:.2f})"
        )

# %% [markdown]
# With four seeds each there are 70 splits. The observed split always counts, and so does the one with a and b exchanged. So the share is at least 2/70. Prefix tuning has this lowest share with both other methods: all of its scores are lower.
# For full fine-tuning and LoRA, most splits have means at least as far apart as ours. So their difference may well be chance.
#
# ## What breaks it: too few examples
#
# Train on the first 16 examples only: every step sees the same batch.

# %%
_, _, few = watch(task.train[:16])
lowest = min((p for p in few if "score" in p), key=lambda p: p["loss"])
for point in (lowest, few[-1]):
    losses_of = f"template {point['template_loss']:.2f}, slot {point['slot_loss']:.2f}"
    print(
        f"step {point['step']:3}: loss {point['loss']:.2f} ({losses_of}), slot accuracy {point['score']:.2f}"
    )
print(f"400 examples: loss {full[-1]['loss']:.2f}, slot accuracy {full[-1]['score']:.2f}")
claim(few[-1]["loss"] > 1.1 * lowest["loss"], "with 16 examples, the validation loss rises again")
claim(few[-1]["template_loss"] > lowest["template_loss"], "the loss on template tokens rises")
claim(few[-1]["score"] > lowest["score"] - 0.15, "but the score does not fall with it")

# %% [markdown]
# The validation loss falls and then rises, on template and on slot tokens: perhaps the model becomes too sure of what it has memorized. But slot accuracy does not fall with it. **The loss is not the score**, so stop training by the number that you care about.
#
# ## Where the time goes
#
# The backward pass does about twice the work of the forward pass. Half of it computes the gradients of the weights, and half passes gradients on to the layer below. Training fewer weights saves gradients of weights and work of the optimizer. But gradients must still be passed on, down to the lowest layer that is trained.

# %% tags=["timing"]
batch, clone = tasks.collate(task.train[:16], base.end, "cpu"), base.model().train()
optimizer, seconds = torch.optim.AdamW(clone.parameters(), weight_decay=0), []
for _ in range(7):
    times = [time.perf_counter()]
    loss = clone(**batch).loss
    times.append(time.perf_counter())
    loss.backward()
    times.append(time.perf_counter())
    optimizer.step()
    times.append(time.perf_counter())
    optimizer.zero_grad()
    seconds.append([b - a for a, b in itertools.pairwise(times)])
for i, name in enumerate(("forward", "backward", "AdamW")):
    print(f"{name:9} {1000 * statistics.median(times[i] for times in seconds):6.1f} ms")
