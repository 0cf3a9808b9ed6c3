"""A training that is killed and resumed ends with the weights of an uninterrupted one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from fork_server import ROOT, ForkServer

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs a system that forks processes"
)

TRAIN = ROOT / "tools" / "train.py"

CONFIG = """
custom_imports = dict(imports=["noisy_parts"], allow_failed_imports=False)
model = dict(type="NoisyNet")
train_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dict(type="NoisyImages"),
    sampler=dict(type="DefaultSampler", shuffle=True))
val_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dict(type="NoisyImages"),
    sampler=dict(type="DefaultSampler", shuffle=False))
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
val_cfg = dict()
val_evaluator = dict(type="Count")
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.05, momentum=0.9))
param_scheduler = dict(type="CosineAnnealingLR", by_epoch=True, T_max=4)
default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=1))
custom_hooks = [dict(type="EMAHook"), dict(type="Killer")]
randomness = dict(seed=3, deterministic=True)
"""

PARTS = '''
"""Images, a network and a training that use random numbers, and a hook that kills the process."""
import os
import random
import resource
import signal
from pathlib import Path

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from torch import nn

from ddf_mm.layers import DDFPack


@DATASETS.register_module()
class NoisyImages(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        noise = np.random.randn() + random.gauss(0, 1)
        return dict(images=torch.randn(3, 6, 6) + noise, labels=index % 2)


@MODELS.register_module()
class NoisyNet(BaseModel):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 1), DDFPack(8, stride=2), nn.BatchNorm2d(8), nn.Dropout(0.3),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        # Makes checkpoints much larger than all other files of the training.
        self.register_buffer("ballast", torch.zeros(1 << 18))

    def forward(self, images, labels, mode="tensor"):
        scores = self.layers(torch.stack(images) if isinstance(images, list) else images)
        if mode == "loss":
            return dict(loss=nn.functional.cross_entropy(scores, torch.as_tensor(labels)))
        return [dict(score=score) for score in scores]


@METRICS.register_module()
class Count(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return dict(images=len(results))


@HOOKS.register_module()
class Killer(Hook):
    """KILL_AT=epoch,iteration kills the process before an iteration, KILL_WRITING=epoch while it
    writes a checkpoint."""

    def before_train_epoch(self, runner):
        with Path(runner.work_dir, "epochs.txt").open("a") as file:
            print(runner.epoch, file=file)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if os.environ.get("KILL_AT") == f"{runner.epoch},{batch_idx}":
            os.kill(os.getpid(), signal.SIGKILL)

    def before_save_checkpoint(self, runner, checkpoint):
        if os.environ.get("KILL_WRITING") == str(runner.epoch):
            # Kills in the middle of a write, always at the same byte.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
'''

PRELOAD = """
from mmengine.utils.dl_utils import collect_env

import ddf_mm.engine.launch
import ddf_mm.layers

collect_env()  # for the modules that it imports
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains in a work folder; returns the folder and the finished process."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "config.py").write_text(CONFIG)
    (folder / "noisy_parts.py").write_text(PARTS)
    with ForkServer(folder, PRELOAD) as server:

        def run(name: str, *arguments: str, **env: str):
            work_dir = folder / name
            result = server.run(
                TRAIN, folder / "config.py", "--work-dir", work_dir, *arguments, env=env
            )
            return work_dir, result

        yield run


@pytest.fixture(scope="module")
def undisturbed(train) -> dict:
    work_dir, result = train("undisturbed")
    assert result.code == 0, result.stderr
    return torch.load(work_dir / "epoch_4.pth", weights_only=False)


def epochs(work_dir: Path) -> list[int]:
    return list(map(int, (work_dir / "epochs.txt").read_text().split()))


def assert_same_training(checkpoint: dict, other: dict) -> None:
    """The same weights, averaged weights, momentum, schedule and random numbers, bit for bit."""
    for key in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers", "random_state"):
        ours, theirs = (torch.utils._pytree.tree_flatten(c[key]) for c in (checkpoint, other))
        assert ours[1] == theirs[1]
        for a, b in zip(ours[0], theirs[0], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key


def test_killed_within_an_epoch(train, undisturbed):
    work_dir, result = train("within", KILL_AT="2,1")
    assert result.code == -signal.SIGKILL
    assert [path.name for path in work_dir.glob("*.pth")] == ["epoch_2.pth"]
    work_dir, result = train("within", "--resume")
    assert result.code == 0, result.stderr
    assert epochs(work_dir) == [0, 1, 2, 2, 3]
    assert_same_training(torch.load(work_dir / "epoch_4.pth", weights_only=False), undisturbed)


def test_killed_while_it_writes_a_checkpoint(train, undisturbed):
    work_dir, result = train("writing", KILL_WRITING="1")
    assert result.code == -signal.SIGXFSZ
    # The only checkpoint that is kept was not removed before the new one was complete.
    whole = [path for path in work_dir.iterdir() if path.suffix == ".pth" and path.name[0] != "."]
    assert [path.name for path in whole] == ["epoch_1.pth"]
    assert (work_dir / "last_checkpoint").read_text() == str(whole[0])
    torch.load(whole[0], weights_only=False)
    work_dir, result = train("writing", "--resume")
    assert result.code == 0, result.stderr
    assert epochs(work_dir) == [0, 1, 1, 2, 3]
    assert_same_training(torch.load(work_dir / "epoch_4.pth", weights_only=False), undisturbed)


def test_the_check_would_notice_other_random_numbers(train, undisturbed):
    work_dir, result = train("other_seed", "--seed", "4")
    assert result.code == 0, result.stderr
    other = torch.load(work_dir / "epoch_4.pth", weights_only=False)
    with pytest.raises(AssertionError):
        assert_same_training(other, undisturbed)


def test_resume_in_an_empty_folder_starts(train):
    work_dir, result = train("fresh", "--resume", "--cfg-options", "train_cfg.max_epochs=1")
    assert result.code == 0, result.stderr
    assert epochs(work_dir) == [0]


def test_only_a_part_of_a_checkpoint_is_left(train):
    work_dir, _ = train("fresh", "--resume", "--cfg-options", "train_cfg.max_epochs=1")
    (checkpoint,) = work_dir.glob("epoch_*.pth")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    _, result = train("fresh", "--resume")
    assert result.code == 1
    assert (
        "--resume found no complete checkpoint" in result.stderr
        and checkpoint.name in result.stderr
    )
    assert result.stderr.count("\n") == 1
