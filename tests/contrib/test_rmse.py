from __future__ import annotations

import pytest
import torch

from ddf_mm.contrib.rmse import RMSE


def test_rmse_is_the_mean_over_maps():
    samples = [
        dict(gt_map=dict(data=torch.zeros(1, 2, 2)), pred_map=dict(data=torch.full((1, 2, 2), e)))
        for e in (1.0, 3.0)
    ]
    samples[0]["pred_map"]["data"][0, 0] = 0  # half of the pixels are right
    metric = RMSE(prefix="depth")
    metric.process({}, samples)
    measured = metric.evaluate(2)
    assert measured == {"depth/rmse": pytest.approx((0.5**0.5 + 3) / 2)}
