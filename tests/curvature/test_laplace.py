"""The last layer's posterior against dense matrices, in float64."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import resnet_func as rf
from resnet_func import tree
from resnet_func.curvature import Posterior, laplace, last_layer
from resnet_func.curvature.laplace import Full, Kronecker
from resnet_func.losses import cross_entropy, smoothed_cross_entropy
from resnet_func.testing import generator
from tests.curvature.oracles import assert_close, data, images, module, tiny


def networks() -> dict[str, tuple[Any, Any, Any, Tensor, Tensor]]:
    """With a bias, without one, and with BatchNorm in evaluation."""
    return {
        "resnet": (*tiny(), *images(7)),
        "batch-norm": (*tiny(norm="batch"), *images(7)),
        "no-bias": (*module(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), *data(7, 4)),
    }


def dense_hessian(model: rf.Model, params: Any, state: Any, x: Tensor, y: Tensor, loss_fn: Any) -> Tensor:
    """Of the summed loss in the last layer's weights `[classes, D]`, a bias in the last column."""
    layer = last_layer(model, params, state, x)
    flat = tree.flatten(params)
    weight = max((path for path in flat if path.endswith("weight")), key=list(flat).index)
    bias = weight.replace("weight", "bias")

    def loss(weights: Tensor) -> Tensor:
        weights = weights.reshape(layer.weights.shape)
        leaves = {weight: weights[:, : flat[weight].shape[1]]}
        if bias in flat:
            leaves[bias] = weights[:, -1]
        logits = model.apply(tree.unflatten({**flat, **leaves}), state, x, train=False)[0]
        return loss_fn(logits, y).sum()

    return torch.func.hessian(loss)(layer.weights.flatten())


@pytest.mark.parametrize("loss_fn", [cross_entropy, smoothed_cross_entropy(0.1)], ids=["plain", "smoothed"])
@pytest.mark.parametrize("name", ["resnet", "batch-norm", "no-bias"])
def test_the_full_posterior_is_that_of_the_dense_hessian(name: str, loss_fn: Any) -> None:
    model, params, state, x, y = networks()[name]
    hessian = dense_hessian(model, params, state, x, y, loss_fn)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    posterior = laplace(model, loss_fn, structure="full", prior_precision=0.7, train=False)(
        params, state, batches
    )
    curvature = posterior.curvature
    assert isinstance(curvature, Full)
    vectors = curvature.vectors.flatten(0, 1)
    assert_close((vectors * curvature.eigenvalues) @ vectors.T, hessian, 1e-8)

    precision = hessian + 0.7 * torch.eye(len(hessian), dtype=torch.float64)
    new = torch.randn(5, *x.shape[1:], generator=generator(5), dtype=torch.float64)
    layer = last_layer(model, params, state, new)
    classes = layer.logits.shape[1]
    jacobian = torch.stack(
        [torch.kron(torch.eye(classes, dtype=torch.float64), f[None]) for f in layer.features]
    )
    expected = jacobian @ torch.linalg.inv(precision) @ jacobian.mT
    assert_close(posterior.logit_covariance(layer.features), expected, 1e-8)

    loss = float(loss_fn(last_layer(model, params, state, x).logits, y).sum())
    weights = layer.weights.flatten()
    evidence = -loss - 0.35 * float(weights @ weights) + 0.5 * len(weights) * math.log(0.7)
    evidence -= 0.5 * float(torch.linalg.slogdet(precision).logabsdet)
    assert posterior.log_marginal_likelihood() == pytest.approx(evidence, rel=1e-8)


@pytest.mark.parametrize("name", ["resnet", "no-bias"])
def test_the_kronecker_posterior_is_that_of_the_product(name: str) -> None:
    model, params, state, x, y = networks()[name]
    posterior = laplace(model, cross_entropy, structure="kronecker", prior_precision=0.7)(
        params, state, [(x[:3], y[:3]), (x[3:], y[3:])]
    )
    layer = last_layer(model, params, state, x)
    chances = layer.logits.softmax(1)
    left = torch.diag(chances.mean(0)) - chances.T @ chances / len(x)
    product = torch.kron(left, layer.features.T @ layer.features)
    assert isinstance(posterior.curvature, Kronecker)
    assert_close(
        posterior.curvature.eigenvalues.flatten().sort().values, torch.linalg.eigvalsh(product), 1e-8
    )
    precision = product + 0.7 * torch.eye(len(product), dtype=torch.float64)
    classes = chances.shape[1]
    jacobian = torch.stack(
        [torch.kron(torch.eye(classes, dtype=torch.float64), f[None]) for f in layer.features]
    )
    expected = jacobian @ torch.linalg.inv(precision) @ jacobian.mT
    assert_close(posterior.logit_covariance(layer.features), expected, 1e-8)


def test_one_sample_has_the_same_posterior_in_both_structures() -> None:
    """Where the curvature is a Kronecker product."""
    model, params, state, x, y = networks()["resnet"]
    batches = [(x[:1], y[:1])]
    full, factors = (
        laplace(model, cross_entropy, structure=structure, prior_precision=1.0)(params, state, batches)
        for structure in ("full", "kronecker")
    )
    features = last_layer(model, params, state, x).features
    assert_close(factors.logit_covariance(features), full.logit_covariance(features), 1e-8)


@pytest.mark.parametrize("structure", ["full", "kronecker"])
def test_the_prior_has_the_largest_marginal_likelihood(structure: Any) -> None:
    model, params, state, x, y = networks()["resnet"]
    posterior = laplace(model, cross_entropy, structure=structure)(params, state, [(x, y)])
    best = posterior.prior_precision
    grid = [best * 10 ** (k / 20) for k in range(-60, 61)]
    values = [posterior.log_marginal_likelihood(precision) for precision in grid]
    assert max(values) == values[60]
    step = 1e-4
    slope = posterior.log_marginal_likelihood(best * (1 + step)) - posterior.log_marginal_likelihood(
        best / (1 + step)
    )
    assert abs(slope) < 1e-6


def fitted() -> tuple[Any, Any, Any, Tensor, Posterior]:
    model, params, state, x, y = networks()["resnet"]
    return model, params, state, x, laplace(model, cross_entropy)(params, state, [(x, y)])


def test_probit_scales_logits_and_samples_come_to_the_mean() -> None:
    model, params, state, x, posterior = fitted()
    layer = last_layer(model, params, state, x)
    variances = posterior.logit_covariance(layer.features).diagonal(dim1=1, dim2=2)
    expected = (layer.logits / (1 + math.pi / 8 * variances).sqrt()).softmax(1)
    torch.testing.assert_close(posterior.probabilities(layer), expected)
    sampled = posterior.probabilities(layer, samples=4000, generator=generator(0))
    # the mean of that many softmaxes, each in [0, 1]: 5 standard errors of at most 1/2
    exact = quadrature(layer.logits[0], posterior.logit_covariance(layer.features)[0])
    assert (sampled[0] - exact).abs().max() < 5 * 0.5 / math.sqrt(4000)
    again = posterior.probabilities(layer, samples=4000, generator=generator(0))
    assert torch.equal(sampled, again)


def quadrature(logits: Tensor, covariance: Tensor) -> Tensor:
    """The mean softmax of three normal logits, by Gauss-Hermite nodes."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(40))
    grid = torch.cartesian_prod(nodes, nodes, nodes)
    weight = torch.cartesian_prod(weights, weights, weights).prod(1)
    root = torch.linalg.cholesky(covariance)
    return (weight[:, None] * (logits + grid @ root.T).softmax(1)).sum(0) / weight.sum()


def test_auto_is_full_where_that_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, state, x, posterior = fitted()
    assert not isinstance(posterior.curvature, Kronecker)
    monkeypatch.setattr(sys.modules[Posterior.__module__], "FULL_SIDE", 3)
    other = laplace(model, cross_entropy)(params, state, [(x, torch.zeros(len(x), dtype=torch.int64))])
    assert isinstance(other.curvature, Kronecker)


class Scaled(nn.Module):
    """Logits that are not a linear layer's as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.fc(x)


def test_mistakes_are_named() -> None:
    x, y = data(5, 4)
    model, params, state = module(Scaled())
    with pytest.raises(ValueError, match="ends in a linear layer"):
        laplace(model, cross_entropy)(params, state, [(x, y)])
    model, params, state = module(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="at least one batch"):
        laplace(model, cross_entropy)(params, state, [])
    with pytest.raises(ValueError, match="structure must be"):
        laplace(model, cross_entropy, structure="diagonal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prior_precision must be"):
        laplace(model, cross_entropy, prior_precision=0.0)
    posterior = laplace(model, cross_entropy)(params, state, [(x, y)])
    with pytest.raises(ValueError, match="samples must be"):
        posterior.probabilities(last_layer(model, params, state, x), samples=3)
