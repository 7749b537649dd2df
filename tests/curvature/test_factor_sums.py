"""Sums of a leaf's two factors: each way to make them, against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_func as rf
from resnet_func import curvature, tree
from resnet_func.curvature import factor_sums
from tests.curvature import oracles
from tests.curvature.oracles import assert_close, data, dense, module

CROSS_ENTROPY = rf.losses.cross_entropy


def patches(x: Tensor, groups: int) -> Tensor:
    """`[N, T, groups, entries]` of a 3x3 convolution with padding 1."""
    return F.unfold(x, 3, padding=1).transpose(1, 2).unflatten(2, (groups, -1))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_factors_of_a_convolution(approximation, groups: int) -> None:
    """By the formulas of Eschenhagen et al. 2023, with gradients of the output found by autograd."""
    model, params, state = module(nn.Conv2d(4, 6, 3, padding=1, groups=groups), nn.Flatten())
    x, y = data(3, 4, 3, 3, classes=54)
    kfac = curvature.kfac(model, CROSS_ENTROPY, fisher="empirical", approximation=approximation)
    estimate = kfac(params, state, [(x, y)])
    output = F.conv2d(x, params["0"]["weight"], params["0"]["bias"], padding=1, groups=groups)
    g = torch.func.grad(lambda out: CROSS_ENTROPY(out.flatten(1), y).sum())(output)
    g = g.flatten(2).transpose(1, 2).unflatten(2, (groups, -1))
    a, positions = patches(x, groups), 9
    if approximation == "reduce":
        a, g, positions = a.mean(1, keepdim=True), g.sum(1, keepdim=True), 1
    right = torch.einsum("ntgi,ntgj->gij", a, a) / (3 * positions)
    left = torch.einsum("ntgi,ntgj->gij", g, g) / 3
    expected = torch.block_diag(*[torch.kron(*pair) for pair in zip(left, right, strict=True)])
    assert_close(dense(estimate.blocks["0.weight"]), expected, 1e-10)


def test_a_weight_that_is_not_used_as_it_is_has_factors_of_its_gradients() -> None:
    model, params, state = oracles.tiny(weight_standardization=True)
    x, y = oracles.images(4)
    estimate = curvature.kfac(model, CROSS_ENTROPY, fisher="empirical")(params, state, [(x, y)])
    grads = rf.per_sample.grads(model, CROSS_ENTROPY, method="loop")(params, state, x, y)
    g = tree.flatten(grads)["conv1.weight"].flatten(2)
    rows = torch.einsum("nai,nbi->ab", g, g) / 4
    columns = torch.einsum("nai,naj->ij", g, g) / 4
    expected = torch.kron(rows, columns) / rows.trace()
    assert_close(dense(estimate.blocks["conv1.weight"]), expected, 1e-10)
    assert_close(expected.trace(), (g**2).sum() / 4, 1e-10)


def test_what_is_too_large_is_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, state = oracles.tiny()
    x, y = oracles.images(3)
    for name in ("MAX_BLOCK", "MAX_SIDE"):
        monkeypatch.setattr(factor_sums, name, 1)
    exact = oracles.blocks(oracles.ggn(model, CROSS_ENTROPY, params, state, x, y), params)
    for transform in (curvature.kfac, curvature.ekfac):
        estimate = transform(model, CROSS_ENTROPY)(params, state, [(x, y)])
        for path, block in estimate.blocks.items():
            assert_close(dense(block), exact[path].diagonal().diag(), 1e-8)


def test_it_is_a_quantity_beside_others() -> None:
    """One pass gives factors and moments; gradients formed for the others do not replace the captures."""
    model, params, state = oracles.tiny()
    batches = [oracles.images(3, seed) for seed in (0, 1)]
    together = rf.per_sample.over_dataset(
        model, CROSS_ENTROPY, {"a": "norms", "kfac": factor_sums.factor_sums("expand"), "m": "moments"}
    )(params, state, batches)
    alone = rf.per_sample.over_dataset(model, CROSS_ENTROPY, {"kfac": factor_sums.factor_sums("expand")})(
        params, state, batches
    )
    for path, sums in alone["kfac"].leaves.items():
        assert torch.equal(together["kfac"].leaves[path].left, sums.left)
        assert torch.equal(together["kfac"].leaves[path].right, sums.right)
