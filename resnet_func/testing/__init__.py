"""For tests of numerical code: Hypothesis strategies of networks and data, and assertions on pytrees.

    from hypothesis import given
    from resnet_func import testing

    @given(testing.models(), testing.batches())
    def test_evaluation_is_pure(network, batch):
        model, params, state = network
        testing.assert_pure(model.apply, params, state, batch[0], train=False, may_return=state)

Strategies draw a seed and fill tensors from a generator of that seed. Networks and batches print as the call
that makes them again: a falsifying example is a line. All are valid by construction, and on the CPU.
"""

from resnet_func.testing.assertions import assert_pure, assert_trees_close, assert_trees_equal, ulp_distance
from resnet_func.testing.strategies import (
    Batch,
    Network,
    batches,
    configs,
    dyadic_tensors,
    models,
    pytrees_like,
    random_batch,
    random_network,
)

__all__ = [
    "Batch",
    "Network",
    "assert_pure",
    "assert_trees_close",
    "assert_trees_equal",
    "batches",
    "configs",
    "dyadic_tensors",
    "models",
    "pytrees_like",
    "random_batch",
    "random_network",
    "ulp_distance",
]
