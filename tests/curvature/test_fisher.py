"""The square root of a loss's Hessian in the logits, and the mixtures of its columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import resnet_func as rf
from resnet_func.curvature.fisher import mixing_loss, mixtures, root_product
from resnet_func.testing import generator
from resnet_func.types import LossFn
from tests.curvature.oracles import assert_close

LOSSES: dict[str, LossFn] = {
    "cross-entropy": rf.losses.cross_entropy,
    "smoothed": rf.losses.smoothed_cross_entropy(0.3),
    "own-cross-entropy": lambda logits, y: torch.nn.functional.cross_entropy(logits, y, reduction="none"),
    "quartic": lambda logits, y: (logits**4).sum(1),
    "linear": rf.losses.logit(0),
}


@pytest.mark.parametrize("loss", LOSSES)
@given(seed=st.integers(0, 2**16))
def test_the_unit_vectors_give_the_hessian(loss: str, seed: int) -> None:
    source = generator(seed)
    logits = 3 * torch.randn(2, 4, generator=source, dtype=torch.float64)
    y = torch.randint(0, 4, (2,), generator=source)
    columns = [root_product(LOSSES[loss], logits, y, unit) for unit in mixtures("exact", logits, None)]
    root = torch.stack(columns, 2)
    hessian = torch.func.hessian(lambda z: LOSSES[loss](z, y).sum())(logits)
    own = torch.stack([hessian[i, :, i] for i in range(2)])
    assert_close(root @ root.mT, own, 1e-8)


def test_what_is_not_convex_counts_as_zero() -> None:
    def saddle(logits, y):
        return logits[:, 0] ** 2 - logits[:, 1] ** 2

    logits = torch.ones(1, 2, dtype=torch.float64)
    columns = [root_product(saddle, logits, torch.zeros(1), unit) for unit in mixtures("exact", logits, None)]
    root = torch.stack(columns, 2)
    assert_close(root @ root.mT, torch.tensor([[[2.0, 0.0], [0.0, 0.0]]], dtype=torch.float64), 1e-12)


def test_the_loss_has_the_mixed_column_as_its_gradient() -> None:
    source = generator(0)
    logits = torch.randn(3, 4, generator=source, dtype=torch.float64)
    y, mixture = torch.tensor([0, 1, 2]), torch.randn(3, 4, generator=source, dtype=torch.float64)
    loss = mixing_loss(rf.losses.cross_entropy)
    grad = torch.func.grad(lambda z: loss(z, (y, mixture)).sum())(logits)
    assert torch.equal(grad, root_product(rf.losses.cross_entropy, logits, y, mixture))


def test_signs_are_fair_and_the_generators() -> None:
    like = torch.zeros(2000, 3)
    (signs,) = mixtures("sampled", like, generator(0))
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    # second moments of 2000 independent signs: five standard deviations
    assert_close(signs.T @ signs / 2000, torch.eye(3), 5 / 2000**0.5)
    (again,) = mixtures("sampled", like, generator(0))
    assert torch.equal(signs, again)
