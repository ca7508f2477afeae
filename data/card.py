"""The figures of the data card: what the bases learned from the text, and what they can do.

python -m data.card            # all three bases: results/bases.json and the tables, ten minutes
python -m data.card --samples  # ten documents, in a second
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np

from .build import BASES, DOCUMENTS, HERE
from .text import VALUES, Writer, document, up
from .words import NEW_DISHES, NEW_PEOPLE, NEW_PLACES, NEW_THINGS

RESULTS = HERE / "results" / "bases.json"
SAMPLES = [6, 54, 24, 13, 46, 27, 41, 38, 20, 34]  # seeds of the documents that the card shows
TASKS = ["describe", "describe_brackets", "sentiment", "sentiment_unseen"]
HELD_OUT = {"person": NEW_PEOPLE, "place": NEW_PLACES, "thing": NEW_THINGS, "dish": NEW_DISHES}


# --- what counting can predict ---


class NGram:
    """An n-gram model with back-off by absolute discounting (Ney, Essen and Kneser 1994).

    P(w | c) = max(N(c w) - d, 0) / N(c) + d T(c) / N(c) · P(w | c without its first token)

    T(c) is the number of different tokens seen after c; d = n₁ / (n₁ + 2 n₂) for each order, from
    the number of n-grams seen once and twice. Unigrams back off to 1 / vocabulary.
    """

    def __init__(self, stream: np.ndarray, vocabulary: int, order: int):
        self.vocabulary, self.tables = vocabulary, []
        for n in range(1, order + 1):
            keys, counts = np.unique(self.keys(stream, n), return_counts=True)
            once, twice = (counts == 1).sum(), (counts == 2).sum()
            contexts, first = np.unique(keys // vocabulary, return_index=True)
            self.tables.append(
                {
                    "d": once / (once + 2 * twice) if once else 0.5,
                    "keys": keys,
                    "counts": counts,
                    "contexts": contexts,
                    "seen": np.add.reduceat(counts, first),
                    "types": np.diff(np.append(first, len(keys))),
                }
            )

    def keys(self, stream: np.ndarray, n: int) -> np.ndarray:
        """Each run of n tokens as one number; n tokens of 2,048 take 11 n bits of 64."""
        length = stream.shape[-1] - n + 1
        return sum(
            stream[..., i : i + length].astype(np.int64) * self.vocabulary ** (n - 1 - i)
            for i in range(n)
        )

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        """P (b, t - 1) of every token of windows (b, t) except the first, given its past."""
        p = np.full((len(rows), rows.shape[1] - 1), 1 / self.vocabulary)
        for n, table in enumerate(self.tables, 1):
            runs = self.keys(rows, n)[:, 1 if n == 1 else 0 :]
            count = look_up(table["keys"], table["counts"], runs)
            seen = look_up(table["contexts"], table["seen"], runs // self.vocabulary)
            types = look_up(table["contexts"], table["types"], runs // self.vocabulary)
            lower = p[:, max(n - 2, 0) :]  # the first tokens of a window have a shorter past
            known = np.maximum(count - table["d"], 0) + table["d"] * types * lower
            lower[...] = np.where(seen > 0, known / np.maximum(seen, 1), lower)
        return p

    def loss(self, rows: np.ndarray) -> float:
        """Mean loss in nats per token on windows (b, t)."""
        return float(-np.log(self.probabilities(rows)).mean())


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


# --- what a base can do: a prompt, and what must follow ---


def copying(writer: Writer) -> tuple[str, str]:
    """A list of three names, read back as far as the first."""
    names = writer.some(writer.values["person"], 3)
    return f"The names: {', '.join(names)}. Again: {names[0]},", f" {names[1]},"


def second_mention(writer: Writer) -> tuple[str, str]:
    """A place named once, and again as far as its first word."""
    name, facts = writer.facts("place", 2)
    first, second = name.split()
    told = f"{writer.tell(name, facts[0])} Lunch at {first}"
    return told, f" {second} "


def about_one(writer: Writer, kind: str | None = None) -> tuple[str, str]:
    """Three facts of one place, and a question about one of them."""
    name, facts = writer.facts("place", 3, kind)
    told = " ".join(writer.tell(name, fact) for fact in facts)
    asked = writer.one(facts)
    question = f"Question: {writer.ask(name, asked)} Answer:"  # or it might answer "Of course, …"
    return f"{told} {question}", f" {up(asked.answer)}."


def about_one_of_a_kind(writer: Writer) -> tuple[str, str]:
    """The same where all three values are people, so only the relation tells: chance is 1/3."""
    return about_one(writer, "person")


def about_three(writer: Writer) -> tuple[str, str]:
    """Two facts of each of three places, and a question that names its place."""
    sheets = [writer.facts("place", 2) for _ in range(3)]
    told = " ".join(writer.tell(name, fact) for name, facts in sheets for fact in facts)
    name, facts = writer.one(sheets)
    asked = writer.one(facts)
    question = writer.one([q for q in asked.ask.split("|") if "{e}" in q]).format(e=name)
    return f"{told} {question}", f" {up(asked.answer)}."


PROBES = {  # the row of the card: whether names are held out, the prompt
    "reads a list of names back, names seen": (False, copying),
    "reads a list of names back, names held out": (True, copying),
    "second mention of a name, names held out": (True, second_mention),
    "answers about one place, values held out": (True, about_one),
    "the same, all values people (chance 1/3)": (True, about_one_of_a_kind),
    "answers about one of three places, values held out": (True, about_three),
}


def probe(model, tokenizer, ask: Callable, values: dict, n: int = 200) -> float:
    """The share of n prompts that the model continues, greedily, as it must."""
    from minipeft.lab import evaluate, tasks

    writer = Writer(Random(5), values)
    prompts, wanted = zip(*(ask(writer) for _ in range(n)), strict=True)
    ids, mask = tasks.pad_left([tokenizer.encode(prompt).ids for prompt in prompts], 0, "cpu")
    with evaluate.evaluating(model):
        out = model.generate(ids, mask, max_new_tokens=12)[:, ids.shape[1] :].tolist()
    told = [tokenizer.decode(row) for row in out]
    return sum(t.startswith(w) for t, w in zip(told, wanted, strict=True)) / n


# --- the card ---


def measure(names: list[str]) -> dict:
    """Figures of the bases, and of counting on the same text."""
    from minipeft.lab import compare, tasks
    from minipeft.lab.base import load_base
    from minipeft.lab.evaluate import text_loss
    from minipeft.lab.recipes import RECIPES, RunConfig

    base = load_base(HERE / "base" / names[0])
    rng = Random(0)
    documents = [document(rng) for _ in range(DOCUMENTS)]
    stream = [i for e in base.tokenizer.encode_batch(documents) for i in [*e.ids, base.end]]
    stream, rows = np.array(stream, dtype=np.int16), base.held_out.numpy()
    counting = {n: NGram(stream, 2048, n).loss(rows) for n in (1, 5)}
    result = {"tokens": len(stream), "unigram": counting[1], "5-gram": counting[5], "bases": {}}
    for name in names:
        base = load_base(HERE / "base" / name)
        model, known = base.model().eval(), {True: VALUES | HELD_OUT, False: VALUES}
        row = {"parameters": sum(p.numel() for p in model.parameters())}
        row["loss"] = text_loss(model, base.held_out)
        row["probes"] = {
            title: probe(model, base.tokenizer, ask, known[held_out])
            for title, (held_out, ask) in PROBES.items()
        }
        row["tasks"] = {}
        for task_name in TASKS:
            recipes = [RECIPES["frozen"], RECIPES["full"]]
            task, run = tasks.load_task(base, task_name), RunConfig(n_generate=100)
            task = replace(task, test=task.validation)  # the test examples stay sealed
            runs = compare.compare(base, task, recipes, run, 1)
            scores = {title: found[0].score for title, found in compare.rows(runs).items()}
            row["tasks"][task_name] = scores
        result["bases"][name] = row
    return result


def tables(result: dict) -> str:
    """The card's table of figures, in Markdown."""
    from minipeft.lab.report import markdown_table

    bases = result["bases"]
    lines = [["parameters", *(f"{row['parameters']:,}" for row in bases.values())]]
    loss = [f"{row['loss']:.3f}" for row in bases.values()]
    lines.append(["loss on held-out text, nats per token", *loss])
    for title in PROBES:
        lines.append([title, *(f"{row['probes'][title]:.3f}" for row in bases.values())])
    for task in TASKS:
        for title in ("frozen", "full", "full, random base"):
            scores = [f"{row['tasks'][task][title]:.3f}" for row in bases.values()]
            lines.append([f"`{task}`: {title}", *scores])
    return markdown_table(["", *bases], lines)


def counted(result: dict) -> str:
    return (
        "On the same held-out text, models that only count, on all "
        f"{result['tokens'] / 1e6:.1f}M tokens (the bases saw 9.8M of them), reach a loss of "
        f"{result['unigram']:.3f} (unigrams) and {result['5-gram']:.3f} (5-grams with back-off). "
        "<!-- claim: counting -->"
    )


def samples() -> str:
    return "\n\n".join(document(Random(seed)).replace("\n", "  \n") for seed in SAMPLES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--samples", action="store_true", help="print ten documents, and no figures"
    )
    if parser.parse_args().samples:
        print(samples())
    else:
        found = measure(list(BASES))
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{counted(found)}\n\n{tables(found)}")
