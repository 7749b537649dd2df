"""What is built from optimizers and around them: two for one tree, clipped gradients, moving averages."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.autodiff import is_differentiated
from resnet_func.numerics import cast_like, safe_norm, widen
from resnet_func.optim.base import Optimizer, Scalar, Updates, check_fit, zero_step
from resnet_func.optim.schedules import check_scalar, require
from resnet_func.types import Params

Half: TypeAlias = Callable[[Params, Any, Params], tuple[Any, Any]]


class PartitionState(NamedTuple):
    """`step`: updates done, 0-d int64. `chosen`, `rest`: the states of the two optimizers."""

    step: Tensor
    chosen: Any
    rest: Any


def partition(where: Callable[[str], bool], chosen: Optimizer, rest: Optimizer) -> Optimizer:
    """One optimizer for the leaves whose dotted path `where` accepts, another for the rest.

    Each sees its own leaves as a tree, under their own names. What either raises, this raises.

    >>> from resnet_func.optim import adam, sgd
    >>> both = partition(lambda path: "conv" in path, sgd(0.1), adam(1e-3))
    >>> both.init({"conv": torch.ones(2, 2), "bias": torch.ones(2)}).rest.exp_avg
    {'bias': tensor([0., 0.])}
    """
    both = _Partition(where, chosen, rest)
    return Optimizer(partial(_init_both, both), partial(_update_both, both), partial(_move_both, both))


class _Partition(NamedTuple):
    """The arguments of `partition`."""

    where: Callable[[str], bool]
    chosen: Optimizer
    rest: Optimizer

    def split(self, params: Params) -> tuple[Params, Params]:
        """The leaves of each."""
        flat = tree.flatten(params)
        ours = {path: leaf for path, leaf in flat.items() if self.where(path)}
        theirs = {path: leaf for path, leaf in flat.items() if path not in ours}
        return tree.unflatten(ours), tree.unflatten(theirs)


def _init_both(both: _Partition, params: Params) -> PartitionState:
    ours, theirs = both.split(params)
    return PartitionState(zero_step(params), both.chosen.init(ours), both.rest.init(theirs))


def _update_both(
    both: _Partition, grads: Params, opt_state: PartitionState, params: Params
) -> tuple[Updates, PartitionState]:
    halves = both.chosen.update, both.rest.update
    first, second, new_state = _each_half(both, halves, grads, opt_state, params)
    return Updates(*(_joined(a, b, params) for a, b in zip(first, second, strict=True))), new_state


def _move_both(
    both: _Partition, grads: Params, opt_state: PartitionState, params: Params
) -> tuple[Params, PartitionState]:
    halves = both.chosen.step, both.rest.step
    first, second, new_state = _each_half(both, halves, grads, opt_state, params)
    return _joined(first, second, params), new_state


def _each_half(
    both: _Partition, halves: tuple[Half, Half], grads: Params, opt_state: PartitionState, params: Params
) -> tuple[Any, Any, PartitionState]:
    """What the two halves make of their leaves, and the new state."""
    check_fit(grads, params)
    (our_grads, their_grads), (our_params, their_params) = both.split(grads), both.split(params)
    first, our_state = halves[0](our_grads, opt_state.chosen, our_params)
    second, their_state = halves[1](their_grads, opt_state.rest, their_params)
    return first, second, PartitionState(opt_state.step + 1, our_state, their_state)


def _joined(a: Params, b: Params, params: Params) -> Params:
    """Two halves of an update as one tree like params, zeros for a half that is `{}`; `{}` if both are."""
    flat = {**tree.flatten(a), **tree.flatten(b)}
    if not flat:
        return {}
    return tree.map_with_path(lambda path, p: flat[path] if path in flat else torch.zeros_like(p), params)


def clip_by_global_norm(grads: Params, max_norm: Scalar) -> tuple[Params, Tensor]:
    """Scale all gradients by one factor, so that their joint L2 norm is at most `max_norm`.

    The factor is that of `torch.nn.utils.clip_grad_norm_`: `min(1, max_norm / (norm + 1e-6))`. For leaves
    narrower than float32, norm and product are computed in float32, and each entry is rounded once: the norm
    of what comes out exceeds `max_norm` by half an epsilon of their dtype at most.

    Args:
        grads: Any pytree.
        max_norm: >= 0; or a 0-d tensor, unchecked, to differentiate or map over.

    Returns:
        The clipped gradients, and the 0-d norm before clipping, whose derivative at zero gradients counts as
        zero. `max_norm=0` gives zeros, a zero gradient
        stays zero, a tree without leaves has norm 0; one NaN makes everything NaN, one inf zeros and NaN.

    Raises:
        ValueError: `max_norm` is negative or NaN.

    Pascanu et al. 2013, https://arxiv.org/abs/1211.5063.

    >>> clip_by_global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, max_norm=2.5)
    ({'a': tensor([1.5000]), 'b': tensor([2.0000])}, tensor(5.))
    """
    remedy = "max_norm=1.0, or math.inf for no clipping"
    check_scalar("max_norm", max_norm, lambda v: v >= 0, ">= 0", remedy)
    norm = _global_norm([widen(g) for g in tree.leaves(grads)])
    factor_of = cast_like(_clip_factor(norm, max_norm))

    def scale(g: Tensor) -> Tensor:
        wide = widen(g)
        return (wide * factor_of(wide)).to(g.dtype)

    return tree.map(scale, grads), norm


def _global_norm(leaves: list[Tensor]) -> Tensor:
    if not leaves:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    # the plain norm's second derivative at 0 is NaN; the safe one takes more passes over memory
    norms = [safe_norm(x) if is_differentiated(x) else torch.linalg.vector_norm(x) for x in leaves]
    joined = torch.stack(norms)
    return safe_norm(joined) if is_differentiated(joined) else torch.linalg.vector_norm(joined)


def _clip_factor(norm: Tensor, max_norm: Scalar) -> Tensor:
    if isinstance(max_norm, Tensor):
        max_norm = max_norm.to(norm.dtype).to(norm.device)
    elif max_norm == math.inf:  # what the quotient is, without its infinite derivative
        return torch.where(norm.isfinite(), torch.ones_like(norm), torch.full_like(norm, math.nan))
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def clipped(optimizer: Optimizer, max_norm: Scalar) -> Optimizer:
    """`optimizer`, fed with gradients that went through `clip_by_global_norm`, which says what raises.

    >>> from resnet_func.optim import sgd
    >>> optimizer, params = clipped(sgd(lr=1.0), max_norm=1.0), {"w": torch.zeros(2)}
    >>> optimizer.step({"w": torch.tensor([3.0, -4.0])}, optimizer.init(params), params)[0]
    {'w': tensor([-0.6000,  0.8000])}
    """
    clip_by_global_norm({}, max_norm)  # an error now, not at the first step
    given = (optimizer, max_norm)
    return Optimizer(optimizer.init, partial(_update_clipped, *given), partial(_move_clipped, *given))


def _update_clipped(
    optimizer: Optimizer, max_norm: Scalar, grads: Params, opt_state: Any, params: Params
) -> tuple[Updates, Any]:
    return optimizer.update(clip_by_global_norm(grads, max_norm)[0], opt_state, params)


def _move_clipped(
    optimizer: Optimizer, max_norm: Scalar, grads: Params, opt_state: Any, params: Params
) -> tuple[Params, Any]:
    return optimizer.step(clip_by_global_norm(grads, max_norm)[0], opt_state, params)


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

    >>> ema({"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}, decay=0.75)
    {'w': tensor(1.5000)}
    """
    require("decay", decay, isinstance(decay, Tensor) or 0 <= decay <= 1, "in [0, 1]", "decay=0.999")
    share = cast_like(1 - decay) if isinstance(decay, Tensor) else lambda leaf: 1 - decay

    def mix(old: Tensor, new: Tensor) -> Tensor:
        if not old.is_floating_point():
            return new.clone()  # no output is another: a compiled step would be traced anew for the alias
        return torch.lerp(old, new, share(old))

    return tree.map(mix, average, params)
