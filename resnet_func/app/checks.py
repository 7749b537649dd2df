"""What options must be, apart from each other's defaults; imports no torch, so that refusals come at once."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from resnet_func.app.errors import UsageError
from resnet_func.app.experiment import SEEDS
from resnet_func.app.options import (
    Attribute,
    Curvature,
    Evaluate,
    Machine,
    Predict,
    PrivateTraining,
    Scores,
    Summary,
    Train,
)
from resnet_func.models import variants

MOST_THREADS = 4096  # of many more, the threading library ends the process by itself


def check(options: Any) -> None:
    """Refuse options of a command that no run can have.

    Raises:
        UsageError: names the option, what it must be and what it is.

    >>> check(Evaluate(machine=Machine(threads=-1)))
    Traceback (most recent call last):
    resnet_func.app.errors.UsageError: --threads must be 0, for all cores, or up to 4096; got -1
    """
    match options:
        case Summary():
            _check_summary(options)
            return
        case Train():
            _check_train(options)
        case Evaluate(laplace=True, flips=True):
            raise UsageError("--laplace is about the logits of one image. Leave out --flips, or --laplace")
        case Predict(images=()):
            raise UsageError("predict needs an image file or more: resnet-func predict IMAGE...")
        case Attribute(images=(), test_index=()):
            raise UsageError(
                "attribute needs an image file or more, or --test-index: resnet-func attribute IMAGE..."
            )
        case Attribute():
            _check_at_least(1, options, "shown", "dim", "batch_size")
            for index in options.test_index:
                _check("test-index", index, index >= 0, "0 or more")
        case Scores():
            _check_at_least(1, options, "batch_size")
            for name in options.scores:
                if Path(name).is_dir():
                    raise UsageError(f"{name} was read as the name of a score: put runs before --scores")
        case Curvature():
            _check_at_least(1, options, "images", "steps", "probes", "batch_size")
            _check("seed", options.seed, 0 <= options.seed < SEEDS, "0 or more, below 2 ** 63")
    _check_machine(options.machine)
    if isinstance(options, Predict | Attribute):
        for path in options.images:
            if (path / "config.json").is_file():
                raise UsageError(f"{path} is a run folder, not an image: name it by --run-dir {path}")


def _check(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise UsageError(f"--{name} must be {expected}; got {value}")


def _check_at_least(least: int, options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        _check(name.replace("_", "-"), value, value >= least, f"{least} or more")


def _check_machine(machine: Machine) -> None:
    fits = 0 <= machine.threads <= MOST_THREADS
    _check("threads", machine.threads, fits, f"0, for all cores, or up to {MOST_THREADS}")
    known = re.fullmatch(r"auto|(cpu|cuda|mps)(:\d+)?", machine.device) is not None
    _check("device", repr(machine.device), known, "auto, cpu, cuda, cuda:N or mps")
    finite = 0 < machine.rank_timeout < math.inf
    _check("rank-timeout", machine.rank_timeout, finite, "seconds above 0, and finite")


def _check_summary(options: Summary) -> None:
    _check_at_least(0, options, "image_size", "num_classes")
    if ":" in options.model:
        if (options.norm, options.stem) != ("batch", "auto"):
            raise UsageError(f"--norm and --stem are of the zoo's networks; {options.model} has its own")
        from resnet_func.models.interop.load import find_callable  # imports torch, and the network's package

        find = find_callable
    else:
        find = variants.config
    try:
        find(options.model)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_train(options: Train) -> None:
    _check("seed", options.seed, 0 <= options.seed < SEEDS, "0 or more, below 2 ** 63")
    _check_at_least(0, options, "snapshots", "shuffle_window")
    _check_private(options)
    if options.resume is not None:
        return  # what the run began with is not asked for again
    if options.dataset in ("folder", "shards") and options.data_dir is None:
        raise UsageError(
            f"--dataset {options.dataset} needs --data-dir, the folder that holds train and test"
        )
    if options.dataset == "digits" and options.data_dir is not None:
        raise UsageError(
            "digits come with scikit-learn and need no --data-dir. For your own images: --dataset folder"
        )


def _check_private(options: Train) -> None:
    """Refuse what would cost the guarantee, or has none."""
    wish, recipe = options.privacy, options.hyper
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
        _check(name, getattr(wish, name.replace("-", "_")), ok, expected)
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
