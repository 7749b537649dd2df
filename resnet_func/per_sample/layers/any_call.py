"""Any call `f(x, p)`, differentiated by itself, one sample at a time, under `vmap`; so is attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from resnet_func.per_sample.intercept import substitute
from resnet_func.per_sample.layers.factors import CallFactors, Direct
from resnet_func.per_sample.layers.layer import Found, Layer, direct, in_front, is_one_of


def any_call(layer: Layer) -> Found:
    """The call differentiated by itself, a sample at a time."""
    if not in_front([*layer.batched, *layer.cotangents], layer):
        shapes = [list(tensor.shape) for tensor in (*layer.batched, *layer.cotangents)]
        raise ValueError(
            f"{layer.name} takes a trainable leaf, and tensors that do not all lead with the "
            f"{layer.samples * layer.views} samples of the batch: {', '.join(map(str, shapes))}. Keep the "
            "batch dimension in front, or use method='vmap'"
        )
    if not layer.batched:
        return {tensor: _expanded(layer, tensor) for tensor in layer.parameters}
    return _call_factors(layer, (0,) * len(layer.batched), (0,) * len(layer.cotangents))


def attention(layer: Layer, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Found | None:
    """`F.multi_head_attention_forward`, whose batch is its second dimension."""
    ins = [1 if is_one_of(tensor, [query, key, value]) else 0 for tensor in layer.batched]
    outs = [1 if index == 0 else 0 for index in layer.indices]
    return _call_factors(layer, tuple(ins), tuple(outs))


def _call_factors(layer: Layer, ins: tuple[int, ...], outs: tuple[int, ...]) -> Found:
    """The factors of a call whose inputs and outputs have their samples at these dimensions."""
    inputs = [x.movedim(dim, 0) for x, dim in zip(layer.batched, ins, strict=True)]
    cotangents = [g.movedim(dim, 0) for g, dim in zip(layer.cotangents, outs, strict=True)]
    if not in_front([*inputs, *cotangents], layer):
        raise ValueError(f"{layer.name} has lost the batch dimension; use method='vmap'")
    return {
        tensor: CallFactors(
            _function(layer, tensor, ins, outs), tensor, tuple(inputs), tuple(cotangents), layer.views
        )
        for tensor in layer.parameters
    }


def _function(
    layer: Layer, parameter: Tensor, ins: tuple[int, ...], outs: tuple[int, ...]
) -> Callable[..., tuple[Tensor, ...]]:
    """The call as a function of one parameter and of the tensors that carry samples, these in front."""

    def function(weight: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        moved = [x.movedim(0, dim) for x, dim in zip(inputs, ins, strict=True)]
        values: Mapping[Tensor, Tensor] = {parameter: weight, **dict(zip(layer.batched, moved, strict=True))}
        args, kwargs = substitute((layer.args, layer.kwargs), values)
        result = layer.func(*args, **kwargs)
        outputs = [result] if isinstance(result, Tensor) else result
        chosen = zip(layer.indices, outs, strict=True)
        return tuple([outputs[index].movedim(dim, 0) for index, dim in chosen])

    return function


def _expanded(layer: Layer, parameter: Tensor) -> Direct:
    """A leaf that is expanded to a batch, as a class token is: every sample has its own copy."""
    function = _function(layer, parameter, (), (0,))
    pullback = torch.func.vjp(lambda weight: function(weight)[0][:1], parameter)[1]
    by_view = torch.vmap(lambda cotangent: pullback(cotangent.unsqueeze(0))[0])(layer.cotangent)
    return direct(by_view, parameter, layer.views)
