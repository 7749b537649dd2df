"""Clipped sums and norms trace as one graph, and compiled code gives what eager code does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resnet_func import losses
from resnet_func import per_sample as ps
from resnet_func.testing import assert_trees_near
from tests.per_sample.cases import batch, network, small

TRANSFORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clipped_sum": (ps.clipped_sum, {"max_norm": 1.0}),
    "norms": (ps.norms, {}),
    "grads": (ps.grads, {}),
}


def as_named(result: tuple[Any, Any]) -> dict[str, Any]:
    return {"sum": result[0], "norms": result[1]}


@pytest.mark.parametrize("name", ["clipped_sum", "norms"])
def test_one_graph_without_breaks(name: str) -> None:
    transform, more = TRANSFORMS[name]
    model, params, state = network(small(depths=(1,), widths=(4,)), 0)
    function = transform(model, losses.cross_entropy, **more)
    torch._dynamo.reset()
    traced = torch._dynamo.explain(function)(params, state, *batch(2, 1))
    assert (traced.graph_count, traced.graph_break_count) == (1, 0)


@pytest.mark.nightly
@pytest.mark.parametrize("changes", [{}, {"norm": "batch"}, {"weight_standardization": True}], ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiled_equals_eager(name: str, changes: dict[str, Any]) -> None:
    transform, more = TRANSFORMS[name]
    model, params, state = network(small(depths=(1,), widths=(4,), **changes), 0)
    x, y = batch(3, 1)
    function = transform(model, losses.cross_entropy, train=False, **more)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    expected, actual = function(params, state, x, y), compiled(params, state, x, y)
    pairs = {"result": expected}
    if name == "clipped_sum":
        pairs = {"sum": expected[0], "norms": expected[1]}
        results = {"sum": actual[0], "norms": actual[1]}
    else:
        results = {"result": actual}
    assert_trees_near(results, pairs, rtol=1e-10)


@pytest.mark.nightly
def test_compiled_code_leaves_a_nan_sample_out() -> None:
    model, params, state = network(small(depths=(1,), widths=(4,)), 0)
    x, y = batch(4, 1)
    x[2, 0, 0, 0] = torch.nan
    clean = [0, 1, 3]
    clipped = ps.clipped_sum(model, losses.cross_entropy, max_norm=1.0)
    torch._dynamo.reset()
    total, norms = torch.compile(clipped, fullgraph=True, backend="aot_eager")(params, state, x, y)
    expected, _ = clipped(params, state, x[clean], y[clean])
    assert_trees_near(total, expected, rtol=1e-10)
    assert norms.isnan().nonzero().flatten().tolist() == [2]
    with pytest.raises(ValueError, match=r"1 of 4 samples .* gradient: 2\."):
        ps.detect_nonfinite(norms)
