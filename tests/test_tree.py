"""Pytree helpers: paths there and back, and the algebra against one long vector."""

from __future__ import annotations

import string

import pytest
import torch
from hypothesis import assume, given
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
    with pytest.raises(ValueError, match="missing"):
        tree.map_unzip(lambda a, b: (a, b), 2, {"a": 1, "b": 2}, {"a": 1})


def test_merge_changes_neither() -> None:
    a, b = {"conv1": {"weight": 1}}, {"conv1": {"tap": 2}, "fc": {"tap": 3}}
    assert tree.merge(a, b) == {"conv1": {"weight": 1, "tap": 2}, "fc": {"tap": 3}}
    assert (a, b) == ({"conv1": {"weight": 1}}, {"conv1": {"tap": 2}, "fc": {"tap": 3}})


@pytest.mark.parametrize("flat", [{"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}], ids=["leaf-first", "branch-first"])
def test_a_path_is_a_leaf_or_a_branch(flat: dict) -> None:
    with pytest.raises(ValueError, match="leaf"):
        tree.unflatten(flat)


@given(nested)
def test_replace_and_select_keep_the_structure(params: dict) -> None:
    flat = tree.flatten(params)
    doubled = {path: 2 * leaf for path, leaf in flat.items()}
    whole = tree.replace(params, doubled)
    assert list(tree.flatten(whole)) == list(flat)
    assert torch.equal(vector(whole), 2 * vector(params))
    some = {path: leaf for path, leaf in doubled.items() if len(path) % 2}
    assert tree.flatten(tree.select(params, some)) == some
    assert tree.flatten(tree.select(flat, some)) == some  # dotted names, too


def test_lists_and_tuples_keep_their_places() -> None:
    params = [{"a": 1}, (2, None), {}]
    assert tree.flatten(params) == {"0.a": 1, "1.0": 2}
    assert tree.select(params, {"1.0": 5}) == [None, (5, None), {}]
    assert tree.replace(params, {"0.a": 5}) == [{"a": 5}, (2, None), {}]
    assert tree.map_with_path(lambda path, leaf: path, params) == [{"a": "0.a"}, ("1.0", None), {}]
    assert tree.select(params, {}) == [None, (None, None), {}]
    with pytest.raises(ValueError, match="two leaves have the path 'a.b'"):
        tree.flatten({"a": {"b": 1}, "a.b": 2})


# --------------------------------------------------------------------------- derivatives, narrow leaves

ZEROS = {"a": torch.zeros(3, dtype=torch.float64), "b": {"c": torch.zeros((), dtype=torch.float64)}}


def test_the_norms_derivatives_at_zero_count_as_zero() -> None:
    for leaf in tree.leaves((torch.func.grad(tree.norm)(ZEROS), torch.func.hessian(tree.norm)(ZEROS))):
        assert not leaf.any()  # NaN is true
    ones = tree.map(torch.ones_like, ZEROS)
    value, tangent = torch.func.jvp(tree.norm, (ZEROS,), (ones,))
    assert (value.item(), tangent.item()) == (0.0, 0.0)
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), ZEROS)
    for leaf in torch.autograd.grad(tree.norm(leaves), tree.leaves(leaves)):
        assert not leaf.any()


def test_one_zero_norm_spoils_no_other_in_a_batch() -> None:
    """As among the norms of per-sample gradients, of which one is zero."""
    batch = {"a": torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)}
    got = torch.func.grad(lambda b: torch.func.vmap(tree.norm)(b).sum())(batch)["a"]
    want = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-15, atol=0)


@given(nested)
def test_the_norms_derivative_is_the_direction(params: dict) -> None:
    norm = tree.norm(params)
    assume(norm > 0)
    for got, leaf in zip(tree.leaves(torch.func.grad(tree.norm)(params)), tree.leaves(params), strict=True):
        torch.testing.assert_close(got, leaf / norm, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_narrow_leaves_are_summed_in_float32(dtype: torch.dtype) -> None:
    """A sum kept in bfloat16 is stuck at 256, and 300**2 is above float16's range."""
    params = {"many": torch.full((1000,), 300.0, dtype=dtype), "one": torch.ones(1, dtype=dtype)}
    exact = vector(tree.map(torch.Tensor.double, params))
    dot, norm = tree.dot(params, params), tree.norm(params)
    assert dot.dtype == norm.dtype == torch.float32
    close = 1001 * torch.finfo(torch.float32).eps
    assert float(dot) == pytest.approx(float(exact @ exact), rel=close)
    assert float(norm) == pytest.approx(float(exact.norm()), rel=close)


def test_an_empty_tree_has_a_float32_norm_on_the_cpu_whatever_the_defaults() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        got = tree.norm({}), tree.dot({}, {})
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert [(leaf.dtype, leaf.device.type, leaf.item()) for leaf in got] == 2 * [(torch.float32, "cpu", 0.0)]
