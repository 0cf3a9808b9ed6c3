"""DDFPack and DDFUpPack: the operation with the branches that predict its filters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ddf_mm.layers.filter_norm import FilterNorm
from ddf_mm.layers.shift import Shift
from ddf_mm.layers.unmodified import is_filter_norm, is_observed, is_unmodified, layers_of
from ddf_mm.ops import ddf, ddf_up, library, self_check
from ddf_mm.ops.checks import (
    AUTOCAST_RULE,
    COMBINES,
    DTYPES,
    check_combine,
    check_int,
    check_kernel_size,
    check_number,
    check_scale_factors,
    check_tensor,
    shape_of,
)
from ddf_mm.ops.filter_norm import EPS
from ddf_mm.ops.reference import accumulate_dtype
from ddf_mm.registry import name_pretrained


def _reset_branches(pack: nn.Module) -> None:
    """Resets the filter branches, which an enclosing module's ``init_cfg`` may have initialized."""
    for module in pack.modules():
        if isinstance(module, (nn.Conv2d, FilterNorm)):
            module.reset_parameters()


def _check_pack_arguments(
    in_channels: int, kernel_size: int, dilation: int, head: int, se_ratio: float, combine: str
) -> tuple[int, int, int, int]:
    """Checks the arguments of both packs; returns the first four as ints."""
    in_channels = check_int("in_channels", in_channels, 1)
    kernel_size = check_kernel_size(kernel_size, minimum=3)
    dilation = check_int("dilation", dilation, 1)
    head = check_int("head", head, 1)
    if in_channels % head:
        raise ValueError(
            f"head must divide in_channels, got head {head}, in_channels {in_channels}"
        )
    check_number("se_ratio", se_ratio)
    if not se_ratio > 0:
        raise ValueError(f"se_ratio must be positive, got {se_ratio}")
    if math.isinf(se_ratio):
        raise ValueError(f"se_ratio must be finite, got {se_ratio}")
    check_combine(combine)
    return in_channels, kernel_size, dilation, head


def _is_unbatched(x: Tensor, in_channels: int) -> bool:
    """Whether the features are one image, ``Tensor[C, H, W]``, and not ``Tensor[B, C, H, W]``.

    Raises:
        TypeError, ValueError: they are neither.
    """
    if isinstance(x, torch.fx.Proxy):  # without sizes; traced graphs are for batches
        return False
    check_tensor("x", x)
    shape = shape_of(x)
    if len(shape) not in (3, 4):
        raise ValueError(
            f"x must be a Tensor[B, C, H, W] or Tensor[C, H, W] with C = {in_channels}, got shape "
            f"{list(shape)}"
        )
    if shape[-3] != in_channels or 0 in (shape[-2], shape[-1]):
        raise ValueError(
            f"x must have in_channels = {in_channels} channels and at least one row and column, "
            f"got shape {list(shape)}"
        )
    return len(shape) == 3


def _check_batch(x: Tensor, in_channels: int) -> None:
    if _is_unbatched(x, in_channels):
        raise ValueError(f"x must be a batch here, a Tensor[B, C, H, W], got shape {list(x.shape)}")


def _check_placement(name: str, x: Tensor, branch: nn.Module) -> None:
    """Raises unless x has the dtype and device of the branch's first convolution, in terms of the
    layer's arguments. A modified branch is not checked: it raises its own errors."""
    if is_observed() or isinstance(x, torch.fx.Proxy):
        return
    layers = [m for m in layers_of(branch) if not is_unmodified(m, nn.AdaptiveAvgPool2d)]
    if not layers or not is_unmodified(layers[0], nn.Conv2d):
        return
    weight = layers[0]._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
        return
    if x.device != weight.device:
        raise ValueError(
            f"{name} must be on the device of the layer's parameters, {weight.device}, got "
            f"{x.device}"
        )
    casts = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    if weight.dtype != x.dtype and not (casts and torch.float64 not in (x.dtype, weight.dtype)):
        raise TypeError(
            f"{name} must have the dtype of the layer's parameters, {weight.dtype}, got {x.dtype} "
            f"({AUTOCAST_RULE})"
        )


def _run_all_but_last(branch: nn.Sequential, x: Tensor) -> Tensor:
    *layers, _ = branch._modules.values()
    for layer in layers:
        x = layer(x)
    return x


def _spatial_branch(
    in_channels: int, kernel_size: int, head: int, nonlinearity: str, stride: int = 1
) -> nn.Sequential:
    """Spatial filters: features -> ``Tensor[B, head*k*k, ceil(H/stride), ceil(W/stride)]``."""
    return nn.Sequential(
        nn.Conv2d(in_channels, head * kernel_size**2, 1, stride=stride),
        FilterNorm(head, kernel_size, "spatial", nonlinearity),
    )


def _channel_branch(
    in_channels: int, kernel_size: int, nonlinearity: str, se_ratio: float
) -> nn.Sequential:
    """Channel filters: features -> ``Tensor[B, C*k*k, 1, 1]``."""
    mid_channels = max(int(in_channels * se_ratio), 1)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Conv2d(in_channels, mid_channels, 1),
        # Not in place: PyTorch refuses that after a module with a full backward hook.
        nn.ReLU(),
        nn.Conv2d(mid_channels, in_channels * kernel_size**2, 1),
        FilterNorm(in_channels, kernel_size, "channel", nonlinearity, running_std=True),
    )


class DDFPack(BaseModule):
    """A decoupled dynamic filter with the branches that predict it from the features.

    Replaces a k x k convolution that keeps the number of channels. The spatial branch
    is a 1x1 convolution and :class:`FilterNorm`; the channel branch is global average pooling,
    a bottleneck of two fully connected layers and :class:`FilterNorm`. Arguments and parameter
    names are those of the official layer (theFoxofSky/ddfnet, ddf/ddf.py).

    Args:
        in_channels: channels C of the input and output.
        kernel_size: k, odd, at least 3.
        stride: stride of the windows.
        dilation: distance between neighbouring taps.
        head: filter groups; channels of a group share their spatial filters. Divides C.
        se_ratio: width of the channel branch's bottleneck over C.
        nonlinearity: activation after the layer; sets FilterNorm's scale.
        kernel_combine: how the two filters combine, ``'mul'`` or ``'add'``.
        init_cfg: mmengine's initialization config.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> DDFPack(64, stride=2)(torch.randn(2, 64, 57, 57)).shape
        torch.Size([2, 64, 29, 29])
    """

    init_cfg: dict | list[dict] | None

    def __init__(
        self,
        in_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        head: int = 1,
        se_ratio: float = 0.2,
        nonlinearity: str = "relu",
        kernel_combine: str = "mul",
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        in_channels, kernel_size, dilation, head = _check_pack_arguments(
            in_channels, kernel_size, dilation, head, se_ratio, kernel_combine
        )
        stride = check_int("stride", stride, 1)
        self.in_channels = in_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.head = head
        self.kernel_combine = kernel_combine
        self.spatial_branch = _spatial_branch(in_channels, kernel_size, head, nonlinearity, stride)
        self.channel_branch = _channel_branch(in_channels, kernel_size, nonlinearity, se_ratio)
        # A module, since `efficient_conv_bn_eval` looks for the module before each batch norm.
        self.output = nn.Identity()

    def init_weights(self) -> None:
        """Initializes the branches as the official networks do, by timm.

        Convolution weights are kaiming normal (fan_out, relu); biases have PyTorch's default, while
        the ``Kaiming`` initialization of an enclosing mmengine module would set them to zero. An
        ``init_cfg`` of this layer is applied last.
        """
        if not self.is_init:
            _reset_branches(self)
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.init_cfg = name_pretrained(self.init_cfg)
        super().init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """``Tensor[B, C, H, W]`` -> ``Tensor[B, C, ceil(H/stride), ceil(W/stride)]``.

        A single image, ``Tensor[C, H, W]``, is accepted too, as by a convolution.

        Raises:
            TypeError, ValueError: x is not such a floating-point tensor.
        """
        if _is_unbatched(x, self.in_channels):
            return DDFPack.forward(self, x[None])[0]
        norms = self._norms_to_fuse(x)
        if norms is None:
            channel_filter, spatial_filter = self.generate_filters(x)
            return self.output(ddf(x, channel_filter, spatial_filter, *self._filter_arguments))
        try:
            raw_channel = _run_all_but_last(self.channel_branch, x)
            raw_spatial = _run_all_but_last(self.spatial_branch, x)
        except RuntimeError:
            self._check_placement(x)  # raises a better message; only here, since it costs 10 us
            raise
        return self._filter_by_raw(x, raw_channel, raw_spatial, *norms)

    @property
    def _filter_arguments(self) -> tuple[int, int, int, str]:
        """The last arguments of :func:`~ddf_mm.ops.ddf`."""
        return self.kernel_size, self.dilation, self.stride, self.kernel_combine

    def _norms_to_fuse(self, x: Tensor) -> tuple[FilterNorm, FilterNorm] | None:
        """The FilterNorms of the channel and the spatial filters, or ``None`` if ``ddf_pack`` would
        not equal them for a batch x."""
        if is_observed() or not (
            type(x) in (Tensor, nn.Parameter)
            and x.numel() > 0
            and library.serves(x)
            and has_own_filters(self)
            and is_unmodified(self.channel_branch, nn.Sequential)
            and is_unmodified(self.spatial_branch, nn.Sequential)
        ):
            return None
        kernel_size, *options, combine = self._filter_arguments
        if combine not in COMBINES or not all(type(n) is int and n > 0 for n in options):
            return None  # ddf raises the error
        taps = kernel_size**2
        channel_norm = next(reversed(self.channel_branch._modules.values()), None)
        spatial_norm = next(reversed(self.spatial_branch._modules.values()), None)
        if is_filter_norm(
            channel_norm, x.device, self.in_channels, "channel", taps
        ) and is_filter_norm(spatial_norm, x.device, self.head, "spatial", taps):
            return channel_norm, spatial_norm
        return None

    @library.with_formula
    def _filter_by_raw(
        self,
        x: Tensor,
        raw_channel: Tensor,
        raw_spatial: Tensor,
        channel_norm: FilterNorm,
        spatial_norm: FilterNorm,
    ) -> Tensor:
        """Filters x by the filters before FilterNorm, in one call of ``ddf_pack``."""
        k, *_ = options = self._filter_arguments
        shape = x.shape[0], self.in_channels, k, k
        features, channel, spatial = library.autocast_inputs(x, raw_channel, raw_spatial)
        fits = (
            type(channel) is type(spatial) is Tensor
            and features.dtype == channel.dtype == spatial.dtype
            and features.device == channel.device == spatial.device
            and channel.shape[:2] == (shape[0], math.prod(shape[1:]))
            and channel.numel() == math.prod(shape)
            and spatial.dim() == 4
            and library.serves(features)
        )  # if not, a layer before a norm was replaced
        if fits:
            std = channel_norm.std.to(accumulate_dtype(features.dtype))
            bias, relu = None, False
            if folds := is_unmodified(self.output, Shift) and not torch.is_grad_enabled():
                bias, relu = self.output.bias.to(std.dtype), self.output.relu
            filters = channel.view(shape), spatial, std, 1.0, spatial_norm.std, EPS
            call = features, *filters, bias, relu, *options
            if self_check.passes("ddf_pack", *call):
                out = torch.ops.ddf_mm.ddf_pack(*call)
                return out if folds else self.output(out)
        channel = channel_norm(raw_channel).reshape(-1, *shape[1:])
        return self.output(ddf(x, channel, spatial_norm(raw_spatial), *options))

    def _check_placement(self, x: Tensor) -> None:
        for branch in (self.channel_branch, self.spatial_branch):
            _check_placement("x", x, branch)

    def generate_filters(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The filters that the layer applies to features ``Tensor[B, C, H, W]``.

        Returns:
            The channel filters ``Tensor[B, C, k, k]`` and the spatial filters
            ``Tensor[B, head*k*k, ceil(H/stride), ceil(W/stride)]``, as :func:`~ddf_mm.ops.ddf`
            takes them.
        """
        _check_batch(x, self.in_channels)
        self._check_placement(x)
        k, *_ = self._filter_arguments
        channel_filter = self.channel_branch(x).reshape(-1, self.in_channels, k, k)
        return channel_filter, self.spatial_branch(x)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, head={self.head}, kernel_combine={self.kernel_combine!r}"
        )


_GENERATE_FILTERS = DDFPack.generate_filters


def has_own_filters(pack: DDFPack) -> bool:
    """Whether :meth:`DDFPack.generate_filters` is not overridden."""
    return (
        type(pack).generate_filters is _GENERATE_FILTERS and "generate_filters" not in pack.__dict__
    )


def _stack_filters(branches: nn.ModuleList, inputs: list[Tensor]) -> Tensor:
    """The filters that the branches predict from one input each: ``Tensor[B, branches, …]``."""
    return torch.stack([f(x) for f, x in zip(branches, inputs, strict=True)], dim=1)


# torch.fx records it as one call, since it depends on sizes.
@torch.fx.wrap
def _guides(
    x: Tensor, joint_x: Tensor | None, scale_factors: tuple[int, int], joint_channels: int
) -> list[Tensor]:
    """The input of each spatial branch of a DDFUpPack."""
    rows, columns = scale_factors
    if joint_x is None:
        channels = shape_of(x)[1]
        if joint_channels != channels:
            raise ValueError(
                f"joint_x must be given, a guidance of {joint_channels} channels, since "
                f"joint_channels is {joint_channels} and in_channels {channels}"
            )
        joint_x = x
    batch, _, height, width = shape_of(x)
    given = shape_of(joint_x)
    own = (batch, joint_channels, height, width)
    upsampled = (batch, joint_channels, rows * height, columns * width)
    if given == own:
        return [joint_x] * (rows * columns)
    if given == upsampled:
        return [joint_x[:, :, p::rows, q::columns] for p in range(rows) for q in range(columns)]
    raise ValueError(
        f"joint_x must be a Tensor[B, joint_channels, H, W] = {list(own)} or, of the "
        f"upsampled size, {list(upsampled)}, got shape {list(given)}"
    )


@MODELS.register_module("DDFUp")
class DDFUpPack(BaseModule):
    """DDF upsampling: one pair of filter branches for each of the s*s subpixels.

    Registered as the upsample layer ``DDFUp`` (``build_upsample_layer(dict(type='DDFUp', …))``).
    Arguments and parameter names are those of the official layer (theFoxofSky/ddfnet,
    ddf/ddf.py), which cannot run: its combination argument is misplaced, ``joint_channels``
    has no effect, and any ``dw_kernel_size`` other than ``kernel_size`` changes the size.

    Args:
        in_channels: channels C of the input and output.
        kernel_size: k, odd, at least 3.
        scale_factor: upsampling factor s; or two, of the height and the width.
        dilation: distance between neighbouring taps.
        head: filter groups. Divides C.
        se_ratio: width of the channel branches' bottleneck over C.
        nonlinearity: activation after the layer; sets FilterNorm's scale.
        dw_kernel_size: odd size of the depthwise convolution before each spatial branch's 1x1
            convolution; unused with ``joint_channels``.
        joint_channels: channels of the guidance, the input of the spatial branches; less than 1
            means that their input is the features, or a guidance of C channels.
        kernel_combine: ``'mul'`` or ``'add'``.
        init_cfg: mmengine's initialization config.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> up = DDFUpPack(64, joint_channels=3)
        >>> up(torch.randn(2, 64, 25, 19), torch.randn(2, 3, 50, 38)).shape
        torch.Size([2, 64, 50, 38])
    """

    init_cfg: dict | list[dict] | None

    def __init__(
        self,
        in_channels: int,
        kernel_size: int = 3,
        scale_factor: int | Sequence[int] = 2,
        dilation: int = 1,
        head: int = 1,
        se_ratio: float = 0.2,
        nonlinearity: str = "linear",
        dw_kernel_size: int = 3,
        joint_channels: int = -1,
        kernel_combine: str = "mul",
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        in_channels, kernel_size, dilation, head = _check_pack_arguments(
            in_channels, kernel_size, dilation, head, se_ratio, kernel_combine
        )
        rows, columns = check_scale_factors(scale_factor)
        dw_kernel_size = check_kernel_size(dw_kernel_size, "dw_kernel_size")
        joint_channels = check_int("joint_channels", joint_channels)
        self.in_channels = in_channels
        self.kernel_size = kernel_size
        self.scale_factor = rows if rows == columns else (rows, columns)
        self.dilation = dilation
        self.head = head
        self.joint_channels = joint_channels if joint_channels >= 1 else in_channels
        self.kernel_combine = kernel_combine

        self.spatial_branch = nn.ModuleList()
        self.channel_branch = nn.ModuleList()
        for _ in range(rows * columns):
            spatial = _spatial_branch(self.joint_channels, kernel_size, head, nonlinearity)
            if joint_channels < 1:
                depthwise = nn.Conv2d(
                    in_channels,
                    in_channels,
                    dw_kernel_size,
                    padding=dw_kernel_size // 2,
                    groups=in_channels,
                )
                spatial = nn.Sequential(depthwise, spatial)
            self.spatial_branch.append(spatial)
            self.channel_branch.append(
                _channel_branch(in_channels, kernel_size, nonlinearity, se_ratio)
            )

    def init_weights(self) -> None:
        """Initializes the branches as the official layer does, with PyTorch's defaults.

        An ``init_cfg`` of this layer is applied last.
        """
        if not self.is_init:
            _reset_branches(self)
        self.init_cfg = name_pretrained(self.init_cfg)
        super().init_weights()

    def forward(self, x: Tensor, joint_x: Tensor | None = None) -> Tensor:
        """Upsamples the features.

        Args:
            x: ``Tensor[B, C, H, W]``; or a single image, ``Tensor[C, H, W]``, with a guidance
                without batch dimension.
            joint_x: guidance, ``Tensor[B, joint_channels, H, W]``, the same for every branch; or
                ``Tensor[B, joint_channels, s*H, s*W]``, of which the branch of subpixel (p, q)
                reads the pixels that it writes, (s*i + p, s*j + q). ``None`` means x.

        Returns:
            ``Tensor[B, C, s*H, s*W]``.

        Raises:
            TypeError, ValueError: x or joint_x has another type or shape.
        """
        if _is_unbatched(x, self.in_channels):
            if joint_x is not None:
                check_tensor("joint_x", joint_x)
                if joint_x.dim() != 3:
                    raise ValueError(
                        "joint_x must be one image, as x is, a Tensor[joint_channels, H, W], got "
                        f"shape {list(joint_x.shape)}"
                    )
                joint_x = joint_x[None]
            return DDFUpPack.forward(self, x[None], joint_x)[0]
        return ddf_up(
            x,
            *self.generate_filters(x, joint_x),
            self.kernel_size,
            self.scale_factor,
            self.dilation,
            self.kernel_combine,
        )

    def generate_filters(self, x: Tensor, joint_x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The filters that the layer applies, for the arguments of :meth:`forward`.

        Returns:
            The channel filters ``Tensor[B, s*s, C, k, k]`` and the spatial filters
            ``Tensor[B, s*s, head*k*k, H, W]``, as :func:`~ddf_mm.ops.ddf_up` takes them.
        """
        _check_batch(x, self.in_channels)
        _check_placement("x", x, self.channel_branch[0])
        if joint_x is not None and not isinstance(joint_x, torch.fx.Proxy):
            check_tensor("joint_x", joint_x)
            _check_placement("joint_x", joint_x, self.spatial_branch[0])
        k, count = self.kernel_size, len(self.spatial_branch)
        factors = check_scale_factors(self.scale_factor)
        guides = _guides(x, joint_x, factors, self.joint_channels)
        channel_filter = _stack_filters(self.channel_branch, [x] * count)
        return (
            channel_filter.reshape(-1, count, self.in_channels, k, k),
            _stack_filters(self.spatial_branch, [guides[r] for r in range(count)]),
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size}, "
            f"scale_factor={self.scale_factor}, dilation={self.dilation}, head={self.head}, "
            f"joint_channels={self.joint_channels}, kernel_combine={self.kernel_combine!r}"
        )
