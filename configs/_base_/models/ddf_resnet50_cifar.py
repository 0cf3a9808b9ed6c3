_base_ = "mmpretrain::_base_/models/resnet50_cifar.py"

custom_imports = dict(imports=["ddf_mm.models"], allow_failed_imports=False)

model = dict(backbone=dict(type="DDFResNet_CIFAR", kernel_combine="mul"))
