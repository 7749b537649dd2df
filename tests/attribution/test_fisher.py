"""The diagonal Fisher matrix against squared gradients."""

from __future__ import annotations

import pytest
import torch

from resnet_func import tree
from resnet_func.attribution import DiagonalFisher, diagonal_fisher
from tests.attribution.oracle import CE, batches, close, gradient_rows, joined, rows_of, tiny


def test_it_is_the_mean_of_the_squares_and_its_inverse_divides() -> None:
    model, params, state = tiny()
    data = batches(5, 1)
    fisher = diagonal_fisher(model, CE)(params, state, data)
    rows = gradient_rows(model, params, state, *joined(data))
    mean = rows.square().mean(0)
    close(rows_of(tree.map(lambda leaf: leaf[None], fisher.diagonal))[0], mean)
    assert fisher.default_damping() == pytest.approx(0.1 * float(mean.mean()))
    twos = tree.map(lambda leaf: torch.full((3, *leaf.shape), 2.0, dtype=leaf.dtype), params)
    close(rows_of(fisher.inverse_product(twos, damping=0.5)), 2 / (mean + 0.5).expand(3, -1))


def test_no_damping_is_refused() -> None:
    with pytest.raises(ValueError, match="damping must be positive; got 0"):
        DiagonalFisher({"w": torch.zeros(2)}).inverse()
