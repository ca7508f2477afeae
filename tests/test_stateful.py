"""Random sequences of calls on a PeftModel, compared after every call with what they should do.

`MINIPEFT_SEED=random pytest tests/test_stateful.py -m ""` draws new sequences, a number its own.
"""

import copy
import os
import pickle
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import hypothesis.stateful as stateful
import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from test_adapters import CONFIGS, IDS, checksum, small_base
from torch import Tensor

from minipeft import (
    GPT,
    AdaLoraConfig,
    BitFitConfig,
    LoraConfig,
    PeftModel,
    PromptEncoderConfig,
    quantize_model,
)

SCHEDULE = {"init_r": 6, "target_r": 1, "total_step": 2}  # after one step, it is not finished
CONFIGS = CONFIGS | {
    "adalora": lambda: AdaLoraConfig(target_modules=["c_attn", "c_fc"], **SCHEDULE),
    "rslora": lambda: LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True),
    "lstm": lambda: PromptEncoderConfig(1, "LSTM", encoder_hidden_size=3),
}
SUMMABLE = ("lora", "lora_dropout", "rslora")
MERGEABLE = (*SUMMABLE, "lora_rows", "adalora", "bitfit")
TOLERANCE = {  # relative to the largest number; a float64 model has parts in float32
    torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1,
}  # fmt: skip
REFUSED = (  # calls that raise ValueError, with the name of an adapter
    lambda model, name: model.set_adapter("nobody"),
    lambda model, name: model.set_adapter([name, name]),
    lambda model, name: model.delete_adapter("nobody"),
    lambda model, name: model.add_adapter(name, BitFitConfig()),
    lambda model, name: model.add_adapter("a.b", BitFitConfig()),
    lambda model, name: model.add_adapter("new", LoraConfig(target_modules=["nothing"])),
    lambda model, name: model.load_adapter("nowhere", name),
    lambda model, name: model.load_adapter("nowhere", "new"),
    lambda model, name: model.add_weighted_adapter([name, "nobody"], [1.0, 1.0], "new"),
    lambda model, name: model.add_weighted_adapter([name], [float("nan")], "new"),
    lambda model, name: model.merge_adapter(["nobody"]),
    lambda model, name: model.save_pretrained("nowhere", safe_serialization=False),
    lambda model, name: PeftModel(model),
    lambda model, name: quantize_model(model.base_model),
)
kinds, numbers, flags = st.sampled_from(list(CONFIGS)), st.integers(0, 11), st.booleans()


def logits(model, ids=IDS) -> Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        found = model(ids).logits
    model.train(training)
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number; NaN if either has NaN."""
    return ((found.double() - wanted.double()).abs().max() / wanted.abs().max()).item()


def close(found: Tensor, wanted: Tensor) -> bool:
    return error(found, wanted) < max(TOLERANCE[found.dtype], TOLERANCE[wanted.dtype])


def same(found: dict, wanted: dict) -> bool:
    return list(found) == list(wanted) and all(torch.equal(found[k], wanted[k]) for k in wanted)


def cloned(state: dict) -> dict:
    return {key: tensor.clone() for key, tensor in state.items()}


@dataclass
class Known:
    """What an adapter must be like."""

    kind: str
    trainable: bool
    steps: int = 0  # of training
    merged: float = 0.0  # the error that merging may cause; 0 while it is not merged
    logits: Tensor = field(default=None, repr=False)  # while it is not merged

    @property
    def unfinished(self) -> bool:
        return self.kind == "adalora" and 0 < self.steps < SCHEDULE["total_step"]


class Calls(stateful.RuleBasedStateMachine):
    count = 0  # of all calls, for the record

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.made, self.folder = 0, tempfile.TemporaryDirectory()

    def teardown(self):
        self.folder.cleanup()

    # --- the expected state ---

    def wrap(self, base: GPT, kind: str, in_block: bool) -> None:
        """Start with a model whose first adapter may be added inside a disable_adapter() block."""
        self.training, self.pristine = base.training, copy.deepcopy(base)
        self.model, self.active, self.known = PeftModel(base), None, {}
        self.state, self.saved, self.checkpoints, self.other = {}, [], [], None
        self.blocks = []  # the disable_adapter() blocks that are open
        if in_block:
            self.block("open")
        self.add(kind)

    def new_name(self) -> str:
        self.made += 1
        return "default" if "default" not in self.known else f"adapter{self.made}"

    def note(self, name: str) -> None:
        """Remember the new tensors and logits of one adapter; the others must be as before."""
        new = cloned(self.model.state_dict())
        self.state = {k: t if k.startswith(f"{name}.") else self.state[k] for k, t in new.items()}
        twin = copy.deepcopy(self.model)
        twin.set_adapter(name)  # works although the model itself may be in a block
        if self.known[name].merged:
            twin.unmerge_adapter()
        self.known[name].logits = logits(twin)

    def register(self, name: str, *known) -> None:
        self.known[name] = Known(*known)
        self.active = self.active or name
        self.note(name)

    def snapshot(self) -> tuple[dict, dict]:
        known = {name: replace(adapter) for name, adapter in self.known.items()}
        return cloned(self.model.state_dict()), known

    def choose(self, i: int) -> str:
        return list(self.known)[i % len(self.known)]

    room = property(lambda self: len(self.known) < 5)
    attached = property(lambda self: self.active is not None and not self.blocks)
    current = property(lambda self: self.known[self.active])
    trains = property(lambda self: self.attached and self.current.trainable)

    # --- what holds after every call ---

    @stateful.invariant()
    def check(self):
        Calls.count += 1
        self.check_adapters()
        found = logits(self.model)
        if not self.attached:
            assert torch.equal(found, logits(self.pristine)), "disabled: not the base's logits"
        elif self.current.merged:
            assert error(found, self.current.logits) < self.current.merged
        else:
            assert torch.equal(found, self.current.logits), "not the active adapter's logits"
        self.check_base()  # last, because opening a block could hide a fault
        if self.other is not None:
            model, state, wanted = self.other
            assert same(model.state_dict(), state), "a copy shares tensors with this model"
            assert torch.equal(logits(model), wanted), "a copy shares layers with this model"

    def check_adapters(self) -> None:
        model = self.model
        assert (model.active_adapter, model.is_attached) == (self.active, self.attached)
        assert list(model.adapters) == list(self.known)
        assert same(model.state_dict(), self.state), "the tensors of an adapter changed"
        assert all(module.training == self.training for module in model.modules())
        free = {id(p) for p in model.parameters() if p.requires_grad}
        own = model.adapters[self.active].parameters().values() if self.trains else ()
        assert free == {id(p) for p in own}, "trainable: not the active adapter's parameters"
        assert all(p.grad is None for p in model.parameters())
        for name, adapter in model.adapters.items():
            buffers = [n for m in adapter.modules().values() for n, _ in m.named_buffers()]
            assert any(n.startswith("merged_") for n in buffers) == bool(self.known[name].merged)

    def check_base(self) -> None:
        tensors, wanted = self.model.base_model.state_dict(), self.pristine.state_dict()
        tensors = {key.replace(".base_layer", ""): tensor for key, tensor in tensors.items()}
        assert same({key: tensors[key] for key in wanted}, wanted), "the base's tensors changed"
        with self.model.disable_adapter():
            assert checksum(self.model.base_model) == checksum(self.pristine)
            assert torch.equal(logits(self.model), logits(self.pristine)), "disabled: not the base"

    # --- the calls ---

    @stateful.initialize(
        four_bits=st.sampled_from([False, False, True]), kind=kinds, in_block=flags
    )
    def start(self, four_bits, kind, in_block):
        self.wrap(small_base(four_bits), kind, in_block)

    @precondition(lambda self: self.room)
    @rule(kind=kinds)
    def add(self, kind):
        name = self.new_name()
        four_bits = any("codes" in key for key in self.pristine.state_dict())
        if four_bits and kind in ("adalora", "bottleneck"):
            with pytest.raises(ValueError, match="cannot adapt"):
                self.model.add_adapter(name, CONFIGS[kind]())
            kind = "lora"
        self.model.add_adapter(name, CONFIGS[kind]())
        self.register(name, kind, True)
        if kind in MERGEABLE or kind == "bottleneck":
            assert torch.equal(self.known[name].logits, logits(self.pristine)), "new, but not zero"
        if kind != "adalora":  # its schedule knows an untrained adapter by its zeros
            with torch.no_grad():
                for tensor in self.model.adapters[name].parameters().values():
                    tensor.add_(0.3 * torch.randn_like(tensor))  # as if trained
            self.note(name)

    @rule(i=numbers, listed=flags)
    def set_adapter(self, i, listed):
        self.active = self.choose(i)
        self.model.set_adapter([self.active] if listed else self.active)

    @rule(i=numbers)
    def delete(self, i):
        name = self.choose(i)
        if len(self.known) == 1:
            with pytest.raises(ValueError, match="only adapter"):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        del self.known[name]
        self.state = {k: t for k, t in self.state.items() if not k.startswith(f"{name}.")}
        if name == self.active:
            self.active = self.choose(0)

    @rule(what=st.sampled_from(["open", "close", "raise"]))
    def block(self, what):
        """Open or close a disable_adapter() block, or raise an error inside."""
        if what == "open" and len(self.blocks) < 3:
            self.blocks.append(self.model.disable_adapter())
            self.blocks[-1].__enter__()
        elif what != "open" and self.blocks:
            error = KeyError("inside the block") if what == "raise" else None
            assert not self.blocks.pop().__exit__(error and KeyError, error, None), "swallowed"

    @rule(training=flags)
    def train_or_eval(self, training):
        self.training = training
        self.model.train(training)

    @rule(n=st.integers(1, 2))
    def optimize(self, n):
        model = self.model.train()
        if self.attached and self.current.merged:
            with pytest.raises(RuntimeError, match="merged"):
                model(IDS)
        elif not self.trains:
            assert not model(IDS).logits.requires_grad
        else:
            self.checkpoints.append(self.snapshot())
            free = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(free, lr=0.05, eps=1e-4)  # 1e-8 would be 0 in float16
            for _ in range(n):
                model(IDS, labels=IDS).loss.backward()
                optimizer.step()
                self.current.steps += 1
                model.update_and_allocate(self.current.steps)
                assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
                optimizer.zero_grad()
            assert not same(model.state_dict(), self.state), "nothing was trained"
            self.note(self.active)
        model.train(self.training)

    def can_merge(self) -> bool:
        return self.attached and self.current.kind in MERGEABLE and not self.current.unfinished

    @rule(undo=flags, safe=flags)
    def merge(self, undo, safe):
        if not self.can_merge():
            with pytest.raises((ValueError, RuntimeError)):
                self.model.unmerge_adapter() if undo else self.model.merge_adapter()
        elif undo:
            self.model.unmerge_adapter()
            self.current.merged = 0.0
        else:
            self.model.merge_adapter(safe_merge=safe)
            self.current.merged = TOLERANCE[self.current.logits.dtype]

    @rule(how=st.sampled_from(["copy", "in place", "unload"]), kind=kinds, in_block=flags)
    def finish(self, how, kind, in_block):
        """Get a plain model, and wrap it again if it is the base."""
        old, wanted = self.model, logits(self.pristine)
        if how != "unload" and not self.can_merge():
            with pytest.raises((ValueError, RuntimeError)):
                old.merge_and_unload(inplace=how == "in place")
            return
        if how == "unload":
            plain = old.unload()
            assert checksum(plain) == checksum(self.pristine)
        else:
            plain, wanted = old.merge_and_unload(inplace=how == "in place"), self.current.logits
            assert list(plain.state_dict()) == list(small_base().state_dict())
        assert type(plain) is GPT
        assert not hasattr(plain, "has_adapters")
        assert close(logits(plain), wanted), "merged: not the adapter's logits"
        if how == "copy":
            for tensor in plain.state_dict().values():
                tensor.zero_()  # it must share nothing with this model
        else:
            assert plain is old.base_model
            assert not old.adapters
            self.wrap(plain, kind, in_block)

    @rule(i=numbers, trainable=flags)
    def save_and_load(self, i, trainable):
        folder = Path(tempfile.mkdtemp(dir=self.folder.name))
        if any(adapter.unfinished for adapter in self.known.values()):
            with pytest.raises(RuntimeError, match="ranks add up"):
                self.model.save_pretrained(folder)
            assert not list(folder.iterdir())
        else:
            self.model.save_pretrained(folder)
            for name, adapter in self.known.items():
                own = folder if name == "default" else folder / name
                again = PeftModel.from_pretrained(copy.deepcopy(self.pristine), own)
                assert close(logits(again), adapter.logits), f"a saved {adapter.kind} changed"
                self.saved.append((own, replace(adapter)))
        if self.saved and self.room:
            (own, old), name = self.saved[i % len(self.saved)], self.new_name()
            self.model.load_adapter(own, name, is_trainable=trainable)
            self.register(name, old.kind, trainable, old.steps)
            assert close(self.known[name].logits, old.logits), f"a loaded {old.kind} changed"

    @rule(i=numbers)
    def load_state_dict(self, i):
        """Load a state from before a training step, or the present one."""
        states = [self.snapshot(), *self.checkpoints]
        state, known = states[i % len(states)]
        if known.keys() != self.known.keys():
            with pytest.raises(ValueError):
                self.model.load_state_dict(state)
            return
        self.model.load_state_dict(state)
        for name, old in known.items():
            self.known[name].steps, self.known[name].merged = old.steps, 0.0
            self.note(name)
            assert close(self.known[name].logits, old.logits), f"{old.kind} changed"
        assert self.state.keys() == state.keys()
        assert all(torch.equal(t, state[key].to(t.dtype)) for key, t in self.state.items())

    @precondition(lambda self: self.room)
    @rule(chosen=st.lists(numbers, min_size=1, max_size=3), how=st.sampled_from(["cat", "svd"]))
    def add_weighted_adapter(self, chosen, how):
        names, name = [self.choose(i) for i in chosen], self.new_name()
        weights, adapters = [2.0, -0.5, 1.0][: len(names)], self.model.adapters
        if not all(self.known[n].kind in SUMMABLE for n in names):
            with pytest.raises(ValueError, match="weighted sum"):
                self.model.add_weighted_adapter(names, weights, name, how)
            return
        rank = sum(adapters[n].config.r for n in names)  # so that svd is exact
        self.model.add_weighted_adapter(names, weights, name, how, svd_rank=rank)
        self.register(name, "lora", False)
        for key, layer in adapters[name].layers.items():
            pairs = [(w, adapters[n].layers) for w, n in zip(weights, names, strict=True)]
            wanted = sum(w * layers[key].delta() for w, layers in pairs if key in layers)
            assert close(layer.delta(), wanted), "not the weighted sum of the updates"

    @rule(dtype=st.sampled_from(["half", "bfloat16", "float", "double"]))
    def cast(self, dtype):
        getattr(self.model, dtype)()
        getattr(self.pristine, dtype)()
        for name, adapter in self.known.items():
            old = adapter.logits
            self.note(name)
            assert close(adapter.logits, old), f"{adapter.kind} changed"
            if adapter.merged:  # W' was rounded
                adapter.merged = max(adapter.merged, TOLERANCE[adapter.logits.dtype])
        if dtype in ("half", "bfloat16"):  # the base was rounded
            self.saved, self.checkpoints = [], []

    @rule(pickled=flags, use_copy=flags)
    def duplicate(self, pickled, use_copy):
        other = self.model
        twin = pickle.loads(pickle.dumps(other)) if pickled else copy.deepcopy(other)
        assert twin.is_attached == self.attached
        if use_copy:
            self.active = None if self.blocks else self.active
            while self.blocks:
                self.block("close")
        self.model, other = (twin, other) if use_copy else (other, twin)
        self.other = other, cloned(other.state_dict()), logits(other)

    @rule()
    def calls_that_change_nothing(self):
        tokens = self.model.generate(IDS, max_new_tokens=2, eos_token_id=-1)
        found = logits(self.model, tokens[:, :-1])[:, -2:]  # without a cache
        chosen = found.gather(-1, tokens[:, -2:, None])
        assert close(chosen, found.amax(-1, keepdim=True)), "not the most likely tokens"
        for call in REFUSED:
            with pytest.raises(ValueError):
                call(self.model, self.choose(0))
        zeros = {key: torch.zeros_like(tensor) for key, tensor in self.state.items()}
        *_, last = zeros  # the other tensors must not be loaded before this one is checked
        for wrong in (zeros[last][None], zeros[last].long()):
            with pytest.raises(ValueError):
                self.model.load_state_dict(zeros | {last: wrong})
        with pytest.raises(ValueError):
            self.model.load_state_dict(zeros | {"nobody.weight": zeros[last]})
        del zeros[last]
        with pytest.raises(ValueError):
            self.model.load_state_dict(zeros)


def run(examples: int, calls: int, *phases: Phase) -> None:
    chosen = os.environ.get("MINIPEFT_SEED")
    if chosen and chosen != "random":
        seed(int(chosen))(Calls)
    options = settings(
        max_examples=examples, stateful_step_count=calls, phases=phases, derandomize=not chosen,
        report_multiple_bugs=False, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    stateful.run_state_machine_as_test(Calls, settings=options)


def test_any_sequence_of_calls_does_what_it_should_and_nothing_else():
    run(20, 20, Phase.generate)  # shrinking a failure would take minutes


@pytest.mark.slow
def test_any_long_sequence_of_calls_does_what_it_should_and_nothing_else():
    run(200, 50, Phase.generate, Phase.shrink)
