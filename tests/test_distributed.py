"""Training in two processes equals that on the joined batch: DDP, FSDP, SyncBN, dist_train.sh."""

from __future__ import annotations

import copy
import json
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from fork_server import ROOT, tool_environment
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from torch import nn

from ddf_mm.layers import DDFPack, DDFUpPack
from ddf_mm.models import DDFResNet, DDFUpFPN

PROCESS = '''
"""One of two processes: gradients of DDP, and a step of FSDP, beside one process."""
import sys

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import FlexibleRunner
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.utils.data import Dataset

from ddf_mm.models import DDFResNet, DDFUpFPN

# gloo, before mmengine would ask for a GPU.
dist.init_process_group("gloo")
rank = dist.get_rank()


class Net(BaseModel):
    """Its batch norms keep their statistics, so that an image does not see the others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = DDFResNet(
            26, stem_channels=8, base_channels=8, out_indices=(0, 1, 2, 3), norm_eval=True
        )
        self.neck = DDFUpFPN([32, 64, 128, 256], 8, num_outs=4)

    def init_weights(self):
        """The runner starts with the weights above."""

    def forward(self, images, mode="tensor"):
        if isinstance(images, list):
            images = torch.stack(images)
        out = self.neck(self.backbone(images))
        return dict(loss=sum(x.square().mean() for x in out)) if mode == "loss" else out


torch.manual_seed(1)
images = torch.randn(4, 3, 48, 32)
half = images[2 * rank : 2 * rank + 2]

one = Net().train()
one(images, mode="loss")["loss"].backward()
two = MMDistributedDataParallel(Net().train(), device_ids=None, broadcast_buffers=False)
two(half, mode="loss")["loss"].backward()
error = max(
    float((a.grad - b.grad).abs().max() / b.grad.abs().max().clamp(min=1e-3))
    for a, b in zip(two.module.parameters(), one.parameters(), strict=True)
)
alone = Net().train()
alone(half, mode="loss")["loss"].backward()
differs = not torch.allclose(
    alone.backbone.conv1.weight.grad, one.backbone.conv1.weight.grad, rtol=0.1
)


class Images(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(images=images[index])


runner = FlexibleRunner(
    Net(),
    work_dir=sys.argv[1] + f"/fsdp{rank}",
    strategy=FSDPStrategy(
        model_wrapper=dict(
            type="MMFullyShardedDataParallel",
            device_id=torch.device("cpu"),
            use_orig_params=True,
        ),
        state_dict_cfg="full",
    ),
    train_dataloader=dict(
        batch_size=2,
        dataset=Images(),
        sampler=dict(type="DefaultSampler", shuffle=False),
        collate_fn=dict(type="default_collate"),
    ),
    optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
    train_cfg=dict(by_epoch=True, max_epochs=1),
    # torch 2.11 ends in a segmentation fault when it gathers the optimizer's state on CPUs, of
    # whatever network.
    default_hooks=dict(checkpoint=None),
)
runner.train()
is_sharded = isinstance(runner.model, FSDP)
sgd = torch.optim.SGD(one.parameters(), lr=0.1)
sgd.step()
with FSDP.summon_full_params(runner.model):
    trained = dict(runner.model.module.named_parameters())
    moved = float((trained["backbone.conv1.weight"] - Net().backbone.conv1.weight).abs().max())
    step_error = max(
        float((trained[name].detach() - value.detach()).abs().max())
        for name, value in one.named_parameters()
    )
torch.save(
    dict(error=error, differs=differs, is_sharded=is_sharded, moved=moved, step_error=step_error),
    f"{sys.argv[1]}/rank{rank}.pth",
)
'''


def environment(folder: Path, **variables: str) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {**tool_environment(folder), "PYTHON": sys.executable, "PORT": str(port), **variables}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    script = folder / "process.py"
    script.write_text(PROCESS)
    done = subprocess.run(
        [sys.executable, "-m", "ddf_mm.engine.torchrun", "2", script, folder],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pth") for rank in (0, 1)]


def test_gradients_are_those_of_the_joined_batch(ranks):
    for rank in ranks:
        assert rank["error"] < 1e-5, rank
        assert rank["differs"]


def test_a_sharded_step_is_that_of_one_process(ranks):
    for rank in ranks:
        assert rank["is_sharded"]
        assert rank["step_error"] < 1e-5 < rank["moved"], rank


def test_sync_batch_norm_and_back_leave_ddf_alone():
    model = nn.Sequential(
        DDFResNet(26, stem_channels=8, base_channels=8, out_indices=(0, 1, 2, 3)),
        DDFUpFPN([32, 64, 128, 256], 8, num_outs=4, norm_cfg=dict(type="BN")),
    ).eval()
    images = torch.randn(1, 3, 48, 32)
    expected = model(images)
    weights = copy.deepcopy(model.state_dict())

    def layers(model: nn.Module) -> list[tuple[str, type]]:
        kinds = (DDFPack, DDFUpPack)
        return [(n, type(m)) for n, m in model.named_modules() if isinstance(m, kinds)]

    before = layers(model)
    assert len(before) == 8 + 3
    synced = convert_sync_batchnorm(model, "torch")
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synced.modules())
    assert layers(synced) == before
    reverted = revert_sync_batchnorm(synced)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in reverted.modules())
    assert layers(reverted) == before
    assert reverted.state_dict().keys() == weights.keys()
    for name, value in reverted.state_dict().items():
        assert torch.equal(value, weights[name])
    assert all(map(torch.equal, reverted.eval()(images), expected))


RECIPES = {
    "digits": (
        "mmpretrain",
        "classification/ddf-mul-resnet26_digits.py",
        ["train_dataloader.dataset.indices=64", "train_dataloader.batch_size=16"],
    ),
    "detection": (
        "mmdet",
        "detection/mask-rcnn_ddf-mul-r26_ddfup-fpn_digit-scenes.py",
        ["train_dataloader.batch_size=1", "default_hooks.checkpoint.interval=1"],
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_launch_script_trains_recipes(tmp_path, name):
    toolbox, config, options = RECIPES[name]
    if find_spec(toolbox) is None or (toolbox == "mmdet" and find_spec("mmcv._ext") is None):
        pytest.skip(f"needs {toolbox}")
    if toolbox == "mmdet":
        from ddf_mm.datasets.digit_scenes import write_digit_scenes

        write_digit_scenes(tmp_path / "data", num_train=4, num_val=2)
    done = subprocess.run(
        ["bash", ROOT / "tools" / "dist_train.sh", ROOT / "configs" / config, "2",
         "--no-validate", "--work-dir", "out", "--cfg-options", "train_cfg.max_epochs=1",
         "default_hooks.logger.interval=1", "default_hooks.checkpoint.interval=1", *options],
        cwd=tmp_path,
        env=environment(tmp_path, DIGIT_SCENES=str(tmp_path / "data")),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = (tmp_path / "out").glob("*/vis_data/scalars.json")
    losses = [json.loads(line).get("loss") for line in log.read_text().splitlines()]
    # 64 digits in batches of 16, or 4 scenes in batches of 1, for each of two processes.
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    weights = torch.load(tmp_path / "out" / "epoch_1.pth", weights_only=False)["state_dict"]
    assert not any(key.startswith("module.") for key in weights)
    assert all(value.isfinite().all() for value in weights.values())
