_base_ = "./ddf-mul-resnet50.py"

ddf_resnet = dict(
    depth=101,
    init_cfg=dict(checkpoint="checkpoints/ddf-mul-resnet101_in1k.pth"),
)
