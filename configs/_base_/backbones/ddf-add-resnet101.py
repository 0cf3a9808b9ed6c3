_base_ = "./ddf-mul-resnet50.py"

ddf_resnet = dict(
    depth=101,
    kernel_combine="add",
    init_cfg=dict(checkpoint="checkpoints/ddf-add-resnet101_in1k.pth"),
)
