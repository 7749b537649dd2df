"""The command line: `resnet-func train | evaluate | predict | summary`."""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from resnet_func import (
    checkpoint,
    console,
    data,
    experiment,
    plots,
    recipes,
    report,
    run_folder,
    runtime,
    summary,
    zoo,
)
from resnet_func.experiment import Experiment, Interrupted
from resnet_func.recipes import Recipe, RecipeName
from resnet_func.resnet import build

DatasetName = Literal["digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "folder"]
INTERRUPTED = 130
COMPILE_ABOVE_FLOPS = 5e13  # some ten minutes on two CPU cores, of which compiling saves more than it costs


@dataclass(frozen=True)
class Machine:
    """How to compute; changes speed, and results only within rounding."""

    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    threads: int = 0
    """CPU threads; 0 is all cores."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward pass; auto is bf16 where the hardware has it."""
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Layout of images and weights."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the training step; auto where a compiler is found and the run is long enough to pay."""


@dataclass(frozen=True)
class Train:
    """Train a ResNet and write a run folder: config, metrics, checkpoints, pictures."""

    dataset: DatasetName = "digits"
    """digits come with scikit-learn, the named sets are downloaded, folder is your own images."""
    data_dir: Path | None = None
    """Where the data set is: for folder, train/<class>/* and test/<class>/*; else the download's root."""
    recipe: RecipeName = "fast"
    """fast: the most accuracy for minutes on two cores; article: ResNet-18 at 224 pixels with Adam."""
    run_dir: Path | None = None
    """A new folder for the results; by default the first free runs/DATASET-MODEL."""
    resume: Path | None = None
    """A run folder to go on with; its config.json decides everything but the machine."""
    seed: int = 0
    """Of initialisation, order and augmentation."""
    download: bool = True
    """Whether a missing data set may be downloaded."""
    hyper: Annotated[Recipe, tyro.conf.OmitArgPrefixes] = field(default_factory=Recipe)
    """The recipe's values, each of which can be changed."""
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = field(default_factory=Machine)


@dataclass(frozen=True)
class Evaluate:
    """Test a trained network: accuracy, a table by class, confusion.png and mistakes.png."""

    run_dir: Path | None = None
    """The run folder; by default the latest below runs/."""
    checkpoint: Literal["last", "best"] = "last"
    """last is the honest one: best was chosen by its test accuracy."""
    data_dir: Path | None = None
    """Where the data set is now, if it has moved."""
    flips: bool = False
    """Average the logits over each image and its mirror image."""
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = field(default_factory=Machine)


@dataclass(frozen=True)
class Predict:
    """Name what is on images: the five likeliest classes of each."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    run_dir: Path | None = None
    """The run folder; by default the latest below runs/."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of the run's checkpoints."""
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = field(default_factory=Machine)


@dataclass(frozen=True)
class Summary:
    """Print a network as a table: layer, output shape, parameters, multiply-accumulates."""

    model: tyro.conf.Positional[str]
    """A network of the zoo."""
    image_size: int = 0
    """Side of the input in pixels; 0 is 224 for the ImageNet stem and 32 for CIFAR's."""
    stem: Literal["auto", "imagenet", "cifar"] = "auto"
    """The first layers; auto is the network's own."""
    norm: Literal["batch", "group", "none"] = "batch"
    """The normalisation layers."""
    num_classes: int = 0
    """Size of the output; 0 is the network's own."""


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


EXPECTED = (run_folder.RunError, experiment.TrainingError, checkpoint.CheckpointError, data.DataError)


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
            records = experiment.train(described, splits, folder, machine, reporter, resume=resume)
    except Interrupted:
        raise Interrupted(f"the run is saved; go on with: resnet-func train --resume {folder}") from None
    title = f"{recipe.model} on {options.dataset}"
    plots.curves(records, folder / "curves.png", title)
    trained = experiment.load_trained(folder, "last", machine)
    evaluation = experiment.evaluate_trained(trained, splits.test, machine)
    report.write_pictures(evaluation, splits.test, trained.task.classes, folder, title)
    _say(
        output,
        f"test accuracy {evaluation.accuracy:.2%} after {len(records)} epochs; see {folder}/curves.png",
    )


def _evaluate(options: Evaluate) -> None:
    output = Console()
    folder = options.run_dir or run_folder.latest()
    machine = _configure(options.machine)
    trained = experiment.load_trained(folder, options.checkpoint, machine, flips=options.flips)
    described = trained.experiment
    if options.data_dir is not None:
        described = replace(described, data_dir=str(options.data_dir))
    source = experiment.load_data(described).test
    if source.classes != trained.task.classes:
        raise data.DataError(f"{source.name} has other classes than the network of {folder} was trained on")
    evaluation = experiment.evaluate_trained(trained, source, machine)
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
    trained = experiment.load_trained(options.run_dir or run_folder.latest(), options.checkpoint, machine)
    images = [experiment.read_image(path, trained.task) for path in options.images]
    output = Console()
    for path, logits in zip(options.images, experiment.predict(trained, images, machine), strict=True):
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
