_base_ = [
    "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
    "../_base_/backbones/ddf-mul-resnet50.py",
]

model = dict(backbone=_base_.ddf_resnet)
