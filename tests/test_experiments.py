"""The experiments in data/: how settings are chosen, what is measured, and the page of results."""

import statistics
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import tiny_config

from minipeft import GPT, LoraConfig, PrefixTuningConfig, get_peft_model
from minipeft.data import (
    choosing,
    claims,
    experiments,
    real,
    results,
    sections,
    tournament,
    transfer,
)
from minipeft.data.choosing import edges, operating_points
from minipeft.data.experiments import Grid, Setting
from minipeft.data.sections import paired, with_interval
from minipeft.lab.tasks import Example

CLAIMS = {claim["id"]: claim for claim in claims.load()}


def row(rate, decay, score, forgetting, loss=0.1, method="lora", seed=0, **more) -> dict:
    return {
        "method": method, "learning_rate": rate, "decay": decay, "seed": seed, "score": score,
        "forgetting": forgetting, "loss": loss, "update_norm": 1.0, "intruders": 0,
    } | more  # fmt: skip


# --- choosing ---


def test_points_are_means_over_seeds_and_leave_out_what_diverged():
    rows = [row(0.1, 0, 0.8, 1.0, seed=1), row(0.1, 0, 0.9, 2.0, seed=2), row(0.2, 0, 1, 9)]
    diverged = {k: v for k, v in row(0.2, 0, 0, 0, seed=2).items() if k != "score"}
    (point,) = choosing.points([*rows, diverged])
    assert point["score"] == pytest.approx(0.85)
    assert point["forgetting"] == 1.5
    assert point["score_spread"] == pytest.approx(0.0707, abs=1e-4)
    assert point["seeds"] == 2


@pytest.mark.parametrize(
    ("candidates", "best"),
    [  # score, forgetting, loss
        ([(0.98, 2.0, 0.1), (0.961, 0.5, 0.2), (0.95, 0.1, 0.3)], 1),  # 0.95 scores too little
        ([(0.98, 0.500, 0.2), (0.97, 0.504, 0.1)], 1),  # equal forgetting: the lower loss
        ([(0.98, 0.50, 0.2), (0.97, 0.52, 0.1)], 0),
    ],
)
def test_the_operating_point_forgets_least_among_the_nearly_best(candidates, best):
    rows = [row(2.0**i, 0, *values) for i, values in enumerate(candidates)]
    assert choosing.operating_point(rows)["learning_rate"] == 2.0**best


def test_edges_are_named_with_the_value_to_try_next():
    rows = [row(r, d, 0.5, 1.0) for r in (0.1, 0.2, 0.4) for d in (0.0, 0.01)]
    assert choosing.edges(row(0.2, 0.0, 0.9, 1.0), rows) == {}, "no decay is no edge"
    assert choosing.edges(row(0.1, 0.0, 0.9, 1.0), rows) == {"learning_rate": 0.05}
    assert choosing.edges(row(0.4, 0.01, 0.9, 1), rows) == {"learning_rate": 0.8, "decay": 0.02}


def test_points_with_equal_forgetting_are_tied():
    rows = [row(0.1, 0, 0.9, 0.101), row(0.2, 0, 0.9, 0.104), row(0.4, 0, 0.9, 0.2)]
    assert [p["learning_rate"] for p in choosing.tied(rows)] == [0.1, 0.2]


def test_what_is_missing_is_what_no_row_has(monkeypatch):
    grid, done = Grid({"lora": (0.1, 0.2, 0.4)}, (0.0,), (1,)), []
    monkeypatch.setitem(experiments.EXPERIMENTS, "toy", grid)
    monkeypatch.setattr(experiments, "load", lambda name: done)
    assert experiments.missing("toy") == grid.settings()
    done += [row(s.learning_rate, 0.0, s.learning_rate, 1.0, seed=1) for s in grid.settings()[:2]]
    assert experiments.missing("toy") == [Setting("lora", 0.4, 0.0, 1)]


def test_grids_of_one_experiment_may_overlap():
    one, two = Grid({"lora": (0.1, 0.2)}, (0.0,), (1,)), Grid({"lora": (0.2, 0.4)}, (0.0,), (1,))
    assert [s.learning_rate for s in experiments.Several((one, two)).settings()] == [0.1, 0.2, 0.4]


def test_chosen_settings_are_the_operating_points_once_all_their_runs_exist(monkeypatch):
    grid, rows = Grid({"lora": (0.1, 0.2, 0.4)}, (0.0, 0.01, 0.02), (1,)), []
    monkeypatch.setitem(experiments.EXPERIMENTS, "toy", grid)
    monkeypatch.setattr(experiments, "load", lambda name: rows)
    chosen = experiments.Chosen("toy", (5, 6), {"part": "test"})
    assert chosen.settings() == [], "runs of the toy experiment are missing"
    for s in grid.settings():
        middle = s.learning_rate == 0.2
        rows.append(row(s.learning_rate, s.decay, 0.9 if middle else 0.5, 1 - s.decay, seed=1))
    rows[5]["score"] = 0.5  # decay 0.02 is worse: 0.01 forgets least
    wanted = [
        Setting("lora", 0.2, decay, seed, part="test") for decay in (0, 0.01) for seed in (5, 6)
    ]
    assert chosen.settings() == wanted


def test_a_prediction_interval_is_wider_than_the_values_spread():
    low, high = choosing.prediction_interval([1.0, 2.0, 3.0])  # t for 2 degrees of freedom: 4.30
    assert [low, high] == pytest.approx([2 - 4.30 * (4 / 3) ** 0.5, 2 + 4.30 * (4 / 3) ** 0.5])


def test_a_repeated_run_is_compared_with_its_row_or_with_other_seeds(monkeypatch):
    rows = [row(0.1, 0.0, score, 1.0, seed=s) for s, score in ((1, 0.8), (2, 0.9))]
    monkeypatch.setattr(experiments, "load", lambda name: rows)
    monkeypatch.setattr(experiments, "measure", lambda s: row(0.1, 0.0, 0.5, 1.0, seed=s.seed))
    (setting, key, expected, value), *_ = experiments.repeat("toy", 1, None)
    assert (key, float(expected), value) == ("score", {1: 0.8, 2: 0.9}[setting.seed], 0.5)
    _, _, expected, value = next(experiments.repeat("toy", 1, 7))
    assert expected == "-0.251 to 1.951"  # 0.85 ± 12.71 · 0.0707 · √1.5


# --- measuring ---


def test_intruders_are_large_new_directions():
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(40, 40))[0] for _ in range(2))
    before = u * torch.linspace(5, 1, 40) @ v.T
    assert not experiments.intruders(before, before).any()
    turned = before @ torch.linalg.qr(torch.randn(40, 40))[0]  # the left singular vectors stay
    assert not experiments.intruders(before, turned).any()
    assert not experiments.intruders(before, -turned).any(), "the sign of a vector is arbitrary"
    new = u.sum(1, keepdim=True) @ v.sum(1, keepdim=True).T / 40  # a bit of all directions
    found = experiments.intruders(before, before + 20 * new)
    assert found.tolist() == [True] + [False] * 9


def test_intruders_or_as_many_others_are_scaled_down(base):
    model = base.model()
    layer = model.get_submodule("transformer.h.0.attn.c_proj")
    u, _, vh = torch.linalg.svd(layer.weight.detach())
    strange = 9 * torch.outer(u.sum(1), vh.sum(0)) / len(u)  # a bit of all directions
    layer.weight.data += strange
    assert experiments.changes(base.pretrained, model)["intruders"] == 1
    calm = experiments.scaled(base, model, "intruders", 0.0)
    assert experiments.changes(base.pretrained, calm)["intruders"] == 0
    other = experiments.scaled(base, model, "others", 0.0)
    assert experiments.changes(base.pretrained, other)["intruders"] == 1, "it must stay"
    for changed in (calm, other):
        difference = changed.get_submodule("transformer.h.0.attn.c_proj").weight - layer.weight
        assert torch.linalg.matrix_rank(difference, atol=1e-3) == 1
        for name in ("transformer.h.1.attn.c_proj", "transformer.h.0.mlp.c_fc"):
            kept = changed.get_submodule(name).weight, model.get_submodule(name).weight
            assert torch.allclose(*kept, atol=1e-5), "layers without intruders stay as they are"


def test_changes_count_the_linear_layers_and_nothing_else():
    torch.manual_seed(0)
    base, model = GPT(tiny_config()), GPT(tiny_config())
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        model.transformer.wte.weight += 1
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 3.0
        model.transformer.h[1].attn.c_proj.weight[0, 0] += 4.0
    assert experiments.changes(base, model)["update_norm"] == pytest.approx(5, rel=1e-5)
    adapted = get_peft_model(GPT(tiny_config()), LoraConfig(target_modules=["c_fc"]))
    adapted.base_model.load_state_dict(base.state_dict(), strict=False)
    for name, layer in adapted.adapters["default"].layers.items():
        layer.base_layer.load_state_dict(base.get_submodule(name).state_dict())
        layer.lora_B.weight.data.fill_(0.1)
    found = experiments.changes(base, adapted)["update_norm"]
    norms = [
        (0.1 * layer.scaling * layer.lora_A.weight.sum(0)).norm() * layer.out_features**0.5
        for layer in adapted.adapters["default"].layers.values()
    ]
    assert found == pytest.approx(torch.stack(norms).norm().item(), rel=1e-4)


def test_a_prefix_of_real_text_does_what_the_text_does(base):
    model = get_peft_model(base.model(), PrefixTuningConfig(num_virtual_tokens=5))
    text, rest = [17, 300, 41, 99, 7], torch.tensor([[55, 1200, 8]])
    example = Example("", "", text[:3], [*text[3:], 0], [])
    experiments.start_from_text(model, base, example)
    whole = base.pretrained(torch.cat((torch.tensor([text]), rest), dim=1)).logits[:, 5:]
    assert torch.allclose(model(rest).logits, whole, atol=1e-4)


def test_one_run_is_measured_against_the_untouched_base(monkeypatch, base):
    few = replace(base, held_out=base.held_out[:2])
    monkeypatch.setattr(experiments, "opened", lambda *_: (few, 1.0))
    task = experiments.tasks.load_task(few, "sentiment")
    task = replace(task, train=task.train[:16], validation=task.validation[:3])
    monkeypatch.setattr(experiments.tasks, "load_task", lambda *_: task)
    settings, train = [], experiments.train
    monkeypatch.setattr(
        experiments,
        "train",
        lambda m, b, run, *o, **g: settings.append(run) or train(m, b, run, *o, **g),
    )
    found = experiments.measure(Setting("lora", 0.01, 0.02, 100, task="sentiment", steps=1))
    (run,) = settings
    assert run.weight_decay * run.learning_rate == pytest.approx(0.02), "the product is the setting"
    assert run.decay_to == "start"
    assert found["seed"] == run.seed == 100
    assert found["forgetting_at_start"] > -1
    assert {"loss", "score", "forgetting", "update_norm", "intruders"} <= found.keys()


def test_every_method_of_the_experiments_builds_a_model(base):
    methods = {s.method for grid in experiments.EXPERIMENTS.values() for s in grid.settings()}
    for method in methods:
        run = experiments.RunConfig(steps=12, learning_rate=0.1)
        model = experiments.build_model(base, experiments.METHODS[method], run)
        assert any(p.requires_grad for p in model.parameters()), method


def test_a_base_in_few_bits_keeps_its_embeddings_and_has_few_levels(base):
    rounded = experiments.in_few_bits(base.pretrained, "int2")
    ours, theirs = rounded.transformer.h[0].mlp.c_fc.weight, base.pretrained.transformer
    assert len((ours.view(-1)[:64] / ours.view(-1)[:64].abs().max()).round().unique()) <= 3
    assert not torch.equal(ours, theirs.h[0].mlp.c_fc.weight)
    assert torch.equal(rounded.transformer.wte.weight, theirs.wte.weight)


def test_a_run_that_diverges_has_no_measurements(monkeypatch, base):
    monkeypatch.setattr(experiments, "opened", lambda *_: (base, 1.0))

    def fail(*_, **__):
        raise FloatingPointError("the loss is nan at step 3")

    monkeypatch.setattr(experiments, "train", fail)
    found = experiments.measure(Setting("lora", 0.01, 0.02, 100))
    assert "score" not in found
    assert found["method"] == "lora"


# --- what is committed ---


@pytest.mark.parametrize("name", [n for n in experiments.EXPERIMENTS if experiments.load(n)])
def test_no_run_is_there_twice_and_each_belongs_to_its_experiment(name):
    rows = experiments.load(name)
    settings = [experiments.setting_of(r) for r in rows]
    assert len(set(settings)) == len(settings)
    seeds = {setting.seed for setting in experiments.EXPERIMENTS[name].settings()}
    for setting in settings:
        assert setting.method in experiments.METHODS
        assert setting.seed in seeds
        assert (setting.part == "test") == name.startswith("finals"), "test examples are sealed"


def test_weight_decay_at_least_halves_forgetting_at_equal_score():
    found = choosing.points(experiments.load("forgetting"))
    pairs = {m: pair for m, pair in choosing.equal_score(found, 0.9).items() if all(pair)}
    assert {"full", "lora", "qlora", "adalora"} <= pairs.keys()
    assert all(plain["forgetting"] > 2 * any_["forgetting"] for plain, any_ in pairs.values())
    for score in results.SCORES:
        best = choosing.equal_score(found, score)
        for method in ("lora", "qlora"):
            plain, decayed = (
                other["forgetting"] / full["forgetting"]
                for other, full in zip(best[method], best["full"], strict=True)
            )
            assert 1 < decayed < plain, f"{method} at {score}"


def test_in_the_finals_weight_decay_leaves_little_of_the_differences_in_forgetting():
    found = choosing.points(experiments.load("forgetting"))
    at = choosing.equal_score(found, 0.9)
    gaps = {
        (method, i): sections.paired(
            *(results.finals_of(at[m][i]) for m in (method, "full")), "forgetting"
        )
        for method in ("lora", "adalora", "adalora, no penalty")
        for i in range(2)
    }
    assert {len(values) for values in gaps.values()} == {10}
    scores = {m: statistics.mean(r["score"] for r in results.finals_of(pair[1]))
              for m, pair in at.items() if pair[1]}  # fmt: skip
    full = results.best_of_full()  # the page says that it scores more, and forgets less:
    assert full["score"] > max(scores.values())
    assert full["forgetting"] < min(
        statistics.mean(r["forgetting"] for r in results.finals_of(at[m][1]))
        for m in ("lora", "adalora", "adalora, no penalty", "qlora", "bottleneck")
    )
    low = {key: statistics.mean(g) - results.report.interval(g) for key, g in gaps.items()}
    high = {key: statistics.mean(g) + results.report.interval(g) for key, g in gaps.items()}
    assert low["lora", 0] > 1
    assert high["adalora", 0] < 0, "with its penalty it forgets less, as long as others have none"
    for method in ("lora", "adalora", "adalora, no penalty"):
        assert 0 < low[method, 1] < high[method, 1] <= 0.1


def test_halving_intruders_lowers_forgetting_and_the_score_and_halving_others_does_not():
    groups = results.scaled_runs()
    for run in groups["lora", 0.01, 0.0]:
        assert results.change([run], "intruders", "forgetting") < -0.3
        assert results.change([run], "others", "forgetting") > 0.3
        assert results.change([run], "intruders", "score") < -0.2
    for run in groups["lora", 0.04, 0.08]:
        assert abs(results.change([run], "intruders", "forgetting")) < 0.05
        assert run["forgetting"] > 0.15


def test_few_bits_cost_little_down_to_three():
    rows, bounds = experiments.load("bits"), {}
    for decay in (0.0, 0.04):
        plain = sections.where(rows, method="lora", decay=decay)
        for method in ("qlora", "lora, int3 base", "lora, int2 base"):
            mine = sections.where(rows, method=method, decay=decay)
            for key in ("score", "forgetting"):
                gaps = sections.paired(mine, plain, key)
                assert len(gaps) == 10
                half = results.report.interval(gaps)
                mean = statistics.mean(gaps)
                bounds[method, key, decay] = mean - half, mean + half
                if "int3" not in method or key == "forgetting":
                    text = sections.with_interval(gaps)
                    told = CLAIMS["few-bits"]["interval"]
                    assert text in told or (method, key) == ("lora, int2 base", "forgetting")
    for decay in (0.0, 0.04):
        assert -0.07 < bounds["qlora", "score", decay][0] < 0.02
        assert bounds["qlora", "forgetting", decay][1] < 0.3
        low, high = bounds["lora, int3 base", "score", decay]
        assert low < 0 < high, "no difference seen"
        assert bounds["lora, int3 base", "forgetting", decay][0] > 0.1
        assert bounds["lora, int2 base", "score", decay][1] < -0.02
        assert bounds["lora, int2 base", "forgetting", decay][0] > 2.5


def test_rank_1_scores_less_and_16_and_64_are_level():
    found = choosing.points(experiments.load("ranks"))
    for how in ("", ", α 16", ", rsLoRA"):
        best = {
            r: choosing.operating_point(sections.where(found, method=f"lora, r {r}{how}"))
            for r in experiments.RANKS
        }
        scores = {r: point["score"] for r, point in best.items()}
        assert all(scores[1] < scores[r] - 0.1 for r in (4, 16, 64))
        assert abs(scores[16] - scores[64]) < 0.02
        for r, low, high in ((1, 0.73, 0.83), (16, 0.98, 0.99), (64, 0.98, 0.99)):
            assert low <= round(scores[r], 2) <= high, "the ledger says so"


def test_mlps_alone_score_less_than_attention_alone():
    rows = experiments.load("placement")
    pairs = [
        (attention, mlp)
        for attention in sections.where(rows, method="lora, attention")
        for mlp in sections.where(rows, method="lora, mlp")
        if all(attention[name] == mlp[name] for name in ("learning_rate", "seed"))
    ]
    assert len(pairs) == 9
    assert all(attention["score"] > mlp["score"] for attention, mlp in pairs)
    for text in ("+0.02 [-0.09, +0.13]", "-0.09 [-0.23, +0.05]"):
        assert text in CLAIMS["placement-rates"]["interval"]
        assert text in sections.what_placement_does(rows)
    best = sections.best_places(experiments.load("placement-sentiment"))
    scores = [point["score"] for point in best.values()]
    assert max(scores) - min(scores) < 0.02


def bounds(values: list[float]) -> tuple[float, float]:
    """Of the mean's 95 % interval."""
    mean, half = statistics.mean(values), results.report.interval(values)
    return mean - half, mean + half


def values(rows: list[dict], key: str) -> list[float]:
    return [row[key] for row in rows]


def test_only_prefix_tuning_learns_describe_in_300_steps():
    found, finals = choosing.points(experiments.load("prompts")), experiments.load("finals-prompts")
    runs, text = sections.best_prompts(found, finals), sections.what_prompts_do(found, finals)
    for method, rows in runs.items():
        assert len(rows) == 5
        assert bounds(values(rows, "forgetting"))[0] > 2
        scores = values(rows, "score")
        if "prefix" in method:
            assert sections.with_interval(scores, ".2f") in CLAIMS["prompt-methods"]["interval"]
            assert bounds(scores)[0] > 0.7
        else:
            assert max(scores) < 0.2
    for key in ("score", "forgetting"):
        told = sections.with_interval(
            sections.paired(runs["prefix_tuning, real text"], runs["prefix_tuning"], key)
        )
        assert told in text
        assert told in CLAIMS["prompt-methods"]["interval"]


def test_sentiment_cannot_rank_the_methods():
    rows, finals = experiments.load("sentiment"), experiments.load("finals-sentiment")
    runs = transfer.runs_of(rows, finals)
    assert len(runs) == 7
    for pair in runs.values():
        for mine, most in zip(pair, (0.06, 0.02), strict=True):
            assert len(mine) == 5
            assert min(values(mine, "score")) == 1
            assert statistics.mean(values(mine, "forgetting")) < most + 0.005
    gap = sections.paired(runs["lora"][1], runs["full"][1], "forgetting")
    told = sections.with_interval(gap, "+.3f")
    assert told in CLAIMS["sentiment-level"]["interval"]
    assert told in sections.what_sentiment_shows(rows, finals)


def test_a_random_base_learns_nothing_of_describe_in_300_steps():
    best = sections.best_by_steps(experiments.load("steps"))
    last = {key[:2]: values(runs, "score") for key, runs in best.items() if key[2] == 300}
    assert all(len(scores) == 3 for scores in last.values())
    for (method, random), scores in last.items():
        assert not random or max(scores) < 0.005, method
    assert min(last["full", False] + last["lora", False]) > 0.98
    for method, low, high in (("bitfit", 0.36, 0.43), ("prompt_tuning", 0, 0.14)):
        assert (round(min(last[method, False]), 2), round(max(last[method, False]), 2)) == (
            low,
            high,
        )


def test_the_larger_base_shows_what_the_1m_base_shows():
    rows, finals = experiments.load("3m"), experiments.load("finals-3m")
    runs = transfer.runs_of(rows, finals)
    assert len(runs) == 7
    for plain, decayed in runs.values():
        assert len(plain) == len(decayed) == 5
        assert bounds(sections.paired(decayed, plain, "forgetting"))[1] < 0
        assert statistics.mean(sections.paired(decayed, plain, "score")) > -0.011
    for i in range(2):
        gap = sections.paired(runs["lora"][i], runs["full"][i], "forgetting")
        assert bounds(gap)[0] > 0
        assert sections.with_interval(gap) in CLAIMS["larger-base"]["interval"]
        assert sections.with_interval(gap) in sections.what_the_larger_base_shows(rows, finals)


def test_a_real_model_repeats_all_findings_but_the_intruders():
    runs, told = transfer.runs_of(*transfer.real_rows()), CLAIMS["real-findings"]["interval"]
    for method in transfer.METHODS:
        plain, decayed = runs[method]
        assert len(plain) == len(decayed) == 5
        before, after = (statistics.mean(values(rows, "forgetting")) for rows in runs[method])
        assert 2 * after < before
        low, high = bounds(sections.paired(decayed, plain, "score"))
        assert low < 0 < high, "no difference seen"
        assert min(values([*plain, *decayed], "score")) > 0.9
    for i in range(2):
        gap = sections.paired(runs["lora"][i], runs["full"][i], "forgetting")
        assert bounds(gap)[0] > 0
        assert sections.with_interval(gap) in told
        assert statistics.mean(values(runs["prompt_tuning"][i], "score")) < 0.4
    for key in ("score", "forgetting"):
        assert (
            sections.with_interval(sections.paired(runs["qlora"][1], runs["lora"][1], key)) in told
        )
    few = statistics.mean(values(runs["lora"][0], "intruders"))
    assert few < 0.01 * transfer.LOOKED_AT["SmolLM2"]
    small = transfer.runs_of(experiments.load("forgetting"), experiments.load("finals"))["lora"][0]
    assert statistics.mean(values(small, "intruders")) > 0.3 * transfer.LOOKED_AT["1M"]


def test_the_least_forgetting_at_a_score_is_none_where_no_setting_reaches_it():
    found = choosing.points(
        [row(0.1, 0, 0.9, 3.0), row(0.1, 0.01, 0.9, 1.0), row(0.2, 0, 0.8, 0.1)]
    )
    plain, decayed = choosing.equal_score(found, 0.9)["lora"]
    assert (plain["forgetting"], decayed["forgetting"]) == (3.0, 1.0)
    assert choosing.equal_score(found, 0.95)["lora"] == (None, None)


def test_the_page_of_results_is_made_from_the_committed_rows():
    assert results.page() == results.PAGE.read_text(), "run python -m data.results"


# --- the real model ---


def test_the_real_models_finals_are_listed_when_its_grid_is_complete(monkeypatch):
    grid, rows = real.grid(), real.load()
    assert len(set(grid)) == len(grid) == 1 + 4 * 4 * 2 * 2
    assert {s.method for s in grid} == {"frozen", "full", "lora", "qlora", "prompt_tuning"}
    assert not real.missing()
    assert len(rows) == len(grid) + 4 * 2 * 5
    first = [row for row in rows if row["seed"] in real.SEEDS]
    monkeypatch.setattr(real, "load", lambda: first[:5])
    assert real.settings() == grid
    assert set(real.missing()) == {real.setting_of(row) for row in first[5:]}
    monkeypatch.setattr(real, "load", lambda: first)
    assert {setting.seed for setting in real.missing()} == set(real.FINALS)


def test_the_real_models_prompt_starts_from_its_vocabulary_and_its_lora_has_rank_16():
    prompt, lora = (
        real.recipe_of(m).config(size, 60) for m, size in (("prompt_tuning", 20), ("lora", 16))
    )
    assert (prompt.prompt_tuning_init, prompt.num_virtual_tokens) == ("SAMPLE_VOCAB", 20)
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (16, 32, "all-linear")
    assert real.recipe_of("lora").size == 16


def test_no_successor_of_lora_wins_on_score_and_forgetting():
    runs, found = tournament.finals(), tournament.grid_points()
    assert all(len(rows) == 5 for rows in runs.values())
    for decayed in (False, True):
        score, forgetting = (tournament.verdicts(decayed, key) for key in ("score", "forgetting"))
        assert not set(score["higher"]) & set(forgetting["lower"]) - {"full"}
    plain, decayed = (tournament.verdicts(decay, "score") for decay in (False, True))
    assert plain["lower"] == ["vera", "ia3"]
    assert {"rslora", "lora_plus", "pissa", "dora"} < set(plain["neither"])
    assert set(decayed["higher"]) == {"full", "lora_plus", "pissa", "dora"}
    forgets = tournament.verdicts(True, "forgetting")
    assert {"pissa", "dora"} < set(forgets["higher"])
    assert forgets["neither"] == ["lora_plus"]
    least = {m: pair[1] for m, pair in choosing.equal_score(found, 0.95).items() if pair[1]}
    close = [least[m]["forgetting"] for m in ("lora", "rslora", "lora_plus", "dora")]
    assert max(close) - min(close) < 0.03
    told = CLAIMS["tournament"]["interval"]
    for method, decay in (
        *product(("rslora", "lora_plus", "dora", "vera", "ia3"), [False]),
        *product(("pissa", "lora_plus"), [True]),
    ):
        gap = paired(runs[method, decay], runs["lora", decay], "score")
        assert with_interval(gap, "+.3f") in told


def test_at_other_ranks_no_successor_of_lora_is_ahead_of_it():
    found, ahead = tournament.ranks_runs(), []
    for method, r, decayed in product(
        ("rslora", "lora_plus", "pissa", "dora"), (1, 8, 32), (False, True)
    ):
        (point, mine), (_, lora) = found[method, r, decayed], found["lora", r, decayed]
        assert sorted(run["seed"] for run in mine) == list(range(5))
        assert {run["learning_rate"] for run in mine} == {point["learning_rate"]}
        gaps = paired(mine, lora, "score")
        if tournament.verdict(gaps, 2.78) == "better":
            ahead.append((method, r, decayed))
    assert ahead == [(method, 8, True) for method in ("lora_plus", "pissa", "dora")]


def test_sentiment_is_too_easy_to_rank_the_successors_of_lora():
    for name, methods, bound in (
        ("tournament-sentiment", 8, 0.05), ("tournament-sentiment-ranks", 13, 0.3),
    ):  # fmt: skip
        runs = [run for rows in tournament.finals(name).values() for run in rows]
        assert len(runs) == 2 * methods * 5
        assert min(run["score"] for run in runs) > 0.99
        assert max(run["forgetting"] for run in runs) < bound
        assert max(run["forgetting"] for run in runs if run["decay"]) < 0.05
    most = max(runs, key=lambda run: run["forgetting"])
    assert (most["method"], most["decay"]) == ("lora_plus, r 32", 0.0)
    trials = tournament.grid_points("tournament-sentiment-ranks")
    points = [p for decayed in (False, True) for p in operating_points(trials, decayed)]
    lowest = [p for p in points if edges(p, trials).get("learning_rate", 9) < p["learning_rate"]]
    assert (len(lowest), len(points)) == (15, 26)


def test_steps_to_a_score_are_counted_in_twenties():
    row = {"scores": [0.1, 0.5, 0.92, 0.89, 0.95]}
    assert tournament.steps_to(0.9, row) == 60
    assert tournament.steps_to(0.96, row) is None
    assert tournament.verdict([0.02, 0.03, 0.04], 4.3) == "better"
    assert tournament.verdict([-0.02, 0.03, 0.04], 4.3) == "not shown"
    assert tournament.verdict([-0.02, -0.03, -0.04], 4.3) == "worse"
