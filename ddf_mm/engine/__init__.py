"""Training and evaluation machinery: mixed precision on a CPU, and what ``tools/`` builds on.

Importing this package registers :class:`CPUAmpOptimWrapper` and :class:`RMSE` and imports no
toolbox. The command line helpers live in ``ddf_mm.engine.cli``, ``ddf_mm.engine.launch`` and
``ddf_mm.engine.evaluation``.
"""

from ddf_mm.engine.metrics import RMSE
from ddf_mm.engine.optim_wrapper import CPUAmpOptimWrapper

__all__ = ["RMSE", "CPUAmpOptimWrapper"]
