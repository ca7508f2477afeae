"""Make everything under data/ from nothing: the tokenizer, the base model, the tasks.

python data/build.py          # about ten minutes on two cores
python data/build.py --tasks  # the tasks alone, in a second
"""

import argparse
import json
import shutil
from pathlib import Path
from random import Random

from text import a, document, up
from words import NEW_PEOPLE, NEW_PLACES, NEW_THINGS, PEOPLE, PLACES, THINGS

HERE = Path(__file__).resolve().parent
DOCUMENTS, STEPS = 110_000, 3_200  # 3,200 steps of 16 windows of 128 tokens: 6.5M tokens
SHAPE = {"n_positions": 256, "n_embd": 128, "n_layer": 4, "n_head": 4, "initializer_range": 0.06}

# The task `describe`: each slot with the kind of its value and two ways to state it. Owner, cook
# and guest are all people, name and near places, lost and found things: only the key tells.
SLOTS = {
    "name": ("place", ["Come and see {v}", "This is the story of {v}"]),
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


def build_tasks(folder: Path) -> None:
    """Write the task's files. Names of validation and test stand in no training prompt, and nowhere
    in the pretraining text."""
    rng = Random(7)
    people, places, things = (rng.sample(x, len(x)) for x in (NEW_PEOPLE, NEW_PLACES, NEW_THINGS))
    parts = {
        "train": (400, PEOPLE, PLACES, THINGS),
        "validation": (100, people[::2], places[::2], things[::2]),
        "test": (200, people[1::2], places[1::2], things[1::2]),
    }
    folder = folder / "describe"
    folder.mkdir(parents=True, exist_ok=True)
    for part, (n, *names) in parts.items():
        lines = [json.dumps(describe(rng, *names)) + "\n" for _ in range(n)]
        (folder / f"{part}.jsonl").write_text("".join(lines))
    how = {"fact": r"(\w+) is ([^.]+)\.", "phrasings": {k: v for k, (_, v) in SLOTS.items()}}
    (folder / "task.json").write_text(json.dumps(how, indent=2) + "\n")


def build_base(folder: Path) -> None:
    from minipeft.gpt import GPTConfig
    from minipeft.lab import finetune, tasks

    rng = Random(0)
    documents = [document(rng) for _ in range(DOCUMENTS)]
    tokenizer = tasks.train_tokenizer(documents[:20_000], 2048)
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    end = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPTConfig(vocab_size=2048, **SHAPE, **dropout, **end)
    model, record = finetune.pretrain(documents, config, tokenizer, STEPS)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    held_out = Random(1)
    text = f"\n{tasks.END}\n".join(document(held_out) for _ in range(300))
    (folder / "held_out.txt").write_text(text + "\n")
    losses = record["losses"]
    print(f"training loss {sum(losses[-100:]) / 100:.3f}, held out {record['held_out_loss']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", action="store_true", help="only the tasks, not the base")
    only_tasks = parser.parse_args().tasks
    build_tasks(HERE / "tasks")
    if not only_tasks:
        build_base(HERE / "base" / "1m")
