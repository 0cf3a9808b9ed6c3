"""DDFUpNet, and the data and metric of joint upsampling."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement, PixelData

from ddf_mm.datasets import GuidedUpsamplingDataset, LoadMap, PackGuidedUpsampling
from ddf_mm.models import DDFUpNet

ROOT = Path(__file__).resolve().parents[2]


def bilinear(maps: torch.Tensor, scale: int) -> torch.Tensor:
    return F.interpolate(maps, scale_factor=scale, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_starts_as_bilinear_upsampling(scale):
    net = MODELS.build(dict(type="DDFUpNet", scale_factor=scale, channels=4))
    net.init_weights()
    maps, guide = 7 * torch.randn(2, 1, 5, 3) + 90, 255 * torch.rand(2, 3, 5 * scale, 3 * scale)
    torch.testing.assert_close(net(maps, guide), bilinear(maps, scale), rtol=1e-5, atol=1e-4)


def trained(net: DDFUpNet) -> DDFUpNet:
    """The network with a nonzero head."""
    torch.nn.init.normal_(net.head.weight)
    return net


def test_the_guide_and_the_map_matter():
    net = trained(DDFUpNet(4, channels=4))
    maps, guide = torch.randn(1, 1, 4, 4), 255 * torch.rand(1, 3, 16, 16)
    first = net(maps, guide)
    assert not torch.allclose(first, net(maps, guide.flip(3)))
    assert not torch.allclose(first, net(maps.flip(3), guide))


def test_the_unit_of_the_map_does_not_matter():
    net = trained(DDFUpNet(2, channels=4))
    maps, guide = torch.randn(2, 1, 4, 4), 255 * torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(
        net(100 * maps + 30, guide), 100 * net(maps, guide) + 30, rtol=1e-4, atol=1e-2
    )


def test_a_constant_map_stays_finite():
    net = trained(DDFUpNet(2, channels=4))
    guide = 255 * torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(
        net(torch.full((1, 1, 4, 4), 5.0), guide), torch.full((1, 1, 8, 8), 5.0)
    )


def test_loss_and_prediction():
    net = trained(DDFUpNet(2, channels=16, loss="mse"))
    maps, guide = torch.randn(2, 1, 4, 4), 255 * torch.rand(2, 3, 8, 8)
    truth = torch.randn(2, 1, 8, 8)
    samples = [BaseDataElement(gt_map=PixelData(data=gt)) for gt in truth]
    upsampled = net(maps, guide)
    std = maps.std(dim=(1, 2, 3), keepdim=True)
    loss = net(maps, guide, samples, mode="loss")["loss"]
    torch.testing.assert_close(loss, ((upsampled - truth) / std).square().mean())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    predicted = net(maps, guide, samples, mode="predict")
    torch.testing.assert_close(torch.stack([s.pred_map.data for s in predicted]), upsampled)
    assert len(net(maps, guide, mode="predict")) == 2


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(scale_factor=3), ValueError, "scale_factor must be a power of two, got 3"),
        (dict(scale_factor=1), ValueError, "scale_factor"),
        (dict(scale_factor=2.0), TypeError, "scale_factor"),
        (dict(scale_factor=2, channels=0), ValueError, "channels"),
        (dict(scale_factor=2, loss="l3"), ValueError, "loss must be one of 'l1', .* got 'l3'"),
        (dict(scale_factor=2, guide_channels=1), ValueError, "guide_mean must hold a number for"),
        (dict(scale_factor="2"), TypeError, "scale_factor must be an int, got '2'"),
        (dict(scale_factor=2, guide_mean=1.0), TypeError, "guide_mean must be a list or tuple"),
        (dict(scale_factor=2, guide_std=("a",) * 3), TypeError, r"guide_std\[0\] must be a number"),
        (dict(scale_factor=2, loss=["l1"]), ValueError, r"loss must be one of .* got \['l1'\]"),
        (dict(scale_factor=2, upsample_cfg=3), TypeError, "upsample_cfg must be a dict.* got 3"),
        (dict(scale_factor=2, act_cfg="ReLU"), TypeError, "act_cfg must be a dict.* got 'ReLU'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        DDFUpNet(**arguments)


def test_bad_inputs():
    net = DDFUpNet(2, channels=4)
    maps, guide = torch.randn(1, 1, 4, 4), torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"inputs must be a Tensor\[B, M, H, W\] with M = 1"):
        net(maps[0], guide)
    with pytest.raises(ValueError, match=r"guide must be of shape \[1, 3, 8, 8\], 2 times .* got"):
        net(maps, guide[..., :7])
    with pytest.raises(TypeError, match="inputs must be a torch.Tensor, got list"):
        net([maps], guide)
    with pytest.raises(TypeError, match="guide must be a torch.Tensor, got NoneType"):
        net(maps, None)
    assert DDFUpNet(np.int64(2), channels=np.int64(4))(maps, guide).shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="data_samples with gt_map are needed"):
        net(maps, guide, mode="loss")
    with pytest.raises(ValueError, match="mode must be .* got 'train'"):
        net(maps, guide, mode="train")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Three images with a bright box, nearer than the background."""
    random = np.random.default_rng(0)
    for kind in ("images", "depth"):
        (tmp_path / kind).mkdir()
    for index in range(3):
        image = random.integers(0, 90, (16, 24, 3), dtype=np.uint8)
        depth = np.full((16, 24), 4000, dtype=np.uint16)
        top, left = random.integers(0, 8, 2)
        image[top : top + 8, left : left + 8] += 150
        depth[top : top + 8, left : left + 8] = 1000
        cv2.imwrite(str(tmp_path / "images" / f"{index}.png"), image)
        cv2.imwrite(str(tmp_path / "depth" / f"{index}.png"), depth)
    return tmp_path


def dataset(pairs: Path, **changes) -> GuidedUpsamplingDataset:
    prefix = dict(img_path="images", map_path="depth")
    arguments = dict(data_root=str(pairs), data_prefix=prefix, img_suffix=".png")
    return GuidedUpsamplingDataset(**dict(arguments, **changes))


def test_dataset_and_transforms(pairs):
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadMap", unit=0.001),
        dict(type="PackGuidedUpsampling", scale_factor=4),
    ]
    data = dataset(pairs, pipeline=pipeline)
    assert len(data) == 3
    item = data[1]
    bgr = cv2.imread(str(pairs / "images" / "1.png"))
    np.testing.assert_array_equal(item["guide"].permute(1, 2, 0), bgr[:, :, ::-1])
    gt_map = item["data_samples"].gt_map.data
    assert gt_map.shape == (1, 16, 24) and set(gt_map.unique().tolist()) == {1.0, 4.0}
    torch.testing.assert_close(item["inputs"], F.avg_pool2d(gt_map, 4))
    assert Path(item["data_samples"].img_path).name == "1.png"


def test_dataset_errors(pairs):
    with pytest.raises(FileNotFoundError, match="none' is not a folder"):
        dataset(pairs, data_prefix=dict(img_path="none", map_path="depth"))
    with pytest.raises(FileNotFoundError, match=r"images' holds no .jpg files"):
        dataset(pairs, img_suffix=".jpg")
    (pairs / "depth" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"depth' lacks 2.png, the map of 2.png"):
        dataset(pairs)


def test_transform_errors(pairs):
    with pytest.raises(ValueError, match=r"must be a map of one channel, got shape \(16, 24, 3\)"):
        LoadMap()(dict(map_path=str(pairs / "images" / "0.png")))
    with pytest.raises(ValueError, match="scale_factor must be at least 1, got 0"):
        PackGuidedUpsampling(0)
    with pytest.raises(ValueError, match="mode must be one of area, .* got 'cubic'"):
        PackGuidedUpsampling(2, mode="cubic")
    results = dict(img=np.zeros((6, 8, 3)), gt_map=np.zeros((6, 8)), img_path="a.png")
    with pytest.raises(ValueError, match=r"a.png: .* a multiple of scale_factor 4, got \(6, 8\)"):
        PackGuidedUpsampling(4)(results)


def test_datasets_do_without_mmpretrain():
    code = (
        "import sys\n"
        "sys.modules['mmpretrain'] = None\n"
        "from mmengine.registry import DATASETS, METRICS, TRANSFORMS\n"
        "print(DATASETS.get('ddf_mm.GuidedUpsamplingDataset').__name__,\n"
        "      TRANSFORMS.get('ddf_mm.LoadMap').__name__, METRICS.get('ddf_mm.RMSE').__name__)\n"
        "from ddf_mm.datasets import DigitsDataset\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split()[-3:] == ["GuidedUpsamplingDataset", "LoadMap", "RMSE"]
    assert result.stderr.strip().splitlines()[-1].startswith("ImportError: ddf_mm.datasets needs")


def tool(cwd: Path, name: str, *arguments: object) -> str:
    command = [sys.executable, ROOT / name, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_recipe_trains_tests_and_is_compared(pairs, tmp_path):
    """Three iterations on three images: the mechanics, not the accuracy."""
    config = ROOT / "configs" / "upsampling" / "ddf-up-net_x8_digit-scenes.py"
    options = ["--cfg-options", "train_cfg.max_epochs=1", "default_hooks.checkpoint.interval=1"]
    for split in ("train", "val", "test"):
        prefix = f"{split}_dataloader.dataset"
        options += [f"{prefix}.data_root={pairs}", f"{prefix}.img_suffix=.png"]
        options += [f"{prefix}.data_prefix.img_path=images", f"{prefix}.data_prefix.map_path=depth"]
    work = tmp_path / "work"
    tool(tmp_path, "tools/train.py", config, "--work-dir", work, *options)
    checkpoint = work / "epoch_1.pth"
    metrics = work / "metrics.json"
    out = ["--out", metrics, "--out-item", "metrics", "--work-dir", work]
    tool(tmp_path, "tools/test.py", config, checkpoint, *out, *options)
    measured = json.loads(metrics.read_text())["depth/rmse"]

    table, picture = work / "table.json", work / "picture.png"
    printed = tool(
        tmp_path,
        "benchmarks/evaluate_upsampling.py",
        config,
        checkpoint,
        "--json",
        table,
        "--out",
        picture,
        *options,
        f"work_dir={work}",
    )
    compared = json.loads(table.read_text())["metrics"]
    assert list(compared) == ["nearest", "bilinear", "bicubic", "DDFUpNet"]
    assert compared["DDFUpNet"]["depth/rmse"] == pytest.approx(measured, rel=1e-5)
    assert f"| DDFUpNet | {measured:.2f} |" in printed
    assert cv2.imread(str(picture)).max() == 255
