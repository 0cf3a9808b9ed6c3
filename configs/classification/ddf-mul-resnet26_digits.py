# A small DDF-ResNet on the 1,797 handwritten digits that come with scikit-learn. Trains in a minute
# or two on two CPU cores, without a download.
_base_ = "../_base_/default_runtime.py"

custom_imports = dict(imports=["ddf_mm.models", "ddf_mm.datasets"], allow_failed_imports=False)

# `_scope_`: types are mmpretrain's, also if this file is read through `ddf_mm::`.
model = dict(
    _scope_="mmpretrain",
    type="ImageClassifier",
    backbone=dict(
        type="DDFResNet",
        depth=26,
        kernel_combine="mul",
        stem_channels=16,
        base_channels=16,
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=10,
        in_channels=512,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    ),
)

# Mean and standard deviation of the training split's pixels.
data_preprocessor = dict(num_classes=10, mean=[77.9] * 3, std=[95.9] * 3, to_rgb=False)

train_pipeline = [
    dict(_scope_="mmpretrain", type="Resize", scale=48, interpolation="bicubic"),
    # No flips: mirrored digits are not digits.
    dict(
        _scope_="mmpretrain",
        type="Rotate",
        magnitude_range=(0, 15),
        magnitude_std="inf",
        pad_val=0,
        prob=1.0,
        interpolation="bilinear",
    ),
    dict(_scope_="mmpretrain", type="RandomCrop", crop_size=48, padding=6),
    dict(_scope_="mmpretrain", type="PackInputs"),
]
test_pipeline = [
    dict(_scope_="mmpretrain", type="Resize", scale=48, interpolation="bicubic"),
    dict(_scope_="mmpretrain", type="PackInputs"),
]

# The images are tiny and in memory: workers cost more than they save.
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="DigitsDataset", split="train", pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=180,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="DigitsDataset", split="test", pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(_scope_="mmpretrain", type="Accuracy", topk=(1,))
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
)
# mmengine multiplies schedulers: a cosine over the whole run, of any length, and a warm-up of two
# epochs (46 iterations).
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, end=46, by_epoch=False),
    dict(type="CosineAnnealingLR", convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=25, val_interval=1)
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(
    logger=dict(interval=10),
    # The last checkpoint is evaluated: the best one on the held-out split would be biased.
    checkpoint=dict(interval=5, max_keep_ckpts=1, save_best=None),
)
env_cfg = dict(cudnn_benchmark=False)
randomness = dict(_delete_=True, seed=0, deterministic=True)
auto_scale_lr = dict(base_batch_size=64)
