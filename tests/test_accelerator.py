"""Training touches no tensor on the wrong device: on an accelerator that accelerator.py pretends.

One process trains every method, and then minipeft with faults planted in it, which it has to see.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import accelerator
import pytest
import torch

pytestmark = pytest.mark.slow  # ten seconds; the build runs it
ROOT = Path(__file__).resolve().parents[1]
FAULTS = [  # file, what stands there, what is put there, a case that has to see it
    ("gpt", "torch.arange(p, p + t, device=x.device)", "torch.arange(p, p + t)", "gpt-moved"),
    (
        "gpt",
        "dtype=torch.bool, device=device).tril",
        "dtype=torch.bool).tril",
        "prefix_tuning-moved",
    ),
    ("gpt", "dtype=torch.bool, device=device).roll", "dtype=torch.bool).roll", "gpt-moved"),
    ("lora", "self.lora_B.to(w.device, dtype)", "self.lora_B.to(dtype)", "lora-adapted_there"),
    (
        "adalora",
        "torch.eye(len(m), dtype=square.dtype, device=square.device)",
        "torch.eye(len(m), dtype=square.dtype)",
        "adalora-moved",
    ),
    ("adalora", "divisor.to(w.device)", "divisor", "adalora-adapted_there"),
    (
        "adalora",
        "self.importance[key] = torch.zeros_like(w)",
        "self.importance[key] = torch.zeros(w.shape)",
        "adalora-moved",
    ),
    (
        "prompt_tuning",
        "tensor.new_full((b, p), front)",
        "torch.full((b, p), front)",
        "prompt_tuning-moved",
    ),
    ("prompt_tuning", "torch.arange(p, device=x.device)", "torch.arange(p)", "prompt_tuning-moved"),
    (
        "p_tuning",
        "self.to(words.device).requires_grad_",
        "self.requires_grad_",
        "p_tuning_lstm-adapted_there",
    ),
    (
        "prefix_tuning",
        "mask.new_ones(b, self.embedding.num_embeddings)",
        "torch.ones(b, self.embedding.num_embeddings, dtype=mask.dtype)",
        "prefix_tuning-moved",
    ),
    (
        "bitfit",
        "torch.zeros_like(b, dtype=",
        "torch.zeros(b.shape, dtype=",
        "bitfit-adapted_there",
    ),
    ("bottleneck", "layer.to(w.device, torch", "layer.to(torch", "bottleneck-adapted_there"),
    ("qlora", "PAIRS.to(q.codes.device)", "PAIRS", "qlora-moved"),
    ("qlora", "/ 2).to(x.device)", "/ 2)", "qlora-adapted_there"),
    (
        "paged_adamw",
        "torch.empty_like(page.home, device=page.device)",
        "torch.empty_like(page.home)",
        "qlora_paged-moved",
    ),
    (
        "paged_adamw",
        "size, dtype=p.dtype, device=",
        "size, dtype=p.dtype) #",
        "qlora_paged-made_there",
    ),
    ("peft_model", "module._apply(fn)", "pass", "lora-moved_while_waiting"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """What went wrong, by package and case; the package is "minipeft" or a fault's number."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch takes no accelerator that is made in Python")
    folders = {("minipeft", case): ROOT for case in accelerator.CASES}
    for i, (name, old, new, case) in enumerate(FAULTS):
        folders[i, case] = folder = tmp_path_factory.mktemp("fault")
        shutil.copytree(
            ROOT / "minipeft",
            folder / "minipeft",
            ignore=shutil.ignore_patterns("lab", "__pycache__"),
        )
        file = folder / "minipeft" / f"{name}.py"
        file.write_text(file.read_text().replace(old, new))
    arguments = [text for (_, case), folder in folders.items() for text in (str(folder), case)]
    command = [sys.executable, accelerator.__file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(zip(folders, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", accelerator.CASES)
def test_training_makes_every_tensor_where_the_model_is(results, case):
    assert results["minipeft", case] is None


@pytest.mark.parametrize("i", range(len(FAULTS)), ids=[f"{f}-{old}" for f, old, *_ in FAULTS])
def test_a_tensor_on_the_wrong_device_is_seen(results, i):
    name, old, _, case = FAULTS[i]
    assert (ROOT / "minipeft" / f"{name}.py").read_text().count(old) == 1, "plant it elsewhere"
    error = results[i, case]
    assert error is not None, "nobody noticed"
    assert "cpu" in error, error
    assert accelerator.NAME in error, error
