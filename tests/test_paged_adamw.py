"""The paged optimizer: AdamW's numbers to the bit, and counters that tell what moved."""

import copy

import pytest
import torch
from torch import nn

import minipeft
from minipeft.paged_adamw import PagedAdamW


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
def test_paged_adamw_is_adamw_to_the_bit(dtype, page, budget, alternate):
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


def test_the_counters_show_that_the_same_order_never_hits():
    def counters(frames: int, alternate: bool) -> dict:
        model, page = network(), 1024
        optimizer = PagedAdamW(
            model.parameters(),
            page_bytes=page,
            device_budget_bytes=frames * page,
            alternate=alternate,
        )
        assert len(optimizer.pages) == 17  # 2,176 parameters, 128 a page
        steps(model, optimizer, 10)
        return optimizer.counters

    assert counters(8, alternate=False) == {
        "hits": 0, "faults": 170, "evictions": 162, "bytes_in": 170 * 1024, "bytes_out": 162 * 1024
    }  # fmt: skip
    turning = counters(8, alternate=True)
    assert turning["hits"] == 9 * 8  # what stayed at the end of each step
    assert turning["hits"] + turning["faults"] == 170
    whole = counters(17, alternate=False)
    assert (whole["faults"], whole["evictions"]) == (17, 0)


def test_the_page_that_goes_is_the_one_used_longest_ago():
    optimizer = PagedAdamW(network().parameters(), page_bytes=1024, device_budget_bytes=2048)
    for index in (0, 1, 0, 2):
        optimizer.fetch(index)
    assert list(optimizer.resident) == [0, 2]
    assert (optimizer.counters["hits"], optimizer.counters["evictions"]) == (1, 1)


def test_a_loaded_state_takes_the_place_of_pages_that_are_on_the_device():
    model, other = network(), network()
    optimizer, used = (PagedAdamW(m.parameters(), page_bytes=1024) for m in (model, other))
    steps(model, optimizer, 3)
    steps(other, used, 5, seed=1)
    used.load_state_dict(optimizer.state_dict())
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(*(o.state_dict()["state"][0][name] for o in (optimizer, used)))


def test_state_goes_both_ways_and_groups_can_be_added():
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
    for kind, options, source, model in kinds:  # each goes on from the other's state
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


def test_a_schedule_sets_the_rate_of_both():
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


def test_parameters_of_one_group_may_differ_in_steps_and_in_dtype():
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


def test_a_budget_below_one_page_and_a_state_of_another_shape_are_refused():
    model = network()
    with pytest.raises(ValueError, match="below one page"):
        PagedAdamW(model.parameters(), page_bytes=1024, device_budget_bytes=1023)
    with pytest.raises(ValueError, match="page_bytes is 8"):
        PagedAdamW(model.parameters(), page_bytes=8)
    optimizer = PagedAdamW(model.parameters())
    steps(model, optimizer, 1)
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"parameter 0 has the shape \(2, 2\)"):
        optimizer.load_state_dict(state)


def test_qlora_has_it_under_its_old_name():
    assert minipeft.PagedAdamW is minipeft.qlora.PagedAdamW is PagedAdamW
