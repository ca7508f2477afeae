"""What a command cannot do it refuses in one line, before it works or writes."""

import json
import os
import sys
from dataclasses import replace

import pytest
from conftest import BASE

from minipeft import __main__, gpt
from minipeft.lab import finetune, memory, tasks

SMALL = BASE.parent / "0.3m"
WRITING = {
    "finetune": "finetune --method lora --output",
    "tensorboard": "finetune --output out --log-dir",
    "compare": "compare --output",
    "sweep": "sweep --output",
    "pretrain": "pretrain --text README.md --output",
    "memory": "memory --output",
    "merge": "merge --adapter out --output",
}


def refused(monkeypatch, capsys, *words: str) -> str:
    """The one line in which a command ends."""
    monkeypatch.setattr(sys, "argv", ["minipeft", *words])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    error = str(ended.value)
    assert error.startswith("error: ")
    assert "\n" not in error
    assert capsys.readouterr().out == ""
    return error


@pytest.fixture
def idle(monkeypatch):
    """Whoever begins to work fails the test."""
    for module, name in (
        (finetune, "load_base"), (tasks, "read_text"), (memory, "of"), (gpt.GPT, "from_pretrained"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it began to work"))


@pytest.mark.parametrize("words", WRITING.values(), ids=WRITING)
def test_an_output_that_cannot_be_written_is_told_before_any_work(
    monkeypatch, capsys, tmp_path, idle, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/below/it"):
        told = refused(monkeypatch, capsys, *words.split(), output)
        assert told == f"error: nothing can be written into {output}: file is not a folder"
    (tmp_path / "closed").mkdir(0o500)
    if not os.access(tmp_path / "closed", os.W_OK):  # root may write everywhere
        told = refused(monkeypatch, capsys, *words.split(), "closed/new")
        assert told == "error: nothing can be written into closed/new: closed may not be written to"
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "file"]


def test_a_folder_that_may_not_be_written_to_is_told(monkeypatch, capsys, tmp_path, idle):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    told = refused(monkeypatch, capsys, "finetune", "--output", str(tmp_path / "new"))
    assert told.endswith(f"{tmp_path} may not be written to")


def test_a_sweeps_results_need_a_file(monkeypatch, capsys, tmp_path, idle):
    monkeypatch.chdir(tmp_path)
    assert "is a folder: name a file" in refused(monkeypatch, capsys, "sweep", "--results", ".")
    (tmp_path / "file").write_text("mine")
    told = refused(monkeypatch, capsys, "sweep", "--results", "file/sweep.json")
    assert told == "error: nothing can be written into file: file is not a folder"


@pytest.mark.parametrize(
    ("line", "words", "told"),
    [
        ('{"prompt": "a", "completion": ""}', "", 'train.jsonl, line 2 needs a "completion" that'),
        ("", "--batch-size 0", "batch_size is 0: give a whole number from 1 up"),
        ("", "--steps 0", "steps is 0: give a whole number from 1 up"),
        ("", "--method prompt_tuning --size 251", "12 tokens and 251 virtual ones exceed the"),
    ],
)
def test_a_job_that_cannot_be_done_writes_nothing(monkeypatch, capsys, tmp_path, line, words, told):
    monkeypatch.chdir(tmp_path)
    good = json.dumps({"prompt": "The names: Ann, Bob.", "completion": " Ann"})
    (tmp_path / "train.jsonl").write_text(f"{good}\n{line}\n")
    (tmp_path / "valid.jsonl").write_text(good)
    job = f"finetune --train train.jsonl --validation valid.jsonl --output out {words}"
    assert told in refused(monkeypatch, capsys, *job.split(), "--base", str(SMALL))
    assert not (tmp_path / "out").exists()


def test_a_long_prompt_leaves_room_for_the_virtual_tokens():
    """Training fits into the context to the last place, and so must what is generated after it."""
    base = replace(finetune.load_base(SMALL), held_out=None)
    example = tasks.load_task(base.tokenizer, base.end, 256, "describe").train[0]
    task = tasks.Task("one", [example], [example], [example])
    room = 256 - len(example.prompt_ids) - len(example.completion_ids)
    options = {"generated": 1, "validations": 1, "batch_size": 1, "quiet": True}
    finetune.finetune(base, task, "prompt_tuning", 1, size=room, **options)
    with pytest.raises(ValueError, match=f"{room + 1} virtual ones exceed the context of 256"):
        finetune.finetune(base, task, "prompt_tuning", 1, size=room + 1, **options)
