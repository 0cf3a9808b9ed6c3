"""The metafiles name every config, with correct data."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch.utils.flop_counter import FlopCounterMode

from ddf_mm.ops import backend_info

ROOT = Path(__file__).parents[2]
FOLDERS = ("classification", "detection", "segmentation", "upsampling")
SHAPES = {"ImageNet-1k": 224, "CIFAR-10": 32, "1,437 of scikit-learn's digits": 48}


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def models(folder: str) -> list[dict]:
    return read(ROOT / "configs" / folder / "metafile.yml")["Models"]


CLASSIFIERS = {model["Name"]: model for model in models("classification")}


def test_index_names_every_metafile():
    named = read(ROOT / "model-index.yml")["Import"]
    assert sorted(named) == [f"configs/{folder}/metafile.yml" for folder in FOLDERS]
    assert set(FOLDERS) == {path.parent.name for path in ROOT.glob("configs/[!_]*/*.py")}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_config_is_listed_once_by_its_name(folder):
    listed = sorted((model["Config"], model["Name"]) for model in models(folder))
    configs = (ROOT / "configs" / folder).glob("*.py")
    assert listed == sorted((f"configs/{folder}/{path.name}", path.stem) for path in configs)


def test_configs_import_nothing():
    """mmengine 0.10.7 treats a config with an import, even of the standard library, as a lazy one,
    and refuses to mix it with others."""
    importing = [
        path.name
        for path in ROOT.glob("configs/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert not importing


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_result_without_its_source_and_no_missing_weights(folder):
    for model in models(folder):
        assert ("Results" in model) == ("Results From" in model["Metadata"])
        # `mim download` fails on null.
        assert model.get("Weights", "https://") is not None


def test_accuracies_are_those_of_the_readme():
    readme = (ROOT / "configs" / "classification" / "README.md").read_text()
    published = dict(re.findall(r"\| \[([\w-]+)\]\([\w.-]+\) \| [\d,]+ \| ([\d.]+) \|", readme))
    assert len(published) == 4
    listed = {
        name: str(model["Results"][0]["Metrics"]["Top 1 Accuracy"])
        for name, model in CLASSIFIERS.items()
        if "not reproduced" in model["Metadata"].get("Results From", "")
    }
    assert listed == published


def build(name: str) -> torch.nn.Module:
    pytest.importorskip("mmpretrain")
    cfg = Config.fromfile(ROOT / CLASSIFIERS[name]["Config"])
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model).eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_parameters(name):
    with torch.device("meta"):
        model = build(name)
    metadata = CLASSIFIERS[name]["Metadata"]
    assert sum(p.numel() for p in model.parameters()) == metadata["Parameters"]


# The others differ only in depth or classes; counting takes a second for each.
@pytest.mark.parametrize(
    "name",
    [
        "ddf-mul-resnet50_8xb128_in1k",
        "ddf-mul-resnet50_8xb16_cifar10",
        "ddf-mul-resnet26_digits",
    ],
)
def test_flops(name):
    if backend_info()["cpu"] != "compiled":
        pytest.skip("the formula in plain PyTorch has no FLOP count")
    metadata = CLASSIFIERS[name]["Metadata"]
    size = SHAPES[metadata["Training Data"]]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        build(name)(torch.zeros(1, 3, size, size), mode="tensor")
    assert counter.get_total_flops() == 2 * metadata["FLOPs"]
