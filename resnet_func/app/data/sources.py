"""Data sets as uint8 tensors: load them, measure them, iterate in an order that a generator decides."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from resnet_func.app.data import augment, shards
from resnet_func.app.data.augment import normalize as normalize  # the other half of channel_statistics
from resnet_func.app.data.decoding import DataError, decode
from resnet_func.app.data.folder import LAYOUT, list_images, load_images
from resnet_func.app.data.stream import ImageBatch, Stream, open_stream

# torchvision's class, and the folder that it reads below data_dir.
TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw"),
}
NAMES = ("digits", *TORCHVISION, "folder", "shards")
CHUNK = 1024  # images at a time, at most, where a whole data set is converted
CHUNK_BYTES = 8 << 20  # their uint8 pixels, at most; what is computed from them takes up to 8 times as much
STREAM_STATISTICS_IMAGES = 16_384


class Source(Protocol):
    """One split, in memory (`Dataset`) or decoded as it goes (`Stream`): all that training needs of it."""

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def image_shape(self) -> tuple[int, int, int]: ...  # channels, height, width
    @property
    def labels(self) -> Int64[Tensor, "n"]: ...
    @property
    def files(self) -> tuple[str, ...]: ...  # of the images; empty where they have none

    def to(self, device: torch.device | str) -> Source:
        """The same split, its batches delivered on `device`."""
        ...

    def read(self, index_batches: Iterable[Int64[Tensor, "k"]]) -> Iterator[ImageBatch]:
        """Yield `(images, labels)` for each batch of sample indices, in that order."""
        ...


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split held in memory: labels index `classes`; `name` tells the data set and the split.

    `files` are the images' files, if they have any.
    """

    images: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, "n"]
    classes: tuple[str, ...]
    name: str
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, C, H, W]; got {_describe(self.images)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be int64 [{len(self.images)}]; got {_describe(self.labels)}")

    @property
    def num_samples(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return channels, height, width

    def to(self, device: torch.device | str) -> Self:
        """The same split with images and labels on `device`."""
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def read(self, index_batches: Iterable[Int64[Tensor, "k"]]) -> Iterator[ImageBatch]:
        """Yield `(images [k, C, H, W], labels [k])` for each batch of sample indices, in that order."""
        for index in index_batches:
            index = index.to(self.images.device)
            yield self.images[index], self.labels[index]


class Splits(NamedTuple):
    """What there is to train on, and what to test on: two `Dataset`s, or two `Stream`s."""

    train: Source
    test: Source


def load(
    name: str,
    data_dir: Path | str | None = None,
    *,
    image_size: int | None = None,
    download: bool = True,
    max_bytes: int | None = None,
) -> Splits:
    """Load a data set by name.

    Args:
        name: one of `NAMES`. "digits" are scikit-learn's: embedded, 8x8 grey, every fifth image of a class is
            for testing. "folder" holds `train/<class>/*` and `test/<class>/*` (without `test`, `val` or
            `valid`), and its images become RGB. "shards" are such images in tar archives (`shards`), and are
            always streamed. The rest are torchvision's.
        data_dir: the folder; for the downloads torchvision's root, ~/.cache/resnet_func by default.
        image_size: side in pixels to resize to, antialiased, the centre square of what is not square; None
            keeps the images as they are.
        download: whether a data set that is missing may be downloaded.
        max_bytes: decoded bytes above which a folder streams; half of the available memory by default.

    Returns:
        Train and test split: `Dataset`s, or for shards and for a folder above `max_bytes` `Stream`s.

    Raises:
        DataError: the data is missing, damaged or ill-arranged.
        ValueError: `image_size` is not positive.

    >>> train, test = load("digits")
    >>> train.num_samples, test.num_samples, train.image_shape
    (1433, 364, (1, 8, 8))
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be 1 or more pixels; got {image_size}")
    if name not in NAMES:
        raise DataError(f"no data set is called {name!r}; there are {', '.join(NAMES)}")
    if name == "folder":
        if data_dir is None:
            raise DataError(f"folder needs data_dir, a folder that holds {LAYOUT}")
        return _folder(Path(data_dir), image_size, max_bytes)
    if name == "shards":
        if data_dir is None:
            raise DataError(f"shards need data_dir, a folder that holds {shards.LAYOUT}")
        return _shards(Path(data_dir).expanduser(), image_size)
    if name == "digits":
        train, test = _digits()
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        root = caches / "resnet_func" if data_dir is None else Path(data_dir).expanduser()
        train, test = (_torchvision(name, root, train=train, download=download) for train in (True, False))
    return Splits(_resized(train, image_size), _resized(test, image_size))


def _digits() -> tuple[Dataset, Dataset]:
    from sklearn.datasets import load_digits  # a second of import that only this data set needs

    values, targets = load_digits(return_X_y=True)
    images = (torch.from_numpy(values) * (255 / 16)).round().to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.from_numpy(targets).to(torch.int64)
    test = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label in range(10):
        test[(labels == label).nonzero()[::5]] = True
    classes = tuple(str(label) for label in range(10))
    return (
        Dataset(images[~test], labels[~test], classes, "digits train"),
        Dataset(images[test], labels[test], classes, "digits test"),
    )


def _torchvision(name: str, root: Path, *, train: bool, download: bool) -> Dataset:
    from torchvision import datasets  # two seconds of import that the digits do not need

    class_name, folder = TORCHVISION[name]
    try:
        with warnings.catch_warnings():
            # CIFAR's pickles are older than numpy's dtype(align=bool)
            warnings.filterwarnings("ignore", message=r".*align should be passed as")
            with torch.device("cpu"):  # torchvision's own code creates tensors too
                raw = getattr(datasets, class_name)(root, train=train, download=download)
    except Exception as error:  # torchvision passes on whatever urllib, tarfile, pickle, assert ... raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name}: torchvision cannot load {root / folder} ({reason}); check the network and "
            f"delete what is damaged there, or copy the folder from a machine that has it"
        ) from error
    images = torch.as_tensor(raw.data, dtype=torch.uint8, device="cpu")
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(raw.targets, dtype=torch.int64, device="cpu")
    return Dataset(images, labels, tuple(raw.classes), f"{name} {'train' if train else 'test'}")


def _folder(root: Path, image_size: int | None, max_bytes: int | None) -> Splits:
    root = root.expanduser()
    folders = [root / name for name in ("test", "val", "valid") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not folders:
        raise DataError(f"{root}: expected {LAYOUT}")
    train = list_images(root / "train")
    listings = (train, list_images(folders[0], train.classes))
    names = [f"{root.name} {listing.folder.name}" for listing in listings]
    decoded_bytes = decode(train.files[0], image_size).nbytes * sum(len(x.files) for x in listings)
    if decoded_bytes > (_available_memory() // 2 if max_bytes is None else max_bytes):
        return Splits(*(open_stream(x, image_size, n) for x, n in zip(listings, names, strict=True)))
    labels = [torch.tensor(x.labels, dtype=torch.int64, device="cpu") for x in listings]
    parts = zip(load_images(listings, image_size), labels, listings, names, strict=True)
    return Splits(*(Dataset(images, y, x.classes, n, x.files) for images, y, x, n in parts))


def _shards(root: Path, image_size: int | None) -> Splits:
    folders = [root / name for name in ("test", "val", "valid") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not folders:
        raise DataError(f"{root}: expected {shards.LAYOUT}")
    train = shards.list_shards(root / "train")
    test = shards.list_shards(folders[0], train.classes)
    return Splits(*(open_stream(x, image_size, f"{root.name} {x.folder.name}") for x in (train, test)))


def _resized(dataset: Dataset, image_size: int | None) -> Dataset:
    if image_size is None:
        return dataset
    chunk_size = _chunk_size((dataset.image_shape[0], image_size, image_size))
    chunks = [augment.resize(chunk, image_size) for chunk in dataset.images.split(chunk_size)]
    return dataclasses.replace(dataset, images=torch.cat(chunks))


def _chunk_size(image_shape: Sequence[int]) -> int:
    """Images of this shape held at a time: as many as `CHUNK_BYTES` hold, and no more than `CHUNK`."""
    return max(1, min(CHUNK, CHUNK_BYTES // max(1, math.prod(image_shape))))


def _available_memory() -> int:
    """Bytes: the machine's, or the container's limit if that is lower; 8 GiB where neither can be read."""
    limits = []
    for file, pattern, unit in (
        ("/proc/meminfo", r"MemAvailable:\s*(\d+) kB", 1024),
        ("/sys/fs/cgroup/memory.max", r"(\d+)", 1),
    ):
        with suppress(OSError):
            limits += [int(found) * unit for found in re.findall(pattern, Path(file).read_text())]
    return min(limits, default=8 << 30)


def batches(
    source: Source,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    shuffle: bool = False,
    drop_last: bool = False,
) -> Iterator[ImageBatch]:
    """Iterate once over a split.

    Args:
        source: a split of N samples.
        batch_size: samples in a batch; the last one may be smaller.
        generator: the only thing that the order of a shuffled pass depends on; it moves on by one permutation
            when `batches` is called, so that saving its state between passes is all a resumed run needs.
        shuffle: visit the samples in random order, not in the stored one.
        drop_last: leave out a last batch that is not full.

    Returns:
        An iterator of (uint8 images [B, C, H, W], int64 labels [B]) on the source's device.

    Raises:
        ValueError: `batch_size` is not positive, `drop_last` leaves nothing, or `shuffle` has no generator.

    >>> images, labels = next(batches(load("digits").train, 32))
    >>> images.shape, labels.shape
    (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """
    n = source.num_samples
    if batch_size < 1 or (drop_last and 0 < n < batch_size):
        raise ValueError(f"batch_size must be 1 to {n}, the samples of {source.name}; got {batch_size}")
    if shuffle and generator is None:
        raise ValueError("shuffle needs a generator. Try generator=torch.Generator().manual_seed(0)")
    if shuffle and generator is not None:
        order = torch.randperm(n, generator=generator, device=generator.device, dtype=torch.int64)
    else:
        order = torch.arange(n, dtype=torch.int64, device="cpu")
    if drop_last:
        order = order[: n - n % batch_size]
    return source.read(order.split(batch_size) if len(order) else ())


def shuffled(n: int, generator: torch.Generator, window: int = 0) -> Int64[Tensor, "n"]:
    """The numbers 0 to n - 1 in random order, those that are near each other near each other in it, if asked.

    Args:
        n: How many.
        generator: On the CPU; all that the order depends on, apart from `n` and `window`.
        window: Cut the numbers, from a random one on and round to it, into windows of so many; windows come
            in random order, and so do the numbers of each: who reads in it reads from one stretch at a time.
            0, or n and more, is one window: any order is as likely as any other.

    Raises:
        ValueError: `window` is negative.

    >>> shuffled(6, torch.Generator().manual_seed(0), window=2)
    tensor([2, 1, 3, 4, 5, 0])
    """
    if window < 0:
        raise ValueError(f"window must be 0, for all, or more; got {window}")
    drawn: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.int64}
    order = torch.randperm(n, **drawn)
    if not 0 < window < n:
        return order
    start = torch.randint(n, (), **drawn)
    turns = torch.randperm(-(-n // window), **drawn)[(order - start).remainder(n) // window]
    return order[turns.argsort(stable=True)]


def channel_statistics(
    data: UInt8[Tensor, "n c h w"] | Source,
) -> tuple[Float[Tensor, "c"], Float[Tensor, "c"]]:
    """Mean and standard deviation of each channel, pixels counted in [0, 1].

    The sums are exact (integers); a few megabytes of images are held at a time. A channel that never varies
    gets standard deviation 1, so that it normalises to zero. Of a `Stream`, at most 16,384 evenly spaced
    images are read.

    Args:
        data: uint8 images [N, C, H, W], or a split.

    Returns:
        Mean [C] and standard deviation [C] (biased: over n), float32, on the device of the images.

    Raises:
        ValueError: there are no images, or they are not uint8.

    >>> channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    (tensor([0.5000]), tensor([0.5000]))
    """
    if isinstance(data, Tensor):
        if data.dtype != torch.uint8 or data.ndim != 4:
            raise ValueError(f"expected uint8 images [N, C, H, W]; got {_describe(data)}")
        chunks: Iterable[Tensor] = data.split(_chunk_size(data.shape[1:]))
    else:
        step = math.ceil(data.num_samples / STREAM_STATISTICS_IMAGES) if isinstance(data, Stream) else 1
        index = torch.arange(0, data.num_samples, max(1, step), dtype=torch.int64, device="cpu")
        chunks = (images for images, _ in data.read(index.split(_chunk_size(data.image_shape))))
    count, total, squares = 0, 0, 0
    for chunk in chunks:
        count += chunk.numel() // chunk.shape[1]
        total += chunk.sum((0, 2, 3), dtype=torch.int64)
        squares += chunk.to(torch.int32).square().sum((0, 2, 3), dtype=torch.int64)
    if not isinstance(total, Tensor) or not isinstance(squares, Tensor) or count == 0:
        raise ValueError("channel statistics need at least one image")
    # in Python's integers: n * squares outgrows 64 bits
    variances = [count * s - t * t for s, t in zip(squares.tolist(), total.tolist(), strict=True)]
    stds = [math.sqrt(v) / count / 255 if v else 1.0 for v in variances]
    means = [t / count / 255 for t in total.tolist()]
    options: dict[str, Any] = {"dtype": torch.float32, "device": total.device}
    return torch.tensor(means, **options), torch.tensor(stds, **options)


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
