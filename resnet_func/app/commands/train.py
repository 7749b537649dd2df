"""`resnet-func train`: train an experiment in its run folder."""

from __future__ import annotations

import re
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from resnet_func.app import batches, budget, data, guarantee, parts, run, run_folder, runtime
from resnet_func.app.commands.common import configure, describe_data, plain_console, say
from resnet_func.app.errors import Interrupted
from resnet_func.app.experiment import Experiment, Privacy
from resnet_func.app.options import Train
from resnet_func.app.output import console, plots, report

# Of a run by the machine's speeds, with convolutions as half of a step: below, compiling costs what it saves
# or more.
COMPILE_ABOVE_SECONDS = 1500.0


def main(options: Train) -> None:
    """Train, and write metrics, checkpoints and pictures."""
    start, output, recipe = time.perf_counter(), plain_console(), options.hyper
    data_dir = None if options.data_dir is None else str(options.data_dir.resolve())
    init = None if options.init is None else str(options.init.resolve())
    changes = options.training_set
    if changes.scores:
        changes = replace(changes, scores=str(Path(changes.scores).resolve()))
    experiment = Experiment(
        options.dataset, data_dir, options.seed, recipe, init, changes, options.snapshots, options.record
    )
    private = options.privacy.private
    # rounding to bf16 would let a gradient exceed its bound
    chosen = replace(options.machine, precision="fp32") if private else options.machine
    machine = configure(chosen, options.resume)
    splits = batches.load_data(experiment, download=options.download)
    sentence = None
    if recipe.epochs == 0:
        left = 60 * recipe.minutes - (time.perf_counter() - start)
        choice = budget.choose(experiment, splits, machine, seconds=left, compile=options.machine.compile)
        recipe, sentence = choice.recipe, choice.sentence
        experiment, machine = replace(experiment, recipe=recipe), replace(machine, compile=choice.compile)
    elif options.machine.compile == "auto" and machine.compile:
        machine = replace(machine, compile=_compiles(experiment, splits, machine, options.resume))
    if private:
        experiment = replace(experiment, privacy=_privacy(options, splits.train.num_samples))
        say(output, guarantee.guarantee(experiment, _budget(experiment, splits)))
    name = re.sub(r"[^\w.-]+", "-", f"{options.dataset}-{recipe.model}")
    with nullcontext(options.resume) if options.resume else run_folder.new(options.run_dir, name) as folder:
        say(output, runtime.describe(machine))
        say(output, describe_data(options.dataset, splits))
        if sentence:
            say(output, sentence)
        try:
            with console.ConsoleReporter(output, recipe.epochs) as reporter:
                resume = options.resume is not None
                insecure = options.privacy.insecure_noise_seed
                result = run.train(
                    experiment, splits, folder, machine, reporter, resume=resume, insecure_seed=insecure
                )
        except Interrupted:
            raise Interrupted(f"the run is saved; go on with: resnet-func train --resume {folder}") from None
    title = f"{recipe.model} on {options.dataset}"
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


def _privacy(options: Train, num_images: int) -> Privacy | None:
    """The guarantee of a new run, with its noise, or that of the run to resume."""
    if options.resume is not None:
        return run_folder.read_config(options.resume)[0].privacy
    return guarantee.calibrate(options.privacy, options.hyper, num_images)


def _budget(experiment: Experiment, splits: data.Splits) -> guarantee.Budget:
    assert experiment.privacy is not None
    return guarantee.budget(experiment.privacy, experiment.recipe, splits.train.num_samples)


def _compiles(
    experiment: Experiment, splits: data.Splits, machine: runtime.Runtime, resumed: Path | None
) -> bool:
    """Whether a run compiles where the choice is ours: as it began, or if that wins its time back."""
    began = run_folder.read_machine(resumed).get("compile") if resumed else None
    if began is not None:
        return bool(began)
    seconds = parts.training_flops(experiment, splits) * machine.speeds.conv_flop * 1e-9
    return 2 * seconds > COMPILE_ABOVE_SECONDS
