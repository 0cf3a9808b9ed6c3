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
