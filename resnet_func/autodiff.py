"""Gradients of the first order: `torch.func.vjp`, whose backward pass keeps a graph only for who needs one.

`torch.func.grad` always records its own backward pass. That costs memory and time, and takes kernels that can
be differentiated in place of faster ones, where nobody asks for a second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.func import debug_unwrap

from resnet_func import tree

Tree = TypeVar("Tree")


class Gradient(NamedTuple):
    """`value`: what was differentiated. `grad`: of its sum, like the primals. `aux`: what came along."""

    value: Tensor
    grad: Any
    aux: Any


def value_and_grad(fn: Callable[[Tree], tuple[Tensor, Any]], primals: Tree, others: Any = None) -> Gradient:
    """The gradient of `fn(primals)[0].sum()` with respect to `primals`.

    Where the value is being differentiated, in reverse or forward mode, by an outer transform too, and with
    respect to whatever it may be, so can the result be; else it holds no graph.

    Args:
        fn: Returns `(value, aux)`; aux is a pytree of tensors.
        primals: Any pytree of tensors.
        others: A pytree of the other tensors that `fn` looks at. Where it is given, and no transform is
            around this call, ordinary autograd does the same by the same kernels, without `vjp`'s price.

    >>> value, grad, _ = value_and_grad(lambda p: ((p["a"] ** 2).sum(), ()), {"a": torch.tensor([1.0, 3.0])})
    >>> value, grad
    (tensor(10.), {'a': tensor([2., 6.])})
    """
    if others is not None and is_ordinary(primals, others):
        found = _by_autograd(fn, primals)
        if found is not None:
            return found
    value, pullback, aux = cast(
        tuple[Tensor, Callable[..., Any], Any], torch.func.vjp(fn, primals, has_aux=True)
    )
    differentiable = is_differentiated(value)
    (grad,) = pullback(torch.ones_like(value), retain_graph=differentiable, create_graph=differentiable)
    return Gradient(value, grad, aux)


def is_ordinary(*trees: Any) -> bool:
    """Whether all leaves are tensors with values that no transform looks on, and nobody differentiates.

    >>> is_ordinary({"w": torch.ones(2)}), is_ordinary(torch.ones(2, requires_grad=True))
    (True, False)
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    if forward_ad._current_level >= 0 or _is_inside_a_transform():
        return False
    keeps_graph = torch.is_grad_enabled()
    leaves = [leaf for leaf in tree.leaves(trees) if isinstance(leaf, Tensor)]
    return not any(
        leaf.is_inference() or (keeps_graph and leaf.requires_grad) or not can_read(leaf) for leaf in leaves
    )


def _is_inside_a_transform() -> bool:
    """Whether a `torch.func` transform is around this call: they all refuse this, and say so."""
    try:
        torch.empty(0, dtype=torch.float32, device="cpu").requires_grad_()
    except RuntimeError:
        return True
    return False


def _by_autograd(fn: Callable[[Tree], tuple[Tensor, Any]], primals: Tree) -> Gradient | None:
    """Ordinary autograd; None where somebody looks on through a tensor that was not named."""
    outside = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = tree.map(lambda leaf: leaf.detach().requires_grad_(), primals)
        value, aux = fn(inputs)
        leaves = tree.leaves(inputs)
        if outside and graph_of(value).hangs_on_others(leaves):
            return None
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if value.requires_grad and leaves:
            found = torch.autograd.grad(value, leaves, torch.ones_like(value), allow_unused=True)
    grads = iter(found)
    grad = tree.map(lambda leaf: torch.zeros_like(leaf) if (g := next(grads)) is None else g, inputs)
    return Gradient(*tree.map(lambda leaf: leaf.detach() if leaf.requires_grad else leaf, (value, grad, aux)))


class Graph(NamedTuple):
    """What autograd's graph of a value ends in, and whether an `autograd.Function` is in it.

    `following` has the nodes that each node passes gradients on to.
    """

    ends: list[Tensor]
    functions: bool
    following: dict[Any, list[Any]]

    def hangs_on_others(self, leaves: Sequence[Tensor]) -> bool:
        """Whether it ends in other leaves than these."""
        known = {id(leaf) for leaf in leaves}
        return any(id(end) not in known for end in self.ends)


def graph_of(value: Tensor) -> Graph:
    """Walk autograd's graph of a value, each node once.

    >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    >>> graph_of(a * 2).hangs_on_others([a]), graph_of(a * b).hangs_on_others([a])
    (False, True)
    """
    if value.grad_fn is None:
        return Graph([value] if value.requires_grad else [], False, {})
    ends, functions = [], False
    waiting: list[Any] = [value.grad_fn]
    following: dict[Any, list[Any]] = {}
    seen = {value.grad_fn}
    for node in waiting:
        following[node] = after = [one for one, _ in node.next_functions if one is not None]
        if not after and (end := getattr(node, "variable", None)) is not None:
            ends.append(end)
        functions = functions or isinstance(node, BackwardCFunction)
        for one in after:
            if one not in seen:
                seen.add(one)
                waiting.append(one)
    return Graph(ends, functions, following)


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
    if torch.compiler.is_compiling() or tensor.is_meta:
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
    if not (torch.compiler.is_compiling() or any(leaf.requires_grad for leaf in tree.leaves(of))):
        return of
    return tree.map(lambda leaf: leaf.detach() if _requires_grad_itself(leaf) else leaf, of)


def _requires_grad_itself(leaf: Tensor) -> bool:
    if torch.compiler.is_compiling():  # where one cannot ask for more
        return isinstance(leaf, torch.nn.Parameter)
    return leaf.requires_grad and leaf.is_leaf and debug_unwrap(leaf, recurse=False) is leaf
