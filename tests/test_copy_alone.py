"""Each method file, alone in an empty folder, runs and checks itself."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[1] / "minipeft"


ALONE = ["gpt", "lora", "adalora", "prompt_tuning", "p_tuning", "prefix_tuning", "qlora"]
ALONE += ["paged_adamw", "bitfit", "bottleneck"]


@pytest.mark.parametrize("name", [f"{name}.py" for name in ALONE])
def test_a_file_runs_alone(name, tmp_path):
    shutil.copy(HOUSE / name, tmp_path)
    command = [sys.executable, "-I", name]  # -I: nothing of ours on the path
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(name)
    assert "minipeft" not in "".join(
        re.findall(r"^(?:from|import) .*", (HOUSE / name).read_text(), re.M)
    )


def test_shared_lines_are_the_same():
    blocks = {}
    for file in sorted(HOUSE.glob("*.py")):
        for name, block in re.findall(
            r"# --- (\w+): the same lines(.*?)# --- end of \1", file.read_text(), re.S
        ):
            blocks.setdefault(name, {})[file.name] = block
    assert set(blocks["write_file"]) == {"gpt.py", "files.py"}
    assert set(blocks["find_targets"]) == {"lora.py", "adalora.py", "qlora.py"}
    assert set(blocks["prepend"]) == {"prompt_tuning.py", "p_tuning.py"}
    assert set(blocks["run"]) == set(blocks["toy"]) == set(blocks["prepend"])
    assert set(blocks["choose"]) == {"bitfit.py", "bottleneck.py"}
    assert len(blocks["check_model"]) == 3
    for copies in blocks.values():
        assert len(set(copies.values())) == 1
