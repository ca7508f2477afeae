"""The same as transformers and peft compute, on the same weights."""

import pytest
import torch
from conftest import tiny_config
from test_lora import filled

from minipeft import GPT, GPTConfig, LoraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.conformance
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
ALL = ["c_attn", "c_proj", "c_fc"]


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=3, bos_token_id=0,
        eos_token_id=0, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gpt_gives_transformers_logits(theirs, ids, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    out = theirs(ids, labels=ids)
    assert close(ours(ids).logits, out.logits)
    assert close(ours(ids, labels=ids).loss, out.loss)
    for mask in (torch.tensor([[0] * 3 + [1] * 7] * 3), torch.tensor([[1] * 7 + [0] * 3] * 3)):
        real = mask[0].bool()
        assert close(
            ours(ids, mask).logits[:, real], theirs(ids, attention_mask=mask).logits[:, real]
        )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
        assert close(ours(ids, mask, position_ids=positions).logits[:, real], expected[:, real])
    cache = theirs(ids[:, :4], use_cache=True).past_key_values
    first = ours(ids[:, :4], use_cache=True).past_key_values
    expected = theirs(ids[:, 4:], past_key_values=cache).logits
    assert close(ours(ids[:, 4:], past_key_values=first).logits, expected)
    generated = theirs.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(ids, max_new_tokens=8), generated)


def test_gpt_reads_keys_without_the_prefix_and_writes_what_transformers_reads(
    theirs, ids, tmp_path
):
    from safetensors.torch import load_file, save_file

    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)  # the mask buffer in OpenAI's files
    save_file(tensors, file)
    ours = GPT.from_pretrained(tmp_path)
    assert close(ours(ids).logits, theirs(ids).logits)
    ours.save_pretrained(tmp_path / "back")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    assert torch.equal(back(ids).logits, theirs(ids).logits)


def test_lora_counts_and_prints_as_peft_on_a_full_size_gpt2(capsys):
    with torch.device("meta"):
        gpt = GPT(GPTConfig())
    get_peft_model(
        gpt, LoraConfig(r=8, lora_alpha=32, target_modules=ALL)
    ).print_trainable_parameters()
    assert capsys.readouterr().out == (
        "trainable params: 1,179,648 || all params: 125,619,456 || trainable%: 0.9391\n"
    )


def test_lora_draws_the_same_random_numbers(theirs):
    names = {"r": 5, "target_modules": ALL}
    torch.manual_seed(3)
    mine = get_peft_model(GPT(tiny_config()), LoraConfig(**names)).adapters["default"].tensors()
    torch.manual_seed(3)
    GPT(tiny_config())
    model = peft.get_peft_model(theirs, peft.LoraConfig(**names))
    found = peft.get_peft_model_state_dict(model)
    assert set(found) == set(mine)
    assert all(torch.equal(found[key], mine[key]) for key in mine)


@pytest.mark.parametrize("alpha", [8, 10])
def test_lora_trains_as_peft_does(theirs, ids, tmp_path, alpha):
    """Same weights in: logits, gradients, 20 AdamW steps, on our GPT and transformers'."""
    theirs.save_pretrained(tmp_path / "base")
    names = {"r": 4, "lora_alpha": alpha, "target_modules": ALL, "task_type": "CAUSAL_LM"}
    reference = peft.get_peft_model(theirs, peft.LoraConfig(**names))
    start = {k: v.clone() for k, v in peft.get_peft_model_state_dict(reference).items()}
    other = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    models = [reference.eval()]
    for base in (GPT.from_pretrained(tmp_path / "base"), other):
        models.append(get_peft_model(base, LoraConfig(**names)).eval())
        for key, tensor in models[-1].adapters["default"].tensors().items():
            tensor.copy_(start[key])
    runs = []
    for model in models:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        losses = []
        for _ in range(20):
            loss = model(ids, labels=ids)[0]
            loss.backward()
            losses.append(loss.detach())
            gradients = [p.grad.clone() for p in parameters]
            optimizer.step()
            optimizer.zero_grad()
        runs.append((torch.stack(losses), gradients, model(ids).logits.detach()))
    assert runs[0][0][-1] < runs[0][0][0]
    for losses, gradients, logits in runs[1:]:
        assert close(losses, runs[0][0])
        assert all(
            torch.allclose(a, b, atol=1e-4) for a, b in zip(gradients, runs[0][1], strict=True)
        )
        assert torch.allclose(logits, runs[0][2], atol=1e-3)
    if alpha == 8:  # a scaling of 2 is exact, so addmm rounds as peft does: same layout, same bits
        assert torch.equal(runs[2][0], runs[0][0])
        assert torch.equal(runs[2][2], runs[0][2])


def test_adapters_travel_both_ways(theirs, ids, tmp_path):
    theirs.save_pretrained(tmp_path / "base")
    names = {"r": 4, "lora_alpha": 12, "target_modules": ALL, "task_type": "CAUSAL_LM"}
    mine = get_peft_model(GPT.from_pretrained(tmp_path / "base"), LoraConfig(**names))
    filled(mine.adapters["default"].layers)
    mine.save_pretrained(tmp_path / "mine")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "mine")
    assert close(model(ids).logits, mine(ids).logits)
    model.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(GPT.from_pretrained(tmp_path / "base"), tmp_path / "theirs")
    assert torch.equal(again(ids).logits, mine(ids).logits)
