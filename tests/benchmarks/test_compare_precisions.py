"""`benchmarks/compare_precisions.py` on a few small digits."""

import json
import os
import subprocess
import sys

import pytest
from fork_server import ROOT, tool_environment

pytest.importorskip("mmpretrain")
pytest.importorskip("sklearn")

SCRIPT = ROOT / "benchmarks" / "compare_precisions.py"
CONFIG = ROOT / "configs" / "classification" / "ddf-mul-resnet26_digits.py"


@pytest.mark.parametrize("margin, code", [("100", 0), ("-200", 1)])
def test_trains_in_each_dtype(tmp_path, margin, code):
    options = ["train_cfg.max_epochs=1", "train_dataloader.dataset.indices=128"]
    for split, steps in (("train", {0: "scale", 2: "crop_size"}), ("test", {0: "scale"})):
        options += [f"{split}_dataloader.dataset.pipeline.{i}.{k}=12" for i, k in steps.items()]
    dtypes = ["float32", "bfloat16", "float16"] if code == 0 else ["float32"]
    result = subprocess.run(
        [sys.executable, SCRIPT, CONFIG, "--dtypes", *dtypes, "--margin", margin,
         "--json", "out.json", "--cfg-options", *options],
        cwd=tmp_path, env={**os.environ, **tool_environment(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == code, result.stderr
    values = json.loads((tmp_path / "out.json").read_text())
    assert values.pop("config") == CONFIG.name
    assert list(values) == dtypes
    for dtype in dtypes[1:]:
        log = next((tmp_path / "work_dirs" / "precisions" / dtype).glob("*/*.log")).read_text()
        assert "nan" not in log.split("Epoch(train)", 1)[1]
