"""Whether modules are unmodified, so that a fused path may replace them.

A fused path may replace modules only if it ignores no modification of them: a replaced module or
method, a hook, a parametrization, offloaded or converted parameters, a tracer. Otherwise the layers
run the modules.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext

from ddf_mm.layers.filter_norm import FilterNorm
from ddf_mm.layers.shift import Shift


def _methods() -> tuple[object, ...]:
    """The methods that a call of an unmodified module runs, as they are now."""
    module, conv = nn.Module, nn.Conv2d
    return (
        module.__call__,
        module._call_impl,
        conv.forward,
        conv._conv_forward,
        nn.Sequential.forward,
        nn.Sequential.__iter__,
        nn.ReLU.forward,
        nn.Identity.forward,
        nn.modules.batchnorm._BatchNorm.forward,
        nn.SyncBatchNorm.forward,
        FilterNorm.forward,
        Shift.forward,
    )


_METHODS = _methods()
# Attributes of an instance that override these methods.
_OVERRIDES = frozenset({"forward", "_conv_forward", "_call_impl", "_compiled_call_impl"})


def is_observed() -> bool:
    """Whether anything observes or changes the calls of all modules or operators: global hooks,
    patched classes, a tracer or compiler, a torch function or dispatch mode (except that of
    ``torch.device``)."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        # What torch's own _has_any_global_hook reads, which torch 2.6 lacks.
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
        or torch._C._len_torch_dispatch_stack()
        or any(
            type(torch._C._get_function_stack_at(i)) is not DeviceContext
            for i in range(torch._C._len_torch_function_stack())
        )
        or _methods() != _METHODS
    )


def is_unmodified(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` runs ``kind.forward`` and nothing else."""
    if type(module) is not kind:
        return False
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or not _OVERRIDES.isdisjoint(own)
    )


def layers_of(branch: nn.Module) -> list[nn.Module]:
    """The layers of nested, unmodified ``nn.Sequential``, in order."""
    if not is_unmodified(branch, nn.Sequential):
        return [branch]
    layers: list[nn.Module] = []
    for layer in branch._modules.values():
        if type(layer) is nn.Sequential:
            layers += layers_of(layer)
        else:
            layers.append(layer)
    return layers


def is_filter_norm(
    module: nn.Module | None, device: torch.device, filters: int, filter_type: str, taps: int
) -> TypeGuard[FilterNorm]:
    """Whether ``module`` is an unmodified FilterNorm of this geometry without a learned mean,
    whose scale is learned for channel filters and a number for spatial ones."""
    if not is_unmodified(module, FilterNorm):
        return False
    own = module.__dict__
    if (
        own["in_channels"] != filters
        or own["filter_type"] != filter_type
        or own.get("mean", module) is not None
    ):
        return False
    if filter_type == "spatial":
        return type(own.get("std")) in (float, int)
    std = own["_parameters"].get("std")
    # Of any dtype: FilterNorm casts it.
    return (
        std is not None
        and type(std) in (nn.Parameter, Tensor)
        and std.shape == (filters * taps,)
        and std.dtype.is_floating_point
        and std.device == device
    )
