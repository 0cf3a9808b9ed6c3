"""The whole of a DDFPack as one differentiable function, for speed and memory.

Computes what the modules of :class:`ddf_mm.layers.DDFPack` compute one after the other, to within
rounding. For the backward pass it keeps the features and the raw filters, before FilterNorm, and
vectors of C values; the three gradients of the features add up in one tensor.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_mm.ops import library
from ddf_mm.ops.ddf import ddf
from ddf_mm.ops.filter_norm import filter_norm
from ddf_mm.ops.reference import layout_of

EPS = 1e-10


class PackOptions(NamedTuple):
    """What the tensors of a pack do not say."""

    kernel_size: int
    dilation: int
    stride: int
    kernel_combine: str
    head: int
    spatial_scale: float


class PackWeights(NamedTuple):
    """The parameters of a pack's branches: of three 1x1 convolutions, and channel FilterNorm's."""

    spatial: Tensor  # [head*k*k, C, 1, 1]
    spatial_bias: Tensor
    squeeze: Tensor  # [C', C, 1, 1]
    squeeze_bias: Tensor
    expand: Tensor  # [C*k*k, C', 1, 1]
    expand_bias: Tensor
    channel_std: Tensor  # [C*k*k]


def fused_pack(
    x: Tensor,
    weights: PackWeights,
    options: PackOptions,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Applies a pack to features, by the compiled ops.

    Args:
        x: ``Tensor[B, C, H, W]``, for which ``library.serves(x)``.
        weights: of x's dtype and device, but for autocast.
        options: the pack's settings.
        bias: ``Tensor[C]``, added to the output; only where no gradient is recorded.
        relu: whether ReLU follows; likewise.

    Returns:
        ``Tensor[B, C, ceil(H/stride), ceil(W/stride)]``.
    """
    x, *convolutions = library.autocast_inputs(x, *weights[:6])
    arguments = (x, *convolutions, weights.channel_std)
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled() and any(t.requires_grad for t in arguments):
            return _FusedPack.apply(options, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return _apply(options, *arguments, bias=bias, relu=relu)[0]


def _apply(
    o: PackOptions, x: Tensor, *weights: Tensor, bias: Tensor | None = None, relu: bool = False
) -> tuple[Tensor, ...]:
    """The output, then what the backward pass needs besides the arguments."""
    w = PackWeights(*weights)
    channels, k = x.shape[1], o.kernel_size
    exact = library.accumulate_dtype(x.dtype)
    raw_spatial, pooled = _project_and_pool(x, w.spatial, w.spatial_bias, o.stride)
    hidden = F.linear(pooled, w.squeeze.flatten(1), w.squeeze_bias).relu_()
    raw_channel = F.linear(hidden, w.expand.flatten(1), w.expand_bias)
    out = torch.ops.ddf_mm.ddf_pack(
        x,
        raw_channel.view(-1, channels, k, k),
        raw_spatial,
        w.channel_std.to(exact),
        1.0,
        o.spatial_scale,
        EPS,
        None if bias is None else bias.to(exact),
        relu,
        *_taps(o),
    )
    return out, raw_channel, raw_spatial, pooled, hidden


def _taps(o: PackOptions) -> tuple[int, int, int, bool]:
    return o.kernel_size, o.dilation, o.stride, o.kernel_combine == "mul"


def _normalized(
    o: PackOptions, raw_channel: Tensor, raw_spatial: Tensor, w: PackWeights
) -> tuple[Tensor, Tensor]:
    std = w.channel_std.to(library.accumulate_dtype(raw_channel.dtype))
    channels, k = w.squeeze.shape[1], o.kernel_size
    channel = torch.ops.ddf_mm.filter_norm(raw_channel, channels, std, None, 1.0, EPS)
    spatial = torch.ops.ddf_mm.filter_norm(raw_spatial, o.head, None, None, o.spatial_scale, EPS)
    return channel.view(-1, channels, k, k), spatial


def _by_matmul(x: Tensor) -> bool:
    """Whether matrix products serve 1x1 convolutions of x better than PyTorch's convolution."""
    return x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"


def _is_planar(x: Tensor) -> bool:
    return x.is_contiguous()


def _project_and_pool(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    """What both branches read of the features: the 1x1 convolution, and the mean of all pixels."""
    if x.device.type == "cpu" and layout_of(x) is torch.channels_last:
        return torch.ops.ddf_mm.pointwise_pool(x, weight, bias, stride)
    return _project(x, weight, bias, stride), x.mean((2, 3))


def _project(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """The 1x1 convolution of the spatial branch."""
    if not (_by_matmul(x) and _is_planar(x)):
        return F.conv2d(x, weight, bias, stride)
    x = x[:, :, ::stride, ::stride]
    batch, _, height, width = x.shape
    shape = (batch, bias.numel(), height * width)
    out = torch.baddbmm(
        bias[:, None].expand(shape), weight.flatten(1).expand(batch, -1, -1), x.flatten(2)
    )
    return out.view(batch, -1, height, width)


def _project_weight_grads(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and bias of :func:`_project`."""
    if not _by_matmul(x):
        _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, [weight.shape[0]], [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1,
            [False, True, True],
        )  # fmt: skip
        return grad_weight, grad_bias
    is_planar = _is_planar(x)
    x = x[:, :, ::stride, ::stride]
    if is_planar:
        per_image = torch.bmm(grad.flatten(2), x.flatten(2).transpose(1, 2))
    else:
        x, by_pixel = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (x, grad))
        per_image = torch.bmm(by_pixel.transpose(1, 2), x)
    return per_image.sum(0).view_as(weight), grad.sum((0, 2, 3))


def _add_branch_grads(
    to: Tensor, grad_spatial: Tensor, weight: Tensor, grad_pooled: Tensor, stride: int
) -> None:
    """Adds the gradients through the spatial branch and the pooling to those of the features.

    Args:
        to: ``Tensor[B, C, H, W]``.
        grad_spatial: gradient of the raw spatial filters.
        weight: of the 1x1 convolution that made them.
        grad_pooled: ``Tensor[B, C]``, of every pixel.
        stride: of that convolution.
    """
    batch, channels = to.shape[:2]
    weight = weight.flatten(1)
    if stride > 1 or (to.dtype in (torch.float16, torch.bfloat16) and to.device.type == "cpu"):
        to += grad_pooled[:, :, None, None]
        at = to[:, :, ::stride, ::stride]
        at += F.conv2d(grad_spatial, weight.t()[:, :, None, None])
        return
    # One product more with a row of ones adds the pooling's share.
    ones = grad_spatial.new_ones(batch, 1, *grad_spatial.shape[2:])
    grads = torch.cat([grad_spatial, ones], dim=1)
    factors = torch.cat([weight.expand(batch, -1, -1), grad_pooled[:, None]], dim=1)
    if _is_planar(to):
        to.view(batch, channels, -1).baddbmm_(factors.transpose(1, 2), grads.flatten(2))
    else:
        pixels = to.permute(0, 2, 3, 1).view(batch, -1, channels)
        pixels.baddbmm_(grads.permute(0, 2, 3, 1).reshape(batch, -1, grads.shape[1]), factors)


class _FusedPack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            out, *kept = _apply(options, *arguments)
        ctx.options = options
        ctx.save_for_backward(*arguments, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        composition = partial(_composition, ctx.options)
        # Batched gradients of torch.autograd.grad are no transform of torch.func.
        if not library.serves(grad) or torch._C._functorch.is_legacy_batchedtensor(grad):
            return None, *library.gradients(composition, saved[:8], needed, grad)
        if torch.is_grad_enabled():
            return None, *_differentiable_grads(composition, saved[:8], needed, grad)
        with torch._C._AutoDispatchBelowAutograd():
            return None, *_grads(ctx.options, needed, grad, *saved)


def _grads(o: PackOptions, needed, grad, x, *saved):
    w = PackWeights(*saved[:7])
    raw_channel, raw_spatial, pooled, hidden = saved[7:]
    ops = torch.ops.ddf_mm
    channels = x.shape[1]
    std = w.channel_std.to(library.accumulate_dtype(x.dtype))
    channel, spatial = _normalized(o, raw_channel, raw_spatial, w)
    grad_x, grad_channel, grad_spatial = ops.ddf_backward(
        grad, x, channel, spatial, *_taps(o), needed[0], True, True
    )
    grad_channel, grad_std, _ = ops.filter_norm_backward(
        grad_channel.flatten(1), raw_channel, channels, std, 1.0, EPS, True, needed[7], False
    )
    grad_spatial, _, _ = ops.filter_norm_backward(
        grad_spatial, raw_spatial, o.head, None, o.spatial_scale, EPS, True, False, False
    )
    grad_hidden = torch.ops.aten.threshold_backward(grad_channel @ w.expand.flatten(1), hidden, 0)
    grads = [None] * 8
    if needed[0]:
        grad_pooled = grad_hidden @ w.squeeze.flatten(1) / (x.shape[2] * x.shape[3])
        _add_branch_grads(grad_x, grad_spatial, w.spatial, grad_pooled, o.stride)
        grads[0] = grad_x
    if needed[1] or needed[2]:
        grads[1:3] = _project_weight_grads(grad_spatial, x, w.spatial, o.stride)
    if needed[3]:
        grads[3] = (grad_hidden.t() @ pooled).view_as(w.squeeze)
    if needed[4]:
        grads[4] = grad_hidden.sum(0)
    if needed[5]:
        grads[5] = (grad_channel.t() @ hidden).view_as(w.expand)
    if needed[6]:
        grads[6] = grad_channel.sum(0)
    if needed[7]:
        grads[7] = grad_std.to(w.channel_std.dtype)
    return grads


def _composition(o: PackOptions, x: Tensor, *weights: Tensor) -> Tensor:
    """The pack by public differentiable functions."""
    w = PackWeights(*weights)
    channels, k = x.shape[1], o.kernel_size
    hidden = F.conv2d(F.adaptive_avg_pool2d(x, 1), w.squeeze, w.squeeze_bias).relu()
    channel = F.conv2d(hidden, w.expand, w.expand_bias)
    channel = filter_norm(channel, channels, "channel", w.channel_std, eps=EPS)
    spatial = F.conv2d(x, w.spatial, w.spatial_bias, o.stride)
    spatial = filter_norm(spatial, o.head, "spatial", o.spatial_scale, eps=EPS)
    channel = channel.view(-1, channels, k, k)
    return ddf(x, channel, spatial, k, o.dilation, o.stride, o.kernel_combine)


def _differentiable_grads(function, tensors, needed, grad):
    """Gradients that can be differentiated again, by the compiled ops as far as these can."""
    tensors = [t.view_as(t) for t in tensors]
    wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
    found = iter(torch.autograd.grad(function(*tensors), wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needed]
