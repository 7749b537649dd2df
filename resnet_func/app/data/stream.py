"""A split too large for memory: worker processes decode each batch when it is due."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.utils.data
from jaxtyping import Int64, UInt8
from torch import Tensor

from resnet_func.app.data.decoding import DataError, decode, log_once
from resnet_func.app.data.folder import Listing, decode_into

ImageBatch: TypeAlias = tuple[UInt8[Tensor, "n c h w"], Int64[Tensor, "n"]]


@dataclass(frozen=True, eq=False)
class Stream:
    """One split too large for memory, of files or shards: workers decode each batch when it is due.

    `files` are paths, or addresses of `members`. The same `data.Source` as a `data.Dataset`, to the bit:
    order is the caller's and decoding draws nothing.
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
            worker_init_fn=_ignore_interrupts,
            pin_memory=torch.device(self.device).type == "cuda",
            generator=torch.Generator("cpu"),  # the default draws the workers' seed from the global generator
        )
        for batch in _start_workers(loader):
            if isinstance(batch, DataError):
                raise batch
            images, labels, notes = batch
            log_once(notes)
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def open_stream(listing: Listing, image_size: int | None, name: str) -> Stream:
    """A stream over a listing, one worker per usable core (8 at most); the first image gives the shape."""
    _, height, width = decode(listing.files[0], image_size).shape
    return Stream(
        files=listing.files,
        labels=torch.tensor(listing.labels, dtype=torch.int64, device="cpu"),
        classes=listing.classes,
        name=name,
        image_shape=(3, height, width),
        image_size=image_size,
        workers=min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4),
    )


def _start_workers(loader: torch.utils.data.DataLoader[Any]) -> Iterator[Any]:
    with torch.device("cpu"):  # the loader draws a seed, on whatever the default device is
        return iter(loader)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent decides what to do, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Files(torch.utils.data.Dataset[Any]):
    """A stream as the map-style data set that DataLoader's workers want, whole batches at a time."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return self.stream.num_samples

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor, list[str]] | DataError:
        images = torch.empty((len(indices), *self.stream.image_shape), dtype=torch.uint8, device="cpu")
        files = [self.stream.files[i] for i in indices]
        try:
            notes = decode_into(files, self.stream.image_size, images.numpy())
        except DataError as error:
            return error  # as a value: DataLoader would wrap a raised one in the worker's traceback
        return images, self.stream.labels[indices], notes
