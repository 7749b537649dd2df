"""Figures of predictions, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from resnet_func.app.answers.calibrating import measure


def test_figures_by_hand() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.0, 1.0]])
    found = measure(probabilities, torch.tensor([0, 1, 1, 1]))
    assert found.accuracy == 0.75
    assert found.loss == pytest.approx(-(math.log(0.9) + math.log(0.4) + math.log(0.8)) / 4, rel=1e-6)
    # each in a range of its own: |0.9 - 1|, |0.6 - 0|, |0.8 - 1|, |1 - 1|
    assert found.calibration_error == pytest.approx((0.1 + 0.6 + 0.2 + 0.0) / 4, rel=1e-6)


def test_what_has_no_chance_has_a_finite_loss() -> None:
    assert measure(torch.tensor([[1.0, 0.0]]), torch.tensor([1])).loss < math.inf
