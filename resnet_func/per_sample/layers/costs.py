"""What each way of a layer's contraction costs: FLOPs, bytes, and nanoseconds by a machine's speeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from resnet_func.calibration import Speeds
from resnet_func.per_sample.layers.factors import (
    ConvFactors,
    Derived,
    Factors,
    LinearFactors,
    has_ghost,
    num_samples,
)


@dataclass(frozen=True)
class Layer:
    """The sizes of a convolution or linear layer; `pairs` of samples that a ghost Gram matrix takes."""

    path: str
    n: int
    pairs: int
    positions: int
    pixels: int
    weights: int
    c_in: int
    c_out: int
    groups: int
    kernel: int
    element_size: int
    has_ghost: bool

    @property
    def gradient_bytes(self) -> int:
        return self.n * self.weights * self.element_size

    @property
    def capture_bytes(self) -> int:
        elements = self.pixels * self.c_in + self.positions * self.c_out
        return self.n * elements * self.element_size


def layers_of(factors: Mapping[str, Factors], other: Mapping[str, Factors]) -> list[Layer]:
    """The layers among the leaves of a batch; `other` are the factors of a second one, or the same."""
    layers = []
    for path, leaf in factors.items():
        if isinstance(leaf, Derived) and leaf.is_small:
            continue  # formed at once, like a bias
        inner = leaf.factors if isinstance(leaf, Derived) else leaf
        if isinstance(inner, ConvFactors | LinearFactors):
            pairs = _static(num_samples(leaf)) * _static(num_samples(other[path]))
            layers.append(_layer(path, inner, pairs, ghost=has_ghost(leaf)))
    return layers


def _layer(path: str, factors: ConvFactors | LinearFactors, pairs: int, *, ghost: bool) -> Layer:
    n, size = _static(num_samples(factors)), factors.cotangents.element_size()
    if isinstance(factors, LinearFactors):
        c_out, c_in = factors.weight.shape
        return Layer(
            path, n, pairs, factors.views, factors.views, c_in * c_out, c_in, c_out, 1, 1, size, ghost
        )
    spec = factors.spec
    positions = factors.views * prod([_static(side) for side in factors.cotangents.shape[2:]])
    pixels = factors.views * prod([_static(side) for side in factors.inputs.shape[2:]])
    return Layer(
        path,
        n,
        pairs,
        positions,
        positions if spec.is_pointwise else pixels,
        prod(spec.weight_shape),
        spec.c_in,
        spec.c_out,
        spec.groups,
        spec.kernel[0],
        size,
        ghost,
    )


def _static(size: int) -> int:
    """A size as a number: a compiler that has made a symbol of it compiles for this size."""
    return len(range(size))


def materialize_flops(layer: Layer) -> int:
    """Of the weight gradients of all samples, or of their sum."""
    return 2 * layer.n * layer.positions * layer.weights


def materialize_cost(layer: Layer, speeds: Speeds) -> float:
    """Nanoseconds to form every sample's gradient."""
    traffic = layer.capture_bytes * speeds.byte + layer.gradient_bytes * speeds.gradient_byte
    return materialize_flops(layer) * speeds.grouped_flop + traffic


def kept_cost(layer: Layer, speeds: Speeds) -> float:
    """Nanoseconds of holding on to every sample's gradient for a weighted sum, beyond forming it.

    Each layer's lie in memory of their own, which no cache holds: read before it is written, written back,
    and read for the sum.
    """
    return 3 * layer.gradient_bytes * speeds.byte


def weighted_sum_cost(layer: Layer, speeds: Speeds) -> float:
    """Nanoseconds of a weighted sum of gradients that were not kept: scaled cotangents, one weight pass."""
    scaled = 2 * layer.n * layer.positions * layer.c_out * layer.element_size
    return materialize_flops(layer) * speeds.conv_flop + (layer.capture_bytes + scaled) * speeds.byte


def _ghost_pairs(layer: Layer, quantity: str) -> int:
    return layer.pairs if quantity == "gram" else layer.n


def ghost_flops(layer: Layer, quantity: str) -> int:
    """Of the pixel Gram matrices of inputs and cotangents."""
    grams = layer.pixels**2 * layer.c_in + layer.positions**2 * layer.c_out
    return 2 * _ghost_pairs(layer, quantity) * grams


def ghost_bytes(layer: Layer, quantity: str) -> int:
    """What these take in memory at once."""
    groups = layer.groups
    elements = layer.pixels**2 + 2 * layer.positions**2
    return _ghost_pairs(layer, quantity) * groups * elements * max(layer.element_size, 4)


def ghost_cost(layer: Layer, quantity: str, speeds: Speeds) -> float:
    """Nanoseconds; pixel products are read once per row of the kernel, and once per column."""
    kernel = layer.kernel
    groups = layer.groups
    products = layer.pixels**2 + layer.positions**2 * 2 * kernel
    products *= _ghost_pairs(layer, quantity) * groups * max(layer.element_size, 4)
    traffic = products * speeds.pixel_byte + layer.capture_bytes * speeds.byte
    return ghost_flops(layer, quantity) * speeds.matmul_flop + traffic
