"""The command line: its options, one-line errors before any work, and how it is stopped."""

import argparse
import contextlib
import io
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from typing import get_type_hints

import pytest
import torch
from conftest import BASE
from safetensors import SafetensorError
from tqdm import tqdm

from minipeft import __main__, __version__, gpt
from minipeft.lab import (
    base,
    checkpoint,
    cli,
    compare,
    memory,
    parallel,
    recipes,
    report,
    sweep,
    tasks,
    train,
)
from minipeft.lab.checkpoint import Stopped
from minipeft.lab.finetune import Record
from minipeft.lab.recipes import RECIPES, RunConfig

SMALL = BASE.parent / "0.3m"
WRITING = {
    "finetune": "finetune --method lora --output",
    "compare": "compare --output",
    "sweep": "sweep --output",
    "pretrain": "pretrain --text README.md --output",
    "memory": "memory --output",
    "merge": "merge --adapter adapter --output",
}


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """A command sets what Ctrl-C and SIGTERM do, until its process ends."""
    monkeypatch.delenv("MINIPEFT_STEPS", raising=False)
    monkeypatch.setattr(os, "_exit", sys.exit)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # and back, in the end
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["minipeft", *words])
    __main__.main()


def failed(monkeypatch, capfd, *words: str, status: int = 1) -> tuple[str, str]:
    """What a command prints, and the one line with which it ends."""
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *words)
    printed, error = capfd.readouterr()
    assert ended.value.code == status
    assert error.count("\n") == 1, error
    assert error.startswith("error: ") or status == 2 or "stopped" in error, error
    return printed, error.strip()


def refused(monkeypatch, capfd, *words: str, status: int = 1) -> str:
    printed, error = failed(monkeypatch, capfd, *words, status=status)
    assert printed == ""
    return error


@pytest.fixture
def idle(monkeypatch):
    """Fail the test as soon as a command starts to work."""
    for module, name in (
        (base, "load_base"), (base, "read_text"), (memory, "of"), (gpt.GPT, "from_pretrained"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it started to work"))


# --- options ---

COMMANDS = ("compare", "finetune", "sweep", "pretrain", "generate", "memory", "targets", "merge")


def complete(command: str) -> list[str]:
    """The command with the options that it requires."""
    required = {"finetune": "--output out", "generate": "--prompt Hi"}
    required |= {"pretrain": "--text a --output out", "merge": "--adapter a --output out"}
    return [command, *required.get(command, "").split()]


def parsed(command: str, *words: str) -> argparse.Namespace:
    return cli.parser().parse_args([*complete(command), *words])


def subcommand(name: str) -> argparse.ArgumentParser:
    (commands,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[name]


@pytest.mark.parametrize("field", fields(RunConfig), ids=lambda field: field.name)
def test_every_field_of_run_config_is_an_option_of_finetune(field):
    flag = f"--{field.name.replace('_', '-')}"
    options = {flag: action for action in subcommand("finetune")._actions
               for flag in action.option_strings}  # fmt: skip
    assert flag in options
    assert options[flag].default == field.default
    assert options[flag].help.startswith(field.metadata["help"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_help(command):
    for action in subcommand(command)._actions:
        assert len(action.help) > 5, action.option_strings


def test_options_become_the_run_config_with_the_fields_types():
    words = "--output out --steps 7 --learning-rate 1e-3 --warmup 2 --decay-to start"
    words += " --weight-decay 0.1 --random-base --device cpu"
    run = cli.run_config(parsed("finetune", *words.split()))
    expected = RunConfig(
        output="out", steps=7, learning_rate=1e-3, warmup=2, decay_to="start", weight_decay=0.1,
        random_base=True, device="cpu",
    )  # fmt: skip
    assert run == expected
    for name, kind in get_type_hints(RunConfig).items():
        assert isinstance(getattr(run, name), kind), name


def test_the_environment_can_set_the_default_number_of_steps(monkeypatch, capfd):
    monkeypatch.setenv("MINIPEFT_STEPS", "3")
    for command in ("finetune", "compare", "sweep"):
        assert parsed(command).steps == 3
    assert parsed("finetune", "--steps", "5").steps == 5
    for wrong in ("ten", "0"):
        monkeypatch.setenv("MINIPEFT_STEPS", wrong)
        error = refused(monkeypatch, capfd, "sweep", status=2)
        assert "argument --steps: must be a positive integer, got " in error
    monkeypatch.setenv("MINIPEFT_STEPS", "")
    assert parsed("sweep").steps == 100


NUMBERS = {  # the smallest and the largest value, and numbers outside
    "finetune": {
        "--steps": ("1", "10000000", "0", "10000001", "1.5"),
        "--learning-rate": ("1e-12", "1000", "0", "-1", "1001", "nan", "inf"),
        "--batch-size": ("1", "4096", "0", "4097"),
        "--weight-decay": ("0", "10000", "-0.1", "10001", "nan"),
        "--warmup": ("0", "10000000", "-1", "0.5"),
        "--lr-end": ("0", "1", "-0.1", "1.1"),
        "--beta2": ("0", "0.999999", "-0.1", "1"),
        "--max-grad-norm": ("1e-12", "1e12", "0", "inf"),
        "--seed": ("0", str(2**63 - 1), "-1", str(2**63)),
        "--n-generate": ("1", "10000000", "0"),
        "--n-evaluations": ("1", "10000000", "0"),
        "--checkpoint-every": ("0", "10000000", "-1"),
        "--size": ("1", "1024", "0", "1025", "ten"),
    },
    "compare": {"--seeds": ("1", "1000", "0", "1001")},
    "sweep": {"--seeds": ("1", "1000", "0"), "--sizes": ("1,2", "1024", "0", "1,,2", "2,2", "a")},
    "pretrain": {
        "--vocab-size": ("257", "65536", "256", "65537"),
        "--n-positions": ("2", "1024", "1", "1025"),
        "--n-embd": ("4", "1024", "0", "1025"),
        "--n-layer": ("1", "48", "0", "49"),
        "--n-head": ("1", "64", "0", "65"),
    },
    "generate": {
        "--max-new-tokens": ("0", "1000000", "-1", "1e3"),
        "--temperature": ("0", "1000", "-1", "nan", "inf"),
    },
    "memory": {
        "--rank": ("1", "1024", "0"),
        "--batch-size": ("1", "1024", "0"),
        "--length": ("2", "65536", "1", "65537"),
    },
}


@pytest.mark.parametrize("command", NUMBERS)
def test_every_number_is_checked_at_its_flag(monkeypatch, capfd, command):
    for flag, (low, high, *outside) in NUMBERS[command].items():
        parsed(command, flag, low)
        parsed(command, flag, high)
        for value in (*outside, "", "x" * 300):
            error = refused(monkeypatch, capfd, *complete(command), f"{flag}={value}", status=2)
            assert error.startswith(f"minipeft {command}: error: argument {flag}: "), error
            assert len(error) < 400


def test_all_methods_whose_memory_is_computed_can_be_named():
    assert parsed("memory", "--methods", ",".join(memory.METHODS)).methods == [*memory.METHODS]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_value_is_refused_for_every_flag(monkeypatch, capfd, command):
    for action in subcommand(command)._actions:
        if action.nargs != 0:
            words = [*complete(command), f"{action.option_strings[0]}="]
            error = refused(monkeypatch, capfd, *words, status=2)
            assert f"argument {action.option_strings[0]}: " in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "minipeft: error: the following arguments are required: COMMAND (see minipeft"),
        ("finetun", "minipeft: error: argument COMMAND: invalid choice: 'finetun'"),
        ("compare --stpes 3", "minipeft compare: error: unrecognized arguments: --stpes 3, did"),
        ("compare --seed 3", "minipeft compare: error: unrecognized arguments: --seed 3"),
        ("finetune", "the following arguments are required: --output"),
        ("compare --methods full,lroa", "must be one of frozen, full, lora, adalora"),
        ("compare --methods lora,full,lora", "--methods: has an entry twice: 'lora,full,lora'"),
        ("compare --targets head", "must be one of attention, mlp, all-linear, got 'head'"),
        ("compare --targets mlp --methods full", "--targets needs a method with a rank, got full"),
        ("compare --full --base b --seeds 2", "--full cannot be used with --base, --seeds"),
        ("compare --full --n-generate 2", "--full cannot be used with --n-generate"),
        ("compare --task a --train b --validation c", "--task cannot be used with --train, --vali"),
        ("compare --task a --test b", "--task cannot be used with --test"),
        ("compare --train b", "--train needs --validation"),
        ("compare --validation b", "--validation needs --train"),
        ("compare --test b", "--test needs --train"),
        ("compare --decay-to start", "--decay-to needs --weight-decay"),
        ("compare --accumulation 17", "accumulation must be at most the batch size 16, got 17"),
        ("finetune --output o --method frozen", "argument --method: invalid choice: 'frozen'"),
        ("finetune --output o --method bitfit --size 4", "bitfit has no size, got 4"),
        ("finetune --output o --method bitfit --targets mlp", "bitfit has no rank"),
        ("finetune --output o --shard", "--shard needs several processes"),
        ("finetune --output o --shard --resume", "--shard cannot be used with --resume"),
        ("finetune --output o --decay-to base", "must be one of zero, start, got 'base'"),
        ("memory --methods lora,bitfit", "must be one of full-8, full, full-16, lora, qlora"),
        ("sweep --learning-rates 1e-3,1e-2", "--learning-rates needs at least three"),
        ("sweep --learning-rates 1e-3,1e-2,0.01", "has an entry twice"),
        ("sweep --method full --sizes 4", "full has no size, got 4"),
        ("sweep --results notes.txt", "--results must be a .json file, got notes.txt"),
        ("generate --prompt a --temperature 1e-7", "--temperature must be 0 or at least 1e-6, got"),
        ("generate --prompt a --top-k 5", "--top-k needs a --temperature above 0"),
        ("generate --prompt a --top-k 5 --temperature 0", "--top-k needs a --temperature above 0"),
        ("generate --prompt a --top-k 0 --temperature 1", "--top-k: must be a positive integer"),
        ("generate --prompt \udcff", "--prompt: 'utf-8' codec can't encode character"),
        ("pretrain --text a --output b --n-head 3", "--n-head must divide --n-embd, got 3 and 128"),
    ],
)  # fmt: skip
def test_wrong_options_are_a_usage_error(monkeypatch, capfd, tmp_path, idle, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(monkeypatch, capfd, *words.split(), status=2)
    assert not list(tmp_path.iterdir())


def test_control_characters_in_arguments_are_shown_as_escapes(monkeypatch, capfd):
    error = refused(monkeypatch, capfd, "compare", "--a\n\x1b[2J\udcff\u2028é", status=2)
    assert "unrecognized arguments: --a \\x1b[2J\\udcff\\u2028é (see" in error


@pytest.mark.parametrize(("words", "meant"), [
    ("finetun", "finetune"), ("finetune --output o --method lra", "lora"),
    ("compare --stesp 3", "--steps"), ("compare --methods full,lor", "lora"),
    ("memory --methods qlra", "qlora"), ("finetune --output o --decay-to strat", "start"),
])  # fmt: skip
def test_a_misspelt_name_or_flag_gets_a_suggestion(monkeypatch, capfd, words, meant):
    error = refused(monkeypatch, capfd, *words.split(), status=2)
    assert f", did you mean {meant}? (see" in error


def test_what_resembles_nothing_gets_no_suggestion(monkeypatch, capfd):
    assert "did you mean" not in refused(monkeypatch, capfd, "compare", "--zzz", status=2)
    assert "did you mean" not in refused(monkeypatch, capfd, "compare", "--seeds", "x", status=2)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_a_commands_help_are_commands(command):
    for words in cli.EXAMPLES[command]:
        assert f"minipeft {command} {words}" in subcommand(command).format_help()
        cli.parser().parse_args([command, *shlex.split(words)])


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


def test_version(monkeypatch, capfd):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--version")
    assert ended.value.code == 0
    assert capfd.readouterr().out == f"minipeft {__version__}\n"


def test_targets_lists_the_layers_that_adapters_can_go_on(monkeypatch, capfd, gpt, tmp_path):
    gpt.save_pretrained(tmp_path)
    run(monkeypatch, "targets", "--base", str(tmp_path))
    assert "| mlp.c_proj | mlp | 2 | 96 | 24 | 4,608 | 240 |" in capfd.readouterr().out


# --- what is refused ---


@pytest.mark.parametrize("words", WRITING.values(), ids=WRITING)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    monkeypatch, capfd, tmp_path, idle, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/below/it"):
        error = refused(monkeypatch, capfd, *words.split(), output)
        assert error == f"error: cannot write to {output}: file is not a folder"
    (tmp_path / "closed").mkdir(0o500)
    if not os.access(tmp_path / "closed", os.W_OK):  # root may write everywhere
        error = refused(monkeypatch, capfd, *words.split(), "closed/new")
        assert error == "error: cannot write to closed/new: no permission to write to closed"
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "file"]


def test_a_folder_without_write_permission_is_refused(monkeypatch, capfd, tmp_path, idle):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    error = refused(monkeypatch, capfd, "finetune", "--output", str(tmp_path / "new"))
    assert error.endswith(f"no permission to write to {tmp_path}")


OTHER = "is not a file of a sweep's results: name another file"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("mine", "is not JSON: "), ("{}", "must be a JSON array, got {}"), ("[1]", OTHER),
        ('[{"method": "lora"}]', OTHER), ("[" * 10**5, "is not JSON: "),
    ],
)  # fmt: skip
def test_a_sweep_adds_only_to_a_file_of_results(monkeypatch, capfd, tmp_path, idle, found, message):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.json"
    file.write_text(found)
    error = refused(monkeypatch, capfd, "sweep", "--results", "mine.json")
    assert error.startswith(f"error: mine.json {message}")
    assert file.read_text() == found


def test_a_sweeps_results_need_a_folder(monkeypatch, capfd, tmp_path, idle):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.json").mkdir()
    error = refused(monkeypatch, capfd, "sweep", "--results", "file/sweep.json")
    assert error == "error: cannot write to file: file is not a folder"
    error = refused(monkeypatch, capfd, "sweep", "--results", "folder.json")
    assert error == "error: cannot write folder.json: it is a folder"


def test_a_base_that_does_not_exist_is_refused(monkeypatch, capfd, tmp_path):
    error = refused(monkeypatch, capfd, "generate", "--prompt", "Hi", "--base", str(tmp_path))
    assert error.startswith(f"error: {tmp_path}/tokenizer.json is missing")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-new-tokens", "300"], "tokens and 300 new tokens exceed the context of 128"),
        (["--device", "nonsense"], "device 'nonsense' cannot be used"),
    ],
)
def test_generate_refuses_what_the_model_cannot_do(monkeypatch, capfd, words, message):
    words = ["generate", "--base", str(SMALL), "--prompt", "Hi", *words]
    assert message in refused(monkeypatch, capfd, *words)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "", "cpu:-1", "hpu", "vulkan", "a\nb"])
def test_a_device_without_values_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=r"device .* cannot be used: ") as error:
        train.pick_device(name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_without_a_name_the_first_device_that_works_is_taken(monkeypatch):
    real, tried = torch.ones, []

    def ones(*size, device):
        tried.append(device.type)
        if device.type in broken:
            raise RuntimeError("no such device")
        return real(*size)

    monkeypatch.setattr(torch, "ones", ones)
    for broken in ((), ("cuda",), ("cuda", "mps")):
        tried.clear()
        assert train.pick_device().type == ("cuda", "mps", "cpu")[len(broken)] == tried[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "-2"}, {"WORLD_SIZE": "0"}, {"RANK": "2"},
        {"RANK": None}, {"LOCAL_RANK": None}, {"LOCAL_RANK": "x"}, {"MASTER_ADDR": None},
    ],
)  # fmt: skip
def test_wrong_variables_of_torchrun_are_an_error(monkeypatch, changes):
    names = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for name, value in (names | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="start several processes with torchrun, got WORLD_SIZE="):
        parallel.start("cpu")


def test_several_processes_need_a_device_of_their_own(monkeypatch):
    names = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="several processes need cpu or cuda, got --device mps"):
        parallel.start("mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 1 has no GPU: there are 1"):
        parallel.start("cuda")


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
        ('{"prompt": "a", "completion": ""}', "", 'train.jsonl, line 2: a "completion" is missing'),
        (
            "",
            "--method prompt_tuning --size 123",
            "12 tokens of text and 123 virtual tokens exceed",
        ),
    ],
)
def test_a_job_that_cannot_be_done_writes_nothing(monkeypatch, capfd, files, line, words, message):
    (files / "train.jsonl").write_text(f"{GOOD}\n{line}\n")
    assert message in refused(monkeypatch, capfd, *JOB.split(), *words.split())
    assert not (files / "out").exists()


def test_compare_refuses_before_any_training_what_does_not_fit_into_the_context(
    monkeypatch, capfd, files
):
    monkeypatch.setattr(compare, "finetune", lambda *_: pytest.fail("it trained"))
    line = json.dumps({"prompt": "The name" + " is" * 110, "completion": " Ann"})
    (files / "train.jsonl").write_text(line)
    words = JOB.replace("finetune", "compare --methods lora,prompt_tuning").split()
    assert "tokens of text and 20 virtual tokens exceed" in refused(monkeypatch, capfd, *words)


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


def test_a_single_validation_example_cannot_be_split(monkeypatch, capfd, files):
    (files / "valid.jsonl").write_text(GOOD)
    error = refused(monkeypatch, capfd, *JOB.split())
    assert error == ("error: valid.jsonl has one example, too few to split: give --test FILE too")
    assert not (files / "out").exists()


def test_a_split_and_a_rate_from_another_task_are_announced_and_recorded(monkeypatch, capfd, files):
    run(monkeypatch, *JOB.replace("0.3m", str(SMALL)).split(), "--steps", "1")
    printed, record = capfd.readouterr().out, json.loads((files / "out/record.json").read_text())
    split = "1 of the 2 examples in valid.jsonl are kept for the test"
    assert f"train: {split}\n" in printed
    assert record["split"] == split
    rate, origin = recipes.swept_learning_rate(
        RECIPES["lora"], RunConfig(steps=1), "0.3m", "train", 3
    )
    assert f"lora: learning rate {rate:g}, rank 8 ({origin})\n" in printed
    assert (record["learning_rate"], record["learning_rate_origin"]) == (rate, origin)
    assert origin.startswith("swept on the ")
    assert "exact match" in printed


def test_without_a_sweep_the_common_settings_are_taken_and_announced(monkeypatch, capfd, files):
    short = ["--steps", "34", "--batch-size", "1", "--n-evaluations", "1"]
    run(monkeypatch, *JOB.split(), *short)
    printed, record = capfd.readouterr().out, json.loads((files / "out/record.json").read_text())
    assert "lora: learning rate 0.0002, rank 16 (the common recipe, as no sweep" in printed
    assert (record["learning_rate"], record["size"]) == (2e-4, 16)
    rates = [line.split(",")[2] for line in (files / "out/log.csv").read_text().splitlines()[1:4]]
    assert [float(rate) for rate in rates] == [1e-4, 2e-4, 2e-4], "3 % of 34 steps are two"


def test_the_labels_of_the_first_example_are_printed(monkeypatch, capfd, files):
    run(monkeypatch, *JOB.split(), "--steps", "1")
    printed = capfd.readouterr().out
    assert 'not trained on: "The" " names" ":" " An" "n" "," " B" "ob" "."\n' in printed
    assert 'trained on: " An" "n" "<|endoftext|>"\n' in printed


def test_examples_that_are_too_long_are_left_out_and_counted(monkeypatch, capfd, files):
    long = json.dumps({"prompt": "The names: " + "Ann, " * 60, "completion": " Ann"})
    (files / "train.jsonl").write_text(f"{GOOD}\n{long}\n{GOOD}\n")
    run(monkeypatch, *JOB.split(), "--steps", "1")
    said = "train: 1 of the 3 examples in train.jsonl have more than 128 tokens and are left out; "
    assert said + "the longest has 18" in capfd.readouterr().out
    error = refused(monkeypatch, capfd, *JOB.split(), "--max-length", "5")
    assert error.startswith("error: all of the 3 examples in train.jsonl have more than 5 tokens")


def test_with_a_test_file_and_a_learning_rate_only_the_labels_are_announced(
    monkeypatch, capfd, files
):
    (files / "test.jsonl").write_text(GOOD)
    run(monkeypatch, *f"{JOB} --steps 1 --test test.jsonl --learning-rate 1e-3".split())
    printed, record = capfd.readouterr().out, json.loads((files / "out/record.json").read_text())
    assert printed.startswith("the first example")
    assert printed.count("\n") == 6
    losses = [point["loss"] for point in (record["validation"][0], record["validation"][-1])]
    assert "validation loss {:.3f} -> {:.3f}, test loss ".format(*losses) in printed
    assert "wrote out" in printed
    assert printed.endswith("next: minipeft generate --adapter out --prompt …\n")
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


def test_pretraining_that_is_stopped_before_the_tokenizer_is_written_leaves_no_old_one(
    monkeypatch, capfd, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("old")
    (tmp_path / "text.txt").write_text("The names: Ann, Bob.\n<|endoftext|>\n" * 100)
    monkeypatch.setattr(gpt.GPT, "save_pretrained", lambda *_: throw(KeyboardInterrupt()))
    words = f"pretrain --text text.txt --output base --steps 1 {SHAPE}".split()
    with pytest.raises(SystemExit):
        run(monkeypatch, *words)
    assert not (tmp_path / "base" / "tokenizer.json").exists()


def test_from_a_text_file_to_a_merged_model_by_commands(monkeypatch, capfd, files):
    """pretrain, finetune, generate with the adapter, merge, generate without it."""
    text = "The names: Ann, Bob. Ann is here. " * 8
    (files / "text.txt").write_text(f"{text}\n<|endoftext|>\n" * 50)
    run(monkeypatch, *f"pretrain --text text.txt --output base --steps 20 {SHAPE}".split())
    job = JOB.replace("0.3m", "base") + " --steps 20 --learning-rate 1e-2 --device cpu"
    run(monkeypatch, *job.split())
    capfd.readouterr()
    prompt = ("--prompt", "The names: Ann, Bob.", "--max-new-tokens", "3", "--device", "cpu")
    texts = []
    run(monkeypatch, "generate", "--base", "base", "--adapter", "out", *prompt)
    texts.append(capfd.readouterr().out)
    run(monkeypatch, *["merge", "--base", "base", "--adapter", "out", "--output", "merged"])
    assert capfd.readouterr().out == "wrote merged\n"
    run(monkeypatch, "generate", "--base", "merged", *prompt)
    texts.append(capfd.readouterr().out)
    assert texts == ["The names: Ann, Bob. Ann\n"] * 2
    run(monkeypatch, "generate", "--base", "merged", *prompt, "--temperature", "5", "--seed", "1")
    assert capfd.readouterr().out not in texts


# --- what is overwritten ---


@pytest.fixture
def world(files):
    """The user's files, and an adapter's folder."""
    (files / "text.txt").write_text("some text")
    (files / "adapter").mkdir()
    (files / "adapter" / "adapter_config.json").write_text("{}")
    (files / "link").symlink_to("0.3m")
    (files / "out").mkdir()
    return files


@pytest.mark.parametrize(
    ("words", "overwritten"),
    [
        ("merge --base 0.3m --adapter adapter --output 0.3m", "0.3m"),
        ("merge --base 0.3m --adapter adapter --output ./link/.", "0.3m"),
        ("merge --base link --adapter adapter --output 0.3m/../0.3m", "link"),
        ("merge --base 0.3m --adapter adapter --output adapter/", "adapter"),
        ("finetune --method full --base 0.3m --output link", "0.3m"),
        ("compare --base 0.3m --output 0.3m", "0.3m"),
        ("sweep --base 0.3m --output 0.3m", "0.3m"),
        (f"pretrain --text text.txt --output {BASE}", str(BASE)),
        ("pretrain --text out/tokenizer.json --output out", "out/tokenizer.json"),
        ("finetune --train out/log.csv --validation valid.jsonl --output out", "out/log.csv"),
        ("finetune --train same.jsonl --validation valid.jsonl --output out", "same.jsonl"),
        ("sweep --train train.jsonl --validation mine.json --results mine.json", "mine.json"),
    ],
)
def test_a_command_does_not_overwrite_its_input(
    monkeypatch, capfd, world, idle, words, overwritten
):
    for name in ("out/tokenizer.json", "out/log.csv", "mine.json"):
        (world / name).write_text("[]")
    (world / "same.jsonl").symlink_to("out/log.csv")
    error = refused(monkeypatch, capfd, *words.split())
    assert error == f"error: {overwritten} would be overwritten: choose another output"


def test_inputs_may_lie_in_the_output_folder_under_other_names(monkeypatch, capfd, world, idle):
    (world / "train.jsonl").rename(world / "out" / "train.jsonl")
    words = "finetune --train out/train.jsonl --validation valid.jsonl --output out"
    assert "it started to work" in refused(monkeypatch, capfd, *words.split())


def test_a_folder_where_a_file_must_be_written_is_refused(monkeypatch, capfd, world, idle):
    (world / "out" / "compare.json").mkdir()
    error = refused(monkeypatch, capfd, "compare", "--output", "out")
    assert error == "error: cannot write out/compare.json: it is a folder"


def test_a_stopped_run_is_not_overwritten(monkeypatch, capfd, world, idle):
    (world / "out" / "checkpoint.safetensors").write_text("state")
    words = ["finetune", "--base", "0.3m", "--output", "out"]
    assert refused(monkeypatch, capfd, *words) == (
        "error: out has a stopped run: continue it with --resume, or delete checkpoint.safetensors"
    )
    assert "it started to work" in refused(monkeypatch, capfd, *words, "--resume")


@pytest.mark.parametrize("command", WRITING)
def test_a_command_locks_its_output_folder(monkeypatch, capfd, world, idle, command):
    def locked(folder):
        raise ValueError(f"{folder} is in use by another process")

    monkeypatch.setattr(checkpoint, "locked", locked, raising=False)
    error = refused(monkeypatch, capfd, *WRITING[command].split(), "out")
    if command == "finetune":  # which locks it in one process of several
        assert "it started to work" in error
    else:
        assert error == "error: out is in use by another process"


# --- 0 is a value ---


def test_a_temperature_of_0_is_greedy_decoding_and_0_new_tokens_are_none(monkeypatch, capfd):
    words = ["generate", "--base", str(SMALL), "--prompt", "The name is", "--device", "cpu"]
    printed = []
    for more in (("4",), ("4", "--temperature", "0"), ("4", "--temperature", "9"), ("0",)):
        run(monkeypatch, *words, "--max-new-tokens", *more)
        printed.append(capfd.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert printed[3] == "The name is\n"


# --- how a command ends ---


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("r must be positive"), "error: r must be positive"),
        (FloatingPointError("the loss is nan"), "error: the loss is nan"),
        (OSError(28, "No space left"), "error: [Errno 28] No space left"),
        (RuntimeError("can't allocate\n  memory\n"), "error: RuntimeError: can't allocate memory"),
        (MemoryError(), "error: MemoryError:"),
        (SafetensorError("no space"), "error: SafetensorError: no space"),
        (KeyError("a\x1b"), "error: KeyError: 'a\\x1b'"),
        (AssertionError("x" * 5000), f"error: AssertionError: {'x' * 984}"),
        (KeyboardInterrupt(), "stopped."),
        (KeyboardInterrupt("decoding with 'utf-8-sig' codec failed"), "stopped."),  # Python 3.11
        (Stopped("stopped after step 3 of 8", saved=False), "stopped after step 3 of 8."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_error_is_one_line_and_status_1(monkeypatch, capfd, error, line):
    def fail(*_):
        raise error

    monkeypatch.setattr(base, "load_base", fail)
    assert refused(monkeypatch, capfd, "generate", "--prompt", "a") == line
    monkeypatch.setenv("MINIPEFT_DEBUG", "1")
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            run(monkeypatch, "generate", "--prompt", "a")


def test_a_stopped_run_is_to_be_continued_only_if_its_state_was_saved(monkeypatch, capfd, world):
    for saved, line in ((True, "stopped. Continue with --resume."), (False, "stopped.")):
        stopped = Stopped("stopped", saved)
        monkeypatch.setattr(base, "load_base", lambda *_: throw(stopped))  # noqa: B023
        assert refused(monkeypatch, capfd, *["finetune", "--output", "out"]) == line


def test_an_interrupt_that_becomes_another_error_is_still_an_interrupt(monkeypatch, capfd):
    def load_base(*_):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise ValueError("could not determine the shape")

    monkeypatch.setattr(base, "load_base", load_base)
    assert refused(monkeypatch, capfd, "generate", "--prompt", "a") == "stopped."


def test_an_interrupt_in_a_destructor_is_not_lost(monkeypatch, capfd):
    class Interrupted:
        def __del__(self):
            raise KeyboardInterrupt

    left = []
    monkeypatch.setattr(os, "_exit", left.append)  # nothing can be raised there
    monkeypatch.setattr(base, "load_base", lambda *_: bool(Interrupted()) and throw(OSError("on")))
    run(monkeypatch, "generate", "--prompt", "a")
    assert left == [1, 1]
    assert capfd.readouterr().err.startswith("stopped.\n")


def test_a_progress_bar_ends_its_line_before_the_error(monkeypatch, capfd):
    def load_base(*_):
        for _ in tqdm([1, 2], file=sys.stderr):
            raise ValueError("bad")

    monkeypatch.setattr(base, "load_base", load_base)
    with pytest.raises(SystemExit):
        run(monkeypatch, "generate", "--prompt", "a")
    assert capfd.readouterr().err.endswith("\nerror: bad\n")


def throw(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_the_work_and_a_second_one_changes_nothing(
    monkeypatch, capfd, number
):
    reached = []

    def load_base(*_):
        reached.append("work")
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # while the first one unwinds
        reached.append("never")

    monkeypatch.setattr(base, "load_base", load_base)
    assert refused(monkeypatch, capfd, "generate", "--prompt", "a") == "stopped."
    signal.raise_signal(number)  # it is ignored until the process ends
    assert reached == ["work"]


def test_a_second_ctrl_c_before_the_first_is_handled_ends_the_command_too(monkeypatch, capfd):
    monkeypatch.setattr(base, "load_base", lambda *_: throw(KeyboardInterrupt()))
    monkeypatch.setattr(__main__, "flush", lambda: throw(KeyboardInterrupt()))
    assert refused(monkeypatch, capfd, "generate", "--prompt", "a") == "stopped."
    monkeypatch.setattr(__main__, "run", lambda: throw(KeyboardInterrupt()))
    assert refused(monkeypatch, capfd, "generate", "--prompt", "a") == "stopped."


def test_signals_that_were_ignored_from_the_start_stay_ignored(monkeypatch, capfd):
    """A shell's script starts commands in the background so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seen = []
    monkeypatch.setattr(base, "load_base", lambda *_: seen.append(signal.getsignal(signal.SIGINT)))
    refused(monkeypatch, capfd, "generate", "--prompt", "a")
    assert seen == [signal.SIG_IGN]


STOP_AT_TORCH = """
import os, runpy, signal, sys
class Finder:
    def find_spec(name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIG{})
sys.meta_path.insert(0, Finder)
runpy.run_module("minipeft", run_name="__main__")
"""


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_ctrl_c_while_torch_is_imported_ends_the_command_with_one_line(name):
    done = subprocess.run(
        [sys.executable, "-c", STOP_AT_TORCH.format(name), "generate", "--prompt", "a"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "stopped.\n")


def test_a_full_or_closed_standard_output_is_one_line():
    for redirect, reason in (("/dev/full", "No space left on device"), ("&-", "output is closed")):
        command = f'"{sys.executable}" -m minipeft --help >{redirect}'
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.endswith(f"{reason}\n")
        assert done.stderr.count("\n") == 1


def test_what_a_terminal_cannot_show_is_printed_as_escapes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    words = ["--base", str(SMALL), "--prompt", "Zoë", "--max-new-tokens", "0"]
    run(monkeypatch, "generate", *words)
    assert raw.getvalue() == b"Zo\\xeb\n"


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
    monkeypatch, capfd, tmp_path, records
):
    def fail(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "compare_figure", fail)
    words = ["compare", "--base", str(SMALL), "--output", str(tmp_path / "out")]
    printed, error = failed(monkeypatch, capfd, *words)
    assert error == "error: RuntimeError: no font"
    assert "| prompt tuning | 10 | 2.000 | 0.500 |" in printed
    assert compare.load(tmp_path / "out" / "compare.json") == records


def entries(best: float = 1e-2, **changes) -> list[dict]:
    points = [{"learning_rate": rate, "slot_loss": abs(rate - best)} for rate in (1e-3, 1e-2, 1e-1)]
    entry = {"method": "lora", "random_base": False, "base": "0.3m", "task": "describe"}
    entry |= {"steps": 1, "examples": 400, "size": 8, "best": best, "points": points}
    return [entry | changes]


def test_a_sweep_writes_into_its_output_folder_and_not_over_the_committed_results(
    monkeypatch, capfd, tmp_path
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


def test_a_sweeps_results_are_written_even_if_its_figure_cannot_be_drawn(
    monkeypatch, capfd, tmp_path
):
    def fail(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(sweep, "sweep", lambda *args: entries())
    monkeypatch.setattr(report, "sweep_figure", fail)
    failed(monkeypatch, capfd, "sweep", "--base", str(SMALL), "--output", str(tmp_path))
    assert json.loads((tmp_path / "sweep.json").read_text()) == entries()


def test_a_sweep_in_which_every_run_diverges_says_so(monkeypatch, capfd, tmp_path):
    points = [{"learning_rate": rate} for rate in (1.0, 2.0, 4.0)]
    monkeypatch.setattr(sweep, "sweep", lambda *args: entries(1.0, points=points))
    words = ["sweep", "--base", str(SMALL), "--output", str(tmp_path)]
    printed, error = failed(monkeypatch, capfd, *words)
    assert "| 8 | **inf** | inf | inf |" in printed
    assert "the best learning rate, 1, is at the edge of the grid" in error
