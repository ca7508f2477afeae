"""Trainable token rows next to a LoRA: some tokens' embeddings are trained, all others frozen."""

import pytest
import torch
from conftest import BASE
from test_lora import ALL
from test_methods import train
from torch import nn

from minipeft import GPT, LoraConfig, PeftModel, get_peft_model, quantize_model
from minipeft.lab import tasks
from minipeft.lab.base import load_base
from minipeft.lab.evaluate import complete
from minipeft.lab.recipes import RunConfig
from minipeft.lab.train import train as train_in_lab
from minipeft.methods.lora import add_lora
from minipeft.methods.qlora import QLoraLinear
from minipeft.token_rows import TokenRows

TOKENS = [26, 60, 1]  # the first two are in `ids`


def config(tokens=TOKENS) -> LoraConfig:
    return LoraConfig(r=2, target_modules=ALL, trainable_token_indices=tokens)


def test_new_rows_do_not_change_the_logits_and_are_counted_once(gpt, ids):
    plain = gpt(ids).logits
    model = get_peft_model(gpt, config())
    assert torch.equal(model(ids).logits, plain)
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 384 + 3 * 24
    model(ids, labels=ids)[0].backward()
    for key, p in model.named_parameters():
        own = "lora_" in key or "token_adapter" in key
        assert p.requires_grad == own == (p.grad is not None), key


def test_trained_rows_change_embedding_and_head_and_no_other_row(gpt, ids):
    """One step on the rows only. The head is tied to the embedding, so it uses them too."""
    model = get_peft_model(gpt, config()).eval()
    wte, head = model.base_model.transformer.wte, model.base_model.lm_head
    before = wte.base_layer.weight.clone()
    model(ids, labels=ids)[0].backward()
    rows = wte.token_adapter["trainable_tokens_delta"]
    # The third token is not in `ids`: its gradient comes from the head alone.
    assert (rows.grad.abs().sum(1) > 0).all()
    rows.data -= 0.1 * rows.grad
    after = before.clone()
    after[TOKENS] = rows.detach()
    assert torch.equal(wte.weight, after)
    assert torch.equal(head.weight, after)
    assert torch.equal(wte.base_layer.weight, before)
    by_hand = GPT(gpt.config).eval()
    by_hand.load_state_dict(model.unload().state_dict())
    by_hand.transformer.wte.weight.data = after
    expected = by_hand(ids).logits
    with torch.no_grad():
        model = get_peft_model(gpt, config()).eval()
        model.base_model.transformer.wte.token_adapter["trainable_tokens_delta"].copy_(rows)
        assert torch.equal(model(ids).logits, expected)


def test_disabling_merging_saving_and_loading_trained_rows(gpt, ids, tmp_path):
    plain = gpt(ids).logits
    model = get_peft_model(gpt, config())
    train(model, ids)
    logits = model(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
    model.merge_adapter()
    assert torch.allclose(model(ids).logits, logits, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(ids).logits, logits)
    merged = model.merge_and_unload()
    assert type(merged.transformer.wte) is nn.Embedding
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert torch.allclose(merged(ids).logits, logits, atol=1e-4)
    assert torch.equal(model(ids).logits, logits)
    model.save_pretrained(tmp_path)
    base = model.unload()
    assert torch.equal(base(ids).logits, plain)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(ids).logits, logits)
    assert again.get_nb_trainable_parameters()[0] == 0
    again.add_adapter("other", config())
    assert not base.transformer.wte.base_layer.weight.requires_grad
    with pytest.raises(ValueError, match="a LoRA with trained token rows has no weighted sum"):
        again.add_weighted_adapter(["default", "other"], [1, 1], "sum")


def test_impossible_tokens_and_models_are_refused(gpt):
    for tokens in ([3, 61], [-1], [3, 3]):
        with pytest.raises(ValueError, match="must be distinct, from 0 to 60, got"):
            get_peft_model(gpt, config(tokens))
    with pytest.raises(ValueError, match=r"Sequential has no get_output_embeddings\(\)"):
        get_peft_model(
            nn.Sequential(nn.Linear(2, 2)),
            LoraConfig(target_modules=["0"], trainable_token_indices=[0]),
        )
    with pytest.raises(
        ValueError, match="does not support trainable_token_indices: use get_peft_model"
    ):
        add_lora(gpt, config())
    assert all(p.requires_grad for p in gpt.parameters())


def test_rows_of_a_bfloat16_base_are_float32(gpt, ids):
    """A step too small for bfloat16 must not be lost."""
    gpt.bfloat16()
    plain = gpt(ids).logits
    model = get_peft_model(gpt, config())
    rows = model.base_model.transformer.wte.token_adapter["trainable_tokens_delta"]
    assert rows.dtype == torch.float32
    assert torch.equal(model(ids).logits, plain)
    assert model(ids).logits.dtype == torch.bfloat16
    model(ids, labels=ids).loss.backward()
    assert rows.grad.dtype == torch.float32
    before = rows.detach().clone()
    rows.data *= 1 + 2**-12
    assert not torch.equal(rows, before)
    assert torch.equal(rows.bfloat16(), before.bfloat16())


def test_rows_of_a_float64_base_are_float64(gpt):
    model = get_peft_model(gpt.double(), config())
    rows = model.base_model.transformer.wte.token_adapter["trainable_tokens_delta"]
    assert rows.dtype == torch.float64


class ScaledEmbedding(nn.Embedding):
    """As in Gemma 3, the embedding does more than look up rows."""

    def forward(self, ids):
        return 2 * super().forward(ids)


def test_rows_of_an_embedding_with_its_own_forward_are_used_as_it_uses_its_own(gpt, ids):
    scaled = ScaledEmbedding(61, 24)
    scaled.weight = gpt.transformer.wte.weight
    gpt.transformer.wte = scaled
    plain = gpt(ids).logits
    model = get_peft_model(gpt, config()).eval()
    assert torch.equal(model(ids).logits, plain)
    rows = scaled.weight[TOKENS] + 1
    model.base_model.transformer.wte.token_adapter["trainable_tokens_delta"].data = rows
    adapted = model(ids).logits
    assert not torch.allclose(adapted, plain)
    merged = model.merge_and_unload()
    assert isinstance(merged.transformer.wte, ScaledEmbedding)
    assert torch.equal(merged.transformer.wte.weight[TOKENS], rows)
    assert torch.allclose(merged(ids).logits, adapted, atol=1e-5)


def refused(gpt, message: str) -> None:
    """Adding token rows raises, and the model is as it was."""
    embedding = gpt.transformer.wte
    with pytest.raises(ValueError, match=message):
        get_peft_model(gpt, config())
    assert gpt.transformer.wte is embedding
    assert all(p.requires_grad for p in gpt.parameters())


def test_an_embedding_that_changes_its_own_rows_is_refused(gpt):
    limited = nn.Embedding(61, 24, max_norm=1.0)
    limited.weight = gpt.transformer.wte.weight
    gpt.transformer.wte = limited
    refused(gpt, "not supported for an embedding with max_norm")


@pytest.mark.parametrize("by", ["object", "memory"])
def test_an_embedding_whose_weight_has_a_third_user_is_refused(gpt, by):
    """As in encoder-decoder models: that user would still read the old rows."""
    weight = gpt.transformer.wte.weight
    gpt.second = nn.Embedding(61, 24)
    gpt.second.weight = weight if by == "object" else nn.Parameter(weight.data)
    refused(gpt, "in GPT, transformer.wte, lm_head, second share one weight")


def test_a_head_tied_by_memory_uses_the_rows(gpt, ids):
    gpt.lm_head.weight = nn.Parameter(gpt.transformer.wte.weight.data)
    model = get_peft_model(gpt, config()).eval()
    assert isinstance(model.base_model.lm_head, TokenRows)


def test_rows_are_trained_merged_and_saved_on_a_4bit_base(gpt, ids, tmp_path):
    quantize_model(gpt)
    plain = gpt(ids).logits
    model = get_peft_model(gpt, config())
    assert {type(layer) for layer in model.adapters["default"].layers.values()} == {
        QLoraLinear,
        TokenRows,
    }
    assert torch.equal(model(ids).logits, plain)
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 384 + 3 * 24
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    logits = model(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(ids).logits, logits, atol=1e-4)
    assert merged.lm_head.weight is merged.transformer.wte.weight
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    assert torch.equal(again(ids).logits, logits)


@pytest.mark.slow
def test_trained_rows_learn_what_a_lora_alone_cannot():
    """`sentiment_unseen`: the answers are tokens that pretraining never saw."""
    base = load_base(BASE)
    task = tasks.load_task(base, "sentiment_unseen")
    unseen = sorted({i for e in task.train for i in e.completion_ids} - {base.end})
    for ids, score in ((None, 0.0), (unseen, 1.0)):
        torch.manual_seed(0)
        lora = LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", trainable_token_indices=ids
        )
        model = get_peft_model(base.model(), lora)
        batches = ([tasks.collate(b, base.end, "cpu")] for b in tasks.shuffled(task.train, 16, 0))
        run = RunConfig(steps=100, learning_rate=5e-3, warmup=0, quiet=True)
        train_in_lab(model, batches, run)
        texts = complete(model, base, task.test[:64])
        right = [text == e.completion for text, e in zip(texts, task.test[:64], strict=True)]
        assert sum(right) / 64 == pytest.approx(score, abs=0.05)


@pytest.mark.parametrize("tokens", [[], [1.0], [True]])
def test_tokens_that_are_no_ids_are_refused(gpt, tokens):
    refused_tokens = "must be distinct, from 0 to 60, got"
    with pytest.raises(ValueError, match=refused_tokens):
        get_peft_model(gpt, config(tokens))
