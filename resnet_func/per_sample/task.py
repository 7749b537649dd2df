"""What a pass differentiates: a network's loss, with respect to its trainable leaves, on a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from resnet_func import tree
from resnet_func.train.trainable import trained_leaves
from resnet_func.types import LossFn, Model, Params, State, Trainable


class Batch(NamedTuple):
    """A batch with its views folded in: leaves lead with `views * N`, views first."""

    x: Any
    y: Any
    samples: int
    views: int


class Task(NamedTuple):
    """What is differentiated: the loss of a network, with respect to its trainable leaves.

    `like` has the structure of the parameters; its leaves are not looked at.
    """

    model: Model
    loss_fn: LossFn
    trained: dict[str, Tensor]
    frozen: dict[str, Tensor]
    state: State
    like: Params

    def params(self, trained: dict[str, Tensor]) -> Params:
        """The parameters as the network takes them."""
        return tree.replace(self.like, {**self.frozen, **trained})


def make_task(model: Model, loss_fn: LossFn, trainable: Trainable, params: Params, state: State) -> Task:
    """Split the leaves; a frozen one costs nothing."""
    trained = trained_leaves(params, trainable)
    frozen = {path: leaf for path, leaf in tree.flatten(params).items() if path not in trained}
    return Task(model, loss_fn, trained, frozen, state, params)


def leaves_like(trained: dict[str, Tensor], given: Params, name: str) -> dict[str, Tensor]:
    """The leaves of a tree that have their namesake among `trained`, in that order.

    Raises:
        ValueError: one is missing, or has another shape.
    """
    flat = tree.flatten(given)
    for path, leaf in trained.items():
        if path not in flat or flat[path].shape != leaf.shape:
            got = list(flat[path].shape) if path in flat else f"leaves {', '.join(list(flat)[:3])}, ..."
            raise ValueError(
                f"expected a {name} like the trainable parameters, with {path} of {list(leaf.shape)}; "
                f"got {got}. Make one by tree.map(torch.randn_like, params)"
            )
    return {path: flat[path].to(leaf.dtype) for path, leaf in trained.items()}
