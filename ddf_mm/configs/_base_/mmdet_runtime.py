from mmdet.engine.hooks import DetVisualizationHook
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import read_base
from mmengine.runner import LogProcessor
from mmengine.visualization import LocalVisBackend

with read_base():
    from .default_runtime import *

default_scope = "mmdet"
default_hooks.update(visualization=dict(type=DetVisualizationHook))
log_processor = dict(type=LogProcessor, window_size=50, by_epoch=True)
visualizer = dict(
    type=DetLocalVisualizer, name="visualizer", vis_backends=[dict(type=LocalVisBackend)]
)
