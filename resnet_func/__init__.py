"""ResNets as pure functions over parameter pytrees, open to every `torch.func` transform.

Names are imported when they are first asked for: `resnet-func --help` waits for no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from resnet_func.models import variants

if TYPE_CHECKING:
    from resnet_func import (
        attribution,
        calibration,
        curvature,
        distributed,
        losses,
        optim,
        per_sample,
        privacy,
        train,
        tree,
    )
    from resnet_func.models import winograd, zoo
    from resnet_func.models.config import ResNetConfig
    from resnet_func.models.interop.load import load_network
    from resnet_func.models.interop.modules import from_function, from_module
    from resnet_func.models.interop.pretrained import pretrained
    from resnet_func.models.interop.state_dicts import from_state_dict, to_state_dict
    from resnet_func.models.interop.to_module import to_module
    from resnet_func.models.resnet import build
    from resnet_func.models.zoo import (
        resnet10,
        resnet18,
        resnet20,
        resnet32,
        resnet34,
        resnet44,
        resnet50,
        resnet56,
        resnet101,
        resnet110,
        resnet152,
        resnext50_32x4d,
        resnext101_32x8d,
        resnext101_64x4d,
        wide_resnet50_2,
        wide_resnet101_2,
        wrn_10_2,
        wrn_16_4,
        wrn_28_10,
        wrn_40_4,
    )
    from resnet_func.types import Model, TrainState

__version__ = "0.1.0"

_HOMES = {
    "attribution": "attribution",
    "calibration": "calibration",
    "curvature": "curvature",
    "distributed": "distributed",
    "losses": "losses",
    "optim": "optim",
    "per_sample": "per_sample",
    "privacy": "privacy",
    "train": "train",
    "tree": "tree",
    "winograd": "models.winograd",
    "zoo": "models.zoo",
}
"""Modules of the library, and where each lies."""

_NAMES = {
    "Model": "types",
    "ResNetConfig": "models.config",
    "TrainState": "types",
    "build": "models.resnet",
    "from_function": "models.interop.modules",
    "from_module": "models.interop.modules",
    "from_state_dict": "models.interop.state_dicts",
    "load_network": "models.interop.load",
    "pretrained": "models.interop.pretrained",
    "to_module": "models.interop.to_module",
    "to_state_dict": "models.interop.state_dicts",
    **dict.fromkeys(variants.ZOO, "models.zoo"),
}
"""Names of other modules that are the library's own, too."""

__all__ = [*_HOMES, *_NAMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = importlib.import_module(f"resnet_func.{_HOMES[name]}")
    elif name in _NAMES:
        value = getattr(importlib.import_module(f"resnet_func.{_NAMES[name]}"), name)
    else:
        raise AttributeError(f"module 'resnet_func' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
