"""The drawn filters are those that the layers apply, in any model."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from torch import nn
from torch.nn.functional import conv2d, pad

from ddf_mm import visualization
from ddf_mm.layers import DDFPack, DDFUpPack
from ddf_mm.ops import ddf_reference


class Pad(BaseDataPreprocessor):
    """Stacks one image, padded to a multiple of 4."""

    def forward(self, data: dict, training: bool = False) -> dict:
        x = torch.stack(data["inputs"]).float()
        return dict(data, inputs=pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)))


class Net(BaseModel):
    """A stage of two DDF layers, an upsampler guided by its result, and a layer that never runs."""

    def __init__(
        self, head: int = 2, kernel_combine: str = "mul", scale_factor: int | tuple[int, int] = 2
    ) -> None:
        super().__init__(Pad())
        options = dict(head=head, kernel_combine=kernel_combine)
        self.stem = nn.Conv2d(3, 8, 1)
        self.layer1 = nn.Sequential(DDFPack(8, **options), DDFPack(8, stride=2, **options))
        self.up = DDFUpPack(8, scale_factor=scale_factor, joint_channels=8, **options)
        self.unused = DDFPack(8)

    def forward(self, inputs, data_samples=None, mode: str = "predict"):
        x = self.stem(inputs / 255)
        return self.up(self.layer1(x), joint_x=x[..., ::2, ::2])


@pytest.fixture
def sample() -> dict:
    return dict(inputs=torch.randint(0, 256, (3, 10, 15), dtype=torch.uint8))


def capture(model: nn.Module, sample: dict, **which):
    layers = visualization.find_layers(model, **which)
    return visualization.capture_filters(model, sample, layers)


def test_chooses_layers():
    model = Net()
    first, last = model.layer1
    found = visualization.find_layers(model)
    assert list(found.items()) == [("stage 1", last), ("up", model.up), ("unused", model.unused)]
    assert visualization.find_layers(model, stages=[1, 1]) == {"stage 1": last}
    assert visualization.find_layers(model, layers=["layer1.0"]) == {"layer1.0": first}
    for which, message in (
        (dict(stages=[3, 1]), "stages 3: no DDF layers there; the model has them in 1$"),
        (dict(layers=["stem"]), "layers stem: .* has them in layer1.0, layer1.1, up, unused"),
    ):
        with pytest.raises(ValueError, match=message):
            visualization.find_layers(model, **which)
    with pytest.raises(ValueError, match="the model has no DDF layers"):
        visualization.find_layers(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="stages 1: .* in no stage named layer1, layer2, …"):
        visualization.find_layers(DDFPack(8), stages=[1])


@pytest.mark.parametrize("kernel_combine, factors", [("mul", (2, 2)), ("add", (1, 3))])
def test_filters_are_those_the_layers_apply(sample, kernel_combine, factors):
    model = Net(kernel_combine=kernel_combine, scale_factor=factors).train()
    seen = {}
    for name in ("layer1.1", "up"):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, y, name=name: seen.update({name: (args[0][0], y[0])})
        )
    filters, up = capture(model, sample, layers=["layer1.1", "up"])
    assert model.training and list(filters) == ["layer1.1", "up"]
    size = 6 * factors[0], 8 * factors[1]
    assert up.shape == (8, *size) and filters["up"].spatial.shape == (2, 3, 3, *size)

    x, y = seen["layer1.1"]
    ours = filters["layer1.1"]
    spatial = torch.from_numpy(ours.spatial).flatten(0, 2)
    channel = torch.from_numpy(ours.channel[0])
    expected = ddf_reference(x[None], channel[None], spatial[None], 3, 1, 2, kernel_combine)[0]
    torch.testing.assert_close(expected, y)

    # Each combined filter, applied to its window, gives a pixel of the result.
    for name, stride, (rows, columns) in (("layer1.1", 2, (1, 1)), ("up", 1, factors)):
        x, y = seen[name]
        for row, column, c in ((0, 0, 0), (3, 5, 3), (4, 2, 4), (5, 7, 7)):
            taps = torch.from_numpy(filters[name].combined(row, column, c))
            at = conv2d(x[None, c : c + 1], taps[None, None], None, stride, 1)[0, 0]
            torch.testing.assert_close(at[row // rows, column // columns], y[c, row, column])


def test_leaves_no_hooks_and_says_what_did_not_run(sample):
    model = Net()
    with pytest.raises(ValueError, match="predicts without its layers unused"):
        capture(model, sample)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training


def test_image_is_padded_as_the_network_pads_it(sample):
    image = visualization.network_image(Net(), sample)
    assert image.shape == (12, 16, 3) and image.dtype == np.uint8
    bgr = sample["inputs"].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(image[:10, :15], bgr[..., ::-1])
    assert not image[10:].any() and not image[:, 15:].any()
    for inputs, got in ((torch.zeros(4, 4), r"\[4, 4\]"), (None, "NoneType")):
        with pytest.raises(ValueError, match=rf"a Tensor\[C, H, W\], an image, got {got}"):
            visualization.network_image(Net(), dict(inputs=inputs))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_picture_of_any_number_of_channels(channels):
    pixels = np.arange(2 * 3 * channels, dtype=np.float32).reshape(2, 3, channels) - 1
    shown = visualization.picture(pixels)
    assert shown.shape == (2, 3, 3) and shown.dtype == np.uint8
    order = [2, 1, 0] if channels > 2 else [0, 0, 0]
    np.testing.assert_array_equal(shown, pixels[..., order].clip(0))
    if channels > 2:
        np.testing.assert_array_equal(visualization.picture(pixels, False), shown[..., ::-1])
    if channels == 1:
        np.testing.assert_array_equal(visualization.picture(pixels[..., 0]), shown)


def some_filters(spatial: np.ndarray) -> visualization.Filters:
    return visualization.Filters(spatial[None], np.ones((1, 4, 3, 3)), "mul")


def test_distance_is_that_from_the_mean_filter():
    spatial = np.zeros((3, 3, 2, 2))
    np.testing.assert_array_equal(some_filters(spatial + 5.0).distance, np.zeros((2, 2)))
    spatial[0, 1, 1, 0] = 4.0  # mean 1: three pixels at distance 1, one at 3
    np.testing.assert_allclose(some_filters(spatial).distance, [[1, 1], [3, 1]])


def test_chosen_points_differ_and_start_at_the_farthest():
    spatial = np.zeros((3, 3, 4, 6))
    spatial[0, 0, 2, 5], spatial[1, 1, 0, 1], spatial[2, 2, 3, 3] = 9.0, 6.0, 3.0
    points = visualization.choose_points(some_filters(spatial), height=40, width=60, count=4)
    assert points[:3] == [(55, 25), (15, 5), (35, 35)]
    assert len(set(points)) == 4


def test_draws_each_layer(sample):
    model = Net()
    image = visualization.network_image(model, sample)
    filters, _ = capture(model, sample, stages=[1], layers=["up"])
    for draw in (visualization.draw_filters, visualization.draw_combined):
        pictures = [
            visualization.figure_to_image(draw(image, some, [(0, 0), (15, 11)], "title"))
            for some in (filters, {"up": filters["up"]})
        ]
        assert pictures[0].dtype == np.uint8 and pictures[0].std() > 30
        assert pictures[0].shape != pictures[1].shape
        with pytest.raises(ValueError, match="points 16,0 is outside .* 16 x 12 pixels"):
            draw(image, filters, [(16, 0)])
    with pytest.raises(ValueError, match="points must hold at least one pixel"):
        visualization.draw_combined(image, filters, [])


def test_page_holds_the_filters_and_needs_no_network(sample, tmp_path):
    model, path = Net(), tmp_path / "page.html"
    image = visualization.network_image(model, sample)
    filters, _ = capture(model, sample, stages=[1], layers=["up"])
    figure = visualization.draw_filters(image, filters, [(3, 4)])
    visualization.write_page(path, image, filters, [(3, 4)], [figure], "<b> & </script>")
    page = path.read_text(encoding="utf-8")
    assert "&lt;b&gt; &amp; &lt;/script&gt;" in page and page.count("</script>") == 2
    # The page loads nothing: its only addresses are data URIs.
    assert page.count("data:image/png;base64,") == 2 * 2 + 2
    script = re.search(r'application/json">(.*?)</script>', page, re.DOTALL).group(1)
    rest = re.sub(r"data:image/png;base64,[\w+/=]+", "", page.replace(script, ""))
    assert not re.search(r"//|url\(|@import|<link", rest)

    data = json.loads(script)
    assert (data["width"], data["height"]) == (16, 12)
    assert data["points"][0] == dict(x=3, y=4, name="A", color=data["points"][0]["color"])
    for layer, (label, ours) in zip(data["layers"], filters.items(), strict=True):
        assert (layer["label"], layer["combine"]) == (label, "mul")
        for name in ("spatial", "channel"):
            packed, expected = layer[name], getattr(ours, name)
            values = np.frombuffer(base64.b64decode(packed["data"]), np.int8) * packed["scale"]
            assert packed["shape"] == list(expected.shape)
            error = np.abs(values.reshape(expected.shape) - expected).max()
            assert error <= packed["scale"] / 2 * 1.001
    with pytest.raises(ValueError, match="points must hold at least one pixel"):
        visualization.write_page(path, image, filters, [])
