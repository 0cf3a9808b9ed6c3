"""What ``tools/test.py`` switches on in a config, for each toolbox the way its own tool does."""

import copy
import inspect
from collections.abc import Iterator

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.registry import HOOKS, METRICS, Registry
from mmengine.runner import Runner

from ddf_mm.engine.cli import UserError
from ddf_mm.engine.launch import dataset_configs

# The hook to add to `default_hooks.visualization` where a config has none.
_VISUALIZATION_HOOKS = dict(
    mmpretrain="VisualizationHook", mmdet="DetVisualizationHook", mmseg="SegVisualizationHook"
)

_FLIP_OR_NOT = [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)]

# The models that the toolboxes' own tools fall back on; mmseg's falls back on none.
_TTA_MODELS = dict(
    mmpretrain=dict(type="AverageClsScoreTTA"),
    mmdet=dict(
        type="DetTTAModel",
        tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
    ),
)


def _parameters(cfg: Config, registry: Registry, component: dict) -> dict[str, inspect.Parameter]:
    """The constructor's parameters of the class that a component's config names."""
    kind = component["type"]
    if isinstance(kind, str):
        with registry.switch_scope_and_registry(cfg.get("default_scope")) as scoped:
            name, kind = kind, scoped.get(kind)
        if kind is None:
            raise UserError(
                f"type {name!r} in the config is not in the {registry.name} registry: check its "
                "spelling, or name the module that registers it in custom_imports"
            )
    return dict(inspect.signature(kind).parameters)


def enable_visualization(
    cfg: Config,
    show: bool = False,
    show_dir: str | None = None,
    wait_time: float = 2.0,
    interval: int = 1,
) -> None:
    """Let the visualization hook draw predictions while testing.

    Args:
        cfg (Config): The config.
        show (bool): Show each image in a window.
        show_dir (str | None): Folder for the images.
        wait_time (float): Seconds that a window stays.
        interval (int): Draw every so many samples, where the hook can.

    Raises:
        UserError: If the config has no visualization hook and its scope no usual one, or if the
            hook cannot write to a folder.
    """
    if cfg.get("default_hooks") is None:
        cfg.default_hooks = dict()
    if cfg.default_hooks.get("visualization") is None:
        kind = _VISUALIZATION_HOOKS.get(cfg.get("default_scope"))
        if kind is None:
            raise UserError(
                f"--show and --show-dir need default_hooks.visualization, which {cfg.filename} "
                "lacks",
                exit_code=2,
            )
        cfg.default_hooks.visualization = dict(type=kind)
    hook = cfg.default_hooks.visualization
    parameters = _parameters(cfg, HOOKS, hook)
    wanted = dict(enable=True, draw=True, show=show, interval=interval)
    hook.update({name: value for name, value in wanted.items() if name in parameters})
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if show and ("wait_time" in parameters or takes_any):
        hook.wait_time = wait_time
    if show_dir is None:
        return
    for name in ("out_dir", "test_out_dir"):
        if name in parameters:
            hook[name] = show_dir
            return
    if cfg.get("visualizer") is None:
        raise UserError(
            f"--show-dir needs a visualizer in {cfg.filename}, since its {hook.type} writes "
            "through it",
            exit_code=2,
        )
    cfg.visualizer.save_dir = show_dir
    if not cfg.visualizer.get("vis_backends"):
        cfg.visualizer.vis_backends = [dict(type="LocalVisBackend")]


def enable_amp(cfg: Config) -> None:
    """Test in mixed precision: float16, on a CPU bfloat16.

    Args:
        cfg (Config): The config.

    Raises:
        UserError: For mmdet on a CPU, where mmcv's nms takes float32 only.
    """
    if cfg.get("default_scope") == "mmdet" and get_device() == "cpu":
        raise UserError(
            "--amp cannot test mmdet models on a CPU, where mmcv's nms takes float32 only; leave "
            "--amp out",
            exit_code=2,
        )
    cfg.test_cfg.fp16 = True


def enable_tta(cfg: Config) -> None:
    """Test with test-time augmentation: the config's ``tta_model`` and ``tta_pipeline``.

    Where the config lacks them, mmpretrain and mmdet configs get what the tools of those toolboxes
    take: the average, or the merged boxes, of the image and its mirror image.

    Args:
        cfg (Config): The config.

    Raises:
        UserError: If the config lacks one of the two and its scope has no default.
    """
    scope = cfg.get("default_scope")
    missing = [name for name in ("tta_model", "tta_pipeline") if cfg.get(name) is None]
    if missing and scope not in _TTA_MODELS:
        raise UserError(f"--tta needs {' and '.join(missing)} in {cfg.filename}", exit_code=2)
    dataset = list(dataset_configs(cfg.test_dataloader))[-1]
    if "tta_model" in missing:
        cfg.tta_model = copy.deepcopy(_TTA_MODELS[scope])
    if "tta_pipeline" in missing:
        *transforms, pack = copy.deepcopy(dataset.pipeline)
        if scope == "mmdet":
            # Boxes of a mirrored image can be turned back only if the sample says it was mirrored.
            pack.meta_keys = (
                "img_id",
                "img_path",
                "ori_shape",
                "img_shape",
                "scale_factor",
                "flip",
                "flip_direction",
            )
        flip = dict(type="TestTimeAug", transforms=[copy.deepcopy(_FLIP_OR_NOT), [pack]])
        cfg.tta_pipeline = [*transforms, flip]
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def _metrics(cfg: Config) -> Iterator[ConfigDict]:
    evaluator = cfg.test_evaluator
    if isinstance(evaluator, dict):
        evaluator = evaluator.get("metrics", [evaluator])
    yield from [evaluator] if isinstance(evaluator, dict) else evaluator


def is_pickle(path: str) -> bool:
    """Whether a path names a pickle file."""
    return path.endswith((".pkl", ".pickle"))


def write_predictions_to_folder(cfg: Config, out_dir: str) -> None:
    """Let the metrics write each prediction into a folder, as mmseg's do.

    Args:
        cfg (Config): The config.
        out_dir (str): The folder.

    Raises:
        UserError: If none of the config's metrics can.
    """
    written = False
    for metric in _metrics(cfg):
        parameters = _parameters(cfg, METRICS, metric)
        if "output_dir" in parameters:
            metric.output_dir = out_dir
            written = True
        if "keep_results" in parameters:
            metric.keep_results = True
    if not written:
        raise UserError(
            f"--out {out_dir!r}: a folder needs a metric that writes into one, such as mmseg's "
            "IoUMetric; name a .pkl or .pickle file otherwise",
            exit_code=2,
        )


def dump_predictions(runner: Runner, out_file: str) -> None:
    """Add the metric that dumps all predictions into one pickle file.

    Args:
        runner (Runner): The runner that will test.
        out_file (str): Path of the file; ends with ``.pkl`` or ``.pickle``.
    """
    # Of mmdet's metric: it compresses masks.
    kind = "DumpDetResults" if runner.cfg.get("default_scope") == "mmdet" else "DumpResults"
    metric = METRICS.build(dict(type=kind, out_file_path=out_file))
    runner.test_evaluator.metrics.append(metric)
