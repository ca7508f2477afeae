import json

import pytest
import torch
from test_lora import ALL, filled

from minipeft import (
    GPT,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from minipeft.peft_model import quantize_model


def adapted(gpt, name="default", **changes) -> PeftModel:
    model = get_peft_model(gpt, LoraConfig(**({"r": 3, "target_modules": ALL} | changes)), name)
    filled(model.adapters[name].layers)
    return model


def test_disable_adapter_gives_the_bases_bits(gpt, ids):
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


def test_what_is_done_while_disabled_waits_until_it_is_over(gpt, ids):
    before = gpt(ids).logits
    model = adapted(gpt)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["c_fc"]))
    filled(model.adapters["other"].layers)
    with model.disable_adapter():
        model.set_adapter("other")
        assert torch.equal(model(ids).logits, before)
        with pytest.raises(RuntimeError, match="merge it outside"):
            model.merge_and_unload()
        model.delete_adapter("other")
        model.add_adapter("third", LoraConfig(r=2, target_modules=["c_fc"]))
        assert torch.equal(model(ids).logits, before)
    assert not torch.allclose(model(ids).logits, before)
    assert model.active_adapter == "default"
    with model.disable_adapter():
        model.unload()
    assert torch.equal(model(ids).logits, before)


def test_merge_and_unload_leaves_the_model_as_it_was(gpt, ids):
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


def test_merge_adapter_and_back(gpt, ids):
    model = adapted(gpt).eval()
    logits = model(ids).logits
    model.merge_adapter()
    assert torch.allclose(model(ids).logits, logits, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(ids).logits, logits)


def test_two_adapters_take_turns(gpt, ids):
    model = adapted(gpt)
    first = model(ids).logits
    model.add_adapter("other", LoraConfig(r=2, target_modules=["c_fc"]))
    assert torch.equal(model(ids).logits, first)
    model.set_adapter("other")
    with model.disable_adapter():
        base = model(ids).logits
    assert torch.equal(model(ids).logits, base), "its B is zero"
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * (24 + 96)
    model.double()  # reaches the adapter that is not in place
    assert {t.dtype for t in model.adapters["default"].tensors().values()} == {torch.float64}
    model.set_adapter("default")
    assert torch.allclose(model(ids).logits.float(), first, atol=1e-4)
    model.delete_adapter("default")
    assert model.active_adapter == "other"
    with pytest.raises(ValueError, match="no adapter 'default'; there are: other"):
        model.set_adapter("default")
    with pytest.raises(ValueError, match="already"):
        model.add_adapter("other", LoraConfig(target_modules=ALL))


def test_an_adapter_that_is_put_in_takes_the_models_mode(gpt, ids):
    model = adapted(gpt, lora_dropout=0.5)
    model.add_adapter("prompt", PromptEncoderConfig(num_virtual_tokens=2))
    model.train().set_adapter("prompt")
    model.eval().set_adapter("default")  # it was in training mode when it was taken out
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train().set_adapter("prompt")
    assert all(module.training for module in model.modules())


def test_saving_and_loading_gives_the_same_bits(gpt, ids, tmp_path):
    model = adapted(gpt, use_rslora=True, rank_pattern={"c_fc": 2})
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
    assert torch.equal(torch.rand(1), drawn), "loading leaves no trace in the random numbers"
    assert torch.equal(again(ids).logits, logits)
    assert again.get_nb_trainable_parameters()[0] == 0, "frozen unless asked"
    again.load_adapter(tmp_path / "second", "second", is_trainable=True)
    again.set_adapter("second")
    assert torch.equal(again(ids).logits, second)
    assert again.get_nb_trainable_parameters()[0] > 0


def test_a_config_of_peft_is_taken_or_refused_by_name(gpt, tmp_path):
    adapted(gpt, task_type=TaskType.CAUSAL_LM).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    found = json.loads(file.read_text())
    assert found["task_type"] == "CAUSAL_LM"
    file.write_text(
        json.dumps(found | {"use_dora": False, "bias": "none", "peft_version": "0.21.2"})
    )
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, PeftConfig)
    assert config.other_keys["use_dora"] is False
    again = PeftModel.from_pretrained(GPT(gpt.config), tmp_path, is_trainable=True)
    assert not again.peft_config["default"].inference_mode
    again.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written == json.loads(file.read_text())
    for key, value in [("use_dora", True), ("bias", "all"), ("init_lora_weights", False)]:
        file.write_text(json.dumps(found | {key: value}))
        with pytest.raises(ValueError, match=f"{key} is {value!r}, and that is not implemented"):
            PeftConfig.from_pretrained(tmp_path)


def test_bad_folders_are_one_clear_error(gpt, tmp_path):
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
        ({"r": 4}, "does not fit"),
        ({"target_modules": ["c_attn"]}, "has no place"),
        ({"target_modules": ["q_proj"]}, "'q_proj' matches no module"),
        ({"target_modules": "all-linear", "rank_pattern": {"nope": 2}}, "nope"),
        ({"peft_type": "MAGIC"}, "peft_type is 'MAGIC'"),
        ({"r": "eight"}, "r is 'eight', and not int"),
        ({"r": True}, "r is True, and not int"),
        ({"target_modules": [7]}, r"target_modules is \[7\], and not list\[str\]"),
        ({"rank_pattern": {"c_fc": 2.5}}, "rank_pattern"),
        ({"target_modules": "("}, r"adapter_config.json: missing \)"),
        ({"r": 10**15}, "adapter_config.json: "),  # more than any memory
        ({"r": 10**40}, "adapter_config.json: "),  # more than a tensor's shape can be
    ]:
        config.write_text(json.dumps(described | change))
        refused(message)
    config.write_text("{")
    refused("cannot be read")
    config.write_text(json.dumps(described))
    weights.write_bytes(whole[:-10])
    refused("is damaged")
    weights.rename(tmp_path / "adapter_model.bin")
    refused("never read")


def test_the_printed_line(gpt, capsys):
    model = adapted(gpt)
    model.print_trainable_parameters()
    n, total = model.get_nb_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {n:,} || all params: {total:,} || trainable%: {100 * n / total:.4f}\n"
    )


def test_wrong_configs_and_models_are_refused(gpt):
    with pytest.raises(TypeError, match="not a config"):
        get_peft_model(gpt, {"r": 8})
    with pytest.raises(ValueError, match="already"):
        get_peft_model(adapted(gpt), LoraConfig(target_modules=ALL))


def three_loras(gpt) -> PeftModel:
    """LoRAs of ranks 3, 2 and 3, on other layers each, the last by an expression."""
    model = adapted(gpt.double(), "a", lora_alpha=5).double()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["c_fc"], use_rslora=True))
    model.add_adapter("c", LoraConfig(r=3, target_modules=r".*\.1\.attn\.c_\w+"))
    for name in "bc":
        filled(model.double().adapters[name].layers)
    return model


def changes(model, name) -> dict:
    """ΔW by layer."""
    return {key: layer.delta() for key, layer in model.adapters[name].layers.items()}


def wanted_sum(model, weights: dict) -> dict:
    total = {}
    for name, w in weights.items():
        for key, delta in changes(model, name).items():
            total[key] = total.get(key, 0) + w * delta
    return total


@pytest.mark.parametrize(
    ("names", "kind", "rank", "r"),
    [("abc", "cat", None, 8), ("bc", "cat", None, 5), ("abc", "svd", 8, 8), ("a", "svd", 1, 3)],
)
def test_a_weighted_adapter_adds_the_changes_up(gpt, names, kind, rank, r):
    """Exact where the rank suffices; one adapter keeps its own."""
    model = three_loras(gpt)
    weights = dict(zip(names, (0.7, -1.5, 0.25), strict=False))
    before = {n: {k: t.clone() for k, t in model.adapters[n].tensors().items()} for n in names}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", kind, rank)
    found, expected = changes(model, "sum"), wanted_sum(model, weights)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], expected[key], atol=1e-12) for key in expected)
    assert {layer.r for layer in model.adapters["sum"].layers.values()} == {r}
    assert model.active_adapter == "a"
    for name in names:
        found = model.adapters[name].tensors()
        assert all(torch.equal(found[key], tensor) for key, tensor in before[name].items())


def test_svd_is_the_nearest_of_its_rank_and_linear_is_not_a_sum(gpt):
    model = three_loras(gpt)
    weights = {"a": 0.7, "c": -1.5}
    expected = wanted_sum(model, weights)
    model.add_weighted_adapter(list(weights), list(weights.values()), "svd")  # the default; rank 3
    for key, delta in changes(model, "svd").items():
        u, s, v = torch.linalg.svd(expected[key])
        assert torch.allclose(delta, u[:, :3] * s[:3] @ v[:3], atol=1e-12)
        missed = torch.linalg.norm(delta - expected[key])
        assert torch.allclose(missed, s[3:].square().sum().sqrt(), atol=1e-12)
    model.add_weighted_adapter(list(weights), list(weights.values()), "linear", "linear")
    (a, c), shared = (model.adapters[n].layers for n in "ac"), "transformer.h.1.attn.c_attn"
    (p, q), root = (
        (a[shared], c[shared]),
        (1.5 * c[shared].scaling * 0.7 * a[shared].scaling) ** 0.5,
    )
    cross = root * (q.lora_B.weight @ p.lora_A.weight - p.lora_B.weight @ q.lora_A.weight)
    off = changes(model, "linear")[shared] - expected[shared]
    assert torch.allclose(off, cross, atol=1e-12)
    assert off.norm() > 0.5 * expected[shared].norm()
    alone = "transformer.h.0.mlp.c_fc"  # one of the two has nothing here: exact
    assert torch.allclose(changes(model, "linear")[alone], expected[alone], atol=1e-12)


def test_a_weighted_adapter_is_one_like_any_other(gpt, ids, tmp_path):
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


def test_loras_on_a_4bit_base_add_up_too(gpt, ids):
    quantize_model(gpt)
    model = adapted(gpt, "a").eval()
    model.add_weighted_adapter(["a", "a"], [1.5, -0.5], "sum", "svd")
    told = model(ids).logits
    model.set_adapter("sum")
    assert model.peft_config["sum"].peft_type == "QLORA"
    assert torch.allclose(model(ids).logits, told, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(model(ids).logits, told, atol=1e-3)


def test_weighted_sums_that_cannot_be_are_refused(gpt):
    model = three_loras(gpt)
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2))
    for arguments, message in [
        ((["a", "d"], [1, 1], "sum"), "no adapter 'd'; there are: a, b, c, prompt"),
        ((["a", "b"], [1], "sum"), r"weights are \[1\]: give a number for each"),
        (([], [], "sum"), "give a number for each"),
        ((["a", "b"], [1, float("nan")], "sum"), r"weights are \[1, nan\]"),
        ((["a", "b"], [1, "2"], "sum"), r"weights are \[1, '2'\]"),
        ((["a", "prompt"], [1, 1], "sum"), "PROMPT_TUNING has no weighted sum"),
        ((["a", "b"], [1, 1], "sum", "ties"), "'ties'; there are: svd, linear, cat"),
        ((["a", "b"], [1, 1], "sum", "linear"), r"have \[3, 2\]: take svd or cat"),
        ((["a", "b"], [1, 1], "sum", "svd", -1), "r is -1"),
        ((["a", "b"], [1, 1], "c"), "there is an adapter 'c' already"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
        assert list(model.adapters) == ["a", "b", "c", "prompt"]
        assert model.in_place
