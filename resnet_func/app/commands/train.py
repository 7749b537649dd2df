"""`resnet-func train`: train an experiment in its run folder."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from resnet_func import calibration
from resnet_func.app import batches, data, parts, recipes, runtime
from resnet_func.app.commands.common import configure, describe_data, plain_console, say
from resnet_func.app.errors import Interrupted
from resnet_func.app.experiment import Experiment
from resnet_func.app.options import Machine, Train
from resnet_func.app.output import console, plots, report
from resnet_func.app.private import guarantee
from resnet_func.app.ranks import launch
from resnet_func.app.storage import run_folder
from resnet_func.app.training import budget, run

# Of a run by the machine's speeds, with convolutions as half of a step: below, compiling costs what it saves
# or more.
COMPILE_ABOVE_SECONDS = 1500.0


def main(options: Train) -> None:
    """Train, and write metrics, checkpoints and pictures; under torchrun with its other processes."""
    start = time.perf_counter()
    with launch.group(options.machine.device, timeout=options.machine.rank_timeout) as group:
        name = re.sub(r"[^\w.-]+", "-", f"{options.dataset}-{options.hyper.model}")
        with _folder(options, name, group) as (folder, resume):
            _train(options, folder, group, resume=resume, start=start)


def _train(options: Train, folder: Path, group: launch.Group, *, resume: bool, start: float) -> None:
    output = plain_console(quiet=group.rank > 0)
    experiment = _experiment(options)
    if resume and options.resume is None:  # started again by torchrun: what was chosen then stays
        experiment = replace(run_folder.read_config(folder)[0], data_dir=experiment.data_dir)
    # rounding to bf16 would let a gradient exceed its bound
    wished = replace(options.machine, precision="fp32") if options.privacy.private else options.machine
    machine = _configure(wished, folder if resume else None, group)
    splits = group.first_on_node(lambda: batches.load_data(experiment, download=options.download))
    about_batch = None
    if not resume:  # a run goes on with the batch that it began with
        experiment, about_batch = _with_fitting_batch(options, experiment, splits)
    sentence = None
    if experiment.recipe.epochs == 0:
        left = 60 * experiment.recipe.minutes - (time.perf_counter() - start)
        experiment, machine, sentence = _within_budget(options, experiment, splits, machine, left, group)
    elif options.machine.compile == "auto" and machine.compile:
        machine = replace(machine, compile=_compiles(experiment, splits, machine, folder if resume else None))
    if options.privacy.private:
        if not resume:
            wish = guarantee.calibrate(options.privacy, experiment.recipe, splits.train.num_samples)
            experiment = replace(experiment, privacy=wish)
        elif experiment.privacy is None:
            experiment = replace(experiment, privacy=run_folder.read_config(folder)[0].privacy)
        say(output, guarantee.guarantee(experiment, _budget(experiment, splits)))
    recipe = experiment.recipe
    say(output, runtime.describe(machine))
    if group.ranks:
        say(output, f"ranks: {group.world}; {_about_batch_norm(recipe.sync_batchnorm)}")
    for line in filter(None, [describe_data(options.dataset, splits), about_batch, sentence]):
        say(output, line)
    try:
        with console.ConsoleReporter(output, recipe.epochs) as reporter:
            insecure = options.privacy.insecure_noise_seed
            result = run.train(
                experiment,
                splits,
                folder,
                machine,
                reporter,
                resume=resume,
                group=group,
                insecure_seed=insecure,
            )
    except Interrupted:
        if not group.rank:
            run_folder.forget_launch(folder)  # on purpose: no start after it goes on by itself
        command = "torchrun ... -m resnet_func" if group.ranks else "resnet-func"
        raise Interrupted(f"the run is saved; go on with: {command} train --resume {folder}") from None
    # The others wait, and the mark stays: were one killed meanwhile, or while it ends, the group would start
    # again, find the run, and end it once more.
    group.from_first(lambda: _finish(experiment, splits, result, folder, output))


def _finish(
    experiment: Experiment, splits: data.Splits, result: run.Result, folder: Path, output: Console
) -> str:
    """Draw the pictures and say how it went."""
    title = f"{experiment.recipe.model} on {experiment.dataset}"
    plots.curves(result.records, folder / "curves.png", title)
    report.write_pictures(result.evaluation, splits.test, result.trained.task.classes, folder, title)
    say(
        output,
        f"test accuracy {result.evaluation.accuracy:.2%}, loss {result.evaluation.loss:.4f} "
        f"after {len(result.records)} epochs; see {folder}/curves.png",
    )
    if experiment.privacy is not None:
        spent = result.records[-1]["epsilon"] if result.records else 0.0
        say(output, f"spent: epsilon {spent:.4g} of {experiment.privacy.epsilon:g}")
    return "finished"


def _budget(experiment: Experiment, splits: data.Splits) -> guarantee.Budget:
    assert experiment.privacy is not None
    return guarantee.budget(experiment.privacy, experiment.recipe, splits.train.num_samples)


def _experiment(options: Train) -> Experiment:
    data_dir = None if options.data_dir is None else str(options.data_dir.resolve())
    init = None if options.init is None else str(options.init.resolve())
    changes = options.training_set
    if changes.scores:
        changes = replace(changes, scores=str(Path(changes.scores).resolve()))
    described = options.dataset, data_dir, options.seed, options.hyper, init
    kept = options.snapshots, options.record
    return Experiment(*described, changes, *kept, shuffle_window=options.shuffle_window)


def _with_fitting_batch(
    options: Train, experiment: Experiment, splits: data.Splits
) -> tuple[Experiment, str | None]:
    """A batch that is the recipe's own, and not a wish, follows the size of the data; and a line about it."""
    recipe, images = experiment.recipe, splits.train.num_samples
    fitting = recipes.fit_batch(recipe, images)
    named = recipes.recipe(options.recipe, options.dataset)
    if fitting == recipe or recipe.batch_size != named.batch_size:
        return experiment, None
    said = f"batch size: {fitting.batch_size} in place of {recipe.batch_size}, for {images:,} training images"
    return replace(experiment, recipe=fitting), said


# --------------------------------------------------------------------------- what rank 0 decides for all


@contextmanager
def _folder(options: Train, name: str, group: launch.Group) -> Iterator[tuple[Path, bool]]:
    """The run folder and whether to go on in it; rank 0 decides, and the others are told."""
    if group.rank:
        folder, resume = json.loads(group.from_first(str))
        yield Path(folder), resume
        return
    begun = None
    if launch.is_restarted() and options.resume is None:
        begun = run_folder.find_launch(launch.name_of_launch(), options.run_dir)
    with ExitStack() as stack:
        folder = options.resume or begun or stack.enter_context(run_folder.new(options.run_dir, name))
        resume = options.resume is not None or (begun is not None and run_folder.can_resume(begun))
        if group.ranks:
            run_folder.mark_launch(folder, launch.name_of_launch())
        group.from_first(lambda: json.dumps([str(folder), resume]))
        yield folder, resume


def _configure(wished: Machine, resumed: Path | None, group: launch.Group) -> runtime.Runtime:
    """The machine, of whose speeds all ranks think what rank 0 has measured: they choose alike."""
    if group.rank:
        speeds = calibration.from_numbers(json.loads(group.from_first(str)), "of rank 0")
        return configure(wished, speeds=speeds)
    machine = configure(wished, resumed)
    group.from_first(lambda: json.dumps(machine.speeds.as_numbers()))
    return machine


def _within_budget(
    options: Train,
    experiment: Experiment,
    splits: data.Splits,
    machine: runtime.Runtime,
    seconds: float,
    group: launch.Group,
) -> tuple[Experiment, runtime.Runtime, str]:
    """The epochs that fit, by what rank 0 measures of whole batches: several ranks need less."""

    def choose() -> str:
        choice = budget.choose(experiment, splits, machine, seconds=seconds, compile=options.machine.compile)
        recipe = choice.recipe
        return json.dumps([recipe.epochs, recipe.early_scales, choice.compile, choice.sentence])

    epochs, scales, compiled, sentence = json.loads(group.from_first(choose))
    recipe = replace(experiment.recipe, epochs=epochs, early_scales=tuple(map(tuple, scales)))
    return replace(experiment, recipe=recipe), replace(machine, compile=compiled), sentence


def _compiles(
    experiment: Experiment, splits: data.Splits, machine: runtime.Runtime, resumed: Path | None
) -> bool:
    """Whether a run compiles where the choice is ours: as it began, or if that wins its time back."""
    began = run_folder.read_machine(resumed).get("compile") if resumed else None
    if began is not None:
        return bool(began)
    seconds = parts.training_flops(experiment, splits) * machine.speeds.conv_flop * 1e-9
    return 2 * seconds > COMPILE_ABOVE_SECONDS


def _about_batch_norm(synchronised: bool) -> str:
    if synchronised:
        return "BatchNorm over the parts of all ranks"
    return "BatchNorm over each rank's part of a batch (--sync-batchnorm: of all ranks)"
