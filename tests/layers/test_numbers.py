"""Numerical limits: constant, huge, tiny and NaN inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddf_mm.layers import DDFPack, DDFUpPack
from ddf_mm.models import DDFResNet, DDFUpFPN

LAYERS = {
    "mul": lambda: DDFPack(8, kernel_combine="mul"),
    "add, strided": lambda: DDFPack(8, stride=2, head=2, kernel_combine="add"),
    "up": lambda: DDFUpPack(8, scale_factor=2),
}


def value_and_gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    out.float().sum().backward()
    return [out, x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("constant", [0.0, 1.0, 1e-7, 100.0])
@pytest.mark.parametrize("name", LAYERS)
def test_constant_features(name, constant, dtype):
    layer = LAYERS[name]().to(dtype)
    x = torch.full((2, 8, 6, 5), constant, dtype=dtype)
    assert all(t.isfinite().all() for t in value_and_gradients(layer, x))


@pytest.mark.parametrize("name", LAYERS)
def test_filters_of_zero_variance(name):
    """All taps of a filter are equal, as with zero weights."""
    layer = LAYERS[name]()
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, 0.3)
    out, *gradients = value_and_gradients(layer, torch.randn(2, 8, 6, 5))
    assert (out == 0).all()
    assert all(t.isfinite().all() for t in gradients)


@pytest.mark.parametrize("name", LAYERS)
# Over ten seeds the largest errors were 1.2e-4, from the epsilon, and 3.6e-7.
@pytest.mark.parametrize("scale, tolerance", [(1e-3, 5e-4), (1e6, 2e-6), (1e15, 2e-6)])
def test_filters_do_not_depend_on_the_scale_of_the_features(name, scale, tolerance):
    """FilterNorm cancels the scale if the convolutions have no bias: the layer is homogeneous.

    Except for features of 1e-6, where the epsilon of 1e-10 is not small.
    """
    layer = LAYERS[name]()
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)
    x = torch.randn(2, 8, 6, 5)
    expected = layer(x)
    error = (layer(scale * x) / scale - expected).abs().max() / expected.abs().max()
    assert error < tolerance
    assert all(t.isfinite().all() for t in value_and_gradients(layer, scale * x))


def test_nan_stays_in_its_image():
    backbone = DDFResNet(26, stem_channels=8, base_channels=8, out_indices=(0, 1, 2, 3)).eval()
    neck = DDFUpFPN([32, 64, 128, 256], 8, num_outs=4).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        clean = neck(backbone(images))
        images[1, 0, 20, 30] = float("nan")
        spoiled = neck(backbone(images))
    for before, after in zip(clean, spoiled, strict=True):
        assert after[1].isnan().any()
        assert torch.equal(after[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gradients_are_those_of_float32(dtype):
    """They have the same direction up to the rounding of activations."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), DDFPack(16), nn.BatchNorm2d(16), nn.ReLU())
    images, target = torch.randn(8, 3, 16, 16), torch.randn(8, 16, 14, 14)

    def gradient(enabled: bool) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            out = model(images)
        (out.float() * target).mean().mul(1024).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact, rounded = gradient(False), gradient(True)
    assert rounded.isfinite().all()
    assert not torch.equal(rounded, exact)
    similarity = torch.cosine_similarity(exact, rounded, dim=0)
    assert similarity > 0.99
