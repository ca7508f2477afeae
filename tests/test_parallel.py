"""Two processes give the same losses as one, and send only the gradients of trained parameters."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import BASE

from minipeft.lab import parallel

SMALL = BASE.parent / "0.3m"
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def run(processes: int, folder, *words: str, fails: bool = False) -> dict | str:
    job = ["-m", "minipeft", "finetune", "--base", str(SMALL), "--steps", "4", "--n-generate", "2"]
    job += ["--device", "cpu", "--output", str(folder), *words]
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(several if processes > 1 else []), *job]
    done = subprocess.run(
        command, env=os.environ | LOOPBACK, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else json.loads((folder / "record.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "words"),
    [("full", []), ("lora", []), ("lora", ["--accumulation", "2"]),
     ("full", ["--shard"]), ("lora", ["--shard"])],
)  # fmt: skip
def test_two_processes_give_the_same_losses_as_one(tmp_path, method, words):
    one = run(1, tmp_path / "one", "--method", method)
    two = run(2, tmp_path / "two", "--method", method, *words)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-5)
    if not words:
        sent = {"full": 1_384_992, "lora": 110_592}[method]  # as COMMANDS.md says
        assert two["bytes_sent_per_step"] == 4 * two["trainable"] == sent
    assert two["disk_bytes"] == one["disk_bytes"]


@pytest.mark.slow
def test_unequal_shares_and_sharded_4bit_weights_are_refused(tmp_path):
    (tmp_path / "log.csv").write_text("from an earlier run")
    error = run(2, tmp_path, "--batch-size", "5", fails=True)
    assert "error: batch_size 5 must be a multiple of the 2 processes" in error
    error = run(2, tmp_path, "--method", "qlora", "--shard", fails=True)
    assert "4-bit weights are buffers, which are not sharded" in error
    assert [file.read_text() for file in tmp_path.iterdir()] == ["from an earlier run"]


def test_a_single_process_needs_no_process_group(gpt):
    assert (parallel.world_size(), parallel.rank()) == (1, 0)
    assert parallel.share([1, 2, 3]) == [1, 2, 3]
    assert parallel.mean(2.5, torch.device("cpu")) == 2.5
    assert parallel.Replicas(gpt).run is gpt
    with pytest.raises(ValueError, match="--shard needs several processes"):
        parallel.shard(gpt, "lora")
