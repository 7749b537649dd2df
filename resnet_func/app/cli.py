"""The command line: `resnet-func train | evaluate | predict | summary`."""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from resnet_func.app import (
    checkpoint,
    console,
    data,
    experiment,
    inference,
    plots,
    recipes,
    report,
    run,
    run_folder,
    runtime,
)
from resnet_func.app.experiment import Experiment
from resnet_func.app.options import Evaluate, Machine, Predict, Summary, Train
from resnet_func.app.run import Interrupted
from resnet_func.models import summary, zoo
from resnet_func.models.resnet import build

INTERRUPTED = 130
COMPILE_ABOVE_FLOPS = 1e15  # hours on two CPU cores: below, compiling costs what it saves or more


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0 done, 1 failed with one line on stderr, 2 wrong usage, 130 interrupted and saved. With
    RESNET_FUNC_TRACEBACK=1 an error also shows where it was raised.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        command = _parse(argv)
        ACTIONS[type(command)](command)
    except Interrupted as stop:
        return _fail(f"interrupted: {stop}", INTERRUPTED)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except UsageError as error:
        return _fail(str(error), 2, error)
    except (RuntimeError, ValueError, OSError, *EXPECTED) as error:
        return _fail(str(error), 1, error)
    return 0


class UsageError(Exception):
    """The command's options are wrong or do not go together."""


EXPECTED = (run_folder.RunError, run.TrainingError, checkpoint.CheckpointError, data.DataError)


def _fail(message: str, code: int, error: Exception | None = None) -> int:
    if error is not None and os.environ.get("RESNET_FUNC_TRACEBACK"):
        traceback.print_exception(error)
    print("resnet-func: " + " ".join(message.split()), file=sys.stderr)
    return code


# --------------------------------------------------------------------------- options


def _parse(argv: list[str]) -> Train | Evaluate | Predict | Summary:
    """Parse; `train`'s defaults are those of the recipe and data set, or of the run to resume."""
    defaults = _train_defaults(argv) if argv[:1] == ["train"] else Train()
    command = (
        Annotated[Train, tyro.conf.subcommand("train", default=defaults)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[Summary, tyro.conf.subcommand("summary")]
    )
    try:
        parsed = tyro.cli(command, args=argv, prog="resnet-func", description=__doc__)
    except ValueError as error:  # from Recipe's own checks
        raise UsageError(str(error)) from error
    if isinstance(parsed, Train) and parsed.resume is not None:
        _check_resume(parsed, defaults)
    return parsed


def _train_defaults(argv: list[str]) -> Train:
    resume = _peek(argv, "--resume")
    if resume is not None:
        described, _ = experiment.from_description(run_folder.read_config(Path(resume)))
        return Train(
            dataset=described.dataset,
            data_dir=None if described.data_dir is None else Path(described.data_dir),
            seed=described.seed,
            hyper=described.recipe,
        )
    dataset, recipe = _peek(argv, "--dataset") or "digits", _peek(argv, "--recipe") or "fast"
    return Train(hyper=recipes.recipe(recipe, dataset))


def _peek(argv: list[str], flag: str) -> str | None:
    """The value of a flag, read before parsing since other flags' defaults depend on it."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _check_resume(options: Train, saved: Train) -> None:
    # the data may have moved and the machine may differ; nothing else may
    same = replace(saved, resume=options.resume, data_dir=options.data_dir, machine=options.machine)
    same = replace(same, download=options.download)
    if options != same:
        raise UsageError(
            f"--resume takes everything from {options.resume}/config.json; drop the other options, "
            "or start a new run with them"
        )


# --------------------------------------------------------------------------- actions


def _train(options: Train) -> None:
    output = Console()
    resume = options.resume is not None
    recipe = options.hyper
    data_dir = None if options.data_dir is None else str(options.data_dir.resolve())
    described = Experiment(options.dataset, data_dir, options.seed, recipe)
    machine = _configure(options.machine)
    splits = experiment.load_data(described, download=options.download)
    machine = _settle_compile(options.machine, machine, described, splits)
    folder = options.resume or run_folder.new(options.run_dir, f"{options.dataset}-{recipe.model}")
    _say(output, runtime.describe(machine))
    _say(output, _describe_data(options.dataset, splits))
    done = len(run_folder.read_metrics(folder)) if resume else 0
    try:
        with console.ConsoleReporter(output, recipe.epochs, done) as reporter:
            records = run.train(described, splits, folder, machine, reporter, resume=resume)
    except Interrupted:
        raise Interrupted(f"the run is saved; go on with: resnet-func train --resume {folder}") from None
    title = f"{recipe.model} on {options.dataset}"
    plots.curves(records, folder / "curves.png", title)
    trained = inference.load_trained(folder, "last", machine)
    evaluation = inference.evaluate_trained(trained, splits.test, machine)
    report.write_pictures(evaluation, splits.test, trained.task.classes, folder, title)
    _say(
        output,
        f"test accuracy {evaluation.accuracy:.2%} after {len(records)} epochs; see {folder}/curves.png",
    )


def _evaluate(options: Evaluate) -> None:
    output = Console()
    folder = options.run_dir or run_folder.latest()
    machine = _configure(options.machine)
    trained = inference.load_trained(folder, options.checkpoint, machine, flips=options.flips)
    described = trained.experiment
    if options.data_dir is not None:
        described = replace(described, data_dir=str(options.data_dir))
    source = experiment.load_data(described).test
    if source.classes != trained.task.classes:
        raise data.DataError(f"{source.name} has other classes than the network of {folder} was trained on")
    evaluation = inference.evaluate_trained(trained, source, machine)
    output.print(report.class_table(evaluation, trained.task.classes))
    title = f"{described.recipe.model} on {described.dataset}"
    report.write_pictures(evaluation, source, trained.task.classes, folder, title)
    _say(
        output,
        f"accuracy {evaluation.accuracy:.2%}, loss {evaluation.loss:.4f} on {source.num_samples} images",
    )
    _say(output, f"wrote {folder}/confusion.png and {folder}/mistakes.png")


def _predict(options: Predict) -> None:
    if not options.images:
        raise UsageError("predict needs an image file or more: resnet-func predict IMAGE...")
    machine = _configure(options.machine)
    trained = inference.load_trained(options.run_dir or run_folder.latest(), options.checkpoint, machine)
    images = [inference.read_image(path, trained.task) for path in options.images]
    output = Console()
    for path, logits in zip(options.images, inference.predict(trained, images, machine), strict=True):
        best = logits.softmax(0).topk(min(5, len(logits)))
        table = Table(str(path), "probability", box=None)
        for share, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            table.add_row(trained.task.classes[index], f"{share:.1%}")
        output.print(table)


def _summary(options: Summary) -> None:
    changes: dict[str, Any] = {"norm": options.norm}
    if options.stem != "auto":
        changes["stem"] = options.stem
    if options.num_classes:
        changes["num_classes"] = options.num_classes
    config = zoo.config(options.model, **changes)
    size = options.image_size or (224 if config.stem == "imagenet" else 32)
    Console().print(summary.table(summary.summarize(build(config), size)))


ACTIONS = {Train: _train, Evaluate: _evaluate, Predict: _predict, Summary: _summary}


def _configure(machine: Machine) -> runtime.Runtime:
    return runtime.configure(
        device=machine.device,
        threads=machine.threads or None,
        precision=machine.precision,
        memory_format=machine.memory_format,
        winograd=machine.winograd,
        compile=machine.compile,
    )


def _settle_compile(
    options: Machine, machine: runtime.Runtime, described: Experiment, splits: data.Splits
) -> runtime.Runtime:
    """Where the choice is ours, compile only what runs long enough to win the compilation's time back."""
    if options.compile != "auto" or not machine.compile:
        return machine
    return replace(machine, compile=experiment.training_flops(described, splits) > COMPILE_ABOVE_FLOPS)


def _describe_data(name: str, splits: data.Splits) -> str:
    channels, height, width = splits.train.image_shape
    return (
        f"data: {name}, {splits.train.num_samples:,} training and {splits.test.num_samples:,} test images, "
        f"{channels}x{height}x{width}, {len(splits.train.classes)} classes"
    )


def _say(output: Console, text: str) -> None:
    output.print(text, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
