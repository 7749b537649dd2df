"""Influence against a dense inverse Hessian, and against retraining a convex last layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_func as rf
from resnet_func import per_sample as ps
from resnet_func import tree
from resnet_func.attribution import DiagonalFisher, influence, sampled_ekfac
from resnet_func.types import Params
from tests.attribution.oracle import CE, batches, close, gradient_rows, joined, rows_of, tiny
from tests.per_sample.cases import CLASSES, batch, network, small

RIDGE = 0.05


class DenseHessian:
    """A whole matrix over the leaves in the order of their paths."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def inverse_product(self, of: Params, *, damping: float | None = None) -> Params:
        flat = tree.flatten(of)
        damped = self.matrix + (damping or 0.0) * torch.eye(len(self.matrix), dtype=self.matrix.dtype)
        rows = torch.linalg.solve(damped, rows_of(of).T).T
        sizes = [flat[path][0].numel() for path in sorted(flat)]
        parts = dict(zip(sorted(flat), rows.split(sizes, 1), strict=True))
        return tree.unflatten({path: parts[path].reshape(leaf.shape) for path, leaf in flat.items()})


def test_it_is_the_product_by_the_inverse() -> None:
    model, params, state = tiny()
    train, test = batches(5, 1), batches(3, 2)
    a, b = (gradient_rows(model, params, state, *joined(part)) for part in (train, test))
    close(influence(model, CE)((params, state), train, test), a @ b.T)
    fisher = a.T @ a / len(a)
    dense = influence(model, CE, DenseHessian(fisher), damping=0.1)((params, state), train, test)
    close(dense, a @ torch.linalg.inv(fisher + 0.1 * torch.eye(len(fisher), dtype=fisher.dtype)) @ b.T, 1e-9)
    diagonal = DiagonalFisher(tree.map(lambda leaf: leaf.square(), params))
    weights = 1 / (rows_of(tree.map(lambda leaf: leaf[None].square(), params)) + 0.3)
    ours = influence(model, CE, diagonal, damping=0.3)((params, state), train, test)
    close(ours, (a * weights) @ b.T)


def head_loss(flat: Tensor, features: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    bias, weight = flat[:CLASSES], flat[CLASSES:].view(CLASSES, -1)
    losses = F.cross_entropy(F.linear(features, weight, bias), y, reduction="none")
    return (weights * losses).mean() + RIDGE / 2 * flat.square().sum()


def trained_head(features: Tensor, y: Tensor, weights: Tensor, start: Tensor | None = None) -> Tensor:
    """The optimum of the last layer by Newton's method, to round-off."""
    flat = features.new_zeros(CLASSES * (features.shape[1] + 1)) if start is None else start
    for _ in range(12 if start is None else 4):
        gradient = torch.func.grad(head_loss)(flat, features, y, weights)
        flat = flat - torch.linalg.solve(torch.func.hessian(head_loss)(flat, features, y, weights), gradient)
    return flat


def test_it_is_what_retraining_the_last_layer_does() -> None:
    """The derivative of a test loss by the weight of a training sample, over retrained optima, to 1e-8."""
    model, params, state = tiny()
    (x, y), (x_test, y_test) = batch(8, 1), batch(3, 2)
    width = params["fc"]["weight"].shape[1]
    identity = {
        "weight": torch.eye(width, dtype=torch.float64),
        "bias": torch.zeros(width, dtype=torch.float64),
    }
    features, test_features = (
        model.apply({**params, "fc": identity}, state, images, train=False)[0] for images in (x, x_test)
    )
    ones = torch.ones(8, dtype=torch.float64)
    optimum = trained_head(features, y, ones)
    fc = {"bias": optimum[:CLASSES], "weight": optimum[CLASSES:].view(CLASSES, width)}
    hessian = torch.func.hessian(head_loss)(optimum, features, y, ones)
    ours = influence(model, CE, DenseHessian(hessian), trainable=lambda path: path.startswith("fc."))(
        ({**params, "fc": fc}, state), [(x, y)], [(x_test, y_test)]
    )

    def test_losses(sample: int, change: float) -> Tensor:
        weights = ones.clone()
        weights[sample] += change
        flat = trained_head(features, y, weights, optimum)
        logits = F.linear(test_features, flat[CLASSES:].view(CLASSES, width), flat[:CLASSES])
        return F.cross_entropy(logits, y_test, reduction="none")

    def slope(sample: int, step: float) -> Tensor:
        return (test_losses(sample, step) - test_losses(sample, -step)) / (2 * step)

    # central differences, extrapolated: an error of step^4, and round-off over the step
    step = 2e-3
    slopes = torch.stack([(4 * slope(i, step / 2) - slope(i, step)) / 3 for i in range(3)])
    close(ours[:3], -8 * slopes, 1e-8)


def test_a_model_of_the_zoo_has_the_identity_as_default() -> None:
    model = rf.resnet20(depths=(1, 1, 1), norm="group")
    checkpoint = model.init(torch.Generator().manual_seed(0))
    data = [(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1]))]
    ours = influence(model, CE)(checkpoint, data, data)
    assert ours.diagonal().min() > 0
    assert ours.dtype == torch.float32
    with pytest.raises(ValueError, match="damping must be positive"):
        influence(model, CE, DiagonalFisher({}), damping=0.0)(checkpoint, data, data)


def test_ekfac_is_a_curvature_and_its_labels_are_the_seeds() -> None:
    model, params, state = tiny()
    train, test = batches(5, 1), batches(3, 2)
    estimate = sampled_ekfac(model, CE)(params, state, train)
    ours = influence(model, CE, estimate, damping=0.2)((params, state), train, test)
    a, b = (ps.grads(model, CE)(params, state, *joined(part)) for part in (train, test))
    close(ours, rows_of(a) @ rows_of(estimate.inverse_product(b, damping=0.2)).T, 1e-9)
    again, other = (sampled_ekfac(model, CE, seed=seed)(params, state, train) for seed in (0, 1))
    assert torch.equal(again.eigenvalues(), estimate.eigenvalues())
    assert not torch.equal(other.eigenvalues(), estimate.eigenvalues())


def is_head(path: str) -> bool:
    return path.startswith("fc.")


@pytest.fixture(scope="module")
def curvatures() -> dict[str, Any]:
    """Of a network with a head, over all leaves and over the head."""
    model, params, state = network(small(), 0)
    data = [batch(4, 1)]
    run = {
        "diagonal": lambda **o: rf.attribution.diagonal_fisher(model, CE, **o),
        "kfac": lambda **o: rf.curvature.kfac(model, CE, **o),
    }
    return {
        f"{name} {which}": of(**options)(params, state, data)
        for name, of in run.items()
        for which, options in (("all", {}), ("head", {"trainable": is_head}))
    }


@pytest.mark.parametrize("name", ["diagonal", "kfac"])
def test_a_curvature_of_fewer_leaves_is_refused_by_their_names(name: str, curvatures: dict[str, Any]) -> None:
    model, params, state = network(small(), 0)
    data = [batch(4, 1)]
    run = influence(model, CE, curvatures[f"{name} head"])
    with pytest.raises(ValueError, match=r"leaves that the curvature had not: conv1.weight.*same trainable="):
        run((params, state), data, data)


@pytest.mark.parametrize("name", ["diagonal", "kfac"])
def test_of_a_curvature_of_more_leaves_the_chosen_count(name: str, curvatures: dict[str, Any]) -> None:
    """Blocks do not look at each other: to the bit that of the head alone."""
    model, params, state = network(small(), 0)
    data, options = [batch(4, 1)], {"trainable": is_head, "damping": 0.1}
    whole = curvatures[f"{name} all"]
    if name == "kfac":
        run = influence(model, CE, whole, **options)
        with pytest.raises(ValueError, match=r"the tree has not: conv1.weight.*Take restrict\(trainable\)"):
            run((params, state), data, data)
        whole = whole.restrict(is_head)
    got, want = (
        influence(model, CE, one, **options)((params, state), data, data)
        for one in (whole, curvatures[f"{name} head"])
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
