_base_ = "./ddf-mul-resnet50.py"

ddf_resnet = dict(
    kernel_combine="add",
    init_cfg=dict(checkpoint="checkpoints/ddf-add-resnet50_in1k.pth"),
)
