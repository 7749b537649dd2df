"""`over_dataset`: one streaming pass over a data set, any set of quantities together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, Unpack

import torch
from rich.progress import track

from resnet_func import tree
from resnet_func.per_sample.engine import evaluate
from resnet_func.per_sample.options import Options, Settings, check_options
from resnet_func.per_sample.quantities import quantity
from resnet_func.per_sample.quantities.noise_scale import moments_quantity
from resnet_func.per_sample.quantities.quantity import Quantity
from resnet_func.types import LossFn, Model, Params, State

Batches: TypeAlias = Iterable[tuple[Any, Any]]

NAMED: dict[str, Callable[[], Quantity]] = {
    "norms": quantity.norms,
    "layer_norms": quantity.layer_norms,
    "loss": quantity.loss,
    "el2n": quantity.el2n,
    "correct": quantity.correct,
    "moments": moments_quantity,
}


def over_dataset(
    model: Model,
    loss_fn: LossFn,
    quantities: Sequence[str] | Mapping[str, str | Quantity],
    *,
    progress: bool = False,
    **options: Unpack[Options],
) -> Callable[[Params, State, Batches], dict[str, Any]]:
    """Any set of quantities of a whole data set, in one pass over its batches.

    Args:
        model, loss_fn, **options: As in `grads`.
        quantities: Names ("norms", "layer_norms", "loss", "el2n", "correct", "moments"), or a mapping from
            names of your own to those or to a `Quantity`, such as `{"s": sketch_quantity(512, 0,
            "factorized")}`.
        progress: Show a progress bar.

    Returns:
        `fn(params, state, batches) -> {name: result}` for an iterable of `(x, y)`. Per-sample results have
        the length of the data set, in its order; they are on the CPU. Sums and moments are of the whole data
        set.

    Raises:
        ValueError: an unknown name, no batches, or as in `grads`.

    >>> import torch, resnet_func as rf
    >>> model = rf.from_function(lambda params, x: x @ params["w"])  # the gradient of its logit is x
    >>> params, x, y = {"w": torch.ones(2, 1)}, torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2)
    >>> look = rf.per_sample.over_dataset(model, rf.losses.logit(0), ["norms", "loss"])
    >>> look(params, {}, [(x, y), (2 * x, y)])
    {'norms': tensor([ 5.,  1., 10.,  2.]), 'loss': tensor([ 7.,  1., 14.,  2.])}
    """
    chosen = _choose(quantities)
    settings = check_options(model, loss_fn, **options)

    return partial(_over_dataset, settings, chosen, progress)


def _over_dataset(
    settings: Settings,
    chosen: dict[str, Quantity],
    progress: bool,
    params: Params,
    state: State,
    batches: Batches,
) -> dict[str, Any]:
    parts: list[list[Any]] = [[] for _ in chosen]
    for x, y in track(batches, "per-sample", disable=not progress):
        answers = evaluate(settings, list(chosen.values()), params, state, x, y)
        for i, (wanted, answer) in enumerate(zip(chosen.values(), answers, strict=True)):
            # sums stay one sum; what has a row for each sample is joined once, at the end
            parts[i] = _append(wanted, parts[i], answer)
    if not all(parts):
        raise ValueError("expected at least one batch (x, y); the iterable was empty or used up")
    return {
        name: wanted.result(wanted.join(part) if len(part) > 1 else part[0], params)
        for (name, wanted), part in zip(chosen.items(), parts, strict=True)
    }


def _choose(quantities: Sequence[str] | Mapping[str, str | Quantity]) -> dict[str, Quantity]:
    named = quantities if isinstance(quantities, Mapping) else {name: name for name in quantities}
    unknown = [str(q) for q in named.values() if not isinstance(q, Quantity) and q not in NAMED]
    if unknown or not named:
        raise ValueError(
            f"expected quantities among {', '.join(NAMED)}, or a Quantity; got {', '.join(unknown) or 'none'}"
        )
    return {name: q if isinstance(q, Quantity) else NAMED[q]() for name, q in named.items()}


def _append(wanted: Quantity, parts: list[Any], answer: Any) -> list[Any]:
    if wanted.accumulate:
        return [wanted.join([parts[0], answer])] if parts else [answer]
    on_cpu = tree.map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, answer)
    return [*parts, on_cpu]
