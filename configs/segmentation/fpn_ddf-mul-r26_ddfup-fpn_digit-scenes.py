# A small Semantic FPN with DDF-ResNet and DDF-Up neck on scenes of digits, from random weights.
# Trains in minutes on two CPU cores, without a download. Data:
# python tools/make_digit_scenes.py data/digit_scenes
_base_ = [
    "mmseg::_base_/models/fpn_r50.py",
    "mmseg::_base_/default_runtime.py",
    "../_base_/datasets/digit_scenes_semantic.py",
]

custom_imports = dict(imports=["ddf_mm.models"], allow_failed_imports=False)

channels = 32
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="DDFResNet",
        depth=26,
        kernel_combine="mul",
        stem_channels=16,
        base_channels=16,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(type="DDFUpFPN", in_channels=[64, 128, 256, 512], out_channels=channels),
    decode_head=dict(
        in_channels=[channels] * 4,
        channels=channels,
        num_classes=11,
        norm_cfg=norm_cfg,
        # Six of seven pixels are background.
        loss_decode=dict(class_weight=[0.3] + [1.0] * 10),
    ),
)

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=5, norm_type=2),
)
# mmengine multiplies schedulers: a cosine over the whole run, and a warm-up.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=100, by_epoch=False),
    dict(type="CosineAnnealingLR", T_max=1800, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=1800, val_interval=1800)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=20, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1800, max_keep_ckpts=1),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(_scope_="mmseg", type="SegVisualizationHook"),
)
env_cfg = dict(cudnn_benchmark=False)
auto_scale_lr = dict(base_batch_size=8)
randomness = dict(seed=0)
