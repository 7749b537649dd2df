"""Shapes, dtypes, layouts, and the same network as a module."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import resnet_func as rf
from parity.properties.cases import AS_PUBLISHED, SEEDS, batches, networks, normal
from parity.properties.table import needs, prop
from parity.rounding import assert_rounded, rounding_noise
from parity.steps import function_step, module_step
from resnet_func import testing, tree
from resnet_func.models import layers
from resnet_func.models.layers import Conv
from resnet_func.testing import (
    Batch,
    Network,
    assert_trees_equal,
    assert_trees_near,
    generator,
)

# --------------------------------------------------------------------------- shapes


@prop(
    tolerance="exact",
    why="whole numbers",
    spec=st.builds(
        Conv,
        c_in=st.just(1),
        c_out=st.just(1),
        kernel=st.sampled_from([1, 3, 5, 7]),
        stride=st.integers(1, 3),
        padding=st.integers(0, 3),
        dilation=st.integers(1, 3),
    ),
    more=st.integers(0, 9),
)
def output_sizes_follow_the_formula(spec: Conv, more: int) -> None:
    """`Conv.output_size` is the size of what `conv2d` returns, for odd and even sizes."""
    size = spec.dilation * (spec.kernel - 1) + 1 + more
    y = layers.conv2d(spec, {"weight": torch.ones(spec.weight_shape)}, torch.zeros(1, 1, size, size + 1))
    assert y.shape[2:] == (spec.output_size(size), spec.output_size(size + 1))


@prop(
    tolerance="exact",
    why="shapes",
    network=networks(torch.float32, norms=["none", "batch"]),
    batch=batches(torch.float32, sizes=st.integers(1, 7), samples=st.integers(0, 3)),
)
def every_size_of_image_fits(network: Network, batch: Batch) -> None:
    """Images of any size, from one pixel on, and batches of any number of them give `[N, classes]`."""
    model, params, state = network
    logits, _ = model.apply(params, state, batch.x, train=False)
    assert logits.shape == (len(batch.x), 3)
    assert logits.isfinite().all()


@prop(
    tolerance="exact",
    why="names and shapes",
    config=testing.configs(blocks=["bottleneck"]).map(
        lambda c: replace(c, widths=(4, 8), depths=(2, 2), replace_stride_with_dilation=())
    ),
    batch=batches(torch.float32),
    seed=SEEDS,
)
def dilation_changes_no_parameter(config: rf.ResNetConfig, batch: Batch, seed: int) -> None:
    """Dilating instead of striding keeps every parameter to the bit, and changes the logits."""
    dilated = replace(config, replace_stride_with_dilation=(True,))
    params, state = rf.build(config).init(generator(seed))
    assert_trees_equal(rf.build(dilated).init(generator(seed)), (params, state))
    logits = [rf.build(c).apply(params, state, batch.x, train=True)[0] for c in (config, dilated)]
    assert not torch.equal(*logits)


@prop(
    tolerance="bitwise",
    why="zeros and copies",
    c_in=st.integers(1, 5),
    extra=st.integers(0, 6),
    stride=st.integers(1, 3),
    seed=SEEDS,
)
def padded_shortcuts_are_zeros_around_a_copy(c_in: int, extra: int, stride: int, seed: int) -> None:
    """Option A takes every stride-th pixel, and pads `extra // 2` channels before, the rest after."""
    x = normal(2, c_in, 5, 6, seed=seed)
    want = torch.zeros(2, c_in + extra, -(-5 // stride), -(-6 // stride), dtype=x.dtype)
    want[:, extra // 2 : extra // 2 + c_in] = x[:, :, ::stride, ::stride]
    assert_trees_equal(layers.pad_shortcut(layers.Pad(c_in, c_in + extra, stride), x), want)


# --------------------------------------------------------------------------- precision and layout


@prop(
    tolerance="bitwise",
    why="numbers are drawn in float32, then converted",
    config=testing.configs(),
    seed=SEEDS,
    dtype=st.sampled_from([torch.float64, torch.bfloat16, torch.float16]),
)
def conversion_commutes_with_initialisation(config: rf.ResNetConfig, seed: int, dtype: torch.dtype) -> None:
    """`init(dtype=)` is `init()`, converted; counters stay whole numbers."""
    model = rf.build(config)

    def convert(leaf: Tensor) -> Tensor:
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    converted = tree.map(convert, model.init(generator(seed)))
    assert_trees_equal(model.init(generator(seed), dtype=dtype), converted)


@prop(
    tolerance="fp64 1e-10",
    why="another kernel's order of sums, in float64",
    network=networks(),
    batch=batches(),
    train=st.booleans(),
)
def channels_last_changes_no_logit(network: Network, batch: Batch, train: bool) -> None:
    """Images and weights in channels_last give the same logits and state."""
    model, params, state = network
    last = rf.train.to_memory_format(params, torch.channels_last)
    x = batch.x.contiguous(memory_format=torch.channels_last)
    got, want = (model.apply(p, state, v, train=train) for p, v in ((last, x), (params, batch.x)))
    assert_trees_near(tree.map(torch.Tensor.double, got), tree.map(torch.Tensor.double, want), 1e-10)


@prop(
    tolerance="what rounding moves",
    why="noise of eps times the root of the longest sum, on every layer in float64",
    network=networks(),
    batch=batches(),
    train=st.booleans(),
)
def single_precision_is_near_double(network: Network, batch: Batch, train: bool) -> None:
    """Logits in float32 are those in float64, rounded."""
    model, params, state = network

    def single(leaf: Tensor) -> Tensor:
        return leaf.float() if leaf.is_floating_point() else leaf

    def double(leaf: Tensor) -> Tensor:
        return leaf.double() if leaf.is_floating_point() else leaf

    rounded = tree.map(single, params), tree.map(single, state), batch.x.float()
    logits, _ = model.apply(*rounded, train=train)
    assert logits.dtype == torch.float32
    exact = tree.map(double, rounded)
    noise = rounding_noise(params, torch.float32)
    assert_rounded(logits, lambda: model.apply(*exact, train=train)[0], noise)


# --------------------------------------------------------------------------- modules


class SmallResNet(ResNet):
    """torchvision's blocks and stages in the widths of a config."""

    def __init__(self, config: rf.ResNetConfig) -> None:
        nn.Module.__init__(self)
        self._norm_layer = nn.BatchNorm2d
        if config.norm == "group":
            self._norm_layer = lambda channels: nn.GroupNorm(config.norm_groups, channels)
        self.groups, self.base_width, self.dilation = config.groups, config.width_per_group, 1
        self.inplanes = config.stem_channels
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, 2, 3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        block = {"basic": BasicBlock, "bottleneck": Bottleneck}[config.block]
        self.stages = [f"layer{index + 1}" for index in range(len(config.widths))]
        dilate = (False, *(config.replace_stride_with_dilation or (False,) * (len(self.stages) - 1)))
        sizes = zip(self.stages, config.widths, config.depths, dilate, strict=True)
        for index, (stage, width, depth, flag) in enumerate(sizes):
            self.add_module(stage, self._make_layer(block, width, depth, 2 if index else 1, flag))
        self.fc = nn.Linear(self.inplanes, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


# torchvision projects wherever shapes differ, and knows one stem
TORCHVISION = {
    "blocks": ["basic", "bottleneck"],
    "stem": "imagenet",
    "shortcut": "projection",
    "weight_standardization": False,
    **AS_PUBLISHED,
}


def module_of(network: Network) -> nn.Module:
    module = SmallResNet(network.config).to(network.params["fc"]["weight"].dtype)
    state_dict = rf.to_state_dict(network.model, network.params, network.state)
    assert list(state_dict) == list(module.state_dict())
    module.load_state_dict(state_dict, strict=True)
    return module


@prop(
    tolerance="bitwise",
    why="the same kernels on the same shapes in the same order",
    network=networks(torch.float32, norms=["batch"], **TORCHVISION),
    batch=batches(torch.float32),
    seed=SEEDS,
    train=st.booleans(),
)
def the_function_is_torchvisions_module(network: Network, batch: Batch, seed: int, train: bool) -> None:
    """Logits, all gradients and all buffers afterwards are those of torchvision's blocks."""
    cotangent = normal(len(batch.x), 3, seed=seed).float()
    want = module_step(module_of(network), batch.x, cotangent, train=train)
    needs(want["gradient conv1.weight"].any(), "gradients")
    assert_trees_equal(function_step(*network, batch.x, cotangent, train=train), want)


@prop(
    tolerance="fp64 1e-10",
    why="torch.func.grad differentiates group_norm by other kernels than autograd does",
    network=networks(norms=["group"], **TORCHVISION),
    batch=batches(),
    seed=SEEDS,
)
def group_norm_is_torchvisions_to_rounding(network: Network, batch: Batch, seed: int) -> None:
    """With `norm_layer=GroupNorm` too: logits to the bit, all gradients to rounding."""
    cotangent = normal(len(batch.x), 3, seed=seed)
    want = module_step(module_of(network), batch.x, cotangent, train=True)
    needs(want["gradient conv1.weight"].any(), "gradients")
    got = function_step(*network, batch.x, cotangent, train=True)
    assert_trees_equal(got["logits"], want["logits"])
    assert_trees_near(got, want, 1e-10)


@prop(
    tolerance="bitwise",
    why="the same kernels on the same shapes in the same order",
    network=networks(torch.float32, norms=["batch", "group"], **TORCHVISION),
    batch=batches(torch.float32),
    train=st.booleans(),
)
def a_module_as_a_function_is_the_built_function(network: Network, batch: Batch, train: bool) -> None:
    """`from_module` gives the parameters, logits and state of the network that was built."""
    model, params, state = rf.from_module(module_of(network))
    assert_trees_equal((params, state), tuple(network)[1:])
    want = network.model.apply(network.params, network.state, batch.x, train=train)
    assert_trees_equal(model.apply(params, state, batch.x, train=train), want)


@prop(
    tolerance="what rounding moves",
    why="one sample at a time asks other kernels for the same sums",
    network=networks(norms=["group", "none"]),
    batch=batches(),
)
def vmap_is_as_exact_as_a_batch(network: Network, batch: Batch) -> None:
    """Logits by `vmap` over single images in float32 are those of the batch in float64, rounded."""
    model, params, state = network
    single = tree.map(torch.Tensor.float, params)
    x, exact = batch.x.float(), tree.map(torch.Tensor.double, single)
    each = torch.func.vmap(lambda image: model.apply(single, state, image[None], train=False)[0][0])(x)
    noise = rounding_noise(params, torch.float32)
    assert_rounded(each, lambda: model.apply(exact, state, x.double(), train=False)[0], noise)
