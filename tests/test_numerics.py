"""Roots at zero, sums in narrow dtypes, and float64 for devices without it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_func import numerics


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=9))
def test_safe_sqrt_is_sqrt_to_the_bit(values: list[float]) -> None:
    x = torch.tensor([*values, 0.0, float("inf"), -1.0], dtype=torch.float64)
    assert torch.equal(numerics.safe_sqrt(x).view(torch.int64), x.sqrt().view(torch.int64))


@given(st.lists(st.floats(-1e100, 1e100), max_size=40), st.sampled_from([torch.float32, torch.float64]))
def test_safe_norm_is_the_norm_to_the_bit(values: list[float], dtype: torch.dtype) -> None:
    for x in (torch.tensor(values, dtype=dtype), torch.zeros(len(values), dtype=dtype)):
        want = torch.linalg.vector_norm(x)
        assert torch.equal(numerics.safe_norm(x), want) or want.isnan()


def test_safe_norm_has_finite_derivatives() -> None:
    zero, x = torch.zeros(3, dtype=torch.float64), torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    assert not torch.func.grad(numerics.safe_norm)(zero).any()
    assert not torch.func.hessian(numerics.safe_norm)(zero).any()
    want = torch.eye(3, dtype=torch.float64) / 5 - torch.outer(x, x) / 125
    torch.testing.assert_close(torch.func.hessian(numerics.safe_norm)(x), want)


@pytest.mark.parametrize("x", [0.0, 4.0])
def test_safe_sqrt_has_finite_derivatives_of_every_order(x: float) -> None:
    fn, values = numerics.safe_sqrt, []
    for _ in range(3):
        fn = torch.func.grad(fn)
        values.append(fn(torch.tensor(x, dtype=torch.float64)).item())
    assert values == ([0.0, 0.0, 0.0] if x == 0 else [0.25, -1 / 32, 3 / 256])
    _, tangent = torch.func.jvp(numerics.safe_sqrt, (torch.tensor(x),), (torch.ones(()),))
    assert tangent.item() == values[0]


def test_narrow_dtypes_are_summed_in_float32_and_others_in_themselves() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert numerics.accumulation_dtype(dtype) == torch.float32
    for dtype in (torch.float32, torch.float64, torch.int64):
        assert numerics.accumulation_dtype(dtype) == dtype
        leaf = torch.ones(2, dtype=dtype)
        assert numerics.widen(leaf) is leaf


def test_float64_is_on_the_cpu_where_the_device_has_none() -> None:
    with FakeTensorMode():
        for device, expected in (("mps", "cpu"), ("cuda", "cuda"), ("cpu", "cpu")):
            made = numerics.to_float64(torch.zeros((), dtype=torch.int64, device=device))
            assert (made.dtype, made.device.type) == (torch.float64, expected)
            leaf = torch.zeros(3, device=device, dtype=torch.float32)
            cast = numerics.cast_like(made)
            assert (cast(leaf).dtype, cast(leaf).device) == (torch.float32, leaf.device)
            assert cast(leaf) is cast(leaf)
