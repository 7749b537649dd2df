"""Autocast and averaged flips."""

from __future__ import annotations

import torch

from resnet_func import tree
from resnet_func.train import (
    autocast,
    average_flips,
)
from tests.train.cases import make_batch, tiny


def test_autocast_computes_in_bf16_and_returns_float32():
    model, (x, _) = tiny(), make_batch(dtype=torch.float32)
    params, state = model.init(torch.Generator().manual_seed(0))
    exact, _ = model.apply(params, state, x, train=True)
    mixed, mixed_state = autocast(model, "cpu", torch.bfloat16).apply(params, state, x, train=True)
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - exact).norm() / exact.norm() < 0.05
    assert {leaf.dtype for leaf in tree.leaves(mixed_state)} == {torch.float32, torch.int64}


def test_average_flips_is_invariant_under_mirroring():
    model, (x, _) = tiny(), make_batch()
    params, state = model.init(torch.Generator().manual_seed(0), dtype=torch.float64)
    averaged = average_flips(model)
    a, _ = averaged.apply(params, state, x, train=False)
    b, _ = averaged.apply(params, state, x.flip(3), train=False)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a, model.apply(params, state, x, train=False)[0])
