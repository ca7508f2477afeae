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
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert memory.SHAPES[name].parameters == PARAMETERS[name]


@pytest.mark.parametrize("method", memory.METHODS)
def test_the_computed_memory_matches_one_measured_step(base, method):
    computed = memory.memory(memory.SHAPES["1m"], method, r=4, tokens=2 * 32)
    measured = memory.measure(base, method, 4, 2, 32)
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
    assert 48e9 < sum(rank_64.values()) < 50e9  # as the README says


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
    with pytest.raises(ValueError, match=r"there is no shape 'gpt5'; known shapes: 0\.3m"):
        memory.of(["gpt5"], ["full"], 8, 1, 16, True)
    with pytest.raises(
        ValueError, match="memory is computed for full, lora, qlora, not for 'prefix_tuning'"
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
    memory.of(["0.3m"], ["lora"], 8, 128, 128, True)
    with pytest.raises(ValueError, match="at most 16,384 tokens in a batch, got 16,512"):
        memory.of(["0.3m"], ["lora"], 8, 129, 128, True)


def test_the_figures_are_kept_if_they_cannot_be_drawn(tmp_path, monkeypatch):
    found, _ = memory.of(["gpt2"], ["lora"], 8, 1, 16, True)
    monkeypatch.setattr(memory.report, "memory_figure", lambda found: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        memory.save(found, {}, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "memory.json").read_text())["computed"] == found


def test_the_readme_shows_the_computed_table():
    shapes = ["gpt2-xl", "llama-2-7b", "llama-65b", "llama-2-70b"]
    found, _ = memory.of(shapes, list(memory.METHODS), 8, 1, 256, True)
    page = (DATA.parent / "README.md").read_text()
    assert memory.table(found) in page
