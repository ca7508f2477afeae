"""BitFit and bottleneck adapters: what both share, then each on its own."""

import copy
import json
import math
import threading

import pytest
import torch
from conftest import BASE, tiny_config
from test_qlora import Conv1D
from torch import nn

from minipeft import (
    GPT,
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    quantize_model,
)
from minipeft.adapters import merge_into_base
from minipeft.lab import recipes
from minipeft.lab.finetune import build_model
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.methods.adalora import SVDLinear
from minipeft.methods.bitfit import BitFitLayer, add_bitfit
from minipeft.methods.bottleneck import BottleneckLayer, add_bottleneck
from minipeft.methods.lora import LoraLinear, add_lora
from minipeft.methods.qlora import Linear4bit, QLoraLinear
from minipeft.targets import find_targets

CONFIGS = {
    "bitfit": lambda: BitFitConfig(),
    "bottleneck": lambda: BottleneckConfig(["attn.c_proj", "mlp.c_proj"], bottleneck_size=5),
}
ADD = {"bitfit": add_bitfit, "bottleneck": add_bottleneck}
PART = {"bitfit": "bias", "bottleneck": "weight"}
OWN = (".delta", ".down.weight", ".down.bias", ".up.weight", ".up.bias")


def filled(model: nn.Module) -> nn.Module:
    """Randomize every trainable parameter: a new adapter changes nothing."""
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data + 0.1 * torch.randn(p.shape, generator=generator).to(p)
    return model


def train(model, ids, steps=10) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


# --- both ---


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
def test_merging_does_not_change_the_logits(trained_base, dtype, bound):
    model = trained_base.to(dtype)
    ids = torch.randint(1, 2048, (4, 64), generator=torch.Generator().manual_seed(0))
    base_logits = model(ids).logits
    model = filled(get_peft_model(model, BitFitConfig())).eval()
    logits = model(ids).logits
    largest = logits.abs().max()
    assert (logits - base_logits).abs().max() > 0.05 * largest, "the adapter has no effect"
    for _ in range(3):  # repeated merging must not drift
        model.merge_adapter()
        assert (model(ids).logits - logits).abs().max() < bound * largest
        model.unmerge_adapter()
        assert torch.equal(model(ids).logits, logits)
    plain = model.merge_and_unload()
    assert type(plain) is GPT
    assert not any(isinstance(m, BitFitLayer) for m in plain.modules())
    assert (plain(ids).logits - logits).abs().max() < bound * largest
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.unload()(ids).logits, base_logits)


@pytest.mark.parametrize(
    ("name", "count"),
    [  # the docstrings' formulas with d 24 and 2 blocks: all biases; r 5, two adapters per block
        ("bitfit", 2 * (24 + 72 + 24 + 24 + 96 + 24) + 24),
        ("bottleneck", 2 * 2 * (2 * 5 * 24 + 5 + 24)),
    ],
)
def test_the_parameter_count_follows_the_formula(gpt, name, count):
    assert get_peft_model(gpt, CONFIGS[name]()).get_nb_trainable_parameters()[0] == count


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_adapter_does_not_change_the_logits(gpt, ids, name):
    before = gpt(ids).logits
    assert torch.equal(get_peft_model(gpt, CONFIGS[name]())(ids).logits, before)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_adapter_gets_gradients(gpt, ids, name, alone):
    if alone:
        ADD[name](gpt, CONFIGS[name]())
    model = filled(gpt if alone else get_peft_model(gpt, CONFIGS[name]()))
    model(ids, labels=ids)[0].backward()
    for key, p in model.named_parameters():
        own = key.endswith(OWN) and "base_layer" not in key
        assert p.requires_grad == own == (p.grad is not None and p.grad.abs().max() > 0), key


@pytest.mark.parametrize("name", CONFIGS)
def test_training_lowers_the_loss_and_does_not_change_the_base(gpt, ids, name):
    plain, before = gpt(ids).logits, copy.deepcopy(gpt.state_dict())
    model = get_peft_model(gpt, CONFIGS[name]())
    losses = train(model, ids)
    assert losses[-1] < losses[0] - 0.1
    assert not torch.allclose(model(ids).logits, plain, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model.unload()(ids).logits, plain)
    assert all(torch.equal(before[key], value) for key, value in gpt.state_dict().items())


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_saving_and_loading_gives_identical_logits(gpt, ids, tmp_path, name, trainable):
    base = copy.deepcopy(gpt)
    model = filled(get_peft_model(gpt, CONFIGS[name]()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path, is_trainable=trainable).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    count = model.get_nb_trainable_parameters()[0]
    assert again.get_nb_trainable_parameters()[0] == (count if trainable else 0)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == name.upper()
    keys = model.adapters["default"].tensors()
    assert all(k.startswith("base_model.model.transformer.") and k.endswith(OWN) for k in keys)
    assert not any("base_layer" in key for key in keys)


@pytest.mark.parametrize("name", CONFIGS)
def test_targets_may_be_a_set_and_layers_are_in_the_models_order(gpt, tmp_path, name):
    config = CONFIGS[name]()
    config.target_modules = {"mlp.c_proj", "attn.c_proj", "c_fc"}
    model = get_peft_model(gpt, config)
    names = [n for n, _ in gpt.named_modules() if n.endswith(("c_proj", "c_fc"))]
    assert list(model.adapters["default"].layers) == names
    model.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found["target_modules"] == ["attn.c_proj", "c_fc", "mlp.c_proj"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_a_model_of_another_width_is_refused(gpt, tmp_path, name):
    get_peft_model(gpt, CONFIGS[name]()).save_pretrained(tmp_path)
    wider = GPT(tiny_config(n_embd=36))
    with pytest.raises(ValueError, match=r"adapter does not match this model: .* is .* not .*"):
        PeftModel.from_pretrained(wider, tmp_path)
    assert all(p.requires_grad for p in wider.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_under_autocast_are_close_and_with_checkpointing_identical(gpt, ids, name):
    model = filled(get_peft_model(gpt, CONFIGS[name]())).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    exact = model(ids, labels=ids)[0]
    gradients = torch.autograd.grad(exact, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids)[0]
    rough = torch.autograd.grad(loss, parameters)
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    for a, b in zip(rough, gradients, strict=True):
        assert (a - b).norm() < 0.1 * b.norm()
    model.gradient_checkpointing_enable()
    again = torch.autograd.grad(model(ids, labels=ids)[0], parameters)
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bfloat16_base_gets_a_float32_adapter(gpt, ids, name):
    model = get_peft_model(gpt.bfloat16(), CONFIGS[name]())
    assert {t.dtype for t in model.adapters["default"].tensors().values()} == {torch.float32}
    assert model(ids).logits.dtype == torch.bfloat16
    if name == "bitfit":
        model.merge_adapter()
        merged = {layer.merged_bias.dtype for layer in model.adapters["default"].layers.values()}
        assert merged == {torch.bfloat16}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_can_be_switched_with_lora_on_one_base(gpt, ids, name):
    base = gpt(ids).logits
    model = filled(get_peft_model(gpt, CONFIGS[name]()))
    first = model(ids).logits
    model.add_adapter("other", LoraConfig(target_modules=["c_attn"]))
    model.set_adapter("other")
    assert torch.equal(model(ids).logits, base)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, first)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_targets_are_found_by_ending_by_regex_and_by_all_linear(gpt, name, strict):
    def found(targets):
        if strict:
            return list(find_targets(gpt, targets, PART[name]))
        config = CONFIGS[name]()
        config.target_modules = targets
        return list(ADD[name](copy.deepcopy(gpt), config))

    assert found(["mlp.c_proj"]) == [f"transformer.h.{i}.mlp.c_proj" for i in range(2)]
    one = [f"transformer.h.1.attn.{n}" for n in ("c_attn", "c_proj")]
    assert found(r".*h\.1\.attn\.c_.*") == one
    assert len(found("all-linear")) == 8, "all-linear must leave out the output head and the norms"
    assert not any(hasattr(m, "base_layer") for m in gpt.modules())


KNOWN = {
    "bitfit": "layers with a bias: c_attn, c_fc, c_proj, ln_1, ln_2, ln_f$",
    "bottleneck": "linear layers: c_attn, c_fc, c_proj, lm_head$",
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["c_attn", "c_porj"], "target_modules: 'c_porj' matches no module; "),
        ([], "target_modules names nothing; "),
        (["h.0.attn"], r"target transformer\.h\.0\.attn is a Attention; this method adapts "),
        ("c_attn", "target_modules: 'c_attn' matches no module; "),  # a regex for the whole name
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(gpt, name, targets, message):
    config = CONFIGS[name]()
    config.target_modules = targets
    with pytest.raises(ValueError, match=message + KNOWN[name]):
        get_peft_model(gpt, config)
    assert all(p.requires_grad for p in gpt.parameters())
    assert not any(hasattr(m, "base_layer") for m in gpt.modules())


@pytest.mark.parametrize(
    "targets", [[], ["c_porj"], ["proj"], "c_attn", r"transformer\.h\.0\.attn\.c_at", ["h.0.attn"]]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_adding_without_any_match_is_refused(gpt, name, targets):
    config = CONFIGS[name]()
    config.target_modules = targets
    with pytest.raises(ValueError, match=r"target_modules=.* matches no (linear )?layer"):
        ADD[name](gpt, config)
    assert all(p.requires_grad for p in gpt.parameters())
    assert not any(hasattr(m, "base_layer") for m in gpt.modules())


@pytest.mark.parametrize("name", CONFIGS)
def test_adding_ignores_an_entry_without_a_match_next_to_one_that_matches(gpt, name):
    config = CONFIGS[name]()
    config.target_modules = ["c_attn", "c_porj"]
    assert list(ADD[name](gpt, config)) == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_second_adapter_on_the_same_model_is_refused(gpt, name):
    add_lora(gpt, LoraConfig(target_modules=["c_attn"]))
    for add in (get_peft_model, ADD[name]):
        with pytest.raises(ValueError, match="already has an adapter: remove it before adding"):
            add(gpt, CONFIGS[name]())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("model", "target"),
    [
        (nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)), "linear2"),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), "linear2"),
        (Attention(), "out_proj"),
    ],
)
def test_layers_that_pytorchs_fast_path_reads_are_refused(name, model, target):
    config = CONFIGS[name]()
    config.target_modules = [target]
    message = f"{target}: PyTorch reads its {PART[name]} directly"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_with_two_names_is_refused(name):
    block = nn.Sequential(nn.Linear(4, 4))
    config = CONFIGS[name]()
    config.target_modules = "0.0"
    message = rf"target 0\.0 shares its {PART[name]} with another module: untie it first"
    with pytest.raises(ValueError, match=message):
        get_peft_model(nn.Sequential(block, block), config)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_conv1d_is_a_linear_layer(name):
    """transformers' Conv1D is linear with an (in, out) weight; only its class name tells."""

    class Conv1D(nn.Module):
        def __init__(self, n_out: int, n_in: int):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(n_in, n_out))
            self.bias = nn.Parameter(torch.ones(n_out))

        def forward(self, x):
            return x @ self.weight + self.bias

    model, x = nn.Sequential(Conv1D(6, 4), Conv1D(6, 6)), torch.randn(3, 4)
    before = model(x)
    config = CONFIGS[name]()
    config.target_modules = ["0", "1"]
    layers = ADD[name](model, config)
    assert torch.equal(model(x), before)
    if name == "bottleneck":
        assert [(s.in_features, s.out_features) for s in layers.values()] == [(4, 6), (6, 6)]


@pytest.mark.parametrize("name", CONFIGS)
def test_new_layers_follow_the_device_and_the_mode_of_the_model(gpt, name):
    for mode in (True, False):
        base = copy.deepcopy(gpt).to("meta").train(mode)
        layers = ADD[name](base, CONFIGS[name]())
        assert {p.device.type for p in base.parameters()} == {"meta"}
        assert {m.training for layer in layers.values() for m in layer.modules()} == {mode}


CONFIG_CLASSES = [
    AdaLoraConfig, BitFitConfig, BottleneckConfig, LoraConfig, PrefixTuningConfig,
    PromptEncoderConfig, PromptTuningConfig,
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIG_CLASSES)
def test_the_class_of_a_config_fixes_its_peft_type(config):
    with pytest.raises(TypeError, match="peft_type"):
        config(peft_type="LORA")


MERGED = {
    "lora": lambda base: LoraLinear(base, LoraConfig(r=2)),
    "adalora": lambda base: SVDLinear(base, AdaLoraConfig(total_step=9)),
    "qlora": lambda base: QLoraLinear(Linear4bit(base), LoraConfig(r=2)),
    "bitfit": lambda base: BitFitLayer(base, BitFitConfig()),
}


@pytest.mark.parametrize("name", MERGED)
def test_a_merged_layer_is_not_part_of_a_graph(name):
    """Otherwise every output of a merged model would keep its activations in memory."""
    base = nn.Linear(6, 4).requires_grad_(False)
    layer = MERGED[name](base).eval()
    layer.merge()
    assert not layer(torch.ones(1, 6)).requires_grad, "the stored W' or b' must be a constant"
    plain = merge_into_base(MERGED[name](base))
    assert not any(p.requires_grad for p in plain.parameters()), "merging must keep W frozen"


@pytest.mark.parametrize("name", MERGED)
def test_a_merged_layer_in_training_mode_runs_only_without_gradients(name):
    layer, x = MERGED[name](nn.Linear(6, 4)).train(), torch.ones(1, 6)
    y = layer(x)
    layer.merge()
    with pytest.raises(RuntimeError, match="this layer is merged: call unmerge"):
        layer(x)
    with torch.no_grad():
        assert torch.allclose(layer(x), y, atol=1e-6)


@pytest.mark.parametrize("name", MERGED)
def test_the_weight_of_an_adapted_layer_computes_its_output(name):
    """For code that reads `weight` and `bias` instead of calling the layer."""
    torch.manual_seed(0)
    layer, x = MERGED[name](nn.Linear(6, 4)), torch.randn(3, 6)
    for p in layer.parameters():
        p.data = torch.randn_like(p)
    expected = layer(x)
    assert layer.weight.shape == (4, 6), "`weight` must be (out, in), as W is"
    y = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_linear_needs_no_output_head_and_finds_a_conv1d(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Conv1D(6, 4))
    config = CONFIGS[name]()
    config.target_modules = "all-linear"
    assert list(ADD[name](model, config)) == ["0", "2"]


# --- BitFit ---


def test_bitfit_by_hand():
    """x W + (b + Δb) = [3, 7] + [10, 20] + [1, -1], and the gradient of Δb is that of b."""
    base = nn.Linear(2, 2)
    base.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    base.bias.data = torch.tensor([10.0, 20.0])
    layer, x = BitFitLayer(base, BitFitConfig()), torch.ones(3, 2)
    assert layer(x)[0].tolist() == [13, 27], "Δb must start at zero"
    layer.delta.data = torch.tensor([1.0, -1.0])
    y = layer(x)
    assert y[0].tolist() == [14, 26], "the bias must be b + Δb"
    y.sum().backward()
    assert layer.delta.grad.tolist() == [3, 3]
    layer.eval().merge()
    assert layer.merged_bias.tolist() == [11, 19]
    assert "merged_bias" not in layer.state_dict(), "b' is computed: it is not saved"
    layer.delta.data.zero_()
    assert layer(x)[0].tolist() == [14, 26], "a merged layer must use b'"
    layer.unmerge()
    assert layer(x)[0].tolist() == [13, 27], "an unmerged layer must use b and Δb again"
    assert base.bias.tolist() == [10, 20], "b must not change"
    layer.delta.data = torch.tensor([1.0, -1.0])
    assert merge_into_base(layer) is base
    assert base.bias.tolist() == [11, 19]


def test_bitfit_trains_every_bias_and_has_the_layers_attributes(gpt):
    biases = {n.removesuffix(".bias"): p for n, p in gpt.named_parameters() if "bias" in n}
    layers = add_bitfit(gpt, BitFitConfig())
    assert layers.keys() == biases.keys()
    for name, layer in layers.items():
        assert layer.base_layer.bias is biases[name]
        assert torch.equal(layer.bias, biases[name] + layer.delta)
        assert layer.weight is layer.base_layer.weight
        assert hasattr(layer, "in_features") == isinstance(layer.base_layer, nn.Linear)
    assert layers["transformer.h.0.mlp.c_fc"].in_features == 24
    assert layers["transformer.h.0.mlp.c_fc"].out_features == 96


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(5, 7), torch.randn(2, 3, 5)),
        (nn.LayerNorm(5), torch.randn(2, 3, 5)),
        (nn.Conv2d(5, 7, 3), torch.randn(2, 5, 4, 4)),
    ],
)
def test_the_output_is_that_of_the_layer_with_the_new_bias(layer, x):
    layer, x = layer.double(), x.double()
    by_hand = copy.deepcopy(layer)
    adapted = BitFitLayer(layer, BitFitConfig())
    nn.init.normal_(adapted.delta)
    with torch.no_grad():
        by_hand.bias += adapted.delta
    assert torch.equal(adapted(x), by_hand(x))
    gradients = torch.autograd.grad(adapted(x).square().sum(), adapted.delta)
    expected = torch.autograd.grad(by_hand(x).square().sum(), by_hand.bias)
    assert torch.equal(gradients[0], expected[0])


def test_bitfit_equals_fine_tuning_only_the_biases(gpt, ids):
    """Δb has the biases' gradients, and plain gradient descent takes the same path."""
    gpt = gpt.double()
    plain = copy.deepcopy(gpt).requires_grad_(False)
    free = {n: p.requires_grad_() for n, p in plain.named_parameters() if n.endswith("bias")}
    model = get_peft_model(gpt, BitFitConfig())
    deltas = {
        n.replace("delta", "bias"): p for n, p in gpt.named_parameters() if n.endswith("delta")
    }
    assert deltas.keys() == free.keys()
    for _ in range(5):
        losses = [m(ids, labels=ids)[0] for m in (plain, model)]
        expected = torch.autograd.grad(losses[0], list(free.values()))
        found = torch.autograd.grad(losses[1], [deltas[n] for n in free])
        with torch.no_grad():
            for (name, p), a, b in zip(free.items(), expected, found, strict=True):
                assert torch.allclose(a, b, rtol=0, atol=1e-12 * a.abs().max().item()), name
                p -= 0.1 * a
                deltas[name] -= 0.1 * b


def test_training_while_merged_raises_an_error(gpt, ids):
    model = get_peft_model(gpt, BitFitConfig()).train()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge"):
        model(ids)
    with torch.no_grad():
        model(ids)
    model.unmerge_adapter()
    losses = train(model, ids)
    assert losses[-1] < losses[0] - 0.1


def test_a_model_without_biases_is_refused():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4, bias=False), nn.RMSNorm(4))
    with pytest.raises(ValueError, match="names nothing; layers with a bias: none"):
        get_peft_model(model, BitFitConfig())
    with pytest.raises(ValueError, match="target_modules=None matches no layer with a bias"):
        add_bitfit(model, BitFitConfig())
    assert all(p.requires_grad for p in model.parameters())


def test_a_bias_that_two_layers_share_is_refused(gpt):
    gpt.transformer.h[1].mlp.c_proj.bias = gpt.transformer.h[0].mlp.c_proj.bias
    message = r"h\.0\.mlp\.c_proj shares its bias with another module: untie it first"
    with pytest.raises(ValueError, match=message):
        get_peft_model(gpt, BitFitConfig())
    assert get_peft_model(gpt, BitFitConfig(["c_attn"])), "layers that share nothing can be adapted"


def test_all_linear_leaves_out_an_output_head_that_has_a_bias():
    class Model(nn.Sequential):
        def get_output_embeddings(self):
            return self[1]

    layers = add_bitfit(Model(nn.Linear(4, 4), nn.Linear(4, 9)), BitFitConfig("all-linear"))
    assert list(layers) == ["0"], "the output head must be left out"


@pytest.mark.parametrize("strict", [False, True])
def test_bitfit_adapts_layers_and_not_their_containers(strict):
    """An adapter around a container would change the names of the layers inside it."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    model[0].bias = nn.Parameter(torch.zeros(4))
    found = find_targets(model, None, "bias") if strict else add_bitfit(model, BitFitConfig())
    assert list(found) == ["0.0"]


@pytest.mark.parametrize("strict", [False, True])
def test_bitfit_accepts_a_layer_whose_weight_is_tied(strict):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    model[1].weight = model[0].weight
    found = find_targets(model, None, "bias") if strict else add_bitfit(model, BitFitConfig())
    assert list(found) == ["1"]


def test_bitfit_trains_the_biases_of_a_4bit_base(gpt, ids):
    quantize_model(gpt)
    plain = gpt(ids).logits
    model = get_peft_model(gpt, BitFitConfig())
    assert torch.equal(model(ids).logits, plain)
    assert model.get_nb_trainable_parameters()[0] == 2 * (24 + 72 + 24 + 24 + 96 + 24) + 24
    losses = train(model, ids)
    assert losses[-1] < losses[0] - 0.1
    logits = model(ids).logits
    assert torch.allclose(model.merge_and_unload()(ids).logits, logits, atol=1e-4)


class Waiting(nn.Linear):
    """A linear layer that a thread enters and then stays in until it is released."""

    def forward(self, x):
        if threading.current_thread() is not threading.main_thread():
            self.entered.set()
            assert self.released.wait(10)
        return super().forward(x)


def test_bitfit_does_not_touch_the_base_layer_during_forward():
    """While one thread is inside the adapted layer, another one still gets the base's output."""
    torch.manual_seed(0)
    base = Waiting(4, 4)
    base.entered, base.released = threading.Event(), threading.Event()
    x = torch.randn(3, 4)
    plain, bias = base(x), base.bias
    before = bias.detach().clone()
    layer = BitFitLayer(base, BitFitConfig())
    nn.init.ones_(layer.delta)
    outputs = []
    thread = threading.Thread(target=lambda: outputs.append(layer(x)))
    thread.start()
    try:
        assert base.entered.wait(10)
        assert base.bias is bias, "the forward pass replaced the base layer's bias"
        assert torch.equal(bias, before), "the forward pass wrote into the base layer's bias"
        assert torch.equal(base(x), plain)
        assert torch.allclose(layer(x), plain + 1)
    finally:
        base.released.set()
        thread.join()
    assert torch.equal(outputs[0], layer(x)), "two threads must get the same output"
    assert base.bias is bias
    assert torch.equal(bias, before)


def test_two_threads_give_the_same_bitfit_outputs(gpt, ids):
    before = copy.deepcopy(gpt.state_dict())
    model = filled(get_peft_model(gpt, BitFitConfig())).eval()
    expected = model(ids).logits.detach()
    outputs = []

    def run():
        with torch.no_grad():
            outputs.extend(model(ids).logits for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 40
    assert all(torch.equal(logits, expected) for logits in outputs)
    base = model.unload()
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


def test_merging_bitfit_on_a_plain_module_and_into_the_base():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30)).eval()
    x = torch.randn(5, 20)
    y = model(x)
    layers = add_bitfit(model, BitFitConfig())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 30 + 30
    assert torch.equal(model(x), y), "Δb must start at zero"
    nn.init.ones_(layers["1"].delta)
    trained = model(x)
    assert torch.allclose(trained, y + 1)
    layers["1"].merge()
    assert torch.equal(model(x), trained)
    layers["1"].unmerge()
    assert torch.equal(model(x), trained)
    model.set_submodule("1", merge_into_base(layers["1"]))
    assert type(model[1]) is nn.LayerNorm
    assert torch.equal(model(x), trained)


@pytest.mark.parametrize("name", CONFIGS)
def test_constructors_do_not_write_into_the_config(name):
    config = CONFIGS[name]()
    before = copy.deepcopy(vars(config))
    {"bitfit": BitFitLayer, "bottleneck": BottleneckLayer}[name](nn.Linear(4, 4), config)
    config.target_modules = before["target_modules"] = ["0"]
    ADD[name](nn.Sequential(nn.Linear(4, 4)), config)
    assert vars(config) == before


# --- bottleneck adapters ---


def test_a_bottleneck_by_hand():
    """h = W x + b = [3, 7]; W_down h + b_down = [4, -6], f gives [4, 0], W_up [4, 0] + b_up."""
    base = nn.Linear(2, 2)
    base.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    base.bias.data = torch.zeros(2)
    layer = BottleneckLayer(base, BottleneckConfig(["0"], 2, "relu"))
    assert layer(torch.ones(1, 2)).tolist() == [[3, 7]], "W_up and b_up must start at zero"
    layer.down.weight.data = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    layer.down.bias.data = torch.tensor([0.0, -2.0])
    layer.up.weight.data = torch.tensor([[1.0, 5.0], [2.0, 5.0]])
    layer.up.bias.data = torch.tensor([10.0, 20.0])
    assert layer(torch.ones(1, 2)).tolist() == [[3 + 14, 7 + 28]], "y must be h + W_up f(…) + b_up"
    assert (layer.weight, layer.bias) == (base.weight, base.bias)


def test_a_bottleneck_changes_only_the_output_of_its_own_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
    x = torch.randn(5, 20)
    y = model(x)
    layers = add_bottleneck(model, BottleneckConfig(["0"], bottleneck_size=4))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * 30 + 4 + 30
    assert torch.equal(model(x), y), "W_up and b_up must start at zero"
    nn.init.ones_(layers["0"].up.bias)
    assert torch.allclose(model(x), model[1](layers["0"].base_layer(x) + 1))


def test_a_bottleneck_needs_targets():
    with pytest.raises(ValueError, match="target_modules=None matches no linear layer"):
        add_bottleneck(nn.Sequential(nn.Linear(4, 4)), BottleneckConfig())


def test_a_bottleneck_of_size_1_is_allowed():
    assert BottleneckConfig(["c_proj"], bottleneck_size=1).bottleneck_size == 1


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_the_output_of_a_bottleneck_is_equation_1(name):
    torch.manual_seed(0)
    base = nn.Linear(7, 6).double()
    layer = BottleneckLayer(base, BottleneckConfig(["x"], 3, name))
    for p in (*layer.down.parameters(), *layer.up.parameters()):
        nn.init.normal_(p)
    x = torch.randn(2, 4, 7).double()
    h = x @ base.weight.T + base.bias
    z = h @ layer.down.weight.T + layer.down.bias
    f = z.clamp(min=0) if name == "relu" else z * (1 + torch.erf(z / math.sqrt(2))) / 2
    y = h + f @ layer.up.weight.T + layer.up.bias
    assert layer(x).dtype == torch.float64
    assert torch.allclose(layer(x), y, rtol=0, atol=1e-13)


def test_merging_a_bottleneck_raises_an_error_that_says_why(gpt, ids):
    model = filled(get_peft_model(gpt, CONFIGS["bottleneck"]()))
    before = model(ids).logits
    for act in (
        model.merge_adapter,
        model.unmerge_adapter,
        model.merge_and_unload,
        lambda: model.merge_and_unload(inplace=True),
    ):
        with pytest.raises(ValueError, match="cannot merge BOTTLENECK: a bottleneck is not linear"):
            act()
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("target", ["ln_1", "wpe"])
def test_a_bottleneck_after_a_layer_that_is_not_linear_is_refused(gpt, target):
    message = r"is a (LayerNorm|Embedding); this method adapts linear layers"
    with pytest.raises(ValueError, match=message):
        get_peft_model(gpt, BottleneckConfig([target]))
    with pytest.raises(ValueError, match="matches no linear layer"):
        add_bottleneck(gpt, BottleneckConfig([target]))
    assert all(p.requires_grad for p in gpt.parameters())


def test_a_bottleneck_after_a_tied_head_is_refused(gpt):
    with pytest.raises(ValueError, match="lm_head shares its weight with another module"):
        get_peft_model(gpt, BottleneckConfig(["lm_head"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size must be a positive integer, got 0"),
        ({"bottleneck_size": 2.0}, "bottleneck_size must be a positive integer, got 2.0"),
        ({"bottleneck_size": True}, "bottleneck_size must be a positive integer, got True"),
        ({"non_linearity": "tanh"}, "non_linearity must be gelu or relu, got 'tanh'"),
    ],
)
def test_the_config_names_a_bad_setting_and_its_value(changes, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(["c_proj"], **changes)


# --- in the lab ---


@pytest.mark.parametrize("name", ["bitfit", "full"])
def test_a_method_without_a_size_refuses_one(name):
    with pytest.raises(ValueError, match=f"{name} has no size, got 4"):
        RECIPES[name].with_size(4)


@pytest.mark.parametrize("name", [*CONFIGS, "prompt_tuning", "full"])
def test_a_method_without_a_rank_refuses_a_placement(name):
    with pytest.raises(ValueError, match=f"{name} has no rank, so its layers cannot be chosen"):
        RECIPES[name].placed("mlp")


@pytest.mark.parametrize(("name", "size"), [("bitfit", None), ("bottleneck", 3)])
def test_the_labs_recipe_has_the_expected_number_of_parameters(base, name, size):
    recipe = RECIPES[name] if size is None else RECIPES[name].with_size(size)
    model = build_model(base, recipe, RunConfig(steps=1))
    count = model.get_nb_trainable_parameters()[0]
    d = model.config.n_embd
    n = model.config.n_layer
    formula = {"bitfit": n * 11 * d + d, "bottleneck": n * 2 * (2 * 3 * d + 3 + d)}
    assert count == formula[name]


def test_compare_runs_the_swept_methods_by_default(tmp_path, monkeypatch):
    from minipeft.lab.cli import parser

    file = tmp_path / "sweep.json"
    file.write_text(json.dumps([{"method": "lora"}, {"method": "bitfit"}, {"method": "full"}]))
    monkeypatch.setattr(recipes, "SWEEPS", file)
    assert parser().parse_args(["compare"]).methods == ["frozen", "full", "lora", "bitfit"]
    file.unlink()
    assert parser().parse_args(["compare"]).methods == ["frozen"]


# --- on transformers' models ---


@pytest.mark.conformance
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_trains_transformers_models(ids, tmp_path, name, kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        shape = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32, "resid_pdrop": 0.0}
        pdrop = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "initializer_range": 0.2}
        base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **pdrop, **small))
        targets, count = ["attn.c_proj", "mlp.c_proj"], 2 * 11 * 24 + 24
    else:  # Llama's linear layers have a bias only with attention_bias, its norms never
        shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
        heads |= {"max_position_embeddings": 32, "initializer_range": 0.2}
        settings = transformers.LlamaConfig(**shape, **heads, **small)
        base = transformers.LlamaForCausalLM(settings)
        targets, count = ["o_proj", "down_proj"], 2 * (24 + 12 + 12 + 24)
    base.eval()
    config = BitFitConfig() if name == "bitfit" else BottleneckConfig(targets, bottleneck_size=5)
    count = count if name == "bitfit" else 2 * 2 * (2 * 5 * 24 + 5 + 24)
    plain = base(ids).logits
    model = get_peft_model(copy.deepcopy(base), config)
    assert torch.equal(model(ids).logits, plain)
    assert model.get_nb_trainable_parameters()[0] == count
    losses = train(model, ids)
    assert losses[-1] < losses[0] - 0.05
    logits = model(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(again(ids).logits, logits)
    if name == "bitfit":
        model.merge_adapter()
        assert torch.equal(model(ids).logits, logits)
        merged = model.merge_and_unload()
        assert torch.equal(merged(ids).logits, logits)
        merged.save_pretrained(tmp_path / "merged")
        loaded = type(base).from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(loaded(ids).logits, logits)
    with torch.autocast("cpu", torch.bfloat16):
        loss = again.train()(ids, labels=ids)[0]
    assert loss.isfinite()


@pytest.mark.conformance
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_gives_the_same_logits_on_our_gpt_and_on_transformers(ids, tmp_path, name):
    """An adapter trained on our GPT gives the same logits on the GPT-2 of transformers."""
    transformers = pytest.importorskip("transformers")
    ours = GPT.from_pretrained(BASE)
    model = filled(get_peft_model(ours, CONFIGS[name]())).eval()
    model.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(
        transformers.GPT2LMHeadModel.from_pretrained(BASE), tmp_path
    ).eval()
    expected, found = model(ids).logits, theirs(ids).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.conformance
def test_a_default_llama_has_no_bias_for_bitfit():
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 61}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    )
    with pytest.raises(ValueError, match="names nothing; layers with a bias: none"):
        get_peft_model(llama, BitFitConfig())
