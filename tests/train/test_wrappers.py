"""Autocast and averaged flips."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch

from resnet_func import tree
from resnet_func.train import autocast, average_flips
from resnet_func.types import Model
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


@pytest.mark.parametrize("wrap", [average_flips, partial(autocast, device_type="cpu", dtype=torch.bfloat16)])
def test_wrapped_networks_compile_to_one_graph_also_after_pickling(wrap: Callable[[Model], Model]):
    model, (x, _) = tiny(), make_batch(dtype=torch.float32)
    params, state = model.init(torch.Generator().manual_seed(0))
    wrapped = pickle.loads(pickle.dumps(wrap(model)))
    torch._dynamo.reset()
    forward = torch.compile(wrapped.apply, backend="eager", fullgraph=True)
    got, want = (apply(params, state, x, train=False)[0] for apply in (forward, wrap(model).apply))
    assert torch.equal(got, want)
