"""A GPU computes what the CPU computes, within the memory that QLoRA and its pager promise."""

import copy

import pytest
import torch
from torch import nn

from minipeft import (
    GPT,
    AdaLoraConfig,
    GPTConfig,
    LoraConfig,
    PagedAdamW,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
    quantize_model,
)
from minipeft.lab.finetune import finetune
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.lab.tasks import load_task
from minipeft.methods.qlora import Linear4bit, dequantize_nf4, quantize_nf4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
]
TASK = {"task_type": "CAUSAL_LM"}
CONFIGS = {
    "lora": lambda: LoraConfig(target_modules="all-linear", **TASK),
    "adalora": lambda: AdaLoraConfig(
        target_r=2, init_r=4, target_modules="all-linear", total_step=4, tinit=1, tfinal=1, **TASK
    ),
    "prompt_tuning": lambda: PromptTuningConfig(num_virtual_tokens=4, **TASK),
    "p_tuning": lambda: PromptEncoderConfig(num_virtual_tokens=4, **TASK),
    "prefix_tuning": lambda: PrefixTuningConfig(num_virtual_tokens=4, **TASK),
    "qlora": lambda: LoraConfig(target_modules="all-linear", **TASK),
}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantizing_on_a_gpu_gives_the_cpus_codes_scales_and_weights(dtype, double_quant):
    torch.manual_seed(0)
    for w in (torch.randn(512, 384), torch.randn(777) * 1e-3, torch.zeros(4, 64)):
        on_gpu = quantize_nf4(w.to("cuda", dtype), double_quant=double_quant)
        on_cpu = quantize_nf4(w.to(dtype), double_quant=double_quant)
        assert torch.equal(on_gpu.codes.cpu(), on_cpu.codes)
        if not double_quant:  # the mean of the scales is summed in another order
            assert torch.equal(on_gpu.scales.cpu(), on_cpu.scales)
            assert torch.equal(dequantize_nf4(on_gpu).cpu(), dequantize_nf4(on_cpu))
        assert torch.allclose(
            dequantize_nf4(on_gpu).float().cpu(),
            dequantize_nf4(on_cpu).float(),
            rtol=2e-2,
            atol=1e-6,
        )


@pytest.mark.parametrize("method", CONFIGS)
def test_training_on_a_gpu_gives_the_cpus_losses_and_tokens(gpt, ids, method):
    if method == "qlora":
        quantize_model(gpt)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(gpt), CONFIGS[method]()).to(device).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for step in range(1, 4):
            batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
            loss = model(**{name: t.to(device) for name, t in batch.items()})[0]
            loss.backward()
            optimizer.step()
            model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
        new = model.eval().generate(ids.to(device), max_new_tokens=8)
        results.append((losses, new.cpu()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("page", "budget"), [(2**12, 2**12), (2**12, 2**15), (2**16, 2**30)])
def test_paged_adamw_is_bit_identical_to_adamw_while_its_pages_move(page, budget, dtype):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 50))]
    models = [copy.deepcopy(models[0]).to("cuda", dtype) for _ in range(2)]
    paged = PagedAdamW(models[0].parameters(), 1e-2, page_bytes=page, device_budget_bytes=budget)
    plain = torch.optim.AdamW(models[1].parameters(), 1e-2, foreach=False, fused=False)
    assert all(p.host.is_pinned() for p in paged.pages)
    for _ in range(50):
        x = torch.randn(16, 200, device="cuda", dtype=dtype)
        for model, optimizer in zip(models, (paged, plain), strict=True):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)
    ours, theirs = paged.state_dict()["state"], plain.state_dict()["state"]
    for i, state in theirs.items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(ours[i][name], state[name].cpu())
    resident = {(t.device.type, t.nbytes) for t in paged.resident.values()}
    assert resident == {("cuda", page)}
    assert len(paged.resident) <= budget // page


def test_a_prepared_4bit_model_trains_in_less_memory_than_lora():
    config = GPTConfig(n_embd=1024, n_layer=8, n_head=16, vocab_size=2048, n_positions=256)
    peaks = {}
    for method in ("lora", "qlora"):
        before = torch.cuda.memory_allocated()
        model = GPT(config).bfloat16()
        if method == "qlora":
            quantize_model(model, compute_dtype=torch.bfloat16)
            prepare_model_for_kbit_training(model)
        model = get_peft_model(model, CONFIGS[method]()).to("cuda").train()
        at_rest = torch.cuda.memory_allocated() - before
        ids = torch.randint(2048, (4, 128), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            model(ids, labels=ids)[0].backward()
        peaks[method] = (at_rest, torch.cuda.max_memory_allocated() - before)
        del model
    assert peaks["qlora"][0] < 0.45 * peaks["lora"][0]
    assert peaks["qlora"][1] < 0.6 * peaks["lora"][1]


def test_a_4bit_layer_keeps_no_dequantized_weight_for_the_backward_pass():
    layer = Linear4bit(nn.Linear(4096, 4096, bias=False)).to("cuda")
    x = torch.randn(8, 4096, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    y = layer(x)
    assert torch.cuda.memory_allocated() - before < 2 * y.nbytes
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("method", [m for m in RECIPES if m != "frozen"])
def test_the_lab_trains_in_bfloat16_and_reports_the_peak_memory(base, method):
    task = load_task(base, "describe")
    run = RunConfig(steps=3, learning_rate=1e-3, n_generate=4, device="cuda", quiet=True)
    record = finetune(base, task, RECIPES[method], run)
    assert record.max_memory_allocated > record.weight_bytes
    if method != "full":
        assert record.forgetting["off"] == pytest.approx(record.forgetting["base"], abs=1e-6)
