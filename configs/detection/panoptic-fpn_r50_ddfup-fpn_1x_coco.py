_base_ = "mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py"

model = dict(neck=dict(type="ddf_mm.DDFUpFPN"))
