"""The command line: its options, and a one-line error before any work if a job is impossible."""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import fields
from typing import get_type_hints

import pytest
from conftest import BASE

from minipeft import __version__, gpt
from minipeft.lab import base, cli, compare, memory, recipes, report, sweep, tasks
from minipeft.lab.finetune import Record
from minipeft.lab.recipes import RECIPES, RunConfig

SMALL = BASE.parent / "0.3m"
WRITING = {
    "finetune": "finetune --method lora --output",
    "compare": "compare --output",
    "sweep": "sweep --output",
    "pretrain": "pretrain --text README.md --output",
    "memory": "memory --output",
    "merge": "merge --adapter out --output",
}


def run(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["minipeft", *words])
    cli.main()


def refused(monkeypatch, capsys, *words: str) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *words)
    error = str(ended.value)
    assert error.startswith("error: ")
    assert "\n" not in error
    assert capsys.readouterr().out == ""
    return error


@pytest.fixture
def idle(monkeypatch):
    """Fail the test as soon as a command starts to work."""
    for module, name in (
        (base, "load_base"), (base, "read_text"), (memory, "of"), (gpt.GPT, "from_pretrained"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it started to work"))


# --- options ---


def subcommand(name: str) -> argparse.ArgumentParser:
    (commands,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[name]


@pytest.mark.parametrize("field", fields(RunConfig), ids=lambda field: field.name)
def test_every_field_of_run_config_is_an_option_of_finetune(monkeypatch, field):
    monkeypatch.delenv("MINIPEFT_STEPS", raising=False)
    flag = f"--{field.name.replace('_', '-')}"
    options = {flag: action for action in subcommand("finetune")._actions
               for flag in action.option_strings}  # fmt: skip
    assert flag in options
    assert options[flag].default == field.default
    assert options[flag].help.startswith(field.metadata["help"])


def test_options_become_the_run_config_with_the_fields_types():
    words = "--steps 7 --learning-rate 1e-3 --warmup 2 --decay-to start --random-base --device cpu"
    args = cli.parser().parse_args(["finetune", *words.split()])
    run = cli.run_config(args)
    expected = RunConfig(
        steps=7, learning_rate=1e-3, warmup=2, decay_to="start", random_base=True, device="cpu"
    )
    assert run == expected
    for name, kind in get_type_hints(RunConfig).items():
        assert isinstance(getattr(run, name), kind), name


def test_the_environment_can_set_the_default_number_of_steps(monkeypatch):
    monkeypatch.setenv("MINIPEFT_STEPS", "3")
    for command in (["finetune"], ["compare"], ["sweep"]):
        assert cli.parser().parse_args(command).steps == 3
    assert cli.parser().parse_args(["finetune", "--steps", "5"]).steps == 5


def test_help_is_printed_without_importing_torch_in_under_a_second():
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('minipeft', run_name='__main__')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    for words, expected in ((["--help"], "finetune"), (["compare", "--help"], "--methods")):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        assert done.stderr == "False\n"
        # processor time, because other tests may keep the machine busy
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_an_error_ends_the_process_with_one_line_and_status_1(tmp_path):
    command = [sys.executable, "-m", "minipeft", "sweep", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"error: --results {tmp_path} is a folder: name a file\n"


def test_version(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--version")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"minipeft {__version__}\n"


def test_targets_lists_the_layers_that_adapters_can_go_on(monkeypatch, capsys, gpt, tmp_path):
    gpt.save_pretrained(tmp_path)
    run(monkeypatch, "targets", "--base", str(tmp_path))
    assert "| mlp.c_proj | 2 | 96 | 24 | 4,608 | 240 |" in capsys.readouterr().out


# --- what is refused ---


@pytest.mark.parametrize("words", WRITING.values(), ids=WRITING)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    monkeypatch, capsys, tmp_path, idle, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/below/it"):
        error = refused(monkeypatch, capsys, *words.split(), output)
        assert error == f"error: cannot write to {output}: file is not a folder"
    (tmp_path / "closed").mkdir(0o500)
    if not os.access(tmp_path / "closed", os.W_OK):  # root may write everywhere
        error = refused(monkeypatch, capsys, *words.split(), "closed/new")
        assert error == "error: cannot write to closed/new: no permission to write to closed"
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "file"]


def test_a_folder_without_write_permission_is_refused(monkeypatch, capsys, tmp_path, idle):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    error = refused(monkeypatch, capsys, "finetune", "--output", str(tmp_path / "new"))
    assert error.endswith(f"no permission to write to {tmp_path}")


def test_a_sweeps_results_must_be_a_file(monkeypatch, capsys, tmp_path, idle):
    monkeypatch.chdir(tmp_path)
    assert "is a folder: name a file" in refused(monkeypatch, capsys, "sweep", "--results", ".")
    (tmp_path / "file").write_text("mine")
    error = refused(monkeypatch, capsys, "sweep", "--results", "file/sweep.json")
    assert error == "error: cannot write to file: file is not a folder"


def test_a_base_that_does_not_exist_is_refused(monkeypatch, capsys, tmp_path):
    error = refused(monkeypatch, capsys, "generate", "--prompt", "Hi", "--base", str(tmp_path))
    assert error.startswith(f"error: {tmp_path}/tokenizer.json is missing")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "Hi", "--top-k", "5"], "--top-k needs --temperature"),
        (["--prompt", ""], "the prompt is empty: pass at least one token"),
        (["--prompt", "Hi", "--device", "nonsense"], "device 'nonsense' cannot be used"),
    ],
)
def test_generate_refuses_bad_options(monkeypatch, capsys, words, message):
    assert message in refused(monkeypatch, capsys, "generate", "--base", str(SMALL), *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("finetune", "--output is missing"),
        ("compare --methods full,lroa", "there is no 'lroa'; choose from frozen, full, lora"),
        ("compare --targets head", "there is no 'head'; choose from attention, mlp, all-linear"),
        ("finetune --output out --method bitfit --size 4", "bitfit has no size, got 4"),
        ("finetune --output out --method bitfit --targets mlp", "bitfit has no rank"),
    ],
)
def test_a_bad_option_is_refused_before_any_work(
    monkeypatch, capsys, tmp_path, idle, words, message
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(monkeypatch, capsys, *words.split())
    assert not list(tmp_path.iterdir())


GOOD = json.dumps({"prompt": "The names: Ann, Bob.", "completion": " Ann"})


@pytest.fixture
def files(monkeypatch, tmp_path):
    """A folder, the current one, with the user's own task and base (without held-out text)."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SMALL, tmp_path / "0.3m")
    (tmp_path / "train.jsonl").write_text(f"{GOOD}\n" * 3)
    (tmp_path / "valid.jsonl").write_text(f"{GOOD}\n" * 2)
    return tmp_path


JOB = "finetune --base 0.3m --train train.jsonl --validation valid.jsonl --output out"


@pytest.mark.parametrize(
    ("line", "words", "message"),
    [
        ('{"prompt": "a", "completion": ""}', "", 'train.jsonl, line 2 needs a "completion": a'),
        ("", "--batch-size 0", "batch_size must be a positive integer, got 0"),
        ("", "--steps 0", "steps must be a positive integer, got 0"),
        ("", "--n-evaluations 0", "n_evaluations must be a positive integer, got 0"),
        (
            "",
            "--method prompt_tuning --size 251",
            "12 tokens of text and 251 virtual tokens exceed",
        ),
        ("", "--task describe", "give --task NAME, or --train FILE and --validation FILE"),
    ],
)
def test_a_job_that_cannot_be_done_writes_nothing(monkeypatch, capsys, files, line, words, message):
    (files / "train.jsonl").write_text(f"{GOOD}\n{line}\n")
    assert message in refused(monkeypatch, capsys, *JOB.split(), *words.split())
    assert not (files / "out").exists()


# --- your own files ---


def test_without_a_test_file_every_second_validation_example_is_kept_for_the_test(files):
    lines = [json.dumps({"prompt": f"Say {n}:", "completion": f" {n}"}) for n in range(5)]
    (files / "valid.jsonl").write_text("\n".join(lines))
    opened = base.load_base("0.3m")
    task = tasks.load_files(opened, "train.jsonl", "valid.jsonl")
    assert [e.completion for e in task.validation] == [" 0", " 2", " 4"]
    assert [e.completion for e in task.test] == [" 1", " 3"]
    assert task.split == "2 of the 5 examples in valid.jsonl are kept for the test"
    assert task.name == "train"
    (files / "test.jsonl").write_text(lines[3])
    task = tasks.load_files(opened, "train.jsonl", "valid.jsonl", "test.jsonl")
    assert len(task.validation) == 5
    assert [e.completion for e in task.test] == [" 3"]
    assert task.split is None


def test_a_single_validation_example_cannot_be_split(monkeypatch, capsys, files):
    (files / "valid.jsonl").write_text(GOOD)
    error = refused(monkeypatch, capsys, *JOB.split())
    assert error == ("error: valid.jsonl has one example, too few to split: give --test FILE too")
    assert not (files / "out").exists()


def test_a_split_and_a_rate_from_another_task_are_announced_and_recorded(
    monkeypatch, capsys, files
):
    run(monkeypatch, *JOB.split(), "--steps", "1")
    printed, record = capsys.readouterr().out, json.loads((files / "out/record.json").read_text())
    split = "1 of the 2 examples in valid.jsonl are kept for the test"
    assert f"train: {split}\n" in printed
    assert record["split"] == split
    rate, origin = recipes.swept_learning_rate(
        RECIPES["lora"], RunConfig(steps=1), "0.3m", "train", 3
    )
    assert f"lora: learning rate {rate:g}, {origin}\n" in printed
    assert (record["learning_rate"], record["learning_rate_origin"]) == (rate, origin)
    assert origin.startswith("swept on the ")
    assert "exact match" in printed


def test_with_a_test_file_and_a_learning_rate_nothing_is_announced(monkeypatch, capsys, files):
    (files / "test.jsonl").write_text(GOOD)
    run(monkeypatch, *f"{JOB} --steps 1 --test test.jsonl --learning-rate 1e-3".split())
    printed, record = capsys.readouterr().out, json.loads((files / "out/record.json").read_text())
    assert printed.count("\n") == 1
    assert "wrote out" in printed
    assert not {"split", "learning_rate_origin"} & set(record)
    assert [e["reference"] for e in record["examples"]] == [" Ann"]


SHAPE = "--vocab-size 300 --n-embd 32 --n-layer 1 --n-head 2 --n-positions 64"


def test_pretraining_on_a_text_whose_held_out_part_fills_no_window_keeps_the_model(
    monkeypatch, tmp_path
):
    """One in fifty documents is held out: here two short ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The names: Ann, Bob.\n<|endoftext|>\n" * 100)
    run(monkeypatch, *f"pretrain --text text.txt --output base --steps 1 {SHAPE}".split())
    assert base.load_base("base").pretrained.config.n_embd == 32


def test_from_a_text_file_to_a_merged_model_by_commands(monkeypatch, capsys, files):
    """pretrain, finetune, generate with the adapter, merge, generate without it."""
    text = "The names: Ann, Bob. Ann is here. " * 8
    (files / "text.txt").write_text(f"{text}\n<|endoftext|>\n" * 50)
    run(monkeypatch, *f"pretrain --text text.txt --output base --steps 20 {SHAPE}".split())
    job = JOB.replace("0.3m", "base") + " --steps 20 --learning-rate 1e-2 --device cpu"
    run(monkeypatch, *job.split())
    capsys.readouterr()
    prompt = ("--prompt", "The names: Ann, Bob.", "--max-new-tokens", "3", "--device", "cpu")
    texts = []
    run(monkeypatch, "generate", "--base", "base", "--adapter", "out", *prompt)
    texts.append(capsys.readouterr().out)
    run(monkeypatch, *["merge", "--base", "base", "--adapter", "out", "--output", "merged"])
    assert capsys.readouterr().out == "wrote merged\n"
    run(monkeypatch, "generate", "--base", "merged", *prompt)
    texts.append(capsys.readouterr().out)
    assert texts == ["The names: Ann, Bob. Ann\n"] * 2
    run(monkeypatch, "generate", "--base", "merged", *prompt, "--temperature", "5", "--seed", "1")
    assert capsys.readouterr().out not in texts


# --- results are not lost ---


@pytest.fixture
def records(monkeypatch) -> list[Record]:
    """What `compare` finds, without training."""
    common = {"base": "0.3m", "task": "describe", "steps": 2, "n_train": 400, "trainable": 10}
    common |= {
        "weight_bytes": 2_000,
        "score": 0.5,
        "test_slot_loss": 1.0,
        "test_template_loss": 2.0,
    }
    curve = [{"step": s, "loss": 2.0, "slot_loss": 3.0, "template_loss": 1.0} for s in (0, 2)]
    found = [
        Record(method=method, seed=0, validation=curve, examples=[], **common)
        for method in ("frozen", "prompt_tuning")
    ]
    monkeypatch.setattr(compare, "compare", lambda *args: found)
    return found


def test_compare_prints_its_table_and_writes_its_results_before_it_draws(
    monkeypatch, capsys, tmp_path, records
):
    def fail(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "compare_figure", fail)
    with pytest.raises(RuntimeError, match="no font"):
        run(monkeypatch, "compare", "--base", str(SMALL), "--output", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "| prompt tuning | 10 | 2 | 2.000 | 1.000 | 2.000 | 0.500 |" in printed
    assert compare.load(tmp_path / "out" / "compare.json") == records


def entries(best: float = 1e-2, **changes) -> list[dict]:
    points = [{"learning_rate": rate, "slot_loss": abs(rate - best)} for rate in (1e-3, 1e-2, 1e-1)]
    entry = {"method": "lora", "random_base": False, "base": "0.3m", "task": "describe"}
    entry |= {"steps": 1, "examples": 400, "size": 8, "best": best, "points": points}
    return [entry | changes]


def test_a_sweep_writes_into_its_output_folder_and_not_over_the_committed_results(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "sweep", lambda *args: entries())
    committed = recipes.SWEEPS.read_bytes()
    run(monkeypatch, "sweep", "--base", str(SMALL), "--output", "mine")
    assert recipes.SWEEPS.read_bytes() == committed
    assert json.loads((tmp_path / "mine" / "sweep.json").read_text()) == entries()
    assert (tmp_path / "mine" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    run(monkeypatch, "sweep", "--base", str(SMALL), "--results", "other.json")
    assert json.loads((tmp_path / "other.json").read_text()) == entries()


def test_a_sweeps_results_are_written_even_if_its_figure_cannot_be_drawn(monkeypatch, tmp_path):
    def fail(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(sweep, "sweep", lambda *args: entries())
    monkeypatch.setattr(report, "sweep_figure", fail)
    with pytest.raises(RuntimeError, match="no font"):
        run(monkeypatch, "sweep", "--base", str(SMALL), "--output", str(tmp_path))
    assert json.loads((tmp_path / "sweep.json").read_text()) == entries()


def test_a_sweep_in_which_every_run_diverges_says_so(monkeypatch, capsys, tmp_path):
    points = [{"learning_rate": rate} for rate in (1.0, 2.0, 4.0)]
    monkeypatch.setattr(sweep, "sweep", lambda *args: entries(1.0, points=points))
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "sweep", "--base", str(SMALL), "--output", str(tmp_path))
    assert "the best learning rate, 1, is at the edge of the grid" in str(ended.value)
