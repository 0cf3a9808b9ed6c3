"""ddf_mm.utils: the package in mmengine's hub and mmpretrain's model zoo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.hub import get_config, get_model

import ddf_mm  # noqa: F401  (mmengine finds `ddf_mm::` from then on)
from ddf_mm.layers import DDFPack, DDFUpPack
from ddf_mm.utils import name_ops, register_all_modules

ROOT = Path(__file__).parents[1]
CLASSIFIER = "ddf-mul-resnet26_digits"
BY_TOOLBOX = {
    "mmpretrain": f"classification/{CLASSIFIER}.py",
    "mmdet": "detection/mask-rcnn_ddf-mul-r26_ddfup-fpn_digit-scenes.py",
    "mmseg": "segmentation/fpn_ddf-mul-r26_ddfup-fpn_digit-scenes.py",
    "mmengine": "upsampling/ddf-up-net_x4_digit-scenes.py",
}


@pytest.mark.parametrize("toolbox", BY_TOOLBOX)
def test_hub_finds_configs_and_builds_models(toolbox):
    pytest.importorskip(toolbox)
    name = f"ddf_mm::{BY_TOOLBOX[toolbox]}"
    assert get_config(name).default_scope == toolbox
    model = get_model(name)
    assert type(model).__module__.startswith(
        "ddf_mm." if toolbox == "mmengine" else f"{toolbox}.models"
    )
    assert any(isinstance(module, (DDFPack, DDFUpPack)) for module in model.modules())


def test_mmpretrain_lists_and_builds_the_classifiers():
    mmpretrain = pytest.importorskip("mmpretrain")
    for _ in range(2):
        register_all_modules()
    configs = (ROOT / "configs" / "classification").glob("*.py")
    assert mmpretrain.list_models("*ddf*") == sorted(path.stem for path in configs)
    model = mmpretrain.get_model(CLASSIFIER, backbone=dict(kernel_combine="add"))
    packs = [module for module in model.modules() if isinstance(module, DDFPack)]
    assert {pack.kernel_combine for pack in packs} == {"add"}
    inferencer = mmpretrain.ImageClassificationInferencer(CLASSIFIER, pretrained=False)
    (result,) = inferencer(np.zeros((8, 8, 3), dtype=np.uint8))
    assert result["pred_class"] in "0123456789"


def test_registers_without_the_toolboxes():
    code = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in ("mmpretrain", "mmdet", "mmseg"):
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
from ddf_mm.utils import name_ops, register_all_modules
register_all_modules()
from mmengine.registry import MODELS
print("DDFResNet" in MODELS, "DDF" in MODELS, "mmpretrain" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True", "False"]


def test_ops_that_mmdet_looks_up_by_name():
    """As a dumped config in pure Python has them, or classes, or no type."""
    roi = dict(roi_layer=dict(type="mmcv.ops.RoIAlign", output_size=7))
    tests = [dict(nms=dict(type="mmcv.ops.nms", iou_threshold=0.5)), dict(nms=dict(type=set))]
    model = dict(roi_head=[roi], test_cfg=dict(rcnn=tests[0], rpn=tests[1], nms=None))
    name_ops(model)
    assert roi["roi_layer"]["type"] == "RoIAlign"
    assert tests[0]["nms"]["type"] == "nms" and tests[1]["nms"]["type"] is set
    name_ops(None)
