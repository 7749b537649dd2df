"""A budget of minutes: it is filled, never overdrawn but for one epoch, and what was measured decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from resnet_func.app import data, runtime
from resnet_func.app.experiment import Experiment, Plan
from resnet_func.app.ranks.launch import ONE_PROCESS
from resnet_func.app.recipes import FAST, Recipe
from resnet_func.app.training import budget
from resnet_func.app.training.budget import Costs
from resnet_func.app.training_set import load_data
from tests.app.conftest import planned

PLAIN = Recipe(epochs=0, minutes=1)


def costs(full: float, *, ratio: float = 0.3, evaluation: float = 1.0, batches: int = 100) -> Costs:
    steps = {0.5: ratio * full, 0.75: (ratio + 1) / 2 * full, 1.0: full}
    return Costs(steps, {scale: evaluation * scale for scale in steps}, 0.0, batches)


@given(st.floats(1e-3, 1.0), st.floats(0.2, 0.9), st.floats(10.0, 5000.0))
def test_a_budget_is_filled_and_not_overdrawn(full: float, ratio: float, seconds: float) -> None:
    spent = costs(full, ratio=ratio)
    chosen = budget.fit_epochs(FAST, spent, seconds)
    assume(chosen.epochs > 1)
    assert spent.of_run(chosen) <= seconds
    longest = 100 * full + 1.0
    assert spent.of_run(chosen) > seconds - longest
    assert spent.of_run(chosen) >= 0.95 * seconds or chosen.epochs < 20
    assert chosen.scale_at(chosen.epochs - 1) == 1.0


@given(st.floats(1e-3, 1.0), st.floats(10.0, 5000.0))
def test_without_small_images_epochs_are_counted(full: float, seconds: float) -> None:
    spent = costs(full)
    chosen = budget.fit_epochs(PLAIN, spent, seconds)
    one = 100 * full + 1.0
    assert chosen.epochs == max(1, int(seconds / one * (1 + 1e-9)))
    assert chosen.early_scales == ()


def test_more_time_is_more_epochs_and_one_is_always_trained() -> None:
    spent = costs(0.1)
    epochs = [budget.fit_epochs(FAST, spent, seconds).epochs for seconds in (0.0, 60.0, 300.0, 1200.0)]
    assert epochs[0] == 1
    assert epochs == sorted(set(epochs))


def test_compilation_counts_once() -> None:
    recipe = Recipe(epochs=5)
    assert costs(0.1)._replace(compilation=40.0).of_run(recipe) == pytest.approx(40 + 5 * 11)


# --- what is measured ---


class Clock:
    """Seconds that pass only where a step says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def fake_parts(clock: Clock, seconds: Callable[[int, bool], float]) -> Callable[..., Any]:
    """Parts whose step takes `seconds(side, compiled)`."""

    def make(plan: Plan) -> Any:
        seen, machine = set(), plan.machine

        def step(state: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
            if machine.compile and x.shape[-1] not in seen:
                seen.add(x.shape[-1])
                clock.now += 30.0
            clock.now += seconds(x.shape[-1], machine.compile)
            return state, {"loss": torch.zeros(())}

        def apply(params: Any, state: Any, x: torch.Tensor, *, train: bool) -> Any:
            return x.flatten(1)[:, :10], state

        state = type("State", (), {"params": {}, "state": {}})
        return type("Parts", (), {"step": staticmethod(step), "train_state": state, "tested": Model(apply)})

    return make


class Model:
    def __init__(self, apply: Any) -> None:
        self.apply = apply


@pytest.fixture
def splits() -> data.Splits:
    return load_data(Experiment("digits", None, 0, PLAIN))


def choose(
    splits: data.Splits,
    monkeypatch: pytest.MonkeyPatch,
    seconds: Callable[[int, bool], float],
    *,
    left: float = 1200.0,
    compile: str = "auto",
) -> tuple[budget.Choice, float]:
    """What is chosen for digits with FAST's small images, and the seconds that measuring took."""
    clock = Clock()
    monkeypatch.setattr(budget, "make_parts", fake_parts(clock, seconds))
    experiment = Experiment(
        "digits", None, 0, replace(FAST, batch_size=64, crop=0, flip=False, test_flips=False)
    )
    machine = replace(runtime.configure(device="cpu", threads=1, compile="off"), compile=True)
    plan = planned(experiment, machine, splits)
    choice = budget.choose(plan, seconds=left, compile=compile, clock=clock)
    return choice, clock.now


def by_pixels(side: int, compiled: bool) -> float:
    return 0.001 * side**2


def test_what_is_left_after_measuring_is_filled(splits: data.Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    choice, measuring = choose(splits, monkeypatch, by_pixels, left=300.0)
    steps = {0.5: 0.016, 0.75: 0.036, 1.0: 0.064}
    total = Costs(steps, dict.fromkeys(steps, 0.0), 0.0, 1433 // 64).of_run(choice.recipe)
    assert 0.95 * 300 <= measuring + total <= 300
    assert not choice.compile
    assert f"20 minutes are {choice.recipe.epochs} epochs: " in choice.sentence
    assert "at scale 0.5 (16 ms a step)" in choice.sentence
    assert "not compiled" in choice.sentence


def test_small_images_that_save_nothing_are_left_out(
    splits: data.Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, _ = choose(splits, monkeypatch, lambda side, compiled: 0.1, left=300.0)
    assert choice.recipe.early_scales == ()


@pytest.mark.parametrize(
    ("gain", "option", "left", "expected"),
    [
        (0.5, "auto", 1200.0, True),
        (0.99, "auto", 1200.0, False),
        (0.5, "auto", 300.0, False),
        (0.99, "on", 300.0, True),
    ],
    ids=["pays", "does not", "too short", "asked for"],
)
def test_it_compiles_where_more_epochs_fit_so(
    splits: data.Splits,
    monkeypatch: pytest.MonkeyPatch,
    gain: float,
    option: str,
    left: float,
    expected: bool,
) -> None:
    def seconds(side: int, compiled: bool) -> float:
        return by_pixels(side, compiled) * (gain if compiled else 1)

    choice, measuring = choose(splits, monkeypatch, seconds, left=left, compile=option)
    assert choice.compile is expected
    steps = {scale: seconds(round(8 * scale), expected) for scale in (0.5, 0.75, 1.0)}
    compilation = 30.0 * (2 + budget.CACHED_COMPILE) if expected else 0.0
    total = Costs(steps, dict.fromkeys(steps, 0.0), compilation, 1433 // 64).of_run(choice.recipe)
    assert 0.93 * left <= measuring + total <= 1.01 * left


def test_less_than_a_batch_is_left_to_the_run_to_refuse(splits: data.Splits) -> None:
    experiment = Experiment("digits", None, 0, replace(PLAIN, batch_size=5000))
    machine = runtime.configure(device="cpu", threads=1, compile="off")
    assert budget.choose(planned(experiment, machine, splits), seconds=60.0).recipe.epochs == 1


def test_a_measurement_is_of_the_real_step(splits: data.Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(budget, "LEAST_STEPS", 1)
    recipe = Recipe(model="resnet20", epochs=0, minutes=1, batch_size=4, crop=0)
    machine = runtime.configure(device="cpu", threads=1, precision="fp32", compile="off")
    state = torch.random.get_rng_state()
    plan = planned(Experiment("digits", None, 0, recipe), machine, splits)
    choice = budget.choose(plan, seconds=30.0)
    assert 1 <= choice.recipe.epochs < 10_000
    assert torch.equal(torch.random.get_rng_state(), state)


# --- where epochs are given ---


def test_small_epochs_count_for_less(splits: data.Splits) -> None:
    machine = runtime.configure(device="cpu", threads=1, compile="off")
    recipe = replace(FAST, epochs=4, early_scales=((0.5, 0.5),))
    small, full = (
        planned(Experiment("digits", None, 0, each), machine, splits)
        for each in (recipe, replace(recipe, early_scales=()))
    )
    assert budget.training_flops(small) == pytest.approx(budget.training_flops(full) * (2 * 0.25 + 2) / 4)


@pytest.mark.parametrize(
    ("epochs", "ratio", "pays"), [(1, 0.5, False), (1_000_000, 0.5, True), (1_000_000, 1.1, False)]
)
def test_compiling_pays_in_long_runs_where_it_is_faster(
    epochs: int, ratio: float, pays: bool, splits: data.Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = runtime.configure(device="cpu", threads=1, compile="off")
    experiment = Experiment("digits", None, 0, replace(FAST, epochs=epochs, early_scales=((0.5, 0.5),)))

    def compiled(trial: Plan, eager: budget.Costs, scales: list[float], clock: Any) -> budget.Costs:
        assert scales == [0.5, 1.0]
        return eager._replace(step={scale: ratio * eager.step[scale] for scale in scales}, compilation=9.0)

    monkeypatch.setattr(budget, "_try_compiler", compiled)
    assert budget.compiling_pays(planned(experiment, machine, splits), ONE_PROCESS) == pays
