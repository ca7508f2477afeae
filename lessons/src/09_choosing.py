# %% [markdown]
# # 09 · Choosing: which method would you pick?
#
# After this lesson you can
# - say what a method saves and what it does not: parameters, arithmetic, activations, bytes on disk;
# - search for a learning rate so that the search decides nothing in secret;
# - tell why two honest people can measure "LoRA forgets less" and "LoRA forgets more" on the same model;
# - pick a method for a problem of your own from a table that was measured.
#
# **Papers.** Biderman et al. 2024, *LoRA Learns Less and Forgets Less*, arXiv 2405.09673; Chen et al. 2016, *Training Deep Nets with
# Sublinear Memory Cost* (gradient checkpointing), arXiv 1604.06174.
#
# **Time.** Twenty-five minutes to read, three to run, fifty for the exercises.

# %%
import inspect
import itertools
import math
import statistics

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display
from torch.utils.flop_counter import FlopCounterMode

from minipeft.lab import DATA, compare, report, sweep, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import activation_bytes, checkpoint_gradients, task_loss
from minipeft.lab.finetune import build_model, finetune
from minipeft.lab.recipes import RECIPES, RunConfig, load_sweeps

COLORS, RESULTS = report.COLORS, DATA / "results"
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
base = load_base(DATA / "base" / "1m")
task = tasks.load_task(base, "describe")
methods = [name for name in RECIPES if name != "frozen"]
print("methods:", ", ".join(methods))

# %% [markdown]
# You have met the methods one by one. Now you have a problem, and must take one of them.
#
# ## Three guesses first
#
# **1.** LoRA of rank 8 trains about one parameter in seventeen of our small GPT. How much of the *arithmetic* of a training step is left, if
# full fine-tuning's is one?
#
# **2.** And how much of the *activations*, the numbers that the forward pass keeps for the backward pass?
#
# **3.** Full fine-tuning and LoRA learn the task `describe`, each at its own best learning rate. Both forget some of their old text. How
# many times full fine-tuning's forgetting is LoRA's?

# %%
guess_work, guess_kept = 0.06, 0.06  # shares of full fine-tuning: put your own numbers here
guess_forgets = 0.5  # times full fine-tuning's forgetting

# %% [markdown]
# ## The idea
#
# To choose is to solve this, with *your* bounds in it:
#
# $$ (\text{method},\, \eta)^{*} = \arg\max_{\text{method},\; \eta}\; \text{score}
#  \quad\text{such that}\quad \text{bytes} \le b,\;\; \text{forgetting} \le f,\;\; \text{seconds} \le s $$
#
# Note the η under the arg max. The learning rate is chosen *with* the method. Most wrong sentences about methods come from leaving it out,
# as you will see below.
#
# First the costs. There is one trick that belongs to no method and helps them all, so do that by hand.
#
# ## By hand: gradient checkpointing
#
# The forward pass keeps activations because the backward pass needs them. So do not keep them: keep the *input* of each block, and compute
# the block a second time when its turn comes in the backward pass.

# %%
torch.manual_seed(0)
blocks = [
    torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    for _ in range(3)
]
inputs = [torch.randn(5, 8)]
with torch.no_grad():  # forward: nothing is kept but what goes into each block
    for block in blocks:
        inputs.append(block(inputs[-1]))
gradient = 2 * inputs[-1]  # of the loss, the sum of y²
for block, given in zip(reversed(blocks), reversed(inputs[:-1]), strict=True):
    given = given.requires_grad_()
    block(given).backward(gradient)  # the block again, and at once its backward pass
    gradient = given.grad
by_hand = [p.grad.clone() for block in blocks for p in block.parameters()]

y = inputs[0].detach()
for block in blocks:
    block.zero_grad()
    y = torch.utils.checkpoint.checkpoint(block, y, use_reentrant=False)
y.square().sum().backward()
theirs = [p.grad for block in blocks for p in block.parameters()]
assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(by_hand, theirs, strict=True))
print("by hand and with torch's checkpoint, which minipeft's GPT calls: the same gradients")

# %% [markdown]
# ## The real files
#
# `gpt.py` calls torch's checkpoint for each of its blocks once `gradient_checkpointing_enable()` was called. `minipeft/lab/evaluate.py`
# measures what that saves and costs; beyond your lines, it takes medians and puts the random numbers back. And
# `minipeft/lab/sweep.py` searches for learning rates; here is the rule in it that people break most often.

# %%
print(inspect.getsource(checkpoint_gradients))
print(inspect.getsource(sweep.check))

# %% [markdown]
# ## On the GPT: what does each method cost?
#
# For every method, one training step of sixteen texts. We count: the parameters it trains; the multiplications and additions of the matrix
# products (torch's `FlopCounterMode`; 4-bit layers are unpacked besides, which it does not see); the bytes of activations, without and
# with checkpointing. Two promises are checked on the way: only a method's own tensors get gradients, and checkpointing changes no loss.


# %%
def operations(model, backward=True, **batch):
    counter = FlopCounterMode(display=False)
    with counter:
        loss = model(**batch)[0]
        if backward:
            loss.backward()
    return counter.get_total_flops(), loss.item()


batch = tasks.collate(task.train[:16], base.end, "cpu")
costs = {}
for name in methods:
    model = build_model(base, RECIPES[name], RunConfig(steps=100, seed=0)).train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    work, loss = operations(model, **batch)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    kept = activation_bytes(model, batch)
    model.gradient_checkpointing_enable()
    assert abs(operations(model, **batch)[1] - loss) < 1e-5
    costs[name] = {"trained": trained, "work": work, "kept": kept}
    costs[name]["thrifty"] = activation_bytes(model, batch)
    print(
        f"{name:14} trains {trained:9,}, {work / 1e9:.2f} billion operations, keeps {kept / 1e6:4.1f} MB"
        f" ({costs[name]['thrifty'] / 1e6:4.1f} with checkpointing)"
    )

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.7), sharey=True, layout="constrained")
rows = range(len(costs))
for axis, pairs, guess in [
    (axes[0], [("trained", "parameters trained", "#b9b9b9", ""), ("work", "arithmetic of a step", "#1b4f8f", "")], guess_work),
    (axes[1], [("kept", "activations", "#d1741f", ""), ("thrifty", "with checkpointing", "white", "//")], guess_kept),
]:  # fmt: skip
    for shift, (key, label, color, hatch) in zip((-0.2, 0.2), pairs, strict=True):
        whole = costs["full"]["kept" if key == "thrifty" else key]
        shares = [cost[key] / whole for cost in costs.values()]
        places = [row + shift for row in rows]
        bars = axis.barh(
            places, shares, 0.38, color=color, hatch=hatch, edgecolor="black", linewidth=0.5, label=label
        )  # fmt: skip
        axis.bar_label(bars, [f"{share:.2f}" for share in shares], padding=2, fontsize=8)
    axis.plot(
        guess, list(costs).index("lora"), "k*", markersize=12, label="your guess for LoRA", zorder=3
    )
    axis.set(xlabel="share of full fine-tuning's", xlim=(0, 1.2))
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8)
axes[0].set_yticks(rows, list(costs))
axes[0].invert_yaxis()
plt.show()
full, thin = costs["full"], costs["lora"]
share = {key: thin[key] / full[key] for key in full}
print(f"LoRA trains {share['trained']:.0%} of the parameters and does {share['work']:.0%}")
print(f"of the arithmetic (you guessed {guess_work:.0%}): expect 70 to 75 %")
print(
    f"it keeps {share['kept']:.0%} of the activations (you guessed {guess_kept:.0%}): expect 99 %"
)
print(f"with checkpointing, {thin['thrifty'] / full['kept']:.0%}: expect 25 %")
assert share["trained"] < 0.07
assert 2 / 3 < share["work"] < 0.75
assert share["kept"] > 0.95
assert thin["thrifty"] < 0.3 * full["kept"]
assert all(cost["work"] > 0.6 * full["work"] for cost in costs.values())

# %% [markdown]
# **"Fewer trained parameters mean as much less computing": no.** A step has three parts of about equal size: forward, back to the layers'
# inputs, back to the weights. Freezing saves the third alone, so two thirds is the floor, unless all that is trained sits near the top (exercise 1).
# (Prefix tuning goes a little below: the first layer's input needs no gradient.)
#
# **"LoRA shrinks activations": no.** A's gradient needs the layer's input, just as W's did. Methods that need no such input, look at the
# figure, do keep less: BitFit's biases, for one. What helps everybody is checkpointing, which has nothing to do with adapters. Its price is a second
# forward pass through the blocks; the seconds come below.
#
# ## All methods, both tasks, two sizes of the base
#
# These were run by `python -m minipeft compare --full --output data/results` (and `--task sentiment`) on the 3M base, three seeds; and on the
# 1M base, four seeds, with `--base data/base/1m --seeds 4`. Each method has its own swept learning rate. `describe` is a *new skill*; `sentiment` asks for what the base
# knows already, it only has to be *steered*.

# %%
records = {}
for size, name in itertools.product(("1m", "3m"), ("describe", "sentiment")):
    folder = RESULTS / ("1m" if size == "1m" else "") / ("sentiment" if name == "sentiment" else "")
    records[size, name] = compare.load(folder / "compare.json")
other = tasks.load_task(base, "sentiment")
display(Markdown("`describe`, 3M base\n\n" + compare.table(records["3m", "describe"], task)))
display(Markdown("`sentiment`, 3M base\n\n" + compare.table(records["3m", "sentiment"], other)))

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
for axis, name in zip(axes, ("describe", "sentiment"), strict=True):
    ticks = [n for n in compare.rows(records["3m", name]) if n != "frozen"]
    for shift, size, alpha in [(-0.2, "1m", 0.45), (0.2, "3m", 1)]:
        for n, row in compare.rows(records[size, name]).items():
            scores = [record.score for record in row]
            if n in ticks:
                axis.bar(
                    ticks.index(n) + shift, statistics.mean(scores), 0.38, alpha=alpha,
                    yerr=statistics.pstdev(scores), color=report.color_of(n),
                )  # fmt: skip
    axis.set(title=f"{name} (pale: 1M base, full: 3M base)", ylim=(0, 1.05))
    axis.set_xticks(range(len(ticks)), ticks, rotation=40, ha="right")
axes[0].set_ylabel("score (slot accuracy; exact match)")
plt.show()
shares = {
    key: {name: compare.share_of_gap(kept, row) for name, row in compare.rows(kept).items()}
    for key, kept in records.items()
}
print("share of the gap between the frozen base (0) and full fine-tuning (1)")
print(f"{'':18}describe: 1m    3m   sentiment: 1m    3m")
for name in shares["3m", "describe"]:
    cells = [shares[s, t].get(name) for t in ("describe", "sentiment") for s in ("1m", "3m")]
    if name != "frozen":
        shown = ["–" if cell is None else f"{cell:.2f}" for cell in cells]
        print(f"{name:24}{shown[0]:>6}{shown[1]:>6}{shown[2]:>16}{shown[3]:>6}")
for name in ("prompt_tuning", "prefix_tuning"):  # the larger base helps them, on both tasks
    assert all(shares["3m", t][name] > shares["1m", t][name] for t in ("describe", "sentiment"))
for name in ("lora", "adalora", "qlora"):  # these had little left to gain
    assert all(share[name] > 0.85 for share in shares.values())

# %% [markdown]
# A larger base helps most the methods that change least inside the model: prompts and prefixes. That is the direction of what Lester et al.
# 2021 (arXiv 2104.08691) report for far larger models; that they catch up in the end, our sizes cannot show.
#
# Now one seed here, for the two that the rest of this lesson is about. They must look like the other seeds.

# %%
live = {}
for name in ("full", "lora"):
    live[name] = finetune(base, task, RECIPES[name], RunConfig(steps=100, seed=0))
    row = [r for r in compare.rows(records["1m", "describe"])[name] if r.seed != live[name].seed]
    assert compare.in_spread(live[name], row), "this run is unlike the other seeds"
    print(name, f"{live[name].score:.2f}; other seeds", [f"{r.score:.2f}" for r in row])

# %% tags=["timing"]
frozen = compare.rows(records["1m", "describe"])["frozen"]
display(Markdown(compare.table([*frozen, *live.values()], task)))
for name in ("full", "lora"):
    model = build_model(base, RECIPES[name], RunConfig(steps=100, seed=0)).train()
    found = checkpoint_gradients(model, batch)
    print(
        f"{name}: checkpointing saves {found['bytes_saved'] / 1e6:.1f} MB of activations and costs "
        f"{1000 * found['seconds_lost']:+.0f} ms a step (expect 5 to 60 ms)"
    )

# %% [markdown]
# ## What breaks it: take away the search
#
# Somebody compares full fine-tuning and LoRA in a hurry: 33 steps, and one grid of four learning rates for both. We do the same, with
# the lab's `sweep`: it judges on the validation examples, with a seed that no reported run uses.

# %%
grid = [0.0005, 0.002, 0.008, 0.032]
run = RunConfig(steps=33, n_generate=48)
quick = {"full": sweep.sweep(base, task, RECIPES["full"], run, sweep.Grid(grid, []))[0]}
print("full: slot loss", [f"{p['slot_loss']:.2f}" for p in quick["full"]["points"]])
quick["lora"] = sweep.sweep(base, task, RECIPES["lora"], run, sweep.Grid(grid, [8]))[0]
print("LoRA: slot loss", [f"{p['slot_loss']:.2f}" for p in quick["lora"]["points"]])

# %%
figure, axes = plt.subplots(1, 3, figsize=(8, 2.8), layout="constrained")
for axis, key in zip(axes, ("slot_loss", "score", "forgetting"), strict=True):
    for (name, entry), style in zip(quick.items(), ("o-", "s--"), strict=True):
        values = [p[key] for p in entry["points"]]
        axis.plot(grid, values, style, color=COLORS[name], label=name)
    axis.set(xscale="log", xlabel="learning rate", title=key.replace("_", " "))
    axis.set_xticks(grid, [f"{rate:g}" for rate in grid])
    axis.minorticks_off()
axes[0].set(yscale="log", ylabel="nats a token")
axes[1].set(ylabel="slot accuracy", ylim=(0, 1.02))
axes[2].set(ylabel="nats a token")
axes[0].legend(frameon=False)
plt.show()
at = {name: {p["learning_rate"]: p for p in entry["points"]} for name, entry in quick.items()}
for rate in grid:
    a, b = at["full"][rate], at["lora"][rate]
    print(
        f"both at {rate:<6g} slot loss {a['slot_loss']:.2f} and {b['slot_loss']:.2f}, forgetting "
        f"{a['forgetting']:+.2f} and {b['forgetting']:+.2f} (full, LoRA)"
    )
best = {name: entry["best"] for name, entry in quick.items()}
print("best rates:", best)
a, b = (at[name][best[name]]["forgetting"] for name in quick)
print(f"at these, LoRA forgets {b / a:.1f} times as much (expect 0.8 to 1.3)")
assert 0.6 < b / a < 1.6
assert best["full"] < best["lora"]
assert at["full"][0.002]["slot_loss"] < at["lora"][0.002]["slot_loss"] / 3
assert at["full"][0.008]["slot_loss"] > at["lora"][0.008]["slot_loss"]
assert all(at["lora"][rate]["forgetting"] < at["full"][rate]["forgetting"] for rate in grid)
try:  # what if the grid had ended sooner?
    short = {**quick["lora"], "points": quick["lora"]["points"][:2], "best": 0.002}
    sweep.check([short])
except ValueError as error:
    print("sweep says:", error)

# %% [markdown]
# With one rate for both, the rate decides who wins: full fine-tuning at the smaller one, LoRA at the larger one. And look at the right
# panel: *at the same learning rate LoRA forgets less, at each of the four*. Whoever compares like that will write "LoRA forgets less", and will
# have measured it. But at the same rate LoRA has also learned less.
#
# Two more warnings of a search. An optimum at the edge of the grid is none. And a short search finds rates for short runs: with three times
# the steps the best rate of full fine-tuning is lower (lesson 01). To look between the points of a grid there is Optuna
# (`python -m minipeft sweep --trials 20`).
#
# ## Score against forgetting, a path per learning rate
#
# Here is the whole picture: the committed sweeps on the 1M base. Every method draws a path as its learning rate grows; a ring marks
# the rate that the sweep chose.


# %%
def swept(size, name, steps=100, examples=400):
    """The committed sweeps on a pretrained base, each method at its usual rank or width."""
    like = {"base": size, "task": name, "steps": steps, "examples": examples, "random_base": False}
    found = [e for e in load_sweeps() if like.items() <= e.items()]
    return {e["method"]: e for e in found if e["size"] == RECIPES[e["method"]].size}


figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.7), sharey=True, layout="constrained")
markers = dict(zip(methods, "osDv^<>P*X", strict=False))
for axis, name in zip(axes, ("describe", "sentiment"), strict=True):
    for method, entry in swept("1m", name).items():
        path = [p for p in entry["points"] if "forgetting" in p]
        xs, ys = [max(p["forgetting"], 0.002) for p in path], [p["score"] for p in path]
        axis.plot(xs, ys, "-", marker=markers[method], color=COLORS[method], label=method, ms=5)
        chosen = next((p for p in path if p["learning_rate"] == entry["best"]), None)
        if chosen:
            x = max(chosen["forgetting"], 0.002)
            axis.plot(x, chosen["score"], "o", ms=13, mfc="none", mec=COLORS[method])
    axis.set(xscale="log", xlabel="forgetting (nats a token, log scale)", title=name)
    ticks = (0.1, 0.3, 1, 3, 10) if name == "describe" else (0.01, 0.1, 1, 10)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
forgot = {n: r.forgot("on") for n, r in live.items()}
for name, record in live.items():
    axes[0].plot(forgot[name], record.score, "*", color="black", ms=9, zorder=4)
axes[0].axvline(guess_forgets * forgot["full"], color="black", linewidth=1, linestyle=":")
axes[0].text(guess_forgets * forgot["full"], 0.3, " your guess\n for LoRA", ha="right")
axes[0].set_ylabel("score on validation examples")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)  # fmt: skip
plt.show()
print(
    f"at its best rate LoRA forgets {forgot['lora'] / forgot['full']:.1f} times as much as full"
    f" fine-tuning; you guessed {guess_forgets} (expect 1.8 to 2.8)"
)
assert forgot["lora"] > 1.5 * forgot["full"]
print("the least forgetting among the rates that reach a score:")
for size, bar in (("1m", 0.9), ("3m", 0.95)):
    least = {}
    for method, entry in swept(size, "describe").items():
        points = [p for p in entry["points"] if p.get("score", 0) >= bar and "forgetting" in p]
        if points:
            least[method] = min(p["forgetting"] for p in points)
    print(f"  {size} base, score {bar}:", {m: f"{value:+.2f}" for m, value in least.items()})
    assert least["adalora"] < least["full"] < least["lora"]
path = [p for p in swept("1m", "describe")["full"]["points"] if p["score"] > 0.9]
times = path[-1]["forgetting"] / path[0]["forgetting"]
print(f"full fine-tuning alone, rates with a score above 0.9: from one to {times:.0f} times")
assert times > 4


# %% [markdown]
# So who forgets less?
#
# | compared | who forgets less |
# |---|---|
# | at the same learning rate | LoRA, at every rate |
# | each at its best rate, 33 steps | about level, and LoRA has learned less |
# | each at its best rate, a hundred steps | full fine-tuning |
# | at equal score | full fine-tuning |
# | switched off | LoRA: it is the base again, to the bit |
#
# All of it was measured on the same models, the first two lines above, live. Biderman et al. found that LoRA learns less *and* forgets less: a trade, on a model thousands of times larger, on other
# tasks. Here the trade is there, along each path, but the paths lie the other way round. So never believe
# "forgets less" without the rates; plot the path. AdaLoRA's path stays on the left until its largest rate; that is the work of its penalty (lesson 03).
#
# And all of these paths lack something: a regularizer. With weight decay towards the initial weights, each path moves far to the left
# (`data/RESULTS.md` has the figure). So this table compares methods *without weight decay*, and not the methods as such.
#
# ## The loss is not the score
#
# The sweep judges by slot loss, since a loss moves before a score does, and in smaller steps. Does the lowest loss bring the best score?

# %%
entries = [e for e in load_sweeps() if not e["random_base"]]
missed = 0
for entry in entries:
    points = [p for p in entry["points"] if "score" in p]
    missed += min(points, key=sweep.selection_loss)["score"] < max(p["score"] for p in points)
print(f"in {missed} of {len(entries)} sweeps a rate with a higher loss has a better score")
points = [(e["method"], p) for e in swept("1m", "describe").values() for p in e["points"]]
points = [(m, p) for m, p in points if "score" in p]
pairs = [
    (a, b)
    for a, b in itertools.permutations(points, 2)
    if sweep.selection_loss(a[1]) < sweep.selection_loss(b[1]) and a[1]["score"] < b[1]["score"]
]
print(
    f"on describe, {len(pairs)} of {math.comb(len(points), 2)} pairs of runs: the lower loss has the lower score"
)
a, b = max(pairs, key=lambda pair: pair[1][1]["score"] - pair[0][1]["score"])
for method, p in (a, b):
    print(
        f"  {method} at {p['learning_rate']:g}: slot loss {p['slot_loss']:.3f}, score {p['score']:.2f}"
    )
assert missed >= 5
assert b[1]["score"] - a[1]["score"] > 0.1

# %% [markdown]
# Mostly they agree, and where it is close they do not. A fact needs all its tokens right, a loss is a mean over tokens; and at a large
# learning rate a model is sure of itself, and its few mistakes cost much loss. So choose by loss if you must, and report the score.
#
# ## Is a higher rank better? And where should it go?
#
# First the committed sweeps of LoRA on the 3M base, slot loss by rank and learning rate (α is twice the rank; a huge loss means that it broke).
#
# Then *where*. `--targets` puts the adapters on attention alone, on the MLP alone, or on all linear layers, each at the rank that gives it
# about the same number of parameters. The paper adapts mainly the query and value projections; our fused layer makes queries, keys and values
# at once, so this is not its set-up.

# %%
ranks = [
    e for e in load_sweeps()
    if (e["method"], e["base"], e["task"], e["steps"], e["examples"]) == ("lora", "3m", "describe", 100, 400)
]  # fmt: skip
ranks.sort(key=lambda entry: entry["size"])
display(Markdown(sweep.table(ranks).replace("| size", "| rank", 1)))
for entry in ranks:
    p = next(p for p in entry["points"] if p["learning_rate"] == entry["best"])
    print(f"rank {entry['size']:2} at {entry['best']:g}: score {p['score']:.2f}")
same = {e["size"]: next(p for p in e["points"] if p["learning_rate"] == 0.02) for e in ranks}
own = [min(sweep.selection_loss(p) for p in e["points"]) for e in ranks]
assert own == sorted(own, reverse=True)
print("all at 0.02:", {r: f"{p['score']:.2f}" for r, p in same.items()})
assert same[32]["score"] < 0.1 < 0.8 < same[2]["score"]
file = RESULTS / "placement" / "compare.json"
if file.is_file():
    placed = {n: row for n, row in compare.rows(compare.load(file)).items() if n.startswith("lora")}
else:  # one seed here, on the 1M base
    placed = {"lora, all-linear": [live["lora"]]}
    for where in ("attention", "mlp"):
        recipe = RECIPES["lora"].placed(where)
        placed[f"lora, {where}"] = [finetune(base, task, recipe, RunConfig(steps=100, seed=0))]
for where, row in placed.items():
    forgets = compare.forgetting(row)
    print(
        f"{where:17} {row[0].trainable:,} parameters, score {compare.spread(row, 'score')}, "
        f"slot loss {compare.mean(row, 'test_slot_loss'):.3f}, forgets {forgets:+.2f} (seeds: {len(row)})"
    )
counts = [row[0].trainable for row in placed.values()]
assert max(counts) < 1.05 * min(counts)  # ranks are whole numbers

# %% [markdown]
# **"A higher rank is better": only if you search again.** At one fixed rate the highest rank is the one that breaks. With a rate of its own each rank
# does better than the one before, and each doubling brings less.
#
# As to the place: all three learn the task. Before you call one of them the best, compare their distance with the distance of LoRA's own seeds (the live run, above).
#
# ## A decision table, from the measurements
#
# Nobody typed the table below. For each problem a cell takes the methods that pass a bar, sorts them by what the problem asks for, and says whether
# each of the three seeds alone would have chosen the same. All figures are of the 3M base. First two questions to the code itself, live: can the method be
# merged into a plain model, and what does it add to a forward pass if it is not?

# %%
plain, merges, extra = base.model().eval(), {"full": True}, {"full": 0.0}
ids = batch["input_ids"][:, :64]
prompt = {"input_ids": ids, "labels": ids}
bare = operations(plain, backward=False, **prompt)[0]
for name in methods[1:]:
    model = build_model(base, RECIPES[name], RunConfig(steps=100, seed=0)).eval()
    extra[name] = operations(model, backward=False, **prompt)[0] / bare - 1
    try:
        assert operations(model.merge_and_unload(), backward=False, **prompt)[0] == bare
        merges[name] = True
    except ValueError:
        merges[name] = False
    print(
        f"{name:14} attached {extra[name]:+4.0%}, {'merged +0%' if merges[name] else 'cannot be merged'}"
    )
assert merges["lora"]
assert not merges["prompt_tuning"]
assert extra["lora"] > 0.01


# %%
def facts(seed=None):
    """What was measured of each method on the 3M base; of one seed alone, if it is given."""
    found = {}
    for name in ("describe", "sentiment"):
        some = [r for r in records["3m", name] if seed in (None, r.seed) or r.method == "frozen"]  # fmt: skip
        for method, row in compare.rows(some).items():
            if method in ("frozen", compare.RANDOM):
                continue
            one, r = found.setdefault(method, {"method": method}), row[0]
            one[f"{name} score"] = compare.mean(row, "score")
            one[f"{name} share"] = compare.share_of_gap(some, row)
            one[f"{name} forgets"] = compare.forgetting(row)
            one[f"{name} disk"] = compare.mean(row, "disk_bytes")
            one["held"] = r.weight_bytes + r.gradient_bytes + r.optimizer_bytes
            one["undone"] = all(r.forgot("off") == 0 for r in row)
            if name == "describe":
                for points in zip(*(r.validation for r in row), strict=True):
                    if statistics.mean(p["slot_loss"] for p in points) < 0.1:
                        one.setdefault("steps", points[0]["step"])
    return {method: one for method, one in found.items() if "sentiment score" in one and "describe score" in one}  # fmt: skip


def skilled(one, bar=0.9):
    return one["describe share"] >= bar


def steered(one, bar=0.95):
    return one["sentiment share"] >= bar


PROBLEMS = [  # the problem, who passes, what of them is then least, how it is shown
    ("a new skill, as well as can be", skilled, lambda o: -o["describe score"], "score {:.3f}"),
    ("a new skill, little memory", skilled, lambda o: o["held"] / 1e3, "{:,.0f} kB held"),
    ("many tasks on one base", skilled, lambda o: o["describe disk"] / 1e3, "{:,.0f} kB a task"),
    ("few steps", skilled, lambda o: o.get("steps", math.inf), "good by step {}"),
    ("must not forget while it answers", skilled, lambda o: o["describe forgets"], "forgets {:.2f}"),
    ("must be undone to the bit", lambda o: skilled(o) and o["undone"], lambda o: -o["describe score"], "score {:.3f}"),
    ("must cost nothing extra in use", lambda o: skilled(o) and merges[o["method"]], lambda o: -o["describe score"], "score {:.3f}"),
    ("only to be steered, smallest file", steered, lambda o: o["sentiment disk"] / 1e3, "{:,.0f} kB a task"),
    ("only to be steered, must not forget", steered, lambda o: o["sentiment forgets"], "forgets {:.3f}"),
]  # fmt: skip


# %%
def ranking(found, passes, cost):
    """Methods that pass, the best first; a tie goes to the better score on describe."""
    fit = [one for one in found.values() if passes(one)]
    return sorted(fit, key=lambda one: (cost(one), -one["describe score"]))


picks, alone = {}, [facts(seed) for seed in range(3)]
lines = ["| your problem | pass | take | its figure | next | its figure | seeds that agree |"]
lines.append("|" + "---|" * 7)
for problem, passes, cost, form in PROBLEMS:
    order = ranking(facts(), passes, cost)
    picks[problem], name = order[0], order[0]["method"]
    cells = [problem, len(order)]
    for one in order[:2]:
        cells += [one["method"], form.format(abs(cost(one)))]
    agree = sum(ranking(found, passes, cost)[0]["method"] == name for found in alone)
    lines.append("| " + " | ".join(str(c) for c in [*cells, f"{agree} of 3"]) + " |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# How to read it. *Pass* is how many methods reach the bar: for a new skill nine tenths of full fine-tuning's gain, for steering 95 hundredths. A new skill
# leaves no prompt method on the list. *Seeds that agree* is how many of the three would have chosen the same: where it is below three, the first two are
# level, so take whichever is simpler. *Held* is weights, gradients and optimizer state; activations are left out, since checkpointing takes them away from everybody.
#
# If the adapter may be switched off for old text, the rows about forgetting do not matter: every adapter then forgets nothing.
#
# *Few steps* (slot loss below a tenth of a nat) comes from runs that were planned for a hundred. It is fairer to plan a short run, at its own rates; and few
# examples are one more question. For these there are full fine-tuning and LoRA alone (`python -m data.study`, 3M base, three seeds):

# %%
study = compare.load(RESULTS / "study.json")
for steps, examples in ((33, 400), (100, 50), (300, 400)):
    some = [r for r in study if (r.steps, r.n_train) == (steps, examples)]
    row = {m: [r for r in some if r.method == m] for m in ("full", "lora")}
    print(f"{steps:3} steps, {examples} examples:", {m: compare.spread(r, "score") for m, r in row.items()})  # fmt: skip
    if steps == 33:
        assert min(r.score for r in row["full"]) > max(r.score for r in row["lora"])
full = facts()["full"]
assert picks["must not forget while it answers"]["describe forgets"] < full["describe forgets"] / 2
assert picks["a new skill, little memory"]["held"] < full["held"] / 4
assert picks["many tasks on one base"]["describe disk"] < full["describe disk"] / 10
assert (
    picks["only to be steered, smallest file"]["sentiment disk"]
    < picks["many tasks on one base"]["describe disk"]
)

# %% [markdown]
# ## Exercises
#
# Each has a cell that checks your answer. The solutions are in `solutions/09_choosing.ipynb`.
#
# **1 · Warm-up: the floor.** Sixteen equal linear layers in a row. Forward, a layer costs one unit; carrying the gradient back to its input, one; the gradient of
# its weights, one. Full fine-tuning costs 48 units. (a) All weights are frozen, and each layer has an adapter so thin that it costs nothing.
# (b) The adapters are in the last four layers alone, and the gradient need not go further than to the input of the first of these four. What share of 48 is left?

# %% tags=["exercise"]
everywhere = None  # (a), a fraction such as 10 / 48
at_the_top = None  # (b)

# %% tags=["wrong"]
everywhere = 16 / 48
at_the_top = 4 / 48

# %% tags=["wrong"]
everywhere = 32 / 48
at_the_top = (4 + 4) / 48

# %% tags=["solution"]
everywhere = (
    16 + 16
) / 48  # forward, and back to the inputs: only the weights' gradients are saved
at_the_top = (16 + 4) / 48  # forward through all, back through four

# %% tags=["check"]


def units(first_adapter, train_all=False):
    """Operations of a step, counted, in units of one layer's forward pass."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(16)))
    layers.requires_grad_(train_all)
    counter, x = FlopCounterMode(display=False), torch.randn(8, 64, requires_grad=train_all)
    with counter:
        for i, layer in enumerate(layers):
            if i == first_adapter:
                x = x.detach().requires_grad_()  # whatever is trained here needs a gradient
            x = layer(x)
        x.sum().backward()
    return counter.get_total_flops() / (2 * 8 * 64 * 64)


if everywhere is None or at_the_top is None:
    print("not done yet")
else:
    assert units(None, train_all=True) == 48
    assert everywhere != 16 / 48, "(a) the gradient must still go back through every layer's input"
    assert math.isclose(everywhere, units(0) / 48), (
        "(a) which of the three units does freezing save?"
    )
    assert at_the_top != 8 / 48, "(b) the forward pass still goes through all sixteen layers"
    assert math.isclose(at_the_top, units(12) / 48), "(b) forward through all, back through four"
    print(
        f"right: {everywhere:.2f}, and {at_the_top:.2f} at the top: two thirds is no law of nature"
    )

# %% [markdown]
# **2 · What is worth having?** A run is *beaten* if another is at least as good in both score and forgetting, and better in one. Write `front(points)`: from
# a list of pairs (score, forgetting), those that no other beats. A high score is good, high forgetting is bad.


# %% tags=["exercise"]
def front(points): ...  # return a list of the pairs that are not beaten


# %% tags=["wrong"]
def front(points):
    return [p for p in points if not any(q[0] > p[0] and q[1] > p[1] for q in points)]


# %% tags=["wrong"]
def front(points):
    return [p for p in points if not any(q[0] >= p[0] and q[1] <= p[1] for q in points)]


# %% tags=["wrong"]
def front(points):
    return [p for p in points if not any(q[0] > p[0] and q[1] < p[1] for q in points)]


# %% tags=["solution"]
def front(points):
    def beaten(p):
        return any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points)

    return [p for p in points if not beaten(p)]


# %% tags=["check"]
toy = [(0.9, 1.0), (0.8, 0.5), (0.9, 2.0), (0.7, 0.6), (0.95, 3.0), (0.2, 0.5)]
answer = front(toy)
if answer is None:
    print("not done yet")
else:
    answer = set(answer)
    assert answer, "nothing is left: does each point beat itself?"
    assert (0.8, 0.5) in answer, "(0.8, 0.5) forgets least: is low forgetting taken for bad?"
    assert (0.9, 2.0) not in answer, (
        "(0.9, 1.0) beats (0.9, 2.0): level in one, better in the other"
    )
    assert answer == {(0.9, 1.0), (0.8, 0.5), (0.95, 3.0)}, f"yours is {sorted(answer)}"
    runs = {
        (p["score"], p["forgetting"]): method
        for method, entry in swept("1m", "describe").items()
        for p in entry["points"]
        if "forgetting" in p
    }
    kept = sorted((runs[pair], round(pair[0], 2), round(pair[1], 2)) for pair in front(list(runs)))
    print(
        f"right; in the figure above, {len(kept)} runs of {len(runs)} are not beaten:",
        *kept,
        sep="\n",
    )

# %% [markdown]
# **3 · LoRA+.** Hayou et al. 2024 (arXiv 2402.12354) argue that B should learn faster than A, the more so the wider the model, and suggest a
# ratio of about sixteen. Write `groups(model, rate, ratio)`: two parameter groups for an optimizer, first all `lora_A` at `rate`, then all `lora_B` at `ratio` times `rate`.
# Then `train` in the check measures it, in short runs. **Guess:** does LoRA+ win at the same rate for A? And when each has a rate of its own?
# (The paper's argument grows with the width; ours is 128.)


# %% tags=["exercise"]
def groups(model, rate, ratio): ...  # return [{"params": […], "lr": …}, {"params": […], "lr": …}]


# %% tags=["wrong"]
def groups(model, rate, ratio):
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "lora_B" in n], "lr": rate},
        {"params": [p for n, p in named if "lora_A" in n], "lr": ratio * rate},
    ]


# %% tags=["wrong"]
def groups(model, rate, ratio):
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "lora_B" not in n], "lr": rate},
        {"params": [p for n, p in named if "lora_B" in n], "lr": ratio * rate},
    ]


# %% tags=["wrong"]
def groups(model, rate, ratio):
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "lora_A" in n], "lr": rate / ratio},
        {"params": [p for n, p in named if "lora_B" in n], "lr": rate},
    ]


# %% tags=["solution"]
def groups(model, rate, ratio):
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "lora_A" in n], "lr": rate},
        {"params": [p for n, p in named if "lora_B" in n], "lr": ratio * rate},
    ]


# %% tags=["check"]
def train(rate, ratio, steps=33, warmup=3, seed=0):
    """The slot loss after a short run of LoRA with these groups, warm-up and cosine as in the lab."""
    model = build_model(base, RECIPES["lora"], RunConfig(steps=steps, seed=seed)).train()
    optimizer = torch.optim.AdamW(groups(model, rate, ratio), weight_decay=0.0)

    def scale(step):
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    for part in itertools.islice(tasks.shuffled(task.train, 16, seed), steps):
        model(**tasks.collate(part, base.end, "cpu"))[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    loss = task_loss(model, task.validation, base.end)["slot_loss"]
    print(f"A at {rate:g}, B at {ratio * rate:g}: slot loss {loss:.3f}")
    return loss


model = build_model(base, RECIPES["lora"], RunConfig(steps=33, seed=0))
two = groups(model, 0.01, 16)
if two is None:
    print("not done yet")
else:
    names = {id(p): n.split(".")[-2] for n, p in model.named_parameters()}
    kinds = [{names[id(p)] for p in group["params"]} for group in two]
    assert len(two) == 2, "two groups, please"
    assert kinds[0] != {"lora_B"}, "A comes first: is it B that learns faster?"
    assert kinds == [{"lora_A"}, {"lora_B"}], f"A alone, then B alone; yours: {kinds}"
    assert sum(len(group["params"]) for group in two) == 32, "each A and each B, of sixteen layers"
    assert math.isclose(two[0]["lr"], 0.01), "A learns at `rate` itself"
    assert math.isclose(two[1]["lr"], 0.16), "B learns at ratio · rate"
    print("right; now measured:")
    plain, plus = ({rate: train(rate, ratio) for rate in rates} for ratio, rates in ((1, (0.0025, 0.01)), (16, (0.00125, 0.0025))))  # fmt: skip
    print(
        f"at the same rate for A, LoRA+ has {plus[0.0025] / plain[0.0025]:.1f} times LoRA's loss (expect 0.1 to 0.5)"
    )
    print(
        f"each at its better rate, {min(plus.values()) / min(plain.values()):.1f} times (expect 1.0 to 1.5)"
    )
    assert plus[0.0025] < 0.7 * plain[0.0025]
    assert min(plus.values()) > 0.8 * min(plain.values())

# %% [markdown]
# **4 · DoRA.** Liu et al. 2024 (arXiv 2402.09353) split a weight into magnitude and direction, and let LoRA turn the direction alone:
#
# $$ W' = m \cdot \frac{W + \frac{\alpha}{r} B A}{\lVert W + \frac{\alpha}{r} B A \rVert} $$
#
# The norm is taken for each output of the layer (a row of our W, which is (out, in)), so m has one number an output; it is trained, and starts at the norms of W. Write the module. (To save memory the paper takes the norm
# for a constant in the backward pass. You need not.) Name your tensors `A`, `B` and `m`.


# %% tags=["exercise"]
class MyDora(torch.nn.Module):
    def __init__(self, base_layer, r, alpha):
        super().__init__()
        self.base_layer = base_layer
        # your A (r, in), B (out, r) and m (out,): parameters

    def forward(self, x): ...  # W' x + b


# %% tags=["wrong"]
class MyDora(torch.nn.Module):
    def __init__(self, base_layer, r, alpha):
        super().__init__()
        self.base_layer, self.scale = base_layer.requires_grad_(False), alpha / r
        self.A = torch.nn.Parameter(torch.randn(r, base_layer.in_features) / r**0.5)
        self.B = torch.nn.Parameter(torch.zeros(base_layer.out_features, r))
        self.m = torch.nn.Parameter(torch.ones(base_layer.out_features))

    def forward(self, x):
        v = self.base_layer.weight + self.scale * self.B @ self.A
        w = self.m[:, None] * v / v.norm(dim=1, keepdim=True)
        return x @ w.T + self.base_layer.bias


# %% tags=["wrong"]
class MyDora(torch.nn.Module):
    def __init__(self, base_layer, r, alpha):
        super().__init__()
        self.base_layer, self.scale = base_layer.requires_grad_(False), alpha / r
        self.A = torch.nn.Parameter(torch.randn(r, base_layer.in_features) / r**0.5)
        self.B = torch.nn.Parameter(torch.zeros(base_layer.out_features, r))
        self.m = torch.nn.Parameter(base_layer.weight.norm(dim=1))

    def forward(self, x):
        v = self.base_layer.weight + self.scale * self.B @ self.A
        w = self.m[:, None] * v / self.base_layer.weight.norm(dim=1, keepdim=True)
        return x @ w.T + self.base_layer.bias


# %% tags=["wrong"]
class MyDora(torch.nn.Module):
    def __init__(self, base_layer, r, alpha):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.A = torch.nn.Parameter(torch.randn(r, base_layer.in_features) / r**0.5)
        self.B = torch.nn.Parameter(torch.zeros(base_layer.out_features, r))
        self.m = torch.nn.Parameter(base_layer.weight.norm(dim=1))

    def forward(self, x):
        v = self.base_layer.weight + self.B @ self.A
        w = self.m[:, None] * v / v.norm(dim=1, keepdim=True)
        return x @ w.T + self.base_layer.bias


# %% tags=["solution"]
class MyDora(torch.nn.Module):
    def __init__(self, base_layer, r, alpha):
        super().__init__()
        self.base_layer, self.scale = base_layer.requires_grad_(False), alpha / r
        self.A = torch.nn.Parameter(torch.randn(r, base_layer.in_features) / r**0.5)
        self.B = torch.nn.Parameter(torch.zeros(base_layer.out_features, r))
        self.m = torch.nn.Parameter(base_layer.weight.norm(dim=1))

    def forward(self, x):
        v = self.base_layer.weight + self.scale * self.B @ self.A  # (out, in)
        w = self.m[:, None] * v / v.norm(dim=1, keepdim=True)
        return x @ w.T + self.base_layer.bias


# %% tags=["check"]
torch.manual_seed(0)
linear, x = torch.nn.Linear(10, 7), torch.randn(64, 10)
mine = MyDora(linear, r=3, alpha=5)
if mine(x) is None:
    print("not done yet")
else:
    trained = {name: tuple(p.shape) for name, p in mine.named_parameters() if p.requires_grad}
    assert trained == {"A": (3, 10), "B": (7, 3), "m": (7,)}, (
        f"trained must be A, B and m: {trained}"
    )
    assert torch.allclose(mine(x), linear(x), atol=1e-5), (
        "at the start it must answer as the layer does: is B zero, m the norms of W, and b there?"
    )
    with torch.no_grad():
        mine.B.normal_()
        mine.m.mul_(torch.linspace(0.5, 2, 7))
    v = linear.weight + 5 / 3 * mine.B @ mine.A
    now = torch.stack([mine(unit[None])[0] - linear.bias for unit in torch.eye(10)], dim=1)
    assert torch.allclose(now.norm(dim=1), mine.m, atol=1e-4), (
        "each row of W' must be as long as m says: divide by the norm of what you have NOW"
    )
    expected = mine.m[:, None] * torch.nn.functional.normalize(v, dim=1)
    assert torch.allclose(now, expected, atol=1e-4), "the direction is off: is it W + (α / r) B A?"
    print(
        f"right: {sum(math.prod(s) for s in trained.values())} trained numbers, r (in + out) + out"
    )

# %% [markdown]
# ## Summary, at this size
#
# - Freezing saves parameters, gradients and optimizer state, a third of the arithmetic at most, and with LoRA none of the activations: checkpointing does that.
# - A method is compared with its own learning rate or not at all: at one rate for both, the rate decides who wins.
# - Without weight decay, "LoRA forgets less" is true at the same rate and false at the same score; weight decay changes that more than the method does. Off, an adapter forgets nothing.
# - For a new skill LoRA and its kin come close to full fine-tuning and the prompt methods do not; to steer, almost anything will do, so take the smallest.
# - Loss and score mostly agree and part where it is close; a higher rank needs a new search.
#
# **To read:** Biderman et al. 2024, arXiv 2405.09673, sections 3 and 4; Hayou et al. 2024, arXiv 2402.12354; Liu et al. 2024,
# arXiv 2402.09353; He et al. 2021, *Towards a Unified View of Parameter-Efficient Transfer Learning*, arXiv 2110.04366.
