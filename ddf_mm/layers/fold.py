"""Folding the batch norm after a DDFPack into its filters, for inference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from ddf_mm.layers.conv import DDFConv2d
from ddf_mm.layers.filter_norm import FilterNorm
from ddf_mm.layers.pack import DDFPack, has_own_filters
from ddf_mm.layers.shift import Shift
from ddf_mm.layers.unmodified import is_observed, is_unmodified, layers_of


class _Pair(NamedTuple):
    """A layer and the batch norm after it, two children of ``parent``."""

    path: str
    parent: nn.Module
    layer_name: str
    norm_name: str

    @property
    def layer(self) -> nn.Module:
        return self.parent._modules[self.layer_name]

    @property
    def norm(self) -> nn.Module:
        return self.parent._modules[self.norm_name]


def fuse_ddf_bn(model: nn.Module, strict: bool = True) -> nn.Module:
    """Folds every batch norm that follows a ``mul`` DDFPack into the pack, in place.

    The norm's scale is multiplied into the learned scale of the channel filters' FilterNorm, its
    shift is added after the filter; ``nn.Identity`` replaces the norm. Results are equal to within
    rounding. Like mmcv's ``fuse_conv_bn`` it assumes that a pack's output goes to the next child
    module, which holds for the ResNets and ConvModules of OpenMMLab. A model without such norms, or
    one folded before, is not changed.

    Args:
        model: in evaluation mode.
        strict: whether a norm that cannot be folded is an error; otherwise it remains.

    Returns:
        The model itself.

    Raises:
        ValueError: ``strict``, and a batch norm cannot be folded: in training mode, after an
            ``add`` pack, without running statistics, or where a hook or a replaced method or
            module would be lost. The model is not changed then.

    Example:
        >>> from ddf_mm.models import DDFResNet
        >>> backbone = fuse_ddf_bn(DDFResNet(50).eval())
    """
    uses = _uses(model)
    foldable = []
    for pair in _followed_by_norm(model, DDFPack):
        reason = _obstacle(pair, uses)
        if reason is None:
            foldable.append(pair)
        elif strict:
            raise ValueError(
                f"{pair.path}: the batch norm after DDFPack cannot be folded: {reason}"
            )
    for pair in foldable:
        _fold(pair.layer, pair.norm, getattr(pair.parent, "relu_follows_pack", False))
        pair.parent._modules[pair.norm_name] = nn.Identity()
    return model


def switch_to_deploy(model: nn.Module, strict: bool = True) -> nn.Module:
    """Folds the batch norms after DDFPacks and convolutions, in place.

    See :func:`fuse_ddf_bn` for arguments, result and errors. A convolution with a hook or another
    modification, and the norm after it, are not changed.
    """
    fuse_ddf_bn(model, strict)
    uses = _uses(model)
    for pair in list(_followed_by_norm(model, nn.Conv2d)):
        if not _is_shared(pair, uses) and _is_plain_conv(pair.layer) and _is_foldable(pair.norm):
            fused = fuse_conv_bn_eval(pair.layer, pair.norm)
            pair.parent._modules[pair.layer_name] = fused
            pair.parent._modules[pair.norm_name] = nn.Identity()
    return model


def _followed_by_norm(model: nn.Module, kind: type[nn.Module]) -> Iterator[_Pair]:
    for path, parent in model.named_modules():
        for (name, layer), (norm_name, norm) in pairwise(parent._modules.items()):
            if isinstance(layer, kind) and isinstance(norm, _BatchNorm):
                yield _Pair(f"{path}.{name}".lstrip("."), parent, name, norm_name)


def _uses(model: nn.Module) -> Counter[nn.Module]:
    """How often each module occurs in the model."""
    return Counter(child for parent in model.modules() for child in parent._modules.values())


def _is_shared(pair: _Pair, uses: Counter[nn.Module]) -> bool:
    return uses[pair.layer] > 1 or uses[pair.norm] > 1


def _is_plain(module: nn.Module, *forwards: object) -> bool:
    """Whether calling ``module`` runs one of these methods and nothing else."""
    return (
        type(module).forward in forwards
        and is_unmodified(module, type(module))
        and not is_parametrized(module)
        and not is_observed()
    )


def _is_plain_conv(conv: nn.Module) -> bool:
    # mmcv's class differs only for empty tensors in very old versions of torch.
    from mmcv.cnn.bricks.wrappers import Conv2d

    return _is_plain(conv, nn.Conv2d.forward, Conv2d.forward)


def _is_foldable(norm: nn.Module) -> bool:
    return (
        not norm.training
        and norm.running_mean is not None
        and _is_plain(norm, _BatchNorm.forward, nn.SyncBatchNorm.forward)
    )


def _obstacle(pair: _Pair, uses: Counter[nn.Module]) -> str | None:
    """Why the norm of a pair cannot be folded into its pack."""
    pack, norm = pair.layer, pair.norm
    if norm.training:
        return "the model is in training mode; call eval() first"
    if pack.kernel_combine != "mul":
        combine = pack.kernel_combine
        return f"kernel_combine {combine!r} has no factor per channel that could include the norm's"
    if norm.running_mean is None:
        return "it keeps no running statistics"
    if isinstance(pack.output, Shift):
        return "the pack has a folded norm already"
    if norm.num_features != pack.in_channels:
        return f"it has {norm.num_features} channels, the pack {pack.in_channels}"
    if _is_shared(pair, uses):
        return "the pack or the norm is used more than once"
    if not _is_foldable(norm):
        return "the norm has hooks, or its class or methods are not PyTorch's"
    channel_norm = layers_of(pack.channel_branch)[-1]
    if (
        not _is_plain(pack, DDFPack.forward, DDFConv2d.forward)
        or not has_own_filters(pack)
        or not is_unmodified(pack.output, nn.Identity)
        or not is_unmodified(channel_norm, FilterNorm)
    ):
        return "the pack has hooks, or a module or method of it was replaced"
    if not isinstance(channel_norm.std, nn.Parameter):
        return "its channel filters have no learned scale, which could include the norm's"
    return None


@torch.no_grad()
def _fold(pack: DDFPack, norm: nn.Module, relu: bool) -> None:
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean * factor
    if norm.bias is not None:
        shift = shift + norm.bias
    if getattr(pack, "bias", None) is not None:  # of a DDFConv2d
        shift = shift + pack.bias * factor
        pack.bias = None
    channel_norm = layers_of(pack.channel_branch)[-1]
    dtype = channel_norm.std.dtype
    factor = factor.to(dtype).repeat_interleave(channel_norm.std.numel() // pack.in_channels)
    for name, values in list(channel_norm.named_parameters(recurse=False)):
        # Not in place: packs may share parameters.
        setattr(channel_norm, name, nn.Parameter(values * factor, values.requires_grad))
    pack.output = Shift(shift.to(dtype), relu)
