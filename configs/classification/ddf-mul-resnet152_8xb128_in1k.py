_base_ = [
    "../_base_/models/ddf_resnet152.py",
    "../_base_/datasets/imagenet_bs128_randaug.py",
    "../_base_/schedules/imagenet_bs1024_coslr_130e.py",
    "../_base_/default_runtime.py",
]

model = dict(backbone=dict(kernel_combine="mul"))
