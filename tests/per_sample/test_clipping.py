"""A clipped sum states its bound, takes another one for a call, and compares a loss only once."""

from __future__ import annotations

import pickle
import re
from fractions import Fraction
from typing import Any

import pytest
import torch

import resnet_func as rf
from resnet_func import losses, tree
from resnet_func.per_sample import checks
from resnet_func.per_sample.quantities import quantity
from resnet_func.testing import generator
from tests.per_sample.cases import batch, network, small


def test_the_bound_is_stated_by_the_transform() -> None:
    model, _, _ = network(small(), 0)
    for max_norm, bound in ((2.0, 2.0), ({"": 3.0, "fc": 4.0}, 5.0)):
        summed = rf.per_sample.clipped_sum(model, losses.cross_entropy, max_norm=max_norm)
        assert summed.bound == bound
        assert rf.privacy.sensitivity(max_norm) == bound
        assert pickle.loads(pickle.dumps(summed)).bound == bound


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
def test_a_bound_for_one_call_is_the_transform_with_that_bound(clipping: str) -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    of_one, of_call = (
        rf.per_sample.clipped_sum(model, losses.cross_entropy, max_norm=bound, clipping=clipping)
        for bound in (0.25, 9.0)
    )
    bound = torch.tensor(0.25, dtype=torch.float64)
    wanted, got = of_one(params, state, x, y), of_call(params, state, x, y, max_norm=bound)
    for a, b in zip(tree.leaves(got), tree.leaves(wanted), strict=True):
        # a number over a tensor is its reciprocal times the number, and rounds once more
        torch.testing.assert_close(a, b, rtol=8 * torch.finfo(a.dtype).eps, atol=torch.finfo(a.dtype).eps)


@pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(3, 1, dtype=torch.bool)], ids=["floats", "2d"])
def test_a_mask_of_another_kind_is_refused(mask: torch.Tensor) -> None:
    model, params, state = network(small(), 0)
    summed = rf.per_sample.clipped_sum(model, losses.cross_entropy, max_norm=1.0)
    said = rf"mask must be bools \[N\]; got {mask.dtype} {re.escape(str(list(mask.shape)))}$"
    with pytest.raises(ValueError, match=said):
        summed(params, state, *batch(3, 1), mask)


def test_a_masked_loss_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, state = network(small(), 0)
    x, y = batch(3, 1)
    seen: list[int] = []
    compare = checks._check_gradients
    monkeypatch.setattr(checks, "_check_gradients", lambda *args: (seen.append(1), compare(*args)))
    summed = rf.per_sample.clipped_sum(model, losses.cross_entropy, max_norm=1.0)
    for _ in range(3):
        summed(params, state, x, y, torch.tensor([True, True, False]))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("rule", [quantity.clip_factors, quantity.automatic_factors])
def test_a_factor_times_its_norm_is_never_above_the_bound(rule: Any, dtype: torch.dtype) -> None:
    """Exactly, in rational numbers: also where 0.01 is less than the last digit of the norm."""
    scales = 10 ** torch.linspace(-30, 30, 2000, dtype=torch.float64)
    norms = torch.cat([scales, torch.rand(2000, generator=generator(0), dtype=torch.float64) * 1e6]).to(dtype)
    for bound in (0.1, 1.0, 3e-5, 7.3e4, 1e-37):
        for norm, factor in zip(norms.tolist(), rule(norms, bound).tolist(), strict=True):
            assert Fraction(factor) * Fraction(norm) <= Fraction(bound)
