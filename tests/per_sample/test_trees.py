"""Parameters in any tree: what takes them gives the numbers of nested dicts, in the tree's structure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import resnet_func as rf
from resnet_func import losses, optim, privacy, tree
from resnet_func import per_sample as ps
from resnet_func.types import Model
from tests.train.test_trainable import TREES, B, W, X, Y, draw

BATCH = [(X, Y)]
LOSS = losses.cross_entropy
TAKERS: dict[str, Callable[..., Any]] = {
    "grads": lambda model, p, **o: ps.grads(model, LOSS, **o)(p, {}, X, Y),
    "norms": lambda model, p, **o: ps.norms(model, LOSS, **o)(p, {}, X, Y),
    "grads, microbatch": lambda model, p, **o: ps.grads(model, LOSS, microbatch=2, **o)(p, {}, X, Y),
    "grads, vmap": lambda model, p, **o: ps.grads(model, LOSS, method="vmap", **o)(p, {}, X, Y),
    "clipped_sum": lambda model, p, **o: ps.clipped_sum(model, LOSS, max_norm=0.3, **o)(p, {}, X, Y)[0],
    "moments": lambda model, p, **o: ps.moments(model, LOSS, **o)(p, {}, X, Y).second_moment,
    "gram": lambda model, p, **o: ps.gram(model, LOSS, **o)(p, {}, (X, Y)),
    "dot": lambda model, p, **o: ps.dot(model, LOSS, **o)(p, {}, X, Y, p),
    "hvp": lambda model, p, **o: rf.curvature.hvp(model, LOSS, **o)(p, {}, X, Y, p),
    "ggn_vp": lambda model, p, **o: rf.curvature.ggn_vp(model, LOSS, **o)(p, {}, X, Y, p),
    "kfac": lambda model, p, **o: rf.curvature.kfac(model, LOSS, **o)(p, {}, BATCH).product(p),
    "ekfac": lambda model, p, **o: rf.curvature.ekfac(model, LOSS, **o)(p, {}, BATCH).inverse_product(p),
    "linear_operator": lambda model, p, **o: torch.as_tensor(
        rf.curvature.linear_operator(model, LOSS, **o)(p, {}, BATCH).matmat(
            np.eye(sum(leaf.numel() for leaf in rf.train.trainable.trained_leaves(p, **o).values()))
        )
    ),
    "diagonal_fisher": lambda model, p, **o: (
        rf.attribution.diagonal_fisher(model, LOSS, **o)(p, {}, BATCH).diagonal
    ),
    "influence": lambda model, p, **o: rf.attribution.influence(
        model, LOSS, rf.attribution.diagonal_fisher(model, LOSS, **o)(p, {}, BATCH), **o
    )((p, {}), BATCH, BATCH),
    "tracin": lambda model, p, **o: rf.attribution.tracin(model, LOSS, cosine=True, **o)(
        [(p, {})], BATCH, BATCH
    ),
    "in_run_values": lambda model, p, **o: rf.attribution.in_run_values(model, LOSS, order=2, **o)(
        p, {}, (X, Y), (X, Y), 0.1
    ),
    "private step": lambda model, p, **o: private(model, p, **o),
}


def private(model: Model, params: Any, **options: Any) -> Any:
    optimizer, adaptive = optim.adam(0.1), privacy.AdaptiveNorm(start=0.3)
    begin = privacy.init_private_state(params, {}, optimizer, max_norm=adaptive, ema=True, **options)
    noise = privacy.gaussian_noise(params, seed=1, step=0, adaptive=True, **options)
    silent = tree.map(torch.zeros_like, noise)  # numbers go by the order of paths
    rule = {"max_norm": adaptive, "noise_multiplier": 1.0, "expected_batch_size": 5, "ema_decay": 0.9}
    step = privacy.make_private_step(model, LOSS, optimizer, **rule, **options)
    after, _ = step(begin, X, Y, torch.ones(5, dtype=torch.bool), silent)
    chosen = [path for path in tree.flatten(params) if options.get("trainable", lambda path: True)(path)]
    return {path: tree.flatten(after.ema_params)[path] for path in chosen}


def values(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree.flatten(result).values() if leaf.is_floating_point()]


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("only_bias", [False, True], ids=["all", "bias"])
def test_every_taker_takes_any_tree(taker: str, name: str, only_bias: bool) -> None:
    params, network, (_, bias) = TREES[name]
    options = {"trainable": lambda path: path in (bias, "B")} if only_bias else {}
    got = TAKERS[taker](rf.from_function(network), params, **options)
    nested = rf.from_function(lambda p, x: x @ p["W"] + p["B"])
    want = TAKERS[taker](nested, {"W": W, "B": B}, **options)
    for ours, theirs in zip(values(got), values(want), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", TREES)
def test_gradients_are_a_tree_that_maps_with_the_parameters(name: str) -> None:
    params, network, _ = TREES[name]
    total, _ = ps.clipped_sum(rf.from_function(network), LOSS, max_norm=1.0)(params, {}, X, Y)
    floating = tree.select(params, rf.train.trainable.trained_leaves(params))
    tree.map(torch.add, floating, total)


@pytest.mark.parametrize("method", ["contract", "vmap", "loop"])
def test_frozen_leaves_do_not_change_the_order_of_a_dict(method: Any) -> None:
    """A network that goes through its layers in the order of its dict."""

    def network(params: Any, x: Tensor) -> Tensor:
        for layer in params["layers"].values():
            x = torch.tanh(x @ layer)
        return x

    params = {"layers": {"second": draw(3, 3), "first": draw(3, 3) + 1, "last": draw(3, 2)}}
    model = rf.from_function(network)
    whole = ps.grads(model, LOSS)(params, {}, X, Y)["layers"]["second"]
    part = ps.grads(model, LOSS, method=method, trainable=lambda path: "second" in path)(params, {}, X, Y)
    torch.testing.assert_close(part["layers"]["second"], whole, rtol=1e-12, atol=1e-14)
