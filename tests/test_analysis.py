"""Models of configs, for images of any number of channels."""

from __future__ import annotations

import importlib

import pytest
import torch
from mmengine.config import Config

from ddf_mm import analysis
from ddf_mm.models import DDFResNet

BACKBONE = dict(depth=26, base_channels=8, stem_channels=8)


def classifier(channels: int, kind: object = "ddf_mm.DDFResNet") -> Config:
    model = dict(
        type="ImageClassifier",
        backbone=dict(type=kind, in_channels=channels, **BACKBONE),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=3, in_channels=256),
    )
    preprocessor = dict(mean=[0.0] * channels, std=[1.0] * channels)
    return Config(dict(default_scope="mmpretrain", model=model, data_preprocessor=preprocessor))


def segmentor(channels: int) -> Config:
    model = dict(
        type="EncoderDecoder",
        # The preprocessors of mmseg and mmdet accept one or three means.
        data_preprocessor=dict(type="SegDataPreProcessor", size=(64, 64)),
        backbone=dict(type="ddf_mm.DDFResNet", in_channels=channels, **BACKBONE),
        decode_head=dict(
            type="FCNHead", in_channels=256, channels=8, num_classes=2, norm_cfg=dict(type="BN")
        ),
        test_cfg=dict(mode="whole"),
    )
    return Config(dict(default_scope="mmseg", model=model))


def detector(channels: int) -> Config:
    model = dict(
        type="RetinaNet",
        data_preprocessor=dict(type="DetDataPreprocessor", pad_size_divisor=32),
        backbone=dict(
            type="ddf_mm.DDFResNet", in_channels=channels, out_indices=(0, 1, 2, 3), **BACKBONE
        ),
        neck=dict(type="FPN", in_channels=[32, 64, 128, 256], out_channels=8, num_outs=5),
        bbox_head=dict(
            type="RetinaHead", num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1,
            anchor_generator=dict(
                type="AnchorGenerator", octave_base_scale=4, scales_per_octave=1, ratios=[1.0],
                strides=[8, 16, 32, 64, 128],
            ),
            bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
        ),
    )  # fmt: skip
    return Config(dict(default_scope="mmdet", model=model))


@pytest.mark.parametrize("channels", [1, 3, 4, 6])
@pytest.mark.parametrize(
    "make, module",
    [(classifier, "mmpretrain"), (segmentor, "mmseg.models"), (detector, "mmdet.models")],
)
def test_images_have_the_channels_of_the_config(make, module, channels):
    pytest.importorskip(module)
    importlib.import_module(module)
    cfg = make(channels)
    batch = analysis.example_batch(cfg, 2, (64, 64))
    assert [tuple(image.shape) for image in batch["inputs"]] == [(channels, 64, 64)] * 2
    model = analysis.build_model(cfg)
    inputs, samples = analysis.preprocessed(model, batch)
    with torch.no_grad():
        assert model(inputs, samples, mode="tensor") is not None


def test_channels_without_the_backbones():
    cfg = classifier(4)
    del cfg.model.backbone.in_channels
    assert analysis.image_channels(cfg) == 4
    for mean in ([127.0], [], None):  # one number for all channels, or no normalization
        cfg.data_preprocessor.mean = mean
        assert analysis.image_channels(cfg) == 3


@pytest.mark.parametrize("kind", ["ddf_mm.DDFResNet", "ddf_mm.models.DDFResNet", DDFResNet])
def test_a_name_with_a_scope_a_module_or_the_class(kind):
    pytest.importorskip("mmpretrain")
    from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead

    from ddf_mm.engine.launch import find_class

    cfg = classifier(3, kind)
    cfg.model.type = ImageClassifier
    cfg.model.neck.type, cfg.model.head.type = GlobalAveragePooling, LinearClsHead
    cfg.default_scope = None  # no name needs one
    assert find_class(cfg, analysis.MODELS, cfg.model.backbone) is DDFResNet
    assert isinstance(analysis.build_model(cfg).backbone, DDFResNet)
