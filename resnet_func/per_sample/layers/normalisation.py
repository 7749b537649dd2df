"""Normalisation by running statistics, groups, instances, layers and root mean squares."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resnet_func.autodiff import can_read, is_differentiated
from resnet_func.per_sample.layers.contract import group_norm_grads
from resnet_func.per_sample.layers.layer import Found, Layer, Rule, arguments, direct, is_one_of, leads


def normalisation(name: str, *, over: str) -> Rule:
    """The rule of a normalisation, by torch's name for it.

    The affine part is undone by calling the function without it. `over` says where the parameters lie:
    "channels" (dimension 1) or "last" (the normalised shape).
    """

    def rule(layer: Layer, *args: Any, **kwargs: Any) -> Found | None:
        given = arguments(name, args, kwargs)
        x, weight, bias = given["input"], given.get("weight"), given.get("bias")
        if not leads(x, layer):
            return None
        g, found = layer.cotangent, {}
        kept = 2 if over == "channels" else g.ndim - len(given["normalized_shape"])

        def reduce(t: Tensor) -> Tensor:
            if over == "channels":
                return t.flatten(kept).sum(kept) if t.ndim > kept else t
            return t.flatten(1, kept - 1).sum(1) if kept > 1 else t

        if weight is not None and is_one_of(weight, layer.parameters):
            plain = layer.func(**{**given, "weight": None, **({"bias": None} if "bias" in given else {})})
            found[weight] = direct(reduce(g * plain.to(g.dtype)), weight, layer.views)
        if bias is not None and is_one_of(bias, layer.parameters):
            found[bias] = direct(reduce(g), bias, layer.views)
        return found

    return rule


_group_norm_by_layer = normalisation("group_norm", over="channels")


def group_norm(
    layer: Layer,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Found | None:
    """From the statistics that the forward pass kept, where no transform looks on: no copy is normalised."""
    g = layer.cotangent
    tensors = [input, g, *layer.statistics]
    plain = not any(not can_read(tensor) or is_differentiated(tensor) for tensor in tensors)
    alike = layer.statistics and all(tensor.dtype == g.dtype for tensor in layer.statistics)
    if not (plain and alike and leads(input, layer) and g.numel()):
        return _group_norm_by_layer(layer, input, num_groups, weight, bias, eps)
    grads = group_norm_grads(input.to(g.dtype), g, layer.statistics, num_groups)
    affine = zip((weight, bias), grads, strict=True)
    return {
        leaf: direct(by_view, leaf, layer.views)
        for leaf, by_view in affine
        if leaf is not None and is_one_of(leaf, layer.parameters)
    }
