"""LoRA: the layer, merging, the config, and the strict search for targets."""

import dataclasses
import math

import pytest
import torch
from test_qlora import Conv1D
from torch import nn

from minipeft import GPT, LoraConfig, get_peft_model
from minipeft.adapters import merge_into_base
from minipeft.methods.lora import LoraLinear, add_lora, merge_lora, remove_lora, unmerge_lora
from minipeft.targets import find_targets, list_targets

ALL = ["c_attn", "c_proj", "c_fc"]


def filled(layers: dict) -> dict:
    """Give every B random values: with B = 0 a merge test could not fail."""
    generator = torch.Generator().manual_seed(3)
    for layer in layers.values():
        w = layer.lora_B.weight
        w.data = torch.randn(w.shape, generator=generator).to(w) * 0.05
    return layers


# --- the layer, by hand ---


def by_hand(**changes) -> LoraLinear:
    """W = [[1, 2], [3, 4]], b = [10, 20], B A = [[2, 0], [0, 4]] [[1, 0], [1, 1]] = [[2, 0],
    [4, 4]], and s = α / r = 3 / 2, so s B A = [[3, 0], [6, 6]]."""
    layer = LoraLinear(nn.Linear(2, 2), LoraConfig(**({"r": 2, "lora_alpha": 3} | changes)))
    layer.base_layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    layer.base_layer.bias.data = torch.tensor([10.0, 20.0])
    layer.lora_A.weight.data = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    layer.lora_B.weight.data = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    return layer


def test_a_new_layer_has_a_random_a_and_a_zero_b():
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(100, 50), LoraConfig(r=8))
    a, b = layer.lora_A.weight, layer.lora_B.weight
    assert a.shape == (8, 100), "A must be (r, in)"
    assert b.shape == (50, 8), "B must be (out, r)"
    assert not b.any(), "B must start at zero: a new adapter must not change the output"
    assert a.any(), "A must start random: if A and B are both zero, neither gets a gradient"
    assert 0.098 < a.max() <= 0.1, "A must be uniform between ±1 / √in, here ±0.1"
    assert -0.1 <= a.min() < -0.098, "A must be uniform between ±1 / √in, here ±0.1"
    assert layer.lora_A.bias is layer.lora_B.bias is None, "A and B are matrices without a bias"


def test_the_output_is_w_x_plus_b_plus_s_b_a_x():
    layer, x = by_hand(), torch.tensor([[1.0, -2.0]])
    layer.lora_B.weight.data.zero_()
    assert layer(x).tolist() == [[7, 15]], "with B = 0, y must be W x + b = [-3, -5] + [10, 20]"
    y = by_hand()(x)  # A x = [1, -1], B A x = [2, -4], s B A x = [3, -6]
    factor = ((y - torch.tensor([[7.0, 15.0]])) / torch.tensor([[3.0, -6.0]])).tolist()
    assert y.tolist() == [[10, 9]], (
        f"B A must be scaled by α / r: the update is {factor} times what it should be"
    )
    y = by_hand(use_rslora=True, lora_alpha=2**0.5)(x)  # s = √2 / √2 = 1
    assert y.tolist() == [[9, 11]], "with use_rslora, B A must be scaled by α / √r"


def test_the_merged_weight_is_w_plus_s_b_a():
    layer, x = by_hand().eval(), torch.tensor([[1.0, -2.0]])
    for _ in range(2):
        layer.merge()
        assert layer.merged_weight is not None, "merge() must store W' as `merged_weight`"
        assert layer.merged_weight.tolist() == [[4, 2], [9, 10]], (
            "the merged weight must be W + s B A, also after merging twice"
        )
        assert layer(x).tolist() == [[10, 9]], "a merged layer must compute W' x + b"
    assert layer.base_layer.weight.tolist() == [[1, 2], [3, 4]], "merging must not change W"
    assert "merged_weight" not in layer.state_dict(), "W' is computed: it is not saved"
    layer.unmerge()
    layer.lora_B.weight.data.zero_()
    assert layer(x).tolist() == [[7, 15]], "an unmerged layer must use W, A and B again"
    layer = merge_into_base(by_hand())
    assert type(layer) is nn.Linear, "the base layer must be returned"
    assert layer.weight.tolist() == [[4, 2], [9, 10]], "W must be overwritten with W + s B A"


def test_dropout_acts_on_every_entry_of_the_adapters_input_and_not_on_the_base():
    """W x + b = 14 stays. With p = 0.5, an entry of x is dropped or doubled: A x is 0, 2 or 4."""
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(2, 1), LoraConfig(r=1, lora_alpha=1, lora_dropout=0.5))
    layer.base_layer.weight.data = torch.tensor([[1.0, 10.0]])
    layer.base_layer.bias.data = torch.tensor([3.0])
    layer.lora_A.weight.data = torch.ones(1, 2)
    layer.lora_B.weight.data = torch.ones(1, 1)
    x = torch.ones(1, 2)
    found = {layer(x).item() for _ in range(50)}
    assert found == {14, 16, 18}, "y must be W x + b + s B A dropout(x), with x itself in W x"
    assert {layer.eval()(x).item() for _ in range(50)} == {16}, "no dropout in evaluation mode"


def test_the_gradients_are_those_of_w_plus_s_b_a():
    layer, x = by_hand(), torch.tensor([[1.0, -2.0]], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.tolist() == [[13, 12]], "the gradient of x must be the column sums of W + s B A"
    # s Bᵀ 1 xᵀ = 1.5 [2, 4]ᵀ [1, -2], and s 1 (A x)ᵀ = 1.5 [1, 1]ᵀ [1, -1]
    assert layer.lora_A.weight.grad.tolist() == [[3, -6], [6, -12]]
    assert layer.lora_B.weight.grad.tolist() == [[1.5, -1.5], [1.5, -1.5]]


@pytest.mark.parametrize(("r", "s"), [(1, 5.0), (2, 2.5), (4, 1.25)])
def test_rank_1_is_allowed_and_s_is_alpha_over_r(r, s):
    layer = LoraLinear(nn.Linear(3, 4), LoraConfig(r=r, lora_alpha=5))
    assert layer.scaling == s, "s must be α / r"
    nn.init.ones_(layer.lora_A.weight)
    nn.init.ones_(layer.lora_B.weight)
    assert torch.equal(layer.delta(), torch.full((4, 3), 5.0)), "s B A, with B A = r everywhere"


def test_a_conv1d_of_transformers_stores_its_weight_transposed():
    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(5, 3)), torch.randn(2, 3)
    layer = add_lora(model, LoraConfig(r=2, target_modules=["0"]))["0"]
    assert (layer.in_features, layer.out_features) == (3, 5)
    nn.init.normal_(layer.lora_B.weight)
    y = model(x)
    assert torch.allclose(y, model[0].base_layer(x) + x @ layer.delta().T, atol=1e-6)
    assert layer.weight.shape == (3, 5), "`weight` must be stored as W is"
    assert torch.allclose(x @ layer.weight, y - layer.bias, atol=1e-6)
    layer.eval().merge()
    assert torch.allclose(model(x), y, atol=1e-6)
    assert torch.allclose(merge_into_base(layer)(x), y, atol=1e-6)


# --- in a model ---


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
def test_merging_does_not_change_the_logits(trained_base, dtype, bound):
    model = trained_base.to(dtype)
    ids = torch.randint(1, 2048, (4, 64), generator=torch.Generator().manual_seed(0))
    base_logits = model(ids).logits
    layers = filled(add_lora(model, LoraConfig(r=8, lora_alpha=12, target_modules=ALL)))
    logits = model(ids).logits
    largest = logits.abs().max()
    assert (logits - base_logits).abs().max() > 0.05 * largest, "the adapter has no effect"
    for _ in range(3):  # repeated merging must not drift
        merge_lora(layers)
        merged = model(ids).logits
        error = (merged - logits).abs().max()
        assert error < bound * largest, "merging changed the logits: W' must be W + s B A"
        unmerge_lora(layers)
        assert torch.equal(model(ids).logits, logits), "unmerging must restore the logits exactly"
    remove_lora(model, layers)
    assert torch.equal(model(ids).logits, base_logits), "the base's weights were changed"


@pytest.mark.parametrize("r", [1, 4, 8])
def test_the_parameter_count_follows_the_formula(gpt, r):
    d = gpt.config.n_embd
    model = get_peft_model(gpt, LoraConfig(r=r, target_modules=ALL))
    per_block = (d + 3 * d) + (d + d) + (d + 4 * d) + (4 * d + d)
    assert model.get_nb_trainable_parameters()[0] == r * per_block * gpt.config.n_layer


def test_a_new_adapter_does_not_change_the_logits(gpt, ids):
    before = gpt(ids).logits
    layers = add_lora(gpt, LoraConfig(target_modules=ALL)).values()
    assert torch.equal(gpt(ids).logits, before), "B must start at zero"
    assert len({layer.lora_A for layer in layers}) == 8, "every layer needs an A and B of its own"


def test_only_the_adapter_gets_gradients(gpt, ids):
    filled(add_lora(gpt, LoraConfig(target_modules=ALL)))
    assert any(p.requires_grad for p in gpt.parameters()), "A and B must be trainable"
    gpt(ids, labels=ids).loss.backward()
    for name, p in gpt.named_parameters():
        trained = p.grad is not None and p.grad.any()
        own = "lora_" in name
        assert trained == own, f"{name} must {'get a gradient' if own else 'be frozen'}"


def test_the_output_is_equation_1():
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(7, 5).double(), LoraConfig(r=3, lora_alpha=2.5))
    filled({"": layer})
    x = torch.randn(2, 4, 7).double()
    w = layer.base_layer.weight + 2.5 / 3 * layer.lora_B.weight @ layer.lora_A.weight
    y = x @ w.T + layer.bias
    assert torch.allclose(layer(x), y, rtol=0, atol=1e-14), "y must be (W + α / r B A) x + b"


def test_rslora_scales_by_the_root_of_the_rank():
    config = LoraConfig(r=9, lora_alpha=6, use_rslora=True)
    assert LoraLinear(nn.Linear(4, 4), config).scaling == 6 / math.sqrt(9)


@pytest.mark.parametrize("strict", [False, True])
def test_targets_are_found_by_ending_by_regex_and_by_all_linear(gpt, strict):
    def found(targets):
        if strict:
            return list(find_targets(gpt, targets))
        layers = add_lora(gpt, LoraConfig(target_modules=targets))
        remove_lora(gpt, layers)
        return list(layers)

    assert found(["mlp.c_proj"]) == [f"transformer.h.{i}.mlp.c_proj" for i in range(2)]
    assert found(r".*h\.1\.attn\.c_.*") == [
        f"transformer.h.1.attn.{n}" for n in ("c_attn", "c_proj")
    ]
    assert len(found("all-linear")) == 8, "all-linear must leave out the output head"


def test_training_while_merged_raises_an_error(gpt, ids):
    layers = add_lora(gpt, LoraConfig(target_modules=ALL))
    merge_lora(layers)
    with pytest.raises(RuntimeError, match="unmerge"):
        gpt.train()(ids)
    with torch.no_grad():
        gpt(ids)  # nothing is trained here


def test_gradients_are_finite_under_bfloat16_autocast(gpt, ids):
    filled(add_lora(gpt, LoraConfig(target_modules=ALL)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = gpt(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in gpt.parameters() if p.requires_grad)


def test_a_bfloat16_base_gets_a_float32_adapter(gpt, ids):
    layers = add_lora(gpt.bfloat16(), LoraConfig(target_modules=ALL))
    dtypes = {layer.lora_A.weight.dtype for layer in layers.values()}
    assert dtypes == {torch.float32}, "small steps are lost if A and B are in half precision"
    assert gpt(ids).logits.dtype == torch.bfloat16, "the output must have the dtype of the base"
    merge_lora(layers)
    dtypes = {layer.merged_weight.dtype for layer in layers.values()}
    assert dtypes == {torch.bfloat16}, "W' must have the dtype of W"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": 2.5}, "r must be a positive integer, got 2.5"),
        ({"r": True}, "r must be a positive integer, got True"),
        ({"lora_alpha": 0}, "lora_alpha must be a positive number, got 0"),
        ({"lora_alpha": math.inf}, "lora_alpha must be a positive number, got inf"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_the_config_names_a_bad_setting_and_its_value(changes, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**changes)


def test_the_smallest_and_largest_allowed_settings_are_accepted():
    assert LoraConfig(r=1, lora_alpha=1e-9, lora_dropout=0).r == 1
    assert LoraConfig(lora_dropout=0.999).lora_dropout == 0.999


def test_rank_pattern_and_alpha_pattern_are_gone():
    for name in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(TypeError, match=name):
            LoraConfig(**{name: {"c_fc": 2}})


def test_the_layer_does_not_write_into_the_config():
    config = LoraConfig(target_modules=["0"])
    before = dataclasses.asdict(config)
    add_lora(nn.Sequential(nn.Linear(4, 4)), config)
    assert dataclasses.asdict(config) == before


# --- targets ---


def unchanged(gpt) -> bool:
    """Whether a refused call left the model as it was."""
    trains = all(p.requires_grad for p in gpt.parameters())
    return trains and not any(hasattr(m, "base_layer") for m in gpt.modules())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["c_attn", "c_porj"],
            "target_modules: 'c_porj' matches no module; linear layers: "
            "c_attn, c_fc, c_proj, lm_head$",
        ),
        ([], "names nothing"),
        (None, "names nothing"),
        ("c_attn", "matches no module"),  # a string is a regex for the whole name
        (["ln_1"], "is a LayerNorm; this method adapts linear layers: c_attn, c_fc"),
        (["h.0.attn"], "is a Attention; this method adapts linear layers"),
        (["lm_head"], "shares its weight with another module: untie it first"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(gpt, targets, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(gpt, LoraConfig(target_modules=targets))
    assert unchanged(gpt)
    with pytest.raises(ValueError, match=message):
        find_targets(gpt, targets)


NO_MATCH = [None, [], ["c_porj"], ["proj"], "c_attn", r"transformer\.h\.0\.attn\.c_at", ["ln_1"]]


@pytest.mark.parametrize("targets", NO_MATCH)
def test_add_lora_without_any_match_is_refused(gpt, targets):
    with pytest.raises(ValueError, match=r"target_modules=.* matches no linear layer"):
        add_lora(gpt, LoraConfig(target_modules=targets))
    assert unchanged(gpt)


def test_add_lora_ignores_an_entry_without_a_match_next_to_one_that_matches(gpt):
    layers = add_lora(gpt, LoraConfig(target_modules=["c_attn", "c_porj"]))
    assert list(layers) == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]


@pytest.mark.parametrize("add", [get_peft_model, add_lora])
def test_a_second_adapter_on_the_same_model_is_refused(gpt, add):
    add_lora(gpt, LoraConfig(target_modules=["c_fc"]))
    with pytest.raises(ValueError, match="already has an adapter: remove it before adding another"):
        add(gpt, LoraConfig(target_modules=["c_attn"]))


def test_lora_layers_are_made_on_the_device_of_the_model(gpt):
    add_lora(gpt.to("meta"), LoraConfig(target_modules="all-linear"))
    assert {p.device.type for p in gpt.parameters()} == {"meta"}, "A and B must be where W is"


@pytest.mark.parametrize("targets", [["linear1"], ["out_proj"]])
def test_layers_that_pytorchs_fast_path_reads_are_refused(targets):
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    with pytest.raises(ValueError, match="PyTorch reads its weight directly"):
        get_peft_model(model, LoraConfig(target_modules=targets))


def test_the_projection_of_multihead_attention_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    with pytest.raises(ValueError, match="directly, not the adapter"):
        get_peft_model(Net(), LoraConfig(target_modules=["out_proj"]))


def test_all_linear_leaves_out_an_untied_output_head_that_can_be_named(gpt):
    gpt.lm_head.weight = nn.Parameter(gpt.lm_head.weight.detach().clone())
    assert "lm_head" not in find_targets(gpt, "all-linear")
    assert list(find_targets(gpt, ["lm_head"])) == ["lm_head"]


def test_list_targets_counts_layers_and_parameters_by_name(gpt):
    rows = {row["name"]: row for row in list_targets(gpt)}
    assert list(rows) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert rows["mlp.c_fc"] == {
        "name": "mlp.c_fc",
        "place": "mlp",
        "count": 2,
        "in": 24,
        "out": 96,
        "parameters": 2 * 24 * 96,
        "rank 1 adapters": 2 * (24 + 96),
    }


# --- training ---


def test_gradient_checkpointing_gives_the_same_gradients(gpt, ids):
    filled(add_lora(gpt, LoraConfig(target_modules=ALL)))
    parameters = [p for p in gpt.parameters() if p.requires_grad]
    plain = torch.autograd.grad(gpt(ids, labels=ids).loss, parameters)
    gpt.gradient_checkpointing_enable()
    again = torch.autograd.grad(gpt.train()(ids, labels=ids).loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert isinstance(gpt, GPT)


def test_training_merging_and_removing_on_a_plain_module_in_float64():
    """The base weights stay identical throughout, and removing restores the base's output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10)).double()
    x = torch.randn(5, 20).double()
    before = [p.clone() for p in model.parameters()]
    y = model(x)
    layers = add_lora(model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 3 * (20 + 30) + 3 * (30 + 10)
    assert torch.equal(model(x), y), "B must start at zero"
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(x)
    assert not torch.allclose(trained, y)
    merge_lora(layers)
    merged = model.eval()(x)
    assert torch.allclose(merged, trained, rtol=0, atol=1e-12), "W' must be W + s B A"
    unmerge_lora(layers)
    assert torch.equal(model(x), trained), "unmerging must restore the output exactly"
    remove_lora(model, layers)
    assert torch.equal(model(x), y), "removing must restore the base exactly"
    unchanged = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert all(unchanged), "training must not change W and b"
    assert not any(p.requires_grad for p in model.parameters()), "the base must stay frozen"
