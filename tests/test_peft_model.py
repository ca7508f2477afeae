import json

import pytest
import torch
from test_lora import ALL, filled

from minipeft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model


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
        ({"r": "eight"}, "r is 'eight'"),
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
