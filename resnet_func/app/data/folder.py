"""Image folders: list the files of a split, and decode them all at once behind a cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from resnet_func.app.data.decoding import DECODE_VERSION, DataError, decode_with_notes, log_once
from resnet_func.app.data.members import Archives
from resnet_func.app.names import printable
from resnet_func.files import replacing

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
CACHE_FOLDER = ".resnet_func_cache"
LAYOUT = "train/<class>/<image> and test/<class>/<image>"
DECODE_CHUNK = 128

Identity: TypeAlias = tuple[int, int]  # device and inode: one for a folder, whatever links lead to it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """The image files of one split, by class and then by path; or addresses of `members`. Nothing is decoded.

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
    skipped: list[str] = []
    entries = _names(folder)
    ancestors = {_identity(path) for path in (folder.absolute(), *folder.absolute().parents)}
    names = [name for name in entries if _is_class(folder / name, ancestors, skipped)]
    found = [(name, *file) for name in names for file in _find_images(folder / name, ancestors, skipped)]
    if skipped:
        more = f", and {len(skipped) - 1:,} more like it" if len(skipped) > 1 else ""
        logger.warning("passed over %s%s", printable(skipped[0]), more)
    if not names:
        raise DataError(f"{folder}: no class folders; expected {LAYOUT}")
    if classes is None:
        classes = names
    if unknown := sorted(set(names) - set(classes)):
        raise DataError(f"{folder / unknown[0]}: no such class among the {len(classes)} of train")
    if empty := sorted(set(names) - {name for name, *_ in found}):
        suffixes = " ".join(sorted(SUFFIXES))
        raise DataError(f"{folder / empty[0]}: no images ({suffixes}); add some or delete the folder")
    index = {name: i for i, name in enumerate(classes)}
    facts = [[os.path.relpath(path, folder), file.st_size, file.st_mtime_ns] for _, path, file in found]
    facts.append([DECODE_VERSION, *classes])
    return Listing(
        folder=folder,
        classes=tuple(classes),
        files=tuple(path for _, path, _ in found),
        labels=tuple(index[name] for name, *_ in found),
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
    )


def _names(folder: Path | str) -> list[str]:
    """What is in a folder and not hidden, sorted."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); expected {LAYOUT}") from error


def _is_class(path: Path, ancestors: set[Identity], skipped: list[str]) -> bool:
    try:
        if not path.is_dir():
            if path.is_symlink():
                path.stat()  # raises for a link that leads nowhere
            return False
        if _identity(path) not in ancestors:
            return True
        skipped.append(f"{path} (a link to a folder that it lies in)")
    except OSError as error:
        skipped.append(f"{path} ({error.strerror})")
    return False


def _find_images(
    folder: Path, ancestors: set[Identity], skipped: list[str]
) -> Iterator[tuple[str, os.stat_result]]:
    """Yield `(path, stat)` of the image files below, in order; links are followed, but none twice."""
    visited = {*ancestors, *(_identity(path) for path in folder.resolve().parents)}
    paths = [str(folder)]
    while paths:
        path = paths.pop()
        is_image = os.path.splitext(path)[1].lower() in SUFFIXES
        try:
            status = os.stat(path)
        except OSError as error:  # a link that leads nowhere or to itself, a file that was just deleted
            skipped.append(f"{path} ({error.strerror})")
            continue
        if stat.S_ISDIR(status.st_mode):
            if (status.st_dev, status.st_ino) in visited:
                skipped.append(f"{path} (a link to a folder that is read already)")
                continue
            visited.add((status.st_dev, status.st_ino))
            paths += [os.path.join(path, name) for name in reversed(_names(path))]
        elif is_image and stat.S_ISREG(status.st_mode):
            yield path, status
        elif is_image:
            skipped.append(f"{path} (not a regular file)")


def _identity(path: Path) -> Identity:
    status = path.stat()
    return status.st_dev, status.st_ino


def decode_into(files: Sequence[str], image_size: int | None, out: UInt8[np.ndarray, "n 3 h w"]) -> list[str]:
    """Decode files into `out`, and return what Pillow warns of, a line each.

    Raises:
        DataError: an image is unreadable, or its size is not that of `out`.
    """
    notes: list[str] = []
    with Archives() as archives:
        for path, pixels in zip(files, out, strict=True):
            image, said = decode_with_notes(path, image_size, archives)
            if image.shape != pixels.shape:
                size, expected = f"{image.shape[2]}x{image.shape[1]}", f"{pixels.shape[2]}x{pixels.shape[1]}"
                raise DataError(f"{path}: {size} pixels, and the images before it {expected}; set image_size")
            pixels[:] = image
            notes += said
    return notes


def _decode_all(files: Sequence[str], image_size: int | None) -> UInt8[Tensor, "n 3 h w"]:
    """Decode in threads; Pillow lets go of the interpreter lock while it decodes and resizes."""
    first, _ = decode_with_notes(files[0], image_size)
    images = torch.empty((len(files), *first.shape), dtype=torch.uint8, device="cpu")
    pixels = images.numpy()

    def fill(start: int) -> list[str]:
        part = slice(start, start + DECODE_CHUNK)
        return decode_into(files[part], image_size, pixels[part])

    pool = ThreadPoolExecutor()
    try:
        for notes in pool.map(fill, range(0, len(files), DECODE_CHUNK)):
            log_once(notes)
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
        reason = printable(str(problem))
        logger.warning("no cache, the images are decoded again on every start: %s", reason)
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
