"""Random sequences of calls on a PeftModel, compared after every call with what they should do.

`MINIPEFT_SEED=random pytest tests/test_stateful.py -m ""` tries new sequences, a number its own.
"""

import copy
import math
import os
import pickle
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import rule
from test_adapters import CONFIGS, IDS, MERGEABLE, NOT_ON_4_BITS, small_base
from torch import Tensor

from minipeft import GPT, AdaLoraConfig, BitFitConfig, LoraConfig, PeftModel, PromptEncoderConfig
from minipeft.methods.lora import LoraLinear
from minipeft.methods.qlora import QLoraLinear

SCHEDULE = {"init_r": 6, "target_r": 1, "total_step": 2}  # not finished after one step
CONFIGS = CONFIGS | {
    "adalora": lambda: AdaLoraConfig(target_modules=["c_attn", "c_fc"], **SCHEDULE),
    "lora_dropout": lambda: LoraConfig(3, 5, 0.5, "all-linear", use_rslora=True),
    "p_tuning": lambda: PromptEncoderConfig(1, "LSTM", encoder_hidden_size=3),
}
TOLERANCE = {  # relative to the largest number; a float64 model has parts in float32
    torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 0.05, torch.bfloat16: 0.3,
}  # fmt: skip
ROOM = 6  # adapters at most
kinds, numbers, flags = st.sampled_from([*CONFIGS, "adalora"]), st.integers(0, 11), st.booleans()


def logits(model, ids=IDS) -> Tensor:
    training = model.training
    with torch.no_grad():
        found = model.eval()(ids).logits
    model.train(training)
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number; NaN if either has NaN."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)).item()


def close(found: Tensor, wanted: Tensor) -> bool:
    return error(found, wanted) < max(TOLERANCE[found.dtype], TOLERANCE[wanted.dtype])


def same(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def cloned(state: dict) -> dict:
    return {key: tensor.clone() for key, tensor in state.items()}


@dataclass
class Expected:
    """What one adapter should be like."""

    kind: str  # its peft_type
    trainable: bool
    summable: bool = False  # in a weighted sum
    steps: int = 0  # how often it was trained
    merged: float = 0.0  # the error that merging may cause; 0 while it is not merged
    logits: Tensor | None = None  # while it is not merged
    ranks: dict[str, int] | None = None
    keys: list[str] | None = None  # the names of its tensors

    @property
    def unfinished(self) -> bool:
        return self.kind == "ADALORA" and 0 < self.steps < SCHEDULE["total_step"]

    @property
    def mergeable(self) -> bool:
        return self.kind in MERGEABLE and not self.unfinished

    def check_loaded(self, old: "Expected") -> None:
        assert close(self.logits, old.logits), f"a loaded {self.kind} has other logits"
        assert self.ranks == old.ranks
        assert self.keys == old.keys or not self.trainable, "a part was not loaded"


class Calls(stateful.RuleBasedStateMachine):
    count = 0  # of all calls, for the record

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.made, self.folder = 0, tempfile.TemporaryDirectory()

    def teardown(self):
        self.folder.cleanup()

    # --- what should be ---

    def wrap(self, base, kind, in_block) -> None:
        """Start with a model whose first adapter may be added inside a disable_adapter() block."""
        self.pristine, self.plain = copy.deepcopy(base), logits(base)
        self.model, self.training = PeftModel(base), base.training
        self.adapters: dict[str, Expected] = {}
        self.active = None  # its name
        self.blocks = []  # the disable_adapter() blocks that are open
        self.tensors, self.saved, self.checkpoints, self.other = {}, [], [], None
        self.block("open" if in_block else "close")
        self.add(kind)
        self.block("close")

    attached = property(lambda self: self.active is not None and not self.blocks)
    current = property(lambda self: self.adapters[self.active])

    def new_name(self) -> str:
        self.made += 1
        return "default" if "default" not in self.adapters else f"adapter{self.made}"

    def note(self, name, trainable=None, steps=0) -> Expected:
        """Remember one adapter that is new or changed. The others must be as before."""
        adapter = self.model.adapters[name]
        if name not in self.adapters:
            kinds = {type(layer) for layer in adapter.layers.values()}
            summable = bool(kinds) and kinds <= {LoraLinear, QLoraLinear}
            self.adapters[name] = Expected(adapter.config.peft_type, trainable, summable, steps)
            self.active = self.active or name
        tensors, expected = cloned(self.model.state_dict()), self.adapters[name]
        self.tensors |= {k: t for k, t in tensors.items() if k.startswith(f"{name}.")}
        twin = copy.deepcopy(self.model)  # a copy is in no disable_adapter() block
        twin.set_adapter(name)
        if expected.merged:
            twin.unmerge_adapter()
        expected.logits, expected.ranks = logits(twin), adapter.ranks()
        expected.keys = list(adapter.parameters())
        return expected

    def snapshot(self) -> tuple:
        adapters = {name: replace(adapter) for name, adapter in self.adapters.items()}
        return dict(self.tensors), adapters

    def pick(self, i, fits=lambda adapter: True) -> str | None:
        names = [name for name, adapter in self.adapters.items() if fits(adapter)]
        return names[i % len(names)] if names else None

    def activate(self, i, fits) -> bool:
        """Close all blocks and activate an adapter that fits, if there is one."""
        while self.blocks:
            self.block("close")
        name = self.pick(i, fits)
        if name:
            self.active = name
            self.model.set_adapter(name)
        return name is not None

    @stateful.invariant()
    def check(self):
        Calls.count += 1
        model, attached = self.model, self.attached
        assert (model.active_adapter, model.is_attached) == (self.active, attached)
        assert list(model.adapters) == list(self.adapters)
        assert same(model.state_dict(), self.tensors), "the tensors of an adapter changed"
        assert all(module.training == self.training for module in model.modules())
        assert all(p.grad is None for p in model.parameters())
        trains = attached and self.current.trainable
        own = model.adapters[self.active].parameters().values() if trains else ()
        free = {id(p) for p in model.parameters() if p.requires_grad}
        assert free == {id(p) for p in own}, "trainable: not the active adapter's parameters"
        for name, adapter in model.adapters.items():
            buffers = [n for m in adapter.modules().values() for n, _ in m.named_buffers()]
            merged = any(n.startswith("merged_") for n in buffers)
            assert merged == bool(self.adapters[name].merged)
        found, wanted = logits(model), self.current.logits if attached else self.plain
        if attached and self.current.merged:
            assert error(found, wanted) < self.current.merged
        else:
            assert torch.equal(found, wanted), "not the active adapter's, or the base's, logits"
        with model.disable_adapter():  # last, because a block could hide a fault
            base = model.base_model.state_dict()
            assert same(base, self.pristine.state_dict()), "the base's tensors changed"
            assert torch.equal(logits(model), self.plain), "disabled: not the base's logits"
        if self.other:
            model, tensors, wanted = self.other
            assert same(model.state_dict(), tensors), "a copy shares tensors with the model"
            assert torch.equal(logits(model), wanted), "a copy shares layers with the model"

    # --- the calls ---

    @stateful.initialize(
        four_bits=st.sampled_from([False, False, False, True]), in_block=flags,
        chosen=st.lists(kinds, min_size=2, max_size=4),
    )  # fmt: skip
    def start(self, four_bits, in_block, chosen):
        self.wrap(small_base(four_bits), chosen[0], in_block)
        for kind in chosen[1:]:
            self.add(kind)

    @rule(kind=kinds)
    def add(self, kind):
        if len(self.adapters) == ROOM:
            return
        four_bits = any("codes" in key for key in self.pristine.state_dict())
        if four_bits and kind in NOT_ON_4_BITS:
            kind = "lora"
        name = self.new_name()
        self.model.add_adapter(name, CONFIGS[kind]())
        expected, adapter = self.note(name, trainable=True), self.model.adapters[name]
        if adapter.layers:
            assert torch.equal(expected.logits, self.plain), "a new adapter changes the logits"
        expected.steps = self.made % 3
        for step in range(1, expected.steps + 1):  # as if trained
            for p in adapter.parameters().values():
                p.data += 0.1 * torch.randn_like(p)
                p.grad = torch.randn_like(p)
            adapter.update_and_allocate(step)
            for p in adapter.parameters().values():
                p.grad = None
        self.note(name)

    @rule(i=numbers, listed=flags)
    def set_adapter(self, i, listed):
        self.active = self.pick(i)
        self.model.set_adapter([self.active] if listed else self.active)

    @rule(i=numbers)
    def delete(self, i):
        name = self.pick(i)
        if len(self.adapters) == 1:  # see calls_that_change_nothing
            return
        self.model.delete_adapter(name)
        del self.adapters[name]
        self.tensors = {k: t for k, t in self.tensors.items() if not k.startswith(f"{name}.")}
        if name == self.active:
            self.active = self.pick(0)

    @rule(what=st.sampled_from(["open", "close", "raise"]))
    def block(self, what):
        """Open or close a disable_adapter() block, or raise an error inside."""
        if what == "open" and len(self.blocks) < 3:
            self.blocks.append(self.model.disable_adapter())
            self.blocks[-1].__enter__()
        elif what != "open" and self.blocks:
            failure = KeyError() if what == "raise" else None
            assert not self.blocks.pop().__exit__(failure and KeyError, failure, None), "swallowed"

    @rule(training=flags)
    def train_or_eval(self, training):
        self.training = training
        self.model.train(training)

    @rule(i=numbers, n=st.integers(1, 2))
    def optimize(self, i, n):
        if not self.activate(i, lambda adapter: adapter.trainable and not adapter.merged):
            return
        self.checkpoints.append(self.snapshot())
        model, adapter = self.model.train(), self.current
        free = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(free, lr=0.05, eps=1e-4)  # 1e-8 would be 0 in float16
        for _ in range(n):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            adapter.steps += 1
            model.update_and_allocate(adapter.steps)
            optimizer.zero_grad()
        model.train(self.training)
        assert not same(model.state_dict(), self.tensors), "nothing was trained"
        self.note(self.active)

    @rule(i=numbers, undo=flags, safe=flags)
    def merge(self, i, undo, safe):
        if not self.activate(i, lambda adapter: adapter.mergeable):
            return
        if undo:
            self.model.unmerge_adapter()
            self.current.merged = 0.0
            return
        self.model.merge_adapter(safe_merge=safe)
        self.current.merged = TOLERANCE[self.plain.dtype]
        with pytest.raises(RuntimeError, match="merged"):
            self.model.train()(IDS)
        self.model.train(self.training)

    @rule(
        i=numbers, how=st.sampled_from(["copy", "in place", "unload"]), kind=kinds, in_block=flags
    )
    def finish(self, i, how, kind, in_block):
        """Get a plain model, and wrap it again unless it is a copy."""
        old, wanted = self.model, self.plain
        if how == "unload":
            plain = old.unload()
            assert same(plain.state_dict(), self.pristine.state_dict())
        elif self.activate(i, lambda adapter: adapter.mergeable):
            plain, wanted = old.merge_and_unload(inplace=how == "in place"), self.current.logits
            assert list(plain.state_dict()) == list(small_base().state_dict())
        else:
            return
        assert type(plain) is GPT
        assert not hasattr(plain, "has_adapters")
        assert close(logits(plain), wanted), "not the logits of the adapter, or of the base"
        if how == "copy":
            for tensor in plain.state_dict().values():
                tensor.zero_()  # it must share nothing with the model
        else:
            assert plain is old.base_model
            assert not old.adapters
            self.wrap(plain, kind, in_block)

    @rule(i=numbers, trainable=flags)
    def save_and_load(self, i, trainable):
        folder = Path(tempfile.mkdtemp(dir=self.folder.name))
        if any(adapter.unfinished for adapter in self.adapters.values()):
            with pytest.raises(RuntimeError, match="ranks add up"):
                self.model.save_pretrained(folder)
            assert not list(folder.iterdir())
        else:
            self.model.save_pretrained(folder)
            for name, adapter in self.adapters.items():
                own = folder if name == "default" else folder / name
                again = PeftModel.from_pretrained(copy.deepcopy(self.pristine), own)
                assert close(logits(again), adapter.logits), f"a saved {adapter.kind} changed"
                self.saved.append((own, replace(adapter)))
        if self.saved and len(self.adapters) < ROOM:
            (own, old), name = self.saved[i % len(self.saved)], self.new_name()
            self.model.load_adapter(own, name, is_trainable=trainable)
            self.note(name, trainable, old.steps).check_loaded(old)

    @rule(i=numbers)
    def load_state_dict(self, i):
        """Load a state from before a training step, or the present one."""
        states = [self.snapshot(), *self.checkpoints]
        tensors, adapters = states[i % len(states)]
        if adapters.keys() != self.adapters.keys():
            with pytest.raises(ValueError):
                self.model.load_state_dict(tensors)
            return
        self.model.load_state_dict(tensors)
        self.tensors = self.model.state_dict()  # all adapters may have changed
        for name, old in adapters.items():
            self.adapters[name].steps, self.adapters[name].merged = old.steps, 0.0
            self.note(name).check_loaded(old)
        assert same(self.tensors, {k: t.to(self.tensors[k].dtype) for k, t in tensors.items()})

    @rule(chosen=st.lists(numbers, min_size=1, max_size=3), how=st.sampled_from(["cat", "svd"]))
    def add_weighted_adapter(self, chosen, how):
        loras = [self.pick(i, lambda adapter: adapter.summable) for i in chosen]
        if None in loras or len(self.adapters) == ROOM:
            return
        name, layers = self.new_name(), [self.model.adapters[lora].layers for lora in loras]
        weights = [-1.3, 0.4, 0.7][: len(loras)]
        rank = sum(self.model.peft_config[lora].r for lora in loras)  # so that svd is exact
        self.model.add_weighted_adapter(loras, weights, name, how, svd_rank=rank)
        self.note(name, trainable=False)
        for key, layer in self.model.adapters[name].layers.items():
            parts = zip(weights, layers, strict=True)
            wanted = sum(w * found[key].delta() for w, found in parts if key in found)
            limit = TOLERANCE[self.plain.dtype]
            assert error(layer.delta(), wanted) < limit, "not the weighted sum of the updates"

    @rule(dtype=st.sampled_from(["half", "bfloat16", "float", "double"]))
    def cast(self, dtype):
        getattr(self.model, dtype)()
        self.plain = logits(getattr(self.pristine, dtype)())
        for name, adapter in self.adapters.items():
            before = adapter.logits
            assert close(self.note(name).logits, before), f"{adapter.kind} changed"
            if adapter.merged:  # W' was rounded
                adapter.merged = max(adapter.merged, TOLERANCE[self.plain.dtype])
        own = [tensor for key, tensor in self.tensors.items() if ".allocator." not in key]
        assert {tensor.dtype for tensor in own} == {self.plain.dtype}
        if dtype in ("half", "bfloat16"):  # the base was rounded
            self.saved, self.checkpoints = [], []

    @rule(pickled=flags, use_copy=flags)
    def duplicate(self, pickled, use_copy):
        """Go on with a copy or with the original; the other one must not change any more."""
        old = self.model
        new = pickle.loads(pickle.dumps(old)) if pickled else copy.deepcopy(old)
        assert new.is_attached == self.attached
        if use_copy:
            self.active = None if self.blocks else self.active
            while self.blocks:
                self.block("close")
        self.model, other = (new, old) if use_copy else (old, new)
        self.other = other, cloned(other.state_dict()), logits(other)

    @rule()
    def calls_that_change_nothing(self):
        model, name = self.model, self.pick(0)
        tokens = model.generate(IDS, max_new_tokens=2, eos_token_id=-1)
        found = logits(model, tokens[:, :-1])[:, -2:]  # without a cache
        chosen = found.gather(-1, tokens[:, -2:, None])
        assert close(chosen, found.amax(-1, keepdim=True)), "not the most likely tokens"
        zeros = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
        *most, last = zeros  # most must not be loaded before the last one is checked
        nothing, biases = LoraConfig(target_modules=["nothing"]), BitFitConfig()
        refused = [
            ("set_adapter", "nobody"), ("set_adapter", [name, name]), ("delete_adapter", "nobody"),
            ("add_adapter", name, biases), ("add_adapter", "a.b", biases),
            ("add_adapter", "new", nothing), ("load_adapter", "nowhere", "new"),
            ("load_adapter", "nowhere", name), ("merge_adapter", ["nobody"]),
            ("add_weighted_adapter", [name, "nobody"], [1.0, 1.0], "new"),
            ("add_weighted_adapter", [name], [math.nan], "new"),
            ("save_pretrained", "nowhere", False),
            ("load_state_dict", {key: zeros[key] for key in most}),
            ("load_state_dict", zeros | {last: zeros[last][None]}),
            ("load_state_dict", zeros | {last: zeros[last].long()}),
            ("load_state_dict", zeros | {"nobody.weight": zeros[last]}),
        ]  # fmt: skip
        if not (self.attached and self.current.mergeable):
            refused += [("merge_adapter",), ("unmerge_adapter",), ("merge_and_unload", False)]
        if len(self.adapters) == 1:
            refused += [("delete_adapter", name)]
        for method, *arguments in refused:
            with pytest.raises((ValueError, RuntimeError)):
                getattr(model, method)(*arguments)


def run(seeds: int, sequences: int, calls: int, *phases: Phase) -> None:
    """At most ten sequences per seed: after ten, hypothesis mostly varies the earlier ones."""
    first = os.environ.get("MINIPEFT_SEED", "4")
    first = random.randrange(10**9) if first == "random" else int(first)
    print(f"MINIPEFT_SEED={first}")
    options = settings(
        max_examples=sequences, stateful_step_count=calls, phases=phases, database=None,
        report_multiple_bugs=False, deadline=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    for number in range(first, first + seeds):
        stateful.run_state_machine_as_test(seed(number)(Calls), settings=options)


def test_any_sequence_of_calls_does_what_it_should_and_nothing_else():
    run(1, 6, 20, Phase.generate)  # shrinking a failure would take minutes


@pytest.mark.slow
def test_any_long_sequence_of_calls_does_what_it_should_and_nothing_else():
    run(20, 10, 40, Phase.generate, Phase.shrink)


def test_moving_a_model_moves_adaloras_scores_too():
    model = PeftModel(small_base(), CONFIGS["adalora"]())
    model(IDS, labels=IDS).loss.backward()
    model.update_and_allocate(1)
    state = model.to("meta").state_dict()  # where no tensor of the CPU can be used
    assert {t.device.type for key, t in state.items() if key != "default.allocator.step"} == {
        "meta"
    }
