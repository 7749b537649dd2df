"""The networks again in JAX: a pure function of the same pytrees, in any floating dtype.

`apply` traces under `jax.jit` with config, train and layout static, and differentiates. Weights keep torch's
order OIHW, which `conv_general_dilated` takes as it is. Nothing here comes from torch, and nothing of
`resnet_func` but the config.

    step = jax.jit(apply, static_argnames=("config", "train", "layout"))
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from resnet_func.models.config import ResNetConfig

Tree: TypeAlias = dict[str, Any]
Layout: TypeAlias = Literal["NCHW", "NHWC"]


def apply(
    config: ResNetConfig, params: Tree, state: Tree, x: Array, *, train: bool, layout: Layout = "NCHW"
) -> tuple[Array, Tree]:
    """Logits `[N, num_classes]` of images `x` in a layout, and the state after them.

    `train=True` normalises with the batch's statistics and updates the running ones.
    """
    net = Network(config, train, layout)
    root = Layers(net, params, state)
    x = root.conv("conv1", x, 2, 3) if config.stem == "imagenet" else root.conv("conv1", x, 1, 1)
    if not net.order.endswith("conv"):
        x = root.activated("bn1", x)
    if config.stem == "imagenet":
        x = max_pool(net, x)
    for name, index, block in geometry(config):
        stage = root.after.setdefault(name, {})
        old = state.get(name, {}).get(index, {})
        x, stage[index] = residual(net, block, params[name][index], old, x)
    if net.order.endswith("conv"):
        x = root.activated("bn1", x)
    logits = x.mean(net.pixels) @ params["fc"]["weight"].T + params["fc"]["bias"]
    return logits, (root.after if config.norm == "batch" else {})


class Network(NamedTuple):
    """What is fixed when a network is traced."""

    config: ResNetConfig
    train: bool
    layout: Layout

    @property
    def order(self) -> str:
        """What goes round each convolution, in order."""
        own = "norm-relu-conv" if self.config.block == "preact" else "conv-norm-relu"
        return self.config.activation_order or own

    @property
    def pixels(self) -> tuple[int, int]:
        """The two axes of pixels."""
        return self.layout.index("H"), self.layout.index("W")

    def channels(self, x: Array) -> int:
        return x.shape[self.layout.index("C")]

    def by_channel(self, vector: Array) -> Array:
        """A vector over channels that broadcasts over images."""
        return jnp.expand_dims(vector, (0, *self.pixels))


class Block(NamedTuple):
    """The shape of one block; `dilation` is that of its 3x3 convolution."""

    c_out: int
    stride: int
    dilation: int


def geometry(config: ResNetConfig) -> list[tuple[str, str, Block]]:
    """Every block under its stage's and its own name."""
    blocks, dilation = [], 1
    dilates = (False, *(config.replace_stride_with_dilation or (False,) * len(config.depths)))
    expansion = 4 if config.block == "bottleneck" else 1
    for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
        # where a stage dilates instead of striding, its first block still has the dilation before
        first = Block(width * expansion, 2 if stage and not dilates[stage] else 1, dilation)
        dilation = 2 * dilation if dilates[stage] else dilation
        rest = Block(width * expansion, 1, dilation)
        blocks += [(f"layer{stage + 1}", str(i), rest if i else first) for i in range(depth)]
    return blocks


@partial(jax.jit, static_argnames=("net", "block"))  # outside of jit too, equal blocks compile once
def residual(net: Network, block: Block, params: Tree, state: Tree, x: Array) -> tuple[Array, Tree]:
    """One residual block: He et al. 2015, figure 5; torchvision's bottleneck strides in the 3x3."""
    layers, (c_out, stride, dilation) = Layers(net, params, state), block
    projects = stride != 1 or net.channels(x) != c_out
    convs = [("1", (stride, 1)), ("2", (1, 1))]
    if net.config.block == "bottleneck":
        convs = [("1", ()), ("2", (stride, dilation, dilation, net.config.groups)), ("3", ())]
    if net.order.endswith("conv"):
        activated = layers.activated("bn1", x)
        y = layers.conv("conv1", activated, *convs[0][1])
        for number, sizes in convs[1:]:
            y = layers.conv(f"conv{number}", layers.activated(f"bn{number}", y), *sizes)
        return layers.scaled(y + layers.shortcut(activated if projects else x, block)), layers.after
    y = x
    for number, sizes in convs[:-1]:
        y = layers.activated(f"bn{number}", layers.conv(f"conv{number}", y, *sizes))
    number, sizes = convs[-1]
    y = layers.conv(f"conv{number}", y, *sizes)
    if net.order == "conv-relu-norm":
        y = layers.activated(f"bn{number}", y) + layers.shortcut(x, block)
        return layers.scaled(y), layers.after
    y = layers.norm(f"bn{number}", y) + layers.shortcut(x, block)
    return jax.nn.relu(layers.scaled(y)), layers.after


class Layers:
    """The layers of one level by name; `after` collects the state they leave."""

    def __init__(self, net: Network, params: Tree, state: Tree) -> None:
        self.net, self.params, self.state = net, params, state
        self.after: Tree = {}

    def conv(
        self, name: str, x: Array, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
    ) -> Array:
        params, layout, config = self.params[name], self.net.layout, self.net.config
        weight = standardized(params["weight"]) if config.weight_standardization else params["weight"]
        if config.standardization_affine:
            weight *= (params["gain"] / math.prod(weight.shape[1:]) ** 0.5)[:, None, None, None]
        y = lax.conv_general_dilated(
            x,
            weight,
            window_strides=(stride, stride),
            padding=((padding, padding), (padding, padding)),
            rhs_dilation=(dilation, dilation),
            dimension_numbers=(layout, "OIHW", layout),
            feature_group_count=groups,
        )
        return y + self.net.by_channel(params["bias"]) if config.standardization_affine else y

    def activated(self, name: str, x: Array) -> Array:
        """Norm and ReLU, in the network's order."""
        if self.net.order in ("relu-norm-conv", "conv-relu-norm"):
            return self.norm(name, jax.nn.relu(x))
        return jax.nn.relu(self.norm(name, x))

    def scaled(self, x: Array) -> Array:
        """The norm after a block's sum, where there is one: Klause et al. 2022."""
        return self.norm("scale_norm", x) if self.net.config.scale_norm else x

    def norm(self, name: str, x: Array) -> Array:
        config = self.net.config
        if config.norm == "none":
            return x
        params = self.params[name]
        if config.norm == "group":
            return group_norm(self.net, params, x)
        y, self.after[name] = batch_norm(self.net, params, self.state[name], x)
        return y

    def shortcut(self, x: Array, block: Block) -> Array:
        """The identity where shapes agree; else zero channels around every other pixel, or a projection."""
        extra = block.c_out - self.net.channels(x)
        if block.stride == 1 and not extra:
            return x
        if self.net.config.shortcut == "pad":
            sizes = {"C": (extra // 2, extra - extra // 2)}
            every = tuple(slice(None, None, block.stride if axis in "HW" else 1) for axis in self.net.layout)
            return jnp.pad(x[every], [sizes.get(axis, (0, 0)) for axis in self.net.layout])
        inner = Layers(self.net, self.params["downsample"], self.state.get("downsample", {}))
        y = inner.conv("0", x, block.stride)
        if self.net.order.endswith("conv"):
            return y
        y = inner.norm("1", y)
        self.after["downsample"] = inner.after
        return y


def batch_norm(net: Network, params: Tree, state: Tree, x: Array) -> tuple[Array, Tree]:
    """Batch normalisation as torch does it: biased to normalise, unbiased in the running variance."""
    mean, var = state["running_mean"], state["running_var"]
    if net.train:
        axes = (0, *net.pixels)
        count = x.size // net.channels(x)
        mean, var = x.mean(axes), x.var(axes)
        state = {
            "running_mean": 0.9 * state["running_mean"] + 0.1 * mean,
            "running_var": 0.9 * state["running_var"] + 0.1 * (var * (count / (count - 1))),
            "num_batches_tracked": state["num_batches_tracked"] + 1,
        }
    scale = params["weight"] * lax.rsqrt(var + 1e-5)
    return (x - net.by_channel(mean)) * net.by_channel(scale) + net.by_channel(params["bias"]), state


def group_norm(net: Network, params: Tree, x: Array) -> Array:
    at, groups = net.layout.index("C"), net.config.norm_groups
    grouped = x.reshape(*x.shape[:at], groups, -1, *x.shape[at + 1 :])
    axes = tuple(axis for axis in range(1, 5) if axis != at)
    mean, var = grouped.mean(axes, keepdims=True), grouped.var(axes, keepdims=True)
    normal = ((grouped - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape)
    return normal * net.by_channel(params["weight"]) + net.by_channel(params["bias"])


def standardized(weight: Array) -> Array:
    """Each filter with mean 0 and variance 1: Qiao et al. 2019."""
    axes = (1, 2, 3)
    mean, var = weight.mean(axes, keepdims=True), weight.var(axes, keepdims=True)
    return (weight - mean) * lax.rsqrt(var + 1e-10)


def max_pool(net: Network, x: Array) -> Array:
    """Windows of 3x3, every other pixel; outside of the image is minus infinity."""

    def spatial(size: int) -> tuple[int, ...]:
        return tuple(size if axis in "HW" else 1 for axis in net.layout)

    padding = [(1, 1) if axis in "HW" else (0, 0) for axis in net.layout]
    return lax.reduce_window(x, -jnp.inf, lax.max, spatial(3), spatial(2), padding)
