"""Curves of found labels, and the linear datamodelling score against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from resnet_func.attribution import found_curve, found_share, lds, plant_wrong_labels
from resnet_func.testing import generator

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, n=st.integers(2, 30))
def test_the_curve_climbs_from_chance_to_all(seed: int, n: int) -> None:
    draw = generator(seed)
    planted = torch.zeros(n, dtype=torch.bool)
    planted[torch.randperm(n, generator=draw)[: max(1, n // 3)]] = True
    order = torch.randperm(n, generator=draw)
    curve = found_curve(order, planted)
    found = [int(planted[order[:k]].sum()) / int(planted.sum()) for k in range(1, n + 1)]
    assert curve.tolist() == pytest.approx(found, abs=1e-12)
    best = found_curve(planted.long().argsort(descending=True), planted)
    assert (best >= curve).all()
    assert found_share(order, planted, 1.0) == 1.0
    assert found_share(order, planted, 0.0) == 0.0


def test_an_order_of_other_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="order of all 3 samples"):
        found_curve(torch.arange(2), torch.tensor([True, False, False]))
    with pytest.raises(ValueError, match="0 planted"):
        found_curve(torch.arange(2), torch.zeros(2, dtype=torch.bool))


def example(seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outcomes that are sums of scores, and noise."""
    draw = generator(seed)
    scores = torch.randn(20, 6, generator=draw, dtype=torch.float64)
    subsets = torch.rand(30, 20, generator=draw) < 0.5
    sums = subsets.double() @ scores
    return scores, subsets, sums + noise * torch.randn(sums.shape, generator=draw, dtype=torch.float64)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_lds_is_spearmans_and_blind_to_monotone_changes(seed: int) -> None:
    scores, subsets, outcomes = example(seed, 2.0)
    found = lds(scores, subsets, outcomes, resamples=20)
    sums = (subsets.double() @ scores).numpy()
    expected = [spearmanr(sums[:, j], outcomes[:, j].numpy()).statistic for j in range(6)]
    assert found.per_test.tolist() == pytest.approx(expected, abs=1e-12)
    assert found.mean == pytest.approx(np.mean(expected), abs=1e-12)
    again = lds(3 * scores, subsets, outcomes.exp(), resamples=20)
    torch.testing.assert_close(again.per_test, found.per_test, rtol=0, atol=1e-12)
    assert lds(-scores, subsets, outcomes, resamples=20).mean == pytest.approx(-found.mean, abs=1e-12)


def test_the_interval_holds_the_mean_and_narrows_without_noise() -> None:
    noisy, exact = (lds(*example(0, noise), resamples=200, seed=1) for noise in (5.0, 0.0))
    assert noisy.low < noisy.mean < noisy.high
    assert exact.mean == pytest.approx(1.0)
    assert exact.high - exact.low < 1e-9
    again = lds(*example(0, 5.0), resamples=200, seed=1)
    assert (again.low, again.high) == (noisy.low, noisy.high)


def test_a_constant_column_is_left_out() -> None:
    scores, subsets, outcomes = example(0, 1.0)
    outcomes[:, 2] = 1.0
    found = lds(scores, subsets, outcomes, resamples=10)
    assert found.per_test[2].isnan()
    kept = found.per_test[~found.per_test.isnan()]
    assert found.mean == pytest.approx(float(kept.mean()))


def test_shapes_that_do_not_fit_are_refused() -> None:
    scores, subsets, outcomes = example(0, 1.0)
    with pytest.raises(ValueError, match=r"outcomes \[S, 6\], S >= 3; got"):
        lds(scores, subsets, outcomes[:, :2])
    with pytest.raises(ValueError, match="S >= 3"):
        lds(scores, subsets[:2], outcomes[:2])


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, share=st.sampled_from([0.0, 0.1, 0.5, 1.0]), classes=st.integers(2, 5))
def test_planted_labels_are_as_many_as_asked_and_all_wrong(seed: int, share: float, classes: int) -> None:
    labels = torch.randint(0, classes, (20,), generator=generator(seed))
    found = plant_wrong_labels(labels, classes, share, generator(seed + 1))
    assert int(found.planted.sum()) == round(20 * share)
    assert torch.equal(found.labels != labels, found.planted)
    assert ((found.labels >= 0) & (found.labels < classes)).all()


def test_wrong_labels_need_two_classes_and_a_share() -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    for classes, share in ((1, 0.5), (2, 1.5), (2, -0.1)):
        with pytest.raises(ValueError, match="expected a share from 0 to 1, of labels of 2 classes"):
            plant_wrong_labels(labels, classes, share, generator(0))
    assert torch.equal(plant_wrong_labels(labels, 1, 0.0, generator(0)).labels, labels)
