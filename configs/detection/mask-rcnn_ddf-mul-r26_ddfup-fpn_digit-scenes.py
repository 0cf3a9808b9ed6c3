# A small Mask R-CNN with DDF-ResNet and DDF-Up neck on scenes of digits, from random weights.
# Trains in minutes on two CPU cores, without a download. Data:
# python tools/make_digit_scenes.py data/digit_scenes
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/datasets/digit_scenes_instance.py",
]

custom_imports = dict(imports=["ddf_mm.models"], allow_failed_imports=False)

channels = 32
model = dict(
    backbone=dict(
        _delete_=True,
        type="DDFResNet",
        depth=26,
        kernel_combine="mul",
        stem_channels=16,
        base_channels=16,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(type="DDFUpFPN", in_channels=[64, 128, 256, 512], out_channels=channels, num_outs=4),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        # Digits of 38 to 64 pixels, at least as high as wide.
        anchor_generator=dict(scales=[4], ratios=[1.0, 2.0], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(
            num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=10
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=dict(max_per_img=20)),
)

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=10, norm_type=2),
)
# mmengine multiplies schedulers: a cosine over the whole run, of any length, and a warm-up.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=50, by_epoch=False),
    dict(type="CosineAnnealingLR", convert_to_iter_based=True),
]
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=2, val_interval=2)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=2, max_keep_ckpts=1, save_best=None)
)
auto_scale_lr = dict(base_batch_size=8)
randomness = dict(seed=0)
