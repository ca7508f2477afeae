"""NF4, the 4-bit layer and QLoRA training match bitsandbytes and peft."""

import pytest
import torch
from torch import nn

from minipeft import (
    LoraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
    quantize_model,
)
from minipeft.methods.qlora import (
    DYNAMIC_MAP,
    NF4_CODEBOOK,
    Linear4bit,
    dequantize_nf4,
    quantize_nf4,
    quantized_layers,
)

pytestmark = pytest.mark.conformance
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")
F = pytest.importorskip("bitsandbytes.functional")

torch.manual_seed(0)
BLOCKS = {
    "normal": torch.randn(256, 128),
    "uniform": torch.rand(64, 64),
    "constant": torch.full((8, 64), 3.0),
    "zero": torch.zeros(4, 64),
    "denormal": torch.randn(8, 64) * 1e-40,
    "huge": torch.randn(8, 64) * 1e37,
    "bfloat16": torch.randn(64, 64).bfloat16(),
    "float16": torch.randn(64, 64).half(),
    "odd": torch.randn(777),
}


def bitsandbytes_layer(layer: nn.Module, double_quant: bool, dtype=torch.float32) -> nn.Module:
    w = layer.weight.detach()
    w = (w.t() if type(layer).__name__ == "Conv1D" else w).contiguous()
    theirs = bnb.nn.Linear4bit(
        w.shape[1], w.shape[0], bias=layer.bias is not None, compute_dtype=dtype,
        compress_statistics=double_quant, quant_type="nf4",
    )  # fmt: skip
    theirs.weight = bnb.nn.Params4bit(
        w.clone(), requires_grad=False, compress_statistics=double_quant, quant_type="nf4"
    ).to("cpu")
    if layer.bias is not None:
        theirs.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    theirs.support_avx512bf16_for_cpu = False  # else it computes in bfloat16 on some processors
    return theirs


def test_the_tables_of_levels_are_bitsandbytes():
    assert torch.equal(NF4_CODEBOOK, F.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(DYNAMIC_MAP, F.create_dynamic_map())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_codes_scales_and_dequantized_weights_are_bitsandbytes(kind, double_quant):
    w = BLOCKS[kind]
    ours = quantize_nf4(w, double_quant=double_quant)
    codes, state = F.quantize_4bit(
        w, blocksize=64, compress_statistics=double_quant, quant_type="nf4"
    )
    assert torch.equal(codes.view(-1), ours.codes)
    back, theirs = dequantize_nf4(ours), F.dequantize_4bit(codes, state)
    if not double_quant:
        assert torch.equal(state.absmax, ours.scales)
        assert torch.equal(back, theirs)
    elif kind not in (
        "constant",
        "zero",
        "denormal",
    ):  # otherwise all scales are equal, or almost 0
        assert torch.equal(state.offset, ours.offset)
        assert torch.equal(state.state2.absmax, ours.scale_scales)
        off = (state.absmax.int() - ours.scales.int()).abs()
        assert off.max() <= 1  # their CPU kernel looks codes up in a table of 65,536 bins
        assert (off > 0).float().mean() <= 0.01
    assert torch.allclose(back.float(), theirs.float(), rtol=1e-5, atol=1e-38)


def test_where_a_code_of_a_scale_differs_ours_is_at_least_as_near():
    torch.manual_seed(0)
    w = torch.randn(2**21)
    ours = quantize_nf4(w)
    _, state = F.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    absmax = quantize_nf4(w, double_quant=False).scales - ours.offset
    scale = ours.scale_scales.repeat_interleave(256)[: len(absmax)]
    error = [
        (DYNAMIC_MAP[codes.int()] * scale - absmax).abs() for codes in (ours.scales, state.absmax)
    ]
    differ = ours.scales != state.absmax
    assert 0 < differ.float().mean() < 0.01
    assert (error[0] <= error[1] + 1e-7).all()


def test_a_4bit_layers_output_and_input_gradient_are_bitsandbytes():
    torch.manual_seed(0)
    layer = nn.Linear(128, 192)
    ours = Linear4bit(layer, double_quant=False)
    theirs = bitsandbytes_layer(layer, double_quant=False)
    x = torch.randn(4, 7, 128)
    inputs, outputs = [], []
    for module in (ours, theirs):
        inputs.append(x.clone().requires_grad_())
        outputs.append(module(inputs[-1]))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=61, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=0,
            eos_token_id=0, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_five_training_steps_are_bit_identical_to_peft_on_bitsandbytes(
    ids, kind, double_quant, prepared, capsys
):
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    names = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
    theirs, ours = (tiny(kind).to(torch.bfloat16 if prepared else None) for _ in range(2))
    dtype = torch.bfloat16 if prepared else torch.float32
    quantize_model(ours, double_quant=double_quant, compute_dtype=dtype)
    for name, layer in quantized_layers(ours).items():
        their = bitsandbytes_layer(theirs.get_submodule(name), double_quant, dtype)
        theirs.set_submodule(name, their)
        if double_quant:  # a few codes of scales differ (see above): use theirs
            layer.scales.copy_(their.weight.quant_state.absmax)
    theirs.is_loaded_in_4bit = True
    if prepared:  # norms and head in float32, and gradient checkpointing
        theirs = peft.prepare_model_for_kbit_training(theirs)
        prepare_model_for_kbit_training(ours)
    torch.manual_seed(5)
    reference = peft.get_peft_model(theirs, peft.LoraConfig(**names)).train()
    torch.manual_seed(5)
    model = get_peft_model(ours, LoraConfig(**names)).train()
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (reference, model)]
    if prepared:  # peft rounds its A to the compute dtype
        for theirs, ours in zip(*trained, strict=True):
            ours.data.copy_(theirs.data)
    results = []
    for m, parameters in zip((reference, model), trained, strict=True):
        optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
        for _ in range(5):
            loss = m(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        results.append([*losses, *parameters])
    assert results[0][4] < results[0][0]
    capsys.readouterr()
    for m in (reference, model):
        m.print_trainable_parameters()
    assert len(set(capsys.readouterr().out.splitlines())) == 1
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
