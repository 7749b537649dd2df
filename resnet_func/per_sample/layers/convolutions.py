"""Convolutions of one to three dimensions, and their transposes."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from resnet_func.per_sample.layers.factors import ConvFactors
from resnet_func.per_sample.layers.ghost import ConvSpec
from resnet_func.per_sample.layers.layer import Found, Layer, Rule, arguments, direct, is_one_of, leads


def convolution(*, transposed: bool) -> Rule:
    """The rule of a convolution.

    The weight's gradient of a transposed one is that of the convolution from the output to the input.
    """
    name = "conv_transpose2d" if transposed else "conv2d"  # the arguments are those of any rank

    def rule(layer: Layer, *args: Any, **kwargs: Any) -> Found | None:
        given = arguments(name, args, kwargs)
        x, weight, padding = given["input"], given["weight"], given.get("padding", 0)
        if not leads(x, layer):
            return None  # a weight that meets the batch as the image of a convolution: not a layer
        rank = weight.ndim - 2
        stride, dilation = (_each(given.get(name, 1), rank) for name in ("stride", "dilation"))
        if isinstance(padding, str):
            x, padding = _string_padding(padding, x, tuple(weight.shape[2:]), dilation)
        shape = tuple(weight.shape)
        spec = ConvSpec(shape, stride, _each(padding, rank), dilation, given.get("groups", 1))
        pair = (layer.cotangent, x) if transposed else (x, layer.cotangent)
        return _conv_factors(layer, spec, weight, *pair) | _channel_bias(layer, given.get("bias"))

    return rule


def _string_padding(
    padding: str, x: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """ "same" and "valid" in numbers; what is not the same on both sides is padded here."""
    totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return x, tuple([total // 2 for total in totals])
    sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return F.pad(x, sides), (0,) * len(kernel)


def _conv_factors(layer: Layer, spec: ConvSpec, weight: Tensor, inputs: Tensor, cotangents: Tensor) -> Found:
    if len(spec.kernel) == 1:  # as rows of images
        one = (1,)
        shape = (*spec.weight_shape[:2], 1, *spec.kernel)
        spec = ConvSpec(shape, one + spec.stride, (0, *spec.padding), one + spec.dilation, spec.groups)
        inputs, cotangents = inputs.unsqueeze(2), cotangents.unsqueeze(2)
    return {weight: ConvFactors(spec, weight, inputs, cotangents, layer.views)}


def _each(value: Any, rank: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * rank
    return tuple(value) * rank if len(value) == 1 else tuple(value)


def _channel_bias(layer: Layer, bias: Tensor | None) -> Found:
    if bias is None or not is_one_of(bias, layer.parameters):
        return {}
    g = layer.cotangent
    by_view = g.flatten(2).sum(2) if g.ndim > 2 else g
    return {bias: direct(by_view, bias, layer.views)}
