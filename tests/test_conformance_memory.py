"""How far the computed activations are below what transformers and peft keep in bfloat16."""

import json

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from minipeft.lab import memory  # noqa: E402
from minipeft.lab.evaluate import activation_bytes  # noqa: E402

pytestmark = pytest.mark.conformance


@pytest.mark.parametrize(("method", "ratio"), [("full", 1.2), ("lora", 1.65)])
def test_the_computed_activations_are_a_lower_bound_for_a_llama_in_bfloat16(method, ratio):
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=4096,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16().train()
    if method == "lora":
        targets = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, targets)
    ids = torch.randint(4096, (4, 128))
    kept = activation_bytes(model, {"input_ids": ids, "labels": ids, "use_cache": False})
    shape = memory.Shape(4, 512, 8, 4096, mlp=1376, keys=512)
    computed = memory.activations(shape, method, 8, ids.numel(), checkpointing=False)
    assert kept / computed == pytest.approx(ratio, abs=0.04), "docstrings and README say this ratio"


@pytest.mark.parametrize(
    "family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma", "Gemma2"]
)
def test_the_parameters_of_a_family_are_counted_from_its_config(family, tmp_path):
    config = getattr(transformers, f"{family}Config")(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=4096, head_dim=64, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    settings.pop("tie_word_embeddings", None)  # files leave out what is the default
    file.write_text(json.dumps(settings))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for p in model.parameters())
    missed = 1e-3 if family in ("Gemma2", "Qwen3") else 0
    assert memory.read_shape(tmp_path).parameters == pytest.approx(counted, rel=missed)
