"""The CUDA kernels of every layer of the recipes and of the swapped configs."""

from __future__ import annotations

import contextlib
import csv
import re
import shutil
import sys

import predict_cuda
import pytest
from cuda_dispatch import FIELDS, HERE, LAYOUTS, Dispatch, Layer

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the library is an ELF file"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]
TABLE = HERE / "kernels_of_recipes.csv"


@pytest.fixture(scope="module")
def dispatch():
    with Dispatch() as of:
        yield of


def rows() -> list[tuple[Layer, list[str]]]:
    with TABLE.open(newline="") as file:
        header, *lines = csv.reader(file)
    assert tuple(header[: len(FIELDS)]) == FIELDS
    text = {"op", "combine", "filters"}
    return [
        (
            Layer(
                *(v if f in text else int(v) for f, v in zip(FIELDS, line, strict=False))  # type: ignore[arg-type]
            ),
            line[len(FIELDS) :],
        )
        for line in lines
    ]


def test_no_layer_trains_on_generic_kernels(dispatch):
    table = rows()
    assert len(table) > 50
    for layer, kernels in table:
        assert kernels == dispatch.kernels_of(layer), f"{layer}: run benchmarks/list_kernels.py"
        assert not any("generic" in kernel for kernel in kernels), layer


def layer(**given) -> Layer:
    values = dict(
        op="ddf", channels=64, groups=1, height=28, width=28, kernel_size=3, dilation=1, stride=1,
        scale=1, combine="mul", filters="both",
    )  # fmt: skip
    return Layer(**{**values, **given})


# Calls of layers that no recipe has, whose forward or backward pass is generic.
GENERIC = {
    "larger windows with a stride": (layer(kernel_size=7, stride=2), LAYOUTS),
    "larger windows with a dilation": (layer(kernel_size=5, dilation=2), LAYOUTS),
    "CARAFE, upsampling by 5 x 5 windows": (
        layer(op="ddf_up", kernel_size=5, scale=2, filters="one"),
        LAYOUTS,
    ),
    "1 x 1 and 9 x 9 windows": (layer(kernel_size=9), LAYOUTS),
    "larger windows, few channels in a group": (
        layer(kernel_size=5, channels=12, groups=4),
        ["channels_last"],
    ),
}


@pytest.mark.parametrize("name", GENERIC)
def test_what_is_generic(dispatch, name):
    of, layouts = GENERIC[name]
    for layout in LAYOUTS:
        launches = [
            launch.kernel
            for kind in ("forward", "backward")
            for launch in dispatch.launches(of, kind, layout)
        ]
        assert any("generic" in kernel for kernel in launches) == (layout in layouts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not(dispatch, dtype):
    """3 x 3 windows of every kind, and larger ones of stride and dilation 1."""
    layers = [
        layer(dilation=dilation, stride=stride, channels=channels, groups=groups, width=width)
        for dilation in (1, 2, 4, 6)
        for stride in (1, 2)
        for channels, groups in ((64, 1), (64, 4), (6, 2), (32, 32))
        for width in (28, 29)
    ]
    layers += [layer(op="ddf_up", scale=scale, width=w) for scale in (2, 4) for w in (28, 29)]
    layers += [layer(kernel_size=k, width=w) for k in (5, 7) for w in (28, 29)]
    for of in layers:
        for layout in LAYOUTS:
            for kind in ("forward", "backward"):
                launches = dispatch.launches(of, kind, layout, dtype)
                assert launches
                assert not any("generic" in launch.kernel for launch in launches), (of, layout)


def test_predictions(dispatch, monkeypatch, capsys):
    """Of every pass, from the gates of an H100."""
    monkeypatch.setattr(sys, "argv", ["predict_cuda.py", "--shapes", "32,256,56,56"])
    monkeypatch.setattr(predict_cuda, "Dispatch", lambda: contextlib.nullcontext(dispatch))
    assert predict_cuda.main() == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(LAYOUTS) * 2
    for line in lines:
        percents = [int(number) for number in re.findall(r" (\d+)%", line)][:2]
        assert len(percents) == 2 and all(0 < number <= 100 for number in percents), line
    assert "forward_3x3 lanes 77% waves" in lines[0]


def test_active_lanes(dispatch):
    """Lanes of forward_3x3 have tiles of 2 x 4 pixels; 56 x 56 pixels are 392, in blocks of 128."""
    (launch,) = dispatch.launches(layer(height=56, width=56), "forward", "NCHW")
    assert launch.active_lanes == pytest.approx(392 / 512)
    # Lanes of gather_3x3 have a pixel.
    (launch,) = dispatch.launches(layer(height=10, width=10, dilation=2), "forward", "NCHW")
    assert launch.active_lanes == pytest.approx(100 / 128)


@pytest.mark.parametrize("batch", [1, 2, 512])
def test_every_launch_fits_the_limits_of_cuda(dispatch, batch):
    """48 KiB of shared memory, which backward_3x3 uses up for 1,024 channels, and 1,024 threads."""
    most = 0
    for of in (layer(channels=2048, height=7, width=7), *(of for of, _ in rows())):
        for layout in LAYOUTS:
            for kind in ("forward", "backward", *(["pack"] if of.op == "ddf" else [])):
                for launch in dispatch.launches(of, kind, layout, batch=batch):
                    assert 1 <= launch.blocks < 2**31 and launch.threads <= 1024
                    most = max(most, launch.shared_bytes)
    assert most <= 48 * 1024
    assert (most == 48 * 1024) == (batch == 512)
