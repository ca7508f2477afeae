r"""PagedAdamW: AdamW whose optimizer state lives in host memory and visits the GPU page by page.

AdamW keeps two moments per trained weight. Here they are cut into pages of equal size in host
memory, and a budget limits how many bytes of pages may be on the device at once. A page that is
needed but not on the device is fetched (a fault). If that exceeds the budget, the least recently
used page is written back and dropped (an eviction). Paging changes memory and time, never the
numbers: they equal those of `torch.optim.AdamW(foreach=False, fused=False)` bit for bit.

Papers: Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, section 3, "Paged Optimizers"; Loshchilov
and Hutter 2017, "Decoupled Weight Decay Regularization", arXiv 1711.05101. Step t, gradient g:

    θ ← (1 - η λ) θ                                                  (1)
    m ← β₁ m + (1 - β₁) g,    v ← β₂ v + (1 - β₂) g²                 (2)
    θ ← θ - η / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)                (3)

Shapes: a page is (2, elements): the m and the v of some elements. A large parameter spans several
pages, and small parameters share one. State: 2 numbers per trained weight, as in AdamW.

Differences from bitsandbytes, the paper's implementation: it allocates CUDA unified memory, which
the driver moves; it has no pages of its own. It pages only tensors of at least 1e5 elements, so a
rank-8 adapter of a 7B model is never paged there. This file shows how paging works and matches
torch's AdamW; it is not a copy of bitsandbytes.
"""

import math
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor, nn


@dataclass
class Page:
    """A piece of the optimizer state: the moments of slices of parameters, one after the other."""

    host: Tensor  # (2, elements), in host memory
    device: torch.device  # the parameters' device
    used: int = 0  # elements in use
    # Per slice: the parameter, which of its elements, and where their moments are in the page.
    slices: list[tuple[nn.Parameter, slice, slice]] = field(default_factory=list)


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with a paged state. Its state dict is interchangeable with AdamW's.

    If the budget is smaller than the state, visiting the pages in the same order every step never
    finds one on the device: the next page needed was evicted earlier. `alternate` reverses the
    order after every step, so a step starts with the pages that the last one left on the device.
    Cast or move a model before you make its optimizer. Every method raises ValueError, before it
    changes anything, for what AdamW refuses and for what is not implemented here.
    """

    def __init__(
        self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, page_bytes: int = 2**21,
        device_budget_bytes: int = 2**24, alternate: bool = True,
    ):  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        check_group(defaults, [])
        if type(page_bytes) is not int or page_bytes < 16:  # two float64s
            raise ValueError(f"page_bytes must be an integer of at least 16, got {page_bytes!r}")
        if type(device_budget_bytes) is not int or device_budget_bytes < page_bytes:
            raise ValueError(f"{device_budget_bytes=} must be an integer of at least {page_bytes=}")
        self.page_bytes = page_bytes
        self.budget = device_budget_bytes
        self.alternate = alternate
        self.pages: list[Page] = []
        self.kinds: dict[nn.Parameter, tuple] = {}  # what each parameter's pages were made for
        self.resident: OrderedDict[int, Tensor] = OrderedDict()  # least recently used first
        self.streams: dict[torch.device, torch.cuda.Stream] = {}  # one copy stream per GPU
        self.counters = dict.fromkeys(("hits", "faults", "evictions", "bytes_in", "bytes_out"), 0)
        self.steps = 0
        super().__init__(params, defaults)  # calls add_param_group

    @torch.no_grad()
    def step(self, closure=None):
        """Take one AdamW step, page by page; the next page is copied while this one is updated."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = {p: g for g in self.param_groups for p in g["params"] if p.grad is not None}
        for p, group in groups.items():
            check_group(group, [p])
            if (was := self.kinds.get(p)) != kind(p):
                raise ValueError(f"a parameter of {was} became {kind(p)}: make a new PagedAdamW")
            if kind(p.grad) != kind(p):
                raise ValueError(f"a gradient must be {kind(p)}, got {kind(p.grad)}")
        for p in groups:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
        order = [i for i, page in enumerate(self.pages) if any(s[0] in groups for s in page.slices)]
        if self.alternate and self.steps % 2:
            order.reverse()
        prefetch = self.budget >= 2 * self.page_bytes  # room for this page and the next one
        for i, index in enumerate(order):
            if i == 0 or not prefetch:
                self.fetch(index)
            for device, stream in self.streams.items():  # this page's copy, not yet the next one's
                torch.cuda.current_stream(device).wait_stream(stream)
            if prefetch and i + 1 < len(order):
                self.fetch(order[i + 1])
            self.update(index, groups)
        self.steps += 1
        return loss

    def update(self, index: int, groups: dict[nn.Parameter, dict]) -> None:
        """Update the weights and moments of one page in place, in torch's order of operations."""
        page_m, page_v = self.resident[index]  # each (elements,)
        for p, part, where in self.pages[index].slices:
            if p not in groups:
                continue
            t, lr, (beta1, beta2) = self.state[p]["step"], groups[p]["lr"], groups[p]["betas"]
            w, g = p.view(-1)[part], p.grad.reshape(-1)[part]  # each (n,)
            m, v = page_m[where], page_v[where]  # each (n,)
            w.mul_(1 - lr * groups[p]["weight_decay"])  # (1)
            m.lerp_(g, 1 - beta1)  # (2)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)  # (2)
            denominator = v.sqrt().div_((1 - beta2**t) ** 0.5).add_(groups[p]["eps"])
            w.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))  # (3)

    def fetch(self, index: int) -> None:
        """Copy a page to its device unless it is there; `resident[index]` is then (2, elements)."""
        if index in self.resident:
            self.counters["hits"] += 1
            self.resident.move_to_end(index)
            return
        page = self.pages[index]
        with self.copy_stream(page.device):
            if (len(self.resident) + 1) * self.page_bytes > self.budget:
                self.evict(next(iter(self.resident)))
            self.resident[index] = page.host.to(page.device, non_blocking=True, copy=True)
        self.counters["faults"] += 1
        self.counters["bytes_in"] += page.host.nbytes

    def evict(self, index: int) -> None:
        """Write a page back to host memory and drop it from the device."""
        self.pages[index].host.copy_(self.resident.pop(index), non_blocking=True)
        self.counters["evictions"] += 1
        self.counters["bytes_out"] += self.pages[index].host.nbytes

    def copy_stream(self, device: torch.device):
        """A context whose copies wait for earlier work on the GPU and overlap with later work."""
        if device.type != "cuda":
            return nullcontext()
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        self.streams[device].wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self.streams[device])

    def add_param_group(self, group: dict) -> None:
        """Add parameters and assign each element's moments to a place in a page."""
        super().add_param_group(group)
        try:
            check_group(group, group["params"])
        except ValueError:
            self.param_groups.pop()
            raise
        for p in group["params"]:
            self.kinds[p] = kind(p)
            size = self.page_bytes // (2 * p.element_size())  # elements per page
            pin = p.device.type == "cuda"  # only pinned memory is copied asynchronously
            same = [x for x in self.pages if (x.host.dtype, x.device) == (p.dtype, p.device)]
            start = 0
            while start < p.numel():
                if not same or same[-1].used == size:
                    host = torch.zeros(2, size, dtype=p.dtype, device="cpu", pin_memory=pin)
                    same = [Page(host, p.device)]
                    self.pages += same
                page = same[-1]
                n = min(size - page.used, p.numel() - start)
                page.slices.append((p, slice(start, start + n), slice(page.used, page.used + n)))
                page.used += n
                start += n

    def state_dict(self) -> dict:
        """AdamW's state dict: step, exp_avg and exp_avg_sq, in host memory."""
        self.wait()
        packed = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        moments = {p: torch.empty(2, *p.shape, dtype=p.dtype, device="cpu") for p in parameters}
        for index, page in enumerate(self.pages):
            memory = self.resident.get(index, page.host)
            for p, part, where in page.slices:
                moments[p].view(2, -1)[:, part] = memory[:, where]
        for i, state in packed["state"].items():
            step = torch.tensor(float(state.get("step", 0)), device="cpu")
            m, v = moments[parameters[i]]
            packed["state"][i] = {"step": step, "exp_avg": m, "exp_avg_sq": v}  # not self.state's
        return packed

    def load_state_dict(self, state_dict: dict) -> None:
        """Load AdamW's state dict or ours. Raises ValueError if it does not match."""
        try:
            loaded = check_state(state_dict, self.param_groups)
        except (AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise ValueError(f"this is not AdamW's state dict: {error!r:.200}") from error
        self.wait()
        super().load_state_dict(state_dict | {"state": {}})  # the moments go into the pages
        self.state.update({p: {"step": step} for p, (step, _) in loaded.items()})
        self.resident.clear()
        for page in self.pages:
            page.host.zero_()
            for p, part, where in page.slices:
                if p in loaded:
                    page.host[:, where] = loaded[p][1][:, part]

    def __getstate__(self) -> dict:
        """What copy.deepcopy and pickle copy: all except the copy streams."""
        self.wait()
        own = "alternate", "budget", "counters", "kinds", "page_bytes", "pages", "resident", "steps"
        return super().__getstate__() | {k: getattr(self, k) for k in own} | {"streams": {}}

    def wait(self) -> None:
        """Wait until all copies have finished."""
        for stream in self.streams.values():
            stream.synchronize()


def kind(x: Tensor) -> tuple:
    return x.layout, x.dtype, x.device, tuple(x.shape)


def check_group(group: dict, parameters: list[Tensor]) -> None:
    """Raises ValueError for a setting or parameter that AdamW or this file does not support."""
    for name in ("lr", "eps", "weight_decay"):
        value = group.get(name)
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    betas = group.get("betas")
    good = isinstance(betas, (tuple, list)) and [isinstance(b, float) and 0 <= b < 1 for b in betas]
    if good != [True, True]:
        raise ValueError(f"betas must be two floats in [0, 1), got {betas!r}")
    for name in ("amsgrad", "maximize", "capturable", "differentiable"):
        if group.get(name):
            raise ValueError(f"{name} is not implemented: use torch.optim.AdamW")
    if not group.get("decoupled_weight_decay", True):
        raise ValueError("decoupled_weight_decay=False is not implemented: use torch.optim.Adam")
    if len(set(parameters)) < len(parameters):
        raise ValueError("a parameter is given twice")
    for p in parameters:
        if not p.is_floating_point() or p.layout != torch.strided or not p.is_contiguous():
            raise ValueError(f"a parameter must be floating-point and contiguous, got {kind(p)}")


def check_state(state_dict: dict, groups: list[dict]) -> dict[nn.Parameter, tuple[float, Tensor]]:
    """Check all of AdamW's state dict. Returns each parameter's step and moments, (2, elements)."""
    saved, states = state_dict["param_groups"], state_dict["state"]
    sizes, expected = ([len(group["params"]) for group in each] for each in (saved, groups))
    ids = [i for group in saved for i in group["params"]]
    if sizes != expected or len(set(ids)) < len(ids):
        raise ValueError(f"the groups must have {expected} different parameters, got {sizes}")
    if unknown := states.keys() - set(ids):
        raise ValueError(f"no group has the parameters {unknown} of the state")
    for group in saved:
        check_group(group, [])
    loaded = {}
    for i, p in zip(ids, (p for group in groups for p in group["params"]), strict=True):
        state = dict(states.get(i, {}))
        if not state:  # no step yet
            continue
        step = torch.as_tensor(state["step"], device="cpu").item()
        if not 0 <= step < math.inf:
            raise ValueError(f"the step of parameter {i} must be finite and at least 0, got {step}")
        m, v = (state[name].detach().cpu() for name in ("exp_avg", "exp_avg_sq"))
        if not m.shape == v.shape == p.shape or not m.is_floating_point() & v.is_floating_point():
            raise ValueError(f"parameter {i} is {kind(p)}, its moments are {kind(m)}, {kind(v)}")
        moments = torch.stack((m, v)).to(p.dtype).view(2, -1)
        if not (moments.isfinite().all() & (moments[1] >= 0).all()).item():
            raise ValueError(f"the moments of parameter {i} must be finite, and exp_avg_sq from 0")
        loaded[p] = step, moments
    return loaded


if __name__ == "__main__":  # the same numbers as AdamW, with 6 of 11 pages on the device
    theirs, ours = (nn.Parameter(torch.linspace(-1, 1, 5400)) for _ in range(2))
    adamw = torch.optim.AdamW([theirs], lr=1e-2, foreach=False, fused=False)
    paged = PagedAdamW([ours], lr=1e-2, page_bytes=2**12, device_budget_bytes=6 * 2**12)
    for _ in range(10):
        theirs.grad = ours.grad = theirs.detach() ** 2
        adamw.step()
        paged.step()
    print(f"paged_adamw.py: 6 of {len(paged.pages)} pages on the device; {paged.counters}")
    assert torch.equal(theirs, ours)
    assert paged.counters["hits"] == 9 * 6  # a step starts with the 6 pages that stayed
