"""Per-sample losses against their formulas, in float64."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_func import losses


def batch(seed: int, n: int = 5, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (n,), generator=generator)


def negative_log_likelihood(logits: torch.Tensor, target: int) -> float:
    values = logits.tolist()
    return math.log(math.fsum(math.exp(value) for value in values)) - values[target]


@given(st.integers(0, 2**31), st.integers(1, 9))
def test_cross_entropy_is_its_formula(seed: int, n: int) -> None:
    logits, targets = batch(seed, n)
    want = [negative_log_likelihood(row, int(t)) for row, t in zip(logits, targets, strict=True)]
    torch.testing.assert_close(losses.cross_entropy(logits, targets).tolist(), want, rtol=1e-12, atol=1e-13)


@given(st.integers(0, 2**31), st.floats(0, 0.99))
def test_smoothing_mixes_in_the_uniform_distribution(seed: int, smoothing: float) -> None:
    logits, targets = batch(seed)
    uniform = torch.stack([losses.cross_entropy(logits, torch.full_like(targets, k)) for k in range(4)]).mean(
        0
    )
    want = (1 - smoothing) * losses.cross_entropy(logits, targets) + smoothing * uniform
    got = losses.smoothed_cross_entropy(smoothing)(logits, targets)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_squared_error_has_the_residual_as_gradient() -> None:
    logits, _ = batch(0)
    targets, _ = batch(1)
    grad = torch.func.grad(lambda z: losses.squared_error(z, targets).sum())(logits)
    torch.testing.assert_close(grad, logits - targets, rtol=0, atol=1e-15)
    assert losses.squared_error(logits, targets).shape == (5,)


def test_logit_picks_one_and_ignores_targets() -> None:
    logits, targets = batch(0)
    assert torch.equal(losses.logit(2)(logits, targets - 99), logits[:, 2])


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_out_of_range(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\)"):
        losses.smoothed_cross_entropy(smoothing)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1]), "expected one label per image, [3]; got [2]"),
        (torch.tensor([[0], [1], [2]]), "expected one label per image, [3]; got [3, 1]"),
        (torch.tensor([0.0, 1.0, 2.0]), "expected int64 class indices; got torch.float32"),
        (torch.tensor([0, -1, 7]), "labels must be in 0 .. 3; got -1, 7"),
    ],
    ids=["length", "rank", "float", "range"],
)
def test_wrong_labels(targets: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        losses.check_targets(targets, 3, 4)
    losses.check_targets(torch.tensor([0, 3, 1]), 3, 4)
