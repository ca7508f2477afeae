"""DoRA, PiSSA, VeRA and (IA)³ match peft in training, counts and files, on the same weights."""

import copy

import pytest
import torch
from test_conformance import close, near, theirs  # noqa: F401

import minipeft
from minipeft import GPT, PeftModel, get_peft_model
from minipeft.adapter import copy_tensors

pytestmark = pytest.mark.conformance
peft = pytest.importorskip("peft")
ENDS = {"target_modules": ["attn.c_attn", "mlp.c_proj"], "task_type": "CAUSAL_LM"}
LORA = ENDS | {"r": 4, "lora_alpha": 6}
METHODS = {
    "dora": ("LoraConfig", LORA | {"use_dora": True}),
    "dora_rslora": ("LoraConfig", LORA | {"use_dora": True, "use_rslora": True}),
    "pissa": ("LoraConfig", LORA | {"init_lora_weights": "pissa"}),
    "pissa_rslora": ("LoraConfig", LORA | {"init_lora_weights": "pissa", "use_rslora": True}),
    "vera": ("VeraConfig", ENDS | {"r": 16}),
    "vera_key": ("VeraConfig", ENDS | {"r": 3, "projection_prng_key": 7, "d_initial": 0.5}),
    "vera_no_projection": ("VeraConfig", ENDS | {"r": 16, "save_projection": False}),
    "ia3": ("IA3Config", ENDS | {"feedforward_modules": ["mlp.c_proj"]}),
    "ia3_outputs": ("IA3Config", ENDS | {"feedforward_modules": []}),
}


def pairs(name, base):
    """peft's model and ours, on transformers' GPT-2, with equal weights."""
    kind, settings = METHODS[name]
    makers = {peft: peft.get_peft_model, minipeft: get_peft_model}
    models = []
    for package, make in makers.items():
        torch.manual_seed(3)
        models.append(make(copy.deepcopy(base), getattr(package, kind)(**settings)).train())
    found = peft.get_peft_model_state_dict(models[0])
    places = models[1].adapters["default"].places()
    assert found.keys() == places.keys()
    assert all(close(found[key], places[key]) for key in found)  # as drawn from one seed
    copy_tensors(found, places)
    return models


def train(model, ids):
    """20 AdamW steps; the losses and, at the end, the logits."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), logits(model, ids)


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("name", METHODS)
def test_training_follows_peft_for_20_steps(theirs, ids, name):  # noqa: F811
    reference, ours = (model.to(torch.float64) for model in pairs(name, theirs))
    before = logits(ours.train(), ids)
    (losses, outputs), (our_losses, our_outputs) = (
        train(m.train(), ids) for m in (reference, ours)
    )
    assert losses[-1] < losses[0]
    assert near(our_losses, losses, 1e-6)
    assert near(our_outputs, outputs, 1e-6)
    assert not near(outputs, before, 0.01)
    expected = peft.get_peft_model_state_dict(reference)
    for key, tensor in ours.adapters["default"].places().items():
        assert near(tensor, expected[key], 1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_counts_are_pefts(theirs, name):  # noqa: F811
    reference, ours = pairs(name, theirs)
    assert ours.get_nb_trainable_parameters() == reference.get_nb_trainable_parameters()


@pytest.mark.parametrize("name", METHODS)
def test_peft_loads_our_folder_and_we_load_pefts(theirs, ids, tmp_path, name):  # noqa: F811
    theirs.save_pretrained(tmp_path / "base")
    reference, ours = pairs(name, theirs)
    _, outputs = train(ours, ids)
    ours.save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "ours")
    assert close(logits(loaded, ids), outputs)
    assert not close(logits(theirs, ids), outputs)
    _, outputs = train(reference, ids)
    reference.save_pretrained(tmp_path / "theirs")
    gpt = GPT.from_pretrained(tmp_path / "base")
    assert close(logits(PeftModel.from_pretrained(gpt, tmp_path / "theirs"), ids), outputs)


def test_lora_plus_has_pefts_learning_rates(theirs):  # noqa: F811
    from peft.optimizers import create_loraplus_optimizer

    kind, settings = METHODS["dora"]
    model = peft.get_peft_model(theirs, getattr(peft, kind)(**settings))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)

    def rates(groups):
        return {p: group["lr"] for group in groups for p in group["params"]}

    assert rates(minipeft.lora_plus_groups(model, 1e-3, 16)) == rates(optimizer.param_groups)
