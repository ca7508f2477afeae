"""AdaLoRA and the prompt methods: what all share, then each on its own."""

import copy
import dataclasses
import functools
import inspect
import types
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_config
from test_qlora import Conv1D
from torch import nn

from minipeft import (
    GPT,
    AdaLoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    prompt_adapter,
)
from minipeft.adapters import merge_into_base
from minipeft.lab import DATA
from minipeft.lab.base import load_tokenizer
from minipeft.methods.adalora import RankAllocator, SVDLinear, add_adalora, orthogonality
from minipeft.methods.p_tuning import PromptEncoder
from minipeft.methods.prefix_tuning import PrefixEncoder
from minipeft.methods.prompt_tuning import PromptEmbedding, initial_tokens

SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 2, "total_step": 10}
CONFIGS = {
    "adalora": lambda: AdaLoraConfig(target_modules="all-linear", **SCHEDULE),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=5),
    "p_tuning": lambda: PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=7),
    "p_tuning_lstm": lambda: PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=7, encoder_reparameterization_type="LSTM"
    ),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=5),
    "prefix_projection": lambda: PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=7
    ),
}
PROMPTS = [name for name in CONFIGS if name != "adalora"]


def train(model, ids, steps=10) -> list[float]:
    """Train on one batch. Returns the losses, without AdaLoRA's penalty."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    losses = []
    model.train()
    for step in range(1, steps + 1):
        loss = model(ids, labels=ids)[0]
        loss.backward()
        losses.append((loss - model.penalty()).item())
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    model.eval()
    return losses


@pytest.mark.parametrize("name", CONFIGS)
def test_training_lowers_the_loss_and_does_not_change_the_base(gpt, ids, name):
    plain, before = gpt(ids).logits, copy.deepcopy(gpt.state_dict())
    model = get_peft_model(gpt, CONFIGS[name]())
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    assert not torch.allclose(model(ids).logits, plain, atol=1e-3)
    assert model(ids).logits.shape == plain.shape  # without the virtual tokens
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
        names = [key for key, _ in model.named_parameters()]
        assert not any("prompt" in key or "lora_" in key for key in names)
    assert torch.equal(model.unload()(ids).logits, plain)
    assert all(torch.equal(before[key], value) for key, value in gpt.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_adapter_gets_gradients(gpt, ids, name):
    model = get_peft_model(gpt, CONFIGS[name]())
    model(ids, labels=ids)[0].backward()
    for key, p in model.named_parameters():
        own = "prompt_encoder" in key or "lora_" in key
        assert p.requires_grad == own == (p.grad is not None), key


@pytest.mark.parametrize(
    ("name", "count"),
    [  # the docstrings' formulas with v 61, d 24, 2 blocks, p 5, w 7, r 4
        ("adalora", 2 * 4 * (24 + 72 + 1 + 24 + 24 + 1 + 24 + 96 + 1 + 96 + 24 + 1)),
        ("prompt", 5 * 24),
        ("p_tuning", 5 * 24 + (24 * 7 + 7) + (49 + 7) + (7 * 24 + 24)),
        ("p_tuning_lstm", 5 * 24 + 56 * (24 + 9) + 56 * (21 + 2) + (196 + 14) + (14 * 24 + 24)),
        ("prefix", 2 * 5 * 2 * 24),
        ("prefix_projection", 5 * 24 + (24 * 7 + 7) + (7 * 96 + 96)),
    ],
)
def test_the_parameter_count_follows_the_formula(gpt, name, count):
    assert get_peft_model(gpt, CONFIGS[name]()).get_nb_trainable_parameters()[0] == count


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_saving_and_loading_gives_the_same_logits(gpt, ids, tmp_path, name, trainable):
    base = copy.deepcopy(gpt)
    model = get_peft_model(gpt, CONFIGS[name]())
    train(model, ids)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path, is_trainable=trainable).eval()
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-6)
    numbers = [m.get_nb_trainable_parameters()[0] for m in (again, model)]
    if not trainable:
        assert numbers[0] == 0
    elif name == "adalora":  # pruned to the triplets that were kept
        kept = model.adapters["default"].allocator.ranks()
        shapes = {n: one.weight.shape for n, one in model.adapters["default"].layers.items()}
        assert numbers[0] == sum(r * (sum(shapes[n]) + 1) for n, r in kept.items()) < numbers[1]
    else:
        assert numbers[0] == numbers[1]
        assert train(again, ids, 3)[-1] < model(ids, labels=ids)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_and_left_padding_do_not_change_generated_tokens(gpt, ids, name):
    model = get_peft_model(gpt, CONFIGS[name]())
    train(model, ids)
    text = model.generate(ids, max_new_tokens=6, eos_token_id=60)
    steps = ids
    for _ in range(6):
        steps = torch.cat((steps, model(steps).logits[:, -1:].argmax(-1)), dim=1)
    rows = [row.tolist() for row in text]
    for row, stepped in zip(rows, steps.tolist(), strict=True):
        n = row.index(60, 10) if 60 in row[10:] else 16
        assert row[:n] == stepped[:n]
    padded = torch.cat((torch.zeros(3, 4, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(14) >= 4).long().expand(3, 14)
    assert torch.equal(model.generate(padded, mask, max_new_tokens=6, eos_token_id=60)[:, 4:], text)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_on_the_right_does_not_change_the_loss(gpt, ids, name):
    model = get_peft_model(gpt, CONFIGS[name]()).double()
    train(model, ids)
    more = torch.cat((ids, torch.zeros(3, 3, dtype=torch.long)), dim=1)
    mask = (torch.arange(13) < 10).long().expand(3, 13)
    labels = more.masked_fill(mask == 0, -100)
    plain, padded = model(ids, labels=ids), model(more, mask, labels)
    assert torch.allclose(plain.logits, padded.logits[:, :10], atol=1e-11)
    assert torch.allclose(plain.loss, padded.loss, rtol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_under_autocast_are_finite_and_with_checkpointing_the_same(gpt, ids, name):
    model = get_peft_model(gpt, CONFIGS[name]()).train()
    exact = model(ids, labels=ids)[0]
    exact.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids)[0].backward()
    again = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, again, strict=True))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids)[0]
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", PROMPTS)
def test_merging_a_prompt_method_raises_an_error(gpt, name):
    model = get_peft_model(gpt, CONFIGS[name]())
    message = "cannot merge .*_TUNING: it changes the input, not the weights"
    for merge in (model.merge_adapter, model.unmerge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=message):
            merge()


def test_methods_can_be_switched_on_one_base(gpt, ids):
    model = get_peft_model(gpt, CONFIGS["prefix"](), "prefix").eval()
    expected = {}
    for name in PROMPTS + ["adalora"]:
        if name not in model.adapters:
            model.add_adapter(name, CONFIGS[name]())
        model.set_adapter(name)
        expected[name] = model(ids).logits
    for name, logits in expected.items():
        model.set_adapter(name)
        assert torch.equal(model(ids).logits, logits)
    assert len({logits.sum().item() for logits in expected.values()}) == len(expected)


# --- AdaLoRA ---


def test_merging_adalora_does_not_change_the_logits(gpt, ids):
    model = get_peft_model(gpt.double(), CONFIGS["adalora"]())
    train(model, ids)
    before = model(ids).logits
    model.merge_adapter()
    bound = 1e-12 * before.abs().max().item()
    assert torch.allclose(model(ids).logits, before, rtol=0, atol=bound)
    model.unmerge_adapter()
    assert torch.equal(model(ids).logits, before)
    plain = model.merge_and_unload()
    assert type(plain) is GPT
    assert torch.allclose(plain(ids).logits, before, rtol=0, atol=bound)


def test_the_penalty_is_only_in_the_training_loss(gpt, ids):
    task_loss = gpt(ids, labels=ids).loss  # a new adapter does not change it
    model = get_peft_model(gpt, CONFIGS["adalora"]()).train()
    layers = model.adapters["default"].layers
    loss = model(ids, labels=ids)[0]
    assert torch.allclose(loss - task_loss, 0.5 * orthogonality(layers))
    assert torch.equal(model.penalty(), 0.5 * orthogonality(layers))
    assert loss > task_loss + 0.1
    loss = model.eval()(ids, labels=ids)[0]
    assert torch.equal(loss, task_loss)
    assert model(ids).loss is None
    with model.disable_adapter():
        assert model.penalty() == 0
        assert torch.equal(model.train()(ids, labels=ids)[0], task_loss)
    for layer in layers.values():
        nn.init.orthogonal_(layer.lora_A)
        nn.init.orthogonal_(layer.lora_B)
    assert orthogonality(layers) < 1e-5


def test_the_budget_falls_as_a_cubic_and_ends_at_the_target(gpt, ids):
    config = AdaLoraConfig(target_modules="all-linear", **(SCHEDULE | {"total_step": 12}))
    model = get_peft_model(gpt, config)
    allocator = model.adapters["default"].allocator
    assert [allocator.budget(t) for t in (0, 2, 6, 10, 12)] == [32, 32, 16 + 2, 16, 16]
    train(model, ids, 12)
    ranks = allocator.ranks()
    assert sum(ranks.values()) == 16
    for name, kept in allocator.kept.items():
        e = model.adapters["default"].layers[name].lora_E.view(-1)
        assert (e[~kept] == 0).all()
        assert (e[kept] != 0).all()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (0, r"was never called\. Call it after every optimizer step"),
        (1, r"add up to 32: .* target of 16 at step 28 \(total_step 30 - tfinal 2\)"),
        (10, r"last called with step 10\. .* update_and_allocate\(28\) prunes"),
    ],
)
def test_an_unfinished_schedule_cannot_be_merged_or_saved(gpt, ids, tmp_path, steps, message):
    """Trained layers whose ranks are above the target: the error says how to prune them."""
    config = AdaLoraConfig(target_modules="all-linear", **(SCHEDULE | {"total_step": 30}))
    model = get_peft_model(gpt, config)
    model.add_adapter("other", CONFIGS["prompt"]())
    model.save_pretrained(tmp_path / "fresh")  # possible: nothing is trained yet
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(max(steps, 1)):
        optimizer.zero_grad()
        model(ids, labels=ids)[0].backward()
        optimizer.step()
        if step < steps:
            model.update_and_allocate(step + 1)
    for act in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: model.save_pretrained(tmp_path / "trained"),
    ):
        with pytest.raises(RuntimeError, match=message):
            act()
    assert not (tmp_path / "trained").exists()
    model.update_and_allocate(28)  # as the message says
    assert sum(model.ranks().values()) == 16
    model.save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "trained")
    assert sum(again.ranks().values()) == 16


def test_a_config_can_be_reused(gpt, ids):
    """Training writes rank_pattern into the model's copy of the config, not into ours."""
    config = CONFIGS["adalora"]()
    for base in (copy.deepcopy(gpt), gpt):
        model = get_peft_model(base, config)
        assert set(model.ranks().values()) == {4}
        train(model, ids)
        assert sum(model.ranks().values()) == 16
    assert config.rank_pattern is None
    assert model.peft_config["default"].rank_pattern


def test_allocating_without_gradients_raises_an_error(gpt):
    with pytest.raises(RuntimeError, match="before zero_grad"):
        get_peft_model(gpt, CONFIGS["adalora"]()).update_and_allocate(1)


@pytest.mark.parametrize(
    ("first", "deltaT", "total_step"),
    [(0, 1, 10), (1, 1, 10), (1, 1, 1), (1, 6, 10)],  # the last one prunes at steps 6 and 10
)
def test_a_run_as_long_as_its_schedule_ends_at_the_target_rank(gpt, ids, first, deltaT, total_step):
    schedule = {"init_r": 4, "target_r": 2, "deltaT": deltaT, "total_step": total_step}
    config = AdaLoraConfig(target_modules="all-linear", **schedule)
    model = get_peft_model(gpt, config)
    for step in range(first, total_step + first):
        model(ids, labels=ids)[0].backward()
        model.update_and_allocate(step)
    assert sum(model.ranks().values()) == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_r": 4}, "target_r 4 must be below init_r 4"),
        ({"target_r": 9}, "target_r 9 must be below init_r 4"),
        ({"total_step": None}, "total_step must be an integer of at least 1, got None"),
        ({"tinit": 5, "tfinal": 5}, "tinit 5 and tfinal 5 leave no step of total_step 10"),
        ({"beta1": 1.0}, "beta1 and beta2 must be between 0 and 1, got 1.0 and 0.85"),
        ({"beta1": 0.0}, "beta1 and beta2 must be between 0 and 1, got 0.0 and 0.85"),
        ({"beta2": 1.0}, "beta1 and beta2 must be between 0 and 1, got 0.85 and 1.0"),
        ({"beta2": 0.0}, "beta1 and beta2 must be between 0 and 1, got 0.85 and 0.0"),
        ({"target_r": 0}, "target_r must be an integer of at least 1, got 0"),
        ({"init_r": 0}, "init_r must be an integer of at least 1, got 0"),
        ({"tinit": -1}, "tinit must be an integer of at least 0, got -1"),
        ({"tfinal": -1}, "tfinal must be an integer of at least 0, got -1"),
        ({"deltaT": 0}, "deltaT must be an integer of at least 1, got 0"),
        ({"deltaT": True}, "deltaT must be an integer of at least 1, got True"),
        ({"deltaT": 1.0}, "deltaT must be an integer of at least 1, got 1.0"),
        ({"total_step": 0}, "total_step must be an integer of at least 1, got 0"),
        ({"orth_reg_weight": -1}, "orth_reg_weight not negative"),
        ({"orth_reg_weight": float("inf")}, "orth_reg_weight not negative"),
        ({"lora_alpha": 0}, "lora_alpha must be positive"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be positive"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout must be in \[0, 1\), got -0.1"),
        ({"bias": "all"}, "bias must be 'none', got 'all'; BitFit trains biases"),
    ],
)
def test_an_impossible_schedule_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AdaLoraConfig(target_modules=["c_attn"], **(SCHEDULE | changes))


def test_the_allocator_works_without_a_peft_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    layers = add_adalora(model, AdaLoraConfig(target_modules=["0"], **SCHEDULE))
    allocator = RankAllocator(layers, AdaLoraConfig(target_modules=["0"], **SCHEDULE))
    for step in range(1, 11):
        model(torch.randn(9, 6)).square().sum().backward()
        with torch.no_grad():
            for p in layers["0"].parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad
        allocator.update_and_allocate(step)
        model.zero_grad()
    assert allocator.ranks() == {"0": 2}


def test_importance_uncertainty_and_scores_are_equations_3_and_4():
    """Two calls on one layer of rank 2, (in, out) = (2, 1), computed by hand."""
    config = AdaLoraConfig(
        init_r=2, target_r=1, tinit=5, total_step=10, beta1=0.5, beta2=0.75, target_modules=["0"]
    )
    layer = SVDLinear(nn.Linear(2, 1).double(), config)
    layer.lora_A.data = torch.tensor([[1.0, 2.0], [3.0, -4.0]]).double()
    layer.lora_E.data = torch.tensor([[0.5], [-1.0]]).double()
    layer.lora_B.data = torch.tensor([[2.0, 1.0]]).double()
    allocator = RankAllocator({"0": layer}, config)
    layer.lora_A.grad = torch.tensor([[2.0, 1.0], [0.0, 1.0]]).double()
    layer.lora_E.grad = torch.tensor([[4.0], [1.0]]).double()
    layer.lora_B.grad = torch.tensor([[-1.0, 4.0]]).double()
    allocator.update_and_allocate(1)  # I: A [[2, 2], [0, 4]], E [[2], [1]], B [[2, 4]]
    assert allocator.importance["0", "A"].tolist() == [[1, 1], [0, 2]]
    assert allocator.uncertainty["0", "A"].tolist() == [[0.25, 0.25], [0, 0.5]]
    assert allocator.importance["0", "E"].tolist() == [[1], [0.5]]
    assert allocator.uncertainty["0", "E"].tolist() == [[0.25], [0.125]]
    assert allocator.importance["0", "B"].tolist() == [[1, 2]]
    assert allocator.uncertainty["0", "B"].tolist() == [[0.25, 0.5]]
    # triplet 0: 1 · 0.25 + mean(0.25, 0.25) + 0.25;  triplet 1: 0.5 · 0.125 + mean(0, 1) + 1
    assert allocator.scores()["0"].tolist() == [0.75, 1.5625]
    layer.lora_E.grad = torch.zeros(2, 1).double()
    allocator.update_and_allocate(2)  # I of E is 0: Ī = 0.5 Ī, Ū = 0.75 Ū + 0.25 |0 - Ī|
    assert allocator.importance["0", "E"].tolist() == [[0.5], [0.25]]
    assert allocator.uncertainty["0", "E"].tolist() == [[0.3125], [0.15625]]
    assert allocator.ranks() == {"0": 2}
    allocator.prune(1)
    assert allocator.kept["0"].tolist() == [False, True], "the lower score must be pruned"
    assert layer.lora_E.tolist() == [[0.5], [-1.0]], "pruning only sets the mask"
    allocator.reapply_mask()
    assert layer.lora_E.tolist() == [[0.0], [-1.0]]
    assert allocator.ranks() == {"0": 1}


def test_beta_1_weighs_the_old_importance_and_the_rest_the_new_sensitivity():
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=9, beta1=0.75, beta2=0.5)
    layer = SVDLinear(nn.Linear(2, 1), config)
    allocator = RankAllocator({"0": layer}, config)
    for p in (layer.lora_A, layer.lora_E, layer.lora_B):
        p.data, p.grad = torch.ones_like(p), torch.full_like(p, 4.0)
    allocator.update_importance()  # I = 4, so Ī = 0.25 · 4 and Ū = 0.5 |4 - 1|
    assert allocator.importance["0", "E"].tolist() == [[1], [1]]
    assert allocator.uncertainty["0", "E"].tolist() == [[1.5], [1.5]]
    layer.lora_E.grad.zero_()
    allocator.update_importance()  # I = 0, so Ī = 0.75 · 1 and Ū = 0.5 · 1.5 + 0.5 |0 - 0.75|
    assert allocator.importance["0", "E"].tolist() == [[0.75], [0.75]]
    assert allocator.uncertainty["0", "E"].tolist() == [[1.125], [1.125]]
    for smoothed in (*allocator.importance.values(), *allocator.uncertainty.values()):
        assert not smoothed.requires_grad, "the graphs of all past steps would stay in memory"


def test_the_penalty_is_computed_on_the_device_of_the_layers():
    layer = SVDLinear(nn.Linear(3, 2, device="meta"), AdaLoraConfig(total_step=9))
    assert orthogonality({"0": layer}).device.type == "meta"


def by_hand(**changes) -> SVDLinear:
    """W = [[1, 2], [3, 4]] and b = [10, 20]; B diag(E) A = [[2, 0], [-4, -4]], and the scale is
    3 / (2 + 1e-5) = 1.5."""
    config = AdaLoraConfig(
        **({"init_r": 2, "target_r": 1, "total_step": 9, "lora_alpha": 3} | changes)
    )
    layer = SVDLinear(nn.Linear(2, 2), config)
    layer.base_layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    layer.base_layer.bias.data = torch.tensor([10.0, 20.0])
    layer.lora_A.data = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    layer.lora_E.data = torch.tensor([[1.0], [-1.0]])
    layer.lora_B.data = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    return layer


def test_the_update_of_adalora_is_b_diag_e_a():
    layer, x = by_hand(), torch.tensor([[1.0, -2.0]], requires_grad=True)
    close = functools.partial(pytest.approx, abs=1e-3)
    y = layer(x)  # W x + b = [7, 15], and the update times x is 1.5 [2, 4]
    assert y.tolist()[0] == close([10, 21]), "the update must be B diag(E) A · α / init_r"
    y.sum().backward()
    assert x.grad.tolist()[0] == close([1, 0]), "the column sums of W' = [[4, 2], [-3, -2]]"
    layer.eval().merge()
    assert layer.merged_weight.flatten().tolist() == close([4, 2, -3, -2]), "W + update"
    assert layer(x).tolist()[0] == close([10, 21]), "a merged layer must compute W' x + b"
    assert "merged_weight" not in layer.state_dict(), "W' is computed: it is not saved"
    assert layer.base_layer.weight.tolist() == [[1, 2], [3, 4]], "merging must not change W"
    layer.unmerge()
    layer.lora_E.data.zero_()
    assert layer(x).tolist() == [[7, 15]], "an unmerged layer must use W, A, E and B again"
    merged = merge_into_base(by_hand())
    assert type(merged) is nn.Linear
    assert merged.weight.flatten().tolist() == close([4, 2, -3, -2])


def test_the_penalty_measures_how_far_a_and_b_are_from_orthonormal():
    """A Aᵀ - 1 = [[0, 1], [1, 1]] has the norm √3, and Bᵀ B - 1 = [[3, 0], [0, 15]] has √234."""
    penalty = orthogonality({"0": by_hand()}).item()
    assert penalty == pytest.approx((3**0.5 + 234**0.5) / 2), "the mean over A and B, not squared"


def test_a_new_svd_layer_has_random_factors_and_a_zero_e():
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=9, target_r=1, total_step=9)
    layer = SVDLinear(nn.Linear(200, 300), config)
    a, e, b = layer.lora_A, layer.lora_E, layer.lora_B
    assert (a.shape, e.shape, b.shape) == ((9, 200), (9, 1), (300, 9))
    assert not e.any(), "E must start at zero: a new adapter must not change the output"
    assert a.std().item() == pytest.approx(0.02, rel=0.05)
    assert b.std().item() == pytest.approx(0.02, rel=0.05)
    half = SVDLinear(nn.Linear(3, 3).bfloat16(), config)
    assert {p.dtype for p in (half.lora_A, half.lora_E, half.lora_B)} == {torch.float32}
    assert half(torch.ones(1, 3).bfloat16()).dtype == torch.bfloat16
    half.merge()
    assert half.merged_weight.dtype == torch.bfloat16, "W' must have the dtype of W"


def test_dropout_of_adalora_acts_on_the_adapters_input_only():
    """W x + b = 14 stays. With p = 0.5, an entry of x is dropped or doubled: A x is 0, 2 or 4."""
    torch.manual_seed(0)
    settings = {"init_r": 2, "target_r": 1, "total_step": 9, "lora_dropout": 0.5}
    layer = SVDLinear(nn.Linear(2, 1), AdaLoraConfig(lora_alpha=2 + 1e-5, **settings), r=1)
    layer.base_layer.weight.data = torch.tensor([[1.0, 10.0]])
    layer.base_layer.bias.data = torch.tensor([3.0])
    for p in (layer.lora_A, layer.lora_E, layer.lora_B):
        p.data = torch.ones_like(p)
    x = torch.ones(1, 2)
    found = {round(layer(x).item(), 3) for _ in range(50)}
    assert found == {14, 16, 18}, "dropout must act on the adapter's input only"
    assert {round(layer.eval()(x).item(), 3) for _ in range(50)} == {16}


def test_a_conv1d_of_transformers_gets_an_svd_in_its_own_orientation():
    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(5, 3)), torch.randn(2, 3)
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["0"])
    layer = add_adalora(model, config)["0"]
    assert (layer.in_features, layer.out_features) == (3, 5)
    nn.init.normal_(layer.lora_E, std=50)
    y = model(x)
    assert torch.allclose(y, layer.base_layer(x) + x @ layer.delta().T, atol=1e-5)
    assert layer.weight.shape == (3, 5), "`weight` must be stored as W is"
    assert torch.allclose(x @ layer.weight + layer.bias, y, atol=1e-5)
    layer.eval().merge()
    assert torch.allclose(model(x), y, atol=1e-5)
    assert torch.allclose(merge_into_base(layer)(x), y, atol=1e-5)


class Schedule(RankAllocator):
    """An allocator that only writes down what it does in which step."""

    def __init__(self, config):
        super().__init__({}, config)
        self.done = {"importance": [], "prune": [], "mask": []}

    def update_importance(self):
        self.done["importance"].append(self.step)
        self.importance = {("0", "A"): None}

    def prune(self, budget):
        self.done["prune"].append(self.step)

    def reapply_mask(self):
        self.done["mask"].append(self.step)


def test_the_allocator_prunes_every_delta_t_steps_between_tinit_and_tfinal():
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=3, tfinal=2, deltaT=3, total_step=12)
    allocator = Schedule(config)
    for step in range(1, 13):
        allocator.update_and_allocate(step)
    assert allocator.done == {
        "importance": [1, 2, 3, 4, 5, 6, 7, 8, 9],  # not at the last pruning, step 10
        "prune": [6, 9, 10],  # 3 is still tinit
        "mask": [6, 9, 10, 11, 12],  # between two prunings, E may grow back
    }


def test_ties_at_the_threshold_are_pruned_and_unknown_scores_are_not():
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=9)
    layers = {name: SVDLinear(nn.Linear(2, 2), config) for name in "ab"}
    allocator = RankAllocator(layers, config)

    def kept_after(budget, a, b):
        allocator.scores = lambda: {"a": torch.tensor(a), "b": torch.tensor(b)}
        allocator.prune(budget)
        return {name: kept.tolist() for name, kept in allocator.kept.items()}

    assert kept_after(4, [1.0, 2.0], [3.0, 4.0]) == {}, "the budget is all four: nothing to prune"
    assert kept_after(3, [1.0, 2.0], [3.0, 4.0]) == {"a": [False, True], "b": [True, True]}
    assert kept_after(3, [1.0, 2.0], [1.0, 4.0]) == {"a": [False, True], "b": [False, True]}
    assert kept_after(2, [0.0, 0.0], [0.0, 0.0]) == {"a": [True, True], "b": [True, True]}
    nan = torch.nan
    assert kept_after(3, [nan, nan], [nan, nan]) == {"a": [True, True], "b": [True, True]}


@pytest.mark.parametrize(
    "targets", [["c_porj"], ["proj"], "c_attn", r"transformer\.h\.0\.attn\.c_at", ["ln_1"], None]
)
def test_add_adalora_without_any_match_is_refused(gpt, targets):
    with pytest.raises(ValueError, match=r"target_modules=.* matches no linear layer"):
        add_adalora(gpt, AdaLoraConfig(target_modules=targets, **SCHEDULE))
    assert all(p.requires_grad for p in gpt.parameters())


def test_add_adalora_finds_targets_by_ending_by_regex_and_by_all_linear(gpt):
    def found(targets):
        config = AdaLoraConfig(target_modules=targets, **SCHEDULE)
        return list(add_adalora(copy.deepcopy(gpt), config))

    assert found(["mlp.c_proj"]) == [f"transformer.h.{i}.mlp.c_proj" for i in range(2)]
    assert found(r".*h\.1\.attn\.c_a.*") == ["transformer.h.1.attn.c_attn"]
    assert len(found("all-linear")) == 8, "all-linear must leave out the output head"
    add_adalora(gpt, CONFIGS["adalora"]())
    with pytest.raises(ValueError, match="already has an adapter: remove it before adding another"):
        add_adalora(gpt, CONFIGS["adalora"]())


def test_the_output_of_adalora_is_equation_1():
    torch.manual_seed(0)
    config = AdaLoraConfig(lora_alpha=3, target_modules=["x"], **SCHEDULE)
    layer = SVDLinear(nn.Linear(7, 5).double(), config)
    nn.init.normal_(layer.lora_E)
    x = torch.randn(2, 4, 7).double()
    update = layer.lora_B @ torch.diag(layer.lora_E[:, 0]) @ layer.lora_A * 3 / (4 + 1e-5)
    y = x @ (layer.base_layer.weight + update).T + layer.bias
    assert torch.allclose(layer(x), y, rtol=0, atol=1e-14)
    assert SVDLinear(nn.Linear(7, 5), config, r=1).lora_A.shape == (1, 7)


def test_adalora_trains_and_merges_on_a_plain_module_in_float64():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10)).double()
    x = torch.randn(50, 20).double()
    y = torch.randn(50, 10).double()
    plain = model(x)
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=5, tfinal=10, total_step=40, target_modules="all-linear"
    )
    layers = add_adalora(model, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 4 * (20 + 30 + 1) + 4 * (30 + 10 + 1)
    assert torch.equal(model(x), plain), "E must start at zero"
    allocator = RankAllocator(layers, config)
    optimizer = torch.optim.AdamW(trainable, lr=0.05)
    for step in range(1, 41):
        penalty = config.orth_reg_weight * orthogonality(layers)
        (nn.functional.mse_loss(model(x), y) + penalty).backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
    assert sum(allocator.ranks().values()) == 2 * 2
    trained = model(x)
    assert not torch.allclose(trained, plain)
    for layer in layers.values():
        layer.merge()
    with pytest.raises(RuntimeError, match="this layer is merged: call unmerge"):
        model.train()(x)
    assert torch.allclose(model.eval()(x), trained, rtol=0, atol=1e-12)
    for layer in layers.values():
        layer.unmerge()
    assert torch.equal(model(x), trained)


# --- prompt methods ---


ENCODERS = {
    "PROMPT_TUNING": PromptEmbedding,
    "P_TUNING": PromptEncoder,
    "PREFIX_TUNING": PrefixEncoder,
}


@pytest.mark.parametrize("name", PROMPTS)
def test_an_encoder_alone_gives_the_loss_and_logits_of_a_peft_model(gpt, ids, name):
    config = CONFIGS[name]()
    config.token_dim = None
    before = copy.deepcopy(vars(config))
    gpt.requires_grad_(False)
    plain = gpt(ids).logits
    torch.manual_seed(0)
    encoder = ENCODERS[config.peft_type](gpt, config)
    assert vars(config) == before, "the constructor wrote into the config"
    out = encoder(gpt, ids, labels=ids)
    torch.manual_seed(0)
    model = get_peft_model(gpt, config)
    loss, logits = model(ids, labels=ids).values()
    assert torch.equal(out.loss, loss)
    assert torch.equal(out.logits, logits)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        loss = encoder(gpt, ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert loss < out.loss
    assert torch.equal(gpt(ids).logits, plain), "training the encoder changed the model"


@pytest.mark.parametrize("name", ["prefix", "prefix_projection"])
def test_keep_output_of_a_prefix_discards_the_network_and_keeps_the_logits(gpt, ids, name):
    model = get_peft_model(gpt, CONFIGS[name]())
    train(model, ids)
    before = model(ids).logits
    model.prompt_encoder.keep_output()
    assert torch.allclose(model(ids).logits, before, atol=1e-6)
    assert sum(p.numel() for p in model.prompt_encoder.parameters()) == 5 * 2 * 2 * 24
    assert not any(p.requires_grad for p in model.parameters())
    encoder = model.prompt_encoder.prompt()
    assert encoder.shape == (1, 5, 2 * 2 * 24)


@pytest.mark.parametrize("name", PROMPTS)
def test_one_virtual_token_is_allowed(gpt, ids, name):
    config = dataclasses.replace(CONFIGS[name](), num_virtual_tokens=1)
    model = get_peft_model(gpt, config)
    assert model(ids).logits.shape == (3, 10, 61)
    assert len(model.adapters["default"].tensors()["prompt_embeddings"]) == 1


def test_prompts_start_from_the_vocabulary_or_from_a_text(trained_base):
    words = trained_base.get_input_embeddings().weight
    torch.manual_seed(0)
    config = PromptTuningConfig(num_virtual_tokens=6, prompt_tuning_init="SAMPLE_VOCAB")
    prompt = get_peft_model(trained_base, config).prompt_encoder.prompt()
    assert all((words == row).all(1).any() for row in prompt)
    folder = DATA / "base" / "1m"
    ids = load_tokenizer(folder).encode("The name is").ids
    for p in (2, 7):
        config = PromptTuningConfig(
            num_virtual_tokens=p, prompt_tuning_init="TEXT", prompt_tuning_init_text="The name is",
            tokenizer_name_or_path=str(folder),
        )  # fmt: skip
        prompt = get_peft_model(GPT.from_pretrained(folder), config).prompt_encoder.prompt()
        assert torch.equal(prompt, words[(ids * 4)[:p]])


def test_random_tokens_come_from_the_whole_vocabulary():
    config = PromptTuningConfig(num_virtual_tokens=300, prompt_tuning_init="SAMPLE_VOCAB")
    assert set(initial_tokens(config, 5).tolist()) == {0, 1, 2, 3, 4}


def test_the_text_to_start_from_is_only_read_for_a_new_prompt(gpt, tmp_path):
    config = PromptTuningConfig(
        num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_text="a",
        tokenizer_name_or_path=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read: .*No such file"):
        get_peft_model(gpt, config)
    config.inference_mode = True  # its values are loaded next
    assert PromptEmbedding(gpt, config).prompt().shape == (2, 24)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_bfloat16_base_gets_a_float32_prompt(gpt, ids, name):
    model = get_peft_model(gpt.bfloat16(), CONFIGS[name]())
    assert {p.dtype for p in model.prompt_encoder.parameters()} == {torch.float32}
    out = model(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad.any() for p in model.prompt_encoder.parameters() if p.dim() > 1)


def test_a_prompt_that_starts_from_tokens_has_values_of_its_own(gpt):
    words = gpt.bfloat16().transformer.wte.weight
    config = PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB")
    before = words.detach().clone()
    prompt = PromptEmbedding(gpt, config).embedding.weight
    assert prompt.is_leaf
    assert prompt.dtype == torch.float32
    prompt.data.zero_()
    assert torch.equal(words, before)


@pytest.mark.parametrize("name", ["p_tuning", "p_tuning_lstm"])
def test_the_prompt_is_equation_1_of_p_tuning(gpt, name):
    encoder = get_peft_model(gpt, CONFIGS[name]()).prompt_encoder
    h = encoder.embedding.weight
    if name == "p_tuning_lstm":
        lstm = nn.LSTM(24, 7, num_layers=2, bidirectional=True)
        lstm.load_state_dict(encoder.lstm_head.state_dict())
        h = lstm(h)[0]  # (p, 2 w)
    weights = list(encoder.mlp_head.parameters())
    for i in range(0, len(weights), 2):
        h = (h.relu() if i else h) @ weights[i].T + weights[i + 1]
    assert torch.allclose(encoder.prompt(), h, atol=1e-6), "P must be MLP(H) with ReLU between"
    assert len(weights) == (4 if name == "p_tuning_lstm" else 6)


def test_the_prompt_is_equation_2_of_prefix_tuning(gpt):
    encoder = get_peft_model(gpt, CONFIGS["prefix_projection"]()).prompt_encoder
    w1, b1, w2, b2 = encoder.transform.parameters()
    p = torch.tanh(encoder.embedding.weight @ w1.T + b1) @ w2.T + b2
    assert torch.allclose(encoder.prompt(2), p.expand(2, -1, -1), atol=1e-6)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_loss_is_that_of_the_real_tokens_at_their_positions(gpt, ids, name):
    """By hand: the last virtual token predicts the first real one; a prefix predicts nothing."""
    model = get_peft_model(gpt, CONFIGS[name]()).eval()
    loss, logits = model(ids, labels=ids).values()
    predicted = logits[:, :-1]
    targets = ids[:, 1:]
    if not name.startswith("prefix"):
        prompt = model.prompt_encoder.prompt().expand(3, -1, -1)
        words = torch.cat((prompt, gpt.transformer.wte(ids)), dim=1)
        predicted = gpt(inputs_embeds=words).logits[:, 4:-1]
        targets = ids
    by_hand = nn.functional.cross_entropy(predicted.transpose(1, 2), targets)
    assert torch.allclose(loss, by_hand)
    positions = torch.arange(10)[None].expand(3, 10)
    assert torch.allclose(model(ids, position_ids=positions).logits, logits, atol=1e-6)
    assert not torch.allclose(model(ids, position_ids=positions + 1).logits, logits, atol=1e-3)
    embedded = model(inputs_embeds=gpt.transformer.wte(ids)).logits
    assert torch.allclose(embedded, logits, atol=1e-6)
    with pytest.raises(ValueError, match=r"use_cache cannot be used .*: call generate\(\)"):
        model(ids, use_cache=True)


@pytest.mark.parametrize("name", ["p_tuning", "p_tuning_lstm"])
def test_keep_output_discards_the_network_and_keeps_the_logits(gpt, ids, name):
    config = CONFIGS[name]()
    config.encoder_dropout = 0.5
    model = get_peft_model(gpt, config)
    train(model, ids)
    with torch.no_grad():
        before = model(ids).logits
        model.train().prompt_encoder.keep_output()
        assert torch.equal(model(ids).logits, before)
    assert sum(p.numel() for p in model.prompt_encoder.parameters()) == 5 * 24


def test_a_prefix_of_zeros_differs_from_no_prefix(gpt, ids):
    plain = gpt(ids).logits
    model = get_peft_model(gpt, PrefixTuningConfig(num_virtual_tokens=5, init_weights="zero"))
    positions = torch.arange(10)[None] - 5  # the positions without a prefix
    moved = model(ids, position_ids=positions).logits
    assert not torch.allclose(moved, plain, atol=1e-3)


def test_a_network_of_zeros_has_a_last_layer_of_zeros_that_gets_gradients(gpt, ids):
    config = PrefixTuningConfig(5, prefix_projection=True, init_weights="zero")
    model = get_peft_model(gpt, config)
    encoder = model.prompt_encoder
    assert not encoder.prompt().any()
    assert encoder.embedding.weight.any()
    assert encoder.transform[0].weight.any()
    model(ids, labels=ids).loss.backward()
    assert encoder.transform[-1].weight.grad.any()


def test_a_prefix_can_hold_the_keys_and_values_of_real_tokens(gpt, ids):
    """With the cache of five real tokens as the prefix, the other logits are those of the text."""
    model = get_peft_model(gpt.double(), PrefixTuningConfig(num_virtual_tokens=5)).double()
    with model.disable_adapter():
        whole = model(ids[:1]).logits
        cache = model(ids[:1, :5], use_cache=True).past_key_values
    rows = torch.stack([half[0] for pair in cache for half in pair])  # (2 l, h, p, k)
    model.prompt_encoder.embedding.weight.data = rows.permute(2, 0, 1, 3).reshape(5, -1)
    assert torch.allclose(model(ids[:1, 5:]).logits, whole[:, 5:], atol=1e-12)


def test_p_tuning_v2_equals_prefix_tuning_without_a_projection(gpt, ids):
    """v2 puts p vectors in front of every layer's input, so attention sees their keys and values.
    A prefix that holds the same keys and values gives the same logits."""
    model = get_peft_model(gpt.double(), PrefixTuningConfig(num_virtual_tokens=5)).double()
    deep = [torch.randn(5, 24).double() for _ in range(2)]  # one prompt per layer, (p, d)
    rows = []
    for block, prompt in zip(gpt.transformer.h, deep, strict=True):
        _, keys, values = block.attn.c_attn(block.ln_1(prompt)).chunk(3, dim=-1)  # (p, d) each
        rows += [keys, values]
    model.prompt_encoder.embedding.weight.data = torch.cat(rows, dim=1).detach()
    x = gpt.transformer.wte(ids) + gpt.transformer.wpe(torch.arange(5, 15))
    mask = gpt._mask(None, 3, 15, 0, "cpu")
    assert mask is None
    for block, prompt in zip(gpt.transformer.h, deep, strict=True):
        both = torch.cat((prompt.expand(3, 5, 24), x), dim=1)  # v2: in front of the layer's input
        x = block(both, None, None)[0][:, 5:]  # the outputs at the prompt's positions are dropped
    logits = gpt.lm_head(gpt.transformer.ln_f(x))
    assert torch.allclose(model(ids).logits, logits, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("prompt", {"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive .*, got 0"),
        ("p_tuning", {}, "num_virtual_tokens must be a positive integer, got None"),
        ("p_tuning", {"num_virtual_tokens": 0}, "num_virtual_tokens must be .*, got 0"),
        ("prompt", {"num_virtual_tokens": True}, "num_virtual_tokens must be .*, got True"),
        ("prefix", {"num_virtual_tokens": 0}, "num_virtual_tokens must be .*, got 0"),
        ("p_tuning", {"num_virtual_tokens": 1, "encoder_hidden_size": 0}, "hidden_size .*, got 0"),
        ("p_tuning", {"num_virtual_tokens": 1, "encoder_num_layers": 0}, "num_layers .*, got 0"),
        ("prefix", {"num_virtual_tokens": 1, "encoder_hidden_size": 0}, "hidden_size .*, got 0"),
        ("prefix", {"num_virtual_tokens": -1}, "num_virtual_tokens must be a positive .*, got -1"),
        (
            "p_tuning",
            {"num_virtual_tokens": 2, "encoder_reparameterization_type": "GRU"},
            "encoder_reparameterization_type must be MLP or LSTM, got 'GRU'",
        ),
        (
            "prompt",
            {"num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"},
            "TEXT needs prompt_tuning_init_text and tokenizer_name_or_path",
        ),
        (
            "prompt",
            {"num_virtual_tokens": 2, "prompt_tuning_init": "NOISE"},
            "prompt_tuning_init must be RANDOM, SAMPLE_VOCAB or TEXT, got NOISE",
        ),
        (
            "prefix",
            {"num_virtual_tokens": 2, "init_weights": "one"},
            "init_weights must be None or 'zero', got 'one'",
        ),
    ],
)
def test_a_prompt_config_names_a_bad_setting_and_its_value(kind, settings, message):
    config = type(CONFIGS[kind]())
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_that_leaves_no_room_in_the_context_is_refused(gpt, ids, name):
    config = CONFIGS[name]()
    config.num_virtual_tokens = 32
    with pytest.raises(ValueError, match="32 virtual tokens leave no room in a context of 32"):
        get_peft_model(gpt, config)
    assert all(p.requires_grad for p in gpt.parameters())
    config.num_virtual_tokens = 25
    model = get_peft_model(gpt, config)
    with pytest.raises(ValueError, match="the context holds 32"):
        model(ids)
    with pytest.raises(
        ValueError,
        match="25 virtual tokens, 2 tokens of input and 6 new tokens exceed the context of 32",
    ):
        model.generate(ids[:, :2], max_new_tokens=6)


def test_a_model_without_embeddings_is_refused():
    with pytest.raises(ValueError, match="Linear has no get_input_embeddings"):
        get_peft_model(nn.Linear(2, 2), CONFIGS["prompt"]())


def test_a_prompt_loaded_without_its_network_can_be_trained(gpt, ids, tmp_path):
    from safetensors.torch import load_file, save_file

    base = copy.deepcopy(gpt)
    model = get_peft_model(gpt, CONFIGS["p_tuning"]())
    train(model, ids)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({"prompt_embeddings": tensors["prompt_embeddings"]}, file)  # as peft writes it
    again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    assert again.get_nb_trainable_parameters()[0] == 5 * 24
    assert not again.peft_config["default"].inference_mode
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-6)
    save_file({"prompt_embeddings": tensors["prompt_embeddings"][:3].contiguous()}, file)
    with pytest.raises(ValueError, match=r"prompt_embeddings is \(3, 24\)"):
        PeftModel.from_pretrained(GPT(tiny_config()), tmp_path)


# --- non-finite gradients ---


@pytest.mark.parametrize("when", ["first", "middle", "always"])
def test_a_step_with_a_gradient_that_is_not_finite_prunes_nothing(gpt, ids, when):
    """As a GradScaler makes them at the start: such a step does not count in the importance."""
    settings = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 8}
    config = AdaLoraConfig(**settings, target_modules=["c_attn", "c_fc"])
    model = get_peft_model(gpt, config).train()
    free = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(free, 0.1)
    bad = {"first": [1, 2, 3], "middle": [4], "always": range(1, 9)}[when]
    for step in range(1, 9):
        model(ids, labels=ids).loss.backward()
        if step in bad:
            free[0].grad[0, 0] = torch.inf if step % 2 else torch.nan
        else:
            optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
        allocator = model.adapters["default"].allocator
        assert all(t.isfinite().all() for t in allocator.importance.values())
        assert all(t.isfinite().all() for t in allocator.uncertainty.values())
    assert sum(model.ranks().values()) == (4 if when == "always" else 2) * 4


def test_a_left_out_step_leaves_importance_and_uncertainty_as_they_were():
    layers = {"0": SVDLinear(nn.Linear(3, 3), AdaLoraConfig(init_r=2, target_r=1, total_step=9))}
    allocator = RankAllocator(layers, AdaLoraConfig(init_r=2, target_r=1, total_step=9))
    for p in (layers["0"].lora_A, layers["0"].lora_E, layers["0"].lora_B):
        p.grad = torch.ones_like(p)
    allocator.update_importance()
    before = copy.deepcopy((allocator.importance, allocator.uncertainty))
    layers["0"].lora_A.grad[0, 0] = torch.inf
    allocator.update_importance()
    for old, new in zip(before, (allocator.importance, allocator.uncertainty), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_ranks_that_are_all_0_are_not_saved(gpt, ids, tmp_path):
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules=["c_attn"])
    model = get_peft_model(gpt, config)
    adapter = model.adapters["default"]
    adapter.allocator.kept = {n: torch.zeros(2, dtype=torch.bool) for n in adapter.layers}
    for do in (lambda: model.save_pretrained(tmp_path), model.merge_and_unload):
        with pytest.raises(RuntimeError, match="pruned all ranks to 0"):
            do()


def test_the_penalty_of_accumulated_batches_counts_once(gpt, ids):
    """Each batch has its share of the penalty: that of its labels in the step's labels."""
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules=["c_attn"])
    model = get_peft_model(gpt, config).train()
    labels = ids.clone()
    labels[0, 4:] = -100
    n = (labels[:, 1:] != -100).sum()
    whole = model(ids, labels=labels).loss
    parts = [
        model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=n).loss for i in range(3)
    ]
    assert torch.allclose(sum(parts), whole, atol=1e-5)


@pytest.mark.parametrize(("kind", "n"), [("ForCausalLM", 4), (None, 5)])
def test_the_share_of_the_penalty_counts_labels_as_the_loss_does(kind, n):
    """The Trainer leaves out each row's first label for causal models only; other models may have
    one label per row."""

    class Classifier(nn.Module):
        loss_type = kind

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x, labels, num_items_in_batch=None):
            return {"loss": self.fc(x).sum() * 0}

    config = AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules=["fc"])
    model = get_peft_model(Classifier(), config).train()
    labels = torch.tensor([[1, 2, 0, 1, 2]])
    out = model(torch.randn(1, 6), labels=labels, num_items_in_batch=10)
    assert torch.allclose(out["loss"], model.penalty() * n / 10)
    if kind is None:
        out = model(torch.randn(2, 6), labels=torch.tensor([1, 2]), num_items_in_batch=4)
        assert torch.allclose(out["loss"], model.penalty() * 2 / 4)


def test_a_penalty_that_is_in_no_loss_is_announced(gpt, ids):
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules=["c_attn"])
    model = get_peft_model(gpt, config).train()
    with pytest.warns(UserWarning, match=r"penalty is in no loss: add model.penalty\(\)"):
        model(ids)


# --- inputs that virtual tokens do not support ---


@pytest.mark.parametrize("name", PROMPTS)
def test_packed_rows_and_masks_of_other_shapes_are_refused(gpt, ids, name):
    model = get_peft_model(gpt, CONFIGS[name]()).eval()
    packed = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5]).expand(3, 10)
    with pytest.raises(ValueError, match=r"position_ids that restart \(packing\)"):
        model(ids, position_ids=packed)
    with pytest.raises(ValueError, match=r"attention_mask must be \(b, t\)"):
        model(ids, attention_mask=torch.ones(3, 1, 10, 10))
    with pytest.raises(ValueError, match="return_dict=False cannot be used with a prompt"):
        model(ids, return_dict=False)


@pytest.mark.parametrize("name", ["prompt", "p_tuning"])
def test_other_inputs_per_token_are_refused(gpt, ids, name):
    model = get_peft_model(gpt, CONFIGS[name]()).eval()
    with pytest.raises(ValueError, match="token_type_ids cannot be used with virtual tokens"):
        model(ids, token_type_ids=torch.zeros_like(ids))


@pytest.mark.parametrize("name", ["prompt", "p_tuning"])
def test_a_model_without_logits_per_token_is_refused(gpt, name):
    gpt.get_output_embeddings = lambda: None  # as transformers' classifiers
    with pytest.raises(ValueError, match="no logits per token, which prompt"):
        get_peft_model(gpt, CONFIGS[name]())


def test_a_prompt_starts_from_what_the_embedding_returns(gpt, ids):
    """In Gemma 3 that is not a row of its weight, but a multiple of it."""

    class Doubled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    doubled = Doubled(61, 24)
    doubled.weight = gpt.transformer.wte.weight
    gpt.transformer.wte = doubled
    config = PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB")
    prompt = get_peft_model(gpt, config).prompt_encoder.prompt()
    rows = 2 * doubled.weight
    assert all((row == rows).all(dim=1).any() for row in prompt)


class WritesItself(GPT):
    """A model with a `generate` of its own, as nanoGPT has: no cache, arguments by position."""

    def generate(self, input_ids, n=6):
        for _ in range(n):
            new = self(input_ids).logits[:, -1:].argmax(-1)
            input_ids = torch.cat((input_ids, new), dim=1)
        return input_ids


def continued(model, ids, n=6) -> torch.Tensor:
    """Greedy continuation by full forward passes without a cache."""
    for _ in range(n):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.mark.parametrize("name", PROMPTS)
def test_a_generate_without_a_cache_gets_the_prompt_in_every_pass(ids, name):
    torch.manual_seed(0)
    model = get_peft_model(WritesItself(tiny_config()), CONFIGS[name]()).eval()
    assert torch.equal(model.generate(ids), continued(model, ids))


@pytest.mark.parametrize("name", PROMPTS)
def test_threads_and_calls_during_generation_do_not_disturb_each_other(gpt, ids, name):
    gpt.config.eos_token_id = None
    model = get_peft_model(gpt, CONFIGS[name]()).eval()
    with torch.no_grad():
        expected, plain = continued(model, ids), model(ids).logits
        with ThreadPoolExecutor(4) as pool:
            generated = [pool.submit(model.generate, ids, max_new_tokens=6) for _ in range(8)]
            called = [pool.submit(lambda: model(ids).logits) for _ in range(8)]
        assert all(torch.equal(one.result(), expected) for one in generated)
        assert all(torch.allclose(one.result(), plain, atol=1e-5) for one in called)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_generate_that_never_calls_forward_is_refused(gpt, ids, name):
    """Its tokens would be those of the base."""
    gpt.generate = lambda input_ids: input_ids
    model = get_peft_model(gpt, CONFIGS[name]())
    with pytest.raises(RuntimeError, match="generate does not call its forward pass"):
        model.generate(ids)
    gpt.generate_batch = lambda input_ids: input_ids
    with pytest.raises(ValueError, match=r"generate_batch cannot be used with a prompt method"):
        model.generate_batch(ids)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (PromptEncoderConfig, {"encoder_dropout": 0.1}, "are for the LSTM, not the MLP"),
        (PromptEncoderConfig, {"encoder_num_layers": 3}, "are for the LSTM, not the MLP"),
        (
            PromptEncoderConfig,
            {"encoder_dropout": 1.0, "encoder_reparameterization_type": "LSTM"},
            r"encoder_dropout must be in \[0, 1\), got 1.0",
        ),
        (
            PromptEncoderConfig,
            {"encoder_dropout": -0.1, "encoder_reparameterization_type": "LSTM"},
            r"encoder_dropout must be in \[0, 1\), got -0.1",
        ),
        (
            PromptTuningConfig,
            {"prompt_tuning_init_text": "abc"},
            "prompt_tuning_init_text has no effect with prompt_tuning_init=RANDOM",
        ),
        (
            PromptTuningConfig,
            {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "abc"},
            "TEXT needs prompt_tuning_init_text and tokenizer_name_or_path",
        ),
        (PrefixTuningConfig, {"encoder_hidden_size": 2.5}, "must be a positive integer, got 2.5"),
    ],
)
def test_a_setting_without_effect_is_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(num_virtual_tokens=3, **settings)


def test_the_smallest_allowed_settings_are_accepted():
    smallest = {"target_r": 1, "init_r": 2, "tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}
    config = AdaLoraConfig(**smallest, orth_reg_weight=0, lora_alpha=1e-9, lora_dropout=0)
    assert vars(config).items() >= smallest.items()
    AdaLoraConfig(total_step=3, tinit=1, tfinal=1)  # one step is left for pruning
    with pytest.raises(ValueError, match="tinit 1 and tfinal 1 leave no step of total_step 2"):
        AdaLoraConfig(total_step=2, tinit=1, tfinal=1)
    lstm = {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}
    PromptEncoderConfig(1, encoder_hidden_size=1, encoder_dropout=0.9, **lstm)
    PrefixTuningConfig(1, encoder_hidden_size=1)


def test_probing_the_cache_leaves_the_mode_of_every_module(gpt):
    gpt.train().transformer.drop.eval()
    get_peft_model(gpt, CONFIGS["prefix"]())
    assert gpt.transformer.h[0].training
    assert not gpt.transformer.drop.training


# --- as transformers' models behave ---


class Layer:
    """One layer of a cache; `keys` and `values` are (b, h, p, k)."""

    def __init__(self):
        self.keys = self.values = None
        self.is_initialized = False


class Cache:
    """As transformers' DynamicCache: an object that layers write into."""

    def __init__(self, n: int = 2):
        self.layers = [Layer() for _ in range(n)]

    def update(self, keys, values, i: int):
        layer = self.layers[i]
        if layer.is_initialized:
            keys = torch.cat((layer.keys, keys), dim=2)
            values = torch.cat((layer.values, values), dim=2)
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        return keys, values


class WithCache(GPT):
    """Our GPT with such a cache, and with the name that transformers plans for it."""

    def forward(self, input_ids=None, attention_mask=None, cache=None, use_cache=False, **inputs):
        filled = cache is not None and cache.layers[0].is_initialized
        pairs = tuple((layer.keys, layer.values) for layer in cache.layers) if filled else None
        out = super().forward(
            input_ids, attention_mask, past_key_values=pairs, use_cache=use_cache, **inputs
        )
        new = Cache() if use_cache else None
        for i, (keys, values) in enumerate(out.past_key_values or ()):
            new.update(keys, values, i)
        return types.SimpleNamespace(loss=out.loss, logits=out.logits, cache=new)

    def generate(self, input_ids, n: int = 6, use_cache: bool = True):
        """Greedily, as transformers: the first pass gets an empty cache, later ones one token."""
        cache, new = Cache(), input_ids
        for _ in range(n):
            out = self(input_ids=new, cache=cache, use_cache=use_cache)
            cache = out.cache
            token = out.logits[:, -1:].argmax(-1)
            input_ids = torch.cat((input_ids, token), dim=1)
            new = token if use_cache else input_ids
        return input_ids


@pytest.mark.parametrize("name", PROMPTS)
def test_models_with_a_cache_object_get_the_same_logits_and_tokens(gpt, ids, name):
    other = WithCache(gpt.config)
    other.load_state_dict(gpt.state_dict())
    models = []
    for base in (gpt, other):
        torch.manual_seed(0)
        models.append(get_peft_model(base, CONFIGS[name]()).eval())
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    expected = continued(models[0], ids)
    assert torch.equal(models[1].generate(ids), expected)
    assert torch.equal(models[1].generate(ids, use_cache=False), expected)


class Tower(nn.Module):
    """A model that embeds tokens and returns a given cache; no more than `probe` needs."""

    def __init__(self, cache, **settings):
        super().__init__()
        self.wte, self.cache = nn.Embedding(11, 24), cache
        self.config = types.SimpleNamespace(**settings)

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids, use_cache):
        assert use_cache
        assert not self.training
        assert not torch.is_grad_enabled()
        return types.SimpleNamespace(past_key_values=self.cache)


def cache_of(*shapes) -> Cache:
    """A cache with one layer per shape (heads, width) of keys and (heads, width) of values."""
    cache = Cache(0)
    for keys, values in shapes:
        cache.layers.append(Layer())
        for name, shape in (("keys", keys), ("values", values)):
            tensor = None if shape is None else torch.zeros(1, shape[0], 1, shape[1])
            setattr(cache.layers[-1], name, tensor)
    return cache


def test_the_prefix_is_trained_in_float32_and_passed_in_the_models_dtype():
    model = GPT(tiny_config()).bfloat16()
    encoder = PrefixEncoder(model, PrefixTuningConfig(num_virtual_tokens=2))
    assert encoder.embedding.weight.dtype == torch.float32
    assert {t.dtype for pair in encoder.past(model, 1) for t in pair} == {torch.bfloat16}


def test_a_prefix_has_the_shape_of_the_cache_and_not_of_the_model():
    """With grouped queries there are fewer key heads than query heads: d = 2 · 4, not 24."""
    config = PrefixTuningConfig(num_virtual_tokens=5)
    model = get_peft_model(Tower(cache_of(*[((2, 4), (2, 4))] * 3)), config)
    assert model.prompt_encoder.shape == (3, 2, 4)
    assert model.prompt_encoder.embedding.weight.shape == (5, 2 * 3 * 8)
    found = model.peft_config["default"]
    assert (found.num_layers, found.num_attention_heads, found.token_dim) == (3, 2, 8)
    assert found.encoder_hidden_size == 8
    pair = (torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), "more")  # as encoder-decoders have
    assert PrefixEncoder(Tower((pair,)), config).shape == (1, 2, 4)
    found = get_peft_model(Tower(None), PromptEncoderConfig(5)).peft_config["default"]
    assert (found.token_dim, found.encoder_hidden_size) == (24, 24)
    found = get_peft_model(Tower(None), PromptEncoderConfig(5, encoder_hidden_size=7))
    assert found.peft_config["default"].encoder_hidden_size == 7


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (None, "Tower has no cache of keys and values for a prefix"),
        (cache_of(((2, 4), (2, 4)), ((2, 4), (2, 3))), r"in Tower, .* are \[\(2, 3\), \(2, 4\)\]"),
        (cache_of(((2, 4), (2, 4)), ((2, 8), (2, 8))), r"in Tower, .* are \[\(2, 4\), \(2, 8\)\]"),
        (types.SimpleNamespace(layers=[object()]), r"in Tower, .* are \[None\]"),
        (cache_of(((2, 4), (2, 4)), (None, None)), r"in Tower, .* are \[\(2, 4\), None\]"),
    ],
)
def test_a_cache_that_a_prefix_does_not_fit_into_is_refused(cache, message):
    with pytest.raises(ValueError, match=message):
        PrefixEncoder(Tower(cache), PrefixTuningConfig(num_virtual_tokens=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_encoder_decoder": True}, "need a decoder; this is an encoder-decoder model"),
        ({"hidden_size_per_layer_input": 8}, "Tower embeds tokens in every layer"),
        ({"max_position_embeddings": 5}, "5 virtual tokens leave no room in a context of 5"),
        ({"n_positions": 5, "max_position_embeddings": 9}, "no room in a context of 5"),
        ({"get_text_config": lambda: types.SimpleNamespace(n_positions=4)}, "in a context of 4"),
    ],
)
def test_models_that_cannot_take_virtual_tokens_are_refused(settings, message):
    model = Tower(None, **settings)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, PromptTuningConfig(num_virtual_tokens=5))
    assert model.wte.weight.requires_grad


def test_virtual_tokens_need_a_context_longer_than_they_are_and_a_token_embedding():
    config = PromptTuningConfig(num_virtual_tokens=5)
    for settings in ({"max_position_embeddings": 6}, {"max_position_embeddings": 0}, {}):
        get_peft_model(Tower(None, **settings), config)
    model = Tower(None)
    model.wte = nn.Identity()
    with pytest.raises(ValueError, match="Tower has no token embedding, which prompt methods need"):
        get_peft_model(model, config)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_is_made_on_the_device_of_its_base(gpt, name):
    model = get_peft_model(gpt.to("meta"), CONFIGS[name]())
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", PROMPTS)
def test_inputs_become_as_long_as_the_prompt_by_hand(gpt, name):
    """Two virtual tokens, and a row with padding on the left."""
    config = dataclasses.replace(CONFIGS[name](), num_virtual_tokens=2)
    encoder = get_peft_model(gpt, config).prompt_encoder
    row = {"input_ids": [[7, 8, 9]], "attention_mask": [[0, 1, 1]], "labels": [[-100, 8, 9]]}
    row = {key: torch.tensor(value) for key, value in row.items()}
    found = encoder.prepend(gpt, position_ids=torch.tensor([[0, 0, 1]]), **row)
    assert found["attention_mask"].tolist() == [[1, 1, 0, 1, 1]]
    if name.startswith("prefix"):  # nothing is put in front of the tokens
        assert found["labels"].tolist() == [[-100, 8, 9]]
        assert found["position_ids"].tolist() == [[2, 2, 3]]
        assert found["input_ids"].tolist() == [[7, 8, 9]]
        keys, values = found["past_key_values"][1]
        assert keys.shape == values.shape == (1, 3, 2, 8)
    else:
        assert found["labels"].tolist() == [[-100, -100, -100, 8, 9]]
        assert found["position_ids"].tolist() == [[0, 1, 2, 2, 3]]
        words = gpt.transformer.wte(row["input_ids"])
        assert torch.equal(found["inputs_embeds"][:, 2:], words)
        assert torch.equal(found["inputs_embeds"][0, :2], encoder.prompt())
    more = prompt_adapter.after_prompt(2, row["attention_mask"], torch.tensor([[0, 0, 1]]), a=1)
    assert more["attention_mask"].tolist() == [[1, 1, 0, 1, 1]]
    assert more["position_ids"].tolist() == [[2, 2, 3]]
    assert more["a"] == 1
    assert prompt_adapter.after_prompt(2, a=1) == {"a": 1}


def test_generate_sees_the_signature_of_the_models_forward(gpt, ids):
    """transformers' `generate` reads there which inputs it may pass."""

    class Reads(GPT):
        def generate(self, input_ids):
            assert inspect.signature(self.forward) == inspect.signature(super().forward)
            return self(input_ids).logits

    model = get_peft_model(Reads(gpt.config), CONFIGS["prompt"]()).eval()
    assert torch.equal(model.generate(ids)[:, 5:], model(ids).logits)


@pytest.mark.parametrize("name", ["past_key_values", "cache", "use_cache"])
def test_a_prompt_takes_no_cache_of_the_caller(gpt, ids, name):
    model = get_peft_model(gpt, CONFIGS["prompt"]()).eval()
    with pytest.raises(ValueError, match=rf"{name} cannot be used .*: call generate\(\)"):
        model(ids, **{name: ((1,),)})
    assert torch.equal(model(ids, **{name: None}).logits, model(ids).logits)


def test_positions_may_restart_only_with_a_mask(gpt, ids):
    model = get_peft_model(gpt, CONFIGS["prompt"]()).eval()
    mask, rising = torch.ones_like(ids), torch.arange(10).expand(3, 10)
    model(ids, position_ids=rising * 2)
    model(ids, position_ids=(rising - 4).clamp(min=0), attention_mask=mask)  # padding on the left
    with pytest.raises(ValueError, match="position_ids that restart"):
        model(ids, position_ids=rising.clamp(max=8))  # 8, 8 at the end


def test_only_inputs_with_a_value_per_token_are_refused(gpt):
    adapter = get_peft_model(gpt, CONFIGS["prompt"]()).adapters["default"]
    ids = torch.ones(2, 3, dtype=torch.long)
    for given in ({"input_ids": ids}, {"inputs_embeds": torch.ones(2, 3, 24), "input_ids": None}):
        adapter.check_inputs(given | {"n": torch.tensor(4), "rows": torch.ones(2), "flag": True})
        with pytest.raises(ValueError, match="features cannot be used with virtual tokens"):
            adapter.check_inputs(given | {"features": torch.ones(2, 3, 5)})
    adapter.check_inputs({"features": torch.ones(2, 3, 5)})
    prefix = get_peft_model(GPT(gpt.config), CONFIGS["prefix"]()).adapters["default"]
    prefix.check_inputs({"input_ids": ids, "token_type_ids": ids})  # nothing is put in front


def test_a_prefix_is_refused_where_checkpointing_would_drop_it(gpt, ids):
    """transformers' models drop their cache then, in training mode."""
    prefix = get_peft_model(gpt, CONFIGS["prefix"]())
    message = r"drops its cache, and the prefix with it.*call gradient_checkpointing_disable\(\)"
    for name in ("is_gradient_checkpointing", "is_activation_checkpointing"):
        setattr(gpt, name, True)
        for call in (prefix.train(), prefix.generate):
            with pytest.raises(RuntimeError, match=message):
                call(ids)
        prefix.eval()(ids)
    gpt.is_activation_checkpointing = False  # the newer name counts
    prefix.train()(ids)
    gpt.is_activation_checkpointing = True
    prefix.unload()
    get_peft_model(gpt, CONFIGS["prompt"]()).train()(ids)


@pytest.mark.parametrize(
    "name",
    ["past_key_values", "cache_implementation", "prompt_lookup_num_tokens", "assistant_model",
     "assistant_early_exit"],
)  # fmt: skip
def test_options_of_generate_that_a_prompt_would_break_are_refused(gpt, ids, name):
    model = get_peft_model(gpt, CONFIGS["prompt"]())
    settings = types.SimpleNamespace(**{name: 1})
    message = f"generate: {name} cannot be used with a prompt method"
    with pytest.raises(ValueError, match=message):
        model.generate(ids, **{name: 1})
    with pytest.raises(ValueError, match=message):
        model.generate(ids, settings)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, generation_config=settings)
    gpt.generation_config = settings
    with pytest.raises(ValueError, match=message):
        model.generate(ids)
    setattr(settings, name, None)
    assert model.generate(ids, max_new_tokens=1).shape == (3, 11)


def test_prompt_input_and_new_tokens_may_fill_the_context_but_not_exceed_it(gpt, ids):
    """The context is 32; there are 5 virtual tokens and 10 tokens of input."""
    check = get_peft_model(gpt, CONFIGS["prompt"]()).adapters["default"].check_generate
    for args, given in (((ids,), {}), ((), {"input_ids": ids}), ((), {"inputs": ids})):
        check(gpt, args, given | {"max_new_tokens": 17})
        with pytest.raises(ValueError, match=r"5 virtual .* 10 tokens of input and 18 new tokens"):
            check(gpt, args, given | {"max_new_tokens": 18})
    check(gpt, (ids, None, ["a logits processor"]), {"max_new_tokens": 17})
    check(gpt, (), {"max_new_tokens": 27})
    with pytest.raises(ValueError, match="5 virtual tokens, 0 tokens of input and 28 new tokens"):
        check(gpt, (), {"max_new_tokens": 28})
    gpt.config.n_positions = 15
    check(gpt, (ids,), {})
    gpt.config.n_positions = 14
    with pytest.raises(ValueError, match="10 tokens of input and 0 new tokens exceed"):
        check(gpt, (ids,), {})


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_that_is_loaded_frozen_has_no_network(gpt, ids, tmp_path, name):
    model = get_peft_model(copy.deepcopy(gpt), CONFIGS[name]()).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(gpt, tmp_path).eval()
    n = 5 * 2 * 2 * 24 if name.startswith("prefix") else 5 * 24
    assert sum(p.numel() for p in again.prompt_encoder.parameters()) == n
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)


class Answers(nn.Module):
    """A model with an output of any kind, and a loss of 7."""

    def __init__(self, kind):
        super().__init__()
        self.fc, self.kind = nn.Linear(6, 3), kind

    def forward(self, x, labels=None):
        logits = self.fc(x)
        return self.kind(logits.sum() * 0 + 7, logits)


Pair = namedtuple("Pair", ["loss", "logits"])
KINDS = {
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "object": lambda loss, logits: types.SimpleNamespace(loss=loss, logits=logits),
    "named tuple": Pair,
    "tuple": lambda loss, logits: (loss, logits),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_is_added_to_the_loss_of_any_kind_of_output(kind):
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules=["fc"])
    model, x = get_peft_model(Answers(KINDS[kind]), config).train(), torch.randn(2, 6)
    out = model(x, labels=torch.zeros(2))
    loss, logits = (
        out.values() if kind == "dict" else vars(out).values() if kind == "object" else out
    )
    assert type(out) is type(KINDS[kind](1, 2))
    assert torch.equal(loss, 7 + model.penalty())
    assert loss > 7.1
    assert torch.equal(logits, model.base_model.fc(x))


def test_encoder_decoder_models_predict_every_label():
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules=["fc"])
    base = Answers(lambda loss, logits: {"loss": loss})
    base.forward = lambda x, labels, num_items_in_batch: {"loss": base.fc(x).sum() * 0}
    base.loss_type, base.config = "ForCausalLM", types.SimpleNamespace(is_encoder_decoder=True)
    model = get_peft_model(base, config).train()
    labels = torch.tensor([[1, 2, -100, 1, 2]])
    out = model(torch.randn(1, 6), labels=labels, num_items_in_batch=10)
    assert torch.allclose(out["loss"], model.penalty() * 4 / 10)


def test_an_unknown_layer_in_the_rank_pattern_is_named(gpt):
    pattern = {"transformer.h.9.attn.c_attn.lora_E": [True]}
    config = AdaLoraConfig(target_modules=["c_attn"], rank_pattern=pattern, total_step=5)
    with pytest.raises(ValueError, match=r"rank_pattern: 'transformer\.h\.9\..*' is not a target"):
        get_peft_model(gpt, config)


def test_the_whole_penalty_is_added_to_a_loss_that_needs_no_labels():
    """Without labels there is no share of the step's labels, whatever num_items_in_batch is."""
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=5, target_modules=["fc"])
    base = Answers(KINDS["dict"])
    base.forward = lambda x, labels=None, num_items_in_batch=1: {"loss": base.fc(x).sum() * 0}
    model, x = get_peft_model(base, config).train(), torch.randn(2, 6)
    assert torch.equal(model(x, num_items_in_batch=8)["loss"], model.penalty())
    labels = torch.tensor([1, 2])  # 2 of 8; this model has no `loss_type`
    assert torch.equal(model(x, labels=labels, num_items_in_batch=8)["loss"], model.penalty() / 4)


# --- gradients, precision and devices of the prompt methods ---


@pytest.mark.parametrize("name", PROMPTS)
def test_generate_runs_without_gradients_even_if_the_bases_own_does_not(name):
    class Writes(GPT):
        def generate(self, input_ids):
            return self(input_ids).logits

    model = get_peft_model(Writes(tiny_config()), CONFIGS[name]())
    ids = torch.ones(1, 3, dtype=torch.long)
    assert not model.generate(ids).requires_grad
    assert model(ids).logits.requires_grad


@pytest.mark.parametrize("name", PROMPTS)
def test_the_tensors_of_a_prompt_carry_no_graph(gpt, name):
    adapter = get_peft_model(gpt, CONFIGS[name]()).adapters["default"]
    for tensors in (adapter.tensors(), adapter.network(), adapter.places()):
        for key, tensor in tensors.items():
            assert not tensor.requires_grad, f"{key} would keep the whole network in memory"


@pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params", "state"])
def test_a_pass_with_a_cache_of_any_name_gets_no_second_prompt(gpt, ids, name):
    lengths = []

    class Recurrent(GPT):
        def forward(self, input_ids=None, inputs_embeds=None, **caches):
            lengths.append((input_ids if inputs_embeds is None else inputs_embeds).shape[1])

        def generate(self, input_ids):
            for new in (input_ids, input_ids[:, -1:]):
                self(input_ids=new, **{name: "filled"})

    get_peft_model(Recurrent(gpt.config), CONFIGS["prompt"]()).generate(ids)
    assert lengths == [5 + 10, 1]


def test_a_cache_is_filled_unless_it_says_that_it_is_not():
    empty, full, silent = Layer(), Layer(), object()
    full.is_initialized = True
    for layers, filled in (([], False), ([empty], False), ([empty, full], True), ([silent], True)):
        assert prompt_adapter.is_filled(types.SimpleNamespace(layers=layers)) is filled
    assert prompt_adapter.is_filled(((1, 2),))
    assert not prompt_adapter.is_filled(None)


def test_the_lstm_has_its_settings_and_computes_in_float32_under_autocast(gpt, ids):
    """Three layers of width 7; dropout between them acts in training only."""
    config = PromptEncoderConfig(
        5, "LSTM", encoder_hidden_size=7, encoder_num_layers=3, encoder_dropout=0.5
    )
    model = get_peft_model(gpt, config)
    encoder, dtypes = model.prompt_encoder, []
    numbers = 56 * (24 + 9) + 2 * 56 * (21 + 2)
    assert sum(p.numel() for p in encoder.lstm_head.parameters()) == numbers
    assert not torch.equal(encoder.train().prompt(), encoder.prompt())
    assert torch.equal(encoder.eval().prompt(), encoder.prompt())
    encoder.lstm_head.register_forward_hook(lambda *args: dtypes.append(args[2][0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert dtypes == [torch.float32], "not every CPU has a bfloat16 LSTM"


@pytest.mark.parametrize("name", ["prompt", "p_tuning", "prefix"])
def test_what_is_put_in_front_is_on_the_device_of_the_input(gpt, ids, name):
    model = get_peft_model(gpt.to("meta"), CONFIGS[name]())
    ids = ids.to("meta")
    positions = torch.arange(10, device="meta")[None]
    given = {"attention_mask": torch.ones_like(ids), "position_ids": positions, "labels": ids}
    found = model.prompt_encoder.prepend(gpt, ids, **given)
    places = [t.device.type for t in found.values() if torch.is_tensor(t)]
    assert places == ["meta"] * 4
    assert model(ids, **given).loss.device.type == "meta"
