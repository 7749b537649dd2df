"""The networks of `per_sample`: torchvision's and timm's own modules, and some written by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import SkipTest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_func as rf
from parity.steps import perturbed, with_small_branches
from resnet_func import tree
from resnet_func.testing import generator, randn
from resnet_func.types import Model, Params, State

CLASSES = 3
LARGE = 30_000_000  # parameters, above which two samples must do: a sample's gradient is as large


class Case(NamedTuple):
    """A network in float64, and a batch."""

    model: Model
    params: Params
    state: State
    x: Tensor
    y: Tensor


# --------------------------------------------------------------------------- written by hand


class TiedAutoencoder(nn.Module):
    """A weight as it is, and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 12)), nn.Parameter(torch.randn(5))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(torch.tanh(F.linear(x, self.weight, self.bias)), self.weight.T))


class Words(nn.Module):
    """Embedded words, of which one is padding, averaged and classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 8, padding_idx=0), nn.LayerNorm(8)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.norm(self.embed(words)))).mean(1))


def convolutional(rank: int) -> nn.Module:
    """A small network of convolutions of this rank, one transposed."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[rank - 1]
    return nn.Sequential(
        conv(2, 4, 3, stride=2, padding=1, bias=False), norm(4), nn.ReLU(),
        conv(4, 6, 3, groups=2, dilation=2, padding="same"), nn.GroupNorm(2, 6), nn.Tanh(),
        transposed(6, 4, 2, stride=2), pool(1), nn.Flatten(), nn.Linear(4, CLASSES),
    )  # fmt: skip


HAND_WRITTEN: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "tied-autoencoder": (TiedAutoencoder, lambda n: randn(n, 12, seed=1)),
    "conv1d": (partial(convolutional, 1), lambda n: randn(n, 2, 17, seed=1)),
    "conv3d": (partial(convolutional, 3), lambda n: randn(n, 2, 6, 5, 6, seed=1)),
    "embedding": (Words, lambda n: torch.randint(0, 9, (n, 7), generator=generator(1))),
}


# --------------------------------------------------------------------------- by name

TORCHVISION = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)
TIMM = (
    *("resnet18", "resnet50", "resnet26d", "resnetrs50", "seresnet50", "ecaresnet50d", "resnetv2_50"),
    *("convnext_atto", "vit_tiny_patch16_224"),
)
SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"torchvision:{name}-batch": (f"torchvision:{name}", {}) for name in TORCHVISION},
    **{
        f"torchvision:{name}-group": (f"torchvision:{name}", {"norm_layer": partial(nn.GroupNorm, 32)})
        for name in TORCHVISION
    },
    **{f"timm:{name}": (f"timm:{name}", {"img_size": 32} if "vit" in name else {}) for name in TIMM},
}


def load(spec: str, keywords: dict[str, Any]) -> Case:
    """A network by name, every affine parameter and statistic random, its residual branches small."""
    try:
        model, params, state = rf.load_network(spec, generator=generator(0), num_classes=CLASSES, **keywords)
    except ImportError as error:
        raise SkipTest(str(error)) from None
    params, state = tree.map(double, params), tree.map(double, state)
    params, state = perturbed(with_small_branches(params), state, seed=2)
    return batched(model, params, state, lambda n: randn(n, 3, 32, 32, seed=1))


def case(name: str) -> Case:
    """The network of that name, of `SPECS` or `HAND_WRITTEN`."""
    return load(*SPECS[name]) if name in SPECS else write_by_hand(name)


def write_by_hand(name: str) -> Case:
    make, inputs = HAND_WRITTEN[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = make()
    model, params, state = rf.from_module(module.double())
    return batched(model, *perturbed(params, state, seed=2), inputs)


def batched(model: Model, params: Params, state: State, inputs: Callable[[int], Tensor]) -> Case:
    n = 3 if tree.size(params) < LARGE else 2
    return Case(model, params, state, double(inputs(n)), torch.arange(n) % CLASSES)


def double(leaf: Tensor) -> Tensor:
    """A leaf in float64; whole numbers as they are."""
    return leaf.double() if leaf.is_floating_point() else leaf
