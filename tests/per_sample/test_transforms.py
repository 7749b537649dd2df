"""Per-sample gradients, norms and clipped sums of whole networks against the references, in float64."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import resnet_func as rf
from parity.rounding import assert_rounded, rounding_noise
from resnet_func import losses, tree
from resnet_func import per_sample as ps
from resnet_func.per_sample.engine import evaluate
from resnet_func.per_sample.options import check_options
from resnet_func.per_sample.quantities.quantity import Quantity, clip_factors
from resnet_func.testing import assert_trees_equal, assert_trees_near
from resnet_func.testing.shadow import cast_floating
from resnet_func.types import Model, Params, State
from tests.per_sample.cases import (
    CLASSES,
    batch,
    configs,
    flops,
    network,
    small,
)

SEEDS = st.integers(0, 2**32 - 1)
VIEWS = st.sampled_from([None, 1, 2])


def options(model: Model, **more: Any) -> dict[str, Any]:
    assert model.config is not None
    return {"train": False, **more} if model.config.norm == "batch" else more


def global_norms(grads: Params) -> Tensor:
    return torch.stack([g.flatten(1).square().sum(1) for g in tree.leaves(grads)]).sum(0).sqrt()


def bounded_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Neither saturated nor huge where a network without normalisation has large logits."""
    return (logits - torch.eye(CLASSES, dtype=logits.dtype)[targets]).square().log1p().sum(1)


# --------------------------------------------------------------------------- against the references


@settings(max_examples=25, deadline=None)
@given(config=configs(), views=VIEWS, seed=SEEDS)
def test_grads_match_vmap_and_loop(config: rf.ResNetConfig, views: int | None, seed: int) -> None:
    model, params, state = network(config, seed)
    x, y = batch(3, seed, views=views)
    actual = ps.grads(model, bounded_loss, **options(model))(params, state, x, y)
    assert list(tree.flatten(actual)) == list(tree.flatten(params))
    for method in ("vmap", "loop"):
        reference = ps.grads(model, bounded_loss, **options(model, method=method))
        assert_trees_near(actual, reference(params, state, x, y), rtol=1e-10)


@settings(max_examples=15, deadline=None)
@given(config=configs(), views=VIEWS, seed=SEEDS)
def test_norms_and_clipped_sums_match_the_gradients(
    config: rf.ResNetConfig, views: int | None, seed: int
) -> None:
    model, params, state = network(config, seed)
    x, y = batch(3, seed, views=views)
    grads = ps.grads(model, bounded_loss, **options(model, method="vmap"))(params, state, x, y)
    expected = global_norms(grads)
    # ghost where it can be, materialised everywhere, and what the plan likes
    shape = tuple(x.shape)
    for budget in (None, 0, 2**40):
        plan = ps.plan(model, shape, "norms", budget)
        norms = ps.norms(model, bounded_loss, **options(model, method=plan))(params, state, x, y)
        torch.testing.assert_close(norms, expected, rtol=1e-10, atol=0)
        max_norm = 0.9 * expected.median().item()  # all may be equal
        plan = ps.plan(model, shape, "clipped_sum", budget)
        clipped = ps.clipped_sum(model, bounded_loss, max_norm=max_norm, **options(model, method=plan))
        total, norms = clipped(params, state, x, y)
        torch.testing.assert_close(norms, expected, rtol=1e-10, atol=0)
        factors = (max_norm / expected).clamp(max=1)
        assert (factors < 1).any()
        by_hand = tree.map(lambda g: torch.einsum("n,n...->...", factors, g), grads)  # noqa: B023
        assert_trees_near(total, by_hand, rtol=1e-10)


def test_sum_of_per_sample_gradients_is_the_gradient_of_the_sum() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(5, 1)

    def total(params: Params) -> Tensor:
        return losses.cross_entropy(model.apply(params, state, x, train=False)[0], y).sum()

    expected = torch.func.grad(total)(params)
    grads = ps.grads(model, losses.cross_entropy)(params, state, x, y)
    assert_trees_near(tree.map(lambda g: g.sum(0), grads), expected, rtol=1e-10)
    unclipped, _ = ps.clipped_sum(model, losses.cross_entropy, max_norm=math.inf)(params, state, x, y)
    assert_trees_near(unclipped, expected, rtol=1e-10)


def test_running_statistics_are_used_and_kept() -> None:
    model, params, state = network(small(norm="batch"), 0)
    before = tree.map(torch.clone, state)
    x, y = batch(4, 1)
    grads = ps.grads(model, losses.cross_entropy, train=False)
    actual = grads(params, state, x, y)
    assert_trees_equal(state, before)
    alone = grads(params, state, x[2:3], y[2:3])
    assert_trees_near(tree.map(lambda g: g[2:3], actual), alone, rtol=1e-10)


def test_identical_views_are_one_view() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    norms = ps.norms(model, losses.cross_entropy)
    repeated = x.unsqueeze(1).expand(3, 4, *x.shape[1:])
    torch.testing.assert_close(
        norms(params, state, repeated, y), norms(params, state, x, y), rtol=1e-10, atol=0
    )


def test_any_per_sample_loss() -> None:
    model, params, state = network(small(), 0)
    x, _ = batch(3, 1)
    targets = torch.linspace(-1, 1, 3 * CLASSES, dtype=torch.float64).reshape(3, CLASSES)
    for views in (x, x.unsqueeze(1).expand(3, 2, *x.shape[1:])):
        results = [
            ps.grads(model, losses.squared_error, method=method)(params, state, views, targets)
            for method in ("contract", "vmap", "loop")
        ]
        assert_trees_near(results[0], results[1], rtol=1e-10)
        assert_trees_near(results[0], results[2], rtol=1e-10)


def test_a_function_is_as_good_as_a_config() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    opaque = Model(None, model.init, model.apply)
    for transform, more in ((ps.grads, {}), (ps.norms, {}), (ps.clipped_sum, {"max_norm": 0.5})):
        expected = transform(model, losses.cross_entropy, **more)(params, state, x, y)
        actual = transform(opaque, losses.cross_entropy, **more)(params, state, x, y)
        assert_trees_equal(dict(enumerate_leaves(actual)), dict(enumerate_leaves(expected)))


def enumerate_leaves(result: Any) -> list[tuple[str, Tensor]]:
    return [(str(index), leaf) for index, leaf in enumerate(tree.leaves(result))]


# --------------------------------------------------------------------------- exact data


def exact_problem() -> tuple[Model, Params, State, Tensor, Tensor]:
    """Small integers, no normalisation, a squared error: every sum is exact in float64."""
    model = rf.build(small(norm="none", block="bottleneck", groups=2, depths=(1,), widths=(4,)))
    source = torch.Generator().manual_seed(0)
    params, state = model.init(source, dtype=torch.float64)
    params = tree.map(lambda p: torch.randint(-1, 2, p.shape, generator=source).double(), params)
    x = torch.randint(-1, 2, (5, 2, 3, 4, 4), generator=source).double()
    return model, params, state, x, torch.randint(-3, 4, (5, CLASSES), generator=source).double()


def test_methods_agree_to_the_bit_on_exact_data() -> None:
    model, params, state, x, y = exact_problem()
    results = [
        ps.grads(model, losses.squared_error, method=method)(params, state, x, y)
        for method in ("contract", "vmap", "loop")
    ]
    largest = max(leaf.abs().max().item() for leaf in tree.leaves(results[0]))
    assert 1 < largest < 2**24  # so that sums of squares are exact too
    assert_trees_equal(results[0], results[1])
    assert_trees_equal(results[0], results[2])


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_microbatches_change_no_bit_on_exact_data(size: int) -> None:
    model, params, state, x, y = exact_problem()
    for transform, more in ((ps.grads, {}), (ps.clipped_sum, {"max_norm": math.inf}), (ps.moments, {})):
        whole = transform(model, losses.squared_error, **more)(params, state, x, y)
        parts = transform(model, losses.squared_error, microbatch=size, **more)(params, state, x, y)
        for a, b in zip(tree.leaves(parts), tree.leaves(whole), strict=True):
            assert torch.equal(a, b)


# --------------------------------------------------------------------------- samples do not mix


@pytest.mark.parametrize("norm", ["group", "none", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("intruder", [1.0, math.nan, math.inf])
def test_changing_one_sample_leaves_the_others_bit_identical(
    norm: str, dtype: torch.dtype, intruder: float
) -> None:
    model, params, state = network(small(norm=norm), 0, dtype)
    x, y = batch(4, 1, dtype=dtype)
    other = x.clone()
    other[2] = intruder
    kept = [0, 1, 3]
    grads = ps.grads(model, losses.cross_entropy, train=False)
    before, after = (grads(params, state, data, y) for data in (x, other))
    assert_trees_equal(tree.map(lambda g: g[kept], before), tree.map(lambda g: g[kept], after))
    norms = ps.norms(model, losses.cross_entropy, train=False)
    before, after = (norms(params, state, data, y) for data in (x, other))
    assert torch.equal(before[kept], after[kept])
    assert bool(after[2].isfinite()) == math.isfinite(intruder)


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("method", ["contract", "vmap"])
def test_a_nan_sample_is_named_or_left_out(microbatch: int | None, method: Any) -> None:
    model, params, state = network(small(), 0)
    x, y = batch(5, 1)
    x[3, 0, 2, 2] = math.nan
    clean = [0, 1, 2, 4]
    more: dict[str, Any] = {"max_norm": 1.0, "microbatch": microbatch, "method": method}
    total, norms = ps.clipped_sum(model, losses.cross_entropy, nonfinite="zero", **more)(params, state, x, y)
    expected, _ = ps.clipped_sum(model, losses.cross_entropy, **more)(params, state, x[clean], y[clean])
    assert_trees_near(total, expected, rtol=1e-10)
    assert norms.isnan().nonzero().flatten().tolist() == [3]
    with pytest.raises(ValueError, match=r"1 of 5 samples .* gradient: 3\."):
        ps.clipped_sum(model, losses.cross_entropy, **more)(params, state, x, y)


# --------------------------------------------------------------------------- clipping


@settings(max_examples=300, deadline=None)
@given(
    norm=st.floats(0, 2.0**100, width=32),
    max_norm=st.floats(0, 2.0**20, width=32),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_clip_factors_are_exact(norm: float, max_norm: float, dtype: torch.dtype) -> None:
    value = torch.tensor([norm], dtype=dtype)
    factor = clip_factors(value, max_norm)
    assert factor.dtype == dtype
    assert (factor.item() == 1) == (norm <= max_norm)
    assert (factor * value).item() <= max_norm
    # and no smaller than it must be, down to where the factor itself underflows
    if 0 < max_norm < norm and factor.item() > 1e-30:
        assert (factor * value).item() >= max_norm * (1 - 1e-6)


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_no_clipped_gradient_exceeds_max_norm(clipping: Any, dtype: torch.dtype) -> None:
    model, params, state = network(small(), 0, dtype)
    x, y = batch(6, 1, dtype=dtype)
    slack = 1 + 16 * torch.finfo(dtype).eps
    for max_norm in (1e-3, 0.5, 3.0):
        clipped = ps.clipped_sum(model, losses.cross_entropy, max_norm=max_norm, clipping=clipping)
        for i in range(6):
            total, _ = clipped(params, state, x[i : i + 1], y[i : i + 1])
            norm = tree.norm(tree.map(torch.Tensor.double, total)).item()
            assert norm <= max_norm * slack


def test_clipping_rules_by_hand() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(4, 1)
    grads = ps.grads(model, losses.cross_entropy)(params, state, x, y)
    norms = global_norms(grads)
    total, _ = ps.clipped_sum(model, losses.cross_entropy, max_norm=0.7, clipping="automatic")(
        params, state, x, y
    )
    expected = tree.map(lambda g: torch.einsum("n,n...->...", 0.7 / (norms + 0.01), g), grads)
    assert_trees_near(total, expected, rtol=1e-10)

    layers = ps.layer_norms(model, losses.cross_entropy)(params, state, x, y)
    assert list(layers) == list(dict.fromkeys(path.rpartition(".")[0] for path in tree.flatten(params)))
    torch.testing.assert_close(torch.stack(list(layers.values())).square().sum(0).sqrt(), norms)
    share = 0.7 / math.sqrt(len(layers))
    total, returned = ps.clipped_sum(model, losses.cross_entropy, max_norm=0.7, clipping="per_layer")(
        params, state, x, y
    )

    def clip(path: str, g: Tensor) -> Tensor:
        factors = (share / layers[path.rpartition(".")[0]]).clamp(max=1)
        return torch.einsum("n,n...->...", factors, g)

    assert_trees_near(total, tree.map_with_path(clip, grads), rtol=1e-10)
    torch.testing.assert_close(returned, norms)


def test_edges_of_clipping() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    total, norms = ps.clipped_sum(model, losses.cross_entropy, max_norm=0.0)(params, state, x, y)
    assert all((leaf == 0).all() for leaf in tree.leaves(total))
    assert (norms > 0).all()

    def flat_loss(logits: Tensor, targets: Tensor) -> Tensor:
        return 0 * logits.sum(1)

    for clipping in ("flat", "per_layer", "automatic"):
        zero, norms = ps.clipped_sum(model, flat_loss, max_norm=1.0, clipping=clipping)(params, state, x, y)
        assert all((leaf == 0).all() for leaf in tree.leaves(zero))
        assert (norms == 0).all()
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm"):
            ps.clipped_sum(model, losses.cross_entropy, max_norm=wrong)


# --------------------------------------------------------------------------- empty, frozen, freed


@pytest.mark.parametrize("method", ["contract", "vmap", "loop"])
@pytest.mark.parametrize("views", [None, 2])
def test_an_empty_batch(method: Any, views: int | None) -> None:
    model, params, state = network(small(), 0)
    x, y = batch(0, 1, views=views)
    grads = ps.grads(model, losses.cross_entropy, method=method)(params, state, x, y)
    assert_trees_equal(grads, tree.map(lambda p: p.new_zeros((0, *p.shape)), params))
    assert ps.norms(model, losses.cross_entropy, method=method)(params, state, x, y).shape == (0,)
    total, norms = ps.clipped_sum(model, losses.cross_entropy, max_norm=1.0, method=method)(
        params, state, x, y
    )
    assert_trees_equal(total, tree.map(torch.zeros_like, params))
    assert norms.shape == (0,)
    moments = ps.moments(model, losses.cross_entropy, method=method)(params, state, x, y)
    assert_trees_equal(moments.mean, tree.map(torch.zeros_like, params))
    assert ps.gram(model, losses.cross_entropy, method=method)(params, state, (x, y)).shape == (0, 0)
    assert ps.sketch(model, losses.cross_entropy, dim=8, method=method)(params, state, x, y).shape == (0, 8)
    for dtype in (torch.float32, torch.float64):
        given = cast_floating(params, dtype)
        found = ps.dot(model, losses.cross_entropy)(given, state, x.to(dtype), y, given)
        assert_trees_equal(found, torch.zeros(0, dtype=dtype))


PREDICATES = {
    "fc": lambda path: path.startswith("fc."),
    "biases": lambda path: path.endswith(".bias"),
    "norm-weights": lambda path: "bn" in path and path.endswith("weight"),
    "one-conv": lambda path: path == "layer2.0.conv1.weight",
}


@pytest.mark.parametrize("name", PREDICATES)
def test_only_trainable_leaves_come_back(name: str) -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    trainable = PREDICATES[name]
    everything = tree.flatten(ps.grads(model, losses.cross_entropy)(params, state, x, y))
    expected = {path: leaf for path, leaf in everything.items() if trainable(path)}
    for method in ("contract", "vmap"):
        more: dict[str, Any] = {"trainable": trainable, "method": method}
        actual = tree.flatten(ps.grads(model, losses.cross_entropy, **more)(params, state, x, y))
        assert list(actual) == list(expected)
        for path, leaf in actual.items():
            torch.testing.assert_close(leaf, expected[path], rtol=1e-10, atol=1e-12)
        norms = ps.norms(model, losses.cross_entropy, **more)(params, state, x, y)
        want = torch.stack([leaf.flatten(1).square().sum(1) for leaf in expected.values()]).sum(0).sqrt()
        torch.testing.assert_close(norms, want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("method", ["contract", "vmap"])
def test_a_predicate_that_selects_nothing_is_refused(method: Any) -> None:
    model, params, state = network(small(), 0)
    norms = ps.norms(model, losses.cross_entropy, trainable=lambda path: "layer9" in path, method=method)
    with pytest.raises(ValueError, match="selects no leaf; the leaves are conv1.weight"):
        norms(params, state, *batch(3, 1))


def test_frozen_leaves_cost_nothing() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    forward = flops(lambda: model.apply(params, state, x, train=False))
    last_layer = ps.grads(model, losses.cross_entropy, trainable=PREDICATES["fc"], check=False)
    assert flops(lambda: last_layer(params, state, x, y)) < 1.01 * forward


def test_factors_are_freed_once_contracted() -> None:
    model, params, state = network(small(), 0)
    seen: list[tuple[str, weakref.ref[Tensor]]] = []

    def leaf(path: str, factors: Any, way: Any) -> None:
        layer = path.rpartition(".")[0]
        assert not [other for other, ref in seen if ref() is not None and other != layer]
        if hasattr(factors, "cotangents"):
            seen.append((layer, weakref.ref(factors.cotangents)))

    watch = Quantity("norms", leaf, lambda answers, captured: None, lambda parts: None)
    evaluate(check_options(model, losses.cross_entropy), [watch], params, state, *batch(3, 1))
    assert len(seen) == 7


def test_gradients_flow_through_norms_where_asked() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(2, 1)
    norms = ps.norms(model, losses.cross_entropy, trainable=PREDICATES["fc"])
    assert not norms(params, state, x, y).requires_grad
    x.requires_grad_()
    loss = norms(params, state, x, y).sum()
    (slope,) = torch.autograd.grad(loss, x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    step = 1e-6
    ends = [norms(params, state, x.detach() + s * step * direction, y).sum() for s in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((slope * direction).sum(), expected, rtol=1e-6, atol=1e-8)


# --------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("method", ["contract", "vmap", "loop"])
def test_autocast_narrows_the_network_and_not_the_sums(method: Any) -> None:
    model = rf.resnet20(depths=(1, 1, 1), norm="group")
    params, state = model.init(torch.Generator().manual_seed(0))
    x, y = (leaf.float() if leaf.is_floating_point() else leaf for leaf in batch(3, 1, size=16))
    narrow = rf.train.autocast(model, "cpu", torch.bfloat16)
    within = ps.clipped_sum(narrow, losses.cross_entropy, max_norm=1.0, method=method)(params, state, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        clipped = ps.clipped_sum(model, losses.cross_entropy, max_norm=1.0, method=method)
        around = clipped(params, state, x, y)
        gram = ps.gram(model, losses.cross_entropy, method=method)(params, state, (x, y))
    assert {leaf.dtype for leaf in [gram, *tree.leaves((within, around))]} == {torch.float32}

    by_loop = ps.clipped_sum(model, losses.cross_entropy, max_norm=1.0, method="loop", check=False)
    double = tree.map(Tensor.double, params), state, x.double(), y

    def exact() -> Any:  # the same network, whichever way it is narrowed
        return (by_loop(*double),) * 2

    assert_rounded((within, around), exact, rounding_noise(params, torch.bfloat16))
    assert not torch.equal(within[1], by_loop(params, state, x, y)[1])
    # sums over the same pixels in another order, in float32
    rtol = x[0, 0].numel() * torch.finfo(torch.float32).eps
    torch.testing.assert_close(gram.diagonal().sqrt(), around[1], rtol=rtol, atol=0)


# --------------------------------------------------------------------------- refusals


def test_batch_norm_in_training_mode_is_refused() -> None:
    model = rf.build(small(norm="batch"))
    for transform, more in ((ps.norms, {}), (ps.clipped_sum, {"max_norm": 1.0}), (ps.gram, {})):
        with pytest.raises(ValueError, match=r"train=False .* norm='group'"):
            transform(model, losses.cross_entropy, **more)
    for norm, message in (("batch", "BatchNorm in training mode"), ("group", "evaluation mode, whatever")):
        with pytest.raises(ValueError, match=message):
            ps.norms(rf.build(small(norm=norm)), losses.cross_entropy, train=True)
    _, params, state = network(small(norm="batch"), 0)
    opaque = Model(None, model.init, model.apply)
    with pytest.raises(ValueError, match="BatchNorm in training mode"):
        ps.norms(opaque, losses.cross_entropy)(params, state, *batch(2, 1))
    ps.norms(opaque, losses.cross_entropy, train=False)(params, state, *batch(2, 1))


def test_mistakes_are_named() -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    for more, message in (
        ({"method": "magic"}, "method must be"),
        ({"microbatch": 0}, "microbatch must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            ps.norms(model, losses.cross_entropy, **more)
    with pytest.raises(TypeError, match="trainabel"):
        ps.norms(model, losses.cross_entropy, trainabel=None)
    for more in ({"clipping": "flatt"}, {"nonfinite": "drop"}):
        (name,) = more
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            ps.clipped_sum(model, losses.cross_entropy, max_norm=1.0, **more)
    norms = ps.norms(model, losses.cross_entropy)
    for arguments, message in (
        ((x[0], y), "expected images"),
        ((x, y[:2]), "one target per sample"),
        ((x[:, None][:, :0], y), "at least one view"),
    ):
        with pytest.raises(ValueError, match=message):
            norms(params, state, *arguments)
    for method in ("contract", "vmap"):
        mean = ps.norms(model, lambda logits, y: losses.cross_entropy(logits, y).mean(), method=method)
        with pytest.raises(ValueError, match="one loss per sample"):
            mean(params, state, x, y)
