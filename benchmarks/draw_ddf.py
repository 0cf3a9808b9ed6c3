#!/usr/bin/env python3
"""Draw an explanation of decoupled dynamic filters, with the values of a layer on a scanned digit.

All maps in the figure are computed: the features of the digit are the input of a DDFPack with
seeded random weights, and the panels show the outputs of its branches and of the operation.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: a server has no display
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from sklearn.datasets import load_digits

from ddf_mm.layers import DDFPack

CHANNELS, SIZE, KERNEL = 6, 12, 3
DIGIT, SEED = 5, 2
PIXEL = (4, 7)  # (row, column) of the window that is followed through the figure
CHANNEL = 2
SPATIAL_COLOR, CHANNEL_COLOR, COMBINED_COLOR = "#e8871e", "#2a9d5c", "#6a4c93"
SPATIAL_TITLE = dict(fontsize=14, fontweight="bold", color=SPATIAL_COLOR)
CHANNEL_TITLE = dict(fontsize=14, fontweight="bold", color=CHANNEL_COLOR)
MARK = "#35e0ff"
FILTER_CMAP, FEATURE_CMAP = "RdBu_r", "magma"


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parents[1] / "docs" / "ddf.png"
    parser.add_argument(
        "--out", type=Path, default=default, help="PNG to write; default: docs/ddf.png"
    )
    return parser.parse_args()


@torch.no_grad()
def compute() -> dict[str, np.ndarray]:
    """Runs a DDFPack on a digit.

    Returns:
        ``x`` and ``output`` (``float[C, H, W]``), ``spatial`` (``float[k, k, H, W]``) and
        ``channel`` (``float[C, k, k]``).
    """
    generator = torch.Generator().manual_seed(SEED)
    digit = torch.from_numpy(load_digits().images[DIGIT] / 16).float()
    digit = F.interpolate(digit[None, None], (SIZE, SIZE), mode="bicubic", align_corners=False)
    features = F.conv2d(digit, torch.randn(CHANNELS, 1, 3, 3, generator=generator), padding=1)
    features = features.relu()

    layer = DDFPack(CHANNELS, KERNEL, se_ratio=0.5)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    return dict(
        x=features[0].numpy(),
        spatial=layer.spatial_branch(features)[0].unflatten(0, (KERNEL, KERNEL)).numpy(),
        channel=layer.channel_branch(features).reshape(CHANNELS, KERNEL, KERNEL).numpy(),
        output=layer(features)[0].numpy(),
    )


class Canvas:
    """A figure whose coordinates are hundredths of its height, origin at the top left."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = plt.figure(figsize=(width / 10, height / 10))
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set_xlim(0, width)
        self.axis.set_ylim(height, 0)
        self.axis.axis("off")
        self.width, self.height = width, height

    def image(self, x: float, y: float, size: float, values: np.ndarray, **kwargs) -> None:
        """A square picture with a thin frame, its top left corner at (x, y)."""
        self.axis.imshow(
            values,
            extent=(x, x + size, y + size, y),
            interpolation="nearest",
            zorder=kwargs.pop("zorder", 3),
            **kwargs,
        )
        self.frame(x, y, size, size)

    def frame(
        self, x: float, y: float, width: float, height: float, color="0.25", line=0.8
    ) -> None:
        """A rectangle without filling."""
        self.axis.add_patch(
            Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=line, zorder=6)
        )

    def text(self, x: float, y: float, text: str, **kwargs) -> None:
        """Text, by default centred at (x, y)."""
        style = dict(ha="center", va="center", fontsize=11.5)
        self.axis.text(x, y, text, **(style | kwargs))

    def steps(
        self, x: float, y: float, steps: list[tuple[str, float]], gap: float, color: str
    ) -> None:
        """The steps of a branch: rectangles with texts and widths, and an arrow after each."""
        for text, width in steps:
            self.axis.add_patch(
                FancyBboxPatch(
                    (x, y - 3.2),
                    width,
                    6.4,
                    boxstyle="round,pad=0,rounding_size=0.9",
                    facecolor="white",
                    edgecolor=color,
                    linewidth=1.8,
                    zorder=4,
                )
            )
            self.text(x + width / 2, y, text, zorder=5)
            self.arrow([(x + width, y), (x + width + gap, y)], color)
            x += width + gap

    def arrow(self, points: list[tuple[float, float]], color: str) -> None:
        """An arrow along straight lines through the points."""
        *start, end = points
        xs, ys = zip(*start, strict=True)
        self.axis.plot(xs, ys, color=color, linewidth=2, solid_joinstyle="miter", zorder=2)
        self.axis.add_patch(
            FancyArrowPatch(
                start[-1],
                end,
                arrowstyle="-|>",
                mutation_scale=15,
                linewidth=2,
                color=color,
                shrinkA=0,
                shrinkB=0,
                zorder=2,
            )
        )

    def stack(self, x: float, y: float, size: float, maps: np.ndarray) -> None:
        """Feature maps as overlapping squares, the first in front, its top left corner at (x, y).

        Each map has its own scale, for its structure to show.
        """
        for i in range(len(maps) - 1, -1, -1):
            self.image(
                x + 0.9 * i,
                y - 0.9 * i,
                size,
                maps[i],
                vmin=float(maps[i].min()),
                vmax=float(maps[i].max()),
                cmap=FEATURE_CMAP,
                zorder=3 - 0.1 * i,
            )

    def filter(
        self, x: float, y: float, size: float, taps: np.ndarray, color: str, line: float = 2.4
    ) -> None:
        """A k x k filter, white where a tap is zero."""
        limit = float(np.abs(taps).max())
        self.image(x, y, size, taps, vmin=-limit, vmax=limit, cmap=FILTER_CMAP)
        self.frame(x, y, size, size, color, line)


def draw(data: dict[str, np.ndarray]) -> plt.Figure:
    """Draw the figure.

    Args:
        data: what :func:`compute` returns.

    Returns:
        The figure.
    """
    row, column = PIXEL
    # The channel that the figure follows is in front.
    order = [CHANNEL, *(c for c in range(CHANNELS) if c != CHANNEL)]
    x, output, channel = (data[name][order] for name in ("x", "output", "channel"))
    spatial = data["spatial"]
    window = x[0, row - 1 : row + 2, column - 1 : column + 2]
    canvas = Canvas(150, 62)
    upper, middle, lower = 15, 31, 47
    size, tile = 16.0, 8.0
    cell = size / SIZE

    # The features, and the window that the figure follows.
    canvas.stack(4, 23, size, x)
    canvas.frame(4 + (column - 1) * cell, 23 + (row - 1) * cell, 3 * cell, 3 * cell, MARK, 2.4)
    canvas.text(14, 41.6, "features $x$", fontsize=14, fontweight="bold")
    canvas.text(14, 44.4, r"$C \times H \times W$", color="0.35")
    canvas.arrow([(25.5, middle), (28.5, middle), (28.5, upper), (32, upper)], SPATIAL_COLOR)
    canvas.arrow([(25.5, middle), (28.5, middle), (28.5, lower), (32, lower)], CHANNEL_COLOR)
    canvas.axis.plot([25.5, 28.5], [middle, middle], color="0.35", linewidth=2, zorder=2.5)

    # The branches.
    canvas.text(45.5, upper - 7, "spatial branch", **SPATIAL_TITLE)
    canvas.steps(32, upper, [("1 × 1\nconv", 10.0), ("Filter-\nNorm", 10.0)], 5.1, SPATIAL_COLOR)
    canvas.text(45.5, lower + 7, "channel branch", **CHANNEL_TITLE)
    canvas.steps(
        32,
        lower,
        [("GAP", 5.4), ("FC\nReLU", 5.4), ("FC", 3.6), ("Filter-\nNorm", 6.4)],
        2.35,
        CHANNEL_COLOR,
    )

    # The filters.
    small, gap = 4.8, 0.5
    for i in range(KERNEL):
        for j in range(KERNEL):
            left, top = 63.1 + j * (small + gap), upper - 7.7 + i * (small + gap)
            limit = float(np.abs(spatial).max())
            canvas.image(left, top, small, spatial[i, j], vmin=-limit, vmax=limit, cmap=FILTER_CMAP)
            dot = small / SIZE
            canvas.frame(left + column * dot, top + row * dot, dot, dot, SPATIAL_COLOR, 1.8)
    canvas.text(70.8, upper + 10.3, r"$k \times k$ taps for every pixel", color="0.35")
    for i in range(CHANNELS):
        left, top = 63.1 + (i % 3) * (small + gap), lower - 5.05 + (i // 3) * (small + gap)
        canvas.filter(left, top, small, channel[i], "0.25", 0.8)
    canvas.frame(63.1, lower - 5.05, small, small, CHANNEL_COLOR, 2.4)
    canvas.text(70.8, lower + 7.4, r"$k \times k$ taps for every channel", color="0.35")

    canvas.arrow([(79.8, upper), (82.6, upper)], SPATIAL_COLOR)
    canvas.filter(83.5, upper - tile / 2, tile, spatial[:, :, row, column], SPATIAL_COLOR)
    canvas.text(92.6, upper, "$s_p$  of pixel $p$", ha="left", color=SPATIAL_COLOR, fontsize=13)
    canvas.arrow([(79.8, lower), (82.6, lower)], CHANNEL_COLOR)
    canvas.filter(83.5, lower - tile / 2, tile, channel[0], CHANNEL_COLOR)
    canvas.text(92.6, lower, "$d_c$  of channel $c$", ha="left", color=CHANNEL_COLOR, fontsize=13)

    # Combination and application.
    canvas.arrow([(87.5, upper + tile / 2 + 0.4), (87.5, middle - 3.4)], SPATIAL_COLOR)
    canvas.arrow([(87.5, lower - tile / 2 - 0.4), (87.5, middle + 3.4)], CHANNEL_COLOR)
    canvas.axis.add_patch(
        Circle((87.5, middle), 3.2, facecolor="white", edgecolor=COMBINED_COLOR, linewidth=2)
    )
    canvas.text(87.5, middle, r"$\odot$", fontsize=22)
    canvas.arrow([(90.8, middle), (94.6, middle)], COMBINED_COLOR)
    canvas.filter(
        95.5, middle - tile / 2, tile, spatial[:, :, row, column] * channel[0], COMBINED_COLOR
    )
    canvas.text(105.6, middle, r"$\cdot$", fontsize=30, fontweight="bold")
    canvas.image(
        107.8,
        middle - tile / 2,
        tile,
        window,
        vmin=float(x[0].min()),
        vmax=float(x[0].max()),
        cmap=FEATURE_CMAP,
    )
    canvas.frame(107.8, middle - tile / 2, tile, tile, MARK, 2.4)
    canvas.text(111.8, middle + 6.3, "window of $x_c$", color="0.35")
    canvas.arrow([(116.8, middle), (124.4, middle)], COMBINED_COLOR)
    canvas.text(120, middle - 2.8, r"$\sum$", fontsize=17)
    canvas.stack(125.5, 23, size, output)
    canvas.frame(125.5 + column * cell, 23 + row * cell, cell, cell, MARK, 2.4)
    canvas.text(135.5, 41.6, "output $y$", fontsize=14, fontweight="bold")
    canvas.text(135.5, 44.4, r"$C \times H \times W$", color="0.35")

    canvas.text(
        126,
        7,
        "Decoupled dynamic filter",
        fontsize=18,
        fontweight="bold",
    )
    canvas.text(
        126,
        10.4,
        "a depthwise filter for every pixel of every image",
        fontsize=12,
        color="0.35",
    )
    canvas.text(
        124,
        53.2,
        r"$y_c(p) \;=\; \sum_{q}\; \left(\, s_p(q) \,\odot\, d_c(q) \,\right)\; x_c(p + q)$",
        fontsize=18,
    )
    canvas.text(
        124,
        58.4,
        r"$\odot$ multiplies (mul) or adds (add),  $q$ runs over the $k \times k$ window",
        fontsize=11,
        color="0.35",
    )
    return canvas.figure


def main() -> None:
    """Draw the figure."""
    args = parse_args()
    figure = draw(compute())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100, metadata={"Software": None})
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
