"""The shipped bases have the skills that the tasks need, and have seen the tasks' tokens."""

import json
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BASE

from minipeft import GPT
from minipeft.data import library
from minipeft.lab import DATA, tasks
from minipeft.lab.base import load_base, load_tokenizer, read_text, windows
from minipeft.methods.qlora import NF4_CODEBOOK, dequantize_nf4, quantize_nf4


def test_the_text_is_reproducible_and_contains_no_held_out_name(world):
    text, words, *_ = world
    documents = [text.document(rng) for rng in [Random(0)] for _ in range(500)]
    assert documents == [text.document(rng) for rng in [Random(0)] for _ in range(500)]
    everything = "\n".join(documents)
    assert not any(name in everything for name in words.NEW_PEOPLE + words.NEW_PLACES)
    assert not set(words.PEOPLE) & set(words.NEW_PEOPLE)


@pytest.fixture(scope="module")
def seen(world):
    """How often each token occurs in an eighth of the pretraining text."""
    documents = [world[0].document(rng) for rng in [Random(2)] for _ in range(20_000)]
    encoded = load_tokenizer(BASE).encode_batch(documents)
    return Counter(i for e in encoded for i in e.ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unseen"),
    [  # the variants show what unseen tokens do
        ("describe", set()),
        ("sentiment", set()),
        ("describe_brackets", {"[", "]", "=", ">"}),
        ("sentiment_unseen", {"ð", "Ł", "ĳ", "į", "İ"}),  # the bytes of the two thumbs
    ],
)
def test_every_token_of_a_task_is_frequent_in_the_pretraining_text(base, seen, name, unseen):
    tokenizer = base.tokenizer
    task = tasks.load_task(base, name)
    examples = task.train + task.validation + task.test
    used = {i for e in examples for i in e.prompt_ids + e.completion_ids[:-1]}
    assert {tokenizer.id_to_token(i) for i in used if not seen[i]} == unseen
    if not unseen:
        assert not [
            tokenizer.id_to_token(i) for i in used if seen[i] < 30
        ]  # about 250 in the whole text


def test_the_largest_base_copies_names_it_has_never_seen(world):
    rng, folder = Random(5), DATA / "base" / "3m"
    model, tokenizer = GPT.from_pretrained(folder), load_tokenizer(folder)
    lists = [rng.sample(world[1].NEW_PEOPLE, 3) for _ in range(100)]
    prompts = [f"The names: {', '.join(names)}. Again: {names[0]}," for names in lists]
    ids, mask = tasks.pad_left([tokenizer.encode(prompt).ids for prompt in prompts], 0, "cpu")
    out = model.generate(ids, mask, max_new_tokens=6)[:, ids.shape[1] :].tolist()
    texts = [tokenizer.decode(row) for row in out]
    assert sum(t.startswith(f" {n[1]}") for t, n in zip(texts, lists, strict=True)) >= 90


@pytest.mark.parametrize("name", ["0.3m", "1m", "3m"])
def test_the_last_positions_of_the_context_were_trained(name):
    base = load_base(DATA / "base" / name)
    context = base.pretrained.config.n_positions
    documents = read_text(DATA / "base" / "held_out.txt")
    encoded = [e.ids for e in base.tokenizer.encode_batch(documents)]
    ids = windows(encoded, context, base.end)[:40]
    logits = base.model().eval()(ids).logits[:, :-1]  # (b, t - 1, v)
    losses = F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(0)  # (t - 1,)
    late = losses[-context // 4 :].mean()
    assert late < losses.mean() + 0.05, "later tokens have more to look back on: they are easier"


def test_the_n_gram_model_is_a_distribution_and_learns_bigrams_and_trigrams(world):
    stream = np.tile([0, 1, 2, 0, 2, 3], 50)
    model = world[2].NGram(stream, 8, 3)
    every = np.array([[a, b, c] for a in range(8) for b in range(8) for c in range(8)])
    after = model.probabilities(every)[:, 1].reshape(64, 8)  # P(c | a, b)
    assert after.sum(1) == pytest.approx(1)
    assert (after > 0).all()
    assert after[0 * 8 + 1].argmax() == 2
    assert (
        model.loss(stream[None, :60]) < 0.2 < world[2].NGram(stream, 8, 1).loss(stream[None, :60])
    )


def test_a_probes_answer_follows_from_its_prompt(world):
    text, words, card, *_ = world
    rng, values = Random(0), text.VALUES | card.HELD_OUT
    for ask in (card.about_one, card.about_one_of_a_kind, card.about_three):
        prompt, answer = ask(text.Writer(rng, values))
        assert answer.strip(" .").lower() in prompt.lower()
    prompt, answer = card.copying(text.Writer(rng, values))
    assert prompt.endswith(",")
    assert answer.strip(" ,") in words.NEW_PEOPLE


def test_the_data_card_shows_the_committed_figures(world):
    card, page = world[2], (DATA / "README.md").read_text()
    figures = json.loads(card.RESULTS.read_text())
    assert card.tables(figures) in page
    assert card.counted(figures) in page
    assert card.samples() in page
    words = world[1]
    names = len(words.WOMEN + words.MEN), len(words.FAMILY)
    assert "({} first names and {} family names".format(*names) in page
    largest = figures["bases"]["3m"]
    assert largest["loss"] < figures["5-gram"] - 0.5
    assert largest["probes"]["reads a list of names back, names held out"] >= 0.8
    assert largest["probes"]["second mention of a name, names held out"] >= 0.8
    assert largest["probes"]["answers about one place, values held out"] >= 0.8


@pytest.mark.slow
def test_the_experiment_by_bits_rounds_like_nf4_and_the_page_shows_it(world):
    bits, w = world[4], torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    nf4 = dequantize_nf4(quantize_nf4(w, double_quant=False))
    assert torch.equal(bits.rounded(w, NF4_CODEBOOK, 64), nf4)
    assert len(bits.rounded(w, bits.integers(2), None).unique()) == 3
    records = json.loads(bits.RESULTS.read_text())
    page = (DATA / "results" / "README.md").read_text()
    assert bits.table(records) in page
    far = {(r["base"], r["code"], r["blocksize"]): r["divergence"] for r in records}
    for base in ("0.3m", "1m", "3m"):
        in_blocks = [far[base, code, 64] for code in bits.CODES]
        assert in_blocks == sorted(in_blocks)  # NF4, FP4, int4, int3, int2
        assert all(far[base, code, 64] < far[base, code, None] for code in bits.CODES)
    again = bits.measure(DATA / "base" / "0.3m", ["NF4"])[0]  # the other codes take seconds
    assert again["divergence"] == pytest.approx(far["0.3m", "NF4", 64], rel=0.02)


def test_the_shipped_files_are_small():
    size = sum(file.stat().st_size for file in DATA.rglob("*.*") if file.suffix != ".pyc")
    assert size < 24e6


def test_the_chat_task_is_what_its_script_writes_and_no_question_is_in_two_files():
    folder = DATA / "chat"
    assert {file.name: file.read_text() for file in folder.iterdir()} == library.files()
    parts = [
        {json.loads(line)["messages"][0]["content"] for line in text.splitlines()}
        for text in library.files().values()
    ]
    assert [len(part) for part in parts] == [200, 20, 20], "no question twice"
    assert len(set().union(*parts)) == 240
    assert len(library.FACTS) == 20
