"""The tools of this package, mmdet and mmseg with configs with a DDF backbone and neck."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import get_installed_path
from PIL import Image

import ddf_mm  # noqa: F401  (mmengine finds `mmseg::` of the OneDL packages from then on)

ROOT = Path(__file__).resolve().parents[2]

DETECTION = """
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
model = dict(
    backbone=dict(_delete_=True, type="ddf_mm.DDFResNet", depth=26, base_channels=8,
                  out_indices=(0, 1, 2, 3), frozen_stages=1, norm_eval=True),
    neck=dict(type="ddf_mm.DDFUpFPN", in_channels=[32, 64, 128, 256], out_channels=16,
              guidance=True),
    bbox_head=dict(num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1),
    # After two iterations all scores are low.
    test_cfg=dict(score_thr=0.0),
)
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="TestTimeAug", transforms=[
        [dict(type="Resize", scale=(97, 65), keep_ratio=True)],
        [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)],
        [dict(type="LoadAnnotations", with_bbox=True)],
        [dict(type="PackDetInputs",
              meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip",
                         "flip_direction"))],
    ]),
]
custom_hooks = [dict(type="EMAHook")]
data_root = "data/"
metainfo = dict(classes=("square", "disc"))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(97, 65), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(97, 65), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs",
         meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
dataset = dict(data_root=data_root, ann_file="annotations.json", data_prefix=dict(img="images/"),
               metainfo=metainfo)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,
                        dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False,
                      dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
"""

SEGMENTATION = """
_base_ = "mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py"
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(65, 97)),
    pretrained=None,
    backbone=dict(_delete_=True, type="ddf_mm.DDFResNet", depth=26, base_channels=8,
                  out_indices=(0, 1, 2, 3), strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4),
                  contract_dilation=True, norm_cfg=norm_cfg),
    decode_head=dict(in_channels=256, channels=16, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=128, channels=16, norm_cfg=norm_cfg),
)
train_pipeline = [
    dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs"),
]
dataset = dict(data_root="data/", img_suffix=".png", seg_map_suffix=".png",
               data_prefix=dict(img_path="images", seg_map_path="masks"),
               pipeline=train_pipeline)
loader = dict(num_workers=0, persistent_workers=False, dataset=dataset)
train_dataloader = dict(batch_size=2, **loader)
val_dataloader = dict(batch_size=1, **loader)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of 97 x 65 pixels with a bright rectangle, its COCO annotation and its mask."""
    folder = tmp_path_factory.mktemp("toolboxes")
    data = folder / "data"
    (data / "images").mkdir(parents=True)
    (data / "masks").mkdir()
    random = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(4):
        picture = random.integers(0, 90, (65, 97, 3), dtype=np.uint8)
        mask = np.zeros((65, 97), dtype=np.uint8)
        x, y, size = 10 + 15 * index, 8 + 5 * index, 24
        picture[y : y + size, x : x + size] += 150
        mask[y : y + size, x : x + size] = 1
        Image.fromarray(picture).save(data / "images" / f"{index}.png")
        Image.fromarray(mask).save(data / "masks" / f"{index}.png")
        images.append(dict(id=index, file_name=f"{index}.png", height=65, width=97))
        annotations.append(
            dict(
                id=index + 1,
                image_id=index,
                category_id=index % 2,
                bbox=[x, y, size, size],
                area=size * size,
                iscrowd=0,
            )
        )
    categories = [dict(id=i, name=name) for i, name in enumerate(("square", "disc"))]
    content = dict(images=images, annotations=annotations, categories=categories)
    (data / "annotations.json").write_text(json.dumps(content))
    (folder / "detection.py").write_text(DETECTION)
    (folder / "segmentation.py").write_text(SEGMENTATION)
    return folder


def start(work: Path, tool: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / tool, *arguments],
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )


def run(work: Path, tool: str, *arguments: str) -> str:
    done = start(work, tool, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_mmdet(work):
    pytest.importorskip("mmdet")
    # Validation is in float32 after an epoch in mixed precision.
    run(work, "train.py", "detection.py", "--work-dir", "det", "--amp")
    test = ["detection.py", "det/epoch_1.pth", "--work-dir", "det"]
    options = ["--out", "det/predictions.pkl", "--show-dir", "shown"]
    assert "coco/bbox_mAP" in run(work, "test.py", *test, *options)
    assert len(load(work / "det" / "predictions.pkl")) == 4
    assert "coco/bbox_mAP" in run(work, "test.py", *test, "--tta")
    assert len(list((work / "det").glob("*/shown/*.png"))) == 4
    # Apart from the config, only the sheet is in this folder.
    there, text = set(work.iterdir()), (work / "detection.py").read_text()
    drawn = ["detection.py", "det/epoch_1.pth", "--out", "sheet.png", "--num", "2", "--score", "0"]
    run(work, "analysis/draw_predictions.py", *drawn)
    assert set(work.iterdir()) - there == {work / "sheet.png"}
    assert (work / "detection.py").read_text() == text
    if not torch.cuda.is_available():
        refused = start(work, "test.py", *test, "--amp")
        assert refused.returncode == 2
        assert "test.py: error: --amp cannot test mmdet models on a CPU" in refused.stderr


def test_mmdet_on_several_datasets(work):
    """Each with its own metric."""
    pytest.importorskip("mmdet")
    (work / "several.py").write_text("""
_base_ = "detection.py"
one = dict(type="CocoDataset", test_mode=True, pipeline=_base_.test_pipeline, **_base_.dataset)
two = dict(type="RepeatDataset", times=1, dataset=one)
test_dataloader = dict(dataset=dict(_delete_=True, type="ConcatDataset", datasets=[one, two]))
metric = dict(type="CocoMetric", ann_file=_base_.data_root + "annotations.json", metric="bbox")
test_evaluator = dict(_delete_=True, type="MultiDatasetsEvaluator", metrics=[metric] * 2,
                      dataset_prefixes=["one", "two"])
tta_pipeline = None
""")
    cfg = Config.fromfile(work / "several.py")
    init_default_scope("mmdet")
    torch.save(MODELS.build(cfg.model).state_dict(), work / "random.pth")
    test = ["several.py", "random.pth", "--work-dir", "several", "--tta"]
    said = run(work, "test.py", *test, "--out", "several.pkl", "--show-dir", "pictures")
    assert "one/coco/bbox_mAP" in said and "two/coco/bbox_mAP" in said
    assert len(load(work / "several.pkl")) == 8
    assert len(list((work / "several").glob("*/pictures/*.png"))) == 4  # equal names in both sets


def test_mmdet_resumes_distributed(work):
    """Two processes with gloo, and a checkpoint with the averaged weights of EMAHook."""
    pytest.importorskip("mmdet")
    work_dir = ["--work-dir", "ddp"]
    run(work, "train.py", "detection.py", *work_dir)
    saved = torch.load(work / "ddp" / "epoch_1.pth", weights_only=False)
    assert saved["ema_state_dict"]["steps"] == 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = subprocess.run(
        [
            *("bash", ROOT / "tools" / "dist_train.sh", "detection.py", "2", *work_dir),
            *("--resume", "--cfg-options", "train_cfg.max_epochs=2"),
        ],
        cwd=work,
        env=dict(os.environ, PYTHON=sys.executable, PORT=port, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = torch.load(work / "ddp" / "epoch_2.pth", weights_only=False)
    # Four images in batches of two for two processes: one more iteration.
    assert resumed["meta"]["iter"] == saved["meta"]["iter"] + 1 == 3
    assert resumed["ema_state_dict"]["steps"] == 3


def test_mmseg(work):
    pytest.importorskip("mmseg")
    run(work, "train.py", "segmentation.py", "--work-dir", "seg")
    out = run(
        work,
        "test.py",
        "segmentation.py",
        "seg/iter_2.pth",
        "--work-dir",
        "seg",
        "--out",
        "seg/predictions",
        "--show-dir",
        "seg/shown",
    )
    assert "mIoU" in out
    assert len(list((work / "seg" / "predictions").glob("*.png"))) == 4
    assert len(list((work / "seg" / "shown").rglob("*.png"))) == 4


@pytest.fixture
def run_theirs(work, monkeypatch, capfd):
    """Runs a tool of a toolbox in this process, which has imported the toolbox."""

    def run_tool(toolbox: str, tool: str, *arguments: str) -> str:
        path = Path(get_installed_path(toolbox)) / ".mim" / "tools" / tool
        monkeypatch.chdir(work)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        capfd.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return "".join(capfd.readouterr())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run_tool
    torch.set_num_threads(threads)


def test_mmdet_own_tools(work, run_theirs):
    pytest.importorskip("mmdet")
    run_theirs("mmdet", "train.py", "detection.py", "--work-dir", "own")
    saved = ["detection.py", "own/epoch_1.pth", "--work-dir", "own"]
    assert "coco/bbox_mAP" in run_theirs("mmdet", "test.py", *saved, "--out", "own/pred.pkl")
    predictions = ["detection.py", "own/pred.pkl"]
    run_theirs("mmdet", "analysis_tools/confusion_matrix.py", *predictions, "own/matrix")
    assert (work / "own" / "matrix" / "confusion_matrix.png").is_file()
    run_theirs("mmdet", "analysis_tools/analyze_results.py", *predictions, "own/results")
    # The two best and the two worst.
    assert len(list((work / "own" / "results").rglob("*.png"))) == 4
    assert "Flops: " in run_theirs("mmdet", "analysis_tools/get_flops.py", "detection.py")
    browse = "analysis_tools/browse_dataset.py"
    run_theirs("mmdet", browse, "detection.py", "--output-dir", "browsed", "--not-show")
    assert len(list((work / "browsed").rglob("*.png"))) == 4


def test_mmseg_own_tools(work, run_theirs):
    pytest.importorskip("mmseg")
    run_theirs("mmseg", "train.py", "segmentation.py", "--work-dir", "own_seg")
    saved = ["segmentation.py", "own_seg/iter_2.pth", "--work-dir", "own_seg"]
    assert "mIoU" in run_theirs("mmseg", "test.py", *saved, "--out", "own_seg/predictions")
    matrix = ["segmentation.py", "own_seg/predictions", "own_seg/matrix"]
    run_theirs("mmseg", "analysis_tools/confusion_matrix.py", *matrix)
    assert (work / "own_seg" / "matrix" / "confusion_matrix.png").is_file()
    flops = ["segmentation.py", "--shape", "65", "97"]
    assert "Flops: " in run_theirs("mmseg", "analysis_tools/get_flops.py", *flops)
    browse = ["segmentation.py", "--output-dir", "browsed_seg", "--not-show"]
    run_theirs("mmseg", "analysis_tools/browse_dataset.py", *browse)
    assert len(list((work / "browsed_seg").rglob("*.png"))) == 4
