"""Training and evaluation machinery: mixed precision on a CPU, and what ``tools/`` builds on.

Importing this package registers :class:`CPUAmpOptimWrapper`, :class:`RMSE` and
:class:`DDFFilterVisualizationHook` and imports no toolbox. The command line helpers live in
``ddf_mm.engine.cli``, ``ddf_mm.engine.launch`` and ``ddf_mm.engine.evaluation``.
"""

from ddf_mm.contrib.cpu_amp import CPUAmpOptimWrapper
from ddf_mm.engine.metrics import RMSE
from ddf_mm.visualization.hook import DDFFilterVisualizationHook

__all__ = ["RMSE", "CPUAmpOptimWrapper", "DDFFilterVisualizationHook"]
