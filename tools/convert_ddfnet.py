#!/usr/bin/env python3
"""Convert an official DDF-ResNet checkpoint (theFoxofSky/ddfnet) to one for mmpretrain.

The result can also initialize detectors and segmentors:
init_cfg=dict(type='Pretrained', checkpoint='DST', prefix='backbone.')."""

import argparse
from pathlib import Path

from ddf_mm.engine import checkpoints, cli, conversion, launch


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="convert_ddfnet.py", description=__doc__)
    parser.add_argument("src", help="a state dict or a training checkpoint, with timm's names")
    parser.add_argument("dst", type=Path, help="the file to write; must not exist")
    parser.add_argument(
        "--kernel-combine",
        choices=conversion.COMBINES,
        help="how the network combines its filters; required if neither the checkpoint nor the "
        "file's name has this information",
    )
    parser.add_argument(
        "--weights",
        choices=["auto", "model", "ema"],
        default="auto",
        help="which weights of a training checkpoint; auto: the exponential moving average if "
        "there is one",
    )
    parser.add_argument("--config", help="a config whose backbone the checkpoint must match")
    parser.add_argument(
        "--backbone-only",
        action="store_true",
        help="write only the backbone, without the prefix 'backbone.' in its names",
    )
    parser.add_argument(
        "--hash-name",
        action="store_true",
        help="write NAME-{hash8}.pth instead of NAME.pth, with the first digits of its SHA-256",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    return parser.parse_args()


def main() -> None:
    """Convert."""
    args = parse_args()
    checkpoints.require_checkpoint(args.src, "src")
    conversion.check_target(args.dst, args.overwrite)
    network = conversion.read_official(args.src, args.weights)
    if args.kernel_combine:
        combine, source = args.kernel_combine, "--kernel-combine"
    else:
        combine, source = conversion.find_combine(network, Path(args.src).name)
    if args.config:
        conversion.require_config_fits(launch.load_config(args.config), network, combine)

    checkpoint = conversion.convert(network, combine, args.backbone_only)
    path, digest = conversion.save(checkpoint, args.dst, args.hash_name)
    tensors = checkpoint["state_dict"].values()
    parameters = sum(
        value.numel()
        for name, value in checkpoint["state_dict"].items()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )
    print(f"{path}: DDF-ResNet{network.arguments['depth']}, {combine} (from {source})")
    print(f"  weights     {'exponential moving average' if network.averaged else 'of the model'}")
    print(f"  tensors     {len(tensors)}")
    print(f"  parameters  {parameters:,}")
    print(f"  sha256      {digest}")


if __name__ == "__main__":
    cli.run(main, "convert_ddfnet.py")
