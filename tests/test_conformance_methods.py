"""AdaLoRA and the prompt methods match peft in training and in files, on the same weights."""

import copy
import itertools
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from test_conformance import (  # noqa: F401
    ALL,
    close,
    copy_trainable,
    near,
    theirs,
    three_models,
    train_side_by_side,
    train_step,
    trainable,
)
from test_copy_alone import PROMPT_METHODS, WEIGHT_METHODS, alone, train_alone  # noqa: F401

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
    """peft's config and ours of the same settings."""
    kind, settings = METHODS[name]
    return [getattr(package, kind)(**settings, **TASK) for package in (peft, minipeft)]


def train(model, ids):
    """Train for 20 steps; returns the losses."""
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    losses = [train_step(model.train(), ids, optimizer, step)[0] for step in range(20)]
    model.eval()
    return losses


@torch.no_grad()
def logits(model, ids):
    """The logits of the real tokens (peft also returns those of virtual tokens)."""
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return out.logits[:, -ids.shape[1] :]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_computes_pefts_loss_logits_and_gradients(theirs, ids, tmp_path, name):  # noqa: F811
    """The weights are synchronized before each of 20 AdamW steps.

    On transformers' GPT-2 the results are bit-identical.
    """
    models = three_models(theirs, *configs(name), tmp_path)
    for expected, on_theirs, on_ours in train_side_by_side(models, ids, synchronize=True):
        assert all(map(torch.equal, on_theirs, expected))
        assert all(map(near, on_ours, expected))


@pytest.mark.parametrize("name", METHODS)
def test_training_a_method_follows_peft_for_20_steps(theirs, ids, tmp_path, name):  # noqa: F811
    """Both start from the same weights, and nothing is synchronized afterwards.

    Bit-identical on transformers' GPT-2; on our GPT compared in float64, where rounding errors
    stay small.
    """
    theirs_config, ours_config = configs(name)
    reference, on_theirs, _ = three_models(theirs, theirs_config, ours_config, tmp_path)
    losses = []
    for expected, found in train_side_by_side([reference, on_theirs], ids):
        assert all(map(torch.equal, found, expected))
        losses.append(expected[0])
    assert losses[-1] < losses[0]
    assert torch.equal(logits(on_theirs.eval(), ids), logits(reference.eval(), ids))
    reference, _, on_ours = three_models(theirs, *configs(name), tmp_path, torch.float64)
    for expected, found in train_side_by_side([reference, on_ours], ids):
        assert near(found[0], expected[0], 1e-6)  # both compute the loss in float32
        assert all(near(a, b, 1e-11) for a, b in zip(found[1:], expected[1:], strict=True))
    if name == "adalora":
        pattern = {k.replace(".default", ""): v for k, v in theirs_config.rank_pattern.items()}
        assert on_theirs.peft_config["default"].rank_pattern == pattern
        assert on_ours.ranks() == on_theirs.ranks()
        assert sum(map(sum, pattern.values())) == 3 * len(pattern)


@pytest.mark.parametrize("name", METHODS)
def test_peft_loads_a_methods_folder_and_we_load_pefts(theirs, ids, tmp_path, name):  # noqa: F811
    theirs.save_pretrained(tmp_path / "base")
    mine = get_peft_model(GPT.from_pretrained(tmp_path / "base"), configs(name)[1]).train()
    train(mine, ids)
    mine.save_pretrained(tmp_path / "mine")
    reference = peft.PeftModel.from_pretrained(theirs, tmp_path / "mine").eval()
    assert close(logits(reference, ids), logits(mine, ids))
    reference.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(GPT.from_pretrained(tmp_path / "base"), tmp_path / "theirs")
    assert close(logits(again, ids), logits(mine, ids))
    plain = GPT.from_pretrained(tmp_path / "base")
    assert not close(plain(ids).logits, logits(mine, ids))


def test_an_adalora_folder_has_the_tensors_that_peft_writes(theirs, ids, tmp_path):  # noqa: F811
    """The same tensors, shapes and rank_pattern, and reading them gives the same warnings.

    peft 0.21 warns about every AdaLoRA folder, including its own: it looks for modules named like
    the keys of `rank_pattern`, which end in `.lora_E`, and then uses the keys anyway. When it saves
    a layer of rank 0, it warns of an "invalid shape". Both warnings are harmless.
    """
    *models, _ = three_models(theirs, *configs("adalora"), tmp_path / "base")
    outputs, warned, files, patterns = [], [], [], []
    for model in models:
        train(model, ids)
        model.save_pretrained(tmp_path)
        files.append(load_file(tmp_path / "adapter_model.safetensors"))
        patterns.append(json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path).eval()
        # our file has no fan_in_fan_out: peft sets it for Conv1D, and warns that it does
        warned.append({str(w.message) for w in caught if "fan_in_fan_out" not in str(w.message)})
        outputs.append(logits(read, ids))
        assert close(outputs[-1], logits(model, ids))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert patterns[0] == patterns[1]
    assert warned[0] == warned[1]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
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
def test_a_method_on_a_full_size_gpt2_prints_the_counts_that_peft_prints(
    capsys, kind, settings, expected
):
    if kind != "AdaLoraConfig":
        settings = settings | {"num_virtual_tokens": 20}
    with torch.device("meta"):
        model = get_peft_model(GPT(GPTConfig()), getattr(minipeft, kind)(**settings))
    if kind == "AdaLoraConfig":  # peft's total includes 48 rank counters
        assert model.get_nb_trainable_parameters()[0] == expected
    else:
        model.print_trainable_parameters()
        assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_generates_and_saves_on_a_grouped_query_llama(ids, name, tmp_path):
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
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)
    if "prefix" in name:
        assert model.prompt_encoder.shape == (2, 2, 6)
    mask = torch.tensor([[0, 0] + [1] * 8, [1] * 10, [0] + [1] * 9])
    new = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    unpadded = model.generate(ids[:1, 2:], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(new[0, 2:], unpadded[0])  # left padding does not change the result
    full = torch.cat((ids[1:2], new[1:2, 10:]), dim=1)
    expected = logits(model, full)[0, 9:13].argmax(-1)
    stop = (new[1, 10:] == 0).nonzero()
    n = int(stop[0]) + 1 if len(stop) else 4
    assert torch.equal(expected[:n], new[1, 10 : 10 + n])  # neither does the cache
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama if name != "adalora" else model.unload(), tmp_path)
    assert close(logits(again, ids), logits(model if name != "adalora" else again, ids))


def test_a_prefix_on_a_model_that_drops_its_cache_is_refused(theirs, ids):  # noqa: F811
    model = get_peft_model(theirs, configs("prefix")[1]).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="drops its cache"):
        model(ids, labels=ids)


def test_the_rank_allocator_makes_pefts_decisions_at_every_step(theirs):  # noqa: F811
    """Given the same gradients: importance, budget, masks and ranks over a whole schedule."""
    torch.manual_seed(3)
    reference = peft.get_peft_model(copy.deepcopy(theirs), configs("adalora")[0])
    mine = get_peft_model(copy.deepcopy(theirs), configs("adalora")[1])
    copy_trainable(reference, mine)
    allocator = reference.base_model.rankallocator
    ours = mine.adapters["default"].allocator
    noise = torch.Generator().manual_seed(0)
    ranks = []
    for step in range(21):
        for a, b in zip(trainable(reference), trainable(mine), strict=True):
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
            if step < 15:  # peft discards these afterwards
                assert torch.equal(allocator.exp_avg_ipt[key], ours.importance[name, letter])
                assert torch.equal(allocator.exp_avg_unc[key], ours.uncertainty[name, letter])
        pattern = reference.peft_config["default"].rank_pattern
        if pattern is not None:
            assert {k.replace(".default", ""): v for k, v in pattern.items()} == (
                mine.peft_config["default"].rank_pattern
            )
        ranks.append(sum(ours.ranks().values()))
    assert ranks[4] == 6 * 8
    assert ranks[10] < ranks[8]
    assert ranks[-1] == 3 * 8
    assert len(set(ours.ranks().values())) > 1  # ranks differ between matrices


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", [*WEIGHT_METHODS, *PROMPT_METHODS])
def test_a_file_alone_trains_transformers_gpt2_and_llama(ids, alone, name, family):  # noqa: F811
    torch.manual_seed(0)
    small = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        shape = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **small))
    else:
        shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        shape["attention_bias"] = name == "bitfit"  # a Llama has no biases otherwise
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **small))

    def loss(run):
        out = run(input_ids=ids, labels=ids)
        assert out.logits.shape == (3, 10, 61)
        return out.loss

    train_alone(alone(name), model.eval(), loss)


def test_bitfit_alone_refuses_a_llama_without_biases(alone):  # noqa: F811
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=61, num_attention_heads=4, **shape)
    model, bitfit = transformers.LlamaForCausalLM(config), alone("bitfit")
    with pytest.raises(ValueError, match="target_modules=None matches no layer with a bias"):
        bitfit.add_bitfit(model, bitfit.BitFitConfig())
    assert all(p.requires_grad for p in model.parameters())
