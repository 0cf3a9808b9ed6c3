import os
import time
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel
from mmengine.registry import HOOKS, METRICS, MODELS

from ddf_mm.engine import evaluation, launch
from ddf_mm.engine.cli import UserError


@pytest.fixture(autouse=True)
def stand_ins():
    """Hooks and metrics in the root registries, with the arguments of those of the toolboxes."""

    class EnableHook(Hook):  # mmpretrain
        def __init__(self, enable=False, interval=5000, show=False, out_dir=None, **kwargs):
            pass

    class DrawHook(Hook):  # mmdet
        def __init__(self, draw=False, show=False, wait_time=0.0, test_out_dir=None):
            pass

    class VisualizerHook(Hook):  # mmseg
        def __init__(self, draw=False, interval=50, show=False, wait_time=0.0):
            pass

    class FolderMetric(BaseMetric):  # mmseg
        def __init__(self, output_dir=None, keep_results=False, **kwargs):
            pass

        def process(self, data_batch, data_samples):
            pass

        def compute_metrics(self, results):
            pass

    classes = {HOOKS: (EnableHook, DrawHook, VisualizerHook), METRICS: (FolderMetric,)}
    for registry, members in classes.items():
        for member in members:
            registry.register_module(module=member, force=True)
    yield
    for registry, members in classes.items():
        for member in members:
            del registry.module_dict[member.__name__]


def _config(hook: str | None = None, **kwargs) -> Config:
    hooks = {} if hook is None else dict(visualization=dict(type=hook))
    return Config(dict(default_hooks=hooks, **kwargs), filename="a.py", cfg_text="#")


def test_show_dir_sets_the_argument_of_the_hook():
    cfg = _config("EnableHook")
    evaluation.enable_visualization(cfg, show_dir="out", interval=3)
    assert cfg.default_hooks.visualization == dict(
        type="EnableHook", enable=True, show=False, interval=3, out_dir="out"
    )
    cfg = _config("DrawHook")
    evaluation.enable_visualization(cfg, show_dir="out")
    assert cfg.default_hooks.visualization == dict(
        type="DrawHook", draw=True, show=False, test_out_dir="out"
    )
    cfg = _config("VisualizerHook", visualizer=dict(type="SegLocalVisualizer"))
    evaluation.enable_visualization(cfg, show_dir="out")
    assert cfg.default_hooks.visualization.draw is True
    assert cfg.visualizer.save_dir == "out"
    assert cfg.visualizer.vis_backends == [dict(type="LocalVisBackend")]


@pytest.mark.parametrize("hook", ["EnableHook", "DrawHook", "VisualizerHook"])
def test_show_waits(hook):
    cfg = _config(hook)
    evaluation.enable_visualization(cfg, show=True, wait_time=0.5)
    assert cfg.default_hooks.visualization.show is True
    assert cfg.default_hooks.visualization.wait_time == 0.5


def test_visualization_that_a_config_cannot_do():
    with pytest.raises(UserError, match="need default_hooks.visualization, which a.py lacks"):
        evaluation.enable_visualization(_config(), show_dir="out")
    with pytest.raises(UserError, match="needs a visualizer in a.py"):
        evaluation.enable_visualization(_config("VisualizerHook"), show_dir="out")
    with pytest.raises(UserError, match="'NoHook' in the config is not in the hook registry"):
        evaluation.enable_visualization(_config("NoHook"), show_dir="out")


@pytest.mark.parametrize(
    ("scope", "option"), [("mmpretrain", "out_dir"), ("mmdet", "test_out_dir"), ("mmseg", None)]
)
def test_show_dir_of_the_toolboxes(scope, option):
    """With the default hook of the scope if a config has none."""
    pytest.importorskip(scope)
    cfg = Config(dict(default_scope=scope, visualizer=dict(type="Visualizer")))
    evaluation.enable_visualization(cfg, show_dir="out")
    hook = cfg.default_hooks.visualization
    assert hook.get("enable", hook.get("draw")) is True
    where = cfg.visualizer.get("save_dir") if option is None else hook.get(option)
    assert where == "out"


def test_predictions_of_mmseg_into_a_folder():
    pytest.importorskip("mmseg")
    cfg = Config(dict(default_scope="mmseg", test_evaluator=dict(type="IoUMetric")))
    evaluation.write_predictions_to_folder(cfg, "out")
    assert cfg.test_evaluator.output_dir == "out"


PIPELINE = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]


def _tta_config(**kwargs) -> Config:
    inner = dict(type="CocoDataset", pipeline=PIPELINE)
    loader = dict(dataset=dict(type="RepeatDataset", times=2, dataset=inner))
    return Config(
        dict(model=dict(type="Net"), test_dataloader=loader, **kwargs),
        filename="a.py",
        cfg_text="#",
    )


def test_tta_of_the_config():
    flips = [dict(type="LoadImageFromFile"), dict(type="TestTimeAug")]
    cfg = _tta_config(tta_model=dict(type="MyTTA", x=1), tta_pipeline=flips)
    evaluation.enable_tta(cfg)
    assert cfg.model == dict(type="MyTTA", x=1, module=dict(type="Net"))
    assert cfg.test_dataloader.dataset.dataset.pipeline == flips
    assert "pipeline" not in cfg.test_dataloader.dataset


@pytest.mark.parametrize(
    ("scope", "model"),
    [("mmpretrain", "mmpretrain.AverageClsScoreTTA"), ("mmdet", "DetTTAModel")],
)
def test_tta_by_default_flips(scope, model):
    cfg = _tta_config(default_scope=scope)
    evaluation.enable_tta(cfg)
    assert cfg.model.type == model
    pytest.importorskip(f"{scope}.models")
    assert issubclass(launch.find_class(cfg, MODELS, cfg.model), BaseTTAModel)
    load, tta = cfg.test_dataloader.dataset.dataset.pipeline
    assert load == PIPELINE[0]
    flips, (pack,) = tta.transforms
    assert [flip.prob for flip in flips] == [1.0, 0.0]
    assert pack.type == "PackInputs"
    assert ("flip_direction" in pack.get("meta_keys", ())) == (scope == "mmdet")


def test_tta_reaches_every_dataset_that_reads_images():
    """Each keeps its own transforms before the flips."""
    parts = [dict(type="A", pipeline=[dict(type="LoadA"), *PIPELINE[1:]])]
    parts += [dict(type="ClassBalancedDataset", dataset=dict(type="B", pipeline=PIPELINE))]
    parts += [dict(type="ConcatDataset", datasets=[dict(type="C", pipeline=PIPELINE)] * 2)]
    cfg = _tta_config(default_scope="mmpretrain")
    cfg.test_dataloader.dataset = dict(type="ConcatDataset", datasets=parts)
    evaluation.enable_tta(cfg)
    first, second, third = cfg.test_dataloader.dataset.datasets
    leaves = [first, second.dataset, *third.datasets]
    assert [leaf.pipeline[0].type for leaf in leaves] == ["LoadA", *["LoadImageFromFile"] * 3]
    assert [leaf.pipeline[-1].type for leaf in leaves] == ["TestTimeAug"] * 4


@pytest.mark.parametrize(
    ("dataset", "kind"),
    [
        (dict(type="A"), "A"),
        (dict(type="M.Mix", pipeline=PIPELINE, dataset=dict(type="A", pipeline=PIPELINE)), "Mix"),
        ([], "list"),
    ],
)
def test_tta_of_datasets_whose_pipeline_cannot_be_replaced(dataset, kind):
    cfg = _tta_config(default_scope="mmpretrain")
    cfg.test_dataloader.dataset = dataset
    with pytest.raises(UserError, match=f"--tta replaces .* test_dataloader of a.py has a {kind}$"):
        evaluation.enable_tta(cfg)


@pytest.mark.parametrize("model", [dict(roi_head=dict(mask_head=dict())), dict(panoptic_head={})])
def test_tta_of_masks(model):
    cfg = _tta_config(default_scope="mmdet")
    cfg.model.update(model)
    with pytest.raises(UserError, match="--tta: mmdet's DetTTAModel merges boxes but not masks"):
        evaluation.enable_tta(cfg)
    cfg = _tta_config(default_scope="mmdet", tta_model=dict(type="MyTTA"))
    cfg.model.update(model)
    evaluation.enable_tta(cfg)
    assert cfg.model.type == "MyTTA"


def test_toolbox_of_a_config_without_a_default_scope():
    """With classes of mmpretrain and mmdet, their dotted names and their scoped names as `type`."""

    class Detector:
        __module__ = "mmdet.models.detectors.retinanet"

    for kind in (Detector, "mmdet.models.detectors.retinanet.RetinaNet", "mmdet.RetinaNet"):
        cfg = _tta_config()
        cfg.model.type = kind
        evaluation.enable_tta(cfg)
        assert cfg.model.type == "DetTTAModel"


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (dict(), "tta_model and tta_pipeline"),
        (dict(tta_model=dict(type="SegTTAModel")), "tta_pipeline"),
        (dict(tta_pipeline=[]), "tta_model"),
    ],
)
def test_tta_of_a_config_without_its_fields(given, missing):
    with pytest.raises(UserError, match=f"--tta needs {missing} in a.py"):
        evaluation.enable_tta(_tta_config(default_scope="mmengine", **given))


@pytest.mark.parametrize("form", ["one", "list", "evaluator", "one in an evaluator"])
def test_predictions_into_a_folder(form):
    metric = dict(type="FolderMetric")
    evaluators = dict(one=metric, list=[metric], evaluator=dict(type="Evaluator", metrics=[metric]))
    evaluators["one in an evaluator"] = dict(type="Evaluator", metrics=metric)
    cfg = Config(dict(test_evaluator=evaluators[form]))
    evaluation.write_predictions_to_folder(cfg, "out")
    written = dict(type="FolderMetric", output_dir="out", keep_results=True)
    expected = dict(
        one=written, list=[written], evaluator=dict(type="Evaluator", metrics=[written])
    )
    expected["one in an evaluator"] = dict(type="Evaluator", metrics=written)
    assert cfg.test_evaluator == expected[form]


def test_metrics_that_write_no_folder():
    cfg = Config(dict(test_evaluator=[dict(type="DumpResults", out_file_path="a.pkl")]))
    with pytest.raises(UserError, match="--out 'out': a folder needs a metric"):
        evaluation.write_predictions_to_folder(cfg, "out")


def test_a_test_that_wrote_nothing(tmp_path):
    runner = SimpleNamespace(work_dir=str(tmp_path / "work"), timestamp="now")
    begin = time.time()
    shown, relative = tmp_path / "shown", tmp_path / "work" / "now" / "pictures"
    for folder in (shown, relative):
        folder.mkdir(parents=True)
        old = folder / "old.png"
        old.touch()
        os.utime(old, (begin - 60, begin - 60))
    for option, path in (("--out", "no.pkl"), ("--show-dir", str(shown)), ("--out", "pictures")):
        with pytest.raises(UserError, match=f"{option} '{path}': the test ended without writing"):
            evaluation.require_written(runner, option, path, begin)
    for folder, path in ((shown, str(shown)), (relative, "pictures")):
        (folder / "new.png").touch()
        evaluation.require_written(runner, "--show-dir", path, begin)
