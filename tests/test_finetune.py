"""One fine-tuning run: what it reads, what it saves and when, and how it measures forgetting."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import BASE
from safetensors.torch import load_file, save_file

from minipeft import GPT, PeftModel, quantize_model
from minipeft.lab import compare, evaluate, tasks
from minipeft.lab import finetune as module
from minipeft.lab.base import load_base
from minipeft.lab.finetune import Record, build_model, finetune
from minipeft.lab.recipes import RECIPES, RunConfig

SMALL = BASE.parent / "0.3m"
PROMPT_METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning")
RUN = RunConfig(
    steps=1, learning_rate=1e-2, batch_size=2, n_generate=1, n_evaluations=1, quiet=True
)


def short(task: tasks.Task) -> tasks.Task:
    return replace(task, train=task.train[:4], validation=task.validation[:2], test=task.test[:2])


@pytest.fixture(scope="module")
def small():
    base = load_base(SMALL)
    return replace(base, held_out=base.held_out[:2])


@pytest.fixture(scope="module")
def task(small):
    return short(tasks.load_task(small, "describe"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_reads_its_base_once(monkeypatch, tmp_path, method):
    read, calls = GPT.from_pretrained.__func__, []

    def counted(cls, path):
        calls.append(path)
        return read(cls, path)

    monkeypatch.setattr(GPT, "from_pretrained", classmethod(counted))
    base = replace(load_base(SMALL), held_out=torch.ones(1, 100, dtype=torch.long))
    run = replace(RUN, output=str(tmp_path))
    finetune(base, short(tasks.load_task(base, "describe")), RECIPES[method], run)
    assert len(calls) == 1


def test_bases_that_are_not_shipped_get_a_warm_up_of_3_percent(monkeypatch, small, task, tmp_path):
    seen = []

    def stop(model, batches, run, *_):
        seen.append((run.warmup, run.learning_rate))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", stop)
    for base in (small, replace(small, folder=str(tmp_path))):
        with pytest.raises(KeyboardInterrupt):
            finetune(base, task, RECIPES["lora"], RunConfig(steps=34, quiet=True))
    assert seen[0][0] is None, "RunConfig's own: a tenth of the steps"
    assert seen[1] == (2, 2e-4)


def test_training_does_not_change_the_base(small, task):
    before = small.digest()
    finetune(small, task, RECIPES["full"], RUN)
    assert small.digest() == before


def test_the_digest_changes_with_a_single_weight(small):
    other = replace(small, pretrained=small.model())
    assert other.digest() == small.digest()
    with torch.no_grad():
        other.pretrained.transformer.h[2].mlp.c_fc.weight[0, 0].nextafter_(torch.tensor(9.0))
    assert other.digest() != small.digest()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_base_in_several_files_can_be_fine_tuned_and_saved(small, task, tmp_path, method):
    """Large models are split: an index names the file of every tensor."""
    shutil.copytree(SMALL, tmp_path / "base")
    whole = tmp_path / "base" / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2],
             "model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, tmp_path / "base" / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    base = replace(load_base(tmp_path / "base"), held_out=small.held_out)
    found = finetune(base, task, RECIPES[method], replace(RUN, output=str(tmp_path / "out")))
    expected = finetune(small, task, RECIPES[method], RUN)
    assert found.losses == expected.losses
    assert found.forgetting == expected.forgetting
    assert (tmp_path / "out" / "log.csv").is_file()
    if method == "full":
        assert GPT.from_pretrained(tmp_path / "out").config == small.pretrained.config
    else:
        PeftModel.from_pretrained(GPT.from_pretrained(tmp_path / "base"), tmp_path / "out")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_adapter_or_model_is_saved_before_it_is_evaluated(
    monkeypatch, small, task, tmp_path, method
):
    finetune(small, task, RECIPES[method], replace(RUN, output=str(tmp_path / "whole")))

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(evaluate, "complete", fail)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="out of memory"):
        finetune(small, task, RECIPES[method], replace(RUN, output=str(out)))
    (file,) = out.glob("*model.safetensors")
    assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
    if method == "full":
        load_base(out)  # with its tokenizer
    else:
        model = PeftModel.from_pretrained(small.model(), out)
        trained = [p for n, p in model.named_parameters() if "lora_B" in n]
        assert any(p.any() for p in trained)  # B is zero before training


# --- forgetting ---


def loss_by_hand(logits: torch.Tensor, rows: torch.Tensor) -> float:
    """Cross-entropy over rows[:, 1:]; the last t of the positions belong to the text."""
    logits = logits[:, -rows.shape[1] :][:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


@pytest.mark.parametrize("method", [m for m in RECIPES if m != "frozen"])
def test_forgetting_is_measured_over_the_same_tokens_with_and_without_an_adapter(
    small, task, tmp_path, method
):
    rows, recipe = small.held_out, RECIPES[method]
    run = replace(RUN, output=str(tmp_path))
    record = finetune(small, task, recipe, run)
    found = record.forgetting
    model = build_model(small, recipe, run).eval()
    with torch.no_grad():
        assert found["start"] == pytest.approx(loss_by_hand(model(rows).logits, rows), rel=1e-5)
        base = small.model()
        if method == "qlora":
            quantize_model(base)
        assert found["base"] == pytest.approx(loss_by_hand(base(rows).logits, rows), rel=1e-5)
        if method == "full":
            trained = GPT.from_pretrained(tmp_path).eval()
        else:
            trained = PeftModel.from_pretrained(base, tmp_path).eval()
            assert found["off"] == found["base"]
        assert found["on"] == pytest.approx(loss_by_hand(trained(rows).logits, rows), rel=1e-5)
    assert found["on"] != found["start"]
    if method in PROMPT_METHODS:  # untrained virtual tokens already disturb the base
        assert record.forgot("start") > 0.01
    else:
        assert record.forgot("start") == 0
    assert record.forgot("on") == found["on"] - found["base"]
    assert record.forgot() == record.forgot("on")


def test_forgetting_of_prompt_tuning_by_hand_from_embeddings(small, task):
    """The base itself on 20 prompt vectors and the text; the 20 positions predict nothing."""
    rows = small.held_out
    record = finetune(small, task, RECIPES["prompt_tuning"], RUN)
    torch.manual_seed(RUN.seed)
    base = small.model().eval()
    model = build_model(small, RECIPES["prompt_tuning"], RUN)
    prompt = next(p for p in model.parameters() if p.requires_grad)  # (p, d)
    assert prompt.shape == (20, 72)
    with torch.no_grad():
        text = base.transformer.wte(rows)
        embeds = torch.cat((prompt.expand(len(rows), -1, -1), text), dim=1)  # (b, p + t, d)
        logits = base(inputs_embeds=embeds).logits[:, 20:119]  # those of tokens 1 to 99 of 0 to 99
    by_hand = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert record.forgetting["start"] == pytest.approx(by_hand, rel=1e-5)


def test_without_held_out_text_there_is_no_forgetting(small, task):
    record = finetune(replace(small, held_out=None), task, RECIPES["lora"], RUN)
    assert record.forgetting is None
    assert record.forgot() is None
    assert "forgetting" not in record.to_json()


def test_the_frozen_base_is_measured_and_not_trained(small, task):
    record = finetune(small, task, RECIPES["frozen"], replace(RUN, learning_rate=None))
    assert list(record.forgetting) == ["base"]
    assert (record.trainable, record.losses, record.learning_rate) == (0, None, None)
    assert [row["step"] for row in record.validation] == [0]
    assert 0 <= record.score <= 1


# --- the context ---


@pytest.fixture
def untrained(monkeypatch):
    """Fail the test as soon as a run trains or measures anything."""
    for name in ("text_loss", "task_loss", "complete"):
        monkeypatch.setattr(evaluate, name, lambda *_: pytest.fail("it measured something"))
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("it trained"))


def test_text_and_virtual_tokens_may_fill_the_context_but_not_exceed_it(small):
    """Training may use the whole context, and so may the completion generated after it."""
    base = replace(small, held_out=None)
    example = tasks.load_task(base, "describe").train[0]
    one = tasks.Task("one", [example], [example], [example])
    room = 128 - len(example.prompt_ids) - len(example.completion_ids)
    recipe, run = RECIPES["prompt_tuning"], replace(RUN, batch_size=1)
    finetune(base, one, recipe.with_size(room), run)
    with pytest.raises(ValueError, match=f"{room + 1} virtual tokens exceed the context of 128"):
        finetune(base, one, recipe.with_size(room + 1), run)


@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_held_out_windows_that_exceed_the_context_are_refused_before_training(
    small, task, untrained, method
):
    # the windows, of 100 tokens, are longer than any example
    with pytest.raises(ValueError, match="100 tokens of text and 29 virtual tokens exceed"):
        finetune(small, task, RECIPES[method].with_size(29), RUN)


def test_held_out_windows_may_fill_the_context(small, task):
    record = finetune(small, task, RECIPES["prefix_tuning"].with_size(28), RUN)
    assert record.forgetting["on"] > 0


# --- records ---


def test_a_record_survives_json_and_leaves_out_what_does_not_apply(tmp_path):
    losses, base = [{"step": 100, "loss": 1.0}], {"base": 1.0}
    record = Record(
        "lora", "1m", "describe", 0, 100, 400, score=0.0, bits=None, size=8, weight_bytes=7,
        validation=losses, forgetting=base,
    )  # fmt: skip
    found = record.to_json()
    assert "bits" not in found
    assert found["score"] == 0.0  # zero is a value
    file = tmp_path / "compare.json"
    file.write_text(json.dumps([found, found | {"bleu": 0.5}]))  # a field of the first edition
    assert compare.load(file) == [record, record]
    for wrong, message in (
        ([found | {"seed": "0"}], r"compare\.json: seed must be of type int, got '0'"),
        ([{"method": "lora"}], r"compare\.json does not hold records: .*missing 5 required"),
        ([found | {"score": None}], r"compare\.json: record 0 lacks a score"),
        ([found | {"validation": [{"step": 1}]}], "record 0 lacks a score or losses"),
        ([found, found | {"forgetting": {"on": 1.0}}], "record 1 lacks a score or losses"),
        ([], r"compare\.json must be a list of records, got \[\]"),
        ([7], r"compare\.json must be a list of records, got \[7\]"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            compare.load(file)


def test_settings_and_the_split_are_recorded(small, task):
    run = replace(RUN, weight_decay=0.1, decay_to="start", seed=3, random_base=True)
    record = finetune(small, replace(task, split="half"), RECIPES["lora"].with_size(2), run)
    assert (record.weight_decay, record.decay_to, record.seed) == (0.1, "start", 3)
    assert (record.random_base, record.size, record.split) == (True, 2, "half")
    assert (record.base, record.task, record.n_train) == ("0.3m", "describe", 4)
    assert (record.learning_rate, record.learning_rate_origin) == (1e-2, None)
