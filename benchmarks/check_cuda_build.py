"""Compile the CUDA kernels for every architecture; print registers and spills as a table.

    python benchmarks/check_cuda_build.py [--arch 80 90 ...] [--jobs N] [--slots] [--gates]

Needs nvcc and torch's headers, but no GPU. --slots also counts the instructions of each kernel's
innermost loop per output, with cuobjdump, including branches for borders. --gates compares what a
GPU's speed depends on with cuda_gates.csv beside this file: registers, spilled bytes, stack, the
warps of a multiprocessor; of the hot loop the instructions, the loads in flight before the
first of their values is used, and how often an iteration waits for loads; and how many times as
long bank conflicts of shared memory make an access (bank_conflicts.py), at most and in percent of
all. --update writes that file. The exit status is 1 if a kernel spills registers, or if a gate is
worse than in the file.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from bank_conflicts import bank_conflicts
from cuda_dispatch import Dispatch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

# Outputs (pixels of one channel) per iteration of a kernel's hot loop, by its template arguments; a
# fraction of an output if the loop covers one row of taps.
OUTPUTS = {
    "forward_3x3": lambda: 8,
    "forward_3x3_channels_last": lambda: 3 * 8,
    "backward_3x3": lambda: 8,
    "forward_tiled": lambda k, stride: 16 / k,
    "gather_3x3": lambda: 16,
    "gather_3x3_channels_last": lambda: 8,
    "grad_filters_gathered": lambda: 2,
    "grad_filters": lambda k, stride: 4 / (1 if k == 3 else k),
    "backward_3x3_channels_last": lambda: 16,
    "grad_filters_channels_last": lambda k, stride: k * 4 / (1 if k == 3 else k),
}
CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]
GATES = Path(__file__).with_name("cuda_gates.csv")
# Kernels without a loop over channels, whose whole code is measured.
UNROLLED = ("gather_3x3", "gather_3x3_channels_last")


@dataclass(frozen=True)
class Usage:
    registers: int
    spilled_bytes: int
    stack_bytes: int


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
        raise SystemExit("check_cuda_build.py: error: cuobjdump was not found with nvcc")
    return found


@dataclass(frozen=True)
class Compiled:
    report: str  # of ptxas
    code: str  # SASS, or empty without --slots
    seconds: float


def demangle(text: str) -> str:
    """``text`` with the names of kernels as C++ writes them, without their parameters."""
    return subprocess.run(
        ["c++filt", "-p"], input=text, text=True, capture_output=True, check=True
    ).stdout


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
    return Compiled(demangle(run.stderr), demangle(code), seconds)


def hot_loops(code: str) -> dict[str, list[str]]:
    """The instructions of the loop of each kernel that multiplies and adds most, without those of
    the loops in it."""
    return {name: [text for _, text in lines] for name, lines in hot_lines(code).items()}


def hot_lines(code: str) -> dict[str, list[tuple[int, str]]]:
    """The same with their addresses."""
    hot = {}
    for function in re.split(r"\n\s*Function : ", code)[1:]:
        name, body = function.split("\n", 1)
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", body)
        lines = [(int(address, 16), text) for address, text in found]
        # The compiler places code that it moved out of line after the last exit.
        end = max((address for address, text in lines if "EXIT" in text), default=0)
        kernel = Kernel.of(name)
        if kernel is not None and kernel.name in UNROLLED:
            hot[name] = [line for line in lines if line[0] <= end]
            continue
        loops = set()
        for address, text in lines:
            target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
            if target and int(target.group(1), 16) < address < end:
                loops.add((int(target.group(1), 16), address))
        bodies = []
        for first, last in loops:
            inner = [o for o in loops if (first, last) != o and first <= o[0] and o[1] <= last]
            bodies.append(
                [
                    (address, text)
                    for address, text in lines
                    if first <= address <= last and not any(a <= address <= b for a, b in inner)
                ]
            )
        hot[name] = max(
            bodies,
            key=lambda body: (sum("FFMA" in text for _, text in body), len(body)),
            default=[],
        )
    return hot


def memory_parallelism(loop: Sequence[str]) -> tuple[int, int]:
    """Of a loop, in the order of its code: the most loads from global memory that are in flight
    when the value of one is used, and how many times an iteration waits for such loads, one after
    the other."""
    most = waits = 0
    pending: dict[int, int] = {}  # register -> number of its load
    number = 0
    # Loads of the end of an iteration are used in the next one, which is measured.
    for measured in (False, True):
        for text in loop:
            words = re.sub(r"^@!?U?P\w+\s+", "", text.strip())
            name, _, operands = words.partition(" ")
            first, _, rest = operands.partition(",")
            writes = not name.startswith(("ST", "BRA", "EXIT", "BAR", "RED"))
            used = registers_of(rest if writes else operands)
            if any(register in pending for register in used):
                if measured:
                    most = max(most, len(set(pending.values())))
                    waits += 1
                # All that were requested before return at nearly the same time.
                pending = {}
            written = registers_of(first) if writes else []
            for register in written:
                pending.pop(register, None)
            if name.startswith("LDG.") and written:
                number += 1
                words_read = 4 if ".128" in name else 2 if ".64" in name else 1
                pending |= {written[0] + i: number for i in range(words_read)}
    return most, waits


def registers_of(operands: str) -> list[int]:
    """The numbers of the registers in operands."""
    found = []
    for register, pair in re.findall(r"(?<![A-Z])R(\d+)(\.64)?", operands):
        found += [int(register), int(register) + 1] if pair else [int(register)]
    return found


def usages(report: str) -> dict[str, Usage]:
    """Registers, spills and stack of each kernel, from the report of ptxas."""
    pattern = re.compile(
        r"Compiling entry function '([^']+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    return {
        name: Usage(int(registers), int(stores) + int(loads), int(stack))
        for name, stack, stores, loads, registers in pattern.findall(report)
    }


@dataclass(frozen=True)
class Kernel:
    """A kernel's name and template arguments, parsed from what C++ writes, for example
    ``ddf::cuda::upsample_3x3<float, ddf::Mul>``."""

    name: str
    dtype: str
    numbers: tuple[int, ...]
    combine: str | None
    flags: tuple[bool, ...]

    @classmethod
    def of(cls, written: str) -> Kernel | None:
        match = re.fullmatch(r"ddf::cuda::(\w+)<(.+)>", written)
        if match is None:
            return None
        name, arguments = match.groups()
        dtype, *others = arguments.split(", ")
        # The types of nvcc and those of the host.
        dtype = re.sub("__nv_|__|ddf::cuda::", "", dtype).lower()
        numbers = tuple(int(a) for a in others if a.isdigit())
        combine = next((a[5:].lower() for a in others if a.startswith("ddf::")), None)
        flags = tuple(a == "true" for a in others if a in ("true", "false"))
        return cls(name, dtype, numbers, combine, flags)

    def __str__(self) -> str:
        """For example ``forward_3x3<float, mul, vector>``."""
        meanings = {
            "forward_3x3": ("mirrored", "vector", "pack"),
            "forward_3x3_channels_last": ("mirrored", "pack"),
            "backward_3x3": ("vector", "copies"),
            "forward_tiled": ("mirrored", "channels_last"),
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


def readable(written: str) -> str:
    return str(Kernel.of(written) or written)


def print_slots(codes: dict[str, str]) -> None:
    """Prints the instructions per output of each kernel (rows) and architecture (columns)."""
    tables = []
    for code in codes.values():
        kernels = [(Kernel.of(name), len(loop)) for name, loop in hot_loops(code).items()]
        slots = [(str(k), k.slots(count)) for k, count in kernels if k is not None]
        tables.append({name: value for name, value in slots if value is not None})
    width = max(map(len, tables[0]))
    print("\ninstructions of the loop per output")
    print("kernel".ljust(width), *(f"sm_{arch}".rjust(8) for arch in codes))
    for kernel in sorted(tables[0]):
        print(kernel.ljust(width), *(f"{table[kernel]:8.1f}" for table in tables))


# Columns of GATES after the registers; a larger value of the first ones is worse, a smaller one of
# the others.
COSTS = ("spilled bytes", "stack bytes", "instructions", "waits", "conflict", "conflicts %")
CAPACITIES = ("warps", "loads in flight")


def resident_warps(registers: int, block_warps: int = 1) -> int:
    """How many warps of a kernel, in whole blocks, the registers of a multiprocessor are enough
    for."""
    # They are allocated to a warp in units of 256.
    warps = min(64, 65536 // (-(-registers // 8) * 8 * 32))
    return warps // block_warps * block_warps


def measure(usage: Usage, loop: Sequence[str], conflicts: tuple[int, int]) -> dict[str, int]:
    """The gates of a kernel."""
    loads, waits = memory_parallelism(loop)
    return {
        "registers": usage.registers,
        "spilled bytes": usage.spilled_bytes,
        "stack bytes": usage.stack_bytes,
        "instructions": len(loop),
        "waits": waits,
        "conflict": conflicts[0],
        "conflicts %": conflicts[1],
        "warps": resident_warps(usage.registers),
        "loads in flight": loads,
    }


def worse(now: dict[str, int], before: dict[str, int]) -> list[str]:
    """What got worse by more than 2 %."""
    found = [n for n in COSTS if now[n] > 1.02 * before[n]]
    found += [n for n in CAPACITIES if now[n] < before[n]]
    return [f"{name} {before[name]} -> {now[name]}" for name in found]


def write_source_of_gates(folder: Path) -> Path:
    """A source with the kernels of GATES alone: float16 is like bfloat16, add easier than mul."""
    with Dispatch() as dispatch:
        names = [name for name in dispatch.kernel_names if "ddf::Add" not in name]
    source = folder / "gates.cu"
    addresses = "".join(f"  reinterpret_cast<const void*>(&{name}),\n" for name in names)
    source.write_text(
        f'#include "cuda/kernels.cuh"\nconst void* const kernels[] = {{\n{addresses}}};\n'
    )
    return source


def check_gates(compiled: dict[str, list[Compiled]], version: str, update: bool) -> list[str]:
    """Compares the gates with GATES, or writes them; returns what got worse."""
    rows = {}
    conflicts = {
        str(Kernel.of(name)): (math.ceil(worst), round(100 * mean))
        for name, (worst, mean) in bank_conflicts().items()
    }
    for arch, parts in compiled.items():
        for part in parts:
            used = usages(part.report)
            for name, loop in hot_loops(part.code).items():
                kernel = Kernel.of(name)
                of_float = str(dataclasses.replace(kernel, dtype="float"))
                found = conflicts.get(of_float, (1, 100))
                rows[str(kernel), arch] = measure(used[name], loop, found)
    names = ["registers", *COSTS, *CAPACITIES]
    header, known = ["kernel", "arch", *names, version], {}
    found_header = header
    if GATES.exists():
        with GATES.open(newline="") as file:
            found_header, *lines = csv.reader(file)
        known = {
            (kernel, arch): dict(zip(found_header[2:-1], map(int, values), strict=True))
            for kernel, arch, *values in lines
        }
    if update:
        # Other architectures keep their rows.
        kept = {key: row for key, row in known.items() if key[1] not in compiled}
        rows |= kept if found_header == header else {}
        with GATES.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows([*key, *(rows[key][n] for n in names)] for key in sorted(rows))
        return []
    if found_header != header:
        was = (
            f"it was written with nvcc {found_header[-1]}, this is {version}, or has other columns"
        )
        return [f"{GATES.name}: {was}: --update writes it"]
    found = [
        f"{kernel} on sm_{arch}: {change}"
        for (kernel, arch), now in rows.items()
        if (kernel, arch) in known
        for change in worse(now, known[kernel, arch])
    ]
    return found + [f"{k} on sm_{a} is not in {GATES.name}" for k, a in rows if (k, a) not in known]


def version_of(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], text=True, capture_output=True, check=True).stdout
    return text.rsplit("V", 1)[1].split()[0]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", nargs="+", default=ARCHITECTURES, help="compute capabilities without the dot"
    )
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once")
    parser.add_argument("--slots", action="store_true", help="count instructions too")
    parser.add_argument("--gates", action="store_true", help=f"compare with {GATES.name}")
    parser.add_argument("--update", action="store_true", help=f"write {GATES.name}")
    args = parser.parse_args()
    nvcc = find_nvcc()
    disassembles = args.slots or args.gates or args.update
    cuobjdump = find_cuobjdump(nvcc) if disassembles else None
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        if args.gates or args.update:
            sources = [write_source_of_gates(Path(folder))]
        else:
            sources = sorted((CSRC / "cuda").glob("*.cu"))
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
    faults = []
    for kernel in kernels:
        cells = []
        for arch, table in zip(args.arch, tables, strict=True):
            usage = table[kernel]
            spilled = f"+{usage.spilled_bytes}" if usage.spilled_bytes else ""
            cells.append(f"{usage.registers}{spilled}".rjust(8))
            if spilled:
                faults.append(f"{kernel} spills {usage.spilled_bytes} bytes on sm_{arch}")
        print(kernel.ljust(width), *cells)
    print("seconds".ljust(width), *(f"{s:.0f}".rjust(8) for s in seconds))
    print(f"{len(kernels)} kernels, {len(args.arch)} architectures")
    if args.slots:
        print_slots({arch: "".join(c.code for c in compiled[arch]) for arch in args.arch})
    if args.gates or args.update:
        faults += check_gates(compiled, version_of(nvcc), args.update)
    for fault in faults:
        print(f"check_cuda_build.py: error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
