"""Per-sample quantities against each other, and against the batch gradient, on random data in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import resnet_func as rf
from parity.properties.cases import batches, networks
from parity.properties.table import needs, prop
from resnet_func import tree
from resnet_func.testing import Batch, Network, assert_trees_near
from resnet_func.types import Model, Params, State

ROUNDING = "the same sums in another order, in float64"
NETWORKS, BATCHES = networks(), batches(samples=st.integers(2, 3))


def bounded_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Neither flat nor huge where a network without norms has large logits."""
    return (logits - torch.eye(logits.shape[1], dtype=logits.dtype)[y]).square().log1p().sum(1)


def of(transform: Any, network: tuple[Model, Params, State], x: Tensor, y: Tensor, **options: Any) -> Any:
    """A transform of `rf.per_sample`, in evaluation; it is these properties that are to find its bugs."""
    model, params, state = network
    return transform(model, bounded_loss, train=False, check=False, **options)(params, state, x, y)


grads = partial(of, rf.per_sample.grads)


def flat_grads(network: Network, batch: Batch) -> Tensor:
    """Per-sample gradients as the rows of one matrix."""
    return torch.cat([leaf.flatten(1) for leaf in tree.leaves(grads(network, *batch))], 1)


@prop(tolerance="fp64 1e-10", why=ROUNDING, network=NETWORKS, batch=BATCHES)
def per_sample_gradients_sum_to_the_gradient(network: Network, batch: Batch) -> None:
    """`per_sample.grads`, summed over samples, is the gradient of the summed loss."""
    model, params, state = network

    def total(params: Params) -> Tensor:
        return bounded_loss(model.apply(params, state, batch.x, train=False)[0], batch.y).sum()

    summed = tree.map(lambda g: g.sum(0), grads(network, *batch))
    assert_trees_near(summed, torch.func.grad(total)(params), 1e-10)


@prop(tolerance="fp64 1e-10", why=ROUNDING, network=NETWORKS, batch=BATCHES)
def a_gradient_does_not_depend_on_its_batch(network: Network, batch: Batch) -> None:
    """A sample's gradient is the one it has in a batch of its own."""
    alone = [grads(network, x, y) for x, y in zip(batch.x.split(1), batch.y.split(1), strict=True)]
    assert_trees_near(grads(network, *batch), tree.map(lambda *rows: torch.cat(rows), *alone), 1e-10)


@prop(tolerance="fp64 1e-10", why=ROUNDING, network=NETWORKS, batch=BATCHES)
def norms_are_norms_of_gradients(network: Network, batch: Batch) -> None:
    """`per_sample.norms` are the norms of `per_sample.grads`, and those of the layers' norms."""
    norms = of(rf.per_sample.norms, network, *batch)
    needs((norms > 0).all(), "gradients")
    assert_trees_near(norms, flat_grads(network, batch).norm(dim=1), 1e-10)
    by_layer = of(rf.per_sample.layer_norms, network, *batch)
    assert_trees_near(norms, torch.stack(list(by_layer.values())).norm(dim=0), 1e-10)


@prop(tolerance="fp64 1e-10", why=ROUNDING, network=NETWORKS, batch=BATCHES, share=st.floats(0.1, 2))
def clipped_sums_clip_each_gradient(network: Network, batch: Batch, share: float) -> None:
    """`per_sample.clipped_sum` is the sum of `g min(1, C / |g|)`."""
    rows = flat_grads(network, batch)
    max_norm = share * rows.norm(dim=1).median().item()
    total, norms = of(rf.per_sample.clipped_sum, network, *batch, max_norm=max_norm)
    factors = (max_norm / rows.norm(dim=1)).clamp(max=1)
    assert_trees_near(norms, rows.norm(dim=1), 1e-10)
    assert_trees_near(torch.cat([leaf.flatten() for leaf in tree.leaves(total)]), factors @ rows, 1e-10)


@prop(tolerance="fp64 1e-10", why=ROUNDING, network=NETWORKS, one=BATCHES, size=st.integers(1, 4))
def gram_matrices_are_products_of_gradients(network: Network, one: Batch, size: int) -> None:
    """`per_sample.gram` holds the products of every two samples' gradients, of two batches too."""
    model, params, state = network
    gram = rf.per_sample.gram(model, bounded_loss, train=False, check=False)
    rows = flat_grads(network, one)
    assert_trees_near(gram(params, state, tuple(one), tuple(one)), rows @ rows.T, 1e-10)
    other = (one.x[:1].flip(3).repeat(size, 1, 1, 1), one.y[:1].repeat(size))
    products = rows @ flat_grads(network, Batch(*other)).T
    assert_trees_near(gram(params, state, tuple(one), other), products, 1e-10)


@prop(tolerance="fp64 1e-10", why=ROUNDING, network=NETWORKS, batch=BATCHES)
def moments_are_means_over_gradients(network: Network, batch: Batch) -> None:
    """`per_sample.moments` are the mean of the gradients and of their squares."""
    moments, each = of(rf.per_sample.moments, network, *batch), grads(network, *batch)
    assert_trees_near(moments.mean, tree.map(lambda g: g.mean(0), each), 1e-10)
    assert_trees_near(moments.second_moment, tree.map(lambda g: g.square().mean(0), each), 1e-10)


@prop(
    tolerance="fp64 1e-10",
    why=ROUNDING,
    network=NETWORKS,
    batch=BATCHES,
    projection=st.sampled_from(["factorized", "dense"]),
)
def sketches_do_not_depend_on_the_batch(network: Network, batch: Batch, projection: str) -> None:
    """A sample's sketch is the one it has in a batch of its own."""
    sketch = partial(of, rf.per_sample.sketch, network, dim=16, projection=projection)
    alone = [sketch(x, y) for x, y in zip(batch.x.split(1), batch.y.split(1), strict=True)]
    assert_trees_near(sketch(*batch), torch.cat(alone), 1e-10)


@prop(tolerance="fp64 1e-10", why=ROUNDING, network=NETWORKS, batch=batches(samples=st.sampled_from([2, 4])))
def gradients_of_views_are_averaged(network: Network, batch: Batch) -> None:
    """Images `[N, views, ...]` give the mean of the views' gradients."""
    views = batch.x.unflatten(0, (-1, 2))
    labels = batch.y[::2]
    each = [grads(network, views[:, i], labels) for i in range(2)]
    assert_trees_near(grads(network, views, labels), tree.map(lambda a, b: (a + b) / 2, *each), 1e-10)


@prop(tolerance="fp64 1e-10", why=ROUNDING, network=NETWORKS, batch=BATCHES)
def frozen_leaves_change_no_other_gradient(network: Network, batch: Batch) -> None:
    """`trainable=` leaves out the frozen leaves' gradients, and changes no other."""
    trainable = lambda path: not path.startswith("layer1")  # noqa: E731
    some = grads(network, *batch, trainable=trainable)
    every = tree.flatten(grads(network, *batch))
    assert_trees_near(
        some, tree.unflatten({path: leaf for path, leaf in every.items() if trainable(path)}), 1e-10
    )
