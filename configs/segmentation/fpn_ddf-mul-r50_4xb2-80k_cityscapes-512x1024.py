_base_ = [
    "mmseg::sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024.py",
    "../_base_/backbones/ddf-mul-resnet50.py",
]

model = dict(backbone=_base_.ddf_resnet, pretrained=None)
