"""What ``tools/benchmark.py`` times, and how.

- ``timing``: of calls that take turns, their memory, and how both are reported.
- ``operation``: the DDF operation and its layers, beside what they replace. It needs torch alone.
- ``family``: the weight-dynamic depthwise operations of other papers. It needs torch alone.
- ``networks``: the networks of configs.
"""
