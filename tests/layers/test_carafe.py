"""CARAFE on a CPU: the formula of the paper, and mmcv's layer around it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("mmcv._ext")


@pytest.fixture(scope="module")
def pack_class():
    """The class, with mmcv's own registration restored."""
    from mmcv.ops.carafe import CARAFEPack
    from mmengine.registry import MODELS

    from ddf_mm.layers.carafe import PortableCARAFEPack

    yield PortableCARAFEPack
    MODELS.register_module("carafe", force=True, module=CARAFEPack)


@pytest.mark.parametrize("kernel, groups, scale", [(5, 1, 2), (3, 2, 2), (3, 1, 3)])
def test_reassembly_is_the_papers_formula(pack_class, kernel, groups, scale):
    channels, height, width = 4, 5, 6
    pack = pack_class(channels, scale, up_kernel=kernel, up_group=groups).double()
    x = torch.randn(2, channels, height, width, dtype=torch.float64)
    mask = torch.randn(2, groups * kernel**2, scale * height, scale * width, dtype=torch.float64)
    out = pack.feature_reassemble(x, mask)
    assert out.shape == (2, channels, scale * height, scale * width)
    radius = kernel // 2
    padded = torch.nn.functional.pad(x, [radius] * 4)
    taps = mask.unflatten(1, (groups, kernel, kernel))
    for c in range(channels):
        weights = taps[:, c // (channels // groups)]
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                top, left = i // scale, j // scale
                window = padded[:, c, top : top + kernel, left : left + kernel]
                expected = (window * weights[:, :, :, i, j]).sum(dim=(1, 2))
                torch.testing.assert_close(out[:, c, i, j], expected)


def test_layer_trains_on_a_cpu(pack_class):
    pack = pack_class(8, 2)
    pack(torch.randn(1, 8, 5, 7)).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in pack.parameters())


def test_it_takes_mmcvs_place_only_when_asked_for():
    code = (
        "from mmcv.cnn import build_upsample_layer\n"
        "import mmcv.ops, ddf_mm.layers\n"
        "cfg = dict(type='carafe', channels=8, scale_factor=2)\n"
        "print(type(build_upsample_layer(cfg)).__name__)\n"
        "import ddf_mm.layers.carafe\n"
        "print(type(build_upsample_layer(cfg)).__name__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-2:] == ["CARAFEPack", "PortableCARAFEPack"]
