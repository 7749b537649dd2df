"""Hypothesis strategies of `nn.Module`s of every kind of layer, each with a batch that fits.

A network is a list of layers, each followed by an activation, some with a shortcut around them; then a mean
over positions or a flattening, and a linear head. It prints as the call of `random_module` that makes it
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from resnet_func.testing.layers import Layer, build_layer
from resnet_func.testing.strategies import SEEDS

CLASSES = 3
VOCABULARY = 5

# What a network takes: tokens [N, L], features [N, L, C], or maps [N, C, ...] of 1 to 3 dimensions.
Kind: TypeAlias = Literal["tokens", "features", "1d", "2d", "3d"]
KINDS: tuple[Kind, ...] = ("features", "tokens", "1d", "2d", "3d")
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": nn.functional.gelu, "none": lambda x: x}


class _Generated(NamedTuple):
    module: nn.Module
    x: Tensor
    y: Tensor


class GeneratedModule(_Generated):
    """`(module, x, y)` that prints as the call of `random_module` it came from; `y` are labels `[N]`."""

    made_by: str

    def __repr__(self) -> str:
        return self.made_by


class Stack(nn.Module):
    """Layers one after another, then a head over classes; tokens are embedded first."""

    def __init__(
        self,
        kind: Kind,
        channels: int,
        layers: Sequence[Layer],
        shape: Sequence[int],
        head: str,
        activation: str,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, channels) if kind == "tokens" else None
        self.activation = ACTIVATIONS[activation]
        self.shortcuts = [layer.shortcut for layer in layers]
        self.channels_last = kind in ("tokens", "features")
        self.head_kind = head
        self.layers = nn.ModuleList()
        for layer in layers:
            self.layers.append(build_layer(layer, shape))
            shape = _shape_after(self.layers[-1], shape)
        width = torch.Size(shape).numel() if head == "flatten" else shape[-1 if self.channels_last else 0]
        self.head = nn.Linear(width, CLASSES) if head != "tied" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for layer, shortcut in zip(self.layers, self.shortcuts, strict=True):
            y = self.activation(layer(x))
            x = x + y if shortcut else y
        if self.head_kind == "flatten":
            x = x.flatten(1)
        else:
            x = x.flatten(1, -2).mean(1) if self.channels_last else x.flatten(2).mean(2)
        if self.head is None:  # the embedding again, as language models tie them
            assert self.embedding is not None
            return nn.functional.linear(x, self.embedding.weight)
        return self.head(x)


def _shape_after(layer: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(layer.eval()(torch.zeros(1, *shape)).shape[1:])


def random_module(
    kind: Kind,
    shape: Sequence[int],
    layers: Sequence[Layer],
    seed: int,
    *,
    samples: int = 2,
    head: str = "mean",
    activation: str = "tanh",
    dtype: torch.dtype = torch.float32,
) -> GeneratedModule:
    """A network of these layers in evaluation mode, every parameter and statistic random, and a batch.

    Args:
        kind: What it takes, see `Kind`.
        shape: Of one sample after embedding: `[L, C]` for tokens and features, else `[C, ...]`.
        layers: From the input on.
        seed: Of parameters, statistics, inputs and labels. The global generator is left as it was.
        samples: N.
        head: "mean" over positions, "flatten", or for tokens "tied": the embedding's weight again.
        activation: After every layer: "tanh", "relu", "gelu" or "none".
        dtype: Of parameters, statistics and floating inputs.

    >>> module, x, y = random_module("1d", [2, 5], [Layer("conv", {"channels": 4, "kernel": 3})], seed=0)
    >>> module(x).shape
    torch.Size([2, 3])
    """
    channels = shape[-1] if kind in ("tokens", "features") else shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Stack(kind, channels, layers, shape, head, activation).double()
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in module.parameters():
            leaf += 0.3 * torch.randn(leaf.shape, generator=source, dtype=torch.float64)
        for name, leaf in module.named_buffers():
            if "running" in name:
                leaf += torch.rand(leaf.shape, generator=source, dtype=torch.float64)
    if kind == "tokens":
        x = torch.randint(VOCABULARY, (samples, *shape[:-1]), generator=source)
    else:
        x = torch.randn((samples, *shape), generator=source, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY if head == "tied" else CLASSES, (samples,), generator=source)
    made = GeneratedModule(module.to(dtype).eval(), x, labels)
    options = f"samples={samples}, head={head!r}, activation={activation!r}, dtype={dtype}"
    made.made_by = f"random_module({kind!r}, {list(shape)}, {list(layers)}, {seed}, {options})"
    return made


@st.composite
def modules(
    draw: st.DrawFn,
    *,
    kinds: Sequence[Kind] = KINDS,
    layers: st.SearchStrategy[int] = st.integers(1, 4),  # noqa: B008
    samples: st.SearchStrategy[int] = st.integers(2, 4),  # noqa: B008
    dtype: torch.dtype = torch.float32,
) -> GeneratedModule:
    """`(module, x, y)`: networks of every kind of layer in evaluation mode, and a batch that fits.

    Convolutions of 1 to 3 dimensions (groups, dilation, strides, padding by number, by "same" and by mode,
    transposed), linear layers on several leading dimensions, batch (on running statistics), group, layer,
    instance and RMS norms, embeddings, PReLU, scales; layers used twice, and weights derived by weight
    standardisation, `weight_norm`, `spectral_norm` and a parametrization of one's own; shortcuts around them.

    Args:
        kinds: What networks take; the first is the simplest, which shrinking goes to.
        layers: Strategy of their number, before the head.
        samples: Strategy of N.
        dtype: Of parameters, statistics and floating inputs.

    >>> from hypothesis import find
    >>> find(modules(), lambda made: made.x.dtype == torch.int64).y.shape
    torch.Size([2])
    """
    kind = draw(st.sampled_from(kinds))
    shape = start = draw(_shapes(kind))
    drawn: list[Layer] = []
    for _ in range(draw(layers)):
        layer = draw(_layers(kind, shape))
        with torch.random.fork_rng(devices=[]):
            after = _shape_after(build_layer(layer, shape), shape)
        fits = after == tuple(shape)
        drawn.append(Layer(layer.kind, layer.options, shortcut=fits and draw(st.booleans())))
        shape = after
    heads = ["mean", "flatten"]
    if kind == "tokens" and shape[-1] == start[-1]:
        heads.append("tied")
    return random_module(
        kind,
        start,
        drawn,
        draw(SEEDS),
        samples=draw(samples),
        head=draw(st.sampled_from(heads)),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        dtype=dtype,
    )


CHANNELS = st.sampled_from([2, 4, 6])


@st.composite
def _shapes(draw: st.DrawFn, kind: Kind) -> tuple[int, ...]:
    """Of one sample, after embedding."""
    if kind in ("tokens", "features"):
        positions = draw(st.integers(1, 5))
        extra = [draw(st.integers(1, 3))] if kind == "features" and draw(st.booleans()) else []
        return (*extra, positions, draw(CHANNELS))
    largest = {"1d": 9, "2d": 6, "3d": 4}[kind]
    return (draw(CHANNELS), *(draw(st.integers(2, largest)) for _ in range(int(kind[0]))))


@st.composite
def _layers(draw: st.DrawFn, kind: Kind, shape: Sequence[int]) -> Layer:
    """A layer that takes one sample of a shape."""
    if kind in ("tokens", "features"):
        return draw(_position_layers(shape[-1]))
    choice = draw(st.sampled_from(["conv", "conv", "conv", "transposed", "norm", "elementwise", "tied"]))
    channels, sizes = shape[0], shape[1:]
    if choice == "conv":
        return draw(_convolutions(channels, sizes))
    if choice == "transposed":
        return draw(_transposed(channels, sizes))
    if choice == "norm":
        # one pixel has no instance to normalise, and may be all of a group: torch refuses both
        several = torch.Size(sizes).numel() > 1
        norms = ["batch_norm", "layer_norm", *(["group_norm", "instance_norm"] if several else [])]
        return Layer(draw(st.sampled_from(norms)), {})
    if choice == "tied":
        return Layer("tied_conv", {"kernel": draw(st.sampled_from([1, 3])), "bias": draw(st.booleans())})
    return Layer(draw(st.sampled_from(["prelu", "scale"])), {"shared": draw(st.booleans())})


@st.composite
def _position_layers(draw: st.DrawFn, channels: int) -> Layer:
    choice = draw(
        st.sampled_from(["linear", "linear", "layer_norm", "rms_norm", "elementwise", "tied_linear"])
    )
    if choice == "linear":
        derived = draw(st.sampled_from(DERIVATIONS))
        return Layer("linear", {"channels": draw(CHANNELS), "bias": draw(st.booleans()), "derived": derived})
    if choice == "elementwise":
        return Layer(draw(st.sampled_from(["prelu", "scale"])), {"shared": True})
    return Layer(choice, {"bias": draw(st.booleans())} if choice == "tied_linear" else {})


DERIVATIONS = ["none", "none", "standardized", "weight_norm", "spectral_norm", "doubled"]


@st.composite
def _convolutions(draw: st.DrawFn, channels: int, sizes: Sequence[int]) -> Layer:
    kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    extent, smallest = dilation * (kernel - 1) + 1, min(sizes)
    stride = draw(st.integers(1, 3))
    modes = ["zeros", "reflect", "circular", "replicate"]
    same = stride == 1 and extent % 2 == 1  # an uneven padding makes torch warn
    mode = draw(st.sampled_from([*modes, "same"] if same else modes))
    least = max(0, -(-(extent - smallest) // 2))  # so that the kernel fits
    most = smallest - 1 if mode == "reflect" else smallest
    padding: int | str = draw(st.integers(least, max(least, min(2, most))))
    if mode == "same":
        mode, padding = "zeros", "same"
    elif padding > most:
        mode = "zeros"
    return Layer(
        "conv",
        {
            "channels": draw(CHANNELS),
            "kernel": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": draw(st.sampled_from([1, 1, 2])),
            "bias": draw(st.booleans()),
            "padding_mode": mode,
            "derived": draw(st.sampled_from(DERIVATIONS)),
        },
    )


@st.composite
def _transposed(draw: st.DrawFn, channels: int, sizes: Sequence[int]) -> Layer:
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    return Layer(
        "transposed_conv",
        {
            "channels": draw(CHANNELS),
            "kernel": kernel,
            "stride": stride,
            "padding": draw(st.integers(0, (kernel - 1) // 2)),
            "output_padding": draw(st.integers(0, stride - 1)),
            "groups": draw(st.sampled_from([1, 1, 2])),
            "bias": draw(st.booleans()),
        },
    )
