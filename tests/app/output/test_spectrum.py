"""The picture of a spectrum: written for every spectrum, and showing what it is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_func.app.output import spectrum as picture
from resnet_func.curvature import Spectrum


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def spectrum(*values: float, weights: tuple[float, ...] | None = None) -> Spectrum:
    nodes = torch.tensor([values], dtype=torch.float64)
    shares = (
        torch.full_like(nodes, 1 / nodes.numel()) if weights is None else torch.tensor([weights]).double()
    )
    return Spectrum(nodes, shares, torch.zeros_like(nodes), dim=1000)


@pytest.mark.parametrize(
    "values",
    [(0.0,), (1.0,), (-1.0,), (-2.0, 0.0, 50.0), (1e-9, 2e-9), (0.0, float("nan"))],
    ids=["zero", "one", "negative", "many", "tiny", "nan"],
)
def test_every_spectrum_has_a_picture(tmp_path: Path, values: tuple[float, ...]) -> None:
    picture.draw(spectrum(*values), tmp_path / "s.png", "a title")
    assert pixels(tmp_path / "s.png").shape[0] > 300
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]


def test_negative_eigenvalues_are_orange_and_the_others_blue(tmp_path: Path) -> None:
    def colours(*values: float) -> tuple[int, int]:
        picture.draw(spectrum(*values), tmp_path / "s.png", "t")
        red, _, blue = pixels(tmp_path / "s.png").transpose(2, 0, 1)
        return int((blue > red + 60).sum()), int((red > blue + 60).sum())

    blue, orange = colours(0.0, 1.0, 3.0)
    assert blue > 1000
    assert orange == 0
    blue, orange = colours(-3.0, -1.0, 0.0)
    assert orange > 1000
