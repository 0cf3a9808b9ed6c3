"""tools/benchmark.py runs, reports what it measured and refuses nonsense."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PEERS = {"reference", "unfold", "depthwise conv", "dense conv", "ddf spatial", "unfold spatial"}
PEERS |= {"carafe", "copy"}


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "benchmark.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
    )


def test_op_reports_every_case(tmp_path):
    out, picture = tmp_path / "report.json", tmp_path / "picture.png"
    options = ["--shapes", "1,4,5,6", "2,8,9,7", "--dtype", "float32", "bfloat16"]
    options += ["--stride", "2", "--kernel-size", "3", "5", "--groups", "2"]
    options += ["--repeats", "2", "--threads", "1", "--json", str(out), "--plot", str(picture)]
    result = benchmark("op", *options)
    assert result.returncode == 0, result.stderr
    assert "measuring" in result.stderr  # the progress bar
    assert "carafe is left out: it has no stride" in result.stdout
    # The command, and for each setting a row of times and one of ratios.
    assert result.stdout.count("1,4,5,6") == 1 + 2 * 8
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(out.read_text())
    keys = ("layout", "dtype", "kernel_size", "shape")
    assert [tuple(row[key] for key in keys) for row in report["rows"]] == list(
        itertools.product(
            ["nchw", "channels_last"], ["float32", "bfloat16"], [3, 5], [[1, 4, 5, 6], [2, 8, 9, 7]]
        )
    )
    for row in report["rows"]:
        assert (row["stride"], row["groups"]) == (2, 2)
        assert set(row["milliseconds"]) == {"ddf", *PEERS} - {"carafe"}
        assert all(0 < t["least"] <= t["median"] for t in row["milliseconds"].values())
        assert set(row["peak_extra_bytes"]) == {"ddf", "unfold"}
        speed = row["bytes"] / row["milliseconds"]["ddf"]["least"] / 1e6
        assert row["of_copy_speed"] * row["copy_gb_per_s"] == pytest.approx(speed)
    assert report["machine"]["threads"] == 1
    first, second = (row["ratios"]["ddf/conv"] for row in report["rows"][:2])
    mean = report["geometric_means"][0]
    assert (mean["layout"], mean["dtype"], mean["kernel_size"]) == ("nchw", "float32", 3)
    assert mean["ratios"]["ddf/conv"] == pytest.approx((first * second) ** 0.5)


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "tools" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["benchmark"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(module, monkeypatch) -> Callable[..., argparse.Namespace]:
    def parse(*options: str) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "op", *options])
        return module.parse_args()

    return parse


@pytest.mark.parametrize(
    "options, elements, outputs",
    [
        # 4 * 5 * 6 features and outputs, 4 * 9 taps of channels, 2 * 9 * 5 * 6 of pixels
        ([], 2 * 120 + 576, 1),
        (["--pass", "grad_features"], 2 * 120 + 576, 1),
        (["--pass", "grad_filters"], 2 * 120 + 2 * 576, 2),
        (["--pass", "backward"], 3 * 120 + 2 * 576, 3),
        (["--backward"], 5 * 120 + 3 * 576, 4),
    ],
)
def test_what_a_pass_makes_and_moves(module, arguments, options, elements, outputs):
    args = arguments(*options)
    setting = module.Setting("channels_last", "float64", 3, 1, 2)
    case = module.Case(setting, (1, 4, 5, 6))
    assert case.bytes_moved(args.which) == 8 * elements
    calls = module.make_calls(case, args)
    assert len(calls["ddf"]()) == outputs
    for name in ("reference", "unfold"):
        torch.testing.assert_close(calls["ddf"](), calls[name]())
    torch.testing.assert_close(calls["ddf spatial"](), calls["unfold spatial"]())


def test_only_the_peers_asked_for_are_timed(module, arguments):
    args = arguments("--peers", "copy", "depthwise conv", "--repeats", "1")
    case = module.Case(module.Setting("nchw", "float32", 3, 2, 1), (1, 4, 5, 6))
    row = module.measure(case, args)
    assert set(row["milliseconds"]) == {"ddf", "depthwise conv", "copy"}
    assert set(row["ratios"]) == set(row["ratios_of_medians"]) == {"ddf/conv"}
    assert set(module.measure(case, arguments("--peers"))["milliseconds"]) == {"ddf"}


@pytest.mark.parametrize("size", [10**5, 10**7, 10**9])
def test_buffers_take_turns_on_a_gpu(module, monkeypatch, size):
    cache = 60_000_000
    properties = SimpleNamespace(L2_cache_size=cache)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    count = module.sets_of_buffers(size, "cuda")
    assert count * size >= 3 * cache and (count - 1) * size < 3 * cache
    assert module.sets_of_buffers(size, "cpu") == 1


@pytest.mark.cuda
@pytest.mark.parametrize("options", [[], ["--pass", "backward"], ["--backward"]], ids=str)
def test_op_on_a_gpu(options, tmp_path):
    out = tmp_path / "report.json"
    few = ["--device", "cuda", "--shapes", "8,512,7,7", "--repeats", "2", "--json", str(out)]
    result = benchmark("op", *few, "--dtype", "bfloat16", *options)
    assert result.returncode == 0, result.stderr
    for row in json.loads(out.read_text())["rows"]:
        assert 0 < row["of_copy_speed"] < 1.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["op", "--shapes", "8,64,56"], "'8,64,56' is not B,C,H,W, as in 8,64,56,56"),
        (["op", "--shapes", "8,64,0,56"], "is not B,C,H,W"),
        (["op", "--kernel-size", "4"], "'4' is not odd"),
        (["op", "--repeats", "0"], "'0' is not a positive integer"),
        (["op", "--groups", "3"], "--groups 3 must divide the 64 channels"),
        (["op", "--dtype", "int8"], "invalid choice: 'int8'"),
        ([], "command"),
    ],
)
def test_bad_options_are_named(module, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        module.parse_args()
    assert stopped.value.code == 2 and message in capsys.readouterr().err
