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

from resnet_func.app.commands.common import configure, plain_console, say
from resnet_func.app.errors import Interrupted
from resnet_func.app.experiment import Plan
from resnet_func.app.names import counted
from resnet_func.app.options import Train
from resnet_func.app.output import console, plots, report
from resnet_func.app.ranks import launch
from resnet_func.app.storage import run_folder
from resnet_func.app.training import run
from resnet_func.app.training.settle import settle


def main(options: Train) -> None:
    """Train, and write metrics, checkpoints and pictures; under torchrun with its other processes."""
    started = time.perf_counter()
    wished = options.machine
    if options.privacy.private:  # rounding to bf16 would let a gradient exceed its bound
        wished = replace(wished, precision="fp32")
    with (
        launch.group(wished.device, timeout=wished.rank_timeout) as group,
        _folder(options, group) as (folder, resume),
    ):
        output, begun = plain_console(quiet=group.rank > 0), folder if resume else None
        plan = settle(options, begun, configure(wished, begun, group), group, started=started)
        for line in plan.lines:
            say(output, line)
        try:
            with console.ConsoleReporter(output, plan.experiment.recipe.epochs) as reporter:
                seed = options.privacy.insecure_noise_seed
                result = run.train(plan, folder, reporter, resume=resume, group=group, insecure_seed=seed)
        except Interrupted:
            if not group.rank:
                run_folder.forget_launch(folder)  # on purpose: no start after it goes on by itself
            command = "torchrun ... -m resnet_func" if group.ranks else "resnet-func"
            told = f"the run is saved; go on with: {command} train --resume {folder}"
            raise Interrupted(told) from None
        # The others wait, and the mark stays: were one killed meanwhile, or while it ends, the group would
        # start again, find the run, and end it once more.
        group.from_first(lambda: _finish(plan, result, folder, output))


@contextmanager
def _folder(options: Train, group: launch.Group) -> Iterator[tuple[Path, bool]]:
    """The run folder and whether to go on in it; rank 0 decides, and the others are told."""
    if group.rank:
        folder, resume = json.loads(group.from_first(str))
        yield Path(folder), resume
        return
    name, begun = re.sub(r"[^\w.-]+", "-", f"{options.dataset}-{options.hyper.model}"), None
    if launch.is_restarted() and options.resume is None:
        begun = run_folder.find_launch(launch.name_of_launch(), options.run_dir)
    with ExitStack() as stack:
        folder = options.resume or begun or stack.enter_context(run_folder.new(options.run_dir, name))
        resume = options.resume is not None or (begun is not None and run_folder.can_resume(begun))
        if group.ranks:
            run_folder.mark_launch(folder, launch.name_of_launch())
        group.from_first(lambda: json.dumps([str(folder), resume]))
        yield folder, resume


def _finish(plan: Plan, result: run.Result, folder: Path, output: Console) -> str:
    """Draw the pictures and say how it went."""
    experiment = plan.experiment
    title = f"{experiment.recipe.model} on {experiment.dataset}"
    plots.curves(result.records, folder / "curves.png", title)
    report.write_pictures(result.evaluation, plan.splits.test, plan.task.classes, folder, title)
    say(
        output,
        f"test accuracy {result.evaluation.accuracy:.2%}, loss {result.evaluation.loss:.4f} "
        f"after {counted(len(result.records), 'epoch')}; see {folder}/curves.png",
    )
    if experiment.privacy is not None:
        spent = result.records[-1]["epsilon"] if result.records else 0.0
        say(output, f"spent: epsilon {spent:.4g} of {experiment.privacy.epsilon:g}")
    return "finished"
