"""The references: per-sample gradients by `torch.func` over single samples, for any model and any loss.

They know nothing of layers. The contractions are proven equal to them, and users can ask for them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.per_sample.capture import Captured, Trainable, fold_views
from resnet_func.per_sample.contract import Direct, Factors
from resnet_func.types import LossFn, Model, Params, State


def reference(
    model: Model,
    loss_fn: LossFn,
    trainable: Trainable,
    params: Params,
    state: State,
    x: Tensor,
    y: Tensor,
    *,
    how: Literal["vmap", "loop"],
) -> Captured:
    """What `capture` returns, with every gradient materialised, for `x [N, views, C, H, W]`."""
    flat = tree.flatten(params)
    trained = {path: leaf for path, leaf in flat.items() if trainable(path)}
    one = _gradient_of_one(model, loss_fn, flat, state)
    if how == "vmap":
        grads, (losses, logits) = torch.vmap(one, in_dims=(None, 0, 0))(trained, x, y)
    else:
        results = [one(trained, x[i], y[i]) for i in range(x.shape[0])]
        grads = {path: torch.stack([grad[path] for grad, _ in results]) for path in trained}
        losses = torch.stack([loss for _, (loss, _) in results])
        logits = torch.stack([logits for _, (_, logits) in results])
    factors: dict[str, Factors] = {path: Direct(grads[path]) for path in trained}
    return Captured(losses, logits.transpose(0, 1).flatten(0, 1), fold_views(x, y)[1], factors, x.shape[1])


def _gradient_of_one(
    model: Model, loss_fn: LossFn, params: dict[str, Tensor], state: State
) -> Callable[[dict[str, Tensor], Tensor, Tensor], tuple[dict[str, Tensor], tuple[Tensor, Tensor]]]:
    """`(trained, x [views, C, H, W], y) -> (gradients, (loss, logits))` of one sample."""

    def loss(trained: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits, _ = model.apply(tree.unflatten({**params, **trained}), state, x, train=False)
        losses = loss_fn(logits, y.expand(x.shape[0], *y.shape))
        check_per_sample(losses, x.shape[0])
        return losses.mean(), (losses.mean(), logits)

    return torch.func.grad(loss, has_aux=True)
