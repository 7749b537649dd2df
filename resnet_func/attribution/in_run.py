"""The worth of every training sample during training itself: in-run data Shapley values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, Unpack, cast

import torch
from jaxtyping import Float
from torch import Tensor

from resnet_func import tree
from resnet_func.losses import check_per_sample
from resnet_func.per_sample import dot
from resnet_func.per_sample.constants import ConstantUnderNoGrad
from resnet_func.per_sample.options import Options
from resnet_func.train.trainable import trained_leaves
from resnet_func.types import LossFn, Model, Params, State, Trainable

Pair: TypeAlias = tuple[Any, Any]


def in_run_values(
    model: Model, loss_fn: LossFn, *, order: Literal[1, 2] = 1, **options: Unpack[Options]
) -> Callable[..., Float[Tensor, "n"]]:
    """How much each sample of a batch lowers the validation loss by the step that is taken on that batch.

    A step `params - learning_rate * sum_i gradient_i` changes the validation loss by a Taylor series whose
    Shapley values have a closed form (Wang et al. 2025, https://arxiv.org/abs/2406.11011). To first order a
    sample's is `learning_rate * <gradient_i, v>`, v the validation gradient; the second order subtracts
    `learning_rate^2 / 2 * <gradient_i, H sum_j gradient_j>`, H the validation loss's Hessian. Both are
    products with one direction, so that a call costs about a forward-mode pass over the batch and a backward
    pass over the validation batch (order 2: one more of each). Add up a sample's values over the steps.

    Args:
        model, loss_fn, **options: As in `per_sample.grads`; networks are in evaluation mode.
        order: Of the Taylor series.

    Returns:
        `fn(params, state, (x, y), (x_val, y_val), learning_rate) -> Tensor [N]`, before the step:
        `learning_rate` is that of plain SGD on the batch's sum; for its mean, the rate over N. Positive where
        a sample helps.

    Raises:
        ValueError: another order, or as in `per_sample.dot`.

    >>> import resnet_func as rf
    >>> model = rf.resnet20(depths=(1, 1, 1), norm="group")
    >>> params, state = model.init(torch.Generator().manual_seed(0))
    >>> batch = torch.ones(2, 3, 8, 8), torch.tensor([0, 1])
    >>> in_run_values(model, rf.losses.cross_entropy)(params, state, batch, batch, 0.01).shape
    torch.Size([2])
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2; got {order}")
    return _Values(model, loss_fn, order, options.get("trainable"), dot(model, loss_fn, **options))


class _Values(NamedTuple):
    """`in_run_values`, bound to its arguments."""

    model: Model
    loss_fn: LossFn
    order: int
    trainable: Trainable | None
    products: Callable[..., Tensor]

    def __call__(
        self,
        params: Params,
        state: State,
        batch: Pair,
        validation: Pair,
        learning_rate: float,
    ) -> Tensor:
        chosen = trained_leaves(params, self.trainable)
        task = self.model, self.loss_fn, params, state
        gradient = torch.func.grad(partial(_mean_loss, *task, *validation))
        if self.order == 1:
            along = {path: learning_rate * leaf for path, leaf in gradient(chosen).items()}
        else:
            total = torch.func.grad(partial(_sum_loss, *task, *batch))(chosen)
            first, second = cast(tuple[Any, Any], torch.func.jvp(gradient, (chosen,), (total,)))
            along = {p: learning_rate * (first[p] - learning_rate / 2 * second[p]) for p in first}
        return self.products(params, state, *batch, tree.select(params, along))


def _losses(
    model: Model, loss_fn: LossFn, params: Params, state: State, x: Any, y: Any, chosen: dict[str, Tensor]
) -> Tensor:
    with ConstantUnderNoGrad():
        logits = model.apply(tree.replace(params, chosen), state, x, train=False)[0]
    losses = loss_fn(logits, y)
    check_per_sample(losses, len(tree.leaves(x)[0]))
    return losses


def _mean_loss(*args: Any) -> Tensor:
    return _losses(*args).mean()


def _sum_loss(*args: Any) -> Tensor:
    return _losses(*args).sum()
