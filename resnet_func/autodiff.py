"""Gradients of the first order: `torch.func.vjp`, whose backward pass keeps a graph only for who needs one.

`torch.func.grad` always records its own backward pass. That costs memory and time, and takes kernels that can
be differentiated in place of faster ones, where nobody asks for a second derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import debug_unwrap

Tree = TypeVar("Tree")


class Gradient(NamedTuple):
    """`value`: what was differentiated. `grad`: of its sum, like the primals. `aux`: what came along."""

    value: Tensor
    grad: Any
    aux: Any


def value_and_grad(fn: Callable[[Tree], tuple[Tensor, Any]], primals: Tree) -> Gradient:
    """The gradient of `fn(primals)[0].sum()` with respect to `primals`.

    Where the value is being differentiated, in reverse or forward mode, by an outer transform too, and with
    respect to whatever it may be, so can the result be; else it holds no graph.

    Args:
        fn: Returns `(value, aux)`; aux is a pytree of tensors.
        primals: Any pytree of tensors.
    """
    value, pullback, aux = cast(
        tuple[Tensor, Callable[..., Any], Any], torch.func.vjp(fn, primals, has_aux=True)
    )
    differentiable = is_differentiated(value)
    (grad,) = pullback(torch.ones_like(value), retain_graph=differentiable, create_graph=differentiable)
    return Gradient(value, grad, aux)


def is_differentiated(value: Tensor) -> bool:
    """Whether an outer transform or graph differentiates a value, in reverse or forward mode."""
    if torch.compiler.is_compiling():  # what is not used is not compiled either
        return torch.is_grad_enabled()
    return forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _requires_grad(value))


def _requires_grad(value: Tensor) -> bool:
    """At any level: under `vmap` a tensor does not say that an outer `grad` differentiates it."""
    inner = debug_unwrap(value, recurse=False)
    return value.requires_grad or (inner is not value and _requires_grad(inner))
