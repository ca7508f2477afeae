"""The shipped base can do what the task builds on, and every token of the task is one it knows."""

import sys
from collections import Counter
from random import Random

import pytest
from conftest import BASE

from minipeft import GPT
from minipeft.lab import tasks


@pytest.fixture(scope="module")
def world():
    sys.path.insert(0, str(tasks.DATA))
    try:
        import text
        import words
    finally:
        sys.path.remove(str(tasks.DATA))
    return text, words


def test_the_text_follows_from_its_seed_and_has_no_held_out_name(world):
    text, words = world
    documents = [text.document(rng) for rng in [Random(0)] for _ in range(500)]
    assert documents == [text.document(rng) for rng in [Random(0)] for _ in range(500)]
    everything = "\n".join(documents)
    assert not any(name in everything for name in words.NEW_PEOPLE + words.NEW_PLACES)
    assert not set(words.PEOPLE) & set(words.NEW_PEOPLE)


def test_every_token_of_the_task_is_frequent_in_the_pretraining_text(world):
    tokenizer = tasks.load_tokenizer(BASE)
    documents = [world[0].document(rng) for rng in [Random(2)] for _ in range(20_000)]
    seen = Counter(i for e in tokenizer.encode_batch(documents) for i in e.ids)
    task = tasks.load_task(tokenizer, 0, 256, "describe")
    used = {i for e in task.train + task.test for i in e.prompt_ids + e.completion_ids[:-1]}
    rare = {tokenizer.id_to_token(i): seen[i] for i in used if seen[i] < 50}
    assert not rare


def test_the_base_copies_names_that_it_has_never_seen(world):
    rng, model, tokenizer = Random(5), GPT.from_pretrained(BASE), tasks.load_tokenizer(BASE)
    lists = [rng.sample(world[1].NEW_PEOPLE, 3) for _ in range(100)]
    prompts = [f"The names: {', '.join(names)}. Again: {names[0]}," for names in lists]
    ids, mask = tasks.pad_left([tokenizer.encode(prompt).ids for prompt in prompts], 0, "cpu")
    out = model.generate(ids, mask, max_new_tokens=6)[:, ids.shape[1] :].tolist()
    told = [tokenizer.decode(row) for row in out]
    assert sum(t.startswith(f" {n[1]}") for t, n in zip(told, lists, strict=True)) >= 90
