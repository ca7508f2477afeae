"""QLoRA: the quantizer, the quantized layers, and LoRA on 4-bit layers."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from minipeft import (
    GPT,
    AdaLoraConfig,
    BottleneckConfig,
    LoraConfig,
    PagedAdamW,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
    quantize_model,
)
from minipeft.adapters import merge_into_base
from minipeft.methods.lora import add_lora
from minipeft.methods.qlora import (
    DYNAMIC_MAP,
    NF4_CODEBOOK,
    Linear4bit,
    Linear8bit,
    QLoraLinear,
    add_qlora,
    bits_per_weight,
    dequantize_nf4,
    quantize_nf4,
    quantized_layers,
)

# bitsandbytes' constants
CONSTANTS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


# --- the quantizer ---


def test_the_computed_codebook_is_bitsandbytes_table():
    assert torch.equal(NF4_CODEBOOK, torch.tensor(CONSTANTS))


def test_the_first_weight_is_in_the_high_half_of_a_byte():
    assert quantize_nf4(torch.tensor([1.0, -1.0])).codes.tolist() == [0xF0]
    assert quantize_nf4(torch.zeros(4)).codes.tolist() == [0x77, 0x77]
    assert quantize_nf4(torch.tensor([1.0, 0.0, -1.0])).codes.tolist() == [
        0xF7,
        0x07,
    ]  # padded with 0


def test_the_map_of_scale_codes_has_2_to_the_k_midpoints_per_decade():
    """Decade 0 is [1e-7, 1e-6], with the midpoint 0.55e-6; decade 1 has those of two halves."""
    positive = DYNAMIC_MAP[DYNAMIC_MAP > 0]
    assert len(DYNAMIC_MAP) == 256
    assert len(positive) == 1 + 2 + 4 + 8 + 16 + 32 + 64 + 1
    assert torch.equal(DYNAMIC_MAP, DYNAMIC_MAP.sort().values)
    assert DYNAMIC_MAP[127] == 0
    assert torch.equal(DYNAMIC_MAP[:127], -positive[:-1].flip(0))
    assert positive[:3].tolist() == pytest.approx([0.55e-6, 3.25e-6, 7.75e-6])
    assert positive[63].item() == pytest.approx(0.1 + 0.9 / 128)
    assert positive[-2:].tolist() == pytest.approx([1 - 0.9 / 128, 1])


def test_double_quantization_by_hand():
    """The scales 1 and 3 are 2 ∓ 1. The lowest value of the map is -0.99296875, the highest 1."""
    q = quantize_nf4(torch.tensor([1.0, -1.0, 3.0, 0.0]), blocksize=2)
    assert q.codes.tolist() == [0xF0, 0xF7]
    assert (q.offset, q.scale_scales.tolist(), q.scales.tolist()) == (2, [1], [0, 255])
    first = 2 - 0.99296875
    assert dequantize_nf4(q).tolist() == pytest.approx([first, -first, 3, 0])
    assert q.bits() == 8 * (2 + 2 + 4 + 4) / 4
    plain = quantize_nf4(torch.tensor([1.0, -1.0, 3.0, 0.0]), blocksize=2, double_quant=False)
    assert dequantize_nf4(plain).tolist() == [1, -1, 3, 0]
    assert plain.bits() == 8 * (2 + 8) / 4


def test_256_scales_share_a_scale():
    w = torch.ones(257, 2)
    w[::2], w[256] = 2.0, 7.0  # 128 scales each of 1 and 2, and one of 7
    q = quantize_nf4(w, blocksize=2)
    offset = (128 + 256 + 7) / 257
    assert q.scale_scales.tolist() == pytest.approx([offset - 1, 7 - offset])
    assert dequantize_nf4(q)[256].tolist() == pytest.approx([7, 7])


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
def test_dequantizing_keeps_shape_and_dtype(shape, dtype, double_quant):
    torch.manual_seed(0)
    w = torch.randn(shape).to(dtype)
    back = dequantize_nf4(quantize_nf4(w, double_quant=double_quant))
    assert back.shape == w.shape
    assert back.dtype == dtype
    assert (back - w).abs().max() < 0.2 * w.abs().max()


def test_bits_and_error_on_normal_weights_are_the_published_figures():
    torch.manual_seed(0)
    w = torch.randn(1024, 1024)
    plain, double = quantize_nf4(w, double_quant=False), quantize_nf4(w)
    assert plain.bits() == 4.5
    assert double.bits() == pytest.approx(4.127, abs=1e-3)
    for q, error in ((plain, 0.09198), (double, 0.09201)):
        found = (dequantize_nf4(q) - w).norm() / w.norm()
        assert found.item() == pytest.approx(error, abs=3e-4)


def test_zero_tiny_and_huge_blocks_stay_finite():
    for scale in (0.0, 1e-40, 1e-30, 1e37):
        w = torch.linspace(-1, 1, 128) * scale
        back = dequantize_nf4(quantize_nf4(w, double_quant=False))
        assert back.isfinite().all()
        assert (back - w).abs().max() <= max(0.16 * scale, 1e-38)  # smaller weights may become 0


@pytest.mark.parametrize(
    ("weight", "blocksize", "message"),
    [
        (torch.tensor([1.0, torch.nan]), 64, "NaN or infinite"),
        (torch.tensor([1.0, torch.inf]), 64, "NaN or infinite"),
        (torch.ones(4, dtype=torch.long), 64, "only floating-point weights .* got torch.int64"),
        (torch.ones(4), 63, "blocksize must be a positive even integer, got 63"),
        (torch.ones(4), 0, "blocksize must be a positive even integer, got 0"),
        (torch.ones(4), -2, "blocksize must be a positive even integer, got -2"),
        (torch.ones(4), 2.0, "blocksize must be a positive even integer, got 2.0"),
    ],
)
def test_impossible_weights_and_block_sizes_are_refused(weight, blocksize, message):
    with pytest.raises(ValueError, match=message):
        quantize_nf4(weight, blocksize)


# --- the layers ---


def test_a_4bit_layer_equals_a_linear_layer_with_the_dequantized_weight():
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


def test_no_full_size_weight_is_kept_for_the_backward_pass():
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
    assert torch.equal(coarse.dequantize(torch.float32), w)
    assert torch.equal(coarse.weight, w.half())
    x = torch.randn(3, 70).half()
    assert coarse(x).dtype == torch.float16
    wide = Linear4bit(nn.Linear(70, 30), compute_dtype=torch.bfloat16)
    assert wide(torch.randn(3, 70)).dtype == torch.float32


@pytest.mark.parametrize("kind", [Linear4bit, Linear8bit])
def test_no_call_that_casts_a_model_casts_codes_or_scales(kind):
    layer = kind(nn.Linear(70, 30))
    before = {name: (t.dtype, t.clone()) for name, t in layer.named_buffers()}
    for cast in (layer.half, layer.double, lambda: layer.type(torch.float16)):
        cast()
        for name, (dtype, values) in before.items():
            found = layer.get_buffer(name)
            assert found.dtype == dtype, f"{name} became {found.dtype}"
            assert torch.equal(found, values)
    assert layer.weight.dtype == torch.float16


def test_compute_dtype_is_the_dtype_of_the_product():
    torch.manual_seed(0)
    layer, x = nn.Linear(70, 30), torch.randn(3, 70)
    rough = Linear4bit(layer, compute_dtype=torch.bfloat16)
    w, b = rough.dequantize(torch.bfloat16), layer.bias.bfloat16()
    assert torch.equal(rough(x), nn.functional.linear(x.bfloat16(), w, b).float())


def test_an_8bit_layer_has_a_scale_per_row():
    """The scales are 127 / 127 and 254 / 127; -63.4 is rounded to -63, and 3 / 2 to 2."""
    layer = nn.Linear(2, 3)
    layer.weight.data = torch.tensor([[127.0, -63.4], [3.0, 254.0], [0.0, 0.0]])
    coarse = Linear8bit(layer)
    assert coarse.scales.tolist() == [1, 2, 0]
    assert coarse.codes.tolist() == [[127, -63], [2, 127], [0, 0]]
    assert coarse.weight.tolist() == [[127, -63], [4, 254], [0, 0]]
    half = Linear8bit(layer.half())
    assert half.scales.dtype == torch.float32
    assert half.weight.dtype == torch.float16
    assert half(torch.ones(1, 2).half()).dtype == torch.float16
    layer.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        Linear8bit(layer)


def test_an_8bit_layer_is_close_to_the_original():
    torch.manual_seed(0)
    layer, x = nn.Linear(70, 30), torch.randn(5, 70)
    coarse = Linear8bit(layer)
    assert coarse.codes.dtype == torch.int8
    assert (coarse.weight - layer.weight).abs().max() <= layer.weight.abs().max() / 254 + 1e-7
    assert torch.allclose(coarse(x), layer(x), atol=0.02)


@pytest.mark.parametrize(("bits", "kind"), [(4, Linear4bit), (8, Linear8bit)])
def test_quantize_model_keeps_head_embeddings_and_norms(gpt, ids, bits, kind):
    plain = gpt(ids).logits
    assert quantize_model(gpt, bits) is gpt
    layers = quantized_layers(gpt)
    assert len(layers) == 8
    assert all(type(gpt.get_submodule(name)) is kind for name in layers)
    assert type(gpt.lm_head) is nn.Linear
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    assert (gpt(ids).logits - plain).abs().max() < 0.5 * plain.abs().max()
    assert not torch.equal(gpt(ids).logits, plain)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        quantize_model(gpt, 3)


def test_a_weight_with_nan_is_refused_before_anything_changes(gpt):
    gpt.transformer.h[1].mlp.c_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        quantize_model(gpt)
    assert not any(isinstance(m, Linear4bit) for m in gpt.modules())


def test_8_bit_layers_do_not_overflow_in_half_precision():
    """Unscaled, the sum of 4,096 codes of 127 would exceed float16's largest number, 65,504."""
    layer = nn.Linear(4096, 2, bias=False)
    nn.init.ones_(layer.weight)
    x = torch.full((1, 4096), 0.5)
    assert torch.allclose(Linear8bit(layer)(x.half()).float(), layer(x), rtol=1e-3)


class Conv1D(nn.Module):
    """As in transformers' GPT-2: W is stored as (in, out)."""

    def __init__(self, n_out: int, n_in: int):
        super().__init__()
        self.nf, self.weight = n_out, nn.Parameter(torch.randn(n_in, n_out))
        self.bias = nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_layer_comes_back_in_its_class_and_orientation(bits):
    model, x = nn.Sequential(Conv1D(6, 6), nn.Linear(6, 4)), torch.randn(3, 6)
    quantize_model(model, bits)
    expected, plain = model(x), [layer.plain() for layer in model]
    assert [type(layer) for layer in plain] == [Conv1D, nn.Linear]
    assert plain[0].nf == 6
    assert torch.allclose(nn.Sequential(*plain)(x), expected, atol=1e-5)
    assert list(plain[0].state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_options_of_a_4bit_layer_reach_its_quantizer(double_quant):
    torch.manual_seed(0)
    layer = nn.Linear(64, 6)
    options = {"blocksize": 16, "double_quant": double_quant}
    expected = quantize_nf4(layer.weight, 16, double_quant)
    model = quantize_model(nn.Sequential(layer), **options)
    assert torch.equal(model[0].weight, dequantize_nf4(expected))
    assert bits_per_weight(model) == expected.bits()


@pytest.mark.parametrize("double_quant", [False, True])
def test_padding_takes_no_memory(double_quant):
    q = quantize_nf4(torch.ones(3), double_quant=double_quant)
    for tensor in (q.codes, q.scales):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "the padding is kept"


def test_a_block_may_be_larger_than_a_chunk():
    w = torch.tensor([1.0, -1.0, 0.0])
    q = quantize_nf4(w, blocksize=2**18, double_quant=False)
    assert dequantize_nf4(q).tolist() == [1, -1, 0]


def test_a_4bit_layer_is_dequantized_on_its_own_device():
    layer = Linear4bit(nn.Linear(70, 30)).to("meta")
    assert layer.weight.device.type == "meta"
    assert layer(torch.ones(2, 70, device="meta")).device.type == "meta"


def test_the_gradient_with_a_compute_dtype_is_that_of_the_weight_in_it():
    torch.manual_seed(0)
    rough = Linear4bit(nn.Linear(70, 30), compute_dtype=torch.bfloat16)
    x = torch.randn(3, 70, requires_grad=True)
    rough(x).sum().backward()
    expected = torch.ones(3, 30).bfloat16() @ rough.dequantize(torch.bfloat16)
    assert torch.equal(x.grad, expected.float())


@pytest.mark.parametrize("kind", [Linear4bit, Linear8bit])
def test_a_float32_layer_takes_inputs_of_other_dtypes(kind):
    layer = kind(nn.Linear(6, 4))
    for dtype in (torch.bfloat16, torch.float64):
        assert layer(torch.ones(2, 6, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_with_two_names_is_quantized_under_both(bits):
    layer = nn.Linear(6, 6)
    model = quantize_model(nn.Sequential(layer, nn.Sequential(layer)), bits)
    assert model[0] is model[1][0], "the layer must stay shared"
    assert isinstance(model[0], (Linear4bit, Linear8bit))


# --- LoRA on 4-bit layers ---


def trained(gpt, ids) -> PeftModel:
    quantize_model(gpt)
    model = get_peft_model(gpt, LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"]))
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


def by_hand(**changes) -> QLoraLinear:
    """W = [[1, 0], [-1, 1]] is exact in NF4. b = [10, 20], B A = [[2, 0], [4, 4]], s = 3 / 2."""
    base = nn.Linear(2, 2)
    base.weight.data = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    base.bias.data = torch.tensor([10.0, 20.0])
    layer = QLoraLinear(Linear4bit(base), LoraConfig(**({"r": 2, "lora_alpha": 3} | changes)))
    layer.lora_A.weight.data = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    layer.lora_B.weight.data = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    return layer


def test_the_output_of_qlora_is_w4_x_plus_b_plus_s_b_a_x():
    layer, x = by_hand(), torch.tensor([[1.0, -2.0]], requires_grad=True)
    y = layer(x)  # W x + b = [11, 17], s B A x = 1.5 [2, -4]
    assert y.tolist() == [[14, 11]], "B A must be scaled by α / r"
    y.sum().backward()
    assert x.grad.tolist() == [[9, 7]], "the column sums of W' = [[4, 0], [5, 7]]"
    layer.eval().merge()
    assert layer.merged_weight.tolist() == [[4, 0], [5, 7]], "W' must be W₄ + s B A"
    assert layer.weight.tolist() == [[4, 0], [5, 7]]
    assert layer(x).tolist() == [[14, 11]], "a merged layer must compute W' x + b"
    assert "merged_weight" not in layer.state_dict(), "W' is computed: it is not saved"
    layer.unmerge()
    layer.lora_B.weight.data.zero_()
    assert layer(x).tolist() == [[11, 17]], "an unmerged layer must use W₄, A and B again"
    plain = merge_into_base(by_hand())
    assert type(plain) is nn.Linear
    assert plain.weight.tolist() == [[4, 0], [5, 7]]
    assert plain.bias.tolist() == [10, 20]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_output_has_the_inputs_dtype_although_the_adapter_is_float32(dtype):
    layer = QLoraLinear(Linear4bit(nn.Linear(8, 4).to(dtype)), LoraConfig(r=2))
    assert layer.lora_A.weight.dtype == torch.float32
    assert layer(torch.ones(3, 8, dtype=dtype)).dtype == dtype


def test_quantized_values_are_not_part_of_a_graph():
    weight = nn.Parameter(torch.randn(4, 64))
    for double_quant in (False, True):
        q = quantize_nf4(weight, double_quant=double_quant)
        tensors = [t for t in vars(q).values() if isinstance(t, torch.Tensor)]
        assert not any(t.requires_grad for t in (*tensors, dequantize_nf4(q)))


def test_what_is_lost_by_rounding_by_hand():
    """W' / 7 = [4/7, 0, 5/7, 1]: the nearest levels are 0.5626, 0, 0.7230 and 1. |s B A| = 9."""
    lost = 7 * math.hypot(4 / 7 - 0.5626170039176941, 5 / 7 - 0.7229568362236023) / 9
    assert by_hand().lost_by_rounding() == pytest.approx(lost, rel=1e-5)


@pytest.mark.parametrize("double_quant", [False, True])
def test_what_is_lost_by_rounding_depends_on_double_quantization(double_quant):
    torch.manual_seed(0)
    base = Linear4bit(nn.Linear(64, 8), double_quant=double_quant)
    layer = QLoraLinear(base, LoraConfig(r=2))
    nn.init.normal_(layer.lora_B.weight)
    update = 4 * layer.lora_B.weight @ layer.lora_A.weight
    w = base.weight + update
    lost = (dequantize_nf4(quantize_nf4(w, 64, double_quant)) - w).norm() / update.norm()
    assert layer.lost_by_rounding() == pytest.approx(lost.item(), rel=1e-4)


def test_dropout_of_qlora_acts_on_the_adapters_input_only():
    """W x + b = 3 stays. With p = 0.5, an entry of x is dropped or doubled: A x is 0, 2 or 4."""
    torch.manual_seed(0)
    base = nn.Linear(2, 1)
    base.weight.data, base.bias.data = torch.tensor([[1.0, -1.0]]), torch.tensor([3.0])
    layer = QLoraLinear(Linear4bit(base), LoraConfig(r=1, lora_alpha=1, lora_dropout=0.5))
    layer.lora_A.weight.data, layer.lora_B.weight.data = torch.ones(1, 2), torch.ones(1, 1)
    x = torch.ones(1, 2)
    found = {layer(x).item() for _ in range(50)}
    assert found == {3, 5, 7}, "dropout must act on the adapter's input only"
    assert {layer.eval()(x).item() for _ in range(50)} == {5}


def test_a_new_qlora_layer_has_a_random_a_and_a_zero_b():
    torch.manual_seed(0)
    layer = QLoraLinear(Linear4bit(nn.Linear(100, 50, bias=False)), LoraConfig(r=8))
    a, b = layer.lora_A.weight, layer.lora_B.weight
    assert (a.shape, b.shape) == ((8, 100), (50, 8))
    assert not b.any(), "B must start at zero: a new adapter must not change the output"
    assert 0.098 < a.max() <= 0.1, "A must be uniform between ±1 / √in, here ±0.1"
    assert layer.lora_A.bias is layer.lora_B.bias is layer.bias is None
    x = torch.randn(3, 100)
    y = layer.eval()(x)
    layer.merge()
    assert torch.allclose(layer(x), y, atol=1e-5), "a layer without a bias can be merged"
    for dtype in (torch.bfloat16, torch.float64):
        assert layer(x.to(dtype)).dtype == dtype


def test_qlora_and_quantized_layers_follow_their_base_to_another_device(gpt):
    quantize_model(gpt).to("meta")
    add_qlora(gpt, LoraConfig(r=2, target_modules="all-linear"))
    tensors = [*gpt.parameters(), *gpt.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_add_qlora_needs_a_quantized_model_and_says_how_to_get_one(gpt):
    with pytest.raises(
        ValueError, match=r"matches no 4-bit layer: check the names, and call quantize_model"
    ):
        add_qlora(gpt, LoraConfig(target_modules=["c_attn"]))
    assert all(p.requires_grad for p in gpt.parameters())


def test_add_qlora_freezes_what_is_not_quantized_and_ignores_8bit_layers(gpt):
    coarse = quantize_model(copy.deepcopy(gpt), 8)
    with pytest.raises(ValueError, match="matches no 4-bit layer"):
        add_qlora(coarse, LoraConfig(target_modules="all-linear"))
    add_qlora(quantize_model(gpt), LoraConfig(target_modules=["c_fc"]))
    trained = {name.split(".")[-2] for name, p in gpt.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}, "norms and embeddings must be frozen"


def test_a_new_adapter_equals_the_4bit_base_and_only_it_is_trained(gpt, ids):
    quantize_model(gpt)
    plain = gpt(ids).logits
    model = get_peft_model(gpt, LoraConfig(r=4, target_modules=["c_attn", "c_fc"]))
    assert torch.equal(model(ids).logits, plain)
    count = 2 * 4 * (24 + 72) + 2 * 4 * (24 + 96)
    assert model.get_nb_trainable_parameters()[0] == count
    model(ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())


def test_lora_on_a_4bit_model_is_qlora_and_adalora_is_refused(gpt, ids):
    """Writing a merged weight into a 4-bit layer would lose it without an error."""
    quantize_model(gpt)
    model = get_peft_model(gpt, LoraConfig(r=4, target_modules=["c_attn"]))
    assert all(isinstance(one, QLoraLinear) for one in model.adapters["default"].layers.values())
    for layer in model.adapters["default"].layers.values():
        nn.init.normal_(layer.lora_B.weight)
    logits = model.eval()(ids).logits
    assert torch.allclose(model.merge_and_unload()(ids).logits, logits, atol=1e-4)
    base = model.unload()
    message = r"c_attn is a Linear4bit, which .* cannot adapt: LoRA works on 4-bit layers"
    for config in (
        AdaLoraConfig(target_modules=["c_attn"], total_step=10),
        BottleneckConfig(target_modules=["c_attn"]),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, config)


@pytest.mark.parametrize("config", [LoraConfig, BottleneckConfig])
def test_no_weight_method_works_on_8bit_layers(gpt, config):
    quantize_model(gpt, 8)
    with pytest.raises(
        ValueError, match=r"is a Linear8bit, which .* cannot adapt: LoRA works on 4-bit"
    ):
        get_peft_model(gpt, config(target_modules=["c_attn"]))


def test_disabling_restores_the_4bit_base_and_merging_is_exact(gpt, ids):
    base = copy.deepcopy(gpt)
    quantize_model(base)
    model = trained(gpt, ids)
    before = model(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base(ids).logits)
    model.merge_adapter()
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    with pytest.raises(RuntimeError, match="this layer is merged: call unmerge"):
        model.train()(ids)
    model.eval().unmerge_adapter()
    assert torch.equal(model(ids).logits, before)
    plain = model.merge_and_unload()
    assert type(plain) is GPT
    assert not any(isinstance(m, Linear4bit) for m in plain.modules())
    assert torch.allclose(plain(ids).logits, before, atol=1e-5)
    assert torch.equal(model(ids).logits, before)


def test_quantizing_a_merged_weight_again_loses_much_of_the_update(gpt, ids):
    layers = trained(gpt, ids).adapters["default"].layers
    lost = [layer.lost_by_rounding() for layer in layers.values()]
    assert all(0.1 < share < 10 for share in lost)


def test_preparing_for_training_casts_and_checkpoints_without_changing_gradients(gpt, ids):
    quantize_model(gpt.bfloat16())
    config = LoraConfig(r=2, target_modules="all-linear")
    gradients = []
    for checkpointing in (False, True):
        base = prepare_model_for_kbit_training(copy.deepcopy(gpt), checkpointing)
        assert {p.dtype for p in base.parameters()} == {torch.float32}
        assert base.gradient_checkpointing == checkpointing
        torch.manual_seed(0)
        model = get_peft_model(base, config).train()
        model(ids, labels=ids).loss.backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_quantized_weights_are_counted_in_full_and_take_4_bits(gpt):
    plain = sum(p.numel() for p in gpt.parameters())
    assert bits_per_weight(gpt) is None
    quantize_model(gpt)
    assert 4.125 < bits_per_weight(gpt) < 4.2
    model = get_peft_model(gpt, LoraConfig(r=2, target_modules="all-linear"))
    trainable, total = model.get_nb_trainable_parameters()
    assert total == plain + trainable


def test_bits_per_weight_by_hand():
    """128 weights: 64 bytes of codes, 2 of scales, and 4 each of absmax₂ and the offset."""
    model = quantize_model(nn.Sequential(nn.Linear(64, 2)))
    assert bits_per_weight(model) == 8 * (64 + 2 + 4 + 4) / 128


def test_a_plain_layer_is_frozen_and_in_float32_or_wider():
    for dtype, wide in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        coarse = Linear4bit(nn.Linear(4, 3).to(dtype))
        plain = coarse.plain()
        assert {p.dtype for p in plain.parameters()} == {wide}
        assert not any(p.requires_grad for p in plain.parameters())
        assert torch.equal(plain.weight, coarse.dequantize(wide))
        assert torch.equal(plain.bias.to(dtype), coarse.bias)
        plain.bias.data.add_(1)
        assert not torch.equal(plain.bias.to(dtype), coarse.bias), "the bias must be a copy"
    assert Linear4bit(nn.Linear(4, 3, bias=False)).plain().bias is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_merged_qlora_layer_computes_in_the_dtype_of_its_input(dtype):
    layer = by_hand().eval()
    layer.merge()
    y = layer(torch.tensor([[1.0, -2.0]], dtype=dtype))
    assert y.dtype == dtype
    assert y.tolist() == [[14, 11]]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_are_frozen_and_have_the_mode_of_the_model(gpt, bits, mode):
    quantize_model(gpt.train(mode), bits)
    layers = quantized_layers(gpt)
    assert {layer.training for layer in layers.values()} == {mode}
    assert not any(layer.bias.requires_grad for layer in layers.values())
    if bits == 4:
        added = add_qlora(gpt, LoraConfig(target_modules=["c_fc"]))
        assert {m.training for layer in added.values() for m in layer.modules()} == {mode}


def test_a_model_with_lora_layers_is_not_quantized(gpt):
    add_lora(gpt, LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(ValueError, match="has an adapter: quantize it before adding one"):
        quantize_model(gpt)
    assert not quantized_layers(gpt)


def test_a_lora_trained_on_a_4bit_base_loads_on_full_and_4bit_bases(gpt, ids, tmp_path):
    full, base = copy.deepcopy(gpt), copy.deepcopy(gpt)
    quantize_model(base)
    model = trained(gpt, ids)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert again.peft_config["default"].peft_type == "LORA"
    assert torch.equal(again(ids).logits, model(ids).logits)
    on_full = PeftModel.from_pretrained(full, tmp_path)
    assert isinstance(on_full.peft_config["default"], LoraConfig)
    on_full.peft_config["default"].use_rslora = True
    on_full.save_pretrained(tmp_path / "rs")
    rslora = PeftModel.from_pretrained(again.unload(), tmp_path / "rs")
    layers = rslora.adapters["default"].layers.values()
    assert {layer.scaling for layer in layers} == {8 / math.sqrt(4)}


def test_a_model_with_an_adapter_cannot_be_quantized(gpt, ids):
    model = get_peft_model(gpt, LoraConfig(r=2, target_modules=["c_attn"]))
    before = model(ids).logits
    for adapted in (model, gpt):
        with pytest.raises(ValueError, match="has an adapter: quantize it before adding one"):
            quantize_model(adapted)
    assert not quantized_layers(gpt)
    assert torch.equal(model(ids).logits, before)
    assert quantized_layers(quantize_model(model.unload()))


def test_rslora_on_a_4bit_base_scales_by_the_root_of_the_rank(gpt, ids):
    quantize_model(gpt)
    config = LoraConfig(r=9, lora_alpha=6, use_rslora=True, target_modules=["c_attn"])
    model = get_peft_model(gpt, config).eval()
    layers = model.adapters["default"].layers
    assert all(isinstance(layer, QLoraLinear) for layer in layers.values())
    assert {layer.scaling for layer in layers.values()} == {6 / math.sqrt(9)}
    for layer in layers.values():
        nn.init.normal_(layer.lora_B.weight)
        update = 6 / 3 * layer.lora_B.weight @ layer.lora_A.weight
        assert torch.allclose(layer.delta(), update, atol=1e-6)
        x = torch.randn(3, 24)
        y = x @ (layer.base_layer.weight + update).T + layer.bias
        assert torch.allclose(layer(x), y, atol=1e-4)
    logits = model(ids).logits
    assert torch.allclose(model.merge_and_unload()(ids).logits, logits, atol=1e-4)


def test_add_qlora_trains_and_merges_on_a_plain_module():
    torch.manual_seed(0)
    x = torch.randn(32, 192)
    model = nn.Sequential(nn.Linear(192, 256), nn.Tanh(), nn.Linear(256, 64))
    quantize_model(model)
    plain = model(x)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    before = copy.deepcopy(vars(config))
    layers = add_qlora(model, config)
    assert vars(config) == before, "the config is the caller's"
    assert torch.equal(model(x), plain), "B must start at zero"
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 4 * (192 + 256) + 4 * (256 + 64)
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    trained = model.eval()(x)
    assert trained.square().mean() < plain.square().mean()
    for name, layer in layers.items():
        model.set_submodule(name, merge_into_base(layer))
    assert torch.allclose(model(x), trained, atol=1e-5)


def test_add_qlora_finds_targets_by_ending_by_regex_and_by_all_linear(gpt):
    quantize_model(gpt)

    def found(targets):
        return list(add_qlora(copy.deepcopy(gpt), LoraConfig(target_modules=targets)))

    assert found(["mlp.c_proj"]) == [f"transformer.h.{i}.mlp.c_proj" for i in range(2)]
    one = [f"transformer.h.1.attn.{n}" for n in ("c_attn", "c_proj")]
    assert found(r".*h\.1\.attn\.c_.*") == one
    assert len(found("all-linear")) == 8
    # a string is a regex for the whole name, and an ending starts after a dot
    for targets in ("c_attn", r"transformer\.h\.0\.attn\.c_at", ["proj"], ["ln_1"], [], None):
        with pytest.raises(ValueError, match="matches no 4-bit layer"):
            found(targets)
    add_qlora(gpt, LoraConfig(target_modules=["c_fc"]))
    with pytest.raises(ValueError, match="already has an adapter: remove it before adding another"):
        add_qlora(gpt, LoraConfig(target_modules=["c_attn"]))


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("then", [None, "prepare", "half", "norms"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_merged_4bit_model_has_the_dtype_of_what_was_not_quantized(
    gpt, ids, dtype, then, inplace
):
    """The references are the adapted model in float32, and the base's own classes."""
    classes = {name: type(module) for name, module in gpt.named_modules()}
    quantize_model(gpt.to(dtype))
    if then == "prepare":
        prepare_model_for_kbit_training(gpt, use_gradient_checkpointing=False)
    if then == "half":
        gpt.half()
    if then == "norms":  # as scripts do that cast norms by hand; float32 then wins
        for name, p in gpt.named_parameters():
            p.data = p.data.float() if "ln_" in name else p.data
    changed = {"prepare": torch.float32, "norms": torch.float32, "half": torch.float16}
    wide = changed.get(then, dtype)
    torch.manual_seed(0)
    model = get_peft_model(gpt, LoraConfig(r=4, target_modules=["c_attn", "c_fc"])).eval()
    for layer in model.adapters["default"].layers.values():
        nn.init.normal_(layer.lora_B.weight, std=0.2)
    exact = copy.deepcopy(model).float()(ids).logits
    merged = model.merge_and_unload(inplace=inplace).eval()
    assert {p.dtype for p in merged.parameters()} == {wide}
    assert {name: type(module) for name, module in merged.named_modules()} == classes
    assert merged.lm_head.weight is merged.transformer.wte.weight
    error = (merged(ids).logits.float() - exact).abs().max() / exact.abs().max()
    assert error < 20 * torch.finfo(wide).eps


def test_a_quantized_layer_follows_the_dtype_of_the_model(gpt):
    quantize_model(gpt)
    layer = gpt.transformer.h[0].attn.c_attn
    assert layer.weight.dtype == torch.float32
    assert gpt.half() is gpt
    assert layer.weight.dtype == torch.float16
    prepare_model_for_kbit_training(gpt)
    assert layer.weight.dtype == torch.float32


def test_preparing_leaves_no_hook_and_the_model_can_be_copied_and_pickled(gpt, ids):
    prepare_model_for_kbit_training(quantize_model(gpt))
    assert not any(module._forward_hooks for module in gpt.modules())
    again = pickle.loads(pickle.dumps(copy.deepcopy(gpt)))
    assert torch.equal(again(ids).logits, gpt(ids).logits)


def test_preparing_a_model_with_an_adapter_is_refused(gpt):
    """It would freeze the adapter, and nothing would be trained."""
    model = get_peft_model(quantize_model(gpt), LoraConfig(r=2, target_modules=["c_attn"]))
    for what in (model, model.base_model):
        with pytest.raises(ValueError, match="prepare the base before adding one"):
            prepare_model_for_kbit_training(what)
    assert any(p.requires_grad for p in model.parameters())


def test_a_base_whose_adapter_is_disabled_cannot_be_quantized(gpt):
    model = get_peft_model(gpt, LoraConfig(r=2, target_modules=["c_attn"]))
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="the model has an adapter: quantize it before"),
    ):
        quantize_model(gpt)
    assert quantized_layers(quantize_model(model.unload()))


def test_a_quantized_or_adapted_base_is_not_saved(gpt, tmp_path):
    """transformers' `save_pretrained` would write codes, or the adapter's layers, as weights."""

    class Saved(GPT):
        def save_pretrained(self, path):  # as transformers', without a check
            (tmp_path / "written").touch()

    base = Saved(gpt.config)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"]))
    refused = pytest.raises(ValueError, match="save the adapter with PeftModel")
    with refused:
        base.save_pretrained(tmp_path)
    with model.disable_adapter():
        base.save_pretrained(tmp_path)
    (tmp_path / "written").unlink()
    model.merge_and_unload().save_pretrained(tmp_path)
    (tmp_path / "written").unlink()
    quantize_model(model.unload())
    with refused:
        base.save_pretrained(tmp_path)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"]))
    with model.disable_adapter(), refused:
        base.save_pretrained(tmp_path)
    assert not (tmp_path / "written").exists()
    model.merge_and_unload(inplace=True).save_pretrained(tmp_path)
    assert (tmp_path / "written").exists()


def test_a_wider_layer_keeps_its_dtype_through_quantizing_and_merging(gpt, ids):
    """As transformers keeps some layers of T5 in float32."""
    gpt.bfloat16().transformer.h[0].mlp.c_proj.float()
    quantize_model(gpt)
    model = get_peft_model(gpt, LoraConfig(r=2, target_modules="all-linear")).eval()
    assert {layer.weight.dtype for layer in model.adapters["default"].layers.values()} == {
        torch.bfloat16, torch.float32,
    }  # fmt: skip
    merged = model.merge_and_unload()
    wide = {name for name, p in merged.named_parameters() if p.dtype == torch.float32}
    assert wide == {f"transformer.h.0.mlp.c_proj.{part}" for part in ("weight", "bias")}


def test_a_quantized_model_is_not_quantized_again(gpt):
    with pytest.raises(ValueError, match="the model is quantized already"):
        quantize_model(quantize_model(gpt), bits=8)


@pytest.mark.parametrize("dtype", ["bf16", torch.int8])
def test_a_compute_dtype_must_be_floating_point(gpt, dtype):
    with pytest.raises(ValueError, match="compute_dtype must be a floating-point dtype"):
        quantize_model(gpt, compute_dtype=dtype)
    assert not quantized_layers(gpt)
