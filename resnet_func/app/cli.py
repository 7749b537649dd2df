"""The command line: `resnet-func train | evaluate | predict | summary | scores | attribute | curvature`.

Options are parsed and refused without importing torch, which takes seconds; a command's file does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import math
import operator
import os
import sys
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from resnet_func.app import recipes
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
    except (KeyboardInterrupt, Interrupted, RuntimeError, *REFUSALS) as error:
        return _fail(error)
    return 0


def _fail(error: BaseException) -> int:
    code = _exit_code(error)
    if code == INTERRUPTED:
        warn(f"interrupted: {error}" if str(error) else "interrupted")
        return code
    if os.environ.get("RESNET_FUNC_TRACEBACK"):
        traceback.print_exception(error)
    warn(str(error))
    return code


def _exit_code(error: BaseException) -> int:
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return INTERRUPTED
    return 2 if isinstance(error, UsageError) else 1


# --------------------------------------------------------------------------- options


def _parse(argv: list[str]) -> Any:
    """Parse; `train`'s defaults are those of the recipe and data set, or of the run to resume."""
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
    if isinstance(options, Train):
        _check_private(options)
    match options:
        case Summary() if ":" in options.model and (options.norm, options.stem) != ("batch", "auto"):
            raise UsageError(f"--norm and --stem are of the zoo's networks; {options.model} has its own")
        case Train(resume=Path()):
            _check_resume(options, defaults["train"])
        case Train():
            _check_training(options)
            options = _epochs_or_minutes(options, defaults["train"].hyper)
        case Predict(images=()):
            raise UsageError("predict needs an image file or more: resnet-func predict IMAGE...")
        case Attribute(images=(), test_index=()):
            raise UsageError(
                "attribute needs an image file or more, or --test-index: resnet-func attribute IMAGE..."
            )
        case Scores():
            for name in options.scores:
                if Path(name).is_dir():
                    raise UsageError(f"{name} was read as the name of a score: put runs before --scores")
            for folder in options.runs or (run_folder.latest(),):
                run_folder.read_config(folder)
        case Curvature():
            run_folder.read_config(options.run or run_folder.latest())
        case Evaluate() | Predict() | Attribute():
            run_folder.read_config(options.run_dir or run_folder.latest())  # refused before torch is imported
    return options


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


def _check_private(options: Train) -> None:
    """Refuse what would cost the guarantee, or has none."""
    wish, recipe = options.privacy, options.hyper
    if options.shuffle_window < 0:
        raise UsageError(f"--shuffle-window must be 0 or more; got {options.shuffle_window}")
    if not wish.private:
        if wish != PrivateTraining():
            raise UsageError("options of private training need --private: train --private --epsilon 8")
        return
    if wish.epsilon is None:
        raise UsageError("--private needs a budget: --epsilon 8 (1 to 8 is common)")
    for name, ok, expected in (
        ("epsilon", 0 < wish.epsilon < math.inf, "above 0 and finite"),
        ("delta", 0 < wish.delta < 1, "in (0, 1): 1e-5"),
        ("max-norm", 0 < wish.max_norm < math.inf, "above 0 and finite"),
        ("views", wish.views >= 1, "1 or more"),
    ):
        if not ok:
            raise UsageError(f"--{name} must be {expected}; got {getattr(wish, name.replace('-', '_'))}")
    if wish.sampling == "shuffle":
        raise UsageError(
            "--sampling shuffle has no accountant: batches of a shuffled data set leak more than Poisson "
            "batches do. Use --sampling poisson"
        )
    if wish.sampling == "fixed-size" and wish.neighbours == "add-or-remove-one":
        raise UsageError("--sampling fixed-size is accounted for --neighbours replace-one only")
    if ":" not in recipe.model and recipe.norm == "batch":
        raise UsageError(
            "--norm batch couples the images of a batch, so that no image's gradient can be bounded by "
            "itself. Use --norm group (--recipe private does)"
        )
    if options.record:
        raise UsageError("--record keeps what the network says of each training image, which is not private")
    if options.training_set.keep < 1 and options.training_set.which != "random":
        raise UsageError("--keep by scores chooses images by what is not private. Use --which random")
    if options.shuffle_window:
        raise UsageError("--private draws from all images at every step: leave --shuffle-window out")
    if recipe.epochs == 0:
        raise UsageError("--private must know its steps before the first: give --epochs instead of --minutes")
    if options.machine.precision == "bf16":
        raise UsageError("--private computes in fp32: rounding to bf16 lets a gradient exceed its bound")


def _check_training(options: Train) -> None:
    if options.seed < 0:
        raise UsageError(f"--seed must be 0 or more; got {options.seed}")
    if options.dataset == "digits" and options.data_dir is not None:
        raise UsageError(
            "digits come with scikit-learn and need no --data-dir. For your own images: --dataset folder"
        )


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
