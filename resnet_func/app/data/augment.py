"""Pixels as pure functions of a batch: crop, flip, cutout with a draw per image; resize; normalise.

Every function is vectorised, runs on the device of the batch `[N, C, H, W]`, keeps its memory format and
leaves it alone. Randomness is a `torch.Generator` on that device; the global seed is neither read nor set.
The same generator state gives the same result on the same device; devices differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

Batch: TypeAlias = Shaped[Tensor, "n c h w"]
Pad: TypeAlias = Literal["reflect", "constant"]


@dataclass(frozen=True)
class Augment:
    """What to do to a training batch; the defaults do nothing.

    Attributes:
        crop: pixels of padding on each side before a crop back to the image's size; 0 for none.
        flip: mirror left and right: with probability one half, or those that `apply` is told.
        cutout: side of the square that is blanked, in pixels; 0 for none.
        pad: what the padding holds: the mirrored image ("reflect") or zeros ("constant").
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0
    pad: Pad = "reflect"

    def __post_init__(self) -> None:
        if self.crop < 0 or self.cutout < 0:
            raise ValueError(f"crop and cutout are pixels, 0 or more; got {self.crop} and {self.cutout}")
        _check_pad(self.pad)


class Part(NamedTuple):
    """Which rows of a batch of `size` images are here: draws are those that the whole batch would have."""

    rows: slice
    size: int


def apply(
    augment: Augment,
    x: Batch,
    generator: torch.Generator,
    part: Part | None = None,
    mirrored: Bool[Tensor, "n"] | None = None,
) -> Batch:
    """Crop, flip and cut out, each as `augment` says.

    Zeros fill the cutout and the constant padding. After `data.normalize` zero is the mean of the data, the
    usual choice for both; on uint8 it is black.

    Args:
        augment: what to do. A field that is off draws nothing from the generator.
        x: images [N, C, H, W]; N may be 0.
        generator: on the device of `x`.
        part: `x` is so much of a batch, and gets what those images get in the whole of it.
        mirrored: which images to flip, where flips are on; nothing is drawn for them then.

    Returns:
        Images of the same shape, dtype and memory format.

    Raises:
        ValueError: `x` is not a batch of images, the generator is on another device, or crop or cutout does
            not fit the image.

    >>> x = torch.ones(2, 3, 8, 8)
    >>> apply(Augment(crop=2, flip=True), x, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 8, 8])
    """
    if augment.crop:
        x = random_crop(x, augment.crop, generator, augment.pad, part)
    if augment.flip:
        told = mirrored is not None
        x = _mirror(x, mirrored.view(-1, 1, 1, 1)) if told else random_flip(x, generator, part)
    if augment.cutout:
        x = cutout(x, augment.cutout, generator, part)
    return x


def random_crop(
    x: Batch, padding: int, generator: torch.Generator, pad: Pad = "reflect", part: Part | None = None
) -> Batch:
    """Pad each image on all sides and cut a window of its own size at a place of its own.

    Args:
        x: images [N, C, H, W]; N may be 0.
        padding: pixels on each side. 0 returns the images as they are.
        generator: on the device of `x`; one offset in 0 .. 2 * padding is drawn per image and axis.
        pad: "reflect" mirrors without repeating the edge, "constant" pads with zeros.
        part: as in `apply`.

    Returns:
        Images of the same shape, dtype and memory format.

    Raises:
        ValueError: padding is negative, or "reflect" is asked to mirror more pixels than there are.

    >>> x = torch.ones(2, 3, 8, 8)
    >>> random_crop(x, 1, torch.Generator().manual_seed(0)).equal(x)
    True
    """
    _check(x, generator)
    _check_pad(pad)
    n, c, height, width = x.shape
    index: dict[str, Any] = {"dtype": torch.int64, "device": x.device}
    if padding < 0 or (pad == "reflect" and padding >= min(height, width)):
        raise ValueError(
            f"{pad} padding must be 0 or more and below the image's side; got {padding} for {height}x{width} "
            f'images. Try padding={min(height, width) // 8} or pad="constant"'
        )
    offsets = _draw(2 * padding + 1, (2, -1, 1), x, generator, part) - padding
    rows = offsets[0] + torch.arange(height, **index)
    columns = offsets[1] + torch.arange(width, **index)
    # One gather over flat pixels reads each window straight from the image: no padded copy exists, and unlike
    # F.pad it works for every dtype on every device.
    pixels = _fold(rows, height)[:, :, None] * width + _fold(columns, width)[:, None, :]
    pixels = pixels.view(n, 1, height * width).expand(n, c, height * width)
    out = x.reshape(n, c, height * width).gather(2, pixels).view(n, c, height, width)
    if pad == "constant":
        out = _blank(out, ~(_within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]))
    return out.contiguous(memory_format=_memory_format(x))


def random_flip(x: Batch, generator: torch.Generator, part: Part | None = None) -> Batch:
    """Mirror each image left and right with probability one half.

    Args:
        x: images [N, C, H, W]; N may be 0.
        generator: on the device of `x`.
        part: as in `apply`.

    Returns:
        Images of the same shape, dtype and memory format.

    Raises:
        ValueError: `x` is not a batch of images, or the generator is on another device.

    >>> x = torch.ones(2, 3, 8, 8)
    >>> random_flip(x, torch.Generator().manual_seed(0)).equal(x)
    True
    """
    _check(x, generator)
    return _mirror(x, _draw(2, (-1, 1, 1, 1), x, generator, part) == 1)


def mirrored_in(epoch: int, images: int, generator: torch.Generator) -> Bool[Tensor, "images"]:
    """Which images an epoch mirrors: a drawn half in the first, the others in the next, in turn.

    So an image is seen from both sides in any two epochs, where independent draws would show half of them
    twice from the same one: Jordan 2024, https://arxiv.org/abs/2404.00498.

    Args:
        epoch: from 0.
        images: of the data set; 0 or more.
        generator: on the CPU, with the same seed in every epoch.

    >>> first, second = (mirrored_in(epoch, 4, torch.Generator().manual_seed(0)) for epoch in (0, 1))
    >>> (first ^ second).all()
    tensor(True)
    """
    drawn = torch.randint(0, 2, (images,), generator=generator, dtype=torch.int64, device="cpu")
    return (drawn + epoch) % 2 == 1


def cutout(x: Batch, size: int, generator: torch.Generator, part: Part | None = None) -> Batch:
    """Set a square of each image to zero: DeVries and Taylor 2017, https://arxiv.org/abs/1708.04552.

    The square's centre is uniform over the pixels, so that a square near the border loses what lies outside.

    Args:
        x: images [N, C, H, W]; N may be 0.
        size: side of the square in pixels; 0 returns the images as they are.
        generator: on the device of `x`.
        part: as in `apply`.

    Returns:
        Images of the same shape, dtype and memory format.

    Raises:
        ValueError: size is negative or larger than the image.

    >>> cutout(torch.ones(1, 1, 8, 8), 1, torch.Generator().manual_seed(0)).sum()
    tensor(63.)
    """
    _check(x, generator)
    height, width = x.shape[2:]
    index: dict[str, Any] = {"dtype": torch.int64, "device": x.device}
    if not 0 <= size <= min(height, width):
        raise ValueError(f"cutout size must be 0 to {min(height, width)} for {height}x{width}; got {size}")
    tops = _draw(height, (-1, 1), x, generator, part) - size // 2
    lefts = _draw(width, (-1, 1), x, generator, part) - size // 2
    rows = _within(torch.arange(height, **index) - tops, size)
    columns = _within(torch.arange(width, **index) - lefts, size)
    return _blank(x, rows[:, :, None] & columns[:, None, :])


def resize(x: Batch, size: int) -> Batch:
    """Resize to `size` x `size` by antialiased bilinear interpolation; a cropless stretch if not square.

    Args:
        x: images [N, C, H, W], uint8 or float; N may be 0.
        size: side of the result in pixels.

    Returns:
        Images [N, C, size, size] of the same dtype and memory format; uint8 is rounded to nearest.

    Raises:
        ValueError: `x` is not a batch of images, or size is not positive.

    >>> resize(torch.zeros(2, 3, 8, 6, dtype=torch.uint8), 4).shape
    torch.Size([2, 3, 4, 4])
    """
    if x.ndim != 4 or size < 1:
        raise ValueError(
            f"resize takes images [N, C, H, W] and a size of 1 or more; got {tuple(x.shape)} and {size}"
        )
    if tuple(x.shape[2:]) == (size, size):
        return x
    floats = x if x.is_floating_point() else x.to(torch.float32)
    out = F.interpolate(floats, (size, size), mode="bilinear", antialias=True)
    # Interpolation never leaves the range of its inputs by more than round-off, which rounding removes.
    return out if x.is_floating_point() else out.round().to(x.dtype)


def normalize(
    images: UInt8[Tensor, "n c h w"],
    mean: Float[Tensor, "c"],
    std: Float[Tensor, "c"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "n c h w"]:
    """`(images / 255 - mean) / std`, to the bit what torchvision's `ToTensor` and `Normalize` give.

    Args:
        images: uint8 [N, C, H, W]; N may be 0.
        mean: [C] in [0, 1], on the device of the images.
        std: [C] in [0, 1], likewise.
        dtype: of the result; anything below float32 is computed in float32 and rounded once.

    Returns:
        Images of the same shape and memory format.

    Raises:
        ValueError: the images are not uint8, or their channels are not those of mean and std.

    >>> white = torch.full((1, 1, 1, 2), 255, dtype=torch.uint8)
    >>> normalize(white, torch.tensor([0.5]), torch.tensor([0.25])).flatten()
    tensor([2., 2.])
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or not mean.shape == std.shape == images.shape[1:2]:
        raise ValueError(
            f"expected uint8 images [N, C, H, W] with mean and std [C]; got "
            f"{images.dtype} {list(images.shape)}, {list(mean.shape)} and {list(std.shape)}"
        )
    compute_dtype = torch.promote_types(dtype, torch.float32)
    mean, std = (value.to(compute_dtype).view(-1, 1, 1) for value in (mean, std))
    return images.to(compute_dtype).div(255).sub(mean).div(std).to(dtype)


def _draw(
    high: int, shape: tuple[int, ...], x: Batch, generator: torch.Generator, part: Part | None
) -> Int[Tensor, "..."]:
    """Integers in 0 .. high - 1 for each image of `x`, which the -1 in `shape` stands for."""
    size, rows = (len(x), slice(None)) if part is None else (part.size, part.rows)
    whole = tuple(size if side == -1 else side for side in shape)
    drawn = torch.randint(0, high, whole, generator=generator, dtype=torch.int64, device=x.device)
    return drawn[(slice(None),) * shape.index(-1) + (rows,)]


def _mirror(x: Batch, which: Bool[Tensor, "n 1 1 1"]) -> Batch:
    return torch.where(which.to(x.device), x.flip(3), x)


def _check(x: Tensor, generator: torch.Generator) -> None:
    if x.ndim != 4:
        raise ValueError(f"expected a batch of images [N, C, H, W]; got shape {tuple(x.shape)}")
    if x.device.type != generator.device.type:
        raise ValueError(
            f"the generator must be on the device of the images; got {generator.device} for {x.device}. "
            f'Try torch.Generator("{x.device}")'
        )


def _check_pad(pad: str) -> None:
    if pad not in ("reflect", "constant"):
        raise ValueError(f'pad must be "reflect" or "constant"; got {pad!r}')


def _fold(index: Int[Tensor, "n k"], size: int) -> Int[Tensor, "n k"]:
    """Mirror positions outside 0 .. size - 1 back in, the edge not repeated; clamp what is still outside."""
    return (size - 1 - (size - 1 - index.abs()).abs()).clamp_min(0)


def _blank(x: Tensor, mask: Bool[Tensor, "n h w"]) -> Tensor:
    # torch.where, since masked_fill out of place drops channels_last.
    return torch.where(mask[:, None], torch.zeros((), dtype=x.dtype, device=x.device), x)


def _within(index: Int[Tensor, "n k"], size: int) -> Tensor:
    return (index >= 0) & (index < size)


def _memory_format(x: Tensor) -> torch.memory_format:
    last = torch.channels_last
    return last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format
