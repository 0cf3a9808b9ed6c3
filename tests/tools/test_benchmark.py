"""tools/benchmark.py: reports, measured calls and error messages."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddf_mm.benchmark import family, operation, timing
from ddf_mm.ops import backend_info

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(ROOT / "tools" / "benchmark.py")
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
    assert report["machine"]["threads"] == 1 and report["machine"]["load"] >= 0
    first, second = (row["ratios"]["ddf/conv"] for row in report["rows"][:2])
    mean = report["geometric_means"][0]
    assert (mean["layout"], mean["dtype"], mean["kernel_size"]) == ("nchw", "float32", 3)
    assert mean["ratios"]["ddf/conv"] == pytest.approx((first * second) ** 0.5)


def test_layer_reports_every_layer(tmp_path):
    out, picture = tmp_path / "report.json", tmp_path / "picture.png"
    options = ["--shapes", "1,8,5,6", "--stride", "2", "--groups", "2", "--repeats", "1"]
    options += ["--train", "--threads", "1", "--json", str(out), "--plot", str(picture)]
    result = benchmark("layer", *options)
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(out.read_text())["rows"]
    assert [row["layout"] for row in rows] == ["nchw", "channels_last"]
    layers = {"ddf", "ddf modules", "depthwise conv", "dense conv"}
    layers |= {"ddf spatial", "unfold spatial"}
    for row in rows:
        assert set(row["milliseconds"]) == set(row["peak_extra_bytes"]) == layers
        ratios = {"ddf/conv", "dense/ddf", "unfold/ddf spatial", "modules/ddf"}
        assert set(row["ratios"]) == ratios


@pytest.mark.parametrize("mode", [[], ["--train"]])
def test_upsample_reports_every_layer(mode, tmp_path):
    out = tmp_path / "report.json"
    options = ["--shapes", "1,8,5,6", "--scale", "3", "--repeats", "1", "--threads", "1"]
    result = benchmark("upsample", *options, *mode, "--json", str(out))
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["layout"] for row in rows] == ["nchw", "channels_last"]
    for row in rows:
        assert set(row["milliseconds"]) == {"ddf", "composition", "carafe", "nearest"}
        assert set(row["ratios"]) == {"composition/ddf", "carafe/ddf"}


def test_cost_per_pixel_of_reports(tmp_path):
    machine = {"processor": "p", "command": "benchmark.py c"}

    def write(name: str, command: str, rows: list[dict]) -> str:
        path = tmp_path / name
        options = {"command": command}
        path.write_text(json.dumps({"machine": machine, "options": options, "rows": rows}))
        return str(path)

    def milliseconds(least: float) -> dict[str, float]:
        return {"least": least, "median": 2 * least}

    of_op = [
        {"shape": [b, 10, 10, 20], "layout": "nchw", "milliseconds": {"ddf": milliseconds(t)}}
        for b, t in ((1, 0.004), (3, 0.018))
    ]
    network = dict(config="configs/net.py+folded", mode="eval", layout="channels_last")
    of_model = [
        {**network, "batch_size": 2, "shape": [30, 50], "milliseconds": milliseconds(0.6)},
        {**network, "batch_size": 1, "shape": [10, 20], "milliseconds": milliseconds(0.05)},
    ]
    reports = [write("a.json", "op", of_op), write("b.json", "model", of_model)]
    picture = tmp_path / "cost.png"
    script = ROOT / "benchmarks" / "cost_per_pixel.py"
    table = subprocess.run(
        [sys.executable, str(script), *reports, "--plot", str(picture)],
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    # Nanoseconds: 4000 over 10 channels of 200 pixels, 18000 over three times as many; 600000 over
    # 3000 pixels, 50000 over 200.
    assert table.splitlines()[-6:] == [
        "| batch, image | op: ddf, nchw | net+folded, eval, channels_last |",
        "|---|---|---|",
        "| 1, 10 x 20 | 2 | 250 |",
        "| 3, 10 x 20 | 3 |  |",
        "| 2, 30 x 50 |  | 200 |",
        "| most over least | 1.50 | 1.25 |",
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def run(monkeypatch) -> Callable[..., None]:
    """Runs the tool in this process, which has imported the toolboxes."""

    def run_tool(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [TOOL, *arguments])
        runpy.run_path(TOOL, run_name="__main__")

    return run_tool


def options(**given: object) -> argparse.Namespace:
    """The parsed arguments that the functions read."""
    common = dict(command="op", device="cpu", which="forward", peers=PEERS, repeats=1)
    return argparse.Namespace(**{**common, "make_calls": operation.make_calls, **given})


@pytest.mark.parametrize(
    "which, elements, outputs",
    [
        # 4 * 5 * 6 features and outputs, 4 * 9 taps of channel and 2 * 9 * 5 * 6 of spatial filters
        ("forward", 2 * 120 + 576, 1),
        ("grad_features", 2 * 120 + 576, 1),
        ("grad_filters", 2 * 120 + 2 * 576, 2),
        ("backward", 3 * 120 + 2 * 576, 3),
        ("forward+backward", 5 * 120 + 3 * 576, 4),
    ],
)
def test_outputs_and_bytes_of_a_pass(which, elements, outputs):
    setting = operation.Setting("channels_last", "float64", 3, 1, 2)
    case = operation.Case(setting, (1, 4, 5, 6))
    assert case.bytes_moved(which) == 8 * elements
    calls = operation.make_calls(case, options(which=which))
    assert len(calls["ddf"]()) == outputs
    for name in ("reference", "unfold"):
        torch.testing.assert_close(calls["ddf"](), calls[name]())
    torch.testing.assert_close(calls["ddf spatial"](), calls["unfold spatial"]())


@pytest.mark.parametrize(
    "which, needed",
    [
        ("grad_features", (True, False, False)),
        ("grad_filters", (False, True, True)),
        ("backward", (True, True, True)),
    ],
)
def test_a_pass_times_its_own_gradients_alone(which, needed):
    if backend_info()["cpu"] != "compiled":
        pytest.skip("no compiled ops")
    asked_for = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.ddf_mm.ddf_backward.default:
                asked_for.append(args[-3:])
            return func(*args, **(kwargs or {}))

    case = operation.Case(operation.Setting("nchw", "float32", 3, 1, 1), (1, 4, 5, 6))
    call = operation.make_calls(case, options(which=which))["ddf"]
    with Watch():
        call()
    assert asked_for == [needed]


def test_only_the_requested_peers_are_timed():
    case = operation.Case(operation.Setting("nchw", "float32", 3, 2, 1), (1, 4, 5, 6))
    row = operation.measure(case, options(peers=["copy", "depthwise conv"]))
    assert set(row["milliseconds"]) == {"ddf", "depthwise conv", "copy"}
    assert set(row["ratios"]) == {"ddf/conv"}
    assert set(operation.measure(case, options(peers=[]))["milliseconds"]) == {"ddf"}


@pytest.mark.parametrize("train", [False, True])
def test_layers_compute_the_same_by_either_formula(train):
    setting = operation.Setting("channels_last", "float64", 3, 2, 2)
    case = operation.Case(setting, (2, 8, 5, 6))
    layers = operation.make_layers(case, None)
    x = torch.randn(case.shape, dtype=torch.float64)
    torch.manual_seed(0)
    ours, theirs = (layers[name].double() for name in ("ddf spatial", "unfold spatial"))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    which = "forward+backward" if train else "forward"
    args = options(which=which, peers=list(layers), make_layers=operation.make_layers)
    calls = operation.make_layer_calls(case, args)
    assert set(calls) == set(layers)
    for name, call in calls.items():
        # The result and, in training, the gradients of the input and of each parameter.
        results = call()
        assert results[0].shape == (2, 8, 3, 3)
        parameters = len(list(layers[name].parameters()))
        assert len(results) == (1 + 1 + parameters if train else 1)


SMALL = {
    "digits": ("ddf_mm::classification/ddf-mul-resnet26_digits.py", "mmpretrain"),
    "resnet": ("mmpretrain::resnet/resnet18_8xb16_cifar10.py", "mmpretrain"),
    "detector": ("ddf_mm::detection/mask-rcnn_ddf-mul-r26_ddfup-fpn_digit-scenes.py", "mmdet"),
    "segmentor": ("ddf_mm::segmentation/fpn_ddf-mul-r26_ddfup-fpn_digit-scenes.py", "mmseg"),
}


@pytest.mark.parametrize(
    "names, mode",
    [(["digits", "resnet"], "eval"), (["digits"], "train"), (["detector"], "train"),
     (["segmentor"], "train"), (["detector", "segmentor"], "eval")],
    ids=str,
)  # fmt: skip
def test_models_of_every_toolbox(run, tmp_path, capsys, names, mode):
    for name in names:
        pytest.importorskip(f"{SMALL[name][1]}.structures")
    configs = []
    for name in names:
        # Configs of the checkout by path.
        scope, path = SMALL[name][0].split("::")
        configs.append(str(ROOT / "configs" / path) if scope == "ddf_mm" else SMALL[name][0])
    out, picture = tmp_path / "report.json", tmp_path / "picture.png"
    options = ["--mode", mode, "--shape", "64", "--batch-size", "2", "--repeats", "1"]
    options += ["--threads", "1", "--no-memory", "--json", str(out), "--plot", str(picture)]
    run("model", *configs, *options)
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(out.read_text())
    assert [row["config"] for row in report["rows"]] == configs
    assert report["rows"][0]["speed"] == 1
    for row, config in zip(report["rows"], configs, strict=True):
        assert (row["mode"], row["batch_size"], row["shape"]) == (mode, 2, [64, 64])
        assert 0 < row["milliseconds"]["least"] <= row["milliseconds"]["median"]
        assert set(row["parts"]) == {"backbone", "neck"}
        assert all(0 < times["least"] <= times["median"] for times in row["parts"].values())
        assert row["images_per_s"] == pytest.approx(2000 / row["milliseconds"]["median"])
        assert Path(config).stem in printed
    table = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "benchmark_table.py"), str(out)],
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    for row, config in zip(report["rows"], configs, strict=True):
        least = row["milliseconds"]["least"]
        (line,) = (x for x in table.splitlines() if x.startswith(f"| {Path(config).stem} |"))
        assert f"| {mode} | fp32 | nchw | 2 | 64x64 |" in line and f"| {least:.1f} |" in line
    if "digits" in names:
        assert report["rows"][0]["parameters"] == 589_918
    if "resnet" in names:
        # The 3x3 convolutions of four stages at 64 x 64; a strided one costs half of the others.
        full = 64 * 64 * 9 * 64**2
        stages = 4 * full + 3 * (3 * full + full // 2)
        first, shortcuts, classifier = 64 * 64 * 27 * 64, 3 * 64 * 64 * 64**2 // 2, 5120
        expected = (stages + first + shortcuts + classifier) / 1e9
        assert report["rows"][1]["gmac"] == pytest.approx(expected, rel=1e-9)


def test_a_training_step_uses_the_requested_precision():
    pytest.importorskip("mmpretrain.structures")
    from ddf_mm.benchmark import networks

    config = str(ROOT / "configs" / "classification" / "ddf-mul-resnet26_digits.py")
    args = options(cfg_options=None, compile=False)
    seen = {}
    for precision in ("fp32", "amp"):
        setting = networks.ModelSetting("train", precision, "channels_last", 2, (32, 32))
        with torch.no_grad():
            network = networks.make_network(config, setting, args)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, p=precision: seen.setdefault(p, set()).add(t.dtype) or t, lambda t: t
        ):
            network.call()
        assert timing.peak_extra_bytes(network.call, "cpu") >= 0
    assert torch.bfloat16 in seen["amp"] and torch.bfloat16 not in seen["fp32"]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_detectors_get_the_same_proposals(monkeypatch, mode):
    heads = pytest.importorskip("mmdet.models.roi_heads")
    from ddf_mm.benchmark import networks

    seen, proposals, roi_head = [], [], heads.StandardRoIHead
    for name, place in (("forward", 1), ("loss", 1)):
        method = getattr(roi_head, name)

        def record(self, *args, method=method, place=place, **kwargs):
            seen[:] = [results.bboxes.clone() for results in args[place]]
            return method(self, *args, **kwargs)

        monkeypatch.setattr(roi_head, name, record)
    setting = networks.ModelSetting(mode, "fp32", "nchw", 2, (96, 64))
    for neck in ("fpn", "ddfup-fpn"):
        config = f"configs/detection/mask-rcnn_ddf-mul-r26_{neck}_digit-scenes.py"
        args = options(cfg_options=None, compile=False)
        network = networks.make_network(str(ROOT / config), setting, args)
        # Their predictions are nested tuples of tensors, their losses dictionaries.
        assert timing.peak_extra_bytes(network.call, "cpu") >= 0
        proposals.append(list(seen))
    first, second = proposals
    assert len(first) == 2 and len(first[0]) >= 50
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for boxes in first:
        left, top, right, bottom = boxes.unbind(1)
        assert (left >= 0).all() and (left < right).all() and (right <= 64).all()
        assert (top >= 0).all() and (top < bottom).all() and (bottom <= 96).all()


@pytest.mark.parametrize("size", [10**5, 10**7, 10**9])
def test_sets_of_buffers_exceed_the_cache_of_a_gpu(monkeypatch, size):
    cache = 60_000_000
    properties = SimpleNamespace(L2_cache_size=cache)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    count = timing.sets_of_buffers(size, "cuda")
    assert count * size >= 3 * cache and (count - 1) * size < 3 * cache
    assert timing.sets_of_buffers(size, "cpu") == 1


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
        (["layer", "--groups", "3"], "--groups 3 must divide the 64 channels"),
        (["model"], "the following arguments are required: config"),
        (["model", "x.py", "--shape", "8,0"], "'8,0' is not H or H,W, as in 224 or 800,1333"),
        (["model", "x.py", "--cfg-options", "a"], "'a' is not of the form KEY=VALUE"),
        ([], "command"),
    ],
)
def test_bad_options_are_named(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "config, message",
    [
        ("no.py", "config 'no.py' is not a file"),
        ("mmpretrain::resnet/no.py", "while reading the config 'mmpretrain::resnet/no.py': File"),
        ("nobody::resnet/no.py", "config 'nobody::resnet/no.py': 'nobody' is not installed"),
        (
            "configs/upsampling/ddf-up-net_x4_digit-scenes.py",
            "must be one of mmpretrain, mmdet, mmseg",
        ),
    ],
)
def test_bad_configs_are_named(run, capsys, config, message):
    pytest.importorskip("mmpretrain")
    path = config if "::" in config else str(ROOT / config)
    with pytest.raises(SystemExit):
        run("model", path)
    err = capsys.readouterr().err
    assert message.replace("'no.py'", repr(path)) in err
    assert len(err.strip().splitlines()) == 1


def test_networks_with_changes(tmp_path):
    config = str(ROOT / "configs/classification/ddf-mul-resnet26_digits.py")
    out = tmp_path / "model.json"
    names = [config, f"{config}+folded", f"{config}+skeleton", f"{config}+skeleton+folded"]
    options = ["--no-memory", "--repeats", "1", "--threads", "1", "--json", str(out)]
    result = benchmark("model", *names, *options)
    assert result.returncode == 0, result.stderr
    for name in ("", "+folded", "+skeleton", "+skeleton+folded"):
        assert f"ddf-mul-resnet26_digits{name} " in result.stdout
    rows = json.loads(out.read_text())["rows"]
    sizes = [row["parameters"] for row in rows]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]


@pytest.mark.parametrize(
    "options, message",
    [
        (["+flat"], "unknown change +flat"),
        (["+folded", "--mode", "train"], "has no norms to train"),
    ],
)
def test_unknown_changes(options, message):
    config = str(ROOT / "configs/classification/ddf-mul-resnet26_digits.py")
    result = benchmark("model", config + options[0], *options[1:])
    assert result.returncode != 0 and message in result.stderr
    assert "Traceback" not in result.stderr


SMALL_FAMILY = {
    "carafe": [(2, 4, 5, 6), (2, 25, 10, 12)],
    "involution": [(2, 6, 5, 6), (2, 3, 7, 7, 5, 6)],
    "adaptive_conv": [(2, 3, 9, 10), (2, 5, 6, 5, 5)],
    "convex_upsample": [(2, 2, 5, 6), (2, 576, 5, 6)],
    "cspn": [(2, 8, 5, 6), (2, 1, 5, 6)],
    "apply_kernel": [(2, 49, 5, 6), (2, 3, 5, 6)],
    "dynamic_upsampling": [(2, 3, 5, 6), (2, 25, 9, 5, 6)],
}


@pytest.mark.parametrize("name", list(SMALL_FAMILY))
def test_family_compares_what_computes_the_same(name):
    member = family.MEMBERS[name]
    inputs = [torch.rand(size) for size in SMALL_FAMILY[name]]
    expected = member.ours(*inputs)
    for function in (member.unfold, member.original or member.unfold):
        torch.testing.assert_close(function(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_family_reports_every_member(tmp_path):
    assert set(family.MEMBERS) == set(SMALL_FAMILY)
    out = tmp_path / "report.json"
    options = ["--members", "convex_upsample", "dynamic_upsampling", "--repeats", "1"]
    result = benchmark("family", *options, "--threads", "1", "--backward", "--json", str(out))
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["convex_upsample", "dynamic_upsampling"]
    assert "original" not in rows[0]["milliseconds"]  # it is by unfold
    for row in rows:
        names = {"ddf_mm", "unfold"} | ({"original"} if row is rows[1] else set())
        assert set(row["milliseconds"]) == set(row["peak_extra_bytes"]) == names
        assert 0 < row["error"] < 1e-5 and min(row["milliseconds"].values()) > 0
