"""Pytree helpers: paths there and back, and the algebra against one long vector."""

from __future__ import annotations

import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_func import tree

names = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=3)
nested = st.recursive(
    st.dictionaries(
        names, st.integers(1, 4).map(lambda n: torch.arange(n, dtype=torch.float64) - 1), max_size=3
    ),
    lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3),
    max_leaves=6,
)


def vector(params: object) -> torch.Tensor:
    return torch.cat(
        [leaf.flatten() for leaf in tree.leaves(params)] or [torch.zeros(0, dtype=torch.float64)]
    )


@given(nested)
def test_unflatten_undoes_flatten(params: dict) -> None:
    flat = tree.flatten(params)
    assert all(isinstance(leaf, torch.Tensor) for leaf in flat.values())
    assert tree.flatten(tree.unflatten(flat)) == flat  # the same tensors, by identity
    assert list(tree.flatten(tree.unflatten(flat))) == sorted(flat, key=list(flat).index)


@given(nested)
def test_prune_drops_empty_branches_only(params: dict) -> None:
    pruned = tree.prune({**params, "empty": {"inner": {}}})
    assert "empty" not in pruned
    assert tree.flatten(pruned) == tree.flatten(params)


@given(nested)
def test_algebra_is_that_of_one_vector(params: dict) -> None:
    doubled = tree.map(lambda leaf: 2 * leaf, params)
    long = vector(params)
    assert tree.size(params) == len(long)
    assert float(tree.dot(params, doubled)) == float(long @ (2 * long))
    torch.testing.assert_close(float(tree.norm(params)), float(long.norm()), rtol=1e-14, atol=0)


def test_map_with_path_gives_the_dotted_path() -> None:
    params = {"layer1": {"0": {"weight": 1}}, "fc": {"bias": 2}}
    got = tree.map_with_path(lambda path, leaf: (path, leaf), params)
    assert got == {"layer1": {"0": {"weight": ("layer1.0.weight", 1)}}, "fc": {"bias": ("fc.bias", 2)}}


@given(nested)
def test_map_unzip_is_a_map_for_each_output(params: dict) -> None:
    doubled = tree.map(lambda leaf: 2 * leaf, params)
    sums, differences = tree.map_unzip(lambda a, b: (a + b, b - a), 2, params, doubled)
    assert tree.flatten(sums).keys() == tree.flatten(differences).keys() == tree.flatten(params).keys()
    assert torch.equal(vector(sums), 3 * vector(params))
    assert torch.equal(vector(differences), vector(params))


def test_map_unzip_refuses_a_tree_with_fewer_leaves() -> None:
    with pytest.raises(ValueError, match="shorter"):
        tree.map_unzip(lambda a, b: (a, b), 2, {"a": 1, "b": 2}, {"a": 1})


def test_merge_changes_neither() -> None:
    a, b = {"conv1": {"weight": 1}}, {"conv1": {"tap": 2}, "fc": {"tap": 3}}
    assert tree.merge(a, b) == {"conv1": {"weight": 1, "tap": 2}, "fc": {"tap": 3}}
    assert (a, b) == ({"conv1": {"weight": 1}}, {"conv1": {"tap": 2}, "fc": {"tap": 3}})


@pytest.mark.parametrize("flat", [{"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}], ids=["leaf-first", "branch-first"])
def test_a_path_is_a_leaf_or_a_branch(flat: dict) -> None:
    with pytest.raises(ValueError, match="leaf"):
        tree.unflatten(flat)
