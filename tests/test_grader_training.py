"""The reference training loop of the grader: the same losses as the lab's loop."""

from itertools import chain

import pytest
import torch

from minipeft.grader import training
from minipeft.lab import DATA, tasks
from minipeft.lab.base import load_base
from minipeft.lab.recipes import RunConfig
from minipeft.lab.train import train


@pytest.mark.parametrize("parts", [1, 2])
def test_losses_equal_those_of_the_lab(parts):
    base = load_base(DATA / "base" / "0.3m")
    run = RunConfig(steps=5, learning_rate=0.003, warmup=2, device="cpu", quiet=True)
    batches = tasks.shuffled(tasks.load_task(base, "describe").train, 6, 0)
    lab, ours = [], []
    for _ in range(run.steps):
        examples = next(batches)
        micro_batches = [examples[:4], examples[4:]] if parts == 2 else [examples]
        lab.append([tasks.collate(part, base.end, "cpu") for part in micro_batches])
        pairs = [[(e.prompt_ids, e.completion_ids) for e in part] for part in micro_batches]
        ours.append([training.collate(part, base.end) for part in pairs])
    for theirs, mine in zip(chain(*lab), chain(*ours), strict=True):
        assert theirs.keys() == mine.keys()
        assert all(torch.equal(theirs[name], mine[name]) for name in theirs)
    expected = train(base.model(), lab, run).losses
    losses = training.train(base.model(), ours, run.steps, run.learning_rate, run.warmup)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
    for step in range(1, 6):
        rate = training.learning_rate(step, 5, 0.003, 2)
        assert rate == pytest.approx(run.learning_rate_at(step))
