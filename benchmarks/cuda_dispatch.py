"""Which CUDA kernels a layer's calls start, by the dispatch of ``csrc/cuda``, which is compiled by
the C++ compiler without its kernels (cuda_dispatch.cpp)."""

from __future__ import annotations

import csv
import ctypes
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from ddf_mm.ops.checks import COMBINES

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
LAYOUTS = ("NCHW", "channels_last")


class Layer(NamedTuple):
    """What the choice of kernels depends on. ``filters``: "both", or "one" if the other is None."""

    op: str
    channels: int
    groups: int
    height: int
    width: int
    kernel_size: int
    dilation: int
    stride: int
    scale: int
    combine: str
    filters: str


FIELDS = Layer._fields
TABLE = HERE / "kernels_of_recipes.csv"


def recipes() -> list[tuple[Layer, list[str]]]:
    """The layers of TABLE, and the kernels of each."""
    with TABLE.open(newline="") as file:
        header, *lines = csv.reader(file)
    if tuple(header[: len(FIELDS)]) != FIELDS:
        raise ValueError(f"{TABLE.name} must begin with the columns {FIELDS}, got {header}")
    text = {"op", "combine", "filters"}
    return [
        (
            Layer(
                *(v if f in text else int(v) for f, v in zip(FIELDS, line, strict=False))  # type: ignore[arg-type]
            ),
            line[len(FIELDS) :],
        )
        for line in lines
    ]


class Pattern(NamedTuple):
    """How the warps of a block access shared memory by one instruction."""

    address: int  # of the instruction, in the library
    requests: int
    wavefronts: int  # cycles of shared memory
    least: int  # the same without conflicts of banks
    worst: float  # wavefronts by the least, of one request


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    active_lanes: float  # fraction of the threads that have work, where it is known
    scratch_floats: int  # that were allocated for it: partial sums, which it writes
    patterns: tuple[Pattern, ...]  # of the first and the last block, with banks


class Dispatch:
    def __init__(self, banks: bool = False) -> None:
        self.options = ["-DDDF_BANKS", f"-I{HERE / 'banks'}", "-O1", "-g"] if banks else []

    def __enter__(self) -> Dispatch:
        self.folder = tempfile.TemporaryDirectory()
        self.library = library = Path(self.folder.name, "dispatch.so")
        command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-fPIC", "-shared"]
        command += [f"-I{CSRC}", f"-I{CSRC / 'cuda'}", *self.options]
        command += [HERE / "cuda_dispatch.cpp", "-ldl", "-o", library]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(library))
        self.function = loaded.ddf_dispatch
        loaded.ddf_kernel_names.restype = self.function.restype = ctypes.c_char_p
        self.kernel_names = sorted(loaded.ddf_kernel_names().decode().splitlines())
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()

    def launches(
        self, layer: Layer, kind: str, layout: str, dtype: str = "float32", batch: int = 2
    ) -> list[Launch]:
        """The launches of a pass of a layer: ``"forward"`` or ``"backward"``, and of ddf also
        ``"pack"``, ``"grad_features"`` and ``"grad_filters"``."""
        out = [-(-size // layer.stride) for size in (layer.height, layer.width)]
        sizes = [batch, layer.channels, layer.height, layer.width, *out, layer.groups]
        sizes += [layer.channels // layer.groups, layer.kernel_size, layer.dilation]
        geometry = (ctypes.c_int64 * 13)(*sizes, layer.stride, layer.scale)
        name = f"up {kind}" if layer.op == "ddf_up" else kind
        combine, last = COMBINES.index(layer.combine), layout == "channels_last"
        text = self.function(name.encode(), dtype.encode(), geometry, combine, last).decode()
        launches = []
        for line in text.splitlines():
            kernel, *numbers = line.split("\t")
            patterns = []
            for pattern in numbers[5:]:
                *counts, worst = pattern.split()
                patterns.append(Pattern(*map(int, counts), worst=float(worst)))
            sizes, active = map(int, numbers[:3]), float(numbers[3])
            scratch = int(numbers[4])
            launches.append(Launch(kernel, *sizes, active, scratch, tuple(patterns)))
        return launches

    def kernels_of(self, layer: Layer) -> list[str]:
        """The kernels of forward and backward pass, for each of LAYOUTS."""
        return [
            " + ".join(
                dict.fromkeys(
                    _short(launch.kernel) for launch in self.launches(layer, kind, layout)
                )
            )
            for layout in LAYOUTS
            for kind in ("forward", "backward")
        ]


def _short(kernel: str) -> str:
    """Without namespaces, dtype and combine mode."""
    name, _, arguments = kernel.removesuffix(">").partition("<")
    kept = [a for a in arguments.split(", ") if a not in ("float", "ddf::Mul", "ddf::Add")]
    name = name.removeprefix("ddf::cuda::")
    return f"{name}<{', '.join(kept)}>" if kept else name
