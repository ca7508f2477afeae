"""PeftModel: switching, merging, saving and loading adapters, and behaving like the base model."""

import copy
import dataclasses
import inspect
import json
import types

import pytest
import torch
from test_lora import ALL, filled
from torch import nn

from minipeft import (
    GPT,
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
    quantize_model,
)


def adapted(gpt, name="default", **changes) -> PeftModel:
    model = get_peft_model(gpt, LoraConfig(**({"r": 3, "target_modules": ALL} | changes)), name)
    filled(model.adapters[name].layers)
    return model


def test_disable_adapter_restores_the_base_exactly(gpt, ids):
    before = gpt(ids).logits
    model = adapted(gpt)
    with_adapter = model(ids).logits
    assert not torch.allclose(with_adapter, before)
    with model.disable_adapter(), model.disable_adapter():
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, with_adapter)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(model(ids).logits, with_adapter)
    assert torch.equal(model.unload()(ids).logits, before)


@pytest.mark.parametrize("name", ["../outside", "a.b", "a/b", "a\\b", "", ".", "a\nb", "x" * 101])
def test_an_adapter_name_that_is_no_plain_folder_name_is_refused(gpt, name):
    with pytest.raises(ValueError, match="adapter_name must have 1 to 100 letters, none of"):
        get_peft_model(gpt, LoraConfig(target_modules=ALL), name)


def test_changes_inside_disable_adapter_take_effect_when_it_ends(gpt, ids):
    before = gpt(ids).logits
    model = adapted(gpt)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["c_fc"]))
    filled(model.adapters["other"].layers)
    with model.disable_adapter():
        model.set_adapter("other")
        assert torch.equal(model(ids).logits, before)
        with pytest.raises(RuntimeError, match=r"call this outside disable_adapter\(\)"):
            model.merge_and_unload()
        model.delete_adapter("other")
        model.add_adapter("third", LoraConfig(r=2, target_modules=["c_fc"]))
        assert torch.equal(model(ids).logits, before)
    assert not torch.allclose(model(ids).logits, before)
    assert model.active_adapter == "default"
    with model.disable_adapter():
        model.unload()
    assert torch.equal(model(ids).logits, before)


def test_merge_and_unload_returns_a_merged_copy_or_merges_in_place(gpt, ids):
    model = adapted(gpt)
    logits = model(ids).logits
    names = [name for name, _ in gpt.named_parameters()]
    plain = model.merge_and_unload()
    assert torch.allclose(plain(ids).logits, logits, rtol=0, atol=1e-5)
    assert [name.replace(".base_layer", "") for name in names if "lora_" not in name] == [
        name for name, _ in plain.named_parameters()
    ]
    assert torch.equal(model(ids).logits, logits)
    merged = model.merge_and_unload(inplace=True)
    assert merged is gpt
    assert torch.equal(merged(ids).logits, plain(ids).logits)


def test_unmerging_restores_the_logits_exactly(gpt, ids):
    model = adapted(gpt).eval()
    logits = model(ids).logits
    model.merge_adapter()
    assert torch.allclose(model(ids).logits, logits, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(ids).logits, logits)


def test_two_adapters_can_be_switched(gpt, ids):
    model = adapted(gpt)
    first = model(ids).logits
    model.add_adapter("other", LoraConfig(r=2, target_modules=["c_fc"]))
    assert torch.equal(model(ids).logits, first)
    model.set_adapter("other")
    with model.disable_adapter():
        base = model(ids).logits
    assert torch.equal(model(ids).logits, base), "B must start at zero"
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * (24 + 96)
    model.double()  # reaches the adapter that is not attached
    assert {t.dtype for t in model.adapters["default"].tensors().values()} == {torch.float64}
    model.set_adapter("default")
    assert torch.allclose(model(ids).logits.float(), first, atol=1e-4)
    model.delete_adapter("default")
    assert model.active_adapter == "other"
    with pytest.raises(ValueError, match=r"'other' is the only adapter: use unload\(\) to get the"):
        model.delete_adapter("other")
    assert list(model.adapters) == ["other"]
    with pytest.raises(ValueError, match="there is no adapter 'default'; known adapters: other"):
        model.set_adapter("default")
    with pytest.raises(ValueError, match="there already is an adapter 'other'"):
        model.add_adapter("other", LoraConfig(target_modules=ALL))


def test_an_attached_adapter_takes_the_mode_of_the_model(gpt, ids):
    model = adapted(gpt, lora_dropout=0.5)
    model.add_adapter("prompt", PromptEncoderConfig(num_virtual_tokens=2))
    model.train().set_adapter("prompt")
    model.eval().set_adapter("default")  # it was in training mode when it was detached
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train().set_adapter("prompt")
    assert all(module.training for module in model.modules())


def test_saving_and_loading_gives_identical_logits(gpt, ids, tmp_path):
    model = adapted(gpt, use_rslora=True)
    model.add_adapter("second", LoraConfig(r=1, target_modules=["c_attn"]))
    filled(model.adapters["second"].layers)
    logits = model(ids).logits
    model.set_adapter("second")
    second = model(ids).logits
    model.save_pretrained(tmp_path)
    base = model.unload()
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(torch.rand(1), drawn), "loading must not change the random number generator"
    assert torch.equal(again(ids).logits, logits)
    assert again.get_nb_trainable_parameters()[0] == 0, "must be frozen by default"
    again.load_adapter(tmp_path / "second", "second", is_trainable=True)
    again.set_adapter("second")
    assert torch.equal(again(ids).logits, second)
    assert again.get_nb_trainable_parameters()[0] > 0


def test_a_config_of_peft_is_loaded_or_refused_by_the_setting(gpt, tmp_path):
    adapted(gpt, task_type=TaskType.CAUSAL_LM).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    found = json.loads(file.read_text())
    assert found["task_type"] == "CAUSAL_LM"
    file.write_text(
        json.dumps(found | {"use_qalora": False, "bias": "none", "peft_version": "0.21.2"})
    )
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, PeftConfig)
    assert config.other_keys["use_qalora"] is False
    again = PeftModel.from_pretrained(GPT(gpt.config), tmp_path, is_trainable=True)
    assert not again.peft_config["default"].inference_mode
    again.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written == json.loads(file.read_text())
    for key, value in [
        ("use_qalora", True),
        ("rank_pattern", {"c_fc": 2}),
        ("alpha_pattern", {"c_fc": 32}),
    ]:
        file.write_text(json.dumps(found | {key: value}))
        with pytest.raises(ValueError, match=f"{key}={value!r} is not implemented here"):
            PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "written",
    [  # what peft 0.21 writes after get_peft_model, without null, false and empty values
        {"peft_type": "LORA", "r": 3, "lora_alpha": 8, "target_modules": ["c_attn"]},
        {"peft_type": "ADALORA", "r": 8, "init_r": 3, "target_r": 2, "lora_alpha": 8,
         "target_modules": ["c_attn"], "total_step": 10, "deltaT": 1, "beta1": 0.85, "beta2": 0.85,
         "orth_reg_weight": 0.5, "tinit": 0, "tfinal": 0, "lora_dropout": 0.0},
        {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"},
        {"peft_type": "P_TUNING", "encoder_reparameterization_type": "MLP",
         "encoder_num_layers": 2, "encoder_dropout": 0.0, "encoder_hidden_size": 24},
        {"peft_type": "PREFIX_TUNING", "encoder_hidden_size": 24, "prefix_projection": False},
    ],
    ids=lambda written: written["peft_type"],
)  # fmt: skip
def test_a_config_as_peft_writes_it_is_read(written, tmp_path):
    common = {"task_type": "CAUSAL_LM", "peft_version": "0.21.2", "revision": None}
    if "target_modules" in written:
        common |= {
            "bias": "none", "fan_in_fan_out": True, "init_lora_weights": True,
            "megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {},
        }  # fmt: skip
    else:
        common |= {
            "num_virtual_tokens": 2, "num_layers": 4, "num_attention_heads": 2, "token_dim": 24,
            "num_transformer_submodules": 1,
        }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | common))
    config = PeftConfig.from_pretrained(tmp_path)
    for name, value in (written | {"task_type": "CAUSAL_LM"}).items():
        if hasattr(config, name):  # AdaLoRA's r is not used
            assert getattr(config, name) == value, f"{name} must be read from the file"
    for name, value in {
        "bias": "all",
        "qalora_group_size": 8,
        "num_transformer_submodules": 2,
    }.items():
        if name in common:
            changed = json.dumps(written | common | {name: value})
            (tmp_path / "adapter_config.json").write_text(changed)
            with pytest.raises(ValueError, match=f"{name}.*{value}"):
                PeftConfig.from_pretrained(tmp_path)


def test_task_types_have_pefts_names():
    assert [str(task.value) for task in TaskType] == [
        "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION",
    ]  # fmt: skip
    assert [task.name for task in TaskType] == [task.value for task in TaskType]


def test_keys_of_pefts_config_that_mean_nothing_here_may_hold_anything(gpt, tmp_path):
    adapted(gpt, target_modules="all-linear").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    free = {
        "auto_mapping": {"base_model_class": "GPT2"}, "base_model_name_or_path": "gpt2",
        "fan_in_fan_out": True, "num_attention_heads": 12, "num_layers": 12,
        "peft_version": "0.21.2", "revision": "main",
    }  # fmt: skip
    file.write_text(json.dumps(json.loads(file.read_text()) | free))
    model = PeftModel.from_pretrained(GPT(gpt.config), tmp_path)
    assert model.peft_config["default"].target_modules == "all-linear", "it must stay as written"


def test_bad_folders_raise_one_clear_error(gpt, tmp_path):
    base = adapted(gpt)
    base.save_pretrained(tmp_path)
    gpt = base.unload()
    names = list(dict(gpt.named_modules()))
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole, described = weights.read_bytes(), json.loads(config.read_text())

    def refused(message):
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(gpt, tmp_path)
        assert list(dict(gpt.named_modules())) == names

    for change, message in [
        ({"r": 4}, "adapter does not match this model: .* is "),
        ({"target_modules": ["c_attn"]}, "has no place in this model"),
        ({"target_modules": ["q_proj"]}, "'q_proj' matches no module"),
        (
            {"target_modules": "all-linear", "rank_pattern": {"nope": 2}},
            r"rank_pattern=\{'nope': 2\} is not implemented here",
        ),
        ({"peft_type": "MAGIC"}, "peft_type must be one of LORA, ADALORA, .*, got 'MAGIC'"),
        ({"peft_type": ["LORA"]}, r"peft_type must be one of LORA, .*, got \['LORA'\]"),
        ({"r": "eight"}, "adapter_config.json: r must be of type int, got 'eight'"),
        ({"r": True}, "r must be of type int, got True"),
        ({"target_modules": [7]}, r"target_modules must be of type list\[str\].*, got \[7\]"),
        ({"rank_pattern": {"c_fc": 2.5}}, r"rank_pattern=\{'c_fc': 2.5\} is not implemented"),
        ({"target_modules": "("}, r"was written with other settings than those in adapter_config"),
        ({"r": 10**15}, r"lora_A.weight is \(3, 24\) .*, not \(1000000000000000, 24\)"),
        ({"r": 10**40}, "adapter_config.json has a number that is not finite, or too large"),
    ]:
        config.write_text(json.dumps(described | change))
        refused(message)
    config.write_text("{")
    refused("is not JSON")
    config.write_text(json.dumps(described))
    weights.write_bytes(whole[:-10])
    refused("cannot be read as safetensors")
    weights.rename(tmp_path / "adapter_model.bin")
    refused("never read")


def test_print_trainable_parameters_prints_pefts_line(gpt, capsys):
    model = adapted(gpt)
    model.print_trainable_parameters()
    n, total = model.get_nb_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {n:,} || all params: {total:,} || trainable%: {100 * n / total:.4f}\n"
    )


def test_wrong_configs_and_models_are_refused(gpt):
    with pytest.raises(TypeError, match="not a config"):
        get_peft_model(gpt, {"r": 8})
    with pytest.raises(TypeError, match="not a config of a method: LORA, ADALORA"):
        get_peft_model(gpt, object())
    with pytest.raises(ValueError, match="already a PeftModel: use its add_adapter"):
        get_peft_model(adapted(gpt), LoraConfig(target_modules=ALL))


def three_loras(gpt) -> PeftModel:
    """LoRAs of ranks 3, 2 and 3 on different layers; the last one's targets are a regex."""
    model = adapted(gpt.double(), "a", lora_alpha=5).double()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["c_fc"], use_rslora=True))
    model.add_adapter("c", LoraConfig(r=3, target_modules=r".*\.1\.attn\.c_\w+"))
    for name in "bc":
        filled(model.double().adapters[name].layers)
    return model


def updates(model, name) -> dict:
    """ΔW by layer."""
    return {key: layer.delta() for key, layer in model.adapters[name].layers.items()}


def expected_sum(model, weights: dict) -> dict:
    total = {}
    for name, w in weights.items():
        for key, delta in updates(model, name).items():
            total[key] = total.get(key, 0) + w * delta
    return total


@pytest.mark.parametrize(
    ("names", "kind", "rank", "r"),
    [("abc", "cat", None, 8), ("bc", "cat", None, 5), ("abc", "svd", 8, 8), ("a", "svd", 1, 3)],
)
def test_a_weighted_adapter_is_the_weighted_sum_of_the_updates(gpt, names, kind, rank, r):
    """Exact if the rank is large enough; a single adapter keeps its rank."""
    model = three_loras(gpt)
    weights = dict(zip(names, (0.7, -1.5, 0.25), strict=False))
    before = {n: {k: t.clone() for k, t in model.adapters[n].tensors().items()} for n in names}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", kind, rank)
    found, expected = updates(model, "sum"), expected_sum(model, weights)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], expected[key], atol=1e-12) for key in expected)
    assert {layer.r for layer in model.adapters["sum"].layers.values()} == {r}
    assert model.active_adapter == "a"
    for name in names:
        found = model.adapters[name].tensors()
        assert all(torch.equal(found[key], tensor) for key, tensor in before[name].items())


def test_svd_is_the_nearest_of_its_rank_and_linear_has_cross_terms(gpt):
    model = three_loras(gpt)
    weights = {"a": 0.7, "c": -1.5}
    expected = expected_sum(model, weights)
    model.add_weighted_adapter(list(weights), list(weights.values()), "svd")  # the default; rank 3
    for key, delta in updates(model, "svd").items():
        u, s, v = torch.linalg.svd(expected[key])
        assert torch.allclose(delta, u[:, :3] * s[:3] @ v[:3], atol=1e-12)
        missed = torch.linalg.norm(delta - expected[key])
        assert torch.allclose(missed, s[3:].square().sum().sqrt(), atol=1e-12)
    model.add_weighted_adapter(list(weights), list(weights.values()), "linear", "linear")
    shared = "transformer.h.1.attn.c_attn"
    p = model.adapters["a"].layers[shared]
    q = model.adapters["c"].layers[shared]
    root = (1.5 * q.scaling * 0.7 * p.scaling) ** 0.5
    cross = root * (q.lora_B.weight @ p.lora_A.weight - p.lora_B.weight @ q.lora_A.weight)
    off = updates(model, "linear")[shared] - expected[shared]
    assert torch.allclose(off, cross, atol=1e-12)
    assert off.norm() > 0.5 * expected[shared].norm()
    alone = "transformer.h.0.mlp.c_fc"  # only one of the two adapts this layer: exact
    assert torch.allclose(updates(model, "linear")[alone], expected[alone], atol=1e-12)


def test_a_weighted_adapter_can_be_merged_saved_and_loaded(gpt, ids, tmp_path):
    model = three_loras(gpt)
    model.add_weighted_adapter(["a", "b"], [1.0, 2.0], "sum", "cat")
    model.set_adapter("sum")
    logits = model(ids).logits
    assert model.get_nb_trainable_parameters()[0] == 0
    model.merge_adapter()
    assert torch.allclose(model.eval()(ids).logits, logits, atol=1e-10)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "sum").double()
    assert torch.equal(again(ids).logits, logits)


def test_loras_on_a_4bit_base_have_weighted_sums(gpt, ids):
    quantize_model(gpt)
    model = adapted(gpt, "a").eval()
    model.add_weighted_adapter(["a", "a"], [1.5, -0.5], "sum", "svd")
    expected = model(ids).logits
    model.set_adapter("sum")
    assert model.peft_config["sum"].peft_type == "LORA"
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(model(ids).logits, expected, atol=1e-3)


def test_impossible_weighted_sums_are_refused(gpt):
    model = three_loras(gpt)
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2))
    for arguments, message in [
        ((["a", "d"], [1, 1], "sum"), "there is no adapter 'd'; known adapters: a, b, c, prompt"),
        ((["a", "b"], [1], "sum"), r"weights must be one number per adapter, got \[1\]"),
        (([], [], "sum"), r"weights must be one number per adapter, got \[\]"),
        ((["a", "b"], [1, float("nan")], "sum"), r"one number per adapter, got \[1, nan\]"),
        ((["a", "b"], [1, "2"], "sum"), r"one number per adapter, got \[1, '2'\]"),
        ((["a", "prompt"], [1, 1], "sum"), "PROMPT_TUNING has no weighted sum"),
        ((["a", "b"], [1, 1], "sum", "ties"), "one of svd, linear, cat, got 'ties'"),
        ((["a", "b"], [1, 1], "sum", "linear"), r"of equal rank, got \[3, 2\]: use svd or cat"),
        ((["a", "b"], [1, 1], "sum", "svd", -1), "r must be a positive integer, got -1"),
        ((["a", "b"], [1, 1], "c"), "there already is an adapter 'c'"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
        assert list(model.adapters) == ["a", "b", "c", "prompt"]
        assert model.is_attached


# --- state_dict ---

ADALORA = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 2, "total_step": 10}
CONFIGS = {
    "lora": lambda: LoraConfig(r=2, target_modules=["c_fc"]),
    "rows": lambda: LoraConfig(r=1, target_modules=["c_attn"], trainable_token_indices=[26, 60]),
    "adalora": lambda: AdaLoraConfig(target_modules=["c_attn", "c_fc"], **ADALORA),
    "bitfit": lambda: BitFitConfig(["ln_1"]),
    "bottleneck": lambda: BottleneckConfig(["mlp.c_proj"], bottleneck_size=3),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=2),
    "p_tuning": lambda: PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=3),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=2),
}


def all_methods(gpt, seed: int) -> PeftModel:
    """One adapter of every method on one base; all their parameters are random."""
    model = PeftModel(gpt).eval()
    for name, config in CONFIGS.items():
        model.add_adapter(name, config())
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():  # shares memory with the parameters
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def logits_by_adapter(model, ids) -> dict:
    found = {}
    for name in model.adapters:
        model.set_adapter(name)
        found[name] = model(ids).logits
    return found


def test_state_dict_holds_all_adapters_and_nothing_of_the_base(gpt):
    model = adapted(gpt, r=2, target_modules=["c_fc"])
    model.add_adapter("bias", BitFitConfig(["ln_f"]))
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=5))
    blocks = [f"default.transformer.h.{i}.mlp.c_fc" for i in range(2)]
    shapes = {f"{name}.lora_A.weight": (2, 24) for name in blocks}
    shapes |= {f"{name}.lora_B.weight": (96, 2) for name in blocks}
    shapes["bias.transformer.ln_f.delta"] = (24,)
    shapes["prompt.prompt_encoder.embedding.weight"] = (5, 24)

    def check():
        state = model.state_dict()
        assert {key: tuple(tensor.shape) for key, tensor in state.items()} == shapes
        assert not any(tensor.requires_grad for tensor in state.values())

    for name in model.adapters:  # whichever adapter is attached
        model.set_adapter(name)
        check()
        with model.disable_adapter():
            check()
    assert model.state_dict(prefix="model.").keys() == {f"model.{key}" for key in shapes}
    model.unload()
    assert model.state_dict() == {}


@pytest.mark.parametrize("attached", CONFIGS)
def test_load_state_dict_restores_every_adapter(gpt, ids, attached):
    model = all_methods(gpt, seed=1)
    expected = logits_by_adapter(model, ids)
    state = copy.deepcopy(model.state_dict())
    model.unload()
    other = all_methods(gpt, seed=2)
    changed = logits_by_adapter(other, ids)
    assert not any(torch.allclose(changed[name], expected[name], atol=1e-3) for name in expected)
    other.set_adapter(attached)
    other.load_state_dict(state)
    assert other.active_adapter == attached
    found = logits_by_adapter(other, ids)
    for name, logits in expected.items():
        assert torch.equal(found[name], logits), f"{name} was not restored"


@pytest.mark.parametrize("while_merged", ["attached", "detached", "disabled"])
def test_load_state_dict_on_a_merged_model_unmerges_it_first(gpt, ids, while_merged):
    model = adapted(gpt).eval()
    model.add_adapter("other", CONFIGS["lora"]())
    logits = model(ids).logits
    state = copy.deepcopy(model.state_dict())
    for layer in model.adapters["default"].layers.values():
        nn.init.ones_(layer.lora_B.weight)
    model.merge_adapter()
    if while_merged == "detached":
        model.set_adapter("other")
    if while_merged == "disabled":
        with model.disable_adapter():
            model.load_state_dict(state)
    else:
        model.load_state_dict(state)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, logits), "the layers still compute with the old W'"


def test_a_state_dict_that_does_not_match_is_refused_before_anything_changes(gpt, ids):
    model = adapted(gpt).eval()
    model.merge_adapter()
    merged = model(ids).logits
    state = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    key = next(iter(state))
    own = key.removeprefix("default.")
    for wrong, message in [
        ({k: t for k, t in state.items() if k != key}, f"{own} is missing"),
        (state | {"third.lora_A": torch.zeros(1)}, "third.lora_A belongs to no adapter"),
        (state | {"default.lora_A": torch.zeros(1)}, "lora_A has no place in this model"),
        (state | {key: torch.zeros(2, 2)}, rf"{own} is \(2, 2\) of torch.float32, not \(3, 24\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(wrong)
        assert torch.equal(model(ids).logits, merged)


# --- AdaLoRA's allocator in the state dict ---


def adalora_run(gpt, ids, first: int, last: int, checkpoint: dict | None = None):
    """Train steps first to last, from a checkpoint if there is one."""
    torch.manual_seed(7)
    model = get_peft_model(gpt, CONFIGS["adalora"]()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    for step in range(first, last + 1):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    return model, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_adalora_continued_from_a_state_dict_ends_in_the_same_tensors(gpt, ids, stop, tmp_path):
    """stop: before the first pruning, while pruning, and after the ranks are fixed."""
    whole, expected = adalora_run(copy.deepcopy(gpt), ids, 1, 10)
    _, checkpoint = adalora_run(copy.deepcopy(gpt), ids, 1, stop)
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    continued, found = adalora_run(copy.deepcopy(gpt), ids, stop + 1, 10, checkpoint)
    assert found["model"].keys() == expected["model"].keys()
    for key, tensor in expected["model"].items():
        assert torch.equal(found["model"][key], tensor), key
    assert continued.ranks() == whole.ranks()
    assert sum(continued.ranks().values()) == 8


def test_adalora_restored_at_the_end_of_its_schedule_can_be_saved(gpt, ids, tmp_path):
    base = copy.deepcopy(gpt)
    trained, checkpoint = adalora_run(copy.deepcopy(gpt), ids, 1, 10)
    model = get_peft_model(gpt, CONFIGS["adalora"]()).eval()
    model.load_state_dict(checkpoint["model"])
    logits = model(ids).logits
    assert torch.equal(logits, trained.eval()(ids).logits)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(again(ids).logits, logits, atol=1e-6)


@pytest.mark.parametrize("stop", [0, 1])
def test_a_state_dict_from_before_the_pruning_restores_the_full_ranks(gpt, ids, stop):
    _, checkpoint = adalora_run(copy.deepcopy(gpt), ids, 1, stop)
    pruned, _ = adalora_run(gpt, ids, 1, 10)
    pruned.load_state_dict(checkpoint["model"])
    assert set(pruned.ranks().values()) == {4}, "the old mask is still there"
    assert pruned.adapters["default"].allocator.step == (stop or None)
    assert pruned.state_dict().keys() == checkpoint["model"].keys()


def test_a_checkpoint_before_the_pruning_sets_no_rank_pattern(gpt, ids):
    model, _ = adalora_run(gpt, ids, 1, 1)
    assert any("allocator.kept" in key for key in model.state_dict())
    model(ids, labels=ids).loss.backward()
    model.update_and_allocate(2)  # tinit: nothing is pruned
    assert model.peft_config["default"].rank_pattern is None


@pytest.mark.parametrize("damage", ["missing", "misshapen", "surplus", "no step"])
def test_a_damaged_allocator_state_is_refused_before_anything_changes(gpt, ids, damage):
    _, checkpoint = adalora_run(copy.deepcopy(gpt), ids, 1, 5)
    state = dict(checkpoint["model"])
    key = next(key for key in state if ".allocator.importance." in key)
    if damage == "missing":
        del state[key]
    elif damage == "misshapen":
        state[key] = state[key][:1]
    elif damage == "surplus":
        state["default.allocator.importance.nowhere.A"] = state[key]
    else:
        del state["default.allocator.step"]
    model = get_peft_model(gpt, CONFIGS["adalora"]())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="allocator"):
        model.load_state_dict(state)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


# --- disable_adapter ---


def test_an_adapter_added_inside_disable_adapter_stays_detached(gpt, ids, tmp_path):
    before = gpt(ids).logits
    model = adapted(gpt)
    model.save_pretrained(tmp_path)
    with_adapter = model(ids).logits

    def check():
        assert not model.is_attached
        assert torch.equal(model(ids).logits, before)

    with model.disable_adapter():
        with model.disable_adapter():
            model.add_adapter("added", CONFIGS["prompt"]())
            check()
            model.load_adapter(tmp_path, "loaded")
            check()
            model.add_weighted_adapter(["default"], [2.0], "summed")
            check()
            model.set_adapter("loaded")
            check()
        check()
        model.set_adapter("added")
        with pytest.raises(KeyError), model.disable_adapter():
            raise KeyError
        check()
        model.set_adapter("summed")
        check()
    assert model.is_attached
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    assert not torch.allclose(model(ids).logits, with_adapter, atol=1e-3)
    model.set_adapter("loaded")
    assert torch.equal(model(ids).logits, with_adapter)


def test_the_first_adapter_added_inside_disable_adapter_is_attached_when_it_ends(gpt, ids):
    before = gpt(ids).logits
    model = adapted(gpt)
    with model.disable_adapter():
        model.unload()
        model.add_adapter("new", CONFIGS["lora"]())
        filled(model.adapters["new"].layers)
        assert torch.equal(model(ids).logits, before)
    assert model.active_adapter == "new"
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)


def test_a_copy_of_a_disabled_or_unloaded_model_has_no_adapter_attached(gpt, ids):
    model = adapted(gpt)
    assert copy.deepcopy(model).is_attached
    with model.disable_adapter():
        other = copy.deepcopy(model)
    assert not other.is_attached
    other.set_adapter("default")
    assert torch.equal(other(ids).logits, model(ids).logits)
    model.unload()
    assert not copy.deepcopy(model).is_attached


# --- behaving like the base ---


class OtherNames(nn.Module):
    """A model whose forward has other parameter names, as nanoGPT's."""

    bias_sum = 3.0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = []

    def forward(self, idx, targets=None):
        self.calls.append((idx, targets))
        return self.layer(idx)

    def crop(self, n: int) -> int:
        return n + 1


def test_forward_publishes_the_signature_of_the_base(gpt):
    assert inspect.signature(adapted(gpt).forward) == inspect.signature(gpt.forward)
    model = get_peft_model(OtherNames(), LoraConfig(r=1, target_modules=["layer"]))
    assert list(inspect.signature(model.forward).parameters) == ["idx", "targets"]
    assert "labels" in inspect.signature(PeftModel.forward).parameters  # the Trainer looks here too


def test_arguments_reach_the_base_as_they_were_passed():
    base = OtherNames()
    model = get_peft_model(base, LoraConfig(r=1, target_modules=["layer"]))
    x = torch.randn(2, 4)
    y = torch.randn(2, 4)
    model(x, y)
    model(x, targets=y)
    model(idx=x, targets=y)
    model(x)
    assert [call[0] is x for call in base.calls] == [True] * 4
    assert [call[1] for call in base.calls[3:]] == [None]
    assert all(call[1] is y for call in base.calls[:3])
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        model(x, labels=y)


@pytest.mark.parametrize("name", ["prompt", "p_tuning", "prefix"])
def test_positional_and_keyword_arguments_give_the_same_with_a_prompt(gpt, ids, name):
    model = get_peft_model(gpt, CONFIGS[name]()).eval()
    mask = torch.ones_like(ids)
    loss, logits = model(ids, mask, ids).values()
    named = model(input_ids=ids, attention_mask=mask, labels=ids)
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)
    assert torch.equal(model(ids, None, ids).logits, model(ids).logits), "None means no mask"


def test_a_prompt_works_whatever_the_base_calls_its_further_arguments(gpt, ids):
    class Wrapper(GPT):
        def forward(self, input_ids=None, **more):
            return super().forward(input_ids, **more)

    base = Wrapper(gpt.config)
    base.load_state_dict(gpt.state_dict())
    config = CONFIGS["prompt"]()
    torch.manual_seed(0)
    expected = get_peft_model(gpt, config).eval()(ids, labels=ids)
    torch.manual_seed(0)
    found = get_peft_model(base, config).eval()(ids, labels=ids)
    assert torch.equal(found.loss, expected.loss)


def test_unknown_attributes_are_those_of_the_base(gpt):
    base = OtherNames()
    model = get_peft_model(base, LoraConfig(r=1, target_modules=["layer"]))
    assert model.bias_sum == 3.0
    assert model.crop(3) == 4
    assert model.calls is base.calls
    with pytest.raises(AttributeError, match="'OtherNames' object has no attribute 'nothing'"):
        _ = model.nothing
    model = adapted(gpt)
    assert model.config is gpt.config
    assert model.get_input_embeddings() is gpt.get_input_embeddings()
    assert model.get_base_model() is gpt
    model.gradient_checkpointing_enable()
    assert gpt.gradient_checkpointing


def test_generate_is_that_of_the_base_with_the_adapter(gpt, ids):
    plain = gpt.generate(ids, max_new_tokens=5)
    model = adapted(gpt)
    text = model.generate(ids, max_new_tokens=5)
    merged = model.merge_and_unload()
    assert torch.equal(text, merged.generate(ids, max_new_tokens=5))
    assert not torch.equal(text, plain)
    with model.disable_adapter():
        assert torch.equal(model.generate(ids, max_new_tokens=5), plain)


# --- folders and configs ---


def test_only_the_default_adapter_is_written_to_the_root(gpt, ids, tmp_path):
    model = adapted(gpt, "first")
    model.add_adapter("default", CONFIGS["lora"]())
    model.save_pretrained(tmp_path / "both")
    names = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file())
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert names == [f"both/{file}" for file in files] + [f"both/first/{file}" for file in files]
    assert PeftConfig.from_pretrained(tmp_path / "both").r == 2
    assert PeftConfig.from_pretrained(tmp_path / "both" / "first").r == 3
    logits = model(ids).logits
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "one")
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["first"]
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "one" / "first")
    assert torch.equal(again(ids).logits, logits)


def test_the_name_of_the_base_is_written(gpt, tmp_path):
    def written(model, folder) -> str | None:
        model.save_pretrained(folder)
        return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]

    gpt.save_pretrained(tmp_path / "base")
    assert written(adapted(gpt), tmp_path / "unnamed") is None
    base = GPT.from_pretrained(tmp_path / "base")
    model = adapted(base)
    assert written(model, tmp_path / "named") == str(tmp_path / "base")
    unnamed = GPT(gpt.config)  # a folder's own entry is kept if the base has no name
    again = PeftModel.from_pretrained(unnamed, tmp_path / "named")
    assert written(again, tmp_path / "again") == str(tmp_path / "base")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_callers_config_is_never_changed(gpt, ids, tmp_path, name):
    config = CONFIGS[name]()
    before = copy.deepcopy(vars(config))
    model = get_peft_model(gpt, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 11):
        model(ids, labels=ids)[0].backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    model.add_adapter("second", config)
    assert vars(config) == before
    assert dataclasses.asdict(config) == dataclasses.asdict(CONFIGS[name]())
    configs = [config, *model.peft_config.values()]
    assert len({id(one) for one in configs}) == 3, "each adapter has a config of its own"


# --- what training code, and scripts written for peft, expect of the wrapper ---


class ReadsWeight(nn.Module):
    """Reads its layer's weight instead of calling the layer, as Mamba does."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return x @ self.fc.weight.T + self.fc.bias


WEIGHT_CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["fc"]),
    "adalora": AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules=["fc"]),
    "bitfit": BitFitConfig(["fc"]),
}


@pytest.mark.parametrize("name", [*WEIGHT_CONFIGS, "qlora"])
def test_code_that_reads_a_layers_weight_gets_the_adapted_one(name):
    base, x = ReadsWeight(), torch.randn(3, 6)
    if name == "qlora":
        quantize_model(base)
    plain = base(x)
    model = get_peft_model(base, WEIGHT_CONFIGS.get(name, WEIGHT_CONFIGS["lora"]))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    adapted = model(x)
    assert not torch.allclose(adapted, plain)
    adapted.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert torch.allclose(model.base_model.fc(x), adapted, atol=1e-5)
    model.base_model.fc.merge()
    assert torch.allclose(model(x), adapted, atol=1e-5)


def test_attributes_of_the_base_can_be_set_through_the_wrapper(gpt):
    model = adapted(gpt)
    model.gradient_checkpointing = True
    assert gpt.gradient_checkpointing
    model.note = 1  # the base has none
    assert model.note == 1
    assert not hasattr(gpt, "note")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_and_dtype_are_available_for_any_base(gpt, dtype):
    model = adapted(gpt.to(dtype))
    trainable, total = model.get_nb_trainable_parameters()
    assert model.num_parameters() == total
    assert model.num_parameters(only_trainable=True) == trainable
    assert model.num_parameters(exclude_embeddings=True) == total - (61 + 32) * 24
    assert model.dtype == dtype


def test_arguments_of_pefts_methods_work_or_are_refused(gpt, tmp_path):
    model = adapted(gpt)
    model.add_adapter("b", LoraConfig(r=2, target_modules=ALL))
    model.set_adapter(["b"])
    assert model.active_adapter == "b"
    with pytest.raises(ValueError, match=r"one adapter can be active, not \['default', 'b'\]"):
        model.set_adapter(["default", "b"])
    model.save_pretrained(tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match="would write a pickle"):
        model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert not (tmp_path / "pickle").exists()
    LoraConfig(target_modules=ALL, bias="none")
    with pytest.raises(ValueError, match="bias must be 'none', got 'all'"):
        LoraConfig(target_modules=ALL, bias="all")


def test_safe_merge_refuses_weights_that_are_not_finite(gpt, ids):
    model = adapted(gpt)
    merged = model.merge_and_unload(progressbar=False, safe_merge=True)
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-5)
    layer = model.base_model.transformer.h[1].mlp.c_fc
    layer.lora_B.weight.data[0, 0] = torch.nan
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="c_fc: the merged weight has NaN"):
            merge(safe_merge=True)
    assert all(layer.merged_weight is None for layer in model.adapters["default"].layers.values())


@pytest.mark.parametrize("kind", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_task_whose_head_would_not_be_trained_is_refused(gpt, kind):
    with pytest.raises(ValueError, match=f"task_type='{kind}' is not implemented: a new head"):
        get_peft_model(gpt, LoraConfig(target_modules=ALL, task_type=kind))
    assert all(p.requires_grad for p in gpt.parameters())


@pytest.mark.parametrize("name", ["lora", "adalora", "prefix", "two"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_peft_model_inside_another_module_is_saved_and_loaded(gpt, ids, name, strict):
    """As LightningModule, DataParallel and torch.compile wrap it."""
    configs = {
        "adalora": AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules=ALL),
        "prefix": PrefixTuningConfig(num_virtual_tokens=2),
    }
    models = []
    for _ in range(2):
        base = copy.deepcopy(gpt)
        model = get_peft_model(base, configs.get(name, LoraConfig(r=2, target_modules=ALL)))
        if name == "two":
            model.add_adapter("b", LoraConfig(r=3, target_modules=["c_fc"]))
        models.append(model.eval())
    for parameter in models[0].state_dict().values():
        if parameter.is_floating_point():  # and not AdaLoRA's step and its masks
            parameter.normal_(std=0.1)
    outer = [nn.Sequential(nn.ModuleDict({"model": model}), nn.Linear(2, 2)) for model in models]
    state = outer[0].state_dict()
    assert not any("wte" in key for key in state)
    assert not torch.equal(models[1](ids).logits, models[0](ids).logits)
    outer[1].load_state_dict(state, strict=strict)
    for adapter in models[0].adapters:
        for model in models:
            model.set_adapter(adapter)
        assert torch.equal(models[1](ids).logits, models[0](ids).logits)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "1.weight"'):
        outer[1].load_state_dict({k: t for k, t in state.items() if k != "1.weight"})


def test_training_does_not_change_the_running_statistics_of_the_base():
    """With a frozen base, BatchNorm's statistics are frozen too; no adapter could store them."""
    base, x = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)), torch.randn(8, 6)
    plain = base.eval()(x)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"])).train()
    model(x + 3)
    assert base[1].num_batches_tracked == 0
    with model.disable_adapter():
        assert torch.equal(model.train()(x), plain)


def test_a_layer_that_was_replaced_while_its_adapter_was_detached_is_noticed(gpt):
    model = adapted(gpt)
    with (
        pytest.raises(RuntimeError, match=r"transformer\.h\.0\.mlp\.c_fc of the base was replaced"),
        model.disable_adapter(),
    ):
        gpt.transformer.h[0].mlp.c_fc = nn.Linear(24, 96)
    assert not model.is_attached
    assert model.unload() is gpt


def test_pruning_discards_a_merged_weight(gpt, ids):
    config = AdaLoraConfig(init_r=3, target_r=1, total_step=5, target_modules=ALL)
    model = get_peft_model(gpt, config)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) if p.requires_grad else 0
    model.train()(ids, labels=ids).loss.backward()
    model.eval()
    before = model(ids).logits
    for layer in model.adapters["default"].layers.values():
        layer.merge()
    model.update_and_allocate(1)
    pruned = model(ids).logits
    assert not torch.allclose(pruned, before)
    for layer in model.adapters["default"].layers.values():
        assert layer.merged_weight is None


class HasNames(nn.Module):
    """A base with attributes that a PeftModel has too, as SAM's `prompt_encoder`."""

    def __init__(self):
        super().__init__()
        self.prompt_encoder = nn.Linear(6, 6)
        self.adapters = nn.ModuleList([nn.Linear(6, 6)])
        self.active_adapter = "mine"

    def forward(self, x):
        return self.adapters[0](self.prompt_encoder(x))


def test_a_base_keeps_attributes_that_the_wrapper_has_too():
    base, x = HasNames(), torch.randn(2, 6)
    plain, names = base(x), list(dict(base.named_parameters()))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["prompt_encoder"]))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["prompt_encoder"]))
    model.set_adapter("b")
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    assert model.unload() is base
    assert base.active_adapter == "mine"
    assert list(dict(base.named_parameters())) == names
    assert torch.equal(base(x), plain)


@pytest.mark.parametrize("config", [BitFitConfig(), LoraConfig(r=2, target_modules=["0"])])
def test_running_statistics_stay_frozen_when_adapters_are_switched(config):
    base, x = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), torch.randn(8, 6)
    model = get_peft_model(base.train(), config)
    model(x)
    model.add_adapter("b", config)
    with model.disable_adapter():
        model(x)
    model.set_adapter("b")
    model(x)
    assert model.unload()[1].num_batches_tracked == 0
    assert base[1].training


def test_wrapping_a_model_leaves_the_mode_of_its_parts(gpt):
    gpt.train().transformer.drop.eval()
    model = get_peft_model(gpt, LoraConfig(r=2, target_modules=ALL))
    assert model.training
    assert not gpt.transformer.drop.training


def test_loading_a_part_that_has_no_adapter_is_not_strict_if_told_so(gpt):
    outer = nn.Sequential(adapted(gpt), nn.Linear(2, 2))
    part = {key: tensor for key, tensor in outer.state_dict().items() if key.startswith("1.")}
    missing = outer.load_state_dict(part, strict=False).missing_keys
    assert set(missing) == outer.state_dict().keys() - part.keys()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0.default"):
        outer.load_state_dict(part)


def test_forward_is_a_method_that_a_copy_has_of_its_own(gpt, ids):
    """accelerate takes `forward.__func__`, wraps it, and binds it again; so do copies."""
    model = adapted(gpt).eval()
    function = model.forward.__func__
    model.forward = types.MethodType(lambda *args, **kwargs: function(*args, **kwargs), model)
    assert torch.equal(model(ids).logits, function(model, ids).logits)
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.zero_()
    assert not other(ids).logits.any()
    assert model(ids).logits.any()


def test_peft_model_refuses_configs_of_another_package(gpt):
    """Settings that are not implemented here would be dropped without a word."""
    theirs = dataclasses.make_dataclass("LoraConfig", [("peft_type", str, "LORA")])()
    with pytest.raises(TypeError, match="is not a config of a method"):
        get_peft_model(gpt, theirs)


def test_a_prompt_on_a_base_with_an_attached_adapter_is_refused(gpt):
    model = adapted(gpt)
    with pytest.raises(ValueError, match="already has an adapter: remove it before adding"):
        get_peft_model(model.get_base_model(), PrefixTuningConfig(num_virtual_tokens=2))


def test_names_that_cannot_be_right_are_refused(gpt):
    model = adapted(gpt)
    model.add_adapter("b", LoraConfig(r=2, target_modules=ALL))
    with pytest.raises(ValueError, match=r"only the active adapter can be merged, not \['b'\]"):
        model.merge_adapter(["b"])
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="adapter_name must have 1 to 100 letters, none of"):
        model.add_adapter(3, LoraConfig(r=2, target_modules=ALL))
    with pytest.raises(ValueError, match=r"target_modules='\(' is no regex"):
        get_peft_model(GPT(gpt.config), LoraConfig(target_modules="("))


# --- defaults and small promises ---


SHARED = {"task_type": None, "inference_mode": False}
TARGETED = SHARED | {"target_modules": None}


@pytest.mark.parametrize(
    ("config", "expected"),
    [  # peft's defaults, except for BitFit and the bottleneck, which peft does not have
        (
            LoraConfig(),
            TARGETED | {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False,
                        "use_dora": False, "init_lora_weights": True,
                        "trainable_token_indices": None, "bias": "none", "peft_type": "LORA"},
        ),
        (
            AdaLoraConfig(total_step=9),
            TARGETED | {"target_r": 8, "init_r": 12, "tinit": 0, "tfinal": 0, "deltaT": 1,
                        "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5, "total_step": 9,
                        "lora_alpha": 8, "lora_dropout": 0.0, "rank_pattern": None,
                        "bias": "none", "peft_type": "ADALORA"},
        ),
        (
            VeraConfig(),
            TARGETED | {"r": 256, "projection_prng_key": 0, "save_projection": True,
                        "vera_dropout": 0.0, "d_initial": 0.1, "peft_type": "VERA"},
        ),
        (
            IA3Config(feedforward_modules=[]),  # peft's default, None, depends on the model
            TARGETED | {"feedforward_modules": [], "peft_type": "IA3"},
        ),
        (BitFitConfig(), TARGETED | {"peft_type": "BITFIT"}),
        (
            BottleneckConfig(),
            TARGETED | {"bottleneck_size": 16, "non_linearity": "gelu", "peft_type": "BOTTLENECK"},
        ),
        (
            PromptTuningConfig(3),
            SHARED | {"num_virtual_tokens": 3, "prompt_tuning_init": "RANDOM", "token_dim": None,
                      "prompt_tuning_init_text": None, "tokenizer_name_or_path": None,
                      "peft_type": "PROMPT_TUNING"},
        ),
        (
            PromptEncoderConfig(3),
            SHARED | {"num_virtual_tokens": 3, "encoder_reparameterization_type": "MLP",
                      "encoder_hidden_size": None, "encoder_num_layers": 2, "encoder_dropout": 0.0,
                      "token_dim": None, "peft_type": "P_TUNING"},
        ),
        (
            PrefixTuningConfig(3),
            SHARED | {"num_virtual_tokens": 3, "prefix_projection": False, "token_dim": None,
                      "encoder_hidden_size": None, "init_weights": None, "num_layers": None,
                      "num_attention_heads": None, "peft_type": "PREFIX_TUNING"},
        ),
    ],
)  # fmt: skip
def test_the_defaults_of_the_configs_are_those_of_peft(config, expected):
    assert dataclasses.asdict(config) == expected


def test_a_model_without_an_adapter_says_so(gpt, ids):
    model = PeftModel(gpt)
    assert torch.equal(model(ids).logits, gpt(ids).logits)
    assert all(p.requires_grad for p in model.parameters()), "only an adapter freezes the base"
    with pytest.raises(RuntimeError, match="no adapter is active: add one"):
        model.ranks()
    with pytest.raises(ValueError, match="there is no adapter 'a'; known adapters: none"):
        model.set_adapter("a")


def test_a_loaded_adapter_is_frozen_and_waits_until_it_is_set(gpt, ids, tmp_path):
    model = adapted(gpt)
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    for layer in model.adapters["default"].layers.values():
        nn.init.zeros_(layer.lora_B.weight)
    model.load_adapter(tmp_path, "loaded")
    assert model.active_adapter == "default"
    model.set_adapter("loaded")
    assert torch.equal(model(ids).logits, logits)
    assert not any(p.requires_grad for p in model.parameters())
    model.load_adapter(tmp_path, "trained", is_trainable=True)
    assert all(p.requires_grad for p in model.adapters["trained"].parameters().values())


def test_deleting_the_active_adapter_activates_the_first_of_the_others(gpt):
    model = adapted(gpt, "a")
    for name in "bc":
        model.add_adapter(name, LoraConfig(r=2, target_modules=["c_fc"]))
    model.set_adapter("b")
    with pytest.raises(ValueError, match="there is no adapter 'd'; known adapters: a, b, c"):
        model.delete_adapter("d")
    model.delete_adapter("c")
    assert model.active_adapter == "b"
    model.add_adapter("c", LoraConfig(r=2, target_modules=["c_fc"]))
    model.delete_adapter("b")
    assert model.active_adapter == "a"
    assert list(model.adapters) == ["a", "c"]


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_a_list_of_names_must_hold_one(gpt, names):
    with pytest.raises(ValueError, match=r"one adapter can be active, not \["):
        adapted(gpt, "a").set_adapter(names)


def test_merging_in_place_leaves_no_adapter_and_says_how_far_it_is(gpt, ids, capfd):
    model = adapted(gpt)
    logits = model(ids).logits
    plain = model.merge_and_unload()
    assert capfd.readouterr().err == ""
    assert model.adapters.keys() == {"default"}, "a copy leaves the adapters alone"
    merged = model.merge_and_unload(progressbar=True, inplace=True)
    assert "merging: 100%" in capfd.readouterr().err
    assert (model.adapters, model.active_adapter, model.is_attached) == ({}, None, False)
    assert torch.equal(model(ids).logits, merged(ids).logits)
    assert torch.allclose(model(ids).logits, logits, atol=1e-5)
    for base in (plain, merged):
        assert not hasattr(base, "has_adapters")
        assert quantize_model(base) is base


def test_safe_merge_looks_at_biases_too(gpt):
    model = get_peft_model(gpt, BitFitConfig(["ln_1", "c_fc"]))
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    gpt.transformer.h[1].mlp.c_fc.delta.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc: the merged weight has NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    model.merge_adapter()  # it is not checked by default
    model.unmerge_adapter()
    assert model.merge_and_unload().transformer.h[1].mlp.c_fc.bias[0].isinf()


def test_state_dict_has_the_options_of_nn_module(gpt):
    model, found = adapted(gpt), {"first": torch.zeros(1)}
    assert model.state_dict(destination=found) is found
    assert next(iter(found)) == "first"
    kept = model.state_dict(keep_vars=True)
    assert found.keys() - {"first"} == kept.keys()
    assert all(isinstance(tensor, nn.Parameter) for tensor in kept.values())
    assert not any(isinstance(tensor, nn.Parameter) for tensor in found.values())
    assert model.load_state_dict(kept) == ([], [])


def test_device_and_dtype_are_those_of_the_first_floating_point_parameter():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
        codes = torch.zeros(2, 2, dtype=torch.int8)
    base[0].weight = nn.Parameter(codes, requires_grad=False)
    model = get_peft_model(base, LoraConfig(r=1, target_modules=["1"]))
    assert model.device == torch.device("meta")
    assert model.dtype == torch.float16


def test_the_embeddings_count_among_the_trainable_parameters_only_if_trained(gpt):
    model = adapted(gpt)
    trainable = model.get_nb_trainable_parameters()[0]
    assert model.num_parameters(only_trainable=True, exclude_embeddings=True) == trainable


def test_bad_names_of_adapters_are_refused_before_anything_changes(gpt, ids, tmp_path):
    model = adapted(gpt)
    model.save_pretrained(tmp_path)
    before = model(ids).logits
    for name in ("default", "a.b", "a/b", "a\\b", "", None, 3):
        for add in (
            lambda name: model.add_adapter(name, LoraConfig(r=2, target_modules=["c_fc"])),
            lambda name: model.load_adapter(tmp_path, name),
            lambda name: model.add_weighted_adapter(["default"], [1.0], name),
        ):
            with pytest.raises(ValueError, match=r"adapter_name must have 1|already is an adapter"):
                add(name)
            assert list(model.adapters) == ["default"]
    assert torch.equal(model(ids).logits, before)


def test_an_unknown_name_cannot_be_set_or_deleted(gpt):
    model = adapted(gpt)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["c_fc"]))
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match="there is no adapter 'c'; known adapters: default, b"):
            call("c")
    assert list(model.adapters) == ["default", "b"]
    assert model.active_adapter == "default"


def test_a_merged_weight_has_the_bases_dtype(gpt):
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules=["c_fc"])
    model = get_peft_model(gpt.bfloat16(), config)
    assert model.get_submodule("transformer.h.0.mlp.c_fc").weight.dtype == torch.bfloat16


# --- what models outside this package may do ---


def test_generate_batch_is_that_of_the_base_with_the_adapter(gpt, ids):
    gpt.generate_batch = lambda ids, scale=1: scale * gpt(ids).logits
    model = adapted(gpt)
    model.add_adapter("prompt", CONFIGS["prompt"]())
    assert torch.equal(model.generate_batch(ids, scale=3), 3 * model(ids).logits)
    model.set_adapter("prompt")
    with model.disable_adapter():
        assert torch.equal(model.generate_batch(ids, scale=3), 3 * model(ids).logits)


def test_an_object_that_is_not_initialised_yet_has_no_attributes():
    """And no recursion without end: some copiers and debuggers ask before `__init__` ran."""
    empty = PeftModel.__new__(PeftModel)
    assert not hasattr(empty, "config")
    assert empty.forward.__self__ is empty, "methods are there"


def test_adaloras_scores_move_with_the_model_and_are_never_cast(gpt, ids):
    model = get_peft_model(gpt, CONFIGS["adalora"]()).train()
    for step in range(1, 4):  # the third prunes
        model(ids, labels=ids).loss.backward()
        model.update_and_allocate(step)

    def places() -> set:
        state = model.state_dict().items()
        return {(t.device.type, t.dtype) for key, t in state if ".allocator." in key} - step

    step = {("cpu", torch.int64)}  # a number that the CPU reads
    assert places() == {("cpu", torch.float32), ("cpu", torch.bool)}
    model.bfloat16()
    assert places() == {("cpu", torch.float32), ("cpu", torch.bool)}, "rounding changes the ranks"
    model.to("meta")
    assert places() == {("meta", torch.float32), ("meta", torch.bool)}


@pytest.mark.parametrize(
    "task", [None, *TaskType, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"]
)
def test_tasks_without_a_head_of_their_own_are_accepted(task):
    config = LoraConfig(r=1, target_modules=["0"], task_type=task)
    assert get_peft_model(nn.Sequential(nn.Linear(2, 2)), config).is_attached


def test_safe_merge_accepts_layers_without_a_bias(gpt):
    config = LoraConfig(r=1, target_modules=["c_fc"], trainable_token_indices=[3])
    get_peft_model(gpt, config).merge_adapter(safe_merge=True)


def test_a_move_that_is_not_recursive_moves_neither_the_base_nor_an_adapter(gpt):
    model = adapted(gpt)
    model.add_adapter("other", CONFIGS["lora"]())
    model.to_empty(device="meta", recurse=False)
    assert not any(t.is_meta for t in (*model.parameters(), *model.state_dict().values()))
