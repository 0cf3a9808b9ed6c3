"""Builds a runner from a config and command line options. The functions change the config in
place, so that the runner saves the config that it uses to the work folder."""

import os
import os.path as osp
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.hub import get_config
from mmengine.registry import RUNNERS, Registry
from mmengine.runner import Runner
from torch import cuda
from torch import distributed as dist

from ddf_mm.contrib.gloo import init_gloo
from ddf_mm.contrib.whole_files import write_whole_files
from ddf_mm.engine.checkpoints import WeightsCheck, load_safely
from ddf_mm.engine.cli import UserError, phase
from ddf_mm.engine.phases import name_files, runner_with_phases
from ddf_mm.registry import resolve
from ddf_mm.utils import dicts_with, name_ops, toolbox, type_name

DATALOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")

# Environment variables that mmengine reads.
_LAUNCHERS = dict(
    pytorch="RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT",
    slurm="SLURM_PROCID SLURM_NTASKS SLURM_NODELIST",
    mpi="OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK MASTER_ADDR",
)


def load_config(
    filename: str,
    cfg_options: dict | None = None,
    work_dir: str | None = None,
    launcher: str = "none",
) -> Config:
    """Read a config, a file or one of an installed package (``mmpretrain::resnet/…``), and apply
    the options of all tools. The work folder is by default the config's, else ``work_dirs/<name>``.
    Raises :class:`UserError` if the file is not a config, or an option does not fit it."""
    package, shipped, _ = filename.partition("::")
    if shipped:
        # mmengine would install a missing package.
        if not package.isidentifier() or find_spec(package) is None:
            raise UserError(f"config {filename!r}: {package!r} is not installed", exit_code=2)
    elif not osp.isfile(filename):
        raise UserError(
            f"config {filename!r} is not a file (current folder: {os.getcwd()!r})", exit_code=2
        )
    elif not filename.endswith((".py", ".json", ".yaml", ".yml")):
        raise UserError(
            f"config {filename!r} must be a .py, .json, .yaml or .yml file", exit_code=2
        )
    with phase(f"reading the config {filename!r}"):
        try:
            cfg = get_config(filename) if shipped else Config.fromfile(filename)
        except FileNotFoundError as error:
            # mmengine's exception lists all configs of the package.
            raise FileNotFoundError(str(error)) from None
    if cfg_options:
        try:
            cfg.merge_from_dict(cfg_options)
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError) as error:
            message = error.args[0] if error.args else type(error).__name__
            raise UserError(
                f"--cfg-options {' '.join(cfg_options)} does not fit {filename}: {message}",
                exit_code=2,
            ) from error
    name_ops(cfg.get("model"))
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = osp.join("work_dirs", osp.splitext(osp.basename(cfg.filename))[0])
    # mmengine would only log that the package is missing, and later not find its types.
    if (scope := cfg.get("default_scope")) is not None:
        with phase(f"importing {scope!r}, the config's default_scope, which must be installed"):
            import_module(scope)
    return cfg


def require_fields(cfg: Config, fields: Sequence[str], purpose: str) -> None:
    """Raise :class:`UserError` if a config lacks fields that ``purpose`` needs."""
    missing = [field for field in fields if cfg.get(field) is None]
    if missing:
        raise UserError(f"{cfg.filename} lacks {', '.join(missing)}, needed for {purpose}")


def find_class(cfg: Config, registry: Registry, component: dict) -> type:
    """The class of a component, whose ``type`` may be the class or any of its names. Raises
    :class:`UserError` if the name is not registered."""
    found = resolve({"_scope_": cfg.get("default_scope"), **component}, registry)
    if found is None:
        raise UserError(
            f"type {component.get('type')!r} in the config is not in the {registry.name} registry: "
            "check its spelling, or name the module that registers it in custom_imports"
        )
    return found


def set_dataloader_defaults(
    cfg: Config, pin_memory: bool = True, persistent_workers: bool = True
) -> None:
    """Set the defaults of the toolbox's own tools: mmpretrain's configs rely on its tools for
    ``collate_fn`` and pinned memory. Options that need workers are disabled for ``num_workers=0``,
    pinned memory without an accelerator."""
    for name in DATALOADERS:
        dataloader = cfg.get(name)
        if not isinstance(dataloader, dict):
            continue
        if toolbox(cfg) == "mmpretrain":
            dataloader.setdefault("pin_memory", True)
            dataloader.setdefault("persistent_workers", True)
            dataloader.setdefault("collate_fn", dict(type="default_collate"))
        if not pin_memory or get_device() == "cpu":
            dataloader.pin_memory = False
        has_workers = dataloader.get("num_workers", 0) > 0
        if not persistent_workers or not has_workers:
            dataloader.persistent_workers = False
        if not has_workers:
            dataloader.pop("prefetch_factor", None)


def _optim_wrappers(cfg: Config) -> Iterator[ConfigDict]:
    """The config of the optimizer wrapper, or of each one if the model has several optimizers."""
    optim_wrapper = cfg.get("optim_wrapper")
    if not isinstance(optim_wrapper, dict):
        return
    several = [v for v in optim_wrapper.values() if isinstance(v, dict) and "optimizer" in v]
    yield from several if "optimizer" not in optim_wrapper and several else [optim_wrapper]


def enable_amp(cfg: Config) -> None:
    """Train in mixed precision: ``AmpOptimWrapper`` with the config's loss scale, by default
    ``dynamic``. :func:`adapt_to_device` replaces it on a CPU. Raises :class:`UserError` for other
    optimizer wrappers."""
    for optim_wrapper in _optim_wrappers(cfg):
        name = type_name(optim_wrapper, "OptimWrapper")
        if name not in ("OptimWrapper", "AmpOptimWrapper", "CPUAmpOptimWrapper"):
            raise UserError(
                f"--amp needs optim_wrapper.type 'OptimWrapper' or 'AmpOptimWrapper', but "
                f"{cfg.filename} has {name!r}",
                exit_code=2,
            )
        optim_wrapper.type = "AmpOptimWrapper"
        optim_wrapper.setdefault("loss_scale", "dynamic")


def enable_auto_scale_lr(cfg: Config) -> None:
    """Scale the learning rate with the batch size; raise :class:`UserError` if the config lacks the
    batch size that its learning rate is meant for."""
    if (cfg.get("auto_scale_lr") or {}).get("base_batch_size") is None:
        raise UserError(
            f"--auto-scale-lr needs auto_scale_lr.base_batch_size, which {cfg.filename} lacks",
            exit_code=2,
        )
    cfg.auto_scale_lr.enable = True


def adapt_to_device(cfg: Config) -> list[str]:
    """Replace components that this machine's device does not support; return notes for the log.

    On a CPU: mixed precision uses bfloat16, the distributed wrapper gets no device ids, and
    synchronized batch norm, which torch implements for accelerators only, becomes batch norm.
    """
    notes = []
    on_cpu = get_device() == "cpu"
    old, new = "AmpOptimWrapper", "CPUAmpOptimWrapper"
    if not on_cpu:
        old, new = new, old
    for optim_wrapper in _optim_wrappers(cfg):
        if type_name(optim_wrapper) == old:
            optim_wrapper.type = new
            notes.append(f"optim_wrapper: {new} instead of {old}, to suit a {get_device()} device")
    if not on_cpu or cfg.get("launcher", "none") == "none":
        return notes

    if cfg.get("strategy") is None:
        wrapper = cfg.get("model_wrapper_cfg") or dict(
            find_unused_parameters=cfg.get("find_unused_parameters", False)
        )
        cfg.model_wrapper_cfg = dict(
            dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False),
            **wrapper,
        )
    parts = [cfg.get("model"), cfg.get("norm_cfg")]
    norms = [part for part in dicts_with(parts, "type") if part["type"]]
    norms = [norm for norm in norms if type_name(norm) in ("SyncBN", "SyncBatchNorm")]
    for norm in norms:
        norm["type"] = "BN"
    if cfg.pop("sync_bn", None) is not None or norms:
        notes.append("model: BN instead of SyncBN, which needs an accelerator")
    return notes


def init_distributed(cfg: Config) -> None:
    """Check the launcher's environment variables and, against the number of GPUs, the number of
    processes; on a CPU, start the process group."""
    launcher = cfg.get("launcher", "none")
    if launcher == "none":
        return
    missing = [name for name in _LAUNCHERS[launcher].split() if name not in os.environ]
    if missing:
        raise UserError(
            f"--launcher {launcher} needs {', '.join(missing)} in the environment: start the job "
            "with tools/dist_train.sh, tools/slurm_train.sh, those of test.py, or mpirun",
            exit_code=2,
        )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if get_device() == "cuda" and launcher == "pytorch" and local_rank >= cuda.device_count():
        raise UserError(
            f"--launcher pytorch started a process for GPU {local_rank}, but this machine has "
            f"{cuda.device_count()}",
            exit_code=2,
        )
    if get_device() == "cpu" and not dist.is_initialized():
        with phase("starting the process group"):
            init_gloo(launcher, **cfg.get("env_cfg", {}).get("dist_cfg", {}))


def build_runner(cfg: Config) -> Runner:
    """Adapt a config to the machine and build its runner, ``Runner`` or the config's
    ``runner_type``."""
    load_safely()
    write_whole_files()
    name_files()
    cfg.setdefault("env_cfg", {})  # FlexibleRunner requires it
    notes = adapt_to_device(cfg)
    init_distributed(cfg)
    kind = cfg.get("runner_type", "Runner")
    with phase("building the runner"):
        runner_class = RUNNERS.get(kind) if isinstance(kind, str) else kind
        if runner_class is None:
            raise UserError(f"runner_type {kind!r} is not in the runner registry")
        runner = runner_with_phases(runner_class).from_cfg(cfg)
    runner.register_hook(WeightsCheck())
    for note in notes:
        runner.logger.info(note)
    return runner
