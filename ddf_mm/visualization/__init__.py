"""Pictures of the filters that a DDF network generates for an image.

:func:`capture_filters` runs a model and keeps the filters of some of its layers;
:func:`draw_filters` and :func:`draw_combined` draw them, :func:`write_page` puts both and the
filters themselves into one HTML file. :class:`~ddf_mm.engine.DDFFilterVisualizationHook` draws
while a model is trained.
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
