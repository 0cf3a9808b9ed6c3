import pytest
import torch
from mmengine.config import Config

from ddf_mm.engine import launch
from ddf_mm.engine.cli import UserError, describe


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    monkeypatch.setattr(launch, "get_device", lambda: request.param)
    return request.param


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(launch, "get_device", lambda: "cpu")


@pytest.fixture
def config_file(tmp_path):
    def write(text: str, name: str = "my_model.py") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_load_config_merges_the_command_line(config_file):
    path = config_file("model = dict(blocks=[dict(depth=1), dict(depth=2)])\nlr = 1")
    cfg = launch.load_config(path, {"model.blocks.1.depth": 3, "lr": 2}, launcher="slurm")
    assert [block.depth for block in cfg.model.blocks] == [1, 3]
    assert (cfg.lr, cfg.launcher) == (2, "slurm")
    assert cfg.work_dir == "work_dirs/my_model"


def test_work_dir_command_line_before_config_before_name(config_file):
    path = config_file("work_dir = 'from_config'")
    assert launch.load_config(path).work_dir == "from_config"
    assert launch.load_config(path, work_dir="given").work_dir == "given"


def test_toolbox_that_cannot_be_imported(config_file, tmp_path, monkeypatch):
    (tmp_path / "picky_toolbox.py").write_text("assert False, 'mmcv 9 is too new'")
    (tmp_path / "poor_toolbox.py").write_text("import not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    for scope, match in (
        ("picky_toolbox", "AssertionError: mmcv 9 is too new"),
        ("poor_toolbox", "ModuleNotFoundError: No module named 'not_installed'"),
        ("mmocr", "ModuleNotFoundError: No module named 'mmocr'"),
    ):
        with pytest.raises((AssertionError, ImportError)) as info:
            launch.load_config(config_file(f"default_scope = '{scope}'"))
        what = f"importing {scope!r}, the config's default_scope, which must be installed"
        assert describe(info.value).startswith(f"while {what}: {match} (DDF")


def test_require_fields():
    cfg = Config(dict(model=dict(), train_cfg=None), filename="a.py", cfg_text="#")
    launch.require_fields(cfg, ["model"], "this")
    with pytest.raises(UserError, match="a.py lacks train_cfg, optim_wrapper, needed for this"):
        launch.require_fields(cfg, ["model", "train_cfg", "optim_wrapper"], "this")


def test_dataloaders_of_mmpretrain(device):
    cfg = Config(
        dict(
            default_scope="mmpretrain",
            train_dataloader=dict(num_workers=2),
            val_dataloader=dict(num_workers=0, prefetch_factor=2, collate_fn=dict(type="mine")),
            test_dataloader=None,
        )
    )
    launch.set_dataloader_defaults(cfg)
    has_gpu = device == "cuda"
    assert cfg.train_dataloader == dict(
        num_workers=2,
        pin_memory=has_gpu,
        persistent_workers=True,
        collate_fn=dict(type="default_collate"),
    )
    assert cfg.val_dataloader == dict(
        num_workers=0, pin_memory=has_gpu, persistent_workers=False, collate_fn=dict(type="mine")
    )


def test_dataloaders_of_other_toolboxes_keep_their_collate_fn(device):
    loader = dict(num_workers=2, persistent_workers=True)
    cfg = Config(dict(default_scope="mmdet", train_dataloader=loader))
    launch.set_dataloader_defaults(cfg)
    assert "collate_fn" not in cfg.train_dataloader
    assert cfg.train_dataloader.persistent_workers is True
    launch.set_dataloader_defaults(cfg, pin_memory=False, persistent_workers=False)
    assert cfg.train_dataloader.pin_memory is False
    assert cfg.train_dataloader.persistent_workers is False


@pytest.mark.parametrize(
    "optim_wrapper",
    [
        dict(optimizer=dict(type="SGD")),
        dict(type="OptimWrapper", optimizer=dict(type="SGD")),
        dict(type="mmengine.OptimWrapper", optimizer=dict(type="SGD")),
        dict(type="AmpOptimWrapper", optimizer=dict(type="SGD")),
        dict(type="CPUAmpOptimWrapper", optimizer=dict(type="SGD")),
    ],
)
def test_amp_suits_the_device(device, optim_wrapper):
    cfg = Config(dict(optim_wrapper=optim_wrapper))
    launch.enable_amp(cfg)
    notes = launch.adapt_to_device(cfg)
    expected = dict(cpu="CPUAmpOptimWrapper", cuda="AmpOptimWrapper")[device]
    assert cfg.optim_wrapper.type == expected
    assert cfg.optim_wrapper.loss_scale == "dynamic"
    assert len(notes) == (device == "cpu")


def test_amp_keeps_the_loss_scale():
    cfg = Config(dict(optim_wrapper=dict(loss_scale=512.0, optimizer=dict(type="SGD"))))
    launch.enable_amp(cfg)
    assert cfg.optim_wrapper.loss_scale == 512.0


def test_amp_of_several_optimizers(on_cpu):
    one = dict(type="OptimWrapper", optimizer=dict(type="SGD"))
    cfg = Config(dict(optim_wrapper=dict(constructor="Mine", generator=one, critic=dict(one))))
    launch.enable_amp(cfg)
    assert len(launch.adapt_to_device(cfg)) == 2
    assert cfg.optim_wrapper.generator.type == cfg.optim_wrapper.critic.type
    assert cfg.optim_wrapper.critic.type == "CPUAmpOptimWrapper"
    assert "type" not in cfg.optim_wrapper


def test_cpu_wrapper_of_a_dumped_config_becomes_the_gpus(monkeypatch):
    monkeypatch.setattr(launch, "get_device", lambda: "cuda")
    optim_wrapper = dict(type="CPUAmpOptimWrapper", optimizer=dict(type="SGD"))
    cfg = Config(dict(optim_wrapper=optim_wrapper))
    assert "AmpOptimWrapper instead of CPUAmpOptimWrapper" in launch.adapt_to_device(cfg)[0]
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"


def test_amp_refuses_another_wrapper():
    cfg = Config(dict(optim_wrapper=dict(type="ApexOptimWrapper", optimizer=dict())))
    with pytest.raises(UserError, match="--amp needs .* has 'ApexOptimWrapper'"):
        launch.enable_amp(cfg)


def test_auto_scale_lr():
    cfg = Config(dict(auto_scale_lr=dict(base_batch_size=16, enable=False)))
    launch.enable_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable is True
    for broken in (dict(), dict(auto_scale_lr=None), dict(auto_scale_lr=dict(enable=False))):
        with pytest.raises(UserError, match="auto_scale_lr.base_batch_size"):
            launch.enable_auto_scale_lr(Config(broken))


def _distributed_config(**kwargs) -> Config:
    norm = dict(type="SyncBN", requires_grad=True)
    model = dict(backbone=dict(norm_cfg=norm), heads=[dict(norm_cfg=dict(type="mmseg.SyncBN"))])
    return Config(dict(launcher="pytorch", model=model, sync_bn="torch", **kwargs))


def test_distributed_on_a_cpu(on_cpu):
    cfg = _distributed_config(find_unused_parameters=True)
    notes = launch.adapt_to_device(cfg)
    assert cfg.model_wrapper_cfg == dict(
        type="MMDistributedDataParallel",
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=True,
    )
    assert cfg.model.backbone.norm_cfg == dict(type="BN", requires_grad=True)
    assert cfg.model.heads[0].norm_cfg.type == "BN"
    assert "sync_bn" not in cfg
    assert len(notes) == 1


def test_distributed_on_a_cpu_keeps_the_configs_wrapper(on_cpu):
    cfg = _distributed_config(model_wrapper_cfg=dict(type="Mine", broadcast_buffers=True))
    launch.adapt_to_device(cfg)
    assert cfg.model_wrapper_cfg == dict(type="Mine", device_ids=None, broadcast_buffers=True)


@pytest.mark.parametrize("launcher", ["none", "pytorch"])
def test_a_gpu_and_a_single_process_keep_sync_bn(monkeypatch, launcher):
    """In a single process mmengine itself converts it."""
    monkeypatch.setattr(launch, "get_device", lambda: "cpu" if launcher == "none" else "cuda")
    cfg = _distributed_config()
    cfg.launcher = launcher
    assert launch.adapt_to_device(cfg) == []
    assert cfg.model.backbone.norm_cfg.type == "SyncBN"
    assert "model_wrapper_cfg" not in cfg


@pytest.mark.parametrize("launcher", ["pytorch", "slurm", "mpi"])
def test_launcher_variables(monkeypatch, launcher):
    names = launch._LAUNCHERS[launcher].split()
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=f"--launcher {launcher} needs {', '.join(names)} in"):
        launch.init_distributed(Config(dict(launcher=launcher)))


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(launch, "get_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in launch._LAUNCHERS["pytorch"].split():
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="a process for GPU 2, but this machine has 2"):
        launch.init_distributed(Config(dict(launcher="pytorch")))
