"""TRAK: which training samples made a network say what it says of a test sample (Park et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Unpack

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from resnet_func.attribution.features import Blocks, Features, Sketch, make_features
from resnet_func.attribution.quantities import Checkpoint
from resnet_func.per_sample.dataset import Batches
from resnet_func.per_sample.options import Options
from resnet_func.types import Model


def trak(
    model: Model,
    sketch: Sketch | None = None,
    *,
    damping: float = 0.1,
    progress: bool = False,
    **options: Unpack[Options],
) -> Callable[[Sequence[Checkpoint], Batches, Batches], Tensor]:
    """TRAK scores of every training sample for every test sample.

    Of each checkpoint the features of the training set are held, `N * (dim + 1)` numbers; where that is too
    much, fill a `Store` for each and call `trak_scores`.

    Args:
        model: A classifier.
        sketch: The projection of the gradients; None is `Sketch()`, factorized to 4,096 numbers.
        damping: See `gram_factor`.
        progress: Show progress bars.
        **options: As in `per_sample.grads`; `trainable` limits the gradients, and their cost.

    Returns:
        `fn(checkpoints, train_batches, test_batches) -> Tensor [train, test]`: high where a training sample
        raises the log-odds of the test sample's label. Checkpoints are pairs `(params, state)`: of networks
        trained alike from several seeds, or of one run. Batches can be gone through once for each.

    Raises:
        ValueError: no checkpoint, or as in `per_sample.over_dataset`.

    >>> import resnet_func as rf
    >>> model = rf.resnet20(depths=(1, 1, 1), norm="group")
    >>> checkpoint = model.init(torch.Generator().manual_seed(0))
    >>> train = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))]
    >>> trak(model, Sketch(dim=16))([checkpoint], train, train).shape
    torch.Size([4, 4])
    """
    return partial(_trak, make_features(model, sketch, progress=progress, **options), damping)


def _trak(
    features: Callable[..., Features],
    damping: float,
    checkpoints: Sequence[Checkpoint],
    train_batches: Batches,
    test_batches: Batches,
) -> Tensor:
    pairs = (
        ([features(*checkpoint, train_batches)], features(*checkpoint, test_batches))
        for checkpoint in checkpoints
    )
    return trak_scores(pairs, damping=damping)


def trak_scores(
    pairs: Iterable[tuple[Blocks, Features]],
    *,
    damping: float = 0.1,
    factors: Iterable[Tensor] | None = None,
) -> Float[Tensor, "train test"]:
    """TRAK scores from features.

    As the paper has it, the mean over checkpoints of `test (X^T X)^-1 X^T` is taken first, then it is
    weighed by the mean of the training samples' slack.

    Args:
        pairs: For each checkpoint the training set's features, in blocks, and the test samples'.
        damping: See `gram_factor`.
        factors: What `gram_factor` gave for each checkpoint, where that is known already.

    Raises:
        ValueError: there are no pairs.

    >>> features = Features(torch.eye(2), torch.ones(2))
    >>> trak_scores([([features], features)], damping=0.0)
    tensor([[1., 0.],
            [0., 1.]])
    """
    total = slack = torch.zeros((), dtype=torch.float32, device="cpu")
    count = 0
    known = None if factors is None else iter(factors)
    for blocks, test in pairs:
        factor = gram_factor(blocks, damping) if known is None else next(known)
        directions = torch.cholesky_solve(test.sketches.to(factor.dtype).T, factor)
        found, own = [], []
        for block in blocks:
            found.append(block.sketches @ directions.to(block.sketches.dtype))
            own.append(block.slack)
        total, slack, count = total + torch.cat(found), slack + torch.cat(own), count + 1
    if not count:
        raise ValueError("expected at least one checkpoint; got none")
    return (total / count) * (slack / count)[:, None]


def gram_factor(blocks: Blocks, damping: float = 0.1) -> Float64[Tensor, "dim dim"]:
    """The Cholesky factor of `X^T X + damping * mean(diagonal) * 1`, X the training set's sketches.

    Args:
        blocks: The training set's features.
        damping: Share of the mean diagonal entry; 0 is the published TRAK, which needs clearly more samples
            than dimensions. With hardly more of them take more: of 5,000 images in 4,096 dimensions
            (`python -m benchmarks lds`, cats and dogs) one network's scores had an LDS of 0.07 with 0.01,
            0.12 with 0.1, 0.16 with 1 and 0.17 with 10.

    Raises:
        ValueError: the matrix is singular: fewer samples than dimensions, and too little damping.

    >>> features = Features(torch.eye(2), torch.ones(2))
    >>> gram_factor([features], damping=3.0)
    tensor([[2., 0.],
            [0., 2.]], dtype=torch.float64)
    """
    gram, rows = None, 0
    for block in blocks:
        part = (block.sketches.T @ block.sketches).to(torch.float64)  # a block's sum is as exact as its rows
        gram, rows = part if gram is None else gram + part, rows + len(block.sketches)
    if gram is None:
        raise ValueError("expected the training set's features; got no block")
    gram.diagonal().add_(damping * gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise ValueError(
            f"the sketches of {rows} samples do not span {len(gram)} dimensions: raise damping (it is "
            f"{damping:g}; 0.1 is the default), or take a sketch of at most {max(1, rows // 2)} dimensions"
        )
    return factor
