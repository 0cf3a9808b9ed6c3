#!/usr/bin/env python3
"""Count parameters and multiply-adds of Faster R-CNN with FPN, FPN_CARAFE and DDFUpFPN."""

import argparse
from functools import partial
from importlib import import_module

import torch
from mmengine.analysis import FlopAnalyzer, parameter_count
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import get_installed_path
from rich.progress import track

from ddf_mm.engine import cli

CONFIG = "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
NECKS = {
    "FPN (nearest)": dict(),
    "FPN_CARAFE": dict(type="FPN_CARAFE"),
    "DDFUpFPN": dict(type="ddf_mm.DDFUpFPN"),
    "DDFUpFPN, `guidance=True`": dict(type="ddf_mm.DDFUpFPN", guidance=True),
}


class CARAFEFunction(torch.autograd.Function):
    """Replaces mmcv's CARAFE, which has no CPU kernel, to count: only the shape is right."""

    @staticmethod
    def forward(ctx, features, masks, kernel_size, group_size, scale_factor):
        return features.repeat_interleave(scale_factor, 2).repeat_interleave(scale_factor, 3)


def carafe_flops(inputs: list, outputs: list) -> int:
    """One multiply-add for each tap of each output, as for convolutions and DDF."""
    kernel_size = outputs[0].node().scalar_args()[0]
    return torch.Size(outputs[0].type().sizes()).numel() * kernel_size**2


def count(neck: dict, shape: tuple[int, int]) -> dict[str, int]:
    """Parameters and multiply-adds of the detector and of its neck.

    Args:
        neck: changes of the neck's config.
        shape: height and width of the image, before padding.
    """
    from mmdet.structures import DetDataSample

    cfg = Config.fromfile(f"{get_installed_path('mmdet')}/.mim/configs/{CONFIG}")
    cfg.model.neck.update(neck)
    model = MODELS.build(cfg.model).eval()
    sample = DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1, 1)))
    image = torch.zeros(3, *shape, dtype=torch.uint8)
    data = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]))
    model.forward = partial(model.forward, data_samples=data["data_samples"])
    analyzer = FlopAnalyzer(model, data["inputs"])
    analyzer.set_op_handle("prim::PythonOp.CARAFEFunction", carafe_flops)
    analyzer.unsupported_ops_warnings(False)
    parameters, flops = parameter_count(model), analyzer.by_module()
    return dict(
        neck_params=parameters["neck"],
        neck_flops=flops["neck"],
        params=parameters[""],
        flops=flops[""],
    )


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="compare_necks.py", description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    return parser.parse_args()


def main() -> None:
    """Print the table as Markdown."""
    args = parse_args()
    MMLogger.get_instance("mmengine", log_level="ERROR")
    init_default_scope("mmdet")
    # By name: `mmcv.ops.carafe` is the function.
    import_module("mmcv.ops.carafe").carafe = CARAFEFunction.apply
    rows = {name: count(neck, tuple(args.shape)) for name, neck in track(NECKS.items(), "Counting")}
    print("| neck | params | GFLOPs | Faster R-CNN R-50: params | GFLOPs |")
    print("| :-- | --: | --: | --: | --: |")
    for name, row in rows.items():
        cells = [f"{row['neck_params'] / 1e6:.2f} M", f"{row['neck_flops'] / 1e9:.1f}"]
        cells += [f"{row['params'] / 1e6:.2f} M", f"{row['flops'] / 1e9:.1f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    cli.run(main, "compare_necks.py")
