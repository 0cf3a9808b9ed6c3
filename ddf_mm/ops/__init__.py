"""Functional API of the Decoupled Dynamic Filter; needs torch only."""

from ddf_mm.ops import flops, registrations
from ddf_mm.ops.ddf import ddf, ddf_up
from ddf_mm.ops.filter_norm import filter_norm
from ddf_mm.ops.library import backend_info
from ddf_mm.ops.reference import ddf_reference, ddf_up_reference

registrations.register()
flops.register()

__all__ = ["backend_info", "ddf", "ddf_reference", "ddf_up", "ddf_up_reference", "filter_norm"]
