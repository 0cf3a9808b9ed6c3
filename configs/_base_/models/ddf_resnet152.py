_base_ = "ddf_resnet50.py"

model = dict(backbone=dict(depth=152))
