"""Root mean squared error of maps such as depth maps.

For mmengine, which has no metrics of its own: superfluous once ``mmseg.evaluation.DepthMetric``
needs no mmseg.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class RMSE(BaseMetric):
    """Root mean squared error over the pixels of each map, averaged over the maps.

    Reads ``pred_map.data`` and ``gt_map.data`` of the data samples; the error has their unit. The
    arguments are those of :class:`mmengine.evaluator.BaseMetric`.
    """

    default_prefix = "map"

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        """Collect the errors of a batch."""
        for sample in data_samples:
            error = sample["pred_map"]["data"].double() - sample["gt_map"]["data"].double()
            self.results.append(error.square().mean().sqrt().item())

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        """The mean error of the maps, as ``rmse``."""
        return dict(rmse=sum(results) / len(results))
