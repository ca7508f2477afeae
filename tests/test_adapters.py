"""Random calls on a model with several adapters: the base weights never change."""

import hashlib
import random

import pytest
import torch
from conftest import tiny_config

from minipeft import (
    GPT,
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    quantize_model,
)

SCHEDULE = {"init_r": 3, "target_r": 1, "total_step": 2}
CONFIGS = {
    "lora": lambda: LoraConfig(r=2, target_modules=["c_attn", "c_fc"]),
    "lora_dropout": lambda: LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear"),
    "lora_rows": lambda: LoraConfig(target_modules=["c_fc"], trainable_token_indices=[3, 26]),
    "adalora": lambda: AdaLoraConfig(target_modules=["c_attn"], **SCHEDULE),
    "bitfit": lambda: BitFitConfig(),
    "bottleneck": lambda: BottleneckConfig(["mlp.c_proj"], bottleneck_size=3),
    "dora": lambda: LoraConfig(r=2, use_dora=True, target_modules=["c_attn"]),
    "pissa": lambda: LoraConfig(r=2, init_lora_weights="pissa", target_modules=["c_attn"]),
    "vera": lambda: VeraConfig(r=5, target_modules=["c_attn", "c_fc"]),
    "ia3": lambda: IA3Config(["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=2),
    "p_tuning": lambda: PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=4),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=2),
    "prefix_projection": lambda: PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True),
}
MERGEABLE = ("LORA", "ADALORA", "VERA", "IA3", "BITFIT")
NOT_ON_4_BITS = ("adalora", "bottleneck", "dora", "pissa", "vera", "ia3")
IDS = torch.randint(1, 61, (2, 6), generator=torch.Generator().manual_seed(1))


def small_base(four_bits: bool = False) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(tiny_config(n_embd=8, n_head=2, n_layer=1))
    if four_bits:
        quantize_model(gpt)
    return gpt.eval()


def checksum(model: torch.nn.Module) -> str:
    """A checksum of the names, dtypes and bytes of all tensors of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Walk:
    """A model, random calls on it, and the logits that each of its adapters must give."""

    def __init__(self, seed: int, folder):
        self.random, self.folder = random.Random(seed), folder
        self.base = small_base(four_bits=seed % 4 == 0)
        self.before, self.plain = checksum(self.base), self.base(IDS).logits
        self.expected = {}  # logits by adapter
        self.saved = {}  # logits by folder
        self.made = 0
        self.model = get_peft_model(self.base, self.config(), self.name())
        self.train()

    def config(self):
        names = list(CONFIGS)
        if any("codes" in key for key in self.base.state_dict()):
            for name in NOT_ON_4_BITS:
                names.remove(name)
        return CONFIGS[self.random.choice(names)]()

    def name(self) -> str:
        self.made += 1
        return f"number {self.made}"

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model.eval()(IDS).logits

    def note(self) -> None:
        """Remember the active adapter's logits."""
        self.expected[self.model.active_adapter] = self.logits()

    def check(self) -> None:
        """The active adapter's logits are those after its last training; without it, the base's."""
        expected = self.expected[self.model.active_adapter]
        assert torch.allclose(self.logits(), expected, atol=1e-5)
        with self.model.disable_adapter():
            assert torch.equal(self.logits(), self.plain)

    # --- the calls ---

    def add(self) -> None:
        name, active = self.name(), self.model.active_adapter
        self.model.add_adapter(name, self.config())
        self.model.set_adapter(name)
        self.train()
        self.model.set_adapter(active)

    def set(self) -> None:
        self.model.set_adapter(self.random.choice(list(self.model.adapters)))

    def delete(self) -> None:
        if len(self.model.adapters) > 1:
            name = self.random.choice(list(self.model.adapters))
            self.model.delete_adapter(name)
            del self.expected[name]

    def disable(self) -> None:
        """Make another call while the adapter is disabled."""
        with self.model.disable_adapter():
            self.random.choice((self.add_quietly, self.set, self.delete, self.save))()
            assert torch.equal(self.logits(), self.plain)

    def add_quietly(self) -> None:
        name = self.name()
        self.model.add_adapter(name, LoraConfig(target_modules=["c_fc"]))
        self.expected[name] = self.plain  # a fresh LoRA changes nothing

    def merge(self) -> None:
        if self.kind() in MERGEABLE:
            self.model.merge_adapter()
        else:
            with pytest.raises(ValueError, match="cannot merge"):
                self.model.merge_adapter()

    def unmerge(self) -> None:
        if self.kind() in MERGEABLE:
            self.model.unmerge_adapter()

    def merged_copy(self) -> None:
        if self.kind() in MERGEABLE:
            plain = self.model.eval().merge_and_unload()
            with torch.no_grad():
                merged = plain(IDS).logits
                for parameter in plain.parameters():
                    parameter.zero_()  # a copy: it must not share a tensor with the base
            assert torch.allclose(merged, self.expected[self.model.active_adapter], atol=1e-5)

    def weighted(self) -> None:
        loras = [
            name
            for name, config in self.model.peft_config.items()
            if config.peft_type == "LORA"
            and not (config.trainable_token_indices or config.use_dora)
            and config.init_lora_weights is True
        ]
        if not loras:
            return
        names = self.random.sample(loras, self.random.randint(1, len(loras)))
        weights = [self.random.uniform(-2, 2) for _ in names]
        ranks = {self.model.peft_config[name].r for name in names}
        kinds = ("svd", "cat", "linear") if len(ranks) == 1 else ("svd", "cat")
        name, active = self.name(), self.model.active_adapter
        self.model.add_weighted_adapter(names, weights, name, self.random.choice(kinds))
        self.model.set_adapter(name)
        self.note()
        self.model.set_adapter(active)

    def save(self) -> None:
        self.model.save_pretrained(self.folder)
        for name in self.model.adapters:
            self.saved[self.folder / ("" if name == "default" else name)] = self.expected[name]

    def load(self) -> None:
        if self.saved:
            name, folder = self.name(), self.random.choice(sorted(self.saved))
            self.model.load_adapter(folder, name, is_trainable=self.random.random() < 0.5)
            self.expected[name] = self.saved[folder]

    def train(self) -> None:
        """Two steps, the whole schedule of this AdaLoRA."""
        self.model.train()
        free = [p for p in self.model.parameters() if p.requires_grad]
        merged = any(".merged_" in name for name, _ in self.model.named_buffers())
        if not free or merged:
            return
        optimizer = torch.optim.SGD(free, lr=0.1)
        for step in (1, 2):
            self.model(IDS, labels=IDS)[0].backward()
            optimizer.step()
            self.model.update_and_allocate(step)
            optimizer.zero_grad()
        assert all(p.grad is None for p in self.model.parameters() if not p.requires_grad)
        self.note()

    def kind(self) -> str:
        return self.model.peft_config[self.model.active_adapter].peft_type


CALLS = [
    "add", "set", "delete", "disable", "merge", "unmerge", "merged_copy", "weighted", "save",
    "load", "train",
]  # fmt: skip


@pytest.mark.slow
def test_random_calls_never_change_the_base(tmp_path):
    """200 sequences of 10 calls: the base's checksum and logits are the same before and after."""
    for seed in range(200):
        folder = tmp_path / str(seed)
        walk, calls = Walk(seed, folder), []
        for _ in range(10):
            calls.append(walk.random.choice(CALLS))
            getattr(walk, calls[-1])()
            walk.check()
        assert walk.model.unload() is walk.base
        assert checksum(walk.base) == walk.before, (seed, calls)
        assert torch.equal(walk.base(IDS).logits, walk.plain), (seed, calls)
