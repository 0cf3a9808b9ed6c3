# Semantic labels of the data set of tools/make_digit_scenes.py.
# `_scope_`: types are the toolbox's, also if this file is read through `ddf_mm::`.
_base_ = "digit_scenes.py"

data_root = _base_.data_root
metainfo = dict(classes=("background", *"0123456789"), palette=[(0, 0, 0), *_base_.palette])

# No flips: mirrored digits are not digits.
pipeline = [
    dict(_scope_="mmseg", type="LoadImageFromFile"),
    dict(_scope_="mmseg", type="LoadAnnotations"),
    dict(_scope_="mmseg", type="PackSegInputs"),
]
test_pipeline = pipeline  # mmseg's inference_model and CAM tool need this name

# The images are small: workers cost more than they save.
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        _scope_="mmseg",
        type="BaseSegDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/train", seg_map_path="semantic/train"),
        metainfo=metainfo,
        pipeline=pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        _scope_="mmseg",
        type="BaseSegDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/val", seg_map_path="semantic/val"),
        metainfo=metainfo,
        pipeline=pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(_scope_="mmseg", type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
