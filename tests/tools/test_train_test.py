"""``tools/train.py`` and ``tools/test.py``, run on tiny trainings of a real toolbox on a CPU.

The runs share one import of the toolbox, which takes longer than all of them. One run, the first,
is a plain subprocess.
"""

import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from fork_server import ROOT, ForkServer, tool_environment
from PIL import Image

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or find_spec("mmpretrain") is None,
    reason="needs mmpretrain, and a system that forks processes",
)

TRAIN, TEST = ROOT / "tools" / "train.py", ROOT / "tools" / "test.py"

CONFIG = """
custom_imports = dict(imports=["recorder"], allow_failed_imports=False)
default_scope = "mmpretrain"
model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(num_classes=2, mean=[127.0] * 3, std=[64.0] * 3, to_rgb=True),
    backbone=dict(type="ResNet_CIFAR", depth=18, base_channels=4, stem_channels=4, num_stages=2,
                  strides=(1, 2), dilations=(1, 1), out_indices=(1,)),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=2, in_channels=8, topk=(1,),
              loss=dict(type="CrossEntropyLoss")),
)
pipeline = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="CustomDataset", data_root="../data", data_prefix="train",
                 pipeline=pipeline))
val_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="CustomDataset", data_root="../data", data_prefix="val",
                 pipeline=pipeline))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type="Accuracy", topk=(1,))
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.01, momentum=0.9))
param_scheduler = dict(type="LinearLR", start_factor=0.5, by_epoch=True, end=4)
visualizer = dict(type="UniversalVisualizer", vis_backends=[dict(type="LocalVisBackend")])
custom_hooks = [dict(type="Recorder")]
"""

RECORDER = '''
"""Writes down what happened in a run, and a hook with a fault."""
import errno
import json
import os
import resource
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Recorder(Hook):
    def __init__(self):
        self.record = dict(dtypes=[], epochs=[], parameter_dtypes=[])

    def before_run(self, runner):
        model = getattr(runner.model, "module", runner.model)
        model = getattr(model, "module", model)
        conv = model.backbone.conv1
        conv.register_forward_hook(lambda _, args, out: self.note("dtypes", out.dtype))
        self.note("parameter_dtypes", conv.weight.dtype)

    def note(self, key, value):
        if str(value) not in self.record[key]:
            self.record[key].append(str(value))

    def before_train_epoch(self, runner):
        self.record["epochs"].append(runner.epoch)
        self.record["lr"] = runner.optim_wrapper.get_lr()["lr"]

    def after_run(self, runner):
        self.record["optim_wrapper"] = type(runner.optim_wrapper).__name__
        self.record["deterministic"] = runner.deterministic
        self.record["seed"] = runner.seed
        Path(runner.work_dir, "record.json").write_text(json.dumps(self.record))


@HOOKS.register_module()
class Quota(Hook):
    def before_save_checkpoint(self, runner, checkpoint):
        def fsync(_):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        os.fsync = fsync


@HOOKS.register_module()
class SizeLimit(Hook):
    def before_save_checkpoint(self, runner, checkpoint):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, resource.RLIM_INFINITY))


@HOOKS.register_module()
class FaultyHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        {}["no such key"]


@HOOKS.register_module()
class SilentHook(Hook):
    def __init__(self, out_dir=None, **kwargs):
        pass
'''

PRELOAD = """
import matplotlib.pyplot
from mmengine.utils.dl_utils import collect_env
from mmpretrain.utils import register_all_modules

import ddf_mm.engine.evaluation

register_all_modules(init_default_scope=False)
collect_env()  # for the modules that it imports
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder, with a space in its name, of images, a config and the module that it imports."""
    folder = tmp_path_factory.mktemp("a project")
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in ("cat", "dog"):
            images = folder / "data" / split / label
            images.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / f"{i}.png")
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.py").write_text(CONFIG)
    (folder / "recorder.py").write_text(RECORDER)
    (folder / "here").mkdir()
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Run a script in another folder than those of the config and of the project."""
    with ForkServer(folder, PRELOAD) as server:
        yield server.run


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """The work folder of two epochs, trained with options that must not affect each other."""
    process = subprocess.run(
        [sys.executable, TRAIN, "../configs/tiny.py", "--seed", "7", "--deterministic"],
        cwd=folder / "here",
        env=tool_environment(folder),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return folder / "here" / "work_dirs" / "tiny"


def _record(work_dir: Path) -> dict:
    return json.loads((work_dir / "record.json").read_text())


def test_train_from_another_folder(trained):
    record = _record(trained)
    assert record["epochs"] == [0, 1]
    assert record["dtypes"] == ["torch.float32"]
    assert record["optim_wrapper"] == "OptimWrapper"
    assert (record["seed"], record["deterministic"]) == (7, True)
    assert {path.name for path in trained.glob("*.pth")} == {"epoch_1.pth", "epoch_2.pth"}


@pytest.mark.parametrize("resume", ["auto", "checkpoint"])
def test_resume_goes_on_at_the_next_epoch(run, folder, trained, resume):
    work_dir = folder / f"resume_{resume}"
    work_dir.mkdir()
    if resume == "auto":
        (work_dir / "last_checkpoint").write_text(str(trained / "epoch_1.pth"))
        arguments = ["--resume"]
    else:
        arguments = ["--resume", "work_dirs/tiny/epoch_1.pth"]
    result = run(TRAIN, "../configs/tiny.py", "--work-dir", work_dir, *arguments)
    assert result.code == 0, result.stderr
    assert _record(work_dir)["epochs"] == [1]
    resumed, straight = (
        torch.load(path / "epoch_2.pth", weights_only=False)["param_schedulers"]
        for path in (work_dir, trained)
    )
    assert resumed == straight


def test_amp_trains_in_bfloat16(run, folder, trained):
    result = run(
        TRAIN, "../configs/tiny.py", "--work-dir", "../amp", "--amp", "--no-validate",
        "--cfg-options", "train_cfg.max_epochs=1",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    record = _record(folder / "amp")
    assert record["dtypes"] == ["torch.bfloat16"]
    assert record["parameter_dtypes"] == ["torch.float32"]
    assert record["optim_wrapper"] == "CPUAmpOptimWrapper"
    assert result.stdout.count("CPUAmpOptimWrapper instead of AmpOptimWrapper") == 1
    assert "accuracy/top1" not in result.stdout


def test_config_written_for_a_gpu(run, folder):
    """AmpOptimWrapper with float16, one worker process, settings that only workers have."""
    result = run(
        TRAIN, "../configs/tiny.py", "--work-dir", "../gpu_config", "--auto-scale-lr",
        "--cfg-options", "train_cfg.max_epochs=1", "optim_wrapper.type=AmpOptimWrapper",
        "optim_wrapper.dtype=float16", "auto_scale_lr.base_batch_size=8",
        "train_dataloader.persistent_workers=True", "train_dataloader.prefetch_factor=2",
        "val_dataloader.num_workers=1",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    record = _record(folder / "gpu_config")
    assert record["dtypes"] == ["torch.bfloat16", "torch.float32"]  # training, validation
    # Batches of 4 halve the rate that is meant for 8, warm-up halves it again.
    assert record["lr"] == pytest.approx([0.01 / 4])


def test_slurm_without_a_gpu(run, folder):
    result = run(
        TRAIN, "../configs/tiny.py", "--work-dir", "../slurm", "--launcher", "slurm",
        "--cfg-options", "train_cfg.max_epochs=1",
        env=dict(SLURM_PROCID="0", SLURM_NTASKS="1", SLURM_LOCALID="0", SLURM_NODELIST="n1",
                 MASTER_ADDR="127.0.0.1", MASTER_PORT="29417"),
    )  # fmt: skip
    assert result.code == 0, result.stderr
    assert _record(folder / "slurm")["epochs"] == [0]
    assert "device_ids=None" in (folder / "slurm" / "tiny.py").read_text()


def test_evaluate(run, folder, trained):
    result = run(
        TEST, "../configs/tiny.py", "work_dirs/tiny/epoch_2.pth", "--work-dir", "../tested",
        "--out", "../metrics.json", "--out-item", "metrics", "--show-dir", "../shown",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() == {"accuracy/top1"}
    assert f"accuracy/top1: {metrics['accuracy/top1']:.4f}" in result.stdout
    assert len(list((folder / "shown").glob("*.png"))) == 2  # cat/0 and dog/0 share a name
    assert _record(folder / "tested")["dtypes"] == ["torch.float32"]


def test_evaluate_with_amp_and_tta(run, folder, trained):
    result = run(
        TEST, "../configs/tiny.py", trained / "epoch_2.pth", "--work-dir", "../tested_amp",
        "--amp", "--tta", "--out", "../predictions.pkl",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    predictions = pickle.loads((folder / "predictions.pkl").read_bytes())
    assert len(predictions) == 4
    assert {sample["pred_score"].numel() for sample in predictions} == {2}
    assert _record(folder / "tested_amp")["dtypes"] == ["torch.bfloat16"]
    assert "AverageClsScoreTTA" in (folder / "tested_amp" / "tiny.py").read_text()


CFG = "../configs/tiny.py"
DATASET = "train_dataloader.dataset"

TRAIN_ERRORS = {
    "no config": (["nowhere.py"], 2, ["'nowhere.py'"]),
    "folder as config": (["../configs"], 2, ["'../configs'"]),
    "not a config": (["../notes.txt"], 2, ["../notes.txt", ".py"]),
    "option without value": ([CFG, "--cfg-options", "depth"], 2, ["'depth'", "KEY=VALUE"]),
    "brackets": ([CFG, "--cfg-options", "a=[1,2"], 2, ["a=[1,2"]),
    "option below a number": (
        [CFG, "--cfg-options", "model.backbone.depth.x=1"],
        2,
        ["--cfg-options model.backbone.depth.x"],
    ),
    "unknown option": ([CFG, "--fast"], 2, ["--fast"]),
    "toolbox": ([CFG, "--cfg-options", "default_scope=mmocr"], 1, ["'mmocr'", "install"]),
    "base of a toolbox": (["../configs/base.py"], 1, ["mmocr"]),
    "missing base": (["../configs/missing_base.py"], 1, ["no_such_base.py"]),
    "custom import": (["../configs/import.py"], 1, ["reading the config", "no_such_module"]),
    "config that does not parse": (
        ["../configs/syntax.py"],
        1,
        ["while reading the config '../configs/syntax.py': SyntaxError"],
    ),
    "config of JSON that does not parse": (
        ["../configs/syntax.json"],
        1,
        ["while reading the config '../configs/syntax.json': JSONDecodeError"],
    ),
    "config of YAML that does not parse": (
        ["../configs/syntax.yaml"],
        1,
        ["while reading the config '../configs/syntax.yaml': ParserError"],
    ),
    "pure-Python config that does not parse": (
        ["../configs/pure.py"],
        1,
        ["while reading the config '../configs/pure.py': SyntaxError"],
    ),
    "pure-Python config without its base": (
        ["../configs/pure_base.py"],
        1,
        ["while reading the config '../configs/pure_base.py': ConfigParsingError", "nothing.py"],
    ),
    "config that is no text": (["../configs/bytes.py"], 1, ["while reading the config"]),
    "suffix that matches nothing": (
        [CFG, "--cfg-options", f"{DATASET}.extensions=('.tif',)"],
        1,
        ["while building the training data", "CustomDataset"],
    ),
    "prefix": (
        [CFG, "--cfg-options", "model.backbone.init_cfg.type=Pretrained",
         "model.backbone.init_cfg.checkpoint=../weights.pth",
         "model.backbone.init_cfg.prefix=encoder."],
        1,
        ["initializing ResNet_CIFAR from the checkpoint '../weights.pth' with the prefix 'encoder"],
    ),
    "no network": (
        [CFG, "--cfg-options", "load_from=https://localhost:9/a.pth"],
        1,
        ["while loading the checkpoint 'https://localhost:9/a.pth': URLError"],
    ),
    "no network, torchvision": (
        [CFG, "--cfg-options", "load_from=torchvision://resnet18"],
        1,
        ["while loading the checkpoint 'torchvision://resnet18': URLError"],
    ),
    "no network, OpenMMLab": (
        [CFG, "--cfg-options", "model.backbone.init_cfg.type=Pretrained",
         "model.backbone.init_cfg.checkpoint=open-mmlab://vgg16_caffe"],
        1,
        ["while initializing ResNet_CIFAR from the checkpoint 'open-mmlab://vgg16_caffe': URLErr"],
    ),
    "no such model of torchvision": (
        [CFG, "--cfg-options", "load_from=torchvision://resnet19"],
        1,
        ["while loading the checkpoint 'torchvision://resnet19'"],
    ),
    "no network, to resume": (
        [CFG, "--resume", "https://localhost:9/a.pth"],
        1,
        ["while loading the checkpoint 'https://localhost:9/a.pth': URLError"],
    ),
    "no network, for a backbone": (
        [CFG, "--cfg-options", "model.backbone.init_cfg.type=Pretrained",
         "model.backbone.init_cfg.checkpoint=http://localhost:9/a.pth"],
        1,
        ["while initializing ResNet_CIFAR from the checkpoint 'http://localhost:9/a.pth'"],
    ),
    "hook": (
        [CFG, "--cfg-options", "custom_hooks.0.type=NoHook"],
        1,
        ["while building the hooks", "NoHook"],
    ),
    "validation data": (
        [CFG, "--cfg-options", "val_dataloader.dataset.data_root=no_data"],
        1,
        ["while building the validation data", "no_data"],
    ),
    "metric": (
        [CFG, "--cfg-options", "val_evaluator.type=NoMetric"],
        1,
        ["while building the evaluator", "NoMetric"],
    ),
    "optimizer": (
        [CFG, "--cfg-options", "optim_wrapper.optimizer.rate=1"],
        1,
        ["while building the optimizer", "rate"],
    ),
    "evaluation": (
        [CFG, "--cfg-options", "val_evaluator.topk=(1,9)"],
        1,
        ["while evaluating: "],
    ),
    "runner": ([CFG, "--cfg-options", "runner_type=NoRunner"], 1, ["runner_type 'NoRunner'"]),
    "unknown type": (
        [CFG, "--cfg-options", "model.backbone.type=NoNet"],
        1,
        ["while building the model", "NoNet is not in the mmpretrain::model registry"],
    ),
    "unknown scoped type": (
        [CFG, "--cfg-options", "model.backbone.type=mmpretrain.NoNet"],
        1,
        ["building the model", "mmpretrain.NoNet is"],
    ),
    "data folder": (
        [CFG, "--cfg-options", f"{DATASET}.data_root=no_data"],
        1,
        ["while building the training data: FileNotFoundError", "no_data"],
    ),
    "annotation file": ([CFG, "--cfg-options", f"{DATASET}.ann_file=no.txt"], 1, ["no.txt"]),
    "empty data folder": ([CFG, "--cfg-options", f"{DATASET}.data_root=../empty"], 1, ["empty"]),
    "image, in a worker": (
        [CFG, "--cfg-options", f"{DATASET}.ann_file=../images.txt",
         "train_dataloader.num_workers=1"],
        1,
        ["gone.png"],
    ),
    "annotation file without labels": (
        [CFG, "--cfg-options", f"{DATASET}.ann_file=../no_labels.txt"],
        1,
        ["while building the training data: ValueError", "CustomDataset", "no_labels.txt"],
    ),
    "damaged image": (
        [CFG, "--cfg-options", f"{DATASET}.ann_file=../damaged.txt"],
        1,
        ["while reading the image", "damaged.png", "failed to load image"],
    ),
    "damaged image, in a worker": (
        [CFG, "--cfg-options", f"{DATASET}.ann_file=../damaged.txt",
         "train_dataloader.num_workers=1"],
        1,
        ["while reading the image", "damaged.png", "failed to load image"],
    ),
    "image without content": (
        [CFG, "--cfg-options", f"{DATASET}.ann_file=../no_content.txt"],
        1,
        ["while reading the image", "no_content.png", "OpenCV"],
    ),
    "image without content, in a worker": (
        [CFG, "--cfg-options", f"{DATASET}.ann_file=../no_content.txt",
         "train_dataloader.num_workers=1"],
        1,
        ["while reading the image", "no_content.png", "OpenCV"],
    ),
    "weights of another type": (
        [CFG, "--cfg-options", "load_from=../integers.pth"],
        1,
        ["head.fc.weight is torch.int64", "torch.float32"],
    ),
    "no such checkpoint": ([CFG, "--resume", "no.pth"], 2, ["--resume", "'no.pth'"]),
    "garbage": ([CFG, "--resume", "../garbage.pth"], 1, ["'../garbage.pth'"]),
    "weights only": ([CFG, "--resume", "../weights.pth"], 1, ["meta.epoch", "message_hub"]),
    "other wrapper": (
        [CFG, "--amp", "--cfg-options", "optim_wrapper.type=ApexOptimWrapper"],
        2,
        ["--amp", "ApexOptimWrapper"],
    ),
    "no base batch size": ([CFG, "--auto-scale-lr"], 2, ["auto_scale_lr.base_batch_size"]),
    "nothing to train": ([CFG, "--cfg-options", "train_cfg=None"], 1, ["train_cfg"]),
    "no launcher": ([CFG, "--launcher", "pytorch"], 2, ["WORLD_SIZE", "dist_train.sh"]),
}  # fmt: skip

TEST_ERRORS = {
    "no config": (["nowhere.py", "../garbage.pth"], 2, ["'nowhere.py'"]),
    "no checkpoint": ([CFG, "no.pth"], 2, ["checkpoint", "'no.pth'"]),
    "garbage": ([CFG, "../garbage.pth"], 1, ["'../garbage.pth'"]),
    "empty file": ([CFG, "../empty.pth"], 1, ["'../empty.pth'"]),
    "truncated": ([CFG, "../truncated.pth"], 1, ["'../truncated.pth'"]),
    "no dict": ([CFG, "../list.pth"], 1, ["'../list.pth'", "list"]),
    "other model": (
        [CFG, "../weights.pth"],
        1,
        ["'../weights.pth'", "unexpected: extra.weight", "of another size: head.fc.weight",
         "missing: backbone.bn1.bias", "--allow-partial"],
    ),
    "weights of another type": (
        [CFG, "../integers.pth", "--allow-partial"],
        1,
        ["head.fc.weight is torch.int64", "torch.float32"],
    ),
    "other model, FlexibleRunner": (
        [CFG, "../weights.pth", "--cfg-options", "runner_type=FlexibleRunner"],
        1,
        ["'../weights.pth'", "unexpected: extra.weight", "of another size: head.fc.weight",
         "missing: backbone.bn1.bias", "--allow-partial"],
    ),
    "no network": (
        [CFG, "https://localhost:9/a.pth"],
        1,
        ["while loading the checkpoint 'https://localhost:9/a.pth': URLError"],
    ),
    "predictions into a folder that cannot be": (
        [CFG, "work_dirs/tiny/epoch_2.pth", "--out", "../notes.txt/a.pkl"],
        1,
        ["while writing --out '../notes.txt/a.pkl': "],
    ),
    "metrics into a folder that cannot be": (
        [CFG, "work_dirs/tiny/epoch_2.pth", "--out", "../notes.txt/a.json", "--out-item",
         "metrics"],
        1,
        ["while writing --out '../notes.txt/a.json': "],
    ),
    "no tensor": ([CFG, "../text.pth"], 1, ["head.fc.weight is str", "torch.float32"]),
    "program": ([CFG, "../program.pth"], 1, ["program.pth' was not loaded", "could execute code"]),
    "pictures of several views": (
        [CFG, "../garbage.pth", "--tta", "--show-dir", "shown"],
        2,
        ["--tta does not work with --show, --show-dir", "VisualizationHook"],
    ),
    "item without file": ([CFG, "../garbage.pth", "--out-item", "pred"], 2, ["--out"]),
    "format of the metrics": (
        [CFG, "../garbage.pth", "--out", "m.txt", "--out-item", "metrics"],
        2,
        ["'m.txt'", ".json"],
    ),
    "format of the predictions": ([CFG, "../garbage.pth", "--out", "out"], 2, ["'out'", ".pkl"]),
}  # fmt: skip


class _Program:
    """Unpickling it creates a folder."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def broken_files(folder, trained):
    (folder / "notes.txt").write_text("not a config")
    (folder / "configs" / "base.py").write_text("_base_ = 'mmocr::textdet/model.py'\n")
    (folder / "configs" / "missing_base.py").write_text("_base_ = 'no_such_base.py'\n")
    (folder / "configs" / "syntax.py").write_text("model = dict(type='A'\n")
    (folder / "configs" / "syntax.json").write_text("{'model'")
    (folder / "configs" / "syntax.yaml").write_text("model: [1\nb: {")
    base = "from mmengine.config import read_base\nwith read_base():\n    from .nothing import *\n"
    (folder / "configs" / "pure_base.py").write_text(base)
    (folder / "configs" / "pure.py").write_text(f"{base}model = dict(\n")
    (folder / "configs" / "bytes.py").write_bytes(b"\0\xff\xfe")
    (folder / "configs" / "import.py").write_text(
        "custom_imports = dict(imports=['no_such_module'], allow_failed_imports=False)\n"
    )
    for label in ("cat", "dog"):
        (folder / "empty" / "train" / label).mkdir(parents=True)
    (folder / "images.txt").write_text("gone.png 0\n" * 4)
    (folder / "garbage.pth").write_bytes(bytes(range(256)) * 8)
    (folder / "empty.pth").write_bytes(b"")
    checkpoint = trained / "epoch_2.pth"
    (folder / "truncated.pth").write_bytes(checkpoint.read_bytes()[:-2000])
    torch.save([1, 2], folder / "list.pth")
    weights = torch.load(checkpoint, weights_only=False)["state_dict"]
    del weights["backbone.bn1.bias"]
    weights["extra.weight"] = torch.zeros(1)
    weights["head.fc.weight"] = torch.zeros(3, 8)
    torch.save(weights, folder / "weights.pth")
    for name, value in (
        ("integers", torch.zeros(2, 8, dtype=torch.int64)),
        ("text", "0.5"),
        ("program", _Program(str(folder / "ran"))),
    ):
        torch.save(dict(weights, **{"head.fc.weight": value}), folder / f"{name}.pth")
    (folder / "no_labels.txt").write_text("cat/0.png\n" * 4)
    for name, content in (("damaged", b"\x89PNG no image"), ("no_content", b"")):
        (folder / "data" / "train" / f"{name}.png").write_bytes(content)
        (folder / f"{name}.txt").write_text(f"{name}.png 0\n" * 4)
    return folder


def _check_one_line(result, prog, code, mentions):
    assert result.code == code, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{prog}: error: ")
    for mention in mentions:
        assert mention in lines[0]


# Proxy for all addresses that are not of this machine.
NO_NETWORK = dict(http_proxy="http://localhost:9", https_proxy="http://localhost:9")


@pytest.mark.parametrize("case", TRAIN_ERRORS)
def test_train_error_is_one_line(run, broken_files, case):
    arguments, code, mentions = TRAIN_ERRORS[case]
    result = run(TRAIN, *arguments, "--work-dir", "../error", env=NO_NETWORK)
    _check_one_line(result, "train.py", code, mentions)


@pytest.mark.parametrize("case", TEST_ERRORS)
def test_test_error_is_one_line(run, broken_files, case):
    arguments, code, mentions = TEST_ERRORS[case]
    result = run(TEST, *arguments, "--work-dir", "../error")
    _check_one_line(result, "test.py", code, mentions)
    assert not (broken_files / "ran").exists()


def test_partial_checkpoint_on_request(run, broken_files):
    result = run(TEST, CFG, "../weights.pth", "--work-dir", "../partial", "--allow-partial")
    assert result.code == 0, result.stderr
    assert "accuracy/top1" in result.stdout


@pytest.mark.parametrize("runner", ["Runner", "FlexibleRunner"])
@pytest.mark.parametrize(
    ("hook", "problem"), [("SizeLimit", "[Errno 27] File too large"), ("Quota", "[Errno 122] ")]
)
def test_disk_that_is_full(run, folder, runner, hook, problem):
    work_dir = folder / f"{hook}_{runner}"
    options = ["--cfg-options", f"custom_hooks.0.type={hook}", f"runner_type={runner}"]
    result = run(TRAIN, CFG, "--work-dir", work_dir, *options)
    place = f"while writing '{work_dir / 'epoch_1.pth'}': OSError: {problem}"
    _check_one_line(result, "train.py", 1, [place])
    assert not list(work_dir.glob("*.pth"))


@pytest.mark.parametrize("runner", ["Runner", "FlexibleRunner"])
@pytest.mark.parametrize("hook", ["EMAHook", "mmengine.EMAHook"])
def test_fine_tune_an_average_to_other_classes(run, folder, runner, hook):
    """mmpretrain's hook reads the average of the checkpoint, whose head has other classes."""
    options = ["--cfg-options", f"custom_hooks.0.type={hook}", f"runner_type={runner}"]
    options += ["train_cfg.max_epochs=1"]
    work_dir = folder / f"{hook}_{runner}"
    result = run(TRAIN, CFG, "--work-dir", work_dir, *options)
    assert result.code == 0, result.stderr
    more = [f"load_from=../{work_dir.name}/epoch_1.pth", "model.head.num_classes=5"]
    result = run(TRAIN, CFG, "--work-dir", f"{work_dir}_tuned", *options, *more)
    assert result.code == 0, result.stderr
    tuned = torch.load(folder / f"{hook}_{runner}_tuned" / "epoch_1.pth", weights_only=False)
    assert tuned["ema_state_dict"]["module.head.fc.weight"].shape == (5, 8)


def test_labels_beyond_the_classes(run, folder):
    """The first iteration fails, in which an error may be a bug of the code."""
    (folder / "classes.txt").write_text("cat/0.png 7\n" * 4)
    result = run(
        TRAIN, CFG, "--work-dir", "../labels", "--cfg-options",
        f"{DATASET}.ann_file=../classes.txt",
    )  # fmt: skip
    assert result.code == 1
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("Traceback")
    assert last.startswith("train.py: error: while training: IndexError: Target 7 is out of bounds")


def test_fault_of_the_code_keeps_its_traceback(run, broken_files):
    result = run(
        TRAIN, CFG, "--work-dir", "../error", "--cfg-options", "custom_hooks.0.type=FaultyHook"
    )
    assert result.code == 1
    assert "Traceback" in result.stderr
    assert "in before_train_iter" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last == "train.py: error: while training: KeyError: 'no such key'"


def test_traceback_on_request(run, broken_files):
    arguments, code, _ = TRAIN_ERRORS["data folder"]
    result = run(TRAIN, *arguments, "--work-dir", "../error", env=dict(DDF_MM_TRACEBACK="1"))
    assert result.code == code
    assert "Traceback" in result.stderr
    assert "FileNotFoundError" in result.stderr


@pytest.mark.parametrize("script", [TRAIN, TEST])
def test_help_names_the_traceback_variable(run, script):
    result = run(script, "--help")
    assert result.code == 0
    assert "DDF_MM_TRACEBACK=1" in result.stdout


CONTAINERS = """
_base_ = "tiny.py"
one = _base_.val_dataloader.dataset
two = dict(type="RepeatDataset", times=2, dataset=one)
three = dict(type="ClassBalancedDataset", oversample_thr=1e-3, dataset=one)
four = dict(type="KFoldDataset", num_splits=2, test_mode=True, dataset=one)
joined = dict(type="ConcatDataset", _delete_=True, datasets=[one, two, three, four])
test_dataloader = dict(dataset=joined)
test_evaluator = dict(_delete_=True, type="Evaluator",
                      metrics=[dict(type="Accuracy", topk=(1,)), dict(type="ConfusionMatrix")])
"""


@pytest.mark.parametrize("options", [["--show-dir", "../joined_shown"], ["--tta"]])
def test_evaluate_datasets_in_containers(run, folder, trained, options):
    (folder / "configs" / "containers.py").write_text(CONTAINERS)
    out = folder / f"joined{options[0]}.pkl"
    result = run(
        TEST, "../configs/containers.py", trained / "epoch_2.pth", "--work-dir", "../joined",
        "--out", out, *options,
    )  # fmt: skip
    assert result.code == 0, result.stderr
    assert len(pickle.loads(out.read_bytes())) == 4 + 8 + 4 + 2
    if options != ["--tta"]:  # cat/0 and dog/0 share a name
        assert len(list((folder / "joined_shown").glob("*.png"))) == 2


def test_nothing_written_is_an_error(run, folder, trained):
    shown = folder / "never"
    result = run(
        TEST, "../configs/tiny.py", trained / "epoch_2.pth", "--work-dir", "../nothing",
        "--show-dir", shown, "--cfg-options", "default_hooks.visualization.type=SilentHook",
    )  # fmt: skip
    assert result.code == 1
    assert result.stderr.splitlines()[-1] == (
        f"test.py: error: --show-dir '{shown}': the test ended without writing anything there"
    )


PYTHON_CONFIG = """
from mmcv.transforms import LoadImageFromFile
from mmengine.config import read_base
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import DumpResults
from mmengine.hooks import EMAHook
from mmengine.model import PretrainedInit
from mmengine.optim import OneCycleLR, OptimWrapper
from mmpretrain.datasets import CustomDataset, PackInputs
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead
from torch.nn import SyncBatchNorm
from torch.optim import SGD

from ddf_mm.models import DDFResNet

with read_base():
    from ddf_mm.configs._base_.mmpretrain_runtime import *

default_scope = None
model = dict(
    type=ImageClassifier,
    backbone=dict(type=DDFResNet, depth=26, base_channels=8, stem_channels=8,
                  norm_cfg=dict(type=SyncBatchNorm)),
    neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, num_classes=2, in_channels=256),
)
data_preprocessor = dict(num_classes=2, mean=[127.0] * 3, std=[64.0] * 3, to_rgb=True)
pipeline = [dict(type=LoadImageFromFile), dict(type=PackInputs)]
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=CustomDataset, data_root="../data", data_prefix="train", pipeline=pipeline))
val_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=CustomDataset, data_root="../data", data_prefix="val", pipeline=pipeline))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type=Accuracy, topk=(1,))
train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.01, momentum=0.9))
param_scheduler = dict(type=OneCycleLR, eta_max=0.1, total_steps=9, by_epoch=True)
custom_hooks = [dict(type=EMAHook)]
"""


def test_config_in_pure_python(run, folder):
    """Classes instead of names, without a default scope, and the scheduler that saves a method;
    then from the config that the run has saved."""
    config, work_dir = folder / "configs" / "python.py", folder / "python"
    config.write_text(PYTHON_CONFIG)
    common = ["--work-dir", work_dir]
    result = run(TRAIN, config, *common, "--amp", "--launcher", "none")
    assert result.code == 0, result.stderr
    result = run(TRAIN, config, *common, "--resume", "--cfg-options", "train_cfg.max_epochs=2")
    assert result.code == 0, result.stderr
    assert "resumed epoch: 1" in result.stdout
    for source in (config, work_dir / "python.py"):
        out, shown = folder / f"{source.parent.name}.pkl", folder / f"{source.parent.name}_shown"
        common = [source, work_dir / "epoch_2.pth", "--work-dir", shown / "logs"]
        result = run(TEST, *common, "--tta", "--out", out)
        assert result.code == 0, result.stderr
        assert len(pickle.loads(out.read_bytes())) == 4
        result = run(TEST, *common, "--show-dir", shown)
        assert result.code == 0, result.stderr
        assert len(list(shown.glob("*.png"))) == 2


def test_a_config_that_a_toolbox_ships(run, folder, trained):
    """Fails at the data, which do not exist, so the config was read."""
    result = run(
        TEST, "mmpretrain::resnet/resnet18_8xb16_cifar10.py", trained / "epoch_2.pth",
        "--work-dir", "../shipped", "--cfg-options", "test_dataloader.dataset.data_root=../none",
        "test_dataloader.dataset.download=False",
    )  # fmt: skip
    assert result.code == 1
    assert "CIFAR10" in result.stderr.splitlines()[-1]
    for name in ("mmpretrain::no.py", "no_such_toolbox::a.py"):
        result = run(TEST, name, trained / "epoch_2.pth")
        assert result.code in (1, 2) and name in result.stderr.splitlines()[-1]
