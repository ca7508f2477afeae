import math

import pytest
import torch
from torch import nn

from minipeft import GPT, LoraConfig, get_peft_model
from minipeft.lora import LoraLinear, add_lora, lora_layers, merge_lora, remove_lora, unmerge_lora

ALL = ["c_attn", "c_proj", "c_fc"]


def filled(layers: dict) -> dict:
    """Give every B values: with B = 0 a merge test could not fail."""
    generator = torch.Generator().manual_seed(3)
    for layer in layers.values():
        w = layer.lora_B.weight
        w.data = torch.randn(w.shape, generator=generator).to(w) * 0.05
    return layers


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
def test_merge_gives_the_same_logits(trained_base, dtype, bound):
    model = trained_base.to(dtype)
    ids = torch.randint(1, 2048, (4, 64), generator=torch.Generator().manual_seed(0))
    base_logits = model(ids).logits
    layers = filled(add_lora(model, LoraConfig(r=8, lora_alpha=12, target_modules=ALL)))
    logits = model(ids).logits
    largest = logits.abs().max()
    assert (logits - base_logits).abs().max() > 0.05 * largest, "the adapter must do something"
    for _ in range(3):  # again and again, nothing drifts
        merge_lora(layers)
        merged = model(ids).logits
        assert (merged - logits).abs().max() < bound * largest
        unmerge_lora(layers)
        assert torch.equal(model(ids).logits, logits)
    remove_lora(model, layers)
    assert torch.equal(model(ids).logits, base_logits)


@pytest.mark.parametrize("r", [1, 4, 8])
def test_the_parameter_count_is_the_formulas(gpt, r):
    d = gpt.config.n_embd
    model = get_peft_model(gpt, LoraConfig(r=r, target_modules=ALL))
    per_block = (d + 3 * d) + (d + d) + (d + 4 * d) + (4 * d + d)
    assert model.get_nb_trainable_parameters()[0] == r * per_block * gpt.config.n_layer


def test_at_first_nothing_has_changed(gpt, ids):
    before = gpt(ids).logits
    add_lora(gpt, LoraConfig(target_modules=ALL))
    assert torch.equal(gpt(ids).logits, before)


def test_only_the_adapter_gets_gradients(gpt, ids):
    filled(add_lora(gpt, LoraConfig(target_modules=ALL)))
    gpt(ids, labels=ids).loss.backward()
    for name, p in gpt.named_parameters():
        assert (p.grad is not None and p.grad.abs().max() > 0) == ("lora_" in name), name


def test_the_output_is_equation_1():
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(7, 5).double(), r=3, lora_alpha=2.5)
    filled({"": layer})
    x = torch.randn(2, 4, 7).double()
    w = layer.weight + 2.5 / 3 * layer.lora_B.weight @ layer.lora_A.weight
    assert torch.allclose(layer(x), x @ w.T + layer.bias, rtol=0, atol=1e-14)


def test_rslora_scales_by_the_root_of_the_rank():
    assert LoraLinear(nn.Linear(4, 4), 9, 6, use_rslora=True).scaling == 6 / math.sqrt(9)


def test_targets_are_found_by_ending_by_regex_and_all(gpt):
    def found(targets):
        return list(lora_layers(gpt, LoraConfig(target_modules=targets)))

    assert found(["mlp.c_proj"]) == [f"transformer.h.{i}.mlp.c_proj" for i in range(2)]
    assert found(r".*h\.1\.attn\.c_.*") == [
        f"transformer.h.1.attn.{n}" for n in ("c_attn", "c_proj")
    ]
    assert len(found("all-linear")) == 8  # and not the head


def test_patterns_give_a_layer_its_own_rank_and_alpha(gpt):
    config = LoraConfig(
        r=8,
        target_modules=ALL,
        rank_pattern={"attn.c_proj": 2, "c_proj": 3},
        alpha_pattern={r"h\.0\.mlp\.c_fc": 32},
    )
    layers = lora_layers(gpt, config)
    assert layers["transformer.h.0.attn.c_proj"].r == 2  # the first hit wins
    assert layers["transformer.h.0.mlp.c_proj"].r == 3
    assert layers["transformer.h.0.mlp.c_fc"].scaling == 4
    assert layers["transformer.h.1.mlp.c_fc"].scaling == 1


def test_dropout_works_in_training_mode_alone():
    torch.manual_seed(0)
    layer = filled({"": LoraLinear(nn.Linear(64, 8), 4, 8, lora_dropout=0.5)})[""]
    x = torch.randn(3, 64)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_training_while_merged_is_an_error(gpt, ids):
    layers = add_lora(gpt, LoraConfig(target_modules=ALL))
    merge_lora(layers)
    with pytest.raises(RuntimeError, match="unmerge"):
        gpt.train()(ids)


def test_a_step_under_bfloat16_autocast(gpt, ids):
    filled(add_lora(gpt, LoraConfig(target_modules=ALL)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = gpt(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in gpt.parameters() if p.requires_grad)


def test_a_bfloat16_base_gets_a_float32_adapter(gpt, ids):
    layers = add_lora(gpt.bfloat16(), LoraConfig(target_modules=ALL))
    assert all(layer.lora_A.weight.dtype == torch.float32 for layer in layers.values())
    assert gpt(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, "r is 2.5"),
        ({"rank_pattern": {"c_fc": -1}}, "rank_pattern"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**changes)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["c_attn", "c_porj"], "'c_porj' matches no module; linear ones are: c_attn, c_fc, c_proj"),
        (None, "matches no module"),
        ("c_attn", "matches no module"),  # a string is a regex for the whole name
        (["ln_1"], "is a LayerNorm"),
        (["lm_head"], "shares its weight"),
    ],
)
def test_targets_that_cannot_be_right_are_refused(gpt, targets, message):
    flags = [p.requires_grad for p in gpt.parameters()]
    with pytest.raises(ValueError, match=message):
        add_lora(gpt, LoraConfig(target_modules=targets))
    assert [p.requires_grad for p in gpt.parameters()] == flags
    assert not any(isinstance(m, LoraLinear) for m in gpt.modules())


def test_a_pattern_without_a_match_is_refused(gpt):
    with pytest.raises(ValueError, match="c_porj"):
        add_lora(gpt, LoraConfig(target_modules=ALL, rank_pattern={"c_porj": 2}))


def test_a_second_adapter_in_place_is_refused(gpt):
    add_lora(gpt, LoraConfig(target_modules=ALL))
    with pytest.raises(ValueError, match="in place already"):
        add_lora(gpt, LoraConfig(target_modules=ALL))


@pytest.mark.parametrize("targets", [["linear1"], ["out_proj"]])
def test_targets_that_pytorch_would_skip_are_refused(targets):
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    with pytest.raises(ValueError, match="skips an adapter"):
        add_lora(model, LoraConfig(target_modules=targets))


def test_multihead_attention_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    with pytest.raises(ValueError, match="skips an adapter"):
        add_lora(Net(), LoraConfig(target_modules=["out_proj"]))


def test_gradient_checkpointing_gives_the_same_gradients(gpt, ids):
    filled(add_lora(gpt, LoraConfig(target_modules=ALL)))
    parameters = [p for p in gpt.parameters() if p.requires_grad]
    plain = torch.autograd.grad(gpt(ids, labels=ids).loss, parameters)
    gpt.gradient_checkpointing_enable()
    again = torch.autograd.grad(gpt.train()(ids, labels=ids).loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert isinstance(gpt, GPT)
