"""A run that ends in so many minutes: steps are measured, and epochs, sizes and the compiler follow."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch

from resnet_func.app.batches import Preparer, train_batches
from resnet_func.app.experiment import Plan
from resnet_func.app.parts import Parts, find_network, make_parts
from resnet_func.app.ranks.launch import Group
from resnet_func.app.recipes import Recipe
from resnet_func.losses import cross_entropy
from resnet_func.models import summary
from resnet_func.train import make_eval_step

SPARE = 0.97  # of the time is planned; the rest is for checkpoints, pictures and a machine that slows down
MEASURE_SECONDS, LEAST_STEPS = 2.0, 6
COMPILE_FROM_SECONDS = 600.0  # below, even trying the compiler costs what it could save
CACHED_COMPILE = 0.3  # of a compilation, where the compiler finds in its cache what was tried
# by the machine's speeds, with convolutions as half of a step: below, compiling costs what it saves or more
COMPILE_ABOVE_SECONDS = 1500.0
MOST_EPOCHS = 10_000
STRETCHES = [step / 20 for step in range(31)]  # of the recipe's shares of small images, 0 to 1.5

Clock = Callable[[], float]


class Costs(NamedTuple):
    """Seconds of the parts of a run.

    Args:
        step: A training step, its batch included, by the scale of its images.
        evaluation: A pass over the test images, by scale.
        compilation: All of it, once; 0 where nothing is compiled.
        batches: Steps of an epoch.
    """

    step: Mapping[float, float]
    evaluation: Mapping[float, float]
    compilation: float
    batches: int

    def of_run(self, recipe: Recipe) -> float:
        """Seconds of all epochs of a recipe.

        >>> costs = Costs({1.0: 0.5}, {1.0: 3.0}, 20.0, 10)
        >>> costs.of_run(Recipe(epochs=4))
        52.0
        """
        epochs = sum(
            count * (self.batches * self.step[scale] + self.evaluation[scale])
            for scale, count in recipe.epochs_by_scale().items()
        )
        return self.compilation + epochs


class Choice(NamedTuple):
    """What a budget became: the recipe with its epochs, whether to compile, and a line that says so."""

    recipe: Recipe
    compile: bool
    sentence: str


def fit_epochs(recipe: Recipe, costs: Costs, seconds: float) -> Recipe:
    """The recipe with the most epochs that fit.

    Where whole epochs leave much of the time over, the shares of small images are stretched or shrunk a
    little: as little as fills 97 % of the time. One epoch is always trained.

    >>> costs = Costs({1.0: 0.5}, {1.0: 5.0}, 0.0, 10)
    >>> fit_epochs(Recipe(epochs=0, minutes=1), costs, 60.0).epochs
    6
    """
    found = []
    for stretch in STRETCHES if recipe.early_scales else [1.0]:
        changed = _stretched(recipe, _most_epochs(recipe, costs, seconds, stretch), stretch)
        total = costs.of_run(changed)
        if total <= seconds:
            found.append((total >= SPARE * seconds, -abs(stretch - 1), total, changed))
    if not found:
        return _stretched(recipe, 1, 1.0)
    full = [one for one in found if one[0]]
    return max(full, key=lambda one: one[1:3])[3] if full else max(found, key=lambda one: one[2])[3]


def _most_epochs(recipe: Recipe, costs: Costs, seconds: float, stretch: float) -> int:
    """The largest number of epochs that fits, by bisection; at least one."""
    fits, fails = 1, MOST_EPOCHS + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if costs.of_run(_stretched(recipe, middle, stretch)) <= seconds:
            fits = middle
        else:
            fails = middle
    return fits


def _stretched(recipe: Recipe, epochs: int, stretch: float) -> Recipe:
    """So many epochs, the shares of small images multiplied, up to 90 % of the epochs in all."""
    total = sum(share for _, share in recipe.early_scales)
    factor = min(stretch, 0.9 / total) if total else 1.0
    scales = tuple([(scale, round(share * factor, 4)) for scale, share in recipe.early_scales])
    return replace(recipe, epochs=epochs, early_scales=scales)


# --------------------------------------------------------------------------- measuring


def fill(plan: Plan, seconds: float, compile: str, group: Group) -> tuple[Plan, str]:
    """The plan with what `choose` chooses, and its line: rank 0 measures whole batches; several need less."""

    def measured() -> str:
        choice = choose(plan, seconds=seconds, compile=compile)
        return json.dumps([choice.recipe.epochs, choice.recipe.early_scales, choice.compile, choice.sentence])

    epochs, scales, compiled, sentence = json.loads(group.from_first(measured))
    recipe = replace(plan.experiment.recipe, epochs=epochs, early_scales=tuple(map(tuple, scales)))
    experiment, machine = replace(plan.experiment, recipe=recipe), replace(plan.machine, compile=compiled)
    return plan._replace(experiment=experiment, machine=machine), sentence


def choose(plan: Plan, *, seconds: float, compile: str = "auto", clock: Clock = time.perf_counter) -> Choice:
    """Measure steps, and choose what ends after `seconds`, measuring included.

    Args:
        plan: Its recipe has `minutes`, and no epochs yet; where its machine may compile, that is tried if it
            can pay.
        seconds: What is left of the budget.
        compile: The option: "on" compiles in any case, "auto" where more epochs fit so.
        clock: In seconds.
    """
    start = clock()
    recipe, images = replace(plan.experiment.recipe, epochs=1), plan.splits.train.num_samples
    if images < recipe.batch_size:  # the run says what is wrong with that
        return Choice(recipe, False, "budget: there is no batch to measure")
    trial, scales = _trial(plan), sorted({scale for scale, _ in recipe.early_scales} | {1.0})
    step, evaluation = _measure_eager(trial, scales, clock)
    useful = tuple([pair for pair in recipe.early_scales if step[pair[0]] < 0.9 * step[1.0]])
    recipe = replace(recipe, early_scales=useful)  # what is not faster is not worth smaller images
    scales = sorted({scale for scale, _ in useful} | {1.0})
    costs = Costs(step, evaluation, 0.0, images // recipe.batch_size)
    by_compiling = {False: costs}
    if plan.machine.compile and (compile == "on" or seconds >= COMPILE_FROM_SECONDS):
        by_compiling[True] = _try_compiler(trial, costs, scales, clock)
    left = seconds - (clock() - start)
    plans = {takes: fit_epochs(recipe, costs, left) for takes, costs in by_compiling.items()}
    takes = True in plans and (compile == "on" or _work(plans[True]) > _work(plans[False]))
    costs, chosen = by_compiling[takes], plans[takes]
    return Choice(chosen, takes, _sentence(chosen, costs, takes, clock() - start))


def _work(recipe: Recipe) -> float:
    """Epochs, small ones for less."""
    return sum(count * scale**2 for scale, count in recipe.epochs_by_scale().items())


def _trial(plan: Plan) -> Plan:
    """The plan with a rate that does not matter, and epochs that any schedule takes."""
    measured = replace(plan.experiment.recipe, epochs=MOST_EPOCHS, learning_rate=0.0, early_scales=())
    return plan._replace(experiment=replace(plan.experiment, recipe=measured))


def _measure_eager(
    trial: Plan, scales: list[float], clock: Clock
) -> tuple[dict[float, float], dict[float, float]]:
    """Seconds of a step and of an evaluation at each scale, not compiled."""
    trial = trial._replace(machine=replace(trial.machine, compile=False))
    parts, prepare = make_parts(trial), Preparer(trial.task, trial.machine)
    steps = {scale: _step_seconds(trial, parts, prepare, scale, clock) for scale in scales}
    state, test, size = parts.train_state, trial.splits.test, trial.experiment.recipe.evaluation_batch
    eval_step = make_eval_step(parts.tested, cross_entropy)
    picks = torch.arange(test.num_samples, dtype=torch.int64, device="cpu").split(size)
    evaluations = {}
    for scale in scales:
        times = []
        for images, labels in test.read(picks[:3]):
            start = clock()
            x = prepare.scale(prepare(images), scale)
            eval_step(state.params, state.state, x, labels.to(trial.machine.device))[0].sum().item()
            times.append(clock() - start)
        evaluations[scale] = len(picks) * min(times)
    return steps, evaluations


def _step_seconds(trial: Plan, parts: Parts, prepare: Preparer, scale: float, clock: Clock) -> float:
    """The median step with its batch; the first two are warm-up."""
    times: list[float] = []
    before, train_state = clock(), parts.train_state
    for x, y in train_batches(trial.experiment, trial.splits.train, prepare, 0, 0):
        train_state, metrics = parts.step(train_state, prepare.scale(x, scale), y)
        float(metrics["loss"])
        now = clock()
        times.append(now - before)
        before = now
        if len(times) >= LEAST_STEPS + 2 and sum(times[2:]) >= MEASURE_SECONDS:
            break
    return median(times[2:] or times)


def _try_compiler(trial: Plan, eager: Costs, scales: list[float], clock: Clock) -> Costs:
    """The costs of a compiled run, from what it takes to compile the smallest images' step, and to run it."""
    parts, prepare = make_parts(trial), Preparer(trial.task, trial.machine)
    x, y = next(iter(train_batches(trial.experiment, trial.splits.train, prepare, 0, 0)))
    start = clock()
    _, metrics = parts.step(parts.train_state, prepare.scale(x, scales[0]), y)
    float(metrics["loss"])
    compilation = clock() - start
    ratio = _step_seconds(trial, parts, prepare, scales[0], clock) / eager.step[scales[0]]
    return eager._replace(
        step={scale: ratio * seconds for scale, seconds in eager.step.items()},
        compilation=compilation * (len(scales) - 1 + CACHED_COMPILE),
    )


def _sentence(recipe: Recipe, costs: Costs, compiled: bool, measuring: float) -> str:
    sizes = ", ".join(
        f"{count} at {'full size' if scale == 1 else f'scale {scale:g}'} "
        f"({costs.step[scale] * 1e3:.3g} ms a step)"
        for scale, count in sorted(recipe.epochs_by_scale().items())
    )
    return (
        f"budget: {recipe.minutes:g} minutes are {recipe.epochs} epochs: {sizes}; "
        f"{'compiled' if compiled else 'not compiled'}; training will take about "
        f"{costs.of_run(recipe) / 60:.1f} minutes, after {measuring:.0f} s of measuring"
    )


# --------------------------------------------------------------------------- epochs that are given


def compiling_pays(plan: Plan, group: Group) -> bool:
    """Whether a run of so many epochs ends sooner compiled; all ranks get rank 0's answer.

    In a run that is long by the machine's speeds, steps are measured both ways: which is faster depends on
    the processor, the allocator and the size of the images. Private steps are not compiled: where it was
    measured, that took 0.97 (16 pixels) to 1.27 (24 pixels) of the time without.
    """

    return group.from_first(lambda: "yes" if _ends_sooner_compiled(plan) else "no") == "yes"


def _ends_sooner_compiled(plan: Plan) -> bool:
    recipe, images = plan.experiment.recipe, plan.splits.train.num_samples
    seconds = 2e-9 * training_flops(plan) * plan.machine.speeds.conv_flop
    if plan.budget is not None or seconds <= COMPILE_ABOVE_SECONDS or images < recipe.batch_size:
        return False
    trial, scales, clock = _trial(plan), sorted(recipe.epochs_by_scale()), time.perf_counter
    eager = Costs(*_measure_eager(trial, scales, clock), 0.0, images // recipe.batch_size)
    return _try_compiler(trial, eager, scales, clock).of_run(recipe) < eager.of_run(recipe)


def training_flops(plan: Plan) -> float:
    """Floating-point operations of the run's forward and backward passes, six a multiply-accumulate."""
    recipe, task = plan.experiment.recipe, plan.task
    model = find_network(recipe, task)
    params, state = model.init(torch.Generator("cpu"), device="cpu")
    shape = (task.in_channels, task.image_size, task.image_size)
    rows = summary.summarize_network(model, params, state, shape)
    full_epochs = sum(recipe.scale_at(epoch) ** 2 for epoch in range(recipe.epochs))
    return 6.0 * summary.totals(rows).macs * plan.splits.train.num_samples * full_epochs
