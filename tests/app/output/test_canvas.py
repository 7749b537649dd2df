"""What every picture is made with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_func.app.output.canvas import draw_image, make_figure, save, say, shorten


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_images_of_any_channels_are_drawn(tmp_path: Path, channels: int) -> None:
    figure = make_figure(2, 2, "a $title$ with [brackets]")
    axes = figure.subplots()
    axes.set_axis_off()
    draw_image(axes, torch.full((channels, 4, 4), 255, dtype=torch.uint8) * (torch.arange(4) > 1))
    save(figure, tmp_path / "image.png")
    assert pixels(tmp_path / "image.png").std() > 30
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


def test_messages_and_names(tmp_path: Path) -> None:
    figure = make_figure(3, 2, "title")
    say(figure.subplots(), "nothing")
    save(figure, tmp_path / "said.png")
    assert pixels(tmp_path / "said.png").std() > 1
    assert shorten("dandelion", 9) == "dandelion"
    assert shorten("dandelions", 9) == "dandelio…"
