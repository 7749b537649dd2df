"""The zoo: a function for every named ResNet of `variants`."""

from __future__ import annotations

from typing import Unpack

from resnet_func.models.config import ConfigChanges
from resnet_func.models.resnet import build
from resnet_func.models.variants import CIFAR, IMAGENET, WIDE, ZOO, config
from resnet_func.types import Model

__all__ = ["CIFAR", "IMAGENET", "WIDE", "ZOO", "by_name", "config"]  # and the functions below


def by_name(name: str, **changes: Unpack[ConfigChanges]) -> Model:
    """The named ResNet; arguments and errors as in `config`.

    >>> by_name("resnet20", norm="group").config.norm
    'group'
    """
    return build(config(name, **changes))


def resnet18(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNet-18 for ImageNet: 8 basic blocks, 11.7 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. He et al. 2015, https://arxiv.org/abs/1512.03385.

    >>> resnet18(num_classes=7).config.num_classes
    7
    """
    return by_name("resnet18", **changes)


def resnet34(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNet-34 for ImageNet: 16 basic blocks, 21.8 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. He et al. 2015, https://arxiv.org/abs/1512.03385.

    >>> resnet34(num_classes=7).config.num_classes
    7
    """
    return by_name("resnet34", **changes)


def resnet50(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNet-50 for ImageNet: 16 bottlenecks, 25.6 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. He et al. 2015, https://arxiv.org/abs/1512.03385.

    >>> resnet50(num_classes=7).config.num_classes
    7
    """
    return by_name("resnet50", **changes)


def resnet101(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNet-101 for ImageNet: 33 bottlenecks, 44.5 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. He et al. 2015, https://arxiv.org/abs/1512.03385.

    >>> resnet101(num_classes=7).config.num_classes
    7
    """
    return by_name("resnet101", **changes)


def resnet152(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNet-152 for ImageNet: 50 bottlenecks, 60.2 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. He et al. 2015, https://arxiv.org/abs/1512.03385.

    >>> resnet152(num_classes=7).config.num_classes
    7
    """
    return by_name("resnet152", **changes)


def resnext50_32x4d(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNeXt-50 for ImageNet, 32 groups of 4 channels: 25.0 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. Xie et al. 2017, https://arxiv.org/abs/1611.05431.

    >>> resnext50_32x4d(num_classes=7).config.num_classes
    7
    """
    return by_name("resnext50_32x4d", **changes)


def resnext101_32x8d(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNeXt-101 for ImageNet, 32 groups of 8 channels: 88.8 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. Xie et al. 2017, https://arxiv.org/abs/1611.05431.

    >>> resnext101_32x8d(num_classes=7).config.num_classes
    7
    """
    return by_name("resnext101_32x8d", **changes)


def resnext101_64x4d(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNeXt-101 for ImageNet, 64 groups of 4 channels: 83.5 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. Xie et al. 2017, https://arxiv.org/abs/1611.05431.

    >>> resnext101_64x4d(num_classes=7).config.num_classes
    7
    """
    return by_name("resnext101_64x4d", **changes)


def wide_resnet50_2(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNet-50 for ImageNet with twice the channels inside: 68.9 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146.

    >>> wide_resnet50_2(num_classes=7).config.num_classes
    7
    """
    return by_name("wide_resnet50_2", **changes)


def wide_resnet101_2(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNet-101 for ImageNet with twice the channels inside: 126.9 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146.

    >>> wide_resnet101_2(num_classes=7).config.num_classes
    7
    """
    return by_name("wide_resnet101_2", **changes)


def resnet10(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNet-10 for CIFAR-10, wide and shallow: 4 basic blocks, 2.1 million parameters.

    It learns more in the same minutes than the deeper, narrower ones. Takes fields of `ResNetConfig`; raises
    as `config`. The widths are those of airbench, https://arxiv.org/abs/2404.00498.

    >>> resnet10(num_classes=7).config.num_classes
    7
    """
    return by_name("resnet10", **changes)


def resnet20(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNet-20 for CIFAR-10: 9 basic blocks, 0.27 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. https://arxiv.org/abs/1512.03385, section 4.2.

    >>> resnet20(num_classes=7).config.num_classes
    7
    """
    return by_name("resnet20", **changes)


def resnet32(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNet-32 for CIFAR-10: 15 basic blocks, 0.46 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. https://arxiv.org/abs/1512.03385, section 4.2.

    >>> resnet32(num_classes=7).config.num_classes
    7
    """
    return by_name("resnet32", **changes)


def resnet44(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNet-44 for CIFAR-10: 21 basic blocks, 0.66 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. https://arxiv.org/abs/1512.03385, section 4.2.

    >>> resnet44(num_classes=7).config.num_classes
    7
    """
    return by_name("resnet44", **changes)


def resnet56(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNet-56 for CIFAR-10: 27 basic blocks, 0.85 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. https://arxiv.org/abs/1512.03385, section 4.2.

    >>> resnet56(num_classes=7).config.num_classes
    7
    """
    return by_name("resnet56", **changes)


def resnet110(**changes: Unpack[ConfigChanges]) -> Model:
    """ResNet-110 for CIFAR-10: 54 basic blocks, 1.7 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. https://arxiv.org/abs/1512.03385, section 4.2.

    >>> resnet110(num_classes=7).config.num_classes
    7
    """
    return by_name("resnet110", **changes)


def wrn_10_2(**changes: Unpack[ConfigChanges]) -> Model:
    """Wide ResNet 10-2 for CIFAR-10: 3 pre-activation blocks, 0.30 million parameters.

    Few layers and few parameters, as private training wants them. Takes fields of `ResNetConfig`; raises as
    `config`. Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146.

    >>> wrn_10_2(num_classes=7).config.num_classes
    7
    """
    return by_name("wrn_10_2", **changes)


def wrn_16_4(**changes: Unpack[ConfigChanges]) -> Model:
    """Wide ResNet 16-4 for CIFAR-10: 6 pre-activation blocks, 2.7 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146.

    >>> wrn_16_4(num_classes=7).config.num_classes
    7
    """
    return by_name("wrn_16_4", **changes)


def wrn_28_10(**changes: Unpack[ConfigChanges]) -> Model:
    """Wide ResNet 28-10 for CIFAR-10: 12 pre-activation blocks, 36.5 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146.

    >>> wrn_28_10(num_classes=7).config.num_classes
    7
    """
    return by_name("wrn_28_10", **changes)


def wrn_40_4(**changes: Unpack[ConfigChanges]) -> Model:
    """Wide ResNet 40-4 for CIFAR-10: 18 pre-activation blocks, 8.9 million parameters.

    Takes fields of `ResNetConfig`; raises as `config`. Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146.

    >>> wrn_40_4(num_classes=7).config.num_classes
    7
    """
    return by_name("wrn_40_4", **changes)
