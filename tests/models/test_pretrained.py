"""Initialization keeps loaded weights, however a config writes ``PretrainedInit``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.model import PretrainedInit, Sequential
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS
from torch import nn

from ddf_mm.layers import DDFPack, DDFUpPack
from ddf_mm.models import DDFResNet, DDFUpFPN, DDFUpNet
from ddf_mm.registry import name_pretrained, resolve

NAMES = [
    "Pretrained",
    PretrainedInit,
    "mmengine.Pretrained",
    "mmengine.model.PretrainedInit",
    "mmengine.model.weight_init.PretrainedInit",
]
MODULES = {
    "DDFPack": lambda **cfg: DDFPack(4, **cfg),
    "DDFUpPack": lambda **cfg: DDFUpPack(4, **cfg),
    "DDFResNet": lambda **cfg: DDFResNet(26, base_channels=8, num_stages=2, **STAGES, **cfg),
    "DDFUpFPN": lambda **cfg: DDFUpFPN([4, 4], 4, 2, **cfg),
    "DDFUpNet": lambda **cfg: DDFUpNet(2, channels=4, **cfg),
}
STAGES = dict(out_indices=(1,), strides=(1, 2), dilations=(1, 1))


@pytest.fixture(params=MODULES)
def make(request: pytest.FixtureRequest):
    return MODULES[request.param]


def save(module: nn.Module, path: Path, prefix: str = "") -> dict:
    """A checkpoint with values that no initialization produces, and the config that loads it."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 5, 6)
    torch.save({prefix + name: value for name, value in module.state_dict().items()}, path)
    return dict(checkpoint=str(path), **(dict(prefix=prefix) if prefix else {}))


def assert_loaded(module: nn.Module) -> None:
    reset = [name for name, p in module.named_parameters() if not (p >= 5).all()]
    assert not reset


@pytest.mark.parametrize("form", ["dict", "list", "prefix", "before another"])
@pytest.mark.parametrize("name", NAMES, ids=str)
def test_a_module_that_loads_keeps_what_it_loaded(make, name, form, tmp_path):
    cfg = dict(type=name, **save(make(), tmp_path / "a.pth", "a." if form == "prefix" else ""))
    if form == "list":
        cfg = [cfg]
    elif form == "before another":
        cfg = [cfg, dict(type="Constant", layer=["Conv2d", "BatchNorm2d"], val=1, bias=1)]
    module = make(init_cfg=cfg)
    module.init_weights()
    assert_loaded(module)
    module.init_weights()  # as a Runner does again for an initialized model
    assert_loaded(module)


def test_initialization_again_changes_nothing(make):
    module = make()
    module.init_weights()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 5, 6)
    module.init_weights()
    assert_loaded(module)


@pytest.mark.parametrize("name", NAMES[:2], ids=str)  # those that mmengine's own modules know
def test_a_parent_that_loads(make, name, tmp_path):
    parent = Sequential(make())
    parent.init_cfg = dict(type=name, **save(parent, tmp_path / "parent.pth"))
    parent.init_weights()
    assert_loaded(parent)


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_a_child_that_loads(name, tmp_path):
    """A pack, a block and a stage of a network, the upsamplers of a neck and of DDFUpNet."""
    net, path = MODULES["DDFResNet"](), tmp_path / "part.pth"
    for part in (net.layer2[1].conv2, net.layer2[0], net.layer1):
        if part is net.layer1 and name not in NAMES[:2]:
            continue  # a Sequential of mmengine itself
        part.init_cfg = dict(type=name, **save(part, tmp_path / f"{id(part)}.pth"))
        for parameter in part.parameters():
            nn.init.zeros_(parameter)
    net.init_weights()
    assert_loaded(net.layer2[1].conv2)
    assert_loaded(net.layer2[0])
    if name in NAMES[:2]:
        assert_loaded(net.layer1)
    assert (net.layer2[1].norm3.weight == 0).all()  # not loaded, zero_init_residual

    cfg = dict(init_cfg=dict(type=name, **save(DDFUpPack(4), path)))
    neck = MODULES["DDFUpFPN"](upsample_cfg=cfg)
    cfg["init_cfg"].update(save(DDFUpPack(4, joint_channels=4), tmp_path / "guided.pth"))
    up_net = MODULES["DDFUpNet"](upsample_cfg=cfg)
    for module in (neck, up_net):
        module.init_weights()
        assert_loaded(module.upsample_modules)


def test_classifiers_detectors_and_segmentors_that_load(tmp_path):
    """``pretrained`` and ``init_cfg``, also as passed on to the backbone by mmseg."""
    pytest.importorskip("mmpretrain")
    backbone = dict(type="DDFResNet", depth=26, base_channels=8)
    head = dict(type="LinearClsHead", num_classes=2, in_channels=256)
    classifier = dict(
        type="mmpretrain.ImageClassifier",
        backbone=backbone,
        neck=dict(type="GlobalAveragePooling"),
        head=head,
        _scope_="mmpretrain",
    )
    loads = save(MODELS.build(classifier), tmp_path / "classifier.pth")
    for how in (
        dict(pretrained=loads["checkpoint"]),
        dict(init_cfg=dict(type="Pretrained", **loads)),
        dict(init_cfg=dict(type=PretrainedInit, **loads)),
    ):
        model = MODELS.build({**classifier, **how})
        model.init_weights()
        assert_loaded(model)

    for name in NAMES:
        init_cfg = dict(type=name, **loads, prefix="backbone.")
        model = MODELS.build({**classifier, "backbone": dict(backbone, init_cfg=init_cfg)})
        model.init_weights()
        assert_loaded(model.backbone)

    pytest.importorskip("mmseg")
    bare = save(MODELS.build(backbone), tmp_path / "bare.pth")
    segmentor = dict(
        type="mmseg.EncoderDecoder",
        backbone=backbone,
        decode_head=dict(type="FCNHead", in_channels=256, in_index=0, channels=4, num_classes=2),
        pretrained=bare["checkpoint"],
        _scope_="mmseg",
    )
    model = MODELS.build(ConfigDict(segmentor))
    model.init_weights()
    assert_loaded(model.backbone)


def test_resolve_and_name_pretrained():
    for name in NAMES:
        assert resolve(dict(type=name), WEIGHT_INITIALIZERS) is PretrainedInit
        assert name_pretrained(dict(type=name, checkpoint="a")) == dict(
            type="Pretrained", checkpoint="a"
        )
    for name in (DDFResNet, "DDFResNet", "ddf_mm.DDFResNet", "ddf_mm.models.DDFResNet"):
        assert resolve(dict(type=name), MODELS) is DDFResNet
        assert resolve(ConfigDict(type=name, _scope_="ddf_mm"), MODELS) is DDFResNet
    assert resolve(dict(type="NoSuchThing"), WEIGHT_INITIALIZERS) is None
    assert resolve(dict(type="no.such.Thing"), WEIGHT_INITIALIZERS) is None
    other = dict(type="Kaiming", layer="Conv2d")
    assert name_pretrained(other) is other and name_pretrained(None) is None
    assert name_pretrained((other, dict(type=PretrainedInit))) == [other, dict(type="Pretrained")]
