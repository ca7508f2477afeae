"""AdaLoRA and the prompt methods compute, train, and write files as peft does."""

import copy
import itertools
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_conformance import (  # noqa: F401
    ALL,
    close,
    near,
    side_by_side,
    theirs,
    three,
    train_step,
    trained,
)

import minipeft
from minipeft import GPT, GPTConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.conformance
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
TASK = {"task_type": "CAUSAL_LM"}
LSTM = {"encoder_reparameterization_type": "LSTM"}
SCHEDULE = {"init_r": 6, "target_r": 3, "tinit": 4, "tfinal": 5, "deltaT": 2, "total_step": 20}
METHODS = {
    "adalora": ("AdaLoraConfig", SCHEDULE | {"target_modules": ALL, "lora_alpha": 16}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 5}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 20}),
    "p_tuning_lstm": (
        "PromptEncoderConfig",
        {"num_virtual_tokens": 5, "encoder_hidden_size": 20} | LSTM,
    ),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 5}),
    "prefix_projection": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 20},
    ),
}


def configs(name):
    """peft's config and ours."""
    kind, settings = METHODS[name]
    return [getattr(package, kind)(**settings, **TASK) for package in (peft, minipeft)]


def run(model, ids):
    """The losses of 20 steps."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    losses = [train_step(model.train(), ids, optimizer, step)[0] for step in range(20)]
    model.eval()
    return losses


@torch.no_grad()
def logits(model, ids):
    """Those of the real tokens: for prompt and P-tuning peft returns the virtual ones as well."""
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return out.logits[:, -ids.shape[1] :]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_as_pefts_does(theirs, ids, tmp_path, name):  # noqa: F811
    """The same tensors put in at each of 20 AdamW steps: loss, logits and every gradient are
    peft's, to the bit on transformers' GPT-2."""
    models = three(theirs, *configs(name), tmp_path)
    for expected, on_theirs, on_ours in side_by_side(models, ids, lend=True):
        assert all(map(torch.equal, on_theirs, expected))
        assert all(map(near, on_ours, expected))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_goes_where_pefts_goes(theirs, ids, tmp_path, name):  # noqa: F811
    """From the same random numbers, with nothing copied on the way: bits on transformers' GPT-2,
    and in float64, where rounding cannot add up to much, on ours."""
    theirs_config, ours_config = configs(name)
    reference, on_theirs, _ = three(theirs, theirs_config, ours_config, tmp_path)
    losses = []
    for expected, found in side_by_side([reference, on_theirs], ids):
        assert all(map(torch.equal, found, expected))
        losses.append(expected[0])
    assert losses[-1] < losses[0]
    assert torch.equal(logits(on_theirs.eval(), ids), logits(reference.eval(), ids))
    reference, _, on_ours = three(theirs, *configs(name), tmp_path, torch.float64)
    for expected, found in side_by_side([reference, on_ours], ids):
        assert near(found[0], expected[0], 1e-6)  # both take it in float32
        assert all(near(a, b, 1e-11) for a, b in zip(found[1:], expected[1:], strict=True))
    if name == "adalora":
        pattern = {k.replace(".default", ""): v for k, v in theirs_config.rank_pattern.items()}
        assert on_theirs.peft_config["default"].rank_pattern == pattern
        assert on_ours.ranks() == on_theirs.ranks()
        assert sum(map(sum, pattern.values())) == 3 * len(pattern)


@pytest.mark.parametrize("name", METHODS)
def test_adapters_of_a_method_travel_both_ways(theirs, ids, tmp_path, name):  # noqa: F811
    theirs.save_pretrained(tmp_path / "base")
    mine = get_peft_model(GPT.from_pretrained(tmp_path / "base"), configs(name)[1]).train()
    run(mine, ids)
    mine.save_pretrained(tmp_path / "mine")
    reference = peft.PeftModel.from_pretrained(theirs, tmp_path / "mine").eval()
    assert close(logits(reference, ids), logits(mine, ids))
    reference.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(GPT.from_pretrained(tmp_path / "base"), tmp_path / "theirs")
    assert close(logits(again, ids), logits(mine, ids))
    plain = GPT.from_pretrained(tmp_path / "base")
    assert not close(plain(ids).logits, logits(mine, ids))


def test_an_adalora_folder_is_what_peft_itself_writes(theirs, ids, tmp_path):  # noqa: F811
    """The same tensors, cut to the same shapes, the same rank_pattern, and the same warnings.

    peft 0.21 warns about every AdaLoRA folder, its own too: it looks for modules that are named as
    the keys of `rank_pattern`, and those end in `.lora_E` (it then uses them all the same). When it
    saves a layer of rank 0, it warns of an "invalid shape". Neither says anything about the file.
    """
    *models, _ = three(theirs, *configs("adalora"), tmp_path / "base")
    told, warned, files, patterns = [], [], [], []
    for model in models:
        run(model, ids)
        model.save_pretrained(tmp_path)
        files.append(load_file(tmp_path / "adapter_model.safetensors"))
        patterns.append(json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path).eval()
        # our file leaves fan_in_fan_out to who reads it, and peft says that it sets it for Conv1D
        warned.append({str(w.message) for w in caught if "fan_in_fan_out" not in str(w.message)})
        told.append(logits(read, ids))
        assert close(told[-1], logits(model, ids))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert patterns[0] == patterns[1]
    assert warned[0] == warned[1]
    assert torch.equal(told[0], told[1])


@pytest.mark.parametrize(
    ("kind", "settings", "line"),
    [
        ("AdaLoraConfig", {"target_modules": ALL, "total_step": 100}, 1_770_048),
        (
            "PrefixTuningConfig",
            {},
            "trainable params: 368,640 || all params: 124,808,448 || trainable%: 0.2954",
        ),
        (
            "PrefixTuningConfig",
            {"prefix_projection": True},
            "trainable params: 14,780,160 || all params: 139,219,968 || trainable%: 10.6164",
        ),
        (
            "PromptEncoderConfig",
            {},
            "trainable params: 1,787,136 || all params: 126,226,944 || trainable%: 1.4158",
        ),
        (
            "PromptEncoderConfig",
            LSTM,
            "trainable params: 27,174,144 || all params: 151,613,952 || trainable%: 17.9232",
        ),
        (
            "PromptTuningConfig",
            {},
            "trainable params: 15,360 || all params: 124,455,168 || trainable%: 0.0123",
        ),
    ],
)
def test_counts_and_prints_as_peft_on_a_full_size_gpt2(capsys, kind, settings, line):
    if kind != "AdaLoraConfig":
        settings = settings | {"num_virtual_tokens": 20}
    with torch.device("meta"):
        model = get_peft_model(GPT(GPTConfig()), getattr(minipeft, kind)(**settings))
    if kind == "AdaLoraConfig":  # peft's "all" counts 48 rank counters
        assert model.get_nb_trainable_parameters()[0] == line
    else:
        model.print_trainable_parameters()
        assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_a_grouped_query_llama(ids, name, tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, **heads, bos_token_id=0, eos_token_id=0)
    ).eval()
    config = configs(name)[1]
    if name == "adalora":
        config.target_modules = ["q_proj", "v_proj", "down_proj"]
    plain = logits(llama, ids)
    model = get_peft_model(llama, config).train()
    losses = run(model, ids)
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)
    if "prefix" in name:
        assert model.prompt_encoder.shape == (2, 2, 6)
    mask = torch.tensor([[0, 0] + [1] * 8, [1] * 10, [0] + [1] * 9])
    new = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    alone = model.generate(ids[:1, 2:], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(new[0, 2:], alone[0])  # padding changes nothing
    full = torch.cat((ids[1:2], new[1:2, 10:]), dim=1)
    told = logits(model, full)[0, 9:13].argmax(-1)
    stop = (new[1, 10:] == 0).nonzero()
    n = int(stop[0]) + 1 if len(stop) else 4
    assert torch.equal(told[:n], new[1, 10 : 10 + n])  # the cache changes nothing
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama if name != "adalora" else model.unload(), tmp_path)
    assert close(logits(again, ids), logits(model if name != "adalora" else again, ids))


def test_a_prefix_on_a_model_that_drops_its_cache_is_refused(theirs, ids):  # noqa: F811
    model = get_peft_model(theirs, configs("prefix")[1]).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="drops its cache"):
        model(ids, labels=ids)


def test_the_allocator_goes_step_by_step_as_pefts_does(theirs):  # noqa: F811
    """Given the same gradients: scores, thresholds, masks and ranks, through a whole schedule."""
    torch.manual_seed(3)
    reference = peft.get_peft_model(copy.deepcopy(theirs), configs("adalora")[0])
    torch.manual_seed(3)
    mine = get_peft_model(copy.deepcopy(theirs), configs("adalora")[1])
    allocator = reference.base_model.rankallocator
    ours = mine.adapters["default"].allocator
    noise = torch.Generator().manual_seed(0)
    falling = []
    for step in range(21):
        for a, b in zip(trained(reference), trained(mine), strict=True):
            a.grad = torch.randn(a.shape, generator=noise)
            b.grad = a.grad.clone()
            change = 0.1 * torch.randn(a.shape, generator=noise)
            a.data += change
            b.data += change
        reference.base_model.update_and_allocate(step)
        mine.update_and_allocate(step)
        assert allocator.budget_schedule(step)[0] == ours.budget(step)
        for (name, layer), letter in itertools.product(ours.layers.items(), "AEB"):
            key = f"{name}.lora_{letter}.default"
            tensor = dict(reference.base_model.model.named_parameters())[key]
            assert torch.equal(tensor, getattr(layer, f"lora_{letter}"))
            if step < 15:  # afterwards peft has thrown these away
                assert torch.equal(allocator.exp_avg_ipt[key], ours.importance[name, letter])
                assert torch.equal(allocator.exp_avg_unc[key], ours.fluctuation[name, letter])
        pattern = reference.peft_config["default"].rank_pattern
        if pattern is not None:
            assert {k.replace(".default", ""): v for k, v in pattern.items()} == (
                mine.peft_config["default"].rank_pattern
            )
        falling.append(sum(ours.ranks().values()))
    assert falling[4] == 6 * 8
    assert falling[10] < falling[8]
    assert falling[-1] == 3 * 8
    assert len(set(ours.ranks().values())) > 1  # not every matrix is left with the same rank


ALONE = {  # what a student who copied one file would write
    "lora": "layers = lora.add_lora(m, lora.LoraConfig(r=2, target_modules='all-linear')); f = m",
    "adalora": "layers = adalora.add_adalora(m, adalora.AdaLoraConfig(init_r=2, target_r=1, "
    "total_step=9, target_modules='all-linear')); f = m",
    "prompt_tuning": "e = prompt_tuning.PromptEmbedding(prompt_tuning.PromptTuningConfig(3), m); "
    "f = lambda **x: e(m, **x)",
    "p_tuning": "e = p_tuning.PromptEncoder(p_tuning.PromptEncoderConfig(3), m); "
    "f = lambda **x: e(m, **x)",
    "prefix_tuning": "e = prefix_tuning.PrefixEncoder(prefix_tuning.PrefixTuningConfig(3), m); "
    "f = lambda **x: e(m, **x)",
}


@pytest.mark.parametrize("name", ALONE)
def test_a_file_alone_trains_transformers_gpt2_and_llama(name, tmp_path):
    house = Path(minipeft.__file__).parent
    shutil.copy(house / f"{name}.py", tmp_path)
    script = f"""
import sys, torch, transformers as t
sys.path.insert(0, ".")
import {name}
assert "minipeft" not in sys.modules
torch.manual_seed(0)
small = dict(vocab_size=61, bos_token_id=0, eos_token_id=0)
models = [
    t.GPT2LMHeadModel(t.GPT2Config(n_embd=24, n_layer=2, n_head=3, n_positions=32, **small)),
    t.LlamaForCausalLM(t.LlamaConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **small)),
]
ids = torch.randint(1, 61, (3, 10))
for m in models:
    m.eval().requires_grad_(False)
    {ALONE[name]}
    own = list(m.parameters()) + (list(e.parameters()) if "e" in globals() else [])
    own = [p for p in own if p.requires_grad]
    optimizer, losses = torch.optim.Adam(own, lr=0.05), []
    for _ in range(8):
        out = f(input_ids=ids, labels=ids)
        assert out.logits.shape == (3, 10, 61)
        out.loss.backward(); optimizer.step(); optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0], losses
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
