"""The GPT: logits, masks, cache, generation, and reading and writing its files."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from torch import nn

from minipeft import GPT, GPTConfig


def test_parameter_count_matches_the_formula(gpt):
    d, n, v, p = 24, 2, 61, 32
    assert (
        sum(w.numel() for w in gpt.parameters())
        == v * d + p * d + n * (12 * d * d + 13 * d) + 2 * d
    )


def test_later_tokens_do_not_change_earlier_logits(gpt, ids):
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 61
    a, b = gpt(ids).logits, gpt(changed).logits
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:])


def test_the_cache_does_not_change_the_logits(gpt, ids):
    gpt.double()
    whole = gpt(ids).logits
    first = gpt(ids[:, :4], use_cache=True)
    rest = gpt(ids[:, 4:], past_key_values=first.past_key_values).logits
    assert torch.allclose(rest, whole[:, 4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_logits(gpt, ids, side):
    gpt.double()
    pad = torch.zeros(3, 4, dtype=torch.long)
    parts = (pad, ids) if side == "left" else (ids, pad)
    mask = torch.cat([(part != 0).long() for part in parts], dim=1)
    real = slice(4, None) if side == "left" else slice(0, 10)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = gpt(torch.cat(parts, dim=1), mask, position_ids=positions).logits[:, real]
    assert torch.allclose(padded, gpt(ids).logits, rtol=0, atol=1e-12)


def test_every_token_attends_to_all_cached_keys(gpt, ids):
    """With p cached keys, even the first new token must depend on the last of them."""
    cache = gpt(ids[:, :3], use_cache=True).past_key_values
    changed = tuple((k.clone(), v.clone()) for k, v in cache)
    changed[0][1][:, :, 2] += 1
    a = gpt(ids[:, 3:], past_key_values=cache).logits
    b = gpt(ids[:, 3:], past_key_values=changed).logits
    assert not torch.allclose(a[:, 0], b[:, 0])


def test_labels_are_shifted_and_minus_100_is_ignored(gpt, ids):
    labels = ids.clone()
    labels[:, :5] = -100
    loss, logits = gpt(ids, labels=labels).values()
    expected = -logits.log_softmax(-1)[:, 4:-1].gather(-1, ids[:, 5:, None]).mean()
    assert torch.allclose(loss, expected)


def test_embeddings_give_the_same_logits_as_their_tokens(gpt, ids):
    embeds = gpt.get_input_embeddings()(ids)
    assert torch.equal(gpt(inputs_embeds=embeds).logits, gpt(ids).logits)


def test_greedy_generation_picks_the_argmax_at_each_step(gpt, ids):
    out = gpt.generate(ids, max_new_tokens=6)
    for i in range(10, out.shape[1]):
        assert torch.equal(gpt(out[:, :i]).logits[:, -1].argmax(-1), out[:, i]) or (out == 0).any()


def test_left_padded_prompts_generate_the_same_tokens_as_unpadded_ones(gpt, ids):
    gpt.config.eos_token_id = None
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids[1:2, :7]), dim=1)
    both = torch.cat((ids[:1], padded))
    mask = torch.ones_like(both)
    mask[1, :3] = 0
    out = gpt.double().generate(both, mask, max_new_tokens=8)
    assert torch.equal(out[:1], gpt.generate(ids[:1], max_new_tokens=8))
    assert torch.equal(out[1:, 3:], gpt.generate(ids[1:2, :7], max_new_tokens=8))


def test_a_finished_row_is_filled_with_the_end_token(gpt, ids):
    stop = int(gpt.generate(ids, max_new_tokens=3)[0, 11])
    out = gpt.generate(ids, max_new_tokens=12, eos_token_id=stop)
    for row in out[:, 10:]:
        where = (row == stop).nonzero()
        assert len(where) == 0 or (row[where[0] :] == stop).all()
    assert stop in out[0, 10:12]


def test_sampling_is_reproducible_and_respects_top_k(gpt, ids):
    def sample(seed, top_k):
        generator = torch.Generator().manual_seed(seed)
        return gpt.generate(
            ids, max_new_tokens=8, do_sample=True, temperature=2.0, top_k=top_k, generator=generator
        )

    assert torch.equal(sample(0, 20), sample(0, 20))
    assert not torch.equal(sample(0, 20), sample(1, 20))
    assert torch.equal(sample(0, 1), gpt.generate(ids, max_new_tokens=8))


def test_top_k_is_no_smaller_for_a_single_prompt(gpt, ids):
    with torch.no_grad():
        likely = set(gpt(ids[:1]).logits[0, -1].topk(3).indices.tolist())
    drawn = torch.cat(
        [gpt.generate(ids[:1], max_new_tokens=1, do_sample=True, temperature=9.0, top_k=3)
         for _ in range(60)]
    )  # fmt: skip
    assert set(drawn[:, -1].tolist()) == likely


def test_layers_that_end_in_a_residual_sum_start_smaller():
    """Their standard deviation is divided by √(2 layers)."""
    model = GPT(GPTConfig(vocab_size=500, n_positions=16, n_embd=64, n_layer=8, n_head=2))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.1), name


def test_saving_and_loading_gives_identical_logits(gpt, ids, tmp_path):
    gpt.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, gpt(ids).logits)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_damaged_folders_raise_clear_errors(gpt, tmp_path):
    gpt.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, described = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        GPT.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    for change, message in [
        ({"n_embd": 48}, r"c_attn.bias is \(72,\) of torch.float32, not \(144,\)"),
        ({"n_layer": 3}, "3 layers, but there are only 28 tensors"),
        ({"n_layer": 1}, "transformer.h.1.attn.c_attn.bias has no place in this model"),
        ({"model_type": "llama"}, "model_type must be 'gpt2', got 'llama'"),
        ({"activation_function": "relu"}, "activation_function must be 'gelu_new', got 'relu'"),
        ({"n_head": 5}, "n_head must divide n_embd, got 5 and 24"),
        ({"n_head": 2}, r"model.safetensors was written with other settings than .* config.json"),
        ({"layer_norm_epsilon": 0.1}, "was written with other settings"),
        ({"n_layer": "2"}, "n_layer must be of type int, got '2'"),
        ({"n_layer": 10**9}, "1000000000 layers, but there are only 28 tensors"),
        ({"scale_attn_weights": 1}, "scale_attn_weights must be True, got 1"),
    ]:
        config.write_text(json.dumps(described | change))
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is neither a local folder nor a model on the Hugging"):
        GPT.from_pretrained(tmp_path / "nowhere")


def test_bad_input_raises_clear_errors(gpt, ids):
    with pytest.raises(ValueError, match="and not both"):
        gpt()
    with pytest.raises(ValueError, match="the context holds 32"):
        gpt(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 10\), got \(3, 9\)"):
        gpt(ids, attention_mask=torch.ones(3, 9))
    with pytest.raises(ValueError, match="pad prompts on the left"):
        gpt.generate(ids, torch.tensor([[1] * 9 + [0]] * 3))
    with pytest.raises(ValueError, match="10 tokens and 23 new tokens exceed the context of 32"):
        gpt.generate(ids, max_new_tokens=23)
    with pytest.raises(ValueError, match="temperature and top_k must be positive, got 0"):
        gpt.generate(ids, do_sample=True, temperature=0)
    with pytest.raises(ValueError, match=r"must be positive, got 1\.0, 0"):
        gpt.generate(ids, do_sample=True, top_k=0)
    with pytest.raises(ValueError, match="the prompt is empty"):
        gpt.generate(ids[:, :0])
    with pytest.raises(ValueError, match=r"attn_pdrop must be in \[0, 1\), got 1"):
        GPTConfig(attn_pdrop=1)
    with pytest.raises(ValueError, match="n_layer must be a positive integer, got 0"):
        GPTConfig(n_layer=0)
    assert tiny_config().n_embd == 24


def test_an_untrained_model_is_near_the_uniform_loss(ids):
    torch.manual_seed(0)
    loss, logits = GPT(tiny_config(initializer_range=0.02))(ids, labels=ids).values()
    assert logits.shape == (3, 10, 61)
    assert abs(loss.item() - math.log(61)) < 0.5


def test_name_or_path_is_where_the_model_was_loaded_from(gpt, tmp_path):
    assert gpt.name_or_path is None
    gpt.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).name_or_path == str(tmp_path)


def test_a_loaded_model_is_float32_trainable_and_in_eval_mode(gpt, tmp_path):
    gpt.half().train().save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert not loaded.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())


def test_dropout_of_each_block_acts_before_its_residual_sums_and_only_in_training(ids):
    """If it drops everything, a block returns its input."""
    model, states = GPT(tiny_config()), []
    for block in model.transformer.h:
        for module in block.modules():
            if isinstance(module, nn.Dropout):
                module.p = 1.0
        block.register_forward_hook(lambda module, inputs, out: states.append((inputs[0], out[0])))
    model.train()(ids)
    for before, after in states:
        assert torch.equal(before, after), "attention and MLP must both end in resid_dropout"
    states.clear()
    model.eval()(ids)
    assert not any(torch.equal(before, after) for before, after in states)


def test_gradient_checkpointing_recomputes_each_block_and_can_be_disabled(gpt, ids):
    calls = []
    for block in gpt.train().transformer.h:
        block.register_forward_pre_hook(lambda *_: calls.append(1))

    def forward_and_backward() -> int:
        calls.clear()
        gpt(ids, labels=ids).loss.backward()
        return len(calls)

    assert forward_and_backward() == 2
    gpt.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert forward_and_backward() == 4
    gpt.gradient_checkpointing_disable()
    assert forward_and_backward() == 2


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int64, "I64"), (torch.bool, "BOOL"), (torch.complex64, "C64")]
)
def test_a_tensor_that_is_not_floating_point_is_refused(gpt, tmp_path, dtype, name, monkeypatch):
    gpt.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.ln_f.weight"] = torch.ones(24, dtype=dtype)
    save_file(tensors, file)
    monkeypatch.setattr(GPT, "__init__", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match=rf"ln_f.weight has dtype {name}, expected F64"):
        GPT.from_pretrained(tmp_path)


class Wrapped(nn.Module):
    """A layer with other parameter names, as adapters and quantized layers have."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer


@pytest.mark.parametrize("replace", [Wrapped, lambda layer: nn.Linear(24, 95)])
def test_save_pretrained_refuses_layers_that_are_not_plain(gpt, tmp_path, replace):
    gpt.transformer.h[1].mlp.c_fc = replace(gpt.transformer.h[1].mlp.c_fc)
    with pytest.raises(ValueError, match=r"quantized or adapted layers; call merge_and_unload\(\)"):
        gpt.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_split_into_several_files_is_loaded(gpt, ids, tmp_path):
    gpt.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    index = tmp_path / "model.safetensors.index.json"
    names = sorted(tensors)
    weight_map = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(names)}
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({n: tensors[n] for n in names if weight_map[n] == shard}, tmp_path / shard)
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(GPT.from_pretrained(tmp_path)(ids).logits, gpt(ids).logits)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not JSON: "):
        GPT.from_pretrained(tmp_path)
    folder = tmp_path / "inner"
    gpt.save_pretrained(folder)
    outside = dict.fromkeys(names, "../a.safetensors")
    (folder / index.name).write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(ValueError, match=r"'../a.safetensors' is not the name of a weights"):
        GPT.from_pretrained(folder)


def test_a_head_that_is_not_tied_to_the_embedding_is_refused(gpt, tmp_path):
    gpt.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.ones(61, 24)}, file)
    with pytest.raises(ValueError, match="an lm_head that differs from wte is not supported"):
        GPT.from_pretrained(tmp_path)


def test_a_config_with_a_billion_layers_is_refused_at_once(gpt, tmp_path):
    gpt.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"n_layer": 2', '"n_layer": 1000000000'))
    with pytest.raises(ValueError, match="1000000000 layers, but there are only"):
        GPT.from_pretrained(tmp_path)


# --- what transformers' Trainer expects of a model ---


def test_the_output_is_a_dictionary_without_none(gpt, ids):
    """The Trainer takes tuples and dictionaries apart, and cannot handle a None in them."""
    out = gpt(ids)
    assert list(out) == ["logits"]
    assert out[0] is out.logits is out["logits"]
    assert out.loss is None
    assert out.past_key_values is None
    out = gpt(ids, labels=ids, use_cache=True)
    assert list(out) == ["loss", "logits", "past_key_values"]
    assert out[:2] == (out.loss, out.logits)
    with pytest.raises(AttributeError, match="hidden_states"):
        _ = out.hidden_states
    with torch.no_grad():
        again = pickle.loads(pickle.dumps(copy.deepcopy(gpt(ids))))
        assert torch.equal(again.logits, gpt(ids).logits)


def test_the_loss_of_several_batches_adds_up_to_that_of_all(gpt, ids):
    labels = ids.clone()
    labels[0, 3:] = -100
    n = int((labels[:, 1:] != -100).sum())
    parts = [
        gpt(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=n).loss for i in range(3)
    ]
    assert torch.allclose(sum(parts), gpt(ids, labels=labels).loss)


def test_checkpointing_takes_the_arguments_of_transformers(gpt):
    for enable in (
        lambda: gpt.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"a": 1}),
        lambda: gpt.activation_checkpointing_enable(None, every_n_layers=1, offload=False),
    ):
        enable()
        assert gpt.gradient_checkpointing
        gpt.gradient_checkpointing_disable()
    with pytest.raises(ValueError, match="not implemented: every_n_layers=2, offload=False"):
        gpt.activation_checkpointing_enable(every_n_layers=2)
    assert not gpt.gradient_checkpointing


def test_the_input_can_require_a_gradient(gpt, ids):
    gpt.requires_grad_(False)
    for _ in range(2):  # hooks do not pile up
        gpt.enable_input_require_grads()
    assert len(gpt.transformer.wte._forward_hooks) == 1
    assert gpt(ids).logits.requires_grad
    gpt.disable_input_require_grads()
    assert not gpt(ids).logits.requires_grad


# --- settings, by hand ---


def test_the_default_settings_are_those_of_the_smallest_gpt2():
    assert dataclasses.asdict(GPTConfig()) == {
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "n_inner": None, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "bos_token_id": 50256,
        "eos_token_id": 50256, "pad_token_id": None,
    }  # fmt: skip
    assert GPT.accepts_loss_kwargs, "transformers' Trainer must pass num_items_in_batch"
    assert GPT.loss_type == "ForCausalLM"
    assert GPT(tiny_config())._get_name() == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    ("names", "good", "bad"),
    [
        (["vocab_size", "n_positions", "n_embd", "n_layer"], [1, 7], [0, -1, True, 2.0, None]),
        (["n_head"], [1, 3, 24], [0, -1, True, 2.0, None, 5]),
        (["n_inner"], [None, 1, 7], [0, -1, True, 2.0]),
        (["embd_pdrop", "attn_pdrop", "resid_pdrop"], [0, 0.9], [-0.1, 1, math.nan]),
        (["layer_norm_epsilon", "initializer_range"], [1e-9, 2], [0, -1.0, math.inf, math.nan]),
    ],
)
def test_every_setting_has_bounds(names, good, bad):
    for name in names:
        heads = {} if name == "n_head" else {"n_head": 1}
        for value in good:
            assert getattr(tiny_config(**(heads | {name: value})), name) == value
        for value in bad:
            with pytest.raises(ValueError, match=f"{name} must"):
                tiny_config(**(heads | {name: value}))


def by_hand(model: GPT, ids: torch.Tensor, eps: float) -> torch.Tensor:
    """The logits of GPT-2, from the tensors of the model alone."""
    w = {name.removeprefix("transformer."): p for name, p in model.state_dict().items()}

    def norm(x, name):
        x, variance = x - x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return x / (variance + eps) ** 0.5 * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["wte.weight"][ids] + w["wpe.weight"][: ids.shape[1]]
    future = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    for i in range(2):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(24, dim=-1)
        heads = []
        for part in (slice(0, 8), slice(8, 16), slice(16, 24)):
            scores = q[..., part] @ k[..., part].mT / 8**0.5
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(heads, dim=-1), f"h.{i}.attn.c_proj")
        y = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        y = y / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3)))
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def test_the_logits_are_those_of_gpt2_by_hand(ids):
    model = GPT(tiny_config(n_inner=10, layer_norm_epsilon=0.3)).double()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (10, 24)
    assert torch.allclose(model(ids).logits, by_hand(model, ids, 0.3), rtol=0, atol=1e-12)


def test_biases_start_at_zero_and_norms_as_the_identity(gpt):
    for name, p in gpt.named_parameters():
        if p.dim() == 1:
            start = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            assert (p == start).all(), name


@pytest.mark.parametrize("name", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_acts_in_training_only(ids, name):
    torch.manual_seed(0)
    model = GPT(tiny_config(**{name: 0.5}))
    plain = GPT(tiny_config())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(ids).logits, plain(ids).logits), "no dropout in eval mode"
    assert not torch.allclose(model.train()(ids).logits, model(ids).logits, atol=1e-3)


# --- half precision and gradients ---


def test_the_loss_of_a_bfloat16_model_is_computed_in_float32(gpt, ids):
    loss, logits = gpt.bfloat16()(ids, labels=ids).values()
    expected = nn.functional.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:])
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_cache_of_another_precision_takes_that_of_the_model(gpt, ids):
    first = gpt(ids[:, :4], use_cache=True)
    out = gpt.bfloat16()(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    assert {t.dtype for pair in out.past_key_values for t in pair} == {torch.bfloat16}


def test_blocks_are_recomputed_only_in_training_and_with_gradients(gpt, ids):
    calls = []
    gpt.gradient_checkpointing_enable()
    gpt.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gpt.eval()(ids, labels=ids).loss.backward()
    assert len(calls) == 1, "nothing is recomputed in eval mode"
    with torch.no_grad():
        out = gpt.train()(ids)
    assert torch.equal(out.logits, gpt.eval()(ids).logits)
    with pytest.raises(ValueError, match="not implemented: every_n_layers=1, offload=True"):
        gpt.activation_checkpointing_enable(offload=True)


# --- generation ---


def test_generation_is_in_eval_mode_without_gradients_and_restores_the_mode(ids):
    torch.manual_seed(0)
    model, modes = GPT(tiny_config(resid_pdrop=0.5, eos_token_id=None)), []
    expected = model.eval().generate(ids, max_new_tokens=3)
    model.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    assert torch.equal(model.train().generate(ids, max_new_tokens=3), expected)
    assert model.training
    assert not model.eval().generate(ids, max_new_tokens=3).requires_grad
    assert not model.training
    assert modes == [False] * 6


def test_generate_writes_20_tokens_greedily_and_samples_at_temperature_1(gpt, ids):
    gpt.config.eos_token_id = None
    assert gpt.generate(ids).shape == (3, 10 + 20)
    assert torch.equal(gpt.generate(ids), gpt.generate(ids, max_new_tokens=22)[:, :30])
    assert torch.equal(gpt.generate(ids, temperature=0, top_k=0), gpt.generate(ids)), "not used"

    def sample(**settings):
        generator = torch.Generator().manual_seed(0)
        options = {"max_new_tokens": 5, "do_sample": True, "generator": generator}
        return gpt.generate(ids, **options, **settings)

    assert torch.equal(sample(), sample(temperature=1.0))
    assert not torch.equal(sample(), sample(temperature=2.0))
    assert not torch.equal(sample(), sample(temperature=0.5))
    assert torch.equal(sample(), sample(top_k=62)), "top_k may exceed the vocabulary"


def test_generation_stops_when_all_rows_are_done_and_not_before(gpt, ids):
    stop = int(gpt.generate(ids[:1], max_new_tokens=1)[0, 10])
    assert gpt.generate(ids[:1], max_new_tokens=9, eos_token_id=stop).shape == (1, 11)
    gpt.config.eos_token_id = stop  # the default
    assert gpt.generate(ids[:1], max_new_tokens=9).shape == (1, 11)
    free = gpt.generate(ids, max_new_tokens=9, eos_token_id=60)
    other = next(i for i in range(1, 3) if stop not in free[i, 10:])
    assert gpt.generate(ids[[0, other]], max_new_tokens=9).shape == (2, 19)


def test_tokens_and_cache_may_fill_the_context_but_not_exceed_it(gpt):
    ids = torch.ones(1, 32, dtype=torch.long)
    assert gpt(ids).logits.shape == (1, 32, 61)
    cache = gpt(ids[:, :30], use_cache=True).past_key_values
    assert gpt(ids[:, :2], past_key_values=cache).logits.shape == (1, 2, 61)
    with pytest.raises(ValueError, match="got 33 tokens, but the context holds 32"):
        gpt(ids[:, :3], past_key_values=cache)


def test_the_default_device_makes_no_difference(gpt, ids):
    expected = gpt.eval()(ids).logits
    with torch.device("meta"):
        assert torch.equal(gpt(ids).logits, expected)


def test_everything_is_computed_on_the_device_of_the_model(gpt, ids):
    assert gpt.device == torch.device("cpu")
    gpt, ids = gpt.to("meta"), ids.to("meta")
    assert gpt.device == torch.device("meta")
    cache = gpt(ids[:, :4], use_cache=True).past_key_values
    for mask in (None, torch.ones_like(ids)):
        out = gpt(ids[:, 4:], mask, labels=ids[:, 4:], past_key_values=cache)
        assert out.loss.device == torch.device("meta")
