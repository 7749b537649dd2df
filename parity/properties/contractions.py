"""Per-sample quantities by each way there is, in parts, and of broken samples; and the refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import resnet_func as rf
from parity.properties.cases import batches, networks
from parity.properties.comparisons import refusal
from parity.properties.per_sample import grads, of
from parity.properties.table import needs, prop
from resnet_func import tree
from resnet_func.losses import cross_entropy
from resnet_func.per_sample.quantities.quantity import by_layer
from resnet_func.testing import Batch, Network, assert_trees_near
from resnet_func.types import Params

ROUNDING = "the same sums in another order, in float64"
GROUPED = networks(blocks=["bottleneck"], norms=["group", "none"], groups=2, weight_standardization=False)
UNCOUPLED, BATCHES = networks(norms=["group", "none"]), batches(samples=st.integers(3, 4))


@prop(tolerance="fp64 1e-10", why=ROUNDING, network=GROUPED, batch=batches(samples=st.integers(2, 3)))
def grouped_convolutions_have_the_gradients_of_a_loop(network: Network, batch: Batch) -> None:
    """With grouped convolutions too, contraction gives what a loop over samples gives."""
    assert_trees_near(grads(network, *batch, method="contract"), grads(network, *batch, method="loop"), 1e-10)


@prop(
    tolerance="fp64 1e-8",
    why="a ghost norm is a sum in which larger products cancel",
    network=GROUPED,
    batch=batches(samples=st.just(4)),
)
def ghost_norms_are_norms_of_gradients(network: Network, batch: Batch) -> None:
    """With grouped convolutions, and with several views, each layer's norms are the same by either way."""
    for views in (1, 2):
        x, y = batch.x.unflatten(0, (-1, views)), batch.y[::views]
        want = layer_norms(grads(network, x, y, method="loop"))
        plan = rf.per_sample.plan(network.model, x.shape, "norms")
        for way in ("ghost", "materialize"):
            forced = replace(plan, entries=tuple(replace(entry, way=way) for entry in plan.entries))
            assert_trees_near(of(rf.per_sample.layer_norms, network, x, y, method=forced), want, 1e-8)


def layer_norms(each: Params) -> dict[str, Tensor]:
    """The norms `[N]` of each layer's gradients, from per-sample gradients."""
    flat = tree.flatten(each)
    return {
        layer: torch.cat([flat[path].flatten(1) for path in paths], 1).norm(dim=1)
        for layer, paths in by_layer(flat).items()
    }


@prop(tolerance="fp64 1e-10", why=ROUNDING, network=UNCOUPLED, batch=BATCHES, share=st.floats(0.1, 1))
def clipping_by_layer_keeps_the_bound(network: Network, batch: Batch, share: float) -> None:
    """`clipping="per_layer"` clips each of L layers to `C / sqrt(L)`, so that no sample's share exceeds C."""
    each = tree.flatten(grads(network, *batch))
    norms = layer_norms(each)
    needs(all((norm > 0).any() for norm in norms.values()), "gradients in every layer")
    bound = share * torch.stack(list(norms.values())).norm(dim=0).median().item()
    total, _ = of(rf.per_sample.clipped_sum, network, *batch, max_norm=bound, clipping="per_layer")
    want = {}
    for layer, paths in by_layer(each).items():
        factors = (bound / len(norms) ** 0.5 / norms[layer]).nan_to_num(1.0).clamp(max=1)
        want |= {path: torch.einsum("n,n...->...", factors, each[path]) for path in paths}
    assert_trees_near(total, tree.unflatten({path: want[path] for path in each}), 1e-10)


@prop(
    tolerance="fp64 1e-10",
    why=ROUNDING,
    network=UNCOUPLED,
    batch=BATCHES,
    value=st.sampled_from([float("nan"), float("inf")]),
)
def a_sample_that_is_not_finite_harms_no_other(network: Network, batch: Batch, value: float) -> None:
    """With `nonfinite="zero"`, a clipped sum over a batch with a broken image is that of the others."""
    broken = batch.x.clone()
    broken[0, 0, 4, 4] = value
    clip = {"max_norm": 1.0, "nonfinite": "zero"}
    total, norms = of(rf.per_sample.clipped_sum, network, broken, batch.y, **clip)
    needs(not norms[0].isfinite(), "a norm that is not finite")
    rest, others = of(rf.per_sample.clipped_sum, network, batch.x[1:], batch.y[1:], **clip)
    assert_trees_near((total, norms[1:]), (rest, others), 1e-10)


@prop(
    tolerance="fp64 1e-10",
    why=ROUNDING,
    network=UNCOUPLED,
    batch=BATCHES,
    size=st.integers(1, 2),
)
def microbatches_change_no_clipped_sum_and_no_moment(network: Network, batch: Batch, size: int) -> None:
    """`microbatch=` changes neither clipped sums and norms, nor moments."""
    for transform, options in ((rf.per_sample.clipped_sum, {"max_norm": 1.0}), (rf.per_sample.moments, {})):
        parts = of(transform, network, *batch, microbatch=size, **options)
        whole = of(transform, network, *batch, **options)
        assert_trees_near(_without_noise_scales(parts), _without_noise_scales(whole), 1e-10)


def _without_noise_scales(answer: Any) -> Any:
    """Those are quotients of differences, of no certain digit."""
    return (answer.mean, answer.second_moment) if isinstance(answer, rf.per_sample.Moments) else answer


TRANSFORMS = {
    "grads": rf.per_sample.grads,
    "norms": rf.per_sample.norms,
    "moments": rf.per_sample.moments,
    "sketch": rf.per_sample.sketch,
}


@prop(
    tolerance="exact",
    why="an error",
    network=networks(norms=["batch"]),
    batch=batches(samples=st.just(2)),
    name=st.sampled_from(list(TRANSFORMS)),
    method=st.sampled_from(["contract", "vmap", "loop"]),
    train=st.sampled_from([None, True]),
)
def batch_statistics_have_no_per_sample_gradient(
    network: Network, batch: Batch, name: str, method: Any, train: bool | None
) -> None:
    """Per-sample transforms refuse BatchNorm in training mode: they do not turn it into instance norm."""
    model, params, state = network
    transform = TRANSFORMS[name]
    options: Any = {"method": method, "train": train, "check": False}
    said = refusal(lambda: transform(model, cross_entropy, **options)(params, state, *batch))
    case = f"{name} by {method} with train={train}"
    assert "BatchNorm in training mode couples the samples" in said, f"{case}: {said or 'no error'}"
