#!/usr/bin/env python3
"""Check DDF in the ResNet-50 configs of mmdet and mmseg and write a table of the results.

For each installed family (folder of configs), one config is changed by the lines that
docs/backbones.md gives. Its model is built with random weights and run on two small images of odd
size: loss, backward pass, prediction.
"""

import argparse
import importlib
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmengine.utils import get_installed_path
from rich.progress import track
from torch import nn

import ddf_mm.layers
from ddf_mm.analysis import example_batch, fit_to, without_weights
from ddf_mm.engine import cli
from ddf_mm.utils import dicts_with

FRAGMENTS = Path(__file__).resolve().parents[1] / "configs" / "_base_" / "backbones"
# Large enough for a few pixels in every level of a pyramid; odd, so that the size of each level is
# rounded.
IMAGE_SIZE = (97, 129)
# The text of each swap after `backbone=`.
SWAPS = {
    "mul": "_base_.ddf_resnet",
    "add": "_base_.ddf_resnet",
    "dcn": "dict(dcn=dict({delete}type='ddf_mm.DDF'), stage_with_dcn=(False, True, True, True))",
    # The unchanged config, to distinguish its own failures from those of the swap.
    "none": "dict()",
}
# Families whose shortest file name is not the family's own detector.
PREFERRED = {
    "cascade_rpn": "cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py",
    "dcn": "faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
    "dcnv2": "faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
}

HEADER = """# Configs that run with DDF

Written by `benchmarks/check_backbone_swap.py`: one ResNet-50 config of each family of configs
that is installed, swapped as [backbones.md](backbones.md) says and run with random weights on two
images of {size} pixels (three times that where a model needs it), on a CPU: loss, backward pass,
prediction. `mul` and `add`: the backbone is DDFResNet-50. `dcn`: DDF by `dcn` in the last three
stages of the stock ResNet-50. Of models that wrap a detector, the detector is run.

{versions}.

"""


@dataclass
class Outcome:
    """The result of a config; ``error`` is empty if it passed."""

    toolbox: str
    config: str
    swap: str
    model: str
    error: str
    seconds: float


def config_folder(toolbox: str) -> Path:
    """The folder of configs in the package of a toolbox."""
    return Path(get_installed_path(toolbox)) / ".mim" / "configs"


def families(toolbox: str) -> list[str]:
    """Names of the folders with configs of ResNet-50."""
    folders = {path.parent for path in config_folder(toolbox).glob("*/*r50*.py")}
    return sorted(folder.name for folder in folders)


def resnet50_config(toolbox: str, family: str) -> str | None:
    """The shortest-named config of a family whose backbone is the ResNet-50 of the toolbox.

    Args:
        toolbox: ``'mmdet'`` or ``'mmseg'``.
        family: one of its folders of configs.

    Returns:
        The path within the toolbox's folder of configs, or None if the family only has its own
        ResNets.
    """
    root = config_folder(toolbox)
    paths = sorted((root / family).glob("*r50*.py"), key=lambda p: (len(p.name), p.name))
    if family in PREFERRED:
        paths.insert(0, root / family / PREFERRED[family])
    for path in paths:
        try:
            model = Config.fromfile(path).get("model", {})
        except FileNotFoundError:  # a base that is not packaged
            continue
        backbone = model.get("detector", model).get("backbone", {})
        if backbone.get("type") in ("ResNet", "ResNetV1c") and backbone.get("depth") == 50:
            return f"{family}/{path.name}"
    return None


def swapped(toolbox: str, config: str, swap: str) -> Config:
    """Reads a config that inherits a stock config and applies a swap, like a user's.

    Args:
        toolbox: ``'mmdet'`` or ``'mmseg'``.
        config: path within the toolbox's folder of configs.
        swap: a key of ``SWAPS``.
    """
    path = config_folder(toolbox) / config
    stock = Config.fromfile(path).model
    backbone_cfg = stock.get("detector", stock).backbone
    # mmengine merges a dict into an existing one; without one, `_delete_` would become a key.
    delete = "_delete_=True, " if backbone_cfg.get("dcn") else ""
    backbone = SWAPS[swap].format(delete=delete)
    bases = [str(path)]
    if swap in ("mul", "add"):
        bases.append(str(FRAGMENTS / f"ddf-{swap}-resnet50.py"))
        if backbone_cfg.get("init_cfg", {}) is None:
            backbone = f"dict({backbone}, init_cfg=None)"
    model = f"dict(backbone={backbone})"
    if "detector" in stock:
        model = f"dict(detector={model})"
    elif stock.get("pretrained"):
        model = f"dict(backbone={backbone}, pretrained=None)"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "swapped.py"
        path.write_text(f"_base_ = {bases}\nmodel = {model}\n")
        return Config.fromfile(path)


def prepare(cfg: Config) -> None:
    """Removes from a config what needs a download, and reduces the sizes of inputs and outputs."""
    # In the first iteration, a last norm initialized with zeros passes no gradient to the DDF.
    cfg.model.get("detector", cfg.model).backbone.zero_init_residual = False
    without_weights(cfg.model)
    for part in dicts_with(cfg.model, "type"):
        if part.type == "MMSyncBN":  # works in distributed training only
            part.type = "BN"
    for part in dicts_with(cfg.model, "batch_augments"):  # pads to the recipe's image size
        part.batch_augments = None
    # Untrained boxes may leave the image, where mmdet's pasting of masks fails on a CPU.
    for part in dicts_with(cfg.model, "clip_border"):
        part.clip_border = True
    for part in dicts_with(cfg.model, "max_per_img"):
        part.max_per_img = min(part.max_per_img, 30)
    for part in dicts_with(cfg.model, "num_proposals"):
        part.num_proposals = min(part.num_proposals, 30)
    for part in dicts_with(cfg.model, "num"):  # samplers
        part.num = min(part.num, 32)
    if "num_queries" in cfg.model:  # the default exceeds the number of pixels of small images
        cfg.model.num_queries = min(cfg.model.num_queries, 50)
    if "teacher_ckpt" in cfg.model:  # knowledge distillation
        cfg.model.teacher_ckpt = None
    if "teacher_config" in cfg.model:  # relative to mmdet's repository
        cfg.model.teacher_config = str(config_folder("mmdet").parent / cfg.model.teacher_config)


def run(toolbox: str, cfg: Config, image_size: tuple[int, int] = IMAGE_SIZE) -> nn.Module:
    """Builds a config's model, runs loss, backward pass and prediction.

    Of a model that wraps a detector (for tracking or semi-supervised learning) it is the
    detector that runs.

    Returns:
        The model.

    Raises:
        Exception: whatever does not work.
    """
    prepare(cfg)
    init_default_scope(toolbox)
    importlib.import_module(f"{toolbox}.models")
    for key in ("epoch", "iter"):  # some heads read the progress of the training
        MessageHub.get_current_instance().update_info(key, 0)
    torch.manual_seed(0)
    np.random.seed(0)
    cfg.default_scope = toolbox
    model, data = model_and_data(cfg, image_size)
    model = revert_sync_batchnorm(model)
    model.init_weights()  # some parameters are uninitialized memory until then
    packs = ddf_layers(model)

    model.train()
    total, _ = model.parse_losses(model(**model.data_preprocessor(data, True), mode="loss"))
    if not total.isfinite():
        raise RuntimeError(f"the loss is {total.item()}")
    total.backward()
    if packs and not any(p.grad is not None and p.grad.any() for p in packs[-1].parameters()):
        raise RuntimeError("no gradient reaches the last DDF layer")

    model.eval()
    one = {name: values[:1] for name, values in data.items()}
    with torch.no_grad():
        results = model(**model.data_preprocessor(one, False), mode="predict")
    if len(results) != 1:
        raise RuntimeError(f"{len(results)} predictions for 1 image")
    return model


def ddf_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that filter with DDF."""
    return [m for m in model.modules() if isinstance(m, ddf_mm.layers.DDFPack)]


def model_and_data(cfg: Config, image_size: tuple[int, int]) -> tuple[nn.Module, dict]:
    """The model of a config and a batch of two images to train it with."""
    fit_to(cfg, image_size)
    toolbox = cfg.default_scope
    model_cfg = cfg.model.get("detector", cfg.model)
    if toolbox == "mmdet":
        default = dict(type="DetDataPreprocessor", pad_size_divisor=32)
        model_cfg.setdefault("data_preprocessor", default)
    model = MODELS.build(model_cfg)
    data = example_batch(Config(dict(model=model_cfg, default_scope=toolbox)), 2, image_size)
    if toolbox != "mmdet":
        return model, data
    # Some semantic heads need ground truth of another resolution, relative to the padded image.
    rescaled = [
        t.scale_factor
        for t in dicts_with(cfg.get("train_pipeline", []), "scale_factor")
        if t.type == "SegRescale"
    ]
    for sample in data["data_samples"]:
        if not getattr(model, "with_rpn", True):
            sample.proposals = InstanceData(bboxes=sample.gt_instances.bboxes)
        if rescaled:
            size = [round(-(-side // 32) * 32 * rescaled[0]) for side in image_size]
            sample.gt_sem_seg = PixelData(sem_seg=torch.zeros(1, *size, dtype=torch.uint8))
    return model, data


def check(toolbox: str, config: str, swap: str) -> Outcome:
    """The outcome of a config; after a failure it is repeated with larger images."""
    start = time.perf_counter()
    name, error = "", ""
    for factor in (1, 3):
        size = tuple(factor * side for side in IMAGE_SIZE)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = run(toolbox, swapped(toolbox, config, swap), size)
            if swap != "none" and not ddf_layers(model.backbone):
                raise RuntimeError("the backbone has no DDF layer")
        except Exception as exception:
            error = f"{type(exception).__name__}: {' '.join(str(exception).split())}"
        else:
            name, error = type(model).__name__, ""
            break
    return Outcome(toolbox, config, swap, name, error, time.perf_counter() - start)


def reason(outcome: Outcome) -> str:
    """Why a config failed, and whether it also fails without the swap."""
    if stock_error(outcome.toolbox, outcome.config) == outcome.error:
        return f"the stock config fails here as well: {outcome.error}"
    return outcome.error


@cache
def stock_error(toolbox: str, config: str) -> str:
    """The error of the unchanged config."""
    return check(toolbox, config, "none").error


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as Markdown: a row for each config, then the reasons of failures."""
    swaps = list(dict.fromkeys(o.swap for o in outcomes))
    lines, notes = [], []
    for toolbox in dict.fromkeys(o.toolbox for o in outcomes):
        rows: dict[str, dict[str, Outcome]] = {}
        for o in outcomes:
            if o.toolbox == toolbox:
                rows.setdefault(o.config, {})[o.swap] = o
        passed = {swap: sum(not row[swap].error for row in rows.values()) for swap in swaps}
        counts = ", ".join(f"`{swap}` {n}" for swap, n in passed.items())
        lines += [f"## {toolbox} {version(toolbox)}", "", f"Passed of {len(rows)}: {counts}.", ""]
        lines += [f"| config | model | {' | '.join(f'`{swap}`' for swap in swaps)} |"]
        lines += [f"| :-- | :-- |{' :-: |' * len(swaps)}"]
        for config, row in rows.items():
            cells = []
            for swap in swaps:
                if row[swap].error:
                    why = f"`{config}`, `{swap}`: {reason(row[swap])}"
                    notes.append(why.replace("<", "&lt;"))
                    cells.append(f"[{len(notes)}](#what-did-not-pass)")
                else:
                    cells.append("passed")
            model = next((o.model for o in row.values() if o.model), "")
            lines.append(f"| {config} | {model} | {' | '.join(cells)} |")
        lines.append("")
    if notes:
        lines += ["## What did not pass", ""]
        lines += [f"{i}. {note}" for i, note in enumerate(notes, 1)] + [""]
    return "\n".join(lines)


def version(package: str) -> str:
    """The version of a package, by its import name."""
    return importlib.import_module(package).__version__


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="check_backbone_swap.py", description=__doc__)
    parser.add_argument(
        "--toolbox", nargs="+", choices=["mmdet", "mmseg"], default=["mmdet", "mmseg"]
    )
    parser.add_argument(
        "--swap",
        nargs="+",
        choices=["mul", "add", "dcn"],
        default=["mul", "add", "dcn"],
        help="mul, add: replace the backbone by DDFResNet-50 of that kernel_combine; dcn: replace "
        "the 3x3 convolutions of the backbone's last three stages, dcn=dict(type='ddf_mm.DDF')",
    )
    parser.add_argument("--family", nargs="+", help="folders of configs; default: all")
    parser.add_argument("--out", type=Path, help="Markdown file to write; default: print it")
    return parser.parse_args()


def main() -> None:
    """Check the configs and write the table."""
    args = parse_args()
    MMLogger.get_instance("mmengine", log_level="ERROR")
    jobs = [
        (toolbox, config, swap)
        for toolbox in args.toolbox
        for family in families(toolbox)
        if args.family is None or family in args.family
        if (config := resnet50_config(toolbox, family)) is not None
        for swap in args.swap
    ]
    if not jobs:
        raise cli.UserError(f"--family {args.family}: no such folder with a ResNet-50 config")
    text = table([check(*job) for job in track(jobs, "Swapping")])
    versions = f"torch {torch.__version__}, mmcv {version('mmcv')}, mmengine {version('mmengine')}"
    text = HEADER.format(size=" x ".join(map(str, IMAGE_SIZE)), versions=versions) + text
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text)


if __name__ == "__main__":
    cli.run(main, "check_backbone_swap.py")
