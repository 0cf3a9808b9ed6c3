_base_ = "mmpretrain::_base_/default_runtime.py"

default_hooks = dict(
    logger=dict(interval=50),
    checkpoint=dict(max_keep_ckpts=3, save_best="accuracy/top1"),
)

env_cfg = dict(cudnn_benchmark=True)

randomness = dict(seed=42, diff_rank_seed=True)

# Tools that pass this dict on as keyword arguments stumble over a `_scope_`: its type names its
# scope instead.
visualizer = dict(
    _delete_=True,
    type="mmpretrain.UniversalVisualizer",
    vis_backends=[dict(type="LocalVisBackend")],
)
