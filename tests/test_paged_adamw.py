"""The paged optimizer: exactly AdamW's numbers, and counters of the pages that moved."""

import copy
import math
import pickle
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize(
    ("page", "budget", "alternate"),
    [(400, 1200, True), (1024, 4096, False), (1024, 4096, True), (2**20, 2**24, True)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_paged_adamw_is_bit_identical_to_adamw(dtype, page, budget, alternate):
    theirs, ours = network(dtype), network(dtype)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=False, fused=False)
    paged = PagedAdamW(
        ours.parameters(), lr=1e-2, page_bytes=page, device_budget_bytes=budget, alternate=alternate
    )
    steps(theirs, reference, 15)
    steps(ours, paged, 15)
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


def test_step_calls_the_closure_with_gradients_and_returns_its_loss():
    model = network()
    optimizer = PagedAdamW(model.parameters())

    def closure():
        loss = model(torch.ones(2, 37)).square().mean()
        loss.backward()
        return loss

    weight = model[0].weight.detach().clone()
    assert optimizer.step() is None  # without gradients
    assert torch.equal(model[0].weight, weight)
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


# --- what is refused ---

AS_NUMBER = [-1e-9, math.nan, math.inf, "0.1", None, True, torch.tensor(0.1), [0.1]]
BETAS = [
    (0.9,), (0.9, 0.9, 0.9), (1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, -0.1), (math.nan, 0.9),
    (0.9, math.nan), (0, 0.9), (0.9, None), ("a", "b"), "ab", 0.9, None, torch.tensor([0.9, 0.9]),
]  # fmt: skip
SETTINGS = [
    *((name, value) for name in ("lr", "eps", "weight_decay") for value in AS_NUMBER),
    *(("betas", value) for value in BETAS),
]
OPTIONS = [
    ("amsgrad", True), ("maximize", True), ("capturable", True), ("differentiable", True),
    ("decoupled_weight_decay", False),
]  # fmt: skip


def parameter(*shape, dtype=torch.float32) -> nn.Parameter:
    generator, options = torch.Generator().manual_seed(math.prod(shape)), {"dtype": torch.float64}
    return nn.Parameter(torch.randn(shape, generator=generator, device="cpu", **options).to(dtype))


def trained(**options) -> PagedAdamW:
    """After two steps: a parameter of shape (5, 3) in two pages, and one without steps."""
    first, last = parameter(5, 3), parameter(2)
    options = {"page_bytes": 64, "device_budget_bytes": 64} | options
    optimizer = PagedAdamW([{"params": [first]}, {"params": [last], "lr": 0.1}], **options)
    for _ in range(2):
        first.grad = torch.sin(first.detach())
        optimizer.step()
    return optimizer


def parameters(optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def everything(optimizer) -> dict:
    """A copy of all that a step or a refused call could change."""
    pages = [(page.used, len(page.slices)) for page in optimizer.pages]
    rest = optimizer.counters, optimizer.steps, pages, list(optimizer.kinds.values())
    weights = [p.detach() for p in parameters(optimizer)]
    return copy.deepcopy({"weights": weights, "state": optimizer.state_dict(), "rest": rest})


def assert_same(a, b, where: str = "") -> None:
    """Equal in every bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), f"{where}: {a} and {b}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where} {key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where} {i}")
    else:
        assert a is b or a == b, where  # NaN differs from itself


def refused(optimizer: PagedAdamW, message: str | None, call, *args) -> None:
    """The call raises ValueError with one line, and nothing has changed."""
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    assert_same(everything(optimizer), before)


@pytest.mark.parametrize(("name", "value"), SETTINGS, ids=str)
def test_a_bad_setting_is_refused_as_argument_in_a_group_and_in_a_state(name, value):
    expected = "two floats in" if name == "betas" else "a finite number of at least 0"
    message = rf"^{name} must be {expected}.*, got {re.escape(repr(value))}$"
    with pytest.raises(ValueError, match=message):
        PagedAdamW([{"params": [parameter(3)], "lr": 0.1, "betas": (0.9, 0.9)}], **{name: value})
    refused_in_groups(name, value, message)


@pytest.mark.parametrize(("name", "value"), OPTIONS)
def test_an_option_that_is_not_implemented_is_refused_in_a_group_and_in_a_state(name, value):
    message = f"^{name}(=False)? is not implemented: use torch.optim.AdamW?$"
    refused_in_groups(name, value, message)
    accepted = {"params": [parameter(3)], name: not value}
    PagedAdamW([accepted]).add_param_group({"params": [parameter(3)], name: not value})
    with pytest.raises(TypeError, match=name):
        PagedAdamW([parameter(3)], **{name: value})


def refused_in_groups(name: str, value, message: str) -> None:
    """Of a new optimizer, of an existing one, of a loaded state, and of a step."""
    optimizer, group = trained(), {"params": [parameter(3)], name: value}
    with pytest.raises(ValueError, match=message):
        PagedAdamW([{"params": [parameter(4)]}, dict(group)])
    refused(optimizer, message, optimizer.add_param_group, dict(group))
    state = optimizer.state_dict()
    state["param_groups"][1][name] = value
    refused(optimizer, message, optimizer.load_state_dict, state)
    optimizer.param_groups[1][name] = value
    for p in parameters(optimizer):
        p.grad = torch.ones_like(p)
    refused(optimizer, message, optimizer.step)


def test_settings_at_their_bounds_work_as_with_adamw():
    options = {"lr": 0, "betas": (0.0, 0.0), "eps": 0, "weight_decay": 0}
    theirs, ours = parameter(5), parameter(5)
    adamw = torch.optim.AdamW([theirs], **options, foreach=False, fused=False)
    paged = PagedAdamW([ours], **options, page_bytes=16, device_budget_bytes=16)
    for lr in (0, 1, 0.1):
        adamw.param_groups[0]["lr"] = paged.param_groups[0]["lr"] = lr
        theirs.grad = ours.grad = torch.cos(theirs.detach())
        adamw.step()
        paged.step()
        assert torch.equal(theirs, ours)
    assert len(paged.pages) == 3  # two float32s per page


@pytest.mark.parametrize("value", [15, 16.0, True, "16", None])
def test_page_bytes_must_be_an_integer_of_at_least_16(value):
    message = rf"^page_bytes must be an integer of at least 16, got {value!r}$"
    with pytest.raises(ValueError, match=message):
        PagedAdamW([parameter(3)], page_bytes=value)


@pytest.mark.parametrize("value", [31, 32.0, True, "32", None])
def test_the_budget_must_be_an_integer_of_at_least_a_page(value):
    message = rf"^device_budget_bytes={value!r} must be an integer of at least page_bytes=32$"
    with pytest.raises(ValueError, match=message):
        PagedAdamW([parameter(3)], page_bytes=32, device_budget_bytes=value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: [parameter(3).to(torch.complex64).detach()], "floating-point.*complex64"),
        (lambda: [torch.zeros(3, dtype=torch.int64)], "floating-point.*int64"),
        (lambda: [parameter(3, 3).detach().to_sparse()], "contiguous.*sparse_coo"),
        (lambda: [parameter(3, 3).detach().to_sparse_csr()], "contiguous.*sparse_csr"),
        (lambda: [nn.Parameter(parameter(4, 3).t())], r"contiguous.*\(3, 4\)"),
        (lambda: [parameter(3)] * 2, "^a parameter is given twice$"),
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_parameters_that_cannot_be_paged_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        PagedAdamW(bad())
    optimizer = trained()
    refused(optimizer, message, optimizer.add_param_group, {"params": [parameter(9), *bad()]})
    twice = {"params": [parameter(9), parameters(optimizer)[0]]}
    refused(optimizer, "in more than one", optimizer.add_param_group, twice)


def cast(p):
    p.data = p.data.double()


def cast_with_gradient(p):
    p.grad = None
    p.data = p.data.bfloat16()
    p.grad = torch.ones_like(p)


def move(p):
    torch.utils.swap_tensors(p, nn.Parameter(torch.ones_like(p, device="meta")))
    p.grad = torch.ones_like(p)


def resize(p):
    p.grad = None
    p.data = torch.ones(6, 6)
    p.grad = torch.ones(6, 6)


def transpose(p):
    p.data = p.data.t()


def sparse_gradient(p):
    p.grad = p.grad.to_sparse()


def gradient_of_another_dtype(p):
    p.grad = None
    p.grad_dtype = torch.float64
    p.grad = torch.ones_like(p, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cast, "a parameter of .*float32.* became .*float64.*: make a new"),
        (cast_with_gradient, "a parameter of .*float32.* became .*bfloat16"),
        (move, "a parameter of .*'cpu'.* became .*'meta'"),
        (resize, r"a parameter of .*\(4, 4\)\) became .*\(6, 6\)\)"),
        (transpose, "a parameter must be floating-point and contiguous"),
        (sparse_gradient, "a gradient must be .*strided.*, got .*sparse_coo"),
        (gradient_of_another_dtype, "a gradient must be .*float32.*, got .*float64"),
    ],
)
def test_a_step_with_a_changed_parameter_is_refused_before_any_weight_changes(change, message):
    if change is gradient_of_another_dtype and not hasattr(nn.Parameter, "grad_dtype"):
        pytest.skip("this torch refuses such a gradient itself")
    good, changed = parameter(3), parameter(4, 4)
    optimizer = PagedAdamW([good, changed], page_bytes=64, device_budget_bytes=64)
    good.grad, changed.grad = torch.ones(3), torch.ones(4, 4)
    optimizer.step()
    change(changed)
    weights, counters = [p.detach().clone() for p in (good, changed)], dict(optimizer.counters)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(good, weights[0])
    assert [optimizer.state[p]["step"] for p in (good, changed)] == [1, 1]
    assert (optimizer.steps, optimizer.counters) == (1, counters)
    changed.grad = None  # without a gradient it takes no part
    optimizer.step()
    assert not torch.equal(good, weights[0])


def test_a_parameter_that_was_put_into_a_group_by_hand_is_refused():
    optimizer = trained()
    optimizer.param_groups[0]["params"].append(parameter(3))
    parameters(optimizer)[1].grad = torch.ones(3)
    with pytest.raises(ValueError, match="a parameter of None became"):
        optimizer.step()


# --- loading a state ---


def put(name, value):
    return lambda s: s["state"][0].update({name: value})


SHAPE = r"parameter 0 is .*\(5, 3\)\), its moments are "
FINITE = "the moments of parameter 0 must be finite, and exp_avg_sq from 0"
STEP = "the step of parameter 0 must be finite and at least 0, got "
NOT_ONE = "this is not AdamW's state dict: "
BAD_STATES = {
    "no state": (lambda s: s.pop("state"), NOT_ONE + r"KeyError\('state'\)"),
    "no groups": (lambda s: s.pop("param_groups"), NOT_ONE + r"KeyError\('param_groups'\)"),
    "a list": (lambda s: s.update(state=[]), NOT_ONE),
    "a group is a number": (lambda s: s.update(param_groups=[1, 2]), NOT_ONE),
    "groups are a number": (lambda s: s.update(param_groups=1), NOT_ONE),
    "a group less": (lambda s: s["param_groups"].pop(), r"must have \[1, 1\] .*, got \[1\]"),
    "more parameters": (
        lambda s: s["param_groups"][0]["params"].append(2),
        r"must have \[1, 1\] different parameters, got \[2, 1\]",
    ),
    "one id twice": (lambda s: s["param_groups"][1].update(params=[0]), "different parameters"),
    "ids are lists": (lambda s: s["param_groups"][1].update(params=[[0]]), NOT_ONE + "TypeError"),
    "no ids": (lambda s: s["param_groups"][1].pop("params"), NOT_ONE + r"KeyError\('params'\)"),
    "no lr": (lambda s: s["param_groups"][1].pop("lr"), "lr must be .*, got None"),
    "unknown id": (lambda s: s["state"].update({2: {}}), r"no group has the parameters \{2\}"),
    "state is a list": (lambda s: s["state"].update({0: [1]}), NOT_ONE + "TypeError"),
    "state is a tensor": (lambda s: s["state"].update({0: torch.ones(3)}), NOT_ONE),
    **{
        f"no {name}": (lambda s, n=name: s["state"][0].pop(n), f"{NOT_ONE}KeyError..{name}")
        for name in ("step", "exp_avg", "exp_avg_sq")
    },
    "step -1": (put("step", torch.tensor(-1.0)), STEP + "-1.0"),
    "step NaN": (put("step", torch.tensor(math.nan)), STEP + "nan"),
    "step inf": (put("step", torch.tensor(math.inf)), STEP + "inf"),
    "step is a string": (put("step", "3"), NOT_ONE + "TypeError"),
    "step is huge": (put("step", 10**400), "Overflow"),
    "two steps": (put("step", torch.ones(2)), NOT_ONE + "RuntimeError"),
    "step is complex": (put("step", torch.tensor(1j)), NOT_ONE + "TypeError"),
}
for n in ("exp_avg", "exp_avg_sq"):
    BAD_STATES |= {
        f"{n} None": (put(n, None), NOT_ONE + "AttributeError"),
        f"{n} transposed": (put(n, torch.zeros(3, 5)), SHAPE + r".*\(3, 5\)"),
        f"{n} broadcasts": (put(n, torch.zeros(1)), SHAPE + r".*\(1,\)"),
        f"{n} int": (put(n, torch.zeros(5, 3, dtype=torch.int64)), SHAPE + ".*int64"),
        f"{n} complex": (put(n, torch.zeros(5, 3, dtype=torch.cfloat)), SHAPE + ".*complex64"),
        f"{n} sparse": (put(n, torch.eye(5)[:, :3].to_sparse()), NOT_ONE),
        f"{n} meta": (put(n, torch.zeros(5, 3, device="meta")), NOT_ONE + "NotImplementedError"),
        f"{n} NaN": (put(n, torch.zeros(5, 3).index_fill_(1, torch.tensor(2), math.nan)), FINITE),
        f"{n} inf": (put(n, torch.zeros(5, 3).index_fill_(1, torch.tensor(2), math.inf)), FINITE),
        f"{n} too big": (put(n, torch.full((5, 3), 1e300, dtype=torch.float64)), FINITE),
    }
BAD_STATES["exp_avg_sq negative"] = put("exp_avg_sq", torch.eye(5)[:, :3] - 1e-9), FINITE


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_bad_state_is_refused_and_changes_nothing(name):
    optimizer = trained()
    state = optimizer.state_dict()
    change, message = BAD_STATES[name]
    change(state)
    refused(optimizer, message, optimizer.load_state_dict, state)


@pytest.mark.parametrize("value", [None, 5, [], "state"])
def test_only_a_dict_is_a_state_dict(value):
    optimizer = trained()
    refused(optimizer, NOT_ONE, optimizer.load_state_dict, value)


@pytest.mark.parametrize(
    "options",
    [
        {"foreach": True}, {"foreach": False}, {"fused": True}, {"amsgrad": False},
        {"maximize": False, "capturable": False, "differentiable": False},
    ],
)  # fmt: skip
def test_a_state_of_adamw_with_options_that_change_no_number_loads(options):
    theirs, ours = parameter(5, 3), parameter(5, 3)
    adamw, paged = torch.optim.AdamW([theirs], **options), PagedAdamW([ours], page_bytes=64)
    theirs.grad = torch.ones(5, 3)
    adamw.step()
    paged.load_state_dict(adamw.state_dict())
    assert_same(paged.state_dict()["state"], adamw.state_dict()["state"])
    ours.grad = torch.ones(5, 3)
    paged.step()


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_a_state_of_adamw_with_an_option_that_changes_numbers_is_refused(option):
    p = parameter(5, 3)
    adamw = torch.optim.AdamW([p], **{option: True})
    p.grad = torch.ones(5, 3)
    adamw.step()
    paged = PagedAdamW([parameter(5, 3)])
    refused(paged, f"^{option} is not implemented", paged.load_state_dict, adamw.state_dict())


def test_what_adamw_accepts_in_a_state_loads():
    """Other names of parameters, a step that is a number, a state without entries, other dtypes."""
    optimizer = trained()
    expected = optimizer.state_dict()
    state = copy.deepcopy(expected)
    for group, name in zip(state["param_groups"], ("a", "b"), strict=True):
        group["params"] = [name]
    m, v = (state["state"][0][name] for name in ("exp_avg", "exp_avg_sq"))
    state["state"] = {"a": {"step": 2, "exp_avg": m.double(), "exp_avg_sq": v.requires_grad_()}}
    state["state"]["b"] = {}
    state["param_groups"][1]["betas"] = list(state["param_groups"][1]["betas"])
    new = trained()
    for p in parameters(new):
        p.grad = torch.ones_like(p)
    new.step()
    new.load_state_dict(state)
    expected["param_groups"][1]["betas"] = [0.9, 0.999]
    assert_same(new.state_dict(), expected)
    assert not any(page.host.requires_grad for page in new.pages)


@pytest.mark.parametrize("step", [0, 0.5])
def test_a_state_may_begin_at_step_0_and_between_two_steps(step):
    theirs, ours = parameter(3), parameter(3)
    adamw = torch.optim.AdamW([theirs], foreach=False, fused=False)
    paged = PagedAdamW([ours])
    theirs.grad = ours.grad = torch.ones(3)
    adamw.step()
    state = adamw.state_dict()
    state["state"][0]["step"] = torch.tensor(float(step))
    adamw.load_state_dict(copy.deepcopy(state))
    paged.load_state_dict(copy.deepcopy(state))
    ours.data.copy_(theirs.data)
    for optimizer in (adamw, paged):
        optimizer.step()
    assert torch.equal(theirs, ours)


def test_looking_at_the_state_of_a_parameter_does_not_break_the_state_dict():
    optimizer = trained()
    assert optimizer.state[parameters(optimizer)[1]] == {}  # a defaultdict: now it has an entry
    state = optimizer.state_dict()["state"][1]
    zeros = torch.zeros(2)
    assert_same(state, {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros})


# --- copies ---


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_model_and_optimizer_steps_alike_and_shares_nothing(copied):
    model = network()
    optimizer = PagedAdamW(model.parameters(), lr=1e-2, page_bytes=1024, device_budget_bytes=4096)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # replaces optimizer.step
    steps(model, optimizer, 3)
    before = everything(optimizer)
    twin, other = copied((model, optimizer))
    assert parameters(other) == list(twin.parameters())
    steps(twin, other, 3, seed=1)
    assert_same(everything(optimizer), before)
    steps(model, optimizer, 3, seed=1)
    assert_same(everything(other), everything(optimizer))
    assert optimizer.counters["evictions"] > 0
    shared = {page.host.data_ptr() for page in optimizer.pages} & {
        page.host.data_ptr() for page in other.pages
    }
    assert not shared


def test_a_copied_optimizer_alone_has_parameters_of_its_own():
    optimizer = trained()
    before, other = everything(optimizer), copy.deepcopy(optimizer)
    for p in parameters(other):
        p.grad = torch.ones_like(p)
    other.step()
    assert_same(everything(optimizer), before)
    other.add_param_group({"params": [parameter(7)]})
    assert_same(everything(optimizer), before)


# --- paging ---


def test_the_default_settings_are_those_of_adamw_and_pages_of_2_mib():
    paged, adamw = PagedAdamW([parameter(3)]), torch.optim.AdamW([parameter(3)])
    assert paged.defaults == {name: adamw.defaults[name] for name in paged.defaults}
    assert set(paged.defaults) == {"lr", "betas", "eps", "weight_decay"}
    assert (paged.page_bytes, paged.budget, paged.alternate) == (2 * 1024**2, 16 * 1024**2, True)


class Stream:
    """Stands in for a CUDA stream, and notes what is called."""

    def __init__(self, name: str, calls: list[str]):
        self.name, self.calls = name, calls

    def wait_stream(self, other) -> None:
        self.calls.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.calls.append(f"{self.name} is done")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What is called on the streams of a GPU that we do not have."""
    calls = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"copy of {device}", calls))
    current = Stream("current", calls)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: ("in", stream.name))
    return calls


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (63, "fetch 0, wait, update 0, fetch 1, wait, update 1, fetch 2, wait, update 2"),
        (64, "fetch 0, wait, fetch 1, update 0, wait, fetch 2, update 1, wait, update 2"),
    ],
)
def test_the_next_page_is_fetched_before_an_update_if_there_is_room_for_two(
    budget, expected, calls
):
    p = parameter(12)
    optimizer = PagedAdamW([p], page_bytes=32, device_budget_bytes=budget)  # 4 float32s per page
    fetch, update = optimizer.fetch, optimizer.update
    optimizer.fetch = lambda i: calls.append(f"fetch {i}") or fetch(i)
    optimizer.update = lambda i, groups: calls.append(f"update {i}") or update(i, groups)
    optimizer.streams = {p.device: Stream("copy", calls)}
    p.grad = torch.ones(12)
    optimizer.step()
    assert ", ".join(calls).replace("current waits for copy", "wait") == expected


def test_a_gpu_has_one_copy_stream_that_waits_for_earlier_work(calls):
    optimizer, gpu = trained(), torch.device("cuda", 0)
    for _ in range(2):
        assert optimizer.copy_stream(gpu) == ("in", "copy of cuda:0")
    assert calls == ["copy of cuda:0 waits for current"] * 2
    assert len({id(stream) for stream in optimizer.streams.values()}) == 1
    first = optimizer.streams[gpu]
    optimizer.copy_stream(gpu)
    assert optimizer.streams[gpu] is first
    assert optimizer.copy_stream(torch.device("cuda", 1)) == ("in", "copy of cuda:1")
    assert copy.deepcopy(optimizer).streams == {}


def test_copies_are_finished_before_pages_are_read_or_written_elsewhere(calls):
    optimizer = trained()
    state = optimizer.state_dict()
    optimizer.streams = {torch.device("cuda", i): Stream(f"copy {i}", calls) for i in range(2)}
    for call in (optimizer.state_dict, optimizer.__getstate__):
        call()
        assert calls == ["copy 0 is done", "copy 1 is done"]
        calls.clear()
    optimizer.load_state_dict(state)
    assert calls == ["copy 0 is done", "copy 1 is done"]


def test_pages_without_a_gradient_stay_where_they_are():
    first, last = parameter(4), parameter(5)
    optimizer = PagedAdamW([first, last], page_bytes=32, device_budget_bytes=32)
    assert len(optimizer.pages) == 3  # 4 float32s per page
    last.grad = torch.ones(5)
    optimizer.step()
    assert optimizer.counters["faults"] == 2


def test_pages_and_states_are_in_host_memory_whatever_the_default_device_is():
    expected = trained().state_dict()
    with torch.device("meta"):
        optimizer = trained()
        state = optimizer.state_dict()
        assert_same(state, expected)
        state["state"][0]["step"] = 2
        optimizer.load_state_dict(state)
    assert_same(optimizer.state_dict(), expected)


def test_a_page_is_written_back_when_it_is_evicted():
    p = parameter(8)
    optimizer = PagedAdamW([p], page_bytes=32, device_budget_bytes=32)  # four float32s per page
    p.grad = torch.ones(8)
    optimizer.step()
    first, second = optimizer.pages
    assert first.host.count_nonzero() == 8
    assert second.host.count_nonzero() == 0  # still on the device only
    assert optimizer.resident[1].count_nonzero() == 8


def test_the_root_of_the_bias_correction_is_taken_as_in_torch():
    """Where `x ** 0.5` and `math.sqrt(x)` differ in the last bit, as at step 47 of this beta."""
    theirs, ours = parameter(99, dtype=torch.float64), parameter(99, dtype=torch.float64)
    options = {"lr": 1e-2, "betas": (0.9, 0.4585431019894999)}
    adamw = torch.optim.AdamW([theirs], **options, foreach=False, fused=False)
    paged = PagedAdamW([ours], **options)
    for _ in range(50):
        theirs.grad = ours.grad = torch.cos(99 * theirs.detach())
        adamw.step()
        paged.step()
    assert torch.equal(theirs, ours)


def test_a_transposed_gradient_gives_the_step_of_a_contiguous_one():
    first, second = parameter(5, 3), parameter(5, 3)
    gradient = torch.arange(15.0).view(3, 5).t()
    first.grad, second.grad = gradient, gradient.contiguous()
    assert not first.grad.is_contiguous()
    for p in (first, second):
        PagedAdamW([p], page_bytes=32, device_budget_bytes=32).step()
    assert torch.equal(first, second)


# --- in lockstep with AdamW ---

ACTIONS = ("step", "step", "step", "add", "exchange", "deepcopy", "pickle", "bad state")
SHAPES = ((), (0,), (1,), (7,), (5, 3), (2, 0, 3), (33,))
options = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0, 1e-3, 0.1]),
        "betas": st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
        "eps": st.sampled_from([1e-8, 0.1]),
        "weight_decay": st.sampled_from([0, 0.01, 1]),
    }
)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
groups = st.tuples(options, st.lists(st.tuples(st.sampled_from(SHAPES), dtypes), max_size=3))
actions = st.lists(
    st.tuples(st.sampled_from(ACTIONS), groups, st.integers(0, 2**32)), min_size=3, max_size=10
)
paging = st.tuples(st.sampled_from([16, 50, 64, 256]), st.integers(1, 6), st.booleans())


def lockstep(first, actions, paging):
    """Do the same to AdamW and PagedAdamW, and compare all that can be seen after every action."""

    def group(options, tensors):
        return {"params": [parameter(*shape, dtype=dtype) for shape, dtype in tensors], **options}

    page, pages, alternate = paging
    adamw = torch.optim.AdamW([group(*first)], foreach=False, fused=False)
    paged = PagedAdamW(
        [group(*first)], page_bytes=page, device_budget_bytes=page * pages, alternate=alternate
    )
    for action, new, seed in actions:
        if action == "add":
            adamw.add_param_group(group(*new))
            paged.add_param_group(group(*new))
        if action == "exchange":
            states = copy.deepcopy((paged.state_dict(), adamw.state_dict()))
            adamw.load_state_dict(states[0])
            paged.load_state_dict(states[1])
        if action == "bad state":
            spoil(paged, random.Random(seed))
        old = None
        if action in ("deepcopy", "pickle"):
            old, before = paged, everything(paged)
            paged = copy.deepcopy(old) if action == "deepcopy" else pickle.loads(pickle.dumps(old))
        if action in ("step", "deepcopy", "pickle"):
            take_a_step(adamw, seed)
            take_a_step(paged, seed)
        if old is not None:
            assert_same(everything(old), before)
            take_a_step(old, seed)
            assert_same(seen(old), seen(paged))
            assert old.counters == paged.counters
        assert_same(seen(adamw), seen(paged))
        assert len(paged.resident) <= pages


def take_a_step(optimizer, seed: int) -> None:
    """With gradients from the seed: some None, some zero, some not contiguous."""
    generator, choice = torch.Generator().manual_seed(seed), random.Random(seed)
    for p in parameters(optimizer):
        p.grad = None
        g = torch.randn(*p.shape, 2, generator=generator, dtype=torch.float64)
        g = (g * 10 ** choice.uniform(-4, 1)).to(p.dtype)[..., 0]
        kind = choice.choice(("none", "zero", "strided", "dense", "dense"))
        if kind != "none":
            p.grad = {"zero": 0 * g, "strided": g, "dense": g.contiguous()}[kind]
    optimizer.step()


def seen(optimizer) -> tuple:
    """Weights, state, and the settings that both optimizers have."""
    names = ("lr", "betas", "eps", "weight_decay")
    settings = [{name: group[name] for name in names} for group in optimizer.param_groups]
    weights = [p.detach() for p in parameters(optimizer)]
    return weights, optimizer.state_dict()["state"], settings


def spoil(optimizer: PagedAdamW, choice: random.Random) -> None:
    """Load a state with one fault, somewhere in it."""
    state = copy.deepcopy(optimizer.state_dict())
    choice.choice(state["param_groups"])["betas"] = (0.9, 1.0)
    if state["state"]:
        state["param_groups"] = optimizer.state_dict()["param_groups"]
        entry = state["state"][choice.choice(list(state["state"]))]
        name = choice.choice(list(entry))
        entry[name] = choice.choice([None, torch.full_like(entry[name], math.nan)[None]])
    refused(optimizer, None, optimizer.load_state_dict, state)


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(groups, actions, paging)
def test_every_sequence_of_calls_equals_adamw(first, actions, paging):
    lockstep(first, actions, paging)


@pytest.mark.slow
@settings(max_examples=2000, derandomize=True, deadline=None, database=None)
@given(groups, actions, paging)
def test_many_sequences_of_calls_equal_adamw(first, actions, paging):
    lockstep(first, actions, paging)
