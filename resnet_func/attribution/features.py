"""Features of samples for TRAK, TracIn and cosines alike: a sketch of the gradient of the log-odds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeAlias, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from resnet_func import tree
from resnet_func.attribution.quantities import log_odds
from resnet_func.per_sample import over_dataset, sketch_quantity
from resnet_func.per_sample.dataset import Batches
from resnet_func.per_sample.layers.factors import Direct
from resnet_func.per_sample.options import Options
from resnet_func.per_sample.quantities.projections import Projection, add_up, sketch_leaf
from resnet_func.per_sample.quantities.quantity import loss as loss_quantity
from resnet_func.types import Model, Params, State


class Sketch(NamedTuple):
    """A random projection of gradients; `per_sample.sketch` says what each entry means."""

    dim: int = 4096
    seed: int = 0
    projection: Projection = "factorized"


class Features(NamedTuple):
    """What is kept of N samples.

    Attributes:
        sketches: Of the gradient of each sample's log-odds (`log_odds`), `[N, dim]`.
        slack: `1 - p`, p the probability of the label, `[N]`. The gradient of a sample's cross-entropy is
            minus its slack times the gradient of its log-odds.
    """

    sketches: Float[Tensor, "n dim"]
    slack: Float[Tensor, "n"]

    def loss_sketches(self) -> Float[Tensor, "n dim"]:
        """Sketches of the gradients of the cross-entropy."""
        return -self.slack[:, None] * self.sketches

    def rows(self) -> Float[Tensor, "n dim+1"]:
        """As one matrix, for a store: the slack is the last column."""
        return torch.cat([self.sketches, self.slack[:, None]], 1)

    @staticmethod
    def from_rows(rows: Float[Tensor, "n dim+1"]) -> Features:
        """The inverse of `rows`."""
        return Features(rows[:, :-1], rows[:, -1])


# A data set's features, some rows at a time; it can be gone through more than once, such as a list.
Blocks: TypeAlias = Iterable[Features]


def make_features(
    model: Model, sketch: Sketch | None = None, *, progress: bool = False, **options: Unpack[Options]
) -> Callable[[Params, State, Batches], Features]:
    """The features of a data set, in one pass over its batches.

    Args:
        model: A classifier of two classes or more.
        sketch: The projection; train and test features must have the same. None is `Sketch()`.
        progress: Show a progress bar.
        **options: As in `per_sample.grads`.

    Returns:
        `fn(params, state, batches) -> Features` on the CPU, for an iterable of `(x, y)` with class indices
        `y`. They need `N * (dim + 1)` numbers: fill a `Store` where that is too much.

    Raises:
        ValueError: as in `per_sample.sketch` and `per_sample.over_dataset`.

    >>> import resnet_func as rf
    >>> model = rf.resnet20(depths=(1, 1, 1), norm="group")
    >>> params, state = model.init(torch.Generator().manual_seed(0))
    >>> batches = [(torch.ones(2, 3, 8, 8), torch.tensor([0, 1]))]
    >>> make_features(model, Sketch(dim=16))(params, state, batches).sketches.shape
    torch.Size([2, 16])
    """
    wanted = {"sketches": sketch_quantity(*(sketch or Sketch())), "log_odds": loss_quantity()}
    return partial(_features, over_dataset(model, log_odds, wanted, progress=progress, **options))


def _features(run: Callable[..., Any], params: Params, state: State, batches: Batches) -> Features:
    found = run(params, state, batches)
    return Features(found["sketches"], torch.sigmoid(-found["log_odds"]))


def sketch_tree(of: Params, sketch: Sketch) -> Float[Tensor, "n dim"]:
    """The sketch of any batched tree, leaves `[N, *shape]`, by the projection of `per_sample.sketch`.

    Its products with sketched gradients estimate the products of the trees: so a direction, such as an
    inverse curvature times a gradient, meets gradients that were stored before.

    >>> gradients = {"fc": {"weight": torch.ones(3, 2, 5)}}
    >>> sketch_tree(gradients, Sketch(dim=8)).shape
    torch.Size([3, 8])
    """
    parts = {
        path: sketch_leaf(*sketch, path, Direct(leaf), "materialize")
        for path, leaf in tree.flatten(of).items()
    }
    return add_up(sketch.dim, parts)
