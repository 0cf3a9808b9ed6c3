# Depth maps in centimetres of the data set of tools/make_digit_scenes.py, guided by its images. The
# recipes add PackGuidedUpsampling with their scale factor to the pipeline.
_base_ = "digit_scenes.py"

data_root = _base_.data_root

pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadMap", unit=0.1),
]

# The images are small: workers cost more than they save.
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="GuidedUpsamplingDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/train", map_path="depth/train"),
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="GuidedUpsamplingDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/val", map_path="depth/val"),
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="RMSE", prefix="depth")
test_evaluator = val_evaluator
