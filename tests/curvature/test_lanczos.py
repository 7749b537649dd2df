"""Lanczos's method on small matrices, against their eigenvalues."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_func.curvature.lanczos import Spectrum, lanczos
from resnet_func.testing import generator
from tests.curvature.oracles import assert_close


@given(seed=st.integers(0, 2**16), size=st.integers(1, 8))
def test_a_full_run_is_the_whole_spectrum(seed: int, size: int) -> None:
    """As many steps as dimensions give the eigenvalues; the quadrature gives every moment of the start."""
    source = generator(seed)
    rows = torch.randn(size, size, generator=source, dtype=torch.float64)
    matrix, start = rows + rows.T, torch.randn(size, generator=source, dtype=torch.float64)
    diagonal, beside = lanczos(lambda v: matrix @ v, lambda: start, range(size))
    inner = torch.tensor(beside[:-1], dtype=torch.float64)
    tridiagonal = torch.tensor(diagonal, dtype=torch.float64).diag() + inner.diag(1) + inner.diag(-1)
    values = torch.linalg.eigvalsh(matrix)
    assert_close(torch.linalg.eigvalsh(tridiagonal), values, 1e-8)
    unit = start / start.norm()
    for power in (1, 2, 3):
        moment = torch.linalg.matrix_power(tridiagonal, power)[0, 0]
        scale = float(values.abs().max() ** power)
        assert abs(moment - unit @ torch.linalg.matrix_power(matrix, power) @ unit) <= 1e-8 * scale


def test_density_share_and_trace_of_a_known_quadrature() -> None:
    nodes, weights = torch.tensor([[-1.0, 0.0, 3.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    spectrum = Spectrum(nodes.double(), weights.double(), torch.zeros(1, 3), dim=4)
    points = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    density = spectrum.density(points, width=0.5)
    assert_close(torch.trapezoid(density, points), torch.tensor(1.0, dtype=torch.float64), 1e-8)
    mean = torch.trapezoid(density * points, points)
    assert_close(mean, torch.tensor(0.5, dtype=torch.float64), 1e-8)
    assert spectrum.negative_share() == 0.25
    negative = spectrum.negative_part().density(points, width=0.5)
    assert_close(torch.trapezoid(negative, points), torch.tensor(0.25, dtype=torch.float64), 1e-8)
    assert spectrum.trace().value == pytest.approx(2.0)
    assert np.isnan(spectrum.trace().error)
