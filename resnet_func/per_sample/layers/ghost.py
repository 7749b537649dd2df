"""The ghost identity: inner products of per-sample gradients from pixel Gram matrices, no gradient formed.

A convolution's weight gradient is `sum_t g_t u_t^T` over output pixels t, with `u_t` the patch of inputs that
t sees. So `<G, G'> = sum_ts <u_t, u'_s> <g_t, g'_s>`, and a patch product is a sum of pixel products over the
kernel's offsets d: `<u_t, u'_s> = sum_d <a_(t+d), a'_(s+d)>`. The pixel Gram is computed once, and shifted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ConvSpec:
    """A convolution's hyper-parameters, a number for each of its spatial dimensions.

    Args:
        weight_shape: `(c_out, c_in / groups, *kernel)`.
        stride, padding, dilation: As in `F.conv2d`; padding is the same on both sides.
        groups: As in `F.conv2d`.
    """

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def c_out(self) -> int:
        return self.weight_shape[0]

    @property
    def c_in(self) -> int:
        return self.weight_shape[1] * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    @property
    def is_pointwise(self) -> bool:
        """Whether an output pixel sees one input pixel."""
        return all(size == 1 for size in self.kernel) and not any(self.padding)


def conv_squared_norms(
    spec: ConvSpec, inputs: Tensor, cotangents: Tensor, views: int = 1
) -> Float[Tensor, "n"]:
    """Squared norms of a convolution's per-sample weight gradients.

    Args:
        spec: The convolution.
        inputs: `[views * N, c_in, H, W]`.
        cotangents: `[views * N, c_out, Ho, Wo]`.
        views: Views of each sample, whose gradients are summed.
    """
    n = cotangents.shape[0] // views
    spec, inputs = subsample(spec, inputs)
    a, g = (_by_sample_and_group(t, views, spec.groups) for t in (inputs, cotangents))
    pixels = torch.bmm(a.transpose(1, 2), a)
    outputs = torch.bmm(g.transpose(1, 2), g)
    patches = _patch_products(spec, _pixel_pairs(pixels, views, inputs.shape[2:]))
    products = patches * _pixel_pairs(outputs, views, cotangents.shape[2:])
    # the sum is a square: round-off must not make it negative
    return products.reshape(n, -1).sum(1).clamp(min=0)


def conv_inner_products(spec: ConvSpec, a: Pair, b: Pair, views: int = 1) -> Float[Tensor, "na nb"]:
    """Inner products of the weight gradients of two batches, each an `(inputs, cotangents)` pair."""
    na, nb = (cotangents.shape[0] // views for _, cotangents in (a, b))
    (spec, inputs_a), (_, inputs_b) = subsample(spec, a[0]), subsample(spec, b[0])
    patches = _patch_products(spec, _cross_pixel_pairs(inputs_a, inputs_b, views, spec.groups))
    products = patches * _cross_pixel_pairs(a[1], b[1], views, spec.groups)
    # dimensions: groups, na, views, nb, views, then the two pixels
    return products.reshape(spec.groups, na, views, nb, views, -1).sum((0, 2, 4, 5))


def linear_squared_norms(inputs: Tensor, cotangents: Tensor, views: int = 1) -> Float[Tensor, "n"]:
    """Squared norms of a linear layer's per-sample weight gradients (the bias is a leaf of its own)."""
    a, g = (_upcast(t).reshape(views, -1, t.shape[1]) for t in (inputs, cotangents))
    if views == 1:
        return a[0].square().sum(1) * g[0].square().sum(1)
    products = torch.einsum("kni,lni->nkl", a, a) * torch.einsum("kno,lno->nkl", g, g)
    return products.sum((1, 2)).clamp(min=0)


def linear_inner_products(
    inputs_a: Tensor, cotangents_a: Tensor, inputs_b: Tensor, cotangents_b: Tensor, views: int = 1
) -> Float[Tensor, "na nb"]:
    """Inner products of a linear layer's weight gradients between two batches."""
    inputs_a, inputs_b = _upcast(inputs_a), _upcast(inputs_b)
    products = (inputs_a @ inputs_b.T) * (_upcast(cotangents_a) @ _upcast(cotangents_b).T)
    na, nb = inputs_a.shape[0] // views, inputs_b.shape[0] // views
    return products.reshape(views, na, views, nb).sum((0, 2))


def embedding_squared_norms(indices: Tensor, cotangents: Tensor, views: int = 1) -> Float[Tensor, "n"]:
    """Squared norms of an embedding's per-sample gradients: positions of one index add up.

    Args:
        indices: `[views * N, T]`.
        cotangents: `[views * N, T, dim]`.
    """
    total, dim = indices.shape[0], cotangents.shape[-1]
    indices = indices.reshape(views, total // views, -1).transpose(0, 1).reshape(total // views, -1)
    g = _upcast(cotangents).reshape(views, total // views, -1, dim).transpose(0, 1)
    g = g.reshape(total // views, -1, dim)
    same = (indices[:, :, None] == indices[:, None]).to(g.dtype)
    return (torch.bmm(g, g.transpose(1, 2)) * same).sum((1, 2)).clamp(min=0)


def subsample(spec: ConvSpec, inputs: Tensor) -> tuple[ConvSpec, Tensor]:
    """A strided convolution of single pixels sees only every `stride`-th of them."""
    if not spec.is_pointwise or all(stride == 1 for stride in spec.stride):
        return spec, inputs
    where = [slice(None), slice(None), *[slice(None, None, stride) for stride in spec.stride]]
    return replace(spec, stride=(1,) * len(spec.stride)), inputs[tuple(where)]


def _patch_products(spec: ConvSpec, pixels: Float[Tensor, "b h w h2 w2"]) -> Float[Tensor, "b ho wo ho2 wo2"]:
    """Patch products from pixel products: both pixels move by the kernel's offsets together."""
    if any(spec.padding):
        rows, columns = spec.padding
        pixels = F.pad(pixels, [columns, columns, rows, rows] * 2)
    rows = [_window(spec, 0, i, pixels.shape[1]) for i in range(spec.kernel[0])]
    columns = [_window(spec, 1, j, pixels.shape[2]) for j in range(spec.kernel[1])]
    by_row = sum((pixels[:, i, :, i] for i in rows[1:]), pixels[:, rows[0], :, rows[0]])
    return sum((by_row[:, :, j, :, j] for j in columns[1:]), by_row[:, :, columns[0], :, columns[0]])


def _window(spec: ConvSpec, side: int, offset: int, padded: int) -> slice:
    """The padded pixels along one side that the kernel sees at one of its offsets."""
    kernel, stride, dilation = spec.kernel[side], spec.stride[side], spec.dilation[side]
    outputs = (padded - dilation * (kernel - 1) - 1) // stride + 1
    start = offset * dilation
    return slice(start, start + stride * (outputs - 1) + 1, stride)


def _by_sample_and_group(tensor: Tensor, views: int, groups: int) -> Tensor:
    """`[views * N, C, H, W]` as `[N * groups, C / groups, views * H * W]`."""
    total, c, h, w = tensor.shape
    n = total // views
    split = _upcast(tensor).reshape(views, n, groups, c // groups, h * w).permute(1, 2, 3, 0, 4)
    return split.reshape(n * groups, c // groups, views * h * w)


def _pixel_pairs(gram: Tensor, views: int, size: torch.Size) -> Tensor:
    """`[B, views * HW, views * HW]` as `[B * views * views, H, W, H, W]`."""
    h, w = size
    split = gram.reshape(-1, views, h * w, views, h * w).permute(0, 1, 3, 2, 4)
    return split.reshape(-1, h, w, h, w)


def _cross_pixel_pairs(a: Tensor, b: Tensor, views: int, groups: int) -> Tensor:
    """Pixel products between two batches: `[groups * na * views * nb * views, H, W, H, W]`."""
    h, w = a.shape[2:]
    rows, columns = (_by_group(t, views, groups) for t in (a, b))
    gram = torch.bmm(rows, columns.transpose(1, 2))
    split = gram.reshape(groups, rows.shape[1] // (h * w), h * w, columns.shape[1] // (h * w), h * w)
    return split.permute(0, 1, 3, 2, 4).reshape(-1, h, w, h, w)


def _by_group(tensor: Tensor, views: int, groups: int) -> Tensor:
    """`[views * N, C, H, W]` as `[groups, N * views * H * W, C / groups]`."""
    total, c, h, w = tensor.shape
    split = _upcast(tensor).reshape(views, total // views, groups, c // groups, h * w)
    return split.permute(2, 1, 0, 4, 3).reshape(groups, total * h * w, c // groups)


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
