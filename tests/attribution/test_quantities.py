"""Quantities of attribution, against gradients and probabilities written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_func import losses, tree
from resnet_func import per_sample as ps
from resnet_func.attribution import quantities
from resnet_func.testing import generator
from tests.attribution.oracle import CE, batches, close, gradient_rows, joined, rows_of, tiny
from tests.per_sample.cases import batch

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, classes=st.integers(2, 6), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_log_odds_are_of_the_probability(seed: int, classes: int, scale: float) -> None:
    logits = scale * torch.randn(5, classes, generator=generator(seed), dtype=torch.float64)
    targets = torch.randint(0, classes, (5,), generator=generator(seed + 1))
    p = logits.softmax(1).gather(1, targets[:, None])[:, 0]
    # the other classes' probability as a sum: 1 - p would cancel
    others = logits.softmax(1).scatter(1, targets[:, None], 0).sum(1)
    torch.testing.assert_close(quantities.log_odds(logits, targets), (p / others).log(), rtol=1e-9, atol=1e-9)


def test_the_gradient_of_the_loss_is_that_of_the_log_odds_times_what_is_left() -> None:
    network, data = tiny(), batch(4, 1)
    odds = gradient_rows(*network, *data, quantities.log_odds)
    logits = network[0].apply(*network[1:], data[0], train=False)[0]
    left = torch.sigmoid(-quantities.log_odds(logits, data[1]))
    close(-left[:, None] * odds, gradient_rows(*network, *data))


@pytest.mark.parametrize("views", [None, 2])
def test_quantities_of_the_logits(views: int | None) -> None:
    model, params, state = tiny()
    x, y = batch(5, 3, views=views)
    wanted = {
        "margin": quantities.margin(),
        "prediction": quantities.prediction(),
        "suggestion": quantities.suggestion(),
    }
    found = ps.over_dataset(model, CE, wanted)(params, state, [(x[:2], y[:2]), (x[2:], y[2:])])
    images = x if views else x[:, None]
    logits = torch.stack([model.apply(params, state, view, train=False)[0] for view in images.unbind(1)])
    given = torch.nn.functional.one_hot(y, logits.shape[2]).bool()
    others = logits.masked_fill(given, -torch.inf)
    margins = (logits[:, given] - others.amax(2)).mean(0)
    torch.testing.assert_close(found["margin"], margins)
    assert torch.equal(found["prediction"], logits.softmax(2).mean(0).argmax(1))
    assert torch.equal(found["suggestion"], others.softmax(2).mean(0).argmax(1))
    assert not (found["suggestion"] == y).any()


@pytest.mark.parametrize("microbatch", [None, 2])
def test_products_with_gradients(microbatch: int | None) -> None:
    model, params, state = tiny()
    data = batches(5, 1, size=3)
    draw = generator(9)
    directions = tree.map(lambda p: torch.randn(4, *p.shape, generator=draw, dtype=p.dtype), params)
    scale = tree.map(lambda p: torch.rand(p.shape, generator=draw, dtype=p.dtype), params)
    wanted = {
        "products": quantities.products(tree.flatten(directions)),
        "weighted": quantities.weighted_squared_norms(tree.flatten(scale)),
        "self": quantities.self_products(lambda path, leaf: leaf * tree.flatten(scale)[path]),
    }
    found = ps.over_dataset(model, CE, wanted, microbatch=microbatch)(params, state, data)
    rows = gradient_rows(model, params, state, *joined(data))
    close(found["products"], rows @ rows_of(directions).T)
    weighted = rows.square() @ rows_of(tree.map(lambda s: s[None], scale))[0]
    close(found["weighted"], weighted)
    close(found["self"], weighted)


def test_margins_need_class_indices() -> None:
    model, params, state = tiny()
    x, y = batch(2, 0)
    run = ps.over_dataset(model, losses.squared_error, {"margin": quantities.margin()})
    targets = torch.nn.functional.one_hot(y, 3).double()
    with pytest.raises(ValueError, match="margin needs class indices"):
        run(params, state, [(x, targets)])
