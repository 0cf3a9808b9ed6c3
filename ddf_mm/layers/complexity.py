"""The compiled ops in mmengine's complexity analysis."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mmengine.analysis import complexity_analysis, jit_analysis
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape

from ddf_mm.ops import library
from ddf_mm.ops.flops import count_taps

_OPS = ("ddf_mm::ddf", "ddf_mm::ddf_up")


def _count_flops(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    kernel_size = inputs[3].toIValue()
    return Counter(ddf=count_taps(get_shape(outputs[0]), kernel_size))


def register() -> None:
    """Add the ops to the tables of ``get_model_complexity_info`` and its analyzers.

    mmengine has no public interface that extends them for all analyzers.
    """
    # By default a traced graph holds the formula, without an op to count.
    jit_analysis._get_scoped_trace_graph = library.traced_ops()(
        jit_analysis._get_scoped_trace_graph
    )
    for op in _OPS:
        complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS[op] = _count_flops
        complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS[op] = generic_activation_jit("ddf")
