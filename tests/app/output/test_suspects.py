"""Pictures of scores: any number of images and scores, and planted labels that show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnet_func.app.output import suspects
from resnet_func.testing import generator
from tests.app.output.test_canvas import pixels


def draw(path: Path, count: int, planted: torch.Tensor | None = None) -> None:
    images = torch.randint(0, 256, (count, 3, 6, 6), generator=generator(0)).to(torch.uint8)
    labels = torch.arange(count) % 3
    names = [f"/a/long/way/to/images/$number$ {i}.png" for i in range(count)]
    classes = ("cat", "a name that is far too long", "[dog]")
    suspects.suspects(images, labels, (labels + 1) % 3, names, classes, path, "title", planted=planted)


@pytest.mark.parametrize("count", [1, 8, 9])
def test_any_number_of_suspects(tmp_path: Path, count: int) -> None:
    draw(tmp_path / "s.png", count)
    assert pixels(tmp_path / "s.png").std() > 10


def test_planted_ones_are_framed(tmp_path: Path) -> None:
    draw(tmp_path / "plain.png", 2, torch.tensor([False, False]))
    draw(tmp_path / "framed.png", 2, torch.tensor([False, True]))
    frame = torch.tensor([0xD5, 0x5E, 0x00]).numpy()
    counts = [(abs(pixels(tmp_path / f"{n}.png") - frame).sum(2) < 10).sum() for n in ("plain", "framed")]
    assert counts[1] > counts[0] + 200


def test_curves_of_many_scores(tmp_path: Path) -> None:
    curves = {f"score {i}": torch.linspace(0, 1, 30, dtype=torch.float64) ** (1 + i) for i in range(9)}
    suspects.found(curves, 0.1, tmp_path / "found.png", "title")
    assert pixels(tmp_path / "found.png").std() > 10
