"""Nothing is mutated, nothing is shared, nothing random is read by the public functions."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

import resnet_func as rf
from parity.properties.cases import SEEDS, batches, networks, normal_like
from parity.properties.table import prop
from resnet_func import testing, tree
from resnet_func.losses import cross_entropy
from resnet_func.testing import Batch, Network, assert_pure, assert_trees_equal, generator

WHY = "the same kernels on the same shapes"
NETWORKS, BATCHES = networks(torch.float32), batches(torch.float32)


@prop(tolerance="bitwise", why=WHY, network=NETWORKS, batch=BATCHES)
def evaluation_is_pure(network: Network, batch: Batch) -> None:
    """`apply(train=False)` mutates nothing; what comes back is new, or the state as it came."""
    model, params, state = network
    assert_pure(model.apply, params, state, batch.x, train=False, may_return=state)


@prop(tolerance="bitwise", why=WHY, network=NETWORKS, batch=BATCHES)
def training_is_pure(network: Network, batch: Batch) -> None:
    """`apply(train=True)` mutates nothing, and all that comes back is new."""
    model, params, state = network
    assert_pure(model.apply, params, state, batch.x, train=True)


@prop(tolerance="bitwise", why=WHY, config=testing.configs(), seed=SEEDS)
def initialisation_depends_on_its_seed_alone(config: rf.ResNetConfig, seed: int) -> None:
    """`init` reads its generator only: one seed gives one network, another seed another."""
    model = rf.build(config)
    params, _ = assert_pure(lambda seed: model.init(generator(seed)), seed)
    other, _ = model.init(generator(seed ^ 1))
    assert not torch.equal(params["conv1"]["weight"], other["conv1"]["weight"])


PER_SAMPLE = {
    "grads": rf.per_sample.grads,
    "norms": rf.per_sample.norms,
    "layer_norms": rf.per_sample.layer_norms,
    "moments": rf.per_sample.moments,
    "sketch": rf.per_sample.sketch,
}


@prop(
    tolerance="bitwise",
    why=WHY,
    network=NETWORKS,
    batch=BATCHES,
    name=st.sampled_from(list(PER_SAMPLE)),
    method=st.sampled_from(["contract", "vmap", "loop"]),
)
def per_sample_transforms_are_pure(network: Network, batch: Batch, name: str, method: Any) -> None:
    """Every per-sample transform, by every method, mutates nothing and returns what is new."""
    model, params, state = network
    assert_pure(PER_SAMPLE[name](model, cross_entropy, train=False, method=method), params, state, *batch)


OPTIMIZERS = {
    "sgd": rf.optim.sgd(0.1),
    "nesterov": rf.optim.sgd(0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adam": rf.optim.adam(0.01, weight_decay=1e-3),
    "adamw": rf.optim.adamw(0.01),
    "clipped": rf.optim.clipped(rf.optim.sgd(0.1, momentum=0.9), 1.0),
}


@prop(tolerance="bitwise", why=WHY, network=NETWORKS, seed=SEEDS, name=st.sampled_from(list(OPTIMIZERS)))
def optimizers_are_pure(network: Network, seed: int, name: str) -> None:
    """`init`, `update` and `apply_updates` of every optimizer mutate nothing and return what is new."""
    optimizer, params = OPTIMIZERS[name], network.params
    opt_state = assert_pure(optimizer.init, params)
    for step in range(2):
        grads = normal_like(params, seed + step)
        updates, opt_state = assert_pure(optimizer.update, grads, opt_state, params, may_return=grads)
        params = assert_pure(rf.optim.apply_updates, params, updates)


@prop(tolerance="bitwise", why=WHY, network=NETWORKS, batch=BATCHES, name=st.sampled_from(list(OPTIMIZERS)))
def training_steps_are_pure(network: Network, batch: Batch, name: str) -> None:
    """A training step with a moving average mutates nothing and returns what is new."""
    model, params, state = network
    begin = rf.train.init_train_state(params, state, OPTIMIZERS[name], ema=True)
    step = rf.train.make_train_step(model, cross_entropy, OPTIMIZERS[name], ema_decay=0.9)
    after, _ = assert_pure(step, begin, *batch)
    moved = zip(tree.leaves(after.params), tree.leaves(params), strict=True)
    assert any(not torch.equal(new, old) for new, old in moved)


@prop(tolerance="bitwise", why="a copy is a copy", network=NETWORKS)
def state_dicts_make_the_round_trip(network: Network) -> None:
    """`from_state_dict` takes back what `to_state_dict` gave, and shares no memory with it."""
    model, params, state = network
    state_dict = assert_pure(
        lambda params, state: rf.to_state_dict(model, params, state),
        params,
        state,
        may_return=(params, state),
    )
    assert state_dict.keys() == {**tree.flatten(params), **tree.flatten(state)}.keys()
    again = assert_pure(lambda state_dict: rf.from_state_dict(model, state_dict), state_dict)
    assert_trees_equal(again, (params, state))
