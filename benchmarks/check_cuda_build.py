"""Compile the CUDA kernels for every architecture; print registers and spills as a table.

    python benchmarks/check_cuda_build.py [--arch 80 90 ...] [--jobs N] [--slots]

Needs nvcc and torch's headers, but no GPU. --slots also counts the instructions of each kernel's
innermost loop per output, with cuobjdump, including branches for borders. The exit status is 1 if a
kernel spills registers, unless SPILLS has a reason for it.
"""

from __future__ import annotations

import argparse
import importlib.util
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

# Outputs (pixels of one channel) per iteration of a kernel's hot loop, by its template arguments; a
# fraction of an output if the loop covers one row of taps.
OUTPUTS = {
    "forward_3x3": lambda: 8,
    "forward_3x3_channels_last": lambda: 3 * 8,
    "backward_3x3": lambda: 8,
    "forward_tiled": lambda k, stride: 16 / k,
    "grad_filters": lambda k, stride: 4 / (1 if k == 3 else k),
    "grad_filters_channels_last": lambda k, stride: k * 4 / (1 if k == 3 else k),
}
CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]
# Why a kernel may spill registers on an architecture.
SPILLS = {
    (f"grad_filters<{dtype}, k 7, stride 1, mul>", "100"): (
        "rows not aligned to 16 bytes; without spills it takes 160 registers, and half as many "
        "warps are resident"
    )
    for dtype in ("bfloat16", "float", "half")
} | {
    (f"backward_3x3<{dtype}, mul, vector>", "120"): "needs two registers more than the limit of 255"
    for dtype in ("bfloat16", "half")
}


@dataclass(frozen=True)
class Usage:
    registers: int
    spilled_bytes: int


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(str(Path(home, "bin", "nvcc")) if home else "nvcc")
    nvcc = nvcc or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise SystemExit(
            "check_cuda_build.py: error: nvcc was not found; set CUDA_HOME to a CUDA toolkit"
        )
    return nvcc


def find_cuobjdump(nvcc: str) -> str:
    # Triton, a dependency of torch, has a copy.
    triton = importlib.util.find_spec("triton")
    places = [str(Path(nvcc).parent), str(Path(nvcc).resolve().parent)]
    if triton is not None and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which("cuobjdump", path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if found is None:
        raise SystemExit("check_cuda_build.py: error: --slots needs cuobjdump, not found with nvcc")
    return found


@dataclass(frozen=True)
class Compiled:
    report: str  # of ptxas
    code: str  # SASS, or empty without --slots
    seconds: float


def compile_for(nvcc: str, cuobjdump: str | None, arch: str, source: Path, folder: str) -> Compiled:
    """Compiles the kernels of ``source`` for sm_``arch``; with ``cuobjdump`` also disassembles
    them."""
    include = Path(torch.__file__).parent / "include"
    cubin = f"{folder}/{source.stem}_{arch}.cubin"
    command = [nvcc, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v"]
    command += [*COMMON_NVCC_FLAGS, "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-I{CSRC}", "-isystem", str(include), str(source), "-o", cubin]
    start = time.perf_counter()
    run = subprocess.run(command, text=True, capture_output=True, check=False)
    if run.returncode != 0:
        raise SystemExit(
            f"check_cuda_build.py: error: {source.name} does not compile for sm_{arch}:\n"
            f"{run.stderr}"
        )
    seconds = time.perf_counter() - start
    code = ""
    if cuobjdump:
        dump = [cuobjdump, "-sass", cubin]
        code = subprocess.run(dump, text=True, capture_output=True, check=True).stdout
    return Compiled(run.stderr, code, seconds)


def hot_loops(code: str) -> dict[str, int]:
    """Number of instructions in the longest innermost loop of each kernel, by mangled name."""
    lengths = {}
    for function in re.split(r"\n\s*Function : ", code)[1:]:
        name, body = function.split("\n", 1)
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", body)
        lines = [(int(address, 16), text) for address, text in found]
        # The compiler places code that it moved out of line after the last exit.
        end = max((address for address, text in lines if "EXIT" in text), default=0)
        loops = set()
        for address, text in lines:
            target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
            if target and int(target.group(1), 16) < address < end:
                loops.add((int(target.group(1), 16), address))
        lengths[name] = max(
            (
                sum(first <= address <= last for address, _ in lines)
                for first, last in loops
                if not any((first, last) != o and first <= o[0] and o[1] <= last for o in loops)
            ),
            default=0,
        )
    return lengths


def usages(report: str) -> dict[str, Usage]:
    """Registers and spills of each kernel, by mangled name, from the report of ptxas."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    return {
        name: Usage(int(registers), int(stores) + int(loads))
        for name, stores, loads, registers in pattern.findall(report)
    }


@dataclass(frozen=True)
class Kernel:
    """A kernel's name and template arguments, parsed from its mangled name."""

    name: str
    dtype: str
    numbers: tuple[int, ...]
    combine: str | None
    flags: tuple[bool, ...]

    @classmethod
    def of(cls, mangled: str) -> Kernel | None:
        match = re.fullmatch(r"_ZN3ddf4cuda\d+(\w+?)I(.+?)EEv.*", mangled)
        if match is None:
            return None
        name, arguments = match.groups()
        types = {"f": "float", "d": "double", "6__half": "half", "13__nv_bfloat16": "bfloat16"}
        dtype = next(types[t] for t in types if arguments.startswith(t))
        numbers = tuple(map(int, re.findall(r"Li(\d+)", arguments)))
        combine = re.search(r"NS_\d+(\w+?)E", arguments)
        flags = tuple(flag == "1" for flag in re.findall(r"Lb([01])", arguments))
        return cls(name, dtype, numbers, combine and combine[1].lower(), flags)

    def __str__(self) -> str:
        """For example ``forward_3x3<float, mul, vector>``."""
        meanings = {
            "forward_3x3": ("mirrored", "vector", "pack"),
            "forward_3x3_channels_last": ("mirrored", "pack"),
            "backward_3x3": ("vector",),
            "forward_tiled": ("mirrored", "channels_last", "pack"),
            "grad_filters": ("vector",),
            "gather_3x3": ("mirrored",),
            "gather_3x3_channels_last": ("mirrored",),
        }
        named = zip(meanings.get(self.name, ()), self.flags, strict=True)
        windows = [f"{n} {v}" for n, v in zip(("k", "stride"), self.numbers, strict=False)]
        combine = [self.combine] if self.combine else []
        parts = [self.dtype, *windows, *combine, *(n for n, on in named if on)]
        return f"{self.name}<{', '.join(parts)}>"

    def slots(self, instructions: int) -> float | None:
        """Instructions per output, given those per iteration; None for kernels without a fixed
        number of outputs."""
        outputs = OUTPUTS.get(self.name)
        return instructions / outputs(*self.numbers) if outputs else None


def readable(mangled: str) -> str:
    return str(Kernel.of(mangled) or mangled)


def print_slots(codes: dict[str, str]) -> None:
    """Prints the instructions per output of each kernel (rows) and architecture (columns)."""
    tables = []
    for code in codes.values():
        kernels = [(Kernel.of(name), count) for name, count in hot_loops(code).items()]
        slots = [(str(k), k.slots(count)) for k, count in kernels if k is not None]
        tables.append({name: value for name, value in slots if value is not None})
    width = max(map(len, tables[0]))
    print("\ninstructions of the loop per output")
    print("kernel".ljust(width), *(f"sm_{arch}".rjust(8) for arch in codes))
    for kernel in sorted(tables[0]):
        print(kernel.ljust(width), *(f"{table[kernel]:8.1f}" for table in tables))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", nargs="+", default=ARCHITECTURES, help="compute capabilities without the dot"
    )
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once")
    parser.add_argument("--slots", action="store_true", help="count instructions too")
    args = parser.parse_args()
    nvcc = find_nvcc()
    cuobjdump = find_cuobjdump(nvcc) if args.slots else None
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        runs = {
            arch: [
                pool.submit(compile_for, nvcc, cuobjdump, arch, source, folder)
                for source in sources
            ]
            for arch in args.arch
        }
        compiled = {arch: [run.result() for run in runs[arch]] for arch in args.arch}
    seconds = [sum(c.seconds for c in compiled[arch]) for arch in args.arch]
    tables = [
        {readable(name): usage for c in compiled[arch] for name, usage in usages(c.report).items()}
        for arch in args.arch
    ]
    kernels = sorted(tables[0])
    if not kernels:
        raise SystemExit("check_cuda_build.py: error: ptxas reported no kernels")

    width = max(map(len, kernels))
    print("registers + spilled bytes")
    print("kernel".ljust(width), *(f"sm_{arch}".rjust(8) for arch in args.arch))
    faults, allowed = [], []
    for kernel in kernels:
        cells = []
        for arch, table in zip(args.arch, tables, strict=True):
            usage = table[kernel]
            spilled = f"+{usage.spilled_bytes}" if usage.spilled_bytes else ""
            cells.append(f"{usage.registers}{spilled}".rjust(8))
            if spilled and (kernel, arch) in SPILLS:
                allowed.append(f"{kernel} on sm_{arch}: {SPILLS[kernel, arch]}")
            elif spilled:
                faults.append(f"{kernel} spills {usage.spilled_bytes} bytes on sm_{arch}")
        print(kernel.ljust(width), *cells)
    print("seconds".ljust(width), *(f"{s:.0f}".rjust(8) for s in seconds))
    print(f"{len(kernels)} kernels, {len(args.arch)} architectures")
    if args.slots:
        print_slots({arch: "".join(c.code for c in compiled[arch]) for arch in args.arch})
    for reason in allowed:
        print("allowed:", reason)
    for fault in faults:
        print(f"check_cuda_build.py: error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
