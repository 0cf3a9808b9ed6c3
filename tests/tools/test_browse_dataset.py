"""tools/browse_dataset.py."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmpretrain")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(ROOT / "tools" / "browse_dataset.py")
DIGITS = ROOT / "configs" / "classification" / "ddf-mul-resnet26_digits.py"


def browse(monkeypatch, *arguments: object) -> dict:
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
    return runpy.run_path(TOOL, run_name="__main__")


def test_draws_each_step(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "digits.png"
    tool = browse(monkeypatch, DIGITS, "--out", out, "--num", "2", "--first", "5")
    assert capsys.readouterr().out.splitlines()[-1] == f"pictures: {out}"
    with Image.open(out) as picture:
        assert picture.size == (800, 440)  # four pictures in each of two rows
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100

    from ddf_mm.datasets import DigitsDataset

    steps = [
        dict(type="mmpretrain.Resize", scale=24),
        dict(type="mmpretrain.RandomFlip", prob=1.0),
        dict(type="mmpretrain.PackInputs"),
    ]
    dataset = DigitsDataset(pipeline=steps)
    names, pictures = zip(*tool["pictures_of"](dataset, 5), strict=True)
    assert names == ("original", "Resize", "RandomFlip")
    assert [picture.shape for picture in pictures] == [(8, 8, 3), (24, 24, 3), (24, 24, 3)]
    np.testing.assert_array_equal(pictures[0], dataset.get_data_info(5)["img"])
    np.testing.assert_array_equal(pictures[2], pictures[1][:, ::-1])


WRAPPERS = dict(
    concatenated="dict(type='ConcatDataset', datasets=[digits, digits])",
    repeated="dict(type='RepeatDataset', times=3, dataset=digits)",
    balanced="dict(type='ClassBalancedDataset', oversample_thr=0.5, dataset=digits)",
    fold="dict(type='KFoldDataset', fold=1, num_splits=3, test_mode=True, dataset=digits)",
    nested="dict(type='ConcatDataset', datasets=[dict(type='RepeatDataset', times=2, "
    "dataset=digits), digits])",
)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_datasets_in_containers(tmp_path, monkeypatch, wrapper):
    config = tmp_path / "config.py"
    config.write_text(
        f"_base_ = {str(DIGITS)!r}\ndigits = _base_.train_dataloader.dataset\n"
        f"wrapper = {WRAPPERS[wrapper]}\n"
        "train_dataloader = dict(dataset=dict(_delete_=True, **wrapper))\n"
    )
    first = 470 if wrapper == "fold" else 1434
    tool = browse(monkeypatch, config, "--out", tmp_path / "a.png", "--num", "3", "--first", first)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (800, 660)

    from mmengine.config import Config
    from mmengine.registry import DATASETS, init_default_scope

    init_default_scope("mmpretrain")
    dataset = DATASETS.build(Config.fromfile(config).train_dataloader.dataset)
    for index in (0, len(dataset) // 2, len(dataset) - 1):
        leaf, inner = tool["original"](dataset, index)
        ours, theirs = leaf.get_data_info(inner), dataset.get_data_info(index)
        np.testing.assert_array_equal(ours["img"], theirs["img"])
        assert ours["gt_label"] == theirs["gt_label"]


@pytest.mark.parametrize("mode, mean", [("L", [0.0]), ("RGBA", [0.0] * 4)])
def test_images_of_other_channels(tmp_path, monkeypatch, mode, mean):
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 4), np.uint8)
        Image.fromarray(pixels, "RGBA").convert(mode).save(tmp_path / "data" / label / "1.png")
    config = tmp_path / "config.py"
    config.write_text(f"""
default_scope = "mmpretrain"
model = dict(type="ImageClassifier", data_preprocessor=dict(mean={mean}, std={mean}))
pipeline = [dict(type="LoadImageFromFile", color_type="unchanged"), dict(type="PackInputs")]
dataset = dict(type="CustomDataset", with_label=False, data_root="{tmp_path / "data"}",
               pipeline=pipeline)
train_dataloader = dict(dataset=dataset)
""")
    browse(monkeypatch, config, "--out", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (200, 440)
        colors = np.asarray(picture.convert("RGB")).astype(int)
    assert ((colors.max(2) - colors.min(2)).max() > 100) == (mode == "RGBA")


@pytest.mark.parametrize(
    "config, options, message",
    [
        (DIGITS, ["--num", "0"], "--num must be at least 1, got 0"),
        (DIGITS, ["--first", "1437"], "--first 1437 is beyond the 1437 images"),
        (
            ROOT / "configs" / "upsampling" / "ddf-up-net_x4_digit-scenes.py",
            [],
            "must have the default_scope 'mmpretrain', got 'mmengine'",
        ),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, config, options, message):
    with pytest.raises(SystemExit) as error:
        browse(monkeypatch, config, "--out", tmp_path / "no.png", *options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
