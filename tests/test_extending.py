"""How to add a method: one file, one line in METHODS, one Recipe, one test.

The method is SSF, which scales and shifts what a layer computes (Lian et al. 2022, arXiv
2210.08823). Your own method goes into minipeft/methods/, and its line and Recipe into adapters.py
and recipes.py; here they are put into the tables for one test.
"""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft import PeftModel, get_peft_model
from minipeft.adapters import METHODS, Method, WeightAdapter
from minipeft.lab import tasks
from minipeft.lab.finetune import finetune
from minipeft.lab.recipes import RECIPES, Recipe, RunConfig
from minipeft.saving import PeftConfig

# --- one file: minipeft/methods/ssf.py ---


@dataclass
class SsfConfig:
    """Which layers to scale and shift."""

    target_modules: list[str] | str | None = None
    task_type: str | None = None
    inference_mode: bool = False
    peft_type: str = field(default="SSF", init=False)


class SsfLinear(nn.Module):
    """A frozen linear layer whose outputs are scaled and shifted:

    y = (1 + g) (W x + b) + h,   so W' = diag(1 + g) W and b' = (1 + g) b + h

    Shapes: g and h (out,), x (…, in), y (…, out). Trained parameters: 2 out.
    """

    def __init__(self, base_layer: nn.Linear, config: SsfConfig):
        super().__init__()
        self.base_layer = base_layer
        self.g = nn.Parameter(torch.zeros(base_layer.out_features))
        self.h = nn.Parameter(torch.zeros(base_layer.out_features))
        self.merged: tuple[Tensor, Tensor] | None = None

    weight = property(lambda self: (1 + self.g)[:, None] * self.base_layer.weight)
    bias = property(lambda self: (1 + self.g) * self.base_layer.bias + self.h)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return F.linear(x, *self.merged)
        y = self.base_layer(x)
        return y + self.g * y + self.h

    def merge(self) -> None:
        self.merged = self.weight.detach(), self.bias.detach()

    def unmerge(self) -> None:
        self.merged = None


@pytest.fixture
def ssf(monkeypatch) -> SsfConfig:
    # one line in METHODS of adapters.py
    monkeypatch.setitem(METHODS, "SSF", Method(SsfConfig, WeightAdapter, SsfLinear))
    # one Recipe in RECIPES of recipes.py
    recipe = Recipe("ssf", lambda size, steps: SsfConfig("all-linear", task_type="CAUSAL_LM"))
    monkeypatch.setitem(RECIPES, "ssf", recipe)
    PeftConfig.register(SsfConfig)  # saving.py does this for every entry of METHODS
    return SsfConfig(["c_attn", "c_proj"])


# --- one test ---


def test_a_new_method_starts_as_the_base_trains_merges_saves_and_counts(gpt, ids, tmp_path, ssf):
    before = gpt(ids).logits
    model = get_peft_model(gpt, ssf)
    assert torch.equal(model(ids).logits, before)
    d, blocks = 24, 2
    assert model.get_nb_trainable_parameters()[0] == blocks * 2 * (3 * d + d + d)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    logits = model.eval()(ids).logits
    model.merge_adapter()
    assert torch.allclose(model(ids).logits, logits, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(ids).logits, logits)
    assert torch.allclose(model.merge_and_unload()(ids).logits, logits, atol=1e-5)

    model.save_pretrained(tmp_path)
    base = model.unload()
    assert torch.equal(base(ids).logits, before)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(ids).logits, logits)


@pytest.mark.slow
def test_the_laboratory_trains_a_new_method(base, ssf):
    task = tasks.load_task(base, "describe")
    run = RunConfig(steps=4, learning_rate=0.05, quiet=True, n_generate=2, n_evaluations=1)
    record = finetune(base, task, RECIPES["ssf"], run)
    assert record.losses[-1] < record.losses[0]
    assert record.forgot("off") == 0
