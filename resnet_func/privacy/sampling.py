"""Poisson batches: every sample is in every batch by a coin of its own, whoever draws it and where.

And, as second choice, batches of a fixed size: as many samples, none twice, every set of them as likely.

The coins are words of Philox4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405), keyed by
the seed and counted by step and sample, in integers alone: the same on any device and any number of ranks,
and any step can be drawn by itself. Philox passes the usual statistical tests; it is not cryptographic, and
accounting that relies on the batches being secret wants a secret seed, such as `secrets.randbits(128)`.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from fractions import Fraction

import torch
from jaxtyping import Bool, Int
from torch import Tensor

OVERFLOW_PROBABILITY = 1e-9  # of a whole run
WORD = 2**32 - 1
COIN_BITS = 62
ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def poisson_batches(
    num_samples: int,
    *,
    sampling_rate: float | Fraction,
    steps: int,
    seed: int,
    capacity: int | None = None,
    first_step: int = 0,
    device: torch.device | str | None = None,
) -> Iterator[tuple[Int[Tensor, "capacity"], Bool[Tensor, "capacity"]]]:
    """Batches in which every sample is with probability `sampling_rate`, independently; one item is one step.

    Args:
        num_samples: Size of the data set, 1 to 2^32.
        sampling_rate: In (0, 1]: the expected batch size over `num_samples`. A float or a fraction, kept to
            62 bits after the point.
        steps: Steps of the whole run.
        seed: Any integer; it must stay secret where the guarantee counts on unknown batches.
        capacity: Length of what is yielded. None takes the least at which the probability that any batch of
            the run is larger is below 1e-9.
        first_step: Where to begin: a resumed run draws what an unbroken one would have drawn.
        device: Where to draw, and where the tensors lie.

    Yields:
        `(indices, mask)`, `steps - first_step` times: the samples of the batch in ascending order, filled up
        with index 0 where the mask is False. An empty batch has an all-False mask, and is a step like any
        other. Should a batch be larger than the capacity, both have a whole multiple of its length: no sample
        is ever dropped, and one item is still one step (give the step `microbatch=capacity`, and its memory
        stays bounded).

    Raises:
        ValueError: an argument is out of range.

    >>> from resnet_func import privacy
    >>> batches = privacy.poisson_batches(6, sampling_rate=0.5, steps=3, seed=0, capacity=6)
    >>> [indices[mask].tolist() for indices, mask in batches]
    [[0, 5], [1], [0, 4, 5]]
    """
    _check(num_samples, sampling_rate, steps, first_step)
    length = least_capacity(num_samples, sampling_rate, steps) if capacity is None else capacity
    if length < 1:
        raise ValueError(f"capacity must be 1 or more; got {capacity}. None chooses it")
    return (
        _fixed_length(included(num_samples, sampling_rate, seed, step, device=device), length)
        for step in range(first_step, steps)
    )


def fixed_size_batches(
    num_samples: int,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    first_step: int = 0,
    device: torch.device | str | None = None,
) -> Iterator[tuple[Int[Tensor, "batch_size"], Bool[Tensor, "batch_size"]]]:
    """Batches of a fixed size without replacement, each drawn anew: for `sampling="fixed-size"`.

    Poisson batches have the smaller epsilon; these have one size. The samples of a batch are those whose
    words of 62 bits, drawn as the coins of `poisson_batches`, are smallest. That two are equal, and order
    decides, has probability below `num_samples ** 2 / 2 ** 63`.

    Args:
        batch_size: 1 to `num_samples`.
        num_samples, steps, seed, first_step, device: As in `poisson_batches`.

    Yields:
        `(indices, mask)` as `poisson_batches` does, the mask all True.

    >>> from resnet_func import privacy
    >>> batches = privacy.fixed_size_batches(6, batch_size=3, steps=2, seed=0)
    >>> [len(set(indices.tolist())) for indices, _ in batches]
    [3, 3]
    """
    if not 1 <= batch_size <= num_samples:
        raise ValueError(f"batch_size must be 1 to {num_samples}, the number of samples; got {batch_size}")
    _check(num_samples, Fraction(batch_size, num_samples), steps, first_step)
    return (
        _smallest(_coins(num_samples, seed, step, device=device), batch_size)
        for step in range(first_step, steps)
    )


def part(
    indices: Int[Tensor, "capacity"], mask: Bool[Tensor, "capacity"], rank: int, world: int
) -> tuple[Int[Tensor, "share"], Bool[Tensor, "share"]]:
    """A rank's share of a batch: every `world`-th place, so that shares have one length and about one load.

    The ranks' shares together are the batch: no sample twice, none left out. Clipped sums of the shares are
    to be added up before noise is added, once.

    >>> import torch
    >>> from resnet_func import privacy
    >>> privacy.part(torch.tensor([3, 5, 9]), torch.tensor([True, True, True]), rank=1, world=2)
    (tensor([5, 0]), tensor([ True, False]))
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be 0 to world - 1; got rank={rank} of world={world}")
    share = -(-len(indices) // world)
    return _filled(indices[rank::world], share), _filled(mask[rank::world], share)


def least_capacity(num_samples: int, sampling_rate: float | Fraction, steps: int) -> int:
    """The least capacity that all batches of a run fit with probability 1 - 1e-9: a union bound over the
    steps of the binomial tail."""
    from scipy.stats import binom  # takes a second to import

    allowed = OVERFLOW_PROBABILITY / max(steps, 1)
    capacity = int(binom.isf(allowed, num_samples, float(sampling_rate)))
    while binom.sf(capacity, num_samples, float(sampling_rate)) > allowed:
        capacity += 1  # the quantile may be one off by rounding
    return max(capacity, 1)


def included(
    num_samples: int,
    sampling_rate: float | Fraction,
    seed: int,
    step: int,
    *,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "num_samples"]:
    """Whether each sample is in the batch of a step."""
    return _coins(num_samples, seed, step, device=device) < int(Fraction(sampling_rate) * 2**COIN_BITS)


def _coins(
    num_samples: int, seed: int, step: int, *, device: torch.device | str | None = None
) -> Int[Tensor, "num_samples"]:
    """A whole number below 2^62 for each sample."""
    words = _sampling_words(seed)
    samples = torch.arange(num_samples, dtype=torch.int64, device=device)
    counter = (samples, *(torch.full_like(samples, word) for word in (step, *words[2:])))
    first, second, _, _ = philox(counter, words[:2])
    return (first << 30) | (second >> 2)


def philox(counter: tuple[Tensor, ...], key: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words of 32 bits, as int64, from a counter of four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of 32-bit words, by halves: nothing exceeds int64."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _sampling_words(seed: int) -> tuple[int, ...]:
    """Four words of 32 bits: another key than that of the noise, even if somebody gives both one seed."""
    digest = hashlib.sha256(f"resnet_func.privacy sampling {operator.index(seed)}".encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "big") for i in range(0, 16, 4))


def _smallest(coins: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    indices = coins.argsort(stable=True)[:batch_size].sort().values
    return indices, torch.ones_like(indices, dtype=torch.bool)


def _fixed_length(chosen: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    indices = chosen.nonzero().flatten()
    length = capacity * max(1, -(-len(indices) // capacity))
    return _filled(indices, length), _filled(torch.ones_like(indices, dtype=torch.bool), length)


def _filled(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values.new_zeros(length - len(values))])


def _check(num_samples: int, sampling_rate: float | Fraction, steps: int, first_step: int) -> None:
    if not 1 <= num_samples <= 2**32:
        raise ValueError(f"num_samples must be 1 to 2^32; got {num_samples}")
    if not 0 < sampling_rate <= 1:
        raise ValueError(
            f"sampling_rate must be in (0, 1]; got {sampling_rate}. It is the expected batch size over "
            "num_samples"
        )
    if not 0 <= first_step <= steps <= 2**32:
        raise ValueError(f"expected 0 <= first_step <= steps <= 2^32; got {first_step} and {steps}")
