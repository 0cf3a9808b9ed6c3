_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"

model = dict(neck=dict(type="ddf_mm.DDFUpFPN"))
