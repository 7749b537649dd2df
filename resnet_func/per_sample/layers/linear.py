"""Linear layers with any leading dimensions, and embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_func.per_sample.layers.factors import ConvFactors, EmbeddingFactors, LinearFactors
from resnet_func.per_sample.layers.ghost import ConvSpec
from resnet_func.per_sample.layers.layer import Found, Layer, direct, is_one_of, leads


def linear(layer: Layer, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Found | None:
    if not leads(input, layer) or weight.ndim != 2 or input.ndim < 2:
        return None
    g = layer.cotangent
    found: Found = {}
    if is_one_of(weight, layer.parameters):
        if input.ndim == 2:
            found[weight] = LinearFactors(weight, input, g, layer.views)
        else:  # positions are pixels of a convolution
            spec = ConvSpec((*weight.shape, 1, 1), (1, 1), (0, 0), (1, 1))
            a, g_pixels = (t.flatten(1, -2).transpose(1, 2).unsqueeze(2) for t in (input, g))
            found[weight] = ConvFactors(spec, weight, a, g_pixels, layer.views)
    if bias is not None and is_one_of(bias, layer.parameters):
        by_view = g.flatten(1, -2).sum(1) if g.ndim > 2 else g
        found[bias] = direct(by_view, bias, layer.views)
    return found


def embedding(
    layer: Layer,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Found | None:
    if not leads(input, layer):
        return None
    if max_norm is not None or scale_grad_by_freq:
        raise ValueError(
            "an embedding with max_norm or scale_grad_by_freq has no per-sample gradients: the first changes "
            "its weight in place, the second counts words over the batch. Leave them out"
        )
    indices = input.reshape(input.shape[0], -1)
    g = layer.cotangent.reshape(*indices.shape, -1)
    if padding_idx is not None:  # its row gets no gradient
        row = padding_idx % weight.shape[0]
        g = torch.where((indices == row).unsqueeze(2), 0, g)
    return {weight: EmbeddingFactors(weight, indices, g, layer.views)}
