_base_ = [
    "../_base_/models/ddf_resnet50_cifar.py",
    "mmpretrain::_base_/datasets/cifar10_bs16.py",
    "mmpretrain::_base_/schedules/cifar10_bs128.py",
    "../_base_/default_runtime.py",
]

model = dict(backbone=dict(kernel_combine="mul"))
