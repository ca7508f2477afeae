import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import BASE

from minipeft import GPT
from minipeft.lab import compare, finetune, placement, sweep, tasks

ALL_TASKS = ["describe", "describe_brackets", "sentiment", "sentiment_unseen"]


@pytest.fixture(scope="module")
def task(base):
    return tasks.load_task(base.tokenizer, base.end, 256, "describe")


def test_the_shipped_tasks_are_what_the_generator_makes(tmp_path):
    code = "import build, pathlib, sys; build.build_tasks(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=tasks.DATA, check=True, timeout=60)
    made = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*.*")}
    folder = tasks.DATA / "tasks"
    assert made == {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*")}
    assert len(made) == 16


@pytest.mark.parametrize("name", ["describe", "describe_brackets"])
def test_held_out_names_stand_in_no_training_prompt(base, name):
    task = tasks.load_task(base.tokenizer, base.end, 256, name)

    def names(examples):
        return {v for e in examples for _, v in task.facts(e.prompt)}

    trained = names(task.train)
    assert len(trained) > 100
    assert not trained & names(task.validation)
    assert not trained & names(task.test)
    assert not names(task.validation) & names(task.test)


@pytest.mark.parametrize("name", ["sentiment", "sentiment_unseen"])
def test_held_out_opinion_words_stand_in_no_training_prompt(base, world, name):
    task = tasks.load_task(base.tokenizer, base.end, 256, name)
    opinions = set(world[1].GOOD_THINGS + world[1].BAD_THINGS)

    def words(examples):
        return {w for e in examples for w in e.prompt.replace(".", " ").split()} & opinions

    trained, validated, tested = map(words, (task.train, task.validation, task.test))
    assert len(trained) > 70
    assert len(validated) == len(tested) == 18
    assert len(trained | validated | tested) == len(trained) + 36  # apart
    assert 0.4 < sum(e.completion == task.test[0].completion for e in task.test) / 200 < 0.6


@pytest.mark.parametrize("name", ALL_TASKS)
def test_no_prompt_comes_twice_or_ends_in_a_space(base, name):
    task = tasks.load_task(base.tokenizer, base.end, 256, name)
    prompts = [e.prompt for e in task.train + task.validation + task.test]
    assert len(set(prompts)) == len(prompts) == 700
    assert not any(prompt.endswith(" ") for prompt in prompts)


def test_the_reference_scores_one_and_swapped_values_do_not(task):
    examples = task.test[:50]
    texts = [e.completion for e in examples]
    assert task.score(examples, texts) == {"score": 1.0, "bleu": pytest.approx(1.0)}
    assert task.score(examples, texts[1:] + texts[:1])["score"] < 0.1
    frames = [" ".join(p[0] for p in task.phrasings.values())] * 50
    assert task.score(examples, frames)["score"] == 0


def test_slot_tokens_spell_the_values(task, base):
    for e in task.test[:20]:
        slots = [i for i, slot in zip(e.completion_ids, e.is_slot, strict=True) if slot]
        text = base.tokenizer.decode(slots)
        assert all(value in e.completion for _, value in task.facts(e.prompt))
        assert sorted(text.split()) == sorted(w for _, v in task.facts(e.prompt) for w in v.split())


def test_bleu():
    assert tasks.bleu(["a b c d e"], ["a b c d e"]) == pytest.approx(1)
    assert tasks.bleu(["a b c d"], ["a b c d e"]) == pytest.approx(2.718281828 ** (1 - 5 / 4))
    assert tasks.bleu(["x y z"], ["a b c d"]) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"prompt": "a"}', 'line 2 needs a "completion"'),
        ('{"prompt": "a", "completion": ""}', 'line 2 needs a "completion"'),
        ('["a"]', 'line 2 needs a "prompt"'),
        ("\n{", "line 3 is not JSON"),
        (
            json.dumps({"prompt": "a " * 50, "completion": " b"}),
            "line 2 has .* the context holds 40",
        ),
    ],
)
def test_a_bad_line_is_named(base, tmp_path, line, message):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "completion": " b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        tasks.load_jsonl(file, base.tokenizer, base.end, 40)


def test_a_batch_is_padded_on_the_right_and_only_completions_are_labelled():
    examples = [
        tasks.Example("", "", [5, 6], [7, 0], [False] * 2),
        tasks.Example("", "", [5], [0], [False]),
    ]
    batch = tasks.collate(examples, 0, "cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 0], [-100, 0, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_batches_go_through_everything_once_before_repeating():
    stream = tasks.shuffled(list(range(10)), 4, seed=0)
    seen = [i for _ in range(5) for i in next(stream)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_a_base_without_an_end_token_is_refused(tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": None}))
    with pytest.raises(ValueError, match="eos_token_id is None, which is no token"):
        finetune.load_base(tmp_path / "base")


def test_windows_begin_with_a_document():
    rows = tasks.windows([[1] * 3, [2] * 3, [3] * 9, [4]], 4, 0)
    assert rows.tolist() == [[1, 1, 1, 0], [2, 2, 2, 0], [3] * 4, [3] * 4]


def test_accumulation_gives_the_gradient_of_the_whole_batch(gpt):
    ids = torch.randint(1, 61, (4, 8))
    labels = ids.clone()
    labels[0, :6] = -100  # parts of unequal weight
    batch = {"input_ids": ids, "labels": labels}
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]
    results = []
    for micro in ([batch], parts):
        torch.manual_seed(0)
        model = GPT(gpt.config)
        record = finetune.train(model, [micro] * 3, 3, 1e-2, quiet=True)
        results.append((record["losses"], model.lm_head.weight))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-4)


def test_nothing_trainable_and_a_loss_that_is_not_finite_stop_the_run(gpt):
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    batch["labels"] = batch["input_ids"]
    gpt.transformer.wpe.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        finetune.train(gpt, [[batch]], 1, 1e-3, quiet=True)
    with pytest.raises(ValueError, match="nothing is trainable"):
        finetune.train(gpt.requires_grad_(False), [[batch]], 1, 1e-3, quiet=True)


def test_compare_end_to_end(base, task, tmp_path):
    options = {"generated": 4, "quiet": True, "batch_size": 4}
    short = tasks.Task(
        "describe", task.train, task.validation[:8], task.test[:8], task.fact, task.phrasings
    )
    methods = ["frozen", "full", "lora", "adalora", "prefix_tuning", "qlora"]
    records = compare.compare(base, short, methods, 2, 1, **options)
    assert [r["method"] for r in records] == [*methods, "full"]
    full, lora, adalora, _, qlora = records[1:6]
    assert qlora["bits"] == pytest.approx(4.127, abs=2e-3)
    assert lora["bits"] is None
    assert qlora["parameters"] == lora["parameters"]
    assert qlora["weight_bytes"] < 0.5 * lora["weight_bytes"]  # the embeddings are not quantized
    assert qlora["optimizer_bytes"] == lora["optimizer_bytes"]
    assert qlora["paging"]["faults"] == 8  # of 64 KiB, and all fit: each is fetched once
    assert qlora["forgetting"]["base"] == pytest.approx(lora["forgetting"]["base"], abs=0.02)
    assert sum(adalora["ranks"].values()) == 8 * len(adalora["ranks"])
    assert adalora["losses"][0] == pytest.approx(lora["losses"][0])  # the penalty is left out
    assert full["trainable"] == full["parameters"]
    assert lora["trainable"] < 0.2 * full["trainable"]
    assert lora["optimizer_bytes"] < 0.2 * full["optimizer_bytes"]
    assert lora["gradient_bytes"] == 4 * lora["trainable"]
    assert lora["disk_bytes"] < 0.2 * full["disk_bytes"]
    for record in records[2:6]:
        assert record["forgetting"]["off"] == record["forgetting"]["base"]
    compare.save(records, short, tmp_path)
    assert len(json.loads((tmp_path / "compare.json").read_text())) == 7
    for name in ("compare.png", "ranks.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert compare.table(records, short).count("\n") == 8


def test_placements_have_equal_numbers_of_parameters_and_rows_of_their_own(base, task):
    trainable = {}
    for place, part in (("all-linear", "."), ("attention", ".attn."), ("mlp", ".mlp.")):
        model = finetune.build_model(base, "lora", 0, 10, targets=place)
        trainable[place] = model.get_nb_trainable_parameters()[0]
        adapted = {n.split(".lora_A")[0] for n, _ in model.named_modules() if "lora_A" in n}
        assert len(adapted) == (16 if place == "all-linear" else 8)
        assert all(part in name for name in adapted)
    assert list(trainable.values()) == pytest.approx([trainable["all-linear"]] * 3, rel=0.02)
    short = replace(task, validation=task.validation[:4], test=task.test[:4])
    options = {"generated": 2, "quiet": True, "batch_size": 2, "control": False}
    records = compare.compare(
        base, short, ["full", "lora"], 1, 1, targets=["attention", "mlp"], **options
    )
    assert list(compare.rows(records)) == ["full", "lora, attention", "lora, mlp"]
    with pytest.raises(ValueError, match="targets is 'head'; there are: attention, mlp"):
        finetune.build_model(base, "lora", 0, 10, targets="head")


def test_what_can_be_targeted_is_listed_by_kind(gpt):
    rows = {row["name"]: row for row in placement.list_targets(gpt)}
    assert list(rows) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert rows["attn.c_attn"] == {
        "name": "attn.c_attn", "count": 2, "in": 24, "out": 72, "parameters": 2 * 24 * 72,
        "rank 1 adapters": 2 * (24 + 72),
    }  # fmt: skip
    assert "| mlp.c_proj | 2 | 96 | 24 | 4,608 | 240 |" in placement.table(list(rows.values()))


def test_the_commands_help_and_one_clear_error(tmp_path):
    def run(*words):
        command = [sys.executable, "-m", "minipeft", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert "--methods" in run("compare", "--help").stdout
    done = run("generate", "--prompt", "The names:", "--base", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no")


@pytest.mark.parametrize(
    ("name", "file", "frozen", "full", "random"),
    [
        ("describe", "compare.json", 0.25, 0.9, 0.45),
        ("sentiment", "sentiment/compare.json", 0.6, 0.9, 0.6),
    ],
)
def test_the_readmes_table_is_the_committed_run_and_the_task_needs_its_base(
    base, name, file, frozen, full, random
):
    task = tasks.load_task(base.tokenizer, base.end, 256, name)
    records = compare.load(tasks.DATA / "results" / file)
    assert compare.table(records, task) in (tasks.DATA.parent / "README.md").read_text()
    assert {(r["base"], r["task"], r["steps"]) for r in records} == {("3m", name, 100)}
    by_row = {name: compare.mean(row, "score") for name, row in compare.rows(records).items()}
    assert by_row["frozen"] < frozen
    assert by_row["full"] > full
    assert by_row[compare.RANDOM] < random
    for record in records:
        assert (
            record["forgetting"].get("off", record["forgetting"]["base"])
            == (record["forgetting"]["base"])
        )


def test_the_readmes_other_tables_are_the_committed_study_and_sweep(world):
    study, page = world[3], (tasks.DATA.parent / "README.md").read_text()
    sweeps = json.loads((tasks.DATA / "results" / "sweep.json").read_text())
    sweep.check(sweeps)
    placed = compare.load(tasks.DATA / "results" / "placement" / "compare.json")
    for table in (
        study.table(study.load()),
        study.equal_score(sweeps),
        study.rank_table(sweeps),
        study.placement_table(placed),
    ):
        assert table in page


def test_what_the_readme_says_of_qlora_is_in_the_committed_results():
    rows = compare.rows(compare.load(tasks.DATA / "results" / "compare.json"))
    lora, qlora = rows["lora"], rows["qlora"]
    assert {round(r["bits"], 2) for r in qlora} == {4.13}
    assert qlora[0]["weight_bytes"] < 0.3 * lora[0]["weight_bytes"]
    assert qlora[0]["paging"]["evictions"] > 0
    fall = compare.mean(lora, "score") - compare.mean(qlora, "score")
    assert fall == pytest.approx(0.04, abs=0.006)
    same = {"base": "3m", "task": "describe", "steps": 100, "examples": 400, "size": 8}
    points = {
        e["method"]: {p["learning_rate"]: p for p in e["points"]}
        for e in json.loads((tasks.DATA / "results" / "sweep.json").read_text())
        if same.items() <= e.items()
    }
    for rate in (0.005, 0.01):  # the two best
        four_bits, plain = points["qlora"][rate], points["lora"][rate]
        assert four_bits["score"] >= plain["score"]
        assert four_bits["forgetting"] == pytest.approx(plain["forgetting"], abs=0.15)
    assert points["qlora"][0.01]["slot_loss"] < 1.02 * points["qlora"][0.005]["slot_loss"]


def test_what_the_readme_says_of_bitfit_and_bottleneck_is_in_the_committed_results():
    results = tasks.DATA / "results"
    share = {}
    for folder in (results, results / "sentiment"):
        records = compare.load(folder / "compare.json")
        rows = compare.rows(records)
        forgot = {
            name: statistics.mean(r["forgetting"]["on"] for r in rows[name])
            for name in ("lora", "bitfit", "bottleneck")
        }
        assert min(forgot["bitfit"], forgot["bottleneck"]) > forgot["lora"]
        for name in ("bitfit", "bottleneck"):
            share[folder.name, name] = compare.share_of_gap(records, rows[name])
    size = {name: rows[name][0]["trainable"] / rows["lora"][0]["trainable"] for name in forgot}
    assert size["bitfit"] < 0.1
    assert size["bottleneck"] == pytest.approx(0.5, abs=0.03)
    assert share["results", "bitfit"] == pytest.approx(0.5, abs=0.05)
    assert share["results", "bottleneck"] == pytest.approx(0.9, abs=0.02)
    assert share["sentiment", "bitfit"] == share["sentiment", "bottleneck"] == 1
    same = {"method": "bitfit", "base": "3m", "task": "sentiment"}
    sweeps = json.loads((results / "sweep.json").read_text())
    (entry,) = [e for e in sweeps if same.items() <= e.items()]
    perfect = [p for p in entry["points"] if p["score"] == 1]
    assert max(perfect, key=lambda p: p["forgetting"])["learning_rate"] == entry["best"]
    assert perfect[0]["forgetting"] == pytest.approx(0.04, abs=0.005)
