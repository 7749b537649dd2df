"""Networks and batches for the per-sample tests: tiny, random in every parameter, drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import resnet_func as rf
from resnet_func.models.config import ActivationOrder
from resnet_func.per_sample.layers.ghost import ConvSpec
from resnet_func.testing import generator, random_network
from resnet_func.types import Model, Params, State

CLASSES = 3


@st.composite
def configs(draw: st.DrawFn, norms: tuple[str, ...] = ("group", "none", "batch")) -> rf.ResNetConfig:
    """Any kind of block, shortcut, stem and norm; valid by construction."""
    block = draw(st.sampled_from(["basic", "bottleneck", "preact"]))
    fields: dict[str, Any] = {
        "block": block,
        "depths": draw(st.sampled_from([(1, 1), (2, 1), (1, 2)])),
        "widths": draw(st.sampled_from([(4, 4), (4, 8)])),
        "stem": draw(st.sampled_from(["cifar", "imagenet"])),
        "norm": draw(st.sampled_from(norms)),
        "norm_groups": draw(st.sampled_from([1, 2])),
        "shortcut": draw(st.sampled_from(["projection", "pad"])),
        "weight_standardization": draw(st.booleans()),
        "activation_order": draw(st.sampled_from([None, *get_args(ActivationOrder)])),
        "num_classes": CLASSES,
    }
    fields["standardization_affine"] = fields["weight_standardization"] and draw(st.booleans())
    fields["scale_norm"] = fields["norm"] != "none" and draw(st.booleans())
    if block == "bottleneck":
        fields["groups"] = draw(st.sampled_from([1, 2]))
        fields["replace_stride_with_dilation"] = draw(st.sampled_from([(), (True,)]))
    return rf.ResNetConfig(**fields)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[ConvSpec, int, int]:
    """A convolution, and the height and width of an image at least as large as its kernel."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))

    def pair(least: int, most: int) -> tuple[int, int]:
        return draw(st.integers(least, most)), draw(st.integers(least, most))

    kernel, dilation = pair(1, 3), pair(1, 2)
    shape = (groups * draw(st.integers(1, 3)), draw(st.integers(1, 3)), *kernel)
    spec = ConvSpec(shape, pair(1, 3), pair(0, 2), dilation, groups)
    height, width = (d * (k - 1) + 1 + draw(st.integers(0, 4)) for d, k in zip(dilation, kernel, strict=True))
    return spec, height, width


def network(
    config: rf.ResNetConfig, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Model, Params, State]:
    """A model with every parameter and statistic random: no affine weight is 1, no bias 0."""
    return random_network(config, seed, dtype)


def batch(
    n: int, seed: int, *, size: int = 8, views: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Images `[n, 3, size, size + 1]`, or `[n, views, ...]`, and labels."""
    shape = (n, 3, size, size + 1) if views is None else (n, views, 3, size, size + 1)
    source = generator(seed)
    x = torch.randn(shape, generator=source, dtype=dtype)
    return x, torch.randint(0, CLASSES, (n,), generator=source)


def small(**changes: Any) -> rf.ResNetConfig:
    """One config that has everything with parameters: group norm, projections, strides."""
    fields: dict[str, Any] = {
        "block": "basic",
        "depths": (1, 1),
        "widths": (4, 8),
        "stem": "cifar",
        "norm": "group",
        "norm_groups": 2,
        "num_classes": CLASSES,
    }
    return rf.ResNetConfig(**{**fields, **changes})


def flops(apply: Callable[[], Any]) -> int:
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        apply()
    return counter.get_total_flops()
