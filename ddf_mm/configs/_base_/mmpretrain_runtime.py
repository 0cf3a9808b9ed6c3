from mmengine.config import read_base
from mmengine.visualization import LocalVisBackend
from mmpretrain.engine import VisualizationHook
from mmpretrain.visualization import UniversalVisualizer

with read_base():
    from .default_runtime import *

default_hooks.update(
    checkpoint=dict(max_keep_ckpts=3, save_best="accuracy/top1"),
    visualization=dict(type=VisualizationHook, enable=False),
)
env_cfg.update(cudnn_benchmark=True)
randomness = dict(seed=42, deterministic=False, diff_rank_seed=True)
visualizer = dict(type=UniversalVisualizer, vis_backends=[dict(type=LocalVisBackend)])
