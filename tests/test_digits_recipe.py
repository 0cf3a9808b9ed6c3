"""The digits recipe and tools/demo.sh, with shorter trainings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("mmpretrain")
pytest.importorskip("sklearn")

from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from mmengine.runner import Runner

from ddf_mm.layers import DDFPack

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "classification" / "ddf-mul-resnet26_digits.py"
DEMO = ROOT / "tools" / "demo.sh"


@pytest.fixture(autouse=True)
def _nondeterministic_again():
    """The recipe asks torch for deterministic algorithms, which holds for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def small_config(work_dir: Path, name: str, epochs: int, config: Path = CONFIG) -> Config:
    """The recipe at half its resolution, for a quarter of its time."""
    cfg = Config.fromfile(config)
    cfg.work_dir, cfg.experiment_name, cfg.log_level = str(work_dir), name, "WARNING"
    cfg.train_cfg.max_epochs = epochs
    for dataloader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for step in dataloader.dataset.pipeline:
            if step.type == "Resize":
                step.scale = 24
            if step.type == "RandomCrop":
                step.crop_size, step.padding = 24, 3
    return cfg


def test_network_is_all_ddf():
    cfg = Config.fromfile(CONFIG)
    init_default_scope(cfg.default_scope)
    layers = [m for m in MODELS.build(cfg.model).modules() if isinstance(m, DDFPack)]
    assert len(layers) == 8
    assert {(layer.kernel_size, layer.kernel_combine) for layer in layers} == {(3, "mul")}


def test_training_and_test_images_are_different_ones():
    cfg = Config.fromfile(CONFIG)
    train, val, test = (cfg[f"{name}_dataloader"].dataset for name in ("train", "val", "test"))
    assert (train.split, val.split, test.split) == ("train", "test", "test")
    # The split depends only on these two.
    for key in ("seed", "test_size"):
        assert train.get(key) == val.get(key) == test.get(key)


def test_same_seed_gives_the_same_network(tmp_path):
    networks = []
    for i, seed in enumerate((0, 0, 1)):
        cfg = small_config(tmp_path / str(i), f"digits_seed_{i}", epochs=1)
        cfg.train_dataloader.dataset.indices = 128
        cfg.randomness.seed = seed
        runner = Runner.from_cfg(cfg)
        runner.train()
        networks.append(runner.model.state_dict())
    first, again, other = networks
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["backbone.conv1.weight"], other["backbone.conv1.weight"])


def test_inherited_through_the_package(tmp_path):
    path = tmp_path / "inherited.py"
    path.write_text(f'_base_ = "ddf_mm::classification/{CONFIG.name}"\n')
    cfg = small_config(tmp_path, "digits_inherited", epochs=1, config=path)
    cfg.train_dataloader.dataset.indices = cfg.val_dataloader.dataset.indices = 64
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 1
    for transform in cfg.train_pipeline + cfg.test_pipeline:
        TRANSFORMS.build(transform)


def run_demo(python: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(DEMO), *map(str, arguments)],
        cwd=cwd,
        env=dict(os.environ, PYTHON=python),
        capture_output=True,
        text=True,
        check=False,
    )


def test_demo_learns(tmp_path):
    """``make demo``: train.py, test.py and the plots. In 7 of its 25 epochs, unless the workflow
    asks for all."""
    epochs, least, options = 7, 80.0, ["--cfg-options", "train_cfg.max_epochs=7"]  # 92 when written
    if os.environ.get("DDF_MM_TEST_WHOLE_DEMO") == "1":
        epochs, least, options = Config.fromfile(CONFIG).train_cfg.max_epochs, 97.0, []
    result = run_demo(sys.executable, "work dir", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines()[-3:])
    assert list(lines) == ["accuracy/top1", "curve", "filters"]

    work_dir = tmp_path / "work dir"
    measured = json.loads((work_dir / "metrics.json").read_text())["accuracy/top1"]
    assert lines["accuracy/top1"] == f"{measured:.2f}"
    assert measured >= least
    assert (work_dir / f"epoch_{epochs}.pth").is_file()
    for name in ("curve", "filters"):
        with Image.open(tmp_path / lines[name]) as picture:
            assert min(picture.size) >= 600
            assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 200


@pytest.mark.parametrize("failing", ["train.py", "test.py", "plot_curves.py"])
def test_demo_stops_at_the_step_that_fails(tmp_path, failing):
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'basename "$1" >> "{calls}"\n'
        f"[[ $1 != */{failing} ]] || exit 3\n"
        f'mkdir -p "{tmp_path}/out"; echo some.pth > "{tmp_path}/out/last_checkpoint"\n'
    )
    python.chmod(0o755)
    result = run_demo(str(python), tmp_path / "out", cwd=tmp_path)
    assert result.returncode == 3
    assert calls.read_text().split()[-1] == failing
    assert "accuracy" not in result.stdout


@pytest.mark.parametrize("arguments", [("a", "b"), ("--help",)])
def test_demo_refuses_other_arguments(tmp_path, arguments):
    result = run_demo("false", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "demo.sh: error: usage: demo.sh [WORK_DIR [OPTION OF train.py]...]\n"
