"""What private training promises, as checks that a bug fails: each is quick, and exact or of a fixed seed."""

from __future__ import annotations

import functools
import stat
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from scipy.stats import binomtest, chi2_contingency
from torch import Tensor

import resnet_func as rf
from parity import audit
from parity.cell import Cell
from resnet_func import optim, privacy, tree
from resnet_func.app.experiment import Privacy
from resnet_func.app.private import guarantee, seeds
from resnet_func.app.recipes import Recipe
from resnet_func.privacy import sampling
from resnet_func.testing import generator, randn
from resnet_func.types import Params, TrainState

ALPHA = 1e-6  # of a statistical check; seeds are fixed, so that a pass stays a pass
SIGMA, BOUND, EXPECTED, LR = 3.0, 0.5, 8, 0.25


def cells(quick: bool) -> list[Cell]:
    """A cell for each check; all are quick."""
    return [Cell("privacy", name, check) for name, check in CHECKS.items()]


CHECKS: dict[str, Callable[[], str]] = {}


def check(function: Callable[[], str]) -> Callable[[], str]:
    """Enter a function under its name, with dashes."""

    @functools.wraps(function)
    def guarded() -> str:
        try:
            return function()
        except ImportError as error:
            raise SkipTest(str(error)) from error

    CHECKS[function.__name__.replace("_", "-")] = guarded
    return guarded


# --------------------------------------------------------------------------- a small network and its step


def start(max_norm: Any = BOUND) -> tuple[rf.Model, TrainState, Tensor, Tensor]:
    model = rf.resnet20(depths=(1, 1, 1), widths=(4, 4, 4), norm="group", norm_groups=2, num_classes=3)
    params, state = model.init(generator(0), dtype=torch.float64)
    begin = privacy.init_private_state(params, state, optim.sgd(LR), max_norm=max_norm, ema=True)
    return model, begin, randn(6, 3, 8, 8, seed=1, dtype=torch.float64), torch.arange(6) % 3


def take_step(
    mask: Tensor, noise: Params, *, max_norm: Any = BOUND, **changes: Any
) -> tuple[TrainState, TrainState]:
    """The state before a step and after it."""
    model, begin, x, y = start(max_norm)
    rule = {"noise_multiplier": SIGMA, "expected_batch_size": EXPECTED, "ema_decay": 0.5, **changes}
    step = privacy.make_private_step(model, rf.losses.cross_entropy, optim.sgd(LR), max_norm=max_norm, **rule)
    return begin, step(begin, x, y, mask, noise)[0]


def noise_of(seed: int, *, adaptive: bool = False) -> Params:
    return privacy.gaussian_noise(start()[1].params, seed=seed, step=0, adaptive=adaptive)


def distance(a: Any, b: Any) -> float:
    return float(tree.norm(tree.map(torch.sub, a, b)))


EVERY, NOBODY = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)

# --------------------------------------------------------------------------- clipping and the step


@check
def one_sample_moves_the_sum_by_the_bound_at_most() -> str:
    model, begin, x, y = start()
    worst = 0.0
    for clipping in ("flat", "per_layer", "automatic"):
        summed = rf.per_sample.clipped_sum(model, rf.losses.cross_entropy, max_norm=BOUND, clipping=clipping)
        whole, _ = summed(begin.params, begin.state, x, y)
        for i in range(len(x)):
            kept = torch.arange(len(x)) != i
            without, _ = summed(begin.params, begin.state, x[kept], y[kept])
            moved = distance(whole, without)
            assert moved <= BOUND * (1 + 1e-9), f"{clipping}: a sample moves the sum by {moved:.4g}"
            worst = max(worst, moved)
    return f"at most {worst:.4g} of {BOUND}"


@check
def noise_is_added_once_and_to_scale() -> str:
    """Whatever the microbatch: sigma times the bound over the expected batch size."""
    noise, silent = noise_of(1), tree.map(torch.zeros_like, noise_of(1))
    for microbatch in (None, 1, 2):
        (_, loud), (_, quiet) = (take_step(EVERY, z, microbatch=microbatch) for z in (noise, silent))
        got = distance(loud.params, quiet.params) / float(tree.norm(noise)) / LR
        want = SIGMA * BOUND / EXPECTED
        assert abs(got / want - 1) < 1e-9, f"microbatch {microbatch}: noise of {got:.4g}, not {want:.4g}"
    return f"{want:.4g}"


@check
def an_empty_batch_is_a_step_of_noise_over_the_expected_size() -> str:
    noise = noise_of(1)
    before, after = take_step(NOBODY, noise)
    want = tree.map(lambda p, z: p - LR * SIGMA * BOUND / EXPECTED * z, before.params, noise)
    error = distance(after.params, want)
    assert error < 1e-12, f"off by {error:.3g}"
    return "exact to rounding"


@check
def a_batch_of_any_size_is_divided_by_the_expected() -> str:
    silent = tree.map(torch.zeros_like, noise_of(1))
    one = torch.arange(6) == 0
    before, after = take_step(one, silent)
    moved = distance(before.params, after.params) / LR
    assert moved <= BOUND / EXPECTED * (1 + 1e-9), (
        f"one sample moves the mean by {moved:.4g}, not {BOUND / EXPECTED:.4g}"
    )
    return f"{moved:.4g}"


@check
def all_that_is_released_has_noise() -> str:
    """Parameters, moving average and adaptive bound differ where the noise does."""
    adaptive = privacy.AdaptiveNorm(start=BOUND)
    first, second = (take_step(EVERY, noise_of(s, adaptive=True), max_norm=adaptive)[1] for s in (1, 2))
    for name, a, b in (
        ("parameters", first.params, second.params),
        ("moving average", first.ema_params, second.ema_params),
        ("bound", first.opt_state.max_norm, second.opt_state.max_norm),
    ):
        same = [
            path
            for path, leaf in tree.flatten({"": a}).items()
            if torch.equal(leaf, tree.flatten({"": b})[path])
        ]
        assert not same, f"{name}: {len(same)} leaves are the same with other noise"
    return "parameters, moving average, bound"


# --------------------------------------------------------------------------- noise and seeds


@check
def noise_is_standard_normal_and_fresh() -> str:
    """Every number its own: of leaves, of steps, of seeds; unit variance, uncorrelated."""
    like = {"a": torch.zeros(100, 100), "b": torch.zeros(100, 100)}
    drawn = [privacy.gaussian_noise(like, seed=s, step=t) for s, t in ((0, 0), (0, 1), (1, 0))]
    streams = [leaf.flatten().double() for noise in drawn for leaf in tree.leaves(noise)]
    n = len(streams[0])
    for i, stream in enumerate(streams):
        assert abs(float(stream.var()) - 1) < 6 * (2 / n) ** 0.5, f"variance {float(stream.var()):.3g}, not 1"
        assert len(stream.unique()) > n // 2, "numbers repeat within a leaf"
        for other in streams[:i]:
            together = abs(float((stream * other).mean()))
            assert together < 6 / n**0.5, f"two streams have a correlation of {together:.3g}"
    return f"{len(streams)} streams of {n}"


@check
def seeds_are_three_and_the_owners_alone() -> str:
    drawn = seeds.draw()
    assert len(set(drawn)) == 3, "noise, batches and augmentation share a seed"
    assert set(drawn).isdisjoint(seeds.draw()), "the seeds are the same twice"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        seeds.keep(Path(folder), drawn)
        (file,) = (Path(folder) / "checkpoints").iterdir()
        mode = stat.S_IMODE(file.stat().st_mode)
        assert mode == 0o600, f"the seeds' file has mode {mode:o}, not 600"
    return "mode 600"


# --------------------------------------------------------------------------- sampling


@check
def batches_are_independent_coins() -> str:
    """As many samples as binomial chance has it, in every step anew, and not of one size."""
    samples, rate, steps = 400, 0.25, 400
    chosen = torch.stack([sampling.included(samples, rate, 0, step) for step in range(steps)])
    p = float(binomtest(int(chosen.sum()), chosen.numel(), rate).pvalue)
    assert p > ALPHA, f"the rate is {float(chosen.float().mean()):.4g}, not {rate} (p = {p:.1g})"
    sizes = chosen.sum(1).double()
    spread = float(sizes.var()) / (samples * rate * (1 - rate))
    assert 0.6 < spread < 1.5, f"batch sizes have {spread:.2g} times the binomial variance"
    for lag in (1, 4):
        a, b = chosen[:-lag], chosen[lag:]
        table = [[int((x & y).sum()) for y in (b, ~b)] for x in (a, ~a)]
        assert min(map(min, table)) > 0, f"batches {lag} apart exclude each other or are the same"
        independence: Any = chi2_contingency(table)
        p = float(independence.pvalue)
        assert p > ALPHA, f"batches {lag} apart are not independent (p = {p:.1g})"
    return f"{chosen.numel()} coins"


@check
def no_sample_is_dropped_and_none_stands_in() -> str:
    """Batches beyond the capacity are whole, and empty ones empty."""
    samples, sizes = 30, []
    for rate, capacity in ((0.5, 4), (0.01, 4)):
        batches = privacy.poisson_batches(samples, sampling_rate=rate, steps=30, seed=0, capacity=capacity)
        for step, (indices, mask) in enumerate(batches):
            wanted = sampling.included(samples, rate, 0, step).nonzero().flatten()
            got = indices[mask]
            assert torch.equal(got, wanted), f"{len(got)} samples in a batch of {len(wanted)}"
            sizes.append(len(wanted))
    return f"batches of {min(sizes)} to {max(sizes)}"


# --------------------------------------------------------------------------- accounting


@check
def the_rate_is_the_expected_batch_over_the_images() -> str:
    run = guarantee.budget(Privacy(8.0, 1e-5, 1.0), Recipe(batch_size=300), 1000)
    assert run.rate == Fraction(3, 10), f"the rate of 300 in 1000 is {run.rate}"
    assert run.spent(7) == privacy.epsilon(1.0, 1e-5, sampling_rate=0.3, steps=7), "epsilon is of another run"
    return "3/10"


@check
def a_fixed_size_counts_two_contributions() -> str:
    """All samples at once are the Gaussian mechanism of twice the sensitivity, exactly known."""
    rule: dict[str, Any] = {"sampling_rate": 1.0, "steps": 1, "neighbours": "replace-one"}
    exact = privacy.epsilon(6.0, 1e-5, **rule)
    bound = privacy.epsilon(6.0, 1e-5, **rule, sampling="fixed-size")
    assert bound >= exact, f"epsilon {bound:.4g} is below the exact {exact:.4g}"
    return f"{bound:.4g} for {exact:.4g}"


@check
def an_audit_refutes_no_true_claim() -> str:
    """What 800 canaries betray of a run is within its epsilon."""
    found = audit.audit(audit.Options(canaries=800, steps=6, max_norm=2.0), model=None, size=4)
    assert not found.refuted, found.sentence()
    return found.sentence()
