"""A run that was stopped and resumed ends exactly like one that was not stopped."""

import csv
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minipeft import GPT
from minipeft.lab import DATA, tasks
from minipeft.lab import train as loop
from minipeft.lab.base import load_base
from minipeft.lab.checkpoint import Checkpoint
from minipeft.lab.finetune import finetune
from minipeft.lab.recipes import RECIPES, RunConfig


@pytest.fixture(scope="module")
def job():
    base = replace(load_base(DATA / "base" / "0.3m"), held_out=None)
    task = tasks.load_task(base, "describe")
    return base, replace(task, validation=task.validation[:4], test=task.test[:4])


RUN = RunConfig(steps=8, n_generate=2, n_evaluations=2, batch_size=2, quiet=True)


class Stop(Exception):
    pass


def in_step(monkeypatch, step: int, act) -> list:
    """Do something in the middle of a step, counted over all runs; returns the steps so far."""
    after_backward, calls = loop.without_penalty, []

    def acting(*args):
        calls.append(1)
        if len(calls) == step:
            act()
        return after_backward(*args)

    monkeypatch.setattr(loop, "without_penalty", acting)
    return calls


def stop() -> None:
    raise Stop


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("full", {}),
        ("full", {"weight_decay": 5.0, "decay_to": "start"}),  # towards the weights before step 1
        ("adalora", {}),
        ("prefix_tuning", {}),
        ("qlora", {}),
    ],
)
def test_a_resumed_run_ends_exactly_like_one_that_was_not_stopped(
    job, tmp_path, monkeypatch, method, settings
):
    recipe, run = RECIPES[method], replace(RUN, checkpoint_every=2, **settings)
    whole = finetune(*job, recipe, replace(run, output=tmp_path / "whole"))
    calls = in_step(monkeypatch, 6, stop)
    folder = tmp_path / "stopped"
    with pytest.raises(Stop):
        finetune(*job, recipe, replace(run, output=folder))
    assert (folder / "checkpoint.safetensors").is_file()
    with pytest.raises(ValueError, match="was stopped: resume it, or delete the file"):
        finetune(*job, recipe, replace(run, output=folder))
    resumed = finetune(*job, recipe, replace(run, output=folder, resume=True))
    assert len(calls) == 6 + 4  # steps 5 to 8
    for name in ("losses", "validation", "score", "test_loss", "optimizer_bytes"):
        assert getattr(resumed, name) == getattr(whole, name)
    (ours,), (theirs,) = (list(f.glob("*odel.safetensors")) for f in (folder, tmp_path / "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not list(folder.glob("*checkpoint*"))  # the run is complete
    with (folder / "log.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert [float(row["loss"]) for row in rows] == whole.losses
    assert float(rows[7]["validation_loss"]) == whole.validation[-1]["loss"]


def test_the_random_state_is_saved(gpt, ids, tmp_path):
    config = replace(gpt.config, resid_pdrop=0.2)
    batches = [[{"input_ids": ids, "labels": ids}]] * 6

    def run(file: Path, stop: int | None = None) -> list[float]:
        torch.manual_seed(0)
        model, checkpoint = GPT(config), Checkpoint(file, 3, {})

        def after_step(row: dict) -> None:
            if row["step"] == stop:
                raise Stop

        settings = RunConfig(steps=6, learning_rate=1e-2, warmup=0, quiet=True)
        return loop.train(model, batches, settings, None, after_step, checkpoint).losses

    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "stopped", 5)
    assert run(tmp_path / "stopped") == whole


def test_a_checkpoint_of_another_run_and_a_damaged_one_change_nothing(gpt, tmp_path):
    optimizer = torch.optim.AdamW(gpt.parameters())
    file = tmp_path / "checkpoint.safetensors"
    Checkpoint(file, 1, {"seed": 0, "steps": 5}).save(gpt, optimizer, 3)
    before = {n: t.clone() for n, t in gpt.state_dict().items()}
    torch.nn.init.ones_(gpt.lm_head.weight)
    with pytest.raises(ValueError, match=r"of another run \(seed: 0, not 1\)"):
        Checkpoint(file, 1, {"seed": 1, "steps": 5}).load(gpt, optimizer)
    assert (gpt.lm_head.weight == 1).all()
    assert Checkpoint(file, 1, {"seed": 0, "steps": 5}).load(gpt, optimizer) == 3
    assert all(torch.equal(t, before[n]) for n, t in gpt.state_dict().items())
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a checkpoint, or is damaged"):
        Checkpoint(file, 1, {}).load(gpt, optimizer)


def test_refusing_to_resume_another_run_leaves_the_stopped_one_untouched(
    job, tmp_path, monkeypatch
):
    in_step(monkeypatch, 4, stop)
    run = replace(RUN, checkpoint_every=2, output=tmp_path)
    with pytest.raises(Stop):
        finetune(*job, RECIPES["lora"], run)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    fewer = replace(job[1], train=job[1].train[:50])
    for task, method, steps, message in (
        (job[1], "lora", 9, r"steps: 8, not 9\)"), (job[1], "bitfit", 8, "method: 'lora', not"),
        (fewer, "lora", 8, r"another run \(data: .*; n_train: 400, not 50\)"),
    ):  # fmt: skip
        other = replace(run, steps=steps, learning_rate=0.01, resume=True)
        with pytest.raises(ValueError, match=message):
            finetune(job[0], task, RECIPES[method], other)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert {"checkpoint.safetensors", "log.csv"} == set(before)


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(job, tmp_path, monkeypatch):
    calls = in_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's `&`
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 8"):
            finetune(*job, RECIPES["lora"], replace(RUN, output=tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    finetune(*job, RECIPES["lora"], replace(RUN, output=tmp_path, resume=True))
    assert len(calls) == 8


def test_gradient_checkpointing_saves_memory_and_gives_the_same_losses(job):
    run = replace(RUN, steps=3)
    plain = finetune(*job, RECIPES["lora"], run)
    fewer = finetune(*job, RECIPES["lora"], replace(run, gradient_checkpointing=True))
    assert fewer.losses == plain.losses
    saved = plain.activation_bytes - fewer.activation_bytes
    assert saved == fewer.gradient_checkpointing["bytes_saved"] > 0.3 * plain.activation_bytes
    assert "seconds_lost" in fewer.gradient_checkpointing


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(script), str(tmp_path), "7"]
    subprocess.run(command, check=True, timeout=300)
    for method in ("full", "adalora", "qlora"):
        whole, killed = tmp_path / method / "whole", tmp_path / method / "killed"
        (name,) = [file.name for file in whole.glob("*odel.safetensors")]
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
        assert not [file for file in killed.iterdir() if "checkpoint" in file.name]


def test_resuming_a_run_that_has_ended_is_refused(job, tmp_path):
    """It has no checkpoint any more: starting again would overwrite its adapter."""
    finetune(*job, RECIPES["lora"], replace(RUN, steps=1, output=tmp_path))
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    log = (tmp_path / "log.csv").read_bytes()
    with pytest.raises(ValueError, match=r"there is nothing to resume in .*: this run has ended"):
        finetune(*job, RECIPES["lora"], replace(RUN, steps=1, output=tmp_path, resume=True))
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert (tmp_path / "log.csv").read_bytes() == log
