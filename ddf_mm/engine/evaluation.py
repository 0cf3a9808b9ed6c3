"""Config changes for the options of ``tools/test.py``, as in each toolbox's own test tool."""

import copy
import inspect
import os.path as osp
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, METRICS, Registry
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from ddf_mm.engine.cli import UserError, phase, rank
from ddf_mm.engine.launch import find_class
from ddf_mm.utils import dicts_with, leaf_datasets, toolbox, type_name

# Default of `default_hooks.visualization` for configs without one.
_VISUALIZATION_HOOKS = dict(
    mmpretrain="mmpretrain.VisualizationHook",
    mmdet="mmdet.DetVisualizationHook",
    mmseg="mmseg.SegVisualizationHook",
)

# Default of `tta_model` in the toolboxes' own tools; mmseg's has none.
_TTA_MODELS = dict(
    mmpretrain=dict(type="mmpretrain.AverageClsScoreTTA"),
    mmdet=dict(
        type="DetTTAModel",
        tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
    ),
)
# Heads of mmdet that predict masks.
_MASK_HEADS = ("mask_head", "semantic_head", "panoptic_head", "segm_head")


def _parameters(cfg: Config, registry: Registry, component: dict) -> dict[str, inspect.Parameter]:
    """The constructor's parameters of the class that a component's config names."""
    return dict(inspect.signature(find_class(cfg, registry, component)).parameters)


def enable_visualization(
    cfg: Config,
    show: bool = False,
    show_dir: str | None = None,
    wait_time: float = 2.0,
    interval: int = 1,
) -> None:
    """Make the visualization hook draw every ``interval``-th prediction of a test, in windows for
    ``wait_time`` seconds, to a folder, or both. Raises :class:`UserError` if the config has no hook
    and its toolbox no default one, or if the hook cannot write to a folder."""
    if cfg.get("default_hooks") is None:
        cfg.default_hooks = dict()
    if cfg.default_hooks.get("visualization") is None:
        kind = _VISUALIZATION_HOOKS.get(toolbox(cfg))
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
            f"--show-dir needs a visualizer in {cfg.filename}, since its {type_name(hook)} writes "
            "through it",
            exit_code=2,
        )
    cfg.visualizer.save_dir = show_dir
    if not cfg.visualizer.get("vis_backends"):
        cfg.visualizer.vis_backends = [dict(type="LocalVisBackend")]


def enable_amp(cfg: Config) -> None:
    """Test in mixed precision: float16 on a GPU, bfloat16 on a CPU."""
    if toolbox(cfg) == "mmdet" and get_device() == "cpu":
        raise UserError(
            "--amp cannot test mmdet models on a CPU, where mmcv's nms supports float32 only; "
            "omit --amp",
            exit_code=2,
        )
    cfg.test_cfg.fp16 = True


def enable_tta(cfg: Config) -> None:
    """Test with test-time augmentation: the config's ``tta_model`` and ``tta_pipeline``.

    Without them, mmpretrain and mmdet configs get the defaults of these toolboxes' own tools: the
    average scores, or the merged boxes, of the image and its horizontal flip."""
    scope = toolbox(cfg)
    missing = [name for name in ("tta_model", "tta_pipeline") if cfg.get(name) is None]
    if missing and scope not in _TTA_MODELS:
        raise UserError(f"--tta needs {' and '.join(missing)} in {cfg.filename}", exit_code=2)
    if "tta_model" in missing:
        cfg.tta_model = copy.deepcopy(_TTA_MODELS[scope])
    if type_name(cfg.tta_model) == "DetTTAModel":
        masks = [name for name in _MASK_HEADS for _ in dicts_with(cfg.model, name)]
        if masks:
            raise UserError(
                f"--tta: mmdet's DetTTAModel merges boxes but not masks, and the {masks[0]} of "
                f"{cfg.filename} predicts masks",
                exit_code=2,
            )
    hook = (cfg.get("default_hooks") or {}).get("visualization") or {}
    if hook.get("enable") and scope == "mmpretrain":
        raise UserError(
            f"--tta does not work with --show, --show-dir and visualization.enable: mmpretrain's "
            f"{type_name(hook)} draws the network's input, which then is several images",
            exit_code=2,
        )
    dataset = cfg.test_dataloader.dataset
    leaves = list(leaf_datasets(dataset))
    # A dataset that mixes images has a second pipeline, after that of the images.
    others = [part for part in dicts_with(dataset, "pipeline") if part not in leaves]
    others += [leaf for leaf in leaves if not leaf.get("pipeline")]
    if others or not leaves:
        raise UserError(
            f"--tta replaces the pipelines of datasets that read images, but test_dataloader of "
            f"{cfg.filename} has a {type_name(*others[:1]) if others else type(dataset).__name__}",
            exit_code=2,
        )
    for leaf in leaves:
        leaf.pipeline = cfg.get("tta_pipeline") or _flipping(leaf.pipeline, scope)
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def _flipping(pipeline: Sequence[dict], scope: str) -> list[dict]:
    """A test-time augmentation pipeline: the image and its horizontal flip."""
    *transforms, pack = copy.deepcopy(list(pipeline))
    if scope == "mmdet":
        # DetTTAModel flips the boxes back if the sample has these keys.
        keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
        pack.meta_keys = (*keys, "flip", "flip_direction")
    flips = [dict(type=f"{scope}.RandomFlip", prob=prob) for prob in (1.0, 0.0)]
    return [*transforms, dict(type="TestTimeAug", transforms=[flips, [pack]])]


def write_predictions_to_folder(cfg: Config, out_dir: str) -> None:
    """Make the metrics write each prediction into a folder, as mmseg's can; raise
    :class:`UserError` if none of them can."""
    metrics = cfg.test_evaluator
    while isinstance(metrics, dict) and "metrics" in metrics:
        metrics = metrics.metrics
    written = False
    for metric in [metrics] if isinstance(metrics, dict) else metrics:
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


class DumpPredictions(Hook):
    """Writes all predictions to one pickle file. It is a hook instead of a metric because mmdet's
    MultiDatasetsEvaluator accepts exactly one metric for each dataset."""

    def __init__(self, cfg: Config, out_file: str) -> None:
        # mmdet's own metric compresses masks.
        kind = "mmdet.DumpDetResults" if toolbox(cfg) == "mmdet" else "DumpResults"
        self.metric = METRICS.build(dict(type=kind, out_file_path=out_file))

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: Sequence = ()
    ) -> None:
        """Collect the predictions of a batch."""
        samples = [s.to_dict() if isinstance(s, BaseDataElement) else s for s in outputs]
        self.metric.process(data_batch, samples)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Write the predictions of all processes."""
        with phase(f"writing --out {self.metric.out_file_path!r}"):
            self.metric.evaluate(len(runner.test_dataloader.dataset))


def require_written(runner: Runner, option: str, path: str, since: float) -> None:
    """Raise :class:`UserError` if a test that started at ``since`` (:func:`time.time`) has written
    nothing to the ``path`` of an option. mmdet resolves a relative path in the run's own folder."""
    places = [Path(path), Path(osp.join(runner.work_dir, runner.timestamp, path))]
    files = (file for place in places for file in (place, *place.rglob("*")) if file.is_file())
    # The resolution of modification times is up to 2 s on some file systems.
    if rank() == 0 and not any(file.stat().st_mtime > since - 2 for file in files):
        raise UserError(f"{option} {path!r}: the test ended without writing anything there")
