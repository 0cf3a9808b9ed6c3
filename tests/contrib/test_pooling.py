from __future__ import annotations

import pytest
import torch
from torch.nn.functional import max_pool2d

from ddf_mm.contrib.pooling import MaximaOfSlices

GEOMETRIES = [
    dict(kernel_size=2),
    dict(kernel_size=1, stride=2),
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=(3, 5), stride=(1, 3), padding=(0, 2), dilation=(2, 1)),
    dict(kernel_size=3, stride=2, padding=1, ceil_mode=True),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("size", [(12, 15), (13, 16)], ids=str)
def test_values(geometry, size):
    images = torch.randn(2, 3, *size)
    images[0, 0, 5, 6] = float("nan")
    images[1, 1, 2] = -float("inf")
    with MaximaOfSlices():
        got = max_pool2d(images, **geometry)
    expected = max_pool2d(images, **geometry)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_indices_are_those_of_pytorch():
    images = torch.randn(1, 1, 6, 6)
    with MaximaOfSlices():
        _, got = max_pool2d(images, 2, return_indices=True)
    assert torch.equal(got, max_pool2d(images, 2, return_indices=True)[1])


def test_one_program_accepts_sizes_of_any_parity():
    class Pool(torch.nn.Module):
        def forward(self, x):
            return max_pool2d(x, 3, 2, 1)

    free = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    with MaximaOfSlices():
        images = (torch.randn(1, 2, 8, 10),)
        program = torch.export.export(Pool(), images, dynamic_shapes=free).module()
    for size in ((8, 10), (9, 10), (11, 13)):
        images = torch.randn(1, 2, *size)
        assert torch.equal(program(images), Pool()(images))
