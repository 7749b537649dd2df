"""`resnet-func curvature`: files, figures, and the sentence that says what they mean."""

from __future__ import annotations

import json

import pytest
import torch

from resnet_func.app.cli import main
from resnet_func.app.commands.curvature import describe
from resnet_func.curvature import Estimate, Spectrum
from tests.app.image_folder import train_run

TINY = ("--steps", "3", "--probes", "2", "--images", "4", "--threads", "1")


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    return train_run(images, tmp_path_factory.mktemp("runs") / "run", "--epochs", "1")


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_curvature_writes_a_picture_and_its_numbers(trained, capsys, matrix: str) -> None:
    assert main(["curvature", str(trained), "--matrix", matrix, *TINY]) == 0
    printed = capsys.readouterr().out
    assert "largest eigenvalues:" in printed
    assert "trace:" in printed
    assert (trained / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((trained / "spectrum.json").read_text())
    assert numbers["matrix"] == matrix
    assert numbers["images"] == 4
    assert len(numbers["nodes"][0]) == 3
    first = (trained / "spectrum.json").read_bytes()
    assert main(["curvature", str(trained), "--matrix", matrix, *TINY]) == 0
    assert (trained / "spectrum.json").read_bytes() == first


def test_mistakes_are_answered_in_a_line(trained, tmp_path, capsys) -> None:
    assert main(["curvature", str(trained), "--steps", "0"]) == 2
    assert "--steps must be 1 or more; got 0" in capsys.readouterr().err
    assert main(["curvature", str(tmp_path / "nothing")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "matrix", "said"),
    [
        ((-5.0, 0.0, 10.0), "hessian", "this is no minimum"),
        ((-1.0, 0.0, 10.0), "hessian", "close to a minimum"),
        ((0.0, 1.0, 10.0), "hessian", "at a minimum"),
        ((0.0, 1.0, 10.0), "ggn", "stable up to a learning rate of 2 / 10 = 0.2"),
        ((-2.0, -1.0, 0.0), "hessian", "no direction curves upwards"),
    ],
)
def test_what_the_figures_mean(values: tuple[float, ...], matrix: str, said: str) -> None:
    nodes = torch.tensor([values], dtype=torch.float64)
    spectrum = Spectrum(nodes, torch.full_like(nodes, 1 / 3), torch.zeros_like(nodes), dim=3)
    lines = describe(spectrum, Estimate(9.0, float("nan")), matrix)
    assert said in lines[-1]
    assert "trace: 9, over 3 parameters" in lines[1]
