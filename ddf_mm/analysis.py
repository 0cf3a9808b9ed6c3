"""Models of configs without weights and data, to count and time them."""

from __future__ import annotations

import os.path as osp
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import BaseModel, PretrainedInit, revert_sync_batchnorm
from mmengine.registry import (
    DATASETS,
    MODELS,
    TRANSFORMS,
    WEIGHT_INITIALIZERS,
    init_default_scope,
)
from mmengine.structures import PixelData
from torch import nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from ddf_mm.engine import launch
from ddf_mm.engine.cli import UserError, phase
from ddf_mm.engine.phases import data_sources
from ddf_mm.ops import backend_info
from ddf_mm.registry import resolve
from ddf_mm.utils import dicts_with, toolbox, type_name

# Usual height and width of images for which each toolbox's costs are given.
SHAPES = dict(mmpretrain=(224, 224), mmdet=(800, 1333), mmseg=(512, 1024))


@dataclass(frozen=True)
class Cost:
    """The multiply-adds of one image, and the model's parameters."""

    parameters: int
    taps: int
    others: int

    @property
    def total(self) -> int:
        return self.taps + self.others


def read_config(name: str, cfg_options: dict | None = None) -> Config:
    """Read a config by path or as ``toolbox::path``, for the functions below.

    Args:
        name, cfg_options: arguments of :func:`ddf_mm.engine.launch.load_config`.

    Raises:
        UserError: there is no such config, it has no model, its toolbox cannot be imported or is
            not one of mmpretrain, mmdet and mmseg.
    """
    cfg = launch.load_config(name, cfg_options)
    launch.require_fields(cfg, ("model",), "building a model")
    if toolbox(cfg) not in SHAPES:
        raise UserError(
            f"default_scope of {name} must be one of {', '.join(SHAPES)}, to make inputs for its "
            f"model; got {toolbox(cfg)!r}"
        )
    return cfg


def image_shape(cfg: Config, given: tuple[int, ...] | list[int] | None = None) -> tuple[int, int]:
    """Height and width from one or two given numbers, or the usual ones of the config's toolbox."""
    height, *width = given or SHAPES.get(toolbox(cfg), (224, 224))
    return height, *(width or [height])


def without_weights(node: object) -> None:
    """Remove every setting below a config node that would load weights."""
    for part in dicts_with(node, "pretrained"):
        part["pretrained"] = None
    for part in dicts_with(node, "init_cfg"):
        several = isinstance(part["init_cfg"], (list, tuple))
        steps = part["init_cfg"] if several else [part["init_cfg"]]
        loads = [bool(s) and resolve(s, WEIGHT_INITIALIZERS) is PretrainedInit for s in steps]
        steps = [s for s, is_load in zip(steps, loads, strict=True) if s and not is_load]
        part["init_cfg"] = steps if several else next(iter(steps), None)


def data_preprocessor(cfg: Config) -> dict:
    """The config's data preprocessor: that of the model or, in mmpretrain, of the top level."""
    return cfg.model.get("data_preprocessor") or cfg.get("data_preprocessor") or {}


def image_channels(cfg: Config) -> int:
    """The image channels of the config's model: of its backbone, or those that are normalized."""
    given = cfg.model.get("backbone", {}).get("in_channels")
    mean = data_preprocessor(cfg).get("mean") or ()
    # A single mean applies to all channels.
    return given or (len(mean) if len(mean) > 1 else 3)


def build_model(cfg: Config) -> nn.Module:
    """The config's model, with random weights, in evaluation mode."""
    without_weights(cfg.model)
    if data_preprocessor(cfg):
        cfg.model.data_preprocessor = data_preprocessor(cfg)
    init_default_scope(toolbox(cfg) or "mmengine")
    with phase("building the model"):
        return revert_sync_batchnorm(MODELS.build(cfg.model)).eval()


def build_dataset(cfg: Config, loader: str) -> Dataset:
    """The dataset of one of the config's data loaders."""
    init_default_scope(toolbox(cfg) or "mmengine")
    with phase(f"building the dataset of {loader}", data_sources(cfg[loader])):
        return DATASETS.build(cfg[loader].dataset)


def load_image(cfg: Config, image: str) -> dict:
    """One image through the config's test pipeline.

    Args:
        cfg: the config.
        image: a path, or ``dataset:INDEX``.

    Returns:
        What the pipeline returns: ``inputs`` and ``data_samples``.

    Raises:
        UserError: no such image.
    """
    if image.startswith("dataset:"):
        index = image.removeprefix("dataset:")
        if not index.isdecimal():
            raise UserError(
                f"image {image!r} must be dataset:INDEX with a whole number", exit_code=2
            )
        dataset = build_dataset(cfg, "test_dataloader")
        if int(index) >= len(dataset):
            raise UserError(
                f"image {image!r}: the test dataset has {len(dataset)} images, the last is "
                f"dataset:{len(dataset) - 1}",
                exit_code=2,
            )
        with phase(f"reading the image {image!r}"):
            return dataset[int(index)]

    if not Path(image).is_file():
        raise UserError(
            f"image {image!r} is neither a file nor dataset:INDEX (current folder: "
            f"{str(Path.cwd())!r})",
            exit_code=2,
        )
    # There are no annotations of such an image.
    steps = [s for s in _steps(cfg.test_dataloader.dataset) if "Annotation" not in type_name(s)]
    # A dataset in memory, like the digits, hands over pixels and its pipeline reads no files.
    if not steps or not type_name(steps[0]).endswith("FromFile"):
        colors = {1: "grayscale", 3: "color"}.get(image_channels(cfg), "unchanged")
        steps.insert(0, dict(type="LoadImageFromFile", color_type=colors))
    with phase(f"reading the image {image!r}"):
        data = Compose([TRANSFORMS.build(step) for step in steps])(dict(img_path=image))
    if data is None:
        raise UserError(f"image {image!r} does not pass the config's test pipeline")
    return data


def _steps(dataset: dict) -> list[dict]:
    """The pipeline of a dataset, the first of joined ones, then those of its containers."""
    inner = dataset.get("dataset") or dataset.get("datasets") or {}
    inner = _steps(inner[0] if isinstance(inner, (list, tuple)) else inner) if inner else []
    return [*inner, *(dataset.get("pipeline") or ())]


def example_batch(cfg: Config, batch_size: int, shape: tuple[int, int]) -> dict[str, list]:
    """Random images with valid labels for a config's model, before its data preprocessor.

    Args:
        cfg: a config of mmpretrain, mmdet or mmseg.
        batch_size: number of images.
        shape: their height and width.

    Returns:
        ``inputs`` and ``data_samples``, a list each.
    """
    scope = toolbox(cfg)
    if scope == "mmdet":
        return _detection_batch(cfg, batch_size, shape)
    classes = min((part["num_classes"] for part in dicts_with(cfg.model, "num_classes")), default=2)
    size = (image_channels(cfg), *shape)
    images = [torch.randint(0, 256, size, dtype=torch.uint8) for _ in range(batch_size)]
    if scope == "mmpretrain":
        from mmpretrain.structures import DataSample

        samples = [DataSample().set_gt_label(i % classes) for i in range(batch_size)]
    else:
        from mmseg.structures import SegDataSample

        meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape)
        samples = [
            SegDataSample(
                gt_sem_seg=PixelData(data=torch.randint(0, classes, (1, *shape))), metainfo=meta
            )
            for _ in range(batch_size)
        ]
    return dict(inputs=images, data_samples=samples)


def _detection_batch(cfg: Config, batch_size: int, shape: tuple[int, int]) -> dict[str, list]:
    from mmdet.testing import demo_mm_inputs

    heads = {name: part for name, part in cfg.model.items() if name != "rpn_head"}
    classes = [part["num_classes"] for part in dicts_with(heads, "num_classes")]
    classes += [part["num_things_classes"] for part in dicts_with(heads, "num_things_classes")]
    num_classes = min([n for n in classes if n] or [1])
    data = demo_mm_inputs(
        batch_size,
        image_shapes=(image_channels(cfg), *shape),
        num_items=[3 - i % 2 for i in range(batch_size)],
        num_classes=min(max(num_classes, 2), 80),
        with_mask=True,
        with_semantic=True,
    )
    for sample in data["data_samples"]:
        sample.gt_instances.labels.clamp_(max=num_classes - 1)
        sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))
    return data


def preprocessed(model: BaseModel, batch: dict[str, list]) -> tuple[torch.Tensor, list]:
    """Inputs and samples of :func:`example_batch` after the model's data preprocessor."""
    data = model.data_preprocessor(batch, False)
    return data["inputs"], data["data_samples"]


def fit_to(cfg: Config, shape: tuple[int, int]) -> None:
    """Make a segmentor's preprocessor pad to this shape instead of that of the training data."""
    if toolbox(cfg) == "mmseg":
        for part in (cfg.get("data_preprocessor"), cfg.model.get("data_preprocessor")):
            if part and "size" in part:
                part.size = shape


def count(model: BaseModel, batch: dict[str, list]) -> Cost:
    """Count the multiply-adds of the image of a batch of :func:`example_batch`.

    Raises:
        UserError: there are no compiled ops, which dynamic filters are counted by.
    """
    if backend_info()["cpu"] != "compiled":
        raise UserError(
            "dynamic filters are counted in the compiled ops, which are not available: "
            f"{backend_info()['why']}"
        )
    inputs, samples = preprocessed(model, batch)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs, samples, mode="tensor")
    counts = counter.get_flop_counts()["Global"]
    taps = sum(number for op, number in counts.items() if str(op).startswith("ddf_mm."))
    # A multiply-add is two of the counter's operations.
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        taps=taps // 2,
        others=(sum(counts.values()) - taps) // 2,
    )


def config_labels(names: list[str]) -> list[str]:
    """Short names of configs: the file name without suffix, or as given if it is not unique."""
    stems = []
    for name in names:
        path, plus, changes = name.partition("+")
        stems.append(osp.splitext(osp.basename(path))[0] + plus + changes)
    return [
        stem if stems.count(stem) == 1 else name for stem, name in zip(stems, names, strict=True)
    ]
