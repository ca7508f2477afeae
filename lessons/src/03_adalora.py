# %% [markdown]
# # 03 · AdaLoRA: the same rank everywhere?
#
# After this lesson you can
# - write a low-rank change as P Λ Q, and say when Λ holds its singular values;
# - trace one triplet by hand from its gradient to the decision whether it stays;
# - read the ranks that AdaLoRA chose, and compare them with what chance would choose;
# - take a result apart: in runs without weight decay AdaLoRA forgets least, and you will find out which of its parts does that;
# - say what goes wrong when nobody steps the allocator.
#
# **Paper.** Zhang et al. 2023, *AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning*,
# arXiv 2303.10512.
#
# **Time.** Twenty-five minutes to read, two to run, forty for the exercises.

# %%
import inspect
from dataclasses import replace
from itertools import pairwise
from statistics import mean, stdev

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

from minipeft import GPT, AdaLoraConfig, GPTConfig, PeftModel, get_peft_model
from minipeft.lab import DATA, compare, report, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import complete, disk_bytes
from minipeft.lab.finetune import Record, build_model, finetune, measure_forgetting, micro_batches
from minipeft.lab.recipes import RECIPES, RunConfig, load_sweeps, swept_learning_rate
from minipeft.lab.train import train
from minipeft.methods.adalora import RankAllocator, SVDLinear, add_adalora, orthogonality
from minipeft.targets import find_targets

RED, ORANGE, GREY = (report.COLORS[name] for name in ("adalora", "lora", "frozen"))
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
OUT = DATA.parent / "out" / "03"  # what this lesson saves; git does not look there
base = load_base(DATA / "base" / "1m")
task = tasks.load_task(base, "describe")
config = RECIPES["adalora"].config(8, 100)  # mean rank 8 at the end, 100 steps
print(f"from rank {config.init_r} to a mean of {config.target_r}, base and task as in lesson 02")
print(f"{task.test[0].prompt}\n→{task.test[0].completion}")

# %% [markdown]
# ## A question first
#
# LoRA gave each of the 16 adapted matrices the same rank, 8. Does each need the same? AdaLoRA starts all of them at
# rank 12, and while it trains it takes away what matters least, wherever that is, until 8 are left on average.
#
# Half of the matrices belong to attention (`c_attn`, `attn.c_proj`), half to the MLPs (`c_fc`, `mlp.c_proj`). The task
# is to copy names from facts into sentences, as above; *slot accuracy* is the share of the facts that come out right. *Forgetting* is by how
# much the loss on pretraining text has risen, in nats per token, while the adapter is on (lesson 01).
#
# **Your guesses:** the mean rank that the attention matrices will keep (the MLPs get 16 minus that); and what AdaLoRA
# will forget, as a share of what LoRA forgets.

# %%
guess = 8.0  # mean rank of the attention matrices, from 4 to 12: put your own before you go on
guess_forgetting = 1.0  # AdaLoRA's forgetting over LoRA's: 1 is "the same"

# %% [markdown]
# ## The idea
#
# Write the change of a weight in the form of a singular value decomposition, and learn all three parts:
#
# $$ W' = W + s \, P \Lambda Q, \qquad P \in \mathbb{R}^{out \times r},\; \Lambda \text{ diagonal},\; Q \in \mathbb{R}^{r \times in} $$
#
# The scale s is α / init_r, and stays so when ranks shrink. A *triplet* is a column of P, an entry of Λ and a row of Q. To drop one, set its entry of Λ to zero: nothing
# else moves, and it may come back later. A penalty pulls P and Q towards orthogonal, so that a triplet means something alone:
#
# $$ \lVert P^\top P - I \rVert_F + \lVert Q Q^\top - I \rVert_F $$
#
# It is added to the loss with a weight γ, here a half. (The paper squares and sums these norms; peft and minipeft take their mean over all
# matrices.)
#
# ## By hand
#
# With P and Q orthogonal, the entries of Λ *are* the singular values, up to their signs. That is not so for any P and Q.

# %%
torch.manual_seed(0)
P = torch.linalg.qr(torch.randn(6, 3)).Q  # (out, r), orthonormal columns
Q = torch.linalg.qr(torch.randn(4, 3)).Q.T  # (r, in), orthonormal rows
L = torch.tensor([2.0, -1.0, 0.5])
right = torch.linalg.svdvals(P @ torch.diag(L) @ Q)[:3]
other = torch.randn(3, 4)  # a Q that is not orthogonal
skew = torch.linalg.svdvals(P @ torch.diag(L) @ other)[:3]
print("Λ                                    ", L.tolist())
print("singular values, P and Q orthogonal  ", [round(v, 2) for v in right.tolist()])
print("singular values, Q not orthogonal    ", [round(v, 2) for v in skew.tolist()])
assert torch.allclose(right, L.abs())
assert not torch.allclose(skew, L.abs(), atol=0.1)

three = AdaLoraConfig(init_r=3, target_r=1, total_step=1, lora_alpha=6)
layer = SVDLinear(torch.nn.Linear(4, 6).requires_grad_(False), three)
for q in (Q, other):
    layer.lora_B.data, layer.lora_E.data, layer.lora_A.data = P, L[:, None], q
    assert torch.allclose(layer.delta(), 6 / 3 * P @ torch.diag(L) @ q, atol=1e-4)  # s = α / init_r
    penalty = ((P.T @ P - torch.eye(3)).norm() + (q @ q.T - torch.eye(3)).norm()) / 2
    assert torch.allclose(orthogonality({"toy": layer}), penalty, atol=1e-5)
    print(f"by hand and minipeft: the same change, and the same penalty, {abs(penalty):.2f}")

# %% [markdown]
# In the files P is `lora_B`, Λ is `lora_E` and Q is `lora_A`, as in Hugging Face peft.
#
# ## One triplet, traced
#
# How does it decide? For each number w, as it is after the optimizer's step, with its gradient g from before (of the loss, penalty included):
#
# 1. *Sensitivity* I = |w · g|: about how much the loss would change if w were set to zero.
# 2. *Smoothing*, because one batch is noise: Ī ← β₁ Ī + (1 − β₁) I.
# 3. *Uncertainty*: Ū ← β₂ Ū + (1 − β₂) |I − Ī|, how much the sensitivity jumps about.
# 4. *Score* of a triplet: Ī · Ū of its entry of Λ, plus the mean of Ī · Ū over its row of Q, plus that over its column of P.
# 5. *Threshold*: the budget says how many triplets may stay; the lowest scores over all matrices are cut.
#
# Two toy layers, three triplets each: six at first, two at the end. First the budget, a cubic curve that falls fast and lands softly. Then
# the first triplet of the first layer, in plain tensors; for the other five we take the allocator's scores.


# %%
def budget(step, first=6, last=2, start=2, end=12):
    """How many triplets may be left: whole until `start`, the target from `end` on."""
    left = 1 - (min(max(step, start), end) - start) / (end - start)  # from 1 down to 0
    return int((first - last) * left**3 + last)


small = AdaLoraConfig(
    init_r=3, target_r=1, tinit=2, tfinal=2, total_step=14, target_modules="all-linear"
)
torch.manual_seed(0)
toy = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
layers = add_adalora(toy, small)
allocator = RankAllocator(layers, small)
assert all(budget(step) == allocator.budget(step) for step in range(1, 15))
print("triplets allowed, steps 1 to 14:", [budget(step) for step in range(1, 15)])

# %%
optimizer = torch.optim.AdamW([p for p in toy.parameters() if p.requires_grad], lr=0.05)
x, y = torch.randn(32, 6).double(), torch.randn(32, 4).double()
smooth, jumps, trace = dict.fromkeys("EAB", 0.0), dict.fromkeys("EAB", 0.0), []
for step in range(1, 13):
    ((toy(x) - y).square().mean() + 0.5 * orthogonality(layers)).backward()  # γ = 0.5
    optimizer.step()
    one = {
        "E": (layers["0"].lora_E, 0),
        "A": (layers["0"].lora_A, 0),
        "B": (layers["0"].lora_B, (..., 0)),
    }
    for k, (w, where) in (
        one.items() if step < 12 else ()
    ):  # the last allocation takes what is known
        sensitivity = (w.detach() * w.grad)[where].abs()
        smooth[k] = 0.85 * smooth[k] + 0.15 * sensitivity
        jumps[k] = 0.85 * jumps[k] + 0.15 * (sensitivity - smooth[k]).abs()
    score = sum((smooth[k] * jumps[k]).mean() for k in "EAB")

    allocator.update_and_allocate(step)
    theirs = torch.cat(list(allocator.scores().values()))
    assert torch.allclose(score, theirs[0], rtol=1e-9), "the same score"
    cut = 6 - budget(step)
    threshold = theirs.sort().values[cut - 1] if cut else torch.zeros(())
    stays = bool(theirs[0] > threshold)
    assert stays == bool(layers["0"].lora_E[0] != 0), "the same decision"
    optimizer.zero_grad()
    trace.append((step, float(score) * 1e6, float(threshold) * 1e6, stays))
print("by hand and RankAllocator: the same score and the same decision at every step\n")
print("step    score  threshold  (in millionths)")
for step, score, threshold, stays in trace:
    print(f"{step:4} {score:8.3f}  {threshold:9.3f}  {'stays' if stays else 'Λ set to zero'}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
real, steps = RankAllocator(dict.fromkeys(range(16)), config), range(1, 101)
left.step(steps, [real.budget(step) / 16 for step in steps], color=RED, where="mid")
left.axvspan(0, config.tinit, color="#eeeeee")
left.axvspan(100 - config.tfinal, 100, color="#eeeeee")
left.text(config.tinit / 2, 6.5, "wait\n(tinit)", ha="center")
left.text(100 - config.tfinal / 2, 11, "ranks stay\n(tfinal)", ha="center")
left.set(
    xlabel="step", ylabel="mean rank allowed", ylim=(6, 12.5), title="the budget of the real run"
)
judged = [(step, score / threshold, stays) for step, score, threshold, stays in trace if threshold]
right.plot([t[0] for t in judged], [t[1] for t in judged], color=RED, linewidth=1)
for step, ratio, stays in judged:
    right.plot(step, ratio, "o" if stays else "x", color=RED, markersize=8)
right.axhline(
    1, color="black", linestyle="--", label="threshold: at or below it, Λ is set to zero (x)"
)
right.set(xlabel="step", ylabel="score / threshold", title="one triplet of the toy")
right.set_ylim(top=1.1)
right.legend(frameon=False, loc="upper left")
plt.show()

# %% [markdown]
# Where a cross lies on the line, the threshold is this triplet itself, the last one that has to go. And being cut is not the end: the triplet's Λ still gets a gradient, so it goes on being scored, and when its score rises above the
# threshold it may grow again (not this one, but in the real run below some ranks rise). Only at the last allocation are the ranks fixed.
#
# AdaLoRA is often said to prune the *smallest singular values*. It prunes the smallest *scores*. Here is a triplet
# with a large Λ that reads an input that is always zero. It changes nothing, and a rule of size would keep it:

# %%
once = AdaLoraConfig(init_r=2, target_r=1, total_step=1, lora_alpha=2)
layer = SVDLinear(torch.nn.Linear(4, 6).requires_grad_(False), once)
layer.lora_E.data = torch.tensor([[3.0], [0.1]])
layer.lora_A.data = torch.eye(4)[:2]  # the first triplet reads input 0, the second input 1
x = torch.randn(8, 4)
x[:, 0] = 0
layer(x).square().mean().backward()
RankAllocator({"toy": layer}, once).update_and_allocate(1)
print("Λ was [3.0, 0.1] and is", [round(e, 1) for e in layer.lora_E.flatten().tolist()])
assert layer.lora_E[0] == 0
assert layer.lora_E[1] != 0

# %% [markdown]
# ## The real file
#
# `minipeft/methods/adalora.py` imports torch and nothing else. This is how its allocator scores, cuts, and follows the schedule. Beyond our loop it
# knows how seldom to allocate (`deltaT`), stays cut after the last allocation, and writes down what it kept.

# %%
for part in ("scores", "prune", "reapply_mask", "update_and_allocate"):
    print(inspect.getsource(getattr(RankAllocator, part)))

# %% [markdown]
# ## On the GPT
#
# Λ starts at zero, so it starts as the base. Only the triplets are trained, init_r · (in + out + 1) numbers a layer. Mark
# which rank stands there: the *first* one.

# %%
ids = torch.tensor([base.tokenizer.encode(task.test[0].prompt).ids])
model = base.model()
plain = model(ids).logits
shapes = [module.weight.shape for module in find_targets(model, "all-linear").values()]
model = get_peft_model(model, config)
assert torch.equal(model(ids).logits, plain)
print("the same logits, to the bit")

model(ids, labels=ids).loss.backward()
trained = [name for name, p in model.named_parameters() if p.grad is not None]
assert all(name.endswith(("lora_A", "lora_E", "lora_B")) for name in trained)
count = model.get_nb_trainable_parameters()[0]
lora_count = sum(8 * sum(shape) for shape in shapes)
assert count == sum(12 * (sum(shape) + 1) for shape in shapes)  # init_r (in + out + 1), each layer
print(f"AdaLoRA trains {count:,} numbers, LoRA of the final rank {lora_count:,}: it starts larger")
assert count > lora_count

# %% [markdown]
# ## A live run, and the ranks over time
#
# We run it as every method is run here, and look over the allocator's shoulder at each step. (`adapt` also takes another allocator, or
# another penalty: both are needed below.)


# %%
def adapt(name, allocator=RankAllocator, penalty=orthogonality, seed=0):
    """AdaLoRA as `finetune` trains it, with another allocator or penalty; what was measured."""
    recipe, run = RECIPES["adalora"], RunConfig(seed=seed)
    rate, _ = swept_learning_rate(recipe, run, base.name, task.name, len(task.train))
    run = replace(run, learning_rate=rate)
    model = build_model(base, recipe, run)
    adapter = model.adapters["default"]
    adapter.allocator = allocator(adapter.layers, adapter.config)
    adapter.penalty = lambda: adapter.config.orth_reg_weight * penalty(adapter.layers)  # γ
    record = Record(recipe.method, base.name, task.name, seed, run.steps, len(task.train))
    measure_forgetting(record, model, base, "base", "start")
    train(model, micro_batches(task, run, base.end, model.device), run, title=name)
    model.save_pretrained(OUT / name)
    record.disk_bytes, record.ranks = disk_bytes(model), model.ranks()
    record.score = task.score(task.test[:64], complete(model, base, task.test[:64]))
    measure_forgetting(record, model, base, "off", "on")
    return record


seen, early = [], {}


class Watched(RankAllocator):
    def update_and_allocate(self, step):
        super().update_and_allocate(step)
        seen.append(self.ranks())
        if step == self.config.tinit:  # importance is known, and nothing is cut yet
            early["score"] = torch.cat(list(self.scores().values()))
            early["size"] = torch.cat(
                [s.lora_E.detach().abs().flatten() for s in self.layers.values()]
            )


live = adapt("adalora", Watched)
assert any(later[n] > now[n] for now, later in pairwise(seen) for n in now)  # some came back
print(f"{task.metric} {live.score:.2f}   (expect above 0.85)")
assert live.score > 0.85


# %%
def kind(name):
    return "attention" if ".attn." in name else "MLP"


def attention_rank(ranks):
    return mean(rank for name, rank in ranks.items() if kind(name) == "attention")


figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 4.2), layout="constrained", gridspec_kw={"width_ratios": [3, 2]}
)
styles = {"attention": (RED, "-"), "MLP": (GREY, "--")}
for name in seen[0]:
    color, style = styles[kind(name)]
    left.plot(steps, [ranks[name] for ranks in seen], style, color=color, linewidth=0.7, alpha=0.5)
for what, (color, style) in styles.items():
    means = [mean(rank for name, rank in ranks.items() if kind(name) == what) for ranks in seen]
    left.plot(steps, means, style, color=color, linewidth=3, label=f"{what}, mean of 8")
left.axhline(guess, color="black", linestyle=":", label="your guess (attention)")
left.set(xlabel="step", ylabel="rank", ylim=(0, 12.5))
left.legend(frameon=False, loc="lower left")
ends = [".".join(name.split(".")[3:]) for name in seen[0]][:4]
grid = [[live.ranks[f"transformer.h.{i}.{end}"] for i in range(4)] for end in ends]
right.imshow(grid, cmap="Greys", vmin=0, vmax=18, aspect="auto")
for row, values in enumerate(grid):
    for column, rank in enumerate(values):
        right.text(column, row, rank, ha="center", va="center")
right.set_xticks(range(4), [f"layer {i}" for i in range(4)])
right.set_yticks(range(4), ends)
right.set_title("rank kept")
plt.show()

# %% [markdown]
# Are these differences worth a word? Ask what an allocator would do that learned nothing: cut 64 of the 192 triplets
# by lot. And ask whether other seeds, and another task, end the same way. The other seeds were run by
# `python -m minipeft compare --base data/base/1m --seeds 4 --output data/results/1m`, and with `--task sentiment`.

# %%
lots = [torch.randperm(192, generator=torch.Generator().manual_seed(i))[:128] for i in range(200)]
chance = mean(stdev(torch.bincount(lot // 12, minlength=16).tolist()) for lot in lots)
folder = DATA / "results" / "1m"
shipped = compare.load(folder / "compare.json")
ranks = {
    "describe": [r.ranks for r in shipped if r.method == "adalora"],
    "sentiment": [r.ranks for r in compare.load(folder / "sentiment" / "compare.json") if r.method == "adalora"],
}  # fmt: skip
print(f"by lot: attention 8.0, spread (standard deviation of the 16 ranks) {chance:.1f}")
print(
    f"here, live: attention {attention_rank(live.ranks):.1f}, spread {stdev(live.ranks.values()):.1f}; your guess {guess}"
)
for name, found in ranks.items():
    attention, spread = [attention_rank(r) for r in found], [stdev(r.values()) for r in found]
    alike = torch.corrcoef(torch.tensor([list(r.values()) for r in found]).float())
    alike = (alike.sum() - 4) / 12  # mean correlation between two seeds
    print(
        f"{name:9} four seeds: attention {min(attention):.1f} to {max(attention):.1f}, "
        f"spread {min(spread):.1f} to {max(spread):.1f}, two seeds correlate by {alike:.2f}"
    )
cut = {k: set(v.topk(64, largest=False).indices.tolist()) for k, v in early.items()}
both = len(cut["score"] & cut["size"])
print(
    f"of the 64 triplets with the lowest scores {both} are also among the 64 smallest (by lot: 21)"
)
assert both < 64
assert all(stdev(r.values()) > 1.6 * chance for r in [live.ranks, *ranks["describe"]])
assert attention_rank(live.ranks) < 7

# %% [markdown]
# We had expected an almost flat picture. On
# `describe` it is not flat at all: the first layer keeps almost everything, the MLPs above it much, most of the attention above it little, and other
# seeds agree. The paper (its figure 3, on MNLI) reports the same liking for the MLPs, and one for the top layers, which we do not see. On `sentiment`, the same base and the same shapes give another, flatter pattern, on which
# the seeds agree less: so the ranks say something about the task, and not only about the shapes.
#
# And size against sensitivity? They are related, but not the same: the last line compares them at the last step before anything was cut.

# %% [markdown]
# ## Against LoRA, full fine-tuning, and the frozen base
#
# The same data, order and steps, a swept learning rate each (the one with the lowest loss of slot tokens on validation examples, which need not
# have the best score there); LoRA's rank is AdaLoRA's final mean. The table has the
# shipped seeds (and the seconds of the machine that ran them); two of its runs we repeat here.

# %%
thin = finetune(base, task, RECIPES["lora"], RunConfig(seed=0, output=OUT / "lora"))
for record in (live, thin):
    others = [r for r in shipped if r.method == record.method and r.seed != 0]
    assert compare.in_spread(record, others), "this run is unlike the other seeds"
    print(record.method, [f"{r.score:.2f}" for r in others], f"and here {record.score:.2f}")

methods = ("frozen", "full", "lora", "adalora")
rows = [r for r in shipped if r.method in methods and not r.random_base]
of = {m: [r for r in rows if r.method == m] for m in methods}
ahead = compare.mean(of["adalora"], "score") - compare.mean(of["lora"], "score")
noise = stdev(r.score for r in of["lora"])
print(f"AdaLoRA's score minus LoRA's: {ahead:+.3f}; LoRA's seeds spread by {noise:.3f}")
print(f"on disk: AdaLoRA {live.disk_bytes:,} bytes, LoRA {thin.disk_bytes:,}")
assert abs(ahead) < 0.08
assert compare.share_of_gap(rows, of["adalora"]) > 0.85
assert live.disk_bytes > thin.disk_bytes
display(Markdown(compare.table(rows, task)))
report.compare_figure(compare.rows(rows), task)

# %% [markdown]
# No lead over LoRA shows at this size. Its file is even a little larger at "the same budget", for the budget counts triplets, and those of
# the MLPs, which it likes, are the longest.
#
# ### Did the allocation help?
#
# The right opponent is not LoRA, which differs in more than one way, but AdaLoRA with *one* thing taken away: its scores. Once, let each
# matrix cut its own worst triplets, so that all end at rank 8. And once let a lot decide, drawn before training: an allocator that learned nothing.
# (Two runs, about a minute.)


# %%
class SameRank(RankAllocator):
    def scores(self):
        """A triplet's place within its matrix, 0 to 11, as its score: each matrix loses as many."""
        return {name: s.argsort().argsort().float() for name, s in super().scores().items()}


class ByLot(RankAllocator):
    def scores(self):
        """The same random numbers at each step."""
        lot = torch.Generator().manual_seed(0)
        return {name: torch.rand(len(s), generator=lot) for name, s in super().scores().items()}


runs = {"LoRA": thin, "AdaLoRA": live}
for name, allocator in (("rank 8 everywhere", SameRank), ("ranks by lot", ByLot)):
    runs[name] = adapt(name, allocator)
    assert sum(runs[name].ranks.values()) == 128
    assert abs(runs[name].score - live.score) < 0.15
for name in ("rank 8 everywhere", "ranks by lot", "AdaLoRA"):
    print(f"{name:18} {task.metric} {runs[name].score:.2f}")
print(f"AdaLoRA, four seeds: {[round(r.score, 2) for r in of['adalora']]}")
assert set(runs["rank 8 everywhere"].ranks.values()) == {8}

# %% [markdown]
# So what AdaLoRA scores here does not come from *how many* triplets each matrix keeps, nor from which: with a rank of 8 there is room
# enough. (The differences are about as large as those between seeds: give `adapt` another `seed`
# and see.) A picture of ranks that is far from flat is no proof that ranks matter.
#
# ## What breaks it: AdaLoRA without its penalty
#
# Now the surprise. Of all methods in the shipped results, which have no weight decay, AdaLoRA forgets the least, at about LoRA's score. Which part does that?
# It differs from LoRA by its allocation (we just took its sense away), by the three-part form, and by the penalty; the scale s is 2 for both.
# So take the penalty away and leave all else. And since it asks two things, unit lengths and right angles, keep the lengths alone in one more run.
# (Another minute.)


# %%
by_method = {}
for r in shipped:
    if r.method != "frozen" and not r.random_base:
        by_method.setdefault(r.method, []).append(r.forgot())
print("forgetting, nats per token of pretraining text, the lowest and the highest of four seeds")
for method, values in sorted(by_method.items(), key=lambda item: mean(item[1])):
    print(f"  {method:14} {min(values):.2f} to {max(values):.2f}")
rest = [v for method, values in by_method.items() if method != "adalora" for v in values]
assert max(by_method["adalora"]) < 0.5 * min(rest)
assert live.forgetting["off"] == live.forgetting["base"], "off, the base is back, to the bit"


def lengths(layers):
    """The penalty without its angles: how far the squared lengths are from one."""
    matrices = [m for s in layers.values() for m in (s.lora_A, s.lora_B.T)]  # (r, …) each
    return sum((m.square().sum(1) - 1).norm() for m in matrices) / len(matrices)


runs["lengths alone"] = adapt("lengths alone", penalty=lengths)
runs["no penalty"] = adapt("no penalty", penalty=lambda layers: torch.zeros(()))

# %%
folders = {"LoRA": "lora", "AdaLoRA": "adalora"}
sets, size = {}, {}  # the layers; the length of the whole change, over all matrices
for name in runs:
    trained = PeftModel.from_pretrained(base.model(), OUT / folders.get(name, name))
    sets[name] = trained.adapters["default"].layers
    size[name] = sum(s.delta().detach().square().sum() for s in sets[name].values()).sqrt().item()
for name, record in runs.items():
    print(
        f"{name:18} {task.metric} {record.score:.2f}, forgets {record.forgot():.2f}, "
        f"size of the change ‖ΔW‖ {size[name]:.0f}"
    )
ratio = live.forgot() / thin.forgot()
print(f"AdaLoRA forgets {ratio:.2f} of what LoRA forgets; you guessed {guess_forgetting}")
assert runs["no penalty"].forgot() > 3 * live.forgot()
assert runs["no penalty"].score < compare.mean(of["adalora"], "score") + 0.05
assert runs["rank 8 everywhere"].forgot() < 2 * live.forgot()
assert runs["ranks by lot"].forgot() < 2 * live.forgot()
assert live.forgot() < runs["lengths alone"].forgot() < 0.6 * runs["no penalty"].forgot()
assert min(size["no penalty"], size["LoRA"]) > 2 * max(size["AdaLoRA"], size["lengths alone"])
print("\nthe five largest, in the MLP of the first layer")
for which in ("AdaLoRA", "no penalty"):
    s = sets[which]["transformer.h.0.mlp.c_fc"]
    values = torch.linalg.svdvals(s.delta().detach())[:5].tolist()
    entries = s.lora_E.detach().abs() * s.lora_alpha / s.divisor  # the divisor is init_r
    entries = entries.flatten().sort(descending=True).values[:5].tolist()
    print(f"{which:11} singular values of ΔW {[round(v, 2) for v in values]}")
    print(f"{'':11} s · |Λ|                {[round(v, 2) for v in entries]}")
    far = abs(values[0] / entries[0] - 1)
    assert far < 0.1 if which == "AdaLoRA" else far > 1

# %%
paths = {
    entry["method"]: entry["points"]
    for entry in load_sweeps()
    if (entry["base"], entry["task"], entry["size"], entry["random_base"]) == ("1m", "describe", 8, False)
}  # fmt: skip
assert min(p["forgetting"] for p in paths["lora"]) > 1.5 * max(by_method["adalora"])
figure = plt.figure(figsize=(10, 4.4), layout="constrained")
for name, style in (("lora", "s--"), ("adalora", "o-")):
    points = [p for p in paths[name] if p["score"] > 0.1]
    xs, ys = [p["forgetting"] for p in points], [p["score"] for p in points]
    plt.plot(xs, ys, style, color=report.COLORS[name], label=f"{name}, rates of the sweep")
    for p in (points[0], points[-1]):
        at = (p["forgetting"], p["score"] - 0.045)
        plt.annotate(f"{p['learning_rate']:g}", at, color=report.COLORS[name], ha="center")
xs, ys = [r.forgot() for r in of["full"]], [r.score for r in of["full"]]
plt.plot(xs, ys, "D", color=report.COLORS["full"], label="full, four seeds")
for name, marker in zip(list(runs)[2:], "P*^Xv", strict=False):  # all but the first two, and yours
    record, label = runs[name], f"AdaLoRA, {name}"
    plt.plot(record.forgot(), record.score, marker, color="black", mfc="none", ms=9, label=label)
guessed = guess_forgetting * thin.forgot()
plt.axvline(guessed, color="black", linestyle=":", label="your guess for AdaLoRA")
plt.xscale("log")
plt.xticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
plt.minorticks_off()
plt.xlabel("forgetting (nats per token of pretraining text)")
plt.ylabel(task.metric)
plt.ylim(0.4, 1.02)
figure.legend(frameon=False, loc="outside right")
plt.show()

# %% [markdown]
# Each path runs from a small learning rate to a large one (the numbers at its ends); the rate at which LoRA's training broke is left out. It is the penalty. Without it AdaLoRA
# scores no better than its seeds do with it, and forgets nearly as LoRA does; with it and other ranks it forgets as little as before. Nor is it a matter of LoRA's
# learning rate alone: at none of those at which LoRA learned the task did it forget as little as AdaLoRA with its own. Holding the *lengths* alone
# does most of it. What do the angles do alone? Exercise 4 asks that.
#
# The size of the change suggests how. With the columns of P and the rows of Q held at length one, only Λ can grow, and Adam moves a
# number by about a learning rate a step. In LoRA, and without the penalty, both factors grow, and so does their product. In these
# runs the small changes forget little and the large ones much (among the large ones, not in their order); that is no proof. AdaLoRA's variants all ran at its one learning rate, swept with the whole penalty. LoRA with another
# regularizer, weight decay towards its initial values, forgets several times less than without (`data/RESULTS.md`).
#
# The lines under "the five largest" show why Λ should be called *singular values* with care: it holds them only as far as the penalty
# keeps P and Q orthogonal. Without it the change has singular values that Λ knows nothing of.
#
# ### An allocator that nobody steps, and a schedule that does not end
#
# The commonest mistake makes no noise. Ranks move only if someone calls `update_and_allocate`, after the optimizer's step and before
# the gradients are cleared, with a `total_step` as long as the run. If not, you have trained a larger adapter that is no AdaLoRA.
# Ours refuses to merge it, as below, or to save it.


# %%
def a_few_steps(total_step, forget_to_step=False):
    model = get_peft_model(base.model(), replace(config, total_step=total_step))
    if forget_to_step:
        model.update_and_allocate = lambda step: None
    batch = tasks.collate(task.train[:16], base.end, model.device)
    run = RunConfig(steps=4, learning_rate=0.01, warmup=0)
    train(model, ([batch] for _ in range(4)), run, title="four steps")
    try:
        model.merge_and_unload()
    except RuntimeError as error:
        return str(error)


said = [a_few_steps(100, forget_to_step=True), a_few_steps(1000)]
print("\n\n".join(said))
assert "never called" in said[0]
assert "step 984" in said[1]

# %% [markdown]
# ## Exercises
#
# Each has a cell that checks your answer. The solutions are in `solutions/03_adalora.ipynb`.
#
# **1 · Warm-up.** GPT-2 has 12 layers; its `c_attn` takes 768 numbers and gives 3 · 768. AdaLoRA adapts `c_attn` alone, from
# rank 16 down to 8. How many parameters does it train at first?

# %% tags=["exercise"]
at_first = None  # your number, or an expression

# %% tags=["wrong"]
at_first = 12 * 8 * (768 + 3 * 768 + 1)

# %% tags=["wrong"]
at_first = 12 * 16 * (768 + 3 * 768)

# %% tags=["solution"]
at_first = 12 * 16 * (768 + 3 * 768 + 1)

# %% tags=["check"]
if at_first is None:
    print("not done yet")
else:
    with torch.device("meta"):  # the full-size GPT-2, without memory for its weights
        own = AdaLoraConfig(init_r=16, target_r=8, total_step=100, target_modules=["c_attn"])
        large = get_peft_model(GPT(GPTConfig()), own)
    assert at_first != 12 * 8 * (4 * 768 + 1), "8 is the rank at the end; training starts with 16"
    assert at_first != 12 * 16 * 4 * 768, "Λ is trained as well: one more number a triplet"
    assert at_first != 16 * (4 * 768 + 1), "that is one layer, and there are 12"
    assert at_first != 12 * (4 * 768 + 1), "that is one triplet a layer, and there are 16"
    trains = large.get_nb_trainable_parameters()[0]
    assert at_first == trains, "init_r (in + out + 1), for 12 layers"
    print(f"right: {at_first:,}")

# %% [markdown]
# **2 · Who moves first?** At the start Λ is zero, P and Q are not. In the first backward pass of the *task's* loss, which of the three
# get a gradient that is not zero? And of the task's loss *plus* the penalty? (E is Λ, A is Q, B is P.)

# %% tags=["exercise"]
task_alone = None  # {"A": True or False, "E": True or False, "B": True or False}
with_penalty = None  # the same form

# %% tags=["wrong"]
task_alone = {"A": True, "E": True, "B": True}
with_penalty = {"A": True, "E": True, "B": True}

# %% tags=["wrong"]
task_alone = {"A": False, "E": True, "B": False}
with_penalty = {"A": True, "E": False, "B": True}

# %% tags=["solution"]
task_alone = {"A": False, "E": True, "B": False}  # the gradients of A and B have the factor E
with_penalty = {"A": True, "E": True, "B": True}  # the penalty pulls at A and B

# %% tags=["check"]


def moved(penalty):
    """Which of A, E and B get gradients that are not zero in the first backward pass."""
    layer = SVDLinear(torch.nn.Linear(4, 6), once)
    loss = layer(torch.ones(3, 4)).square().sum()
    (loss + penalty * orthogonality({"toy": layer})).backward()
    return {k: bool(getattr(layer, f"lora_{k}").grad.any()) for k in "AEB"}


if task_alone is None or with_penalty is None:
    print("not done yet")
else:
    assert task_alone == moved(0.0), (
        "y = W x + s B (E ∘ A) x: each gradient has the other two as factors"
    )
    assert with_penalty == moved(0.5), (
        "the sum of both: E keeps the gradient of the task, and the penalty pulls at A and B"
    )
    print("right: only Λ feels the task at first, and the penalty stretches P and Q meanwhile")

# %% [markdown]
# **3 · The score.** Write `triplet_scores(smooth, jumps)`. Both are dicts of Ī and Ū: "A" (r, in), "E" (r, 1), "B" (out, r). Return
# one score for each triplet, (r,).


# %% tags=["exercise"]
def triplet_scores(smooth, jumps): ...  # return a tensor (r,)


# %% tags=["wrong"]
def triplet_scores(smooth, jumps):
    a, e, b = (smooth[k] * jumps[k] for k in "AEB")
    return e[:, 0] + a.sum(1) + b.sum(0)


# %% tags=["wrong"]
def triplet_scores(smooth, jumps):
    a, e, b = (smooth[k] * jumps[k] for k in "AEB")
    return e[:, 0] + a.mean(1) + b.mean(1)


# %% tags=["wrong"]
def triplet_scores(smooth, jumps):
    a, e, b = (smooth[k] * jumps[k] for k in "AEB")
    return e + a.mean(1) + b.mean(0)


# %% tags=["solution"]
def triplet_scores(smooth, jumps):
    a, e, b = (smooth[k] * jumps[k] for k in "AEB")
    return e[:, 0] + a.mean(1) + b.mean(0)


# %% tags=["check"]
torch.manual_seed(0)
square = {"A": (3, 3), "E": (3, 1), "B": (3, 3)}  # square: no shape gives a mistake away
smooth, jumps = ({k: torch.rand(shape) for k, shape in square.items()} for _ in range(2))
answer = triplet_scores(smooth, jumps)
if answer is None:
    print("not done yet")
else:
    judge = RankAllocator({"toy": None}, once)
    judge.importance = {("toy", k): v for k, v in smooth.items()}
    judge.uncertainty = {("toy", k): v for k, v in jumps.items()}
    a, e, b = (smooth[k] * jumps[k] for k in "AEB")
    first = sum(smooth[k].mean(d) * jumps[k].mean(d) for k, d in (("A", 1), ("E", 1), ("B", 0)))
    assert answer.shape == (3,), f"one score a triplet: (3,), yours is {tuple(answer.shape)}"
    for said, value in {
        "means, not sums: a triplet of a wide matrix would win by its width": a.sum(1) + b.sum(0),
        "a triplet is a ROW of A, and a COLUMN of B": a.mean(1) + b.mean(1),
        "a triplet is a ROW of A, and a COLUMN of B: both the other way": a.mean(0) + b.mean(1),
        "a triplet is a ROW of A: take the mean over the row": a.mean(0) + b.mean(0),
        "that is E alone: A's row and B's column count too": 0 * a.mean(1),
        "multiply Ī and Ū number by number, then take the mean": first - e[:, 0],
        "that is Ī alone: multiply it by Ū": sum(
            smooth[k].mean(d) for k, d in (("A", 1), ("E", 1), ("B", 0))
        )
        - e[:, 0],
    }.items():
        assert not torch.allclose(answer, e[:, 0] + value), said
    assert torch.allclose(answer, judge.scores()["toy"]), (
        "Ī Ū of E, and the means over A's row and B's column"
    )
    print("right: the same as RankAllocator.scores")

# %% [markdown]
# **4 · Angles alone.** We kept the lengths and dropped the angles. Write the other half, `angles(layers)`: for every A and every B the norm of
# all products of two *different* vectors (rows of A, columns of B), and the mean of these norms over the matrices.


# %% tags=["exercise"]
def angles(layers): ...  # return a scalar tensor that gradients can flow through


# %% tags=["wrong"]
def angles(layers):
    total, matrices = 0.0, [m for s in layers.values() for m in (s.lora_A, s.lora_B)]
    for m in matrices:
        square = m @ m.T
        total = total + (square - torch.diag(square.diagonal())).norm()
    return total / len(matrices)


# %% tags=["wrong"]
def angles(layers):
    total, matrices = 0.0, [m for s in layers.values() for m in (s.lora_A, s.lora_B.T)]
    for m in matrices:
        total = total + (m @ m.T - torch.eye(len(m))).norm()
    return total / len(matrices)


# %% tags=["wrong"]
def angles(layers):
    total = 0.0
    for s in layers.values():
        for m in (s.lora_A, s.lora_B.T):
            square = m @ m.T
            total = total + (square - torch.diag(square.diagonal())).norm()
    return total / len(layers)


# %% tags=["solution"]
def angles(layers):
    total, matrices = 0.0, [m for s in layers.values() for m in (s.lora_A, s.lora_B.T)]
    for m in matrices:
        square = m @ m.T  # (r, r): squared lengths on the diagonal, all else products of two
        total = total + (square - torch.diag(square.diagonal())).norm()
    return total / len(matrices)


# %% tags=["check"]
layer = SVDLinear(torch.nn.Linear(4, 6), once)
layer.lora_A.data = 3 * torch.eye(4)[:2]  # too long, and at right angles
layer.lora_B.data = torch.zeros(6, 2)
layer.lora_B.data[:2] = torch.tensor([[1.0, 2.0], [1.0, -2.0]])  # columns at right angles, rows not
answer = angles({"toy": layer})
if answer is None:
    print("not done yet")
else:
    assert torch.is_tensor(answer), "a tensor, or no gradient can flow"
    assert answer.dim() == 0, "one number: the mean over all matrices"
    assert answer.requires_grad, "no detach: the penalty must pull"
    assert answer < 1e-6, (
        "all angles are right here, only lengths are wrong: rows of A and columns of B, without the diagonal"
    )
    layer.lora_A.data[1] = layer.lora_A.data[0]  # parallel: their product is 9, twice
    want = (2 * 9**2) ** 0.5 / 2  # A's norm, B's is zero, the mean of the two
    answer.backward()
    assert layer.lora_A.grad.isfinite().all(), "the gradient is NaN at right angles: use .norm()"
    answer = angles({"toy": layer}).item()
    assert abs(answer - 2 * want) > 1e-4, "the mean over all matrices, A's and B's, not the sum"
    assert abs(answer - want / 2**0.5) > 1e-4, "each pair counts twice, as in Q Qᵀ"
    assert abs(answer - want) < 1e-4, "the norm of all products of two different vectors"
    layer.lora_B.data[1] = 2.0  # now B's columns are (1, 2) and (2, 2): their product is 6, twice
    want += (2 * 6**2) ** 0.5 / 2
    assert abs(angles({"toy": layer}).item() - want) < 1e-4, "the columns of B count as well"
    print("right: a penalty that right angles satisfy, at any length")

# %% [markdown]
# Put it to work, and run the cell of the last figure again, which takes it up. Guess first: does it forget like AdaLoRA, like AdaLoRA without
# a penalty, or something between?
#
#     runs["angles alone"] = adapt("angles alone", penalty=angles)
#     print(runs["angles alone"].score, runs["angles alone"].forgot())
#
# (Expect it between. Products of two vectors grow with their lengths too, so this penalty is not about angles alone: it can also be lowered by
# shrinking.)
#
# ## Summary, at this size
#
# - AdaLoRA writes the change as P Λ Q, starts larger than a LoRA of the final budget, and zeroes the triplets with the lowest scores.
# - A score is smoothed sensitivity times uncertainty: not the size of Λ, which holds singular values only while P and Q are orthogonal.
# - On `describe` the ranks it chose are far from flat, and other seeds agree; on `sentiment` they differ, and are flatter.
# - That choice buys little: rank 8 everywhere, or ranks by lot, score about the same, and AdaLoRA has no clear lead over LoRA.
# - Where no method has weight decay it forgets least, and that is the work of its penalty, most of it by holding lengths, so that the change stays small.
#
# **To read:** the AdaLoRA paper, section 3 (SVD form, scores, schedule) and its ablations; Biderman et al. 2024, *LoRA Learns Less and
# Forgets Less*, arXiv 2405.09673.
