from mmengine.config import read_base

with read_base():
    from .._base_.coco_detection import *
    from .._base_.faster_rcnn_ddf_mul_r50_fpn import *
    from .._base_.mmdet_runtime import *
    from .._base_.schedule_1x import *
