"""The command line: `resnet-func train | evaluate | predict | summary`."""

from __future__ import annotations

import io
import os
import re
import sys
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Column, Table

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
from resnet_func.models import summary
from resnet_func.models.load import load_network

INTERRUPTED = 130
COMPILE_ABOVE_FLOPS = 1e15  # hours on two CPU cores: below, compiling costs what it saves or more


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0 done, 1 failed with one line on stderr, 2 wrong usage, 130 interrupted and saved. With
    RESNET_FUNC_TRACEBACK=1 an error also shows where it was raised.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is escaped, not fatal
            stream.reconfigure(errors="backslashreplace")
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
    _warn(message)
    return code


def _warn(message: str) -> None:
    print("resnet-func: " + re.sub(r"\s*[\r\n]\s*", " ", message.strip()), file=sys.stderr)


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


@dataclass(frozen=True)
class _Choice:
    """The options that others' defaults depend on."""

    dataset: str = "digits"
    recipe: str = "fast"
    resume: Path | None = None


def _train_defaults(argv: list[str]) -> Train:
    # read by the parser itself, so that a flag given twice, or with "=", means the same to both
    words = [word for word in argv[1:] if word not in ("-h", "--help")]
    choice, _ = tyro.cli(_Choice, args=words, prog="resnet-func train", return_unknown_args=True)
    if choice.resume is None:
        return Train(hyper=recipes.recipe(choice.recipe, choice.dataset))
    saved, _ = run_folder.read_config(choice.resume)
    data_dir, init = (None if path is None else Path(path) for path in (saved.data_dir, saved.init))
    return Train(dataset=saved.dataset, data_dir=data_dir, seed=saved.seed, init=init, hyper=saved.recipe)


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
    output, recipe = _console(), options.hyper
    data_dir = None if options.data_dir is None else str(options.data_dir.resolve())
    init = None if options.init is None else str(options.init.resolve())
    described = Experiment(options.dataset, data_dir, options.seed, recipe, init)
    machine = _configure(options.machine)
    splits = experiment.load_data(described, download=options.download)
    if options.machine.compile == "auto" and machine.compile:
        # where the choice is ours, only what runs long enough to win the compilation's time back
        machine = replace(machine, compile=experiment.training_flops(described, splits) > COMPILE_ABOVE_FLOPS)
    name = re.sub(r"[^\w.-]+", "-", f"{options.dataset}-{recipe.model}")
    with nullcontext(options.resume) if options.resume else run_folder.new(options.run_dir, name) as folder:
        _say(output, runtime.describe(machine))
        _say(output, _describe_data(options.dataset, splits))
        try:
            with console.ConsoleReporter(output, recipe.epochs) as reporter:
                resume = options.resume is not None
                result = run.train(described, splits, folder, machine, reporter, resume=resume)
        except Interrupted:
            raise Interrupted(f"the run is saved; go on with: resnet-func train --resume {folder}") from None
    title = f"{recipe.model} on {options.dataset}"
    plots.curves(result.records, folder / "curves.png", title)
    report.write_pictures(result.evaluation, splits.test, result.trained.task.classes, folder, title)
    _say(
        output,
        f"test accuracy {result.evaluation.accuracy:.2%}, loss {result.evaluation.loss:.4f} "
        f"after {len(result.records)} epochs; see {folder}/curves.png",
    )


def _evaluate(options: Evaluate) -> None:
    output, folder = _console(), options.run_dir or run_folder.latest()
    machine = _configure(options.machine)
    trained = _load(folder, options.checkpoint, machine, flips=options.flips)
    described, classes = trained.experiment, trained.task.classes
    if options.data_dir is not None:
        described = replace(described, data_dir=str(options.data_dir))
    source = experiment.load_data(described).test
    experiment.check_classes(trained.task, source)
    evaluation = inference.evaluate_trained(trained, source, machine)
    output.print(report.class_table(evaluation, classes))
    title = f"{described.recipe.model} on {described.dataset}"
    report.write_pictures(evaluation, source, classes, folder, title)
    _say(
        output,
        f"accuracy {evaluation.accuracy:.2%}, loss {evaluation.loss:.4f} on {source.num_samples} images",
    )
    _say(output, f"wrote {folder}/confusion.png and {folder}/mistakes.png")


def _predict(options: Predict) -> None:
    if not options.images:
        raise UsageError("predict needs an image file or more: resnet-func predict IMAGE...")
    output, machine = _console(), _configure(options.machine)
    trained = _load(options.run_dir or run_folder.latest(), options.checkpoint, machine)
    images = (inference.read_image(path, trained) for path in options.images)
    for path, logits in zip(options.images, inference.predict(trained, images, machine), strict=True):
        best = logits.softmax(0).topk(min(5, len(logits)))
        _say(output, str(path))
        table = Table(Column("class", overflow="fold"), "probability", box=None)
        for share, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            table.add_row(trained.task.classes[index], f"{share:.1%}")
        output.print(table)


def _load(folder: Path, which: str, machine: runtime.Runtime, *, flips: bool = False) -> inference.Trained:
    trained, warning = inference.load_trained(folder, which, machine, flips=flips)
    if warning:
        _warn(warning)
    return trained


def _summary(options: Summary) -> None:
    changes: dict[str, Any] = {"num_classes": options.num_classes} if options.num_classes else {}
    if ":" not in options.model:
        changes["norm"] = options.norm
        if options.stem != "auto":
            changes["stem"] = options.stem
    model, params, state = load_network(options.model, **changes)
    small = model.config is not None and model.config.stem == "cifar"
    size = options.image_size or (32 if small else 224)
    _console().print(summary.table(summary.summarize_network(model, params, state, (3, size, size))))


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


def _describe_data(name: str, splits: data.Splits) -> str:
    channels, height, width = splits.train.image_shape
    return (
        f"data: {name}, {splits.train.num_samples:,} training and {splits.test.num_samples:,} test images, "
        f"{channels}x{height}x{width}, {len(splits.train.classes)} classes"
    )


def _console() -> Console:
    """A console that prints what a user named as it is: "[old]" is no markup, ":cat:" no picture."""
    return Console(markup=False, emoji=False, highlight=False)


def _say(output: Console, text: str) -> None:
    output.print(text, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
