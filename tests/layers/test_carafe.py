"""CARAFE in the place of mmcv's layer; its numbers are in test_family.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

# Makes the import of mmcv's compiled ops fail, as where they were not compiled.
WITHOUT_COMPILED_OPS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "mmcv._ext":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
"""


def run(code: str) -> list[str]:
    """The words that a new process prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_fpn_carafe_of_mmdet_runs_and_loads_its_weights():
    """On a CPU, for which mmcv has no kernel; with the initialization and names of mmcv's layer."""
    pytest.importorskip("mmcv._ext")
    fpn_carafe = pytest.importorskip("mmdet.models.necks.fpn_carafe")
    from mmcv.ops.carafe import CARAFEPack
    from mmengine.registry import MODELS

    make = lambda: fpn_carafe.FPN_CARAFE([8, 16], 8, num_outs=3)  # noqa: E731
    mmcvs = make()
    try:
        import ddf_mm.layers.carafe as portable

        MODELS.register_module("carafe", force=True, module=portable.PortableCARAFEPack)
        neck = make()
    finally:
        MODELS.register_module("carafe", force=True, module=CARAFEPack)
    neck.init_weights()
    for pack in neck.upsample_modules:
        assert type(pack) is portable.PortableCARAFEPack
        assert 0 < pack.content_encoder.weight.std() < 0.002  # by mmcv's init_weights: 0.001
    neck.load_state_dict(mmcvs.state_dict())
    outs = neck([torch.randn(1, 8, 12, 16), torch.randn(1, 16, 6, 8)])
    assert [tuple(out.shape) for out in outs] == [(1, 8, 12, 16), (1, 8, 6, 8), (1, 8, 3, 4)]
    sum(out.square().mean() for out in outs).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in neck.parameters())


def test_it_takes_mmcvs_place_only_when_asked_for():
    pytest.importorskip("mmcv._ext")
    code = (
        "from mmcv.cnn import build_upsample_layer\n"
        "import mmcv.ops, ddf_mm.layers\n"
        "cfg = dict(type='carafe', channels=8, scale_factor=2)\n"
        "print(type(build_upsample_layer(cfg)).__name__)\n"
        "import ddf_mm.layers.carafe\n"
        "print(type(build_upsample_layer(cfg)).__name__)\n"
    )
    assert run(code)[-2:] == ["CARAFEPack", "PortableCARAFEPack"]


def test_it_needs_no_compiled_ops_of_mmcv():
    code = WITHOUT_COMPILED_OPS + (
        "import torch, ddf_mm.layers.carafe\n"
        "from mmcv.cnn import build_upsample_layer\n"
        "layer = build_upsample_layer(dict(type='carafe', channels=8, scale_factor=2))\n"
        "print(type(layer).__name__, *layer(torch.randn(1, 8, 5, 7)).shape)\n"
    )
    assert run(code)[-5:] == ["PortableCARAFEPack", "1", "8", "10", "14"]
