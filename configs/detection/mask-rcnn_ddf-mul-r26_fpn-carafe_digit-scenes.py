# The same with CARAFE in the neck, for comparison. mmcv's CARAFE runs only on CUDA devices;
# ddf_mm.layers.carafe runs on others.
_base_ = "mask-rcnn_ddf-mul-r26_ddfup-fpn_digit-scenes.py"

custom_imports = dict(imports=["ddf_mm.models", "ddf_mm.layers.carafe"], allow_failed_imports=False)
model = dict(neck=dict(type="FPN_CARAFE"))
