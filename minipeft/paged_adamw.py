r"""PagedAdamW: AdamW whose state lives in host memory, and visits the device a page at a time.

AdamW keeps two numbers for each trained weight, its first and second moment. Here they lie in
pages of one size in host memory, and a budget says how many bytes of them may be on the device at
once. A page that is needed and not there is fetched (a fault); where that exceeds the budget, the
page that was used longest ago is written back and dropped (an eviction). So a moment of little
room on the device ends in copies, not in an error; the numbers are the same.

Paper: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314,
section 3, "Paged Optimizers". The step is that of Loshchilov and Hutter 2017, arXiv 1711.05101:

    θ ← (1 - η λ) θ,    m ← β₁ m + (1 - β₁) g,    v ← β₂ v + (1 - β₂) g²                      (1)
    θ ← θ - η / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)                                         (2)

Shapes: a page is (2, elements), the first moments and the second. A large parameter takes several
pages, small ones share one. State: 2 numbers a trained weight, as AdamW's.

Where we differ. bitsandbytes lets the driver move memory, and so hides the idea: here are a page
table, counters, and the order of the walk as an option, because the obvious one never finds a page
that stayed. The numbers are those of `torch.optim.AdamW(foreach=False, fused=False)`, to the bit.

>>> optimizer = PagedAdamW(parameters, lr=1e-3, page_bytes=2**21, device_budget_bytes=2**24)
"""

import math
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Page:
    """A piece of the state: the moments of some runs of parameters, packed one after the other."""

    home: Tensor  # (2, elements) in host memory
    device: torch.device
    used: int = 0  # elements
    runs: list[tuple[nn.Parameter, slice, slice]] = field(default_factory=list)
    # each: a parameter, which of its elements, and where in the page their moments are


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with a paged state. Numbers and state dict are AdamW's, both ways.

    Walking the pages in the same order every step never finds one that stayed, however large the
    budget, as long as it is below the state: the next page needed is always the one just dropped.
    `alternate` turns round after every step, and finds what was used last.

    `counters` has hits, faults, evictions, bytes_in and bytes_out. Raises ValueError for a budget
    below one page, a page that holds no element, and a parameter that is not contiguous.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        page_bytes: int = 2**21,
        device_budget_bytes: int = 2**24,
        alternate: bool = True,
    ):
        if page_bytes < 16:
            raise ValueError(f"page_bytes is {page_bytes}: an element takes up to 16")
        if device_budget_bytes < page_bytes:
            raise ValueError(
                f"a budget of {device_budget_bytes} bytes is below one page of {page_bytes}"
            )
        self.page_bytes, self.budget, self.alternate = page_bytes, device_budget_bytes, alternate
        self.pages: list[Page] = []
        self.resident: OrderedDict[int, Tensor] = OrderedDict()  # the least recently used first
        self.streams: dict[torch.device, torch.cuda.Stream] = {}  # for copies, a GPU each
        self.counters = dict.fromkeys(("hits", "faults", "evictions", "bytes_in", "bytes_out"), 0)
        self.steps = 0
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)  # calls add_param_group

    def add_param_group(self, group: dict) -> None:
        """Add parameters, and give each a place in the last page of its kind, or in new ones."""
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_contiguous():
                raise ValueError("a parameter that is not contiguous cannot be paged")
            size, kind, at = self.page_bytes // (2 * p.element_size()), (p.dtype, p.device), 0
            while at < p.numel():
                like = [page for page in self.pages if (page.home.dtype, page.device) == kind]
                if not like or like[-1].used == size:
                    home = torch.zeros(2, size, dtype=p.dtype, device="cpu")
                    home = home.pin_memory() if p.device.type == "cuda" else home
                    like = [Page(home, p.device)]
                    self.pages += like
                page = like[-1]
                n = min(size - page.used, p.numel() - at)
                page.runs.append((p, slice(at, at + n), slice(page.used, page.used + n)))
                page.used, at = page.used + n, at + n

    def beside(self, device: torch.device):
        """Copies made in this context run beside the arithmetic, where a GPU has a second stream.

        They wait for the arithmetic that was asked for before.
        """
        if device.type != "cuda":
            return nullcontext()
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        self.streams[device].wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self.streams[device])

    def fetch(self, index: int) -> None:
        """See to it that a page is on its device, where `resident` has it: (2, elements)."""
        page, count = self.pages[index], self.counters
        if index in self.resident:
            count["hits"] += 1
            self.resident.move_to_end(index)
            return
        count["faults"] += 1
        memory = None
        with self.beside(page.device):
            while self.resident and (len(self.resident) + 1) * self.page_bytes > self.budget:
                memory = self.evict(next(iter(self.resident)))
            if memory is None or (memory.dtype, memory.device) != (page.home.dtype, page.device):
                memory = torch.empty_like(page.home, device=page.device)
            self.resident[index] = memory.copy_(page.home, non_blocking=True)
        count["bytes_in"] += page.home.nbytes

    def evict(self, index: int) -> Tensor:
        """Write a page back and drop it from the device; returns its memory for another.

        Copies on one stream run in their order, so the memory is read before it is written again.
        """
        memory = self.resident.pop(index)
        self.pages[index].home.copy_(memory, non_blocking=True)
        self.counters["evictions"] += 1
        self.counters["bytes_out"] += memory.nbytes
        return memory

    @torch.no_grad()
    def step(self, closure=None):
        """One step of AdamW, page by page; the next page is fetched while one is computed."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbers = {}  # for equations (1) and (2), by parameter that has a gradient
        for group in self.param_groups:
            known = {}  # they are the same for most parameters of a group
            for p in [p for p in group["params"] if p.grad is not None]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1  # a number: a tensor takes longer to count
                kind = state["step"], p.dtype
                if kind not in known:
                    known[kind] = scalars(*kind, group)
                numbers[p] = known[kind]
        order = [i for i, page in enumerate(self.pages) if any(r[0] in numbers for r in page.runs)]
        if self.alternate and self.steps % 2:
            order.reverse()
        ahead = self.budget >= 2 * self.page_bytes  # then the page at work is not the oldest
        for n, index in enumerate(order):
            page = self.pages[index]
            if n == 0 or not ahead:
                self.fetch(index)
            if page.device in self.streams:  # this page's copy has to be there, not the next one's
                torch.cuda.current_stream(page.device).wait_stream(self.streams[page.device])
            if ahead and n + 1 < len(order):
                self.fetch(order[n + 1])
            m, v = self.resident[index]
            for p, part, at in page.runs:
                if p in numbers:
                    w, grad = p.view(-1)[part], p.grad.reshape(-1)[part]
                    update(w, grad, m[at], v[at], *numbers[p])
        self.steps += 1
        return loss

    def wait(self) -> None:
        """Until all copies have arrived."""
        for stream in self.streams.values():
            stream.synchronize()

    def state_dict(self) -> dict:
        """As AdamW's: step, exp_avg and exp_avg_sq of every parameter that has been stepped."""
        self.wait()
        packed = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        moments = {p: torch.empty(2, p.numel(), dtype=p.dtype, device="cpu") for p in parameters}
        for index, page in enumerate(self.pages):
            memory = self.resident.get(index, page.home)
            for p, part, at in page.runs:
                moments[p][:, part] = memory[:, at]
        for i, state in packed["state"].items():
            both = moments[parameters[i]].view(2, *parameters[i].shape)
            step = torch.tensor(float(state["step"]), device="cpu")
            packed["state"][i] = {"step": step, **dict(zip(MOMENTS, both, strict=True))}
        return packed

    def load_state_dict(self, state_dict: dict) -> None:
        """Take AdamW's or our own state over. Raises ValueError for a state of another shape."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, state in state_dict["state"].items():
            if state["exp_avg"].shape != parameters[i].shape:
                raise ValueError(
                    f"the state of parameter {i} has the shape {tuple(state['exp_avg'].shape)}, "
                    f"the parameter {tuple(parameters[i].shape)}"
                )
        self.wait()
        super().load_state_dict(state_dict)
        self.resident.clear()
        for page in self.pages:
            page.home.zero_()
            for p, part, at in page.runs:
                if p in self.state:
                    for row, name in zip(page.home, MOMENTS, strict=True):
                        row[at] = self.state[p][name].reshape(-1)[part]
        for state in self.state.values():
            state["step"] = int(state["step"])
            for name in MOMENTS:
                del state[name]


def scalars(t: int, dtype: torch.dtype, group: dict) -> tuple:
    """What `update` needs besides the elements, at step t.

    β₂, √(1 - β₂ᵗ), ε and 1 - η λ as tensors of no dimension: on a small piece torch takes twice as
    long for a Python number. Then 1 - β₁, 1 - β₂ and -η / (1 - β₁ᵗ), numbers, as torch wants them.
    """
    lr, (beta1, beta2) = group["lr"], group["betas"]
    tensors = beta2, math.sqrt(1 - beta2**t), group["eps"], 1 - lr * group["weight_decay"]
    wide = torch.promote_types(dtype, torch.float32)
    tensors = torch.tensor(tensors, dtype=wide, device="cpu").unbind()
    return *tensors, 1 - beta1, 1 - beta2, -lr / (1 - beta1**t)


def update(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, beta2, root, eps, kept, new1, new2, rate
) -> None:
    """Equations (1) and (2) on some elements, in place; w last, while m and √v are in cache."""
    m.lerp_(g, new1)
    v.mul_(beta2).addcmul_(g, g, value=new2)
    w.mul_(kept).addcdiv_(m, v.sqrt().div_(root).add_(eps), value=rate)


def _check() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(40, 30), torch.randn(7), torch.randn(64, 64)]
    theirs, ours = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    reference = torch.optim.AdamW(theirs, lr=1e-2, foreach=False, fused=False)
    paged = PagedAdamW(ours, lr=1e-2, page_bytes=2**12, device_budget_bytes=6 * 2**12)
    for _ in range(10):
        for a, b in zip(theirs, ours, strict=True):
            a.grad = b.grad = a.detach() ** 2
        reference.step()
        paged.step()
    for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        assert torch.equal(a, b), "the same numbers, to the bit"
        states = (o.state_dict()["state"][i] for o in (reference, paged))
        assert all(torch.equal(*both) for both in zip(*(s.values() for s in states), strict=True))
    pages = math.ceil(sum(w.numel() for w in weights) * 8 / 2**12)
    assert len(paged.pages) == pages == 11
    assert paged.counters["hits"] == 9 * 6, "after the first step, the 6 that stayed"
    print(f"paged_adamw.py: AdamW's bits with 6 of {pages} pages on the device; {paged.counters}")


if __name__ == "__main__":
    _check()
