# %% [markdown]
# # 04 · Prompt tuning: can vectors replace weights?
#
# After this lesson you can
# - write prompt tuning in fewer than twenty lines, and count its parameters;
# - say why its learning rate depends on where the vectors start;
# - tell steering a model from teaching it something new, and measure both;
# - show that a frozen model forgets while a prompt stands before it, and that the switch undoes it;
# - say why soft tokens stand before the text and not behind it.
#
# **Paper.** Lester et al. 2021, *The Power of Scale for Parameter-Efficient Prompt Tuning*, arXiv 2104.08691.
#
# **Time.** Twenty minutes to read, three to run, forty for the exercises.

# %%
import inspect
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

from minipeft import GPT, GPTConfig, PromptTuningConfig, get_peft_model, prompt_tuning
from minipeft.lab import DATA, compare, tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import task_loss
from minipeft.lab.finetune import finetune
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.lab.report import COLORS
from minipeft.lab.train import train

GREEN, GREY = COLORS["prompt_tuning"], COLORS["frozen"]
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
base = load_base(DATA / "base" / "1m")
steer, skill = (tasks.load_task(base, name) for name in ("sentiment", "describe"))
for task in (steer, skill):
    print(f"{task.name}: {task.train[0].prompt}\n -> {task.train[0].completion}\n")

# %% [markdown]
# Two tasks for one small GPT. In `sentiment` it says whether the words were kind; it knows the words, and "good"
# and "bad" too, and must only be *steered* to answer with them. In `describe` it turns a list of facts into sentences
# that it never saw: that is a new *skill*.
#
# ## A question first
#
# You write "Answer in one word" before a question, and a language model does something else, with not one weight
# changed. The words reach it as vectors. So why not look for vectors that no word has, by gradient descent?
# Twenty vectors of width 128 before the text, and a million weights that stay as they are.
#
# **Your guess:** a model whose weights are all tuned gets nearly everything right in both tasks. What part of the
# test will the twenty vectors get right?

# %%
guess = {"sentiment": 0.5, "describe": 0.5}  # from 0 to 1: put your own numbers before you go on

# what a model scores that learned nothing, and always says the same word
good = sum(example.completion == " good." for example in steer.test[:64]) / 64
chance = max(good, 1 - good)
print(
    f"always the same word: {chance:.2f} of sentiment is right; one sentence for all: 0 of describe"
)
assert 0.4 < good < 0.6

# %% [markdown]
# ## The idea
#
# $$ \text{logits} = \text{model}([P;\, E(x)]), \qquad P \in \mathbb{R}^{p \times d} $$
#
# E turns the t tokens of the text into vectors, one row each. P is p more rows, in front. P is trained, and
# nothing else: p · d numbers. We drop the logits of the p soft tokens, for there is no word to predict there.

# %%
figure, axis = plt.subplots(figsize=(8, 1.9))
words = ["soft 1", "soft 2", "soft 3", "…", "was", "tasty.", "How", "was", "it?"]
for i, word in enumerate(words):
    soft = i < 3
    axis.add_patch(plt.Rectangle((i, 0), 0.88, 1, color=GREEN if soft else "#dddddd"))
    axis.text(i + 0.44, 0.5, word, ha="center", va="center", color="white" if soft else "black")
axis.annotate("", (9.3, 1.25), (0, 1.25), arrowprops={"arrowstyle": "->", "color": "#777777"})
axis.text(4.5, 1.4, "each place sees those to its left", ha="center", color="#555555")
axis.text(9.35, 0.5, "good", va="center", weight="bold")
axis.text(1.44, -0.45, "P: trained", ha="center", color=GREEN)
axis.text(6, -0.45, "E(x): rows of the frozen embedding", ha="center")
axis.set(xlim=(-0.1, 10.2), ylim=(-0.6, 1.8))
axis.axis("off")
plt.show()

# %% [markdown]
# ## By hand
#
# Five soft tokens before two texts, the loss on the last three tokens, and one step downhill. Then the same with
# minipeft, from the same P.

# %%
torch.manual_seed(0)
model = base.model().requires_grad_(False)
ids, labels = torch.randint(5, 900, (2, 8)), torch.full((2, 8), -100)
labels[:, 5:] = ids[:, 5:]

P = torch.randn(5, 128, requires_grad=True)
x = torch.cat([P.expand(2, 5, 128), model.transformer.wte(ids)], dim=1)  # (b, p + t, d)
silent = torch.full((2, 5), -100)  # no label for a soft token
by_hand = model(inputs_embeds=x, labels=torch.cat([silent, labels], dim=1))
loss, logits = by_hand.loss, by_hand.logits[:, 5:]  # (b, t, v)
loss.backward()
stepped = (P - 0.1 * P.grad).detach()

ours = prompt_tuning.PromptEmbedding(model, PromptTuningConfig(num_virtual_tokens=5))
ours.embedding.weight.data = P.detach().clone()
out = ours(model, ids, labels=labels)
out.loss.backward()
torch.optim.SGD(ours.parameters(), lr=0.1).step()
assert torch.equal(out.logits, logits)
assert torch.allclose(out.loss, loss)
assert torch.allclose(ours.prompt(), stepped, atol=1e-6)
print("by hand and minipeft: the same logits, the same loss, the same P after a step")

# %% [markdown]
# ### Before, not behind
#
# One often reads that soft tokens are *appended* to the input and go into the encoder. The paper puts them in front. Its model is
# T5, which has an encoder and a decoder, and in an encoder each token sees all others; our GPT is
# a decoder, in which a token sees those to its left alone. Put P behind the text, and see which logits change.

# %%
with torch.no_grad():
    plain, e = model(ids).logits, model.transformer.wte(ids)
    behind = model(inputs_embeds=torch.cat([e, P.expand(2, 5, 128)], dim=1)).logits[:, :8]
before_moves = ((logits - plain).abs().max() / plain.abs().max()).item()
behind_moves = ((behind - plain).abs().max() / plain.abs().max()).item()
print(f"P before the text moves its logits by {before_moves:.2f} of the largest")
print(f"P behind the text moves them by {behind_moves:.0e} (rounding is about 1e-7)")
assert before_moves > 0.05
assert behind_moves < 1e-5

# %% [markdown]
# Nothing of the text hears what stands behind it; only what is written afterwards would. In front, every token
# hears P, in every layer, through attention.
#
# ## The real file
#
# `minipeft/methods/prompt_tuning.py` imports torch and nothing else. Beyond the lines above it knows three ways to
# start, the mask of a padded batch, positions, and `generate`. There is no `merge`: P is no part of any weight.

# %%
print(inspect.getsource(prompt_tuning.PromptEmbedding.__init__))

# %% [markdown]
# ## On the GPT
#
# Does it start as the base, as LoRA does? **Guess**, then look.

# %%
ids = torch.tensor([base.tokenizer.encode(steer.test[0].prompt).ids])
model = base.model()
plain = model(ids).logits
config = PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
model = get_peft_model(model, config)
assert not torch.allclose(model(ids).logits, plain, atol=0.1)
with model.disable_adapter():
    assert torch.equal(model(ids).logits, plain)
print("with the prompt it is another model at once; switched off, the base, to the bit")

model(ids, labels=ids).loss.backward()
trained = [name for name, p in model.named_parameters() if p.requires_grad]
assert trained == ["prompt_encoder.embedding.weight"]
assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
assert model.get_nb_trainable_parameters()[0] == 20 * 128  # p d
model.print_trainable_parameters()

# %% [markdown]
# ## Where to start, and how fast
#
# P may start as noise from N(0, 1), as rows of the embedding drawn at random (`SAMPLE_VOCAB`), or as the words of a text (`TEXT`).
# Adam moves each number by about the learning rate in each step, however large the number is. So first ask
# how large they are.

# %%
TEXT = "Question: How was it? Answer: good. Question: How was it? Answer: bad."


def fresh(start, p=20, seed=0):
    """The base behind p soft tokens that start in one of the three ways."""
    torch.manual_seed(seed)
    text = {"prompt_tuning_init_text": TEXT, "tokenizer_name_or_path": base.folder}
    text = text if start == "TEXT" else {}
    config = PromptTuningConfig(num_virtual_tokens=p, prompt_tuning_init=start, **text)
    return get_peft_model(base.model(), config)


def prompt_of(model):
    return model.prompt_encoder.prompt().detach().clone()


STARTS = {"RANDOM": "o-", "SAMPLE_VOCAB": "s--", "TEXT": "^:"}
lengths = {start: prompt_of(fresh(start)).norm(dim=1).mean().item() for start in STARTS}
print({start: f"{length:.1f}" for start, length in lengths.items()}, "(mean length of a vector)")
assert lengths["RANDOM"] > 4 * lengths["SAMPLE_VOCAB"]

# %% [markdown]
# Noise is several times as long as a word. It should need larger steps to become something else. Try four
# learning rates, each ten times the last, for fifty steps.


# %%
def train_prompt(start, rate, p=20, steps=50):
    """Validation loss after a short training on `sentiment`, and how far P went for its length."""
    model = fresh(start, p)
    first = prompt_of(model)
    order = tasks.shuffled(steer.train, 16, 0)
    batches = ([tasks.collate(part, base.end, model.device)] for part in order)
    run = RunConfig(steps=steps, learning_rate=rate, warmup=5)
    train(model, batches, run, title=f"{start}, rate {rate:g}")
    moved = ((prompt_of(model) - first).norm() / first.norm()).item()
    return task_loss(model, steer.validation, base.end)["loss"], moved


RATES = [0.003, 0.03, 0.3, 3.0]
curves = {start: [] for start in STARTS}
for start in STARTS:
    for rate in RATES:
        curves[start].append(train_prompt(start, rate))
        loss, moved = curves[start][-1]
        print(f"{start:12} rate {rate:<5}: loss {loss:.4f}, P moved by {moved:.2f} of its length")

noise, words = curves["RANDOM"], curves["SAMPLE_VOCAB"]
assert noise[0][0] > 2 * max(words[0][0], curves["TEXT"][0][0])  # a small rate: words are ahead
for i in (0, 1):  # and noise at ten times the rate?
    ratio = noise[i + 1][0] / words[i][0]
    print(f"noise at {RATES[i + 1]:g} against words at {RATES[i]:g}: the loss is {ratio:.1f} times")
assert noise[1][0] < 2 * words[0][0]  # it has caught up with words at the small rate

# %%
for start, style in STARTS.items():
    shade = {"RANDOM": GREEN, "SAMPLE_VOCAB": "#81c784", "TEXT": "black"}[start]
    plt.plot(RATES, [loss for loss, _ in curves[start]], style, color=shade, label=start)
unsure = math.log(2) / len(steer.test[0].completion_ids)
plt.axhline(unsure, color=GREY, linestyle=":", label="good or bad, but not which")
plt.xscale("log")
plt.yscale("log")
plt.xlabel("learning rate")
plt.yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
plt.ylabel("validation loss after 50 steps (nats a token)")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# What counts is the step as a share of the vector's length. Words forgive a small rate, noise does not: it hardly moved. At
# ten times the rate noise is where words were, or ahead. At the best rate of each, words stay ahead (by how much, differs from seed to seed). Above the dotted line the prompt has not even found that the answer is one of two words.
# So a comparison of two starts at *one* learning rate is no comparison; sweep each.
#
# ## Against full fine-tuning
#
# The same examples in the same order, a hundred steps, for each method its own swept learning rate
# (`data/results/sweep.json`), and a prompt that starts as noise, which is peft's default. First the steering task. One seed runs here;
# LoRA's row and the other seeds of both tasks have run before, by `python -m minipeft compare --base data/base/1m --task NAME --seeds 4`.

# %%
results = DATA / "results" / "1m"
shipped = {
    "sentiment": compare.load(results / "sentiment" / "compare.json"),
    "describe": compare.load(results / "compare.json"),
}
by_name = {"frozen": finetune(base, steer, RECIPES["frozen"], RunConfig())}
run = RunConfig(steps=100, seed=0, n_evaluations=1)
for method in ("full", "prompt_tuning"):
    by_name[method] = finetune(base, steer, RECIPES[method], run)
    print(f"{method}: {steer.metric} {by_name[method].score:.2f}")
by_name["lora"] = compare.rows(shipped["sentiment"])["lora"][0]
METHODS = ["frozen", "full", "lora", "prompt_tuning"]

# %% tags=["timing"]
display(Markdown(compare.table([by_name[method] for method in METHODS], steer)))

# %% [markdown]
# (LoRA's seconds are from another machine.) Now the new skill: here only the prompt runs, and the other methods are read from the
# shipped file.

# %%
stuck = finetune(base, skill, RECIPES["prompt_tuning"], run)
scores = {
    name: {m: [r.score for r in compare.rows(records)[m]] for m in METHODS}
    for name, records in shipped.items()
}
for name in scores:
    for method in METHODS:
        print(f"{name:10} {method:14}", [f"{score:.2f}" for score in scores[name][method]])
print(f"here: {by_name['prompt_tuning'].score:.2f} and {stuck.score:.2f}")

for record in (by_name["full"], by_name["prompt_tuning"], stuck):
    rows = compare.rows(shipped[record.task])[record.method]
    others = [other for other in rows if other.seed != record.seed]
    assert compare.in_spread(record, others), "this run is unlike the other seeds"
mean = {name: {m: sum(s) / len(s) for m, s in by.items()} for name, by in scores.items()}
assert mean["sentiment"]["full"] == mean["sentiment"]["lora"] == 1
assert mean["sentiment"]["prompt_tuning"] > chance + 0.2  # it steers, on the mean of four seeds
assert min(scores["sentiment"]["prompt_tuning"]) < 0.7  # but not with every seed
assert min(mean["describe"]["full"], mean["describe"]["lora"]) > 0.9
assert max(*scores["describe"]["prompt_tuning"], stuck.score) < 0.15  # no skill, with any seed

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
for axis, (name, by_method), now in zip(
    axes, scores.items(), (by_name["prompt_tuning"], stuck), strict=True
):
    for i, method in enumerate(METHODS):
        axis.bar(i, mean[name][method], color=COLORS[method], width=0.6)
        axis.plot([i] * len(by_method[method]), by_method[method], "_", color="black", ms=14)
    axis.plot(3, now.score, "D", color="white", mec="black", label="prompt tuning, here")
    axis.axhline(guess[name], color="black", linestyle=":", label="your guess")
    axis.axhline(
        chance if name == "sentiment" else 0, color=GREY, linestyle="--", label="learned nothing"
    )
    axis.set_xticks(range(4), METHODS)
    axis.set(title={"sentiment": "steering", "describe": "a new skill"}[name] + f": {name}")
axes[0].set(ylabel="score (a line for each seed)", ylim=(-0.03, 1.05))
figure.legend(
    *axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
)
plt.show()

# %% [markdown]
# Two answers to the question. Vectors can steer: most seeds get nearly all of it, though with this start and this rate a seed
# can fall back to chance. The paper finds that a
# larger model makes prompt tuning better and safer; a base of three times the size says so too, printed below. But the vectors did not teach the skill, not in these
# hundred steps: hardly a fact comes out right with any seed. What did they learn?

# %%
larger = compare.rows(compare.load(DATA / "results" / "sentiment" / "compare.json"))
larger = [record.score for record in larger["prompt_tuning"]]
print("sentiment on the 3M base:", [f"{score:.2f}" for score in larger])
assert min(larger) > mean["sentiment"]["prompt_tuning"]
first, last = stuck.validation[0], stuck.validation[-1]
for key in ("template_loss", "slot_loss"):
    print(f"{key}: {first[key]:.2f} before, {last[key]:.2f} after 100 steps")
print("wanted: ", stuck.examples[0]["reference"].strip())
print("written:", stuck.examples[0]["generated"].strip()[:200])
assert last["template_loss"] < 0.6 * first["template_loss"]

# %% [markdown]
# The loss fell by much, above all on the template: with the right words so far, the model often knows how to go on. Left to itself it
# babbles, and the score stayed at nothing: the loss is not the score.
#
# ## Does a frozen model forget?
#
# Not one weight has changed. Is the model as good on its pretraining text as before?

# %%
for record in (by_name["full"], by_name["lora"], by_name["prompt_tuning"], stuck):
    states = ", ".join(f"{state} {value:.3f}" for state, value in record.forgetting.items())
    print(f"{record.task:9} {record.method:14} loss on pretraining text: {states}")
for record in (by_name["prompt_tuning"], stuck):
    assert record.forgot("off") == 0
    assert record.forgot("on") > 1
assert by_name["prompt_tuning"].forgot("on") > by_name["full"].forgot("on") + 1

# %% [markdown]
# With the prompt before it, the frozen model is far worse at what it knew, and far worse than the model whose every
# weight was tuned on the same task. "Frozen" says where the base is kept. It does not say that nothing is forgotten
# while a prompt talks into its ear. But the prompt can be taken off, and the base is there, to the bit.
#
# ## What breaks it, and what mends it
#
# Take tokens away: does a single one still steer? Then take three times as many steps: is the prompt that was stuck
# on the new skill stuck for good? **Guess**, then run.

# %%
single = train_prompt("SAMPLE_VOCAB", RATES[2], p=1)[0]
print(f"sentiment, 50 steps: loss with 1 soft token {single:.3f}, with 20 {words[2][0]:.3f}")
print(
    f"undecided between the two words {unsure:.3f}; the base alone {by_name['frozen'].test_loss:.3f}"
)
longer = finetune(base, skill, RECIPES["prompt_tuning"], replace(run, steps=300))
for record in (stuck, longer):
    print(
        f"describe, {record.steps} steps: template loss {record.test_template_loss:.2f}, "
        f"{skill.metric} {record.score:.2f}"
    )
print(f"(expect 0.1 to 0.5 with 300; LoRA in 100 steps: {mean['describe']['lora']:.2f})")
assert single < 2 * unsure
assert longer.test_template_loss < 0.8 * stuck.test_template_loss
assert 0.02 < longer.score < 0.6 * mean["describe"]["lora"]

# %% [markdown]
# One vector goes most of the way when steering. And "stuck" was too strong a word: with three times
# the steps the facts begin to come. So it is not that vectors *cannot* learn a new skill: they are slow, and far behind LoRA even with
# more steps. More vectors help too (try `.with_size(28)`, the most that fits), but they cost: every soft token takes a place in the context and is computed in each forward pass, in training
# and in use. Look at the seconds in the table above: hundreds of times fewer trained numbers do not make a step even twice as fast. The gradient
# still goes through the whole model, and the text is twenty tokens longer.
#
# ## Exercises
#
# Each has a cell that checks your answer. The solutions are in `solutions/04_prompt_tuning.ipynb`.
# After them, write `prompt_tuning.py` yourself and have it graded: `python -m minipeft build start prompt_tuning my`. The page `lessons/BUILD.md` says how.
#
# **1 · Warm-up.** GPT-2 has 12 layers of width 768 and a context of 1,024. With 100 soft tokens, how many parameters are
# trained, and how many tokens of text still fit?

# %% tags=["exercise"]
numbers = None  # trained parameters
room = None  # tokens of text

# %% tags=["wrong"]
numbers = 12 * 100 * 768
room = 1024 - 100

# %% tags=["wrong"]
numbers = 100 * 768
room = 1024

# %% tags=["solution"]
numbers = 100 * 768
room = 1024 - 100

# %% tags=["check"]
if numbers is None or room is None:
    print("not done yet")
else:
    with torch.device("meta"):  # the full-size GPT-2, without memory for its weights
        large = get_peft_model(GPT(GPTConfig()), PromptTuningConfig(num_virtual_tokens=100))
    assert numbers != 12 * 100 * 768, "the prompt stands at the input alone, not in every layer"
    assert numbers == large.get_nb_trainable_parameters()[0], "p · d: a vector for each token"
    assert room != 1024, "soft tokens take places in the context"
    assert room == large.config.n_positions - 100, "the context, less a place for each soft token"
    print(f"right: {numbers:,} parameters, room for {room} tokens")

# %% [markdown]
# **2 · A padded batch.** Texts of unequal length are padded on the right, with a mask of ones and zeros (b, t). Write
# `in_front(mask, labels, p)`: both as the model needs them with p soft tokens before the text.


# %% tags=["exercise"]
def in_front(mask, labels, p): ...  # return the two, each (b, p + t)


# %% tags=["wrong"]
def in_front(mask, labels, p):
    zeros, silent = mask.new_zeros(len(mask), p), labels.new_full((len(labels), p), -100)
    return torch.cat([zeros, mask], dim=1), torch.cat([silent, labels], dim=1)


# %% tags=["wrong"]
def in_front(mask, labels, p):
    ones, zeros = mask.new_ones(len(mask), p), labels.new_zeros(len(labels), p)
    return torch.cat([ones, mask], dim=1), torch.cat([zeros, labels], dim=1)


# %% tags=["wrong"]
def in_front(mask, labels, p):
    ones, silent = mask.new_ones(len(mask), p), labels.new_full((len(labels), p), -100)
    return torch.cat([mask, ones], dim=1), torch.cat([labels, silent], dim=1)


# %% tags=["solution"]
def in_front(mask, labels, p):
    ones, silent = mask.new_ones(len(mask), p), labels.new_full((len(labels), p), -100)
    return torch.cat([ones, mask], dim=1), torch.cat([silent, labels], dim=1)


# %% tags=["check"]
batch = tasks.collate(steer.train[:4], base.end, "cpu")
mask, labels = batch["attention_mask"], batch["labels"]
answer = in_front(mask, labels, 3)
if answer is None:
    print("not done yet")
else:
    assert all(a.shape == (4, mask.shape[1] + 3) for a in answer), "each is p longer: (b, p + t)"
    assert not (answer[0] == -100).any(), "the mask first, then the labels"
    assert (answer[0][:, :3] == 1).all(), "a zero in front hides the soft tokens: they must be seen"
    assert torch.equal(answer[0][:, 3:], mask), (
        "the text's own mask comes after the p ones, in front"
    )
    assert (answer[1][:, :3] != 0).all(), "0 is a token: only -100 means that no loss is asked here"
    assert torch.equal(answer[1][:, 3:], labels), "the text's own labels come after the p new ones"
    assert (answer[1][:, :3] == -100).all(), "no loss on a soft token: its label is -100"
    print("right: seen, and silent")

# %% [markdown]
# **3 · What does it say?** Perhaps a soft token is near a word. Write `nearest(P, E)`: for each row of P (p, d)
# the index of the row of E (v, d) with the largest *cosine*.


# %% tags=["exercise"]
def nearest(P, E): ...  # return p indices


# %% tags=["wrong"]
def nearest(P, E):
    return (P @ E.T).argmax(dim=1)


# %% tags=["wrong"]
def nearest(P, E):
    return torch.cdist(P, E).argmin(dim=1)


# %% tags=["wrong"]
def nearest(P, E):
    unit = torch.nn.functional.normalize
    return (unit(P, dim=1) @ unit(E, dim=1).T).max(dim=1)


# %% tags=["solution"]
def nearest(P, E):
    unit = torch.nn.functional.normalize
    return (unit(P, dim=1) @ unit(E, dim=1).T).argmax(dim=1)


# %% tags=["check"]
answer = nearest(torch.tensor([[3.0, 0.2], [0.1, 0.4]]), torch.tensor([[1.0, 0], [9, 9], [0, 30]]))
if answer is None:
    print("not done yet")
else:
    assert torch.is_tensor(answer), "return the indices alone: `max` gives the values as well"
    assert answer.shape == (2,), "one index for each soft token: the largest over the words, dim 1"
    assert not answer.is_floating_point(), "those are the cosines: return where the largest is"
    assert answer.tolist() != [1, 2], "long words win: divide each row (dim 1) by its length"
    assert answer.tolist() != [0, 0], "distances: short words win. A cosine asks for directions"
    assert answer.tolist() == [0, 2], "for each row of P the row of E with the largest cosine"
    torch.manual_seed(0)
    vectors, rows = torch.randn(8, 128), base.model().get_input_embeddings().weight
    print("right; the words nearest to eight vectors of noise:", end="")
    print(base.tokenizer.decode(nearest(vectors, rows).tolist()))
    print("so a nearest word is always found, and need not mean a thing")

# %% [markdown]
# **4 · One batch, many tasks.** A LoRA sits in the weights, so all rows of a batch get the same. A prompt is only input: each row may
# have its own. Write `mixed(model, prompts, which, ids)`: the logits (b, t, v) of a batch whose row i stands behind
# `prompts[which[i]]`; prompts is (n, p, d), which (b,), ids (b, t).


# %% tags=["exercise"]
def mixed(model, prompts, which, ids): ...  # return the logits of the real tokens


# %% tags=["wrong"]
def mixed(model, prompts, which, ids):
    x = torch.cat([prompts[which], model.get_input_embeddings()(ids)], dim=1)
    return model(inputs_embeds=x).logits


# %% tags=["wrong"]
def mixed(model, prompts, which, ids):
    x = torch.cat([model.get_input_embeddings()(ids), prompts[which]], dim=1)
    return model(inputs_embeds=x).logits[:, : ids.shape[1]]


# %% tags=["wrong"]
def mixed(model, prompts, which, ids):
    same = prompts[which[0]].expand(len(ids), -1, -1)
    x = torch.cat([same, model.get_input_embeddings()(ids)], dim=1)
    return model(inputs_embeds=x).logits[:, prompts.shape[1] :]


# %% tags=["solution"]
def mixed(model, prompts, which, ids):
    x = torch.cat([prompts[which], model.get_input_embeddings()(ids)], dim=1)
    return model(inputs_embeds=x).logits[:, prompts.shape[1] :]


# %% tags=["check"]
torch.manual_seed(0)
model, prompts, which = base.model(), torch.randn(3, 4, 128), torch.tensor([2, 0, 2, 1])
batch = torch.randint(5, 900, (4, 6))
with torch.no_grad():
    answer = mixed(model, prompts, which, batch)
    alone = []
    for row, n in zip(batch, which, strict=True):
        one = torch.cat([prompts[n], model.get_input_embeddings()(row)])[None]
        alone.append(model(inputs_embeds=one).logits[0])
    alone = torch.stack(alone)  # (b, p + t, v)
if answer is None:
    print("not done yet")
else:
    assert answer.shape[1] != 10, "the logits of the soft tokens are still there: drop the first p"
    assert answer.shape == (4, 6, alone.shape[2]), "the logits of the six real tokens of each row"
    assert not torch.allclose(answer, model(batch).logits, atol=1e-3), (
        "the text does not hear the prompts: they must stand in front"
    )
    assert not torch.allclose(answer, alone[:, :6], atol=1e-3), (
        "you dropped the last p, not the first"
    )
    assert torch.allclose(answer[0], alone[0, 4:], atol=1e-3), "row 0 wants prompts[which[0]]"
    assert torch.allclose(answer, alone[:, 4:], atol=1e-3), (
        "row 0 is right: now each its own prompt"
    )
    print("right: three tasks in one batch")

# %% [markdown]
# ## Summary, at this size
#
# - Prompt tuning trains p · d numbers before the text; the weights stay, there is nothing to merge, and a batch may mix tasks.
# - Noise is far longer than words, and needs a far larger learning rate: what counts is the step as a share of the length.
# - Twenty vectors steer the model to answers that it knows, with noise as the start not with every seed; full fine-tuning and LoRA always do.
# - A new skill they hardly teach in a hundred steps: the template's loss falls, the facts do not come. Three times the vectors help, but stay far behind LoRA.
# - Frozen is not unforgetting: with the prompt on, the model is worse at its old text than after full fine-tuning on the same task; off, it is the base.
#
# **To read:** the paper's section 3, above all its figure on the size of the model; Petrov et al. 2023, *When Do Prompting and
# Prefix-Tuning Work?*, arXiv 2310.19698, on what a prompt cannot do. Lesson 05 lets a network write the vectors, lesson 06 puts vectors into
# every layer.
