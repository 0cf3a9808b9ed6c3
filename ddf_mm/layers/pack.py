"""DDFPack and DDFUpPack: the operation with the branches that generate its filters."""

from __future__ import annotations

import math

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ddf_mm.layers.filter_norm import FilterNorm
from ddf_mm.layers.fused import PackOptions, PackWeights, fused_pack
from ddf_mm.layers.shift import Shift
from ddf_mm.layers.unmodified import (
    Placement,
    is_conv,
    is_filter_norm,
    is_global_pooling,
    is_observed,
    is_unmodified,
    layers_of,
)
from ddf_mm.ops import ddf, ddf_up, filter_norm, library
from ddf_mm.ops.checks import (
    AUTOCAST_RULE,
    COMBINES,
    DTYPES,
    check_combine,
    check_int,
    check_kernel_size,
    check_number,
    check_tensor,
    shape_of,
)
from ddf_mm.registry import name_pretrained


def _reset_branches(pack: nn.Module) -> None:
    """Starts the filter branches anew, whatever an enclosing module's ``init_cfg`` did to them."""
    for module in pack.modules():
        if isinstance(module, (nn.Conv2d, FilterNorm)):
            module.reset_parameters()


def _check_pack_arguments(
    in_channels: int, kernel_size: int, dilation: int, head: int, se_ratio: float, combine: str
) -> tuple[int, int, int, int]:
    """Checks what both packs take; returns the first four arguments as ints."""
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
    """Whether the features are one image, ``Tensor[C, H, W]``, and no ``Tensor[B, C, H, W]``.

    Raises:
        TypeError, ValueError: they are neither, whatever the branches would take.
    """
    if isinstance(x, torch.fx.Proxy):  # a graph is traced for batches, its sizes are not known
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
    """Raises where x has not the dtype or device of the convolution that reads it in a branch, in
    words about the layer. Branches that were modified are left to answer themselves."""
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
    if weight.dtype not in Placement.of(x).dtypes:
        raise TypeError(
            f"{name} must have the dtype of the layer's parameters, {weight.dtype}, got {x.dtype} "
            f"({AUTOCAST_RULE})"
        )


def _spatial_branch(
    in_channels: int, kernel_size: int, head: int, nonlinearity: str, stride: int = 1
) -> nn.Sequential:
    """Filters of every pixel: features -> ``Tensor[B, head*k*k, ceil(H/stride), …]``."""
    return nn.Sequential(
        nn.Conv2d(in_channels, head * kernel_size**2, 1, stride=stride),
        FilterNorm(head, kernel_size, "spatial", nonlinearity),
    )


def _channel_branch(
    in_channels: int, kernel_size: int, nonlinearity: str, se_ratio: float
) -> nn.Sequential:
    """Filters of every channel: features -> ``Tensor[B, C*k*k]``."""
    mid_channels = max(int(in_channels * se_ratio), 1)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Conv2d(in_channels, mid_channels, 1),
        # Not in place, which PyTorch refuses behind a module with a full backward hook.
        nn.ReLU(),
        nn.Conv2d(mid_channels, in_channels * kernel_size**2, 1),
        FilterNorm(in_channels, kernel_size, "channel", nonlinearity, running_std=True),
    )


class DDFPack(BaseModule):
    """A decoupled dynamic filter with the branches that generate it from the features.

    Takes the place of a k x k convolution that keeps the number of channels. The spatial branch
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
        nonlinearity: what follows the layer; sets FilterNorm's scale.
        kernel_combine: how the two filters combine, ``'mul'`` or ``'add'``.
        init_cfg: mmengine's initialization config.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> DDFPack(64, stride=2)(torch.randn(2, 64, 57, 57)).shape
        torch.Size([2, 64, 29, 29])
    """

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
        # `efficient_conv_bn_eval` asks which module feeds each BN; a function has no answer.
        self.output = nn.Identity()

    def init_weights(self) -> None:
        """Starts the branches as the official networks do, which is timm's way.

        Convolution weights are kaiming normal (fan_out, relu), their biases PyTorch's own, where
        the ``Kaiming`` initialization of an enclosing mmengine module would make them zero. An
        ``init_cfg`` of this layer itself has the last word.
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

        A single image, ``Tensor[C, H, W]``, is taken too, as by a convolution.

        Raises:
            TypeError, ValueError: x is no such floating-point tensor.
        """
        if _is_unbatched(x, self.in_channels):
            return DDFPack.forward(self, x[None])[0]
        fused = self._fused_arguments(x)
        if fused is None:
            return self.output(ddf(x, *self.generate_filters(x), *self._filter_arguments))
        if is_unmodified(self.output, Shift) and not torch.is_grad_enabled():
            return fused_pack(x, *fused, self.output.bias, self.output.relu)
        return self.output(fused_pack(x, *fused))

    @property
    def _filter_arguments(self) -> tuple[int, int, int, str]:
        """The last arguments of :func:`~ddf_mm.ops.ddf`."""
        return self.kernel_size, self.dilation, self.stride, self.kernel_combine

    def _fused_arguments(self, x: Tensor) -> tuple[PackWeights, PackOptions] | None:
        """Arguments of :func:`fused_pack`, if it computes all that the branches would for x, a
        batch that forward has checked."""
        if is_observed() or not (
            type(x) in (Tensor, nn.Parameter)
            and x.numel() > 0
            and library.serves(x)
            and self.kernel_combine in COMBINES
            and has_own_filters(self)
        ):
            return None
        spatial, channel = layers_of(self.spatial_branch), layers_of(self.channel_branch)
        if len(spatial) != 2 or len(channel) != 5:
            return None
        project, spatial_norm = spatial
        pool, squeeze, relu, expand, channel_norm = channel
        kernel_size, dilation, stride, combine = self._filter_arguments
        channels, head, taps = self.in_channels, self.head, kernel_size**2
        width = getattr(squeeze, "out_channels", 0)
        at = Placement.of(x)
        if not (
            type(dilation) is int
            and dilation > 0
            and is_conv(project, at, (head * taps, channels, 1, 1), stride)
            and is_filter_norm(spatial_norm, at, head, "spatial", taps)
            and is_global_pooling(pool)
            and is_conv(squeeze, at, (width, channels, 1, 1))
            and is_unmodified(relu, nn.ReLU)
            and is_conv(expand, at, (channels * taps, width, 1, 1))
            and is_filter_norm(channel_norm, at, channels, "channel", taps)
        ):
            return None
        convs = (conv._parameters for conv in (project, squeeze, expand))
        tensors = (t for own in convs for t in (own["weight"], own["bias"]))
        options = PackOptions(kernel_size, dilation, stride, combine, head, spatial_norm.std)
        return PackWeights(*tensors, channel_norm._parameters["std"]), options

    def generate_filters(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The filters that the layer applies to features ``Tensor[B, C, H, W]``.

        Returns:
            The channel filters ``Tensor[B, C, k, k]`` and the spatial filters
            ``Tensor[B, head*k*k, ceil(H/stride), ceil(W/stride)]``, as :func:`~ddf_mm.ops.ddf`
            takes them.
        """
        _check_batch(x, self.in_channels)
        for branch in (self.channel_branch, self.spatial_branch):
            _check_placement("x", x, branch)
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
    """Whether the filters that a pack applies are those of :meth:`DDFPack.generate_filters`."""
    return (
        type(pack).generate_filters is _GENERATE_FILTERS and "generate_filters" not in pack.__dict__
    )


def _stack_filters(branches: nn.ModuleList, inputs: list[Tensor], kernel_size: int) -> Tensor:
    """The filters that the branches make of one input each: ``Tensor[B, branches, …]``.

    Unmodified branches pool the input that they share once and normalize in one call.
    """
    # The compiler cannot read through layers_of.
    layers = [] if is_observed() else [layers_of(branch) for branch in branches]
    if not layers or not _share_one_norm(layers, inputs[0], kernel_size**2):
        return torch.stack([f(x) for f, x in zip(branches, inputs, strict=True)], dim=1)
    *_, norm = layers[0]
    count = len(branches)
    stacked = _convolve_together([branch[:-1] for branch in layers], inputs)
    if stacked is None:
        pooled = None
        raw = []
        for (*others, _), value in zip(layers, inputs, strict=True):
            # A convolution leaves what others read as it is.
            is_shared = value is inputs[0] and nn.Conv2d in map(type, others[1:2])
            if is_shared and is_global_pooling(others[0]):
                pool, *others = others
                pooled = pool(value) if pooled is None else pooled
                value = pooled
            for layer in others:
                value = layer(value)
            raw.append(value)
        stacked = torch.stack(raw, dim=1).flatten(1, 2)
    std = norm.std
    if norm.filter_type == "channel":
        std = torch.cat([branch[-1].std for branch in layers])
    filters = filter_norm(stacked, count * norm.in_channels, norm.filter_type, std)
    return filters.unflatten(1, (count, -1))


def _share_one_norm(layers: list[list[nn.Module]], x: Tensor, taps: int) -> bool:
    """Whether one call can take the place of the FilterNorms that end all these branches."""
    if type(x) not in (Tensor, nn.Parameter) or min(map(len, layers)) < 2:
        return False
    at, first = Placement.of(x), layers[0][-1]
    return type(first) is FilterNorm and all(
        is_filter_norm(norm, at, first.in_channels, first.filter_type, taps)
        and (norm.filter_type == "channel" or norm.std == first.std)
        and all(
            is_unmodified(layer, nn.Conv2d)
            or is_unmodified(layer, nn.ReLU)
            or is_global_pooling(layer)
            for layer in others
        )
        for *others, norm in layers
    )


def _convolve_together(layers: list[list[nn.Module]], inputs: list[Tensor]) -> Tensor | None:
    """What the branches' convolutions make of the input that they share, depthwise and 1x1 of all
    in one pass: ``Tensor[B, branches * outputs, H, W]``; ``None`` where that is not possible."""
    x = inputs[0]
    if (
        torch.is_grad_enabled()
        or x.device.type != "cpu"
        or any(value is not x for value in inputs)
        or not library.serves(x)
        or any(len(convs) != 2 for convs in layers)
    ):
        return None
    depthwise, pointwise = zip(*layers, strict=True)
    channels, size = x.shape[1], getattr(depthwise[0], "kernel_size", (0,))[0]
    outputs = getattr(pointwise[0], "out_channels", 0)
    at = Placement.of(x)
    if not all(
        size % 2
        and is_conv(spread, at, (channels, 1, size, size), 1, size // 2, channels)
        and is_conv(mix, at, (outputs, channels, 1, 1))
        for spread, mix in layers
    ):
        return None
    tensors = library.autocast_inputs(
        x,
        torch.cat([conv.weight for conv in depthwise]),
        torch.cat([conv.bias for conv in depthwise]),
        torch.cat([conv.weight for conv in pointwise]),
        torch.cat([conv.bias for conv in pointwise]),
    )
    return torch.ops.ddf_mm.depthwise_pointwise(*tensors)


# torch.fx records it as one call: it goes by sizes, which are there only when the graph runs.
@torch.fx.wrap
def _guides(
    x: Tensor, joint_x: Tensor | None, scale_factor: int, joint_channels: int
) -> list[Tensor]:
    """What each spatial branch of a DDFUpPack reads, in the order of the branches."""
    s = scale_factor
    if joint_x is None:
        channels = shape_of(x)[1]
        if joint_channels != channels:
            raise ValueError(
                f"joint_x must be given, a guidance of {joint_channels} channels, since "
                f"joint_channels is {joint_channels} and in_channels {channels}"
            )
        joint_x = x
        is_eager = not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        if is_eager and x.device.type == "cpu" and not torch.is_grad_enabled():
            # oneDNN takes half as long for depthwise convolutions of this layout, and all
            # branches share the copy.
            joint_x = x.contiguous(memory_format=torch.channels_last)
    batch, _, height, width = shape_of(x)
    given = shape_of(joint_x)
    own = (batch, joint_channels, height, width)
    upsampled = (batch, joint_channels, s * height, s * width)
    if given == own:
        return [joint_x] * s**2
    if given == upsampled:
        return [joint_x[:, :, p::s, q::s] for p in range(s) for q in range(s)]
    raise ValueError(
        f"joint_x must be a Tensor[B, joint_channels, H, W] = {list(own)} or, of the "
        f"upsampled size, {list(upsampled)}, got shape {list(given)}"
    )


@MODELS.register_module("DDFUp")
class DDFUpPack(BaseModule):
    """DDF upsampling: one pair of filter branches for each of the scale_factor**2 subpixels.

    Registered as the upsample layer ``DDFUp`` (``build_upsample_layer(dict(type='DDFUp', …))``).
    Arguments and parameter names are those of the official layer (theFoxofSky/ddfnet,
    ddf/ddf.py), which could not run: its combination argument was misplaced, ``joint_channels``
    had no effect, and any ``dw_kernel_size`` other than ``kernel_size`` changed the size.

    Args:
        in_channels: channels C of the input and output.
        kernel_size: k, odd, at least 3.
        scale_factor: factor of upsampling.
        dilation: distance between neighbouring taps.
        head: filter groups. Divides C.
        se_ratio: width of the channel branches' bottleneck over C.
        nonlinearity: what follows the layer; sets FilterNorm's scale.
        dw_kernel_size: odd size of the depthwise convolution before each spatial branch's 1x1
            convolution; there is none with ``joint_channels``.
        joint_channels: channels of the guidance that the spatial branches read; less than 1
            means that they read the features, or a guidance of C channels.
        kernel_combine: ``'mul'`` or ``'add'``.
        init_cfg: mmengine's initialization config.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> up = DDFUpPack(64, joint_channels=3)
        >>> up(torch.randn(2, 64, 25, 19), torch.randn(2, 3, 50, 38)).shape
        torch.Size([2, 64, 50, 38])
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int = 3,
        scale_factor: int = 2,
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
        scale_factor = check_int("scale_factor", scale_factor, 1)
        dw_kernel_size = check_kernel_size(dw_kernel_size, "dw_kernel_size")
        joint_channels = check_int("joint_channels", joint_channels)
        self.in_channels = in_channels
        self.kernel_size = kernel_size
        self.scale_factor = scale_factor
        self.dilation = dilation
        self.head = head
        self.joint_channels = joint_channels if joint_channels >= 1 else in_channels
        self.kernel_combine = kernel_combine

        self.spatial_branch = nn.ModuleList()
        self.channel_branch = nn.ModuleList()
        for _ in range(scale_factor**2):
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
        """Starts the branches as the official layer does, which is PyTorch's own way.

        An ``init_cfg`` of this layer itself has the last word.
        """
        if not self.is_init:
            _reset_branches(self)
        self.init_cfg = name_pretrained(self.init_cfg)
        super().init_weights()

    def forward(self, x: Tensor, joint_x: Tensor | None = None) -> Tensor:
        """Upsamples the features.

        Args:
            x: ``Tensor[B, C, H, W]``; or a single image, ``Tensor[C, H, W]``, and a guidance of
                one.
            joint_x: guidance, ``Tensor[B, joint_channels, H, W]``, read alike by every branch;
                or ``Tensor[B, joint_channels, s*H, s*W]``, of which the branch of subpixel
                (p, q) reads the pixels (s*i + p, s*j + q), those it writes. ``None`` means x.

        Returns:
            ``Tensor[B, C, s*H, s*W]``.

        Raises:
            TypeError, ValueError: features or a guidance of another type or shape.
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

        Branches that nobody modified share one pooling of x and one normalization.

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
        guides = _guides(x, joint_x, self.scale_factor, self.joint_channels)
        channel_filter = _stack_filters(self.channel_branch, [x] * count, k)
        return (
            channel_filter.reshape(-1, count, self.in_channels, k, k),
            _stack_filters(self.spatial_branch, [guides[r] for r in range(count)], k),
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size}, "
            f"scale_factor={self.scale_factor}, dilation={self.dilation}, head={self.head}, "
            f"joint_channels={self.joint_channels}, kernel_combine={self.kernel_combine!r}"
        )
