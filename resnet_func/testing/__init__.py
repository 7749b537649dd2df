"""For tests of numerical code: assertions on pytrees, laws of any network, Hypothesis strategies.

    from hypothesis import given
    from resnet_func import testing

    @given(testing.models(), testing.batches())
    def test_evaluation_is_pure(network, batch):
        model, params, state = network
        testing.assert_pure(model.apply, params, state, batch[0], train=False, may_return=state)

Strategies draw a seed and fill tensors from a generator of that seed. Networks and batches print as the call
that makes them again: a falsifying example is a line. All are valid by construction, and on the CPU. Only the
strategies need Hypothesis.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from resnet_func.testing.assertions import (
    assert_pure,
    assert_trees_close,
    assert_trees_equal,
    assert_trees_near,
    named_leaves,
    ulp_distance,
)
from resnet_func.testing.laws import LAWS, LawResult, check_laws
from resnet_func.testing.seeded import generator, randn

if TYPE_CHECKING:
    from resnet_func.testing.module_strategies import GeneratedModule, modules, random_module
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
        tensors,
    )

__all__ = [
    "LAWS",
    "Batch",
    "GeneratedModule",
    "LawResult",
    "Network",
    "assert_pure",
    "assert_trees_close",
    "assert_trees_equal",
    "assert_trees_near",
    "batches",
    "check_laws",
    "configs",
    "dyadic_tensors",
    "generator",
    "models",
    "modules",
    "named_leaves",
    "pytrees_like",
    "randn",
    "random_batch",
    "random_module",
    "random_network",
    "tensors",
    "ulp_distance",
]


def __getattr__(name: str) -> Any:
    """Strategies are imported when they are asked for: only they need Hypothesis."""
    if name in __all__:
        for file in ("strategies", "module_strategies"):
            found = getattr(import_module(f"resnet_func.testing.{file}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
