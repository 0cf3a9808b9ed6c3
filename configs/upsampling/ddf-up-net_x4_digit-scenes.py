# Joint upsampling of depth maps, four times in each direction, guided by images, by a network of
# DDF-Up layers on scenes of digits. Trains in minutes on two CPU cores, without a download. Data:
# python tools/make_digit_scenes.py data/digit_scenes
_base_ = "../_base_/datasets/digit_scenes_depth.py"

default_scope = "mmengine"
custom_imports = dict(
    imports=["ddf_mm.models", "ddf_mm.datasets", "ddf_mm.engine", "mmcv.transforms"],
    allow_failed_imports=False,
)

scale_factor = 4
model = dict(type="DDFUpNet", scale_factor=scale_factor, channels=16)

pipeline = [*_base_.pipeline, dict(type="PackGuidedUpsampling", scale_factor=scale_factor)]
train_dataloader = dict(dataset=dict(pipeline=pipeline))
val_dataloader = dict(dataset=dict(pipeline=pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=0.002))
# mmengine multiplies schedulers: a cosine over the whole run, of any length, and a warm-up.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, end=50, by_epoch=False),
    dict(type="CosineAnnealingLR", convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=3, val_interval=3)
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=20),
    checkpoint=dict(type="CheckpointHook", interval=3, max_keep_ckpts=1),
)
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0))
log_level = "INFO"
auto_scale_lr = dict(base_batch_size=8)
randomness = dict(seed=0)
