"""What check_cuda_build.py reads from disassembled code, without a compiler."""

from __future__ import annotations

import pytest
from check_cuda_build import Kernel, hot_loops, memory_parallelism, registers_of, usages, worse

# Four loads together, and one that waits for another.
TOGETHER = [
    "LDG.E.64 R4, desc[UR4][R2.64]",
    "LDG.E R6, desc[UR4][R2.64+0x100]",
    "@!P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x200]",
    "LDG.E.U16 R12, desc[UR4][R2.64+0x300]",
    "FFMA R20, R4, R16, R20",
    "FFMA R20, R5, R12, R20",
    "STG.E desc[UR4][R18.64], R20",
    "@P1 BRA 0x10",
]
IN_TURN = [
    "LDG.E R4, desc[UR4][R2.64]",
    "FADD R16, R4, R4",
    "LDG.E R5, desc[UR4][R2.64+0x100]",
    "FADD R17, -R5, |R5|",
]


@pytest.mark.parametrize(
    "loop, most, waits",
    [
        (TOGETHER, 4, 1),
        (IN_TURN, 1, 2),
        # Loads for the next iteration.
        ([*TOGETHER[4:6], *TOGETHER[:4]], 4, 1),
        # A store reads its first operand, too.
        (["LDG.E R4, desc[UR4][R2.64]", "STG.E desc[UR4][R4.64], R6"], 1, 1),
        (["LDS R4, [R2]", "FADD R5, R4, R4"], 0, 0),
    ],
)
def test_loads_in_flight_and_waits(loop, most, waits):
    assert memory_parallelism(loop) == (most, waits)


def test_registers_of_operands():
    assert registers_of("-R5, |R16|, R2.64, UR4, RZ, R7.H0_H0") == [5, 16, 2, 3, 7]


def test_the_hot_loop():
    """Of the loops, that with most FFMA of its own: not the one around it, nor one in it."""
    name = "ddf::cuda::forward_3x3<float, ddf::Mul, false, true, false>"
    lines = ["FFMA R1, R1, R2, R3", "S2R R0, SR_TID.X", "FFMA R4, R4, R4, R4", "LDS R5, [R2]",
             "BRA 0x30", "FFMA R5, R4, R4, R4", "BRA 0x10", "BRA 0x0"]  # fmt: skip
    code = "".join(f"  /*{16 * i:04x}*/ {text};\n" for i, text in enumerate([*lines, "EXIT"]))
    found = hot_loops(f"\n Function : {name}\n{code}")
    assert found == {name: [*lines[1:3], *lines[5:7]]}


@pytest.mark.parametrize(
    "written, text",
    [
        ("forward_3x3<__nv_bfloat16, ddf::Mul, false, true, false>",
         "forward_3x3<bfloat16, mul, vector>"),
        ("forward_tiled<ddf::cuda::Half, 5, 1, ddf::Add, true, true>",
         "forward_tiled<half, k 5, stride 1, add, mirrored, channels_last>"),
        ("reduce_partials<double>", "reduce_partials<double>"),
    ],
)  # fmt: skip
def test_names_of_kernels(written, text):
    """As nvcc and as the dispatch write them."""
    assert str(Kernel.of(f"ddf::cuda::{written}")) == text
    assert Kernel.of("main") is None


def test_usage_in_the_report_of_ptxas():
    report = (
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1kv\n"
        "    40 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers, 40 bytes cumulative stack size\n"
    )
    (usage,) = usages(report).values()
    assert (usage.registers, usage.spilled_bytes, usage.stack_bytes) == (128, 20, 40)


def test_what_is_worse():
    before = {
        "spilled bytes": 0, "stack bytes": 0, "instructions": 100, "waits": 2, "conflict": 2,
        "conflicts %": 104, "warps": 16, "loads in flight": 12,
    }  # fmt: skip
    assert worse(before, before) == []
    assert worse(before | {"instructions": 102, "waits": 1, "warps": 20}, before) == []
    for name, value in (("instructions", 103), ("waits", 3), ("warps", 15), ("spilled bytes", 4),
                        ("conflict", 3), ("conflicts %", 107)):  # fmt: skip
        assert worse(before | {name: value}, before) == [f"{name} {before[name]} -> {value}"]
