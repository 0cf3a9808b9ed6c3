import pytest
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, METRICS

from ddf_mm.engine import evaluation
from ddf_mm.engine.cli import UserError


@pytest.fixture(autouse=True)
def stand_ins():
    """Hooks and metrics with the constructors of the three toolboxes', in the root registries."""

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


def test_show_dir_goes_where_the_hook_takes_it():
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
    """With the hook of the scope where a config names none."""
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
    [("mmpretrain", "mmpretrain.AverageClsScoreTTA"), ("mmdet", "mmdet.DetTTAModel")],
)
def test_tta_by_default_flips(scope, model):
    cfg = _tta_config(default_scope=scope)
    evaluation.enable_tta(cfg)
    assert cfg.model.type == f"{scope}.{model}"
    load, tta = cfg.test_dataloader.dataset.dataset.pipeline
    assert load == PIPELINE[0]
    flips, (pack,) = tta.transforms
    assert [flip.prob for flip in flips] == [1.0, 0.0]
    assert pack.type == "PackInputs"
    assert ("flip_direction" in pack.get("meta_keys", ())) == (scope == "mmdet")


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (dict(), "tta_model and tta_pipeline"),
        (dict(tta_model=dict(type="SegTTAModel")), "tta_pipeline"),
        (dict(tta_pipeline=[]), "tta_model"),
    ],
)
def test_tta_that_a_config_lacks(given, missing):
    with pytest.raises(UserError, match=f"--tta needs {missing} in a.py"):
        evaluation.enable_tta(_tta_config(default_scope="mmengine", **given))


@pytest.mark.parametrize("form", ["one", "list", "evaluator"])
def test_predictions_into_a_folder(form):
    metric = dict(type="FolderMetric")
    evaluators = dict(one=metric, list=[metric], evaluator=dict(type="Evaluator", metrics=[metric]))
    cfg = Config(dict(test_evaluator=evaluators[form]))
    evaluation.write_predictions_to_folder(cfg, "out")
    written = dict(type="FolderMetric", output_dir="out", keep_results=True)
    expected = dict(
        one=written, list=[written], evaluator=dict(type="Evaluator", metrics=[written])
    )
    assert cfg.test_evaluator == expected[form]


def test_metrics_that_write_no_folder():
    cfg = Config(dict(test_evaluator=[dict(type="DumpResults", out_file_path="a.pkl")]))
    with pytest.raises(UserError, match="--out 'out': a folder needs a metric"):
        evaluation.write_predictions_to_folder(cfg, "out")
