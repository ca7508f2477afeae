"""The shipped tasks, `compare` from end to end, and the committed results."""

import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minipeft import LoraConfig, PrefixTuningConfig, get_peft_model
from minipeft.lab import DATA, compare, evaluate, report, sweep, tasks
from minipeft.lab.finetune import build_model
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.targets import list_targets

ALL_TASKS = ["describe", "describe_brackets", "sentiment", "sentiment_unseen"]
RESULTS, PAGE = DATA / "results", DATA / "results" / "README.md"


@pytest.fixture(scope="module")
def task(base):
    return tasks.load_task(base, "describe")


# --- the shipped tasks ---


def test_the_generator_makes_exactly_the_shipped_tasks(tmp_path):
    code = (
        "import pathlib, sys; from data import build; build.build_tasks(pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=DATA.parent, check=True, timeout=60)
    made = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*.*")}
    folder = DATA / "tasks"
    assert made == {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*")}
    assert len(made) == 16


@pytest.mark.parametrize("name", ["describe", "describe_brackets"])
def test_no_training_prompt_contains_a_held_out_name(base, name):
    task = tasks.load_task(base, name)

    def names(examples):
        return {v for e in examples for _, v in task.facts(e.prompt)}

    trained = names(task.train)
    assert len(trained) > 100
    assert not trained & names(task.validation)
    assert not trained & names(task.test)
    assert not names(task.validation) & names(task.test)


@pytest.mark.parametrize("name", ["sentiment", "sentiment_unseen"])
def test_no_training_prompt_contains_a_held_out_opinion_word(base, world, name):
    task = tasks.load_task(base, name)
    opinions = set(world[1].GOOD_THINGS + world[1].BAD_THINGS)

    def words(examples):
        return {w for e in examples for w in e.prompt.replace(".", " ").split()} & opinions

    trained, validated, tested = map(words, (task.train, task.validation, task.test))
    assert len(trained) > 70
    assert len(validated) == len(tested) == 18
    assert len(trained | validated | tested) == len(trained) + 36  # disjoint
    assert 0.4 < sum(e.completion == task.test[0].completion for e in task.test) / 400 < 0.6


@pytest.mark.parametrize("name", ALL_TASKS)
def test_every_shipped_task_loads_and_no_prompt_repeats_or_ends_with_a_space(base, name):
    task = tasks.load_task(base, name)
    assert [len(part) for part in (task.train, task.validation, task.test)] == [400, 100, 400]
    assert task.metric == ("slot accuracy" if name.startswith("describe") else "exact match")
    assert all(e.completion_ids[-1] == base.end for e in task.train)
    prompts = [e.prompt for e in task.train + task.validation + task.test]
    assert len(set(prompts)) == len(prompts) == 900
    assert not any(prompt.endswith(" ") for prompt in prompts)


def test_the_list_of_shipped_tasks_is_complete_and_an_unknown_name_is_refused(base):
    assert sorted(path.name for path in (DATA / "tasks").iterdir()) == ALL_TASKS
    known = "known tasks: describe, describe_brackets, sentiment, sentiment_unseen"
    with pytest.raises(ValueError, match=f"there is no task 'descibe'; {known}"):
        tasks.load_task(base, "descibe")


def test_the_reference_scores_one_and_swapped_values_score_zero(task):
    examples = task.test[:50]
    texts = [e.completion for e in examples]
    assert task.score(examples, texts) == 1.0
    assert task.score(examples, texts[1:] + texts[:1]) < 0.1
    templates = [" ".join(p[0] for p in task.phrasings.values())] * 50
    assert task.score(examples, templates) == 0


def test_without_slots_the_score_is_the_share_of_exact_matches(base):
    examples = tasks.load_task(base, "sentiment").test[:4]
    texts = [f" {e.completion.strip()} " for e in examples[:3]] + ["neither"]
    assert replace(tasks.load_task(base, "sentiment")).score(examples, texts) == 0.75


def test_slot_tokens_spell_the_values(task, base):
    for e in task.test[:20]:
        slots = [i for i, slot in zip(e.completion_ids, e.is_slot, strict=True) if slot]
        text = base.tokenizer.decode(slots)
        assert all(value in e.completion for _, value in task.facts(e.prompt))
        assert sorted(text.split()) == sorted(w for _, v in task.facts(e.prompt) for w in v.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"prompt": "a"}', 'line 2: a "completion" is missing: a text that is not empty'),
        ('{"prompt": "a", "completion": ""}', 'line 2: a "completion" is missing'),
        ('["a"]', r"line 2 must be a JSON object, got \['a'\]"),
        ("\n{", "line 3 is not JSON"),
    ],
)
def test_an_error_in_a_task_file_names_the_line(base, tmp_path, line, message):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "completion": " b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        tasks.load_jsonl(file, base)


def test_files_without_examples_or_with_text_that_cannot_be_encoded_are_refused(base, tmp_path):
    file = tmp_path / "task.jsonl"
    with pytest.raises(ValueError, match=r"task\.jsonl is missing"):
        tasks.load_jsonl(file, base)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text: 'utf-8' codec"):
        tasks.load_jsonl(file, base)
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="contains no examples"):
        tasks.load_jsonl(file, base)
    file.write_text(json.dumps({"prompt": "\ud800", "completion": "b"}))  # half of a pair
    with pytest.raises(ValueError, match="line 1: the text cannot be encoded"):
        tasks.load_jsonl(file, base)


def test_a_batch_is_padded_on_the_right_and_only_completions_are_labelled():
    examples = [
        tasks.Example("", "", [5, 6], [7, 0], [False] * 2),
        tasks.Example("", "", [5], [0], [False]),
    ]
    batch = tasks.collate(examples, 0, "cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 0], [-100, 0, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_batches_contain_every_example_once_before_any_repeats():
    stream = tasks.shuffled(list(range(10)), 4, seed=0)
    seen = [i for _ in range(5) for i in next(stream)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


# --- measurements, by hand ---


class Next(nn.Module):
    """Over 4 tokens: probability 3/6 for the next number, 1/6 for each other one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(math.log(3)))
        self.modes = []

    def forward(self, input_ids, attention_mask=None):
        self.modes.append((self.training, torch.is_grad_enabled()))
        following = nn.functional.one_hot((input_ids + 1) % 4, 4)
        return SimpleNamespace(logits=self.scale * following)


RIGHT, WRONG = math.log(2), math.log(6)  # the losses of a right and of a wrong prediction


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_text_loss_is_the_mean_over_all_predicted_tokens(batch_size):
    rows = torch.tensor([[0, 1, 2], [0, 0, 1], [1, 1, 1]])  # right, right; wrong, right; wrong × 2
    model = Next().train()
    loss = evaluate.text_loss(model, rows, batch_size)
    assert loss == pytest.approx((3 * RIGHT + 3 * WRONG) / 6)
    assert set(model.modes) == {(False, False)}, "in eval mode, without gradients"
    assert model.training, "the mode must be restored"
    evaluate.text_loss(model.eval(), rows)
    assert not model.training


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_task_loss_counts_completions_and_separates_slots(batch_size):
    """0 → 1 is right and a slot, 1 → 0 is wrong; 1 → 2 and 2 → 3 are right. 2 → 1 is a prompt."""
    examples = [
        tasks.Example("", "", [0], [1, 0], [True, False]),
        tasks.Example("", "", [2, 1], [2, 3], [False, False]),
    ]
    found = evaluate.task_loss(Next(), examples, 0, batch_size)
    assert found == {
        "loss": pytest.approx((3 * RIGHT + WRONG) / 4),
        "slot_loss": pytest.approx(RIGHT),
        "template_loss": pytest.approx((2 * RIGHT + WRONG) / 3),
    }
    assert evaluate.task_loss(Next(), examples[1:], 0) == {"loss": pytest.approx(RIGHT)}


def test_losses_of_a_bfloat16_model_are_computed_in_float32():
    """Its log 3 is 1.1015625; wrong predictions cost log(3 + exp(1.1015625)) = 1.7927…"""
    wrong = math.log(3 + math.exp(1.1015625))
    rows = torch.tensor([[0, 1], [1, 1], [2, 2]])  # right, wrong, wrong
    expected = pytest.approx((3 * wrong - 1.1015625) / 3, rel=1e-6)
    assert evaluate.text_loss(Next().bfloat16(), rows) == expected
    examples = [tasks.Example("", "", [p], [c], [False]) for p, c in rows.tolist()]
    assert evaluate.task_loss(Next().bfloat16(), examples, 0) == {"loss": expected}


@pytest.mark.parametrize(("n_positions", "limits"), [(99, [11, 11]), (9, [6, 8])])
def test_completions_get_8_tokens_more_than_the_longest_but_stay_in_the_context(
    n_positions, limits
):
    calls = []

    class Writes(Next):
        config = SimpleNamespace(n_positions=n_positions)

        def generate(self, input_ids, attention_mask, **options):
            calls.append((input_ids.tolist(), attention_mask.tolist(), options))
            return torch.cat((input_ids, input_ids + 1), dim=1)

    tokenizer = SimpleNamespace(decode_batch=lambda rows: [str(row) for row in rows])
    base = SimpleNamespace(end=9, tokenizer=tokenizer, hf_tokenizer=None)
    lengths = [([1, 2], [3]), ([1, 2, 3], [0, 0, 0]), ([5], [0])]
    examples = [tasks.Example("", "", p, c, [False] * len(c)) for p, c in lengths]
    assert evaluate.complete(Writes(), base, examples, 2) == ["[10, 2, 3]", "[2, 3, 4]", "[6]"]
    assert [ids for ids, _, _ in calls] == [[[9, 1, 2], [1, 2, 3]], [[5]]]
    assert [mask for _, mask, _ in calls] == [[[0, 1, 1], [1, 1, 1]], [[1]]]
    assert [options["max_new_tokens"] for _, _, options in calls] == limits
    assert all(options["eos_token_id"] == 9 for _, _, options in calls)


def test_batches_are_smaller_if_the_vocabulary_is_large():
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=2**16))
    assert evaluate.rows_per_batch(model, 2**6, 64) == 4
    assert evaluate.rows_per_batch(model, 2**6, 3) == 3
    assert evaluate.rows_per_batch(model, 2**9, 64) == 1
    assert evaluate.rows_per_batch(SimpleNamespace(), 100, 64) == 64


def test_virtual_tokens_take_positions_of_the_context(gpt):
    assert evaluate.virtual_tokens(gpt) == 0
    model = get_peft_model(gpt, PrefixTuningConfig(num_virtual_tokens=5))
    model.add_adapter("lora", LoraConfig(target_modules=["c_attn"]))
    assert evaluate.virtual_tokens(model) == 5
    model.set_adapter("lora")
    model.delete_adapter("default")
    assert evaluate.virtual_tokens(model) == 0


class Square(nn.Module):
    """Sum of (x w)², of four numbers. Checkpointing replaces it by the sum of x w."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
        self.checkpointing, self.passes = False, []

    def forward(self, x):
        torch.rand(1)
        self.passes.append(self.checkpointing)
        y = x * self.w
        return SimpleNamespace(loss=y.sum() if self.checkpointing else y.square().sum())

    def gradient_checkpointing_enable(self):
        self.checkpointing = True


def test_what_checkpointing_saves_and_costs(monkeypatch):
    """The backward pass needs x for the gradient of w, and y for that of y²: 16 bytes each."""
    model, batch = Square(), {"x": torch.ones(4)}
    assert evaluate.activation_bytes(model, batch) == 32
    # four passes each; the first is not counted: medians of 1, 6, 2 and of 5, 3, 4 seconds
    ticks = [t for seconds in (9, 1, 6, 2, 9, 5, 3, 4) for t in (100.0, 100.0 + seconds)]
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(perf_counter=iter(ticks).__next__))
    state = torch.get_rng_state()
    found = evaluate.checkpoint_gradients(model, batch)
    assert found == {"bytes_saved": 16, "seconds_lost": 2.0}
    assert torch.equal(torch.get_rng_state(), state), "the random numbers must not depend on it"
    assert model.w.grad is None
    assert model.checkpointing, "it must stay on"
    assert model.passes == [False] * 6 + [True] * 5


def test_bytes_of_weights_in_memory_and_on_disk():
    """12 weights and 4 biases, 4 + 4 of the norm, 4 + 4 statistics in float32, and one int64."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert evaluate.weight_bytes(model) == 4 * (12 + 4 + 8 + 8) + 8

    def save(folder):
        for name, n in (("a.safetensors", 10), ("b/b.safetensors", 5), ("config.json", 99)):
            file = Path(folder) / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(bytes(n))

    assert evaluate.disk_bytes(SimpleNamespace(save_pretrained=save)) == 15


# --- compare ---


@pytest.mark.slow
def test_compare_end_to_end(base, task, tmp_path):
    run = RunConfig(steps=2, n_generate=4, quiet=True, batch_size=4)
    short = replace(task, validation=task.validation[:8], test=task.test[:8])
    methods = ["frozen", "full", "lora", "adalora", "prefix_tuning", "qlora"]
    records = compare.compare(base, short, [RECIPES[m] for m in methods], run, 1)
    assert [r.method for r in records] == [*methods, "full"]
    assert [r.random_base for r in records] == [False] * 6 + [True]
    full, lora, adalora, _, qlora = records[1:6]
    assert qlora.bits == pytest.approx(4.127, abs=2e-3)
    assert lora.bits is None
    assert qlora.parameters == lora.parameters
    assert qlora.weight_bytes < 0.5 * lora.weight_bytes  # the embeddings are not quantized
    assert qlora.optimizer_bytes == lora.optimizer_bytes
    assert qlora.paging["faults"] == 8  # of 64 KiB, and all fit: each is fetched once
    assert qlora.forgetting["base"] == pytest.approx(lora.forgetting["base"], abs=0.02)
    assert sum(adalora.ranks.values()) == 8 * len(adalora.ranks)
    assert adalora.losses[0] == pytest.approx(lora.losses[0])  # the penalty is left out
    assert full.trainable == full.parameters
    assert lora.trainable < 0.2 * full.trainable
    assert lora.optimizer_bytes < 0.2 * full.optimizer_bytes
    assert lora.gradient_bytes == 4 * lora.trainable
    assert lora.disk_bytes < 0.2 * full.disk_bytes
    for record in records[2:6]:
        assert record.forgetting["off"] == record.forgetting["base"]
    compare.save(records, short, tmp_path)
    assert len(json.loads((tmp_path / "compare.json").read_text())) == 7
    assert [r.method for r in compare.load(tmp_path / "compare.json")] == [*methods, "full"]
    for name in ("compare.png", "ranks.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert compare.table(records, short).count("\n") == 8


def test_placements_have_equal_numbers_of_parameters_and_separate_rows(base, task):
    trainable = {}
    for place, part in (("all-linear", "."), ("attention", ".attn."), ("mlp", ".mlp.")):
        model = build_model(base, RECIPES["lora"].placed(place), RunConfig(steps=10))
        trainable[place] = model.get_nb_trainable_parameters()[0]
        adapted = {n.split(".lora_A")[0] for n, _ in model.named_modules() if "lora_A" in n}
        assert len(adapted) == (16 if place == "all-linear" else 8)
        assert all(part in name for name in adapted)
    assert list(trainable.values()) == pytest.approx([trainable["all-linear"]] * 3, rel=0.02)
    short = replace(task, validation=task.validation[:4], test=task.test[:4])
    recipes = [RECIPES["full"], *(RECIPES["lora"].placed(p) for p in ("attention", "mlp"))]
    run = RunConfig(steps=1, n_generate=2, quiet=True, batch_size=2)
    records = compare.compare(base, short, recipes, run, 1, control=False)
    assert list(compare.rows(records)) == ["full", "lora, attention", "lora, mlp"]
    with pytest.raises(ValueError, match="'head' matches no module; linear layers: c_attn"):
        build_model(base, RECIPES["lora"].placed("head"), RunConfig(steps=10))


def test_list_targets_has_a_row_per_kind_of_layer(gpt):
    rows = {row["name"]: row for row in list_targets(gpt)}
    assert list(rows) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert rows["attn.c_attn"] == {
        "name": "attn.c_attn", "place": "attention", "count": 2, "in": 24, "out": 72,
        "parameters": 2 * 24 * 72, "rank 1 adapters": 2 * (24 + 72),
    }  # fmt: skip


# --- the committed results ---


@pytest.mark.parametrize(
    ("name", "file", "frozen", "full", "random"),
    [
        ("describe", "compare.json", 0.25, 0.9, 0.45),
        ("sentiment", "sentiment/compare.json", 0.6, 0.9, 0.6),
    ],
)
def test_the_page_shows_the_committed_run_and_the_task_needs_its_base(
    base, name, file, frozen, full, random
):
    task = tasks.load_task(base, name)
    records = compare.load(RESULTS / file)
    table = compare.table(records, task, wide=False)
    assert table in PAGE.read_text()
    assert max(map(len, table.splitlines())) <= 100  # columns of a terminal
    assert {(r.base, r.task, r.steps) for r in records} == {("3m", name, 100)}
    by_row = {name: compare.mean(row, "score") for name, row in compare.rows(records).items()}
    assert by_row["frozen"] < frozen
    assert by_row["full"] > full
    assert by_row[compare.RANDOM] < random
    for record in records:
        before = record.forgetting["base"]
        assert record.forgetting.get("off", before) == before


def test_the_page_shows_the_committed_study_and_sweep(world):
    study, page = world[3], PAGE.read_text()
    sweeps = json.loads((RESULTS / "sweep.json").read_text())
    sweep.check(sweeps)
    placed = compare.load(RESULTS / "placement" / "compare.json")
    for table in (
        study.table(study.load()),
        study.equal_score(sweeps),
        study.rank_table(sweeps),
        study.placement_table(placed),
    ):
        assert table in page


def test_the_pages_qlora_numbers_match_the_committed_results():
    rows = compare.rows(compare.load(RESULTS / "compare.json"))
    lora, qlora = rows["lora"], rows["qlora"]
    assert {round(r.bits, 2) for r in qlora} == {4.13}
    assert qlora[0].weight_bytes < 0.3 * lora[0].weight_bytes
    assert qlora[0].paging["evictions"] > 0
    fall = compare.mean(lora, "score") - compare.mean(qlora, "score")
    assert fall == pytest.approx(0.04, abs=0.006)
    base = qlora[0].weight_bytes - 4 * qlora[0].trainable, rows["full"][0].weight_bytes
    assert [round(size / 1e6, 1) for size in base] == [3.2, 12.4]
    placed = compare.rows(compare.load(RESULTS / "placement" / "compare.json"))
    pairs = zip(placed["lora, attention"], placed["lora, all-linear"], strict=True)
    gaps = [a.score - b.score for a, b in pairs]
    middle, half = statistics.mean(gaps), report.interval(gaps)
    assert [round(x, 2) for x in (middle, middle - half, middle + half)] == [0.03, -0.03, 0.09]
    verdicts = compare.rows(compare.load(RESULTS / "sentiment" / "compare.json"))
    pairs = zip(verdicts["p_tuning"], verdicts["prompt_tuning"], strict=True)
    assert all(a.score > b.score for a, b in pairs)
    same = {"base": "3m", "task": "describe", "steps": 100, "examples": 400, "size": 8}
    points = {
        e["method"]: {p["learning_rate"]: p for p in e["points"]}
        for e in json.loads((RESULTS / "sweep.json").read_text())
        if same.items() <= e.items()
    }
    for rate in (0.005, 0.01):  # the two best
        four_bits, plain = points["qlora"][rate], points["lora"][rate]
        assert four_bits["score"] >= plain["score"]
        assert four_bits["forgetting"] == pytest.approx(plain["forgetting"], abs=0.15)
    assert points["qlora"][0.01]["slot_loss"] < 1.02 * points["qlora"][0.005]["slot_loss"]


def test_the_pages_bitfit_and_bottleneck_numbers_match_the_committed_results():
    share = {}
    for folder in (RESULTS, RESULTS / "sentiment"):
        records = compare.load(folder / "compare.json")
        rows = compare.rows(records)
        forgot = {
            name: statistics.mean(r.forgetting["on"] for r in rows[name])
            for name in ("lora", "bitfit", "bottleneck")
        }
        assert min(forgot["bitfit"], forgot["bottleneck"]) > forgot["lora"]
        for name in ("bitfit", "bottleneck"):
            share[folder.name, name] = compare.share_of_gap(records, rows[name])
    size = {name: rows[name][0].trainable / rows["lora"][0].trainable for name in forgot}
    assert size["bitfit"] < 0.1
    assert size["bottleneck"] == pytest.approx(0.5, abs=0.03)
    assert share["results", "bitfit"] == pytest.approx(0.5, abs=0.05)
    assert share["results", "bottleneck"] == pytest.approx(0.9, abs=0.02)
    assert share["sentiment", "bitfit"] == share["sentiment", "bottleneck"] == 1
    same = {"method": "bitfit", "base": "3m", "task": "sentiment"}
    sweeps = json.loads((RESULTS / "sweep.json").read_text())
    (entry,) = [e for e in sweeps if same.items() <= e.items()]
    perfect = [p for p in entry["points"] if p["score"] == 1]
    assert max(perfect, key=lambda p: p["forgetting"])["learning_rate"] == entry["best"]
    assert perfect[0]["forgetting"] == pytest.approx(0.04, abs=0.005)


def test_seconds_lost_are_the_difference_of_two_durations(gpt, ids, monkeypatch):
    """On a clock that ticks once per reading, a pass takes 1 s with and without checkpointing."""
    clock = iter(range(100, 200))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock))
    assert (
        evaluate.checkpoint_gradients(gpt, {"input_ids": ids, "labels": ids})["seconds_lost"] == 0
    )


def test_only_prompt_methods_have_virtual_tokens(gpt):
    assert evaluate.virtual_tokens(gpt) == 0
    model = get_peft_model(gpt, LoraConfig(target_modules=["c_fc"]))
    assert evaluate.virtual_tokens(model) == 0
    assert evaluate.virtual_tokens(get_peft_model(model.unload(), PrefixTuningConfig(3))) == 3
