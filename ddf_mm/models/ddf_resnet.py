"""ResNet with decoupled dynamic filters in place of its 3x3 convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.utils.checkpoint as cp
from mmcv.cnn import (
    build_activation_layer,
    build_conv_layer,
    build_norm_layer,
    build_plugin_layer,
)
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule, Sequential, constant_init
from mmengine.registry import MODELS
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from ddf_mm.layers import DDFPack, Involution, switch_to_deploy
from ddf_mm.layers.unmodified import is_unmodified
from ddf_mm.ops.checks import check_dict, check_int, check_ints, check_number, check_sequence
from ddf_mm.registry import name_pretrained

PLUGIN_POSITIONS = ("after_conv1", "after_conv2", "after_conv3")


class DDFBottleneck(BaseModule):
    """Bottleneck block of ResNet whose 3x3 convolution is a :class:`DDFPack`.

    Parameters have the names of the Bottleneck of mmpretrain, mmdet and mmseg, and within
    ``conv2`` those of DDFPack.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, a multiple of ``expansion``.
        expansion: out_channels over the channels of ``conv2``.
        stride: stride of the block.
        dilation: dilation of ``conv2``.
        downsample: module of the identity branch.
        style: ``'pytorch'`` puts the stride on ``conv2``, ``'caffe'`` on ``conv1``.
        with_cp: recompute activations in the backward pass to save memory.
        conv_cfg: config of the 1x1 convolutions, and of the 3x3 one if ``ddf_cfg`` is None.
        norm_cfg: config of the norm layers.
        act_cfg: config of the activation.
        drop_path_rate: probability of dropping the residual branch.
        ddf_cfg: arguments of DDFPack, or ``None`` for an ordinary convolution.
        dcn: config of another conv layer for ``conv2`` (if ``ddf_cfg`` is None).
        plugins: configs ``dict(cfg=…, position='after_conv1' | 'after_conv2' | 'after_conv3')``.
        zero_init_residual: initialize the last norm with zero.
        init_cfg: mmengine's initialization config.
        involution: arguments of :class:`~ddf_mm.layers.Involution` for ``conv2``, in place of DDF.
    """

    expansion = 4
    init_cfg: dict | list[dict] | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int = 4,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        style: str = "pytorch",
        with_cp: bool = False,
        conv_cfg: dict | None = None,
        norm_cfg: dict = dict(type="BN"),  # noqa: B006
        act_cfg: dict = dict(type="ReLU", inplace=True),  # noqa: B006
        drop_path_rate: float = 0.0,
        ddf_cfg: dict | None = dict(),  # noqa: B006
        dcn: dict | None = None,
        plugins: Sequence[dict] | None = None,
        zero_init_residual: bool = False,
        init_cfg: dict | list[dict] | None = None,
        involution: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        in_channels = check_int("in_channels", in_channels, 1)
        out_channels = check_int("out_channels", out_channels, 1)
        expansion = check_int("expansion", expansion, 1)
        stride = check_int("stride", stride, 1)
        dilation = check_int("dilation", dilation, 1)
        _check_style(style)
        if out_channels % expansion:
            raise ValueError(
                f"out_channels must be a multiple of expansion {expansion}, got {out_channels}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.expansion = expansion
        self.mid_channels = out_channels // expansion
        self.stride = stride
        self.dilation = dilation
        self.style = style
        self.with_cp = with_cp
        self.zero_init_residual = zero_init_residual
        self.conv1_stride, self.conv2_stride = (1, stride) if style == "pytorch" else (stride, 1)

        self.norm1_name, norm1 = build_norm_layer(norm_cfg, self.mid_channels, postfix=1)
        self.norm2_name, norm2 = build_norm_layer(norm_cfg, self.mid_channels, postfix=2)
        self.norm3_name, norm3 = build_norm_layer(norm_cfg, out_channels, postfix=3)

        self.conv1 = build_conv_layer(
            conv_cfg,
            in_channels,
            self.mid_channels,
            kernel_size=1,
            stride=self.conv1_stride,
            bias=False,
        )
        self.add_module(self.norm1_name, norm1)
        if ddf_cfg is not None and involution is not None:
            self.conv2 = Involution(
                self.mid_channels, stride=self.conv2_stride, dilation=dilation, **involution
            )
        elif ddf_cfg is not None:
            self.conv2 = DDFPack(
                self.mid_channels, stride=self.conv2_stride, dilation=dilation, **ddf_cfg
            )
        else:
            self.conv2 = build_conv_layer(
                conv_cfg if dcn is None else dcn,
                self.mid_channels,
                self.mid_channels,
                kernel_size=3,
                stride=self.conv2_stride,
                padding=dilation,
                dilation=dilation,
                bias=False,
            )
        self.add_module(self.norm2_name, norm2)
        self.conv3 = build_conv_layer(
            conv_cfg, self.mid_channels, out_channels, kernel_size=1, bias=False
        )
        self.add_module(self.norm3_name, norm3)

        self.relu = build_activation_layer(act_cfg)
        self.downsample = downsample
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self._plugin_names: dict[str, list[str]] = {p: [] for p in PLUGIN_POSITIONS}
        for plugin in _check_plugins(plugins):
            self._add_plugin(plugin)

    def _add_plugin(self, plugin: dict) -> None:
        position = plugin["position"]
        cfg = dict(plugin["cfg"])
        channels = self.out_channels if position == "after_conv3" else self.mid_channels
        name, layer = build_plugin_layer(cfg, in_channels=channels, postfix=cfg.pop("postfix", ""))
        if hasattr(self, name):
            raise ValueError(
                f"plugins hold two layers named {name!r} in one block; give each its own "
                "'postfix' in its cfg"
            )
        self.add_module(name, layer)
        self._plugin_names[position].append(name)

    def init_weights(self) -> None:
        """Sets the last norm to zero with ``zero_init_residual``, then applies ``init_cfg``.

        Runs before the block, its stage or its network loads weights, so that it overwrites none.
        """
        if self.zero_init_residual and not self.is_init:
            constant_init(self.norm3, 0)
        self.init_cfg = name_pretrained(self.init_cfg)
        super().init_weights()

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    @property
    def norm2(self) -> nn.Module:
        return getattr(self, self.norm2_name)

    @property
    def norm3(self) -> nn.Module:
        return getattr(self, self.norm3_name)

    @property
    def relu_follows_pack(self) -> bool:
        """Whether ReLU follows ``conv2`` and its norm, for :func:`~ddf_mm.layers.fuse_ddf_bn`."""
        return is_unmodified(self, DDFBottleneck) and is_unmodified(self.relu, nn.ReLU)

    @property
    def _conv2_has_relu(self) -> bool:
        return isinstance(self.conv2, DDFPack) and getattr(self.conv2.output, "relu", False)

    def _apply_plugins(self, x: Tensor, position: str) -> Tensor:
        for name in self._plugin_names[position]:
            x = getattr(self, name)(x)
        return x

    def _residual_sum(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self._apply_plugins(out, "after_conv1")
        out = self.norm2(self.conv2(out))
        if not self._conv2_has_relu:
            out = self.relu(out)
        out = self._apply_plugins(out, "after_conv2")
        out = self.norm3(self.conv3(out))
        out = self._apply_plugins(out, "after_conv3")
        identity = x if self.downsample is None else self.downsample(x)
        return self.drop_path(out) + identity

    def forward(self, x: Tensor) -> Tensor:
        """``Tensor[B, in_channels, H, W]`` -> ``Tensor[B, out_channels, H/stride, W/stride]``."""
        if self.with_cp and x.requires_grad is True:  # in a torch.fx trace it is a Proxy
            out = cp.checkpoint(self._residual_sum, x, use_reentrant=False)
        else:
            out = self._residual_sum(x)
        return self.relu(out)


@MODELS.register_module()
class DDFResNet(BaseModule):
    """ResNet with DDF in place of the 3x3 convolutions of its bottlenecks (arXiv 2104.14107).

    Needs mmengine and mmcv only, and works as a backbone in mmpretrain, mmdet and mmseg: it accepts
    the ResNet arguments of all three and has their parameter names (with ``deep_stem`` those of
    mmdet and mmseg; checkpoints with mmpretrain's names load, too). With a linear head of 1000
    classes it has 16.84 M parameters at depth 50 and 28.15 M at depth 101.

    Args:
        depth: 26, 50, 101 or 152.
        in_channels: channels of the image.
        stem_channels: channels of the stem; ``None`` means ``base_channels``.
        base_channels: channels of ``conv2`` in the first stage.
        expansion: output channels of a block over the channels of its ``conv2``.
        num_stages: number of stages, 1 to 4.
        strides: stride of each stage's first block.
        dilations: dilation of each stage.
        out_indices: stages whose output is returned.
        style: ``'pytorch'`` puts a block's stride on ``conv2``, ``'caffe'`` on ``conv1``.
        deep_stem: three 3x3 convolutions in place of the 7x7 one.
        avg_down: average pooling in place of the stride of the downsampling 1x1 convolutions.
        frozen_stages: freeze parameters and statistics of the stages up to this one (0: the stem);
            -1 freezes none.
        conv_cfg: config of the ordinary convolutions.
        norm_cfg: config of the norm layers.
        norm_eval: batch norms use and keep their running statistics in training.
        with_cp: recompute activations in the backward pass to save memory.
        zero_init_residual: initialize each block's last norm with zero.
        contract_dilation: halve the dilation in the first block of a dilated stage.
        multi_grid: dilation of each block of the last stage.
        dcn: config of another conv layer for ``conv2``, for stages without DDF.
        stage_with_dcn: which stages use ``dcn``.
        plugins: configs ``dict(cfg=…, position=…, stages=(…))``, as in mmdet's ResNet.
        drop_path_rate: stochastic depth, growing linearly to this rate at the last block.
        kernel_combine: how the two filters of a DDF combine, ``'mul'`` or ``'add'``.
        head: filter groups of each DDF.
        kernel_size: window size of each DDF, odd.
        se_ratio: width of the channel branches' bottleneck over their channels.
        stage_with_ddf: which stages use DDF; the others have 3x3 convolutions.
        deploy: build the network as after :meth:`switch_to_deploy`, for checkpoints saved after it.
        pretrained: path of a checkpoint; older form of
            ``init_cfg=dict(type='Pretrained', checkpoint=…)``.
        init_cfg: mmengine's initialization config. By default kaiming normal (fan_out, relu), as
            in the official networks.
        involution: arguments of :class:`~ddf_mm.layers.Involution`, as ``dict(kernel_size=7)``; the
            stages with DDF then have involutions in its place, as the blocks of RedNet
            (arXiv 2103.06255), with their parameter names, and ``kernel_combine``, ``head``,
            ``kernel_size`` and ``se_ratio`` have no effect.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> backbone = DDFResNet(50, out_indices=(0, 1, 2, 3))
        >>> [tuple(x.shape) for x in backbone(torch.randn(1, 3, 65, 97))]
        [(1, 256, 17, 25), (1, 512, 9, 13), (1, 1024, 5, 7), (1, 2048, 3, 4)]
    """

    arch_settings = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
    init_cfg: dict | list[dict] | None

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        stem_channels: int | None = None,
        base_channels: int = 64,
        expansion: int | None = None,
        num_stages: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        out_indices: Sequence[int] = (3,),
        style: str = "pytorch",
        deep_stem: bool = False,
        avg_down: bool = False,
        frozen_stages: int = -1,
        conv_cfg: dict | None = None,
        norm_cfg: dict = dict(type="BN", requires_grad=True),  # noqa: B006
        norm_eval: bool = False,
        with_cp: bool = False,
        zero_init_residual: bool = True,
        contract_dilation: bool = False,
        multi_grid: Sequence[int] | None = None,
        dcn: dict | None = None,
        stage_with_dcn: Sequence[bool] = (False, False, False, False),
        plugins: Sequence[dict] | None = None,
        drop_path_rate: float = 0.0,
        kernel_combine: str = "mul",
        head: int = 1,
        kernel_size: int = 3,
        se_ratio: float = 0.2,
        stage_with_ddf: Sequence[bool] = (True, True, True, True),
        deploy: bool = False,
        pretrained: str | None = None,
        init_cfg: dict | list[dict] | None = None,
        involution: dict | None = None,
    ) -> None:
        if pretrained is not None and init_cfg is not None:
            raise ValueError(
                "pretrained and init_cfg are both given; give one of them (mmseg hands the "
                "model's pretrained on to the backbone: set model.pretrained=None)"
            )
        if pretrained is not None:
            if not isinstance(pretrained, str):
                raise TypeError(f"pretrained must be a path (str) or None, got {pretrained!r}")
            init_cfg = dict(type="Pretrained", checkpoint=pretrained)
        elif init_cfg is None:
            init_cfg = [
                dict(type="Kaiming", layer="Conv2d"),
                dict(type="Constant", val=1, layer=["_BatchNorm", "GroupNorm"]),
            ]
        super().__init__(init_cfg)

        depth = check_int("depth", depth)
        if depth not in self.arch_settings:
            raise ValueError(f"depth must be one of {list(self.arch_settings)}, got {depth!r}")
        num_stages = check_int("num_stages", num_stages)
        if num_stages not in (1, 2, 3, 4):
            raise ValueError(f"num_stages must be 1 to 4, got {num_stages!r}")
        in_channels = check_int("in_channels", in_channels, 1)
        base_channels = check_int("base_channels", base_channels, 1)
        if stem_channels is not None:
            stem_channels = check_int("stem_channels", stem_channels, 1)
        if expansion is not None:
            expansion = check_int("expansion", expansion, 1)
        strides = _ints_per_stage("strides", strides, num_stages)
        dilations = _ints_per_stage("dilations", dilations, num_stages)
        for name, chosen in (("ddf", stage_with_ddf), ("dcn", stage_with_dcn)):
            _check_per_stage(f"stage_with_{name}", chosen, num_stages, exact=False)
            if any(choice not in (True, False) for choice in chosen):
                raise TypeError(f"stage_with_{name} must hold bools, got {tuple(chosen)}")
        of_stages = f"of stages from 0 to {num_stages - 1}"
        out_indices = tuple(check_ints("out_indices", out_indices, of_stages))
        if not out_indices or not all(0 <= i < num_stages for i in out_indices):
            raise ValueError(
                f"out_indices must name stages from 0 to {num_stages - 1}, got {out_indices!r}"
            )
        frozen_stages = check_int("frozen_stages", frozen_stages)
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(f"frozen_stages must be -1 to {num_stages}, got {frozen_stages!r}")
        check_number("drop_path_rate", drop_path_rate)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be from 0 to less than 1, got {drop_path_rate}")
        _check_style(style)
        check_dict("conv_cfg", conv_cfg, "the config of a layer")
        check_dict("norm_cfg", norm_cfg, "the config of a layer", optional=False)
        check_dict("dcn", dcn, "the config of a layer")
        check_dict("involution", involution, "the arguments of Involution")
        if dcn is not None and any(
            a and b for a, b in zip(stage_with_dcn, stage_with_ddf, strict=False)
        ):
            raise ValueError(
                "dcn and DDF replace the same layer: stage_with_dcn and stage_with_ddf must not "
                f"both be true for a stage, got {tuple(stage_with_dcn)} and {tuple(stage_with_ddf)}"
            )

        self.depth = depth
        self.stem_channels = base_channels if stem_channels is None else stem_channels
        self.base_channels = base_channels
        self.num_stages = num_stages
        self.strides = strides
        self.dilations = dilations
        self.out_indices = out_indices
        self.style = style
        self.deep_stem = deep_stem
        self.avg_down = avg_down
        self.frozen_stages = frozen_stages
        self.conv_cfg = conv_cfg
        self.norm_cfg = norm_cfg
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.zero_init_residual = zero_init_residual
        self.contract_dilation = contract_dilation
        self.multi_grid = multi_grid
        self.stage_blocks = self.arch_settings[depth][:num_stages]
        self.expansion = DDFBottleneck.expansion if expansion is None else expansion
        self.ddf_cfg = dict(
            kernel_combine=kernel_combine, head=head, kernel_size=kernel_size, se_ratio=se_ratio
        )
        self.involution = involution

        self._make_stem_layer(in_channels, self.stem_channels)

        last_block = max(sum(self.stage_blocks) - 1, 1)
        first_block = 0
        self.res_layers: list[str] = []
        channels = self.stem_channels
        for i in range(num_stages):
            out_channels = base_channels * self.expansion * 2**i
            blocks = range(first_block, first_block + self.stage_blocks[i])
            first_block = blocks.stop
            layer = self._make_stage(
                stage=i,
                in_channels=channels,
                out_channels=out_channels,
                drop_path_rates=[drop_path_rate * b / last_block for b in blocks],
                ddf_cfg=self.ddf_cfg if stage_with_ddf[i] else None,
                dcn=dcn if stage_with_dcn[i] else None,
                plugins=self._stage_plugins(plugins, i),
            )
            name = f"layer{i + 1}"
            self.add_module(name, layer)
            self.res_layers.append(name)
            channels = out_channels
        self.feat_dim = channels

        self._freeze_stages()
        if deploy:
            self.switch_to_deploy()

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        if self.deep_stem:
            layers: list[nn.Module] = []
            widths = (in_channels, stem_channels // 2, stem_channels // 2, stem_channels)
            for i in range(3):
                layers += [
                    build_conv_layer(
                        self.conv_cfg,
                        widths[i],
                        widths[i + 1],
                        kernel_size=3,
                        stride=2 if i == 0 else 1,
                        padding=1,
                        bias=False,
                    ),
                    build_norm_layer(self.norm_cfg, widths[i + 1])[1],
                    nn.ReLU(inplace=True),
                ]
            self.stem = nn.Sequential(*layers)
            self.register_load_state_dict_pre_hook(_rename_conv_module_stem)
        else:
            self.conv1 = build_conv_layer(
                self.conv_cfg,
                in_channels,
                stem_channels,
                kernel_size=7,
                stride=2,
                padding=3,
                bias=False,
            )
            self.norm1_name, norm1 = build_norm_layer(self.norm_cfg, stem_channels, postfix=1)
            self.add_module(self.norm1_name, norm1)
            self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def _make_stage(
        self,
        stage: int,
        in_channels: int,
        out_channels: int,
        drop_path_rates: list[float],
        ddf_cfg: dict | None,
        dcn: dict | None,
        plugins: list[dict],
    ) -> Sequential:
        stride = self.strides[stage]
        num_blocks = self.stage_blocks[stage]
        dilations = [self.dilations[stage]] * num_blocks
        if self.multi_grid is not None and stage == self.num_stages - 1:
            dilations = _ints_per_stage(
                "multi_grid", self.multi_grid, num_blocks, of="block of the last stage"
            )
        elif self.contract_dilation and dilations[0] > 1:
            dilations[0] //= 2

        blocks = []
        for i in range(num_blocks):
            downsample = None
            if i == 0 and (stride != 1 or in_channels != out_channels):
                downsample = self._make_downsample(in_channels, out_channels, stride)
            blocks.append(
                DDFBottleneck(
                    in_channels if i == 0 else out_channels,
                    out_channels,
                    expansion=self.expansion,
                    stride=stride if i == 0 else 1,
                    dilation=dilations[i],
                    downsample=downsample,
                    style=self.style,
                    with_cp=self.with_cp,
                    conv_cfg=self.conv_cfg,
                    norm_cfg=self.norm_cfg,
                    drop_path_rate=drop_path_rates[i],
                    ddf_cfg=ddf_cfg,
                    dcn=dcn,
                    plugins=plugins,
                    zero_init_residual=self.zero_init_residual,
                    involution=self.involution,
                )
            )
        return Sequential(*blocks)

    def _make_downsample(self, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        if self.avg_down and stride != 1:
            layers.append(nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False))
            stride = 1
        layers += [
            build_conv_layer(
                self.conv_cfg, in_channels, out_channels, kernel_size=1, stride=stride, bias=False
            ),
            build_norm_layer(self.norm_cfg, out_channels)[1],
        ]
        return nn.Sequential(*layers)

    def _stage_plugins(self, plugins: Sequence[dict] | None, stage: int) -> list[dict]:
        """The plugins of one stage; a plugin without ``stages`` is for all stages."""
        chosen = []
        for plugin in _check_plugins(plugins):
            stages = plugin.get("stages")
            if stages is not None:
                _check_per_stage("plugins: stages", stages, self.num_stages)
            if stages is None or stages[stage]:
                chosen.append(plugin)
        return chosen

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.stem] if self.deep_stem else [self.conv1, self.norm1]
        frozen += [getattr(self, f"layer{i}") for i in range(1, self.frozen_stages + 1)]
        for module in frozen:
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad = False

    def init_weights(self) -> None:
        """Applies ``init_cfg``, then initializes the blocks; pretrained weights are loaded last."""
        self.init_cfg = name_pretrained(self.init_cfg)
        super().init_weights()

    def switch_to_deploy(self) -> None:
        """Sets evaluation mode and folds the norms into the layers before them.

        Called by mmpretrain's ``tools/model_converters/reparameterize_model.py``, and by mmdeploy
        for every model. Norms that cannot be folded remain (see
        :func:`~ddf_mm.layers.fuse_ddf_bn`).
        """
        switch_to_deploy(self.eval(), strict=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``Tensor[B, in_channels, H, W]`` -> the outputs of the stages in ``out_indices``."""
        if self.deep_stem:
            x = self.stem(x)
        else:
            x = self.relu(self.norm1(self.conv1(x)))
        x = self.maxpool(x)
        outs = []
        for i, name in enumerate(self.res_layers):
            x = getattr(self, name)(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def train(self, mode: bool = True) -> DDFResNet:
        """Sets training mode, except for frozen stages and, with ``norm_eval``, batch norms."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Layer id of a parameter, for layer-wise learning-rate decay.

        Groups blocks as mmpretrain's ResNet does at depths 50, 101 and 152, and as it does at
        depth 50 for depth 26.

        Args:
            param_name: the parameter's name in the whole model.
            prefix: the backbone's prefix in it, such as ``'backbone.'``.

        Returns:
            (layer id, number of layers): 0 for the stem; the number of layers less one for
            everything outside the backbone.
        """
        # Blocks that count as one layer in the second and third stage.
        group2, group3 = (4, 4) if self.depth == 152 else (2, 3)
        blocks = self.arch_settings[self.depth]
        layers2, layers3 = math.ceil(blocks[1] / group2), math.ceil(blocks[2] / group3)
        last = 2 + layers2 + layers3
        num_layers = last + 2
        if not param_name.startswith(prefix):
            return last + 1, num_layers
        name = param_name[len(prefix) :]
        if not name.startswith("layer"):
            return 0, num_layers
        stage, block = name.removeprefix("layer").split(".")[:2]
        layer_id = {
            1: 1,
            2: 2 + int(block) // group2,
            3: 2 + layers2 + int(block) // group3,
            4: last,
        }[int(stage)]
        return layer_id, num_layers


def _check_style(style: str) -> None:
    if style not in ("pytorch", "caffe"):
        raise ValueError(f"style must be 'pytorch' or 'caffe', got {style!r}")


def _check_plugins(plugins: Sequence[dict] | None) -> Sequence[dict]:
    if plugins is None:
        return ()
    check_sequence("plugins", plugins, "of dict(cfg=…, position=…)")
    for plugin in plugins:
        if not isinstance(plugin, dict) or not isinstance(plugin.get("cfg"), dict):
            raise TypeError(f"plugins must hold dict(cfg=dict(…), position=…), got {plugin!r}")
        if plugin.get("position") not in PLUGIN_POSITIONS:
            raise ValueError(
                f"plugins: position must be one of {PLUGIN_POSITIONS}, got "
                f"{plugin.get('position')!r}"
            )
    return plugins


def _ints_per_stage(name: str, values: Sequence[int], count: int, of: str = "stage") -> list[int]:
    _check_per_stage(name, values, count, of=of)
    return check_ints(name, values, f"one value for each {of}", 1)


def _check_per_stage(
    name: str, values: Sequence, count: int, exact: bool = True, of: str = "stage"
) -> None:
    check_sequence(name, values, f"one value for each {of}")
    if len(values) < count or (exact and len(values) > count):
        raise ValueError(f"{name} must have one value for each {of}, {count}, got {tuple(values)}")


def _rename_conv_module_stem(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: object
) -> None:
    """Renames mmpretrain's deep stem (``stem.1.conv.weight``) to mmdet's (``stem.3.weight``)."""
    for i in range(3):
        for part, index in (("conv", 3 * i), ("bn", 3 * i + 1)):
            old = f"{prefix}stem.{i}.{part}."
            for key in [k for k in state_dict if k.startswith(old)]:
                state_dict[f"{prefix}stem.{index}.{key[len(old) :]}"] = state_dict.pop(key)
