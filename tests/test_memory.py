"""The computed memory matches what tensors occupy, and what papers report."""

import json

import pytest

from minipeft.lab import DATA, memory

# counted by transformers for each config
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-65b": 65_285_660_672,
    "llama-2-70b": 68_976_648_192,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert memory.SHAPES[name].parameters == PARAMETERS[name]


@pytest.mark.parametrize("method", memory.MEASURED)
def test_the_computed_memory_matches_one_measured_step(base, method):
    r = 256 if method == "vera" else 4
    computed = memory.memory(memory.SHAPES["1m"], method, r=r, tokens=2 * 32)
    measured = memory.measure(base, method, r, 2, 32)
    assert computed["gradients"] == measured["gradients"]
    # one step counter per tensor; whole blocks of 256 scales, and their mean
    assert computed["optimizer"] == pytest.approx(measured["optimizer"], rel=2e-3)
    assert computed["weights"] == pytest.approx(measured["weights"], rel=1e-3)
    assert computed["activations"] == pytest.approx(measured["activations"], rel=0.02)


def test_fine_tuning_65_billion_parameters_takes_780_gb_and_qlora_fits_into_48():
    full = memory.memory(memory.SHAPES["llama-65b"], "full")
    qlora = memory.memory(memory.SHAPES["llama-65b"], "qlora", r=16)
    assert sum(full.values()) > 780e9
    assert sum(qlora.values()) < 48e9
    rank_64 = memory.memory(memory.SHAPES["llama-65b"], "qlora", r=64, tokens=256)
    assert 48e9 < sum(rank_64.values()) < 50e9  # as results/README.md says


@pytest.mark.parametrize(("method", "each"), [("full-8", 8), ("full", 12), ("full-16", 16)])
def test_full_fine_tuning_takes_8_12_or_16_bytes_per_parameter(method, each):
    parts = memory.memory(memory.SHAPES["llama-3.1-8b"], method)
    states = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert states == each * PARAMETERS["llama-3.1-8b"]
    assert (
        parts["activations"] == memory.memory(memory.SHAPES["llama-3.1-8b"], "full")["activations"]
    )
    ours = memory.memory(memory.SHAPES["1m"], "full")
    assert ours["weights"] + ours["gradients"] + ours["optimizer"] == 16 * 1_071_872


def test_embeddings_and_head_are_a_seventh_of_current_models():
    for name, share in (("llama-3.1-8b", 0.13), ("qwen2.5-7b", 0.14)):
        shape = memory.SHAPES[name]
        tables = 2 * shape.vocabulary * shape.width
        assert tables / shape.parameters == pytest.approx(share, abs=0.005)


CONFIGS = {  # by model type: sizes as in config.json, and the parameters that transformers counts
    "gpt2": ({"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
             124_439_808),
    "llama": ({"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
               "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256},
              8_030_261_248),
    "mistral": ({"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 32,
                 "head_dim": 128, "num_key_value_heads": 8, "intermediate_size": 14336,
                 "vocab_size": 131072}, 12_247_782_400),  # Mistral NeMo: narrow heads
    "qwen2": ({"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
               "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
               "tie_word_embeddings": True}, 494_032_768),  # Qwen2.5-0.5B, with a tied head
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_shape_is_read_from_a_config(kind, tmp_path):
    config, parameters = CONFIGS[kind]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | {"model_type": kind, "torch_dtype": "bfloat16"}))
    assert memory.read_shape(file).parameters == parameters
    found, _ = memory.of([str(tmp_path)], ["full-16", "lora"], 8, 1, 512, True)
    assert list(found[str(tmp_path)]) == ["full-16", "lora"]
    missing = next(iter(config))
    for changed in ({missing: None}, {missing: 0}, {missing: 10**7 + 1}, {missing: "768"}):
        file.write_text(json.dumps(config | {"model_type": kind} | changed))
        with pytest.raises(ValueError, match=f"config.json: {missing} must be an integer from 1"):
            memory.read_shape(file)
    file.write_text(json.dumps(config | {"model_type": "phi"}))
    known = "gpt2, llama, mistral, qwen2, qwen3, .*gemma"
    with pytest.raises(ValueError, match=f"model_type must be one of {known}.*, got 'phi'"):
        memory.read_shape(file)


def test_checkpointing_saves_most_activations_and_lora_hardly_any():
    shape = memory.SHAPES["gpt2-xl"]
    kept = {c: memory.memory(shape, "lora", checkpointing=c)["activations"] for c in (True, False)}
    assert kept[True] < 0.2 * kept[False]
    full = memory.memory(shape, "full", checkpointing=False)["activations"]
    assert 0.9 < kept[False] / full < 1.1


def test_memory_writes_a_figure_and_refuses_unknown_shapes_and_methods(tmp_path):
    found, measured = memory.of(["0.3m", "gpt2"], ["full", "qlora"], 8, 1, 16, True)
    memory.save(found, measured, tmp_path)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert memory.table(found).count("\n") == 5
    assert list(measured) == ["0.3m"]
    with pytest.raises(
        ValueError, match=r"there is no shape 'gpt5', and no such file; known shapes: 0\.3m"
    ):
        memory.of(["gpt5"], ["full"], 8, 1, 16, True)
    with pytest.raises(
        ValueError,
        match=r"memory is computed for full-8, .*, dora, pissa, vera, ia3, not for 'prefix_tuning'",
    ):
        memory.of(["gpt2"], ["prefix_tuning"], 8, 1, 16, True)


def test_a_context_and_a_measured_batch_have_limits(monkeypatch):
    monkeypatch.setattr(memory, "load_base", lambda folder: None)
    monkeypatch.setattr(memory, "measure", lambda *_: dict.fromkeys(memory.PARTS, 1))
    for shape, holds in (("gpt2", 1024), ("0.3m", 128)):
        memory.of([shape], ["lora"], 8, 1, holds, True)
        with pytest.raises(ValueError, match=f"the context of {shape} holds {holds} tokens, got "):
            memory.of([shape], ["lora"], 8, 1, holds + 1, True)
    memory.of(["llama-2-7b"], ["lora"], 8, 1024, 65_536, True)
    with pytest.raises(ValueError, match=r"0\.3m is trained in float32: choose from full, lora"):
        memory.of(["0.3m"], ["full-8"], 8, 1, 16, True)
    memory.of(["0.3m"], ["lora"], 8, 128, 128, True)
    with pytest.raises(ValueError, match="at most 16,384 tokens in a batch, got 16,512"):
        memory.of(["0.3m"], ["lora"], 8, 129, 128, True)


def test_the_figures_are_kept_if_they_cannot_be_drawn(tmp_path, monkeypatch):
    found, _ = memory.of(["gpt2"], ["lora"], 8, 1, 16, True)
    monkeypatch.setattr(memory.report, "memory_figure", lambda found: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        memory.save(found, {}, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "memory.json").read_text())["computed"] == found


def test_the_page_shows_the_computed_table():
    shapes = ["gpt2-xl", "qwen2.5-7b", "llama-3.1-8b", "llama-65b"]
    found, _ = memory.of(shapes, list(memory.METHODS), 8, 1, 512, True)
    page = (DATA / "results" / "README.md").read_text()
    assert memory.table(found) in page
