_base_ = [
    "./fpn_r50_ddfup-fpn_4xb4-160k_ade20k-512x512.py",
    "../_base_/backbones/ddf-mul-resnet50.py",
]

model = dict(backbone=_base_.ddf_resnet, pretrained=None)
