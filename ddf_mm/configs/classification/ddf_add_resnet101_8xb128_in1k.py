from mmengine.config import read_base

with read_base():
    from .._base_.ddf_resnet50 import *
    from .._base_.imagenet_bs128_randaug import *
    from .._base_.imagenet_bs1024_coslr_130e import *
    from .._base_.mmpretrain_runtime import *

model.update(backbone=dict(depth=101, kernel_combine="add"))
