"""The GPT, LoRA and weighted sums of LoRAs match transformers and peft on the same weights."""

import copy

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


def near(a, b, tolerance=1e-5):
    """No entry differs by more than `tolerance` times the largest entry of b."""
    return (a - b).abs().max() <= tolerance * b.abs().max()


def trainable(model) -> list:
    """The trainable parameters in the order of peft's layers, and in each by letter: A, B, E."""
    found = [(*n.partition(".lora_"), p) for n, p in model.named_parameters() if p.requires_grad]
    layers = {layer: i for i, (layer, *_) in enumerate(found)}
    return [p for *_, p in sorted(found, key=lambda entry: (layers[entry[0]], entry[2]))]


@torch.no_grad()
def copy_trainable(source, target) -> None:
    """Copy an adapter's weights from one model to another."""
    for a, b in zip(trainable(source), trainable(target), strict=True):
        assert a.shape == b.shape
        b.copy_(a)


def three_models(theirs, theirs_config, ours_config, folder, dtype=torch.float32):
    """peft on transformers' GPT-2, minipeft on the same, minipeft on its own GPT: equal weights.

    The adapters are drawn from one seed. AdaLoRA draws in another order than peft: it is copied.
    """
    theirs.save_pretrained(folder)
    makers = (  # on a float64 base peft's AdaLoRA would train its rank counters, so cast it later
        lambda: peft.get_peft_model(copy.deepcopy(theirs), theirs_config),
        lambda: get_peft_model(copy.deepcopy(theirs).to(dtype), copy.deepcopy(ours_config)),
        lambda: get_peft_model(GPT.from_pretrained(folder).to(dtype), copy.deepcopy(ours_config)),
    )
    models = []
    for make in makers:
        torch.manual_seed(3)
        models.append(make().to(dtype).train())
    if ours_config.peft_type == "ADALORA":
        for model in models[1:]:
            copy_trainable(models[0], model)
    for first, *others in zip(*map(trainable, models), strict=True):
        assert all(torch.equal(first, p) for p in others)
    return models


def train_step(model, ids, optimizer, step):
    """One AdamW step. Returns the loss, the logits of the real tokens and the gradients."""
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    out[0].backward()
    gradients = [p.grad.clone() for p in trainable(model)]
    optimizer.step()
    for owner in (model, model.base_model):  # in peft, AdaLoRA's allocator is in the base_model
        if hasattr(owner, "update_and_allocate"):
            owner.update_and_allocate(step)
            break
    optimizer.zero_grad()
    # for prompt and P-tuning, peft also returns the logits of the virtual tokens
    return [out[0].detach(), out.logits.detach()[:, -ids.shape[1] :], *gradients]


def train_side_by_side(models, ids, synchronize=False):
    """Train models for 20 steps; yields what train_step returns for each of them, step by step.

    synchronize: before every step, copy the first model's adapter to the others, so that rounding
    errors do not accumulate.
    """
    optimizers = [torch.optim.AdamW(trainable(model), lr=1e-2) for model in models]
    for step in range(20):
        for model in models[1:] if synchronize else []:
            copy_trainable(models[0], model)
        yield [train_step(m, ids, o, step) for m, o in zip(models, optimizers, strict=True)]


def test_gpt_gives_transformers_logits(theirs, ids, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    out = theirs(ids, labels=ids)
    assert close(ours(ids).logits, out.logits)
    assert close(ours(ids, labels=ids).loss, out.loss)
    for mask in (torch.tensor([[0] * 3 + [1] * 7] * 3), torch.tensor([[1] * 7 + [0] * 3] * 3)):
        real = mask[0].bool()
        expected = theirs(ids, attention_mask=mask).logits
        assert close(ours(ids, mask).logits[:, real], expected[:, real])
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


def test_lora_on_a_full_size_gpt2_prints_the_counts_that_peft_prints(capsys):
    with torch.device("meta"):
        gpt = GPT(GPTConfig())
    config = LoraConfig(r=8, lora_alpha=32, target_modules=ALL)
    get_peft_model(gpt, config).print_trainable_parameters()
    assert capsys.readouterr().out == (
        "trainable params: 1,179,648 || all params: 125,619,456 || trainable%: 0.9391\n"
    )


def test_lora_draws_the_same_random_numbers_as_peft(theirs):
    names = {"r": 5, "target_modules": ALL}
    torch.manual_seed(3)
    mine = get_peft_model(GPT(tiny_config()), LoraConfig(**names)).adapters["default"].tensors()
    torch.manual_seed(3)
    GPT(tiny_config())
    model = peft.get_peft_model(theirs, peft.LoraConfig(**names))
    found = peft.get_peft_model_state_dict(model)
    assert set(found) == set(mine)
    assert all(torch.equal(found[key], mine[key]) for key in mine)


@pytest.mark.parametrize(("alpha", "tokens"), [(8, None), (10, None), (8, [26, 60, 1])])
def test_lora_computes_pefts_loss_logits_and_gradients(theirs, ids, tmp_path, alpha, tokens):
    """The weights are synchronized before each of 20 AdamW steps."""
    names = {"r": 4, "lora_alpha": alpha, "target_modules": ALL, "task_type": "CAUSAL_LM"}
    names["trainable_token_indices"] = tokens
    models = three_models(theirs, peft.LoraConfig(**names), LoraConfig(**names), tmp_path)
    for expected, *ours in train_side_by_side(models, ids, synchronize=True):
        for found in ours:
            assert all(map(near, found, expected))
        if alpha == 8:  # multiplying by a scaling of 2 is exact, so both round identically
            assert all(map(torch.equal, ours[0], expected))


def test_lora_training_follows_peft_for_20_steps_in_float64(theirs, ids, tmp_path):
    """Both start from the same weights, and nothing is synchronized afterwards."""
    names = {"r": 4, "lora_alpha": 10, "target_modules": ALL, "task_type": "CAUSAL_LM"}
    configs = peft.LoraConfig(**names), LoraConfig(**names)
    models = three_models(theirs, *configs, tmp_path, torch.float64)
    losses = []
    for expected, *ours in train_side_by_side(models, ids):
        for found in ours:
            assert near(found[0], expected[0], 1e-6)  # both compute the loss in float32
            assert all(near(a, b, 1e-11) for a, b in zip(found[1:], expected[1:], strict=True))
        losses.append(expected[0])
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("tokens", [None, [26, 60, 1]])
def test_peft_loads_our_lora_folder_and_we_load_pefts(theirs, ids, tmp_path, tokens):
    theirs.save_pretrained(tmp_path / "base")
    names = {"r": 4, "lora_alpha": 12, "target_modules": ALL, "task_type": "CAUSAL_LM"}
    names["trainable_token_indices"] = tokens
    mine = get_peft_model(GPT.from_pretrained(tmp_path / "base"), LoraConfig(**names))
    filled({n: x for n, x in mine.adapters["default"].layers.items() if hasattr(x, "lora_B")})
    if tokens:
        key = "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"
        torch.nn.init.normal_(mine.adapters["default"].tensors()[key])
    mine.save_pretrained(tmp_path / "mine")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "mine")
    assert close(model(ids).logits, mine(ids).logits)
    model.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(GPT.from_pretrained(tmp_path / "base"), tmp_path / "theirs")
    assert torch.equal(again(ids).logits, mine(ids).logits)


ADAPTERS = {  # on different layers, with different ranks and scalings
    "a": {"r": 4, "lora_alpha": 10, "target_modules": ["c_attn", "c_fc"]},
    "b": {"r": 4, "lora_alpha": 3, "target_modules": ["c_fc", "mlp.c_proj"]},
    "c": {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn"]},
}


def combine(theirs, folder, changes, combination, *arguments):
    """Add the same weighted adapter "sum" in peft and in minipeft.

    Returns both configs, and for both, by layer: A, B and the update ΔW.
    """
    theirs.save_pretrained(folder)
    reference = mine = None
    for name, settings in ADAPTERS.items():
        settings = settings | changes
        if mine is None:
            reference = peft.get_peft_model(theirs, peft.LoraConfig(**settings), name)
            model = transformers.GPT2LMHeadModel.from_pretrained(folder)
            mine = get_peft_model(model, LoraConfig(**settings), name)
        else:
            reference.add_adapter(name, peft.LoraConfig(**settings))
            mine.add_adapter(name, LoraConfig(**settings))
        for key, layer in filled(mine.adapters[name].layers).items():
            found = reference.base_model.model.get_submodule(key)
            found.lora_A[name].weight.data.copy_(layer.lora_A.weight.data)
            found.lora_B[name].weight.data.copy_(layer.lora_B.weight.data)
    for model in (reference, mine):
        model.add_weighted_adapter(*arguments, **combination)
    layers = mine.adapters["sum"].layers
    ours = {k: (x.lora_A.weight, x.lora_B.weight, x.delta()) for k, x in layers.items()}
    modules = reference.base_model.model.named_modules()
    expected = {
        key: (m.lora_A["sum"].weight, m.lora_B["sum"].weight, m.get_delta_weight("sum").T)
        for key, m in modules
        if "sum" in getattr(m, "lora_A", {})
    }
    return reference.peft_config["sum"], mine.peft_config["sum"], expected, ours


def same_factors(ours, expected) -> bool:
    """Whether A and B are bit-identical up to the rank of ΔW.

    Beyond that rank an SVD is not unique. peft asks LAPACK for the full matrices, whose last
    columns are computed in another way; there only ΔW can be compared.
    """
    (a, b, _), (their_a, their_b, _) = ours, expected
    rank = int(torch.linalg.matrix_rank(their_b.double() @ their_a.double(), rtol=1e-6))
    assert rank > 0
    same = torch.equal(a[:rank], their_a[:rank]) and torch.equal(b[:, :rank], their_b[:, :rank])
    return same and a.shape == their_a.shape and b.shape == their_b.shape


@pytest.mark.parametrize(
    ("names", "combination", "rank"),
    [
        ("ab", {}, 4),
        ("abc", {"svd_rank": 2}, 2),
        ("abc", {"svd_rank": 7}, 7),
        ("abc", {"combination_type": "cat"}, 11),
        ("ab", {"combination_type": "linear"}, 4),
        ("a", {"svd_rank": 2}, 4),
    ],
)
def test_a_weighted_adapter_is_identical_to_pefts(theirs, tmp_path, names, combination, rank):
    """The same layers, rank and scaling, and bit-identical A and B."""
    weights = [0.7, -1.6, 0.3][: len(names)]
    config, own, expected, ours = combine(
        theirs, tmp_path, {}, combination, list(names), weights, "sum"
    )
    assert config.r == own.r == rank
    assert config.lora_alpha == own.lora_alpha
    assert sorted(config.target_modules) == own.target_modules
    assert expected.keys() == ours.keys()
    for key in expected:
        assert same_factors(ours[key], expected[key])
        assert near(ours[key][2], expected[key][2])


@pytest.mark.parametrize("kind", ["svd", "linear", "cat"])
def test_with_rslora_pefts_weighted_adapter_is_too_large_by_the_root_of_r(theirs, tmp_path, kind):
    """Here peft is not the reference: with a weight of 1, an adapter should not change."""
    rslora, combination = {"use_rslora": True}, {"combination_type": kind}
    arguments = rslora, combination, ["a", "b"], [1.0, 0.0], "sum"
    config, own, expected, ours = combine(theirs, tmp_path, *arguments)
    assert config.use_rslora
    assert not own.use_rslora
    for key in [key for key in expected if "c_attn" in key]:  # b does not adapt these layers
        assert same_factors(ours[key], expected[key])
        assert near(ours[key][2] * config.r**0.5, expected[key][2])
