_base_ = "mmpretrain::_base_/default_runtime.py"

default_hooks = dict(
    logger=dict(interval=50),
    checkpoint=dict(max_keep_ckpts=3, save_best="accuracy/top1"),
)

env_cfg = dict(cudnn_benchmark=True)

randomness = dict(seed=42, diff_rank_seed=True)

# The scope is in the type, since some tools pass this dict as keyword arguments, where `_scope_` is
# an error.
visualizer = dict(
    _delete_=True,
    type="mmpretrain.UniversalVisualizer",
    vis_backends=[dict(type="LocalVisBackend")],
)
