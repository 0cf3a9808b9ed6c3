"""Transforms of PyTorch, compared with sequences of plain backward passes.

Each function takes a function of tensors and the tensors, and returns the result of the transform
and the expected result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad, functional

Function = Callable[..., Tensor]


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def jacobian(function: Function, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Jacobian by a backward pass for each value of the output."""
    tensors = leaves(tensors)
    out = function(*tensors)
    rows = [torch.autograd.grad(value, tensors, retain_graph=True) for value in out.flatten()]
    columns = zip(zip(*rows, strict=True), tensors, strict=True)
    return [torch.stack(column).reshape(*out.shape, *t.shape) for column, t in columns]


def of_first(function: Function, tensors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """A scalar function of the first tensor with a nonzero Hessian."""
    return lambda first: function(first, *tensors[1:]).sin().sum()


def hessian(function: Function, tensors: Sequence[Tensor]) -> Tensor:
    return functional.hessian(of_first(function, tensors), tensors[0])


def vectorized_jacobian(function, tensors):
    got = functional.jacobian(function, tuple(tensors), vectorize=True)
    return got, jacobian(function, tensors)


def forward_mode_jacobian(function, tensors):
    got = functional.jacobian(function, tuple(tensors), vectorize=True, strategy="forward-mode")
    return got, jacobian(function, tensors)


def jacrev(function, tensors):
    return torch.func.jacrev(function, tuple(range(len(tensors))))(*tensors), jacobian(
        function, tensors
    )


def jacfwd(function, tensors):
    return torch.func.jacfwd(function, tuple(range(len(tensors))))(*tensors), jacobian(
        function, tensors
    )


def batched_gradients(function, tensors):
    tensors = leaves(tensors)
    out = function(*tensors)
    grads = torch.randn(3, *out.shape, dtype=out.dtype)
    got = torch.autograd.grad(out, tensors, grads, retain_graph=True, is_grads_batched=True)
    want = [torch.autograd.grad(out, tensors, grad, retain_graph=True) for grad in grads]
    return got, [torch.stack(column) for column in zip(*want, strict=True)]


def gradients_of_batched_gradients(function, tensors):
    tensors = leaves(tensors)
    out = function(*tensors)
    grads = torch.randn(2, *out.shape, dtype=out.dtype)

    def again(firsts):
        number = sum(first.sin().sum() for first in firsts)
        return torch.autograd.grad(number, tensors, retain_graph=True, materialize_grads=True)

    got = torch.autograd.grad(out, tensors, grads, create_graph=True, is_grads_batched=True)
    want = [torch.autograd.grad(out, tensors, grad, create_graph=True) for grad in grads]
    return again(got), again([first for firsts in want for first in firsts])


def tangents_of_gradients(function, tensors):
    """Forward-mode differentiation of a backward pass, which is linear in its gradient."""
    tensors = leaves(tensors)
    out = function(*tensors)
    grad, tangent = torch.randn_like(out), torch.randn_like(out)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(grad, tangent)
        duals = torch.autograd.grad(out, tensors, dual, retain_graph=True)
        got = [forward_ad.unpack_dual(d).tangent for d in duals]
    return got, torch.autograd.grad(out, tensors, tangent)


def gradient_of_a_backward_pass(function, tensors):
    tensors = leaves(tensors)
    out = function(*tensors)
    weights = [torch.randn_like(t) for t in tensors]

    def number(grad):
        firsts = torch.autograd.grad(out, tensors, grad, create_graph=True)
        return sum((a * b).sum() for a, b in zip(firsts, weights, strict=True))

    (grad,) = leaves([out])
    (want,) = torch.autograd.grad(number(grad), grad)
    return torch.func.grad(number)(grad.detach()), want


def tangents(function, tensors):
    along = [torch.randn_like(t) for t in tensors]
    out, got = torch.func.jvp(function, tuple(tensors), tuple(along))
    columns = zip(jacobian(function, tensors), along, strict=True)
    return got, sum(j.flatten(out.dim()) @ t.flatten() for j, t in columns)


def vectorized_hessian(function, tensors):
    got = functional.hessian(of_first(function, tensors), tensors[0], vectorize=True)
    return got, hessian(function, tensors)


def forward_over_reverse_hessian(function, tensors):
    got = functional.hessian(
        of_first(function, tensors),
        tensors[0],
        vectorize=True,
        outer_jacobian_strategy="forward-mode",
    )
    return got, hessian(function, tensors)


def func_hessian(function, tensors):
    got = torch.func.hessian(of_first(function, tensors))(tensors[0])
    return got, hessian(function, tensors)


def vmap(function, tensors):
    """vmap over a different dimension of each tensor, not the first in memory."""
    dims = tuple(i % 2 for i in range(len(tensors)))
    stacks = [torch.stack([t, 2 * t - 1], d) for t, d in zip(tensors, dims, strict=True)]
    want = [function(*(s.select(d, i) for s, d in zip(stacks, dims, strict=True))) for i in (0, 1)]
    return torch.vmap(function, dims)(*stacks), torch.stack(want)


TRANSFORMS = [
    vectorized_jacobian,
    forward_mode_jacobian,
    jacrev,
    jacfwd,
    batched_gradients,
    gradients_of_batched_gradients,
    tangents_of_gradients,
    gradient_of_a_backward_pass,
    tangents,
    vectorized_hessian,
    forward_over_reverse_hessian,
    func_hessian,
    vmap,
]


def _flat(value) -> list[Tensor]:
    """The tensors in nested sequences, such as the Jacobian of one output in a tuple."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _flat(part)]


def check_transform(transform: Callable, function: Function, tensors: Sequence[Tensor]) -> None:
    """For float64, where compiled ops and formula differ only by rounding."""
    got, want = (_flat(value) for value in transform(function, tensors))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def check_derivatives(function: Function, tensors: Sequence[Tensor]) -> None:
    """PyTorch's gradcheck and gradgradcheck in all modes."""
    tensors = leaves(tensors)
    assert torch.autograd.gradcheck(
        function,
        tensors,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )
    assert torch.autograd.gradgradcheck(
        function, tensors, check_batched_grad=True, check_fwd_over_rev=True, fast_mode=True
    )
