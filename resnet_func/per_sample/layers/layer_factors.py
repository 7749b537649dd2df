"""From a captured call and its cotangent to the factors of its leaves: what each kind of layer is.

Known: convolutions of one to three dimensions and their transposes, linear layers with any leading
dimensions, normalisation by running statistics, groups, instances, layers and root mean squares, embeddings,
attention. Any other call `f(x, p)` is differentiated by itself, one sample at a time, under `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from resnet_func.models import winograd
from resnet_func.per_sample.layers.any_call import any_call, attention
from resnet_func.per_sample.layers.convolutions import convolution
from resnet_func.per_sample.layers.layer import Found, Layer, Rule
from resnet_func.per_sample.layers.linear import embedding, linear
from resnet_func.per_sample.layers.normalisation import group_norm, normalisation

CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d, winograd.convolution)
TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
RULES: dict[Callable[..., Any], Rule] = {
    **dict.fromkeys(CONVOLUTIONS, convolution(transposed=False)),
    **dict.fromkeys(TRANSPOSED, convolution(transposed=True)),
    F.linear: linear,
    F.embedding: embedding,
    F.multi_head_attention_forward: attention,
    F.batch_norm: normalisation("batch_norm", over="channels"),
    F.instance_norm: normalisation("instance_norm", over="channels"),
    F.group_norm: group_norm,
    F.layer_norm: normalisation("layer_norm", over="last"),
    F.rms_norm: normalisation("rms_norm", over="last"),
}


# of which a plan chooses the way
CHOSEN = (*CONVOLUTIONS, *TRANSPOSED, F.linear)


def factors_of_layer(layer: Layer) -> Found:
    """The factors of every parameter of a call, by the tensor that the call was given.

    Raises:
        ValueError: the batch is not in front of what the call takes and returns.
    """
    rule = RULES.get(layer.func)
    known = (rule(layer, *layer.args, **layer.kwargs) if rule is not None else None) or {}
    found = {tensor: known[tensor] for tensor in layer.parameters if tensor in known}
    if len(found) < len(dict.fromkeys(layer.parameters)):  # a parameter where the layer has none, say
        found = {**any_call(layer), **found}
    return found
