# ImageNet-1k as in the official training: train.py of theFoxofSky/ddfnet with timm 0.4.5.
# Normalization and the test pipeline (short edge 256, bicubic; centre crop 224) are in the base.
_base_ = "mmpretrain::_base_/datasets/imagenet_bs32_pil_bicubic.py"

# Transforms see BGR images.
bgr_mean = _base_.data_preprocessor.mean[::-1]
bgr_std = _base_.data_preprocessor.std[::-1]

# `_scope_`: transforms are mmpretrain's, also if this file is read through `ddf_mm::`.
train_pipeline = [
    dict(_scope_="mmpretrain", type="LoadImageFromFile"),
    # timm selects a random interpolation for each image...
    dict(
        _scope_="mmpretrain",
        type="RandomChoice",
        transforms=[
            [dict(type="RandomResizedCrop", scale=224, backend="pillow", interpolation=mode)]
            for mode in ("bilinear", "bicubic")
        ],
    ),
    dict(_scope_="mmpretrain", type="RandomFlip", prob=0.5, direction="horizontal"),
    # ... and again for the geometric operations of `rand-m7-mstd0.5-inc1`.
    dict(
        _scope_="mmpretrain",
        type="RandomChoice",
        transforms=[
            [
                dict(
                    type="RandAugment",
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
    # timm erases one to three boxes, which share the area of one, after normalization, with
    # standard normal noise; here the same noise is clipped to 0..255.
    dict(
        _scope_="mmpretrain",
        type="RandomApply",
        prob=0.4,
        transforms=[
            dict(
                type="RandomChoice",
                transforms=[
                    [
                        dict(
                            type="RandomErasing",
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
    dict(_scope_="mmpretrain", type="PackInputs"),
]

train_dataloader = dict(
    batch_size=128,
    num_workers=6,
    drop_last=True,
    dataset=dict(pipeline=train_pipeline),
)
val_dataloader = dict(batch_size=128, num_workers=6)
test_dataloader = val_dataloader
