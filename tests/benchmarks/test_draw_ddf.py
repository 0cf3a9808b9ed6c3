"""benchmarks/draw_ddf.py: the picture of the operation shows the values of the layer."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")

import draw_ddf

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "ddf.png"


def draw(monkeypatch, out: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["draw_ddf.py", "--out", str(out)])
    draw_ddf.main()


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(float)


def test_numbers_in_the_picture_fit_together():
    data = draw_ddf.compute()
    (row, column), c = draw_ddf.PIXEL, draw_ddf.CHANNEL
    window = data["x"][c, row - 1 : row + 2, column - 1 : column + 2]
    combined = data["spatial"][:, :, row, column] * data["channel"][c]
    assert window.std() > 0.1
    np.testing.assert_allclose((combined * window).sum(), data["output"][c, row, column], rtol=1e-5)


def test_drawing_is_reproducible(monkeypatch, tmp_path):
    outs = [tmp_path / "first" / "ddf.png", tmp_path / "second.png"]
    for out in outs:
        torch.rand(7)  # changes the global random state
        draw(monkeypatch, out)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert pixels(outs[0]).std() > 30


def test_committed_picture_is_the_drawn_one(monkeypatch, tmp_path):
    drawn = tmp_path / "ddf.png"
    draw(monkeypatch, drawn)
    assert os.path.getsize(COMMITTED) < 300_000
    a, b = pixels(COMMITTED), pixels(drawn)
    assert a.shape == b.shape
    # Other versions of matplotlib may render edges and text slightly differently.
    assert (np.abs(a - b).max(axis=2) > 32).mean() < 0.02
