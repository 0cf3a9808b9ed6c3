"""`benchmarks/compare_filters_cifar.py` on noise."""

import json
import os
import subprocess
import sys

import numpy as np
from fork_server import ROOT, tool_environment
from PIL import Image

SCRIPT = ROOT / "benchmarks" / "compare_filters_cifar.py"


def test_trains_and_tabulates(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for split in ("train", "test"):
        for label in range(10):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(noise ^ (10 * label + i)).save(folder / f"{i}.png")
    filters = ["depthwise", "involution", "mul", "channel", "spatial", "mean"]

    result = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, "--out", "out.json", "--filters", *filters,
         "--seeds", "0", "--images", "20", "--epochs", "1"],
        cwd=tmp_path, env={**os.environ, **tool_environment(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert list(results) == filters
    assert all(0 < runs["0"]["loss"] < 4 for runs in results.values())
    table = (tmp_path / "out.md").read_text()
    assert "| static depthwise 3x3 | 0.50 | 7.4 | 1 |" in table
    assert table.count("\n") == 2 + len(filters)
