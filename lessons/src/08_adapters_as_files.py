# %% [markdown]
# # 08 · Adapters as files: can skills be added?
#
# After this lesson you can
# - read an adapter's two files, by hand if need be, and say what they hold and what they do not;
# - keep ten skills beside one base, switch between them, and switch them all off;
# - merge an adapter, and say what a merged weight can no longer do;
# - add adapters up with and without cross terms, and say when that works.
#
# **Papers.** Hu et al. 2021, *LoRA*, arXiv 2106.09685; Shuttleworth et al. 2024, *LoRA vs Full Fine-tuning: An
# Illusion of Equivalence*, arXiv 2410.21228. The file format and the names of the sums are Hugging Face peft's.
#
# **Time.** Twenty-five minutes to read, three to run, forty for the exercises.

# %%
import hashlib
import inspect
import json
import os
import shutil
import struct

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

from minipeft import GPT, LoraConfig, PeftModel, combine, get_peft_model, saving
from minipeft.lab import DATA, compare, report, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import complete, text_loss
from minipeft.lab.finetune import finetune
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.targets import find_targets

BLUE, ORANGE, GREY = report.COLORS["full"], report.COLORS["lora"], report.COLORS["frozen"]
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
OUT = DATA.parent / "out" / "08"  # what this lesson saves; git does not look there
base = load_base(os.path.relpath(DATA / "base" / "1m"))  # an adapter's config names this folder
describe = tasks.load_task(base, "describe")
sentiment = tasks.load_task(base, "sentiment")

# %% [markdown]
# ## A question first
#
# A LoRA adds a change ΔW to each weight. Changes can be added: W + ΔW₁ + ΔW₂. So take two skills. `describe` turns facts
# into sentences; `sentiment` reads a review and says good or bad. Their prompts look nothing alike. Alone,
# each scores above nine in ten.
#
# **Your guess:** put both changes on the weights at once, each in full. What does the one model score on each?

# %%
guess_describe, guess_sentiment = 1.0, 1.0  # put your own numbers here before you go on

# %% [markdown]
# ## Ten skills
#
# We cut ten tasks out of the two. Six ask for *one* sentence of `describe`, about the owner, say, and only from prompts in which another
# value could fill that slot too, so that the key must be read. Two more have the reviews of `sentiment` with other answers: *reversed*
# says bad for good; *colors* says white for good and black for bad.

# %%
KINDS = {"name": "place", "near": "place", "lost": "thing", "found": "thing"}  # the others: people


def example(prompt, completion, value=None):
    """An example of our own, in words and tokens; the tokens of `value` are its slots."""
    coded, ids = base.tokenizer.encode(completion), base.tokenizer.encode(prompt).ids
    a = completion.index(value) if value else 0
    b = a + len(value) if value else 0
    slots = [a < e and s < b for s, e in coded.offsets] + [False]
    return tasks.Example(prompt, completion, ids, [*coded.ids, base.end], slots)


def one_fact(key):
    """The examples of `describe` with a rival of this key's value, and the one sentence alone."""
    parts = []
    for examples in (describe.train, describe.validation, describe.test):
        parts.append([])
        for e in examples:
            facts = dict(describe.facts(e.prompt))
            kinds = [KINDS.get(k, "person") for k in facts]
            if key in facts and kinds.count(KINDS.get(key, "person")) > 1:
                said = next(s for s in e.completion.split(".") if facts[key] in s)
                parts[-1].append(example(e.prompt, f" {said.strip()}.", facts[key]))
    phrases = {key: describe.phrasings[key]}
    return tasks.Task(key, *parts, rf"({key}) is ([^.]+)\.", phrases)


def answered(name, good, bad):
    """The reviews of `sentiment` with other answers."""
    words = {" good.": good, " bad.": bad}
    parts = (sentiment.train, sentiment.validation, sentiment.test)
    parts = ([example(e.prompt, words[e.completion]) for e in part] for part in parts)
    return tasks.Task(name, *parts)


six = [one_fact(key) for key in ("owner", "cook", "guest", "near", "lost", "found")]
others = [answered("reversed", " bad.", " good."), answered("colors", " white.", " black.")]
ten = {task.name: task for task in [describe, *six, sentiment, *others]}
print(ten["owner"].test[0].prompt, "\n ->", ten["owner"].test[0].completion)
print(ten["colors"].test[0].prompt, "\n ->", ten["colors"].test[0].completion)

# %% [markdown]
# Ten LoRAs of rank 8, each at the learning rate that the sweep found for its parent. For one sentence half as many
# steps are enough. Each is saved as a folder.

# %%
runs = {}
for name, task in ten.items():
    rate = 1e-2 if task.fact else 5e-3  # data/results/sweep.json: describe, sentiment
    run = RunConfig(
        steps=50 if task in six else 100, seed=0, learning_rate=rate, output=OUT / name,
        n_evaluations=8 if task is describe else 1, n_generate=64 if task is describe else 32,
    )  # fmt: skip
    runs[name] = finetune(base, task, RECIPES["lora"], run)
    print(f"{name:10} {len(task.train):3} examples, {task.metric} {runs[name].score:.2f}")
assert all(record.score > 0.8 for record in runs.values())
print("(expect each above 0.8)")

# %% [markdown]
# ## The idea: a skill is a small file
#
# $$ W_i = W + \frac{\alpha_i}{r_i} B_i A_i \qquad i = 1 \ldots 10 $$
#
# W is the same for all, so it is stored once. A skill is a config, which has r and α, and the matrices A and B under the
# names of the layers that they belong to. Here is a folder, and what ten tasks take as copies and as adapters.

# %%
folder = OUT / "owner"
sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
print({name: size for name, size in sizes.items() if name.startswith("adapter")})
config = json.loads((folder / saving.CONFIG).read_text())
print({key: config[key] for key in ("peft_type", "task_type", "r", "lora_alpha", "target_modules")})
copy_bytes = (DATA / "base" / "1m" / "model.safetensors").stat().st_size
file_bytes = sizes[saving.WEIGHTS]
numbers = range(1, 11)
plt.figure(figsize=(6, 3))
plt.plot(numbers, [n * copy_bytes / 1e6 for n in numbers], "o-", color=BLUE, label="full copies")
plt.plot(
    numbers, [(copy_bytes + n * file_bytes) / 1e6 for n in numbers], "s-", color=ORANGE,
    label="one base and adapters",
)  # fmt: skip
plt.xlabel("tasks")
plt.ylabel("on disk (MB)")
plt.legend(frameon=False)
plt.show()
print(f"a copy {copy_bytes:,} bytes, an adapter {file_bytes:,}: {file_bytes / copy_bytes:.1%}")
assert file_bytes < copy_bytes / 8

# %% [markdown]
# ## By hand
#
# A safetensors file is simple: eight bytes that say how long the header is, a header in JSON, and then raw numbers. Nothing in it
# can run, as a pickle could; so minipeft never reads a pickle. We read the file with `struct` and `json`, and add
# (α/r) B A to the base ourselves.

# %%
raw = (folder / saving.WEIGHTS).read_bytes()
(length,) = struct.unpack("<Q", raw[:8])
header, body = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
header.pop("__metadata__", None)
tensors = {}
for key, entry in header.items():
    start, end = entry["data_offsets"]
    tensors[key] = torch.frombuffer(body[start:end], dtype=torch.float32).view(entry["shape"])
by_hand, scale = base.model(), config["lora_alpha"] / config["r"]
for key in [key for key in tensors if "lora_A" in key]:
    A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
    layer = by_hand.get_submodule(
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    )
    layer.weight.data += scale * B @ A

for key in list(tensors)[:2]:
    print(key, tuple(tensors[key].shape))
ids = torch.tensor([base.tokenizer.encode(ten["owner"].test[0].prompt).ids])
ours = PeftModel.from_pretrained(base.model(), folder).eval()
with torch.no_grad():
    difference = (by_hand(ids).logits - ours(ids).logits).abs().max() / ours(ids).logits.abs().max()
print(f"by hand against minipeft, relative: {difference:.1e} (rounding: expect below 5e-6)")
assert difference < 5e-6

# %% [markdown]
# These names and shapes are peft's, so a folder from here loads in peft, and one from peft loads here. You need neither peft
# nor transformers for this lesson: the claim is tested in `tests/test_conformance.py`, by
# `test_peft_loads_our_lora_folder_and_we_load_pefts`, which runs where peft is installed.
#
# ## The real file
#
# `minipeft/saving.py` reads and writes folders. Beyond our lines it checks everything before it changes anything: the
# config's values, missing tensors, surplus ones, shapes.

# %%
print(inspect.getsource(saving.read_adapter))

# %% [markdown]
# ## On the GPT: one base, ten adapters
#
# We load all ten on one model. A fresh LoRA starts as the base and trains r · (in + out) numbers a layer; a *loaded* one is frozen,
# unless you ask for `is_trainable=True`. A checksum over every bit of the base tells whether anything ever touches it.


# %%
def checksum(model):
    """A hash of all bits of a model's tensors."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


bare = base.model().eval()
plain, names = bare(ids).logits, list(find_targets(bare, "all-linear"))
fresh = get_peft_model(base.model(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
assert torch.equal(fresh(ids).logits, plain)  # it starts as the base
fresh(ids, labels=ids).loss.backward()
assert all((p.grad is not None) == ("lora_" in n) for n, p in fresh.named_parameters())
formula = sum(8 * sum(bare.get_submodule(name).weight.shape) for name in names)
assert fresh.get_nb_trainable_parameters()[0] == formula == sum(t.numel() for t in tensors.values())
print(f"numbers in an adapter: {formula:,}; in the file: {4 * formula:,} bytes, names besides")

model = PeftModel(base.model()).eval()
for name in ten:
    model.load_adapter(OUT / name, name)
assert not any(p.requires_grad for p in model.parameters())
before = checksum(bare)
for name in ("owner", "sentiment"):
    model.set_adapter(name)
    text = complete(model, base, ten["owner"].test[:1])[0]
    print(f"{name:10}-> {text.strip()}")
with model.disable_adapter():
    assert torch.equal(model(ids).logits, plain)
    print(f"off: the base's logits to the bit, checksum {checksum(model.base_model) == before}")
    assert checksum(model.base_model) == before

# %% [markdown]
# ## Every adapter on every task
#
# Ask first what a model would score that learned nothing: the frozen base has a row of its own. And with the right answer
# words, saying always the same would score about a half in the last three columns.
#
# Two cells can be predicted. The *owner* adapter writes one fact of four, and half of the prompts of `describe` have an owner.
# The *describe* adapter was never asked for one sentence, but it writes it among others.


# %%
def cell(model, task, n=24):
    """A model's score on a task. A long example beside gives all room for four sentences."""
    examples, long = task.test[:n], describe.test[:1] if task.fact else []
    texts = complete(model, base, examples + long)[:n]
    return task.score(examples, texts)


grid = {}
for name in ten:
    model.set_adapter(name)
    grid[name] = [cell(model, task) for task in ten.values()]
    print(f"{name} is done")
grid["frozen base"] = [cell(bare, task) for task in ten.values()]

# %%
figure, axis = plt.subplots(figsize=(8, 6.4), layout="constrained")
axis.imshow(list(grid.values()), cmap="Oranges", vmin=0, vmax=1.3)
for row, scores in enumerate(grid.values()):
    for column, score in enumerate(scores):
        axis.text(column, row, f"{score:.2f}", ha="center", va="center", fontsize=9)
axis.set_xticks(range(10), ten, rotation=40, ha="right")
axis.set_yticks(range(11), grid)
axis.set(xlabel="task", ylabel="adapter that is on")
axis.spines[:].set_visible(False)
plt.show()
order = list(ten)
within = [grid["describe"][order.index(task.name)] for task in six]
owner = sum(k == "owner" for e in describe.test[:24] for k, _ in describe.facts(e.prompt)) / 96
print(
    f"describe with the owner adapter: {grid['owner'][0]:.2f}; owners among the facts: {owner:.2f}"
)
print(f"the frozen base's best cell: {max(grid['frozen base']):.2f}")
assert all(grid[name][i] > 0.7 for i, name in enumerate(order))
assert max(grid["frozen base"]) < 0.1
assert sum(within) / 6 > 0.6
assert all(grid[a.name][order.index(b.name)] < 0.2 for a in six for b in six if a is not b)
assert grid["sentiment"][order.index("reversed")] < 0.2

# %% [markdown]
# A switch, then, and a clean one: each adapter does its own task, and the others' hardly at all. Only `describe` covers the six
# that were cut out of it. *Reversed* reads reviews as well as *sentiment* does and scores nothing there: a low score can be a skill with other words.
#
# ## Against full fine-tuning, and what merging is
#
# On `describe`: the same examples in the same order, each method at its own swept learning rate, one seed here, the others from
# `python -m minipeft compare --seeds 4 --output data/results/1m`.

# %%
full = finetune(base, describe, RECIPES["full"], RunConfig(steps=100, seed=0, output=OUT / "full"))
frozen = finetune(base, describe, RECIPES["frozen"], RunConfig(steps=100, seed=0))
thin = runs["describe"]
records = compare.load(DATA / "results" / "1m" / "compare.json")
for live in (full, thin):
    like = [r for r in records if r.method == live.method and not r.random_base]
    rest = [r for r in like if r.seed != live.seed]
    assert compare.in_spread(live, rest), "this run is unlike the other seeds"
    print(live.method, [f"{r.score:.2f}" for r in rest], f"and here {live.score:.2f}")

# %% tags=["timing"]
display(Markdown(compare.table([frozen, full, thin], describe)))

# %%
report.compare_figure(compare.rows([frozen, full, thin]), describe)

# %% [markdown]
# One often reads that a merged LoRA "equals" a fully fine-tuned model. It equals *its own adapter*: merging adds (α/r) B A to a
# copy of W and changes nothing else. We measure how far the three models' predictions lie apart, on pretraining text.
#
# What can the merged model no longer do? It is a plain GPT, with no names and no switch. Taking the change off again does not give
# the base either: floats round. (`merge_adapter` keeps W beside W', so that `unmerge_adapter` is exact.)

# %%
model.set_adapter("describe")
merged = model.merge_and_unload().eval()
tuned = GPT.from_pretrained(OUT / "full").eval()
rows = base.held_out[:32]
with torch.no_grad():
    said = {
        name: torch.log_softmax(m(rows).logits, -1)
        for name, m in (("adapter", model), ("merged", merged), ("full", tuned))
    }


def apart(one, other):
    """KL divergence, nats a token."""
    return (said[one].exp() * (said[one] - said[other])).sum(-1).mean().item()


print(
    f"adapter to merged {max(apart('adapter', 'merged'), 0):.4f}, to full {apart('adapter', 'full'):.2f}"
)
print("forgotten, nats a token:", {r.method: f"{r.forgot('on'):.2f}" for r in (full, thin)})
assert apart("adapter", "merged") < 1e-3 < 0.1 < apart("adapter", "full")

# %%
assert not hasattr(merged, "set_adapter")
W, delta = (
    bare.get_submodule(names[0]).weight.detach(),
    model.base_model.get_submodule(names[0]).delta().detach(),
)
off = (W + delta) - delta
print(f"weights that do not come back by subtraction: {(off != W).float().mean():.0%}")
assert (off != W).any()
model.merge_adapter()
model.unmerge_adapter()
with model.disable_adapter():
    assert checksum(model.base_model) == before
print("after merge_adapter and unmerge_adapter: the base's checksum")

# %% [markdown]
# ## What breaks it: the switch taken away
#
# Now both at once. But how do we add LoRAs? ΔW₁ + ΔW₂ is easy; a folder wants one A and one B. Stack them, and
# it is exact; peft calls it *cat*, and the ranks add up. Add A to A and B to B, and the rank stays; peft calls it *linear*. But multiply it out:
#
# $$ (B_1 + B_2)(A_1 + A_2) = B_1 A_1 + B_2 A_2 + \underbrace{B_1 A_2 + B_2 A_1}_{\text{cross terms}} $$
#
# Weights w go in as √w on both sides. Both ways by hand, on the first layer of our two skills, and then measured.
# After that we take α away: no tensor's shape tells it, so we read the *owner* adapter with another α in its config, and no error can come.

# %%
a, b = (model.adapters[name].layers[names[0]] for name in ("describe", "sentiment"))
A1, B1, A2, B2 = (m.weight.detach() for m in (a.lora_A, a.lora_B, b.lora_A, b.lora_B))
s = a.scaling
wanted = a.delta().detach() + b.delta().detach()
stacked = torch.cat([B1, B2], dim=1) @ torch.cat([s * A1, s * A2])
summed = (s**0.5 * B1 + s**0.5 * B2) @ (s**0.5 * A1 + s**0.5 * A2)
pairs = [(1.0, s, A1, B1), (1.0, s, A2, B2)]
for rank, ours, way in ((16, stacked, combine.cat), (8, summed, combine.linear)):
    A, B = way(pairs, rank)
    assert torch.allclose(B @ A, ours, atol=1e-5)
    print(f"{way.__name__:6}: off by {(ours - wanted).norm() / wanted.norm():.1%}")
assert torch.allclose(stacked, wanted, atol=1e-5)
assert torch.allclose(summed - wanted, s * (B1 @ A2 + B2 @ A1), atol=1e-5)
assert (summed - wanted).norm() > 0.2 * wanted.norm()


# %%
def together(parts, weight, way):
    """The model with several adapters at once, each at this weight."""
    name = f"{'+'.join(parts)} {weight:.0%} {way}"
    if name not in model.adapters:
        model.add_weighted_adapter(parts, [weight] * len(parts), name, combination_type=way)
    model.set_adapter(name)
    return model


weights, both = (0.25, 0.5, 0.75, 1.0, 1.25), ["describe", "sentiment"]
sums = {
    (way, name): [cell(together(both, w, way), ten[name]) for w in weights]
    for way in ("cat", "linear")
    for name in both
}
for (way, name), scores in sums.items():
    print(f"{way:6} {name:9} at weight 1: {scores[3]:.2f}")
for parts in (["owner", "cook"], [task.name for task in six]):
    scores = [cell(together(parts, 1.0, "cat"), ten[name]) for name in (*parts, "describe")]
    print(f"cat of {len(parts)}, {', '.join(parts)}:", [f"{score:.2f}" for score in scores])
    assert sum(scores[:-1]) / len(parts) < 0.5
assert (
    sum(sums["cat", name][3] for name in both) > sum(sums["linear", name][3] for name in both) + 0.3
)

# %%
alphas, by_alpha = (2, 4, 8, 16, 32, 64), []
for alpha in alphas:
    other = PeftModel.from_pretrained(base.model(), folder)
    for layer in other.adapters["default"].layers.values():
        layer.scaling = alpha / config["r"]
    by_alpha.append(cell(other, ten["owner"]))
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
left.plot(alphas, by_alpha, "s-", color=ORANGE)
left.axvline(16, color="black", linewidth=1, linestyle=":")
left.set(xscale="log", xlabel="α (dotted: as trained)", ylabel="score", title="owner alone")
left.set_xticks(alphas, alphas)
left.minorticks_off()
for (way, name), scores in sums.items():
    style = {"describe": "s", "sentiment": "o"}[name] + {"cat": "-", "linear": "--"}[way]
    color = {"cat": ORANGE, "linear": GREY}[way]
    right.plot(weights, scores, style, color=color, label=f"{name}, {way}")
right.plot(1, guess_describe, "*", color="black", ms=12, label="your guess, describe")
right.plot(1, guess_sentiment, "P", color="black", ms=9, label="your guess, sentiment")
right.set(xlabel="weight of each of the two", title="describe + sentiment", ylim=(-0.03, 1.05))
figure.legend(
    *right.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
)
plt.show()
assert by_alpha[alphas.index(16)] > 0.7 > 0.5 > by_alpha[-1]

# %% [markdown]
# So do skills add? Two with *different prompts* mostly do, if the sum is exact; the cross terms of *linear* spoil it. Two that answer the *same
# prompts* do not: owner and cook together say neither well, and six one-sentence skills do not make the description of four sentences. A sum of changes is not a sum of skills.
#
# A damaged folder is refused, with one error, before anything changes. So is one whose config was edited: the header of the
# weights holds a checksum of the settings that they were trained with. (A folder that peft wrote has no checksum.)

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
# ## Exercises
#
# Each has a cell that checks your answer. The solutions are in `solutions/08_adapters_as_files.ipynb`.
#
# **1 · Warm-up.** Another adapter has r = 4, on `c_attn` alone, in float32. The layer takes 128 numbers and gives 384, in each of 4 blocks. How many
# bytes of numbers are in its file?

# %% tags=["exercise"]
count = None  # your number, or an expression

# %% tags=["wrong"]
count = 4 * 4 * (128 + 384)

# %% tags=["wrong"]
count = 4 * 4 * 4 * 128 * 384

# %% tags=["solution"]
count = 4 * 4 * 4 * (128 + 384)  # bytes · blocks · r · (in + out)

# %% tags=["check"]
if count is None:
    print("not done yet")
else:
    small = get_peft_model(base.model(), LoraConfig(r=4, target_modules=["c_attn"]))
    right_count = 4 * small.get_nb_trainable_parameters()[0]
    assert count != right_count / 4, "those are numbers: a float32 has four bytes"
    assert count != 4 * 4 * 4 * 128 * 384, "that is r · in · out: the matrices are thin, so add"
    assert count == right_count, "4 bytes · 4 blocks · r (in + out)"
    print(f"right: {count:,} bytes")

# %% [markdown]
# **2 · An exact sum.** Write `add(pairs)`. It gets a list of (w, s, A, B): weight, scaling, and the two matrices. Return one A and one
# B, with B A = Σ w s Bᵢ Aᵢ. The ranks may differ.


# %% tags=["exercise"]
def add(pairs): ...  # return A, B


# %% tags=["wrong"]
def add(pairs):
    return sum((w * s) ** 0.5 * A for w, s, A, B in pairs), sum(
        (w * s) ** 0.5 * B for w, s, A, B in pairs
    )


# %% tags=["wrong"]
def add(pairs):
    return torch.cat([w * A for w, s, A, B in pairs]), torch.cat([B for *_, B in pairs], dim=1)


# %% tags=["solution"]
def add(pairs):
    return torch.cat([w * s * A for w, s, A, B in pairs]), torch.cat([B for *_, B in pairs], dim=1)


# %% tags=["check"]
dice = torch.Generator().manual_seed(0)


def toy(w, s, r=2):
    """A LoRA of a layer with five inputs and six outputs."""
    return w, s, torch.randn(r, 5, generator=dice), torch.randn(6, r, generator=dice)


pairs = [toy(0.5, 2.0), toy(1.5, 3.0)]
answer = add(pairs)
if answer is None:
    print("not done yet")
else:
    A, B = answer
    assert len(A) != 2, "A added to A has cross terms: stack the matrices instead"
    assert (A.shape, B.shape) == ((4, 5), (6, 4)), "A is (Σ r, in), B is (out, Σ r)"
    goal = sum(w * s * B @ A for w, s, A, B in pairs)
    assert not torch.allclose(B @ A, sum(w * B @ A for w, s, A, B in pairs), atol=1e-5), (
        "the scaling s = α / r is missing"
    )
    assert torch.allclose(B @ A, goal, atol=1e-5), "B A must be Σ w s B A: is w on A and on B?"
    mixed = [toy(0.5, 2.0), toy(1.5, 3.0, 3)]
    assert len(add(mixed)[0]) == 5, "the ranks may differ"
    print("right: exact, and the ranks add up")

# %% [markdown]
# **3 · Which way back?** After each of these, are the base's bits there again, all of them? Say True or False for each.
# *switch*: `set_adapter` to another, then `disable_adapter`. *unmerge*: `merge_adapter`, then `unmerge_adapter`, then off. *subtract*: W += ΔW, then W −= ΔW.

# %% tags=["exercise"]
back = None  # {"switch": True or False, "unmerge": True or False, "subtract": True or False}

# %% tags=["wrong"]
back = {"switch": True, "unmerge": True, "subtract": True}

# %% tags=["wrong"]
back = {"switch": True, "unmerge": False, "subtract": False}

# %% tags=["solution"]
back = {"switch": True, "unmerge": True, "subtract": False}

# %% tags=["check"]
if back is None:
    print("not done yet")
else:
    truth = {"subtract": bool(torch.equal((W + delta) - delta, W))}
    model.set_adapter("cook")
    with model.disable_adapter():
        truth["switch"] = checksum(model.base_model) == before
    model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter():
        truth["unmerge"] = checksum(model.base_model) == before
    assert back["subtract"] == truth["subtract"], (
        "W + ΔW is rounded: subtracting does not undo that"
    )
    assert back["unmerge"] == truth["unmerge"], "merge_adapter keeps W beside W'"
    assert back["switch"] == truth["switch"], "switching writes into no weight of the base"
    print("right: only subtraction loses bits")

# %% [markdown]
# **4 · Intruders, hard.** Shuttleworth et al. looked at the singular vectors of a tuned weight. Some of the largest are like *none* of the
# pretrained weight's: they call them intruder dimensions, and found that scaling them down brings back much that was forgotten.
#
# Write `tame(W, tuned, factor)`. Take the left singular vectors of both. Of the *ten largest* of `tuned`, find those whose largest
# |cosine| with *any* left singular vector of W is below three fifths. Multiply the singular value of those by `factor`, and return the weight.


# %% tags=["exercise"]
def tame(W, tuned, factor): ...  # return a weight


# %% tags=["wrong"]
def tame(W, tuned, factor):
    u, size, v = torch.linalg.svd(tuned, full_matrices=False)
    size[:10] *= factor
    return u * size @ v


# %% tags=["wrong"]
def tame(W, tuned, factor):
    u, size, v = torch.linalg.svd(tuned, full_matrices=False)
    likeness = (torch.linalg.svd(W, full_matrices=False)[0].T @ u[:, :10]).amax(0)
    size[:10][likeness < 0.6] *= factor
    return u * size @ v


# %% tags=["solution"]
def tame(W, tuned, factor):
    u, size, v = torch.linalg.svd(tuned, full_matrices=False)
    likeness = (torch.linalg.svd(W, full_matrices=False)[0].T @ u[:, :10]).abs().amax(0)
    size[:10][likeness < 0.6] *= factor
    return u * size @ v


# %% tags=["check"]
u, v = (torch.linalg.qr(torch.randn(40, 40, generator=dice))[0] for _ in range(2))
toy_W = u * torch.linspace(5, 1, 40) @ v.T
top = u[:, :12] * torch.linspace(5, 3, 12) @ v[:, :12].T  # twelve directions of W
new = u[:, 12:].sum(1, keepdim=True) @ v[:, 12:13].T * 1.7  # the largest, a bit of 28 others
if tame(toy_W, top + new, 0.5) is None:
    print("not done yet")
else:
    assert torch.allclose(tame(toy_W, toy_W, 0.5), toy_W, atol=1e-3), (
        "W itself has no intruders: scale only those that are like none of W's"
    )
    for _ in range(8):
        turned = top @ torch.linalg.qr(torch.randn(40, 40, generator=dice))[0]
        assert torch.allclose(tame(toy_W, turned, 0.0), turned, atol=1e-3), (
            "a singular vector's sign is chance: take the absolute cosine"
        )
    assert torch.allclose(tame(toy_W, top + new, 0.5), top + 0.5 * new, atol=1e-3), (
        "multiply the intruder's singular value, and leave all else"
    )
    for factor in (1.0, 0.75, 0.5, 0.25, 0.0):
        calmer = base.model()
        for name in names:
            W0, W1 = bare.get_submodule(name).weight.data, merged.get_submodule(name).weight.data
            calmer.get_submodule(name).weight.data = tame(W0, W1, factor)
        forgot = text_loss(calmer, base.held_out[:64])
        print(
            f"{'right: ' if factor == 1 else ''}factor {factor:.2f}: loss on old text {forgot:.2f}, score {cell(calmer, describe):.2f}"
        )

# %% [markdown]
# Read the printed lines from factor one to zero: how much of the old text comes back, and what does the score pay for it?
#
# ## Summary, at this size
#
# - At this size, ten skills are one base and ten small files; the config's α matters as much as the tensors.
# - At this size, switching is clean: each adapter does its task, and off gives the base's bits.
# - At this size, a merged LoRA equals its own adapter, not full fine-tuning, and it has no switch.
# - At this size, an exact sum keeps two skills whose prompts differ in part; skills on the same prompts do not add.
# - At this size, *linear* is no weighted sum: its cross terms spoil what *cat* keeps.
#
# **To read:** Shuttleworth et al. 2024, arXiv 2410.21228; Ilharco et al. 2022, *Editing Models with Task Arithmetic*,
# arXiv 2212.04089.
