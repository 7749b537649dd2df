"""Residual blocks: convolutions, norms and ReLUs in each order around a shortcut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from resnet_func.models.config import ResNetConfig
from resnet_func.models.layers import apply_layer
from resnet_func.types import Params, State

# Nested like the parameters, with a layer's spec where its parameters would be.
Specs: TypeAlias = dict[str, Any]


class Scope:
    """One level of the network: call a layer by name, and `state` collects what the layers return."""

    def __init__(self, specs: Specs, params: Params, old_state: State, *, train: bool) -> None:
        self.specs, self.params, self.old_state, self.train = specs, params, old_state, train
        self.state: State = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Apply a layer; one that the config leaves out is the identity."""
        if name not in self.specs:
            return x
        params, state = self.params.get(name, {}), self.old_state.get(name, {})
        y, self.state[name] = apply_layer(self.specs[name], params, state, x, train=self.train)
        return y

    def enter(self, name: str) -> Scope:
        """The level below, whose state becomes part of this one's."""
        inner = Scope(self.specs[name], self.params[name], self.old_state.get(name, {}), train=self.train)
        self.state[name] = inner.state
        return inner


def shortcut(layer: Scope, x: Tensor) -> Tensor:
    """The identity where shapes agree; else zero padding or a projection."""
    if not isinstance(layer.specs.get("downsample"), dict):
        return layer("downsample", x)
    projection = layer.enter("downsample")
    return projection("1", projection("0", x))


def basic_block(layer: Scope, x: Tensor) -> Tensor:
    """Two 3x3 convolutions around a shortcut (He et al. 2015, figure 5 left)."""
    y = F.relu_(layer("bn1", layer("conv1", x)))
    y = layer("bn2", layer("conv2", y))
    return F.relu_(layer("scale_norm", y + shortcut(layer, x)))


def bottleneck(layer: Scope, x: Tensor) -> Tensor:
    """1x1, 3x3, 1x1 around a shortcut (He et al. 2015, figure 5 right); the 3x3 strides."""
    y = F.relu_(layer("bn1", layer("conv1", x)))
    y = F.relu_(layer("bn2", layer("conv2", y)))
    y = layer("bn3", layer("conv3", y))
    return F.relu_(layer("scale_norm", y + shortcut(layer, x)))


def preact_block(layer: Scope, x: Tensor) -> Tensor:
    """Norm and ReLU before each convolution (He et al. 2016); a projection sees the activated input."""
    activated = F.relu(layer("bn1", x))  # not in place: without a norm this is x, which the shortcut needs
    y = layer("conv1", activated)
    y = layer("conv2", F.relu_(layer("bn2", y)))
    if "conv3" in layer.specs:
        y = layer("conv3", F.relu_(layer("bn3", y)))
    projects = "downsample" in layer.specs
    return layer("scale_norm", y + shortcut(layer, activated if projects else x))


def relu_norm_conv_block(layer: Scope, x: Tensor) -> Tensor:
    """As `preact_block`, with the norm after the ReLU."""
    activated = layer("bn1", F.relu(x))  # not in place: the shortcut needs x
    y = layer("conv1", activated)
    y = layer("conv2", layer("bn2", F.relu_(y)))
    if "conv3" in layer.specs:
        y = layer("conv3", layer("bn3", F.relu_(y)))
    projects = "downsample" in layer.specs
    return layer("scale_norm", y + shortcut(layer, activated if projects else x))


def conv_relu_norm_block(layer: Scope, x: Tensor) -> Tensor:
    """ReLU, then norm after each convolution; the sum goes on as it is."""
    y = layer("bn1", F.relu_(layer("conv1", x)))
    y = layer("bn2", F.relu_(layer("conv2", y)))
    if "conv3" in layer.specs:
        y = layer("bn3", F.relu_(layer("conv3", y)))
    return layer("scale_norm", y + shortcut(layer, x))


BLOCKS: dict[str, Callable[[Scope, Tensor], Tensor]] = {
    "basic": basic_block,
    "bottleneck": bottleneck,
    "preact": preact_block,
    "conv-relu-norm": conv_relu_norm_block,
    "relu-norm-conv": relu_norm_conv_block,
}


def block_of(config: ResNetConfig) -> Callable[[Scope, Tensor], Tensor]:
    """The function of a config's blocks."""
    match config.order:
        case "conv-norm-relu":
            return BLOCKS["bottleneck" if config.block == "bottleneck" else "basic"]
        case "norm-relu-conv":
            return BLOCKS["preact"]
        case other:
            return BLOCKS[other]


def norm_and_relu(config: ResNetConfig, layer: Scope, x: Tensor) -> Tensor:
    """The network's own norm and ReLU, after the stem or the last block; `x` may be overwritten."""
    if config.order in ("conv-relu-norm", "relu-norm-conv"):
        return layer("bn1", F.relu_(x))
    return F.relu_(layer("bn1", x))
