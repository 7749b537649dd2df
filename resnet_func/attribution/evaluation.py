"""How good scores are: planted wrong labels found, and the linear datamodelling score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy.stats import rankdata
from torch import Tensor


class Planted(NamedTuple):
    """Labels of which some were replaced, and which."""

    labels: Int64[Tensor, "n"]
    planted: Bool[Tensor, "n"]


def plant_wrong_labels(
    labels: Int64[Tensor, "n"], num_classes: int, share: float, generator: torch.Generator
) -> Planted:
    """Replace a share of the labels, each by another class drawn uniformly, to see whether they are found.

    Args:
        labels: Class indices `[N]`.
        num_classes: 2 or more.
        share: Of the labels, from 0 to 1; `round(share * N)` are replaced.
        generator: Draws which and by what, on its device.

    Raises:
        ValueError: the share is out of range, or there is one class only.

    >>> plant_wrong_labels(torch.zeros(4, dtype=torch.int64), 2, 0.5, torch.Generator()).labels.sum()
    tensor(2)
    """
    if not 0 <= share <= 1 or (share and num_classes < 2):
        raise ValueError(
            f"expected a share from 0 to 1, of labels of 2 classes or more; got {share} and {num_classes}"
        )
    n = len(labels)
    count = round(share * n)
    options = {"generator": generator, "device": generator.device, "dtype": torch.int64}
    chosen = torch.randperm(n, **options)[:count].to(labels.device)
    planted = torch.zeros(n, dtype=torch.bool, device=labels.device)
    planted[chosen] = True
    shift = torch.randint(1, max(num_classes, 2), (count,), **options).to(labels.device)
    wrong = labels.clone()
    wrong[chosen] = (labels[chosen] + shift) % num_classes
    return Planted(wrong, planted)


def found_curve(order: Int64[Tensor, "n"], planted: Bool[Tensor, "n"]) -> Float[Tensor, "n"]:
    """The share of planted samples found after inspecting the first 1, 2, ..., N of an order.

    Args:
        order: All samples' indices, the most suspicious first.
        planted: Which samples have a wrong label, by index.

    Returns:
        `[N]` in float64, from 0 to 1.

    Raises:
        ValueError: the lengths differ, or nothing was planted.

    >>> found_curve(torch.tensor([2, 0, 1]), torch.tensor([True, False, True]))
    tensor([0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    if order.shape != planted.shape or not planted.any():
        raise ValueError(
            f"expected an order of all {planted.numel()} samples, of which some are planted; got an order of "
            f"{order.numel()} and {int(planted.sum())} planted"
        )
    hits = planted[order].to(torch.float64).cumsum(0)
    return hits / hits[-1]


def found_share(order: Int64[Tensor, "n"], planted: Bool[Tensor, "n"], inspected: float) -> float:
    """The share of planted samples found after inspecting a share of all.

    >>> found_share(torch.tensor([2, 0, 1]), torch.tensor([True, False, True]), 1 / 3)
    0.5
    """
    looked_at = round(inspected * len(order))
    return float(found_curve(order, planted)[looked_at - 1]) if looked_at else 0.0


class Lds(NamedTuple):
    """A linear datamodelling score: the mean over test samples, its interval, and each one's."""

    mean: float
    low: float
    high: float
    per_test: Float[Tensor, "test"]


def lds(
    scores: Float[Tensor, "train test"],
    subsets: Bool[Tensor, "subset train"],
    outcomes: Float[Tensor, "subset test"],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Lds:
    """The linear datamodelling score (Park et al. 2023, https://arxiv.org/abs/2303.14186).

    For every test sample, Spearman's correlation over subsets between the outcome of a network trained on the
    subset, and the sum of the scores of what is in it.

    Args:
        scores: Of every training sample for every test sample: high where it raises the outcome.
        subsets: Which training samples each retrained network saw.
        outcomes: What each network made of each test sample, such as its log-odds; averaged over several
            networks of a subset, if there are.
        confidence: Of the interval, by bootstrap (percentiles) over test samples and subsets together.
        resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Returns:
        Mean, interval, and each test sample's correlation. A test sample whose outcomes or sums are all alike
        has NaN, and is left out of the mean.

    Raises:
        ValueError: the shapes do not fit, or there are fewer than 3 subsets.

    >>> subsets = torch.tensor([[True, False], [False, True], [True, True]])
    >>> found = lds(torch.tensor([[1.0], [2.0]]), subsets, torch.tensor([[0.1], [0.2], [0.3]]))
    >>> round(found.mean, 6)
    1.0
    """
    train, test = scores.shape
    if subsets.shape[1:] != (train,) or outcomes.shape != (len(subsets), test) or len(subsets) < 3:
        raise ValueError(
            f"scores [{train}, {test}] need subsets [S, {train}] and outcomes [S, {test}], S >= 3; got "
            f"{list(subsets.shape)} and {list(outcomes.shape)}"
        )
    sums = (subsets.to(torch.float64) @ scores.to(torch.float64).cpu()).numpy()
    actual = outcomes.to(torch.float64).cpu().numpy()
    correlations = _spearman(sums, actual)
    draw = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        rows = draw.integers(0, len(sums), len(sums))
        columns = draw.integers(0, test, test)
        means.append(_mean(_spearman(sums[np.ix_(rows, columns)], actual[np.ix_(rows, columns)])))
    edge = 50 * (1 - confidence)
    finite = [mean for mean in means if np.isfinite(mean)] or [np.nan]
    low, high = np.percentile(finite, [edge, 100 - edge])
    return Lds(_mean(correlations), float(low), float(high), torch.from_numpy(correlations))


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of each column; NaN where one is constant."""
    ranked = [rankdata(x, axis=0) for x in (a, b)]
    centred = [x - x.mean(0) for x in ranked]
    norms = [np.sqrt((x**2).sum(0)) for x in centred]
    scale = norms[0] * norms[1]
    # rounding may leave 1 + 2e-16
    return np.clip((centred[0] * centred[1]).sum(0) / np.where(scale > 0, scale, np.nan), -1, 1)


def _mean(values: np.ndarray | Sequence[float]) -> float:
    kept = np.asarray(values)[np.isfinite(values)]
    return float(kept.mean()) if len(kept) else float("nan")
