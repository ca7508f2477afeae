"""The paged optimizer: exactly AdamW's numbers, and counters of the pages that moved."""

import copy

import pytest
import torch
from torch import nn

from minipeft.methods.paged_adamw import PagedAdamW


def network(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(37, 53), nn.Tanh(), nn.Linear(53, 3)).to(dtype)


def steps(model, optimizer, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = model[0].weight.dtype
    for _ in range(n):
        x = torch.randn(16, 37, generator=generator).to(dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize(("page", "budget"), [(100, 300), (1024, 4096), (2**20, 2**24)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_paged_adamw_is_bit_identical_to_adamw(dtype, page, budget, alternate):
    theirs, ours = network(dtype), network(dtype)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=False, fused=False)
    paged = PagedAdamW(
        ours.parameters(), lr=1e-2, page_bytes=page, device_budget_bytes=budget, alternate=alternate
    )
    steps(theirs, reference, 50)
    steps(ours, paged, 50)
    assert all(
        torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True)
    )
    a, b = reference.state_dict()["state"], paged.state_dict()["state"]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in a[i])


def test_always_visiting_pages_in_the_same_order_never_hits():
    def counters(frames: int, alternate: bool) -> dict:
        model, page = network(), 1024
        optimizer = PagedAdamW(
            model.parameters(),
            page_bytes=page,
            device_budget_bytes=frames * page,
            alternate=alternate,
        )
        assert len(optimizer.pages) == 17  # 2,176 parameters, 128 per page
        steps(model, optimizer, 10)
        return optimizer.counters

    assert counters(8, alternate=False) == {
        "hits": 0, "faults": 170, "evictions": 162, "bytes_in": 170 * 1024, "bytes_out": 162 * 1024
    }  # fmt: skip
    alternating = counters(8, alternate=True)
    assert alternating["hits"] == 9 * 8  # the pages left on the device by the step before
    assert alternating["hits"] + alternating["faults"] == 170
    whole = counters(17, alternate=False)
    assert (whole["faults"], whole["evictions"]) == (17, 0)


def test_the_least_recently_used_page_is_evicted():
    optimizer = PagedAdamW(network().parameters(), page_bytes=1024, device_budget_bytes=2048)
    for index in (0, 1, 0, 2):
        optimizer.fetch(index)
    assert list(optimizer.resident) == [0, 2]
    assert (optimizer.counters["hits"], optimizer.counters["evictions"]) == (1, 1)


def test_a_loaded_state_replaces_pages_on_the_device():
    model, other = network(), network()
    optimizer, used = (PagedAdamW(m.parameters(), page_bytes=1024) for m in (model, other))
    steps(model, optimizer, 3)
    steps(other, used, 5, seed=1)
    used.load_state_dict(optimizer.state_dict())
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(*(o.state_dict()["state"][0][name] for o in (optimizer, used)))


def test_loading_a_state_without_moments_starts_them_at_zero():
    fresh, used = network(), network()
    optimizers = [PagedAdamW(m.parameters(), page_bytes=1024) for m in (fresh, used)]
    empty = optimizers[0].state_dict()
    steps(used, optimizers[1], 3)
    optimizers[1].load_state_dict(optimizers[1].state_dict())  # nonzero moments in host memory
    optimizers[1].load_state_dict(empty)
    used.load_state_dict(fresh.state_dict())
    for model, optimizer in zip((fresh, used), optimizers, strict=True):
        steps(model, optimizer, 3)
    for a, b in zip(fresh.parameters(), used.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_dicts_are_interchangeable_and_groups_can_be_added():
    def pair(kind, **options):
        model = network()
        first, last = list(model[0].parameters()), list(model[2].parameters())
        optimizer = kind(first, lr=1e-2, **options)
        optimizer.add_param_group({"params": last, "lr": 3e-3, "weight_decay": 0.1})
        return model, optimizer

    adamw = {"foreach": False, "fused": False}
    paged = {"page_bytes": 512, "device_budget_bytes": 1024}
    theirs, reference = pair(torch.optim.AdamW, **adamw)
    ours, optimizer = pair(PagedAdamW, **paged)
    steps(theirs, reference, 5)
    steps(ours, optimizer, 5)
    kinds = ((torch.optim.AdamW, adamw, optimizer, ours), (PagedAdamW, paged, reference, theirs))
    results = []
    for kind, options, source, model in kinds:  # each resumes from the other's state
        new, resumed = pair(kind, **options)
        new.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(source.state_dict()))
        steps(new, resumed, 5, seed=1)
        results.append(new)
    steps(theirs, reference, 5, seed=1)
    for new in results:
        assert all(
            torch.equal(a, b) for a, b in zip(theirs.parameters(), new.parameters(), strict=True)
        )


def test_a_learning_rate_schedule_works_as_with_adamw():
    models = network(), network()
    reference = torch.optim.AdamW(models[0].parameters(), lr=1e-2, foreach=False, fused=False)
    paged = PagedAdamW(models[1].parameters(), lr=1e-2, page_bytes=1024)
    for model, optimizer in zip(models, (reference, paged), strict=True):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for i in range(4):
            steps(model, optimizer, 1, seed=i)
            schedule.step()
    both = (model.parameters() for model in models)
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_parameters_of_a_group_may_differ_in_steps_and_dtype():
    shapes = {torch.float32: (5, 7), torch.float64: (11,), torch.bfloat16: (3, 13)}

    def parameters():
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(s, dtype=d)) for d, s in shapes.items() for _ in range(2)]

    theirs, ours = parameters(), parameters()
    reference = torch.optim.AdamW(theirs, lr=1e-2, foreach=False, fused=False)
    paged = PagedAdamW(ours, lr=1e-2, page_bytes=128, device_budget_bytes=512)
    for n in range(12):
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            a.grad = b.grad = None if n % (i + 2) == 0 else torch.sin(a.detach() + n)
        reference.step()
        paged.step()
    assert len({state["step"] for state in paged.state.values()}) > 3
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_bad_settings_and_states_of_another_shape_are_refused():
    model = network()
    with pytest.raises(
        ValueError, match="device_budget_bytes=1023 must be at least one page of 1024"
    ):
        PagedAdamW(model.parameters(), page_bytes=1024, device_budget_bytes=1023)
    with pytest.raises(ValueError, match=r"page_bytes must be at least 16 .*, got 8"):
        PagedAdamW(model.parameters(), page_bytes=8)
    optimizer = PagedAdamW(model.parameters())
    steps(model, optimizer, 1)
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"parameter 0 have shapes \(2, 2\) and \(53, 37\)"):
        optimizer.load_state_dict(state)


def test_hyperparameters_out_of_range_and_strided_parameters_are_refused():
    for settings in ({"lr": -1e-3}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match="must not be negative, and betas below 1"):
            PagedAdamW(network().parameters(), **settings)
    with pytest.raises(ValueError, match=r"must be contiguous, got strides \(1, 3\)"):
        PagedAdamW([nn.Parameter(torch.zeros(4, 3).t())])


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_a_state_with_options_that_are_not_implemented_is_refused(option):
    model = network()
    adamw = torch.optim.AdamW(model.parameters(), **{option: True})
    steps(model, adamw, 1)
    paged = PagedAdamW(model.parameters())
    with pytest.raises(ValueError, match="amsgrad or maximize is not supported"):
        paged.load_state_dict(adamw.state_dict())


def test_a_refused_state_changes_nothing():
    model = network()
    optimizer = PagedAdamW(model.parameters(), page_bytes=1024, device_budget_bytes=2048)
    steps(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    wrong["state"][3]["exp_avg_sq"] = torch.zeros(2)
    with pytest.raises(
        ValueError, match=r"parameter 3 have shapes \(3,\) and \(2,\), expected \(3,\)"
    ):
        optimizer.load_state_dict(wrong)
    after = optimizer.state_dict()["state"]
    for i, state in before["state"].items():
        assert all(torch.equal(state[name], after[i][name]) for name in state)


def test_step_calls_the_closure_with_gradients_and_returns_its_loss():
    model = network()
    optimizer = PagedAdamW(model.parameters())

    def closure():
        loss = model(torch.ones(2, 37)).square().mean()
        loss.backward()
        return loss

    weight = model[0].weight.detach().clone()
    assert optimizer.step(closure) > 0
    assert not torch.equal(model[0].weight, weight)


def test_reading_the_state_dict_does_not_change_the_training():
    read, unread = network(), network()
    optimizers = [PagedAdamW(model.parameters(), lr=1e-2) for model in (read, unread)]
    for i in range(6):
        for model, optimizer in zip((read, unread), optimizers, strict=True):
            steps(model, optimizer, 1, seed=i)
        optimizers[0].state_dict()
    pairs = zip(read.parameters(), unread.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(isinstance(state["step"], int) for state in optimizers[0].state.values())
