# %% [markdown]
# # 05 · P-tuning
#
# In lesson 04, prompt tuning failed with one seed of four. On a large model you cannot train four times to be safe. A paper has a remedy: do not train the virtual
# tokens directly, but train a small network that computes them. It costs memory and code, so before you adopt such a trick you want to know two things.
# Does it help? And does it help for the reason that the paper gives?
#
# After this lesson you can
# - write P-tuning, and count what it trains and what it keeps;
# - remove the network after training without changing the output;
# - compare two methods fairly when one also changes the start and the step size;
# - read a published comparison with care.
#
# **Time.** About an hour, and 20 minutes more for "Going further". Results are for GPTs with 1 million parameters, unless we say otherwise.
# Unknown words are in the [glossary](README.md#glossary).

# %%
import inspect
import json
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display
from torch import nn

from minipeft import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    p_tuning,
)
from minipeft.grader.lessons import check, claim, hint, solution
from minipeft.lab import DATA, compare, report, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import task_loss
from minipeft.lab.finetune import finetune
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.lab.train import train

# %%
COLORS = report.COLORS
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
base = load_base(DATA / "base" / "1m")
task = tasks.load_task(base, "sentiment")
ids = torch.tensor([task.test[0].prompt_ids])

# %% [markdown]
# ## Before you start
#
# **1.** (Lesson 04) Virtual tokens start as `"noise"` or as `"embeddings"`. Which start needs the larger learning rate?

# %% tags=["exercise"]
larger = None

# %% tags=["solution"]
larger = "noise"  # its numbers are larger, so a step changes them less

# %% tags=["check"]
check("05.larger", larger)

# %% [markdown]
# **2.** (Lesson 04) Which of `"LoRA"` and `"prompt tuning"` can be merged into the weights? Answer with a list.

# %% tags=["exercise"]
mergeable = None

# %% tags=["solution"]
mergeable = ["LoRA"]  # virtual tokens change the input, and no weight

# %% tags=["check"]
check("05.mergeable", mergeable)

# %% [markdown]
# ## Why train a network only to throw it away?
#
# The task is `sentiment`: a review, and the answer "good" or "bad". Below are the scores of prompt tuning: 20 virtual tokens, 100 steps, four seeds. P-tuning was
# run in the same way.
#
# **Your guess:** what is the mean score of P-tuning?

# %%
guess = None  # from 0 to 1
reason = ""
folder = DATA / "results"
shipped = {
    "1M": compare.rows(compare.load(folder / "1m" / "sentiment" / "compare.json")),
    "3M": compare.rows(compare.load(folder / "sentiment" / "compare.json")),
}
print(task.train[0].prompt, "->", task.train[0].completion)
print("prompt tuning:", [f"{record.score:.2f}" for record in shipped["1M"]["prompt_tuning"]])

# %% [markdown]
# ## The idea
#
# Prompt tuning trains P, a matrix with p rows of width d. P-tuning computes P with a network from another matrix H of the same shape:
#
# $$ P = \text{MLP}(H) \quad \text{or} \quad P = \text{MLP}(\text{BiLSTM}(H)), \qquad \text{logits} = \text{model}([P;\, E(x)]) $$
#
# E(x) are the embeddings of the text x, and H starts as noise. The MLP has three linear layers (only two after a BiLSTM), with ReLU between them. An LSTM reads the rows of H one after the other, and each output depends on all rows read so far; a BiLSTM reads in both directions. H and the network are trained together; the model is frozen.
#
# The paper expects two things of the network: virtual tokens that depend on each other, and an easier optimization.
#
#     H  ->  network  ->  P          [P; text]  ->  frozen GPT
#     trained, then removed   kept
#
# P does not depend on the text. So after training we compute it once, keep it, and remove the rest.
#
# **Exercise 1.** GPT-2 has width 768. With 20 virtual tokens and an MLP whose three layers all map 768 numbers to 768, how many parameters are trained? How many are kept? Each linear layer has a bias.

# %% tags=["exercise"]
trained = None
kept = None

# %% tags=["solution"]
trained = 20 * 768 + 3 * (768 * 768 + 768)  # H, and three layers
kept = 20 * 768  # P

# %% tags=["check"]
check("05.count", trained, kept)

# %% [markdown]
# ## Write it
#
# **Exercise 2.** Write the module. `self.H` is a Parameter of shape (p, d) that starts as noise, and `self.network` an `nn.Sequential`: linear layers d → w, w → w and w → d, with ReLU between them. Calling the module returns P.


# %% tags=["exercise"]
class MyPTuning(nn.Module):
    def __init__(self, p, d, w):
        super().__init__()
        # make self.H and self.network

    def forward(self): ...  # return P (p, d)


# %% tags=["solution"]
class MyPTuning(nn.Module):
    def __init__(self, p, d, w):
        super().__init__()
        self.H = nn.Parameter(torch.randn(p, d))
        self.network = nn.Sequential(
            nn.Linear(d, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, d)
        )

    def forward(self):
        return self.network(self.H)


# %% tags=["check"]
check("05.my_p_tuning", MyPTuning)

# %% [markdown]
# **Exercise 3.** After training: write `keep(H, network)`. It returns the P that the model needs from now on, as a tensor that needs no gradient. The network may contain dropout. You need not switch it back to train mode.


# %% tags=["exercise"]
def keep(H, network): ...  # return P


# %% tags=["solution"]
def keep(H, network):
    network.eval()  # dropout would make P random
    return network(H).detach()


# %% tags=["check"]
check("05.keep", keep)

# %% [markdown]
# Now minipeft's [class](../minipeft/methods/p_tuning.py): the line with `# (1)` computes P. The next cell checks the model's logits against the equation, before and after `keep_output`. The paper also puts virtual tokens between the words of a prompt. Here, as in Hugging Face peft, they all come first.

# %%
torch.manual_seed(0)
gpt = base.model().requires_grad_(False)
encoder = p_tuning.PromptEncoder(gpt, PromptEncoderConfig(num_virtual_tokens=5))
H, (one, two, three) = encoder.embedding.weight, encoder.mlp_head[::2]
P = three(two(one(H).relu()).relu())  # (p, d)
with torch.no_grad():
    x = torch.cat([P[None], gpt.get_input_embeddings()(ids)], dim=1)  # (1, p + t, d)
    by_hand = gpt(inputs_embeds=x).logits[:, 5:]
    logits = encoder(gpt, ids).logits
    assert torch.allclose(logits, by_hand, atol=1e-4)
    encoder.keep_output()
    assert torch.equal(encoder(gpt, ids).logits, logits)
print(inspect.getsource(p_tuning.PromptEncoder.prompt))
print(inspect.getsource(p_tuning.PromptEncoder.keep_output))

# %% [markdown]
# ## How large is the network?
#
# We put 20 virtual tokens in front of our GPT, and count the parameters with each network.


# %%
def fresh(kind, seed=0):
    """The base with 20 virtual tokens that are made in one of several ways."""
    torch.manual_seed(seed)
    if kind == "plain":
        return get_peft_model(base.model(), PromptTuningConfig(20))
    if kind == "small noise":  # prompt tuning that starts as the same noise, divided by 10
        model = fresh("plain", seed)
        model.prompt_encoder.embedding.weight.data /= 10
        return model
    return get_peft_model(
        base.model(), PromptEncoderConfig(20, encoder_reparameterization_type=kind)
    )


d = w = 128
numbers = {
    "plain": 20 * d,
    "MLP": 20 * d + (d * w + w) + (w * w + w) + (w * d + d),
    "LSTM": 20 * d + 8 * w * (d + w + 2) + 8 * w * (3 * w + 2) + (4 * w * w + 2 * w) + (2 * w * d + d),
}  # fmt: skip
for kind, number in numbers.items():
    counted, total = fresh(kind).get_nb_trainable_parameters()
    assert counted == number
    print(f"{kind:6} trains {number:7,}; the frozen GPT has {total - number:,}; kept: {20 * d:,}")

# %% [markdown]
# With the LSTM we train more than half as many numbers as the model has, and keep 2,560. These 2,560 numbers could also be found without a network. So the network can only help training to *find* them.
#
# **Exercise 4.** Do virtual tokens depend on each other? You change the last of five rows of H. Which rows of P change with the MLP, and which with the BiLSTM? Answer with lists; rows count from 0.

# %% tags=["exercise"]
mlp_rows = None
lstm_rows = None

# %% tags=["solution"]
mlp_rows = [4]  # each row goes through the MLP separately
lstm_rows = [0, 1, 2, 3, 4]

# %% tags=["check"]
check("05.rows", mlp_rows, lstm_rows)

# %% [markdown]
# With the MLP, rows share weights, but no row sees another. If the MLP helps, it is not because virtual tokens see each other.
#
# ## A fair comparison
#
# What else does the network change?
#
# - **The start.** At step 0, P is the output of an untrained network. These numbers are much smaller than prompt tuning's noise.
# - **The step.** A step moves every weight of the network in the direction that lowers the loss. Each virtual token depends on many weights, so these small moves add up: at the same learning rate, P moves further than in prompt tuning.
#
# We train three kinds for 50 steps: `plain` is prompt tuning from noise, `small noise` is prompt tuning from noise divided by 10, and `MLP` is P-tuning. All get the rate 10⁻². Each also gets two other rates, so that its best is among the three.


# %%
def train_kind(kind, rate, seed):
    """Validation loss after a short training, and how far virtual tokens moved on average."""
    model = fresh(kind, seed)
    start = model.prompt_encoder.prompt().detach().clone()
    order = tasks.shuffled(task.train, 16, seed)
    batches = ([tasks.collate(part, base.end, "cpu")] for part in order)
    try:
        train(model, batches, RunConfig(steps=50, learning_rate=rate, warmup=5, quiet=True))
    except FloatingPointError:
        return math.inf, math.inf  # the loss became infinite, or not a number
    distance = (model.prompt_encoder.prompt().detach() - start).norm(dim=1).mean().item()
    return task_loss(model, task.validation, base.end)["loss"], distance


RATES = {"plain": [0.01, 0.3, 1.0], "small noise": [0.01, 0.1, 0.3], "MLP": [0.001, 0.01, 0.1]}
found = {kind: {rate: train_kind(kind, rate, seed=0) for rate in RATES[kind]} for kind in RATES}
for kind, by_rate in found.items():
    size = fresh(kind).prompt_encoder.prompt().norm(dim=1).mean()
    print(f"{kind}: length of a virtual token at the start {size:.1f}")
    for rate, (loss, distance) in by_rate.items():
        print(f"  learning rate {rate:<5}: loss {loss:.4f}; moved by {distance:.3g}")

# %%
figure, axis = plt.subplots(figsize=(6.5, 3.6))
STYLES = {
    "plain": ("o-", COLORS["prompt_tuning"]), "small noise": ("s--", "black"), "MLP": ("^-", COLORS["p_tuning"])
}  # fmt: skip
for kind, (style, color) in STYLES.items():
    values = [loss for loss, _ in found[kind].values()]
    axis.plot(RATES[kind], values, style, color=color)
    axis.annotate(kind, (RATES[kind][0], values[0]), (6, 6), textcoords="offset points")
    best = min(values)
    at = RATES[kind][values.index(best)], best
    axis.annotate(f"{best:.4f}", at, (5, -12), textcoords="offset points", size=8)
axis.axvline(0.01, color=COLORS["frozen"], linestyle=":")
axis.set(xscale="log", yscale="log", xlabel="learning rate", ylim=(0.008, 0.6))
axis.set_ylabel("validation loss (nats per token)")
report.show(
    figure,
    "Loss by learning rate: at 0.01 the MLP is lower than both others; small noise without a network comes closer to the MLP at its own best rate.",
)
same = {kind: by_rate[0.01][0] for kind, by_rate in found.items()}
claim(same["MLP"] < min(same["small noise"], same["plain"]), "at 0.01 the MLP is ahead")
claim(found["MLP"][0.01][1] > 2 * found["small noise"][0.01][1], "it moves P further")

# %% [markdown]
# On the dotted line, all kinds have the same learning rate, and the MLP is ahead. So the network seems to help. But this is the MLP's best rate, and too low for the others. With each kind at its best rate, most of the MLP's lead over `small noise` is gone.
#
# Next, four seeds of the MLP and of small noise, each at the rate that was best in seed 0:

# %%
seeds = {}
for kind in ("small noise", "MLP"):
    rate = min(found[kind], key=lambda rate: found[kind][rate])  # its best, with seed 0
    others = [train_kind(kind, rate, seed)[0] for seed in (1, 2, 3)]
    seeds[kind] = [found[kind][rate][0], *others]
figure, axis = plt.subplots(figsize=(6.5, 1.8))
for y, (kind, values) in enumerate(seeds.items()):
    style, color = STYLES[kind]
    axis.plot(values, [y] * 4, style[0], color=color, ms=9, alpha=0.7)
    axis.annotate(
        f"largest {max(values):.3f}", (max(values), y), (8, -4), textcoords="offset points"
    )
axis.set(xscale="log", xlabel="validation loss of each seed (nats per token)", xlim=(0.006, 0.1))
axis.set(yticks=[0, 1], yticklabels=list(seeds), ylim=(1.5, -0.5))
report.show(
    figure,
    "Losses of four seeds on a log axis: the losses of small noise and of the MLP lie in the same range.",
)
claim(max(seeds["MLP"]) < 0.05, "with the network, all four seeds learn the task")
claim(max(seeds["small noise"]) < 2 * max(seeds["MLP"]), "and without it, from small noise, too")

# %% [markdown]
# With these four seeds, prompt tuning from small noise does about as well as the MLP. The network may still help a little: four seeds are too few to see a small effect.
#
# When a trick helps, ask what else it changes. Give the other method that change, and compare again.
#
# **Exercise 5.** Two methods were trained with the same seeds. Write `paired(a, b)` for their lists of scores. It returns the mean of all differences a - b, and the number of seeds in which a is ahead (a tie is not ahead).


# %% tags=["exercise"]
def paired(a, b): ...  # return mean difference, number of seeds


# %% tags=["solution"]
def paired(a, b):
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return sum(differences) / len(differences), sum(d > 0 for d in differences)


# %% tags=["check"]
check("05.paired", paired)

# %% [markdown]
# ## Against prompt tuning and full fine-tuning
#
# All methods see the same examples in the same order for 100 steps, each at the best learning rate of an earlier sweep. Prompt tuning starts from noise of full size, the default. One seed runs here.

# %%
runs = {
    method: finetune(base, task, RECIPES[method], RunConfig(seed=0, n_evaluations=1))
    for method in ("frozen", "full", "prompt_tuning", "p_tuning")
}
display(Markdown(report.markdown_table(
    ["method", "learning rate", "trained", "exact match", "forgetting at step 0", "forgetting", "kB on disk"],
    [[report.NAMES[name], f"{r.learning_rate or 0:g}", f"{r.trainable:,}", f"{r.score:.2f}",
      f"{r.forgot('start') or 0:+.2f}", f"{r.forgot() or 0:+.2f}",
      f"{(r.disk_bytes or 0) / 1e3:,.0f}"] for name, r in runs.items()],
)))  # fmt: skip
plain, ours = runs["prompt_tuning"], runs["p_tuning"]
for name, record in (("prompt tuning", plain), ("P-tuning", ours)):
    print(f"{name:14}", [example["generated"] for example in record.examples])
claim(ours.score > 0.95, "P-tuning learns the task")
claim(
    ours.forgot("start") < plain.forgot("start"), "at step 0 too, P-tuning disturbs the model less"
)
less = {state: plain.forgot(state) - ours.forgot(state) for state in ("start", "on")}
print(f"P-tuning forgets {less['on']:.2f} less; at step 0 {less['start']:.2f} less")
assert ours.forgot("off") == 0  # without the virtual tokens, the model is the base

# %% [markdown]
# In this seed P-tuning also forgets less. About half of this difference is there before training: small virtual tokens disturb less than large ones. (The saved file includes the network, so that training can continue.)
#
# The figure shows more seeds, on two bases. (Stored runs, 400 test examples; the run above used 64.)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 2.4), sharey=True, layout="constrained")
METHODS = ("full", "prompt_tuning", "p_tuning")
for axis, (size, rows) in zip(axes, shipped.items(), strict=True):
    for y, method in enumerate(METHODS):
        values, color = [record.score for record in rows[method]], COLORS[method]
        mean = sum(values) / len(values)
        axis.plot(values, [y + 0.2] * len(values), "|", color=color, ms=9)
        half = report.interval(values)
        bars = [[half], [min(half, 1 - mean)]]  # no score is above 1
        axis.errorbar(mean, y, xerr=bars, fmt="o^s"[y], color=color, capsize=4)
        axis.text(1.04, y, f"{mean:.3f}", va="center")
    axis.set(
        title=f"base with {size} parameters",
        xlabel="score: mean, 95 % interval, seeds",
        xlim=(0.45, 1.16),
        xticks=[0.5, 0.6, 0.7, 0.8, 0.9, 1],
    )
if guess is not None:
    axes[0].axvline(guess, color="black", linestyle=":")
    axes[0].text(guess, -0.35, "your guess", ha="center", backgroundcolor="white")
axes[0].set(yticks=range(3), yticklabels=[report.NAMES[m] for m in METHODS], ylim=(2.5, -0.6))
report.show(
    figure,
    "Scores on sentiment: P-tuning is at or near 1 with each seed on both bases; prompt tuning is lower, and varies widely on the smaller base.",
)

# %%
for size, rows in shipped.items():
    differences = [
        a.score - b.score for a, b in zip(rows["p_tuning"], rows["prompt_tuning"], strict=True)
    ]
    mean, half = sum(differences) / len(differences), report.interval(differences)
    print(
        f"{size}: P-tuning minus prompt tuning {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    )
    claim(min(differences) > 0, f"{size}: P-tuning is ahead with each seed")
small = [record.score for record in shipped["1M"]["p_tuning"]]
claim(min(small) > 0.95, "no seed of P-tuning fails on the 1M base")
rows = compare.rows(compare.load(folder / "1m" / "compare.json"))
both = [[record.score for record in rows[method]] for method in ("prompt_tuning", "p_tuning")]
print("describe, 1M: prompt tuning", *(f"{s:.2f}" for s in both[0]), end="; ")
print("P-tuning", *(f"{s:.2f}" for s in both[1]))
claim(max(both[0] + both[1]) < 0.1, "on describe, both are near zero")

# %% [markdown]
# On `sentiment`, P-tuning is ahead with each seed, on both bases, and none of its seeds fails. On the 1M base the interval of the mean difference includes zero:
# one seed of prompt tuning fails, so the four differences vary widely. This failing seed also causes most of the mean difference. The comparison is with noise of full size, and we have not run small noise here.
# <!-- claim: p-tuning-sentiment -->
#
# On `describe`, the other task of lesson 04, neither method learns much in 100 steps. If both score near zero, a task cannot rank them.
#
# ## On a larger model
#
# Hugging Face peft has a [benchmark](https://github.com/huggingface/peft/tree/main/method_comparison/MetaMathQA) (a 3B model, grade-school mathematics, 5,000 steps, one seed each):

# %%
published = {  # share of test problems solved, parameters trained, learning rate
    "LoRA, rank 32": (0.482, 9_175_040, 1e-4),
    "P-tuning, 20 tokens": (0.371, 28_382_208, 1e-4),
    "prompt tuning, 200 tokens from embeddings": (0.391, 614_400, 1e-3),
    "prompt tuning, 200 tokens from noise": (0.252, 614_400, 1e-3),
}
for name, (accuracy, number, rate) in published.items():
    print(f"{name:42} {accuracy:.0%} right, {number:10,} trained, learning rate {rate:g}")

# %% [markdown]
# P-tuning trains three times as many parameters as this LoRA, and solves fewer problems. Now compare the two runs of prompt tuning. They used the same rate, which may be too low for noise: noise needs a larger rate than embeddings (lesson 04). Our advice: LoRA first. If you need virtual tokens, start them small, and try several rates, before you add a network.
#
# ## Summary
#
# - P-tuning trains a network that computes the virtual tokens. After training, only P is kept; the output is identical.
# - The network can have far more parameters than P.
# - On `sentiment` no seed of it fails, and it is ahead of prompt tuning from noise with each seed.
# - It also changes the start and the step. Prompt tuning from small noise, at its own rate, did about as well in 50 steps. The paper's first reason hardly explains our result: with the MLP, virtual tokens do not see each other. Its second reason, an easier optimization, stays open.
# - P-tuning v2 is another method: prefix tuning (lesson 06, and "Going further").
#
# **Do you remember?** Answer first, then open.
#
# <details><summary>1. Why can the network be removed after training?</summary>P does not depend on the text, and its numbers no longer change. It is enough to keep P.</details>
#
# <details><summary>2. At one learning rate, the MLP was ahead. Why was this not a fair comparison?</summary>The network also makes P start small and move further per step. From small noise, and at its own learning rate, prompt tuning did about as well.</details>
#
# <details><summary>3. Both methods score zero on a task. Which is better there?</summary>The task cannot say: both are at its floor. Train longer, or take another task.</details>
#
# **To read:** the paper, [Liu et al. 2021](https://arxiv.org/abs/2103.10385), section 3; the [P-tuning v2](https://arxiv.org/abs/2110.07602) paper, sections 2 and 3.
#
# # Going further
#
# ## Do virtual tokens that see each other learn faster?
#
# In the paper a BiLSTM comes before the MLP, so that virtual tokens do depend on each other. It has many more parameters than our MLP. **Guess first:** does it learn faster? These are stored runs on `describe`: 300 steps, three seeds per learning rate, scores on validation examples. (If the best rate was the largest one tried, a larger one was added.)

# %%
lines = (folder / "prompts.jsonl").read_text().splitlines()
records = [json.loads(line) for line in lines]
highest = {}
for method in ("prompt_tuning", "p_tuning", "p_tuning, LSTM"):
    runs = [r for r in records if r["method"] == method]
    print(method)
    for rate in sorted({r["learning_rate"] for r in runs}):
        scores = [r["score"] for r in runs if r["learning_rate"] == rate]
        highest[method] = max(highest.get(method, 0), *scores)
        print(
            f"  learning rate {rate:<6}: mean {sum(scores) / 3:.2f}; seeds",
            [f"{s:.2f}" for s in scores],
        )
claim(max(highest.values()) < 0.3, "all three stay low on this task")
claim(highest["p_tuning, LSTM"] < 0.05, "with the BiLSTM, every run stays near zero")

# %% [markdown]
# With the BiLSTM, no run gets further than a few hundredths. Prompt tuning and the MLP reach about a fifth in their best runs. All scores are low, so we cannot say which is better after longer training. In 300 steps and at these rates, virtual tokens that see each other did not learn faster.
#
# ## Version two is another method
#
# *P-tuning v2* ([Liu et al. 2021](https://arxiv.org/abs/2110.07602)) is not a better network. It gives every layer virtual keys and values of its own, and needs no network: it is prefix tuning, the subject of lesson 06. Below, `PrefixTuningConfig` makes it, and a test shows the difference.
# We change trained numbers, one at a time. Which is the first block of the GPT whose output changes?


# %%
def block_outputs(model):
    """The output of each block at the positions of the text."""
    outputs = []
    hooks = [
        block.register_forward_hook(lambda m, i, o: outputs.append(o[0][:, -ids.shape[1] :]))
        for block in model.base_model.transformer.h
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return outputs


# %%
for kind, model in (
    ("P-tuning", fresh("MLP")),
    ("P-tuning v2", get_peft_model(base.model(), PrefixTuningConfig(20))),
):
    numbers = model.eval().prompt_encoder.embedding.weight.data
    before, first = block_outputs(model), set()
    for i in range(0, numbers.shape[1], 16):
        old = numbers[0, i].item()
        numbers[0, i] = old + 3
        changed = [not torch.equal(a, b) for a, b in zip(before, block_outputs(model), strict=True)]
        numbers[0, i] = old
        first.add(changed.index(True))
    print(f"{kind:12} first block that changes: {sorted(first)}")
    assert first == ({0} if kind == "P-tuning" else {0, 1, 2, 3})

# %% [markdown]
# All numbers of P-tuning enter at the input. In v2, each block has numbers of its own.
#
# ## More exercises
#
# **Exercise 6.** Version two by hand. Write `deep_prompt(model, P, ids)`. Layer i gets the keys P[i, 0] and the values P[i, 1], in front of its keys and values of the text. Return the logits. P is (l, 2, p, d) for l layers; `ids` is (b, t), b texts of t tokens; the logits are (b, t, v) for a vocabulary of v tokens. `past_key_values`
# wants a pair (keys, values) per layer, each of shape (b, h, p, k), where h heads of width k make d = h · k. The model has `model.config.n_head` heads. Do not pass positions: the model gives the text the positions p, p + 1, and so on. P must get a gradient.


# %% tags=["exercise"]
def deep_prompt(model, P, ids): ...  # return the logits (b, t, v)


# %% tags=["solution"]
def deep_prompt(model, P, ids):
    layers, _, p, d = P.shape
    h = model.config.n_head
    past = P.view(layers, 2, 1, p, h, d // h).transpose(3, 4)  # (l, 2, 1, h, p, k)
    past = past.expand(-1, -1, len(ids), -1, -1, -1)
    return model(ids, past_key_values=[(k, v) for k, v in past]).logits


# %% tags=["check"]
check("05.deep_prompt", deep_prompt)

# %% [markdown]
# **Exercise 7, harder.** How does P-tuning compare with LoRA in size? Write `smallest_rank(d, layers, p)`: the smallest rank at which LoRA, on the four matrices of width d × d in each layer's attention, trains at least as many parameters as
# P-tuning with p virtual tokens and an MLP with w = d.


# %% tags=["exercise"]
def smallest_rank(d, layers, p): ...  # return a rank


# %% tags=["solution"]
def smallest_rank(d, layers, p):
    p_tuning_parameters = p * d + 3 * (d * d + d)
    per_rank = layers * 4 * (d + d)
    return -(-p_tuning_parameters // per_rank)  # rounded up


# %% tags=["check"]
check("05.smallest_rank", smallest_rank)
