"""DoRA, PiSSA, VeRA, (IA)³ and LoRA+: what the first four share, then each on its own."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from test_more_methods import filled, train
from test_qlora import Conv1D
from torch import nn

from minipeft import (
    GPT,
    IA3Config,
    LoraConfig,
    PeftModel,
    VeraConfig,
    add_dora,
    add_ia3,
    add_pissa,
    add_vera,
    get_peft_model,
    lora_plus_groups,
    quantize_model,
)
from minipeft.adapters import merge_into_base
from minipeft.lab.finetune import build_model
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.lab.train import train as train_loop
from minipeft.lab.train import with_decay
from minipeft.methods.dora import DoraLinear
from minipeft.methods.ia3 import IA3Linear
from minipeft.methods.pissa import PissaLinear
from minipeft.methods.vera import VeraLinear

ENDS = ["attn.c_attn", "mlp.c_proj"]
CONFIGS = {
    "dora": lambda to=ENDS: LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=to),
    "pissa": lambda to=ENDS: LoraConfig(
        r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=to
    ),
    "vera": lambda to=ENDS: VeraConfig(r=16, target_modules=to),
    "ia3": lambda to=ENDS: IA3Config(to, ["mlp.c_proj"]),
}
ADD = {"dora": add_dora, "pissa": add_pissa, "vera": add_vera, "ia3": add_ia3}
LAYERS = {"dora": DoraLinear, "pissa": PissaLinear, "vera": VeraLinear, "ia3": IA3Linear}


def layer_of(name: str, base_layer: nn.Module) -> nn.Module:
    """One adapted layer, with random trainable parameters."""
    model = nn.Sequential(base_layer)
    config = CONFIGS[name](["0"])
    return filled(nn.Sequential(ADD[name](model, config)["0"]))[0].eval()


# --- all four ---


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
def test_merging_does_not_change_the_logits(trained_base, dtype, bound, name):
    model = trained_base.to(dtype)
    ids = torch.randint(1, 2048, (4, 64), generator=torch.Generator().manual_seed(0))
    base_logits = model(ids).logits
    model = filled(get_peft_model(model, CONFIGS[name]())).eval()
    logits = model(ids).logits
    largest = logits.abs().max()
    assert (logits - base_logits).abs().max() > 0.02 * largest, "the adapter has no effect"
    for _ in range(3):  # repeated merging must not drift
        model.merge_adapter()
        assert (model(ids).logits - logits).abs().max() < bound * largest
        model.unmerge_adapter()
        assert torch.equal(model(ids).logits, logits)
    plain = model.merge_and_unload()
    assert type(plain) is GPT
    assert not any(isinstance(m, LAYERS[name]) for m in plain.modules())
    assert (plain(ids).logits - logits).abs().max() < bound * largest
    assert torch.equal(model.unload()(ids).logits, base_logits)


@pytest.mark.parametrize(
    ("name", "count"),
    [  # the docstrings' formulas with d 24 and 2 blocks: c_attn is 72 x 24, mlp.c_proj 24 x 96
        ("dora", 2 * (4 * (24 + 72) + 72 + 4 * (96 + 24) + 24)),
        ("pissa", 2 * (4 * (24 + 72) + 4 * (96 + 24))),
        ("vera", 2 * (16 + 72 + 16 + 24)),
        ("ia3", 2 * (72 + 96)),
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
def test_every_trainable_parameter_gets_a_gradient_and_the_base_gets_none(gpt, ids, name, alone):
    base = set(gpt.parameters())
    if alone:
        ADD[name](gpt, CONFIGS[name]())
    model = filled(gpt if alone else get_peft_model(gpt, CONFIGS[name]()))
    model(ids, labels=ids)[0].backward()
    for key, p in model.named_parameters():
        assert p.requires_grad == (p not in base), key
        assert p.requires_grad == (p.grad is not None and p.grad.abs().max() > 0), key


@pytest.mark.parametrize("name", CONFIGS)
def test_training_lowers_the_loss_and_switched_off_the_base_is_back(gpt, ids, name):
    before = gpt(ids).logits
    model = get_peft_model(gpt, CONFIGS[name]())
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    assert not torch.allclose(model(ids).logits, before, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(model.unload()(ids).logits, before)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_saving_and_loading_gives_the_same_logits(gpt, ids, tmp_path, name, trainable):
    model = filled(get_peft_model(gpt, CONFIGS[name]())).eval()
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    base = model.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=trainable).eval()
    assert (loaded(ids).logits - logits).abs().max() <= (1e-5 if name == "pissa" else 0)
    assert (loaded.get_nb_trainable_parameters()[0] > 0) is trainable


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_continues_training_exactly(gpt, ids, name):
    first = get_peft_model(gpt, CONFIGS[name]())
    train(first, ids, steps=3)
    state = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    expected = train(first, ids, steps=3)
    second = get_peft_model(first.unload(), CONFIGS[name]())
    second.load_state_dict(state)
    assert train(second, ids, steps=3) == expected


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_weight_and_the_bias_of_an_adapted_layer_compute_its_output(name, bias):
    layer, x = layer_of(name, nn.Linear(6, 8, bias=bias)), torch.randn(5, 6)
    assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6)
    assert (layer.bias is not None) is bias


@pytest.mark.parametrize("name", CONFIGS)
def test_a_conv1d_gives_the_same_outputs_as_the_linear_layer_with_its_weight(name):
    linear, conv = nn.Linear(6, 8), Conv1D(8, 6)
    conv.weight.data, conv.bias.data = linear.weight.data.t().clone(), linear.bias.data.clone()
    x, layers = torch.randn(5, 6), []
    for base_layer in (linear, conv):
        torch.manual_seed(0)
        layers.append(layer_of(name, base_layer))
    assert torch.allclose(layers[0](x), layers[1](x), atol=1e-6)
    assert layers[1].weight.shape == (6, 8)  # stored as the base stores it
    assert torch.allclose(merge_into_base(layers[1])(x), layers[0](x), atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bfloat16_base_gets_a_float32_adapter(gpt, ids, name):
    model = get_peft_model(gpt.to(torch.bfloat16), CONFIGS[name]())
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    logits = filled(model).eval()(ids).logits
    model.merge_adapter()
    assert model(ids).logits.dtype == logits.dtype == torch.bfloat16
    assert (model(ids).logits - logits).abs().max() < 0.05 * logits.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("training", [True, False])
def test_new_layers_have_the_mode_and_the_device_of_the_model(name, training):
    model = nn.Sequential(nn.Linear(6, 8, device="meta")).train(training)
    layer = ADD[name](model, CONFIGS[name](["0"]))["0"]
    assert {m.training for m in layer.modules()} == {training}
    assert {p.device.type for p in (*layer.parameters(), *layer.buffers())} == {"meta"}


@pytest.mark.parametrize("name", ["dora", "vera"])
def test_dropout_acts_on_the_update_alone(name):
    config = CONFIGS[name](["0"])
    setattr(config, "vera_dropout" if name == "vera" else "lora_dropout", 0.5)
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(5, 6)
    before = model(x)
    ADD[name](model, config)
    assert torch.equal(model.train()(x), before)  # the update is zero, and W x has no dropout
    filled(model)
    assert not torch.allclose(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_pissas_dropout_acts_on_b_a_x_alone():
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["0"])
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(5, 6)
    layer = add_pissa(model, config)["0"]
    dropped = model.train()(x)
    layer.lora_B.weight.data.zero_()
    rest = model(x)
    assert torch.equal(rest, model(x))  # W_res x has no dropout
    assert not torch.allclose(dropped, rest, atol=1e-3)
    layer.lora_B.weight.data.copy_(layer.start_B)
    assert not torch.allclose(model(x), model(x))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_weight_is_not_saved_and_is_a_constant(name):
    layer = layer_of(name, nn.Linear(6, 8))
    before = list(layer.state_dict())
    layer.merge()
    assert list(layer.state_dict()) == before
    assert not layer.merged_weight.requires_grad


@pytest.mark.parametrize("name", CONFIGS)
def test_training_while_merged_raises_an_error(name):
    layer = layer_of(name, nn.Linear(6, 8))
    layer.merge()
    layer(torch.randn(2, 6))
    with pytest.raises(RuntimeError, match="call unmerge"):
        layer.train()(torch.randn(2, 6))


@pytest.mark.parametrize("name", CONFIGS)
def test_adding_finds_targets_by_whole_parts_at_the_end_of_their_names(name):
    for targets, kinds in (
        (["c_proj"], ["attn.c_proj", "mlp.c_proj"]),
        (["attn.c_attn", "fc", "transformer.h.1.mlp.c_proj", "ln_1"], ["attn.c_attn"]),
    ):
        found = ADD[name](GPT(tiny_config()), CONFIGS[name](targets))
        expected = [f"transformer.h.{i}.{kind}" for i in (0, 1) for kind in kinds]
        assert list(found) == expected + ["transformer.h.1.mlp.c_proj"] * (len(targets) > 1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["c_nothing"], r"\['c_nothing'\]"),
        (["ln_1"], r"\['ln_1'\]"),
        ([], r"\[\]"),
        (None, "None"),
        ("all-linear", "'all-linear'"),
    ],
)
def test_adding_without_a_list_that_matches_is_refused(gpt, name, targets, message):
    message = f"target_modules must be a list that names linear layers, got {message}"
    with pytest.raises(ValueError, match=message):
        ADD[name](gpt, CONFIGS[name](targets))
    assert all(p.requires_grad for p in gpt.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_string_is_not_read_as_a_list_of_letters(name):
    with pytest.raises(ValueError, match="must be a list that names linear layers, got '0'"):
        ADD[name](nn.Sequential(nn.Linear(6, 8)), CONFIGS[name]("0"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_second_adapter_is_refused_and_the_first_stays_trainable(gpt, name):
    ADD[name](gpt, CONFIGS[name]())
    trained = [p for p in gpt.parameters() if p.requires_grad]
    for targets in (ENDS, ["mlp.c_fc"]):
        with pytest.raises(ValueError, match="already has an adapter"):
            ADD[name](gpt, CONFIGS[name](targets))
    assert trained == [p for p in gpt.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_4bit_base_is_refused(gpt, name):
    quantize_model(gpt)
    with pytest.raises(ValueError, match="is a Linear4bit, which"):
        get_peft_model(gpt, CONFIGS[name]())
    with pytest.raises(ValueError, match="must be a list that names linear layers"):
        ADD[name](gpt, CONFIGS[name]())


@pytest.mark.parametrize("name", ["rslora", "lora_plus", "pissa", "dora", "vera", "ia3"])
def test_the_labs_recipe_trains(base, ids, name):
    run = RunConfig(steps=4, learning_rate=1e-2, quiet=True)
    model = build_model(base, RECIPES[name], run)
    batch = {"input_ids": ids, "labels": ids}
    losses = train_loop(model, [[batch]] * 4, run, RECIPES[name]).losses
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("layer", [DoraLinear, PissaLinear])
def test_the_scaling_of_dora_and_pissa_is_loras(layer):
    for rslora, s in ((False, 6 / 4), (True, 6 / 2)):
        config = LoraConfig(r=4, lora_alpha=6, use_rslora=rslora)
        assert layer(nn.Linear(6, 8), config).scaling == s


# --- DoRA ---


def test_dora_by_hand():
    """W has the rows (3, 4) and (0, 2): lengths 5 and 2. Double the first one, and turn the second
    one towards (2, 2) with an update of (2, 0): its length stays 2."""
    base_layer = nn.Linear(2, 2)
    base_layer.weight.data = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    layer = DoraLinear(base_layer, config)
    assert layer.lora_magnitude_vector.tolist() == [5, 2]
    layer.lora_magnitude_vector.data[0] = 10.0
    layer.lora_A.weight.data = torch.tensor([[2.0, 0.0]])
    layer.lora_B.weight.data = torch.tensor([[0.0], [1.0]])
    root = math.sqrt(2)
    expected = torch.tensor([[6.0, 8.0], [root, root]])
    assert torch.allclose(layer.merged(), expected)
    assert torch.allclose(layer(torch.eye(2)), expected.T + base_layer.bias)


def test_doras_norm_counts_as_a_constant_in_the_gradient():
    layer, x = layer_of("dora", nn.Linear(6, 8, bias=False)), torch.randn(5, 6)
    layer(x).sum().backward()
    norm = layer.directions().norm(dim=1).detach()
    a, b, m = layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector
    v = layer.base_layer.weight + layer.scaling * b @ a
    y = x @ (m / norm)[:, None].mul(v).T
    for found, expected in zip(
        (a.grad, b.grad, m.grad), torch.autograd.grad(y.sum(), (a, b, m)), strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-5)


def test_doras_a_starts_as_lora_does():
    torch.manual_seed(0)
    layer = DoraLinear(nn.Linear(400, 8), LoraConfig(r=50, target_modules=["0"]))
    assert 0.99 / 20 < layer.lora_A.weight.abs().max() <= 1 / 20  # 1 / √in
    assert not layer.lora_B.weight.any()


def test_a_row_of_zeros_stays_zero_and_gives_no_nan():
    linear = nn.Linear(6, 8, bias=False)
    linear.weight.data[2] = 0.0
    layer = DoraLinear(linear, LoraConfig(target_modules=["0"]))
    y = layer(torch.randn(5, 6))
    y.sum().backward()
    assert torch.equal(y[:, 2], torch.zeros(5))
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


# --- PiSSA ---


def test_pissa_starts_at_the_largest_singular_directions():
    linear = nn.Linear(6, 8)
    layer = PissaLinear(linear, LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    u, s, vh = torch.linalg.svd(linear.weight)
    start = layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    assert torch.allclose(start, u[:, :2] * s[:2] @ vh[:2], atol=1e-6)
    a, b = layer.lora_A.weight, layer.lora_B.weight
    assert torch.allclose(a @ a.T, b.T @ b, atol=1e-6)  # each factor has half of the size


def test_a_saved_pissa_is_a_lora_of_twice_the_rank(gpt, ids, tmp_path):
    for rslora in (False, True):
        config = CONFIGS["pissa"]()
        config.use_rslora = rslora
        model = filled(get_peft_model(gpt, config)).eval()
        logits = model(ids).logits
        scaling = next(iter(model.adapters["default"].layers.values())).scaling
        model.save_pretrained(tmp_path)
        assert config.r == model.peft_config["default"].r == 4
        gpt = model.unload()
        loaded = PeftModel.from_pretrained(gpt, tmp_path)
        layer = next(iter(loaded.adapters["default"].layers.values()))
        assert (layer.r, loaded.peft_config["default"].init_lora_weights) == (8, True)
        assert layer.scaling == pytest.approx(scaling)
        assert torch.allclose(loaded(ids).logits, logits, atol=1e-5)
        loaded.unload()


def test_pissa_refuses_a_rank_above_the_weights(gpt):
    with pytest.raises(ValueError, match="has no 25 singular values"):
        get_peft_model(gpt, LoraConfig(25, init_lora_weights="pissa", target_modules=ENDS))


@pytest.mark.parametrize("name", ["dora", "pissa"])
def test_dora_and_pissa_have_no_weighted_sum(gpt, name):
    model = get_peft_model(gpt, CONFIGS[name]())
    with pytest.raises(ValueError, match="has no weighted sum"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_lora_settings_that_cannot_be_combined_or_are_unknown_are_refused(gpt):
    with pytest.raises(ValueError, match="cannot be combined"):
        LoraConfig(use_dora=True, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="must be True or 'pissa', got 'gaussian'"):
        LoraConfig(init_lora_weights="gaussian")
    from minipeft import add_lora

    for name in ("dora", "pissa"):
        with pytest.raises(ValueError, match="use add_dora, add_pissa, or get_peft_model"):
            add_lora(gpt, CONFIGS[name]())


# --- VeRA ---


def test_vera_by_hand():
    """The output gets b · B (d · A x): with A x = 6, d 0.5, B (1, 2) and b (1, 10), (3, 60)."""
    linear = nn.Linear(2, 2, bias=False)
    (layer,) = add_vera(nn.Sequential(linear), VeraConfig(r=1, target_modules=["0"])).values()
    layer.projections.vera_A = torch.tensor([[1.0, 2.0]])
    layer.projections.vera_B = torch.tensor([[1.0], [2.0]])
    layer.vera_lambda_d.data = torch.tensor([0.5])
    layer.vera_lambda_b.data = torch.tensor([1.0, 10.0])
    x = torch.tensor([[2.0, 2.0]])
    assert torch.allclose(layer(x) - linear(x), torch.tensor([[3.0, 60.0]]))
    assert torch.allclose(layer.merged() - linear.weight, torch.tensor([[0.5, 1.0], [10.0, 20.0]]))


def test_all_layers_of_vera_share_one_pair_of_matrices_of_the_largest_size(gpt):
    names = ["c_attn", "c_fc", "c_proj"]
    layers = add_vera(gpt, VeraConfig(r=3, target_modules=names)).values()
    (shared,) = {layer.projections for layer in layers}
    assert (shared.vera_A.shape, shared.vera_B.shape) == ((3, 96), (96, 3))
    a, b = next(iter(layers)).shared()  # c_attn
    assert torch.equal(a, shared.vera_A[:, :24])
    assert torch.equal(b, shared.vera_B[:72])
    assert not {"vera_A", "vera_B"} & {key.rpartition(".")[2] for key in gpt.state_dict()}


def test_the_projections_of_vera_depend_on_their_key_alone(gpt):
    torch.manual_seed(5)
    first = add_vera(GPT(tiny_config()), VeraConfig(target_modules=ENDS))
    torch.manual_seed(6)
    second = add_vera(GPT(tiny_config()), VeraConfig(target_modules=ENDS))
    third = add_vera(gpt, VeraConfig(target_modules=ENDS, projection_prng_key=1))
    a, b, c = (next(iter(x.values())).projections.vera_A for x in (first, second, third))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_vera_file_without_its_projections_is_smaller_and_gives_the_same_logits(
    gpt, ids, tmp_path
):
    sizes = []
    for save in (True, False):
        config = VeraConfig(r=16, target_modules=ENDS, save_projection=save)
        model = filled(get_peft_model(gpt, config)).eval()
        logits = model(ids).logits
        model.save_pretrained(tmp_path)
        sizes.append((tmp_path / "adapter_model.safetensors").stat().st_size)
        gpt = model.unload()
        loaded = PeftModel.from_pretrained(gpt, tmp_path)
        assert torch.equal(loaded(ids).logits, logits)
        gpt = loaded.unload()
    assert sizes[1] < 0.3 * sizes[0]


@pytest.mark.parametrize("add", [add_vera, get_peft_model])
@pytest.mark.parametrize("settings", [{"r": 0}, {"r": True}, {"r": 2.5}, {"vera_dropout": 1.0}])
def test_vera_names_a_bad_setting_and_its_value(gpt, settings, add):
    config = VeraConfig(**settings, target_modules=ENDS)
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"r must be a positive integer, and .*{name}={value}"):
        add(gpt, config)
    assert all(p.requires_grad for p in gpt.parameters())


# --- (IA)³ ---


def test_ia3_by_hand():
    """Outputs times (2, 3), or inputs times (2, 3)."""
    linear = nn.Linear(2, 2)
    linear.weight.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    linear.bias.data = torch.tensor([1.0, 0.0])
    x = torch.tensor([[5.0, 2.0]])  # W x + b = (8, 3)
    outputs = IA3Linear(linear, IA3Config(["0"], []))
    outputs.ia3_l.data = torch.tensor([[2.0], [3.0]])
    assert outputs(x).tolist() == [[16, 9]]
    inputs = IA3Linear(linear, IA3Config(["0"], ["0"]), is_feedforward=True)
    inputs.ia3_l.data = torch.tensor([[2.0, 3.0]])
    assert inputs(x).tolist() == [[17, 4]]  # W (10, 6) + b
    assert inputs.bias is linear.bias


def test_a_merged_ia3_layer_does_not_register_the_bias_of_its_base():
    layer = IA3Linear(nn.Linear(6, 8), IA3Config(["0"], []), is_feedforward=True)
    before = list(layer.state_dict())
    layer.merge()
    assert list(layer.state_dict()) == before


def test_merging_ia3_into_the_base_multiplies_the_bias_too():
    for is_feedforward in (False, True):
        linear, x = nn.Linear(6, 8), torch.randn(5, 6)
        layer = IA3Linear(linear, IA3Config(["0"], []), is_feedforward)
        filled(layer)
        expected = layer(x)
        assert torch.allclose(merge_into_base(layer)(x), expected, atol=1e-6)


def test_ia3_needs_a_list_of_feedforward_modules():
    for value in (None, "mlp.c_proj"):
        with pytest.raises(ValueError, match="feedforward_modules must be a list of names"):
            IA3Config(ENDS, value)


def test_feedforward_modules_are_found_by_the_end_of_their_names(gpt):
    config = IA3Config(["attn.c_proj", "mlp.c_proj", "c_fc"], ["mlp.c_proj", "1.mlp.c_fc", "fc"])
    for layers in (add_ia3(GPT(tiny_config()), config), adapted(gpt, config)):
        found = [name for name, layer in layers.items() if layer.is_feedforward]
        start = "transformer.h"
        assert found == [f"{start}.0.mlp.c_proj", f"{start}.1.mlp.c_fc", f"{start}.1.mlp.c_proj"]


def adapted(model: nn.Module, config: IA3Config) -> dict[str, nn.Module]:
    return get_peft_model(model, config).adapters["default"].layers


def test_feedforward_modules_that_are_no_targets_are_refused(gpt):
    for wrong in ("mlp.c_prj", "mlp.c_fc"):  # a typo, and a layer that is not adapted
        with pytest.raises(ValueError, match=rf"feedforward_modules=\['{wrong}'\] matches none"):
            get_peft_model(gpt, IA3Config(ENDS, [wrong]))


# --- LoRA+ ---


def test_lora_plus_gives_b_a_higher_rate_and_both_follow_the_schedule(gpt, ids):
    model = get_peft_model(gpt, LoraConfig(r=2, target_modules=ENDS))
    run = RunConfig(steps=6, learning_rate=1e-3, quiet=True)
    groups, made, rates = lora_plus_groups(model, run.learning_rate, ratio=4), [], []

    def make(groups, **options):
        made.append(torch.optim.AdamW(groups, **options))
        return made[0]

    def after_step(row):
        rates.append([group["lr"] for group in made[0].param_groups])

    batch = {"input_ids": ids, "labels": ids}
    recipe = replace(RECIPES["lora_plus"], optimizer=make, groups=lambda *_: groups)
    train_loop(model, [[batch]] * 6, run, recipe, after_step)
    for step, (slow, _, fast, _) in enumerate(rates, 1):  # matrices and vectors apart
        assert slow == pytest.approx(run.learning_rate_at(step))
        assert fast == pytest.approx(4 * slow)
    names = {p: name for name, p in model.named_parameters()}
    assert all("lora_A" in names[p] for p in groups[0]["params"])
    assert all("lora_B" in names[p] for p in groups[1]["params"])


def test_lora_plus_puts_every_parameter_into_one_group_and_vectors_into_that_of_b(gpt):
    model = get_peft_model(gpt, CONFIGS["dora"]())
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    slow, fast = ([names[p] for p in g["params"]] for g in lora_plus_groups(model, 1e-3))
    assert sorted(slow + fast) == sorted(names.values())
    assert all("lora_A" in name for name in slow)
    assert sum("lora_magnitude_vector" in name for name in fast) == 4


@pytest.mark.parametrize(("decay_to", "left"), [("zero", 0.99), ("start", 1.0)])
def test_lora_plus_decays_as_the_run_says(decay_to, left):
    """With gradients of zero, a step leaves 1 - ηλ of A; the rate of B is 16 times as high."""
    model = nn.Sequential()
    for name, sizes in {"lora_A": (4, 2), "lora_B": (2, 3)}.items():
        model.add_module(name, nn.Linear(*sizes, bias=False))
    before = [p.detach().clone() for p in model.parameters()]
    run = RunConfig(learning_rate=0.01, weight_decay=1.0, decay_to=decay_to)
    groups = with_decay(lora_plus_groups(model, 0.01), run)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW(groups).step()
    assert torch.allclose(model.lora_A.weight, left * before[0])
    assert torch.allclose(model.lora_B.weight, (1 - 16 * (1 - left)) * before[1])
    with pytest.raises(ValueError, match=r"learning rate 0\.16 x weight decay 7 is the share"):
        train_loop(model, [], replace(run, weight_decay=7, decay_to="zero"), RECIPES["lora_plus"])


def test_lora_plus_refuses_a_ratio_below_1_and_a_model_without_lora(gpt):
    with pytest.raises(ValueError, match="no trainable parameter is called lora_B"):
        lora_plus_groups(gpt, 1e-3)
    with pytest.raises(ValueError, match=r"ratio must be at least 1, got 0\.5"):
        lora_plus_groups(gpt, 1e-3, ratio=0.5)
