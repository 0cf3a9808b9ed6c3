"""Fused paths compared with the modules that they replace, after modifications of the modules.

After each modification the layer must have the output, gradients, hook calls and errors of its
modules, called one by one.
"""

from __future__ import annotations

import copy
import random
from contextlib import ExitStack, contextmanager
from types import MethodType
from unittest import mock

import pytest
import torch
from ddf_cases import require_compiled
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddf_mm.layers import DDFConv2d, DDFPack, DDFUpPack, FilterNorm
from ddf_mm.ops import ddf, ddf_up, filter_norm

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 8


def make_layer(kind: str) -> nn.Module:
    return {
        "pack": lambda: DDFPack(CHANNELS, head=2),
        "strided": lambda: DDFPack(CHANNELS, stride=2, kernel_combine="add"),
        "conv": lambda: DDFConv2d(CHANNELS, CHANNELS, 3, padding=1),
        "up": lambda: DDFUpPack(CHANNELS),
        "guided": lambda: DDFUpPack(CHANNELS, joint_channels=CHANNELS, head=2),
    }[kind]()


LAYERS = ["pack", "strided", "conv", "up", "guided"]


def by_modules(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layer as its modules, called one by one."""
    if isinstance(layer, DDFPack):
        k, dilation, stride, combine = layer._filter_arguments
        channel = layer.channel_branch(x).unflatten(1, (layer.in_channels, k, k))
        out = layer.output(ddf(x, channel, layer.spatial_branch(x), k, dilation, stride, combine))
        bias = getattr(layer, "bias", None)
        return out if bias is None else out + bias.to(out.dtype)[:, None, None]
    channel = torch.stack([branch(x) for branch in layer.channel_branch], dim=1)
    channel = channel.unflatten(2, (layer.in_channels, layer.kernel_size, layer.kernel_size))
    spatial = torch.stack([branch(x) for branch in layer.spatial_branch], dim=1)
    options = (layer.kernel_size, layer.scale_factor, layer.dilation, layer.kernel_combine)
    return ddf_up(x, channel, spatial, *options)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


class Subclass(torch.Tensor):
    pass


class HalvedConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / 2


def parent_and_name(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return layer.get_submodule(parent), name


def replace(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, name = parent_and_name(layer, path)
    parent._modules[name] = module


def like_conv(conv: nn.Conv2d, cls=nn.Conv2d, **changes) -> nn.Conv2d:
    options = dict(
        kernel_size=conv.kernel_size, stride=conv.stride, padding=conv.padding, groups=conv.groups
    )
    return cls(conv.in_channels, conv.out_channels, **{**options, **changes})


# Changes to any module: (layer, path, module, seen), where `seen` collects the calls.
def forward_hook(layer, path, module, seen):
    module.register_forward_hook(lambda m, args, out: seen.append(path) or out * 1.5)


def forward_pre_hook(layer, path, module, seen):
    module.register_forward_pre_hook(lambda m, args: (seen.append(path) or args[0] * 1.5,))


def backward_hook(layer, path, module, seen):
    module.register_full_backward_hook(lambda m, into, out: seen.append(path))


def backward_pre_hook(layer, path, module, seen):
    module.register_full_backward_pre_hook(lambda m, out: seen.append(path))


def instance_forward(layer, path, module, seen):
    original = module.forward
    module.forward = lambda x: seen.append(path) or original(x) * 1.5


def offloaded(layer, path, module, seen):
    """As in weight-offloading libraries: no parameters, and a forward that loads them."""
    stored = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
    shadow = copy.deepcopy(module)

    def forward(self, x):
        seen.append(path)
        return torch.func.functional_call(shadow, stored, (x,))

    for name in stored:
        module._parameters[name] = nn.Parameter(stored[name].to("meta"))
    module.forward = MethodType(forward, module)


def compiled(layer, path, module, seen):
    def backend(graph, inputs):
        def run(*args):
            seen.append(path)
            return graph(*args)

        return run

    module.compile(backend=backend)


def wrapped(layer, path, module, seen):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            seen.append(path)
            return self.inner(x)

    replace(layer, path, Wrapper())


def frozen(layer, path, module, seen):
    module.requires_grad_(False)


def to_meta(layer, path, module, seen):
    module.to("meta")


def to_dtype(dtype):
    def convert(layer, path, module, seen):
        module.to(dtype)

    convert.__name__ = f"to_{dtype}"
    return convert


def parameter_subclass(layer, path, module, seen):
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            subclass = parameter.detach().as_subclass(Subclass)
            module._parameters[name] = nn.Parameter(subclass)


def registered_anew(layer, path, module, seen):
    """The parameters in reverse order, and an additional one."""
    for name in reversed(list(module._parameters)):
        module._parameters[name] = module._parameters.pop(name)
    module.register_parameter("extra", nn.Parameter(torch.zeros(3)))


def parametrized(layer, path, module, seen):
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            parametrize.register_parametrization(module, name, Doubled())


ANY = [
    forward_hook,
    forward_pre_hook,
    backward_hook,
    backward_pre_hook,
    instance_forward,
    offloaded,
    compiled,
    wrapped,
    frozen,
    to_meta,
    to_dtype(torch.float64),
    to_dtype(torch.bfloat16),
    parameter_subclass,
    registered_anew,
    parametrized,
]


# Changes to convolutions.
def without_bias(layer, path, conv, seen):
    replace(layer, path, like_conv(conv, bias=False))


def wider_window(layer, path, conv, seen):
    k = conv.kernel_size[0] + 2
    replace(layer, path, like_conv(conv, kernel_size=k, padding=k // 2))


def other_padding(layer, path, conv, seen):
    conv.padding_mode = "circular"
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def other_groups(layer, path, conv, seen):
    if conv.in_channels % 2 == conv.out_channels % 2 == 0:
        replace(layer, path, like_conv(conv, groups=1 if conv.groups > 1 else 2))


def subclass(layer, path, conv, seen):
    replace(layer, path, like_conv(conv, HalvedConv))


def nested(layer, path, conv, seen):
    replace(layer, path, nn.Sequential(conv, nn.Tanh()))


def conv_forward(layer, path, conv, seen):
    original = conv._conv_forward
    conv._conv_forward = lambda *args: seen.append(path) or original(*args) * 1.5


def weight_norm(layer, path, conv, seen):
    parametrizations.weight_norm(conv)


def old_weight_norm(layer, path, conv, seen):
    conv.register_parameter("weight_g", nn.Parameter(conv.weight.detach() * 2))
    del conv._parameters["weight"]
    conv.register_forward_pre_hook(lambda m, args: setattr(m, "weight", m.weight_g / 4))
    conv.weight = conv.weight_g / 4


def spectral_norm(layer, path, conv, seen):
    parametrizations.spectral_norm(conv).eval()


def pruned(layer, path, conv, seen):
    prune.l1_unstructured(conv, "weight", amount=0.5)


def weight_attribute(layer, path, conv, seen):
    """A plain tensor in place of the parameter, as in wrappers with flat parameters."""
    weight = conv._parameters.pop("weight")
    conv.weight = weight.detach() * 1.5


def deleted_bias(layer, path, conv, seen):
    conv.bias = None


def strided(layer, path, conv, seen):
    conv.stride = (conv.stride[0] + 1,) * 2


def identity(layer, path, conv, seen):
    replace(layer, path, nn.Identity())


CONV = [
    without_bias, wider_window, other_padding, other_groups, subclass, nested, conv_forward,
    weight_norm, old_weight_norm, spectral_norm, pruned, weight_attribute, deleted_bias, strided,
    identity,
]  # fmt: skip


# Changes to FilterNorms.
def scaled(layer, path, norm, seen):
    norm.std = norm.std * 2 if isinstance(norm.std, float) else nn.Parameter(norm.std.data * 2)


def with_mean(layer, path, norm, seen):
    other = FilterNorm(
        norm.in_channels, 3, norm.filter_type, running_std=norm.running_std, running_mean=True
    )
    replace(layer, path, other)


def learned_or_fixed(layer, path, norm, seen):
    other = FilterNorm(norm.in_channels, 3, norm.filter_type, running_std=not norm.running_std)
    replace(layer, path, other)


def mean_attribute(layer, path, norm, seen):
    norm.mean = 0.25


def tensor_scale(layer, path, norm, seen):
    norm._parameters.pop("std", None)
    norm.std = torch.linspace(1, 2, 9 * norm.in_channels)


def fewer_filters(layer, path, norm, seen):
    norm.in_channels = 1


NORM = [scaled, with_mean, learned_or_fixed, mean_attribute, tensor_scale, fewer_filters]


# Changes to the other layers, to whole branches and to the layer itself.
def larger_pooling(layer, path, module, seen):
    if isinstance(module, nn.AdaptiveAvgPool2d):
        module.output_size = (2, 2)


def other_activation(layer, path, module, seen):
    if isinstance(module, nn.ReLU):
        replace(layer, path, nn.ReLU6())
    elif isinstance(module, nn.AdaptiveAvgPool2d):
        replace(layer, path, nn.AdaptiveMaxPool2d(1))


def appended(layer, path, module, seen):
    if isinstance(module, nn.Sequential):
        module.append(nn.Tanh())


def inplace_after_pooling(layer, path, module, seen):
    if isinstance(module, nn.Sequential) and isinstance(module[0], nn.AdaptiveAvgPool2d):
        module.insert(1, nn.Hardtanh(inplace=True))


OTHER = [larger_pooling, other_activation, appended, inplace_after_pooling]


def changes_of(module: nn.Module) -> list:
    if isinstance(module, nn.Conv2d):
        return ANY + CONV
    if isinstance(module, FilterNorm):
        return ANY + NORM
    return ANY + OTHER


def run(function, layer, x, seen):
    """Output, gradients, what was seen; or the type of the error."""
    seen.clear()
    try:
        out = function(layer, x)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        inputs = [x, *parameters] if x.requires_grad else []
        grads = torch.autograd.grad(
            out.double().square().sum(), inputs, allow_unused=True, materialize_grads=False
        ) if inputs else ()  # fmt: skip
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return type(error), None, None
    return out, grads, sorted(set(seen))


def check_like_modules(layer, x, seen):
    """The layer has the output, gradients, hook calls and errors of its modules."""
    got = run(lambda module, value: module(value), layer, x, seen)
    want = run(by_modules, layer, x, seen)
    if isinstance(want[0], type):
        assert isinstance(got[0], type)
        return
    if got[0] is ValueError and any(p.is_meta for p in layer.parameters()):
        return  # the layer refuses what the comment below is about
    assert not isinstance(got[0], type), f"raised {got[0].__name__}"
    assert got[0].shape == want[0].shape and got[0].dtype == want[0].dtype
    assert got[0].device == want[0].device
    if any(t.is_meta for t in (got[0], *layer.parameters())):
        return  # PyTorch's convolution makes uninitialized values of weights on the meta device
    tolerance = 0.05 if want[0].dtype == torch.bfloat16 else 1e-4
    for ours, theirs in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            bound = tolerance * max(theirs.abs().max().item(), 1e-3)
            assert (ours - theirs).abs().max().item() <= bound
    assert got[2] == want[2]


@pytest.mark.parametrize("kind", LAYERS)
def test_every_change_of_every_module(kind):
    require_compiled("cpu")
    paths = [name for name, _ in make_layer(kind).named_modules() if "branch" in name]
    # The branches of an upsampler are alike: the first and the last are enough.
    paths = [p for p in paths if not any(f"branch.{i}" in p for i in (1, 2)) or kind[0] not in "ug"]
    for path in paths:
        for change in changes_of(make_layer(kind).get_submodule(path)):
            layer, seen = make_layer(kind), []
            if isinstance(layer.get_submodule(path), nn.ModuleList):
                continue
            if change is compiled and path not in ("spatial_branch.0", "channel_branch.3.1"):
                continue  # slow
            change(layer, path, layer.get_submodule(path), seen)
            for needs_grad in (True, False):
                x = torch.randn(2, CHANNELS, 6, 7, requires_grad=needs_grad)
                try:
                    with torch.set_grad_enabled(needs_grad):
                        check_like_modules(layer, x, seen)
                except AssertionError as error:
                    raise AssertionError(f"{change.__name__} of {path}: {error}") from error


@pytest.mark.parametrize("seed", range(40))
def test_random_changes(seed):
    chosen = random.Random(seed)
    layer, seen = make_layer(chosen.choice(LAYERS)), []
    if chosen.random() < 0.2:
        layer = layer.double()
    for _ in range(chosen.randint(1, 3)):
        paths = [
            name
            for name, module in layer.named_modules()
            if "_branch." in name and "parametrizations" not in name and "inner" not in name
        ]
        path = chosen.choice(paths)
        module = layer.get_submodule(path)
        change = chosen.choice(changes_of(module))
        if change is not compiled:  # slow
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                change(layer, path, module, seen)
    dtype = next(layer.parameters()).dtype
    dtype = chosen.choice([dtype, dtype, torch.float32])
    layout = chosen.choice([torch.contiguous_format, torch.channels_last])
    x = torch.randn(2, CHANNELS, 6, 7, dtype=dtype).contiguous(memory_format=layout)
    x.requires_grad_(chosen.random() < 0.7)
    with ExitStack() as stack:
        if chosen.random() < 0.3:
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        if not x.requires_grad:
            stack.enter_context(torch.no_grad())
        check_like_modules(layer, x, seen)


@contextmanager
def global_hook(register, seen):
    handle = register(lambda module, *args: seen.append(type(module)))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "register",
    [
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    ],
)
def test_global_hooks_see_every_module(kind, register):
    layer, seen = make_layer(kind), []
    x = torch.randn(1, CHANNELS, 6, 7, requires_grad=True)
    with global_hook(register, seen):
        layer(x).sum().backward()
    leaves = [type(m) for m in layer.modules() if not list(m.children())]
    for leaf in set(leaves):
        assert seen.count(leaf) == leaves.count(leaf)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "cls, name",
    [
        (nn.Module, "__call__"),
        (nn.Conv2d, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.ReLU, "forward"),
        (nn.AdaptiveAvgPool2d, "forward"),
        (nn.Sequential, "forward"),
        (FilterNorm, "forward"),
    ],
)
def test_patched_classes_are_heeded(kind, cls, name):
    layer, seen = make_layer(kind), []
    original = getattr(cls, name)

    def patched(self, *args, **kwargs):
        seen.append(self)
        return original(self, *args, **kwargs)

    target = FilterNorm if cls is FilterNorm else cls
    with mock.patch.object(target, name, patched), torch.no_grad():
        layer(torch.randn(1, CHANNELS, 6, 7))
    expected = nn.Module if name == "__call__" else cls
    assert {m for m in layer.modules() if isinstance(m, expected)} <= {*seen, *layer_lists(layer)}


def layer_lists(layer):
    return [m for m in layer.modules() if isinstance(m, nn.ModuleList)]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("base", [TorchFunctionMode, TorchDispatchMode])
def test_modes_see_the_operators_of_the_modules(kind, base):
    layer, called = make_layer(kind), []

    class Recorder(base):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.__name__.partition(".")[0])
            return func(*args, **(kwargs or {}))

    convolutions = sum(isinstance(m, nn.Conv2d) for m in layer.modules())
    with Recorder(), torch.no_grad():
        layer(torch.randn(1, CHANNELS, 6, 7))
    assert sum(name in ("conv2d", "convolution") for name in called) == convolutions


def test_the_mode_of_a_device_keeps_the_fused_path():
    require_compiled("cpu")
    pack, x = DDFPack(CHANNELS), torch.randn(1, CHANNELS, 6, 7)
    with torch.device("cpu"):
        assert pack._norms_to_fuse(x) is not None


def test_attributes_of_the_layer_are_read_in_each_call():
    x = torch.randn(1, CHANNELS, 6, 7)
    for layer in (DDFPack(CHANNELS), DDFConv2d(CHANNELS, CHANNELS, 3)):
        layer.dilation = (2, 2) if isinstance(layer, DDFConv2d) else 2
        layer.kernel_combine = "add"
        check_like_modules(layer, x, [])
        assert layer._filter_arguments == (3, 2, 1, "add")
        layer.kernel_combine = "sum"
        with pytest.raises(ValueError, match="kernel_combine must be 'mul' or 'add'.*, got 'sum'"):
            layer(x)
    pack = DDFPack(CHANNELS)
    pack.dilation = 0
    with pytest.raises(ValueError, match="dilation must be at least 1, got 0"):
        pack(x)


@pytest.mark.parametrize("how", ["subclass", "instance", "class"])
def test_replaced_filters_are_applied(how, monkeypatch):
    def generate_filters(self, x):
        return torch.zeros(len(x), CHANNELS, 3, 3), torch.zeros(len(x), 9, *x.shape[2:])

    cls = DDFPack
    if how == "subclass":
        cls = type("Mine", (DDFPack,), dict(generate_filters=generate_filters))
    pack = cls(CHANNELS)
    if how == "instance":
        pack.generate_filters = MethodType(generate_filters, pack)
    elif how == "class":
        monkeypatch.setattr(DDFPack, "generate_filters", generate_filters)
    assert (pack(torch.randn(1, CHANNELS, 6, 7)) == 0).all()


@pytest.mark.parametrize("name", ["std", "mean"])
@pytest.mark.parametrize("filter_type, size", [("spatial", (2, 9, 4, 4)), ("channel", (2, 9))])
def test_parameters_on_another_device_are_refused(name, filter_type, size):
    with pytest.raises(ValueError, match=f"{name} must be on the device of x, cpu, got meta"):
        filter_norm(torch.randn(size), 1, filter_type, **{name: torch.ones(9, device="meta")})
    one = torch.tensor(2.0)
    x = torch.randn(size)
    torch.testing.assert_close(
        filter_norm(x, 1, filter_type, **{name: one}), filter_norm(x, 1, filter_type, **{name: 2.0})
    )
