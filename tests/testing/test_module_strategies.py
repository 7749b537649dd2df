"""Generated modules: valid, of every kind, printed as the call that makes them again, small when shrunk."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import find, given, settings

import resnet_func as rf
from resnet_func import testing
from resnet_func.testing.layers import BUILDERS, Layer
from resnet_func.testing.module_strategies import ACTIVATIONS, DERIVATIONS, KINDS, random_module


@given(testing.modules())
def test_every_module_takes_its_batch(made: testing.GeneratedModule) -> None:
    module, x, y = made
    logits = module(x)
    assert len(logits) == len(x) == len(y)
    assert logits.isfinite().all()
    assert y.max() < logits.shape[1]
    assert not module.training


@given(testing.modules(dtype=torch.float64))
def test_every_module_is_a_function_of_its_parameters(made: testing.GeneratedModule) -> None:
    model, params, state = rf.from_module(made.module)
    logits, _ = model.apply(params, state, made.x, train=False)
    testing.assert_trees_equal(logits, made.module(made.x).detach())


@settings(max_examples=15)
@given(testing.modules(dtype=torch.float64))
def test_what_is_printed_makes_it_again(made: testing.GeneratedModule) -> None:
    before = torch.get_rng_state()
    again = eval(repr(made), {"random_module": random_module, "Layer": Layer, "torch": torch})
    assert torch.equal(before, torch.get_rng_state())
    testing.assert_trees_equal(again[1:], made[1:])
    testing.assert_trees_equal(again.module.state_dict(), made.module.state_dict())


def test_modules_reach_every_choice() -> None:
    found: Counter[str] = Counter()

    @settings(max_examples=800, database=None, derandomize=True)
    @given(testing.modules())
    def collect(made: testing.GeneratedModule) -> None:
        words = repr(made).replace("'", " ").replace(",", " ").replace("(", " ").split()
        found.update(set(words))

    collect()
    wanted = {
        *KINDS,
        *ACTIVATIONS,
        *DERIVATIONS,
        *BUILDERS,
        "mean",
        "flatten",
        "tied",
        "same",
        "shortcut=True)",
    }
    wanted |= {"reflect", "circular", "replicate"}
    assert not {word for word in wanted if not any(word in one for one in found)}


def test_a_falsifying_example_is_small() -> None:
    made = find(testing.modules(), lambda made: True)
    assert len(made.module.layers) == 1
    assert len(made.x) == 2
