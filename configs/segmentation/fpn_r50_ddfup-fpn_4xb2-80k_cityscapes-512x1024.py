_base_ = "mmseg::sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024.py"

model = dict(neck=dict(type="ddf_mm.DDFUpFPN"))
