#!/usr/bin/env python3
"""Write a checkpoint for publication: only the weights of a training checkpoint, and the config and
classes that the inferencers read."""

import argparse
from pathlib import Path

from ddf_mm.engine import checkpoints, cli, conversion
from ddf_mm.engine.cli import UserError

META = ("cfg", "dataset_meta", "epoch", "iter", "mmengine_version")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="publish_model.py", description=__doc__)
    parser.add_argument("src", help="a checkpoint of mmengine's Runner")
    parser.add_argument("dst", type=Path, help="the file to write; must not exist")
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="write the trained weights instead of their exponential moving average (EMAHook)",
    )
    parser.add_argument("--no-config", action="store_true", help="omit the config")
    parser.add_argument(
        "--hash-name",
        action="store_true",
        help="write NAME-{hash8}.pth instead of NAME.pth, with the first digits of its SHA-256",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    return parser.parse_args()


def without_average(checkpoint: dict, src: str) -> dict:
    """The trained weights; EMAHook saves them under ``ema_state_dict``, and the average as the
    model's."""
    averaged = checkpoint.get("ema_state_dict")
    if averaged is None:
        raise UserError(f"src {src!r} has no moving average, which --no-ema would omit", 2)
    trained = {
        name.removeprefix("module."): value
        for name, value in averaged.items()
        if name.startswith("module.")
    }
    return {**checkpoint["state_dict"], **trained}


def main() -> None:
    """Publish."""
    args = parse_args()
    checkpoints.require_checkpoint(args.src, "src")
    conversion.check_target(args.dst, args.overwrite)
    checkpoint = checkpoints.load_from_local_file(args.src, map_location="cpu")
    if "state_dict" not in checkpoint:
        raise UserError(
            f"src {args.src!r} has no 'state_dict': it is not a checkpoint of a Runner", 2
        )
    weights = without_average(checkpoint, args.src) if args.no_ema else checkpoint["state_dict"]
    meta = checkpoint.get("meta", {})
    kept = {name: meta[name] for name in META if name in meta}
    if args.no_config:
        kept.pop("cfg", None)
    published = dict(meta=kept, state_dict=weights)
    path, digest = conversion.save(published, args.dst, args.hash_name)
    left_out = sorted(set(checkpoint) - set(published))
    print(path)
    print(f"  tensors   {len(weights)}")
    print(f"  left out  {', '.join(left_out) or 'nothing'}")
    print(f"  sha256    {digest}")


if __name__ == "__main__":
    cli.run(main, "publish_model.py")
