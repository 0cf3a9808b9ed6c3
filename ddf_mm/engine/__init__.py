"""Support for ``tools/``. Importing this package registers :class:`CPUAmpOptimWrapper`,
:class:`RMSE` and :class:`DDFFilterVisualizationHook`; it imports no toolbox."""

from ddf_mm.contrib.cpu_amp import CPUAmpOptimWrapper
from ddf_mm.contrib.rmse import RMSE
from ddf_mm.visualization.hook import DDFFilterVisualizationHook

__all__ = ["RMSE", "CPUAmpOptimWrapper", "DDFFilterVisualizationHook"]
