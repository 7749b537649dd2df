"""The references: per-sample gradients by `torch.func` over single samples, for any model and any loss.

They know nothing of layers. The contractions are proven equal to them, and users can ask for them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.losses import check_per_sample
from resnet_func.per_sample.capture import Captured
from resnet_func.per_sample.layers.factors import Direct, Factors, split_views
from resnet_func.per_sample.task import Batch, Task

# `(trained, x, y) -> (gradients, (loss, logits))` of one sample; the leaves of x lead with its views.
GradientOfOne: TypeAlias = Callable[
    [dict[str, Tensor], Any, Any], tuple[dict[str, Tensor], tuple[Tensor, Tensor]]
]


def reference(task: Task, batch: Batch, *, how: Literal["vmap", "loop"]) -> Captured:
    """What `capture` returns, with every gradient materialised."""
    # [N, views, ...]: what belongs to one sample
    x = tree.map(lambda leaf: split_views(leaf, batch.views).transpose(0, 1), batch.x)
    y = tree.map(lambda leaf: split_views(leaf, batch.views).transpose(0, 1), batch.y)
    one = _gradient_of_one(task)
    if how == "vmap":
        grads, (losses, logits) = torch.vmap(one, in_dims=(None, 0, 0))(task.trained, x, y)
    else:
        results = [one(task.trained, _sample(x, i), _sample(y, i)) for i in range(batch.samples)]
        grads = {path: torch.stack([grad[path] for grad, _ in results]) for path in task.trained}
        losses = torch.stack([loss for _, (loss, _) in results])
        logits = torch.stack([logits for _, (_, logits) in results])
    factors: dict[str, Factors] = {path: Direct(grads[path]) for path in task.trained}
    dtypes = [losses.dtype, logits.dtype]
    return Captured(losses, logits.transpose(0, 1).flatten(0, 1), batch.y, batch.views, dtypes, factors)


def _sample(batch: Any, index: int) -> Any:
    return tree.map(lambda leaf: leaf[index], batch)


def _gradient_of_one(task: Task) -> GradientOfOne:
    def loss(trained: dict[str, Tensor], x: Any, y: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits, _ = task.model.apply(task.params(trained), task.state, x, train=False)
        losses = task.loss_fn(logits, y)
        check_per_sample(losses, logits.shape[0])
        return losses.mean(), (losses.mean(), logits)

    return torch.func.grad(loss, has_aux=True)
