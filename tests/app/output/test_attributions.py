"""The picture of an attribution, with as many images as there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnet_func.app.output.attributions import Shown, attribution
from resnet_func.testing import generator
from tests.app.output.test_canvas import pixels


@pytest.mark.parametrize(("helpful", "harmful"), [(8, 8), (1, 3), (0, 2), (0, 0)])
def test_any_number_of_images(tmp_path: Path, helpful: int, harmful: int) -> None:
    image = torch.randint(0, 256, (3, 6, 6), generator=generator(0)).to(torch.uint8)
    shown = [Shown(image, "a label that is long", 0.5, "/a/way/to/the/image/[x] $y$.png")] * 8
    attribution(image, "cat (90 %)", shown[:helpful], shown[:harmful], tmp_path / "a.png", "title")
    assert pixels(tmp_path / "a.png").std() > 10
