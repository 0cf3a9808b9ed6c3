"""Pictures of the filters that a DDF network predicts for an image.

:func:`capture_filters` runs a model and returns the filters of some of its layers;
:func:`draw_filters` and :func:`draw_combined` draw them, :func:`write_page` writes them into one
HTML file. :class:`~ddf_mm.engine.DDFFilterVisualizationHook` draws during training.
"""

from ddf_mm.visualization.drawing import draw_combined, draw_filters, figure_to_image
from ddf_mm.visualization.filters import (
    Filters,
    capture_filters,
    choose_points,
    find_layers,
    network_image,
    picture,
)
from ddf_mm.visualization.page import write_page

__all__ = [
    "Filters",
    "capture_filters",
    "choose_points",
    "draw_combined",
    "draw_filters",
    "figure_to_image",
    "find_layers",
    "network_image",
    "picture",
    "write_page",
]
