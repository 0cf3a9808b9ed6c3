"""What a measurement was made with."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path

import torch

from ddf_mm.ops import backend_info
from ddf_mm.version import __version__


def processor(device: str = "cpu") -> str:
    """The name of the CPU's or GPU's model."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str = "cpu", threads: int | None = None) -> dict[str, object]:
    """Device, versions, command and date, as a report of timings states them.

    Args:
        device: ``'cpu'`` or ``'cuda'``.
        threads: of the measurement; default: those that torch has now.
    """
    info = backend_info()
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(device),
        "threads": torch.get_num_threads() if threads is None else threads,
        # Much above 0 on a machine that did not measure alone.
        "load": round(os.getloadavg()[0], 1),
        "ddf": info.get(device, info["default"]),
        "ddf_mm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
    }
