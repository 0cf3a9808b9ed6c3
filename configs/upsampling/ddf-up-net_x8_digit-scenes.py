_base_ = "ddf-up-net_x4_digit-scenes.py"

scale_factor = 8
model = dict(scale_factor=scale_factor)

pipeline = [*_base_.pipeline[:-1], dict(type="PackGuidedUpsampling", scale_factor=scale_factor)]
train_dataloader = dict(dataset=dict(pipeline=pipeline))
val_dataloader = dict(dataset=dict(pipeline=pipeline))
test_dataloader = val_dataloader
