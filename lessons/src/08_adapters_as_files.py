# %% [markdown]
# # 08 · Adapters as files
#
# Your company serves a model with 7 billion parameters to twenty customers. Each wants its own style, so its own fine-tuning.
# With LoRA, each customer has a file of about 40 MB, and all share one base of 14 GB. The server loads the base once, and switches the adapter with every
# request.
#
# After this lesson you can
# - read the two files of an adapter by hand, and say what they hold;
# - serve several customers with one base;
# - say what merging keeps, and what it loses;
# - combine adapters in three ways, and measure the result.
#
# **Time.** About an hour, and 15 minutes more for "Going further". All results are for a GPT with 1 million parameters.
# [Glossary](README.md#glossary).

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
# Replace `None`, and run both cells.
#
# **1.** Without LoRA, each of the twenty customers has a fully fine-tuned copy of the 7B model, in bfloat16. How many GB do all twenty take on disk?

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
# If an answer is wrong, call `hint(1)`, `hint(2)` or `solution()` in a new cell.
#
# ## Can two adapters be added?
#
# One adapter turns facts into sentences (`describe`). Another reads a review and answers good or bad (`sentiment`). A LoRA adapter is an update ΔW of each weight matrix, and updates can be added: W + ΔW₁ + ΔW₂.
#
# **Your guess:** alone, each does its task well. Which scores does a model with both updates get?

# %%
guess_describe, guess_sentiment = None, None  # scores, 0 to 1
reason = ""

# %% [markdown]
# ## Five customers
#
# One customer wants `describe`, another one `sentiment`. Three more tasks reuse the prompts of these two. In `describe`, a prompt lists facts, and may name an owner, a cook and a guest. `owner` wants only the
# sentence about the owner, and `cook` the one about the cook. `colors` wants *white* for good and *black* for bad.


# %%
def other_completions(task, name, completion, **how):
    """A task with the same prompts and other completions. Where one is None, the example is left out."""

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
    """`describe`, but the answer is only about this person, though the prompt names others too."""

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
# Each customer gets a LoRA of rank 8 in its own folder. We train two seeds. *Slot accuracy* is the share of facts stated correctly.

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
# W is stored once. Each customer adds two files: A and B of each layer in `adapter_model.safetensors`, and the
# settings, r and α among them, in `adapter_config.json`.

# %%
folder = OUT / f"owner-{SEEDS[0]}"
config = json.loads((folder / "adapter_config.json").read_text())
print({key: config[key] for key in ("peft_type", "r", "lora_alpha", "target_modules")})
# "all-linear": every linear layer except the output head
model_bytes = (DATA / "base" / "1m" / "model.safetensors").stat().st_size
file_bytes = (folder / "adapter_model.safetensors").stat().st_size
print(f"base {model_bytes:,} bytes, adapter {file_bytes:,}: {file_bytes / model_bytes:.0%}")

# %% [markdown]
# On a 7B model the share is far smaller: A and B grow with in + out, W with in · out.
#
# **Exercise 1.** Another adapter has r = 4, on `c_attn` only, which maps 128 numbers to 384, in each of 4 blocks.
# How many bytes do the float32 numbers in its file take?

# %% tags=["exercise"]
count = None  # bytes

# %% tags=["solution"]
count = 4 * 4 * 4 * (128 + 384)  # bytes, blocks, r, in + out

# %% tags=["check"]
check("08.bytes", count)

# %% [markdown]
# ## Read it by hand
#
# A *safetensors* file is simple. Its first 8 bytes hold the length of a header. The header is JSON: each tensor's name, shape, and place.
# Then come the numbers. Unlike a *pickle*, PyTorch's older format, it cannot run a stranger's code.

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
# **Exercise 2.** Write `update(tensors, config, name)`. It returns the update ΔW of the layer called `name`, such as `"transformer.h.0.attn.c_attn"`. The keys are as
# above; `r` and `lora_alpha` are in the config.


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
# Names, shapes and files are those of Hugging Face peft. [A test](../tests/test_conformance_methods.py) loads peft's folders with [minipeft](../minipeft/saving.py), and minipeft's with peft.
#
# ## One base, five adapters
#
# `load_adapter` adds an adapter, `set_adapter` makes one active, and `disable_adapter` gives the base. None of them
# writes into W. The *checksum* below, of the model without an adapter, would differ if one bit of the base changed.


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
# The prompt names no cook, but the adapter `cook` invents one. In our run, `describe` errs too: it makes the guest a cook.
#
# **Exercise 3.** Many requests wait, from several customers. Write `serve(requests, switch, answer)`.
# Each request is a pair `(customer, prompt)`. `switch(customer)` activates an adapter, and `answer(prompts)` returns a list of answers to a list of
# prompts. For each customer, call `switch` once, and then `answer` once, with all prompts of this customer. Return all answers in the order of the requests.


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
# Below, every adapter answers 16 prompts of every task.


# %%
def score(model, name, n=16):
    """A model's score on a task. Answers are cut at the length of the longest reference. One more
    example (not scored) makes the longest reference the same for all tasks."""
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
# Each adapter does its own task. `describe` also states owners and cooks: they are among its facts. `colors`
# reads reviews too, but scores nothing on `sentiment`, because it uses other words. So a low score does not prove that a skill is absent.
#
# ## Merge, and back
#
# Lesson 02 merged an adapter: W' = W + ΔW. Four ways to do it:
#
# | call | what happens | how to undo it |
# |---|---|---|
# | `merge_and_unload()` in minipeft | returns a plain copy with W' | not needed |
# | `merge_and_unload()` in peft | writes W' into the model | load the base again |
# | `merge_adapter()` in minipeft | keeps W, and stores W' next to it: more memory | `unmerge_adapter()` discards W' |
# | `merge_adapter()` in peft | overwrites W with W + ΔW: no more memory | `unmerge_adapter()` subtracts ΔW |
#
# **Exercise 4.** Is every weight of the base exactly as before? Answer `True` or `False` for each:
# - `"disable"`: after activating and disabling an adapter
# - `"minipeft"`: after `merge_adapter` and `unmerge_adapter` in minipeft
# - `"peft"`: after the same two calls in peft

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
shares = []
for dtype in (torch.float32, torch.bfloat16):
    differ, largest = [], 0.0
    for name, layer in model.adapters["describe"].layers.items():
        w = bare.get_submodule(name).weight.detach().to(dtype)
        d = layer.delta().detach().to(dtype)
        error = (w + d) - d - w  # what peft computes
        differ.append((error != 0).float().flatten())
        largest = max(largest, (error.abs().max() / w.abs().max()).item())
    shares.append(torch.cat(differ).mean().item())
    print(f"subtracting in {dtype}: {shares[-1]:.0%} of all weights differ from W, "
          f"by up to {largest:.0e} of the layer's largest weight")  # fmt: skip
claim(min(shares) > 0.01, "subtracting ΔW does not restore W exactly")
claim(abs(shares[0] - shares[1]) < 0.1, "the share of weights is similar in both types")

# %% [markdown]
# The errors are tiny in float32, and larger in bfloat16, the usual type of large models. After peft's unmerge, they stay in W, for all customers: load
# the base again.
#
# ## Against full fine-tuning
#
# Full fine-tuning and LoRA learn `describe` from the same examples in the same order, for 100 steps, each at its best learning rate. Is a merged LoRA
# the same model as a fully fine-tuned one? We compare each model's predictions with those of the LoRA of seed 0, on text like that of pretraining. The measure is the mean *Kullback-Leibler divergence*
# in nats per token; 0 means equal. The control, a LoRA with another seed, shows how far two LoRAs differ.

# %%
rows = [json.loads(line) for line in (DATA / "results" / "finals.jsonl").read_text().splitlines()]
run = RunConfig(seed=SEEDS[0], output=OUT / "full", n_evaluations=1)
full_run = finetune(base, describe, RECIPES["full"], run)

# %%
for m in models:
    m.set_adapter("describe")
merged = model.merge_and_unload().eval()
compared = {
    "frozen base": bare,
    "full": GPT.from_pretrained(OUT / "full").eval(),
    "LoRA": model,
    "LoRA, merged": merged,
    "LoRA, other seed": models[1],
}
text = base.held_out[:32]

# %%
with torch.no_grad():
    predicted = {name: torch.log_softmax(m(text).logits, -1) for name, m in compared.items()}
adapter = predicted["LoRA"]
apart = {
    name: (adapter.exp() * (adapter - p)).sum(-1).mean().item() for name, p in predicted.items()
}
scores = {name: score(m, "describe", 64) for name, m in compared.items()}
sizes = dict.fromkeys(compared, model_bytes) | {"frozen base": 0}  # per customer
sizes |= dict.fromkeys(["LoRA", "LoRA, other seed"], file_bytes)
display(Markdown(report.markdown_table(
    ["model", "score", "kB per customer", "divergence from the adapter"],
    [[name, f"{scores[name]:.2f}", f"{sizes[name] / 1e3:,.0f}",
      f"{abs(apart[name]):.3f}"] for name in compared],
)))  # fmt: skip
claim(abs(apart["LoRA, merged"]) < 1e-3 < 0.1 < apart["full"], "only merged equals the adapter")
claim(0.5 < apart["LoRA, other seed"] / apart["full"] < 2, "another seed is about as far as full")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
customers = [1, 5, 10, 15, 20]
left.plot(customers, [14 * n for n in customers], "o-", color=BLUE)
left.plot(customers, [14 + 0.04 * n for n in customers], "s-", color=ORANGE)
left.text(9, 300, "full copies: 280 GB")
left.text(5, 18, "one base and adapters: under 15 GB")
left.set(xlabel="customers", ylabel="GB on disk, 7B in bfloat16", yscale="log", ylim=(10, 500))
left.set_xticks(customers)
left.yaxis.set_major_formatter("{x:g}")
others = {}
for y, (method, rate, live) in enumerate([("full", 0.001, "full"), ("lora", 0.01, "LoRA")]):
    setting = (method, rate, 0.0)  # without weight decay
    found = [r["score"] for r in rows if (r["method"], r["learning_rate"], r["decay"]) == setting]
    mean, color = sum(found) / len(found), report.COLORS[method]
    right.errorbar(mean, y, xerr=report.interval(found), fmt="o", color=color, capsize=4)
    right.plot(found, [y - 0.15] * len(found), ".", color=color)
    right.plot(scores[live], y - 0.3, "D", mfc="none", color="black")
    right.text(mean, y + 0.15, f"{live}: mean {mean:.2f}", ha="center")
    claim(abs(scores[live] - mean) < 0.15, f"{method} scores like its other seeds")
    others[live] = found
full, ours = others.values()
claim(max(min(full), min(ours)) < min(max(full), max(ours)), "the seeds overlap")
right.set(yticks=(), ylim=(-0.6, 1.5), xlim=(0.85, 1.01))
right.set_xlabel("slot accuracy; bar: 95 % interval of mean\ndots: ten seeds; diamond: this run")
report.show(figure, "Left: twenty full copies take 280 GB, one base with adapters 15. Right: the ten seeds of full and LoRA overlap; this run's LoRA is lower.")  # fmt: skip

# %% [markdown]
# A merged LoRA equals its own adapter, up to rounding. It differs from full fine-tuning, but two LoRAs with different seeds differ about as much from each other. With ten seeds (dots), neither method is clearly ahead.
# (The diamonds: this run, on 64 prompts.)
#
# ## Add adapters
#
# How do we store ΔW₁ + ΔW₂ as one A and one B? peft's `add_weighted_adapter` has three basic *combination types*. With
# weights wᵢ and scalings sᵢ = αᵢ/rᵢ:
#
# - `cat` stacks: A = [w₁ s₁ A₁; w₂ s₂ A₂], B = [B₁, B₂]. It is exact, and the ranks add up.
# - `svd`, the default, computes Σ wᵢ sᵢ Bᵢ Aᵢ and keeps its r strongest directions (lesson 02), where r is the largest rank of the parts.
# - `linear` adds A to A and B to B, each with the factor √(wᵢ sᵢ). The rank stays. Look at the product if all √(wᵢ sᵢ) are 1:
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
# **Exercise 6.** Write `add(pairs)`, the exact sum. It gets a list of tuples (w, s, A, B), and returns A, of shape (Σ r, in), and B, of shape (out, Σ r),
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
# All three by hand, for `describe` + `sentiment`, as in [minipeft/combine.py](../minipeft/combine.py). How far are they from the exact sum?

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


alone = []  # for each seed, the score of each adapter on its own task
for m in models:
    alone.append({})
    for name in wishes:
        m.set_adapter(name)
        alone[-1][name] = score(m, name)
ways = {
    way: [scores_of_sum(m, names, 1.0, way) for m in models] for way in ("cat", "svd", "linear")
}
weights = (0.25, 0.5, 0.75, 1.0, 1.25)
by_weight = [[scores_of_sum(m, names, w, "cat") for m in models] for w in weights]

# %%
table = [["alone", *(one[name] for name in names for one in alone)]]
table += [[way, *(pair[i] for i in (0, 1) for pair in found)] for way, found in ways.items()]
display(Markdown(report.markdown_table(
    ["", *(f"{name}, seed {seed}" for name in names for seed in SEEDS)],
    [[line[0], *(f"{x:.2f}" for x in line[1:])] for line in table],
)))  # fmt: skip
means = {way: sum(map(sum, found)) / 4 for way, found in ways.items()}
claim(min(means["cat"], means["svd"]) > means["linear"] + 0.2, "cat and svd do better than linear")
a_quarter, *_, one, more = [[sum(seeds) / 2 for seeds in zip(*f, strict=True)] for f in by_weight]
alone_mean = sum(sum(a[name] for name in names) for a in alone) / 4
claim(means["cat"] < alone_mean - 0.1, "even the exact sum scores lower than the two alone")
claim(a_quarter[0] < one[0] - 0.2, "a small weight loses describe")
claim(sum(more) < sum(one) - 0.1, "weights above 1 do damage")

# %%
shown = {"alone": [[one[name] for name in names] for one in alone]} | ways
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for i, (task, color, style) in enumerate([("describe", ORANGE, "s"), ("sentiment", BLUE, "o")]):
    for x, found in enumerate(shown.values()):
        values = [pair[i] for pair in found]
        left.plot([x + 0.2 * i - 0.1] * 2, values, style, color=color, label=None if x else task)
    for which, line in enumerate(("-", "--")):
        values = [found[which][i] for found in by_weight]
        right.plot(weights, values, style + line, color=color, label=f"{task}, seed {SEEDS[which]}")
    guess = (guess_describe, guess_sentiment)[i]
    if guess is not None:
        left.plot(0.9 + 0.2 * i, guess, "*P"[i], color="black", ms=10, label=f"guess, {task}")
left.set(xticks=range(4), xticklabels=shown, xlim=(-0.5, 3.5))
left.set_xlabel("alone, or combination type with both weights 1")
left.set(ylabel="score", ylim=(-0.04, 1.06))
right.set(xlabel="weight of each of the two adapters (cat)", xticks=weights)
right.legend(frameon=False, loc="lower center", fontsize=8)
left.legend(frameon=False, loc="center right", fontsize=8)
report.show(
    figure,
    "Scores of the sum: cat and svd keep most of sentiment and a part of describe, linear little of both; describe rises up to weight 1, and sentiment falls beyond it.",
)  # fmt: skip

# %% [markdown]
# Left: the cross terms of `linear` destroy what the adapters learned. `cat` and `svd` keep more, but not all. Here `describe` suffers. (With other seeds, not shown here, it was `sentiment`.) Right, with equal weights: at the
# smallest weight `describe` scores 0, and weights above 1 do damage too. Now take all ten pairs.

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
    for pair, sums in found:
        for one in sums:
            axis.plot([len(ticks) - 0.12, len(ticks) + 0.12], one, style + "-", color=color, lw=0.7)
        ticks.append(" + ".join(pair))
    values = [x for _, sums in found for one in sums for x in one]
    means[kind] = sum(values) / len(values)
    axis.hlines(means[kind], start - 0.4, len(ticks) - 0.6, color="black", linestyle="--")
    axis.text(start - 0.4, 1.08, f"{kind}: mean {means[kind]:.2f}")
axis.set_xticks(range(10), ticks, rotation=35, ha="right")
axis.set(ylabel="score of each task (left: the first)", ylim=(-0.04, 1.2))
axis.set_xlabel("pair of adapters; each line is one seed")
report.show(
    figure,
    "Scores of ten pairs in their exact sum: with different prompts one often stays high and the other falls, sometimes to 0; with the same prompts most fall.",
)  # fmt: skip

# %%
losses = {  # for each pair and seed: each adapter's score alone, minus its score in the sum
    kind: [
        [own[name] - x for name, x in zip(pair, one, strict=True)]
        for pair, sums in found
        for one, own in zip(sums, alone, strict=True)
    ]
    for kind, found in kinds.items()
}
for kind, found in losses.items():
    kept = sum(max(lost) < 0.1 for lost in found)  # one mistake in 16 reviews is 0.06
    print(f"{kind}: both scores within 0.1 of the adapters alone in {kept} of {len(found)} sums")
    claim(kept <= len(found) / 2, "most sums damage at least one skill")
means = {kind: sum(map(sum, found)) / len(found) / 2 for kind, found in losses.items()}
print("mean loss of score:", {kind: f"{mean:.2f}" for kind, mean in means.items()})
different, same = means.values()
claim(different < same - 0.05, "different prompts lose less")
claim(max(map(max, losses["different prompts"])) > 0.8, "there too, a skill can be lost completely")

# %% [markdown]
# A sum of updates is not a sum of skills: most of these sums damage at least one skill. Adapters for the same prompts lose more on average. (A possible reason: their tasks want different answers to one prompt.)
# But with different prompts too, some sums lose one skill completely. Test a combined adapter on every task.
#
# ## Summary
#
# - A LoRA adapter is two files: tensors with the names of their layers, and a config with r and α.
# - Switching and disabling never write into W, so the base comes back exactly.
# - minipeft keeps W when it merges. peft overwrites W and subtracts later: rounding errors remain.
# - `cat` is exact, `svd` has the smallest squared error for its rank, and `linear` has cross terms.
# - Even an exact sum of two adapters usually damaged a skill here: measure it.
#
# **Do you remember?** Answer first, then open.
#
# <details><summary>1. What do you need besides A and B to compute ΔW, and in which file is it?</summary>α, in adapter_config.json, which also has r.</details>
#
# <details><summary>2. You merged and unmerged an adapter with peft. Why is the base not exactly the old one?</summary>W + ΔW was rounded. Subtracting ΔW leaves the error.</details>
#
# <details><summary>3. You combine two adapters of rank 8. Which rank do cat, svd and linear give, and which is exact?</summary>16, 8 and 8. Only cat is exact.</details>
#
# **To read:** [Editing Models with Task Arithmetic](https://arxiv.org/abs/2212.04089) (2022) adds and subtracts updates. [S-LoRA](https://arxiv.org/abs/2311.03285) serves
# many adapters in one batch.
#
# # Going further
#
# ## Negative weights
#
# A weight may be negative: the update is subtracted. With `cat` and `svd`, the sign needs no care. `linear` uses √(w s) on both sides, and there is no real root of a negative number. So peft
# takes the root of |w s|, and gives the sign to A only. With the sign in A and in B, the product would be positive again.
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
# Use `sentiment` with the weight −1. Guess first: will it answer bad for good?


# %%
def activate_sum(model, parts, weights, name):
    """Make an exact weighted sum, and activate it."""
    if name in model.adapters:  # the cell was run before
        model.delete_adapter(name)
    model.add_weighted_adapter(parts, weights, name, combination_type="cat")
    model.set_adapter(name)


reviews = sentiment.test[:16]
opposite = {" good.": "bad.", " bad.": "good."}
for seed, m in zip(SEEDS, models, strict=True):
    activate_sum(m, ["sentiment"], [-1.0], "-sentiment")
    texts = complete(m, base, reviews)
    pairs = zip(reviews, texts, strict=True)
    share = sum(text.strip() == opposite[e.completion] for e, text in pairs) / 16
    print(f"seed {seed}: opposite answers {share:.2f}; it writes {texts[0]!r}")
    claim(share < 0.5, "a negative adapter does not do the opposite")

# %% [markdown]
# In these two runs, the negative of an update is not the opposite skill.
#
# peft has more combination types. [TIES](https://arxiv.org/abs/2306.01708) drops small entries. Then the adapters vote on the sign of each entry: larger values count more. Entries with the sign that lost are dropped. [DARE](https://arxiv.org/abs/2311.03099) drops entries at
# random, and rescales the rest.
#
# ## The wrong α
#
# The tensors do not say what α was. If it is lost, all shapes still fit. Suppose that someone guesses α. We trained with 16. To see the effect of another α, we give the
# adapter of seed 0 the weight α/16. *Forgetting* is the rise of the loss on text like that of pretraining, in nats per token:

# %%
table, at_start = [], text_loss(bare, base.held_out)
for alpha in (4, 8, 16, 32):  # trained with 16
    line = [alpha]
    for name in ("owner", "describe"):
        activate_sum(model, [name], [alpha / 16], f"{name} {alpha}")
        line += [score(model, name), text_loss(model, base.held_out) - at_start]
    table.append(line)
display(Markdown(report.markdown_table(
    ["α", "owner: score", "owner: forgetting", "describe: score", "describe: forgetting"],
    [[line[0], *(f"{x:.2f}" for x in line[1:])] for line in table],
)))  # fmt: skip
_, half, trained, double = table
claim(half[1] > 0.7 < trained[1], "the owner adapter works with half of its α")
claim(half[2] < trained[2] / 2, "and then it forgets less than half as much")
claim(half[3] < trained[3] - 0.1, "describe loses with half of its α")
claim(double[1] < 0.5 > double[3], "twice α breaks both")

# %% [markdown]
# With half of its α, the `owner` adapter still works, and forgets far less, but `describe` loses a large part of its score. (With a quarter, `owner` works here; with another seed, it failed.) With twice their α, both fail. So you can change α
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
