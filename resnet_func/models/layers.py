"""Layers as pure functions: `layer(spec, params, state, x, train=) -> (y, state)`.

A spec is a layer's frozen hyper-parameters; `init_layer` makes its parameters and state from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import debug_unwrap

from resnet_func.numerics import widen
from resnet_func.types import Params, State

NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1  # the weight of the NEW value, as in torch
STANDARDIZATION_EPS = 1e-10
# Up to 2.13 at least, torch's group norm refuses other layouts, channels_last too, in forward mode, and some
# views under vmap; 2.15 takes them.
GROUP_NORM_WANTS_CONTIGUOUS = torch.__version__ < "2.15"  # compared as versions


@dataclass(frozen=True)
class Conv:
    """A square convolution; a standardised one may have a gain and a bias for each filter."""

    c_in: int
    c_out: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    standardize: bool = False
    affine: bool = False

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
    weight, bias = params["weight"], None
    if spec.standardize:
        weight = standardize(weight)
    if spec.affine:
        fan_in = math.prod(spec.weight_shape[1:])
        weight, bias = weight * (params["gain"] * fan_in**-0.5).reshape(-1, 1, 1, 1), params["bias"]
    return F.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)


def linear(params: Params, x: Tensor) -> Tensor:
    """`x @ weight.T + bias` for `x [N, c_in]`."""
    return F.linear(x, params["weight"], params["bias"])


def standardize(weight: Tensor) -> Tensor:
    """Each filter of `weight [c_out, ...]` shifted and scaled to mean 0, variance 1 (Qiao et al. 2019)."""
    variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) * torch.rsqrt(variance + STANDARDIZATION_EPS)


def batch_norm(params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Tensor, State]:
    """Batch normalisation of `x [N, C, H, W]`; training returns updated running statistics.

    Normalisation uses the biased variance, `running_var` averages the unbiased one, as in torch. Where
    forward mode is active, training computes from mean and variance, which is right in every composition of
    derivatives, and equal to round-off. Under `vmap` each member has statistics of its own.

    Raises:
        ValueError: under `vmap` a member is a single sample in training, with shared statistics: its batch
            statistics would be instance normalisation.
    """
    mean, var = state["running_mean"], state["running_var"]
    if train:
        _check_members(x, mean)
        # F.batch_norm updates the statistics in place: give it copies, so that the caller's stay as they are
        mean, var = _own(mean, x), _own(var, x)
    if train and forward_ad._current_level >= 0:
        y, mean, var = _batch_norm_from_moments(params, mean, var, x)
    else:
        y = F.batch_norm(x, mean, var, params["weight"], params["bias"], train, BATCH_NORM_MOMENTUM, NORM_EPS)
    if not train:
        return y, state
    batches = state["num_batches_tracked"] + 1
    return y, {"running_mean": mean, "running_var": var, "num_batches_tracked": batches}


def _own(statistic: Tensor, x: Tensor) -> Tensor:
    """A copy of a running statistic; under `vmap` over `x` alone, one for each member."""
    if not torch.compiler.is_compiling() and (_is_batched(statistic) or not _is_batched(x)):
        return statistic.clone()
    return statistic * x.new_ones((), dtype=statistic.dtype)  # times one is every bit


def _batch_norm_from_moments(
    params: Params, mean: Tensor, var: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Training by the formula, in float32 or wider: the output and the new running statistics.

    The rule that torch has for the kernel's forward mode takes mean and deviation for constants where it is
    differentiated again: reverse over forward and forward over forward are silently wrong.
    """
    wide = widen(x)
    count = x.numel() // x.shape[1]
    batch_mean = wide.mean((0, 2, 3), keepdim=True)
    centred = wide - batch_mean
    batch_var = centred.square().mean((0, 2, 3), keepdim=True)
    shape = (1, -1, 1, 1)
    y = centred * torch.rsqrt(batch_var + NORM_EPS) * params["weight"].reshape(shape)
    y = (y + params["bias"].reshape(shape)).to(x.dtype)
    unbiased = batch_var.flatten() * (count / max(count - 1, 1))
    mean, var = (
        torch.lerp(old, new.detach().to(old.dtype), BATCH_NORM_MOMENTUM)  # a constant, as from the kernel
        for old, new in ((mean, batch_mean.flatten()), (var, unbiased))
    )
    return y, mean, var


def _check_members(x: Tensor, mean: Tensor) -> None:
    if torch.compiler.is_compiling() or _is_batched(mean) or not _is_batched(x):
        return
    if x.shape[0] == 1:
        raise ValueError(
            "training-mode BatchNorm under vmap got single samples: normalising each by itself is instance "
            "norm. Map over batches [members, N, C, H, W], or use train=False, or norm='group'"
        )


def _is_mapped(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and _is_batched(x)


def _is_batched(x: Tensor) -> bool:
    """Whether some `vmap` around maps over `x`."""
    inner = debug_unwrap(x, recurse=False)
    return inner is not x and (inner.ndim > x.ndim or _is_batched(inner))


def group_norm(spec: GroupNorm, params: Params, x: Tensor) -> Tensor:
    """Group normalisation of `x [N, C, H, W]`."""
    if GROUP_NORM_WANTS_CONTIGUOUS and (forward_ad._current_level >= 0 or _is_mapped(x)):
        x = x.contiguous()
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
    like: dict[str, Any] = {"dtype": torch.float32, "device": device}  # whatever torch's defaults are
    match spec:
        case Conv():
            weight = torch.empty(spec.weight_shape, **like)
            fan_out = spec.c_out * spec.kernel**2
            weight = weight.normal_(0.0, math.sqrt(2.0 / fan_out), generator=generator)
            if not spec.affine:
                return {"weight": weight}, {}
            return {
                "weight": weight,
                "gain": torch.ones(spec.c_out, **like),
                "bias": torch.zeros(spec.c_out, **like),
            }, {}
        case Linear():
            bound = 1 / math.sqrt(spec.c_in)
            weight = torch.empty(spec.c_out, spec.c_in, **like).uniform_(-bound, bound, generator=generator)
            bias = torch.empty(spec.c_out, **like).uniform_(-bound, bound, generator=generator)
            return {"weight": weight, "bias": bias}, {}
        case BatchNorm():
            statistics = {
                "running_mean": torch.zeros(spec.channels, **like),
                "running_var": torch.ones(spec.channels, **like),
                "num_batches_tracked": torch.zeros((), dtype=torch.int64, device=device),
            }
            return _init_affine(spec.channels, like), statistics
        case GroupNorm():
            return _init_affine(spec.channels, like), {}
        case Pad():
            return {}, {}


def _init_affine(channels: int, like: dict[str, Any]) -> Params:
    return {"weight": torch.ones(channels, **like), "bias": torch.zeros(channels, **like)}
