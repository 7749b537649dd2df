"""Gram matrices, sketches, moments and the streaming pass, against the materialised gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import resnet_func as rf
from resnet_func import losses, tree
from resnet_func import per_sample as ps
from resnet_func.per_sample import dataset
from resnet_func.per_sample.quantities import projections, quantity
from resnet_func.per_sample.quantities.projections import leaf_seed, signs, split_dim
from resnet_func.testing import assert_trees_near, generator
from resnet_func.types import Params
from tests.per_sample.cases import CLASSES, batch, configs, network, small

SEEDS = st.integers(0, 2**32 - 1)


def matrix(grads: Params) -> Tensor:
    """Per-sample gradients as rows `[N, |params|]`."""
    return torch.cat([leaf.flatten(1) for leaf in tree.leaves(grads)], 1)


def rows(model: rf.Model, params: Params, state: Any, x: Tensor, y: Tensor, loss: Any = None) -> Tensor:
    loss = loss or losses.cross_entropy
    return matrix(ps.grads(model, loss, method="vmap", train=False)(params, state, x, y))


# --------------------------------------------------------------------------- gram


@settings(max_examples=10, deadline=None)
@given(config=configs(), views=st.sampled_from([None, 2]), seed=SEEDS)
def test_gram_is_the_product_of_the_gradients(config: rf.ResNetConfig, views: int | None, seed: int) -> None:
    model, params, state = network(config, seed)
    a, b = batch(3, seed, views=views), batch(2, seed + 1, views=views)
    left, right = rows(model, params, state, *a), rows(model, params, state, *b)
    # a budget of nothing takes what is smaller, an endless one what is faster
    for budget in (0, 2**40):
        plan = ps.plan(model, tuple(a[0].shape), "gram", budget)
        gram = ps.gram(model, losses.cross_entropy, method=plan, train=False)
        assert_trees_near(gram(params, state, a, b), left @ right.T)
        assert_trees_near(gram(params, state, a), left @ left.T)


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_gram_is_symmetric_and_positive_semi_definite(microbatch: int | None, dtype: torch.dtype) -> None:
    model, params, state = network(small(), 0, dtype)
    x, y = batch(5, 1, dtype=dtype)
    x[1], y[1] = x[0], y[0]  # a repeated sample: the matrix is singular
    gram = ps.gram(model, losses.cross_entropy, microbatch=microbatch)(params, state, (x, y))
    assert torch.equal(gram, gram.T)
    eigenvalues = torch.linalg.eigvalsh(gram.double())
    assert eigenvalues.min() >= -64 * torch.finfo(dtype).eps * eigenvalues.max()
    norms = ps.norms(model, losses.cross_entropy)(params, state, x, y)
    torch.testing.assert_close(gram.diagonal().sqrt(), norms)


def test_layer_grams_add_up_and_blocks_join() -> None:
    model, params, state = network(small(), 0)
    a, b = batch(5, 1), batch(4, 2)
    expected = rows(model, params, state, *a) @ rows(model, params, state, *b).T
    layers = ps.layer_grams(model, losses.cross_entropy)(params, state, a, b)
    assert next(iter(layers)) == "conv1"
    assert_trees_near(torch.stack(list(layers.values())).sum(0), expected)
    assert_trees_near(ps.gram(model, losses.cross_entropy, microbatch=3)(params, state, a, b), expected)
    empty = (a[0][:0], a[1][:0])
    assert ps.gram(model, losses.cross_entropy)(params, state, a, empty).shape == (5, 0)


def test_ntk_of_one_logit_and_of_a_tree_of_inputs() -> None:
    model = rf.from_function(lambda p, x: x["a"] @ p["w"] + x["b"])
    x = {"a": torch.randn(3, 4, generator=generator(0)), "b": torch.ones(3)}
    params = {"w": torch.randn(4, generator=generator(1))}
    few = tree.map(lambda leaf: leaf[:2], x)
    torch.testing.assert_close(ps.ntk(model, 1)(params, {}, x), x["a"] @ x["a"].T)
    torch.testing.assert_close(ps.ntk(model, 1)(params, {}, x, few), x["a"] @ few["a"].T)


def test_ntk_sums_over_logits() -> None:
    model, params, state = network(small(), 0)
    (x_a, y_a), (x_b, y_b) = batch(3, 1), batch(2, 2)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for index in range(CLASSES):
        logit = losses.logit(index)
        left, right = (rows(model, params, state, x, y, logit) for x, y in ((x_a, y_a), (x_b, y_b)))
        expected += left @ right.T
    assert_trees_near(ps.ntk(model)(params, state, x_a, x_b), expected)
    assert ps.ntk(model)(params, state, x_a).shape == (3, 3)
    with pytest.raises(ValueError, match="num_classes="):
        ps.ntk(rf.Model(None, model.init, model.apply))


# --------------------------------------------------------------------------- sketch

# With the seed below a loss so small that the squares of its gradients, 1e-300, are zero.
SATURATED = rf.ResNetConfig(
    block="basic",
    depths=(2, 1),
    widths=(4, 4),
    stem="imagenet",
    norm="batch",
    norm_groups=1,
    shortcut="pad",
    weight_standardization=True,
    num_classes=3,
)


@settings(max_examples=10, deadline=None)
@given(config=configs(), views=st.sampled_from([None, 2]), seed=SEEDS)
@example(config=SATURATED, views=None, seed=78377576)
def test_sketches_project_the_gradients(config: rf.ResNetConfig, views: int | None, seed: int) -> None:
    """From factors or from materialised gradients: the same projection."""
    model, params, state = network(config, seed)
    x, y = batch(3, seed, views=views)
    for projection in ("factorized", "dense"):
        options: dict[str, Any] = {"dim": 12, "seed": 3, "projection": projection, "train": False}
        actual = ps.sketch(model, losses.cross_entropy, **options)(params, state, x, y)
        assert actual.shape == (3, 12)
        reference = ps.sketch(model, losses.cross_entropy, method="loop", **options)
        assert_trees_near(actual, reference(params, state, x, y))
        parts = ps.sketch(model, losses.cross_entropy, microbatch=2, **options)
        assert_trees_near(parts(params, state, x, y), actual)


@pytest.mark.parametrize("views", [None, 2])
def test_whichever_way_takes_less_work_the_sketch_is_the_same(
    views: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1, views=views)
    sketch = ps.sketch(model, losses.cross_entropy, dim=20, train=False)
    found = []
    for first, chunk in (
        (True, 2**22),
        (False, 2**22),
        (False, 20 * 5),
    ):  # the last: 5 rows of signs at a time
        monkeypatch.setattr(projections, "projecting_first_pays", lambda *_, first=first: first)
        monkeypatch.setattr(projections, "DENSE_CHUNK", chunk)
        found.append(sketch(params, state, x, y))
    for other in found[1:]:
        assert_trees_near(other, found[0])
        assert not torch.equal(other, found[0])  # it did go another way


@pytest.mark.parametrize("projection", ["factorized", "dense"])
def test_sketches_are_linear_and_depend_on_the_seed(projection: Any) -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)

    def doubled(logits: Tensor, targets: Tensor) -> Tensor:
        return 2 * losses.cross_entropy(logits, targets)

    def sketch(loss: Any, seed: int) -> Tensor:
        return ps.sketch(model, loss, dim=16, seed=seed, projection=projection)(params, state, x, y)

    one = sketch(losses.cross_entropy, 0)
    assert torch.equal(sketch(doubled, 0), 2 * one)
    assert torch.equal(sketch(losses.cross_entropy, 0), one)
    assert not torch.equal(sketch(losses.cross_entropy, 1), one)


@pytest.mark.parametrize("projection", ["factorized", "dense"])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_inner_products_of_sketches_are_unbiased(projection: Any, block: Any) -> None:
    """Over many seeds the mean is the inner product, and the error what the docstring says."""
    changes: dict[str, Any] = {
        "block": block,
        "depths": (1,),
        "widths": (4,),
        "groups": 1 + (block != "basic"),
    }
    model, params, state = network(small(**changes), 0)
    x, y = batch(3, 1, size=4)
    left = rows(model, params, state, x, y)
    expected = left @ left.T
    scale = torch.outer(expected.diagonal().sqrt(), expected.diagonal().sqrt())
    dim, draws = 64, 60
    errors = []
    for seed in range(draws):
        sketch = ps.sketch(model, losses.cross_entropy, dim=dim, seed=seed, projection=projection)
        s = sketch(params, state, x, y)
        errors.append((s @ s.T - expected) / scale)
    deviations = torch.stack(errors)
    spread = deviations.square().mean(0).sqrt().max().item()
    # the largest error is a sample's with itself; a factorised one is bounded by a single rank-one layer's
    most = 1.3 * math.sqrt(2 / dim) if projection == "dense" else 2 / dim**0.25
    assert 0.5 / math.sqrt(dim) < spread < most
    assert deviations.mean(0).abs().max().item() < 4.5 * spread / math.sqrt(draws)


def test_the_projection_is_the_same_on_every_machine() -> None:
    """Golden signs: drawn from integers alone, a stream for each leaf."""
    drawn = signs(3, 40, torch.zeros(()), leaf_seed(0, "conv1.weight"))
    assert drawn.abs().eq(1).all()
    words = [int("".join("1" if s > 0 else "0" for s in row.tolist()), 2) for row in drawn]
    assert words == GOLDEN
    other = signs(3, 40, torch.zeros(()), leaf_seed(0, "fc.weight"))
    assert not torch.equal(drawn, other)
    whole = signs(30, 7, torch.zeros(()), 5)
    assert torch.equal(signs(11, 7, torch.zeros(()), 5, first=13), whole[13:24])
    many = signs(300, 300, torch.zeros(()), 0)
    assert abs(many.mean().item()) < 4 / 300


GOLDEN = [682873895011, 406537984486, 102610482888]


def test_split_dim() -> None:
    assert [split_dim(dim) for dim in (1, 7, 12, 4096)] == [(1, 1), (1, 7), (3, 4), (64, 64)]


def test_mistakes_of_sketches_are_named() -> None:
    model = rf.build(small())
    with pytest.raises(ValueError, match="dim must be 1 or more"):
        ps.sketch(model, losses.cross_entropy, dim=0)
    with pytest.raises(ValueError, match="projection must be"):
        ps.sketch(model, losses.cross_entropy, projection="sparse")  # type: ignore[arg-type]


# --------------------------------------------------------------------------- moments


def test_moments_by_hand() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(6, 1)
    grads = ps.grads(model, losses.cross_entropy, method="vmap")(params, state, x, y)
    for microbatch in (None, 4):
        moments = ps.moments(model, losses.cross_entropy, microbatch=microbatch)(params, state, x, y)
        assert_trees_near(moments.mean, tree.map(lambda g: g.mean(0), grads), rtol=1e-10)
        assert_trees_near(moments.second_moment, tree.map(lambda g: g.square().mean(0), grads), rtol=1e-10)
        flat = matrix(grads)
        trace = flat.var(0, correction=1).sum()
        squared_norm = flat.mean(0).square().sum() - trace / 6
        assert_trees_near(moments.noise_scale.trace, trace)
        assert_trees_near(moments.noise_scale.squared_norm, squared_norm, 1e-9)
        assert_trees_near(moments.noise_scale.value, trace / squared_norm, 1e-9)
        layer = matrix({"fc": grads["fc"]})
        assert_trees_near(moments.layer_noise_scale["fc"].trace, layer.var(0, correction=1).sum())
        traces = [scale.trace for scale in moments.layer_noise_scale.values()]
        assert_trees_near(torch.stack(traces).sum(), trace)


def test_the_noise_scale_estimates_are_unbiased() -> None:
    """Over all pairs of a population, the mean estimates are the population's own values."""
    model, params, state = network(small(depths=(1,), widths=(4,)), 0)
    x, y = batch(6, 1, size=4)
    flat = rows(model, params, state, x, y)
    moments = ps.moments(model, losses.cross_entropy)
    # pairs with replacement: independent draws from the six samples
    pairs = [[i, j] for i in range(6) for j in range(6)]
    scales = [moments(params, state, x[pair], y[pair]).noise_scale for pair in pairs]
    assert_trees_near(torch.stack([s.trace for s in scales]).mean(), flat.var(0, correction=0).sum())
    assert_trees_near(torch.stack([s.squared_norm for s in scales]).mean(), flat.mean(0).square().sum(), 1e-8)


def test_one_sample_has_no_noise_scale() -> None:
    model, params, state = network(small(), 0)
    moments = ps.moments(model, losses.cross_entropy)(params, state, *batch(1, 1))
    assert moments.noise_scale.value.isnan()
    assert moments.noise_scale.trace.isnan()


# --------------------------------------------------------------------------- reduce


def test_over_dataset_is_every_quantity_of_the_whole_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    model, params, state = network(small(), 0)
    x, y = batch(7, 1)
    batches = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 7, 3)]
    loss = losses.cross_entropy
    wanted: dict[str, Any] = {
        "gradient norm": "norms",
        "layers": "layer_norms",
        "loss": "loss",
        "el2n": "el2n",
        "correct": "correct",
        "moments": "moments",
        "sketch": ps.sketch_quantity(8, 1, "factorized"),
    }
    result = ps.over_dataset(model, loss, wanted, progress=True)(params, state, iter(batches))
    assert "per-sample" in capsys.readouterr().out
    assert list(result) == list(wanted)
    logits = model.apply(params, state, x, train=False)[0]
    errors = logits.softmax(1) - torch.eye(CLASSES, dtype=torch.float64)[y]
    assert_trees_near(result["gradient norm"], ps.norms(model, loss)(params, state, x, y))
    assert_trees_near(result["layers"]["fc"], ps.layer_norms(model, loss)(params, state, x, y)["fc"])
    assert_trees_near(result["loss"], loss(logits, y))
    assert_trees_near(result["el2n"], errors.square().sum(1).sqrt())
    assert torch.equal(result["correct"], (logits.argmax(1) == y).double())
    assert_trees_near(result["sketch"], ps.sketch(model, loss, dim=8, seed=1)(params, state, x, y))
    moments = ps.moments(model, loss)(params, state, x, y)
    assert_trees_near(result["moments"].second_moment, moments.second_moment, rtol=1e-10)
    assert_trees_near(result["moments"].noise_scale.value, moments.noise_scale.value, 1e-9)


def test_over_dataset_averages_over_views() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1, views=2)
    result = ps.over_dataset(model, losses.cross_entropy, ("loss", "el2n", "correct"))(
        params, state, [(x, y)]
    )
    each = [
        ps.over_dataset(model, losses.cross_entropy, ("loss", "el2n", "correct"))(
            params, state, [(x[:, k], y)]
        )
        for k in range(2)
    ]
    for name, value in result.items():
        torch.testing.assert_close(value, (each[0][name] + each[1][name]) / 2)


def test_sums_stay_one_sum() -> None:
    """What says that it adds up is held once in a pass over a data set, not once for each batch."""
    made = [make() for make in dataset.NAMED.values()]
    made += [quantity.grads(), quantity.clipped_sum(1.0, "flat"), ps.sketch_quantity(8, 0, "dense")]
    assert {one.name for one in made if one.accumulate} == {"moments", "clipped_sum"}


def test_mistakes_of_over_dataset_are_named() -> None:
    model, params, state = network(small(), 0)
    for wrong, got in ((("norm",), "got norm"), ((), "got none")):
        with pytest.raises(ValueError, match=f"expected quantities among .*{got}"):
            ps.over_dataset(model, losses.cross_entropy, wrong)
    with pytest.raises(ValueError, match="at least one batch"):
        ps.over_dataset(model, losses.cross_entropy, ("norms",))(params, state, [])
