"""What a network is made of: its layers' output shapes, parameters and multiply-accumulates.

From the real forward pass: on an empty batch where the network is one of ours, since every tensor then has
its shape and there is nothing to compute; else on one sample, which every network can run.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from resnet_func import tree
from resnet_func.models.layer_calls import Call, record_calls
from resnet_func.models.resnet import build
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
    """Every layer that has parameters, in the order of the forward pass, of a network with a config.

    What was put around `apply` (`winograd.wrap`, ...) does not count: the layers are the config's.

    Args:
        model: A network of this library; for others there is `summarize_network`.
        image_size: Pixels along a side of the square input image.

    Returns:
        A row per layer; `totals` adds them up and `table` prints them.

    Raises:
        ValueError: the image is too small, or the network has no config.

    >>> from resnet_func import resnet20
    >>> rows = summarize(resnet20(), 32)
    >>> rows[0]
    LayerRow(path='conv1', kind='conv 3x3', shape=(16, 32, 32), parameters=432, macs=442368)
    """
    if model.config is None:
        raise ValueError(
            "summarize needs a network with a config; this one came from a module or function. "
            "Use summarize_network(model, params, state, input_shape)"
        )
    if image_size < 1:
        raise ValueError(f"image_size must be 1 pixel or more; got {image_size}. Try 32, or 224 for ImageNet")
    shape = (0, model.config.in_channels, image_size, image_size)
    images = torch.zeros(shape, dtype=torch.float32, device="meta")
    model = build(model.config)
    return _rows(model, *model.init(torch.Generator(), device="meta"), images)


def summarize_network(
    model: Model, params: Params, state: State, example: Sequence[int] | Tensor
) -> list[LayerRow]:
    """Every layer that has parameters, in the order of the forward pass, of any network.

    MACs are the multiply-accumulates of convolutions and linear layers, biases left out (the "FLOPs" of most
    papers), and of the projections of `nn.MultiheadAttention`; other layers count as 0. A layer that runs
    several times is one row, with the MACs of all and the shape of the last; a parameter that several
    layers share is counted in the first; one that is not used has a row of kind "unused".

    Args:
        model: Any model: of this library, or made by `from_module`, `load_network`, `from_function`.
        params, state: Its parameters and state; the network is run on their device.
        example: The shape of one input, such as `(3, 224, 224)`, which is run in the parameters' dtype; or a
            batch of one, such as token numbers `[1, T]`.

    Returns:
        A row per layer; `totals` adds them up and `table` prints them.

    >>> from resnet_func import from_module
    >>> summarize_network(*from_module(torch.nn.Linear(4, 2)), (4,))
    [LayerRow(path='linear', kind='linear', shape=(2,), parameters=10, macs=8)]
    """
    if isinstance(example, Tensor):
        if example.ndim == 0 or len(example) != 1:
            raise ValueError(f"example must be a batch of one; got {list(example.shape)}. Try x[:1]")
        return _rows(model, params, state, example)
    like = next((leaf for leaf in tree.leaves(params) if leaf.is_floating_point()), torch.zeros(()))
    return _rows(model, params, state, like.new_zeros(1, *example))


def _rows(model: Model, params: Params, state: State, x: Tensor) -> list[LayerRow]:
    sizes = {path: leaf.numel() for path, leaf in tree.flatten(params).items()}
    calls: dict[str, list[Call]] = {}
    for call in record_calls(model, params, state, x):
        # a parameter outside any layer, such as a class token, is a layer of its own
        calls.setdefault(call.paths[0].rpartition(".")[0] or call.function, []).append(call)
    rows = []
    counted: set[str] = set()
    for path, own in calls.items():
        leaves = {leaf for call in own for leaf in call.paths} - counted
        counted |= leaves
        parameters, macs = sum(sizes[leaf] for leaf in leaves), sum(call.macs for call in own)
        rows.append(LayerRow(path, describe(own[0]), own[-1].output_shape[1:], parameters, macs))
    unused = [path for path in sizes if path not in counted]
    return rows + [LayerRow(path, "unused", (), sizes[path], 0) for path in unused]


def describe(call: Call) -> str:
    """A call's kind in words: "conv 3x3/2 groups 2", "group norm 8", "linear"."""
    match call.kind:
        case "conv" | "transposed conv":
            return _describe_conv(call)
        case "group norm":
            return f"group norm {call.options['num_groups']}"
        case "other":
            return call.function
        case kind:
            return kind


def _describe_conv(call: Call) -> str:
    assert call.weight_shape is not None
    text = f"{call.kind} {'x'.join(map(str, call.weight_shape[2:]))}"
    stride, dilation = (_sides(call.options.get(name, 1)) for name in ("stride", "dilation"))
    text += f"/{stride}" if stride != "1" else ""
    text += f" dilation {dilation}" if dilation != "1" else ""
    groups = call.options.get("groups", 1)
    return text + (f" groups {groups}" if groups > 1 else "")


def _sides(value: int | Sequence[int]) -> str:
    """`2` for 2 and for (2, 2); `2x1` for (2, 1)."""
    sides = [value] if isinstance(value, int) else list(value)
    return str(sides[0]) if len(set(sides)) == 1 else "x".join(map(str, sides))


def totals(rows: Sequence[LayerRow]) -> Totals:
    """The parameters and MACs of all rows together."""
    return Totals(sum(row.parameters for row in rows), sum(row.macs for row in rows))


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
