"""From a user's own GPT-2 folder, tokenizer and data through our commands back to transformers."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minipeft import GPT
from minipeft.lab import DATA

pytestmark = pytest.mark.conformance
transformers = pytest.importorskip("transformers")

ANIMALS = {
    "hen": "cluck", "cow": "moo", "dog": "woof", "cat": "miaow", "duck": "quack", "owl": "hoot",
    "bee": "buzz", "frog": "croak", "sheep": "baa", "horse": "neigh", "crow": "caw", "wolf": "howl",
}  # fmt: skip
STEMS = ("Frage: was sagt »{}«?\nAntwort:", "### A riddle\nWho am I? I am the {}!\n### Noise\n")


def lines() -> list[dict]:
    """Multi-line prompts, completions with and without a leading space, an unused key."""
    return [
        {"id": "a\u2028b", "prompt": stem.format(animal), "completion": f"{' ' * (1 - i)}{noise}…"}
        for animal, noise in ANIMALS.items()
        for i, stem in enumerate(STEMS)
    ]


def save_tokenizer(folder) -> int:
    """Save a byte-level BPE with its own start, end and padding tokens; return its size."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([r["prompt"] + r["completion"] for r in lines()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 2)])
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>", pad_to_multiple_of=8)  # stays in the file
    tokenizer.enable_truncation(7)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip
    wrapped.save_pretrained(folder)
    return len(wrapped)


@pytest.fixture(params=["the config names the end token", "only the tokenizer names it"])
def user(request, tmp_path):
    """A folder with a GPT-2 saved by transformers and two JSONL files."""
    vocab_size = save_tokenizer(tmp_path / "gpt2")
    named = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=72, n_embd=48, n_layer=2, n_head=3,
        **(named if request.param.startswith("the") else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    rows = [json.dumps(row, ensure_ascii=False) for row in lines()]
    (tmp_path / "mine.jsonl").write_text("\r\n".join(rows) + "\r\n\r\n", encoding="utf-8-sig")
    (tmp_path / "held.jsonl").write_text("\n".join(rows[:4]), encoding="utf-8")
    return tmp_path


def run(folder, words: str, *more: str) -> str:
    """Run a command in a folder and return what it prints."""
    command = [sys.executable, "-m", "minipeft", *words.split(), *more]
    root = str(DATA.parent)
    settings = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=settings, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def completed_by_transformers(
    folder, prompt: str, limit: int
) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The greedy completion, and the ids and logits of the prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", truncation=False, padding=False)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**inputs).logits
        out = model.generate(**inputs, do_sample=False, max_new_tokens=limit)[0]
    assert out[-1] == tokenizer.eos_token_id
    return tokenizer.decode(out, skip_special_tokens=True), inputs["input_ids"], logits


JOB = (
    "finetune --train mine.jsonl --validation held.jsonl --base gpt2 --learning-rate 1e-2 "
    "--steps 60 --warmup 6 --n-generate 2 --device cpu"
)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_users_folder_is_trained_and_loaded_in_transformers_by_commands_alone(user, method):
    run(user, f"{JOB} --method {method} --output out" + (" --size 8" if method == "lora" else ""))
    row = lines()[1]
    prompt = ("--prompt", row["prompt"], "--max-new-tokens", "20")
    merged = user / "out"
    if method == "lora":
        printed = run(user, "generate --base gpt2 --adapter out --device cpu", *prompt)
        assert "wrote merged" in run(user, "merge --base gpt2 --adapter out --output merged")
        merged = user / "merged"
    else:
        printed = run(user, "generate --base out --device cpu", *prompt)
    text, ids, logits = completed_by_transformers(merged, row["prompt"], 20)
    assert printed == text + "\n" == f"{row['prompt']}{row['completion']}\n"
    with torch.no_grad():
        ours = GPT.from_pretrained(merged)(ids).logits
    assert (ours - logits).abs().max() < 1e-5
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (user / "gpt2" / name).read_bytes()
