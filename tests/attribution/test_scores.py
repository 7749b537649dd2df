"""Scores against their definitions, written out; the order that they inspect in."""

from __future__ import annotations

import pytest
import torch

import resnet_func as rf
from resnet_func import losses
from resnet_func import per_sample as ps
from resnet_func.attribution import (
    diagonal_fisher,
    forgetting,
    found_share,
    ranks,
    sampled_ekfac,
    score_dataset,
    suspicion_order,
)
from resnet_func.attribution.scores import FROM_NETWORKS
from resnet_func.testing import generator
from tests.attribution.oracle import CE, batches, close, gradient_rows, joined, rows_of, tiny


def test_every_score_is_its_definition_averaged_over_checkpoints() -> None:
    model, *first = tiny(0)
    checkpoints = [tuple(first), tiny(5)[1:]]
    data = batches(5, 1)
    scores = score_dataset(model, CE, list(FROM_NETWORKS), damping=0.3)(checkpoints, data)
    x, y = joined(data)
    expected: dict[str, list[torch.Tensor]] = {name: [] for name in FROM_NETWORKS}
    for params, state in checkpoints:
        logits = model.apply(params, state, x, train=False)[0]
        rows = gradient_rows(model, params, state, x, y)
        given = torch.nn.functional.one_hot(y, logits.shape[1])
        expected["loss"].append(CE(logits, y))
        expected["margin"].append(logits[given.bool()] - logits.masked_fill(given.bool(), -torch.inf).amax(1))
        expected["el2n"].append((logits.softmax(1) - given).norm(dim=1))
        expected["grand"].append(rows.norm(dim=1))
        expected["self_influence"].append(rows.square().sum(1))
        ekfac = sampled_ekfac(model, CE)(params, state, data)
        gradients = ps.grads(model, CE)(params, state, x, y)
        moved = rows_of(ekfac.inverse_product(gradients, damping=0.3))
        expected["self_influence_ekfac"].append((rows_of(gradients) * moved).sum(1))
        weights = 1 / (rows.square().mean(0) + 0.3)
        expected["self_influence_diagonal"].append(rows.square() @ weights)
    assert list(scores.values) == list(expected)
    for name, parts in expected.items():
        close(scores.values[name], torch.stack(parts).mean(0))
    assert torch.equal(scores.predictions, logits.argmax(1))


def test_ekfac_and_the_diagonal_choose_their_damping() -> None:
    model, params, state = tiny()
    data = batches(5, 1)
    x, y = joined(data)
    names = ["self_influence_ekfac", "self_influence_diagonal"]
    scores = score_dataset(model, CE, names)([(params, state)], data)
    gradients = ps.grads(model, CE)(params, state, x, y)
    for name, curvature in (
        ("self_influence_ekfac", sampled_ekfac(model, CE)(params, state, data)),
        ("self_influence_diagonal", diagonal_fisher(model, CE)(params, state, data)),
    ):
        close(
            scores.values[name], (rows_of(gradients) * rows_of(curvature.inverse_product(gradients))).sum(1)
        )


def test_ranks_put_the_most_suspicious_first_and_nan_before_all() -> None:
    values = torch.tensor([0.5, torch.nan, 2.0, -1.0, 2.0])
    assert ranks(values, "loss").tolist() == [4, 1, 2, 5, 3]
    assert ranks(values, "margin").tolist() == [3, 1, 4, 2, 5]


def test_what_cannot_be_scored_is_refused() -> None:
    model, params, state = tiny()
    with pytest.raises(ValueError, match="expected scores among loss, margin.*; got els"):
        score_dataset(model, CE, ["loss", "els"])
    with pytest.raises(ValueError, match="at least one checkpoint"):
        score_dataset(model, CE)([], batches(2, 0))
    once = iter(batches(2, 0))
    with pytest.raises(ValueError, match="empty or used up"):
        score_dataset(model, CE)([(params, state)] * 2, once)


def test_planted_labels_are_found_on_digits() -> None:
    """Of 10 % wrong labels, a small network's scores find four times what chance does, and more."""
    from resnet_func.app import data

    source = data.load("digits").train
    assert isinstance(source, data.Dataset)
    x, y = source.images.float() / 255, source.labels
    draw = generator(0)
    planted = torch.rand(len(y), generator=draw) < 0.1
    wrong = (y + torch.randint(1, 10, y.shape, generator=draw)) % 10
    labels = torch.where(planted, wrong, y)
    model = rf.resnet20(depths=(1, 1, 1), norm="group", in_channels=1, widths=(8, 8, 16), norm_groups=4)
    optimizer = rf.optim.adam(5e-3)
    step = rf.train.make_train_step(model, losses.cross_entropy, optimizer)
    start = rf.train.init_train_state(*model.init(generator(1)), optimizer)
    trained, _ = rf.train.fit(step, start, x, labels, epochs=3, batch_size=64, generator=generator(2))
    data_batches = list(zip(x.split(256), labels.split(256), strict=True))
    scores = score_dataset(model, CE)([(trained.params, trained.state)], data_batches)
    for name, values in scores.values.items():
        # chance finds 0.2
        assert found_share(suspicion_order(values, name), planted, 0.2) > 0.8, name


def test_forgetting_counts_falls_and_what_was_never_right() -> None:
    history = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 1, 1]], dtype=torch.bool)
    assert forgetting(history).tolist() == [2, 4, 1, 0]
    assert forgetting(history[:1]).tolist() == [0, 1, 1, 0]
