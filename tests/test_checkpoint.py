"""A run that was stopped and resumed ends exactly like one that was not stopped."""

import copy
import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minipeft import GPT
from minipeft.lab import DATA, tasks
from minipeft.lab import train as loop
from minipeft.lab.base import load_base
from minipeft.lab.checkpoint import Checkpoint, Stopped, locked
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


def test_without_resume_a_stopped_run_starts_over(job, tmp_path, monkeypatch):
    """In a notebook, a cell that was stopped can simply be run again."""
    run = replace(RUN, checkpoint_every=2, output=tmp_path / "stopped")
    whole = finetune(*job, RECIPES["lora"], replace(run, output=tmp_path / "whole"))
    calls = in_step(monkeypatch, 6, stop)
    with pytest.raises(Stop):
        finetune(*job, RECIPES["lora"], run)
    again = finetune(*job, RECIPES["lora"], run)
    assert len(calls) == 6 + 8
    assert again.losses == whole.losses


# --- checkpoints that do not fit ---


@pytest.fixture
def saved(gpt, ids, tmp_path):
    """A model and optimizer after three steps, and their checkpoint."""
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3)
    for _ in range(3):
        gpt(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lists = {"losses": [3.0, 2.0, 1.0], "seconds": [0.1, 0.1, 0.1]}
    file = tmp_path / "new folder" / "checkpoint.safetensors"
    checkpoint = Checkpoint(file, 1, {"seed": 0, "steps": 5}, lists)
    checkpoint.save(gpt, optimizer, 3)
    torch.nn.init.ones_(gpt.lm_head.weight)
    return gpt, optimizer, checkpoint


WEIGHT = "model.transformer.h.0.attn.c_attn.weight"
DAMAGES = {  # (tensors, header) -> None, and the error
    "a tensor is missing": (lambda t, h: t.pop(WEIGHT), f"{WEIGHT} is missing"),
    "a moment is missing": (lambda t, h: t.pop("optimizer.2.exp_avg"), "exp_avg is missing"),
    "a tensor is not trained": (
        lambda t, h: t.update({"model.frozen": torch.ones(2)}), "model.frozen has no place",
    ),
    "a shape that would be broadcast": (
        lambda t, h: t.update({WEIGHT: torch.ones(1, 24)}), r"is \(1, 24\) .*, not \(72, 24\)",
    ),
    "another dtype": (
        lambda t, h: t.update({WEIGHT: t[WEIGHT].half()}), "float16, not .* of torch.float32",
    ),
    "NaN": (lambda t, h: t[WEIGHT].fill_(torch.nan), "has values that are NaN or infinite"),
    "an optimizer at another step": (
        lambda t, h: t["optimizer.0.step"].fill_(9), r"optimizer\.0\.step is 9, not 3",
    ),
    "another step": (lambda t, h: h.update(step=2), "do not fit step 2"),
    "step 0": (lambda t, h: h.update(step=0), "its header is damaged"),
    "a list is missing": (lambda t, h: h["lists"].pop("seconds"), "lists in its header do not fit"),
    "losses that are no numbers": (
        lambda t, h: h["lists"].update(losses=["a", "b", "c"]), "lists in its header do not fit",
    ),
    "another seed": (lambda t, h: h["identity"].update(seed=1), r"another run \(seed: 1, not 0\)"),
    "no random state": (
        lambda t, h: t["random.cpu"].fill_(255), "random.cpu is no random state",
    ),
    "no identity": (lambda t, h: h.update(identity=[]), "its header is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(saved, name):
    model, optimizer, checkpoint = saved
    damage, message = DAMAGES[name]
    with safe_open(checkpoint.file, "pt") as opened:
        header = json.loads(opened.metadata()["minipeft"])
    tensors = load_file(checkpoint.file)
    damage(tensors, header)
    save_file(tensors, checkpoint.file, metadata={"minipeft": json.dumps(header)})
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), checkpoint.lists))
    with pytest.raises(ValueError, match=message) as raised:
        checkpoint.load(model, optimizer)
    assert str(checkpoint.file) in str(raised.value)
    assert "\n" not in str(raised.value)
    weights, state, lists = before
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    for i, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(t, state["state"][i][n]) for n, t in moments.items())
    assert checkpoint.lists == lists


def test_a_damaged_file_is_refused_and_an_intact_one_restores_everything(saved):
    model, optimizer, checkpoint = saved
    whole = checkpoint.file.read_bytes()
    for part in (whole[:1000], b"", b"x" * 100, b"\xff" * 8 + whole):
        checkpoint.file.write_bytes(part)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors"):
            checkpoint.load(model, optimizer)
    assert (model.lm_head.weight == 1).all()
    checkpoint.file.write_bytes(whole)
    checkpoint.lists["losses"][:] = []
    assert checkpoint.load(model, optimizer) == 3
    assert not (model.lm_head.weight == 1).any()
    assert checkpoint.lists["losses"] == [3.0, 2.0, 1.0]


def test_two_runs_cannot_write_to_one_folder(job, tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="is in use: another run is writing"):
        finetune(*job, RECIPES["lora"], replace(RUN, output=tmp_path))
    assert not list(tmp_path.iterdir())
    finetune(*job, RECIPES["lora"], replace(RUN, steps=1, output=tmp_path))  # free again


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    pid = os.fork()
    if pid == 0:
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    with locked(tmp_path):
        pass


def test_the_bases_folder_is_no_output(job):
    before = {file.name: file.stat().st_mtime_ns for file in (DATA / "base" / "0.3m").iterdir()}
    with pytest.raises(ValueError, match="is the base's own folder: name another one"):
        finetune(*job, RECIPES["full"], replace(RUN, output=f"{DATA}/base/../base/0.3m"))
    after = {file.name: file.stat().st_mtime_ns for file in (DATA / "base" / "0.3m").iterdir()}
    assert after == before


def test_a_log_that_is_a_link_is_replaced_and_its_target_stays(job, tmp_path):
    (tmp_path / "mine.csv").write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "log.csv").symlink_to(tmp_path / "mine.csv")
    finetune(*job, RECIPES["lora"], replace(RUN, steps=1, output=folder))
    assert (tmp_path / "mine.csv").read_text() == "mine"
    assert (folder / "log.csv").read_text().startswith("step,loss")


def test_refusing_to_resume_another_run_leaves_the_stopped_one_untouched(
    job, tmp_path, monkeypatch
):
    in_step(monkeypatch, 4, stop)
    run = replace(RUN, checkpoint_every=2, output=tmp_path)
    with pytest.raises(Stop):
        finetune(*job, RECIPES["lora"], run)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    fewer = replace(job[1], train=job[1].train[:50])
    other_validation = replace(job[1], validation=job[1].validation[1:])
    for task, method, steps, message in (
        (job[1], "lora", 9, r"steps: 8, not 9\)"), (job[1], "bitfit", 8, "method: 'lora', not"),
        (fewer, "lora", 8, r"another run \(data: .*; n_train: 400, not 50\)"),
        (other_validation, "lora", 8, r"another run \(validation: "),
    ):  # fmt: skip
        other = replace(run, steps=steps, learning_rate=0.01, resume=True)
        with pytest.raises(ValueError, match=message):
            finetune(job[0], task, RECIPES[method], other)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert {"checkpoint.safetensors", "log.csv"} == set(before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_finish_the_step_and_leave_a_checkpoint(
    job, tmp_path, monkeypatch, number
):
    calls = in_step(monkeypatch, 3, lambda: signal.raise_signal(number))
    before = signal.signal(number, signal.default_int_handler)  # SIGINT may be ignored
    try:
        with pytest.raises(Stopped, match="stopped after step 3 of 8; its state is in ") as raised:
            finetune(*job, RECIPES["lora"], replace(RUN, output=tmp_path))
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert raised.value.saved
    finetune(*job, RECIPES["lora"], replace(RUN, output=tmp_path, resume=True))
    assert len(calls) == 8


def test_without_an_output_a_stopped_run_does_not_say_that_it_was_saved(job, monkeypatch):
    in_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Stopped) as raised:
            finetune(*job, RECIPES["lora"], RUN)
    finally:
        signal.signal(signal.SIGINT, before)
    assert str(raised.value) == "stopped after step 3 of 8"
    assert not raised.value.saved


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
