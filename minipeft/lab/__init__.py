"""The laboratory: train methods on small tasks, measure them, and compare them fairly."""

from pathlib import Path

try:  # installed: data/ is the package minipeft.data
    from minipeft import data as _data

    DATA = Path(_data.__file__).parent
except ImportError:  # a bare checkout on the path
    DATA = Path(__file__).resolve().parents[2] / "data"
