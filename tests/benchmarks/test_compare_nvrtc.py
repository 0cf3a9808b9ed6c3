"""What compare_nvrtc.py counts in disassembled code, without a compiler."""

from __future__ import annotations

import pytest
from compare_nvrtc import Size, longest_path

# One side of a branch is two instructions, the other one.
TWO_SIDES = [
    "@P0 BRA 0x0040",
    "FFMA R1, R1, R2, R3",
    "FFMA R1, R1, R2, R3",
    "BRA 0x0050",
    "FADD R1, R1, R2",
    "@P1 BRA 0x0000",
]


@pytest.mark.parametrize(
    "lines, count",
    [
        ([], 0),
        (["FADD R1, R1, R2", "@P0 BRA 0x0000"], 2),
        (TWO_SIDES, 5),
        # A warp without the predicate goes on.
        (["@P0 EXIT", "FADD R1, R1, R2"], 2),
        (["EXIT", "FADD R1, R1, R2"], 1),
        # Conditions of a whole warp are operands.
        (["BRA.U !UP0, 0x0020", "FADD R1, R1, R2", "EXIT"], 3),
        (["BRA 0x0020", "FADD R1, R1, R2", "EXIT"], 2),
        # Behind the loop.
        (["@!P0 BRA 0x0100", "FADD R1, R1, R2", "BRA 0x0000"], 3),
    ],
)
def test_the_longest_path(lines, count):
    assert longest_path([(16 * i, text) for i, text in enumerate(lines)]) == count


def test_warps_are_compared_in_whole_blocks():
    """56 and 64 registers are enough for 36 and 32 warps, both for four blocks of eight."""
    fewer, more = Size(56, 100, None), Size(64, 100, None)
    assert more.slower(fewer, 1)
    assert not more.slower(fewer, 8)


def test_instructions_of_the_loop_are_compared():
    assert Size(64, 100, 12.0).slower(Size(64, 100, 10.0), 8)
    assert not Size(64, 100, 11.0).slower(Size(64, 200, 10.0), 8)
