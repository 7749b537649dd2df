"""How much noise a wish costs, and what a run has spent: dp-accounting's privacy loss distributions (PLD).

All of it is for Gaussian noise on sums over Poisson samples, which is what `poisson_batches` draws, or
(`sampling="fixed-size"`) over those of `fixed_size_batches`, by Renyi differential privacy: no tighter
accountant for them is in dp-accounting. A run over shuffled batches has another guarantee, often a weaker one
(Annamalai et al., https://arxiv.org/abs/2406.17298), and none here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

# What may differ between two data sets: one sample more or less, or one sample another.
Neighbours: TypeAlias = Literal["add-or-remove-one", "replace-one"]
# How batches are drawn: `poisson_batches`, or `fixed_size_batches`.
Sampling: TypeAlias = Literal["poisson", "fixed-size"]

# Below this, accounting takes minutes, and epsilon is in the hundreds.
LEAST_MULTIPLIER = 0.1
MOST_MULTIPLIER = 2.0**20
# Of the noise multiplier that is found, and never on the side of less noise
TOLERANCE = 1e-4


class NoiseMultiplier(float):
    """A noise multiplier that knows for which neighbours and which sampling it was calibrated, so that what
    it is not for can be refused."""

    neighbours: Neighbours
    sampling: Sampling

    def __new__(cls, value: float, neighbours: Neighbours, sampling: Sampling = "poisson") -> NoiseMultiplier:
        made = super().__new__(cls, value)
        made.neighbours, made.sampling = neighbours, sampling
        return made

    def __getnewargs__(self) -> Any:  # what pickle and copy call __new__ with
        return float(self), self.neighbours, self.sampling


def epsilon(
    noise_multiplier: float,
    delta: float,
    *,
    sampling_rate: float,
    steps: int,
    neighbours: Neighbours = "add-or-remove-one",
    sampling: Sampling = "poisson",
) -> float:
    """The epsilon of a run of private steps, by dp-accounting's PLD accountant (Koskela et al. 2020,
    https://arxiv.org/abs/1906.03049), an upper bound.

    Args:
        noise_multiplier: Standard deviation of the noise over the bound on one sample's contribution, for
            both kinds of neighbours: that replacing a sample moves the sum twice as far is the accountant's
            business. 0, or 0.1 and more; 0 gives infinity.
        delta: In (0, 1); far below one over the number of samples.
        sampling_rate: Probability that a sample is in a batch, in (0, 1].
        steps: Steps taken, 0 or more; empty batches count.
        neighbours: "add-or-remove-one" or "replace-one".
        sampling: "poisson", or "fixed-size": batches of `sampling_rate` times the number of samples, whose
            epsilon is for "replace-one" alone (there is no other data set of the same size) and an upper
            bound by Renyi differential privacy (Wang et al. 2019, https://arxiv.org/abs/1808.00087).

    Raises:
        ValueError: an argument is out of range, or was calibrated for other neighbours.
        ImportError: dp-accounting is not installed.

    >>> from resnet_func import privacy
    >>> round(privacy.epsilon(1.0, 1e-5, sampling_rate=0.01, steps=100), 2)
    0.72
    """
    _check(delta, sampling_rate, steps, neighbours, sampling, least_steps=0)
    check_calibrated_for(noise_multiplier, neighbours, sampling)
    if not (noise_multiplier == 0 or LEAST_MULTIPLIER <= noise_multiplier < math.inf):
        raise ValueError(
            f"noise_multiplier must be 0, or {LEAST_MULTIPLIER} or more; got {noise_multiplier}. "
            "Less noise than that protects nobody"
        )
    _dp_accounting()  # an error, even where the answer is known
    if steps == 0:
        return 0.0
    return _epsilon(_Run(delta, sampling_rate, steps, neighbours, sampling), float(noise_multiplier))


def epsilon_curve(
    noise_multiplier: float,
    delta: float,
    *,
    sampling_rate: float,
    steps: Sequence[int],
    neighbours: Neighbours = "add-or-remove-one",
    sampling: Sampling = "poisson",
) -> list[float]:
    """`epsilon` after each of several numbers of steps; arguments and errors are those of `epsilon`.

    >>> from resnet_func import privacy
    >>> [round(e, 1) for e in privacy.epsilon_curve(1.0, 1e-5, sampling_rate=0.01, steps=[0, 100, 1000])]
    [0.0, 0.7, 1.8]
    """
    run: Any = {"sampling_rate": sampling_rate, "neighbours": neighbours, "sampling": sampling}
    return [epsilon(noise_multiplier, delta, steps=count, **run) for count in steps]


def noise_multiplier(
    epsilon: float,
    delta: float,
    *,
    sampling_rate: float,
    steps: int,
    neighbours: Neighbours = "add-or-remove-one",
    sampling: Sampling = "poisson",
) -> NoiseMultiplier:
    """The least noise multiplier, to 1e-4 and rounded up, with which a run stays within (epsilon, delta).

    Args:
        epsilon: The wish, above 0.
        delta, sampling_rate, steps, neighbours, sampling: As in `epsilon`; at least one step.

    Returns:
        A float that also knows its `neighbours`; `make_private_step` refuses it for others.

    Raises:
        ValueError: an argument is out of range, or no multiplier from 0.1 to 2^20 gives this epsilon.
        ImportError: dp-accounting is not installed.

    >>> from resnet_func import privacy
    >>> sigma = privacy.noise_multiplier(0.5, 1e-5, sampling_rate=0.05, steps=100)
    >>> round(sigma, 2), sigma.neighbours
    (3.74, 'add-or-remove-one')
    """
    _check(delta, sampling_rate, steps, neighbours, sampling, least_steps=1)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be above 0 and finite; got {epsilon}. 1 to 8 is common")
    run = _Run(delta, sampling_rate, steps, neighbours, sampling)
    lower, upper = _bracket(partial(_epsilon, run), epsilon, delta, steps)
    dpa = _dp_accounting()
    found = dpa.calibrate_dp_mechanism(
        run.accountant,
        run.event,
        epsilon,
        delta,
        dpa.ExplicitBracketInterval(lower, upper),
        tol=TOLERANCE,
    )
    return NoiseMultiplier(found, neighbours, sampling)


def _bracket(spent: Any, wanted: float, delta: float, steps: int) -> tuple[float, float]:
    """Multipliers that spend too much and not too much; small ones cost minutes, and are tried last."""
    upper = 1.0
    while spent(upper) > wanted:
        if upper >= MOST_MULTIPLIER:
            raise ValueError(
                f"epsilon={wanted:g} at delta={delta:g} is out of reach: the least in "
                f"{steps} steps is {spent(upper):.3g}. Ask for more, or take fewer steps or a larger delta"
            )
        upper *= 4
    if upper > 1:
        return upper / 4, upper
    lower = upper / 2
    while spent(lower) <= wanted:
        if lower <= LEAST_MULTIPLIER:
            raise ValueError(
                f"epsilon={wanted:g} needs a noise multiplier below {LEAST_MULTIPLIER:g}, which protects "
                f"nobody: with {LEAST_MULTIPLIER:g} it is {spent(lower):.3g}. Ask for less"
            )
        upper, lower = lower, max(lower / 2, LEAST_MULTIPLIER)
    return lower, upper


def check_calibrated_for(
    noise_multiplier: float, neighbours: Neighbours, sampling: Sampling | None = None
) -> None:
    """Refuse noise that was calibrated for other neighbours or sampling; a plain number does not say.

    Raises:
        ValueError: the multiplier is of `privacy.noise_multiplier` for others.
    """
    for name, wanted in (("neighbours", neighbours), ("sampling", sampling)):
        own = getattr(noise_multiplier, name, wanted)
        if wanted is not None and own != wanted:
            raise ValueError(
                f"noise_multiplier was calibrated for {name}={own!r}, and is used for {wanted!r}. "
                f"Pass {name}={wanted!r} to privacy.noise_multiplier, too"
            )


def check_neighbours(neighbours: str) -> None:
    """Refuse an unknown neighbouring relation."""
    if neighbours not in get_args(Neighbours):
        allowed = " or ".join(map(repr, get_args(Neighbours)))
        raise ValueError(f"neighbours must be {allowed}; got {neighbours!r}")


def _check(
    delta: float, sampling_rate: float, steps: int, neighbours: str, sampling: str, *, least_steps: int
) -> None:
    check_neighbours(neighbours)
    if sampling not in get_args(Sampling):
        raise ValueError(
            f"sampling must be 'poisson' or 'fixed-size'; got {sampling!r}. Shuffled batches have no epsilon "
            "here"
        )
    if sampling == "fixed-size" and neighbours != "replace-one":
        raise ValueError(
            f"batches of a fixed size are accounted for neighbours='replace-one' only; got {neighbours!r}. "
            "Pass that, or sampling='poisson'"
        )
    if not 0 < delta < 1:
        raise ValueError(
            f"delta must be in (0, 1); got {delta}. Far below one over the number of samples: 1e-5"
        )
    if not 0 < sampling_rate <= 1:
        raise ValueError(
            f"sampling_rate must be in (0, 1]; got {sampling_rate}. It is the expected batch size over the "
            "number of samples"
        )
    if isinstance(steps, bool) or int(steps) != steps or steps < least_steps:
        raise ValueError(f"steps must be a whole number, {least_steps} or more; got {steps}")


class _Run(NamedTuple):
    """What a run's epsilon depends on beside the noise."""

    delta: float
    sampling_rate: float
    steps: int
    neighbours: Neighbours
    sampling: Sampling

    def accountant(self) -> Any:
        dpa = _dp_accounting()
        relations = dpa.NeighboringRelation
        replace = self.neighbours == "replace-one"
        relation = relations.REPLACE_ONE if replace else relations.ADD_OR_REMOVE_ONE
        if self.sampling == "poisson":
            return dpa.pld.PLDAccountant(relation)
        return dpa.rdp.RdpAccountant(neighboring_relation=relation)

    def event(self, multiplier: float) -> Any:
        dpa = _dp_accounting()
        if self.sampling == "poisson":
            sampled = dpa.PoissonSampledDpEvent(float(self.sampling_rate), dpa.GaussianDpEvent(multiplier))
        else:
            # this accountant's noise is relative to how far replacing a sample moves the sum: twice as far
            rate = Fraction(self.sampling_rate).limit_denominator(2**32)
            sampled = dpa.SampledWithoutReplacementDpEvent(
                rate.denominator, rate.numerator, dpa.GaussianDpEvent(multiplier / 2)
            )
        return dpa.SelfComposedDpEvent(sampled, int(self.steps))


@lru_cache(maxsize=1024)  # seconds each, and a run asks for the same again and again
def _epsilon(run: _Run, multiplier: float) -> float:
    return float(run.accountant().compose(run.event(multiplier)).get_epsilon(run.delta))


def _dp_accounting() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise ImportError(
            'accounting needs the package dp-accounting; install it by: pip install "resnet-func[privacy]"'
        ) from error
    return dp_accounting
