"""SGD, Adam and AdamW as pure functions, equal to `torch.optim` to the bit.

Step counter and learning rate are 0-d tensors, so a compiled step never recompiles. Two things in the
arithmetic look odd, and are what keeps every bit (eager on CPU, against `foreach=False`):

- torch's `p.add_(d, alpha=-lr)` is one fused multiply-add. `p + (-lr * d)` rounds twice, and differs in
  up to a fifth of all entries. `torch.addcmul(p, d, -lr)` takes lr as a tensor and rounds once.
- `p + u` cannot reach every value: in fp32, no u takes p = -1 to 1e-9. So an update is the unevaluated sum
  of two terms, see `Updates`.

Every hyper-parameter may be a 0-d tensor: it is not checked, can be differentiated and mapped over, and
computes as the number it holds would, to round-off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.autodiff import is_differentiated
from resnet_func.numerics import cast_like, safe_sqrt, to_float64
from resnet_func.optim.base import (
    Optimizer,
    Scalar,
    Updates,
    check_fit,
    from_move,
    in_float64,
    may_be_nonzero,
    scalar_of,
    zero_step,
)
from resnet_func.optim.schedules import Schedule, check_scalar, constant, require, require_finite
from resnet_func.types import Params

DecayMask: TypeAlias = Callable[[str], bool] | None
Betas: TypeAlias = tuple[Scalar, Scalar]


class SGDState(NamedTuple):
    """`step`: updates done, 0-d int64. `momentum_buffer`: like params; `{}` without momentum."""

    step: Tensor
    momentum_buffer: Params


class AdamState(NamedTuple):
    """`step`: updates done, 0-d int64. `exp_avg`, `exp_avg_sq`: the two moments, like params."""

    step: Tensor
    exp_avg: Params
    exp_avg_sq: Params


def sgd(
    lr: Scalar | Schedule,
    momentum: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    nesterov: bool = False,
    decay_mask: DecayMask = None,
) -> Optimizer:
    """Stochastic gradient descent, bitwise `torch.optim.SGD` (no dampening).

    Args:
        lr: Learning rate, or a schedule of it; the first update sees step 0.
        momentum: In [0, 1); torch's form, `buffer = momentum * buffer + g`.
        weight_decay: Adds `weight_decay * p` to the gradient (L2, not decoupled).
        nesterov: Step along `g + momentum * buffer` instead of `buffer`.
        decay_mask: Dotted path -> whether that leaf decays; None means every leaf.

    `lr`, `momentum` and `weight_decay` may be 0-d tensors, to differentiate or map over.

    Raises:
        ValueError: A hyper-parameter is out of range; in `update`, grads or state do not fit params.

    Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".

    >>> optimizer, params = sgd(lr=0.1, momentum=0.9), {"w": torch.tensor([1.0, 2.0])}
    >>> params, opt_state = optimizer.step({"w": torch.ones(2)}, optimizer.init(params), params)
    >>> params
    {'w': tensor([0.9000, 1.9000])}
    """
    schedule = lr if callable(lr) else constant(lr)
    check_scalar("momentum", momentum, lambda v: 0 <= v < 1, "in [0, 1)", "momentum=0.9")
    require_finite(weight_decay=weight_decay)
    has_momentum = may_be_nonzero(momentum)
    require("momentum", momentum, not nesterov or has_momentum, "> 0 with nesterov=True", "momentum=0.9")

    rule = _SGD(schedule, momentum, weight_decay, nesterov, decay_mask)
    return from_move(partial(_sgd_init, rule), partial(_sgd_move, rule))


class _SGD(NamedTuple):
    """The arguments of `sgd`."""

    schedule: Schedule
    momentum: Scalar
    weight_decay: Scalar
    nesterov: bool
    decay_mask: DecayMask


def _sgd_init(rule: _SGD, params: Params) -> SGDState:
    return SGDState(
        zero_step(params), tree.map(torch.zeros_like, params) if may_be_nonzero(rule.momentum) else {}
    )


def _sgd_move(rule: _SGD, grads: Params, opt_state: SGDState, params: Params) -> tuple[Params, SGDState]:
    has_momentum, has_decay = may_be_nonzero(rule.momentum), may_be_nonzero(rule.weight_decay)
    buffers = [opt_state.momentum_buffer] if has_momentum else []
    check_fit(grads, params, *buffers)
    minus_lr = cast_like(-rule.schedule(to_float64(opt_state.step)))
    momentum_of, decay_of = scalar_of(rule.momentum), scalar_of(rule.weight_decay)

    # All of a leaf at once, while it is in the cache.
    def leaf(p: Tensor, g: Tensor, decays: bool, *buffer: Tensor) -> tuple[Tensor, ...]:
        if has_decay and decays:
            g = _add_scaled(g, p, decay_of(p))
        if not buffer:
            return (torch.addcmul(p, g, minus_lr(p)),)
        # From zeros, the first buffer is g to the bit: what torch.optim stores.
        b = buffer[0] * momentum_of(p) + g
        direction = _add_scaled(g, b, momentum_of(p)) if rule.nesterov else b
        return torch.addcmul(p, direction, minus_lr(p)), b

    decays = _decays(params, rule.decay_mask)
    moved, *buffers = tree.map_unzip(leaf, 1 + len(buffers), params, grads, decays, *buffers)
    return moved, SGDState(opt_state.step + 1, buffers[0] if has_momentum else {})


def adam(
    lr: Scalar | Schedule,
    betas: Betas = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    decay_mask: DecayMask = None,
) -> Optimizer:
    """Adam, bitwise `torch.optim.Adam` (no amsgrad).

    Args:
        lr: Learning rate, or a schedule of it; the first update sees step 0.
        betas: How much of the first and the second moment is kept, each in [0, 1).
        eps: Added to the root of the second moment, after its bias correction.
        weight_decay: Adds `weight_decay * p` to the gradient (L2, not decoupled).
        decay_mask: Dotted path -> whether that leaf decays; None means every leaf.

    `lr`, both of `betas`, `eps` and `weight_decay` may be 0-d tensors, to differentiate or map over. Where
    the second moment is 0, the derivative of its root counts as 0, so derivatives stay finite.

    Raises:
        ValueError: A hyper-parameter is out of range; in `update`, grads or state do not fit params.

    Kingma and Ba 2015, https://arxiv.org/abs/1412.6980.

    >>> optimizer, params = adam(lr=0.1), {"w": torch.tensor([1.0, 2.0])}
    >>> params, opt_state = optimizer.step({"w": torch.tensor([3.0, -5.0])}, optimizer.init(params), params)
    >>> params
    {'w': tensor([0.9000, 2.1000])}
    """
    return _adam(lr, betas, eps, weight_decay, decay_mask, decoupled=False)


def adamw(
    lr: Scalar | Schedule,
    betas: Betas = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-2,
    decay_mask: DecayMask = None,
) -> Optimizer:
    """Adam with decoupled weight decay, bitwise `torch.optim.AdamW` (no amsgrad).

    Args:
        lr, betas, eps, decay_mask: As in `adam`, which also says what raises.
        weight_decay: Parameters shrink by `1 - lr * weight_decay` before each step.

    Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.

    >>> optimizer, params = adamw(lr=0.1, weight_decay=0.5), {"w": torch.tensor([1.0, 2.0])}
    >>> optimizer.step({"w": torch.zeros(2)}, optimizer.init(params), params)[0]
    {'w': tensor([0.9500, 1.9000])}
    """
    return _adam(lr, betas, eps, weight_decay, decay_mask, decoupled=True)


def _adam(
    lr: Scalar | Schedule, betas: Betas, eps: Scalar, weight_decay: Scalar, mask: DecayMask, decoupled: bool
) -> Optimizer:
    schedule = lr if callable(lr) else constant(lr)
    _check_betas(betas)
    require_finite(eps=eps, weight_decay=weight_decay)
    rule = _Adam(schedule, betas, eps, weight_decay, mask, decoupled)
    if rule.has_decay and decoupled:
        return from_move(_adam_init, partial(_adam_move, rule))
    return Optimizer(_adam_init, partial(_adam_update, rule))


class _Adam(NamedTuple):
    """The arguments of `adam` and `adamw`."""

    schedule: Schedule
    betas: Betas
    eps: Scalar
    weight_decay: Scalar
    mask: DecayMask
    decoupled: bool

    @property
    def has_decay(self) -> bool:
        return may_be_nonzero(self.weight_decay)


def _adam_init(params: Params) -> AdamState:
    first, second = (tree.map(torch.zeros_like, params) for _ in range(2))
    return AdamState(zero_step(params), first, second)


def _adam_deltas(
    rule: _Adam, grads: Params, opt_state: AdamState, params: Params, lr_now: Tensor, decays: Params
) -> tuple[Params, AdamState]:
    """The moves of the gradients alone, and the new moments."""
    moments = opt_state.exp_avg, opt_state.exp_avg_sq
    check_fit(grads, params, *moments)
    count = to_float64(opt_state.step + 1)
    beta1, beta2 = (in_float64(beta, count.device) for beta in rule.betas)
    minus_size = cast_like(-(lr_now / (1 - beta1**count)))
    bias2 = 1 - beta2**count
    # torch.optim takes Python's pow(bias2, 0.5), whose last bit is not always that of sqrt.
    root2 = cast_like(torch.pow(bias2, torch.full_like(bias2, 0.5)))
    keep2, eps_of, decay_of = scalar_of(beta2), scalar_of(rule.eps), scalar_of(rule.weight_decay)
    share1, share2 = scalar_of(1 - beta1), scalar_of(1 - beta2)

    def leaf(p: Tensor, g: Tensor, m: Tensor, v: Tensor, decays: bool) -> tuple[Tensor, ...]:
        if rule.has_decay and decays and not rule.decoupled:
            g = _add_scaled(g, p, decay_of(p))
        m = torch.lerp(m, g, share1(p))
        v = _add_scaled_square(v * keep2(p), g, share2(p))
        root = safe_sqrt(v) if is_differentiated(v) else v.sqrt()
        return m * minus_size(p) / (root / root2(p) + eps_of(p)), m, v

    delta, first, second = tree.map_unzip(leaf, 3, params, grads, *moments, decays)
    return delta, AdamState(opt_state.step + 1, first, second)


def _adam_update(
    rule: _Adam, grads: Params, opt_state: AdamState, params: Params
) -> tuple[Updates, AdamState]:
    lr_now = rule.schedule(to_float64(opt_state.step))
    delta, new_state = _adam_deltas(rule, grads, opt_state, params, lr_now, _decays(params, rule.mask))
    return Updates(delta, {}), new_state  # params + delta is what torch.optim computes


def _adam_move(rule: _Adam, grads: Params, opt_state: AdamState, params: Params) -> tuple[Params, AdamState]:
    lr_now, decays = rule.schedule(to_float64(opt_state.step)), _decays(params, rule.mask)
    delta, new_state = _adam_deltas(rule, grads, opt_state, params, lr_now, decays)
    keep = cast_like(1 - lr_now * in_float64(rule.weight_decay, lr_now.device))

    def leaf(p: Tensor, d: Tensor, decays: bool) -> Tensor:
        return (p * keep(p) if decays else p) + d

    return tree.map(leaf, params, delta, decays), new_state


def _check_betas(betas: Betas) -> None:
    numbers = [beta for beta in betas if not isinstance(beta, Tensor)]
    ok = all(0 <= beta < 1 for beta in numbers)
    require("betas", betas, ok, "both in [0, 1)", "betas=(0.9, 0.999)")
    for beta in betas:
        check_scalar("betas", beta, lambda v: True, "", "betas=(0.9, 0.999)")


def _add_scaled(x: Tensor, y: Tensor, scale: Scalar) -> Tensor:
    """`x + scale * y`, rounded once."""
    return torch.addcmul(x, y, scale) if isinstance(scale, Tensor) else x.add(y, alpha=scale)


def _add_scaled_square(x: Tensor, y: Tensor, scale: Scalar) -> Tensor:
    """`x + scale * y**2`."""
    if isinstance(scale, Tensor):
        return torch.addcmul(x, y * scale, y)
    return torch.addcmul(x, y, y, value=scale)


def _decays(params: Params, mask: DecayMask) -> Any:
    """Whether each leaf decays, as a tree like params."""
    return tree.map_with_path(lambda path, leaf: mask is None or bool(mask(path)), params)
