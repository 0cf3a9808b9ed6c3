"""The filters that the DDF layers of a model predict for one image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn

from ddf_mm.layers import DDFPack, DDFUpPack
from ddf_mm.ops.checks import check_scale_factors
from ddf_mm.ops.reference import shuffle_pixels

DEFAULT_POINTS = 4
_STAGE = re.compile(r"(?:^|\.)layer(\d+)\.")


@dataclass(frozen=True)
class Filters:
    """The filters of one image in one layer.

    Attributes:
        spatial: ``float[g, k, k, H, W]``, the taps of each pixel of the output, by filter group.
        channel: ``float[r, C, k, k]``, the taps of each channel; r is 1, or the number of
            subpixels of an upsampling layer.
        kernel_combine: how the two combine, ``'mul'`` or ``'add'``.
        scale_factors: those of an upsampling layer, of the height and the width.
    """

    spatial: np.ndarray
    channel: np.ndarray
    kernel_combine: str
    scale_factors: tuple[int, int] = (1, 1)

    @property
    def kernel_size(self) -> int:
        return self.spatial.shape[1]

    @property
    def groups(self) -> int:
        return len(self.spatial)

    @property
    def distance(self) -> np.ndarray:
        """``float[H, W]``: distance of each pixel's filter from the mean, in the first group.

        The norm would show nothing, since FilterNorm makes it equal for all filters of a layer.
        """
        spatial = self.spatial[0]
        deviation = spatial - spatial.mean(axis=(2, 3), keepdims=True)
        return np.sqrt((deviation**2).sum(axis=(0, 1)))

    def cell(self, x: int, y: int, width: int, height: int) -> tuple[int, int]:
        """Row and column of the filter at pixel (x, y) of a network's input of width x height."""
        rows, columns = self.spatial.shape[-2:]
        return y * rows // height, x * columns // width

    def subpixel(self, row: int, column: int) -> int:
        """The subpixel of a pixel of the output, an index of the channel filters."""
        rows, columns = self.scale_factors
        return row % rows * columns + column % columns

    def combined(self, row: int, column: int, channel: int) -> np.ndarray:
        """``float[k, k]``: the filter that is applied to one channel at one pixel of the output."""
        group = channel * self.groups // self.channel.shape[1]
        spatial = self.spatial[group, :, :, row, column]
        ours = self.channel[self.subpixel(row, column), channel]
        return spatial * ours if self.kernel_combine == "mul" else spatial + ours


def find_layers(
    model: nn.Module,
    stages: Iterable[int] | None = None,
    layers: Iterable[str] | None = None,
) -> dict[str, nn.Module]:
    """The layers of a model to draw.

    Args:
        model: any model.
        stages: stages of a ResNet, counted from 1; of each, the last DDF layer.
        layers: names of DDF layers, as in ``model.named_modules()``.

    Returns:
        :class:`~ddf_mm.layers.DDFPack` and :class:`~ddf_mm.layers.DDFUpPack` modules by a label:
        ``stage N`` or the layer's name. With neither ``stages`` nor ``layers`` the last DDF layer
        of each stage, and every DDF layer outside stages.

    Raises:
        ValueError: the model has no DDF layers, or none in such a stage or of such a name.
    """
    named = {n: m for n, m in model.named_modules() if isinstance(m, (DDFPack, DDFUpPack))}
    if not named:
        raise ValueError("the model has no DDF layers")
    by_stage, others = {}, {}
    for name, module in named.items():
        if match := _STAGE.search(name):
            by_stage[int(match[1])] = module
        else:
            others[name] = module
    by_stage = dict(sorted(by_stage.items()))
    if stages is None and layers is None:
        return {**{f"stage {n}": module for n, module in by_stage.items()}, **others}

    stages, layers = sorted(set(stages or ())), list(dict.fromkeys(layers or ()))
    for what, wanted, there in (("stages", stages, by_stage), ("layers", layers, named)):
        if missing := [str(name) for name in wanted if name not in there]:
            raise ValueError(
                f"{what} {', '.join(missing)}: no DDF layers there; the model has them in "
                f"{', '.join(map(str, there)) or 'no stage named layer1, layer2, …'}"
            )
    return {**{f"stage {n}": by_stage[n] for n in stages}, **{n: named[n] for n in layers}}


@torch.no_grad()
def capture_filters(
    model: nn.Module, data: dict, layers: dict[str, nn.Module]
) -> tuple[dict[str, Filters], object]:
    """Run a model on an image and return the filters that its layers predict.

    Of a layer that runs several times, the last filters are returned. The model's mode and
    statistics are not changed.

    Args:
        model: a model of an OpenMMLab toolbox.
        data: one sample of its dataset.
        layers: layers by label, from :func:`find_layers`.

    Returns:
        Filters by the layers' labels, and the model's prediction.

    Raises:
        ValueError: the model did not run one of the layers.
    """
    filters: dict[str, Filters] = {}

    def keep_filters(label: str):
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            channel, spatial = (f[0].float().cpu() for f in layer.generate_filters(*args, **kwargs))
            k, factors = layer.kernel_size, (1, 1)
            if isinstance(layer, DDFUpPack):
                # From subpixels to pixels of the output.
                factors = check_scale_factors(layer.scale_factor)
                spatial = shuffle_pixels(spatial.transpose(0, 1)[None], *factors)[0]
            else:
                channel = channel[None]
            filters[label] = Filters(
                spatial.unflatten(0, (layer.head, k, k)).numpy(),
                channel.numpy(),
                layer.kernel_combine,
                factors,
            )

        return hook

    # A fused forward has no filters to capture, so they are computed separately.
    handles = [
        layer.register_forward_pre_hook(keep_filters(label), with_kwargs=True)
        for label, layer in layers.items()
    ]
    training = model.training
    model.eval()
    try:
        prediction = model.test_step(pseudo_collate([data]))[0]
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if missing := [label for label in layers if label not in filters]:
        raise ValueError(f"the model predicts without its layers {', '.join(missing)}")
    return {label: filters[label] for label in layers}, prediction


def picture(pixels: np.ndarray, is_bgr: bool = True) -> np.ndarray:
    """An image of any number of channels as RGB.

    Args:
        pixels: ``[H, W]`` or ``[H, W, C]``, 0 to 255.
        is_bgr: whether the first three channels are blue, green and red, as mmcv's loaders return
            them, instead of red, green and blue.

    Returns:
        ``uint8[H, W, 3]``, RGB: the first three channels, or the first one as gray if there are
        fewer.
    """
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    channels = [0, 0, 0] if pixels.shape[2] < 3 else [2, 1, 0] if is_bgr else [0, 1, 2]
    return np.clip(pixels[:, :, channels], 0, 255).astype(np.uint8)


def network_image(model: nn.Module, data: dict) -> np.ndarray:
    """The image of a sample as the network's input, padded but not normalized.

    Args:
        model: a model of an OpenMMLab toolbox.
        data: one sample of its dataset.

    Returns:
        ``uint8[H, W, 3]``, RGB, of :func:`picture`.

    Raises:
        ValueError: the sample has no image as ``inputs``.
    """
    inputs = data.get("inputs")
    if not isinstance(inputs, Tensor) or inputs.ndim != 3:
        got = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"inputs of the sample must be a Tensor[C, H, W], an image, got {got}")
    height, width = model.data_preprocessor(pseudo_collate([data]), False)["inputs"].shape[-2:]
    image = np.zeros((height, width, 3), np.uint8)
    pixels = picture(inputs.permute(1, 2, 0).cpu().numpy())[:height, :width]
    image[: pixels.shape[0], : pixels.shape[1]] = pixels
    return image


def choose_differing(vectors: np.ndarray, count: int) -> list[int]:
    """Indices of vectors that differ most, by farthest-point sampling.

    The first is the one farthest from the mean; each next one is the farthest from those chosen.

    Args:
        vectors: ``float[n, d]``.
        count: number of vectors to choose, at most n.
    """
    nearest = np.linalg.norm(vectors - vectors.mean(0), axis=1)
    chosen: list[int] = []
    for _ in range(min(count, len(vectors))):
        index = int(nearest.argmax())
        distance = np.linalg.norm(vectors - vectors[index], axis=1)
        nearest = np.minimum(nearest, distance) if chosen else distance
        chosen.append(index)
    return chosen


def choose_points(
    filters: Filters, height: int, width: int, count: int = DEFAULT_POINTS
) -> list[tuple[int, int]]:
    """Pixels whose spatial filters differ most.

    Args:
        filters: filters of a layer.
        height: height of the network's input.
        width: width of the network's input.
        count: number of points.

    Returns:
        Up to ``count`` points (x, y) of the input, in the centres of the filters' cells.
    """
    rows, columns = filters.spatial.shape[-2:]
    taps = filters.spatial[0].reshape(-1, rows * columns).T
    return [
        (int((i % columns + 0.5) * width / columns), int((i // columns + 0.5) * height / rows))
        for i in choose_differing(taps, count)
    ]


def check_points(points: Sequence[tuple[int, int]], height: int, width: int) -> None:
    """Check that points lie in an image.

    Raises:
        ValueError: one does not.
    """
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"points {x},{y} is outside the network's input of {width} x {height} pixels"
            )
