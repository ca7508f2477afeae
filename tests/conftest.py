import os
import signal
from dataclasses import replace

import pytest
import torch

from minipeft import GPT, GPTConfig
from minipeft.lab import DATA
from minipeft.lab.base import Base, load_base

BASE = DATA / "base" / "1m"
torch.set_num_threads(1)  # on such small models, more threads only wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a script's background


def pytest_configure(config):
    """Only `-m gpu` uses a GPU: the other tests compare with what the CPU computes."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_ignore_collect(collection_path, config):
    """Do not import peft and transformers, which takes seconds, for tests that will not run."""
    if "not conformance" in config.option.markexpr:
        return collection_path.name.startswith("test_conformance") or None
    return None


def tiny_config(**changes) -> GPTConfig:
    shape = {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3}
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    shape["initializer_range"] = 0.2  # wide enough that a wrong position or mask changes the argmax
    return GPTConfig(**(shape | dropout | {"bos_token_id": 0, "eos_token_id": 0} | changes))


@pytest.fixture
def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(tiny_config())


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 61, (3, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def trained_base() -> GPT:
    return GPT.from_pretrained(BASE)


@pytest.fixture(scope="session")
def world():
    """The text's generator, its words, and the measurement scripts, all from data/."""
    from minipeft.data import bits, card, study, text, words

    return text, words, card, study, bits


@pytest.fixture(scope="session")
def base() -> Base:
    """The 1M base as the lab opens it, with only four windows of held-out text, for speed."""
    base = load_base(BASE)
    return replace(base, held_out=base.held_out[:4])
