"""Derivatives: against their definitions, against each other, and what homogeneity says of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vjp

import resnet_func as rf
from parity.properties.cases import SEEDS, batches, networks, normal, normal_like
from parity.properties.table import needs, prop
from resnet_func import tree
from resnet_func.losses import cross_entropy
from resnet_func.testing import Batch, Network, assert_trees_equal, assert_trees_near, generator
from resnet_func.types import Params

ROUNDING = "float64 rounding through a whole network"
NETWORKS, BATCHES, TRAIN = networks(), batches(), st.booleans()


def logits_of(network: Network, x: Tensor, train: bool):
    """Logits as a function of the parameters."""
    return lambda params: network.model.apply(params, network.state, x, train=train)[0]


def mean_loss(network: Network, batch: Batch, train: bool):
    """The mean squared error, which is flat nowhere, as a function of the parameters."""
    logits, targets = logits_of(network, batch.x, train), F.one_hot(batch.y, 3).double()
    return lambda params: rf.losses.squared_error(logits(params), targets).mean()


def agree(a: Tensor, b: Tensor, scale: Tensor, rtol: float) -> None:
    """Two numbers, as parts of sums of a known size."""
    assert (a - b).abs() <= rtol * scale, f"{a.item()!r} against {b.item()!r} in sums of {scale.item():.3g}"


# --------------------------------------------------------------------------- definitions


@prop(
    tolerance="fp64 1e-6",
    why="central differences at the best of six steps: near the kink of some ReLU only short ones do",
    network=NETWORKS,
    batch=BATCHES,
    seed=SEEDS,
    train=TRAIN,
)
def gradients_are_slopes(network: Network, batch: Batch, seed: int, train: bool) -> None:
    """The gradient's product with a direction is the slope of the mean squared error along it."""
    loss, direction = mean_loss(network, batch, train), normal_like(network.params, seed)
    slopes = grad(loss)(network.params)
    needs(tree.norm(slopes) > 1e-3, "a slope")

    def difference(h: float) -> Tensor:
        ahead, behind = (tree.map(lambda p, d: p + s * d, network.params, direction) for s in (h, -h))  # noqa: B023
        return (loss(ahead) - loss(behind)) / (2 * h)

    steps = [10.0**-k for k in range(5, 11)]
    error = torch.stack([difference(h) - tree.dot(slopes, direction) for h in steps]).abs().min()
    agree(error, torch.zeros(()), tree.norm(slopes) * tree.norm(direction), 1e-6)


@prop(tolerance="fp64 1e-9", why=ROUNDING, network=NETWORKS, batch=BATCHES, seed=SEEDS, train=TRAIN)
def forward_and_reverse_mode_are_adjoint(network: Network, batch: Batch, seed: int, train: bool) -> None:
    """`<u, J v> = <J' u, v>` for the Jacobian J of the logits."""
    logits, v = logits_of(network, batch.x, train), normal_like(network.params, seed)
    u = normal(*logits(network.params).shape, seed=seed + 1)
    forward = jvp(logits, (network.params,), (v,))[1]
    (back,) = vjp(logits, network.params)[1](u)
    agree((u * forward).sum(), tree.dot(back, v), tree.norm(back) * tree.norm(v), 1e-9)


@prop(tolerance="fp64 1e-9", why=ROUNDING, network=NETWORKS, batch=BATCHES, seed=SEEDS, train=TRAIN)
def forward_mode_is_linear(network: Network, batch: Batch, seed: int, train: bool) -> None:
    """`J (2u - 3v) = 2 J u - 3 J v`."""
    logits = logits_of(network, batch.x, train)
    u, v = (normal_like(network.params, seed + i) for i in range(2))
    mixed = tree.map(lambda a, b: 2 * a - 3 * b, u, v)
    along_u, along_v, along_mixed = (jvp(logits, (network.params,), (d,))[1] for d in (u, v, mixed))
    assert_trees_near(along_mixed, 2 * along_u - 3 * along_v, 1e-9)


@prop(tolerance="fp64 1e-8", why=ROUNDING + ", twice", network=NETWORKS, batch=BATCHES, seed=SEEDS)
def the_hessian_is_symmetric(network: Network, batch: Batch, seed: int) -> None:
    """`<u, H v> = <H u, v>` for the Hessian H of the mean loss, by forward over reverse mode."""
    slopes = grad(mean_loss(network, batch, train=False))
    u, v = (normal_like(network.params, seed + i) for i in range(2))
    h_u, h_v = (jvp(slopes, (network.params,), (d,))[1] for d in (u, v))
    agree(tree.dot(u, h_v), tree.dot(h_u, v), tree.norm(u) * tree.norm(h_v), 1e-8)


# --------------------------------------------------------------------------- samples


@prop(tolerance="fp64 1e-10", why=ROUNDING, network=NETWORKS, batch=BATCHES)
def the_gradient_of_a_sum_is_the_sum_of_gradients(network: Network, batch: Batch) -> None:
    """In evaluation, the gradient of the summed loss is the sum over samples of each one's gradient."""

    def slopes(x: Tensor, y: Tensor) -> Params:
        return grad(lambda params: len(x) * mean_loss(network, Batch(x, y), False)(params))(network.params)

    total = tree.map(torch.zeros_like, network.params)
    for x, y in zip(batch.x.split(1), batch.y.split(1), strict=True):
        total = tree.map(torch.add, total, slopes(x, y))
    assert_trees_near(total, slopes(batch.x, batch.y), 1e-10)


@prop(tolerance="bitwise", why="nothing of other samples enters", network=NETWORKS, batch=BATCHES)
def a_samples_logits_depend_on_its_image_alone(network: Network, batch: Batch) -> None:
    """In evaluation, the gradient of one sample's logits with respect to all other images is 0."""
    model, params, state = network
    slopes = grad(lambda x: model.apply(params, state, x, train=False)[0][0].square().sum())(batch.x)
    needs(slopes[0].any(), "logits that depend on the image")
    assert_trees_equal(slopes[1:], torch.zeros_like(slopes[1:]))


# --------------------------------------------------------------------------- homogeneity


@prop(
    tolerance="fp64 1e-9",
    why=ROUNDING,
    network=networks(norms=["none"], weight_standardization=False),
    batch=batches(),
)
def eulers_theorem(network: Network, batch: Batch) -> None:
    """Without norms, `<d sum(logits) / dx, x>` is the sum of the logits less their biases."""
    model, params, state = network

    def total(x: Tensor) -> Tensor:
        return model.apply(params, state, x, train=False)[0].sum()

    slopes = grad(total)(batch.x)
    linear = total(batch.x) - len(batch.x) * params["fc"]["bias"].sum()
    agree((slopes * batch.x).sum(), linear, slopes.norm() * batch.x.norm(), 1e-9)


@prop(
    tolerance="fp64 1e-6",
    why="1e-10 beside the variance of a filter, which may have four weights",
    network=networks(norms=["group", "batch"], weight_standardization=True),
    batch=batches(),
    train=TRAIN,
)
def standardised_filters_are_not_pushed_to_shift_or_grow(network: Network, batch: Batch, train: bool) -> None:
    """The gradient of each standardised filter has sum 0, and product 0 with the filter."""
    slopes = tree.flatten(grad(mean_loss(network, batch, train))(network.params))
    for path, weight in tree.flatten(network.params).items():
        if weight.ndim == 4:
            filters, pushed = weight.flatten(1), slopes[path].flatten(1)
            scale, zero = pushed.norm() * filters.norm(), torch.zeros(())
            agree(pushed.sum(1).abs().max(), zero, scale, 1e-6)
            agree((pushed * filters).sum(1).abs().max(), zero, scale, 1e-6)


# --------------------------------------------------------------------------- losses


@prop(tolerance="fp64 1e-13", why="the formula, in float64", seed=SEEDS, scale=st.floats(0.1, 30))
def the_cross_entropys_gradient_is_softmax_less_target(seed: int, scale: float) -> None:
    """The gradient of each sample's cross-entropy is `softmax(logits) - one_hot(target)`."""
    logits, y = normal(6, 5, seed=seed, scale=scale), torch.randint(5, (6,), generator=generator(seed))
    slopes = grad(lambda z: cross_entropy(z, y).sum())(logits)
    assert_trees_near(slopes, logits.softmax(1) - F.one_hot(y, 5), 1e-13)


@prop(tolerance="fp64 1e-13", why="the formula, in float64", seed=SEEDS, smoothing=st.floats(0, 0.99))
def smoothing_is_a_mixture_of_targets(seed: int, smoothing: float) -> None:
    """A smoothed cross-entropy's gradient is `softmax` less target and uniform distribution, mixed."""
    logits, y = normal(6, 5, seed=seed, scale=3), torch.randint(5, (6,), generator=generator(seed))
    slopes = grad(lambda z: rf.losses.smoothed_cross_entropy(smoothing)(z, y).sum())(logits)
    assert_trees_near(
        slopes, logits.softmax(1) - (1 - smoothing) * F.one_hot(y, 5).double() - smoothing / 5, 1e-13
    )
