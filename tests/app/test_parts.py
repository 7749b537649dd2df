"""Networks, optimizers and costs made from a recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from resnet_func import tree
from resnet_func.app.batches import Preparer, make_generator
from resnet_func.app.parts import make_network, make_optimizer
from tests.app.conftest import RECIPE


def test_the_network_fits_the_task(prepare: Preparer) -> None:
    config = make_network(RECIPE, prepare.task, prepare.runtime).config
    assert config is not None
    assert (config.num_classes, config.in_channels, config.stem) == (3, 3, "cifar")


@pytest.mark.parametrize(
    ("name", "head"), [("sgd", {"fc.weight"}), ("adamw", {"fc.weight"}), ("muon", set())]
)
def test_decay_reaches_convolutions_and_the_head_that_muon_leaves_to_sgd(
    prepare: Preparer, name: Any, head: set[str]
) -> None:
    model = make_network(replace(RECIPE, model="resnet18"), prepare.task, prepare.runtime)
    params, _ = model.init(make_generator("cpu", 0))
    changes: dict[str, Any] = {"schedule": "constant", "momentum": 0.0, "weight_decay": 0.5}
    optimizer = make_optimizer(replace(RECIPE, optimizer=name, **changes), 10, params)
    zeros = tree.map(torch.zeros_like, params)
    moved = set()
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for path, delta in tree.flatten(updates.delta).items():
        if delta.any():
            moved.add(path)
    assert moved == {path for path, leaf in tree.flatten(params).items() if leaf.ndim == 4} | head


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "step", "constant"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_every_optimizer_with_every_schedule_moves(name, schedule) -> None:
    params = {"conv1": {"weight": torch.ones(2, 2)}}
    optimizer = make_optimizer(replace(RECIPE, optimizer=name, schedule=schedule, warmup=0.0), 10, params)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert (updates.delta["conv1"]["weight"] < 0).all()


def test_a_run_of_one_step_speaks_of_the_options(prepare: Preparer) -> None:
    recipe = replace(RECIPE, schedule="one-cycle")
    with pytest.raises(ValueError, match="one-cycle needs 2 steps.*--epochs.*--batch-size.*--schedule"):
        make_optimizer(recipe, 1, {})
    for schedule in ("cosine", "step", "constant"):
        make_optimizer(replace(recipe, schedule=schedule), 1, {})
