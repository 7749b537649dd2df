"""Influence functions: what leaving a training sample out would do to a test sample's loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, Unpack

from torch import Tensor

from resnet_func.attribution.quantities import Checkpoint
from resnet_func.attribution.tracin import BLOCK_ELEMENTS, gradient_products
from resnet_func.per_sample.dataset import Batches
from resnet_func.per_sample.options import Options
from resnet_func.types import LossFn, Model, Params


class Curvature(Protocol):
    """An estimate of the curvature that can be inverted: `DiagonalFisher`, or one of `curvature`."""

    def inverse_product(self, of: Params, *, damping: float | None = None) -> Params:
        """The damped inverse times a batched tree, leaves `[N, *shape]`."""
        ...


def influence(
    model: Model,
    loss_fn: LossFn,
    curvature: Curvature | None = None,
    *,
    damping: float | None = None,
    block_elements: int = BLOCK_ELEMENTS,
    progress: bool = False,
    **options: Unpack[Options],
) -> Callable[[Checkpoint, Batches, Batches], Tensor]:
    """`<gradient of train i, inverse curvature times gradient of test j>`.

    To first order, the test loss rises by a score over the number of training samples when that sample is
    left out (Koh and Liang 2017, https://arxiv.org/abs/1703.04730; by EKFAC, Grosse et al. 2023,
    https://arxiv.org/abs/2308.03296).

    Args:
        model, loss_fn, **options: As in `per_sample.grads`. `trainable` is that of the curvature; it may
            choose fewer leaves, of a Kronecker estimate those of its `restrict(trainable)`.
        curvature: Of the mean training loss; None is the identity.
        damping: Handed to the curvature; None leaves it the choice.
        block_elements: As in `tracin`.
        progress: Show progress bars.

    Returns:
        `fn((params, state), train_batches, test_batches) -> Tensor [train, test]` on the CPU: high where a
        training sample helps. Batches can be gone through once for each pass, such as a list.

    Raises:
        ValueError: as in `per_sample.over_dataset`; the curvature lacks a leaf of the gradients.

    >>> import torch, resnet_func as rf
    >>> model = rf.resnet20(depths=(1, 1, 1), norm="group")
    >>> checkpoint = model.init(torch.Generator().manual_seed(0))
    >>> train = [(torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 2]))]
    >>> fisher = rf.attribution.diagonal_fisher(model, rf.losses.cross_entropy)(*checkpoint, train)
    >>> influence(model, rf.losses.cross_entropy, fisher)(checkpoint, train, train).shape
    torch.Size([3, 3])
    """
    transform = None if curvature is None else partial(curvature.inverse_product, damping=damping)
    return gradient_products(
        model, loss_fn, transform=transform, block_elements=block_elements, progress=progress, **options
    )
