"""Automatic mixed precision training on a CPU.

For mmengine: superfluous once ``mmengine.optim.AmpOptimWrapper(dtype="bfloat16")`` can be built on
a machine without an accelerator and enters ``autocast(device_type="cpu")`` there.
"""

import logging
from contextlib import contextmanager

import torch
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import nn

_DTYPES = (None, "bfloat16", "float16", torch.bfloat16, torch.float16)


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """bfloat16 autocast on a CPU, a replacement for mmengine's ``AmpOptimWrapper``.

    It has the same arguments, so that replacing the type in a config is enough. Gradients are not
    scaled: bfloat16 has the exponent range of float32, so small gradients do not underflow as they
    do in float16. Therefore ``loss_scale`` and ``use_fsdp`` (which selects a sharded gradient
    scaler) are checked but have no effect.

    Args:
        loss_scale (str | float | dict): ``"dynamic"``, an initial scale or the arguments of a
            gradient scaler, as for ``AmpOptimWrapper``. Not used.
        dtype (str | torch.dtype | None): ``"bfloat16"`` or None. ``"float16"`` is accepted for
            configs written for a GPU; it is replaced by bfloat16, and a log message says so.
        use_fsdp (bool): Not used.
        **kwargs: Arguments of :class:`mmengine.optim.OptimWrapper`.

    Raises:
        TypeError: If ``loss_scale``, ``dtype`` or ``use_fsdp`` has a type that
            ``AmpOptimWrapper`` does not accept.
        ValueError: If ``loss_scale`` is another string or ``dtype`` is not a 16-bit type.
    """

    def __init__(
        self,
        loss_scale: str | float | dict = "dynamic",
        dtype: str | torch.dtype | None = None,
        use_fsdp: bool = False,
        **kwargs,
    ):
        if loss_scale != "dynamic" and not isinstance(loss_scale, (float, dict)):
            kind = ValueError if isinstance(loss_scale, str) else TypeError
            raise kind(
                f"loss_scale must be 'dynamic', a float or a dict, got {loss_scale!r} of type "
                f"{type(loss_scale).__name__}"
            )
        if not isinstance(use_fsdp, bool):
            raise TypeError(f"use_fsdp must be True or False, got {use_fsdp!r}")
        if dtype not in _DTYPES:
            kind = ValueError if isinstance(dtype, (str, torch.dtype)) else TypeError
            raise kind(
                "dtype must be None, 'bfloat16' or 'float16' (computed in bfloat16) for mixed "
                f"precision on a CPU, got {dtype!r} of type {type(dtype).__name__}"
            )
        super().__init__(**kwargs)
        if dtype in ("float16", torch.float16):
            print_log(
                "CPUAmpOptimWrapper computes in bfloat16 where the config asks for float16",
                logger="current",
                level=logging.INFO,
            )
        self.cast_dtype = torch.bfloat16

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the state of the optimizer; that of the gradient scaler in checkpoints of
        ``AmpOptimWrapper`` is ignored."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "loss_scaler"})

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Autocast to bfloat16; no gradient synchronization while gradients are accumulated.

        Raises:
            RuntimeError: If the model's parameters are not on a CPU, where this autocast would
                silently have no effect.
        """
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.device.type != "cpu":
            raise RuntimeError(
                f"CPUAmpOptimWrapper works on a CPU, but the model is on {parameter.device}; use "
                "AmpOptimWrapper there"
            )
        with super().optim_context(model), autocast(device_type="cpu", dtype=self.cast_dtype):
            yield
