"""Damaged adapter folders raise one clear error, and the model does not change."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load, save_file
from test_adapters import CONFIGS, IDS, checksum, small_base

from minipeft import (
    LoraConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    saving,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """An intact folder of every method."""
    found = {}
    for name, config in CONFIGS.items():
        model = get_peft_model(small_base(), config())
        if name == "adalora":
            model(IDS, labels=IDS)[0].backward()
            model.update_and_allocate(2)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


# --- kinds of damage: each takes an intact folder, a random generator, and other folders ---


def truncated(folder, chance, others):
    file = folder / chance.choice((WEIGHTS, CONFIG))
    whole = file.read_bytes()
    file.write_bytes(whole[: chance.randrange(len(whole) - 2)])


def overwritten(folder, chance, others):
    """Overwrite bytes in the header of the tensors' file, or in the config."""
    file = folder / chance.choice((WEIGHTS, CONFIG))
    whole = bytearray(file.read_bytes())
    for _ in range(20):
        whole[chance.randrange(min(len(whole), 200))] = chance.choice(b'\x00\xff{}[]"')
    file.write_bytes(whole)


def swapped(folder, chance, others):
    a, b = folder / WEIGHTS, folder / CONFIG
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def from_another_method(folder, chance, others):
    """Replace one of the two files by that of another method."""
    name = chance.choice((WEIGHTS, CONFIG))
    shutil.copy(chance.choice(others) / name, folder / name)


def missing(folder, chance, others):
    (folder / chance.choice((WEIGHTS, CONFIG))).unlink()


def no_file(folder, chance, others):
    """Put a folder in the place of a file."""
    file = folder / chance.choice((WEIGHTS, CONFIG))
    file.unlink()
    file.mkdir()


def no_folder(folder, chance, others):
    shutil.rmtree(folder)
    if chance.random() < 0.5:
        folder.write_text("a file where the folder should be")


def empty(folder, chance, others):
    (folder / chance.choice((WEIGHTS, CONFIG))).write_bytes(b"")


def pickled(folder, chance, others):
    tensors = load((folder / WEIGHTS).read_bytes())
    torch.save(tensors, folder / WEIGHTS)
    if chance.random() < 0.5:
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def change_tensors(change):
    def damage(folder, chance, others):
        tensors = load((folder / WEIGHTS).read_bytes())
        change(tensors, chance.choice(sorted(tensors)), chance)
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / WEIGHTS)

    damage.__name__ = change.__name__
    return damage


@change_tensors
def renamed(tensors, key, chance):
    for name in sorted({key, "prompt_embeddings"} & set(tensors)):
        names = (f"x{name}", name.replace("_", "."), f"base_model.{name}", name.upper())
        tensors[chance.choice(names)] = tensors.pop(name)


@change_tensors
def removed(tensors, key, chance):
    # A prompt could be loaded from either of the two: itself, or its network.
    for name in {key, min(tensors), "prompt_embeddings"}:
        tensors.pop(name, None)


@change_tensors
def surplus(tensors, key, chance):
    tensors[f"more.{key}"] = tensors[key].clone()


@change_tensors
def wrong_dtype(tensors, key, chance):
    dtypes = (torch.int64, torch.int8, torch.uint8, torch.bool)
    for key in tensors:
        tensors[key] = tensors[key].to(chance.choice(dtypes))


@change_tensors
def wrong_shape(tensors, key, chance):
    for key, tensor in tensors.items():
        wrong = (tensor[:-1], tensor[None], torch.cat((tensor, tensor)), tensor.new_zeros(()))
        tensors[key] = chance.choice(wrong).clone()


def not_json(folder, chance, others):
    texts = ("{", "", "null", "[]", "7", '"text"', "{'r': 8}", "\ufeff{}", "[" * 100_000, "NaN")
    (folder / CONFIG).write_text(chance.choice(texts))


def not_text(folder, chance, others):
    (folder / CONFIG).write_bytes(bytes(chance.randrange(128, 256) for _ in range(50)))


def wrong_type(folder, chance, others):
    found = json.loads((folder / CONFIG).read_text())
    wrong = ("MAGIC", "lora", None, 7, [], {}, ["LORA"], {"LORA": 1}, True)
    found["peft_type"] = chance.choice(wrong)
    (folder / CONFIG).write_text(json.dumps(found))


def wrong_setting(folder, chance, others):
    """Give a setting for shapes or numbers an impossible value."""
    found = json.loads((folder / CONFIG).read_text())
    numbers = {"r", "lora_alpha", "init_r", "target_r", "total_step", "beta1", "lora_dropout",
               "num_virtual_tokens", "orth_reg_weight", "deltaT", "encoder_num_layers",
               "encoder_dropout", "bottleneck_size"}  # fmt: skip
    wrong = ["x", -1, [], [1], {}, {"a": 1}, float("nan"), float("inf"), 10**40, "8"]
    free = sorted(numbers & set(found))
    if not free or ("target_modules" in found and chance.random() < 0.5):
        key = chance.choice(("target_modules", "rank_pattern", "alpha_pattern"))
        wrong = [-1, 3.5, "(", ["("], [7], [None], [[]], {"c_attn": "x"}, {"(": 2}, {"c_attn": -1}]
    else:
        key = chance.choice(free)
    if found["peft_type"] == "ADALORA" and key == "r":
        key = "init_r"
    found[key] = chance.choice(wrong)
    (folder / CONFIG).write_text(json.dumps(found))


def not_implemented(folder, chance, others):
    """Use a setting of peft that is not implemented here."""
    found = json.loads((folder / CONFIG).read_text())
    wrong = [("use_qalora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("x", 1),
             ("layers_to_transform", [0]), ("eva_config", {"rho": 2})]  # fmt: skip
    key, value = chance.choice(wrong)
    (folder / CONFIG).write_text(json.dumps(found | {key: value}))


DAMAGES = [
    truncated, overwritten, swapped, from_another_method, missing, no_file, no_folder, empty,
    pickled, renamed, removed, surplus, wrong_dtype, wrong_shape, not_json, not_text, wrong_type,
    wrong_setting, wrong_setting, not_implemented,
]  # fmt: skip


def state_of(model, base) -> tuple:
    """Everything that a failed load must not change."""
    modules = [(name, id(module), module.training) for name, module in base.named_modules()]
    free = [(name, p.requires_grad) for name, p in base.named_parameters()]
    random_numbers = torch.random.get_rng_state().tolist()
    adapters = [] if model is None else [*model.adapters.items(), model.active_adapter]
    return modules, free, checksum(base), random_numbers, adapters


@pytest.mark.slow
def test_bad_folders_raise_one_clear_error(folders, tmp_path):
    """200 seeded cases: a one-line ValueError that names the file; model and adapters unchanged."""
    wrong = []
    for seed in range(200):
        chance, damage = random.Random(seed), DAMAGES[seed % len(DAMAGES)]
        name = chance.choice(sorted(folders))
        folder = tmp_path / f"folder{seed}"
        shutil.copytree(folders[name], folder)
        prompt = CONFIGS[name]().peft_type.endswith("TUNING")
        others = [  # folders of two prompt methods differ only in peft_type: mixed, they load
            folders[other]
            for other, config in CONFIGS.items()
            if other != name and not (prompt and config().peft_type.endswith("TUNING"))
        ]
        damage(folder, chance, others)
        base, model = small_base(), None
        if chance.random() < 0.5:
            model = get_peft_model(base, LoraConfig(target_modules=["c_fc"]))
        before = state_of(model, base)
        try:
            if model is None:
                PeftModel.from_pretrained(base, folder)
            else:
                model.load_adapter(folder, "bad", is_trainable=chance.random() < 0.5)
            outcome = "it was loaded"
        except Exception as error:
            outcome = repr(error)
            clear = type(error) is ValueError and str(folder) in str(error)
            clear = clear and "\n" not in str(error) and len(str(error)) < 600
        else:
            clear = False
        if not clear or state_of(model, base) != before:
            wrong.append((seed, damage.__name__, name, outcome))
    assert not wrong, "\n".join(map(str, wrong))


SIZES = {
    "r": "lora", "init_r": "adalora", "num_virtual_tokens": "prompt",
    "bottleneck_size": "bottleneck",
    "encoder_hidden_size": "p_tuning", "encoder_num_layers": "p_tuning", "rank_pattern": "lora",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("key", SIZES)
def test_an_absurd_size_is_refused_before_memory_is_allocated(folders, tmp_path, monkeypatch, key):
    folder = shutil.copytree(folders[SIZES[key]], tmp_path / "folder")
    found = json.loads((folder / CONFIG).read_text())
    found[key] = {"c_attn": 10**9} if key == "rank_pattern" else 10**9
    if key == "encoder_num_layers":  # which only the LSTM has
        found["encoder_reparameterization_type"] = "LSTM"
    (folder / CONFIG).write_text(json.dumps(found))
    base = small_base()
    before = state_of(None, base)
    make_adapter = saving.make_adapter

    def on_meta_only(*args):
        assert torch.empty(1).is_meta, "memory was allocated"
        return make_adapter(*args)

    monkeypatch.setattr(saving, "make_adapter", on_meta_only)
    with pytest.raises(ValueError, match="1000000000"):
        PeftModel.from_pretrained(base, folder, is_trainable=True)
    assert state_of(None, base) == before


def test_a_config_cannot_ask_for_more_than_its_tensors_can_hold():
    """An LSTM of 10^5 layers would take minutes to make before its tensors are compared."""
    shapes = {"prompt_embeddings": torch.empty(2, 8, device="meta")}
    saving.check_sizes(PromptTuningConfig(8), shapes)
    with pytest.raises(ValueError, match=r"num_virtual_tokens is 9, but .* for more than 8"):
        saving.check_sizes(PromptTuningConfig(9), shapes)
    deep = {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2}
    saving.check_sizes(PromptEncoderConfig(8, **deep), shapes)
    with pytest.raises(ValueError, match=r"encoder_num_layers is 3, but .* for more than 2"):
        saving.check_sizes(PromptEncoderConfig(8, **deep | {"encoder_num_layers": 3}), shapes)
