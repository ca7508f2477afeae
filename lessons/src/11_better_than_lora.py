# %% [markdown]
# # 11 · Better than LoRA?
#
# Your LoRA for a 7B model works. Then a colleague sends you a paper: the new method scores two points more than LoRA. Next week there is
# another paper. Each method would cost you a week. Six names come up often: rsLoRA, LoRA+, PiSSA, DoRA, VeRA and (IA)³.
#
# After this lesson you can
# - say in one sentence what each of the six changes;
# - write the core of each, and count what it trains;
# - see why, at a fixed rank, rsLoRA is LoRA with another α;
# - compare methods so that nobody wins by the choice of settings;
# - show how a bad comparison makes a method win.
#
# **Time.** About an hour, and 15 minutes more for "Going further". The measurements are for a GPT with 1 million parameters, on one task. [Glossary](README.md#glossary).

# %%
import inspect
import math
import statistics

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display
from torch import nn

from minipeft import LoraConfig, add_lora, add_pissa
from minipeft.data import choosing, tournament
from minipeft.data.sections import paired, with_interval
from minipeft.grader.lessons import check, claim, hint, solution, solved
from minipeft.lab import DATA, report, tasks
from minipeft.lab.base import load_base
from minipeft.lab.finetune import finetune
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.methods.dora import DoraLinear

NAMES, COLORS, METHODS = report.NAMES, report.COLORS, list(tournament.METHODS)
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
base = load_base(DATA / "base" / "1m")
task = tasks.load_task(base, "describe")

# %% [markdown]
# ## Before you start
#
# **1.** (Lesson 02) A layer has 128 inputs and 384 outputs. How many numbers does a LoRA of rank 8 train there?

# %% tags=["exercise"]
numbers = None

# %% tags=["solution"]
numbers = 8 * (128 + 384)  # r (in + out)

# %% tags=["check"]
check("11.numbers", numbers)

# %% [markdown]
# **2.** (Lesson 09) You raise the rank from 8 to 32. With r = 8 you had α = 16. Which α keeps the scaling α/r?

# %% tags=["exercise"]
alpha = None

# %% tags=["solution"]
alpha = 64

# %% tags=["check"]
check("11.alpha", alpha)

# %% [markdown]
# ## Six changes
#
# Orange is trained, grey is frozen. W is a layer's weight, A and B are LoRA's factors.

# %%
report.show(
    report.successors_figure(),
    "Seven small drawings: LoRA next to a frozen weight, and what each of the six other methods changes in this picture.",
)

# %% [markdown]
# - **rsLoRA** multiplies B A by α/√r instead of α/r ([paper](https://arxiv.org/abs/2312.03732)).
# - **LoRA+** gives B a higher learning rate than A ([paper](https://arxiv.org/abs/2402.12354)).
# - **PiSSA** starts A and B at the largest singular directions of W ([paper](https://arxiv.org/abs/2404.02948)).
# - **DoRA** trains the length of each row of the weight apart from its direction ([paper](https://arxiv.org/abs/2402.09353)).
# - **VeRA** draws one random A and one random B for the whole model, and trains two vectors per layer ([paper](https://arxiv.org/abs/2310.11454)).
# - **(IA)³** multiplies each output of a layer, or each input, by a trained number ([paper](https://arxiv.org/abs/2205.05638)).
#
# **Your guess:** each gets about as many learning rates and decays. Order the seven by score on `describe`, best first. And why?

# %%
guess = None  # for example ["dora", "lora", "lora_plus", "pissa", "rslora", "vera", "ia3"]
reason = ""

# %% [markdown]
# ## rsLoRA is another α
#
# With α/r, the update gets smaller as the rank grows. With α/√r it does not.
#
# **Exercise 1.** rsLoRA has r = 8 and α = 16. Which α gives plain LoRA of rank 8 the same scaling?

# %% tags=["exercise"]
same_scaling = None  # a number, or an expression

# %% tags=["solution"]
same_scaling = 8 * 16 / math.sqrt(8)  # α / 8 = 16 / √8

# %% tags=["check"]
check("11.rslora", same_scaling)


# %% [markdown]
# rsLoRA and two LoRAs, ten steps each, with the same seed:

# %%
losses = {}
settings = {
    "rsLoRA, α = 16": {"lora_alpha": 16, "use_rslora": True},
    "LoRA, α = 16": {"lora_alpha": 16},
}
if solved("11.rslora"):
    settings["LoRA with your α"] = {"lora_alpha": same_scaling}
for name, options in settings.items():
    model = base.model().train()
    torch.manual_seed(0)
    add_lora(model, LoraConfig(r=8, target_modules="all-linear", **options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.005)
    losses[name] = []
    for examples in (task.train[16 * i : 16 * i + 16] for i in range(10)):
        loss = model(**tasks.collate(examples, base.end, model.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[name].append(loss.item())
    print(f"{name:18}", *(f"{loss:.3f}" for loss in losses[name]))
rslora, plain, *yours = losses.values()
claim(plain[-1] > rslora[-1], "the smaller scaling learns more slowly at this learning rate")
for row in yours:
    claim(max(abs(a - b) for a, b in zip(rslora, row, strict=True)) < 1e-3, "both are the same")

# %% [markdown]
# At one rank, rsLoRA and LoRA are the same method with other settings. A paper that compares them at one rank, with one α and one learning rate, compares settings.
#
# ## LoRA+: two learning rates
#
# B starts at zero, so at first only B gets a gradient. In a wide layer, the paper argues, one rate is too low for B or too high for A. LoRA+ takes η for A and
# 16 η for B.
#
# **Exercise 2.** Write the parameter groups for an optimizer. `named` is a list of pairs (name, parameter). B's names contain `lora_B`. Return two
# dictionaries with the keys `"params"` and `"lr"`: first all others, then B.


# %% tags=["exercise"]
def plus_groups(named, lr, ratio): ...  # return two dictionaries


# %% tags=["solution"]
def plus_groups(named, lr, ratio):
    b = [p for name, p in named if "lora_B" in name]
    others = [p for name, p in named if "lora_B" not in name]
    return [{"params": others, "lr": lr}, {"params": b, "lr": ratio * lr}]


# %% tags=["check"]
check("11.plus_groups", plus_groups)

# %% [markdown]
# ## PiSSA: start where W is large
#
# The singular value decomposition (lesson 02) writes W as U S Vᵀ. PiSSA puts the r largest singular values into the factors:
#
# $$ A_0 = \sqrt{S_r / s}\; V_r^\top, \qquad B_0 = U_r \sqrt{S_r / s}, \qquad W_\text{res} = W - s\,B_0 A_0 $$
#
# $S_r$ has the r largest singular values, $U_r$ and $V_r$ the first r columns of U and V, and s is α/r. $W_\text{res}$ is frozen; A and B are trained from there. At the start the sum is W.
#
# **Exercise 3.** Write `pissa_start(w, r, s)`. It returns A₀ (r, in) and B₀ (out, r).


# %% tags=["exercise"]
def pissa_start(w, r, s): ...  # return A, B


# %% tags=["solution"]
def pissa_start(w, r, s):
    u, sizes, vh = torch.linalg.svd(w, full_matrices=False)  # vh is Vᵀ
    root = (sizes[:r] / s).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


# %% tags=["check"]
check("11.pissa_start", pissa_start)

# %% [markdown]
# peft writes $W_\text{res}$ into the model. Without the adapter, this model is no longer the base. minipeft keeps W, and subtracts s B₀ A₀ in the adapter.
#
# ## DoRA: lengths and directions
#
# DoRA takes the row lengths of W out, as a vector m. A LoRA changes the matrix to V = W + s B A. Then each row of V is divided by its length, and multiplied by its entry of m:
#
# $$ W' = m \, \frac{V}{\lVert V \rVert} $$
#
# At the start B is zero, and m holds the lengths of W's rows.
#
# **Exercise 4.** Write `dora_weight(w, m, a, b, s)`: the matrix W' (out, in). m has the shape (out,).


# %% tags=["exercise"]
def dora_weight(w, m, a, b, s): ...  # return W'


# %% tags=["solution"]
def dora_weight(w, m, a, b, s):
    v = w + s * b @ a
    return m[:, None] * v / v.norm(dim=1, keepdim=True)


# %% tags=["check"]
check("11.dora_weight", dora_weight)

# %% [markdown]
# Compare with minipeft. `directions()` is V. ‖V‖ counts as a constant: no gradient flows through it, as in the paper.

# %%
print(inspect.getsource(DoraLinear.ratio))
print(inspect.getsource(DoraLinear.merged))

# %% [markdown]
# ## VeRA and (IA)³: only vectors
#
# VeRA computes $y = W x + b \cdot B (d \cdot A x)$. (The dot multiplies entry by entry.) A and B are random, frozen, and shared by all layers. Only the vectors d (r numbers) and b (one number per output) are
# trained. (IA)³ has no matrices: $y = l \cdot W x$, with one trained number per output.
#
# **Exercise 5.** Again the layer with 128 inputs and 384 outputs. How many numbers does VeRA train there with r = 256? And (IA)³, on the outputs?

# %% tags=["exercise"]
vera_numbers = None
ia3_numbers = None

# %% tags=["solution"]
vera_numbers = 256 + 384  # d and b
ia3_numbers = 384

# %% tags=["check"]
check("11.vectors", vera_numbers, ia3_numbers)

# %% [markdown]
# ## The tournament
#
# The task is `describe`. All methods, and full fine-tuning as a reference, get 21 settings ((IA)³: 25):
# - six learning rates, each twice the one before, in their own ranges;
# - at each rate, no decay and two decays towards the start (lesson 02); at the three highest rates a third decay;
# - for (IA)³ a seventh rate with every decay, as its sixth was best with decay;
# - three seeds, 100 steps; r = 8 and α = 16, for VeRA r = 256.
#
# First without decay:

# %%
found = tournament.grid_points()
plain = [point for point in found if not point["decay"]]
figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharey=True, layout="constrained")
for axis, method in zip(axes.flat, METHODS[2:], strict=True):
    for name, color, width in (("lora", COLORS["frozen"], 1.5), (method, COLORS[method], 2.5)):
        rows = sorted((p["learning_rate"], p["score"]) for p in plain if p["method"] == name)
        axis.plot(*zip(*rows, strict=True), "o-", color=color, linewidth=width)
    axis.set(xscale="log", xlim=(5e-4, 2.2), ylim=(0, 1.03), title=f"{NAMES[method]} (grey: LoRA)")
    axis.set_xticks([0.001, 0.01, 0.1], ["0.001", "0.01", "0.1"])
for axis in axes[1]:
    axis.set_xlabel("learning rate η (of A, for LoRA+)")
for axis in axes[:, 0]:
    axis.set_ylabel("slot accuracy")
report.show(
    figure,
    "Slot accuracy by learning rate, one panel per method with LoRA in grey: the methods have their best rates at different places.",
)

# %% [markdown]
# The best rates differ. So at one common rate, some method always looks bad.
#
# **Exercise 6.** You want a new method to win. You tune it, and run LoRA at one rate only. `lora` is a dictionary from learning rate to LoRA's score, and `best` is the score of the tuned
# method. Write `unfair(lora, best)`: it returns the rate at which LoRA looks worst, and the lead of the new method there.


# %% tags=["exercise"]
def unfair(lora, best): ...  # return the rate and the lead


# %% tags=["solution"]
def unfair(lora, best):
    rate = min(lora, key=lora.get)
    return rate, best - lora[rate]


# %% tags=["check"]
check("11.unfair", unfair)

# %%
tuned = {m: max(p["score"] for p in plain if p["method"] == m) for m in METHODS[1:]}
rate = tournament.ONE_RATE  # LoRA's lowest
(lora,) = (p["score"] for p in plain if (p["method"], p["learning_rate"]) == ("lora", rate))
lines = [
    [NAMES[m], f"{tuned[m]:.2f}", f"{tuned[m] - lora:+.2f}", f"{tuned[m] - tuned['lora']:+.2f}"]
    for m in METHODS[2:]
]
head = [
    "method",
    "its best score",
    f"lead over LoRA at {rate:g}",
    "lead over LoRA at LoRA's best rate",
]
display(Markdown(report.markdown_table(head, lines)))
claim(sum(tuned[m] > lora for m in METHODS[2:]) >= 5, "against one low rate, at least five win")
at_rates = {p["learning_rate"]: p["score"] for p in plain if p["method"] == "lora"}
claim(at_rates[max(at_rates)] < 0.05, "at its highest rate, LoRA scores near zero")

# %% [markdown]
# Your function would choose LoRA's highest rate. There LoRA scores near zero: nobody would believe that. So this table takes LoRA's lowest rate: almost all win. The last column is the fair one.
#
# ## Who wins, then?
#
# Now decay joins in. For each method, take the settings whose validation score is at most two hundredths below its best. Of these, the one that forgets least is trained with
# new seeds. For the same seed, all methods see the same examples in the same order, so we subtract LoRA's result seed by seed.
#
# **Exercise 7.** Write the verdict. It is `"better"` or `"worse"` if the t interval of the mean difference excludes zero, and else `"not shown"`. For n differences, the
# interval is the mean ± t · s / √n. Here s is the sample standard deviation, and t is given.


# %% tags=["exercise"]
def verdict(differences, t): ...  # "better", "worse" or "not shown"


# %% tags=["solution"]
def verdict(differences, t):
    mean, n = statistics.mean(differences), len(differences)
    half = t * statistics.stdev(differences) / math.sqrt(n)
    return "better" if mean > half else "worse" if mean < -half else "not shown"


# %% tags=["check"]
check("11.verdict", verdict)
if not solved("11.verdict"):  # until yours is right, the lesson uses its own
    verdict = tournament.verdict

# %%
runs, measured_on = tournament.compared()
n = len(runs["lora", True])
t = report.T_95[n - 2]
lines = []
means = {method: statistics.mean(r["score"] for r in runs[method, True]) for method in METHODS}
for method in sorted(METHODS, key=means.get, reverse=True):
    line = [NAMES[method], f"{means[method]:.3f}"]
    for key in ("score", "forgetting"):
        gap = paired(runs[method, True], runs["lora", True], key)
        word = "–" if method == "lora" else verdict(gap, t)
        word = {"better": "higher", "worse": "lower"}.get(word, word)
        line += ["–", "–"] if method == "lora" else [with_interval(gap, "+.3f"), word]
    lines.append(line)
head = ["method", "score", "minus LoRA", "verdict", "forgetting minus LoRA", "verdict"]
display(Markdown(f"With the best decay, {measured_on}:\n\n{report.markdown_table(head, lines)}"))
print("your guess, best first:", ", ".join(NAMES.get(m, m) for m in guess or ["none"]))

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for axis, key in zip(axes, ("score", "forgetting"), strict=True):
    for row, method in enumerate(METHODS):
        values = [run[key] for run in runs[method, True]]
        axis.plot(values, [row] * n, "o", color=COLORS[method], alpha=0.5)
        mean, half = statistics.mean(values), report.interval(values)
        axis.errorbar(mean, row, xerr=half, fmt="k|", markersize=12, capsize=3)
    axis.axvline(
        statistics.mean(r[key] for r in runs["lora", True]), color=COLORS["frozen"], ls=":"
    )
    axis.set_yticks(range(len(METHODS)), [NAMES[m] for m in METHODS])
axes[0].set(xlabel="slot accuracy")
axes[1].set(xlabel="forgetting (nats per token, log scale)", xscale="log")
axes[1].set_xticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"], minor=False)
axes[1].minorticks_off()
axes[0].invert_yaxis()
report.show(
    figure,
    "Score and forgetting of every run with decay, by method, with 95 % intervals; the dotted line is LoRA's mean.",
)

# %% [markdown]
# Full fine-tuning beats LoRA on score and on forgetting. Of the six, none does both. DoRA, PiSSA and LoRA+ score a little higher; the first two forget more, and for LoRA+ we see no difference. rsLoRA forgets more, and a higher score is not shown. VeRA and (IA)³ score lower, and forget more. (With fourteen comparisons, an interval that
# hardly excludes zero proves little.) A setting that changes the model more may both score higher and forget more. So compare at equal scores. The next table shows the least forgetting of all settings that reach a score on validation examples, *without decay → with or without*. (–: none does.)

# %%
display(Markdown(tournament.equal_table(found)))
least = choosing.equal_score(found, 0.95)
rivals = {m: least[m][1]["forgetting"] for m in ("lora", "rslora", "lora_plus", "dora")}
claim(
    max(rivals.values()) < min(rivals.values()) + 0.03, "these four forget about the same at 0.95"
)
claim(least["pissa"][1]["forgetting"] > 2 * rivals["lora"], "PiSSA forgets more than twice as much")
claim(least["full"][1]["forgetting"] < min(rivals.values()), "full fine-tuning forgets less")

# %% [markdown]
# With decay, LoRA, rsLoRA, LoRA+ and DoRA
# forget about the same in the middle column. In the last column LoRA forgets more than these three. rsLoRA is LoRA with a larger α. We did not tune α: try that before you change the method.
#
# Our intervals come from five seeds, one small model and one task. For large models, the paper *Learning Rate Matters* (lesson 09) finds tuned variants about as good as LoRA. <!-- claim: tournament -->
#
# ## Summary
#
# - Five of the six change LoRA: its scaling, its learning rates, its start, or what is trained. (IA)³ has no matrices.
# - At a fixed rank, rsLoRA is LoRA with another α.
# - VeRA and (IA)³ train far fewer numbers than LoRA.
# - Each method has its own best learning rate. A comparison at one rate compares settings.
# - Give every method about as many settings, choose on validation examples, and look at intervals of paired differences.
#
# **Do you remember?** Answer first, then open.
#
# <details><summary>1. A paper trains LoRA and rsLoRA at rank 64 with the same α and the same learning rate. rsLoRA is better. What did it compare?</summary>Two scalings of one method. LoRA with a larger α would have done the same.</details>
#
# <details><summary>2. Why does a PiSSA model without its adapter differ from the base in peft, and not in minipeft?</summary>peft writes W without its largest part into the model. minipeft leaves W as it is, and subtracts that part in the adapter.</details>
#
# <details><summary>3. A new method beats LoRA on average over five seeds, and the interval of the difference includes zero. What do you report?</summary>The difference and its interval: an advantage was not shown.</details>
#
# **To read:** [*Learning Rate Matters*](https://arxiv.org/abs/2602.04998), on LoRA and nine variants.
#
# # Going further
#
# ## What does a step cost?
#
# DoRA computes all of V in every step, PiSSA subtracts B₀ A₀ each time, and VeRA's r is 256. Here are the times of a training step, in multiples of LoRA's (this takes a minute or two). LoRA, rsLoRA and LoRA+ do the same work, so their
# differences are noise. Run it when nothing else runs on your machine; if these differences are large, run it again.

# %% tags=["timing"]
seconds = {}
for _ in range(2):  # in turn, so that a busy moment hits all
    for method in METHODS[1:]:
        run = RunConfig(steps=8, learning_rate=1e-3, quiet=True, n_evaluations=1, n_generate=1)
        found_seconds = finetune(base, task, RECIPES[method], run).seconds_per_step
        seconds[method] = min(seconds.get(method, math.inf), found_seconds)
for method, value in seconds.items():
    print(f"{NAMES[method]:8} {value / seconds['lora']:.2f}")

# %% [markdown]
# ## On another task
#
# We ran the same finals on `sentiment`, where the answer is "good" or "bad": with decay and without, at the ranks 1, 8 and 32 (full fine-tuning and (IA)³ have none).

# %%
names = ("tournament-sentiment", "tournament-sentiment-ranks")
for decayed in (False, True):
    easy = [
        run
        for name in names
        for (_, with_decay), rows in tournament.finals(name).items()
        for run in rows
        if with_decay == decayed
    ]
    scores, forgot = ([run[key] for run in easy] for key in ("score", "forgetting"))
    print(f"{'with' if decayed else 'no'} decay, {len(easy)} runs", end=": ")
    print(f"score {min(scores):.3f} to {max(scores):.3f}", end=", ")
    print(f"forgetting {min(forgot):+.3f} to {max(forgot):+.3f} nats per token")
    claim(min(scores) > 0.98, "every run learns the task")
claim(max(forgot) < 0.05, "with decay, no run forgets much")

# %% [markdown]
# Every method learns it, at every rank. With decay, none forgets much. So their scores on this task cannot rank the methods. Before you trust a benchmark, ask whether it could have shown a difference.
#
# ## At other ranks
#
# All this was rank 8. **Guess first:** do LoRA, rsLoRA, LoRA+, PiSSA and DoRA differ more at rank 1, or at rank 32? (In the table, η is the learning rate. ηλ, η times the weight decay λ, is the share by which weights decay per step.)

# %%
display(Markdown(tournament.on_ranks()))
at_rank, names = tournament.ranks_runs(), ("lora", "rslora", "lora_plus", "pissa", "dora")
for r in (1, 32):
    for decayed in (False, True):
        scores = {m: [run["score"] for run in at_rank[m, r, decayed][1]] for m in names}
        means = [statistics.mean(values) for values in scores.values()]
        text = f"r = {r}, {'with' if decayed else 'no'} decay: the five means span"
        print(text, f"{max(means) - min(means):.3f}")
        for values in scores.values():
            gaps = [a - b for a, b in zip(values, scores["lora"], strict=True)]
            claim(statistics.mean(gaps) <= report.interval(gaps), f"r = {r}: none is clearly ahead")

# %% [markdown]
# They differ more at rank 1. But there the seeds differ more too, and no interval of these five excludes zero. At rank 32 all five score about the same. So the small leads of DoRA, PiSSA and LoRA+ with decay at rank 8 are not confirmed at the other two ranks.
#
# ## What breaks it: a start that is not subtracted
#
# Somebody starts A and B like PiSSA, and forgets to take their product out of W. The largest part of each weight is then there twice.

# %%
model = base.model()
config = LoraConfig(init_lora_weights="pissa", target_modules=["c_attn", "c_fc", "c_proj"])
layers = add_pissa(model, config)
for layer in layers.values():
    layer.start_B.zero_()  # now nothing is subtracted
ids = base.held_out[:16]
with torch.no_grad():
    doubled, right = (
        model(ids, labels=ids).loss.item(),
        base.pretrained(ids, labels=ids).loss.item(),
    )
print(f"loss on pretraining text: {right:.2f}; with the largest part twice: {doubled:.2f}")
claim(doubled > right + 1, "the model is damaged before any training")

# %% [markdown]
# ## Add a method yourself
#
# *LayerNorm tuning* ([paper](https://arxiv.org/abs/2312.11420)) trains only the scales and shifts of the LayerNorms.
#
# **Exercise 8.** Write `add_ln_tuning(model)`. It freezes the model except for its `nn.LayerNorm` modules, and returns the names of these modules.


# %% tags=["exercise"]
def add_ln_tuning(model): ...  # return a list of names


# %% tags=["solution"]
def add_ln_tuning(model):
    model.requires_grad_(False)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    for norm in norms.values():
        norm.requires_grad_(True)
    return list(norms)


# %% tags=["check"]
check("11.ln_tuning", add_ln_tuning)

# %% [markdown]
# To make it a method of minipeft, like the six of this lesson, four things are needed:
# 1. **One file**, `minipeft/methods/ln_tuning.py`: a config, and a layer that holds `base_layer` and trains *changes* of its scale and shift, so that the base is
#    not touched. [bitfit.py](../minipeft/methods/bitfit.py) does this for biases.
# 2. **One line** in `METHODS` of [adapters.py](../minipeft/adapters.py).
# 3. **One `Recipe`** in [recipes.py](../minipeft/lab/recipes.py). Then `minipeft finetune --method ln_tuning --learning-rate …` runs.
# 4. **One test**: merging changes no logits, and the parameter count is the formula's. [tests/test_extending.py](../tests/test_extending.py) does all four steps
#    with a method of its own. Copy it, and make it yours.
