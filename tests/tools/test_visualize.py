"""The tools that draw: their pictures show the values that the network computes."""

import copy
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

pytest.importorskip("mmpretrain")

from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS, init_default_scope

from ddf_mm import analysis

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "classification" / "ddf-mul-resnet26_digits.py"


TOOLS = ROOT / "tools" / "analysis"


@pytest.fixture(scope="module")
def cfg() -> Config:
    return Config.fromfile(CONFIG)


@pytest.fixture(scope="module")
def model(cfg):
    init_default_scope("mmpretrain")
    torch.manual_seed(0)
    model = MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "random.pth"
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta={})), path)
    return str(path)


@pytest.fixture
def run(monkeypatch):
    """Runs a tool in this process, which has imported the toolbox."""

    def run_tool(tool: str, *arguments: object) -> None:
        path = str(TOOLS / f"{tool}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        runpy.run_path(path, run_name="__main__")

    return run_tool


@pytest.fixture
def refused(run, capfd):
    """Runs a tool with invalid arguments; returns its one line of stderr."""

    def run_tool(tool: str, *arguments: object) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(tool, *arguments)
        assert ended.value.code in (1, 2)
        (line,) = capfd.readouterr().err.splitlines()
        return line

    return run_tool


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are saved, in order."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: saved.append(f) or save(f, *a, **k))
    return saved


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(float)


class TestFilters:
    def test_an_image_file_is_read_as_the_dataset_reads_it(self, cfg, model, tmp_path):
        init_default_scope("mmpretrain")
        dataset_cfg = dict(cfg.test_dataloader.dataset, pipeline=[])
        from mmengine.registry import DATASETS

        scan = DATASETS.build(dataset_cfg).get_data_info(4)["img"]
        Image.fromarray(scan).save(tmp_path / "scan.png")
        from_file = analysis.load_image(cfg, str(tmp_path / "scan.png"))
        from_dataset = analysis.load_image(cfg, "dataset:4")
        assert torch.equal(from_file["inputs"], from_dataset["inputs"])
        scores = [
            model.test_step(pseudo_collate([data]))[0].pred_score
            for data in (from_file, from_dataset)
        ]
        torch.testing.assert_close(*scores)

    @pytest.mark.parametrize("kind", ["ConcatDataset", "RepeatDataset", "KFoldDataset"])
    def test_datasets_in_containers(self, cfg, tmp_path, kind):
        wrapped, digits = Config(copy.deepcopy(cfg.to_dict())), cfg.test_dataloader.dataset
        given = dict(
            ConcatDataset=dict(datasets=[digits, digits]),
            RepeatDataset=dict(times=2, dataset=digits),
            KFoldDataset=dict(fold=0, test_mode=True, dataset=digits),
        )[kind]
        wrapped.test_dataloader.dataset = dict(type=kind, **given)
        Image.new("RGB", (8, 8), "gray").save(tmp_path / "a.png")
        init_default_scope("mmpretrain")
        for image in ("dataset:3", str(tmp_path / "a.png")):
            got, expected = (analysis.load_image(c, image) for c in (wrapped, cfg))
            assert torch.equal(got["inputs"], expected["inputs"])

    @pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
    def test_image_files_of_other_channels(self, cfg, tmp_path, channels, mode):
        cfg = Config(copy.deepcopy(cfg.to_dict()))
        cfg.model.backbone.in_channels = channels
        cfg.data_preprocessor.update(mean=[77.9] * channels, std=[95.9] * channels)
        Image.new(mode, (8, 8)).save(tmp_path / "a.png")
        init_default_scope("mmpretrain")
        data = analysis.load_image(cfg, str(tmp_path / "a.png"))
        assert data["inputs"].shape == (channels, 48, 48)

    def test_writes_pictures_and_a_page(self, run, tmp_path, checkpoint, capsys):
        everything, some = tmp_path / "new" / "all.png", tmp_path / "some.png"
        run("visualize_filters", CONFIG, checkpoint, "dataset:0", "--out", everything)
        assert capsys.readouterr().out.splitlines()[-3:] == [
            f"filters: {everything}",
            f"filters: {tmp_path / 'new' / 'all_combined.png'}",
            f"page: {tmp_path / 'new' / 'all.html'}",
        ]
        points = ("10,20", "30,5", "47,47", "0,0", "24,24")
        run(
            "visualize_filters", CONFIG, checkpoint, "dataset:1", "--out", some,
            "--stages", 3, "--layers", "backbone.layer1.1.conv2", "--points", *points,
        )  # fmt: skip
        a, b = pixels(everything), pixels(some)
        assert a.shape[1] == b.shape[1] == 1650
        assert a.shape[0] - b.shape[0] == pytest.approx(2 * 310, abs=2)
        combined = pixels(tmp_path / "some_combined.png")
        for picture in (a, b, combined):
            assert picture.std() > 30
            # Red and blue taps, not an empty frame.
            assert ((picture[..., 0] - picture[..., 2]) > 100).mean() > 0.01
            assert ((picture[..., 2] - picture[..., 0]) > 100).mean() > 0.01
        page = everything.with_suffix(".html").read_text(encoding="utf-8")
        assert "dataset:0" in page and page.count("data:image/png;base64,") == 2 * 4 + 3

    @pytest.mark.parametrize(
        ("toolbox", "config"),
        [
            ("mmdet", "detection/mask-rcnn_ddf-mul-r26_ddfup-fpn_digit-scenes.py"),
            ("mmseg", "segmentation/fpn_ddf-mul-r26_ddfup-fpn_digit-scenes.py"),
        ],
    )
    def test_detectors_and_segmentors(self, run, tmp_path, toolbox, config):
        pytest.importorskip(f"{toolbox}.structures")
        image, checkpoint = tmp_path / "image.jpg", tmp_path / "random.pth"
        Image.fromarray(np.random.randint(0, 256, (50, 70, 3), np.uint8)).save(image)
        cfg = Config.fromfile(ROOT / "configs" / config)
        init_default_scope(toolbox)
        torch.save(MODELS.build(cfg.model).state_dict(), checkpoint)
        out = tmp_path / "filters.png"
        which = ("--stages", 1, "--layers", "neck.upsample_modules.0")
        arguments = (ROOT / "configs" / config, checkpoint, image, "--out", out)
        run("visualize_filters", *arguments, *which)
        assert pixels(out).std() > 30
        page = out.with_suffix(".html").read_text(encoding="utf-8")
        assert "stage 1" in page and "neck.upsample_modules.0" in page and "image.jpg" in page

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["dataset:360"], "the test dataset has 360 images, the last is dataset:359"),
            (["dataset:-1"], "must be dataset:INDEX with a whole number"),
            (["no.png"], "'no.png' is neither a file nor dataset:INDEX"),
            (["dataset:0", "--stages", "2", "7"], "stages 7: no DDF layers there; .* 1, 2, 3, 4"),
            (["dataset:0", "--points", "48,0"], "points 48,0 is outside .* 48 x 48 pixels"),
            (
                ["dataset:0", "--cfg-options", "model.backbone.base_channels=8"],
                "does not match the model: of another size: backbone.* more$",
            ),
            (
                [
                    "dataset:0",
                    "--cfg-options",
                    "model.backbone.stage_with_ddf=False,False,False,False",
                ],
                "the model has no DDF layers",
            ),
        ],
    )
    def test_bad_arguments(self, refused, tmp_path, checkpoint, arguments, message):
        out = tmp_path / "filters.png"
        line = refused("visualize_filters", CONFIG, checkpoint, *arguments, "--out", out)
        assert re.search(message, line)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("point", ["3", "3,", "a,b", "1.5,2", "-1,2", "1,2,3"])
    def test_bad_points(self, refused, checkpoint, point):
        line = refused("visualize_filters", CONFIG, checkpoint, "dataset:0", f"--points={point}")
        assert "is not of the form x,y" in line

    def test_missing_and_broken_checkpoint(self, refused, tmp_path):
        assert "'no.pth' is not a file" in refused(
            "visualize_filters", CONFIG, "no.pth", "dataset:0"
        )
        (tmp_path / "broken.pth").write_text("no checkpoint")
        assert "not a checkpoint that torch can read" in refused(
            "visualize_filters", CONFIG, tmp_path / "broken.pth", "dataset:0"
        )


def write_log(folder: Path, records: list[dict]) -> Path:
    log = folder / "vis_data" / "scalars.json"
    log.parent.mkdir(parents=True)
    log.write_text("\n".join(map(json.dumps, records)) + "\n")
    return log


def records(epochs: int, length: int, top1: float = 50.0) -> list[dict]:
    out = []
    for epoch in range(1, epochs + 1):
        for i in range(length // 2, length + 1, length // 2):
            step = (epoch - 1) * length + i
            out.append(dict(lr=0.1, loss=3.0 / step, time=0.1, epoch=epoch, iter=step, step=step))
        out.append(
            {"accuracy/top1": top1 + epoch, "accuracy/top5": 99.0, "time": 0.1, "step": epoch}
        )
    return out


class TestCurves:
    def test_draws_what_the_log_holds(self, run, figures, tmp_path):
        run("plot_curves", write_log(tmp_path / "20260101_000000", records(3, 20)))
        loss, metric = (axis.get_lines()[0] for axis in figures[0].axes)
        np.testing.assert_allclose(loss.get_xdata(), [0.5, 1, 1.5, 2, 2.5, 3])
        np.testing.assert_allclose(loss.get_ydata(), [3.0 / s for s in range(10, 61, 10)])
        np.testing.assert_allclose(metric.get_xdata(), [1, 2, 3])
        np.testing.assert_allclose(metric.get_ydata(), [51, 52, 53])
        assert figures[0].axes[1].get_ylabel() == "accuracy/top1"

    def test_iterations_where_the_log_has_no_epochs(self, run, figures, tmp_path):
        log = write_log(
            tmp_path / "run",
            [
                dict(loss=1.0, iter=50, step=50),
                dict(loss=0.5, iter=100, step=100),
                dict(mIoU=1, step=100),
            ],
        )
        run("plot_curves", log, "--metrics", "mIoU")
        np.testing.assert_allclose(figures[0].axes[0].get_lines()[0].get_xdata(), [50, 100])
        assert figures[0].axes[0].get_xlabel() == "iteration"

    def test_takes_the_latest_training_of_a_work_folder(self, run, capsys, tmp_path):
        write_log(tmp_path / "20260101_000000", records(1, 10))
        latest = write_log(tmp_path / "20260102_000000", records(2, 10))
        write_log(tmp_path / "20260103_000000", [{"accuracy/top1": 3.0, "step": 0}])
        run("plot_curves", tmp_path)
        assert capsys.readouterr().out == f"curve: {latest.parent / 'curve.png'}\n"

    def test_writes_a_picture(self, run, tmp_path, capsys):
        write_log(tmp_path / "20260101_000000", records(4, 20))
        out = tmp_path / "new" / "curve.png"
        run(
            "plot_curves",
            tmp_path,
            "--out",
            out,
            "--metrics",
            "accuracy/top1",
            "accuracy/top5",
        )
        assert capsys.readouterr().out == f"curve: {out}\n"
        picture = pixels(out)
        assert picture.shape == (600, 1080, 3)
        assert picture.std() > 20
        run("plot_curves", tmp_path)
        beside = tmp_path / "20260101_000000" / "vis_data" / "curve.png"
        assert not np.array_equal(pixels(beside), picture)

    def test_draws_a_loss_without_validation(self, run, tmp_path):
        write_log(tmp_path / "run", [r for r in records(2, 10) if "loss" in r])
        out = tmp_path / "curve.png"
        run("plot_curves", tmp_path, "--out", out)
        assert pixels(out).std() > 10

    def test_bad_logs_and_arguments(self, refused, tmp_path):
        assert "'nowhere' is neither a file nor a folder" in refused("plot_curves", "nowhere")
        assert "has no */vis_data/scalars.json" in refused("plot_curves", tmp_path)
        log = write_log(tmp_path / "run", records(2, 10))
        assert "--metrics mAP: not in the log, which has accuracy/top1" in refused(
            "plot_curves", log, "--metrics", "mAP"
        )
        log.write_text('{"loss": 1, "step": 1}\n{"loss"')
        assert "line 2 is not JSON" in refused("plot_curves", log)
        log.write_text("[1]\n")
        assert "line 1 must be a JSON object" in refused("plot_curves", log)
        log.write_text('{"accuracy/top1": 3, "step": 1}\n')
        assert "has no record with a loss" in refused("plot_curves", log)
