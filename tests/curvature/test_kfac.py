"""K-FAC and EKFAC against their definitions, dense and in float64, and against curvlinops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import resnet_func as rf
from resnet_func import attribution, curvature, losses, tree
from resnet_func.curvature.kronecker import Block, KroneckerEstimate
from resnet_func.testing import generator
from tests.curvature import oracles
from tests.curvature.oracles import assert_close, data, dense, module
from tests.per_sample.cases import batch, configs, network

CROSS_ENTROPY = rf.losses.cross_entropy


# --------------------------------------------------------------------------- by the definition


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_factors_of_a_linear_layer_are_second_moments(approximation) -> None:
    """Of an only layer: inputs' second moment, and the exact mean Hessian in the logits."""
    model, params, state = module(nn.Linear(4, 3))
    x, y = data(5, 4)
    estimate = curvature.kfac(model, CROSS_ENTROPY, approximation=approximation)(params, state, [(x, y)])
    p = model.apply(params, state, x, train=False)[0].softmax(1)
    mean_hessian = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    assert_close(dense(estimate.blocks["0.weight"]), torch.kron(mean_hessian, x.T @ x / 5), 1e-10)
    assert_close(dense(estimate.blocks["0.bias"]), mean_hessian, 1e-10)


@pytest.mark.parametrize("fisher", ["exact", "sampled"])
@pytest.mark.parametrize("column", [False, True], ids=["[N]", "[N, 1]"])
def test_a_binary_cross_entropy_of_one_logit(fisher: Any, column: bool) -> None:
    """Its Gauss-Newton matrix is the mean of p (1 - p) x x'; one sign estimates it without error."""

    def loss_fn(logits: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits.reshape(len(y)), y, reduction="none")

    model = rf.from_function(lambda p, x: x @ p["w"] if column else (x @ p["w"])[:, 0])
    x, params = data(5, 4)[0], {"w": data(4, 1)[0]}
    y, p = (x[:, 0] > 0).to(x.dtype), torch.sigmoid(x @ params["w"])
    batches, draw = [(x, y)], generator(0)
    want = (x.T * (p * (1 - p)).T) @ x / 5
    e = curvature.ekfac(model, loss_fn, fisher=fisher)(params, {}, batches, generator=draw)
    k = curvature.kfac(model, loss_fn, fisher=fisher)(params, {}, batches, generator=draw)
    assert_close(e.trace(), want.trace(), 1e-10)
    assert list(k.blocks) == ["w"]
    product = curvature.ggn_vp(model, loss_fn)(params, {}, x, y, params)["w"]
    assert_close(product, want @ params["w"], 1e-10)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("changes", [{}, {"norm": "batch"}, {"weight_standardization": True}], ids=str)
def test_small_leaves_have_their_exact_blocks_and_ekfac_the_exact_trace(fisher, changes: dict) -> None:
    model, params, state = oracles.tiny(**changes)
    x, y = oracles.images(4)
    matrix = {"exact": oracles.ggn, "empirical": oracles.empirical_fisher}[fisher]
    exact = oracles.blocks(matrix(model, CROSS_ENTROPY, params, state, x, y), params)
    k = curvature.kfac(model, CROSS_ENTROPY, fisher=fisher, train=False)(params, state, [(x, y)])
    e = curvature.ekfac(model, CROSS_ENTROPY, fisher=fisher, train=False)(params, state, [(x, y)])
    assert list(k.blocks) == list(tree.flatten(params))
    for path, block in k.blocks.items():
        if len(block.shape) == 1:
            assert_close(dense(block), exact[path], 1e-8)
        corrected, estimated = dense(e.blocks[path]), dense(block)
        assert_close(corrected.trace(), exact[path].trace(), 1e-8)
        # the correction is the best there is in that basis
        rounding = 1e-10 * exact[path].norm()
        assert (corrected - exact[path]).norm() <= (estimated - exact[path]).norm() + rounding
        basis = torch.stack([block.from_basis(unit) for unit in units(block)]).flatten(1)
        moments = ((basis @ exact[path]) * basis).sum(1)
        assert_close(e.blocks[path].eigenvalues.flatten(), moments, 1e-8)


def units(block: Block) -> Tensor:
    size = block.eigenvalues.numel()
    return torch.eye(size, dtype=torch.float64).reshape(size, *block.eigenvalues.shape)


# --------------------------------------------------------------------------- any network, any split


@settings(max_examples=3)
@given(
    config=configs(("group", "batch")),
    seed=st.integers(0, 2**16),
    fisher=st.sampled_from(["exact", "empirical"]),
)
def test_batches_and_microbatches_add_up(config: rf.ResNetConfig, seed: int, fisher) -> None:
    model, params, state = network(config, seed)
    x, y = batch(5, seed)
    v = oracles.random_like(params, seed, n=2)
    chosen: dict[str, Any] = {"fisher": fisher, "train": False}
    whole = curvature.kfac(model, CROSS_ENTROPY, **chosen)(params, state, [(x, y)])
    split = curvature.kfac(model, CROSS_ENTROPY, microbatch=2, **chosen)(
        params, state, [(x[:3], y[:3]), (x[3:], y[3:])]
    )
    for (path, ours), theirs in zip(
        tree.flatten(split.product(v)).items(), tree.flatten(whole.product(v)).values(), strict=True
    ):
        scale = theirs.abs().max().item()
        assert (ours - theirs).abs().max() <= 1e-9 * scale, path


def test_signs_estimate_the_exact_matrix() -> None:
    """The mean over many draws of the sampled factors comes near; a seed gives the same again."""
    model, params, state = module(nn.Linear(3, 4))
    x, y = data(4, 3, classes=4)
    many = [(x, y)] * 400
    kfac = curvature.kfac(model, CROSS_ENTROPY, fisher="sampled")
    exact = curvature.kfac(model, CROSS_ENTROPY)(params, state, [(x, y)])
    sampled = kfac(params, state, many, generator=generator(0))
    # 1600 samples of products of bounded signs: five standard errors
    assert_close(dense(sampled.blocks["0.bias"]), dense(exact.blocks["0.bias"]), 5 / 40)
    again = kfac(params, state, many, generator=generator(0))
    assert torch.equal(again.blocks["0.bias"].eigenvalues, sampled.blocks["0.bias"].eigenvalues)


def test_frozen_leaves_have_no_block() -> None:
    model, params, state = oracles.tiny()
    x, y = oracles.images(3)

    def last(path: str) -> bool:
        return path.startswith("fc.")

    estimate = curvature.ekfac(model, CROSS_ENTROPY, trainable=last)(params, state, [(x, y)])
    assert list(estimate.blocks) == ["fc.weight", "fc.bias"]
    found = estimate.inverse_product(params, damping=1.0)
    assert list(tree.flatten(found)) == ["fc.weight", "fc.bias"]


# --------------------------------------------------------------------------- inverse products


@pytest.mark.parametrize("transform", [curvature.kfac, curvature.ekfac])
def test_inverse_products_are_those_of_the_dense_inverse(transform) -> None:
    model, params, state = oracles.tiny(norm="batch")
    x, y = oracles.images(4)
    estimate: KroneckerEstimate = transform(model, CROSS_ENTROPY, fisher="empirical", train=False)(
        params, state, [(x, y)]
    )
    grads = rf.per_sample.grads(model, CROSS_ENTROPY, train=False)(params, state, x, y)
    for damping in (0.1, None):
        found = tree.flatten(estimate.inverse_product(grads, damping=damping))
        for path, block in estimate.blocks.items():
            matrix = dense(block)
            amount = 0.1 * matrix.trace() / len(matrix) if damping is None else damping
            damped = matrix + amount * torch.eye(len(matrix), dtype=torch.float64)
            rows = tree.flatten(grads)[path].flatten(1)
            assert_close(found[path].flatten(1), torch.linalg.solve(damped, rows.T).T, 1e-8)


# --------------------------------------------------------------------------- curvlinops


def convolutional(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [
            nn.Conv2d(3, 4, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(4, 5, 2, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(20, 3),
        ]
        return nn.Sequential(*layers).double()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_factors_and_eigenvalues_are_curvlinops(fisher, approximation) -> None:
    """On the same module: both factors of K-FAC, EKFAC's eigenvalues, and what both do to a vector."""
    curvlinops = pytest.importorskip("curvlinops")
    network = convolutional()
    parameters = [p for name, p in network.named_parameters() if name.endswith("weight")]
    # more samples than inputs: a factor that is singular has no basis of its own
    batches = [data(20, 3, 6, 6, seed=seed) for seed in (0, 1)]
    theirs_of = {
        "fisher_type": {"exact": "type-2", "empirical": "empirical"}[fisher],
        "kfac_approx": approximation,
        "check_deterministic": False,
    }
    model, params, state = rf.from_module(network)
    ours_of: dict[str, Any] = {"fisher": fisher, "approximation": approximation}
    for name in ("KFACLinearOperator", "EKFACLinearOperator"):
        operator = getattr(curvlinops, name)(network, nn.CrossEntropyLoss(), parameters, batches, **theirs_of)
        transform = curvature.ekfac if name.startswith("E") else curvature.kfac
        estimate = transform(model, CROSS_ENTROPY, trainable=lambda path: path.endswith("weight"), **ours_of)(
            params, state, batches
        )
        vector = [torch.randn(p.shape, generator=generator(1), dtype=torch.float64) for p in parameters]
        theirs = operator @ vector
        ours = estimate.product(tree.unflatten(dict(zip(estimate.blocks, vector, strict=True))))
        for mine, other in zip(tree.flatten(ours).values(), theirs, strict=True):
            assert_close(mine, other.detach(), 1e-6)
        assert_close(estimate.trace(), torch.as_tensor(float(operator.trace), dtype=torch.float64), 1e-6)
        for path, block in estimate.blocks.items():
            layer = path.rpartition(".")[0]
            if name.startswith("E"):
                values = operator._corrected_eigenvalues[layer]
                values = next(iter(values.values())) if isinstance(values, dict) else values
                assert_close(block.eigenvalues.flatten().sort().values, values.flatten().sort().values, 1e-6)
            else:
                other = torch.kron(operator._gradient_covariances[layer], operator._input_covariances[layer])
                assert_close(dense(block), other, 1e-6)


# --------------------------------------------------------------------------- mistakes


def test_mistakes_are_told_in_one_line() -> None:
    model, params, state = oracles.tiny()
    x, y = oracles.images(2)
    with pytest.raises(ValueError, match="fisher must be one of exact, sampled, empirical; got 'type-2'"):
        curvature.kfac(model, CROSS_ENTROPY, fisher="type-2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="approximation must be one of expand, reduce"):
        curvature.ekfac(model, CROSS_ENTROPY, approximation="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass generator="):
        curvature.kfac(model, CROSS_ENTROPY, fisher="sampled")(params, state, [(x, y)])
    with pytest.raises(ValueError, match="goes through the batches twice"):
        curvature.ekfac(model, CROSS_ENTROPY)(params, state, iter([(x, y)]))
    for nothing in ([], [(x[:0], y[:0])]):
        with pytest.raises(ValueError, match="at least one batch"):
            curvature.kfac(model, CROSS_ENTROPY)(params, state, nothing)


TARGETS = {
    "ignored": torch.tensor([0, 1, -100, -100, -100, -100]),
    "weights": torch.linspace(0, 3, 24, dtype=torch.float64).reshape(6, 4),
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_trace_is_that_of_the_matrix_whatever_the_targets_weigh(name: str) -> None:
    model, params, state = rf.from_module(torch.nn.Linear(3, 4).double())
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3).sin()
    found = curvature.ekfac(model, losses.cross_entropy)(params, state, [(x, TARGETS[name])]).trace()
    product = curvature.ggn_vp(model, losses.cross_entropy)
    units = torch.eye(tree.size(params), dtype=torch.float64)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(params).items()}
    exact = 0.0
    for unit in units:
        parts = unit.split([shape.numel() for shape in shapes.values()])
        leaves = {path: part.reshape(shapes[path]) for path, part in zip(shapes, parts, strict=True)}
        along = tree.unflatten(leaves)
        exact = exact + tree.dot(product(params, state, x, TARGETS[name], along), along)
    torch.testing.assert_close(torch.as_tensor(found).double(), exact, rtol=1e-8, atol=1e-10)


def test_an_empty_batch_among_others_changes_nothing() -> None:
    model, params, state = rf.from_module(torch.nn.Linear(3, 4).double())
    x, y = (
        torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3).sin(),
        torch.tensor([0, 1, 2, 3, 0, 1]),
    )
    parts = [(x[:3], y[:3]), (x[:0], y[:0]), (x[3:], y[3:])]
    estimate = curvature.kfac(model, losses.cross_entropy)
    with_empty, without = (estimate(params, state, part) for part in (parts, [parts[0], parts[2]]))
    assert torch.equal(torch.as_tensor(with_empty.trace()), torch.as_tensor(without.trace()))
    scores = attribution.score_dataset(model, losses.cross_entropy)([(params, state)], parts)
    assert len(scores.predictions) == 6
