"""Each assertion is seen to pass where it should, and to fail, with the right words, where it should not."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resnet_func.testing.assertions import (
    MOST,
    assert_pure,
    assert_trees_close,
    assert_trees_equal,
    assert_trees_near,
    ulp_distance,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Pair(NamedTuple):
    first: Any
    second: Any


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


# --------------------------------------------------------------------------- ULPs


@given(st.floats(-1e300, 1e300), st.integers(0, 20))
def test_ulp_distance_counts_the_steps_of_nextafter(start: float, steps: int) -> None:
    end = start
    for _ in range(steps):
        end = math.nextafter(end, math.inf)
    a, b = torch.tensor([start, end], dtype=torch.float64).split(1)
    assert ulp_distance(a, b).item() == ulp_distance(b, a).item() == steps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ulp_distance_of_every_dtype(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    got = torch.tensor([1.0, -1.0, 0.0, 0.0, info.max], dtype=dtype)
    want = torch.tensor([1 + info.eps, -1 - info.eps, -0.0, info.smallest_normal, math.inf], dtype=dtype)
    distance = ulp_distance(got, want)
    assert distance.dtype == torch.int64
    assert distance[[0, 1, 2, 4]].tolist() == [1, 1, 0, 1]
    # all subnormal numbers lie between 0 and the smallest normal one
    assert distance[3].item() == round(1 / info.eps)


def test_ulp_distance_of_nan_and_of_opposite_ends() -> None:
    nan, top = math.nan, torch.finfo(torch.float64).max
    got = torch.tensor([nan, nan, 1.0, top, -top], dtype=torch.float64)
    want = torch.tensor([nan, 1.0, nan, -top, top], dtype=torch.float64)
    assert ulp_distance(got, want).tolist() == [0, MOST, MOST, MOST, MOST]
    assert ulp_distance(ones(0), ones(0)).shape == (0,)


@pytest.mark.parametrize("other", [ones(3), ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64)])
def test_ulp_distance_refuses_what_it_cannot_compare(other: Tensor) -> None:
    with pytest.raises(ValueError, match="expected floating tensors of one shape and dtype"):
        ulp_distance(ones(2) if other.is_floating_point() else other, other)


# --------------------------------------------------------------------------- equal


def test_equal_trees_of_any_kind_pass() -> None:
    nan = torch.tensor([math.nan, -0.0, math.inf])
    tree = {"b": Pair(nan, [ones(2, 0)]), "a": (torch.tensor(True), torch.tensor(3)), "n": 1.5}
    assert_trees_equal(tree, {**tree, "a": list(tree["a"]), "empty": {}})
    assert_trees_equal(nan.bfloat16(), nan.bfloat16())
    assert_trees_equal(ones(2, 3).t(), ones(3, 2))
    assert_trees_equal({}, {})


BASE = {"conv1": {"weight": ones(2, 2)}, "fc": Pair(ones(3), torch.tensor(4))}


def changed(path: str, value: Any) -> dict[str, Any]:
    weight, (first, second) = BASE["conv1"]["weight"], BASE["fc"]
    leaves = {"conv1.weight": weight, "fc.first": first, "fc.second": second, path: value}
    fc = Pair(leaves["fc.first"], leaves["fc.second"])
    return {"conv1": {"weight": leaves["conv1.weight"]}, "fc": fc}


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ({"conv1": {}, "fc": BASE["fc"]}, "missing conv1.weight"),
        ({**BASE, "bias": ones(1)}, "unexpected bias"),
        (changed("fc.first", ones(1, 3)), r"fc.first: got torch.float32 \[1, 3\], want torch.float32 \[3\]"),
        (changed("fc.first", ones(3).double()), "fc.first: got torch.float64"),
        (changed("fc.first", 1.0), "fc.first: got float, want torch.float32"),
        (changed("fc.second", torch.tensor(6)), r"1 of 3 .* fc.second: 1 of 1 entries, by up to 2 \(at \[\]"),
        (
            changed("conv1.weight", torch.tensor([[1.0, 1.0], [1 + 2**-22, 1.0]])),
            r"worst conv1.weight: 1 of 4 entries, by up to 2 ULP \(at \[1, 0\]: got 1.00000023.*, want 1.0\)",
        ),
        (changed("fc.first", torch.tensor([1.0, math.nan, 1.0])), "NaN or more than 2\\^63 ULP .* got nan"),
    ],
)
def test_unequal_trees_are_told_apart(got: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_trees_equal(got, BASE)


def test_the_worst_leaf_is_named() -> None:
    got = {"a": ones(2) + 2**-23, "b": ones(2) + 2**-20, "c": ones(2)}
    with pytest.raises(AssertionError, match="2 of 3 leaves differ; worst b: 2 of 2 entries, by up to 8 ULP"):
        assert_trees_equal(got, dict.fromkeys("abc", ones(2)))


def test_bits_that_no_distance_sees_are_seen() -> None:
    zero = r"0 ULP \(the sign of a zero, or the bits of a NaN\) \(at \[1\]: got -0.0, want 0.0\)"
    with pytest.raises(AssertionError, match=zero):
        assert_trees_equal(torch.tensor([0.0, -0.0]), torch.zeros(2))
    nan = torch.tensor([math.nan])
    with pytest.raises(AssertionError, match="leaf: 1 of 1 entries, by up to 0 ULP"):
        assert_trees_equal((nan.view(torch.int32) + 1).view(torch.float32), nan)
    with pytest.raises(AssertionError, match="got 1j, want 2j"):
        assert_trees_equal(torch.tensor([1j]), torch.tensor([2j]))
    with pytest.raises(AssertionError, match="got 'a', want 'b'"):
        assert_trees_equal({"name": "a"}, {"name": "b"})


# --------------------------------------------------------------------------- close


def about(*errors: float) -> Tensor:
    """A float32 tensor of ones, off by multiples of 2^-20."""
    return ones(len(errors)) + torch.tensor(errors) * 2**-20


SHADOW = ones(3, dtype=torch.float64)


def test_no_further_than_twice_the_error_is_close() -> None:
    assert_trees_close({"w": about(0, 2, -2)}, {"w": about(1, 0, 0)}, {"w": SHADOW})
    assert_trees_close({"w": about(0, 3, 0)}, {"w": about(1, 0, 0)}, {"w": SHADOW}, factor=3)
    assert_trees_close({"n": torch.tensor(3), "e": ones(0)}, {"n": torch.tensor(3), "e": ones(0)}, {})


def test_further_is_not_and_the_worst_is_named() -> None:
    wants, shadows = dict.fromkeys("abc", about(1, 0, 0)), dict.fromkeys("abc", SHADOW)
    got = {"a": about(0, 3, 0), "b": about(0, -4, 0), "c": about(2, 2, 2)}
    message = r"2 of 3 leaves are too far from the shadow; worst b: off by 3.81e-06, allowed 1.91e-06"
    with pytest.raises(AssertionError, match=message):
        assert_trees_close(got, wants, shadows)


def test_an_exact_value_counts_as_one_rounding_off() -> None:
    eps = torch.finfo(torch.float32).eps
    assert_trees_close(ones(3) + 2 * eps, ones(3), SHADOW)
    with pytest.raises(AssertionError, match="off by 3.58e-07, allowed 2.38e-07"):
        assert_trees_close(ones(3) + 3 * eps, ones(3), SHADOW)
    with pytest.raises(AssertionError, match="off by 1e-30, allowed 0"):
        assert_trees_close(torch.full((3,), 1e-30), torch.zeros(3), 0 * SHADOW)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_close(wrong: float) -> None:
    with pytest.raises(AssertionError, match="1 of 1 leaves are too far"):
        assert_trees_close(torch.tensor([1.0, wrong, 1.0]), ones(3), SHADOW)
    with pytest.raises(ValueError, match="the wanted value of leaf is not finite"):
        assert_trees_close(ones(3), torch.tensor([1.0, wrong, 1.0]), SHADOW)
    with pytest.raises(ValueError, match="the shadow of leaf is not finite"):
        assert_trees_close(ones(3), ones(3), SHADOW * wrong)


def test_counters_must_be_equal() -> None:
    with pytest.raises(AssertionError, match="worst n: 1 of 1 entries, by up to 1"):
        assert_trees_close({"n": torch.tensor(3)}, {"n": torch.tensor(4)}, {"n": torch.tensor(3)})


@pytest.mark.parametrize("shadow", [ones(3), ones(4, dtype=torch.float64), None], ids=["fp32", "[4]", "none"])
def test_a_shadow_that_is_none_is_refused(shadow: Any) -> None:
    with pytest.raises(ValueError, match=r"the shadow of leaf must be torch.float64 \[3\]; got"):
        assert_trees_close(ones(3), ones(3), shadow)


def test_close_trees_have_the_same_leaves() -> None:
    with pytest.raises(AssertionError, match="missing a; unexpected b"):
        assert_trees_close({"b": ones(3)}, {"a": ones(3)}, {"a": SHADOW})


# --------------------------------------------------------------------------- near


@given(
    st.floats(1e-12, 1e-2),
    st.sampled_from([0.5, 2.0]),
    st.integers(0, 3),
    st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_near_is_relative_to_the_largest_entry(rtol: float, factor: float, at: int, scale: float) -> None:
    want = torch.tensor([1.0, -2.0, 4.0, 0.0], dtype=torch.float64) * scale
    got = want.clone()
    got[at] += factor * rtol * 4 * scale
    if factor < 1:
        assert_trees_near({"a": got}, {"a": want}, rtol)
    else:
        with pytest.raises(AssertionError, match="worst a: relative error"):
            assert_trees_near({"a": got}, {"a": want}, rtol)


def test_a_small_leaf_is_measured_against_the_tree_unless_asked_not_to_be() -> None:
    want = {"large": ones(1), "small": ones(1) * 1e-9}
    got = {"large": ones(1), "small": ones(1) * 1.5e-9}
    assert_trees_near(got, want, 1e-6)
    with pytest.raises(AssertionError, match="worst small: relative error 0.5, allowed 1e-06"):
        assert_trees_near(got, want, 1e-6, floor=0)


@pytest.mark.parametrize("name", "ab")
def test_no_nan_is_near(name: str) -> None:
    want = {"a": ones(2), "b": ones(2)}
    got = {**want, name: torch.tensor([1.0, math.nan])}
    with pytest.raises(AssertionError, match=f"worst {name}: relative error nan"):
        assert_trees_near(got, want, 1.0)
    with pytest.raises(AssertionError, match=f"worst {name}: relative error nan"):
        assert_trees_near(want, got, 1.0)


def test_near_trees_have_the_same_leaves() -> None:
    with pytest.raises(AssertionError, match="missing a; unexpected b"):
        assert_trees_near({"b": ones(3)}, {"a": ones(3)})
    with pytest.raises(AssertionError, match=r"a: \[1, 3\], not \[3\]"):
        assert_trees_near({"a": ones(1, 3)}, {"a": ones(3)})
    assert_trees_near({}, {})
    assert_trees_near({"e": ones(0)}, {"e": ones(0)})


def test_a_reference_that_is_not_finite_can_be_refused() -> None:
    broken = {"a": torch.tensor([1.0, math.nan]), "n": torch.tensor(1)}
    assert_trees_equal(broken, broken)
    with pytest.raises(AssertionError, match="a of the reference is not finite: nothing is proven"):
        assert_trees_equal(broken, broken, finite=True)


# --------------------------------------------------------------------------- pure


def test_pure_functions_pass_and_their_output_comes_back() -> None:
    x = {"a": ones(3)}
    out = assert_pure(lambda x, n, *, scale: {"y": x["a"] * scale, "n": n + 1}, x, 3, scale=2.0)
    assert_trees_equal(out, {"y": 2 * ones(3), "n": 4})


def in_place(x: dict[str, Tensor]) -> Tensor:
    return x["a"].mul_(2).sum()


def takes_away(x: dict[str, Tensor]) -> Tensor:
    return x.pop("a", ones(3)).sum()


def adds(x: dict[str, Tensor]) -> Tensor:
    x["b"] = ones(1)
    return x["a"].sum()


def replaces(x: dict[str, Tensor]) -> Tensor:
    x["a"] = x["a"] + 0
    return x["a"].sum()


def transposes(x: dict[str, Tensor]) -> Tensor:
    return x["a"].unsqueeze_(0).sum()


def grades(x: dict[str, Tensor]) -> Tensor:
    return x["a"].requires_grad_().sum()


def noisy(x: dict[str, Tensor]) -> Tensor:
    return x["a"] + torch.randn(3)


CALLS = iter(range(100))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (in_place, "an input was mutated: 1 of 1 leaves differ; worst 0.a: 3 of 3 entries"),
        (takes_away, "inputs were replaced, added or removed: 0.a"),
        (adds, "inputs were replaced, added or removed: 0.b"),
        (replaces, "inputs were replaced, added or removed: 0.a"),
        (transposes, r"an input was mutated: .* 0.a: got torch.float32 \[1, 1, 3\]"),
        (grades, "requires_grad of inputs was changed: 0.a"),
        (noisy, "the global random generator was used"),
        (lambda x: {"y": x["a"]}, "output y shares memory with input 0.a"),
        (lambda x: {"y": x["a"][1:]}, "output y shares memory with input 0.a"),
        (lambda x: {"y": x["a"].detach()}, "output y shares memory with input 0.a"),
        (lambda x: x["a"] + next(CALLS), "a second call differs: 1 of 1 leaves differ; worst leaf"),
        (lambda x: next(CALLS), r"a second call differs: .* got \d+, want \d+"),
    ],
)
def test_impure_functions_are_caught(fn: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_pure(fn, {"a": ones(3)})


def test_what_may_return_is_the_tensor_itself() -> None:
    x, state = ones(3), {"mean": ones(3)}

    def step(x: Tensor, state: dict[str, Tensor], *, view: bool) -> tuple[Tensor, dict[str, Tensor]]:
        return x + 1, {"mean": state["mean"][:] if view else state["mean"]}

    assert_pure(step, x, state, view=False, may_return=state)
    for view, allowed in ((False, ()), (False, x), (True, state)):
        with pytest.raises(AssertionError, match=r"output 1.mean shares memory with input 1.mean"):
            assert_pure(step, x, state, view=view, may_return=allowed)


def test_an_argument_that_is_given_by_name_is_named() -> None:
    with pytest.raises(AssertionError, match="output leaf shares memory with input other"):
        assert_pure(lambda x, other: other, ones(1), other=ones(2))


def test_empty_tensors_share_nothing() -> None:
    assert_pure(lambda x: x[:0], ones(0))
