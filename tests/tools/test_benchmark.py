"""tools/benchmark.py runs, reports what it measured and refuses nonsense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "benchmark.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize("backward", [[], ["--backward"]], ids=["forward", "backward"])
def test_op_reports_every_case(backward, tmp_path):
    out = tmp_path / "report.json"
    shapes = ["1,4,5,6", "2,8,9,7"]
    options = ["--repeats", "2", "--threads", "1", "--stride", "2", "--json", str(out)]
    result = benchmark("op", "--shapes", *shapes, *options, *backward)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("1,4,5,6") == 3  # the command and a row for each layout
    report = json.loads(out.read_text())
    assert [row["shape"] for row in report["rows"]] == [[1, 4, 5, 6], [2, 8, 9, 7]] * 2
    assert [row["layout"] for row in report["rows"]] == ["nchw"] * 2 + ["channels_last"] * 2
    for row in report["rows"]:
        assert {len(times) for times in row["milliseconds"].values()} == {2}
        assert set(row["peak_extra_bytes"]) == {"ddf", "unfold"}
    assert report["machine"]["threads"] == 1
    first, second = (row["ratios"]["ddf/conv"] for row in report["rows"][:2])
    assert report["geometric_means"]["nchw"]["ddf/conv"] == pytest.approx((first * second) ** 0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["op", "--shapes", "8,64,56"], "'8,64,56' is not B,C,H,W, as in 8,64,56,56"),
        (["op", "--shapes", "8,64,0,56"], "is not B,C,H,W"),
        (["op", "--kernel-size", "4"], "'4' is not odd"),
        (["op", "--repeats", "0"], "'0' is not a positive integer"),
        ([], "command"),
    ],
)
def test_bad_options_are_named(arguments, message):
    result = benchmark(*arguments)
    assert result.returncode == 2 and message in result.stderr
