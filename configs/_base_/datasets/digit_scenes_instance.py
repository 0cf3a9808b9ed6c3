# Boxes and masks of the data set of tools/make_digit_scenes.py.
# `_scope_`: types are the toolbox's, also if this file is read through `ddf_mm::`.
_base_ = "digit_scenes.py"

data_root = _base_.data_root
metainfo = dict(classes=tuple("0123456789"), palette=_base_.palette)
image_scale = (128, 128)

# No flips: mirrored digits are not digits.
train_pipeline = [
    dict(_scope_="mmdet", type="LoadImageFromFile"),
    dict(_scope_="mmdet", type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(_scope_="mmdet", type="Resize", scale=image_scale, keep_ratio=True),
    dict(_scope_="mmdet", type="PackDetInputs"),
]
test_pipeline = [
    dict(_scope_="mmdet", type="LoadImageFromFile"),
    dict(_scope_="mmdet", type="Resize", scale=image_scale, keep_ratio=True),
    dict(_scope_="mmdet", type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        _scope_="mmdet",
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]

# The images are small: workers cost more than they save.
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        _scope_="mmdet",
        type="CocoDataset",
        data_root=data_root,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="images/train/"),
        metainfo=metainfo,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        _scope_="mmdet",
        type="CocoDataset",
        data_root=data_root,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="images/val/"),
        metainfo=metainfo,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    _scope_="mmdet",
    type="CocoMetric",
    ann_file=data_root + "/annotations/instances_val.json",
    metric=["bbox", "segm"],
)
test_evaluator = val_evaluator
