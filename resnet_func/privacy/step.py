"""One private training step: clip every sample, add up, add noise once, divide by what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.numerics import to_float64, widen
from resnet_func.optim import Optimizer, ema
from resnet_func.per_sample import clipped_sum
from resnet_func.per_sample.options import Method
from resnet_func.per_sample.quantities.quantity import Clipping
from resnet_func.per_sample.transforms import ClippedSum
from resnet_func.privacy.accounting import Neighbours, check_calibrated_for, check_neighbours
from resnet_func.privacy.adaptive import AdaptiveNorm, AdaptiveState
from resnet_func.privacy.noise import COUNT, add_noise, check_noise
from resnet_func.train.trainable import check_opt_state, put_trained, select_trained, trained_leaves
from resnet_func.types import LossFn, Metrics, Model, Params, Trainable, TrainState

MaxNorm: TypeAlias = float | Mapping[str, float] | AdaptiveNorm
PrivateStep: TypeAlias = Callable[[TrainState, Any, Any, Tensor, Params], tuple[TrainState, Metrics]]

QUANTILES = {"norm_lower_quartile": 0.25, "norm_median": 0.5, "norm_upper_quartile": 0.75}
# Of metrics that are computed from the samples without noise
NOT_PRIVATE = "not_private/"


def sensitivity(
    max_norm: float | Mapping[str, float],
    clipping: Clipping = "flat",
    neighbours: Neighbours = "add-or-remove-one",
) -> float:
    """How far, in L2 norm over all leaves that are trained, neighbouring data sets can move the clipped sum.

    Every clipping bounds a sample's whole contribution by `max_norm`: "per_layer" gives each of L layers
    `max_norm / sqrt(L)`, and "automatic" normalises to below `max_norm`. Bounds by prefix add up as squares.
    Replacing a sample takes one contribution away and adds another: twice that. A transform says it of
    itself: `per_sample.clipped_sum(...).bound`.

    >>> from resnet_func import privacy
    >>> privacy.sensitivity({"": 3.0, "fc": 4.0}), privacy.sensitivity(1.0, neighbours="replace-one")
    (5.0, 2.0)
    """
    check_neighbours(neighbours)
    if isinstance(max_norm, Mapping) and clipping != "flat":
        raise ValueError(f"max_norm by prefix clips each part flat; got clipping={clipping!r}. Leave one out")
    bound = math.hypot(*max_norm.values()) if isinstance(max_norm, Mapping) else float(max_norm)
    return 2 * bound if neighbours == "replace-one" else bound


class Clipped(NamedTuple):
    """What a part of a batch gives before there is noise: NOT private.

    Attributes:
        total: The clipped sum.
        norms: Of the samples' gradients `[N]`; 0 where the mask is False.
        mask: `[N]`, as it came.
        unclipped: 0-d, half the samples that are not clipped less half of those that are.
    """

    total: Params
    norms: Tensor
    mask: Tensor
    unclipped: Tensor


class PrivateParts(NamedTuple):
    """A private step in two halves, for batches that come in parts or on many machines.

    Attributes:
        clip: `(train_state, x, y, mask) -> Clipped`, which may be called on any parts of a batch; `join` adds
            them up.
        finish: `(train_state, clipped, noise) -> train_state`, once a batch.
        measure: `(train_state, clipped) -> metrics`, with the state before the step.
    """

    clip: Callable[[TrainState, Any, Any, Tensor], Clipped]
    finish: Callable[[TrainState, Clipped, Params], TrainState]
    measure: Callable[[TrainState, Clipped], Metrics]


def join(parts: list[Clipped]) -> Clipped:
    """The parts of a batch as one.

    >>> half = torch.full((1,), 0.5)
    >>> part = Clipped({"w": torch.ones(2)}, half, half > 0, half[0])
    >>> join([part, part]).total
    {'w': tensor([2., 2.])}
    """

    def add(a: Clipped, b: Clipped) -> Clipped:
        total = tree.map(lambda x, y: widen(x) + y, a.total, b.total)
        return Clipped(
            total, torch.cat([a.norms, b.norms]), torch.cat([a.mask, b.mask]), a.unclipped + b.unclipped
        )

    return reduce(add, parts)


def make_private_step(
    model: Model,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    max_norm: MaxNorm,
    noise_multiplier: float,
    expected_batch_size: float,
    clipping: Clipping = "flat",
    neighbours: Neighbours = "add-or-remove-one",
    ema_decay: float | None = None,
    microbatch: int | None = None,
    views: bool | None = None,
    method: Method = "auto",
    check: bool | None = None,
    trainable: Trainable | None = None,
) -> PrivateStep:
    """A pure function of one step of DP-SGD (Abadi et al. 2016, https://arxiv.org/abs/1607.00133), or of DP
    with any other optimizer, which sees nothing but the noisy mean.

    `torch.compile(step, fullgraph=True)` makes it one graph: the noise is an argument, drawn outside.

    Args:
        model: A network whose samples do not meet: no BatchNorm.
        loss_fn: Per-sample loss.
        optimizer: Of `resnet_func.optim`.
        max_norm, clipping: As in `per_sample.clipped_sum`; max_norm must be finite where there is noise. Or
            an `AdaptiveNorm` (with "flat"), whose state starts in `init_private_state`.
        noise_multiplier: Standard deviation of the noise over `sensitivity(max_norm, clipping)`, a sample's
            largest contribution: that of `privacy.noise_multiplier`, for the same neighbours. 0 adds nothing,
            and is not private.
        expected_batch_size: Sampling rate times number of samples, which the sum is divided by; the size of a
            batch as drawn is private.
        neighbours: What the noise multiplier was calibrated for. The noise is the same for both: the
            accountant knows that replacing a sample moves the sum twice as far.
        ema_decay: As in `make_train_step`, of parameters that are private already.
        microbatch: Samples at a time, to bound memory; noise is added once all the same.
        views: As in `per_sample.Options`: views of a sample are averaged before its gradient is clipped.
        method, check: As in `per_sample.Options`.
        trainable: Dotted path -> whether that leaf is trained, such as a head on a network that was trained
            in public; None trains all. Gradients are clipped over these leaves, and noise is on these alone:
            the sensitivity stays `max_norm`, and fewer numbers carry the same noise. The others, and their
            moving average, come back as the same tensors. Give `init_private_state` and `gaussian_noise` the
            same function.

    Returns:
        `step(train_state, x, y, mask, noise) -> (train_state, metrics)`. `x`, `y` and `mask [N]` are a batch
        of `poisson_batches`; where the mask is False, a sample is padding and counts exactly nothing. `noise`
        is `gaussian_noise(params, seed=, step=, trainable=)`, a fresh one each step. A sample with NaN or Inf
        in its gradient counts nothing, either.

        Parameters, optimizer state, moving average and an adaptive bound are private, and so is the metric
        "max_norm". Metrics that start with "not_private/" are NOT: they are computed from the samples without
        noise, for your eyes while you develop on public data. "share_clipped": of the samples whose gradient
        is longer than the bound; "norm_lower_quartile", "norm_median", "norm_upper_quartile" of the
        gradients' norms; "signal_to_noise": norm of the clipped sum over the expected norm of the noise;
        "share_nonfinite": of the samples left out. Of an empty batch they are all 0.

    Raises:
        ValueError: an option is out of range, the noise multiplier was calibrated for other neighbours, the
            model has BatchNorm; in the step, noise that is not like the parameters, or a batch that does not
            fit together.

    >>> import torch, resnet_func as rf
    >>> model, optimizer = rf.resnet20(norm="group"), rf.optim.sgd(0.5)
    >>> rule = dict(max_norm=1.0, noise_multiplier=1.1, expected_batch_size=64)
    >>> step = rf.privacy.make_private_step(model, rf.losses.cross_entropy, optimizer, **rule)
    """
    summed = _clipped_sum(
        model,
        loss_fn,
        max_norm,
        clipping,
        microbatch=microbatch,
        views=views,
        method=method,
        check=check,
        trainable=trainable,
    )
    parts = make_private_parts(
        summed,
        optimizer,
        max_norm=max_norm,
        noise_multiplier=noise_multiplier,
        expected_batch_size=expected_batch_size,
        neighbours=neighbours,
        ema_decay=ema_decay,
    )

    return partial(_private_step, parts)


def _private_step(
    parts: PrivateParts, train_state: TrainState, x: Any, y: Any, mask: Tensor, noise: Params
) -> tuple[TrainState, Metrics]:
    clipped = parts.clip(train_state, x, y, mask)
    return parts.finish(train_state, clipped, noise), parts.measure(train_state, clipped)


def _clipped_sum(
    model: Model, loss_fn: LossFn, max_norm: MaxNorm, clipping: Clipping, **options: Any
) -> ClippedSum:
    if isinstance(max_norm, AdaptiveNorm):
        if clipping != "flat":
            raise ValueError(f"an adaptive bound clips flat; got clipping={clipping!r}. Leave one out")
        max_norm = max_norm.start
    rule: dict[str, Any] = {"max_norm": max_norm, "clipping": clipping, "nonfinite": "zero"}
    return clipped_sum(model, loss_fn, **rule, **options)


def make_private_parts(
    summed: ClippedSum,
    optimizer: Optimizer,
    *,
    max_norm: MaxNorm,
    noise_multiplier: float,
    expected_batch_size: float,
    neighbours: Neighbours = "add-or-remove-one",
    ema_decay: float | None = None,
) -> PrivateParts:
    """`make_private_step` in two halves: clip parts of a batch one by one, `join` them, and finish once.

    A part of a fixed length compiles once, however many of them a batch has; machines clip their own parts,
    and noise is added to what they have together.

    Args:
        summed: A transform of `per_sample.clipped_sum`, which states the bound that the noise is scaled by,
            and by its `trainable=` the leaves that move.
        max_norm: An `AdaptiveNorm`, or what the transform was made with.
        optimizer, noise_multiplier, expected_batch_size, neighbours, ema_decay: As in `make_private_step`.

    Raises:
        ValueError: as in `make_private_step`, or `max_norm` is not the transform's.

    >>> import resnet_func as rf
    >>> model, rule = rf.resnet20(norm="group"), {"noise_multiplier": 1.1, "expected_batch_size": 64}
    >>> summed = rf.per_sample.clipped_sum(model, rf.losses.cross_entropy, max_norm=1.0, nonfinite="zero")
    >>> parts = rf.privacy.make_private_parts(summed, rf.optim.sgd(0.5), max_norm=1.0, **rule)
    """
    adaptive = max_norm if isinstance(max_norm, AdaptiveNorm) else None
    _check_bound(summed, max_norm)
    _check(noise_multiplier, expected_batch_size, summed.bound, neighbours, ema_decay)
    rule = _PrivateRule(
        summed, optimizer, adaptive, float(noise_multiplier), float(expected_batch_size), ema_decay
    )
    return PrivateParts(rule.clip, rule.finish, rule.measure)


@dataclass(frozen=True)
class _PrivateRule:
    """The arguments of `make_private_parts`, whose methods other processes can be sent."""

    summed: ClippedSum
    optimizer: Optimizer
    adaptive: AdaptiveNorm | None
    noise_multiplier: float
    expected_batch_size: float
    ema_decay: float | None

    @property
    def ratio(self) -> float:
        """The noise of the sum, over the bound."""
        adaptive = self.adaptive
        return adaptive.sum_multiplier(self.noise_multiplier) if adaptive else self.noise_multiplier

    def bound_of(self, train_state: TrainState) -> float | Tensor:
        if self.adaptive is None:
            return self.summed.bound
        if not isinstance(train_state.opt_state, AdaptiveState):
            raise ValueError(
                "an adaptive bound has a state of its own; got an optimizer's alone. Begin with "
                "privacy.init_private_state(params, state, optimizer, max_norm=)"
            )
        return train_state.opt_state.max_norm

    def std_of(self, train_state: TrainState) -> float | Tensor:
        return self.ratio * self.bound_of(train_state) if self.noise_multiplier else 0.0  # not 0 * inf

    def clip(self, train_state: TrainState, x: Any, y: Any, mask: Tensor) -> Clipped:
        bound = self.bound_of(train_state)
        chosen = bound if isinstance(bound, Tensor) else None
        total, norms = self.summed(train_state.params, train_state.state, x, y, mask, max_norm=chosen)
        counted = mask & norms.isfinite()
        half = torch.where(norms <= bound, 0.5, -0.5)
        return Clipped(total, norms, mask, torch.where(counted, half, 0.0).sum())

    def finish(self, train_state: TrainState, clipped: Clipped, noise: Params) -> TrainState:
        params, state, opt_state, ema_params, ema_state = train_state
        trainable, drawn = self.summed.settings.trainable, tree.flatten(noise)
        leaves = trained_leaves(params, trainable)
        trained = select_trained(params, leaves)
        inner = opt_state.optimizer if self.adaptive else opt_state
        check_noise(drawn, leaves, adaptive=self.adaptive is not None)
        check_opt_state(inner, params, trained)
        noisy = add_noise(tree.flatten(clipped.total), drawn, self.std_of(train_state))
        mean = {
            path: (noisy[path] / self.expected_batch_size).to(leaf.dtype) for path, leaf in leaves.items()
        }
        moved, inner = self.optimizer.step(tree.replace(trained, mean), inner, trained)
        if self.adaptive:
            count = clipped.unclipped + self.adaptive.count_std(self.noise_multiplier) * drawn[COUNT]
            bound = self.adaptive.move(opt_state.max_norm, count, self.expected_batch_size)
            opt_state = AdaptiveState(inner.step, bound, inner)
        else:
            opt_state = inner
        if self.ema_decay is not None and tree.flatten(ema_params):
            steps = to_float64(opt_state.step)
            decay = torch.clamp((1 + steps) / (10 + steps), max=self.ema_decay)
            before = select_trained(ema_params, leaves)
            ema_params = put_trained(ema_params, ema(before, moved, decay), before)
        return TrainState(put_trained(params, moved, trained), state, opt_state, ema_params, ema_state)

    def measure(self, train_state: TrainState, clipped: Clipped) -> Metrics:
        bound = self.bound_of(train_state)
        found = _metrics(clipped, bound, self.std_of(train_state))
        marked = {f"{NOT_PRIVATE}{name}": value for name, value in found.items()}
        return {**marked, **({"max_norm": bound} if isinstance(bound, Tensor) else {})}


def _metrics(clipped: Clipped, bound: float | Tensor, std: float | Tensor) -> Metrics:
    total, norms, mask, _ = clipped
    with torch.no_grad():
        signal = tree.norm(total)
        finite = mask & norms.isfinite()
        count = mask.sum().clamp(min=1)
        usable = finite.sum()
        ordered = torch.where(finite, norms, math.inf).sort().values
        found = {
            "share_clipped": (finite & (norms > bound)).sum() / count,
            "share_nonfinite": (mask & ~finite).sum() / count,
            # without signal it is 0, also without noise
            "signal_to_noise": torch.where(signal > 0, signal / (std * math.sqrt(tree.size(total))), 0),
        }
        for name, level in QUANTILES.items():  # nearest rank
            place = (level * (usable - 1)).round().clamp(min=0).to(torch.int64)
            found[name] = torch.where(usable > 0, ordered.take(place), 0)
        return found


def _check_bound(summed: ClippedSum, max_norm: MaxNorm) -> None:
    stated = max_norm.start if isinstance(max_norm, AdaptiveNorm) else max_norm
    if stated != summed.max_norm:
        raise ValueError(
            f"noise would be scaled by max_norm={stated}, but the transform clips at {summed.max_norm}. "
            "Give both the same"
        )


def _check(
    noise_multiplier: float,
    expected_batch_size: float,
    bound: float,
    neighbours: Neighbours,
    ema_decay: float | None,
) -> None:
    check_neighbours(neighbours)
    check_calibrated_for(noise_multiplier, neighbours)
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be 0 or more and finite; got {noise_multiplier}")
    if not 0 < expected_batch_size < math.inf:
        raise ValueError(
            f"expected_batch_size must be above 0; got {expected_batch_size}. It is the sampling rate times "
            "the number of samples"
        )
    if noise_multiplier and not 0 < bound < math.inf:
        raise ValueError(f"max_norm must be above 0 and finite where there is noise; got a bound of {bound}")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1); got {ema_decay}. Use None for no average")
