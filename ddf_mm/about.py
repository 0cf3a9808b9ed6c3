"""Machine and versions of a measurement."""

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
    """The model name of the CPU or GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str = "cpu", threads: int | None = None) -> dict[str, object]:
    """Device, versions, command and date, for a report of timings.

    Args:
        device: ``'cpu'`` or ``'cuda'``.
        threads: of the measurement; default: torch's number of threads.
    """
    info = backend_info()
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(device),
        "threads": torch.get_num_threads() if threads is None else threads,
        # Well above 0 if other processes ran during the measurement.
        "load": round(os.getloadavg()[0], 1),
        "ddf": info.get(device, info["default"]),
        "ddf_mm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
    }
