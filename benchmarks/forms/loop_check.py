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
    `narrow` holds the same of the loop under bf16 autocast, where that was asked for.
    """

    norms: Tensor
    mean: list[Tensor]
    clipped: list[Tensor]
    distance: Tensor | None
    narrow: Expected | None = None


FEW = 8  # samples that show how far rounding leads


def allowed_error(case: Case) -> float:
    """The relative error of gradients or norms that rounding in float32 explains, measured.

    Some samples' gradients, with noise of that size on every layer: a ReLU whose input rounds across zero
    moves a gradient.
    """
    few = case._replace(x=case.x[:FEW], y=case.y[:FEW])
    size = rounding_noise(case.params, torch.float32)
    grads = rf.per_sample.grads(case.model, cross_entropy, method="loop", train=False)
    exact = tree.leaves(grads(few.params, few.state, few.x, few.y))
    length = distance(exact, [torch.zeros_like(leaf) for leaf in exact])
    found = size
    for seed in range(NOISE_DRAWS):
        with LayerNoise(size, seed):
            noisy = grads(few.params, few.state, few.x, few.y)
        found = max(found, float(distance(noisy, exact) / length))
    return found


def check(
    steps: dict[str, Callable[[], Any]], case: Case, allowed: float, *, narrow: bool = False
) -> dict[str, float]:
    """All variants of `benchmarks.per_sample` against the loop in fp32: the largest relative error of each.

    With `narrow`, for variants under bf16 autocast, the loop is in float64, and a variant may be `allowed`
    times as far from it as the loop under the same autocast is: as ordinary gradients are.

    Raises:
        Disagreement: a relative error is larger than `allowed`.
    """
    largest = {}
    results = {name: step() for name, step in steps.items()}
    expected = by_loop(case, results.get("grads", (None, None))[0], narrow=narrow)
    for name, (gradients, norms) in results.items():
        errors, limits = {}, dict.fromkeys(("gradients", "norms"), allowed)
        if gradients is not None:
            errors["gradients"] = _gradient_error(name, gradients, expected)
        if norms is not None:
            errors["norms"] = distance([norms], [expected.norms]) / expected.norms.norm()
        if expected.narrow is not None:
            ordinary = _errors_of_the_loop(name, expected, expected.narrow)
            limits = {what: allowed * float(error) for what, error in ordinary.items()}
        for what, error in errors.items():
            if not error <= limits[what]:  # NaN is not
                raise Disagreement(
                    f"{name} is wrong: relative error of its {what} {error:.2g}, allowed {limits[what]:.2g}; "
                    "nothing is timed"
                )
        largest[name] = max(map(float, errors.values()))
    return largest


def _errors_of_the_loop(name: str, expected: Expected, narrow: Expected) -> dict[str, Tensor]:
    """What `check` compares, of the loop under autocast."""
    by_sample = narrow.distance if narrow.distance is not None else torch.tensor(0.0)
    by_sample = by_sample / expected.norms.norm()
    summed = _gradient_error("clipped_sum", narrow.clipped, expected)
    mean = distance(narrow.mean, expected.mean) / expected.norms.mean()
    gradients = {"grads": by_sample, "plain": mean, "plain again": mean}.get(name, summed)
    return {
        "gradients": gradients,
        "norms": distance([narrow.norms], [expected.norms]) / expected.norms.norm(),
    }


def _gradient_error(name: str, gradients: Any, expected: Expected) -> Tensor:
    """Relative to the norms of the terms, for a sum: the sum itself may have cancelled."""
    if name == "grads":
        assert expected.distance is not None
        return expected.distance / expected.norms.norm()
    if name.startswith("clipped_sum") or name in PEERS:
        return distance(gradients, expected.clipped) / expected.norms.clamp(max=MAX_NORM).sum()
    return distance(gradients, expected.mean) / expected.norms.mean()


def by_loop(case: Case, each: Any, *, narrow: bool = False) -> Expected:
    """What is expected, and how far the per-sample gradients `each` (or None) are from it."""
    grads = rf.per_sample.grads(case.model, cross_entropy, method="loop", train=False)
    parts, narrow_parts = [], []
    for start in range(0, len(case.x), SLICE):
        here = slice(start, start + SLICE)
        params, state, x = case.params, case.state, case.x[here]
        if narrow:
            params, state, x = tree.map(_double, (params, state, x))
        leaves = tree.leaves(grads(params, state, x, case.y[here]))
        given = None if each is None else [leaf[here] for leaf in tree.leaves(each)]
        parts.append(_part(leaves, given, leaves))
        if narrow:
            with torch.autocast(x.device.type, torch.bfloat16):
                rounded = tree.leaves(grads(case.params, case.state, case.x[here], case.y[here]))
            narrow_parts.append(_part(rounded, rounded, leaves))
    total = _joined(parts)
    return total._replace(narrow=_joined(narrow_parts)) if narrow else total


def _double(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf


def _part(leaves: list[Tensor], each: list[Tensor] | None, want: list[Tensor]) -> Expected:
    """Of some samples' gradients; the mean is still a sum, and `each` is compared with what is wanted."""
    norms = torch.stack([vector_norm(leaf.flatten(1), dim=1, dtype=torch.float64) for leaf in leaves])
    norms = norms.norm(dim=0)
    clipped = partial(torch.einsum, "n,n...->...", (MAX_NORM / norms).clamp(max=1).to(leaves[0].dtype))
    return Expected(
        norms,
        [leaf.sum(0, dtype=torch.float64) for leaf in leaves],
        [clipped(leaf) for leaf in leaves],
        None if each is None else distance(each, want),
    )


def _joined(parts: list[Expected]) -> Expected:
    norms, sums, clipped, distances, _ = zip(*parts, strict=True)
    together = torch.cat(norms)
    return Expected(
        together,
        [torch.stack(leaves).sum(0) / len(together) for leaves in zip(*sums, strict=True)],
        [torch.stack(leaves).sum(0) for leaves in zip(*clipped, strict=True)],
        None if distances[0] is None else torch.stack(distances).norm(),
    )


def distance(got: Any, want: Sequence[Tensor]) -> Tensor:
    """Euclidean distance of the leaves of two trees, summed in float64."""
    pairs = zip(tree.leaves(got), want, strict=True)
    return torch.stack([vector_norm(a.to(b.device) - b, dtype=torch.float64) for a, b in pairs]).norm()
