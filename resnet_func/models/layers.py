"""Layers as pure functions: `layer(spec, params, state, x, train=) -> (y, state)`.

A spec is a layer's frozen hyper-parameters; `init_layer` makes its parameters and state from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_func.types import Params, State

NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1  # the weight of the NEW value, as in torch
STANDARDIZATION_EPS = 1e-10


@dataclass(frozen=True)
class Conv:
    """A square convolution without bias."""

    c_in: int
    c_out: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    standardize: bool = False

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.c_out, self.c_in // self.groups, self.kernel, self.kernel)

    def output_size(self, size: int) -> int:
        """Output pixels along one side for `size` input pixels."""
        return (size + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1


@dataclass(frozen=True)
class Linear:
    """A linear layer with bias."""

    c_in: int
    c_out: int


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation with affine parameters and running statistics."""

    channels: int


@dataclass(frozen=True)
class GroupNorm:
    """Group normalisation with affine parameters."""

    channels: int
    groups: int


@dataclass(frozen=True)
class Pad:
    """He et al.'s option-A shortcut: subsample, and append zero channels on both sides."""

    c_in: int
    c_out: int
    stride: int


LayerSpec: TypeAlias = Conv | Linear | BatchNorm | GroupNorm | Pad


def apply_layer(
    spec: LayerSpec, params: Params, state: State, x: Tensor, *, train: bool
) -> tuple[Tensor, State]:
    """Apply the layer a spec describes; layers without state return an empty one."""
    match spec:
        case Conv():
            return conv2d(spec, params, x), {}
        case Linear():
            return linear(params, x), {}
        case BatchNorm():
            return batch_norm(params, state, x, train=train)
        case GroupNorm():
            return group_norm(spec, params, x), {}
        case Pad():
            return pad_shortcut(spec, x), {}


def conv2d(spec: Conv, params: Params, x: Tensor) -> Tensor:
    """Convolve `x [N, c_in, H, W]`."""
    weight = standardize(params["weight"]) if spec.standardize else params["weight"]
    return F.conv2d(x, weight, None, spec.stride, spec.padding, spec.dilation, spec.groups)


def linear(params: Params, x: Tensor) -> Tensor:
    """`x @ weight.T + bias` for `x [N, c_in]`."""
    return F.linear(x, params["weight"], params["bias"])


def standardize(weight: Tensor) -> Tensor:
    """Each filter of `weight [c_out, ...]` shifted and scaled to mean 0, variance 1 (Qiao et al. 2019)."""
    variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) * torch.rsqrt(variance + STANDARDIZATION_EPS)


def batch_norm(params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Tensor, State]:
    """Batch normalisation of `x [N, C, H, W]`; training returns updated running statistics.

    Normalisation uses the biased variance, `running_var` averages the unbiased one, as in torch.
    """
    # F.batch_norm updates the statistics in place: give it copies, so that the caller's stay as they are
    mean, var = state["running_mean"], state["running_var"]
    if train:
        mean, var = mean.clone(), var.clone()
    y = F.batch_norm(x, mean, var, params["weight"], params["bias"], train, BATCH_NORM_MOMENTUM, NORM_EPS)
    if not train:
        return y, state
    seen = state["num_batches_tracked"] + 1
    return y, {"running_mean": mean, "running_var": var, "num_batches_tracked": seen}


def group_norm(spec: GroupNorm, params: Params, x: Tensor) -> Tensor:
    """Group normalisation of `x [N, C, H, W]`."""
    return F.group_norm(x, spec.groups, params["weight"], params["bias"], NORM_EPS)


def pad_shortcut(spec: Pad, x: Tensor) -> Tensor:
    """Every `stride`-th pixel of `x`, with zero channels before and after."""
    x = x[:, :, :: spec.stride, :: spec.stride]
    before = (spec.c_out - spec.c_in) // 2
    return F.pad(x, (0, 0, 0, 0, before, spec.c_out - spec.c_in - before))


def global_average_pool(x: Tensor) -> Tensor:
    """The mean over pixels: `[N, C, H, W]` to `[N, C]`."""
    # what F.adaptive_avg_pool2d computes, without what vmap would make a loop of in channels_last
    return x.mean((-1, -2), keepdim=True).flatten(1)


def init_layer(spec: LayerSpec, generator: torch.Generator, device: torch.device) -> tuple[Params, State]:
    """Parameters and state of a layer as torchvision starts them, in float32 on `device`.

    Convolutions: Kaiming normal, fan-out (He et al. 2015). Linear: `U(-1/sqrt(c_in), 1/sqrt(c_in))`.
    `device` is the generator's, or meta for the shapes alone, which draws nothing.
    """
    empty = partial(torch.empty, dtype=torch.float32, device=device)
    match spec:
        case Conv():
            fan_out = spec.c_out * spec.kernel**2
            weight = empty(spec.weight_shape).normal_(0.0, math.sqrt(2.0 / fan_out), generator=generator)
            return {"weight": weight}, {}
        case Linear():
            bound = 1 / math.sqrt(spec.c_in)
            weight = empty(spec.c_out, spec.c_in).uniform_(-bound, bound, generator=generator)
            bias = empty(spec.c_out).uniform_(-bound, bound, generator=generator)
            return {"weight": weight, "bias": bias}, {}
        case BatchNorm():
            statistics = {
                "running_mean": empty(spec.channels).zero_(),
                "running_var": empty(spec.channels).fill_(1),
                "num_batches_tracked": torch.zeros((), dtype=torch.int64, device=device),
            }
            return _init_affine(spec.channels, device), statistics
        case GroupNorm():
            return _init_affine(spec.channels, device), {}
        case Pad():
            return {}, {}


def _init_affine(channels: int, device: torch.device) -> Params:
    return {
        "weight": torch.ones(channels, dtype=torch.float32, device=device),
        "bias": torch.zeros(channels, dtype=torch.float32, device=device),
    }
