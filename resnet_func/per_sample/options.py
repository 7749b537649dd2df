"""The options that every transform shares, checked once."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

from resnet_func.calibration import TYPICAL, Speeds
from resnet_func.per_sample.checks import Checks
from resnet_func.per_sample.layers.contract import Way
from resnet_func.per_sample.plan import Plan
from resnet_func.types import LossFn, Model, Trainable

Method: TypeAlias = Literal["auto", "contract", "vmap", "loop"] | Plan


class Options(TypedDict, total=False):
    """What every transform of this package takes as keywords, each optional.

    Args:
        method: "contract", the default ("auto" is the same), contracts what one backward pass leaves behind,
            for any network; "vmap" and "loop" differentiate sample by sample. A `Plan` contracts as it says.
        trainable: Predicate on a leaf's dotted path, such as `lambda path: path.startswith("fc.")`; frozen
            leaves cost nothing and are left out of the result. None, the default, trains every leaf.
        microbatch: Samples at a time; bounds memory, does not change the result. None takes all at once.
        train: BatchNorm couples samples in training mode, so a model with it needs the explicit
            `train=False`: running statistics are used, and not updated. Other models take None and False
            the same.
        views: Whether inputs are `[N, views, ...]`. None, the default, takes images of five dimensions for a
            network built from a config so, and nothing else.
        check: Whether results are compared with a loop over single samples, on two samples of the batch.
            None, the default, does so once for each network and loss, True every time, False never. Compiled
            code and `vmap` cannot compare, and compiled code sees no assignments by index: call a new network
            once without, on two different samples or more. Unchecked, a first dimension that is not the
            batch's but as long, as in a sequence-first network of N samples and N positions, is taken for it.
        speeds: What contractions are chosen by; None is `calibration.TYPICAL`, and the same everywhere.
            `calibration.measured()` has this machine's. Results differ in rounding at most.
    """

    method: Method
    trainable: Trainable | None
    microbatch: int | None
    train: bool | None
    views: bool | None
    check: bool | None
    speeds: Speeds | None


class Settings(NamedTuple):
    """What is differentiated and how: the checked options of a transform."""

    model: Model
    loss_fn: LossFn
    method: Literal["contract", "vmap", "loop"]
    plan: Plan | None
    trainable: Trainable
    microbatch: int | None
    running_statistics: bool
    views: bool | None
    checks: Checks
    speeds: Speeds
    planned: dict[Any, list[dict[str, Way]] | None]  # the ways for each size of batch that came


def check_options(
    model: Model,
    loss_fn: LossFn,
    *,
    method: Method = "auto",
    trainable: Trainable | None = None,
    microbatch: int | None = None,
    train: bool | None = None,
    views: bool | None = None,
    check: bool | None = None,
    speeds: Speeds | None = None,
) -> Settings:
    """Checks the options and fills in the defaults; `Options` says what they mean.

    Raises:
        ValueError: an option is out of range, or the model has BatchNorm and `train` is not False.
    """
    plan = None
    if isinstance(method, Plan):
        plan, method = method, "contract"
    if method == "auto":
        method = "contract"
    if method not in ("contract", "vmap", "loop"):
        raise ValueError(f"method must be 'auto', 'contract', 'vmap', 'loop' or a plan; got {method!r}")
    if microbatch is not None and microbatch < 1:
        raise ValueError(f"microbatch must be 1 or more samples, or None for all at once; got {microbatch}")
    batch_norm = model.config is not None and model.config.norm == "batch"
    if train and not batch_norm:
        raise ValueError(
            "per-sample gradients are taken in evaluation mode, whatever the network; got train=True. "
            "Leave it out, or pass train=False"
        )
    if batch_norm and train is not False:
        refuse_batch_statistics(train)
    return Settings(
        model,
        loss_fn,
        method,
        plan,
        trainable or every_leaf,
        microbatch,
        train is False,
        views,
        Checks(check),
        speeds or TYPICAL,
        {},
    )


def every_leaf(path: str) -> bool:
    """The predicate that trains all."""
    return True


def refuse_batch_statistics(train: bool | None) -> None:
    """BatchNorm in training mode has no per-sample gradient."""
    raise ValueError(
        "BatchNorm in training mode couples the samples of a batch, so a per-sample gradient does not exist; "
        f"got train={train}. Pass train=False to use the running statistics, or build the model with "
        "norm='group'"
    )
