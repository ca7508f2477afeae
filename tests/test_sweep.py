import json
from dataclasses import replace

import pytest

from minipeft.lab import finetune, sweep, tasks


def entry(losses: dict[float, float], **changes) -> dict:
    points = [{"learning_rate": rate, "slot_loss": loss} for rate, loss in losses.items()]
    made = {
        "date": "2026-11-24", "method": "lora", "random_base": False, "base": "1m", "size": 8,
        "task": "describe", "steps": 100, "examples": 400, "seeds": 1,
        "best": min(losses, key=losses.get), "points": points,
    }  # fmt: skip
    return made | changes


@pytest.fixture(scope="module")
def task(base):
    task = tasks.load_task(base.tokenizer, base.end, 256, "describe")
    return replace(task, validation=task.validation[:4], test=task.test[:4])


@pytest.mark.parametrize(
    "losses", [{1e-3: 0.1, 1e-2: 0.2, 1e-1: 0.3}, {1e-3: 0.3, 1e-2: 0.2, 1e-1: 0.1}, {1e-2: 0.1}]
)
def test_an_optimum_at_the_edge_is_refused_and_nothing_is_written(tmp_path, losses):
    file = tmp_path / "sweep.json"
    sweep.save([entry({1e-3: 0.2, 1e-2: 0.1, 1e-1: 0.3})], file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"at the edge of .*widen the grid"):
        sweep.save([entry(losses)], file)
    assert file.read_bytes() == before


def test_a_new_sweep_takes_the_place_of_the_old_one_of_the_same_runs(tmp_path):
    file, good = tmp_path / "sweep.json", {1e-3: 0.2, 1e-2: 0.1, 1e-1: 0.3}
    sweep.save([entry(good), entry(good, size=2)], file)
    sweep.save([entry({2e-3: 0.2, 2e-2: 0.1, 2e-1: 0.3})], file)
    assert [(e["size"], e["best"]) for e in json.loads(file.read_text())] == [(2, 1e-2), (8, 2e-2)]


def test_compare_takes_the_rate_of_the_sweep_that_is_most_alike(tmp_path, monkeypatch, base, task):
    file, good = tmp_path / "sweep.json", {1e-3: 0.2, 1e-2: 0.1, 1e-1: 0.3}
    monkeypatch.setattr(finetune, "SWEEPS", file)
    entries = [
        entry(good, best=1.0),
        entry(good, best=2.0, steps=300),
        entry(good, best=3.0, base="3m"),
        entry(good, best=4.0, task="sentiment"),
        entry(good, best=5.0, size=2),
        entry(good, best=6.0, random_base=True),
        entry(good, best=7.0, method="full", size=None),
    ]
    file.write_text(json.dumps(entries))

    def rate(task=task, method="lora", steps=100, random_base=False, size=None):
        return finetune.swept_learning_rate(base, task, method, steps, random_base, size)

    assert [rate(), rate(steps=250), rate(size=2)] == [1, 2, 5]
    assert rate(task=replace(task, name="sentiment")) == 4
    assert rate(random_base=True) == 6
    assert rate(method="full", random_base=True) == 7
    file.write_text("[]")
    with pytest.raises(ValueError, match="no learning rate was swept for 'lora'"):
        rate()


def test_a_sweep_end_to_end(base, task):
    options = {"generated": 2, "batch_size": 2}
    blind = replace(task, test=[])  # a sweep must not look at the test examples
    entries = sweep.sweep(base, blind, "lora", [1e-4, 3e-3], [1, 4], 1, **options)
    assert [(e["size"], len(e["points"])) for e in entries] == [(1, 2), (4, 2)]
    for e in entries:
        assert e["best"] == min(e["points"], key=lambda p: p["slot_loss"])["learning_rate"]
        assert all({"loss", "frame_loss", "score", "forgetting"} < set(p) for p in e["points"])
    assert entries[0]["points"][0] != entries[1]["points"][0]
    assert sweep.table(entries).count("**") == 4
    assert len(sweep.picture(entries).axes) == 2


def test_a_run_whose_loss_is_not_finite_is_the_worst_point(base, task, monkeypatch):
    def diverge(*args, **options):
        raise FloatingPointError("the loss is nan at step 1")

    monkeypatch.setattr(sweep, "finetune", diverge)
    points = sweep.sweep(base, task, "full", [1e-3], [], 1)[0]["points"]
    assert points == [{"learning_rate": 1e-3}]
    assert sweep.judge(points[0]) == float("inf")
    assert sweep.judge({"loss": 1.0}) == 1.0
    assert (
        sweep.judge({"loss": 1.0, "slot_loss": 2.0}) == 2.0
    )  # what a task is about, not its frame


def test_optuna_looks_between_the_ends_of_the_grid(base, task):
    pytest.importorskip("optuna")
    options = {"generated": 2, "batch_size": 2, "trials": 3}
    entries = sweep.sweep(base, task, "lora", [1e-4, 1e-2], [1, 2], 1, **options)
    rates = [p["learning_rate"] for e in entries for p in e["points"]]
    assert len(set(rates)) == 3
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert {e["size"] for e in entries if e["points"]} <= {1, 2}
