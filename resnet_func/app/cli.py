"""The command line: `resnet-func train | evaluate | predict | summary | scores | attribute | curvature`.

Options are parsed and refused without importing torch, which takes seconds; a command's file does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import operator
import os
import re
import sys
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from resnet_func.app import recipes
from resnet_func.app.checks import check
from resnet_func.app.errors import AppError, Interrupted, Unspoken, UsageError, warn
from resnet_func.app.experiment import Privacy
from resnet_func.app.options import (
    Attribute,
    Curvature,
    Evaluate,
    Predict,
    PrivateTraining,
    Scores,
    Summary,
    Train,
)
from resnet_func.app.ranks import launch
from resnet_func.app.storage import run_folder

INTERRUPTED = 130
SUMMARY = "Train ResNets and other networks on images, test them, and ask them."
COMMANDS = {
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "summary": Summary,
    "scores": Scores,
    "attribute": Attribute,
    "curvature": Curvature,
}
"""Options by name; what a command does is `main` in `commands/NAME.py`."""
DEALT = ("train", "scores", "attribute")
"""The commands that several processes share."""
LISTS = {"predict": "", "attribute": "--test-index", "scores": "--scores"}
"""The commands that take several files or runs, and the option of each that takes several words."""
OUT_OF_MEMORY = "there is not enough memory: lower --batch-size, raise --microbatches, or take smaller images"
REFUSALS = (ValueError, OSError, ImportError, AppError)
"""What says in one line what is wrong; an ImportError names the package that is not there."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0 done, 1 failed with one line on stderr, 2 wrong usage, 130 interrupted and saved. With
    RESNET_FUNC_TRACEBACK=1 an error also shows where it was raised. Of several ranks, one prints the line.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is escaped, not fatal
            stream.reconfigure(errors="backslashreplace")
    try:
        with launch.quiet_unless_first():
            options = _parse(argv)
            name = next(name for name, command in COMMANDS.items() if isinstance(options, command))
            if name not in DEALT and os.environ.get("WORLD_SIZE", "1") != "1" and launch.is_launched():
                raise UsageError(
                    f"{name} runs on one process: start it without torchrun, which {', '.join(DEALT)} take"
                )
    except REFUSALS as error:  # of every rank alike
        return _fail(error) if launch.is_first() else _exit_code(error)
    try:
        importlib.import_module(f"resnet_func.app.commands.{name}").main(options)
    except Unspoken as told:
        return _exit_code(told.cause)
    except (KeyboardInterrupt, Interrupted, RuntimeError, MemoryError, *REFUSALS) as error:
        return _fail(error)
    return 0


def _fail(error: BaseException) -> int:
    code = _exit_code(error)
    if code == INTERRUPTED:
        warn(f"interrupted: {error}" if str(error) else "interrupted")
        return code
    if os.environ.get("RESNET_FUNC_TRACEBACK"):
        traceback.print_exception(error)
    detail = f" ({error})" if str(error) else ""
    warn(f"{OUT_OF_MEMORY}{detail}" if _is_out_of_memory(error) else str(error))
    return code


def _is_out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or "DefaultCPUAllocator: " in str(error)
        or "out of memory" in str(error)
    )


def _exit_code(error: BaseException) -> int:
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return INTERRUPTED
    return 2 if isinstance(error, UsageError) else 1


# --------------------------------------------------------------------------- options


def _parse(argv: list[str]) -> Any:
    """Parse; `train`'s defaults are those of the recipe and data set, or of the run to resume."""
    argv = _positionals_first(argv)
    defaults = {"train": _train_defaults(argv)} if argv[:1] == ["train"] else {}
    choices = []
    for name, command in COMMANDS.items():
        default: dict[str, Any] = {"default": defaults[name]} if name in defaults else {}
        choices.append(Annotated[command, tyro.conf.subcommand(name, **default)])
    any_command = functools.reduce(operator.or_, choices)
    parse = functools.partial(tyro.cli, any_command, args=argv, prog="resnet-func", description=SUMMARY)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options = parse(console_outputs=False)
    except SystemExit as stop:
        refusal = _own_refusal(stop)
        if refusal is not None:
            raise UsageError(refusal) from None
        options = parse()  # once more, to print the help, or what the parser itself refuses
    check(options)
    match options:
        case Train(resume=Path()):
            _check_resume(options, defaults["train"])
        case Train():
            options = _epochs_or_minutes(options, defaults["train"].hyper)
        case Scores():
            _check_runs(options.runs or (run_folder.latest(),), options.data_dir)
        case Curvature():
            _check_runs((options.run or run_folder.latest(),), options.data_dir)
        case Evaluate() | Attribute():
            _check_runs((options.run_dir or run_folder.latest(),), options.data_dir)
        case Predict():
            _check_runs((options.run_dir or run_folder.latest(),), None)
    return options


def _check_runs(runs: tuple[Path, ...], data_dir: Path | None) -> None:
    """Refuse what is no run before torch is imported, and a folder for data that need none."""
    for run in runs:
        experiment, _ = run_folder.read_config(run)
        if data_dir is not None and experiment.dataset == "digits":
            raise UsageError(f"{run} is of digits, which come with scikit-learn and need no --data-dir")


def _positionals_first(argv: list[str]) -> list[str]:
    """The words, with files and runs before the options, as the parser needs them; else they may be anywhere.

    So that `attribute --test-index 3 cat.png` has one number and one file. No option of these commands is a
    flag: each takes one word, and the one of a list those that fit it.
    """
    if argv[:1] == ["evaluate"] and argv[1:] and not argv[1].startswith("-"):
        raise UsageError(f"evaluate takes its run by an option: resnet-func evaluate --run-dir {argv[1]}")
    if not argv or argv[0] not in LISTS:
        return argv
    groups: list[list[str]] = [[]]  # an option, and what follows it
    for word in argv[1:]:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            groups.append([name, value] if equals else [name])
        else:
            groups[-1].append(word)
    first, *others = groups
    words: list[str] = []
    for name, *values in others:
        # the first is the option's in any case: what is wrong with it the parser says
        listed = name.replace("_", "-") == LISTS[argv[0]]
        own = [listed and _fits(name, word) for word in values[1:]]
        first += [word for word, stays in zip(values[1:], own, strict=True) if not stays]
        words += [name, *values[:1], *[word for word, stays in zip(values[1:], own, strict=True) if stays]]
    return [argv[0], *first, *words]


def _fits(option: str, word: str) -> bool:
    """Whether a word can be a value of a list's option: a number, or no run folder."""
    if option.replace("_", "-") == "--test-index":
        return re.fullmatch(r"[+-]?\d+", word) is not None
    return not (Path(word) / "config.json").is_file()


def _own_refusal(stop: SystemExit) -> str | None:
    """What a check of our own said of the options, where one of them ended the parser."""
    error: BaseException | None = stop
    while error is not None:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        raised_in = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
        if isinstance(error, ValueError) and raised_in.startswith("resnet_func."):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


@dataclass(frozen=True)
class _Choice:
    """The options that others' defaults depend on."""

    dataset: str = "digits"
    recipe: str | None = None
    resume: Path | None = None
    private: bool = False


def _train_defaults(argv: list[str]) -> Train:
    # read by the parser itself, so that a flag given twice, or with "=", means the same to both
    words = [word for word in argv[1:] if word not in ("-h", "--help")]
    choice, _ = tyro.cli(_Choice, args=words, prog="resnet-func train", return_unknown_args=True)
    if choice.resume is None:
        name: Any = choice.recipe or ("private" if choice.private else "fast")
        if name not in get_args(recipes.RecipeName):
            return Train()  # the parser says what there is
        return Train(recipe=name, hyper=recipes.recipe(name, choice.dataset))
    saved, _ = run_folder.read_config(choice.resume)
    data_dir, init = (None if path is None else Path(path) for path in (saved.data_dir, saved.init))
    return Train(
        dataset=saved.dataset,
        data_dir=data_dir,
        shuffle_window=saved.shuffle_window,
        seed=saved.seed,
        init=init,
        hyper=saved.recipe,
        privacy=_saved_privacy(saved.privacy),
        snapshots=saved.snapshots,
        record=saved.record,
        training_set=saved.training_set,
    )


def _saved_privacy(saved: Privacy | None) -> PrivateTraining:
    if saved is None:
        return PrivateTraining()
    fields = asdict(saved)
    for decided in ("noise_multiplier", "insecure"):
        del fields[decided]
    return PrivateTraining(private=True, **fields)


def _epochs_or_minutes(options: Train, default: recipes.Recipe) -> Train:
    """A budget that is given takes the place of the recipe's epochs, and epochs that of its budget."""
    recipe = options.hyper
    epochs, minutes = recipe.epochs != default.epochs, recipe.minutes != default.minutes
    if epochs and minutes and recipe.epochs and recipe.minutes:
        raise UsageError("--epochs and --minutes say the same twice; leave one out")
    if minutes and recipe.minutes:
        return replace(options, hyper=replace(recipe, epochs=0))
    return replace(options, hyper=replace(recipe, minutes=0.0)) if recipe.epochs else options


def _check_resume(options: Train, saved: Train) -> None:
    # the data may have moved and the machine may differ; nothing else may
    same = replace(saved, resume=options.resume, data_dir=options.data_dir, machine=options.machine)
    same = replace(same, download=options.download)
    if options != same:
        raise UsageError(
            f"--resume takes everything from {options.resume}/config.json; drop the other options, "
            "or start a new run with them"
        )


if __name__ == "__main__":
    sys.exit(main())
