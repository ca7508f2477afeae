"""Each method file, alone in an empty folder, runs and checks itself."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[1] / "minipeft"


NAMES = ["gpt.py", "lora.py", "adalora.py", "prompt_tuning.py", "p_tuning.py", "prefix_tuning.py"]
NAMES += ["qlora.py", "paged_adamw.py", "bitfit.py", "bottleneck.py"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    """What became of each file in a folder of its own; one at a time on each core."""

    def run(name: str) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp(name.removesuffix(".py"))
        shutil.copy(HOUSE / name, folder)
        command = [sys.executable, "-I", name]  # -I: nothing of ours on the path
        one = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=folder, env=one, capture_output=True, text=True, timeout=60
        )

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        return dict(zip(NAMES, pool.map(run, NAMES), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_runs_alone(name, runs):
    done = runs[name]
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
