# %% [markdown]
# # 02 · LoRA
#
# You have one graphics card with 24 GB of memory, and a language model with 7 billion parameters. In bfloat16 its weights
# take 14 GB. With gradients and optimizer states, full fine-tuning needs 84 GB (12 bytes per weight, lesson 01), so it does not fit.
# And if twenty customers each want a model of their own, you must store twenty models of 14 GB. LoRA trains a small addition
# to each weight matrix and stores only that: about 40 MB per customer at rank 8.
#
# After this lesson you can
# - write a LoRA layer, put it into a GPT, and train it;
# - compute how many parameters it trains;
# - say what its settings do, and merge it into the weights;
# - compare it with full fine-tuning: what it learns, and what it forgets.
#
# **Time.** About an hour, and 25 minutes more for "Going further". All results are for a GPT with 1 million parameters.
# [Glossary](README.md#glossary).

# %%
import inspect
import json
from itertools import islice

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display
from torch import nn

from minipeft import GPT, GPTConfig, LoraConfig, PeftModel, get_peft_model, lora
from minipeft.grader.lessons import check, claim, hint, solution, solved
from minipeft.lab import DATA, compare, memory, report, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import complete, task_loss
from minipeft.lab.finetune import finetune
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.targets import find_targets

BLUE, ORANGE, GREY = (report.COLORS[name] for name in ("full", "lora", "frozen"))
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
OUT = DATA.parent / "out" / "02"  # what this lesson saves; git ignores it
base = load_base(DATA / "base" / "1m")
task = tasks.load_task(base, "describe")

# %% [markdown]
# ## Before you start
#
# Two questions about lesson 01. Replace `None`, and run both cells.
#
# **1.** Everything is in float32, and the optimizer is AdamW. How many bytes per parameter does full fine-tuning hold, activations not included?

# %% tags=["exercise"]
bytes_per_parameter = None

# %% tags=["solution"]
bytes_per_parameter = 4 + 4 + 8  # the weight, its gradient, and AdamW's two averages

# %% tags=["check"]
check("02.bytes", bytes_per_parameter)

# %% [markdown]
# **2.** In lesson 01, one model ignored all values in its prompts. Which number showed it most clearly: `"loss"`, `"template loss"` or `"slot accuracy"`?

# %% tags=["exercise"]
clearest = None

# %% tags=["solution"]
clearest = "slot accuracy"  # most of the loss comes from template tokens

# %% tags=["check"]
check("02.clearest", clearest)

# %% [markdown]
# If an answer is wrong, call `hint(1)`, `hint(2)` or `solution()` in a new cell.
#
# ## What does full fine-tuning change?
#
# Full fine-tuning turns each weight matrix W into W + ΔW. The *singular value decomposition* writes a matrix whose shorter side is 128 as a sum of 128 simple matrices, each a column times a row. We call each one a *direction*. Its strength is its *singular value*.
# The squared (*Frobenius*) *norm* of ΔW is the sum of its squared entries. It equals the sum of the squared strengths. Which share of it do the strongest directions hold?
#
# **Your guess:** how many of the 128 directions hold 90 % of the squared norm of ΔW, averaged over the layers? And why?

# %%
guess = None  # directions, 1 to 128
reason = ""

# %%
full = finetune(base, task, RECIPES["full"], RunConfig(seed=0, output=OUT / "full"))
tuned = GPT.from_pretrained(OUT / "full")
weights = {
    name: layer.weight for name, layer in find_targets(base.pretrained, "all-linear").items()
}
deltas = {name: (tuned.get_submodule(name).weight - w).detach() for name, w in weights.items()}


def energy(matrix):
    """The share of the squared norm in the 1, 2, 3, … strongest directions."""
    squares = torch.linalg.svdvals(matrix).square()
    return squares.cumsum(0) / squares.sum()


torch.manual_seed(0)
curve = torch.stack([energy(delta) for delta in deltas.values()]).mean(0)
noise = torch.stack([energy(torch.randn_like(delta)) for delta in deltas.values()]).mean(0)
directions = int((curve < 0.9).sum()) + 1
print(f"90 % of the squared norm of ΔW lies in {directions} of 128 directions (guess: {guess})")
print(f"the strongest 8 hold {curve[7]:.0%}; in random matrices {noise[7]:.0%}")
claim(curve[7] > 2 * noise[7], "ΔW is concentrated in fewer directions than a random matrix")

# %%
figure, axis = plt.subplots(figsize=(6.5, 3.6))
axis.plot(range(1, 129), curve, color=BLUE, label="ΔW, mean over the layers")
axis.plot(range(1, 129), noise, "--", color=GREY, label="random matrices of the same shapes")
axis.plot([directions], [0.9], "o", color=BLUE)
axis.annotate(
    f"{directions} directions: 90 %", (directions, 0.9), (60, 0.4), arrowprops={"arrowstyle": "->"}
)
if guess is not None:
    axis.axvline(guess, color="black", linestyle=":", label="your guess")
axis.set(xlabel="directions, strongest first", ylabel="share of the squared norm", ylim=(0, 1.02))
axis.legend(frameon=False, loc="lower right")
report.show(
    figure,
    "Share of the squared norm of ΔW in its strongest directions: it rises much faster than for random matrices.",
)

# %% [markdown]
# The update is concentrated: the strongest 8 directions hold about half of its squared norm. It also has a long tail. "Going further" measures how much the
# tail matters.
#
# ## The idea
#
# LoRA does not train ΔW. It trains two small matrices whose product takes the place of ΔW:
#
# $$ y = W x + b + \frac{\alpha}{r}\, B A x, \qquad A \in \mathbb{R}^{r \times in},\quad B \in \mathbb{R}^{out \times r} $$
#
# W and b are *frozen*: they do not change. A product B A has at most r directions, so its *rank* is at most r, and we say that the
# update has *low rank*. The *scaling* α/r is a fixed number. A starts with small random numbers, and B with zeros. The trained matrices of all layers together
# are called an *adapter*.
#
# **Exercise 1.** W has the shape 384 × 128, and r is 8. How many parameters does LoRA train for this layer?

# %% tags=["exercise"]
count = None  # a number, or an expression

# %% tags=["solution"]
count = 8 * (128 + 384)  # A is 8 × 128, and B is 384 × 8

# %% tags=["check"]
check("02.count", count)

# %% [markdown]
# **Exercise 2.** Why is only B zero at the start? Think of the first backward pass. Which of the two matrices gets a gradient that is
# not zero? And which would get one, if both started at zero? Answer with lists of names: `[]`, `["A"]`, `["B"]` or `["A", "B"]`.

# %% tags=["exercise"]
first_step = None  # A random, B zero
both_zero = None  # A and B zero

# %% tags=["solution"]
first_step = ["B"]  # B's gradient contains A x; A's gradient contains B, which is zero
both_zero = []  # so neither would ever change

# %% tags=["check"]
check("02.zero", first_step, both_zero)

# %% [markdown]
# One of the two must be zero, so that the model starts as the base. The other must not, or nothing would ever train. LoRA's B is zero.
#
# ## Write the layer
#
# **Exercise 3.** Write the layer. It wraps an `nn.Linear`, freezes it, and adds (α/r) B A x. Call the two matrices
# `self.A`, of shape (r, in), and `self.B`, of shape (out, r). Each is an `nn.Parameter`, or an `nn.Linear` without a bias. Fill A with random numbers of about the size 1/√in.
# (The rows of `x` are inputs, so A x is `x @ A.T`.)


# %% tags=["exercise"]
class MyLora(nn.Module):
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer
        # freeze the layer; then make A and B

    def forward(self, x): ...  # W x + b + (α/r) B A x


# %% tags=["solution"]
class MyLora(nn.Module):
    def __init__(self, layer, r, alpha):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Linear(layer.in_features, r, bias=False)  # starts with about this size
        self.B = nn.Linear(r, layer.out_features, bias=False)
        nn.init.zeros_(self.B.weight)
        self.scaling = alpha / r

    def forward(self, x):
        return self.layer(x) + self.scaling * self.B(self.A(x))


# %% tags=["check"]
check("02.my_lora", MyLora)
if not solved("02.my_lora"):  # until yours is right, the lesson goes on with minipeft's layer

    def MyLora(layer, r, alpha):
        return lora.LoraLinear(layer, LoraConfig(r=r, lora_alpha=alpha))


# %% [markdown]
# (Until your `MyLora` is right, the lesson uses minipeft's `LoraLinear`.) Compare with the layer in [minipeft/methods/lora.py](../minipeft/methods/lora.py). The next cell computes the equation by hand, and finds
# the same numbers. Then read `__init__` and `forward`. Numbers such as (1) refer to the equations at the top of the file; `merged_weight` is for merging.

# %%
torch.manual_seed(0)
linear, x, A, B = nn.Linear(4, 6), torch.randn(3, 4), torch.randn(2, 4), torch.randn(6, 2)
layer = lora.LoraLinear(linear, LoraConfig(r=2, lora_alpha=4))
layer.lora_A.weight.data, layer.lora_B.weight.data = A, B
by_hand = x @ linear.weight.T + linear.bias + 4 / 2 * (x @ A.T @ B.T)
assert torch.allclose(layer(x), by_hand, atol=1e-6)
print(
    inspect.getsource(lora.LoraLinear.__init__),
    inspect.getsource(lora.LoraLinear.forward),
    sep="\n",
)

# %% [markdown]
# ## Put it into a GPT
#
# Freeze the model, and replace its linear layers. `find_targets` returns them by name: `"all-linear"` means all except
# the output head. Below is the first block of the GPT, before and after (only its modules).


# %%
def add_my_lora(model, r, alpha):
    model.requires_grad_(False)  # embeddings, LayerNorms, everything
    for name, layer in find_targets(model, "all-linear").items():
        model.set_submodule(name, MyLora(layer, r, alpha))
    return model


print(base.model().transformer.h[0])
torch.manual_seed(0)
model = add_my_lora(base.model(), r=8, alpha=16)
print(model.transformer.h[0])

# %% [markdown]
# minipeft's `add_lora`, below, does the same. In your own work, call `get_peft_model`, as in Hugging Face peft: its model can also switch, disable and save adapters.
#
# Two checks: the model starts as the base, and the number of trainable parameters is that of the formula.

# %%
print(inspect.getsource(lora.add_lora))
ids = torch.tensor([task.test[0].prompt_ids])
assert torch.equal(model(ids).logits, base.pretrained(ids).logits)
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
assert trained == sum(8 * (w.shape[0] + w.shape[1]) for w in weights.values())
print(f"trainable: {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## Train it
#
# The loop of lesson 01 knows nothing about LoRA: the optimizer gets the parameters that require a gradient.


# %%
def fine_tune(model, batches, run):
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
    return losses


def batches(seed=0):
    for examples in tasks.shuffled(task.train, 16, seed):
        yield tasks.collate(examples, base.end, "cpu")


losses = fine_tune(model, batches(), RunConfig(steps=100, learning_rate=1e-2))

# %%
figure, axis = plt.subplots(figsize=(6.5, 3))
axis.plot(range(1, 101), losses, color=ORANGE)
axis.set(xlabel="step", ylabel="training loss (nats per token)", yscale="log")
report.show(
    figure,
    "Training loss of LoRA by step on a log axis: it falls steeply for 20 steps, then slowly.",
)
prompt = task.test[0]
print("prompt:    ", prompt.prompt)
print("base:      ", complete(base.pretrained, base, [prompt])[0])
print("LoRA:      ", complete(model, base, [prompt])[0])
print("reference: ", prompt.completion)
claim(losses[-1] < 0.2 * losses[0], "the loss falls to less than a fifth")

# %% [markdown]
# Each fact has two phrasings, so the text may differ from the reference. Slot accuracy counts values in either phrasing. The base names the values, but in other phrasings: it scores zero.
#
# ## The settings
#
# | setting | here | on a 7B model | what it does |
# |---|---|---|---|
# | rank r | 8 | 8 to 64, often 16 | how many directions the update may have; parameters and file grow with it |
# | α | 16 | often 2 r | multiplies the update by α/r |
# | target modules | all linear layers | all linear layers | where the update goes; the LoRA paper used only queries and values |
# | learning rate | 10⁻² | 2 · 10⁻⁴ | from a sweep here; large models need smaller ones |
# | weight decay | none | none, or up to 1/100 | AdamW's decay pulls A and B towards zero |
# | batch size | 16 | 8 to 32 | examples per step |
#
# Our learning rate is for a small model and 100 steps: it is no advice for a large one.
# [HYPERPARAMETERS.md](HYPERPARAMETERS.md) has the sources of the third column. And what does LoRA cost on a 7B model?

# %%
shape = memory.SHAPES["llama-2-7b"]
a = shape.adapter(8)  # r (in + out), over all linear layers
print(f"adapter: {a:,} parameters, {2 * a / 1e6:.0f} MB as a file in bfloat16")
print(
    f"weights of {shape.parameters / 1e9:.1f} billion parameters: {2 * shape.parameters / 1e9:.1f} GB; "
    f"gradients and AdamW's averages of the adapter: {12 * a / 1e9:.2f} GB"
)

# %% [markdown]
# That leaves room for activations on a card with 24 GB.
#
# ## Against full fine-tuning
#
# `finetune` now runs the loop, saves what it trained, and measures. Both methods see the same examples in the same order, each at its own best learning rate. *Share of gap* is 0 for the frozen base, and 1 for full fine-tuning.

# %%
ours = finetune(base, task, RECIPES["lora"], RunConfig(seed=0, output=OUT / "lora"))
frozen = finetune(base, task, RECIPES["frozen"], RunConfig(seed=0))
three = {"frozen": frozen, "full": full, "lora": ours}
display(Markdown(report.markdown_table(
    ["method", "trained", "slot accuracy", "share of gap", "forgetting", "kB on disk"],
    [[report.NAMES[name], f"{r.trainable / r.parameters:.1%}", f"{r.score:.2f}",
      f"{(r.score - frozen.score) / (full.score - frozen.score):.2f}",
      f"{r.forgot() or 0:+.2f}", f"{(r.disk_bytes or 0) / 1e3:,.0f}"] for name, r in three.items()],
)))  # fmt: skip
records = compare.load(DATA / "results" / "1m" / "compare.json")
for live in (full, ours):
    others = [r for r in records if r.method == live.method and not r.random_base and r.seed]
    print(live.method, "with other seeds:", [f"{record.score:.2f}" for record in others])
    middle = sum(record.score for record in others) / len(others)
    claim(abs(live.score - middle) < 0.12, f"{live.method} scores like its other seeds")
claim(ours.score > 0.85 * full.score, "LoRA comes close to full fine-tuning")

# %% [markdown]
# LoRA trains a small share of the parameters. With other seeds, the scores of the two methods overlap, so these runs cannot rank them.
#
# But look at the column *forgetting*: the rise of the loss on text like that of pretraining. LoRA forgot more. Is this the method, or the way it was trained? Neither
# run had *weight decay*.
#
# The next figure adds weight decay *towards the start*. AdamW's decay pulls weights towards zero. This one pulls them (for LoRA, A and B) towards their values at step 0. Each step removes a share of the distance: learning rate × decay.
# For each bar, we tried many settings: learning rates, or pairs of rate and decay. Of those with nearly the best slot accuracy on validation examples, we took the one that forgets least. Values: means of ten seeds.

# %%
# (method, learning rate, learning rate × decay), from data/RESULTS.md
settings = [("full", 0.001, 0.0), ("lora", 0.01, 0.0), ("full", 0.004, 0.16), ("lora", 0.04, 0.08)]
rows = [json.loads(line) for line in (DATA / "results" / "finals.jsonl").read_text().splitlines()]

# %%
figure, axis = plt.subplots(figsize=(7, 2.8))
means = []
for y, setting in enumerate(settings):
    runs = [r for r in rows if (r["method"], r["learning_rate"], r["decay"]) == setting]
    values = [r["forgetting"] for r in runs]
    means.append(sum(values) / len(values))
    axis.barh(
        y, means[-1], color=BLUE if setting[0] == "full" else ORANGE, xerr=report.interval(values)
    )
    score = sum(r["score"] for r in runs) / len(runs)
    axis.text(means[-1] + 0.15, y, f"{means[-1]:.2f}  (slot accuracy {score:.2f})", va="center")
labels = [f"{report.NAMES[m]}, {'weight decay' if d else 'no decay'}" for m, _, d in settings]
axis.set(
    yticks=range(4),
    yticklabels=labels,
    xlabel="forgetting (nats per token), 95 % interval",
    xlim=(0, 4.2),
)
axis.invert_yaxis()
report.show(
    figure, "Forgetting: full 1.1 and LoRA 2.4 without decay; full 0.1 and LoRA 0.2 with decay."
)
claim(max(means[2:]) < 0.3 < min(means[:2]), "with weight decay, both forget much less")

# %% [markdown]
# With weight decay, and a learning rate that suits it, both methods forget about a tenth of what they forgot before, at the same slot accuracy. LoRA forgets about twice as much as full fine-tuning, with or without decay.
# A study of large models found that LoRA forgets less, and learns less ([Biderman et al.](https://arxiv.org/abs/2405.09673)), so our result may not generalize. Lesson 09 comes back to it.
# <!-- claim: finals-forgetting -->
#
# And LoRA keeps the base: disable the adapter, and the model is exactly the base again, without the task.

# %%
model = PeftModel.from_pretrained(base.model(), OUT / "lora").eval()
with model.disable_adapter():
    assert torch.equal(model(ids).logits, base.pretrained(ids).logits)
print("adapter disabled: exactly the logits of the base")

# %% [markdown]
# ## Merge it
#
# After training, add (α/r) B A to W. The model is a plain GPT again, as fast as the base.
#
# **Exercise 4.** Write `merge(W, A, B, alpha, r)`. It returns the merged weight, and leaves W unchanged.


# %% tags=["exercise"]
def merge(W, A, B, alpha, r): ...  # return the merged weight


# %% tags=["solution"]
def merge(W, A, B, alpha, r):
    return W + alpha / r * (B @ A)


# %% tags=["check"]
check("02.merge", merge)

# %%
merged = model.merge_and_unload()
logits, after = model(ids).logits, merged(ids).logits
difference = ((logits - after).abs().max() / logits.abs().max()).item()
assert difference < 5e-6
print(f"{type(merged).__name__}; logits differ by {difference:.0e} of the largest one, by rounding")

# %% [markdown]
# ## Summary
#
# - The update of full fine-tuning is more concentrated than a random matrix, and has a long tail.
# - LoRA freezes W and trains (α/r) B A: r · (in + out) parameters per layer, and it starts as the base.
# - Here it comes close to full fine-tuning with a fraction of the parameters.
# - It forgets; here, weight decay towards the start, with a suitable rate, makes that small. With the adapter disabled, the base is back exactly.
# - Merging adds the update to W, so that nothing is slower afterwards.
#
# **Do you remember?** Answer first, then open.
#
# <details><summary>1. Why does LoRA start as the base model?</summary>B is zero, so B A x is zero for every x.</details>
#
# <details><summary>2. You double r and keep α. How do the number of parameters and the scaling change?</summary>Twice as many parameters, and half the scaling α/r.</details>
#
# <details><summary>3. LoRA's weights W are frozen. Does the model forget nothing?</summary>It does forget: with the adapter enabled, its outputs on old text have changed. Only with the adapter disabled it is the base again.</details>
#
# **To read:** [Hu et al. 2021](https://arxiv.org/abs/2106.09685), sections 4 and 7. [LoRA Without Regret](https://thinkingmachines.ai/blog/lora/) (2025)
# asks when LoRA equals full fine-tuning.
#
# # Going further
#
# **Build it yourself.** Write the whole file and have it graded: `python -m minipeft build start lora my` ([BUILD.md](BUILD.md)).
#
# ## Does the tail matter?
#
# Cut each ΔW of full fine-tuning to its r strongest directions, and measure the loss again. This is not LoRA: the update was not trained to have a low rank.

# %%
losses = {}
for r in (0, 1, 2, 4, 8, 16, 32, 64, 128):  # 128: all of ΔW
    model = GPT.from_pretrained(OUT / "full")  # embeddings, LayerNorms and biases stay as tuned
    for name, delta in deltas.items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        model.get_submodule(name).weight.data = (
            weights[name] + (u[:, :r] * s[:r]) @ vh[:r]
        ).detach()
    losses[r] = task_loss(model, task.validation, base.end)["slot_loss"]
    print(f"rank {r:3}: slot loss {losses[r]:.3f}")
print(f"LoRA, trained with rank 8: {ours.validation[-1]['slot_loss']:.3f}")
claim(losses[128] < losses[8] < losses[0] / 4, "8 directions bring the loss most of the way down")
claim(
    ours.validation[-1]["slot_loss"] < losses[8], "training at rank 8 is better than cutting to it"
)

# %% [markdown]
# The tail matters, but each further direction matters less. In these two runs, an update that is trained at rank 8 has a lower loss than one that is cut to rank 8 afterwards.
#
# ## What breaks it: no pretraining
#
# Train a GPT of the same shape that starts from random weights, with one seed. Before you run it, guess: will LoRA learn at least the template tokens, the same few phrases in all examples?

# %%
full_random = finetune(base, task, RECIPES["full"], RunConfig(seed=0, random_base=True))
lora_random = finetune(base, task, RECIPES["lora"], RunConfig(seed=0, random_base=True))

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
for axis, key in zip(axes, ("template_loss", "slot_loss"), strict=True):
    for record, color, style in [
        (full, BLUE, "o-"), (ours, ORANGE, "s-"), (full_random, BLUE, "o--"), (lora_random, ORANGE, "s--"),
    ]:  # fmt: skip
        steps, values = zip(*((p["step"], p[key]) for p in record.validation), strict=True)
        name = report.NAMES[record.method] + (", random base" if record.random_base else "")
        axis.plot(steps, values, style, color=color, label=name)
    axis.set(xlabel="step", title=f"{key.split('_')[0]} tokens", yscale="log")
axes[0].set_ylabel("validation loss (nats per token)")
axes[0].legend(frameon=False)
report.show(
    figure,
    "Loss by step: on a random base, LoRA stays far above full fine-tuning, on template tokens too.",
)
print(f"slot accuracy on a random base: full {full_random.score:.2f}, LoRA {lora_random.score:.2f}")
claim(max(full_random.score, lora_random.score) < 0.1, "without pretraining, both fail")
claim(lora_random.test_template_loss > full_random.test_template_loss, "LoRA fails more")

# %%
# Is the low rank to blame? LoRA also freezes the embeddings, which are random here. Free them.
torch.manual_seed(0)
model = add_my_lora(base.new_model(), r=8, alpha=16)
for name, parameter in model.named_parameters():
    if name.endswith(("wte.weight", "wpe.weight")):
        parameter.requires_grad_(True)
fine_tune(model, batches(), RunConfig(steps=100, learning_rate=lora_random.learning_rate))
freed = task_loss(model, task.test, base.end)["template_loss"]
print(
    f"template loss: LoRA {lora_random.test_template_loss:.2f}, with free embeddings {freed:.2f}, "
    f"full {full_random.test_template_loss:.2f}"
)
claim(freed < lora_random.test_template_loss / 4, "free embeddings repair the template")

# %% [markdown]
# Without pretraining, neither gets the values right in 100 steps, and LoRA does not even learn the template. The low rank is not the reason: in one run where the embeddings are trained too, LoRA of the same rank learns the template about as well as full fine-tuning.
# In this GPT the embeddings are also the output head, and LoRA keeps them as they are. So it needs a base whose frozen parts are useful.
#
# ## More exercises
#
# **Exercise 5.** GPT-2 has 12 layers of width 768. Its layer `c_attn` maps 768 numbers to 3 · 768. How many parameters does LoRA of rank 4 train, on `c_attn` only?

# %% tags=["exercise"]
gpt2 = None

# %% tags=["solution"]
gpt2 = 12 * 4 * (768 + 3 * 768)

# %% tags=["check"]
check("02.gpt2", gpt2)

# %%
with torch.device("meta"):  # the full-size GPT-2, without memory for its weights
    large = get_peft_model(GPT(GPTConfig()), LoraConfig(r=4, target_modules=["c_attn"]))
large.print_trainable_parameters()

# %% [markdown]
# **Exercise 6.** A colleague's program knows no α: it always computes W x + B A x. Write `without_alpha(A, B, alpha, r)`. It returns
# a pair `(A, B)` that gives the same update in that program. Leave the inputs unchanged.


# %% tags=["exercise"]
def without_alpha(A, B, alpha, r): ...  # return A, B


# %% tags=["solution"]
def without_alpha(A, B, alpha, r):
    return A, alpha / r * B


# %% tags=["check"]
check("02.without_alpha", without_alpha)

# %% [markdown]
# **Exercise 7.** Turn an update into a LoRA. Write `extract(delta, r)`: it returns `(A, B)` of rank r such that B A is as close to `delta`
# as possible (in Frobenius norm, so `torch.linalg.svd` gives the answer).


# %% tags=["exercise"]
def extract(delta, r): ...  # return A (r, in), B (out, r)


# %% tags=["solution"]
def extract(delta, r):
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return vh[:r], u[:, :r] * s[:r]


# %% tags=["check"]
check("02.extract", extract)
