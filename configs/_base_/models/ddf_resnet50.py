_base_ = "mmpretrain::_base_/models/resnet50_label_smooth.py"

custom_imports = dict(imports=["ddf_mm.models"], allow_failed_imports=False)

model = dict(
    backbone=dict(type="DDFResNet", depth=50, kernel_combine="mul"),
    # The official classifier is a plain torch.nn.Linear: no init_cfg, PyTorch's initialization.
    head=dict(init_cfg=None),
)
