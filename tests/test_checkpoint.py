"""A run that was stopped and gone on with ends in the bits of a run that was not."""

import csv
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minipeft import GPT
from minipeft.lab import finetune, tasks
from minipeft.lab.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def job():
    base = replace(finetune.load_base(tasks.DATA / "base" / "0.3m"), held_out=None)
    task = tasks.load_task(base.tokenizer, base.end, 256, "describe")
    return base, replace(task, validation=task.validation[:4], test=task.test[:4])


OPTIONS = {"generated": 2, "validations": 2, "batch_size": 2, "quiet": True}


class Stop(Exception):
    pass


def in_step(monkeypatch, step: int, act) -> list:
    """Do something in the middle of a step, counted over all runs; returns the steps so far."""
    gradients, calls = finetune.gradients, []

    def acting(*args):
        calls.append(1)
        if len(calls) == step:
            act()
        return gradients(*args)

    monkeypatch.setattr(finetune, "gradients", acting)
    return calls


def stop() -> None:
    raise Stop


@pytest.mark.parametrize("method", ["full", "adalora", "prefix_tuning", "qlora"])
def test_a_stopped_run_goes_on_to_the_same_bits(job, tmp_path, monkeypatch, method):
    options = OPTIONS | {"checkpoint_every": 2}
    whole = finetune.finetune(*job, method, 8, output=tmp_path / "whole", **options)
    calls = in_step(monkeypatch, 6, stop)
    folder = tmp_path / "stopped"
    with pytest.raises(Stop):
        finetune.finetune(*job, method, 8, output=folder, **options)
    assert (folder / "checkpoint.safetensors").is_file()
    with pytest.raises(ValueError, match="go on with --resume, or delete it"):
        finetune.finetune(*job, method, 8, output=folder, **options)
    resumed = finetune.finetune(*job, method, 8, output=folder, resume=True, **options)
    assert len(calls) == 6 + 4  # steps 5 to 8
    for name in ("losses", "validation", "score", "test_loss", "optimizer_bytes"):
        assert resumed[name] == whole[name]
    (ours,), (theirs,) = (list(f.glob("*odel.safetensors")) for f in (folder, tmp_path / "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not list(folder.glob("*checkpoint*"))  # it has ended
    with (folder / "log.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert [float(row["loss"]) for row in rows] == whole["losses"]
    assert float(rows[7]["validation_loss"]) == whole["validation"][-1]["loss"]


def test_the_random_state_is_kept(gpt, ids, tmp_path):
    config = replace(gpt.config, resid_pdrop=0.2)
    batches = [[{"input_ids": ids, "labels": ids}]] * 6

    def run(file: Path, stop: int | None = None) -> dict:
        torch.manual_seed(0)
        model, checkpoint = GPT(config), Checkpoint(file, 3, {})

        def each_step(row: dict) -> None:
            if row["step"] == stop:
                raise Stop

        record = finetune.train(
            model, batches, 6, 1e-2, checkpoint=checkpoint, each_step=each_step, quiet=True
        )
        return record["losses"]

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
    with pytest.raises(ValueError, match="is no checkpoint, or is damaged"):
        Checkpoint(file, 1, {}).load(gpt, optimizer)


def test_resuming_another_run_loses_nothing_of_the_one_that_was_stopped(job, tmp_path, monkeypatch):
    in_step(monkeypatch, 4, stop)
    options = OPTIONS | {"checkpoint_every": 2, "output": tmp_path}
    with pytest.raises(Stop):
        finetune.finetune(*job, "lora", 8, **options)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    fewer = replace(job[1], train=job[1].train[:50])
    for task, method, steps, told in (
        (job[1], "lora", 9, r"steps: 8, not 9\)"), (job[1], "bitfit", 8, "method: 'lora', not"),
        (fewer, "lora", 8, r"another run \(data: .*; n_train: 400, not 50\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            finetune.finetune(
                job[0], task, method, steps, learning_rate=0.01, resume=True, **options
            )
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert {"checkpoint.safetensors", "log.csv"} == set(before)


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(job, tmp_path, monkeypatch):
    calls = in_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's `&`
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 8"):
            finetune.finetune(*job, "lora", 8, output=tmp_path, **OPTIONS)
    finally:
        signal.signal(signal.SIGINT, before)
    finetune.finetune(*job, "lora", 8, output=tmp_path, resume=True, **OPTIONS)
    assert len(calls) == 8


def test_checkpointing_gradients_changes_bytes_and_seconds_but_no_result(job):
    plain = finetune.finetune(*job, "lora", 3, **OPTIONS)
    fewer = finetune.finetune(*job, "lora", 3, gradient_checkpointing=True, **OPTIONS)
    assert fewer["losses"] == plain["losses"]
    saved = plain["activation_bytes"] - fewer["activation_bytes"]
    assert saved == fewer["gradient_checkpointing"]["bytes_saved"] > 0.3 * plain["activation_bytes"]
    assert "seconds_lost" in fewer["gradient_checkpointing"]


def test_tensorboard_gets_the_losses(job, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    finetune.finetune(
        *job, "lora", 2, output=tmp_path / "out", log_dir=str(tmp_path / "log"), **OPTIONS
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "log")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path):
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(script), str(tmp_path), "7"]
    subprocess.run(command, check=True, timeout=300)
    for method in ("full", "adalora", "qlora"):
        whole, killed = tmp_path / method / "whole", tmp_path / method / "killed"
        (name,) = [file.name for file in whole.glob("*odel.safetensors")]
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
        assert not [file for file in killed.iterdir() if "checkpoint" in file.name]
