"""The layers that generated modules are made of, each by a name and its options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


class Layer(NamedTuple):
    """A layer by its kind and options; with a shortcut, what goes in is added to what comes out."""

    kind: str
    options: dict[str, Any]
    shortcut: bool = False


def build_layer(layer: Layer, shape: Sequence[int]) -> nn.Module:
    """The module of a layer that takes one sample of a shape; it draws from the global generator.

    >>> build_layer(Layer("linear", {"channels": 2}), [5, 3])
    Linear(in_features=3, out_features=2, bias=True)
    """
    return BUILDERS[layer.kind](shape, **layer.options)


# --------------------------------------------------------------------------- convolutions

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def convolution(
    shape: Sequence[int], channels: int, kernel: int, *, derived: str = "none", **options: Any
) -> nn.Module:
    rank = len(shape) - 2
    return derive(CONVOLUTIONS[rank](shape[0], channels, kernel, **options), derived)


def transposed(shape: Sequence[int], channels: int, kernel: int, **options: Any) -> nn.Module:
    return TRANSPOSED[len(shape) - 2](shape[0], channels, kernel, **options)


def tied_convolution(shape: Sequence[int], kernel: int, bias: bool) -> nn.Module:
    same = CONVOLUTIONS[len(shape) - 2](shape[0], shape[0], kernel, padding=kernel // 2, bias=bias)
    return UsedTwice(same)


class UsedTwice(nn.Module):
    """One layer, applied twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


# --------------------------------------------------------------------------- weights that are derived


def derive(layer: nn.Module, how: str) -> nn.Module:
    """The layer with a weight computed from its parameters in every forward pass."""
    if how == "standardized":
        parametrize.register_parametrization(layer, "weight", Standardized())
    elif how == "doubled":
        parametrize.register_parametrization(layer, "weight", Doubled())
    elif how != "none":
        return {"weight_norm": parametrizations.weight_norm, "spectral_norm": parametrizations.spectral_norm}[
            how
        ](layer)
    return layer


class Standardized(nn.Module):
    """Every output channel's weights with mean 0 and variance 1 (Qiao et al. 2019)."""

    def forward(self, weight: Tensor) -> Tensor:
        rest = tuple(range(1, weight.ndim))
        centred = weight - weight.mean(rest, keepdim=True)
        # 0.1 where an eps belongs: a filter of two weights may have nearly no variance
        return centred / (centred.square().mean(rest, keepdim=True) + 0.1).sqrt()


class Doubled(nn.Module):
    """A derivation with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * torch.sin(weight)


# --------------------------------------------------------------------------- linear, norms, elementwise


def linear(shape: Sequence[int], channels: int, *, bias: bool = True, derived: str = "none") -> nn.Module:
    return derive(nn.Linear(shape[-1], channels, bias=bias), derived)


def tied_linear(shape: Sequence[int], bias: bool) -> nn.Module:
    return UsedTwice(nn.Linear(shape[-1], shape[-1], bias=bias))


def batch_norm(shape: Sequence[int]) -> nn.Module:
    return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2](shape[0])


def instance_norm(shape: Sequence[int]) -> nn.Module:
    return (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[len(shape) - 2](shape[0], affine=True)


def layer_norm(shape: Sequence[int]) -> nn.Module:
    """Over the features of a position, or over a whole map."""
    return nn.LayerNorm(list(shape)) if len(shape) > 2 else nn.LayerNorm(shape[-1])


class Scale(nn.Module):
    """A learned factor for each channel (the first dimension of a sample), or one for all."""

    def __init__(self, shape: Sequence[int], shared: bool) -> None:
        super().__init__()
        size = [] if shared else [shape[0], *[1] * (len(shape) - 1)]
        self.factor = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "conv": convolution,
    "transposed_conv": transposed,
    "tied_conv": tied_convolution,
    "linear": linear,
    "tied_linear": tied_linear,
    "batch_norm": batch_norm,
    "group_norm": lambda shape: nn.GroupNorm(2, shape[0]),
    "layer_norm": layer_norm,
    "instance_norm": instance_norm,
    "rms_norm": lambda shape: nn.RMSNorm(shape[-1]),
    "prelu": lambda shape, shared: nn.PReLU(1 if shared else shape[0]),
    "scale": Scale,
}
