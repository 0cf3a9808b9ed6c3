"""tools/convert_ddfnet.py, against the official network written with torchvision and unfold."""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from official_network import classifier, official
from torchvision.models import resnet101

from ddf_mm.engine import conversion
from ddf_mm.engine.cli import UserError
from ddf_mm.models import DDFResNet

ROOT = Path(__file__).resolve().parents[2]


TOOL = str(ROOT / "tools" / "convert_ddfnet.py")


@pytest.fixture(scope="module")
def networks():
    return {combine: official(combine) for combine in conversion.COMBINES}


@pytest.fixture(scope="module")
def state_dict(networks):
    return networks["mul"].state_dict()


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
    runpy.run_path(TOOL, run_name="__main__")


@pytest.fixture
def refuses(monkeypatch, capsys):
    """Runs the tool, which must fail with one line that contains the message."""

    def check(message, *arguments):
        with pytest.raises(SystemExit):
            run(monkeypatch, *arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("convert_ddfnet.py: error: ")
        assert re.search(message, line), line

    return check


@pytest.mark.parametrize("combine", conversion.COMBINES)
def test_logits_equal_the_official_ones(networks, combine, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mmpretrain")
    src, dst = tmp_path / "weights.pth", tmp_path / "ddf.pth"
    torch.save(networks[combine].state_dict(), src)
    run(monkeypatch, src, dst, "--kernel-combine", combine)
    printed = capsys.readouterr().out
    assert f"DDF-ResNet50, {combine} (from --kernel-combine)" in printed
    assert "16,843,748" in printed
    assert hashlib.sha256(dst.read_bytes()).hexdigest() in printed

    checkpoint = torch.load(dst, weights_only=True)
    assert checkpoint["meta"]["backbone"]["kernel_combine"] == combine
    model = classifier(50, combine)
    model.load_state_dict(checkpoint["state_dict"])
    # In float64: the random weights amplify the rounding of float32 to 1e-3 of logits around 10.
    images = 3 * torch.randn(2, 3, 97, 128, dtype=torch.float64)
    with torch.no_grad():
        expected = copy.deepcopy(networks[combine]).double()(images)
        found = model.double()(images)
    assert expected.std() > 1
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_the_file_starts_a_detector(state_dict, tmp_path, monkeypatch):
    src, dst = tmp_path / "ddf_mul_resnet50.pth", tmp_path / "ddf.pth"
    torch.save(state_dict, src)
    run(monkeypatch, src, dst)
    init_cfg = dict(type="Pretrained", checkpoint=str(dst), prefix="backbone.")
    backbone = DDFResNet(50, frozen_stages=1, norm_eval=True, init_cfg=init_cfg)
    backbone.init_weights()
    loaded = backbone.state_dict()
    assert all(torch.equal(loaded[name], state_dict[name]) for name in loaded)


def test_backbone_only(state_dict, tmp_path, monkeypatch):
    src, dst = tmp_path / "ddf_mul_resnet50.pth", tmp_path / "ddf.pth"
    torch.save(state_dict, src)
    run(monkeypatch, src, dst, "--backbone-only", "--hash-name")
    (written,) = tmp_path.glob("ddf-*.pth")
    assert written.stem == "ddf-" + hashlib.sha256(written.read_bytes()).hexdigest()[:8]
    DDFResNet(50).load_state_dict(torch.load(written, weights_only=True)["state_dict"])


def test_training_checkpoint(state_dict, tmp_path):
    """A checkpoint of timm's distributed training: prefixes, options, a moving average."""
    averaged = {f"module.{name}": value + 1 for name, value in state_dict.items()}
    path = tmp_path / "model_best.pth.tar"
    torch.save(
        dict(
            epoch=3,
            arch="ddf_add_resnet50",
            state_dict={f"module.{name}": value for name, value in state_dict.items()},
            state_dict_ema=averaged,
            optimizer=dict(state={}, param_groups=[dict(lr=0.1)]),
            args=argparse.Namespace(model="ddf_add_resnet50", lr=0.1),
            metric=79.1,
        ),
        path,
    )
    for weights, expected, is_average in [
        ("auto", averaged["module.bn1.weight"], True),
        ("ema", averaged["module.bn1.weight"], True),
        ("model", state_dict["bn1.weight"], False),
    ]:
        network = conversion.read_official(str(path), weights)
        assert network.averaged is is_average
        assert torch.equal(network.weights["bn1.weight"], expected)
    assert conversion.find_combine(network, path.name)[0] == "add"
    with pytest.raises(UserError, match=r"--kernel-combine mul or add is needed: .* disagree"):
        conversion.find_combine(network, "ddf-mul-resnet50.pth")


def test_without_a_running_average(state_dict, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(dict(state_dict=state_dict, epoch=1), path)
    assert not conversion.read_official(str(path)).averaged
    with pytest.raises(UserError, match=r"lacks weights under 'state_dict_ema' or .*'epoch'"):
        conversion.read_official(str(path), "ema")


@pytest.mark.parametrize("name, combine", [("ddf_mul_resnet50-1a2b.pth", "mul"), ("x.pth", None)])
def test_combine_of_name(name, combine):
    assert conversion.combine_of_name(name) == combine


def test_combination_is_required_if_no_name_has_it(networks, tmp_path, refuses, monkeypatch):
    for combine, network in networks.items():
        src = tmp_path / f"{combine}.pth"
        torch.save(network.state_dict(), src)
        refuses("--kernel-combine mul or add is needed: neither the checkpoint nor", src, "a.pth")
    assert not (tmp_path / "a.pth").exists()


def test_other_depths_and_sizes_are_found():
    """The network's arguments are derived from the sizes of its weights."""
    for arguments in [
        dict(depth=101),
        dict(depth=152, in_channels=4),
        dict(depth=26, base_channels=32, stem_channels=16, head=2, kernel_size=5, se_ratio=0.5),
    ]:
        with torch.device("meta"):
            weights = DDFResNet(**arguments).state_dict()
        found = conversion._arguments_of(weights, "a.pth")
        assert {name: found[name] for name in arguments} == arguments
        conversion._require_equal_names(weights, found, "a.pth")


def drop(weights):
    del weights["layer3.2.bn2.weight"]


def add(weights):
    weights["layer1.0.se.conv.weight"] = torch.ones(1)


def resize(weights):
    weights["layer2.0.conv1.weight"] = torch.ones(3, 3)


def shorten(weights):
    for name in [name for name in weights if name.startswith("layer3.5.")]:
        del weights[name]


def plain(weights):
    weights.clear()
    with torch.device("meta"):
        weights.update({n: torch.zeros(v.shape) for n, v in resnet101().state_dict().items()})


def convert_again(weights):
    for name in list(weights):
        weights[f"backbone.{name}"] = weights.pop(name)


@pytest.mark.parametrize(
    "change, message",
    [
        (drop, r"DDF-ResNet50: .*Missing key.*: \"layer3.2.bn2.weight\""),
        (add, r"Unexpected key.*: \"layer1.0.se.conv.weight\""),
        (resize, r"layer2.0.conv1.weight: .*\[3, 3\].*\[128, 256, 1, 1\]"),
        (shorten, r"stages of \(3, 4, 5, 3\) blocks; DDFResNet supports 26: \(2, 2, 2, 2\)"),
        (
            plain,
            r"not the checkpoint of a DDF-ResNet: .* 'layer1.0.conv2.spatial_branch.0.weight'",
        ),
        (
            convert_again,
            r"is not an official checkpoint: its parameter names start with 'backbone.'",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_is_refused(state_dict, tmp_path, refuses, change, message):
    weights = dict(state_dict)
    change(weights)
    src, dst = tmp_path / "ddf_mul_resnet50.pth", tmp_path / "ddf.pth"
    torch.save(weights, src)
    refuses(message, src, dst)
    assert list(tmp_path.iterdir()) == [src]


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_that_would_run_code_is_refused(tmp_path, refuses):
    src, made = tmp_path / "ddf_mul_resnet50.pth", tmp_path / "made"
    torch.save(dict(state_dict=dict(weight=Attack(str(made)))), src)
    refuses("which could execute code", src, tmp_path / "ddf.pth")
    assert not made.exists()


def test_paths(state_dict, tmp_path, monkeypatch, refuses):
    src = tmp_path / "ddf_mul_resnet50.pth"
    torch.save(state_dict, src)
    refuses("src 'no.pth' is not a file", "no.pth", tmp_path / "a.pth")
    refuses("in a folder that does not exist", src, tmp_path / "no" / "a.pth")
    existing = tmp_path / "a.pth"
    existing.write_text("mine")
    refuses("exists; --overwrite replaces it", src, existing)
    assert existing.read_text() == "mine"
    run(monkeypatch, src, existing, "--overwrite")
    assert "state_dict" in torch.load(existing, weights_only=True)


def test_config(state_dict, tmp_path, monkeypatch, refuses):
    pytest.importorskip("mmpretrain")
    src = tmp_path / "ddf_mul_resnet50.pth"
    torch.save(state_dict, src)
    configs = ROOT / "configs" / "classification"
    run(
        monkeypatch,
        src,
        tmp_path / "a.pth",
        "--config",
        configs / "ddf-mul-resnet50_8xb128_in1k.py",
    )
    for config, message in [
        ("ddf-add-resnet50_8xb128_in1k.py", "kernel_combine='add', the checkpoint one with"),
        ("ddf-mul-resnet101_8xb128_in1k.py", "depth=101, the checkpoint one with depth=50"),
    ]:
        refuses(message, src, tmp_path / "b.pth", "--config", configs / config)
    assert not (tmp_path / "b.pth").exists()
