"""Muon: momentum whose every step is orthogonalised; and two optimizers for one tree.

Matrices (convolutions as `[c_out, c_in * height * width]`) move by the semi-orthogonal matrix nearest to
their momentum, so that all its singular directions learn alike. Norms, biases and the last layer are for
another optimizer: `partition` gives each leaf its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.optim.base import Optimizer, Updates, check_fit, moving, zero_step
from resnet_func.optim.schedules import Schedule, constant, require, require_finite
from resnet_func.types import Params

# Jordan et al. 2024: the steepest slope at 0 that keeps singular values within 0.7 and 1.2
QUINTIC = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
EPS = 1e-7


class MuonState(NamedTuple):
    """`step`: updates done, 0-d int64. `momentum_buffer`: like params."""

    step: Tensor
    momentum_buffer: Params


def muon(
    lr: float | Schedule,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    nesterov: bool = True,
    precision: torch.dtype | None = None,
) -> Optimizer:
    """Muon, for leaves of two dimensions or more; with `precision=torch.bfloat16` bitwise `torch.optim.Muon`.

    Args:
        lr: Learning rate, or a schedule of it; the first update sees step 0. A matrix `[m, n]` moves by
            `lr * sqrt(max(1, m / n))` times a matrix of spectral norm about 1.
        momentum: In [0, 1); the buffer is `lerp(g, buffer, momentum)`.
        weight_decay: Parameters shrink by `1 - lr * weight_decay` before each step.
        nesterov: Orthogonalise `lerp(g, buffer, momentum)` instead of the buffer.
        precision: Of the orthogonalisation. None takes the parameters' own, which is faster on processors
            that do not multiply bfloat16.

    Raises:
        ValueError: A hyper-parameter is out of range; in `init`, a leaf has fewer than two dimensions; in
            `update`, grads do not fit params.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """
    schedule = lr if callable(lr) else constant(lr)
    require("momentum", momentum, 0 <= momentum < 1, "in [0, 1)", "momentum=0.95")
    require_finite(weight_decay=weight_decay)

    def init(params: Params) -> MuonState:
        flat = {path: leaf for path, leaf in tree.flatten(params).items() if leaf.ndim < 2}
        if flat:
            raise ValueError(
                f"muon is for matrices and convolutions; got {', '.join(flat)} of fewer than two dimensions. "
                "Give those to another optimizer with partition"
            )
        return MuonState(zero_step(params), tree.map(torch.zeros_like, params))

    def move(grads: Params, opt_state: MuonState, params: Params) -> tuple[Params, MuonState]:
        check_fit(grads, params)
        buffer = tree.map(lambda b, g: b.lerp(g, 1 - momentum), opt_state.momentum_buffer, grads)
        direction = tree.map(lambda g, b: g.lerp(b, momentum), grads, buffer) if nesterov else buffer
        lr_now = schedule(opt_state.step.to(torch.float64))
        keep = 1 - lr_now * weight_decay

        def leaf(p: Tensor, d: Tensor) -> Tensor:
            step = orthogonalized(d, precision or d.dtype).to(p.dtype)
            size = lr_now * max(1.0, p.shape[0] / p[0].numel()) ** 0.5
            return torch.addcmul(p * keep.to(p.dtype), step, -size.to(p.dtype))

        return tree.map(leaf, params, direction), MuonState(opt_state.step + 1, buffer)

    return moving(init, move)


def orthogonalized(update: Tensor, precision: torch.dtype) -> Tensor:
    """About `U V^T` of a matrix `U S V^T`, of the update's shape: five quintic Newton-Schulz steps."""
    a, b, c = QUINTIC
    x = update.flatten(1).to(precision)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=EPS)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return (x.T if tall else x).reshape(update.shape)


Half: TypeAlias = Callable[[Params, Any, Params], tuple[Any, Any]]


class PartitionState(NamedTuple):
    """`step`: updates done, 0-d int64. `chosen`, `rest`: the states of the two optimizers."""

    step: Tensor
    chosen: Any
    rest: Any


def partition(where: Callable[[str], bool], chosen: Optimizer, rest: Optimizer) -> Optimizer:
    """One optimizer for the leaves whose dotted path `where` accepts, another for the rest.

    Each sees its own leaves as a tree, under their own names. What either raises, this raises.
    """

    def split(params: Params) -> tuple[Params, Params]:
        flat = tree.flatten(params)
        ours = {path: leaf for path, leaf in flat.items() if where(path)}
        theirs = {path: leaf for path, leaf in flat.items() if path not in ours}
        return tree.unflatten(ours), tree.unflatten(theirs)

    def init(params: Params) -> PartitionState:
        ours, theirs = split(params)
        return PartitionState(zero_step(params), chosen.init(ours), rest.init(theirs))

    def each(
        ours: Half, theirs: Half, grads: Params, opt_state: PartitionState, params: Params
    ) -> tuple[Any, Any, PartitionState]:
        """What the two halves make of their leaves, and the new state."""
        check_fit(grads, params)
        (our_grads, their_grads), (our_params, their_params) = split(grads), split(params)
        first, our_state = ours(our_grads, opt_state.chosen, our_params)
        second, their_state = theirs(their_grads, opt_state.rest, their_params)
        return first, second, PartitionState(opt_state.step + 1, our_state, their_state)

    def update(grads: Params, opt_state: PartitionState, params: Params) -> tuple[Updates, PartitionState]:
        first, second, new_state = each(chosen.update, rest.update, grads, opt_state, params)
        return Updates(*(_joined(a, b, params) for a, b in zip(first, second, strict=True))), new_state

    def move(grads: Params, opt_state: PartitionState, params: Params) -> tuple[Params, PartitionState]:
        first, second, new_state = each(chosen.step, rest.step, grads, opt_state, params)
        return _joined(first, second, params), new_state

    return Optimizer(init, update, move)


def _joined(a: Params, b: Params, params: Params) -> Params:
    """Two halves of an update as one tree like params, zeros for a half that is `{}`; `{}` if both are."""
    flat = {**tree.flatten(a), **tree.flatten(b)}
    if not flat:
        return {}
    return tree.map_with_path(lambda path, p: flat[path] if path in flat else torch.zeros_like(p), params)
