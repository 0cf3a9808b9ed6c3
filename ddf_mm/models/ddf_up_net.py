"""Network for joint upsampling of a low-resolution map with a high-resolution image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModel, ModuleList
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement, PixelData
from torch import Tensor, nn

from ddf_mm.layers import DDFUpPack
from ddf_mm.ops.checks import check_dict, check_int, check_number, check_sequence, untraced
from ddf_mm.registry import name_pretrained

LOSSES = dict(l1=F.l1_loss, mse=F.mse_loss, smooth_l1=F.smooth_l1_loss)
# Maps with a smaller standard deviation count as constant.
_MIN_STD = 1e-6


@MODELS.register_module()
class DDFUpNet(BaseModel):
    """Joint upsampling with DDF-Up (arXiv 2104.14107), of depth maps for example.

    Convolutions encode the map at its resolution and the guide, an image, at each power of two of
    it. A sequence of :class:`~ddf_mm.layers.DDFUpPack` doubles the size of the map's features, with
    spatial filters predicted from the guide's features at the output size; the guide has no other
    influence. The last two convolutions predict the residual of the bilinearly upsampled map.

    Each map is normalized by its own mean and standard deviation, and the result denormalized, so
    that its unit does not matter.

    Args:
        scale_factor: the guide's size over the map's, a power of two.
        map_channels: channels M of the maps.
        guide_channels: channels G of the guides.
        channels: width of the network.
        norm_cfg: config of the norm layers; ``None``: no norms.
        act_cfg: config of the activations.
        upsample_cfg: further arguments of DDFUpPack, for example ``dict(head=4)``.
        loss: ``'l1'``, ``'mse'`` or ``'smooth_l1'``, of the error over the standard deviation of
            the low resolution map.
        guide_mean: mean of each channel of the guide, RGB of ImageNet by default.
        guide_std: standard deviation of each channel of the guide.
        data_preprocessor: config of mmengine's data preprocessor, which must stack the samples.
        init_cfg: mmengine's initialization config.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> net = DDFUpNet(scale_factor=4)
        >>> net(torch.randn(2, 1, 16, 12), torch.rand(2, 3, 64, 48)).shape
        torch.Size([2, 1, 64, 48])
    """

    init_cfg: dict | list[dict] | None

    def __init__(
        self,
        scale_factor: int,
        map_channels: int = 1,
        guide_channels: int = 3,
        channels: int = 16,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = dict(type="ReLU"),  # noqa: B006
        upsample_cfg: dict | None = None,
        loss: str = "l1",
        guide_mean: Sequence[float] = (123.675, 116.28, 103.53),
        guide_std: Sequence[float] = (58.395, 57.12, 57.375),
        data_preprocessor: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        scale_factor = check_int("scale_factor", scale_factor, 2)
        if scale_factor & (scale_factor - 1):
            raise ValueError(f"scale_factor must be a power of two, got {scale_factor}")
        map_channels = check_int("map_channels", map_channels, 1)
        guide_channels = check_int("guide_channels", guide_channels, 1)
        channels = check_int("channels", channels, 1)
        check_dict("norm_cfg", norm_cfg, "the config of a layer")
        check_dict("act_cfg", act_cfg, "the config of a layer")
        check_dict("upsample_cfg", upsample_cfg, "of arguments of DDFUpPack")
        if loss not in tuple(LOSSES):
            raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
        for name, values in (("guide_mean", guide_mean), ("guide_std", guide_std)):
            check_sequence(name, values, f"a number for each of {guide_channels} channels")
            for i, value in enumerate(values):
                check_number(f"{name}[{i}]", value)
            if len(values) != guide_channels:
                raise ValueError(
                    f"{name} must hold a number for each of the guide's {guide_channels} channels, "
                    f"got {tuple(values)}"
                )
        self.scale_factor = scale_factor
        self.map_channels = map_channels
        self.guide_channels = guide_channels
        self.loss = loss
        self.register_buffer("guide_mean", torch.tensor(guide_mean).view(-1, 1, 1), False)
        self.register_buffer("guide_std", torch.tensor(guide_std).view(-1, 1, 1), False)

        def conv(in_channels: int, stride: int = 1) -> ConvModule:
            return ConvModule(
                in_channels,
                channels,
                3,
                stride=stride,
                padding=1,
                norm_cfg=norm_cfg,
                act_cfg=act_cfg,
            )

        doublings = scale_factor.bit_length() - 1
        self.map_encoder = nn.Sequential(conv(map_channels), conv(channels))
        # Finest first; each further one halves the size.
        self.guide_encoder = nn.ModuleList(
            nn.Sequential(conv(channels, stride=2) if i else conv(guide_channels), conv(channels))
            for i in range(doublings)
        )
        # Coarsest first. mmengine's ModuleList, so that they initialize themselves after init_cfg.
        self.upsample_modules = ModuleList(
            DDFUpPack(channels, scale_factor=2, joint_channels=channels, **dict(upsample_cfg or {}))
            for _ in range(doublings)
        )
        self.convs = nn.ModuleList(conv(channels) for _ in range(doublings))
        self.head = nn.Conv2d(channels, map_channels, 3, padding=1)

    def init_weights(self) -> None:
        """Initializes to the bilinear upsampling of the map, then applies ``init_cfg``."""
        if not self.is_init:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.init_cfg = name_pretrained(self.init_cfg)
        super().init_weights()

    def forward(
        self,
        inputs: Tensor,
        guide: Tensor,
        data_samples: list[BaseDataElement] | None = None,
        mode: str = "tensor",
    ) -> Tensor | dict[str, Tensor] | list[BaseDataElement]:
        """Upsamples maps.

        Args:
            inputs: low resolution maps, ``Tensor[B, M, H, W]``.
            guide: guides, ``Tensor[B, G, s*H, s*W]`` for the scale factor s.
            data_samples: for ``'loss'``, with the ground truth ``gt_map.data``, ``Tensor[M, s*H,
                s*W]`` each.
            mode: ``'tensor'``, ``'loss'`` or ``'predict'``.

        Returns:
            The maps, ``Tensor[B, M, s*H, s*W]``; a dict with the loss; or the data samples (new
            ones without ``data_samples``) with ``pred_map.data``.

        Raises:
            ValueError: wrong shapes, an unknown mode, or no data samples for the loss.
        """
        channels = self.map_channels, self.guide_channels
        _check_inputs(inputs, guide, *channels, self.scale_factor)
        std, mean = torch.std_mean(inputs.float(), dim=(1, 2, 3), keepdim=True)
        std = std.clamp(min=_MIN_STD)
        prediction = self._upsample((inputs.float() - mean) / std, guide)
        if mode == "loss":
            if not data_samples:
                raise ValueError("data_samples with gt_map are needed for mode 'loss', got none")
            target = torch.stack([sample.gt_map.data for sample in data_samples])
            return dict(loss=LOSSES[self.loss](prediction, (target - mean) / std))
        maps = prediction * std + mean
        if mode == "tensor":
            return maps
        if mode == "predict":
            samples = data_samples or [BaseDataElement() for _ in maps]
            for sample, upsampled in zip(samples, maps, strict=True):
                sample.pred_map = PixelData(data=upsampled)
            return samples
        raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")

    def _upsample(self, maps: Tensor, guide: Tensor) -> Tensor:
        x = (guide - self.guide_mean) / self.guide_std
        pyramid = []
        for encoder in self.guide_encoder:
            x = encoder(x)
            pyramid.append(x)
        x = self.map_encoder(maps)
        for upsample, conv, level in zip(
            self.upsample_modules, self.convs, reversed(pyramid), strict=True
        ):
            x = conv(upsample(x, level))
        coarse = F.interpolate(
            maps, scale_factor=self.scale_factor, mode="bilinear", align_corners=False
        )
        return coarse + self.head(x)


# torch.fx records it as one call, since it depends on sizes.
@torch.fx.wrap
@untraced
def _check_inputs(
    inputs: Tensor, guide: Tensor, map_channels: int, guide_channels: int, s: int
) -> None:
    for name, tensor in (("inputs", inputs), ("guide", guide)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if inputs.dim() != 4 or inputs.shape[1] != map_channels:
        raise ValueError(
            f"inputs must be a Tensor[B, M, H, W] with M = {map_channels}, got shape "
            f"{list(inputs.shape)}"
        )
    batch, _, height, width = inputs.shape
    needed = [batch, guide_channels, s * height, s * width]
    if list(guide.shape) != needed:
        raise ValueError(
            f"guide must be of shape {needed}, {s} times the size of inputs, got "
            f"{list(guide.shape)}"
        )
