"""Training leaves no tensor on the wrong device, on the pretended accelerator of accelerator.py.

One process trains every method, and then copies of minipeft with planted faults, which it has to
detect.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import accelerator
import pytest
import torch

pytestmark = pytest.mark.slow  # ten seconds
ROOT = Path(__file__).resolve().parents[1]
# File, the line's text, the faulty text, and a case that has to detect the fault.
FAULTS = [
    ("gpt", "torch.arange(p, p + t, device=x.device)", "torch.arange(p, p + t)", "gpt-moved"),
    (
        "gpt",
        "dtype=torch.bool, device=device).tril",
        "dtype=torch.bool).tril",
        "prefix_tuning-moved",
    ),
    ("gpt", "dtype=torch.bool, device=device).roll", "dtype=torch.bool).roll", "gpt-moved"),
    ("methods/lora", "factor.to(w.device, torch", "factor.to(torch", "lora-adapted_there"),
    (
        "methods/adalora",
        "torch.eye(len(m), dtype=m.dtype, device=m.device)",
        "torch.eye(len(m), dtype=m.dtype)",
        "adalora-moved",
    ),
    ("methods/adalora", '{"device": w.device, ', "{", "adalora-adapted_there"),
    (
        "methods/adalora",
        "self.importance.setdefault(key, torch.zeros_like(s))",
        "self.importance.setdefault(key, torch.zeros(s.shape))",
        "adalora-moved",
    ),
    (
        "methods/prompt_tuning",
        "F.pad(attention_mask, (p, 0), value=1)",
        "torch.cat((torch.ones(len(attention_mask), p, dtype=torch.long), attention_mask), 1)",
        "prompt_tuning-moved",
    ),
    (
        "methods/prompt_tuning",
        "torch.arange(p, device=x.device)",
        "torch.arange(p)",
        "prompt_tuning-moved",
    ),
    (
        "methods/prompt_tuning",
        "self.to(embed.weight.device)",
        "pass",
        "prompt_tuning-adapted_there",
    ),
    (
        "methods/p_tuning",
        "torch.arange(p, device=x.device)",
        "torch.arange(p)",
        "p_tuning-moved",
    ),
    ("methods/p_tuning", "self.to(embedding.device)", "pass", "p_tuning_lstm-adapted_there"),
    (
        "methods/prefix_tuning",
        "F.pad(attention_mask, (p, 0), value=1)",
        "torch.cat((torch.ones(len(attention_mask), p, dtype=torch.long), attention_mask), 1)",
        "prefix_tuning-moved",
    ),
    (
        "methods/prefix_tuning",
        "self.to(model.get_input_embeddings().weight.device)",
        "pass",
        "prefix_tuning-adapted_there",
    ),
    (
        "methods/bitfit",
        "torch.zeros_like(b, dtype=",
        "torch.zeros(b.shape, dtype=",
        "bitfit-adapted_there",
    ),
    (
        "methods/bottleneck",
        "layer.to(w.device, torch",
        "layer.to(torch",
        "bottleneck-adapted_there",
    ),
    ("methods/qlora", "PAIRS.to(q.codes.device)", "PAIRS", "qlora-moved"),
    ("methods/qlora", "DYNAMIC_MAP.to(q.codes.device)", "DYNAMIC_MAP", "qlora-moved"),
    ("methods/qlora", "/ 2).to(blocks.device)", "/ 2)", "qlora-adapted_there"),
    (
        "methods/qlora",
        "nn.Linear(self.in_features, self.r, bias=False).to(device)",
        "nn.Linear(self.in_features, self.r, bias=False)",
        "qlora-adapted_there",
    ),
    (
        "methods/paged_adamw",
        "page.host.to(page.device, non_blocking=True, copy=True)",
        "page.host.clone()",
        "qlora_paged-moved",
    ),
    (
        "methods/paged_adamw",
        'torch.zeros(2, size, dtype=p.dtype, device="cpu", pin_memory=pin)',
        "torch.zeros(2, size, dtype=p.dtype)",
        "qlora_paged-created_there",
    ),
    (
        "methods/paged_adamw",
        'torch.empty(2, *p.shape, dtype=p.dtype, device="cpu")',
        "torch.empty(2, *p.shape, dtype=p.dtype)",
        "qlora_paged-created_there",
    ),
    (
        "token_rows",
        "torch.tensor(ids, device=embedding.weight.device)",
        "torch.tensor(ids)",
        "lora_tokens-adapted_there",
    ),
    ("peft_model", "module._apply(fn)", "pass", "lora-moved_while_detached"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """The error, or None, by package and case. A package is "minipeft" or the index of a fault."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch has no accelerators written in Python")
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
def test_training_leaves_every_tensor_on_its_device(results, case):
    assert results["minipeft", case] is None


@pytest.mark.parametrize("i", range(len(FAULTS)), ids=[f"{f}-{old}" for f, old, *_ in FAULTS])
def test_a_planted_fault_is_detected(results, i):
    name, old, _, case = FAULTS[i]
    assert (ROOT / "minipeft" / f"{name}.py").read_text().count(old) == 1, (
        "this line has changed: plant the fault elsewhere"
    )
    error = results[i, case]
    assert error is not None, "the fault was not detected"
    assert "cpu" in error, error
    assert accelerator.NAME in error, error
