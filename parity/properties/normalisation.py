"""Batch normalisation, group normalisation and weight standardisation against their definitions."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from parity.properties.cases import AS_PUBLISHED, SEEDS, batches, networks, normal
from parity.properties.table import prop
from resnet_func import tree
from resnet_func.models import layers
from resnet_func.models.layers import NORM_EPS, GroupNorm
from resnet_func.testing import Batch, Network, assert_trees_equal, assert_trees_near, generator
from resnet_func.types import Params, State

ROUNDING = "the same formula in another order, in float64"
SHAPES = st.tuples(st.integers(2, 4), st.sampled_from([2, 4, 6]), st.integers(1, 4), st.integers(2, 5))
NORMALISED = networks(norms=["batch"])


def batch_norm_case(shape: tuple[int, ...], seed: int) -> tuple[Params, State, Tensor]:
    """Random affine parameters, statistics and input of a layer."""
    c = shape[1]
    params = {"weight": normal(c, seed=seed), "bias": normal(c, seed=seed + 1)}
    statistics = {
        "running_mean": normal(c, seed=seed + 2),
        "running_var": 0.1 + normal(c, seed=seed + 3) ** 2,
    }
    state = {**statistics, "num_batches_tracked": torch.tensor(seed % 7)}
    return params, state, 1.5 + normal(*shape, seed=seed + 4, scale=3.0)


def plain(shape: tuple[int, ...]) -> Params:
    """Affine parameters that do nothing."""
    return {"weight": torch.ones(shape[1]).double(), "bias": torch.zeros(shape[1]).double()}


# --------------------------------------------------------------------------- BatchNorm, training


@prop(tolerance="fp64 1e-12", why=ROUNDING, shape=SHAPES, seed=SEEDS)
def training_normalises_each_channel(shape: tuple[int, ...], seed: int) -> None:
    """Normalised channels have mean 0 and (biased) variance v / (v + eps)."""
    _, state, x = batch_norm_case(shape, seed)
    y, _ = layers.batch_norm(plain(shape), state, x, train=True)
    variance = x.var((0, 2, 3), correction=0)
    assert_trees_near(y.mean((0, 2, 3)) + 1, torch.ones(shape[1]), 1e-12)
    assert_trees_near(y.var((0, 2, 3), correction=0), variance / (variance + NORM_EPS), 1e-12)


@prop(tolerance="fp64 1e-12", why=ROUNDING, shape=SHAPES, seed=SEEDS)
def running_statistics_move_by_a_tenth(shape: tuple[int, ...], seed: int) -> None:
    """Training moves the running mean and variance by 0.1 towards the batch's, the variance unbiased."""
    params, state, x = batch_norm_case(shape, seed)
    _, after = layers.batch_norm(params, state, x, train=True)
    assert_trees_near(after["running_mean"], 0.9 * state["running_mean"] + 0.1 * x.mean((0, 2, 3)), 1e-12)
    assert_trees_near(
        after["running_var"], 0.9 * state["running_var"] + 0.1 * x.var((0, 2, 3), correction=1), 1e-12
    )
    assert after["num_batches_tracked"] == state["num_batches_tracked"] + 1


@prop(tolerance="fp64 1e-12", why=ROUNDING, shape=SHAPES, seed=SEEDS, copies=st.integers(2, 4))
def a_repeated_batch_is_normalised_alike(shape: tuple[int, ...], seed: int, copies: int) -> None:
    """k copies of a batch are normalised as one is; what moves running_var goes from n/(n-1) to kn/(kn-1)."""
    params, state, x = batch_norm_case(shape, seed)
    once, after_one = layers.batch_norm(params, state, x, train=True)
    often, after_many = layers.batch_norm(params, state, x.repeat(copies, 1, 1, 1), train=True)
    assert_trees_near(often, once.repeat(copies, 1, 1, 1), 1e-12)
    assert_trees_near(after_many["running_mean"], after_one["running_mean"], 1e-12)
    n = shape[0] * shape[2] * shape[3]
    ratio = (copies * n / (copies * n - 1)) / (n / (n - 1))
    moved = after_one["running_var"] - 0.9 * state["running_var"]
    assert_trees_near(after_many["running_var"] - 0.9 * state["running_var"], moved * ratio, 1e-12)


@prop(tolerance="fp64 1e-11", why="the shift costs digits of x", shape=SHAPES, seed=SEEDS)
def training_does_not_see_a_shift_of_a_channel(shape: tuple[int, ...], seed: int) -> None:
    """A constant added to a channel vanishes from the output and arrives in the running mean."""
    params, state, x = batch_norm_case(shape, seed)
    shift = normal(shape[1], seed=seed + 5, scale=10.0)
    y, after = layers.batch_norm(params, state, x, train=True)
    shifted, after_shift = layers.batch_norm(params, state, x + shift[:, None, None], train=True)
    assert_trees_near(shifted, y, 1e-11)
    assert_trees_near(after_shift["running_mean"], after["running_mean"] + 0.1 * shift, 1e-11)
    assert_trees_near(after_shift["running_var"], after["running_var"], 1e-11)


@prop(tolerance="bitwise", why="a copy is a copy", network=NORMALISED, batch=batches())
def only_training_counts_batches(network: Network, batch: Batch) -> None:
    """Training adds 1 to every batch counter and moves every statistic; evaluation returns each as it was."""
    model, params, state = network
    _, kept = model.apply(params, state, batch.x, train=False)
    assert_trees_equal(kept, state)
    _, after = model.apply(params, state, batch.x, train=True)
    before, moved = tree.flatten(state), tree.flatten(after)
    assert moved.keys() == before.keys()
    for path, leaf in moved.items():
        if path.endswith("num_batches_tracked"):
            assert leaf == before[path] + 1, path
        else:
            assert (leaf != before[path]).all(), path


# --------------------------------------------------------------------------- BatchNorm, evaluation


@prop(
    tolerance="fp64 1e-10",
    why=ROUNDING + ", through a whole network",
    network=networks(
        norms=["batch"], blocks=["basic", "bottleneck"], weight_standardization=False, **AS_PUBLISHED
    ),
    batch=batches(),
)
def statistics_fold_into_convolutions(network: Network, batch: Batch) -> None:
    """In evaluation, a BatchNorm's statistics and weight can move into the convolution before it."""
    model, params, state = network
    flat, statistics = tree.flatten(params), tree.flatten(state)
    for path in [path.removesuffix(".running_var") for path in statistics if path.endswith("running_var")]:
        # "bn2" follows "conv2", "downsample.1" follows "downsample.0"
        conv = path[:-1] + "0" if path.endswith("downsample.1") else path.replace("bn", "conv")
        deviation = (statistics[f"{path}.running_var"] + NORM_EPS).sqrt()
        scale = flat[f"{path}.weight"] / deviation
        flat[f"{conv}.weight"] = flat[f"{conv}.weight"] * scale[:, None, None, None]
        flat[f"{path}.bias"] = flat[f"{path}.bias"] - statistics[f"{path}.running_mean"] * scale
        flat[f"{path}.weight"] = torch.ones_like(scale)
        statistics[f"{path}.running_mean"] = torch.zeros_like(scale)
        statistics[f"{path}.running_var"] = torch.ones_like(scale) - NORM_EPS
    folded, _ = model.apply(tree.unflatten(flat), tree.unflatten(statistics), batch.x, train=False)
    assert_trees_near(folded, model.apply(params, state, batch.x, train=False)[0], 1e-10)


@prop(tolerance="fp64 1e-12", why=ROUNDING, shape=SHAPES, seed=SEEDS)
def the_batchs_own_statistics_make_evaluation_training(shape: tuple[int, ...], seed: int) -> None:
    """Evaluation with a batch's mean and biased variance as running statistics is training on that batch."""
    params, state, x = batch_norm_case(shape, seed)
    own = {"running_mean": x.mean((0, 2, 3)), "running_var": x.var((0, 2, 3), correction=0)}
    evaluated, _ = layers.batch_norm(params, {**state, **own}, x, train=False)
    assert_trees_near(evaluated, layers.batch_norm(params, state, x, train=True)[0], 1e-12)


# --------------------------------------------------------------------------- GroupNorm


def group_norm_case(shape: tuple[int, ...], seed: int) -> tuple[GroupNorm, Params, Tensor]:
    params, _, x = batch_norm_case(shape, seed)
    return GroupNorm(shape[1], [1, 2][seed % 2]), params, x


@prop(
    tolerance="fp64 1e-11",
    why="eps breaks the invariance by a factor with a formula",
    shape=SHAPES,
    seed=SEEDS,
    scale=st.floats(0.01, 100),
)
def group_norm_hardly_sees_the_scale(shape: tuple[int, ...], seed: int, scale: float) -> None:
    """Scaling the input by s scales a group's output by sqrt((v + eps) / (v + eps / s^2)), nearly 1."""
    spec, _, x = group_norm_case(shape, seed)
    n, c = shape[:2]
    y = layers.group_norm(spec, plain(shape), x)
    scaled = layers.group_norm(spec, plain(shape), scale * x)
    variance = x.reshape(n, spec.groups, -1).var(2, correction=0)
    factor = ((variance + NORM_EPS) / (variance + NORM_EPS / scale**2)).sqrt()
    factor = factor.repeat_interleave(c // spec.groups, 1)[:, :, None, None]
    assert_trees_near(scaled, y * factor, 1e-11)


@prop(tolerance="fp64 1e-12", why=ROUNDING, shape=SHAPES, seed=SEEDS)
def groups_of_one_channel_are_batches_of_one_sample(shape: tuple[int, ...], seed: int) -> None:
    """GroupNorm with a group for each channel is BatchNorm of each sample by itself."""
    params, state, x = batch_norm_case(shape, seed)
    alone = [layers.batch_norm(params, state, sample, train=True)[0] for sample in x.split(1)]
    assert_trees_near(layers.group_norm(GroupNorm(shape[1], shape[1]), params, x), torch.cat(alone), 1e-12)


# --------------------------------------------------------------------------- weight standardisation

FILTERS = st.tuples(st.integers(1, 5), st.integers(1, 4), st.just(3), st.just(3))


@prop(tolerance="fp64 1e-12", why=ROUNDING, shape=FILTERS, seed=SEEDS)
def standardised_filters_have_mean_0_and_variance_1(shape: tuple[int, ...], seed: int) -> None:
    """Every standardised filter has mean 0 and variance v / (v + 1e-10)."""
    weight = 2.0 + normal(*shape, seed=seed)
    got, variance = layers.standardize(weight), weight.var((1, 2, 3), correction=0)
    assert_trees_near(got.mean((1, 2, 3)) + 1, torch.ones(shape[0]), 1e-12)
    assert_trees_near(got.var((1, 2, 3), correction=0), variance / (variance + 1e-10), 1e-12)


@prop(
    tolerance="fp64 1e-6",
    why="1e-10 beside the variance of a filter, which may have four weights; through a whole network",
    network=networks(norms=["group", "batch"], weight_standardization=True),
    batch=batches(),
    seed=SEEDS,
)
def standardised_networks_see_neither_shift_nor_scale(network: Network, batch: Batch, seed: int) -> None:
    """With weight standardisation, `a * filter + b` with positive a is the same filter."""
    model, params, state = network
    source = generator(seed)

    def change(leaf: Tensor) -> Tensor:
        if leaf.ndim != 4:
            return leaf
        a, b = (torch.rand(len(leaf), 1, 1, 1, generator=source, dtype=torch.float64) for _ in range(2))
        return (1 + a) * leaf + b

    logits, _ = model.apply(tree.map(change, params), state, batch.x, train=False)
    assert_trees_near(logits, model.apply(params, state, batch.x, train=False)[0], 1e-6)
