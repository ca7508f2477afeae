import json

import pytest
import torch
from conftest import tiny_config

from minipeft import GPT, GPTConfig


def test_the_parameter_count_is_the_formulas(gpt):
    d, n, v, p = 24, 2, 61, 32
    assert (
        sum(w.numel() for w in gpt.parameters())
        == v * d + p * d + n * (12 * d * d + 13 * d) + 2 * d
    )


def test_a_token_sees_nothing_after_it(gpt, ids):
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 61
    a, b = gpt(ids).logits, gpt(changed).logits
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:])


def test_the_cache_gives_the_same_logits(gpt, ids):
    gpt.double()
    whole = gpt(ids).logits
    first = gpt(ids[:, :4], use_cache=True)
    rest = gpt(ids[:, 4:], past_key_values=first.past_key_values).logits
    assert torch.allclose(rest, whole[:, 4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(gpt, ids, side):
    gpt.double()
    pad = torch.zeros(3, 4, dtype=torch.long)
    parts = (pad, ids) if side == "left" else (ids, pad)
    mask = torch.cat([(part != 0).long() for part in parts], dim=1)
    real = slice(4, None) if side == "left" else slice(0, 10)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = gpt(torch.cat(parts, dim=1), mask, position_ids=positions).logits[:, real]
    assert torch.allclose(padded, gpt(ids).logits, rtol=0, atol=1e-12)


def test_every_token_sees_a_whole_prefix(gpt, ids):
    """With keys and values in front, token 0 must depend on the last of them."""
    cache = gpt(ids[:, :3], use_cache=True).past_key_values
    changed = tuple((k.clone(), v.clone()) for k, v in cache)
    changed[0][1][:, :, 2] += 1
    a = gpt(ids[:, 3:], past_key_values=cache).logits
    b = gpt(ids[:, 3:], past_key_values=changed).logits
    assert not torch.allclose(a[:, 0], b[:, 0])


def test_labels_are_shifted_and_minus_100_ignored(gpt, ids):
    labels = ids.clone()
    labels[:, :5] = -100
    loss, logits, _ = gpt(ids, labels=labels)
    expected = -logits.log_softmax(-1)[:, 4:-1].gather(-1, ids[:, 5:, None]).mean()
    assert torch.allclose(loss, expected)


def test_embeddings_can_be_given_instead_of_tokens(gpt, ids):
    embeds = gpt.get_input_embeddings()(ids)
    assert torch.equal(gpt(inputs_embeds=embeds).logits, gpt(ids).logits)


def test_generate_is_the_argmax_each_time(gpt, ids):
    out = gpt.generate(ids, max_new_tokens=6)
    for i in range(10, out.shape[1]):
        assert torch.equal(gpt(out[:, :i]).logits[:, -1].argmax(-1), out[:, i]) or (out == 0).any()


def test_prompts_of_unequal_length_generate_as_each_alone(gpt, ids):
    gpt.config.eos_token_id = None
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids[1:2, :7]), dim=1)
    both = torch.cat((ids[:1], padded))
    mask = torch.ones_like(both)
    mask[1, :3] = 0
    out = gpt.double().generate(both, mask, max_new_tokens=8)
    assert torch.equal(out[:1], gpt.generate(ids[:1], max_new_tokens=8))
    assert torch.equal(out[1:, 3:], gpt.generate(ids[1:2, :7], max_new_tokens=8))


def test_a_row_that_has_ended_stays_ended(gpt, ids):
    stop = int(gpt.generate(ids, max_new_tokens=3)[0, 11])
    out = gpt.generate(ids, max_new_tokens=12, eos_token_id=stop)
    for row in out[:, 10:]:
        where = (row == stop).nonzero()
        assert len(where) == 0 or (row[where[0] :] == stop).all()
    assert stop in out[0, 10:12]


def test_sampling_follows_seed_and_top_k(gpt, ids):
    def sample(seed, top_k):
        generator = torch.Generator().manual_seed(seed)
        return gpt.generate(
            ids, max_new_tokens=8, do_sample=True, temperature=2.0, top_k=top_k, generator=generator
        )

    assert torch.equal(sample(0, 20), sample(0, 20))
    assert not torch.equal(sample(0, 20), sample(1, 20))
    assert torch.equal(sample(0, 1), gpt.generate(ids, max_new_tokens=8))


def test_saving_and_loading_gives_the_same_bits(gpt, ids, tmp_path):
    gpt.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, gpt(ids).logits)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_damaged_folder_is_one_clear_error(gpt, tmp_path):
    gpt.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, described = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        GPT.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    for change, message in [
        ({"n_embd": 48}, "has the shape"),
        ({"n_layer": 3}, "is missing"),
        ({"n_layer": 1}, "not part of"),
        ({"model_type": "llama"}, "does not describe a GPT-2"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"n_head": 5}, "not a multiple"),
    ]:
        config.write_text(json.dumps(described | change))
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        GPT.from_pretrained(tmp_path / "nowhere")


def test_bad_input_is_one_clear_error(gpt, ids):
    with pytest.raises(ValueError, match="and not both"):
        gpt()
    with pytest.raises(ValueError, match="the context holds 32"):
        gpt(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask has the shape"):
        gpt(ids, attention_mask=torch.ones(3, 9))
    with pytest.raises(ValueError, match="pad prompts on the left"):
        gpt.generate(ids, torch.tensor([[1] * 9 + [0]] * 3))
    with pytest.raises(ValueError, match="exceed the context"):
        gpt.generate(ids, max_new_tokens=23)
    with pytest.raises(ValueError, match="temperature"):
        gpt.generate(ids, do_sample=True, temperature=0)
    with pytest.raises(ValueError, match="n_layer is 0"):
        GPTConfig(n_layer=0)
    assert tiny_config().n_embd == 24
