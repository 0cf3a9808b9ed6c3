"""Registry lookups and imports in fresh processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("mmcv")
TOOLBOXES = ("mmpretrain", "mmdet", "mmseg")


def run(code: str, *options: str) -> str:
    """Runs Python code in a fresh process and returns what it printed."""
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_scoped_name_needs_no_custom_imports(toolbox):
    pytest.importorskip(f"{toolbox}.registry")
    out = run(f"""
        from {toolbox}.registry import MODELS
        from {toolbox}.utils import register_all_modules
        register_all_modules(init_default_scope=True)
        model = MODELS.build(dict(type="ddf_mm.DDFResNet", depth=26, base_channels=8))
        layer = MODELS.build(dict(type="ddf_mm.DDFUp", in_channels=8))
        from mmcv.cnn import build_conv_layer
        conv = build_conv_layer(dict(type="ddf_mm.DDF"), 8, 8, 3, padding=1)
        print(type(model).__module__, type(layer).__name__, type(conv).__name__)
    """)
    assert out.splitlines()[-1] == "ddf_mm.models.ddf_resnet DDFUpPack DDFConv2d"


def test_every_name_in_the_own_scope():
    """Dicts read through ``ddf_mm::`` have ``_scope_='ddf_mm'``. Nothing of ddf_mm is imported
    before a name is looked up."""
    out = run("""
        import os
        import mmcv.cnn
        from mmengine.registry import MODELS
        for name in ("DDFUp", "ddf_mm.DDFUp", "ddf_mm.layers.DDFUpPack",
                     "ddf_mm.layers.pack.DDFUpPack"):
            if os.fork() == 0:
                print(type(MODELS.build(dict(type=name, _scope_="ddf_mm", in_channels=8))).__name__)
                break
            assert os.wait()[1] == 0, name
    """)
    assert out.splitlines() == ["DDFUpPack"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("toolbox", TOOLBOXES)
def test_plain_name_after_custom_imports(toolbox):
    pytest.importorskip(f"{toolbox}.registry")
    out = run(f"""
        from mmengine.config import Config
        from mmengine.registry import init_default_scope
        cfg = Config(dict(
            custom_imports=dict(imports=["ddf_mm.models"], allow_failed_imports=False),
            model=dict(type="DDFResNet", depth=26, base_channels=8)))
        cfg._merge_a_into_b({{}}, cfg)
        from mmengine.utils import import_modules_from_strings
        import_modules_from_strings(**cfg.custom_imports)
        init_default_scope("{toolbox}")
        from {toolbox}.registry import MODELS
        print(type(MODELS.build(cfg.model)).__name__)
    """)
    assert out.splitlines()[-1] == "DDFResNet"


def test_root_registry_finds_scoped_and_layer_names():
    out = run("""
        from mmengine.registry import MODELS
        print(MODELS.get("ddf_mm.DDFResNet").__name__, MODELS.get("DDF").__name__)
    """)
    assert out == "DDFResNet DDFConv2d"


def test_scope_ddf_mm_builds_from_every_root_registry_without_warnings():
    """Dicts of a config read through `ddf_mm::` have `_scope_='ddf_mm'`."""
    out = run("""
        import logging
        import mmengine.registry as root
        from mmengine.registry import Registry, init_default_scope
        from mmengine.logging import MMLogger
        import ddf_mm.registry as ours
        for name, registry in vars(root).items():
            if isinstance(registry, Registry):
                child = getattr(ours, name)
                assert child.parent is registry and child.scope == "ddf_mm", name
        init_default_scope("ddf_mm")
        hook = root.HOOKS.build(dict(type="IterTimerHook", _scope_="ddf_mm"))
        print(type(hook).__name__)
    """)
    assert out == "IterTimerHook"


def test_import_is_light_quiet_and_idempotent():
    out = run(
        """
        import importlib, sys
        import ddf_mm
        heavy = [m for m in ("mmpretrain", "mmdet", "mmseg", "mmcv", "cv2") if m in sys.modules]
        assert not heavy, heavy
        import ddf_mm.registry, ddf_mm.models
        for _ in range(2):
            importlib.reload(ddf_mm.registry)
            importlib.reload(ddf_mm)
        heavy = [m for m in ("mmpretrain", "mmdet", "mmseg") if m in sys.modules]
        assert not heavy, heavy
        print(ddf_mm.__version__)
        """,
        "-W",
        "error:::ddf_mm",
    )
    assert out.count(".") == 2 and "\n" not in out


def test_import_of_the_package_alone_warns_of_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import ddf_mm"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr


def test_models_run_with_the_toolboxes_blocked():
    out = run("""
        import sys
        for name in ("mmpretrain", "mmdet", "mmseg"):
            sys.modules[name] = None
        import torch
        from ddf_mm.models import DDFResNet
        print(tuple(DDFResNet(26, base_channels=8)(torch.randn(2, 3, 33, 32))[0].shape))
    """)
    assert out == "(2, 256, 2, 1)"


def test_ops_need_torch_only():
    out = run("""
        import sys
        for name in ("mmengine", "mmcv", "mmpretrain", "mmdet", "mmseg", "cv2"):
            sys.modules[name] = None
        import torch
        from ddf_mm.ops import ddf
        print(tuple(ddf(torch.randn(1, 4, 5, 5), None, torch.randn(1, 9, 5, 5)).shape))
    """)
    assert out == "(1, 4, 5, 5)"
