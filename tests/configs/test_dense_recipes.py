"""The detection and segmentation recipes train and test on small data in the datasets' formats."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image

from ddf_mm.engine.launch import adapt_to_device, set_dataloader_defaults
from ddf_mm.layers import DDFPack
from ddf_mm.models import DDFResNet, DDFUpFPN

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

pytestmark = pytest.mark.usefixtures("one_thread")

# Not on PyPI.
HAS_PANOPTICAPI = find_spec("panopticapi") is not None
CONFIGS = Path(__file__).parents[2] / "configs"
FRAGMENTS = CONFIGS / "_base_" / "backbones"
SIZE = (97, 129)  # height and width of the pictures
# Depth of the DDF backbone, or None for the stock ResNet-50, and whether the neck is DDFUpFPN.
DETECTION = {
    **{
        f"{name}_ddf-mul-r{depth}_fpn_1x_coco.py": (depth, False)
        for name in ("faster-rcnn", "mask-rcnn", "retinanet")
        for depth in (50, 101)
    },
    **{
        f"{name}_{backbone}_ddfup-fpn_1x_coco.py": (depth, True)
        for name in ("faster-rcnn", "mask-rcnn", "panoptic-fpn")
        for backbone, depth in (("r50", None), ("ddf-mul-r50", 50))
    },
}
SEGMENTATION = {
    f"fpn_{nets}_{rest}.py": swap
    for nets, swap in (
        ("ddf-mul-r50", (50, False)),
        ("r50_ddfup-fpn", (None, True)),
        ("ddf-mul-r50_ddfup-fpn", (50, True)),
    )
    for rest in ("4xb2-80k_cityscapes-512x1024", "4xb4-160k_ade20k-512x512")
}
RECIPES = {f"detection/{name}": swap for name, swap in DETECTION.items()} | {
    f"segmentation/{name}": swap for name, swap in SEGMENTATION.items()
}


def test_every_recipe_is_listed():
    found = {
        f"{path.parent.name}/{path.name}"
        for task in ("detection", "segmentation")
        for path in (CONFIGS / task).glob("*.py")
        if "digit-scenes" not in path.name
    }
    assert found == set(RECIPES)


# ------------------------------------------------------------------------------------ fragments


@pytest.mark.parametrize("base", ["file", "package"])
@pytest.mark.parametrize("combine, depth", list(itertools.product(("mul", "add"), (50, 101))))
def test_fragment_replaces_the_backbone(combine, depth, base, tmp_path):
    fragment = f"ddf-{combine}-resnet{depth}.py"
    where = FRAGMENTS / fragment if base == "file" else f"ddf_mm::_base_/backbones/{fragment}"
    path = tmp_path / "swapped.py"
    path.write_text(
        f'_base_ = ["mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py", "{where}"]\n'
        "model = dict(backbone=_base_.ddf_resnet)\n"
    )
    cfg = Config.fromfile(path).model.backbone
    init_default_scope("mmdet")
    from mmdet.registry import MODELS

    # The config's settings stay, those of the ImageNet ResNet-50 do not.
    assert (cfg.out_indices, cfg.frozen_stages, cfg.norm_eval) == ((1, 2, 3), 1, True)
    assert cfg.init_cfg.checkpoint == f"checkpoints/ddf-{combine}-resnet{depth}_in1k.pth"
    assert cfg.init_cfg.prefix == "backbone."
    with torch.device("meta"):
        backbone = MODELS.build(cfg)
    assert type(backbone) is DDFResNet
    assert backbone.depth == depth
    assert backbone.layer4[0].conv2.kernel_combine == combine
    assert not any(p.requires_grad for p in backbone.layer1.parameters())
    assert backbone.train().layer4[0].bn1.training is False


# -------------------------------------------------------------------------------------- recipes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small data and checkpoints at the paths of the recipes."""
    from mmdet.datasets import CocoPanopticDataset

    root = tmp_path_factory.mktemp("recipes")
    rng = np.random.default_rng(0)
    height, width = SIZE
    boxes = [(12, 20, 40, 44), (70, 30, 50, 60)]
    # Of all classes, since an untrained detector predicts any of them.
    meta = CocoPanopticDataset.METAINFO
    categories = [
        dict(id=i, name=name, isthing=int(name in meta["thing_classes"]))
        for i, name in enumerate(meta["classes"], 1)
    ]
    coco = root / "data" / "coco"
    for split, count in (("train", 2), ("val", 1)):
        images, instances, panoptic = [], [], []
        for index in range(count):
            picture = rng.integers(0, 120, (*SIZE, 3), dtype=np.uint8)
            labels = np.zeros(SIZE, dtype=np.uint8)
            for label, (x, y, w, h) in enumerate(boxes, 1):
                picture[y : y + h, x : x + w] += 60 * label
                labels[y : y + h, x : x + w] = label
            name = f"{index:012d}"
            segments = [(1, 1), (2, 3), (3, 119)]
            ids = np.zeros((*SIZE, 3), dtype=np.uint8)
            ids[..., 0] = np.where(labels == 0, 3, labels)
            ade = root / "data" / "ade" / "ADEChallengeData2016"
            ade_split = {"train": "training", "val": "validation"}[split]
            city = root / "data" / "cityscapes"
            for path, pixels in (
                (coco / f"{split}2017" / f"{name}.jpg", picture),
                (coco / "annotations" / f"panoptic_{split}2017" / f"{name}.png", ids),
                (ade / "images" / ade_split / f"{name}.jpg", picture),
                (ade / "annotations" / ade_split / f"{name}.png", labels + 1),
                (city / "leftImg8bit" / split / f"{name}_leftImg8bit.png", picture),
                (city / "gtFine" / split / f"{name}_gtFine_labelTrainIds.png", labels),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
            images.append(dict(id=index, file_name=f"{name}.jpg", height=height, width=width))
            for (x, y, w, h), category in zip(boxes, (1, 3), strict=True):
                instances.append(
                    dict(
                        id=len(instances) + 1,
                        image_id=index,
                        category_id=category,
                        bbox=[x, y, w, h],
                        segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                        area=w * h,
                        iscrowd=0,
                    )
                )
            info = [
                dict(
                    id=segment,
                    category_id=category,
                    bbox=[*boxes[segment - 1]] if segment < 3 else [0, 0, width, height],
                    area=int((ids[..., 0] == segment).sum()),
                    iscrowd=0,
                )
                for segment, category in segments
            ]
            panoptic.append(dict(image_id=index, file_name=f"{name}.png", segments_info=info))
        for kind, annotated in (("instances", instances), ("panoptic", panoptic)):
            content = dict(images=images, annotations=annotated, categories=categories)
            (coco / "annotations" / f"{kind}_{split}2017.json").write_text(json.dumps(content))
    (root / "checkpoints").mkdir()
    for depth in (50, 101):
        state = DDFResNet(depth).state_dict()
        state = {f"backbone.{name}": value for name, value in state.items()}
        torch.save({"state_dict": state}, root / f"checkpoints/ddf-mul-resnet{depth}_in1k.pth")
    return root


@pytest.fixture
def _panopticapi(monkeypatch):
    """Replaces panopticapi, of which mmdet's loader needs one function, if it is not installed."""
    if not HAS_PANOPTICAPI:
        package, utils = ModuleType("panopticapi"), ModuleType("panopticapi.utils")
        utils.rgb2id = lambda color: (color.astype(int) * [1, 256, 256**2]).sum(-1)
        package.utils = utils
        monkeypatch.setitem(sys.modules, "panopticapi", package)
        monkeypatch.setitem(sys.modules, "panopticapi.utils", utils)


def shrink(cfg: Config) -> Config:
    """Two iterations of training and one of testing, on images of the datasets' sizes."""
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.update(batch_size=1, num_workers=0)
        for transform in loader.dataset.pipeline:
            if transform.type in ("Resize", "RandomResize"):
                transform.scale = SIZE[::-1]
            if transform.type == "RandomCrop":
                transform.crop_size = SIZE
    if "size" in cfg.model.data_preprocessor:
        cfg.model.data_preprocessor.size = SIZE
    if cfg.train_cfg.type == "IterBasedTrainLoop":
        cfg.train_cfg.max_iters = 2
    else:
        cfg.train_cfg.max_epochs = 1
    cfg.train_dataloader.sampler.shuffle = False
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    # After two iterations scores are low.
    test_cfg = cfg.model.test_cfg
    test_cfg.get("rcnn", test_cfg).score_thr = 0.0
    if "rpn" in test_cfg:  # thousands of proposals are slow
        cfg.model.train_cfg.rpn_proposal.max_per_img = test_cfg.rpn.max_per_img = 50
        test_cfg.rcnn.max_per_img = 10
    if cfg.test_evaluator.type == "CocoPanopticMetric" and not HAS_PANOPTICAPI:
        cfg.test_evaluator = dict(type="DumpResults", out_file_path="panoptic.pkl")
    cfg.default_hooks.checkpoint.interval = -1
    cfg.log_level = "WARNING"
    # The weights of the stock ResNet-50 would be downloaded.
    if "pretrained" in cfg.model:
        cfg.model.pretrained = None
    if cfg.model.backbone.type == "ResNet":
        cfg.model.backbone.init_cfg = None
    set_dataloader_defaults(cfg)
    adapt_to_device(cfg)
    return cfg


def runner_of(recipe: str, work_dir: Path) -> Runner:
    depth, ddf_neck = RECIPES[recipe]
    cfg = shrink(Config.fromfile(CONFIGS / recipe))
    cfg.work_dir = str(work_dir)
    runner = Runner.from_cfg(cfg)
    backbone = runner.model.backbone
    assert isinstance(backbone, DDFResNet) == (depth is not None)
    assert isinstance(runner.model.neck, DDFUpFPN) == ddf_neck
    assert any(isinstance(m, DDFPack) for m in backbone.modules()) == (depth is not None)
    return runner


# Each detector and dataset, each backbone and neck: the other recipes combine these.
TRAINED = [
    "detection/faster-rcnn_ddf-mul-r50_fpn_1x_coco.py",
    "detection/mask-rcnn_ddf-mul-r50_ddfup-fpn_1x_coco.py",
    "detection/panoptic-fpn_r50_ddfup-fpn_1x_coco.py",
    "detection/retinanet_ddf-mul-r101_fpn_1x_coco.py",
    "segmentation/fpn_ddf-mul-r50_ddfup-fpn_4xb2-80k_cityscapes-512x1024.py",
    "segmentation/fpn_r50_ddfup-fpn_4xb4-160k_ade20k-512x512.py",
]


@pytest.mark.usefixtures("_panopticapi")
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe not in TRAINED])
def test_builds(recipe, data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    runner = runner_of(recipe, tmp_path)
    batch = next(iter(runner.build_dataloader(runner.cfg.train_dataloader)))
    assert len(batch["inputs"]) == 1


@pytest.mark.usefixtures("_panopticapi")
@pytest.mark.parametrize("recipe", TRAINED)
def test_trains_and_tests(recipe, data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    runner = runner_of(recipe, tmp_path)
    depth, ddf_neck = RECIPES[recipe]
    start = {}

    def record_start(*_):
        if not start:
            start.update(copy.deepcopy(runner.model.state_dict()))

    runner.model.backbone.register_forward_pre_hook(record_start)
    runner.train()
    assert runner.iter == 2
    end = runner.model.state_dict()
    assert all(value.isfinite().all() for value in end.values())
    if depth is not None:
        path = f"checkpoints/ddf-mul-resnet{depth}_in1k.pth"
        for name, value in torch.load(path)["state_dict"].items():
            assert torch.equal(start[name], value), name
    if ddf_neck:
        # For each upsampler; some updates with the first learning rates are below rounding.
        moved = [name for name, value in end.items() if not torch.equal(value, start[name])]
        for i in range(len(runner.model.neck.upsample_modules)):
            assert any(name.startswith(f"neck.upsample_modules.{i}.") for name in moved)
    metrics = runner.test()
    if runner.cfg.test_evaluator.type != "DumpResults":
        assert any(name.endswith(("bbox_mAP", "PQ", "mIoU")) for name in metrics)


@pytest.mark.parametrize("recipe", [next(iter(RECIPES)), next(reversed(RECIPES))])
def test_inherited_through_the_package(recipe, data, tmp_path, monkeypatch):
    path = tmp_path / "inherited.py"
    path.write_text(f'_base_ = "ddf_mm::{recipe}"\nmodel = dict(backbone=dict(norm_eval=True))\n')
    monkeypatch.chdir(data)
    cfg = shrink(Config.fromfile(path))
    cfg.work_dir = str(tmp_path)
    runner = Runner.from_cfg(cfg)
    assert isinstance(runner.model.backbone, DDFResNet)
    batch = next(iter(runner.build_dataloader(cfg.train_dataloader)))
    assert len(batch["inputs"]) == 1
