"""The recipes in pure Python, for ``with read_base(): from ddf_mm.configs…``.

The same as in the checkout's ``configs/``, with classes in place of names.
"""
