"""Clipping, averages and partitions: derivatives at zero, narrow dtypes, other defaults and devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_func import optim, tree

FP64 = torch.float64
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def grads_of(seed: int, scale: float = 1.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(7, generator=generator, dtype=FP64) * scale
    return {"a": draw[:4], "b": {"c": draw[4:6].reshape(2, 1), "d": draw[6]}}


# --------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("max_norm", [0.5, 0.0, math.inf, torch.tensor(0.5, dtype=FP64)], ids=str)
def test_the_derivative_of_clipping_at_zero_gradients_is_finite(max_norm: optim.base.Scalar) -> None:
    """Below the bound clipping is the identity, at zeros too; the norm's derivative there counts as 0."""
    zeros = tree.map(torch.zeros_like, grads_of(0))
    weights = grads_of(1)

    def clipped(g: Any) -> Tensor:
        return tree.dot(optim.clip_by_global_norm(g, max_norm)[0], weights)

    got = torch.func.grad(clipped)(zeros)
    wanted = tree.map(torch.zeros_like, weights) if max_norm == 0 else weights
    for a, b in zip(tree.leaves(got), tree.leaves(wanted), strict=True):
        assert torch.equal(a, b)
    second = torch.func.hessian(clipped)(zeros)
    assert not any(leaf.any() for leaf in tree.leaves(second))

    def norm(g: Any) -> Tensor:
        return optim.clip_by_global_norm(g, max_norm)[1]

    for leaf in tree.leaves((torch.func.grad(norm)(zeros), torch.func.hessian(norm)(zeros))):
        assert not leaf.any()


@pytest.mark.parametrize("bound", [0.1, 100.0], ids=["clipped", "as-it-is"])
def test_one_leaf_of_zeros_leaves_second_derivatives_finite(bound: float) -> None:
    """torch's norm of that leaf has NaN for a second derivative."""
    grads = {**grads_of(0), "zeros": torch.zeros(2, dtype=FP64)}
    weights = {**grads_of(1), "zeros": torch.ones(2, dtype=FP64)}

    def clipped(g: Any) -> Tensor:
        return tree.dot(optim.clip_by_global_norm(g, bound)[0], weights)

    def along(share: Tensor) -> Tensor:
        """Its slope towards the weights, among the gradients that are not zero."""
        towards = {**weights, "zeros": torch.zeros(2, dtype=FP64)}
        at = tree.map(lambda g, t: g + share * t, grads, towards)
        return torch.func.jvp(clipped, (at,), (towards,))[1]

    assert all(leaf.isfinite().all() for leaf in tree.leaves(torch.func.hessian(clipped)(grads)))
    zero, h = torch.zeros((), dtype=FP64), 1e-5
    numeric = (along(zero + h) - along(zero - h)) / (2 * h)
    torch.testing.assert_close(torch.func.grad(along)(zero), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("setting", ["dtype", "device"])
def test_the_norm_without_leaves_does_not_depend_on_global_defaults(setting: str) -> None:
    before = torch.get_default_dtype()
    try:
        if setting == "dtype":
            torch.set_default_dtype(FP64)
        else:
            torch.set_default_device("meta")
        norm = optim.clip_by_global_norm({}, 1.0)[1]
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert (norm.dtype, norm.device.type, norm.item()) == (torch.float32, "cpu", 0.0)


@given(st.integers(0, 2**31), st.floats(0.1, 10), st.booleans())
def test_the_derivative_of_clipping_is_a_central_difference(seed: int, bound: float, masked: bool) -> None:
    """In the gradients, of which some leaves may be zero, and in the bound."""
    grads, weights, towards = grads_of(seed), grads_of(seed + 1), grads_of(seed + 2)
    if masked:
        grads["b"] = tree.map(torch.zeros_like, grads["b"])

    def value(share: Tensor) -> Tensor:
        moved = tree.map(lambda g, t: g + share * t, grads, towards)
        return tree.dot(optim.clip_by_global_norm(moved, bound * (1 + share))[0], weights)

    at, h = torch.zeros((), dtype=FP64), 1e-6
    assume(abs(float(tree.norm(grads)) - bound) > 1e-3)  # the kink
    numeric = (value(at + h) - value(at - h)) / (2 * h)
    scale = float(tree.norm(weights)) * (1 + bound + float(tree.norm(towards)))
    torch.testing.assert_close(torch.func.grad(value)(at), numeric, rtol=0, atol=1e-6 * scale)
    tangent = torch.func.jvp(value, (at,), (torch.ones_like(at),))[1]
    torch.testing.assert_close(tangent, numeric, rtol=0, atol=1e-6 * scale)


@NARROW
@given(seed=st.integers(0, 2**31), max_norm=st.floats(0.01, 10))
def test_narrow_gradients_are_clipped_to_the_bound_that_is_stated(
    dtype: torch.dtype, seed: int, max_norm: float
) -> None:
    grads = tree.map(lambda g: g.to(dtype), grads_of(seed, scale=5.0))
    clipped, norm = optim.clip_by_global_norm(grads, max_norm)
    exact = tree.map(lambda g: g.double(), grads)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(tree.norm(exact)), rel=16 * torch.finfo(torch.float32).eps)
    got = tree.map(lambda g: g.double(), clipped)
    eps = torch.finfo(dtype).eps
    # half a unit of each entry, or of the least subnormal number, and float32's own rounding
    slack = torch.finfo(dtype).smallest_normal * eps * math.sqrt(tree.size(grads))
    wide = 16 * torch.finfo(torch.float32).eps
    assert float(tree.norm(got)) <= max_norm * (1 + eps / 2 + wide) + slack
    factor = min(1.0, max_norm / (float(tree.norm(exact)) + 1e-6))
    for a, b in zip(tree.leaves(got), tree.leaves(exact), strict=True):
        assert ((a - factor * b).abs() <= (eps / 2 + wide) * (factor * b).abs() + slack).all()


@NARROW
def test_the_norm_of_many_narrow_gradients_is_neither_stuck_nor_infinite(dtype: torch.dtype) -> None:
    grads = {str(i): torch.full((), 300.0, dtype=dtype) for i in range(1000)}  # 300**2 is above fp16's range
    exact = math.sqrt(1000) * float(torch.tensor(300.0, dtype=dtype))
    close = 1000 * torch.finfo(torch.float32).eps
    assert float(optim.clip_by_global_norm(grads, 1.0)[1]) == pytest.approx(exact, rel=close)
    assert float(tree.norm(grads)) == pytest.approx(exact, rel=close)


def test_the_bound_may_be_a_tensor_that_is_mapped_over() -> None:
    grads, bounds = grads_of(3), torch.tensor([0.0, 0.1, 1.0, 100.0], dtype=FP64)
    got = torch.func.vmap(lambda bound: optim.clip_by_global_norm(grads, bound)[0])(bounds)
    for i, bound in enumerate(bounds.tolist()):
        want = optim.clip_by_global_norm(grads, bound)[0]
        for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-15, atol=0)
    with pytest.raises(ValueError, match="max_norm must be a number or a 0-d floating tensor"):
        optim.clip_by_global_norm(grads, bounds)


# --------------------------------------------------------------------------- averages


def test_the_decay_of_an_average_is_differentiated_and_mapped_over() -> None:
    average, new, weights = grads_of(0), grads_of(1), grads_of(2)
    decay = torch.tensor(0.3, dtype=FP64)
    got = torch.func.grad(lambda d: tree.dot(optim.ema(average, new, d), weights))(decay)
    want = tree.dot(tree.map(torch.sub, average, new), weights)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
    decays = torch.tensor([0.0, 0.3, 1.0], dtype=FP64)
    stacked = torch.func.vmap(lambda d: optim.ema(average, new, d))(decays)
    for i, d in enumerate(decays.tolist()):
        for a, b in zip(tree.leaves(stacked), tree.leaves(optim.ema(average, new, d)), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-15, atol=1e-16)


# --------------------------------------------------------------------------- a device without float64

MAKERS: dict[str, Callable[[], optim.Optimizer]] = {
    "sgd": lambda: optim.sgd(optim.one_cycle(0.1, 9), momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda: optim.adam(optim.cosine(0.1, 9, warmup_steps=2), weight_decay=0.1),
    "adamw": lambda: optim.adamw(optim.step(0.1, (2, 3)), weight_decay=0.1),
    "muon": lambda: optim.muon(0.1, precision=torch.bfloat16),
    "clipped": lambda: optim.clipped(optim.sgd(0.1), 1.0),
    "tensors": lambda: optim.adamw(*tensors(), weight_decay=torch.tensor(0.1, dtype=FP64)),
    "tensors-sgd": lambda: optim.sgd(torch.tensor(0.1, dtype=FP64), momentum=torch.tensor(0.9, dtype=FP64)),
    "partition": lambda: optim.partition(lambda path: path == "w", optim.muon(0.1), optim.adam(0.1)),
}


def tensors() -> tuple[Any, ...]:
    lr, beta1, beta2, eps = (torch.tensor(v, dtype=FP64) for v in (0.1, 0.9, 0.99, 1e-8))
    return lr, (beta1, beta2), eps


class Float64On(TorchDispatchMode):
    """The names of the operators that made a float64 tensor on a kind of device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.names = device, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree.leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == FP64 and leaf.device.type == self.device:
                self.names.append(str(func))
        return result


@pytest.mark.parametrize("name", MAKERS)
def test_no_float64_is_made_on_a_device_that_has_none(name: str) -> None:
    with FakeTensorMode():
        optimizer = MAKERS[name]()
        params = {"w": torch.zeros(3, 2, device="mps")}
        if name != "muon":
            params["b"] = torch.zeros(3, device="mps")
        with Float64On("mps") as watched:
            opt_state = optimizer.init(params)
            for _ in range(2):
                moved, opt_state = optimizer.step(params, opt_state, params)
            optim.ema(params, moved, torch.tensor(0.9, dtype=FP64))
        assert not watched.names
        assert {(leaf.device.type, leaf.dtype) for leaf in tree.leaves(moved)} == {("mps", torch.float32)}


def test_what_makes_float64_on_the_device_is_seen() -> None:
    with FakeTensorMode(), Float64On("mps") as watched:
        torch.zeros(3, device="mps").double()
    assert watched.names
