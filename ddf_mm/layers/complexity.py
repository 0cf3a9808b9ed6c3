"""Makes mmengine's ``get_model_complexity_info`` count the operation.

It counts PyTorch's own ops only, and leaves others out. The toolboxes' ``get_flops.py`` use it.
"""

from math import prod

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_analysis import Handle
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape


def _ddf_flops(inputs: list, outputs: list) -> int:
    """A multiply-add for each tap of each output, as mmengine counts a convolution's."""
    kernel_size = inputs[3].toIValue()
    return prod(get_shape(outputs[0])) * kernel_size**2


def _register(table: str, handle: Handle) -> None:
    # mmengine has no public way to add to what its analyzers know from the start.
    getattr(complexity_analysis, table, {})["ddf_mm::ddf"] = handle


_register("_DEFAULT_SUPPORTED_FLOP_OPS", _ddf_flops)
_register("_DEFAULT_SUPPORTED_ACT_OPS", generic_activation_jit())
