"""One pass over a batch: capture by the chosen method, then every quantity, leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.per_sample import contract
from resnet_func.per_sample.capture import Captured, Trainable, capture
from resnet_func.per_sample.contract import Direct, Factors, Way
from resnet_func.per_sample.plan import Plan, plan_layers
from resnet_func.per_sample.quantity import Quantity
from resnet_func.per_sample.reference import reference
from resnet_func.types import LossFn, Model, Params, State

Method: TypeAlias = Literal["auto", "contract", "vmap", "loop"] | Plan


class Options(TypedDict, total=False):
    """What every transform of this package takes as keywords, each optional.

    Args:
        method: "contract" contracts what one backward pass leaves behind; "vmap" and "loop" differentiate
            sample by sample, and work for any model; "auto", the default, contracts wherever the layers are
            known. A `Plan` contracts as it says.
        trainable: Predicate on a leaf's dotted path, such as `lambda path: path.startswith("fc.")`; frozen
            leaves cost nothing and are left out of the result. None, the default, trains every leaf.
        microbatch: Samples at a time; bounds memory, does not change the result. None takes all at once.
        train: BatchNorm couples samples in training mode, so a model with it needs the explicit
            `train=False`: running statistics are used, and not updated. Other models take None and False
            the same.
    """

    method: Method
    trainable: Trainable | None
    microbatch: int | None
    train: bool | None


class Problem(NamedTuple):
    """Whose gradients, and how: the checked options that every transform shares."""

    model: Model
    loss_fn: LossFn
    method: Literal["contract", "vmap", "loop"]
    plan: Plan | None
    trainable: Trainable
    microbatch: int | None
    running_statistics: bool


def pose(
    model: Model,
    loss_fn: LossFn,
    *,
    method: Method = "auto",
    trainable: Trainable | None = None,
    microbatch: int | None = None,
    train: bool | None = None,
) -> Problem:
    """Check the options and fill in the defaults; the transforms' docstrings say what they mean."""
    plan = method if isinstance(method, Plan) else None
    if isinstance(method, Plan):
        method = "contract"
    if method == "auto":
        method = "vmap" if model.config is None else "contract"
    if method not in ("contract", "vmap", "loop"):
        raise ValueError(f"method must be 'auto', 'contract', 'vmap', 'loop' or a plan; got {method!r}")
    if method == "contract" and model.config is None:
        raise ValueError(
            "method='contract' needs the layers of a model built from a config; this one came from a module. "
            "Try method='vmap'"
        )
    if microbatch is not None and microbatch < 1:
        raise ValueError(f"microbatch must be 1 or more samples, or None for all at once; got {microbatch}")
    if train or (model.config is not None and model.config.norm == "batch" and train is None):
        refuse_batch_statistics(train)
    everything: Trainable = lambda path: True  # noqa: E731
    return Problem(model, loss_fn, method, plan, trainable or everything, microbatch, train is False)


def refuse_batch_statistics(train: bool | None) -> None:
    """BatchNorm in training mode has no per-sample gradient."""
    raise ValueError(
        "BatchNorm in training mode couples the samples of a batch, so a per-sample gradient does not exist; "
        f"got train={train}. Pass train=False to use the running statistics, or build the model with "
        "norm='group'"
    )


# --------------------------------------------------------------------------- batches


def as_views(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A checked batch with its views dimension: `x [N, views, C, H, W]`."""
    if x.ndim not in (4, 5):
        raise ValueError(
            f"expected images [N, C, H, W], or [N, views, C, H, W] for augmentation multiplicity; "
            f"got {list(x.shape)}. Add a batch dimension with x[None]"
        )
    if y.ndim == 0 or y.shape[0] != x.shape[0]:
        raise ValueError(
            f"expected one target per sample, [{x.shape[0]}, ...]; got {list(y.shape)}. "
            "Views of a sample share its target"
        )
    if x.ndim == 5 and x.shape[1] == 0:
        raise ValueError(f"expected at least one view of each sample; got {list(x.shape)}")
    return (x.unsqueeze(1) if x.ndim == 4 else x), y


def capture_batch(problem: Problem, params: Params, state: State, x: Tensor, y: Tensor) -> Captured:
    """The factors of one batch by the problem's method; `x [N, views, C, H, W]`."""
    unstated = problem.model.config is None and not problem.running_statistics
    if unstated and any(path.endswith("running_mean") for path in tree.flatten(state)):
        refuse_batch_statistics(None)
    if x.shape[0] == 0:
        return _nothing(problem, params, x, y)
    task = (problem.model, problem.loss_fn, problem.trainable, params, state, x, y)
    if problem.method == "contract":
        return capture(*task)
    return reference(*task, how=problem.method)


def _nothing(problem: Problem, params: Params, x: Tensor, y: Tensor) -> Captured:
    """An empty batch: every leaf has gradients `[0, *shape]`."""
    factors: dict[str, Factors] = {
        path: Direct(leaf.new_zeros((0, *leaf.shape)))
        for path, leaf in tree.flatten(params).items()
        if problem.trainable(path)
    }
    classes = problem.model.config.num_classes if problem.model.config else 0
    return Captured(x.new_zeros(0), x.new_zeros((0, classes)), y, factors, x.shape[1])


# --------------------------------------------------------------------------- evaluation


def evaluate(
    problem: Problem, quantities: Sequence[Quantity], params: Params, state: State, x: Tensor, y: Tensor
) -> list[Any]:
    """Every quantity of one batch, microbatch by microbatch, joined but not yet final."""
    x, y = as_views(x, y)
    size = problem.microbatch or max(x.shape[0], 1)
    parts = [
        _evaluate_part(problem, quantities, params, state, x[start : start + size], y[start : start + size])
        for start in range(0, max(x.shape[0], 1), size)
    ]
    if len(parts) == 1:
        return parts[0]
    return [quantity.join([part[i] for part in parts]) for i, quantity in enumerate(quantities)]


def _evaluate_part(
    problem: Problem, quantities: Sequence[Quantity], params: Params, state: State, x: Tensor, y: Tensor
) -> list[Any]:
    captured = capture_batch(problem, params, state, x, y)
    # autocast is for the network: what is summed here keeps the parameters' dtype
    with torch.autocast(x.device.type, enabled=False):
        return _contract(problem, quantities, captured, x)


def _contract(problem: Problem, quantities: Sequence[Quantity], captured: Captured, x: Tensor) -> list[Any]:
    """Every quantity of a captured batch, leaf by leaf."""
    ways = [plan_ways(problem, quantity.name, x) if quantity.name else {} for quantity in quantities]
    answers: list[dict[str, Any]] = [{} for _ in quantities]
    for path in list(captured.factors):
        factors = captured.factors.pop(path)  # the last reference, unless a quantity keeps it
        wanted: list[tuple[int, Way]] = [
            (i, ways[i].get(path, "materialize")) for i, q in enumerate(quantities) if q.name
        ]
        if sum(way != "ghost" for _, way in wanted) > 1:
            factors = Direct(contract.grads(factors))  # formed once for all
        for i, way in wanted:
            answers[i][path] = quantities[i].leaf(path, factors, way)
        del factors
    return [quantity.finish(answers[i], captured) for i, quantity in enumerate(quantities)]


def plan_ways(problem: Problem, quantity: str, x: Tensor) -> dict[str, Way]:
    """The way of every leaf that has a choice, for a batch `x [N, views, C, H, W]`."""
    if problem.method != "contract" or problem.model.config is None:
        return {}
    if problem.plan is not None:
        return problem.plan.ways
    # strict about what a plan reads: shapes and sizes, never values
    shape = tuple(x.shape)
    return plan_layers(problem.model.config, shape, quantity, problem.trainable, x.element_size()).ways


def detect_nonfinite(norms: Tensor) -> None:
    """Raise where a sample's gradient holds NaN or Inf, naming the samples; silent in compiled code.

    Raises:
        ValueError: a norm is not finite.
    """
    if torch.compiler.is_compiling():
        return
    wrong = (~norms.isfinite()).nonzero().flatten().tolist()
    if wrong:
        shown = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
        raise ValueError(
            f"{len(wrong)} of {norms.shape[0]} samples have a NaN or infinite gradient: {shown}. "
            "Drop them, or pass nonfinite='zero' to leave them out of the sum"
        )
