"""Compile the CUDA kernels for every architecture; print registers and spills as a table.

    python tools/check_cuda_build.py [--arch 80 90 ...] [--jobs N]

Needs nvcc and torch's headers, no GPU. A register spill is a fault, unless SPILLS names the kernel
with the reason: the exit status is then 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]
# Kernel and architecture to the reason why it may spill.
SPILLS: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Usage:
    registers: int
    spilled_bytes: int


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(str(Path(home, "bin", "nvcc")) if home else "nvcc")
    nvcc = nvcc or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise SystemExit("check_cuda_build.py: error: no nvcc; set CUDA_HOME to a CUDA toolkit")
    return nvcc


def compile_for(nvcc: str, arch: str, folder: str) -> tuple[str, float]:
    """What ptxas says of the kernels for sm_``arch``, and the seconds it took."""
    include = Path(torch.__file__).parent / "include"
    command = [nvcc, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v"]
    command += [*COMMON_NVCC_FLAGS, "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-I{CSRC}", "-isystem", str(include)]
    command += [str(CSRC / "cuda" / "ops.cu"), "-o", f"{folder}/ops_{arch}.cubin"]
    start = time.perf_counter()
    run = subprocess.run(command, text=True, capture_output=True, check=False)
    if run.returncode != 0:
        raise SystemExit(f"check_cuda_build.py: error: sm_{arch} does not compile:\n{run.stderr}")
    return run.stderr, time.perf_counter() - start


def usages(report: str) -> dict[str, Usage]:
    """Mangled name of each kernel to what ptxas reports of it."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    return {
        name: Usage(int(registers), int(stores) + int(loads))
        for name, stores, loads, registers in pattern.findall(report)
    }


def readable(name: str) -> str:
    """A kernel's name and template arguments, as in ``window3<float, mul=1, ...>``."""
    match = re.fullmatch(r"_ZN3ddf4cuda\d+(\w+?)I(.+?)EEv.*", name)
    if match is None:
        return name
    kernel, arguments = match.groups()
    types = {"f": "float", "d": "double", "6__half": "half", "13__nv_bfloat16": "bfloat16"}
    type_name = next(types[t] for t in types if arguments.startswith(t))
    flags = re.findall(r"Lb([01])", arguments)
    meanings = {
        "window3": ("mul", "mirrored", "vector"),
        "window3_channels_last": ("mul", "mirrored"),
        "filter_grads3": ("mul", "vector"),
    }
    named = zip(meanings.get(kernel, ()), flags, strict=True)
    return f"{kernel}<{', '.join([type_name, *(n for n, on in named if on == '1')])}>"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", nargs="+", default=ARCHITECTURES, help="compute capabilities without the dot"
    )
    parser.add_argument("--jobs", type=int, default=1, help="architectures compiled at once")
    args = parser.parse_args()
    nvcc = find_nvcc()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda arch: compile_for(nvcc, arch, folder), args.arch))
    seconds = [run[1] for run in runs]
    tables = [
        {readable(name): usage for name, usage in usages(report).items()} for report, _ in runs
    ]
    kernels = sorted(tables[0])
    if not kernels:
        raise SystemExit("check_cuda_build.py: error: ptxas reported no kernels")

    width = max(map(len, kernels))
    print("registers, with bytes spilled after +")
    print("kernel".ljust(width), *(f"sm_{arch}".rjust(8) for arch in args.arch))
    faults = []
    for kernel in kernels:
        cells = []
        for arch, table in zip(args.arch, tables, strict=True):
            usage = table[kernel]
            spilled = f"+{usage.spilled_bytes}" if usage.spilled_bytes else ""
            cells.append(f"{usage.registers}{spilled}".rjust(8))
            if spilled and (kernel, arch) not in SPILLS:
                faults.append(f"{kernel} spills {usage.spilled_bytes} bytes on sm_{arch}")
        print(kernel.ljust(width), *cells)
    print("seconds".ljust(width), *(f"{s:.0f}".rjust(8) for s in seconds))
    print(f"{len(kernels)} kernels, {len(args.arch)} architectures")
    for (kernel, arch), reason in SPILLS.items():
        print(f"allowed: {kernel} on sm_{arch}: {reason}")
    for fault in faults:
        print(f"check_cuda_build.py: error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
