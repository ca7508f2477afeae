"""QLoRA: the quantizer, the 4-bit layers, the adapter on them, the paged optimizer."""

import copy

import pytest
import torch
from torch import nn

from minipeft import (
    GPT,
    AdaLoraConfig,
    LoraConfig,
    PagedAdamW,
    PeftModel,
    QLoraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
    quantize_model,
)
from minipeft.qlora import (
    NF4_CODEBOOK,
    Linear4bit,
    Linear8bit,
    QLoraLinear,
    bits_per_weight,
    dequantize_nf4,
    quantize_nf4,
)

# bitsandbytes' constants
CONSTANTS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


# --- the quantizer ---


def test_the_computed_codebook_is_the_constants():
    assert torch.equal(NF4_CODEBOOK, torch.tensor(CONSTANTS))


def test_the_first_weight_is_in_the_high_half_of_a_byte():
    assert quantize_nf4(torch.tensor([1.0, -1.0])).codes.tolist() == [0xF0]
    assert quantize_nf4(torch.zeros(4)).codes.tolist() == [0x77, 0x77]
    assert quantize_nf4(torch.tensor([1.0, 0.0, -1.0])).codes.tolist() == [0xF7, 0x07]  # odd: a 0


def test_each_weight_gets_its_nearest_level():
    torch.manual_seed(0)
    w = torch.randn(4, 64)
    absmax = w.abs().amax(1, keepdim=True)
    nearest = (w[..., None] / absmax[..., None] - NF4_CODEBOOK).abs().argmin(-1)
    by_hand = NF4_CODEBOOK[nearest] * absmax
    assert torch.equal(dequantize_nf4(quantize_nf4(w, double_quant=False)), by_hand)
    midpoints = (NF4_CODEBOOK[1:] + NF4_CODEBOOK[:-1]) / 2
    w = torch.cat((midpoints, torch.ones(1)))  # on a midpoint the lower level wins
    assert torch.equal(dequantize_nf4(quantize_nf4(w, double_quant=False))[:15], NF4_CODEBOOK[:15])


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7, 11), (64, 64), (3, 5, 50)])
def test_any_shape_and_dtype_comes_back(shape, dtype, double_quant):
    torch.manual_seed(0)
    w = torch.randn(shape).to(dtype)
    back = dequantize_nf4(quantize_nf4(w, double_quant=double_quant))
    assert back.shape == w.shape
    assert back.dtype == dtype
    assert (back - w).abs().max() < 0.2 * w.abs().max()


def test_bits_and_error_are_the_known_figures():
    torch.manual_seed(0)
    w = torch.randn(1024, 1024)
    plain, double = quantize_nf4(w, double_quant=False), quantize_nf4(w)
    assert plain.bits() == 4.5
    assert double.bits() == pytest.approx(4.127, abs=1e-3)
    for q, error in ((plain, 0.09198), (double, 0.09201)):
        found = (dequantize_nf4(q) - w).norm() / w.norm()
        assert found.item() == pytest.approx(error, abs=3e-4)


def test_blocks_that_are_zero_tiny_or_huge_survive():
    for scale in (0.0, 1e-40, 1e-30, 1e37):
        w = torch.linspace(-1, 1, 128) * scale
        back = dequantize_nf4(quantize_nf4(w, double_quant=False))
        assert back.isfinite().all()
        assert (back - w).abs().max() <= max(0.16 * scale, 1e-38)  # below that all is rounded to 0


@pytest.mark.parametrize(
    ("weight", "blocksize", "message"),
    [
        (torch.tensor([1.0, torch.nan]), 64, "NaN or infinite"),
        (torch.tensor([1.0, torch.inf]), 64, "NaN or infinite"),
        (torch.ones(4, dtype=torch.long), 64, "give floats"),
        (torch.ones(4), 63, "blocksize is 63"),
        (torch.ones(4), 0, "blocksize is 0"),
    ],
)
def test_what_cannot_be_quantized_is_refused(weight, blocksize, message):
    with pytest.raises(ValueError, match=message):
        quantize_nf4(weight, blocksize)


# --- the layers ---


def test_a_4bit_layer_is_the_layer_of_its_dequantized_weight():
    torch.manual_seed(0)
    layer = nn.Linear(70, 30)
    coarse = Linear4bit(layer)
    plain = nn.Linear(70, 30)
    plain.load_state_dict({"weight": coarse.weight, "bias": layer.bias})
    x, z = (torch.randn(4, 5, 70, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    x.requires_grad_()
    z.requires_grad_()
    y, expected = coarse(x), plain(z)
    assert torch.equal(y, expected)
    (y**2).sum().backward()
    (expected**2).sum().backward()
    assert torch.allclose(x.grad, z.grad, rtol=1e-6)
    assert torch.allclose(coarse.bias.grad, plain.bias.grad, rtol=1e-5)


def test_nothing_of_full_size_is_kept_for_the_backward_pass():
    coarse = Linear4bit(nn.Linear(512, 512)).requires_grad_(False)
    x, kept = torch.randn(2, 512, requires_grad=True), []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.nbytes) or t, lambda t: t
    )
    with hooks:
        coarse(x)
    assert sum(kept) < 512 * 512  # a quarter of W
    assert sum(b.nbytes for b in coarse.buffers()) < 512 * 512 * 4.2 / 8


def test_the_state_dict_holds_the_4bit_form_and_casting_keeps_the_scales():
    torch.manual_seed(0)
    coarse, other = Linear4bit(nn.Linear(70, 30)), Linear4bit(nn.Linear(70, 30))
    w = coarse.weight
    assert not torch.equal(other.weight, w)
    other.load_state_dict(coarse.state_dict())
    assert torch.equal(other.weight, w)
    assert coarse.half().scale_scales.dtype == torch.float32
    assert torch.equal(coarse.weight, w)
    x = torch.randn(3, 70).half()
    assert coarse(x).dtype == torch.float16
    wide = Linear4bit(nn.Linear(70, 30), compute_dtype=torch.bfloat16)
    assert wide(torch.randn(3, 70)).dtype == torch.float32


def test_an_8bit_layer_is_close():
    torch.manual_seed(0)
    layer, x = nn.Linear(70, 30), torch.randn(5, 70)
    coarse = Linear8bit(layer)
    assert coarse.codes.dtype == torch.int8
    assert (coarse.weight - layer.weight).abs().max() <= layer.weight.abs().max() / 254 + 1e-7
    assert torch.allclose(coarse(x), layer(x), atol=0.02)


@pytest.mark.parametrize(("bits", "kind"), [(4, Linear4bit), (8, Linear8bit)])
def test_a_quantized_model_keeps_head_embeddings_and_norms(gpt, ids, bits, kind):
    plain = gpt(ids).logits
    layers = quantize_model(gpt, bits)
    assert len(layers) == 8
    assert all(type(gpt.get_submodule(name)) is kind for name in layers)
    assert type(gpt.lm_head) is nn.Linear
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    assert (gpt(ids).logits - plain).abs().max() < 0.5 * plain.abs().max()
    assert not torch.equal(gpt(ids).logits, plain)
    with pytest.raises(ValueError, match="bits is 3"):
        quantize_model(gpt, 3)


def test_a_weight_with_nan_is_refused_before_anything_is_changed(gpt):
    gpt.transformer.h[1].mlp.c_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        quantize_model(gpt)
    assert not any(isinstance(m, Linear4bit) for m in gpt.modules())


# --- LoRA on 4-bit layers ---


def trained(gpt, ids) -> PeftModel:
    quantize_model(gpt)
    model = get_peft_model(gpt, QLoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = PagedAdamW(parameters, lr=2e-2, page_bytes=512, device_budget_bytes=2048)
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


def test_qlora_needs_a_quantized_model_and_says_how(gpt):
    with pytest.raises(ValueError, match=r"call quantize_model\(model\) first"):
        get_peft_model(gpt, QLoraConfig(target_modules=["c_attn"]))


def test_qlora_starts_as_the_4bit_base_and_trains_only_the_adapter(gpt, ids):
    quantize_model(gpt)
    plain = gpt(ids).logits
    model = get_peft_model(gpt, QLoraConfig(r=4, target_modules=["c_attn", "c_fc"]))
    assert torch.equal(model(ids).logits, plain)
    count = 2 * 4 * (24 + 72) + 2 * 4 * (24 + 96)
    assert model.get_nb_trainable_parameters()[0] == count
    model(ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())


def test_a_plain_lora_on_a_4bit_model_is_qlora_and_adalora_is_refused(gpt, ids):
    """Writing a merged weight into the computed one would lose it without a word."""
    quantize_model(gpt)
    model = get_peft_model(gpt, LoraConfig(r=4, target_modules=["c_attn"]))
    assert all(isinstance(one, QLoraLinear) for one in model.adapters["default"].layers.values())
    for layer in model.adapters["default"].layers.values():
        nn.init.normal_(layer.lora_B.weight)
    logits = model.eval()(ids).logits
    assert torch.allclose(model.merge_and_unload()(ids).logits, logits, atol=1e-4)
    config = AdaLoraConfig(target_modules=["c_attn"], total_step=10)
    with pytest.raises(ValueError, match="Linear4bit, not a linear layer"):
        get_peft_model(model.unload(), config)


def test_switched_off_the_4bit_base_is_back_and_merging_is_exact(gpt, ids):
    base = copy.deepcopy(gpt)
    quantize_model(base)
    model = trained(gpt, ids)
    before = model(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base(ids).logits)
    model.merge_adapter()
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    with pytest.raises(RuntimeError, match="unmerge it before training"):
        model.train()(ids)
    model.eval().unmerge_adapter()
    assert torch.equal(model(ids).logits, before)
    plain = model.merge_and_unload()
    assert type(plain) is GPT
    assert not any(isinstance(m, Linear4bit) for m in plain.modules())
    assert torch.allclose(plain(ids).logits, before, atol=1e-5)
    assert torch.equal(model(ids).logits, before)


def test_rounding_a_merged_weight_again_loses_much_of_what_was_learned(gpt, ids):
    layers = trained(gpt, ids).adapters["default"].layers
    lost = [layer.lost_by_rounding() for layer in layers.values()]
    assert all(0.1 < share < 10 for share in lost)


def test_preparing_freezes_casts_to_float32_and_checkpoints_without_changing_gradients(gpt, ids):
    quantize_model(gpt.bfloat16())
    config, gradients = QLoraConfig(r=2, target_modules="all-linear"), []
    for checkpointing in (False, True):
        base = prepare_model_for_kbit_training(copy.deepcopy(gpt), checkpointing)
        assert {p.dtype for p in base.parameters()} == {torch.float32}
        assert base.gradient_checkpointing == checkpointing
        assert base.transformer.wte(ids).requires_grad == checkpointing
        torch.manual_seed(0)
        model = get_peft_model(base, config).train()
        model(ids, labels=ids).loss.backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_counts_and_bits_of_a_quantized_model(gpt):
    plain = sum(p.numel() for p in gpt.parameters())
    assert bits_per_weight(gpt) is None
    quantize_model(gpt)
    assert 4.125 < bits_per_weight(gpt) < 4.2
    model = get_peft_model(gpt, QLoraConfig(r=2, target_modules="all-linear"))
    trainable, total = model.get_nb_trainable_parameters()
    assert total == plain + trainable


def test_on_disk_it_is_a_lora_and_a_lora_loads_on_a_4bit_model(gpt, ids, tmp_path):
    full, base = copy.deepcopy(gpt), copy.deepcopy(gpt)
    quantize_model(base)
    model = trained(gpt, ids)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert again.peft_config["default"].peft_type == "QLORA"
    assert torch.equal(again(ids).logits, model(ids).logits)
    on_full = PeftModel.from_pretrained(full, tmp_path)
    assert isinstance(on_full.peft_config["default"], LoraConfig)
    on_full.peft_config["default"].use_rslora = True
    on_full.save_pretrained(tmp_path / "rs")
    with pytest.raises(ValueError, match="not implemented: use_rslora"):
        PeftModel.from_pretrained(again.unload(), tmp_path / "rs")
