"""Figures of the filters of an image, independent of a display and of pyplot's state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecFromSubplotSpec, SubplotSpec
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ddf_mm.visualization.filters import Filters, check_points, choose_differing

POINT_COLORS = ("#ffb000", "#00c2a8", "#ff5fa2", "#6f8cff", "#b6e300", "#ff7b3a")
FILTER_CMAP, DISTANCE_CMAP = "RdBu_r", "viridis"
ARROWS = "↖↑↗←·→↙↓↘"
# Number of channels in a block of combined filters.
COMBINED_CHANNELS = 8


def figure_to_image(figure: Figure) -> np.ndarray:
    """A figure's pixels, ``uint8[H, W, 3]``, RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def limit_of(values: np.ndarray) -> float:
    """Limit of a symmetrical color scale, below outliers, which would make all else pale."""
    return float(np.quantile(np.abs(values), 0.995)) or 1.0


def letter(i: int) -> str:
    """The name of the i-th point: A, B, …, Z, AA, …."""
    return (letter(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)


def _plain(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])


def _badge(axis: Axes, x: float, y: float, i: int, **kwargs) -> None:
    """The letter of the i-th point."""
    axis.text(
        x,
        y,
        letter(i),
        ha="center",
        va="center",
        fontsize=9,
        fontweight="bold",
        bbox=dict(
            boxstyle="circle,pad=0.2",
            facecolor=POINT_COLORS[i % len(POINT_COLORS)],
            edgecolor="black",
            linewidth=0.8,
        ),
        **kwargs,
    )


def _draw_filter(axis: Axes, taps: np.ndarray, limit: float, color: str = "0.6", width: float = 1):
    """A k x k filter in a frame."""
    drawn = axis.imshow(taps, cmap=FILTER_CMAP, vmin=-limit, vmax=limit)
    _plain(axis)
    for spine in axis.spines.values():
        spine.set(color=color, linewidth=width)
    return drawn


def _draw_distance(axis: Axes, image: np.ndarray, filters: Filters):
    """The distance of each pixel's filter from the mean filter, shaded by the image."""
    height, width = image.shape[:2]
    distance = filters.distance
    drawn = axis.imshow(
        distance, cmap=DISTANCE_CMAP, extent=(-0.5, width - 0.5, height - 0.5, -0.5)
    )
    gray = image.mean(axis=2)
    shade = np.zeros((height, width, 4))
    # Black, more opaque where the image is dark, so that colors keep their hue.
    shade[..., 3] = 0.45 * (1 - gray / max(gray.max(), 1))
    axis.imshow(shade, interpolation="nearest")
    return drawn


def _draw_tap_maps(figure: Figure, cell: SubplotSpec, spatial: np.ndarray, limit: float):
    """The map of each tap over the image, arranged as in the window."""
    k = spatial.shape[0]
    grid = GridSpecFromSubplotSpec(k, k, cell, wspace=0.06, hspace=0.06)
    for i in range(k):
        for j in range(k):
            axis = figure.add_subplot(grid[i, j])
            drawn = axis.imshow(spatial[i, j], cmap=FILTER_CMAP, vmin=-limit, vmax=limit)
            _plain(axis)
    return drawn


def _draw_point_filters(
    figure: Figure,
    cell: SubplotSpec,
    filters: Filters,
    limit: float,
    points: Sequence[tuple[int, int]],
    size: tuple[int, int],
) -> None:
    """The k x k filter of the first group at each point."""
    height, width = size
    across = 2 if len(points) <= 4 else 3
    down = -(-len(points) // across)
    grid = GridSpecFromSubplotSpec(down, across, cell, wspace=0.16, hspace=0.16)
    for i, (x, y) in enumerate(points):
        axis = figure.add_subplot(grid[i // across, i % across])
        row, column = filters.cell(x, y, width, height)
        color = POINT_COLORS[i % len(POINT_COLORS)]
        _draw_filter(axis, filters.spatial[0, :, :, row, column], limit, color, 3)
        _badge(axis, 0, 1, i, transform=axis.transAxes)


def _draw_channel_matrix(axis: Axes, filters: Filters):
    """A row for each channel, a column for each tap; subpixels side by side."""
    subpixels, channels, k, _ = filters.channel.shape
    matrix = filters.channel.reshape(subpixels, channels, k * k).swapaxes(0, 1)
    limit = limit_of(filters.channel)
    drawn = axis.imshow(
        matrix.reshape(channels, -1),
        cmap=FILTER_CMAP,
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
    )
    if subpixels > 1:
        columns = filters.scale_factors[1]
        centres = [(n + 0.5) * k * k - 0.5 for n in range(subpixels)]
        names = [f"subpixel\n{n // columns},{n % columns}" for n in range(subpixels)]
        axis.set_xticks(centres, names, fontsize=8)
        for n in range(1, subpixels):
            axis.axvline(n * k * k - 0.5, color="black", linewidth=1)
    elif k == 3:
        axis.set_xticks(range(9), list(ARROWS), fontsize=11)
    else:
        names = [f"{i},{j}" for i in range(k) for j in range(k)]
        axis.set_xticks(range(k * k), names, fontsize=5, rotation=90)
    axis.set_ylabel(f"{channels} channels", fontsize=10.5)
    return drawn


def draw_filters(
    image: np.ndarray,
    filters: dict[str, Filters],
    points: Sequence[tuple[int, int]],
    title: str = "",
) -> Figure:
    """Draw a row of panels for each layer.

    The panels are the image with the points; a map of the distance of each pixel's spatial filter
    from the mean filter; a map of each tap; the spatial filters at the points; and the channel
    filters as a matrix. Of layers with several filter groups the first group is drawn.

    Args:
        image: ``uint8[H, W, 3]``, RGB, the network's input.
        filters: filters by the label of the layer.
        points: pixels (x, y) of the image.
        title: title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: a point is outside the image.
    """
    height, width = image.shape[:2]
    check_points(points, height, width)
    # In inches, fixed per row, so that text fits for any number of rows.
    row, top, bottom = 3.1, 1.3, 0.65
    tall = row * len(filters) + top + bottom
    figure = Figure(figsize=(16.5, tall))
    grid = figure.add_gridspec(
        len(filters),
        5,
        width_ratios=(1, 1.12, 1.12, 1.0, 1.2),
        left=0.045,
        right=0.955,
        top=1 - top / tall,
        bottom=bottom / tall,
        wspace=0.3,
        hspace=0.24,
    )
    figure.suptitle(title, fontsize=17, y=1 - 0.28 / tall, va="top")
    headings = (
        "input",
        "where the spatial filter departs\nfrom its mean over the image",
        "spatial filters:\na map for each tap of the window",
        "spatial filters\nat the marked pixels",
        "channel filters:\na row for each channel",
    )
    for column, text in enumerate(headings):
        box = grid[0, column].get_position(figure)
        place = ((box.x0 + box.x1) / 2, box.y1 + 0.12 / tall)
        figure.text(*place, text, ha="center", va="bottom", fontsize=12.5)

    for r, (label, ours) in enumerate(filters.items()):
        rows, columns = ours.spatial.shape[-2:]
        limit = limit_of(ours.spatial[0])

        axis = figure.add_subplot(grid[r, 0])
        axis.imshow(image, interpolation="nearest")
        _plain(axis)
        # Grid of the cells that share a filter, unless it would be too dense.
        if max(rows, columns) <= 40:
            for i in range(1, columns):
                axis.axvline(i * width / columns - 0.5, color="white", alpha=0.25, linewidth=0.7)
            for i in range(1, rows):
                axis.axhline(i * height / rows - 0.5, color="white", alpha=0.25, linewidth=0.7)
        for i, (x, y) in enumerate(points):
            _badge(axis, x, y, i)
        fontsize = 15 if len(label) <= 12 else 9
        axis.set_ylabel(label, fontsize=fontsize, fontweight="bold", labelpad=10)
        axis.set_xlabel(f"{width} x {height} pixels", fontsize=10.5)

        axis = figure.add_subplot(grid[r, 1])
        drawn = _draw_distance(axis, image, ours)
        for i, (x, y) in enumerate(points):
            _badge(axis, x, y, i)
        _plain(axis)
        groups = f", group 1 of {ours.groups}" if ours.groups > 1 else ""
        axis.set_xlabel(f"{columns} x {rows} filters{groups}", fontsize=10.5)
        figure.colorbar(drawn, ax=axis, fraction=0.046, pad=0.04)

        drawn = _draw_tap_maps(figure, grid[r, 2], ours.spatial[0], limit)
        _draw_point_filters(figure, grid[r, 3], ours, limit, points, (height, width))
        box = grid[r, 2].get_position(figure)
        bar = figure.add_axes((box.x1 + 0.006, box.y0, 0.0075, box.height))
        figure.colorbar(drawn, cax=bar, extend="both", ticks=MaxNLocator(5))

        axis = figure.add_subplot(grid[r, 4])
        drawn = _draw_channel_matrix(axis, ours)
        if r == len(filters) - 1:
            axis.set_xlabel("tap, by its place in the window", fontsize=10.5)
        figure.colorbar(
            drawn, ax=axis, fraction=0.046, pad=0.04, extend="both", ticks=MaxNLocator(5)
        )
    return figure


def _draw_combined_block(
    figure: Figure,
    cell: SubplotSpec,
    label: str,
    ours: Filters,
    points: Sequence[tuple[int, int]],
    size: tuple[int, int],
) -> None:
    """A table of combined filters, with a row for each point and a column for each channel."""
    height, width = size
    subpixels, channels = ours.channel.shape[:2]
    cells = [ours.cell(x, y, width, height) for x, y in points]
    flat = ours.channel.swapaxes(0, 1).reshape(channels, -1)
    chosen = sorted(choose_differing(flat, COMBINED_CHANNELS))
    # One axis for all filters, since axes are slow to draw; a filter is a unit square in it.
    axis = figure.add_subplot(cell)
    axis.axis("off")
    step, first = 1.12, 1.3

    def draw(i: int, j: int, taps: np.ndarray, limit: float, color: str, width: float) -> None:
        x, y = (0.0 if n == 0 else first + step * (n - 1) for n in (j, i))
        axis.imshow(taps, cmap=FILTER_CMAP, vmin=-limit, vmax=limit, extent=(x, x + 1, y + 1, y))
        axis.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=color, linewidth=width))

    sign = {"mul": "×", "add": "+"}[ours.kernel_combine]
    axis.text(0.5, 0.5, f"spatial\n{sign} channel", ha="center", va="center", fontsize=9)
    channel_limit, spatial_limit = limit_of(ours.channel), limit_of(ours.spatial[0])
    # For an upsampling layer: the subpixel of the first point.
    subpixel = ours.subpixel(*cells[0])
    for j, channel in enumerate(chosen, 1):
        draw(0, j, ours.channel[subpixel, channel], channel_limit, "black", 1)
        axis.text(first + step * (j - 1) + 0.5, -0.08, f"ch {channel}", ha="center", fontsize=8)
    combined = np.array([[ours.combined(*place, c) for c in chosen] for place in cells])
    limit = limit_of(combined)
    for i, place in enumerate(cells, 1):
        color = POINT_COLORS[(i - 1) % len(POINT_COLORS)]
        draw(i, 0, ours.spatial[(0, ..., *place)], spatial_limit, color, 3)
        _badge(axis, 0, first + step * (i - 1), i - 1)
        for j in range(len(chosen)):
            draw(i, j + 1, combined[i - 1, j], limit, "0.6", 1)
    axis.set(
        xlim=(-0.15, first + step * len(chosen)),
        ylim=(first + step * len(cells), -0.1),
        anchor="NW",
    )
    box = cell.get_position(figure)
    tall = figure.get_figheight()
    figure.text(box.x0, box.y1 + 0.27 / tall, label, fontsize=13, fontweight="bold", va="bottom")
    if subpixels > 1:
        note = "channel filters along the top: of A's subpixel"
        place = (box.x1, box.y1 + 0.29 / tall)
        figure.text(*place, note, fontsize=9, ha="right", va="bottom")


def draw_combined(
    image: np.ndarray,
    filters: dict[str, Filters],
    points: Sequence[tuple[int, int]],
    title: str = "",
) -> Figure:
    """Draw the combined filters of some channels at points.

    A block for each layer: the spatial filters of the points in the left column, the channel
    filters of the channels that differ most in the top row, and their combinations between them.

    Args:
        image: ``uint8[H, W, 3]``, RGB, the network's input.
        filters: filters by the label of the layer.
        points: pixels (x, y) of the image.
        title: title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: there is no point, or one is outside the image.
    """
    height, width = image.shape[:2]
    check_points(points, height, width)
    if not points:
        raise ValueError("points must hold at least one pixel (x, y), got none")
    across = 1 if len(filters) == 1 else 2
    down = -(-len(filters) // across)
    block = 0.62 * (len(points) + 1.25)
    head = 2.3  # inches, for the title and the image
    wide, tall = 6.4 * across + 0.5, (block + 0.7) * down + head
    figure = Figure(figsize=(wide, tall))
    grid = figure.add_gridspec(
        down, across, left=0.35 / wide, right=1 - 0.25 / wide, top=1 - (head + 0.5) / tall,
        bottom=0.2 / tall, wspace=0.08, hspace=0.7 / block,
    )  # fmt: skip
    axis = figure.add_axes((0.35 / wide, 1 - (head - 0.25) / tall, 2.2 / wide, 1.9 / tall))
    axis.set_anchor("W")
    axis.imshow(image, interpolation="nearest")
    _plain(axis)
    for i, (x, y) in enumerate(points):
        _badge(axis, x, y, i)
    figure.text(2.8 / wide, 1 - 0.3 / tall, title.replace("  ·  ", "\n"), fontsize=14, va="top")
    what = (
        "top row: channel filters · left column: spatial filters\n"
        "of the marked pixels · between them: what is applied"
    )
    figure.text(2.8 / wide, 1 - (head - 0.3) / tall, what, va="bottom", fontsize=9.5)
    for i, (label, ours) in enumerate(filters.items()):
        cell = grid[i // across, i % across]
        _draw_combined_block(figure, cell, label, ours, points, (height, width))
    return figure
