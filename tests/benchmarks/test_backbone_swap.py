"""Stock configs of mmdet and mmseg build, learn and predict with DDF in their ResNet-50.

The complete table, with the `add` combination and `dcn` for every config, is written by
benchmarks/check_backbone_swap.py into docs/backbone_swap.md.
"""

from __future__ import annotations

import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

import check_backbone_swap as tool

pytestmark = pytest.mark.usefixtures("one_thread")

# Families that fail with the stock backbone too; reasons are in docs/backbone_swap.md.
IMPOSSIBLE = {
    "carafe": "carafe_forward_impl: implementation for device cpu not found",
    "grounding_dino": "fairscale",
    "mask2former_vis": "Only support the 4 dims when use",
    "nas_fcos": "batch_norm eps must be positive",
}
# Families that differ in what they take from a backbone or give to it; those with other heads alone
# are left to benchmarks/check_backbone_swap.py.
FAMILIES = {
    "mmdet": [
        "carafe", "centernet", "dcn", "dcnv2", "deformable_detr", "detr",
        "empirical_attention", "faster_rcnn", "fcos", "gcnet", "gn", "gn+ws", "grounding_dino",
        "htc", "mask2former", "mask2former_vis", "mask_rcnn", "maskformer", "nas_fcos", "nas_fpn",
        "pafpn", "panoptic_fpn", "point_rend", "qdtrack", "queryinst", "retinanet",
        "scratch", "soft_teacher", "solov2", "yolact", "yolof",
    ],
    "mmseg": ["deeplabv3", "fcn", "mask2former", "point_rend", "sem_fpn", "upernet"],
}  # fmt: skip
# One family of each kind for the other two swaps.
FEW = ("mask_rcnn", "retinanet", "deformable_detr", "deeplabv3")
CASES = [
    (toolbox, family, swap)
    for toolbox, families in FAMILIES.items()
    for family in families
    for swap in (("mul", "add", "dcn") if family in FEW else ("mul",))
]


@pytest.mark.parametrize("toolbox, family, swap", CASES)
def test_swapped(toolbox, family, swap):
    config = tool.resnet50_config(toolbox, family)
    outcome = tool.check(toolbox, config, swap)
    if family in IMPOSSIBLE:
        assert IMPOSSIBLE[family] in outcome.error
        assert tool.check(toolbox, config, "none").error == outcome.error
    else:
        assert not outcome.error


@pytest.mark.parametrize(
    "family, head",
    [("retinanet", "bbox_head"), ("fcos", "bbox_head"), ("mask_rcnn", "roi_head.mask_head")],
)
def test_conv_cfg_of_heads(family, head):
    cfg = tool.swapped("mmdet", tool.resnet50_config("mmdet", family), "none")
    cfg.merge_from_dict({f"model.{head}.conv_cfg": dict(type="ddf_mm.DDF")})
    model = tool.run("mmdet", cfg)
    assert len(tool.ddf_layers(model)) >= 4
    assert not tool.ddf_layers(model.backbone)


NECK = dict(type="ddf_mm.DDFUpFPN", guidance=True)
# UPerHead without its pooling pyramid: its fusion as the neck, the rest as a stock head.
FUSION = dict(
    auxiliary_head=dict(in_channels=64),
    neck=dict(
        NECK,
        in_channels=[256, 512, 1024, 2048],
        out_channels=64,
        num_outs=4,
        norm_cfg=dict(type="BN"),
        act_cfg=dict(type="ReLU"),
    ),
    decode_head=dict(
        type="FCNHead",
        input_transform="resize_concat",
        in_channels=[64, 64, 64, 64],
        in_index=[0, 1, 2, 3],
        channels=64,
        num_convs=1,
        concat_input=False,
        num_classes=19,
    ),
)


@pytest.mark.parametrize(
    "toolbox, family, changes",
    [("mmdet", "fcos", dict(neck=NECK)), ("mmseg", "upernet", FUSION)],
)
def test_neck_by_name(toolbox, family, changes):
    cfg = tool.swapped(toolbox, tool.resnet50_config(toolbox, family), "none")
    if family == "upernet":
        cfg.model.pop("decode_head")
    cfg.merge_from_dict(dict(model=changes))
    model = tool.run(toolbox, cfg)
    assert len(model.neck.upsample_modules) == len(model.neck.lateral_convs) - 1
