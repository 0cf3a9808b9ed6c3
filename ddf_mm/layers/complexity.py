"""The compiled ops in mmengine's complexity analysis."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from mmengine.analysis import complexity_analysis, jit_analysis
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape

from ddf_mm.ops import library
from ddf_mm.ops.flops import count_taps

# The position of the kernel size in the arguments of each op.
_OPS = dict(ddf=3, ddf_valid=3, ddf_up=3, ddf_up_valid=3, ddf_softmax=2)


def _count_flops(at: int, inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    kernel_size = inputs[at].toIValue()
    return Counter(ddf=count_taps(get_shape(outputs[0]), kernel_size))


def register() -> None:
    """Add the ops to the tables of ``get_model_complexity_info`` and its analyzers.

    mmengine has no public interface that extends them for all analyzers.
    """
    # By default a traced graph holds the formula, without an op to count.
    jit_analysis._get_scoped_trace_graph = library.traced_ops()(
        jit_analysis._get_scoped_trace_graph
    )
    for name, at in _OPS.items():
        op = f"ddf_mm::{name}"
        complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS[op] = functools.partial(_count_flops, at)
        complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS[op] = generic_activation_jit("ddf")
