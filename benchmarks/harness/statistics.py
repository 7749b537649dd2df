"""The figure of a comparison: the median ratio to a baseline, round by round, with an interval."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Seconds = dict[str, list[float]]


class Ratio(NamedTuple):
    """A median and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


class Rule(NamedTuple):
    """When a comparison has been measured enough.

    Args:
        least: Rounds before it may stop.
        most: Rounds after which it stops.
        spread: It stops once no variant's `spread` exceeds this share.
        seconds: It stops after this time, once it has its least rounds.
    """

    least: int = 6
    most: int = 40
    spread: float = 0.10
    seconds: float = 300.0


def interleave(
    names: Sequence[str],
    rounds: int,
    turn: Callable[[str], float],
    enough: Callable[[Seconds], bool] = lambda seconds: False,
) -> Seconds:
    """Seconds of every variant in every round; they take turns, in an order that reverses (ABBA).

    Args:
        names: The variants.
        rounds: Rounds at most.
        turn: Measures a variant once.
        enough: Asked after every second round, when each variant was as often early as late.
    """
    seconds: Seconds = {name: [] for name in names}
    for index in range(rounds):
        for name in names[:: -1 if index % 2 else 1]:
            seconds[name].append(turn(name))
        if index % 2 and enough(seconds):
            break
    return seconds


def until_steady(
    rule: Rule, baseline: str, clock: Callable[[], float] = time.monotonic
) -> Callable[[Seconds], bool]:
    """The `enough` of a rule; its time runs from now."""
    start = clock()

    def enough(seconds: Seconds) -> bool:
        if len(seconds[baseline]) < rule.least:
            return False
        worst = max(spread(times, seconds[baseline]) for times in seconds.values())
        return worst <= rule.spread or clock() - start >= rule.seconds

    return enough


def ratio(times: Sequence[float], baseline: Sequence[float], *, resamples: int = 2000) -> Ratio:
    """The median of `times / baseline`, round by round.

    Args:
        times: Seconds of the variant in each round.
        baseline: Seconds of the baseline in the same rounds.
        resamples: Bootstrap samples of the rounds (Efron 1979, percentile interval).

    Raises:
        ValueError: no rounds, or not the same number.
    """
    ratios = _ratios(times, baseline)
    draws = np.random.default_rng(0).choice(ratios, (resamples, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def spread(times: Sequence[float], baseline: Sequence[float]) -> float:
    """The interquartile range of `times / baseline` as a share of its median."""
    low, median, high = np.quantile(_ratios(times, baseline), [0.25, 0.5, 0.75])
    return float((high - low) / median)


def _ratios(times: Sequence[float], baseline: Sequence[float]) -> np.ndarray:
    if not times or len(times) != len(baseline):
        raise ValueError(f"expected as many rounds as of the baseline, {len(baseline)}; got {len(times)}")
    return np.asarray(times) / np.asarray(baseline)
