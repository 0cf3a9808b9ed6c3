"""The recipes on digit scenes: two iterations of training, a test and a drawing of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmcv._ext")

from PIL import Image

from ddf_mm.datasets.digit_scenes import write_digit_scenes

ROOT = Path(__file__).resolve().parents[1]
DETECTION = "detection/mask-rcnn_ddf-mul-r26_{}_digit-scenes.py"
SEGMENTATION = "segmentation/fpn_ddf-mul-r26_{}_digit-scenes.py"
SHORT = {
    DETECTION: ["train_cfg.max_epochs=1", "train_cfg.val_interval=1"],
    SEGMENTATION: [
        "train_cfg.max_iters=2",
        "train_cfg.val_interval=2",
        "default_hooks.checkpoint.interval=2",
    ],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    write_digit_scenes(folder / "data", num_train=4, num_val=2)
    return folder


def start(work: Path, *command: object, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)),
        cwd=work,
        env=dict(os.environ, DIGIT_SCENES=str(work / "data"), **variables),
        capture_output=True,
        text=True,
        check=False,
    )


def tool(work: Path, name: str, *arguments: object) -> str:
    done = start(work, sys.executable, ROOT / name, *arguments)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def train(work: Path, recipe: str, neck: str) -> Path:
    """Trains a recipe for two iterations, unless another test has; returns its folder."""
    config = ROOT / "configs" / recipe.format(neck)
    out = work / config.stem
    options = [*SHORT[recipe], "train_dataloader.batch_size=2", "default_hooks.logger.interval=1"]
    if recipe is DETECTION:
        options.append("default_hooks.checkpoint.interval=1")
    if not out.exists():
        tool(work, "tools/train.py", config, "--work-dir", out, "--cfg-options", *options)
    return out


# test_comparison_is_resumed trains FPN.
@pytest.mark.parametrize("neck", ["ddfup-fpn", "fpn-carafe"])
@pytest.mark.parametrize("recipe", [DETECTION, SEGMENTATION], ids=["detection", "segmentation"])
def test_recipe_trains(work, recipe, neck):
    out = train(work, recipe, neck)
    (log,) = out.glob("*/vis_data/scalars.json")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    metric = "coco/segm_mAP_50" if recipe is DETECTION else "mIoU"
    assert metric in records[-1] and (out / "last_checkpoint").is_file()


@pytest.mark.parametrize("recipe", [DETECTION, SEGMENTATION], ids=["detection", "segmentation"])
def test_predictions_are_drawn(work, recipe):
    config = ROOT / "configs" / recipe.format("ddfup-fpn")
    out = train(work, recipe, "ddfup-fpn")
    checkpoint = Path((out / "last_checkpoint").read_text().strip())
    sheet = out / "sheet.png"
    options = ["--out", sheet, "--enlarge", "2", "--columns", "2", "--score", "0"]
    tool(work, "tools/analysis/draw_predictions.py", config, checkpoint, *options)
    with Image.open(sheet) as picture:
        assert picture.size == (2 * 256 + 3 * 8, 256 + 2 * 8)
        # The scene is visible through the drawing; a plain
        # tile with a label has some 20 grays.
        for left in (8, 8 + 256 + 8):
            scene = picture.convert("RGB").crop((left, 8, left + 256, 8 + 256))
            assert len(scene.getcolors(1 << 16)) > 200


def test_comparison_is_resumed(work):
    """Each run once; a second call only writes the table again."""
    arguments = ["--tasks", "segmentation", "--necks", "fpn", "--seeds", "3", "--work-dir", "runs"]
    arguments += ["--out", "table.json", "--cfg-options", *SHORT[SEGMENTATION]]
    arguments += ["train_dataloader.batch_size=2"]
    table = tool(work, "benchmarks/compare_upsamplers.py", *arguments)
    assert "| FPN (nearest) | 1 | " in table
    first = json.loads((work / "table.json").read_text())
    assert list(first["segmentation"]["fpn"]) == ["3"]
    assert (work / "table.md").read_text() in table
    checkpoint = next((work / "runs").glob("*/seed3/iter_2.pth"))
    before = checkpoint.stat().st_mtime_ns
    tool(work, "benchmarks/compare_upsamplers.py", *arguments)
    assert checkpoint.stat().st_mtime_ns == before
    assert json.loads((work / "table.json").read_text()) == first


DEMO = ROOT / "tools" / "demo_scenes.sh"


@pytest.mark.parametrize("arguments", [(), ("classification",), ("detection", "a", "b")])
def test_demo_refuses_other_arguments(work, arguments):
    result = start(work, "bash", DEMO, *arguments, PYTHON="false")
    assert result.returncode == 2
    usage = "usage: demo_scenes.sh detection|segmentation [WORK_DIR]"
    assert result.stderr == f"demo_scenes.sh: error: {usage}\n"


@pytest.mark.parametrize("failing", ["make_digit_scenes.py", "train.py", "test.py", "draw"])
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_demo_stops_at_the_step_that_fails(tmp_path, task, failing):
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$(basename "$1") $2" >> "{calls}"\n'
        f"[[ $1 != */{failing}* ]] || exit 3\n"
        f'mkdir -p "{tmp_path}/out"; echo some.pth > "{tmp_path}/out/last_checkpoint"\n'
    )
    python.chmod(0o755)
    result = start(tmp_path, "bash", DEMO, task, tmp_path / "out", PYTHON=str(python))
    assert result.returncode == 3
    last = calls.read_text().splitlines()[-1]
    assert last.startswith(failing)
    if failing == "train.py":
        assert f"configs/{task}/" in last and "ddfup-fpn" in last
    assert "predictions" not in result.stdout
