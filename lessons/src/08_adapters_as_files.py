# %% [markdown]
# # 08 · Adapters as files
#
# Your company serves a model with 7 billion parameters to twenty customers. Each wants answers in its own style, so each needs its own fine-tuning.
# With LoRA, each customer has a file of about 40 MB, and all share one base of 14 GB. The server loads the base once, and switches the adapter with every
# request. So adapters are files: people save, load, switch and merge them, and try to add them.
#
# After this lesson you can
# - read the two files of an adapter by hand, and say what they hold;
# - serve several customers with one base;
# - say what merging keeps, and what it loses;
# - combine adapters in three ways, and measure the result.
#
# **Time.** 25 minutes to read, 3 to run, 35 for the exercises. All results are for a GPT with 1 million parameters.
# Unknown words are in the [glossary](README.md#glossary).

# %%
import hashlib
import json
import math
import shutil
import struct
from dataclasses import replace
from itertools import combinations

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

from minipeft import GPT, PeftModel, combine, saving
from minipeft.grader.lessons import check, claim, hint, solution, solved
from minipeft.lab import DATA, report, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import complete, text_loss
from minipeft.lab.finetune import finetune
from minipeft.lab.recipes import RECIPES, RunConfig

BLUE, ORANGE, GREY = (report.COLORS[name] for name in ("full", "lora", "frozen"))
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
OUT = DATA.parent / "out" / "08"  # what this lesson saves; git ignores it
base = load_base(DATA / "base" / "1m")
base.held_out = base.held_out[:64]  # less text to measure forgetting on, to save time

# %% [markdown]
# ## Before you start
#
# Two questions about earlier lessons. Replace `None`, and run both cells.
#
# **1.** Without LoRA, each of the twenty customers has a fully fine-tuned copy of the 7B model, in bfloat16. How many GB are that on disk?

# %% tags=["exercise"]
copies = None  # GB

# %% tags=["solution"]
copies = 20 * 7 * 2  # customers, billions of parameters, bytes per parameter

# %% tags=["check"]
check("08.copies", copies)

# %% [markdown]
# **2.** A LoRA has r = 8 and α = 32. Which number is B A multiplied by?

# %% tags=["exercise"]
scaling = None

# %% tags=["solution"]
scaling = 32 / 8  # α/r

# %% tags=["check"]
check("08.scaling", scaling)

# %% [markdown]
# If an answer is wrong, call `hint(1)` in a new cell, then `hint(2)`, and then `solution()`.
#
# ## Can two adapters be added?
#
# One adapter turns facts into sentences (`describe`). Another reads a review and answers good or bad (`sentiment`). They were
# trained separately. An adapter is an update ΔW of each weight matrix, and updates can be added: W + ΔW₁ + ΔW₂.
#
# **Your guess:** each of the two scores above 90 %. The model with both updates: what does it score on each task? Write two numbers, and
# in a few words why.

# %%
guess_describe, guess_sentiment = None, None  # scores, 0 to 1
reason = ""

# %% [markdown]
# ## Five customers
#
# Two customers want `describe` and `sentiment`. We make three more tasks from these. `owner` and `cook` ask for one sentence only, about this person.
# `colors` wants *white* and *black* for good and bad.


# %%
def other_completions(task, name, completion, **how):
    """A task with the same prompts and other completions. None leaves an example out."""

    def encoded(example, text):
        ids = [*base.tokenizer.encode(text).ids, base.end]
        no_slots = [False] * len(ids)
        return replace(example, completion=text, completion_ids=ids, is_slot=no_slots)

    parts = (
        [encoded(e, text) for e in part if (text := completion(e))]
        for part in (task.train, task.validation, task.test)
    )
    return tasks.Task(name, *parts, **how)


# %%
def one_person(key):
    """`describe`, but only the sentence about one person; another one must be in the prompt."""

    def sentence(e):
        facts = dict(describe.facts(e.prompt))
        if key in facts and len(facts.keys() & {"owner", "cook", "guest"}) > 1:
            return next(s for s in e.completion.split(".") if facts[key] in s) + "."

    phrases = {key: describe.phrasings[key]}
    return other_completions(
        describe, key, sentence, fact=rf"({key}) is ([^.]+)\.", phrasings=phrases
    )


# %%
describe, sentiment = (tasks.load_task(base, name) for name in ("describe", "sentiment"))
colors = {" good.": " white.", " bad.": " black."}
wishes = [
    describe, one_person("owner"), one_person("cook"), sentiment,
    other_completions(sentiment, "colors", lambda e: colors[e.completion]),
]  # fmt: skip
wishes = {task.name: task for task in wishes}
for name in ("owner", "colors"):
    print(wishes[name].test[0].prompt, "\n  ->", wishes[name].test[0].completion)

# %% [markdown]
# Each customer gets a LoRA of rank 8, saved in a folder. We train with two seeds, because we need several runs below.

# %%
runs = {}
for seed in (0, 1):
    for name, task in wishes.items():
        run = RunConfig(
            steps=100 if name in ("describe", "colors") else 50,
            learning_rate=1e-2 if task.fact else 5e-3,  # from a sweep
            seed=seed, n_evaluations=1, n_generate=64, output=OUT / f"{name}-{seed}",
        )  # fmt: skip
        shorter = replace(task, test=task.test[:64])
        runs[name, seed] = finetune(base, shorter, RECIPES["lora"], run)
        print(f"{name:9} seed {seed}: {task.metric} {runs[name, seed].score:.2f}")
SEEDS = sorted({seed for _, seed in runs})
claim(min(record.score for record in runs.values()) > 0.8, "each adapter learns its own task")

# %% [markdown]
# ## The idea
#
# $$ W_i = W + \frac{\alpha_i}{r_i} B_i A_i, \qquad \text{customers } i = 1 \ldots 5 $$
#
# W is the same for all customers, so it is stored once. Each customer adds two files: A and B of each layer in `adapter_model.safetensors`, and the
# settings, r and α among them, in `adapter_config.json`.

# %%
folder = OUT / f"owner-{SEEDS[0]}"
config = json.loads((folder / "adapter_config.json").read_text())
print({key: config[key] for key in ("peft_type", "r", "lora_alpha", "target_modules")})
model_bytes = (DATA / "base" / "1m" / "model.safetensors").stat().st_size
file_bytes = (folder / "adapter_model.safetensors").stat().st_size
print(f"base {model_bytes:,} bytes, adapter {file_bytes:,}: {file_bytes / model_bytes:.0%}")

# %% [markdown]
# **Exercise 1.** Another adapter has r = 4, and only on the layer `c_attn`, which maps 128 numbers to 384. There are 4 blocks with one such layer each.
# How many bytes do the float32 numbers in its file take?

# %% tags=["exercise"]
count = None  # a number, or an expression

# %% tags=["solution"]
count = 4 * 4 * 4 * (128 + 384)  # bytes, blocks, r, in + out

# %% tags=["check"]
check("08.bytes", count)

# %% [markdown]
# ## Read it by hand
#
# A *safetensors* file is simple. Its first 8 bytes hold the length of a header. The header is JSON: each tensor's name, shape, and place.
# Then come the numbers. A *pickle*, PyTorch's older format, can run a stranger's code when it is loaded. A safetensors file cannot.

# %%
raw = (folder / "adapter_model.safetensors").read_bytes()
(length,) = struct.unpack("<Q", raw[:8])  # an unsigned 8-byte integer
header = json.loads(raw[8 : 8 + length])
numbers = bytearray(raw[8 + length :])
tensors = {}
for key, entry in header.items():
    if key != "__metadata__":
        start, end = entry["data_offsets"]
        flat = torch.frombuffer(numbers[start:end], dtype=torch.float32)
        tensors[key] = flat.view(entry["shape"])
print(len(tensors), "tensors; the first two:")
for key in sorted(tensors)[:2]:
    print(key, tuple(tensors[key].shape))

# %% [markdown]
# **Exercise 2.** Write `update(tensors, config, name)`. It returns the update ΔW of the layer called `name`, such as `"transformer.h.0.attn.c_attn"`. Use the tensors under
# the keys that you see above, and `r` and `lora_alpha` from the config.


# %% tags=["exercise"]
def update(tensors, config, name): ...  # return ΔW, of shape (out, in)


# %% tags=["solution"]
def update(tensors, config, name):
    A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    return config["lora_alpha"] / config["r"] * (B @ A)


# %% tags=["check"]
check("08.update", update)

# %% [markdown]
# With your function we can load an adapter without minipeft.

# %%
prompt = wishes["owner"].test[0]
ids = torch.tensor([prompt.prompt_ids])
model = PeftModel.from_pretrained(base.model(), folder, "owner").eval()
layers = model.adapters["owner"].layers  # by name
by_hand = base.model().eval()
with torch.no_grad():
    for name, layer in layers.items():
        delta = update(tensors, config, name) if solved("08.update") else layer.delta()
        by_hand.get_submodule(name).weight += delta
    difference = (by_hand(ids).logits - model(ids).logits).abs().max() / model(
        ids
    ).logits.abs().max()
assert difference < 5e-6
print(f"logits differ by {difference:.0e} of the largest one, by rounding")

# %% [markdown]
# Names, shapes and files are those of Hugging Face peft, so each library loads the folders of the other.
# [minipeft/saving.py](../minipeft/saving.py) reads them, and checks names and shapes before it changes anything.
#
# ## One base, five adapters
#
# `load_adapter` adds an adapter to a model, `set_adapter` makes one active, and `disable_adapter` gives the base. None of them
# writes into W. The *checksum* below would differ if one bit of the base changed.


# %%
def checksum(model):
    """A hash of all bytes of a model's weights."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def with_adapters(seed):
    model = PeftModel(base.model()).eval()
    for name in wishes:
        model.load_adapter(OUT / f"{name}-{seed}", name)
    return model


models = [with_adapters(seed) for seed in SEEDS]
model, bare = models[0], base.model().eval()
print(prompt.prompt)
for name in ("owner", "cook", "describe"):
    model.set_adapter(name)
    print(f"{name:9}->{complete(model, base, [prompt, *describe.test[:1]])[0]}")
with model.disable_adapter():
    assert torch.equal(model(ids).logits, bare(ids).logits)
    assert checksum(model.base_model) == checksum(bare)
print("adapter disabled: exactly the logits and the weights of the base")

# %% [markdown]
# **Exercise 3.** Many requests wait, from several customers, and switching takes time. Write `serve(requests, switch, answer)`.
# Each request is a pair `(customer, prompt)`. `switch(customer)` activates an adapter, and `answer(prompts)` returns a list of answers to a list of
# prompts. Return all answers in the order of the requests. Call `switch` only once per customer.


# %% tags=["exercise"]
def serve(requests, switch, answer): ...  # return a list of answers


# %% tags=["solution"]
def serve(requests, switch, answer):
    answers = [None] * len(requests)
    for customer in {customer for customer, _ in requests}:
        places = [i for i, request in enumerate(requests) if request[0] == customer]
        switch(customer)
        texts = answer([requests[i][1] for i in places])
        for i, text in zip(places, texts, strict=True):
            answers[i] = text
    return answers


# %% tags=["check"]
check("08.serve", serve)

# %%
if solved("08.serve"):
    tests = {name: task.test[0] for name, task in wishes.items()}
    requests = [(name, tests[name]) for name in ("owner", "sentiment", "owner", "colors")]
    texts = serve(requests, model.set_adapter, lambda prompts: complete(model, base, prompts))
    for (name, _), text in zip(requests, texts, strict=True):
        print(f"{name:9} ->{text}")

# %% [markdown]
# Servers for large models compute W x for all customers in one batch, and then add each one's s B A x
# ([S-LoRA](https://arxiv.org/abs/2311.03285)).
#
# Below, every adapter answers the prompts of every task.


# %%
def score(model, name, n=16):
    """A model's score on a task. The last prompt gives room for long answers; it is not scored."""
    examples = wishes[name].test[:n]
    texts = complete(model, base, [*examples, describe.test[0]])
    return wishes[name].score(examples, texts[:n])


grid = {}
for name in wishes:
    model.set_adapter(name)
    grid[name] = [score(model, other) for other in wishes]
grid["frozen base"] = [score(bare, other) for other in wishes]

# %%
figure, axis = plt.subplots(figsize=(5.6, 4.2))
axis.imshow(list(grid.values()), cmap="Oranges", vmin=0, vmax=1.4, aspect="auto")
for row, scores in enumerate(grid.values()):
    for column, value in enumerate(scores):
        axis.text(column, row, f"{value:.2f}", ha="center", va="center")
axis.set_xticks(range(5), wishes)
axis.set_yticks(range(6), grid)
axis.set(xlabel="task", ylabel="active adapter")
axis.spines[:].set_visible(False)
report.show(
    figure,
    "Scores of five adapters and the base on five tasks: high on the diagonal, and for describe on owner and cook.",
)
claim(all(grid[name][i] > 0.7 for i, name in enumerate(wishes)), "each adapter does its own task")
claim(grid["owner"][2] < 0.3 > grid["cook"][1], "owner and cook do not do each other's task")
claim(max(grid["frozen base"]) < 0.1, "the base does none of them")

# %% [markdown]
# Each adapter does its own task. `describe` also states owners and cooks, because they are among its facts. `colors`
# reads reviews as well as `sentiment` does, but scores nothing there, because it uses other words. So a low score does not prove that a skill is absent.
#
# ## Merge, and back
#
# Lesson 02 merged an adapter: W' = W + ΔW. There are three ways:
#
# | | what happens | the way back |
# |---|---|---|
# | `merge_and_unload()` | returns a plain model with W' | none: save the adapter |
# | `merge_adapter()` in minipeft | keeps W, and stores W' next to it: more memory | `unmerge_adapter()` discards W' |
# | `merge_adapter()` in peft | overwrites W with W + ΔW: no more memory | `unmerge_adapter()` subtracts ΔW |
#
# **Exercise 4.** Call `merge_adapter`, then `unmerge_adapter`. Is every weight of the base exactly the old one? Answer `True` or `False`, for `"minipeft"` and for `"peft"`.
# `"disable"`: and if you only activate an adapter and disable it?

# %% tags=["exercise"]
back = {"disable": None, "minipeft": None, "peft": None}

# %% tags=["solution"]
back = {"disable": True, "minipeft": True, "peft": False}  # W + ΔW was rounded

# %% tags=["check"]
check("08.back", back)

# %%
model.set_adapter("describe")
model.merge_adapter()
model.unmerge_adapter()
with model.disable_adapter():
    assert checksum(model.base_model) == checksum(bare)
print("minipeft: merged, unmerged and disabled: exactly the base")
name = next(iter(layers))
W = bare.get_submodule(name).weight.detach()
delta = model.adapters["describe"].layers[name].delta().detach()
for dtype in (torch.float32, torch.bfloat16):
    w, d = W.to(dtype), delta.to(dtype)
    error = (w + d) - d - w  # what peft computes
    print(f"subtracting in {dtype}: {(error != 0).float().mean():.0%} of the weights differ, "
          f"by up to {error.abs().max() / w.abs().max():.0e} of the largest one")  # fmt: skip
    claim(bool(error.any()), "subtracting ΔW does not restore W exactly")

# %% [markdown]
# In float32 the error is tiny. In bfloat16, the usual type of large models, it is larger. It stays in W, for all customers.
# So after merging with peft, load the base again.
#
# ## Against full fine-tuning
#
# On `describe`: the same examples in the same order for 100 steps, each method at its own best learning rate. A merged LoRA is a plain
# GPT, like a fully fine-tuned one. Is it the same model? The last column compares predictions with the adapter's: the mean
# *Kullback-Leibler divergence* on the base model's own text, in nats per token. Equal predictions have 0.

# %%
finetune(base, describe, RECIPES["full"], RunConfig(seed=0, output=OUT / "full", n_evaluations=1))

# %%
model.set_adapter("describe")
merged = model.merge_and_unload().eval()
compared = {
    "frozen base": bare,
    "full": GPT.from_pretrained(OUT / "full").eval(),
    "LoRA": model,
    "LoRA, merged": merged,
}
text = base.held_out[:32]
with torch.no_grad():
    predicted = {name: torch.log_softmax(m(text).logits, -1) for name, m in compared.items()}
adapter = predicted["LoRA"]
apart = {
    name: (adapter.exp() * (adapter - p)).sum(-1).mean().item() for name, p in predicted.items()
}
scores = {name: score(m, "describe", 64) for name, m in compared.items()}
sizes = {"frozen base": 0, "LoRA": file_bytes}  # bytes per customer
display(Markdown(report.markdown_table(
    ["model", "score", "kB per customer", "divergence from the adapter"],
    [[name, f"{scores[name]:.2f}", f"{sizes.get(name, model_bytes) / 1e3:,.0f}",
      f"{abs(apart[name]):.3f}"] for name in compared],
)))  # fmt: skip
claim(
    abs(apart["LoRA, merged"]) < 1e-3 < 0.1 < apart["full"], "merged equals the adapter, not full"
)

# %%
rows = [json.loads(line) for line in (DATA / "results" / "finals.jsonl").read_text().splitlines()]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
customers = range(1, 21)
left.plot(customers, [14 * n for n in customers], "o-", color=BLUE, ms=3)
left.plot(customers, [14 + 0.04 * n for n in customers], "s-", color=ORANGE, ms=3)
left.text(9, 300, "full copies: 280 GB")
left.text(5, 18, "one base and adapters: under 15 GB")
left.set(xlabel="customers", ylabel="GB on disk, 7B in bfloat16", yscale="log", ylim=(10, 500))
left.set_xticks((1, 5, 10, 15, 20))
left.yaxis.set_major_formatter("{x:g}")
for y, (method, rate, live) in enumerate([("full", 0.001, "full"), ("lora", 0.01, "LoRA")]):
    setting = (method, rate, 0.0)  # without weight decay
    found = [r["score"] for r in rows if (r["method"], r["learning_rate"], r["decay"]) == setting]
    mean, half, color = sum(found) / len(found), report.interval(found), report.COLORS[method]
    right.errorbar(mean, y, xerr=half, fmt="o", color=color, capsize=4)
    right.plot(scores[live], y - 0.15, "D", mfc="none", color="black")
    right.text(mean, y + 0.15, f"{live}: {mean:.2f}, {len(found)} seeds", ha="center")
    claim(abs(scores[live] - mean) < 0.15, f"{method} scores like its other seeds")
right.set(yticks=(), ylim=(-0.5, 1.5), xlim=(0.85, 1.01))
right.set_xlabel("slot accuracy, 95 % interval; diamonds: this run")
report.show(figure, "Left: twenty full copies take 280 GB, one base with adapters 15. Right: scores of full and LoRA, nearly equal.")  # fmt: skip

# %% [markdown]
# A merged LoRA equals its own adapter, up to rounding. It does not equal full fine-tuning, although both solve the task.
#
# ## Add adapters
#
# A file holds one A and one B per layer. So how do we store ΔW₁ + ΔW₂? peft's `add_weighted_adapter` has three basic *combination types*. With
# weights wᵢ and scalings sᵢ = αᵢ/rᵢ:
#
# - `cat` stacks: A = [w₁ s₁ A₁; w₂ s₂ A₂], B = [B₁, B₂]. It is exact, and the ranks add up.
# - `svd`, the default, computes Σ wᵢ sᵢ Bᵢ Aᵢ and keeps its strongest directions: as many as the largest rank of the parts, or `svd_rank`.
# - `linear` adds A to A and B to B, each with the factor √(wᵢ sᵢ). The rank stays. But look at the product of the sums:
#
# $$ (B_1 + B_2)(A_1 + A_2) = B_1 A_1 + B_2 A_2 + \underbrace{B_1 A_2 + B_2 A_1}_{\text{cross terms}} $$
#
# **Exercise 5.** You combine *three* adapters with `linear`. How many cross terms are there?

# %% tags=["exercise"]
cross = None

# %% tags=["solution"]
cross = 3 * 3 - 3  # all products Bᵢ Aⱼ, without those with i = j

# %% tags=["check"]
check("08.cross", cross)

# %% [markdown]
# **Exercise 6.** Write `add(pairs)`, the exact sum. It gets a list of any length with tuples (w, s, A, B). It returns A, of shape (Σ r, in), and B, of shape (out, Σ r),
# with B A = Σ wᵢ sᵢ Bᵢ Aᵢ. Ranks may differ, and weights may be negative.


# %% tags=["exercise"]
def add(pairs): ...  # return A, B


# %% tags=["solution"]
def add(pairs):
    A = torch.cat([w * s * A for w, s, A, B in pairs])
    return A, torch.cat([B for w, s, A, B in pairs], dim=1)


# %% tags=["check"]
check("08.add", add)

# %% [markdown]
# All three by hand, for `describe` + `sentiment`, against [minipeft/combine.py](../minipeft/combine.py). How far are they from the sum of the updates?

# %%
names, errors = ["describe", "sentiment"], {"cat": [], "svd": [], "linear": []}
for layer in layers:
    parts = [model.adapters[name].layers[layer] for name in names]
    pairs = [(1.0, p.scaling, p.lora_A.weight.detach(), p.lora_B.weight.detach()) for p in parts]
    total = sum(w * s * B @ A for w, s, A, B in pairs)
    A, B = add(pairs) if solved("08.add") else combine.cat(pairs, 16)
    u, sizes, v = torch.linalg.svd(total)
    linear_A, linear_B = (sum((p[0] * p[1]) ** 0.5 * p[i] for p in pairs) for i in (2, 3))
    by_hand = {"cat": B @ A, "svd": u[:, :8] * sizes[:8] @ v[:8], "linear": linear_B @ linear_A}
    for way, product in by_hand.items():
        A, B = combine.COMBINATIONS[way](pairs, 16 if way == "cat" else 8)
        assert torch.allclose(B @ A, product, atol=1e-4)
        errors[way].append(((product - total).norm() / total.norm()).item())
for way, values in errors.items():
    print(f"{way:6} mean error, relative to the sum: {sum(values) / len(values):.3f}")
svd_error, linear_error = (sum(errors[way]) / len(layers) for way in ("svd", "linear"))
claim(max(errors["cat"]) < 1e-5 < svd_error, "only cat is exact")
claim(svd_error < linear_error / 2, "svd is much nearer to the sum than linear")

# %% [markdown]
# ## Does the sum do both tasks?


# %%
def scores_of_sum(model, parts, weight, way):
    """The scores of a weighted sum on the tasks of its parts."""
    name = f"{'+'.join(parts)} {way} {weight:.0%}"
    if name not in model.adapters:
        model.add_weighted_adapter(parts, [weight] * len(parts), name, combination_type=way)
    model.set_adapter(name)
    return [score(model, part) for part in parts]


ways = {
    way: [scores_of_sum(m, names, 1.0, way) for m in models] for way in ("cat", "svd", "linear")
}
weights = (0.25, 0.5, 0.75, 1.0, 1.25)
by_weight = [[scores_of_sum(m, names, w, "cat") for m in models] for w in weights]
means = {way: sum(map(sum, found)) / 4 for way, found in ways.items()}
print("mean of both tasks and both seeds:", {way: f"{mean:.2f}" for way, mean in means.items()})
claim(means["cat"] > means["linear"] + 0.2, "the exact sum does better than linear")
claim(means["svd"] > means["linear"] + 0.2, "and so does svd")
claim(means["cat"] > 0.4, "the exact sum keeps a large part of both skills")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for i, (task, color, style) in enumerate([("describe", ORANGE, "s"), ("sentiment", BLUE, "o")]):
    for x, found in enumerate(ways.values()):
        values = [pair[i] for pair in found]
        left.plot([x + 0.2 * i - 0.1] * 2, values, style, color=color, label=None if x else task)
    for which, line in enumerate(("-", "--")):
        values = [found[which][i] for found in by_weight]
        right.plot(weights, values, style + line, color=color, label=f"{task}, seed {SEEDS[which]}")
    guess = (guess_describe, guess_sentiment)[i]
    if guess is not None:
        left.plot(0.2 * i - 0.1, guess, "*P"[i], color="black", ms=10, label=f"guess, {task}")
left.set(
    xticks=range(3), xticklabels=ways, xlim=(-0.5, 2.5), xlabel="combination type, both weights 1"
)
left.set(ylabel="score", ylim=(-0.04, 1.06))
right.set(xlabel="weight of each of the two adapters (cat)", xticks=weights)
right.legend(frameon=False, loc="lower center", fontsize=8)
left.legend(frameon=False, loc="center right", fontsize=8)
report.show(
    figure,
    "Scores of the sum of describe and sentiment: cat and svd keep most of both, linear loses most; by weight, describe needs about 1.",
)  # fmt: skip

# %% [markdown]
# The cross terms of `linear` destroy what the adapters learned. The exact sum keeps a large part of both skills. Is this a lucky pair? Take all ten pairs.

# %%
REVIEWS = {"sentiment", "colors"}
kinds = {"different prompts": [], "the same prompts": []}
for pair in combinations(wishes, 2):
    kind = "different prompts" if len(REVIEWS & set(pair)) == 1 else "the same prompts"
    kinds[kind].append((pair, [scores_of_sum(m, pair, 1.0, "cat") for m in models]))

# %%
figure, axis = plt.subplots(figsize=(8, 4))
ticks, means = [], {}
for (kind, found), color, style in zip(kinds.items(), (ORANGE, GREY), ("s", "o"), strict=True):
    start = len(ticks)
    for pair, scores in found:
        for one in scores:
            axis.plot([len(ticks) - 0.12, len(ticks) + 0.12], one, style + "-", color=color, lw=0.7)
        ticks.append(" + ".join(pair))
    values = [x for _, scores in found for one in scores for x in one]
    means[kind] = sum(values) / len(values)
    axis.hlines(means[kind], start - 0.4, len(ticks) - 0.6, color="black", linestyle="--")
    axis.text(start - 0.4, 1.08, f"{kind}: mean {means[kind]:.2f}")
axis.set_xticks(range(10), ticks, rotation=35, ha="right")
axis.set(ylabel="score of each task (left: the first)", ylim=(-0.04, 1.2))
report.show(
    figure,
    "Scores of ten pairs in their exact sum: with different prompts one often stays high and the other falls; with the same prompts most fall.",
)  # fmt: skip
both = [min(one) > 0.9 for found in kinds.values() for _, scores in found for one in scores]
print(f"both scores above 0.9: {sum(both)} of {len(both)} sums")
claim(means["different prompts"] > means["the same prompts"] + 0.05, "different prompts keep more")
claim(sum(both) <= len(both) / 3, "few sums keep both skills")

# %% [markdown]
# A sum of updates is not a sum of skills: most sums damage at least one of the two. Adapters for different prompts keep more on average, but pairs differ
# too much to predict it. With the same prompts, the two adapters want different answers, so one loses, or both.
# Test a combined adapter on every task before you use it, or switch between the adapters instead.
#
# ## Summary
#
# - An adapter is two files: tensors with the names of their layers, and a config with r and α.
# - Switching and disabling never write into W, so the base comes back exactly.
# - minipeft keeps W when it merges. peft overwrites W and subtracts later, so rounding errors remain.
# - `cat` is exact, `svd` is the nearest update of a given rank, and `linear` has cross terms.
# - Even an exact sum of two adapters often fails at one of the two tasks: measure it.
#
# **Do you remember?** Answer first, then open.
#
# <details><summary>1. Which two things besides A and B do you need to compute ΔW, and in which file are they?</summary>r and α, for the scaling α/r. They are in adapter_config.json.</details>
#
# <details><summary>2. You merged an adapter with peft in bfloat16, and unmerged it. Why is the base not exactly the old one?</summary>peft computed W + ΔW, which was rounded, and then subtracted ΔW. The rounding error stays.</details>
#
# <details><summary>3. Two adapters of rank 8. Which rank has their sum with cat, svd and linear, and which of them is exact?</summary>16, 8 and 8. Only cat is exact.</details>
#
# **To read:** [Editing Models with Task Arithmetic](https://arxiv.org/abs/2212.04089) (Ilharco et al. 2022) adds and subtracts whole updates. [TIES](https://arxiv.org/abs/2306.01708) and
# [DARE](https://arxiv.org/abs/2311.03099) first drop small or contradicting entries; peft has them as further combination types.
#
# # Going further
#
# ## Negative weights
#
# A weight may be negative: the update is subtracted. With `cat` and `svd`, the sign needs no care. `linear` uses √(w s) on both sides, and there is no real root of a negative number. So peft
# takes the root of |w s|, and gives the sign to A only. On both sides, two signs would cancel.
#
# **Exercise 7.** Write `linear(pairs)`, with the same input as `add`. All ranks are equal. A = Σ ±√|wᵢ sᵢ| Aᵢ, with the sign of wᵢ sᵢ, and B = Σ √|wᵢ sᵢ| Bᵢ.


# %% tags=["exercise"]
def linear(pairs): ...  # return A, B


# %% tags=["solution"]
def linear(pairs):
    A = sum(math.copysign(abs(w * s) ** 0.5, w * s) * A for w, s, A, B in pairs)
    return A, sum(abs(w * s) ** 0.5 * B for w, s, A, B in pairs)


# %% tags=["check"]
check("08.linear", linear)

# %% [markdown]
# What does subtraction do to a skill? First, subtract `sentiment` from the sum of both. Then, use `sentiment` with the weight −1: will it answer bad for good?


# %%
def activate_sum(parts, weights, name):
    """Make an exact weighted sum, and activate it."""
    if name in model.adapters:  # the cell was run before
        model.delete_adapter(name)
    model.add_weighted_adapter(parts, weights, name, combination_type="cat")
    model.set_adapter(name)


activate_sum(["describe", "sentiment"], [1.0, 1.0], "both")
activate_sum(["both", "sentiment"], [1.0, -1.0], "both - sentiment")
print(f"describe + sentiment - sentiment: {score(model, 'describe'):.2f} on describe")
claim(score(model, "describe") > 0.7, "subtracting brings describe back")
activate_sum(["sentiment"], [-1.0], "-sentiment")
reviews = sentiment.test[:16]
texts = complete(model, base, reviews)
opposite = {" good.": "bad.", " bad.": "good."}
share = (
    sum(text.strip() == opposite[e.completion] for e, text in zip(reviews, texts, strict=True)) / 16
)
print(f"-1 x sentiment: opposite answers {share:.2f}; it writes {texts[0]!r}")
claim(share < 0.5, "a negative adapter does not do the opposite")

# %% [markdown]
# A negative weight takes an added update away again. But a negative update is not the opposite skill.
#
# ## The wrong α
#
# The tensors do not say what α was. If it is lost, all shapes still fit. Suppose that someone guesses α. The weight of a weighted adapter does the same as another α:

# %%
table = []
for alpha in (2, 4, 8, 16, 32, 64):  # trained with 16
    line = [alpha]
    for name in ("owner", "describe"):
        activate_sum([name], [alpha / 16], f"{name} {alpha}")
        line += [
            score(model, name),
            text_loss(model, base.held_out) - text_loss(bare, base.held_out),
        ]
    table.append(line)
display(Markdown(report.markdown_table(
    ["α", "owner: score", "owner: forgetting", "describe: score", "describe: forgetting"],
    [[line[0], *(f"{x:.2f}" for x in line[1:])] for line in table],
)))  # fmt: skip
eight, trained, largest = table[2], table[3], table[-1]
claim(eight[1] > 0.7 < trained[1], "the owner adapter works with half of its α")
claim(eight[2] < trained[2] - 0.3, "and then it forgets less")
claim(eight[3] < trained[3] - 0.1, "describe needs its α")
claim(largest[1] < 0.5 > largest[3], "four times α breaks both")

# %% [markdown]
# The `owner` adapter works with half of its α as well, and then forgets much less. `describe` needs the α that it was trained with. Both break with four times as much. So α can be changed
# after training, if you measure. To avoid accidents, minipeft writes a checksum of the settings into the header of the tensors, and refuses a folder whose config
# was edited. (A folder that peft wrote has no checksum.)

# %%
for change in ("damaged", "edited"):
    shutil.copytree(folder, OUT / change, dirs_exist_ok=True)
    if change == "damaged":
        (OUT / change / saving.WEIGHTS).write_bytes(raw[:-1000])
    else:
        (OUT / change / saving.CONFIG).write_text(json.dumps(config | {"lora_alpha": 32}))
    try:
        model.load_adapter(OUT / change, change)
    except ValueError as error:
        print("ValueError:", str(error).replace(str(OUT), "out/08"))
    assert change not in model.adapters

# %% [markdown]
# ## Intruder dimensions
#
# [Shuttleworth et al.](https://arxiv.org/abs/2410.21228) compared the singular vectors of W and of a tuned weight W'. Some of the strongest directions of W' are close to *none* of W's. They call these
# *intruder dimensions*, and report that scaling them down reduces forgetting.
#
# **Exercise 8, harder.** Write `tame(W, tuned, factor)`. Take the left singular vectors of both. Of the *ten strongest* of `tuned`, find those whose largest |cosine| with *any* left
# singular vector of W is below the bound in the code. Multiply their singular values by `factor`, and return the weight. Leave everything else as it is.


# %% tags=["exercise"]
BOUND = 0.6


def tame(W, tuned, factor): ...  # return a weight


# %% tags=["solution"]
BOUND = 0.6


def tame(W, tuned, factor):
    u, sizes, v = torch.linalg.svd(tuned, full_matrices=False)
    cosines = torch.linalg.svd(W, full_matrices=False)[0].T @ u[:, :10]
    is_intruder = cosines.abs().amax(0) < BOUND
    sizes[:10][is_intruder] *= factor
    return u * sizes @ v


# %% tags=["check"]
check("08.tame", tame)

# %%
if solved("08.tame"):
    losses = {}
    for factor in (1.0, 0.75, 0.5, 0.25, 0.0):
        tamed = base.model().eval()
        for name in layers:
            before, after = (m.get_submodule(name).weight.data for m in (bare, merged))
            tamed.get_submodule(name).weight.data = tame(before, after, factor)
        losses[factor] = text_loss(tamed, base.held_out)
        print(
            f"factor {factor:.2f}: loss on the base model's own text {losses[factor]:.2f}, score {score(tamed, 'describe'):.2f}"
        )
    claim(losses[0.5] < losses[1.0], "halving the intruders reduces forgetting")

# %% [markdown]
# Read the lines from factor 1 to 0. Halving the intruders reduces forgetting, and costs a part of the score: here they also carry what was learned. Lesson 09 compares this with weight decay.
