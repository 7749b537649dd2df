"""Optimizers and learning-rate schedules as pure functions, equal to `torch.optim` to the bit.

Step counter and learning rate are 0-d tensors, so a compiled step never recompiles. Two things in the
arithmetic look odd, and are what keeps every bit (eager on CPU, against `foreach=False`):

- torch's `p.add_(d, alpha=-lr)` is one fused multiply-add. `p + (-lr * d)` rounds twice, and differs in
  up to a fifth of all entries. `torch.addcmul(p, d, -lr)` takes lr as a tensor and rounds once.
- `p + u` cannot reach every value: in fp32, no u takes p = -1 to 1e-9. So an update is the unevaluated sum
  of two terms, see `Updates`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.optim.base import Optimizer, Updates, apply_updates, check_fit, moving, zero_step  # noqa: F401
from resnet_func.optim.muon import muon, partition  # noqa: F401
from resnet_func.optim.schedules import Schedule, constant, cosine, one_cycle, require, require_finite, step  # noqa: F401
from resnet_func.types import Params

DecayMask: TypeAlias = Callable[[str], bool] | None
Betas: TypeAlias = tuple[float, float]


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
    lr: float | Schedule,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
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

    Raises:
        ValueError: A hyper-parameter is out of range; in `update`, grads do not fit params.

    Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """
    schedule = lr if callable(lr) else constant(lr)
    require("momentum", momentum, 0 <= momentum < 1, "in [0, 1)", "momentum=0.9")
    require_finite(weight_decay=weight_decay)
    require("momentum", momentum, not nesterov or momentum > 0, "> 0 with nesterov=True", "momentum=0.9")

    def init(params: Params) -> SGDState:
        return SGDState(zero_step(params), tree.map(torch.zeros_like, params) if momentum else {})

    def move(grads: Params, opt_state: SGDState, params: Params) -> tuple[Params, SGDState]:
        check_fit(grads, params)
        minus_lr = by_dtype(-schedule(opt_state.step.to(torch.float64)))

        # All of a leaf at once, while it is in the cache.
        def leaf(p: Tensor, g: Tensor, decays: bool, *buffer: Tensor) -> tuple[Tensor, ...]:
            if weight_decay and decays:
                g = g.add(p, alpha=weight_decay)
            if not buffer:
                return (torch.addcmul(p, g, minus_lr(p.dtype)),)
            # From zeros, the first buffer is g to the bit: what torch.optim stores.
            b = buffer[0] * momentum + g
            direction = g.add(b, alpha=momentum) if nesterov else b
            return torch.addcmul(p, direction, minus_lr(p.dtype)), b

        buffers = [opt_state.momentum_buffer] if momentum else []
        decays = _decays(params, decay_mask)
        moved, *buffers = tree.map_unzip(leaf, 1 + len(buffers), params, grads, decays, *buffers)
        return moved, SGDState(opt_state.step + 1, buffers[0] if momentum else {})

    return moving(init, move)


def adam(
    lr: float | Schedule,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_mask: DecayMask = None,
) -> Optimizer:
    """Adam, bitwise `torch.optim.Adam` (no amsgrad).

    Args:
        lr: Learning rate, or a schedule of it; the first update sees step 0.
        betas: How much of the first and the second moment is kept, each in [0, 1).
        eps: Added to the root of the second moment, after its bias correction.
        weight_decay: Adds `weight_decay * p` to the gradient (L2, not decoupled).
        decay_mask: Dotted path -> whether that leaf decays; None means every leaf.

    Raises:
        ValueError: A hyper-parameter is out of range; in `update`, grads do not fit params.

    Kingma and Ba 2015, https://arxiv.org/abs/1412.6980.
    """
    return _adam(lr, betas, eps, weight_decay, decay_mask, decoupled=False)


def adamw(
    lr: float | Schedule,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decay_mask: DecayMask = None,
) -> Optimizer:
    """Adam with decoupled weight decay, bitwise `torch.optim.AdamW` (no amsgrad).

    Args:
        lr, betas, eps, decay_mask: As in `adam`, which also says what raises.
        weight_decay: Parameters shrink by `1 - lr * weight_decay` before each step.

    Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.
    """
    return _adam(lr, betas, eps, weight_decay, decay_mask, decoupled=True)


def clip_by_global_norm(grads: Params, max_norm: float) -> tuple[Params, Tensor]:
    """Scale all gradients by one factor, so that their joint L2 norm is at most `max_norm`.

    The factor is that of `torch.nn.utils.clip_grad_norm_`: `min(1, max_norm / (norm + 1e-6))`.

    Returns:
        The clipped gradients, and the 0-d norm before clipping. `max_norm=0` gives zeros, a zero gradient
        stays zero, a tree without leaves has norm 0; one NaN makes everything NaN, one inf zeros and NaN.

    Raises:
        ValueError: `max_norm` is negative or NaN.

    Pascanu et al. 2013, https://arxiv.org/abs/1211.5063.
    """
    require("max_norm", max_norm, max_norm >= 0, ">= 0", "max_norm=1.0, or math.inf for no clipping")
    norms = [torch.linalg.vector_norm(g) for g in tree.leaves(grads)]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return tree.map(lambda g: g * factor.to(g.dtype), grads), norm


def clipped(optimizer: Optimizer, max_norm: float) -> Optimizer:
    """`optimizer`, fed with gradients that went through `clip_by_global_norm`, which says what raises."""
    clip_by_global_norm({}, max_norm)  # an error now, not at the first step

    def update(grads: Params, opt_state: Any, params: Params) -> tuple[Updates, Any]:
        return optimizer.update(clip_by_global_norm(grads, max_norm)[0], opt_state, params)

    def move(grads: Params, opt_state: Any, params: Params) -> tuple[Params, Any]:
        return optimizer.step(clip_by_global_norm(grads, max_norm)[0], opt_state, params)

    return Optimizer(optimizer.init, update, move)


def ema(average: Params, params: Params, decay: float | Tensor) -> Params:
    """Exponential moving average, `decay * average + (1 - decay) * params`, leaf by leaf.

    Computed as `lerp(average, params, 1 - decay)`: bitwise `torch.optim.swa_utils.get_ema_multi_avg_fn`.
    Leaves that are not floating point (counters) take the newest value.

    Args:
        average, params: Trees of the same structure.
        decay: Share of the average that is kept, in [0, 1]. A 0-d tensor, unchecked, may change with time.

    Raises:
        ValueError: `decay` is outside [0, 1].

    Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging".
    """
    require("decay", decay, isinstance(decay, Tensor) or 0 <= decay <= 1, "in [0, 1]", "decay=0.999")
    share = by_dtype(1 - decay) if isinstance(decay, Tensor) else lambda dtype: 1 - decay

    def mix(old: Tensor, new: Tensor) -> Tensor:
        if not old.is_floating_point():
            return new.clone()  # no output is another: a compiled step would be traced anew for the alias
        return torch.lerp(old, new, share(old.dtype))

    return tree.map(mix, average, params)


def _adam(
    lr: float | Schedule, betas: Betas, eps: float, weight_decay: float, mask: DecayMask, decoupled: bool
) -> Optimizer:
    schedule = lr if callable(lr) else constant(lr)
    require("betas", betas, all(0 <= beta < 1 for beta in betas), "both in [0, 1)", "betas=(0.9, 0.999)")
    require_finite(eps=eps, weight_decay=weight_decay)

    def init(params: Params) -> AdamState:
        first, second = (tree.map(torch.zeros_like, params) for _ in range(2))
        return AdamState(zero_step(params), first, second)

    def deltas(
        grads: Params, opt_state: AdamState, params: Params, lr_now: Tensor, decays: Params
    ) -> tuple[Params, AdamState]:
        """The moves of the gradients alone, and the new moments."""
        check_fit(grads, params)
        (beta1, beta2), count = betas, (opt_state.step + 1).to(torch.float64)
        minus_size = by_dtype(-(lr_now / (1 - beta1**count)))
        bias2 = 1 - beta2**count
        # torch.optim takes Python's pow(bias2, 0.5), whose last bit is not always that of sqrt.
        root2 = by_dtype(torch.pow(bias2, torch.full_like(bias2, 0.5)))

        def leaf(p: Tensor, g: Tensor, m: Tensor, v: Tensor, decays: bool) -> tuple[Tensor, ...]:
            if weight_decay and decays and not decoupled:
                g = g.add(p, alpha=weight_decay)
            m = torch.lerp(m, g, 1 - beta1)
            v = torch.addcmul(v * beta2, g, g, value=1 - beta2)
            return m * minus_size(m.dtype) / (v.sqrt() / root2(v.dtype) + eps), m, v

        moments = opt_state.exp_avg, opt_state.exp_avg_sq
        delta, first, second = tree.map_unzip(leaf, 3, params, grads, *moments, decays)
        return delta, AdamState(opt_state.step + 1, first, second)

    def update(grads: Params, opt_state: AdamState, params: Params) -> tuple[Updates, AdamState]:
        lr_now = schedule(opt_state.step.to(torch.float64))
        delta, new_state = deltas(grads, opt_state, params, lr_now, _decays(params, mask))
        return Updates(delta, {}), new_state  # params + delta is what torch.optim computes

    def move(grads: Params, opt_state: AdamState, params: Params) -> tuple[Params, AdamState]:
        lr_now, decays = schedule(opt_state.step.to(torch.float64)), _decays(params, mask)
        delta, new_state = deltas(grads, opt_state, params, lr_now, decays)
        keep = by_dtype(1 - lr_now * weight_decay)

        def leaf(p: Tensor, d: Tensor, decays: bool) -> Tensor:
            return (p * keep(p.dtype) if decays else p) + d

        return tree.map(leaf, params, delta, decays), new_state

    return moving(init, move) if weight_decay and decoupled else Optimizer(init, update)


def by_dtype(value: Tensor) -> Callable[[torch.dtype], Tensor]:
    """A 0-d tensor cast to the dtype of a leaf, once for each dtype."""
    casts: dict[torch.dtype, Tensor] = {}

    def cast(dtype: torch.dtype) -> Tensor:
        if dtype not in casts:
            casts[dtype] = value.to(dtype)  # a 0-d leaf would become float64, and under vmap every one
        return casts[dtype]

    return cast


def _decays(node: Any, mask: DecayMask, path: str = "") -> Any:
    """A tree like params that says which leaves decay."""
    if isinstance(node, Mapping):
        return {key: _decays(child, mask, f"{path}.{key}" if path else key) for key, child in node.items()}
    return None if node is None else mask is None or bool(mask(path))
