"""Train in child processes that are killed at random moments; each resumes where the last stopped.

python killed.py FOLDER KILLS: for each of three methods, FOLDER/METHOD/whole is trained without
interruption and FOLDER/METHOD/killed is killed KILLS times. Children are forks, so that torch is
imported only once.
"""

import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from minipeft.lab import DATA, tasks
from minipeft.lab.base import load_base
from minipeft.lab.finetune import finetune
from minipeft.lab.recipes import RECIPES, RunConfig

RUNS = {"full": 12, "adalora": 24, "qlora": 24}  # steps


def train(base, task, method: str, folder: Path) -> None:
    run = RunConfig(
        steps=RUNS[method], n_generate=2, n_evaluations=2, batch_size=4, checkpoint_every=2,
        resume=True, output=str(folder), quiet=True,
    )  # fmt: skip
    finetune(base, task, RECIPES[method], run)


def child(base, task, method: str, folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        train(base, task, method, folder)
        os._exit(0)
    return pid


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)  # threads do not survive a fork
    base = load_base(DATA / "base" / "0.3m")
    base = replace(base, held_out=None)
    task = tasks.load_task(base, "describe")
    task = replace(task, validation=task.validation[:4], test=task.test[:4])
    rng = random.Random(0)
    for method in RUNS:
        started = time.perf_counter()
        os.waitpid(child(base, task, method, folder / method / "whole"), 0)
        whole = time.perf_counter() - started
        done, killed = 0, folder / method / "killed"
        while done < kills:
            pid = child(base, task, method, killed)
            time.sleep(rng.uniform(0.1, 0.6) * whole)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status):
                done += 1
            else:  # it finished before the kill: start over
                shutil.rmtree(killed)
        os.waitpid(child(base, task, method, killed), 0)
        print(method, done)


if __name__ == "__main__":
    main()
