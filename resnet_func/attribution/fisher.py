"""Curvatures for influence: the diagonal of the empirical Fisher matrix, and EKFAC by random signs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.attribution.quantities import check_covered
from resnet_func.curvature import KroneckerEstimate, ekfac
from resnet_func.per_sample import over_dataset
from resnet_func.per_sample.dataset import Batches
from resnet_func.per_sample.options import Options
from resnet_func.types import LossFn, Model, Params, State


class DiagonalFisher(NamedTuple):
    """The mean of every squared entry of the per-sample gradients: a tree like the trainable leaves."""

    diagonal: Params

    def default_damping(self) -> float:
        """A tenth of the mean entry, as is common for influence (Grosse et al. 2023, section 5.1)."""
        total = sum(float(leaf.double().sum()) for leaf in tree.leaves(self.diagonal))
        return 0.1 * total / max(tree.size(self.diagonal), 1)

    def inverse(self, damping: float | None = None) -> dict[str, Tensor]:
        """`1 / (diagonal + damping)`, flat: `{dotted path: tensor}`.

        Raises:
            ValueError: `damping` is not positive.
        """
        chosen = self.default_damping() if damping is None else damping
        if not chosen > 0:
            raise ValueError(
                f"damping must be positive; got {chosen}. A gradient that is zero everywhere has no "
                "curvature to choose it from: pass damping="
            )
        return {path: 1 / (leaf + chosen) for path, leaf in tree.flatten(self.diagonal).items()}

    def inverse_product(self, of: Params, *, damping: float | None = None) -> Params:
        """The damped inverse times a tree of some or all of its leaves, which may be `[N, *shape]`.

        Raises:
            ValueError: the tree has a leaf that the diagonal has not.

        >>> fisher = DiagonalFisher({"w": torch.tensor([1.0, 3.0])})
        >>> fisher.inverse_product({"w": torch.tensor([[2.0, 4.0]])}, damping=1.0)
        {'w': tensor([[1., 1.]])}
        """
        inverse = self.inverse(damping)
        check_covered("the curvature", inverse, tree.flatten(of))
        return tree.map_with_path(lambda path, leaf: leaf * inverse[path].to(leaf.dtype), of)


def diagonal_fisher(
    model: Model, loss_fn: LossFn, *, progress: bool = False, **options: Unpack[Options]
) -> Callable[[Params, State, Batches], DiagonalFisher]:
    """The diagonal empirical Fisher matrix of a data set, in one pass over its batches.

    Args:
        model, loss_fn, **options: As in `per_sample.grads`.
        progress: Show a progress bar.

    Returns:
        `fn(params, state, batches) -> DiagonalFisher`.

    Raises:
        ValueError: as in `per_sample.over_dataset`.

    >>> import resnet_func as rf
    >>> model = rf.resnet20(depths=(1, 1, 1), norm="group")
    >>> params, state = model.init(torch.Generator().manual_seed(0))
    >>> batches = [(torch.ones(2, 3, 8, 8), torch.tensor([0, 1]))]
    >>> fisher = diagonal_fisher(model, rf.losses.cross_entropy)(params, state, batches)
    >>> fisher.diagonal["fc"]["bias"].shape
    torch.Size([10])
    """
    run = over_dataset(model, loss_fn, ["moments"], progress=progress, **options)
    return partial(_diagonal_fisher, run)


def _diagonal_fisher(
    run: Callable[..., dict[str, Any]], params: Params, state: State, batches: Batches
) -> DiagonalFisher:
    return DiagonalFisher(run(params, state, batches)["moments"].second_moment)


def sampled_ekfac(
    model: Model, loss_fn: LossFn, *, seed: int = 0, **options: Unpack[Options]
) -> Callable[[Params, State, Batches], KroneckerEstimate]:
    """`curvature.ekfac` of a data set, its Gauss-Newton matrix estimated by random signs: two passes.

    Args:
        model, loss_fn: As in `curvature.ekfac`.
        seed: Of the signs.
        **options: As in `per_sample.grads`; of them `trainable`, `microbatch` and `train` matter.

    Returns:
        `fn(params, state, batches) -> KroneckerEstimate`; the batches can be gone through twice.

    >>> import resnet_func as rf
    >>> model, params, state = rf.from_module(torch.nn.Linear(2, 1))
    >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
    >>> sampled_ekfac(model, rf.losses.squared_error)(params, state, batches).trace()
    tensor(2.)
    """
    run = ekfac(
        model,
        loss_fn,
        fisher="sampled",
        trainable=options.get("trainable"),
        microbatch=options.get("microbatch"),
        train=options.get("train"),
    )

    return partial(_with_drawn_signs, run, seed)


def _with_drawn_signs(
    run: Callable[..., KroneckerEstimate], seed: int, params: Params, state: State, batches: Batches
) -> KroneckerEstimate:
    return run(params, state, batches, generator=torch.Generator("cpu").manual_seed(seed))
