"""Which layers get an adapter, which are refused, and what is said about weights left out."""

import pytest
import torch
from test_qlora import Conv1D
from torch import nn
from torch.nn.utils import parametrizations

from minipeft import BitFitConfig, LoraConfig, get_peft_model, quantize_model
from minipeft.methods.qlora import Linear4bit
from minipeft.targets import find_targets


class Half(nn.Linear):
    """Computes W x / 2 + b."""

    def forward(self, x):
        return super().forward(x / 2)


class Router(nn.Linear):
    """Returns more than one tensor, as routers of mixtures of experts do."""

    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.softmax(-1)


class ByHand(nn.Linear):
    """Computes W x + b in its own way, as Falcon's layers do."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Eight(nn.Linear):
    """A layer with integer weights, as those of bitsandbytes."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.weight = nn.Parameter(torch.zeros(n_out, n_in, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return x


class Experts(nn.Module):
    """Several matrices in one parameter, which no adapter for linear layers reaches."""

    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        return x @ self.down_proj[0]


def lora(model, targets):
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets))


@pytest.mark.parametrize("layer", [Half(8, 8), Router(8, 8), Eight(8, 8)])
def test_a_subclass_that_does_not_compute_wx_is_refused_and_skipped_by_all_linear(layer):
    model = nn.Sequential(nn.Linear(8, 8), layer)
    with pytest.raises(ValueError, match=f"target 1 is a {type(layer).__name__}: it does not comp"):
        lora(model, ["1"])
    assert model[1] is layer
    with pytest.warns(UserWarning, match=r"'?all-linear'? does not reach .*: 1.weight"):
        assert list(lora(model, "all-linear").adapters["default"].layers) == ["0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_subclass_is_tested_in_the_dtype_of_its_weight(dtype):
    model = nn.Sequential(ByHand(8, 6)).to(dtype)
    assert list(find_targets(model, ["0"])) == ["0"]
    assert list(find_targets(model.to("meta"), ["0"])) == ["0"], "nothing can be computed there"


@pytest.mark.parametrize("change", [lambda x: x.clamp(-0.9, 0.9), torch.abs, torch.relu])
def test_a_subclass_that_computes_wx_for_some_inputs_only_is_refused(change):
    class Changed(nn.Linear):
        def forward(self, x):
            return super().forward(change(x))

    with pytest.raises(ValueError, match="it does not compute W x"):
        find_targets(nn.Sequential(Changed(8, 8)), ["0"])


def test_a_subclass_that_computes_wx_is_adapted_and_merged():
    model, x = nn.Sequential(ByHand(8, 8)), torch.randn(3, 8)
    adapted = lora(model, ["0"]).eval()
    nn.init.normal_(adapted.base_model[0].lora_B.weight)
    expected = adapted(x)
    merged = adapted.merge_and_unload()
    assert type(merged[0]) is ByHand
    assert torch.allclose(merged(x), expected, atol=1e-5)


def test_quantize_model_keeps_layers_with_a_forward_of_their_own_and_names_them():
    model, x = nn.Sequential(nn.Linear(8, 8), Half(8, 8)), torch.randn(3, 8)
    with pytest.warns(UserWarning, match=r"quantize_model does not reach .*: 1.weight \(44.4%\)"):
        quantize_model(model)
    assert isinstance(model[0], Linear4bit)
    assert torch.allclose(model(x), model[0](x) / 2 @ model[1].weight.T + model[1].bias)


@pytest.mark.parametrize("do", [quantize_model, lambda model: lora(model, "all-linear")])
def test_weights_that_are_not_reached_are_named_with_their_share(do):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Experts(), Experts()))
    with pytest.warns(UserWarning, match=r"does not reach .*: 1.\*.down_proj \(87.7%\)"):
        do(model)


def test_no_warning_where_everything_is_reached(gpt, recwarn):
    lora(quantize_model(gpt), "all-linear")
    assert not recwarn.list


def test_no_warning_about_weights_that_were_not_asked_for(recwarn):
    model = nn.Sequential(nn.Linear(8, 8), Experts())
    lora(model, ["0"]).unload()
    get_peft_model(model, BitFitConfig("all-linear"))  # experts have no bias
    assert not recwarn.list


@pytest.mark.parametrize("by", ["object", "memory"])
def test_a_tied_weight_is_refused(gpt, by):
    weight = gpt.transformer.wte.weight
    gpt.lm_head.weight = weight if by == "object" else nn.Parameter(weight.data)
    with pytest.raises(ValueError, match="lm_head shares its weight with another module"):
        lora(gpt, ["lm_head"])


def test_a_weight_that_is_computed_is_refused():
    """A merge would write into the computed tensor, and be lost."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)))
    with pytest.raises(ValueError, match="target 0 cannot be adapted: its weight is computed"):
        lora(model, ["0"])


@pytest.mark.parametrize("config", [LoraConfig(r=2, target_modules=["0"]), BitFitConfig()])
def test_a_weight_that_accelerate_offloaded_is_refused(config):
    """An adapter made next to it would be on the meta device too, and hold no numbers."""
    model = nn.Sequential(nn.Linear(6, 6, device="meta"))
    get_peft_model(model, config).unload()  # a model without numbers can still be counted
    model[0]._hf_hook = object()
    with pytest.raises(ValueError, match=r"its (weight|bias) is offloaded by accelerate"):
        get_peft_model(model, config)


def test_a_layer_with_two_names_is_quantized_under_both():
    layer = nn.Linear(6, 6)
    model = quantize_model(nn.Sequential(layer, layer))
    assert model[0] is model[1]
    assert isinstance(model[1], Linear4bit)


def test_a_compiled_base_is_refused(gpt):
    """Its layers' names would be written into the adapter's file."""
    with pytest.raises(ValueError, match="add the adapter first, then call"):
        lora(torch.compile(gpt, backend="eager"), ["c_attn"])


def test_a_conv1d_of_transformers_is_a_linear_layer():
    model, x = nn.Sequential(Conv1D(5, 3)), torch.randn(2, 3)
    plain = model(x)
    for targets in ("all-linear", ["0"]):
        adapted = lora(model, targets).eval()
        layer = adapted.base_model[0]
        nn.init.ones_(layer.lora_B.weight)
        update = x @ (4 * layer.lora_A.weight.sum(0))  # α / r = 8 / 2
        assert torch.allclose(adapted(x) - plain, update[:, None].expand(2, 5), atol=1e-5)
        adapted.unload()


@pytest.mark.parametrize("config", [LoraConfig(r=2, target_modules=["0"]), BitFitConfig()])
def test_a_layer_that_accelerate_placed_but_did_not_offload_is_adapted(config):
    """device_map="auto" gives every layer a hook."""
    model = nn.Sequential(nn.Linear(6, 6))
    model[0]._hf_hook = object()
    assert list(get_peft_model(model, config).adapters["default"].layers) == ["0"]
