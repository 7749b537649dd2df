"""Hypothesis strategies of configs, networks, batches, pytrees and dyadic tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from resnet_func import tree
from resnet_func.models.config import ActivationOrder, ResNetConfig
from resnet_func.models.resnet import build
from resnet_func.types import Model, Params, State

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "the strategies of resnet_func.testing need Hypothesis, which is not installed. "
        "Run `pip install hypothesis`, or `pip install 'resnet-func[testing]'`"
    ) from error

Block: TypeAlias = Literal["basic", "bottleneck", "preact"]
Norm: TypeAlias = Literal["batch", "group", "none"]

SEEDS = st.integers(0, 2**32 - 1)

# --------------------------------------------------------------------------- networks and batches


class _Network(NamedTuple):
    model: Model
    params: Params
    state: State


class Network(_Network):
    """`(model, params, state)` that prints as the call of `random_network` it came from."""

    config: ResNetConfig
    made_by: str

    def __repr__(self) -> str:
        return self.made_by


class _Batch(NamedTuple):
    x: Tensor
    y: Tensor


class Batch(_Batch):
    """`(x, y)` that prints as the call of `random_batch` it came from."""

    made_by: str

    def __repr__(self) -> str:
        return self.made_by


def random_network(config: ResNetConfig, seed: int, dtype: torch.dtype = torch.float32) -> Network:
    """A network with every parameter and statistic random: no affine weight is 1, no bias 0.

    What `model.init` draws, plus noise; running variances are 1 to 2, batch counters 1 to 9. A seed gives the
    same network in every dtype, up to rounding.

    >>> config = ResNetConfig(block="basic", depths=(1,), widths=(4,), norm="none", num_classes=3)
    >>> random_network(config, seed=0).params["fc"]["bias"].shape
    torch.Size([3])
    """
    source = torch.Generator().manual_seed(seed)
    model = build(config)
    params, state = model.init(source, dtype=torch.float64)

    def noisy(leaf: Tensor) -> Tensor:
        return (leaf + 0.3 * torch.randn(leaf.shape, generator=source, dtype=torch.float64)).to(dtype)

    def statistic(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return torch.randint(1, 10, leaf.shape, generator=source)
        return (leaf + torch.rand(leaf.shape, generator=source, dtype=torch.float64)).to(dtype)

    network = Network(model, tree.map(noisy, params), tree.map(statistic, state))
    network.config = config
    network.made_by = f"random_network({config}, {seed}, {dtype})"
    return network


def random_batch(
    shape: Sequence[int], seed: int, *, num_classes: int = 3, dtype: torch.dtype = torch.float32
) -> Batch:
    """Normal images of a shape `[N, C, H, W]`, and labels `[N]`.

    >>> x, y = random_batch([2, 3, 8, 8], seed=0)
    >>> x.shape, y.shape
    (torch.Size([2, 3, 8, 8]), torch.Size([2]))
    """
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=source, dtype=torch.float64).to(dtype)
    batch = Batch(x, torch.randint(num_classes, (shape[0],), generator=source))
    batch.made_by = f"random_batch({list(shape)}, {seed}, num_classes={num_classes}, dtype={dtype})"
    return batch


@st.composite
def configs(
    draw: st.DrawFn,
    *,
    blocks: Sequence[Block] = ("basic", "bottleneck", "preact"),
    norms: Sequence[Norm] = ("batch", "group", "none"),
    num_classes: int = 3,
) -> ResNetConfig:
    """Configs of tiny networks (at most four blocks, 8 channels before expansion), with every field in play.

    Args:
        blocks, norms: What to draw from; the first is the simplest, which shrinking goes to.
        num_classes: Of every config; images have 3 channels. For other fields, map:
            `configs().map(lambda config: dataclasses.replace(config, stem="cifar"))`.

    Every size of image fits every config.

    >>> from hypothesis import find
    >>> find(configs(), lambda config: config.norm == "group").norm_groups
    1
    """
    block = draw(st.sampled_from(blocks))
    widths = draw(st.sampled_from([(4,), (8,), (4, 4), (4, 8)]))
    fields: dict[str, Any] = {
        "depths": tuple(draw(st.integers(1, 2)) for _ in widths),
        "stem_width": draw(st.sampled_from([None, 4])),
        "stem": draw(st.sampled_from(["cifar", "imagenet"])),
        "norm": draw(st.sampled_from(norms)),
        "norm_groups": draw(st.sampled_from([1, 2])),
        "shortcut": draw(st.sampled_from(["projection", "pad"])),
        "zero_init_residual": draw(st.booleans()),
        "weight_standardization": draw(st.booleans()),
        "activation_order": draw(st.sampled_from([None, *get_args(ActivationOrder)])),
    }
    fields["standardization_affine"] = fields["weight_standardization"] and draw(st.booleans())
    fields["scale_norm"] = fields["norm"] != "none" and draw(st.booleans())
    if block == "bottleneck":
        fields["groups"] = draw(st.sampled_from([1, 2]))
        fields["width_per_group"] = draw(st.sampled_from([64, 96]))
        flags = tuple(draw(st.booleans()) for _ in widths[1:])
        fields["replace_stride_with_dilation"] = draw(st.sampled_from([(), flags]))
    return ResNetConfig(block=block, widths=widths, num_classes=num_classes, **fields)


@st.composite
def models(
    draw: st.DrawFn,
    config: st.SearchStrategy[ResNetConfig] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """`(model, params, state)` as `random_network` makes them.

    Args:
        config: Strategy of configs; None means `configs()`.
        dtype: Of parameters and statistics.

    >>> from hypothesis import find
    >>> find(models(), lambda network: network.model.config.norm == "group").model.config.norm
    'group'
    """
    return random_network(draw(configs() if config is None else config), draw(SEEDS), dtype)


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    samples: st.SearchStrategy[int] = st.integers(2, 4),  # noqa: B008
    sizes: st.SearchStrategy[int] = st.integers(9, 12),  # noqa: B008
    num_classes: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """`(x, y)`: normal images `[N, 3, H, W]` and labels `[N]` below `num_classes`.

    Args:
        samples: Strategy of N. One sample and one pixel is what BatchNorm refuses in training: with the
            defaults no network of `configs()` comes to that.
        sizes: Strategy of H and of W, drawn apart.
        num_classes: Labels are `0 .. num_classes - 1`.
        dtype: Of the images.

    >>> from hypothesis import find
    >>> find(batches(), lambda batch: True).x.shape[:2]
    torch.Size([2, 3])
    """
    shape = (draw(samples), 3, draw(sizes), draw(sizes))
    return random_batch(shape, draw(SEEDS), num_classes=num_classes, dtype=dtype)


# --------------------------------------------------------------------------- tensors and trees

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
SIZES = (1, 2, 3, 4, 1, 2, 3, 4, 0)  # seldom 0: then there is nothing to look at
LAYOUTS = ("contiguous", "transposed", "channels_last", "strided", "expanded", "offset")
Layout: TypeAlias = Literal["contiguous", "transposed", "channels_last", "strided", "expanded", "offset"]


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: Sequence[int] | st.SearchStrategy[Sequence[int]] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (*FLOATING, *WHOLE),
    layouts: Sequence[Layout] = LAYOUTS,
    special: bool = True,
) -> Tensor:
    """Tensors of any dtype, layout and stride, some with special values.

    Args:
        shape: A shape, or a strategy of shapes; None draws 0 to 5 dimensions of 0 to 4 entries.
        dtypes: What to draw from; the first is the simplest, which shrinking goes to.
        layouts: The same: "transposed" stores the dimensions backwards, "channels_last" is for 4 and 5
            dimensions (else contiguous), "strided" skips every other entry of its storage, "expanded" has
            stride 0 in its first dimension, "offset" starts in the middle of its storage.
        special: Put NaN, infinities, zeros of both signs, the smallest subnormal, and the smallest and
            largest number of the dtype among the entries (zero and those two, where it is not floating).

    >>> from hypothesis import find
    >>> find(tensors((2,), special=False), lambda leaf: True).dtype
    torch.float32
    """
    sizes = st.lists(st.sampled_from(SIZES), max_size=5) if shape is None else shape
    sizes = draw(sizes) if isinstance(sizes, st.SearchStrategy) else sizes
    dtype, layout = draw(st.sampled_from(dtypes)), draw(st.sampled_from(layouts))
    source = torch.Generator().manual_seed(draw(SEEDS))
    leaf = (10 * torch.randn(tuple(sizes), generator=source, dtype=torch.float64)).to(dtype)
    if special and leaf.numel() and draw(st.booleans()):
        for value in draw(st.lists(st.sampled_from(_special_values(dtype)), min_size=1, max_size=4)):
            leaf.view(-1)[draw(st.integers(0, leaf.numel() - 1))] = value
    return _laid_out(leaf, layout)


def _special_values(dtype: torch.dtype) -> list[float | int]:
    if dtype == torch.bool:
        return [0, 1]
    if not dtype.is_floating_point:
        return [0, torch.iinfo(dtype).min, torch.iinfo(dtype).max]
    info = torch.finfo(dtype)
    return [0.0, -0.0, info.smallest_normal * info.eps, info.tiny, info.min, info.max, *NOT_FINITE]


NOT_FINITE = (float("inf"), float("-inf"), float("nan"))


def _laid_out(leaf: Tensor, layout: Layout) -> Tensor:
    """The same values (but for "expanded", which repeats the first entry) in other strides."""
    if layout == "transposed":
        backwards = tuple(reversed(range(leaf.ndim)))
        return leaf.permute(backwards).contiguous().permute(backwards)
    if layout == "channels_last" and leaf.ndim in (4, 5):
        return leaf.contiguous(memory_format=[torch.channels_last, torch.channels_last_3d][leaf.ndim - 4])
    if layout == "strided" and leaf.ndim:
        return leaf.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded" and leaf.ndim and len(leaf):
        return leaf[:1].expand(leaf.shape)
    if layout == "offset":
        return torch.cat([leaf.new_zeros(1), leaf.reshape(-1)])[1:].view(leaf.shape)
    return leaf


@st.composite
def dyadic_tensors(
    draw: st.DrawFn,
    shape: Sequence[int],
    *,
    largest: int = 3,
    exponents: st.SearchStrategy[int] = st.just(0),  # noqa: B008
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Tensors of integers in `-largest .. largest` times one power of two: data on which sums are exact.

    A sum of m products of entries up to `a` and `b` is exact, in any order, while `m * a * b` is at most 2^53
    in float64, 2^24 in float32. Then reassociation (another batch size, another kernel) changes no bit.

    Args:
        shape: Of the tensor.
        largest: The largest integer, 1 or more; shrinks to 1.
        exponents: Strategy of the power; `st.integers(-3, 3)` for instance.
        dtype: A floating dtype.

    Raises:
        ValueError: `largest` is below 1, or too large for the dtype.

    >>> from hypothesis import find
    >>> found = find(dyadic_tensors((2, 3)), lambda t: True)
    >>> torch.equal(found, found.round()), found.dtype
    (True, torch.float64)
    """
    if not 1 <= largest <= 2 / torch.finfo(dtype).eps:
        raise ValueError(f"largest must be in 1 .. 2/eps, so that {dtype} holds every integer; got {largest}")
    source = torch.Generator().manual_seed(draw(SEEDS))
    most = draw(st.integers(1, largest))
    return _dyadic(tuple(shape), most, source).to(dtype) * 2.0 ** draw(exponents)


def _dyadic(shape: Sequence[int], largest: int, source: torch.Generator) -> Tensor:
    return torch.randint(-largest, largest + 1, tuple(shape), generator=source)


@st.composite
def pytrees_like(draw: st.DrawFn, example: Any, *, largest: int | None = None) -> Any:
    """Trees of the structure, shapes and dtypes of `example`, with other values.

    Args:
        example: Any pytree of tensors, on any device: `model.init(generator, device="meta")[0]` will do.
        largest: None draws floating leaves from the normal distribution; a number draws integers in
            `-largest .. largest`, as `dyadic_tensors` does. Integer leaves are in 0 .. 9.

    >>> from hypothesis import find
    >>> find(pytrees_like({"a": torch.zeros(2), "b": torch.zeros(3)}), lambda t: True)["b"].shape
    torch.Size([3])
    """
    source = torch.Generator().manual_seed(draw(SEEDS))

    def fresh(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return torch.randint(2 if leaf.dtype == torch.bool else 10, leaf.shape, generator=source).to(
                leaf.dtype
            )
        if largest is not None:
            return _dyadic(leaf.shape, largest, source).to(leaf.dtype)
        return torch.randn(leaf.shape, generator=source, dtype=torch.float64).to(leaf.dtype)

    return tree.map(fresh, example)
