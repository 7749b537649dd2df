"""TracIn and cosines against products of gradients from `vmap(grad)`."""

from __future__ import annotations

import pytest
import torch

from resnet_func import tree
from resnet_func.attribution import Sketch, cosine_scores, make_features, tracin, tracin_scores
from resnet_func.attribution.tracin import tree_norms
from tests.attribution.oracle import CE, batches, close, gradient_rows, joined, rows_of, tiny


@pytest.mark.parametrize("block_elements", [1, 2000, 2**27])
def test_tracin_adds_products_over_checkpoints(block_elements: int) -> None:
    model, *first = tiny(0)
    checkpoints = [tuple(first), tiny(5)[1:]]
    train, test = batches(5, 1), batches(3, 2)
    run = tracin(model, CE, learning_rates=[0.5, 0.1], block_elements=block_elements)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for rate, checkpoint in zip([0.5, 0.1], checkpoints, strict=True):
        rows = [gradient_rows(model, *checkpoint, *joined(part)) for part in (train, test)]
        expected = expected + rate * rows[0] @ rows[1].T
    close(run(checkpoints, train, test), expected)


def test_cosines_are_of_unit_gradients_and_one_with_themselves() -> None:
    model, params, state = tiny()
    train = batches(4, 1)
    rows = torch.nn.functional.normalize(gradient_rows(model, params, state, *joined(train)))
    ours = tracin(model, CE, cosine=True)([(params, state)], train, train)
    close(ours, rows @ rows.T)
    assert ours.diagonal().tolist() == pytest.approx([1.0] * 4, abs=1e-12)


def test_trainable_limits_the_gradients() -> None:
    model, params, state = tiny()
    train = batches(4, 1)
    ours = tracin(model, CE, trainable=lambda path: path.startswith("fc."))([(params, state)], train, train)
    rows = gradient_rows(model, params, state, *joined(train))
    fc = rows_of({"fc": tree.map(lambda leaf: leaf[None], params["fc"])}).shape[1]
    paths = sorted(tree.flatten(params))
    start = sum(tree.flatten(params)[path].numel() for path in paths if path < "fc.")
    part = rows[:, start : start + fc]
    close(ours, part @ part.T)


def test_scores_from_features_are_products_of_sketches() -> None:
    model, params, state = tiny()
    train, test = batches(5, 1), batches(3, 2)
    extract = make_features(model, Sketch(4096, 0, "dense"))
    a, b = extract(params, state, train), extract(params, state, test)
    rows = [gradient_rows(model, params, state, *joined(part)) for part in (train, test)]
    # a dense sketch's products err by 1 / sqrt(dim) of the lengths, so do cosines: six deviations
    lengths = [row.norm(dim=1) for row in rows]
    error = (tracin_scores([([a], b)], [1.0]) - rows[0] @ rows[1].T).abs()
    assert (error <= 6 / 64 * lengths[0][:, None] * lengths[1]).all()
    unit = [torch.nn.functional.normalize(row) for row in rows]
    assert (cosine_scores([a], b) - unit[0] @ unit[1].T).abs().max() <= 6 / 64
    assert torch.equal(tracin_scores([([a], b)], [2.0]), 2 * tracin_scores([([a], b)], [1.0]))


def test_lengths_and_refusals() -> None:
    model, params, state = tiny()
    doubled = tree.map(lambda leaf: torch.stack([leaf, 2 * leaf]), params)
    close(tree_norms(doubled), rows_of(doubled).norm(dim=1))
    run = tracin(model, CE, learning_rates=[0.1])
    with pytest.raises(ValueError, match="a learning rate for each; got 2 and 1"):
        run([(params, state)] * 2, batches(2, 0), batches(2, 0))
    with pytest.raises(ValueError, match="batch of test samples"):
        run([(params, state)], batches(2, 0), [])
