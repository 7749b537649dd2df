"""Features: the sketch of the gradient of the log-odds, and what is left of the probability."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resnet_func import per_sample as ps
from resnet_func import tree
from resnet_func.attribution import Features, Sketch, make_features, sketch_tree
from resnet_func.attribution.quantities import log_odds
from tests.attribution.oracle import CE, batches, close, joined, tiny


@pytest.mark.parametrize("projection", ["factorized", "dense"])
def test_features_are_sketches_and_give_those_of_the_loss(projection: Any) -> None:
    model, params, state = tiny()
    data, sketch = batches(5, 1), Sketch(24, 3, projection)
    features = make_features(model, sketch)(params, state, data)
    x, y = joined(data)
    options: dict[str, Any] = {"dim": 24, "seed": 3, "projection": projection}
    close(features.sketches, ps.sketch(model, log_odds, **options)(params, state, x, y))
    close(features.loss_sketches(), ps.sketch(model, CE, **options)(params, state, x, y))
    probabilities = model.apply(params, state, x, train=False)[0].softmax(1)
    close(features.slack, 1 - probabilities.gather(1, y[:, None])[:, 0])
    again = Features.from_rows(features.rows())
    assert torch.equal(again.sketches, features.sketches)
    assert torch.equal(again.slack, features.slack)


@pytest.mark.parametrize("projection", ["factorized", "dense"])
def test_a_tree_is_sketched_as_gradients_are(projection: Any) -> None:
    """Else a direction would not meet the gradients that were stored before."""
    model, params, state = tiny()
    x, y = joined(batches(3, 1))
    sketch = Sketch(20, 1, projection)
    gradients = ps.grads(model, CE)(params, state, x, y)
    expected = ps.sketch(model, CE, dim=20, seed=1, projection=projection)(params, state, x, y)
    close(sketch_tree(gradients, sketch), expected)
    close(sketch_tree(tree.map(lambda g: 3 * g, gradients), sketch), 3 * expected)
