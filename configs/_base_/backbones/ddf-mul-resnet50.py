# Replaces the ResNet of any config of mmdet and mmseg by a DDF-ResNet:
#
#     _base_ = ["mmdet::…", "ddf_mm::_base_/backbones/ddf-mul-resnet50.py"]
#     model = dict(backbone=_base_.ddf_resnet)
#
# It is merged into the backbone, which keeps its out_indices, frozen_stages, norm_eval, strides and
# dilations. Settings of the replaced network and its weights are overridden; see
# docs/backbones.md.
ddf_resnet = dict(
    _scope_="ddf_mm",  # finds the type without custom_imports
    type="DDFResNet",
    depth=50,
    kernel_combine="mul",
    style="pytorch",
    dcn=None,
    stage_with_dcn=(False, False, False, False),
    # A classifier trained by configs/classification, whose parameters have this prefix.
    init_cfg=dict(
        type="Pretrained", checkpoint="checkpoints/ddf-mul-resnet50_in1k.pth", prefix="backbone."
    ),
)
