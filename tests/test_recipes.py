"""How a run is set up: the learning rate by step, swept learning rates, and bad settings."""

import json
import math
from dataclasses import replace

import pytest

from minipeft.lab import recipes
from minipeft.lab.recipes import RECIPES, RunConfig


@pytest.mark.parametrize(
    ("settings", "step", "rate"),
    [  # peak 2.0
        ({"warmup": 2}, 1, 1.0),  # half of the warm-up
        ({"warmup": 2}, 2, 2.0),  # the peak
        ({"warmup": 2}, 3, 2.0),  # the cosine starts there
        ({"warmup": 2}, 7, 1.0),  # 4 of 8 steps: the middle
        ({"warmup": 2}, 5, 1.7071068),  # 2 of 8: 1 + cos 45°
        ({"warmup": 2}, 10, 0.0761205),  # 7 of 8: 1 + cos 157.5°
        ({"warmup": 0}, 1, 2.0),
        ({"warmup": 0}, 6, 1.0),
        ({}, 1, 2.0),  # a tenth of ten steps is one
        ({"warmup": 2, "lr_end": 0.2}, 7, 1.2),  # 0.2 + 0.8 / 2 of the peak
        ({"warmup": 2, "lr_end": 1.0}, 10, 2.0),
        ({"steps": 100}, 5, 1.0),  # a tenth of 100 steps is ten
        ({"steps": 100}, 10, 2.0),
        ({"steps": 100}, 56, 1.0),
        ({"steps": 5}, 1, 2.0),  # at least one step
        ({"steps": 1}, 1, 2.0),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_a_cosine(settings, step, rate):
    run = RunConfig(**{"steps": 10, "learning_rate": 2.0} | settings)
    assert run.learning_rate_at(step) == pytest.approx(rate, abs=1e-6)


POSITIVE = ("steps", "batch_size", "accumulation", "n_generate", "n_evaluations")
FROM_0 = ("warmup", "seed", "checkpoint_every")


@pytest.mark.parametrize("name", POSITIVE + FROM_0)
def test_counts_are_integers_within_bounds(name):
    low, what = (1, "a positive") if name in POSITIVE else (0, "a non-negative")
    assert getattr(RunConfig(**{name: low}), name) == low
    for value in (low - 1, 2.0, True, "3", [1]):
        with pytest.raises(ValueError) as refused:
            RunConfig(**{name: value})
        assert str(refused.value) == f"{name} must be {what} integer, got {value!r}"
    with pytest.raises(ValueError, match=f"{name} must be at most [0-9,]+, got {10**19}"):
        RunConfig(**{name: 10**19})


@pytest.mark.parametrize(
    ("name", "what", "low", "high"),
    [
        ("learning_rate", "positive", 1e-12, 1000),
        ("max_grad_norm", "positive", 1e-12, 10**12),
        ("weight_decay", "non-negative", 0, 10_000),
        ("lr_end", "non-negative", 0, 1),
        ("beta2", "non-negative", 0, 0.999999),
    ],
)
def test_other_numbers_are_finite_and_within_bounds(name, what, low, high):
    for value in (low, high, float(high)):
        assert getattr(RunConfig(**{name: value}), name) == value
    for value in (low - 1e-9, -1.0, -math.inf, math.nan, "0.1", False):
        with pytest.raises(ValueError) as refused:
            RunConfig(**{name: value})
        assert str(refused.value) == f"{name} must be a {what} number, got {value!r}"
    for value in (high * 1.01, math.inf):
        with pytest.raises(ValueError) as refused:
            RunConfig(**{name: value})
        assert str(refused.value) == f"{name} must be at most {high:,}, got {value}"


def test_only_settings_with_that_default_may_be_none():
    assert RunConfig(learning_rate=None, warmup=None) == RunConfig()
    with pytest.raises(ValueError, match="steps must be a positive integer, got None"):
        RunConfig(steps=None)
    with pytest.raises(ValueError, match="decay_to must be one of zero, start, got None"):
        RunConfig(decay_to=None)


def test_decay_to_must_be_zero_or_start():
    assert RunConfig(decay_to="start").decay_to == "start"
    with pytest.raises(ValueError, match="decay_to must be one of zero, start, got 'base'"):
        RunConfig(decay_to="base")


def test_a_batch_has_at_least_as_many_examples_as_micro_batches():
    assert RunConfig(batch_size=4, accumulation=4).accumulation == 4
    with pytest.raises(ValueError, match="accumulation must be at most the batch size 4, got 5"):
        RunConfig(batch_size=4, accumulation=5)


def test_a_bad_value_is_cut_in_the_message():
    with pytest.raises(ValueError) as refused:
        RunConfig(steps="9" * 10_000)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), (" 7 ", 7), ("7.0", None), ("1e2", None), ("", None), ("x", None)]
)
def test_a_text_is_parsed_as_its_kind_of_number(text, value):
    bounds = recipes.Bounds(int, 2, 9)
    if value is None:
        message = f"must be an integer of at least 2, got {text!r}"
        with pytest.raises(ValueError, match=f"^{message}$"):
            bounds.parse(text)
    else:
        assert bounds.parse(text) == value


def entry(**changes) -> dict:
    settings = {"method": "lora", "random_base": False, "base": "1m", "size": 8}
    return settings | {"task": "describe", "steps": 100, "examples": 400} | changes


@pytest.fixture
def swept(tmp_path, monkeypatch):
    file = tmp_path / "sweep.json"
    monkeypatch.setattr(recipes, "SWEEPS", file)
    entries = [
        entry(best=1.0),
        entry(best=2.0, steps=300),
        entry(best=3.0, base="3m"),
        entry(best=4.0, task="sentiment"),
        entry(best=5.0, size=2),
        entry(best=6.0, random_base=True),
        entry(best=7.0, method="full", size=None),
        entry(best=8.0, examples=50),
    ]
    file.write_text(json.dumps(entries))
    return file


def look_up(method="lora", base="1m", task="describe", n_train=400, size=None, **settings):
    recipe = RECIPES[method] if size is None else RECIPES[method].with_size(size)
    return recipes.swept_learning_rate(recipe, RunConfig(**settings), base, task, n_train)


def test_the_learning_rate_comes_from_the_most_similar_sweep(swept):
    assert [look_up()[0], look_up(steps=250)[0], look_up(size=2)[0]] == [1, 2, 5]
    assert look_up(task="sentiment")[0] == 4
    assert look_up(random_base=True)[0] == 6
    assert look_up(method="full", random_base=True)[0] == 7
    assert look_up(n_train=100)[0] == 8
    swept.write_text("[]")
    with pytest.raises(ValueError, match="no learning rate was swept for 'lora'"):
        look_up()


def test_a_rate_from_another_base_or_task_comes_with_its_origin(swept):
    assert look_up() == (1.0, None)
    assert look_up(base="3m") == (3.0, None)
    assert look_up(steps=250, size=4)[1] is None  # the same base and task
    assert look_up(base="mine") == (1.0, "swept on the 1m base, task describe")
    assert look_up(base="3m", task="sentiment") == (4.0, "swept on the 1m base, task sentiment")
    assert look_up(task="mine") == (1.0, "swept on the 1m base, task describe")


def test_changing_a_recipe_leaves_the_shared_one_unchanged():
    before = replace(RECIPES["lora"])
    changed = RECIPES["lora"].with_size(2).placed("mlp")
    assert (changed.size, changed.targets) == (2, "mlp")
    assert RECIPES["lora"] == before
