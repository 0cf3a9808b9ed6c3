"""Feature pyramid whose top-down path upsamples with DDF-Up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule, ModuleList
from mmengine.registry import MODELS
from torch import Tensor, nn

from ddf_mm.layers import DDFUpPack
from ddf_mm.ops.checks import check_dict, check_int, check_ints, check_sequence, shape_of
from ddf_mm.registry import name_pretrained

EXTRA_CONVS_SOURCES = ("on_input", "on_lateral", "on_output")
# Arguments of its upsamplers that DDFUpFPN sets.
_OWN_UPSAMPLE_ARGUMENTS = ("in_channels", "scale_factor", "joint_channels")

# torch < 2.7 has only is_compiling, which is also true for torch.compile.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


@MODELS.register_module()
class DDFUpFPN(BaseModule):
    """FPN (arXiv 1612.03144) with :class:`~ddf_mm.layers.DDFUpPack` in its top-down path.

    Has the arguments and parameter names of mmdet's and mmseg's FPN, so that their checkpoints
    load; only ``upsample_modules`` is new. Needs mmengine and mmcv only.

    A level may have any size that results from striding the one below it. The upsampled features
    are cropped to the lateral if its size is not a multiple of the scale factor. If a stride
    without padding rounded the size down, the features are first padded by repeating their border.

    Args:
        in_channels: channels of each input, finest first.
        out_channels: channels of every output.
        num_outs: number of outputs.
        start_level: first input that is used.
        end_level: last input that is used, -1 for the last one. In mmseg's FPN it is the input
            after it; ``num_outs`` decides which is meant. Extra outputs need the last input.
        add_extra_convs: compute the outputs beyond the inputs by strided convolutions of the last
            input (``'on_input'``, or ``True``), lateral (``'on_lateral'``) or output
            (``'on_output'``); ``False``: by max pooling of the last output.
        relu_before_extra_convs: apply ReLU before each extra convolution except the first.
        no_norm_on_lateral: no norm after the lateral convolutions.
        conv_cfg: config of the convolutions.
        norm_cfg: config of the norm layers.
        act_cfg: config of the activation after each convolution.
        upsample_cfg: further arguments of DDFUpPack, for example
            ``dict(kernel_combine='add', head=4)``.
        init_cfg: mmengine's initialization config. The upsamplers have their own initialization.
        scale_factor: ratio of the sizes of adjacent levels, finest first; an int for all.
        guidance: predict the spatial filters of an upsampler from the lateral that its result is
            added to, those of a subpixel from its own pixels, instead of from the features that it
            upsamples.
        extra_convs_on_inputs: the name of mmseg's FPN for the meaning of
            ``add_extra_convs=True``: on the input or, if ``False``, on the output.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> neck = DDFUpFPN([8, 16, 32], 4, num_outs=4, guidance=True)
        >>> sizes = [(8, 25, 39), (16, 13, 20), (32, 7, 10)]
        >>> [tuple(x.shape) for x in neck([torch.randn(2, *size) for size in sizes])]
        [(2, 4, 25, 39), (2, 4, 13, 20), (2, 4, 7, 10), (2, 4, 4, 5)]
    """

    init_cfg: dict | list[dict] | None

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int = 0,
        end_level: int = -1,
        add_extra_convs: bool | str = False,
        relu_before_extra_convs: bool = False,
        no_norm_on_lateral: bool = False,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        upsample_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = dict(  # noqa: B006
            type="Xavier", layer="Conv2d", distribution="uniform"
        ),
        *,
        scale_factor: int | Sequence[int] = 2,
        guidance: bool = False,
        extra_convs_on_inputs: bool = True,
    ) -> None:
        super().__init__(init_cfg)
        in_channels = check_ints("in_channels", in_channels, "the channels of each input", 1)
        out_channels = check_int("out_channels", out_channels, 1)
        num_outs = check_int("num_outs", num_outs, 1)
        start_level = check_int("start_level", start_level, 0)
        end_level = check_int("end_level", end_level, -1)
        for name, cfg in dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg, act_cfg=act_cfg).items():
            check_dict(name, cfg, "the config of a layer")
        check_dict("upsample_cfg", upsample_cfg, "of arguments of DDFUpPack")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_ins = len(in_channels)
        self.num_outs = num_outs
        self.start_level = start_level
        self.end_level = end_level
        self.backbone_end_level = _end(self.num_ins, num_outs, start_level, end_level)
        self.relu_before_extra_convs = relu_before_extra_convs
        self.no_norm_on_lateral = no_norm_on_lateral
        if add_extra_convs is True:
            add_extra_convs = "on_input" if extra_convs_on_inputs else "on_output"
        if add_extra_convs is not False and add_extra_convs not in EXTRA_CONVS_SOURCES:
            raise ValueError(
                f"add_extra_convs must be a bool or one of {EXTRA_CONVS_SOURCES}, got "
                f"{add_extra_convs!r}"
            )
        self.add_extra_convs = add_extra_convs
        self.guidance = guidance

        levels = range(start_level, self.backbone_end_level)
        common: dict[str, Any] = dict(conv_cfg=conv_cfg, act_cfg=act_cfg, inplace=False)
        # Plain ModuleLists, as in FPN: in mmengine's each ConvModule would initialize itself after
        # this module's init_cfg and overwrite it.
        self.lateral_convs = nn.ModuleList(
            ConvModule(
                in_channels[i],
                out_channels,
                1,
                norm_cfg=None if no_norm_on_lateral else norm_cfg,
                **common,
            )
            for i in levels
        )
        common.update(norm_cfg=norm_cfg, padding=1)
        self.fpn_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3, **common) for _ in levels
        )
        if add_extra_convs:
            for i in range(num_outs - len(levels)):
                on_input = i == 0 and add_extra_convs == "on_input"
                channels = in_channels[self.backbone_end_level - 1] if on_input else out_channels
                self.fpn_convs.append(ConvModule(channels, out_channels, 3, stride=2, **common))

        upsample_cfg = dict(upsample_cfg or {})
        if unfit := [name for name in (*_OWN_UPSAMPLE_ARGUMENTS, "mode") if name in upsample_cfg]:
            raise ValueError(
                "upsample_cfg holds further arguments of DDFUpPack, got "
                f"{', '.join(unfit)}; scale_factor and guidance are arguments of DDFUpFPN itself"
            )
        # mmengine's ModuleList, so that the upsamplers initialize themselves after init_cfg.
        self.upsample_modules = ModuleList(
            DDFUpPack(
                out_channels,
                scale_factor=factor,
                joint_channels=out_channels if guidance else -1,
                **upsample_cfg,
            )
            for factor in _scale_factors(scale_factor, len(levels) - 1)
        )

    def init_weights(self) -> None:
        """Applies ``init_cfg``, then initializes the upsamplers; loads pretrained weights last."""
        self.init_cfg = name_pretrained(self.init_cfg)
        super().init_weights()

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Builds the pyramid.

        Args:
            inputs: one ``Tensor[B, in_channels[i], H_i, W_i]`` per level, finest first.

        Returns:
            ``num_outs`` tensors of ``out_channels`` channels, the first ones of the sizes of the
            used inputs.

        Raises:
            ValueError: a wrong number of inputs, or sizes that do not match ``scale_factor``.
        """
        levels = range(self.start_level, self.backbone_end_level)
        inputs = _check_inputs(inputs, self.in_channels, levels)
        used = [inputs[i] for i in levels]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, used, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + self._upsample(i, laterals[i], laterals[i - 1])

        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=False)]
        if self.add_extra_convs and self.num_outs > len(outs):
            sources = dict(on_input=used[-1], on_lateral=laterals[-1], on_output=outs[-1])
            outs.append(self.fpn_convs[len(outs)](sources[self.add_extra_convs]))
        while len(outs) < self.num_outs:
            if not self.add_extra_convs:
                # FPN's max pooling with kernel 1; as pooling, torch.export would restrict the sizes
                # to even or odd ones.
                outs.append(outs[-1][:, :, ::2, ::2])
                continue
            x = F.relu(outs[-1]) if self.relu_before_extra_convs else outs[-1]
            outs.append(self.fpn_convs[len(outs)](x))
        return tuple(outs)

    def _upsample(self, i: int, x: Tensor, lateral: Tensor) -> Tensor:
        """Upsamples used level ``i`` to the size of the lateral below it."""
        upsample, level = self.upsample_modules[i - 1], self.start_level + i
        x, joint_x = _align(x, lateral, upsample.scale_factor, self.guidance, level)
        return _crop(upsample(x, joint_x if self.guidance else None), lateral)


# torch.fx records each of these functions as one call, since they depend on sizes.
@torch.fx.wrap
def _check_inputs(
    inputs: Sequence[Tensor], in_channels: Sequence[int], levels: range
) -> Sequence[Tensor]:
    """The inputs; raises unless those of ``levels`` have the channels that forward needs."""
    check_sequence("inputs", inputs, "a tensor for each of in_channels")
    if len(inputs) != len(in_channels):
        raise ValueError(
            f"inputs must hold a tensor for each of in_channels, {len(in_channels)}, got "
            f"{len(inputs)}"
        )
    for i in levels:
        x = inputs[i]
        if isinstance(x, torch.fx.Proxy):  # of a backbone in the same graph
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs[{i}] must be a torch.Tensor, got {type(x).__name__}")
        shape = shape_of(x)
        if len(shape) != 4 or shape[1] != in_channels[i]:
            raise ValueError(
                f"inputs[{i}] must be a Tensor[B, {in_channels[i]}, H, W], got shape {list(shape)}"
            )
    return inputs


@torch.fx.wrap
def _align(
    x: Tensor, lateral: Tensor, s: int, guidance: bool, level: int
) -> tuple[Tensor, Tensor | None]:
    """The features of a level, padded so that ``s`` times their size covers the lateral below it,
    and with ``guidance`` that lateral, padded to exactly this size."""
    (height, width), given = shape_of(lateral)[2:], shape_of(x)[2:]
    rows, columns = (height - 1) // s + 1, (width - 1) // s + 1
    missing = (rows - given[0], columns - given[1])
    # Strided layers round sizes up with padding, down without.
    if not all(
        0 <= m <= min(1, size % s) for m, size in zip(missing, (height, width), strict=True)
    ):
        raise ValueError(
            f"scale_factor {s} does not fit inputs {level - 1} and {level}, of sizes "
            f"{height} x {width} and {given[0]} x {given[1]}: give scale_factor as a list "
            "of the ratios of adjacent levels, finest first"
        )
    if torch.jit.is_tracing():
        # The padding depends on the size: add the maximum and crop.
        rows, columns = ((size - 1) // s + 1 for size in lateral.shape[2:])
        x = F.pad(x, (0, 1, 0, 1), mode="replicate")[:, :, :rows, :columns]
        if guidance:
            padded = F.pad(lateral, (0, s - 1, 0, s - 1))
            return x, padded[:, :, : rows * s, : columns * s]
        return x, None
    if any(missing):
        x = F.pad(x, (0, missing[1], 0, missing[0]), mode="replicate")
    if not guidance:
        return x, None
    # The padding's values affect only pixels that are cropped.
    if _is_exporting():
        return x, _fit(lateral, rows * s, columns * s)
    excess = (rows * s - height, columns * s - width)
    return x, F.pad(lateral, (0, excess[1], 0, excess[0])) if any(excess) else lateral


@torch.fx.wrap
def _crop(x: Tensor, lateral: Tensor) -> Tensor:
    """Crops upsampled features to the size of the lateral."""
    height, width = lateral.shape[2:]
    # torch.export would restrict padding and the strides of a crop to even or odd sizes.
    return _fit(x, height, width) if _is_exporting() else x[:, :, :height, :width]


def _fit(x: Tensor, height: int, width: int) -> Tensor:
    """Crops ``Tensor[B, C, H, W]`` to a size, or repeats its last row and column up to it."""
    for dim, size in ((2, height), (3, width)):
        x = x.index_select(dim, torch.arange(size, device=x.device).clamp(max=x.shape[dim] - 1))
    return x


def _end(num_ins: int, num_outs: int, start_level: int, end_level: int) -> int:
    """The index after the last used input; checks the numbers of levels."""
    if end_level == -1:
        end = num_ins
    else:
        # In mmdet's FPN it is the last level, in mmseg's the one after it; neither accepts the
        # numbers of outputs that the other does.
        end = end_level if num_outs == end_level - start_level else end_level + 1
    if not start_level < end <= num_ins:
        raise ValueError(
            f"start_level and end_level must leave levels of the {num_ins} inputs, got "
            f"start_level {start_level}, end_level {end_level}"
        )
    levels = end - start_level
    if num_outs < levels or (end < num_ins and num_outs > levels):
        needed = f"at least {levels}" if end == num_ins else f"{levels}"
        raise ValueError(
            f"num_outs must be {needed} for {num_ins} inputs, start_level {start_level} and "
            f"end_level {end_level}, got {num_outs}"
        )
    return end


def _scale_factors(scale_factor: int | Sequence[int], steps: int) -> list[int]:
    """The scale factors between adjacent used levels."""
    if not isinstance(scale_factor, Sequence):
        return [check_int("scale_factor", scale_factor, 1)] * steps
    factors = check_ints("scale_factor", scale_factor, "or an int", 1)
    if len(factors) != steps:
        raise ValueError(
            "scale_factor must be an int or have one value for each two adjacent levels that "
            f"are used, {steps}, got {scale_factor!r}"
        )
    return factors
