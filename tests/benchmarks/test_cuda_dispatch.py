"""The CUDA kernels of every layer of the recipes and of the swapped configs."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys

import predict_cuda
import pytest
from cuda_dispatch import HERE, LAYOUTS, Dispatch, Layer, recipes

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the library is an ELF file"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def dispatch():
    with Dispatch() as of:
        yield of


def test_no_layer_trains_on_generic_kernels(dispatch):
    table = recipes()
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
    assert "forward_3x3 lanes 88% waves" in lines[0]


def test_active_lanes(dispatch):
    """Lanes of forward_3x3 have tiles of 2 x 4 pixels; 56 x 56 pixels are 392, in blocks of 64."""
    (launch,) = dispatch.launches(layer(height=56, width=56), "forward", "NCHW")
    assert launch.active_lanes == pytest.approx(392 / 448)
    sizes = [(s, s) for s in (56, 28, 14, 7)] + [(200, 336), (100, 168), (50, 84), (25, 42)]
    for height, width in sizes:  # of ResNets, for images of 224 x 224 and 800 x 1344
        for channels in (64, 128, 256, 512):
            of = layer(channels=channels, height=height, width=width)
            for layout in LAYOUTS:
                (launch,) = dispatch.launches(of, "forward", layout)
                assert launch.active_lanes >= 0.85
                launch, *reductions = dispatch.launches(of, "backward", layout)
                assert launch.kernel.startswith("ddf::cuda::backward_3x3")
                assert launch.active_lanes >= 0.85
                assert len(reductions) <= 1
    # Lanes of gather_3x3 have a pixel.
    (launch,) = dispatch.launches(layer(height=10, width=10, dilation=2), "forward", "NCHW")
    assert launch.active_lanes == pytest.approx(100 / 128)
    # Larger windows: 19 quads in a row are three bands of at most 7, of 5 rows in two tiles.
    (launch,) = dispatch.launches(layer(height=5, width=76, kernel_size=5), "forward", "NCHW")
    assert launch.blocks == 2 * 3 * 2
    assert launch.active_lanes == pytest.approx(5 * 19 / (3 * 2 * 32))


# Addresses of the lanes of a warp in words, and what the access takes and would take without
# conflicts. The last ones are of 16 bytes.
PATTERNS = {
    "lane": (1, 1),
    "0": (1, 1),
    "2 * lane": (2, 1),
    "32 * lane": (32, 1),
    "lane % 9 + lane / 9 * 12": (2, 1),
    "4 * lane": (4, 4),
    "lane / 16 * 4": (2, 2),
    "12 * lane": (4, 4),
    "32 * (lane % 8) ": (8, 1),
    "16 * lane": (16, 4),
}


def test_bank_conflicts(tmp_path):
    """Each pattern in a kernel of its own."""
    kernels, calls = [], []
    for number, (address, (wavefronts, least)) in enumerate(PATTERNS.items()):
        four = number >= 5
        access = "float four[4]; load_shared4(four, shared + at);" if four else "shared[at] = 1;"
        kernels.append(
            f"void kernel{number}() {{ DDF_SHARED(float, shared); const int lane = thread_index();"
            f"const int at = {address}; {access} }}"
        )
        calls.append(f"  check(kernel{number}, {wavefronts}, {least});")
    source = tmp_path / "banks.cpp"
    source.write_text(
        '#include "cuda_on_host.h"\n#include <cstdio>\nusing namespace ddf::cuda;\n'
        + "\n".join(kernels)
        + """
        int wrong = 0;
        void check(void (*kernel)(), int wavefronts, int least) {
          auto& recorder = ddf::banks::recorder;
          recorder.patterns.clear();
          recorder.run(kernel, 0, 32, 8192);
          const auto& pattern = recorder.patterns.begin()->second;
          std::printf("%d %d\\n", int(pattern.wavefronts), int(pattern.least));
          wrong += recorder.patterns.size() != 1 || pattern.requests != 1 ||
                   pattern.wavefronts != wavefronts || pattern.least != least;
        }
        int main() {
        """
        + "\n".join(calls)
        + "return wrong; }\n"
    )
    program = tmp_path / "banks"
    command = ["c++", "-std=c++17", "-O1", f"-I{HERE / 'banks'}", source, "-o", program]
    subprocess.run(command, check=True)
    assert subprocess.run([program], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("batch", [1, 2, 512])
def test_every_launch_fits_the_limits_of_cuda(dispatch, batch):
    """48 KiB of shared memory, which backward_3x3 uses up for 1,024 channels, and 1,024 threads."""
    most = 0
    for of in (layer(channels=2048, height=7, width=7), *(of for of, _ in recipes())):
        for layout in LAYOUTS:
            for kind in ("forward", "backward", *(["pack"] if of.op == "ddf" else [])):
                for launch in dispatch.launches(of, kind, layout, batch=batch):
                    assert 1 <= launch.blocks < 2**31 and launch.threads <= 1024
                    most = max(most, launch.shared_bytes)
    assert most <= 48 * 1024
    assert (most == 48 * 1024) == (batch == 512)
