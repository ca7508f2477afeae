"""Mutated files of every format either load as valid objects or raise one clear error."""

import copy
import dataclasses
import functools
import json
import math
import os
import random
import shutil
import types
import typing
from collections.abc import Callable
from pathlib import Path

import fuzz
import pytest
import torch
from conftest import BASE, tiny_config
from fuzz import Attempt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapters import CONFIGS, IDS, checksum, small_base
from test_sweep import entry

from minipeft import GPT, AdaLoraConfig, BottleneckConfig, LoraConfig, PeftModel, get_peft_model
from minipeft.lab import compare, sweep, tasks
from minipeft.lab.base import copy_tokenizer, load_base
from minipeft.lab.checkpoint import Checkpoint
from minipeft.lab.finetune import Record

TEXT = "The cook is Sam Hill and the clerk is Ann Mills. aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa! " * 4


# --- the formats: each writes a folder, and prepares an attempt to read it ---


def state_of(model: torch.nn.Module) -> tuple:
    """What a failed load must not change: tensors, modes, what is trained, the random state."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    free = [(name, p.requires_grad) for name, p in model.named_parameters()]
    return checksum(model), modules, free, torch.get_rng_state().tolist()


def check_model(model: torch.nn.Module, ids=IDS) -> None:
    tensors = model.state_dict()
    assert all(t.is_floating_point() and t.isfinite().all() for t in tensors.values())
    if all(t.abs().max() < 1e4 for t in tensors.values()):  # else it may overflow
        assert model.eval()(ids).logits.isfinite().all(), "logits"


class Outputs:
    """What a folder's model computes, to compare with it again."""

    def __init__(self, folder: Path, model: torch.nn.Module):
        self.weights, self.logits = weights_of(folder), model.eval()(IDS).logits

    def check(self, folder: Path, model: torch.nn.Module) -> None:
        """With the same weights, whatever the config may say, a model computes the same."""
        if weights_of(folder) == self.weights:
            logits = model.eval()(IDS).logits
            assert torch.allclose(logits, self.logits, atol=1e-4), "other outputs"


def weights_of(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]


def fits(value, kind) -> bool:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    kinds = {typing.get_origin(kind) or kind for kind in kinds}
    number = type(value) is int or (type(value) is float and math.isfinite(value))
    return type(value) in kinds - {float} or (float in kinds and number)


def check_types(found) -> None:
    for f in dataclasses.fields(found):
        value = getattr(found, f.name)
        assert fits(value, f.type), f"{f.name} is {value!r:.100}, not {f.type}"


class AdapterFiles:
    def __init__(self, kind: str):
        self.kind = kind

    def write(self, folder: Path) -> None:
        model = get_peft_model(small_base(), CONFIGS[self.kind]())
        for tensor in model.adapters["default"].parameters().values():
            torch.nn.init.normal_(tensor.data)
        if self.kind == "adalora":
            model(IDS, labels=IDS)[0].backward()
            model.update_and_allocate(2)
        model.save_pretrained(folder)
        self.outputs = Outputs(folder, model)

    def attempt(self, folder: Path, chance: random.Random) -> Attempt:
        base, trainable = small_base(), chance.random() < 0.5
        base.train(chance.random() < 0.5)
        model = PeftModel(base)
        if chance.random() < 0.5:
            model.add_adapter("first", LoraConfig(target_modules=["c_fc"]))
        plain = checksum(small_base())

        def check(_) -> None:
            model.set_adapter("new")
            check_model(model)
            check_types(model.adapters["new"].config)
            self.outputs.check(folder, model)
            with model.disable_adapter():
                assert checksum(base) == plain, "the base has changed"

        def state() -> tuple:
            return state_of(base), list(model.adapters), model.active_adapter

        return Attempt(lambda: model.load_adapter(folder, "new", trainable), check, state)


class GPTFiles:
    def write(self, folder: Path) -> None:
        small_base().save_pretrained(folder)
        self.outputs = Outputs(folder, small_base())

    def attempt(self, folder: Path, chance: random.Random) -> Attempt:
        def check(gpt: GPT) -> None:
            check_types(gpt.config)
            check_model(gpt)
            assert all(t.dtype == torch.float32 for t in gpt.state_dict().values())
            self.outputs.check(folder, gpt)

        return Attempt(
            lambda: GPT.from_pretrained(folder), check, lambda: torch.get_rng_state().tolist()
        )


class ShardedFiles(GPTFiles):
    def write(self, folder: Path) -> None:
        super().write(folder)
        tensors = load_file(whole := folder / "model.safetensors")
        header = safe_open(whole, "pt").metadata()
        whole.unlink()
        files = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(tensors)}
        for file in set(files.values()):
            part = {n: t for n, t in tensors.items() if files[n] == file}
            save_file(part, folder / file, header)
        self.outputs.weights = weights_of(folder)
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class BaseFiles(GPTFiles):
    def write(self, folder: Path) -> None:
        shape = {"vocab_size": 2048, "n_embd": 8, "n_head": 2, "n_layer": 1, "eos_token_id": 50256}
        gpt = GPT(tiny_config(**shape))
        gpt.save_pretrained(folder)
        self.outputs = Outputs(folder, gpt)
        shutil.copy(BASE / "tokenizer.json", folder)
        (folder / "held_out.txt").write_text(f"{TEXT}<|endoftext|>{TEXT}")
        for name in ("tokenizer_config.json", "generation_config.json"):
            settings = {"eos_token": "<|endoftext|>", "eos_token_id": 0, "temperature": 0.7}
            (folder / name).write_text(json.dumps(settings))

    def attempt(self, folder: Path, chance: random.Random) -> Attempt:
        out = folder.parent.parent / "out"  # the mutated folder's siblings must not change
        out.mkdir(exist_ok=True)

        def load():
            base = load_base(folder)
            copy_tokenizer(base, out)
            return base

        check_gpt = super().attempt(folder, chance).check

        def check(base) -> None:
            check_gpt(base.pretrained)
            assert base.tokenizer.id_to_token(base.end) is not None
            assert base.held_out is None or check_model(base.pretrained, base.held_out) is None
            encoded = tasks.encode_prompt(base.tokenizer, TEXT[:40])
            assert max(encoded, default=0) < base.pretrained.config.vocab_size, "an unknown id"
            copied = out / "generation_config.json"
            if copied.is_file():
                assert isinstance(json.loads(copied.read_text()), dict)
            shutil.rmtree(out)

        return Attempt(load, check, lambda: torch.get_rng_state().tolist())


class CheckpointFiles:
    def __init__(self, kind: str):
        self.kind = kind

    def parts(self, folder: Path) -> tuple:
        model = small_base().train()
        if self.kind != "full":
            model = get_peft_model(model, CONFIGS[self.kind]())
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        identity = {"seed": 0, "steps": 5, "method": self.kind, "data": "0123"}
        lists = {"losses": [], "seconds": []}
        return model, optimizer, Checkpoint(folder / "checkpoint.safetensors", 1, identity, lists)

    def step(self, model, optimizer, number: int = 0) -> float:
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        if number and self.kind == "adalora":
            model.update_and_allocate(number)
        optimizer.zero_grad()
        return loss.item()

    def write(self, folder: Path) -> None:
        model, optimizer, checkpoint = self.parts(folder)
        checkpoint.lists["losses"] += [self.step(model, optimizer, n) for n in (1, 2, 3)]
        checkpoint.lists["seconds"] += [0.1] * 3
        checkpoint.save(model, optimizer, 3)

    def attempt(self, folder: Path, chance: random.Random) -> Attempt:
        model, optimizer, checkpoint = self.parts(folder)
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}

        def check(step: int) -> None:
            if not checkpoint.file.exists():
                assert step == 0
                return
            states = optimizer.state_dict()["state"].values()
            assert type(step) is int
            assert {step, *(int(state["step"]) for state in states)} == {3}, "another step"
            for values in checkpoint.lists.values():
                assert len(values) == 3, "lists"
                assert all(fits(value, float) for value in values), "lists"
            now = dict(model.named_parameters())
            assert all(torch.equal(p, now[n]) for n, p in frozen.items()), "a frozen tensor changed"
            tensors = [t for state in states for t in state.values()] + list(now.values())
            assert all(t.isfinite().all() for t in tensors), "not finite"
            if max(t.abs().max() for t in tensors) < 1e4:
                self.step(model, optimizer)

        def state() -> tuple:
            parts = (optimizer.state_dict(), checkpoint.lists, checkpoint.identity)
            return state_of(model), repr(parts), list(model.state_dict())

        return Attempt(lambda: checkpoint.load(model, optimizer), check, state)


class TaskFiles:
    def __init__(self, base):
        self.base = base

    def write(self, folder: Path) -> None:
        rows = [{"prompt": f"{TEXT[:20]} {i}", "completion": f"{TEXT[20:30]}{i}"} for i in range(6)]
        for name in ("train", "validation", "test"):
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

    def attempt(self, folder: Path, chance: random.Random) -> Attempt:
        names = [folder / f"{name}.jsonl" for name in ("train", "validation", "test")]

        def check(task: tasks.Task) -> None:
            for part in (task.train, task.validation, task.test):
                batch = tasks.collate(part, self.base.end, "cpu")
                assert batch["input_ids"].max() < self.base.pretrained.config.vocab_size
                assert all(len(e.is_slot) == len(e.completion_ids) for e in part)

        return Attempt(lambda: tasks.load_files(self.base, *names), check, lambda: self.base.end)


class ResultFiles:
    def __init__(self, kind: str):
        self.kind = kind

    def write(self, folder: Path) -> None:
        record = Record(
            "lora", "1m", "describe", 0, 3, 400, size=8, learning_rate=0.01, trainable=5,
            weight_bytes=7, losses=[3.0, 2.0, 1.0], validation=[{"step": 3, "loss": 1.0}],
            seconds_per_step=0.1, score=0.5, test_loss=1.0, forgetting={"base": 1.0, "on": 1.5},
        )  # fmt: skip
        records = [dataclasses.replace(record, seed=seed).to_json() for seed in range(2)]
        entries = [entry({0.001: 0.2, 0.01: 0.1, 0.1: 0.3}, size=size) for size in (4, 8)]
        text = json.dumps(entries if self.kind == "sweep" else records)
        (folder / f"{self.kind}.json").write_text(text)

    def attempt(self, folder: Path, chance: random.Random) -> Attempt:
        file, new = folder / f"{self.kind}.json", entry({0.001: 0.2, 0.01: 0.1, 0.1: 0.3}, size=2)

        def check(records) -> None:
            if self.kind == "sweep":
                sweep.table(json.loads(file.read_text()))
                return
            for record in records:
                check_types(record)
            compare.table(records, tasks.Task("describe", [], [], []))

        load = (lambda: compare.load(file)) if self.kind == "compare" else None
        load = load or (lambda: sweep.save([new], file))
        return Attempt(load, check, lambda: None, writes=self.kind == "sweep")


# Files without which, or with another kind of file in their place, a folder may load
OPTIONAL = {"generation_config.json", "held_out.txt", "sweep.json", "checkpoint.safetensors"}


@pytest.fixture(scope="module")
def formats(base, tmp_path_factory) -> dict:
    """By name: a format, and an intact folder of it."""
    made = {f"adapter {kind}": AdapterFiles(kind) for kind in CONFIGS}
    made |= {"gpt": GPTFiles(), "sharded": ShardedFiles(), "base": BaseFiles()}
    made |= {f"checkpoint {kind}": CheckpointFiles(kind) for kind in ("full", "lora", "adalora")}
    made |= {"task": TaskFiles(base)} | {kind: ResultFiles(kind) for kind in ("compare", "sweep")}
    folders = {name: tmp_path_factory.mktemp("intact") for name in made}
    for name, files in made.items():
        files.write(folders[name])
    return {name: (files, folders[name]) for name, files in made.items()}


def run_one(formats: dict, root: Path, number: int, note: Callable) -> str | None:
    """One mutation and its outcome; None if it is as it should be."""
    chance = random.Random(number)
    kinds = sorted({name.split()[0] for name in formats})
    kind = kinds[number % len(kinds)]
    name = chance.choice([name for name in formats if name.split()[0] == kind])
    files, intact = formats[name]
    shutil.copytree(intact, folder := root / "case" / str(number))
    names, must_fail, notes = sorted(file.name for file in folder.iterdir()), False, []
    for file in chance.sample(names, min(len(names), chance.choice([1, 1, 1, 2]))):
        path = folder / file
        others = [f for _, other in formats.values() for f in other.glob(f"*{path.suffix}")]
        what, fails = fuzz.mutate_file(path, chance, others)
        must_fail |= fails and file not in OPTIONAL
        notes.append(f"{file}, {what}")
    note(f"{number}, {name}, {' and '.join(notes)}")
    fault = fuzz.fault_of(files.attempt(folder, chance), folder, names, must_fail)
    shutil.rmtree(folder)
    return fault


def first_number() -> int:
    seed = os.environ.get("MINIPEFT_SEED", "0")
    return random.randrange(10**9) if seed == "random" else int(seed)


@pytest.mark.parametrize(
    "count", [200, pytest.param(5000, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_a_mutated_file_loads_as_a_valid_object_or_raises_one_clear_error(formats, tmp_path, count):
    """With MINIPEFT_SEED=random, other mutations each time; each fault begins with its number."""
    first = first_number()
    numbers = list(range(first, first + count))
    faults = fuzz.in_children(numbers, functools.partial(run_one, formats, tmp_path))
    listed = "\n".join(faults.values())
    assert not faults, f"{len(faults)} of {count} mutations, from {first}:\n{listed}"


def test_every_intact_folder_is_read(formats, tmp_path):
    for name, (files, intact) in formats.items():
        shutil.copytree(intact, folder := tmp_path / "case" / name)
        attempt = files.attempt(folder, random.Random(0))
        attempt.check(attempt.load())


# --- chosen by hand ---

LSTM = {"encoder_reparameterization_type": "LSTM"}
# Changes of a config, below 4 MiB of JSON. Its folder also has tensors that seem to allow any size
ABSURD = [
    ("adapter lora", {"r": 10**9}), ("adapter lora", {"target_modules": ["c_fc"] * 400_000}),
    ("adapter lora", {"target_modules": [f"layer{i}" for i in range(240_000)]}),
    ("adapter adalora", {"init_r": 10**9}), ("adapter bottleneck", {"bottleneck_size": 10**9}),
    ("adapter adalora", {"rank_pattern": {f"layer{i}": [True] for i in range(160_000)}}),
    ("adapter adalora", {"rank_pattern": {"transformer.h.0.attn.c_attn.lora_E": [True] * 600_000}}),
    ("adapter p_tuning", {"encoder_hidden_size": 10**9}),
    ("adapter p_tuning", {"encoder_num_layers": 10**5} | LSTM),
    ("adapter prefix_projection", {"encoder_hidden_size": 10**9}),
    ("gpt", {"n_layer": 10**9}), ("gpt", {"n_layer": 1000, "n_embd": 10**6}),
    *(("adapter lora", {"target_modules": regex}) for regex in fuzz.REGEXES),
]  # fmt: skip


@pytest.mark.slow
def test_an_absurd_setting_is_refused_at_once(formats, tmp_path):
    empty = {f"x{i}": torch.empty(10**9, 0) for i in range(300)}

    def run_absurd(number: int, note: Callable) -> str | None:
        name, change = ABSURD[number]
        files, intact = formats[name]
        shutil.copytree(intact, folder := tmp_path / "case" / str(number))
        (config,), (weights,) = folder.glob("*.json"), folder.glob("*.safetensors")
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        save_file(load_file(weights) | empty, weights, safe_open(weights, "pt").metadata())
        note(f"{name}, {change!r:.80}")
        attempt = files.attempt(folder, random.Random(1))  # trainable: the whole network is built
        return fuzz.fault_of(attempt, folder, [config.name, weights.name], True)

    faults = fuzz.in_children(list(range(len(ABSURD))), run_absurd)
    assert not faults, "\n".join(faults.values())


PAIRS = {  # two configs with tensors of the same shapes and different outputs
    "alpha": [LoraConfig(lora_alpha=a, target_modules=["c_fc"]) for a in (8, 16)],
    "rslora": [LoraConfig(use_rslora=on, target_modules=["c_fc"]) for on in (False, True)],
    "adalora": [
        AdaLoraConfig(lora_alpha=a, target_modules=["c_fc"], total_step=9) for a in (8, 16)
    ],
    "bottleneck": [BottleneckConfig(["mlp.c_proj"], non_linearity=f) for f in ("gelu", "relu")],
}


@pytest.mark.parametrize("name", PAIRS)
def test_weights_with_the_config_of_another_adapter_are_refused(tmp_path, name):
    for part, config in enumerate(copy.deepcopy(PAIRS[name])):
        get_peft_model(small_base(), config).save_pretrained(tmp_path / str(part))
    shutil.copy(tmp_path / "1" / "adapter_config.json", tmp_path / "0")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(small_base(), tmp_path / "0")


@pytest.mark.parametrize("change", [{"n_head": 4}, {"layer_norm_epsilon": 1e-3}])
def test_weights_with_the_config_of_another_model_are_refused(tmp_path, change):
    small_base().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=r"config\.json"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("where", ["../", "./", "/tmp/", "x/../"])
def test_an_index_names_only_plain_files_in_its_folder(formats, tmp_path, where):
    shutil.copytree(formats["sharded"][1], tmp_path, dirs_exist_ok=True)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", f"{where}model-00001"))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        GPT.from_pretrained(tmp_path)
