"""The networks again as plain modules: `module(name)`.

torchvision has no CIFAR nets: these follow the articles, written independently of `resnet_func`. Their
attribute names are the parameters' names, so that a state_dict goes either way.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torchvision
from torch import Tensor, nn

from resnet_func.models import zoo

Norm = Callable[[int], nn.Module]


class OptionA(nn.Module):
    """Every other pixel, and zero channels on both sides: He et al. 2015, section 4.2."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = c_out - c_in, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., :: self.stride, :: self.stride]
        n, _, h, w = x.shape
        before = x.new_zeros(n, self.extra // 2, h, w)
        after = x.new_zeros(n, self.extra - self.extra // 2, h, w)
        return torch.cat([before, x, after], 1)


class CifarBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, option: str, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = norm(c_out)
        self.downsample = None
        if stride == 2 and option == "A":
            self.downsample = OptionA(c_in, c_out, stride)
        elif stride == 2:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), norm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + identity)


class CifarResNet(nn.Module):
    """ResNet-(6n+2): three stages of n blocks with 16, 32, 64 channels; or stages of other widths."""

    def __init__(
        self,
        n: int,
        option: str = "A",
        norm: Norm = nn.BatchNorm2d,
        num_classes: int = 10,
        widths: tuple[int, ...] = (16, 32, 64),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = norm(widths[0])

        def stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
            first = CifarBlock(c_in, c_out, stride, option, norm)
            return nn.Sequential(first, *(CifarBlock(c_out, c_out, 1, option, norm) for _ in range(n - 1)))

        self.layer1 = stage(widths[0], widths[0], 1)
        for index, (c_in, c_out) in enumerate(pairwise(widths), start=2):
            self.add_module(f"layer{index}", stage(c_in, c_out, 2))
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        for name, stage in self.named_children():
            if name.startswith("layer"):
                x = stage(x)
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class WideBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.bn1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.downsample = None
        if c_in != c_out or stride == 2:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(out)
        return self.conv2(torch.relu(self.bn2(self.conv1(out)))) + identity


class WideResNet(nn.Module):
    """WRN-(6n+4)-k of Zagoruyko and Komodakis 2016, without dropout."""

    def __init__(self, n: int, k: int, norm: Norm = nn.BatchNorm2d, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)

        def stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
            first = WideBlock(c_in, c_out, stride, norm)
            return nn.Sequential(first, *(WideBlock(c_out, c_out, 1, norm) for _ in range(n - 1)))

        self.layer1 = stage(16, 16 * k, 1)
        self.layer2 = stage(16 * k, 32 * k, 2)
        self.layer3 = stage(32 * k, 64 * k, 2)
        self.bn1 = norm(64 * k)
        self.fc = nn.Linear(64 * k, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = torch.relu(self.bn1(x))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def cifar_resnet(
    name: str, option: str | None = None, norm: Norm = nn.BatchNorm2d, num_classes: int = 10
) -> CifarResNet:
    """The module of a name of `zoo.CIFAR`; `option` is its shortcut, by default its own."""
    if name == "resnet10":
        return CifarResNet(1, option or "B", norm, num_classes, widths=(24, 64, 256, 256))
    return CifarResNet((int(name.removeprefix("resnet")) - 2) // 6, option or "A", norm, num_classes)


def module(name: str, option: str | None = None) -> nn.Module:
    """The module of a network of the zoo, without arguments but the CIFAR networks' shortcut option."""
    if name in zoo.IMAGENET:
        return getattr(torchvision.models, name)()
    if name in zoo.WIDE:
        depth, widen = map(int, name.removeprefix("wrn_").split("_"))
        return WideResNet((depth - 4) // 6, widen)
    return cifar_resnet(name, option)
