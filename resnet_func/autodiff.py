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

from resnet_func import tree

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

    >>> value, grad, _ = value_and_grad(lambda p: ((p["a"] ** 2).sum(), ()), {"a": torch.tensor([1.0, 3.0])})
    >>> value, grad
    (tensor(10.), {'a': tensor([2., 6.])})
    """
    value, pullback, aux = cast(
        tuple[Tensor, Callable[..., Any], Any], torch.func.vjp(fn, primals, has_aux=True)
    )
    differentiable = is_differentiated(value)
    (grad,) = pullback(torch.ones_like(value), retain_graph=differentiable, create_graph=differentiable)
    return Gradient(value, grad, aux)


def is_differentiated(value: Tensor) -> bool:
    """Whether a derivative may be taken of what is computed from `value`, by any transform around this call.

    >>> is_differentiated(torch.ones(2)), torch.func.grad(lambda x: x * is_differentiated(x))(torch.ones(()))
    (False, tensor(1.))
    """
    if torch.compiler.is_compiling():  # what is not used is not compiled either
        return torch.is_grad_enabled()
    return forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _requires_grad(value))


def _requires_grad(value: Tensor) -> bool:
    """At any level: under `vmap` a tensor does not say that an outer `grad` differentiates it."""
    inner = debug_unwrap(value, recurse=False)
    return value.requires_grad or (inner is not value and _requires_grad(inner))


def can_read(tensor: Tensor) -> bool:
    """Whether a tensor has values that may be looked at: not in compiled code, under a transform, on meta."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return False
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and debug_unwrap(tensor, recurse=False) is tensor


def detach_leaves(of: Tree) -> Tree:
    """The tree with what requires grad by itself, such as an `nn.Parameter`, detached.

    What a `torch.func` transform differentiates, and what was computed from something that requires grad,
    stays as it is.

    >>> detach_leaves({"w": torch.nn.Parameter(torch.ones(1))})
    {'w': tensor([1.])}
    """
    return tree.map(lambda leaf: leaf.detach() if _requires_grad_itself(leaf) else leaf, of)


def _requires_grad_itself(leaf: Tensor) -> bool:
    if torch.compiler.is_compiling():  # where one cannot ask for more
        return isinstance(leaf, torch.nn.Parameter)
    return leaf.requires_grad and leaf.is_leaf and debug_unwrap(leaf, recurse=False) is leaf
