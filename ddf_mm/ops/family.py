"""Weight-dynamic depthwise operations of other papers, by their own names and by ddf and ddf_up.

Each takes the tensors of the original in the original's layout. Where the original only reorders
the values of a filter, the reordered filter is a view of it. Under torch.autocast the tensors are
cast as those of ddf; call with it disabled where flows or depths need float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_mm.ops import library
from ddf_mm.ops.checks import (
    check_ddf,
    check_features,
    check_int,
    check_kernel_size,
    check_tensor,
    shape_of,
)
from ddf_mm.ops.ddf import ddf, ddf_up
from ddf_mm.ops.reference import split_channels


def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int = 1, scale_factor: int = 2
) -> Tensor:
    """CARAFE's reassembly (arXiv 1905.02188), with the arguments of ``mmcv.ops.carafe``.

    Args:
        features: ``Tensor[B, C, H, W]``.
        masks: ``Tensor[B, group_size*k*k, s*H, s*W]``, the filter of each pixel of the output.
            They are copied into the order of :func:`ddf_up`;
            :class:`~ddf_mm.layers.CARAFE` makes them in that order.
        kernel_size: k, odd.
        group_size: filter groups; divides C.
        scale_factor: s.

    Returns:
        ``Tensor[B, C, s*H, s*W]``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
    """
    features, masks = library.autocast_inputs(features, masks)
    check_features(features)
    check_tensor("masks", masks, like=features)
    k, s = check_kernel_size(kernel_size), check_int("scale_factor", scale_factor, 1)
    groups = check_int("group_size", group_size, 1)
    batch, _, height, width = shape_of(features)
    expected = (batch, groups * k * k, s * height, s * width)
    _check_shape("masks", masks, "B, group_size*k*k, s*H, s*W", expected)
    batch, _, height, width = features.shape  # which traces of torch.jit record
    # [B, g*k*k, H, s, W, s] -> [B, s*s, g*k*k, H, W]
    by_subpixel = masks.view(batch, groups * k * k, height, s, width, s).permute(0, 3, 5, 1, 2, 4)
    return ddf_up(features, None, by_subpixel.flatten(1, 2), k, s)


def involution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
) -> Tensor:
    """Involution (arXiv 2103.06255), with the arguments of the official ``_involution_cuda``.

    Args:
        input: ``Tensor[B, C, H, W]``.
        weight: ``Tensor[B, g, k, k, Ho, Wo]``, g filter groups that share the C channels; Ho is
            H / stride, rounded down (as officially) or up.
        bias: ``Tensor[C]`` or ``None``.
        stride: distance in pixels between neighbouring windows.
        padding: dilation * (k - 1) / 2, which is what ``None`` means.
        dilation: distance in pixels between neighbouring taps.

    Returns:
        ``Tensor[B, C, Ho, Wo]``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
    """
    check_tensor("weight", weight)
    shape = shape_of(weight)
    if len(shape) != 6 or shape[2] != shape[3]:
        raise ValueError(f"weight must be a Tensor[B, g, k, k, Ho, Wo], got shape {list(shape)}")
    k = check_kernel_size(shape[2], "weight's kernel size k")
    same = check_int("dilation", dilation, 1) * (k - 1) // 2
    if padding is not None and padding != same:
        raise ValueError(f"padding must be {same}, dilation * (k - 1) / 2, got {padding!r}")
    out = ddf(input, None, weight.flatten(1, 3), k, dilation, stride)
    return out if bias is None else out + bias.to(out.dtype)[:, None, None]


def adaptive_conv(input: Tensor, filters: Tensor) -> Tensor:
    """FeatUp's adaptive convolution (arXiv 2403.10516), as its ``AdaptiveConv.apply``.

    Output pixel (i, j) of every channel is the sum over the taps (p, q) of
    ``input[:, :, i + p, j + q] * filters[:, i, j, p, q]``.

    Args:
        input: padded features, ``Tensor[B, C, H + k - 1, W + k - 1]``.
        filters: ``Tensor[B, H, W, k, k]``, k odd.

    Returns:
        ``Tensor[B, C, H, W]``, as of :func:`ddf` with ``padding='valid'``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
    """
    check_tensor("filters", filters)
    shape = shape_of(filters)
    if len(shape) != 5 or shape[3] != shape[4]:
        raise ValueError(f"filters must be a Tensor[B, H, W, k, k], got shape {list(shape)}")
    k = check_kernel_size(shape[3], "filters' kernel size k")
    return ddf(input, None, filters.flatten(3).permute(0, 3, 1, 2), k, padding="valid")


def convex_upsample(flow: Tensor, mask: Tensor, scale_factor: int = 8) -> Tensor:
    """RAFT's upsampling of a flow (arXiv 2003.12039), as its ``RAFT.upsample_flow``.

    Each pixel of the result is a convex combination of the 3 x 3 pixels around it, multiplied by
    ``scale_factor``, since a flow counts pixels.

    Args:
        flow: ``Tensor[B, C, H, W]``; a flow has C = 2.
        mask: logits of the weights, ``Tensor[B, 9*s*s, H, W]``: the taps, in each the subpixels.
        scale_factor: s.

    Returns:
        ``Tensor[B, C, s*H, s*W]``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
    """
    flow, mask = library.autocast_inputs(flow, mask)
    check_features(flow, "flow")
    check_tensor("mask", mask, like=flow)
    s = check_int("scale_factor", scale_factor, 1)
    batch, _, height, width = shape_of(flow)
    _check_shape("mask", mask, "B, 9*s*s, H, W", (batch, 9 * s * s, height, width))
    logits = split_channels(mask, 9, s * s)
    if _is_fused(flow, mask):
        return torch.ops.ddf_mm.ddf_softmax(s * flow, logits.transpose(1, 2), 3, s)
    return ddf_up(s * flow, None, logits.softmax(dim=1).transpose(1, 2), 3, s)


def cspn(
    guidance: Tensor,
    blur_depth: Tensor,
    sparse_depth: Tensor | None = None,
    prop_time: int = 24,
    norm_type: str = "8sum",
) -> Tensor:
    """Convolutional spatial propagation (arXiv 1808.00150), as the official ``Affinity_Propagate``.

    Every step replaces the depth by the sum of its 8 neighbours, each times its affinity, plus the
    first depth times what is left to 1. As in the official code an affinity belongs to the
    pixel that gives, and the affinities that reach a pixel are divided by the sum of their
    absolute values.

    Args:
        guidance: affinities, ``Tensor[B, 8, H, W]``: of the pixel to its neighbours from
            (-1, -1) to (1, 1), row by row.
        blur_depth: ``Tensor[B, C, H, W]``; a depth has C = 1.
        sparse_depth: ``Tensor[B, C, H, W]`` that is 1 or more where ``blur_depth`` is to be kept
            and 0 elsewhere, or ``None``.
        prop_time: number of steps.
        norm_type: ``'8sum'``, or ``'8sum_abs'``, which takes the absolute values of the affinities.

    Returns:
        ``Tensor[B, C, H, W]``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
    """
    blur_depth, guidance, sparse_depth = library.autocast_inputs(blur_depth, guidance, sparse_depth)
    check_features(blur_depth, "blur_depth")
    check_tensor("guidance", guidance, like=blur_depth)
    check_int("prop_time", prop_time, 0)
    batch, _, height, width = shape_of(blur_depth)
    _check_shape("guidance", guidance, "B, 8, H, W", (batch, 8, height, width))
    if norm_type not in ("8sum", "8sum_abs"):
        raise ValueError(f"norm_type must be '8sum' or '8sum_abs', got {norm_type!r}")
    given = guidance.abs() if norm_type == "8sum_abs" else guidance
    padded = F.pad(given, (1,) * 4)
    taps = [
        padded[:, 7 - n, row : row - 2 or None, column : column - 2 or None]
        for n, (row, column) in enumerate(
            (t // 3, t % 3)
            for t in range(9)
            if t != 4  # the centre has none
        )
    ]
    weights = torch.stack(taps, dim=1)
    weights = weights / weights.abs().sum(dim=1, keepdim=True)
    kept = (1 - weights.sum(dim=1, keepdim=True)) * blur_depth
    # The centre's tap is 0.
    filters = torch.cat([weights[:, :4], torch.zeros_like(weights[:, :1]), weights[:, 4:]], dim=1)
    mask = None if sparse_depth is None else sparse_depth.sign()
    depth = blur_depth
    for _ in range(prop_time):
        depth = ddf(depth, None, filters) + kept
        if mask is not None:
            depth = (1 - mask) * depth + mask * blur_depth
    return depth


def apply_kernel(weights: Tensor, data: Tensor, normalize: bool = True) -> Tensor:
    """Kernel-predicting denoising (KPCN, Bako et al. 2017): a kernel for each pixel.

    Args:
        weights: kernels, ``Tensor[B, k*k, H, W]``, k odd.
        data: ``Tensor[B, C, H, W]``; an image has C = 3. Outside it is 0.
        normalize: whether the kernels are logits, of which the softmax over their taps is taken.

    Returns:
        ``Tensor[B, C, H, W]``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
    """
    check_tensor("weights", weights)
    shape = shape_of(weights)
    k = _root(shape[1]) if len(shape) == 4 else 0
    if len(shape) != 4 or k * k != shape[1]:
        raise ValueError(f"weights must be a Tensor[B, k*k, H, W], got shape {list(shape)}")
    k = check_kernel_size(k, "weights' kernel size k")
    if not normalize:
        return ddf(data, None, weights, k)
    if _is_fused(data, weights):
        data, weights = library.autocast_inputs(data, weights)
        check_ddf(data, None, weights, k, 1, 1, "mul")
        return torch.ops.ddf_mm.ddf_softmax(data, weights[:, None], k, 1)
    return ddf(data, None, weights.softmax(dim=1), k)


def dynamic_upsampling(x: Tensor, filters: Tensor) -> Tensor:
    """Dynamic upsampling filters (DUF, CVPR 2018), all channels of a pixel by the same s*s filters.

    It is the pixel shuffle of what BasicSR's ``DynamicUpsamplingFilter`` returns.

    Args:
        x: ``Tensor[B, C, H, W]``.
        filters: ``Tensor[B, k*k, s*s, H, W]``, k odd, normalized as they are to be.

    Returns:
        ``Tensor[B, C, s*H, s*W]``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
    """
    check_tensor("filters", filters)
    shape = shape_of(filters)
    k, s = (_root(size) for size in shape[1:3]) if len(shape) == 5 else (0, 0)
    if len(shape) != 5 or (k * k, s * s) != tuple(shape[1:3]):
        raise ValueError(f"filters must be a Tensor[B, k*k, s*s, H, W], got shape {list(shape)}")
    k = check_kernel_size(k, "filters' kernel size k")
    return ddf_up(x, None, filters.transpose(1, 2), k, s)


def _root(number: int) -> int:
    """The square root, rounded up; of a symbolic size of torch.compile as a number, too."""
    root = 0
    while root * root < number:
        root += 1
    return root


def _is_fused(features: Tensor, logits: Tensor) -> bool:
    """Whether softmax and filter are one op, which is for predictions on a CPU."""
    has_gradient = torch.is_grad_enabled() and (features.requires_grad or logits.requires_grad)
    return (
        features.device.type == "cpu"
        and not has_gradient
        # Compilers and exporters know the parts better.
        and not torch.compiler.is_compiling()
        and library.serves(features)
    )


def _check_shape(name: str, tensor: Tensor, axes: str, expected: tuple[int, ...]) -> None:
    if tuple(shape_of(tensor)) != expected:
        raise ValueError(
            f"{name} must be a Tensor[{axes}] = {list(expected)}, got {list(tensor.shape)}"
        )
