"""Small image folders that a network can learn, for tests of the training program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red")


def make_image_folder(root: Path, *, train: int = 8, test: int = 3, size: int = 8, seed: int = 0) -> Path:
    """`root/train/<class>/*.png` and `root/test/...`: noisy images, each class in its own colour."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test)):
        for channel, name in enumerate(reversed(CLASSES)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (size, size, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
