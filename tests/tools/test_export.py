"""`tools/export.py`: its files have only standard operators and compute the model's outputs."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from fork_server import ROOT, ForkServer
from torch import nn

from ddf_mm.engine import export
from ddf_mm.engine.export import Size
from ddf_mm.ops.export import decompositions

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs a system that forks processes"
)

EXPORT = ROOT / "tools" / "export.py"

CONFIG = """
custom_imports = dict(imports=["detector"], allow_failed_imports=False)
model = dict(
    type="Detector",
    backbone=dict(type="DDFResNet", depth=26, stem_channels=8, base_channels=8,
                  num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1)),
    neck=dict(type="DDFUpFPN", in_channels=[32, 64], out_channels=8, num_outs=3))
"""

DETECTOR = '''
"""A model like those of the toolboxes, with weights that differ from the initial ones."""
import os

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS

import ddf_mm.models
from ddf_mm.ops import export


@MODELS.register_module()
class Detector(BaseModel):
    with_neck = True

    def __init__(self, backbone, neck, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.backbone = MODELS.build(backbone)
        self.neck = MODELS.build(neck)
        torch.manual_seed(0)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)

    def forward(self, *args, **kwargs):
        raise NotImplementedError


@MODELS.register_module()
class OneSize(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.out_channels = 8

    def forward(self, x):
        x = x[0] if isinstance(x, tuple) else x
        return (x.reshape(x.shape[0], 3, 64, 96),)


if os.environ.get("WRONG"):
    right = export._onnx_taps

    def wrong(*arguments):
        return [-out for out in right(*arguments)]

    export._onnx_taps = wrong
'''

PRELOAD = """
import onnx, onnxruntime, onnxscript, torch.onnx

import ddf_mm.engine.evaluation
import ddf_mm.engine.export
import ddf_mm.models
"""


class EveryKind(torch.nn.Module):
    """The ops with every kind of arguments that the translations distinguish."""

    KINDS = (
        dict(kernel_size=3, stride=1, kernel_combine="add"),
        dict(kernel_size=3, stride=2, kernel_combine="mul"),
        dict(kernel_size=5, dilation=2, stride=2, kernel_combine="add"),
        dict(kernel_size=5, dilation=9),
        dict(kernel_size=1, stride=3),
    )

    def forward(self, x, per_channel, per_pixel, strided):
        from ddf_mm.ops import ddf, ddf_up, filter_norm

        plain, twice, wide, far, pixel = self.KINDS
        floor = strided[:, :9, : x.shape[2] // 2, : x.shape[3] // 2]
        return (
            ddf(x, per_channel[..., :3, :3], per_pixel, **plain),
            ddf(x, per_channel[..., 1:4, 1:4], floor, **twice),
            ddf(x, per_channel, strided[:, :50], **wide),
            ddf(x, None, strided, **wide),
            ddf(x, per_channel, None, **wide),
            ddf(x, per_channel, None, **far),
            ddf(x, per_channel, per_pixel[:, :1].expand(-1, 50, -1, -1), **far),
            ddf(x, per_channel[..., :1, :1], None, **pixel),
            ddf(x.half(), per_channel[..., :3, :3].half(), per_pixel.half(), **plain),
            ddf(x, None, per_pixel, padding="reflect"),
            ddf_up(x, None, torch.stack([per_pixel] * 4, 1), padding="replicate"),
            ddf_up(x, None, torch.stack([per_pixel, -per_pixel], 1), 3, (1, 2)),
            filter_norm(per_pixel[:, :9].double(), 1, "spatial", 0.5),
            filter_norm(per_pixel[:, :9] * 0, 1, "spatial", 1.0, 2.0),
            filter_norm(strided, 4, "spatial", torch.arange(100.0), 2.0),
            filter_norm(per_pixel.half(), 2, "spatial"),
            filter_norm(per_channel.flatten(1), 8, "channel", torch.arange(200.0)),
        )


def arguments(batch: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    half = [(n - 1) // 2 + 1 for n in (height, width)]
    shapes = [(8, height, width), (8, 5, 5), (18, height, width), (100, *half)]
    return tuple(torch.randn(batch, *shape) for shape in shapes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    (folder / "config.py").write_text(CONFIG)
    (folder / "detector.py").write_text(DETECTOR)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Runs export.py on the config; files go to the folder `here`."""
    with ForkServer(folder, PRELOAD) as server:

        def run(*arguments: object, **env: str):
            return server.run(EXPORT, "--size", "64", "96", "../config.py", *arguments, env=env)

        yield run


@pytest.fixture(scope="module")
def exported(run, folder):
    result = run("--format", "both", "--out", "model", "--benchmark", "1", "--json", "report.json")
    assert result.code == 0, result.stderr
    return folder / "here"


def test_report(exported):
    report = json.loads((exported / "report.json").read_text())
    assert report["files"].keys() == report["milliseconds"].keys() - {"pytorch"}
    for entry in report["files"].values():
        assert 0 <= entry["error"] < 1e-4
    assert sorted(path.name for path in exported.iterdir()) == [
        "model.onnx", "model.pt2", "report.json"
    ]  # fmt: skip


def test_standard_operators_of_a_bounded_number(exported):
    model = onnx.load(exported / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert not model.functions
    # 942 when written: four DDF layers and four branches of the upsampler, each with 36 or more for
    # its taps. A graph unrolled over the 6144 pixels would have tens of thousands.
    assert 8 * 36 < len(model.graph.node) < 1500
    (images,) = model.graph.input
    assert [bool(d.dim_param) for d in images.type.tensor_type.shape.dim] == [
        True, False, True, True
    ]  # fmt: skip


@pytest.mark.parametrize("size", [Size(1, 96, 64), Size(5, 41, 129)], ids=str)
def test_files_accept_sizes_that_the_tool_did_not_check(exported, size):
    images = size.images(3)
    got = export.load_onnx(exported / "model.onnx", 1)(images)
    want = export.load_program(exported / "model.pt2")(images)
    assert [g.shape for g in got] == [w.shape for w in want]
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() < 1e-4 * w.abs().max()


def test_images_so_small_that_maps_have_one_pixel(run, folder):
    """torch.export treats a size of 1 as a constant; the tool also checks other image sizes."""
    small = ["--size", "8", "8", "--out", "small"]
    result = run(*small)
    assert result.code == 0, result.stderr
    assert "1 x 8 x 8, 1 x 8 x 8, 3 x 21 x 41" in result.stdout
    program = [*small, "--format", "torch.export"]
    result = run(*program)
    assert result.code == 1 and result.stderr.count("\n") == 1
    assert "the file does not run with images of 1 x 8 x 8: " in result.stderr
    assert "--static exports it for one size" in result.stderr
    assert not (folder / "here" / "small.pt2").exists()
    result = run(*program, "--static")
    assert result.code == 0, result.stderr


def test_folded_batch_norms(run, folder, exported):
    result = run("--fold", "--out", "folded")
    assert result.code == 0, result.stderr
    kinds = [
        {node.op_type for node in onnx.load(folder / "here" / f"{name}.onnx").graph.node}
        for name in ("model", "folded")
    ]
    assert kinds[0] - kinds[1] == {"BatchNormalization"}


def test_elementwise(run, folder, exported):
    """More products, of elements alone."""
    result = run("--elementwise", "--out", "elementwise")
    assert result.code == 0, result.stderr
    kinds = [
        Counter(node.op_type for node in onnx.load(folder / "here" / f"{name}.onnx").graph.node)
        for name in ("model", "elementwise")
    ]
    assert kinds[0]["MatMul"] > kinds[1]["MatMul"] == 0
    assert kinds[0]["Mul"] < kinds[1]["Mul"]


def test_half(run, folder):
    result = run("--half", "--fold", "--out", "half")
    assert result.code == 0, result.stderr
    graph = onnx.load(folder / "here" / "half.onnx").graph
    half = onnx.TensorProto.FLOAT16
    types = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types == {half}
    convs = {i for node in graph.node if node.op_type == "Conv" for i in node.input[1:]}
    assert {i.data_type for i in graph.initializer if i.name in convs} == {half}


def test_batch_norms_that_cannot_be_folded(run, folder):
    add = "model.backbone.kernel_combine=add"
    result = run("--fold", "--out", "refused", "--cfg-options", add)
    assert result.code == 1 and result.stderr.count("\n") == 1
    assert "--fold: backbone.layer1.0.conv2" in result.stderr and "'add'" in result.stderr
    assert not (folder / "here" / "refused.onnx").exists()


class Poolings(torch.nn.Module):
    def __init__(self, *arguments: dict):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.MaxPool2d(**given) for given in arguments)

    def forward(self, x):
        # Like the extra levels of the stock FPN.
        return *(layer(x) for layer in self.layers), torch.nn.functional.max_pool2d(x, 1, stride=2)


def test_programs_with_strided_poolings_accept_sizes_of_any_parity():
    model = Poolings(
        dict(kernel_size=3, stride=2, padding=1),
        dict(kernel_size=2),
        dict(kernel_size=(3, 5), stride=(1, 3), padding=(0, 2), dilation=(2, 1)),
    )
    program = export.export_program(model, Size(2, 20, 30)).module()
    for size in [Size(1, 20, 30), Size(2, 21, 30), Size(1, 22, 33), Size(3, 23, 31)]:
        images = size.images(3)
        images[0, 0, 5, 6] = float("nan")
        for got, want in zip(program(images), model(images), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_a_file_that_fails_its_check_is_not_left(run, folder):
    result = run("--out", "wrong", "--static", WRONG="1")
    assert result.code == 1
    assert "the results of the file differ from the model's" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not [path for path in (folder / "here").iterdir() if "wrong" in path.name]


ERRORS = {
    "checkpoint": (["no.pth"], 2, "'no.pth' is not a file"),
    "folder": (["--out", "no/model"], 2, "'no/model' is in a folder that does not exist"),
    "opset": (["--opset", "11"], 2, "--opset must be at least 18, got 11"),
    "size": (["--size", "0", "3"], 2, "--size must be at least 1, got 0"),
    "fixed size": (
        ["--cfg-options", "model.neck._delete_=True", "model.neck.type=OneSize",
         "model.backbone.type=OneSize", "model.backbone._delete_=True"],
        1,
        "cannot be exported for images of every size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_error_is_one_line(run, case):
    arguments, code, mention = ERRORS[case]
    result = run(*arguments)
    assert result.code == code, result.stderr
    assert mention in result.stderr and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("elementwise", [False, True])
def test_every_kind_of_argument(elementwise, tmp_path):
    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        EveryKind(),
        arguments(2, 14, 18),
        dynamic_shapes=(free, {0: torch.export.Dim.DYNAMIC}, free, free),
        strict=False,
    )
    own = {str(op) for op in decompositions()} & {str(node.target) for node in program.graph.nodes}
    assert own == {str(op) for op in decompositions()}
    onnx_program = torch.onnx.export(
        program, custom_translation_table=export.onnx_translations(elementwise),
        opset_version=18, verbose=False,
    )  # fmt: skip
    onnx_program.save(tmp_path / "kinds.onnx")
    session = export.onnx_session(tmp_path / "kinds.onnx", 1)
    for size in ((1, 8, 14), (3, 20, 6)):
        tensors = arguments(*size)
        names = [given.name for given in session.get_inputs()]
        feed = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
        for got, want in zip(session.run(None, feed), EveryKind()(*tensors), strict=True):
            assert str(want.dtype).removeprefix("torch.") == str(got.dtype)
            eps = torch.finfo(want.dtype).eps
            error = (torch.from_numpy(got) - want).abs().max()
            # 25 products, and the rounding of the result to float16.
            assert error < 20 * eps * want.abs().max()


class Twice(nn.Module):
    """Two convolutions of one pixel."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 1)])
        self.shift = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x):
        pixel = x.mean((2, 3), keepdim=True)
        first, second = (conv(pixel) for conv in self.convs)
        rectified = (pixel + self.shift).relu()
        return first * second + self.convs[0](rectified) * self.convs[1](rectified)


class Convolutions(nn.ModuleList):
    def forward(self, inputs):
        return [conv(x) for conv, x in zip(self, inputs, strict=True)]


def exported_operators(
    model: nn.Module, inputs: list[torch.Tensor], tmp_path: Path
) -> tuple[Counter, list[torch.Tensor]]:
    """The operators of a model of a list of tensors, and what ONNX Runtime computes by them."""
    program = torch.onnx.export(
        model, (inputs,), opset_version=18, verbose=False,
        custom_translation_table=export.onnx_translations(),
    )  # fmt: skip
    program.save(tmp_path / "model.onnx")
    session = export.onnx_session(tmp_path / "model.onnx", 1)
    names = [given.name for given in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    results = [torch.from_numpy(result) for result in session.run(None, feed)]
    return Counter(node.op_type for node in program.model.graph), results


def test_convolutions(tmp_path):
    """Those of one pixel become matrix products, whose weights ONNX Runtime reads faster."""
    pixel, row = (2, 8, 1, 1), (2, 8, 1, 2)
    products = [
        (nn.Conv2d(8, 12, 1), pixel),
        (nn.Conv2d(8, 12, 1, bias=False), pixel),
        (nn.Conv2d(8, 12, 1), pixel[1:]),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 12, 1)), (2, 8, 5, 3)),
        (nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU()), pixel),
        (Twice(), (2, 8, 5, 3)),
    ]
    others = [
        (nn.Conv2d(8, 12, 1), row),
        (nn.Conv2d(8, 12, 1), row[1:]),
        (nn.Conv2d(8, 12, 1, groups=2), pixel),
        (nn.Conv2d(8, 12, 1, padding=1), pixel),
        (nn.Conv2d(8, 12, (3, 5), (2, 1), (1, 4), (1, 2), groups=4), (2, 8, 9, 7)),
    ]
    convs, shapes = zip(*products, *others, strict=True)
    model, inputs = Convolutions(convs).eval(), [torch.randn(shape) for shape in shapes]
    operators, got = exported_operators(model, inputs, tmp_path)
    assert operators["Gemm"] == len(products) + 3 and operators["Conv"] == len(others)
    assert operators["GlobalAveragePool"] == 2
    for result, want in zip(got, model(inputs), strict=True):
        torch.testing.assert_close(result, want.detach())


class Rectified(nn.Module):
    """A convolution of a rectified sum."""

    def __init__(self, shift: torch.Tensor, **options):
        super().__init__()
        self.shift = nn.Parameter(shift)
        self.conv = nn.Conv2d(8, 6, **options)

    def forward(self, x):
        return self.conv((x + self.shift).relu())


def test_convolutions_of_rectified_sums(tmp_path):
    """Those of single pixels read a maximum, one operator fewer."""
    per_channel, shape = torch.randn(8, 1, 1), (2, 8, 5, 7)
    maxima = [
        Rectified(per_channel, kernel_size=1),
        Rectified(per_channel, kernel_size=1, stride=2, bias=False),
    ]
    others = [
        Rectified(per_channel, kernel_size=1, padding=1),
        Rectified(per_channel, kernel_size=3),
        Rectified(per_channel, kernel_size=1, groups=2),
        Rectified(torch.randn(8, 5, 7), kernel_size=1),
        Rectified(torch.randn(7), kernel_size=1),
    ]
    model = Convolutions([*maxima, *others]).eval()
    inputs = [torch.randn(shape) for _ in model]
    operators, got = exported_operators(model, inputs, tmp_path)
    assert operators["Max"] == len(maxima) and operators["Relu"] == len(others)
    for result, want in zip(got, model(inputs), strict=True):
        torch.testing.assert_close(result, want.detach())


class Filters(nn.Module):
    """The normalized filters of a convolution, of a pixel's for ``'channel'``."""

    def __init__(self, kind: str, filters: int, raw: bool = False, **options):
        super().__init__()
        self.kind, self.filters, self.raw = kind, filters, raw
        self.conv = nn.Conv2d(8, 9 * filters, 1, **options)
        self.std = nn.Parameter(torch.randn(9 * filters))

    def forward(self, x):
        from ddf_mm.ops import filter_norm

        raw = self.conv(x.mean((2, 3), keepdim=True) if self.kind == "channel" else x)
        out = filter_norm(raw, self.filters, self.kind, self.std, self.std + 2.0)
        return out + raw.flatten(1).mean() if self.raw else out


class Merged(Filters):
    """Filters in the batch, each a row."""

    def forward(self, x):
        from ddf_mm.ops import filter_norm

        raw = self.conv(x.mean((2, 3), keepdim=True))
        return filter_norm(raw.reshape(-1, 9), 1, "channel")


def test_normalized_filters_of_convolutions(tmp_path):
    """The mean over the taps is removed from weights and biases instead."""
    centered = [
        Filters("spatial", 1),
        Filters("spatial", 4, bias=False),
        Filters("channel", 8),
        Filters("channel", 1),
    ]
    others = [Filters("spatial", 4, groups=2), Merged("channel", 2)]
    constant = Filters("spatial", 2)
    nn.init.constant_(constant.conv.weight, 0.3)
    nn.init.constant_(constant.conv.bias, 0.7)
    model = Convolutions([*centered, constant, *others, Filters("channel", 2, raw=True)]).eval()
    inputs = [torch.randn(2, 8, 5, 7) for _ in model]
    operators, got = exported_operators(model, inputs, tmp_path)
    # Of the filters with groups, of those in the batch, and of `raw`.
    assert operators["ReduceMean"] == 3
    for result, want in zip(got, model(inputs), strict=True):
        torch.testing.assert_close(result, want.detach(), rtol=1e-5, atol=1e-5)
    mean = (constant.std + 2.0).reshape(1, -1, 1, 1)
    assert torch.equal(got[len(centered)], mean.expand(2, -1, 5, 7))
