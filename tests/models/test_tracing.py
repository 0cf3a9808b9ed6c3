"""torch.jit.trace, the ONNX exporter that uses it, and torch.fx: traced layers and models give the
same results at sizes that were not traced."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn

from ddf_mm.layers import DDFPack, DDFUpPack, switch_to_deploy
from ddf_mm.layers.conv import DDFConv2d
from ddf_mm.models import DDFResNet, DDFUpFPN, DDFUpNet
from ddf_mm.ops import library


class Levels(nn.Module):
    """A neck after strided convolutions, which round sizes up or, without padding, down."""

    def __init__(self, strides=(2, 2), padding: bool = True, **neck) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3 if padding else s, s, int(padding))
            for i, o, s in zip((3, 4), (4, 6), strides, strict=True)
        )
        self.neck = DDFUpFPN([4, 6], 4, **neck)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        fine = self.convs[0](images)
        return self.neck([fine, self.convs[1](fine)])


class Detector(nn.Module):
    def __init__(self, deploy: bool = False, with_cp: bool = False) -> None:
        super().__init__()
        self.backbone = DDFResNet(
            26, base_channels=4, num_stages=2, strides=(1, 2), dilations=(1, 2),
            out_indices=(0, 1), with_cp=with_cp,
        )  # fmt: skip
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        if deploy:
            switch_to_deploy(self.backbone.eval())
        self.neck = DDFUpFPN([16, 32], 4, num_outs=3, guidance=True)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.neck(self.backbone(images))


class JointUpsampling(nn.Module):
    """Without the arguments of mmengine's models."""

    def __init__(self) -> None:
        super().__init__()
        self.net = DDFUpNet(4, channels=4, norm_cfg=dict(type="BN"))
        nn.init.normal_(self.net.head.weight)

    def forward(self, maps: Tensor, guide: Tensor) -> Tensor:
        return self.net(maps, guide)


# A module, and channels and factor of the size of each of its inputs.
CASES = {
    "pack": (lambda: DDFPack(4), [(4, 1)]),
    "strided add": (lambda: DDFPack(4, stride=2, head=2, kernel_combine="add"), [(4, 1)]),
    "stride 3": (lambda: DDFPack(4, stride=3, dilation=2), [(4, 1)]),
    "far": (lambda: DDFPack(6, kernel_size=5, dilation=9, head=3), [(6, 1)]),
    "conv": (lambda: DDFConv2d(4, 4, 5, stride=2), [(4, 1)]),
    "up": (lambda: DDFUpPack(4), [(4, 1)]),
    "up 3": (
        lambda: DDFUpPack(4, scale_factor=3, head=2, kernel_combine="add", dilation=2), [(4, 1)]
    ),
    "guided up": (lambda: DDFUpPack(4, joint_channels=3, head=2), [(4, 1), (3, 2)]),
    "coarsely guided up": (lambda: DDFUpPack(4, joint_channels=3), [(4, 1), (3, 1)]),
    "neck": (lambda: Levels(num_outs=3), [(3, 1)]),
    "guided neck": (
        lambda: Levels(num_outs=4, guidance=True, add_extra_convs="on_output"), [(3, 1)]
    ),
    "rounded down": (lambda: Levels(padding=False, num_outs=2, guidance=True), [(3, 1)]),
    "factor 3": (lambda: Levels((1, 3), num_outs=2, scale_factor=3, guidance=True), [(3, 1)]),
    "detector": (Detector, [(3, 2)]),
    "folded detector": (lambda: Detector(deploy=True), [(3, 2)]),
    "joint upsampling": (JointUpsampling, [(1, 1), (3, 4)]),
}  # fmt: skip
SIZES = [(2, 12, 16), (1, 11, 19), (3, 17, 14), (2, 23, 27), (1, 9, 8)]


def build(name: str) -> nn.Module:
    return CASES[name][0]().eval()


def inputs(name: str, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, c, s * height, s * width) for c, s in CASES[name][1])


def outputs(value: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def check(run, model: nn.Module, name: str) -> None:
    for size in SIZES:
        tensors = inputs(name, *size)
        got, want = outputs(run(*tensors)), outputs(model(*tensors))
        # Measured: 3e-6, for values up to 10.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("traced", SIZES[:2], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_trace(name, traced):
    model = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        graph = torch.jit.trace(model, inputs(name, *traced))
    # It runs without this package and on another device.
    assert "ddf_mm::" not in (text := str(graph.inlined_graph))
    assert ": Device = prim::Constant" not in text
    check(graph, model, name)
    check(torch.jit.optimize_for_inference(torch.jit.freeze(graph)), model, name)


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("name", CASES)
def test_onnx_by_the_tracer(name, opset):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, tensors = build(name), inputs(name, *SIZES[opset == 11])
    names = [f"input{i}" for i in range(len(tensors))]
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.onnx.export(
            model,
            tensors,
            file,
            dynamo=False,
            opset_version=opset,
            input_names=names,
            dynamic_axes={name: {0: "batch", 2: "height", 3: "width"} for name in names},
        )
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    def run(*tensors):
        fed = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
        return [torch.from_numpy(out) for out in session.run(None, fed)]

    check(run, model, name)


@pytest.mark.parametrize("name", CASES)
def test_fx(name):
    model = build(name)
    graph = torch.fx.symbolic_trace(model)
    check(graph, model, name)
    check(torch.fx.symbolic_trace(copy.deepcopy(graph)), model, name)


def test_fx_of_a_neck_by_itself_and_of_checkpointed_blocks():
    neck = DDFUpFPN([4, 6], 4, num_outs=3, guidance=True)
    graph = torch.fx.symbolic_trace(neck)
    for height, width in ((8, 6), (7, 9)):
        levels = [torch.randn(1, 4, height, width), torch.randn(1, 6, 4, -(-width // 2))]
        torch.testing.assert_close(graph(levels), neck(levels), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="inputs must hold a tensor for each of in_channels, 2"):
        graph(levels[:1])
    with torch.enable_grad():
        check(torch.fx.symbolic_trace(model := Detector(with_cp=True).eval()), model, "detector")


@pytest.mark.parametrize("kind", [list, tuple])
def test_trace_of_a_neck_by_itself(kind):
    neck = DDFUpFPN([4, 6], 4, num_outs=3, guidance=True).eval()

    def levels(height: int, width: int):
        half = -(-height // 2), -(-width // 2)
        return kind([torch.randn(1, 4, height, width), torch.randn(1, 6, *half)])

    graph = torch.jit.trace(neck, (levels(8, 6),))
    for size in ((8, 6), (7, 9), (13, 12)):
        x = levels(*size)
        torch.testing.assert_close(graph(x), neck(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="scale_factor 2 does not fit inputs 0 and 1"):
        torch.jit.trace(neck, ([levels(8, 6)[0], levels(16, 6)[1]],))


@pytest.mark.parametrize("name", ["strided add", "up 3", "detector"])
def test_trace_is_the_same_without_compiled_ops(name, monkeypatch):
    model, tensors = build(name), inputs(name, *SIZES[0])
    operators = []
    for compiled in (library.COMPILED, frozenset()):
        monkeypatch.setattr(library, "COMPILED", compiled)
        graph = torch.jit.trace(model, tensors).inlined_graph
        operators.append([node.kind() for node in graph.nodes()])
    assert operators[0] == operators[1]
