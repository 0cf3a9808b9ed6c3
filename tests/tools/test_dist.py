"""The launch scripts: two processes on a CPU, and the command line that Slurm gets."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddf_mm.engine import torchrun

TOOLS = Path(__file__).resolve().parents[2] / "tools"

# Without a toolbox: the scripts need mmengine only, and it starts faster.
CONFIG = """
custom_imports = dict(imports=["parts"], allow_failed_imports=False)
model = dict(type="TinyModel", norm_cfg=dict(type="SyncBN", requires_grad=True))
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(type="TinyDataset"),
                        sampler=dict(type="DefaultSampler", shuffle=True))
test_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(type="TinyDataset"),
                       sampler=dict(type="DefaultSampler", shuffle=False))
train_cfg = dict(by_epoch=True, max_epochs=2)
test_cfg = dict()
test_evaluator = dict(type="SampleIndices")
optim_wrapper = dict(type="AmpOptimWrapper", optimizer=dict(type="SGD", lr=0.1))
custom_hooks = [dict(type="RankRecorder")]
"""

PARTS = '''
"""A model, a dataset, a metric and a hook that records the final state of each rank."""
import os
import weakref
from pathlib import Path

import torch
from mmcv.cnn import ConvModule
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from torch.utils.data import Dataset


@MODELS.register_module()
class TinyModel(BaseModel):
    def __init__(self, norm_cfg):
        super().__init__()
        # Different initial weights: with the common seed they would be equal even without DDP.
        torch.manual_seed(int(os.environ["RANK"]))
        self.conv = ConvModule(1, 2, 3, norm_cfg=norm_cfg)

    def forward(self, index, image, mode="tensor"):
        out = self.conv(torch.stack(image))
        if mode == "loss":
            self.dtype = out.dtype
            return dict(loss=out.float().square().mean())
        return [dict(index=i) for i in index]


@DATASETS.register_module()
class TinyDataset(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(index=index, image=torch.full((1, 4, 4), float(index)) + torch.eye(4))


@METRICS.register_module()
class SampleIndices(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.extend(sample["index"] for sample in data_samples)

    def compute_metrics(self, results):
        return dict(samples=len(set(results)))


@HOOKS.register_module()
class RankRecorder(Hook):
    def watch(self, model, path):
        """Record whether the model outlives the process group."""
        destroy = torch.distributed.destroy_process_group

        def destroy_():
            path.write_text(str(model() is not None))
            destroy()

        torch.distributed.destroy_process_group = destroy_

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.indices = getattr(self, "indices", []) + list(data_batch["index"])

    def after_train(self, runner):
        self.watch(weakref.ref(runner.model), Path(runner.work_dir, f"alive{runner.rank}"))
        model = runner.model.module
        torch.save(
            dict(
                weights=[p.detach() for p in model.parameters()],
                statistics=model.conv.bn.running_mean,
                norm=type(model.conv.bn).__name__,
                world_size=runner.world_size,
                backend=torch.distributed.get_backend(),
                indices=self.indices,
                dtype=str(model.dtype),
                threads=os.environ["OMP_NUM_THREADS"],
            ),
            Path(runner.work_dir, f"rank{runner.rank}.pth"),
        )
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two ranks")
    (folder / "my config.py").write_text(CONFIG)
    (folder / "parts.py").write_text(PARTS)
    return folder


@pytest.fixture(scope="module")
def launch(folder):
    def run(script: str, *arguments: object, **env: str) -> subprocess.CompletedProcess:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
        environment.update(
            PYTHON=sys.executable,
            PYTHONPATH=str(folder),
            PYTHONWARNINGS="ignore",
            CUDA_VISIBLE_DEVICES="-1",
            PORT=str(port),
            **env,
        )
        return subprocess.run(
            ["bash", TOOLS / script, *map(str, arguments)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="module")
def trained(folder, launch) -> Path:
    result = launch("dist_train.sh", "my config.py", 2, "--work-dir", "a work dir")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("BN instead of SyncBN") == 1
    return folder / "a work dir"


def test_two_processes_train_one_model(trained):
    ranks = [torch.load(trained / f"rank{rank}.pth") for rank in (0, 1)]
    for rank in ranks:
        assert (rank["world_size"], rank["backend"]) == (2, "gloo")
        assert rank["norm"] == "BatchNorm2d"
        assert rank["dtype"] == "torch.bfloat16"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        assert int(rank["threads"]) == max(1, cores // 2)
    for a, b in zip(ranks[0]["weights"], ranks[1]["weights"], strict=True):
        assert torch.equal(a, b)
    # The ranks had different data: a part of each epoch, and batch statistics that are not shared.
    for epoch in (slice(0, 4), slice(4, 8)):
        shares = [set(map(int, rank["indices"][epoch])) for rank in ranks]
        assert shares[0] | shares[1] == set(range(8))
    assert not torch.equal(ranks[0]["statistics"], ranks[1]["statistics"])


def test_the_model_is_gone_before_the_process_group(trained):
    """A DistributedDataParallel that is freed after its group may abort the process."""
    assert [(trained / f"alive{rank}").read_text() for rank in (0, 1)] == ["False", "False"]


def test_two_processes_evaluate(trained, launch, folder):
    result = launch(
        "dist_test.sh", "my config.py", "a work dir/epoch_2.pth", "--out", "the metrics.json",
        "--out-item", "metrics", GPUS="2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "the metrics.json").read_text()) == dict(samples=8)
    assert (folder / "work_dirs" / "my config").is_dir()


def test_an_error_is_one_line_of_one_rank(launch):
    result = launch("dist_train.sh", "my config.py", "2", "--cfg-options", "model.type=Giant")
    assert result.returncode == 1
    assert result.stderr.startswith("train.py: error: while building the model: KeyError: 'Giant")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "arguments", "mention"),
    [
        ("dist_train.sh", [], "usage: dist_train.sh CONFIG GPUS"),
        ("dist_test.sh", ["a.py"], "usage: dist_test.sh CONFIG CHECKPOINT GPUS"),
        ("slurm_train.sh", ["part", "job", "a.py"], "usage: slurm_train.sh PARTITION"),
        ("slurm_test.sh", ["part", "job", "a.py"], "usage: slurm_test.sh PARTITION"),
    ],
)
def test_usage(launch, script, arguments, mention):
    result = launch(script, *arguments)
    assert result.returncode == 2
    assert mention in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("gpus", ["", "0", "two", "-1"])
def test_number_of_processes(capsys, gpus):
    with pytest.raises(SystemExit) as exit_info:
        torchrun.main([gpus, "train.py", "a.py"])
    assert exit_info.value.code == 2
    assert f"(GPUS) must be positive, got {gpus!r}" in capsys.readouterr().err


@pytest.fixture
def torchrun_arguments(monkeypatch):
    calls = []
    monkeypatch.setattr(torchrun, "torchrun", calls.append)
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "PORT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    # Restores what share_cores sets.
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    monkeypatch.setattr(torchrun.os, "environ", dict(os.environ))
    return calls


def test_environment_of_openmmlab(torchrun_arguments):
    torchrun.main(["4", "train.py", "a.py"])
    torchrun.os.environ.update(NNODES="3", NODE_RANK="2", MASTER_ADDR="host", PORT="1234")
    torchrun.main(["8", "train.py", "a.py", "--amp"])
    assert torchrun_arguments == [
        ["--nproc_per_node=4", "--nnodes=1", "--node_rank=0", "--master_addr=127.0.0.1",
         "--master_port=29500", "train.py", "a.py"],
        ["--nproc_per_node=8", "--nnodes=3", "--node_rank=2", "--master_addr=host",
         "--master_port=1234", "train.py", "a.py", "--amp"],
    ]  # fmt: skip


def test_threads_of_the_environment_are_kept(torchrun_arguments):
    torchrun.os.environ["OMP_NUM_THREADS"] = "3"
    torchrun.main(["2", "train.py"])
    assert torchrun.os.environ["OMP_NUM_THREADS"] == "3"


def test_killed_worker_is_named(monkeypatch, capsys, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as exit_info:
        torchrun.main(["1", str(script)])
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.endswith("torchrun: error: SIGKILL ended rank 0\n")


def test_port_in_use(monkeypatch, capsys, tmp_path):
    script = tmp_path / "idle.py"
    script.write_text("")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("PORT", str(server.getsockname()[1]))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        with pytest.raises(SystemExit):
            torchrun.main(["1", str(script)])
    assert "set PORT to choose another port" in capsys.readouterr().err


@pytest.mark.parametrize("gpus_per_node", ["4", "0"])
@pytest.mark.parametrize("script", ["train", "test"])
def test_slurm_command_line(launch, tmp_path, script, gpus_per_node):
    srun = tmp_path / "srun"
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    result = launch(
        f"slurm_{script}.sh", "part", "a job", "my config.py", "some where", "--cfg-options",
        "a=[1, 2]", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", GPUS="16",
        GPUS_PER_NODE=gpus_per_node, SRUN_ARGS="--exclusive --qos=low",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    placement = ["--gres=gpu:4", "--ntasks-per-node=4"] if gpus_per_node == "4" else []
    where = ["--work-dir=some where"] if script == "train" else ["some where"]
    assert result.stdout.splitlines() == [
        "-p", "part", "--job-name=a job", "--ntasks=16", *placement, "--cpus-per-task=5",
        "--kill-on-bad-exit=1", "--exclusive", "--qos=low", sys.executable, "-u",
        str(TOOLS / f"{script}.py"), "my config.py", *where, "--cfg-options", "a=[1, 2]",
        "--launcher=slurm",
    ]  # fmt: skip
