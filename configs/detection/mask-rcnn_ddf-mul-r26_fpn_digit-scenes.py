# The same with nearest neighbour upsampling in the neck, for comparison.
_base_ = "mask-rcnn_ddf-mul-r26_ddfup-fpn_digit-scenes.py"

model = dict(neck=dict(type="FPN"))
