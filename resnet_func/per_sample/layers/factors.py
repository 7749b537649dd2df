"""Factors: what is known of a trainable leaf after one backward pass, and its parts by sample.

For a convolution or a linear layer they are the layer's input and the cotangent of its output; for small
leaves (biases, normalisation affine) the per-sample gradient itself.

Samples may come in several views (augmentation multiplicity, or a weight that is used several times alike).
The leading dimension of every factor is then `views * N`, views first, so that a sample's views fold into the
pixels it is summed over anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from resnet_func.per_sample.layers.ghost import ConvSpec
from resnet_func.per_sample.layers.rows import RowJacobian

# Where a gradient is needed only to be reduced, at most about this many entries exist at a time.
MAX_ELEMENTS = 2**25


class ConvFactors(NamedTuple):
    """A convolution's weight: input `[views * N, c_in, *pixels]`, cotangent `[views * N, c_out, *pixels]`.

    A linear layer over positions is a convolution whose kernel is one pixel; `weight` has the leaf's own
    shape.
    """

    spec: ConvSpec
    weight: Tensor
    inputs: Tensor
    cotangents: Tensor
    views: int


class LinearFactors(NamedTuple):
    """A linear layer's weight: input `[views * N, c_in]`, cotangent `[views * N, c_out]`."""

    weight: Tensor
    inputs: Tensor
    cotangents: Tensor
    views: int


class EmbeddingFactors(NamedTuple):
    """An embedding's weight: indices `[views * N, T]`, cotangent `[views * N, T, dim]`."""

    weight: Tensor
    inputs: Tensor
    cotangents: Tensor
    views: int


class CallFactors(NamedTuple):
    """The weight of any other call: `function(weight, *inputs)`, a tuple of tensors.

    All of `inputs`, of what it returns and of `cotangents` lead with `views * N`.
    """

    function: Callable[..., tuple[Tensor, ...]]
    weight: Tensor
    inputs: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    views: int


class Derived(NamedTuple):
    """A leaf that the network uses only through `derive(leaf)`: the factors of what derives from it.

    `jacobian` is the closed form of the derivation's Jacobian, where there is one; `formed` the per-sample
    gradients of what derives, where they are there already.
    """

    derive: Callable[[Tensor], Tensor]
    weight: Tensor
    factors: Any  # Factors; a recursive name is no NamedTuple's
    jacobian: RowJacobian | None = None
    formed: Tensor | None = None

    @property
    def is_small(self) -> bool:
        """Whether the leaf has fewer entries than what derives from it, as a gain has."""
        return self.weight.numel() < _size(self.factors)


class Several(NamedTuple):
    """A leaf that is used in several ways, whose contributions add up."""

    weight: Tensor
    parts: tuple[Any, ...]  # of Factors


class Direct(NamedTuple):
    """A leaf whose per-sample gradients `[N, *shape]` are there already."""

    grads: Tensor


Factors: TypeAlias = ConvFactors | LinearFactors | EmbeddingFactors | CallFactors | Derived | Several | Direct


def has_ghost(factors: Factors) -> bool:
    """Whether the ghost identity gives these factors' norms and inner products."""
    if isinstance(factors, ConvFactors):
        return len(factors.spec.kernel) == 2
    return isinstance(factors, LinearFactors)


def split_views(tensor: Tensor, views: int) -> Tensor:
    """`[views * N, ...]` as `[views, N, ...]`."""
    return tensor.reshape(views, tensor.shape[0] // views, *tensor.shape[1:])


def grad_rows(leaf_grads: Tensor) -> Tensor:
    """`[N, *shape]` as `[N, D]`; a leaf may be a single number."""
    return leaf_grads.flatten(1) if leaf_grads.ndim > 1 else leaf_grads.unsqueeze(1)


# --------------------------------------------------------------------------- parts of a batch


def num_samples(factors: Factors) -> int:
    """N."""
    match factors:
        case Direct():
            return factors.grads.shape[0]
        case Derived():
            return num_samples(factors.factors)
        case Several():
            return num_samples(factors.parts[0])
        case CallFactors():
            return factors.cotangents[0].shape[0] // factors.views
    return factors.cotangents.shape[0] // factors.views


def sample_slices(factors: Factors, max_elements: int = MAX_ELEMENTS) -> list[Factors]:
    """The factors cut into runs of samples, each with at most about `max_elements` gradient entries."""
    n = num_samples(factors)
    step = max(1, max_elements // max(_size(factors), 1))
    if n <= step:
        return [factors]
    return [samples(factors, start, min(start + step, n)) for start in range(0, n, step)]


def _size(factors: Factors) -> int:
    """Entries of a sample's gradient, or of the larger one that it is pulled back from."""
    match factors:
        case Direct():
            return factors.grads[0].numel() if len(factors.grads) else 0
        case Derived():
            return max(factors.weight.numel(), _size(factors.factors))
        case Several():
            return max(_size(part) for part in factors.parts)
    return factors.weight.numel()


def samples(factors: Factors, start: int, stop: int) -> Factors:
    """The factors of the samples `start:stop` alone."""

    def cut(tensor: Tensor, views: int) -> Tensor:
        return split_views(tensor, views)[:, start:stop].flatten(0, 1)

    match factors:
        case Direct():
            return Direct(factors.grads[start:stop])
        case Derived():
            formed = None if factors.formed is None else factors.formed[start:stop]
            return factors._replace(factors=samples(factors.factors, start, stop), formed=formed)
        case Several():
            return factors._replace(parts=tuple([samples(part, start, stop) for part in factors.parts]))
        case CallFactors():
            both = factors.inputs, factors.cotangents
            inputs, cotangents = (tuple([cut(x, factors.views) for x in tensors]) for tensors in both)
            return factors._replace(inputs=inputs, cotangents=cotangents)
    a, g = cut(factors.inputs, factors.views), cut(factors.cotangents, factors.views)
    return factors._replace(inputs=a, cotangents=g)


def masked(factors: Factors, keep: Tensor) -> Factors:
    """The factors with zeros for every sample where `keep [N]` is False, whatever (NaN, Inf) it held."""

    def mask(tensor: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep.reshape(-1, *[1] * (tensor.ndim - 1)), tensor, 0)

    match factors:
        case Direct():
            return Direct(mask(factors.grads, keep))
        case Derived():
            return factors._replace(factors=masked(factors.factors, keep), formed=None)
        case Several():
            return factors._replace(parts=tuple([masked(part, keep) for part in factors.parts]))
        case CallFactors():
            keep = keep.repeat(factors.views)
            both = factors.inputs, factors.cotangents
            inputs, cotangents = (tuple([mask(x, keep) for x in tensors]) for tensors in both)
            return factors._replace(inputs=inputs, cotangents=cotangents)
    keep = keep.repeat(factors.views)
    inputs = factors.inputs if isinstance(factors, EmbeddingFactors) else mask(factors.inputs, keep)
    return factors._replace(inputs=inputs, cotangents=mask(factors.cotangents, keep))
