# %% [markdown]
# # 05 · P-tuning: why train what you throw away?
#
# After this lesson you can
# - write the network that writes soft tokens, count it, and throw it away without changing one logit;
# - compare training with and without the network so that the comparison is fair;
# - ask of a trick that helps whether it helps for the reason that is given;
# - tell P-tuning from P-tuning v2 by a test that you run yourself.
#
# **Paper.** Liu et al. 2021, *GPT Understands, Too*, arXiv 2103.10385. Version two, which is another method: Liu et al. 2021,
# *P-Tuning v2*, arXiv 2110.07602.
#
# **Time.** Fifteen minutes to read, three to run, thirty for the exercises. Read lesson 04 first.

# %%
import inspect
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

from minipeft import (
    GPT,
    GPTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    p_tuning,
)
from minipeft.lab import DATA, compare, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import task_loss
from minipeft.lab.finetune import finetune
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.lab.report import COLORS
from minipeft.lab.train import train

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
base = load_base(DATA / "base" / "1m")
steer, skill = (tasks.load_task(base, name) for name in ("sentiment", "describe"))
print(steer.train[0].prompt, "->", steer.train[0].completion)

# %% [markdown]
# Lesson 04 put twenty trained vectors before the text. They steered the model to answers that it knows (`sentiment`), though not with every seed,
# and did not teach it to write new sentences (`describe`). P-tuning does not train those vectors. It trains a
# network that writes them, and afterwards the network is thrown away.
#
# ## A question first
#
# The result is the same kind of thing: twenty vectors. What can the network be good for?
#
# **Your guess:** with plain prompt tuning the mean score over four seeds is printed below. What does P-tuning reach with
# as many soft tokens, on each task?

# %%
guess = {"sentiment": 0.5, "describe": 0.5}  # from 0 to 1: put your own numbers before you go on
results = DATA / "results" / "1m"
shipped = {
    "sentiment": compare.rows(compare.load(results / "sentiment" / "compare.json")),
    "describe": compare.rows(compare.load(results / "compare.json")),
}
for name, rows in shipped.items():
    print(f"{name}: prompt tuning {compare.mean(rows['prompt_tuning'], 'score'):.2f}")

# %% [markdown]
# ## The idea
#
# $$ P = \text{MLP}(H) \quad \text{or} \quad P = \text{MLP}(\text{BiLSTM}(H)), \qquad \text{logits} = \text{model}([P;\, E(x)]) $$
#
# H has p rows of width d, and starts as noise. H and the network are trained, the model is not. The paper's hope: vectors that
# stand side by side should have to do with each other, and a network ties them together.

# %%
figure, axis = plt.subplots(figsize=(8, 2))
for x, width, text, color in [
    (0, 1, "H\n20 × 128", "#c5e1a5"),
    (1.6, 1.6, "network", "#c5e1a5"),
    (3.8, 1, "P\n20 × 128", COLORS["p_tuning"]),
    (4.9, 1.5, "E(x)\nthe text", "#dddddd"),
    (7, 1.8, "the GPT,\nfrozen", "#dddddd"),
]:
    axis.add_patch(plt.Rectangle((x, 0), width, 1, color=color))
    axis.text(x + width / 2, 0.5, text, ha="center", va="center")
for start, end in ((1.05, 1.55), (3.25, 3.75), (6.45, 6.95)):
    axis.annotate("", (end, 0.5), (start, 0.5), arrowprops={"arrowstyle": "->"})
axis.add_patch(plt.Rectangle((-0.15, -0.2), 3.5, 1.4, fill=False, linestyle="--"))
axis.text(1.6, 1.35, "trained, and thrown away", ha="center")
axis.text(4.3, 1.35, "kept", ha="center")
axis.set(xlim=(-0.3, 9), ylim=(-0.3, 1.7))
axis.axis("off")
plt.show()

# %% [markdown]
# ## By hand
#
# Five soft tokens, a network of three linear layers with ReLU between. Then the same weights in minipeft's.

# %%
torch.manual_seed(0)
model = base.model().requires_grad_(False)
ids = torch.tensor([base.tokenizer.encode(steer.test[0].prompt).ids])

H = torch.randn(5, 128)
one, two, three = (torch.nn.Linear(128, 128) for _ in range(3))
P = three(two(one(H).relu()).relu())  # (p, d)
x = torch.cat([P[None], model.get_input_embeddings()(ids)], dim=1)  # (1, p + t, d)
by_hand = model(inputs_embeds=x).logits[:, 5:]

ours = p_tuning.PromptEncoder(model, PromptEncoderConfig(num_virtual_tokens=5))
ours.embedding.weight.data = H
for mine, layer in zip((one, two, three), ours.mlp_head[::2], strict=True):
    layer.load_state_dict(mine.state_dict())
assert torch.allclose(ours(model, ids).logits, by_hand, atol=1e-4)
print("by hand and minipeft: the same logits")

# %% [markdown]
# ## The real file
#
# `minipeft/methods/p_tuning.py`. What it has beyond that: the LSTM, which reads H from both ends, and the throwing away. The paper mixes
# its soft tokens with words of a template; here, as in peft, they all stand first.

# %%
print(inspect.getsource(p_tuning.PromptEncoder.__init__))
print(inspect.getsource(p_tuning.PromptEncoder.keep_output))

# %% [markdown]
# ## On the GPT
#
# Four ways to the same twenty vectors. Two have a network. `plain` is prompt tuning. `small start` is prompt tuning as well, but
# its vectors start as what an untrained network would write: remember it for later.


# %%
KINDS = {"plain": "o-", "small start": "s--", "MLP": "^-", "LSTM": "v:"}
SHADES = {
    "plain": COLORS["prompt_tuning"], "small start": "black",
    "MLP": COLORS["p_tuning"], "LSTM": COLORS["frozen"],
}  # fmt: skip


def fresh(kind, seed=0):
    torch.manual_seed(seed)
    if kind == "plain":
        return get_peft_model(base.model(), PromptTuningConfig(num_virtual_tokens=20))
    if kind == "small start":
        model, writer = fresh("plain", seed), fresh("MLP", seed)
        model.prompt_encoder.embedding.weight.data = prompt_of(writer)
        return model
    config = PromptEncoderConfig(num_virtual_tokens=20, encoder_reparameterization_type=kind)
    return get_peft_model(base.model(), config)


def prompt_of(model):
    return model.prompt_encoder.prompt().detach().clone()


# %%
d = w = 128
formula = {
    "plain": 20 * d,
    "small start": 20 * d,
    "MLP": 20 * d + (d * w + w) + (w * w + w) + (w * d + d),
    # two layers, each read both ways with four gates: 8 w (what comes in + its own w + 2 biases);
    # above them two linear layers
    "LSTM": 20 * d + 8 * w * (d + w + 2) + 8 * w * (3 * w + 2)
    + (4 * w * w + 2 * w) + (2 * w * d + d),
}  # fmt: skip
for kind in KINDS:
    model = fresh(kind)
    trained, total = model.get_nb_trainable_parameters()
    assert trained == formula[kind]
    print(
        f"{kind:11} trains {trained:7,}; the frozen GPT has {total - trained:,}; kept: {20 * d:,}"
    )

assert trained > 0.5 * (total - trained)  # the LSTM, the last of them

# %% [markdown]
# The network is not small: with the LSTM we train more than half as many numbers as the frozen model has. All methods
# with soft tokens change the output at once, and only their own numbers get gradients:

# %%
model = fresh("LSTM")
plain = base.model()(ids).logits
assert not torch.allclose(model(ids).logits, plain, atol=0.1)
model(ids, labels=ids).loss.backward()
assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
assert all(n.startswith("prompt_encoder.") for n, p in model.named_parameters() if p.requires_grad)
with model.disable_adapter():
    assert torch.equal(model(ids).logits, plain)
print("another model from the start; switched off, the base, to the bit")

# %% [markdown]
# ## Throw it away
#
# H is always the same, so what the network writes is always the same. Keep that.

# %%
for kind in ("MLP", "LSTM"):
    model = fresh(kind).eval()
    with torch.no_grad():
        before = model(ids).logits
        model.prompt_encoder.keep_output()
        assert torch.equal(model(ids).logits, before)
    left = sum(p.numel() for p in model.prompt_encoder.parameters())
    assert left == 20 * d
    print(f"{kind}: network gone, {left:,} numbers left, the very same logits")

# %% [markdown]
# So the network can hold nothing that twenty vectors don't hold. If it helps, it helps on the *way*.
#
# ## With and without it
#
# Same tokens, same data, same order, fifty steps on `sentiment`; for each of the four kinds three learning rates. The networks' are smaller, as they
# break down sooner.


# %%
def train_kind(kind, rate, seed=0, steps=50):
    """Validation loss on `sentiment` after a short training, and how far the vectors went."""
    model = fresh(kind, seed)
    first = prompt_of(model)
    order = tasks.shuffled(steer.train, 16, seed)
    batches = ([tasks.collate(part, base.end, model.device)] for part in order)
    try:
        run = RunConfig(steps=steps, learning_rate=rate, warmup=5)
        train(model, batches, run, title=f"{kind}, rate {rate:g}")
    except FloatingPointError:
        return math.inf, math.inf  # it broke down
    loss = task_loss(model, steer.validation, base.end)["loss"]
    return loss, (prompt_of(model) - first).norm(dim=1).mean().item()


RATES = {kind: [0.01, 0.1, 1.0] for kind in ("plain", "small start")}
RATES |= {kind: [0.001, 0.01, 0.1] for kind in ("MLP", "LSTM")}
curves = {kind: {} for kind in KINDS}
went = {kind: {} for kind in KINDS}
for kind, rates in RATES.items():
    for rate in rates:
        curves[kind][rate], went[kind][rate] = train_kind(kind, rate)
        loss, way = curves[kind][rate], went[kind][rate]
        print(f"{kind:11} rate {rate:<5}: loss {loss:.4f}, a vector went {way:.3g}")

same = {kind: losses[0.01] for kind, losses in curves.items()}
assert 2 * same["MLP"] < min(same["small start"], same["plain"])  # one rate for all
assert went["MLP"][0.01] > 2 * went["small start"][0.01]  # from the same start

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for kind, style in KINDS.items():
    left.plot(RATES[kind], list(curves[kind].values()), style, color=SHADES[kind], label=kind)
left.set(xscale="log", yscale="log", xlabel="learning rate")
left.set(ylabel="loss after 50 steps (nats a token)", title="sentiment, one seed")
left.set_yticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"])
left.minorticks_off()
left.legend(frameon=False)
for method, mark in (("prompt_tuning", "o"), ("p_tuning", "^")):
    for name, line in (("sentiment", "-"), ("describe", "--")):
        runs = [[p["loss"] for p in r.validation] for r in shipped[name][method]]
        steps = [p["step"] for p in shipped[name][method][0].validation]
        means = torch.tensor(runs).mean(0)
        right.plot(steps, means, mark + line, color=COLORS[method], label=f"{method}, {name}")
right.set(yscale="log", xlabel="step", title="100 steps at the swept rate, mean of four seeds")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# Look at one rate first, a hundredth: both networks are ahead of both plain ways, the MLP by far, and one would say
# that the network works. (Of the plain ways the small start is the better one with most seeds, not with all.) Then take each curve at its *own* best: now plain tuning from a small start comes close. So
# the network did two things that need no network. It started the vectors small, like words and unlike noise
# (lesson 04). And it multiplied the learning rate: many weights move each vector at once, so it goes further.
#
# Is that all it did? One seed is no evidence. Three more, each kind at its own rate:

# %%
lengths = {kind: prompt_of(fresh(kind)).norm(dim=1).mean().item() for kind in KINDS}
print("length of a vector at the start:", {k: f"{length:.1f}" for k, length in lengths.items()})
assert lengths["plain"] > 5 * lengths["MLP"]
seeds = {}
for kind, rate in (("small start", 0.1), ("MLP", 0.01)):
    seeds[kind] = [curves[kind][rate]]
    seeds[kind] += [train_kind(kind, rate, seed)[0] for seed in (1, 2, 3)]
    print(f"{kind:11}", [f"{loss:.4f}" for loss in seeds[kind]])
median = {kind: sum(sorted(losses)[1:3]) / 2 for kind, losses in seeds.items()}
assert median["small start"] < 3 * median["MLP"]  # the typical seed needs no network
assert max(seeds["MLP"]) < 0.1  # and with one, no seed goes wrong

# %% [markdown]
# A typical seed does about as well from the small start alone. The worst one here does not: with the network all arrive, and
# without it one may stay behind. So much of the help was the start and the step, and some safety is left that may be the network's own. Four seeds don't tell
# more than that. When a trick helps, ask what else it changed, and give that to the other side.
#
# ## Against full fine-tuning
#
# The same examples in the same order, a hundred steps, each method at its own swept learning rate
# (`data/results/sweep.json`), twenty soft tokens for both. One seed runs here; the others have run with
# `python -m minipeft compare --base data/base/1m --task NAME --seeds 4`.

# %%
live = [finetune(base, steer, RECIPES["frozen"], RunConfig())]
run = RunConfig(steps=100, seed=0, n_evaluations=1)
for method in ("full", "prompt_tuning", "p_tuning"):
    live.append(finetune(base, steer, RECIPES[method], run))
    print(f"{method}: {steer.metric} {live[-1].score:.2f}")
stuck = finetune(base, skill, RECIPES["p_tuning"], run)

# %% tags=["timing"]
display(Markdown(compare.table(live, steer)))

# %% [markdown]
# What is kept is as small as with prompt tuning. On disk P-tuning is larger, because minipeft keeps the network beside it, to go on
# training; peft leaves it out. Now the scores, with the other seeds.

# %%
for record in (*live[1:], stuck):
    rows = shipped[record.task][record.method]
    others = [other for other in rows if other.seed != record.seed]
    assert compare.in_spread(record, others), "this run is unlike the other seeds"
METHODS = ["frozen", "full", "prompt_tuning", "p_tuning"]
good = sum(example.completion == " good." for example in steer.test[:64]) / 64
chance = max(good, 1 - good)  # what always saying the same word scores
scores = {name: {m: [r.score for r in rows[m]] for m in METHODS} for name, rows in shipped.items()}
for name, by_method in scores.items():
    for method, values in by_method.items():
        print(f"{name:10} {method:14}", [f"{value:.2f}" for value in values])
print(f"P-tuning here: {live[-1].score:.2f} and {stuck.score:.2f}; you guessed {guess}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
for axis, (name, by_method), now in zip(axes, scores.items(), (live[-1], stuck), strict=True):
    for i, method in enumerate(METHODS):
        values = by_method[method]
        axis.bar(i, sum(values) / len(values), color=COLORS[method], width=0.6)
        axis.plot([i] * len(values), values, "_", color="black", ms=14)
    axis.plot(3, now.score, "D", color="white", mec="black", label="P-tuning, here")
    axis.axhline(guess[name], color="black", linestyle=":", label="your guess")
    axis.set_xticks(range(4), METHODS)
    nothing = chance if name == "sentiment" else 0
    axis.axhline(nothing, color=COLORS["frozen"], linestyle="--", label="learned nothing")
    axis.set(title=name)
axes[0].set(ylabel="score (a line for each seed)", ylim=(-0.03, 1.05))
figure.legend(
    *axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
)
plt.show()

steering, describing = scores["sentiment"], scores["describe"]
assert min(steering["p_tuning"]) > 0.95 > min(steering["prompt_tuning"])
assert max(*describing["p_tuning"], stuck.score) < 0.15
template = {m: compare.mean(shipped["describe"][m], "test_template_loss") for m in METHODS}
print("describe, loss on the template:", {m: f"{loss:.2f}" for m, loss in template.items()})
assert template["full"] < template["prompt_tuning"] < template["p_tuning"] < template["frozen"]
forgotten = live[-1].forgetting
print("P-tuning on pretraining text:", {s: f"{loss:.3f}" for s, loss in forgotten.items()})
assert forgotten["off"] == forgotten["base"] < forgotten["on"]

# %% [markdown]
# On the steering task every seed of P-tuning is safe where plain prompt tuning, from noise, is not. On the new skill it is
# no help at all: both are stuck, and with the network the loss on the template is even higher. And like every prompt it makes the
# frozen model worse at its old text while it is on.
#
# ## Version two is another method
#
# One reads that P-tuning is "also called Prompt Tuning v2", and that it spreads prompts over the layers. These are two methods from two
# papers. Don't take our word: test it. Change *one* trained number, and find the first block of the GPT whose output
# is no longer the same.


# %%
def block_outputs(model, ids):
    """What each block says at the places of the text."""
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


def first_that_hears(model, ids, index):
    """The first block that says something else when one number of the prompt is changed."""
    numbers, before = model.prompt_encoder.embedding.weight.data, block_outputs(model, ids)
    old = numbers[0, index].item()
    numbers[0, index] += 3.0
    after = block_outputs(model, ids)
    numbers[0, index] = old
    return next(
        i for i, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a, b)
    )


# %%
deep = get_peft_model(base.model(), PrefixTuningConfig(num_virtual_tokens=20)).eval()
shallow = fresh("MLP").eval()
for name, model in (("P-tuning", shallow), ("deep prompts, v2", deep)):
    width = model.prompt_encoder.embedding.weight.shape[1]
    first = [first_that_hears(model, ids, i) for i in range(0, width, 16)]
    print(f"{name:17} row of {width:5}: first heard in blocks {sorted(set(first))}")
    assert set(first) == ({0} if model is shallow else {0, 1, 2, 3})

# %% [markdown]
# P-tuning's numbers all go in at the bottom, and block 0 hears each. Of the deep prompt each block has its own share: keys
# and values that the blocks below never hear. There is no network, and nothing to throw away. minipeft has v2 under its
# older name: it is prefix tuning without a projection (lesson 06).
#
# ## Exercises
#
# Each has a cell that checks your answer. The solutions are in `solutions/05_p_tuning.ipynb`.
#
# **1 · Warm-up.** GPT-2 has width 768. With 20 soft tokens and the MLP, its hidden width 768 as well: how many numbers are
# trained, and how many are kept?

# %% tags=["exercise"]
trained = None
kept = None

# %% tags=["wrong"]
trained = 3 * (768 * 768 + 768)
kept = 20 * 768

# %% tags=["wrong"]
trained = 20 * 768 + 3 * (768 * 768 + 768)
kept = trained

# %% tags=["solution"]
trained = 20 * 768 + 3 * (768 * 768 + 768)
kept = 20 * 768

# %% tags=["check"]
if trained is None or kept is None:
    print("not done yet")
else:
    with torch.device("meta"):  # the full-size GPT-2, without memory for its weights
        large = get_peft_model(GPT(GPTConfig()), PromptEncoderConfig(num_virtual_tokens=20))
    assert trained != 3 * (768 * 768 + 768), "H is trained as well"
    assert trained != 20 * 768 + 3 * 768 * 768, "each linear layer has a bias"
    assert trained == large.get_nb_trainable_parameters()[0], "H, and three linear layers"
    assert kept == 20 * 768, "what is kept is P alone, p · d numbers: the network goes"
    print(f"right: {trained:,} trained, {kept:,} kept")

# %% [markdown]
# **2 · Throw it away.** Write `keep(H, network)`: the tensor that prompt tuning needs so that the model answers as with
# the network. It shall need no gradient.


# %% tags=["exercise"]
def keep(H, network): ...  # return P


# %% tags=["wrong"]
def keep(H, network):
    return H.detach()


# %% tags=["wrong"]
def keep(H, network):
    return network(H)


# %% tags=["solution"]
def keep(H, network):
    return network(H).detach()


# %% tags=["check"]
torch.manual_seed(0)
model = base.model().requires_grad_(False)
writer = p_tuning.PromptEncoder(model, PromptEncoderConfig(num_virtual_tokens=5))
H, network = writer.embedding.weight, writer.mlp_head
answer = keep(H, network)
if answer is None:
    print("not done yet")
else:
    assert not torch.equal(answer, H), "that is what the network reads: keep what it writes"
    assert answer.shape == H.shape, f"P is {tuple(H.shape)}"
    assert not answer.requires_grad, "it wants a gradient, or drags the network along: detach it"
    x = torch.cat([answer[None], model.get_input_embeddings()(ids)], dim=1)
    same = torch.allclose(
        model(inputs_embeds=x).logits[:, 5:], writer(model, ids).logits, atol=1e-4
    )
    assert same, "the model answers something else: P is the network of H, no more"
    print("right: the network can go")

# %% [markdown]
# **3 · Who moves with whom?** Change the *last* of five rows of H. Which rows of P change if the network is the MLP, and which
# with the LSTM? Answer before you look at the check.

# %% tags=["exercise"]
mlp_rows = None  # a list of rows, counted from 0
lstm_rows = None

# %% tags=["wrong"]
mlp_rows = [0, 1, 2, 3, 4]  # all rows share the network
lstm_rows = [0, 1, 2, 3, 4]

# %% tags=["wrong"]
mlp_rows = [4]
lstm_rows = [4]  # it reads from left to right

# %% tags=["solution"]
mlp_rows = [4]  # each row goes through the MLP alone: rows share its weights, not each other
lstm_rows = [0, 1, 2, 3, 4]  # it reads in both directions

# %% tags=["check"]


def rows_that_change(kind):
    torch.manual_seed(0)
    config = PromptEncoderConfig(num_virtual_tokens=5, encoder_reparameterization_type=kind)
    writer = p_tuning.PromptEncoder(base.model(), config)
    with torch.no_grad():
        before = writer.prompt().clone()
        writer.embedding.weight[4] += 1
        return (writer.prompt() - before).abs().amax(1).gt(1e-7).nonzero().flatten().tolist()


if mlp_rows is None or lstm_rows is None:
    print("not done yet")
else:
    assert mlp_rows == rows_that_change("MLP"), (
        "the MLP takes one row at a time: the last of five, counted from 0, is alone"
    )
    assert lstm_rows == rows_that_change("LSTM"), (
        "an LSTM passes on what it read, and this one reads from both ends: earlier rows hear too"
    )
    print("right: the MLP's rows meet only in its weights, the LSTM's hear each other")

# %% [markdown]
# **4 · Version two by hand.** Write `deep_prompt(model, P, ids)`: the logits when layer i finds the keys P[i, 0] and the values P[i, 1]
# before those of the text. P is (l, 2, p, d); `past_key_values` wants for each layer keys and values of
# (b, h, p, k), where h heads of width k make d = h · k.


# %% tags=["exercise"]
def deep_prompt(model, P, ids): ...  # return the logits (b, t, v)


# %% tags=["wrong"]
def deep_prompt(model, P, ids):
    layers, _, p, d = P.shape
    h = model.config.n_head
    past = P.view(layers, 2, 1, h, p, d // h).expand(-1, -1, len(ids), -1, -1, -1)
    return model(ids, past_key_values=[(k, v) for k, v in past]).logits


# %% tags=["wrong"]
def deep_prompt(model, P, ids):
    layers, _, p, d = P.shape
    h = model.config.n_head
    past = P.view(layers, 2, 1, p, h, d // h).transpose(3, 4)
    return model(ids, past_key_values=[(k, v) for k, v in past]).logits


# %% tags=["wrong"]
def deep_prompt(model, P, ids):
    layers, _, p, d = P.shape
    h = model.config.n_head
    past = P.view(layers, 2, 1, p, h, d // h).transpose(3, 4)
    past = past.expand(-1, -1, len(ids), -1, -1, -1)
    return model(ids, past_key_values=[(k, v) for v, k in past]).logits


# %% tags=["solution"]
def deep_prompt(model, P, ids):
    layers, _, p, d = P.shape
    h = model.config.n_head
    past = P.view(layers, 2, 1, p, h, d // h).transpose(3, 4)  # (l, 2, 1, h, p, k)
    past = past.expand(-1, -1, len(ids), -1, -1, -1)
    return model(ids, past_key_values=[(k, v) for k, v in past]).logits


# %% tags=["check"]
torch.manual_seed(0)
model, P, batch = base.model(), torch.randn(4, 2, 3, 128), torch.randint(5, 900, (2, 6))
with torch.no_grad():
    try:
        answer = deep_prompt(model, P, batch)
    except RuntimeError as error:
        raise AssertionError(
            f"{error} Keys and values must be (b, h, p, k), with b rows as in ids"
        ) from error
    truth = {}
    for name, numbers in {"right": P, "swapped": P.flip(1), "upside down": P.flip(0)}.items():
        peft = get_peft_model(base.model(), PrefixTuningConfig(num_virtual_tokens=3)).eval()
        peft.prompt_encoder.embedding.weight.data = numbers.permute(2, 0, 1, 3).reshape(3, -1)
        truth[name] = peft(batch).logits
if answer is None:
    print("not done yet")
else:
    assert answer.shape == truth["right"].shape, "logits of the text: (b, t, v)"
    assert not torch.allclose(answer, model(batch).logits, atol=1e-3), "P is not used"
    assert not torch.allclose(answer, truth["swapped"], atol=1e-3), "keys first, then values"
    assert not torch.allclose(answer, truth["upside down"], atol=1e-3), "layer 0 gets P[0]"
    assert torch.allclose(answer, truth["right"], atol=1e-3), (
        "split d into (h, k) first, then move h before p: a view alone mixes up tokens and heads"
    )
    print("right: deep prompts, and no network anywhere")

# %% [markdown]
# ## Summary, at this size
#
# - P-tuning trains H and a network that writes the soft tokens; thrown away, it leaves p · d numbers and the very same logits.
# - The network may be far larger than what it writes: with the LSTM more than half as large as the frozen model.
# - It helps to steer: every seed arrives. Much of that is its small start and its larger steps; plain vectors with both do as well in a typical seed, not in the worst.
# - It is no help for a new skill: with the network or without it the score is nothing, and the template's loss is higher with it.
# - P-tuning works at the input alone; version two puts keys and values into every layer, without a network: a test tells them apart.
#
# **To read:** the paper's section 3; the P-Tuning v2 paper, sections 2 and 3, for what its authors say is new in it; and lesson 06.
