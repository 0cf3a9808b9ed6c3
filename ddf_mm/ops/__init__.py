"""Functional API of the Decoupled Dynamic Filter; needs torch only."""

from ddf_mm.ops import flops, registrations
from ddf_mm.ops.ddf import ddf, ddf_up
from ddf_mm.ops.family import (
    adaptive_conv,
    apply_kernel,
    carafe,
    convex_upsample,
    cspn,
    dynamic_upsampling,
    involution,
)
from ddf_mm.ops.filter_norm import filter_norm
from ddf_mm.ops.library import backend_info
from ddf_mm.ops.reference import ddf_reference, ddf_up_reference

registrations.register()
flops.register()

__all__ = [
    "adaptive_conv",
    "apply_kernel",
    "backend_info",
    "carafe",
    "convex_upsample",
    "cspn",
    "ddf",
    "ddf_reference",
    "ddf_up",
    "ddf_up_reference",
    "dynamic_upsampling",
    "filter_norm",
    "involution",
]
