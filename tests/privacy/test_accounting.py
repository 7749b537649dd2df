"""The accountant is dp-accounting's, asked rightly; wishes come back as noise that keeps them."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import sys

import pytest

from resnet_func import privacy
from resnet_func.privacy import accounting

dpa = pytest.importorskip("dp_accounting")
from dp_accounting import pld, rdp  # noqa: E402

NEIGHBOURS = ("add-or-remove-one", "replace-one")
# Noise from 0.8: below, the distributions are long, and each setting takes seconds.
SETTINGS = [
    *itertools.product((0.8, 1.5, 4.0, 20.0), (1e-5, 1e-7), (0.01, 0.1, 1.0), (1, 300), NEIGHBOURS[:1]),
    (2.0, 1e-5, 0.05, 100, "replace-one"),
    (6.0, 1e-6, 1.0, 10, "replace-one"),
]
FIXED = {"neighbours": "replace-one", "sampling": "fixed-size"}
CHEAP = {"sampling_rate": 0.05, "steps": 100}


def direct(sigma: float, delta: float, rate: float, steps: int, neighbours: str) -> float:
    """As dp-accounting's documentation spells it."""
    relation = {
        "add-or-remove-one": dpa.NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace-one": dpa.NeighboringRelation.REPLACE_ONE,
    }[neighbours]
    event = dpa.SelfComposedDpEvent(dpa.PoissonSampledDpEvent(rate, dpa.GaussianDpEvent(sigma)), steps)
    return pld.PLDAccountant(relation).compose(event).get_epsilon(delta)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_epsilon_is_the_accountants(setting: tuple) -> None:
    sigma, delta, rate, steps, neighbours = setting
    found = privacy.epsilon(sigma, delta, sampling_rate=rate, steps=steps, neighbours=neighbours)
    assert found == direct(*setting)


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_one_release_is_the_gaussian_mechanism(neighbours: privacy.accounting.Neighbours) -> None:
    """Balle and Wang 2018 (https://arxiv.org/abs/1805.06530), theorem 8, which uses no discretisation: the
    noise is relative to one contribution for both neighbours, and replacing moves the sum twice as far."""
    sigma, delta = 3.0, 1e-5
    distance = {"add-or-remove-one": 1.0, "replace-one": 2.0}[neighbours]
    eps = privacy.epsilon(sigma, delta, sampling_rate=1.0, steps=1, neighbours=neighbours)

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    half, shift = distance / (2 * sigma), eps * sigma / distance
    exact = normal(half - shift) - math.exp(eps) * normal(-half - shift)
    # an upper bound on epsilon, to within the accountant's interval of 1e-4
    assert exact <= delta
    shift = (eps - 2e-4) * sigma / distance
    assert normal(half - shift) - math.exp(eps - 2e-4) * normal(-half - shift) > delta


@pytest.mark.parametrize(("sigma", "samples", "size", "steps"), [(4.0, 1000, 50, 200), (8.0, 60, 20, 50)])
def test_fixed_size_is_the_renyi_accountants_with_twice_the_sensitivity(
    sigma: float, samples: int, size: int, steps: int
) -> None:
    accountant = rdp.RdpAccountant(neighboring_relation=dpa.NeighboringRelation.REPLACE_ONE)
    sampled = dpa.SampledWithoutReplacementDpEvent(samples, size, dpa.GaussianDpEvent(sigma / 2))
    wanted = accountant.compose(dpa.SelfComposedDpEvent(sampled, steps)).get_epsilon(1e-5)
    found = privacy.epsilon(sigma, 1e-5, sampling_rate=size / samples, steps=steps, **FIXED)
    assert found == wanted


def test_all_samples_at_a_fixed_size_are_the_gaussian_mechanism() -> None:
    """Of twice the sensitivity: an upper bound on the exact epsilon, which the other accountant has."""
    bound = privacy.epsilon(6.0, 1e-5, sampling_rate=1.0, steps=5, **FIXED)
    exact = privacy.epsilon(6.0, 1e-5, sampling_rate=1.0, steps=5, neighbours="replace-one")
    assert exact <= bound <= 1.3 * exact


@pytest.mark.nightly
def test_calibrated_noise_for_a_fixed_size_keeps_the_wish_and_serves_nothing_else() -> None:
    sigma = privacy.noise_multiplier(2.0, 1e-5, **CHEAP, **FIXED)
    assert privacy.epsilon(sigma, 1e-5, **CHEAP, **FIXED) <= 2.0
    assert privacy.epsilon(float(sigma) - 1e-3, 1e-5, **CHEAP, **FIXED) > 2.0
    with pytest.raises(ValueError, match="calibrated for sampling='fixed-size', and is used for 'poisson'"):
        privacy.epsilon(sigma, 1e-5, **CHEAP, neighbours="replace-one")
    assert pickle.loads(pickle.dumps(sigma)).sampling == "fixed-size"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": "shuffle"}, "Shuffled batches have no epsilon"),
        ({"sampling": "fixed-size"}, "accounted for neighbours='replace-one' only"),
    ],
    ids=str,
)
def test_what_has_no_accountant_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        privacy.epsilon(1.0, 1e-5, **CHEAP, **changes)


def test_epsilon_is_monotone_in_each_argument() -> None:
    def at(sigma=1.5, delta=1e-5, rate=0.05, steps=100, neighbours="add-or-remove-one"):
        return privacy.epsilon(sigma, delta, sampling_rate=rate, steps=steps, neighbours=neighbours)

    for grid in (
        [at(sigma=s) for s in (8.0, 4.0, 2.0)],
        [at(delta=d) for d in (1e-3, 1e-5, 1e-7)],
        [at(rate=q) for q in (0.01, 0.05, 0.2, 1.0)],
        [at(steps=n) for n in (0, 1, 10, 100, 1000)],
        [at(neighbours=n) for n in NEIGHBOURS],
    ):
        assert all(a < b for a, b in itertools.pairwise(grid)), grid


@pytest.mark.parametrize("wanted", [0.2, 1.0, 2.0])
def test_calibrated_noise_keeps_the_wish_and_no_less_would(wanted: float) -> None:
    sigma = privacy.noise_multiplier(wanted, 1e-5, **CHEAP)
    assert privacy.epsilon(sigma, 1e-5, **CHEAP) <= wanted
    assert privacy.epsilon(float(sigma) - 2 * accounting.TOLERANCE, 1e-5, **CHEAP) > wanted


def test_calibrated_noise_is_more_for_a_smaller_wish_and_for_replacement() -> None:
    sigmas = [privacy.noise_multiplier(wanted, 1e-5, **CHEAP) for wanted in (1.0, 0.5)]
    assert sigmas[0] < sigmas[1]
    replacing = privacy.noise_multiplier(1.0, 1e-5, **CHEAP, neighbours="replace-one")
    assert replacing > sigmas[0]
    assert replacing.neighbours == "replace-one"


def test_the_curve_is_epsilon_point_by_point() -> None:
    steps = [0, 1, 50, 100]
    curve = privacy.epsilon_curve(1.5, 1e-5, sampling_rate=0.05, steps=steps)
    assert curve == [privacy.epsilon(1.5, 1e-5, sampling_rate=0.05, steps=n) for n in steps]
    assert curve[0] == 0


def test_no_noise_is_no_privacy() -> None:
    assert privacy.epsilon(0.0, 1e-5, **CHEAP) == math.inf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": 0.0}, r"delta must be in \(0, 1\)"),
        ({"delta": math.nan}, r"delta must be in \(0, 1\)"),
        ({"sampling_rate": 0.0}, r"sampling_rate must be in \(0, 1\]"),
        ({"sampling_rate": 1.1}, r"sampling_rate must be in \(0, 1\]"),
        ({"steps": -1}, "steps must be a whole number"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"neighbours": "replace"}, "neighbours must be 'add-or-remove-one' or 'replace-one'"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be 0, or 0.1 or more"),
        ({"noise_multiplier": 0.01}, "noise_multiplier must be 0, or 0.1 or more"),
        ({"noise_multiplier": math.nan}, "noise_multiplier must be 0, or 0.1 or more"),
    ],
    ids=str,
)
def test_out_of_range_is_one_line(changes: dict, message: str) -> None:
    arguments = {"noise_multiplier": 1.0, "delta": 1e-5, **CHEAP, **changes}
    with pytest.raises(ValueError, match=message) as caught:
        privacy.epsilon(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.nightly
def test_an_unreachable_wish_names_the_least_that_is_reachable() -> None:
    steps, delta = 100_000, 1e-12
    with pytest.raises(ValueError, match="out of reach: the least in 100000 steps is") as caught:
        privacy.noise_multiplier(1e-6, delta, sampling_rate=1.0, steps=steps)
    least = privacy.epsilon(accounting.MOST_MULTIPLIER, delta, sampling_rate=1.0, steps=steps)
    assert f"is {least:.3g}." in str(caught.value)
    with pytest.raises(ValueError, match="epsilon must be above 0"):
        privacy.noise_multiplier(0.0, 1e-5, **CHEAP)
    with pytest.raises(ValueError, match="1 or more; got 0"):
        privacy.noise_multiplier(1.0, 1e-5, sampling_rate=0.1, steps=0)


def test_a_lavish_wish_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "LEAST_MULTIPLIER", 0.7)  # 0.1 itself takes half a minute
    with pytest.raises(ValueError, match="needs a noise multiplier below 0.7"):
        privacy.noise_multiplier(1000.0, 1e-5, sampling_rate=0.05, steps=1)


def test_noise_for_other_neighbours_is_refused() -> None:
    sigma = privacy.NoiseMultiplier(1.0, "add-or-remove-one")
    for same in (sigma, pickle.loads(pickle.dumps(sigma)), copy.deepcopy(sigma)):
        with pytest.raises(ValueError, match="calibrated for neighbours='add-or-remove-one'"):
            privacy.epsilon(same, 1e-5, **CHEAP, neighbours="replace-one")


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r'pip install "resnet-func\[privacy\]"'):
        privacy.epsilon(1.0, 1e-5, **CHEAP)
