"""Muon: momentum whose every step is orthogonalised.

Matrices (convolutions as `[c_out, c_in * height * width]`) move by the semi-orthogonal matrix nearest to
their momentum, so that all its singular directions learn alike. Norms, biases and the last layer are for
another optimizer: `partition` gives each leaf its own.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.autodiff import is_differentiated
from resnet_func.numerics import cast_like, safe_norm, to_float64
from resnet_func.optim.base import Optimizer, Scalar, check_fit, from_move, in_float64, scalar_of, zero_step
from resnet_func.optim.schedules import Schedule, check_scalar, constant, require_finite
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
    lr: Scalar | Schedule,
    momentum: Scalar = 0.95,
    weight_decay: Scalar = 0.1,
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

    `lr`, `momentum` and `weight_decay` may be 0-d tensors, to differentiate or map over.

    Raises:
        ValueError: A hyper-parameter is out of range; in `init`, a leaf has fewer than two dimensions; in
            `update`, grads or state do not fit params.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    >>> optimizer, params = muon(lr=0.1, weight_decay=0.0), {"w": torch.zeros(2, 2)}
    >>> moved, _ = optimizer.step({"w": 5.0 * torch.eye(2)}, optimizer.init(params), params)
    >>> bool((moved["w"].diagonal() < -0.06).all())
    True
    """
    schedule = lr if callable(lr) else constant(lr)
    check_scalar("momentum", momentum, lambda v: 0 <= v < 1, "in [0, 1)", "momentum=0.95")
    require_finite(weight_decay=weight_decay)

    rule = _Muon(schedule, momentum, weight_decay, nesterov, precision)
    return from_move(_muon_init, partial(_muon_move, rule))


class _Muon(NamedTuple):
    """The arguments of `muon`."""

    schedule: Schedule
    momentum: Scalar
    weight_decay: Scalar
    nesterov: bool
    precision: torch.dtype | None


def _muon_init(params: Params) -> MuonState:
    flat = {path: leaf for path, leaf in tree.flatten(params).items() if leaf.ndim < 2}
    if flat:
        raise ValueError(
            f"muon is for matrices and convolutions; got {', '.join(flat)} of fewer than two dimensions. "
            "Give those to another optimizer with partition"
        )
    return MuonState(zero_step(params), tree.map(torch.zeros_like, params))


def _muon_move(rule: _Muon, grads: Params, opt_state: MuonState, params: Params) -> tuple[Params, MuonState]:
    check_fit(grads, params, opt_state.momentum_buffer)
    share, kept = scalar_of(1 - rule.momentum), scalar_of(rule.momentum)
    buffer = tree.map(lambda b, g: b.lerp(g, share(g)), opt_state.momentum_buffer, grads)
    direction = tree.map(lambda g, b: g.lerp(b, kept(g)), grads, buffer) if rule.nesterov else buffer
    lr_now = rule.schedule(to_float64(opt_state.step))
    keep = cast_like(1 - lr_now * in_float64(rule.weight_decay, lr_now.device))

    def leaf(p: Tensor, d: Tensor) -> Tensor:
        step = orthogonalized(d, rule.precision or d.dtype).to(p.dtype)
        size = lr_now * max(1.0, p.shape[0] / math.prod(p.shape[1:])) ** 0.5
        return torch.addcmul(p * keep(p), step, cast_like(-size)(p))

    return tree.map(leaf, params, direction), MuonState(opt_state.step + 1, buffer)


def orthogonalized(update: Tensor, precision: torch.dtype) -> Tensor:
    """About `U V^T` of a matrix `U S V^T`, of the update's shape: five quintic Newton-Schulz steps."""
    a, b, c = QUINTIC
    x = update.flatten(1).to(precision)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    norm = safe_norm(x) if is_differentiated(x) else x.norm()
    x = x / norm.clamp(min=EPS)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return (x.T if tall else x).reshape(update.shape)
