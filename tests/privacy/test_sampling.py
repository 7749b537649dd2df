"""Poisson batches: fair coins, independent ones, the same ones everywhere, and no sample dropped."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from scipy.stats import binom, binomtest, chi2_contingency

from resnet_func import privacy
from resnet_func.privacy import sampling

# Of all statistical tests here together: seeds are fixed, so that a pass stays a pass.
ALPHA = 1e-6


def draws(num_samples: int, rate: float, steps: int, seed: int = 0) -> torch.Tensor:
    """Who is in which batch, `[steps, num_samples]`."""
    return torch.stack([sampling.included(num_samples, rate, seed, step) for step in range(steps)])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_is_the_published_one(counter: list[int], key: tuple[int, int], expected: str) -> None:
    """The known answers that Random123 ships for philox4x32-10."""
    words = sampling.philox(tuple(torch.tensor([word]) for word in counter), key)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


@pytest.mark.parametrize(
    ("num_samples", "rate", "steps"), [(10_000, 0.1, 100), (1000, 0.5, 1000), (10**6, 1e-3, 1)]
)
def test_inclusion_counts_are_binomial(num_samples: int, rate: float, steps: int) -> None:
    """A million coins: in all, of each quarter of the samples, and of each sample or step by itself."""
    chosen = draws(num_samples, rate, steps)
    counts = [chosen.sum(), *(quarter.sum() for quarter in chosen.chunk(4, dim=1))]
    for count, size in zip(counts, [chosen.numel()] + [chosen.numel() // 4] * 4, strict=True):
        assert binomtest(int(count), size, rate).pvalue > ALPHA
    for dim in (0, 1):
        each, size = chosen.sum(dim), chosen.shape[dim]
        tails = (1 - ALPHA / len(each) / 2, ALPHA / len(each) / 2)
        low, high = (binom.isf(tail, size, rate) for tail in tails)
        assert low <= int(each.min())
        assert int(each.max()) <= high


def independent(a: torch.Tensor, b: torch.Tensor) -> float:
    """The p-value of Pearson's chi-square test that two series of coins are independent."""
    table = [[int((x & y).sum()) for y in (b, ~b)] for x in (a, ~a)]
    return float(chi2_contingency(table).pvalue)


def test_coins_are_independent_across_steps_samples_and_seeds() -> None:
    chosen = draws(5000, 0.3, 201)
    for lag in (1, 2, 100):
        assert independent(chosen[:-lag], chosen[lag:]) > ALPHA
        assert independent(chosen[:, :-lag], chosen[:, lag:]) > ALPHA
    square = draws(1000, 0.3, 1000)
    apart = ~torch.eye(1000, dtype=torch.bool)
    assert independent(square[apart], square.T[apart]) > ALPHA  # (step, sample) against (sample, step)
    for other in (1, 2**32, 2**64, -1):
        assert independent(chosen, draws(5000, 0.3, 201, seed=other)) > ALPHA


def test_batch_sizes_are_binomial_and_not_fixed() -> None:
    """Chi-square over the binomial distribution's quarters: batches are not of one size, nor too alike."""
    num_samples, rate, steps = 200, 0.1, 2000
    sizes = draws(num_samples, rate, steps).sum(1)
    edges = [-1, *(int(binom.ppf(level, num_samples, rate)) for level in (0.25, 0.5, 0.75)), num_samples]
    statistic = 0.0
    for low, high in itertools.pairwise(edges):
        expected = steps * (binom.cdf(high, num_samples, rate) - binom.cdf(low, num_samples, rate))
        statistic += (int(((sizes > low) & (sizes <= high)).sum()) - expected) ** 2 / expected
    assert statistic < 30.7  # chi-square of 3 degrees of freedom at 1e-6


@pytest.mark.parametrize(("rate", "every"), [(1.0, True), (2.0**-62, False)])
def test_the_ends_of_the_rate(rate: float, every: bool) -> None:
    assert bool((sampling.included(1000, rate, 0, 0) == every).all())


def test_a_fraction_is_the_rate_itself() -> None:
    assert torch.equal(sampling.included(1000, Fraction(1, 4), 3, 5), sampling.included(1000, 0.25, 3, 5))


def test_a_resumed_run_draws_what_an_unbroken_one_does() -> None:
    rule = {"sampling_rate": 0.2, "steps": 9, "seed": 2**100 + 7}
    whole = list(privacy.poisson_batches(50, **rule))
    assert len(whole) == 9
    for first in range(10):
        rest = list(privacy.poisson_batches(50, **rule, first_step=first))
        assert len(rest) == 9 - first
        for a, b in zip(whole[first:], rest, strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


def test_no_other_random_stream_is_read_or_advanced() -> None:
    rule = {"sampling_rate": 0.2, "steps": 3, "seed": 1}
    before = torch.get_rng_state()
    first = list(privacy.poisson_batches(50, **rule))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    for a, b in zip(first, privacy.poisson_batches(50, **rule), strict=True):
        assert torch.equal(a[0], b[0])


def test_nothing_is_left_on_the_cpu() -> None:
    """A stand-in for a device that is not here: a tensor left behind would not combine with "meta"."""
    assert sampling.included(10, 0.5, 0, 0, device="meta").device.type == "meta"


def test_masks_and_indices() -> None:
    num_samples, capacity = 40, 20
    batches = privacy.poisson_batches(num_samples, sampling_rate=0.25, steps=50, seed=4, capacity=capacity)
    for step, (indices, mask) in enumerate(batches):
        assert indices.shape == mask.shape == (capacity,)
        assert (indices.dtype, mask.dtype) == (torch.int64, torch.bool)
        wanted = sampling.included(num_samples, 0.25, 4, step).nonzero().flatten()
        assert torch.equal(indices[mask], wanted)
        assert not indices[~mask].any()


def test_a_batch_beyond_the_capacity_is_longer_and_whole() -> None:
    batches = list(privacy.poisson_batches(40, sampling_rate=0.5, steps=20, seed=0, capacity=6))
    assert len(batches) == 20  # one item is one step, whatever its size
    for step, (indices, mask) in enumerate(batches):
        chosen = sampling.included(40, 0.5, 0, step)
        assert len(indices) == 6 * -(-int(chosen.sum()) // 6)
        assert torch.equal(indices[mask], chosen.nonzero().flatten())
    assert {len(indices) for indices, _ in batches} > {18}


def test_an_empty_batch_is_a_step() -> None:
    batches = list(privacy.poisson_batches(3, sampling_rate=0.01, steps=20, seed=0))
    assert len(batches) == 20
    empty = [mask for _, mask in batches if not mask.any()]
    assert empty
    assert all(len(mask) >= 1 for mask in empty)


@pytest.mark.parametrize("num_samples", [1, 100, 50_000])
@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 10_000])
def test_capacity_is_the_least_that_overflows_below_1e_9(num_samples: int, rate: float, steps: int) -> None:
    capacity = sampling.least_capacity(num_samples, rate, steps)
    assert steps * binom.sf(capacity, num_samples, rate) <= 1e-9
    assert capacity == 1 or steps * binom.sf(capacity - 1, num_samples, rate) > 1e-9


@pytest.mark.parametrize("world", [1, 2, 3, 7, 30])
def test_the_ranks_share_a_batch_without_rest(world: int) -> None:
    for indices, mask in privacy.poisson_batches(60, sampling_rate=0.3, steps=5, seed=0):
        shares = [privacy.part(indices, mask, rank, world) for rank in range(world)]
        assert len({share.shape for pair in shares for share in pair}) == 1
        together = torch.cat([share[kept] for share, kept in shares])
        assert sorted(together.tolist()) == indices[mask].tolist()
        loads = [int(kept.sum()) for _, kept in shares]
        assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples must be 1"),
        ({"sampling_rate": 0.0}, r"sampling_rate must be in \(0, 1\]"),
        ({"sampling_rate": float("nan")}, r"sampling_rate must be in \(0, 1\]"),
        ({"sampling_rate": 64}, r"sampling_rate must be in \(0, 1\]"),
        ({"capacity": 0}, "capacity must be 1 or more"),
        ({"first_step": 4}, "0 <= first_step <= steps"),
        ({"steps": -1}, "0 <= first_step <= steps"),
    ],
    ids=str,
)
def test_out_of_range_is_refused_at_once(changes: dict, message: str) -> None:
    arguments = {"num_samples": 10, "sampling_rate": 0.5, "steps": 3, "seed": 0, **changes}
    with pytest.raises(ValueError, match=message):
        privacy.poisson_batches(arguments.pop("num_samples"), **arguments)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be 0 to world - 1; got rank=2 of world=2"):
        privacy.part(torch.tensor([1]), torch.tensor([True]), 2, 2)


# --------------------------------------------------------------------------- batches of a fixed size


def test_every_sample_is_in_a_fixed_batch_as_often_as_chance_has_it() -> None:
    """A million draws: each sample by itself, and a pair no oftener together than without replacement."""
    num_samples, size, steps = 1000, 100, 1000
    counts, pairs = torch.zeros(num_samples), 0
    for indices, mask in privacy.fixed_size_batches(num_samples, batch_size=size, steps=steps, seed=0):
        assert mask.all()
        assert len(indices.unique()) == len(indices) == size
        counts[indices] += 1
        pairs += int(
            torch.isin(torch.arange(0, 1000, 2), indices).double()
            @ torch.isin(torch.arange(1, 1000, 2), indices).double()
        )
    tails = (1 - ALPHA / num_samples / 2, ALPHA / num_samples / 2)
    low, high = (binom.isf(tail, steps, size / num_samples) for tail in tails)
    assert low <= int(counts.min())
    assert int(counts.max()) <= high
    together = size * (size - 1) / num_samples / (num_samples - 1)
    # of 500 pairs in 1000 steps; within a batch pairs exclude each other a little, so this is wide enough
    assert binomtest(pairs, 500 * steps, together).pvalue > ALPHA


def test_fixed_batches_are_the_same_when_resumed_and_others_for_other_seeds() -> None:
    rule = {"batch_size": 5, "steps": 6, "seed": 3}
    whole = list(privacy.fixed_size_batches(20, **rule))
    rest = list(privacy.fixed_size_batches(20, **rule, first_step=4))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[4:], rest, strict=True))
    other = list(privacy.fixed_size_batches(20, **{**rule, "seed": 4}))
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(whole, other, strict=True))
    with pytest.raises(ValueError, match="batch_size must be 1 to 20"):
        privacy.fixed_size_batches(20, batch_size=21, steps=1, seed=0)
