"""The rule of an adaptive bound; what it does in a step is in test_step."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch

from resnet_func import optim, privacy
from resnet_func.privacy.adaptive import AdaptiveNorm


def test_the_bound_finds_the_quantile() -> None:
    """Of norms 1 to 100, without noise."""
    norms, rule = torch.arange(1.0, 101.0), AdaptiveNorm(start=0.1, quantile=0.3)
    bound = torch.tensor(rule.start)
    for _ in range(200):
        count = torch.where(norms <= bound, 0.5, -0.5).sum()
        bound = rule.move(bound, count, 100)
    assert 30 * math.exp(-0.2) <= float(bound) <= 31 * math.exp(0.2)  # to a step of 0.2 in logarithms


@pytest.mark.parametrize("noise", [-1e9, 1e9])
def test_no_noise_ends_in_zero_or_infinity(noise: float) -> None:
    rule, bound = AdaptiveNorm(start=2.0), torch.tensor(2.0)
    for _ in range(100):
        bound = rule.move(bound, torch.tensor(noise), 10)
    assert 2e-6 * 0.99 <= float(bound) <= 2e6 * 1.01


@pytest.mark.parametrize(
    "changes", [{"start": 0.0}, {"quantile": 1.0}, {"learning_rate": -1.0}, {"budget_share": 0.0}], ids=str
)
def test_what_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} must be"):
        AdaptiveNorm(**changes)


def test_a_fixed_bound_has_the_plain_state() -> None:
    params = {"w": torch.zeros(2)}
    begin = privacy.init_private_state(params, {}, optim.sgd(0.1), max_norm=1.0, ema=True)
    assert type(begin.opt_state) is type(optim.sgd(0.1).init(params))
    assert begin.ema_params
    assert pickle.loads(pickle.dumps(AdaptiveNorm())) == AdaptiveNorm()
