"""Per-sample results against the loop over samples: what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

import resnet_func as rf
from benchmarks.forms.networks import Case
from benchmarks.forms.peers import PEERS
from benchmarks.forms.step import NOISE_DRAWS
from benchmarks.harness.measure import Disagreement
from parity.rounding import LayerNoise, rounding_noise
from resnet_func import tree
from resnet_func.losses import cross_entropy

MAX_NORM = 1.0
SLICE = 32  # samples at a time: the gradients of all can take gigabytes


class Expected(NamedTuple):
    """By the loop: norms `[N]`, and the leaves of the mean and of the clipped sum of the gradients.

    `distance` is how far the per-sample gradients in question are from the loop's; None if there are none.
    """

    norms: Tensor
    mean: list[Tensor]
    clipped: list[Tensor]
    distance: Tensor | None


FEW = 8  # samples that show how far rounding leads


def allowed(case: Case, dtype: str) -> float:
    """The relative error of gradients or norms that rounding in "fp32" or "bf16" explains, measured.

    Some samples' gradients, with noise of that size on every layer: a ReLU whose input rounds across zero
    moves a gradient.
    """
    few = case._replace(x=case.x[:FEW], y=case.y[:FEW])
    size = rounding_noise(case.params, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    grads = rf.per_sample.grads(case.model, cross_entropy, method="loop", train=False)
    exact = tree.leaves(grads(few.params, few.state, few.x, few.y))
    length = distance(exact, [torch.zeros_like(leaf) for leaf in exact])
    found = size
    for seed in range(NOISE_DRAWS):
        with LayerNoise(size, seed):
            noisy = grads(few.params, few.state, few.x, few.y)
        found = max(found, float(distance(noisy, exact) / length))
    return found


def check(steps: dict[str, Callable[[], Any]], case: Case, allowed: float) -> dict[str, float]:
    """All variants of `benchmarks.per_sample` against the loop in fp32: the largest relative error of each.

    Raises:
        Disagreement: a relative error is larger than `allowed`.
    """
    largest = {}
    results = {name: step() for name, step in steps.items()}
    expected = by_loop(case, results.get("grads", (None, None))[0])
    for name, (gradients, norms) in results.items():
        errors = {}
        if gradients is not None:
            errors["gradients"] = _gradient_error(name, gradients, expected)
        if norms is not None:
            errors["norms"] = distance([norms], [expected.norms]) / expected.norms.norm()
        for what, error in errors.items():
            if not error <= allowed:  # NaN is not
                raise Disagreement(
                    f"{name} is wrong: relative error of its {what} {error:.2g}, allowed {allowed:.2g}; "
                    "nothing is timed"
                )
        largest[name] = max(map(float, errors.values()))
    return largest


def _gradient_error(name: str, gradients: Any, expected: Expected) -> Tensor:
    """Relative to the norms of the terms, for a sum: the sum itself may have cancelled."""
    if name == "grads":
        assert expected.distance is not None
        return expected.distance / expected.norms.norm()
    if name.startswith("clipped_sum") or name in PEERS:
        return distance(gradients, expected.clipped) / expected.norms.clamp(max=MAX_NORM).sum()
    return distance(gradients, expected.mean) / expected.norms.mean()


def by_loop(case: Case, each: Any) -> Expected:
    """What is expected, and how far the per-sample gradients `each` (or None) are from it."""
    grads = rf.per_sample.grads(case.model, cross_entropy, method="loop", train=False)
    parts = []
    for start in range(0, len(case.x), SLICE):
        samples = slice(start, start + SLICE)
        leaves = tree.leaves(grads(case.params, case.state, case.x[samples], case.y[samples]))
        norms = torch.stack([vector_norm(leaf.flatten(1), dim=1, dtype=torch.float64) for leaf in leaves])
        norms = norms.norm(dim=0)
        clipped = partial(torch.einsum, "n,n...->...", (MAX_NORM / norms).clamp(max=1).to(case.x.dtype))
        here = None if each is None else [leaf[samples] for leaf in tree.leaves(each)]
        parts.append(
            Expected(
                norms,
                [leaf.sum(0, dtype=torch.float64) / len(case.x) for leaf in leaves],
                [clipped(leaf) for leaf in leaves],
                None if here is None else distance(here, leaves),
            )
        )
    norms, means, sums, distances = zip(*parts, strict=True)
    return Expected(
        torch.cat(norms),
        [torch.stack(leaves).sum(0) for leaves in zip(*means, strict=True)],
        [torch.stack(leaves).sum(0) for leaves in zip(*sums, strict=True)],
        None if each is None else torch.stack(distances).norm(),
    )


def distance(got: Any, want: Sequence[Tensor]) -> Tensor:
    """Euclidean distance of the leaves of two trees, summed in float64."""
    pairs = zip(tree.leaves(got), want, strict=True)
    return torch.stack([vector_norm(a.to(b.device) - b, dtype=torch.float64) for a, b in pairs]).norm()
