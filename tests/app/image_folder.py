"""What tests of the training program share: image folders that a network can learn, and global defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from resnet_func.app.cli import main

CLASSES = ("blue", "green", "red")


def make_image_folder(
    root: Path,
    *,
    train: int = 8,
    test: int = 3,
    size: int = 8,
    width: int | None = None,
    seed: int = 0,
    classes: tuple[str, ...] = CLASSES,
) -> Path:
    """`root/train/<class>/*.png` and `root/test/...`: noisy images, three classes, a colour each."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test)):
        for channel, name in enumerate(reversed(classes)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (size, width or size, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root


def noise(*shape: int, seed: int = 0, high: int = 256) -> np.ndarray:
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


def save(path: Path, image: Any, **options: Any) -> Path:
    """Write an image, or an array of its pixels, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(path, **options)
    return path


def write_split(folder: Path, counts: tuple[int, ...] = (5, 4), side: int = 8) -> torch.Tensor:
    """Classes a, b ... of random PNGs; returns the pixels [N, 3, side, side] in the order of a listing."""
    pixels = noise(sum(counts), side, side, 3)
    paths = [folder / name / f"{i:02}.png" for name, count in zip("abc", counts) for i in range(count)]  # noqa: B905
    for path, image in zip(paths, pixels, strict=True):
        save(path, image)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


TINY = ("--model", "resnet20", "--epochs", "2", "--batch-size", "8", "--crop", "1", "--threads", "1")


def train_run(images: Path, run: Path, *options: str) -> Path:
    """A run of `resnet-func train` on an image folder, of a second or two."""
    threads = torch.get_num_threads()
    command = ["train", "--dataset", "folder", "--data-dir", str(images), "--run-dir", str(run)]
    assert main([*command, *TINY, *options]) == 0
    torch.set_num_threads(threads)
    return run


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def global_defaults(dtype: torch.dtype = torch.float32, device: str | None = None) -> Iterator[None]:
    """Inside, tensors are created in this dtype and on this device where nothing else is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
