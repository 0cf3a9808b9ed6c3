"""The inferencers of the toolboxes: the code of docs/inference.md runs as written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hub import get_model
from PIL import Image

import ddf_mm  # noqa: F401  (mmengine finds `ddf_mm::` and `mmseg::` from then on)

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
CLASSIFIER, BY_NAME, DETECTOR, SEGMENTOR = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CLASSES = tuple("0123456789")
DIGITS, SCENES = 4, 3


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images that the page names, with random pixels."""
    folder = tmp_path_factory.mktemp("inference")
    random = np.random.default_rng(0)
    for name, number, size, suffix in [
        ("digits", DIGITS, 8, "png"),
        ("scenes", SCENES, 128, "jpg"),
    ]:
        (folder / name).mkdir()
        for index in range(number):
            pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.{suffix}")
    (folder / "checkpoints").mkdir()
    return folder


def run(code: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Runs a block of the page; returns what each call of its inferencer returned."""
    monkeypatch.chdir(work)
    calls = re.findall(r"^results = .*$", code, re.MULTILINE)
    scope: dict = {}
    returned = []
    # The same code, keeping each of the results.
    scope["keep"] = returned.append
    exec(re.sub(r"^(results = .*)$", r"\1\nkeep(results)", code, flags=re.MULTILINE), scope)
    assert len(returned) == len(calls)
    return returned


def save_checkpoint(recipe: str, path: Path, classes: tuple[str, ...]) -> None:
    """A checkpoint of the recipe with random weights, in the format of tools/publish_model.py."""
    torch.manual_seed(0)
    model = get_model(f"ddf_mm::{recipe}")
    model.init_weights()
    palette = [(20 * index, 255 - 20 * index, 90) for index in range(len(classes))]
    meta = dict(dataset_meta=dict(classes=classes, palette=palette))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), path)


def test_classification(work, monkeypatch):
    pytest.importorskip("mmpretrain")
    checkpoint = work / "checkpoints" / "digits.pth"
    save_checkpoint("classification/ddf-mul-resnet26_digits.py", checkpoint, CLASSES)
    file, folder, array, shown = run(CLASSIFIER, work, monkeypatch)
    assert len(file) == len(array) == 1 and len(folder) == len(shown) == DIGITS
    scores = [result["pred_scores"] for result in (*file, *array, *folder)]
    assert scores[0].shape == (10,)
    assert len({tuple(score.round(4)) for score in scores}) == DIGITS
    np.testing.assert_array_equal(scores[0], scores[1])
    assert file[0]["pred_class"] in CLASSES
    assert len(list((work / "shown").glob("*.png"))) == DIGITS


def test_classification_by_name(work, monkeypatch):
    pytest.importorskip("mmpretrain")
    checkpoint = work / "checkpoints" / "digits.pth"
    save_checkpoint("classification/ddf-mul-resnet26_digits.py", checkpoint, CLASSES)
    monkeypatch.chdir(work)
    scope: dict = {}
    exec(BY_NAME, scope)
    weights = torch.load(checkpoint)["state_dict"]
    torch.testing.assert_close(dict(scope["model"].state_dict()), dict(weights))


def test_detection(work, monkeypatch):
    pytest.importorskip("mmdet")
    pytest.importorskip("mmcv._ext")
    recipe = "detection/mask-rcnn_ddf-mul-r26_ddfup-fpn_digit-scenes.py"
    save_checkpoint(recipe, work / "checkpoints" / "detector.pth", CLASSES)
    file, folder, array, _ = run(DETECTOR, work, monkeypatch)
    assert [len(result["predictions"]) for result in (file, folder, array)] == [1, SCENES, 1]
    (from_file,), (from_array,) = file["predictions"], array["predictions"]
    assert from_file["scores"] and len(from_file["bboxes"]) == len(from_file["scores"])
    assert from_file["bboxes"] == from_array["bboxes"]
    assert len(list((work / "detected" / "vis").iterdir())) == SCENES
    assert len(list((work / "detected" / "preds").glob("*.json"))) == SCENES


def test_segmentation(work, monkeypatch):
    pytest.importorskip("mmseg")
    recipe = "segmentation/fpn_ddf-mul-r26_ddfup-fpn_digit-scenes.py"
    save_checkpoint(recipe, work / "checkpoints" / "segmentor.pth", ("background", *CLASSES))
    file, folder, array, _ = run(SEGMENTOR, work, monkeypatch)
    assert file["predictions"].shape == (128, 128)
    assert set(np.unique(file["predictions"])) <= set(range(11))
    np.testing.assert_array_equal(file["predictions"], array["predictions"])
    assert len(folder["predictions"]) == SCENES
    for name in ("vis", "pred"):
        assert len(list((work / "segmented" / name).glob("*"))) == SCENES
