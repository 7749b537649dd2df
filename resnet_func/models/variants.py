"""Every named ResNet as a line of data. Imports no torch, so that a name is checked at once."""

from __future__ import annotations

from typing import Any, Unpack

from resnet_func.models.config import ConfigChanges, ResNetConfig

IMAGENET: dict[str, dict[str, Any]] = {
    "resnet18": {"block": "basic", "depths": (2, 2, 2, 2)},
    "resnet34": {"block": "basic", "depths": (3, 4, 6, 3)},
    "resnet50": {"block": "bottleneck", "depths": (3, 4, 6, 3)},
    "resnet101": {"block": "bottleneck", "depths": (3, 4, 23, 3)},
    "resnet152": {"block": "bottleneck", "depths": (3, 8, 36, 3)},
    "resnext50_32x4d": {"block": "bottleneck", "depths": (3, 4, 6, 3), "groups": 32, "width_per_group": 4},
    "resnext101_32x8d": {"block": "bottleneck", "depths": (3, 4, 23, 3), "groups": 32, "width_per_group": 8},
    "resnext101_64x4d": {"block": "bottleneck", "depths": (3, 4, 23, 3), "groups": 64, "width_per_group": 4},
    "wide_resnet50_2": {"block": "bottleneck", "depths": (3, 4, 6, 3), "width_per_group": 128},
    "wide_resnet101_2": {"block": "bottleneck", "depths": (3, 4, 23, 3), "width_per_group": 128},
}
"""torchvision's ten: 7x7 stem, 1000 classes."""


def _cifar(depth: int) -> dict[str, Any]:
    return {
        "block": "basic",
        "depths": ((depth - 2) // 6,) * 3,
        "widths": (16, 32, 64),
        "stem": "cifar",
        "shortcut": "pad",
        "norm_groups": 8,
        "num_classes": 10,
    }


def _wide(depth: int, widen: int) -> dict[str, Any]:
    return {
        "block": "preact",
        "depths": ((depth - 4) // 6,) * 3,
        "widths": (16 * widen, 32 * widen, 64 * widen),
        "stem_width": 16,
        "stem": "cifar",
        "norm_groups": 8,
        "num_classes": 10,
    }


CIFAR: dict[str, dict[str, Any]] = {
    **{f"resnet{depth}": _cifar(depth) for depth in (20, 32, 44, 56, 110)},
    "resnet10": {
        "block": "basic",
        "depths": (1, 1, 1, 1),
        "widths": (24, 64, 256, 256),
        "stem": "cifar",
        "norm_groups": 8,
        "num_classes": 10,
    },
}
"""He et al. 2015, section 4.2: option-A shortcuts (`shortcut="projection"` is option B). And a wide, shallow
one that learns more in the same minutes: the widths of airbench (https://arxiv.org/abs/2404.00498)."""

WIDE: dict[str, dict[str, Any]] = {
    "wrn_10_2": _wide(10, 2),
    "wrn_16_4": _wide(16, 4),
    "wrn_28_10": _wide(28, 10),
    "wrn_40_4": _wide(40, 4),
}
"""Zagoruyko and Komodakis 2016: pre-activation Wide ResNets, WRN-depth-widening."""

ZOO: dict[str, dict[str, Any]] = {**IMAGENET, **CIFAR, **WIDE}


def config(name: str, **changes: Unpack[ConfigChanges]) -> ResNetConfig:
    """The config of a named ResNet, with fields changed.

    Args:
        name: A key of `ZOO`.
        **changes: Fields of `ResNetConfig`, such as `num_classes=10, stem="cifar", norm="group"`.

    Raises:
        ValueError: no such network, no such field, or a combination `ResNetConfig` refuses.

    >>> config("resnet20", num_classes=100).num_classes
    100
    """
    if name not in ZOO:
        raise ValueError(f"no network is called {name!r}; the zoo has {', '.join(ZOO)}")
    unknown = [field for field in changes if field not in ResNetConfig.__dataclass_fields__]
    if unknown:
        fields = ", ".join(ResNetConfig.__dataclass_fields__)
        raise ValueError(f"ResNetConfig has no field {', '.join(unknown)}; its fields are {fields}")
    return ResNetConfig(**{**ZOO[name], **changes})
