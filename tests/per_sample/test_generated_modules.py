"""Per-sample quantities of generated modules: the chosen way is `vmap`'s, and a loop of backward passes.

Thousands of modules of every kind of layer, in float64, at night; a few by day. The loop is written out here,
and knows nothing of the library but `Model.apply`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import resnet_func as rf
from parity.rounding import assert_rounded, rounding_noise
from resnet_func import testing, tree
from resnet_func.losses import cross_entropy
from resnet_func.testing import GeneratedModule, assert_trees_near
from resnet_func.testing.module_strategies import KINDS
from resnet_func.types import Params

ps = rf.per_sample
RTOL = 1e-10  # of the largest entry: sums of some hundred float64 products, in another order
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def loop(made: GeneratedModule) -> Params:
    """The gradient of each sample's loss, by plain autograd on a batch of one."""
    model, params, state = rf.from_module(made.module)
    flat = tree.flatten(params)
    rows = []
    for x, y in zip(made.x.split(1), made.y.split(1), strict=True):
        leaves = {path: leaf.clone().requires_grad_() for path, leaf in flat.items()}
        loss = cross_entropy(model.apply(tree.unflatten(leaves), state, x, train=False)[0], y).sum()
        rows.append(torch.autograd.grad(loss, list(leaves.values())))
    stacked = [torch.stack(each) for each in zip(*rows, strict=True)]
    return tree.unflatten(dict(zip(flat, stacked, strict=True)))


def norms_of(grads: Params) -> Tensor:
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in tree.leaves(grads)], 1).norm(dim=1)


def clipped_sum_of(grads: Params, max_norm: float) -> tuple[Params, Tensor]:
    norms = norms_of(grads)
    factors = torch.where(norms <= max_norm, 1.0, max_norm / norms)
    return tree.map(lambda leaf: torch.einsum("n,n...->...", factors, leaf), grads), norms


def assert_same(got: Any, want: Any, again: Callable[[], Any], params: Params) -> None:
    """`got` is `want`, up to rounding.

    A norm over values that hardly differ amplifies rounding without limit: where the usual one does not hold,
    it is what rounding in every layer moves, when `again` computes `want` once more.
    """
    try:
        assert_trees_near(got, want, RTOL)
    except AssertionError:
        assert_rounded(got, again, rounding_noise(params, torch.float64))


def check(made: GeneratedModule, share: float) -> None:
    """Gradients, norms and clipped sums by the chosen way, by `vmap` and by the loop."""
    model, params, state = rf.from_module(made.module)
    want = loop(made)
    norms = norms_of(want)
    max_norm = share * norms.median().item()
    clipped = clipped_sum_of(want, max_norm)
    methods: tuple[Any, ...] = ("auto", "vmap")
    for method in methods:
        options: dict[str, Any] = {"train": False, "method": method}
        given_batch = (params, state, made.x, made.y)
        grads = ps.grads(model, cross_entropy, **options)(*given_batch)
        assert_same(grads, want, lambda: loop(made), params)
        found = ps.norms(model, cross_entropy, **options)(*given_batch)
        assert_same(found, norms, lambda: norms_of(loop(made)), params)
        clip = ps.clipped_sum(model, cross_entropy, max_norm=max_norm, **options)
        assert_same(clip(*given_batch), clipped, lambda: clipped_sum_of(loop(made), max_norm), params)


SHARES = st.sampled_from([0.5, 1.0, 2.0])


@EVERY_KIND
def test_every_way_gives_the_loop(kind: Any) -> None:
    @settings(max_examples=10, database=None, phases=(Phase.generate,))
    @given(testing.modules(kinds=[kind], dtype=torch.float64), SHARES)
    def every_way(made: GeneratedModule, share: float) -> None:
        check(made, share)

    every_way()


@pytest.mark.nightly
@EVERY_KIND
def test_every_way_gives_the_loop_on_2000_modules(kind: Any) -> None:
    @settings(max_examples=2000, database=None, deadline=None)
    @given(testing.modules(kinds=[kind], dtype=torch.float64), SHARES)
    def every_way(made: GeneratedModule, share: float) -> None:
        check(made, share)

    every_way()
