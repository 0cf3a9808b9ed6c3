from mmengine.config import read_base

from ddf_mm.models import DDFUpFPN

with read_base():
    from .faster_rcnn_ddf_mul_r50_fpn_1x_coco import *

model.neck.type = DDFUpFPN
