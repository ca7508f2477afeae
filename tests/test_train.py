"""The training loop: accumulation, weight decay, and what stops a run."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minipeft import GPT
from minipeft.gpt import Output
from minipeft.lab import train as module
from minipeft.lab.recipes import RECIPES, RunConfig
from minipeft.lab.train import autocast, pick_device, train, weights


def test_accumulation_gives_the_gradient_of_the_whole_batch(gpt):
    ids = torch.randint(1, 61, (4, 8))
    labels = ids.clone()
    labels[0, :6] = -100  # parts of unequal weight
    batch = {"input_ids": ids, "labels": labels}
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]
    run = RunConfig(steps=3, learning_rate=1e-2, warmup=0, quiet=True)
    results = []
    for micro in ([batch], parts):
        torch.manual_seed(0)
        model = GPT(gpt.config)
        training = train(model, [micro] * 3, run)
        results.append((training.losses, model.lm_head.weight))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-4)


def test_a_frozen_model_or_a_loss_that_is_not_finite_stops_the_run(gpt):
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    batch["labels"] = batch["input_ids"]
    run = RunConfig(steps=1, learning_rate=1e-3, warmup=0, quiet=True)
    gpt.transformer.wpe.weight.data[0] = torch.nan
    with pytest.raises(
        FloatingPointError, match="loss is nan at step 1; try a lower learning rate"
    ):
        train(gpt, [[batch]], run)
    with pytest.raises(ValueError, match="no trainable parameters: the whole model is frozen"):
        train(gpt.requires_grad_(False), [[batch]], run)


class Flat(nn.Module):
    """A model whose gradients are zero: only weight decay moves it."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        self.bias = nn.Parameter(torch.tensor([1.0, 5.0]))
        self.frozen = nn.Parameter(torch.tensor([[7.0]]), requires_grad=False)

    def forward(self, labels):
        return Output(loss=0.0 * (self.matrix.sum() + self.bias.sum() + self.frozen.sum()))


BATCH = {"labels": torch.ones(1, 2, dtype=torch.long)}
DECAY = {"warmup": 0, "lr_end": 1.0, "weight_decay": 0.5, "quiet": True}  # a constant rate


def test_decay_to_the_start_pulls_every_trained_parameter_towards_its_initial_value():
    """θ₀ + (θ - θ₀)(1 - ηλ) with η = 0.1 and λ = 0.5: 0.95 of the distance remains."""
    model = Flat()

    def move(row: dict) -> None:
        if row["step"] == 1:
            with torch.no_grad():
                assert model.matrix.tolist() == [[1.0, -2.0], [3.0, 4.0]]  # still at the start
                model.matrix.add_(torch.tensor([[2.0, 0.0], [-4.0, 1.0]]))
                model.bias.add_(torch.tensor([0.0, -2.0]))

    run = RunConfig(steps=2, learning_rate=0.1, decay_to="start", **DECAY)
    train(model, [[BATCH]] * 2, run, after_step=move)
    assert torch.allclose(model.matrix, torch.tensor([[2.9, -2.0], [-0.8, 4.95]]))
    assert torch.allclose(model.bias, torch.tensor([1.0, 3.1]))
    assert model.frozen.item() == 7.0


@pytest.mark.parametrize("decay_to", ["zero", "start"])
def test_a_decay_that_would_overshoot_is_refused(gpt, decay_to):
    before = gpt.lm_head.weight.clone()
    settings = {"steps": 1, "learning_rate": 0.01, "decay_to": decay_to, "quiet": True}
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4).long()}
    with pytest.raises(ValueError, match=r"learning rate 0.01 x weight decay 100 .* below 1"):
        train(gpt, [[batch]], RunConfig(weight_decay=100, **settings))
    assert torch.equal(gpt.lm_head.weight, before)
    train(gpt, [[batch]], RunConfig(weight_decay=99, **settings))


def test_decay_to_zero_shrinks_matrices_only():
    model = Flat()
    train(model, [[BATCH]], RunConfig(steps=1, learning_rate=0.1, decay_to="zero", **DECAY))
    assert torch.allclose(model.matrix, torch.tensor([[0.95, -1.9], [2.85, 3.8]]))
    assert model.bias.tolist() == [1.0, 5.0]
    assert model.frozen.item() == 7.0


def test_decay_follows_the_learning_rate_of_the_step():
    """Warm-up over two steps to 0.1: the rates are 0.05 and 0.1, so 0.975 · 0.95 remains."""
    model = Flat()
    run = RunConfig(steps=2, learning_rate=0.1, **(DECAY | {"warmup": 2}))
    train(model, [[BATCH]] * 2, run)
    assert model.matrix[1, 1].item() == pytest.approx(4 * 0.975 * 0.95)


def test_gradients_are_clipped_to_the_norm_of_the_run(gpt):
    """Plain gradient descent at rate 1 moves the model by exactly the clipped norm."""
    ids = torch.randint(1, 61, (2, 8), generator=torch.Generator().manual_seed(0))
    before = torch.cat([p.detach().flatten().clone() for p in gpt.parameters()])
    run = RunConfig(steps=1, learning_rate=1.0, warmup=0, max_grad_norm=0.25, quiet=True)

    def descent(groups, lr, betas):
        return torch.optim.SGD(groups, lr=lr)

    recipe = replace(RECIPES["full"], optimizer=descent)
    train(gpt, [[{"input_ids": ids, "labels": ids}]], run, recipe)
    after = torch.cat([p.detach().flatten() for p in gpt.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_a_device_that_cannot_be_used_is_refused_in_one_line(name):
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=f"device '{name}' cannot be used: ") as refused:
        pick_device(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("error", "reason"), [("", "RuntimeError"), ("none\nat all", "none")])
def test_the_reason_is_the_first_line_of_the_error_or_its_type(monkeypatch, error, reason):
    def ones(n, device):
        raise RuntimeError(error)

    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(ValueError, match=f"^device 'cpu' cannot be used: {reason}$"):
        pick_device("cpu")


def test_a_micro_batch_without_labelled_tokens_is_refused():
    labels = torch.tensor([[1, 2, 3]])
    batches = [{"labels": labels}, {"labels": torch.full_like(labels, -100)}]
    with pytest.raises(ValueError, match="a micro-batch has no labelled tokens"):
        weights(batches)
    assert weights([{"labels": labels}, {"labels": labels}]) == [0.5, 0.5]


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step():
    """A finite loss can have an infinite gradient: that of a square root at 0."""

    class Root(Flat):
        def forward(self, labels):
            return Output(loss=(0 * self.matrix).square().sum().sqrt())

    model = Root()
    run = RunConfig(steps=1, learning_rate=0.1, **DECAY)
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan at step 1"):
        train(model, [[BATCH]], run)
    assert model.matrix.tolist() == [[1.0, -2.0], [3.0, 4.0]]


def test_each_micro_batch_counts_by_its_labels_except_the_first():
    first = {"labels": torch.tensor([[5, -100, 7, 8], [-100, 1, -100, -100]])}  # 7, 8 and 1
    second = {"labels": torch.tensor([[5, 6]])}
    assert weights([first, second]) == [0.75, 0.25]


def test_a_training_run_by_hand(monkeypatch, capfd):
    """The loss of micro-batch i is m · sum(matrix), weighted by its labels: (1 · 3 + 2 · 1) / 4."""
    made, rows = [], []

    class Linear(Flat):
        def forward(self, labels):
            assert self.training
            m = 1.0 if labels.shape[1] == 4 else 2.0
            return Output(loss=m * self.matrix.sum() + 0 * self.bias.sum())

    def descent(groups, lr, betas):
        made.append((lr, betas, [(len(g["params"]), g["weight_decay"]) for g in groups]))
        return torch.optim.SGD(groups, lr=lr)

    # every step takes one second more than the one before: 0, 1, 2, … and the median skips step 1
    ticks = (t for n in count() for t in (100.0 * n, 101.0 * n))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setitem(sys.modules, "ipykernel", module)  # as in a notebook
    batches = [[{"labels": torch.ones(1, 4)}, {"labels": torch.ones(1, 2)}]] * 11
    run = RunConfig(
        steps=10, learning_rate=0.1, warmup=0, lr_end=1.0, beta2=0.9, weight_decay=0.0,
        max_grad_norm=100.0,
    )  # fmt: skip
    model = Linear().eval()
    recipe = replace(RECIPES["full"], optimizer=descent)
    found = train(model, batches, run, recipe, rows.append, title="counting")
    assert made == [(0.1, (0.9, 0.9), [(1, 0.0), (1, 0.0)])]
    # the sum is 6; each step moves 4 entries by 0.1 · 1.25
    assert found.losses == pytest.approx([1.25 * (6 - 0.5 * n) for n in range(10)])
    assert [row["loss"] for row in rows] == found.losses
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["learning_rate"] for row in rows] == [0.1] * 10
    assert [row["seconds"] for row in rows] == list(range(10))
    assert found.seconds_per_step == 5  # the median of 1 … 9
    assert found.gradient_bytes == 4 * (4 + 2)
    assert found.optimizer_bytes == 0
    assert found.bytes_sent_per_step is found.paging is None
    shown = capfd.readouterr().err
    assert "counting: 100%" in shown
    assert "10/10" in shown
    assert f"loss={found.losses[-1]:.3f}, lr=1.0e-01" in shown
    train(model, batches, RunConfig(steps=1, learning_rate=0.1))
    assert "training: 100%" in capfd.readouterr().err
    train(model, batches, RunConfig(steps=1, learning_rate=0.1, quiet=True))
    assert capfd.readouterr().err == ""
    monkeypatch.undo()
    train(model, batches, RunConfig(steps=1, learning_rate=0.1))  # into pytest's file
    assert capfd.readouterr().err == ""


def test_the_state_of_adamw_has_two_numbers_per_parameter_and_a_step_per_tensor():
    found = train(Flat(), [[BATCH]], RunConfig(steps=1, learning_rate=0.1, quiet=True))
    assert found.optimizer_bytes == 4 * (2 * (4 + 2) + 2)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [(("cuda", "mps"), "cuda"), (("cuda",), "cuda"), (("mps",), "mps"), ((), "cpu")],
)
def test_the_best_device_is_picked_if_none_is_named(monkeypatch, gpus, expected):
    def ones(n, device):
        if device.type not in (*gpus, "cpu"):
            raise RuntimeError("no such device")
        return torch.zeros(n)

    monkeypatch.setattr(torch, "ones", ones)
    assert pick_device() == torch.device(expected)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_used_on_gpus_that_compute_in_it(monkeypatch, native):
    def supported(including_emulation=True):
        return native or including_emulation

    made = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch, "autocast", lambda *arguments: made.append(arguments))
    assert isinstance(autocast(torch.device("cpu")), nullcontext)
    assert made == []
    autocast(torch.device("cuda"))
    assert made == ([("cuda", torch.bfloat16)] if native else [])


def test_gradients_are_exchanged_once_per_step_and_only_one_process_shows_a_bar(monkeypatch, capfd):
    """With the stand-in for several processes that says it sent 100 bytes in all."""
    synced = []

    class Replicas:
        sent = 100

        def __init__(self, model):
            self.model = model

        def __call__(self, **batch):
            return self.model(**batch)

        def sync_gradients_if(self, last):
            synced.append(last)
            return nullcontext()

    monkeypatch.setattr(module.parallel, "Replicas", Replicas)
    monkeypatch.setattr(module.parallel, "rank", lambda: 1)
    batches = [[dict(BATCH), dict(BATCH), dict(BATCH)]] * 4
    found = train(Flat(), batches, RunConfig(steps=4, learning_rate=0.1))
    assert found.bytes_sent_per_step == 25
    assert synced == [False, False, True] * 4
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_bars_are_for_terminals_and_notebooks(monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert module.bar_options() == ({} if terminal else {"disable": True})
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert module.bar_options() == {}
    assert module.bar_options(quiet=True) == {"disable": True}
