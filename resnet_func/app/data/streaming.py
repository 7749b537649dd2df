"""Image folders: files to pixels, all at once behind a cache (`load_images`) or batch by batch (`Stream`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.utils.data
from jaxtyping import Int64, UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from resnet_func.files import replacing

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
CACHE_FOLDER = ".resnet_func_cache"
LAYOUT = "train/<class>/<image> and test/<class>/<image>"
DECODE_CHUNK = 128
DECODE_VERSION = 1  # to be raised when `decode` gives other pixels, so that no old cache is used

ImageBatch: TypeAlias = tuple[UInt8[Tensor, "n c h w"], Int64[Tensor, "n"]]

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that cannot be used: one line that names the file or folder, and the way out."""


@dataclass(frozen=True)
class Listing:
    """The image files of one split, by class and then by path. Nothing is decoded.

    `fingerprint` changes when a file is added, removed, renamed or written, or a class index changes.
    """

    folder: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    fingerprint: str


def list_images(folder: Path, classes: Sequence[str] | None = None) -> Listing:
    """List `folder/<class>/**/<image>`; hidden files and files that are no images are passed over.

    Args:
        folder: holds one folder per class.
        classes: every class there may be, in label order; None takes the sorted folder names.

    Returns:
        The listing; labels index `classes`.

    Raises:
        DataError: the folder cannot be read or has no class folders, a class has no images, or a class is
            not among `classes`.
    """
    try:
        names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
        found = [(name, entry) for name in names for entry in _walk(folder / name)]
        stats = [(entry.path, entry.stat()) for _, entry in found]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error}); expected {LAYOUT}") from error
    if not names:
        raise DataError(f"{folder}: no class folders; expected {LAYOUT}")
    if classes is None:
        classes = names
    if unknown := sorted(set(names) - set(classes)):
        raise DataError(f"{folder / unknown[0]}: no such class among the {len(classes)} of train")
    if empty := sorted(set(names) - {name for name, _ in found}):
        suffixes = " ".join(sorted(SUFFIXES))
        raise DataError(f"{folder / empty[0]}: no images ({suffixes}); add some or delete the folder")
    index = {name: i for i, name in enumerate(classes)}
    facts = [[os.path.relpath(path, folder), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    facts.append([DECODE_VERSION, *classes])
    return Listing(
        folder=folder,
        classes=tuple(classes),
        files=tuple(path for path, _ in stats),
        labels=tuple(index[name] for name, _ in found),
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
    )


def _walk(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            yield entry


def decode(path: str, image_size: int | None) -> UInt8[np.ndarray, "3 h w"]:
    """Decode one image to RGB; with `image_size`, the centre square by antialiased bilinear resize.

    Grey is repeated, alpha is dropped, 16 bits keep the upper 8, an animation gives its first frame. EXIF
    orientation is not applied. All as torchvision's ImageFolder does it.

    Raises:
        DataError: the file is unreadable, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            rgb = _to_rgb(image)
    except (
        Exception
    ) as error:  # each of Pillow's formats raises its own: OSError, SyntaxError, struct.error ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be decoded ({reason}); replace it or delete it") from error
    if image_size is not None and rgb.size != (image_size, image_size):
        width, height = rgb.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        square = (left, top, left + side, top + side)
        rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR, box=square)
    return np.asarray(rgb).transpose(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels, mode {image.mode}, have no 8-bit meaning")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB warns
    return image.convert("RGB")


def _decode_into(files: Sequence[str], image_size: int | None, out: np.ndarray) -> None:
    for path, pixels in zip(files, out, strict=True):
        image = decode(path, image_size)
        if image.shape != pixels.shape:
            size, expected = f"{image.shape[2]}x{image.shape[1]}", f"{pixels.shape[2]}x{pixels.shape[1]}"
            raise DataError(f"{path}: {size} pixels, and the images before it {expected}; set image_size")
        pixels[:] = image


def _decode_all(files: Sequence[str], image_size: int | None) -> UInt8[Tensor, "n 3 h w"]:
    """Decode in threads; Pillow lets go of the interpreter lock while it decodes and resizes."""
    images = torch.empty((len(files), *decode(files[0], image_size).shape), dtype=torch.uint8)
    pixels = images.numpy()

    def fill(start: int) -> None:
        part = slice(start, start + DECODE_CHUNK)
        _decode_into(files[part], image_size, pixels[part])

    pool = ThreadPoolExecutor()
    try:
        for _ in pool.map(fill, range(0, len(files), DECODE_CHUNK)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # a bad file or Ctrl-C does not wait for the rest
    return images


def load_images(listings: Iterable[Listing], image_size: int | None) -> list[UInt8[Tensor, "n 3 h w"]]:
    """Decode each split, or read it from the cache beside the data when nothing has changed since.

    Args:
        listings: the splits; a cache is `<folder>/../.resnet_func_cache/<split>-<image_size>.safetensors`.
        image_size: side in pixels; None keeps the images' own size, which must then be the same for all.

    Returns:
        One tensor per split. A cache that is stale or damaged is rebuilt; one that cannot be written costs a
        line in the log.

    Raises:
        DataError: an image is unreadable, or differs in size when `image_size` is None.
    """
    images, problem = [], None
    for listing in listings:
        size = "native" if image_size is None else image_size
        path = listing.folder.parent / CACHE_FOLDER / f"{listing.folder.name}-{size}.safetensors"
        pixels = _read_cache(path, listing.fingerprint)
        if pixels is None:
            pixels = _decode_all(listing.files, image_size)
            problem = _write_cache(path, listing.fingerprint, pixels) or problem
        images.append(pixels)
    if problem is not None:
        logger.warning("no cache, the images are decoded again on every start: %s", problem)
    return images


def _read_cache(path: Path, fingerprint: str) -> Tensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                return None
            images = file.get_tensor("images")
    except (OSError, SafetensorError):
        return None
    return images if metadata.get("crc32") == _crc32(images) else None


def _write_cache(path: Path, fingerprint: str, images: Tensor) -> Exception | None:
    """Write the cache whole or not at all. Returns what went wrong, if at all."""
    metadata = {"fingerprint": fingerprint, "crc32": _crc32(images)}
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            save_file({"images": images}, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        return error
    return None


def _crc32(images: Tensor) -> str:
    return f"{zlib.crc32(images.numpy().reshape(-1).data):08x}"


@dataclass(frozen=True, eq=False)
class Stream:
    """One split of a folder too large for memory: worker processes decode each batch when it is due.

    The same `data.Source` as a `data.Dataset`, to the bit: order is the caller's and decoding draws nothing.
    """

    files: tuple[str, ...]
    labels: Int64[Tensor, "n"]
    classes: tuple[str, ...]
    name: str
    image_shape: tuple[int, int, int]
    image_size: int | None = None
    workers: int = 1
    device: torch.device | str = "cpu"

    @property
    def num_samples(self) -> int:
        return len(self.files)

    def to(self, device: torch.device | str) -> Stream:
        """The same split, its batches delivered on `device`."""
        return dataclasses.replace(self, device=device)

    def read(self, index_batches: Iterable[Int64[Tensor, "k"]]) -> Iterator[ImageBatch]:
        """Yield `(images [k, 3, h, w], labels [k])` for each batch of sample indices, in that order.

        Raises:
            DataError: an image is unreadable, or differs in size when `image_size` is None.
        """
        loader = torch.utils.data.DataLoader(
            _Files(self),
            batch_size=None,  # an index here is a whole batch of them
            sampler=[index.tolist() for index in index_batches],
            num_workers=self.workers,
            pin_memory=torch.device(self.device).type == "cuda",
            generator=torch.Generator(),  # the default draws the workers' seed from the global generator
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = batch
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def open_stream(listing: Listing, image_size: int | None, name: str) -> Stream:
    """A stream over a listing, one worker per usable core (8 at most); the first image gives the shape."""
    _, height, width = decode(listing.files[0], image_size).shape
    return Stream(
        files=listing.files,
        labels=torch.tensor(listing.labels),
        classes=listing.classes,
        name=name,
        image_shape=(3, height, width),
        image_size=image_size,
        workers=min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4),
    )


class _Files(torch.utils.data.Dataset[Any]):
    """A stream as the map-style data set that DataLoader's workers want, whole batches at a time."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return self.stream.num_samples

    def __getitem__(self, indices: list[int]) -> ImageBatch | DataError:
        images = torch.empty((len(indices), *self.stream.image_shape), dtype=torch.uint8)
        files = [self.stream.files[i] for i in indices]
        try:
            _decode_into(files, self.stream.image_size, images.numpy())
        except DataError as error:
            return error  # as a value: DataLoader would wrap a raised one in the worker's traceback
        return images, self.stream.labels[indices]
