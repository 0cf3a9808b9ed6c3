"""Fake kernels (for compilers and exporters) and derivatives of the compiled ops."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddf_mm.ops import library, self_check
from ddf_mm.ops.checks import (
    Geometry,
    check_ddf,
    check_ddf_up,
    check_int,
    check_kernel_size,
    check_tensor,
)
from ddf_mm.ops.reference import (
    accumulate_dtype,
    ddf_pack_reference,
    ddf_reference,
    ddf_up_reference,
    ddf_up_valid_reference,
    ddf_valid_reference,
    filter_norm_op_reference,
    layout_of,
)


def _check_like(
    name: str,
    tensor: Tensor | None,
    like: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
) -> None:
    """Raises unless ``tensor`` is None or has ``shape``, ``like``'s device, and ``dtype`` or
    ``like``'s dtype."""
    if tensor is None:
        return
    dtype = dtype or like.dtype
    if tensor.dtype != dtype or tensor.device != like.device or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} must be a {dtype} tensor of shape {list(shape)} on {like.device}, got "
            f"{tensor.dtype}, {list(tensor.shape)} and {tensor.device}"
        )


def _empty_output(features: Tensor, geometry: Geometry) -> Tensor:
    return torch.empty(
        (*features.shape[:2], *geometry.output_size),
        dtype=features.dtype,
        device=features.device,
        memory_format=layout_of(features),
    )


def _fake(check: Callable[..., Geometry]) -> Callable[..., Tensor]:
    """The fake kernel of ddf or ddf_up."""

    def fake(features: Tensor, *arguments: Any) -> Tensor:
        return _empty_output(features, check(features, *arguments))

    return fake


def _fake_backward(
    check: Callable[..., Geometry],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The fake kernel of ddf_backward or ddf_up_backward."""

    def fake(
        grad: Tensor,
        features: Tensor,
        channel_filter: Tensor | None,
        spatial_filter: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        options, (need_features, need_channel, need_spatial) = rest[:4], rest[4:]
        geometry = check(features, channel_filter, spatial_filter, *options)
        check_tensor("grad", grad)
        _check_like("grad", grad, features, (*features.shape[:2], *geometry.output_size))

        def gradient(of: Tensor | None, need: bool, is_contiguous: bool) -> Tensor:
            if of is None or not need:
                return features.new_empty(0)
            layout = torch.contiguous_format
            if of.dim() == 4 and not is_contiguous:  # filters of ddf_up have five dimensions
                layout = layout_of(of)
            return torch.empty_like(of, memory_format=layout)

        return (
            gradient(features, need_features, False),
            gradient(channel_filter, need_channel, True),
            gradient(spatial_filter, need_spatial, False),
        )

    return fake


def _fake_ddf_pack(
    features: Tensor,
    raw_channel: Tensor,
    raw_spatial: Tensor,
    channel_std: Tensor | None,
    channel_scale: float,
    spatial_scale: float,
    eps: float,
    bias: Tensor | None,
    relu: bool,
    *options: Any,
) -> Tensor:
    check_tensor("raw_channel", raw_channel)
    check_tensor("raw_spatial", raw_spatial)
    geometry = check_ddf(features, raw_channel, raw_spatial, *options)
    taps = check_kernel_size(geometry.kernel_size, minimum=3) ** 2
    channels, dtype = features.shape[1], accumulate_dtype(features.dtype)
    _check_like("channel_std", channel_std, features, (channels * taps,), dtype)
    _check_like("bias", bias, features, (channels,), dtype)
    return _empty_output(features, geometry)


def _fake_ddf_softmax(
    features: Tensor, logits: Tensor, kernel_size: int, scale_factor: int
) -> Tensor:
    return _empty_output(
        features, check_ddf_up(features, None, logits, kernel_size, scale_factor, 1, "mul")
    )


def _check_filter_norm(
    x: Tensor, filters: int, std: Tensor | None, mean: Tensor | None = None
) -> None:
    check_tensor("x", x)
    check_int("filters", filters, 1)
    if x.dim() < 2 or x.shape[1] % filters or x.shape[1] // filters < 2:
        raise ValueError(
            f"x must have filters * taps channels, with filters {filters} and at least 2 taps, "
            f"got shape {list(x.shape)}"
        )
    dtype = accumulate_dtype(x.dtype)
    _check_like("std", std, x, (x.shape[1],), dtype)
    _check_like("mean", mean, x, (x.shape[1],), dtype)


def _fake_filter_norm(
    x: Tensor, filters: int, std: Tensor | None, mean: Tensor | None, scale: float, eps: float
) -> Tensor:
    _check_filter_norm(x, filters, std, mean)
    return torch.empty_like(x, memory_format=layout_of(x))


def _fake_filter_norm_backward(
    grad: Tensor,
    x: Tensor,
    filters: int,
    std: Tensor | None,
    scale: float,
    eps: float,
    need_x: bool,
    need_std: bool,
    need_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_filter_norm(x, filters, std)
    check_tensor("grad", grad)
    _check_like("grad", grad, x, x.shape)

    def parameter(needed: bool) -> Tensor:
        return x.new_empty(x.shape[1] if needed else 0, dtype=accumulate_dtype(x.dtype))

    grad_x = torch.empty_like(x, memory_format=layout_of(x)) if need_x else x.new_empty(0)
    return grad_x, parameter(need_std), parameter(need_mean)


def _uses_op(grad: Tensor) -> bool:
    """Whether a backward pass uses the compiled op, which is not differentiable itself."""
    return (
        library.serves(grad)
        and not torch.is_grad_enabled()
        # Not a torch.func transform: torch.autograd.grad(is_grads_batched=True).
        and not torch._C._functorch.is_legacy_batchedtensor(grad)
    )


def _gradients(
    formula: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients by a formula if the compiled op cannot be used: for higher derivatives, under
    torch.func's transforms (including batched gradients), in forward mode.

    Args:
        formula: the function of ``tensors`` to differentiate.
        tensors: those saved for the backward pass.
        needed: which gradients to compute; the others are ``None``.
        grad: gradient of the result.
    """

    def fill(values: Sequence[Tensor], others: Sequence[Tensor | None]) -> list[Tensor | None]:
        left = iter(values)
        return [next(left) if need else other for need, other in zip(needed, others, strict=True)]

    given = [t for t, need in zip(tensors, needed, strict=True) if need and t is not None]
    if torch.is_grad_enabled() and library.serves(grad):
        # Views, because the same tensor may be given twice. Not torch.func.vjp, which does not
        # support the hooks of torch.utils.checkpoint.
        given = [t.view_as(t) for t in given]
        out = formula(*fill(given, tensors))
        return fill(torch.autograd.grad(out, given, grad, create_graph=True), [None] * len(tensors))
    _, pull_back = torch.func.vjp(lambda *values: formula(*fill(values, tensors)), *given)
    return fill(pull_back(grad), [None] * len(tensors))


def _only_needed(grads: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


def _save_ddf(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _derivative_of(name: str, reference: Callable[..., Tensor]) -> Callable[..., tuple]:
    """The derivative of ddf or ddf_up, computed by the op ``name``."""
    backward = getattr(torch.ops.ddf_mm, name)

    @library.with_formula
    def differentiate(ctx: Any, grad: Tensor) -> tuple:
        tensors, options, needed = ctx.saved_tensors, ctx.options, ctx.needs_input_grad[:3]
        call = grad, *tensors, *options, *needed
        if _uses_op(grad) and self_check.passes(name, *call):
            grads = _only_needed(backward(*call), needed)
        else:
            grads = _gradients(lambda *given: reference(*given, *options), tensors, needed, grad)
        return *grads, *[None] * len(options)

    return differentiate


def _save_filter_norm(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, filters, std, mean, scale, eps = inputs
    ctx.save_for_backward(x, std, mean)
    ctx.options = filters, scale, eps


@library.with_formula
def _differentiate_filter_norm(ctx: Any, grad: Tensor) -> tuple:
    (x, std, mean), (filters, scale, eps) = ctx.saved_tensors, ctx.options
    need_x, _, need_std, need_mean, *_ = ctx.needs_input_grad
    needed = need_x, need_std, need_mean
    call = grad, x, filters, std, scale, eps, *needed
    if _uses_op(grad) and self_check.passes("filter_norm_backward", *call):
        grads = _only_needed(torch.ops.ddf_mm.filter_norm_backward(*call), needed)
    else:
        grads = _gradients(
            lambda x, std, mean: filter_norm_op_reference(x, filters, std, mean, scale, eps),
            (x, std, mean),
            needed,
            grad,
        )
    return grads[0], None, *grads[1:], None, None


def _save_ddf_pack(ctx: Any, inputs: tuple, output: Tensor) -> None:
    features, raw_channel, raw_spatial, channel_std, *scales, bias, relu = inputs[:9]
    ctx.save_for_backward(features, raw_channel, raw_spatial, channel_std, bias)
    ctx.scales, ctx.relu, ctx.options = scales, relu, inputs[9:]


@library.with_formula
def _differentiate_ddf_pack(ctx: Any, grad: Tensor) -> tuple:
    needs = ctx.needs_input_grad
    needed = *needs[:4], needs[7]
    features, raw_channel, raw_spatial, std, bias = ctx.saved_tensors
    channel_scale, spatial_scale, eps = ctx.scales
    channels, options = features.shape[1], ctx.options
    groups = raw_spatial.shape[1] // options[0] ** 2

    def formula(*given: Any) -> Tensor:
        arguments = [*given[:4], *ctx.scales, given[4], ctx.relu, *options]
        return ddf_pack_reference(*arguments)

    def by_ops() -> list[Tensor | None]:
        run, flat = self_check.run, raw_channel.flatten(1)
        need_features, need_channel, need_spatial, need_std, _ = needed
        channel = run("filter_norm", flat, channels, std, None, channel_scale, eps)
        spatial = run("filter_norm", raw_spatial, groups, None, None, spatial_scale, eps)
        filters = channel.view(raw_channel.shape), spatial
        needs_of_ddf = need_features, need_channel or need_std, need_spatial
        grad_features, grad_channel, grad_spatial = run(
            "ddf_backward", grad, features, *filters, *options, *needs_of_ddf
        )
        grads = [grad_features, None, None, None, None]
        if need_channel or need_std:
            grad_flat, grads[3], _ = run(
                "filter_norm_backward", grad_channel.flatten(1), flat, channels, std,
                channel_scale, eps, need_channel, need_std, False,
            )  # fmt: skip
            grads[1] = grad_flat.view(raw_channel.shape) if need_channel else None
        if need_spatial:
            grads[2], _, _ = run(
                "filter_norm_backward", grad_spatial, raw_spatial, groups, None,
                spatial_scale, eps, True, False, False,
            )  # fmt: skip
        return _only_needed(grads, needed)

    grads = None
    if _uses_op(grad) and bias is None and not ctx.relu:
        with contextlib.suppress(self_check.Failed):
            grads = by_ops()
    if grads is None:
        grads = _gradients(formula, ctx.saved_tensors, needed, grad)
    return *grads[:4], None, None, None, grads[4], None, *[None] * len(options)


# Removes its registrations when it is deleted.
_FRAGMENT = torch.library.Library("ddf_mm", "FRAGMENT")


def _register_autograd(
    name: str, differentiate: Callable[..., tuple], save: Callable[[Any, tuple, Tensor], None]
) -> None:
    """Registers the derivative of the op ``name``, like ``torch.library.register_autograd``, but
    for ops without keyword-only and default arguments, which take a fifth of a small call.

    Args:
        differentiate: from the context and the gradient of the result to those of the inputs.
        save: stores in a context what ``differentiate`` needs of the inputs and the result.
    """
    op = getattr(torch.ops.ddf_mm, name).default
    below_autograd = torch._C._AutoDispatchBelowAutograd
    keys_below_autograd = torch._C._after_autograd_keyset

    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs, keys = arguments[:-1], arguments[-1]
        with below_autograd():
            output = op.redispatch(keys, *inputs)
        save(ctx, inputs, output)
        return output

    def backward(ctx: Any, grad: Tensor) -> tuple:
        return *differentiate(ctx, grad), None

    # Errors and profilers name it.
    functions = dict(forward=staticmethod(forward), backward=staticmethod(backward))
    derivative: Any = type(f"ddf_mm_{name}", (torch.autograd.Function,), functions)

    def call(keys: Any, *inputs: Any) -> Tensor:
        keys &= keys_below_autograd
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return derivative.apply(*inputs, keys)
        with below_autograd():
            return op.redispatch(keys, *inputs)

    _FRAGMENT.impl(name, call, "Autograd", with_keyset=True)


def register() -> None:
    """Registers fake kernels and derivatives if the ops are compiled."""
    if not library.COMPILED:
        return
    register_fake = torch.library.register_fake
    for name, check, reference in (
        ("ddf", check_ddf, ddf_reference),
        ("ddf_valid", functools.partial(check_ddf, is_valid=True), ddf_valid_reference),
        ("ddf_up", check_ddf_up, ddf_up_reference),
        ("ddf_up_valid", functools.partial(check_ddf_up, is_valid=True), ddf_up_valid_reference),
    ):
        derivative = _derivative_of(f"{name}_backward", reference)
        register_fake(f"ddf_mm::{name}", _fake(check))
        register_fake(f"ddf_mm::{name}_backward", _fake_backward(check))
        _register_autograd(name, derivative, _save_ddf)
    register_fake("ddf_mm::filter_norm", _fake_filter_norm)
    register_fake("ddf_mm::filter_norm_backward", _fake_filter_norm_backward)
    _register_autograd("filter_norm", _differentiate_filter_norm, _save_filter_norm)
    register_fake("ddf_mm::ddf_softmax", _fake_ddf_softmax)
    register_fake("ddf_mm::ddf_pack", _fake_ddf_pack)
    _register_autograd("ddf_pack", _differentiate_ddf_pack, _save_ddf_pack)
