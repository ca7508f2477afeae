# %% [markdown]
# # 03 · AdaLoRA
#
# Your server keeps an adapter of a 7B model for each of twenty customers, about 40 MB each (lesson 02).
# LoRA gives each weight matrix the same rank. Perhaps some matrices need more, and others none. But each
# choice of ranks that you try costs a training run. AdaLoRA promises to find them in one.
#
# After this lesson you can
# - write a low-rank update as parts that can be pruned one by one;
# - compute the importance of each part, and say why it contains an uncertainty;
# - train AdaLoRA, and test with a control whether its ranks matter;
# - decide whether to use AdaLoRA in a project.
#
# **Time.** About an hour, and 25 minutes more for "Going further". All results are for a GPT with 1 million parameters.
# [Glossary](README.md#glossary).

# %%
import json
from dataclasses import replace
from itertools import islice, pairwise
from statistics import mean, stdev

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display
from torch import nn

from minipeft import AdaLoraConfig, get_peft_model
from minipeft.grader.lessons import check, claim, hint, solution, solved
from minipeft.grader.lessons.lesson_03 import FINISHED  # for exercises that you skip
from minipeft.lab import DATA, compare, report, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import complete, task_loss, text_loss
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.methods.adalora import RankAllocator, SVDLinear, add_adalora, orthogonality

RED, ORANGE, BLUE, GREY = (report.COLORS[m] for m in ("adalora", "lora", "full", "frozen"))
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
base = load_base(DATA / "base" / "1m")
task = tasks.load_task(base, "describe")

# %% [markdown]
# ## Before you start
#
# Replace `None`, and run both cells.
#
# **1.** LoRA with r = 8 and α = 16 adapts a matrix of shape 384 × 128. At most how many singular values of its update are not zero?

# %% tags=["exercise"]
lora_rank = None

# %% tags=["solution"]
lora_rank = 8  # B A has rank r at most

# %% tags=["check"]
check("03.lora_rank", lora_rank)

# %% [markdown]
# **2.** What made both full fine-tuning and LoRA forget far less: `"rank"`, `"steps"` or `"weight decay"`?

# %% tags=["exercise"]
forgets_less = None

# %% tags=["solution"]
forgets_less = "weight decay"  # it pulls the trained weights towards their values at the start

# %% tags=["check"]
check("03.forgets_less", forgets_less)

# %% [markdown]
# If an answer is wrong, call `hint(1)`, `hint(2)` or `solution()` in a new cell.
#
# ## Who needs more rank?
#
# Each of our GPT's four blocks has two matrices in attention (`c_attn`, `attn.c_proj`) and two in the MLP (`c_fc`, `mlp.c_proj`).
# AdaLoRA gives all 16 the rank 12 at first, and keeps 8 on average. The task is `describe`: copy names from the prompt into sentences.
#
# **Your guess:** which mean rank will the eight attention matrices keep? (The mean of all is 8, so that of the MLPs is 16 minus your number.)

# %%
guess = None  # 4 to 12
reason = ""

# %% [markdown]
# ## Triplets
#
# A *singular value decomposition* (SVD) writes a matrix as a sum of directions, each with its singular value. Each can be removed alone.
# AdaLoRA writes the update in this form, and trains all of it:
#
# $$ W' = W + s \, P \Lambda Q, \qquad P \in \mathbb{R}^{out \times r},\quad \Lambda \text{ diagonal},\quad Q \in \mathbb{R}^{r \times in} $$
#
# A *triplet* is a column p of P, an entry e of Λ, and a row q of Q. It adds s · e · p (q · x) to the output. To prune it, AdaLoRA sets e to zero.
# Λ starts at zero, so the model starts as the base. The scaling s is α divided by the rank at the start.
#
# **Exercise 1.** Write `update(P, E, Q, s)`. `E` holds the diagonal of Λ as a vector of r numbers.


# %% tags=["exercise"]
def update(P, E, Q, s): ...  # return s P Λ Q


# %% tags=["solution"]
def update(P, E, Q, s):
    return s * P @ torch.diag(E) @ Q


# %% tags=["check"]
check("03.update", update)

# %% [markdown]
# minipeft and peft call P, Λ and Q `lora_B`, `lora_E` and `lora_A`. The entries of Λ, times s, are the singular values (up to signs) if the columns of P and
# the rows of Q are *orthonormal*: of length 1, and at right angles. A penalty in the loss pulls them there.

# %%
if not solved("03.update"):  # until yours is right, the lesson uses minipeft's
    update = FINISHED["update"]

torch.manual_seed(0)
P, Q = torch.linalg.qr(torch.randn(6, 3)).Q, torch.linalg.qr(torch.randn(4, 3)).Q.T
E, skew = torch.tensor([2.0, -1.0, 0.5]), torch.randn(3, 4)  # skew: rows not orthonormal
small = AdaLoraConfig(init_r=3, target_r=1, total_step=1, lora_alpha=3)  # s = 3/3
layer = SVDLinear(nn.Linear(4, 6).requires_grad_(False), small)
for name, q in (("Q orthonormal", Q), ("Q not orthonormal", skew)):
    layer.lora_B.data, layer.lora_E.data, layer.lora_A.data = P, E[:, None], q
    assert torch.allclose(layer.delta(), update(P, E, q, 1), atol=1e-4)
    values = torch.linalg.svdvals(update(P, E, q, 1))[:3]
    print(f"{name:18} Λ {E.tolist()}, singular values {[round(v, 2) for v in values.tolist()]}")
assert torch.allclose(torch.linalg.svdvals(update(P, E, Q, 1))[:3], E.abs())

# %% [markdown]
# **Exercise 2.** A triplet was pruned: e is zero, p and q are not. Which of `"p"`, `"e"` and `"q"` get a nonzero gradient from the task's loss? And which of them get one, if
# all three were zero? Answer with lists of names, `[]` for none.

# %% tags=["exercise"]
only_e_zero = None
all_zero = None

# %% tags=["solution"]
only_e_zero = ["e"]  # e's gradient contains p and q; theirs contain e, which is zero
all_zero = []

# %% tags=["check"]
check("03.stays", only_e_zero, all_zero)

# %% [markdown]
# So a pruned triplet can come back: the next step makes e nonzero, then AdaLoRA scores all again. With p and q at zero, it could not.
# After the last pruning, no triplet comes back: every step sets the pruned e to zero.
#
# ## Importance
#
# Should the triplets with the smallest |e| go? AdaLoRA asks instead how much the *loss* depends on them. The *sensitivity* of a weight w (an entry of P, Λ or Q) with gradient g is
# I = |w · g|: its distance from zero, times the slope. It estimates how much the loss would change if w became zero. In this example, size would choose wrongly:

# %%
small = AdaLoraConfig(init_r=2, target_r=1, total_step=1, lora_alpha=2)
layer = SVDLinear(nn.Linear(4, 6).requires_grad_(False), small)
layer.lora_E.data = torch.tensor([[3.0], [0.1]])
layer.lora_A.data = torch.eye(4)[:2]  # the first triplet reads input 0, the second input 1
x = torch.randn(8, 4)
x[:, 0] = 0  # input 0 is always zero
layer(x).square().mean().backward()
print("sensitivity of e:", [f"{v:.1e}" for v in (layer.lora_E * layer.lora_E.grad).abs().flatten()])
RankAllocator({"toy": layer}, small).update_and_allocate(1)  # one of the two may stay
print("Λ was [3.0, 0.1], and is", [round(e, 1) for e in layer.lora_E.flatten().tolist()])
assert layer.lora_E[0] == 0
assert layer.lora_E[1] != 0

# %% [markdown]
# The sensitivity on one batch is noisy. So AdaLoRA smooths it, and tracks how far it jumps from its average. After each optimizer step:
#
# $$ \bar{I} \leftarrow \beta \bar{I} + (1 - \beta)\, I, \qquad \bar{U} \leftarrow \beta\, \bar{U} + (1 - \beta)\, |I - \bar{I}| $$
#
# Ū is the *uncertainty*. It uses the new Ī. Both start at zero. A larger β (below 1) smooths more.
#
# **Exercise 3.** Write `importance(values, beta)`: it returns Ī and Ū after all values. A value is a number or a tensor: `abs()` takes both.


# %% tags=["exercise"]
def importance(values, beta): ...  # return I_bar, U_bar


# %% tags=["solution"]
def importance(values, beta):
    average, uncertainty = 0.0, 0.0
    for value in values:
        average = beta * average + (1 - beta) * value
        uncertainty = beta * uncertainty + (1 - beta) * abs(value - average)
    return average, uncertainty


# %% tags=["check"]
check("03.importance", importance)
if not solved("03.importance"):
    importance = FINISHED["importance"]

# %% [markdown]
# The importance of a weight is the product Ī · Ū. **Why multiply by the uncertainty?** The rule comes from the pruning method [PLATON](https://arxiv.org/abs/2206.12562).
# If a sensitivity jumps from batch to batch, its average is a poor estimate: the weight may matter for examples that were rare so far. Pruning it is a risk; keeping it a little longer
# costs little. So of two weights with the same average, the one that jumps more stays.

# %%
torch.manual_seed(0)
steady, jumping = 1 + 0.05 * torch.randn(100), 2 * (torch.rand(100) < 0.5).float()
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
products = []
for name, values, color, style in (
    ("steady", steady, BLUE, "-"), ("jumping", jumping, ORANGE, "--"),
):  # fmt: skip
    values = values / values.mean()  # the same mean, so only the jumps differ
    pairs = [importance(values[:n].tolist(), 0.85) for n in range(1, 101)]
    products.append(mean(i * u for i, u in pairs[50:]))
    axes[0].plot(range(1, 101), [i for i, _ in pairs], style, color=color, label=name)
    axes[1].plot(range(1, 101), [i * u for i, u in pairs], style, color=color)
    axes[1].text(102, products[-1], f"{name}:\nabout {products[-1]:.2f}", color=color, va="center")
axes[0].legend(frameon=False, loc="lower right")
axes[0].set(title="Ī", yscale="log", ylim=(0.01, 3), xlabel="batch", ylabel="value (log axis)")
axes[1].set(title="Ī · Ū", xlabel="batch")
report.show(
    figure,
    "Two weights, both with a smoothed sensitivity of about 1. The product with the uncertainty is "
    "more than ten times as large for the one that jumps.",
)
claim(products[1] > 5 * products[0], "the product is larger for the weight that jumps")

# %% [markdown]
# The rule has a price: a weight that matters steadily gets a low product. "Going further" tests what Ū changes here.
#
# The score of a triplet is Ī · Ū of its e, plus the means of Ī · Ū over its p and over its q. (Sums would favor wide matrices, whose p and q are long.)
#
# **Exercise 4.** Write `triplet_scores(smooth, jumps)`. They hold Ī and Ū, as dicts of tensors: `"P"` (out, r), `"E"` (r,) and `"Q"` (r, in). Return r numbers.


# %% tags=["exercise"]
def triplet_scores(smooth, jumps): ...  # return one score per triplet


# %% tags=["solution"]
def triplet_scores(smooth, jumps):
    p, e, q = (smooth[key] * jumps[key] for key in "PEQ")
    return e + p.mean(0) + q.mean(1)


# %% tags=["check"]
check("03.scores", triplet_scores)

# %% [markdown]
# ## The budget
#
# All triplets of all matrices compete. The *budget* is how many may stay. (It counts triplets, not parameters.) Here it falls from 16 · 12 = 192 to 16 · 8 = 128:
# it is 128 + 64 (1 − t)³, rounded down. t is 0 up to step `tinit`, then grows evenly. In the last `tfinal` steps, t is 1.
#
# **Exercise 5.** Halfway, at t = 1/2, how many of the 64 triplets are still to be pruned?

# %% tags=["exercise"]
still_to_prune = None

# %% tags=["solution"]
still_to_prune = 64 * (1 - 1 / 2) ** 3

# %% tags=["check"]
check("03.budget", still_to_prune)

# %% [markdown]
# **Exercise 6.** Write `ranks(scores, budget)`. `scores` is a dict: the name of each matrix, and a tensor with the scores of its triplets. Keep the `budget` highest of all matrices together.
# Return a dict with the number that each keeps.


# %% tags=["exercise"]
def ranks(scores, budget): ...  # return {name: rank, …}


# %% tags=["solution"]
def ranks(scores, budget):
    everything = torch.cat([torch.as_tensor(s) for s in scores.values()])
    threshold = everything.sort(descending=True).values[budget - 1]
    return {name: int((torch.as_tensor(s) >= threshold).sum()) for name, s in scores.items()}


# %% tags=["check"]
check("03.ranks", ranks)
if not (solved("03.scores") and solved("03.ranks")):
    triplet_scores, ranks = FINISHED["triplet_scores"], FINISHED["ranks"]

# %% [markdown]
# On a toy, your functions agree with minipeft's `RankAllocator`.

# %%
small = AdaLoraConfig(init_r=3, target_r=1, tinit=2, tfinal=2, total_step=14, target_modules="all-linear")  # fmt: skip
torch.manual_seed(0)
toy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
layers = add_adalora(toy, small)
allocator = RankAllocator(layers, small)
optimizer = torch.optim.AdamW([p for p in toy.parameters() if p.requires_grad], lr=0.05)
x, y = torch.randn(32, 6).double(), torch.randn(32, 4).double()
seen = {(name, k): [] for name in layers for k in "BEA"}  # the sensitivities of P, Λ, Q
for step in range(1, 12):
    ((toy(x) - y).square().mean() + 0.5 * orthogonality(layers)).backward()
    optimizer.step()
    for (name, k), values in seen.items():
        w = getattr(layers[name], f"lora_{k}")
        values.append((w * w.grad).abs().detach().squeeze())  # Λ as a vector
    allocator.update_and_allocate(step)
    optimizer.zero_grad()
    scores = {}
    for name in layers:
        pairs = [importance(seen[name, k], 0.85) for k in "BEA"]
        both = (dict(zip("PEQ", part, strict=True)) for part in zip(*pairs, strict=True))
        scores[name] = torch.as_tensor(list(triplet_scores(*both)))
    assert ranks(scores, allocator.budget(step)) == allocator.ranks()
    print(f"step {step:2}: budget {allocator.budget(step)}, ranks {allocator.ranks()}")

# %% [markdown]
# ## On the GPT
#
# Two lines of the loop are new: the penalty, and `update_and_allocate`, which needs the gradients.

# %%
config = RECIPES["adalora"].config(8, 100)  # mean rank 8 at the end, 100 steps
run = RunConfig(learning_rate=0.02)  # the best of a sweep
# Pruning starts after `tinit` steps and ends `tfinal` steps before the end.
# `orth_reg_weight` multiplies the penalty.
# `beta1` is the β of Ī, and `beta2` that of Ū.
names = ("init_r", "target_r", "lora_alpha", "tinit", "tfinal", "total_step", "orth_reg_weight", "beta1", "beta2")  # fmt: skip
print({name: getattr(config, name) for name in names})


# %%
def adapt(allocator=RankAllocator, penalty=orthogonality, config=config, steps=100, seed=0):
    """Train AdaLoRA. Returns the model, its allocator, and the ranks after each step."""
    torch.manual_seed(seed)
    model, history = base.model(), []
    layers = add_adalora(model, config)
    allocator = allocator(layers, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0)
    for step, batch in enumerate(islice(tasks.shuffled(task.train, 16, seed), steps), 1):
        optimizer.param_groups[0]["lr"] = run.learning_rate_at(step)
        loss = model(**tasks.collate(batch, base.end, "cpu")).loss
        (loss + config.orth_reg_weight * penalty(layers)).backward()
        nn.utils.clip_grad_norm_(parameters, 1)
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
        history.append(allocator.ranks())
    return model.eval(), allocator, history


def score_of(model):
    return task.score(task.test[:64], complete(model, base, task.test[:64]))


# %%
adapted, trained, history = adapt()
live = score_of(adapted)
print("prompt:    ", task.test[0].prompt)
print("base:      ", complete(base.pretrained, base, task.test[:1])[0])
print("AdaLoRA:   ", complete(adapted, base, task.test[:1])[0])
print("reference: ", task.test[0].completion)
print(f"{task.metric}: {live:.2f}")
claim(live > 0.7, "AdaLoRA learns the task")


# %%
steps = range(1, len(history) + 1)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", width_ratios=(3, 2))  # fmt: skip
for part, color, style in ((".attn.", RED, "-"), (".mlp.", GREY, "--")):
    lines = [[r[name] for r in history] for name in history[0] if part in name]
    means = [mean(values) for values in zip(*lines, strict=True)]
    left.plot(steps, means, style, color=color, linewidth=3)
    left.plot(steps, list(zip(*lines, strict=True)), style, color=color, lw=0.7, alpha=0.5)
    label = f"{'MLP' if part == '.mlp.' else 'attention'}: {means[-1]:.1f}"
    left.text(steps[-1], means[-1] + 0.3, label, color=color, ha="right")
if guess is not None:
    left.axhline(guess, color="black", linestyle=":", label="your guess (attention)")
    left.legend(frameon=False, loc="lower left")
left.set(xlabel="step", ylabel="rank (thick: mean of 8)", ylim=(0, 12.5))
kinds = list(dict.fromkeys(name.split(".", 3)[3] for name in history[-1]))
grid = torch.tensor(list(history[-1].values())).view(4, 4).T  # a row per kind, a column per block
right.imshow(grid, cmap="Greys", vmin=0, vmax=18, aspect="auto")
for place in range(16):
    right.text(place % 4, place // 4, int(grid[place // 4, place % 4]), ha="center", va="center")
right.set(
    xticks=range(4), yticks=range(4), yticklabels=kinds, xlabel="block", title="rank at the end"
)
report.show(figure, "Ranks by step, and at the end by matrix: attention keeps less than the MLPs.")

# %% [markdown]
# Attention keeps less. Is that chance? Compare with random pruning, and with three stored runs (other seeds).


# %%
def attention_rank(ranks):
    return mean(rank for name, rank in ranks.items() if ".attn." in name)


lots = [torch.randperm(192, generator=torch.Generator().manual_seed(i))[:128] for i in range(200)]
chance = [torch.bincount(lot // 12, minlength=16).float().std().item() for lot in lots]
print(f"pruned at random: attention 8.0, standard deviation of the 16 ranks {mean(chance):.1f}")
stored = compare.load(DATA / "results" / "1m" / "compare.json")
found = {"this run": history[-1]}  # seed 0
found |= {f"seed {r.seed}": r.ranks for r in stored if r.method == "adalora" and r.seed}
for name, r in found.items():
    print(
        f"{name:8}: attention {attention_rank(r):.1f}, standard deviation {stdev(r.values()):.1f}"
    )
found = found.values()
claim(all(stdev(r.values()) > max(chance) for r in found), "the ranks differ more than by chance")
claim(all(attention_rank(r) < 7.2 for r in found), "attention keeps less rank than the MLPs")

prices = {name: x.in_features + x.out_features + 1 for name, x in trained.layers.items()}
kept = sum(rank * prices[name] for name, rank in history[-1].items())
evenly = sum(8 * (price - 1) for price in prices.values())
print(f"parameters: this run keeps {kept:,}; LoRA with r = 8 trains {evenly:,}")
claim(kept > evenly, "AdaLoRA keeps more parameters than LoRA of the same mean rank")

# %% [markdown]
# The pattern is not chance. (The MLPs' matrices are larger, so AdaLoRA keeps more parameters than LoRA.)
#
# Does attention need an adapter less? We placed LoRA on all layers, on attention alone, or on the MLPs alone, each time with about the same number of parameters.

# %%
rows = [json.loads(line) for line in (DATA / "results" / "placement.jsonl").read_text().splitlines()]  # fmt: skip
by_place, rates = {}, (0.005, 0.01, 0.02)
for method in ("lora", "lora, attention", "lora, mlp"):
    runs = {(r["learning_rate"], r["seed"]): r["score"] for r in rows if r["method"] == method}
    by_place[method] = runs
    means = ", ".join(f"{mean(s for (rate, _), s in runs.items() if rate == at):.2f}" for at in rates)  # fmt: skip
    print(f"{report.name_of(method):16} validation score {means} (learning rates {rates})")
pairs = [(score, by_place["lora, attention"][key]) for key, score in by_place["lora, mlp"].items()]
print(f"MLPs score less than attention in {sum(m < a for m, a in pairs)} of {len(pairs)} pairs")
claim(all(m < a for m, a in pairs), "the MLPs alone score less than attention alone")

# %% [markdown]
# LoRA on attention alone scores higher than on the MLPs alone: the opposite of what the ranks suggest. AdaLoRA scores
# each triplet alone. It never tests a model without triplets in attention. Perhaps attention needs few directions to copy names, but cannot do without them. So here, ranks do not tell which layers are needed.
# <!-- claim: placement-rates -->
#
# ## Do the ranks matter? A control
#
# We replace the scores by random numbers, with three seeds. These never change, so no pruned triplet comes back. **Your guess:** how much slot accuracy will that cost?

# %%
guess_difference = None  # slot accuracy with AdaLoRA's ranks, minus that with random ranks


# %%
class RandomScores(RankAllocator):
    def __init__(self, layers, config):
        super().__init__(layers, config)
        self.fixed = {name: torch.rand(config.init_r) for name in layers}

    def scores(self):
        return self.fixed  # the same in each step


models = {"AdaLoRA": [adapted], "random ranks": []}  # the run above has seed 0
random_allocators = []  # for "Going further"
for seed in (1, 2):
    models["AdaLoRA"].append(adapt(seed=seed)[0])
for seed in (0, 1, 2):
    model, allocator, _ = adapt(RandomScores, seed=seed)
    models["random ranks"].append(model)
    random_allocators.append(allocator)

# %%
live_scores = {name: [score_of(m) for m in made] for name, made in models.items()}
losses = {name: [task_loss(m, task.test, base.end)["slot_loss"] for m in made] for name, made in models.items()}  # fmt: skip
for name in models:
    print(f"{name:13} {task.metric} {', '.join(f'{s:.2f}' for s in live_scores[name])}; "
          f"slot loss {', '.join(f'{loss:.3f}' for loss in losses[name])}")  # fmt: skip
cost = [a - b for a, b in zip(*live_scores.values(), strict=True)]
low, high = mean(cost) - report.interval(cost), mean(cost) + report.interval(cost)
print(f"random ranks cost {mean(cost):.2f} {task.metric}, 95 % interval {low:.2f} to {high:.2f}")
higher = sum(a < b for a, b in zip(*losses.values(), strict=True))
print(f"and have a higher slot loss in {higher} of 3 pairs")
claim(abs(mean(cost)) < 0.12, "random ranks score about the same")

# %% [markdown]
# Now all methods, in stored runs: same data and steps, best learning rates, all 400 test examples (this notebook: 64).

# %%
rows = [r for r in stored if r.method in ("frozen", "full", "lora", "adalora") and not r.random_base]  # fmt: skip
groups = {report.name_of(name): records for name, records in compare.rows(rows).items()}
display(Markdown(report.markdown_table(
    ["method", "runs", "trained", "slot accuracy ± standard deviation", "share of gap"],
    [[name, len(r), f"{r[0].trainable:,}", compare.spread(r, "score"), f"{compare.share_of_gap(rows, r):.2f}"]
     for name, r in groups.items()],
)))  # fmt: skip
figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
scores = {name: [r.score for r in records] for name, records in groups.items() if len(records) > 1}
scores |= {f"{name}, this notebook": values for name, values in live_scores.items()}
for y, values in enumerate(scores.values()):
    color = (BLUE, ORANGE, RED, RED, GREY)[y]
    axis.plot(values, [y] * len(values), "o", mfc="none", color=color)
    half = report.interval(values)
    axis.errorbar(mean(values), y, xerr=[[half], [min(half, 1 - mean(values))]], fmt="s", color=color, capsize=3)  # fmt: skip
    axis.text(1.05, y, f"{mean(values):.2f}", va="center")
if guess_difference is not None:
    expected = mean(live_scores["AdaLoRA"]) - guess_difference
    axis.axvline(expected, color="black", linestyle=":", label="your guess, random ranks")
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
axis.set(yticks=range(5), yticklabels=scores, xlim=(0.75, 1.1), xlabel="slot accuracy on test examples; squares: mean, 95 % interval (cut at 1)")  # fmt: skip
axis.set_xticks([0.8, 0.85, 0.9, 0.95, 1])
axis.set_ylim(4.5, -0.5)
report.show(figure, "Slot accuracy of full, LoRA, AdaLoRA and random ranks: the means are close.")
claim(abs(mean(scores["AdaLoRA"]) - mean(scores["LoRA"])) < 0.08, "AdaLoRA and LoRA are level")

# %% [markdown]
# Random ranks score nearly the same. (Slot loss is higher here, but not with all seeds.) AdaLoRA scores a little below LoRA. So a pattern can be more than chance, without a clear gain in score.
#
# ## Should you use it today?
#
# Not as a first choice. Take LoRA, and spend your time on its learning rate and weight decay.
#
# - **Score:** no advantage here. In peft's [comparison on a 3B model](https://github.com/huggingface/peft/tree/main/method_comparison) (one run per method), AdaLoRA scored less than LoRA.
# - **Forgetting** (see "Going further"): without weight decay, AdaLoRA forgets much less than LoRA. Without decay and without its penalty, it forgets nearly as much as LoRA. With decay, both forget little. <!-- claim: finals-forgetting -->
# - **Cost:** it trains more parameters than it keeps, computes the penalty, and must know the number of steps in advance.
#
# The paper reports gains over LoRA, especially with small budgets.
#
# ## Summary
#
# - AdaLoRA writes the update as s P Λ Q, and prunes triplets by setting their e to zero.
# - The importance of a weight is its smoothed |w · g|, times the uncertainty of this number.
# - A pruned triplet can come back until the last pruning, because p and q are not zero.
# - Attention kept less rank than the MLPs. Still, LoRA on attention alone scored higher than on MLPs alone.
# - With random ranks, three runs scored about as well. Three pairs cannot exclude a cost.
#
# **Do you remember?** Answer first, then open.
#
# <details><summary>1. Why does AdaLoRA set only e to zero, and not p and q?</summary>Then e still gets a gradient, and the triplet can come back.</details>
#
# <details><summary>2. Two weights have the same average sensitivity, but one jumps between batches. Which has the higher importance, and why?</summary>The one that jumps: its average is less certain, so pruning it is riskier.</details>
#
# <details><summary>3. Suppose AdaLoRA gives the last layers most rank. What do you ask?</summary>Do other seeds agree? And does a run with random ranks score less?</details>
#
# **To read:** the paper, [Zhang et al. 2023](https://arxiv.org/abs/2303.10512), section 3.
#
# # Going further
#
# ## The effect of the penalty
#
# AdaLoRA's penalty is the mean over all P and Q of the distance from orthonormal, ‖Pᵀ P − I‖ or ‖Q Qᵀ − I‖ (Frobenius norms). First: are the entries of Λ singular values? Compare the run
# above with one without the penalty.

# %%
_, no_penalty, _ = adapt(config=replace(config, orth_reg_weight=0.0))
largest = {}
for name, allocator in (("with penalty", trained), ("without", no_penalty)):
    layer = allocator.layers["transformer.h.0.mlp.c_fc"]
    values = torch.linalg.svdvals(layer.delta().detach())[:4].tolist()
    entries = (layer.lora_E.detach().abs() * layer.lora_alpha / layer.divisor).flatten()
    entries = entries.sort(descending=True).values[:4].tolist()
    largest[name] = values[0] / entries[0]
    print(f"{name:12} singular values of the update {[round(v, 2) for v in values]}")
    print(f"{'':12} s · |e|                       {[round(e, 2) for e in entries]}")
claim(abs(largest["with penalty"] - 1) < 0.1, "with the penalty, Λ holds the singular values")
claim(largest["without"] > 2, "without it, Λ does not")
finals = [json.loads(line) for line in (DATA / "results" / "finals.jsonl").read_text().splitlines()]
for name, method in (("with penalty", "adalora"), ("without", "adalora, no penalty")):
    setting = (method, run.learning_rate, 0.0)
    norms = [r["update_norm"] for r in finals if (r["method"], r["learning_rate"], r["decay"]) == setting]  # fmt: skip
    print(
        f"{name:12} norm of the whole update, mean of {len(norms)} stored runs: {mean(norms):.0f}"
    )

# %% [markdown]
# With the penalty they agree in this matrix. Without it, the update is much larger than Λ says. The stored runs show that the penalty also keeps the whole update small, probably because p and q stay near length 1, so that mostly e grows.
#
# A smaller update may also forget less. The figure shows forgetting with and without weight decay, ten runs per point. All settings were chosen to score at least 90 % on validation examples.

# %%
settings = {  # (learning rate, learning rate × decay), from data/RESULTS.md
    "full": [(0.001, 0.0), (0.004, 0.32)], "LoRA": [(0.01, 0.0), (0.08, 0.32)],
    "AdaLoRA": [(0.02, 0.0), (0.04, 0.04)], "AdaLoRA, no penalty": [(0.02, 0.0), (0.08, 0.16)],
}  # fmt: skip
figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
forgets = {}
for y, (name, pair) in enumerate(settings.items()):
    for setting, marker, color in zip(pair, "so", ("black", RED), strict=True):
        key = (name.replace("LoRA", "lora").replace("Ada", "ada"), *setting)
        values = [r["forgetting"] for r in finals if (r["method"], r["learning_rate"], r["decay"]) == key]  # fmt: skip
        forgets[name, marker] = mean(values)
        axis.errorbar(mean(values), y, xerr=report.interval(values), fmt=marker, color=color)
        axis.text(mean(values), y - 0.15, f"{mean(values):.2f}", color=color, ha="center")
for marker, color, label in (
    ("s", "black", "no decay"),
    ("o", RED, "weight decay towards the start"),
):
    axis.plot([], [], marker, color=color, label=label)
axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, 1.25), ncols=2)
axis.set(yticks=range(4), yticklabels=settings, ylim=(3.4, -0.6), xscale="log", xlim=(0.06, 4), xlabel="forgetting (nats per token), 95 % interval")  # fmt: skip
axis.set_xticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
report.show(figure, "Forgetting: without decay 1.1, 2.4, 0.3 and 2.0; with decay all below 0.2.")
claim(forgets["AdaLoRA", "s"] < 0.5 < forgets["AdaLoRA, no penalty", "s"], "the penalty decides")
claim(max(v for (_, m), v in forgets.items() if m == "o") < 0.3, "with decay, all forget little")

# %% [markdown]
# Without decay, the penalty decides: without it, AdaLoRA forgets about as much as LoRA. With decay, all four forget little, and full fine-tuning least. So here AdaLoRA forgets less because of its penalty, and not because of its triplets or ranks.
# (These runs do not show whether the small update is the reason.) <!-- claim: finals-forgetting -->
#
# The penalty asks for two things: unit lengths and right angles.
#
# **Exercise 7, harder.** Write `angles(layers)`, a penalty for the angles only. Each matrix holds vectors: the rows of `lora_A`, the columns of `lora_B`. For each of them, make a square table
# of the inner products of its vectors, each with each. Set the diagonal to zero, and take the Frobenius norm, `.norm()`. Return the mean over all matrices.


# %% tags=["exercise"]
def angles(layers): ...  # layers: {name: SVDLinear}; return a tensor with a gradient


# %% tags=["solution"]
def angles(layers):
    matrices = [m for layer in layers.values() for m in (layer.lora_A, layer.lora_B.T)]
    products = [m @ m.T for m in matrices]  # the squared lengths are on the diagonal
    return sum((p - torch.diag(p.diagonal())).norm() for p in products) / len(products)


# %% tags=["check"]
check("03.angles", angles)

# %% [markdown]
# Try it: `model, *_ = adapt(penalty=angles)`, and then `text_loss(model, base.held_out) - text_loss(base.pretrained, base.held_out)` is its forgetting. Guess first, then compare with the squares in the last figure. If it is near AdaLoRA's, right angles are enough.
# If it is near the value without a penalty, unit lengths are needed. In between, both help. (Inner products also grow with the lengths, so this penalty is not only about angles.)
#
# ## Does the uncertainty matter?
#
# We look at the models with random ranks. They have Ī and Ū too, but were not pruned by them. Each kept 128 triplets. Suppose that 64 of these must go. We choose them by the score, by Ī alone, or by |e|, always the lowest. How much do the three choices agree?

# %%
for seed, allocator in enumerate(random_allocators):
    scores, rules = RankAllocator.scores(allocator), {"score": [], "Ī": [], "|e|": []}
    for name, layer in allocator.layers.items():
        stays = allocator.kept[name]
        a, e, b = (allocator.importance[name, k] for k in "AEB")
        rules["score"].append(scores[name][stays])
        rules["Ī"].append((e[:, 0] + a.mean(1) + b.mean(0))[stays])
        rules["|e|"].append(layer.lora_E.detach().abs()[stays, 0])
    lowest = [set(torch.cat(v).topk(64, largest=False).indices.tolist()) for v in rules.values()]
    by_average, by_size = len(lowest[0] & lowest[1]), len(lowest[0] & lowest[2])
    print(f"seed {seed}: of the 64 with the lowest scores, {by_average} also have the lowest Ī, "
          f"and {by_size} the smallest |e| (at random: 32)")  # fmt: skip
    claim(by_average > max(by_size, 54), "without Ū the choice is almost the same")

# %% [markdown]
# In these models, the choice by Ī alone is nearly the same, so the uncertainty hardly matters there. The choice by |e| differs more. (We did not train an AdaLoRA that prunes by Ī alone.)
#
# ## Another task
#
# Do the ranks depend on the task, or only on the shapes of the matrices?

# %%
sentiment = compare.load(DATA / "results" / "1m" / "sentiment" / "compare.json")
for name, records in (("describe", stored), ("sentiment", sentiment)):
    found = [r.ranks for r in records if r.method == "adalora"]
    matrix = torch.corrcoef(torch.tensor([list(r.values()) for r in found]).float())
    print(
        f"{name:9} four seeds: attention {min(map(attention_rank, found)):.1f} to "
        f"{max(map(attention_rank, found)):.1f}, standard deviation {mean(stdev(r.values()) for r in found):.1f} "
        f"(pruned at random: {mean(chance):.1f}), "
        f"two seeds correlate by {(matrix.sum() - 4) / 12:.2f}"
    )
    claim(
        name == "describe" or min(map(attention_rank, found)) > 7, "sentiment has another pattern"
    )

# %% [markdown]
# The same base, shapes, learning rate and number of steps, but other ranks: the shapes alone do not decide them. On `sentiment` they are flatter, and the seeds agree less. Two tasks are few.
#
# ## What breaks it: too few calls
#
# Two mistakes: `update_and_allocate` is never called; or training ends long before `total_step`. Nothing is pruned, and no error appears during training. minipeft refuses to merge or save such an adapter:

# %%
for calls in (False, True):
    model = get_peft_model(base.model(), replace(config, total_step=1000)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(1, 4):  # too few steps; this model adds the penalty to its loss
        model(**tasks.collate(task.train[:16], base.end, "cpu")).loss.backward()
        optimizer.step()
        if calls:
            model.update_and_allocate(step)
    try:
        model.merge_and_unload()
        raise AssertionError("it was merged")
    except RuntimeError as error:
        print(f"update_and_allocate called: {calls}\n{error}\n")

# %% [markdown]
# ## One more exercise
#
# **Exercise 8.** GPT-2 has 12 layers of width 768. Its layer `c_attn` maps 768 numbers to 3 · 768. AdaLoRA adapts only `c_attn`, from rank 16 to a mean of 8.
# How many parameters does it train at first?

# %% tags=["exercise"]
gpt2 = None

# %% tags=["solution"]
gpt2 = 12 * 16 * (768 + 3 * 768 + 1)

# %% tags=["check"]
check("03.gpt2", gpt2)
