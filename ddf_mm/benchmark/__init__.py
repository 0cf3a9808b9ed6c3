"""Implementation of ``tools/benchmark.py``.

- ``timing``: measures time and memory of interleaved calls, and reports both.
- ``operation``: compares the DDF operation and its layers with alternatives. It needs torch only.
- ``family``: compares the operations of ``ddf_mm.ops.family`` with unfold. It needs torch only.
- ``networks``: compares the networks of configs.
"""
