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


# --- the paged optimizer ---


def network(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(37, 53), nn.Tanh(), nn.Linear(53, 3)).to(dtype)


def steps(model, optimizer, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = model[0].weight.dtype
    for _ in range(n):
        x = torch.randn(16, 37, generator=generator).to(dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize(("page", "budget"), [(100, 300), (1024, 4096), (2**20, 2**24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_adamw_is_adamw_to_the_bit(dtype, page, budget, alternate):
    theirs, ours = network(dtype), network(dtype)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=False, fused=False)
    paged = PagedAdamW(
        ours.parameters(), lr=1e-2, page_bytes=page, device_budget_bytes=budget, alternate=alternate
    )
    steps(theirs, reference, 50)
    steps(ours, paged, 50)
    assert all(
        torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True)
    )
    a, b = reference.state_dict()["state"], paged.state_dict()["state"]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in a[i])


def test_the_counters_show_that_the_same_order_never_hits():
    def counters(frames: int, alternate: bool) -> dict:
        model, page = network(), 1024
        optimizer = PagedAdamW(
            model.parameters(),
            page_bytes=page,
            device_budget_bytes=frames * page,
            alternate=alternate,
        )
        assert len(optimizer.pages) == 17  # 2,176 parameters, 128 a page
        steps(model, optimizer, 10)
        return optimizer.counters

    assert counters(8, alternate=False) == {
        "hits": 0, "faults": 170, "evictions": 162, "bytes_in": 170 * 1024, "bytes_out": 162 * 1024
    }  # fmt: skip
    turning = counters(8, alternate=True)
    assert turning["hits"] == 9 * 8  # what stayed at the end of each step
    assert turning["hits"] + turning["faults"] == 170
    whole = counters(17, alternate=False)
    assert (whole["faults"], whole["evictions"]) == (17, 0)


def test_the_page_that_goes_is_the_one_used_longest_ago():
    optimizer = PagedAdamW(network().parameters(), page_bytes=1024, device_budget_bytes=2048)
    for index in (0, 1, 0, 2):
        optimizer.fetch(index)
    assert list(optimizer.resident) == [0, 2]
    assert (optimizer.counters["hits"], optimizer.counters["evictions"]) == (1, 1)


def test_a_loaded_state_takes_the_place_of_pages_that_are_on_the_device():
    model, other = network(), network()
    optimizer, used = (PagedAdamW(m.parameters(), page_bytes=1024) for m in (model, other))
    steps(model, optimizer, 3)
    steps(other, used, 5, seed=1)
    used.load_state_dict(optimizer.state_dict())
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(*(o.state_dict()["state"][0][name] for o in (optimizer, used)))


def test_state_goes_both_ways_and_groups_can_be_added():
    def pair(kind, **options):
        model = network()
        first, last = list(model[0].parameters()), list(model[2].parameters())
        optimizer = kind(first, lr=1e-2, **options)
        optimizer.add_param_group({"params": last, "lr": 3e-3, "weight_decay": 0.1})
        return model, optimizer

    adamw = {"foreach": False, "fused": False}
    paged = {"page_bytes": 512, "device_budget_bytes": 1024}
    theirs, reference = pair(torch.optim.AdamW, **adamw)
    ours, optimizer = pair(PagedAdamW, **paged)
    steps(theirs, reference, 5)
    steps(ours, optimizer, 5)
    kinds = ((torch.optim.AdamW, adamw, optimizer, ours), (PagedAdamW, paged, reference, theirs))
    results = []
    for kind, options, source, model in kinds:  # each goes on from the other's state
        new, resumed = pair(kind, **options)
        new.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(source.state_dict()))
        steps(new, resumed, 5, seed=1)
        results.append(new)
    steps(theirs, reference, 5, seed=1)
    for new in results:
        assert all(
            torch.equal(a, b) for a, b in zip(theirs.parameters(), new.parameters(), strict=True)
        )


def test_a_budget_below_one_page_and_a_state_of_another_shape_are_refused():
    model = network()
    with pytest.raises(ValueError, match="below one page"):
        PagedAdamW(model.parameters(), page_bytes=1024, device_budget_bytes=1023)
    with pytest.raises(ValueError, match="page_bytes is 8"):
        PagedAdamW(model.parameters(), page_bytes=8)
    optimizer = PagedAdamW(model.parameters())
    steps(model, optimizer, 1)
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"parameter 0 has the shape \(2, 2\)"):
        optimizer.load_state_dict(state)
