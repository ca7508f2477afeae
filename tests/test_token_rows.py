"""Trainable token rows beside a LoRA: some tokens' embeddings are trained, all others stay."""

import pytest
import torch
from conftest import BASE
from test_lora import ALL
from test_methods import train
from torch import nn

from minipeft import GPT, LoraConfig, PeftModel, get_peft_model
from minipeft.lab import finetune, tasks
from minipeft.lora import add_lora
from minipeft.peft_model import quantize_model

TOKENS = [26, 60, 1]  # the first two are in `ids`


def config(tokens=TOKENS) -> LoraConfig:
    return LoraConfig(r=2, target_modules=ALL, trainable_token_indices=tokens)


def test_they_start_as_the_base_and_are_counted_once(gpt, ids):
    plain = gpt(ids).logits
    model = get_peft_model(gpt, config())
    assert torch.equal(model(ids).logits, plain)
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 384 + 3 * 24
    model(ids, labels=ids)[0].backward()
    for key, p in model.named_parameters():
        own = "lora_" in key or "token_adapter" in key
        assert p.requires_grad == own == (p.grad is not None), key


def test_trained_rows_are_read_and_predicted_and_no_other_row_moves(gpt, ids):
    """A step on the rows alone; the head is tied, so it has them too."""
    model = get_peft_model(gpt, config()).eval()
    wte, head = model.base_model.transformer.wte, model.base_model.lm_head
    before = wte.base_layer.weight.clone()
    model(ids, labels=ids)[0].backward()
    rows = wte.token_adapter["trainable_tokens_delta"]
    assert (rows.grad.abs().sum(1) > 0).all()  # the third is in no text: the head alone moves it
    rows.data -= 0.1 * rows.grad
    after = before.clone()
    after[TOKENS] = rows.detach()
    assert torch.equal(wte.weight, after)
    assert torch.equal(head.weight, after)
    assert torch.equal(wte.base_layer.weight, before)
    by_hand = GPT(gpt.config).eval()
    by_hand.load_state_dict(model.unload().state_dict())
    by_hand.transformer.wte.weight.data = after
    told = by_hand(ids).logits
    with torch.no_grad():
        model = get_peft_model(gpt, config()).eval()
        model.base_model.transformer.wte.token_adapter["trainable_tokens_delta"].copy_(rows)
        assert torch.equal(model(ids).logits, told)


def test_switched_off_merged_saved_and_read_back(gpt, ids, tmp_path):
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
    with pytest.raises(ValueError, match="trained token rows have no weighted sum"):
        again.add_weighted_adapter(["default", "other"], [1, 1], "sum")


def test_what_cannot_be_is_refused(gpt):
    for tokens in ([3, 61], [-1], [3, 3]):
        with pytest.raises(ValueError, match="give different ones from 0 to 60"):
            get_peft_model(gpt, config(tokens))
    with pytest.raises(ValueError, match="Sequential has no get_output_embeddings"):
        get_peft_model(
            nn.Sequential(nn.Linear(2, 2)),
            LoraConfig(target_modules=["0"], trainable_token_indices=[0]),
        )
    with pytest.raises(ValueError, match="add_lora does not"):
        add_lora(gpt, config())
    assert all(p.requires_grad for p in gpt.parameters())
    quantize_model(gpt)
    with pytest.raises(ValueError, match="not implemented: trainable_token_indices"):
        get_peft_model(gpt, config())


@pytest.mark.slow
def test_trained_rows_cure_what_an_adapter_alone_cannot_learn():
    """`sentiment_unseen`: the answers are tokens that pretraining never had."""
    base = finetune.load_base(BASE)
    task = tasks.load_task(base.tokenizer, base.end, 256, "sentiment_unseen")
    unseen = sorted({i for e in task.train for i in e.completion_ids} - {base.end})
    for ids, score in ((None, 0.0), (unseen, 1.0)):
        torch.manual_seed(0)
        lora = LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", trainable_token_indices=ids
        )
        model = get_peft_model(base.model(), lora)
        batches = ([tasks.collate(b, base.end, "cpu")] for b in tasks.shuffled(task.train, 16, 0))
        finetune.train(model, batches, 100, 5e-3, quiet=True)
        texts = finetune.complete(model, base, task.test[:64])
        right = [text == e.completion for text, e in zip(texts, task.test[:64], strict=True)]
        assert sum(right) / 64 == pytest.approx(score, abs=0.05)
