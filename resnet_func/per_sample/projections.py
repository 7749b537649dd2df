"""Random projections of per-sample gradients: sign matrices that any machine draws the same from a seed."""

from __future__ import annotations

import hashlib
import math
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from resnet_func.models.layers import Conv
from resnet_func.per_sample import contract
from resnet_func.per_sample.capture import Captured
from resnet_func.per_sample.contract import ConvFactors, Direct, Factors, LinearFactors, Way
from resnet_func.per_sample.quantity import Quantity

Projection: TypeAlias = Literal["factorized", "dense"]

# signs of a dense projection that exist at a time; part of the definition of the projection
DENSE_CHUNK = 2**22


def sketch_quantity(dim: int, seed: int, projection: Projection) -> Quantity:
    """Sketches `[N, dim]` as a quantity."""
    if dim < 1:
        raise ValueError(f"dim must be 1 or more; got {dim}. 4096 is common")
    if projection not in ("factorized", "dense"):
        raise ValueError(f"projection must be 'factorized' or 'dense'; got {projection!r}")

    def leaf(path: str, factors: Factors, way: Way) -> Tensor:
        generator = leaf_generator(seed, path)
        if projection == "dense":
            return dense(contract.grads(factors).flatten(1), dim, generator)
        return factorized(factors, dim, generator)

    def finish(answers: dict[str, Tensor], captured: Captured) -> Tensor:
        if not answers:
            return captured.losses.new_zeros((captured.losses.shape[0], dim))
        return torch.stack(list(answers.values())).sum(0)

    return Quantity("sketch", leaf, finish, torch.cat)


def leaf_generator(seed: int, path: str) -> torch.Generator:
    """The generator of one leaf's projection: each leaf has its own stream, whatever else is trained."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def signs(rows: int, columns: int, like: Tensor, generator: torch.Generator) -> Float[Tensor, "rows columns"]:
    """Independent +1 and -1, from integers alone, so that every machine draws the same ones."""
    words = torch.randint(0, 2**32, (-(-rows * columns // 32),), generator=generator)
    bits = (words[:, None] >> torch.arange(32)) & 1
    drawn = bits.flatten()[: rows * columns].reshape(rows, columns)
    return (2 * drawn - 1).to(like)


def dense(grads: Float[Tensor, "n d"], dim: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
    """`grads @ R / sqrt(dim)` with R of independent signs (Achlioptas 2003), drawn a chunk at a time."""
    total = grads.new_zeros((grads.shape[0], dim))
    step = max(1, DENSE_CHUNK // dim)
    for start in range(0, grads.shape[1], step):
        chunk = grads[:, start : start + step]
        total = total + chunk @ signs(chunk.shape[1], dim, grads, generator)
    return total / math.sqrt(dim)


def factorized(factors: Factors, dim: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
    """`P gradient Q^T`, flattened: input and cotangent are projected before their outer product.

    `rows * columns = dim`. Inner products are unbiased as with a dense projection; their error is larger, and
    falls with the smaller of the two factors (LoGra: Choe et al. 2024, https://arxiv.org/abs/2405.13954).
    Leaves that are vectors are projected densely.
    """
    if isinstance(factors, ConvFactors):
        return _factorized_conv(factors, dim, generator)
    if isinstance(factors, LinearFactors):
        rows, columns = split_dim(dim)
        p = signs(rows, factors.cotangents.shape[1], factors.cotangents, generator)
        q = signs(columns, factors.inputs.shape[1], factors.inputs, generator)
        a, g = (
            contract.split_views(t, factors.views) for t in (factors.inputs @ q.T, factors.cotangents @ p.T)
        )
        return torch.einsum("knr,knc->nrc", g, a).flatten(1) / math.sqrt(dim)
    return _factorized_direct(factors, dim, generator)


def _factorized_direct(factors: Direct, dim: int, generator: torch.Generator) -> Tensor:
    grads = factors.grads
    if grads.ndim < 3:
        return dense(grads.flatten(1), dim, generator)
    grouped = grads.flatten(2)
    rows, columns = split_dim(dim)
    p = signs(rows, grouped.shape[1], grads, generator)
    q = signs(columns, grouped.shape[2], grads, generator)
    return torch.einsum("ro,noi,ci->nrc", p, grouped, q).flatten(1) / math.sqrt(dim)


def _factorized_conv(factors: ConvFactors, dim: int, generator: torch.Generator) -> Tensor:
    spec, views = factors.spec, factors.views
    if spec.standardize or spec.groups > 1:
        # a gradient through the standardisation is no outer product, and a grouped layer's is small
        return _factorized_direct(Direct(contract.grads(factors)), dim, generator)
    rows, columns = split_dim(dim)
    g = factors.cotangents
    p = signs(rows, spec.c_out, g, generator)
    q = signs(columns, spec.c_in * spec.kernel**2, g, generator).reshape(columns, *spec.weight_shape[1:])
    inputs = _convolve(spec, factors.inputs.to(g.dtype), q)
    cotangents = torch.einsum("ro,not->nrt", p, g.flatten(2))
    a, g = (contract.split_views(t.flatten(2), views) for t in (inputs, cotangents))
    return torch.einsum("knrt,knct->nrc", g, a).flatten(1) / math.sqrt(dim)


def _convolve(spec: Conv, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, spec.stride, spec.padding, spec.dilation)


def split_dim(dim: int) -> tuple[int, int]:
    """`(rows, columns)` with `rows * columns = dim`, as square as it goes."""
    rows = max(r for r in range(1, math.isqrt(dim) + 1) if dim % r == 0)
    return rows, dim // rows
