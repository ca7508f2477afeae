"""Train in children that are killed at random moments, each going on where the last one was.

python killed.py FOLDER KILLS: for each of three runs FOLDER/NAME/whole is trained in one go and
FOLDER/NAME/killed is killed KILLS times. One import for all of them: a child is a fork.
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

from minipeft.lab import finetune, tasks

RUNS = {"full": 12, "adalora": 24, "qlora": 24}  # steps


def train(base, task, method: str, folder: Path) -> None:
    finetune.finetune(
        base, task, method, RUNS[method], generated=2, validations=2, batch_size=4,
        checkpoint_every=2, resume=True, output=folder, quiet=True,
    )  # fmt: skip


def child(base, task, method: str, folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        train(base, task, method, folder)
        os._exit(0)
    return pid


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)  # a fork keeps no threads
    base = finetune.load_base(tasks.DATA / "base" / "0.3m")
    base = replace(base, held_out=None)
    task = tasks.load_task(base.tokenizer, base.end, 256, "describe")
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
            else:  # it had ended before: once more from the beginning
                shutil.rmtree(killed)
        os.waitpid(child(base, task, method, killed), 0)
        print(method, done)


if __name__ == "__main__":
    main()
