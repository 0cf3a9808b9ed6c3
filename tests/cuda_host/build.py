"""Compiles the CUDA sources in ``csrc`` for the host."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
TORCH = Path(torch.__file__).parent

NEEDS_HOST = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fibers are glibc's ucontext"),
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler"),
]


def compile_for_host(source: Path, output: Path, csrc: Path, *options: str | Path) -> None:
    """Compiles and, if ``output`` is a library, links."""
    includes = [csrc, csrc / "cuda", HERE, TORCH / "include"]
    # The fortified longjmp aborts on jumps between fibers.
    command = [*COMPILER, "-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE"]
    command += [f"-I{path}" for path in includes]
    command += ["-c"] if output.suffix == ".o" else ["-shared"]
    command += [source, *options, *(["-ldl"] if output.suffix == ".so" else []), "-o", output]
    subprocess.run(list(map(str, command)), check=True)


def compile_kernels_for_host(output: Path, csrc: Path = CSRC) -> None:
    """Compiles all CUDA sources except ops.cu and ahead.cu."""
    together = output.with_suffix(".cpp")
    others = ("ops.cu", "ahead.cu")
    files = [file for file in sorted(csrc.glob("cuda/*.cu")) if file.name not in others]
    together.write_text("".join(f'#include "{file}"\n' for file in files))
    compile_for_host(together, output, csrc)


MACROS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
LIBRARIES = ["-Wl,-Bsymbolic", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]


def _kernels_of_driver(names: list[str]) -> str:
    kernels = [f'{{"{name}", &Run<&{name}>::run, &Run<&{name}>::sizes}}' for name in names]
    return f"#define DDF_HOST_KERNELS {', '.join(kernels)}\n"


def compile_ops_for_host(
    library: Path, kernels: Path, ops: Path = CSRC / "cuda" / "ops.cu", csrc: Path = CSRC
) -> None:
    """Compiles ops.cu and the emulation of devices, and links them with the kernels.

    The driver has only the kernels of a forward pass: the others are compiled ahead.
    """
    flags = ("false, true, false", "false, false, false")
    names = [f"ddf::cuda::forward_3x3<float, ddf::Mul, {f}>" for f in flags]
    files = ops, csrc / "cuda" / "ahead.cu", HERE / "driver_on_host.h", HERE / "ops_on_host.cpp"
    together = library.with_suffix(".cpp")
    together.write_text(_kernels_of_driver(names) + "".join(f'#include "{f}"\n' for f in files))
    compile_for_host(together, library, csrc, *MACROS, kernels, *LIBRARIES)


def names_of_kernels(compiled: Path) -> list[str]:
    """The kernels that a compiled by_name.cpp can launch."""
    symbols = subprocess.run(["nm", "-C", compiled], check=True, capture_output=True, text=True)
    return sorted(set(re.findall(r"Named<&\(void ([^(]+)\(", symbols.stdout)))


def compile_ops_by_name_for_host(library: Path, csrc: Path = CSRC) -> None:
    """What an install compiles without nvcc, with what emulates devices and the driver for it."""
    ops = library.with_name("by_name.o")
    compile_for_host(csrc / "cuda" / "by_name.cpp", ops, csrc, *MACROS)
    together = library.with_suffix(".cpp")
    together.write_text(
        _kernels_of_driver(names_of_kernels(ops))
        + f'#include "{HERE / "driver_on_host.h"}"\n#include "{HERE / "ops_on_host.cpp"}"\n'
    )
    compile_for_host(together, library, csrc, *MACROS, ops, *LIBRARIES)
