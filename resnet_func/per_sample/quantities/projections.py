"""Random projections of per-sample gradients: sign matrices that any machine draws the same from a seed."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from math import prod
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from resnet_func.per_sample.capture import Captured
from resnet_func.per_sample.layers import contract
from resnet_func.per_sample.layers.contract import Way
from resnet_func.per_sample.layers.factors import (
    ConvFactors,
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
    return Quantity("sketch", partial(_sketch_leaf, dim, seed, projection), partial(_add_up, dim), torch.cat)


def _sketch_leaf(
    dim: int, seed: int, projection: Projection, path: str, factors: Factors, way: Way
) -> Tensor:
    own = leaf_seed(seed, path)
    if projection == "dense":
        grads = (grad_rows(contract.grads(part)) for part in sample_slices(factors))
        return torch.cat([dense(part, dim, own) for part in grads])
    return factorized(factors, dim, own)


def _add_up(dim: int, answers: dict[str, Tensor], captured: Captured) -> Tensor:
    if not answers:
        return captured.losses.new_zeros((captured.losses.shape[0], dim))
    return torch.stack(list(answers.values())).sum(0)


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
    bits = (words[:, None] >> torch.arange(32, dtype=torch.int64, device=like.device)) & 1
    drawn = bits.flatten()[start % 32 : start % 32 + rows * columns].reshape(rows, columns)
    return (2 * drawn - 1).to(like.dtype)


def _hash(x: Tensor) -> Tensor:
    """32 bits of int64 to 32 bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & MASK
    return x ^ (x >> 16)


def dense(grads: Float[Tensor, "n d"], dim: int, seed: int) -> Float[Tensor, "n dim"]:
    """`grads @ R / sqrt(dim)` with R of independent signs (Achlioptas 2003), drawn a chunk at a time."""
    total = grads.new_zeros((grads.shape[0], dim))
    step = max(1, DENSE_CHUNK // dim)
    for start in range(0, grads.shape[1], step):
        chunk = grads[:, start : start + step]
        total = total + chunk @ signs(chunk.shape[1], dim, grads, seed, start)
    return total / math.sqrt(dim)


def factorized(factors: Factors, dim: int, seed: int) -> Float[Tensor, "n dim"]:
    """`P gradient Q^T`, flattened: input and cotangent are projected before their outer product.

    `rows * columns = dim`. Inner products are unbiased as with a dense projection; their error is larger, and
    falls with the smaller of the two factors (LoGra: Choe et al. 2024, https://arxiv.org/abs/2405.13954).
    Leaves that are vectors are projected densely.
    """
    if isinstance(factors, ConvFactors) and factors.spec.groups == 1:
        return _factorized_conv(factors, dim, seed)
    if isinstance(factors, LinearFactors):
        rows, columns = split_dim(dim)
        inputs, g = factors.inputs.to(factors.cotangents.dtype), factors.cotangents
        p, q = signs(rows, g.shape[1], g, seed), signs(columns, inputs.shape[1], g, seed + 1)
        a, g = (split_views(t, factors.views) for t in (inputs @ q.T, g @ p.T))
        return torch.einsum("knr,knc->nrc", g, a).flatten(1) / math.sqrt(dim)
    return torch.cat([_factorized_grads(contract.grads(part), dim, seed) for part in sample_slices(factors)])


def _factorized_grads(grads: Tensor, dim: int, seed: int) -> Tensor:
    if grads.ndim < 3:
        return dense(grad_rows(grads), dim, seed)
    grouped = grads.flatten(2)
    rows, columns = split_dim(dim)
    p, q = signs(rows, grouped.shape[1], grads, seed), signs(columns, grouped.shape[2], grads, seed + 1)
    return torch.einsum("ro,noi,ci->nrc", p, grouped, q).flatten(1) / math.sqrt(dim)


def _factorized_conv(factors: ConvFactors, dim: int, seed: int) -> Tensor:
    spec, views = factors.spec, factors.views
    rows, columns = split_dim(dim)
    g = factors.cotangents
    p, q = signs(rows, spec.c_out, g, seed), signs(columns, prod(spec.weight_shape[1:]), g, seed + 1)
    inputs = _convolve(spec, factors.inputs.to(g.dtype), q.reshape(columns, *spec.weight_shape[1:]))
    cotangents = torch.einsum("ro,not->nrt", p, g.flatten(2))
    a, g = (split_views(t.flatten(2), views) for t in (inputs, cotangents))
    return torch.einsum("knrt,knct->nrc", g, a).flatten(1) / math.sqrt(dim)


def _convolve(spec: ConvSpec, x: Tensor, weight: Tensor) -> Tensor:
    convolve = F.conv3d if len(spec.kernel) == 3 else F.conv2d
    return convolve(x, weight, None, spec.stride, spec.padding, spec.dilation)


def split_dim(dim: int) -> tuple[int, int]:
    """`(rows, columns)` with `rows * columns = dim`, as square as it goes."""
    rows = max(r for r in range(1, math.isqrt(dim) + 1) if dim % r == 0)
    return rows, dim // rows
