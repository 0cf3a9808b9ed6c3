#!/usr/bin/env python3
"""Write the CUDA kernels of every layer of the recipes and of the swapped configs as a table.

    python benchmarks/list_kernels.py [--out benchmarks/kernels_of_recipes.csv]

Backbones and necks are built on the meta device and run on one image of the recipe's size; each
call of ddf and ddf_up goes through the dispatch of csrc/cuda, compiled by the C++ compiler without
its kernels. No GPU and no CUDA toolkit are needed. tests/benchmarks/test_cuda_dispatch.py compares
the table with the dispatch.
"""

import argparse
import csv
import importlib
import sys
from pathlib import Path

import torch
from check_backbone_swap import families, resnet50_config, swapped
from cuda_dispatch import FIELDS, LAYOUTS, TABLE, Dispatch, Layer
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch.overrides import TorchFunctionMode

import ddf_mm.ops

ROOT = Path(__file__).resolve().parents[1]
# Image sizes by the name of a config; the sizes of crops, or of the usual image of the data set.
SIZES = {"in1k": (224, 224), "cifar": (32, 32), "cityscapes": (512, 1024), "ade20k": (512, 512)}
DETECTION, DIGITS = (800, 1344), (64, 64)


class Recorder(TorchFunctionMode):
    """Collects the calls of ddf and ddf_up."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: set[Layer] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (ddf_mm.ops.ddf, ddf_mm.ops.ddf_up):
            x, channel, spatial, kernel, first, second, combine, *_ = args
            up = func is ddf_mm.ops.ddf_up
            dilation, stride, scale = (second, 1, first) if up else (first, second, 1)
            groups = 1 if spatial is None else spatial.shape[-3] // kernel**2
            filters = "both" if None not in (channel, spatial) else "one"
            sizes = x.shape[1], groups, *x.shape[2:], kernel, dilation, stride, scale
            self.layers.add(Layer("ddf_up" if up else "ddf", *map(int, sizes), combine, filters))
        return func(*args, **(kwargs or {}))


def image_size(name: str) -> tuple[int, int]:
    named = (size for part, size in SIZES.items() if part in name)
    return next(named, DIGITS if "digit" in name else DETECTION)


def record(recorder: Recorder, cfg: Config, name: str) -> None:
    """Runs backbone and neck of a config, or the whole model for joint upsampling."""
    model = cfg.model.get("detector", cfg.model)
    height, width = image_size(name)
    with torch.device("meta"), torch.no_grad(), recorder:
        if "backbone" not in model:
            scale = model.scale_factor
            net = MODELS.build(model)
            net(
                torch.zeros(1, 1, height // scale, width // scale), torch.zeros(1, 3, height, width)
            )
            return
        model.backbone.pop("init_cfg", None)
        features = MODELS.build(model.backbone)(torch.zeros(1, 3, height, width))
        neck = model.get("neck")
        if isinstance(neck, dict) and "DDF" in neck.type:
            neck.pop("init_cfg", None)
            MODELS.build(neck)(features)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    recorder, failed = Recorder(), []

    def attempt(name, scope, read):
        try:
            init_default_scope(scope)
            importlib.import_module(f"{scope}.models")
            record(recorder, read(), name)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")

    scopes = {"classification": "mmpretrain", "detection": "mmdet", "segmentation": "mmseg"}
    for path in sorted((ROOT / "configs").glob("[!_]*/*.py")):
        scope = scopes.get(path.parent.name, "ddf_mm")
        attempt(path.stem, scope, lambda path=path: Config.fromfile(path))
    for toolbox in ("mmdet", "mmseg"):
        for family in families(toolbox):
            config = resnet50_config(toolbox, family)
            for swap in ("mul", "dcn") if config else ():
                size = "" if toolbox == "mmdet" else "cityscapes"
                attempt(
                    f"{config} {swap} {size}",
                    toolbox,
                    lambda t=toolbox, c=config, s=swap: swapped(t, c, s),
                )
    with Dispatch() as dispatch, args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            [*FIELDS, *(f"{p} {name}" for name in LAYOUTS for p in ("forward", "backward"))]
        )
        for layer in sorted(recorder.layers):
            writer.writerow([*layer, *dispatch.kernels_of(layer)])
    for line in failed:
        print(line)
    print(f"{len(recorder.layers)} layers, {len(failed)} configs failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
