"""Tests that catch the faults of the second track, and tests that do not."""

HEAD = """import subject
import torch
import torch.nn.functional as F
from torch import nn


def layer(r=4, alpha=12.0):
    torch.manual_seed(0)
    made = subject.LoraLinear(nn.Linear(6, 5), subject.LoraConfig(r=r, lora_alpha=alpha))
    nn.init.normal_(made.lora_B.weight)
    return made.eval()


"""
CATCH = {
    "1": HEAD + """def test_scale():
    made, x = layer(), torch.randn(3, 6)
    update = 3 * x @ made.lora_A.weight.T @ made.lora_B.weight.T
    assert torch.allclose(made(x), made.base_layer(x) + update, atol=1e-5)
""",
    "2": HEAD + """def test_exact():
    made, x = layer(), torch.randn(3, 6)
    before, w = made(x), made.base_layer.weight.clone()
    for _ in range(20):
        made.merge()
        made.unmerge()
    assert torch.equal(made.base_layer.weight, w)
    assert torch.equal(made(x), before)
""",
    "3": HEAD + """def test_budget():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    config = subject.AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=2, total_step=12, target_modules="all-linear")
    allocator = subject.fit(model, config, torch.randn(16, 6), torch.randn(16, 6))
    left = sum(int((layer.lora_E != 0).sum()) for layer in allocator.layers.values())
    assert left <= 4
""",
    "4": HEAD + """from types import SimpleNamespace


def test_small_updates_survive():
    torch.manual_seed(0)
    model = subject.quantize_model(nn.Sequential(nn.Linear(64, 64)))
    config = SimpleNamespace(
        r=2, lora_alpha=2, lora_dropout=0.0, use_rslora=False, target_modules="all-linear")
    (made,) = subject.add_qlora(model, config).values()
    nn.init.normal_(made.lora_B.weight, std=1e-3)
    expected = made.base_layer.dequantize(torch.float32) + made.delta()
    assert torch.allclose(made.merged(), expected, atol=1e-7)
""",
    "5": HEAD + """def test_the_weight_has_the_update():
    made, x = layer(), torch.randn(3, 6)
    assert torch.allclose(F.linear(x, made.weight, made.bias), made(x), atol=1e-5)
""",
}  # fmt: skip
MISSED = {  # what does not count, and what the grader must say
    "an import error": ("import nothing\n", "cannot be imported"),
    "a test that always fails": (HEAD + "def test_no():\n    assert False\n", "fails on correct"),
    "a test that never fails": (HEAD + "def test_yes():\n    assert layer\n", "no test fails"),
    "a test of a detail": (
        HEAD + "def test_it():\n    assert layer().scaling == 3\n", "fails on correct file 2",
    ),
    "minipeft itself": ("import minipeft\n\ndef test_it():\n    pass\n", "blocked"),
    "another error": (
        HEAD + "def test_it():\n    x = torch.ones(3, 6)\n    made = layer()\n"
        "    update = made(x) - made.base_layer(x)\n"
        "    plain = x @ made.lora_A.weight.T @ made.lora_B.weight.T\n"
        "    if not torch.allclose(update, 3 * plain, atol=1e-5):\n        raise KeyError('s')\n",
        "not by an assertion",
    ),
}  # fmt: skip
