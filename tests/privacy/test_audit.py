"""The audit's bound holds: by its formula, on mechanisms whose epsilon is known, and it sees what leaks."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom

import resnet_func as rf
from resnet_func import losses, privacy, tree
from resnet_func.privacy.audit import CANARY_LOSS, insert_canaries, p_value
from resnet_func.testing import generator
from tests.per_sample.cases import batch, network, small


@pytest.mark.parametrize("right", [0, 5, 9, 10])
@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_without_delta_guesses_are_coins(right: int, epsilon: float) -> None:
    coin = 1 / (1 + math.exp(-epsilon))
    assert p_value(100, 10, right, epsilon, 0.0) == pytest.approx(binom.sf(right - 1, 10, coin), rel=1e-12)


def test_delta_costs_at_most_the_canaries_times_it() -> None:
    plain, more = (p_value(100, 10, 9, 1.0, delta) for delta in (0.0, 1e-3))
    assert plain < more <= plain + 2 * 100 * 1e-3


def test_the_bound_is_where_the_guesses_become_too_unlikely() -> None:
    coins = torch.arange(200) % 2 == 0
    found = privacy.epsilon_lower_bound(coins.float(), coins, delta=1e-6, shares=(0.5,))
    assert (found.guesses, found.right) == (100, 100)
    assert p_value(200, 100, 100, found.lower_bound, 1e-6) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_response_is_bounded_below_its_epsilon(epsilon: float) -> None:
    """Each coin is told truly with probability e^eps / (1 + e^eps), exactly epsilon-DP: of 40 audits with
    95 % confidence at most 11 may exceed it (the chance of more is 1e-6), and the bound is not far below."""
    source, bounds = generator(0), []
    for _ in range(40):
        coins = torch.rand(2000, generator=source) < 0.5
        true = torch.rand(2000, generator=source) < 1 / (1 + math.exp(-epsilon))
        told = torch.where(true, coins, ~coins).float() + 0.1 * torch.rand(2000, generator=source)
        bounds.append(privacy.epsilon_lower_bound(told, coins, delta=0.0).lower_bound)
    assert sum(bound > epsilon for bound in bounds) <= 11
    assert sorted(bounds)[20] > 0.6 * epsilon


def test_a_canary_is_one_coordinate_longer_than_any_bound() -> None:
    model, params, state = network(small(), 0)
    canaries = insert_canaries(model, losses.cross_entropy, params, state, 5)
    x, y = batch(3, 1)
    index = torch.tensor([-1, 2, 4])
    grads = rf.per_sample.grads(canaries.model, canaries.loss_fn)(
        canaries.params, state, {"x": x, "canary": index}, (y, index)
    )
    expected = torch.zeros(3, 1, 5, dtype=torch.float64)
    expected[1, 0, 2] = expected[2, 0, 4] = CANARY_LOSS
    assert torch.equal(grads.pop("zz_canaries")["weight"], expected)
    true = rf.per_sample.grads(model, losses.cross_entropy)(params, state, x[:1], y[:1])
    for ours, plain in zip(tree.leaves(grads), tree.leaves(true), strict=True):
        torch.testing.assert_close(ours[:1], plain, rtol=1e-9, atol=1e-12)
        assert not ours[1:].any()


def test_what_cannot_be_is_refused() -> None:
    coins = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="a score and a coin for each canary"):
        privacy.epsilon_lower_bound(torch.zeros(2), coins, delta=0.0)
    with pytest.raises(ValueError, match=r"delta must be in \[0, 1\)"):
        privacy.epsilon_lower_bound(torch.zeros(3), coins, delta=1.0)
    model, params, state = network(small(), 0)
    with pytest.raises(ValueError, match="needs a canary or more"):
        insert_canaries(model, losses.cross_entropy, params, state, 0)
