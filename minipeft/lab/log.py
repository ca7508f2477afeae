"""What a run tells while it runs: a CSV always, and TensorBoard where it was asked for."""

import csv
import os
from pathlib import Path


def check_writable(folder: str | Path) -> None:
    """Raises ValueError where a folder can be neither made nor written into. Nothing is made."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"nothing can be written into {folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written into {folder}: {there} may not be written to")


class Log:
    """Rows by step, into `log.csv` of a folder and into TensorBoard's `log_dir`.

    Rows after step `start` that an earlier, stopped run left are dropped. Raises ValueError where
    TensorBoard was asked for and is not installed.
    """

    def __init__(self, folder: str | Path, log_dir: str | None = None, start: int = 0):
        self.file, self.writer = Path(folder) / "log.csv", None
        if log_dir is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("--log-dir needs TensorBoard: pip install tensorboard") from error
            self.writer = SummaryWriter(log_dir, purge_step=start + 1)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.rows = []
        if start and self.file.is_file():
            with self.file.open(newline="") as opened:
                self.rows = [row for row in csv.DictReader(opened) if int(row["step"]) <= start]
        self.names = ["step", "loss", "learning_rate", "seconds"]
        self.names += ["validation_loss", "validation_slot_loss", "validation_frame_loss"]
        self._write("w", self.rows)

    def __call__(self, row: dict[str, float]) -> None:
        """Append a row, at once."""
        self._write("a", [row])
        if self.writer is not None:
            for name in set(row) - {"step"}:
                self.writer.add_scalar(name, row[name], row["step"])

    def _write(self, mode: str, rows: list[dict]) -> None:
        with self.file.open(mode, newline="") as opened:
            writer = csv.DictWriter(opened, self.names)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
