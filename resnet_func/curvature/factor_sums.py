"""What K-FAC and EKFAC sum over a data set, leaf by leaf, as per-sample quantities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_func.curvature.kronecker import Block, KroneckerEstimate
from resnet_func.numerics import widen
from resnet_func.per_sample.capture import Captured
from resnet_func.per_sample.layers import contract, ghost
from resnet_func.per_sample.layers.contract import Way
from resnet_func.per_sample.layers.factors import (
    MAX_ELEMENTS,
    ConvFactors,
    Direct,
    LinearFactors,
    num_samples,
    sample_slices,
    samples,
    split_views,
)
from resnet_func.per_sample.layers.factors import Factors as Captures
from resnet_func.per_sample.quantities.quantity import Quantity

Approximation: TypeAlias = Literal["expand", "reduce"]
# Of a leaf without an input and a cotangent, the block is full up to this many entries, diagonal beyond.
MAX_BLOCK = 2048
# No Kronecker factor is larger; the leaf's block is diagonal then.
MAX_SIDE = 8192


class Sums(NamedTuple):
    """Both factors of a leaf summed over samples; `by_gradients`: each was made from whole gradients."""

    left: Tensor
    right: Tensor
    by_gradients: bool = False


class Totals(NamedTuple):
    """Sums by leaf, and the number of samples they are over."""

    leaves: dict[str, Any]
    samples: int


def factor_sums(approximation: Approximation) -> Quantity:
    """Both factors of every leaf, summed over samples."""

    return _summed(partial(_factor_sums, approximation), _add_sums)


def _add_sums(a: Sums, b: Sums) -> Sums:
    return Sums(a.left + b.left, a.right + b.right, a.by_gradients)


def squared_coordinates(estimate: KroneckerEstimate) -> Quantity:
    """The squared gradients in the eigenbasis of an estimate, summed over samples."""

    return _summed(partial(_squared_coordinates, estimate.blocks), torch.add)


def _summed(leaf: Callable[[str, Captures, Way], Any], add: Callable[[Any, Any], Any]) -> Quantity:
    return Quantity("kfac", leaf, _totals, partial(_join, add), accumulate=True, as_captured=True)


def _totals(answers: dict[str, Any], captured: Captured) -> Totals:
    return Totals(answers, captured.losses.shape[0])


def _join(add: Callable[[Any, Any], Any], parts: list[Totals]) -> Totals:
    total = parts[0]
    for part in parts[1:]:
        both = {path: add(value, part.leaves[path]) for path, value in total.leaves.items()}
        total = Totals(both, total.samples + part.samples)
    return total


# --------------------------------------------------------------------------- one leaf


def _factor_sums(approximation: Approximation, path: str, factors: Captures, way: Way) -> Sums:
    if isinstance(factors, LinearFactors):
        a, g = (widen(t).unsqueeze(2) for t in (factors.inputs, factors.cotangents))
        if _fits(a.shape[1], g.shape[1]):
            a, g = (_by_sample(t, factors.views) for t in (a, g))
            return _outer_products(a, g, approximation, groups=1)
    if isinstance(factors, ConvFactors) and len(factors.spec.kernel) == 2:
        out, *inputs = factors.spec.weight_shape
        if _fits(prod(inputs), out // factors.spec.groups):
            return _convolution_sums(factors, approximation)
    return _gradient_sums(factors)


def _fits(*sides: int) -> bool:
    return max(sides) <= MAX_SIDE


def _convolution_sums(factors: ConvFactors, approximation: Approximation) -> Sums:
    spec, n = factors.spec, num_samples(factors)
    patch_entries = (
        factors.views * prod(spec.weight_shape[1:]) * spec.groups * prod(factors.cotangents.shape[2:])
    )
    step = max(1, MAX_ELEMENTS // max(patch_entries, 1))
    total = None
    for start in range(0, max(n, 1), step):
        part = samples(factors, start, min(start + step, n))
        assert isinstance(part, ConvFactors)
        patches, g = _patches(part), widen(part.cotangents).flatten(2)
        rows, outputs = (_by_sample(t, factors.views) for t in (patches, g))
        found = _outer_products(rows, outputs, approximation, spec.groups)
        total = found if total is None else Sums(total.left + found.left, total.right + found.right)
    assert total is not None
    return total


def _patches(factors: ConvFactors) -> Tensor:
    """What each output pixel sees: `[views * N, c_in * kernel, T]`."""
    spec, inputs = factors.spec, widen(factors.inputs)
    if spec.is_pointwise:
        return ghost.subsample(spec, inputs)[1].flatten(2)
    return F.unfold(inputs, spec.kernel, spec.dilation, spec.padding, spec.stride)


def _by_sample(x: Tensor, views: int) -> Tensor:
    """`[views * N, C, T]` as `[N, C, views * T]`."""
    return x if views == 1 else split_views(x, views).permute(1, 2, 0, 3).flatten(2)


def _outer_products(a: Tensor, g: Tensor, approximation: Approximation, groups: int) -> Sums:
    """From inputs `[N, in, T]` and cotangents `[N, out, T]`, of which T positions share the weight."""
    positions = a.shape[2]
    if approximation == "reduce":
        a, g, positions = a.mean(2, keepdim=True), g.sum(2, keepdim=True), 1
    return Sums(_gram(g, groups), _gram(a, groups) / max(positions, 1))


def _gram(x: Tensor, groups: int) -> Tensor:
    """The sum of `x_nt x_nt'` over samples and positions of `[N, C, T]`, for each group of channels."""
    n, channels, positions = x.shape
    x = x.reshape(n, groups, channels // groups, positions)
    if positions >= channels // groups:  # what comes of a sample is small: nothing is copied
        return (x @ x.mT).sum(0)
    rows = x.permute(1, 2, 0, 3).reshape(groups, channels // groups, n * positions)
    return rows @ rows.mT


def _gradient_sums(factors: Captures) -> Sums:
    """Of leaves that are known by their per-sample gradients alone."""
    total = None
    for part in sample_slices(factors):
        found = _sums_of_gradients(widen(contract.grads(part)), small=isinstance(factors, Direct))
        total = (
            found
            if total is None
            else found._replace(left=total.left + found.left, right=total.right + found.right)
        )
    assert total is not None
    return total


def _sums_of_gradients(grads: Tensor, *, small: bool) -> Sums:
    """A full block, two factors, or a diagonal, by the shape of `[N, *shape]`."""
    n, shape = grads.shape[0], grads.shape[1:]
    count = grads.new_full((1, 1, 1), n)
    entries, last = prod(shape), prod(shape[1:])
    if (small and entries <= MAX_BLOCK) or (len(shape) == 1 and entries <= MAX_BLOCK):
        rows = grads.reshape(n, entries)
        return Sums((rows.T @ rows)[None], count)
    if len(shape) > 1 and _fits(shape[0], last):
        matrices = grads.reshape(n, shape[0], last)
        by_row, by_column = matrices.transpose(0, 1).flatten(1), matrices.flatten(0, 1)
        return Sums((by_row @ by_row.T)[None], (by_column.T @ by_column)[None], by_gradients=True)
    return Sums(grads.square().sum(0).reshape(entries, 1, 1), count)


def _squared_coordinates(blocks: dict[str, Block], path: str, factors: Captures, way: Way) -> Tensor:
    block = blocks[path]
    if isinstance(factors, LinearFactors) and factors.views == 1 and block.left.shape[0] == 1:
        a, g = widen(factors.inputs) @ block.right[0], widen(factors.cotangents) @ block.left[0]
        return (g.square().T @ a.square())[None]
    total = torch.zeros_like(block.eigenvalues)
    for part in sample_slices(factors):
        total = total + block.to_basis(contract.grads(part)).square().sum(0)
    return total
