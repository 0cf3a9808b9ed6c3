"""DDFPack and DDFUpPack: the operation with the branches that generate its filters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ddf_mm.layers.filter_norm import FilterNorm
from ddf_mm.layers.fused import PackOptions, PackWeights, fused_pack
from ddf_mm.ops import ddf, ddf_up, filter_norm, library
from ddf_mm.ops.checks import check_combine, check_int, check_kernel_size

# torch.fx records the operations as one call each instead of tracing through its argument checks
# (mmengine's `efficient_conv_bn_eval` traces models).
torch.fx.wrap("ddf")
torch.fx.wrap("ddf_up")


def _reset_branches(pack: nn.Module) -> None:
    """Starts the filter branches anew, whatever an enclosing module's ``init_cfg`` did to them."""
    for module in pack.modules():
        if isinstance(module, (nn.Conv2d, FilterNorm)):
            module.reset_parameters()


def _check_pack_arguments(
    in_channels: int, kernel_size: int, dilation: int, head: int, se_ratio: float, combine: str
) -> None:
    check_int("in_channels", in_channels, 1)
    check_kernel_size(kernel_size, minimum=3)
    check_int("dilation", dilation, 1)
    check_int("head", head, 1)
    if in_channels % head:
        raise ValueError(
            f"head must divide in_channels, got head {head}, in_channels {in_channels}"
        )
    if not se_ratio > 0:
        raise ValueError(f"se_ratio must be positive, got {se_ratio}")
    check_combine(combine)


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
        nn.ReLU(inplace=True),
        nn.Conv2d(mid_channels, in_channels * kernel_size**2, 1),
        FilterNorm(in_channels, kernel_size, "channel", nonlinearity, running_std=True),
    )


_SPATIAL_TYPES = (nn.Conv2d, FilterNorm)
_CHANNEL_TYPES = (nn.AdaptiveAvgPool2d, nn.Conv2d, nn.ReLU, nn.Conv2d, FilterNorm)


def _are_plain(branch: nn.Module, types: tuple[type, ...]) -> bool:
    """Whether a branch is still made of modules of just these types, without hooks."""
    modules = (branch, *branch._modules.values())
    return tuple(map(type, modules)) == (nn.Sequential, *types) and not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


class Shift(nn.Module):
    """Adds one value a channel, then optionally applies ReLU: what is left of a folded norm.

    Args:
        bias: ``Tensor[C]``.
        relu: whether ReLU follows.
    """

    def __init__(self, bias: Tensor, relu: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """``Tensor[B, C, H, W]`` -> a tensor of the same shape and dtype."""
        out = x + self.bias.to(x.dtype)[:, None, None]
        return out.relu_() if self.relu else out

    def extra_repr(self) -> str:
        return f"{self.bias.numel()}, relu={self.relu}"


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
        _check_pack_arguments(in_channels, kernel_size, dilation, head, se_ratio, kernel_combine)
        check_int("stride", stride, 1)
        self.in_channels = in_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.head = head
        self.kernel_combine = kernel_combine
        self._filter_arguments = (kernel_size, dilation, stride, kernel_combine)
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
        _reset_branches(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        super().init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """``Tensor[B, C, H, W]`` -> ``Tensor[B, C, ceil(H/stride), ceil(W/stride)]``."""
        if self._can_fuse(x):
            if type(self.output) is Shift and not torch.is_grad_enabled():
                return fused_pack(x, *self._fused_arguments(), self.output.bias, self.output.relu)
            out = fused_pack(x, *self._fused_arguments())
        else:
            out = ddf(x, *self.generate_filters(x), *self._filter_arguments)
        return self.output(out)

    def _can_fuse(self, x: Tensor) -> bool:
        """Whether one function may stand for the branches: none of them is traced, watched by a
        hook or replaced, and x is what they would take."""
        return (
            type(x) in (Tensor, nn.Parameter)
            and x.dim() == 4
            and x.shape[1] == self.in_channels
            and x.numel() > 0
            and library.serves(x)
            and (
                x.dtype == self.spatial_branch[0].weight.dtype
                or torch.is_autocast_enabled(x.device.type)
            )
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and _are_plain(self.spatial_branch, _SPATIAL_TYPES)
            and _are_plain(self.channel_branch, _CHANNEL_TYPES)
        )

    def _fused_arguments(self) -> tuple[PackWeights, PackOptions]:
        spatial, spatial_norm = self.spatial_branch
        _, squeeze, _, expand, channel_norm = self.channel_branch
        convolutions = (p for m in (spatial, squeeze, expand) for p in (m.weight, m.bias))
        options = PackOptions(*self._filter_arguments, self.head, spatial_norm.std)
        return PackWeights(*convolutions, channel_norm.std), options

    def generate_filters(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The filters that the layer applies to features ``Tensor[B, C, H, W]``.

        Returns:
            The channel filters ``Tensor[B, C, k, k]`` and the spatial filters
            ``Tensor[B, head*k*k, ceil(H/stride), ceil(W/stride)]``, as :func:`~ddf_mm.ops.ddf`
            takes them.
        """
        k = self._filter_arguments[0]
        channel_filter = self.channel_branch(x).unflatten(1, (self.in_channels, k, k))
        return channel_filter, self.spatial_branch(x)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, head={self.head}, kernel_combine={self.kernel_combine!r}"
        )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _layers(branch: nn.Module) -> list[nn.Module]:
    """The layers of nested ``nn.Sequential``, in order."""
    if type(branch) is not nn.Sequential:
        return [branch]
    return [layer for part in branch for layer in _layers(part)]


def _share_one_norm(branches: nn.ModuleList) -> bool:
    """Whether one call can normalize for all: their FilterNorms are alike and nobody watches."""
    norms = [_layers(branch)[-1] for branch in branches]
    if any(type(norm) is not FilterNorm or norm.running_mean for norm in norms):
        return False
    skipped = [m for branch in branches for m in branch.modules() if type(m) is nn.Sequential]
    if any(map(_has_hooks, norms + skipped)):
        return False
    kinds = {(n.in_channels, n.filter_type, n.running_std or n.std) for n in norms}
    return len(kinds) == 1


def _is_plain_conv(conv: nn.Module, groups: int, size: int) -> bool:
    """Whether this is an unwatched convolution that keeps the size, with square windows."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (size, size)
        and conv.groups == groups
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding == (size // 2, size // 2)
        and conv.padding_mode == "zeros"
        and not _has_hooks(conv)
    )


def _convolve_together(branches: nn.ModuleList, inputs: list[Tensor]) -> Tensor | None:
    """What the branches' convolutions make of the input that they share, depthwise and 1x1 of all
    in one pass: ``Tensor[B, branches * outputs, H, W]``; ``None`` where that is not possible."""
    x = inputs[0]
    if (
        torch.is_grad_enabled()
        or x.device.type != "cpu"
        or any(value is not x for value in inputs)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not library.serves(x)
    ):
        return None
    layers = [_layers(branch)[:-1] for branch in branches]
    if any(len(convs) != 2 for convs in layers):
        return None
    depthwise, pointwise = zip(*layers, strict=True)
    channels, size = x.shape[1], getattr(depthwise[0], "kernel_size", (0,))[0]
    if not size % 2 or not all(
        _is_plain_conv(spread, channels, size)
        and _is_plain_conv(mixed, 1, 1)
        and spread.in_channels == spread.out_channels == mixed.in_channels
        and mixed.out_channels == pointwise[0].out_channels
        for spread, mixed in layers
    ):
        return None

    def together(convs: tuple[nn.Conv2d, ...]) -> tuple[Tensor, Tensor | None]:
        if all(conv.bias is None for conv in convs):
            return torch.cat([conv.weight for conv in convs]), None
        biases = [c.weight.new_zeros(c.out_channels) if c.bias is None else c.bias for c in convs]
        return torch.cat([conv.weight for conv in convs]), torch.cat(biases)

    tensors = library.autocast_inputs(x, *together(depthwise), *together(pointwise))
    if any(t is not None and t.dtype != tensors[0].dtype for t in tensors):
        return None  # the convolutions themselves tell
    return torch.ops.ddf_mm.depthwise_pointwise(*tensors)


def _stack_filters(branches: nn.ModuleList, inputs: list[Tensor]) -> Tensor:
    """The filters that the branches make of one input each: ``Tensor[B, branches, …]``."""
    if not _share_one_norm(branches):
        return torch.stack([f(x) for f, x in zip(branches, inputs, strict=True)], dim=1)
    norm, count = _layers(branches[0])[-1], len(branches)
    stacked = _convolve_together(branches, inputs)
    if stacked is None:
        raw = []
        for branch, value in zip(branches, inputs, strict=True):
            for layer in _layers(branch)[:-1]:
                value = layer(value)
            raw.append(value)
        stacked = torch.stack(raw, dim=1).flatten(1, 2)
    std = norm.std
    if norm.running_std:
        std = torch.cat([_layers(branch)[-1].std for branch in branches])
    filters = filter_norm(stacked, count * norm.in_channels, norm.filter_type, std)
    return filters.unflatten(1, (count, -1))


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
        _check_pack_arguments(in_channels, kernel_size, dilation, head, se_ratio, kernel_combine)
        check_int("scale_factor", scale_factor, 1)
        check_kernel_size(dw_kernel_size, "dw_kernel_size")
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
        _reset_branches(self)
        super().init_weights()

    def forward(self, x: Tensor, joint_x: Tensor | None = None) -> Tensor:
        """Upsamples the features.

        Args:
            x: ``Tensor[B, C, H, W]``.
            joint_x: guidance, ``Tensor[B, joint_channels, H, W]``, read alike by every branch;
                or ``Tensor[B, joint_channels, s*H, s*W]``, of which the branch of subpixel
                (p, q) reads the pixels (s*i + p, s*j + q), those it writes. ``None`` means x.

        Returns:
            ``Tensor[B, C, s*H, s*W]``.

        Raises:
            ValueError: a guidance of another shape.
        """
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

        The branches share one pooling of x and, where their FilterNorms have no hooks, one
        normalization.

        Returns:
            The channel filters ``Tensor[B, s*s, C, k, k]`` and the spatial filters
            ``Tensor[B, s*s, head*k*k, H, W]``, as :func:`~ddf_mm.ops.ddf_up` takes them.
        """
        k = self.kernel_size
        guides = self._guides(x, joint_x)
        # Pooled once for all: the branches' own pooling leaves one pixel as it is.
        pooled = [F.adaptive_avg_pool2d(x, 1)] * len(self.channel_branch)
        channel_filter = _stack_filters(self.channel_branch, pooled)
        return (
            channel_filter.unflatten(2, (self.in_channels, k, k)),
            _stack_filters(self.spatial_branch, guides),
        )

    def _guides(self, x: Tensor, joint_x: Tensor | None) -> list[Tensor]:
        """What each spatial branch reads, in the order of the branches."""
        s = self.scale_factor
        if joint_x is None:
            joint_x = x
            is_eager = not (torch.compiler.is_compiling() or torch.jit.is_tracing())
            if is_eager and x.device.type == "cpu" and not torch.is_grad_enabled():
                # oneDNN takes half as long for depthwise convolutions of this layout, and all
                # branches share the copy.
                joint_x = x.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = x.shape
        own = (batch, self.joint_channels, height, width)
        upsampled = (batch, self.joint_channels, s * height, s * width)
        if tuple(joint_x.shape) == own:
            return [joint_x] * s**2
        if tuple(joint_x.shape) == upsampled:
            return [joint_x[:, :, p::s, q::s] for p in range(s) for q in range(s)]
        raise ValueError(
            f"joint_x must be a Tensor[B, joint_channels, H, W] = {list(own)} or, of the "
            f"upsampled size, {list(upsampled)}, got shape {list(joint_x.shape)}"
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size}, "
            f"scale_factor={self.scale_factor}, dilation={self.dilation}, head={self.head}, "
            f"joint_channels={self.joint_channels}, kernel_combine={self.kernel_combine!r}"
        )
