"""Files from outside are checked before memory is taken and before anything changes."""

import json
import os
import re
import shutil
from dataclasses import fields

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minipeft import (
    GPT,
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    files,
    get_peft_model,
    saving,
)

WEIGHTS, CONFIG = saving.WEIGHTS, saving.CONFIG
ATTENTION = ["attn.c_attn", "attn.c_proj"]


@pytest.fixture
def folder(gpt, tmp_path):
    """A saved LoRA whose update is not zero."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=r".*\.attn\.c_(attn|proj)")
    model = get_peft_model(gpt, config)
    for tensor in model.state_dict().values():
        torch.nn.init.normal_(tensor, std=0.1)
    model.save_pretrained(tmp_path / "lora")
    model.unload()
    return tmp_path / "lora"


def change_config(folder, **changes) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder, change, header=None) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=header)


# --- plain files, text and JSON ---


def test_only_a_plain_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (
        ("", "is not a plain file"), ("pipe", "is not a plain file"),
        ("zero", "is not a plain file"), ("loop", "is missing"), ("nothing", "is missing"),
    ):  # fmt: skip
        file = tmp_path / name
        for read in (files.read_json, files.read_header):
            with pytest.raises(ValueError, match=re.escape(f"{file} {message}")):
                read(file)


def test_a_file_may_be_as_large_as_the_limit_and_no_larger(tmp_path):
    file = tmp_path / "text"
    file.write_text("x" * files.MEBIBYTE)
    assert len(files.read_text(file, files.MEBIBYTE)) == files.MEBIBYTE
    file.write_text("x" * (files.MEBIBYTE + 1))
    with pytest.raises(ValueError, match=r"text is larger than 1 MiB$"):
        files.read_text(file, files.MEBIBYTE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"), ("[1]", r"must be a JSON object, got \[1\]$"),
        ('{"a": NaN}', "has a number that is not finite"), ('{"a": [1e999]}', "not finite"),
        (f'{{"a": {2**63}}}', "or too large"),
        (f'{{"a": -{10**999}}}', "or too large"), ("[" * 100_000, "is not JSON"),
        ('{"a": ' * 20 + "1" + "}" * 20, "is nested too deeply"),
        ("7" * 5000, "is not JSON"), ('"' + "x" * 999 + '"', r"got '.{199}…$"),
    ],
)  # fmt: skip
def test_json_that_cannot_be_a_config_is_refused_in_one_short_line(tmp_path, text, message):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        files.read_json(file)
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)
    file.write_text("\ufeff" + '{"a": ' * 19 + "1" + "}" * 19)  # one level less, and a BOM
    assert files.read_json(file)["a"]


@pytest.mark.parametrize(
    ("value", "kind", "right"),
    [
        (1, int, True), (True, int, False), (1, float, True), (True, float, False),
        ("a", int, False), (None, int | None, True), ([1], list[int], True),
        ([1, "a"], list[int], False), ({"a": [True]}, dict[str, list[bool]], True),
        ({"a": [1]}, dict[str, list[bool]], False), ([1], dict[str, int], False),
        ("all", list[str] | str | None, True), ([], list[str], True),
    ],
)  # fmt: skip
def test_types_of_settings(value, kind, right):
    assert files.has_type(value, kind) is right


# --- tensors ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[min(t)].fill_(torch.nan), "lora_A.weight has values that are NaN or infinite"),
        (lambda t: t[min(t)].view(-1)[7:8].fill_(-torch.inf), "are NaN or infinite"),
        (lambda t: t.update({"a\nb": torch.ones(1)}), r"'a\\nb' is not the name of a tensor"),
        (lambda t: t.update({"x" * 301: torch.ones(1)}), "is not the name of a tensor"),
        (lambda t: t.update({min(t): t[min(t)].int()}), "has dtype I32, expected F64, F32, F16"),
        (lambda t: t.update({min(t): t[min(t)][:1]}), r"is \(1, 24\) .*, not \(2, 24\)"),
        (lambda t: t.update(empty=torch.ones(10**9, 0)), "empty has no place in this model"),
    ],
)
def test_tensors_that_an_adapter_cannot_have_are_refused(gpt, folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as raised:
        PeftModel.from_pretrained(gpt, folder)
    assert str(folder / WEIGHTS) in str(raised.value)


def test_a_header_that_claims_to_be_huge_is_refused_at_once(folder):
    with (folder / WEIGHTS).open("r+b") as opened:
        opened.write((2**40).to_bytes(8, "little"))
    with pytest.raises(ValueError, match="a header of 1099511627776 bytes"):
        files.read_header(folder / WEIGHTS)


def test_differences_are_named_three_at_most():
    one, two, whole = torch.ones(1), torch.ones(2), torch.ones(1, dtype=torch.int64)
    assert files.mismatch({"a": one}, {"a": two[:1]}) == ""
    assert (
        files.mismatch({"a": one}, {"a": two})
        == "a is (1,) of torch.float32, not (2,) of torch.float32"
    )
    assert files.mismatch({"a": whole}, {"a": one}).startswith("a is (1,) of torch.int64, not (1,)")
    assert files.mismatch({"a": one.half()}, {"a": one}) == ""
    assert files.mismatch({"a": one.half()}, {"a": one}, same_dtype=True).startswith("a is (1,) of")
    wanted = dict.fromkeys("abc", one)
    assert files.mismatch({"d": one}, wanted) == (
        "a is missing; b is missing; c is missing (4 in all)"
    )
    assert files.mismatch({}, wanted) == "a is missing; b is missing; c is missing"


def test_writing_the_same_tensors_gives_the_same_bytes(tmp_path):
    file, found = tmp_path / "x.safetensors", set()
    for _ in range(10):  # two strings: in random order one in two would differ
        files.write_tensors(file, {"ä": torch.ones(3).expand(2, 3)}, {"key": "wörd"})
        found.add(file.read_bytes())
    assert len(found) == 1
    assert torch.equal(files.read_tensors(file)["ä"], torch.ones(2, 3))
    assert files.read_header(file)[1] == {"format": "pt", "key": "wörd"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")

    def fail(to):
        with open(to, "w") as opened:
            opened.write("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_file(file, fail)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError, match=r"file cannot be written: .*"):  # safetensors' own class
        files.write_file(file, lambda to: save_file({"a": torch.ones(1)}, f"{to}/no/such"))


def test_a_loaded_adalora_can_go_on_pruning_only_if_it_is_trainable(gpt, tmp_path):
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules=["c_fc"])
    get_peft_model(gpt, config).save_pretrained(tmp_path)
    for is_trainable in (True, False):
        model = PeftModel.from_pretrained(GPT(gpt.config), tmp_path, is_trainable=is_trainable)
        assert (model.adapters["default"].allocator is not None) is is_trainable
        assert any(p.requires_grad for p in model.parameters()) is is_trainable
        assert model.peft_config["default"].inference_mode is not is_trainable


# --- weights and config belong together ---


def test_a_config_of_another_adapter_is_refused_and_one_that_gives_the_same_output_is_not(
    gpt, folder
):
    change_config(folder, base_model_name_or_path="moved", lora_dropout=0.5, task_type="CAUSAL_LM")
    PeftModel.from_pretrained(gpt, folder).unload()
    for change in ({"lora_alpha": 8}, {"use_rslora": True}, {"target_modules": ATTENTION}):
        other = shutil.copytree(folder, folder.with_name("-".join(change)))
        change_config(other, **change)
        with pytest.raises(
            ValueError, match=rf"{WEIGHTS} was written with other settings than those in {CONFIG}"
        ):
            PeftModel.from_pretrained(gpt, other)


def test_a_folder_without_a_digest_is_loaded(gpt, folder, ids):
    with safe_open(folder / WEIGHTS, "pt") as opened:
        assert len(opened.metadata()["minipeft_config"]) == 16
    change_config(folder, lora_alpha=8)
    change_tensors(folder, lambda tensors: None)  # as peft writes it
    PeftModel.from_pretrained(gpt, folder)


def test_a_digest_does_not_depend_on_order_or_on_defaults():
    def digest(**settings):
        return files.digest(LoraConfig(**settings), ["lora_dropout"])

    assert digest(target_modules={"a", "b"}) == digest(target_modules={"b", "a"})
    assert digest(r=8) == digest() != digest(r=4)
    assert digest(lora_dropout=0.5) == digest()


# --- patterns and names ---


def test_a_strangers_pattern_is_never_run(gpt, folder, ids):
    """The layers are read from the tensors' names. This pattern would take longer than the
    universe has existed."""
    model = PeftModel.from_pretrained(gpt, folder)
    expected = model(ids).logits
    assert not torch.equal(expected, model.unload()(ids).logits)
    change_config(folder, target_modules=r"((((\w|\.)+)+)+)+!")
    change_tensors(folder, lambda tensors: None)
    model = PeftModel.from_pretrained(gpt, folder)
    assert torch.equal(model(ids).logits, expected)
    assert model.peft_config["default"].target_modules == r"((((\w|\.)+)+)+)+!"


DEFAULTS = {  # of peft, for settings that have no meaning here
    "num_transformer_submodules": 1, "init_lora_weights": True, "megatron_core": "megatron.core",
    "qalora_group_size": 16, "revision": "main", "auto_mapping": {"any": 1},
    "peft_version": "9", "other": None, "more": [],
}  # fmt: skip


def test_settings_of_peft_that_have_no_meaning_here_are_accepted_with_their_defaults(gpt, folder):
    change_config(folder, **DEFAULTS)
    PeftModel.from_pretrained(gpt, folder)
    change_config(folder, qalora_group_size=8)
    with pytest.raises(ValueError, match="qalora_group_size=8 is not implemented here"):
        PeftModel.from_pretrained(gpt, folder)


def test_settings_for_training_may_be_edited():
    """All other settings change the output of a saved adapter: their names are written out here."""
    training = set(saving.TRAINING_ONLY)
    assert {f.name for f in fields(AdaLoraConfig)} - training == {
        "init_r", "lora_alpha", "target_modules", "rank_pattern", "bias", "peft_type",
    }  # fmt: skip
    prompt = {"num_virtual_tokens", "token_dim", "peft_type"}
    assert {f.name for f in fields(PromptTuningConfig)} - training == prompt
    assert {f.name for f in fields(PromptEncoderConfig)} - training == prompt | {
        "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
    }  # fmt: skip
    assert {f.name for f in fields(PrefixTuningConfig)} - training == prompt | {
        "prefix_projection", "encoder_hidden_size", "num_layers", "num_attention_heads",
    }  # fmt: skip
    config = AdaLoraConfig(target_modules=["c_fc"], total_step=9)
    changed = AdaLoraConfig(target_modules=["c_fc"], total_step=99, beta1=0.5, target_r=2)
    assert files.digest(config, training) == files.digest(changed, training)


def test_a_name_of_300_characters_is_not_too_long(tmp_path):
    files.write_tensors(tmp_path / "x", {"n" * 300: torch.ones(1)}, {})
    assert list(files.read_header(tmp_path / "x")[0]) == ["n" * 300]


def test_a_file_that_the_system_cannot_open_is_named(tmp_path):
    name = "x" * 300
    with pytest.raises(ValueError, match=rf"{name} cannot be read: File name too long"):
        files.read_text(tmp_path / name, 10)


# --- models on the meta device ---


def test_a_model_with_integer_parameters_gets_a_copy_without_memory(gpt):
    gpt.codes = torch.nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    twin = saving.on_meta(gpt)
    assert all(p.is_meta for p in twin.parameters())
    assert [p.requires_grad for p in twin.parameters()] == [
        p.requires_grad for p in gpt.parameters()
    ]
    assert not any(p.is_meta for p in gpt.parameters())
    assert twin.lm_head.weight is twin.transformer.wte.weight


class Doubled(torch.nn.Linear):
    """Computes W x + b in a `forward` of its own."""

    def forward(self, x):
        return super().forward(x)


def test_an_adapter_on_a_subclass_of_linear_is_loaded(gpt, tmp_path):
    gpt.transformer.h[0].mlp.c_fc = Doubled(24, 96)
    model = get_peft_model(gpt, LoraConfig(target_modules=["c_fc"]))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(model.unload(), tmp_path)


# --- GPT-2 folders ---


def test_a_folder_of_openai_has_masks_that_are_left_out(gpt, ids, tmp_path):
    gpt.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    save_file(load_file(file) | masks, file)
    again = GPT.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, gpt(ids).logits)
    assert all(p.is_contiguous() for p in again.parameters())


def test_the_written_config_names_the_class_of_transformers(gpt, tmp_path):
    gpt.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "GPT2LMHeadModel"
    ]


def test_only_what_is_needed_is_downloaded(gpt, tmp_path, monkeypatch):
    gpt.save_pretrained(tmp_path)

    def download(name, allow_patterns):
        assert name == "someone/model"
        wanted = {"*.json", "*.safetensors", "*.jinja", "tokenizer.model"}
        assert set(allow_patterns) == wanted, "no pickles, no code"
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert GPT.from_pretrained("someone/model").name_or_path == "someone/model"


# --- what is written ---


def test_the_config_is_written_as_sorted_lines_for_inference(folder):
    lines = (folder / CONFIG).read_text().split("\n")
    assert (lines[0], lines[-2:]) == ("{", ["}", ""])
    assert '  "inference_mode": true,' in lines, "a saved adapter is for inference, as in peft"
    keys = [line.split(":")[0] for line in lines if line.startswith('  "')]
    assert keys == sorted(keys)
    assert {'  "lora_alpha"', '  "peft_type"', '  "target_modules"'} < set(keys)


def test_a_file_without_the_tensors_of_some_layers_is_refused(gpt, tmp_path):
    """With "all-linear", the layers are those of the model, not those of the file."""
    get_peft_model(gpt, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    rest = {key: tensor for key, tensor in tensors.items() if "h.1.mlp.c_fc" not in key}
    for found in (rest, {}):
        save_file(found, tmp_path / WEIGHTS)
        with pytest.raises(
            ValueError, match=r"c_fc\.lora_A\.weight is missing|lora_.* is missing;"
        ):
            PeftModel.from_pretrained(GPT(gpt.config), tmp_path)
