"""TRAK against the paper's and traker's formulas on the same features, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_func.attribution import Features, Sketch, gram_factor, make_features, trak, trak_scores
from resnet_func.testing import generator
from tests.attribution.oracle import batches, close, tiny

SKETCH = Sketch(6, 0, "dense")


def features(n: int, seed: int, dim: int = 5) -> Features:
    draw = generator(seed)
    sketches = torch.randn(n, dim, generator=draw, dtype=torch.float64)
    return Features(sketches, torch.rand(n, generator=draw, dtype=torch.float64))


def blocks(of: Features, size: int) -> list[Features]:
    return [Features(*parts) for parts in zip(of.sketches.split(size), of.slack.split(size), strict=True)]


def projected(train: Features, test: Features) -> Tensor:
    return (test.sketches @ torch.linalg.inv(train.sketches.T @ train.sketches) @ train.sketches.T).T


def test_scores_are_the_papers_for_any_blocks() -> None:
    """Mean of scores over checkpoints, then the mean of Q (section 3.2, step 5)."""
    pairs = [(features(12, seed), features(3, seed + 10)) for seed in (0, 1)]
    expected = torch.stack([projected(*pair) for pair in pairs]).mean(0)
    expected = expected * torch.stack([train.slack for train, _ in pairs]).mean(0)[:, None]
    for size in (12, 5, 1):
        ours = trak_scores([(blocks(train, size), test) for train, test in pairs], damping=0.0)
        close(ours, expected, 1e-9)


def test_one_checkpoint_is_trakers_up_to_its_scale() -> None:
    """traker 0.3.2's `BasicScoreComputer` and `finalize_scores`; it divides the inverse by its mean size."""
    train, test = features(12, 0), features(3, 1)
    inverse = torch.linalg.inv(train.sketches.T @ train.sketches)
    scale = inverse.abs().mean()
    accumulator = (train.sketches @ (inverse / scale)) @ test.sketches.T
    theirs = accumulator * train.slack[:, None]
    close(trak_scores([(blocks(train, 5), test)], damping=0.0), theirs * scale, 1e-9)


def test_from_networks_to_scores() -> None:
    model, *first = tiny(0)
    checkpoints = [tuple(first), tiny(5)[1:]]
    train, test = batches(10, 1, size=4), batches(3, 2)
    extract = make_features(model, SKETCH)
    pairs = [([extract(*c, train)], extract(*c, test)) for c in checkpoints]
    ours = trak(model, SKETCH, damping=0.01)(checkpoints, train, test)
    close(ours, trak_scores(pairs, damping=0.01))
    factors = [gram_factor(train_blocks, 0.01) for train_blocks, _ in pairs]
    close(trak_scores(pairs, factors=factors), ours)


def test_too_few_samples_are_refused_without_damping() -> None:
    few = features(3, 0)
    with pytest.raises(ValueError, match="sketches of 3 samples do not span 5 dimensions: raise damping"):
        gram_factor([few], 0.0)
    assert gram_factor([few]).isfinite().all()
    with pytest.raises(ValueError, match="at least one checkpoint"):
        trak_scores([])
    with pytest.raises(ValueError, match="got no block"):
        gram_factor([])
