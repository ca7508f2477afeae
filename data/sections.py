"""The shorter sections of RESULTS.md, one per experiment: a table, and what it shows in words.

A section is empty until all runs of its experiment exist.
"""

import statistics
import textwrap
from itertools import product

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from minipeft.lab import report

from .choosing import operating_point, operating_points, points
from .experiments import BY_STEPS, RANKS, RESULTS, STEPS, load, missing

drawing = False  # `python -m data.results` writes figures; a test only wants the text


def complete(name: str) -> list[dict]:
    """The rows of an experiment; none as long as runs are missing."""
    return [] if missing(name) else load(name)


def fill(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def with_interval(values: list[float], form: str = "+.2f") -> str:
    """A mean with its 95 % t interval."""
    mean, half = statistics.mean(values), report.interval(values)
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


def paired(rows: list[dict], others: list[dict], key: str) -> list[float]:
    """Differences of a value, seed by seed."""
    other = {row["seed"]: row[key] for row in others if key in row}
    return [row[key] - other[row["seed"]] for row in rows if key in row and row["seed"] in other]


def at(rows: list[dict], point: dict) -> list[dict]:
    """The runs with a point's settings."""
    return where(rows, **{name: point[name] for name in ("method", "learning_rate", "decay")})


def save(name: str, figure: Figure) -> None:
    if drawing:
        report.save_figure(figure, RESULTS / f"{name}.png", dpi=80)


def where(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


AXES = {
    "score": "score", "loss": "loss (nats per token)", "forgetting": "forgetting (nats per token)"
}  # fmt: skip
TICKS = [1e-5, 1e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]


def runs_figure(groups: dict[str, list[dict]], height: float = 0.3, left: str = "score") -> Figure:
    """Score (or loss) and forgetting of every run, a line per group; the black mark is the mean."""
    figure, axes = report.panels(10, 1 + height * len(groups), 1, 2)
    for axis, key in zip(axes, (left, "forgetting"), strict=True):
        for i, rows in enumerate(groups.values()):
            values = [row[key] for row in rows if key in row]
            color = report.COLORS[rows[0]["method"].split(",")[0]]
            axis.plot(values, [i] * len(values), "o", color=color, alpha=0.5)
            axis.plot(statistics.mean(values), i, "k|", ms=14, mew=2)
        axis.set(xlabel=AXES[key], yticks=range(len(groups)), yticklabels=groups)
        axis.invert_yaxis()
        shown = [row[key] for rows in groups.values() for row in rows if key in row]
        if key != "score" and 0 < min(shown) < max(shown) / 3:
            axis.set(xscale="log", xlabel=f"{AXES[key][:-1]}; logarithmic)")
            axis.xaxis.set_major_locator(FixedLocator(TICKS))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
    axes[1].set_yticklabels([])
    return figure


BASES = {
    "lora": "float32", "qlora": "NF4 (QLoRA)", "lora, int3 base": "int3", "lora, int2 base": "int2",
}  # fmt: skip


def bits() -> str:
    """QLoRA and LoRA on rounded bases, minus LoRA, paired by seed."""
    rows = complete("bits")
    if not rows:
        return ""
    lines, groups = [], {}
    for decay, (method, name) in product((0.0, 0.04), BASES.items()):
        mine, plain = (where(rows, decay=decay, method=m) for m in (method, "lora"))
        groups[f"{name}, ηλ = {decay:g}"] = mine
        means = {k: statistics.mean(r[k] for r in mine) for k in ("score", "forgetting")}
        start = statistics.mean(row["forgetting_at_start"] for row in mine)
        gaps = [
            "–" if method == "lora" else with_interval(paired(mine, plain, key))
            for key in ("score", "forgetting")
        ]
        lines.append([
            name, f"{decay:g}", f"{means['score']:.3f}", gaps[0], f"{start:+.2f}",
            f"{means['forgetting']:+.2f}", gaps[1],
        ])  # fmt: skip
    head = ["base", "ηλ", "score", "minus float32, paired", "forgetting at step 0", "forgetting",
            "minus float32, paired"]  # fmt: skip
    save("few-bits", runs_figure(groups))
    return f"""
## How few bits?

LoRA of rank 8 on the 1M base, whose linear weights are rounded before: to NF4 with double
quantization, or to 3 or 2 bits (whole numbers, one scale per 64 weights). All at η = 0.01, ten
seeds, validation examples.

![Score and forgetting of every run](results/few-bits.png)

{report.markdown_table(head, lines)}

With 4 bits, LoRA forgets hardly more than on the float32 base, and scores at most a little less.
With 3 bits we see no difference in the score, but more forgetting. With 2 bits the base itself is
damaged, by almost 4 nats, and LoRA still learns most of the task on it.
<!-- claim: few-bits -->
"""


def ranks() -> str:
    """LoRA by rank and scaling, each at the best of three rates."""
    rows = complete("ranks")
    if not rows:
        return ""
    found, lines, groups = points(rows), [], {}
    for r, (how, name) in product(
        RANKS, (("", "α = 2 r"), (", α 16", "α = 16"), (", rsLoRA", "rsLoRA, α = 16"))
    ):
        mine = where(found, method=f"lora, r {r}{how}")
        best = operating_point(mine)
        tried = sorted(point["learning_rate"] for point in mine)
        groups[f"rank {r}, {name}"] = at(rows, best)
        edge = "*" * (best["learning_rate"] in (tried[0], tried[-1]))
        scaling = {"": 2.0, ", α 16": 16 / r}.get(how, 16 / r**0.5)
        lines.append([
            r, name, f"{scaling:g}", f"{best['learning_rate']:g}{edge}",
            f"{best['score']:.3f} ± {best['score_spread']:.3f}", f"{best['forgetting']:+.2f}",
            f"{best['intruders']:.0f}",
        ])  # fmt: skip
    save("ranks-scaling", runs_figure(groups))
    head = ["rank", "scaling", "s", "η", "score", "forgetting", "intruders"]
    return f"""
## Rank and scaling

LoRA of four ranks on the 1M base, with three ways to choose its scaling s: α / r with α = 2 r,
which is 2 for every rank; α / r with α = 16; and rsLoRA's α / √r
([arXiv 2312.03732](https://arxiv.org/abs/2312.03732)) with α = 16. No weight decay, the rates
0.005, 0.01 and 0.02, three seeds, validation examples. A star marks the smallest or largest rate.

![Score and forgetting of every run](results/ranks-scaling.png)

{report.markdown_table(head, lines)}

Rank 1 scores less than the others with every scaling. Between ranks 16 and 64 we see no difference
in the score. (Rows with equal rank and s are the same runs.) The table does not rank the three
scalings: many of the best rates are at the edge of a short list, and a larger s acts much like a
higher rate.
<!-- claim: ranks-scaling -->
"""


PLACES = {"lora": "all linear", "lora, attention": "attention", "lora, mlp": "MLP"}


def placement() -> str:
    """LoRA on some of the layers, with equal numbers of parameters."""
    tasks = {"describe": complete("placement"), "sentiment": complete("placement-sentiment")}
    if not all(tasks.values()):
        return ""
    lines, groups = [], {}
    for (task, rows), (method, name) in product(tasks.items(), PLACES.items()):
        mine = where(points(rows), method=method)
        best = operating_point(mine)
        tried = sorted(point["learning_rate"] for point in mine)
        edge = "*" * (best["learning_rate"] in (tried[0], tried[-1]))
        groups[f"{task}, {name}"] = at(rows, best)
        lines.append([
            task, name, f"{best['learning_rate']:g}{edge}",
            f"{best['score']:.3f} ± {best['score_spread']:.3f}", f"{best['loss']:.3f}",
            f"{best['forgetting']:+.2f}",
        ])  # fmt: skip
    save("placement", runs_figure(groups))
    head = ["task", "layers", "η", "score", "loss", "forgetting"]
    return f"""
## On which layers?

LoRA on the 1M base, on all linear layers with rank 8, or on some of them with a higher rank, so
that the numbers of trained parameters are equal. No weight decay, three rates for each, three
seeds, validation examples. A star marks the smallest or largest rate.

![Score and forgetting of every run](results/placement.png)

{report.markdown_table(head, lines)}

{fill(what_placement_does(tasks["describe"]))}
<!-- claim: placement-rates -->
"""


def best_places(rows: list[dict]) -> dict[str, dict]:
    """The operating point of each place."""
    return {m: operating_point(where(points(rows), method=m)) for m in PLACES}


def what_placement_does(rows: list[dict]) -> str:
    best = best_places(rows)
    runs = {method: at(rows, point) for method, point in best.items()}
    attention = paired(runs["lora, attention"], runs["lora"], "score")
    mlp = paired(runs["lora, mlp"], runs["lora, attention"], "score")
    return (
        "On `describe` we see no difference in the score between attention alone and all layers: "
        f"{with_interval(attention)}, paired by seed. The MLPs alone score less than attention in "
        "all nine pairs of runs with equal rate and seed; at the best rates the difference is "
        f"{with_interval(mlp)}, a wide interval. Perhaps that is because the task copies names "
        "from the prompt, which only attention can do. On `sentiment` all score the same. (On "
        "large models, Biderman et al., arXiv 2405.09673, find all layers best, then the MLPs, "
        "then attention.)"
    )


PROMPTS = {
    "prompt_tuning": "prompt tuning, random start", "prompt_tuning, vocabulary": "… words",
    "p_tuning": "P-tuning, MLP", "p_tuning, LSTM": "… LSTM",
    "prefix_tuning": "prefix tuning, random start", "prefix_tuning, real text": "… real text",
}  # fmt: skip


def starred(point: dict, name: str, found: list[dict]) -> str:
    """A setting, with a star if it is the smallest or largest of its method. Zero gets none."""
    tried = [p[name] for p in found if p["method"] == point["method"]]
    is_edge = point[name] and point[name] in (min(tried), max(tried))
    return f"{point[name]:g}" + "*" * bool(is_edge)


def prompts() -> str:
    """The prompt methods with 300 steps, each with two starts."""
    rows, finals = complete("prompts"), complete("finals-prompts")
    if not rows or not finals:
        return ""
    found, lines, groups = points(rows), [], {}
    for method, name in PROMPTS.items():
        best = operating_point(where(found, method=method))
        test = at(finals, best)
        groups[name] = test
        start = statistics.mean(row["forgetting_at_start"] for row in test)
        lines.append([
            name, starred(best, "learning_rate", found),
            f"{best['score']:.3f} ± {best['score_spread']:.3f}",
            with_interval([row["score"] for row in test], ".2f"), f"{start:+.2f}",
            with_interval([row["forgetting"] for row in test]),
        ])  # fmt: skip
    save("prompts", runs_figure(groups, 0.4))
    head = ["method", "η", "validation score", "test score", "forgetting at step 0", "forgetting"]
    return f"""
## Prompt methods

The methods that train virtual tokens, on the 1M base and `describe`, with 300 steps instead of 100.
Each has two starts: random vectors, or real words for prompt tuning and the keys and values of a
training example for prefix tuning. P-tuning computes its virtual tokens with a network, an MLP or
an LSTM. Five or six rates with three seeds, no weight decay; then the operating points with five
new seeds on the test examples, with 95 % t intervals. The figure shows these runs. A star marks
the smallest or largest rate.

![Test score and forgetting of every run](results/prompts.png)

{report.markdown_table(head, lines)}

{fill(what_prompts_do(found, finals))}
<!-- claim: prompt-methods -->
"""


def best_prompts(found: list[dict], finals: list[dict]) -> dict[str, list[dict]]:
    """Each prompt method's runs on the test examples."""
    return {m: at(finals, operating_point(where(found, method=m))) for m in PROMPTS}


def what_prompts_do(found: list[dict], finals: list[dict]) -> str:
    runs = best_prompts(found, finals)
    prefix, text = runs["prefix_tuning"], runs["prefix_tuning, real text"]
    most = max(statistics.mean(r["score"] for r in runs[m]) for m in PROMPTS if "prefix" not in m)
    return (
        "Prefix tuning learns most of the task. Prompt tuning and P-tuning do not learn it in 300 "
        f"steps: with either start, their mean test scores are at most {most:.2f}. A prefix that "
        "starts from real text, minus one with a random start, paired by seed: score "
        f"{with_interval(paired(text, prefix, 'score'))}, forgetting "
        f"{with_interval(paired(text, prefix, 'forgetting'))}. All of them forget more than two "
        "nats. A part of this is there before training, as the table shows: virtual tokens that "
        "the base has never seen disturb it. (They all can be taken away, and then the base is "
        "back.) On a large frozen T5, prompt tuning comes close to full fine-tuning "
        "([arXiv 2104.08691](https://arxiv.org/abs/2104.08691)), and the gap grows as models get "
        "smaller: our base is far below the smallest of that paper."
    )


def two_points(rows: list[dict]) -> dict[str, tuple[dict, dict]]:
    """Each weight method's operating point without decay, and with any decay."""
    found = points(rows)
    pairs = zip(operating_points(found, False), operating_points(found, True), strict=True)
    pairs = {pair[0]["method"]: pair for pair in pairs}
    known = list(report.COLORS)
    order = sorted(pairs, key=lambda method: (known.index(method.split(",")[0]), method))
    return {method: pairs[method] for method in order}


def compared(
    rows: list[dict], finals: list[dict], extra: str, form: str = "+.2f"
) -> tuple[str, dict[str, list]]:
    """A table of the operating points in the final runs, and these runs under their names.

    extra: the value in the last column. form: how forgetting is written.
    """
    found, pairs, lines, groups = points(rows), two_points(rows), [], {}
    for method, pair in pairs.items():
        for i, (name, point) in enumerate(
            zip((report.name_of(method), "… any decay"), pair, strict=True)
        ):
            test, full = at(finals, point), at(finals, pairs["full"][i])
            groups[report.name_of(method) + ", decay" * i] = test
            gap = paired(test, full, "forgetting")
            last = [row[extra] for row in test]
            lines.append([
                name, *(starred(point, n, found) for n in ("learning_rate", "decay")),
                with_interval([row["score"] for row in test], ".3f"),
                with_interval([row["forgetting"] for row in test], form),
                "–" if method == "full" else with_interval(gap, form),
                with_interval(last, ".4f") if extra == "loss" else f"{statistics.mean(last):.0f}",
            ])  # fmt: skip
    head = ["method", "η", "ηλ", "test score", "forgetting", "minus full, paired", extra]
    return report.markdown_table(head, lines), groups


def sentiment() -> str:
    """The second task, on test examples: by loss, as scores are level."""
    rows, finals = complete("sentiment"), complete("finals-sentiment")
    if not rows or not finals:
        return ""
    table, groups = compared(rows, finals, "loss", "+.3f")
    save("sentiment", runs_figure(groups, left="loss"))
    return f"""
## The second task

`sentiment` on the 1M base, 100 steps. For each method five rates and the decays 0, 0.02 and 0.04,
three seeds, validation examples; then the operating points with five new seeds on the test
examples, with 95 % t intervals. A star marks the smallest or largest value that was tried.

![Test loss and forgetting of every run](results/sentiment.png)

{table}

{fill(what_sentiment_shows(rows, finals))}
<!-- claim: sentiment-level -->
"""


def what_sentiment_shows(rows: list[dict], finals: list[dict]) -> str:
    pairs = two_points(rows)
    runs = {m: [at(finals, point) for point in pair] for m, pair in pairs.items()}
    lowest = min(row["score"] for pair in runs.values() for mine in pair for row in mine)
    plain, decayed = (
        max(statistics.mean(r["forgetting"] for r in pair[i]) for pair in runs.values())
        for i in range(2)
    )
    gap = paired(runs["lora"][1], runs["full"][1], "forgetting")
    return (
        f"Every run scores at least {lowest:.3f}, so the score cannot rank the methods. At these "
        "points they forget hardly anything: on average "
        f"at most {plain:.2f} nats without decay and {decayed:.2f} with it. LoRA minus full "
        f"fine-tuning, with decay and paired by seed: {with_interval(gap, '+.3f')}. (The stars say "
        "that lower rates may forget still less. For hundredths of a nat we did not extend the "
        "grid.) So this task needs a small change only, and does not separate the methods."
    )


def larger_base() -> str:
    """The 3M base, around the rates of the 1M base."""
    rows, finals = complete("3m"), complete("finals-3m")
    if not rows or not finals:
        return ""
    table, groups = compared(rows, finals, "intruders")
    save("3m", runs_figure(groups))
    return f"""
## A larger base

The 3M base on `describe`, 100 steps. For each method three rates around the best one of the 1M
base, the decays 0 and 0.04, two seeds, validation examples; then the operating points with five new
seeds on the test examples, with 95 % t intervals. A star marks the smallest or largest value that
was tried. There are many, as few values were tried.

![Test score and forgetting of every run](results/3m.png)

{table}

{fill(what_the_larger_base_shows(rows, finals))}
<!-- claim: larger-base -->
"""


def what_the_larger_base_shows(rows: list[dict], finals: list[dict]) -> str:
    runs = {m: [at(finals, p) for p in pair] for m, pair in two_points(rows).items()}
    gaps = [
        with_interval(paired(lora, full, "forgetting"))
        for lora, full in zip(runs["lora"], runs["full"], strict=True)
    ]
    change = min(statistics.mean(paired(pair[1], pair[0], "score")) for pair in runs.values())
    return (
        "What was found on the 1M base is seen here too. With decay every method forgets less, and "
        f"no mean score falls by more than {-change:.2f}. LoRA forgets more than full fine-tuning "
        f"without decay ({gaps[0]}, paired by seed) and with it ({gaps[1]})."
    )


def best_by_steps(rows: list[dict]) -> dict[tuple[str, bool, int], list[dict]]:
    """The runs at the better of two rates, by method, random base, and number of steps."""
    best = {}
    for method, random, steps in product(BY_STEPS, (False, True), STEPS):
        mine = where(rows, method=method, random_base=random, steps=steps)
        point = max(points(mine), key=lambda point: (point["score"], -point["loss"]))
        best[method, random, steps] = at(mine, point)
    return best


def steps_figure(best: dict) -> Figure:
    """Score and forgetting by steps; the random base's score is dashed."""
    figure, axes = report.panels(10, 3.2, 1, 2)
    for axis, key in zip(axes, ("score", "forgetting"), strict=True):
        for method, random in product(BY_STEPS, (False, True)):
            if key == "forgetting" and random:
                continue
            runs = [[row[key] for row in best[method, random, steps]] for steps in STEPS]
            color, style = report.COLORS[method], "--" if random else "o-"
            axis.plot(STEPS, [statistics.mean(values) for values in runs], style, color=color,
                      label="_" if random else report.name_of(method))  # fmt: skip
            for steps, values in zip(STEPS, runs, strict=True):
                axis.plot([steps] * len(values), values, ".", color=color, alpha=0.5)
        axis.set(xscale="log", xlabel="training steps", ylabel=key, xticks=STEPS)
        axis.set_xticklabels([f"{steps:,}" for steps in STEPS])
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0].plot([], [], "k--", label="on a random base")
    axes[0].legend(frameon=False)
    return figure


def longer() -> str:
    """By number of steps, with a random base as the control."""
    rows, long = complete("steps"), complete("3000-steps")
    if not rows or not long:
        return ""
    best, lines = best_by_steps(rows), []
    save("steps", steps_figure(best))
    for method, random in product(BY_STEPS, (False, True)):
        runs = [best[method, random, steps] for steps in STEPS]
        lines.append([
            report.name_of(method) + ", random base" * random,
            *(f"{statistics.mean(r['score'] for r in found):.2f}" for found in runs),
            *("–" if random else f"{statistics.mean(r['forgetting'] for r in found):+.2f}"
              for found in runs),
        ])  # fmt: skip
    head = [
        "method",
        *(f"score, {n:,} steps" for n in STEPS),
        *(f"forgetting, {n:,}" for n in STEPS),
    ]
    return f"""
## More steps, and a random base

The 0.3M base on `describe`, and as a control a model of the same shape that was never pretrained.
Two learning rates per method, the best one at 100 steps and a quarter of it; the table has the
better one for each number of steps. No weight decay, three seeds, validation examples.

![Score and forgetting by the number of steps](results/steps.png)

{report.markdown_table(head, lines)}

{fill(what_more_steps_do(best, long))}
<!-- claim: more-steps -->
"""


def what_more_steps_do(best: dict, long: list[dict]) -> str:
    last = STEPS[-1]
    highest = max(row["score"] for (_, random, _), runs in best.items() if random for row in runs)
    full, lora = (
        statistics.mean(r["score"] for r in best[m, False, last]) for m in ("full", "lora")
    )
    ends = ", ".join(
        f"{report.name_of(m)} {max(row['score'] for row in where(long, method=m)):.2f}"
        for m in BY_STEPS
    )
    return (
        f"No run on a random base scores more than {highest:.2f}, so the task needs what was "
        f"pretrained, also with {last:,} steps. With that many, LoRA scores {lora:.2f} and full "
        f"fine-tuning {full:.2f}. On the 1M base with 3,000 steps (one seed, the better of two "
        f"rates) the scores are: {ends}."
    )


def all_sections() -> str:
    parts = (prompts, sentiment, larger_base, bits, ranks, placement, longer)
    return "".join(part() for part in parts)
