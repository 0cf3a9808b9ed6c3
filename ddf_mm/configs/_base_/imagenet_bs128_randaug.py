# ImageNet-1k as in the official training; configs/_base_/datasets explains the settings.
from mmcv.transforms import LoadImageFromFile, RandomApply, RandomChoice, RandomFlip
from mmengine.dataset import DefaultSampler
from mmpretrain.datasets import (
    CenterCrop,
    ImageNet,
    PackInputs,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    ResizeEdge,
)
from mmpretrain.evaluation import Accuracy

data_preprocessor = dict(
    num_classes=1000,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
)
# Transforms see BGR images.
bgr_mean = data_preprocessor["mean"][::-1]
bgr_std = data_preprocessor["std"][::-1]

train_pipeline = [
    dict(type=LoadImageFromFile),
    dict(
        type=RandomChoice,
        transforms=[
            [dict(type=RandomResizedCrop, scale=224, backend="pillow", interpolation=mode)]
            for mode in ("bilinear", "bicubic")
        ],
    ),
    dict(type=RandomFlip, prob=0.5, direction="horizontal"),
    dict(
        type=RandomChoice,
        transforms=[
            [
                dict(
                    type=RandAugment,
                    policies="timm_increasing",
                    num_policies=2,
                    total_level=10,
                    magnitude_level=7,
                    magnitude_std=0.5,
                    hparams=dict(pad_val=[round(x) for x in bgr_mean], interpolation=mode),
                )
            ]
            for mode in ("bilinear", "bicubic")
        ],
    ),
    dict(
        type=RandomApply,
        prob=0.4,
        transforms=[
            dict(
                type=RandomChoice,
                transforms=[
                    [
                        dict(
                            type=RandomErasing,
                            erase_prob=1.0,
                            min_area_ratio=0.02 / boxes,
                            max_area_ratio=1 / 3 / boxes,
                            aspect_range=(0.3, 1 / 0.3),
                            mode="rand",
                            fill_color=bgr_mean,
                            fill_std=bgr_std,
                        )
                    ]
                    * boxes
                    for boxes in (1, 2, 3)
                ],
            )
        ],
    ),
    dict(type=PackInputs),
]
test_pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=ResizeEdge, scale=256, edge="short", backend="pillow", interpolation="bicubic"),
    dict(type=CenterCrop, crop_size=224),
    dict(type=PackInputs),
]

train_dataloader = dict(
    batch_size=128,
    num_workers=6,
    drop_last=True,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=ImageNet, data_root="data/imagenet", split="train", pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=6,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=ImageNet, data_root="data/imagenet", split="val", pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type=Accuracy, topk=(1, 5))
test_evaluator = val_evaluator
