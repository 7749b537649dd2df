"""Contractions: what one layer's captured `(input, cotangent)` pairs say about its per-sample gradients.

A trainable leaf is seen through its factors. For a convolution or a linear layer they are the layer's input
and the cotangent of its output; for small leaves (biases, normalisation affine) the per-sample gradient
itself.

Samples may come in several views (augmentation multiplicity). The leading dimension of every factor is then
`views * N`, views first, so that a sample's views fold into the pixels it is summed over anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from resnet_func.models.layers import Conv, standardize
from resnet_func.per_sample import ghost

# "ghost": pixel Gram matrices, no gradient is formed. "materialize": form [N, *shape], use it, drop it.
# "keep": form it and hold on to it, where a second look at it is to come.
Way: TypeAlias = Literal["ghost", "materialize", "keep"]

# Where a gradient is needed only to be reduced, at most about this many entries exist at a time.
MAX_ELEMENTS = 2**25


class ConvFactors(NamedTuple):
    """A convolution's weight: input `[views * N, c_in, H, W]`, cotangent `[views * N, c_out, Ho, Wo]`."""

    spec: Conv
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


class Direct(NamedTuple):
    """A leaf whose per-sample gradients `[N, *shape]` are there already."""

    grads: Tensor


Factors: TypeAlias = ConvFactors | LinearFactors | Direct


# --------------------------------------------------------------------------- per-sample gradients


def grads(factors: Factors) -> Float[Tensor, "n ..."]:
    """Per-sample gradients `[N, *shape]` of a leaf."""
    if isinstance(factors, ConvFactors):
        return _conv_grads(factors).to(factors.weight.dtype)  # under autocast the cotangent is narrower
    if isinstance(factors, LinearFactors):
        g, a = (split_views(t, factors.views) for t in (factors.cotangents, factors.inputs))
        return torch.einsum("kno,kni->noi", g, a)
    return factors.grads


def _conv_grads(factors: ConvFactors) -> Tensor:
    """One grouped convolution backward, groups = N * groups; a product a sample where that is faster."""
    if factors.spec.standardize:
        plain = factors._replace(spec=replace(factors.spec, standardize=False))
        return _through_standardize(factors, _conv_grads(plain))
    if _fits_product(factors):
        return _grads_by_product(factors)
    spec, views = factors.spec, factors.views
    a, g = factors.inputs, factors.cotangents
    n = g.shape[0] // views
    g = g.reshape(views, n * spec.c_out, *g.shape[2:])
    a = a.reshape(views, n * spec.c_in, *a.shape[2:])
    c_out, *rest = spec.weight_shape
    weight = _weight_backward(spec, a, g, (n * c_out, *rest), n * spec.groups)
    return weight.reshape(n, *spec.weight_shape)


def _fits_product(factors: ConvFactors) -> bool:
    """Whether a product of cotangents and patches beats the grouped convolution.

    It does where patches are pixels, and where there are few of them: the patches of a sample are then
    smaller than its gradient, which a grouped convolution writes twice.
    """
    spec, (height, width) = factors.spec, factors.cotangents.shape[2:]
    pixels = spec.kernel == 1 and spec.padding == 0
    return factors.views == 1 and (pixels or 2 * height * width <= spec.c_out // spec.groups)


def _grads_by_product(factors: ConvFactors) -> Tensor:
    """One matrix product over output pixels for every sample."""
    spec, g = factors.spec, factors.cotangents
    n = g.shape[0]
    if spec.kernel == 1 and spec.padding == 0:
        _, patches = ghost.seen(spec, factors.inputs)
    else:
        patches = F.unfold(factors.inputs, spec.kernel, spec.dilation, spec.padding, spec.stride)
    _, *rest = spec.weight_shape
    patches = patches.reshape(n * spec.groups, prod(rest), -1).to(g.dtype)
    g = g.reshape(n * spec.groups, spec.c_out // spec.groups, -1)
    return torch.bmm(g, patches.transpose(1, 2)).reshape(n, *spec.weight_shape)


def _weight_backward(spec: Conv, a: Tensor, g: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    # the kernel looks at the weight's shape only: a stride-0 zero stands in for it
    weight = g.new_zeros(()).expand(shape)
    side = [[spec.stride] * 2, [spec.padding] * 2, [spec.dilation] * 2]
    _, grad, _ = torch.ops.aten.convolution_backward(
        g, a.to(g.dtype), weight, None, *side, False, [0, 0], groups, [False, True, False]
    )
    return grad


def _through_standardize(factors: ConvFactors, weight_grads: Tensor) -> Tensor:
    """Gradients `[..., *weight_shape]` of the standardised weight, pulled back to the weight."""
    pullback = torch.func.vjp(standardize, factors.weight)[1]
    if weight_grads.ndim == factors.weight.ndim:
        return pullback(weight_grads)[0]
    return torch.vmap(lambda grad: pullback(grad)[0])(weight_grads)


def split_views(tensor: Tensor, views: int) -> Tensor:
    """`[views * N, ...]` as `[views, N, ...]`."""
    return tensor.reshape(views, tensor.shape[0] // views, *tensor.shape[1:])


# --------------------------------------------------------------------------- sums over samples


def weighted_sum(factors: Factors, weights: Float[Tensor, "n"]) -> Tensor:
    """`sum_i weights[i] * gradient[i]` of a leaf, in one ordinary weight pass."""
    if isinstance(factors, Direct):
        return torch.einsum("n,n...->...", weights.to(factors.grads.dtype), factors.grads)
    g = factors.cotangents
    g = g * weights.to(g.dtype).repeat(factors.views).reshape(-1, *[1] * (g.ndim - 1))
    if isinstance(factors, LinearFactors):
        return g.T @ factors.inputs
    spec = factors.spec
    total = _weight_backward(spec, factors.inputs, g, spec.weight_shape, spec.groups)
    total = total.to(factors.weight.dtype)
    return _through_standardize(factors, total) if spec.standardize else total


def masked(factors: Factors, keep: Tensor) -> Factors:
    """The factors with zeros for every sample where `keep [N]` is False, whatever (NaN, Inf) it held."""

    def mask(tensor: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep.reshape(-1, *[1] * (tensor.ndim - 1)), tensor, 0)

    if isinstance(factors, Direct):
        return Direct(mask(factors.grads, keep))
    keep = keep.repeat(factors.views)
    return factors._replace(inputs=mask(factors.inputs, keep), cotangents=mask(factors.cotangents, keep))


# --------------------------------------------------------------------------- squared norms


def squared_norms(factors: Factors, way: Way) -> Float[Tensor, "n"]:
    """`|gradient[i]|^2` of a leaf, in at least float32.

    "ghost" (Goodfellow 2015, https://arxiv.org/abs/1510.01799; for convolutions Rochette et al. 2019,
    https://arxiv.org/abs/1912.06015) forms no gradient; "materialize" does.
    """
    if isinstance(factors, LinearFactors) and way == "ghost":
        return ghost.linear_squared_norms(factors.inputs, factors.cotangents, factors.views)
    if isinstance(factors, ConvFactors) and way == "ghost":
        _refuse_standardized(factors)
        return ghost.conv_squared_norms(factors.spec, factors.inputs, factors.cotangents, factors.views)
    return torch.cat([_squared_norms_of_grads(part) for part in sample_slices(factors)])


def _squared_norms_of_grads(factors: Factors) -> Tensor:
    return materialized_squared_norms(
        _conv_grads(factors) if isinstance(factors, ConvFactors) else grads(factors)
    )


def materialized_squared_norms(leaf_grads: Tensor) -> Tensor:
    """Squared norms of `[N, *shape]` over all but the first dimension."""
    # the kernel accumulates in at least float32, and makes no squared copy
    norms = torch.linalg.vector_norm(leaf_grads.flatten(1), dim=1, dtype=wide(leaf_grads.dtype))
    return norms.square()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


# --------------------------------------------------------------------------- parts of a batch


def num_samples(factors: Factors) -> int:
    """N."""
    if isinstance(factors, Direct):
        return factors.grads.shape[0]
    return factors.cotangents.shape[0] // factors.views


def sample_slices(factors: Factors, max_elements: int = MAX_ELEMENTS) -> list[Factors]:
    """The factors cut into runs of samples, each with at most about `max_elements` gradient entries."""
    if isinstance(factors, Direct):
        return [factors]
    n = num_samples(factors)
    per_sample = factors.weight.numel()
    step = max(1, max_elements // per_sample)
    if n <= step:
        return [factors]
    return [_samples(factors, start, min(start + step, n)) for start in range(0, n, step)]


def _samples(factors: ConvFactors | LinearFactors, start: int, stop: int) -> Factors:
    a, g = (
        split_views(tensor, factors.views)[:, start:stop].flatten(0, 1)
        for tensor in (factors.inputs, factors.cotangents)
    )
    return factors._replace(inputs=a, cotangents=g)


# --------------------------------------------------------------------------- inner products between samples


def inner_products(
    a: Factors, b: Factors, way: Way, *, max_elements: int = MAX_ELEMENTS
) -> Float[Tensor, "na nb"]:
    """`<gradient_a[i], gradient_b[j]>` of one leaf for two batches.

    "materialize" forms at most about `max_elements` gradient entries at a time: output channels in turn.
    """
    if isinstance(a, LinearFactors) and isinstance(b, LinearFactors):
        return ghost.linear_inner_products(a.inputs, a.cotangents, b.inputs, b.cotangents, a.views)
    if isinstance(a, ConvFactors) and isinstance(b, ConvFactors):
        if way == "ghost":
            _refuse_standardized(a)
            pairs = (a.inputs, a.cotangents), (b.inputs, b.cotangents)
            return ghost.conv_inner_products(a.spec, *pairs, a.views)
        return _materialized_inner_products(a, b, max_elements)
    return _matrix_product(grads(a), grads(b))


def _materialized_inner_products(a: ConvFactors, b: ConvFactors, max_elements: int) -> Tensor:
    n = (a.cotangents.shape[0] + b.cotangents.shape[0]) // a.views
    per_channel = n * a.weight[0].numel()
    slices = output_channel_slices(a.spec, max(1, max_elements // max(per_channel, 1)))
    products = [_matrix_product(grads(channels(a, *s)), grads(channels(b, *s))) for s in slices]
    return torch.stack(products).sum(0) if len(products) > 1 else products[0]


def output_channel_slices(spec: Conv, most: int) -> list[tuple[int, int]]:
    """`(start, stop)` ranges of output channels, at most about `most` each, that respect the groups."""
    if spec.groups > 1:  # a slice of a grouped convolution keeps whole groups
        step = max(1, most // (spec.c_out // spec.groups)) * (spec.c_out // spec.groups)
    else:
        step = most
    return [(start, min(start + step, spec.c_out)) for start in range(0, spec.c_out, step)]


def channels(factors: ConvFactors, start: int, stop: int) -> ConvFactors:
    """The factors of the output channels `start:stop` alone; of a grouped layer, whole groups."""
    spec = factors.spec
    if (start, stop) == (0, spec.c_out):
        return factors
    per_group_out, per_group_in = spec.c_out // spec.groups, spec.c_in // spec.groups
    groups = 1 if spec.groups == 1 else (stop - start) // per_group_out
    c_in = (
        slice(None)
        if spec.groups == 1
        else slice(start // per_group_out * per_group_in, stop // per_group_out * per_group_in)
    )
    inputs = factors.inputs[:, c_in]
    sliced = Conv(
        inputs.shape[1], stop - start, spec.kernel, spec.stride, spec.padding, spec.dilation, groups,
        spec.standardize,
    )  # fmt: skip
    return ConvFactors(
        sliced, factors.weight[start:stop], inputs, factors.cotangents[:, start:stop], factors.views
    )


def _matrix_product(a: Tensor, b: Tensor) -> Tensor:
    dtype = wide(a.dtype)
    return F.linear(a.flatten(1).to(dtype), b.flatten(1).to(dtype))


def _refuse_standardized(factors: ConvFactors) -> None:
    if factors.spec.standardize:
        raise ValueError("the ghost identity does not see through weight standardisation; use 'materialize'")
