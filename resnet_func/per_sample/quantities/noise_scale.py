"""Moments of the per-sample gradient: mean, diagonal second moment, gradient noise scale."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.numerics import accumulation_dtype
from resnet_func.per_sample.capture import Captured
from resnet_func.per_sample.layers import contract
from resnet_func.per_sample.layers.contract import Way
from resnet_func.per_sample.layers.factors import Factors, sample_slices
from resnet_func.per_sample.quantities.quantity import Quantity, by_layer
from resnet_func.types import Params


class NoiseScale(NamedTuple):
    """The simple noise scale `trace / squared_norm` and its two unbiased estimates, 0-d tensors.

    `trace` is the trace of the gradient's covariance over samples, `squared_norm` the squared norm of the
    true gradient. Over many batches, average the two before dividing (McCandlish et al. 2018, appendix A.1).
    """

    value: Tensor
    trace: Tensor
    squared_norm: Tensor


class Moments(NamedTuple):
    """What `moments` returns: trees like the parameters, and noise scales, of all layers and of each."""

    mean: Params
    second_moment: Params
    noise_scale: NoiseScale
    layer_noise_scale: dict[str, NoiseScale]


class _Sums(NamedTuple):
    samples: int
    first: dict[str, Tensor]
    second: dict[str, Tensor]


def moments_quantity() -> Quantity:
    """`Moments` as a quantity."""
    return Quantity(
        "moments", _sums_of_leaf, _finish, _join, _final, accumulate=True, like_params=_like_params
    )


def _sums_of_leaf(path: str, factors: Factors, way: Way) -> tuple[Tensor, Tensor]:
    first, second = [], []
    for part in sample_slices(factors):
        grads = contract.grads(part)
        grads = grads.to(accumulation_dtype(grads.dtype))
        first.append(grads.sum(0))
        second.append(grads.square().sum(0))
    return torch.stack(first).sum(0), torch.stack(second).sum(0)


def _finish(answers: dict[str, tuple[Tensor, Tensor]], captured: Captured) -> _Sums:
    first = {path: first for path, (first, _) in answers.items()}
    second = {path: second for path, (_, second) in answers.items()}
    return _Sums(captured.losses.shape[0], first, second)


def _join(parts: list[_Sums]) -> _Sums:
    samples, first, second = parts[0]
    for part in parts[1:]:
        samples += part.samples
        first = {path: first[path] + part.first[path] for path in first}
        second = {path: second[path] + part.second[path] for path in second}
    return _Sums(samples, first, second)


def _final(sums: _Sums) -> Moments:
    n = max(sums.samples, 1)  # an empty batch has zero moments
    mean = {path: total / n for path, total in sums.first.items()}
    second = {path: total / n for path, total in sums.second.items()}
    layers = {
        layer: _noise_scale(paths, mean, second, sums.samples) for layer, paths in by_layer(mean).items()
    }
    whole = _noise_scale(list(mean), mean, second, sums.samples)
    return Moments(mean, second, whole, layers)


def _like_params(moments: Moments, params: Params) -> Moments:
    mean, second = (tree.select(params, leaves) for leaves in (moments.mean, moments.second_moment))
    return moments._replace(mean=mean, second_moment=second)


def _noise_scale(paths: list[str], mean: dict[str, Any], second: dict[str, Any], n: int) -> NoiseScale:
    """Batches of 1 and of N as the small and the big batch of McCandlish et al. 2018, appendix A.1."""
    if not paths:
        zero = torch.zeros(())
        return NoiseScale(zero / zero, zero, zero)
    of_one = torch.stack([second[path].sum() for path in paths]).sum()
    of_all = torch.stack([mean[path].square().sum() for path in paths]).sum()
    if n < 2:
        return NoiseScale(of_one * torch.nan, of_one * torch.nan, of_all)
    trace = (of_one - of_all) * (n / (n - 1))
    squared_norm = of_all - trace / n
    return NoiseScale(trace / squared_norm, trace, squared_norm)
