"""The digit scenes: files, reproducibility, and reading by the toolboxes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pycocotools")
pytest.importorskip("sklearn")

from pycocotools import mask as rle
from pycocotools.coco import COCO
from sklearn.datasets import load_digits, load_sample_images

from ddf_mm.datasets.digit_scenes import CLASSES, DigitScenes, write_digit_scenes

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "make_digit_scenes.py"
SIZE = 64
COUNTS = dict(train=4, val=3)


def make(out: Path, seed: int = 0, **changes: int) -> Path:
    counts = dict(COUNTS, **changes)
    write_digit_scenes(out, counts["train"], counts["val"], size=SIZE, seed=seed)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("scenes") / "data")


def test_same_arguments_write_the_same_bytes(data, tmp_path):
    first = contents(data)
    assert len(first) == 4 * sum(COUNTS.values()) + 4
    assert contents(make(tmp_path / "again")) == first
    other = contents(make(tmp_path / "other", seed=1))
    assert all(other[name] != content for name, content in first.items())


def test_a_scene_does_not_depend_on_how_many_there_are(data, tmp_path):
    more, first = contents(make(tmp_path / "more", train=6)), contents(data)
    assert {name: more[name] for name in first if name.endswith((".png", ".jpg"))} == {
        name: content for name, content in first.items() if name.endswith((".png", ".jpg"))
    }


def test_splits_share_no_digits():
    used = {}
    for split in ("train", "val"):
        scenes = DigitScenes(split, SIZE)
        used[split] = {int(digit) for i in range(60) for digit in scenes[i].digits}
        assert set(scenes._digits) >= used[split]
    assert used["train"] and used["val"]
    assert not set(DigitScenes("train")._digits) & set(DigitScenes("val")._digits)
    assert len(DigitScenes("train")._digits) + len(DigitScenes("val")._digits) == 1797


def test_splits_share_no_pixels_of_photographs():
    originals = load_sample_images().images
    parts = {split: DigitScenes(split)._photographs for split in ("train", "val")}
    for original, train, val in zip(originals, parts["train"], parts["val"], strict=True):
        joined = np.concatenate([np.asarray(train), np.asarray(val)], axis=1)
        np.testing.assert_array_equal(joined, original)


def test_scene():
    scenes = DigitScenes("train", SIZE, seed=3)
    targets = load_digits().target
    for i in range(20):
        scene = scenes[i]
        number = len(scene.labels)
        assert 1 <= number <= 4
        assert scene.image.shape == (SIZE, SIZE, 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (number, SIZE, SIZE) and scene.masks.any(axis=(1, 2)).all()
        # Visible parts: no pixel belongs to two digits.
        assert scene.masks.sum(axis=0).max() == 1
        assert scene.labels.tolist() == targets[scene.digits].tolist()
        # Each digit is nearer than the previous ones, all are nearer than the background.
        depth = [scene.depth[mask].mean() for mask in scene.masks]
        assert max(depth) < scene.depth[~scene.masks.any(axis=0)].min()


def test_annotations_agree_with_each_other(data):
    for split, count in COUNTS.items():
        coco = COCO(data / "annotations" / f"instances_{split}.json")
        panoptic = json.loads((data / "annotations" / f"panoptic_{split}.json").read_text())
        assert len(coco.imgs) == len(panoptic["annotations"]) == count
        assert [category["name"] for category in coco.cats.values()] == list(CLASSES)
        for image, segments in zip(coco.imgs.values(), panoptic["annotations"], strict=True):
            name = Path(image["file_name"]).stem
            semantic = np.asarray(Image.open(data / "semantic" / split / f"{name}.png"))
            identifiers = np.asarray(Image.open(data / "panoptic" / split / f"{name}.png"))
            assert semantic.shape == identifiers.shape[:2] == (image["height"], image["width"])
            assert not identifiers[:, :, 1:].any()
            expected = np.zeros_like(semantic)
            for annotation in coco.imgToAnns[image["id"]]:
                mask = coco.annToMask(annotation).astype(bool)
                expected[mask] = annotation["category_id"]
                assert annotation["area"] == mask.sum()
                assert annotation["bbox"] == rle.toBbox(annotation["segmentation"]).tolist()
            np.testing.assert_array_equal(semantic, expected)

            infos = segments["segments_info"]
            assert sum(info["area"] for info in infos) == semantic.size
            for info in infos:
                segment = semantic[identifiers[:, :, 0] == info["id"]]
                category = info["category_id"]
                assert segment.size == info["area"]
                assert set(segment.tolist()) == {0 if category == len(CLASSES) + 1 else category}


def test_mmdet_and_mmseg_read_it(data):
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    from mmengine.registry import DATASETS, init_default_scope

    init_default_scope("mmdet")
    load = [dict(type="LoadImageFromFile")]
    annotations = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
    coco = DATASETS.build(
        dict(
            type="CocoDataset",
            data_root=str(data),
            ann_file="annotations/instances_val.json",
            data_prefix=dict(img="images/val/"),
            metainfo=dict(classes=CLASSES),
            pipeline=[*load, annotations, dict(type="PackDetInputs", meta_keys=())],
        )
    )
    panoptic = DATASETS.build(
        dict(
            type="CocoPanopticDataset",
            data_root=str(data),
            ann_file="annotations/panoptic_val.json",
            data_prefix=dict(img="images/val/", seg="panoptic/val/"),
            metainfo=dict(
                classes=(*CLASSES, "background"),
                thing_classes=CLASSES,
                stuff_classes=("background",),
            ),
            # Reading their pixels needs panopticapi, which mmdet does not install.
            pipeline=[],
        )
    )
    init_default_scope("mmseg")
    semantic = DATASETS.build(
        dict(
            type="BaseSegDataset",
            data_root=str(data),
            data_prefix=dict(img_path="images/val", seg_map_path="semantic/val"),
            metainfo=dict(classes=("background", *CLASSES)),
            pipeline=[
                *load,
                dict(type="LoadAnnotations"),
                dict(type="PackSegInputs", meta_keys=()),
            ],
        )
    )
    assert len(coco) == len(panoptic) == len(semantic) == COUNTS["val"]
    for index in range(COUNTS["val"]):
        labels = semantic[index]["data_samples"].gt_sem_seg.data[0]
        instances = coco[index]["data_samples"].gt_instances
        seen = labels.new_zeros(labels.shape)
        for mask, label in zip(instances.masks.masks, instances.labels, strict=True):
            seen[mask.astype(bool)] = label + 1
        assert (seen == labels).all()
        info = panoptic.get_data_info(index)
        assert Path(info["seg_map_path"]).is_file()
        things = [segment["category"] for segment in info["segments_info"] if segment["is_thing"]]
        assert things == instances.labels.tolist()
        assert info["segments_info"][-1]["category"] == len(CLASSES)


def run_tool(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_tool(data, tmp_path):
    options = ["--num-train", COUNTS["train"], "--num-val", COUNTS["val"], "--size", SIZE]
    result = run_tool(tmp_path / "new" / "data", *options)
    assert result.returncode == 0, result.stderr
    assert "Digit scenes" in result.stderr and "100%" in result.stderr
    assert contents(tmp_path / "new" / "data") == contents(data)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_train=0), "num_train must be at least 1, got 0"),
        (dict(num_val=-1), "num_val must be at least 1, got -1"),
        (dict(size=31), "size must be 32 to 2048 pixels, got 31"),
        (dict(size=2049), "size must be 32 to 2048 pixels, got 2049"),
        (dict(seed=-1), "seed must not be negative, got -1"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_digit_scenes(tmp_path / "data", **dict(dict(num_train=1, num_val=1), **arguments))
    assert not list(tmp_path.iterdir())


def test_unknown_split():
    with pytest.raises(ValueError, match="split must be one of train, val, got 'test'"):
        DigitScenes("test")


def test_tool_does_not_touch_what_is_there(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").touch()
    result = run_tool(tmp_path / "data", "--num-train", 1, "--num-val", 1)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("make_digit_scenes.py: error: ") and "exists already" in last
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "mine"]


def test_nothing_is_left_of_a_run_that_fails(tmp_path, monkeypatch):
    draw = DigitScenes.__getitem__

    def fail_at_two(self, index):
        if index == 2:
            raise KeyboardInterrupt
        return draw(self, index)

    monkeypatch.setattr(DigitScenes, "__getitem__", fail_at_two)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "data")
    assert not list(tmp_path.iterdir())
