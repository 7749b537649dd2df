"""What is decided before a run's first step: its data and task, its batch, noise and epochs, the compiler."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from resnet_func.app import data, recipes, runtime
from resnet_func.app.experiment import Experiment, Plan, Task
from resnet_func.app.options import Train
from resnet_func.app.private import guarantee
from resnet_func.app.ranks.launch import Group
from resnet_func.app.storage import run_folder
from resnet_func.app.tasks import go_on_with, make_task
from resnet_func.app.training import budget
from resnet_func.app.training_set import describe, load_data


def settle(
    options: Train, begun: Path | None, machine: runtime.Runtime, group: Group, *, started: float
) -> Plan:
    """Decide what the options leave open, on all ranks alike.

    Args:
        options: The command's.
        begun: The folder of a run that goes on: what was decided when it began stays.
        machine: As configured.
        group: The ranks that are to train together.
        started: When the command began, by `time.perf_counter`; minutes count from there.

    Raises:
        AppError, ValueError: the options, the data and the run do not go together.
    """
    experiment, recorded = _asked(options), None
    if begun is not None:  # the data may have moved
        config, recorded = run_folder.read_config(begun)
        experiment = replace(config, data_dir=experiment.data_dir)
    splits = group.first_on_node(lambda: load_data(experiment, download=options.download))
    asked, images, about = experiment.recipe, splits.train.num_samples, [describe(experiment.dataset, splits)]
    if begun is None:
        recipe = recipes.fit_batch(asked, images, recipes.recipe(options.recipe, options.dataset))
        if recipe != asked:
            sizes = f"{recipe.batch_size} in place of {asked.batch_size}"
            about.append(f"batch size: {sizes}, for {images:,} training images")
        wish = options.privacy
        privacy = guarantee.calibrate(wish, recipe, images) if wish.private else None
        experiment = replace(experiment, recipe=recipe, privacy=privacy)
    plan = make_plan(experiment, splits, machine, recorded)
    if experiment.recipe.epochs == 0:
        left = 60 * experiment.recipe.minutes - (time.perf_counter() - started)
        plan, said = budget.fill(plan, left, options.machine.compile, group)
        about.append(said)
    elif options.machine.compile == "auto" and machine.compile:
        took = None if begun is None else run_folder.read_machine(begun).get("compile")
        compiles = budget.compiling_pays(plan, group) if took is None else bool(took)
        plan = plan._replace(machine=replace(machine, compile=compiles))
    promised = [] if plan.budget is None else [guarantee.guarantee(experiment, plan.budget)]
    ranks = [f"ranks: {group.world}; {_about_batch_norm(asked.sync_batchnorm)}"] if group.ranks else []
    return plan._replace(lines=(*promised, runtime.describe(plan.machine), *ranks, *about, *plan.lines))


def make_plan(
    experiment: Experiment, splits: data.Splits, machine: runtime.Runtime, recorded: Task | None = None
) -> Plan:
    """The plan of an experiment on some data; `recorded` is the task of a run that goes on.

    Raises:
        DataError: the data have other classes or channels than when the run began.
        PrivateError, RunError: the promise of a private run cannot be kept with what has changed.
    """
    task, changes = make_task(experiment.recipe, splits), None
    if recorded is not None:
        task, changes = go_on_with(recorded, task, splits.train)
    run = None
    if experiment.privacy is not None:
        if changes:
            raise guarantee.PrivateError(
                f"{changes}: the guarantee is for those it began with. Start a new run"
            )
        run = guarantee.budget(experiment.privacy, experiment.recipe, task.train_images)
        if recorded is not None:
            guarantee.check_budget(run)
    kept = "going on with the sizes, the normalisation and the schedule recorded then"
    return Plan(experiment, splits, task, machine, run, (f"{changes}; {kept}",) if changes else ())


def _asked(options: Train) -> Experiment:
    """The experiment that the options describe, its paths made absolute."""
    data_dir, init = (path and str(path.resolve()) for path in (options.data_dir, options.init))
    changes = options.training_set
    if changes.scores:
        changes = replace(changes, scores=str(Path(changes.scores).resolve()))
    described = options.dataset, data_dir, options.seed, options.hyper, init
    kept = options.snapshots, options.record
    return Experiment(*described, changes, *kept, shuffle_window=options.shuffle_window)


def _about_batch_norm(synchronised: bool) -> str:
    if synchronised:
        return "BatchNorm over the parts of all ranks"
    return "BatchNorm over each rank's part of a batch (--sync-batchnorm: of all ranks)"
