import pytest
import torch

from minipeft import GPT, GPTConfig
from minipeft.lab import tasks

BASE = tasks.DATA / "base" / "1m"


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
