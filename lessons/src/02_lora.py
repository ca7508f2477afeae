# %% [markdown]
# # 02 · LoRA: the change of a weight is thin
#
# After this lesson you can
# - say what LoRA adds to a layer, and write it in a few lines;
# - count its parameters before you train it;
# - show on a real model that it starts as the base, that nothing else is trained, and that merging changes nothing;
# - measure what it gains and what it costs against full fine-tuning;
# - say when it fails.
#
# **Paper.** Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685.
#
# **Time.** Twenty minutes to read, two to run, forty for the exercises.

# %%
import inspect

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

from minipeft import GPT, GPTConfig, LoraConfig, PeftModel, get_peft_model, lora
from minipeft.lab import DATA, compare, report, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import task_loss
from minipeft.lab.finetune import build_model, finetune
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.lab.train import train
from minipeft.targets import find_targets

BLUE, ORANGE, GREY = (report.COLORS[name] for name in ("full", "lora", "frozen"))
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
OUT = DATA.parent / "out" / "02"  # what this lesson saves; git does not look there
base = load_base(DATA / "base" / "1m")
task = tasks.load_task(base, "describe")
print(task.train[5].prompt, "\n ->", task.train[5].completion)

# %% [markdown]
# The base is a small GPT that was pretrained on the text of a little world. The task is new to it: to turn
# facts into sentences. Owner, cook and guest are all people, so it must read which name belongs to which word,
# and the names in the test stand in no training prompt.
#
# The tokens that the sentences take from the facts are the *slots*, all others the *template*. *Slot accuracy* is the share
# of facts that the model's own text states rightly. *Slot loss* is milder: there the model is given the right
# words so far, and only has to go on.
#
# ## A question first
#
# Fine-tune the whole model. Each weight matrix W becomes W + ΔW. A matrix whose shorter side is 128 can change in
# 128 independent directions; the *singular values* of ΔW tell how much it changed in each. Add up their squares,
# largest first, and you see how few directions hold how much of the change.
#
# **Your guess:** how many of the 128 directions hold nine tenths of ΔW?

# %%
guess = 64  # directions out of 128: put your own number here before you go on

# %%
# full fine-tuning, a hundred steps of sixteen examples: we keep what was measured, and the model
full = finetune(base, task, RECIPES["full"], RunConfig(seed=0, output=OUT / "full"))
tuned, start = GPT.from_pretrained(OUT / "full"), base.model()
print(f"{task.metric} {full.score:.2f}   (expect above 0.9)")

# %%
names = list(find_targets(start, "all-linear"))
before, after = dict(start.named_modules()), dict(tuned.named_modules())
deltas = {name: (after[name].weight - before[name].weight).detach() for name in names}


def energy(matrix):
    """The share of the squared singular values in the largest 1, 2, 3, … of them."""
    squares = torch.linalg.svdvals(matrix).square()
    return squares.cumsum(0) / squares.sum()


curve = torch.stack([energy(delta) for delta in deltas.values()]).mean(0)
dice = torch.Generator().manual_seed(0)
random = [energy(torch.randn(delta.shape, generator=dice)) for delta in deltas.values()]
noise = torch.stack(random).mean(0)
directions = int((curve < 0.9).sum()) + 1
print(f"nine tenths of the change lie in {directions} directions of 128; you guessed {guess}")
print(f"the largest 8 hold {curve[7]:.0%} (of random matrices: {noise[7]:.0%})")
assert curve[7] > 2 * noise[7]

# %%
plt.plot(range(1, 129), curve, color=BLUE, label="ΔW of full fine-tuning, mean over the layers")
plt.plot(range(1, 129), noise, "--", color=GREY, label="random matrices of the same shapes")
plt.axvline(guess, color="black", linewidth=1, linestyle=":", label="your guess")
plt.axhline(0.9, color="black", linewidth=0.5)
plt.xlabel("directions (singular values, largest first)")
plt.ylabel("share of the squared change")
plt.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

# %% [markdown]
# The change is far from noise: a few directions hold much of it. But it has a long tail. Does the tail matter?
# Cut ΔW down to its r largest directions and ask the model again. This is not LoRA yet: here a change is made
# thin that was not trained to be thin.


# %%
def cut(matrix, r):
    """The nearest matrix of rank r."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :r] * s[:r] @ vh[:r]


ranks, losses = [0, 1, 2, 4, 8, 16, 32, 64, 128], []  # 128 is all of ΔW
for r in ranks:
    thin = GPT.from_pretrained(OUT / "full")  # embeddings and biases stay as they were tuned
    modules = dict(thin.named_modules())
    for name, delta in deltas.items():
        modules[name].weight.data = before[name].weight + cut(delta, r)
    losses.append(task_loss(thin, task.validation, base.end)["slot_loss"])
for r, loss in zip(ranks, losses, strict=True):
    print(f"rank {r:3}: slot loss {loss:.3f}")
assert losses[-1] < losses[ranks.index(8)] < losses[0] / 4

# %% [markdown]
# The tail does matter, but each further direction matters less: eight bring the loss most of the way down.
#
# ## The idea
#
# So do not learn ΔW; learn two thin matrices whose product it is:
#
# $$ y = W x + \frac{\alpha}{r} \, B A x, \qquad A \in \mathbb{R}^{r \times in},\; B \in \mathbb{R}^{out \times r} $$
#
# W is frozen. A starts at random and B at zero, so at first nothing has changed. The number α is chosen, not
# learned; divided by r, it is meant to keep the change about as large when you try another r. A and B together
# have r · (in + out) numbers where W has in · out. Here they are, to scale, for the layer that makes queries, keys and values:

# %%
figure, axis = plt.subplots(figsize=(6, 3.6))
for x, width, height, color, text in [
    (0, 128, 384, "#c9c9c9", "W, frozen\n384 × 128"),
    (260, 8, 384, ORANGE, "B\n384 × 8"),
    (340, 128, 8, ORANGE, "A\n8 × 128"),
]:
    axis.add_patch(plt.Rectangle((x, -height), width, height, color=color))
    axis.text(x + width / 2, 12, text, ha="center")
axis.text(190, -200, "+   α/r ·", ha="center")
axis.set(xlim=(-10, 480), ylim=(-390, 80), aspect="equal")
axis.axis("off")
plt.show()

# %% [markdown]
# ## By hand
#
# A toy layer with four inputs and six outputs, and a rank of two.

# %%
torch.manual_seed(0)
W, x = torch.randn(6, 4), torch.randn(3, 4)
A, B, alpha, r = torch.randn(2, 4), torch.randn(6, 2), 4, 2

beside = x @ W.T + alpha / r * (x @ A.T @ B.T)  # LoRA: the thin path beside W
merged = x @ (W + alpha / r * B @ A).T  # the same, with B A added to W
assert torch.allclose(beside, merged, atol=1e-5)

layer = torch.nn.Linear(4, 6, bias=False)
layer.weight.data = W
ours = lora.LoraLinear(layer, LoraConfig(r=2, lora_alpha=4))
ours.lora_A.weight.data, ours.lora_B.weight.data = A, B
assert torch.allclose(ours(x), beside, atol=1e-5)
print("by hand, merged, and minipeft's layer: the same numbers")

# %% [markdown]
# ## The real file
#
# `minipeft/methods/lora.py` imports torch and nothing else; copy it where you like. This is its layer. Beyond the two
# lines above, its equations (1) and (3), it knows dropout, another scale (`use_rslora`), a base of either layout
# (`matrix` gives its W as (out, in)), and merging that can be taken back to the bit. It does not freeze W:
# `get_peft_model` does that, for the whole model at once.

# %%
print(inspect.getsource(lora.LoraLinear))

# %% [markdown]
# ## On the GPT
#
# Three promises, each checked: it starts as the base, only A and B are trained, and their number is the formula's.
# `all-linear` means every linear layer but the output head.

# %%
ids = torch.tensor([base.tokenizer.encode(task.test[0].prompt).ids])
model = base.model()
plain = model(ids).logits
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config)
assert torch.equal(model(ids).logits, plain)
print("the same logits, to the bit")

# %%
trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
model(ids, labels=ids).loss.backward()
assert all("lora_A" in name or "lora_B" in name for name in trained)
assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
formula = sum(8 * sum(before[name].weight.shape) for name in names)  # r (in + out), each layer
assert formula == sum(p.numel() for p in trained.values())
model.print_trainable_parameters()

# %% [markdown]
# ## Against full fine-tuning
#
# The same examples in the same order, the same number of steps, and for each its own learning rate from a sweep
# that took the same care with both (`data/results/sweep.json`). One seed runs here. The others were run by
# `python -m minipeft compare --seeds 4 --output data/results/1m`; the second cell checks that this one is like
# them: within three standard deviations of their mean, and a small margin.

# %%
thin = finetune(base, task, RECIPES["lora"], RunConfig(seed=0, output=OUT / "lora"))
frozen = finetune(base, task, RECIPES["frozen"], RunConfig(seed=0))
print(f"LoRA: {task.metric} {thin.score:.2f}   (expect above 0.85)")
print(f"the frozen base: {frozen.score:.2f}")

# %%
records = compare.load(DATA / "results" / "1m" / "compare.json")
for live in (full, thin):
    others = [
        r for r in records if r.method == live.method and not r.random_base and r.seed != live.seed
    ]
    assert compare.in_spread(live, others), "this run is unlike the other seeds"
    print(live.method, [f"{record.score:.2f}" for record in others], f"and here {live.score:.2f}")

# %% tags=["timing"]
display(Markdown(compare.table([frozen, full, thin], task)))

# %%
report.compare_figure(compare.rows([frozen, full, thin]), task)

# %% [markdown]
# Read the table from left to right. LoRA trains a few percent of the numbers, and its file is as much smaller.
# It comes close in slot accuracy: look above how far its own seeds lie apart. *Share of gap* puts the frozen base at zero and full
# fine-tuning at one.
#
# Now look at *forgetting*, the rise of the loss on the pretraining text: with its adapter on, LoRA has forgotten
# more than full fine-tuning. That says little about the *method* yet: neither of these runs had any regularizer. With weight decay
# towards the initial weights, both forget a small part of this (`data/RESULTS.md` compares them at equal score). A paper named below found that
# LoRA forgets less on a much larger model. Frozen weights are no memory by themselves. But LoRA has a switch: with the
# adapter off, the base is back, bit for bit.

# %%
share = compare.share_of_gap([frozen, full, thin], [thin])
forgotten = thin.forgetting
print(f"LoRA closes {share:.0%} of the gap")
print("loss on the pretraining text:", {name: f"{loss:.3f}" for name, loss in forgotten.items()})
print(f"full fine-tuning: {full.forgetting['on']:.3f}")
trained, made = thin.validation[-1]["slot_loss"], losses[ranks.index(8)]
print(f"slot loss at rank 8: trained as LoRA {trained:.3f}, cut out of full fine-tuning {made:.3f}")
assert share > 0.7
assert trained < made
assert forgotten["on"] > full.forgetting["on"]
assert forgotten["off"] == forgotten["base"] < forgotten["on"]

# %% [markdown]
# Merging adds (α/r) B A to a copy of W. The model is then a plain GPT again, as fast as the base, and says the same.

# %%
model = PeftModel.from_pretrained(base.model(), OUT / "lora").eval()
merged = model.merge_and_unload()
difference = (model(ids).logits - merged(ids).logits).abs().max() / model(ids).logits.abs().max()
print(
    f"{type(merged).__name__}, relative difference {difference:.1e} (rounding: expect below 5e-6)"
)
assert difference < 5e-6

# %% [markdown]
# ## What breaks it
#
# "A thin change is enough" sounds as if LoRA could learn anything. Take one thing away: the pretraining. The same
# GPT with random weights, the same task, the same steps. Full fine-tuning can change every weight.
# LoRA must make do with a thin change of random ones.
#
# **Guess again** before you run it: where do the two dashed lines end, on the tokens of the template, which are the
# same few phrases in all examples?

# %%
full_random = finetune(base, task, RECIPES["full"], RunConfig(seed=0, random_base=True))
thin_random = finetune(base, task, RECIPES["lora"], RunConfig(seed=0, random_base=True))

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
for axis, key in zip(axes, ("template_loss", "slot_loss"), strict=True):
    for record, color, style in [
        (full, BLUE, "o-"), (thin, ORANGE, "s-"), (full_random, BLUE, "o--"), (thin_random, ORANGE, "s--"),
    ]:  # fmt: skip
        where = "on a random base" if record.random_base else "on the pretrained base"
        points = record.validation
        label = f"{record.method}, {where}"
        axis.plot(
            [p["step"] for p in points], [p[key] for p in points], style, color=color, label=label
        )
    axis.set(xlabel="step", title=f"{key.split('_')[0]} tokens", ylim=(0, None))
axes[0].set_ylabel("validation loss (nats per token)")
axes[0].legend(frameon=False)
plt.show()

# %%
for record in (full_random, thin_random):
    print(
        f"{record.method:5} on a random base: template loss {record.test_template_loss:.2f}, "
        f"slot loss {record.test_slot_loss:.2f}, {task.metric} {record.score:.2f}"
    )
assert full_random.score < 0.5 * full.score
assert thin_random.score < 0.5 * full.score
assert thin_random.test_template_loss > full_random.test_template_loss

# %%
# Is it that the change is thin? LoRA also freezes the embeddings, which are the output head too,
# and here they are random. Set them free, beside the same A and B, and train again.
run = RunConfig(seed=0, random_base=True, learning_rate=thin_random.learning_rate)
free = build_model(base, RECIPES["lora"], run)
for name, parameter in free.named_parameters():
    if name.endswith(("wte.weight", "wpe.weight")):
        parameter.requires_grad_(True)
order = tasks.shuffled(task.train, 16, 0)
batches = ([tasks.collate(part, base.end, free.device)] for part in order)
train(free, batches, run, title="embeddings free")
freed = task_loss(free, task.test, base.end)
print(
    f"embeddings free: template loss {freed['template_loss']:.2f}, slot loss {freed['slot_loss']:.2f}"
)
assert freed["template_loss"] < thin_random.test_template_loss / 4
assert freed["slot_loss"] < thin_random.test_slot_loss - 1

# %% [markdown]
# Without pretraining neither learns names in a hundred steps, and LoRA does not even learn the template as well as
# full fine-tuning does. But the rank is not to blame: once the embeddings may move, the same thin A and B come
# close to full fine-tuning of the random model. LoRA needs something *worth freezing*. That is why it works on
# models that know a lot, and it is no way to pretrain one.
#
# ## Exercises
#
# Each has a cell that checks your answer. The solutions are in `solutions/02_lora.ipynb`.
# After them, write `lora.py` yourself and have it graded: `python -m minipeft build start lora my`. Its first three tasks are the exercise `MyLora` again, in the real file. The page `lessons/BUILD.md` says how.
#
# **1 · Warm-up.** GPT-2 has 12 layers of width 768; its `c_attn` takes 768 numbers and gives 3 · 768. How many
# parameters does LoRA of rank 4 on `c_attn` alone train?

# %% tags=["exercise"]
count = None  # your number, or an expression

# %% tags=["wrong"]
count = 12 * 4 * 768 * 3 * 768

# %% tags=["wrong"]
count = 4 * (768 + 3 * 768)

# %% tags=["solution"]
count = 12 * 4 * (768 + 3 * 768)

# %% tags=["check"]
if count is None:
    print("not done yet")
else:
    with torch.device("meta"):  # the full-size GPT-2, without memory for its weights
        large = get_peft_model(GPT(GPTConfig()), LoraConfig(r=4, target_modules=["c_attn"]))
    assert count != 12 * 4 * 768 * 3 * 768, (
        "that is r · in · out: the matrices are thin, so add, do not multiply"
    )
    assert count != 4 * (768 + 3 * 768), "that is one layer"
    assert count == large.get_nb_trainable_parameters()[0], (
        "r (in + out), once for each of the 12 layers"
    )
    print(f"right: {count:,}")

# %% [markdown]
# **2 · Merge.** Write `merge(W, A, B, alpha, r)`: the weight of the merged layer. Leave W as it is.


# %% tags=["exercise"]
def merge(W, A, B, alpha, r): ...  # return the merged weight


# %% tags=["wrong"]
def merge(W, A, B, alpha, r):
    return W + B @ A


# %% tags=["wrong"]
def merge(W, A, B, alpha, r):
    return W + alpha * B @ A


# %% tags=["solution"]
def merge(W, A, B, alpha, r):
    return W + alpha / r * B @ A


# %% tags=["check"]
W, A, B = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
copy = W.clone()
answer = merge(W, A, B, alpha=9, r=2)
if answer is None:
    print("not done yet")
else:
    assert torch.equal(W, copy), "W was written into: unmerging could not give its bits back"
    assert answer.shape == W.shape, f"the shape must be {tuple(W.shape)}: B (6, 2) times A (2, 4)"
    assert not torch.allclose(answer, W + B @ A), "the scale α / r is missing"
    assert not torch.allclose(answer, W + 9 * B @ A), "scaled by α: it must be α / r"
    assert not torch.allclose(answer, 4.5 * B @ A), "that is the change alone: W is missing"
    assert torch.allclose(answer, W + 4.5 * B @ A, atol=1e-5), "it must be W + (α / r) B A"
    print("right: merged in one line")

# %% [markdown]
# **3 · Why one zero?** B starts at zero, A at random. In the very first backward pass, which of the two gets a gradient
# that is not zero? And if both started at zero? Answer before you look at the check.

# %% tags=["exercise"]
first_step = None  # when B is zero and A is not: {"A": True or False, "B": True or False}
both_zero = None  # when both are zero: the same form

# %% tags=["wrong"]
first_step = {"A": True, "B": True}
both_zero = {"A": False, "B": False}

# %% tags=["wrong"]
first_step = {"A": False, "B": True}
both_zero = {"A": True, "B": True}

# %% tags=["solution"]
first_step = {"A": False, "B": True}  # A's gradient has the factor B, B's has the factor A x
both_zero = {"A": False, "B": False}  # so nothing would ever move

# %% tags=["check"]


def moved(a, b):
    """Whether A and B get gradients that are not zero, starting from these values."""
    layer = lora.LoraLinear(torch.nn.Linear(4, 6), LoraConfig(r=2, lora_alpha=2))
    layer.lora_A.weight.data, layer.lora_B.weight.data = a, b
    layer(torch.ones(3, 4)).square().sum().backward()
    return {"A": bool(layer.lora_A.weight.grad.any()), "B": bool(layer.lora_B.weight.grad.any())}


if first_step is None or both_zero is None:
    print("not done yet")
else:
    truth = moved(torch.randn(2, 4), torch.zeros(6, 2))
    assert first_step == truth, "the gradient of A has B as a factor; the gradient of B has A x"
    assert both_zero == moved(torch.zeros(2, 4), torch.zeros(6, 2)), (
        "each one's gradient has the other as a factor"
    )
    print("right: with one zero it can learn, with two nothing ever moves")

# %% [markdown]
# **4 · LoRA on your own.** Write the module without looking: it takes an `nn.Linear`, freezes it, starts as the
# layer it wraps, and adds (α/r) B A x. Name your two matrices `self.A` and `self.B`.


# %% tags=["exercise"]
class MyLora(torch.nn.Module):
    def __init__(self, base_layer, r, alpha):
        super().__init__()
        self.base_layer = base_layer
        # your A (r, in) and B (out, r): parameters, or linear layers without bias

    def forward(self, x): ...  # W x + b, and beside it (α/r) B A x


# %% tags=["wrong"]
class MyLora(torch.nn.Module):
    def __init__(self, base_layer, r, alpha):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.A = torch.nn.Parameter(torch.zeros(r, base_layer.in_features))
        self.B = torch.nn.Parameter(torch.zeros(base_layer.out_features, r))

    def forward(self, x):
        return self.base_layer(x) + x @ self.A.T @ self.B.T


# %% tags=["wrong"]
class MyLora(torch.nn.Module):
    def __init__(self, base_layer, r, alpha):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.A = torch.nn.Parameter(torch.randn(r, base_layer.in_features))
        self.B = torch.nn.Parameter(torch.zeros(base_layer.out_features, r))

    def forward(self, x):
        return self.base_layer(x) + x @ self.A.T @ self.B.T


# %% tags=["solution"]
class MyLora(torch.nn.Module):
    def __init__(self, base_layer, r, alpha):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.A = torch.nn.Parameter(torch.randn(r, base_layer.in_features) / r**0.5)
        self.B = torch.nn.Parameter(torch.zeros(base_layer.out_features, r))
        self.scale = alpha / r

    def forward(self, x):
        return self.base_layer(x) + self.scale * (x @ self.A.T @ self.B.T)


# %% tags=["check"]
linear, x = torch.nn.Linear(10, 7), torch.randn(64, 10)
mine = MyLora(linear, r=3, alpha=5)
if mine(x) is None:
    print("not done yet")
else:
    assert torch.allclose(mine(x), linear(x), atol=1e-6), (
        "at the start it must answer as the layer does: is B zero, and is W x + b all there?"
    )
    numbers = sum(p.numel() for p in mine.parameters() if p.requires_grad)
    assert numbers != 3 * 17 + 77, "the layer is not frozen"
    assert numbers == 3 * 17, f"r (in + out) is 51 trainable numbers, yours are {numbers}"
    optimizer = torch.optim.Adam([p for p in mine.parameters() if p.requires_grad], lr=0.05)
    goal = linear(x).detach() + x @ torch.ones(10, 7) / 10  # a change of rank one
    for _ in range(300):
        optimizer.zero_grad()
        loss = (mine(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-2, f"it did not learn, loss {loss:.3f}: did A and B both start at zero?"
    A, B = (getattr(matrix, "weight", matrix) for matrix in (mine.A, mine.B))
    assert (A.shape, B.shape) == ((3, 10), (7, 3)), "A must be (r, in) and B (out, r)"
    assert torch.allclose(mine(x) - linear(x), 5 / 3 * x @ A.T @ B.T, atol=1e-4), (
        "it adds something else than (α / r) B A x: is the scale right?"
    )
    print(f"right: it learned a change of rank one, loss {loss:.1e}")

# %% [markdown]
# ## Summary, at this size
#
# - The change that full fine-tuning makes is thin in part: a few directions hold much of it, and a long tail the rest.
# - LoRA writes the change as (α/r) B A, trains r · (in + out) numbers a layer, and starts as the base, to the bit.
# - It comes close to full fine-tuning on a task that the pretrained base is ready for.
# - With the adapter on it forgets, and weight decay decides how much; switched off, the base is back, bit for bit.
# - On a random base it fails, less for its rank than for what it freezes: random embeddings.
#
# **To read:** the LoRA paper, sections 4 and 7; Biderman et al. 2024, *LoRA Learns Less and Forgets Less*,
# arXiv 2405.09673; Shuttleworth et al. 2024 on intruder dimensions, arXiv 2410.21228.
