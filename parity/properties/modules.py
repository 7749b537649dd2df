"""Modules as functions, and state_dicts from elsewhere: nothing shared, nothing guessed."""

from __future__ import annotations

import warnings

import torch
from hypothesis import strategies as st

import resnet_func as rf
from parity.properties.cases import batches, networks
from parity.properties.comparisons import refusal
from parity.properties.structure import TORCHVISION, module_of
from parity.properties.table import prop
from resnet_func import tree
from resnet_func.testing import Batch, Network, assert_pure, assert_trees_equal

NETWORKS = networks(torch.float32, norms=["batch"], **TORCHVISION)
BATCHES = batches(torch.float32, samples=st.just(2))


@prop(
    tolerance="bitwise",
    why="the same kernels on the same shapes",
    network=NETWORKS,
    batch=BATCHES,
    train=st.booleans(),
)
def modules_as_functions_are_pure(network: Network, batch: Batch, train: bool) -> None:
    """`from_module` shares no memory with the module, and its `apply` mutates nothing."""
    module = module_of(network)

    def take(state_dict: dict[str, torch.Tensor]):
        return rf.from_module(module)[1:]

    params, state = assert_pure(take, module.state_dict())
    model, _, _ = rf.from_module(module)
    assert_pure(model.apply, params, state, batch.x, train=train)


@prop(tolerance="exact", why="an error", network=NETWORKS, batch=BATCHES, index=st.integers(0, 10**6))
def misspelled_parameters_are_refused(network: Network, batch: Batch, index: int) -> None:
    """A module as a function names a key it does not know, and uses no tensor of its own instead."""
    model, params, state = rf.from_module(module_of(network))
    flat = tree.flatten(params)
    path = list(flat)[index % len(flat)]
    flat[f"{path}s"] = flat.pop(path)
    wrong = tree.unflatten(flat)
    said = refusal(lambda: model.apply(wrong, state, batch.x, train=False))
    assert f"{path}s" in said, f"{path}s for {path}: {said or 'no error'}"


@prop(
    tolerance="bitwise",
    why="a copy is a copy",
    network=networks(torch.float32),
    prefix=st.sampled_from(["module.", "_orig_mod.", "_module.", "module._orig_mod."]),
)
def wrappers_prefixes_are_no_names(network: Network, prefix: str) -> None:
    """A state_dict with the prefix of a wrapper before each key gives the parameters and state without it."""
    model, params, state = network
    plain = rf.to_state_dict(model, params, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it says what it dropped
        try:
            loaded = rf.from_state_dict(model, {f"{prefix}{key}": leaf for key, leaf in plain.items()})
        except ValueError as refusal:
            raise AssertionError(f"{prefix!r} was not taken off: {refusal}") from None
    assert_trees_equal(loaded, (params, state))
