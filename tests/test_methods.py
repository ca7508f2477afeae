"""AdaLoRA and the prompt methods: what all share, then each on its own."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_config
from torch import nn

from minipeft import (
    GPT,
    AdaLoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from minipeft.lab import DATA
from minipeft.lab.base import load_tokenizer
from minipeft.methods.adalora import RankAllocator, SVDLinear, add_adalora, orthogonality
from minipeft.methods.p_tuning import PromptEncoder
from minipeft.methods.prefix_tuning import PrefixEncoder
from minipeft.methods.prompt_tuning import PromptEmbedding

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
        ({"deltaT": 0}, "deltaT must be an integer of at least 1, got 0"),
        ({"orth_reg_weight": -1}, "orth_reg_weight not negative"),
        ({"lora_alpha": 0}, "lora_alpha must be positive"),
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


def test_add_adalora_without_any_match_is_refused(gpt):
    with pytest.raises(ValueError, match=r"target_modules=.* matches no linear layer"):
        add_adalora(gpt, AdaLoraConfig(target_modules=["c_porj"], **SCHEDULE))
    assert all(p.requires_grad for p in gpt.parameters())


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
        (PromptTuningConfig, {"prompt_tuning_init_text": "abc"}, "RANDOM"),
        (PrefixTuningConfig, {"encoder_hidden_size": 2.5}, "must be a positive integer, got 2.5"),
    ],
)
def test_a_setting_without_effect_is_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(num_virtual_tokens=3, **settings)


def test_adalora_needs_a_finite_scale():
    with pytest.raises(ValueError, match="lora_alpha must be positive"):
        AdaLoraConfig(total_step=5, lora_alpha=float("inf"))


def test_probing_the_cache_leaves_the_mode_of_every_module(gpt):
    gpt.train().transformer.drop.eval()
    get_peft_model(gpt, CONFIGS["prefix"]())
    assert gpt.transformer.h[0].training
    assert not gpt.transformer.drop.training
