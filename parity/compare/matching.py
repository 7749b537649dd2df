"""Two networks' leaves in pairs: by name, or failing that by order among those of one shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from resnet_func import tree
from resnet_func.types import Model, Params, State

LISTED = 10  # leaves without a partner that are named


class NoMatchError(Exception):
    """The leaves do not pair up; the message says which."""


class Matching(NamedTuple):
    """`names`: the second's leaf for each of the first's. `how`: "by name" or "by order and shape"."""

    names: dict[str, str]
    how: str


def match_leaves(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Matching:
    """Pairs every leaf of two networks.

    By name where names and shapes agree throughout. Else by order: the k-th leaf of a shape and last name
    ("weight", "running_var") with the other's k-th, or of a shape alone.

    Raises:
        NoMatchError: a leaf has no partner.
    """
    if {name: leaf.shape for name, leaf in first.items()} == {
        name: leaf.shape for name, leaf in second.items()
    }:
        return Matching({name: name for name in first}, "by name")
    for with_last_name in (True, False):
        groups = [_by_kind(leaves, with_last_name) for leaves in (first, second)]
        counts = [{kind: len(names) for kind, names in group.items()} for group in groups]
        if counts[0] == counts[1]:
            pairs = {
                a: b for kind in groups[0] for a, b in zip(groups[0][kind], groups[1][kind], strict=True)
            }
            return Matching({name: pairs[name] for name in first}, "by order and shape")
    raise NoMatchError("; ".join(_differences(first, second)))


def _by_kind(leaves: Mapping[str, Tensor], with_last_name: bool) -> dict[tuple[object, ...], list[str]]:
    groups = defaultdict(list)
    for name, leaf in leaves.items():
        last = name.rpartition(".")[2] if with_last_name else ""
        groups[(last, leaf.is_floating_point(), *leaf.shape)].append(name)
    return dict(groups)


def _differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    lines = [
        f"{name} is {list(leaf.shape)} in A and {list(second[name].shape)} in B"
        for name, leaf in first.items()
        if name in second and second[name].shape != leaf.shape
    ]
    for whose, here, there in (("A", first, second), ("B", second, first)):
        lines += [
            f"{name} {list(leaf.shape)} only in {whose}" for name, leaf in here.items() if name not in there
        ]
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return [*lines[:LISTED], *more]


def renamed(model: Model, params_names: Matching, state_names: Matching) -> Model:
    """The second network with its leaves under the first's names."""
    back = {name: ours for ours, name in state_names.names.items()}

    def theirs(matching: Matching, given: dict[str, Any]) -> dict[str, Any]:
        return tree.unflatten({matching.names[path]: leaf for path, leaf in tree.flatten(given).items()})

    def apply(params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Tensor, State]:
        logits, after = model.apply(theirs(params_names, params), theirs(state_names, state), x, train=train)
        return logits, tree.unflatten({back[name]: leaf for name, leaf in tree.flatten(after).items()})

    return Model(None, model.init, apply)
