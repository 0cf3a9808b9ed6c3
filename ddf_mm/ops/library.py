"""The compiled ops: loads them and gives them fake kernels, autograd, autocast and vmap.

The libraries define the ops of ``torch.ops.ddf_mm`` and bring their kernels only; everything else
that PyTorch wants to know about an op is said here, once for all devices.
"""

from __future__ import annotations

import filecmp
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ddf_mm.ops.checks import (
    check_ddf_arguments,
    check_ddf_up_arguments,
    check_features,
    check_int,
    check_kernel_size,
    check_tensor,
)
from ddf_mm.ops.reference import (
    accumulate_dtype,
    ddf_reference,
    ddf_up_reference,
    filter_norm_reference,
    layout_of,
)

# Oldest torch with all of the stable ABI that the libraries were built against (see setup.py).
MIN_TORCH = (2, 10)
# Device types that can have compiled kernels. ROCm builds of torch call theirs cuda too.
COMPILABLE = ("cpu",) if torch.version.cuda is None else ("cpu", "cuda")
FORCED = os.environ.get("DDF_MM_FORCE_REFERENCE", "") not in ("", "0")
REINSTALL = (
    "reinstall ddf_mm with `pip install -v --no-build-isolation .` in its source folder, which "
    "says what it compiles"
)


class _Missing(Exception):
    """A library cannot be used; says why and what helps."""


def _find(name: str, package: Path) -> Path | None:
    """The library ``<name>*.so`` of a package's folder."""
    # The names that setuptools gives an extension module: .abi3.so and those of this Python.
    found = (package / (name + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((path for path in found if path.is_file()), None)


def _package_with_libraries() -> Path:
    """The folder of this package or, where Python was started in a source folder in which nothing
    was compiled, that of the package that was installed from it.

    Raises:
        _Missing: another package than the one in this source folder is installed.
    """
    here = Path(__file__).resolve().parents[1]
    sources = here.parent / "csrc"
    if _find("_C", here) or not (sources.is_dir() and (here.parent / "setup.py").is_file()):
        return here
    for entry in sys.path:
        installed = Path(entry).resolve() / here.name
        library = _find("_C", installed)
        if installed == here or library is None:
            continue
        # What calls the ops has to be what it is there; and the ops what would be compiled here.
        callers = [
            path.relative_to(here) for of in ("ops", "layers") for path in here.glob(f"{of}/*.py")
        ]
        _, differing, missing = filecmp.cmpfiles(here, installed, ["version.py", *callers], False)
        compiled = library.stat().st_mtime
        if differing or missing or any(f.stat().st_mtime > compiled for f in sources.rglob("*.*")):
            raise _Missing(
                f"Python runs the sources in {here.parent}, in which nothing is compiled, and "
                f"{installed} was installed from others: start Python in another folder, or "
                "install these, with `pip install -v --no-build-isolation .`"
            )
        return installed
    return here


def _load(name: str, package: Path, remedy: str) -> None:
    """Loads ``<package>/<name>*.so``.

    Raises:
        _Missing: it is not there or does not load.
    """
    library = _find(name, package)
    if library is None:
        raise _Missing(f"this install has no ddf_mm/{name}*.so; {remedy}")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise _Missing(
            f"{library} does not load with torch {torch.__version__} "
            f"({error.__cause__ or error}); {REINSTALL}"
        ) from error


def _load_all() -> tuple[frozenset[str], str]:
    """Device types that now have compiled kernels, and why one that could have them has not."""
    compiled: set[str] = set()
    if FORCED:
        return frozenset(), "DDF_MM_FORCE_REFERENCE is set"
    try:
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
            oldest = ".".join(map(str, MIN_TORCH))
            raise _Missing(
                f"torch {torch.__version__} is older than {oldest}; upgrade torch and {REINSTALL}"
            )
        package = _package_with_libraries()
        _load("_C", package, f"install a C++ compiler and ninja and {REINSTALL}")
        compiled.add("cpu")
        if "cuda" in COMPILABLE:
            _load(
                "_C_cuda", package, f"install a CUDA {torch.version.cuda} toolkit and {REINSTALL}"
            )
            compiled.add("cuda")
    except _Missing as missing:
        return frozenset(compiled), str(missing)
    return frozenset(compiled), ""


def backend_info() -> dict[str, str]:
    """Says which implementation serves :func:`ddf_mm.ops.ddf` on each type of device.

    Returns:
        Device type to ``'compiled'`` or to ``'reference'``, the formula in plain PyTorch;
        ``'default'`` stands for every device type that is not named. ``'why'``, there only if a
        named device type has the reference: the reason, and what helps.
    """
    info = {name: "compiled" if name in COMPILED else "reference" for name in COMPILABLE}
    info["default"] = "reference"
    return {**info, "why": _WHY} if _WHY else info


def serves(features: Tensor) -> bool:
    """Whether the compiled op is to take a call with ``features``.

    It is not under torch.func's transforms and forward-mode differentiation: PyTorch refuses ops
    with a registered backward there, or drops their tangents silently. The formula has both. Nor
    is it for torch.jit's tracer, whose graphs go where there is no ddf_mm: to ONNX and to C++.
    """
    return (
        features.device.type in COMPILED
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and (_traces_ops or not torch.jit.is_tracing())
    )


@contextmanager
def traced_ops() -> Iterator[None]:
    """Within it torch.jit's tracer records compiled ops in place of the formula, to count them."""
    global _traces_ops
    before, _traces_ops = _traces_ops, True
    try:
        yield
    finally:
        _traces_ops = before


def raise_failed_allocation(size: int, device: str, text: str) -> NoReturn:
    """Raises what allocating ``size`` bytes on ``device`` raises.

    The libraries call it: PyTorch's C interface tells them that an allocation failed, but not why.

    Raises:
        torch.OutOfMemoryError: there is no memory; also with ``text`` if there is some by now.
    """
    torch.empty(size, dtype=torch.uint8, device=device)
    raise torch.OutOfMemoryError(text)


def warn_about_reference(device_type: str) -> None:
    """Warns, once in a process, that ``device_type`` could have compiled ops but has not."""
    global _warned
    could_have = device_type in COMPILABLE and device_type not in COMPILED
    # Tracing through warnings.warn would break torch.compile's graph.
    if FORCED or _warned or not could_have or torch.compiler.is_compiling():
        return
    _warned = True
    warnings.warn(
        f"ddf_mm: no compiled ops for {device_type}, so the several times slower formula in plain "
        f"PyTorch serves: {_WHY}. DDF_MM_FORCE_REFERENCE=1 silences this warning.",
        RuntimeWarning,
        stacklevel=3,
    )


def autocast_inputs(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts float32 and 16-bit tensors to the autocast dtype where autocast is on.

    It casts no float64, as for every operation; a call that mixes them is left as it is, so that
    the check that refuses it names the dtypes that were given.
    """
    if not isinstance(tensors[0], Tensor):
        return tensors
    device_type = tensors[0].device.type
    # The meta device has no autocast, and PyTorch raises when asked.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors
    )


def _combine(mul: bool) -> str:
    return "mul" if mul else "add"


def _check_like(name, tensor, like, shape, dtype=None):
    """Raises unless ``tensor``, if not None, is of ``shape``, of ``like``'s dtype and device."""
    if tensor is None:
        return
    dtype = dtype or like.dtype
    if tensor.dtype != dtype or tensor.device != like.device or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} must be a {dtype} tensor of shape {list(shape)} on {like.device}, got "
            f"{tensor.dtype}, {list(tensor.shape)} and {tensor.device}"
        )


def _fake_ddf(features, channel_filter, spatial_filter, kernel_size, dilation, stride, mul):
    geometry = check_ddf_arguments(
        features, channel_filter, spatial_filter, kernel_size, dilation, stride, _combine(mul)
    )
    return torch.empty(
        (*features.shape[:2], geometry.height, geometry.width),
        dtype=features.dtype,
        device=features.device,
        memory_format=layout_of(features),
    )


def _fake_ddf_up(
    features, channel_filter, spatial_filter, kernel_size, scale_factor, dilation, mul
):
    check_ddf_up_arguments(
        features,
        channel_filter,
        spatial_filter,
        kernel_size,
        scale_factor,
        dilation,
        _combine(mul),
    )
    batch, channels, height, width = features.shape
    return torch.empty(
        (batch, channels, scale_factor * height, scale_factor * width),
        dtype=features.dtype,
        device=features.device,
        memory_format=layout_of(features),
    )


def _fake_backward(fake, grad, features, channel_filter, spatial_filter, *rest):
    options, needed = rest[:4], rest[4:]
    out = fake(features, channel_filter, spatial_filter, *options)
    check_tensor("grad", grad)
    _check_like("grad", grad, features, out.shape)

    def gradient(of, need, memory_format):
        if of is None or not need:
            return features.new_empty(0)
        return torch.empty_like(of, memory_format=memory_format or layout_of(of))

    spatial_format = torch.contiguous_format if fake is _fake_ddf_up else None

    need_features, need_channel, need_spatial = needed
    return (
        gradient(features, need_features, None),
        gradient(channel_filter, need_channel, torch.contiguous_format),
        gradient(spatial_filter, need_spatial, spatial_format),
    )


def gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of a formula, for a backward pass under torch.func's transforms (the batched
    gradients of a vectorized Jacobian are one), in forward-mode differentiation or for more
    derivatives than the compiled ops have.

    Args:
        function: of ``tensors``.
        tensors: what was saved for the pass.
        needed: of which of them; the others' are ``None``.
        grad: of what the function returns.
    """
    given = [t for t, need in zip(tensors, needed, strict=True) if need]

    def fill(values: Sequence[Tensor], others: Sequence[Tensor | None]) -> list[Tensor | None]:
        left = iter(values)
        return [next(left) if n else other for n, other in zip(needed, others, strict=True)]

    _, pull_back = torch.func.vjp(lambda *values: function(*fill(values, tensors)), *given)
    return fill(pull_back(grad), [None] * len(tensors))


def _second_gradients(function, ctx, tensors, tangents, need_inputs):
    """Gradients of those gradients of ``function`` that the first backward pass was asked for.

    Args:
        function: of all ``tensors`` but the first, which is the gradient of its result.
        ctx: holds ``asked_for``.
        tensors: what was saved.
        tangents: of the first gradients, ``None`` where nothing depends on one.
        need_inputs: which gradients are needed.
    """
    given = [need and t is not None for need, t in zip(need_inputs, tensors, strict=True)]
    taken = [
        asked and tangent is not None and tensor is not None
        for asked, tangent, tensor in zip(ctx.asked_for, tangents, tensors[1:], strict=True)
    ]
    if not any(taken) or not any(given):
        return [None] * len(tensors)

    def first(grad, *inputs):
        return [g for g in gradients(function, inputs, taken, grad) if g is not None]

    tangents = [t for t, take in zip(tangents, taken, strict=True) if take]
    return gradients(first, tensors, given, tangents)


def _formula(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reference with the arguments of its compiled op, whose last one is ``mul``."""

    def formula(*args):
        return reference(*args[:-1], _combine(args[-1]))

    return formula


def _bind(op, options):
    return lambda *tensors: FORMULAS[op](*tensors, *options)


def _setup_ddf(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _differentiate_ddf(op, ctx, grad):
    needed = ctx.needs_input_grad[:3]
    if serves(grad):
        grads = OPS[op](grad, *ctx.saved_tensors, *ctx.options, *needed)
    else:
        grads = gradients(_bind(op, ctx.options), ctx.saved_tensors, needed, grad)
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), *[None] * 4


class _EagerDDF(torch.autograd.Function):
    """The op and its first derivative, past the registered formula, which PyTorch reaches by some
    50 microseconds of Python more. Only a second derivative goes through that."""

    @staticmethod
    def forward(ctx, features, channel_filter, spatial_filter, op, options):
        ctx.save_for_backward(features, channel_filter, spatial_filter)
        ctx.op, ctx.options = op, options
        with torch._C._AutoDispatchBelowAutograd():
            return op.default(features, channel_filter, spatial_filter, *options)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() or not serves(grad):
            return *_differentiate_ddf(ctx.op, ctx, grad)[:3], None, None
        needed = ctx.needs_input_grad[:3]
        with torch._C._AutoDispatchBelowAutograd():
            grads = OPS[ctx.op].default(grad, *ctx.saved_tensors, *ctx.options, *needed)
        return *(g if need else None for g, need in zip(grads, needed, strict=True)), None, None


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _run(op, features, channel_filter, spatial_filter, *options):
    if (
        torch.is_grad_enabled()
        and (
            features.requires_grad
            or _requires_grad(channel_filter)
            or _requires_grad(spatial_filter)
        )
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    ):
        return _EagerDDF.apply(features, channel_filter, spatial_filter, op, options)
    return op(features, channel_filter, spatial_filter, *options)


def run_ddf(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    *options: int | bool,
) -> Tensor:
    """Calls the compiled op: arguments and result of ``torch.ops.ddf_mm.ddf``."""
    return _run(torch.ops.ddf_mm.ddf, features, channel_filter, spatial_filter, *options)


def run_ddf_up(
    features: Tensor,
    channel_filter: Tensor | None,
    spatial_filter: Tensor | None,
    *options: int | bool,
) -> Tensor:
    """Calls the compiled op: arguments and result of ``torch.ops.ddf_mm.ddf_up``."""
    return _run(torch.ops.ddf_mm.ddf_up, features, channel_filter, spatial_filter, *options)


def _check_filter_norm(x, filters, std, mean=None):
    check_tensor("x", x)
    check_int("filters", filters, 1)
    if x.dim() < 2 or x.shape[1] % filters or x.shape[1] // filters < 2:
        raise ValueError(
            "x must have a multiple of filters channels, at least 2 taps for each of the "
            f"{filters} filters, got shape {list(x.shape)}"
        )
    dtype = accumulate_dtype(x.dtype)
    _check_like("std", std, x, (x.shape[1],), dtype)
    _check_like("mean", mean, x, (x.shape[1],), dtype)


def _fake_filter_norm(x, filters, std, mean, scale, eps):
    _check_filter_norm(x, filters, std, mean)
    return torch.empty_like(x, memory_format=layout_of(x))


def _fake_filter_norm_backward(grad, x, filters, std, scale, eps, need_x, need_std, need_mean):
    _check_filter_norm(x, filters, std)
    check_tensor("grad", grad)
    _check_like("grad", grad, x, x.shape)

    def parameter(needed):
        return x.new_empty(x.shape[1] if needed else 0, dtype=accumulate_dtype(x.dtype))

    grad_x = torch.empty_like(x, memory_format=layout_of(x)) if need_x else x.new_empty(0)
    return grad_x, parameter(need_std), parameter(need_mean)


def _fake_ddf_pack(features, raw_channel, raw_spatial, channel_std, *options):
    bias, kernel_size = options[3], options[5]
    check_tensor("raw_channel", raw_channel)
    check_tensor("raw_spatial", raw_spatial)
    out = _fake_ddf(features, raw_channel, raw_spatial, *options[5:])
    check_kernel_size(kernel_size, minimum=3)
    channels, dtype = features.shape[1], accumulate_dtype(features.dtype)
    _check_like("channel_std", channel_std, features, (channels * kernel_size**2,), dtype)
    _check_like("bias", bias, features, (channels,), dtype)
    return out


def _check_filters(name, weight, groups):
    """Raises unless ``weight`` has a multiple, at least one, of ``groups`` filters."""
    check_tensor(name, weight)
    if weight.dim() != 4 or weight.shape[0] < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"{name} must have 4 dimensions and a multiple of {groups} filters, got shape "
            f"{list(weight.shape)}"
        )


def _empty_channels_last(features, channels, height, width):
    return torch.empty(
        (features.shape[0], channels, height, width),
        dtype=features.dtype,
        device=features.device,
        memory_format=torch.channels_last,
    )


def _fake_depthwise_pointwise(features, depthwise, depthwise_bias, pointwise, pointwise_bias):
    check_features(features)
    _, channels, height, width = features.shape
    _check_filters("depthwise", depthwise, channels)
    filters, size = depthwise.shape[0], depthwise.shape[2]
    if size % 2 == 0:
        raise ValueError(f"depthwise must have an odd size, got {size}")
    _check_like("depthwise", depthwise, features, (filters, 1, size, size))
    _check_filters("pointwise", pointwise, filters // channels)
    outputs = pointwise.shape[0]
    _check_like("pointwise", pointwise, features, (outputs, channels, 1, 1))
    _check_like("depthwise_bias", depthwise_bias, features, (filters,))
    _check_like("pointwise_bias", pointwise_bias, features, (outputs,))
    return _empty_channels_last(features, outputs, height, width)


def _fake_pointwise_pool(features, weight, bias, stride):
    check_features(features)
    check_int("stride", stride, 1)
    batch, channels, height, width = features.shape
    _check_filters("weight", weight, 1)
    outputs = weight.shape[0]
    _check_like("weight", weight, features, (outputs, channels, 1, 1))
    _check_like("bias", bias, features, (outputs,))
    rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
    out = _empty_channels_last(features, outputs, rows, columns)
    return out, features.new_empty(batch, channels)


def _setup_filter_norm(ctx, inputs, output):
    x, filters, std, _, scale, eps = inputs
    ctx.save_for_backward(x, std)
    ctx.options = filters, scale, eps


def _norm_formula(filters: int, scale: float, eps: float) -> Callable[..., Tensor]:
    def formula(x, std, mean):
        return filter_norm_reference(x, filters, scale if std is None else std * scale, mean, eps)

    return formula


def _any_mean(x: Tensor) -> Tensor:
    """One value a tap; no gradient depends on which."""
    return x.new_zeros(x.shape[1], dtype=accumulate_dtype(x.dtype))


def _differentiate_filter_norm(ctx, grad):
    x, std = ctx.saved_tensors
    filters, scale, eps = ctx.options
    need_x, _, need_std, need_mean, _, _ = ctx.needs_input_grad
    needed = need_x, need_std, need_mean
    if serves(grad):
        grads = torch.ops.ddf_mm.filter_norm_backward(grad, x, filters, std, scale, eps, *needed)
    else:
        tensors = x, std, _any_mean(x)
        grads = gradients(_norm_formula(*ctx.options), tensors, needed, grad)
    grad_x, grad_std, grad_mean = (g if n else None for g, n in zip(grads, needed, strict=True))
    return grad_x, None, grad_std, grad_mean, None, None


def _setup_filter_norm_backward(ctx, inputs, output):
    grad, x, filters, std, scale, eps, *asked_for = inputs
    ctx.save_for_backward(grad, x, std)
    ctx.options = filters, scale, eps
    ctx.asked_for = asked_for
    # The tangent of a gradient that nothing depends on is then None, and its term is left out.
    ctx.set_materialize_grads(False)


def _differentiate_filter_norm_backward(ctx, *tangents):
    """Second and higher derivatives, through the formula."""
    grad, x, std = ctx.saved_tensors
    need_grad, need_x, _, need_std = ctx.needs_input_grad[:4]
    terms = _second_gradients(
        _norm_formula(*ctx.options),
        ctx,
        [grad, x, std, _any_mean(x)],
        tangents,
        [need_grad, need_x, need_std, False],
    )
    return terms[0], terms[1], None, terms[2], *[None] * 5


def run_filter_norm(
    x: Tensor, filters: int, std: float | Tensor, mean: float | Tensor | None, eps: float
) -> Tensor:
    """Calls the compiled op for the arguments of ``filter_norm_reference``."""
    scale, factors = (1.0, std) if isinstance(std, Tensor) else (std, None)
    if mean is not None and not isinstance(mean, Tensor):
        mean = x.new_full((x.shape[1],), mean, dtype=accumulate_dtype(x.dtype))
    return torch.ops.ddf_mm.filter_norm(x, filters, factors, mean, scale, eps)


def _setup_ddf_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:8]
    ctx.asked_for = inputs[8:]
    ctx.set_materialize_grads(False)


def _differentiate_ddf_backward(op, ctx, *tangents):
    """Second derivatives by the op and its backward themselves, so that any order can be had.

    The gradients g_i of <grad, ddf(x_0, x_1, x_2)> with tangents t_i give the sum over i of
    <t_i, g_i> = <grad, derivative of ddf along t_i>. ddf is linear in its features, and in each
    filter for 'mul': that derivative is ddf itself with x_i replaced by t_i. For 'add' the other
    filter's part does not depend on the filter in question and drops out.
    """
    grad, *inputs = ctx.saved_tensors
    mul = ctx.options[-1]
    need_grad, *need_inputs = ctx.needs_input_grad[:4]
    if not all(serves(tangent) for tangent in tangents if tangent is not None):
        function = _bind(op, ctx.options)
        needed = need_grad, *need_inputs
        terms = _second_gradients(function, ctx, ctx.saved_tensors, tangents, needed)
        return *terms, *[None] * 7
    sums = [None] * 4

    def accumulate(index, term):
        sums[index] = term if sums[index] is None else sums[index] + term

    for i, tangent in enumerate(tangents):
        if tangent is None or inputs[i] is None or not ctx.asked_for[i]:
            continue
        replaced = [*inputs[:i], tangent, *inputs[i + 1 :]]
        needed = [need and j != i for j, need in enumerate(need_inputs)]
        if i > 0 and not mul:
            other = 3 - i
            # Zeros and not None for the spatial filter: it may carry an output size of its own.
            if replaced[other] is not None:
                replaced[other] = torch.zeros_like(replaced[other])
            needed[other] = False
        if need_grad:
            accumulate(0, op(*replaced, *ctx.options))
        if any(needed):
            terms = OPS[op](grad, *replaced, *ctx.options, *needed)
            for j in range(3):
                if needed[j]:
                    accumulate(j + 1, terms[j])
    return *sums, *[None] * 7


def _fold(tensor: Tensor | None, mapped_dim: int | None, size: int) -> Tensor | None:
    """Merges vmap's dimension into the batch; a tensor without it is repeated ``size`` times."""
    if tensor is None:
        return None
    if mapped_dim is None:
        tensor = tensor.expand(size, *tensor.shape)
    else:
        tensor = tensor.movedim(mapped_dim, 0)
    return tensor.flatten(0, 1)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    return tensor.unflatten(0, (size, tensor.shape[0] // size))


def _vmap_ddf(op, info, in_dims, *args):
    folded = [_fold(args[i], in_dims[i], info.batch_size) for i in range(3)]
    return _unfold(op(*folded, *args[3:]), info.batch_size), 0


def _vmap_ddf_backward(op, info, in_dims, *args):
    folded = [_fold(args[i], in_dims[i], info.batch_size) for i in range(4)]
    grads = OPS[op](*folded, *args[4:])
    given = [need and tensor is not None for need, tensor in zip(args[8:], folded[1:], strict=True)]
    return (
        tuple(
            _unfold(g, info.batch_size) if is_given else g
            for g, is_given in zip(grads, given, strict=True)
        ),
        tuple(0 if is_given else None for is_given in given),
    )


def _autocast_kernel(op, device_type: str):
    def kernel(*args):
        tensors = autocast_inputs(*args[:3])
        with torch.autocast(device_type, enabled=False):
            return op(*tensors, *args[3:])

    return kernel


def _register() -> None:
    """Tells PyTorch about the ops what their libraries do not."""
    torch.library.register_fake("ddf_mm::ddf_pack", _fake_ddf_pack)
    torch.library.register_fake("ddf_mm::depthwise_pointwise", _fake_depthwise_pointwise)
    torch.library.register_fake("ddf_mm::pointwise_pool", _fake_pointwise_pool)
    torch.library.register_fake("ddf_mm::filter_norm", _fake_filter_norm)
    torch.library.register_fake("ddf_mm::filter_norm_backward", _fake_filter_norm_backward)
    torch.library.register_autograd(
        "ddf_mm::filter_norm", _differentiate_filter_norm, setup_context=_setup_filter_norm
    )
    torch.library.register_autograd(
        "ddf_mm::filter_norm_backward",
        _differentiate_filter_norm_backward,
        setup_context=_setup_filter_norm_backward,
    )
    for op, fake in ((torch.ops.ddf_mm.ddf, _fake_ddf), (torch.ops.ddf_mm.ddf_up, _fake_ddf_up)):
        name = str(op).replace(".", "::")
        torch.library.register_fake(name, fake)
        torch.library.register_fake(f"{name}_backward", partial(_fake_backward, fake))
        torch.library.register_autograd(
            name, partial(_differentiate_ddf, op), setup_context=_setup_ddf
        )
        torch.library.register_autograd(
            f"{name}_backward",
            partial(_differentiate_ddf_backward, op),
            setup_context=_setup_ddf_backward,
        )
        torch.library.register_vmap(name, partial(_vmap_ddf, op))
        torch.library.register_vmap(f"{name}_backward", partial(_vmap_ddf_backward, op))
        # Not torch.library.register_autocast: it casts to a dtype fixed here, not to the user's.
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            torch.library.impl(name, key, _autocast_kernel(op, device_type))


_warned = False
_traces_ops = False
COMPILED, _WHY = _load_all()
# Each op and its backward.
OPS = {}
# Each op and what it computes, of the same arguments.
FORMULAS = {}
if COMPILED:
    OPS = {
        torch.ops.ddf_mm.ddf: torch.ops.ddf_mm.ddf_backward,
        torch.ops.ddf_mm.ddf_up: torch.ops.ddf_mm.ddf_up_backward,
    }
    FORMULAS = {
        torch.ops.ddf_mm.ddf: _formula(ddf_reference),
        torch.ops.ddf_mm.ddf_up: _formula(ddf_up_reference),
    }
    _register()
