"""The networks again in NumPy: a convolution is a sum of shifted products.

Nothing here comes from torch, and nothing of `resnet_func` but the config: which layers there are, their
strides and their padding follow from He et al. 2015, Wide ResNets and torchvision's names once more. Slow and
short, so that it can be checked by eye.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from resnet_func.models.config import ResNetConfig

Array: TypeAlias = NDArray[Any]
Tree: TypeAlias = dict[str, Any]


def apply(config: ResNetConfig, params: Tree, state: Tree, x: Array, *, train: bool) -> tuple[Array, Tree]:
    """Logits of images `x [N, C, H, W]`, and the running statistics after them by dotted name.

    The dtype is that of the arrays; `train` is whether batch norm uses the batch's statistics.
    """
    net = Network(config, params, state, train)
    big, preact = config.stem == "imagenet", net.order.endswith("conv")
    x = net.conv("conv1", x, stride=2 if big else 1, padding=3 if big else 1)
    x = x if preact else net.activated("bn1", x)
    x = max_pool(x) if big else x
    dilation = 1
    for stage, depth in enumerate(config.depths):
        for index in range(depth):
            stride, before = (2 if stage and not index else 1), dilation
            if stride == 2 and any(config.replace_stride_with_dilation[stage - 1 : stage]):
                stride, dilation = 1, 2 * dilation  # the block that would stride still has the old dilation
            c_out = config.widths[stage] * (4 if config.block == "bottleneck" else 1)
            x = net.block(f"layer{stage + 1}.{index}.", x, c_out, stride, before)
    x = net.activated("bn1", x) if preact else x
    return x.mean((2, 3)) @ params["fc"]["weight"].T + params["fc"]["bias"], net.after


class Network:
    """Layers and blocks by dotted name; `after` collects running statistics."""

    def __init__(self, config: ResNetConfig, params: Tree, state: Tree, train: bool) -> None:
        self.config, self.params, self.state, self.train = config, params, state, train
        self.after: Tree = {}
        self.order = config.activation_order or {"preact": "norm-relu-conv"}.get(
            config.block, "conv-norm-relu"
        )

    def conv(self, name: str, x: Array, **geometry: int) -> Array:
        params = at(self.params, name)
        weight = standardized(params["weight"]) if self.config.weight_standardization else params["weight"]
        if not self.config.standardization_affine:
            return convolution(x, weight, **geometry)
        fan_in = np.prod(weight.shape[1:])  # Brock et al. 2021, equation 1, with a gain and a bias
        weight = weight * by_channel(params["gain"])[..., None] / np.sqrt(fan_in)
        return convolution(x, weight, **geometry) + by_channel(params["bias"])

    def activated(self, name: str, x: Array) -> Array:
        """Norm and ReLU, in the config's order."""
        if self.order.startswith("relu") or self.order.endswith("norm"):
            return self.norm(name, relu(x))
        return relu(self.norm(name, x))

    def norm(self, name: str, x: Array) -> Array:
        if self.config.norm == "none":
            return x
        if self.config.norm == "group":
            y = group_normalized(x, self.config.norm_groups)
        else:
            y, statistics = batch_normalized(x, at(self.state, name), self.train)
            self.after |= {f"{name}.{key}": value for key, value in statistics.items()}
        affine = at(self.params, name)
        return by_channel(affine["weight"]) * y + by_channel(affine["bias"])

    def block(self, name: str, x: Array, c_out: int, stride: int, dilation: int) -> Array:
        convs: list[dict[str, int]] = [{"stride": stride, "padding": 1}, {"padding": 1}]
        if self.config.block == "bottleneck":
            middle = {"stride": stride, "padding": dilation, "dilation": dilation}
            convs = [{}, {"groups": self.config.groups, **middle}, {}]
        y = shortcut = x
        for number, geometry in enumerate(convs, 1):
            conv, norm, last = f"{name}conv{number}", f"{name}bn{number}", number == len(convs)
            if self.order.endswith("conv"):
                y = self.activated(norm, y)
                if number == 1 and (stride > 1 or x.shape[1] != c_out):
                    shortcut = y
                y = self.conv(conv, y, **geometry)
            else:
                y = self.conv(conv, y, **geometry)
                y = self.norm(norm, y) if self.order == "conv-norm-relu" and last else self.activated(norm, y)
        y = y + self.shortcut(name, shortcut, c_out, stride)
        y = self.norm(f"{name}scale_norm", y) if self.config.scale_norm else y
        return relu(y) if self.order == "conv-norm-relu" else y

    def shortcut(self, name: str, x: Array, c_out: int, stride: int) -> Array:
        extra = c_out - x.shape[1]
        if stride == 1 and not extra:
            return x
        if self.config.shortcut == "pad":
            channels = (extra // 2, extra - extra // 2)
            return np.pad(x[:, :, ::stride, ::stride], ((0, 0), channels, (0, 0), (0, 0)))
        y = self.conv(name + "downsample.0", x, stride=stride)
        return y if self.order.endswith("conv") else self.norm(name + "downsample.1", y)


def convolution(
    x: Array, weight: Array, *, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> Array:
    """Every offset of the kernel shifts the image and multiplies its channels by a matrix."""
    n, c = x.shape[:2]
    c_out, _, *kernel = weight.shape
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    h, w = ((x.shape[2 + i] - dilation * (kernel[i] - 1) - 1) // stride + 1 for i in (0, 1))
    matrices = weight.reshape(groups, c_out // groups, c // groups, *kernel)
    y = np.zeros((n, groups, c_out // groups, h * w), x.dtype)
    for i, j in np.ndindex(*kernel):
        rows, columns = (slice(k * dilation, None, stride) for k in (i, j))
        shifted = x[:, :, rows, columns][:, :, :h, :w]
        y += matrices[..., i, j] @ shifted.reshape(n, groups, c // groups, h * w)
    return y.reshape(n, c_out, h, w)


def max_pool(x: Array) -> Array:
    """Windows of 3x3, every other pixel; outside the image is minus infinity."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    return windows[:, :, ::2, ::2].max((-1, -2))


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def batch_normalized(x: Array, statistics: Tree, train: bool) -> tuple[Array, Tree]:
    """Normalised by the biased variance, while the running one averages the unbiased: as torch does."""
    mean, var = statistics["running_mean"], statistics["running_var"]
    if train:
        statistics = {
            "running_mean": 0.9 * mean + 0.1 * x.mean((0, 2, 3)),
            "running_var": 0.9 * var + 0.1 * x.var((0, 2, 3), ddof=1),
            "num_batches_tracked": statistics["num_batches_tracked"] + 1,
        }
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    return (x - by_channel(mean)) / np.sqrt(by_channel(var) + 1e-5), statistics


def group_normalized(x: Array, groups: int) -> Array:
    grouped = x.reshape(len(x), groups, -1)
    mean, var = grouped.mean(-1, keepdims=True), grouped.var(-1, keepdims=True)
    return ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)


def standardized(weight: Array) -> Array:
    """Each filter with mean 0 and variance 1: Qiao et al. 2019."""
    mean, var = weight.mean((1, 2, 3), keepdims=True), weight.var((1, 2, 3), keepdims=True)
    return (weight - mean) / np.sqrt(var + 1e-10)


def by_channel(vector: Array) -> Array:
    """A vector over channels that broadcasts over images."""
    return vector[:, None, None]


def at(tree: Tree, name: str) -> Tree:
    """The subtree at a dotted path."""
    for key in name.split("."):
        tree = tree[key]
    return tree
