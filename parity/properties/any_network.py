"""Per-sample quantities of networks that are wrapped, tie weights, derive them, or hide batch statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import resnet_func as rf
from parity.properties.cases import SEEDS, batches, networks, normal
from parity.properties.comparisons import refusal
from parity.properties.per_sample import bounded_loss, of
from parity.properties.table import prop
from resnet_func.testing import Batch, Network, assert_trees_near, generator
from resnet_func.types import Model, Params, State

ROUNDING = "the same sums in another order, in float64"
UNCOUPLED, BATCHES = networks(norms=["group", "none"]), batches(samples=st.just(3))
CLASSES = 3


@prop(tolerance="fp64 1e-10", why=ROUNDING, network=UNCOUPLED, batch=BATCHES)
def wrapped_networks_have_the_gradients_of_what_they_compute(network: Network, batch: Batch) -> None:
    """Averaged over mirror images, a network's per-sample gradients are those of the average."""
    model, params, state = network
    wrapped = (rf.train.average_flips(model), params, state)
    for transform in (rf.per_sample.grads, rf.per_sample.norms):
        assert_trees_near(
            of(transform, wrapped, *batch), of(transform, wrapped, *batch, method="loop"), 1e-10
        )


@prop(tolerance="fp64 1e-10", why=ROUNDING, seed=SEEDS, depth=st.integers(2, 3))
def norms_of_a_tied_weight_count_its_uses_together(seed: int, depth: int) -> None:
    """A weight that is used several times, and transposed, has the norms and gradients of their sum."""

    def apply(params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Tensor, State]:
        weight = params["weight"]
        for _ in range(depth):
            x = F.linear(torch.tanh(F.linear(x, weight)), weight.T)
        return x[:, :CLASSES], state

    network = (Model(None, _no_init, apply), {"weight": normal(4, 5, seed=seed)}, {})
    x, y = normal(3, 5, seed=seed + 1), torch.arange(3)
    for transform in (rf.per_sample.grads, rf.per_sample.norms):
        assert_trees_near(of(transform, network, x, y), of(transform, network, x, y, method="loop"), 1e-10)


@prop(
    tolerance="fp64 1e-10",
    why=ROUNDING,
    network=networks(norms=["group", "none"], weight_standardization=True),
    batch=BATCHES,
)
def derived_weights_have_the_gradients_of_a_loop(network: Network, batch: Batch) -> None:
    """Gradients of standardised weights are pulled back to the weights, per sample and summed."""
    for transform, options in ((rf.per_sample.grads, {}), (rf.per_sample.clipped_sum, {"max_norm": 0.1})):
        want = of(transform, network, *batch, method="loop", **options)
        assert_trees_near(of(transform, network, *batch, **options), want, 1e-10)


@prop(tolerance="exact", why="an error", seed=SEEDS, affine=st.booleans())
def hidden_batch_statistics_are_refused(seed: int, affine: bool) -> None:
    """A BatchNorm without running statistics has no state to be known by, and is refused all the same."""
    norm = nn.BatchNorm2d(2, affine=affine, track_running_stats=False)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.Flatten(), nn.Linear(18, CLASSES)).double()
    model, params, state = rf.from_module(module)
    params = rf.tree.map(
        lambda leaf: torch.randn(leaf.shape, generator=generator(seed), dtype=leaf.dtype), params
    )
    x, y = normal(3, 1, 5, 5, seed=seed + 1), torch.arange(3)
    norms: Any = rf.per_sample.norms(model, bounded_loss, train=False, check=False)
    said = refusal(lambda: norms(params, state, x, y))
    assert "statistics of the batch" in said, said or "no error"


def _no_init(*_: Any, **__: Any) -> Any:
    raise NotImplementedError
