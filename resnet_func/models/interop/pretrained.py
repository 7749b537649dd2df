"""torchvision's trained weights as `(params, state)`."""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.error import URLError

import torch

from resnet_func.models import zoo
from resnet_func.models.interop.state_dicts import from_state_dict
from resnet_func.types import Model, Params, State


class Pretrained(NamedTuple):
    """A network with trained weights, and torchvision's entry for them.

    `weights.transforms()` is the preprocessing the network expects, `weights.meta["categories"]` its classes.
    """

    model: Model
    params: Params
    state: State
    weights: Any


def pretrained(name: str, weights: str = "DEFAULT") -> Pretrained:
    """One of torchvision's ten networks with its trained weights, downloaded once into torch's cache.

    Args:
        name: A key of `zoo.IMAGENET`, such as "resnet50".
        weights: torchvision's name for the weights: "DEFAULT" (the best), "IMAGENET1K_V1", ...

    Returns:
        `(model, params, state, weights)`.

    Raises:
        ValueError: no such network or weights.
        ConnectionError: the weights are not in the cache and could not be downloaded.

    >>> pretrained("resnet18", "NONE")
    Traceback (most recent call last):
    ValueError: resnet18 has no weights 'NONE'; it has IMAGENET1K_V1, DEFAULT
    """
    from torchvision.models import get_model_weights  # takes a second, and nothing else needs it

    if name not in zoo.IMAGENET:
        raise ValueError(f"torchvision has no weights for {name!r}; it has {', '.join(zoo.IMAGENET)}")
    available = get_model_weights(name)
    if weights not in available.__members__:
        raise ValueError(f"{name} has no weights {weights!r}; it has {', '.join(available.__members__)}")
    entry = available[weights]
    try:
        state_dict = entry.get_state_dict(progress=False, check_hash=True)
    except URLError as error:
        raise ConnectionError(
            f"could not download {entry.url} ({error.reason}). Connect to the network, or put the file in "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error
    model = zoo.by_name(name, num_classes=len(entry.meta["categories"]))
    return Pretrained(model, *from_state_dict(model, state_dict), entry)
