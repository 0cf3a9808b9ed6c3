#!/usr/bin/env python3
"""Generate a small data set for detection, segmentation and joint upsampling, without a download.

It has scikit-learn's digits, resized and tinted, on crops of its two photographs: JPEG images, COCO
annotations of boxes, masks and panoptic segments, semantic PNGs and depth PNGs. The result is
byte-identical for the same options.
"""

import argparse
from pathlib import Path

from ddf_mm.datasets.digit_scenes import MAX_SIZE, MIN_SIZE, write_digit_scenes
from ddf_mm.engine import cli


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="make_digit_scenes.py", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to create; must not exist, or be empty")
    parser.add_argument("--num-train", type=int, default=2400, help="default: %(default)s")
    parser.add_argument("--num-val", type=int, default=200, help="default: %(default)s")
    parser.add_argument(
        "--size",
        type=int,
        default=128,
        help=f"side of the scenes in pixels, {MIN_SIZE} to {MAX_SIZE}; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    """Generate the data set."""
    args = parse_args()
    try:
        write_digit_scenes(args.out, args.num_train, args.num_val, args.size, args.seed)
    except (FileExistsError, ValueError) as error:
        raise cli.UserError(str(error), exit_code=2) from error


if __name__ == "__main__":
    cli.run(main, "make_digit_scenes.py")
