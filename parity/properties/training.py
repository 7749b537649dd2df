"""One training step at a time: optimizers against torch.optim's, batches in pieces, moving averages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

import resnet_func as rf
from parity.properties.cases import SEEDS, batches, networks, normal_like
from parity.properties.table import needs, prop
from resnet_func import tree
from resnet_func.losses import cross_entropy
from resnet_func.optim import schedules
from resnet_func.testing import Batch, Network, assert_trees_equal, assert_trees_near
from resnet_func.types import Params

SHAPES = {"conv": (4, 3, 3, 3), "fc": (5, 4), "bias": (5,)}
DROPS = partial(schedules.step, milestones=[1, 3], gamma=0.3)

# Ours, and torch's; the learning rate drops on the way.
OPTIMIZERS = {
    "sgd": (
        partial(rf.optim.sgd, DROPS(0.1), weight_decay=0.01),
        partial(torch.optim.SGD, lr=0.1, weight_decay=0.01),
    ),
    "momentum": (
        partial(rf.optim.sgd, DROPS(0.1), momentum=0.9, weight_decay=0.01),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    ),
    "nesterov": (
        partial(rf.optim.sgd, DROPS(0.1), momentum=0.9, nesterov=True),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    ),
    "adam": (
        partial(rf.optim.adam, DROPS(0.01), weight_decay=0.01),
        partial(torch.optim.Adam, lr=0.01, weight_decay=0.01),
    ),
    "adamw": (partial(rf.optim.adamw, DROPS(0.01)), partial(torch.optim.AdamW, lr=0.01)),
}


@prop(
    tolerance="bitwise",
    why="the same roundings in the same order as torch.optim's loop over tensors",
    seed=SEEDS,
)
def optimizers_are_torchs(seed: int) -> None:
    """Five steps of every optimizer move parameters as torch.optim's do, under a schedule."""
    params: Params = normal_like({key: torch.empty(shape) for key, shape in SHAPES.items()}, seed)
    steps = [normal_like(params, seed + step) for step in range(1, 6)]
    for name, (ours, torchs) in OPTIMIZERS.items():
        got, want = [
            {f"{name}.{k}": v for k, v in run.items()}
            for run in (our_run(ours(), params, steps), torchs_run(torchs, params, steps))
        ]
        assert_trees_equal(got, want)


def our_run(optimizer: rf.optim.Optimizer, params: Params, steps: list[Params]) -> Params:
    opt_state = optimizer.init(params)
    for grads in steps:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = rf.optim.apply_updates(params, updates)
    return params


def torchs_run(torchs: Callable[..., Any], params: Params, steps: list[Params]) -> Params:
    leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
    optimizer = torchs(list(leaves.values()), foreach=False)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=0.3)
    for grads in steps:
        for key, leaf in leaves.items():
            leaf.grad = grads[key].clone()
        optimizer.step()
        scheduler.step()
    return {key: leaf.detach() for key, leaf in leaves.items()}


@prop(
    tolerance="fp64 1e-10",
    why="the same sums in another order, in float64",
    network=networks(norms=["group", "none"]),
    batch=batches(samples=st.just(5)),
    pieces=st.sampled_from([2, 3]),
)
def uneven_pieces_change_no_training_step(network: Network, batch: Batch, pieces: int) -> None:
    """A batch that is cut into pieces of unequal size takes the step of the whole batch."""
    model, params, state = network
    optimizer = rf.optim.sgd(0.1)
    begin = rf.train.init_train_state(params, state, optimizer)
    whole, expected_metrics = rf.train.make_train_step(model, cross_entropy, optimizer)(begin, *batch)
    step = rf.train.make_train_step(model, cross_entropy, optimizer, microbatches=pieces)
    after, metrics = step(begin, *batch)
    assert_trees_near(after.params, whole.params, 1e-10)
    assert_trees_near(metrics, expected_metrics, 1e-6)  # the accuracy is a share in float32


@prop(
    tolerance="bitwise",
    why="the same kernels on the same shapes",
    network=networks(norms=["batch"]),
    batch=batches(samples=st.just(4)),
)
def every_piece_moves_the_running_statistics(network: Network, batch: Batch) -> None:
    """After a step in two pieces the statistics have seen the one, then the other."""
    model, params, state = network
    optimizer = rf.optim.sgd(0.1)
    step = rf.train.make_train_step(model, cross_entropy, optimizer, microbatches=2)
    after, _ = step(rf.train.init_train_state(params, state, optimizer), *batch)
    for x in batch.x.chunk(2):
        _, state = model.apply(params, state, x, train=True)
    assert_trees_equal(after.state, state)


@prop(
    tolerance="fp64 1e-12",
    why="the same formula in another order, in float64",
    network=networks(norms=["batch"]),
    batch=batches(),
    most=st.sampled_from([0.15, 0.9]),
)
def averages_follow_parameters_and_statistics(network: Network, batch: Batch, most: float) -> None:
    """The averages are `d average + (1 - d) newest` with d the smaller of `ema_decay` and (1+t)/(10+t)."""
    model, params, state = network
    optimizer = rf.optim.sgd(0.1)
    now = rf.train.init_train_state(params, state, optimizer, ema=True)
    step = rf.train.make_train_step(model, cross_entropy, optimizer, ema_decay=most)
    averages = params, state
    for t in (1, 2):
        now, _ = step(now, *batch)
        decay = min(most, (1 + t) / (10 + t))
        newest = now.params, now.state
        averages = tree.map(
            lambda old, new: decay * old + (1 - decay) * new if new.is_floating_point() else new,  # noqa: B023
            averages,
            newest,
        )
    needs(not torch.equal(now.params["fc"]["bias"], params["fc"]["bias"]), "a step")
    assert_trees_near((now.ema_params, now.ema_state), averages, 1e-12)
