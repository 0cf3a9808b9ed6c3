"""Folding the batch norm behind a DDFPack into its filters, for inference."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddf_mm.layers.pack import DDFPack, Shift

NO_FOLD = "DDFPack cannot take in the batch norm behind it"


def fuse_ddf_bn(model: nn.Module) -> nn.Module:
    """Folds every batch norm that follows a ``mul`` DDFPack into the pack, in place.

    The norm's factor goes into the learned scale of the channel filters' FilterNorm, its shift
    behind the filter; ``nn.Identity`` takes the norm's place. Results are equal to within
    rounding. As mmcv's ``fuse_conv_bn`` does for convolutions, it takes the child module behind a
    pack for what its output goes to, which holds for the ResNets and ConvModules of OpenMMLab.
    A model without such norms, or one folded before, stays as it is.

    Args:
        model: in evaluation mode.

    Returns:
        The model itself.

    Raises:
        ValueError: the model is in training mode, or holds a batch norm that cannot be folded:
            behind an ``add`` pack, or one without running statistics. Nothing was changed then.

    Example:
        >>> from ddf_mm.models import DDFResNet
        >>> backbone = fuse_ddf_bn(DDFResNet(50).eval())
    """
    found = [
        (f"{name}.{child}".lstrip("."), pack, module, norm)
        for name, module in model.named_modules()
        for child, pack, norm in _followed_by_norm(module)
    ]
    for name, pack, module, norm in found:
        _check_foldable(name, pack, module._modules[norm])
    for _, pack, module, norm in found:
        relu = getattr(module, "relu_follows_pack", False)
        _fold(pack, module._modules[norm], relu)
        module._modules[norm] = nn.Identity()
    return model


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Folds all batch norms, behind convolutions and behind DDFPacks, in place.

    See :func:`fuse_ddf_bn` for arguments, result and errors.
    """
    from mmcv.cnn import fuse_conv_bn

    fuse_ddf_bn(model)
    return fuse_conv_bn(model)


def _followed_by_norm(module: nn.Module):
    """(name of the pack, pack, name of the norm) for the children of a module."""
    children = list(module._modules.items())
    for (name, child), (norm_name, norm) in pairwise(children):
        if isinstance(child, DDFPack) and isinstance(norm, (_BatchNorm, nn.SyncBatchNorm)):
            yield name, child, norm_name


def _check_foldable(name: str, pack: DDFPack, norm: nn.Module) -> None:
    if norm.training:
        reason = "the model is in training mode; call eval() first"
    elif pack.kernel_combine != "mul":
        reason = "kernel_combine 'add' gives no factor of the channel that could hold the norm's"
    elif norm.running_mean is None:
        reason = "it keeps no running statistics"
    elif type(pack.output) is not nn.Identity:
        reason = "the pack has taken in another one"
    elif norm.num_features != pack.in_channels:
        reason = f"it has {norm.num_features} channels, the pack {pack.in_channels}"
    else:
        return
    raise ValueError(f"{name}: {NO_FOLD}: {reason}")


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
    std = pack.channel_branch[-1].std
    std.mul_(factor.to(std.dtype).repeat_interleave(std.numel() // pack.in_channels))
    pack.output = Shift(shift.to(std.dtype), relu)
