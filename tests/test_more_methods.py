"""BitFit and bottleneck adapters: what must hold for each."""

import copy
import json
import math

import pytest
import torch
from conftest import BASE, tiny_config
from torch import nn

from minipeft import GPT, BitFitConfig, BottleneckConfig, LoraConfig, PeftModel, get_peft_model
from minipeft.bitfit import BitFitLayer, add_bitfit, bitfit_layers
from minipeft.bottleneck import BottleneckLayer, add_bottleneck, bottleneck_layers
from minipeft.lab import finetune
from minipeft.lora import add_lora

CONFIGS = {
    "bitfit": lambda: BitFitConfig(),
    "bottleneck": lambda: BottleneckConfig(["attn.c_proj", "mlp.c_proj"], bottleneck_size=5),
}
ADD = {"bitfit": add_bitfit, "bottleneck": add_bottleneck}
OWN = (".delta", ".down.weight", ".down.bias", ".up.weight", ".up.bias")


def filled(model: nn.Module) -> nn.Module:
    """Give all that is trained values of its own: at the start an adapter does nothing."""
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
def test_merge_gives_the_same_logits(trained_base, dtype, bound):
    model = trained_base.to(dtype)
    ids = torch.randint(1, 2048, (4, 64), generator=torch.Generator().manual_seed(0))
    base_logits = model(ids).logits
    model = filled(get_peft_model(model, BitFitConfig())).eval()
    logits = model(ids).logits
    largest = logits.abs().max()
    assert (logits - base_logits).abs().max() > 0.05 * largest, "the adapter must do something"
    for _ in range(3):  # again and again, nothing drifts
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
    [  # the formulas of the docstrings, with d 24 and 2 layers: all biases; r 5, two a layer
        ("bitfit", 2 * (24 + 72 + 24 + 24 + 96 + 24) + 24),
        ("bottleneck", 2 * 2 * (2 * 5 * 24 + 5 + 24)),
    ],
)
def test_the_count_is_the_formulas(gpt, name, count):
    assert get_peft_model(gpt, CONFIGS[name]()).get_nb_trainable_parameters()[0] == count


@pytest.mark.parametrize("name", CONFIGS)
def test_at_first_nothing_has_changed_to_the_bit(gpt, ids, name):
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
def test_training_lowers_the_loss_and_leaves_the_base_to_the_bit(gpt, ids, name):
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
def test_saved_and_read_back_it_gives_the_same_bits(gpt, ids, tmp_path, name, trainable):
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
def test_targets_may_be_a_set_and_layers_come_in_the_models_order(gpt, tmp_path, name):
    config = CONFIGS[name]()
    config.target_modules = {"mlp.c_proj", "attn.c_proj", "c_fc"}
    model = get_peft_model(gpt, config)
    names = [n for n, _ in gpt.named_modules() if n.endswith(("c_proj", "c_fc"))]
    assert list(model.adapters["default"].layers) == names
    model.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found["target_modules"] == ["attn.c_proj", "c_fc", "mlp.c_proj"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_another_shape_is_refused(gpt, tmp_path, name):
    get_peft_model(gpt, CONFIGS[name]()).save_pretrained(tmp_path)
    wider = GPT(tiny_config(n_embd=36))
    with pytest.raises(ValueError, match="does not fit"):
        PeftModel.from_pretrained(wider, tmp_path)
    assert all(p.requires_grad for p in wider.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains_a_step_under_bfloat16_autocast_and_with_checkpointing(gpt, ids, name):
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


@pytest.mark.parametrize("name", CONFIGS)
def test_it_takes_turns_with_lora_on_one_base(gpt, ids, name):
    base = gpt(ids).logits
    model = filled(get_peft_model(gpt, CONFIGS[name]()))
    first = model(ids).logits
    model.add_adapter("other", LoraConfig(target_modules=["c_attn"]))
    model.set_adapter("other")
    assert torch.equal(model(ids).logits, base)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, first)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_targets_are_named_by_ending_or_regex(gpt, name):
    make, config = {
        "bitfit": (bitfit_layers, BitFitConfig),
        "bottleneck": (bottleneck_layers, BottleneckConfig),
    }[name]

    def found(targets):
        return list(make(gpt, config(targets)))

    assert found(["mlp.c_proj"]) == [f"transformer.h.{i}.mlp.c_proj" for i in range(2)]
    one = [f"transformer.h.1.attn.{n}" for n in ("c_attn", "c_proj")]
    assert found(r".*h\.1\.attn\.c_.*") == one
    assert not any(hasattr(m, "base_layer") for m in gpt.modules())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["c_attn", "c_porj"], "'c_porj' matches no layer with a .*: c_attn, c_fc, c_proj, .*ln_1"),
        ([], "'' matches no layer with a"),
        (["h.0.attn"], r"'h\.0\.attn' matches no layer"),
    ],
)
def test_targets_without_a_match_are_refused_and_nothing_is_changed(gpt, name, targets, message):
    config = CONFIGS[name]()
    config.target_modules = targets
    with pytest.raises(ValueError, match=message):
        ADD[name](gpt, config)
    assert all(p.requires_grad for p in gpt.parameters())
    assert not any(hasattr(m, "base_layer") for m in gpt.modules())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_second_adapter_in_place_is_refused(gpt, name):
    add_lora(gpt, LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(ValueError, match="in place already"):
        ADD[name](gpt, CONFIGS[name]())


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
def test_targets_that_pytorch_would_skip_are_refused(name, model, target):
    config = CONFIGS[name]()
    config.target_modules = [target]
    with pytest.raises(ValueError, match=f"{target}: another module reads its .* past an adapter"):
        ADD[name](model, config)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_that_stands_at_two_places_is_refused(name):
    block = nn.Sequential(nn.Linear(4, 4))
    config = CONFIGS[name]()
    config.target_modules = "0.0"
    with pytest.raises(ValueError, match=r"target 0\.0: another module reads its"):
        ADD[name](nn.Sequential(block, block), config)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_conv1d_is_a_linear_layer(name):
    """transformers' Conv1D is linear with (in, out) weights; a square one looks like any other."""

    class Conv1D(nn.Module):
        def __init__(self, n_out: int, n_in: int):
            super().__init__()
            self.weight, self.bias = (
                nn.Parameter(torch.randn(n_in, n_out)),
                nn.Parameter(torch.ones(n_out)),
            )

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


# --- BitFit ---


def test_bitfit_trains_every_bias_and_looks_like_the_layer(gpt):
    biases = {n.removesuffix(".bias"): p for n, p in gpt.named_parameters() if "bias" in n}
    layers = add_bitfit(gpt, BitFitConfig())
    assert layers.keys() == biases.keys()
    for name, layer in layers.items():
        assert layer.bias is biases[name]
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
def test_the_output_is_that_of_the_layer_with_the_changed_bias(layer, x):
    layer, x = layer.double(), x.double()
    by_hand = copy.deepcopy(layer)
    adapted = BitFitLayer(layer)
    nn.init.normal_(adapted.delta)
    with torch.no_grad():
        by_hand.bias += adapted.delta
    assert torch.equal(adapted(x), by_hand(x))
    gradients = torch.autograd.grad(adapted(x).square().sum(), adapted.delta)
    wanted = torch.autograd.grad(by_hand(x).square().sum(), by_hand.bias)
    assert torch.equal(gradients[0], wanted[0])


def test_bitfit_is_fine_tuning_of_the_biases_alone(gpt, ids):
    """Δb gets the gradients that the biases would get, and plain descent goes where theirs goes."""
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
        wanted = torch.autograd.grad(losses[0], list(free.values()))
        found = torch.autograd.grad(losses[1], [deltas[n] for n in free])
        with torch.no_grad():
            for (name, p), a, b in zip(free.items(), wanted, found, strict=True):
                assert torch.allclose(a, b, rtol=0, atol=1e-12 * a.abs().max().item()), name
                p -= 0.1 * a
                deltas[name] -= 0.1 * b


def test_training_while_merged_is_an_error(gpt, ids):
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
    with pytest.raises(ValueError, match="matches no layer with a bias; those are: none"):
        add_bitfit(model, BitFitConfig())
    assert all(p.requires_grad for p in model.parameters())


def test_a_bias_that_two_layers_share_is_refused(gpt):
    a, b = gpt.transformer.h[0].mlp.c_proj, gpt.transformer.h[1].mlp.c_proj
    b.bias = a.bias
    with pytest.raises(ValueError, match=r"c_proj: another module reads its bias"):
        add_bitfit(gpt, BitFitConfig())
    assert add_bitfit(gpt, BitFitConfig(["c_attn"])), "the others' own are free"


def test_bitfit_takes_layers_and_not_what_holds_layers():
    """Wrapped, a module would hide those inside from whoever looks for them by name."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    model[0].bias = nn.Parameter(torch.zeros(4))
    assert list(add_bitfit(model, BitFitConfig())) == ["0.0"]


def test_a_tied_weight_is_none_of_bitfits_business():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    model[1].weight = model[0].weight
    assert list(add_bitfit(model, BitFitConfig())) == ["1"]


def test_bitfit_trains_the_biases_of_a_4_bit_base(gpt, ids):
    from minipeft import quantize_model

    quantize_model(gpt)
    plain = gpt(ids).logits
    model = get_peft_model(gpt, BitFitConfig())
    assert torch.equal(model(ids).logits, plain)
    assert model.get_nb_trainable_parameters()[0] == 2 * (24 + 72 + 24 + 24 + 96 + 24) + 24
    losses = train(model, ids)
    assert losses[-1] < losses[0] - 0.1
    logits = model(ids).logits
    assert torch.allclose(model.merge_and_unload()(ids).logits, logits, atol=1e-4)


# --- bottleneck adapters ---


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


def test_a_bottleneck_cannot_be_merged_and_says_why(gpt, ids):
    model = filled(get_peft_model(gpt, CONFIGS["bottleneck"]()))
    before = model(ids).logits
    for act in (
        model.merge_adapter,
        model.unmerge_adapter,
        model.merge_and_unload,
        lambda: model.merge_and_unload(inplace=True),
    ):
        with pytest.raises(ValueError, match="a bottleneck is not linear, so it cannot be merged"):
            act()
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("target", ["ln_1", "wpe"])
def test_a_bottleneck_after_another_layer_than_a_linear_one_is_refused(gpt, target):
    with pytest.raises(ValueError, match=r"is a (LayerNorm|Embedding), not a linear layer"):
        add_bottleneck(gpt, BottleneckConfig([target]))
    assert all(p.requires_grad for p in gpt.parameters())


def test_a_bottleneck_after_a_tied_head_is_refused(gpt):
    with pytest.raises(ValueError, match="lm_head: another module reads its weight"):
        add_bottleneck(gpt, BottleneckConfig(["lm_head"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size is 0"),
        ({"bottleneck_size": 2.0}, "bottleneck_size is 2.0"),
        ({"bottleneck_size": True}, "bottleneck_size is True"),
        ({"non_linearity": "tanh"}, "non_linearity is 'tanh': give gelu or relu"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(["c_proj"], **changes)


# --- in the lab ---


def test_a_size_is_refused_where_a_method_has_none(base):
    with pytest.raises(ValueError, match="bitfit has no size: 4 was given"):
        finetune.finetune(base, None, "bitfit", 1, learning_rate=1e-3, size=4)


@pytest.mark.parametrize("name", [*CONFIGS, "prompt_tuning", "full"])
def test_places_are_refused_where_a_method_has_no_rank(base, name):
    with pytest.raises(ValueError, match=f"{name} takes no targets; these do: lora, adalora"):
        finetune.build_model(base, name, 0, 10, targets="mlp")


@pytest.mark.parametrize(("name", "size"), [("bitfit", None), ("bottleneck", 3)])
def test_the_labs_setting_fits_our_base(base, name, size):
    model = finetune.build_model(base, name, seed=0, steps=1, size=size)
    count, d, n = model.get_nb_trainable_parameters()[0], model.config.n_embd, model.config.n_layer
    formula = {"bitfit": n * 11 * d + d, "bottleneck": n * 2 * (2 * 3 * d + 3 + d)}
    assert count == formula[name]


def test_compare_runs_what_was_swept_unless_told_otherwise(tmp_path, monkeypatch):
    from minipeft.__main__ import parser

    file = tmp_path / "sweep.json"
    file.write_text(json.dumps([{"method": "lora"}, {"method": "bitfit"}, {"method": "full"}]))
    monkeypatch.setattr(finetune, "SWEEPS", file)
    assert parser().parse_args(["compare"]).methods == "frozen,full,lora,bitfit"
    file.unlink()
    assert parser().parse_args(["compare"]).methods == "frozen"


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
    else:  # Llama's linear layers have no bias unless asked for, its norms never
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
        read = type(base).from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(read(ids).logits, logits)
    with torch.autocast("cpu", torch.bfloat16):
        loss = again.train()(ids, labels=ids)[0]
    assert loss.isfinite()


@pytest.mark.conformance
@pytest.mark.parametrize("name", CONFIGS)
def test_ours_and_transformers_gpt2_are_adapted_alike(ids, tmp_path, name):
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
def test_a_llama_as_it_comes_has_no_bias_for_bitfit():
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 61}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    )
    with pytest.raises(ValueError, match="matches no layer with a bias; those are: none"):
        get_peft_model(llama, BitFitConfig())
