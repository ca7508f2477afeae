import json
from dataclasses import replace

import pytest

from minipeft.lab import report, sweep, tasks
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.lab.sweep import Grid


def entry(losses: dict[float, float], **changes) -> dict:
    points = [{"learning_rate": rate, "slot_loss": loss} for rate, loss in losses.items()]
    made = {
        "date": "2026-11-24", "method": "lora", "random_base": False, "base": "1m", "size": 8,
        "task": "describe", "steps": 100, "examples": 400, "seeds": 1,
        "best": min(losses, key=losses.get), "points": points,
    }  # fmt: skip
    return made | changes


RUN = RunConfig(steps=1, n_generate=2, batch_size=2)


@pytest.fixture(scope="module")
def task(base):
    task = tasks.load_task(base, "describe")
    return replace(task, validation=task.validation[:4], test=task.test[:4])


@pytest.mark.parametrize(
    "losses", [{1e-3: 0.1, 1e-2: 0.2, 1e-1: 0.3}, {1e-3: 0.3, 1e-2: 0.2, 1e-1: 0.1}, {1e-2: 0.1}]
)
def test_a_best_rate_at_the_edge_of_the_grid_is_refused_and_nothing_is_written(tmp_path, losses):
    file = tmp_path / "sweep.json"
    sweep.save([entry({1e-3: 0.2, 1e-2: 0.1, 1e-1: 0.3})], file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"at the edge of the grid \(.*\): widen it"):
        sweep.save([entry(losses)], file)
    assert file.read_bytes() == before


def test_a_new_sweep_replaces_the_old_one_of_the_same_runs(tmp_path):
    file, good = tmp_path / "sweep.json", {1e-3: 0.2, 1e-2: 0.1, 1e-1: 0.3}
    sweep.save([entry(good), entry(good, size=2)], file)
    sweep.save([entry({2e-3: 0.2, 2e-2: 0.1, 2e-1: 0.3})], file)
    assert [(e["size"], e["best"]) for e in json.loads(file.read_text())] == [(2, 1e-2), (8, 2e-2)]


def test_a_file_of_something_else_is_not_overwritten(tmp_path):
    file, good = tmp_path / "notes.json", entry({1e-3: 0.2, 1e-2: 0.1, 1e-1: 0.3})
    other_best = json.dumps([good | {"best": 0.5}])  # no point has this rate
    no_rate = json.dumps([good | {"points": [{"loss": 0.5}]}])
    for text in ('{"mine": 1}', json.dumps([good, {}]), other_best, no_rate, '["method"]'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"notes\.json "):
            sweep.save([good], file)
        assert file.read_text() == text
    assert sweep.load(tmp_path / "missing.json") == []


@pytest.mark.slow
def test_a_sweep_end_to_end(base, task):
    blind = replace(task, test=[])  # a sweep must not look at the test examples
    grid = Grid([1e-4, 3e-3], [1, 4])
    entries = sweep.sweep(base, blind, RECIPES["lora"], RUN, grid)
    assert [(e["size"], len(e["points"])) for e in entries] == [(1, 2), (4, 2)]
    for e in entries:
        assert e["best"] == min(e["points"], key=lambda p: p["slot_loss"])["learning_rate"]
        assert all({"loss", "template_loss", "score", "forgetting"} < set(p) for p in e["points"])
    assert entries[0]["points"][0] != entries[1]["points"][0]
    assert sweep.table(entries).count("**") == 4
    (axis,) = report.sweep_figure(entries).axes
    assert axis.get_legend_handles_labels()[1] == ["size 1", "size 4"]


def test_a_run_whose_loss_is_not_finite_is_the_worst_point(base, task, monkeypatch):
    def diverge(*args, **options):
        raise FloatingPointError("the loss is nan at step 1")

    monkeypatch.setattr(sweep, "finetune", diverge)
    points = sweep.sweep(base, task, RECIPES["full"], RUN, Grid([1e-3], []))[0]["points"]
    assert points == [{"learning_rate": 1e-3}]
    assert sweep.selection_loss(points[0]) == float("inf")
    assert sweep.selection_loss({"loss": 1.0}) == 1.0
    assert sweep.selection_loss({"loss": 1.0, "slot_loss": 2.0}) == 2.0  # not the template's loss
