"""Functions that change how a network computes: its precision, its views of an image, its memory format."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.types import Apply, Images, Logits, Model, Params, State


def autocast(model: Model, device_type: str, dtype: torch.dtype) -> Model:
    """The model with its forward pass in mixed precision; parameters, logits and state stay as they are.

    Args:
        model: Any model with float32 parameters.
        device_type: "cpu" or "cuda".
        dtype: The precision of convolutions and matrix products, such as `torch.bfloat16`.

    >>> import resnet_func as rf
    >>> model = autocast(rf.resnet20(depths=(1, 1, 1)), "cpu", torch.bfloat16)
    >>> params, state = model.init(torch.Generator().manual_seed(0))
    >>> model.apply(params, state, torch.zeros(1, 3, 8, 8), train=False)[0].dtype
    torch.float32
    """
    return model._replace(apply=partial(_apply_in_mixed_precision, model.apply, device_type, dtype))


def _apply_in_mixed_precision(
    apply: Apply,
    device_type: str,
    dtype: torch.dtype,
    params: Params,
    state: State,
    x: Images,
    *,
    train: bool,
) -> tuple[Logits, State]:
    with torch.autocast(device_type, dtype):
        logits, state = apply(params, state, x, train=train)
    return logits.float(), state


def average_flips(model: Model) -> Model:
    """The model whose logits are averaged over an image and its mirror image, for use at test time.

    Twice the cost. The state comes from the upright image.

    >>> import resnet_func as rf
    >>> model = average_flips(rf.resnet20(depths=(1, 1, 1)))
    >>> params, state = model.init(torch.Generator().manual_seed(0))
    >>> model.apply(params, state, torch.zeros(1, 3, 8, 8), train=False)[0].shape
    torch.Size([1, 10])
    """
    return model._replace(apply=partial(_apply_to_both_sides, model.apply))


def _apply_to_both_sides(
    apply: Apply, params: Params, state: State, x: Images, *, train: bool
) -> tuple[Logits, State]:
    upright, new_state = apply(params, state, x, train=train)
    mirrored, _ = apply(params, state, x.flip(3), train=train)
    return (upright + mirrored) / 2, new_state


def to_memory_format(params: Params, memory_format: torch.memory_format) -> Params:
    """The tree with its four-dimensional leaves, convolution weights, in a memory format.

    >>> params = to_memory_format({"weight": torch.zeros(2, 3, 3, 3)}, torch.channels_last)
    >>> params["weight"].stride()
    (27, 1, 9, 3)
    """

    def place(leaf: Tensor) -> Tensor:
        return leaf.contiguous(memory_format=memory_format) if leaf.ndim == 4 else leaf

    return tree.map(place, params)
