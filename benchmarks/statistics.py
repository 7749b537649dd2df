"""The figure of a comparison: the median ratio to a baseline, round by round, with an interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


def interleave(names: Sequence[str], rounds: int, turn: Callable[[str], float]) -> dict[str, list[float]]:
    """Seconds of every variant in every round; they take turns, in an order that reverses (ABBA)."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names[:: -1 if index % 2 else 1]:
            seconds[name].append(turn(name))
    return seconds


class Ratio(NamedTuple):
    """A median and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def ratio(times: Sequence[float], baseline: Sequence[float], *, resamples: int = 2000) -> Ratio:
    """The median of `times / baseline`, round by round.

    Args:
        times: Seconds of the variant in each round.
        baseline: Seconds of the baseline in the same rounds.
        resamples: Bootstrap samples of the rounds (Efron 1979, percentile interval).

    Raises:
        ValueError: no rounds, or not the same number.
    """
    if not times or len(times) != len(baseline):
        raise ValueError(f"expected as many rounds as of the baseline, {len(baseline)}; got {len(times)}")
    ratios = np.asarray(times) / np.asarray(baseline)
    draws = np.random.default_rng(0).choice(ratios, (resamples, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))
