"""Random projections of per-sample gradients: sign matrices that any machine draws the same from a seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from math import prod
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from resnet_func.per_sample.capture import Captured
from resnet_func.per_sample.layers import contract
from resnet_func.per_sample.layers.contract import Way
from resnet_func.per_sample.layers.factors import (
    ConvFactors,
    Direct,
    Factors,
    LinearFactors,
    grad_rows,
    sample_slices,
    split_views,
)
from resnet_func.per_sample.layers.ghost import ConvSpec
from resnet_func.per_sample.quantities.quantity import Quantity

Projection: TypeAlias = Literal["factorized", "dense"]

# signs of a dense projection that exist at a time
DENSE_CHUNK = 2**22
MASK = 2**32 - 1


def sketch_quantity(dim: int, seed: int, projection: Projection) -> Quantity:
    """Sketches `[N, dim]` as a quantity.

    >>> sketch_quantity(512, 0, "factorized").name
    'sketch'
    """
    if dim < 1:
        raise ValueError(f"dim must be 1 or more; got {dim}. 4096 is common")
    if projection not in ("factorized", "dense"):
        raise ValueError(f"projection must be 'factorized' or 'dense'; got {projection!r}")
    return Quantity("sketch", partial(sketch_leaf, dim, seed, projection), partial(_finish, dim), torch.cat)


class Rows(NamedTuple):
    """Gradients that are still to be projected densely, and the seed of their signs."""

    grads: Float[Tensor, "n d"]
    seed: int


def sketch_leaf(
    dim: int, seed: int, projection: Projection, path: str, factors: Factors, way: Way
) -> Float[Tensor, "n dim"] | Rows:
    """One leaf's part of the sketches; a vector as it is, for `add_up` to project all of them at once."""
    own = leaf_seed(seed, path)
    if projection == "factorized":
        return factorized(factors, dim, own)
    return _each_slice(factors, lambda grads: dense([Rows(grad_rows(grads), own)], dim))


def add_up(dim: int, answers: Mapping[str, Tensor | Rows]) -> Float[Tensor, "n dim"]:
    """The sketches: the sum of one or more leaves' parts."""
    rows = [part for part in answers.values() if isinstance(part, Rows)]
    parts = [part for part in answers.values() if isinstance(part, Tensor)]
    return reduce(torch.add, parts + ([dense(rows, dim)] if rows else []))


def _finish(dim: int, answers: dict[str, Tensor | Rows], captured: Captured) -> Tensor:
    if not answers:
        return captured.losses.new_zeros((captured.losses.shape[0], dim))
    return add_up(dim, answers)


def _each_slice(factors: Factors, project: Callable[[Tensor], Tensor]) -> Tensor:
    """Projections of the gradients, of which some samples' exist at a time."""
    found = [project(contract.grads(part)) for part in sample_slices(factors)]
    return found[0] if len(found) == 1 else torch.cat(found)


@torch.compiler.assume_constant_result
def leaf_seed(seed: int, path: str) -> int:
    """The seed of one leaf's projection, 62 bits: each leaf has its own stream, whatever else is trained."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "big") >> 2


def signs(rows: int, columns: int, like: Tensor, seed: int, first: int = 0) -> Float[Tensor, "rows columns"]:
    """Independent +1 and -1: bit `first * columns + i` of a stream that any device computes alike.

    Word k of the stream, 32 bits, is a hash of k and the seed (the finalizer "lowbias32" of Wellons 2018,
    https://nullprogram.com/blog/2018/07/31/, twice), in integers alone; no generator is advanced, so that it
    compiles, and any part can be drawn by itself.
    """
    start, stop = first * columns, (first + rows) * columns
    words = torch.arange(start // 32, -(-stop // 32), dtype=torch.int64, device=like.device)
    words = _hash(_hash(words ^ (seed & MASK)) ^ (seed >> 32))
    eight = torch.arange(8, dtype=torch.uint8, device=like.device)
    octets = (words[:, None] >> (8 * eight[:4].long())).to(torch.uint8)  # the lowest first, on any machine
    bits = (octets.flatten()[:, None] >> eight) & 1
    drawn = bits.flatten()[start % 32 : start % 32 + rows * columns].reshape(rows, columns)
    return drawn.to(like.dtype).mul_(2).sub_(1)


def _hash(x: Tensor) -> Tensor:
    """32 bits of int64 to 32 bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & MASK
    return x ^ (x >> 16)


def dense(leaves: Sequence[Rows], dim: int) -> Float[Tensor, "n dim"]:
    """The sum of `grads @ R / sqrt(dim)`, R of independent signs (Achlioptas 2003), some rows at a time."""
    step = max(1, DENSE_CHUNK // dim)
    products, chunk, held = [], list[tuple[Tensor, Tensor]](), 0
    for grads, seed in leaves:
        for start in range(0, grads.shape[1], step):
            part = grads[:, start : start + step]
            if held + part.shape[1] > step and chunk:
                products.append(_product(chunk))
                chunk, held = [], 0
            chunk.append((part, signs(part.shape[1], dim, grads, seed, start)))
            held += part.shape[1]
    return reduce(torch.add, [*products, _product(chunk)]) / math.sqrt(dim)


def _product(chunk: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    grads, drawn = zip(*chunk, strict=True)
    return torch.cat(grads, 1) @ torch.cat(drawn)


def factorized(factors: Factors, dim: int, seed: int) -> Float[Tensor, "n dim"] | Rows:
    """`P gradient Q^T`, flattened, `rows * columns = dim`; vectors are to be projected densely.

    Inner products are unbiased as with a dense projection; their error is larger, and falls with the smaller
    of the two factors (LoGra: Choe et al. 2024, https://arxiv.org/abs/2405.13954). Input and cotangent are
    projected before their outer product, or the gradient after it, whichever takes fewer multiplications.
    """
    if isinstance(factors, ConvFactors) and factors.spec.groups == 1:
        if projecting_first_pays(factors.spec, factors.views * prod(factors.cotangents.shape[2:]), dim):
            return _factorized_conv(factors, dim, seed)
    elif isinstance(factors, LinearFactors):
        rows, columns = split_dim(dim)
        inputs, g = factors.inputs.to(factors.cotangents.dtype), factors.cotangents
        p, q = _factors(rows, g.shape[1], columns, inputs.shape[1], g, seed)
        a, g = (split_views(t, factors.views) for t in (inputs @ q.T, g @ p.T))
        return torch.einsum("knr,knc->nrc", g, a).flatten(1)
    leaf_ndim = factors.grads.ndim - 1 if isinstance(factors, Direct) else factors.weight.ndim
    if leaf_ndim < 2:
        return Rows(grad_rows(contract.grads(factors)), seed)
    return _each_slice(factors, lambda grads: _factorized_grads(grads, dim, seed))


def _factors(
    rows: int, c_out: int, columns: int, weights: int, like: Tensor, seed: int
) -> tuple[Float[Tensor, "rows c_out"], Float[Tensor, "columns weights"]]:
    """P and Q of independent signs; the scale of their product is in P, the smaller."""
    p, q = signs(rows, c_out, like, seed), signs(columns, weights, like, seed + 1)
    return p / math.sqrt(rows * columns), q


def projecting_first_pays(spec: ConvSpec, positions: int, dim: int) -> bool:
    """Whether a convolution's input and cotangent are projected with fewer multiplications than its gradient.

    It does with many channels and few output pixels.

    >>> def spec(channels):
    ...     return ConvSpec((channels, channels, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    >>> projecting_first_pays(spec(512), 16, 4096), projecting_first_pays(spec(16), 1024, 4096)
    (True, False)
    """
    rows, columns = split_dim(dim)
    c_out, weights = spec.c_out, prod(spec.weight_shape[1:])
    first = positions * (columns * weights + rows * c_out + rows * columns)
    after = c_out * weights * positions + c_out * weights * columns + rows * c_out * columns
    return first < after


def _factorized_grads(grads: Tensor, dim: int, seed: int) -> Tensor:
    grouped = grads.flatten(2)
    rows, columns = split_dim(dim)
    p, q = _factors(rows, grouped.shape[1], columns, grouped.shape[2], grads, seed)
    return (p @ (grouped @ q.T)).flatten(1)


def _factorized_conv(factors: ConvFactors, dim: int, seed: int) -> Tensor:
    spec, views = factors.spec, factors.views
    rows, columns = split_dim(dim)
    g = factors.cotangents
    p, q = _factors(rows, spec.c_out, columns, prod(spec.weight_shape[1:]), g, seed)
    inputs = _convolve(spec, factors.inputs.to(g.dtype), q.reshape(columns, *spec.weight_shape[1:]))
    cotangents = torch.einsum("ro,not->nrt", p, g.flatten(2))
    a, g = (split_views(t.flatten(2), views) for t in (inputs, cotangents))
    return torch.einsum("knrt,knct->nrc", g, a).flatten(1)


def _convolve(spec: ConvSpec, x: Tensor, weight: Tensor) -> Tensor:
    convolve = F.conv3d if len(spec.kernel) == 3 else F.conv2d
    return convolve(x, weight, None, spec.stride, spec.padding, spec.dilation)


def split_dim(dim: int) -> tuple[int, int]:
    """`(rows, columns)` with `rows * columns = dim`, as square as it goes."""
    rows = max(r for r in range(1, math.isqrt(dim) + 1) if dim % r == 0)
    return rows, dim // rows
