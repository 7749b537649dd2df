"""`resnet-func train`: train an experiment in its run folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from resnet_func.app import batches, launch, parts, run, run_folder, runtime
from resnet_func.app.commands.common import configure, describe_data, plain_console, say
from resnet_func.app.errors import Interrupted
from resnet_func.app.experiment import Experiment
from resnet_func.app.options import Train
from resnet_func.app.output import console, plots, report

COMPILE_ABOVE_FLOPS = 1e15  # hours on two CPU cores: below, compiling costs what it saves or more


def main(options: Train) -> None:
    """Train, and write metrics, checkpoints and pictures; under torchrun with its other processes."""
    machine = configure(options.machine)
    with launch.group(str(machine.device), timeout=options.machine.rank_timeout) as group:
        _train(options, machine, group)


def _train(options: Train, machine: runtime.Runtime, group: launch.Group) -> None:
    output, recipe = plain_console(quiet=group.rank > 0), options.hyper
    experiment = _experiment(options)
    splits = group.first_on_node(lambda: batches.load_data(experiment, download=options.download))
    if options.machine.compile == "auto" and machine.compile:
        # where the choice is ours, only what runs long enough to win the compilation's time back
        machine = replace(machine, compile=parts.training_flops(experiment, splits) > COMPILE_ABOVE_FLOPS)
    name = re.sub(r"[^\w.-]+", "-", f"{options.dataset}-{recipe.model}")
    with _folder(options, name, group) as (folder, resume):
        say(output, runtime.describe(machine))
        if group.ranks:
            say(
                output,
                f"ranks: {group.world}, of {machine.device.type}; {_about_batch_norm(recipe.sync_batchnorm)}",
            )
        say(output, describe_data(options.dataset, splits))
        try:
            with console.ConsoleReporter(output, recipe.epochs) as reporter:
                result = run.train(experiment, splits, folder, machine, reporter, resume=resume, group=group)
        except Interrupted:
            if not group.rank:
                run_folder.forget_launch(folder)  # on purpose: no start after it goes on by itself
            command = "torchrun ... -m resnet_func" if group.ranks else "resnet-func"
            raise Interrupted(f"the run is saved; go on with: {command} train --resume {folder}") from None
    if group.rank:
        return
    run_folder.forget_launch(folder)
    title = f"{recipe.model} on {options.dataset}"
    plots.curves(result.records, folder / "curves.png", title)
    report.write_pictures(result.evaluation, splits.test, result.trained.task.classes, folder, title)
    say(
        output,
        f"test accuracy {result.evaluation.accuracy:.2%}, loss {result.evaluation.loss:.4f} "
        f"after {len(result.records)} epochs; see {folder}/curves.png",
    )


def _experiment(options: Train) -> Experiment:
    data_dir = None if options.data_dir is None else str(options.data_dir.resolve())
    init = None if options.init is None else str(options.init.resolve())
    changes = options.training_set
    if changes.scores:
        changes = replace(changes, scores=str(Path(changes.scores).resolve()))
    return Experiment(
        options.dataset,
        data_dir,
        options.seed,
        options.hyper,
        init,
        changes,
        options.snapshots,
        options.record,
    )


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


def _about_batch_norm(synchronised: bool) -> str:
    if synchronised:
        return "BatchNorm over the parts of all ranks"
    return "BatchNorm over each rank's part of a batch (--sync-batchnorm: of all ranks)"
