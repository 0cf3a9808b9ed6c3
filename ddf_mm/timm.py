"""DDF-ResNets for timm (PyTorch Image Models): importing this module registers them there.

The names are the official ones, ``ddf_mul_resnet50``, ``ddf_add_resnet50`` and the same for the
depths 101 and 152. Parameters have the names of the official checkpoints, which timm loads
unchanged. Each network accepts the arguments of timm's ResNet; ``block_args`` are those of
:class:`DDFBottleneck`.

Example:
    >>> import timm
    >>> import ddf_mm.timm
    >>> model = timm.create_model("ddf_mul_resnet50", features_only=True, out_indices=(2, 4))
    >>> [tuple(x.shape) for x in model(torch.randn(1, 3, 64, 64))]
    [(1, 512, 8, 8), (1, 2048, 2, 2)]
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import (
        Bottleneck,
        ResNet,
        build_model_with_cfg,
        generate_default_cfgs,
        register_model,
    )
except ImportError as error:
    raise ImportError(
        "ddf_mm.timm registers networks with timm >= 0.9, which cannot be imported: "
        "pip install timm"
    ) from error

from ddf_mm.layers import DDFConv2d
from ddf_mm.ops.checks import COMBINES

__all__ = ["DDFBottleneck"]  # register_model adds the networks

_LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_NAMES = {f"ddf_{c}_resnet{depth}": (c, depth) for c, depth in product(COMBINES, _LAYERS)}

# Settings of the official training. The checkpoints cannot be downloaded by a program, hence no
# `url`.
default_cfgs = generate_default_cfgs(
    {
        name: dict(
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            crop_pct=0.875,
            interpolation="bicubic",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="conv1",
            classifier="fc",
            license="apache-2.0",
            origin_url="https://github.com/theFoxofSky/ddfnet",
            paper_name="Decoupled Dynamic Filter Networks",
            paper_ids="arXiv:2104.14107",
        )
        for name in _NAMES
    }
)


class DDFBottleneck(Bottleneck):
    """Bottleneck of timm's ResNet whose 3x3 convolution is a DDF.

    Args:
        args, kwargs: those of timm's Bottleneck.
        kernel_combine: how the two filters combine, ``'mul'`` or ``'add'``.
        head: filter groups.
        kernel_size: window size, odd.
        se_ratio: width of the channel branch's bottleneck over its channels.

    Raises:
        ValueError: ``conv2`` would change the number of channels (``reduce_first``), or an argument
            has an invalid value.
    """

    def __init__(
        self,
        *args: object,
        kernel_combine: str = "mul",
        head: int = 1,
        kernel_size: int = 3,
        se_ratio: float = 0.2,
        **kwargs: object,
    ) -> None:
        super().__init__(*args, **kwargs)
        conv = self.conv2
        self.conv2 = DDFConv2d(
            conv.in_channels,
            conv.out_channels,
            kernel_size,
            conv.stride,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=False,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            kernel_combine=kernel_combine,
            head=head,
            se_ratio=se_ratio,
        )


def _register(name: str, combine: str, depth: int) -> Callable[..., ResNet]:
    def create(pretrained: bool = False, **kwargs: object) -> ResNet:
        block_args = {"kernel_combine": combine, **(kwargs.pop("block_args", None) or {})}
        arguments = dict(block=DDFBottleneck, layers=_LAYERS[depth], block_args=block_args)
        return build_model_with_cfg(ResNet, name, pretrained, **{**arguments, **kwargs})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"DDF-ResNet-{depth} whose filters combine by ``'{combine}'``."
    return register_model(create)


for _name, _arguments in _NAMES.items():
    globals()[_name] = _register(_name, *_arguments)
