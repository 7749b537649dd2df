"""A clipping bound that follows a quantile of the gradients' norms, at a share of the privacy budget.

Andrew et al. 2021 (https://arxiv.org/abs/1905.03871): each step also releases, with noise, how many of its
samples were not clipped, and the bound moves until that is the wanted share. The count and the sum are one
Gaussian mechanism of the stated noise multiplier, so that the accountant need not know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_func.optim import Optimizer
from resnet_func.train import init_train_state
from resnet_func.types import Params, State, Trainable, TrainState


@dataclass(frozen=True)
class AdaptiveNorm:
    """A bound that adapts, in place of a number `max_norm`.

    Args:
        start: The bound of the first step, above 0.
        quantile: Share of the gradients that should be shorter than the bound, in (0, 1).
        learning_rate: By how much, in logarithms, a share that is off by one moves the bound.
        budget_share: The count's share of the budget, in (0, 1): of `1 / noise_multiplier ** 2`. The sum's
            noise grows by `1 / sqrt(1 - budget_share)`.

    >>> AdaptiveNorm(start=1.0, budget_share=0.36).sum_multiplier(0.8)
    1.0
    """

    start: float = 1.0
    quantile: float = 0.5
    learning_rate: float = 0.2
    budget_share: float = 0.01

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("start", 0 < self.start < math.inf, "above 0 and finite"),
            ("quantile", 0 < self.quantile < 1, "in (0, 1)"),
            ("learning_rate", 0 <= self.learning_rate < math.inf, "0 or more, and finite"),
            ("budget_share", 0 < self.budget_share < 1, "in (0, 1)"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {expected}; got {getattr(self, name)}")

    def sum_multiplier(self, noise_multiplier: float) -> float:
        """The noise of the clipped sum, over the bound."""
        return float(noise_multiplier) / math.sqrt(1 - self.budget_share)

    def count_std(self, noise_multiplier: float) -> float:
        """The noise of the count: every sample adds or takes a half."""
        return float(noise_multiplier) / (2 * math.sqrt(self.budget_share))

    def move(self, bound: Tensor, noisy_count: Tensor, expected_batch_size: float) -> Tensor:
        """The next bound: lower, where more than the quantile was not clipped.

        Args:
            bound: This step's, 0-d.
            noisy_count: Of this step's samples, half the unclipped less half the clipped, with noise.
            expected_batch_size: As of the step.
        """
        share = noisy_count / expected_batch_size + 0.5
        moved = bound * torch.exp(-self.learning_rate * (share - self.quantile))
        # a long run of noise must not end in zero or infinity
        return moved.clamp(1e-6 * self.start, 1e6 * self.start).to(bound.dtype)


class AdaptiveState(NamedTuple):
    """The optimizer's state with the bound beside it. `step`: the optimizer's."""

    step: Tensor
    max_norm: Tensor
    optimizer: Any


def init_private_state(
    params: Params,
    state: State,
    optimizer: Optimizer,
    *,
    max_norm: Any = None,
    ema: bool = False,
    trainable: Trainable | None = None,
) -> TrainState:
    """What the first private step takes: `train.init_train_state`, with the bound where that adapts.

    Args:
        params, state: From `model.init`.
        optimizer, max_norm, trainable: Those of `make_private_step`.
        ema: Whether to keep a moving average.

    >>> import resnet_func as rf
    >>> adaptive = rf.privacy.AdaptiveNorm(start=0.5)
    >>> params = {"w": torch.zeros(3)}
    >>> begin = rf.privacy.init_private_state(params, {}, rf.optim.sgd(0.1), max_norm=adaptive)
    >>> begin.opt_state.max_norm
    tensor(0.5000)
    """
    begin = init_train_state(params, state, optimizer, ema=ema, trainable=trainable)
    if not isinstance(max_norm, AdaptiveNorm):
        return begin
    inner = begin.opt_state
    bound = torch.full((), max_norm.start, dtype=torch.float32, device=inner.step.device)
    return begin._replace(opt_state=AdaptiveState(inner.step, bound, inner))
