"""Affine gradients of group normalisation: from what the forward pass kept, or by the layer once more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import resnet_func as rf
from resnet_func import tree
from resnet_func.per_sample.layers import contract, normalisation
from resnet_func.testing import assert_trees_near, randn

FP64 = torch.float64


def network(width: int, groups: int) -> tuple[rf.Model, Any]:
    """Convolution, group norm, ReLU, head."""

    def apply(params: Any, state: Any, x: Tensor, *, train: bool) -> tuple[Tensor, Any]:
        x = F.group_norm(F.conv2d(x, params["conv"], padding=1), groups, params["gain"], params["shift"])
        return F.linear(x.relu().mean((2, 3)), params["head"]), state

    params = {
        "conv": randn(width, 3, 3, 3, seed=0, dtype=FP64),
        "gain": randn(width, seed=1, dtype=FP64),
        "shift": randn(width, seed=2, dtype=FP64),
        "head": randn(5, width, seed=3, dtype=FP64),
    }
    return rf.from_function(apply), params


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the kept statistics were used."""
    made: list[int] = []
    grads = contract.group_norm_grads
    monkeypatch.setattr(
        normalisation, "group_norm_grads", lambda *args: made.append(len(args[0])) or grads(*args)
    )
    return made


@given(
    st.integers(1, 4),
    st.sampled_from([(4, 1), (4, 2), (6, 6)]),
    st.permutations(range(4)),
    st.integers(0, 2**31),
)
@example(3, (4, 2), [2, 3, 0, 1], 0)  # a view that torch 2.11 read wrongly
def test_of_every_sample_in_every_layout(n: int, sizes: tuple[int, int], order: list[int], seed: int) -> None:
    width, groups = sizes
    x, g = randn(n, width, 3, 5, seed=seed, dtype=FP64), randn(n, width, 3, 5, seed=seed + 1, dtype=FP64)
    gain, shift = torch.ones(width, dtype=FP64), torch.zeros(width, dtype=FP64)
    _, mean, rstd = torch.native_group_norm(x, gain, shift, n, width, 15, groups, 1e-5)
    laid_out = x.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])
    got = contract.group_norm_grads(laid_out, g, (mean, rstd), groups)
    want = (g * F.group_norm(x, groups)).sum((2, 3)), g.sum((2, 3))
    assert_trees_near(dict(zip("ab", got, strict=True)), dict(zip("ab", want, strict=True)), rtol=1e-12)


@pytest.mark.parametrize("trainable", [None, lambda path: path == "gain", lambda path: path == "shift"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kept_statistics_are_used(calls: list[int], trainable: Any, layout: torch.memory_format) -> None:
    model, params = network(4, 2)
    x, y = randn(3, 3, 4, 6, seed=4, dtype=FP64).contiguous(memory_format=layout), torch.tensor([0, 1, 2])
    by_method = {
        method: rf.per_sample.grads(
            model, rf.losses.cross_entropy, trainable=trainable, method=method, check=False
        )(params, {}, x, y)
        for method in ("contract", "loop")
    }
    assert calls == [3]
    assert_trees_near(by_method["contract"], by_method["loop"], rtol=1e-12)


def test_views_add_up(calls: list[int]) -> None:
    model, params = network(4, 2)
    x, y = randn(2, 3, 3, 4, 4, seed=4, dtype=FP64), torch.tensor([0, 1])
    ours, alone = (
        rf.per_sample.grads(model, rf.losses.cross_entropy, views=True, method=method, check=False)(
            params, {}, x, y
        )
        for method in ("contract", "loop")
    )
    assert calls == [6]
    assert_trees_near(ours, alone, rtol=1e-12)


def test_where_a_transform_looks_on_the_layer_runs_again(calls: list[int]) -> None:
    model, params = network(4, 2)
    x, y = randn(3, 3, 4, 4, seed=4, dtype=FP64), torch.tensor([0, 1, 2])
    norms = rf.per_sample.norms(model, rf.losses.cross_entropy, check=False)

    def total(params: Any) -> Tensor:
        return norms(params, {}, x, y).sum()

    by_function = torch.func.grad(total)(params)
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    by_autograd = torch.autograd.grad(total(leaves), tree.leaves(leaves))
    direction = tree.map(torch.ones_like, params)
    along = torch.func.jvp(total, (params,), (direction,))[1]
    torch.func.vmap(lambda x: norms(params, {}, x[None], y[:1]))(x)
    assert calls == []
    assert torch.allclose(along, tree.dot(by_function, direction), rtol=1e-10, atol=0)
    assert_trees_near(dict(enumerate(tree.leaves(by_function))), dict(enumerate(by_autograd)), rtol=1e-12)


def test_a_nan_stays_in_its_sample(calls: list[int]) -> None:
    model, params = network(4, 2)
    x, y = randn(3, 3, 4, 4, seed=4, dtype=FP64), torch.tensor([0, 1, 2])
    clean = rf.per_sample.grads(model, rf.losses.cross_entropy, check=False)(params, {}, x, y)
    x[1, 0, 0, 0] = torch.nan
    spoilt = rf.per_sample.grads(model, rf.losses.cross_entropy, check=False)(params, {}, x, y)
    assert calls == [3, 3]
    assert spoilt["gain"][1].isnan().any()
    for kept in (0, 2):
        assert torch.equal(spoilt["gain"][kept], clean["gain"][kept])
