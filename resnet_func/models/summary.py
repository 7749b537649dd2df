"""What a network is made of: its layers' output shapes, parameters and multiply-accumulates.

From the real forward pass, on an empty batch: every tensor has its shape, and there is nothing to compute.
(The meta device would do the same, after seconds of importing torch's decompositions.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode

from resnet_func import tree
from resnet_func.models.config import ResNetConfig
from resnet_func.models.layers import BatchNorm, Conv, GroupNorm, LayerSpec, Linear
from resnet_func.models.resnet import layer_specs
from resnet_func.types import Model, Params, State


class LayerRow(NamedTuple):
    """One layer: `shape` is its output's for one image, [C, H, W] or [C]; `macs` are per image."""

    path: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int


class Totals(NamedTuple):
    """Sums over layers; `macs` are per image."""

    parameters: int
    macs: int


def summarize(model: Model, image_size: int) -> list[LayerRow]:
    """Every layer that has parameters, in the order of the forward pass.

    MACs are the multiply-accumulates of convolutions and linear layers, biases left out (the "FLOPs" of most
    papers); other layers count as 0.

    Args:
        model: A network of this library.
        image_size: Pixels along a side of the square input image.

    Returns:
        A row per layer; `totals` adds them up and `table` prints them.

    Raises:
        ValueError: the image is too small, or the network came from a module, whose layers cannot be seen.
    """
    if model.config is None:
        raise ValueError(
            "summarize needs a network with a config; this one came from a module. Build it: rf.resnet18(...)"
        )
    if image_size < 1:
        raise ValueError(f"image_size must be 1 pixel or more; got {image_size}. Try 32, or 224 for ImageNet")
    specs = tree.flatten(layer_specs(model.config))
    params, state = model.init(torch.Generator())
    sizes = {path: leaf.numel() for path, leaf in tree.flatten(params).items()}
    shapes = _output_shapes(model, model.config, specs, params, state, image_size)
    return [_row(path, specs[path], sizes, shapes[path]) for path in specs if f"{path}.weight" in sizes]


def _row(path: str, spec: LayerSpec, sizes: dict[str, int], shape: tuple[int, ...]) -> LayerRow:
    weight, bias = sizes[f"{path}.weight"], sizes.get(f"{path}.bias", 0)
    match spec:
        case Conv():  # every output pixel uses every weight once
            macs = weight * shape[1] * shape[2]
        case Linear():
            macs = weight
        case _:
            macs = 0
    return LayerRow(path, _kind(spec), shape, weight + bias, macs)


def _kind(spec: LayerSpec) -> str:
    match spec:
        case Conv():
            stride = f"/{spec.stride}" if spec.stride > 1 else ""
            dilation = f" dilation {spec.dilation}" if spec.dilation > 1 else ""
            groups = f" groups {spec.groups}" if spec.groups > 1 else ""
            return f"conv {spec.kernel}x{spec.kernel}{stride}{dilation}{groups}"
        case Linear():
            return "linear"
        case BatchNorm():
            return "batch norm"
        case GroupNorm():
            return f"group norm {spec.groups}"
        case _:
            return type(spec).__name__.lower()


def totals(rows: Sequence[LayerRow]) -> Totals:
    """The parameters and MACs of all rows together."""
    return Totals(sum(row.parameters for row in rows), sum(row.macs for row in rows))


# --------------------------------------------------------------------------- the forward pass


class _Recorder(TorchFunctionMode):
    """Records the shape of what a call returns in which a leaf, or what derives from it, meets images."""

    def __init__(self, leaves: dict[str, Tensor]) -> None:
        super().__init__()
        self.paths: dict[Tensor, str] = {leaf: path for path, leaf in leaves.items()}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        tensors = [arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, Tensor)]
        paths = {self.paths[tensor] for tensor in tensors if tensor in self.paths}
        if len(paths) == 1 and all(tensor in self.paths for tensor in tensors):  # a standardised weight, say
            made = y if isinstance(y, tuple) else (y,)
            self.paths |= {one: next(iter(paths)) for one in made if isinstance(one, Tensor)}
        elif isinstance(y, Tensor):
            self.shapes |= dict.fromkeys(paths, tuple(y.shape[1:]))
        return y


def _output_shapes(
    model: Model,
    config: ResNetConfig,
    specs: dict[str, LayerSpec],
    params: Params,
    state: State,
    image_size: int,
) -> dict[str, tuple[int, ...]]:
    """Each layer's output shape for one image: [C, H, W], or [C] for a linear layer."""
    flat = tree.flatten(params)
    weights = {path: flat[f"{path}.weight"] for path in specs if f"{path}.weight" in flat}
    images = torch.zeros(0, config.in_channels, image_size, image_size)
    with _Recorder(weights) as recorder:
        model.apply(params, state, images, train=False)
    return recorder.shapes


# --------------------------------------------------------------------------- the table


def table(rows: Sequence[LayerRow]) -> Table:
    """The rows as a table that fits 80 columns, ruled where a stage ends, with the totals below."""
    parameters, macs = totals(rows)
    result = Table(box=SIMPLE, show_footer=True, show_edge=False, pad_edge=False)
    result.add_column("layer", "total", no_wrap=True)
    result.add_column("kind")
    result.add_column("output", justify="right", no_wrap=True)
    result.add_column("parameters", f"{parameters:,}", justify="right", no_wrap=True)
    result.add_column("MACs", format_count(macs), justify="right", no_wrap=True)
    for row, following in zip_longest(rows, rows[1:]):
        shape = "x".join(str(side) for side in row.shape)
        macs_text = format_count(row.macs) if row.macs else ""
        ends_stage = following is not None and _stage(row) != _stage(following)
        cells = (row.path, row.kind, shape, f"{row.parameters:,}", macs_text)
        result.add_row(*cells, end_section=ends_stage)
    return result


def _stage(row: LayerRow) -> str:
    """`layer1`, ...; nothing for the stem and the head."""
    return row.path.split(".")[0] if row.path.startswith("layer") else ""


def format_count(count: int) -> str:
    """A count in four significant digits, like `555.4 M` or `1.814 G`; below 1000 as it is."""
    for unit, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if float(f"{count / unit:.4g}") >= 1:  # 999,999 rounds to 1.000 M
            return f"{count / unit:#.4g} {letter}"
    return str(count)
