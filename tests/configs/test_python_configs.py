"""The pure Python recipes equal those of configs/, and the functions of the tools accept them."""

from __future__ import annotations

from pathlib import Path

import mmengine.registry
import pytest
from mmengine.config import Config
from mmengine.registry import Registry, init_default_scope

pytest.importorskip("mmpretrain")

from ddf_mm import analysis
from ddf_mm.utils import toolbox

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "ddf_mm" / "configs"
RECIPES = sorted(FOLDER.glob("[cd]*/[!_]*.py"))
REGISTRIES = [r for r in vars(mmengine.registry).values() if isinstance(r, Registry)]
# Looked up in mmcv.ops by name, not in a registry.
FUNCTIONS = ("nms", "RoIAlign")


def found(kind: str, scope: str) -> object:
    """The class that a config's `type` names."""
    if kind.rpartition(".")[2] in FUNCTIONS:
        return kind.rpartition(".")[2]
    for registry in REGISTRIES:
        with registry.switch_scope_and_registry(scope) as scoped:
            if (found := scoped.get(kind)) is not None:
                return found
    raise AssertionError(f"there is no {kind}")


def resolved(node: object, scope: str) -> object:
    if isinstance(node, dict):
        scope = node.get("_scope_", scope)
        return {
            key: found(value, scope) if key == "type" else resolved(value, scope)
            for key, value in node.items()
            if key != "_scope_"
        }
    if isinstance(node, (list, tuple)):
        return [resolved(item, scope) for item in node]
    return node


def test_there_are_recipes_of_classifiers_and_detectors():
    assert len([path for path in RECIPES if path.parent.name == "classification"]) == 6
    assert len([path for path in RECIPES if path.parent.name == "detection"]) == 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_is_the_recipe_of_names(path):
    scope = dict(classification="mmpretrain", detection="mmdet.models")[path.parent.name]
    pytest.importorskip(scope)
    (named,) = [
        other
        for other in (ROOT / "configs" / path.parent.name).glob("*.py")
        if other.stem.replace("-", "_") == path.stem
    ]
    ours, theirs = Config.fromfile(path), Config.fromfile(named)
    init_default_scope(theirs.default_scope)
    ours, theirs = (resolved(cfg.to_dict(), theirs.default_scope) for cfg in (ours, theirs))
    # Settings for names, variables of bases, and overrides of a replaced network's settings.
    for name in ("custom_imports", "dataset_type", "backend_args", "vis_backends", "ddf_resnet"):
        theirs.pop(name, None)
    for name in ("dcn", "stage_with_dcn"):
        theirs["model"]["backbone"].pop(name, None)
    ours = {name: value for name, value in ours.items() if name in theirs}
    assert ours == theirs


def test_is_importable_and_changes_like_any(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text("""
from mmengine.config import read_base
from ddf_mm.utils import toolbox
from torch.nn import BatchNorm2d

with read_base():
    from ddf_mm.configs.classification.ddf_add_resnet50_8xb128_in1k import *

model.backbone.update(in_channels=4, base_channels=8, stem_channels=8)
model.backbone.update(norm_cfg=dict(type=BatchNorm2d))
model.head.in_channels = 256
data_preprocessor.update(mean=[0.0] * 4, std=[1.0] * 4, to_rgb=False)
""")
    cfg = analysis.read_config(str(config), {"model.head.num_classes": 7})
    assert toolbox(cfg) == "mmpretrain"
    model = analysis.build_model(cfg)
    batch = analysis.example_batch(cfg, 2, (32, 32))
    assert batch["inputs"][0].shape == (4, 32, 32)
    inputs, samples = analysis.preprocessed(model, batch)
    assert model(inputs, samples, mode="tensor").shape == (2, 7)
    # Dumped configs have dotted names in place of classes.
    cfg.dump(tmp_path / "dumped.py")
    again = analysis.read_config(str(tmp_path / "dumped.py"))
    assert isinstance(again.model.type, str)
    assert toolbox(again) == "mmpretrain"
    assert analysis.build_model(again).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("init_cfg", ["one", "list"])
def test_weights_are_not_looked_for(init_cfg):
    """Whether `type` is the name or the class."""
    from mmengine.model import ConstantInit, PretrainedInit

    pretrained = dict(type=PretrainedInit, checkpoint="no.pth")
    named = dict(type="Pretrained", checkpoint="no.pth")
    constant = dict(type=ConstantInit, val=1, layer="Conv2d")
    for given in (pretrained, named):
        node = dict(init_cfg=given if init_cfg == "one" else [given, constant])
        analysis.without_weights(node)
        assert node["init_cfg"] == (None if init_cfg == "one" else [constant])
