"""Products against dense matrices made by the definition, and what must hold of any of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import resnet_func as rf
from resnet_func import curvature, tree
from resnet_func.testing import assert_trees_near
from resnet_func.types import LossFn
from tests.curvature import oracles
from tests.per_sample.cases import batch, configs, network

LOSSES: dict[str, LossFn] = {
    "cross-entropy": rf.losses.cross_entropy,
    "smoothed": rf.losses.smoothed_cross_entropy(0.2),
    "squared": lambda logits, y: rf.losses.squared_error(
        logits, torch.nn.functional.one_hot(y, logits.shape[1]).to(logits.dtype)
    ),
    "quartic": lambda logits, y: (logits**4).sum(1),
}
NORMS = {
    "group": {},
    "batch": {"norm": "batch"},
    "standardised": {"weight_standardization": True},
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["cross-entropy", "quartic"])
def test_hessian_products_are_those_of_the_dense_hessian(loss: str, norm: str) -> None:
    model, params, state = oracles.tiny(**NORMS[norm])
    x, y = oracles.images(3)
    v = oracles.random_like(params, 1)
    dense = oracles.hessian(model, LOSSES[loss], params, state, x, y)
    product = curvature.hvp(model, LOSSES[loss], train=False)(params, state, x, y, v)
    oracles.assert_close(oracles.flat(product), dense @ oracles.flat(v), 1e-8)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gauss_newton_products_are_those_of_the_dense_matrix(loss: str, norm: str) -> None:
    model, params, state = oracles.tiny(**NORMS[norm])
    x, y = oracles.images(4)
    v = oracles.random_like(params, 1)
    dense = oracles.ggn(model, LOSSES[loss], params, state, x, y)
    product = curvature.ggn_vp(model, LOSSES[loss], train=False)(params, state, x, y, v)
    oracles.assert_close(oracles.flat(product), dense @ oracles.flat(v), 1e-8)


@settings(max_examples=3)
@given(config=configs(), seed=st.integers(0, 2**16), trained=st.sampled_from(["", "layer", "fc."]))
def test_products_are_symmetric_linear_and_split_over_samples(
    config: rf.ResNetConfig, seed: int, trained: str
) -> None:
    """For any network and any frozen part, `<u, A v> = <A u, v>`; microbatches add up.

    The loss is quadratic: a softmax that is sure of itself has a second derivative of cancelled digits.
    """
    loss_fn = LOSSES["squared"]
    model, params, state = network(config, seed)
    x, y = batch(3, seed)
    u, v = (oracles.random_like(params, seed + i) for i in (1, 2))
    mixed = tree.map(lambda a, b: 2 * a - 3 * b, u, v)

    def trainable(path: str) -> bool:
        return path.startswith(trained)

    for transform in (curvature.hvp, curvature.ggn_vp):
        product = transform(model, loss_fn, train=False, trainable=trainable)
        au, av, amixed = (product(params, state, x, y, w) for w in (u, v, mixed))
        assert list(tree.flatten(au)) == list(tree.flatten(oracles.kept(params, trainable)))
        own_u, own_v = oracles.kept(u, trainable), oracles.kept(v, trainable)
        scale = tree.norm(au) * tree.norm(own_v) + tree.norm(av) * tree.norm(own_u)
        assert abs(tree.dot(own_u, av) - tree.dot(au, own_v)) <= 1e-10 * scale
        assert_trees_near(amixed, tree.map(lambda a, b: 2 * a - 3 * b, au, av), rtol=1e-9)
        by_parts = transform(model, loss_fn, train=False, trainable=trainable, microbatch=2)
        assert_trees_near(by_parts(params, state, x, y, v), av, rtol=1e-10)


def test_narrow_parameters_sum_wide_and_come_back_narrow() -> None:
    model, params, state = oracles.tiny()
    narrow, narrow_state = tree.map(lambda leaf: leaf.bfloat16(), (params, state))
    x, y = oracles.images(4)
    product = curvature.ggn_vp(model, rf.losses.cross_entropy, microbatch=1)
    found = product(narrow, narrow_state, x.bfloat16(), y, narrow)
    assert {leaf.dtype for leaf in tree.leaves(found)} == {torch.bfloat16}
    exact = product(*tree.map(lambda leaf: leaf.double(), (narrow, narrow_state)), x, y, params)
    cosine = oracles.flat(found).double() @ oracles.flat(exact)
    assert cosine > 0.99 * oracles.flat(found).double().norm() * oracles.flat(exact).norm()


def test_no_samples_give_zeros() -> None:
    model, params, state = oracles.tiny()
    x, y = oracles.images(2)
    for transform in (curvature.hvp, curvature.ggn_vp):
        found = transform(model, rf.losses.cross_entropy)(params, state, x[:0], y[:0], params)
        assert oracles.flat(found).count_nonzero() == 0


def test_mistakes_are_told_in_one_line() -> None:
    model, params, state = oracles.tiny()
    x, y = oracles.images(2)
    product = curvature.hvp(model, rf.losses.cross_entropy)
    with pytest.raises(ValueError, match=r"direction like the trainable parameters, with conv1.weight"):
        product(params, state, x, y, {"fc": params["fc"]})
    with pytest.raises(ValueError, match="one loss per sample"):
        curvature.hvp(model, torch.nn.functional.cross_entropy)(params, state, x, y, params)
    with pytest.raises(ValueError, match="one loss per sample"):
        curvature.ggn_vp(model, torch.nn.functional.cross_entropy)(params, state, x, y, params)
    batch_norm = rf.resnet20(depths=(1, 1, 1))
    with pytest.raises(ValueError, match="train=False"):
        curvature.hvp(batch_norm, rf.losses.cross_entropy)


def test_a_flat_function_is_the_network() -> None:
    model, params, state = oracles.tiny(norm="batch")
    x, _ = oracles.images(2)
    f, leaves = curvature.flat_function(model, params, state)
    assert leaves == tree.flatten(params)
    assert torch.equal(f(leaves, x), model.apply(params, state, x, train=False)[0])
    f, leaves = curvature.flat_function(model, params, state, trainable=lambda path: path.startswith("fc."))
    assert list(leaves) == ["fc.weight", "fc.bias"]
    zeros = {path: torch.zeros_like(leaf) for path, leaf in leaves.items()}
    assert f(zeros, x).count_nonzero() == 0


@pytest.mark.nightly
@pytest.mark.parametrize("transform", [curvature.hvp, curvature.ggn_vp])
def test_a_product_compiles_to_one_graph(transform) -> None:
    model, params, state = oracles.tiny()
    x, y = oracles.images(3)
    v = oracles.random_like(params, 1)
    product = transform(model, rf.losses.cross_entropy)
    compiled = torch.compile(product, fullgraph=True)
    assert_trees_near(compiled(params, state, x, y, v), product(params, state, x, y, v), rtol=1e-10)
