"""Contractions: what a leaf's factors say about its per-sample gradients, by the cheaper of several ways."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from resnet_func.numerics import accumulation_dtype
from resnet_func.per_sample.layers import ghost
from resnet_func.per_sample.layers.factors import (
    MAX_ELEMENTS,
    CallFactors,
    ConvFactors,
    Derived,
    Direct,
    EmbeddingFactors,
    Factors,
    LinearFactors,
    Several,
    grad_rows,
    has_ghost,
    num_samples,
    sample_slices,
    split_views,
)
from resnet_func.per_sample.layers.ghost import ConvSpec

# "ghost": pixel Gram matrices, no gradient is formed. "materialize": form [N, *shape], use it, drop it.
# "keep": form it and hold on to it, where a second look at it is to come.
Way: TypeAlias = Literal["ghost", "materialize", "keep"]


# --------------------------------------------------------------------------- per-sample gradients


def grads(factors: Factors) -> Float[Tensor, "n ..."]:
    """Per-sample gradients `[N, *shape]` of a leaf, in its dtype (under autocast cotangents are narrower)."""
    if isinstance(factors, Direct):
        return factors.grads
    return _grads(factors).to(factors.weight.dtype)


def _grads(factors: Factors) -> Tensor:
    match factors:
        case ConvFactors():
            return _conv_grads(factors)
        case LinearFactors():
            a, g = _one_dtype(factors)
            return torch.einsum("kno,kni->noi", split_views(g, factors.views), split_views(a, factors.views))
        case EmbeddingFactors():
            return _embedding_grads(factors)
        case CallFactors():
            return _call_grads(factors)
        case Derived():
            inner = grads(factors.factors) if factors.formed is None else factors.formed
            return _pull_back(factors, inner)
        case Several():
            return _sum([grads(part) for part in factors.parts])
        case Direct():
            return factors.grads


def _pull_back(derived: Derived, inner: Tensor) -> Tensor:
    """Gradients `[N, *shape]` of a leaf from those of what derives from it."""
    if derived.jacobian is not None:
        return derived.jacobian.pull_back(inner).reshape(len(inner), *derived.weight.shape)
    pullback = torch.func.vjp(derived.derive, derived.weight)[1]
    if len(inner) == 1:
        return pullback(inner.squeeze(0))[0].unsqueeze(0)
    return sample_by_sample(lambda grad: pullback(grad)[0], inner)


def form_derived(leaves: Mapping[str, Factors]) -> dict[str, Factors]:
    """Leaves that make one tensor together, ready to be looked at: what is needed of it is formed once.

    A small leaf, such as a gain, becomes its own gradients.
    """
    found = dict(leaves)
    derived = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Derived)}
    if len(derived) > 1:
        first = next(iter(derived.values()))
        if len(sample_slices(first.factors)) == 1:
            formed = grads(first.factors)
            derived = {path: leaf._replace(formed=formed) for path, leaf in derived.items()}
    for path, leaf in derived.items():
        small = torch.cat([grads(part) for part in sample_slices(leaf)]) if leaf.is_small else None
        found[path] = leaf if small is None else Direct(small)
    return found


def _conv_grads(factors: ConvFactors) -> Tensor:
    """One grouped convolution backward, groups = N * groups; a product a sample where that is faster."""
    if _fits_product(factors):
        return _grads_by_product(factors)
    spec, views = factors.spec, factors.views
    a, g = factors.inputs, factors.cotangents
    n = g.shape[0] // views
    g = g.reshape(views, n * spec.c_out, *g.shape[2:])
    a = a.reshape(views, n * spec.c_in, *a.shape[2:])
    c_out, *rest = spec.weight_shape
    weight = _weight_backward(spec, a, g, (n * c_out, *rest), n * spec.groups)
    return weight.reshape(n, *factors.weight.shape)


def _fits_product(factors: ConvFactors) -> bool:
    """Whether a product of cotangents and patches beats the grouped convolution.

    It does where patches are pixels, and where there are few of them: the patches of a sample are then
    smaller than its gradient, which a grouped convolution writes twice.
    """
    spec = factors.spec
    if spec.is_pointwise:
        return True
    positions = factors.views * prod(factors.cotangents.shape[2:])
    return len(spec.kernel) == 2 and 2 * positions <= spec.c_out // spec.groups


def _grads_by_product(factors: ConvFactors) -> Tensor:
    """One matrix product over output pixels, of all views, for every sample."""
    spec, g, views = factors.spec, factors.cotangents, factors.views
    n = g.shape[0] // views
    if spec.is_pointwise:
        _, patches = ghost.subsample(spec, factors.inputs)
    else:
        patches = F.unfold(factors.inputs, spec.kernel, spec.dilation, spec.padding, spec.stride)
    patches = _positions_by_sample(patches.flatten(2), views, spec.groups).to(g.dtype)
    g = _positions_by_sample(g.flatten(2), views, spec.groups)
    return torch.bmm(g, patches.transpose(1, 2)).reshape(n, *factors.weight.shape)


def _positions_by_sample(x: Tensor, views: int, groups: int) -> Tensor:
    """`[views * N, C, T]` as `[N * groups, C / groups, views * T]`."""
    total, channels, positions = x.shape
    n = total // views
    if views == 1:
        return x.reshape(n * groups, channels // groups, positions)
    x = x.reshape(views, n * groups, channels // groups, positions).permute(1, 2, 0, 3)
    return x.reshape(n * groups, channels // groups, views * positions)


def _weight_backward(spec: ConvSpec, a: Tensor, g: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    # the kernel looks at the weight's shape only: a stride-0 zero stands in for it
    weight = g.new_zeros(()).expand(shape)
    where = [list(spec.stride), list(spec.padding), list(spec.dilation)]
    _, grad, _ = torch.ops.aten.convolution_backward(
        g, a.to(g.dtype), weight, None, *where, False, [0] * len(spec.kernel), groups, [False, True, False]
    )
    return grad


def _embedding_grads(factors: EmbeddingFactors) -> Tensor:
    n, (rows, dim) = num_samples(factors), factors.weight.shape
    indices = split_views(factors.inputs, factors.views).transpose(0, 1).reshape(n, -1)
    g = split_views(factors.cotangents, factors.views).transpose(0, 1).reshape(n, -1, dim)
    return g.new_zeros(n, rows, dim).scatter_add(1, indices.unsqueeze(2).expand(g.shape), g)


def _call_grads(factors: CallFactors) -> Tensor:
    """The call's own derivative, once for every sample as a batch of one."""

    def one(cotangents: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        alone = [x.unsqueeze(0) for x in inputs]
        pullback = torch.func.vjp(lambda weight: factors.function(weight, *alone), factors.weight)[1]
        return pullback(tuple([g.unsqueeze(0) for g in cotangents]))[0]

    try:
        by_view = sample_by_sample(one, factors.cotangents, *factors.inputs)
    except RuntimeError as error:
        raise ValueError(
            f"a call of this network has no batching rule ({error}). Use method='loop' for this network"
        ) from error
    return split_views(by_view, factors.views).sum(0)


def group_norm_grads(
    inputs: Tensor, cotangents: Tensor, statistics: Sequence[Tensor], groups: int
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
    """Gradients of a group normalisation's weight and bias, of every sample.

    The batch as one sample of N times as many channels has them as its channels' gradients.

    Args:
        inputs, cotangents: `[N, C, ...]`, of one dtype.
        statistics: Mean and inverse deviation of every group, `[N, groups]`.
        groups: Groups of channels.
    """
    n, c, pixels = *inputs.shape[:2], prod(inputs.shape[2:])
    # contiguous: of some layouts the reshaped tensor is a view that torch 2.11 reads as if it were
    g, a = (tensor.reshape(1, n * c, pixels).contiguous() for tensor in (cotangents, inputs))
    mean, rstd = (tensor.reshape(1, n * groups) for tensor in statistics)
    ones = a.new_ones(n * c)  # not None, which torch 2.11 does not take here
    _, weight, bias = torch.ops.aten.native_group_norm_backward(
        g, a, mean, rstd, ones, 1, n * c, pixels, n * groups, [False, True, True]
    )
    return weight.reshape(n, c), bias.reshape(n, c)


def sample_by_sample(function: Callable[..., Tensor], *batches: Any) -> Tensor:
    """`torch.vmap(function)(*batches)`, silent where torch has no batching rule and loops by itself."""
    if torch.compiler.is_compiling():
        return torch.vmap(function)(*batches)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return torch.vmap(function)(*batches)


def _one_dtype(factors: LinearFactors) -> tuple[Tensor, Tensor]:
    """Input and cotangent in the weight's dtype: they are small, and may be narrower under autocast."""
    dtype = factors.weight.dtype
    return factors.inputs.to(dtype), factors.cotangents.to(dtype)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


# --------------------------------------------------------------------------- sums over samples


def weighted_sum(factors: Factors, weights: Float[Tensor, "n"]) -> Tensor:
    """`sum_i weights[i] * gradient[i]` of a leaf, in one ordinary weight pass.

    Weights are multiplied in at least float32; the product is rounded to the cotangents' dtype.
    """
    if isinstance(factors, Direct):
        dtype = accumulation_dtype(factors.grads.dtype)
        total = torch.einsum("n,n...->...", weights.to(dtype), factors.grads.to(dtype))
        return total.to(factors.grads.dtype)
    return _weighted_sum(factors, weights).to(factors.weight.dtype)


def _weighted_sum(factors: Factors, weights: Tensor) -> Tensor:
    match factors:
        case Derived():
            return _pull_back(factors, weighted_sum(factors.factors, weights).unsqueeze(0)).squeeze(0)
        case Several():
            return _sum([weighted_sum(part, weights) for part in factors.parts])
        case Direct():
            return weighted_sum(factors, weights)
        case CallFactors():
            by_view = weights.repeat(factors.views)
            pullback = torch.func.vjp(lambda w: factors.function(w, *factors.inputs), factors.weight)[1]
            return pullback(tuple([_scale_samples(g, by_view) for g in factors.cotangents]))[0]
    g = _scale_samples(factors.cotangents, weights.repeat(factors.views))
    match factors:
        case ConvFactors():
            spec = factors.spec
            total = _weight_backward(spec, factors.inputs, g, spec.weight_shape, spec.groups)
            return total.reshape(factors.weight.shape)
        case LinearFactors():
            a, g = _one_dtype(factors._replace(cotangents=g))
            return g.T @ a
        case EmbeddingFactors():
            rows, dim = factors.weight.shape
            return g.new_zeros(rows, dim).index_add(0, factors.inputs.flatten(), g.reshape(-1, dim))


def _scale_samples(g: Tensor, weights: Tensor) -> Tensor:
    weights = weights.reshape(-1, *[1] * (g.ndim - 1))
    dtype = accumulation_dtype(g.dtype)
    if dtype == g.dtype:
        return g * weights.to(dtype)
    return (g.to(dtype) * weights.to(dtype)).to(g.dtype)


# --------------------------------------------------------------------------- squared norms


def squared_norms(factors: Factors, way: Way) -> Float[Tensor, "n"]:
    """`|gradient[i]|^2` of a leaf, in at least float32.

    "ghost" (Goodfellow 2015, https://arxiv.org/abs/1510.01799; for convolutions Rochette et al. 2019,
    https://arxiv.org/abs/1912.06015) forms no gradient; "materialize" does.

    Raises:
        ValueError: "ghost" for factors that have none (`has_ghost`).
    """
    if isinstance(factors, EmbeddingFactors):
        return ghost.embedding_squared_norms(factors.inputs, factors.cotangents, factors.views)
    if way == "ghost" and not isinstance(factors, Direct):
        if isinstance(factors, LinearFactors):
            return ghost.linear_squared_norms(factors.inputs, factors.cotangents, factors.views)
        if isinstance(factors, ConvFactors) and has_ghost(factors):
            return ghost.conv_squared_norms(factors.spec, factors.inputs, factors.cotangents, factors.views)
        raise ValueError(f"{type(factors).__name__} have no ghost norm; use 'materialize'")
    squares = [materialized_squared_norms(_unrounded_grads(part)) for part in sample_slices(factors)]
    return squares[0] if len(squares) == 1 else torch.cat(squares)


def _unrounded_grads(factors: Factors) -> Tensor:
    """Gradients as the kernel left them: what is only to be reduced need not be in the leaf's dtype."""
    return factors.grads if isinstance(factors, Direct) else _grads(factors)


def materialized_squared_norms(leaf_grads: Tensor) -> Tensor:
    """Squared norms of `[N, *shape]` over all but the first dimension."""
    # the kernel accumulates in at least float32, and makes no squared copy
    dtype = accumulation_dtype(leaf_grads.dtype)
    return torch.linalg.vector_norm(grad_rows(leaf_grads), dim=1, dtype=dtype).square()


# --------------------------------------------------------------------------- inner products between samples


def inner_products(
    a: Factors, b: Factors, way: Way, *, max_elements: int = MAX_ELEMENTS
) -> Float[Tensor, "na nb"]:
    """`<gradient_a[i], gradient_b[j]>` of one leaf for two batches.

    "materialize" forms at most about `max_elements` gradient entries at a time: output channels in turn where
    the leaf is a convolution's, samples in turn elsewhere.
    """
    if isinstance(a, LinearFactors) and isinstance(b, LinearFactors) and a.views == b.views:
        return ghost.linear_inner_products(a.inputs, a.cotangents, b.inputs, b.cotangents, a.views)
    if isinstance(a, ConvFactors) and isinstance(b, ConvFactors) and a.views == b.views:
        if way == "ghost":
            if not has_ghost(a):
                raise ValueError("this convolution has no ghost inner products; use 'materialize'")
            pairs = (a.inputs, a.cotangents), (b.inputs, b.cotangents)
            return ghost.conv_inner_products(a.spec, *pairs, a.views)
        return _conv_inner_products(a, b, max_elements)
    rows = []
    for part in sample_slices(a, max_elements // 2):
        ours = grads(part)
        columns = [_matrix_product(ours, grads(other)) for other in sample_slices(b, max_elements // 2)]
        rows.append(torch.cat(columns, 1))
    return torch.cat(rows)


def _conv_inner_products(a: ConvFactors, b: ConvFactors, max_elements: int) -> Tensor:
    n = (a.cotangents.shape[0] + b.cotangents.shape[0]) // a.views
    per_channel = n * prod(a.spec.weight_shape[1:])
    slices = output_channel_slices(a.spec, max(1, max_elements // max(per_channel, 1)))
    products = [_matrix_product(grads(channels(a, *s)), grads(channels(b, *s))) for s in slices]
    return _sum(products)


def output_channel_slices(spec: ConvSpec, most: int) -> list[tuple[int, int]]:
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
    inputs, groups = factors.inputs, 1
    if spec.groups > 1:
        per_group_out, per_group_in = spec.c_out // spec.groups, spec.c_in // spec.groups
        groups = (stop - start) // per_group_out
        first = start // per_group_out * per_group_in
        inputs = inputs[:, first : first + groups * per_group_in]
    shape = (stop - start, *spec.weight_shape[1:])
    sliced = replace(spec, weight_shape=shape, groups=groups)
    weight = factors.weight.reshape(spec.weight_shape)[start:stop]
    return ConvFactors(sliced, weight, inputs, factors.cotangents[:, start:stop], factors.views)


def _matrix_product(a: Tensor, b: Tensor) -> Tensor:
    dtype = accumulation_dtype(a.dtype)
    return F.linear(grad_rows(a).to(dtype), grad_rows(b).to(dtype))
