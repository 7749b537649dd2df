"""What fields of a config change: how a network starts, and where it dilates."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import nn

import resnet_func as rf
from parity.properties.cases import SEEDS, batches, networks, normal
from parity.properties.structure import TORCHVISION, module_of
from parity.properties.table import needs, prop
from parity.steps import function_step, module_step
from resnet_func import testing, tree
from resnet_func.testing import Batch, Network, assert_trees_equal, assert_trees_near, generator


@prop(
    tolerance="fp32 3 eps",
    why="a product with the standard deviation, its rounding, and torch's own of both",
    config=testing.configs().map(lambda c: replace(c, zero_init_residual=False)),
    seed=SEEDS,
)
def networks_start_as_torchs_do(config: rf.ResNetConfig, seed: int) -> None:
    """`init` draws what `torch.nn.init` does for torchvision: Kaiming normal by fan-out, U(+-1/sqrt(n))."""
    params, _ = rf.build(config).init(generator(seed))
    source, want = generator(seed), {}
    bound = 1 / math.sqrt(params["fc"]["weight"].shape[1])
    for path, leaf in tree.flatten(params).items():
        fresh = torch.empty_like(leaf)
        if leaf.ndim == 4:
            nn.init.kaiming_normal_(fresh, mode="fan_out", nonlinearity="relu", generator=source)
        elif path.startswith("fc."):
            nn.init.uniform_(fresh, -bound, bound, generator=source)
        else:
            nn.init.constant_(fresh, float(path.endswith(("weight", "gain"))))
        want[path] = fresh
    assert_trees_near(params, tree.unflatten(want), 3 * torch.finfo(torch.float32).eps)


@prop(tolerance="bitwise", why="zeros and copies", config=testing.configs(), seed=SEEDS)
def zero_initialisation_empties_the_end_of_each_block(config: rf.ResNetConfig, seed: int) -> None:
    """`zero_init_residual` starts what scales the end of each block at zero, and changes no other leaf."""
    flags = [replace(config, zero_init_residual=flag) for flag in (False, True)]
    plain, zeroed = (tree.flatten(rf.build(c).init(generator(seed))[0]) for c in flags)
    last = 3 if config.block == "bottleneck" else 2
    end = f"bn{last}.weight"
    if config.norm == "none" or config.order.endswith("conv"):  # no norm follows the convolution
        end = f"conv{last}.gain" if config.standardization_affine else f"conv{last}.weight"
    empty = [path for path in plain if path.startswith("layer") and path.endswith(f".{end}")]
    assert len(empty) == sum(config.depths)
    assert_trees_equal(zeroed, plain | {path: torch.zeros_like(plain[path]) for path in empty})


BOTTLENECKS = {
    **TORCHVISION,
    "blocks": ["bottleneck"],
    "norms": ["batch"],
    "widths": (4, 8),
    "depths": (2, 2),
}


@prop(
    tolerance="bitwise",
    why="the same kernels on the same shapes in the same order",
    network=st.booleans().flatmap(
        lambda dilate: networks(torch.float32, **BOTTLENECKS, replace_stride_with_dilation=(dilate,))
    ),
    batch=batches(torch.float32, sizes=st.integers(25, 33)),
    seed=SEEDS,
)
def bottlenecks_stride_or_dilate_as_torchvisions(network: Network, batch: Batch, seed: int) -> None:
    """Where a stage strides or dilates, logits, gradients and buffers are those of torchvision's blocks."""
    cotangent = normal(len(batch.x), 3, seed=seed).float()
    want = module_step(module_of(network), batch.x, cotangent, train=True)
    needs(want["gradient layer2.0.conv2.weight"].any(), "gradients")
    assert_trees_equal(function_step(*network, batch.x, cotangent, train=True), want)
