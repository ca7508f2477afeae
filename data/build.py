"""Make everything under data/ from nothing: the tokenizer, the base models, the tasks.

python -m data.build             # about an hour on two cores
python -m data.build --bases 1m  # the tasks and one base
python -m data.build --bases     # the tasks alone, in a second
"""

import argparse
import json
import shutil
from pathlib import Path
from random import Random

from .text import Writer, a, document, up
from .words import (
    BAD_THINGS,
    GOOD_THINGS,
    NEW_PEOPLE,
    NEW_PLACES,
    NEW_THINGS,
    PEOPLE,
    PLACES,
    THINGS,
)

HERE = Path(__file__).resolve().parent
DOCUMENTS, CONTEXT, STEPS = 165_000, 128, 4_800  # steps of 16 windows: 9.8M tokens, seen once
BASES = {  # width, layers, heads; the standard deviation at the start, the learning rate
    "3m": (192, 6, 6, 0.05, 3e-3),
    "1m": (128, 4, 4, 0.06, 6e-3),
    "0.3m": (72, 3, 3, 0.08, 6e-3),
}

# The task `describe`: each slot with the kind of its value and two ways to state it. Owner, cook
# and guest are all people, name and near places, lost and found things: only the key tells.
SLOTS = {
    "name": ("place", ["We all know {v}", "This is the story of {v}"]),
    "near": ("place", ["It stands by the side of {v}", "The road to it begins at {v}"]),
    "owner": ("person", ["It all belongs to {v}", "The house was bought by {v}"]),
    "cook": ("person", ["The dinner is made by {v}", "In the kitchen stands {v}"]),
    "guest": ("person", ["A bed is kept for {v}", "In the best room sleeps {v}"]),
    "lost": ("thing", ["Everybody is looking for {v}", "Nobody knows what became of {v}"]),
    "found": ("thing", ["Under the table they saw {v}", "On the stairs there lay {v}"]),
}


def describe(rng: Random, people: list, places: list, things: list) -> dict[str, str]:
    """One example: the keys shuffled in the prompt, in a fixed order in the completion."""
    kinds = {"person": people, "place": places, "thing": things}
    chosen = ["name"] + rng.sample([key for key in SLOTS if key != "name"], 3)
    pools = {kind: iter(rng.sample(values, 3)) for kind, values in kinds.items()}
    values = {key: next(pools[SLOTS[key][0]]) for key in chosen}
    values = {key: a(f"a {v}") if SLOTS[key][0] == "thing" else v for key, v in values.items()}
    asked = chosen[1:]
    rng.shuffle(asked)
    facts = [f"The name is {values['name']}."] + [f"{key} is {values[key]}." for key in asked]
    told = [
        rng.choice(phrases).format(v=values[key])
        for key, (_, phrases) in SLOTS.items()
        if key in values
    ]
    return {"prompt": " ".join(facts), "completion": " " + " ".join(f"{up(t)}." for t in told)}


def bracketed(example: dict[str, str]) -> dict[str, str]:
    """`describe` in signs that the pretraining text does not have."""
    facts = example["prompt"].removeprefix("The ").rstrip(".").split(". ")
    prompt = " ".join("{}[{}]".format(*fact.split(" is ")) for fact in facts)
    return {"prompt": f"{prompt} =>", "completion": example["completion"]}


def sentiment(rng: Random, pairs: list, places: list) -> dict[str, str]:
    """A review of one to three opinions, all good or all bad, and the verdict."""
    side = rng.randrange(2)
    words = [pair[side] for pair in rng.sample(pairs, rng.randint(1, 3))]
    prompt = f"{Writer(rng).visit(rng.choice(places), words)} Question: How was it? Answer:"
    return {"prompt": prompt, "completion": [" good.", " bad."][side]}


def thumbs(example: dict[str, str]) -> dict[str, str]:
    """`sentiment` with answers whose bytes do not occur in the pretraining text."""
    return example | {"completion": {" good.": " 👍", " bad.": " 👎"}[example["completion"]]}


def write_task(folder: Path, parts: dict[str, list], how: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, examples in parts.items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    (folder / "task.json").write_text(json.dumps(how, indent=2) + "\n")


def build_tasks(folder: Path) -> None:
    """Write all tasks.

    Names and opinion words of validation and test occur in no training prompt, and these names
    nowhere in the pretraining text. The first edition published a test set of 200 examples. The
    sealed one, of 400, uses none of its names, and none of the validation examples'.
    """
    rng, sizes = Random(7), {"train": 400, "validation": 100, "published": 200}
    people, places, things = (rng.sample(x, len(x)) for x in (NEW_PEOPLE, NEW_PLACES, NEW_THINGS))
    names = {
        "train": (PEOPLE, PLACES, THINGS),
        "validation": (people[::2], places[::2], things[::2]),
        "published": (people[1::2], places[1::2], things[1::2]),
    }
    pairs = list(zip(GOOD_THINGS, BAD_THINGS, strict=True))  # two pairs in six are held out
    opinions = {
        "train": [pair for i, pair in enumerate(pairs) if i % 6 not in (1, 4)],
        "validation": pairs[1::6],
        "published": pairs[4::6],
    }
    facts = {p: [describe(rng, *names[p]) for _ in range(n)] for p, n in sizes.items()}
    reviews = {
        p: [sentiment(rng, opinions[p], names[p][1]) for _ in range(n)] for p, n in sizes.items()
    }
    known = json.dumps([(t["validation"], t.pop("published")) for t in (facts, reviews)])
    new = [[name for name in kind if name not in known] for kind in (people, places, things)]
    rng = Random(19)
    facts["test"] = [describe(rng, *new) for _ in range(400)]
    reviews["test"] = [sentiment(rng, opinions["published"], new[1]) for _ in range(400)]

    phrasings = {"phrasings": {key: phrases for key, (_, phrases) in SLOTS.items()}}
    write_task(folder / "describe", facts, {"fact": r"(\w+) is ([^.]+)\."} | phrasings)
    bare = {p: [bracketed(e) for e in examples] for p, examples in facts.items()}
    write_task(folder / "describe_brackets", bare, {"fact": r"(\w+)\[([^\]]+)\]"} | phrasings)
    write_task(folder / "sentiment", reviews, {})
    unseen = {p: [thumbs(e) for e in examples] for p, examples in reviews.items()}
    write_task(folder / "sentiment_unseen", unseen, {})


def build_bases(folder: Path, names: list[str]) -> None:
    from minipeft.gpt import GPTConfig
    from minipeft.lab.base import END
    from minipeft.lab.pretrain import SETTINGS, pretrain, pretraining_run, train_tokenizer

    rng, held_out = Random(0), Random(1)
    documents = [document(rng) for _ in range(DOCUMENTS)]
    text = f"\n{END}\n".join(document(held_out) for _ in range(300))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "held_out.txt").write_text(text + "\n")
    tokenizer = train_tokenizer(documents[:20_000], 2048)
    for name in names:
        width, layers, heads, deviation, learning_rate = BASES[name]
        size = {"n_embd": width, "n_layer": layers, "n_head": heads}
        settings = SETTINGS | {"initializer_range": deviation}
        config = GPTConfig(vocab_size=2048, n_positions=CONTEXT, **size, **settings)
        run = pretraining_run(STEPS, learning_rate)
        model, training, held_out_loss = pretrain(documents, config, tokenizer, run)
        shutil.rmtree(folder / name, ignore_errors=True)
        model.save_pretrained(folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"), pretty=False)
        loss = sum(training.losses[-100:]) / 100
        print(f"{name}: training loss {loss:.3f}, held-out loss {held_out_loss:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--bases", nargs="*", choices=BASES, default=list(BASES), help="which bases"
    )
    bases = parser.parse_args().bases
    build_tasks(HERE / "tasks")
    build_bases(HERE / "base", bases)
