"""A self-contained HTML page with the pictures and the filters."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from ddf_mm.visualization.drawing import (
    DISTANCE_CMAP,
    FILTER_CMAP,
    POINT_COLORS,
    figure_to_image,
    letter,
    limit_of,
)
from ddf_mm.visualization.filters import Filters, check_points

_TEMPLATE = Path(__file__).with_name("page.html")


def _data_uri(image: np.ndarray) -> str:
    """An image ``uint8[H, W, 3]`` as a data URI of a PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _colored(values: np.ndarray, cmap: str, low: float, high: float) -> np.ndarray:
    scaled = (values - low) / ((high - low) or 1.0)
    return (colormaps[cmap](scaled.clip(0, 1))[..., :3] * 255).round().astype(np.uint8)


def _packed(values: np.ndarray) -> dict[str, object]:
    """Numbers as int8 times ``scale``, in C order and base64."""
    scale = float(np.abs(values).max()) / 127 or 1.0
    data = (values / scale).round().astype(np.int8)
    return dict(scale=scale, data=base64.b64encode(data.tobytes()).decode(), shape=values.shape)


def write_page(
    path: Path,
    image: np.ndarray,
    filters: dict[str, Filters],
    points: Sequence[tuple[int, int]],
    figures: Sequence[Figure] = (),
    title: str = "",
) -> None:
    """Write a page on which a click on the image shows the filters of that pixel.

    The file is self-contained. Filters are rounded to 1/127 of the largest tap of their layer.

    Args:
        path: the file to write.
        image: ``uint8[H, W, 3]``, RGB, as the network reads it.
        filters: filters by the label of the layer.
        points: pixels (x, y) of the image; the page shows the first one's filters until a click.
        figures: figures to show below.
        title: title of the page.

    Raises:
        ValueError: there is no point, or one is outside the image.
    """
    height, width = image.shape[:2]
    check_points(points, height, width)
    if not points:
        raise ValueError("points must hold at least one pixel (x, y), got none")
    layers = []
    for label, ours in filters.items():
        distance, channel = ours.distance, ours.channel.swapaxes(0, 1)
        limit = limit_of(ours.channel)
        layers.append(
            dict(
                label=label,
                combine=ours.kernel_combine,
                scale_factors=ours.scale_factors,
                spatial=_packed(ours.spatial),
                channel=_packed(ours.channel),
                distance=_data_uri(_colored(distance, DISTANCE_CMAP, 0, float(distance.max()))),
                matrix=_data_uri(
                    _colored(channel.reshape(len(channel), -1), FILTER_CMAP, -limit, limit)
                ),
            )
        )
    data = dict(
        width=width,
        height=height,
        image=_data_uri(image),
        points=[
            dict(x=x, y=y, name=letter(i), color=POINT_COLORS[i % len(POINT_COLORS)])
            for i, (x, y) in enumerate(points)
        ],
        # The filters' color map, from the smallest to the largest tap.
        colors=_colored(np.linspace(-1, 1, 33), FILTER_CMAP, -1, 1).tolist(),
        layers=layers,
    )
    pictures = "\n".join(f'<img src="{_data_uri(figure_to_image(f))}" alt="">' for f in figures)
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        # A tag in the data must not end the script element.
        data=json.dumps(data).replace("</", "<\\/"),
        pictures=pictures,
    )
    path.write_text(text, encoding="utf-8")
