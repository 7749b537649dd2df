"""Convolutions by Winograd's minimal filtering: fewer multiplications, in ordinary tensor operations.

An output tile of m x m pixels comes from an input tile of (m+2) x (m+2) by that many multiplications, where
the definition has 9 m x m: 2.25 times fewer for m = 2, 4 times for m = 4. Input, weight and output go through
constant linear maps, and between them stands one batched matrix product. Since all of it is made of ordinary
operations, `grad` derives both gradients, which save as much, and `vmap`, `jvp` and `torch.compile` need no
rule. A 1x1 convolution is that product alone.

Lavin and Gray 2015, https://arxiv.org/abs/1509.09308. The maps are those of Toom and Cook: polynomials are
evaluated at m + 1 points and at infinity, multiplied there, and interpolated.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_variadic

from resnet_func.calibration import TYPICAL, Speeds
from resnet_func.numerics import is_autocast_enabled
from resnet_func.types import Apply, Images, Logits, Model, Params, State

Tile: TypeAlias = Literal[2, 4]

# With tile 2 the maps are dyadic, so sums of small integers stay exact. The points of tile 4 round half as
# much as the usual 0, 1, -1, 2, -2 do: about twice what the definition does.
POINTS: dict[Tile, tuple[float, ...]] = {2: (0, 1, -1), 4: (0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)}
# An element of a transformed tensor is read and written so many times: fitted to forward and backward on two
# cores with AVX2, 64 to 512 channels.
PASSES = 9


class Maps(NamedTuple):
    """What tiles are multiplied by, float64; both image axes at once, as Kronecker products."""

    input: Tensor  # [(m+2)^2, (m+2)^2]
    weight: Tensor  # [(m+2)^2, 9]
    output: Tensor  # [m^2, (m+2)^2]


def _maps(tile: Tile) -> Maps:
    points = np.array(POINTS[tile], dtype=np.float64)
    size = tile + 2
    scale = [np.prod(np.delete(p - points, j)) for j, p in enumerate(points)]
    into, filters, out = np.zeros((size, size)), np.zeros((size, 3)), np.zeros((tile, size))
    for j, p in enumerate(points):
        into[j, :-1] = np.poly(np.delete(points, j))[::-1]
        filters[j] = p ** np.arange(3) / scale[j]
        out[:, j] = p ** np.arange(tile)
    into[-1], filters[-1, -1], out[-1, -1] = np.poly(points)[::-1], 1, 1  # the point at infinity
    return Maps(*(torch.from_numpy(np.kron(one, one)) for one in (into, filters, out)))


MAPS: dict[Tile, Maps] = {tile: _maps(tile) for tile in POINTS}


# --------------------------------------------------------------------------- one convolution


def conv2d(
    x: Float[Tensor, "n c_in h w"], weight: Float[Tensor, "c_out c_in 3 3"], tile: Tile = 4
) -> Float[Tensor, "n c_out h w"]:
    """`F.conv2d(x, weight, padding=1)` up to rounding, of float32 or float64.

    Args:
        x: Images of any height and width; what tiles have beyond them is padding.
        weight: The filters.
        tile: Side of an output tile in pixels.

    Returns:
        The same convolution, channels_last in memory.

    >>> x, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
    >>> conv2d(x, weight, tile=2)[0, 0, 0]
    tensor([4., 6., 6., 4.])
    """
    n, c_in, height, width = x.shape
    c_out, points = len(weight), (tile + 2) ** 2
    maps = Maps(*(one.to(x.device, x.dtype) for one in MAPS[tile]))
    tiles = _tiles(x, tile)
    rows, columns = tiles.shape[3:5]
    # The maps act on all channels of all tiles at once, so they are matrix products too.
    inputs = (maps.input @ tiles.reshape(points, -1)).reshape(points, -1, c_in)
    filters = (maps.weight @ weight.permute(2, 3, 1, 0).reshape(9, -1)).reshape(points, c_in, c_out)
    outputs = maps.output @ (inputs @ filters).reshape(points, -1)
    y = outputs.reshape(tile, tile, n, rows, columns, c_out).permute(2, 3, 0, 4, 1, 5)
    y = y.reshape(n, rows * tile, columns * tile, c_out)
    if (rows * tile, columns * tile) != (height, width):
        # without gaps, as `F.conv2d` has it: torch 2.11's group norm refuses others
        y = y[:, :height, :width].clone(memory_format=torch.contiguous_format)
    return y.permute(0, 3, 1, 2)


def _tiles(x: Tensor, tile: int) -> Tensor:
    """Overlapping tiles `[tile+2, tile+2, n, rows, columns, c]`: blocks and two lines after them."""
    n, c, height, width = x.shape
    rows, columns = -(-height // tile), -(-width // tile)
    after = [(blocks + 1) * tile - size - 1 for blocks, size in ((columns, width), (rows, height))]
    padded = F.pad(x, (1, after[0], 1, after[1])).permute(0, 2, 3, 1)
    blocks = padded.reshape(n, rows + 1, tile, columns + 1, tile, c)
    lines = torch.cat([blocks[:, :-1], blocks[:, 1:, :2]], 2).permute(2, 4, 0, 1, 3, 5)
    return torch.cat([lines[:, :, :, :, :-1], lines[:, :2, :, :, 1:]], 1)


# --------------------------------------------------------------------------- a network


def wrap(model: Model, speeds: Speeds = TYPICAL) -> Model:
    """The model with its convolutions by minimal filtering where that is cheaper; equal up to rounding.

    For 3x3 `cheapest_tile` decides: from 128 channels on, as a rule, where a FLOP of a matrix product takes
    as long as one of a convolution, and nowhere where it takes twice as long (AVX-512). With `train=True`,
    1x1 convolutions are matrix products where `product_pays`. Other convolutions (3x3 with a stride, dilated,
    grouped, another kernel) stay as they are, and so do all in half precision, where tiles of 4 would round
    too much. Made for CPUs: cuDNN has such kernels of its own.

    Args:
        model: Any model, one made by `from_module` too.
        speeds: What decides; `calibration.measured()` has this machine's.

    >>> import resnet_func as rf
    >>> model = wrap(rf.resnet20())
    >>> params, state = model.init(torch.Generator().manual_seed(0))
    >>> model.apply(params, state, torch.zeros(1, 3, 8, 8), train=False)[0].shape
    torch.Size([1, 10])
    """
    return model._replace(apply=partial(_apply_by_tiles, model.apply, speeds))


def _apply_by_tiles(
    apply: Apply, speeds: Speeds, params: Params, state: State, x: Images, *, train: bool
) -> tuple[Logits, State]:
    with _Convolutions(speeds, products=train):
        return apply(params, state, x, train=train)


def cheapest_tile(
    n: int, c_in: int, c_out: int, height: int, width: int, speeds: Speeds = TYPICAL
) -> Tile | None:
    """The tile that makes a 3x3 convolution of stride 1 cheapest on a CPU; None where the definition is.

    >>> cheapest_tile(32, 256, 256, 8, 8), cheapest_tile(32, 3, 16, 32, 32)
    (4, None)
    """
    best, least = None, 2 * 9 * n * height * width * c_in * c_out * speeds.conv_flop
    for tile in POINTS:
        points, tiles = (tile + 2) ** 2, n * -(-height // tile) * -(-width // tile)
        elements = points * (tiles * (c_in + c_out) + c_in * c_out)
        flops = 2 * (points * tiles * c_in * c_out + points * elements)
        cost = flops * speeds.matmul_flop + PASSES * 4 * elements * speeds.byte
        if cost < least:
            best, least = tile, cost
    return best


def product_pays(c_in: int, c_out: int, height: int, width: int, speeds: Speeds = TYPICAL) -> bool:
    """Whether a matrix product is cheaper than a 1x1 convolution with its gradients on a CPU.

    oneDNN's weight gradient is the slower the fewer output pixels there are: with no more of them than
    channels, the product takes 0.74 to 0.90 of the time of all three, measured on two cores with AVX2.
    Forward, and with more pixels, it is behind; and so it is everywhere where its FLOP takes longer.

    >>> product_pays(256, 512, 4, 4), product_pays(16, 32, 32, 32)
    (True, False)
    """
    return height * width <= min(c_in, c_out) and speeds.matmul_flop <= 1.1 * speeds.conv_flop


def pays(speeds: Speeds = TYPICAL) -> bool:
    """Whether any of the convolutions that suit it best is cheaper this way: ResNet-18's, or a product.

    >>> pays()
    True
    """
    shapes = ((128, 16), (256, 8), (256, 14), (512, 4), (512, 7))
    return product_pays(256, 256, 8, 8, speeds) or any(
        cheapest_tile(32, channels, channels, side, side, speeds) for channels, side in shapes
    )


class _Convolutions(TorchFunctionMode):
    """Takes the convolutions that are worth it from torch."""

    def __init__(self, speeds: Speeds = TYPICAL, *, products: bool) -> None:
        super().__init__()
        self.speeds, self.products = speeds, products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.conv2d:
            return func(*args, **kwargs)
        return convolution(*args, **kwargs, products=self.products, speeds=self.speeds)


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    products: bool = False,
    speeds: Speeds = TYPICAL,
) -> Tensor:
    """`F.conv2d` by minimal filtering where that is cheaper; with `products` a 1x1 convolution may be one.

    A `TorchFunctionMode` around it sees this one call, not what it is made of.

    >>> convolution(torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3), padding=1).shape
    torch.Size([1, 3, 4, 4])
    """
    if has_torch_function_variadic(input, weight):
        where = (input, weight, bias, stride, padding, dilation, groups)
        return handle_torch_function(convolution, (input, weight), *where, products=products, speeds=speeds)
    y = None
    suited = input.ndim == weight.ndim == 4 and input.shape[1] == weight.shape[1] and groups == 1
    exact = input.dtype in (torch.float32, torch.float64) and input.dtype == weight.dtype
    if suited and exact and not isinstance(padding, str) and not is_autocast_enabled(input.device.type):
        form = (*weight.shape[2:], *_pair(padding), *_pair(dilation))
        if form == (3, 3, 1, 1, 1, 1) and _pair(stride) == (1, 1):
            n, c_in, height, width = input.shape
            tile = cheapest_tile(n, c_in, len(weight), height, width, speeds)
            y = conv2d(input, weight, tile) if tile else None
        elif products and form == (1, 1, 0, 0, 1, 1):
            rows, columns = _pair(stride)
            height, width = -(-input.shape[2] // rows), -(-input.shape[3] // columns)
            if product_pays(input.shape[1], len(weight), height, width, speeds):
                y = as_product(input, weight, (rows, columns))
    if y is None:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return y if bias is None else y + bias[:, None, None]


def as_product(
    x: Float[Tensor, "n c_in h w"], weight: Float[Tensor, "c_out c_in 1 1"], stride: tuple[int, int] = (1, 1)
) -> Float[Tensor, "n c_out rows columns"]:
    """`F.conv2d(x, weight, stride=stride)` of a 1x1 kernel as one matrix product; channels_last in memory.

    >>> as_product(torch.ones(1, 2, 4, 4), torch.ones(3, 2, 1, 1), (2, 2)).shape
    torch.Size([1, 3, 2, 2])
    """
    rows, columns = stride
    strided = x[:, :, ::rows, ::columns].permute(0, 2, 3, 1)
    return (strided @ weight.flatten(1).T).permute(0, 3, 1, 2)


def _pair(value: Any) -> tuple[Any, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)
