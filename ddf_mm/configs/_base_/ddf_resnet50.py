from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LabelSmoothLoss, LinearClsHead

from ddf_mm.models import DDFResNet

model = dict(
    type=ImageClassifier,
    backbone=dict(
        type=DDFResNet,
        depth=50,
        kernel_combine="mul",
        num_stages=4,
        out_indices=(3,),
        style="pytorch",
    ),
    neck=dict(type=GlobalAveragePooling),
    # The official classifier is a plain torch.nn.Linear: no init_cfg, PyTorch's initialization.
    head=dict(
        type=LinearClsHead,
        num_classes=1000,
        in_channels=2048,
        loss=dict(type=LabelSmoothLoss, label_smooth_val=0.1, loss_weight=1.0),
        topk=(1, 5),
        init_cfg=None,
    ),
)
