"""An optimizer as two pure functions, and what its updates are: the base of `resnet_func.optim`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.numerics import cast_like, to_float64
from resnet_func.types import Params

# A hyper-parameter: a number, which is checked, or a 0-d tensor, which may be differentiated and mapped over.
Scalar: TypeAlias = float | Tensor


class Updates(NamedTuple):
    """How far parameters move: `delta + residue`, two trees like params.

    `delta` is the move in the parameters' precision: the one to look at. `residue` is what rounding
    `params + delta` loses, or `{}` where that is nothing. To scale or mask an update, map over both.
    """

    delta: Params
    residue: Params


class Optimizer(NamedTuple):
    """An optimizer as two pure functions.

    `init(params) -> opt_state`, `update(grads, opt_state, params) -> (updates, opt_state)`. An optimizer that
    knows where parameters go says so by `move(grads, opt_state, params) -> (params, opt_state)`, too. Those
    of this package can be pickled where their schedules and masks can, and so sent to other processes.
    """

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, Params], tuple[Updates, Any]]
    move: Callable[[Params, Any, Params], tuple[Params, Any]] | None = None

    def step(self, grads: Params, opt_state: Any, params: Params) -> tuple[Params, Any]:
        """`update` and `apply_updates` at once, to the bit, and by `move` in half the passes over memory.

        What overflows becomes inf by `move`, as in torch.optim.
        """
        if self.move is not None:
            return self.move(grads, opt_state, params)
        updates, opt_state = self.update(grads, opt_state, params)
        return apply_updates(params, updates), opt_state


def apply_updates(params: Params, updates: Updates) -> Params:
    """`(params + delta) + residue`, as new tensors; `params` must be the tree that `update` was given.

    What overflows becomes NaN, where torch.optim may have inf.

    >>> params, delta = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, -0.5])}
    >>> apply_updates(params, Updates(delta, {}))
    {'w': tensor([1.5000, 1.5000])}
    """
    moved = tree.map(torch.add, params, updates.delta)
    return tree.map(torch.add, moved, updates.residue) if tree.leaves(updates.residue) else moved


def zero_step(params: Params) -> Tensor:
    """The counter, on the device of the parameters, so that a compiled step stays on one device."""
    leaves = tree.leaves(params)
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else "cpu")


def from_move(
    init: Callable[[Params], Any], move: Callable[[Params, Any, Params], tuple[Params, Any]]
) -> Optimizer:
    """The optimizer that takes parameters to where `move` says, to the bit."""
    return Optimizer(init, partial(_update_by_move, move), move)


def _update_by_move(
    move: Callable[[Params, Any, Params], tuple[Params, Any]], grads: Params, opt_state: Any, params: Params
) -> tuple[Updates, Any]:
    target, opt_state = move(grads, opt_state, params)
    delta = tree.map(torch.sub, target, params)
    # the residue, being small, is exact
    return Updates(delta, tree.map(lambda t, p, d: t - (p + d), target, params, delta)), opt_state


def check_fit(grads: Params, params: Params, *states: Params) -> None:
    """Refuse gradients, or trees of an optimizer's state, of another tree or other shapes than params.

    They would broadcast, or meet the wrong leaf.
    """
    _check_like(grads, params, "grads", "Try torch.func.grad with respect to these params")
    for state in states:
        _check_like(
            state, params, "the optimizer's state", "Make it by init of these params, with the same trainable"
        )


def _check_like(given_tree: Params, params: Params, name: str, remedy: str) -> None:
    given, wanted = _shapes(given_tree), _shapes(params)
    if given == wanted:
        return
    path = next(path for path in {**wanted, **given} if given.get(path) != wanted.get(path))
    raise ValueError(
        f"{name} must have the leaves and shapes of params: {path!r} must be {wanted.get(path)}; "
        f"got {given.get(path)}. {remedy}"
    )


def _shapes(params: Params) -> dict[str, torch.Size | None]:
    return {path: getattr(leaf, "shape", None) for path, leaf in tree.flatten(params).items()}


# --------------------------------------------------------------------------- numbers or 0-d tensors


def may_be_nonzero(value: Scalar) -> bool:
    """A tensor's value is not looked at: compiled code and `vmap` cannot."""
    return isinstance(value, Tensor) or value > 0


def in_float64(value: Scalar, device: torch.device) -> Scalar:
    """A number as it is, a tensor in float64 on `device`, which is where a step size is computed."""
    return to_float64(value).to(device) if isinstance(value, Tensor) else value


def scalar_of(value: Scalar) -> Callable[[Tensor], Scalar]:
    """A number as it is, a tensor as `cast_like` casts it to a leaf."""
    return cast_like(value) if isinstance(value, Tensor) else lambda leaf: value
