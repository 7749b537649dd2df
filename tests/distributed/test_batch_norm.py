"""BatchNorm over ranks, in a world of one, is `F.batch_norm`; `worker` checks larger worlds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_func as rf
from resnet_func.distributed import Ranks, batch_norm, sync_batch_norm

ALONE = Ranks(0, 1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 3, 4, 4), (6, 3, 5), (6, 3)], ids=["images", "sequences", "rows"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_values_statistics_and_gradients_are_torchs(shape: tuple[int, ...], affine: bool) -> None:
    x, cotangent = 3 + 2 * draw(*shape), draw(*shape, seed=1)
    leaves = [x, draw(3, seed=2), draw(3, seed=3)] if affine else [x]

    def run(fn: Callable[..., Tensor], *options: Any) -> list[Tensor]:
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        weight, bias = inputs[1:] or (None, None)
        y = fn(inputs[0], mean, var, weight, bias, *options)
        return [y.detach(), mean, var, *torch.autograd.grad((y * cotangent).sum(), inputs)]

    ours = run(batch_norm.batch_norm, 0.1, 1e-5, ALONE)
    theirs = run(F.batch_norm, True, 0.1, 1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_evaluation_and_the_callers_statistics_stay() -> None:
    model = rf.resnet20(depths=(1, 1, 1))
    params, state = model.init(torch.Generator().manual_seed(0))
    before = rf.tree.map(torch.clone, state)
    synced, x = sync_batch_norm(model, ALONE), draw(2, 3, 8, 8).float()
    assert synced.apply(params, state, x, train=False)[0].equal(model.apply(params, state, x, train=False)[0])
    synced.apply(params, state, x, train=True)
    assert all(a.equal(b) for a, b in zip(rf.tree.leaves(state), rf.tree.leaves(before), strict=True))


def test_modules_are_met_too() -> None:
    """Whatever wrote the network: the running statistics of a module's BatchNorm move as they do."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    model, params, state = rf.from_module(module.double())
    x = draw(5, 3, 6, 6)
    ours = sync_batch_norm(model, ALONE).apply(params, state, x, train=True)
    theirs = model.apply(params, state, x, train=True)
    for a, b in zip(rf.tree.leaves(ours), rf.tree.leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_it_needs_ranks() -> None:
    with pytest.raises(ValueError, match="sync_batch_norm needs ranks="):
        rf.train.make_train_step(
            rf.resnet20(), rf.losses.cross_entropy, rf.optim.sgd(0.1), sync_batch_norm=True
        )
